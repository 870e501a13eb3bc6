//! How one page becomes few bytes and back.
//!
//! | encoding | when | bytes |
//! |---|---|---|
//! | [`Zero`](Encoding::Zero) | the page is all zeros and the shadow's is not | 0 |
//! | [`Delta`](Encoding::Delta) | the shadow holds an older copy that we still have, and few words changed | 8 and up |
//! | [`Raw`](Encoding::Raw) | otherwise | 4096 |
//!
//! A page equal to what the shadow holds does not travel at all, so it has no encoding. General compression (lz4) is
//! applied to whole batches, not here: 4 KiB is too little context for it, and 64 pages are enough (`handbook`
//! transport §4).
//!
//! # The delta's bytes
//!
//! Words are eight bytes, lines eight words; a page is 64 lines. First a 64-bit mask of the lines that changed; then for
//! each such line, in order, an 8-bit mask of its changed words and those words, each as the exclusive-or of old and new.
//! A counter that moved costs 8 + 1 + 8 bytes. Exclusive-or rather than the new word, because a small change leaves
//! mostly zero bytes for lz4 to fold.

use umbra_units::{Malformed, PAGE_SIZE, Reader, Writer};

use crate::guest::PageBytes;

/// Bytes in a word of a delta.
const WORD: usize = 8;
/// Bytes in a line of a delta.
const LINE: usize = 64;
/// A delta longer than this is not worth decoding: raw is simpler and lz4 does better on it.
const DELTA_WORTH_BYTES: usize = PAGE_SIZE * 3 / 4;

/// How a page travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// All zeros.
    Zero = 0,
    /// Changed words against the content the shadow holds.
    Delta = 1,
    /// As it is.
    Raw = 2,
}

impl Encoding {
    /// Every encoding, in the order of its number on the wire.
    pub const ALL: [Self; 3] = [Self::Zero, Self::Delta, Self::Raw];

    /// The encoding of this number.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The number on the wire.
    pub const fn to_wire(self) -> u8 {
        self as u8
    }
}

/// Append the delta from `old` to `new`, if it is short enough to be worth it; otherwise leave `out` as it was.
pub fn encode_delta(old: &PageBytes, new: &PageBytes, out: &mut Writer) -> bool {
    let mut delta = [0u8; PAGE_SIZE + PAGE_SIZE / LINE + WORD];
    let mut len = WORD;
    let mut lines = 0u64;
    for (i, (old, new)) in old.chunks_exact(LINE).zip(new.chunks_exact(LINE)).enumerate() {
        if old == new {
            continue;
        }
        lines |= 1 << i;
        let mask_at = len;
        len += 1;
        let mut mask = 0u8;
        for (j, (old, new)) in old.chunks_exact(WORD).zip(new.chunks_exact(WORD)).enumerate() {
            let changed = word(old) ^ word(new);
            if changed != 0 {
                mask |= 1 << j;
                delta[len..len + WORD].copy_from_slice(&changed.to_le_bytes());
                len += WORD;
            }
        }
        delta[mask_at] = mask;
        if len > DELTA_WORTH_BYTES {
            return false;
        }
    }
    delta[..WORD].copy_from_slice(&lines.to_le_bytes());
    out.put(&delta[..len]);
    true
}

/// Apply a delta to the page it was made against. The whole of `delta` must be used.
pub fn apply_delta(page: &mut PageBytes, delta: &[u8]) -> Result<(), Malformed> {
    let mut reader = Reader::new(delta);
    let lines = reader.u64("delta line mask")?;
    for (i, line) in page
        .chunks_exact_mut(LINE)
        .enumerate()
        .filter(|(i, _)| lines >> i & 1 == 1)
    {
        let mask = reader.u8("delta word mask")?;
        if mask == 0 {
            return Err(Malformed {
                what: "delta line without a changed word",
                at: i,
            });
        }
        for (_, bytes) in line
            .chunks_exact_mut(WORD)
            .enumerate()
            .filter(|(j, _)| mask >> j & 1 == 1)
        {
            let changed = word(bytes) ^ reader.u64("delta word")?;
            bytes.copy_from_slice(&changed.to_le_bytes());
        }
    }
    reader.finish("delta")
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("chunks_exact gives whole words"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(fill: u8) -> PageBytes {
        [fill; PAGE_SIZE]
    }

    #[test]
    fn a_counter_that_moved_costs_seventeen_bytes() {
        let (old, mut new) = (page(7), page(7));
        new[800] = 8;
        let mut out = Writer::new();
        assert!(encode_delta(&old, &new, &mut out));
        assert_eq!(out.len(), 17);
        let mut shadow = old;
        apply_delta(&mut shadow, out.as_slice()).unwrap();
        assert_eq!(shadow, new);
    }

    #[test]
    fn equal_pages_make_an_empty_delta_and_different_ones_none() {
        let mut out = Writer::new();
        assert!(encode_delta(&page(1), &page(1), &mut out));
        assert_eq!(out.len(), 8);
        assert!(!encode_delta(&page(1), &page(2), &mut out));
        assert_eq!(out.len(), 8, "a delta that is not worth it leaves no trace");
    }

    proptest! {
        #[test]
        fn a_delta_leads_from_the_old_page_to_the_new(
            seed: u64,
            changes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..200),
        ) {
            let mut old = page(0);
            umbra_units::Rng::new(seed).fill(&mut old);
            let mut new = old;
            changes.iter().for_each(|(at, byte)| new[*at] = *byte);
            let mut out = Writer::new();
            if encode_delta(&old, &new, &mut out) {
                let mut shadow = old;
                apply_delta(&mut shadow, out.as_slice()).unwrap();
                prop_assert_eq!(&shadow[..], &new[..]);
            }
        }

        #[test]
        fn no_bytes_make_a_delta_panic(delta in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = apply_delta(&mut page(3), &delta);
        }
    }
}
