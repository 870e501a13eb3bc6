//! Which owed page is taken next.
//!
//! A page written again before it was needed has travelled for nothing. So the page to ship is the one least likely to be
//! written again, and the hottest wait longest: *coldest first* leaves a quarter of the pages at the stop that rounds in
//! bitmap order leave, when the guest writes nearly as fast as the link carries (algorithms §5.1). The other orders are
//! here so that the choice can be measured: rounds are what QEMU and cloud-hypervisor do, hottest first is what an early
//! design asked for and what never converges.
//!
//! # Lanes
//!
//! Owed pages nobody was seen writing are a bitmap, walked in ascending order: the whole of memory while seeding. The
//! others stand in lanes by their heat, half an octave of rate each, every page once. A lane is first in, first out, so
//! that its front has cooled longest; whoever takes compares the fronts as they are now and takes the coldest. A page
//! written while it stands in a lane is not touched there: at the front it is found to have been written since it came,
//! and goes to the back of the lane where it belongs. So a write costs one step at most, however long the page waits.
//!
//! # Nobody starves
//!
//! With more writes than the link carries, the coldest first would never come to the hottest. One page in
//! 64 is therefore taken by walking over all owed pages in turn. What is deferred (see [`Hold`]) waits by
//! intent, and only while it fits.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use umbra_units::{Now, PageCount, PageSet, Pfn};

use crate::heat::{Heat, Rate, tick};

/// The order in which owed pages are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Order {
    /// The page least likely to be written again first; hot pages wait.
    #[default]
    ColdFirst,
    /// In rounds, each in bitmap order: pages written during a round belong to the next one.
    Round,
    /// In rounds, but a page found written again before its turn is left to the next one.
    SkipRedirtied,
    /// The page that has been owed longest first.
    Oldest,
    /// The page most likely to be written again first.
    HotFirst,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::ColdFirst,
        Self::Round,
        Self::SkipRedirtied,
        Self::Oldest,
        Self::HotFirst,
    ];

    /// Its name, as an operator gives it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ColdFirst => "cold-first",
            Self::Round => "round",
            Self::SkipRedirtied => "skip-redirtied",
            Self::Oldest => "oldest",
            Self::HotFirst => "hot-first",
        }
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that names no order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cold-first, round, skip-redirtied, oldest or hot-first expected")]
pub struct UnknownOrder;

impl FromStr for Order {
    type Err = UnknownOrder;

    fn from_str(text: &str) -> Result<Self, UnknownOrder> {
        Self::ALL
            .into_iter()
            .find(|order| order.name() == text)
            .ok_or(UnknownOrder)
    }
}

/// Which owed pages wait although there is room: hot ones, as long as all of them fit the final block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hold {
    /// Pages written at least so often wait.
    pub from: Rate,
    /// While no more pages than this are owed. Beyond it the coldest are taken as if nothing were held.
    pub most: PageCount,
}

/// One page in so many is taken in turn, whatever its heat.
const WALK_EVERY: u32 = 64;

/// The owed pages of one space, in line.
#[derive(Debug)]
pub(crate) struct Line {
    owed: PageSet,
    owed_count: u64,
    by: By,
    /// Where the walk over all owed pages goes on.
    walk: Pfn,
    until_walk: u32,
}

#[derive(Debug)]
enum By {
    Heat(Lanes),
    Round(Rounds),
    Age(Ages),
}

impl Line {
    /// With these pages owed from the beginning.
    pub(crate) fn new(order: Order, owed: PageSet) -> Self {
        let by = match order {
            Order::ColdFirst => By::Heat(Lanes::new(&owed, false)),
            Order::HotFirst => By::Heat(Lanes::new(&owed, true)),
            Order::Round => By::Round(Rounds::new(&owed, false)),
            Order::SkipRedirtied => By::Round(Rounds::new(&owed, true)),
            Order::Oldest => By::Age(Ages::new(&owed)),
        };
        Self {
            owed_count: owed.count().0,
            owed,
            by,
            walk: Pfn(0),
            until_walk: WALK_EVERY,
        }
    }

    /// The owed pages.
    pub(crate) const fn owed(&self) -> &PageSet {
        &self.owed
    }

    /// How many pages are owed.
    pub(crate) const fn count(&self) -> PageCount {
        PageCount(self.owed_count)
    }

