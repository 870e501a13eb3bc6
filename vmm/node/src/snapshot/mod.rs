//! Guests kept in files: taking snapshots of a guest that runs, and building guests from them.
//!
//! The bytes are decided in [`umbra_core::snapshot`]; here are the files and the work. [`Snapshotter`] belongs to one guest
//! that lives here and takes its snapshots one after the other; [`restore()`] makes a guest from one.
//!
//! ```text
//!   take:   track ▶ copy all (or what was written since the parent) ▶ harvest ▶ copy … ▶ pause ▶ harvest ▶ save ▶ harvest
//!                       │            while the guest runs                       │      ▶ copy ▶ resume ▶ rename
//!                       └──▶ belt ──▶ umbra-snapshot: memory, index  ◀──────────┘
//! ```
//!
//! # What happens when it fails
//!
//! The guest runs on as it did (or stays paused, if it was). Nothing is where the snapshot should be but what was there
//! before. And no write is lost to the next differential snapshot: every page harvested in the attempt is put back, and
//! the tables of what the parent holds are replaced only when the new snapshot stands. So the next attempt, differential or full, is
//! as good as if this one had never been.
//!
//! # Beside a session
//!
//! A session that keeps a shadow harvests too. Both go through one [`SharedLog`], which gives each everything the other
//! consumed. Whoever drives a guest for both must give the session a [`Listener`] of the same log as its guest.
//!
//! # Disks
//!
//! [`Guest::pause`] returns when every request to a disk that was under way is complete, so the instant of the cut is one
//! for disks too. Their images are not copied: [`After::StayPaused`] leaves the guest at the cut until whoever copies them
//! resumes it.

mod belt;
mod folder;
mod restore;
mod sharing;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use umbra_core::batch::{self, PageCounts};
use umbra_core::choose::Chooser;
use umbra_core::guest::{Guest, GuestError, Harvest, Space, StateRecord};
use umbra_core::limits;
use umbra_core::pack::{Compression, Packer};
use umbra_core::snapshot::{Checksum, Index, Manifest, Parent, Part, Rounds, Summing, Unreadable, Walk, encode_state};
use umbra_core::source::Encoder;
use umbra_units::{BatchId, Bytes, Epoch, Now, PageCount, SnapshotId};

use self::belt::Belt;
use self::folder::{Draft, Folder, MANIFEST};
use crate::clock::Clock;
use crate::source::GuestIdentity;

pub use restore::{RestoreReport, Restored, restore};
pub use sharing::{Listener, SharedLog};

/// Why there is no snapshot, or no guest from one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Asked for something that cannot be had. Nothing changed.
    #[error("{0}")]
    Refused(String),
    /// This host failed: the disk, the guest.
    #[error("{0}")]
    Host(String),
    /// A snapshot is not what its writer wrote, or not for this host. Names the file and what was expected.
    #[error("{0}")]
    Unreadable(String),
    /// An operator took it back.
    #[error("cancelled by an operator")]
    Cancelled,
}

impl From<GuestError> for SnapshotError {
    fn from(error: GuestError) -> Self {
        Self::Host(error.to_string())
    }
}

impl From<umbra_core::error::Fault> for SnapshotError {
    fn from(fault: umbra_core::error::Fault) -> Self {
        Self::Host(fault.to_string())
    }
}

impl From<Unreadable> for SnapshotError {
    fn from(error: Unreadable) -> Self {
        Self::Host(error.to_string())
    }
}

/// How much a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// All of memory.
    #[default]
    Full,
    /// What was written since the snapshot before, which lies beside it.
    Differential,
}

/// What becomes of the guest once the cut is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum After {
    /// It runs on at once.
    #[default]
    RunOn,
    /// It stays paused where it was cut.
    StayPaused,
}

/// What snapshot to take.
#[derive(Debug, Clone)]
pub struct SnapshotRequest {
    /// The folder it is to be: one that does not exist, an empty one, or a snapshot that it replaces.
    pub to: PathBuf,
    /// How much it holds.
    pub kind: Kind,
    /// Its id, drawn by whoever asks.
    pub id: SnapshotId,
    /// Whose it is.
    pub identity: GuestIdentity,
    /// What people call the guest.
    pub name: String,
    /// Whether the guest runs now. One that does not is not resumed.
    pub runs: bool,
    /// What becomes of a guest that runs.
    pub after: After,
    /// Go on recording writes afterwards, so that a differential snapshot may follow. Costs the guest one page fault for
    /// the first write to each page.
    pub record: bool,
    /// Compare every page with what was written, in the pause.
    pub audit: bool,
}

