//! A disk's file: opened, understood, locked.
//!
//! # Who may have it open
//!
//! Two guests that write one image destroy it, and a move is the moment at which two hosts have it open. So an image is
//! *locked* while a guest runs on it: exclusively if the guest may write, shared if it may only read (`fcntl(2)`, open
//! file description locks: they end with the descriptor, so a process that dies leaves none, and they work over network
//! file systems that lock at all). The lock is not taken by opening: a shadow opens its images long before the guest comes,
//! while the source still runs on them. The source lets go when it gives the guest up, the shadow takes the lock before it
//! lets the guest run, and if it cannot, the guest does not run there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use vmm_sys_util::signal::register_signal_handler;

use crate::config::devices::DiskConfig;
use crate::error::Error;
use crate::ioctls;

/// Bytes of a sector: what virtio counts disks in (virtio 1.2, 5.2.4).
pub(crate) const SECTOR: u64 = 512;

/// An image, open. See the [module](self).
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: File,
    bytes: u64,
    readonly: bool,
    /// What addresses, lengths and offsets must be multiples of, if the host's page cache is gone around.
    direct: Option<u32>,
    locked: Mutex<bool>,
}

impl Image {
    /// Open the image of the disk `kind`.
    pub(crate) fn open(kind: &str, config: &DiskConfig, readonly: bool) -> Result<Self, Error> {
        let refuse = |why: String| Error::File {
            path: config.path.clone(),
            why,
        };
        let cannot = |error: io::Error| {
            let hint = if config.direct && error.raw_os_error() == Some(libc::EINVAL) {
                " (this file system may have no direct I/O: direct=off)"
            } else if !readonly && matches!(error.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::EPERM)) {
                " (readonly=on if the guest need not write)"
            } else {
                ""
            };
            refuse(format!("cannot open the image of {kind}: {error}{hint}"))
        };
        outlive_file_limit().map_err(cannot)?;
        // Without O_NONBLOCK, opening a FIFO by mistake would wait for its other end.
        let flags = libc::O_NONBLOCK | if config.direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(flags)
            .open(&config.path)
            .map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        let kind_of_file = metadata.file_type();
        let bytes = if kind_of_file.is_file() {
            metadata.len()
        } else if kind_of_file.is_block_device() {
            ioctls::block_device_bytes(&file).map_err(cannot)?
        } else {
            let what = if kind_of_file.is_dir() {
                "a directory"
            } else {
                "something else"
            };
            return Err(refuse(format!(
                "cannot be the image of {kind}: expected a file or a block device, found {what}"
            )));
        };
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(refuse(format!(
                "cannot be the image of {kind}: expected whole sectors of {SECTOR} bytes, at least one, found {bytes} bytes"
            )));
        }
        let direct = config.direct.then(|| {
            if kind_of_file.is_block_device() {
                ioctls::block_device_sector(&file).unwrap_or(4096)
            } else {
                // What a file system asks for is at most its block; asking it exactly takes Linux 6.1 (STATX_DIOALIGN).
                u32::try_from(metadata.blksize().clamp(SECTOR, 4096)).unwrap_or(4096)
            }
        });
        Ok(Self {
            path: config.path.clone(),
            file,
            bytes,
            readonly,
            direct,
            locked: Mutex::new(false),
        })
    }

    /// The file, to read and write by position.
    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it can only be read.
    pub(crate) const fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Its size when it was opened.
    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it must be accessed in multiples of: 1 if the host's page cache takes care of it.
    pub(crate) fn alignment(&self) -> u32 {
        self.direct.unwrap_or(1)
    }

    /// Take the lock, or say who cannot share the image. Taking it twice is taking it once.
    pub(crate) fn lock(&self) -> Result<(), Error> {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if *locked {
            return Ok(());
        }
        let kind = if self.readonly { libc::F_RDLCK } else { libc::F_WRLCK };
        ioctls::set_lock(self.file.as_raw_fd(), kind).map_err(|error| {
            let why = match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) if self.readonly => {
                    "the image is locked: somebody else may write to it".to_owned()
                }
                Some(libc::EAGAIN | libc::EACCES) => {
                    "the image is locked: another guest or program is using it".to_owned()
                }
                _ => format!("cannot lock the image: {error}"),
            };
            Error::File {
                path: self.path.clone(),
                why,
            }
        })?;
        *locked = true;
        Ok(())
    }

    /// Let go of the lock.
    pub(crate) fn unlock(&self) {
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut *locked)
            && let Err(error) = ioctls::set_lock(self.file.as_raw_fd(), libc::F_UNLCK)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot unlock an image");
        }
    }
}

