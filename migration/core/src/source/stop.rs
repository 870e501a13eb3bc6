//! When a switchover stops the guest.
//!
//! Not as soon as the pause is within the limit: a little more waiting may make it much shorter. And not never: what
//! cannot be reached must not be waited for (algorithms §3.1, §3.2). So, once the pause is predicted to be within the
//! limit, the guest is stopped when the debt
//!
//! - is settled: too small for waiting to matter;
//! - has come down to the floor that is predicted for the order in use;
//! - would shrink by less than the waiting is worth;
//! - has not shrunk for a while, and is about as small as it ever was, so in a trough and not on a crest;
//! - or when patience is over.
//!
//! While the pause is not within the limit nothing of this applies, but whether it ever will be is told at once.

use std::time::Duration;

use umbra_units::{Now, PageCount};

/// A debt this small is not worth waiting for: it travels in less time than a harvest takes.
const SETTLED: u64 = 64;
/// The floor is reached within this share of itself: it is predicted no better.
const AT_FLOOR: f64 = 1.15;
/// A second of waiting must shorten the pause by so much.
const WORTH: Duration = Duration::from_millis(20);
/// What counts as shrinking.
const SHRINKS: f64 = 0.95;
/// Without shrinking for so long, the debt is about to be stopped at.
const STALLED: Duration = Duration::from_millis(500);
/// As small as it ever was, or nearly so.
const NEAR_BEST: f64 = 1.1;
/// Without shrinking for so long, it is stopped at wherever it is.
const HOPELESS: Duration = Duration::from_secs(3);

/// What the debt looks like after a harvest.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// Pages not acknowledged.
    pub(super) debt: PageCount,
    /// Predicted, if the guest were stopped now.
    pub(super) pause: Duration,
    /// The longest pause that is allowed.
    pub(super) limit: Duration,
    /// Where the debt is predicted to end, and the pause there, if known.
    pub(super) floor: Option<(PageCount, Duration)>,
    /// Pages written anew between two harvests, which no waiting gets rid of.
    pub(super) between_harvests: f64,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Stop the guest.
    Stop,
    /// Go on shrinking the debt.
    Wait,
    /// The pause is not within the limit.
    TooLong,
}

/// How the debt has come down in one switchover.
#[derive(Debug)]
pub(super) struct Descent {
    began: Now,
    /// After so long, stop as soon as the limit allows.
    patience: Duration,
    /// The smallest debt so far, and when it was found.
    best: Option<(u64, Now)>,
    /// Where the latest stretch of the descent began, to see how quick it is.
    stretch: Option<(u64, Now)>,
    /// Pages a second by which the debt came down in the stretch before.
    speed: Option<f64>,
}

impl Descent {
    pub(super) const fn new(began: Now, patience: Duration) -> Self {
        Self {
            began,
            patience,
            best: None,
            stretch: None,
            speed: None,
        }
    }

    /// Look at the debt once more.
    #[expect(clippy::cast_precision_loss, reason = "thresholds")]
    pub(super) fn look(&mut self, now: Now, view: View) -> Verdict {
        let debt = view.debt.0;
        let (best, best_at) = match self.best {
            Some((best, at)) if debt as f64 > best as f64 * SHRINKS => (best.min(debt), at),
            _ => (debt, now),
        };
        self.best = Some((best, best_at));
        self.measure_speed(now, debt);
        if view.pause > view.limit {
            return Verdict::TooLong;
        }
        let stalled = now.since(best_at);
        let settled = debt <= SETTLED;
        let at_floor = view.floor.is_some_and(|(floor, _)| {
            debt as f64 <= floor.0 as f64 * AT_FLOOR + view.between_harvests + SETTLED as f64
        });
        let in_trough = stalled >= STALLED && debt as f64 <= best as f64 * NEAR_BEST + SETTLED as f64;
        let impatient = now.since(self.began) >= self.patience;
        if settled || at_floor || in_trough || stalled >= HOPELESS || impatient || !self.is_worth_waiting(view) {
            Verdict::Stop
        } else {
            Verdict::Wait
        }
    }

    /// Whether the debt has not shrunk for a while.
    pub(super) fn has_stalled(&self, now: Now) -> bool {
        self.best.is_some_and(|(_, at)| now.since(at) >= STALLED)
    }