/// Where the pause of a snapshot went. The parts add up to [`pause`](Self::pause).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CutBreakdown {
    /// Asking the vCPUs to stop until the last had.
    pub stop: Duration,
    /// Both final harvests.
    pub harvest: Duration,
    /// vCPU and device state.
    pub save: Duration,
    /// Copying and encoding the last pages.
    pub encode: Duration,
    /// Comparing memory with what was written, if that was asked for.
    pub audit: Duration,
    /// Letting the guest run.
    pub resume: Duration,
}

impl CutBreakdown {
    /// The whole pause. Of a guest that was or stays paused: the time its cut took.
    pub fn pause(&self) -> Duration {
        self.parts().iter().map(|(_, part)| *part).sum()
    }

    /// The parts in the order they happen, with their names.
    pub const fn parts(&self) -> [(&'static str, Duration); 6] {
        [
            ("stop", self.stop),
            ("harvest", self.harvest),
            ("save", self.save),
            ("encode", self.encode),
            ("audit", self.audit),
            ("resume", self.resume),
        ]
    }
}

/// What a finished snapshot is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotReport {
    /// Its id.
    pub id: SnapshotId,
    /// How much it holds.
    pub kind: Kind,
    /// Where it is.
    pub folder: PathBuf,
    /// How many cuts its chain has, this one included.
    pub cut: Epoch,
    /// How pages were kept.
    pub counts: PageCounts,
    /// Bytes of all its parts.
    pub bytes: Bytes,
    /// Rounds of copying before the pause.
    pub rounds: u32,
    /// Pages left for the pause.
    pub stop_pages: PageCount,
    /// Where the pause went.
    pub breakdown: CutBreakdown,
    /// From the request until it stood on disk.
    pub total: Duration,
    /// Whether every page was compared.
    pub audited: bool,
}

/// How a snapshot under way is watched and taken back, from other threads.
#[derive(Debug, Default)]
pub struct Watch {
    cancelled: AtomicBool,
    copied: AtomicU64,
    left: AtomicU64,
}

impl Watch {
    /// Take the snapshot back, if it does not stand yet.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Pages copied so far, and pages of the present round still to copy.
    pub fn progress(&self) -> (PageCount, PageCount) {
        let read = |number: &AtomicU64| PageCount(number.load(Ordering::Relaxed));
        (read(&self.copied), read(&self.left))
    }

    fn go_on(&self) -> Result<(), SnapshotError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(SnapshotError::Cancelled);
        }
        Ok(())
    }
}

/// Takes the snapshots of one guest that lives here.
#[derive(Debug)]
pub struct Snapshotter {
    shared: SharedLog,
    log: Listener,
    /// What a differential snapshot would go on from; writes are recorded while there is one.
    base: Option<Base>,
}

/// The latest snapshot, and what it holds.
#[derive(Debug)]
struct Base {
    /// The folder it lies in, and the names there of all snapshots of its chain, its own last.
    home: PathBuf,
    chain: Vec<String>,
    manifest: Manifest,
    checksum: Checksum,
    encoder: Encoder,
}

impl Base {
    fn name(&self) -> &str {
        self.chain.last().expect("a chain has at least one snapshot")
    }

    fn path(&self) -> PathBuf {
        self.home.join(self.name())
    }
}

impl Snapshotter {
    /// For the guest of `log`. Nothing is recorded and nothing kept before the first snapshot.
    pub fn new(log: &SharedLog) -> Self {
        Self {
            shared: log.clone(),
            log: log.listener(),
            base: None,
        }
    }

    /// Where the latest snapshot lies, if a differential one could go on from it.
    pub fn base(&self) -> Option<PathBuf> {
        self.base.as_ref().map(Base::path)
    }

