//! Pages that prove themselves.
//!
//! # The idea
//!
//! A page is a pure function of its [`Version`]: which page it is, how often it has been written, and what
//! kind of content it holds. Its header says which version it is; a separate table, elsewhere in guest
//! memory, says which version it *should* be. So a page that is stale, torn, lost or in the wrong place
//! disagrees with the table, and a table page that is stale disagrees with the data.
//!
//! # At any instant
//!
//! A vCPU can be stopped between any two instructions. The owner of a page (every page has one, so there are
//! no races) moves it from version `from` to `to` in this order, and x86 keeps stores in order:
//!
//! ```text
//! journal = { page, from, to }  ->  body  ->  header  ->  table[page] = to  ->  journal = none
//! ```
//!
//! So in a memory image every page equals the version its table entry names, except the one page per vCPU in
//! that vCPU's [`Journal`]: each of its words belongs to `from` or to `to`, and its table entry names either.
//!
//! # The page
//!
//! 512 little-endian words. Words 0..8 are the header: [`MAGIC`], page index, sequence, class, checksum of the
//! whole page with this word taken as 0, three zeros. The rest is the body, by [`Class`].

use crate::pattern::mix;

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;
/// Words in a page.
pub const PAGE_WORDS: usize = 512;
/// First word of every page that is not all zeros.
pub const MAGIC: u64 = u64::from_le_bytes(*b"UmbraPg1");

/// A page of memory as words.
pub type Page = [u64; PAGE_WORDS];

const LANES: usize = 8;
const CHUNKS: usize = PAGE_WORDS / LANES;
const CHECKSUM_WORD: usize = 4;
type Chunk = [u64; LANES];

/// What a body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Class {
    /// Zeros; and in odd versions the header is zero as well, so the page becomes empty and stops being so
    /// again. A migration that skips zero pages because fresh memory is zero anyway fails on the second.
    Zero = 0,
    /// Words that depend on the page alone, except eight that hold the sequence: small deltas.
    Counter = 1,
    /// Words of English, drawn anew in each version: a page compresses 2.5 times by lz4, 4.7 times by zstd.
    Text = 2,
    /// Noise, entirely new in each version.
    Random = 3,
}

impl Class {
    /// The four classes in turn, by page number.
    pub fn in_turn(page: u64) -> Self {
        match page % 4 {
            0 => Self::Zero,
            1 => Self::Counter,
            2 => Self::Text,
            _ => Self::Random,
        }
    }
}

/// Everything a page's content follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Index among the proof pages.
    pub page: u64,
    /// How often it has been written; from 1.
    pub sequence: u64,
    /// What it holds.
    pub class: Class,
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It is all zeros and should not be.
    Lost,
    /// It was never a proof page.
    Foreign,
    /// It is a proof page, but another one.
    Misplaced,
    /// It holds another class of content than it should.
    Class,
    /// It is an older version than the table names.
    Stale,
    /// It is a newer version than the table names: the table is stale.
    Future,
    /// The header is right, but the word at this index is not.
    Torn(usize),
}

impl Flaw {
    /// One word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Foreign => "foreign",
            Self::Misplaced => "misplaced",
            Self::Class => "class",
            Self::Stale => "stale",
            Self::Future => "future",
            Self::Torn(_) => "torn",
        }
    }
}

/// Sums whose order matters, eight at a time: additions only, so that it keeps up with memory.
#[derive(Clone, Copy)]
struct Checksum {
    sums: Chunk,
    sums_of_sums: Chunk,
}

impl Checksum {
    #[inline(always)]
    fn over(header: &Chunk) -> Self {
        let mut checksum = Self {
            sums: [0; LANES],
            sums_of_sums: [0; LANES],
        };
        checksum.add(header);
        checksum
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "three arrays walked in step")]
    fn add(&mut self, chunk: &Chunk) {
        for lane in 0..LANES {
            self.sums[lane] = self.sums[lane].wrapping_add(chunk[lane]);
            self.sums_of_sums[lane] = self.sums_of_sums[lane].wrapping_add(self.sums[lane]);
        }
    }

    #[inline(always)]
    fn finish(self) -> u64 {
        let mut sum = 0u64;
        for lane in 0..LANES {
            let pair = self.sums[lane] ^ self.sums_of_sums[lane].rotate_left(32);
            sum = (sum.rotate_left(7) ^ pair).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        sum
    }
}

/// A body, eight words at a time; chunk 0 is the header and never asked for.
trait Body {
    fn chunk(&self, number: usize) -> Chunk;
}

struct Zeros;
impl Body for Zeros {
    #[inline(always)]
    fn chunk(&self, _: usize) -> Chunk {
        [0; LANES]
    }
}

