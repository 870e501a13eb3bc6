//! Puts batches back into the order of their numbers.
//!
//! Batches travel over several paths and overtake each other; they are applied in the order they were made, so that the
//! encoder may lean on everything it shipped before (`docs/decisions`, "batches are applied in order"). One that came
//! early waits here, still encoded. How much may wait is bounded by what the source was granted: it never has more on
//! its way, so more is not bad luck but a peer that does not keep to its word.

use std::collections::BTreeMap;

use umbra_units::{BatchId, Bytes};

use crate::batch::Batch;
use crate::error::Fault;
use crate::limits;

/// Batches that came early. `T` is whatever holds a batch's bytes.
#[derive(Debug)]
pub struct Sequence<T> {
    /// The batch that is given out next.
    next: BatchId,
    waiting: BTreeMap<BatchId, T>,
    /// Of all that wait; never above `window` and one batch.
    bytes: Bytes,
    window: Bytes,
}

impl<T: AsRef<[u8]>> Sequence<T> {
    /// Of a new session, in which the source was granted `window`.
    pub const fn new(window: Bytes) -> Self {
        Self {
            next: BatchId(1),
            waiting: BTreeMap::new(),
            bytes: Bytes::ZERO,
            window,
        }
    }

    /// A batch arrived.
    pub fn arrived(&mut self, batch: T) -> Result<(), Fault> {
        let misbehaved = |text: String| Err(Fault::PeerMisbehaved(text));
        let (id, size) = (Batch::number(batch.as_ref())?, Bytes::of_len(batch.as_ref().len()));
        if id < self.next || self.waiting.contains_key(&id) {
            return misbehaved(format!("it sent batch {id} twice"));
        }
        // One batch may always be on its way, however little was granted: see `Window` at the source.
        let most = self.window + Bytes::of_len(limits::BATCH_BYTES);
        if self.bytes + size > most || self.waiting.len() >= limits::BATCHES_IN_FLIGHT {
            return misbehaved(format!("it sent more than the {} it was granted", self.window));
        }
        self.bytes += size;
        self.waiting.insert(id, batch);
        Ok(())
    }

    /// The next batch in order, if it is there.
    pub fn take(&mut self) -> Option<T> {
        let batch = self.waiting.remove(&self.next)?;
        self.next = self.next.next();
        self.bytes = self.bytes.saturating_sub(Bytes::of_len(batch.as_ref().len()));
        Some(batch)
    }

    /// What waits.
    pub const fn bytes(&self) -> Bytes {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::BatchWriter;
    use umbra_units::{Epoch, Rng};

    fn batch(number: u64) -> Vec<u8> {
        BatchWriter::new(BatchId(number), Epoch(1), 0).finish(false)
    }

    #[test]
    fn batches_come_out_in_the_order_they_were_made_however_they_arrive() {
        for seed in 0..50 {
            let mut rng = Rng::new(seed);
            let mut sequence = Sequence::new(Bytes::kib(64));
            let mut flying: Vec<u64> = (1..=40).collect();
            let mut came = Vec::new();
            while !flying.is_empty() {
                let at = usize::try_from(rng.below(flying.len() as u64)).unwrap();
                sequence.arrived(batch(flying.swap_remove(at))).unwrap();
                while let Some(bytes) = sequence.take() {
                    came.push(Batch::number(&bytes).unwrap().0);
                }
            }
            assert_eq!(came, (1..=40).collect::<Vec<_>>());
            assert_eq!(sequence.bytes(), Bytes::ZERO);
        }
    }

    #[test]
    fn more_than_was_granted_and_the_same_again_is_misbehaviour() {
        let mut sequence = Sequence::new(Bytes::kib(1));
        sequence.arrived(batch(3)).unwrap();
        assert!(sequence.arrived(batch(3)).is_err(), "twice");
        sequence.arrived(batch(1)).unwrap();
        assert!(sequence.take().is_some());
        assert!(sequence.arrived(batch(1)).is_err(), "after it was given out");

        let large = [batch(4), vec![0; limits::BATCH_BYTES]].concat();
        sequence.arrived(large).unwrap();
        let error = sequence.arrived([batch(5), vec![0; 2_000]].concat()).unwrap_err();
        assert!(error.to_string().contains("it was granted"), "{error}");

        let mut sequence = Sequence::new(Bytes::mib(64));
        let early = 2..2 + limits::BATCHES_IN_FLIGHT as u64;
        early
            .clone()
            .for_each(|number| sequence.arrived(batch(number)).unwrap());
        assert!(sequence.arrived(batch(early.end)).is_err(), "many, however small");
    }
}
