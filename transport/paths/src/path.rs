//! One path: what lies on it, whether it lives, and what came in on it.
//!
//! # When is a path dead?
//!
//! A connection that is gone is reported by the driver. The dangerous case is the one where nobody reports anything: a
//! cable cut, a router that drops one direction. So each path is probed, and *progress* on it means proof of the whole
//! circle: an answered probe, or an acknowledgement of something sent on it. Hearing the peer is not progress; the way
//! there may still be cut. Probes are rare while the path idles, and frequent while something waits for it.
//!
//! A path becomes suspect when so many probes in a row stay unanswered, each for longer than a round trip should take,
//! that loss does not explain it ([`Path::silent_at`]), or when probes are answered but nothing else arrives
//! ([`Path::stalled_at`]). Nothing is lost by suspecting wrongly but some bytes sent twice. One answer lifts the suspicion;
//! a stalled path waits longer each time.

use std::collections::VecDeque;

use core::time::Duration;
use umbra_units::{Bandwidth, Now, PathId};

use crate::config::LinkConfig;
use crate::estimator::{Estimator, Mark};
use crate::event::{BlockId, PathFacts, PathSample, Suspicion};
use crate::frames::{PathReport, SHARD_HEAD};
use crate::limits;
use crate::predictor::{Forecast, Predictor};
use crate::scheduler::Lane;
use crate::stats::PathState;

/// Beyond deviation, what a round trip may be late by: timers tick in milliseconds and a loaded host runs late.
const SLACK: Duration = Duration::from_millis(5);
/// Probes are at least this far apart, so that a fast network is not probed to death.
const PROBE_GAP_MIN: Duration = Duration::from_millis(4);
/// What loss in both directions may explain by chance before a path is suspected.
const FALSE_ALARM: f64 = 1e-3;
const PROBES: core::ops::RangeInclusive<usize> = 3..=8;
/// A path may hold what it carries in two round trips and this: a driver's wake-up and the peer's acknowledgement.
const RESPONSE: Duration = Duration::from_millis(10);
/// Packets of a usual bulk block: 128 KiB in packets of 1,200 bytes.
const BLOCK_PACKETS: f64 = 100.0;
/// How long nothing may arrive of what should have, beyond the time it takes.
const STALL: Duration = Duration::from_secs(1);
const STALL_PENALTY: core::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32);

/// A datagram with block data that was sent and of which the peer has not yet reported.
#[derive(Debug, Clone, Copy)]
struct Flying {
    number: u64,
    bytes: u64,
    block: BlockId,
    mark: Mark,
}

/// One shard in a path's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) block: BlockId,
    pub(crate) stripe: u16,
    pub(crate) index: u8,
    pub(crate) bytes: u32,
}

/// What was sent on the path, by kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sent {
    pub(crate) message_bytes: u64,
    pub(crate) bulk_bytes: u64,
    pub(crate) urgent_bytes: u64,
    pub(crate) shards: u64,
}

/// One path of the link.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) id: PathId,
    pub(crate) state: PathState,
    pub(crate) max_datagram: usize,
    pub(crate) estimator: Estimator,
    predictor: Predictor,
    forecast: Forecast,
    pub(crate) sent: Sent,
    pub(crate) suspected: u64,
    floor_bytes: u64,
    heartbeat: Duration,

    /// Number of the next datagram. Never goes back, not even with a new connection, so that reports cannot be confused.
    next_number: u64,
    pub(crate) queue: VecDeque<Queued>,
    queue_bytes: u64,
    flight: VecDeque<Flying>,
    flight_bytes: u64,
    /// Bytes of streams with block data that the peer has not acknowledged.
    pub(crate) stream_bytes: u64,
    /// Of those, what the driver has not handed to the connection.
    pub(crate) queued_bytes: u64,
    reported: PathReport,

    /// Unanswered probes, oldest first.
    probes: VecDeque<Now>,
    last_probe: Option<Now>,
    progress: Now,
    up_at: Now,
    stream_progress: Now,
    stalled_until: Now,
    stall_penalty: Duration,

    pub(crate) arrivals: Arrivals,
    pub(crate) echo: Option<u64>,
}