    /// Refuse what cannot be, before anybody waits for it.
    pub fn check(&self, to: &Path, kind: Kind) -> Result<(), SnapshotError> {
        let (home, name) = folder::check_target(to)?;
        if kind == Kind::Full {
            return Ok(());
        }
        let refused = |text: String| Err(SnapshotError::Refused(text));
        let Some(base) = &self.base else {
            return refused(
                "a differential snapshot goes on from one taken before of this guest, in this process and with its writes \
                 recorded since; there is none: take a full one first"
                    .to_owned(),
            );
        };
        let path = base.path();
        if home != base.home {
            return refused(format!(
                "to: {}: expected a folder beside {}, which a differential snapshot goes on from",
                to.display(),
                path.display()
            ));
        }
        if base.chain.contains(&name) {
            return refused(format!(
                "to: {}: a differential snapshot cannot replace one that it goes on from",
                to.display()
            ));
        }
        if base.chain.len() == limits::SNAPSHOT_CHAIN {
            return refused(format!(
                "{} has {} snapshots before it already; take a full one",
                path.display(),
                limits::SNAPSHOT_CHAIN
            ));
        }
        let there = Folder::open(&path).and_then(|folder| folder.manifest());
        match there {
            Ok((_, checksum)) if checksum == base.checksum => Ok(()),
            Ok(_) => refused(format!("{} was replaced since; take a full snapshot", path.display())),
            Err(error) => refused(format!("{error}; take a full snapshot")),
        }
    }

    /// Take a snapshot. See the [module](self) on failure.
    pub fn take(&mut self, request: &SnapshotRequest, watch: &Watch) -> Result<SnapshotReport, SnapshotError> {
        self.check(&request.to, request.kind)?;
        let draft = Draft::begin(&request.to, request.id)?;
        let mut attempt = Attempt::begin(self, request, watch);
        let taken = attempt.take(draft);
        let consumed = attempt.consumed;
        match taken {
            Ok((base, report)) => {
                self.base = request.record.then_some(base);
                self.stop_recording_for_nobody();
                Ok(report)
            }
            Err(error) => {
                self.log.put_back(&consumed);
                self.stop_recording_for_nobody();
                // The cut may have been made, and the guest left there, before it came to nothing.
                // covered by: a_failure_after_the_cut_does_not_leave_the_guest_paused
                if request.runs
                    && let Err(why) = self.shared.guest().resume()
                {
                    return Err(SnapshotError::Host(format!(
                        "{error}; and the guest does not run on: {why}"
                    )));
                }
                Err(error)
            }
        }
    }

    fn stop_recording_for_nobody(&self) {
        if self.base.is_none()
            && let Err(error) = self.log.track(false)
        {
            tracing::warn!(%error, "writes go on being recorded");
        }
    }
}

/// One snapshot on its way.
struct Attempt<'a> {
    guest: Arc<dyn Guest>,
    log: &'a Listener,
    base: Option<&'a Base>,
    request: &'a SnapshotRequest,
    watch: &'a Watch,
    clock: Clock,
    began: Now,
    encoder: Encoder,
    /// A disk is quicker than anything but lz4.
    chooser: Chooser,
    packer: Packer,
    cut: Epoch,
    first_batch: BatchId,
    next_batch: BatchId,
    counts: PageCounts,
    /// Everything harvested so far: put back if this comes to nothing.
    consumed: Harvest,
}

/// The guest at the cut.
struct Cut {
    records: Vec<StateRecord>,
    stop_pages: PageCount,
    rounds: u32,
    breakdown: CutBreakdown,
}

impl<'a> Attempt<'a> {
    fn begin(snapshotter: &'a Snapshotter, request: &'a SnapshotRequest, watch: &'a Watch) -> Self {
        let clock = Clock::new();
        let guest = Arc::clone(snapshotter.shared.guest());
        let base = snapshotter.base.as_ref().filter(|_| request.kind == Kind::Differential);
        // A copy: what the parent holds must still be known if this comes to nothing.
        let encoder = base.map_or_else(
            || Encoder::new(&guest.spaces(), Bytes(0)).keyed(secret(request.id)),
            |base| base.encoder.clone(),
        );
        let first_batch = base.map_or(BatchId(1), |base| base.manifest.next_batch());
        Self {
            log: &snapshotter.log,
            base,
            request,
            watch,
            clock,
            began: clock.now(),
            encoder,
            chooser: Chooser::new(Compression::Lz4, 1.0),
            packer: Packer::new(),
            cut: base.map_or(Epoch(1), |base| base.manifest.cut.next()),
            first_batch,
            next_batch: first_batch,
            counts: PageCounts::default(),
            consumed: Harvest::default(),
            guest,
        }
    }

