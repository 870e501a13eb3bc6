//! The source: where the guest runs, until it does not.
//!
//! A state machine without I/O. It is told what happened (`handle_*`), asked what to do ([`Source::poll_output`],
//! [`Source::take_plan`], [`Source::poll_timeout`]), and otherwise sits still. It decides page numbers; the node moves
//! their bytes.
//!
//! ```text
//!  Joining ──▶ Seeding ──▶ Following ◀─────── withdraw ───────┐
//!                              │ switchover wanted,           │
//!                              │ debt small enough            │
//!                              ▼                              │
//!   pause ▶ harvest ▶ save ▶ harvest ▶ closing batch ▶ [prepared?] ──▶ gave up ▶ go ▶ Done
//!  └──────────────────────── Final ───────────────────────┘        └── HandedOver ──┘
//! ```
//!
//! # The commit point
//!
//! Until the source gives up, the guest is here: any failure withdraws the final epoch and runs on. In the move
//! `gave_up` the source changes its mind for good, *before* it says go, and from then on nothing but the shadow's own
//! word ("I did not run it and never will") or an operator's ([`Source::reclaim`]) brings the guest back. A lost answer
//! is therefore never settled by running twice; at worst the guest waits (DESIGN §3.1).

mod cut;
mod encoder;
mod gathering;
mod stop;
mod switchover;
mod window;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use umbra_units::{BatchId, Bytes, Epoch, GuestId, Now, PageCount, PageId, Ratio, SessionId, Term};

pub use cut::{CommittedEpoch, CutOptions, CutReason};
pub use encoder::{CacheCounts, DEFAULT_CACHE, Encoded, Encoder};
pub use switchover::{Attempt, SwitchoverOptions};

use crate::batch::{Close, PageCounts};
use crate::convergence::{Convergence, Outlook};
use crate::error::{Fault, Refused};
use crate::event::Event;
use crate::guest::{CaptureBy, Harvest, Space, StateRecord};
use crate::heat::{ClassCounts, HeatMap, Rate};
use crate::ledger::{Ledger, Owed};
use crate::order::{Hold, Order};
use crate::pace::{Bounds, Pace};
use crate::phase::SourcePhase;
use crate::predict::{LinkFacts, PausePredictor};
use crate::report::SwitchoverReport;
use crate::wire::{Hello, Message, VERSIONS};
use cut::{Cut, Stage};
use gathering::Due;
use switchover::{Final, Switching};
use window::Window;

/// While following, a page waits that is written again within this while…
const AGAIN: Duration = Duration::from_secs(1);
/// …with this chance.
const SURELY: f32 = 0.8;

/// No more than one page in so many is left for the end: what waits is missing at the shadow, which wants to be nearly
/// complete.
const DEFERRED_MOST: u64 = 32;

/// How a source behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceConfig {
    /// Between two harvests of a guest that writes. Shorter keeps the shadow closer and costs the guest more faults.
    pub harvest_every: Duration,
    /// As close as harvests come while a large share of few pages is written ([`pace`](crate::pace)).
    pub harvest_least: Duration,
    /// Between two harvests of a guest that has written nothing for a while.
    pub harvest_idle: Duration,
    /// Pages of one batch while seeding and following; at most
    /// [`limits::BATCH_PAGES`](crate::limits::BATCH_PAGES).
    pub batch_pages: PageCount,
    /// Which owed page ships next.
    pub order: Order,
    /// While following, pages written over and over are left for the end, as long as a stop with all of them left would
    /// keep to this pause. Zero leaves none. Only the coldest first leaves any.
    pub pause_promise: Duration,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            harvest_every: Duration::from_millis(20),
            harvest_least: Duration::from_millis(5),
            harvest_idle: Duration::from_millis(100),
            batch_pages: PageCount(64),
            order: Order::default(),
            pause_promise: Duration::from_millis(50),
        }
    }
}

