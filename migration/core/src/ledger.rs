//! What the shadow is known to hold.
//!
//! The ledger answers one question: for each page, is the newest version the guest wrote acknowledged? A harvested bit
//! becomes *debt* and stays debt until the shadow acknowledges a batch that carried the page's content from after that
//! harvest; a failed attempt loses none (DESIGN §3.2). Which owed page is taken next is said by an [`Order`] and the
//! pages' [`Heat`]. It never sees page contents.
//!
//! ```text
//!            harvest                     take                       held
//!   (clear) ─────────▶ owed ────────────────────────▶ in flight ───────────▶ (clear)
//!                       ▲  ▲ harvest: owed again, and    │
//!                       │  └── still in flight ──────────┤
//!                       └──────── lost ──────────────────┘
//! ```
//!
//! A page may be owed *and* in flight: it was written again while an older copy travelled. Only the newest shipment of a
//! page matters: when an older one is acknowledged, the page stays in flight.

use std::collections::BTreeMap;

use umbra_units::{BatchId, Now, PageCount, PageId, PageSet, Pfn, SpaceId};

use crate::convergence::Rates;
use crate::guest::{Harvest, Space};
use crate::heat::{Class, ClassCounts, Heat, HeatMap, Rate, Region, SpaceHeat};
use crate::limits;
use crate::order::{Hold, Line, Order};

/// What the next copy of a page may be encoded against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// What was shipped of it last, or zeros if it never travelled: by the time the shadow comes to this copy it holds
    /// that, because batches are applied in order.
    Shipped,
    /// Unknown: send the whole content whatever it is.
    Unknown,
}

/// A page to be shipped, and what the shadow has of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    /// Which page.
    pub page: PageId,
    /// What its next copy may be encoded against.
    pub base: Base,
}

/// Never shipped in this session: the shadow's page is zeros.
const NEVER: u64 = 0;
/// What was shipped did not arrive: the shadow's page is something else.
const LOST: u64 = u64::MAX;

/// The debt of one session. See the [module](self).
#[derive(Debug)]
pub struct Ledger {
    spaces: BTreeMap<SpaceId, SpaceLedger>,
    in_flight: BTreeMap<BatchId, Vec<PageId>>,
    /// Always above every batch in flight; batch 0 stands for "never shipped".
    next: BatchId,
    /// The space that is asked first for the next batch, so that no space starves.
    first: SpaceId,
    /// Pages set aside, of all spaces.
    aside: PageCount,
}

#[derive(Debug)]
struct SpaceLedger {
    present: PageSet,
    /// What is owed, in the order in which it is taken.
    owed: Line,
    heat: Heat,
    /// Captured at a cut and not yet shipped; a page may be owed again beside.
    aside: PageSet,
    /// Nothing touched them since the guest was built.
    free: PageSet,
    /// Pages whose newest shipment is not acknowledged.
    travelling: PageSet,
    /// Pages whose content the shadow has held at least once since the session began.
    seeded: PageSet,
    /// Per page, the newest batch that carried it, or [`NEVER`], or [`LOST`].
    newest: Vec<u64>,
}

impl Ledger {
    /// The ledger of a new session, which ships in this order: every present page is owed.
    pub fn new(spaces: &[Space], order: Order) -> Self {
        let spaces = spaces
            .iter()
            .map(|space| {
                let present = space.present_set();
                let ledger = SpaceLedger {
                    owed: Line::new(order, present.clone()),
                    heat: Heat::new(space.pages),
                    aside: PageSet::new(space.pages),
                    free: PageSet::new(space.pages),
                    travelling: PageSet::new(space.pages),
                    seeded: PageSet::new(space.pages),
                    newest: vec![NEVER; index(Pfn(space.pages.0))],
                    present,
                };
                (space.id, ledger)
            })
            .collect();
        Self {
            spaces,
            in_flight: BTreeMap::new(),
            next: BatchId(1),
            first: SpaceId::RAM,
            aside: PageCount::ZERO,
        }
    }

    /// The guest wrote these pages. Pages outside the guest's spaces are the host's mistake and are ignored.
    pub fn owe(&mut self, now: Now, harvest: &Harvest) {
        for (space, dirty) in &harvest.dirty {
            if let Some(ledger) = self.spaces.get_mut(space) {
                ledger.owe(now, dirty);
            }
        }
    }

