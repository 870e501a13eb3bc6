//! What the disk does.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Now, Reader, Writer};
use virtio_bindings::virtio_blk as spec;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::parse::{Fault, Parsed, Rules, Wish, parse};
use super::request::{Completion, Disk, Geometry, Op, Outcome, Request, Tag};
use super::{QUEUE_SIZE, SEGMENTS, SERIAL_BYTES};
use crate::limits::{BLK_DISCARD_SECTORS, BLK_WRITE_ZEROES_SECTORS};
use crate::virtio::limiter::{Limiter, Limits};
use crate::virtio::{Cause, Chain, Ram, Rings, Segments, Token, Virtio, Wake, bit};

/// What a disk is and is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Which disk this is, the `rootfs` in `disk/rootfs`.
    pub id: String,
    /// What the guest reads as the disk's serial number: as much of it as fits.
    pub serial: String,
    /// What the disk is. The same on every host it moves to.
    pub geometry: Geometry,
    /// Queues: one for each vCPU that is to work without waiting for the others. At least one.
    pub queues: u16,
    /// What it may do.
    pub limits: Limits,
    /// Where its bytes are.
    pub disk: Arc<dyn Disk>,
}

/// A disk.
pub struct Block {
    kind: String,
    wiring: Wiring,
    /// What the driver settled for.
    features: u64,
    /// The driver wants a volatile cache. Only with `CONFIG_WCE` has it a choice.
    writeback: bool,
    limiter: Limiter,
    /// Some queue was left before it was empty, because of the limits.
    limited: bool,
    /// Requests the disk has.
    out: BTreeMap<Tag, Out>,
    /// Never given twice, so that what comes back late is nobody else's.
    next_tag: u64,
    counters: Counters,
}

/// A request the disk has.
struct Out {
    token: Token,
    status: Segments,
    /// Bytes written to the guest, if all goes well, before the status byte.
    data_bytes: u32,
}

/// What a disk did since it was built or restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests handed to the disk to read.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Requests handed to the disk to write.
    pub writes: u64,
    /// Bytes of those.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests to discard or to zero.
    pub trims: u64,
    /// Requests that were wrong, or failed.
    pub errors: u64,
    /// Times the device stopped because of its limits.
    pub limited: u64,
}