/// Where a file may grow no further (`RLIMIT_FSIZE`), Linux ends the process that writes on, unless it handles SIGXFSZ
/// (setrlimit(2)): then the write fails, and the guest hears of an I/O error, as from any disk.
fn outlive_file_limit() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static HANDLED: OnceLock<Result<(), i32>> = OnceLock::new();
    HANDLED
        .get_or_init(|| register_signal_handler(libc::SIGXFSZ, nothing).map_err(|error| error.errno()))
        .map_err(io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn at(path: &Path) -> DiskConfig {
        DiskConfig {
            path: path.to_owned(),
            ..DiskConfig::default()
        }
    }

    fn file(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_no_disk_is_refused_in_one_line_that_names_the_path() {
        let line = |path: &Path, readonly| Image::open("disk/0", &at(path), readonly).unwrap_err().to_string();
        let missing = Path::new("/nowhere/x.img");
        assert_eq!(
            line(missing, false),
            "/nowhere/x.img: cannot open the image of disk/0: No such file or directory (os error 2)"
        );
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert_eq!(
            line(path, true),
            format!(
                "{}: cannot be the image of disk/0: expected a file or a block device, found a directory",
                path.display()
            )
        );
        assert!(line(path, false).contains("Is a directory"), "{}", line(path, false));
        assert!(line(Path::new("/dev/null"), true).contains("found something else"));
        for bytes in [0, 511, 513] {
            let small = file(bytes);
            let expected = format!(
                "{}: cannot be the image of disk/0: expected whole sectors of 512 bytes, at least one, found {bytes} bytes",
                small.path().display()
            );
            assert_eq!(line(small.path(), false), expected);
        }
    }

    #[test]
    fn a_fifo_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        assert!(Image::open("disk/0", &at(&path), true).is_err());
    }

    #[test]
    fn one_guest_writes_or_many_read() {
        let file = file(4096);
        let open = |readonly| Image::open("disk/0", &at(file.path()), readonly).unwrap();
        let (writer, other, reader, friend) = (open(false), open(false), open(true), open(true));
        writer.lock().unwrap();
        writer.lock().unwrap();
        let path = file.path().display();
        assert_eq!(
            other.lock().unwrap_err().to_string(),
            format!("{path}: the image is locked: another guest or program is using it")
        );
        assert_eq!(
            reader.lock().unwrap_err().to_string(),
            format!("{path}: the image is locked: somebody else may write to it")
        );
        writer.unlock();
        reader.lock().unwrap();
        friend.lock().unwrap();
        assert!(writer.lock().is_err());
        drop(reader);
        friend.unlock();
        other.lock().unwrap();
    }

    #[test]
    fn a_write_past_the_processs_file_limit_fails_and_ends_nobody() {
        // Of the whole test process, and so far beyond what any other test writes.
        const LIMIT: u64 = 1 << 40;
        let file = file(2 * LIMIT);
        let image = Image::open("disk/0", &at(file.path()), false).unwrap();
        let limit = libc::rlimit {
            rlim_cur: LIMIT,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: setrlimit(2) reads one `rlimit`, which lives across the call.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
        let error = image.file().write_all_at(&[1; 512], LIMIT).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    }
}
