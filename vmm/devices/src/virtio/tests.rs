//! What the transport promises, whatever the device: told with disks and entropy.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddress;

use umbra_units::{Malformed, Now, Reader, Writer};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_GET_ID;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::block::{self, Block, Geometry};
use super::limiter::{Limits, Rate};
use super::rng::{self, Entropy, Rng};
use super::testing::{Driver, MemoryDisk, Placed};
use super::{Cause, Mmio, Rings, Token, Virtio, Wake, bit};
use crate::contract::{Device as _, Restore as _};
use crate::limits::{CHAIN_SEGMENTS, CHAINS_PER_CALL};

struct Ones;

impl Entropy for Ones {
    fn fill(&self, out: &mut [u8]) {
        out.fill(1);
    }
}

fn entropy() -> Driver<Rng> {
    Driver::at_work(rng::Wiring {
        index: 0,
        entropy: Arc::new(Ones),
    })
}

/// A disk that keeps its requests, and its driver.
fn held_disk() -> (Arc<MemoryDisk>, Driver<Block>) {
    let disk = Arc::new(MemoryDisk::new(8));
    disk.hold(true);
    let driver = Driver::at_work(block::Wiring {
        id: "a".to_owned(),
        serial: "a".to_owned(),
        geometry: Geometry::of_sectors(8),
        queues: 1,
        limits: Limits::default(),
        disk: disk.clone(),
    });
    (disk, driver)
}

/// A device that keeps chains until the world moves, and does not forget them when it is reset.
struct Keeper(Vec<Token>);

impl Virtio for Keeper {
    const ID: u32 = 63;
    const VERSION: u32 = 1;
    type Wiring = ();

    fn new((): ()) -> Self {
        Self(Vec::new())
    }

    fn kind(&self) -> &str {
        "keeper/0"
    }

    fn queues(&self) -> Vec<u16> {
        vec![8]
    }

    fn features(&self) -> u64 {
        0
    }

    fn work(&mut self, _now: Now, cause: Cause, rings: &mut Rings) -> Wake {
        match cause {
            Cause::World => self.0.drain(..).for_each(|token| rings.push(token, 0)),
            Cause::Notified(queue) => self
                .0
                .extend(std::iter::from_fn(|| rings.pop(queue)).map(|chain| chain.token())),
        }
        Wake::Idle
    }

    fn reset(&mut self) {}

    fn save(&self, w: &mut Writer) {
        w.u8(u8::try_from(self.0.len()).unwrap());
        for token in &self.0 {
            w.u16(token.head());
        }
    }

    fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed> {
        for _ in 0..r.u8("chains")? {
            self.0.push(Token::held(0, r.u16("head")?));
        }
        Ok(())
    }
}

/// A request that a disk answers at once.
fn add_get_id(driver: &mut Driver<Block>) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&VIRTIO_BLK_T_GET_ID.to_le_bytes());
    driver.add(0, &[&header], &[20, 1]);
}

fn flags(of: &[u32]) -> u16 {
    of.iter().map(|flag| u16::try_from(*flag).unwrap()).sum()
}

const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;

/// An address, a length and flags, and the next descriptor.
type Descriptor = ((GuestAddress, u32, u16), u16);

