//! Harvesting: which pages were written since the last harvest.
//!
//! Two logs know it together: KVM's, for what vCPUs and KVM wrote, and the VMM's own bitmap, for what devices and
//! loaders wrote. A harvest joins both, and what somebody put back.
//!
//! # No write falls between two harvests
//!
//! The order is: read KVM's log, clear what was read (which write-protects those pages again), and only then does the
//! caller copy the pages. A write before the clear is in the copy; a write after it is in the next harvest; a write in
//! between is in both. The device bitmap is taken by atomic swaps, and a device marks a page after writing it, so the
//! same holds there.
//!
//! # When a harvest fails halfway
//!
//! Reading KVM's log may consume it (without manual protection reading *is* clearing), and it is read slot by slot. So
//! whatever was read before the failure is kept in `owed` and joins the next harvest. Where it is not known what was
//! consumed, everything is owed.
//!
//! [`WriteLog`] is what differs between KVM's ways of logging; the bitmap is the only one so far.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use umbra_core::guest::{Harvest, Space};
use umbra_units::{PageSet, SpaceId};

use crate::error::Error;
use crate::ioctls::clear_dirty_log;
use crate::limits::CLEAR_PAGES;
use crate::memory::{Block, Memory};

/// One of KVM's ways to record writes.
pub(crate) trait WriteLog: Send + Sync {
    /// Record from now on. The first [`take`](Self::take) may say more than was written.
    fn start(&self, blocks: &[Block]) -> Result<(), Error>;

    /// Record no longer.
    fn stop(&self, blocks: &[Block]) -> Result<(), Error>;

    /// The pages of `block` written since this was last asked: page `n` is bit `n % 64` of word `n / 64`.
    fn take(&self, block: &Block) -> Result<Vec<u64>, Lost>;
}

/// A log that could not be taken, and what that did to it.
#[derive(Debug)]
pub(crate) struct Lost {
    pub(crate) error: Error,
    /// What was consumed all the same: bits of the block, or `None` when nobody knows.
    pub(crate) consumed: Option<Vec<u64>>,
}

/// Joins the logs of one guest.
pub(crate) struct Tracker {
    log: Box<dyn WriteLog>,
    state: Mutex<State>,
}

struct State {
    on: bool,
    /// No harvest was taken since recording began.
    first: bool,
    /// Pages the next harvest must report whatever the logs say.
    owed: PageSet,
}

impl Tracker {
    pub(crate) fn new(log: Box<dyn WriteLog>, space: &Space) -> Self {
        Self {
            log,
            state: Mutex::new(State {
                on: false,
                first: false,
                owed: PageSet::new(space.pages),
            }),
        }
    }

    pub(crate) fn track(&self, memory: &Memory, on: bool) -> Result<(), Error> {
        let mut state = self.state();
        match (state.on, on) {
            (false, true) => {
                // What devices wrote before is in memory for whoever starts copying now.
                memory.forget_device_writes();
                self.log.start(memory.blocks())?;
                state.first = true;
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
        let pages = memory.space().pages;
        let mut words = PageSet::new(pages).words().to_vec();
        let mut written = words.clone();
        let mut failed = None;
        for block in memory.blocks() {
            match self.log.take(block) {
                Ok(taken) => join(&mut words, block, &taken),
                Err(Lost {
                    error,
                    consumed: Some(taken),
                }) => {
                    join(&mut words, block, &taken);
                    failed = Some(error);
                }
                Err(Lost { error, consumed: None }) => {
                    join(&mut words, block, &all_of(block));
                    failed = Some(error);
                }
            }
            join(&mut written, block, &memory.take_device_writes(block));
        }
        let mut dirty = PageSet::from_words(words, pages);
        // A log may begin with every page set. What is a hole *now*, after the log was cleared, no vCPU has written; what
        // is written from here on is in the next harvest. The VMM may have: clearing memory makes holes, and records them.
        if std::mem::take(&mut state.first) {
            dirty.subtract(&memory.holes());
        }
        dirty.union_with(&PageSet::from_words(written, pages));
        dirty.union_with(&std::mem::replace(&mut state.owed, PageSet::new(pages)));
        if let Some(error) = failed {
            state.owed = dirty;
            return Err(error);
        }
        Ok(Harvest {
            dirty: if dirty.is_empty() {
                Vec::new()
            } else {
                vec![(SpaceId::RAM, dirty)]
            },
        })
    }

    /// Report these pages again. Pages this guest does not have are ignored: nobody can have read them.
    pub(crate) fn put_back(&self, harvest: &Harvest) {
        let mut state = self.state();
        let capacity = state.owed.capacity();
        for (_, set) in harvest.dirty.iter().filter(|(space, _)| *space == SpaceId::RAM) {
            state
                .owed
                .union_with(&PageSet::from_words(set.words().to_vec(), capacity));
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Put a block's bits where its pages are in the space.
fn join(words: &mut [u64], block: &Block, bits: &[u64]) {
    assert_eq!(
        block.first.0 % 64,
        0,
        "blocks begin at multiples of 64 pages: see Shape::ram"
    );
    let first = index(block.first.0 / 64);
    let blocks_own = index(block.pages.0.div_ceil(64));
    words[first..]
        .iter_mut()
        .zip(&bits[..bits.len().min(blocks_own)])
        .for_each(|(word, bits)| *word |= bits);
}

fn all_of(block: &Block) -> Vec<u64> {
    PageSet::full(block.pages).words().to_vec()
}

/// KVM's dirty bitmap, one per memory slot.
pub(crate) struct DirtyBitmap {
    vm: Arc<VmFd>,
    /// Reading does not clear; we do, and can in pieces. The kernel is then also told to consider every page written
    /// when logging starts, so that starting need not write-protect all of memory at once.
    manual: bool,
}

impl DirtyBitmap {
    /// Find out how this kernel logs. Must come before the first slot is logged.
    pub(crate) fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        // The capability's value is the set of flags the kernel knows (kvm/api.rst, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        // kernels before 5.7 know only the first.
        let known = u32::try_from(vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())).unwrap_or(0);
        let flags = known & wanted;
        let manual = flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = flags.into();
            vm.enable_cap(&cap)
                .map_err(Error::kvm("choose manual dirty log protection"))?;
        }
        Ok(Self { vm, manual })
    }

    /// Tell KVM about all blocks, logged or not.
    pub(crate) fn set_slots(&self, blocks: &[Block], logged: bool) -> Result<(), Error> {
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
            unsafe { self.vm.set_user_memory_region(slot) }.map_err(Error::kvm("give the guest its memory"))
        })
    }