    /// The page was written, or what was sent of it was lost. `heat` knows of the write already.
    pub(crate) fn owe(&mut self, now: Now, pfn: Pfn, heat: &Heat) {
        let new = self.owed.insert(pfn);
        self.owed_count += u64::from(new);
        match &mut self.by {
            By::Heat(lanes) => lanes.owe(now, pfn, heat),
            By::Round(rounds) => rounds.owe(pfn),
            By::Age(ages) => ages.owe(pfn, new),
        }
    }

    /// The page need not be shipped after all.
    pub(crate) fn forgive(&mut self, pfn: Pfn) {
        self.owed_count -= u64::from(self.owed.remove(pfn));
        match &mut self.by {
            By::Heat(lanes) => lanes.remove(pfn),
            By::Round(rounds) => rounds.remove(pfn),
            By::Age(ages) => ages.remove(pfn),
        }
    }

    /// Whether [`take`](Self::take) would give a page, with so many pages owed in all spaces.
    pub(crate) fn is_ready(&mut self, now: Now, heat: &Heat, hold: Option<Hold>, owed: PageCount) -> bool {
        if self.owed_count == 0 {
            return false;
        }
        match (&mut self.by, hold) {
            (By::Heat(lanes), Some(hold)) if owed <= hold.most => {
                lanes.cold.count > 0
                    || lanes
                        .front(now, &self.owed, heat)
                        .is_some_and(|(_, rate)| rate < hold.from)
            }
            _ => true,
        }
    }

    /// Take the next page, with so many pages owed in all spaces. `first` says that the batch has none of this space yet:
    /// no batch goes over from one round to the next, in which it might meet a page again.
    pub(crate) fn take(
        &mut self,
        now: Now,
        heat: &Heat,
        hold: Option<Hold>,
        owed: PageCount,
        first: bool,
    ) -> Option<Pfn> {
        if self.owed_count == 0 {
            return None;
        }
        let held = hold.filter(|hold| owed <= hold.most).map(|hold| hold.from);
        let pfn = if held.is_none() && self.walks() {
            self.walk_on()
        } else {
            match &mut self.by {
                By::Heat(lanes) => lanes.take(now, &self.owed, heat, held)?,
                By::Round(rounds) => rounds.take(first)?,
                By::Age(ages) => ages.take(&self.owed),
            }
        };
        // A page written during a round is owed for the next, too.
        let again = matches!(&self.by, By::Round(rounds) if rounds.next.set.contains(pfn));
        if !again {
            self.owed_count -= u64::from(self.owed.remove(pfn));
        }
        Some(pfn)
    }

    /// Whether the next page is taken in turn. Rounds and ages come to every page by themselves.
    // covered by: no_page_starves_under_any_order
    fn walks(&mut self) -> bool {
        let starves = match &self.by {
            By::Heat(_) => true,
            By::Round(rounds) => rounds.skips,
            By::Age(_) => false,
        };
        self.until_walk = if starves { self.until_walk - 1 } else { WALK_EVERY };
        if self.until_walk > 0 {
            return false;
        }
        self.until_walk = WALK_EVERY;
        true
    }

    fn walk_on(&mut self) -> Pfn {
        let mut ahead = self.owed.from(self.walk).chain(self.owed.iter());
        let pfn = ahead.next().expect("something is owed");
        self.walk = pfn + PageCount(1);
        match &mut self.by {
            By::Heat(lanes) => lanes.remove(pfn),
            By::Round(rounds) => rounds.remove(pfn),
            By::Age(ages) => ages.remove(pfn),
        }
        pfn
    }
}

/// Pages taken in ascending order, each search going on where the last one ended.
#[derive(Debug)]
struct Ascending {
    set: PageSet,
    count: u64,
    cursor: Pfn,
}

impl Ascending {
    fn new(set: PageSet) -> Self {
        Self {
            count: set.count().0,
            set,
            cursor: Pfn(0),
        }
    }

    fn insert(&mut self, pfn: Pfn) {
        self.count += u64::from(self.set.insert(pfn));
    }

    fn remove(&mut self, pfn: Pfn) -> bool {
        let there = self.set.remove(pfn);
        self.count -= u64::from(there);
        there
    }

