//! The receiving side of blocks: what has arrived, what is in pieces, what is ready for the user.
//!
//! A block arrives whole (a stream), or in shards of which any `k` of each stripe suffice, or in patches of data shards,
//! or as a mixture: all roads lead into one [`Assembly`], which knows which data shards it has. Data shards are
//! copied once, to their place in the block; parity shards are kept only while their stripe lacks data.
//!
//! # What a hostile peer can make this hold
//!
//! Blocks ready or in pieces: [`limits::BLOCK_WINDOW_BYTES`] by their announced lengths (an honest peer keeps below it
//! by flow control, so more is [`PeerMisbehaved`]). Parity of a stripe is only kept up to what the stripe lacks, so
//! pieces take at most twice that. Which numbers were received is a set of ranges within [`limits::BLOCK_WINDOW`].

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::error::PeerMisbehaved;
use crate::event::BlockId;
use crate::frames::{BlockGaps, Gaps};
use crate::limits;
use crate::stripe::{self, Layout};

/// Numbers that were received: all below `next`, and ranges beyond.
#[derive(Debug, Clone, Default)]
pub(crate) struct Received {
    next: u64,
    /// Start to end of disjoint ranges beyond `next`, never touching it nor each other.
    beyond: BTreeMap<u64, u64>,
}

impl Received {
    /// First number that is missing.
    pub(crate) const fn next(&self) -> u64 {
        self.next
    }

    pub(crate) fn contains(&self, number: u64) -> bool {
        number < self.next
            || self
                .beyond
                .range(..=number)
                .next_back()
                .is_some_and(|(_, end)| number < *end)
    }

    /// Note a number. Says whether it is new.
    pub(crate) fn insert(&mut self, number: u64) -> bool {
        if self.contains(number) {
            return false;
        }
        let mut end = number + 1;
        if let Some(after) = self.beyond.remove(&end) {
            end = after;
        }
        if number == self.next {
            self.next = end;
        } else if let Some((_, before)) = self
            .beyond
            .range_mut(..number)
            .next_back()
            .filter(|(_, e)| **e == number)
        {
            *before = end;
        } else {
            self.beyond.insert(number, end);
        }
        true
    }

    /// How many ranges lie beyond.
    pub(crate) fn ranges(&self) -> usize {
        self.beyond.len()
    }

    /// At most `n` ranges beyond, lowest first, or from a place that `turn` moves along when they are more, so that
    /// acknowledgements which cannot say everything say everything in turn.
    pub(crate) fn some_ranges(&self, n: usize, turn: u64) -> Vec<(u64, u64)> {
        let skip = match self.beyond.len() {
            len if len <= n || n == 0 => 0,
            len => usize::try_from(turn).unwrap_or(0) % len.div_ceil(n) * n,
        };
        self.beyond
            .iter()
            .skip(skip)
            .take(n)
            .map(|(start, end)| (*start, *end))
            .collect()
    }
}

/// One urgent block in pieces.
#[derive(Debug)]
struct Assembly {
    layout: Layout,
    /// All data shards at full length, one after the other; what did not arrive is zero.
    data: Vec<u8>,
    stripes: Vec<Stripe>,
    incomplete: usize,
}

#[derive(Debug, Default)]
struct Stripe {
    have: [u64; 2],
    missing: usize,
    /// Rows and shards, kept only while data is missing.
    parity: Vec<(usize, Bytes)>,
}

impl Stripe {
    const fn has(&self, i: usize) -> bool {
        self.have[i / 64] >> (i % 64) & 1 == 1
    }
}

/// What a piece did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Known,
    New,
}

impl Assembly {
    fn new(layout: Layout) -> Self {
        let stripes = (0..layout.stripes()).map(|s| Stripe {
            missing: layout.data_of(s),
            ..Stripe::default()
        });
        let stripes: Vec<Stripe> = stripes.collect();
        Self {
            layout,
            // Untouched zeros cost address space only, so a block announced by one shard holds little memory.
            data: vec![0; layout.data_shards() * layout.shard_len()],
            incomplete: stripes.len(),
            stripes,
        }
    }

    /// Data shard `shard` of the block.
    fn data_shard(&mut self, shard: usize, bytes: &[u8]) -> Piece {
        let (s, i) = self.layout.place_of(shard);
        let stripe = &mut self.stripes[s];
        if stripe.has(i) {
            return Piece::Known;
        }
        let start = shard * self.layout.shard_len();
        self.data[start..start + bytes.len()].copy_from_slice(bytes);
        stripe.have[i / 64] |= 1 << (i % 64);
        stripe.missing -= 1;
        if stripe.missing == 0 {
            stripe.parity = Vec::new();
            self.incomplete -= 1;
        }
        Piece::New
    }