#[test]
fn a_chain_that_is_not_well_formed_is_given_back_unread_and_the_next_is_served() {
    let at = GuestAddress(0x9_0000);
    let write_next = flags(&[WRITE, NEXT]);
    let piece = |flags| (at, 16, flags);
    // Descriptors from number 32 on, and what is wrong with the chain that begins there.
    let broken: [(&str, &[Descriptor]); 8] = [
        ("loops", &[(piece(write_next), 32)]),
        ("leaves the table", &[(piece(write_next), 64)]),
        ("writes before it reads", &[(piece(write_next), 33), (piece(0), 0)]),
        ("has half an entry", &[((at, 24, flags(&[INDIRECT])), 0)]),
        ("has an empty table", &[((at, 0, flags(&[INDIRECT])), 0)]),
        (
            "has a table outside of memory",
            &[((GuestAddress(1 << 50), 16, flags(&[INDIRECT])), 0)],
        ),
        (
            "has a table at the end of the world",
            &[((GuestAddress(u64::MAX - 7), 16, flags(&[INDIRECT])), 0)],
        ),
        (
            "is longer than memory could be",
            &[((at, u32::MAX, write_next), 33), ((at, 2, flags(&[WRITE])), 0)],
        ),
    ];
    for (what, descriptors) in broken {
        let mut driver = entropy();
        for (n, (piece, next)) in (32..).zip(descriptors) {
            driver.put_descriptor(0, n, *piece, *next);
        }
        driver.offer_head(0, 32);
        driver.kick(0);
        assert_eq!(
            (driver.used(0), driver.used(0)),
            (Some((32, 0)), None),
            "a chain that {what}"
        );
        assert_eq!(driver.mmio.work().counters().malformed, 1, "a chain that {what}");
        assert!(driver.request(0, &[], 8).is_some(), "after a chain that {what}");
    }
    let mut driver = entropy();
    driver.offer_head(0, 64);
    driver.kick(0);
    assert_eq!(
        driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET,
        VIRTIO_CONFIG_S_NEEDS_RESET,
        "no such head to give back"
    );
}

#[test]
fn a_table_of_its_own_may_be_as_long_as_a_queue_but_not_endless_and_not_nested() {
    let mut driver = entropy();
    driver.indirect = true;
    let piece = (GuestAddress(0x9_0000), 1, flags(&[WRITE]));
    driver.add_pieces(0, &vec![piece; CHAIN_SEGMENTS]);
    driver.add_pieces(0, &vec![piece; CHAIN_SEGMENTS + 1]);
    driver.add_pieces(0, &[(GuestAddress(0x9_0000), 16, flags(&[INDIRECT]))]);
    driver.kick(0);
    let written = u32::try_from(CHAIN_SEGMENTS).unwrap();
    assert_eq!(driver.used(0), Some((0, written)));
    assert_eq!((driver.used(0), driver.used(0)), (Some((1, 0)), Some((2, 0))));
}

#[test]
fn one_call_takes_a_bounded_number_of_chains_and_asks_for_another() {
    let (_, mut driver) = held_disk();
    for _ in 0..CHAINS_PER_CALL + 10 {
        add_get_id(&mut driver);
    }
    let work = driver.mmio.work();
    assert_eq!(work.notified(0, Now::ZERO), Wake::Again);
    let answers = |driver: &mut Driver<Block>| std::iter::from_fn(|| driver.used(0)).count();
    assert_eq!(answers(&mut driver), usize::try_from(CHAINS_PER_CALL).unwrap());
    assert_eq!(work.world(Now::ZERO), Wake::Idle);
    assert_eq!(answers(&mut driver), 10);
}

#[test]
fn a_driver_that_offers_more_than_its_queue_holds_breaks_the_device() {
    let (disk, mut driver) = held_disk();
    let head = driver.add(0, &[&[0; 16]], &[512, 1]).head;
    for _ in 1..256 {
        driver.offer_head(0, head);
        driver.kick(0);
    }
    assert_eq!((disk.held(), driver.mmio.work().counters().broken), (256, 0));
    driver.offer_head(0, head);
    driver.kick(0);
    assert_eq!((disk.held(), driver.mmio.work().counters().broken), (256, 1));
    // What is out comes back, to nobody, and the device can be saved.
    let pulses = driver.watch.pulses();
    while disk.release(&mut umbra_units::Rng::new(1)) {}
    driver.world();
    assert_eq!(
        (driver.mmio.work().busy(), driver.used(0), driver.watch.pulses()),
        (0, None, pulses)
    );
    driver.travel();
}