    fn take(&mut self, draft: Draft) -> Result<(Base, SnapshotReport), SnapshotError> {
        let file = draft.create("memory")?;
        let belt = Belt::default();
        let (cut, written) = std::thread::scope(|scope| {
            let writer = std::thread::Builder::new().name("umbra-snapshot".to_owned());
            let writer = writer
                .spawn_scoped(scope, || write_memory(&belt, &draft, file))
                .map_err(|error| SnapshotError::Host(format!("cannot start a thread: {error}")))?;
            let over = belt.over_when_dropped();
            let cut = self.cut(&belt);
            if cut.is_err() {
                belt.break_down();
            }
            drop(over);
            let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            // When the disk failed, that is why there is no cut.
            let written = written?;
            cut.map(|cut| (cut, written))
        })?;
        let (memory, index) = written;
        let state = draft.write("state", &encode_state(&self.guest.describe(), &cut.records)?)?;
        let index_part = draft.write("index", &index.encode())?;
        let manifest = self.manifest(index.batches(), state, memory, index_part);
        let (text, checksum) = manifest.encode();
        let manifest_part = draft.write(MANIFEST, text.as_bytes())?;
        self.watch.go_on()?;
        let folder = draft.target();
        draft.place()?;
        let parts = [state, memory, index_part, manifest_part];
        let report = SnapshotReport {
            id: manifest.id,
            kind: self.request.kind,
            cut: self.cut,
            counts: self.counts,
            bytes: Bytes(parts.iter().map(|part| part.bytes).sum()),
            rounds: cut.rounds,
            stop_pages: cut.stop_pages,
            breakdown: cut.breakdown,
            total: self.clock.now().since(self.began),
            audited: self.request.audit,
            folder,
        };
        let (home, name) = folder::place(&report.folder)?;
        let mut chain = self.base.map(|base| base.chain.clone()).unwrap_or_default();
        chain.push(name);
        let base = Base {
            home,
            chain,
            manifest,
            checksum,
            encoder: self.encoder.clone(),
        };
        Ok((base, report))
    }

