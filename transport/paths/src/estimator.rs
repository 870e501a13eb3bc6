//! What is known about one path from what happened on it: round trip, delivery rate, loss, bursts, deaths.
//!
//! Nothing here predicts (see [`predictor`](crate::predictor)) or decides. Each estimate forgets: round trips by
//! smoothing (RFC 6298's gains), the minimum and the rate by windows, loss by a half-life, so that a path that has
//! changed is believed again.

use core::time::Duration;

use umbra_units::{Bandwidth, Now};

use crate::event::PathSample;

/// How long a smallest round trip or a largest rate is believed.
const WINDOW: Duration = Duration::from_secs(10);
/// The rate's window in round trips, for paths where that is longer (BBR uses ten).
const WINDOW_ROUND_TRIPS: u32 = 10;
/// Half of what was seen of loss is forgotten after this.
const LOSS_HALF_LIFE: f64 = 30.0;
/// Packets after which older ones count for less even if they are recent.
const LOSS_PACKETS: f64 = 20_000.0;
/// Before anything was seen: half a loss in fifty packets, so that a new path is neither trusted nor condemned.
const LOSS_PRIOR: (f64, f64) = (0.5, 50.0);
/// Before any run of losses was seen: one run of one and a quarter.
const BURST_PRIOR: (f64, f64) = (1.25, 1.0);
/// Shorter spans say nothing about a rate: the driver hands over what one wake-up found.
const RATE_SPAN_MIN: Duration = Duration::from_micros(100);

/// Where a path stood when something was laid on it, so that its acknowledgement says a rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    delivered: u64,
    at: Now,
    /// The path was empty, so that the span holds a round trip in which nothing flowed.
    from_idle: bool,
}

/// A maximum or minimum over a sliding window, kept as two halves: exact to half a window and free of bookkeeping.
#[derive(Debug, Clone, Copy)]
struct Extreme {
    since: Now,
    current: f64,
    previous: f64,
}

impl Extreme {
    const fn new(now: Now, value: f64) -> Self {
        Self {
            since: now,
            current: value,
            previous: value,
        }
    }

    fn push(&mut self, now: Now, window: Duration, value: f64, better: fn(f64, f64) -> f64) {
        if now.since(self.since) >= window / 2 {
            *self = Self {
                since: now,
                current: value,
                previous: self.current,
            };
        } else {
            self.current = better(self.current, value);
        }
    }

    fn get(&self, better: fn(f64, f64) -> f64) -> f64 {
        better(self.current, self.previous)
    }
}

/// Everything measured about one path.
#[derive(Debug, Clone)]
pub(crate) struct Estimator {
    rtt: Option<Rtt>,
    delivered: u64,
    delivered_at: Now,
    /// Samples, smoothed: a repaired loss holds up one block and lets the next arrive with it, and the largest of such
    /// samples would be a third too large.
    smooth_rate: f64,
    rate: Option<Extreme>,
    /// What the congestion window says about the rate, while nothing better is known.
    rate_hint: Bandwidth,
    loss: Loss,
    sample: Option<PathSample>,
    lives: Lives,
}

#[derive(Debug, Clone, Copy)]
struct Rtt {
    smoothed: f64,
    deviation: f64,
    min: Extreme,
    measured: Now,
}

#[derive(Debug, Clone, Copy)]
struct Loss {
    lost: f64,
    passed: f64,
    burst_lost: f64,
    burst_runs: f64,
    faded: Now,
}

#[derive(Debug, Clone, Copy, Default)]
struct Lives {
    deaths: u32,
    up_before: Duration,
    up_since: Option<Now>,
}

impl Estimator {
    /// Nothing is known but what the configuration believes.
    pub(crate) fn new(now: Now, initial_rate: Bandwidth) -> Self {
        Self {
            rtt: None,
            delivered: 0,
            delivered_at: now,
            smooth_rate: 0.0,
            rate: None,
            rate_hint: initial_rate,
            loss: Loss {
                lost: 0.0,
                passed: 0.0,
                burst_lost: 0.0,
                burst_runs: 0.0,
                faded: now,
            },
            sample: None,
            lives: Lives::default(),
        }
    }

    /// A connection came up. Its counters begin again; what was learned of the path stays.
    pub(crate) fn came_up(&mut self, now: Now, rtt: Option<Duration>) {
        self.sample = None;
        self.lives.up_since = Some(now);
        self.delivered_at = now;
        if let Some(rtt) = rtt {
            self.on_rtt(now, rtt);
        }
    }

