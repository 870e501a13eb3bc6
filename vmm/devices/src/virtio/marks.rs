//! Which pages devices wrote: what `vm-memory` marks, and a harvest takes.
//!
//! A harvest of memory that no device wrote should cost nothing, however large that memory is: it is taken inside a pause.
//! So there is a second, coarse row of marks, a bit for each 64 words of the first (16 MiB of memory), and only words below a
//! set bit are looked at.
//!
//! # No mark is lost
//!
//! Who marks sets the page's bit first and the coarse one then; who takes clears the coarse bits first and the pages' then.
//! All of it is sequentially consistent. If the coarse bit is found set and therefore not set again, either it is taken
//! later, and the page's bit with it; or it was set again by somebody after it had been taken, and is taken next time.

use std::sync::atomic::{AtomicU64, Ordering};

use umbra_units::PAGE_SIZE;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// Marks for one region of memory, a bit per page.
#[derive(Debug, Default)]
pub struct WriteMarks {
    words: Vec<AtomicU64>,
    /// A bit for each word that may have bits.
    coarse: Vec<AtomicU64>,
    pages: usize,
}

const BITS: usize = 64;

impl WriteMarks {
    /// Mark pages from `first` on. Those beyond the region are ignored.
    pub fn mark_pages(&self, first: usize, pages: usize) {
        let end = first.saturating_add(pages).min(self.pages);
        let mut page = first;
        while page < end {
            let word = page / BITS;
            let until = end.min((word + 1) * BITS);
            let mask = u64::MAX >> (BITS - (until - page)) << (page % BITS);
            self.words[word].fetch_or(mask, Ordering::SeqCst);
            let (coarse, bit) = (&self.coarse[word / BITS], 1 << (word % BITS));
            if coarse.load(Ordering::SeqCst) & bit == 0 {
                coarse.fetch_or(bit, Ordering::SeqCst);
            }
            page = until;
        }
    }

    /// Take all marks: tells each word that has any, and its number. Page `n` is bit `n % 64` of word `n / 64`.
    pub fn take(&self, mut found: impl FnMut(usize, u64)) {
        for (n, coarse) in self.coarse.iter().enumerate() {
            if coarse.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut bits = coarse.swap(0, Ordering::SeqCst);
            while bits != 0 {
                let word = n * BITS + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let marks = self.words[word].swap(0, Ordering::SeqCst);
                if marks != 0 {
                    found(word, marks);
                }
            }
        }
    }

    /// Take all marks, as words.
    pub fn take_words(&self) -> Vec<u64> {
        let mut words = vec![0; self.words.len()];
        self.take(|word, marks| words[word] = marks);
        words
    }
}

impl<'a> WithBitmapSlice<'a> for WriteMarks {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let (first, last) = (offset / PAGE_SIZE, offset.saturating_add(len - 1) / PAGE_SIZE);
            self.mark_pages(first, last - first + 1);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE;
        page < self.pages && self.words[page / BITS].load(Ordering::SeqCst) >> (page % BITS) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for WriteMarks {
    fn with_len(len: usize) -> Self {
        let pages = len.div_ceil(PAGE_SIZE);
        let row = |bits: usize| (0..bits.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let words = row(pages);
        Self {
            coarse: row(words.len()),
            words,
            pages,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(marks: &WriteMarks) -> Vec<usize> {
        let mut pages = Vec::new();
        marks.take(|word, bits| pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit)));
        pages
    }

    #[test]
    fn what_is_marked_is_taken_once() {
        let marks = WriteMarks::with_len(20_000 * PAGE_SIZE + 1);
        assert!(taken(&marks).is_empty());
        marks.mark_dirty(4095, 2);
        marks.mark_dirty(5 * PAGE_SIZE, 0);
        marks.slice_at(60 * PAGE_SIZE).mark_dirty(PAGE_SIZE, 70 * PAGE_SIZE);
        marks.mark_pages(20_000, 5);
        marks.mark_dirty(usize::MAX - 1, 8);
        assert!(marks.dirty_at(100 * PAGE_SIZE) && !marks.dirty_at(131 * PAGE_SIZE));
        let expected: Vec<usize> = [0, 1].into_iter().chain(61..131).chain([20_000]).collect();
        assert_eq!(taken(&marks), expected);
        assert!(taken(&marks).is_empty());
        marks.mark_pages(0, usize::MAX);
        assert_eq!(taken(&marks).len(), 20_001);
    }

    #[test]
    fn a_mark_made_while_marks_are_taken_is_in_this_taking_or_the_next() {
        const ROUNDS: usize = 20_000;
        let marks = WriteMarks::with_len(256 * PAGE_SIZE);
        // One mark at a time and page: it is made again only after it was taken, so each must be found.
        let seen: Vec<AtomicU64> = (0..2).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for (n, seen) in seen.iter().enumerate() {
                let marks = &marks;
                scope.spawn(move || {
                    for round in 1..=ROUNDS as u64 {
                        marks.mark_pages(n, 1);
                        while seen.load(Ordering::SeqCst) < round {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let mut found = 0;
            while found < 2 * ROUNDS {
                for page in taken(&marks) {
                    seen[page].fetch_add(1, Ordering::SeqCst);
                    found += 1;
                }
            }
        });
        assert!(taken(&marks).is_empty());
    }
}