/// Something the node must do to the guest. Steps are done one after the other, in the order they came; each is answered
/// by the `handle_*` it names, or by [`Source::handle_step_failed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Start recording writes, then find the pages never touched. Answer: [`Source::handle_tracked`].
    Track,
    /// Take a harvest. Answer: [`Source::handle_harvest`].
    Harvest,
    /// Stop the guest. Answer: [`Source::handle_paused`].
    Pause,
    /// Save everything but memory. Answer: [`Source::handle_saved`].
    Save,
    /// Compare the paused guest's memory with what was shipped. Answer: [`Source::handle_audited`].
    Audit,
    /// Call [`Guest::give_up`](crate::guest::Guest::give_up), at once and before any later output is acted on: the next one
    /// lets the shadow run the guest. Every earlier step has been answered. No answer.
    GiveUp,
    /// Keep these pages of the stopped guest as they are, to be read after it runs on. Answer: [`Source::handle_captured`].
    Capture(Harvest, Option<CaptureBy>),
    /// Let go of what was captured, once the plans given out before have been encoded. No answer.
    Release,
    /// Let the guest run. Answer: [`Source::handle_resumed`]. Failing to resume is the host's end, and the node says so.
    Resume,
    /// Stop recording writes, and give these pages back: nobody took care of them.
    Untrack(Harvest),
}

/// A step without what it carries: what a node names when one failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// [`Step::Pause`].
    Pause,
    /// [`Step::Harvest`].
    Harvest,
    /// [`Step::Save`].
    Save,
    /// [`Step::Capture`].
    Capture,
    /// [`Step::Audit`].
    Audit,
    /// [`Step::Resume`].
    Resume,
    /// Any other.
    Other,
}

impl Step {
    /// Which kind of step.
    pub const fn kind(&self) -> StepKind {
        match self {
            Self::Pause => StepKind::Pause,
            Self::Harvest => StepKind::Harvest,
            Self::Save => StepKind::Save,
            Self::Capture(..) => StepKind::Capture,
            Self::Audit => StepKind::Audit,
            Self::Resume => StepKind::Resume,
            Self::Track | Self::Release | Self::GiveUp | Self::Untrack(_) => StepKind::Other,
        }
    }
}

/// What the node must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Say this to the shadow.
    Send(Message),
    /// Do this to the guest.
    Do(Step),
    /// Tell whoever listens.
    Event(Event),
    /// The session is over; the link may be closed once everything sent before has been delivered.
    End(Outcome),
}

/// How a session ended, for the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the shadow; this node never runs it again.
    Moved(Box<SwitchoverReport>),
    /// The guest is here, in this term; why the session ended.
    Stayed {
        /// The term the guest runs in.
        term: Term,
        /// Whose fault it was, if anybody's.
        fault: Option<Fault>,
        /// In words for an operator.
        text: String,
    },
}

/// Pages to be copied, encoded and shipped as one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Its number.
    pub batch: BatchId,
    /// The epoch its pages belong to.
    pub epoch: Epoch,
    /// Which pages, and what the shadow has of each. Pages of one space stand together.
    pub pages: Vec<Owed>,
    /// Pages owed beyond this batch.
    pub owed_after: PageCount,
    /// Whether somebody waits for it: such batches travel with parity.
    pub urgent: bool,
    /// Whether its pages are to be read from what was captured, not from the guest.
    pub captured: bool,
    /// Closes the epoch, if present: what the encoder completes with its digest.
    pub close: Option<Close>,
    /// The attempt at a final epoch that this is part of, if it is: it may be taken back before this is encoded.
    pub attempt: Option<Attempt>,
}

/// A source's account of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceStatus {
    /// What it is doing.
    pub phase: SourcePhase,
    /// The term the guest runs in, or was given up in.
    pub term: Term,
    /// The epoch that pages shipped now will belong to.
    pub epoch: Epoch,
    /// Pages the guest has.
    pub pages: PageCount,
    /// Share of them the shadow has held at least once. Never runs backwards.
    pub seeded: Ratio,
    /// Pages whose newest content the shadow has not acknowledged.
    pub debt: PageCount,
    /// Of those, pages that are left for the end: they would be written again before they are needed.
    pub deferred: PageCount,
    /// Pages found written by the latest harvest.
    pub latest_harvest: PageCount,
    /// Between two harvests now.
    pub pace: Duration,
    /// Which owed page ships next.
    pub order: Order,
    /// Pages of each class.
    pub classes: ClassCounts,
    /// What is to be expected of the debt.
    pub outlook: Outlook,
    /// How pages travelled so far.
    pub counts: PageCounts,
    /// Bytes of batches so far.
    pub shipped: Bytes,
    /// The pause if the guest were stopped now; `None` while there is no link.
    pub predicted_pause: Option<Duration>,
    /// Whether a switchover is under way.
    pub switching: bool,
    /// Why it has not stopped the guest yet, if it has not.
    pub obstacle: Option<String>,
    /// Whether an epoch is being cut.
    pub cutting: bool,
    /// The last epoch that the shadow committed, if it holds one.
    pub committed: Option<CommittedEpoch>,
    /// Everything that speaks against a switchover now.
    pub reasons: Vec<String>,
}

