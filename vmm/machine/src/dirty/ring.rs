//! KVM's dirty ring: each vCPU notes the pages it writes in a ring of its own, shared with us.
//!
//! ```text
//!      next (ours)                          the kernel's end
//!          ▼                                     ▼
//!   ┌────┬──────┬──────┬──────┬──────┬──────┬────────┐
//!   │    │ dirty│ dirty│ dirty│ dirty│ dirty│ (free) │     collect: dirty ─▶ reset, `next` moves on
//!   └────┴──────┴──────┴──────┴──────┴──────┴────────┘     renew:   the kernel protects the pages of reset entries
//!                                                                   again and frees the entries
//! ```
//!
//! What it costs depends on what was written, not on how large memory is; and it tells the vCPUs apart. In return logging
//! begins by write-protecting all of memory, and a vCPU that fills its ring has to stop and have it emptied.
//!
//! # Order
//!
//! An entry is the kernel's until its flags say dirty, ours until we say reset, and the kernel's again from then on. The
//! flags are read with acquire and written with release, so that the rest of the entry is neither read before nor after
//! it is ours (kvm/api.rst, `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`). Pages may be copied only after the entries were renewed:
//! until then a write to a page that was collected leaves no trace.
//!
//! # A full ring
//!
//! The vCPU leaves the guest and its own thread collects its ring ([`WriteLog::make_room`]): what it finds is put by, in
//! `put_by`, for the next harvest. It takes the rings' lock and nothing else, and whoever harvests holds that lock only
//! over calls that wait for no vCPU: so a full ring, a harvest and a pause may come together in any order. The thread has
//! put by what it found before it parks, so the harvest of a paused guest has it.
//!
//! # Entries that are not renewed
//!
//! Since Linux 6.16 renewing stops early when a signal is due, and a vCPU is told to stop by one. The kernel says how many
//! entries it renewed; `collected` counts those it has not, and a harvest is over only when there are none. A call that
//! fails leaves them for the next.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, KVM_DIRTY_GFN_F_MASK,
    KVM_DIRTY_LOG_PAGE_OFFSET, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use umbra_units::{PAGE_SIZE, PageCount};

use super::{Begins, Pace, VcpuWrites, WriteLog, index, join, set_slots};
use crate::error::Error;
use crate::ioctls::{get_dirty_log, reset_dirty_rings};
use crate::limits;
use crate::memory::Block;

/// `KVM_DIRTY_GFN_F_DIRTY` and `KVM_DIRTY_GFN_F_RESET` of linux/kvm.h, which the bindings leave out.
const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// The log that is a ring per vCPU.
pub(crate) struct DirtyRing {
    vm: Arc<VmFd>,
    entries: u32,
    /// Some pages are written by no vCPU, and are in a bitmap.
    with_bitmap: bool,
    state: Mutex<State>,
    /// By vCPU: pages since the machine was built.
    written: Box<[AtomicU64]>,
}

#[derive(Debug, Default)]
struct State {
    rings: Vec<Ring>,
    /// Entries that were collected and not renewed yet.
    collected: u64,
    /// What full rings held, by the words of the space. Empty until the first ring was full.
    put_by: Vec<u64>,
    /// Anything is in `put_by`.
    any_put_by: bool,
}

/// One vCPU's ring.
#[derive(Debug)]
struct Ring {
    entries: Mapping,
    /// The entry to be collected next. Grows without bound, wrapping; its place is the remainder.
    next: u32,
    pace: Pace,
}

/// `struct kvm_dirty_gfn`, shared with the kernel.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// A ring's memory.
#[derive(Debug)]
struct Mapping {
    first: NonNull<Entry>,
    /// A power of two.
    count: u32,
}

