//! Messages: numbered at one end, in order exactly once at the other.
//!
//! The sender ([`Outbox`]) keeps each message until the peer's link has it, remembers on which path it was laid, and
//! says which ones are due on another. The receiver ([`MessageInbox`]) hands them out in order and holds what came early.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use umbra_units::{Now, PathId};

use crate::error::{PeerMisbehaved, Refused};
use crate::event::StreamId;
use crate::limits;

/// What a message costs beyond its bytes, so that a million empty ones are not free.
const OVERHEAD: usize = 64;

const fn cost(bytes: &Bytes) -> usize {
    bytes.len() + OVERHEAD
}

/// One place where something was laid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Laid {
    pub(crate) path: PathId,
    pub(crate) stream: StreamId,
}

/// A message under way.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub(crate) bytes: Bytes,
    /// Where it is; more than one when the first seemed lost.
    pub(crate) laid: Vec<Laid>,
    /// When to try elsewhere.
    pub(crate) due: Now,
    pub(crate) tries: u32,
}

/// All messages of ours that the peer does not have yet.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    next: u64,
    waiting: VecDeque<Bytes>,
    under_way: BTreeMap<u64, Outgoing>,
    /// Cost of everything in `waiting` and `under_way`.
    held: usize,
    /// Cost laid, ever; against what the peer's user has taken, this is flow control.
    laid: u64,
    acked: u64,
    taken: u64,
}

impl Outbox {
    pub(crate) fn push(&mut self, bytes: Bytes) -> Result<(), Refused> {
        let (what, len) = ("message", bytes.len());
        if len > limits::MESSAGE_BYTES {
            return Err(Refused::TooLong {
                what,
                len,
                limit: limits::MESSAGE_BYTES,
            });
        }
        if self.held + cost(&bytes) > limits::MESSAGES_HELD_BYTES {
            return Err(Refused::Full {
                what,
                len,
                held: self.held,
                limit: limits::MESSAGES_HELD_BYTES,
            });
        }
        self.held += cost(&bytes);
        self.waiting.push_back(bytes);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }

    /// Number the next message if the window allows, for the caller to lay at once.
    pub(crate) fn start(&mut self) -> Option<u64> {
        let more = cost(self.waiting.front()?) as u64;
        if self.laid + more - self.taken > limits::MESSAGE_WINDOW_BYTES
            || self.next >= self.acked + limits::MESSAGE_WINDOW
        {
            return None;
        }
        let bytes = self.waiting.pop_front()?;
        let number = self.next;
        self.next += 1;
        self.laid += more;
        self.under_way.insert(
            number,
            Outgoing {
                bytes,
                laid: Vec::new(),
                due: Now::ZERO,
                tries: 0,
            },
        );
        Some(number)
    }

    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut Outgoing> {
        self.under_way.get_mut(&number)
    }

    /// When the oldest message wants to try another path. The others' turn comes with it: nothing is delivered before
    /// the oldest anyway.
    pub(crate) fn due(&self) -> Now {
        self.under_way.values().next().map_or(Now::NEVER, |message| message.due)
    }

    /// Numbers of messages for which `wanted` holds.
    pub(crate) fn select(&self, wanted: impl Fn(&Outgoing) -> bool) -> Vec<u64> {
        self.under_way
            .iter()
            .filter(|(_, message)| wanted(message))
            .map(|(number, _)| *number)
            .collect()
    }

    /// Forget that anything lies on `path`: its connection is gone.
    pub(crate) fn forget(&mut self, path: PathId) {
        self.under_way
            .values_mut()
            .for_each(|message| message.laid.retain(|laid| laid.path != path));
    }

