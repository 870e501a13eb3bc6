//! The shadow: holds the guest's twin, and runs it only when told.
//!
//! A state machine without I/O, the counterpart of [`Source`](crate::source::Source). The node feeds it messages and the
//! results of applying batches ([`Image`]), does its [`Step`]s, and sends what it says.
//!
//! ```text
//!  Listening ─hello▶ Building ▶ Following ─whole, digest equal▶ Preparing ▶ Prepared ─go▶ Starting ▶ Running
//!                                   ▲                              │           │
//!                                   └────────── withdrawn ─────────┴───────────┘
//! ```
//!
//! A shadow runs nothing but the final epoch, verified, after the source gave it up (DESIGN §3.1, §3.3). When the source
//! falls silent while the shadow is prepared, it waits: only a *go* or an operator's word ([`Shadow::vouch`]) starts it.

mod image;
mod kept;
mod sequence;

use std::collections::VecDeque;
use std::time::Duration;

use umbra_units::{BatchId, Bytes, Epoch, Now, PageCount, PageId, Ratio, Term};

pub use image::{Applied, Image, Staged};
pub use sequence::Sequence;

use crate::batch::{Close, PageCounts};
use crate::error::{Fault, Refused};
use crate::event::Event;
use crate::guest::{Space, StateRecord};
use crate::phase::ShadowPhase;
use crate::wire::{Hello, Message, PrepareTimes};

/// How a shadow behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct ShadowConfig {
    /// The share of the guest's pages that must be fresh before the shadow calls itself ready.
    pub complete_at: Ratio,
    /// How long acknowledgements may be gathered into one message.
    pub gather: Duration,
    /// Bytes of batches that may be on their way to this shadow or wait here to be applied.
    pub window: Bytes,
    /// Bytes that may be put aside to keep a committed epoch apart from what comes after it; `None`: a quarter of the
    /// guest's memory, and at least [`LEAST_STAGING`].
    pub staging: Option<Bytes>,
}

impl ShadowConfig {
    /// Bytes that may be put aside for a guest of these spaces.
    pub fn staging_for(&self, spaces: &[Space]) -> Bytes {
        let pages: PageCount = spaces.iter().map(Space::present_pages).sum();
        let quarter = Bytes(pages.0 * umbra_units::PAGE_SIZE as u64 / 4);
        self.staging.unwrap_or_else(|| quarter.max(LEAST_STAGING))
    }
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self {
            complete_at: Ratio::new(0.9).expect("a share"),
            gather: Duration::from_millis(2),
            window: DEFAULT_WINDOW,
            staging: None,
        }
    }
}

/// What may be put aside of a small guest, of which a quarter is soon rewritten.
pub const LEAST_STAGING: Bytes = Bytes::mib(64);

/// As much as the link itself holds for a reader that is behind.
const DEFAULT_WINDOW: Bytes = Bytes::mib(64);

/// So many batches are acknowledged at once without waiting for more.
const GATHERED: u64 = 16;

/// Something the node must do to the guest's twin. Steps are done one after the other, in the order they came; each is
/// answered by the `handle_*` it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Build the twin; its spaces must be these. Answer: [`Shadow::handle_built`].
    Build(StateRecord, Vec<Space>),
    /// Compare memory with the image's table. Answer: [`Shadow::handle_audited`].
    Audit(Epoch),
    /// [Go back](Image::recall) to the committed epoch and load its state. Answer: [`Shadow::handle_recalled`].
    Recall,
    /// Load state. Answer: [`Shadow::handle_restored`].
    Restore(Epoch, Vec<StateRecord>),
    /// [Seal](Image::seal) the image at this epoch, then run. Answer: [`Shadow::handle_resumed`].
    Resume(Epoch),
}

/// What the node must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Say this to the source.
    Send(Message),
    /// Do this to the twin.
    Do(Step),
    /// Tell whoever listens.
    Event(Event),
    /// The session is over.
    End(Outcome),
}

