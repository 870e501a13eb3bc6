//! `work=blkcheck`: writes blocks that prove themselves, and never believes that one is there until a flush says so.
//!
//! ```text
//! read everything -> verdict -> continue with the number after the newest write: writes, reads, flushes, for ever
//! ```
//!
//! A table in guest memory knows which write each block is from, and every read is compared with it, word by word. A
//! block that was read is kept on a *shelf* and compared again when its place is needed: so memory that the host wrote
//! must have travelled like any other.
//!
//! Flushes run beside writes. `disk N ok` is said when a flush has completed, and N is the last write before the oldest
//! that was not complete when that flush was asked for. After a power cut, or on another host, a disk that is not
//! consistent up to N ([`umbra_guest::disk`]) has broken a promise.

use crate::blk::{DRIVER_BYTES, Disk, Kind, SECTOR};
use crate::boot::{CpuCell, Share};
use crate::console::{fatal, say};
use crate::virtio::Shared;
use crate::workload::Pace;
use crate::{EXIT_CORRUPT, cpu, refuse};
use umbra_guest::config::{DEPTH_MAX, Op};
use umbra_guest::disk::{Schedule, Verdict};
use umbra_guest::pattern::Rng;
use umbra_guest::proof::{PAGE_BYTES, PAGE_WORDS, Page};

/// Blocks that are kept after having been read.
const SHELF: u64 = 512;
/// Time between two flushes: each is followed by a line, and a line costs a millisecond or two.
const FLUSH_US: u64 = 20_000;
/// Steps of patience.
const PATIENCE_US: u64 = 100_000;
/// A block that has failed to be written: nobody knows what is there.
const UNKNOWN: u64 = u64::MAX;

/// What a slot is doing.
#[derive(Clone, Copy)]
enum Doing {
    Nothing,
    /// Reading everything.
    Survey {
        position: u64,
    },
    Read {
        position: u64,
        shelf: u64,
    },
    Write {
        position: u64,
        write: u64,
    },
    /// Makes all writes up to this one durable.
    Flush {
        covers: u64,
    },
}

impl Doing {
    fn position(self) -> Option<u64> {
        match self {
            Self::Survey { position } | Self::Read { position, .. } | Self::Write { position, .. } => Some(position),
            Self::Nothing | Self::Flush { .. } => None,
        }
    }
}

enum Phase {
    /// Reading everything, up to this position.
    Survey { next: u64, read: u64, verdict: Verdict },
    /// Writes, reads, flushes.
    Running,
}

/// `work=blkcheck`.
pub(crate) struct Check {
    disk: Disk,
    op: Op,
    schedule: Schedule,
    phase: Phase,
    pace: Option<Pace>,
    rng: Rng,
    doing: [Doing; DEPTH_MAX as usize],
    /// A page per slot, for writes and the survey.
    pages: *mut Page,
    /// [`SHELF`] pages, and for each the position and write it should hold; write 0 and position [`UNKNOWN`]: nothing.
    shelf: *mut Page,
    shelf_table: *mut [u64; 2],
    shelf_cursor: u64,
    /// For each position the newest write that completed.
    table: *mut u64,
    /// The next write's number.
    next: u64,
    next_flush: u64,
    flushing: bool,
    /// Everything up to here was said to be durable.
    told: u64,
    errors: u64,
    /// A disk that is read-only has been asked to write all the same.
    dared: bool,
    flush_ticks: u64,
    next_patience: u64,
    patience_ticks: u64,
}

impl Check {
    /// Memory it shares with its device, and its tables.
    pub(crate) fn shared_bytes(span_bytes: u64) -> u64 {
        let blocks = span_bytes / PAGE_BYTES;
        let pages = SHELF + u64::from(DEPTH_MAX);
        DRIVER_BYTES + pages * PAGE_BYTES + (SHELF * 16).next_multiple_of(4096) + (blocks * 8).next_multiple_of(4096)
    }

