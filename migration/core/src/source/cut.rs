//! An epoch after which the guest runs on.
//!
//! ```text
//!  Settling ──▶ Draining ──▶ Stopped ───────────────────────────────▶ Shipping ──▶ Closed ──▶ committed
//!  ship what    what was     pause, harvest, save, harvest, capture,   the cut's    the shadow
//!  is settled   planned is   resume                                    pages, as    verifies
//!               encoded                                                captured
//! ```
//!
//! # Nothing newer than the cut is in it
//!
//! An epoch is everything shipped up to its closing batch, so every page of it must have been copied before the guest ran
//! on. Two rules see to that. A page that was planned before the pause is copied before it too: while [`Stage::Draining`]
//! nothing is planned, and the pause is asked for only when every plan has been encoded. A page of the cut is read from what
//! was captured in the pause, never from the guest: [`Plan::captured`](super::Plan::captured). What is written after the
//! cut is owed beside it, and nothing of it is planned before the closing batch is. No digest would find a page that broke
//! this: it compares what was sent with what was applied.
//!
//! # A cut that fails
//!
//! Until its closing batch is planned a cut can be taken back: the guest runs on, what was captured and not shipped is owed
//! like anything else, and what was shipped is a part of whatever epoch comes. After that it is the shadow's to commit.

use std::fmt;
use std::time::Duration;

use umbra_units::{BatchId, Bytes, Epoch, Now, PageCount};

use super::gathering::Gathering;
use super::{Output, Plan, Source, Step};
use crate::batch::{Close, PageCounts};
use crate::digest::Digest;
use crate::error::{Fault, Refused};
use crate::event::Event;
use crate::guest::CaptureBy;
use crate::limits;
use crate::phase::SourcePhase;
use crate::report::{CutPause, CutReport};

/// With no more than this left to send, the cut is as small as it gets.
const SETTLED: PageCount = PageCount(64);
/// A harvest that does not shrink the debt below this share of the last is the last one waited for.
const WORTH_WAITING: f64 = 0.8;
/// After a cut that the source wanted itself and that failed, until it wants another.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// What a cut must keep to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutOptions {
    /// How long pages that have settled may be shipped first, so that few are left for the pause.
    pub settle: Duration,
    /// Give the cut up if its last page could not be handed to the link within this time.
    pub timeout: Duration,
    /// Whether somebody waits for it: its batches travel with parity.
    pub urgent: bool,
    /// How the pages of the cut are kept while the guest runs on; `None`: as the guest thinks best.
    pub capture: Option<CaptureBy>,
    /// Have both sides hash all of memory while the guest stands still, and compare every page. For tests and doubts:
    /// the pause grows by about 0.2 ms per MiB.
    pub audit: bool,
}

impl Default for CutOptions {
    fn default() -> Self {
        Self {
            settle: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
            urgent: false,
            capture: None,
            audit: false,
        }
    }
}

/// Why an epoch is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutReason {
    /// Somebody asked.
    Asked,
    /// The shadow has little room left to keep its committed epoch apart from what has come since.
    Staging,
}

impl fmt::Display for CutReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asked => "asked for",
            Self::Staging => "staging at the shadow is nearly full",
        })
    }
}

/// The last epoch that the shadow committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommittedEpoch {
    /// Which.
    pub epoch: Epoch,
    /// The instant it is of: when the guest had stopped.
    pub at: Now,
    /// The account of its cut.
    pub report: CutReport,
}

/// A cut under way.
#[derive(Debug)]
pub(super) struct Cut {
    options: CutOptions,
    reason: CutReason,
    asked: Now,
    stage: Stage,
    /// What was left to send at the latest harvest.
    latest: Option<PageCount>,
    pub(super) gathering: Option<Gathering>,
    captured: Option<(Now, CaptureBy)>,
    resume_asked: bool,
    resumed: Option<Now>,
    /// Whether this side's audit, if one was asked for, has passed.
    audited: bool,
    audit_asked: bool,
    pages: PageCount,
    first_batch: Option<BatchId>,
    bytes: Bytes,
    /// Its number, once the closing batch is planned.
    closed: Option<Epoch>,
}

/// How far a cut has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Pages that have settled are shipped.
    Settling,
    /// Nothing more is planned; what was planned is being encoded.
    Draining,
    /// The guest stands, or is just about to run on.
    Stopped,
    /// The pages of the cut are being shipped, as they were captured.
    Shipping,
    /// All of it is planned; the shadow has yet to say that it committed it.
    Closed,
}

impl Cut {
    /// Whether all of it is the shadow's to commit.
    pub(super) const fn is_closed(&self) -> bool {
        self.closed.is_some()
    }
}

