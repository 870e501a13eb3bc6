//! Which contents were shipped whole, and of which page: so that another page with the same content can be named
//! instead of sent.
//!
//! A bounded table of buckets: a content that finds its bucket full takes the place of another. A page stands in it only
//! while what was last shipped of it is the content it stands there for; whoever ships something else [forgets] it first.
//!
//! Contents are the same if two hashes of theirs are, each of 64 bits, of which one depends on a secret. That is not taken
//! for a proof: see [`Dup`](crate::page::Dup).
//!
//! [forgets]: Dups::forget

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Place;
use crate::digest::PageHash;
use crate::guest::PageBytes;

/// Contents of one bucket: what fits a line of the processor's cache.
const WAYS: usize = 4;
/// Most buckets: 16 MiB, for the contents of 4 GiB.
const MOST_BUCKETS: usize = 1 << 18;

/// Pairs of a content's secret hash and the page that holds it, as [`packed`]; zeros where there is none. All zeros, so
/// that what is never used never takes memory.
type Bucket = [u64; 2 * WAYS];

#[derive(Debug, Clone)]
pub(super) struct Dups {
    secret: u64,
    /// As many as `most` from the first insertion on; a power of two.
    buckets: Vec<Bucket>,
    most: usize,
}

impl Dups {
    /// For a guest of so many pages.
    pub(super) fn new(pages: usize) -> Self {
        Self {
            secret: 0,
            buckets: Vec::new(),
            most: pages.div_ceil(WAYS).next_power_of_two().min(MOST_BUCKETS),
        }
    }

    /// See [`Encoder::keyed`](super::Encoder::keyed).
    pub(super) fn key(&mut self, secret: u64) {
        (self.secret, self.buckets) = (secret, Vec::new());
    }

    /// The page of this content, if there is one; otherwise it is `place` from now on.
    pub(super) fn find_or_insert(&mut self, place: Place, hash: PageHash, content: &PageBytes) -> Option<Place> {
        if self.buckets.is_empty() {
            self.buckets = vec![[0; 2 * WAYS]; self.most];
        }
        let secret = xxh3_64_with_seed(content, self.secret);
        let bucket = &mut self.buckets[bucket_of(hash, self.most)];
        let ways = || (0..2 * WAYS).step_by(2);
        if let Some(way) = ways().find(|way| bucket[*way] == secret && bucket[way + 1] != 0) {
            return Some(unpacked(bucket[way + 1]));
        }
        let free = ways().find(|way| bucket[way + 1] == 0);
        // Whom it hits does not matter, but it must not always be the same.
        let way = free.unwrap_or_else(|| 2 * usize::from(secret.to_le_bytes()[0]) % (2 * WAYS));
        (bucket[way], bucket[way + 1]) = (secret, packed(place));
        None
    }

    /// The page is to be shipped with another content than this one.
    pub(super) fn forget(&mut self, place: Place, hash: PageHash) {
        if self.buckets.is_empty() {
            return;
        }
        let bucket = &mut self.buckets[bucket_of(hash, self.most)];
        let packed = packed(place);
        let there = bucket.iter_mut().skip(1).step_by(2).filter(|slot| **slot == packed);
        there.for_each(|slot| *slot = 0);
    }
}

fn bucket_of(hash: PageHash, buckets: usize) -> usize {
    usize::try_from(hash.0 & (buckets as u64 - 1)).expect("below the number of buckets")
}

/// Never 0.
const fn packed(place: Place) -> u64 {
    (place.table as u64) << 40 | (place.index as u64 + 1)
}

fn unpacked(packed: u64) -> Place {
    let part = |part: u64| usize::try_from(part).expect("was a place");
    Place {
        table: part(packed >> 40),
        index: part((packed & ((1 << 40) - 1)) - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::{PAGE_SIZE, Rng};

    fn place(index: usize) -> Place {
        Place { table: 3, index }
    }

    #[test]
    fn a_content_is_found_while_its_page_holds_it() {
        let (a, b) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        let (ha, hb) = (PageHash::of(&a), PageHash::of(&b));
        let mut dups = Dups::new(100);
        assert_eq!(dups.find_or_insert(place(7), ha, &a), None);
        assert_eq!(dups.find_or_insert(place(8), ha, &a), Some(place(7)));
        assert_eq!(dups.find_or_insert(place(9), hb, &b), None);
        dups.forget(place(8), ha);
        assert_eq!(
            dups.find_or_insert(place(1), ha, &a),
            Some(place(7)),
            "only its page forgets it"
        );
        dups.forget(place(7), ha);
        assert_eq!(dups.find_or_insert(place(1), ha, &a), None);
    }

    #[test]
    fn contents_of_one_hash_are_told_apart_by_the_other() {
        let (a, b) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        let mut dups = Dups::new(100);
        let collides = PageHash(42);
        assert_eq!(dups.find_or_insert(place(1), collides, &a), None);
        assert_eq!(dups.find_or_insert(place(2), collides, &b), None);
        assert_eq!(dups.find_or_insert(place(3), collides, &a), Some(place(1)));
        assert_eq!(dups.find_or_insert(place(3), collides, &b), Some(place(2)));
    }

    #[test]
    fn more_contents_than_it_holds_push_each_other_out_and_are_never_confused() {
        let mut dups = Dups::new(16);
        let mut rng = Rng::new(1);
        let contents: Vec<Box<PageBytes>> = (0..200)
            .map(|_| {
                let mut content = Box::new([0; PAGE_SIZE]);
                rng.fill(&mut *content);
                content
            })
            .collect();
        for round in 0..3 {
            let mut found = 0;
            for (index, content) in contents.iter().enumerate() {
                let twin = dups.find_or_insert(place(index), PageHash::of(content), content);
                assert!(twin.is_none_or(|twin| twin == place(index)));
                found += usize::from(twin.is_some());
            }
            assert_eq!(dups.buckets.len(), 4);
            assert!(found <= 16 && (round > 0 || found == 0));
        }
    }
}
