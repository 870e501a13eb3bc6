//! Turns owed pages into batches: what the source remembers of what it shipped.
//!
//! Pure functions over page bytes and the tables they need, used by one thread at a time. The state machine decides
//! page numbers; the node copies the pages out of the guest *now* (a later write only makes the copy newer, and that
//! write is in the next harvest), hands them in here, and ships what comes out.
//!
//! # What a page may lean on
//!
//! The shadow applies batches in the order of their numbers, and plans are encoded in that order. So whatever the tables
//! here say was shipped of a page is what the shadow holds of it when it comes to the page being encoded, acknowledged or
//! not, earlier pages of the same batch included. The exception says so itself: a page whose [`Base`] is unknown.
//!
//! # What a page costs
//!
//! It is copied once, looked at for zeros, hashed once, and compared with the hash last shipped; most pages end here. One
//! that changed is encoded against its [kept](cache) content, or else looked up among the [contents shipped](dups), or
//! else copied as it is. In the steady state nothing is allocated per page. Compressing what comes out costs more than
//! all of that together, and is the only part that other threads may do: see [`Draft`].

mod cache;
mod dups;

use umbra_units::{BatchId, Bytes, PAGE_SIZE, PageId, Pfn, SpaceId};

use crate::audit;
use crate::batch::{BatchWriter, Close, Draft, PageCounts};
use crate::digest::{Digest, PageHash, is_zero};
use crate::error::Fault;
use crate::guest::{Guest, PageBytes, PageReader, Space};
use crate::ledger::{Base, Owed};
use crate::pack::{Method, Packer};
use crate::page::{Dup, Encoding, encode_delta};
use crate::source::Plan;

use cache::Cache;
use dups::Dups;

pub use cache::CacheCounts;

/// How much of what was shipped is kept to make deltas against. QEMU's XBZRLE keeps as much by default.
pub const DEFAULT_CACHE: Bytes = Bytes::mib(64);

/// Pages copied out of the guest at once: they are still in the processor's cache when they are encoded.
const AT_ONCE: usize = 32;

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
    /// What was shipped of each space, ascending by the space's number.
    tables: Vec<Table>,
    digest: Digest,
    cache: Cache,
    dups: Dups,
    /// Page contents on their way through, and their numbers: reused.
    contents: Vec<u8>,
    pfns: Vec<Pfn>,
}

/// What was shipped of one space.
#[derive(Debug, Clone)]
struct Table {
    space: SpaceId,
    /// Per page, the hash of the content last shipped: zeros at first, as at a new shadow.
    shipped: Vec<PageHash>,
}

/// A page, as the tables count it: which table, and where in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    table: usize,
    index: usize,
}

impl Encoder {
    /// The encoder of a new session, which keeps up to `cache` of page contents.
    pub fn new(spaces: &[Space], cache: Bytes) -> Self {
        let table = |space: &Space| {
            let pages = usize::try_from(space.pages.0).expect("a mapped space fits the address space");
            Table {
                space: space.id,
                shipped: vec![PageHash::zero(); pages],
            }
        };
        let mut tables: Vec<Table> = spaces.iter().map(table).collect();
        tables.sort_by_key(|table| table.space);
        let pages: Vec<usize> = tables.iter().map(|table| table.shipped.len()).collect();
        Self {
            cache: Cache::new(cache, &pages),
            dups: Dups::new(pages.iter().sum()),
            tables,
            digest: Digest::ZEROS,
            contents: Vec::new(),
            pfns: Vec::new(),
        }
    }

    /// With a secret: contents are compared by a hash that depends on it, so that nobody inside the guest can make two
    /// contents that this encoder takes for one. Any number will do that the guest cannot know.
    #[must_use]
    pub fn keyed(mut self, secret: u64) -> Self {
        self.dups.key(secret);
        self
    }

    /// The digest of everything shipped so far: of all memory, once nothing is owed.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// How well keeping contents went.
    pub const fn cache_counts(&self) -> CacheCounts {
        self.cache.counts()
    }

