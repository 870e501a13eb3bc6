//! How much parity a stripe needs: exactly, from the loss that was measured.
//!
//! Loss on a path is a chain with two states (Gilbert): in the good one packets pass, in the bad one they are lost. Mean
//! loss `p` and mean burst `b` fix it: `r = 1/b` leaves the bad state, `q = p·r/(1−p)` enters it (`algorithms.md` §3.3).
//! Shards of one stripe follow each other on a path only every `stripes` packets, because stripes are interleaved; the
//! chain of every `s`-th packet is again such a chain, with the same `p` and its memory `λ = 1−q−r` raised to `s`.
//!
//! [`Table::parity`] finds the smallest `m` for which the chance that more than `m` of the `k + m` shards are lost stays
//! within the target: by dynamic programming over the chain, path by path, since the normal approximation
//! underestimates bursts by half (same section). Results are remembered, because they are asked for inside a pause.

use std::collections::BTreeMap;

/// Loss on one path, and its share of each stripe.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Lossy {
    /// Share of the stripe's shards that travel on this path; all shares sum to 1.
    pub(crate) share: f64,
    /// Chance that a packet is lost.
    pub(crate) loss: f64,
    /// Mean run of losses, at least 1.
    pub(crate) burst: f64,
}

/// Answers already worked out. Bounded; forgotten as a whole when full, since the weather that filled it is over.
#[derive(Debug, Default)]
pub(crate) struct Table {
    known: BTreeMap<Question, usize>,
}

/// Data shards, most parity, stripes, and each path's quantised share, loss and burst.
type Question = (usize, usize, usize, Vec<(u32, i32, u32)>);

const KNOWN_MAX: usize = 512;

impl Table {
    /// Smallest parity for `k` data shards whose losses exceed it with a chance of at most `residual` in a block of
    /// `stripes` stripes; at most `most`.
    pub(crate) fn parity(&mut self, k: usize, most: usize, stripes: usize, paths: &[Lossy], residual: f64) -> usize {
        let (paths, key): (Vec<Lossy>, Vec<_>) = paths.iter().map(quantise).unzip();
        let key = (k, most, stripes, key);
        if let Some(m) = self.known.get(&key) {
            return *m;
        }
        // Each stripe may fail, so each must be better than the block.
        let residual = residual / to_f64(stripes);
        let fails = |m: &usize| exceeds(k + m, *m, stripes, &paths) > residual;
        // More parity is never worse, so halve the range; the answer is small, so begin by doubling.
        let mut high = 1;
        while high < most && fails(&high) {
            high *= 2;
        }
        let (mut low, mut high) = (high / 2, high.min(most));
        if low <= 1 && !fails(&0) {
            high = 0;
        }
        while low + 1 < high {
            let middle = low.midpoint(high);
            if fails(&middle) { low = middle } else { high = middle }
        }
        if self.known.len() >= KNOWN_MAX {
            self.known.clear();
        }
        self.known.insert(key, high);
        high
    }
}

/// Chance that more than `m` of `n` shards of one stripe are lost.
pub(crate) fn exceeds(n: usize, m: usize, stripes: usize, paths: &[Lossy]) -> f64 {
    // Chance of each number of losses up to `m`; what is missing to 1 is beyond.
    let mut within = vec![0.0; m + 1];
    within[0] = 1.0;
    let mut laid = 0;
    let mut share = 0.0;
    for path in paths {
        share += path.share;
        let upto = to_usize((to_f64(n) * share).round()).min(n);
        let of_path = losses(upto - laid, m, stripes, *path);
        laid = upto;
        let mut both = vec![0.0; m + 1];
        for (i, a) in within.iter().enumerate().filter(|(_, a)| **a > 0.0) {
            for (j, b) in of_path.iter().enumerate().take(m + 1 - i) {
                both[i + j] += a * b;
            }
        }
        within = both;
    }
    (1.0 - within.iter().sum::<f64>()).max(0.0)
}

/// Chance of each number of losses `0..=m` among `n` packets of one path.
fn losses(n: usize, m: usize, stripes: usize, path: Lossy) -> Vec<f64> {
    let bad = path.loss.clamp(0.0, 0.999);
    let r = (1.0 / path.burst.max(1.0)).max(1e-6);
    let q = (bad * r / (1.0 - bad)).min(1.0);
    let memory = (1.0 - q - r).powi(i32::try_from(stripes).unwrap_or(i32::MAX));
    let (enter, leave) = (bad * (1.0 - memory), (1.0 - bad) * (1.0 - memory));
    // good[i]: chance of i losses so far, the next packet passes; bad likewise.
    let mut good = vec![0.0; m + 1];
    let mut lost = vec![0.0; m + 1];
    (good[0], lost[0]) = (1.0 - bad, bad);
    let mut counted = vec![0.0; m + 1];
    counted[0] = 1.0;
    for _ in 0..n {
        // Count this packet, then move on.
        for i in (0..=m).rev() {
            let from_bad = if i == 0 { 0.0 } else { lost[i - 1] };
            let passed = good[i];
            counted[i] = passed + from_bad;
            good[i] = passed * (1.0 - enter) + from_bad * leave;
            lost[i] = passed * enter + from_bad * (1.0 - leave);
        }
    }
    counted
}

