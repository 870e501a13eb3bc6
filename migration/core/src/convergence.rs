//! Whether the debt will ever be small enough, and how small it gets.
//!
//! Two questions are asked of the harvests as they come in. How many *different* pages are written within a while? That
//! grows slower than the while, because pages are written again; it is counted over four windows at once and read in
//! between on log-log paper ([`Curve`]). And how are the writes spread over the pages? That is what the heat says, summed
//! up by rate ([`Rates`]). From the first follows where rounds end: a round of `n` pages takes `n / C`, in which
//! `U(n / C)` pages are written, so it goes no lower than **n = U(n / C)**. From the second follows where the coldest
//! first ends: the link keeps up with the coldest pages until their writes fill it, and the hotter ones are left,
//! **n = min { n : Σ λ of all but the n hottest ≤ C }** (algorithms §3.2, where both hold within 20 %).

use std::collections::BTreeMap;
use std::time::Duration;

use umbra_units::{Bandwidth, Now, PageCount, PageSet, SpaceId};

use crate::guest::{Harvest, Space};
use crate::heat::Rate;
use crate::order::Order;
use crate::predict::PausePredictor;

/// What is counted over: from one harvest to longer than most rounds take.
const SPANS: [Duration; 4] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
];
/// Weight of the newest window.
const ALPHA: f64 = 0.25;

/// Counts different pages written over several windows at once.
#[derive(Debug)]
pub struct Convergence {
    windows: [Window; SPANS.len()],
    present: u64,
    /// The harvest that everything counted came after.
    began: Option<Now>,
}

#[derive(Debug)]
struct Window {
    span: Duration,
    opened: Now,
    seen: BTreeMap<SpaceId, PageSet>,
    count: u64,
    /// Means over the windows that were closed; `None` before the first.
    mean: Option<Point>,
}

/// So many different pages are written in so many seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    seconds: f64,
    pages: f64,
}

impl Convergence {
    /// Before anything was harvested.
    pub fn new(spaces: &[Space]) -> Self {
        let seen: BTreeMap<_, _> = spaces
            .iter()
            .map(|space| (space.id, PageSet::new(space.pages)))
            .collect();
        Self {
            windows: SPANS.map(|span| Window {
                span,
                opened: Now::ZERO,
                seen: seen.clone(),
                count: 0,
                mean: None,
            }),
            present: spaces.iter().map(|space| space.present_pages().0).sum(),
            began: None,
        }
    }

    /// A harvest came in. The first one only says when counting begins, as does one that names every page: a log that
    /// starts, or was lost.
    pub fn harvest(&mut self, now: Now, harvest: &Harvest) {
        let everything = harvest.count().0 >= self.present;
        if self.began.is_none() || everything {
            self.began.get_or_insert(now);
            self.windows.iter_mut().for_each(|window| window.open(now));
            return;
        }
        for window in &mut self.windows {
            window.count(harvest);
            window.close_if_over(now);
        }
    }

    /// What the windows say by now.
    pub fn curve(&self) -> Curve {
        let mut points: Vec<Point> = Vec::new();
        for point in self.windows.iter().filter_map(|window| window.mean) {
            match points.last() {
                // Harvests farther apart than a window make two windows the same one.
                Some(last) if point.seconds < last.seconds * 1.05 => {}
                Some(last) => points.push(Point {
                    pages: point.pages.max(last.pages),
                    ..point
                }),
                None => points.push(point),
            }
        }
        Curve {
            points,
            present: to_f64(self.present),
        }
    }

    /// Whether the windows have seen enough to be believed: a second of harvests.
    pub fn is_mature(&self, now: Now) -> bool {
        self.began
            .is_some_and(|began| now.since(began) >= Duration::from_secs(1))
    }
}

impl Window {
    fn open(&mut self, now: Now) {
        self.opened = now;
        if self.count > 0 {
            self.count = 0;
            self.seen.values_mut().for_each(PageSet::clear);
        }
    }

    fn count(&mut self, harvest: &Harvest) {
        for (space, dirty) in &harvest.dirty {
            if let Some(seen) = self.seen.get_mut(space) {
                let end = seen.capacity().0;
                for pfn in dirty.iter().take_while(|pfn| pfn.0 < end) {
                    self.count += u64::from(seen.insert(pfn));
                }
            }
        }
    }

    fn close_if_over(&mut self, now: Now) {
        let lasted = now.since(self.opened);
        if lasted < self.span {
            return;
        }
        let newest = Point {
            seconds: lasted.as_secs_f64(),
            pages: to_f64(self.count),
        };
        let mean = self.mean.get_or_insert(newest);
        mean.seconds += ALPHA * (newest.seconds - mean.seconds);
        mean.pages += ALPHA * (newest.pages - mean.pages);
        self.open(now);
    }
}

