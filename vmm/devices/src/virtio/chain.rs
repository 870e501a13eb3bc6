//! One request of a driver: pieces of guest memory, first those to read, then those to write.
//!
//! A [`Chain`] is well-formed: it ends, it is not too long, and readable pieces come before writable ones. Its addresses
//! are only allegations. [`Segments`] checks them when it copies, and copies look at guest memory once: what was read is a
//! value of ours that the guest cannot change any more. A device never assumes how a driver cut a request into pieces
//! (virtio 1.2, Message Framing): it asks for so many bytes from the front.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use super::Ram;
use crate::limits::CHAIN_SEGMENTS;

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    token: Token,
    /// What the driver lets the device read.
    pub readable: Segments,
    /// What the driver lets the device write.
    pub writable: Segments,
}

/// What a chain is given back by: [`Rings::push`](super::Rings::push).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token {
    queue: u16,
    head: u16,
    /// How often the device had been reset when the chain was taken: nobody waits for one taken before.
    generation: u32,
}

/// A run of guest-physical addresses, as a driver alleges it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first.
    pub at: GuestAddress,
    /// How many.
    pub len: u32,
}

/// Pieces of guest memory, one after the other. Reading and writing take from the front.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
    /// Those before this one are used up.
    first: usize,
}

/// A chain is shorter than what was asked of it, or points outside of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request is too short or lies outside of guest memory")]
pub struct Outside;

impl Token {
    /// The token of a chain that is held across a save. Its head is an allegation until it is pushed.
    pub const fn held(queue: u16, head: u16) -> Self {
        Self::taken(queue, head, 0)
    }

    pub(super) const fn taken(queue: u16, head: u16, generation: u32) -> Self {
        Self {
            queue,
            head,
            generation,
        }
    }

    pub(super) const fn generation(self) -> u32 {
        self.generation
    }

    /// The queue the chain came from.
    pub const fn queue(self) -> u16 {
        self.queue
    }

    /// The descriptor it begins with.
    pub const fn head(self) -> u16 {
        self.head
    }
}

impl Chain {
    /// Follow a chain to its end; `None` if it is not well-formed.
    pub(super) fn follow(descriptors: DescriptorChain<&Ram>, token: Token) -> Option<Self> {
        let mut chain = Self {
            token,
            readable: Segments::default(),
            writable: Segments::default(),
        };
        let mut ended = false;
        for (count, descriptor) in descriptors.enumerate() {
            // The iterator also stops where a chain is broken: a table outside of memory, a loop, an index too large. Then the
            // last descriptor it gave says that there is another.
            ended = !descriptor.has_next();
            let list = match (descriptor.is_write_only(), chain.writable.list.is_empty()) {
                (true, _) => &mut chain.writable.list,
                (false, true) => &mut chain.readable.list,
                (false, false) => return None,
            };
            if count == CHAIN_SEGMENTS {
                return None;
            }
            list.push(Segment {
                at: descriptor.addr(),
                len: descriptor.len(),
            });
        }
        ended.then_some(chain)
    }

    /// What to give the chain back by.
    pub const fn token(&self) -> Token {
        self.token
    }
}

impl From<&Chain> for Token {
    fn from(chain: &Chain) -> Self {
        chain.token
    }
}

impl Segments {
    /// These pieces.
    pub const fn new(list: Vec<Segment>) -> Self {
        Self { list, first: 0 }
    }

    /// How many bytes are left. Of a chain: less than 4 GiB (virtio 1.2, The Virtqueue Descriptor Table).
    pub fn bytes(&self) -> u64 {
        self.iter().map(|segment| u64::from(segment.len)).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.iter().all(|segment| segment.len == 0)
    }

    /// The pieces that are left.
    pub fn iter(&self) -> impl Iterator<Item = Segment> {
        self.list[self.first..].iter().copied()
    }

    /// Whether all that is left lies within guest memory.
    pub fn is_within(&self, ram: &Ram) -> bool {
        self.iter().all(|Segment { at, len }| {
            len == 0 || usize::try_from(len).is_ok_and(|len| ram.check_range(at, len, Permissions::ReadWrite))
        })
    }

    /// Take the first `bytes` bytes away, as pieces of their own. `None`, and nothing taken, if there are fewer.
    pub fn take(&mut self, bytes: u64) -> Option<Self> {
        if bytes > self.bytes() {
            return None;
        }
        let mut left = bytes;
        let mut taken = Vec::new();
        while let Some(piece) = self.take_piece(left) {
            left -= u64::from(piece.len);
            taken.push(piece);
        }
        Some(Self::new(taken))
    }

