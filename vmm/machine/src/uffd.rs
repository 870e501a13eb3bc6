//! Page faults of guest memory, handled by this process: userfaultfd(2).
//!
//! The kernel stops whoever touches a page that is *missing*, or writes to one that is *protected*, vCPUs and its own
//! copies into and out of guest memory (`preadv`, `recvmsg`) included, and tells of it here. Whoever handles the fault must not touch such a page itself: it
//! would wait for itself.
//!
//! A descriptor that sees the kernel's own accesses takes a privilege (`CAP_SYS_PTRACE`, the `vm.unprivileged_userfaultfd`
//! sysctl, or access to `/dev/userfaultfd`, Linux 6.1), so it is made before a process gives its privileges up.
//!
//! The structures mirror linux/userfaultfd.h; Documentation/admin-guide/mm/userfaultfd.rst says what they mean.

use std::fs::File;
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use umbra_core::guest::PageBytes;
use umbra_units::PAGE_SIZE;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

/// Somebody waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// The address that was touched, rounded down to its page.
    pub(crate) address: usize,
}

/// Pages of a memfd may be missing (Linux 4.11).
pub(crate) const MISSING_OF_SHARED: u64 = 1 << 5;

/// Pages of anonymous memory may be protected (Linux 5.7).
pub(crate) const PROTECTED: u64 = 1 << 0;
/// Pages of a memfd may be, also while they are holes (Linux 5.19).
pub(crate) const PROTECTED_OF_SHARED: u64 = 1 << 12;
/// Pages of anonymous memory may be while they are holes (Linux 6.4).
pub(crate) const PROTECTED_HOLES: u64 = 1 << 13;

/// A descriptor. Everything it watched is let go of when it is closed, and whoever waited goes on.
#[derive(Debug)]
pub(crate) struct Uffd {
    file: File,
}

impl Uffd {
    /// A descriptor that sees the accesses of guest, process and kernel, and needs these features of the kernel.
    pub(crate) fn new(features: u64) -> io::Result<Self> {
        let fd = open()?;
        negotiate(&fd, features)?;
        Ok(Self { file: File::from(fd) })
    }

    /// The features of what this process may make: of a descriptor that sees everything, or only this process's own
    /// accesses.
    pub(crate) fn features_offered(user_mode_only: bool) -> io::Result<u64> {
        let fd = if user_mode_only {
            by_syscall(UFFD_USER_MODE_ONLY)?
        } else {
            open()?
        };
        negotiate(&fd, 0)
    }

    /// Watch for missing pages at these addresses, whole pages of one mapping, which is watched by one descriptor at most.
    pub(crate) fn watch_missing(&self, addresses: Range<usize>) -> io::Result<()> {
        let mut register = UffdioRegister {
            range: addresses.into(),
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one `uffdio_register`. It changes how faults of the range are handled, and
        // no content: guest memory is only ever accessed by copies that may wait as long as any page fault.
        done(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_REGISTER(), &mut register) })
    }

    /// Watch for writes to protected pages at these addresses, none of which is protected yet.
    pub(crate) fn watch_writes(&self, addresses: Range<usize>) -> io::Result<()> {
        let mut register = UffdioRegister {
            range: addresses.into(),
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: as for `watch_missing`.
        done(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_REGISTER(), &mut register) })
    }

    /// Protect the pages at these addresses from being written, or no longer: then whoever waits to write goes on.
    pub(crate) fn protect(&self, addresses: Range<usize>, yes: bool) -> io::Result<()> {
        let protect = UffdioWriteprotect {
            range: addresses.into(),
            mode: if yes { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 },
        };
        loop {
            // SAFETY: UFFDIO_WRITEPROTECT reads one `uffdio_writeprotect`. It changes who may write at once, and no content.
            match done(unsafe { ioctl_with_ref(&self.file, UFFDIO_WRITEPROTECT(), &protect) }) {
                // Somebody maps or unmaps memory at this moment.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
                other => return other,
            }
        }
    }

    /// Watch these addresses no longer; whoever waits there goes on.
    pub(crate) fn forget(&self, addresses: Range<usize>) -> io::Result<()> {
        let range = UffdioRange::from(addresses);
        // SAFETY: UFFDIO_UNREGISTER reads one `uffdio_range`; faults of the range are the kernel's again.
        done(unsafe { ioctl_with_ref(&self.file, UFFDIO_UNREGISTER(), &range) })
    }

    /// Put a page where none is, and let go on who waits for it. Answers whether it was missing.
    pub(crate) fn fill(&self, address: usize, page: &PageBytes) -> io::Result<bool> {
        let mut copy = UffdioCopy {
            dst: address as u64,
            src: page.as_ptr().expose_provenance() as u64,
            len: PAGE_SIZE as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads one page from `page`, and writes one at `address` only if that lies in a range this
        // descriptor watches and no page is there: guest memory, to which any write may happen at any time.
        filled(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_COPY(), &mut copy) })
    }

    /// Put a page of zeros where none is, and let go on who waits for it. Answers whether it was missing.
    pub(crate) fn fill_zeros(&self, address: usize) -> io::Result<bool> {
        let mut zero = UffdioZeropage {
            range: (address..address + PAGE_SIZE).into(),
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: as for `fill`, with zeros of the kernel's own.
        filled(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_ZEROPAGE(), &mut zero) })
    }

    /// Who waits, if anybody: never waits itself. The descriptor is readable when somebody does.
    pub(crate) fn waiting(&self) -> io::Result<Option<Waiting>> {
        let mut message = [0; 32];
        match (&self.file).read(&mut message) {
            Ok(32) => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        if message[0] != UFFD_EVENT_PAGEFAULT {
            return Err(io::Error::other(format!(
                "event {:#x}, which was not asked for",
                message[0]
            )));
        }
        // `arg.pagefault.address` of `uffd_msg`. x86 is little-endian.
        let address = u64::from_le_bytes(message[16..24].try_into().expect("eight bytes"));
        let address = usize::try_from(address).map_err(io::Error::other)?;
        Ok(Some(Waiting {
            address: address & !(PAGE_SIZE - 1),
        }))
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// By the device if there is one, which asks for no capability, else by the system call.
fn open() -> io::Result<OwnedFd> {
    let Ok(device) = File::open("/dev/userfaultfd") else {
        return by_syscall(0);
    };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes one integer and touches no memory of ours.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), u64::from(flags.cast_unsigned())) };
    made(fd.into())
}

fn by_syscall(flags: libc::c_int) -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
    // SAFETY: takes one integer and touches no memory of ours.
    made(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
}

fn made(fd: i64) -> io::Result<OwnedFd> {
    let Some(fd) = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ask for features; gives those the kernel has.
fn negotiate(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`.
    done(unsafe { ioctl_with_mut_ref(fd, UFFDIO_API(), &mut api) })?;
    Ok(api.features)
}

fn done(returned: i32) -> io::Result<()> {
    if returned == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn filled(returned: i32) -> io::Result<bool> {
    match done(returned) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_REGISTER_MODE_WP: u64 = 2;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

impl From<Range<usize>> for UffdioRange {
    fn from(addresses: Range<usize>) -> Self {
        Self {
            start: addresses.start as u64,
            len: addresses.len() as u64,
        }
    }
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, UffdioApi);
ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, UffdioRegister);
ioctl_ior_nr!(UFFDIO_UNREGISTER, 0xaa, 0x01, UffdioRange);
ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, UffdioCopy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, 0xaa, 0x04, UffdioZeropage);
ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, 0xaa, 0x06, UffdioWriteprotect);
