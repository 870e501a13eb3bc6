//! Snapshots as folders on a disk: written beside their place and put there whole, read with suspicion.
//!
//! # Written whole or not at all
//!
//! A [`Draft`] is a folder beside the target, with a name of its own. Everything is written and synced there; then one
//! rename puts it in its place, in exchange for what was there. Until that instant the target is what it was, whatever
//! happens: a full disk, a death of this process, of the host. What a death leaves behind is a draft that nobody holds
//! locked; the next snapshot to the same target removes it.
//!
//! Only files that are a snapshot's parts are ever removed, here or in a folder that is replaced. A folder that holds
//! anything else is not replaced at all: it may be the disk images that belong to the snapshot.
//!
//! # Read with suspicion
//!
//! Parts are opened relative to their folder, without following links and without waiting for a FIFO's other end, and
//! must be regular files of exactly the size that the manifest says.

use std::fs::{self, DirBuilder, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self as sys, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use umbra_core::limits;
use umbra_core::snapshot::{Checksum, Manifest, Parent, Part};
use umbra_units::SnapshotId;

use super::SnapshotError;

/// The file that says what the other parts are.
pub(super) const MANIFEST: &str = "manifest";
/// Every file a snapshot consists of.
const PARTS: [&str; 4] = [MANIFEST, "state", "memory", "index"];
/// What the names of drafts have in common.
const DRAFT: &str = ".umbra-draft-";

/// A snapshot being written.
#[derive(Debug)]
pub(super) struct Draft {
    /// The folder in which target and draft lie, without symbolic links.
    home: PathBuf,
    /// The target's name in it.
    name: String,
    draft_name: String,
    home_dir: OwnedFd,
    /// Locked while we write: a draft that is not is a leftover.
    dir: OwnedFd,
    replaces: bool,
    placed: bool,
}

/// What a target is before it is written to.
enum Target {
    Nothing,
    EmptyFolder,
    Snapshot,
}

/// The folder that `to` lies in, without symbolic links, and its name there.
pub(super) fn place(to: &Path) -> Result<(PathBuf, String), SnapshotError> {
    let refused = |text: &str| SnapshotError::Refused(format!("to: {}: {text}", to.display()));
    let name = to
        .file_name()
        .and_then(|name| name.to_str())
        .filter(|name| Parent::can_be_named(name));
    let name = name.ok_or_else(|| refused("expected a path that ends with the name of a folder"))?;
    let home = match to.parent() {
        Some(home) if !home.as_os_str().is_empty() => home,
        _ => Path::new("."),
    };
    let home = home
        .canonicalize()
        .map_err(|error| refused(&format!("the folder {}: {error}", home.display())))?;
    Ok((home, name.to_owned()))
}

/// What `path` is; refused if it is something that no snapshot may replace.
fn look_at(path: &Path) -> Result<Target, SnapshotError> {
    let refused = |text: String| SnapshotError::Refused(format!("to: {}: {text}", path.display()));
    let meta = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Target::Nothing),
        other => other.map_err(|error| refused(error.to_string()))?,
    };
    if !meta.is_dir() {
        return Err(refused("it exists and is no folder; nothing was replaced".to_owned()));
    }
    let mut is_empty = true;
    for entry in fs::read_dir(path).map_err(|error| refused(error.to_string()))? {
        let name = entry.map_err(|error| refused(error.to_string()))?.file_name();
        if !PARTS.iter().any(|part| name == *part) {
            return Err(refused(format!(
                "it holds '{}', which is no part of a snapshot; nothing was replaced",
                name.to_string_lossy()
            )));
        }
        is_empty = false;
    }
    Ok(if is_empty {
        Target::EmptyFolder
    } else {
        Target::Snapshot
    })
}

/// Refuse a target that could not be written to; says where it is.
pub(super) fn check_target(to: &Path) -> Result<(PathBuf, String), SnapshotError> {
    let (home, name) = place(to)?;
    look_at(&home.join(&name))?;
    Ok((home, name))
}

