//! The two ends of a session, as a node drives them: the loops of `vmm/node` with drawn times instead of threads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use umbra_core::batch::Batch;
use umbra_core::error::Fault;
use umbra_core::event::Event;
use umbra_core::guest::{Captured, Guest, Harvest, PageReader, Space, StateRecord};
use umbra_core::phase::{ShadowPhase, SourcePhase};
use umbra_core::predict::LinkFacts;
use umbra_core::shadow::{self, Applied, Image, Sequence, Shadow};
use umbra_core::source::{self, Encoder, Plan, Source, StepKind};
use umbra_core::wire::Message;
use umbra_paths::Class;
use umbra_units::{Epoch, Now, PageId, Ratio, Rng, Term};

use crate::carrier::{Arrival, Carrier, End};
use crate::conditions::{Conditions, Host, Moment};
use crate::guest::{FakeGuest, Life};
use crate::hand::{Due, Hand};
use crate::oracle::Oracle;
use crate::trace::Trace;

/// As in the node: one batch under way and the next ones ready.
const ENCODE_AHEAD: usize = 3;
/// Batches that wait to be applied before the link is read no further.
const APPLY_AHEAD: usize = 4;

/// What the ends need of the world for a moment.
pub(crate) struct Around<'a> {
    pub(crate) now: Now,
    pub(crate) conditions: &'a Conditions,
    /// Whether steps may still fail.
    pub(crate) wild: bool,
    pub(crate) rng: &'a mut Rng,
    pub(crate) carrier: &'a mut dyn Carrier,
    pub(crate) oracle: &'a mut Oracle,
    pub(crate) trace: &'a mut Trace,
    /// Something was done to this session that may end it.
    pub(crate) excused: &'a mut bool,
}

impl Around<'_> {
    fn say(&mut self, end: End, what: &str, detail: impl FnOnce() -> String) {
        let who = if end == End::Source { "source" } else { "shadow" };
        self.trace.say(self.now, who, what, detail);
    }

    fn fails(&mut self, chance: f64) -> bool {
        let fails = self.wild && self.rng.chance(chance);
        if fails {
            *self.excused = true;
            self.oracle.tally.failed_steps += 1;
        }
        fails
    }

    fn takes(&mut self, host: Host) -> (Duration, bool) {
        let speed = &self.conditions.speeds[host as usize];
        (speed.step(self.rng), self.rng.chance(0.5))
    }
}

/// The source's end.
pub(crate) struct SourceEnd {
    pub(crate) host: Host,
    pub(crate) guest: Arc<FakeGuest>,
    pub(crate) source: Source,
    encoder: Encoder,
    guest_hand: Hand<SourceWork, SourceAnswer>,
    encode_hand: Hand<SourceWork, SourceAnswer>,
    encoding: usize,
    captured: Option<Arc<dyn Captured>>,
    outbox: VecDeque<Bytes>,
    blocks: VecDeque<(Class, Bytes)>,
    pub(crate) ended: Option<source::Outcome>,
    gave_up: Option<Term>,
    seeded: Ratio,
    facts: LinkFacts,
    /// Since when the guest is to be stopped, and how long that may last.
    stopped_since: Option<Now>,
    pause_limit: Duration,
    cut_limit: Duration,
    /// Pages that became debt by harvests and audits.
    became_debt: u64,
    pub(crate) lost: bool,
}

enum SourceWork {
    Step(source::Step, Epoch),
    Encode(Plan, Option<Arc<dyn Captured>>),
}

enum SourceAnswer {
    Tracked(Harvest),
    Harvested(Harvest),
    Paused,
    Saved(Vec<StateRecord>),
    Captured(Arc<dyn Captured>),
    Audited(Vec<PageId>),
    Resumed,
    Nothing,
    Encoded(source::Encoded, Class),
    StepFailed(StepKind, Fault),
    Failed(Fault),
}

impl SourceEnd {
    pub(crate) fn new(host: Host, guest: Arc<FakeGuest>, source: Source, conditions: &Conditions) -> Self {
        let encoder = Encoder::new(&guest.spaces(), conditions.cache);
        Self {
            host,
            guest,
            source,
            encoder,
            guest_hand: Hand::new(),
            encode_hand: Hand::new(),
            encoding: 0,
            captured: None,
            outbox: VecDeque::new(),
            blocks: VecDeque::new(),
            ended: None,
            gave_up: None,
            seeded: Ratio::NONE,
            facts: LinkFacts::default(),
            stopped_since: None,
            pause_limit: Duration::MAX,
            cut_limit: Duration::MAX,
            became_debt: 0,
            lost: false,
        }
    }

