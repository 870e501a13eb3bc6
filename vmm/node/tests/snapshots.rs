//! Snapshots of a guest that is nothing but pages: what they hold, what is refused, what a failure leaves behind.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use proptest::prelude::*;
use umbra_core::batch::PageCounts;
use umbra_core::guest::{Guest, GuestBuilder, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_node::GuestIdentity;
use umbra_node::snapshot::{
    After, Kind, Restored, SharedLog, SnapshotError, SnapshotReport, SnapshotRequest, Snapshotter, Watch, restore,
};
use umbra_units::{GuestId, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SnapshotId, SpaceId, Term};

const PAGES: PageCount = PageCount(2_000);

/// A guest whose pages are written by hand.
struct Notebook {
    paper: Mutex<Paper>,
    running: AtomicBool,
    /// Write a page during the next save.
    scribbles: AtomicBool,
    /// Fail the next save.
    fails: AtomicBool,
    /// Have more state at the next save than a snapshot can hold.
    swells: AtomicBool,
    given_up: AtomicBool,
    /// Write to this page whenever pages are read while it runs: a guest that writes while it is copied.
    busy: AtomicBool,
    writes: AtomicU64,
}

struct Paper {
    bytes: Vec<u8>,
    dirty: PageSet,
    tracks: bool,
}

impl Notebook {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            paper: Mutex::new(Paper {
                bytes: vec![0; usize::try_from(PAGES.bytes()).unwrap()],
                dirty: PageSet::new(PAGES),
                tracks: false,
            }),
            running: AtomicBool::new(true),
            scribbles: AtomicBool::default(),
            fails: AtomicBool::default(),
            swells: AtomicBool::default(),
            given_up: AtomicBool::default(),
            busy: AtomicBool::default(),
            writes: AtomicU64::default(),
        })
    }

    fn write(&self, page: u64, byte: u8) {
        let mut paper = self.paper();
        paper.bytes[at(Pfn(page))..][..PAGE_SIZE].fill(byte);
        if paper.tracks {
            paper.dirty.insert(Pfn(page));
        }
    }

    fn fill_with_noise(&self) {
        let mut rng = umbra_units::Rng::new(7);
        let mut paper = self.paper();
        for word in paper.bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
    }

    fn byte(&self, page: u64) -> u8 {
        self.paper().bytes[at(Pfn(page)) + 99]
    }

    fn contents(&self) -> Vec<u8> {
        self.paper().bytes.clone()
    }

    fn runs(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    fn tracks(&self) -> bool {
        self.paper().tracks
    }

    fn paper(&self) -> MutexGuard<'_, Paper> {
        self.paper.lock().unwrap()
    }
}

fn at(pfn: Pfn) -> usize {
    usize::try_from(pfn.0).unwrap() * PAGE_SIZE
}

impl PageReader for Notebook {
    fn read_pages(&self, _space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        {
            let paper = self.paper();
            pages
                .iter()
                .for_each(|pfn| out.extend_from_slice(&paper.bytes[at(*pfn)..][..PAGE_SIZE]));
        }
        if self.busy.load(Ordering::SeqCst) && self.runs() {
            let n = self.writes.fetch_add(1, Ordering::SeqCst);
            self.write(n * 37 % PAGES.0, u8::try_from(n % 251).unwrap());
        }
        Ok(())
    }
}

impl Guest for Notebook {
    fn describe(&self) -> StateRecord {
        record("notebook", 7)
    }

    fn spaces(&self) -> Vec<Space> {
        vec![Space::ram(PAGES)]
    }

    fn track(&self, on: bool) -> Result<(), GuestError> {
        let mut paper = self.paper();
        paper.tracks = on;
        paper.dirty.clear();
        Ok(())
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        let mut paper = self.paper();
        assert!(paper.tracks, "harvested without tracking");
        let dirty = std::mem::replace(&mut paper.dirty, PageSet::new(PAGES));
        Ok(Harvest {
            dirty: vec![(SpaceId::RAM, dirty)],
        })
    }

