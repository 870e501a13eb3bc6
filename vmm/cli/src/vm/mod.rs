//! One guest in this process, and everything an operator can do about it: the place where the machine and the node meet.
//!
//! ```text
//!   run ────▶ Here ── protect ──▶ Here + session ── migrate ──▶ ending: moved
//!              ▲ ▲                     │
//!              │ └──── session over ───┘
//!   shadow ──▶ Shadow ── handed over to us ──▶ Here
//! ```
//!
//! # What is refused while a switchover is under way
//!
//! A switchover stops the guest, may let it run on, and may give it up, all on its own. An operator's `pause` or
//! `resume` in between would be undone or, worse, would run a guest that was just given up. So from the moment the job
//! is noted down until it is over, both are refused, and so is a second session; what remains is `cancel` and, when the
//! shadow's word stays out, `resume --peer-is-dead`. A guest that an operator has paused is not moved: it would run
//! where it arrives.
//!
//! A snapshot stops the guest and lets it run on by itself too, so while one is under way `pause`, `resume` and `migrate` are
//! refused, and what remains is `cancel`. Following a shadow goes on beside it.
//!
//! `account` puts the status together, `request` reads what clients ask for, `snapshot` keeps the guest in folders. Nothing here waits for the guest's end or for
//! signals; [`crate::process`] does.

mod account;
mod cut;
mod request;
mod snapshot;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use umbra_core::event::Event as CoreEvent;
use umbra_core::guest::{Guest, GuestError};
use umbra_core::phase::SourcePhase;
use umbra_core::source::Outcome;
use umbra_machine::ExitReason;
use umbra_node::snapshot::{SharedLog, Snapshotter, Watch};
use umbra_node::{CommandError, GuestIdentity, Protection, ProtectionStatus, ShadowHandle, ShadowNode, TakenOver};
use umbra_quic::{ConnectConfig, Fingerprint, Identity, PathSpec};
use umbra_units::{Bytes, GuestId, SessionId, Term};

use self::request::Wanted;
use crate::api::types::{
    Counters, CutReport, Heat, Job, JobKind, JobState, MigrateRequest, ProtectRequest, ResizeRequest, SnapshotReport,
    SwitchoverReport, ms,
};
use crate::events::{Events, Teller, word};
use crate::exit::Failure;
use crate::limits;

/// How often progress is told while pages are copied for the first time.
const PROGRESS: Duration = Duration::from_millis(250);

/// Why a command is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    /// The request asks for something that cannot be.
    #[error("{0}")]
    Malformed(String),
    /// Not now. Nothing changed.
    #[error("{0}")]
    Refused(String),
    /// It was tried, and this host or the other failed.
    #[error("{0}")]
    Failed(String),
}

