//! The only place in the product that reads a clock.

use std::time::{Duration, Instant};

use umbra_units::Now;

/// Processor time that this thread has used.
pub(crate) fn thread_time() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let part = |part: i64| u64::try_from(part).unwrap_or(0);
    Duration::from_secs(part(used.tv_sec)) + Duration::from_nanos(part(used.tv_nsec))
}

/// Moments since this clock was made. Copies agree with each other.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    beginning: Instant,
}

impl Clock {
    /// A clock that begins now.
    #[expect(clippy::new_without_default, reason = "a default should not read the time")]
    pub fn new() -> Self {
        Self {
            beginning: Instant::now(),
        }
    }

    /// This moment.
    pub fn now(&self) -> Now {
        Now::from_us(u64::try_from(self.beginning.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Wait until `moment`; for ever, if that is [`Now::NEVER`].
    pub async fn sleep_until(&self, moment: Now) {
        if moment == Now::NEVER {
            return std::future::pending().await;
        }
        tokio::time::sleep(moment.since(self.now())).await;
    }
}