/// One source. See the [module](self).
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    phase: SourcePhase,
    term: Term,
    epoch: Epoch,
    ledger: Ledger,
    window: Window,
    predictor: PausePredictor,
    outputs: VecDeque<Output>,
    /// Whether writes are being recorded. A page copied before that could be written again unseen.
    tracked: bool,
    /// A harvest was asked for and not yet answered.
    harvesting: bool,
    next_harvest: Now,
    /// When the latest harvest was asked for, and when it was answered.
    asked_harvest: Now,
    harvested: Now,
    latest_harvest: PageCount,
    pace: Pace,
    convergence: Convergence,
    /// Everything owed is held back: as good as nothing, until the next harvest.
    all_held: bool,
    link_up: bool,
    /// The shadow's latest reasons against a switchover; `None` until it has said anything.
    readiness: Option<Vec<String>>,
    switching: Option<Switching>,
    closing: Option<Final>,
    cut: Option<Cut>,
    committed: Option<CommittedEpoch>,
    /// Pages that the shadow can still keep apart from its committed epoch, of so many; `None` while it need not.
    staging: Option<(PageCount, PageCount)>,
    /// Somebody else stops the guest: nothing is cut meanwhile.
    cuts_held: bool,
    /// After a failed cut of its own the source waits until then.
    no_cut_before: Now,
    /// Answers to steps of cuts and final epochs.
    due: Due,
    /// Plans that were given out and have not been encoded.
    unencoded: BTreeSet<BatchId>,
    counts: PageCounts,
    shipped: Bytes,
    ended: bool,
}

impl Source {
    /// A source for a guest that runs here in `term`. Says hello at once.
    pub fn new(
        config: SourceConfig,
        guest: GuestId,
        session: SessionId,
        term: Term,
        description: StateRecord,
        spaces: &[Space],
    ) -> Self {
        let hello = Hello {
            versions: VERSIONS.to_vec(),
            guest,
            session,
            term,
            description,
            spaces: spaces.to_vec(),
        };
        let ledger = Ledger::new(spaces, config.order);
        let bounds = Bounds {
            least: config.harvest_least,
            most: config.harvest_every,
            idle: config.harvest_idle,
        };
        let pace = Pace::new(bounds, ledger.present());
        Self {
            config,
            phase: SourcePhase::Joining,
            term,
            epoch: Epoch(1),
            ledger,
            window: Window::default(),
            predictor: PausePredictor::new(),
            outputs: VecDeque::from([Output::Send(Message::Hello(hello))]),
            tracked: false,
            harvesting: false,
            next_harvest: Now::NEVER,
            asked_harvest: Now::ZERO,
            harvested: Now::ZERO,
            latest_harvest: PageCount::ZERO,
            pace,
            convergence: Convergence::new(spaces),
            all_held: false,
            link_up: true,
            readiness: None,
            switching: None,
            closing: None,
            cut: None,
            committed: None,
            staging: None,
            cuts_held: false,
            no_cut_before: Now::ZERO,
            due: Due::default(),
            unencoded: BTreeSet::new(),
            counts: PageCounts::default(),
            shipped: Bytes::ZERO,
            ended: false,
        }
    }

    /// What it is doing.
    pub const fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// The term the guest runs in, or was given up in.
    pub const fn term(&self) -> Term {
        self.term
    }

    /// Whether a switchover is under way.
    pub const fn is_switching(&self) -> bool {
        self.switching.is_some()
    }

    /// The epoch that pages shipped now will belong to.
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The pages whose newest content the shadow has not acknowledged, for those who check that no write is lost.
    pub fn debt_pages(&self) -> Harvest {
        self.ledger.debt_pages()
    }

