//! Pages, where they are, and sets of them.

use core::fmt;
use core::ops::{Add, AddAssign, Sub};

/// Bytes in a page: what x86's smallest page and one disk block of ours both are.
pub const PAGE_SIZE: usize = 4096;

/// Which page of its space (page-frame number). For RAM, the guest-physical address over [`PAGE_SIZE`], holes and all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The address of the page's first byte.
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 * PAGE_SIZE as u64)
    }
}

impl Add<PageCount> for Pfn {
    type Output = Self;
    fn add(self, count: PageCount) -> Self {
        Self(self.0 + count.0)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A guest-physical byte address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The page this byte lies in.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 / PAGE_SIZE as u64)
    }
}

/// How many pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageCount(pub u64);

impl PageCount {
    /// No pages.
    pub const ZERO: Self = Self(0);

    /// How many pages hold `bytes`, the last perhaps in part.
    pub const fn holding(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE as u64))
    }

    /// Their size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 * PAGE_SIZE as u64
    }
}

impl Add for PageCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for PageCount {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sub for PageCount {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl core::iter::Sum for PageCount {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A space of pages: RAM is space 0, each disk a space of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SpaceId(pub u16);

impl SpaceId {
    /// The guest's RAM.
    pub const RAM: Self = Self(0);
}

/// One page of one space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// Its space.
    pub space: SpaceId,
    /// Its place there.
    pub pfn: Pfn,
}

impl PageId {
    /// The page `pfn` of RAM.
    pub const fn ram(pfn: Pfn) -> Self {
        Self {
            space: SpaceId::RAM,
            pfn,
        }
    }
}

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.space == SpaceId::RAM {
            write!(f, "page {}", self.pfn)
        } else {
            write!(f, "page {} of space {}", self.pfn, self.space.0)
        }
    }
}

/// A set of pages of one space, one bit each, in the layout of KVM's dirty log (kvm/api.rst, `KVM_GET_DIRTY_LOG`:
/// page `n` is bit `n % 64` of word `n / 64`).
///
/// Pages at or beyond [`PageSet::capacity`] do not exist: inserting one is the caller's bug, asking for one answers no.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    /// Bits past `capacity` in the last word are always zero.
    words: Vec<u64>,
    capacity: PageCount,
}

const WORD: u64 = u64::BITS as u64;

impl PageSet {
    /// An empty set over a space of `capacity` pages.
    pub fn new(capacity: PageCount) -> Self {
        Self {
            words: vec![0; index(capacity.0.div_ceil(WORD))],
            capacity,
        }
    }

    /// Every page of a space of `capacity` pages.
    pub fn full(capacity: PageCount) -> Self {
        Self::from_words(vec![u64::MAX; index(capacity.0.div_ceil(WORD))], capacity)
    }

    /// The set a bitmap describes. Words and bits past `capacity` are dropped, missing words are empty.
    pub fn from_words(mut words: Vec<u64>, capacity: PageCount) -> Self {
        words.resize(index(capacity.0.div_ceil(WORD)), 0);
        if let (Some(last), tail @ 1..) = (words.last_mut(), capacity.0 % WORD) {
            *last &= (1 << tail) - 1;
        }
        Self { words, capacity }
    }

    /// How many pages the space has.
    pub const fn capacity(&self) -> PageCount {
        self.capacity
    }

    /// The bitmap.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many pages are in the set. Walks the bitmap: 256 Ki pages take some 4 µs.
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether `pfn` is in the set.
    pub fn contains(&self, pfn: Pfn) -> bool {
        pfn.0 < self.capacity.0 && self.words[index(pfn.0 / WORD)] >> (pfn.0 % WORD) & 1 == 1
    }

