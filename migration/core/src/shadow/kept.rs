//! The last committed epoch, kept while newer pages are written over it.
//!
//! The twin's memory is always the newest: batches are decoded against it and written into it. What makes the committed epoch
//! intact all the same is that the first time a page changes after the commit, what it held is put aside. Going back is
//! writing those pages back; committing the next epoch is dropping them. So a commit costs nothing however much was
//! shipped since the last, a switchover's pause does not grow with it, and only an operator who goes back pays
//! (`docs/decisions`, "the committed epoch is kept by what is written over it").

use umbra_units::{Bytes, Epoch, PAGE_SIZE, PageCount, PageId, PageSet, SpaceId};

use crate::digest::{Digest, PageHash};
use crate::guest::{PageBytes, StateRecord};

use std::collections::BTreeMap;

/// A committed epoch: what it takes to go back to it.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) epoch: Epoch,
    pub(super) digest: Digest,
    pub(super) records: Vec<StateRecord>,
    /// Pages that changed since, each once, with what they held.
    pub(super) before: Vec<Before>,
    changed: BTreeMap<SpaceId, PageSet>,
}

/// A page as it was at the commit. Its content, unless it was zeros.
#[derive(Debug)]
pub(super) struct Before {
    pub(super) page: PageId,
    pub(super) hash: PageHash,
    pub(super) content: Option<Box<PageBytes>>,
}

/// Room for what is put aside, with the buffers of epochs before: in the steady state nothing is allocated.
#[derive(Debug, Default)]
pub(super) struct Staging {
    most: PageCount,
    used: PageCount,
    spare: Vec<Box<PageBytes>>,
}

impl Kept {
    pub(super) fn new(epoch: Epoch, digest: Digest, records: Vec<StateRecord>) -> Self {
        Self {
            epoch,
            digest,
            records,
            before: Vec::new(),
            changed: BTreeMap::new(),
        }
    }

    /// Whether a page is still as it was at the commit.
    pub(super) fn is_as_it_was(&self, page: PageId) -> bool {
        self.changed.get(&page.space).is_none_or(|set| !set.contains(page.pfn))
    }

    /// A page of a space of so many is about to change for the first time.
    pub(super) fn put_aside(&mut self, before: Before, pages: PageCount) {
        let set = self
            .changed
            .entry(before.page.space)
            .or_insert_with(|| PageSet::new(pages));
        set.insert(before.page.pfn);
        self.before.push(before);
    }
}

impl Staging {
    /// Room for so many bytes.
    pub(super) const fn of(most: Bytes) -> Self {
        Self {
            most: PageCount(most.0 / PAGE_SIZE as u64),
            used: PageCount::ZERO,
            spare: Vec::new(),
        }
    }

    pub(super) const fn most(&self) -> PageCount {
        self.most
    }

    pub(super) const fn used(&self) -> PageCount {
        self.used
    }

    /// A buffer, unless all are taken.
    pub(super) fn take(&mut self) -> Option<Box<PageBytes>> {
        if self.used >= self.most {
            return None;
        }
        self.used += PageCount(1);
        Some(self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE_SIZE])))
    }

    /// What was put aside is needed no more.
    pub(super) fn give_back(&mut self, kept: Kept) {
        self.spare
            .extend(kept.before.into_iter().filter_map(|before| before.content));
        self.used = PageCount::ZERO;
    }
}
