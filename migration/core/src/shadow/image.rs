//! What the shadow holds: the hash of each page, and the digest of them all.
//!
//! Batches are applied in the order they were made ([`Sequence`](super::Sequence) sees to it), so each page is at any time
//! what the newest batch that carried it says, and the encoder may lean on all of them. Every copy is checked against the
//! hash that travelled with it, after decoding and before it is written: a mixture is impossible, a corruption has a page
//! number.

use std::collections::BTreeMap;

use umbra_units::{BatchId, Bytes, Epoch, PAGE_SIZE, PageCount, PageId, SpaceId};

use super::kept::{Before, Kept, Staging};

use crate::batch::{Batch, Close, PageCounts};
use crate::digest::{Digest, PageHash};
use crate::error::Fault;
use crate::guest::{Guest, PageBytes, Space, StateRecord};
use crate::page::{Dup, Encoding, apply_delta};

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
    /// What closes a final epoch, if this batch does.
    pub close: Option<Close>,
    /// The epoch that was committed with this batch, if one was.
    pub committed: Option<Epoch>,
    /// The committed epoch that could be kept no longer, if that came to it.
    pub given_up: Option<Epoch>,
    /// What is kept, by now.
    pub staged: Staged,
    /// The digest of all memory by now.
    pub digest: Digest,
}

/// How much is put aside to keep a committed epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Staged {
    /// Whether an epoch is kept.
    pub keeps: bool,
    /// Pages put aside whose content takes room.
    pub used: PageCount,
    /// Of so many.
    pub most: PageCount,
}

/// The shadow's tables. One thread applies at a time.
#[derive(Debug)]
pub struct Image {
    /// The hash of each page.
    spaces: BTreeMap<SpaceId, Vec<PageHash>>,
    digest: Digest,
    /// Every batch up to and including this one has been applied.
    through: BatchId,
    /// The newest epoch of which a page was applied.
    newest: Epoch,
    /// The last committed epoch.
    kept: Option<Kept>,
    staging: Staging,
    /// It went back to the committed epoch: nothing follows on what it holds.
    recalled: bool,
    /// The guest runs from this image, or is about to: nothing may be written to it any more.
    sealed: bool,
}

impl Image {
    /// A new shadow: every page zeros.
    pub fn new(spaces: &[Space]) -> Self {
        let table = |space: &Space| {
            let pages = usize::try_from(space.pages.0).expect("a mapped space fits the address space");
            (space.id, vec![PageHash::zero(); pages])
        };
        Self {
            spaces: spaces.iter().map(table).collect(),
            digest: Digest::ZEROS,
            through: BatchId(0),
            newest: Epoch(0),
            kept: None,
            staging: Staging::default(),
            recalled: false,
            sealed: false,
        }
    }

    /// The same, with so much room to keep a committed epoch apart from what comes after it.
    pub fn with_staging(self, most: Bytes) -> Self {
        Self {
            staging: Staging::of(most),
            ..self
        }
    }

    /// What is put aside.
    pub const fn staged(&self) -> Staged {
        Staged {
            keeps: self.kept.is_some(),
            used: self.staging.used(),
            most: self.staging.most(),
        }
    }