    fn take(&mut self) -> Option<Pfn> {
        if self.count == 0 {
            return None;
        }
        let pfn = self.set.from(self.cursor).chain(self.set.iter()).next()?;
        self.remove(pfn);
        self.cursor = pfn + PageCount(1);
        Some(pfn)
    }
}

/// Lanes for rates from once in 64 seconds, two to the octave.
const LANES: usize = 32;

/// By heat. See the [module](self).
#[derive(Debug)]
struct Lanes {
    /// Owed pages that are in no lane.
    cold: Ascending,
    lanes: Vec<VecDeque<Waiting>>,
    /// Pages that have an entry in some lane. Such a page may have been taken in turn since: then the entry is void.
    waiting: PageSet,
    hottest_first: bool,
}

/// Eight bytes: there may be as many as memory has pages.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    /// A page's number; spaces end at [`SPACE_PAGES`](crate::limits::SPACE_PAGES).
    pfn: u32,
    /// When it came into this lane.
    since: u16,
}

impl Waiting {
    fn new(pfn: Pfn, now: Now) -> Self {
        Self {
            pfn: u32::try_from(pfn.0).expect("a space has at most 2^32 pages"),
            since: tick(now),
        }
    }

    fn page(self) -> Pfn {
        Pfn(u64::from(self.pfn))
    }
}

impl Lanes {
    fn new(owed: &PageSet, hottest_first: bool) -> Self {
        Self {
            cold: Ascending::new(owed.clone()),
            lanes: vec![VecDeque::new(); LANES],
            waiting: PageSet::new(owed.capacity()),
            hottest_first,
        }
    }

    fn owe(&mut self, now: Now, pfn: Pfn, heat: &Heat) {
        if self.waiting.contains(pfn) {
            return; // its heat is looked at when it comes to the front
        }
        let rate = heat.rate(now, pfn);
        if rate == Rate::ZERO {
            self.cold.insert(pfn);
            return;
        }
        self.cold.remove(pfn);
        self.waiting.insert(pfn);
        self.lanes[lane_of(rate)].push_back(Waiting::new(pfn, now));
    }

    fn remove(&mut self, pfn: Pfn) {
        self.cold.remove(pfn);
    }

    fn take(&mut self, now: Now, owed: &PageSet, heat: &Heat, held: Option<Rate>) -> Option<Pfn> {
        if !self.hottest_first && self.cold.count > 0 {
            return self.cold.take();
        }
        let Some((lane, rate)) = self.front(now, owed, heat) else {
            return self.cold.take();
        };
        if !self.hottest_first && held.is_some_and(|held| rate >= held) {
            return None;
        }
        let taken = self.lanes[lane].pop_front()?.page();
        self.waiting.remove(taken);
        Some(taken)
    }

    /// The lane whose front is taken next, and the front's rate.
    fn front(&mut self, now: Now, owed: &PageSet, heat: &Heat) -> Option<(usize, Rate)> {
        // Twice at most: a page may be sent from the only lane to one that was found empty just before.
        for _ in 0..2 {
            let mut best: Option<(usize, Rate)> = None;
            for nth in 0..LANES {
                // Towards the wanted end, so that a page sent on there is met there.
                let lane = if self.hottest_first { nth } else { LANES - 1 - nth };
                let Some(rate) = self.settle(lane, now, owed, heat) else {
                    continue;
                };
                if best.is_none_or(|(_, best)| (rate < best) != self.hottest_first) {
                    best = Some((lane, rate));
                }
            }
            if best.is_some() || self.lanes.iter().all(VecDeque::is_empty) {
                return best;
            }
        }
        None
    }

    /// Bring a lane's front up to date, and say how hot it is.
    fn settle(&mut self, lane: usize, now: Now, owed: &PageSet, heat: &Heat) -> Option<Rate> {
        while let Some(front) = self.lanes[lane].front().copied() {
            let pfn = front.page();
            if !owed.contains(pfn) {
                self.lanes[lane].pop_front();
                self.waiting.remove(pfn);
                continue;
            }
            let rate = heat.rate(now, pfn);
            // covered by: a_page_written_while_it_waits_goes_to_where_it_belongs
            if !heat.written_since(pfn, front.since) {
                return Some(rate);
            }
            self.lanes[lane].pop_front();
            self.lanes[lane_of(rate)].push_back(Waiting::new(pfn, now));
        }
        None
    }
}