impl From<CommandError> for Denied {
    fn from(error: CommandError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl From<GuestError> for Denied {
    fn from(error: GuestError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Why the process is to end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ending {
    /// The guest ended itself, or cannot go on.
    Guest(ExitReason),
    /// An operator said so; how.
    Stopped(String),
    /// The guest runs elsewhere now.
    Moved(Box<SwitchoverReport>),
    /// The node cannot go on.
    Failed(String),
}

/// Whose the guest is when a session had to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LastWord {
    /// This process's, to do with as it likes.
    GuestIsOurs,
    /// The shadow's: it runs there.
    Moved,
    /// It was handed over, and the shadow has not said whether it runs there.
    Unknown,
}

/// A guest that runs in this process, as its VMM describes it.
pub(crate) struct Resident {
    /// The guest.
    pub(crate) guest: Arc<dyn Guest>,
    /// How many vCPUs it has.
    pub(crate) vcpus: u8,
    /// How much memory.
    pub(crate) memory: Bytes,
    /// Its front panel.
    pub(crate) panel: Arc<dyn Panel>,
}

/// The buttons and dials of a guest's machine, which no plugin need have.
pub(crate) trait Panel: Send + Sync {
    /// Press the power button; says whether the guest listens.
    fn power_button(&self) -> bool;
    /// Pull the reset line.
    fn reset(&self) -> Result<(), String>;
    /// Ask the guest to leave this much of its memory to the balloon.
    fn resize_balloon(&self, size: Bytes) -> Result<(), String>;
    /// What its vCPUs have done.
    fn counters(&self) -> Counters;
}

/// The guest of this process, here or still elsewhere.
pub(crate) struct Vm {
    name: Option<String>,
    identity: Arc<Identity>,
    began: Instant,
    events: Events,
    state: Mutex<State>,
    /// Commands that change something come one at a time.
    turn: tokio::sync::Mutex<()>,
    ending: watch::Sender<Option<Ending>>,
}

#[derive(Default)]
struct State {
    place: Place,
    listen: Vec<String>,
    jobs: u64,
    job: Option<Job>,
    last_switchover: Option<SwitchoverReport>,
    last_error: Option<String>,
    /// Of the snapshot under way, if there is one.
    snapshot: Option<Arc<Watch>>,
    /// Ends when the source this guest came from has heard that it runs here.
    farewell: Option<JoinHandle<()>>,
}

#[derive(Default)]
enum Place {
    /// Not yet decided.
    #[default]
    Nowhere,
    Shadow(ShadowHandle),
    Here(Here),
}

struct Here {
    resident: Resident,
    /// Through which everybody harvests: sessions and snapshots.
    log: SharedLog,
    snapshots: Arc<Mutex<Snapshotter>>,
    identity: GuestIdentity,
    /// By an operator.
    paused: bool,
    session: Option<Session>,
}

/// What a job that succeeded did.
enum Done {
    Moved(Box<SwitchoverReport>),
    Kept(Box<SnapshotReport>),
    Cut(Box<CutReport>),
}

#[derive(Clone)]
struct Session {
    id: SessionId,
    protection: Protection,
    paths: Vec<PathSpec>,
    peer: Fingerprint,
    /// The term the guest was given up to, once it was.
    gave_up: Option<Term>,
}

impl State {
    fn here(&self) -> Result<&Here, Denied> {
        match &self.place {
            Place::Here(here) => Ok(here),
            Place::Shadow(_) => Err(Denied::Refused(
                "the guest is not here: this process holds its shadow".to_owned(),
            )),
            Place::Nowhere => Err(Denied::Refused("there is no guest here yet".to_owned())),
        }
    }

    fn here_mut(&mut self) -> Option<&mut Here> {
        match &mut self.place {
            Place::Here(here) => Some(here),
            _ => None,
        }
    }

    fn session(&self) -> Option<&Session> {
        self.here().ok()?.session.as_ref()
    }

    fn switching(&self) -> bool {
        self.has_job(JobKind::Migrate)
    }

    fn has_job(&self, kind: JobKind) -> bool {
        let is_it = |job: &Job| job.state == JobState::Running && job.kind == kind;
        self.job.as_ref().is_some_and(is_it)
    }

    /// Refuse what a snapshot under way does not allow: it pauses the guest and lets it run on, all on its own.
    fn not_keeping(&self) -> Result<(), Denied> {
        if self.has_job(JobKind::Snapshot) {
            return Err(Denied::Refused(
                "a snapshot is under way; wait for it or `cancel` it".to_owned(),
            ));
        }
        Ok(())
    }

    fn not_cutting(&self) -> Result<(), Denied> {
        if self.has_job(JobKind::Cut) {
            return Err(Denied::Refused(
                "a cut is under way; wait for it or `cancel` it".to_owned(),
            ));
        }
        Ok(())
    }

    /// Note down a long job that begins; its number.
    fn begin_job(&mut self, kind: JobKind) -> u64 {
        self.jobs += 1;
        self.job = Some(Job {
            id: self.jobs,
            kind,
            state: JobState::Running,
            error: None,
            report: None,
            snapshot: None,
            cut: None,
        });
        self.jobs
    }

    /// Refuse what a switchover under way does not allow.
    fn not_switching(&self) -> Result<(), Denied> {
        if let Some(term) = self.session().and_then(|session| session.gave_up) {
            return Err(Denied::Refused(format!(
                "the guest was handed over in term {term} and only the shadow may run it; if the other host is dead for \
                 good, `resume --peer-is-dead` takes it back"
            )));
        }
        if self.switching() {
            return Err(Denied::Refused(
                "a switchover is under way; wait for it or `cancel` it".to_owned(),
            ));
        }
        Ok(())
    }
}

impl Vm {
    /// No guest yet.
    pub(crate) fn new(name: Option<String>, identity: Identity, events: Events) -> Arc<Self> {
        Arc::new(Self {
            name,
            identity: Arc::new(identity),
            began: Instant::now(),
            events,
            state: Mutex::default(),
            turn: tokio::sync::Mutex::new(()),
            ending: watch::Sender::new(None),
        })
    }

    /// Who this process is to its peers.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        Arc::clone(&self.identity)
    }

    /// Where it tells what happens.
    pub(crate) const fn events(&self) -> &Events {
        &self.events
    }

    /// Tells when the process is to end, and why.
    pub(crate) fn ending(&self) -> watch::Receiver<Option<Ending>> {
        self.ending.subscribe()
    }

    /// The process is to end. Only the first reason counts. May be called from any thread.
    pub(crate) fn end(&self, why: Ending) {
        self.ending.send_if_modified(|ending| {
            let first = ending.is_none();
            ending.get_or_insert(why);
            first
        });
    }

    /// A guest runs here, or stands paused, from its first instruction.
    pub(crate) fn launched(&self, resident: Resident, paused: bool) -> Result<(), Failure> {
        let identity = GuestIdentity {
            guest: GuestId(draw()?),
            term: Term(1),
        };
        self.settle(resident, identity, paused);
        Ok(())
    }

    /// A guest stands here as it was when it was kept; `same_as` says whose identity and term it goes on in, if it does.
    pub(crate) fn restored(
        &self,
        resident: Resident,
        same_as: Option<GuestIdentity>,
        paused: bool,
    ) -> Result<(), Failure> {
        match same_as {
            None => self.launched(resident, paused),
            Some(GuestIdentity { guest, term }) => {
                let term = term.next();
                self.settle(resident, GuestIdentity { guest, term }, paused);
                Ok(())
            }
        }
    }

    fn settle(&self, resident: Resident, identity: GuestIdentity, paused: bool) {
        let (guest, term) = (identity.guest.to_string(), identity.term.0);
        let log = SharedLog::new(Arc::clone(&resident.guest));
        self.state().place = Place::Here(Here {
            resident,
            snapshots: Arc::new(Mutex::new(Snapshotter::new(&log))),
            log,
            identity,
            paused,
            session: None,
        });
        let event = if paused { "created" } else { "running" };
        self.events.tell(
            Teller::Guest,
            event,
            json!({ "guest": guest, "name": self.name(), "term": term }),
        );
    }

    /// Hold shadows until one of them is to run here; `resident` knows the machine behind the guest that does. With
    /// `once`, a session that ends otherwise ends the process.
    pub(crate) fn shadow(
        self: &Arc<Self>,
        node: ShadowNode,
        handle: ShadowHandle,
        listen: Vec<String>,
        once: bool,
        resident: impl FnOnce(Arc<dyn Guest>) -> Option<Resident> + Send + 'static,
    ) {
        let events = handle.events();
        {
            let mut state = self.state();
            self.events
                .tell(Teller::Process, "listening", json!({ "addresses": &listen }));
            state.listen = listen;
            state.place = Place::Shadow(handle);
        }
        let vm = Arc::clone(self);
        tokio::spawn(async move {
            let telling = tokio::spawn(Arc::clone(&vm).tell_shadow(events, once));
            match node.run().await {
                Ok(taken) => vm.taken_over(taken, resident),
                Err(error) => vm.end(Ending::Failed(error.to_string())),
            }
            // The node is gone and with it the events' other end: what was said until then is told first.
            let _ = telling.await;
        });
    }

    async fn tell_shadow(self: Arc<Self>, mut events: broadcast::Receiver<CoreEvent>, once: bool) {
        loop {
            match events.recv().await {
                Ok(event) => {
                    self.events.tell_core(&event);
                    let abandoned = umbra_core::phase::ShadowPhase::Abandoned;
                    if once && matches!(event, CoreEvent::Shadow { to, .. } if to == abandoned) {
                        let why = "the session ended without the guest running here";
                        self.end(Ending::Failed(why.to_owned()));
                    }
                }
                Err(RecvError::Lagged(count)) => self.missed(count),
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn taken_over(&self, taken: TakenOver, resident: impl FnOnce(Arc<dyn Guest>) -> Option<Resident>) {
        let TakenOver {
            guest,
            id,
            term,
            farewell,
        } = taken;
        let Some(resident) = resident(guest) else {
            return self.end(Ending::Failed(
                "the guest that was taken over is not one this process built".to_owned(),
            ));
        };
        eprintln!(
            "umbra: the guest {} runs here now, in term {term}",
            self.name_of(Some(&id.to_string()))
        );
        {
            let mut state = self.state();
            state.listen.clear();
            state.farewell = Some(farewell);
        }
        self.settle(resident, GuestIdentity { guest: id, term }, false);
    }

    /// Stop the guest's vCPUs.
    pub(crate) async fn pause(&self) -> Result<(), Denied> {
        let _turn = self.take_turn()?;
        let guest = {
            let state = self.state();
            let here = state.here()?;
            state.not_switching()?;
            state.not_keeping()?;
            state.not_cutting()?;
            if here.paused {
                return Ok(());
            }
            Arc::clone(&here.resident.guest)
        };
        self.hold_cuts(true).await;
        if let Err(error) = blocking(move || guest.pause()).await.and_then(|paused| Ok(paused?)) {
            self.hold_cuts(false).await;
            return Err(error);
        }
        self.note_paused(true);
        Ok(())
    }

    /// Let the guest's vCPUs run; or, if the operator vouches for the other host's death, bring it to life where it was
    /// handed over from, or to.
    pub(crate) async fn resume(&self, peer_is_dead: bool) -> Result<(), Denied> {
        let _turn = self.take_turn()?;
        if peer_is_dead {
            return self.vouch().await;
        }
        let guest = {
            let state = self.state();
            if let Place::Shadow(_) = &state.place {
                return Err(Denied::Refused(
                    "the guest is not here: `migrate` at its source brings it; if the source is dead for good, \
                     `resume --peer-is-dead` runs what stands prepared or was committed"
                        .to_owned(),
                ));
            }
            let here = state.here()?;
            state.not_switching()?;
            state.not_keeping()?;
            if !here.paused {
                return Ok(());
            }
            Arc::clone(&here.resident.guest)
        };
        blocking(move || guest.resume()).await??;
        self.note_paused(false);
        self.hold_cuts(false).await;
        Ok(())
    }

    async fn vouch(&self) -> Result<(), Denied> {
        let (shadow, session) = {
            let state = self.state();
            match &state.place {
                Place::Shadow(handle) => (Some(handle.clone()), None),
                _ => (None, state.here()?.session.clone()),
            }
        };
        match (shadow, session) {
            (Some(shadow), _) => Ok(shadow.vouch().await?),
            (None, Some(session)) => Ok(session.protection.reclaim().await?),
            (None, None) => Err(Denied::Refused(
                "nothing was handed over: nobody shadows this guest".to_owned(),
            )),
        }
    }

    fn note_paused(&self, paused: bool) {
        if let Some(here) = self.state().here_mut() {
            here.paused = paused;
        }
        self.events
            .tell(Teller::Guest, if paused { "paused" } else { "resumed" }, json!({}));
    }

    /// Press the guest's power button.
    pub(crate) async fn power_button(&self) -> Result<(), Denied> {
        let panel = self.panel()?;
        if blocking(move || panel.power_button()).await? {
            return Ok(());
        }
        Err(Denied::Refused(
            "the guest does not listen to its power button: its kernel has no ACPI, or has not come to it yet; `stop` ends it"
                .to_owned(),
        ))
    }

    /// Boot the guest again, whatever it does.
    pub(crate) async fn reboot(&self) -> Result<(), Denied> {
        let panel = self.panel()?;
        blocking(move || panel.reset()).await?.map_err(Denied::Failed)
    }

    /// Ask the guest to leave memory to the host, or give it back.
    pub(crate) async fn resize(&self, request: ResizeRequest) -> Result<(), Denied> {
        let (panel, size) = {
            let state = self.state();
            let here = state.here()?;
            state.not_switching()?;
            let (size, memory) = (Bytes(request.balloon_bytes), here.resident.memory);
            if size >= memory {
                return Err(Denied::Malformed(format!(
                    "balloon_bytes: expected less than the guest's memory of {memory}, got {size}"
                )));
            }
            (Arc::clone(&here.resident.panel), size)
        };
        blocking(move || panel.resize_balloon(size))
            .await?
            .map_err(Denied::Refused)
    }

    /// What the vCPUs of a guest that is here have done since its machine was built.
    pub(crate) fn counters(&self) -> Result<Counters, Denied> {
        let state = self.state();
        let here = state.here()?;
        Ok(here.resident.panel.counters())
    }

    /// Which of the guest's memory is written how often, while a shadow follows it.
    pub(crate) async fn heat(&self, regions: Option<u32>) -> Result<Heat, Denied> {
        let regions = usize::try_from(regions.unwrap_or(limits::HEAT_REGIONS_USUAL)).unwrap_or(usize::MAX);
        if !(1..=limits::HEAT_REGIONS).contains(&regions) {
            let text = format!("regions: expected 1 to {}, got {regions}", limits::HEAT_REGIONS);
            return Err(Denied::Malformed(text));
        }
        let protection = {
            let state = self.state();
            let session = state.here()?.session.as_ref().map(|session| session.protection.clone());
            session.ok_or_else(|| Denied::Refused("no shadow follows the guest, so nobody looks".to_owned()))?
        };
        let map = protection.heat_map(regions).await;
        map.map(Heat::from).map_err(|error| Denied::Refused(error.to_string()))
    }

    fn panel(&self) -> Result<Arc<dyn Panel>, Denied> {
        let state = self.state();
        let here = state.here()?;
        state.not_switching()?;
        Ok(Arc::clone(&here.resident.panel))
    }

    /// End the guest and the process.
    pub(crate) fn stop(&self, how: &str) -> Result<(), Denied> {
        self.state().not_switching()?;
        self.end(Ending::Stopped(how.to_owned()));
        Ok(())
    }

    /// Start keeping a shadow.
    pub(crate) async fn protect(self: &Arc<Self>, request: ProtectRequest) -> Result<(), Denied> {
        let _turn = self.take_turn()?;
        let wanted = Wanted::read(&request, &self.identity)?;
        let (guest, identity) = {
            let state = self.state();
            let here = state.here()?;
            if here.session.is_some() {
                return Err(Denied::Refused(
                    "a shadow is being kept already; `unprotect` ends that".to_owned(),
                ));
            }
            let guest: Arc<dyn Guest> = Arc::new(here.log.listener());
            (guest, here.identity)
        };
        let session = SessionId(draw().map_err(|failure| Denied::Failed(failure.text))?);
        let connect = ConnectConfig::new(wanted.paths.clone(), wanted.identity, wanted.peers);
        let link = umbra_quic::connect(connect)
            .await
            .map_err(|error| Denied::Failed(error.to_string()))?;
        let peer = link.peer();
        let protection = Protection::start(guest, identity, session, link, wanted.config)
            .map_err(|error| Denied::Failed(error.to_string()))?;
        let events = protection.events();
        {
            let mut state = self.state();
            state.last_error = None;
            if let Some(here) = state.here_mut() {
                let (protection, paths) = (protection.clone(), wanted.paths);
                here.session = Some(Session {
                    id: session,
                    protection,
                    paths,
                    peer,
                    gave_up: None,
                });
            }
        }
        self.events.tell(
            Teller::Session,
            "protecting",
            json!({ "to": request.to, "peer": peer.to_string() }),
        );
        tokio::spawn(Arc::clone(self).follow(session, protection, events));
        let stands = self.state().here().is_ok_and(|here| here.paused) || self.state().has_job(JobKind::Snapshot);
        if stands {
            self.hold_cuts(true).await;
        }
        Ok(())
    }

    /// Tell what a session does, until it is over; then draw the consequences.
    async fn follow(
        self: Arc<Self>,
        session: SessionId,
        protection: Protection,
        mut events: broadcast::Receiver<CoreEvent>,
    ) {
        let mut progress = tokio::time::interval(PROGRESS);
        progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = None;
        let outcome = loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Ok(event) => self.heard(&event),
                    Err(RecvError::Lagged(count)) => self.missed(count),
                    Err(RecvError::Closed) => break protection.outcome().await,
                },
                outcome = protection.outcome() => break outcome,
                _ = progress.tick() => self.tell_progress(&protection, &mut told).await,
            }
        };
        while let Ok(event) = events.try_recv() {
            self.heard(&event);
        }
        match outcome {
            Outcome::Moved(report) => self.moved(&report),
            Outcome::Stayed { term, fault, text } => {
                self.stayed(session, term, fault.map(|fault| fault.to_string()), &text);
            }
        }
    }

    fn heard(&self, event: &CoreEvent) {
        if let CoreEvent::GaveUp { term, .. } = event
            && let Some(session) = self.state().here_mut().and_then(|here| here.session.as_mut())
        {
            session.gave_up = Some(*term);
        }
        self.events.tell_core(event);
    }

    fn missed(&self, count: u64) {
        self.events
            .tell(Teller::Process, "events-missed", json!({ "count": count }));
    }

    /// Tell how far the first copy is, when that has changed.
    async fn tell_progress(&self, protection: &Protection, told: &mut Option<(SourcePhase, u64)>) {
        let Ok(ProtectionStatus { source, .. }) = protection.status().await else {
            return;
        };
        let now = (source.phase, source.debt.0);
        let seeding = matches!(source.phase, SourcePhase::Joining | SourcePhase::Seeding);
        if (seeding && *told != Some(now)) || (source.switching && source.phase == SourcePhase::Following) {
            *told = Some(now);
            let properties = json!({
                "phase": word(source.phase),
                "seeded": source.seeded.get(),
                "debt": source.debt.0,
                "predicted_pause_ms": source.predicted_pause.map(ms),
            });
            self.events.tell(Teller::Session, "progress", properties);
        }
    }

    /// Note down a switchover that succeeded, and tell whoever asked for it. May be done twice.
    fn note_move(&self, report: &umbra_core::report::SwitchoverReport) -> SwitchoverReport {
        let report = {
            let mut state = self.state();
            let (guest, to) = match state.here() {
                Ok(Here { identity, session, .. }) => {
                    let paths = session
                        .iter()
                        .flat_map(|session| &session.paths)
                        .map(ToString::to_string)
                        .collect();
                    (identity.guest.to_string(), paths)
                }
                Err(_) => (String::new(), Vec::new()),
            };
            let report = SwitchoverReport::of(report, guest, to);
            state.last_switchover = Some(report.clone());
            report
        };
        self.finish_job(JobKind::Migrate, Ok(Done::Moved(Box::new(report.clone()))));
        report
    }

    fn moved(&self, report: &umbra_core::report::SwitchoverReport) {
        let report = self.note_move(report);
        self.events
            .tell(Teller::Guest, "moved", json!({ "to": &report.to, "term": report.term }));
        self.end(Ending::Moved(Box::new(report)));
    }

    fn stayed(&self, session: SessionId, term: Term, fault: Option<String>, text: &str) {
        // After `unprotect` the next session may have begun before this one's end is told: that one is not over.
        let is_latest = {
            let mut state = self.state();
            let is_latest = state.session().is_none_or(|latest| latest.id == session);
            if let (true, Some(here)) = (is_latest, state.here_mut()) {
                here.identity.term = term;
                here.session = None;
                state.last_error.clone_from(&fault);
            }
            is_latest
        };
        if is_latest {
            // Usually told already, by whoever asked for the switchover.
            self.finish_job(JobKind::Migrate, Err(text.to_owned()));
        }
        self.events.tell(
            Teller::Session,
            "unprotected",
            json!({ "reason": text, "fault": fault }),
        );
    }

    /// Stop keeping a shadow; at a shadow: send the source away.
    pub(crate) async fn unprotect(&self) -> Result<(), Denied> {
        let _turn = self.take_turn()?;
        let (shadow, session) = {
            let state = self.state();
            match &state.place {
                Place::Shadow(handle) => (Some(handle.clone()), None),
                _ => {
                    state.here()?;
                    state.not_switching()?;
                    (None, state.session().cloned())
                }
            }
        };
        match (shadow, session) {
            (Some(shadow), _) => Ok(shadow.end("the shadow's operator ended the session").await?),
            (None, Some(session)) => {
                session
                    .protection
                    .end("the source's operator ended the session")
                    .await?;
                session.protection.outcome().await;
                self.forget_session();
                Ok(())
            }
            (None, None) => Err(Denied::Refused("nobody shadows this guest".to_owned())),
        }
    }

    /// So that a command that comes right after finds it gone; [`Self::follow`] tells of it in its own time.
    fn forget_session(&self) {
        if let Some(here) = self.state().here_mut() {
            here.session = None;
        }
    }

    /// Start moving the guest; says the job's number.
    pub(crate) fn migrate(self: &Arc<Self>, request: &MigrateRequest) -> Result<u64, Denied> {
        let _turn = self.take_turn()?;
        let options = request::options(request)?;
        let (id, protection) = {
            let mut state = self.state();
            let here = state.here()?;
            let Some(session) = here.session.clone() else {
                return Err(Denied::Refused(
                    "nobody shadows this guest; `protect` it first".to_owned(),
                ));
            };
            state.not_switching()?;
            state.not_keeping()?;
            state.not_cutting()?;
            if here.paused {
                return Err(Denied::Refused(
                    "the guest is paused, and would run where it arrives; `resume` it first".to_owned(),
                ));
            }
            (state.begin_job(JobKind::Migrate), session.protection)
        };
        self.events.tell(
            Teller::Job,
            "job-started",
            json!({ "job": id, "kind": JobKind::Migrate }),
        );
        let vm = Arc::clone(self);
        tokio::spawn(async move {
            match protection.switchover(options).await {
                // Final: the process ends when the link has been closed in good order, but nobody need wait for that.
                Ok(report) => drop(vm.note_move(&report)),
                Err(error) => vm.finish_job(JobKind::Migrate, Err(error.to_string())),
            }
        });
        Ok(id)
    }

    fn finish_job(&self, kind: JobKind, result: Result<Done, String>) {
        let job = {
            let mut state = self.state();
            let Some(job) = state
                .job
                .as_mut()
                .filter(|job| job.state == JobState::Running && job.kind == kind)
            else {
                return;
            };
            match result {
                Ok(Done::Moved(report)) => (job.state, job.report) = (JobState::Done, Some(*report)),
                Ok(Done::Kept(report)) => (job.state, job.snapshot) = (JobState::Done, Some(*report)),
                Ok(Done::Cut(report)) => (job.state, job.cut) = (JobState::Done, Some(*report)),
                Err(error) => (job.state, job.error) = (JobState::Failed, Some(error)),
            }
            job.clone()
        };
        self.events.tell(Teller::Job, "job-finished", json!(job));
    }

    /// Take a switchover, a cut or a snapshot back.
    pub(crate) async fn cancel(&self) -> Result<(), Denied> {
        if self.cancel_snapshot() {
            return Ok(());
        }
        let session = self.state().here()?.session.clone();
        let session = session.ok_or_else(|| Denied::Refused("no switchover is under way".to_owned()))?;
        if self.state().has_job(JobKind::Cut) {
            return Ok(session.protection.cancel_cut().await?);
        }
        Ok(session.protection.cancel_switchover().await?)
    }

    /// The source that this guest came from shall know before the process goes away, or it waits for ever.
    async fn end_farewell(&self) {
        let farewell = self.state().farewell.take();
        if let Some(farewell) = farewell {
            let _ = tokio::time::timeout(limits::SESSION_LAST_WORDS, farewell).await;
        }
    }

    /// End whatever session there is, because the process ends.
    pub(crate) async fn end_session(&self, why: &str) -> LastWord {
        let (shadow, session) = {
            let state = self.state();
            match &state.place {
                Place::Shadow(handle) => (Some(handle.clone()), None),
                _ => (None, state.session().cloned()),
            }
        };
        self.end_farewell().await;
        if let Some(shadow) = shadow {
            // Refused when there is none, or when the guest is about to run here: then this end is its end.
            let _ = tokio::time::timeout(limits::SESSION_LAST_WORDS, shadow.end(why)).await;
        }
        let Some(Session { protection, .. }) = session else {
            return LastWord::GuestIsOurs;
        };
        let handed_over = matches!(protection.end(why).await, Err(CommandError::Refused(_)));
        let patience = if handed_over {
            limits::HAND_OVER_WORD
        } else {
            limits::SESSION_LAST_WORDS
        };
        match tokio::time::timeout(patience, protection.outcome()).await {
            Ok(Outcome::Moved(_)) => LastWord::Moved,
            Err(_) if handed_over => LastWord::Unknown,
            Ok(Outcome::Stayed { .. }) | Err(_) => LastWord::GuestIsOurs,
        }
    }

    /// The guest, if it is here: to be let go of.
    pub(crate) fn take_guest(&self) -> Option<Arc<dyn Guest>> {
        match std::mem::take(&mut self.state().place) {
            Place::Here(here) => Some(here.resident.guest),
            _ => None,
        }
    }

    fn take_turn(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, Denied> {
        let busy = |_| Denied::Refused("another command is under way; try again when it is done".to_owned());
        self.turn.try_lock().map_err(busy)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl core::fmt::Display for Ending {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Guest(reason) => write!(f, "the guest {reason}"),
            Self::Stopped(how) => write!(f, "stopped {how}"),
            Self::Moved(report) => write!(
                f,
                "the guest moved to {} in term {}, with a pause of {:.1} ms",
                report.to.first().map_or("its shadow", String::as_str),
                report.term,
                report.pause_ms
            ),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Result<T, Denied> {
    tokio::task::spawn_blocking(act)
        .await
        .map_err(|error| Denied::Failed(error.to_string()))
}

/// Sixteen random bytes.
fn draw() -> Result<[u8; 16], Failure> {
    use std::io::Read;
    let mut bytes = [0; 16];
    let mut random = std::fs::File::open("/dev/urandom").map_err(Failure::on("/dev/urandom"))?;
    random.read_exact(&mut bytes).map_err(Failure::on("/dev/urandom"))?;
    Ok(bytes)
}
