//! Whether two memories are equal, without sending either.
//!
//! Each page has a 64-bit hash; a space's digest is the sum, modulo 2¹²⁸, of one 128-bit term per page that mixes the
//! page's place with its hash. Source and shadow each keep the sum as pages change (take the old term away, add the new
//! one), so that comparing whole memories at a cut costs nothing (`handbook` algorithms §3.12).
//!
//! The digest catches every error of transport, decoding and application. It cannot catch a write that was never
//! harvested: that is what an *audit* is for, which hashes memory itself and compares it with the table page by page.
//! xxh3 is no cryptographic hash; it does not have to be, because the peer is authenticated.

use umbra_units::{PAGE_SIZE, PageId};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::guest::PageBytes;

/// The hash of one page's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash(pub u64);

impl PageHash {
    /// Of these bytes.
    pub fn of(page: &PageBytes) -> Self {
        Self(xxh3_64(page))
    }

    /// Of a page of zeros, which is what every page of a new shadow holds.
    pub fn zero() -> Self {
        static ZERO: std::sync::OnceLock<PageHash> = std::sync::OnceLock::new();
        *ZERO.get_or_init(|| Self::of(&[0; PAGE_SIZE]))
    }
}

/// Whether a page is all zeros.
pub fn is_zero(page: &PageBytes) -> bool {
    // Eight words side by side let the compiler use whole vectors; a way out after the first of them for the common page
    // that is not zeros, and after that only seldom, because each costs as much as it looks at.
    is_zeros(&page[..64]) && page.chunks_exact(1024).all(is_zeros)
}

/// Of a multiple of 64 bytes.
fn is_zeros(bytes: &[u8]) -> bool {
    let mut seen = [0u64; 8];
    for line in bytes.chunks_exact(64) {
        for (seen, word) in seen.iter_mut().zip(line.chunks_exact(8)) {
            *seen |= u64::from_le_bytes(word.try_into().expect("eight bytes"));
        }
    }
    seen.iter().fold(0, |acc, word| acc | word) == 0
}

/// The digest of all memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digest(pub u128);

impl Digest {
    /// Of a memory in which no page differs from zero. Zero pages contribute nothing, so that a new shadow and a guest
    /// that has written little agree without either walking its memory.
    pub const ZEROS: Self = Self(0);

    /// The content of `page` changed from hash `old` to hash `new`.
    pub fn change(&mut self, page: PageId, old: PageHash, new: PageHash) {
        self.0 = self.0.wrapping_sub(term(page, old)).wrapping_add(term(page, new));
    }
}

impl core::fmt::Display for Digest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

fn term(page: PageId, hash: PageHash) -> u128 {
    if hash == PageHash::zero() {
        return 0;
    }
    let mut place = [0; 18];
    place[..2].copy_from_slice(&page.space.0.to_le_bytes());
    place[2..10].copy_from_slice(&page.pfn.0.to_le_bytes());
    place[10..].copy_from_slice(&hash.0.to_le_bytes());
    xxh3_128(&place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::{Pfn, Rng};

    #[test]
    fn the_order_of_changes_does_not_matter_and_their_place_does() {
        let (a, b) = (PageId::ram(Pfn(1)), PageId::ram(Pfn(2)));
        let (x, y) = (PageHash(10), PageHash(11));
        let digest = |changes: &[(PageId, PageHash, PageHash)]| {
            let mut digest = Digest::ZEROS;
            changes
                .iter()
                .for_each(|(page, old, new)| digest.change(*page, *old, *new));
            digest
        };
        let zero = PageHash::zero();
        let one_way = digest(&[(a, zero, x), (b, zero, y), (a, x, y)]);
        assert_eq!(one_way, digest(&[(b, zero, y), (a, zero, y)]));
        assert_ne!(digest(&[(a, zero, x)]), digest(&[(b, zero, x)]));
        assert_eq!(digest(&[(a, zero, x), (a, x, zero)]), Digest::ZEROS);
    }

    #[test]
    fn a_single_byte_anywhere_makes_a_page_non_zero() {
        let mut rng = Rng::new(1);
        assert!(is_zero(&[0; PAGE_SIZE]));
        for at in (0..PAGE_SIZE).step_by(61).chain([PAGE_SIZE - 1]) {
            let mut page = [0; PAGE_SIZE];
            page[at] = 1 << rng.below(8);
            assert!(!is_zero(&page));
            assert_ne!(PageHash::of(&page), PageHash::zero());
        }
    }
}