    /// These pages were never touched since the guest was built: zeros, which a new shadow holds already. To be called
    /// before anything was taken, with what was found *after* writes began to be recorded.
    pub fn untouched(&mut self, zeros: &Harvest) {
        for (space, set) in &zeros.dirty {
            let Some(ledger) = self.spaces.get_mut(space) else {
                continue;
            };
            if set.capacity() == ledger.present.capacity() {
                for pfn in set
                    .iter()
                    .filter(|pfn| ledger.present.contains(*pfn) && ledger.newest[index(*pfn)] == NEVER)
                {
                    ledger.owed.forgive(pfn);
                    ledger.free.insert(pfn);
                    ledger.seeded.insert(pfn);
                }
            }
        }
    }

    /// Owe single pages again, for example because an audit found them different.
    pub fn owe_pages(&mut self, now: Now, pages: &[PageId]) {
        for page in pages {
            if let Some(ledger) = self
                .spaces
                .get_mut(&page.space)
                .filter(|ledger| ledger.present.contains(page.pfn))
            {
                ledger.free.remove(page.pfn);
                ledger.owed.owe(now, page.pfn, &ledger.heat);
                ledger.travelling.remove(page.pfn);
                ledger.newest[index(page.pfn)] = LOST;
            }
        }
    }

    /// Whether [`take`](Self::take) would find a page: something is owed, and not all of it is held.
    pub fn is_ready(&mut self, now: Now, hold: Option<Hold>) -> bool {
        let owed = self.owed();
        let mut spaces = self.spaces.values_mut();
        spaces.any(|ledger| ledger.owed.is_ready(now, &ledger.heat, hold, owed))
    }

    /// Take up to `most` owed pages into a new batch, which is in flight from now on, but none that `hold` holds. An empty
    /// batch is a batch too: a cut may have nothing to say but its records. Pages of one space stand together, ascending.
    ///
    /// # Panics
    /// While pages are set aside: an older copy of a page would follow a newer one.
    pub fn take(&mut self, now: Now, most: PageCount, hold: Option<Hold>) -> (BatchId, Vec<Owed>) {
        assert!(
            self.aside == PageCount::ZERO,
            "what was set aside ships before what followed it"
        );
        let batch = self.next;
        self.next = batch.next();
        let mut owed = self.owed();
        let mut left = most.0;
        let mut taken = Vec::new();
        for id in self.spaces_in_turn() {
            let ledger = self.spaces.get_mut(&id).expect("one of ours");
            let first = taken.len();
            while left > 0 {
                let before = ledger.owed.count();
                let Some(pfn) = ledger.owed.take(now, &ledger.heat, hold, owed, taken.len() == first) else {
                    break;
                };
                owed = owed + ledger.owed.count() - before;
                left -= 1;
                taken.push(Owed {
                    page: PageId { space: id, pfn },
                    base: ledger.take(pfn, batch),
                });
            }
            taken[first..].sort_unstable_by_key(|owed| owed.page.pfn);
        }
        self.in_flight
            .insert(batch, taken.iter().map(|owed| owed.page).collect());
        (batch, taken)
    }

    /// An epoch was cut: everything owed now is set aside, to be shipped as it was then. What is written from now on is
    /// owed beside it. Answers what was set aside.
    pub fn set_aside(&mut self) -> Harvest {
        let dirty = self.spaces.iter_mut().map(|(id, ledger)| {
            let owed = ledger.owed.owed().clone();
            owed.iter().for_each(|pfn| ledger.owed.forgive(pfn));
            ledger.aside.union_with(&owed);
            (*id, owed)
        });
        let harvest = Harvest { dirty: dirty.collect() };
        self.aside += harvest.count();
        harvest
    }

    /// Pages set aside and not yet taken.
    pub const fn aside(&self) -> PageCount {
        self.aside
    }