#[test]
fn the_driver_is_interrupted_when_it_asked_for_it() {
    let mut driver = entropy();
    driver.set_used_event(0, 2);
    for answers in 1..6 {
        driver.request(0, &[], 8).unwrap();
        assert_eq!(
            driver.watch.pulses(),
            u64::from(answers >= 3),
            "with an index, {answers} answers"
        );
    }
    let mut driver = entropy();
    driver.negotiate(!bit(VIRTIO_RING_F_EVENT_IDX));
    driver.set_up_queues();
    driver.ready();
    driver.set_available_flags(0, flags(&[VRING_AVAIL_F_NO_INTERRUPT]));
    driver.request(0, &[], 8).unwrap();
    assert_eq!(driver.watch.pulses(), 0, "with a flag");
    driver.set_available_flags(0, 0);
    driver.request(0, &[], 8).unwrap();
    assert_eq!(driver.watch.pulses(), 1);
}

#[test]
fn many_answers_make_one_interrupt() {
    let mut driver = entropy();
    for _ in 0..10 {
        driver.add(0, &[], &[8]);
    }
    driver.kick(0);
    assert_eq!(
        (driver.watch.pulses(), driver.mmio.work().counters().interrupts),
        (1, 1)
    );
}

#[test]
fn a_queue_that_was_seen_empty_wants_to_be_notified_again() {
    let mut driver = entropy();
    driver.request(0, &[], 8).unwrap();
    assert_eq!(driver.available_event(0), driver.added(0));
    let (disk, mut driver) = held_disk();
    driver.negotiate(!bit(VIRTIO_RING_F_EVENT_IDX));
    driver.set_up_queues();
    driver.ready();
    for _ in 0..CHAINS_PER_CALL + 1 {
        add_get_id(&mut driver);
    }
    let work = driver.mmio.work();
    assert_eq!(
        (work.notified(0, Now::ZERO), driver.used_flags(0)),
        (Wake::Again, 1),
        "there is more to be taken"
    );
    assert_eq!((work.world(Now::ZERO), driver.used_flags(0)), (Wake::Idle, 0));
    drop(disk);
}

#[test]
fn what_was_put_before_the_driver_was_ready_is_served_when_it_is() {
    let mut driver = entropy();
    assert!(driver.negotiate(u64::MAX));
    driver.set_up_queues();
    driver.add(0, &[], &[8]);
    driver.kick(0);
    driver.world();
    assert_eq!(driver.used(0), None, "not yet");
    driver.ready();
    assert!(driver.used(0).is_some(), "without another word");
}

#[test]
fn a_queue_stays_where_it_is_while_the_device_uses_it() {
    let mut driver = entropy();
    let before = driver.mmio.save().unwrap();
    driver.set_register(register::VIRTIO_MMIO_QUEUE_SEL, 0);
    let at = [
        register::VIRTIO_MMIO_QUEUE_NUM,
        register::VIRTIO_MMIO_QUEUE_DESC_LOW,
        register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        register::VIRTIO_MMIO_QUEUE_USED_LOW,
        register::VIRTIO_MMIO_QUEUE_READY,
        register::VIRTIO_MMIO_DRIVER_FEATURES,
    ];
    for at in at {
        driver.set_register(at, 1);
    }
    assert_eq!(driver.mmio.save().unwrap(), before);
    // Also when the queue is ready and the driver is not.
    assert!(driver.negotiate(u64::MAX));
    driver.set_up_queues();
    let before = driver.mmio.save().unwrap();
    driver.set_register(register::VIRTIO_MMIO_QUEUE_NUM, 2);
    assert_eq!(driver.mmio.save().unwrap(), before);
}

