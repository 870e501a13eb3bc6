//! Amounts: bytes, bytes per second, and shares of a whole.

use core::fmt;
use core::iter::Sum;
use core::ops::{Add, AddAssign, Sub};
use core::time::Duration;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The size of something in memory.
    pub const fn of_len(len: usize) -> Self {
        Self(len as u64)
    }

    /// This much less `other`, or none.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Bytes {
    type Output = Self;
    /// # Panics
    /// When `other` is larger: an accounting bug, never the peer's doing.
    fn sub(self, other: Self) -> Self {
        Self(
            self.0
                .checked_sub(other.0)
                .expect("more bytes taken away than there are"),
        )
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for Bytes {
    #[expect(clippy::cast_precision_loss, reason = "a display rounds anyway")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0;
        match n {
            0..1_024 => write!(f, "{n} B"),
            1_024..1_048_576 => write!(f, "{:.1} KiB", n as f64 / 1_024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", n as f64 / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", n as f64 / 1_073_741_824.0),
        }
    }
}

/// Bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bandwidth(pub u64);

impl Bandwidth {
    /// `n` megabits (10⁶ bits) per second, as networks are sold.
    pub const fn mbit(n: u64) -> Self {
        Self(n * 125_000)
    }

    /// What moving `bytes` in `span` amounts to; zero for an empty span, because it says nothing.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an estimate; the cast saturates"
    )]
    pub fn of(bytes: Bytes, span: Duration) -> Self {
        if span.is_zero() {
            return Self(0);
        }
        Self((bytes.0 as f64 / span.as_secs_f64()) as u64)
    }

    /// How long `bytes` take at this rate; `None` at rate zero.
    pub fn time_for(self, bytes: Bytes) -> Option<Duration> {
        if self.0 == 0 {
            return None;
        }
        let us = u128::from(bytes.0) * 1_000_000 / u128::from(self.0);
        Some(Duration::from_micros(u64::try_from(us).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Bandwidth {
    #[expect(clippy::cast_precision_loss, reason = "a display rounds anyway")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} Mbit/s", self.0 as f64 * 8.0 / 1e6)
    }
}

/// A share of a whole, always within `0.0..=1.0`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Ratio(f64);

impl Ratio {
    /// Nothing of it.
    pub const NONE: Self = Self(0.0);
    /// All of it.
    pub const ALL: Self = Self(1.0);

    /// `value` if it is a share of a whole.
    pub fn new(value: f64) -> Option<Self> {
        (0.0..=1.0).contains(&value).then_some(Self(value))
    }

    /// `part` of `whole`; all of it when the whole is empty, and never more than all.
    #[expect(clippy::cast_precision_loss, reason = "a share needs no more than 53 bits")]
    pub fn of(part: u64, whole: u64) -> Self {
        if whole == 0 {
            Self::ALL
        } else {
            Self((part as f64 / whole as f64).min(1.0))
        }
    }

    /// The share as a number within `0.0..=1.0`.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} %", self.0 * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bytes_over_time() {
        let rate = Bandwidth::of(Bytes::mib(1), Duration::from_millis(500));
        assert_eq!(rate, Bandwidth(2 << 20));
        assert_eq!(rate.time_for(Bytes::mib(2)), Some(Duration::from_secs(1)));
        assert_eq!(Bandwidth(0).time_for(Bytes(1)), None);
    }

    #[test]
    fn a_share_is_never_more_than_all_and_never_nonsense() {
        assert_eq!(Ratio::of(3, 2), Ratio::ALL);
        assert_eq!(Ratio::of(0, 0), Ratio::ALL);
        assert_eq!(Ratio::new(1.5), None);
        assert_eq!(Ratio::new(f64::NAN), None);
    }
}