    fn put_back(&self, harvest: &Harvest) {
        let mut paper = self.paper();
        harvest.dirty.iter().for_each(|(_, set)| paper.dirty.union_with(set));
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        out.copy_from_slice(&self.paper().bytes[at(page.pfn)..][..PAGE_SIZE]);
        Ok(())
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        self.paper().bytes[at(page.pfn)..][..PAGE_SIZE].copy_from_slice(bytes);
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        assert!(!self.runs(), "saved while running");
        if self.fails.swap(false, Ordering::SeqCst) {
            return Err(GuestError::Host("the notebook is stuck".to_owned()));
        }
        if self.scribbles.swap(false, Ordering::SeqCst) {
            self.write(1_234, 0x5a);
        }
        if self.swells.swap(false, Ordering::SeqCst) {
            let bytes = vec![0; 4 << 20];
            return Ok(vec![
                StateRecord {
                    bytes,
                    ..record("ink", 9)
                };
                5
            ]);
        }
        Ok(vec![record("ink", 9), record("binding", 4)])
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        assert_eq!(records, [record("ink", 9), record("binding", 4)]);
        Ok(())
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}

fn record(kind: &str, byte: u8) -> StateRecord {
    StateRecord {
        kind: kind.to_owned(),
        version: 3,
        bytes: vec![byte; 20],
    }
}

/// Builds notebooks, and keeps the last one where a test can look into it.
#[derive(Default)]
struct Bindery(Mutex<Option<Arc<Notebook>>>);

impl GuestBuilder for Bindery {
    fn build(&self, description: &StateRecord) -> Result<Arc<dyn Guest>, GuestError> {
        assert_eq!(*description, record("notebook", 7));
        let notebook = Notebook::new();
        notebook.running.store(false, Ordering::SeqCst);
        *self.0.lock().unwrap() = Some(Arc::clone(&notebook));
        Ok(notebook)
    }
}

/// A notebook, its snapshotter, and a folder for its snapshots.
struct Desk {
    notebook: Arc<Notebook>,
    log: SharedLog,
    snapshotter: Snapshotter,
    dir: tempfile::TempDir,
    taken: u8,
}

impl Desk {
    fn new() -> Self {
        let notebook = Notebook::new();
        let log = SharedLog::new(Arc::clone(&notebook) as _);
        Self {
            notebook,
            snapshotter: Snapshotter::new(&log),
            log,
            dir: tempfile::tempdir().unwrap(),
            taken: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn request(&mut self, to: PathBuf, kind: Kind) -> SnapshotRequest {
        self.taken += 1;
        SnapshotRequest {
            to,
            kind,
            id: SnapshotId([self.taken; 16]),
            identity: GuestIdentity {
                guest: GuestId([9; 16]),
                term: Term(4),
            },
            name: "diary".to_owned(),
            runs: self.notebook.runs(),
            after: After::RunOn,
            record: true,
            audit: true,
        }
    }

    fn take(&mut self, name: &str, kind: Kind) -> Result<SnapshotReport, SnapshotError> {
        let request = self.request(self.path(name), kind);
        self.snapshotter.take(&request, &Watch::default())
    }

    fn full(&mut self, name: &str) -> SnapshotReport {
        self.take(name, Kind::Full).unwrap()
    }

    fn diff(&mut self, name: &str) -> SnapshotReport {
        self.take(name, Kind::Differential).unwrap()
    }

    /// What is in the folder of snapshots.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The snapshot `name` is the notebook as it is now.
    fn is_now(&self, name: &str) {
        let (there, _) = read(&self.path(name)).unwrap();
        assert!(there.contents() == self.notebook.contents(), "{name} is another");
    }
}

fn read(path: &Path) -> Result<(Arc<Notebook>, Restored), SnapshotError> {
    let bindery = Bindery::default();
    let restored = restore(path, &bindery)?;
    let notebook = bindery.0.lock().unwrap().take().unwrap();
    Ok((notebook, restored))
}

/// Why it cannot be read: one line.
fn refused(path: &Path) -> String {
    let text = match read(path) {
        Ok(_) => panic!("{} was restored", path.display()),
        Err(error) => error.to_string(),
    };
    assert!(!text.contains('\n'), "{text}");
    text
}

/// Pages with a content of their own, or that of another page.
fn whole(counts: PageCounts) -> u64 {
    counts.raw + counts.dup
}

#[test]
fn a_chain_of_snapshots_is_the_guest_at_each_cut() {
    let mut desk = Desk::new();
    (0..500).for_each(|page| desk.notebook.write(page, 1));
    let full = desk.full("monday");
    assert_eq!((full.counts.total(), full.cut.0, whole(full.counts)), (2_000, 1, 500));
    let monday = desk.notebook.contents();
    (100..150).for_each(|page| desk.notebook.write(page, 2));
    desk.notebook.write(160, 1); // written, and the same
    let first = desk.diff("tuesday");
    assert_eq!((whole(first.counts), first.counts.same, first.cut.0), (50, 1, 2));
    let tuesday = desk.notebook.contents();
    (120..130).for_each(|page| desk.notebook.write(page, 0));
    desk.notebook.write(1_999, 9);
    let second = desk.diff("wednesday");
    assert_eq!((whole(second.counts), second.counts.zero, second.cut.0), (1, 10, 3));
    assert_eq!(desk.diff("thursday").counts.total(), 0, "nothing was written");

    for (name, contents, links) in [
        ("monday", monday, 1),
        ("tuesday", tuesday, 2),
        ("wednesday", desk.notebook.contents(), 3),
        ("thursday", desk.notebook.contents(), 4),
    ] {
        let (notebook, restored) = read(&desk.path(name)).unwrap();
        assert!(notebook.contents() == contents, "{name}");
        assert!(!notebook.runs(), "nobody resumed it");
        assert_eq!(restored.report.links, links);
        assert_eq!(
            (
                restored.manifest.guest,
                restored.manifest.term,
                restored.manifest.name.as_str()
            ),
            (GuestId([9; 16]), Term(4), "diary")
        );
    }
    assert!(desk.notebook.runs());
}

#[test]
fn a_guest_that_writes_while_it_is_copied_is_kept_as_it_was_in_the_pause() {
    let mut desk = Desk::new();
    desk.notebook.fill_with_noise();
    desk.notebook.busy.store(true, Ordering::SeqCst);
    let report = desk.full("full");
    assert!(report.rounds >= 1 && report.counts.total() > 2_000, "{report:?}");
    desk.notebook.busy.store(false, Ordering::SeqCst);
    desk.is_now("full");
    desk.notebook.busy.store(true, Ordering::SeqCst);
    desk.diff("diff");
    desk.notebook.busy.store(false, Ordering::SeqCst);
    desk.is_now("diff");
}

#[test]
fn what_saving_writes_is_in_the_snapshot() {
    let mut desk = Desk::new();
    desk.notebook.scribbles.store(true, Ordering::SeqCst);
    desk.full("full");
    desk.is_now("full");
    assert_eq!(desk.notebook.byte(1_234), 0x5a);
    desk.notebook.write(1_234, 0);
    desk.notebook.scribbles.store(true, Ordering::SeqCst);
    desk.diff("diff");
    desk.is_now("diff");
}

#[test]
fn a_failure_loses_no_write_to_the_next_differential_snapshot() {
    let mut desk = Desk::new();
    desk.notebook.fill_with_noise();
    desk.full("full");
    for (n, kind) in [(1, Kind::Differential), (2, Kind::Full), (3, Kind::Differential)] {
        desk.notebook.write(n, 0xee);
        desk.notebook.fails.store(true, Ordering::SeqCst);
        let error = desk.take("failed", kind).unwrap_err();
        assert_eq!(error, SnapshotError::Host("the notebook is stuck".to_owned()));
        assert!(desk.notebook.runs(), "it runs on");
        assert_eq!(desk.names(), ["full"], "nothing is left behind");
    }
    // Written before a cancelled attempt.
    desk.notebook.write(4, 0xee);
    let watch = Watch::default();
    watch.cancel();
    let request = desk.request(desk.path("cancelled"), Kind::Differential);
    assert_eq!(desk.snapshotter.take(&request, &watch), Err(SnapshotError::Cancelled));
    let report = desk.diff("diff");
    assert_eq!(whole(report.counts), 4);
    desk.is_now("diff");
}

#[test]
fn a_first_snapshot_that_fails_leaves_nothing_recorded() {
    let mut desk = Desk::new();
    desk.notebook.fails.store(true, Ordering::SeqCst);
    desk.take("a", Kind::Full).unwrap_err();
    assert!(!desk.notebook.tracks());
    let request = SnapshotRequest {
        record: false,
        ..desk.request(desk.path("a"), Kind::Full)
    };
    desk.snapshotter.take(&request, &Watch::default()).unwrap();
    assert!(!desk.notebook.tracks());
    let error = desk.take("b", Kind::Differential).unwrap_err().to_string();
    assert!(error.contains("take a full one first"), "{error}");
    desk.full("c");
    assert!(desk.notebook.tracks());
}

#[test]
fn a_session_and_snapshots_each_hear_of_every_write() {
    let mut desk = Desk::new();
    let session = desk.log.listener();
    session.track(true).unwrap();
    session.harvest().unwrap();
    desk.full("full");
    desk.notebook.write(1, 1);
    let count = |harvest: Harvest| harvest.count().0;
    assert_eq!(count(session.harvest().unwrap()), 1);
    desk.notebook.write(2, 1);
    assert_eq!(whole(desk.diff("diff").counts), 2, "also what the session harvested");
    let heard = session.harvest().unwrap();
    assert!(heard.dirty[0].1.contains(Pfn(2)), "also what the snapshot harvested");
    session.put_back(&heard);
    assert_eq!(session.harvest().unwrap(), heard);
    assert_eq!(desk.diff("none").counts.total(), 0, "what one puts back is its own");
    desk.is_now("diff");
    session.give_up();
    assert!(
        desk.notebook.given_up.load(Ordering::SeqCst),
        "to the session it is the guest itself"
    );
    drop(session);
    assert!(desk.notebook.tracks(), "the snapshots still follow");
    let stranger = desk.log.listener();
    assert!(stranger.harvest().unwrap_err().to_string().contains("track them first"));
}

#[test]
fn a_paused_guest_stays_paused_and_a_running_one_does_if_asked() {
    let mut desk = Desk::new();
    desk.notebook.pause().unwrap();
    desk.full("paused");
    assert!(!desk.notebook.runs());
    desk.notebook.fails.store(true, Ordering::SeqCst);
    desk.take("failed", Kind::Full).unwrap_err();
    assert!(!desk.notebook.runs(), "it was paused before");
    desk.notebook.resume().unwrap();
    let request = SnapshotRequest {
        after: After::StayPaused,
        ..desk.request(desk.path("held"), Kind::Full)
    };
    desk.snapshotter.take(&request, &Watch::default()).unwrap();
    assert!(!desk.notebook.runs());
    desk.notebook.resume().unwrap();
    desk.notebook.fails.store(true, Ordering::SeqCst);
    let error = desk.snapshotter.take(&request, &Watch::default());
    assert!(
        error.is_err() && desk.notebook.runs(),
        "a failure does not pause a guest"
    );
}

#[test]
fn a_failure_after_the_cut_does_not_leave_the_guest_paused() {
    let mut desk = Desk::new();
    desk.full("full");
    desk.notebook.write(3, 3);
    for after in [After::StayPaused, After::RunOn] {
        desk.notebook.swells.store(true, Ordering::SeqCst);
        let request = SnapshotRequest {
            after,
            ..desk.request(desk.path("diff"), Kind::Differential)
        };
        let error = desk
            .snapshotter
            .take(&request, &Watch::default())
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("state: expected at most"), "{error}");
        assert!(desk.notebook.runs(), "{after:?}");
        assert_eq!(desk.names(), ["full"]);
    }
    assert_eq!(whole(desk.diff("diff").counts), 1);
    desk.is_now("diff");
}

#[test]
fn a_snapshot_replaces_another_and_nothing_else() {
    let mut desk = Desk::new();
    desk.full("a");
    desk.notebook.write(5, 5);
    desk.full("a");
    desk.is_now("a");
    fs::create_dir(desk.path("empty")).unwrap();
    desk.full("empty");
    desk.is_now("empty");
    assert_eq!(desk.names(), ["a", "empty"], "what was replaced is gone");

    fs::write(desk.path("a/disk.img"), "precious").unwrap();
    fs::write(desk.path("file"), "precious").unwrap();
    symlink(desk.path("empty"), desk.path("link")).unwrap();
    for (name, expected) in [
        ("a", "holds 'disk.img', which is no part of a snapshot"),
        ("file", "is no folder"),
        ("link", "is no folder"),
        ("missing/x", "the folder "),
        ("..", "ends with the name of a folder"),
    ] {
        let before = desk.names();
        let error = desk.take(name, Kind::Full).unwrap_err();
        assert!(
            matches!(&error, SnapshotError::Refused(text) if text.contains(expected)),
            "{name}: {error}"
        );
        assert_eq!(desk.names(), before);
    }
    assert_eq!(fs::read_to_string(desk.path("a/disk.img")).unwrap(), "precious");
}

#[test]
fn a_differential_snapshot_lies_beside_its_parent_and_replaces_none_of_its_chain() {
    let mut desk = Desk::new();
    let error = desk.take("diff", Kind::Differential).unwrap_err().to_string();
    assert!(error.contains("take a full one first"), "{error}");
    desk.full("a");
    desk.diff("b");
    fs::create_dir(desk.path("elsewhere")).unwrap();
    for (name, expected) in [
        ("a", "goes on from"),
        ("b", "goes on from"),
        ("elsewhere/c", "expected a folder beside"),
    ] {
        let error = desk.take(name, Kind::Differential).unwrap_err();
        assert!(
            matches!(&error, SnapshotError::Refused(text) if text.contains(expected)),
            "{name}: {error}"
        );
    }
    fs::rename(desk.path("b"), desk.path("moved")).unwrap();
    let error = desk.take("c", Kind::Differential).unwrap_err().to_string();
    assert!(
        error.contains("/b: No such file") && error.ends_with("take a full snapshot"),
        "{error}"
    );
    fs::rename(desk.path("moved"), desk.path("b")).unwrap();
    desk.diff("c");
    desk.is_now("c");
}

#[test]
fn snapshots_are_their_owners_alone() {
    let mut desk = Desk::new();
    desk.full("a");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&desk.path("a")), 0o700);
    for part in ["manifest", "state", "memory", "index"] {
        assert_eq!(mode(&desk.path("a").join(part)), 0o600, "{part}");
    }
}