    /// Take up to `most` pages of those set aside into a new batch.
    pub fn take_aside(&mut self, most: PageCount) -> (BatchId, Vec<Owed>) {
        let batch = self.next;
        self.next = batch.next();
        let mut taken = Vec::new();
        for (id, ledger) in &mut self.spaces {
            let left = index(Pfn(most.0.saturating_sub(taken.len() as u64)));
            let pfns: Vec<Pfn> = ledger.aside.iter().take(left).collect();
            for pfn in pfns {
                ledger.aside.remove(pfn);
                taken.push(Owed {
                    page: PageId { space: *id, pfn },
                    base: ledger.take(pfn, batch),
                });
            }
        }
        self.aside = self.aside - PageCount(taken.len() as u64);
        self.in_flight
            .insert(batch, taken.iter().map(|owed| owed.page).collect());
        (batch, taken)
    }

    /// The cut is not to be: what was set aside and not yet taken is owed like anything else.
    // covered by: whatever_happens_no_write_is_forgotten
    pub fn owe_aside(&mut self, now: Now) {
        for ledger in self.spaces.values_mut() {
            let capacity = ledger.aside.capacity();
            let aside = std::mem::replace(&mut ledger.aside, PageSet::new(capacity));
            aside.iter().for_each(|pfn| ledger.owed.owe(now, pfn, &ledger.heat));
        }
        self.aside = PageCount::ZERO;
    }

    /// Every space once, each call from another one on.
    // covered by: no_space_starves_while_another_is_written_over_and_over
    fn spaces_in_turn(&mut self) -> Vec<SpaceId> {
        let behind = self.spaces.range(self.first..).chain(self.spaces.range(..self.first));
        let turn: Vec<SpaceId> = behind.map(|(id, _)| *id).collect();
        self.first = turn.get(1).copied().unwrap_or_default();
        turn
    }

    /// The shadow holds this batch. Unknown batches are ignored: acknowledgements repeat.
    pub fn held(&mut self, batch: BatchId) {
        for page in self.in_flight.remove(&batch).unwrap_or_default() {
            let ledger = self
                .spaces
                .get_mut(&page.space)
                .expect("pages in flight come from known spaces");
            // covered by: an_old_acknowledgement_does_not_clear_a_newer_shipment
            if ledger.newest[index(page.pfn)] == batch.0 {
                ledger.travelling.remove(page.pfn);
            }
            ledger.seeded.insert(page.pfn);
        }
    }

    /// The shadow holds every batch up to this one.
    pub fn held_through(&mut self, through: BatchId) {
        while let Some((&first, _)) = self.in_flight.first_key_value().filter(|(first, _)| **first <= through) {
            self.held(first);
        }
    }

    /// The newest batch that was taken; 0 before the first.
    pub fn newest(&self) -> BatchId {
        BatchId(self.next.0 - 1)
    }

    /// This batch will never arrive: what it carried is owed again.
    pub fn lost(&mut self, now: Now, batch: BatchId) {
        for page in self.in_flight.remove(&batch).unwrap_or_default() {
            let ledger = self
                .spaces
                .get_mut(&page.space)
                .expect("pages in flight come from known spaces");
            if ledger.newest[index(page.pfn)] == batch.0 {
                ledger.travelling.remove(page.pfn);
                ledger.owed.owe(now, page.pfn, &ledger.heat);
                ledger.newest[index(page.pfn)] = LOST;
            }
        }
    }

    /// Pages written but not yet taken into a batch.
    pub fn owed(&self) -> PageCount {
        self.spaces.values().map(|ledger| ledger.owed.count()).sum()
    }

    /// Owed pages that `hold` keeps back.
    pub fn deferred(&self, now: Now, hold: Option<Hold>) -> PageCount {
        let Some(from) = self.held_from(hold) else {
            return PageCount::ZERO;
        };
        let held = |ledger: &SpaceLedger| ledger.deferred(now, from).count() as u64;
        PageCount(self.spaces.values().map(held).sum())
    }

    /// From which rate on pages are held back now.
    fn held_from(&self, hold: Option<Hold>) -> Option<Rate> {
        hold.filter(|hold| self.owed() <= hold.most).map(|hold| hold.from)
    }

