//! The codec both ways: whatever a guest's pages go through, the shadow's are the same afterwards; and whatever bytes arrive,
//! they are refused at worst.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Mutex;

use proptest::prelude::*;
use umbra_core::batch::{Batch, BatchWriter, PageCounts};
use umbra_core::digest::PageHash;
use umbra_core::error::Fault;
use umbra_core::guest::{Guest, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_core::ledger::{Base, Owed};
use umbra_core::pack::{Level, Method, Packer};
use umbra_core::page::{Dup, Encoding};
use umbra_core::shadow::Image;
use umbra_core::source::{Encoder, Plan};
use umbra_units::{BatchId, Bytes, Epoch, PAGE_SIZE, PageCount, PageId, Pfn, Rng, SpaceId};

/// Memory of several spaces, and nothing else.
struct Flat {
    spaces: Vec<Space>,
    pages: Mutex<BTreeMap<PageId, Box<PageBytes>>>,
}

impl Flat {
    fn new(sizes: &[(u16, u64)]) -> Self {
        let space = |(id, pages): &(u16, u64)| Space {
            id: SpaceId(*id),
            ..Space::ram(PageCount(*pages))
        };
        Self {
            spaces: sizes.iter().map(space).collect(),
            pages: Mutex::default(),
        }
    }

    fn set(&self, page: PageId, content: &PageBytes) {
        self.pages.lock().unwrap().insert(page, Box::new(*content));
    }

    fn get(&self, page: PageId) -> PageBytes {
        self.pages
            .lock()
            .unwrap()
            .get(&page)
            .map_or([0; PAGE_SIZE], |content| **content)
    }
}

impl PageReader for Flat {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        let page = |pfn: &Pfn| self.get(PageId { space, pfn: *pfn });
        pages.iter().for_each(|pfn| out.extend_from_slice(&page(pfn)));
        Ok(())
    }
}

impl Guest for Flat {
    fn spaces(&self) -> Vec<Space> {
        self.spaces.clone()
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        *out = self.get(page);
        Ok(())
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        self.set(page, bytes);
        Ok(())
    }

    fn describe(&self) -> StateRecord {
        unreachable!("only its pages are asked for")
    }

    fn track(&self, _on: bool) -> Result<(), GuestError> {
        Ok(())
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        Ok(Harvest::default())
    }

    fn put_back(&self, _harvest: &Harvest) {}

    fn pause(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        Ok(Vec::new())
    }

    fn restore(&self, _records: &[StateRecord]) -> Result<(), GuestError> {
        Ok(())
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}

const METHODS: [Method; 4] = [
    Method::None,
    Method::Lz4,
    Method::Zstd(Level::QUICK),
    Method::Zstd(Level::TIGHT),
];

/// A source and a shadow that walk through contents together.
struct Walk {
    rng: Rng,
    here: Flat,
    there: Flat,
    encoder: Encoder,
    image: Image,
    packer: Packer,
    batch: u64,
    counts: PageCounts,
}

impl Walk {
    fn new(seed: u64, sizes: &[(u16, u64)], cache_pages: u64) -> Self {
        let (here, there) = (Flat::new(sizes), Flat::new(sizes));
        let cache = Bytes(cache_pages * PAGE_SIZE as u64);
        Self {
            rng: Rng::new(seed),
            encoder: Encoder::new(&here.spaces(), cache).keyed(seed),
            image: Image::new(&there.spaces()),
            here,
            there,
            packer: Packer::new(),
            batch: 0,
            counts: PageCounts::default(),
        }
    }

    fn page(&mut self) -> PageId {
        let space = self.rng.below(self.here.spaces.len() as u64);
        let space = &self.here.spaces[usize::try_from(space).unwrap()];
        let pfn = Pfn(self.rng.below(space.pages.0));
        PageId { space: space.id, pfn }
    }

    /// One of the things that happen to a page.
    fn write(&mut self) -> PageId {
        let page = self.page();
        let mut content = self.here.get(page);
        match self.rng.below(8) {
            0 => content.fill(0),
            1 => {
                let other = self.page();
                content = self.here.get(other);
            }
            2 => content.fill(u8::try_from(self.rng.below(3)).unwrap()),
            3 => self.rng.fill(&mut content),
            4 => {} // written with what it held
            _ => {
                for _ in 0..=self.rng.below(40) {
                    let at = usize::try_from(self.rng.below(PAGE_SIZE as u64)).unwrap();
                    content[at] = content[at].wrapping_add(1);
                }
            }
        }
        self.here.set(page, &content);
        page
    }