impl Draft {
    /// Begin a snapshot that is to be at `to`.
    pub(super) fn begin(to: &Path, id: SnapshotId) -> Result<Self, SnapshotError> {
        let (home, name) = place(to)?;
        let replaces = matches!(look_at(&home.join(&name))?, Target::Snapshot);
        let draft_name = format!(".{name}{DRAFT}{id}");
        let path = home.join(&draft_name);
        let host = |error: &dyn std::fmt::Display| SnapshotError::Host(format!("{}: {error}", to.display()));
        let home_dir = open_folder(&home).map_err(|error| host(&error))?;
        remove_leftovers(&home, &name);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| host(&error))?;
        let dir =
            open_folder(&path).and_then(|dir| sys::flock(&dir, FlockOperation::NonBlockingLockExclusive).map(|()| dir));
        let dir = match dir {
            Ok(dir) => dir,
            Err(error) => {
                let _ = fs::remove_dir(&path);
                return Err(host(&error));
            }
        };
        Ok(Self {
            home,
            name,
            draft_name,
            home_dir,
            dir,
            replaces,
            placed: false,
        })
    }

    /// Where the snapshot will be.
    pub(super) fn target(&self) -> PathBuf {
        self.home.join(&self.name)
    }

    /// Something did not work on this part.
    pub(super) fn failed(&self, part: &str, error: impl std::fmt::Display) -> SnapshotError {
        SnapshotError::Host(format!("{}: {error}", self.target().join(part).display()))
    }

    /// A new part, for its owner alone.
    pub(super) fn create(&self, part: &str) -> Result<File, SnapshotError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        sys::openat(&self.dir, part, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|error| self.failed(part, error))
    }

    /// A whole part at once.
    pub(super) fn write(&self, part: &str, bytes: &[u8]) -> Result<Part, SnapshotError> {
        let mut file = self.create(part)?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|error| self.failed(part, error))?;
        Ok(Part::of(bytes))
    }

    /// Put it in its place. Everything of it was written and synced.
    pub(super) fn place(mut self) -> Result<(), SnapshotError> {
        let flags = if self.replaces {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::empty()
        };
        let renamed = sys::fsync(&self.dir)
            .and_then(|()| sys::renameat_with(&self.home_dir, &self.draft_name, &self.home_dir, &self.name, flags));
        renamed.map_err(|error| {
            SnapshotError::Host(format!(
                "{}: cannot be put in its place: {error}",
                self.target().display()
            ))
        })?;
        self.placed = true;
        sys::fsync(&self.home_dir).map_err(|error| {
            SnapshotError::Host(format!(
                "{}: is in its place, but may not survive a power cut: {error}",
                self.target().display()
            ))
        })
    }
}

impl Drop for Draft {
    /// What lies under the draft's name now is a draft that failed, or what was replaced.
    fn drop(&mut self) {
        if !self.placed || self.replaces {
            remove(&self.home.join(&self.draft_name));
        }
    }
}

fn open_folder(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    sys::open(path, flags, Mode::empty())
}

/// Drafts of this target whose writer is gone.
fn remove_leftovers(home: &Path, name: &str) {
    let prefix = format!(".{name}{DRAFT}");
    let Ok(entries) = fs::read_dir(home) else { return };
    for entry in entries.flatten() {
        let is_draft = entry
            .file_name()
            .to_str()
            .is_some_and(|entry| entry.starts_with(&prefix));
        let path = entry.path();
        if let (true, Ok(dir)) = (is_draft, open_folder(&path))
            && sys::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            tracing::info!(path = %path.display(), "removing a snapshot that was never finished");
            remove(&path);
        }
    }
}

/// Remove a snapshot's parts and their folder, and nothing else.
fn remove(path: &Path) {
    for part in PARTS {
        let _ = fs::remove_file(path.join(part));
    }
    if let Err(error) = fs::remove_dir(path) {
        tracing::warn!(path = %path.display(), %error, "cannot be removed");
    }
}