/// How a session ended, for the shadow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs here, in this term.
    Runs(Term),
    /// Nothing runs here; what was received is to be dropped.
    Dropped {
        /// Whose fault it was, if anybody's.
        fault: Option<Fault>,
        /// In words for an operator.
        text: String,
    },
}

/// A shadow's account of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ShadowStatus {
    /// What it is doing.
    pub phase: ShadowPhase,
    /// The source's hello, once there was one.
    pub hello: Option<Hello>,
    /// Share of the guest's pages that are fresh, as far as the shadow knows.
    pub complete: Ratio,
    /// How pages came so far.
    pub counts: PageCounts,
    /// The epoch that was committed last and when, if it can be gone back to.
    pub committed: Option<(Epoch, Now)>,
    /// What is put aside to keep it.
    pub staged: Staged,
    /// Everything that speaks against a switchover now.
    pub reasons: Vec<String>,
}

/// One shadow. See the [module](self).
#[derive(Debug)]
pub struct Shadow {
    config: ShadowConfig,
    phase: ShadowPhase,
    hello: Option<Hello>,
    pages: PageCount,
    /// Pages the source still owed when it made the newest batch that has been applied.
    owed: Option<PageCount>,
    /// Every batch up to this one was applied, and up to that one acknowledged.
    through: BatchId,
    acknowledged: BatchId,
    counts: PageCounts,
    /// When the first batch that is not acknowledged was applied.
    held_since: Option<Now>,
    reasons: Option<Vec<String>>,
    closing: Option<Closing>,
    committed: Option<(Epoch, Now)>,
    staged: Staged,
    /// Going back to the committed epoch, on an operator's word.
    recalling: bool,
    /// It was asked to: nothing follows on what it holds.
    recalled: bool,
    /// The epoch that stands loaded after going back.
    standing: Option<Epoch>,
    /// The newest epoch the source took back: its closing batch may still be on its way.
    withdrawn: Option<Epoch>,
    /// The term this shadow was told to run in.
    told: Option<Term>,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
struct Closing {
    epoch: Epoch,
    close: Close,
    arrived: Now,
    /// When everything was applied; verification begins.
    whole: Option<Now>,
    /// When verification was over; loading state begins.
    verified: Option<Now>,
    times: PrepareTimes,
}

impl Shadow {
    /// A shadow that nobody has spoken to.
    pub fn new(config: ShadowConfig) -> Self {
        Self {
            config,
            phase: ShadowPhase::Listening,
            hello: None,
            pages: PageCount::ZERO,
            owed: None,
            through: BatchId(0),
            acknowledged: BatchId(0),
            counts: PageCounts::default(),
            held_since: None,
            reasons: None,
            closing: None,
            committed: None,
            staged: Staged::default(),
            recalling: false,
            recalled: false,
            standing: None,
            withdrawn: None,
            told: None,
            outputs: VecDeque::new(),
        }
    }

    /// What it is doing.
    pub const fn phase(&self) -> ShadowPhase {
        self.phase
    }

    /// Its account of itself.
    pub fn status(&self) -> ShadowStatus {
        ShadowStatus {
            phase: self.phase,
            hello: self.hello.clone(),
            complete: self.complete(),
            counts: self.counts,
            committed: self.committed,
            staged: self.staged,
            reasons: self.reasons_now(),
        }
    }

    /// The next thing to do, if any.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`handle_time`](Self::handle_time) wants to be called.
    pub fn poll_timeout(&self) -> Now {
        self.held_since.map_or(Now::NEVER, |since| since + self.config.gather)
    }

    /// Time passed.
    pub fn handle_time(&mut self, now: Now) {
        if now >= self.poll_timeout() {
            self.acknowledge();
        }
    }

