//! What a network card promises, beyond what every device does.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use umbra_units::{Now, Rng};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::GuestAddress;

use super::*;
use crate::contract::Device as _;
use crate::virtio::limiter::{Limits, Rate};
use crate::virtio::testing::hostile::{self, Storm};
use crate::virtio::testing::{Driver, Placed, virtio_tests};
use crate::virtio::{Wake, bit};

/// The other end of the wire.
#[derive(Default)]
struct World {
    coming: Mutex<VecDeque<Vec<u8>>>,
    sent: Mutex<Vec<Vec<u8>>>,
    full: AtomicBool,
    deaf: AtomicBool,
    offloads: Mutex<Vec<Offloads>>,
}

impl Tap for World {
    fn send(&self, frame: &[u8]) -> Sent {
        if self.full.load(Ordering::Relaxed) {
            return Sent::NotNow;
        }
        self.sent.lock().unwrap().push(frame.to_vec());
        Sent::Taken
    }

    fn receive(&self, frame: &mut [u8]) -> Option<usize> {
        assert!(frame.len() >= FRAME_BYTES, "the largest frame must fit");
        let next = self.coming.lock().unwrap().pop_front()?;
        frame[..next.len()].copy_from_slice(&next);
        Some(next.len())
    }

    fn listen(&self, yes: bool) {
        self.deaf.store(!yes, Ordering::Relaxed);
    }

    fn offload(&self, offloads: Offloads) {
        self.offloads.lock().unwrap().push(offloads);
    }
}

impl World {
    fn comes(&self, frame: Vec<u8>) {
        self.coming.lock().unwrap().push_back(frame);
    }

    fn take_sent(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::Relaxed)
    }
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn wiring(tap: &Arc<World>) -> Wiring {
    Wiring {
        id: "eth0".to_owned(),
        mac: MAC,
        mtu: Some(1400),
        offload: true,
        guest_announce: false,
        receive_limits: Limits::default(),
        send_limits: Limits::default(),
        tap: tap.clone(),
    }
}

fn world() -> (Arc<World>, Driver<Net>) {
    let world = Arc::new(World::default());
    let driver = Driver::at_work(wiring(&world));
    (world, driver)
}

/// A card whose driver takes only these features.
fn with_features(tap: &Arc<World>, features: u64) -> Driver<Net> {
    let mut driver = Driver::new(wiring(tap));
    driver.mmio.resume();
    assert!(driver.negotiate(features | bit(32)));
    driver.set_up_queues();
    driver.ready();
    driver
}

/// A frame of `len` bytes, header included, that says its number.
fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend(number.to_le_bytes());
    frame.resize(len, (number % 251) as u8);
    frame
}

/// What a driver makes of buffers that came back for one frame.
fn received(driver: &mut Driver<Net>, buffers: &mut VecDeque<Placed>) -> Option<Vec<u8>> {
    let mut whole: Vec<u8> = Vec::new();
    let mut left = 1;
    while left > 0 {
        let used = driver.used(RECEIVE);
        assert!(
            used.is_some() || whole.is_empty(),
            "the buffers of a frame come together"
        );
        let (head, written) = used?;
        let buffer = buffers.pop_front().expect("a buffer was offered");
        assert_eq!(head, buffer.head, "buffers come back in order");
        let part = driver.get(buffer.writable[0], written);
        if whole.is_empty() {
            left = u16::from_le_bytes([part[10], part[11]]);
        }
        whole.extend(part);
        left -= 1;
    }
    whole[10..12].fill(0);
    Some(whole)
}

const ANNOUNCED: [u8; 2] = [3, 0];

virtio_tests!(
    conformance,
    device: Net,
    wiring: || wiring(&Arc::new(World::default())),
    offer: |driver: &mut Driver<Net>| {
        driver.add(CONTROL, &[&ANNOUNCED], &[1]);
        CONTROL
    }
);

#[test]
fn frames_cross_in_both_directions() {
    let (world, mut driver) = world();
    driver.add(
        TRANSMIT,
        &[&frame(1, 60)[..HEADER_BYTES], &frame(1, 60)[HEADER_BYTES..]],
        &[],
    );
    driver.kick(TRANSMIT);
    assert_eq!(world.take_sent(), [frame(1, 60)]);
    let mut buffers = VecDeque::from([driver.add(RECEIVE, &[], &[2000])]);
    world.comes(frame(2, 1500));
    driver.world();
    assert_eq!(received(&mut driver, &mut buffers), Some(frame(2, 1500)));
}