    /// Go back to the committed epoch: memory is as it was at that cut. Answers which it is, and the state that belongs to it.
    /// Once begun it is finished, by another call if one fails; nothing is applied any more.
    pub fn recall(&mut self, guest: &dyn Guest) -> Result<(Epoch, Vec<StateRecord>), Fault> {
        let Some(kept) = &self.kept else {
            return Err(Fault::Host("no epoch is committed".to_owned()));
        };
        self.recalled = true;
        for before in &kept.before {
            let content = before.content.as_deref().unwrap_or(&[0; PAGE_SIZE]);
            if PageHash::of(content) != before.hash {
                return Err(Fault::Host(format!(
                    "what {} held was damaged where it was kept",
                    before.page
                )));
            }
            guest.apply_page(before.page, content)?;
            let index = usize::try_from(before.page.pfn.0).expect("a page of this table");
            let table = self.spaces.get_mut(&before.page.space).expect("a space of this table");
            self.digest.change(before.page, table[index], before.hash);
            table[index] = before.hash;
        }
        if self.digest != kept.digest {
            return Err(Fault::Host(format!(
                "the digest of epoch {} was {}, and is {} after going back to it",
                kept.epoch, kept.digest, self.digest
            )));
        }
        self.newest = kept.epoch;
        Ok((kept.epoch, kept.records.clone()))
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

    /// Write the next batch's pages into `guest`.
    pub fn apply(&mut self, batch: Batch, guest: &dyn Guest) -> Result<Applied, Fault> {
        if self.sealed {
            let text = format!("batch {} came too late: the guest runs here", batch.id);
            return Err(Fault::Host(text));
        }
        if self.recalled {
            let text = format!("batch {} came too late: the committed epoch was gone back to", batch.id);
            return Err(Fault::Host(text));
        }
        // covered by: batches_are_applied_in_their_order_or_not_at_all
        if batch.id != self.through.next() {
            return Err(Fault::PeerMisbehaved(format!(
                "batch {} does not follow batch {}",
                batch.id, self.through
            )));
        }
        self.newest = self.newest.max(batch.epoch);
        let kept_before = self.kept.as_ref().map(|kept| kept.epoch);
        let mut counts = PageCounts::default();
        let mut page = [0; PAGE_SIZE];
        for (id, encoding, hash, bytes) in batch.pages() {
            let old = self
                .hash(id)
                .ok_or_else(|| Fault::PeerMisbehaved(format!("it sent {id}, which the guest does not have")))?;
            match encoding {
                Encoding::Zero => page.fill(0),
                Encoding::Raw => page.copy_from_slice(bytes),
                Encoding::Delta => {
                    guest.read_page(id, &mut page)?;
                    apply_delta(&mut page, bytes)?;
                }
                Encoding::Dup => {
                    let dup = Dup::read(bytes)?;
                    if self.hash(dup.of).is_none() {
                        let text = format!("it named {}, which the guest does not have", dup.of);
                        return Err(Fault::PeerMisbehaved(text));
                    }
                    guest.read_page(dup.of, &mut page)?;
                    // covered by: a_copy_of_what_the_shadow_does_not_hold_is_refused
                    if !dup.is_proven_by(&page) {
                        let text = format!("{id} of batch {} is no copy of {}", batch.id, dup.of);
                        return Err(Fault::PeerMisbehaved(text));
                    }
                }
            }
            self.write(id, old, hash, &page, batch.id, guest)?;
            counts.travels(encoding);
        }
        self.through = batch.id;
        let given_up = kept_before.filter(|_| self.kept.is_none());
        let (committed, close) = match batch.close {
            Some(close) if !close.is_final => (Some(self.commit(batch.epoch, close, guest)?), None),
            close => (None, close),
        };
        Ok(Applied {
            committed,
            given_up,
            staged: self.staged(),
            id: batch.id,
            epoch: batch.epoch,
            owed: batch.owed,
            counts,
            close,
            digest: self.digest,
        })
    }

    /// Compare memory itself with the table, page by page. Answers the pages that differ.
    pub fn audit(&self, guest: &dyn Guest) -> Result<Vec<PageId>, Fault> {
        crate::audit::differing(guest, |page| self.hash(page))
    }

    /// The epoch is whole: hold it against its digest, and keep it from now on.
    fn commit(&mut self, epoch: Epoch, close: Close, guest: &dyn Guest) -> Result<Epoch, Fault> {
        if self.digest != close.digest {
            return Err(Fault::PeerMisbehaved(format!(
                "the digest of epoch {epoch} is {} here and {} at the source",
                self.digest, close.digest
            )));
        }
        if close.audit {
            let differing = self.audit(guest)?;
            if let Some(first) = differing.first() {
                return Err(Fault::Host(format!(
                    "the audit found {} pages that differ from what was applied, {first} first",
                    differing.len()
                )));
            }
        }
        let kept = self.kept.replace(Kept::new(epoch, close.digest, close.records));
        if let Some(last) = kept {
            self.staging.give_back(last);
        }
        Ok(epoch)
    }

    /// A page is about to change: what it held at the commit is put aside, if it still holds that. When there is no room, the
    /// committed epoch is given up, because following goes on whatever comes.
    fn put_aside(&mut self, page: PageId, hash: PageHash, guest: &dyn Guest) -> Result<(), Fault> {
        let Some(kept) = self.kept.as_mut().filter(|kept| kept.is_as_it_was(page)) else {
            return Ok(());
        };
        let content = if hash == PageHash::zero() {
            None
        } else if let Some(mut room) = self.staging.take() {
            guest.read_page(page, &mut room)?;
            Some(room)
        } else {
            let kept = self.kept.take().expect("seen just now");
            self.staging.give_back(kept);
            return Ok(());
        };
        let pages = PageCount(self.spaces[&page.space].len() as u64);
        kept.put_aside(Before { page, hash, content }, pages);
        Ok(())
    }

    fn hash(&self, page: PageId) -> Option<PageHash> {
        self.spaces
            .get(&page.space)?
            .get(usize::try_from(page.pfn.0).ok()?)
            .copied()
    }

    fn write(
        &mut self,
        id: PageId,
        old: PageHash,
        hash: PageHash,
        page: &PageBytes,
        batch: BatchId,
        guest: &dyn Guest,
    ) -> Result<(), Fault> {
        if PageHash::of(page) != hash {
            return Err(Fault::PeerMisbehaved(format!(
                "{id} of batch {batch} does not match its hash"
            )));
        }
        self.put_aside(id, old, guest)?;
        guest.apply_page(id, page)?;
        self.digest.change(id, old, hash);
        let index = usize::try_from(id.pfn.0).expect("found by its caller");
        self.spaces.get_mut(&id.space).expect("found by its caller")[index] = hash;
        Ok(())
    }
}
