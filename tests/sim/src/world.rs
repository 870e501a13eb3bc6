//! One world: two nodes, a guest, what joins them, and everything that happens to them, on one clock.
//!
//! First everything may go wrong and nothing may be *wrong*. Then the weather clears, nothing fails any more, and
//! everything *must* come to its rightful end within [`PATIENCE`].

use std::sync::Arc;
use std::time::Duration;

use umbra_core::guest::Guest;
use umbra_core::phase::{ShadowPhase, SourcePhase};
use umbra_core::source::{Outcome, Source, SwitchoverOptions};
use umbra_core::{error::Refused, shadow};
use umbra_units::{GuestId, Now, PageCount, Rng, SessionId, Term};

use crate::carrier::{Carrier, End};
use crate::conditions::{Act, Ambush, Conditions, Host, Transport};
use crate::courier::Courier;
use crate::ends::{Around, ShadowEnd, SourceEnd};
use crate::guest::{FakeGuest, Layout};
use crate::oracle::Oracle;
use crate::program::Guests;
use crate::roads::Roads;
use crate::tally::Tally;
use crate::trace::Trace;

/// Everything must have come to its end so long after the weather cleared.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long an end waits for its last words to arrive before it closes the link.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often the operator looks, once the weather is clear.
const LOOK: Duration = Duration::from_millis(20);
/// So many events at one instant are a loop that does not advance.
const STUCK: u32 = 20_000;

/// What became of a world.
#[derive(Debug, Clone)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// The rule that broke and how, if one did.
    pub wrong: Option<String>,
    /// What happened how often.
    pub tally: Tally,
    /// Hash of every line of the trace, if asked for.
    pub hash: Option<u64>,
}

/// What to do with the lines of the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lines {
    /// Nothing: they are not even made.
    Dropped,
    /// Hash them.
    Hashed,
    /// Print them, and the conditions before.
    Printed,
}

/// Live through the world that `seed` draws, with a guest of this kind.
pub fn run(seed: u64, guests: Guests, lines: Lines) -> Report {
    let mut conditions = Conditions::draw(seed);
    conditions.program = conditions.program.of(guests);
    live(conditions, lines)
}

/// Live through a world of these conditions.
fn live(conditions: Conditions, lines: Lines) -> Report {
    let mut world = World::new(conditions, lines);
    if lines == Lines::Printed {
        println!("{}\n", world.conditions);
    }
    world.live();
    let seed = world.conditions.seed;
    let wrong = world.oracle.wrong().cloned();
    if let Some(wrong) = &wrong {
        world.trace.say(world.now, "oracle", "BROKEN", || wrong.clone());
    }
    let mut tally = world.oracle.tally;
    tally.worlds = 1;
    tally.events = world.trace.lines();
    tally.virtual_ms = world.now.as_us() / 1_000;
    tally.over_links = u64::from(matches!(world.conditions.transport, Transport::Roads(_)));
    Report {
        seed,
        wrong,
        tally,
        hash: world.trace.hash(),
    }
}

struct Session {
    from: Host,
    source: Option<SourceEnd>,
    shadow: Option<ShadowEnd>,
    carrier: Box<dyn Carrier>,
    /// When an end's last words must have arrived.
    closing: [Option<Now>; 2],
    closed: [bool; 2],
    excused: bool,
    /// Words were cut off, so that the ends may disagree until an operator looks.
    cut_off: bool,
}

struct World {
    conditions: Conditions,
    now: Now,
    rng: Rng,
    guest_rng: Rng,
    trace: Trace,
    oracle: Oracle,
    session: Option<Session>,
    sessions: u64,
    alive: [bool; 2],
    ambushes: Vec<Ambush>,
    /// Acts to come, earliest last.
    acts: Vec<(Now, Undo)>,
    next_write: Now,
    next_session: Now,
    next_look: Now,
    healed: bool,
    settled: bool,
    /// Nothing is left to be done.
    over: bool,
    /// The guest died with its node.
    died: bool,
}

/// An act, or the end of one that lasts.
#[derive(Debug, Clone)]
enum Undo {
    Act(Act),
    OutageOver,
    LightAgain(usize),
    Heal,
}