    /// How many pages are of which class. Looks at every page written lately.
    pub fn classes(&self, now: Now, hold: Option<Hold>) -> ClassCounts {
        let from = self.held_from(hold);
        let mut classes = ClassCounts::default();
        for ledger in self.spaces.values() {
            let mut of = ClassCounts::default();
            for pfn in ledger.heat.warmed() {
                of.count(ledger.class(now, from, pfn));
            }
            let [free, cold] = [ledger.free.count().0, ledger.present.count().0 - of.total()];
            of.0[Class::Free as usize] += free;
            of.0[Class::Cold as usize] += cold - free;
            classes.add(&of);
        }
        classes
    }

    /// The heat of every space, in at most so many regions all together ([`HEAT_REGIONS`](crate::limits::HEAT_REGIONS) if
    /// that is less). Looks at every page.
    pub fn heat_map(&self, now: Now, hold: Option<Hold>, regions: usize) -> HeatMap {
        let regions = regions.clamp(1, limits::HEAT_REGIONS) as u64;
        let all: u64 = self.spaces.values().map(|ledger| ledger.present.capacity().0).sum();
        // Every space may have one that is shorter than the others.
        let most = regions.saturating_sub(self.spaces.len() as u64).max(1);
        let region = PageCount(all.div_ceil(most).max(1).next_power_of_two());
        let from = self.held_from(hold);
        let spaces = self.spaces.iter();
        HeatMap {
            spaces: spaces
                .map(|(id, ledger)| ledger.heat_map(*id, now, from, region))
                .collect(),
        }
    }

    /// How the guest's writes are spread over its pages. Looks at every page written lately.
    pub fn rates(&self, now: Now) -> Rates {
        let mut rates = Rates::new();
        for SpaceLedger { heat, .. } in self.spaces.values() {
            heat.warmed()
                .for_each(|pfn| rates.count(heat.steady_rate(now, pfn), heat.every()));
        }
        rates
    }

    /// The write heat of a space.
    pub fn heat(&self, space: SpaceId) -> Option<&Heat> {
        self.spaces.get(&space).map(|ledger| &ledger.heat)
    }

    /// Pages whose newest content the shadow has not acknowledged: owed or in flight.
    pub fn debt(&self) -> PageCount {
        self.spaces.values().map(|ledger| ledger.debt().count()).sum()
    }

    /// Everything that is debt, as a harvest: what a host must be told when the session ends and nobody took care.
    pub fn debt_pages(&self) -> Harvest {
        let dirty = self.spaces.iter().map(|(id, ledger)| (*id, ledger.debt()));
        Harvest { dirty: dirty.collect() }
    }

    /// Batches not yet acknowledged.
    pub fn batches_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Pages the shadow has held at least once. Never decreases: progress that an operator sees does not run backwards.
    pub fn seeded(&self) -> PageCount {
        self.spaces.values().map(|ledger| ledger.seeded.count()).sum()
    }

    /// Pages that exist.
    pub fn present(&self) -> PageCount {
        self.spaces.values().map(|ledger| ledger.present.count()).sum()
    }
}

impl SpaceLedger {
    fn debt(&self) -> PageSet {
        let mut debt = self.owed.owed().clone();
        debt.union_with(&self.aside);
        debt.union_with(&self.travelling);
        debt
    }

    fn owe(&mut self, now: Now, dirty: &PageSet) {
        let mut dirty = PageSet::from_words(dirty.words().to_vec(), self.present.capacity());
        dirty.intersect_with(&self.present);
        self.free.subtract(&dirty);
        // A log that names every page names none: it starts, or was lost.
        // covered by: a_harvest_of_everything_heats_nothing
        if dirty != self.present {
            self.heat.harvest(now);
            dirty.iter().for_each(|pfn| self.heat.written(now, pfn));
        }
        dirty.iter().for_each(|pfn| self.owed.owe(now, pfn, &self.heat));
    }

    /// Owed pages written at least so often.
    fn deferred(&self, now: Now, from: Rate) -> impl Iterator<Item = Pfn> {
        let owed = self.owed.owed().iter();
        owed.filter(move |pfn| self.heat.rate(now, *pfn) >= from)
    }