impl Block {
    /// What it did.
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Other limits, from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limiter.set(limits);
    }

    fn rules(&self) -> Rules {
        Rules {
            geometry: self.wiring.geometry,
            discard: self.has(spec::VIRTIO_BLK_F_DISCARD),
            write_zeroes: self.has(spec::VIRTIO_BLK_F_WRITE_ZEROES),
            durable: !self.has_cache(),
        }
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    /// Whether writes may be unsafe until they are flushed (virtio 1.2, Block Device, Driver Requirements: Device
    /// Initialization).
    const fn has_cache(&self) -> bool {
        if self.has(spec::VIRTIO_BLK_F_CONFIG_WCE) {
            self.writeback
        } else {
            self.has(spec::VIRTIO_BLK_F_FLUSH)
        }
    }

    /// Take what a queue has, as far as the limits allow.
    fn serve(&mut self, queue: u16, now: Now, rings: &mut Rings) -> Wake {
        while let Some(chain) = rings.pop(queue) {
            if let Err(at) = self.serve_one(chain, now, rings) {
                self.limited = true;
                self.counters.limited += 1;
                return Wake::At(at);
            }
        }
        Wake::Idle
    }

    fn serve_one(&mut self, chain: Chain, now: Now, rings: &mut Rings) -> Result<(), Now> {
        let token = chain.token();
        let Some(parsed) = parse(chain, rings.ram(), &self.rules()) else {
            self.counters.errors += 1;
            rings.push(token, 0);
            return Ok(());
        };
        self.limiter
            .take(now, parsed.wish.bytes())
            .inspect_err(|_| rings.put_back(token))?;
        let Parsed {
            status,
            data_bytes,
            wish,
        } = parsed;
        let out = Out {
            token,
            status,
            data_bytes,
        };
        match wish {
            Wish::Disk(op) => self.submit(out, op, rings.ram()),
            Wish::Serial(mut place) => {
                let written = place.write(rings.ram(), &self.serial());
                self.answer(
                    out,
                    if written.is_ok() {
                        Outcome::Done
                    } else {
                        Outcome::Failed
                    },
                    rings,
                );
            }
            Wish::Nothing => self.answer(out, Outcome::Done, rings),
            Wish::Wrong(Fault::Invalid) => self.answer(out, Outcome::Failed, rings),
            Wish::Wrong(Fault::Unsupported) => self.answer(out, Outcome::Unsupported, rings),
        }
        Ok(())
    }

    fn submit(&mut self, out: Out, op: Op, ram: &Ram) {
        self.counters.count(&op);
        let tag = Tag(self.next_tag);
        self.next_tag += 1;
        self.out.insert(tag, out);
        self.wiring.disk.submit(Request { tag, op }, ram);
    }

    /// Answer what has come back.
    fn collect(&mut self, rings: &mut Rings) {
        while let Some(Completion { tag, outcome }) = self.wiring.disk.completed() {
            if let Some(out) = self.out.remove(&tag) {
                self.answer(out, outcome, rings);
            }
        }
    }

    fn answer(&mut self, out: Out, outcome: Outcome, rings: &mut Rings) {
        let Out {
            token,
            mut status,
            data_bytes,
        } = out;
        if !rings.is_awaited(token) {
            return;
        }
        let code = match outcome {
            Outcome::Done => spec::VIRTIO_BLK_S_OK,
            Outcome::Failed => spec::VIRTIO_BLK_S_IOERR,
            Outcome::Unsupported => spec::VIRTIO_BLK_S_UNSUPP,
        };
        self.counters.errors += u64::from(outcome != Outcome::Done);
        let code = u8::try_from(code).expect("a status is a byte");
        let answered = status.write(rings.ram(), &[code]).is_ok();
        // The length counts from the chain's front, and after a failure nobody knows what is there.
        let written = match (answered, outcome, data_bytes) {
            (false, ..) => 0,
            (true, Outcome::Done, bytes) => bytes.saturating_add(1),
            (true, _, bytes) => u32::from(bytes == 0),
        };
        rings.push(token, written);
    }

    fn serial(&self) -> [u8; SERIAL_BYTES] {
        let mut serial = [0; SERIAL_BYTES];
        for (place, byte) in serial.iter_mut().zip(self.wiring.serial.bytes()) {
            *place = byte;
        }
        serial
    }
}

impl Virtio for Block {
    const ID: u32 = VIRTIO_ID_BLOCK;
    /// Version 1: whether the cache is on, then the limiter's budgets.
    const VERSION: u32 = 1;
    type Wiring = Wiring;

    fn new(wiring: Wiring) -> Self {
        Self {
            kind: format!("disk/{}", wiring.id),
            features: 0,
            writeback: true,
            limiter: Limiter::new(wiring.limits),
            limited: false,
            out: BTreeMap::new(),
            next_tag: 0,
            counters: Counters::default(),
            wiring,
        }
    }