    pub(crate) fn next_time(&self, now: Now) -> Now {
        let hands = self.guest_hand.next_time(now).min(self.encode_hand.next_time(now));
        if self.ended.is_some() {
            hands
        } else {
            hands.min(self.source.poll_timeout())
        }
    }

    /// Whether everything it wanted done and said is done and said.
    pub(crate) fn is_idle(&self) -> bool {
        self.guest_hand.load() + self.encode_hand.load() + self.outbox.len() == 0
    }

    pub(crate) const fn listens(&self) -> bool {
        self.ended.is_none()
    }

    pub(crate) fn switchover(&mut self, now: Now, options: source::SwitchoverOptions) -> bool {
        let limit = options.pause_limit;
        let asked = self.source.switchover(now, options).is_ok();
        if asked {
            self.pause_limit = limit;
        }
        asked
    }

    pub(crate) fn cut(&mut self, now: Now, options: source::CutOptions) -> bool {
        let limit = options.timeout;
        let asked = self.source.cut(now, options).is_ok();
        if asked {
            self.cut_limit = limit;
        }
        asked
    }

    /// Do whatever can be done now. Says whether anything was.
    pub(crate) fn drive(&mut self, a: &mut Around<'_>) -> bool {
        let mut busy = false;
        let facts = a.carrier.facts(End::Source);
        if facts != self.facts {
            self.facts = facts;
            self.source.handle_link(facts);
        }
        if self.ended.is_none() && a.now >= self.source.poll_timeout() {
            self.source.handle_time(a.now);
            busy = true;
        }
        busy |= self.perform(a);
        busy |= self.work(a);
        while self.ended.is_none() {
            let Some(arrival) = a.carrier.poll(End::Source) else {
                break;
            };
            busy = true;
            self.arrived(a, arrival);
            self.perform(a);
        }
        self.flush(a);
        busy
    }

    fn perform(&mut self, a: &mut Around<'_>) -> bool {
        let mut busy = false;
        loop {
            while let Some(output) = self.source.poll_output() {
                busy = true;
                self.output(a, output);
            }
            let urgent = self.source.phase() == SourcePhase::Final;
            let wants = urgent || a.carrier.room(End::Source) > 0;
            if self.ended.is_some() || self.encoding >= ENCODE_AHEAD || !wants {
                break;
            }
            let Some(plan) = self.source.take_plan(a.now) else {
                break;
            };
            busy = true;
            self.encoding += 1;
            let captured = self.captured.clone().filter(|_| plan.captured);
            let work = SourceWork::Encode(plan, captured);
            if a.conditions.two_workers {
                self.encode_hand.give(work);
            } else {
                self.guest_hand.give(work);
            }
        }
        let limit = match self.source.phase() {
            SourcePhase::Final => Some(self.pause_limit),
            // Its last step is asked for within the limit, and takes its time.
            SourcePhase::Cutting => Some(self.cut_limit + a.conditions.speeds[self.host as usize].typical * 40),
            _ => None,
        };
        if let Some(limit) = limit {
            let since = *self.stopped_since.get_or_insert(a.now);
            if a.now.since(since) > limit {
                a.oracle
                    .broken("the guest comes first", "it stands still for longer than its limit");
            }
        } else {
            self.stopped_since = None;
        }
        busy
    }

    fn output(&mut self, a: &mut Around<'_>, output: source::Output) {
        match output {
            source::Output::Send(message) => {
                a.say(End::Source, "says", || brief(&message));
                self.outbox.push_back(message.encode().into());
            }
            source::Output::Do(source::Step::GiveUp) => self.guest.give_up(),
            source::Output::Do(source::Step::Release) => self.captured = None,
            source::Output::Do(step) => {
                let to_encoder = a.conditions.two_workers && step == source::Step::Audit;
                let work = SourceWork::Step(step, self.source.epoch());
                if to_encoder {
                    self.encode_hand.give(work);
                } else {
                    self.guest_hand.give(work);
                }
            }
            source::Output::Event(event) => self.event(a, &event),
            source::Output::End(outcome) => self.end(a, outcome),
        }
    }