    /// What is shipped of these pages, as it travels.
    fn encode(&mut self, pages: Vec<Owed>) -> Vec<u8> {
        self.batch += 1;
        let plan = Plan {
            batch: BatchId(self.batch),
            epoch: Epoch(1),
            pages,
            owed_after: PageCount(0),
            urgent: false,
            captured: false,
            close: None,
            attempt: None,
        };
        let draft = self.encoder.draft(plan, &self.here).unwrap();
        self.counts.add(&draft.counts());
        let method = METHODS[usize::try_from(self.rng.below(4)).unwrap()];
        draft.pack(method, &mut self.packer).0
    }

    fn step(&mut self) {
        let mut pages: Vec<PageId> = (0..=self.rng.below(30)).map(|_| self.write()).collect();
        pages.sort_unstable();
        pages.dedup();
        let owed = pages.into_iter().map(|page| {
            // Now and then the shadow has lost a page, and nobody knows what it holds.
            let base = if self.rng.below(20) == 0 {
                Base::Unknown
            } else {
                Base::Shipped
            };
            Owed { page, base }
        });
        let owed = owed.collect::<Vec<_>>();
        for owed in owed.iter().filter(|owed| owed.base == Base::Unknown) {
            let mut garbage = [0; PAGE_SIZE];
            self.rng.fill(&mut garbage);
            self.there.set(owed.page, &garbage);
        }
        let bytes = self.encode(owed);
        self.image.apply(Batch::parse(&bytes).unwrap(), &self.there).unwrap();
    }

