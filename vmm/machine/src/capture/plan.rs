//! Where each captured page is kept.
//!
//! Pages are numbered in their order, 512 numbers to a chunk. What follows each other in the guest is a run, and a run lies in
//! one chunk: so that runs are what is copied and protected at once, and chunks what threads take turns with.

use std::ops::Range;

use umbra_units::{PageSet, Pfn};

use super::chunks::CHUNK;

/// Pages in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: Pfn,
    pub(super) pages: usize,
    /// The number of the first of them.
    pub(super) number: usize,
}

impl Run {
    const fn end(&self) -> u64 {
        self.first.0 + self.pages as u64
    }
}

/// All pages of a capture.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Ascending, disjoint.
    runs: Vec<Run>,
    /// Of each chunk, the first of its runs.
    chunks: Vec<usize>,
    pages: usize,
}

/// Pages that are protected though nobody captures them, so that two runs are protected by one call: a call costs as much
/// as dozens of pages, and a write to one of these only a fault.
const BRIDGE: u64 = 8;

impl Plan {
    pub(super) fn of(set: &PageSet) -> Self {
        let mut plan = Self::default();
        for page in set.iter() {
            let number = plan.pages;
            plan.pages += 1;
            if number.is_multiple_of(CHUNK) {
                plan.chunks.push(plan.runs.len());
            } else if let Some(run) = plan.runs.last_mut()
                && run.end() == page.0
            {
                run.pages += 1;
                continue;
            }
            plan.runs.push(Run {
                first: page,
                pages: 1,
                number,
            });
        }
        plan
    }

    pub(super) const fn pages(&self) -> usize {
        self.pages
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    pub(super) fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// The runs of one chunk.
    pub(super) fn runs_of(&self, chunk: usize) -> &[Run] {
        let end = self.chunks.get(chunk + 1).copied().unwrap_or(self.runs.len());
        &self.runs[self.chunks[chunk]..end]
    }

    /// What number a page has, if it is one of them.
    pub(super) fn find(&self, page: Pfn) -> Option<usize> {
        let after = self.runs.partition_point(|run| run.first <= page);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (page.0 < run.end()).then(|| run.number + usize::try_from(page.0 - run.first.0).unwrap_or(usize::MAX))
    }

    /// The pages of a chunk and a few between them, in as few ranges as is sensible.
    pub(super) fn ranges_of(&self, chunk: usize) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for run in self.runs_of(chunk) {
            match ranges.last_mut() {
                Some(range) if run.first.0 - range.end <= BRIDGE => range.end = run.end(),
                _ => ranges.push(run.first.0..run.end()),
            }
        }
        ranges
    }

    /// How many such ranges there are in all.
    pub(super) fn ranges(&self) -> usize {
        let bridged = |runs: &[Run]| runs[1].first.0 - runs[0].end() <= BRIDGE && !runs[1].number.is_multiple_of(CHUNK);
        self.runs.len() - self.runs.windows(2).filter(|runs| bridged(runs)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::btree_set;
    use proptest::prelude::*;
    use umbra_units::PageCount;

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(PageCount(1 << 20));
        pages.into_iter().for_each(|page| {
            set.insert(Pfn(page));
        });
        set
    }

    #[test]
    fn runs_are_pages_in_a_row_and_end_with_their_chunk() {
        let plan = Plan::of(&set((10..20).chain(100..1000)));
        let run = |first, pages, number| Run {
            first: Pfn(first),
            pages,
            number,
        };
        assert_eq!(plan.runs(), [run(10, 10, 0), run(100, 502, 10), run(602, 398, 512)]);
        assert_eq!((plan.pages(), plan.chunks()), (910, 2));
        assert_eq!(plan.runs_of(1), [run(602, 398, 512)]);
        assert_eq!(
            (plan.find(Pfn(15)), plan.find(Pfn(602)), plan.find(Pfn(20))),
            (Some(5), Some(512), None)
        );
        assert_eq!((plan.find(Pfn(9)), plan.find(Pfn(1000))), (None, None));
    }

    #[test]
    fn small_gaps_are_bridged() {
        let plan = Plan::of(&set([5, 13, 22, 40]));
        assert_eq!(plan.ranges_of(0), [5..23, 40..41]);
        assert_eq!(plan.ranges(), 2);
    }

    proptest! {
        #[test]
        fn every_page_has_its_own_number_and_lies_in_its_chunks_ranges(pages in btree_set(0_u64..3000, 0..1500)) {
            let plan = Plan::of(&set(pages.iter().copied()));
            for (number, page) in pages.iter().enumerate() {
                prop_assert_eq!(plan.find(Pfn(*page)), Some(number));
                prop_assert!(plan.ranges_of(number / CHUNK).iter().any(|range| range.contains(page)));
            }
            for page in (0..3000).filter(|page| !pages.contains(page)) {
                prop_assert_eq!(plan.find(Pfn(page)), None);
            }
            let ranges: Vec<_> = (0..plan.chunks()).flat_map(|chunk| plan.ranges_of(chunk)).collect();
            prop_assert_eq!(ranges.len(), plan.ranges());
            prop_assert!(ranges.windows(2).all(|two| two[0].end <= two[1].start));
        }
    }
}
