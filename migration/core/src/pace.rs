//! How long to wait until the next harvest.
//!
//! A harvest tells what to ship and what is hot, and the sooner the next one, the less is copied in vain. It costs the
//! host a system call over the log, and the guest a fault for every page that it writes again: the pages are protected
//! anew each time. So a guest that writes is harvested often enough that two in a hundred of its pages are found written
//! each time (algorithms §2, S0.1), within the bounds of the configuration, and less often where that would cost more
//! than it tells. One that writes nothing is left alone for longer.

use std::time::Duration;

use umbra_units::PageCount;

/// Share of all pages that a harvest should find written.
const AIM: f64 = 0.02;
/// A write to a page that a harvest has protected again (measured, `handbook/kvm.md`; more on hosts without hardware
/// help, less on large ones).
const FAULT: Duration = Duration::from_nanos(2_400);
/// Share of one vCPU's time that those faults may take for harvests to come more often.
const FAULTS_MOST: f64 = 0.05;
/// Share of the time that harvesting itself may take, whatever the bounds say.
const HARVEST_MOST: f64 = 0.1;
/// Harvests in a row that found nothing, after which a guest is idle.
const QUIET: u32 = 5;

/// The bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Of a guest that writes much: not sooner.
    pub least: Duration,
    /// Of a guest that writes: not later.
    pub most: Duration,
    /// Of a guest that has written nothing for a while.
    pub idle: Duration,
}

/// Decides the pace from what the harvests found and cost.
#[derive(Debug, Clone)]
pub struct Pace {
    bounds: Bounds,
    pages: PageCount,
    quiet: u32,
    now: Duration,
}

impl Pace {
    /// For a guest of so many pages.
    pub const fn new(bounds: Bounds, pages: PageCount) -> Self {
        Self {
            bounds,
            pages,
            quiet: 0,
            now: bounds.most,
        }
    }

    /// The present pace.
    pub const fn now(&self) -> Duration {
        self.now
    }

    /// A harvest found so many pages written in the time since the last one, and took so long itself.
    pub fn harvested(&mut self, written: PageCount, since: Duration, took: Duration) {
        self.quiet = if written == PageCount::ZERO {
            self.quiet.saturating_add(1)
        } else {
            0
        };
        let busy = self.busy(written, since);
        let wanted = if self.quiet > QUIET { self.bounds.idle } else { busy };
        // A harvest that takes long is not hurried by any bound, but an idle guest's pace is slow enough for all.
        let bearable = took.div_f64(HARVEST_MOST).min(self.bounds.idle);
        self.now = wanted.max(bearable);
    }

    #[expect(clippy::cast_precision_loss, reason = "a pace")]
    fn busy(&self, written: PageCount, since: Duration) -> Duration {
        let Bounds { least, most, .. } = self.bounds;
        if written == PageCount::ZERO || since.is_zero() {
            return most;
        }
        let aimed = since.mul_f64(self.pages.0 as f64 * AIM / written.0 as f64);
        // However soon it comes, a harvest protects at most what this one found: that many faults.
        let faults = FAULT.mul_f64(written.0 as f64 / FAULTS_MOST);
        aimed.max(faults).clamp(least.min(most), most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn pace(pages: u64) -> Pace {
        let bounds = Bounds {
            least: 5 * MS,
            most: 20 * MS,
            idle: 100 * MS,
        };
        Pace::new(bounds, PageCount(pages))
    }

    #[test]
    fn two_in_a_hundred_pages_are_aimed_at_within_the_bounds() {
        let mut pace = pace(4_096);
        pace.harvested(PageCount(164), 20 * MS, MS / 10);
        assert!(
            pace.now() > 9 * MS,
            "one harvest's faults are worth 8 ms: {:?}",
            pace.now()
        );
        pace.harvested(PageCount(20), 20 * MS, MS / 10);
        assert_eq!(pace.now(), 20 * MS);
        pace.harvested(PageCount(100), 5 * MS, MS / 10);
        assert_eq!(pace.now(), 5 * MS);
    }

    #[test]
    fn a_guest_is_not_made_to_fault_for_what_harvests_tell() {
        let mut pace = pace(65_536);
        pace.harvested(PageCount(4_000), 20 * MS, MS / 10);
        assert_eq!(pace.now(), 20 * MS, "4000 faults are 10 ms of a vCPU");
    }

    #[test]
    fn an_idle_guest_is_left_alone_until_it_writes() {
        let mut pace = pace(1_000);
        for _ in 0..5 {
            pace.harvested(PageCount::ZERO, 20 * MS, MS / 10);
            assert_eq!(pace.now(), 20 * MS);
        }
        pace.harvested(PageCount::ZERO, 20 * MS, MS / 10);
        assert_eq!(pace.now(), 100 * MS);
        pace.harvested(PageCount(1), 100 * MS, MS / 10);
        assert_eq!(pace.now(), 20 * MS);
    }

    #[test]
    fn a_harvest_that_takes_long_comes_less_often() {
        let mut pace = pace(1_000_000);
        pace.harvested(PageCount(100_000), 20 * MS, 4 * MS);
        assert_eq!(pace.now(), 40 * MS);
        pace.harvested(PageCount(100_000), 40 * MS, 400 * MS);
        assert_eq!(pace.now(), 100 * MS);
    }

    #[test]
    fn bounds_the_wrong_way_round_are_no_trouble() {
        let bounds = Bounds {
            least: 50 * MS,
            most: MS,
            idle: MS,
        };
        let mut pace = Pace::new(bounds, PageCount(10));
        pace.harvested(PageCount(5), MS, MS);
        assert_eq!(pace.now(), MS);
    }
}
