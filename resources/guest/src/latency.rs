//! How long things took: a histogram whose buckets are a sixteenth of their size apart.
//!
//! Percentiles from it are at most that much too high, which is less than two runs on one machine differ by, and a
//! record costs a few instructions however many there are.

/// Buckets per power of two.
const STEPS: u64 = 16;
const BUCKETS: usize = 61 * STEPS as usize;

/// Counts of values, by size.
#[derive(Clone)]
pub struct Latencies {
    counts: [u32; BUCKETS],
    total: u64,
    most: u64,
}

impl Latencies {
    /// None yet.
    pub const fn none() -> Self {
        Self {
            counts: [0; BUCKETS],
            total: 0,
            most: 0,
        }
    }

    /// One more.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.most = self.most.max(value);
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The largest.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// The value that so many of a thousand are not above: the upper edge of its bucket, or the largest.
    pub fn permille(&self, permille: u64) -> u64 {
        let rank = (self.total * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= rank {
                return edge(index).min(self.most);
            }
        }
        self.most
    }
}

/// Small values have a bucket each; above, the four bits behind the leading one choose.
fn bucket(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let exponent = u64::from(value.ilog2());
    ((exponent - 3) * STEPS + ((value >> (exponent - 4)) & (STEPS - 1))) as usize
}

/// The largest value of a bucket.
fn edge(index: usize) -> u64 {
    let (octave, step) = (index as u64 / STEPS, index as u64 % STEPS);
    match octave.checked_sub(1) {
        None => step,
        Some(shift) => ((STEPS + step) << shift) + ((1 << shift) - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_at_most_a_sixteenth_too_high() {
        let mut latencies = Latencies::none();
        for value in 1..=100_000 {
            latencies.record(value);
        }
        for permille in [1, 10, 500, 990, 999] {
            let (exact, found) = (100 * permille, latencies.permille(permille));
            assert!(found >= exact && found <= exact + exact / 16 + 1, "{permille}: {found}");
        }
        assert_eq!((latencies.permille(1000), latencies.most()), (100_000, 100_000));
    }

    #[test]
    fn every_value_has_a_bucket_that_ends_at_or_above_it() {
        for shift in 0..64 {
            for value in [
                1u64 << shift,
                (1u64 << shift) | ((1u64 << shift) >> 3),
                u64::MAX >> shift,
            ] {
                let at = bucket(value);
                assert!(at < BUCKETS, "{value}");
                assert!(edge(at) >= value, "{value} in {at}");
                assert!(at == 0 || edge(at - 1) < value, "{value} in {at}");
            }
        }
    }

    #[test]
    fn nothing_recorded_is_zero() {
        assert_eq!(Latencies::none().permille(500), 0);
    }
}