    /// The connection went away.
    pub(crate) fn went_down(&mut self, now: Now) {
        if let Some(since) = self.lives.up_since.take() {
            self.lives.up_before += now.since(since);
            self.lives.deaths = self.lives.deaths.saturating_add(1);
        }
    }

    /// A round trip was measured.
    pub(crate) fn on_rtt(&mut self, now: Now, rtt: Duration) {
        let sample = rtt.as_secs_f64();
        match &mut self.rtt {
            None => {
                let min = Extreme::new(now, sample);
                self.rtt = Some(Rtt {
                    smoothed: sample,
                    deviation: sample / 2.0,
                    min,
                    measured: now,
                });
            }
            Some(rtt) => {
                rtt.deviation += ((rtt.smoothed - sample).abs() - rtt.deviation) / 4.0;
                rtt.smoothed += (sample - rtt.smoothed) / 8.0;
                rtt.min.push(now, WINDOW, sample, f64::min);
                rtt.measured = now;
            }
        }
    }

    /// The connection's statistics. Its round trip stands in while no probe has measured one for a second: it is already
    /// smoothed, so it is worth less than a probe's.
    pub(crate) fn on_sample(&mut self, now: Now, sample: PathSample) {
        let stale = self
            .rtt
            .is_none_or(|rtt| now.since(rtt.measured) > Duration::from_secs(1));
        if stale && !sample.rtt.is_zero() {
            self.on_rtt(now, sample.rtt);
        }
        self.rate_hint = hint(sample).unwrap_or(self.rate_hint);
        let before = self.sample.replace(sample);
        let (sent, lost) = before.map_or((0, 0), |before| (before.sent_packets, before.lost_packets));
        let lost = sample.lost_packets.saturating_sub(lost);
        self.on_packets(now, sample.sent_packets.saturating_sub(sent), lost);
    }

    /// Of `sent` packets `lost` never arrived.
    fn on_packets(&mut self, now: Now, sent: u64, lost: u64) {
        self.fade(now);
        let (sent, lost) = (to_f64(sent), to_f64(lost.min(sent)));
        self.loss.lost += lost;
        self.loss.passed += sent - lost;
        let total = self.loss.lost + self.loss.passed;
        if total > LOSS_PACKETS {
            self.loss.lost *= LOSS_PACKETS / total;
            self.loss.passed *= LOSS_PACKETS / total;
        }
    }

    /// The peer's count of our datagrams: so many received and lost, in so many runs, since the last report. They are in
    /// the connection's own statistics too, so they say how much is lost only where there are none.
    pub(crate) fn on_report(&mut self, now: Now, received: u64, lost: u64, runs: u64) {
        if self.sample.is_none() {
            self.on_packets(now, received.saturating_add(lost), lost);
        }
        self.fade(now);
        self.loss.burst_lost += to_f64(lost);
        self.loss.burst_runs += to_f64(runs.min(lost));
    }

    fn fade(&mut self, now: Now) {
        let keep = 0.5f64.powf(now.since(self.loss.faded).as_secs_f64() / LOSS_HALF_LIFE);
        let loss = &mut self.loss;
        for count in [
            &mut loss.lost,
            &mut loss.passed,
            &mut loss.burst_lost,
            &mut loss.burst_runs,
        ] {
            *count *= keep;
        }
        loss.faded = loss.faded.max(now);
    }

    /// Bytes are being laid on the path, which holds `outstanding` already.
    pub(crate) fn on_laid(&mut self, now: Now, outstanding: u64) -> Mark {
        let from_idle = outstanding == 0;
        if from_idle {
            self.delivered_at = now;
        }
        Mark {
            delivered: self.delivered,
            at: self.delivered_at,
            from_idle,
        }
    }

    /// `bytes` laid at `mark` arrived.
    pub(crate) fn on_delivered(&mut self, now: Now, bytes: u64, mark: Mark) {
        self.delivered = self.delivered.saturating_add(bytes);
        self.delivered_at = self.delivered_at.max(now);
        let span = now.since(mark.at);
        if span < RATE_SPAN_MIN {
            return;
        }
        let sample = to_f64(self.delivered.saturating_sub(mark.delivered)) / span.as_secs_f64();
        // Twice as much is not noise but a path that is still being discovered.
        let discovered = sample > 2.0 * self.smooth_rate;
        let rate = if discovered {
            sample
        } else {
            self.smooth_rate + (sample - self.smooth_rate) / 8.0
        };
        // A burst into an empty path measures its round trip as much as its rate: it can prove a rate, not deny one.
        if mark.from_idle && self.rate.is_some_and(|known| sample < known.get(f64::max)) {
            return;
        }
        self.smooth_rate = rate;
        let window = WINDOW.min(Duration::from_secs(1).max(self.rtt() * WINDOW_ROUND_TRIPS));
        match &mut self.rate {
            None => self.rate = Some(Extreme::new(now, rate)),
            Some(known) => known.push(now, window, rate, f64::max),
        }
    }