/// How many different pages are written within a while. See the [module](self).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Curve {
    points: Vec<Point>,
    present: f64,
}

impl Curve {
    /// Pages written within `span`; `None` before anything is known.
    pub fn within(&self, span: Duration) -> Option<f64> {
        self.at(span.as_secs_f64())
    }

    /// The windows and what was counted in each: span and different pages.
    pub fn points(&self) -> impl Iterator<Item = (Duration, f64)> + '_ {
        self.points
            .iter()
            .map(|point| (Duration::from_secs_f64(point.seconds), point.pages))
    }

    fn at(&self, seconds: f64) -> Option<f64> {
        let first = self.points.first()?;
        let after = self.points.iter().position(|point| point.seconds >= seconds);
        let pages = match after {
            // Shorter than any window: steeper than between the first two, but no steeper than one page, one write.
            Some(0) => {
                let steeper = match self.points[..] {
                    [a, b, ..] if a.pages > 0.0 => f64::midpoint(1.0, slope(a, b)),
                    _ => 1.0,
                };
                first.pages * (seconds / first.seconds).powf(steeper)
            }
            Some(n) => between(self.points[n - 1], self.points[n], seconds),
            // The slope goes on flattening as it did: memory does not grow.
            None => match self.points[..] {
                [.., a, b, c] if a.pages > 0.0 => {
                    let flattens = (slope(b, c) / slope(a, b)).clamp(0.0, 1.0);
                    let on = slope(b, c) * flattens;
                    c.pages * (seconds / c.seconds).powf(if on.is_finite() { on } else { 0.0 })
                }
                [.., a, b] => between(a, b, seconds),
                _ => first.pages * seconds / first.seconds,
            },
        };
        Some(pages.clamp(0.0, self.present))
    }

    /// Where rounds end over a link that carries `capacity` pages a second: the largest `n` with `n = U(n / capacity)`.
    pub fn round_floor(&self, capacity: f64) -> Option<f64> {
        if capacity <= 0.0 {
            return self.at(f64::MAX);
        }
        let mut pages = self.present;
        for _ in 0..200 {
            let next = self.at(pages / capacity)?;
            if pages - next < 0.25 {
                return Some(next);
            }
            pages = next;
        }
        Some(pages)
    }
}

/// On the straight line through two points on log-log paper.
fn between(a: Point, b: Point, seconds: f64) -> f64 {
    if a.pages <= 0.0 {
        return (a.pages + (b.pages - a.pages) * (seconds - a.seconds) / (b.seconds - a.seconds)).max(0.0);
    }
    a.pages * (seconds / a.seconds).powf(slope(a, b))
}

/// Of that line: one as long as every page is a new one, none once all have been seen.
fn slope(a: Point, b: Point) -> f64 {
    ((b.pages / a.pages).ln() / (b.seconds / a.seconds).ln()).clamp(0.0, 1.0)
}

/// Buckets of a quarter of an octave, from once in 64 seconds up.
const BUCKETS: usize = 72;
const SLOWEST: f64 = 1.0 / 64.0;

/// The variance that chance alone gives a rate, over the rate: of a counter of writes that come at random and of which
/// half is forgotten every four seconds, `ln 2 / 4 s / 2`.
const CHANCE: f64 = core::f64::consts::LN_2 / 4.0 / 2.0;

/// How the guest's writes are spread over its pages: pages by their rate.
///
/// Rates are estimates, and the hottest by estimate are partly the luckiest. So they are drawn together by as much as
/// chance has spread them: much where all pages are alike, hardly where a few are written a thousand times as often.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    pages: [u64; BUCKETS],
    sums: [f64; BUCKETS],
    squares: f64,
}

impl Rates {
    /// Of nothing.
    pub const fn new() -> Self {
        Self {
            pages: [0; BUCKETS],
            sums: [0.0; BUCKETS],
            squares: 0.0,
        }
    }