impl World {
    fn new(conditions: Conditions, lines: Lines) -> Self {
        let mut rng = Rng::new(conditions.seed ^ 0x0077_6f72_6c64);
        let mut guest_rng = rng.fork();
        let mut acts: Vec<_> = conditions
            .acts
            .iter()
            .map(|(at, act)| (*at, Undo::Act(act.clone())))
            .collect();
        acts.push((conditions.heals, Undo::Heal));
        acts.sort_by_key(|(at, _)| core::cmp::Reverse(*at));
        let mut oracle = Oracle::new(Term(1));
        let layout = Arc::new(Layout::new(conditions.spaces.clone()));
        let guest = FakeGuest::new(layout, conditions.manners.clone(), rng.fork());
        guest.boot(conditions.filled, &mut guest_rng);
        oracle.copies.push((Host::A, Arc::new(guest)));
        Self {
            now: Now::ZERO,
            rng,
            guest_rng,
            trace: Trace::new(lines == Lines::Printed, lines == Lines::Hashed),
            oracle,
            session: None,
            sessions: 0,
            alive: [true, true],
            ambushes: conditions.ambushes.clone(),
            acts,
            next_write: if conditions.program.is_idle() {
                Now::NEVER
            } else {
                Now::ZERO
            },
            next_session: Now::ZERO,
            next_look: conditions.heals,
            healed: false,
            settled: !conditions.settles,
            over: false,
            died: false,
            conditions,
        }
    }

    fn live(&mut self) {
        let end = self.conditions.heals + PATIENCE;
        let mut at_once = 0;
        while !self.over && self.oracle.wrong().is_none() {
            let next = self.next_time().max(self.now);
            at_once = if next == self.now { at_once + 1 } else { 0 };
            if at_once > STUCK {
                return self.oracle.broken("liveness", "the world does not advance");
            }
            if next > end {
                let state = self.describe();
                return self
                    .oracle
                    .broken("liveness", format!("not at an end {PATIENCE:?} after healing: {state}"));
            }
            self.now = next;
            self.step();
            self.check();
        }
    }

    fn next_time(&self) -> Now {
        let act = self.acts.last().map_or(Now::NEVER, |(at, _)| *at);
        let look = if self.healed { self.next_look } else { Now::NEVER };
        let mut next = act.min(self.next_write).min(self.next_session).min(look);
        if let Some(session) = &self.session {
            let listens = [
                session.source.as_ref().is_some_and(SourceEnd::listens),
                session.shadow.as_ref().is_some_and(ShadowEnd::listens),
            ];
            next = next.min(session.carrier.next_time(listens));
            next = next.min(
                session
                    .source
                    .as_ref()
                    .map_or(Now::NEVER, |end| end.next_time(self.now)),
            );
            next = next.min(
                session
                    .shadow
                    .as_ref()
                    .map_or(Now::NEVER, |end| end.next_time(self.now)),
            );
            for closing in session.closing.into_iter().flatten() {
                next = next.min(closing);
            }
        }
        next
    }

    fn step(&mut self) {
        while self.acts.last().is_some_and(|(at, _)| *at <= self.now) {
            let (_, act) = self.acts.pop().expect("seen just now");
            self.act(act);
        }
        if self.now >= self.next_write {
            let program = &self.conditions.program;
            for (_, copy) in &self.oracle.copies {
                copy.run(program, !self.healed, &mut self.guest_rng);
            }
            let settling = self.healed && !self.settled;
            let pause = program.every.mul_f64(0.5 + self.guest_rng.unit());
            self.next_write = if settling { Now::NEVER } else { self.now + pause };
        }
        if self.now >= self.next_session {
            self.begin_session();
        }
        if self.healed && self.now >= self.next_look {
            self.next_look = self.now + LOOK;
            self.look();
        }
        self.drive();
        self.spring();
        self.close();
    }

    /// Somebody lay in wait for what just happened.
    fn spring(&mut self) {
        for moment in std::mem::take(&mut self.oracle.moments) {
            let sprung: Vec<Ambush> = self.ambushes.extract_if(.., |ambush| ambush.moment == moment).collect();
            if self.healed {
                continue;
            }
            for ambush in sprung {
                self.later(ambush.after, Undo::Act(ambush.act));
            }
        }
    }

    /// Let both ends do what they can, until neither can do more at this instant.
    fn drive(&mut self) {
        let Some(session) = &mut self.session else { return };
        session.carrier.handle_time(self.now);
        for _ in 0..64 {
            let mut around = Around {
                now: self.now,
                conditions: &self.conditions,
                wild: !self.healed,
                rng: &mut self.rng,
                carrier: &mut *session.carrier,
                oracle: &mut self.oracle,
                trace: &mut self.trace,
                excused: &mut session.excused,
            };
            let mut busy = session.source.as_mut().is_some_and(|source| source.drive(&mut around));
            busy |= session.shadow.as_mut().is_some_and(|shadow| shadow.drive(&mut around));
            if !busy {
                break;
            }
        }
    }