impl Path {
    pub(crate) fn new(now: Now, id: PathId, config: &LinkConfig) -> Self {
        let estimator = Estimator::new(now, config.initial_rate);
        let predictor = Predictor::default();
        Self {
            id,
            state: PathState::Down,
            max_datagram: 0,
            forecast: predictor.forecast(&estimator),
            estimator,
            predictor,
            sent: Sent::default(),
            suspected: 0,
            floor_bytes: config.path_floor_bytes as u64,
            heartbeat: config.heartbeat,
            next_number: 0,
            queue: VecDeque::new(),
            queue_bytes: 0,
            flight: VecDeque::new(),
            flight_bytes: 0,
            stream_bytes: 0,
            queued_bytes: 0,
            reported: PathReport::default(),
            probes: VecDeque::new(),
            last_probe: None,
            progress: now,
            up_at: now,
            stream_progress: now,
            stalled_until: now,
            stall_penalty: *STALL_PENALTY.start(),
            arrivals: Arrivals::default(),
            echo: None,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.state == PathState::Up
    }

    pub(crate) fn is_down(&self) -> bool {
        self.state == PathState::Down
    }

    /// A connection came up.
    pub(crate) fn came_up(&mut self, now: Now, facts: PathFacts) {
        self.state = PathState::Up;
        self.max_datagram = facts.max_datagram;
        self.estimator.came_up(now, facts.rtt);
        self.look_ahead(now);
        (self.probes, self.last_probe) = (VecDeque::new(), None);
        (self.progress, self.up_at, self.stream_progress) = (now, now, now);
        self.stalled_until = now;
        self.arrivals = Arrivals::default();
        self.reported = PathReport::default();
    }

    /// The connection went away. What lay on it is the caller's to lay elsewhere.
    pub(crate) fn went_down(&mut self, now: Now) {
        self.state = PathState::Down;
        self.estimator.went_down(now);
        (self.stream_bytes, self.queued_bytes) = (0, 0);
        self.echo = None;
    }

    /// The connection's statistics.
    pub(crate) fn on_sample(&mut self, now: Now, sample: PathSample) {
        self.max_datagram = sample.max_datagram;
        self.estimator.on_sample(now, sample);
        self.look_ahead(now);
    }

    fn look_ahead(&mut self, now: Now) {
        self.predictor.observe(now, &self.estimator);
        self.forecast = self.predictor.forecast(&self.estimator);
    }

    pub(crate) const fn forecast(&self) -> &Forecast {
        &self.forecast
    }

    // What lies on it.

    /// Everything of blocks that lies on it, on the way or about to be.
    pub(crate) const fn outstanding(&self) -> u64 {
        self.stream_bytes + self.flight_bytes + self.queue_bytes
    }

    /// What it may hold: enough to be never idle, and little to lose with it.
    /// Where every block loses packets, each takes a repair longer, and the window has to span that too: without it, the
    /// window and the rate measured within it hold each other down (seen at 120 ms and 3 %: half the rate).
    pub(crate) fn window(&self) -> u64 {
        let repairs = (self.estimator.loss() * BLOCK_PACKETS).min(1.0) * 1.125;
        let span = self.estimator.rtt_min().mul_f64(2.0 + repairs) + RESPONSE;
        carried(self.forecast.rate, span).max(self.floor_bytes)
    }

    /// Whether it takes another bulk block: it holds less than it may, its connection keeps up with its driver, and no
    /// answer is missing.
    pub(crate) fn takes_bulk(&self, now: Now) -> bool {
        let window = self.window();
        self.is_up() && self.outstanding() < window && self.queued_bytes <= window / 2 && !self.in_doubt(now)
    }

    /// As bulk sees it: behind everything.
    pub(crate) fn bulk_lane(&self) -> Lane {
        Lane::new(self.forecast.rate, self.forecast.one_way, self.outstanding())
    }

    /// As urgent data sees it. It overtakes streams in the connection, but not what is in the network already.
    pub(crate) fn urgent_lane(&self) -> Lane {
        let in_network = self
            .stream_bytes
            .min(carried(self.forecast.rate, self.estimator.rtt_min()));
        let goodput = Bandwidth(scaled(self.forecast.rate.0, 1.0 - self.estimator.loss()));
        Lane::new(
            goodput,
            self.forecast.one_way,
            in_network + self.flight_bytes + self.queue_bytes,
        )
    }

    /// Whether it can carry shards at all.
    pub(crate) fn takes_shards(&self) -> bool {
        self.is_up() && self.max_datagram >= SHARD_HEAD + limits::SHARD_BYTES_MIN
    }

    /// What laying something on it costs in expectation, for messages: the way there, a repair if it is lost, and the
    /// trouble if the path dies meanwhile.
    pub(crate) fn cost(&self, now: Now) -> Duration {
        let dying = 1.0 - self.estimator.alive(now, Duration::from_secs(1));
        let doubt = if self.in_doubt(now) {
            self.rto() * 4
        } else {
            Duration::ZERO
        };
        self.forecast.one_way
            + self.forecast.rtt.mul_f64(self.forecast.loss * 1.125)
            + self.rto().mul_f64(dying)
            + doubt
    }

    /// Number for the next datagram.
    pub(crate) const fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    pub(crate) fn enqueue(&mut self, shard: Queued) {
        self.queue_bytes += u64::from(shard.bytes);
        self.queue.push_back(shard);
    }

    /// The next shard that may go now.
    pub(crate) fn release(&mut self) -> Option<Queued> {
        if self.flight_bytes >= self.window() {
            return None;
        }
        let shard = self.queue.pop_front()?;
        self.queue_bytes -= u64::from(shard.bytes);
        Some(shard)
    }

    /// Take queued shards of `block` out (of all blocks, without one).
    pub(crate) fn unqueue(&mut self, block: Option<BlockId>) -> Vec<Queued> {
        let (gone, kept): (Vec<Queued>, Vec<Queued>) = self
            .queue
            .drain(..)
            .partition(|shard| block.is_none_or(|block| shard.block == block));
        self.queue = kept.into();
        self.queue_bytes -= gone.iter().map(|shard| u64::from(shard.bytes)).sum::<u64>();
        gone
    }

    /// A datagram with block data is being sent.
    pub(crate) fn fly(&mut self, now: Now, number: u64, bytes: u64, block: BlockId) {
        let mark = self.estimator.on_laid(now, self.stream_bytes + self.flight_bytes);
        self.flight_bytes += bytes;
        self.flight.push_back(Flying {
            number,
            bytes,
            block,
            mark,
        });
    }

    /// Give up what flies: its blocks, once per datagram.
    pub(crate) fn ground(&mut self) -> Vec<BlockId> {
        self.flight_bytes = 0;
        self.flight.drain(..).map(|flying| flying.block).collect()
    }

    /// A stream with block data is being laid.
    pub(crate) fn lay(&mut self, now: Now, bytes: u64) -> Mark {
        if self.stream_bytes == 0 {
            self.stream_progress = now;
        }
        let mark = self.estimator.on_laid(now, self.stream_bytes + self.flight_bytes);
        self.stream_bytes += bytes;
        self.queued_bytes += bytes;
        mark
    }

    /// A stream with block data need not be counted any more; with its mark if it is known to have arrived.
    pub(crate) fn lift(&mut self, now: Now, bytes: u64, handed: bool, arrived: Option<Mark>) {
        self.stream_bytes = self.stream_bytes.saturating_sub(bytes);
        if !handed {
            self.queued_bytes = self.queued_bytes.saturating_sub(bytes);
        }
        if let Some(mark) = arrived {
            self.estimator.on_delivered(now, bytes, mark);
            self.stall_penalty = *STALL_PENALTY.start();
            self.stream_progress = now;
            self.on_progress(now);
        }
    }

    /// The peer's count of what we sent. Returns the blocks of datagrams whose fate is known now, once per datagram;
    /// `None` if it reports what was never sent.
    pub(crate) fn on_report(&mut self, now: Now, report: PathReport) -> Option<Vec<BlockId>> {
        if report.highest >= self.next_number {
            return None;
        }
        let before = core::mem::replace(&mut self.reported, report);
        if report.highest < before.highest || report.received < before.received {
            // A report from before the connection was renewed, or the first after.
            return Some(Vec::new());
        }
        let received = report.received - before.received;
        self.estimator.on_report(
            now,
            received,
            report.lost.saturating_sub(before.lost),
            report.runs.saturating_sub(before.runs),
        );
        if received > 0 {
            self.on_progress(now);
        }
        let mut settled = Vec::new();
        let mut bytes = 0;
        let mut newest = None;
        while self
            .flight
            .front()
            .is_some_and(|flying| flying.number <= report.highest)
        {
            let Some(flying) = self.flight.pop_front() else { break };
            settled.push(flying.block);
            bytes += flying.bytes;
            newest = Some(flying.mark);
        }
        self.flight_bytes -= bytes;
        if let Some(mark) = newest {
            let share = ratio(received, report.highest - before.highest);
            self.estimator.on_delivered(now, scaled(bytes, share), mark);
        }
        Some(settled)
    }

    // Whether it lives.

    /// How long an answer may take before it counts as missing.
    pub(crate) fn rto(&self) -> Duration {
        self.estimator.rtt() + (self.estimator.rtt_var() * 4).max(SLACK) + SLACK
    }

    /// An answer is missing. Not enough to suspect the path, enough to prefer another one.
    pub(crate) fn in_doubt(&self, now: Now) -> bool {
        self.probes.front().is_some_and(|first| *first + self.rto() <= now)
    }

    /// The whole circle was proven: everything sent so far is not silence.
    fn on_progress(&mut self, now: Now) {
        self.progress = self.progress.max(now);
        self.probes.clear();
    }

    /// A probe is being sent; its stamp.
    pub(crate) fn probe(&mut self, now: Now) -> u64 {
        self.last_probe = Some(now);
        if self.probes.len() < *PROBES.end() {
            self.probes.push_back(now);
        }
        now.as_us()
    }

    /// A probe was answered. A stamp that was never sent is ignored: it hurts only the peer's own service.
    pub(crate) fn on_echo(&mut self, now: Now, stamp: u64) {
        let sent = Now::from_us(stamp);
        if sent > now || sent < self.up_at || self.last_probe.is_none_or(|last| sent > last) {
            return;
        }
        self.estimator.on_rtt(now, now.since(sent));
        self.look_ahead(now);
        self.on_progress(now);
    }

    /// When the next probe is due; `busy` when something waits for this path's answers.
    pub(crate) fn probe_at(&self, busy: bool) -> Now {
        let Some(last) = self.last_probe else { return self.up_at };
        let quick = (self.estimator.rtt() / 2).max(PROBE_GAP_MIN).min(self.heartbeat);
        let doubt = self.probes.front().map_or(Now::NEVER, |first| *first + self.rto());
        let wait = if busy { quick } else { self.heartbeat };
        let soon = self.progress.max(last) + wait;
        // An answer is missing: find out quickly, busy or not.
        let doubting = if self.is_up() {
            doubt.max(last + quick)
        } else {
            Now::NEVER
        };
        soon.min(last + self.heartbeat).min(doubting)
    }

    /// When silence will have lasted too long, if it lasts.
    pub(crate) fn silent_at(&self) -> Now {
        // Both directions lose; so many in a row that chance does not explain it.
        let answered = (1.0 - self.estimator.loss()).powi(2).clamp(0.05, 1.0 - 1e-9);
        let enough = FALSE_ALARM.ln() / (1.0 - answered).ln();
        let enough = (*PROBES.start()..*PROBES.end())
            .find(|n| f64_of(*n) >= enough)
            .unwrap_or(*PROBES.end());
        self.probes
            .get(enough - 1)
            .map_or(Now::NEVER, |probe| *probe + self.rto())
    }

    /// When what lies on it should long have arrived.
    pub(crate) fn stalled_at(&self) -> Now {
        if self.stream_bytes == 0 {
            return Now::NEVER;
        }
        let needed = self
            .estimator
            .rate()
            .time_for(umbra_units::Bytes(self.stream_bytes))
            .unwrap_or(STALL);
        self.stream_progress + STALL + needed * 4 + self.rto()
    }

    pub(crate) fn suspect(&mut self, now: Now, why: Suspicion) {
        self.state = PathState::Suspect(why);
        self.suspected += 1;
        if why == Suspicion::Stalled {
            self.stalled_until = now + self.stall_penalty;
            self.stall_penalty = (self.stall_penalty * 2).min(*STALL_PENALTY.end());
        }
        // Progress must be new to count.
        self.progress = now;
    }

    /// When a suspect path may be trusted again; it must have answered since.
    pub(crate) fn trusted(&self, now: Now) -> bool {
        match self.state {
            PathState::Suspect(Suspicion::Silent) => {
                self.probes.is_empty() && self.progress >= self.last_probe.unwrap_or(now)
            }
            PathState::Suspect(Suspicion::Stalled) => now >= self.stalled_until && self.probes.is_empty(),
            PathState::Up | PathState::Down => false,
        }
    }

    pub(crate) const fn trust(&mut self, now: Now) {
        self.state = PathState::Up;
        self.stream_progress = now;
    }

    /// Our own loop ran late by so much: that part of the silence was ours.
    pub(crate) fn excuse(&mut self, late: Duration) {
        self.probes.iter_mut().for_each(|probe| *probe = *probe + late);
        self.stream_progress = self.stream_progress + late;
    }
}

fn carried(rate: Bandwidth, span: Duration) -> u64 {
    let bytes = u128::from(rate.0) * span.as_micros() / 1_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "a share needs no more than 53 bits")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        1.0
    } else {
        (part as f64 / whole as f64).min(1.0)
    }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate above zero; the cast saturates"
)]
fn scaled(n: u64, by: f64) -> u64 {
    (n as f64 * by) as u64
}