#[test]
fn what_a_dead_writer_left_is_removed_and_what_a_live_one_writes_is_not() {
    let mut desk = Desk::new();
    let leftover = desk.path(".a.umbra-draft-00");
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("memory"), "half").unwrap();
    let of_another = desk.path(".b.umbra-draft-00");
    fs::create_dir(&of_another).unwrap();
    let held = desk.path(".a.umbra-draft-01");
    fs::create_dir(&held).unwrap();
    let lock = rustix::fs::open(&held, rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    desk.full("a");
    assert_eq!(desk.names(), [".a.umbra-draft-01", ".b.umbra-draft-00", "a"]);
}

/// A file system with so little room, gone when this is dropped; `None`, loudly, where nobody may mount.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(mount: PathBuf, kib: u32) -> Option<Self> {
        fs::create_dir(&mount).unwrap();
        let size = format!("size={kib}k");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(&mount)
            .output();
        if done.as_ref().is_ok_and(|done| done.status.success()) {
            return Some(Self(mount));
        }
        eprintln!("SKIPPED: a full disk needs the right to mount one: {done:?}");
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_leaves_the_previous_snapshot_and_the_retry_is_whole() {
    let mut desk = Desk::new();
    (0..400).for_each(|page| desk.notebook.write(page, 3));
    let Some(disk) = SmallDisk::new(desk.path("disk"), 6 << 10) else {
        return;
    };
    desk.full("disk/a");
    let before = desk.notebook.contents();
    // More than fits, also in lz4: first as a differential snapshot, then as a full one over the first.
    desk.notebook.fill_with_noise();
    (0..2_000).for_each(|page| {
        let mut paper = desk.notebook.paper();
        paper.dirty.insert(Pfn(page));
    });
    for (name, kind) in [("disk/b", Kind::Differential), ("disk/a", Kind::Full)] {
        let error = desk.take(name, kind).unwrap_err().to_string();
        assert!(error.contains("memory: No space left on device"), "{error}");
        assert!(desk.notebook.runs());
        assert_eq!(fs::read_dir(&disk.0).unwrap().count(), 1, "nothing is left behind");
        let (there, _) = read(&desk.path("disk/a")).unwrap();
        assert!(there.contents() == before, "the previous snapshot is intact");
    }
    // Room again: the differential one has all that was written, also what the failed ones harvested.
    let remount = ["-o", "remount,size=20m"];
    assert!(
        Command::new("mount")
            .args(remount)
            .arg(&disk.0)
            .status()
            .unwrap()
            .success()
    );
    desk.diff("disk/b");
    desk.is_now("disk/b");
}