    /// Its account of itself.
    pub fn status(&self) -> SourceStatus {
        let debt = self.ledger.debt();
        // As of the latest harvest: nothing that is told here was learned since.
        let (now, hold) = (self.harvested, self.hold());
        let pause = self.predictor.pause(debt);
        SourceStatus {
            phase: self.phase,
            term: self.term,
            epoch: self.epoch,
            pages: self.ledger.present(),
            seeded: Ratio::of(self.ledger.seeded().0, self.ledger.present().0),
            debt,
            deferred: self.ledger.deferred(now, hold),
            latest_harvest: self.latest_harvest,
            pace: self.pace.now(),
            order: self.config.order,
            classes: self.ledger.classes(now, hold),
            outlook: self.outlook(now, self.promise()),
            counts: self.counts,
            shipped: self.shipped,
            predicted_pause: (self.link_up && pause < Duration::MAX).then_some(pause),
            switching: self.switching.is_some(),
            obstacle: self.obstacle().map(str::to_owned),
            cutting: self.is_cutting(),
            committed: self.committed,
            reasons: self.reasons(),
        }
    }

    /// How hot the guest's memory is, in at most so many regions.
    pub fn heat_map(&self, regions: usize) -> HeatMap {
        self.ledger.heat_map(self.harvested, self.hold(), regions)
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`handle_time`](Self::handle_time) wants to be called.
    pub fn poll_timeout(&self) -> Now {
        let harvest = if self.wants_harvests() {
            self.next_harvest
        } else {
            Now::NEVER
        };
        harvest.min(self.switchover_deadline()).min(self.cut_deadline())
    }

    /// Time passed.
    pub fn handle_time(&mut self, now: Now) {
        if self.wants_harvests() && now >= self.next_harvest {
            self.ask_harvest(now);
        }
        if now >= self.switchover_deadline() {
            self.switchover_overdue(now);
        }
        if now >= self.cut_deadline() {
            self.cut_overdue(now);
        }
    }

    /// The next batch to copy, encode and ship. The node asks while the link has room; in the final epoch it asks until
    /// there is none, room or not.
    pub fn take_plan(&mut self, now: Now) -> Option<Plan> {
        match self.phase {
            SourcePhase::Seeding => self.bulk_plan(now),
            SourcePhase::Following | SourcePhase::Cutting => match self.cut_stage() {
                None | Some(Stage::Settling | Stage::Closed) => self.bulk_plan(now),
                Some(Stage::Draining | Stage::Stopped) => None,
                Some(Stage::Shipping) => self.cut_plan(),
            },
            SourcePhase::Final => self.final_plan(now),
            _ => None,
        }
    }

    /// A planned batch was encoded into `bytes` and handed to the link.
    pub fn handle_encoded(&mut self, now: Now, batch: BatchId, bytes: Bytes, counts: PageCounts) {
        self.counts.add(&counts);
        self.shipped += bytes;
        self.window.encoded(batch, bytes);
        self.unencoded.remove(&batch);
        self.cut_encoded(batch, bytes, &counts);
        self.maybe_stop_for_cut(now);
        self.predictor.encoded(counts.total() - counts.same, bytes);
        if let Some(closing) = &mut self.closing {
            closing.encoded(now, batch, bytes, counts);
        }
    }