    fn kind(&self) -> &str {
        &self.kind
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.wiring.queues.max(1).into()]
    }

    fn features(&self) -> u64 {
        let Geometry {
            read_only,
            discard,
            write_zeroes,
            ..
        } = self.wiring.geometry;
        let mut features = bit(spec::VIRTIO_BLK_F_SEG_MAX)
            | bit(spec::VIRTIO_BLK_F_BLK_SIZE)
            | bit(spec::VIRTIO_BLK_F_TOPOLOGY)
            | bit(spec::VIRTIO_BLK_F_FLUSH)
            | bit(spec::VIRTIO_BLK_F_CONFIG_WCE);
        for (has, feature) in [
            (read_only, spec::VIRTIO_BLK_F_RO),
            (discard && !read_only, spec::VIRTIO_BLK_F_DISCARD),
            (write_zeroes && !read_only, spec::VIRTIO_BLK_F_WRITE_ZEROES),
            (self.wiring.queues > 1, spec::VIRTIO_BLK_F_MQ),
        ] {
            if has {
                features |= bit(feature);
            }
        }
        features
    }

    fn accept(&mut self, features: u64) {
        self.features = features;
    }

    /// virtio 1.2, Block Device, Device configuration layout.
    fn config(&self) -> Vec<u8> {
        let Geometry {
            sectors,
            block,
            physical_block,
            write_zeroes,
            ..
        } = self.wiring.geometry;
        let exponent = physical_block.max(block).ilog2() - block.max(1).ilog2();
        let granule = physical_block.max(block) / 512;
        let mut w = Writer::new();
        w.u64(sectors)
            .u32(0) // size_max: not offered
            .u32(SEGMENTS)
            .u32(0) // geometry: not offered
            .u32(block)
            .u8(u8::try_from(exponent).unwrap_or(0))
            .u8(0)
            .u16(1)
            .u32(0)
            .u8(self.writeback.into())
            .u8(0)
            .u16(self.wiring.queues.max(1))
            .u32(BLK_DISCARD_SECTORS)
            .u32(1)
            .u32(granule)
            .u32(BLK_WRITE_ZEROES_SECTORS)
            .u32(1)
            .u8(write_zeroes.into())
            .put(&[0; 3]);
        w.into_bytes()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == WRITEBACK && data.len() == 1 && self.has(spec::VIRTIO_BLK_F_CONFIG_WCE) {
            self.writeback = data[0] & 1 == 1;
        }
    }

    fn work(&mut self, now: Now, cause: Cause, rings: &mut Rings) -> Wake {
        self.collect(rings);
        // A queue left early because of the limits is not notified again: every call looks whether there is room now.
        let limited = std::mem::take(&mut self.limited);
        let all = limited || cause == Cause::World;
        let mut wake = Wake::Idle;
        for queue in 0..self.wiring.queues.max(1) {
            if all || cause == Cause::Notified(queue) {
                wake = wake.min(self.serve(queue, now, rings));
            }
        }
        self.collect(rings);
        wake
    }

    fn busy(&self) -> usize {
        self.out.len()
    }

    fn quiesce(&mut self) {
        self.wiring.disk.quiesce();
    }

    fn reset(&mut self) {
        while self.wiring.disk.completed().is_some() {}
        self.out.clear();
        self.features = 0;
        self.writeback = true;
        self.limited = false;
    }

    fn save(&self, w: &mut Writer) {
        w.u8(self.writeback.into());
        self.limiter.save(w);
    }

    fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed> {
        self.writeback = r.u8("writeback")? != 0;
        self.limiter.load(r)
    }
}

/// Where in the configuration the driver switches the cache.
const WRITEBACK: u64 = 32;

impl Wish {
    /// What the limits count.
    fn bytes(&self) -> u64 {
        match self {
            Self::Disk(Op::Read { to: data, .. } | Op::Write { from: data, .. }) => data.bytes(),
            _ => 0,
        }
    }
}

impl Counters {
    fn count(&mut self, op: &Op) {
        match op {
            Op::Read { to, .. } => {
                self.reads += 1;
                self.read_bytes += to.bytes();
            }
            Op::Write { from, .. } => {
                self.writes += 1;
                self.written_bytes += from.bytes();
            }
            Op::Flush => self.flushes += 1,
            Op::Discard { .. } | Op::WriteZeroes { .. } => self.trims += 1,
        }
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Block({}, {} requests out)", self.kind, self.out.len())
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(disk/{}, {:?})", self.id, self.geometry)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::contract::{Device as _, Restore as _, SaveError};
    use crate::virtio::Mmio;
    use crate::virtio::block::SECTOR;
    use crate::virtio::limiter::Rate;
    use crate::virtio::testing::{Driver, MemoryDisk, Placed, hostile, virtio_tests};

    const SECTORS: u64 = 64;

    fn wiring_of(disk: &Arc<MemoryDisk>) -> Wiring {
        Wiring {
            id: "rootfs".to_owned(),
            serial: "umbra-0123456789-and-more".to_owned(),
            geometry: Geometry::of_sectors(SECTORS),
            queues: 2,
            limits: Limits::default(),
            disk: disk.clone(),
        }
    }

    fn disk() -> Arc<MemoryDisk> {
        Arc::new(MemoryDisk::new(SECTORS))
    }

    fn wiring() -> Wiring {
        wiring_of(&disk())
    }

    virtio_tests!(
        conformance,
        device: Block,
        wiring: wiring,
        offer: |driver: &mut Driver<Block>| {
            driver.add(1, &[&header(spec::VIRTIO_BLK_T_IN, 3)], &[512, 1]);
            1
        },
        words: crate::virtio::block::words
    );

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(kind).u32(0).u64(sector);
        w.into_bytes()
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(sector).u32(sectors).u32(flags);
        w.into_bytes()
    }

