//! Turns owed pages into batches: what the source remembers of what it shipped.
//!
//! Pure functions over page bytes and the tables they need, used by one thread at a time. The state machine decides
//! page numbers; the node copies the pages out of the guest *now* (a later write only makes the copy newer, and that
//! write is in the next harvest), hands them in here, and ships what comes out.

use std::collections::BTreeMap;

use umbra_units::{BatchId, Bytes, PAGE_SIZE, PageId, SpaceId};

use crate::batch::{BatchWriter, Close, PageCounts};
use crate::digest::{Digest, PageHash, is_zero};
use crate::error::Fault;
use crate::guest::{Guest, PageBytes, PageReader, Space};
use crate::ledger::{Base, Owed};
use crate::page::{Encoding, encode_delta};
use crate::source::Plan;

/// How much of what was shipped is kept to make deltas against. QEMU's XBZRLE keeps as much by default.
pub const DEFAULT_CACHE: Bytes = Bytes::mib(64);

/// After a batch that lz4 could not shrink below this share, the next few are not tried.
const WORTH_COMPRESSING: f64 = 0.9;
/// How many batches are not tried then.
const PATIENCE: u32 = 31;

/// A batch ready for the link.
#[derive(Debug)]
pub struct Encoded {
    /// Its number.
    pub id: BatchId,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// How its pages travel.
    pub counts: PageCounts,
}

/// What the source remembers of what it shipped in one session.
#[derive(Debug, Clone)]
pub struct Encoder {
    /// Per space and page, the hash of the content last shipped: zeros at first, as at a new shadow.
    shipped: BTreeMap<SpaceId, Vec<PageHash>>,
    digest: Digest,
    cache: Cache,
    /// Batches to go before lz4 is tried again.
    hopeless: u32,
    scratch: Vec<u8>,
}

impl Encoder {
    /// The encoder of a new session, which keeps up to `cache` of page contents.
    pub fn new(spaces: &[Space], cache: Bytes) -> Self {
        let table = |space: &Space| {
            let pages = usize::try_from(space.pages.0).expect("a mapped space fits the address space");
            (space.id, vec![PageHash::zero(); pages])
        };
        Self {
            shipped: spaces.iter().map(table).collect(),
            digest: Digest::ZEROS,
            cache: Cache::new(cache),
            hopeless: 0,
            scratch: Vec::new(),
        }
    }

    /// The digest of everything shipped so far: of all memory, once nothing is owed.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Copy a planned batch's pages out of `from` and encode them. `compress` allows lz4. A plan that closes its epoch
    /// gets the digest as it is after this batch.
    pub fn encode(&mut self, plan: Plan, from: &dyn PageReader, compress: bool) -> Result<Encoded, Fault> {
        let mut writer = BatchWriter::new(plan.batch, plan.epoch, plan.owed_after.0);
        for run in plan.pages.chunk_by(|a, b| a.page.space == b.page.space) {
            let space = run[0].page.space;
            let pfns: Vec<_> = run.iter().map(|owed| owed.page.pfn).collect();
            let mut contents = std::mem::take(&mut self.scratch);
            contents.clear();
            let read = from.read_pages(space, &pfns, &mut contents);
            if read.is_ok() {
                let pages = contents
                    .chunks_exact(PAGE_SIZE)
                    .map(|page| page.try_into().expect("whole pages"));
                run.iter()
                    .zip(pages)
                    .for_each(|(owed, page)| self.encode_page(*owed, page, plan.batch, &mut writer));
            }
            self.scratch = contents;
            read?;
        }
        // Asked after the pages were copied: see `Attempt`.
        // covered by: an_attempt_withdrawn_before_its_last_batch_is_encoded_closes_nothing
        let withdrawn = plan.attempt.is_some_and(|attempt| attempt.is_withdrawn());
        if let Some(close) = plan.close.filter(|_| !withdrawn) {
            writer.close(Close {
                digest: self.digest,
                ..close
            });
        }
        let counts = writer.counts();
        let bytes = self.finish(writer, compress);
        Ok(Encoded {
            id: plan.batch,
            bytes,
            counts,
        })
    }

    /// What the shadow will have once everything shipped has arrived.
    pub fn shipped_hash(&self, page: PageId) -> Option<PageHash> {
        let table = self.shipped.get(&page.space)?;
        table.get(usize::try_from(page.pfn.0).ok()?).copied()
    }

    /// Compare the memory of a paused guest with what was shipped, page by page: the only check that finds a write
    /// which was never harvested. Answers the pages that differ.
    pub fn audit(&self, guest: &dyn Guest) -> Result<Vec<PageId>, Fault> {
        crate::audit::differing(guest, |page| self.shipped_hash(page))
    }