impl Source {
    /// Cut an epoch: a consistent state of the guest that the shadow commits whole, while the guest runs on. One at a time.
    pub fn cut(&mut self, now: Now, options: CutOptions) -> Result<(), Refused> {
        if self.switching.is_some() {
            return Err(Refused("no cut: a switchover is under way".to_owned()));
        }
        if let Some(cut) = &self.cut {
            return Err(Refused(match cut.closed {
                Some(epoch) => format!("no cut: the shadow has not committed epoch {epoch} yet"),
                None => "a cut is under way already".to_owned(),
            }));
        }
        if self.phase != SourcePhase::Following {
            return Err(Refused(format!("no cut in the phase `{}`", self.phase)));
        }
        if self.cuts_held {
            return Err(Refused("no cut: somebody else stops the guest".to_owned()));
        }
        if !self.link_up {
            return Err(Refused("no cut: no path to the shadow is up".to_owned()));
        }
        self.begin_cut(now, options, CutReason::Asked);
        Ok(())
    }

    /// Somebody else is about to stop the guest, or to let it run: until they are done nothing here does, and a cut that
    /// could is taken back. They may begin once [`is_hands_off`](Self::is_hands_off).
    pub fn hold_cuts(&mut self, now: Now, hold: bool) {
        self.cuts_held = hold;
        if hold && self.cut_stage().is_some_and(|stage| stage < Stage::Shipping) {
            self.fail_cut(now, "somebody else stops the guest");
        }
    }

    /// Whether no step that stops the guest or lets it run is still to be answered.
    pub const fn is_hands_off(&self) -> bool {
        self.due.is_hands_off() && !matches!(self.phase, SourcePhase::Cutting | SourcePhase::Final)
    }

    /// Take back a cut whose last page has not been planned; following goes on.
    pub fn cancel_cut(&mut self, now: Now) -> Result<(), Refused> {
        match &self.cut {
            None => Err(Refused("no cut is under way".to_owned())),
            Some(Cut {
                closed: Some(epoch), ..
            }) => Err(Refused(format!("too late: all of epoch {epoch} is on its way"))),
            Some(_) => {
                self.fail_cut(now, "cancelled by an operator");
                Ok(())
            }
        }
    }

    fn begin_cut(&mut self, now: Now, options: CutOptions, reason: CutReason) {
        let epoch = self.epoch;
        self.outputs.push_back(Output::Event(Event::CutBegan { epoch, reason }));
        self.cut = Some(Cut {
            audited: !options.audit,
            options,
            reason,
            asked: now,
            stage: Stage::Settling,
            latest: None,
            gathering: None,
            captured: None,
            resume_asked: false,
            resumed: None,
            audit_asked: false,
            pages: PageCount::ZERO,
            first_batch: None,
            bytes: Bytes::ZERO,
            closed: None,
        });
        self.ask_harvest(now);
    }

    /// Whether a cut is under way that is not the shadow's yet.
    pub(super) fn is_cutting(&self) -> bool {
        self.cut.as_ref().is_some_and(|cut| !cut.is_closed())
    }

    /// No path is left: a cut that has not captured its pages waits for nothing good.
    pub(super) fn cut_without_link(&mut self, now: Now) {
        if self.cut_stage().is_some_and(|stage| stage < Stage::Shipping) {
            self.fail_cut(now, "no path to the shadow is up");
        }
    }

    pub(super) fn cut_stage(&self) -> Option<Stage> {
        self.cut.as_ref().map(|cut| cut.stage)
    }

    /// After a harvest while pages settle: is it worth waiting for another?
    pub(super) fn consider_cut(&mut self, now: Now) {
        let debt = self.ledger.debt();
        let Some(cut) = self.cut.as_mut().filter(|cut| cut.stage == Stage::Settling) else {
            return;
        };
        #[expect(clippy::cast_precision_loss, reason = "a threshold")]
        let shrinks = cut
            .latest
            .is_none_or(|latest| (debt.0 as f64) < latest.0 as f64 * WORTH_WAITING);
        cut.latest = Some(debt);
        if debt <= SETTLED || !shrinks || now >= cut.asked + cut.options.settle {
            cut.stage = Stage::Draining;
            self.maybe_stop_for_cut(now);
        }
    }

    /// Stop the guest once nothing is left that was planned and not yet copied.
    // covered by: a_page_planned_before_the_pause_is_copied_before_it
    pub(super) fn maybe_stop_for_cut(&mut self, now: Now) {
        if !self.unencoded.is_empty() {
            return;
        }
        let Some(cut) = self.cut.as_mut().filter(|cut| cut.stage == Stage::Draining) else {
            return;
        };
        cut.stage = Stage::Stopped;
        cut.gathering = Some(Gathering::new(now));
        self.make(SourcePhase::stopped_to_cut).expect("cuts begin in Following");
        self.gather();
    }