    /// Parity shard `row` of stripe `s`.
    fn parity_shard(&mut self, s: usize, row: usize, bytes: Bytes) -> Piece {
        let stripe = &mut self.stripes[s];
        // More parity than data is missing cannot help.
        if stripe.parity.len() >= stripe.missing || stripe.parity.iter().any(|(r, _)| *r == row) {
            return Piece::Known;
        }
        stripe.parity.push((row, bytes));
        Piece::New
    }

    /// Decode stripe `s` if it can be. Says whether parity completed it.
    fn settle(&mut self, s: usize) -> bool {
        let stripe = &mut self.stripes[s];
        if stripe.missing == 0 || stripe.parity.len() < stripe.missing {
            return false;
        }
        let k = self.layout.data_of(s);
        let missing: Vec<usize> = (0..k).filter(|i| !stripe.has(*i)).collect();
        let parity = stripe
            .parity
            .drain(..)
            .take(missing.len())
            .map(|(row, bytes)| (row, bytes.to_vec()))
            .collect();
        let len = self.layout.shard_len();
        let start = self.layout.first_of(s) * len;
        stripe::restore(&mut self.data[start..start + k * len], len, &missing, parity);
        stripe.have = [u64::MAX; 2];
        stripe.missing = 0;
        stripe.parity = Vec::new();
        self.incomplete -= 1;
        true
    }

    fn into_block(mut self) -> Bytes {
        self.data.truncate(self.layout.block_bytes());
        self.data.into()
    }

    /// The incomplete stripes with what they have, as far as `room` bytes go; and whether that was all.
    fn gaps(&self, id: BlockId, room: &mut usize) -> Option<(BlockGaps, bool)> {
        *room = room.checked_sub(BlockGaps::HEAD)?;
        let mut gaps = BlockGaps {
            id,
            stripes: Vec::new(),
        };
        let holes = self.stripes.iter().enumerate().filter(|(_, stripe)| stripe.missing > 0);
        for (s, stripe) in holes {
            let k = self.layout.data_of(s);
            let parity = stripe.parity.iter().map(|(row, _)| k + row);
            let mut bitmap = vec![0; (k + self.layout.m()).div_ceil(8)];
            for i in (0..k).filter(|i| stripe.has(*i)).chain(parity) {
                bitmap[i / 8] |= 1u8 << (i % 8);
            }
            match room.checked_sub(BlockGaps::stripe_bytes(bitmap.len())) {
                Some(left) => *room = left,
                None => return Some((gaps, false)),
            }
            gaps.stripes
                .push((u16::try_from(s).expect("Layout has at most 65 535 stripes"), bitmap));
        }
        Some((gaps, true))
    }
}

/// What an arrival meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Nothing new.
    Duplicate,
    /// A piece; the block is not complete.
    Piece,
    /// The block is complete.
    Complete(Bytes),
}

/// All blocks of the peer.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    received: Received,
    assemblies: BTreeMap<BlockId, Assembly>,
    /// Announced bytes of `assemblies`.
    in_pieces: usize,
    /// Bytes complete and not yet taken.
    ready: usize,
    /// Bytes taken by the user, ever.
    taken: u64,
    /// Stripes that parity completed, ever.
    repaired: u64,
}

impl Inbox {
    pub(crate) const fn received(&self) -> &Received {
        &self.received
    }

    pub(crate) const fn taken(&self) -> u64 {
        self.taken
    }

    pub(crate) const fn repaired(&self) -> u64 {
        self.repaired
    }

    /// Bytes held for the peer's sake.
    pub(crate) const fn held(&self) -> usize {
        self.in_pieces + self.ready
    }

    /// The user took a block.
    pub(crate) fn take(&mut self, bytes: usize) {
        self.ready -= bytes;
        self.taken = self.taken.saturating_add(bytes as u64);
    }

    fn admit(&self, id: BlockId, more: usize) -> Result<(), PeerMisbehaved> {
        let end = self.received.next().saturating_add(limits::BLOCK_WINDOW);
        if id.0 >= end {
            return Err(PeerMisbehaved::BeyondWindow {
                what: "block",
                number: id.0,
                end,
            });
        }
        let limit = usize::try_from(limits::BLOCK_WINDOW_BYTES).unwrap_or(usize::MAX);
        if self.held() + more > limit {
            return Err(PeerMisbehaved::Flood { what: "blocks", limit });
        }
        Ok(())
    }

