//! The promises behind `virtio_tests!`, one function each.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;

use super::Driver;
use crate::contract::Device as _;
use crate::virtio::{Mmio, Virtio, Wake, bit};

/// Bring the registers of a device into a state that is not power-on.
pub(crate) fn negotiate<D: Virtio>(mmio: &mut Mmio<D>) {
    let status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    for (at, value) in [
        (register::VIRTIO_MMIO_STATUS, status),
        (register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1),
        (register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        (register::VIRTIO_MMIO_DRIVER_FEATURES, 1),
        (register::VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_FEATURES_OK),
        (register::VIRTIO_MMIO_QUEUE_SEL, 0),
        (register::VIRTIO_MMIO_QUEUE_NUM, 8),
        (register::VIRTIO_MMIO_QUEUE_USED_HIGH, 3),
        (register::VIRTIO_MMIO_QUEUE_SEL, 7),
    ] {
        mmio.write(at.into(), &value.to_le_bytes());
    }
}

/// One chain, answered.
pub(crate) fn exchange<D: Virtio>(driver: &mut Driver<D>, offer: impl Fn(&mut Driver<D>) -> u16) -> (u16, u32) {
    let queue = offer(driver);
    driver.kick(queue);
    let answer = driver.used(queue).expect("an answer");
    assert_eq!(driver.used(queue), None, "one answer per chain");
    answer
}

pub(crate) fn it_says_what_it_is_and_what_it_can<D: Virtio>(mut driver: Driver<D>) {
    assert_eq!(driver.register(register::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.register(register::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.register(register::VIRTIO_MMIO_DEVICE_ID), D::ID);
    assert_ne!(driver.offered() & bit(VIRTIO_F_VERSION_1), 0);
    let sizes = driver.mmio.queues();
    for (n, size) in (0..).zip(sizes.iter().copied().chain([0, 0])) {
        driver.set_register(register::VIRTIO_MMIO_QUEUE_SEL, n);
        assert_eq!(driver.register(register::VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(size));
    }
    driver.set_register(register::VIRTIO_MMIO_QUEUE_SEL, u32::MAX);
    assert_eq!(driver.register(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    assert_eq!(driver.register(register::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

pub(crate) fn features_that_were_not_offered_are_refused<D: Virtio>(mut driver: Driver<D>) {
    driver.mmio.resume();
    let offered = driver.offered();
    assert!(driver.negotiate_exactly(offered));
    assert!(driver.negotiate_exactly(bit(VIRTIO_F_VERSION_1)));
    assert!(!driver.negotiate_exactly(offered & !bit(VIRTIO_F_VERSION_1)));
    assert!(!driver.negotiate_exactly(offered | bit(63)));
    // A driver that goes on all the same is not obeyed.
    driver.set_up_queues();
    driver.ready();
    driver.set_register(register::VIRTIO_MMIO_QUEUE_SEL, 0);
    assert_eq!(driver.register(register::VIRTIO_MMIO_QUEUE_READY), 0);
    let status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    assert_eq!(driver.status(), status);
}

pub(crate) fn a_chain_is_answered_once_and_the_driver_interrupted_once<D: Virtio>(
    mut driver: Driver<D>,
    offer: impl Fn(&mut Driver<D>) -> u16,
) {
    for indirect in [false, true] {
        driver.indirect = indirect;
        driver.acknowledge();
        let before = driver.watch.pulses();
        let queue = offer(&mut driver);
        let event = driver.added(queue).wrapping_sub(1);
        driver.set_used_event(queue, event);
        assert_eq!(driver.used(queue), None, "nothing happens before the driver says so");
        driver.kick(queue);
        assert!(driver.used(queue).is_some());
        assert_eq!(driver.watch.pulses(), before + 1);
        assert_eq!(driver.acknowledge() & register::VIRTIO_MMIO_INT_VRING, 1);
        assert_eq!(driver.acknowledge(), 0);
        driver.kick(queue);
        assert_eq!(driver.watch.pulses(), before + 1, "nothing new, no interrupt");
    }
}

pub(crate) fn queues_travel_in_the_middle_of_their_rings<D: Virtio>(
    mut driver: Driver<D>,
    offer: impl Fn(&mut Driver<D>) -> u16,
) {
    // Over the end of the ring, and of a 16-bit index's first half, with moves at uneven places.
    for n in 0..400 {
        exchange(&mut driver, &offer);
        if n % 37 == 0 {
            driver.travel();
        }
    }
}

pub(crate) fn a_paused_device_takes_nothing_and_is_silent_and_makes_up_for_it<D: Virtio>(
    mut driver: Driver<D>,
    offer: impl Fn(&mut Driver<D>) -> u16,
) {
    driver.acknowledge();
    driver.mmio.pause();
    let pulses = driver.watch.pulses();
    let queue = offer(&mut driver);
    driver.set_used_event(queue, driver.added(queue).wrapping_sub(1));
    assert_eq!((driver.kick(queue), driver.world()), (Wake::Idle, Wake::Idle));
    assert_eq!((driver.used(queue), driver.watch.pulses()), (None, pulses));
    driver.travel();
    assert!(
        driver.used(queue).is_some(),
        "what was offered is taken without another word"
    );
    assert_eq!(driver.watch.pulses(), pulses + 1);
}

pub(crate) fn an_interrupt_that_nobody_saw_is_raised_again<D: Virtio>(
    mut driver: Driver<D>,
    offer: impl Fn(&mut Driver<D>) -> u16,
) {
    let queue = offer(&mut driver);
    driver.set_used_event(queue, driver.added(queue).wrapping_sub(1));
    driver.kick(queue);
    assert_ne!(driver.register(register::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let pulses = driver.watch.pulses();
    driver.travel();
    assert_eq!(driver.watch.pulses(), pulses + 1);
    driver.acknowledge();
    driver.travel();
    assert_eq!(driver.watch.pulses(), pulses + 1, "what was seen is not");
}

pub(crate) fn a_reset_device_is_silent_and_can_be_started_again<D: Virtio>(
    mut driver: Driver<D>,
    offer: impl Fn(&mut Driver<D>) -> u16,
) {
    exchange(&mut driver, &offer);
    let queue = offer(&mut driver);
    driver.set_register(register::VIRTIO_MMIO_STATUS, 0);
    let pulses = driver.watch.pulses();
    driver.kick(queue);
    driver.world();
    assert_eq!((driver.used(queue), driver.watch.pulses()), (None, pulses));
    assert_eq!((driver.status(), driver.acknowledge()), (0, 0));
    assert!(driver.negotiate(u64::MAX));
    driver.set_up_queues();
    driver.ready();
    exchange(&mut driver, &offer);
}

pub(crate) fn every_byte_it_writes_is_marked<D: Virtio>(mut driver: Driver<D>, offer: impl Fn(&mut Driver<D>) -> u16) {
    for _ in 0..3 {
        let queue = offer(&mut driver);
        let before = driver.snapshot();
        driver.kick(queue);
        assert_eq!(driver.unmarked(&before), []);
        assert!(driver.used(queue).is_some());
    }
}

pub(crate) fn a_ring_that_cannot_be_used_breaks_the_device_until_it_is_reset<D: Virtio>(
    mut driver: Driver<D>,
    offer: impl Fn(&mut Driver<D>) -> u16,
) {
    exchange(&mut driver, &offer);
    driver.acknowledge();
    let (queue, added) = (offer(&mut driver), 20_000);
    driver.set_added(queue, added);
    driver.kick(queue);
    assert_ne!(driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    assert_eq!(driver.acknowledge() & register::VIRTIO_MMIO_INT_CONFIG, 2);
    assert_eq!((driver.mmio.work().counters().broken, driver.used(queue)), (1, None));
    // Also elsewhere.
    driver.travel();
    driver.kick(queue);
    assert_ne!(driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
    assert_eq!(driver.used(queue), None);
    assert!(driver.negotiate(u64::MAX));
    driver.set_up_queues();
    driver.ready();
    exchange(&mut driver, &offer);
}
