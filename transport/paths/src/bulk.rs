//! Blocks of ours that the peer does not hold yet: their bytes, where they were laid, and what is still to be laid.
//!
//! The store decides nothing about paths (see [`link`](crate::link)); it keeps the books. A block is *started* when any of
//! it was first laid; from then on it counts against what the peer has room for. It is *waiting* while nothing of it is
//! on a path that is trusted.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use umbra_units::{Now, PathId};

use crate::control::Laid;
use crate::error::{PeerMisbehaved, Refused};
use crate::estimator::Mark;
use crate::event::{BlockId, Class, StreamId};
use crate::limits;
use crate::stripe::Layout;

/// Of what the peer has room for, bulk leaves this to urgent blocks, so that they never wait behind it.
const URGENT_RESERVE: u64 = 16 << 20;

/// A stream that carries all or some of a block.
#[derive(Debug, Clone)]
pub(crate) struct Lay {
    pub(crate) laid: Laid,
    pub(crate) bytes: u64,
    pub(crate) mark: Mark,
    pub(crate) expected: Now,
    /// The driver has handed it to the connection.
    pub(crate) handed: bool,
    /// First data shard it brings, if it is a patch: seeing that one means that all of it arrived.
    pub(crate) patch: Option<u32>,
}

/// What only an urgent block has.
#[derive(Debug, Default)]
pub(crate) struct Urgent {
    /// `None` while the block only ever travelled whole.
    pub(crate) layout: Option<Layout>,
    /// Datagrams queued or sent whose fate is unknown.
    pub(crate) unsettled: usize,
    /// Nothing is repaired again before this.
    pub(crate) repair_after: Now,
    /// Parity of each stripe, once it was needed.
    pub(crate) parity: Vec<Option<Vec<Bytes>>>,
}

/// A block of ours.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    pub(crate) class: Class,
    pub(crate) started: bool,
    pub(crate) reinjected: bool,
    pub(crate) lays: Vec<Lay>,
    pub(crate) urgent: Urgent,
}

/// All blocks of ours that the peer does not hold yet.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    next: u64,
    held: BTreeMap<BlockId, Held>,
    /// Not laid on any trusted path, by class; oldest first.
    pub(crate) waiting_bulk: BTreeSet<BlockId>,
    pub(crate) waiting_urgent: BTreeSet<BlockId>,
    /// Urgent blocks of which something was laid.
    pub(crate) urgent_under_way: BTreeSet<BlockId>,
    streams: BTreeMap<StreamId, BlockId>,
    held_bytes: usize,
    waiting_bytes: usize,
    /// Bytes of blocks started, ever; against what the peer's user has taken, this is flow control.
    started: u64,
    taken: u64,
}

impl Blocks {
    pub(crate) fn push(&mut self, class: Class, bytes: Bytes, held_max: usize) -> Result<BlockId, Refused> {
        let (what, len) = ("block", bytes.len());
        if bytes.is_empty() {
            return Err(Refused::Empty);
        }
        if len > limits::BLOCK_BYTES {
            return Err(Refused::TooLong {
                what,
                len,
                limit: limits::BLOCK_BYTES,
            });
        }
        if self.held_bytes + len > held_max {
            return Err(Refused::Full {
                what,
                len,
                held: self.held_bytes,
                limit: held_max,
            });
        }
        let id = BlockId(self.next);
        self.next += 1;
        self.held_bytes += len;
        let held = Held {
            bytes,
            class,
            started: false,
            reinjected: false,
            lays: Vec::new(),
            urgent: Urgent::default(),
        };
        self.held.insert(id, held);
        self.wait(id);
        Ok(id)
    }

