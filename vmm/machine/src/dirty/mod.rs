//! Harvesting: which pages were written since the last harvest.
//!
//! Two logs know it together: KVM's, for what vCPUs and KVM wrote, and the VMM's own bitmap, for what devices and
//! loaders wrote. A harvest joins both, and what somebody put back.
//!
//! # No write falls between two harvests
//!
//! The order is: read KVM's log, make it record those pages anew (which write-protects them again), and only then does the
//! caller copy the pages. A write before the log was renewed is in the copy; a write after it is in the next harvest; a
//! write in between is in both. The device bitmap is taken by atomic swaps, and a device marks a page after writing it,
//! so the same holds there.
//!
//! A write may be *told* later than it was made: processors that log writes themselves (PML) hand their notes over when a
//! vCPU leaves the guest. The bitmap has them handed over at each reading; a ring does not, and tells what a running
//! vCPU wrote last at a later harvest. That loses nothing, since such a page was not renewed either, and once
//! the vCPUs have stopped nothing is outstanding: the harvest of a paused guest is complete with both.
//!
//! # When a harvest fails halfway
//!
//! Reading KVM's log may consume it (without manual protection reading *is* clearing), and it is read slot by slot. So
//! whatever was read before the failure is kept in `owed` and joins the next harvest. Where it is not known what was
//! consumed, everything is owed.
//!
//! # Two logs, one choice
//!
//! [`WriteLog`] is what differs between KVM's ways of logging: a [`bitmap`] per memory slot, or a [`ring`] of page numbers
//! per vCPU. Which of them is used is decided once per machine, before it has vCPUs: see [`choose`]. It is the host's
//! own affair and does not travel.
//!
//! # Large pages
//!
//! A page is logged by write-protecting it, and a large page must be split first. On x86 the kernel does that eagerly, in
//! one go, unless it was told not to (`kvm.eager_page_split`): with the bitmap that starts as all set, for the pages
//! being cleared and when they are cleared; otherwise for all of memory, when logging starts. Else each first write
//! splits its own large page while its vCPU waits. `umbra doctor` says which it is. (On arm64 the same is asked for by
//! `KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE`; this VMM runs on x86 only.)

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use umbra_core::guest::{Harvest, Space};
use umbra_units::{PageCount, PageSet, SpaceId};

use crate::error::Error;
use crate::memory::{Block, Memory};

pub(crate) mod bitmap;
pub(crate) mod choose;
pub(crate) mod ring;

/// One of KVM's ways to record writes.
pub(crate) trait WriteLog: Send + Sync {
    /// There is a vCPU more. Called once for each, in their order, before any of them runs.
    fn attach(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let _ = vcpu;
        Ok(())
    }

    /// Record from now on.
    fn start(&self, blocks: &[Block]) -> Result<Begins, Error>;

    /// Record no longer.
    fn stop(&self, blocks: &[Block]) -> Result<(), Error>;

    /// Set the bits of the pages written since this was last asked: page `n` of the guest's space is bit `n % 64` of
    /// word `n / 64`. Also when it fails, what was consumed is set; where nobody knows what was, everything is.
    fn take(&self, blocks: &[Block], into: &mut [u64]) -> Result<(), Error>;

    /// A vCPU cannot go on before there is room for what it writes: make some, losing nothing. Called by its own thread.
    fn make_room(&self, blocks: &[Block], vcpu: u8) -> Result<(), Error> {
        let (_, _) = (blocks, vcpu);
        Ok(())
    }

    /// What each vCPU wrote, where the log tells them apart.
    fn by_vcpu(&self) -> Option<Vec<VcpuWrites>> {
        None
    }
}

/// What a log says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begins {
    /// What was written since it was started.
    Empty,
    /// Every page.
    Full,
}

/// What one vCPU wrote: a page counts each time its being written is recorded, once per harvest or a little more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuWrites {
    /// Since the machine was built.
    pub pages: u64,
    /// Lately: over a tenth of a second or more.
    pub pages_per_second: u64,
}

/// Joins the logs of one guest.
pub(crate) struct Tracker {
    log: Arc<dyn WriteLog>,
    state: Mutex<State>,
}

struct State {
    on: bool,
    /// The next harvest is the first since recording began, and the log began as this.
    first: Option<Begins>,
    /// Pages the next harvest must report whatever the logs say.
    owed: Option<PageSet>,
    pace: Pace,
    pages: PageCount,
}

impl Tracker {
    pub(crate) fn new(log: Arc<dyn WriteLog>, space: &Space) -> Self {
        Self {
            log,
            state: Mutex::new(State {
                on: false,
                first: None,
                owed: None,
                pace: Pace::new(Instant::now()),
                pages: space.pages,
            }),
        }
    }

    pub(crate) fn track(&self, memory: &Memory, on: bool) -> Result<(), Error> {
        let mut state = self.state();
        match (state.on, on) {
            (false, true) => {
                // What devices wrote before is in memory for whoever starts copying now.
                memory.forget_device_writes();
                state.first = Some(self.log.start(memory.blocks())?);
                state.pace = Pace::new(Instant::now());
            }
            (true, false) => self.log.stop(memory.blocks())?,
            _ => {}
        }
        state.on = on;
        Ok(())
    }

