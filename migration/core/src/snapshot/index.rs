//! Where each batch of the memory part ends and the next begins.
//!
//! `umbraidx`, then a `u32` for each batch: how many bytes it has. A reader takes the batches one after the other from the
//! start of the memory part; whoever wants one of them alone adds up.

use umbra_units::{Reader, Writer};

use super::Unreadable;
use crate::batch::{LEAST_BYTES, MOST_BYTES};
use crate::limits;

const MARK: &[u8; 8] = b"umbraidx";

/// The lengths of a snapshot's batches, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Index {
    lengths: Vec<u32>,
    /// Always the sum of `lengths`.
    total: u64,
}

impl Index {
    /// Of no batches.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another batch of so many bytes follows. False if an index cannot hold more.
    #[must_use]
    pub fn push(&mut self, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).expect("limits::BATCH_BYTES is far below 4 GiB");
        if Self::bytes_for(self.batches() + 1) > limits::SNAPSHOT_INDEX_BYTES {
            return false;
        }
        self.lengths.push(bytes);
        self.total += u64::from(bytes);
        true
    }

    /// How many batches.
    pub const fn batches(&self) -> u64 {
        self.lengths.len() as u64
    }

    /// How many bytes all of them have.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// The length of each, in order.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.lengths.iter().map(|length| *length as usize)
    }

    /// How many bytes an index of so many batches has.
    pub(crate) const fn bytes_for(batches: u64) -> u64 {
        batches.saturating_mul(4).saturating_add(MARK.len() as u64)
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(MARK.len() + 4 * self.lengths.len());
        out.put(MARK);
        self.lengths.iter().for_each(|length| {
            out.u32(*length);
        });
        out.into_bytes()
    }

    /// Read the index of `batches` batches that have `memory` bytes together.
    pub fn decode(bytes: &[u8], batches: u64, memory: u64) -> Result<Self, Unreadable> {
        let len = bytes.len() as u64;
        if len > limits::SNAPSHOT_INDEX_BYTES || len != Self::bytes_for(batches) {
            let expected = format!("{} bytes for {batches} batches", Self::bytes_for(batches));
            return Err(Unreadable::expected("index", expected, len));
        }
        let mut reader = Reader::new(bytes);
        if reader.array::<8>("index mark")? != *MARK {
            return Err(reader.malformed("index mark").into());
        }
        let mut index = Self::default();
        for _ in 0..batches {
            let length = reader.u32("batch length")?;
            if !(LEAST_BYTES..=MOST_BYTES).contains(&(length as usize)) {
                return Err(reader.malformed("batch length").into());
            }
            index.lengths.push(length);
            index.total += u64::from(length);
        }
        reader.finish("index")?;
        if index.total != memory {
            let expected = format!("batches of {memory} bytes together");
            return Err(Unreadable::expected("index", expected, index.total));
        }
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index(lengths: &[usize]) -> Index {
        let mut index = Index::new();
        lengths.iter().for_each(|length| assert!(index.push(*length)));
        index
    }

    #[test]
    fn an_index_is_read_as_it_was_written() {
        let index = index(&[40, 1_000_000, 36]);
        assert_eq!(Index::decode(&index.encode(), 3, 1_000_076), Ok(index));
    }

    #[test]
    fn an_index_that_does_not_fit_its_manifest_is_refused() {
        let bytes = index(&[40, 50]).encode();
        for (batches, memory) in [(1, 90), (3, 90), (2, 91), (u64::MAX, 90)] {
            assert!(Index::decode(&bytes, batches, memory).is_err(), "{batches} {memory}");
        }
        for (lengths, total) in [([1, 89], 90), ([90, usize::try_from(u32::MAX).unwrap()], 4_294_967_385)] {
            assert!(
                Index::decode(&index(&lengths).encode(), 2, total).is_err(),
                "{lengths:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_reading_an_index_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), batches: u64, memory: u64) {
            let _ = Index::decode(&bytes, batches, memory);
            let _ = Index::decode(&[&MARK[..], &bytes].concat(), bytes.len() as u64 / 4, memory);
        }
    }
}