    /// Smoothed round trip; a tenth of a second before any was measured.
    pub(crate) fn rtt(&self) -> Duration {
        self.rtt
            .map_or(Duration::from_millis(100), |rtt| Duration::from_secs_f64(rtt.smoothed))
    }

    /// Smallest round trip of the last seconds.
    pub(crate) fn rtt_min(&self) -> Duration {
        self.rtt.map_or_else(
            || self.rtt(),
            |rtt| Duration::from_secs_f64(rtt.min.get(f64::min).min(rtt.smoothed)),
        )
    }

    /// Mean deviation of the round trip.
    pub(crate) fn rtt_var(&self) -> Duration {
        self.rtt
            .map_or(Duration::from_millis(50), |rtt| Duration::from_secs_f64(rtt.deviation))
    }

    /// Bytes per second the path delivers, never zero.
    pub(crate) fn rate(&self) -> Bandwidth {
        let measured = self
            .rate
            .map_or(self.rate_hint, |rate| Bandwidth(to_u64(rate.get(f64::max))));
        Bandwidth(measured.0.max(1_000))
    }

    /// Mean loss.
    pub(crate) fn loss(&self) -> f64 {
        let (lost, passed) = (self.loss.lost + LOSS_PRIOR.0, self.loss.passed + LOSS_PRIOR.1);
        lost / (lost + passed)
    }

    /// Loss as it was seen, without the doubt about a path of which little was seen.
    pub(crate) fn loss_seen(&self) -> f64 {
        self.loss.lost / (self.loss.lost + self.loss.passed).max(1.0)
    }

    /// The loss that nine of ten further looks would find below: the upper decile of Beta(lost, passed), through
    /// Wilson and Hilferty's cube root for the Gamma that a Beta of rare events is.
    pub(crate) fn loss_high(&self) -> f64 {
        const DECILE: f64 = 1.281_6;
        let lost = self.loss.lost + LOSS_PRIOR.0;
        let root = 1.0 - 1.0 / (9.0 * lost) + DECILE / (3.0 * lost.sqrt());
        (self.loss() * root.powi(3)).clamp(0.0, 0.95)
    }

    /// Mean number of packets lost in a row, at least 1.
    pub(crate) fn burst(&self) -> f64 {
        let (lost, runs) = (
            self.loss.burst_lost + BURST_PRIOR.0,
            self.loss.burst_runs + BURST_PRIOR.1,
        );
        (lost / runs).max(1.0)
    }

    /// Chance that the path lives through `span`, from how often it died in how long.
    pub(crate) fn alive(&self, now: Now, span: Duration) -> f64 {
        let Some(since) = self.lives.up_since else { return 0.0 };
        // As if it had lived for one more minute without dying, so that a new path is not condemned by one death.
        let lived = self.lives.up_before + now.since(since) + Duration::from_secs(60);
        (-span.as_secs_f64() * f64::from(self.lives.deaths) / lived.as_secs_f64()).exp()
    }

    /// How often its connection went away.
    pub(crate) const fn deaths(&self) -> u32 {
        self.lives.deaths
    }
}

fn hint(sample: PathSample) -> Option<Bandwidth> {
    (!sample.rtt.is_zero() && sample.cwnd > 0).then(|| Bandwidth::of(umbra_units::Bytes(sample.cwnd), sample.rtt))
}

