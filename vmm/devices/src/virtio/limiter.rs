//! How much a device may do: token buckets for bytes and for operations.
//!
//! A bucket holds `size` tokens, refills evenly in `refill`, and starts with a one-time `burst` on top that is spent first and never
//! comes back: what an operator of Firecracker knows. A request takes its tokens whole or not at all. One that needs
//! more than the bucket can ever hold waits until it is full and then leaves a debt, which is refilled first: large requests are
//! slow, not impossible.
//!
//! Time comes in as an argument. After a move the budgets go on where they were; the time in between refills nothing,
//! and a debt is forgiven: what a peer says a device owes could keep it still for years.

use std::time::Duration;

use umbra_units::{Malformed, Now, Reader, Writer};

/// One bucket, as an operator gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    size: u64,
    refill: Duration,
    burst: u64,
}

/// What a device may do; without a rate, as much as it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bandwidth: Option<Rate>,
    /// Operations.
    pub operations: Option<Rate>,
}

/// A device's budgets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limiter {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

/// A rate that limits nothing or everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a size from 1 to {most} and a refill time from 1 ms to a day", most = Rate::MOST)]
pub struct NoRate;

impl Rate {
    /// The largest bucket and burst: a pebibyte.
    pub const MOST: u64 = 1 << 50;