    /// The source said something.
    pub fn handle_message(&mut self, _now: Now, message: Message) {
        match message {
            Message::Hello(hello) => self.greeted(hello),
            Message::Withdraw { epoch, .. } => self.withdrawn(epoch),
            Message::Go { epoch, term } => self.told(epoch, term),
            Message::Goodbye { text } => self.drop_by(Fault::PeerEnded(text)),
            Message::Welcome { .. }
            | Message::Held { .. }
            | Message::Committed { .. }
            | Message::Uncommitted { .. }
            | Message::Readiness { .. }
            | Message::Prepared { .. }
            | Message::Unprepared { .. }
            | Message::Running { .. }
            | Message::Declined { .. } => {
                self.drop_by(Fault::PeerMisbehaved("it sent what only a shadow says".to_owned()));
            }
        }
    }

    /// The answer to [`Step::Build`]: the twin's spaces.
    pub fn handle_built(&mut self, built: Result<Vec<Space>, Fault>) {
        let Some(hello) = &self.hello else { return };
        let spaces = match built {
            Ok(spaces) if spaces == hello.spaces => spaces,
            Ok(_) => {
                let text = "the twin's memory is laid out differently from the guest's";
                return self.drop_by(Fault::PeerIncompatible(text.to_owned()));
            }
            Err(fault) => return self.drop_by(fault),
        };
        let Ok(version) = hello.choose_version() else {
            unreachable!("checked when it was greeted")
        };
        if self.make(ShadowPhase::built).is_ok() {
            self.pages = spaces.iter().map(Space::present_pages).sum();
            let room = self.config.window;
            self.outputs.push_back(Output::Send(Message::Welcome { version, room }));
        }
    }

    /// A batch that `arrived` then was applied by now. Batches are applied in the order of their numbers: see [`Sequence`].
    pub fn handle_applied(&mut self, now: Now, arrived: Now, applied: Applied) {
        self.counts.add(&applied.counts);
        self.through = applied.id;
        self.owed = Some(PageCount(applied.owed));
        self.staged = applied.staged;
        self.held_since.get_or_insert(now);
        // The source only goes on to the next epoch when it has taken back the last: its word to say so may be late.
        // covered by: a_page_of_the_next_epoch_takes_the_last_one_back
        if let Some(last) = applied.epoch.0.checked_sub(1) {
            self.withdrawn(Epoch(last));
        }
        if self.phase == ShadowPhase::Following {
            // covered by: a_closing_batch_that_arrives_after_its_withdrawal_prepares_nothing
            if let Some(close) = applied
                .close
                .filter(|_| self.withdrawn.is_none_or(|epoch| applied.epoch > epoch))
            {
                self.closing = Some(Closing {
                    epoch: applied.epoch,
                    close,
                    arrived,
                    whole: None,
                    verified: None,
                    times: PrepareTimes::default(),
                });
                self.whole(now, applied.digest);
            }
            self.judge();
        }
        if let Some(epoch) = applied.given_up {
            self.given_up(epoch);
        }
        if let Some(epoch) = applied.committed {
            self.committed = Some((epoch, now));
            self.acknowledge();
            self.outputs.push_back(Output::Send(Message::Committed { epoch }));
            self.outputs.push_back(Output::Event(Event::Committed { epoch }));
        }
        if self.through.0 - self.acknowledged.0 >= GATHERED {
            self.acknowledge();
        }
    }

    /// A batch could not be applied: it was not what a correct source sends, or this host failed.
    pub fn handle_failed(&mut self, fault: Fault) {
        self.drop_by(fault);
    }

    /// The answer to [`Step::Audit`]: the pages whose memory is not what was applied.
    pub fn handle_audited(&mut self, now: Now, epoch: Epoch, differing: &[PageId]) {
        if let (Some(first), true) = (differing.first(), self.is_preparing(epoch)) {
            let text = format!(
                "the audit found {} pages that differ from what was applied, {first} first",
                differing.len()
            );
            return self.drop_by(Fault::Host(text));
        }
        if self.is_preparing(epoch) {
            self.restore(now);
        }
    }