    fn encode_page(&mut self, owed: Owed, page: &PageBytes, batch: BatchId, writer: &mut BatchWriter) {
        let hash = PageHash::of(page);
        let index = usize::try_from(owed.page.pfn.0).expect("a page of a mapped space");
        let shipped = &mut self
            .shipped
            .get_mut(&owed.page.space)
            .expect("pages come from known spaces")[index];
        if let (Base::Held(_), true) = (owed.base, hash == *shipped) {
            self.cache.renumber(owed.page, batch);
            writer.same();
            return;
        }
        self.digest.change(owed.page, *shipped, hash);
        *shipped = hash;
        if is_zero(page) {
            self.cache.forget(owed.page);
            writer.page(owed.page, hash, Encoding::Zero, |_| {});
            return;
        }
        let old = match owed.base {
            Base::Held(base) => self.cache.content(owed.page, base),
            Base::InFlight | Base::Unknown => None,
        };
        let mut delta = umbra_units::Writer::new();
        if old.is_some_and(|old| encode_delta(old, page, &mut delta)) {
            writer.page(owed.page, hash, Encoding::Delta, |out| {
                out.put(delta.as_slice());
            });
        } else {
            writer.page(owed.page, hash, Encoding::Raw, |out| {
                out.put(page);
            });
        }
        // Admit from the second shipment on: a page that is only ever seeded would push out those that change.
        if owed.base != Base::Held(BatchId(0)) {
            self.cache.keep(owed.page, batch, page);
        }
    }

    fn finish(&mut self, writer: BatchWriter, compress: bool) -> Vec<u8> {
        if !compress || self.hopeless > 0 {
            self.hopeless = self.hopeless.saturating_sub(1);
            return writer.finish(false);
        }
        let counts = writer.counts();
        let bytes = writer.finish(true);
        #[expect(clippy::cast_precision_loss, reason = "a threshold")]
        let ratio = bytes.len() as f64 / (counts.raw.max(1) * PAGE_SIZE as u64) as f64;
        if counts.raw >= 16 && ratio > WORTH_COMPRESSING {
            self.hopeless = PATIENCE;
        }
        bytes
    }
}

/// Contents last shipped, of pages that ship often; the longest unused goes first.
#[derive(Debug, Clone)]
struct Cache {
    most: usize,
    clock: u64,
    pages: BTreeMap<PageId, Kept>,
    /// By when each was last used: the first entry goes first.
    by_use: BTreeMap<u64, PageId>,
}

#[derive(Debug, Clone)]
struct Kept {
    batch: BatchId,
    used: u64,
    content: Box<PageBytes>,
}

impl Cache {
    fn new(size: Bytes) -> Self {
        let most = usize::try_from(size.0).unwrap_or(usize::MAX) / PAGE_SIZE;
        Self {
            most,
            clock: 0,
            pages: BTreeMap::new(),
            by_use: BTreeMap::new(),
        }
    }

    /// The page as batch `base` carried it.
    fn content(&self, page: PageId, base: BatchId) -> Option<&PageBytes> {
        self.pages
            .get(&page)
            .filter(|kept| kept.batch == base)
            .map(|kept| &*kept.content)
    }

    /// The page was found unchanged when batch `batch` was made: its content may be called that batch's too.
    fn renumber(&mut self, page: PageId, batch: BatchId) {
        if let Some(kept) = self.pages.get_mut(&page) {
            kept.batch = batch;
        }
    }

    fn keep(&mut self, page: PageId, batch: BatchId, content: &PageBytes) {
        if self.most == 0 {
            return;
        }
        self.clock += 1;
        let used = self.clock;
        self.by_use.insert(used, page);
        if let Some(kept) = self.pages.get_mut(&page) {
            self.by_use.remove(&kept.used);
            (kept.batch, kept.used) = (batch, used);
            kept.content.copy_from_slice(content);
            return;
        }
        // Reuse the evicted page's allocation: in the steady state nothing is allocated per page.
        let mut room = (self.pages.len() >= self.most)
            .then(|| self.evict())
            .flatten()
            .unwrap_or_else(|| Box::new(*content));
        room.copy_from_slice(content);
        self.pages.insert(
            page,
            Kept {
                batch,
                used,
                content: room,
            },
        );
    }

    fn evict(&mut self) -> Option<Box<PageBytes>> {
        let (_, oldest) = self.by_use.pop_first()?;
        self.pages.remove(&oldest).map(|kept| kept.content)
    }

    fn forget(&mut self, page: PageId) {
        if let Some(kept) = self.pages.remove(&page) {
            self.by_use.remove(&kept.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Pfn;

    #[test]
    fn the_cache_keeps_the_recently_shipped_within_its_bound() {
        let mut cache = Cache::new(Bytes(2 * PAGE_SIZE as u64));
        let page = |n| PageId::ram(Pfn(n));
        for n in 0..3 {
            cache.keep(page(n), BatchId(n + 1), &[u8::try_from(n).unwrap(); PAGE_SIZE]);
        }
        assert!(cache.content(page(0), BatchId(1)).is_none(), "the longest unused went");
        assert_eq!(cache.content(page(1), BatchId(2)), Some(&[1; PAGE_SIZE]));
        cache.keep(page(1), BatchId(9), &[7; PAGE_SIZE]);
        cache.keep(page(4), BatchId(10), &[8; PAGE_SIZE]);
        assert!(cache.content(page(2), BatchId(3)).is_none());
        assert!(
            cache.content(page(1), BatchId(2)).is_none(),
            "another batch's content is another content"
        );
        assert_eq!(cache.content(page(1), BatchId(9)), Some(&[7; PAGE_SIZE]));
        assert_eq!((cache.pages.len(), cache.by_use.len()), (2, 2));
    }
}