    fn event(&mut self, a: &mut Around<'_>, event: &Event) {
        a.say(End::Source, "event", || format!("{event:?}"));
        let Oracle { tally, moments, .. } = &mut *a.oracle;
        match event {
            Event::Source { from, to } => match (from, to) {
                (_, SourcePhase::Final) => {
                    moments.push(Moment::Stopped);
                    tally.stopped += 1;
                }
                (SourcePhase::Final, SourcePhase::Following) => {
                    moments.push(Moment::Withdrew);
                    tally.withdrew += 1;
                }
                (_, SourcePhase::Cutting) => moments.push(Moment::Cutting),
                (_, SourcePhase::HandedOver) => {
                    moments.push(Moment::GaveUp);
                    tally.gave_up += 1;
                }
                _ => {}
            },
            Event::SwitchoverFailed { text } if text.starts_with("timeout") => tally.not_stopped += 1,
            Event::GaveUp { term, .. } => {
                self.gave_up = Some(*term);
                if self.guest.is_running() {
                    a.oracle
                        .broken("one runner", "the source says it gave up a guest that runs");
                }
            }
            Event::AuditFailed { count, .. } => {
                tally.audits_failed += 1;
                self.became_debt += *count as u64;
            }
            Event::LinkDown => tally.links_down += 1,
            Event::CutBegan { reason, .. } => {
                tally.cuts += 1;
                if *reason == source::CutReason::Staging {
                    tally.cuts_for_staging += 1;
                    self.cut_limit = source::CutOptions::default().timeout;
                }
            }
            Event::CutFailed { .. } => tally.cuts_failed += 1,
            Event::Cut(_) => tally.cuts_committed += 1,
            _ => {}
        }
    }

    fn end(&mut self, a: &mut Around<'_>, outcome: source::Outcome) {
        a.say(End::Source, "ends", || match &outcome {
            source::Outcome::Moved(report) => {
                format!("moved in term {}, pause {:?}", report.term, report.breakdown.pause())
            }
            source::Outcome::Stayed { term, fault, text } => format!("stayed in term {term}: {fault:?} {text}"),
        });
        match &outcome {
            source::Outcome::Moved(_) => a.oracle.tally.moved += 1,
            source::Outcome::Stayed { term, fault, .. } => {
                a.oracle.tally.stayed += 1;
                if let Some(given) = self.gave_up {
                    if *term <= given {
                        a.oracle
                            .broken("terms grow", format!("taken back in term {term}, given up to {given}"));
                    }
                    a.oracle.check_term(*term, "the source takes back");
                }
                if let Some(fault) = fault {
                    let excused = *a.excused;
                    a.oracle.check_fault("the source", fault, excused);
                }
            }
        }
        let status = self.source.status();
        let (sent, most) = (status.counts.total(), status.pages.0 + self.became_debt);
        if sent > most {
            a.oracle.broken(
                "incremental",
                format!("{sent} pages were sent, at most {most} were ever owed"),
            );
        }
        let tally = &mut a.oracle.tally;
        tally.raw += status.counts.raw;
        tally.delta += status.counts.delta;
        tally.zero += status.counts.zero;
        tally.same += status.counts.same;
        self.ended = Some(outcome);
    }

    fn work(&mut self, a: &mut Around<'_>) -> bool {
        let mut busy = false;
        for encodes in [false, true] {
            loop {
                let hand = if encodes {
                    &mut self.encode_hand
                } else {
                    &mut self.guest_hand
                };
                let host = self.host;
                let Some(due) = hand.poll(a.now, |_| a.takes(host)) else {
                    break;
                };
                busy = true;
                match due {
                    Due::Begin(work, until) => {
                        let answer = self.do_work(a, work);
                        let hand = if encodes {
                            &mut self.encode_hand
                        } else {
                            &mut self.guest_hand
                        };
                        hand.answer_at(until, answer);
                    }
                    Due::Finish(work) => {
                        let answer = self.do_work(a, work);
                        self.answered(a, answer);
                    }
                    Due::Answer(answer) => self.answered(a, answer),
                }
                self.perform(a);
            }
        }
        busy
    }