    /// One more page, written at this rate. `every` is the time between harvests: a page written twice in between is
    /// seen written once, and that is made up for here.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "bounded just before"
    )]
    pub fn count(&mut self, seen: Rate, every: Duration) {
        let seen = f64::from(seen.0);
        let share = (seen * every.as_secs_f64()).min(0.98);
        let rate = if share > 0.01 {
            -(-share).ln_1p() / every.as_secs_f64()
        } else {
            seen
        };
        if rate > 0.0 {
            let bucket = ((rate / SLOWEST).log2() * 4.0).clamp(0.0, to_f64(BUCKETS as u64 - 1)) as usize;
            self.pages[bucket] += 1;
            self.sums[bucket] += rate;
            self.squares += rate * rate;
        }
    }

    /// Pages counted.
    pub fn pages(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// Where the coldest first ends over a link that carries `capacity` pages a second: the fewest pages that must be
    /// left out for the writes to all others to fit.
    pub fn cold_floor(&self, capacity: f64) -> f64 {
        let mut left = capacity;
        let all = to_f64(self.pages());
        let mut floor = all;
        let mean = self.sums.iter().sum::<f64>() / all.max(1.0);
        let spread = self.squares / all.max(1.0) - mean * mean;
        let real = (1.0 - CHANCE * mean / spread.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0);
        for (pages, sum) in self.pages.iter().zip(self.sums) {
            let pages = to_f64(*pages);
            let sum = real * sum + (1.0 - real) * mean * pages;
            if sum > left {
                return floor - pages * left.max(0.0) / sum;
            }
            left -= sum;
            floor -= pages;
        }
        0.0
    }
}

impl Default for Rates {
    fn default() -> Self {
        Self::new()
    }
}

/// What is to be expected of the debt, at the link's present rate.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outlook {
    /// Different pages written within a while, for each window that has been counted.
    pub dirty: Vec<(Duration, PageCount)>,
    /// Pages the link carries in a second, as they are encoded now; zero without a link.
    pub capacity: f64,
    /// The debt that rounds in bitmap order would come down to, and the pause then.
    pub floor_round: Option<Floor>,
    /// The debt that the coldest first comes down to, and the pause then.
    pub floor_cold: Option<Floor>,
    /// The same for the order in use.
    pub floor: Option<Floor>,
    /// Whether the pause at that floor is within the limit; `None` before anything is known.
    pub converges: Option<bool>,
    /// The rate the link would need for that, if it is not; `None` also if no rate would do.
    pub needs: Option<Bandwidth>,
}

/// Where the debt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Floor {
    /// Pages left.
    pub pages: PageCount,
    /// The pause with so many left; [`Duration::MAX`] without a link.
    pub pause: Duration,
}

impl Outlook {
    /// What `curve` and `rates` lead to with this link, order and limit.
    pub fn of(curve: &Curve, rates: &Rates, predictor: &PausePredictor, order: Order, limit: Duration) -> Self {
        let capacity = predictor.capacity();
        let floor = |pages: f64| Floor {
            pages: whole(pages),
            pause: predictor.pause(whole(pages)),
        };
        let known = !curve.points.is_empty();
        let in_use = known.then(|| floor_of(curve, rates, order, capacity)).flatten();
        let converges = in_use.map(|pages| predictor.pause(whole(pages)) <= limit);
        let needs = (converges == Some(false))
            .then(|| needed(curve, rates, predictor, order, limit))
            .flatten();
        Self {
            dirty: curve.points().map(|(span, pages)| (span, whole(pages))).collect(),
            capacity,
            floor_round: curve.round_floor(capacity).map(floor),
            floor_cold: known.then(|| floor(rates.cold_floor(capacity))),
            floor: in_use.map(floor),
            converges,
            needs,
        }
    }

    /// In words for an operator, if the debt will not become small enough.
    pub fn warning(&self, limit: Duration) -> Option<String> {
        let floor = self.floor.filter(|_| self.converges == Some(false))?;
        let pause = if floor.pause == Duration::MAX {
            "no end".to_owned()
        } else {
            format!("{} ms", floor.pause.as_millis())
        };
        let needs = self.needs.map_or_else(
            || "no rate of the link would do".to_owned(),
            |rate| format!("the link would have to carry {rate}"),
        );
        Some(format!(
            "will not converge: about {} pages are left however long one waits, a pause of {pause} where {} ms are \
             allowed; {needs}",
            floor.pages,
            limit.as_millis()
        ))
    }
}

/// Where the debt ends under this order.
fn floor_of(curve: &Curve, rates: &Rates, order: Order, capacity: f64) -> Option<f64> {
    let round = curve.round_floor(capacity)?;
    Some(match order {
        Order::ColdFirst => rates.cold_floor(capacity).min(round),
        Order::Round => round,
        // Algorithms §5.1: both leave about half of what rounds leave.
        Order::SkipRedirtied | Order::Oldest => round / 2.0,
        // It ships what is written again at once, and comes to nothing else.
        Order::HotFirst => to_f64(rates.pages()).max(round),
    })
}