    /// Fill `out` from the front. On failure some may have been taken.
    pub fn read(&mut self, ram: &Ram, mut out: &mut [u8]) -> Result<(), Outside> {
        while !out.is_empty() {
            let piece = self.take_piece(out.len() as u64).ok_or(Outside)?;
            let (now, rest) = out.split_at_mut(length(piece));
            ram.read_slice(now, piece.at).map_err(|_| Outside)?;
            out = rest;
        }
        Ok(())
    }

    /// Write `bytes` to the front. On failure some may have been written.
    pub fn write(&mut self, ram: &Ram, mut bytes: &[u8]) -> Result<(), Outside> {
        while !bytes.is_empty() {
            let piece = self.take_piece(bytes.len() as u64).ok_or(Outside)?;
            let (now, rest) = bytes.split_at(length(piece));
            ram.write_slice(now, piece.at).map_err(|_| Outside)?;
            bytes = rest;
        }
        Ok(())
    }

    /// The next piece that has bytes, cut to at most `most`. `None` if there is none, or none is wanted.
    fn take_piece(&mut self, most: u64) -> Option<Segment> {
        while self.list.get(self.first)?.len == 0 {
            self.first += 1;
        }
        let front = self.list.get_mut(self.first)?;
        let len = u32::try_from(most).unwrap_or(u32::MAX).min(front.len);
        let piece = Segment { at: front.at, len };
        front.len -= len;
        // Where a piece ends outside of the address space nothing is ever copied: its end need not be exact.
        front.at = GuestAddress(front.at.0.saturating_add(u64::from(len)));
        (len > 0).then_some(piece)
    }
}

/// A piece's length as one in memory.
fn length(piece: Segment) -> usize {
    usize::try_from(piece.len).expect("a piece was cut to the length of a slice")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)]).unwrap()
    }

    fn pieces(list: &[(u64, u32)]) -> Segments {
        let segment = |(at, len): &(u64, u32)| Segment {
            at: GuestAddress(*at),
            len: *len,
        };
        Segments::new(list.iter().map(segment).collect())
    }

    #[test]
    fn what_is_written_through_pieces_is_read_through_others() {
        let ram = ram();
        let bytes: Vec<u8> = (0..100).collect();
        pieces(&[(0x100, 30), (0x200, 0), (0x300, 70)])
            .write(&ram, &bytes)
            .unwrap();
        let mut again = pieces(&[(0x100, 1), (0x101, 29), (0x300, 1000)]);
        let mut out = [0; 100];
        again.read(&ram, &mut out[..60]).unwrap();
        again.read(&ram, &mut out[60..]).unwrap();
        assert_eq!((out.to_vec(), again.bytes()), (bytes, 930));
    }

    #[test]
    fn too_few_bytes_or_an_address_outside_of_memory_is_refused() {
        let ram = ram();
        assert_eq!(pieces(&[(0, 10)]).write(&ram, &[0; 11]), Err(Outside));
        for at in [0x3fff, 0x4000, 0x7fff, 0xbfff, u64::MAX, u64::MAX - 1] {
            assert_eq!(pieces(&[(at, 2)]).write(&ram, &[0; 2]), Err(Outside), "{at:#x}");
            assert_eq!(pieces(&[(at, 2)]).read(&ram, &mut [0; 2]), Err(Outside), "{at:#x}");
            assert!(!pieces(&[(0, 1), (at, 2)]).is_within(&ram), "{at:#x}");
        }
        assert!(pieces(&[(0, 0x4000), (0x8000, 0x4000), (u64::MAX, 0)]).is_within(&ram));
    }

    #[test]
    fn taking_leaves_exactly_the_rest() {
        let mut all = pieces(&[(0x100, 4), (0x200, 0), (0x300, 4)]);
        assert_eq!(all.take(9), None);
        let front = all.take(6).unwrap();
        assert_eq!((front.bytes(), all.bytes()), (6, 2));
        let segment = |at, len| Segment {
            at: GuestAddress(at),
            len,
        };
        assert_eq!(front.iter().collect::<Vec<_>>(), [segment(0x100, 4), segment(0x300, 2)]);
        assert_eq!(all.iter().collect::<Vec<_>>(), [segment(0x302, 2)]);
        assert!(!all.is_empty() && all.take(2).is_some() && all.is_empty());
    }
}