    fn manifest(&self, batches: u64, state: Part, memory: Part, index: Part) -> Manifest {
        let request = self.request;
        let parent = self.base.map(|base| Parent {
            folder: base.name().to_owned(),
            id: base.manifest.id,
            checksum: base.checksum,
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Manifest {
            id: request.id,
            guest: request.identity.guest,
            name: request.name.clone(),
            term: request.identity.term,
            cut: self.cut,
            taken: now.as_secs(),
            parent,
            spaces: self.guest.spaces(),
            digest: self.encoder.digest(),
            first_batch: self.first_batch,
            batches,
            state,
            memory,
            index,
        }
    }

    /// Copy while the guest runs, then stop it for the rest. Whatever happens, a guest that ran runs afterwards, unless it
    /// was to stay paused and the cut was made.
    fn cut(&mut self, belt: &Belt) -> Result<Cut, SnapshotError> {
        let mut rounds = Rounds::new();
        let mut pages = self.first_round()?;
        if self.request.runs {
            loop {
                let count = pages.count();
                self.copy(pages, belt, true)?;
                if rounds.copied(count) {
                    break;
                }
                pages = self.harvest()?;
            }
            pages = Harvest::default();
            if !belt.wait_empty() {
                return Err(disk_failed());
            }
        }
        self.watch.go_on()?;
        let mut breakdown = CutBreakdown::default();
        let made = self.in_the_pause(pages, belt, &mut breakdown);
        let stays = !self.request.runs || (made.is_ok() && self.request.after == After::StayPaused);
        if !stays {
            let began = self.clock.now();
            self.guest.resume()?;
            breakdown.resume = self.clock.now().since(began);
        }
        let (records, stop_pages) = made?;
        Ok(Cut {
            records,
            stop_pages,
            rounds: rounds.done(),
            breakdown,
        })
    }

    /// The pages to begin with: everything that may differ from what a reader has at this point of the chain.
    fn first_round(&mut self) -> Result<Harvest, SnapshotError> {
        // Recording first: what is written after the look for untouched pages must be in a harvest.
        self.log.track(true)?;
        if self.base.is_some() {
            return self.harvest();
        }
        let present = |space: &Space| (space.id, space.present_set());
        let mut all = Harvest {
            dirty: self.guest.spaces().iter().map(present).collect(),
        };
        for (space, zeros) in &self.guest.untouched().dirty {
            if let Some((_, set)) = all.dirty.iter_mut().find(|(id, _)| id == space) {
                set.subtract(zeros);
            }
        }
        all.join(&self.harvest()?);
        Ok(all)
    }

    fn harvest(&mut self) -> Result<Harvest, SnapshotError> {
        let harvest = self.log.harvest()?;
        self.consumed.join(&harvest);
        Ok(harvest)
    }

    fn in_the_pause(
        &mut self,
        mut pages: Harvest,
        belt: &Belt,
        breakdown: &mut CutBreakdown,
    ) -> Result<(Vec<StateRecord>, PageCount), SnapshotError> {
        let clock = self.clock;
        let mut last = clock.now();
        let mut lap = || {
            let now = clock.now();
            now.since(std::mem::replace(&mut last, now))
        };
        self.guest.pause()?;
        breakdown.stop = lap();
        pages.join(&self.harvest()?);
        breakdown.harvest = lap();
        let records = self.guest.save()?;
        breakdown.save = lap();
        // Saving devices may itself write to guest memory.
        // covered by: what_saving_writes_is_in_the_snapshot
        pages.join(&self.harvest()?);
        breakdown.harvest += lap();
        let count = pages.count();
        self.copy(pages, belt, false)?;
        breakdown.encode = lap();
        if self.request.audit {
            let differing = self.encoder.audit(&*self.guest)?;
            breakdown.audit = lap();
            if let Some(first) = differing.first() {
                let text = format!(
                    "{} pages differ from what was written, {first} the first",
                    differing.len()
                );
                return Err(SnapshotError::Host(text));
            }
        }
        Ok((records, count))
    }

    fn pack(&mut self, draft: batch::Draft) -> Vec<u8> {
        let body = draft.body();
        let method = self.chooser.choose(body, false);
        let began = self.clock.now();
        let (bytes, became) = draft.pack(method, &mut self.packer);
        let took = self.clock.now().since(began);
        self.chooser
            .packed(method, became, body, Bytes::of_len(bytes.len()), took);
        bytes
    }

    /// Copy these pages and lay them on the belt. In the pause it is too late to take it back.
    fn copy(&mut self, pages: Harvest, belt: &Belt, may_be_cancelled: bool) -> Result<(), SnapshotError> {
        let mut walk = Walk::new(pages);
        while let Some(plan) = walk.next_plan(self.next_batch, self.cut) {
            if may_be_cancelled {
                self.watch.go_on()?;
            }
            self.watch.copied.fetch_add(plan.pages.len() as u64, Ordering::Relaxed);
            self.watch.left.store(walk.left().0, Ordering::Relaxed);
            let draft = self.encoder.draft(plan, &*self.guest)?;
            self.counts.add(&draft.counts());
            if draft.counts().travelled() == 0 {
                continue; // nothing in it that the parent does not have: its number is free
            }
            self.next_batch = self.next_batch.next();
            if !belt.put(self.pack(draft)) {
                return Err(disk_failed());
            }
        }
        Ok(())
    }
}

/// Drawn by chance and nothing the guest could know, like the id it is made from.
fn secret(id: SnapshotId) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = id.0;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// Only until the writer says itself what happened.
fn disk_failed() -> SnapshotError {
    SnapshotError::Host("the snapshot could not be written".to_owned())
}

/// Write batches as they come, and sync them.
fn write_memory(belt: &Belt, draft: &Draft, mut file: File) -> Result<(Part, Index), SnapshotError> {
    let mut summing = Summing::new();
    let mut index = Index::new();
    let mut write = || {
        while let Some(batch) = belt.take() {
            if !index.push(batch.len()) {
                return Err(SnapshotError::Host(
                    "the guest has more memory than a snapshot can hold".to_owned(),
                ));
            }
            file.write_all(&batch).map_err(|error| draft.failed("memory", error))?;
            summing.add(&batch);
            belt.written(batch.len());
        }
        file.sync_all().map_err(|error| draft.failed("memory", error))
    };
    let done = write();
    if done.is_err() {
        belt.break_down();
    }
    done?;
    let part = Part {
        bytes: summing.bytes(),
        checksum: summing.finish(),
    };
    Ok((part, index))
}