#[test]
fn a_frame_larger_than_a_buffer_takes_as_many_as_it_needs_and_they_come_together() {
    let (world, mut driver) = world();
    let mut buffers: VecDeque<_> = (0..50).map(|_| driver.add(RECEIVE, &[], &[1500])).collect();
    world.comes(frame(7, 65_000));
    driver.world();
    assert_eq!(received(&mut driver, &mut buffers), Some(frame(7, 65_000)));
    assert_eq!(buffers.len(), 50 - 44);
}

#[test]
fn several_buffers_at_once_interrupt_also_a_driver_that_asked_about_the_first() {
    let (world, mut driver) = world();
    (0..4).for_each(|_| {
        driver.add(RECEIVE, &[], &[1000]);
    });
    driver.acknowledge();
    driver.set_used_event(RECEIVE, 1);
    let pulses = driver.watch.pulses();
    world.comes(frame(7, 3500));
    driver.world();
    assert_eq!(driver.watch.pulses(), pulses + 1);
}

#[test]
fn without_buffers_frames_wait_outside_and_the_card_listens_again_by_itself() {
    let (world, mut driver) = world();
    (0..3).for_each(|n| world.comes(frame(n, 100)));
    driver.world();
    assert!(world.is_deaf());
    assert_eq!(world.coming.lock().unwrap().len(), 2, "one is in the card");
    let mut buffers: VecDeque<_> = (0..2).map(|_| driver.add(RECEIVE, &[], &[200])).collect();
    driver.kick(RECEIVE);
    assert!(world.is_deaf());
    buffers.extend((0..2).map(|_| driver.add(RECEIVE, &[], &[200])));
    driver.kick(RECEIVE);
    assert!(!world.is_deaf());
    let numbers: Vec<_> = (0..3).filter_map(|_| received(&mut driver, &mut buffers)).collect();
    assert_eq!(numbers, [frame(0, 100), frame(1, 100), frame(2, 100)]);
}

#[test]
fn a_frame_that_fits_no_buffer_is_dropped_and_the_buffer_stays() {
    let world = Arc::new(World::default());
    let mut driver = with_features(&world, !bit(VIRTIO_NET_F_MRG_RXBUF));
    let mut buffers = VecDeque::from([driver.add(RECEIVE, &[], &[1000])]);
    world.comes(frame(1, 1001));
    world.comes(frame(2, 1000));
    driver.world();
    assert_eq!(received(&mut driver, &mut buffers), Some(frame(2, 1000)));
    // One that needs more buffers than a frame may have is dropped too.
    let (world, mut driver) = self::world();
    (0..256).for_each(|_| {
        driver.add(RECEIVE, &[], &[16]);
    });
    world.comes(frame(1, 5000));
    world.comes(frame(2, 16));
    driver.world();
    assert_eq!(driver.used(RECEIVE).map(|(_, written)| written), Some(16));
}

#[test]
fn a_frame_the_world_does_not_take_holds_up_the_others_until_it_does() {
    let (world, mut driver) = world();
    world.full.store(true, Ordering::Relaxed);
    for n in 0..3 {
        driver.add(TRANSMIT, &[&frame(n, 60)], &[]);
    }
    driver.kick(TRANSMIT);
    driver.kick(TRANSMIT);
    driver.travel();
    assert!(world.take_sent().is_empty());
    world.full.store(false, Ordering::Relaxed);
    driver.world();
    let sent: Vec<_> = world
        .take_sent()
        .into_iter()
        .filter(|frame| frame[12..18] != [255; 6])
        .collect();
    assert_eq!(sent, [frame(0, 60), frame(1, 60), frame(2, 60)]);
}

#[test]
fn what_is_no_frame_or_asks_for_what_was_not_agreed_is_not_sent() {
    let world = Arc::new(World::default());
    let mut driver = with_features(&world, 0);
    let header = |flags, segmentation| {
        let mut frame = frame(1, 60);
        frame[..2].copy_from_slice(&[flags, segmentation]);
        frame
    };
    for bad in [
        frame(1, FRAME_LEAST - 1),
        vec![0; FRAME_BYTES + 1],
        header(1, 0),
        header(0, 1),
        header(2, 0),
    ] {
        let (one, two) = bad.split_at(bad.len() / 2);
        driver.add(TRANSMIT, &[one, two], &[]);
        driver.kick(TRANSMIT);
        assert!(driver.used(TRANSMIT).is_some(), "its buffer comes back");
    }
    assert!(world.take_sent().is_empty());
    let mut driver = with_features(&world, bit(VIRTIO_NET_F_CSUM));
    driver.add(TRANSMIT, &[&header(1, 0)], &[]);
    driver.kick(TRANSMIT);
    assert_eq!(world.take_sent().len(), 1);
}