    /// Whether the way down to the floor is short for what it saves.
    #[expect(clippy::cast_precision_loss, reason = "thresholds")]
    fn is_worth_waiting(&self, view: View) -> bool {
        let (Some((floor, pause_there)), Some(speed)) = (view.floor, self.speed.filter(|speed| *speed > 0.0)) else {
            return true; // not known yet
        };
        let saved = view.pause.saturating_sub(pause_there).as_secs_f64();
        let way = view.debt.0.saturating_sub(floor.0) as f64 / speed;
        saved >= way * WORTH.as_secs_f64()
    }

    /// Over stretches of a tenth of a second, so that single harvests do not matter.
    #[expect(clippy::cast_precision_loss, reason = "a speed")]
    fn measure_speed(&mut self, now: Now, debt: u64) {
        let (began_with, began) = *self.stretch.get_or_insert((debt, now));
        let lasted = now.since(began);
        if lasted >= Duration::from_millis(100) {
            self.speed = Some((began_with as f64 - debt as f64) / lasted.as_secs_f64());
            self.stretch = Some((debt, now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    /// Over a link of 10 pages a millisecond.
    fn pause(debt: u64) -> Duration {
        5 * MS + MS.mul_f64(f64::from(u32::try_from(debt).unwrap()) / 10.0)
    }

    fn view(debt: u64, floor: Option<u64>) -> View {
        View {
            debt: PageCount(debt),
            pause: pause(debt),
            limit: 300 * MS,
            floor: floor.map(|floor| (PageCount(floor), pause(floor))),
            between_harvests: 10.0,
        }
    }

    fn at(ms: u64) -> Now {
        Now::ZERO + Duration::from_millis(ms)
    }

    fn descent() -> Descent {
        Descent::new(Now::ZERO, Duration::from_secs(30))
    }

    #[test]
    fn a_settled_debt_stops_at_once() {
        assert_eq!(descent().look(at(0), view(3, None)), Verdict::Stop);
        assert_eq!(descent().look(at(0), view(3, Some(0))), Verdict::Stop);
    }

    #[test]
    fn a_debt_that_shrinks_is_followed_down_to_its_floor() {
        let mut descent = descent();
        for (n, debt) in (0..).zip([2_500, 2_000, 1_500, 1_000, 700]) {
            assert_eq!(
                descent.look(at(n * 100), view(debt, Some(500))),
                Verdict::Wait,
                "{debt}"
            );
        }
        assert_eq!(descent.look(at(500), view(640, Some(500))), Verdict::Stop);
    }

    #[test]
    fn above_the_limit_nothing_stops_the_guest_whatever_the_patience() {
        let mut descent = descent();
        for n in 0..1_000 {
            assert_eq!(descent.look(at(n * 100), view(5_000, Some(5_000))), Verdict::TooLong);
        }
        assert_eq!(descent.look(at(100_000), view(2_900, Some(2_000))), Verdict::Stop);
    }

    #[test]
    fn a_debt_that_no_longer_shrinks_is_stopped_at_in_a_trough() {
        let mut descent = descent();
        assert_eq!(descent.look(at(0), view(1_000, None)), Verdict::Wait);
        for n in 1..10 {
            let debt = if n % 2 == 0 { 1_000 } else { 2_000 };
            let verdict = descent.look(at(n * 90), view(debt, None));
            let stops = n * 90 >= 500 && debt == 1_000;
            assert_eq!(verdict == Verdict::Stop, stops, "{n}");
            if stops {
                return;
            }
        }
        panic!("never stopped");
    }

    #[test]
    fn a_debt_that_only_grows_is_stopped_at_in_the_end() {
        let mut descent = descent();
        let stopped = (0..100).find(|n| descent.look(at(n * 100), view(1_000 + n * 60, None)) == Verdict::Stop);
        assert_eq!(stopped, Some(30));
    }

    #[test]
    fn a_long_way_for_a_small_gain_is_not_gone() {
        let mut descent = descent();
        // 20 pages in a tenth of a second: a second for 200 pages, which are 20 ms; then half as quick.
        let steps = [(0, 2_000), (100, 1_880), (200, 1_870)];
        let verdicts = steps.map(|(ms, debt)| descent.look(at(ms), view(debt, Some(0))));
        assert_eq!(verdicts, [Verdict::Wait, Verdict::Wait, Verdict::Stop]);
    }

    #[test]
    fn patience_ends_at_the_first_moment_within_the_limit() {
        let mut descent = Descent::new(Now::ZERO, Duration::from_secs(1));
        assert_eq!(descent.look(at(0), view(2_900, Some(10))), Verdict::Wait);
        assert_eq!(descent.look(at(1_000), view(1_500, Some(10))), Verdict::Stop);
    }
}