    /// The peer has every message below `next` and those beyond that `seen` marks, and its user took `taken`. Returns what
    /// it has now and had not before.
    pub(crate) fn acknowledge(&mut self, next: u64, seen: u64, taken: u64) -> Result<Vec<Outgoing>, PeerMisbehaved> {
        let misbehaved = |what, number, sent| Err(PeerMisbehaved::AcknowledgedUnsent { what, number, sent });
        let highest = if seen == 0 {
            next
        } else {
            next.saturating_add(65 - u64::from(seen.leading_zeros()))
        };
        if highest > self.next {
            return misbehaved("message", highest - 1, self.next);
        }
        if taken > self.laid {
            return misbehaved("message bytes", taken, self.laid);
        }
        self.acked = self.acked.max(next);
        self.taken = self.taken.max(taken);
        let mut done = Vec::new();
        while self
            .under_way
            .first_key_value()
            .is_some_and(|(number, _)| *number < next)
        {
            done.extend(self.under_way.pop_first().map(|(_, message)| message));
        }
        for bit in (0..64).filter(|bit| seen >> bit & 1 == 1) {
            done.extend(self.under_way.remove(&(next + 1 + bit)));
        }
        self.held -= done.iter().map(|message| cost(&message.bytes)).sum::<usize>();
        Ok(done)
    }
}

/// All messages of the peer.
#[derive(Debug, Default)]
pub(crate) struct MessageInbox {
    next: u64,
    early: BTreeMap<u64, Bytes>,
    /// Cost of what is early, and of what is in order but not taken.
    held: usize,
    taken: u64,
}

impl MessageInbox {
    pub(crate) const fn next(&self) -> u64 {
        self.next
    }

    pub(crate) const fn taken(&self) -> u64 {
        self.taken
    }

    pub(crate) const fn held(&self) -> usize {
        self.held
    }

    /// Which of the 64 messages after the first missing one are here.
    pub(crate) fn seen(&self) -> u64 {
        let first = self.next + 1;
        self.early
            .range(first..first.saturating_add(64))
            .fold(0, |seen, (number, _)| seen | 1 << (number - first))
    }

    /// A message arrived: all that are in order now, or `None` if it was known.
    pub(crate) fn insert(&mut self, number: u64, bytes: Bytes) -> Result<Option<Vec<Bytes>>, PeerMisbehaved> {
        if number < self.next || self.early.contains_key(&number) {
            return Ok(None);
        }
        let end = self.next.saturating_add(limits::MESSAGE_WINDOW);
        if number >= end {
            return Err(PeerMisbehaved::BeyondWindow {
                what: "message",
                number,
                end,
            });
        }
        let limit = usize::try_from(limits::MESSAGE_WINDOW_BYTES).unwrap_or(usize::MAX);
        if self.held + cost(&bytes) > limit {
            return Err(PeerMisbehaved::Flood {
                what: "messages",
                limit,
            });
        }
        self.held += cost(&bytes);
        self.early.insert(number, bytes);
        let mut ready = Vec::new();
        while let Some(bytes) = self.early.remove(&self.next) {
            ready.push(bytes);
            self.next += 1;
        }
        Ok(Some(ready))
    }