    fn heat_map(&self, space: SpaceId, now: Now, held_from: Option<Rate>, region: PageCount) -> SpaceHeat {
        let pages = self.present.capacity();
        let mut regions = vec![Region::default(); index(Pfn(pages.0.div_ceil(region.0)))];
        for pfn in self.present.iter() {
            let rate = self.heat.rate(now, pfn);
            let region = &mut regions[index(Pfn(pfn.0 / region.0))];
            region.classes.count(self.class(now, held_from, pfn));
            region.rate.0 += rate.0;
            if rate > region.hottest {
                region.hottest = rate;
            }
        }
        SpaceHeat {
            space,
            pages,
            region,
            regions,
        }
    }

    fn class(&self, now: Now, held_from: Option<Rate>, pfn: Pfn) -> Class {
        let rate = self.heat.rate(now, pfn);
        if held_from.is_some_and(|from| rate >= from) && self.owed.owed().contains(pfn) {
            Class::Deferred
        } else if self.free.contains(pfn) {
            Class::Free
        } else {
            Class::of(rate)
        }
    }

    fn take(&mut self, pfn: Pfn, batch: BatchId) -> Base {
        self.travelling.insert(pfn);
        let newest = std::mem::replace(&mut self.newest[index(pfn)], batch.0);
        match newest {
            LOST => Base::Unknown,
            _ => Base::Shipped,
        }
    }
}