#[expect(clippy::cast_precision_loss, reason = "an estimate needs no more than 53 bits")]
const fn to_f64(n: u64) -> f64 {
    n as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate above zero; the cast saturates"
)]
const fn to_u64(x: f64) -> u64 {
    x as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn estimator() -> Estimator {
        let mut e = Estimator::new(Now::ZERO, Bandwidth::mbit(10));
        e.came_up(Now::ZERO, Some(20 * MS));
        e
    }

    fn sample(sent_packets: u64, lost_packets: u64) -> PathSample {
        let (sent_bytes, lost_bytes) = (sent_packets * 1_200, lost_packets * 1_200);
        PathSample {
            rtt: 20 * MS,
            cwnd: 50_000,
            sent_packets,
            lost_packets,
            sent_bytes,
            lost_bytes,
            max_datagram: 1_200,
        }
    }

    #[test]
    fn the_round_trip_follows_and_the_minimum_remembers() {
        let mut e = estimator();
        let mut now = Now::ZERO;
        for _ in 0..100 {
            now = now + 10 * MS;
            e.on_rtt(now, 50 * MS);
        }
        assert!(e.rtt().abs_diff(50 * MS) < MS, "{:?}", e.rtt());
        assert_eq!(e.rtt_min(), 20 * MS);
        // Beyond the window the old minimum is forgotten.
        for _ in 0..2_000 {
            now = now + 10 * MS;
            e.on_rtt(now, 50 * MS);
        }
        assert!(e.rtt_min().abs_diff(50 * MS) < MS, "{:?}", e.rtt_min());
    }

    #[test]
    fn a_busy_path_shows_its_rate_and_an_idle_one_keeps_it() {
        let mut e = estimator();
        // 100 KB every 10 ms, always two under way: 10 MB/s.
        let mut marks = std::collections::VecDeque::new();
        let mut outstanding = 0;
        let mut now = Now::ZERO;
        for _ in 0..100 {
            marks.push_back(e.on_laid(now, outstanding));
            outstanding += 100_000;
            now = now + 10 * MS;
            if marks.len() > 2 {
                e.on_delivered(now, 100_000, marks.pop_front().unwrap());
                outstanding -= 100_000;
            }
        }
        assert!(e.rate().0.abs_diff(10_000_000) < 1_000_000, "{}", e.rate());
        // One small block into the empty path proves nothing less.
        while let Some(mark) = marks.pop_front() {
            e.on_delivered(now, 100_000, mark);
        }
        let before = e.rate();
        let mark = e.on_laid(now + Duration::from_secs(3), 0);
        e.on_delivered(now + Duration::from_millis(3_030), 1_000, mark);
        assert_eq!(e.rate(), before);
    }

    #[test]
    fn before_anything_was_delivered_the_congestion_window_speaks() {
        let mut e = estimator();
        assert_eq!(e.rate(), Bandwidth::mbit(10));
        e.on_sample(Now::ZERO, sample(10, 0));
        assert_eq!(e.rate(), Bandwidth(2_500_000));
    }

    #[test]
    fn loss_is_learned_and_forgotten() {
        let mut e = estimator();
        e.on_sample(Now::ZERO, sample(10_000, 500));
        assert!((e.loss() - 0.05).abs() < 0.002, "{}", e.loss());
        assert!(e.loss_high() > e.loss() && e.loss_high() < 0.06, "{}", e.loss_high());
        for second in 1..300 {
            e.on_sample(Now::from_us(second * 1_000_000), sample(10_000 + second * 1_000, 500));
        }
        assert!(e.loss_high() < 0.001, "{}", e.loss_high());
    }

    #[test]
    fn the_upper_decile_is_the_betas() {
        // Beta(0.5, 20 000) has its upper decile at 1.353 / 20 000 (half a chi-squared with one degree of freedom).
        let mut e = estimator();
        e.on_sample(Now::ZERO, sample(20_000, 0));
        assert!(
            (e.loss_high() * 20_050.0 - 1.353).abs() < 0.05,
            "{}",
            e.loss_high() * 20_050.0
        );
    }

    #[test]
    fn bursts_are_counted_by_their_runs() {
        let mut e = estimator();
        assert!((e.burst() - 1.25).abs() < 1e-9);
        e.on_report(Now::ZERO, 10_000, 300, 100);
        assert!((e.burst() - 3.0).abs() < 0.05, "{}", e.burst());
    }

    #[test]
    fn a_path_that_dies_often_is_trusted_less() {
        let mut e = estimator();
        assert!((e.alive(Now::ZERO, Duration::from_secs(1)) - 1.0).abs() < 1e-9);
        for i in 1..=6u64 {
            e.went_down(Now::from_us(i * 1_000_000));
            assert!(e.alive(Now::from_us(i * 1_000_000), MS).abs() < 1e-9);
            e.came_up(Now::from_us(i * 1_000_000), None);
        }
        let alive = e.alive(Now::from_us(6_000_000), Duration::from_secs(1));
        assert!((alive - (-6.0f64 / 66.0).exp()).abs() < 1e-9, "{alive}");
        assert_eq!(e.deaths(), 6);
    }
}