#[expect(clippy::cast_precision_loss, reason = "a handful")]
const fn f64_of(n: usize) -> f64 {
    n as f64
}

/// The peer's datagrams on one path: which of the last 64 came, and what became of all before.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Arrivals {
    peer: PathId,
    begun: bool,
    highest: u64,
    /// Bit `i`: number `highest − i` came. Those before the first count as come.
    window: u64,
    received: u64,
    lost: u64,
    runs: u64,
    /// The last number that left the window was lost.
    in_run: bool,
}

impl Arrivals {
    /// Note a datagram. Says whether it is new, as far as the window can tell.
    pub(crate) fn note(&mut self, peer: PathId, number: u64) -> bool {
        if !self.begun || self.peer != peer {
            *self = Self {
                peer,
                begun: true,
                highest: number,
                window: u64::MAX,
                received: 1,
                ..Self::default()
            };
            return true;
        }
        if number > self.highest {
            self.slide(number - self.highest);
            self.highest = number;
        }
        let back = self.highest - number;
        let new = back >= 64 || self.window >> back & 1 == 0;
        if back < 64 {
            self.window |= 1 << back;
        }
        self.received += u64::from(new);
        new
    }

    fn slide(&mut self, by: u64) {
        for _ in 0..by.min(64) {
            let came = self.window >> 63 == 1;
            self.lost += u64::from(!came);
            self.runs += u64::from(!came && !self.in_run);
            self.in_run = !came;
            self.window <<= 1;
        }
        if by > 64 {
            self.lost = self.lost.saturating_add(by - 64);
            self.runs += u64::from(!self.in_run);
            self.in_run = true;
        }
    }

