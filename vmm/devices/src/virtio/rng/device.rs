//! What the entropy device does.

use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Now, Reader, Writer};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::QUEUE_SIZE;
use crate::limits::RNG_BYTES_PER_CHAIN;
use crate::virtio::{Cause, Ram, Rings, Segments, Virtio, Wake};

/// Where randomness comes from.
pub trait Entropy: Send + Sync {
    /// Fill `out` with bytes that nobody can predict. Called with the device locked: it may not wait.
    fn fill(&self, out: &mut [u8]);
}

/// What an entropy device is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Which entropy device this is, the `0` in `rng/0`.
    pub index: u32,
    /// Where its bytes come from.
    pub entropy: Arc<dyn Entropy>,
}

/// An entropy device.
pub struct Rng {
    kind: String,
    entropy: Arc<dyn Entropy>,
}

impl Rng {
    /// Fill a buffer from its front; says how far.
    fn fill(&self, mut buffer: Segments, ram: &Ram) -> u32 {
        let wanted = usize::try_from(buffer.bytes()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; wanted.min(RNG_BYTES_PER_CHAIN)];
        self.entropy.fill(&mut bytes);
        match buffer.write(ram, &bytes) {
            Ok(()) => u32::try_from(bytes.len()).expect("limits.rs keeps it far below 4 GiB"),
            Err(_) => 0,
        }
    }
}

impl Virtio for Rng {
    const ID: u32 = VIRTIO_ID_RNG;
    /// Version 1: nothing.
    const VERSION: u32 = 1;
    type Wiring = Wiring;

    fn new(wiring: Wiring) -> Self {
        Self {
            kind: format!("rng/{}", wiring.index),
            entropy: wiring.entropy,
        }
    }

    fn kind(&self) -> &str {
        &self.kind
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn work(&mut self, _now: Now, _cause: Cause, rings: &mut Rings) -> Wake {
        while let Some(chain) = rings.pop(0) {
            let token = chain.token();
            let written = self.fill(chain.writable, rings.ram());
            rings.push(token, written);
        }
        Wake::Idle
    }

    fn reset(&mut self) {}

    fn save(&self, _w: &mut Writer) {}

    fn load(&mut self, _r: &mut Reader<'_>) -> Result<(), Malformed> {
        Ok(())
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rng({})", self.kind)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(rng/{})", self.index)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::virtio::testing::{Driver, virtio_tests};

    struct Dice(Mutex<umbra_units::Rng>);

    impl Entropy for Dice {
        fn fill(&self, out: &mut [u8]) {
            self.0.lock().unwrap().fill(out);
        }
    }

    fn wiring() -> Wiring {
        Wiring {
            index: 0,
            entropy: Arc::new(Dice(Mutex::new(umbra_units::Rng::new(1)))),
        }
    }

    virtio_tests!(
        conformance,
        device: Rng,
        wiring: wiring,
        offer: |driver: &mut Driver<Rng>| {
            driver.add(0, &[], &[8, 16]);
            0
        }
    );

    #[test]
    fn the_guest_gets_as_many_bytes_as_it_asked_for() {
        let mut driver = Driver::<Rng>::at_work(wiring());
        let one = driver.request(0, &[], 100).unwrap();
        let other = driver.request(0, &[], 100).unwrap();
        assert_eq!((one.len(), other.len()), (100, 100));
        assert_ne!(one, other);
    }

    #[test]
    fn a_greedy_guest_gets_a_part() {
        let mut driver = Driver::<Rng>::at_work(wiring());
        let wanted = u32::try_from(RNG_BYTES_PER_CHAIN).unwrap() + 1;
        assert_eq!(driver.request(0, &[], wanted).unwrap().len(), RNG_BYTES_PER_CHAIN);
    }

    #[test]
    fn a_buffer_outside_of_memory_or_none_at_all_is_given_back_empty() {
        let mut driver = Driver::<Rng>::at_work(wiring());
        let outside = (vm_memory::GuestAddress(1 << 40), 8, 2);
        driver.add_pieces(0, &[outside]);
        driver.add(0, &[b"x"], &[]);
        driver.kick(0);
        assert_eq!((driver.used(0), driver.used(0)), (Some((0, 0)), Some((1, 0))));
    }
}