    /// Starts now, with the survey.
    pub(crate) fn new(share: &Share, now: u64) -> Self {
        let config = &share.config;
        let mut shared = Shared::new(share);
        let disk = Disk::start(share, &mut shared);
        let blocks = (disk.sectors() * SECTOR).min(config.span_bytes) / PAGE_BYTES;
        if blocks == 0 {
            refuse("work=blkcheck", format_args!("a disk of at least 4K"));
        }
        let pages = shared.take(u64::from(DEPTH_MAX) * PAGE_BYTES).cast();
        let shelf = shared.take(SHELF * PAGE_BYTES).cast();
        let shelf_table: *mut [u64; 2] = shared.take(SHELF * 16).cast();
        for n in 0..SHELF as usize {
            // SAFETY: memory just taken.
            unsafe { shelf_table.add(n).write_volatile([UNKNOWN, 0]) };
        }
        Self {
            disk,
            op: config.op,
            schedule: Schedule::new(blocks),
            phase: Phase::Survey {
                next: 0,
                read: 0,
                verdict: Verdict::unread(),
            },
            pace: Pace::new(share, 1, now),
            rng: Rng::new(2),
            doing: [Doing::Nothing; DEPTH_MAX as usize],
            pages,
            shelf,
            shelf_table,
            shelf_cursor: 0,
            table: shared.take(blocks * 8).cast(),
            next: 1,
            next_flush: now,
            flushing: false,
            told: 0,
            errors: 0,
            dared: false,
            flush_ticks: share.clock.ticks(FLUSH_US),
            next_patience: now,
            patience_ticks: share.clock.ticks(PATIENCE_US),
        }
    }

    /// One turn.
    pub(crate) fn step(&mut self, me: CpuCell, now: u64) -> Option<u64> {
        if self.disk.transport.listen(now).requests {
            while let Some((slot, status, _)) = self.disk.answer(now) {
                self.hear(slot, status, now);
                me.set_ops(me.ops() + 1);
            }
        }
        if now >= self.next_patience {
            self.next_patience = now + self.patience_ticks;
            self.disk.is_patient(now);
        }
        let rest = match self.phase {
            Phase::Survey { .. } => {
                self.survey(now);
                None
            }
            Phase::Running => self.work(now),
        };
        self.disk.publish();
        let waits = self.disk.rest(now);
        // Paced, and polling: what is in flight is looked at when the next request is due.
        match (rest, waits) {
            (Some(rest), Some(_)) => Some(rest),
            (Some(rest), None) => (self.disk.in_flight() == 0).then_some(rest),
            (None, waits) => waits,
        }
    }

    fn survey(&mut self, now: u64) {
        while let Phase::Survey { next, .. } = &mut self.phase
            && *next < self.schedule.blocks()
            && let Some(slot) = self.disk.free_slot()
        {
            let position = *next;
            *next += 1;
            self.doing[usize::from(slot)] = Doing::Survey { position };
            self.ask(slot, Kind::Read, position, self.page(slot), now);
        }
    }

    /// Fills the free slots; says until when to rest if the pace allows no more.
    fn work(&mut self, now: u64) -> Option<u64> {
        if now >= self.next_flush && !self.flushing {
            self.flush(now);
        }
        while let Some(slot) = self.disk.free_slot() {
            if let Some(rest) = self.pace.as_mut().and_then(|pace| pace.rest(now)) {
                return Some(rest);
            }
            let reads = self.op == Op::Read || self.disk.is_read_only();
            if self.disk.is_read_only() && !self.dared {
                self.dared = true;
                self.write(slot, now);
                continue;
            }
            if reads || (self.op == Op::Mixed && self.rng.below(2) == 0) {
                self.read(slot, now);
            } else {
                self.write(slot, now);
            }
        }
        None
    }

    fn flush(&mut self, now: u64) {
        let Some(slot) = self.disk.free_slot() else { return };
        self.next_flush = now + self.flush_ticks;
        let oldest = self.doing.iter().filter_map(|doing| match doing {
            Doing::Write { write, .. } => Some(*write),
            _ => None,
        });
        let covers = oldest.min().unwrap_or(self.next) - 1;
        if covers == self.told {
            return;
        }
        self.flushing = true;
        self.doing[usize::from(slot)] = Doing::Flush { covers };
        if self.disk.flushes() {
            // SAFETY: a flush has no data.
            unsafe { self.disk.ask(slot, Kind::Flush, 0, core::ptr::null_mut(), 0, now) };
        } else {
            // A disk without a cache: what was answered is there.
            self.hear(slot, 0, now);
        }
    }

