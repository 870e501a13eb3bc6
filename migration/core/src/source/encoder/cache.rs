//! Contents last shipped, of pages that ship often: what deltas are made against.
//!
//! A slab of pages and, per space, a table that says which slot is whose: finding one is two loads. Who may stay is
//! decided by how often a page ships, not by how lately: pages that are written one after the other, more of them than
//! fit, would push each other out before any is of use. So a page comes in from its second shipment on, and when there is no
//! room, only for one that ships less often; counts are halved now and then, so that what was busy once does not stay for ever.
//! A page whose delta was not worth it, because all of it changes each time, goes and starts again.

use umbra_units::{Bytes, PAGE_SIZE};

use super::Place;
use crate::guest::PageBytes;

/// A count no higher: what is busy now must be able to overtake what was.
const MOST_COUNTED: u8 = 15;
/// Shipments before a page is kept: one that is only ever seeded is never needed again.
const KEPT_FROM: u8 = 2;
/// Slots looked at to find one to give up.
const LOOKED_AT: usize = 4;
/// Counts are halved after so many refusals per slot.
const HALVED_AFTER: usize = 4;

/// How well keeping contents went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheCounts {
    /// Pages that travelled as a delta.
    pub hits: u64,
    /// Pages that had travelled before and whose content was not kept.
    pub misses: u64,
    /// Pages whose content was kept and of which too much had changed.
    pub useless: u64,
    /// Contents that made room for those of busier pages.
    pub evictions: u64,
}

/// The contents. See the [module](self).
#[derive(Debug, Clone)]
pub(super) struct Cache {
    /// Most slots; 0: nothing is kept, and there are no tables.
    most: usize,
    slots: Vec<Slot>,
    /// Slots whose page became zeros.
    free: Vec<u32>,
    /// Where the next look for a slot to give up begins.
    hand: usize,
    tables: Vec<Table>,
    refused: usize,
    counts: CacheCounts,
}

#[derive(Debug, Clone)]
struct Slot {
    page: Option<Place>,
    content: Box<PageBytes>,
}

#[derive(Debug, Clone)]
struct Table {
    /// Per page, its slot and one, or 0.
    slots: Vec<u32>,
    /// Per page, how often it was shipped lately.
    times: Vec<u8>,
}

impl Cache {
    /// Of up to `size`, for tables of so many pages.
    pub(super) fn new(size: Bytes, pages: &[usize]) -> Self {
        let most = usize::try_from(size.0).unwrap_or(usize::MAX) / PAGE_SIZE;
        let most = most.min(pages.iter().sum()).min(u32::MAX as usize - 1);
        let table = |pages: &usize| Table {
            slots: vec![0; *pages],
            times: vec![0; *pages],
        };
        Self {
            most,
            slots: Vec::new(),
            free: Vec::new(),
            hand: 0,
            tables: if most == 0 {
                Vec::new()
            } else {
                pages.iter().map(table).collect()
            },
            refused: 0,
            counts: CacheCounts::default(),
        }
    }

    pub(super) const fn counts(&self) -> CacheCounts {
        self.counts
    }

    /// The page is about to travel with a new content: the one it travelled with last, if it is kept.
    pub(super) fn shipping(&mut self, place: Place) -> Option<&PageBytes> {
        let table = self.tables.get_mut(place.table)?;
        let shipped = &mut table.times[place.index];
        let before = *shipped > 0;
        *shipped = (*shipped + 1).min(MOST_COUNTED);
        let slot = table.slots[place.index];
        if slot == 0 {
            self.counts.misses += u64::from(before);
            return None;
        }
        Some(&self.slots[slot as usize - 1].content)
    }

    /// What [`shipping`](Self::shipping) gave was of use, or was not.
    pub(super) fn used(&mut self, place: Place, hit: bool) {
        if hit {
            self.counts.hits += 1;
        } else {
            self.counts.useless += 1;
            self.forget(place);
        }
    }

    /// What the page travels with now.
    pub(super) fn keep(&mut self, place: Place, content: &PageBytes) {
        let Some(table) = self.tables.get(place.table) else {
            return;
        };
        let slot = match table.slots[place.index] {
            0 if table.times[place.index] < KEPT_FROM => return,
            0 => match self.room(table.times[place.index]) {
                Some(slot) => slot,
                None => return,
            },
            slot => slot as usize - 1,
        };
        let kept = &mut self.slots[slot];
        kept.page = Some(place);
        kept.content.copy_from_slice(content);
        self.tables[place.table].slots[place.index] = u32::try_from(slot + 1).expect("bounded in `new`");
    }

