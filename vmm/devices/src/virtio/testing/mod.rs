//! For tests of devices, here and in other crates: a driver that behaves, and one that does not.
//!
//! [`Driver`] owns a device, a small guest memory with a hole in it, and the world around the device; it plays vCPU and
//! worker in one thread, so that a test is a sequence of calls. [`hostile`] does to a device what a guest or a peer could.
//! Both are ordinary code and not behind a feature: fuzzing and the machine's tests use them, and nothing else pays.
//!
//! ```
//! use std::sync::Arc;
//! use umbra_devices::virtio::rng::{Entropy, Rng, Wiring};
//! use umbra_devices::virtio::testing::Driver;
//!
//! struct Dice;
//!
//! impl Entropy for Dice {
//!     fn fill(&self, out: &mut [u8]) {
//!         out.fill(4); // chosen by fair dice roll
//!     }
//! }
//!
//! let entropy = Arc::new(Dice);
//! let mut driver = Driver::<Rng>::at_work(Wiring { index: 0, entropy });
//! assert_eq!(driver.request(0, &[], 3), Some(vec![4, 4, 4]));
//! driver.travel();
//! assert_eq!(driver.request(0, &[], 3), Some(vec![4, 4, 4]));
//! ```

mod disk;
mod driver;
pub mod hostile;

pub use disk::MemoryDisk;
pub use driver::{Driver, Placed, RAM, Watch};

/// Stamps out the conformance tests that every virtio device must pass, on top of
/// [`contract_tests!`](crate::contract::contract_tests).
///
/// `wiring` makes what the device is connected to; `offer` puts one chain into a queue, which the device answers with at least one
/// byte as soon as it is told, and returns the queue. `words`, if given, are messages of its drivers, for a storm to say wrong.
#[cfg(test)]
macro_rules! virtio_tests {
    ($name:ident, device: $device:ty, wiring: $wiring:expr, offer: $offer:expr) => {
        $crate::virtio::testing::virtio_tests!($name, device: $device, wiring: $wiring, offer: $offer, words: Vec::new);
    };
    ($name:ident, device: $device:ty, wiring: $wiring:expr, offer: $offer:expr, words: $words:expr) => {
        mod $name {
            #[allow(unused_imports, reason = "the expressions use what their device's tests import")]
            use super::*;
            #[allow(unused_imports, reason = "their device's tests may have imported them, too")]
            use $crate::contract::{Device as _, Restore as _};
            use $crate::contract::RestoreError;
            use $crate::virtio::Mmio;
            use $crate::virtio::testing::{Driver, conformance, hostile};

            fn driver() -> Driver<$device> {
                Driver::new($wiring())
            }

            fn at_work() -> Driver<$device> {
                Driver::at_work($wiring())
            }

            $crate::contract::contract_tests!(
                contract,
                make: || driver().mmio,
                restore: |saved| Mmio::<$device>::restore(saved, driver().wiring()),
                poke: |mmio: &mut Mmio<$device>| conformance::negotiate(mmio)
            );

            #[test]
            fn it_says_what_it_is_and_what_it_can() {
                conformance::it_says_what_it_is_and_what_it_can(driver());
            }

            #[test]
            fn features_that_were_not_offered_are_refused() {
                conformance::features_that_were_not_offered_are_refused(driver());
            }

            #[test]
            fn a_chain_is_answered_once_and_the_driver_interrupted_once() {
                conformance::a_chain_is_answered_once_and_the_driver_interrupted_once(at_work(), $offer);
            }

            #[test]
            fn queues_travel_in_the_middle_of_their_rings() {
                conformance::queues_travel_in_the_middle_of_their_rings(at_work(), $offer);
            }

            #[test]
            fn what_is_saved_at_work_is_what_is_restored() {
                let mut driver = at_work();
                for _ in 0..3 {
                    conformance::exchange(&mut driver, $offer);
                }
                driver.mmio.pause();
                let saved = driver.mmio.save().unwrap();
                let twin = Mmio::<$device>::restore(&saved, driver.wiring()).unwrap();
                assert_eq!(twin.save().unwrap(), saved);
            }

            #[test]
            fn a_driver_with_features_that_are_missing_here_is_refused() {
                let mut saved = at_work().mmio.save().unwrap();
                // Nobody offers bit 63.
                saved.bytes[15] |= 0x80;
                let error = Mmio::<$device>::restore(&saved, driver().wiring()).unwrap_err();
                assert!(matches!(error, RestoreError::Refused { .. }), "{error}");
            }

            #[test]
            fn a_paused_device_takes_nothing_and_is_silent_and_makes_up_for_it() {
                conformance::a_paused_device_takes_nothing_and_is_silent_and_makes_up_for_it(at_work(), $offer);
            }

            #[test]
            fn an_interrupt_that_nobody_saw_is_raised_again() {
                conformance::an_interrupt_that_nobody_saw_is_raised_again(at_work(), $offer);
            }

            #[test]
            fn a_reset_device_is_silent_and_can_be_started_again() {
                conformance::a_reset_device_is_silent_and_can_be_started_again(at_work(), $offer);
            }

            #[test]
            fn every_byte_it_writes_is_marked() {
                conformance::every_byte_it_writes_is_marked(at_work(), $offer);
            }

            #[test]
            fn a_ring_that_cannot_be_used_breaks_the_device_until_it_is_reset() {
                conformance::a_ring_that_cannot_be_used_breaks_the_device_until_it_is_reset(at_work(), $offer);
            }

            #[test]
            fn whatever_a_driver_does_the_device_survives() {
                for seed in 0..2_000 {
                    let mut driver = at_work();
                    hostile::Storm::new(seed).knowing($words()).rage(&mut driver, 40);
                    hostile::recover(&mut driver);
                    conformance::exchange(&mut driver, $offer);
                }
            }
        }
    };
}
#[cfg(test)]
pub(crate) use virtio_tests;

#[cfg(test)]
pub(crate) mod conformance;