    /// A whole block arrived.
    pub(crate) fn whole(&mut self, id: BlockId, bytes: Bytes) -> Result<Arrival, PeerMisbehaved> {
        if self.received.contains(id.0) {
            return Ok(Arrival::Duplicate);
        }
        let begun = self.assemblies.get(&id).map(|assembly| assembly.layout.block_bytes());
        match begun {
            Some(len) if len != bytes.len() => return Err(PeerMisbehaved::Contradiction { block: id.0 }),
            Some(_) => {}
            None => self.admit(id, bytes.len())?,
        }
        Ok(self.complete(id, bytes))
    }

    fn complete(&mut self, id: BlockId, bytes: Bytes) -> Arrival {
        if self.assemblies.remove(&id).is_some() {
            self.in_pieces -= bytes.len();
        }
        self.ready += bytes.len();
        self.received.insert(id.0);
        Arrival::Complete(bytes)
    }

    fn assembly(&mut self, id: BlockId, layout: Layout) -> Result<&mut Assembly, PeerMisbehaved> {
        if !self.assemblies.contains_key(&id) {
            self.admit(id, layout.block_bytes())?;
            self.in_pieces += layout.block_bytes();
        }
        let assembly = self.assemblies.entry(id).or_insert_with(|| Assembly::new(layout));
        if assembly.layout == layout {
            Ok(assembly)
        } else {
            Err(PeerMisbehaved::Contradiction { block: id.0 })
        }
    }

    fn finish(&mut self, id: BlockId, any: bool) -> Arrival {
        let done = self
            .assemblies
            .get(&id)
            .is_some_and(|assembly| assembly.incomplete == 0);
        match (done, any) {
            (true, _) => {
                let assembly = self.assemblies.remove(&id).expect("looked up just now");
                self.in_pieces -= assembly.layout.block_bytes();
                self.complete(id, assembly.into_block())
            }
            (false, true) => Arrival::Piece,
            (false, false) => Arrival::Duplicate,
        }
    }

    /// One shard arrived; its length was checked against the layout by the decoder.
    pub(crate) fn shard(
        &mut self,
        id: BlockId,
        layout: Layout,
        (stripe, index): (u16, u8),
        bytes: Bytes,
    ) -> Result<Arrival, PeerMisbehaved> {
        if self.received.contains(id.0) {
            return Ok(Arrival::Duplicate);
        }
        let (stripe, index) = (usize::from(stripe), usize::from(index));
        let k = layout.data_of(stripe);
        let assembly = self.assembly(id, layout)?;
        let piece = if index < k {
            assembly.data_shard(layout.first_of(stripe) + index, &bytes)
        } else {
            assembly.parity_shard(stripe, index - k, bytes)
        };
        let repaired = assembly.settle(stripe);
        self.repaired += u64::from(repaired);
        Ok(self.finish(id, piece == Piece::New))
    }

    /// Runs of data shards arrived; runs and length were checked against the layout by the decoder.
    pub(crate) fn patch(
        &mut self,
        id: BlockId,
        layout: Layout,
        runs: &[(u32, u32)],
        mut bytes: &[u8],
    ) -> Result<Arrival, PeerMisbehaved> {
        if self.received.contains(id.0) {
            return Ok(Arrival::Duplicate);
        }
        let assembly = self.assembly(id, layout)?;
        let mut any = false;
        let mut repaired = 0;
        for (first, count) in runs {
            for shard in *first as usize..(*first + *count) as usize {
                let (one, rest) = bytes.split_at(layout.range_of(shard).len());
                bytes = rest;
                any |= assembly.data_shard(shard, one) == Piece::New;
                repaired += u64::from(assembly.settle(layout.place_of(shard).0));
            }
        }
        self.repaired += repaired;
        Ok(self.finish(id, any))
    }