    /// A driver and its disk.
    struct Pair {
        driver: Driver<Block>,
        disk: Arc<MemoryDisk>,
    }

    impl Pair {
        fn new() -> Self {
            Self::with(|_| {})
        }

        fn with(change: impl Fn(&mut Wiring)) -> Self {
            let disk = disk();
            let mut wiring = wiring_of(&disk);
            change(&mut wiring);
            Self {
                driver: Driver::at_work(wiring),
                disk,
            }
        }

        fn offer(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> Placed {
            let header = header(kind, sector);
            let room: &[u32] = if room == 0 { &[1] } else { &[room, 1] };
            if data.is_empty() {
                self.driver.add(0, &[&header], room)
            } else {
                self.driver.add(0, &[&header, data], room)
            }
        }

        /// The status of a request that was answered.
        fn status(&self, placed: &Placed) -> u32 {
            self.driver.get(*placed.writable.last().unwrap(), 1)[0].into()
        }

        /// One request: its status, and what was read.
        fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u32, Vec<u8>) {
            let placed = self.offer(kind, sector, data, room);
            self.driver.put(*placed.writable.last().unwrap(), &[0xee]);
            self.driver.kick(0);
            assert_eq!(self.driver.used(0).map(|(head, _)| head), Some(placed.head));
            let status = self.status(&placed);
            (status, self.driver.get(placed.writable[0], room))
        }

        fn write(&mut self, sector: u64, data: &[u8]) -> u32 {
            self.ask(spec::VIRTIO_BLK_T_OUT, sector, data, 0).0
        }

        fn read(&mut self, sector: u64, bytes: u32) -> (u32, Vec<u8>) {
            self.ask(spec::VIRTIO_BLK_T_IN, sector, &[], bytes)
        }
    }

    const OK: u32 = spec::VIRTIO_BLK_S_OK;
    const IOERR: u32 = spec::VIRTIO_BLK_S_IOERR;
    const UNSUPP: u32 = spec::VIRTIO_BLK_S_UNSUPP;

    #[test]
    fn what_is_written_is_read_again() {
        let mut pair = Pair::new();
        let data: Vec<u8> = (0..1536).map(|n| u8::try_from(n % 251).unwrap()).collect();
        assert_eq!(pair.write(5, &data), OK);
        assert_eq!(pair.read(5, 1536), (OK, data.clone()));
        pair.driver.indirect = true;
        assert_eq!(pair.read(6, 512), (OK, data[512..1024].to_vec()));
        assert_eq!(pair.disk.content()[5 * 512..8 * 512], data);
    }

    #[test]
    fn a_request_may_be_cut_into_any_pieces() {
        let mut pair = Pair::new();
        let mut message = header(spec::VIRTIO_BLK_T_OUT, 1);
        message.extend([7; 1024]);
        let cuts: Vec<&[u8]> = message.chunks(13).collect();
        let written = pair.driver.add(0, &cuts, &[1]);
        let message = header(spec::VIRTIO_BLK_T_IN, 1);
        let cuts: Vec<&[u8]> = message.chunks(3).collect();
        let read = pair.driver.add(0, &cuts, &[1, 0, 500, 300, 224]);
        pair.driver.kick(0);
        assert_eq!(
            (pair.driver.used(0), pair.driver.used(0)),
            (Some((written.head, 1)), Some((read.head, 1025)))
        );
        assert_eq!(pair.driver.get(read.writable[2], 500), [7; 500]);
        // The last byte of the last piece.
        let status = GuestAddress(read.writable[4].0 + 223);
        assert_eq!(pair.driver.get(status, 1), [0]);
    }