    /// The shadow said something.
    pub fn handle_message(&mut self, now: Now, message: Message) {
        match message {
            Message::Welcome { version, room } => self.welcomed(now, version, room),
            Message::Held {
                through,
                room,
                left,
                staging,
            } => self.held(now, through, room, (left, staging)),
            Message::Readiness { reasons, .. } => {
                self.outputs.push_back(Output::Event(Event::ReadinessChanged {
                    reasons: reasons.clone(),
                }));
                self.readiness = Some(reasons);
                self.progressed(now);
            }
            Message::Prepared { epoch, times } => self.shadow_prepared(now, epoch, times),
            Message::Committed { epoch } => self.committed(now, epoch),
            Message::Uncommitted { epoch, text } => self.given_up(epoch, text),
            Message::Unprepared { epoch, text } if self.phase == SourcePhase::Final && epoch == self.epoch => {
                self.withdraw(&format!("the shadow could not prepare: {text}"));
            }
            Message::Unprepared { .. } => {} // answers a final epoch that was taken back meanwhile
            Message::Running { term, resume_us } => self.runs_there(now, term, resume_us),
            Message::Declined { term, text } => self.declined(term, &text),
            // Only a shadow that abandoned its session says goodbye, and such a shadow never runs the guest.
            // covered by: a_shadow_that_was_ended_before_it_heard_go_hands_the_guest_back
            Message::Goodbye { text } if self.phase == SourcePhase::HandedOver => self.declined(self.term, &text),
            Message::Goodbye { text } => self.end_by(Fault::PeerEnded(text)),
            Message::Hello(_) | Message::Go { .. } | Message::Withdraw { .. } => {
                self.end_by(Fault::PeerMisbehaved("it sent what only a source says".to_owned()));
            }
        }
    }

    /// The answer to [`Step::Harvest`]. A harvest is never wasted, whatever the phase.
    pub fn handle_harvest(&mut self, now: Now, harvest: &Harvest) {
        self.harvesting = false;
        self.latest_harvest = harvest.count();
        let since = now.since(self.harvested);
        let took = now.since(self.asked_harvest);
        self.harvested = now;
        self.pace.harvested(self.latest_harvest, since, took);
        self.next_harvest = now + self.pace.now();
        self.convergence.harvest(now, harvest);
        self.all_held = false;
        self.ledger.owe(now, harvest);
        match self.phase {
            SourcePhase::Final | SourcePhase::Cutting => self.gathering_harvest(now),
            _ => {
                self.consider_stop(now);
                self.consider_cut(now);
                self.maybe_cut_for_staging(now);
            }
        }
    }

    /// The answer to [`Step::Track`]: pages that were never touched are zeros, as at the shadow, and need not travel.
    pub fn handle_tracked(&mut self, now: Now, untouched: &Harvest) {
        self.ledger.untouched(untouched);
        self.tracked = true;
        self.progressed(now);
    }

    /// The link's rate and round trip changed.
    pub const fn handle_link(&mut self, facts: LinkFacts) {
        self.predictor.link(facts);
    }

    /// The last path went down, or the first came up. Nothing restarts: what was not acknowledged is still owed or in
    /// flight, and the link sends it again.
    pub fn handle_link_up(&mut self, now: Now, up: bool) {
        if self.link_up != up {
            self.link_up = up;
            self.outputs
                .push_back(Output::Event(if up { Event::LinkUp } else { Event::LinkDown }));
            if !up {
                self.cut_without_link(now);
            }
        }
    }

    /// The shadow will never answer again: its node restarted or refused us for good.
    pub fn handle_link_lost(&mut self, text: &str) {
        // A source that gave up keeps waiting: only the shadow's word or an operator's brings the guest back.
        if self.phase != SourcePhase::HandedOver {
            self.end_by(Fault::PeerEnded(text.to_owned()));
        }
    }

    /// A step failed on this host. A cut that fails is only a cut that failed; in a switchover, or outside of both, the
    /// session ends. The guest runs on if it can.
    pub fn handle_step_failed(&mut self, now: Now, step: StepKind, fault: Fault) {
        let wanted = match step {
            StepKind::Pause => self.due.pause.came(),
            StepKind::Save => self.due.save.came(),
            StepKind::Capture => self.due.capture.came(),
            StepKind::Audit => self.due.audit.came(),
            StepKind::Harvest => {
                self.harvesting = false;
                true
            }
            StepKind::Resume => {
                self.due.resume.came();
                true
            }
            StepKind::Other => true,
        };
        let of_cut = matches!(
            step,
            StepKind::Pause | StepKind::Harvest | StepKind::Save | StepKind::Capture
        );
        if !wanted {
            // Of an attempt that was taken back: it was not to be anyhow.
        } else if self.phase == SourcePhase::Cutting && of_cut {
            self.fail_cut(now, &fault.to_string());
        } else {
            self.handle_failed(fault);
        }
    }

    /// Something failed on this host that nothing goes on without, or the peer sent nonsense. The guest runs on if it can.
    pub fn handle_failed(&mut self, fault: Fault) {
        self.harvesting = false;
        self.end_by(fault);
    }

