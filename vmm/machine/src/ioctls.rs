//! Raw calls that kvm-ioctls 0.25 and the standard library do not have.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::error::Error;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Clear and write-protect again the pages of `slot` whose bits are set in `bits`, of which bit 0 is page `first`.
///
/// `first` must be a multiple of 64, `pages` too unless they reach the end of the slot, else KVM answers EINVAL
/// (kvm/api.rst, `KVM_CLEAR_DIRTY_LOG`).
pub(crate) fn clear_dirty_log(vm: &VmFd, slot: u32, first: u64, pages: u32, bits: &[u64]) -> Result<(), Error> {
    assert!(bits.len() as u64 * 64 >= u64::from(pages), "one bit per page");
    let mut clear = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        ..Default::default()
    };
    clear.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
    // SAFETY: `bits` holds at least `pages` bits (asserted above) and lives across the call; KVM only reads it, up to
    // `num_pages` bits rounded up to whole words (kvm/api.rst, KVM_CLEAR_DIRTY_LOG).
    let done = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &clear) };
    if done == 0 {
        Ok(())
    } else {
        Err(Error::Kvm {
            doing: "clear the dirty log",
            source: kvm_ioctls::Error::last(),
        })
    }
}

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);

/// Read the bits of `slot`, which has so many pages, into `bits`: kvm-ioctls has this too, and allocates each time.
pub(crate) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, bits: &mut [u64]) -> Result<(), Error> {
    assert!(bits.len() as u64 >= pages.div_ceil(64), "one bit per page");
    let mut log = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    log.__bindgen_anon_1.dirty_bitmap = bits.as_mut_ptr().cast();
    // SAFETY: KVM writes one bit per page of the slot, rounded up to whole words (kvm/api.rst, KVM_GET_DIRTY_LOG), for
    // which `bits` has room (asserted above; `pages` is the block's, with which the slot was made) across the call.
    let done = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
    if done == 0 {
        Ok(())
    } else {
        Err(Error::Kvm {
            doing: "read the dirty log",
            source: kvm_ioctls::Error::last(),
        })
    }
}

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Record anew the pages of entries that were given back, of all dirty rings; says how many entries that were.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> Result<u64, Error> {
    // SAFETY: takes no argument; the kernel changes only the rings, which are accessed through atomics.
    let renewed = unsafe { vmm_sys_util::ioctl::ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    u64::try_from(renewed).map_err(|_| Error::Kvm {
        doing: "renew the dirty rings",
        source: kvm_ioctls::Error::last(),
    })
}

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The attribute of a vCPU that is its TSC's offset, to be read to or written from `offset`.
fn tsc_offset_at(offset: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset).expose_provenance() as u64,
        ..Default::default()
    }
}

/// What a vCPU's TSC is ahead of its host's, scaled (kvm/devices/vcpu.rst 4.1); `None` where the kernel does not tell.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attr = tsc_offset_at(&mut offset);
    // SAFETY: for this attribute KVM writes one u64 to `addr`, which is a u64 of ours that lives across the call.
    let done = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    (done == 0).then_some(offset)
}

/// Set it; says whether the kernel took it, which some do and then ignore it.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> bool {
    let attr = tsc_offset_at(&mut offset);
    // SAFETY: for this attribute KVM reads one u64 at `addr`, which is a u64 of ours that lives across the call.
    let done = unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) };
    done == 0
}

ioctl_ior_nr!(BLKGETSIZE64, 0x12, 114, u64);
ioctl_io_nr!(BLKSSZGET, 0x12, 104);

/// How large a block device is.
pub(crate) fn block_device_bytes(device: &File) -> io::Result<u64> {
    let mut bytes = 0_u64;
    // SAFETY: BLKGETSIZE64 writes one u64 (linux/fs.h, where its type is `size_t`).
    match unsafe { ioctl_with_mut_ref(device, BLKGETSIZE64(), &mut bytes) } {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The smallest piece a block device reads or writes.
pub(crate) fn block_device_sector(device: &File) -> Option<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int (linux/fs.h).
    let done = unsafe { ioctl_with_mut_ref(device, BLKSSZGET(), &mut bytes) };
    u32::try_from(bytes).ok().filter(|bytes| done == 0 && *bytes > 0)
}

/// Lock all of a file for its open file description, or unlock it, without waiting: `fcntl(2)`, `F_OFD_SETLK`.
pub(crate) fn set_lock(file: RawFd, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a `flock` is plain integers, for which zero is valid: from the file's start (SEEK_SET is 0) to its end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).expect("F_RDLCK, F_WRLCK and F_UNLCK are small");
    // SAFETY: the kernel reads one `flock`, which lives across the call.
    match unsafe { libc::fcntl(file, libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Which way bytes go between a file and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the file.
    In,
    /// To the file.
    Out,
}

/// Move bytes between `file`, from `offset`, and `runs` of memory; says how many were moved. With `at_once`, only what
/// can be done without waiting is done, and the rest is `EAGAIN` or `EOPNOTSUPP`: `preadv2(2)`, `RWF_NOWAIT`.
///
/// # Safety
/// Each run must be mapped for as long as the call takes, and nobody may hold a Rust reference into it.
pub(crate) unsafe fn transfer(
    file: &File,
    way: Way,
    runs: &[libc::iovec],
    offset: u64,
    at_once: bool,
) -> io::Result<usize> {
    let count = libc::c_int::try_from(runs.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let flags = if at_once { libc::RWF_NOWAIT } else { 0 };
    let (fd, runs) = (file.as_raw_fd(), runs.as_ptr());
    let moved = match way {
        // SAFETY: the caller's; the array of runs is `count` long and lives across the call.
        Way::In => unsafe { libc::preadv2(fd, runs, count, offset, flags) },
        // SAFETY: as above.
        Way::Out => unsafe { libc::pwritev2(fd, runs, count, offset, flags) },
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// What becomes of a run of a file that holds nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Emptied {
    /// It reads as zeros and takes no space.
    Hole,
    /// It reads as zeros and keeps its space.
    Zeros,
}

/// Empty a run of a file or block device, without changing its size: `fallocate(2)`.
pub(crate) fn empty(file: &File, how: Emptied, offset: u64, bytes: u64) -> io::Result<()> {
    let number = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let mode = libc::FALLOC_FL_KEEP_SIZE
        | match how {
            Emptied::Hole => libc::FALLOC_FL_PUNCH_HOLE,
            Emptied::Zeros => libc::FALLOC_FL_ZERO_RANGE,
        };
    // SAFETY: integers only.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, number(offset)?, number(bytes)?) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread's id, for [`signal_thread`].
pub(crate) fn thread_id() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// Send `signal` to a thread of this process. A thread that is gone is no error: there is nobody to interrupt.
pub(crate) fn signal_thread(thread: i32, signal: i32) {
    let process = std::process::id();
    // SAFETY: tgkill takes integers only. Should the id have been given to a newer thread of this process, that one is
    // interrupted once by a handler that does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}