    /// Close what is over.
    fn close(&mut self) {
        let now = self.now;
        let Some(session) = &mut self.session else { return };
        for end in End::BOTH {
            let at = end.index();
            let (gone, over, idle) = match end {
                End::Source => session
                    .source
                    .as_ref()
                    .map_or((true, true, true), |it| (false, it.ended.is_some(), it.is_idle())),
                End::Shadow => session
                    .shadow
                    .as_ref()
                    .map_or((true, true, true), |it| (false, it.ended.is_some(), it.is_idle())),
            };
            if gone || session.closed[at] || !over || !idle {
                continue;
            }
            // A shadow that runs lingers until the source has its word; everybody else waits a moment.
            let lingers = end == End::Shadow
                && matches!(
                    session.shadow.as_ref().and_then(|it| it.ended.as_ref()),
                    Some(shadow::Outcome::Runs(_))
                );
            let deadline = *session.closing[at].get_or_insert(if lingers { Now::NEVER } else { now + LAST_WORDS });
            let nobody_listens = match end {
                End::Source => session.shadow.as_ref().is_none_or(|it| it.ended.is_some()),
                End::Shadow => session.source.as_ref().is_none_or(|it| it.ended.is_some()),
            };
            let drained = nobody_listens || session.carrier.is_drained(end);
            if drained || now >= deadline {
                session.closed[at] = true;
                session.closing[at] = None;
                if !drained {
                    session.cut_off = true;
                    session.excused = true;
                }
                session.carrier.end_gone(now, end, true);
                self.trace.say(
                    now,
                    if end == End::Source { "source" } else { "shadow" },
                    "closes",
                    || format!("drained {drained}"),
                );
            }
        }
        let source_over = session.source.is_none() || session.closed[0];
        let shadow_over = session.shadow.is_none() || session.closed[1];
        if source_over && shadow_over {
            if let Some(SourceEnd {
                ended: Some(Outcome::Moved(_)),
                guest,
                ..
            }) = &session.source
            {
                self.oracle.copy_gone(guest);
                self.over = self.healed && self.settled;
            }
            if let Some(ShadowEnd {
                ended: Some(shadow::Outcome::Dropped { .. }),
                twin: Some(twin),
                ..
            }) = &session.shadow
            {
                self.oracle.copy_gone(twin);
            }
            self.session = None;
            let wait = Duration::from_micros(self.rng.below(200_000));
            self.next_session = if self.alive == [true, true] {
                now + wait
            } else {
                Now::NEVER
            };
            self.trace.say(now, "world", "over", String::new);
        }
    }

    fn begin_session(&mut self) {
        self.next_session = Now::NEVER;
        let Some((from, guest)) = self.oracle.runner() else {
            return;
        };
        if self.session.is_some() || self.alive != [true, true] {
            return;
        }
        self.sessions += 1;
        self.oracle.tally.sessions += 1;
        self.oracle.cuts.clear();
        let mut session = [0; 16];
        session[..8].copy_from_slice(&self.sessions.to_le_bytes());
        let term = self.oracle.term;
        let (config, spaces) = (self.conditions.source.clone(), guest.spaces());
        let source = Source::new(
            config,
            GuestId([7; 16]),
            SessionId(session),
            term,
            guest.describe(),
            &spaces,
        );
        let mut carrier: Box<dyn Carrier> = match &self.conditions.transport {
            Transport::Courier(courier) => Box::new(Courier::new(courier.clone(), self.rng.fork())),
            Transport::Roads(roads) => Box::new(Roads::new(self.now, roads.clone(), self.rng.fork())),
        };
        if self.healed {
            carrier.heal(self.now);
        }
        self.trace.say(self.now, "world", "session", || {
            format!("{} from {from} in term {term}", self.sessions)
        });
        self.session = Some(Session {
            from,
            source: Some(SourceEnd::new(from, guest, source, &self.conditions)),
            shadow: Some(ShadowEnd::new(from.other(), &self.conditions)),
            carrier,
            closing: [None, None],
            closed: [false, false],
            excused: false,
            cut_off: false,
        });
    }