#[test]
fn the_tap_is_told_what_the_driver_takes_undone_also_after_a_move_and_after_a_reset() {
    let world = Arc::new(World::default());
    let mut driver = with_features(&world, bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_TSO4));
    driver.world();
    let agreed = Offloads {
        checksum: true,
        tso4: true,
        tso6: false,
    };
    let last = || world.offloads.lock().unwrap().last().copied();
    assert_eq!(last(), Some(agreed));
    driver.travel();
    assert_eq!(last(), Some(agreed));
    assert!(driver.negotiate(bit(32)));
    driver.set_up_queues();
    driver.ready();
    driver.kick(TRANSMIT);
    assert_eq!(last(), Some(Offloads::default()));
}

#[test]
fn the_driver_reads_its_address_and_mtu() {
    let (_, mut driver) = world();
    let mut config = [0; 12];
    for (n, byte) in (0..).zip(&mut config) {
        driver.mmio.read(0x100 + n, std::slice::from_mut(byte));
    }
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5]);
}

#[test]
fn commands_that_are_not_offered_are_answered_with_an_error() {
    let (_, mut driver) = world();
    let mut ask = |command: &[u8]| driver.request(CONTROL, &[command], 1);
    assert_eq!(ask(&ANNOUNCED), Some(vec![0]));
    for command in [&[0, 0, 1][..], &[1, 1], &[4, 0, 2, 0], &[3, 1], &[9]] {
        assert_eq!(ask(command), Some(vec![1]), "{command:?}");
    }
}

#[test]
fn a_moved_guest_is_announced_five_times_and_asked_to_announce_itself() {
    let world = Arc::new(World::default());
    let mut driver = Driver::at_work(Wiring {
        guest_announce: true,
        ..wiring(&world)
    });
    assert!(
        world.take_sent().is_empty(),
        "a guest that was not moved is not announced"
    );
    let status = |driver: &mut Driver<Net>| {
        let mut status = [0; 2];
        driver.mmio.read(0x106, &mut status);
        status[0]
    };
    driver.mmio.pause();
    let saved = driver.mmio.save().unwrap();
    driver.world();
    assert!(world.take_sent().is_empty(), "nothing is said before it runs");
    drop(saved);
    driver.travel();
    assert_eq!(status(&mut driver), 3, "link is up, announcement asked for");
    assert_eq!(driver.acknowledge() & 2, 2);
    assert_eq!(driver.request(CONTROL, &[&ANNOUNCED], 1), Some(vec![0]));
    assert_eq!(status(&mut driver), 1);
    let begin = driver.now;
    for _ in 0..100 {
        driver.now = driver.now + Duration::from_millis(10);
        driver.world();
    }
    let frames = world.take_sent();
    assert_eq!(frames, vec![announce::frame(MAC); 5]);
    assert!(driver.now.since(begin) >= Duration::from_millis(800));
}

#[test]
fn limits_delay_frames_and_lose_none() {
    let world = Arc::new(World::default());
    let per_second = Limits {
        operations: Some(Rate::new(10, Duration::from_secs(1), 0).unwrap()),
        bandwidth: None,
    };
    let mut driver = Driver::at_work(Wiring {
        receive_limits: per_second,
        send_limits: per_second,
        ..wiring(&world)
    });
    let mut buffers: VecDeque<_> = (0..30).map(|_| driver.add(RECEIVE, &[], &[100])).collect();
    for n in 0..30 {
        driver.add(TRANSMIT, &[&frame(n, 60)], &[]);
        world.comes(frame(n, 60));
    }
    let mut wake = driver.kick(TRANSMIT).min(driver.world());
    let mut got = Vec::new();
    let mut rounds = 0;
    while got.len() < 30 || world.sent.lock().unwrap().len() < 30 {
        got.extend(std::iter::from_fn(|| received(&mut driver, &mut buffers)));
        match wake {
            Wake::At(later) => driver.now = later,
            Wake::Again => {}
            Wake::Idle => assert!(
                got.len() == 30 && world.sent.lock().unwrap().len() == 30,
                "it never wakes"
            ),
        }
        wake = driver.world();
        rounds += 1;
        assert!(rounds < 1000);
    }
    assert!(driver.now >= Now::from_us(1_900_000), "{}", driver.now);
    assert!(driver.now <= Now::from_us(2_100_000), "{}", driver.now);
    assert_eq!(world.take_sent(), (0..30).map(|n| frame(n, 60)).collect::<Vec<_>>());
    assert_eq!(got, (0..30).map(|n| frame(n, 60)).collect::<Vec<_>>());
}