#[test]
fn rings_outside_of_memory_or_of_odd_size_or_place_break_the_device_when_it_starts() {
    for (at, value) in [
        (register::VIRTIO_MMIO_QUEUE_NUM, 3),
        (register::VIRTIO_MMIO_QUEUE_NUM, 0),
        (register::VIRTIO_MMIO_QUEUE_NUM, 128),
        (register::VIRTIO_MMIO_QUEUE_NUM, 0x1_0040),
        (register::VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1008),
        (register::VIRTIO_MMIO_QUEUE_DESC_HIGH, 1),
        (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2001),
        (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0xf_fffe),
        (register::VIRTIO_MMIO_QUEUE_USED_LOW, 0x2402),
        (register::VIRTIO_MMIO_QUEUE_USED_HIGH, u32::MAX),
    ] {
        let mut driver = entropy();
        assert!(driver.negotiate(u64::MAX));
        driver.set_up_queues();
        // Ready is not yet used: a queue may be moved until the driver is.
        driver.set_register(register::VIRTIO_MMIO_QUEUE_READY, 0);
        driver.set_register(at, value);
        driver.set_register(register::VIRTIO_MMIO_QUEUE_READY, 1);
        driver.ready();
        assert_ne!(driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET, 0, "{at:#x} = {value:#x}");
        assert_eq!(driver.acknowledge(), register::VIRTIO_MMIO_INT_CONFIG);
    }
}

#[test]
fn a_driver_that_gives_up_hears_nothing_more() {
    let mut driver = entropy();
    driver.add(0, &[], &[8]);
    let status = driver.status();
    driver.set_register(register::VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_FAILED);
    driver.kick(0);
    assert_eq!((driver.used(0), driver.watch.pulses()), (None, 0));
}

#[test]
fn a_driver_that_skips_a_step_is_not_obeyed() {
    let mut driver = entropy();
    driver.set_register(register::VIRTIO_MMIO_STATUS, 0);
    driver.set_register(register::VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_DRIVER_OK);
    assert_eq!(driver.status(), 0);
    assert!(driver.negotiate_exactly(bit(VIRTIO_F_VERSION_1)));
    let status = driver.status();
    driver.set_register(register::VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_NEEDS_RESET | 1);
    assert_eq!(
        driver.status(),
        status,
        "no bit is taken away, and one is not the driver's to set"
    );
}

#[test]
fn registers_have_32_bits_and_nothing_else() {
    let mut driver = entropy();
    let before = driver.mmio.save().unwrap();
    for width in [1, 2, 8] {
        let mut data = [0xaa; 8];
        driver.mmio.read(0, &mut data[..width]);
        assert_eq!(data[..width], [0; 8][..width]);
        driver.mmio.write(register::VIRTIO_MMIO_STATUS.into(), &[0; 8][..width]);
    }
    let mut data = [0xaa; 4];
    driver.mmio.read(2, &mut data);
    driver.mmio.write(u64::from(register::VIRTIO_MMIO_STATUS) + 2, &[0; 4]);
    assert_eq!((data, driver.mmio.save().unwrap()), ([0; 4], before));
}

#[test]
fn a_vcpu_acknowledges_its_interrupt_while_the_device_is_at_work() {
    let mut driver = entropy();
    driver.request(0, &[], 8).unwrap();
    let engine = driver.mmio.engine();
    let at_work = engine.lock().unwrap();
    assert_eq!(driver.acknowledge(), register::VIRTIO_MMIO_INT_VRING);
    drop(at_work);
}

#[test]
fn whoever_works_for_a_device_works_for_the_one_that_takes_its_place() {
    let mut driver = entropy();
    let work = driver.mmio.work();
    driver.travel();
    driver.add(0, &[], &[8]);
    work.notified(0, Now::ZERO);
    assert!(driver.used(0).is_some());
    assert_eq!(work.kind(), "rng/0");
}

#[test]
fn an_answer_for_a_driver_of_a_former_life_goes_nowhere() {
    let mut driver = Driver::<Keeper>::at_work(());
    let add = |driver: &mut Driver<Keeper>| {
        driver.add(0, &[], &[8]);
        driver.mmio.work().notified(0, Now::ZERO);
    };
    // The look at the world that every start begins with.
    driver.world();
    add(&mut driver);
    driver.mmio.engine().lock().unwrap().reset();
    let kept = driver.mmio.engine().lock().unwrap().device().0.len();
    assert!(driver.negotiate(u64::MAX));
    driver.set_up_queues();
    driver.ready();
    assert_eq!((kept, driver.world(), driver.used(0)), (1, Wake::Idle, None));
    add(&mut driver);
    driver.world();
    assert!(driver.used(0).is_some());
}