    fn do_work(&mut self, a: &mut Around<'_>, work: SourceWork) -> SourceAnswer {
        let failures = &a.conditions.failures;
        let chance = match &work {
            SourceWork::Step(source::Step::Track, _) => failures.track,
            SourceWork::Step(source::Step::Harvest, _) => failures.harvest,
            SourceWork::Step(source::Step::Pause, _) => failures.pause,
            SourceWork::Step(source::Step::Save, _) => failures.save,
            SourceWork::Step(source::Step::Capture(..), _) => failures.capture,
            SourceWork::Step(source::Step::Audit, _) | SourceWork::Encode(..) => failures.encode,
            SourceWork::Step(..) => 0.0,
        };
        if a.fails(chance) {
            self.guest.fail_next();
        }
        let kind = match &work {
            SourceWork::Step(step, _) => Some(step.kind()),
            SourceWork::Encode(..) => None,
        };
        let done = self.try_work(a, work);
        self.guest.fail_no_more();
        done.unwrap_or_else(|fault| match kind {
            Some(kind) => SourceAnswer::StepFailed(kind, fault),
            None => SourceAnswer::Failed(fault),
        })
    }

    fn try_work(&mut self, a: &mut Around<'_>, work: SourceWork) -> Result<SourceAnswer, Fault> {
        let guest = Arc::clone(&self.guest);
        let (step, epoch) = match work {
            SourceWork::Step(step, epoch) => (step, epoch),
            SourceWork::Encode(plan, captured) => {
                let class = if plan.urgent { Class::Urgent } else { Class::Bulk };
                a.say(End::Source, "encodes", || {
                    let closes = if plan.close.is_some() { ", closes" } else { "" };
                    format!(
                        "batch {} of {} pages, epoch {}{closes}",
                        plan.batch,
                        plan.pages.len(),
                        plan.epoch
                    )
                });
                let from: &dyn PageReader = match &captured {
                    Some(captured) => &**captured,
                    None => &*guest,
                };
                let encoded = self.encoder.encode(plan, from, a.conditions.compress)?;
                return Ok(SourceAnswer::Encoded(encoded, class));
            }
        };
        Ok(match step {
            source::Step::Track => {
                guest.track(true)?;
                SourceAnswer::Tracked(guest.untouched())
            }
            source::Step::Harvest => SourceAnswer::Harvested(guest.harvest()?),
            source::Step::Pause => {
                guest.pause()?;
                a.say(End::Source, "paused", String::new);
                SourceAnswer::Paused
            }
            source::Step::Save => {
                let records = guest.save()?;
                a.oracle.cuts.insert(epoch, guest.snapshot());
                a.say(End::Source, "saved", || format!("epoch {epoch}"));
                SourceAnswer::Saved(records)
            }
            source::Step::Audit => SourceAnswer::Audited(self.encoder.audit(&*guest)?),
            source::Step::Resume => {
                guest.resume()?;
                a.say(End::Source, "resumed", String::new);
                SourceAnswer::Resumed
            }
            source::Step::Capture(pages, by) => {
                let captured = guest.capture(&pages, by)?;
                a.say(End::Source, "captured", || format!("{} pages", pages.count()));
                SourceAnswer::Captured(captured.into())
            }
            source::Step::Untrack(debt) => {
                guest.put_back(&debt);
                guest.track(false)?;
                SourceAnswer::Nothing
            }
            source::Step::Release | source::Step::GiveUp => unreachable!("done at once, by whoever drives the source"),
        })
    }

    fn answered(&mut self, a: &mut Around<'_>, answer: SourceAnswer) {
        if let SourceAnswer::Encoded(encoded, class) = &answer {
            self.encoding -= 1;
            self.blocks.push_back((*class, encoded.bytes.clone().into()));
            self.flush(a);
        }
        if self.ended.is_some() {
            return; // nobody listens any more
        }
        match answer {
            SourceAnswer::Tracked(untouched) => self.source.handle_tracked(a.now, &untouched),
            SourceAnswer::Harvested(harvest) => {
                self.became_debt += harvest.count().0;
                a.say(End::Source, "harvested", || format!("{} pages", harvest.count()));
                self.source.handle_harvest(a.now, &harvest);
            }
            SourceAnswer::Paused => self.source.handle_paused(a.now),
            SourceAnswer::Saved(records) => self.source.handle_saved(a.now, records),
            SourceAnswer::Captured(captured) => {
                a.oracle.moments.push(Moment::Captured);
                if self.source.handle_captured(a.now, captured.by()) {
                    self.captured = Some(captured);
                }
            }
            SourceAnswer::Audited(differing) => self.source.handle_audited(a.now, &differing),
            SourceAnswer::Resumed => self.source.handle_resumed(a.now),
            SourceAnswer::Nothing => {}
            SourceAnswer::Encoded(encoded, _) => {
                let size = umbra_units::Bytes::of_len(encoded.bytes.len());
                self.source.handle_encoded(a.now, encoded.id, size, encoded.counts);
            }
            SourceAnswer::StepFailed(step, fault) => {
                a.say(End::Source, "failed", || format!("{step:?}: {fault}"));
                self.source.handle_step_failed(a.now, step, fault);
            }
            SourceAnswer::Failed(fault) => {
                a.say(End::Source, "failed", || fault.to_string());
                self.source.handle_failed(fault);
            }
        }
    }