    pub(crate) fn harvest(&self, memory: &Memory) -> Result<Harvest, Error> {
        let mut state = self.state();
        if !state.on {
            return Err(Error::WrongState(
                "cannot harvest: writes are not being recorded; track them first",
            ));
        }
        let pages = state.pages;
        // The one thing here that is as long as memory: the harvest itself.
        let mut words = vec![0; index(pages.0.div_ceil(64))];
        let taken = self.log.take(memory.blocks(), &mut words);
        let begins = state.first.take();
        if begins == Some(Begins::Full) {
            // What is a hole *now*, after the log was renewed, no vCPU has written; what is written from here on is in
            // the next harvest. The VMM may have: clearing memory makes holes, and records them.
            let mut dirty = PageSet::from_words(words, pages);
            dirty.subtract(&memory.holes());
            words = dirty.words().to_vec();
        }
        for block in memory.blocks() {
            let words = words_of(&mut words, block);
            memory.take_device_writes(block, |word, bits| words[word] |= bits);
        }
        let mut dirty = PageSet::from_words(words, pages);
        if let Some(owed) = state.owed.take() {
            dirty.union_with(&owed);
        }
        if let Err(error) = taken {
            state.owed = Some(dirty);
            return Err(error);
        }
        let count = dirty.count();
        // A log that begins full says nothing of what is being written.
        if begins != Some(Begins::Full) {
            state.pace.note(count, Instant::now());
        }
        Ok(Harvest {
            dirty: if count.0 == 0 {
                Vec::new()
            } else {
                vec![(SpaceId::RAM, dirty)]
            },
        })
    }

    /// Report these pages again. Pages this guest does not have are ignored: nobody can have read them.
    pub(crate) fn put_back(&self, harvest: &Harvest) {
        let mut state = self.state();
        let pages = state.pages;
        for (_, set) in harvest.dirty.iter().filter(|(space, _)| *space == SpaceId::RAM) {
            state
                .owed
                .get_or_insert_with(|| PageSet::new(pages))
                .union_with(&PageSet::from_words(set.words().to_vec(), pages));
        }
    }

    /// What each vCPU writes, where the log tells them apart.
    pub(crate) fn by_vcpu(&self) -> Option<Vec<VcpuWrites>> {
        self.log.by_vcpu()
    }

    /// How many pages a second were written lately, by whomever.
    pub(crate) fn pages_per_second(&self) -> u64 {
        self.state().pace.per_second()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How quickly something counted grows, over the last while.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    pages: u64,
    per_second: u64,
}

impl Pace {
    /// A rate over less says more about the moment than about the guest.
    const WHILE: Duration = Duration::from_millis(100);

    pub(crate) const fn new(now: Instant) -> Self {
        Self {
            since: now,
            pages: 0,
            per_second: 0,
        }
    }

    /// So many more, by now.
    pub(crate) fn note(&mut self, pages: PageCount, now: Instant) {
        self.pages += pages.0;
        let past = now.saturating_duration_since(self.since);
        if past >= Self::WHILE {
            let per_second = u128::from(self.pages) * 1_000_000_000 / past.as_nanos();
            *self = Self {
                since: now,
                pages: 0,
                per_second: u64::try_from(per_second).unwrap_or(u64::MAX),
            };
        }
    }

    pub(crate) const fn per_second(&self) -> u64 {
        self.per_second
    }
}

/// Tell KVM about all blocks, logged or not.
pub(crate) fn set_slots(vm: &VmFd, blocks: &[Block], logged: bool) -> Result<(), Error> {
    blocks.iter().try_for_each(|block| {
        let slot = kvm_userspace_memory_region {
            slot: block.slot,
            flags: if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: block.first.gpa().0,
            memory_size: block.pages.bytes(),
            userspace_addr: block.host_address(),
        };
        // SAFETY: the slot is a block's whole mapping and blocks do not overlap. KVM touches it only on behalf of a
        // running vCPU, and whoever runs one keeps the memory: `vcpu::Thread` by an Arc, the probe by its scope.
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("give the guest its memory"))
    })
}

/// Put a block's bits where its pages are in the space.
fn join(words: &mut [u64], block: &Block, bits: &[u64]) {
    words_of(words, block)
        .iter_mut()
        .zip(bits)
        .for_each(|(word, bits)| *word |= bits);
}

