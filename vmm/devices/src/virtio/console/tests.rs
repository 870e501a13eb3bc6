//! What a console promises, beyond what every device does.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::sync::{Arc, Mutex};

use super::*;
use crate::contract::{Device as _, Out};
use crate::limits::{CONSOLE_BYTES_PER_CHAIN, CONSOLE_INPUT_BYTES};
use crate::virtio::testing::{Driver, virtio_tests};

#[derive(Default)]
struct World(Mutex<Vec<u8>>);

impl Out for World {
    fn put(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(bytes);
    }
}

fn wiring(world: &Arc<World>) -> Wiring {
    Wiring {
        index: 0,
        out: world.clone(),
    }
}

fn world() -> (Arc<World>, Driver<Console>) {
    let world = Arc::new(World::default());
    let driver = Driver::at_work(wiring(&world));
    (world, driver)
}

fn types(driver: &mut Driver<Console>, keys: &[u8]) -> usize {
    driver
        .mmio
        .engine()
        .lock()
        .unwrap()
        .act(|console, rings| console.input(keys, rings))
}

virtio_tests!(
    conformance,
    device: Console,
    wiring: || wiring(&Arc::new(World::default())),
    offer: |driver: &mut Driver<Console>| {
        driver.add(TRANSMIT, &[b"x"], &[]);
        TRANSMIT
    }
);

#[test]
fn what_the_guest_writes_comes_out_in_order() {
    let (world, mut driver) = world();
    driver.add(TRANSMIT, &[b"hel", b"lo "], &[]);
    driver.add(TRANSMIT, &[b"world"], &[]);
    driver.kick(TRANSMIT);
    assert_eq!(*world.0.lock().unwrap(), b"hello world");
}

#[test]
fn keys_reach_the_guest_in_order_and_interrupt_it() {
    let (_, mut driver) = world();
    let buffer = driver.add(RECEIVE, &[], &[4]);
    driver.kick(RECEIVE);
    driver.acknowledge();
    assert_eq!(types(&mut driver, b"abcdef"), 6);
    assert_eq!(driver.acknowledge() & 1, 1);
    assert_eq!(driver.used(RECEIVE), Some((buffer.head, 4)));
    assert_eq!(driver.get(buffer.writable[0], 4), b"abcd");
    let buffer = driver.add(RECEIVE, &[], &[4]);
    driver.kick(RECEIVE);
    assert_eq!(driver.used(RECEIVE), Some((buffer.head, 2)));
    assert_eq!(driver.get(buffer.writable[0], 2), b"ef");
}

#[test]
fn keys_beyond_the_bound_are_refused_and_those_within_it_travel() {
    let (_, mut driver) = world();
    assert_eq!(types(&mut driver, &[7; CONSOLE_INPUT_BYTES + 1]), CONSOLE_INPUT_BYTES);
    assert_eq!(types(&mut driver, b"x"), 0);
    driver.travel();
    let buffer = driver.add(RECEIVE, &[], &[5000]);
    driver.kick(RECEIVE);
    assert_eq!(driver.used(RECEIVE), Some((buffer.head, CONSOLE_INPUT_BYTES as u32)));
}

#[test]
fn a_paused_console_accepts_keys_and_shows_them_later() {
    let (_, mut driver) = world();
    driver.add(RECEIVE, &[], &[10]);
    driver.kick(RECEIVE);
    driver.mmio.pause();
    assert_eq!(types(&mut driver, b"k"), 1);
    assert_eq!(driver.used(RECEIVE), None);
    driver.mmio.resume();
    driver.run();
    assert_eq!(driver.used(RECEIVE).map(|(_, written)| written), Some(1));
}

#[test]
fn another_size_of_the_terminal_is_told() {
    let (_, mut driver) = world();
    driver.acknowledge();
    let resize = |driver: &mut Driver<Console>| {
        driver
            .mmio
            .engine()
            .lock()
            .unwrap()
            .act(|c, rings| c.resize(132, 50, rings))
    };
    resize(&mut driver);
    assert_eq!(driver.acknowledge() & 2, 2);
    let mut size = [0; 4];
    driver.mmio.read(0x100, &mut size);
    assert_eq!(size, [132, 0, 50, 0]);
    resize(&mut driver);
    assert_eq!(driver.acknowledge(), 0, "the same is not news");
}

#[test]
fn a_single_byte_gets_out_without_queues() {
    let world = Arc::new(World::default());
    let mut driver = Driver::<Console>::new(wiring(&world));
    driver.mmio.resume();
    driver.mmio.write(0x108, &u32::from(b'!').to_le_bytes());
    assert_eq!(*world.0.lock().unwrap(), b"!");
}

#[test]
fn a_chain_of_any_length_is_heard_as_far_as_the_bound() {
    let (world, mut driver) = world();
    let text = vec![b'a'; CONSOLE_BYTES_PER_CHAIN / 2];
    driver.add(TRANSMIT, &[&text, &text, b"beyond"], &[]);
    driver.kick(TRANSMIT);
    assert_eq!(world.0.lock().unwrap().len(), CONSOLE_BYTES_PER_CHAIN);
}