/// A snapshot being read.
#[derive(Debug)]
pub(super) struct Folder {
    /// Without symbolic links.
    path: PathBuf,
    dir: OwnedFd,
}

impl Folder {
    /// The folder an operator named; that it is a symbolic link itself is the operator's choice.
    pub(super) fn open(path: &Path) -> Result<Self, SnapshotError> {
        let real = path.canonicalize().map_err(|error| unreadable(path, error))?;
        let dir = open_folder(&real).map_err(|error| unreadable(&real, kind_of(error, "a folder")))?;
        Ok(Self { path: real, dir })
    }

    /// The folder of this name beside this one.
    pub(super) fn sibling(&self, name: &str) -> Result<Self, SnapshotError> {
        let path = self.path.with_file_name(name);
        let dir = open_folder(&path).map_err(|error| unreadable(&path, kind_of(error, "the parent's folder")))?;
        Ok(Self { path, dir })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is wrong with a part.
    pub(super) fn wrong(&self, part: &str, what: impl std::fmt::Display) -> SnapshotError {
        unreadable(&self.path.join(part), what)
    }

    /// The manifest, and its checksum.
    pub(super) fn manifest(&self) -> Result<(Manifest, Checksum), SnapshotError> {
        let (file, bytes) = self.open_file(MANIFEST)?;
        let most = limits::SNAPSHOT_MANIFEST_BYTES;
        if bytes > most {
            return Err(self.wrong(MANIFEST, format!("expected at most {most} bytes, got {bytes}")));
        }
        let text = self.read(MANIFEST, file, bytes)?;
        Manifest::decode(&text).map_err(|error| self.wrong(MANIFEST, error))
    }

    /// A whole part, which the manifest bounds, verified.
    pub(super) fn part(&self, name: &str, part: Part) -> Result<Vec<u8>, SnapshotError> {
        let file = self.open_part(name, part)?;
        let bytes = self.read(name, file, part.bytes)?;
        let checksum = Checksum::of(&bytes);
        if checksum != part.checksum {
            return Err(self.wrong(name, format!("expected checksum {}, got {checksum}", part.checksum)));
        }
        Ok(bytes)
    }

    /// A part to be read piece by piece: of the right size so far.
    pub(super) fn open_part(&self, name: &str, part: Part) -> Result<File, SnapshotError> {
        let (file, bytes) = self.open_file(name)?;
        if bytes != part.bytes {
            return Err(self.wrong(name, format!("expected {} bytes, got {bytes}", part.bytes)));
        }
        Ok(file)
    }

    fn open_file(&self, name: &str) -> Result<(File, u64), SnapshotError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = sys::openat(&self.dir, name, flags, Mode::empty());
        let file = file.map_err(|error| self.wrong(name, kind_of(error, "a file")))?;
        let stat = sys::fstat(&file).map_err(|error| self.wrong(name, error))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(self.wrong(name, "expected a file, got something else"));
        }
        Ok((File::from(file), u64::try_from(stat.st_size).unwrap_or_default()))
    }

    /// `bytes` were compared with a bound, and with the size of the file.
    fn read(&self, name: &str, file: File, bytes: u64) -> Result<Vec<u8>, SnapshotError> {
        let mut out = Vec::with_capacity(usize::try_from(bytes).unwrap_or_default());
        file.take(bytes)
            .read_to_end(&mut out)
            .map_err(|error| self.wrong(name, error))?;
        Ok(out)
    }
}

fn unreadable(path: &Path, what: impl std::fmt::Display) -> SnapshotError {
    SnapshotError::Unreadable(format!("{}: {what}", path.display()))
}

/// An error of opening what should be `expected`, in words.
fn kind_of(error: Errno, expected: &str) -> String {
    match error {
        Errno::LOOP => format!("expected {expected}, got a symbolic link"),
        Errno::NOTDIR => format!("expected {expected}, got something else"),
        Errno::NOENT => format!("expected {expected}, found none"),
        error => error.to_string(),
    }
}