    /// End the session from this side; the guest stays.
    pub fn end(&mut self, text: &str) -> Result<(), Refused> {
        if self.phase == SourcePhase::HandedOver {
            return Err(Refused(
                "the guest was handed over; `resume --peer-is-dead` takes it back if the shadow is gone for good"
                    .to_owned(),
            ));
        }
        self.finish(None, text);
        Ok(())
    }

    /// An operator vouches that the shadow is dead and never ran the guest: take it back.
    pub fn reclaim(&mut self) -> Result<(), Refused> {
        self.make(SourcePhase::reclaimed)?;
        self.take_back("an operator vouched that the shadow is dead");
        Ok(())
    }

    fn bulk_plan(&mut self, now: Now) -> Option<Plan> {
        let most = self.staging_takes(self.config.batch_pages);
        let room = most > PageCount::ZERO && self.window.takes(most.0, Bytes::ZERO);
        // covered by: nothing_is_copied_before_writes_are_recorded
        if !self.tracked || !room || self.ledger.owed() == PageCount::ZERO {
            return None;
        }
        let hold = self.hold();
        self.all_held = !self.ledger.is_ready(now, hold);
        if self.all_held {
            return None;
        }
        let (batch, pages) = self.ledger.take(now, most, hold);
        self.window.planned(batch, pages.len() as u64, Bytes::ZERO);
        self.unencoded.insert(batch);
        Some(Plan {
            batch,
            epoch: self.epoch,
            pages,
            owed_after: self.ledger.owed(),
            urgent: false,
            captured: false,
            close: None,
            attempt: None,
        })
    }

    /// Which owed pages wait, and how many may.
    ///
    /// While following: those that would be written again within [`AGAIN`], as many as fit the promised pause. While the
    /// debt is being shrunk for a switchover only what would be written again before the stop anyway, which is soon:
    /// there, a page that is shipped in time shortens the pause.
    fn hold(&self) -> Option<Hold> {
        if self.phase != SourcePhase::Following || self.config.order != Order::ColdFirst || !self.link_up {
            return None;
        }
        let most = self.predictor.pages_within(self.promise());
        let most = most.min(PageCount(self.ledger.present().0 / DEFERRED_MOST));
        let within = if self.switching.is_some() {
            // The next harvests are the earliest moment to stop.
            (self.pace.now() + self.predictor.rtt()) * 2
        } else {
            AGAIN
        };
        let from = Rate::of_chance(SURELY, within);
        (most > PageCount::ZERO).then_some(Hold { from, most })
    }

    /// What is to be expected of the debt, if the pause must keep to this limit.
    fn outlook(&self, now: Now, limit: Duration) -> Outlook {
        let rates = self.ledger.rates(now);
        Outlook::of(
            &self.convergence.curve(),
            &rates,
            &self.predictor,
            self.config.order,
            limit,
        )
    }

    fn welcomed(&mut self, now: Now, version: u16, room: Bytes) {
        if !VERSIONS.contains(&version) {
            let text = format!("it chose protocol version {version}, which was not offered");
            return self.end_by(Fault::PeerMisbehaved(text));
        }
        if self.make(SourcePhase::welcomed).is_err() {
            return self.end_by(Fault::PeerMisbehaved("it said welcome twice".to_owned()));
        }
        self.window.grant(room);
        self.outputs.push_back(Output::Do(Step::Track));
        self.next_harvest = now;
        self.ask_harvest(now);
    }

    fn held(&mut self, now: Now, through: BatchId, room: Bytes, (left, staging): (PageCount, PageCount)) {
        if through > self.ledger.newest() {
            let text = format!("it holds batch {through}, which was never made");
            return self.end_by(Fault::PeerMisbehaved(text));
        }
        self.ledger.held_through(through);
        self.window.applied(through);
        self.window.grant(room);
        self.staging = (staging > PageCount::ZERO).then_some((left, staging));
        self.maybe_cut_for_staging(now);
        self.progressed(now);
    }

    /// Acknowledgements came in: seeding may be over, a round may be over.
    fn progressed(&mut self, now: Now) {
        if self.phase == SourcePhase::Seeding && self.ledger.seeded() == self.ledger.present() {
            self.make(SourcePhase::seeded).expect("Seeding leads to Following");
            self.consider_stop(now);
        }
        self.next_round(now);
    }