    /// `size` tokens every `refill`, and `burst` once.
    pub fn new(size: u64, refill: Duration, burst: u64) -> Result<Self, NoRate> {
        let sizes = (1..=Self::MOST).contains(&size) && burst <= Self::MOST;
        let times = Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60);
        if sizes && times.contains(&refill) {
            Ok(Self { size, refill, burst })
        } else {
            Err(NoRate)
        }
    }

    fn refill_us(self) -> u128 {
        self.refill.as_micros()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Bucket {
    rate: Rate,
    /// At most `rate.size`; less than none after a request larger than the bucket.
    tokens: i128,
    /// What is left of the one-time burst.
    burst: u64,
    /// When `tokens` was refilled last. `None` until the first request here.
    filled: Option<Now>,
    /// What had been refilled then of the next token, in parts of a microsecond's: less than `rate.refill`.
    part: u128,
}

impl Limiter {
    /// Full buckets.
    pub fn new(limits: Limits) -> Self {
        Self {
            bandwidth: limits.bandwidth.map(Bucket::new),
            operations: limits.operations.map(Bucket::new),
        }
    }

    /// Take one operation of `bytes` bytes, or nothing and say when there will be enough.
    pub fn take(&mut self, now: Now, bytes: u64) -> Result<(), Now> {
        let ready = |bucket: &mut Option<Bucket>, tokens| {
            let bucket = bucket.as_mut();
            bucket.map_or(now, |bucket| bucket.ready_at(now, tokens))
        };
        let enough = ready(&mut self.bandwidth, bytes).max(ready(&mut self.operations, 1));
        if enough > now {
            return Err(enough);
        }
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        Ok(())
    }

    /// Other limits, from now on: full buckets again.
    pub fn set(&mut self, limits: Limits) {
        *self = Self::new(limits);
    }

    /// Write the budgets: for each bucket whether there is one, its tokens and its burst.
    pub fn save(&self, w: &mut Writer) {
        for bucket in [&self.bandwidth, &self.operations] {
            let (tokens, burst) = bucket
                .as_ref()
                .map_or((0, 0), |bucket| (bucket.tokens.max(0), bucket.burst));
            let tokens = u64::try_from(tokens).expect("at most a bucket's size");
            w.u8(bucket.is_some().into()).u64(tokens).u64(burst);
        }
    }

    /// Take up what was saved, within the limits set here.
    pub fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed> {
        for bucket in [&mut self.bandwidth, &mut self.operations] {
            let limited = r.u8("limited")? != 0;
            let tokens = r.u64("tokens")?;
            let burst = r.u64("burst")?;
            if let Some(bucket) = bucket.as_mut().filter(|_| limited) {
                bucket.tokens = tokens.min(bucket.rate.size).into();
                bucket.burst = burst.min(bucket.rate.burst);
            }
        }
        Ok(())
    }
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self {
            rate,
            tokens: rate.size.into(),
            burst: rate.burst,
            filled: None,
            part: 0,
        }
    }

    /// When a request of this many tokens can be served: `now`, or later.
    fn ready_at(&mut self, now: Now, tokens: u64) -> Now {
        self.refill(now);
        let wanted = i128::from(tokens.min(self.rate.size));
        match u128::try_from(wanted - self.tokens - i128::from(self.burst)) {
            Ok(missing) if missing > 0 => {
                let us = (missing * self.rate.refill_us() - self.part).div_ceil(self.rate.size.into());
                now + Duration::from_micros(u64::try_from(us).unwrap_or(u64::MAX))
            }
            _ => now,
        }
    }

    fn refill(&mut self, now: Now) {
        let us = now.since(*self.filled.get_or_insert(now)).as_micros();
        let parts = us * u128::from(self.rate.size) + self.part;
        let added = i128::try_from(parts / self.rate.refill_us()).unwrap_or(i128::MAX);
        self.part = parts % self.rate.refill_us();
        self.filled = self.filled.max(Some(now));
        self.tokens = self.tokens.saturating_add(added);
        if self.tokens >= self.rate.size.into() {
            self.tokens = self.rate.size.into();
            self.part = 0;
        }
    }

    fn take(&mut self, tokens: u64) {
        let once = tokens.min(self.burst);
        self.burst -= once;
        self.tokens -= i128::from(tokens - once);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(size: u64, ms: u64, burst: u64) -> Rate {
        Rate::new(size, Duration::from_millis(ms), burst).unwrap()
    }

    fn bytes(rate: Rate) -> Limiter {
        Limiter::new(Limits {
            bandwidth: Some(rate),
            operations: None,
        })
    }

    fn ms(n: u64) -> Now {
        Now::from_us(n * 1_000)
    }

    #[test]
    fn a_bucket_refills_evenly() {
        let mut limiter = bytes(rate(1_000, 1_000, 0));
        assert_eq!(limiter.take(ms(5), 1_000), Ok(()));
        assert_eq!(limiter.take(ms(5), 100), Err(ms(105)));
        assert_eq!(limiter.take(ms(104), 100), Err(ms(105)));
        assert_eq!(limiter.take(ms(105), 100), Ok(()));
        assert_eq!(limiter.take(ms(90_000), 1_000), Ok(()), "and never beyond its size");
        assert_eq!(limiter.take(ms(90_000), 1), Err(ms(90_001)));
    }

    #[test]
    fn the_burst_is_spent_first_and_once() {
        let mut limiter = bytes(rate(10, 1_000, 100));
        assert_eq!(limiter.take(ms(0), 105), Ok(()));
        assert_eq!(limiter.take(ms(0), 5), Ok(()));
        assert_eq!(limiter.take(ms(0), 10), Err(ms(1_000)));
        assert_eq!(limiter.take(ms(60_000), 10), Ok(()));
        assert_eq!(limiter.take(ms(60_000), 10), Err(ms(61_000)));
    }

    #[test]
    fn a_request_larger_than_the_bucket_waits_until_it_is_full_and_leaves_a_debt() {
        let mut limiter = bytes(rate(10, 1_000, 0));
        assert_eq!(limiter.take(ms(0), 1), Ok(()));
        assert_eq!(limiter.take(ms(0), 35), Err(ms(100)));
        assert_eq!(limiter.take(ms(100), 35), Ok(()));
        assert_eq!(limiter.take(ms(100), 1), Err(ms(2_700)), "25 of debt, and one");
        assert_eq!(limiter.take(ms(2_700), 1), Ok(()));
    }

    #[test]
    fn both_buckets_must_agree_and_neither_pays_for_the_other() {
        let mut limiter = Limiter::new(Limits {
            bandwidth: Some(rate(1_000, 1_000, 0)),
            operations: Some(rate(2, 1_000, 0)),
        });
        assert_eq!(limiter.take(ms(0), 300), Ok(()));
        assert_eq!(limiter.take(ms(0), 800), Err(ms(100)), "bytes are missing");
        assert_eq!(limiter.take(ms(0), 300), Ok(()));
        assert_eq!(limiter.take(ms(0), 300), Err(ms(500)), "operations are missing");
        assert_eq!(limiter.take(ms(500), 900), Ok(()), "what was refused cost nothing");
        assert_eq!(Limiter::new(Limits::default()).take(ms(0), u64::MAX), Ok(()));
    }

    #[test]
    fn over_any_long_time_no_more_passes_than_the_rate_and_not_much_less() {
        let mut rng = umbra_units::Rng::new(3);
        for _ in 0..200 {
            let (size, refill) = (1 + rng.below(5_000), 1 + rng.below(2_000));
            let mut limiter = bytes(rate(size, refill, 0));
            let (mut now, mut passed) = (Now::ZERO, 0);
            while now < ms(20_000) {
                let want = 1 + rng.below(size);
                match limiter.take(now, want) {
                    Ok(()) => passed += want,
                    Err(at) => {
                        assert!(at > now);
                        now = at;
                    }
                }
            }
            let fair = size * 20_000 / refill;
            assert!(
                passed <= fair + 2 * size && passed + 2 * size >= fair,
                "{passed} of {fair}"
            );
        }
    }

    #[test]
    fn budgets_travel_and_a_peers_claims_stay_within_the_limits_here() {
        let mut limiter = bytes(rate(1_000, 1_000, 50));
        limiter.take(ms(0), 1_040).unwrap();
        let mut w = Writer::new();
        limiter.save(&mut w);
        let mut there = bytes(rate(1_000, 1_000, 50));
        there.load(&mut Reader::new(w.as_slice())).unwrap();
        assert_eq!(
            there.take(ms(7), 11),
            Err(ms(8)),
            "ten are left, whatever the clock there says"
        );
        let mut greedy = Writer::new();
        greedy.u8(1).u64(1 << 60).u64(1 << 60).u8(0).u64(0).u64(0);
        there.load(&mut Reader::new(greedy.as_slice())).unwrap();
        assert_eq!(there.take(ms(8), 1_050), Ok(()));
        assert!(there.take(ms(8), 1).is_err());
    }

    #[test]
    fn a_rate_of_nothing_is_refused() {
        let second = Duration::from_secs(1);
        assert_eq!(Rate::new(0, second, 0), Err(NoRate));
        assert_eq!(Rate::new(1, Duration::ZERO, 0), Err(NoRate));
        assert_eq!(Rate::new(u64::MAX, second, 0), Err(NoRate));
        assert_eq!(Rate::new(1, second, u64::MAX), Err(NoRate));
    }
}
