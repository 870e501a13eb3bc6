//! The checksum of a part: xxh3 over all its bytes, 128 bits.

use core::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// The checksum of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Checksum(pub u128);

impl Checksum {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

/// A checksum in the making, for bytes that come in pieces.
#[derive(Clone, Default)]
pub struct Summing {
    state: Xxh3,
    bytes: u64,
}

impl Summing {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// These bytes follow.
    pub fn add(&mut self, bytes: &[u8]) {
        self.state.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// How many bytes there were.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The checksum of all of them.
    pub fn finish(&self) -> Checksum {
        Checksum(self.state.digest128())
    }
}

impl fmt::Debug for Summing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Summing({} bytes)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_sum_up_to_the_whole() {
        let bytes: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        let mut summing = Summing::new();
        bytes.chunks(777).for_each(|piece| summing.add(piece));
        assert_eq!((summing.finish(), summing.bytes()), (Checksum::of(&bytes), 40_000));
    }
}