    fn act(&mut self, act: Undo) {
        self.trace.say(self.now, "world", "act", || format!("{act:?}"));
        let now = self.now;
        match act {
            Undo::Heal => {
                self.healed = true;
                self.acts.clear();
                if let Some(session) = &mut self.session {
                    session.carrier.heal(now);
                }
            }
            Undo::OutageOver => self.on_carrier(|carrier| carrier.set_outage(now, false)),
            Undo::LightAgain(path) => self.on_carrier(|carrier| carrier.set_dark(now, path, false)),
            Undo::Act(Act::Outage(long)) => {
                self.on_carrier(|carrier| carrier.set_outage(now, true));
                self.later(long, Undo::OutageOver);
            }
            Undo::Act(Act::Dark(path, long)) => {
                self.on_carrier(|carrier| carrier.set_dark(now, path, true));
                self.later(long, Undo::LightAgain(path));
            }
            Undo::Act(Act::Break(path)) => self.on_carrier(|carrier| carrier.break_path(now, path)),
            Undo::Act(Act::Switchover(options)) => self.switchover(options),
            Undo::Act(Act::Cancel) => {
                let cancelled = self.with_source(|source| source.source.cancel_switchover());
                self.oracle.tally.cancelled += u64::from(cancelled.is_some_and(|done| done.is_ok()));
            }
            Undo::Act(Act::Cut(options)) => {
                self.with_source(|source| source.cut(now, options));
            }
            Undo::Act(Act::CancelCut) => {
                self.with_source(|source| source.source.cancel_cut(now));
            }
            Undo::Act(Act::EndSource) => {
                self.excuse();
                self.with_source(|source| source.source.end("the operator wants it so"));
            }
            Undo::Act(Act::EndShadow) => self.end_shadow(),
            Undo::Act(Act::Kill(host)) => self.kill(host),
            Undo::Act(Act::KillEnd(end)) => {
                if let Some(from) = self.session.as_ref().map(|session| session.from) {
                    self.kill(if end == End::Source { from } else { from.other() });
                    let wait = Duration::from_micros(self.rng.below(300_000));
                    self.later(wait, Undo::Act(Act::Decide));
                }
            }
            Undo::Act(Act::RestartShadow) => self.restart_shadow(),
            Undo::Act(Act::Decide) => self.decide(),
        }
    }

    fn later(&mut self, after: Duration, act: Undo) {
        let at = self.now + after;
        let place = self.acts.partition_point(|(other, _)| *other > at);
        self.acts.insert(place, (at, act));
    }

    fn on_carrier(&mut self, act: impl FnOnce(&mut dyn Carrier)) {
        if let Some(session) = &mut self.session {
            act(&mut *session.carrier);
        }
    }

    fn with_source<T>(&mut self, act: impl FnOnce(&mut SourceEnd) -> T) -> Option<T> {
        let source = self.session.as_mut()?.source.as_mut()?;
        source.ended.is_none().then(|| act(source))
    }

    fn with_shadow<T>(&mut self, act: impl FnOnce(&mut ShadowEnd) -> T) -> Option<T> {
        let shadow = self.session.as_mut()?.shadow.as_mut()?;
        shadow.ended.is_none().then(|| act(shadow))
    }

    fn excuse(&mut self) {
        if let Some(session) = &mut self.session {
            session.excused = true;
        }
    }

    fn switchover(&mut self, options: SwitchoverOptions) {
        let now = self.now;
        let asked = self.with_source(|source| source.switchover(now, options));
        self.oracle.tally.asked += u64::from(asked == Some(true));
    }

    fn end_shadow(&mut self) {
        self.excuse();
        self.with_shadow(|shadow| shadow.shadow.end("the operator wants it so"));
    }

    fn kill(&mut self, host: Host) {
        if !std::mem::take(&mut self.alive[host as usize]) {
            return;
        }
        self.oracle.tally.killed += 1;
        self.end_dies(host, false);
        // Copies outside of a session die too.
        self.oracle.copies.retain(|(at, _)| *at != host);
        self.next_session = Now::NEVER;
    }

    fn restart_shadow(&mut self) {
        let Some(host) = self
            .session
            .as_ref()
            .and_then(|it| it.shadow.as_ref())
            .map(|it| it.host)
        else {
            return;
        };
        self.oracle.tally.restarted += 1;
        self.end_dies(host, true);
    }

    fn end_dies(&mut self, host: Host, answers: bool) {
        let now = self.now;
        let Some(session) = &mut self.session else { return };
        session.excused = true;
        let (end, guest) = if host == session.from {
            (End::Source, session.source.take().map(|end| end.guest))
        } else {
            let shadow = session.shadow.take();
            let ran = shadow.as_ref().is_some_and(|it| it.ran);
            self.died |= ran;
            (End::Shadow, shadow.and_then(|end| end.twin))
        };
        session.closing[end.index()] = None;
        session.carrier.end_gone(now, end, answers);
        if let Some(guest) = guest {
            self.oracle.copy_gone(&guest);
        }
    }