    /// Everything was gathered: keep the pages of the cut as they are, and let the guest run on.
    pub(super) fn maybe_capture(&mut self) {
        let Some(cut) = self.cut.as_mut().filter(|cut| cut.stage == Stage::Stopped) else {
            return;
        };
        if !cut.gathering.as_ref().is_some_and(Gathering::is_complete) {
            return;
        }
        let pages = self.ledger.set_aside();
        cut.pages = pages.count();
        self.due.capture.ask();
        let resume = cut.audited;
        self.outputs
            .push_back(Output::Do(Step::Capture(pages, cut.options.capture)));
        cut.resume_asked = resume;
        // Asked in one breath: the guest waits for nobody's answer.
        if resume {
            self.ask_resume();
        }
    }

    /// The answer to [`Step::Capture`]. Whether it is wanted: pages captured for a cut that was taken back meanwhile are let
    /// go of at once, because no [`Step::Release`] comes after them.
    // covered by: pages_captured_for_a_cut_that_was_taken_back_are_not_wanted
    #[must_use]
    pub fn handle_captured(&mut self, now: Now, by: CaptureBy) -> bool {
        if !self.due.capture.came() {
            return false;
        }
        match self.cut.as_mut().filter(|cut| cut.stage == Stage::Stopped) {
            Some(cut) => {
                cut.captured = Some((now, by));
                cut.stage = Stage::Shipping;
                true
            }
            None => false,
        }
    }

    /// The answer to [`Step::Resume`].
    pub fn handle_resumed(&mut self, now: Now) {
        if !self.due.resume.came() || self.phase != SourcePhase::Cutting {
            return;
        }
        if let Some(cut) = &mut self.cut {
            cut.resumed = Some(now);
        }
        self.make(SourcePhase::ran_on).expect("Cutting leads back to Following");
        self.next_harvest = now + self.pace.now();
    }

    /// The next batch of the cut: pages as they were captured, and at last what closes the epoch.
    pub(super) fn cut_plan(&mut self) -> Option<Plan> {
        let batch_pages = self.config.batch_pages;
        let cut = self.cut.as_mut().filter(|cut| cut.stage == Stage::Shipping)?;
        if self.ledger.aside() == PageCount::ZERO && !cut.audited && cut.audit_asked {
            return None;
        }
        let most = if cut.options.urgent {
            PageCount(limits::BATCH_PAGES as u64)
        } else {
            batch_pages
        };
        let gathering = cut.gathering.as_mut().expect("gathered before it was captured");
        let state = gathering.state_bytes;
        if !self.window.takes(most.0, state) {
            return None;
        }
        let urgent = cut.options.urgent;
        let audit = cut.options.audit;
        let (batch, pages) = self.ledger.take_aside(most);
        cut.first_batch.get_or_insert(batch);
        self.window.planned(batch, pages.len() as u64, state);
        let left = self.ledger.aside();
        let mut close = None;
        if left == PageCount::ZERO && cut.audited {
            close = Some(Close {
                digest: Digest::ZEROS,
                audit,
                is_final: false,
                records: gathering.records.take().expect("saved before it was captured"),
            });
            cut.closed = Some(self.epoch);
            cut.stage = Stage::Closed;
        } else if left == PageCount::ZERO {
            // The encoder compares when it has encoded this batch; what closes the epoch waits for its word.
            cut.audit_asked = true;
            self.due.audit.ask();
        }
        let epoch = self.epoch;
        if close.is_some() {
            self.epoch = epoch.next();
            self.outputs.push_back(Output::Do(Step::Release));
        } else if left == PageCount::ZERO {
            self.outputs.push_back(Output::Do(Step::Audit));
        }
        self.unencoded.insert(batch);
        Some(Plan {
            batch,
            epoch,
            pages,
            owed_after: left + self.ledger.owed(),
            urgent,
            close,
            captured: true,
            attempt: None,
        })
    }

    /// A batch was encoded: it may be the cut's.
    pub(super) fn cut_encoded(&mut self, batch: BatchId, bytes: Bytes, _counts: &PageCounts) {
        if let Some(cut) = &mut self.cut
            && cut.first_batch.is_some_and(|first| batch >= first)
        {
            cut.bytes += bytes;
        }
    }

    /// This side's audit of a cut has passed, or not.
    pub(super) fn cut_audited(&mut self, now: Now, differing: usize) {
        let Some(cut) = &mut self.cut else { return };
        if differing == 0 {
            cut.audited = true;
            cut.resume_asked = true;
            self.ask_resume();
        } else {
            self.fail_cut(
                now,
                &format!("the audit found {differing} pages that were written but never harvested"),
            );
        }
    }

    /// When a cut that has come no further must be looked at.
    pub(super) fn cut_deadline(&self) -> Now {
        let Some(cut) = &self.cut else { return Now::NEVER };
        match cut.stage {
            Stage::Settling => cut.asked + cut.options.settle.min(cut.options.timeout),
            Stage::Draining | Stage::Stopped | Stage::Shipping => cut.asked + cut.options.timeout,
            Stage::Closed => Now::NEVER,
        }
    }