    /// Clear what was read, in pieces that do not hold the MMU lock for long.
    fn clear(&self, block: &Block, bits: &[u64]) -> Result<(), Error> {
        let piece = index(CLEAR_PAGES / 64);
        for (n, piece_bits) in (0..).zip(bits.chunks(piece)) {
            if piece_bits.iter().all(|word| *word == 0) {
                continue;
            }
            let first = n * CLEAR_PAGES;
            let pages = CLEAR_PAGES.min(block.pages.0 - first);
            let pages = u32::try_from(pages).expect("a piece is CLEAR_PAGES at most");
            clear_dirty_log(&self.vm, block.slot, first, pages, piece_bits)?;
        }
        Ok(())
    }
}

impl WriteLog for DirtyBitmap {
    fn start(&self, blocks: &[Block]) -> Result<(), Error> {
        self.set_slots(blocks, true)
    }

    fn stop(&self, blocks: &[Block]) -> Result<(), Error> {
        self.set_slots(blocks, false)
    }

    fn take(&self, block: &Block) -> Result<Vec<u64>, Lost> {
        let bits = self
            .vm
            .get_dirty_log(block.slot, index(block.pages.bytes()))
            .map_err(|source| Lost {
                error: Error::Kvm {
                    doing: "read the dirty log",
                    source,
                },
                // Manual: reading changes nothing. Otherwise reading clears, and a failure may come after the clearing.
                consumed: self.manual.then(Vec::new),
            })?;
        if self.manual
            && let Err(error) = self.clear(block, &bits)
        {
            return Err(Lost {
                error,
                consumed: Some(bits),
            });
        }
        Ok(bits)
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a bitmap of mapped memory fits the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    use umbra_units::{Bytes, Gpa, PageCount};

    use crate::config::{Shape, Sharing};

    /// Answers as told, in order.
    struct Script(Mutex<VecDeque<Result<Vec<u64>, Lost>>>);

    impl WriteLog for Script {
        fn start(&self, _blocks: &[Block]) -> Result<(), Error> {
            Ok(())
        }
        fn stop(&self, _blocks: &[Block]) -> Result<(), Error> {
            Ok(())
        }
        fn take(&self, _block: &Block) -> Result<Vec<u64>, Lost> {
            self.0.lock().unwrap().pop_front().unwrap_or_else(|| Ok(Vec::new()))
        }
    }

    fn scripted(mib: u64, answers: Vec<Result<Vec<u64>, Lost>>) -> (Memory, Tracker) {
        let memory = Memory::new(Shape::new(1, Bytes::mib(mib), Sharing::Private).unwrap()).unwrap();
        let tracker = Tracker::new(Box::new(Script(Mutex::new(answers.into()))), memory.space());
        tracker.track(&memory, true).unwrap();
        (memory, tracker)
    }

    fn lost(consumed: Option<Vec<u64>>) -> Result<Vec<u64>, Lost> {
        Err(Lost {
            error: Error::WrongState("scripted"),
            consumed,
        })
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
        let (memory, tracker) = scripted(4096, vec![Ok(vec![0b1]), lost(Some(vec![0b1000]))]);
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
        let tracker = Tracker::new(Box::new(script), memory.space());
        memory.write(Gpa(0x5000), b"x").unwrap();
        tracker.track(&memory, true).unwrap();
        memory.clear().unwrap();
        assert_eq!(pages(&tracker.harvest(&memory).unwrap()), [5]);
    }

    #[test]
    fn when_nobody_knows_what_was_consumed_everything_is_reported() {
        let (memory, tracker) = scripted(8, vec![lost(None)]);
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
}