#[test]
fn chains_that_a_device_holds_travel() {
    let mut driver = Driver::<Keeper>::at_work(());
    driver.world();
    let placed = driver.add(0, &[], &[8]);
    driver.mmio.work().notified(0, Now::ZERO);
    driver.mmio.pause();
    let saved = driver.mmio.save().unwrap();
    let twin = Mmio::restore(&saved, driver.wiring()).unwrap();
    driver.mmio.take_over(twin);
    driver.mmio.resume();
    assert_eq!(driver.used(0), None);
    driver.world();
    assert_eq!(driver.used(0), Some((placed.head, 0)));
}

#[test]
fn a_paused_device_that_is_busy_collects_and_takes_nothing_new() {
    let (disk, mut driver) = held_disk();
    let first = driver.add(0, &[&[0; 16]], &[512, 1]);
    driver.kick(0);
    driver.mmio.pause();
    driver.add(0, &[&[0; 16]], &[512, 1]);
    disk.release(&mut umbra_units::Rng::new(1));
    driver.kick(0);
    driver.world();
    assert_eq!((driver.used(0), disk.held()), (Some((first.head, 513)), 0));
    driver.mmio.resume();
    driver.run();
    assert_eq!(disk.held(), 1);
}

#[test]
fn a_resumed_device_looks_at_its_queues_even_if_no_bell_is_heard() {
    let mut driver = Driver::<Keeper>::at_work(());
    driver.mmio.pause();
    driver.add(0, &[], &[8]);
    driver.mmio.resume();
    driver.watch.take_rung();
    driver.mmio.work().world(Now::ZERO);
    assert_eq!(driver.mmio.engine().lock().unwrap().device().0.len(), 1);
}

/// A driver as lazy as the rules allow: it notifies only when the device asks for it, and looks for answers only when it is
/// interrupted. Whatever is suppressed once too often leaves it waiting for ever.
struct Lazy {
    driver: Driver<Block>,
    disk: Arc<MemoryDisk>,
    chance: umbra_units::Rng,
    event_idx: bool,
    /// Interrupts it has handled.
    heard: u64,
    /// Requests that wait for an answer, by head: the sector, what is to be read there, and where.
    waiting: BTreeMap<u16, (u64, Option<u8>, Placed)>,
    /// What each sector holds.
    model: Vec<u8>,
    answered: usize,
    /// When the device wants to be called. Otherwise its worker is as lazy.
    wake: Wake,
}

const LAZY_SECTORS: u64 = 64;

impl Lazy {
    fn new(seed: u64) -> Self {
        let mut chance = umbra_units::Rng::new(seed);
        let disk = Arc::new(MemoryDisk::new(LAZY_SECTORS));
        let operations = chance
            .chance(0.3)
            .then(|| Rate::new(3, Duration::from_secs(1), 0).unwrap());
        let mut driver = Driver::at_work(block::Wiring {
            id: "a".to_owned(),
            serial: "a".to_owned(),
            geometry: Geometry::of_sectors(LAZY_SECTORS),
            queues: 1,
            limits: Limits {
                operations,
                bandwidth: None,
            },
            disk: disk.clone(),
        });
        let event_idx = chance.chance(0.5);
        if !event_idx {
            driver.negotiate(!bit(VIRTIO_RING_F_EVENT_IDX));
            driver.set_up_queues();
            driver.ready();
        }
        driver.indirect = chance.chance(0.5);
        Self {
            driver,
            disk,
            chance,
            event_idx,
            heard: 0,
            waiting: BTreeMap::new(),
            model: vec![0; usize::try_from(LAZY_SECTORS).unwrap()],
            answered: 0,
            wake: Wake::Idle,
        }
    }

    /// The worker heard a bell, if there was one.
    fn run(&mut self) {
        self.wake = self.wake.min(self.driver.run());
    }

    /// The disk finishes a request, if it has one, and the worker hears of it.
    fn finish(&mut self) -> bool {
        let finished = self.disk.release(&mut self.chance);
        if finished {
            self.wake = self.wake.min(self.driver.world());
        }
        finished
    }