    /// The answer to [`Step::Restore`].
    pub fn handle_restored(&mut self, now: Now, epoch: Epoch, restored: Result<(), Fault>) {
        if !self.is_preparing(epoch) {
            return; // the epoch was taken back while its state was loading
        }
        if let Err(fault) = restored {
            self.make(ShadowPhase::withdrawn)
                .expect("Preparing leads back to Following");
            self.closing = None;
            return self.outputs.push_back(Output::Send(Message::Unprepared {
                epoch,
                text: fault.to_string(),
            }));
        }
        let closing = self.closing.as_mut().expect("preparing an epoch that was closed");
        closing.times.restore_us = micros(closing.verified, now);
        let times = closing.times;
        self.make(ShadowPhase::prepared).expect("Preparing leads to Prepared");
        self.outputs.push_back(Output::Send(Message::Prepared { epoch, times }));
    }

    /// The answer to [`Step::Resume`]; `took` is how long starting took.
    pub fn handle_resumed(&mut self, resumed: Result<Duration, Fault>) {
        let term = self.told.expect("resumed because it was told to");
        match resumed {
            Ok(took) => {
                self.make(ShadowPhase::started).expect("Starting leads to Running");
                let resume_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                self.outputs
                    .push_back(Output::Send(Message::Running { term, resume_us }));
                self.outputs.push_back(Output::End(Outcome::Runs(term)));
            }
            Err(fault) => {
                self.make(ShadowPhase::declined).expect("Starting leads to Abandoned");
                let text = fault.to_string();
                self.outputs.push_back(Output::Send(Message::Declined {
                    term,
                    text: text.clone(),
                }));
                self.outputs.push_back(Output::End(Outcome::Dropped {
                    fault: Some(fault),
                    text,
                }));
            }
        }
    }

    /// The answer to [`Step::Recall`]: the epoch that stands loaded now.
    pub fn handle_recalled(&mut self, recalled: Result<Epoch, Fault>) {
        if !self.recalling || self.phase != ShadowPhase::Preparing {
            return; // the session ended meanwhile
        }
        self.recalling = false;
        match recalled {
            Ok(epoch) => {
                self.standing = Some(epoch);
                self.make(ShadowPhase::prepared).expect("Preparing leads to Prepared");
                self.make(ShadowPhase::vouched).expect("Prepared leads to Starting");
                self.start(self.vouched_term());
            }
            Err(fault) => {
                // The epoch is still kept: an operator may try again.
                self.make(ShadowPhase::withdrawn)
                    .expect("Preparing leads back to Following");
                let text = fault.to_string();
                self.outputs.push_back(Output::Event(Event::RecallFailed { text }));
            }
        }
    }

    /// Whether what it holds may be the only copy of its guest: then it waits for an operator, and for nobody else.
    pub const fn is_precious(&self) -> bool {
        match self.phase {
            ShadowPhase::Preparing | ShadowPhase::Prepared | ShadowPhase::Starting => true,
            ShadowPhase::Following => self.committed.is_some(),
            _ => false,
        }
    }

    /// Whether batches are still applied: not once it went back to its committed epoch.
    pub const fn takes_batches(&self) -> bool {
        !self.recalled
    }

    /// The source will never be heard of again on this link. A shadow that stands prepared, or has committed an epoch, waits
    /// for an operator.
    pub fn handle_link_lost(&mut self, text: &str) {
        if !self.is_precious() {
            self.drop_by(Fault::PeerEnded(text.to_owned()));
        }
    }

    /// The last path went down, or the first came up.
    pub fn handle_link_up(&mut self, up: bool) {
        self.outputs
            .push_back(Output::Event(if up { Event::LinkUp } else { Event::LinkDown }));
    }

