//! A disk whose content proves itself, and says after a power cut how much of it survived.
//!
//! # The idea
//!
//! Writes are numbered from 1. Write `n` goes to position `(n - 1) % blocks` (positions are shuffled over the disk),
//! and what it writes is the [`Version`] of that block with sequence `n`. So each block tells which write it is from,
//! and the number of the write that must come next to the same block is `n + blocks`.
//!
//! If every write up to `n` is on the disk, every block holds the last write up to `n` that went there, or a later one.
//! Turned round: the disk is *consistent* up to one less than the smallest "next write" of all its blocks. A guest that
//! was told by a completed flush that write `n` is durable may therefore be cut off at any instant afterwards, and
//! whoever reads the disk finds it consistent up to `n` or more.

use crate::pattern::Shuffle;
use crate::proof::{Class, MAGIC, Page, Version};

/// Where write after write goes.
#[derive(Clone, Debug)]
pub struct Schedule {
    blocks: u64,
    shuffle: Shuffle,
}

impl Schedule {
    /// Over so many blocks of 4 KiB.
    pub fn new(blocks: u64) -> Self {
        Self {
            blocks,
            shuffle: Shuffle::new(blocks, 0xd15c),
        }
    }

    /// How many blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The position of a write; from 1.
    pub fn position(&self, write: u64) -> u64 {
        (write - 1) % self.blocks
    }

    /// The block at a position.
    pub fn block(&self, position: u64) -> u64 {
        self.shuffle.place(position)
    }

    /// What a block holds after a write to it. No class of content is ever all zeros: a block of zeros was never written.
    pub fn version(block: u64, write: u64) -> Version {
        let class = match block % 3 {
            0 => Class::Counter,
            1 => Class::Text,
            _ => Class::Random,
        };
        Version {
            page: block,
            sequence: write,
            class,
        }
    }

    /// The write that a block found at this position is from: 0 if it was never written, none if it is torn or not ours.
    pub fn recognise(&self, position: u64, found: &Page) -> Option<u64> {
        if found.iter().all(|&word| word == 0) {
            return Some(0);
        }
        let write = found[2];
        if found[0] != MAGIC || write == 0 || self.position(write) != position {
            return None;
        }
        // SAFETY: a reference is valid for reads, and nobody writes behind it.
        unsafe { Self::version(self.block(position), write).matches(found) }.then_some(write)
    }
}

/// What reading a whole disk has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Every write up to this one is there.
    pub consistent: u64,
    /// The newest write of all.
    pub newest: u64,
    /// Blocks that hold what no write wrote.
    pub torn: u64,
}

impl Verdict {
    /// Of a disk of which nothing has been read.
    pub const fn unread() -> Self {
        Self {
            consistent: u64::MAX,
            newest: 0,
            torn: 0,
        }
    }

    /// Takes account of the block at one position.
    pub fn add(&mut self, schedule: &Schedule, position: u64, write: Option<u64>) {
        let next = match write {
            None | Some(0) => position + 1,
            Some(write) => write + schedule.blocks(),
        };
        self.consistent = self.consistent.min(next - 1);
        self.newest = self.newest.max(write.unwrap_or(0));
        self.torn += u64::from(write.is_none());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proof::PAGE_WORDS;

    const BLOCKS: u64 = 7;

    /// A disk on which these writes arrived.
    fn disk(writes: impl IntoIterator<Item = u64>) -> Vec<Page> {
        let schedule = Schedule::new(BLOCKS);
        let mut disk = vec![[0; PAGE_WORDS]; BLOCKS as usize];
        for write in writes {
            let block = schedule.block(schedule.position(write));
            // SAFETY: the page is ours.
            unsafe { Schedule::version(block, write).write(&raw mut disk[block as usize]) };
        }
        disk
    }

    fn judge(disk: &[Page]) -> Verdict {
        let schedule = Schedule::new(BLOCKS);
        let mut verdict = Verdict::unread();
        for position in 0..BLOCKS {
            let found = schedule.recognise(position, &disk[schedule.block(position) as usize]);
            verdict.add(&schedule, position, found);
        }
        verdict
    }

    #[test]
    fn a_disk_with_every_write_is_consistent_up_to_the_last() {
        for last in 0..30 {
            let verdict = judge(&disk(1..=last));
            assert_eq!((verdict.consistent, verdict.newest, verdict.torn), (last, last, 0));
        }
    }

    #[test]
    fn a_write_that_is_missing_is_where_consistency_ends() {
        for lost in 8..=20 {
            let verdict = judge(&disk((1..=20).filter(|&write| write != lost)));
            // A later write to the same block hides the loss: the disk is as if it had never happened.
            let hidden = lost + BLOCKS <= 20;
            assert_eq!(verdict.consistent, if hidden { 20 } else { lost - 1 }, "without {lost}");
        }
    }

    #[test]
    fn a_block_that_is_torn_or_elsewhere_is_nobodys() {
        let mut torn = disk(1..=20);
        torn[3][300] ^= 1;
        assert_eq!(judge(&torn).torn, 1);
        let mut swapped = disk(1..=20);
        swapped.swap(1, 2);
        assert_eq!(judge(&swapped).torn, 2);
        let mut foreign = disk(1..=20);
        foreign[0] = [1; PAGE_WORDS];
        assert_eq!(judge(&foreign).torn, 1);
    }
}
