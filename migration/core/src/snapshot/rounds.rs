//! Which pages are copied when: the rounds before the pause, and the batches of a round.

use umbra_units::{BatchId, Epoch, PageCount, PageId, Pfn};

use crate::guest::Harvest;
use crate::ledger::{Base, Owed};
use crate::limits;
use crate::source::Plan;

/// So little that the next round would be over before it is worth it: 2 MiB are copied in a millisecond or two.
const LITTLE: PageCount = PageCount(512);
/// A guest that writes as quickly as it is copied is not waited for: each round makes the file longer.
const MOST: u32 = 8;

/// When to stop the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rounds {
    /// Rounds so far.
    done: u32,
    /// Pages of the latest.
    latest: PageCount,
}

impl Rounds {
    /// Before the first.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many there were.
    pub const fn done(&self) -> u32 {
        self.done
    }

    /// A round of `pages` was copied while the guest ran. Whether the guest should be stopped now: what it wrote
    /// meanwhile is in proportion to what was copied, so little copied means little left.
    pub fn copied(&mut self, pages: PageCount) -> bool {
        let shrinks = self.done == 0 || pages.0.saturating_mul(5) < self.latest.0.saturating_mul(4);
        self.done += 1;
        self.latest = pages;
        pages <= LITTLE || !shrinks || self.done >= MOST
    }
}

/// A walk over the pages of a harvest, a batch at a time.
#[derive(Debug)]
pub struct Walk {
    pages: Harvest,
    /// The set being walked, and where in it.
    at: (usize, Pfn),
    left: PageCount,
}

impl Walk {
    /// Over these pages.
    pub fn new(pages: Harvest) -> Self {
        let left = pages.count();
        Self {
            pages,
            at: (0, Pfn(0)),
            left,
        }
    }

    /// Pages not yet planned.
    pub const fn left(&self) -> PageCount {
        self.left
    }

    /// The next batch, which is to be called `batch`, of the cut `cut`; `None` when there are no more pages.
    pub fn next_plan(&mut self, batch: BatchId, cut: Epoch) -> Option<Plan> {
        let mut pages = Vec::new();
        while let Some((space, set)) = self.pages.dirty.get(self.at.0) {
            let room = limits::BATCH_PAGES - pages.len();
            let mut last = None;
            for pfn in set.from(self.at.1).take(room) {
                let page = PageId { space: *space, pfn };
                pages.push(Owed {
                    page,
                    base: Base::Shipped,
                });
                last = Some(pfn);
            }
            if let (Some(last), true) = (last, pages.len() == limits::BATCH_PAGES) {
                self.at.1 = last + PageCount(1);
                break;
            }
            self.at = (self.at.0 + 1, Pfn(0));
        }
        if pages.is_empty() {
            return None;
        }
        self.left = self.left - PageCount(pages.len() as u64);
        Some(Plan {
            batch,
            epoch: cut,
            pages,
            owed_after: self.left,
            urgent: false,
            captured: false,
            close: None,
            attempt: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use umbra_units::{PageSet, SpaceId};

    #[test]
    fn the_guest_is_stopped_when_little_is_left_or_it_does_not_get_less() {
        let stops = |rounds: &[u64]| {
            let mut state = Rounds::new();
            let stops: Vec<bool> = rounds.iter().map(|pages| state.copied(PageCount(*pages))).collect();
            stops
        };
        assert_eq!(stops(&[65_536, 4_000, 300]), [false, false, true]);
        assert_eq!(stops(&[100]), [true], "an idle guest's differential snapshot");
        assert_eq!(
            stops(&[65_536, 60_000]),
            [false, true],
            "it writes as quickly as it is copied"
        );
        assert_eq!(
            stops(&[900_000, 700_000, 550_000, 430_000, 340_000, 270_000, 210_000, 160_000]),
            [false, false, false, false, false, false, false, true]
        );
    }

    proptest! {
        #[test]
        fn a_walk_plans_every_page_once_and_in_order(
            ram in prop::collection::btree_set(0u64..3_000, 0..900),
            disk in prop::collection::btree_set(0u64..700, 0..300),
        ) {
            let set = |pages: &std::collections::BTreeSet<u64>, capacity| {
                let mut set = PageSet::new(PageCount(capacity));
                pages.iter().for_each(|page| { set.insert(Pfn(*page)); });
                set
            };
            let dirty = vec![(SpaceId(0), set(&ram, 3_000)), (SpaceId(3), set(&disk, 700))];
            let mut walk = Walk::new(Harvest { dirty });
            let expected: Vec<PageId> = ram.iter().map(|page| (0, page)).chain(disk.iter().map(|page| (3, page)))
                .map(|(space, page)| PageId { space: SpaceId(space), pfn: Pfn(*page) }).collect();
            let mut planned = Vec::new();
            let mut batch = BatchId(4);
            while let Some(plan) = walk.next_plan(batch, Epoch(2)) {
                prop_assert_eq!((plan.batch, plan.epoch), (batch, Epoch(2)));
                prop_assert!(plan.pages.len() <= limits::BATCH_PAGES);
                planned.extend(plan.pages.iter().map(|owed| owed.page));
                prop_assert_eq!(plan.owed_after.0, (expected.len() - planned.len()) as u64);
                batch = batch.next();
            }
            prop_assert_eq!(planned.len().div_ceil(limits::BATCH_PAGES) as u64, batch.0 - 4);
            prop_assert_eq!(planned, expected);
        }
    }
}