    /// Time passes, and the worker has an eye on it.
    fn pass(&mut self, time: Duration) {
        self.driver.now = self.driver.now + time;
        if self.wake <= Wake::At(self.driver.now) {
            self.wake = self.driver.world();
        }
    }

    /// A few requests for sectors that no other request waits for, and one notification if the device wants it.
    fn ask(&mut self) {
        let before = self.driver.added(0);
        for _ in 0..=self.chance.below(4) {
            let sector = self.chance.below(LAZY_SECTORS);
            if self.waiting.len() < 40 && self.waiting.values().all(|(other, ..)| *other != sector) {
                self.ask_for(sector);
            }
        }
        let after = self.driver.added(0);
        let wanted = if self.event_idx {
            let event = self.driver.available_event(0);
            after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
        } else {
            after != before && self.driver.used_flags(0) & 1 == 0
        };
        if wanted {
            self.driver.set_register(register::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        }
    }

    fn ask_for(&mut self, sector: u64) {
        let index = usize::try_from(sector).unwrap();
        let mut header = [0; 16];
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let (expected, placed) = if self.chance.chance(0.5) {
            (Some(self.model[index]), self.driver.add(0, &[&header], &[512, 1]))
        } else {
            self.model[index] = self.chance.next_u64().to_le_bytes()[0];
            header[0] = 1;
            let data = [self.model[index]; 512];
            (None, self.driver.add(0, &[&header, &data], &[1]))
        };
        let twice = self.waiting.insert(placed.head, (sector, expected, placed));
        assert!(twice.is_none(), "this test gave a descriptor to two requests");
    }

    /// Look for answers, if there was an interrupt.
    fn listen(&mut self) {
        if self.driver.watch.pulses() == self.heard {
            return;
        }
        self.heard = self.driver.watch.pulses();
        self.driver.acknowledge();
        loop {
            while let Some((head, _)) = self.driver.used(0) {
                self.answered += 1;
                let (sector, expected, placed) = self.waiting.remove(&head).expect("each request is answered once");
                assert_eq!(
                    self.driver.get(*placed.writable.last().unwrap(), 1),
                    [0],
                    "sector {sector}"
                );
                if let Some(expected) = expected {
                    assert_eq!(
                        self.driver.get(placed.writable[0], 512),
                        [expected; 512],
                        "sector {sector}"
                    );
                }
            }
            self.driver
                .set_used_event(0, u16::try_from(self.answered % 0x1_0000).unwrap());
            // What came before that was written does not interrupt: look again.
            if self.driver.is_all_seen(0) {
                return;
            }
        }
    }

    /// Somebody does something.
    fn step(&mut self) {
        match self.chance.below(12) {
            0..4 => self.ask(),
            4..6 => self.run(),
            6..9 => drop(self.finish()),
            9 => self.listen(),
            10 => self.disk.hold(self.chance.chance(0.7)),
            _ => self.pass_time_or_move(),
        }
    }

    fn pass_time_or_move(&mut self) {
        if self.chance.chance(0.7) {
            return self.pass(Duration::from_millis(500));
        }
        self.driver.mmio.pause();
        while self.finish() {}
        self.driver.travel();
        // As a machine does where the guest goes on.
        self.wake = self.driver.world();
    }
}

#[test]
fn the_laziest_driver_gets_every_answer_once_over_any_pauses_and_moves() {
    for seed in 0..500 {
        let mut lazy = Lazy::new(seed);
        for _ in 0..300 {
            lazy.step();
        }
        for _ in 0..200 {
            lazy.run();
            while lazy.finish() {}
            lazy.pass(Duration::from_secs(1));
            lazy.listen();
        }
        let waiting: Vec<_> = lazy.waiting.values().map(|(sector, ..)| sector).collect();
        assert!(
            waiting.is_empty(),
            "seed {seed}: nobody answers for sectors {waiting:?}"
        );
        let content = lazy.disk.content();
        let sectors: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(sectors, lazy.model, "seed {seed}");
    }
}
