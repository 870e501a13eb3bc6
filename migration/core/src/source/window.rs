//! How much may be on its way: the shadow's grant, and what of it is taken.
//!
//! A batch counts from when it is planned, at the most it may become, until the shadow says that it was applied; once it
//! is encoded, at what it became. One batch may be on its way however small the grant is, unless the grant is nothing: so
//! nothing waits for ever for a window that is smaller than a batch.

use std::collections::BTreeMap;

use umbra_units::{BatchId, Bytes, PAGE_SIZE};

use crate::limits;

/// The batches on their way and their bytes.
#[derive(Debug, Default)]
pub(super) struct Window {
    granted: Bytes,
    /// Bytes and pages of each.
    out: BTreeMap<BatchId, (Bytes, u64)>,
    taken: Bytes,
    pages: u64,
}

impl Window {
    /// The shadow takes so many bytes of batches that it has not applied.
    pub(super) const fn grant(&mut self, granted: Bytes) {
        self.granted = granted;
    }

    /// Whether a batch of so many pages may be planned now, which carries `extra` beside them.
    pub(super) fn takes(&self, pages: u64, extra: Bytes) -> bool {
        if self.out.is_empty() {
            return self.granted > Bytes::ZERO;
        }
        self.out.len() < limits::BATCHES_IN_FLIGHT && self.taken + most_of(pages, extra) <= self.granted
    }

    /// A batch of so many pages was planned.
    pub(super) fn planned(&mut self, batch: BatchId, pages: u64, extra: Bytes) {
        let most = most_of(pages, extra);
        self.taken += most;
        self.pages += pages;
        self.out.insert(batch, (most, pages));
    }

    /// It became so many bytes.
    pub(super) fn encoded(&mut self, batch: BatchId, bytes: Bytes) {
        // The shadow's word may come before that of our own encoder: two threads.
        if let Some((counted, _)) = self.out.get_mut(&batch) {
            self.taken = self.taken.saturating_sub(*counted) + bytes;
            *counted = bytes;
        }
    }

    /// Every batch up to this one was applied.
    pub(super) fn applied(&mut self, through: BatchId) {
        while let Some(first) = self.out.first_entry().filter(|first| *first.key() <= through) {
            let (bytes, pages) = first.remove();
            self.taken = self.taken.saturating_sub(bytes);
            self.pages -= pages;
        }
    }

    /// Pages on their way.
    pub(super) const fn pages(&self) -> u64 {
        self.pages
    }
}

/// The most a batch may become: every page raw with its entry.
fn most_of(pages: u64, extra: Bytes) -> Bytes {
    Bytes(pages * (PAGE_SIZE as u64 + 32) + 64) + extra
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_was_granted_is_on_its_way_and_one_batch_always_may_be() {
        let mut window = Window::default();
        assert!(!window.takes(1, Bytes::ZERO), "nothing was granted");
        window.grant(Bytes(1));
        assert!(window.takes(256, Bytes::ZERO), "one, however small the grant");
        window.planned(BatchId(1), 256, Bytes::ZERO);
        assert!(!window.takes(1, Bytes::ZERO));

        window.grant(Bytes::kib(20));
        window.encoded(BatchId(1), Bytes::kib(10));
        assert!(window.takes(2, Bytes::ZERO) && !window.takes(2, Bytes::kib(4)));
        window.planned(BatchId(2), 2, Bytes::ZERO);
        assert!(!window.takes(1, Bytes::ZERO), "a plan counts at the most it may become");
        window.applied(BatchId(1));
        assert!(window.takes(1, Bytes::ZERO));
        window.applied(BatchId(2));
        window.encoded(BatchId(2), Bytes::kib(9));
        assert_eq!(
            (window.taken, window.out.len()),
            (Bytes::ZERO, 0),
            "the late word of an encoder"
        );
    }
}