// SAFETY: the memory is shared with the kernel anyway, and is only accessed through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(vcpu: &VcpuFd, count: u32) -> Result<Self, Error> {
        assert!(count.is_power_of_two(), "checked by DirtyRing::new");
        // In pages of the host, which are ours on x86.
        let at = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) << PAGE_SIZE.trailing_zeros();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let bytes = Self::bytes(count);
        // SAFETY: a new mapping wherever the kernel likes replaces nothing.
        let ring = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                prot,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                at,
            )
        };
        if ring == libc::MAP_FAILED {
            return Err(Error::last_os("map a vCPU's dirty ring"));
        }
        let first = NonNull::new(ring.cast()).expect("the kernel maps nothing at address zero");
        Ok(Self { first, count })
    }

    const fn bytes(count: u32) -> usize {
        count as usize * size_of::<Entry>()
    }

    fn entry(&self, n: u32) -> &Entry {
        let place = (n % self.count) as usize;
        // SAFETY: `place` is less than `count`, and the mapping holds `count` entries.
        let entry = unsafe { self.first.add(place) };
        // SAFETY: the entry lies in the mapping, which lives as long as `self`. It is nothing but atomics, valid for any
        // bits, which the kernel may change at any time.
        unsafe { entry.as_ref() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and ends with its only owner; references into it borrow from that.
        unsafe { libc::munmap(self.first.as_ptr().cast(), Self::bytes(self.count)) };
    }
}

impl DirtyRing {
    /// How many entries a ring may have here; `None` without rings.
    pub(crate) fn most_entries(vm: &VmFd) -> Option<u32> {
        let bytes = |cap: u32| u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        let most = bytes(KVM_CAP_DIRTY_LOG_RING).max(bytes(KVM_CAP_DIRTY_LOG_RING_ACQ_REL));
        Some(most / entry_bytes()).filter(|most| *most > 0)
    }