    pub(super) fn cut_overdue(&mut self, now: Now) {
        let Some(cut) = &mut self.cut else { return };
        if now >= cut.asked + cut.options.timeout {
            let seconds = cut.options.timeout.as_secs();
            self.fail_cut(now, &format!("timeout after {seconds} s"));
        } else if cut.stage == Stage::Settling {
            cut.stage = Stage::Draining;
            self.maybe_stop_for_cut(now);
        }
    }

    /// Take the cut back: the guest runs on, and nothing that was captured is forgotten.
    // covered by: a_cut_that_fails_anywhere_leaves_the_guest_running_and_loses_no_write
    pub(super) fn fail_cut(&mut self, now: Now, text: &str) {
        let Some(cut) = self.cut.take() else { return };
        if self.phase == SourcePhase::Cutting {
            self.make(SourcePhase::ran_on).expect("Cutting leads back to Following");
            self.harvesting = false;
            self.next_harvest = now;
        }
        self.undo_cut(&cut);
        self.ledger.owe_aside(now);
        if cut.reason == CutReason::Staging {
            self.no_cut_before = now + TRY_AGAIN;
        }
        self.outputs
            .push_back(Output::Event(Event::CutFailed { text: text.to_owned() }));
    }

    /// Let the guest run on and let go of what was captured, whoever ends the cut.
    pub(super) fn undo_cut(&mut self, cut: &Cut) {
        self.due.forget();
        if cut.stage >= Stage::Stopped && cut.stage < Stage::Closed {
            if !cut.resume_asked {
                self.ask_resume();
                self.due.forget();
            }
            self.outputs.push_back(Output::Do(Step::Release));
        }
    }

    /// The shadow committed an epoch.
    pub(super) fn committed(&mut self, now: Now, epoch: Epoch) {
        let Some(cut) = self.cut.take_if(|cut| cut.closed == Some(epoch)) else {
            let text = format!("it committed epoch {epoch}, which was not closed");
            return self.end_by(Fault::PeerMisbehaved(text));
        };
        let gathering = cut.gathering.expect("gathered before it was closed");
        let (captured, by) = cut.captured.expect("captured before it was closed");
        let paused = gathering.paused.unwrap_or(gathering.asked);
        let first = gathering.first_harvest.unwrap_or(paused);
        let saved = gathering.saved.unwrap_or(first);
        let second = gathering.second_harvest.unwrap_or(saved);
        let report = CutReport {
            epoch,
            reason: cut.reason,
            pause: CutPause {
                stop: paused.since(gathering.asked),
                harvest: first.since(paused) + second.since(saved),
                save: saved.since(first),
                capture: captured.since(second),
                resume: cut.resumed.unwrap_or(captured).since(captured),
            },
            by,
            pages: cut.pages,
            bytes: cut.bytes,
            settle: gathering.asked.since(cut.asked),
            total: now.since(cut.asked),
            audited: cut.options.audit,
        };
        self.committed = Some(CommittedEpoch {
            epoch,
            at: paused,
            report,
        });
        self.outputs.push_back(Output::Event(Event::Cut(Box::new(report))));
    }

    /// The shadow had to give its committed epoch up.
    pub(super) fn given_up(&mut self, epoch: Epoch, text: String) {
        if self.committed.is_some_and(|committed| committed.epoch <= epoch) {
            self.committed = None;
        }
        self.outputs
            .push_back(Output::Event(Event::EpochGivenUp { epoch, text }));
    }

    /// When the shadow's staging is half full an epoch is cut, so that following goes on.
    // covered by: a_shadow_with_little_staging_makes_the_source_cut_by_itself
    pub(super) fn maybe_cut_for_staging(&mut self, now: Now) {
        let nearly_full = self.staging.is_some_and(|(left, most)| left.0 * 2 <= most.0);
        let free = self.cut.is_none() && self.switching.is_none() && self.phase == SourcePhase::Following;
        if nearly_full && free && self.link_up && !self.cuts_held && now >= self.no_cut_before {
            let options = CutOptions {
                settle: Duration::ZERO,
                ..CutOptions::default()
            };
            self.begin_cut(now, options, CutReason::Staging);
        }
    }

    /// How many of `most` pages may be shipped now, that the shadow must keep apart from its committed epoch: a quarter of
    /// its room is left for the next cut. A switchover is worth more than the committed epoch.
    pub(super) fn staging_takes(&self, most: PageCount) -> PageCount {
        match self.staging {
            Some((left, room)) if self.switching.is_none() => {
                PageCount(left.0.saturating_sub(self.window.pages() + room.0 / 4)).min(most)
            }
            _ => most,
        }
    }
}
