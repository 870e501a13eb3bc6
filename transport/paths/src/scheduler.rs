//! Which bytes go on which path: by predicted arrival, so that everything ends together.
//!
//! Two questions (`algorithms.md` §3.4). For one piece: where does it arrive first, given what each path already holds
//! ([`earliest`])? For a volume that may be spread: how much on each path so that the last byte comes as early as
//! possible ([`water_fill`])? Both see a path as a [`Lane`]: a rate, and a delay after which its first new byte arrives.

use core::time::Duration;

use umbra_units::Bandwidth;

/// A path, as far as laying bytes on it is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Lane {
    /// Bytes per second, above zero.
    pub(crate) rate: f64,
    /// Seconds until a byte laid now would arrive if it took no time itself: one-way delay and queue.
    pub(crate) delay: f64,
}

impl Lane {
    /// A path of this rate and one-way delay that already holds `backlog` bytes.
    #[expect(clippy::cast_precision_loss, reason = "a prediction needs no more than 53 bits")]
    pub(crate) fn new(rate: Bandwidth, one_way: Duration, backlog: u64) -> Self {
        let rate = rate.0.max(1) as f64;
        Self {
            rate,
            delay: one_way.as_secs_f64() + backlog as f64 / rate,
        }
    }

    /// Seconds until the last of `bytes` laid now arrives.
    pub(crate) fn arrival(self, bytes: f64) -> f64 {
        self.delay + bytes / self.rate
    }
}

/// The lane on which `bytes` laid now arrive first.
pub(crate) fn earliest(lanes: &[Lane], bytes: f64) -> Option<usize> {
    let arrivals = lanes.iter().map(|lane| lane.arrival(bytes)).enumerate();
    arrivals.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(i, _)| i)
}

/// How to spread a volume.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Filling {
    /// Seconds until the last byte arrives.
    pub(crate) time: f64,
    /// Bytes for each lane, in the lanes' order; they sum to the volume.
    pub(crate) bytes: Vec<f64>,
}

/// Spread `volume` bytes so that the last byte arrives as early as possible: `T = (V + Σ g·o) / Σ g` over the largest set
/// of lanes, quickest first, that all begin to deliver before `T`. `None` without lanes.
pub(crate) fn water_fill(lanes: &[Lane], volume: f64) -> Option<Filling> {
    let mut order: Vec<usize> = (0..lanes.len()).collect();
    order.sort_by(|a, b| lanes[*a].delay.total_cmp(&lanes[*b].delay));
    let (mut rates, mut head_start, mut time) = (0.0, 0.0, f64::INFINITY);
    for lane in order.into_iter().map(|i| lanes[i]) {
        if lane.delay >= time {
            break;
        }
        rates += lane.rate;
        head_start += lane.rate * lane.delay;
        time = (volume + head_start) / rates;
    }
    let bytes = lanes
        .iter()
        .map(|lane| (lane.rate * (time - lane.delay)).max(0.0))
        .collect();
    time.is_finite().then_some(Filling { time, bytes })
}