/// The lane of a rate: two to the octave, which is the exponent and the first bit behind it of the number itself.
fn lane_of(rate: Rate) -> usize {
    let half_octave = |rate: f32| usize::try_from(rate.to_bits() >> 22).unwrap_or(0);
    half_octave(rate.0)
        .saturating_sub(half_octave(1.0 / 64.0))
        .min(LANES - 1)
}

/// In rounds.
#[derive(Debug)]
struct Rounds {
    current: Ascending,
    next: Ascending,
    /// Whether a page written again leaves this round for the next.
    skips: bool,
}

impl Rounds {
    fn new(owed: &PageSet, skips: bool) -> Self {
        Self {
            current: Ascending::new(owed.clone()),
            next: Ascending::new(PageSet::new(owed.capacity())),
            skips,
        }
    }

    fn owe(&mut self, pfn: Pfn) {
        self.next.insert(pfn);
        if self.skips {
            self.current.remove(pfn);
        }
    }

    fn remove(&mut self, pfn: Pfn) {
        self.current.remove(pfn);
        self.next.remove(pfn);
    }

    fn take(&mut self, first: bool) -> Option<Pfn> {
        if self.current.count == 0 {
            if !first {
                return None;
            }
            std::mem::swap(&mut self.current, &mut self.next);
            self.current.cursor = Pfn(0);
        }
        self.current.take()
    }
}

/// By how long pages have been owed.
#[derive(Debug)]
struct Ages {
    /// Owed from the beginning.
    first: Ascending,
    then: VecDeque<Pfn>,
    /// Pages that have an entry in `then`.
    waiting: PageSet,
}

impl Ages {
    fn new(owed: &PageSet) -> Self {
        Self {
            first: Ascending::new(owed.clone()),
            then: VecDeque::new(),
            waiting: PageSet::new(owed.capacity()),
        }
    }

    fn owe(&mut self, pfn: Pfn, new: bool) {
        if new && self.waiting.insert(pfn) {
            self.then.push_back(pfn);
        }
    }

    fn remove(&mut self, pfn: Pfn) {
        self.first.remove(pfn);
    }