    /// What the peer should know of it.
    pub(crate) fn report(&self) -> Option<PathReport> {
        let Self {
            peer: path,
            highest,
            received,
            lost,
            runs,
            ..
        } = *self;
        self.begun.then_some(PathReport {
            path,
            highest,
            received,
            lost,
            runs,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn up() -> Path {
        let mut path = Path::new(Now::ZERO, PathId(0), &LinkConfig::default());
        path.came_up(
            Now::ZERO,
            PathFacts {
                max_datagram: 1_200,
                rtt: Some(20 * MS),
            },
        );
        path
    }

    #[test]
    fn arrivals_count_what_never_came_and_in_how_many_runs() {
        let mut arrivals = Arrivals::default();
        let lost = [5, 6, 7, 20, 40, 41];
        for number in (0..200).filter(|number| !lost.contains(number)) {
            assert!(arrivals.note(PathId(1), number));
            assert!(!arrivals.note(PathId(1), number), "a duplicate is known");
        }
        let report = arrivals.report().unwrap();
        assert_eq!(
            report,
            PathReport {
                path: PathId(1),
                highest: 199,
                received: 194,
                lost: 6,
                runs: 3
            }
        );
        // A hostile leap costs no time.
        arrivals.note(PathId(1), u64::MAX);
        assert!(arrivals.report().unwrap().lost > u64::MAX / 2);
    }

    #[test]
    fn reordering_is_not_loss() {
        let mut arrivals = Arrivals::default();
        for base in (0..2_000).step_by(10) {
            (0..10)
                .rev()
                .for_each(|i| assert!(arrivals.note(PathId(0), base + i) || base == 0));
        }
        assert_eq!(arrivals.report().unwrap().lost, 0);
    }

    #[test]
    fn silence_is_noticed_within_a_few_round_trips_when_something_waits() {
        let mut path = up();
        let mut now = Now::ZERO;
        while now < path.silent_at() {
            now = path.probe_at(true).min(path.silent_at());
            if now < path.silent_at() {
                path.probe(now);
            }
        }
        assert!(now <= Now::ZERO + 110 * MS, "{now}");
        // An answer to any of them ends the doubt.
        path.on_echo(now, 0);
        assert_eq!(path.silent_at(), Now::NEVER);
    }

    #[test]
    fn a_lossy_path_is_given_more_chances() {
        let (mut clean, mut lossy) = (up(), up());
        let sample = |lost_packets| PathSample {
            rtt: 20 * MS,
            cwnd: 50_000,
            sent_packets: 10_000,
            lost_packets,
            sent_bytes: 0,
            lost_bytes: 0,
            max_datagram: 1_200,
        };
        clean.on_sample(Now::ZERO, sample(0));
        lossy.on_sample(Now::ZERO, sample(2_000));
        (0..8).for_each(|i| {
            clean.probe(Now::ZERO + MS * i);
            lossy.probe(Now::ZERO + MS * i);
        });
        assert_eq!(lossy.silent_at().since(clean.silent_at()), 4 * MS);
    }

    #[test]
    fn our_own_lateness_is_not_the_paths() {
        let mut path = up();
        (0..3).for_each(|_| {
            path.probe(Now::ZERO);
        });
        let before = path.silent_at();
        path.excuse(30 * MS);
        assert_eq!(path.silent_at(), before + 30 * MS);
    }

    #[test]
    fn an_answer_to_a_probe_never_sent_is_ignored() {
        let mut path = up();
        path.probe(Now::from_us(500));
        path.on_echo(Now::from_us(900), 700);
        path.on_echo(Now::from_us(900), 100_000);
        assert_eq!(path.estimator.rtt(), 20 * MS);
        path.on_echo(Now::from_us(900), 500);
        assert!(path.estimator.rtt() < 20 * MS);
    }

    #[test]
    fn a_report_settles_what_it_covers_and_refuses_what_was_never_sent() {
        let mut path = up();
        for block in 0..4 {
            let number = path.number();
            path.fly(Now::ZERO, number, 1_000, BlockId(block));
        }
        let report = |highest, received| PathReport {
            highest,
            received,
            ..PathReport::default()
        };
        assert_eq!(path.on_report(Now::from_us(10_000), report(4, 1)), None);
        assert_eq!(
            path.on_report(Now::from_us(10_000), report(1, 2)).unwrap(),
            [BlockId(0), BlockId(1)]
        );
        assert_eq!(path.outstanding(), 2_000);
        assert_eq!(path.on_report(Now::from_us(10_000), report(1, 2)).unwrap(), []);
        assert_eq!(path.ground(), [BlockId(2), BlockId(3)]);
        assert_eq!(path.outstanding(), 0);
    }

    #[test]
    fn a_path_that_answers_but_delivers_nothing_is_stalled_for_longer_each_time() {
        let mut path = up();
        path.lay(Now::ZERO, 100_000);
        let at = path.stalled_at();
        assert!(at > Now::ZERO + STALL && at < Now::ZERO + 3 * STALL);
        path.suspect(at, Suspicion::Stalled);
        assert!(!path.trusted(at) && path.trusted(at + STALL));
        path.trust(at + STALL);
        path.suspect(at + STALL, Suspicion::Stalled);
        assert!(!path.trusted(at + 2 * STALL) && path.trusted(at + 3 * STALL));
    }
}