/// Deal `n` equal pieces to lanes in proportion to `weights`, each lane at most `most` in any row of `row` pieces that
/// starts at a multiple of `row`; every prefix is as even as whole pieces allow. Without weight anywhere, all to lane 0.
///
/// A row is a stripe: an even prefix means that the death of a lane takes as few shards of any stripe as possible.
pub(crate) fn deal(weights: &[f64], n: usize, row: usize, most: usize) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let mut credit = vec![0.0; weights.len()];
    let mut in_row = vec![0; weights.len()];
    (0..n)
        .map(|piece| {
            if piece % row.max(1) == 0 {
                in_row.fill(0);
            }
            credit
                .iter_mut()
                .zip(weights)
                .for_each(|(credit, weight)| *credit += weight);
            let best = |lanes: &mut dyn Iterator<Item = usize>| lanes.max_by(|a, b| credit[*a].total_cmp(&credit[*b]));
            let open = best(&mut (0..weights.len()).filter(|i| weights[*i] > 0.0 && in_row[*i] < most));
            // Where the bound leaves no lane open, evenness is still better than nothing.
            let lane = open
                .or_else(|| best(&mut (0..weights.len()).filter(|i| weights[*i] > 0.0)))
                .unwrap_or(0);
            credit[lane] -= total;
            in_row[lane] += 1;
            lane
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Rng;

    const MBIT: f64 = 125_000.0;

    #[test]
    fn the_handbooks_example_ends_when_the_formula_says() {
        // 1 MB over 100/50/20 Mbit/s with 20/60/120 ms round trips; algorithms.md §3.4 says 69.0 ms for goodput after loss.
        let lane = |rate: f64, loss: f64, rtt: f64| Lane {
            rate: rate * MBIT * (1.0 - loss),
            delay: rtt / 2.0,
        };
        let lanes = [lane(100.0, 0.001, 0.02), lane(50.0, 0.01, 0.06), lane(20.0, 0.03, 0.12)];
        let filling = water_fill(&lanes, 1e6).unwrap();
        assert!((filling.time - 0.069).abs() < 0.0005, "{}", filling.time);
        assert!((filling.bytes.iter().sum::<f64>() - 1e6).abs() < 1.0);
    }

    #[test]
    fn no_other_spread_ends_earlier() {
        let mut rng = Rng::new(5);
        for _ in 0..500 {
            let n = 1 + usize::try_from(rng.below(5)).unwrap();
            let lanes: Vec<Lane> = (0..n)
                .map(|_| Lane {
                    rate: 1.0 + rng.unit() * 99.0,
                    delay: rng.unit() * 3.0,
                })
                .collect();
            let volume = rng.unit() * 200.0;
            let filling = water_fill(&lanes, volume).unwrap();
            assert!((filling.bytes.iter().sum::<f64>() - volume).abs() < 1e-6);
            for (lane, bytes) in lanes.iter().zip(&filling.bytes) {
                // Every lane that carries anything ends exactly at T, so moving bytes only makes some lane later; and a
                // lane that carries nothing would only begin after T.
                assert!(if *bytes > 0.0 {
                    (lane.arrival(*bytes) - filling.time).abs() < 1e-6
                } else {
                    lane.delay >= filling.time
                });
            }
        }
    }

    #[test]
    fn a_small_volume_stays_on_the_quick_path() {
        let lanes = [
            Lane {
                rate: 100.0,
                delay: 0.5,
            },
            Lane { rate: 1.0, delay: 0.01 },
        ];
        assert_eq!(water_fill(&lanes, 0.1).unwrap().bytes[0], 0.0);
        assert_eq!(earliest(&lanes, 0.1), Some(1));
        assert_eq!(earliest(&lanes, 10.0), Some(0));
        assert_eq!(earliest(&[], 1.0), None);
        assert_eq!(water_fill(&[], 1.0), None);
    }

    #[test]
    fn pieces_are_dealt_evenly_in_every_stripe() {
        let weights = [5.0, 3.0, 0.0, 2.0];
        let dealt = deal(&weights, 100, 20, 20);
        for stripe in dealt.chunks(20) {
            let count = |lane| stripe.iter().filter(|l| **l == lane).count();
            assert_eq!([count(0), count(1), count(2), count(3)], [10, 6, 0, 4]);
        }
    }

    #[test]
    fn no_path_holds_more_of_a_stripe_than_allowed() {
        let dealt = deal(&[8.0, 1.0, 1.0], 90, 30, 10);
        for stripe in dealt.chunks(30) {
            for lane in 0..3 {
                assert_eq!(stripe.iter().filter(|l| **l == lane).count(), 10);
            }
        }
        assert_eq!(deal(&[0.0, 0.0], 2, 2, 1), [0, 0]);
    }
}