/// The least rate at which the pause at the floor is within the limit, to a few percent.
fn needed(
    curve: &Curve,
    rates: &Rates,
    predictor: &PausePredictor,
    order: Order,
    limit: Duration,
) -> Option<Bandwidth> {
    let enough = |rate: Bandwidth| {
        let there = predictor.at_rate(rate);
        floor_of(curve, rates, order, there.capacity()).is_some_and(|pages| there.pause(whole(pages)) <= limit)
    };
    let mut high = Bandwidth(1 << 10);
    while !enough(high) {
        // 1 TiB/s: no link, but whoever reads it sees that.
        high = Bandwidth(high.0.checked_mul(2).filter(|rate| *rate <= 1 << 40)?);
    }
    let mut low = Bandwidth(high.0 / 2);
    while high.0 - low.0 > high.0 / 32 {
        let middle = Bandwidth(low.0.midpoint(high.0));
        if enough(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Some(high)
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
const fn to_f64(n: u64) -> f64 {
    n as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate of pages"
)]
fn whole(pages: f64) -> PageCount {
    PageCount(pages.round().max(0.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predict::LinkFacts;
    use umbra_units::{Pfn, Rng};

    const PAGES: u64 = 4_096;

    fn ram() -> [Space; 1] {
        [Space::ram(PageCount(PAGES))]
    }

    /// A guest whose page `i` of rank `i + 1` is written with a rate of `total × rank^-skew / sum`.
    struct Zipf {
        rates: Vec<f64>,
        convergence: Convergence,
        now: Now,
        rng: Rng,
    }

    impl Zipf {
        fn new(skew: f64, total: f64) -> Self {
            let shares: Vec<f64> = (1..=PAGES / 2).map(|rank| to_f64(rank).powf(-skew)).collect();
            let sum: f64 = shares.iter().sum();
            Self {
                rates: shares.iter().map(|share| total * share / sum).collect(),
                convergence: Convergence::new(&ram()),
                now: Now::ZERO,
                rng: Rng::new(7),
            }
        }

        fn run(&mut self, span: Duration) {
            let end = self.now + span;
            let step = Duration::from_millis(20);
            while self.now < end {
                let mut set = PageSet::new(PageCount(PAGES));
                for (pfn, rate) in (0..).zip(&self.rates) {
                    if self.rng.chance(-(-rate * step.as_secs_f64()).exp_m1()) {
                        set.insert(Pfn(pfn));
                    }
                }
                self.now = self.now + step;
                let harvest = Harvest {
                    dirty: vec![(SpaceId::RAM, set)],
                };
                self.convergence.harvest(self.now, &harvest);
            }
        }

        /// What the windows estimate, known exactly.
        fn unique_within(&self, seconds: f64) -> f64 {
            self.rates.iter().map(|rate| -(-rate * seconds).exp_m1()).sum()
        }

        fn rates(&self) -> Rates {
            let mut rates = Rates::new();
            for rate in &self.rates {
                let seen = -(-rate * 0.02).exp_m1() / 0.02;
                #[expect(clippy::cast_possible_truncation, reason = "a rate")]
                rates.count(Rate(seen as f32), Duration::from_millis(20));
            }
            rates
        }
    }

    fn close(estimate: f64, truth: f64, share: f64) {
        assert!((estimate - truth).abs() <= truth * share, "{estimate} is not {truth}");
    }

    #[test]
    fn unique_pages_are_known_for_any_while() {
        for skew in [0.6, 1.0, 1.4] {
            let mut guest = Zipf::new(skew, 3_000.0);
            guest.run(Duration::from_secs(30));
            let curve = guest.convergence.curve();
            for ms in [10, 20, 60, 100, 300, 1_000, 2_000, 4_000] {
                let span = Duration::from_millis(ms);
                close(
                    curve.within(span).unwrap(),
                    guest.unique_within(span.as_secs_f64()),
                    0.15,
                );
            }
        }
    }

    /// Algorithms §3.2 and §5.1, with memory an eighth of theirs: rounds end where `n = U(n / C)`, the coldest first
    /// where the writes to all but the hottest fill the link.
    #[test]
    fn both_floors_are_predicted() {
        for (skew, total) in [(0.6, 1_500.0), (1.0, 2_500.0), (1.4, 5_000.0)] {
            let mut guest = Zipf::new(skew, total);
            guest.run(Duration::from_secs(30));
            let capacity = guest.unique_within(1.0) / 0.8;
            let mut round = to_f64(PAGES);
            for _ in 0..500 {
                round = guest.unique_within(round / capacity);
            }
            close(guest.convergence.curve().round_floor(capacity).unwrap(), round, 0.15);
            let mut cold = 0;
            while guest.rates[cold..].iter().sum::<f64>() > capacity {
                cold += 1;
            }
            close(guest.rates().cold_floor(capacity), to_f64(cold as u64), 0.1);
        }
    }

    /// Pages that are all alike are not taken apart by chance: with a link for four of five writes, a fifth is left.
    #[test]
    fn pages_written_alike_have_the_floor_of_pages_written_alike() {
        let mut heat = crate::heat::Heat::new(PageCount(PAGES));
        let (mut now, mut rng) = (Now::ZERO, Rng::new(9));
        let step = Duration::from_millis(20);
        for _ in 0..1_500 {
            now = now + step;
            heat.harvest(now);
            for pfn in (0..PAGES).filter(|_| rng.chance(0.012)) {
                heat.written(now, Pfn(pfn));
            }
        }
        let mut rates = Rates::new();
        heat.warmed()
            .for_each(|pfn| rates.count(heat.steady_rate(now, pfn), step));
        let written = to_f64(PAGES) * 0.012 / 0.02;
        close(rates.cold_floor(written * 0.8), to_f64(PAGES) / 5.0, 0.15);
    }

    #[test]
    fn a_link_that_carries_more_than_is_written_has_no_floor() {
        let mut guest = Zipf::new(1.0, 1_000.0);
        guest.run(Duration::from_secs(10));
        assert!(guest.convergence.curve().round_floor(20_000.0).unwrap() < 1.0);
        assert!(guest.rates().cold_floor(20_000.0) < 1.0);
    }

    #[test]
    fn an_idle_guest_converges_over_any_link() {
        let mut guest = Zipf::new(1.0, 0.0);
        guest.run(Duration::from_secs(5));
        let mut predictor = PausePredictor::new();
        predictor.link(LinkFacts {
            rate: Bandwidth(1 << 20),
            rtt: Duration::from_millis(1),
        });
        let limit = Duration::from_millis(300);
        let outlook = Outlook::of(
            &guest.convergence.curve(),
            &Rates::new(),
            &predictor,
            Order::ColdFirst,
            limit,
        );
        assert_eq!((outlook.converges, outlook.warning(limit)), (Some(true), None));
        assert_eq!(outlook.floor.unwrap().pages, PageCount::ZERO);
    }

    #[test]
    fn what_will_not_converge_is_said_with_the_rate_that_would_do() {
        let mut guest = Zipf::new(1.0, 4_000.0);
        guest.run(Duration::from_secs(20));
        let mut predictor = PausePredictor::new();
        let facts = |rate| LinkFacts {
            rate: Bandwidth(rate),
            rtt: Duration::from_millis(1),
        };
        predictor.link(facts(1_000 * 4_096));
        let limit = Duration::from_millis(100);
        let curve = guest.convergence.curve();
        let rates = guest.rates();
        let outlook = Outlook::of(&curve, &rates, &predictor, Order::ColdFirst, limit);
        assert_eq!(outlook.converges, Some(false));
        assert!(outlook.floor_cold.unwrap().pages < outlook.floor_round.unwrap().pages);
        let text = outlook.warning(limit).unwrap();
        assert!(text.starts_with("will not converge: about "), "{text}");
        let needs = outlook.needs.unwrap();
        predictor.link(facts(needs.0));
        let then = Outlook::of(&curve, &rates, &predictor, Order::ColdFirst, limit);
        assert_eq!(then.converges, Some(true));
        predictor.link(facts(needs.0 * 9 / 10));
        let almost = Outlook::of(&curve, &rates, &predictor, Order::ColdFirst, limit);
        assert_eq!(almost.converges, Some(false));
    }

    #[test]
    fn before_anything_is_known_nothing_is_claimed() {
        let convergence = Convergence::new(&ram());
        let outlook = Outlook::of(
            &convergence.curve(),
            &Rates::new(),
            &PausePredictor::new(),
            Order::Round,
            Duration::from_millis(300),
        );
        assert_eq!((outlook.converges, outlook.floor), (None, None));
        assert!(!convergence.is_mature(Now::from_us(9_000_000)));
    }

    #[test]
    fn a_log_that_names_every_page_counts_for_nothing() {
        let mut convergence = Convergence::new(&ram());
        for n in 1..200 {
            let everything = Harvest {
                dirty: vec![(SpaceId::RAM, PageSet::full(PageCount(PAGES)))],
            };
            convergence.harvest(Now::from_us(n * 20_000), &everything);
        }
        assert_eq!(convergence.curve().within(Duration::from_secs(1)), None);
    }
}