/// A block's words among those of the space.
fn words_of<'a>(words: &'a mut [u64], block: &Block) -> &'a mut [u64] {
    assert_eq!(
        block.first.0 % 64,
        0,
        "blocks begin at multiples of 64 pages: see Shape::ram"
    );
    let first = index(block.first.0 / 64);
    &mut words[first..first + index(block.pages.0.div_ceil(64))]
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a bitmap of mapped memory fits the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    use umbra_units::{Bytes, Gpa};

    use crate::config::{Shape, Sharing};

    /// Answers as told, in order.
    struct Script(Mutex<VecDeque<Answer>>);

    /// What a block's log says, or what was consumed when it failed: nobody may know.
    type Answer = Result<Vec<u64>, Option<Vec<u64>>>;

    impl WriteLog for Script {
        fn start(&self, _blocks: &[Block]) -> Result<Begins, Error> {
            Ok(Begins::Full)
        }
        fn stop(&self, _blocks: &[Block]) -> Result<(), Error> {
            Ok(())
        }
        fn take(&self, blocks: &[Block], into: &mut [u64]) -> Result<(), Error> {
            let mut failed = Ok(());
            for block in blocks {
                match self.0.lock().unwrap().pop_front() {
                    Some(Ok(bits) | Err(Some(bits))) if bits.is_empty() => {}
                    Some(Ok(bits)) => join(into, block, &bits),
                    Some(Err(consumed)) => {
                        failed = Err(Error::WrongState("scripted"));
                        match consumed {
                            Some(bits) => join(into, block, &bits),
                            None => words_of(into, block).fill(u64::MAX),
                        }
                    }
                    None => {}
                }
            }
            failed
        }
    }

    fn scripted(mib: u64, answers: Vec<Answer>) -> (Memory, Tracker) {
        let memory = Memory::new(Shape::new(1, Bytes::mib(mib), Sharing::Private).unwrap()).unwrap();
        let tracker = Tracker::new(Arc::new(Script(Mutex::new(answers.into()))), memory.space());
        tracker.track(&memory, true).unwrap();
        (memory, tracker)
    }

    fn pages(harvest: &Harvest) -> Vec<u64> {
        harvest
            .dirty
            .iter()
            .flat_map(|(_, set)| set.iter().map(|page| page.0))
            .collect()
    }

    #[test]
    fn a_harvest_joins_the_logs_and_consumes_them() {
        let (memory, tracker) = scripted(8, vec![Ok(vec![0b101])]);
        memory.write(Gpa(0x1000), b"x").unwrap();
        assert_eq!(pages(&tracker.harvest(&memory).unwrap()), [0, 1, 2]);
        assert_eq!(tracker.harvest(&memory).unwrap(), Harvest::default());
    }

    #[test]
    fn what_is_put_back_is_reported_again() {
        let (memory, tracker) = scripted(8, vec![Ok(vec![0b11]), Ok(vec![0b100])]);
        let first = tracker.harvest(&memory).unwrap();
        tracker.put_back(&first);
        assert_eq!(pages(&tracker.harvest(&memory).unwrap()), [0, 1, 2]);
        assert!(tracker.harvest(&memory).unwrap().dirty.is_empty());
    }

    #[test]
    fn a_harvest_that_fails_halfway_loses_nothing() {
        // Two slots: the first is read, the second fails having consumed page 3 of it.
        let (memory, tracker) = scripted(4096, vec![Ok(vec![0b1]), Err(Some(vec![0b1000]))]);
        memory.write(Gpa(0x5000), b"x").unwrap();
        memory.write(Gpa(4 << 30), b"x").unwrap();
        assert!(tracker.harvest(&memory).is_err());
        let above = 1 << 20;
        assert_eq!(pages(&tracker.harvest(&memory).unwrap()), [0, 5, above, above + 3]);
    }

    #[test]
    fn memory_that_was_cleared_is_in_the_first_harvest_though_it_is_a_hole() {
        let shape = Shape::new(1, Bytes::mib(8), Sharing::Shared).unwrap();
        let memory = Memory::new(shape).unwrap();
        let script = Script(Mutex::new([Ok(vec![u64::MAX; 32])].into()));
        let tracker = Tracker::new(Arc::new(script), memory.space());
        memory.write(Gpa(0x5000), b"x").unwrap();
        tracker.track(&memory, true).unwrap();
        memory.clear().unwrap();
        assert_eq!(pages(&tracker.harvest(&memory).unwrap()), [5]);
    }

    #[test]
    fn when_nobody_knows_what_was_consumed_everything_is_reported() {
        let (memory, tracker) = scripted(8, vec![Err(None)]);
        assert!(tracker.harvest(&memory).is_err());
        assert_eq!(tracker.harvest(&memory).unwrap().count(), PageCount(2048));
    }

    #[test]
    fn harvesting_what_is_not_recorded_is_refused() {
        let (memory, tracker) = scripted(8, vec![Ok(vec![1])]);
        tracker.track(&memory, false).unwrap();
        let error = tracker.harvest(&memory).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot harvest: writes are not being recorded; track them first"
        );
    }

    #[test]
    fn bits_past_a_block_do_not_reach_the_next_one() {
        let (memory, tracker) = scripted(3080, vec![Ok(vec![u64::MAX; 1 << 20])]);
        assert_eq!(tracker.harvest(&memory).unwrap().count(), PageCount(786_432));
    }

    #[test]
    fn a_pace_is_what_was_counted_over_the_time_it_took() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        pace.note(PageCount(40), start + Duration::from_millis(50));
        assert_eq!(pace.per_second(), 0, "too early to tell");
        pace.note(PageCount(60), start + Duration::from_millis(200));
        assert_eq!(pace.per_second(), 500);
        pace.note(PageCount(0), start + Duration::from_millis(400));
        assert_eq!(pace.per_second(), 0);
    }
}