struct Counting {
    base: u64,
    sequence: u64,
}
impl Body for Counting {
    #[inline(always)]
    fn chunk(&self, number: usize) -> Chunk {
        let start = self.base.wrapping_add(number as u64 * 0x1003);
        let mut chunk = [0; LANES];
        for (lane, word) in chunk.iter_mut().enumerate() {
            *word = start.wrapping_add(lane as u64 * 0x0101_0101);
        }
        // One word in 64: the last of every eighth chunk.
        let turn = u64::from(number % 8 == 7).wrapping_neg();
        chunk[LANES - 1] = chunk[LANES - 1].wrapping_add(self.sequence & turn);
        chunk
    }
}

struct Prose {
    seed: u64,
}
impl Body for Prose {
    #[inline(always)]
    fn chunk(&self, number: usize) -> Chunk {
        let dice = mix(self.seed.wrapping_add(number as u64));
        let mut chunk = [0; LANES];
        for (lane, word) in chunk.iter_mut().enumerate() {
            *word = u64::from_le_bytes(*WORDS[(dice >> (8 * lane)) as usize % WORDS.len()]);
        }
        chunk
    }
}

/// As many as make a page of them compress about three times: fewer would compress better.
#[rustfmt::skip]
const WORDS: [&[u8; 8]; 32] = [
    b"the     ", b"guest   ", b"moves   ", b"while   ", b"running,", b" memory ", b"follows ", b"pages\n  ",
    b"written ", b"before  ", b"arrive; ", b"after   ", b"others, ", b"and     ", b"nothing ", b"is lost\n",
    b"shadow  ", b"holds   ", b"version ", b"number  ", b"of each ", b"until   ", b"network ", b"fails,\n ",
    b"then    ", b"takes   ", b"over.   ", b"Nobody  ", b"notices ", b"except  ", b"those   ", b"watching",
];

struct Noise {
    seed: u64,
}
impl Body for Noise {
    #[inline(always)]
    fn chunk(&self, number: usize) -> Chunk {
        let mut chunk = [0; LANES];
        for (lane, word) in chunk.iter_mut().enumerate() {
            let place = (number * LANES + lane) as u64;
            *word = mix(self.seed.wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        }
        chunk
    }
}

impl Version {
    /// Whether this version is a page of zeros, header and all.
    pub fn is_empty(&self) -> bool {
        self.class == Class::Zero && self.sequence % 2 == 1
    }

    /// The header without its checksum.
    #[inline(always)]
    fn header(&self) -> Chunk {
        if self.is_empty() {
            return [0; LANES];
        }
        [MAGIC, self.page, self.sequence, self.class as u64, 0, 0, 0, 0]
    }

    fn seed(&self) -> u64 {
        mix(self.page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ mix(self.sequence))
    }

    /// Writes this version: body first, then the header (see the module docs for why that order).
    ///
    /// # Safety
    /// `page` must be valid for writes and owned by the caller.
    #[inline(never)]
    pub unsafe fn write(&self, page: *mut Page) {
        // SAFETY: passed on from the caller.
        unsafe {
            match self.class {
                Class::Zero => self.write_body(page, &Zeros),
                Class::Counter => self.write_body(
                    page,
                    &Counting {
                        base: mix(self.page),
                        sequence: self.sequence,
                    },
                ),
                Class::Text => self.write_body(page, &Prose { seed: self.seed() }),
                Class::Random => self.write_body(page, &Noise { seed: self.seed() }),
            }
        }
    }

    #[inline(always)]
    unsafe fn write_body<B: Body>(&self, page: *mut Page, body: &B) {
        let chunks = page.cast::<Chunk>();
        let mut header = self.header();
        let mut checksum = Checksum::over(&header);
        for number in 1..CHUNKS {
            let chunk = body.chunk(number);
            checksum.add(&chunk);
            // SAFETY: `number` < CHUNKS, and the caller owns the page.
            unsafe { chunks.add(number).write(chunk) };
        }
        if !self.is_empty() {
            header[CHECKSUM_WORD] = checksum.finish();
        }
        core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
        // SAFETY: as above, chunk 0.
        unsafe { chunks.write(header) };
    }

    /// Whether `page` is this version, every word of it.
    ///
    /// # Safety
    /// `page` must be valid for reads, and nobody may be writing it.
    #[inline(never)]
    pub unsafe fn matches(&self, page: *const Page) -> bool {
        // SAFETY: passed on from the caller.
        unsafe {
            match self.class {
                Class::Zero => self.matches_body(page, &Zeros),
                Class::Counter => self.matches_body(
                    page,
                    &Counting {
                        base: mix(self.page),
                        sequence: self.sequence,
                    },
                ),
                Class::Text => self.matches_body(page, &Prose { seed: self.seed() }),
                Class::Random => self.matches_body(page, &Noise { seed: self.seed() }),
            }
        }
    }