    /// The page's content is of no use any more.
    pub(super) fn forget(&mut self, place: Place) {
        let Some(table) = self.tables.get_mut(place.table) else {
            return;
        };
        table.times[place.index] = 1;
        let slot = std::mem::take(&mut table.slots[place.index]);
        if slot != 0 {
            self.slots[slot as usize - 1].page = None;
            self.free.push(slot - 1);
        }
    }

    /// A slot for a page that was shipped so often lately, if one is free or somebody's who was shipped less often.
    fn room(&mut self, shipped: u8) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot as usize);
        }
        if self.slots.len() < self.most {
            self.slots.push(Slot {
                page: None,
                content: Box::new([0; PAGE_SIZE]),
            });
            return Some(self.slots.len() - 1);
        }
        for _ in 0..LOOKED_AT.min(self.most) {
            let slot = self.hand;
            self.hand = (self.hand + 1) % self.most;
            let page = self.slots[slot]
                .page
                .expect("slots without a page are free, and none is");
            let table = &mut self.tables[page.table];
            // By more than one: of pages written in turn, some are always one ahead.
            if table.times[page.index] + 1 < shipped {
                table.slots[page.index] = 0;
                self.counts.evictions += 1;
                return Some(slot);
            }
        }
        self.refused += 1;
        if self.refused > HALVED_AFTER * self.most {
            self.refused = 0;
            let counts = self.tables.iter_mut().flat_map(|table| &mut table.times);
            counts.for_each(|count| *count = count.div_ceil(2));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(index: usize) -> Place {
        Place { table: 0, index }
    }

    /// Ship the page with this content; whether a delta could have been made.
    fn ship(cache: &mut Cache, index: usize, fill: u8) -> Option<u8> {
        let kept = cache.shipping(place(index)).map(|content| content[0]);
        if kept.is_some() {
            cache.used(place(index), true);
        }
        cache.keep(place(index), &[fill; PAGE_SIZE]);
        kept
    }

    fn cache(slots: u64) -> Cache {
        Cache::new(Bytes(slots * PAGE_SIZE as u64), &[1_000, 10])
    }

    #[test]
    fn a_page_is_kept_from_its_second_shipment_on_as_it_was_shipped_last() {
        let mut cache = cache(2);
        let seen: Vec<_> = (1..5).map(|fill| ship(&mut cache, 5, fill)).collect();
        assert_eq!(seen, [None, None, Some(2), Some(3)]);
        cache.forget(place(5));
        assert_eq!(ship(&mut cache, 5, 6), None);
        let expected = CacheCounts {
            hits: 2,
            misses: 2,
            ..CacheCounts::default()
        };
        assert_eq!(cache.counts(), expected);
    }

    #[test]
    fn more_pages_than_fit_written_in_turn_do_not_push_each_other_out() {
        let mut cache = cache(100);
        for _ in 0..20 {
            (0..400).for_each(|index| {
                ship(&mut cache, index, 1);
            });
        }
        let counts = cache.counts();
        assert!(counts.hits > 17 * 80, "about a quarter of what could be: {counts:?}");
        assert!(counts.evictions < 200, "{counts:?}");
        assert_eq!(cache.slots.len(), 100);
    }

    #[test]
    fn what_becomes_busy_takes_the_place_of_what_was() {
        let mut cache = cache(50);
        for _ in 0..40 {
            (0..50).for_each(|index| {
                ship(&mut cache, index, 1);
            });
        }
        for _ in 0..60 {
            (500..550).for_each(|index| {
                ship(&mut cache, index, 1);
            });
        }
        let kept = (500..550).filter(|index| ship(&mut cache, *index, 1).is_some()).count();
        assert!(kept > 40, "{kept} of 50");
    }

    #[test]
    fn a_page_of_which_everything_changes_is_kept_no_longer_than_it_takes_to_see_that() {
        let mut cache = cache(1);
        ship(&mut cache, 0, 1);
        ship(&mut cache, 0, 2);
        assert!(cache.shipping(place(0)).is_some());
        cache.used(place(0), false);
        assert_eq!(cache.counts().useless, 1);
        assert_eq!(cache.free, [0]);
        ship(&mut cache, 1, 1);
        ship(&mut cache, 1, 2);
        assert_eq!(ship(&mut cache, 1, 3), Some(2), "its room is another's");
    }

    #[test]
    fn without_room_nothing_is_kept() {
        let mut cache = cache(0);
        assert!((0..5).all(|fill| ship(&mut cache, 0, fill).is_none()));
    }
}