    fn write(&mut self, slot: u16, now: u64) {
        let write = self.next;
        let position = self.schedule.position(write);
        if self.is_busy(position) {
            return self.read(slot, now);
        }
        self.next += 1;
        let page = self.page(slot);
        // SAFETY: the page of a free slot.
        unsafe { Schedule::version(self.schedule.block(position), write).write(page) };
        self.doing[usize::from(slot)] = Doing::Write { position, write };
        self.ask(slot, Kind::Write, position, page, now);
    }

    fn read(&mut self, slot: u16, now: u64) {
        // Somewhere nobody writes: with at most 64 requests in flight there is such a place soon, unless the disk is
        // tiny, and then there will be one next time.
        let mut position = self.rng.below(self.schedule.blocks());
        for _ in 0..8 {
            if !self.is_busy(position) {
                break;
            }
            position = self.rng.below(self.schedule.blocks());
        }
        if self.is_busy(position) {
            return;
        }
        let Some(shelf) = self.place_on_shelf() else { return };
        self.doing[usize::from(slot)] = Doing::Read { position, shelf };
        self.ask(slot, Kind::Read, position, self.shelf.wrapping_add(shelf as usize), now);
    }

    fn is_busy(&self, position: u64) -> bool {
        self.doing.iter().any(|doing| doing.position() == Some(position))
    }

    /// The next place on the shelf, after having looked at what it kept.
    fn place_on_shelf(&mut self) -> Option<u64> {
        let place = self.shelf_cursor;
        let used = |doing: &Doing| matches!(doing, Doing::Read { shelf, .. } if *shelf == place);
        if self.doing.iter().any(used) {
            return None;
        }
        self.shelf_cursor = (place + 1) % SHELF;
        // SAFETY: `place` < SHELF.
        let [position, write] = unsafe { self.shelf_table.add(place as usize).read_volatile() };
        if position != UNKNOWN {
            self.expect("shelf", position, write, self.shelf.wrapping_add(place as usize));
        }
        // SAFETY: as above. The device writes the page now: it holds nothing until it is read.
        unsafe { self.shelf_table.add(place as usize).write_volatile([UNKNOWN, 0]) };
        Some(place)
    }

    fn page(&self, slot: u16) -> *mut Page {
        self.pages.wrapping_add(usize::from(slot))
    }

    fn ask(&mut self, slot: u16, kind: Kind, position: u64, page: *mut Page, now: u64) {
        let sector = self.schedule.block(position) * (PAGE_BYTES / SECTOR);
        // SAFETY: the slot's own page, or a place on the shelf that no other request has.
        unsafe { self.disk.ask(slot, kind, sector, page.cast(), PAGE_BYTES as u32, now) };
    }

    fn newest(&self, position: u64) -> u64 {
        // SAFETY: the table has an entry for every position.
        unsafe { self.table.add(position as usize).read_volatile() }
    }

    fn set_newest(&mut self, position: u64, write: u64) {
        // SAFETY: as above.
        unsafe { self.table.add(position as usize).write_volatile(write) };
    }

    fn hear(&mut self, slot: u16, status: u8, now: u64) {
        let doing = core::mem::replace(&mut self.doing[usize::from(slot)], Doing::Nothing);
        if status != 0 {
            return self.failed(slot, doing, status, now);
        }
        match doing {
            Doing::Nothing => fatal(
                EXIT_CORRUPT,
                format_args!("CORRUPT what=disk slot={slot} want=silence found=answer"),
            ),
            Doing::Survey { position } => self.surveyed(slot, position),
            Doing::Read { position, shelf } => {
                let write = self.newest(position);
                if write != UNKNOWN {
                    self.expect("disk", position, write, self.shelf.wrapping_add(shelf as usize));
                    // SAFETY: `shelf` < SHELF.
                    unsafe { self.shelf_table.add(shelf as usize).write_volatile([position, write]) };
                }
            }
            Doing::Write { position, .. } if self.disk.is_read_only() => fatal(
                EXIT_CORRUPT,
                format_args!("CORRUPT what=read-only-disk position={position} want=refusal found=done"),
            ),
            Doing::Write { position, write } => self.set_newest(position, write),
            Doing::Flush { covers } => {
                self.flushing = false;
                self.told = covers;
                say!("umbra-guest: disk {covers} ok");
            }
        }
    }