    /// Copy a planned batch's pages out of `from` and encode them. Plans must come in the order of their numbers. A plan
    /// that closes its epoch gets the digest as it is after this batch.
    pub fn draft(&mut self, plan: Plan, from: &dyn PageReader) -> Result<Draft, Fault> {
        let mut writer = BatchWriter::new(plan.batch, plan.epoch, plan.owed_after.0);
        // First: nothing may be a copy of what the shadow is thought not to hold.
        // covered by: the_shadow_equals_the_source_after_any_walk
        for owed in plan.pages.iter().filter(|owed| owed.base == Base::Unknown) {
            let place = self.place(owed.page);
            self.dups.forget(place, self.tables[place.table].shipped[place.index]);
            self.cache.forget(place);
        }
        for run in plan.pages.chunk_by(|a, b| a.page.space == b.page.space) {
            let space = run[0].page.space;
            let Place { table, .. } = self.place(run[0].page);
            for some in run.chunks(AT_ONCE) {
                let mut contents = std::mem::take(&mut self.contents);
                contents.clear();
                self.pfns.clear();
                self.pfns.extend(some.iter().map(|owed| owed.page.pfn));
                let read = from.read_pages(space, &self.pfns, &mut contents);
                if read.is_ok() {
                    let pages = contents.chunks_exact(PAGE_SIZE);
                    some.iter().zip(pages).for_each(|(owed, page)| {
                        let page = page.try_into().expect("whole pages");
                        self.page(table, *owed, page, &mut writer);
                    });
                }
                self.contents = contents;
                read?;
            }
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
        Ok(writer.draft())
    }

    /// Copy, encode and compress at once, for whoever has one thread and no preference.
    pub fn encode(&mut self, plan: Plan, from: &dyn PageReader, compress: bool) -> Result<Encoded, Fault> {
        let draft = self.draft(plan, from)?;
        let (id, counts) = (draft.id(), draft.counts());
        let method = if compress { Method::Lz4 } else { Method::None };
        let (bytes, _) = draft.pack(method, &mut Packer::new());
        Ok(Encoded { id, bytes, counts })
    }

    /// What the shadow will have once everything shipped has arrived.
    pub fn shipped_hash(&self, page: PageId) -> Option<PageHash> {
        let table = self.tables.iter().find(|table| table.space == page.space)?;
        table.shipped.get(usize::try_from(page.pfn.0).ok()?).copied()
    }

    /// Compare the memory of a paused guest with what was shipped, page by page: the only check that finds a write
    /// which was never harvested. Answers the pages that differ.
    pub fn audit(&self, guest: &dyn Guest) -> Result<Vec<PageId>, Fault> {
        audit::differing(guest, |page| self.shipped_hash(page))
    }

    fn place(&self, page: PageId) -> Place {
        let table = self.tables.binary_search_by_key(&page.space, |table| table.space);
        Place {
            table: table.expect("pages come from known spaces"),
            index: index(page.pfn),
        }
    }

    fn page(&mut self, table: usize, owed: Owed, content: &PageBytes, writer: &mut BatchWriter) {
        let index = index(owed.page.pfn);
        let place = Place { table, index };
        let zeros = is_zero(content);
        let hash = if zeros { PageHash::zero() } else { PageHash::of(content) };
        let known = owed.base != Base::Unknown;
        let old = std::mem::replace(&mut self.tables[table].shipped[index], hash);
        if known && hash == old {
            writer.same();
            return;
        }
        self.digest.change(owed.page, old, hash);
        self.dups.forget(place, old);
        if zeros {
            self.cache.forget(place);
            writer.page(owed.page, hash, Encoding::Zero, |_| {});
            return;
        }
        let mut delta = false;
        if let Some(kept) = self.cache.shipping(place) {
            writer.page_if(owed.page, hash, Encoding::Delta, |out| {
                delta = encode_delta(kept, content, out);
                delta
            });
            self.cache.used(place, delta);
        }
        if !delta {
            self.whole(owed.page, place, hash, content, writer);
        }
        self.cache.keep(place, content);
    }

    /// As a copy of another page, or as it is.
    fn whole(&mut self, page: PageId, place: Place, hash: PageHash, content: &PageBytes, writer: &mut BatchWriter) {
        if let Some(twin) = self.dups.find_or_insert(place, hash, content) {
            let table = &self.tables[twin.table];
            debug_assert_eq!(table.shipped[twin.index], hash, "what was shipped since is forgotten");
            let of = PageId {
                space: table.space,
                pfn: Pfn(twin.index as u64),
            };
            let dup = Dup::new(of, content);
            writer.page(page, hash, Encoding::Dup, |out| dup.write(out));
        } else {
            writer.page(page, hash, Encoding::Raw, |out| {
                out.put(content);
            });
        }
    }
}

fn index(pfn: Pfn) -> usize {
    usize::try_from(pfn.0).expect("a page number of a mapped space fits the address space")
}
