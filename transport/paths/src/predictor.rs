//! What a path will do next: the estimate of now, carried on along a damped trend.
//!
//! Holt's method with damping (`algorithms.md` §3.4): `l = αy + (1−α)(l + φb)`, `b = β(l − l₋) + (1−β)φb`, and one step
//! ahead `l + φb`. The trend only leans the estimate, within bounds: a forecast that is wrong by a factor costs more
//! than one that is late by a step.

use core::time::Duration;

use umbra_units::{Bandwidth, Now};

use crate::estimator::Estimator;

/// One step of the forecast.
const STEP: Duration = Duration::from_millis(100);
/// Gains and damping: common choices for short noisy series; rate and round trip are already smoothed.
const ALPHA: f64 = 0.5;
const BETA: f64 = 0.2;
const PHI: f64 = 0.8;
/// How far a trend may lean an estimate.
const LEAN: (f64, f64) = (0.5, 1.25);

/// What the scheduler and the redundancy table work with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Forecast {
    /// Bytes per second.
    pub(crate) rate: Bandwidth,
    /// From laying a byte on the empty path to its arrival.
    pub(crate) one_way: Duration,
    /// There and back.
    pub(crate) rtt: Duration,
    /// Loss, on the safe side.
    pub(crate) loss: f64,
    /// Mean run of losses.
    pub(crate) burst: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Holt {
    level: f64,
    trend: f64,
    seen: u32,
}

impl Holt {
    fn push(&mut self, y: f64) {
        if self.seen == 0 {
            self.level = y;
        } else {
            let before = self.level;
            self.level = ALPHA * y + (1.0 - ALPHA) * (before + PHI * self.trend);
            self.trend = BETA * (self.level - before) + (1.0 - BETA) * PHI * self.trend;
        }
        self.seen = self.seen.saturating_add(1);
    }

    /// `now` leaned along the trend, once there is one.
    fn lean(&self, now: f64) -> f64 {
        if self.seen < 3 {
            now
        } else {
            (now + PHI * self.trend).clamp(now * LEAN.0, now * LEAN.1)
        }
    }
}

/// The forecaster of one path.
#[derive(Debug, Clone, Default)]
pub(crate) struct Predictor {
    rate: Holt,
    rtt: Holt,
    stepped: Option<Now>,
}

impl Predictor {
    /// Look at the estimates, once per step. After a long silence the trend of before says nothing.
    pub(crate) fn observe(&mut self, now: Now, estimator: &Estimator) {
        let Some(stepped) = self.stepped else {
            self.stepped = Some(now);
            return;
        };
        let since = now.since(stepped);
        if since < STEP {
            return;
        }
        if since > STEP * 20 {
            *self = Self::default();
        }
        self.stepped = Some(now);
        self.rate.push(to_f64(estimator.rate().0));
        self.rtt.push(estimator.rtt().as_secs_f64());
    }

    /// One step ahead.
    pub(crate) fn forecast(&self, estimator: &Estimator) -> Forecast {
        let min = estimator.rtt_min();
        let rtt = Duration::from_secs_f64(self.rtt.lean(estimator.rtt().as_secs_f64())).max(min);
        Forecast {
            rate: Bandwidth(to_u64(self.rate.lean(to_f64(estimator.rate().0)))),
            // What a round trip has above its minimum is queue, and the queue is ours: it stands on the way out.
            one_way: min / 2 + (rtt - min),
            rtt,
            loss: estimator.loss_high(),
            burst: estimator.burst(),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a forecast needs no more than 53 bits")]
const fn to_f64(n: u64) -> f64 {
    n as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate above zero; the cast saturates"
)]
const fn to_u64(x: f64) -> u64 {
    x as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn drive(rtts: impl Iterator<Item = u64>) -> (Predictor, Estimator) {
        let mut estimator = Estimator::new(Now::ZERO, Bandwidth::mbit(10));
        let mut predictor = Predictor::default();
        let mut now = Now::ZERO;
        for rtt in rtts {
            now = now + STEP;
            (0..30).for_each(|_| estimator.on_rtt(now, Duration::from_millis(rtt)));
            predictor.observe(now, &estimator);
        }
        (predictor, estimator)
    }

    #[test]
    fn a_steady_path_is_forecast_as_it_is() {
        let (predictor, estimator) = drive([20; 50].into_iter());
        let forecast = predictor.forecast(&estimator);
        assert!(forecast.rtt.abs_diff(20 * MS) < MS / 10);
        assert!(forecast.one_way.abs_diff(10 * MS) < MS / 10);
        assert_eq!(forecast.rate, Bandwidth::mbit(10));
    }

    #[test]
    fn a_growing_queue_is_forecast_to_grow_but_not_wildly() {
        let (predictor, estimator) = drive((20..60).step_by(4));
        let forecast = predictor.forecast(&estimator);
        assert!(forecast.rtt > estimator.rtt() + MS, "{forecast:?}");
        assert!(forecast.rtt < estimator.rtt() * 5 / 4 + MS, "{forecast:?}");
        assert!(forecast.one_way > forecast.rtt / 2, "the queue stands on the way out");
    }

    #[test]
    fn after_a_silence_the_old_trend_is_forgotten() {
        let (mut predictor, mut estimator) = drive((20..60).step_by(4));
        let later = Now::from_us(60_000_000);
        (0..30).for_each(|_| estimator.on_rtt(later, 56 * MS));
        predictor.observe(later, &estimator);
        assert!(predictor.forecast(&estimator).rtt.abs_diff(56 * MS) < MS);
    }
}