/// Whatever comes, is offered, is refused and moves in whatever order: each frame arrives once and in order, both ways.
#[test]
fn no_frame_is_lost_repeated_or_overtaken() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let (world, mut driver) = world();
        let mut buffers = VecDeque::new();
        let (mut coming, mut got, mut going) = (0, 0, 0);
        let mut sent: Vec<Vec<u8>> = Vec::new();
        let sizes = |n: u32| FRAME_LEAST + (n as usize * 7919) % if n.is_multiple_of(9) { 20_000 } else { 1500 };
        for _ in 0..300 {
            match rng.below(7) {
                0 => {
                    world.comes(frame(coming, sizes(coming)));
                    coming += 1;
                    if !world.is_deaf() {
                        driver.world();
                    }
                }
                1 if buffers.len() < 200 => {
                    for _ in 0..rng.below(20) {
                        buffers.push_back(driver.add(RECEIVE, &[], &[1600]));
                    }
                    driver.kick(RECEIVE);
                }
                2 => {
                    let out = frame(going, sizes(going) % 1500 + FRAME_LEAST);
                    going += 1;
                    driver.add(TRANSMIT, &[&out], &[]);
                    driver.kick(TRANSMIT);
                    driver.used(TRANSMIT);
                }
                3 => world.full.store(rng.chance(0.5), Ordering::Relaxed),
                4 if rng.chance(0.2) => driver.travel(),
                5 => {
                    driver.world();
                }
                _ => {
                    while let Some(frame_got) = received(&mut driver, &mut buffers) {
                        assert_eq!(frame_got, frame(got, sizes(got)), "seed {seed}");
                        got += 1;
                    }
                }
            }
            sent.extend(world.take_sent().into_iter().filter(|frame| frame[12..18] != [255; 6]));
        }
        world.full.store(false, Ordering::Relaxed);
        driver.world();
        sent.extend(world.take_sent().into_iter().filter(|frame| frame[12..18] != [255; 6]));
        let all: Vec<_> = (0..going).map(|n| frame(n, sizes(n) % 1500 + FRAME_LEAST)).collect();
        assert!(sent == all, "seed {seed}");
        while got < coming {
            while buffers.len() < 100 {
                buffers.push_back(driver.add(RECEIVE, &[], &[1600]));
            }
            driver.kick(RECEIVE);
            let next = received(&mut driver, &mut buffers);
            assert_eq!(next, Some(frame(got, sizes(got))), "seed {seed}");
            got += 1;
        }
    }
}

#[test]
fn a_flood_from_the_guest_does_not_keep_frames_from_it() {
    let (world, mut driver) = world();
    driver.add(RECEIVE, &[], &[100]);
    driver.kick(RECEIVE);
    world.comes(frame(1, 100));
    // The driver puts a frame into the queue for each that is taken.
    let out = frame(0, 60);
    for _ in 0..200 {
        driver.add(TRANSMIT, &[&out], &[]);
    }
    for _ in 0..2 {
        driver.mmio.work().world(driver.now);
        while driver.used(TRANSMIT).is_some() {
            driver.add(TRANSMIT, &[&out], &[]);
        }
    }
    assert!(driver.used(RECEIVE).is_some());
}

/// A driver that means no good, while frames come and the world takes none now and then.
#[test]
fn frames_meet_any_driver_and_the_card_survives() {
    for seed in 0..1000 {
        let (world, mut driver) = world();
        let mut storm = Storm::new(seed);
        for n in 0..60 {
            match storm.rng().below(4) {
                0 => world.comes(frame(n, FRAME_LEAST + storm.rng().below(60_000) as usize)),
                1 => world.full.store(storm.rng().chance(0.3), Ordering::Relaxed),
                _ => storm.rage(&mut driver, 1),
            }
            driver.mmio.work().world(driver.now);
            world.take_sent();
        }
        hostile::recover(&mut driver);
        assert_eq!(driver.request(CONTROL, &[&ANNOUNCED], 1), Some(vec![0]), "seed {seed}");
    }
}

#[test]
fn a_buffer_outside_of_memory_costs_its_frame_and_nothing_else() {
    let (world, mut driver) = world();
    let write = 2;
    driver.add_pieces(RECEIVE, &[(GuestAddress(0x18_0000), 2000, write)]);
    driver.add(RECEIVE, &[], &[2000]);
    world.comes(frame(1, 100));
    world.comes(frame(2, 100));
    driver.world();
    assert_eq!(driver.used(RECEIVE).map(|(_, written)| written), Some(0));
    assert_eq!(driver.used(RECEIVE).map(|(_, written)| written), Some(100));
}
