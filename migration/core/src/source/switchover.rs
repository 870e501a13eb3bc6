//! The source's part of a switchover: shrinking the debt, the decision to stop, the final epoch, the commit point.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use umbra_units::{BatchId, Bytes, Epoch, Now, PageCount, PageId, Term};

use super::gathering::Gathering;
use super::stop::{Descent, Verdict, View};
use super::{Outcome, Output, Plan, Source, Step};
use crate::batch::{Close, PageCounts};
use crate::convergence::Outlook;
use crate::digest::Digest;
use crate::error::{Fault, Refused};
use crate::event::Event;
use crate::limits;
use crate::order::Order;
use crate::phase::SourcePhase;
use crate::report::{PauseBreakdown, SwitchoverReport};
use crate::wire::{Message, PrepareTimes};

/// Share of the timeout after which the guest is stopped as soon as the limit allows, however small the debt might get.
const PATIENCE: f64 = 0.5;
/// A round is told of no sooner after the one before.
const ROUND_AT_LEAST: Duration = Duration::from_millis(100);

/// What a switchover must keep to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchoverOptions {
    /// Stop the guest only when the pause is predicted to be at most this. Peers' default.
    pub downtime_limit: Duration,
    /// Give the attempt up when the guest could not be stopped within this time.
    pub timeout: Duration,
    /// Once stopped, run the guest on here if the shadow is not prepared within this time.
    pub pause_limit: Duration,
    /// Have both sides hash all of memory while the guest is stopped, and compare every page. Costs about 0.2 ms per MiB.
    pub audit: bool,
}

impl Default for SwitchoverOptions {
    fn default() -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            timeout: Duration::from_secs(60),
            pause_limit: Duration::from_secs(2),
            audit: false,
        }
    }
}

/// A switchover that was asked for.
#[derive(Debug)]
pub(super) struct Switching {
    options: SwitchoverOptions,
    asked: Now,
    rounds: u32,
    /// When the latest round was told of.
    told: Option<Now>,
    descent: Descent,
    /// Whether harvests come while a round travels, so that nothing is shipped that was written again. Not in rounds,
    /// where that is the point, and not once it no longer helps: then a round must come to its end, after which the
    /// shadow is whole for a moment, however much the guest writes.
    rushes: bool,
    /// Whether it was said that the pause will not come within the limit.
    warned: bool,
    /// The latest reason not to stop, for the day the timeout strikes.
    obstacle: String,
}

/// One attempt at a final epoch, as the plans that wait to be encoded see it: it may be taken back meanwhile, and then
/// the guest runs on under the encoder's hands. What such an encoder copies is still good to follow with, but no cut.
#[derive(Debug, Clone, Default)]
pub struct Attempt(Arc<AtomicBool>);

