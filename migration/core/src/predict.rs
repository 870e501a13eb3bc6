//! How long a pause would be, if the guest were stopped now.
//!
//! The parts are predicted from what this session measured (algorithms §3.1, without its quantiles, which come with
//! protection): a fixed part that does not depend on the debt (stop, harvests, save, restore), the bytes of the debt over
//! the link's rate, and three one-way trips (the final block, *prepared*, *go*). Peers ignore all but the bytes.

use std::time::Duration;

use umbra_units::{Bandwidth, Bytes, PAGE_SIZE, PageCount};

use crate::report::PauseBreakdown;

/// What a new session assumes until it has measured: stop 0.5, harvest 0.2, save 1, restore 1, verify 0.1 ms.
const FIXED_AT_FIRST: Duration = Duration::from_micros(2_800);
/// Copying, hashing and encoding one page, and applying it at the other side.
const PER_PAGE: Duration = Duration::from_nanos(3_000);
/// State records of a small guest, until measured.
const STATE_AT_FIRST: Bytes = Bytes(32 << 10);
/// Weight of the newest measurement.
const ALPHA: f64 = 0.2;

/// What the link can do, as the transport sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkFacts {
    /// All live paths together.
    pub rate: Bandwidth,
    /// Of the quickest live path.
    pub rtt: Duration,
}

/// Predicts the pause from this session's own measurements.
#[derive(Debug, Clone)]
pub struct PausePredictor {
    link: LinkFacts,
    fixed: Duration,
    bytes_per_page: f64,
    state: Bytes,
}

impl PausePredictor {
    /// Before anything was measured: pages travel raw.
    pub fn new() -> Self {
        #[expect(clippy::cast_precision_loss, reason = "4096 is exact")]
        let raw = PAGE_SIZE as f64;
        Self {
            link: LinkFacts::default(),
            fixed: FIXED_AT_FIRST,
            bytes_per_page: raw,
            state: STATE_AT_FIRST,
        }
    }

    /// The link changed.
    pub const fn link(&mut self, facts: LinkFacts) {
        self.link = facts;
    }

    /// A batch of `pages` that had to travel became `bytes`. Pages found unchanged do not count: an idle guest's next
    /// writes will not be free.
    #[expect(clippy::cast_precision_loss, reason = "a mean")]
    pub fn encoded(&mut self, pages: u64, bytes: Bytes) {
        if pages > 0 {
            let newest = bytes.0 as f64 / pages as f64;
            self.bytes_per_page = (1.0 - ALPHA) * self.bytes_per_page + ALPHA * newest;
        }
    }

    /// An earlier attempt measured these parts; those that do not depend on the debt are kept.
    pub fn measured(&mut self, parts: &PauseBreakdown, state: Bytes) {
        self.fixed = parts.stop + parts.harvest + parts.save + parts.verify + parts.restore;
        self.state = state;
    }

    /// Pages the link carries in a second, as they are encoded now; zero over a link that moves nothing.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn capacity(&self) -> f64 {
        self.link.rate.0 as f64 / self.bytes_per_page.max(1.0)
    }

    /// What it would predict, had the link this rate.
    #[must_use]
    pub fn at_rate(&self, rate: Bandwidth) -> Self {
        let link = LinkFacts { rate, ..self.link };
        Self { link, ..self.clone() }
    }

    /// The largest debt with which the pause would be at most this; none if there is not even time for the rest.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an estimate, rounded down"
    )]
    pub fn pages_within(&self, pause: Duration) -> PageCount {
        let empty = self.pause(PageCount::ZERO);
        let Some(left) = pause.checked_sub(empty) else {
            return PageCount::ZERO;
        };
        let per_page = PER_PAGE.as_secs_f64() + 1.0 / self.capacity();
        PageCount((left.as_secs_f64() / per_page) as u64)
    }

    /// The link's round trip.
    pub const fn rtt(&self) -> Duration {
        self.link.rtt
    }

    /// The pause if the guest were stopped with this debt; [`Duration::MAX`] over a link that moves nothing.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an estimate"
    )]
    pub fn pause(&self, debt: PageCount) -> Duration {
        let bytes = Bytes((debt.0 as f64 * self.bytes_per_page) as u64) + self.state;
        let Some(transfer) = self.link.rate.time_for(bytes) else {
            return Duration::MAX;
        };
        let work = PER_PAGE.saturating_mul(u32::try_from(debt.0).unwrap_or(u32::MAX));
        self.fixed
            .saturating_add(transfer)
            .saturating_add(work)
            .saturating_add(self.link.rtt * 3 / 2)
    }
}

impl Default for PausePredictor {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_fixed_work_plus_bytes_plus_three_trips() {
        let mut predictor = PausePredictor::new();
        assert_eq!(predictor.pause(PageCount(1)), Duration::MAX, "no link, no switchover");
        predictor.link(LinkFacts {
            rate: Bandwidth(4096 * 1_000),
            rtt: Duration::from_millis(20),
        });
        let hundred = predictor.pause(PageCount(100));
        let expected = FIXED_AT_FIRST + Duration::from_millis(108) + PER_PAGE * 100 + Duration::from_millis(30);
        assert_eq!(hundred, expected);
        for _ in 0..100 {
            predictor.encoded(64, Bytes(64 * 40));
        }
        assert!(
            predictor.pause(PageCount(100)) < Duration::from_millis(50),
            "deltas shorten it"
        );
    }

    #[test]
    fn as_many_pages_fit_a_pause_as_make_it() {
        let mut predictor = PausePredictor::new();
        assert_eq!(
            predictor.pages_within(Duration::from_secs(9)),
            PageCount::ZERO,
            "no link"
        );
        predictor.link(LinkFacts {
            rate: Bandwidth(4096 * 10_000),
            rtt: Duration::from_millis(2),
        });
        let most = Duration::from_millis(50);
        let fits = predictor.pages_within(most);
        assert!(fits > PageCount(100) && predictor.pause(fits) <= most);
        assert!(predictor.pause(fits + PageCount(2)) > most);
        assert_eq!(predictor.pages_within(Duration::from_millis(1)), PageCount::ZERO);
    }
}