    /// An operator who knows what is true decides what only an operator may.
    fn decide(&mut self) {
        let Some(session) = &self.session else { return };
        let (source_gone, shadow_gone) = (session.source.is_none(), session.shadow.is_none());
        let source_over = source_gone || session.closed[0];
        let shadow_over = shadow_gone || session.closed[1];
        let (cut_off, excusable) = (session.cut_off, session.shadow.as_ref().is_some_and(|it| it.lost));
        if source_over && !shadow_over {
            // Where audits matter nobody vouches for an epoch that was not audited.
            let trusted = self.conditions.manners.forget == 0.0;
            if session.shadow.as_ref().is_some_and(ShadowEnd::is_recalling) {
                return; // an operator has decided
            }
            if source_gone && trusted && session.shadow.as_ref().is_some_and(ShadowEnd::could_run) {
                self.oracle.tally.vouched += 1;
                self.with_shadow(|shadow| shadow.shadow.vouch());
            } else if source_gone || excusable {
                self.end_shadow();
            }
        }
        if shadow_over && !source_over {
            let handed_over = self.with_source(|it| it.source.phase() == SourcePhase::HandedOver) == Some(true);
            if !handed_over {
                self.excuse();
                self.with_source(|source| source.source.end("the shadow is gone"));
            } else if (shadow_gone || cut_off) && !self.died {
                self.oracle.tally.reclaimed += 1;
                let reclaimed: Option<Result<(), Refused>> = self.with_source(|source| source.source.reclaim());
                debug_assert!(matches!(reclaimed, Some(Ok(()))));
            }
        }
    }

    /// The weather is clear: bring everything to its end.
    fn look(&mut self) {
        if self.session.is_none() {
            let Some((_, guest)) = self.oracle.runner() else {
                // Only a guest that died with its node may be gone.
                if self.alive == [true, true] && !self.died {
                    self.oracle
                        .broken("liveness", "no copy of the guest runs, and no node died");
                }
                self.oracle.tally.died += 1;
                self.over = true;
                return;
            };
            debug_assert!(guest.is_running());
            if self.alive != [true, true] {
                self.over = true; // the survivor runs the guest: all that can be wished for
            } else if self.next_session == Now::NEVER {
                self.next_session = self.now;
            }
            return;
        }
        self.decide();
        if self.died && self.oracle.runner().is_none() {
            // What a dead shadow ran is gone; the source rightly waits for ever.
            self.oracle.tally.died += 1;
            self.over = true;
            return;
        }
        if !self.settled {
            self.settle();
        } else if self.with_source(|it| it.source.phase() == SourcePhase::Following) == Some(true) {
            let generous = SwitchoverOptions {
                // Whatever is predicted over a link that carried next to nothing.
                downtime_limit: Duration::from_secs(3600),
                timeout: PATIENCE,
                pause_limit: PATIENCE,
                audit: self.conditions.audits,
            };
            self.switchover(generous);
        }
    }

    /// The guest has stopped writing: the shadow must come to hold all of it.
    fn settle(&mut self) {
        let Some(session) = &self.session else { return };
        let (Some(source), Some(shadow)) = (&session.source, &session.shadow) else {
            return;
        };
        let status = source.source.status();
        if source.ended.is_some()
            || status.switching
            || status.phase != SourcePhase::Following
            || status.debt != PageCount::ZERO
        {
            return;
        }
        let Some(twin) = shadow
            .twin
            .as_ref()
            .filter(|_| shadow.shadow.phase() == ShadowPhase::Following)
        else {
            return;
        };
        if source.guest.has_unharvested() || source.holds_harvest() {
            return;
        }
        if let Some(page) = source.guest.unknown_differences(twin, &[]) {
            self.oracle
                .broken("no lost write", format!("following settled, and {page} differs"));
        }
        self.oracle.tally.settled += 1;
        self.settled = true;
        if !self.conditions.program.is_idle() {
            self.next_write = self.now;
        }
    }

    fn check(&mut self) {
        self.oracle.check_copies();
        if let Some(session) = &self.session {
            if let Some(source) = &session.source {
                source.check(&mut self.oracle, session.shadow.as_ref());
            }
            if let Some(what) = session.carrier.out_of_bounds() {
                self.oracle.broken("bounds", what);
            }
        }
    }

    fn describe(&self) -> String {
        let Some(session) = &self.session else {
            return "no session".to_owned();
        };
        let source = session.source.as_ref().map(|it| it.source.status());
        let shadow = session.shadow.as_ref().map(|it| it.shadow.status());
        let source = source.map(|it| {
            format!(
                "source {}, debt {}, switching {}, {:?}",
                it.phase, it.debt, it.switching, it.reasons
            )
        });
        let shadow = shadow.map(|it| format!("shadow {}, {:?}", it.phase, it.reasons));
        format!("{source:?}; {shadow:?}; closed {:?}", session.closed)
    }
}