    #[test]
    fn nothing_beyond_the_end_of_the_disk_is_read_or_written() {
        let mut pair = Pair::new();
        assert_eq!(pair.write(SECTORS - 1, &[1; 512]), OK);
        for sector in [SECTORS - 1, SECTORS, u64::MAX, u64::MAX - 1, u64::MAX / SECTOR, 1 << 55] {
            assert_eq!(pair.write(sector, &[1; 1024]), IOERR, "{sector}");
            assert_eq!(pair.read(sector, 1024).0, IOERR, "{sector}");
            for kind in [spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES] {
                assert_eq!(pair.ask(kind, 0, &range(sector, 2, 0), 0).0, IOERR, "{sector}");
            }
        }
        assert_eq!(pair.disk.content().iter().filter(|byte| **byte == 1).count(), 512);
    }

    #[test]
    fn a_request_that_makes_no_sense_is_answered_as_the_specification_says() {
        let mut pair = Pair::new();
        assert_eq!(pair.read(0, 511).0, IOERR, "not whole sectors");
        assert_eq!(pair.write(0, &[0; 513]), IOERR, "not whole sectors");
        assert_eq!(pair.read(0, 0).0, OK, "nothing is easily read");
        assert_eq!(pair.ask(99, 0, &[], 0).0, UNSUPP);
        assert_eq!(
            pair.ask(spec::VIRTIO_BLK_T_FLUSH, 0, &[], 512).0,
            IOERR,
            "a flush reads nothing"
        );
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_DISCARD, 0, &range(0, 1, 1), 0).0, UNSUPP);
        assert_eq!(
            pair.ask(spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 2), 0).0,
            UNSUPP
        );
        let two = [range(0, 1, 0), range(2, 1, 0)].concat();
        assert_eq!(
            pair.ask(spec::VIRTIO_BLK_T_DISCARD, 0, &two, 0).0,
            IOERR,
            "one range at a time"
        );
        let before = pair.driver.mmio.engine().lock().unwrap().device().counters().errors;
        // No header, and then no place for an answer.
        let headless = pair.driver.add(0, &[b"short"], &[1]);
        let speechless = pair.driver.add(0, &[&header(0, 0)], &[]);
        let outside = (GuestAddress(1 << 40), 1, 2);
        let lost = pair.driver.add_pieces(0, &[outside]);
        pair.driver.kick(0);
        assert_eq!(pair.driver.used(0), Some((headless.head, 1)));
        assert_eq!(pair.status(&headless), IOERR);
        assert_eq!(
            (pair.driver.used(0), pair.driver.used(0)),
            (Some((speechless.head, 0)), Some((lost, 0)))
        );
        let after = pair.driver.mmio.engine().lock().unwrap().device().counters().errors;
        assert_eq!(after - before, 3);
    }

    #[test]
    fn data_outside_of_memory_fails_and_leaves_the_disk_alone() {
        let mut pair = Pair::new();
        let header = header(spec::VIRTIO_BLK_T_OUT, 0);
        let at = pair.driver.buffer(17);
        pair.driver.put(at, &header);
        pair.driver.put(GuestAddress(at.0 + 16), &[0xee]);
        let hole = (GuestAddress((1 << 20) - 256), 512, 0);
        pair.driver
            .add_pieces(0, &[(at, 16, 0), hole, (GuestAddress(at.0 + 16), 1, 2)]);
        pair.driver.kick(0);
        assert!(pair.driver.used(0).is_some());
        assert_eq!(u32::from(pair.driver.get(GuestAddress(at.0 + 16), 1)[0]), IOERR);
        assert_eq!(pair.driver.mmio.engine().lock().unwrap().device().counters().writes, 0);
    }

    #[test]
    fn a_read_only_disk_says_so_and_is_not_written() {
        let mut pair = Pair::with(|wiring| wiring.geometry.read_only = true);
        assert_ne!(pair.driver.offered() & bit(spec::VIRTIO_BLK_F_RO), 0);
        assert_eq!(pair.driver.offered() & bit(spec::VIRTIO_BLK_F_DISCARD), 0);
        pair.disk.fill(&[9; 512]);
        assert_eq!(pair.write(0, &[1; 512]), IOERR);
        assert_ne!(pair.ask(spec::VIRTIO_BLK_T_DISCARD, 0, &range(0, 1, 0), 0).0, OK);
        assert_ne!(pair.ask(spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, OK);
        assert_eq!(pair.read(0, 512), (OK, vec![9; 512]));
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
    }

    #[test]
    fn ranges_are_discarded_and_zeroed() {
        let mut pair = Pair::new();
        pair.disk.fill(&[9; 4 * 512]);
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_DISCARD, 0, &range(0, 1, 0), 0).0, OK);
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(2, 1, 1), 0).0, OK);
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(3, 0, 0), 0).0, OK);
        let expected = [[0; 512], [9; 512], [0; 512], [9; 512]].concat();
        assert_eq!(pair.disk.content()[..2048], expected);
    }

    #[test]
    fn a_disk_that_fails_or_cannot_is_reported_as_such() {
        let mut pair = Pair::new();
        for (outcome, status) in [(Outcome::Failed, IOERR), (Outcome::Unsupported, UNSUPP)] {
            pair.disk.fail(Some(outcome));
            assert_eq!(pair.read(0, 512).0, status);
            let placed = pair.offer(spec::VIRTIO_BLK_T_IN, 0, &[], 512);
            pair.driver.kick(0);
            assert_eq!(
                pair.driver.used(0),
                Some((placed.head, 0)),
                "nothing is promised about the data"
            );
        }
        pair.disk.fail(None);
        assert_eq!(pair.read(0, 512).0, OK);
    }

    #[test]
    fn the_serial_number_is_cut_to_what_fits() {
        let mut pair = Pair::new();
        let (status, serial) = pair.ask(spec::VIRTIO_BLK_T_GET_ID, 0, &[], 20);
        assert_eq!((status, serial.as_slice()), (OK, &b"umbra-0123456789-and"[..]));
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_GET_ID, 0, &[], 19).0, IOERR);
    }

    #[test]
    fn the_configuration_is_the_disks() {
        let mut pair = Pair::with(|wiring| wiring.geometry.block = 1024);
        let mut config = [0; 60];
        for (n, byte) in (0x100..).zip(&mut config) {
            pair.driver.mmio.read(n, std::slice::from_mut(byte));
        }
        let mut r = Reader::new(&config);
        assert_eq!(r.u64("capacity"), Ok(SECTORS));
        assert_eq!(
            (r.u32("size"), r.u32("segments"), r.u32("chs")),
            (Ok(0), Ok(SEGMENTS), Ok(0))
        );
        assert_eq!((r.u32("block"), r.u8("exponent")), (Ok(1024), Ok(2)));
        assert_eq!((config[32], config[34]), (1, 2));
        let mut beyond = [7; 8];
        pair.driver.mmio.read(0x100 + 60, &mut beyond);
        assert_eq!(beyond, [0; 8]);
    }

    #[test]
    fn a_write_is_safe_after_a_flush_or_at_once_without_a_cache() {
        let mut pair = Pair::new();
        pair.write(0, &[1; 512]);
        assert_eq!(pair.disk.stable()[0], 0);
        assert_eq!(pair.ask(spec::VIRTIO_BLK_T_FLUSH, 0, &[], 0).0, OK);
        assert_eq!(pair.disk.stable()[0], 1);
        pair.driver.mmio.write(0x100 + WRITEBACK, &[0]);
        pair.write(0, &[2; 512]);
        assert_eq!(pair.disk.stable()[0], 2);
        pair.driver.travel();
        pair.write(0, &[3; 512]);
        assert_eq!(pair.disk.stable()[0], 3, "the choice travels");
        pair.driver.mmio.write(0x100 + WRITEBACK, &[1]);
        pair.write(0, &[4; 512]);
        assert_eq!(pair.disk.stable()[0], 3);
        // A driver that knows neither flushes nor caches.
        pair.driver
            .negotiate(!(bit(spec::VIRTIO_BLK_F_FLUSH) | bit(spec::VIRTIO_BLK_F_CONFIG_WCE)));
        pair.driver.set_up_queues();
        pair.driver.ready();
        pair.write(0, &[5; 512]);
        assert_eq!(pair.disk.stable()[0], 5);
    }

    #[test]
    fn requests_come_back_in_any_order_and_each_once() {
        let mut pair = Pair::new();
        let mut rng = umbra_units::Rng::new(1);
        pair.disk.hold(true);
        let placed: Vec<Placed> = (0..40)
            .map(|n| pair.offer(spec::VIRTIO_BLK_T_OUT, n, &[u8::try_from(n).unwrap(); 512], 0))
            .collect();
        pair.driver.kick(0);
        assert_eq!((pair.driver.used(0), pair.driver.mmio.work().busy()), (None, 40));
        let mut answered = Vec::new();
        while pair.disk.release(&mut rng) {
            pair.driver.world();
            answered.push(pair.driver.used(0).unwrap().0);
            assert_eq!(pair.driver.used(0), None);
        }
        assert!(!answered.is_sorted());
        answered.sort_unstable();
        let mut heads: Vec<u16> = placed.iter().map(|placed| placed.head).collect();
        heads.sort_unstable();
        assert_eq!(answered, heads);
        assert!(placed.iter().all(|placed| pair.status(placed) == OK));
    }

    #[test]
    fn a_paused_disk_finishes_what_is_out_silently_and_is_saved_only_then() {
        let mut pair = Pair::new();
        pair.disk.hold(true);
        let placed = pair.offer(spec::VIRTIO_BLK_T_IN, 0, &[], 512);
        pair.driver.kick(0);
        pair.driver.mmio.pause();
        let error = pair.driver.mmio.save().unwrap_err();
        assert!(matches!(&error, SaveError::Refused { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            "disk/rootfs cannot be saved: 1 requests are not finished"
        );
        let (pulses, before) = (pair.driver.watch.pulses(), pair.driver.snapshot());
        pair.disk.release(&mut umbra_units::Rng::new(1));
        pair.driver.world();
        assert_eq!(pair.driver.used(0), Some((placed.head, 513)));
        assert_eq!(pair.driver.unmarked(&before), []);
        assert_eq!(
            (pair.driver.mmio.work().busy(), pair.driver.watch.pulses()),
            (0, pulses)
        );
        pair.driver.travel();
        assert_eq!(
            pair.driver.watch.pulses(),
            pulses + 1,
            "the driver hears of it where it runs next"
        );
    }

    #[test]
    fn a_request_of_a_former_life_touches_nothing() {
        let mut pair = Pair::new();
        pair.disk.hold(true);
        pair.disk.fill(&[9; 512]);
        let placed = pair.offer(spec::VIRTIO_BLK_T_IN, 0, &[], 512);
        pair.driver.kick(0);
        pair.driver
            .set_register(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(pair.disk.held(), 0, "the driver goes on when the disk has let go");
        // The driver uses the memory for something else, and the queue for another request.
        for at in &placed.writable {
            pair.driver.put(*at, &[0x55]);
        }
        pair.disk.hold(false);
        pair.driver.negotiate(u64::MAX);
        pair.driver.set_up_queues();
        pair.driver.ready();
        pair.driver.world();
        assert_eq!((pair.driver.used(0), pair.status(&placed)), (None, 0x55));
        assert_eq!(pair.read(0, 512), (OK, vec![9; 512]));
    }

    #[test]
    fn a_queue_taken_out_of_use_is_not_answered_and_the_other_is() {
        let mut pair = Pair::new();
        pair.disk.hold(true);
        let stopped = pair.offer(spec::VIRTIO_BLK_T_IN, 0, &[], 512);
        pair.driver.kick(0);
        let header = header(spec::VIRTIO_BLK_T_IN, 0);
        let other = pair.driver.add(1, &[&header], &[512, 1]);
        pair.driver.kick(1);
        pair.driver
            .set_register(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_SEL, 0);
        pair.driver
            .set_register(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_READY, 0);
        pair.driver.put(*stopped.writable.last().unwrap(), &[0x55]);
        pair.driver.world();
        assert_eq!((pair.driver.used(0), pair.status(&stopped)), (None, 0x55));
        assert_eq!(pair.driver.used(1), Some((other.head, 513)));
    }

    #[test]
    fn limits_are_kept_and_no_request_is_forgotten() {
        let second = Duration::from_secs(1);
        let mut pair = Pair::with(|wiring| {
            wiring.limits.bandwidth = Some(Rate::new(1024, second, 512).unwrap());
        });
        for sector in 0..5 {
            pair.offer(spec::VIRTIO_BLK_T_IN, sector, &[], 512);
        }
        let wake = pair.driver.kick(0);
        assert_eq!(wake, Wake::At(Now::ZERO + second / 2));
        let answers = |pair: &mut Pair| std::iter::from_fn(|| pair.driver.used(0)).count();
        assert_eq!(answers(&mut pair), 3);
        // Another queue's notification does not make the first one's wake forgotten.
        let header = header(spec::VIRTIO_BLK_T_FLUSH, 0);
        pair.driver.add(1, &[&header], &[1]);
        assert_eq!(pair.driver.kick(1), wake);
        assert!(pair.driver.used(1).is_some());
        pair.driver.now = Now::ZERO + second / 2;
        assert_eq!(pair.driver.world(), Wake::At(Now::ZERO + second));
        assert_eq!(answers(&mut pair), 1);
        // Over a move, too.
        pair.driver.travel();
        pair.driver.now = Now::ZERO + second;
        assert_eq!((pair.driver.world(), answers(&mut pair)), (Wake::Idle, 1));
    }

    #[test]
    fn whatever_a_driver_does_the_disk_and_its_requests_in_flight_survive() {
        for seed in 0..2_000 {
            let mut pair = Pair::with(|wiring| {
                wiring.limits.operations = Some(Rate::new(20, Duration::from_secs(1), 0).unwrap());
            });
            let mut storm = hostile::Storm::new(seed).knowing(crate::virtio::block::words());
            for _ in 0..10 {
                pair.disk.hold(storm.rng().chance(0.7));
                storm.rage(&mut pair.driver, 4);
                while storm.rng().chance(0.6) && pair.disk.release(storm.rng()) {}
                pair.driver.mmio.work().world(pair.driver.now);
            }
            pair.disk.hold(false);
            hostile::recover(&mut pair.driver);
            // Limits that came out of a record refill from the first request on.
            pair.offer(spec::VIRTIO_BLK_T_FLUSH, 0, &[], 0);
            pair.driver.kick(0);
            pair.driver.now = pair.driver.now + Duration::from_secs(60);
            pair.driver.world();
            assert!(pair.driver.used(0).is_some(), "seed {seed}");
            assert_eq!(pair.read(0, 512).0, OK, "seed {seed}");
            assert_eq!(pair.driver.mmio.work().busy(), 0, "seed {seed}");
        }
    }

    #[test]
    fn a_record_of_another_layout_of_queues_is_refused_by_name() {
        let saved = Driver::<Block>::new(wiring()).mmio.save().unwrap();
        let mut one = Driver::<Block>::new(wiring()).wiring();
        one.device.queues = 1;
        let error = Mmio::<Block>::restore(&saved, one).unwrap_err();
        assert_eq!(
            error.to_string(),
            "disk/rootfs cannot be restored: it was saved with 2 queues, here it has 1"
        );
    }
}