    pub(crate) const fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Bytes of waiting bulk blocks.
    pub(crate) const fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    pub(crate) fn get(&self, id: BlockId) -> Option<&Held> {
        self.held.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: BlockId) -> Option<&mut Held> {
        self.held.get_mut(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (BlockId, &Held)> {
        self.held.iter().map(|(id, held)| (*id, held))
    }

    /// The block has to be laid (again).
    pub(crate) fn wait(&mut self, id: BlockId) {
        let held = &self.held[&id];
        match held.class {
            Class::Bulk => {
                if self.waiting_bulk.insert(id) {
                    self.waiting_bytes += held.bytes.len();
                }
            }
            // One that was started is repaired by what the peer says is missing of it.
            Class::Urgent if held.started => {}
            Class::Urgent => {
                self.waiting_urgent.insert(id);
            }
        }
    }

    /// The block need not be laid any more.
    pub(crate) fn unwait(&mut self, id: BlockId) {
        if self.waiting_bulk.remove(&id) {
            self.waiting_bytes -= self.held[&id].bytes.len();
        }
        self.waiting_urgent.remove(&id);
    }

    /// Bytes of this class that the peer has room for.
    pub(crate) const fn credit(&self, class: Class) -> u64 {
        let window = match class {
            Class::Bulk => limits::BLOCK_WINDOW_BYTES - URGENT_RESERVE,
            Class::Urgent => limits::BLOCK_WINDOW_BYTES,
        };
        window.saturating_sub(self.started - self.taken)
    }

    /// Whether the peer has room for this block; a started one has its room already.
    pub(crate) fn may_start(&self, id: BlockId) -> bool {
        let held = &self.held[&id];
        let first = self.held.keys().next().map_or(id.0, |first| first.0);
        held.started || (held.bytes.len() as u64 <= self.credit(held.class) && id.0 < first + limits::BLOCK_WINDOW)
    }

    pub(crate) fn start(&mut self, id: BlockId) {
        let Some(held) = self.held.get_mut(&id).filter(|held| !held.started) else {
            return;
        };
        held.started = true;
        self.started += held.bytes.len() as u64;
        if held.class == Class::Urgent {
            self.urgent_under_way.insert(id);
        }
    }

    pub(crate) fn lay(&mut self, id: BlockId, lay: Lay) {
        self.streams.insert(lay.laid.stream, id);
        self.held
            .get_mut(&id)
            .expect("a block is laid only while it is held")
            .lays
            .push(lay);
    }

    /// Take lays of a block off the books.
    pub(crate) fn lift(&mut self, id: BlockId, gone: impl Fn(&Lay) -> bool) -> Vec<Lay> {
        let Some(held) = self.held.get_mut(&id) else {
            return Vec::new();
        };
        let (gone, kept): (Vec<Lay>, Vec<Lay>) = held.lays.drain(..).partition(gone);
        held.lays = kept;
        gone.iter().for_each(|lay| {
            self.streams.remove(&lay.laid.stream);
        });
        gone
    }

    /// The driver has handed `stream` to the connection: how many bytes that were, the first time.
    pub(crate) fn handed(&mut self, path: PathId, stream: StreamId) -> Option<u64> {
        let held = self.held.get_mut(self.streams.get(&stream)?)?;
        let lay = held
            .lays
            .iter_mut()
            .find(|lay| lay.laid == Laid { path, stream } && !lay.handed)?;
        lay.handed = true;
        Some(lay.bytes)
    }

    /// Blocks of which something lies on `path`.
    pub(crate) fn on_path(&self, path: PathId) -> Vec<BlockId> {
        let on = |held: &Held| held.lays.iter().any(|lay| lay.laid.path == path);
        self.held
            .iter()
            .filter(|(_, held)| on(held))
            .map(|(id, _)| *id)
            .collect()
    }

    /// The peer has every block below `next` and those in `ranges`, and its user took `taken` bytes. Returns those that
    /// it did not have before.
    pub(crate) fn acknowledge(
        &mut self,
        next: u64,
        ranges: &[(u64, u64)],
        taken: u64,
    ) -> Result<Vec<(BlockId, Held)>, PeerMisbehaved> {
        let end = ranges.last().map_or(next, |(_, end)| *end);
        let unsent = |what, number, sent| PeerMisbehaved::AcknowledgedUnsent { what, number, sent };
        if end > self.next {
            return Err(unsent("block", end - 1, self.next));
        }
        if taken > self.started {
            return Err(unsent("block bytes", taken, self.started));
        }
        let below = [(0, next)];
        let listed = below
            .iter()
            .chain(ranges)
            .flat_map(|(start, end)| self.held.range(BlockId(*start)..BlockId(*end)));
        if let Some((id, _)) = listed.clone().find(|(_, held)| !held.started) {
            return Err(unsent("block", id.0, self.next));
        }
        let listed: Vec<BlockId> = listed.map(|(id, _)| *id).collect();
        self.taken = self.taken.max(taken);
        Ok(listed.into_iter().map(|id| (id, self.remove(id))).collect())
    }

    fn remove(&mut self, id: BlockId) -> Held {
        self.unwait(id);
        self.urgent_under_way.remove(&id);
        let held = self.held.remove(&id).expect("the caller found it in `held`");
        self.held_bytes -= held.bytes.len();
        held.lays.iter().for_each(|lay| {
            self.streams.remove(&lay.laid.stream);
        });
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELD: usize = 256 << 20;

    fn bytes(n: usize) -> Bytes {
        vec![0; n].into()
    }

    #[test]
    fn blocks_are_refused_beyond_what_may_be_held() {
        let mut blocks = Blocks::default();
        assert_eq!(blocks.push(Class::Bulk, bytes(0), HELD), Err(Refused::Empty));
        let long = blocks.push(Class::Bulk, bytes(limits::BLOCK_BYTES + 1), HELD);
        assert!(matches!(long, Err(Refused::TooLong { .. })));
        blocks.push(Class::Bulk, bytes(1_000), 1_500).unwrap();
        assert!(matches!(
            blocks.push(Class::Bulk, bytes(1_000), 1_500),
            Err(Refused::Full { held: 1_000, .. })
        ));
        assert_eq!((blocks.held_bytes(), blocks.waiting_bytes()), (1_000, 1_000));
    }

    #[test]
    fn acknowledged_blocks_are_forgotten_entirely() {
        let mut blocks = Blocks::default();
        let ids: Vec<BlockId> = (0..6)
            .map(|_| blocks.push(Class::Bulk, bytes(10), HELD).unwrap())
            .collect();
        ids.iter().for_each(|id| {
            blocks.unwait(*id);
            blocks.start(*id);
        });
        // Started and waiting again, acknowledged meanwhile.
        blocks.wait(ids[1]);
        let done = blocks.acknowledge(2, &[(4, 5)], 30).unwrap();
        assert_eq!(done.iter().map(|(id, _)| id.0).collect::<Vec<_>>(), [0, 1, 4]);
        assert_eq!((blocks.held_bytes(), blocks.waiting_bytes()), (30, 0));
        assert!(blocks.acknowledge(2, &[(4, 5)], 30).unwrap().is_empty());
    }

    #[test]
    fn acknowledging_what_was_never_sent_is_misbehaviour() {
        let mut blocks = Blocks::default();
        let id = blocks.push(Class::Bulk, bytes(10), HELD).unwrap();
        assert!(blocks.acknowledge(2, &[], 0).is_err());
        assert!(
            blocks.acknowledge(1, &[], 0).is_err(),
            "accepted from the user, but not sent yet"
        );
        blocks.start(id);
        assert!(blocks.acknowledge(0, &[], 11).is_err());
        assert!(blocks.acknowledge(0, &[(1, 2)], 0).is_err());
        assert_eq!(blocks.acknowledge(1, &[], 10).unwrap().len(), 1);
    }

    #[test]
    fn urgent_blocks_find_room_when_bulk_has_taken_its_share() {
        let mut blocks = Blocks::default();
        loop {
            let id = blocks.push(Class::Bulk, bytes(4 << 20), HELD).unwrap();
            if !blocks.may_start(id) {
                break;
            }
            blocks.start(id);
        }
        let urgent = blocks.push(Class::Urgent, bytes(8 << 20), HELD).unwrap();
        assert!(blocks.may_start(urgent));
    }
}