/// A chain of two, small enough to be broken in every place.
fn small_chain() -> Desk {
    let mut desk = Desk::new();
    (0..300).for_each(|page| desk.notebook.write(page * 5, u8::try_from(page % 250).unwrap()));
    desk.full("a");
    (10..20).for_each(|page| desk.notebook.write(page, 77));
    desk.diff("b");
    desk
}

#[test]
fn every_part_cut_short_or_made_longer_is_refused_by_name() {
    let desk = small_chain();
    for folder in ["a", "b"] {
        for part in ["manifest", "state", "memory", "index"] {
            let path = desk.path(folder).join(part);
            let whole = fs::read(&path).unwrap();
            for bytes in [
                &whole[..0],
                &whole[..whole.len() / 2],
                &whole[..whole.len() - 1],
                &[&whole[..], b"x"].concat(),
            ] {
                fs::write(&path, bytes).unwrap();
                let text = refused(&desk.path("b"));
                assert!(text.starts_with(&path.display().to_string()), "{text}");
            }
            fs::remove_file(&path).unwrap();
            let text = refused(&desk.path("b"));
            assert_eq!(text, format!("{}: expected a file, found none", path.display()));
            fs::write(&path, whole).unwrap();
        }
    }
    desk.is_now("b");
    fs::rename(desk.path("a"), desk.path("elsewhere")).unwrap();
    assert_eq!(
        refused(&desk.path("b")),
        format!(
            "{}: expected the parent's folder, found none",
            desk.path("a")
                .canonicalize()
                .unwrap_or_else(|_| desk.dir.path().canonicalize().unwrap().join("a"))
                .display()
        )
    );
}