    /// The user took a message.
    pub(crate) const fn take(&mut self, bytes: &Bytes) {
        self.held -= cost(bytes);
        self.taken = self.taken.saturating_add(cost(bytes) as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(n: u8) -> Bytes {
        vec![n; 10].into()
    }

    #[test]
    fn messages_come_out_in_order_however_they_come_in() {
        let mut inbox = MessageInbox::default();
        assert_eq!(inbox.insert(2, message(2)).unwrap(), Some(vec![]));
        assert_eq!(inbox.insert(1, message(1)).unwrap(), Some(vec![]));
        assert_eq!(inbox.seen(), 0b11);
        assert_eq!(inbox.insert(2, message(2)).unwrap(), None);
        assert_eq!(
            inbox.insert(0, message(0)).unwrap(),
            Some(vec![message(0), message(1), message(2)])
        );
        assert_eq!(inbox.insert(0, message(0)).unwrap(), None);
        assert_eq!((inbox.next(), inbox.seen()), (3, 0));
        (0..3).for_each(|n| inbox.take(&message(n)));
        assert_eq!((inbox.held(), inbox.taken()), (0, 3 * (10 + OVERHEAD as u64)));
    }

    #[test]
    fn a_peer_that_runs_ahead_or_floods_is_named() {
        let mut inbox = MessageInbox::default();
        let beyond = inbox.insert(limits::MESSAGE_WINDOW, message(0));
        assert!(matches!(
            beyond,
            Err(PeerMisbehaved::BeyondWindow { what: "message", .. })
        ));
        let big = Bytes::from(vec![0; limits::MESSAGE_BYTES]);
        let flood = (1..10).map(|n| inbox.insert(n, big.clone())).find_map(Result::err);
        assert!(matches!(flood, Some(PeerMisbehaved::Flood { what: "messages", .. })));
    }

    #[test]
    fn what_is_acknowledged_is_forgotten_and_what_is_not_is_kept() {
        let mut outbox = Outbox::default();
        (0..5).for_each(|n| outbox.push(message(n)).unwrap());
        (0..5).for_each(|n| assert_eq!(outbox.start(), Some(n)));
        assert_eq!(outbox.start(), None);
        // 0 and 1 in order, 3 early.
        let done = outbox.acknowledge(2, 0b1, 0).unwrap();
        assert_eq!(done.iter().map(|m| m.bytes[0]).collect::<Vec<_>>(), [0, 1, 3]);
        assert_eq!(outbox.select(|_| true), [2, 4]);
        assert_eq!(outbox.acknowledge(2, 0b1, 0).unwrap().len(), 0);
        assert_eq!(outbox.acknowledge(5, 0, 0).unwrap().len(), 2);
        assert!(outbox.is_empty());
        assert_eq!(outbox.held, 0);
    }

    #[test]
    fn acknowledging_what_was_never_sent_is_misbehaviour() {
        let mut outbox = Outbox::default();
        outbox.push(message(0)).unwrap();
        outbox.start().unwrap();
        assert!(outbox.acknowledge(2, 0, 0).is_err());
        assert!(outbox.acknowledge(0, 0b1, 0).is_err());
        assert!(outbox.acknowledge(u64::MAX, u64::MAX, 0).is_err());
        assert!(outbox.acknowledge(1, 0, 1_000).is_err());
        assert!(outbox.acknowledge(1, 0, 10).is_ok());
    }

    #[test]
    fn the_sender_stays_within_what_the_receiver_tolerates() {
        let (mut outbox, mut inbox) = (Outbox::default(), MessageInbox::default());
        let mut sent = 0;
        for round in 0..200u64 {
            let len = if round % 3 == 0 { limits::MESSAGE_BYTES } else { 10 };
            let _ = outbox.push(vec![0; len].into());
            // The receiver's user takes nothing, and the first message never arrives.
            while let Some(number) = outbox.start() {
                let bytes = outbox.get_mut(number).unwrap().bytes.clone();
                if number > 0 {
                    inbox.insert(number, bytes).unwrap();
                }
                sent += 1;
            }
            outbox.acknowledge(inbox.next(), inbox.seen(), inbox.taken()).unwrap();
        }
        assert!(sent > 5);
        assert!(inbox.held() <= usize::try_from(limits::MESSAGE_WINDOW_BYTES).unwrap());
    }

    #[test]
    fn too_much_is_refused_and_changes_nothing() {
        let mut outbox = Outbox::default();
        let long = outbox.push(vec![0; limits::MESSAGE_BYTES + 1].into());
        assert!(matches!(long, Err(Refused::TooLong { .. })));
        let big = Bytes::from(vec![0; limits::MESSAGE_BYTES]);
        let full = (0..64).map(|_| outbox.push(big.clone())).find_map(Result::err);
        assert!(matches!(full, Some(Refused::Full { .. })));
        assert!(outbox.held <= limits::MESSAGES_HELD_BYTES);
    }
}