    #[inline(always)]
    unsafe fn matches_body<B: Body>(&self, page: *const Page, body: &B) -> bool {
        let chunks = page.cast::<Chunk>();
        let mut header = self.header();
        let mut checksum = Checksum::over(&header);
        let mut differs = [0; LANES];
        for number in 1..CHUNKS {
            let chunk = body.chunk(number);
            checksum.add(&chunk);
            // SAFETY: `number` < CHUNKS, and the caller vouches for the page.
            let found = unsafe { chunks.add(number).read() };
            for lane in 0..LANES {
                differs[lane] |= chunk[lane] ^ found[lane];
            }
        }
        if !self.is_empty() {
            header[CHECKSUM_WORD] = checksum.finish();
        }
        // SAFETY: as above, chunk 0.
        let found = unsafe { chunks.read() };
        differs == [0; LANES] && header == found
    }

    /// What is wrong with a copy of a page that does not match, and which sequence it claims.
    pub fn flaw(&self, found: &Page) -> Option<(Flaw, u64)> {
        let mut wanted = [0; PAGE_WORDS];
        // SAFETY: `wanted` is ours.
        unsafe { self.write(&raw mut wanted) };
        let torn = wanted.iter().zip(found).position(|(wanted, found)| wanted != found)?;
        let claimed = if found[0] == MAGIC { found[2] } else { 0 };
        let flaw = if found.iter().all(|&word| word == 0) {
            // A zero-class page whose last version was the empty one is not lost, only late.
            if self.class == Class::Zero {
                Flaw::Stale
            } else {
                Flaw::Lost
            }
        } else if found[0] != MAGIC {
            if self.is_empty() {
                Flaw::Torn(torn)
            } else {
                Flaw::Foreign
            }
        } else if found[1] != self.page {
            Flaw::Misplaced
        } else if found[3] != self.class as u64 {
            Flaw::Class
        } else if claimed < self.sequence {
            Flaw::Stale
        } else if claimed > self.sequence {
            Flaw::Future
        } else {
            Flaw::Torn(torn)
        };
        Some((flaw, claimed))
    }
}

/// Guest-physical address of the [`Root`]: the first page of the image.
pub const ROOT_GPA: u64 = 0x10_0000;
/// First bytes of the root.
pub const ROOT_MAGIC: [u8; 8] = *b"UMBRAGST";

/// The guest's public face, at [`ROOT_GPA`]: where an outside observer starts to check a memory image.
///
/// Written at start-up, `magic` last; after that only the per-CPU parts change.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Root {
    /// [`ROOT_MAGIC`] once everything else here is valid.
    pub magic: [u8; 8],
    /// 1.
    pub version: u32,
    /// vCPUs used.
    pub cpus: u32,
    /// Proof pages in all; the first `working` of them are rewritten, the rest are static.
    pub pages: u64,
    /// Proof pages that are rewritten.
    pub working: u64,
    /// Page index `i < low_pages` lies at `low_gpa + i * 4096` ...
    pub low_gpa: u64,
    /// See `low_gpa`.
    pub low_pages: u64,
    /// ... and the others at `high_gpa + (i - low_pages) * 4096`.
    pub high_gpa: u64,
    /// Where the table is: one u64 per page, the sequence it should have; 0 means not written yet.
    pub table_gpa: u64,
    /// [`Class`] of every page, or 4 for [`Class::in_turn`].
    pub content: u64,
    reserved: [u64; 22],
    /// One per vCPU.
    pub cpu: [PerCpu; crate::config::CPUS_MAX],
}

/// What one vCPU shows: its journal and its counts. A line of its own, so that vCPUs do not disturb each other.
#[repr(C, align(128))]
#[derive(Debug)]
pub struct PerCpu {
    /// The page in progress.
    pub journal: Journal,
    /// Pages rewritten.
    pub written: u64,
    /// Pages verified.
    pub checked: u64,
    /// Arithmetic operations done and checked.
    pub ops: u64,
    /// Turns of the main loop: shows that the vCPU runs.
    pub turns: u64,
    /// 0 not started, 1 running, 2 all its pages have been written once.
    pub stage: u64,
}

/// The page a vCPU is rewriting. `to` is written last when it opens and cleared first when it closes.
#[repr(C)]
#[derive(Debug)]
pub struct Journal {
    /// Which page.
    pub page: u64,
    /// Its version before.
    pub from: u64,
    /// Its version after; 0 when nothing is in progress.
    pub to: u64,
}