    fn check(&self) {
        for space in &self.here.spaces {
            for pfn in (0..space.pages.0).map(Pfn) {
                let page = PageId { space: space.id, pfn };
                assert_eq!(self.here.get(page), self.there.get(page), "{page}");
                let hash = PageHash::of(&self.here.get(page));
                assert_eq!(self.encoder.shipped_hash(page), Some(hash), "{page}");
            }
        }
        assert_eq!(self.encoder.digest(), self.image.digest());
    }
}

#[test]
fn whatever_is_written_the_shadow_has_it_and_in_every_way_there_is() {
    let mut walk = Walk::new(1, &[(0, 300), (3, 20), (7, 1)], 100);
    (0..300).for_each(|_| walk.step());
    walk.check();
    let PageCounts {
        same,
        zero,
        delta,
        raw,
        dup,
    } = walk.counts;
    assert!(
        [same, zero, delta, raw, dup].iter().all(|count| *count > 100),
        "{:?}",
        walk.counts
    );
    let cache = walk.encoder.cache_counts();
    assert!(
        cache.hits == delta && cache.misses > 0 && cache.useless > 0 && cache.evictions > 0,
        "{cache:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn the_shadow_equals_the_source_after_any_walk(
        seed: u64,
        ram in 1u64..100,
        disk in 1u64..30,
        cache in prop::sample::select(&[0u64, 1, 5, 60, 1_000]),
        steps in 1usize..60,
    ) {
        let mut walk = Walk::new(seed, &[(0, ram), (9, disk)], cache);
        for _ in 0..steps {
            walk.step();
            walk.check();
        }
    }

    #[test]
    fn a_damaged_batch_is_refused_or_changes_nothing_it_should_not(
        seed: u64,
        flips in prop::collection::vec((any::<u16>(), 0u32..8), 1..4),
        cut in prop::option::of(any::<u16>()),
    ) {
        let mut walk = Walk::new(seed, &[(0, 40), (9, 10)], 20);
        (0..8).for_each(|_| walk.step());
        let pages: Vec<PageId> = (0..10).map(|_| walk.write()).collect();
        let owed = |page: &PageId| Owed { page: *page, base: Base::Shipped };
        let mut bytes = walk.encode(pages.iter().map(owed).collect());
        for (at, bit) in flips {
            let at = usize::from(at) % bytes.len();
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(usize::from(cut) % bytes.len());
        }
        // Whatever it is now, every page is what some hash said it should be, or as it was.
        if let Ok(batch) = Batch::parse(&bytes) {
            let _ = walk.image.apply(batch, &walk.there);
            prop_assert!(walk.image.audit(&walk.there).unwrap().is_empty());
        }
    }
}

/// A batch of one page, made by hand.
fn by_hand(encoding: Encoding, content: &PageBytes, payload: &[u8]) -> Batch {
    let mut writer = BatchWriter::new(BatchId(1), Epoch(1), 0);
    let page = PageId::ram(Pfn(1));
    writer.page(page, PageHash::of(content), encoding, |out| {
        out.put(payload);
    });
    Batch::parse(&writer.finish(false)).unwrap()
}

#[test]
fn a_copy_of_what_the_shadow_does_not_hold_is_refused() {
    let content = [5; PAGE_SIZE];
    let dup = |of: PageId| {
        let mut payload = umbra_units::Writer::new();
        Dup::new(of, &content).write(&mut payload);
        by_hand(Encoding::Dup, &content, payload.as_slice())
    };
    let there = Flat::new(&[(0, 10)]);
    let apply = |batch: Batch| Image::new(&there.spaces()).apply(batch, &there);
    let refused = |batch: Batch, why: &str| match apply(batch) {
        Err(Fault::PeerMisbehaved(text)) => assert!(text.contains(why), "{text}"),
        other => panic!("{other:?}"),
    };
    let elsewhere = PageId {
        space: SpaceId(4),
        pfn: Pfn(2),
    };
    refused(dup(PageId::ram(Pfn(2))), "page 0x1 of batch 1 is no copy of page 0x2");
    refused(
        dup(PageId::ram(Pfn(10))),
        "it named page 0xa, which the guest does not have",
    );
    refused(
        dup(elsewhere),
        "it named page 0x2 of space 4, which the guest does not have",
    );
    assert_eq!(there.get(PageId::ram(Pfn(1))), [0; PAGE_SIZE], "nothing was written");

    there.set(PageId::ram(Pfn(2)), &content);
    assert_eq!(apply(dup(PageId::ram(Pfn(2)))).unwrap().counts.dup, 1);
    assert_eq!(there.get(PageId::ram(Pfn(1))), content);
}

#[test]
fn a_page_that_ships_again_before_anything_was_acknowledged_is_a_delta() {
    let mut walk = Walk::new(5, &[(0, 4)], 4);
    let page = PageId::ram(Pfn(2));
    let mut batches = Vec::new();
    for version in 1..=4 {
        let mut content = [7; PAGE_SIZE];
        content[100] = version;
        walk.here.set(page, &content);
        batches.push(walk.encode(vec![Owed {
            page,
            base: Base::Shipped,
        }]));
    }
    assert_eq!((walk.counts.raw, walk.counts.delta), (2, 2));
    // All of them were under way at once.
    for bytes in batches {
        walk.image.apply(Batch::parse(&bytes).unwrap(), &walk.there).unwrap();
    }
    walk.check();
}

#[test]
fn a_copy_may_be_of_a_page_of_the_same_batch_and_of_another_space() {
    let mut walk = Walk::new(6, &[(0, 8), (1, 8)], 0);
    let (a, b, c) = (
        PageId::ram(Pfn(3)),
        PageId::ram(Pfn(5)),
        PageId {
            space: SpaceId(1),
            pfn: Pfn(0),
        },
    );
    let mut content = [0; PAGE_SIZE];
    Rng::new(9).fill(&mut content);
    [a, b, c].iter().for_each(|page| walk.here.set(*page, &content));
    let owed = |page| Owed {
        page,
        base: Base::Shipped,
    };
    let bytes = walk.encode(vec![owed(a), owed(b), owed(c)]);
    assert_eq!((walk.counts.raw, walk.counts.dup), (1, 2));
    walk.image.apply(Batch::parse(&bytes).unwrap(), &walk.there).unwrap();
    walk.check();

    // The one they were copied from changes, and then another page gets its old content.
    walk.here.set(a, &[1; PAGE_SIZE]);
    walk.here.set(PageId::ram(Pfn(7)), &content);
    let bytes = walk.encode(vec![owed(a), owed(PageId::ram(Pfn(7)))]);
    walk.image.apply(Batch::parse(&bytes).unwrap(), &walk.there).unwrap();
    walk.check();
}