    /// Put `pfn` in; says whether it is new there.
    ///
    /// # Panics
    /// When the space has no such page.
    pub fn insert(&mut self, pfn: Pfn) -> bool {
        assert!(
            pfn.0 < self.capacity.0,
            "page {pfn} is beyond a space of {} pages",
            self.capacity
        );
        let word = &mut self.words[index(pfn.0 / WORD)];
        let bit = 1 << (pfn.0 % WORD);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Take `pfn` out; says whether it was there.
    pub fn remove(&mut self, pfn: Pfn) -> bool {
        let there = self.contains(pfn);
        if there {
            self.words[index(pfn.0 / WORD)] &= !(1 << (pfn.0 % WORD));
        }
        there
    }

    /// Put every page of `other` in.
    ///
    /// # Panics
    /// When the spaces differ in size.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of different spaces");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// Take every page of `other` out.
    ///
    /// # Panics
    /// When the spaces differ in size.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of different spaces");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(mine, theirs)| *mine &= !theirs);
    }

    /// Take every page out that is not in `other`.
    ///
    /// # Panics
    /// When the spaces differ in size.
    pub fn intersect_with(&mut self, other: &Self) {
        assert_eq!(self.capacity, other.capacity, "sets of different spaces");
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(mine, theirs)| *mine &= theirs);
    }

    /// Empty the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The pages in the set, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.from(Pfn(0))
    }

    /// The pages in the set at or after `first`, lowest first.
    pub fn from(&self, first: Pfn) -> impl Iterator<Item = Pfn> + '_ {
        let skip = index((first.0 / WORD).min(self.words.len() as u64));
        let head_mask = u64::MAX << (first.0 % WORD);
        self.words[skip..].iter().enumerate().flat_map(move |(i, word)| {
            let mut left = if i == 0 { *word & head_mask } else { *word };
            let base = (skip + i) as u64 * WORD;
            core::iter::from_fn(move || {
                let bit = u64::from(left.trailing_zeros());
                (left != 0).then(|| {
                    left &= left - 1;
                    Pfn(base + bit)
                })
            })
        })
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} of {})", self.count(), self.capacity)
    }
}

/// A bitmap index. Spaces are bounded by memory, so this always fits on the 64-bit hosts KVM runs on.
fn index(n: u64) -> usize {
    usize::try_from(n).expect("a bitmap index fits the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_set_remembers_what_was_put_in() {
        let mut set = PageSet::new(PageCount(130));
        assert!(set.insert(Pfn(0)) && set.insert(Pfn(64)) && set.insert(Pfn(129)));
        assert!(!set.insert(Pfn(64)));
        assert_eq!(set.iter().collect::<Vec<_>>(), [Pfn(0), Pfn(64), Pfn(129)]);
        assert_eq!(set.from(Pfn(1)).collect::<Vec<_>>(), [Pfn(64), Pfn(129)]);
        assert_eq!(set.from(Pfn(500)).count(), 0);
        assert!(set.remove(Pfn(64)) && !set.remove(Pfn(64)) && !set.contains(Pfn(1_000)));
        assert_eq!(set.count(), PageCount(2));
    }

    #[test]
    fn bits_past_the_end_do_not_exist() {
        assert_eq!(PageSet::full(PageCount(65)).count(), PageCount(65));
        assert_eq!(
            PageSet::from_words(vec![u64::MAX; 9], PageCount(3)).count(),
            PageCount(3)
        );
        assert_eq!(PageSet::full(PageCount(0)).count(), PageCount(0));
    }

    #[test]
    fn a_set_behaves_as_the_obvious_one() {
        let mut rng = crate::Rng::new(3);
        let (mut set, mut model) = (PageSet::new(PageCount(300)), BTreeSet::new());
        for _ in 0..2_000 {
            let pfn = Pfn(rng.below(300));
            if rng.chance(0.6) {
                assert_eq!(set.insert(pfn), model.insert(pfn));
            } else {
                assert_eq!(set.remove(pfn), model.remove(&pfn));
            }
        }
        assert!(set.iter().eq(model.iter().copied()));
        let start = Pfn(rng.below(300));
        assert!(set.from(start).eq(model.range(start..).copied()));
    }
}
