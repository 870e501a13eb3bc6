//! What the shadow holds: which batch each page is from, its hash, and the digest of them all.
//!
//! Batches arrive in any order, because they travel over several paths. A page copy is as old as its batch's number, and
//! an old copy never overwrites a newer one. Every copy is checked against the hash that travelled with it, after
//! decoding and before it is written: a mixture is impossible, a corruption has a page number.

use std::collections::{BTreeMap, BTreeSet};

use umbra_units::{BatchId, Epoch, PAGE_SIZE, PageCount, PageId, SpaceId};

use crate::batch::{Batch, Close, PageCounts};
use crate::digest::{Digest, PageHash};
use crate::error::Fault;
use crate::guest::{Guest, PageBytes, Space};
use crate::limits;
use crate::page::{Encoding, apply_delta};

/// What applying one batch did, for the state machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Which batch.
    pub id: BatchId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Pages the source owed beyond it when it was made.
    pub owed: u64,
    /// How its pages came.
    pub counts: PageCounts,
    /// What closes the epoch, if this batch does.
    pub close: Option<Close>,
    /// Every batch up to and including this one has been applied by now.
    pub through: BatchId,
    /// The digest of all memory by now.
    pub digest: Digest,
}

/// The shadow's tables. One thread applies at a time.
#[derive(Debug)]
pub struct Image {
    spaces: BTreeMap<SpaceId, Vec<Held>>,
    digest: Digest,
    /// Every batch up to and including this one has been applied.
    through: BatchId,
    /// Batches beyond `through` that have been applied; bounded by [`limits::BATCHES_BEYOND`].
    beyond: BTreeSet<BatchId>,
    /// The newest epoch of which a page was applied.
    newest: Epoch,
    /// The guest runs from this image, or is about to: nothing may be written to it any more.
    sealed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    /// The batch the content is from; 0: never written.
    batch: u64,
    hash: PageHash,
}

impl Image {
    /// A new shadow: every page zeros.
    pub fn new(spaces: &[Space]) -> Self {
        let table = |space: &Space| {
            let pages = usize::try_from(space.pages.0).expect("a mapped space fits the address space");
            (
                space.id,
                vec![
                    Held {
                        batch: 0,
                        hash: PageHash::zero()
                    };
                    pages
                ],
            )
        };
        Self {
            spaces: spaces.iter().map(table).collect(),
            digest: Digest::ZEROS,
            through: BatchId(0),
            beyond: BTreeSet::new(),
            newest: Epoch(0),
            sealed: false,
        }
    }

    /// The twin is about to run as it was at the end of `epoch`: apply nothing any more. Refused if pages of a newer
    /// epoch are in it already, because then it is a mixture (DESIGN §3.3). Only an operator's word for a source that had
    /// taken its final epoch back can come to that.
    pub fn seal(&mut self, epoch: Epoch) -> Result<(), Fault> {
        if self.newest > epoch {
            return Err(Fault::Host(format!(
                "epoch {epoch} was taken back: pages of epoch {} were applied over it",
                self.newest
            )));
        }
        self.sealed = true;
        Ok(())
    }

    /// The digest of all memory as held.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Every batch up to and including this one has been applied.
    pub const fn through(&self) -> BatchId {
        self.through
    }

    /// Whether this batch has been applied already.
    pub fn has(&self, batch: BatchId) -> bool {
        batch <= self.through || self.beyond.contains(&batch)
    }

    /// Write a batch's pages into `guest`. A batch that was applied before is harmless.
    pub fn apply(&mut self, batch: Batch, guest: &dyn Guest) -> Result<Applied, Fault> {
        let mut counts = PageCounts::default();
        if !self.has(batch.id) {
            if self.sealed {
                let text = format!("batch {} came too late: the guest runs here", batch.id);
                return Err(Fault::Host(text));
            }
            self.newest = self.newest.max(batch.epoch);
            let mut page = [0; PAGE_SIZE];
            for (id, encoding, hash, bytes) in batch.pages() {
                self.apply_page(batch.id, id, encoding, hash, bytes, &mut page, guest)?;
                match encoding {
                    Encoding::Zero => counts.zero += 1,
                    Encoding::Delta => counts.delta += 1,
                    Encoding::Raw => counts.raw += 1,
                }
            }
            self.note(batch.id)?;
        }
        Ok(Applied {
            id: batch.id,
            epoch: batch.epoch,
            owed: batch.owed,
            counts,
            close: batch.close,
            through: self.through,
            digest: self.digest,
        })
    }

    /// Compare memory itself with the table, page by page. Answers the pages that differ.
    pub fn audit(&self, guest: &dyn Guest) -> Result<Vec<PageId>, Fault> {
        crate::audit::differing(guest, |page| self.held(page).map(|held| held.hash))
    }

    /// Pages this shadow has ever been sent.
    pub fn touched(&self) -> PageCount {
        PageCount(self.spaces.values().flatten().filter(|held| held.batch != 0).count() as u64)
    }

    fn held(&self, page: PageId) -> Option<Held> {
        self.spaces
            .get(&page.space)?
            .get(usize::try_from(page.pfn.0).ok()?)
            .copied()
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one page's facts, used once; a struct would only rename them"
    )]
    fn apply_page(
        &mut self,
        batch: BatchId,
        id: PageId,
        encoding: Encoding,
        hash: PageHash,
        bytes: &[u8],
        page: &mut PageBytes,
        guest: &dyn Guest,
    ) -> Result<(), Fault> {
        let held = self
            .held(id)
            .ok_or_else(|| Fault::PeerMisbehaved(format!("it sent {id}, which the guest does not have")))?;
        if held.batch > batch.0 {
            return Ok(()); // covered by: a_late_copy_of_an_old_page_is_ignored
        }
        match encoding {
            Encoding::Zero => page.fill(0),
            Encoding::Raw => page.copy_from_slice(bytes),
            Encoding::Delta => {
                guest.read_page(id, page)?;
                apply_delta(page, bytes)?;
            }
        }
        if PageHash::of(page) != hash {
            return Err(Fault::PeerMisbehaved(format!(
                "{id} of batch {batch} does not match its hash"
            )));
        }
        guest.apply_page(id, page)?;
        self.digest.change(id, held.hash, hash);
        let index = usize::try_from(id.pfn.0).expect("found above");
        self.spaces.get_mut(&id.space).expect("found above")[index] = Held { batch: batch.0, hash };
        Ok(())
    }

    fn note(&mut self, batch: BatchId) -> Result<(), Fault> {
        self.beyond.insert(batch);
        while self.beyond.remove(&self.through.next()) {
            self.through = self.through.next();
        }
        if self.beyond.len() > limits::BATCHES_BEYOND {
            return Err(Fault::PeerMisbehaved(format!(
                "batch {} never came, but {batch} did",
                self.through.next()
            )));
        }
        Ok(())
    }
}