    /// Whether the clock may ask for a harvest.
    fn wants_harvests(&self) -> bool {
        let follows = matches!(self.phase, SourcePhase::Seeding | SourcePhase::Following);
        follows && !self.harvesting && (!self.holds_still() || self.round_is_over())
    }

    /// Whether everything has arrived but what is held back. Whoever rushes does not wait for the last batch; whoever
    /// does not wants to hear what the shadow says to it.
    fn round_is_over(&self) -> bool {
        let left = usize::from(!self.holds_still());
        self.ledger.batches_in_flight() <= left && (self.ledger.owed() == PageCount::ZERO || self.all_held)
    }

    fn ask_harvest(&mut self, now: Now) {
        if !self.harvesting {
            self.asked_harvest = now;
            self.harvesting = true;
            self.outputs.push_back(Output::Do(Step::Harvest));
        }
    }

    fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        match self.phase {
            SourcePhase::Joining => reasons.push("the shadow has not answered yet".to_owned()),
            SourcePhase::Seeding => {
                let seeded = Ratio::of(self.ledger.seeded().0, self.ledger.present().0);
                reasons.push(format!("the first copy is {seeded} done"));
            }
            _ => {}
        }
        if !self.link_up {
            reasons.push("no path to the shadow is up".to_owned());
        }
        reasons.extend(
            self.readiness
                .iter()
                .flatten()
                .map(|reason| format!("the shadow says: {reason}")),
        );
        reasons
    }

    /// Make a move and say so.
    fn make(&mut self, a_move: fn(&mut SourcePhase) -> Result<(), Refused>) -> Result<(), Refused> {
        let from = self.phase;
        a_move(&mut self.phase)?;
        self.outputs
            .push_back(Output::Event(Event::Source { from, to: self.phase }));
        Ok(())
    }

    fn end_by(&mut self, fault: Fault) {
        let text = fault.to_string();
        self.finish(Some(fault), &text);
    }

    /// End the session while the guest is here.
    fn finish(&mut self, fault: Option<Fault>, text: &str) {
        let was_final = self.phase == SourcePhase::Final;
        let cut = self.cut.take();
        if self.ended || self.make(SourcePhase::abandoned).is_err() {
            self.cut = cut;
            return; // already over, or handed over: then only the shadow's or an operator's word ends it
        }
        if let Some(cut) = cut {
            self.undo_cut(&cut);
            self.outputs
                .push_back(Output::Event(Event::CutFailed { text: text.to_owned() }));
        }
        if self.switching.take().is_some() {
            self.outputs
                .push_back(Output::Event(Event::SwitchoverFailed { text: text.to_owned() }));
        }
        self.forget_final();
        if was_final {
            self.ask_resume();
        }
        self.outputs
            .push_back(Output::Send(Message::Goodbye { text: text.to_owned() }));
        self.outputs
            .push_back(Output::Do(Step::Untrack(self.ledger.debt_pages())));
        self.outputs.push_back(Output::End(Outcome::Stayed {
            term: self.term,
            fault,
            text: text.to_owned(),
        }));
        self.ended = true;
    }

    /// The guest comes back after it was given up, in a term above the one that is void now.
    fn take_back(&mut self, text: &str) {
        self.term = self.term.next();
        self.switching = None;
        self.forget_final();
        self.outputs
            .push_back(Output::Event(Event::SwitchoverFailed { text: text.to_owned() }));
        self.ask_resume();
        self.outputs
            .push_back(Output::Do(Step::Untrack(self.ledger.debt_pages())));
        self.outputs.push_back(Output::End(Outcome::Stayed {
            term: self.term,
            fault: None,
            text: text.to_owned(),
        }));
        self.ended = true;
    }

    /// Pages an audit found different are owed whole.
    fn owe_audited(&mut self, now: Now, pages: &[PageId]) {
        self.ledger.owe_pages(now, pages);
        let few = pages.iter().take(8).copied().collect();
        self.outputs.push_back(Output::Event(Event::AuditFailed {
            pages: few,
            count: pages.len(),
        }));
    }
}
