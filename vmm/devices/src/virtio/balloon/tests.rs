//! What a balloon promises, beyond what every device does.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::sync::{Arc, Mutex};

use umbra_units::{PageCount, Pfn};
use vm_memory::GuestAddress;

use super::*;
use crate::contract::Device as _;
use crate::limits::BALLOON_PFNS_PER_CHAIN;
use crate::virtio::bit;
use crate::virtio::testing::{Driver, virtio_tests};

#[derive(Default)]
struct World(Mutex<Vec<(u64, u64)>>);

impl MemoryAdvice for World {
    fn discard(&self, first: Pfn, pages: PageCount) {
        self.0.lock().unwrap().push((first.0, pages.0));
    }
}

impl World {
    fn take(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

const STATISTICS: u16 = 2;
const REPORTING: u16 = 3;
const WRITE: u16 = 2;

fn wiring(world: &Arc<World>) -> Wiring {
    Wiring {
        target: 0,
        most: 1000,
        deflate_on_oom: true,
        reporting: true,
        advice: world.clone(),
    }
}

fn world() -> (Arc<World>, Driver<Balloon>) {
    let world = Arc::new(World::default());
    let driver = Driver::at_work(wiring(&world));
    (world, driver)
}

fn pfns(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn statistic(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

fn config(driver: &mut Driver<Balloon>) -> (u32, u32) {
    let mut word = |at: u64| {
        let mut bytes = [0; 4];
        driver.mmio.read(0x100 + at, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    (word(0), word(4))
}

virtio_tests!(
    conformance,
    device: Balloon,
    wiring: || wiring(&Arc::new(World::default())),
    offer: |driver: &mut Driver<Balloon>| {
        driver.add(INFLATE, &[&pfns(&[1])], &[]);
        INFLATE
    }
);

#[test]
fn pages_given_up_are_discarded_run_by_run() {
    let (world, mut driver) = world();
    driver.add(INFLATE, &[&pfns(&[9, 8, 7, 100, 8]), &pfns(&[101, u32::MAX])], &[]);
    driver.kick(INFLATE);
    assert_eq!(world.take(), [(7, 3), (100, 2), (0xffff_ffff, 1)]);
    driver.add(DEFLATE, &[&pfns(&[9])], &[]);
    driver.kick(DEFLATE);
    assert!(driver.used(DEFLATE).is_some() && world.take().is_empty());
}

#[test]
fn reported_pages_are_discarded_as_far_as_they_are_whole() {
    let (world, mut driver) = world();
    let pieces = [
        (GuestAddress(0x20_0000), 0x20_0000, WRITE),
        (GuestAddress(0x1001), 0x2fff, WRITE),
        (GuestAddress(0x1001), 0x1000, WRITE),
        (GuestAddress(u64::MAX), 0x1000, WRITE),
    ];
    driver.add_pieces(REPORTING, &pieces);
    driver.kick(REPORTING);
    assert_eq!(world.take(), [(0x200, 0x200), (2, 2)]);
    assert_eq!(driver.used(REPORTING).map(|(_, written)| written), Some(0));
}

#[test]
fn a_driver_without_statistics_has_its_reports_in_the_queue_before() {
    let world = Arc::new(World::default());
    let mut driver = Driver::<Balloon>::new(wiring(&world));
    driver.mmio.resume();
    assert!(driver.negotiate(bit(5) | bit(32)));
    driver.set_up_queues();
    driver.ready();
    driver.add_pieces(STATISTICS, &[(GuestAddress(0x1000), 0x1000, WRITE)]);
    driver.kick(STATISTICS);
    assert_eq!(world.take(), [(1, 1)]);
}

#[test]
fn the_guest_is_told_what_is_asked_of_it_and_says_what_it_did() {
    let (_, mut driver) = world();
    driver.acknowledge();
    driver
        .mmio
        .engine()
        .lock()
        .unwrap()
        .act(|balloon, rings| balloon.resize(600, rings));
    assert_eq!(driver.acknowledge() & 2, 2);
    driver.mmio.write(0x104, &500_u32.to_le_bytes());
    assert_eq!(config(&mut driver), (600, 500));
    driver.mmio.write(0x100, &7_u32.to_le_bytes());
    driver
        .mmio
        .engine()
        .lock()
        .unwrap()
        .act(|balloon, rings| balloon.resize(u32::MAX, rings));
    assert_eq!(config(&mut driver), (1000, 500), "no more than there is");
    driver.travel();
    assert_eq!(config(&mut driver), (1000, 500));
}

#[test]
fn statistics_come_when_they_are_asked_for_also_after_a_move() {
    let (_, mut driver) = world();
    let ask = |driver: &mut Driver<Balloon>| driver.mmio.engine().lock().unwrap().act(Balloon::ask_statistics);
    assert!(!ask(&mut driver), "the driver has not offered any");
    driver.add(STATISTICS, &[&statistic(4, 11), &statistic(99, 5)], &[]);
    driver.kick(STATISTICS);
    assert_eq!(driver.used(STATISTICS), None, "the buffer is kept");
    driver.travel();
    assert!(ask(&mut driver));
    assert!(driver.used(STATISTICS).is_some());
    assert!(!ask(&mut driver), "it was asked already");
    driver.add(STATISTICS, &[&statistic(4, 12)], &[]);
    driver.kick(STATISTICS);
    let statistics = driver
        .mmio
        .engine()
        .lock()
        .unwrap()
        .act(|balloon, _| balloon.statistics());
    assert_eq!((statistics.by_tag[4], statistics.by_tag[0]), (Some(12), None));
}

#[test]
fn a_paused_balloon_asks_nothing() {
    let (_, mut driver) = world();
    driver.add(STATISTICS, &[&statistic(4, 11)], &[]);
    driver.kick(STATISTICS);
    driver.mmio.pause();
    assert!(!driver.mmio.engine().lock().unwrap().act(Balloon::ask_statistics));
    assert_eq!(driver.used(STATISTICS), None);
}

#[test]
fn a_second_statistics_buffer_releases_the_first() {
    let (_, mut driver) = world();
    let first = driver.add(STATISTICS, &[&statistic(4, 1)], &[]);
    driver.add(STATISTICS, &[&statistic(4, 2)], &[]);
    driver.kick(STATISTICS);
    assert_eq!(driver.used(STATISTICS), Some((first.head, 0)));
    assert_eq!(driver.used(STATISTICS), None);
}

#[test]
fn a_chain_that_names_too_many_pages_is_heard_as_far_as_the_bound() {
    let (world, mut driver) = world();
    let pages: Vec<u32> = (0..2 * BALLOON_PFNS_PER_CHAIN as u32).collect();
    driver.add(INFLATE, &[&pfns(&pages)], &[]);
    driver.kick(INFLATE);
    assert_eq!(world.take(), [(0, BALLOON_PFNS_PER_CHAIN as u64)]);
}