    /// An operator vouches that the source is dead and will not return: run the final epoch that stands prepared, or the last
    /// one that was committed.
    pub fn vouch(&mut self) -> Result<(), Refused> {
        if self.phase == ShadowPhase::Following {
            if self.committed.is_none() {
                return Err(Refused(
                    "no epoch is committed: what it holds is a mixture that cannot run".to_owned(),
                ));
            }
            self.make(ShadowPhase::recalled)?;
            (self.recalling, self.recalled) = (true, true);
            self.closing = None;
            self.outputs.push_back(Output::Do(Step::Recall));
            return Ok(());
        }
        self.make(ShadowPhase::vouched)?;
        self.start(self.vouched_term());
        Ok(())
    }

    fn vouched_term(&self) -> Term {
        // The next term may have been given to us before the source died, and the one after it is what a source takes when
        // an operator vouches on that side (`Source::reclaim`): two wrong words must not give two guests one term.
        let hello = self.hello.as_ref().expect("prepared for somebody");
        hello.term.next().next().next()
    }

    /// End the session from this side.
    pub fn end(&mut self, text: &str) -> Result<(), Refused> {
        if matches!(self.phase, ShadowPhase::Starting | ShadowPhase::Running) {
            return Err(Refused("the guest runs here".to_owned()));
        }
        self.drop_session(None, text);
        Ok(())
    }

    fn greeted(&mut self, hello: Hello) {
        if self.phase != ShadowPhase::Listening {
            return self.drop_by(Fault::PeerMisbehaved("it said hello twice".to_owned()));
        }
        if let Err(text) = hello.choose_version() {
            return self.drop_by(Fault::PeerIncompatible(text));
        }
        self.make(ShadowPhase::greeted).expect("Listening leads to Building");
        self.outputs
            .push_back(Output::Do(Step::Build(hello.description.clone(), hello.spaces.clone())));
        self.hello = Some(hello);
    }

    /// The final epoch is whole: verify it and load its state.
    fn whole(&mut self, now: Now, digest: crate::digest::Digest) {
        let Some(closing) = &mut self.closing else { return };
        closing.whole = Some(now);
        closing.times.apply_us = micros(Some(closing.arrived), now);
        let (epoch, close) = (closing.epoch, closing.close.clone());
        if digest != close.digest {
            let text = format!(
                "the digest of epoch {epoch} is {digest} here and {} at the source",
                close.digest
            );
            return self.drop_by(Fault::PeerMisbehaved(text));
        }
        self.make(ShadowPhase::verified).expect("called in Following");
        self.acknowledge();
        if close.audit {
            self.outputs.push_back(Output::Do(Step::Audit(epoch)));
        } else {
            self.restore(now);
        }
    }

    fn restore(&mut self, now: Now) {
        let closing = self.closing.as_mut().expect("preparing an epoch that was closed");
        closing.verified = Some(now);
        closing.times.verify_us = micros(closing.whole, now);
        let records = std::mem::take(&mut closing.close.records);
        self.outputs
            .push_back(Output::Do(Step::Restore(closing.epoch, records)));
    }

    fn is_preparing(&self, epoch: Epoch) -> bool {
        self.phase == ShadowPhase::Preparing && self.closing.as_ref().is_some_and(|closing| closing.epoch == epoch)
    }

    /// The source took back every epoch up to this one.
    fn withdrawn(&mut self, epoch: Epoch) {
        self.withdrawn = self.withdrawn.max(Some(epoch));
        // covered by: a_late_withdrawal_of_an_old_epoch_leaves_the_next_alone
        if self.closing.as_ref().is_some_and(|closing| closing.epoch <= epoch) {
            if matches!(self.phase, ShadowPhase::Preparing | ShadowPhase::Prepared) {
                self.make(ShadowPhase::withdrawn).expect("checked just now");
            }
            // A shadow that starts on an operator's word keeps to what it was told.
            if self.phase == ShadowPhase::Following {
                self.closing = None;
            }
        }
    }

