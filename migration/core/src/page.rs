//! How one page becomes few bytes and back.
//!
//! | encoding | when | bytes |
//! |---|---|---|
//! | [`Zero`](Encoding::Zero) | the page is all zeros and the shadow's is not | 0 |
//! | [`Delta`](Encoding::Delta) | we still have what was shipped of it last, and few words changed | 8 and up |
//! | [`Dup`](Encoding::Dup) | another page was shipped with this very content, and still has it | 38 |
//! | [`Raw`](Encoding::Raw) | otherwise | 4096 |
//!
//! A page equal to what was shipped of it last does not travel at all, so it has no encoding. General compression is
//! applied to whole batches, not here ([`pack`](crate::pack)): 4 KiB is too little context for it, and 64 pages are enough
//! (`handbook` transport §4).
//!
//! Deltas and duplicates lean on what the shadow holds, which is what was shipped before, because batches are applied in
//! the order of their numbers and their pages in the order they stand there.
//!
//! # The delta's bytes
//!
//! Words are eight bytes, lines eight words; a page is 64 lines. First a 64-bit mask of the lines that changed; then for
//! each such line, in order, an 8-bit mask of its changed words and those words, each as the exclusive-or of old and new.
//! A counter that moved costs 8 + 1 + 8 bytes. Exclusive-or rather than the new word, because a small change leaves
//! mostly zero bytes for compression to fold.

use umbra_units::{Malformed, PAGE_SIZE, PageId, Pfn, Reader, SpaceId, Writer};

use crate::guest::PageBytes;

/// Bytes in a word of a delta.
const WORD: usize = 8;
/// Bytes in a line of a delta.
const LINE: usize = 64;
/// Lines in a page: one bit each in a word.
const LINES: usize = PAGE_SIZE / LINE;
/// A delta longer than this is not worth decoding: raw is simpler and compression does better on it.
const DELTA_WORTH_BYTES: usize = PAGE_SIZE * 3 / 4;
/// The longest delta there could be: every word of every line.
const DELTA_MOST_BYTES: usize = WORD + LINES + PAGE_SIZE;
/// Bytes of a duplicate's payload: space, page number, proof.
pub(crate) const DUP_BYTES: usize = 2 + 4 + PROOF_BYTES;
/// Bytes of a proof: of BLAKE3.
const PROOF_BYTES: usize = 32;

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
    /// A copy of another page as the shadow holds it: a [`Dup`].
    Dup = 3,
}

impl Encoding {
    /// Every encoding, in the order of its number on the wire.
    pub const ALL: [Self; 4] = [Self::Zero, Self::Delta, Self::Raw, Self::Dup];

    /// The encoding of this number.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The number on the wire.
    pub const fn to_wire(self) -> u8 {
        self as u8
    }
}

/// "What you hold of that page, if it is what I mean."
///
/// The 64-bit hashes that name contents elsewhere are no proof here: whoever can write to two pages of a guest can make
/// them collide, and one of them may be somebody else's (`docs/decisions/0027`). So a duplicate carries a cryptographic hash of
/// its content, and the shadow copies nothing that has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dup {
    /// The page to copy.
    pub of: PageId,
    proof: [u8; PROOF_BYTES],
}

impl Dup {
    /// A duplicate of page `of`, which is to hold `content`.
    pub fn new(of: PageId, content: &PageBytes) -> Self {
        let proof = *blake3::hash(content).as_bytes();
        Self { of, proof }
    }

    /// Whether this is the content that is meant.
    pub fn is_proven_by(&self, content: &PageBytes) -> bool {
        self.proof == *blake3::hash(content).as_bytes()
    }

    /// Append its payload.
    ///
    /// # Panics
    /// When the page is beyond what a page number on the wire can name.
    pub fn write(&self, out: &mut Writer) {
        let pfn = u32::try_from(self.of.pfn.0).expect("limits::SPACE_PAGES bounds page numbers");
        out.u16(self.of.space.0).u32(pfn).put(&self.proof);
    }

    /// Read its payload, all of it.
    pub fn read(payload: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(payload);
        let dup = Self {
            of: PageId {
                space: SpaceId(reader.u16("duplicate's space")?),
                pfn: Pfn(u64::from(reader.u32("duplicate's page number")?)),
            },
            proof: reader.array("duplicate's proof")?,
        };
        reader.finish("duplicate")?;
        Ok(dup)
    }
}

/// Append the delta from `old` to `new`, if it is short enough to be worth it; otherwise leave `out` as it was.
pub fn encode_delta(old: &PageBytes, new: &PageBytes, out: &mut Writer) -> bool {
    let lines = changed_lines(old, new);
    // What its lines cost at the least: most pages that are not worth it are seen here.
    if WORD + (lines.count_ones() as usize) * (1 + WORD) > DELTA_WORTH_BYTES {
        return false;
    }
    let mut delta = [0u8; DELTA_MOST_BYTES];
    delta[..WORD].copy_from_slice(&lines.to_le_bytes());
    let mut len = WORD;
    let mut left = lines;
    while left != 0 {
        let at = left.trailing_zeros() as usize * LINE;
        left &= left - 1;
        let mask_at = len;
        len += 1;
        let mut mask = 0u8;
        let words = old[at..at + LINE]
            .chunks_exact(WORD)
            .zip(new[at..at + LINE].chunks_exact(WORD));
        for (j, (old, new)) in words.enumerate() {
            let changed = word(old) ^ word(new);
            // Written whether it changed or not, kept only if it did: a branch here would be a coin's toss.
            delta[len..len + WORD].copy_from_slice(&changed.to_le_bytes());
            let changed = usize::from(changed != 0);
            mask |= u8::try_from(changed).expect("0 or 1") << j;
            len += changed * WORD;
        }
        delta[mask_at] = mask;
    }
    if len > DELTA_WORTH_BYTES {
        return false;
    }
    out.put(&delta[..len]);
    true
}

/// One bit per line that differs.
fn changed_lines(old: &PageBytes, new: &PageBytes) -> u64 {
    let lines = old.chunks_exact(LINE).zip(new.chunks_exact(LINE));
    lines.enumerate().fold(0, |mask, (i, (old, new))| {
        let words = old.chunks_exact(WORD).zip(new.chunks_exact(WORD));
        let differs = words.fold(0, |differs, (old, new)| differs | (word(old) ^ word(new)));
        mask | u64::from(differs != 0) << i
    })
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
    fn a_duplicate_is_what_it_was_made_of_and_nothing_else() {
        let of = PageId {
            space: SpaceId(3),
            pfn: Pfn(0xffff_ffff),
        };
        let dup = Dup::new(of, &page(7));
        let mut out = Writer::new();
        dup.write(&mut out);
        assert_eq!(out.len(), DUP_BYTES);
        assert_eq!(Dup::read(out.as_slice()), Ok(dup));
        assert!(dup.is_proven_by(&page(7)));
        let mut other = page(7);
        other[4095] ^= 1;
        assert!(!dup.is_proven_by(&other));
        assert!(Dup::read(&out.as_slice()[1..]).is_err());
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