    /// Rings of so many entries, or as many as there may be, for `vcpus` vCPUs. Must come before any of them exists.
    pub(crate) fn new(vm: Arc<VmFd>, entries: u32, vcpus: u8) -> Result<Self, Error> {
        let most = Self::most_entries(&vm).ok_or_else(|| no_ring("this kernel has no dirty ring".to_owned()))?;
        if entries > most {
            return Err(no_ring(format!(
                "this kernel's dirty rings have at most {most} entries, {entries} were asked for"
            )));
        }
        assert!(entries.is_power_of_two(), "checked by DirtyLog");
        let has = |cap: u32| vm.check_extension_raw(cap.into()) > 0;
        let cap = if has(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) {
            KVM_CAP_DIRTY_LOG_RING_ACQ_REL
        } else {
            KVM_CAP_DIRTY_LOG_RING
        };
        enable(&vm, cap, u64::from(entries * entry_bytes()))?;
        let with_bitmap = has(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP);
        if with_bitmap {
            enable(&vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0)?;
        }
        Ok(Self {
            vm,
            entries,
            with_bitmap,
            state: Mutex::default(),
            written: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Have the kernel record anew what was collected.
    fn renew(&self, state: &mut State) -> Result<(), Error> {
        let mut patience = limits::RING_RENEWALS;
        while state.collected > 0 {
            let renewed = reset_dirty_rings(&self.vm)?;
            state.collected = state.collected.saturating_sub(renewed);
            // Interrupted before the first: the signal is delivered as the call returns, so the next gets further.
            if renewed == 0 {
                patience -= 1;
                if patience == 0 {
                    return Err(Error::WrongState("the kernel does not renew what its dirty rings held"));
                }
            }
        }
        Ok(())
    }

    /// Take what one ring holds now.
    fn collect(&self, ring: &mut Ring, vcpu: usize, collected: &mut u64, blocks: &[Block], into: &mut [u64]) {
        let mut found = 0;
        // Not more than there is room for: a vCPU that goes on writing would keep us here.
        for _ in 0..ring.entries.count {
            let entry = ring.entries.entry(ring.next);
            if entry.flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                break;
            }
            let (slot, offset) = (entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            entry.flags.store(RESET, Ordering::Release);
            ring.next = ring.next.wrapping_add(1);
            found += 1;
            // An entry may be about a slot's earlier life; one that is about nothing we have is about nothing we lose.
            if let Some(block) = blocks.iter().find(|block| block.slot == slot)
                && offset < block.pages.0
            {
                let page = block.first.0 + offset;
                into[index(page / 64)] |= 1 << (page % 64);
            }
        }
        *collected += found;
        self.written[vcpu].fetch_add(found, Ordering::Relaxed);
        ring.pace.note(PageCount(found), Instant::now());
    }
}

impl WriteLog for DirtyRing {
    fn attach(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let ring = Ring {
            entries: Mapping::of(vcpu, self.entries)?,
            next: 0,
            pace: Pace::new(Instant::now()),
        };
        self.state().rings.push(ring);
        Ok(())
    }

    fn start(&self, blocks: &[Block]) -> Result<Begins, Error> {
        set_slots(&self.vm, blocks, true)?;
        Ok(Begins::Empty)
    }

    fn stop(&self, blocks: &[Block]) -> Result<(), Error> {
        set_slots(&self.vm, blocks, false)?;
        // What the rings still hold nobody wants; but they should be empty when recording starts again. What a vCPU adds
        // even now is one page more in a harvest to come, and no page less.
        let mut words = vec![0; words_for(blocks)];
        self.take(blocks, &mut words)
    }

    fn take(&self, blocks: &[Block], into: &mut [u64]) -> Result<(), Error> {
        let state = &mut *self.state();
        if std::mem::take(&mut state.any_put_by) {
            for (word, put_by) in into.iter_mut().zip(&mut state.put_by) {
                *word |= std::mem::take(put_by);
            }
        }
        for (vcpu, ring) in state.rings.iter_mut().enumerate() {
            self.collect(ring, vcpu, &mut state.collected, blocks, into);
        }
        let mut done = self.renew(state);
        if self.with_bitmap {
            let mut bits = Vec::new();
            for block in blocks {
                bits.resize(index(block.pages.0.div_ceil(64)), 0);
                let read = get_dirty_log(&self.vm, block.slot, block.pages.0, &mut bits);
                // Reading clears, and a failure may come after the clearing.
                if read.is_err() {
                    bits.fill(u64::MAX);
                }
                join(into, block, &bits);
                done = done.and(read);
            }
        }
        done
    }

    fn make_room(&self, blocks: &[Block], vcpu: u8) -> Result<(), Error> {
        let state = &mut *self.state();
        state.put_by.resize(words_for(blocks), 0);
        state.any_put_by = true;
        let vcpu = usize::from(vcpu);
        self.collect(
            &mut state.rings[vcpu],
            vcpu,
            &mut state.collected,
            blocks,
            &mut state.put_by,
        );
        self.renew(state)
    }

    fn by_vcpu(&self) -> Option<Vec<VcpuWrites>> {
        let mut state = self.state();
        let now = Instant::now();
        let rings = state.rings.iter_mut().zip(&self.written);
        Some(
            rings
                .map(|(ring, written)| {
                    ring.pace.note(PageCount(0), now);
                    VcpuWrites {
                        pages: written.load(Ordering::Relaxed),
                        pages_per_second: ring.pace.per_second(),
                    }
                })
                .collect(),
        )
    }
}

/// Words of the space that these blocks are.
fn words_for(blocks: &[Block]) -> usize {
    let pages = blocks.last().map_or(0, |block| block.first.0 + block.pages.0);
    index(pages.div_ceil(64))
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), Error> {
    let mut cap = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    cap.args[0] = argument;
    vm.enable_cap(&cap).map_err(Error::kvm("switch to the dirty ring"))
}

const fn no_ring(expected: String) -> Error {
    Error::Config {
        field: "dirty-log",
        expected,
    }
}

fn entry_bytes() -> u32 {
    u32::try_from(size_of::<Entry>()).expect("an entry is 16 bytes")
}