    fn told(&mut self, epoch: Epoch, term: Term) {
        let mine = self.closing.as_ref().is_some_and(|closing| closing.epoch == epoch);
        let newer = self.hello.as_ref().is_some_and(|hello| term > hello.term);
        if !mine || !newer || self.make(ShadowPhase::told).is_err() {
            let text = format!("it said go for epoch {epoch} in term {term}, which does not follow");
            return self.drop_by(Fault::PeerMisbehaved(text));
        }
        self.start(term);
    }

    fn start(&mut self, term: Term) {
        self.told = Some(term);
        let closing = self.closing.as_ref().map(|closing| closing.epoch);
        let epoch = closing
            .or(self.standing)
            .expect("prepared for an epoch that was closed");
        self.outputs.push_back(Output::Do(Step::Resume(epoch)));
    }

    fn acknowledge(&mut self) {
        self.held_since = None;
        if self.acknowledged < self.through {
            self.acknowledged = self.through;
            self.outputs.push_back(Output::Send(Message::Held {
                through: self.through,
                room: self.config.window,
                left: self.staged.most - self.staged.used,
                staging: if self.staged.keeps {
                    self.staged.most
                } else {
                    PageCount::ZERO
                },
            }));
        }
    }

    fn given_up(&mut self, epoch: Epoch) {
        self.committed = None;
        let staging = Bytes(self.staged.most.0 * umbra_units::PAGE_SIZE as u64);
        let text = format!("more than the {staging} of staging changed since it was committed");
        self.outputs.push_back(Output::Send(Message::Uncommitted {
            epoch,
            text: text.clone(),
        }));
        self.outputs
            .push_back(Output::Event(Event::EpochGivenUp { epoch, text }));
    }

    fn complete(&self) -> Ratio {
        match self.owed {
            None => Ratio::NONE,
            Some(owed) => Ratio::of(self.pages.0.saturating_sub(owed.0), self.pages.0),
        }
    }

    fn reasons_now(&self) -> Vec<String> {
        let complete = self.complete();
        if complete < self.config.complete_at {
            vec![format!("{complete} complete, {} wanted", self.config.complete_at)]
        } else {
            Vec::new()
        }
    }

    /// Say so when the verdict on a switchover changes.
    fn judge(&mut self) {
        let reasons = self.reasons_now();
        let verdict_changed = self
            .reasons
            .as_ref()
            .is_none_or(|before| before.is_empty() != reasons.is_empty());
        if verdict_changed {
            let owed = self.owed.unwrap_or(self.pages);
            let fresh = PageCount(self.pages.0.saturating_sub(owed.0));
            self.outputs.push_back(Output::Send(Message::Readiness {
                fresh,
                reasons: reasons.clone(),
            }));
            self.outputs.push_back(Output::Event(Event::ReadinessChanged {
                reasons: reasons.clone(),
            }));
            self.reasons = Some(reasons);
        }
    }

    fn make(&mut self, a_move: fn(&mut ShadowPhase) -> Result<(), Refused>) -> Result<(), Refused> {
        let from = self.phase;
        a_move(&mut self.phase)?;
        self.outputs
            .push_back(Output::Event(Event::Shadow { from, to: self.phase }));
        Ok(())
    }

    fn drop_by(&mut self, fault: Fault) {
        let text = fault.to_string();
        self.drop_session(Some(fault), &text);
    }

    /// End the session; what was received will never run.
    fn drop_session(&mut self, fault: Option<Fault>, text: &str) {
        if self.make(ShadowPhase::abandoned).is_err() {
            return; // already over, or starting: then the guest is, or is about to be, ours
        }
        self.closing = None;
        self.outputs
            .push_back(Output::Send(Message::Goodbye { text: text.to_owned() }));
        self.outputs.push_back(Output::End(Outcome::Dropped {
            fault,
            text: text.to_owned(),
        }));
    }
}

fn micros(from: Option<Now>, to: Now) -> u64 {
    from.map_or(0, |from| u64::try_from(to.since(from).as_micros()).unwrap_or(u64::MAX))
}