    fn arrived(&mut self, a: &mut Around<'_>, arrival: Arrival) {
        match arrival {
            Arrival::Message(bytes) => match Message::decode(&bytes) {
                Ok(message) => {
                    a.say(End::Source, "hears", || brief(&message));
                    if matches!(message, Message::Declined { .. }) {
                        a.oracle.tally.handed_back += 1;
                    }
                    self.source.handle_message(a.now, message);
                    self.check_progress(a);
                }
                Err(malformed) => a.oracle.broken("wire", malformed.to_string()),
            },
            Arrival::Block(_) => a.oracle.broken("wire", "a block arrived at the source"),
            Arrival::Up(up) => self.source.handle_link_up(a.now, up),
            Arrival::Lost => {
                a.say(End::Source, "lost", String::new);
                *a.excused = true;
                self.lost = true;
                self.source.handle_link_lost("the shadow is another process now");
            }
        }
    }

    fn check_progress(&mut self, a: &mut Around<'_>) {
        let seeded = self.source.status().seeded;
        if seeded < self.seeded {
            a.oracle
                .broken("progress", format!("{} seeded, then {seeded}", self.seeded));
        }
        self.seeded = seeded;
    }

    fn flush(&mut self, a: &mut Around<'_>) {
        while let Some(bytes) = self.outbox.front() {
            if !a.carrier.send_message(a.now, End::Source, bytes) {
                break;
            }
            self.outbox.pop_front();
        }
        while let Some((class, bytes)) = self.blocks.front() {
            if !a.carrier.send_block(a.now, End::Source, *class, bytes) {
                break;
            }
            self.blocks.pop_front();
        }
    }

    /// Whether a harvest was taken that the source has not been told of.
    pub(crate) const fn holds_harvest(&self) -> bool {
        matches!(self.guest_hand.early_answer(), Some(SourceAnswer::Harvested(_)))
    }

    /// Give the oracle what it needs to see that this end keeps the rules.
    pub(crate) fn check(&self, oracle: &mut Oracle, shadow: Option<&ShadowEnd>) {
        let rests = self.guest_hand.load() == 0;
        let gave_up = matches!(
            self.source.phase(),
            SourcePhase::Cutting | SourcePhase::Final | SourcePhase::HandedOver | SourcePhase::Done
        );
        if rests && !gave_up && !self.guest.is_running() {
            oracle.broken(
                "the guest comes first",
                format!("the source is {} and the guest stands", self.source.phase()),
            );
        }
        if self.ended.is_some() {
            return;
        }
        let twin = shadow
            .filter(|shadow| shadow.ended.is_none())
            .and_then(|shadow| shadow.twin.as_ref());
        let Some(twin) = twin.filter(|twin| twin.life() != Life::Running) else {
            return;
        };
        let debt = self.source.debt_pages();
        let mut known = vec![&debt];
        if let Some(SourceAnswer::Harvested(harvest)) = self.guest_hand.early_answer() {
            known.push(harvest);
        }
        oracle.check_debt(&self.guest, twin, &known);
    }
}

/// The shadow's end.
pub(crate) struct ShadowEnd {
    pub(crate) host: Host,
    pub(crate) shadow: Shadow,
    pub(crate) twin: Option<Arc<FakeGuest>>,
    sequence: Sequence<Arrived>,
    image: Option<Image>,
    hand: Hand<ShadowWork, ShadowAnswer>,
    applying: usize,
    outbox: VecDeque<Bytes>,
    pub(crate) ended: Option<shadow::Outcome>,
    /// The epoch whose state the twin has.
    restored: Option<Epoch>,
    /// Whether the twin ever ran.
    pub(crate) ran: bool,
    pub(crate) lost: bool,
}

#[derive(Debug)]
enum ShadowWork {
    Step(shadow::Step),
    Apply(Arrived),
}

