//! Raw calls that kvm-ioctls 0.25 does not have.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use kvm_bindings::{KVMIO, kvm_clear_dirty_log};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_iowr_nr;

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

/// `_UFFDIO_API` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: i32 = 1;
ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, UffdioApi);

/// Try to make a userfaultfd; gives the features the kernel offers with it.
pub(crate) fn userfaultfd_features(user_mode_only: bool) -> Result<u64, std::io::Error> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if user_mode_only { UFFD_USER_MODE_ONLY } else { 0 };
    // SAFETY: userfaultfd takes one integer and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let Some(fd) = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0) else {
        return Err(std::io::Error::last_os_error());
    };
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = UffdioApi {
        api: UFFD_API,
        features: 0,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which `UffdioApi` mirrors field by field.
    match unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) } {
        0 => Ok(api.features),
        _ => Err(std::io::Error::last_os_error()),
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