    fn take(&mut self, owed: &PageSet) -> Pfn {
        if let Some(pfn) = self.first.take() {
            return pfn;
        }
        loop {
            let pfn = self.then.pop_front().expect("something is owed, in one of the two");
            self.waiting.remove(pfn);
            if owed.contains(pfn) {
                return pfn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PAGES: u64 = 8;

    /// A line and the heat of its pages, as the ledger keeps them.
    struct Space {
        line: Line,
        heat: Heat,
        now: Now,
    }

    impl Space {
        /// With nothing owed.
        fn settled(order: Order) -> Self {
            Self {
                line: Line::new(order, PageSet::new(PageCount(PAGES))),
                heat: Heat::new(PageCount(PAGES)),
                now: Now::ZERO,
            }
        }

        fn after(&mut self, ms: u64) -> &mut Self {
            self.now = self.now + Duration::from_millis(ms);
            self
        }

        fn write(&mut self, pages: &[u64]) -> &mut Self {
            self.heat.harvest(self.now);
            for page in pages {
                self.heat.written(self.now, Pfn(*page));
                self.line.owe(self.now, Pfn(*page), &self.heat);
            }
            self
        }

        fn take(&mut self, most: usize, hold: Option<Hold>) -> Vec<u64> {
            let mut taken = Vec::new();
            while taken.len() < most {
                let owed = self.line.count();
                let Some(pfn) = self.line.take(self.now, &self.heat, hold, owed, taken.is_empty()) else {
                    break;
                };
                taken.push(pfn.0);
            }
            taken
        }
    }

    #[test]
    fn the_coldest_is_taken_first_and_the_hottest_last() {
        let mut space = Space::settled(Order::ColdFirst);
        for n in 0..40_u64 {
            let writes: &[u64] = match n {
                _ if n % 16 == 0 => &[1, 5, 3],
                _ if n % 4 == 0 => &[1, 5],
                _ => &[1],
            };
            space.after(20).write(writes);
        }
        assert_eq!(space.take(9, None), [3, 5, 1]);
        let mut space = Space::settled(Order::HotFirst);
        space.write(&[1]).after(20).write(&[2, 1]).after(20).write(&[2, 4, 1]);
        assert_eq!(space.take(9, None), [1, 2, 4]);
    }

    #[test]
    fn what_nobody_was_seen_writing_comes_before_everything_in_ascending_order() {
        let mut space = Space::settled(Order::ColdFirst);
        space.line = Line::new(Order::ColdFirst, PageSet::full(PageCount(PAGES)));
        space.write(&[0, 2]);
        assert_eq!(space.take(99, None), [1, 3, 4, 5, 6, 7, 0, 2]);
    }

    #[test]
    fn a_page_written_while_it_waits_goes_to_where_it_belongs() {
        let mut space = Space::settled(Order::ColdFirst);
        space.write(&[6]).after(300).write(&[2, 7]);
        for _ in 0..10 {
            space.after(100).write(&[6]);
        }
        assert_eq!(space.take(9, None), [2, 7, 6]);
    }

    #[test]
    fn a_page_cools_while_it_waits() {
        let mut space = Space::settled(Order::ColdFirst);
        for _ in 0..20 {
            space.after(20).write(&[0]);
        }
        space.after(30_000).write(&[1]);
        assert_eq!(space.take(9, None), [0, 1]);
    }

    #[test]
    fn a_round_goes_to_its_end_before_what_was_written_in_it_is_taken() {
        let mut space = Space::settled(Order::Round);
        space.write(&[2, 4, 6]);
        assert_eq!(space.take(1, None), [2]);
        space.after(20).write(&[2, 6, 1]);
        assert_eq!(
            space.take(99, None),
            [4, 6],
            "6 as it is by now, and once more in the next round"
        );
        assert_eq!(space.take(99, None), [1, 2, 6]);
        assert_eq!(space.take(99, None), [] as [u64; 0]);
    }

    #[test]
    fn a_round_that_skips_leaves_what_was_written_again_to_the_next() {
        let mut space = Space::settled(Order::SkipRedirtied);
        space.write(&[2, 4, 6]);
        assert_eq!(space.take(1, None), [2]);
        space.after(20).write(&[2, 6, 1]);
        assert_eq!(space.take(99, None), [4]);
        assert_eq!(space.take(99, None), [1, 2, 6]);
    }

    #[test]
    fn the_oldest_stays_the_oldest_when_it_is_written_again() {
        let mut space = Space::settled(Order::Oldest);
        space.write(&[6]).after(20).write(&[2]).after(20).write(&[6, 1]);
        assert_eq!(space.take(99, None), [6, 2, 1]);
    }

    #[test]
    fn hot_pages_wait_while_they_fit_and_the_coldest_of_them_go_when_they_do_not() {
        let mut space = Space::settled(Order::ColdFirst);
        for n in 0..50 {
            space.after(20).write(if n % 5 == 0 { &[1, 3] } else { &[1] });
        }
        space.write(&[5]);
        let hold = |most| {
            Some(Hold {
                from: Rate(2.0),
                most: PageCount(most),
            })
        };
        assert_eq!(space.take(99, hold(3)), [5]);
        assert!(!space.line.is_ready(space.now, &space.heat, hold(2), PageCount(2)));
        assert_eq!(space.take(99, hold(1)), [3], "one has room");
        assert!(space.take(99, hold(1)).is_empty());
        space.after(10_000);
        assert!(space.line.is_ready(space.now, &space.heat, hold(1), PageCount(1)));
        assert_eq!(space.take(99, hold(1)), [1], "it is not hot any more");
    }

    /// A guest that writes more than the link carries, for as long as one likes.
    #[test]
    fn no_page_starves_under_any_order() {
        for order in Order::ALL {
            let mut space = Space::settled(order);
            let mut taken = [0; 8];
            for _ in 0..500 {
                space.after(20).write(&[0, 1, 2, 3, 4, 5]);
                let seldom = 6 + u64::from(space.now.as_us().is_multiple_of(3));
                space.write(&[seldom]);
                for page in space.take(2, None) {
                    taken[usize::try_from(page).unwrap()] += 1;
                }
            }
            assert!(taken.iter().all(|times| *times > 0), "{order}: {taken:?}");
        }
    }

    #[test]
    fn orders_are_read_by_their_names() {
        for order in Order::ALL {
            assert_eq!(order.to_string().parse(), Ok(order));
        }
        let error = "hottest".parse::<Order>().unwrap_err();
        assert!(error.to_string().starts_with("cold-first, round"));
    }
}