    /// An answer that says no. A write is tried again, for its number must not be missing; what else failed is let go.
    #[cold]
    fn failed(&mut self, slot: u16, doing: Doing, status: u8, now: u64) {
        if self.disk.is_read_only() && matches!(doing, Doing::Write { .. }) {
            say!("umbra-guest: disk is read-only and refuses to be written, status={status}");
            return;
        }
        self.errors += 1;
        let (errors, at) = (self.errors, doing.position().unwrap_or(0));
        let kind = match doing {
            Doing::Write { .. } => Kind::Write,
            Doing::Flush { .. } => Kind::Flush,
            _ => Kind::Read,
        };
        // Not a line for each: a disk that is gone answers quickly.
        if errors.is_power_of_two() {
            say!(
                "umbra-guest: disk error op={} status={status} position={at} errors={errors}",
                kind.name()
            );
        }
        match doing {
            Doing::Survey { position } => {
                self.doing[usize::from(slot)] = doing;
                self.ask(slot, Kind::Read, position, self.page(slot), now);
            }
            Doing::Write { position, .. } => {
                self.set_newest(position, UNKNOWN);
                self.doing[usize::from(slot)] = doing;
                self.ask(slot, Kind::Write, position, self.page(slot), now);
            }
            Doing::Flush { .. } => self.flushing = false,
            _ => {}
        }
    }

    fn surveyed(&mut self, slot: u16, position: u64) {
        let mut copy = [0; PAGE_WORDS];
        // SAFETY: the slot's own page, which the device is done with.
        unsafe { self.page(slot).copy_to(&raw mut copy, 1) };
        let write = self.schedule.recognise(position, &copy);
        self.set_newest(position, write.unwrap_or(UNKNOWN));
        let Phase::Survey { read, verdict, .. } = &mut self.phase else {
            return;
        };
        verdict.add(&self.schedule, position, write);
        *read += 1;
        if *read < self.schedule.blocks() {
            return;
        }
        let (
            Verdict {
                consistent,
                newest,
                torn,
            },
            blocks,
        ) = (*verdict, self.schedule.blocks());
        say!("umbra-guest: disk found consistent={consistent} newest={newest} torn={torn} blocks={blocks}");
        if self.op == Op::Verify {
            say!("umbra-guest: done");
            cpu::exit(0);
        }
        // Writes begin again where the disk is whole: those after a gap, if any, are written once more.
        self.next = consistent + 1;
        self.told = consistent;
        self.phase = Phase::Running;
    }

    /// Stops the guest unless a page holds what this write wrote there.
    fn expect(&self, what: &str, position: u64, write: u64, page: *mut Page) {
        let block = self.schedule.block(position);
        // SAFETY: a page that no request in flight uses.
        let right = unsafe {
            if write == 0 {
                (0..PAGE_WORDS).all(|n| page.cast::<u64>().add(n).read_volatile() == 0)
            } else {
                Schedule::version(block, write).matches(page)
            }
        };
        if !right {
            self.corrupt(what, position, write, page);
        }
    }

    #[cold]
    fn corrupt(&self, what: &str, position: u64, write: u64, page: *mut Page) -> ! {
        let mut copy = [0; PAGE_WORDS];
        // SAFETY: as in `expect`.
        unsafe { page.copy_to(&raw mut copy, 1) };
        let block = self.schedule.block(position);
        let (gpa, found) = (page as u64, self.schedule.recognise(position, &copy));
        let (first, number) = (copy[0], copy[2]);
        fatal(
            EXIT_CORRUPT,
            format_args!(
                "CORRUPT what={what} block={block} gpa={gpa:#x} want={write} found={found:?} first={first:#x} claims={number}"
            ),
        )
    }
}