#[test]
fn links_and_fifos_in_the_place_of_parts_are_refused_and_nobody_waits() {
    let desk = small_chain();
    let home = desk.dir.path().canonicalize().unwrap();
    for part in ["manifest", "state", "memory", "index"] {
        let path = home.join("a").join(part);
        let aside = home.join("aside");
        fs::rename(&path, &aside).unwrap();
        symlink(&aside, &path).unwrap();
        assert_eq!(
            refused(&home.join("b")),
            format!("{}: expected a file, got a symbolic link", path.display())
        );
        fs::remove_file(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert_eq!(
            refused(&home.join("b")),
            format!("{}: expected a file, got something else", path.display())
        );
        fs::remove_file(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
    }
    // The folder an operator names may be a link; the parent's may not.
    symlink(home.join("b"), home.join("latest")).unwrap();
    assert!(read(&home.join("latest")).is_ok());
    fs::rename(home.join("a"), home.join("real")).unwrap();
    symlink(home.join("real"), home.join("a")).unwrap();
    assert!(refused(&home.join("b")).ends_with("/a: expected the parent's folder, got something else"));
}

#[test]
fn a_parent_that_is_another_snapshot_is_refused() {
    let mut desk = small_chain();
    let child = fs::read(desk.path("b/manifest")).unwrap();
    // The same guest, taken again in the parent's place: right in itself, and not what the child goes on from.
    desk.full("a");
    let text = refused(&desk.path("b"));
    assert!(
        text.contains("/a/manifest: id: expected 01010101") && text.contains("/b/manifest"),
        "{text}"
    );
    // A snapshot that names itself as its parent.
    fs::remove_dir_all(desk.path("a")).unwrap();
    fs::rename(desk.path("b"), desk.path("a")).unwrap();
    assert_eq!(fs::read(desk.path("a/manifest")).unwrap(), child);
    let text = refused(&desk.path("a"));
    assert!(text.contains("/a/manifest: id: expected 01010101"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Twelve chains with some forty flips each, in every part of both links.
    #[test]
    fn a_flipped_bit_anywhere_is_a_refusal_never_a_wrong_guest(places in prop::collection::vec((0u32.., 0u8..8), 5)) {
        let desk = small_chain();
        let expected = desk.notebook.contents();
        for folder in ["a", "b"] {
            for part in ["manifest", "state", "memory", "index"] {
                // A full snapshot's state is not needed for what was made from it.
                if (folder, part) == ("a", "state") { continue; }
                let path = desk.path(folder).join(part);
                let whole = fs::read(&path).unwrap();
                for (place, bit) in &places {
                    let mut bytes = whole.clone();
                    let at = *place as usize % bytes.len();
                    bytes[at] ^= 1 << bit;
                    fs::write(&path, &bytes).unwrap();
                    let text = refused(&desk.path("b"));
                    prop_assert!(text.contains(&format!("/{folder}/{part}")), "{}", text);
                }
                fs::write(&path, whole).unwrap();
            }
        }
        let (there, _) = read(&desk.path("b")).unwrap();
        prop_assert!(there.contents() == expected);
    }
}

#[test]
fn a_snapshot_takes_no_room_for_pages_of_zeros() {
    let mut desk = Desk::new();
    desk.full("a");
    let bytes: u64 = ["manifest", "state", "memory", "index"]
        .iter()
        .map(|part| fs::metadata(desk.path("a").join(part)).unwrap().size())
        .sum();
    assert!(bytes < 2_000, "{bytes} bytes for nothing");
}