/// A batch that arrived at this moment.
#[derive(Debug)]
struct Arrived {
    at: Now,
    bytes: Bytes,
}

impl AsRef<[u8]> for Arrived {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[derive(Debug)]
enum ShadowAnswer {
    Built(Result<Vec<Space>, Fault>),
    Applied(Now, Box<Applied>),
    Audited(Epoch, Vec<PageId>),
    Restored(Epoch, Result<(), Fault>),
    Recalled(Result<Epoch, Fault>),
    Resumed(Result<Duration, Fault>),
    Failed(Fault),
}

impl ShadowEnd {
    pub(crate) fn new(host: Host, conditions: &Conditions) -> Self {
        Self {
            host,
            shadow: Shadow::new(conditions.shadow.clone()),
            twin: None,
            sequence: Sequence::new(conditions.shadow.window),
            image: None,
            hand: Hand::new(),
            applying: 0,
            outbox: VecDeque::new(),
            ended: None,
            restored: None,
            ran: false,
            lost: false,
        }
    }

    pub(crate) fn next_time(&self, now: Now) -> Now {
        let hand = self.hand.next_time(now);
        if self.ended.is_some() {
            hand
        } else {
            hand.min(self.shadow.poll_timeout())
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.hand.load() + self.outbox.len() == 0
    }

    /// Whether it reads what the link has for it: not while too much waits to be applied.
    pub(crate) const fn listens(&self) -> bool {
        self.ended.is_none() && self.applying < APPLY_AHEAD
    }

    /// Do whatever can be done now. Says whether anything was.
    pub(crate) fn drive(&mut self, a: &mut Around<'_>) -> bool {
        let mut busy = false;
        if self.ended.is_none() && a.now >= self.shadow.poll_timeout() {
            self.shadow.handle_time(a.now);
            busy = true;
        }
        busy |= self.perform(a);
        let host = self.host;
        while let Some(due) = self.hand.poll(a.now, |_| a.takes(host)) {
            busy = true;
            match due {
                Due::Begin(work, until) => {
                    let answer = self.do_work(a, work);
                    self.hand.answer_at(until, answer);
                }
                Due::Finish(work) => {
                    let answer = self.do_work(a, work);
                    self.answered(a, answer);
                }
                Due::Answer(answer) => self.answered(a, answer),
            }
            self.perform(a);
        }
        while self.listens() {
            let Some(arrival) = a.carrier.poll(End::Shadow) else {
                break;
            };
            busy = true;
            self.arrived(a, arrival);
            self.perform(a);
        }
        while let Some(bytes) = self.outbox.front() {
            if !a.carrier.send_message(a.now, End::Shadow, bytes) {
                break;
            }
            self.outbox.pop_front();
        }
        busy
    }

    fn perform(&mut self, a: &mut Around<'_>) -> bool {
        let mut busy = false;
        // Where the log forgets writes only the source's audit knows better than the shadow.
        let forgetful = a.conditions.manners.forget > 0.0;
        while let Some(output) = self.shadow.poll_output() {
            busy = true;
            match output {
                shadow::Output::Send(message) => {
                    a.say(End::Shadow, "says", || brief(&message));
                    self.outbox.push_back(message.encode().into());
                }
                shadow::Output::Do(step) => self.hand.give(ShadowWork::Step(step)),
                shadow::Output::Event(event) => {
                    a.say(End::Shadow, "event", || format!("{event:?}"));
                    if matches!(
                        event,
                        Event::Shadow {
                            to: ShadowPhase::Prepared,
                            ..
                        }
                    ) {
                        a.oracle.moments.push(Moment::Prepared);
                    }
                    match (&event, &self.twin) {
                        (Event::LinkDown, _) => a.oracle.tally.links_down += 1,
                        // It says that it could run this instant: hold it to its word.
                        (
                            Event::Shadow {
                                to: ShadowPhase::Prepared,
                                ..
                            },
                            Some(twin),
                        ) if !forgetful => {
                            a.oracle.check_start(twin, self.restored);
                        }
                        _ => {}
                    }
                }
                shadow::Output::End(outcome) => self.end(a, outcome),
            }
        }
        busy
    }

    fn end(&mut self, a: &mut Around<'_>, outcome: shadow::Outcome) {
        a.say(End::Shadow, "ends", || format!("{outcome:?}"));
        match &outcome {
            shadow::Outcome::Runs(term) => a.oracle.check_term(*term, "the shadow runs"),
            shadow::Outcome::Dropped { fault, .. } => {
                a.oracle.tally.dropped += 1;
                if let Some(fault) = fault {
                    let excused = *a.excused;
                    a.oracle.check_fault("the shadow", fault, excused);
                }
                if let Some(twin) = &self.twin {
                    if twin.is_running() {
                        a.oracle.broken("one runner", "a shadow that dropped its session runs");
                    }
                    a.oracle.copy_gone(twin);
                }
            }
        }
        self.ended = Some(outcome);
    }

    fn do_work(&mut self, a: &mut Around<'_>, work: ShadowWork) -> ShadowAnswer {
        let failures = &a.conditions.failures;
        let (build, chance) = match &work {
            ShadowWork::Step(shadow::Step::Build(..)) => (failures.build, 0.0),
            ShadowWork::Step(shadow::Step::Restore(..) | shadow::Step::Recall) => (0.0, failures.restore),
            ShadowWork::Step(shadow::Step::Resume(_)) => (0.0, failures.start),
            ShadowWork::Step(shadow::Step::Audit(_)) => (0.0, 0.0),
            ShadowWork::Apply(..) => (0.0, failures.apply),
        };
        if a.fails(build) {
            return ShadowAnswer::Built(Err(Fault::Host("no memory for a twin, as drawn".to_owned())));
        }
        if let ShadowWork::Step(shadow::Step::Build(_, spaces)) = work {
            let layout = Arc::new(crate::guest::Layout::new(spaces.clone()));
            let twin = Arc::new(FakeGuest::new(layout, a.conditions.manners.clone(), a.rng.fork()));
            a.oracle.copies.push((self.host, Arc::clone(&twin)));
            let staging = a.conditions.shadow.staging_for(&spaces);
            (self.image, self.twin) = (Some(Image::new(&spaces).with_staging(staging)), Some(twin));
            return ShadowAnswer::Built(Ok(spaces));
        }
        let Some(twin) = self.twin.clone() else {
            return ShadowAnswer::Failed(Fault::PeerMisbehaved("it sent pages before a guest".to_owned()));
        };
        if a.fails(chance) {
            twin.fail_next();
        }
        let answer = self.work_on(a, work, &twin);
        twin.fail_no_more();
        answer
    }

    fn work_on(&mut self, a: &mut Around<'_>, work: ShadowWork, twin: &Arc<FakeGuest>) -> ShadowAnswer {
        let image = self.image.as_mut().expect("built with the twin");
        match work {
            ShadowWork::Apply(Arrived { at, bytes }) => {
                let applied = Batch::parse(&bytes)
                    .map_err(Fault::from)
                    .and_then(|batch| image.apply(batch, &**twin));
                match applied {
                    Ok(applied) => {
                        a.oracle.tally.batches += 1;
                        if applied.staged.used > applied.staged.most {
                            a.oracle.broken("bounds", format!("{:?}", applied.staged));
                        }
                        if let Some(epoch) = applied.committed {
                            a.oracle.moments.push(Moment::Committed);
                            // Where the log forgets writes only an audit would have known.
                            if a.conditions.manners.forget == 0.0 {
                                a.oracle.check_commit(twin, epoch);
                            }
                            a.oracle.cuts.retain(|cut, _| *cut >= epoch);
                        }
                        a.oracle.tally.epochs_given_up += u64::from(applied.given_up.is_some());
                        a.say(End::Shadow, "applied", || {
                            let closes = if applied.close.is_some() { ", closes" } else { "" };
                            format!("batch {}, epoch {}{closes}", applied.id, applied.epoch)
                        });
                        ShadowAnswer::Applied(at, Box::new(applied))
                    }
                    Err(fault) => ShadowAnswer::Failed(fault),
                }
            }
            ShadowWork::Step(shadow::Step::Audit(epoch)) => match image.audit(&**twin) {
                Ok(differing) => ShadowAnswer::Audited(epoch, differing),
                Err(fault) => ShadowAnswer::Failed(fault),
            },
            ShadowWork::Step(shadow::Step::Restore(epoch, records)) => {
                let restored = twin.restore(&records).map_err(Fault::from);
                if restored.is_ok() {
                    self.restored = Some(epoch);
                }
                a.say(End::Shadow, "restored", || format!("epoch {epoch}: {restored:?}"));
                ShadowAnswer::Restored(epoch, restored)
            }
            ShadowWork::Step(shadow::Step::Recall) => {
                let recalled = image.recall(&**twin).and_then(|(epoch, records)| {
                    twin.restore(&records)?;
                    Ok(epoch)
                });
                if let Ok(epoch) = &recalled {
                    self.restored = Some(*epoch);
                }
                a.say(End::Shadow, "recalled", || format!("{recalled:?}"));
                ShadowAnswer::Recalled(recalled)
            }
            ShadowWork::Step(shadow::Step::Resume(epoch)) => {
                let resumed = image.seal(epoch).and_then(|()| Ok(twin.resume()?));
                if resumed.is_ok() {
                    a.oracle.moments.push(Moment::Runs);
                    a.oracle.check_start(twin, self.restored);
                    a.oracle.check_disks(twin);
                }
                self.ran |= resumed.is_ok();
                a.say(End::Shadow, "resumed", || format!("{resumed:?}"));
                ShadowAnswer::Resumed(resumed.map(|()| Duration::from_micros(100)))
            }
            ShadowWork::Step(shadow::Step::Build(..)) => unreachable!("built before there is a twin"),
        }
    }

    fn answered(&mut self, a: &mut Around<'_>, answer: ShadowAnswer) {
        if matches!(answer, ShadowAnswer::Applied(..)) {
            self.applying -= 1;
        }
        if self.ended.is_some() {
            return;
        }
        match answer {
            ShadowAnswer::Built(built) => self.shadow.handle_built(built),
            ShadowAnswer::Applied(arrived, applied) => self.shadow.handle_applied(a.now, arrived, *applied),
            ShadowAnswer::Audited(epoch, differing) => self.shadow.handle_audited(a.now, epoch, &differing),
            ShadowAnswer::Restored(epoch, restored) => self.shadow.handle_restored(a.now, epoch, restored),
            ShadowAnswer::Recalled(recalled) => {
                a.oracle.tally.recalled += u64::from(recalled.is_ok());
                self.shadow.handle_recalled(recalled);
            }
            ShadowAnswer::Resumed(resumed) => self.shadow.handle_resumed(resumed),
            ShadowAnswer::Failed(fault) => self.shadow.handle_failed(fault),
        }
    }

    fn arrived(&mut self, a: &mut Around<'_>, arrival: Arrival) {
        match arrival {
            Arrival::Message(bytes) => match Message::decode(&bytes) {
                Ok(message) => {
                    a.say(End::Shadow, "hears", || brief(&message));
                    self.shadow.handle_message(a.now, message);
                }
                Err(malformed) => a.oracle.broken("wire", malformed.to_string()),
            },
            Arrival::Block(bytes) => {
                if !self.shadow.takes_batches() {
                    return;
                }
                let arrived = Arrived { at: a.now, bytes };
                if let Err(fault) = self.sequence.arrived(arrived) {
                    return self.shadow.handle_failed(fault);
                }
                let before = self.applying;
                while let Some(batch) = self.sequence.take() {
                    self.applying += 1;
                    self.hand.give(ShadowWork::Apply(batch));
                }
                let most = a.conditions.shadow.window.0 + umbra_core::limits::BATCH_BYTES as u64;
                if self.sequence.bytes().0 > most {
                    a.oracle.broken("bounds", "more waits to be applied than was granted");
                }
                a.oracle.tally.overtaken += u64::from(self.applying == before);
            }
            Arrival::Up(up) => self.shadow.handle_link_up(up),
            Arrival::Lost => {
                a.say(End::Shadow, "lost", String::new);
                *a.excused = true;
                self.lost = true;
                self.shadow.handle_link_lost("the source closed the link");
            }
        }
    }

    /// Whether an operator may let it run.
    pub(crate) fn could_run(&self) -> bool {
        let committed = self.shadow.phase() == ShadowPhase::Following && self.shadow.status().committed.is_some();
        self.ended.is_none() && (self.shadow.phase() == ShadowPhase::Prepared || committed)
    }

    /// Whether it is on its way to run on an operator's word.
    pub(crate) fn is_recalling(&self) -> bool {
        self.ended.is_none() && !self.shadow.takes_batches() && self.shadow.phase() != ShadowPhase::Following
    }
}

/// A message without its long parts.
fn brief(message: &Message) -> String {
    match message {
        Message::Hello(hello) => format!("Hello in term {}", hello.term),
        other => format!("{other:?}"),
    }
}