    /// What is missing of blocks in pieces, oldest first, in at most `room` bytes.
    pub(crate) fn gaps(&self, mut room: usize) -> Gaps {
        let mut gaps = Gaps::default();
        for (id, assembly) in &self.assemblies {
            let Some((block, whole)) = assembly.gaps(*id, &mut room) else {
                gaps.more = true;
                break;
            };
            gaps.blocks.push(block);
            if !whole || gaps.blocks.len() == usize::from(u8::MAX) {
                gaps.more = true;
                break;
            }
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Rng;

    fn block(len: usize, seed: u64) -> Bytes {
        let mut out = vec![0; len];
        Rng::new(seed).fill(&mut out);
        out.into()
    }

    /// Every shard of a block, as `(stripe, index, bytes)`.
    fn shards(layout: Layout, block: &Bytes) -> Vec<((u16, u8), Bytes)> {
        let mut out = Vec::new();
        for s in 0..layout.stripes() {
            let k = layout.data_of(s);
            let data = (0..k).map(|i| block.slice(layout.range_of(layout.first_of(s) + i)));
            for (i, bytes) in data.chain(stripe::parity(layout, block, s)).enumerate() {
                out.push(((u16::try_from(s).unwrap(), u8::try_from(i).unwrap()), bytes));
            }
        }
        out
    }

    #[test]
    fn any_k_of_each_stripe_suffice_in_any_order() {
        let mut rng = Rng::new(11);
        for round in 0..200 {
            let (k, m) = (1 + rng.below(20), rng.below(12));
            let len = 1 + usize::try_from(rng.below(40_000)).unwrap();
            let layout = Layout::new(len, 256, usize::try_from(k).unwrap(), usize::try_from(m).unwrap()).unwrap();
            let whole = block(len, round);
            let mut pieces = shards(layout, &whole);
            // Shuffle, then lose m of each stripe.
            for i in (1..pieces.len()).rev() {
                pieces.swap(i, usize::try_from(rng.below(i as u64 + 1)).unwrap());
            }
            let mut lost = BTreeMap::new();
            pieces.retain(|((s, _), _)| {
                let lost = lost.entry(*s).or_insert(0);
                *lost += 1;
                *lost > m
            });
            let mut inbox = Inbox::default();
            let mut done = None;
            for (place, bytes) in pieces {
                assert_eq!(done, None, "complete before the last needed shard: none is spare");
                if let Arrival::Complete(bytes) = inbox.shard(BlockId(0), layout, place, bytes).unwrap() {
                    done = Some(bytes);
                }
            }
            assert_eq!(done.as_ref(), Some(&whole));
            assert_eq!(inbox.held(), len);
            inbox.take(len);
            assert_eq!((inbox.held(), inbox.taken()), (0, len as u64));
        }
    }

    #[test]
    fn what_the_gaps_say_is_exactly_what_a_patch_must_bring() {
        let whole = block(50_000, 4);
        let layout = Layout::new(50_000, 256, 16, 3).unwrap();
        let mut inbox = Inbox::default();
        let mut rng = Rng::new(2);
        for (place, bytes) in shards(layout, &whole) {
            if rng.chance(0.6) {
                inbox.shard(BlockId(0), layout, place, bytes).unwrap();
            }
        }
        let gaps = inbox.gaps(10_000);
        assert!(!gaps.more);
        let mut runs = Vec::new();
        for (s, have) in &gaps.blocks[0].stripes {
            let s = usize::from(*s);
            let there = have.iter().map(|byte| byte.count_ones() as usize).sum::<usize>();
            let needed = layout.data_of(s) - there;
            let missing = (0..layout.data_of(s)).filter(|i| have[i / 8] >> (i % 8) & 1 == 0);
            runs.extend(
                missing
                    .take(needed)
                    .map(|i| (u32::try_from(layout.first_of(s) + i).unwrap(), 1)),
            );
        }
        let bytes: Vec<u8> = runs
            .iter()
            .flat_map(|run| whole[layout.run_range(*run).unwrap()].to_vec())
            .collect();
        assert_eq!(
            inbox.patch(BlockId(0), layout, &runs, &bytes).unwrap(),
            Arrival::Complete(whole)
        );
        assert!(inbox.repaired() > 0);
    }

    #[test]
    fn gaps_are_cut_to_the_room_and_say_so() {
        let layout = Layout::new(50_000, 256, 4, 3).unwrap();
        let mut inbox = Inbox::default();
        for id in 0..3 {
            inbox.shard(BlockId(id), layout, (0, 0), vec![0; 256].into()).unwrap();
        }
        for room in 0..600 {
            let gaps = inbox.gaps(room);
            let stripes: usize = gaps
                .blocks
                .iter()
                .map(|b| b.stripes.iter().map(|(_, h)| 3 + h.len()).sum::<usize>())
                .sum();
            assert!(stripes + gaps.blocks.len() * BlockGaps::HEAD <= room);
            assert!(gaps.more || gaps.blocks.len() == 3);
        }
        assert!(!inbox.gaps(10_000).more);
    }

    #[test]
    fn a_block_arrives_once_by_whichever_road() {
        let whole = block(1_000, 8);
        let layout = Layout::new(1_000, 256, 4, 1).unwrap();
        let mut inbox = Inbox::default();
        let pieces = shards(layout, &whole);
        assert_eq!(
            inbox
                .shard(BlockId(3), layout, pieces[0].0, pieces[0].1.clone())
                .unwrap(),
            Arrival::Piece
        );
        assert_eq!(
            inbox
                .shard(BlockId(3), layout, pieces[0].0, pieces[0].1.clone())
                .unwrap(),
            Arrival::Duplicate
        );
        assert!(matches!(
            inbox.whole(BlockId(3), whole.clone()).unwrap(),
            Arrival::Complete(_)
        ));
        assert_eq!(inbox.whole(BlockId(3), whole).unwrap(), Arrival::Duplicate);
        assert_eq!(
            inbox
                .shard(BlockId(3), layout, pieces[1].0, pieces[1].1.clone())
                .unwrap(),
            Arrival::Duplicate
        );
        assert!(inbox.assemblies.is_empty());
        assert_eq!(inbox.held(), 1_000);
    }

    #[test]
    fn parity_of_a_complete_stripe_is_not_kept() {
        let whole = block(4 * 256, 6);
        let layout = Layout::new(4 * 256, 256, 2, 3).unwrap();
        let mut inbox = Inbox::default();
        for (place, bytes) in shards(layout, &whole).into_iter().take(5) {
            let arrival = inbox.shard(BlockId(0), layout, place, bytes).unwrap();
            // Two data shards complete the first stripe; its three parity shards say nothing new.
            assert_eq!(arrival == Arrival::Piece, place.1 < 2, "{place:?}");
        }
    }

    #[test]
    fn a_flood_and_a_contradiction_are_the_peers_fault() {
        let mut inbox = Inbox::default();
        let layout = Layout::new(limits::BLOCK_BYTES, 1_024, 128, 1).unwrap();
        let window = limits::BLOCK_WINDOW_BYTES / limits::BLOCK_BYTES as u64;
        let shard = Bytes::from(vec![0; 1_024]);
        for id in 0..window {
            inbox.shard(BlockId(id), layout, (0, 0), shard.clone()).unwrap();
        }
        let flood = inbox.shard(BlockId(99), layout, (0, 0), shard.clone());
        assert!(matches!(flood, Err(PeerMisbehaved::Flood { .. })));
        assert!(matches!(
            inbox.whole(BlockId(98), shard.clone()),
            Err(PeerMisbehaved::Flood { .. })
        ));
        let other = Layout::new(limits::BLOCK_BYTES, 1_024, 64, 1).unwrap();
        let contradiction = inbox.shard(BlockId(0), other, (0, 0), shard.clone());
        assert_eq!(contradiction, Err(PeerMisbehaved::Contradiction { block: 0 }));
        assert!(matches!(
            inbox.whole(BlockId(0), shard.clone()),
            Err(PeerMisbehaved::Contradiction { .. })
        ));
        let beyond = inbox.whole(BlockId(limits::BLOCK_WINDOW), shard);
        assert!(matches!(beyond, Err(PeerMisbehaved::BeyondWindow { .. })));
    }

    #[test]
    fn received_numbers_behave_like_a_set() {
        let mut rng = Rng::new(3);
        let mut ours = Received::default();
        let mut model = std::collections::BTreeSet::new();
        for _ in 0..3_000 {
            let number = rng.below(400);
            assert_eq!(ours.insert(number), model.insert(number));
            assert_eq!(ours.next(), (0..).find(|n| !model.contains(n)).unwrap());
            let listed: u64 = ours.some_ranges(1_000, 0).iter().map(|(a, b)| b - a).sum();
            assert_eq!(ours.next() + listed, model.len() as u64);
        }
        assert!((0..400).all(|n| ours.contains(n) == model.contains(&n)));
    }

    #[test]
    fn acknowledgements_that_cannot_say_everything_say_it_in_turn() {
        let mut received = Received::default();
        (0..20).for_each(|i| assert!(received.insert(1 + 2 * i)));
        let mut said: Vec<_> = (0..3).flat_map(|turn| received.some_ranges(8, turn)).collect();
        said.dedup();
        assert_eq!(said.len(), 20);
    }
}