impl Attempt {
    /// Whether it was taken back. Said before the guest is let run on, so whoever has copied pages and *then* hears no
    /// has copied them from a guest that stood still.
    pub fn is_withdrawn(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    pub(super) fn withdraw(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl PartialEq for Attempt {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Attempt {}

/// A final epoch under way. Moments are `None` until they have come.
#[derive(Debug)]
pub(super) struct Final {
    pub(super) attempt: Attempt,
    predicted: Duration,
    stop_pages: PageCount,
    pub(super) gathering: Gathering,
    closing_batch: Option<BatchId>,
    /// When the closing batch was handed to the link.
    sent: Option<Now>,
    bytes: Bytes,
    counts: PageCounts,
    prepared: Option<(Now, PrepareTimes)>,
    /// Whether this side's audit, if one was asked for, has passed.
    audited: bool,
    gave_up: Option<Now>,
}

impl Final {
    fn new(now: Now, predicted: Duration, stop_pages: PageCount, audit: bool) -> Self {
        Self {
            attempt: Attempt::default(),
            predicted,
            stop_pages,
            gathering: Gathering::new(now),
            closing_batch: None,
            sent: None,
            bytes: Bytes::ZERO,
            counts: PageCounts {
                same: 0,
                zero: 0,
                delta: 0,
                raw: 0,
                dup: 0,
            },
            prepared: None,
            audited: !audit,
            gave_up: None,
        }
    }

    pub(super) fn encoded(&mut self, now: Now, batch: BatchId, bytes: Bytes, counts: PageCounts) {
        self.bytes += bytes;
        self.counts.add(&counts);
        if self.closing_batch == Some(batch) {
            self.sent = Some(now);
        }
    }

    /// Where the pause went, given when the shadow said it runs. Missing moments make empty parts.
    fn breakdown(&self, running: Now, resume_there: Duration) -> PauseBreakdown {
        let gathering = &self.gathering;
        let paused = gathering.paused.unwrap_or(gathering.asked);
        let first = gathering.first_harvest.unwrap_or(paused);
        let saved = gathering.saved.unwrap_or(first);
        let second = gathering.second_harvest.unwrap_or(saved);
        let sent = self.sent.unwrap_or(second);
        let (prepared, times) = self.prepared.unwrap_or_else(|| (sent, PrepareTimes::default()));
        let us = Duration::from_micros;
        let there = us(times.apply_us) + us(times.verify_us) + us(times.restore_us);
        PauseBreakdown {
            stop: paused.since(gathering.asked),
            harvest: first.since(paused) + second.since(saved),
            save: saved.since(first),
            encode: sent.since(second),
            transfer: prepared.since(sent).saturating_sub(there),
            apply: us(times.apply_us),
            verify: us(times.verify_us),
            restore: us(times.restore_us),
            resume: running.since(prepared).max(resume_there),
        }
    }
}

impl Source {
    /// Move the guest to the shadow as soon as the pause is predicted to stay within the limit. One at a time.
    pub fn switchover(&mut self, now: Now, options: SwitchoverOptions) -> Result<(), Refused> {
        if self.switching.is_some() {
            return Err(Refused("a switchover is under way already".to_owned()));
        }
        if !matches!(
            self.phase,
            SourcePhase::Joining | SourcePhase::Seeding | SourcePhase::Following
        ) {
            return Err(Refused(format!("no switchover from the phase `{}`", self.phase)));
        }
        self.outputs.push_back(Output::Event(Event::SwitchoverAsked));
        let obstacle = "nothing was harvested yet".to_owned();
        let descent = Descent::new(now, options.timeout.mul_f64(PATIENCE));
        self.switching = Some(Switching {
            options,
            asked: now,
            rounds: 0,
            told: None,
            descent,
            rushes: self.config.order != Order::Round,
            warned: false,
            obstacle,
        });
        if self.phase == SourcePhase::Following {
            self.ask_harvest(now);
        }
        Ok(())
    }

    /// Take back a switchover that has not reached its commit point; following goes on.
    pub fn cancel_switchover(&mut self) -> Result<(), Refused> {
        match (self.phase, &self.switching) {
            (SourcePhase::HandedOver, _) => Err(Refused("too late: the guest was handed over".to_owned())),
            (_, None) => Err(Refused("no switchover is under way".to_owned())),
            (SourcePhase::Final, _) => {
                self.withdraw("cancelled by an operator");
                Ok(())
            }
            _ => {
                self.give_switchover_up("cancelled by an operator");
                Ok(())
            }
        }
    }

    /// The answer to [`Step::Audit`]: the pages whose memory is not what was shipped.
    pub fn handle_audited(&mut self, now: Now, differing: &[PageId]) {
        if !self.due.audit.came() {
            return; // the guest may have run on before it was compared
        }
        let Some(closing) = &mut self.closing else {
            if !differing.is_empty() {
                self.owe_audited(now, differing);
            }
            return self.cut_audited(now, differing.len());
        };
        if differing.is_empty() {
            closing.audited = true;
            self.maybe_give_up(now);
        } else {
            self.owe_audited(now, differing);
            self.withdraw(&format!(
                "the audit found {} pages that were written but never harvested",
                differing.len()
            ));
        }
    }

    /// When a switchover that has come no further must be given up.
    pub(super) fn switchover_deadline(&self) -> Now {
        match (&self.switching, &self.closing) {
            (Some(switching), Some(closing)) if self.phase == SourcePhase::Final => {
                closing.gathering.asked + switching.options.pause_limit
            }
            (Some(switching), None) => switching.asked + switching.options.timeout,
            _ => Now::NEVER,
        }
    }

    pub(super) fn switchover_overdue(&mut self, _now: Now) {
        let Some(switching) = &self.switching else { return };
        if self.phase == SourcePhase::Final {
            let limit = switching.options.pause_limit;
            self.withdraw(&format!(
                "the shadow was not prepared within the pause limit of {} ms",
                limit.as_millis()
            ));
        } else {
            let text = format!(
                "timeout after {} s: {}",
                switching.options.timeout.as_secs(),
                switching.obstacle
            );
            self.give_switchover_up(&text);
        }
    }

    /// After a harvest while a switchover is wanted: stop now, or go on shrinking the debt?
    pub(super) fn consider_stop(&mut self, now: Now) {
        if self.switching.is_none() || self.phase != SourcePhase::Following || self.harvesting {
            return;
        }
        let reasons = self.reasons();
        let debt = self.ledger.debt();
        let predicted = self.predictor.pause(debt);
        let over = self.round_is_over();
        let cutting = self.is_cutting();
        let Some(switching) = &mut self.switching else { return };
        // Harvests come while a round travels, too. A debt that was shipped is a round; so is a while.
        if over || switching.told.is_none_or(|told| now.since(told) >= ROUND_AT_LEAST) {
            switching.told = Some(now);
            switching.rounds += 1;
            let round = switching.rounds;
            self.outputs
                .push_back(Output::Event(Event::Round { round, debt, predicted }));
        }
        let limit = switching.options.downtime_limit;
        let outlook = self.outlook(now, limit);
        let mature = self.convergence.is_mature(now);
        let between_harvests = self.convergence.curve().within(self.pace.now()).unwrap_or_default();
        let Some(switching) = &mut self.switching else { return };
        let view = View {
            debt,
            pause: predicted,
            limit,
            floor: outlook.floor.filter(|_| mature).map(|floor| (floor.pages, floor.pause)),
            between_harvests,
        };
        let verdict = switching.descent.look(now, view);
        switching.rushes = self.config.order != Order::Round && !switching.descent.has_stalled(now);
        if let Some(reason) = reasons.first() {
            switching.obstacle.clone_from(reason);
            return;
        }
        match verdict {
            Verdict::Stop if cutting => switching.obstacle = "an epoch is being cut".to_owned(),
            Verdict::Stop => self.stop(now, predicted, debt),
            Verdict::Wait => {
                switching.obstacle = format!("{debt} pages are left to send, and fewer with every round");
            }
            Verdict::TooLong => match outlook.warning(limit).filter(|_| mature) {
                Some(text) => self.warn(&outlook, text),
                None => {
                    switching.obstacle = format!(
                        "{debt} pages are left to send, a pause of {} ms where {} ms are allowed",
                        predicted.as_millis(),
                        limit.as_millis()
                    );
                }
            },
        }
    }

    /// The pause will not come within the limit: the operator is told while there is time to do something about it.
    fn warn(&mut self, outlook: &Outlook, text: String) {
        let Some(switching) = &mut self.switching else { return };
        if let Some(floor) = outlook
            .floor
            .filter(|_| !std::mem::replace(&mut switching.warned, true))
        {
            self.outputs.push_back(Output::Event(Event::WillNotConverge {
                floor: floor.pages,
                predicted: floor.pause,
                text: text.clone(),
            }));
        }
        switching.obstacle = text;
    }

    /// Whether a switchover is under way that takes one round after the other.
    pub(super) fn holds_still(&self) -> bool {
        self.switching.as_ref().is_some_and(|switching| !switching.rushes)
    }

    /// Why the switchover under way has not stopped the guest yet.
    pub(super) fn obstacle(&self) -> Option<&str> {
        let switching = self.switching.as_ref().filter(|_| self.closing.is_none())?;
        Some(&switching.obstacle)
    }

    /// The pause that has to be kept: that of the switchover under way, or what deferred pages must fit.
    pub(super) fn promise(&self) -> Duration {
        let wanted = self
            .switching
            .as_ref()
            .map(|switching| switching.options.downtime_limit);
        wanted.unwrap_or(self.config.pause_promise)
    }

    /// After an acknowledgement while a switchover is wanted: harvest again as soon as the last round has arrived.
    pub(super) fn next_round(&mut self, now: Now) {
        if self.switching.is_some() && self.phase == SourcePhase::Following && self.round_is_over() {
            self.ask_harvest(now);
        }
    }

    fn stop(&mut self, now: Now, predicted: Duration, debt: PageCount) {
        let audit = self.switching.as_ref().is_some_and(|switching| switching.options.audit);
        self.make(SourcePhase::stopped).expect("called in Following");
        self.outputs
            .push_back(Output::Event(Event::StopDecided { debt, predicted }));
        self.closing = Some(Final::new(now, predicted, debt, audit));
        self.gather();
    }

    pub(super) fn final_plan(&mut self, now: Now) -> Option<Plan> {
        let audit = self.switching.as_ref().is_some_and(|switching| switching.options.audit);
        let closing = self.closing.as_mut()?;
        if closing.gathering.first_harvest.is_none() || closing.closing_batch.is_some() {
            return None;
        }
        let complete = closing.gathering.is_complete();
        if !complete && self.ledger.owed() == PageCount::ZERO {
            return None;
        }
        let most = PageCount(limits::BATCH_PAGES as u64);
        let state = closing.gathering.state_bytes;
        if !self.window.takes(most.0, state) {
            return None;
        }
        let (batch, pages) = self.ledger.take(now, most, None);
        self.window.planned(batch, pages.len() as u64, state);
        let owed_after = self.ledger.owed();
        let close = if complete && owed_after == PageCount::ZERO {
            closing.closing_batch = Some(batch);
            let records = closing
                .gathering
                .records
                .take()
                .expect("saved before the second harvest");
            if audit {
                self.due.audit.ask();
                self.outputs.push_back(Output::Do(Step::Audit));
            }
            Some(Close {
                digest: Digest::ZEROS,
                audit,
                is_final: true,
                records,
            })
        } else {
            None
        };
        self.unencoded.insert(batch);
        let attempt = self.closing.as_ref().map(|closing| closing.attempt.clone());
        Some(Plan {
            batch,
            epoch: self.epoch,
            pages,
            owed_after,
            urgent: true,
            close,
            captured: false,
            attempt,
        })
    }

    pub(super) fn shadow_prepared(&mut self, now: Now, epoch: Epoch, times: PrepareTimes) {
        if self.phase != SourcePhase::Final || epoch != self.epoch {
            return; // answers a final epoch that was taken back meanwhile
        }
        // The word that the closing batch was sent may come later than the shadow's answer to it: two threads, one link.
        // covered by: a_shadow_may_be_prepared_before_the_source_hears_that_it_sent
        let Some(closing) = self.closing.as_mut().filter(|closing| closing.closing_batch.is_some()) else {
            return self.end_by(Fault::PeerMisbehaved(
                "it is prepared for an epoch that was not closed".to_owned(),
            ));
        };
        closing.prepared = Some((now, times));
        self.maybe_give_up(now);
    }

    fn maybe_give_up(&mut self, now: Now) {
        let Some(closing) = self
            .closing
            .as_mut()
            .filter(|closing| closing.prepared.is_some() && closing.audited)
        else {
            return;
        };
        closing.gave_up = Some(now);
        self.make(SourcePhase::gave_up).expect("Final leads to HandedOver");
        self.term = self.term.next();
        let (epoch, term) = (self.epoch, self.term);
        self.outputs.push_back(Output::Event(Event::GaveUp { epoch, term }));
        // Before "go": the shadow takes hold of the disks as soon as it hears it.
        // covered by: the_disks_are_let_go_of_before_the_shadow_may_run
        self.outputs.push_back(Output::Do(Step::GiveUp));
        self.outputs.push_back(Output::Send(Message::Go { epoch, term }));
    }

    pub(super) fn runs_there(&mut self, now: Now, term: Term, resume_us: u64) {
        if term != self.term || self.phase != SourcePhase::HandedOver {
            return self.end_by(Fault::PeerMisbehaved(format!(
                "it says it runs the guest in term {term}"
            )));
        }
        self.make(SourcePhase::confirmed).expect("HandedOver leads to Done");
        let (Some(switching), Some(closing)) = (&self.switching, &self.closing) else {
            unreachable!("a source that gave up has a switchover and a final epoch")
        };
        let report = SwitchoverReport {
            epoch: self.epoch,
            term,
            total: now.since(switching.asked),
            rounds: switching.rounds,
            predicted: closing.predicted,
            breakdown: closing.breakdown(now, Duration::from_micros(resume_us)),
            stop_pages: closing.stop_pages,
            final_bytes: closing.bytes,
            final_counts: closing.counts,
            audited: switching.options.audit,
        };
        self.outputs.push_back(Output::End(Outcome::Moved(Box::new(report))));
        self.ended = true;
    }

    pub(super) fn declined(&mut self, term: Term, text: &str) {
        if term != self.term || self.make(SourcePhase::handed_back).is_err() {
            return self.end_by(Fault::PeerMisbehaved(format!(
                "it declines term {term}, which it was not given"
            )));
        }
        self.take_back(&format!(
            "the shadow could not start the guest and handed it back: {text}"
        ));
    }

    /// Take the final epoch back and run on here.
    pub(super) fn withdraw(&mut self, text: &str) {
        self.make(SourcePhase::withdrew).expect("called in Final");
        if let (Some(closing), Some(now)) = (&self.closing, self.closing.as_ref().and_then(|closing| closing.sent)) {
            self.predictor
                .measured(&closing.breakdown(now, Duration::ZERO), closing.gathering.state_bytes);
        }
        self.forget_final();
        self.switching = None;
        self.harvesting = false;
        self.ask_resume();
        self.due.forget();
        self.outputs.push_back(Output::Send(Message::Withdraw {
            epoch: self.epoch,
            text: text.to_owned(),
        }));
        self.outputs
            .push_back(Output::Event(Event::SwitchoverFailed { text: text.to_owned() }));
        self.epoch = self.epoch.next();
    }

    /// The final epoch, if one was under way, is over without a handover: the guest may run on here after this.
    pub(super) fn forget_final(&mut self) {
        if let Some(closing) = self.closing.take() {
            closing.attempt.withdraw();
        }
        self.due.forget();
    }

    fn give_switchover_up(&mut self, text: &str) {
        self.switching = None;
        self.outputs
            .push_back(Output::Event(Event::SwitchoverFailed { text: text.to_owned() }));
    }
}