/// Loss to within a twentieth, burst to within a quarter, share to within a fiftieth: finer than anyone can measure,
/// and coarse enough that a steady path asks the same question twice. Rounded up, towards more parity.
fn quantise(path: &Lossy) -> (Lossy, (u32, i32, u32)) {
    let share = to_u32((path.share * 50.0).round());
    let loss = if path.loss <= 1e-7 {
        i32::MIN
    } else {
        to_i32((path.loss.min(0.9).ln() / 1.05f64.ln()).ceil())
    };
    let burst = to_u32((path.burst.clamp(1.0, 64.0) * 4.0).ceil());
    let rounded = Lossy {
        share: path.share,
        loss: if loss == i32::MIN {
            0.0
        } else {
            1.05f64.powi(loss).min(0.95)
        },
        burst: f64::from(burst) / 4.0,
    };
    (rounded, (share, loss, burst))
}

#[expect(clippy::cast_precision_loss, reason = "counts of shards are far below 2^53")]
fn to_f64(n: usize) -> f64 {
    n as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounded, bounded, and the cast saturates"
)]
fn to_usize(x: f64) -> usize {
    x as usize
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rounded, bounded, and the cast saturates"
)]
fn to_u32(x: f64) -> u32 {
    x as u32
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a logarithm is small, and the cast saturates"
)]
fn to_i32(x: f64) -> i32 {
    x as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(loss: f64, burst: f64) -> [Lossy; 1] {
        [Lossy {
            share: 1.0,
            loss,
            burst,
        }]
    }

    /// Every sequence of good and bad, weighed by hand.
    fn brute_force(n: usize, m: u32, path: Lossy) -> f64 {
        let r = 1.0 / path.burst;
        let q = path.loss * r / (1.0 - path.loss);
        (0..1u32 << n)
            .filter(|lost| lost.count_ones() > m)
            .map(|lost| {
                let bit = |i: usize| lost >> i & 1 == 1;
                let mut p = if bit(0) { path.loss } else { 1.0 - path.loss };
                for i in 1..n {
                    p *= match (bit(i - 1), bit(i)) {
                        (false, false) => 1.0 - q,
                        (false, true) => q,
                        (true, false) => r,
                        (true, true) => 1.0 - r,
                    };
                }
                p
            })
            .sum()
    }

    #[test]
    fn the_chain_agrees_with_counting_every_sequence() {
        for (loss, burst) in [(0.0, 1.0), (0.1, 1.2), (0.1, 3.0), (0.4, 2.0), (0.02, 5.0)] {
            for n in 1..=12usize {
                for m in 0..n {
                    let path = Lossy {
                        share: 1.0,
                        loss,
                        burst,
                    };
                    let exact = brute_force(n, u32::try_from(m).unwrap(), path);
                    let ours = exceeds(n, m, 1, &[path]);
                    assert!(
                        (ours - exact).abs() < 1e-12,
                        "p {loss} b {burst} n {n} m {m}: {ours} against {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_handbooks_table_is_met() {
        // algorithms.md §3.3: k = 128, 1 %, bursts of 3, residual 1e-3: 19; independent losses: 5 % of 128.
        let mut table = Table::default();
        let (loss, k) = (0.01, 128);
        let exact = |burst| {
            (0..128)
                .find(|m| exceeds(k + m, *m, 1, &one(loss, burst)) <= 1e-3)
                .unwrap()
        };
        assert_eq!(exact(3.0), 19);
        assert!(
            (6..=7).contains(&exact(1.0 / (1.0 - loss))),
            "{}",
            exact(1.0 / (1.0 - loss))
        );
        // The remembered answer rounds loss up by at most a twentieth.
        assert!((19..=20).contains(&table.parity(k, 128, 1, &one(loss, 3.0), 1e-3)));
    }

    #[test]
    fn the_search_finds_the_smallest() {
        for k in [1, 3, 16, 100] {
            for (loss, burst) in [(0.0, 1.0), (1e-5, 1.0), (0.003, 2.0), (0.05, 1.25), (0.2, 3.0)] {
                for stripes in [1, 4] {
                    let paths = [
                        Lossy {
                            share: 0.5,
                            loss,
                            burst,
                        },
                        Lossy {
                            share: 0.5,
                            loss: loss / 2.0,
                            burst,
                        },
                    ];
                    let m = Table::default().parity(k, 128, stripes, &paths, 1e-3);
                    let rounded = paths.map(|path| quantise(&path).0);
                    let target = 1e-3 / to_f64(stripes);
                    assert!(
                        m == 128 || exceeds(k + m, m, stripes, &rounded) <= target,
                        "k {k} p {loss}: {m}"
                    );
                    assert!(
                        m == 0 || exceeds(k + m - 1, m - 1, stripes, &rounded) > target,
                        "k {k} p {loss}: {m}"
                    );
                }
            }
        }
    }

    #[test]
    fn interleaving_breaks_bursts() {
        let apart = exceeds(140, 12, 8, &one(0.01, 4.0));
        let together = exceeds(140, 12, 1, &one(0.01, 4.0));
        assert!(apart < together / 5.0, "{apart} {together}");
    }

    #[test]
    fn two_paths_lose_independently() {
        let half = Lossy {
            share: 0.5,
            loss: 0.1,
            burst: 1.0 / 0.9,
        };
        let both = exceeds(10, 2, 1, &[half, half]);
        let single = exceeds(10, 2, 1, &one(0.1, 1.0 / 0.9));
        assert!((both - single).abs() < 1e-12);
    }
}
