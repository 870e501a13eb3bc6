//! KVM's dirty bitmap: a bit per page of each memory slot.
//!
//! Reading it costs a little for each page of memory, clearing it something for each page written. Where the kernel can
//! (manual protection), reading clears nothing, and we clear what was read in pieces that do not hold the MMU lock for
//! long; and logging begins with every page set, so that starting need not write-protect all of memory at once.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::{Begins, WriteLog, index, join, set_slots, words_of};
use crate::error::Error;
use crate::ioctls::{clear_dirty_log, get_dirty_log};
use crate::limits::CLEAR_PAGES;
use crate::memory::Block;

/// The log that is a bitmap.
pub(crate) struct DirtyBitmap {
    vm: Arc<VmFd>,
    /// `KVM_DIRTY_LOG_*` as this kernel has them.
    flags: u32,
    /// What the kernel writes a slot's bits to: as long as the largest one read so far.
    read: Mutex<Vec<u64>>,
}

impl DirtyBitmap {
    /// Find out how this kernel logs. Must come before the first slot is logged.
    pub(crate) fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        // The capability's value is the set of flags the kernel knows (kvm/api.rst, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
        // kernels before 5.7 know only the first.
        let known = u32::try_from(vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())).unwrap_or(0);
        let flags = known & wanted;
        if flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = flags.into();
            vm.enable_cap(&cap)
                .map_err(Error::kvm("choose manual dirty log protection"))?;
        }
        Ok(Self {
            vm,
            flags,
            read: Mutex::default(),
        })
    }

    /// Reading does not clear; we do, and can in pieces.
    const fn manual(&self) -> bool {
        self.flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0
    }

    /// Clear what was read.
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

    fn take_one(&self, block: &Block, read: &mut Vec<u64>, into: &mut [u64]) -> Result<(), Error> {
        let words = index(block.pages.0.div_ceil(64));
        if read.len() < words {
            read.resize(words, 0);
        }
        let bits = &mut read[..words];
        if let Err(error) = get_dirty_log(&self.vm, block.slot, block.pages.0, bits) {
            // Manual: reading changes nothing. Otherwise reading clears, and a failure may come after the clearing.
            if !self.manual() {
                words_of(into, block).fill(u64::MAX);
            }
            return Err(error);
        }
        join(into, block, bits);
        if self.manual() { self.clear(block, bits) } else { Ok(()) }
    }
}

impl WriteLog for DirtyBitmap {
    fn start(&self, blocks: &[Block]) -> Result<Begins, Error> {
        set_slots(&self.vm, blocks, true)?;
        Ok(if self.flags & KVM_DIRTY_LOG_INITIALLY_SET != 0 {
            Begins::Full
        } else {
            Begins::Empty
        })
    }

    fn stop(&self, blocks: &[Block]) -> Result<(), Error> {
        set_slots(&self.vm, blocks, false)
    }

    fn take(&self, blocks: &[Block], into: &mut [u64]) -> Result<(), Error> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = Ok(());
        for block in blocks {
            // A slot that fails does not keep the others from being taken: all of it is owed then.
            let taken = self.take_one(block, &mut read, into);
            done = done.and(taken);
        }
        done
    }
}
