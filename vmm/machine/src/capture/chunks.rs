//! What captured pages are copied to: memory in pieces of 2 MiB, kept for the next capture.
//!
//! The first touch of a page costs many times its copy (the kernel has to find and clear it), and a capture is copied
//! inside a pause. So pieces are as large as the processor's large pages, of which one touch brings 512, and those of a
//! capture that is over are kept for the next: a quarter of the guest's memory at most, and at most
//! [`limits::CAPTURE_KEPT`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_core::guest::PageBytes;
use umbra_units::{Bytes, PAGE_SIZE};

use crate::error::Error;
use crate::limits;
use crate::memory::Anonymous;

/// Pages of a chunk.
pub(super) const CHUNK: usize = 512;

/// Memory for [`CHUNK`] pages.
#[derive(Debug)]
pub(super) struct Chunk(Anonymous);

impl Chunk {
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self(Anonymous::new(CHUNK * PAGE_SIZE)?))
    }

    /// All of it.
    pub(super) fn pages(&self) -> &[PageBytes] {
        self.0.bytes().as_chunks().0
    }

    pub(super) fn pages_mut(&mut self) -> &mut [PageBytes] {
        self.0.bytes_mut().as_chunks_mut().0
    }
}

/// Chunks that nobody uses, for whoever needs some.
pub(super) struct Pool {
    free: Mutex<Vec<Chunk>>,
    most: usize,
}

impl Pool {
    /// For a guest with this much memory.
    pub(super) fn new(memory: Bytes) -> Arc<Self> {
        let most = (memory.0 / 4).min(limits::CAPTURE_KEPT.0) / (CHUNK * PAGE_SIZE) as u64;
        Arc::new(Self {
            free: Mutex::default(),
            most: usize::try_from(most).unwrap_or(0),
        })
    }

    /// Have memory for a small capture at hand, so that even the first is short.
    pub(super) fn warm(&self) -> Result<(), Error> {
        while self.free().len() < self.most.min(limits::CAPTURE_WARM) {
            let mut chunk = Chunk::new()?;
            chunk.pages_mut().fill([0; PAGE_SIZE]);
            self.give([chunk]);
        }
        Ok(())
    }

    /// How many pages there is memory for already.
    pub(super) fn pages(&self) -> usize {
        self.free().len() * CHUNK
    }

    pub(super) fn take(&self) -> Result<Chunk, Error> {
        let kept = self.free().pop();
        kept.map_or_else(Chunk::new, Ok)
    }

    pub(super) fn give(&self, chunks: impl IntoIterator<Item = Chunk>) {
        for chunk in chunks {
            let mut free = self.free();
            if free.len() < self.most {
                free.push(chunk);
            }
        }
    }

    fn free(&self) -> MutexGuard<'_, Vec<Chunk>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} of {})", self.free().len(), self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_taken_again_and_no_more_than_a_quarter_is_kept() {
        let pool = Pool::new(Bytes::mib(32));
        let chunks: Vec<_> = (0..6).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pool.pages(), 0);
        pool.give(chunks);
        assert_eq!(pool.pages(), 4 * CHUNK);
        let mut chunk = pool.take().unwrap();
        assert_eq!((pool.pages(), chunk.pages().len()), (3 * CHUNK, CHUNK));
        chunk.pages_mut()[CHUNK - 1] = [7; PAGE_SIZE];
        assert_eq!(chunk.pages()[CHUNK - 1], [7; PAGE_SIZE]);
    }
}
