//! Moments. Spans are [`core::time::Duration`]; a moment is not a span, so it has its own type.

use core::fmt;
use core::ops::{Add, Sub};
use core::time::Duration;

/// A moment: microseconds since some beginning that the driver chose (the process start, the simulation's zero).
///
/// Two nodes' moments are not comparable; nothing in Umbra ever compares them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Now(u64);

impl Now {
    /// The driver's beginning.
    pub const ZERO: Self = Self(0);
    /// Later than any moment a driver will ever name.
    pub const NEVER: Self = Self(u64::MAX);

    /// The moment `us` microseconds after the beginning.
    pub const fn from_us(us: u64) -> Self {
        Self(us)
    }

    /// Microseconds since the beginning.
    pub const fn as_us(self) -> u64 {
        self.0
    }

    /// How long ago `earlier` was; zero if it is not earlier, so that a clock read out of order is harmless.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Now {
    type Output = Self;
    fn add(self, span: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)),
        )
    }
}

impl Sub<Duration> for Now {
    type Output = Self;
    fn sub(self, span: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)),
        )
    }
}

impl fmt::Display for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}s", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_and_a_span_make_a_moment() {
        let later = Now::from_us(5) + Duration::from_millis(2);
        assert_eq!(later, Now::from_us(2_005));
        assert_eq!(later.since(Now::from_us(5)), Duration::from_millis(2));
        assert_eq!(Now::from_us(5).since(later), Duration::ZERO);
        assert_eq!(Now::NEVER + Duration::from_secs(1), Now::NEVER);
    }
}