impl Root {
    /// A root that promises nothing yet.
    pub const fn empty() -> Self {
        const IDLE: PerCpu = PerCpu {
            journal: Journal {
                page: 0,
                from: 0,
                to: 0,
            },
            written: 0,
            checked: 0,
            ops: 0,
            turns: 0,
            stage: 0,
        };
        Self {
            magic: [0; 8],
            version: 0,
            cpus: 0,
            pages: 0,
            working: 0,
            low_gpa: 0,
            low_pages: 0,
            high_gpa: 0,
            table_gpa: 0,
            content: 0,
            reserved: [0; 22],
            cpu: [IDLE; crate::config::CPUS_MAX],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLASSES: [Class; 4] = [Class::Zero, Class::Counter, Class::Text, Class::Random];

    fn written(page: u64, sequence: u64, class: Class) -> Box<Page> {
        let mut memory = Box::new([!0; PAGE_WORDS]);
        // SAFETY: `memory` is ours.
        unsafe { Version { page, sequence, class }.write(&raw mut *memory) };
        memory
    }

    fn matches(version: Version, page: &Page) -> bool {
        // SAFETY: a reference is valid for reads.
        unsafe { version.matches(page) }
    }

    #[test]
    fn a_page_matches_its_own_version_and_no_other() {
        for class in CLASSES {
            let page = written(7, 4, class);
            for (index, sequence) in [(7, 4), (7, 3), (7, 5), (8, 4)] {
                let version = Version {
                    page: index,
                    sequence,
                    class,
                };
                let own = (index, sequence) == (7, 4);
                assert_eq!(matches(version, &page), own, "{version:?}");
                assert_eq!(version.flaw(&page).is_none(), own, "{version:?}");
            }
        }
    }

    #[test]
    fn flaws_are_told_apart() {
        let wanted = Version {
            page: 7,
            sequence: 4,
            class: Class::Text,
        };
        assert_eq!(wanted.flaw(&written(7, 3, Class::Text)), Some((Flaw::Stale, 3)));
        assert_eq!(wanted.flaw(&written(7, 6, Class::Text)), Some((Flaw::Future, 6)));
        assert_eq!(wanted.flaw(&written(9, 4, Class::Text)), Some((Flaw::Misplaced, 4)));
        assert_eq!(wanted.flaw(&written(7, 4, Class::Random)), Some((Flaw::Class, 4)));
        assert_eq!(wanted.flaw(&[0; PAGE_WORDS]), Some((Flaw::Lost, 0)));
        assert_eq!(wanted.flaw(&[1; PAGE_WORDS]), Some((Flaw::Foreign, 0)));
        let empty = Version {
            page: 7,
            sequence: 5,
            class: Class::Zero,
        };
        assert_eq!(empty.flaw(&written(7, 4, Class::Zero)), Some((Flaw::Stale, 4)));
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        for class in CLASSES {
            for sequence in [3, 4] {
                let version = Version {
                    page: 7,
                    sequence,
                    class,
                };
                let mut page = written(7, sequence, class);
                for word in 0..PAGE_WORDS {
                    page[word] ^= 1 << (word % 64);
                    assert!(!matches(version, &page), "{class:?} word {word}");
                    assert!(version.flaw(&page).is_some());
                    page[word] ^= 1 << (word % 64);
                }
                assert!(matches(version, &page));
            }
        }
    }

    #[test]
    fn a_torn_page_is_named_by_its_first_wrong_word() {
        let (old, mut new) = (written(7, 3, Class::Random), written(7, 4, Class::Random));
        new[200..].copy_from_slice(&old[200..]);
        let version = Version {
            page: 7,
            sequence: 4,
            class: Class::Random,
        };
        assert_eq!(version.flaw(&new), Some((Flaw::Torn(200), 4)));
    }

    #[test]
    fn versions_of_a_counter_page_differ_in_ten_words() {
        let (old, new) = (written(7, 3, Class::Counter), written(7, 4, Class::Counter));
        assert_eq!(old.iter().zip(new.iter()).filter(|(a, b)| a != b).count(), 10);
    }

    #[test]
    fn versions_of_a_random_page_share_nothing_but_the_header() {
        let (old, new) = (written(7, 3, Class::Random), written(7, 4, Class::Random));
        assert_eq!(old.iter().zip(new.iter()).filter(|(a, b)| a == b).count(), 6);
    }

    #[test]
    fn the_root_is_one_page() {
        assert_eq!(size_of::<Root>(), 4096);
        assert_eq!(core::mem::offset_of!(Root, cpu), 256);
    }
}