fn index(pfn: Pfn) -> usize {
    usize::try_from(pfn.0).expect("a page number of a mapped space fits the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Rng;

    fn ledger(pages: u64) -> Ledger {
        Ledger::new(&[Space::ram(PageCount(pages))], Order::default())
    }

    fn writes(pages: u64, pfns: &[u64]) -> Harvest {
        let mut set = PageSet::new(PageCount(pages));
        pfns.iter().for_each(|pfn| {
            set.insert(Pfn(*pfn));
        });
        Harvest {
            dirty: vec![(SpaceId::RAM, set)],
        }
    }

    #[test]
    fn debt_is_cleared_by_an_acknowledgement_and_by_nothing_else() {
        let mut ledger = ledger(10);
        assert_eq!(ledger.debt(), PageCount(10));
        let (batch, taken) = ledger.take(Now::ZERO, PageCount(4), None);
        assert_eq!(taken.len(), 4);
        assert_eq!((ledger.owed(), ledger.debt()), (PageCount(6), PageCount(10)));
        ledger.held(batch);
        assert_eq!((ledger.debt(), ledger.seeded()), (PageCount(6), PageCount(4)));
        ledger.held(batch);
        assert_eq!(ledger.debt(), PageCount(6));
    }

    #[test]
    fn a_page_written_while_it_travels_is_owed_again() {
        let mut ledger = ledger(1);
        let (first, _) = ledger.take(Now::ZERO, PageCount(1), None);
        ledger.owe(Now::ZERO, &writes(1, &[0]));
        ledger.held(first);
        assert_eq!(ledger.debt(), PageCount(1));
    }

    #[test]
    fn an_old_acknowledgement_does_not_clear_a_newer_shipment() {
        let mut ledger = ledger(1);
        let (first, _) = ledger.take(Now::ZERO, PageCount(1), None);
        ledger.owe(Now::ZERO, &writes(1, &[0]));
        let (second, taken) = ledger.take(Now::ZERO, PageCount(1), None);
        assert_eq!(taken[0].base, Base::Shipped);
        ledger.held(first);
        assert_eq!(ledger.debt(), PageCount(1));
        ledger.owe(Now::ZERO, &writes(1, &[0]));
        let (third, taken) = ledger.take(Now::ZERO, PageCount(1), None);
        assert_eq!(taken[0].base, Base::Shipped, "the second copy is still on its way");
        ledger.held(second);
        ledger.held(third);
        assert_eq!(ledger.debt(), PageCount::ZERO);
        ledger.owe(Now::ZERO, &writes(1, &[0]));
        assert_eq!(ledger.take(Now::ZERO, PageCount(1), None).1[0].base, Base::Shipped);
    }

    #[test]
    fn a_lost_batch_is_owed_again_and_nothing_may_lean_on_it() {
        let mut ledger = ledger(2);
        let (batch, _) = ledger.take(Now::ZERO, PageCount(2), None);
        ledger.lost(Now::ZERO, batch);
        assert_eq!(ledger.owed(), PageCount(2));
        assert!(
            ledger
                .take(Now::ZERO, PageCount(2), None)
                .1
                .iter()
                .all(|owed| owed.base == Base::Unknown)
        );
    }

    #[test]
    fn no_page_starves_while_others_are_written_over_and_over() {
        let mut ledger = ledger(8);
        for round in 0..8 {
            ledger.owe(Now::ZERO, &writes(8, &[0]));
            let (batch, _) = ledger.take(Now::ZERO, PageCount(2), None);
            ledger.held(batch);
            if round >= 5 {
                assert_eq!(ledger.seeded(), PageCount(8));
            }
        }
    }

    #[test]
    fn no_space_starves_while_another_is_written_over_and_over() {
        let disk = Space {
            id: SpaceId(1),
            ..Space::ram(PageCount(2))
        };
        let mut ledger = Ledger::new(&[Space::ram(PageCount(8)), disk], Order::default());
        for _ in 0..10 {
            ledger.owe(Now::ZERO, &writes(8, &[0, 1, 2, 3]));
            let (batch, _) = ledger.take(Now::ZERO, PageCount(4), None);
            ledger.held(batch);
        }
        assert_eq!(ledger.seeded(), PageCount(10));
    }

    #[test]
    fn pages_that_do_not_exist_are_never_owed() {
        let space = Space {
            id: SpaceId::RAM,
            pages: PageCount(10),
            present: vec![(Pfn(0), PageCount(2)), (Pfn(8), PageCount(2))],
        };
        let mut ledger = Ledger::new(&[space], Order::default());
        ledger.owe(Now::ZERO, &writes(10, &[5]));
        ledger.owe_pages(Now::ZERO, &[PageId::ram(Pfn(6))]);
        let taken: Vec<u64> = ledger
            .take(Now::ZERO, PageCount(100), None)
            .1
            .iter()
            .map(|owed| owed.page.pfn.0)
            .collect();
        assert_eq!(taken, [0, 1, 8, 9]);
    }

    #[test]
    fn a_harvest_of_everything_heats_nothing() {
        let mut ledger = ledger(4);
        ledger.owe(Now::ZERO, &writes(4, &[0, 1, 2, 3]));
        let heat = ledger.heat(SpaceId::RAM).unwrap();
        assert_eq!(heat.warmed().count(), 0);
    }

    #[test]
    fn a_batch_carries_a_page_once_under_any_order() {
        for order in Order::ALL {
            let mut ledger = Ledger::new(&[Space::ram(PageCount(4))], order);
            ledger.owe(Now::ZERO, &writes(4, &[1, 2]));
            let (_, taken) = ledger.take(Now::ZERO, PageCount(99), None);
            assert!(taken.is_sorted_by(|a, b| a.page < b.page), "{order}: {taken:?}");
        }
    }

    #[test]
    fn a_heat_map_has_every_page_once_and_shows_where_it_is_hot() {
        let mut ledger = Ledger::new(
            &[Space {
                id: SpaceId::RAM,
                pages: PageCount(1_000),
                present: vec![(Pfn(0), PageCount(600)), (Pfn(700), PageCount(300))],
            }],
            Order::default(),
        );
        let free = Harvest {
            dirty: vec![(SpaceId::RAM, {
                let mut set = PageSet::new(PageCount(1_000));
                (0..100).for_each(|pfn| {
                    set.insert(Pfn(pfn));
                });
                set
            })],
        };
        ledger.untouched(&free);
        let mut now = Now::ZERO;
        for _ in 0..50 {
            now = now + std::time::Duration::from_millis(20);
            ledger.owe(now, &writes(1_000, &[300, 301]));
        }
        for most in [1, 2, 10, 64, usize::MAX] {
            let map = ledger.heat_map(now, None, most);
            let space = &map.spaces[0];
            assert!(space.regions.len() <= most && space.region.0.is_power_of_two());
            let mut all = ClassCounts::default();
            space.regions.iter().for_each(|region| all.add(&region.classes));
            assert_eq!(all, ledger.classes(now, None));
            assert_eq!((all.total(), all.of(Class::Free), all.of(Class::Hot)), (900, 100, 2));
            let hot = space.regions.iter().position(|region| region.hottest > Class::HOT);
            assert_eq!(hot.map(|at| at as u64), Some(300 / space.region.0));
        }
    }

    #[test]
    fn what_is_held_back_is_debt_all_the_same() {
        let mut ledger = ledger(4);
        let (batch, _) = ledger.take(Now::ZERO, PageCount(4), None);
        ledger.held(batch);
        let mut now = Now::ZERO;
        for _ in 0..20 {
            now = now + std::time::Duration::from_millis(20);
            ledger.owe(now, &writes(4, &[2]));
        }
        ledger.owe(now, &writes(4, &[1]));
        let hold = Some(Hold {
            from: Rate(2.0),
            most: PageCount(2),
        });
        let (_, taken) = ledger.take(now, PageCount(4), hold);
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].page, PageId::ram(Pfn(1)));
        assert!(!ledger.is_ready(now, hold));
        assert_eq!(
            (ledger.deferred(now, hold), ledger.debt()),
            (PageCount(1), PageCount(2))
        );
        assert!(ledger.debt_pages().dirty[0].1.contains(Pfn(2)));
    }

    /// After any schedule of writes, shipments, acknowledgements and losses, in any order, with pages held back or not: a
    /// page whose newest version the model's shadow lacks is debt, and nothing is owed that cannot be taken.
    #[test]
    fn whatever_happens_no_write_is_forgotten() {
        for (seed, order) in (0..1_000).zip(Order::ALL.into_iter().cycle()) {
            let mut rng = Rng::new(seed);
            let pages = 1 + rng.below(12);
            let mut ledger = Ledger::new(&[Space::ram(PageCount(pages))], order);
            let mut now = Now::ZERO;
            let mut written = vec![1u64; usize::try_from(pages).unwrap()];
            let mut held = vec![0u64; written.len()];
            let mut captured = written.clone();
            let mut flying: Vec<(BatchId, Vec<(usize, u64)>)> = Vec::new();
            for _ in 0..300 {
                now = now + std::time::Duration::from_micros(1 << rng.below(24));
                match rng.below(7) {
                    0 => {
                        let pfn = rng.below(pages);
                        written[usize::try_from(pfn).unwrap()] += 1;
                        ledger.owe(now, &writes(pages, &[pfn]));
                    }
                    // What was captured at a cut ships as it was, and what follows it waits.
                    1 if ledger.aside() > PageCount::ZERO => {
                        let (batch, taken) = ledger.take_aside(PageCount(1 + rng.below(4)));
                        let copies = taken.iter().map(|owed| usize::try_from(owed.page.pfn.0).unwrap());
                        flying.push((batch, copies.map(|i| (i, captured[i])).collect()));
                    }
                    4 if ledger.aside() == PageCount::ZERO => {
                        ledger.set_aside();
                        captured.clone_from(&written);
                    }
                    5 => ledger.owe_aside(now),
                    1 => {
                        let hold = rng.chance(0.5).then(|| Hold {
                            from: Rate(1.0),
                            most: PageCount(rng.below(pages)),
                        });
                        let (batch, taken) = ledger.take(now, PageCount(1 + rng.below(4)), hold);
                        let copies = taken.iter().map(|owed| usize::try_from(owed.page.pfn.0).unwrap());
                        flying.push((batch, copies.map(|i| (i, written[i])).collect()));
                    }
                    _ if flying.is_empty() => {}
                    fate => {
                        let at = usize::try_from(rng.below(flying.len() as u64)).unwrap();
                        let (batch, copies) = flying.swap_remove(at);
                        if fate == 2 {
                            copies.iter().for_each(|(i, version)| held[*i] = held[*i].max(*version));
                            ledger.held(batch);
                        } else {
                            ledger.lost(now, batch);
                        }
                    }
                }
                let debt = &ledger.debt_pages().dirty[0].1;
                for (i, (written, held)) in written.iter().zip(&held).enumerate() {
                    assert!(
                        written == held || debt.contains(Pfn(i as u64)),
                        "seed {seed}: page {i} forgotten"
                    );
                }
            }
            ledger.owe_aside(now);
            while ledger.owed() > PageCount::ZERO {
                let (_, taken) = ledger.take(now, PageCount(4), None);
                assert!(
                    !taken.is_empty(),
                    "seed {seed}: {} pages that nobody finds",
                    ledger.owed()
                );
            }
        }
    }
}
