//! Memory that comes after the guest: pages that somebody touches before they have come.
//!
//! ```text
//!   vCPU, device, kernel ──touches──▶ (missing) ──fault──▶ umbra-arrivals ──wanted──▶ whoever fetches
//!                            ▲                                    │                        │
//!                            │                                    └─ never written: zeros  │
//!                            └───────────── goes on ◀────────── arrived ◀──────────────────┘
//! ```
//!
//! Pages left behind are made holes and watched by userfaultfd before the guest's state is loaded, so that nothing of this
//! process sees what an older copy held: not a vCPU, not a device, not the kernel copying for it, and not a reader of pages
//! for the guest's next shadow, which then reads through the mapping and waits as everybody does.
//!
//! A hole that is no missing page is memory nobody ever wrote; it becomes zeros when it is touched, as it would without us.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use umbra_core::guest::{Arrivals, GuestError, PageBytes};
use umbra_units::{PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SpaceId};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::memory::Memory;
use crate::threads::{self, ThreadClass};
use crate::uffd::{MISSING_OF_SHARED, Uffd, Waiting};
use crate::worker;

/// The pages of one guest that have not come. Lives as long as its memory: if the descriptor were closed before all have
/// come, who waits would go on, and see zeros.
#[derive(Debug)]
pub(crate) struct Missing {
    /// One bit per page of the space.
    bits: Box<[AtomicU64]>,
    left: AtomicU64,
    uffd: Uffd,
    /// Ends the watch.
    quit: EventFd,
}

impl Missing {
    fn new(pages: &PageSet) -> std::io::Result<Self> {
        Ok(Self {
            bits: pages.words().iter().map(|word| AtomicU64::new(*word)).collect(),
            left: AtomicU64::new(pages.count().0),
            uffd: Uffd::new(MISSING_OF_SHARED)?,
            quit: worker::event()?,
        })
    }

    /// How many have not come.
    pub(crate) fn left(&self) -> PageCount {
        PageCount(self.left.load(Ordering::SeqCst))
    }

    fn has(&self, page: Pfn) -> bool {
        let (word, bit) = place(page);
        self.bits
            .get(word)
            .is_some_and(|word| word.load(Ordering::SeqCst) & bit != 0)
    }

    /// It is missing no longer. Answers whether it was.
    fn remove(&self, page: Pfn) -> bool {
        let (word, bit) = place(page);
        let was = self.bits[word].fetch_and(!bit, Ordering::SeqCst) & bit != 0;
        if was {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
        was
    }

    /// Nothing is waited for any more: memory is about to become all zeros, and nobody touches it.
    pub(crate) fn forget(&self) {
        for word in &self.bits {
            let were = word.swap(0, Ordering::SeqCst).count_ones();
            self.left.fetch_sub(were.into(), Ordering::SeqCst);
        }
        self.end_watch();
    }

    fn end_watch(&self) {
        // Full only after 2^64 - 2 calls that nobody heard.
        let _ = self.quit.write(1);
    }
}

fn place(page: Pfn) -> (usize, u64) {
    let word = usize::try_from(page.0 / 64).expect("a page number of mapped memory fits the address space");
    (word, 1 << (page.0 % 64))
}

/// Watches memory that comes after its guest. When it is dropped too early, who touches a missing page waits for good.
pub(crate) struct Lazy {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    memory: Arc<Memory>,
    missing: Arc<Missing>,
    /// Where each block is in this process, and its first page.
    blocks: Vec<(Range<usize>, Pfn)>,
    wanted: Mutex<Wanted>,
    news: Condvar,
}

#[derive(Default)]
struct Wanted {
    /// Pages somebody waits for, in the order of their first touch, that nobody has been told of.
    queue: VecDeque<Pfn>,
    /// Every page somebody was ever told of or will be.
    told: PageSet,
    over: bool,
}

impl Lazy {
    /// Make `pages` missing. Only while the guest is not running.
    pub(crate) fn new(memory: &Arc<Memory>, pages: &PageSet) -> Result<Self, Error> {
        memory.can_be_lazy()?;
        let failed = |source| Error::Host {
            doing: "watch for pages that are touched before they have come (userfaultfd)",
            source,
        };
        let missing = Arc::new(Missing::new(pages).map_err(failed)?);
        let shared = Arc::new(Shared {
            blocks: memory
                .blocks()
                .iter()
                .map(|block| (block.addresses(), block.first))
                .collect(),
            memory: Arc::clone(memory),
            missing: Arc::clone(&missing),
            wanted: Mutex::new(Wanted {
                told: PageSet::new(memory.space().pages),
                ..Wanted::default()
            }),
            news: Condvar::new(),
        });
        memory.make_holes(pages)?;
        for (addresses, _) in &shared.blocks {
            shared.missing.uffd.watch_missing(addresses.clone()).map_err(failed)?;
        }
        memory.awaits(missing)?;
        let watcher = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("umbra-arrivals".to_owned());
        let thread = threads::spawn(ThreadClass::Device, builder, move || watcher.run()).map_err(failed)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Arrivals for Lazy {
    fn wanted(&self, most: PageCount, patience: Duration) -> Vec<PageId> {
        let until = Instant::now() + patience;
        let mut wanted = self.shared.wanted();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if !wanted.queue.is_empty() || wanted.over || left.is_zero() {
                let most = usize::try_from(most.0).unwrap_or(usize::MAX).min(wanted.queue.len());
                return wanted.queue.drain(..most).map(PageId::ram).collect();
            }
            (wanted, _) = self
                .shared
                .news
                .wait_timeout(wanted, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn arrived(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        if page.space != SpaceId::RAM {
            return Err(GuestError::Incompatible(format!(
                "{page}: this guest has no such space"
            )));
        }
        Ok(self.shared.arrived(page.pfn, bytes)?)
    }

    fn left(&self) -> PageCount {
        self.shared.missing.left()
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.shared.missing.end_watch();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches for missing pages panicked");
        }
    }
}

impl Shared {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrived(&self, page: Pfn, bytes: &PageBytes) -> Result<(), Error> {
        if !self.missing.has(page) {
            return Ok(()); // covered by: a_page_that_comes_twice_does_not_undo_what_the_guest_wrote
        }
        let address = self.address(page)?;
        self.missing.uffd.fill(address, bytes).map_err(|source| Error::Host {
            doing: "put a page in its place",
            source,
        })?;
        self.memory.filled(page);
        // Only now: until then, whoever touches it must not be given zeros.
        self.missing.remove(page);
        if self.missing.left() == PageCount::ZERO {
            self.missing.end_watch();
        }
        Ok(())
    }

    fn address(&self, page: Pfn) -> Result<usize, Error> {
        let place = self.blocks.iter().find_map(|(addresses, first)| {
            let offset = usize::try_from(page.0.checked_sub(first.0)?)
                .ok()?
                .checked_mul(PAGE_SIZE)?;
            (offset < addresses.len()).then(|| addresses.start + offset)
        });
        place.ok_or_else(|| Error::Incompatible(format!("page {page}: this guest has no such page")))
    }

    fn page(&self, address: usize) -> Option<Pfn> {
        self.blocks.iter().find_map(|(addresses, first)| {
            let offset = addresses.contains(&address).then(|| address - addresses.start)?;
            Some(*first + PageCount((offset / PAGE_SIZE) as u64))
        })
    }

    /// The thread: until all have come, or nobody waits for them any more.
    fn run(&self) {
        if let Err(error) = self.watch() {
            tracing::error!(%error, "cannot watch for missing pages any more: whoever touches one waits for good");
        }
        let mut wanted = self.wanted();
        wanted.over = true;
        drop(wanted);
        self.news.notify_all();
    }

    fn watch(&self) -> std::io::Result<()> {
        let epoll = Epoll::new()?;
        for (number, fd) in [(0, self.missing.quit.as_raw_fd()), (1, self.missing.uffd.as_raw_fd())] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, number))?;
        }
        let mut events = [EpollEvent::default(); 2];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if events[..count].iter().any(|event| event.data() == 0) {
                break;
            }
            while let Some(waiting) = self.missing.uffd.waiting()? {
                self.fault(waiting)?;
            }
        }
        if self.missing.left() == PageCount::ZERO {
            for (addresses, _) in &self.blocks {
                self.missing.uffd.forget(addresses.clone())?;
            }
        }
        Ok(())
    }

    fn fault(&self, waiting: Waiting) -> std::io::Result<()> {
        let Some(page) = self.page(waiting.address) else {
            return Ok(()); // not ours: only our blocks are watched
        };
        if !self.missing.has(page) {
            // Memory nobody wrote; or it came a moment ago, and then this does nothing.
            self.missing.uffd.fill_zeros(waiting.address)?;
            return Ok(());
        }
        let mut wanted = self.wanted();
        if wanted.told.insert(page) {
            wanted.queue.push_back(page);
            drop(wanted);
            self.news.notify_all();
        }
        Ok(())
    }
}

/// What a memory knows of pages that have not come: nothing, for almost every guest.
pub(crate) type Awaited = OnceLock<Arc<Missing>>;

#[cfg(test)]
mod tests {
    use super::*;

    use umbra_units::{Bytes, Gpa};

    use crate::config::{Backing, Shape, Sharing};

    const PATIENCE: Duration = Duration::from_secs(30);

    fn memory(sharing: Sharing) -> Arc<Memory> {
        Arc::new(Memory::new(Shape::new(1, Bytes::mib(8), sharing).unwrap()).unwrap())
    }

    fn pages(numbers: &[u64]) -> PageSet {
        let mut set = PageSet::new(PageCount(2048));
        for page in numbers {
            set.insert(Pfn(*page));
        }
        set
    }

    fn first_bytes(memory: &Memory, numbers: &[u64]) -> Vec<u8> {
        let pfns: Vec<Pfn> = numbers.iter().copied().map(Pfn).collect();
        let mut out = Vec::new();
        memory.read_pages(&pfns, &mut out).unwrap();
        out.chunks(PAGE_SIZE).map(|page| page[0]).collect()
    }

    #[test]
    fn who_touches_a_missing_page_waits_for_it_and_sees_what_came() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let memory = memory(sharing);
            for page in [3, 4, 9] {
                memory.apply_page(Pfn(page), &[1; PAGE_SIZE]).unwrap();
            }
            let lazy = Lazy::new(&memory, &pages(&[3, 4, 700])).unwrap();
            let reader = std::thread::spawn({
                let memory = Arc::clone(&memory);
                move || first_bytes(&memory, &[9, 3, 10, 700, 4])
            });
            for (page, byte) in [(3, 33), (700, 70), (4, 44)] {
                assert_eq!(
                    lazy.wanted(PageCount(8), PATIENCE),
                    [PageId::ram(Pfn(page))],
                    "{sharing:?}"
                );
                lazy.arrived(PageId::ram(Pfn(page)), &[byte; PAGE_SIZE]).unwrap();
            }
            assert_eq!(
                reader.join().unwrap(),
                [1, 33, 0, 70, 44],
                "{sharing:?}: an old copy is never seen"
            );
            assert_eq!(lazy.left(), PageCount::ZERO);
            // All have come: nobody waits for anything any more.
            assert!(lazy.wanted(PageCount(8), PATIENCE).is_empty());
            assert_eq!(first_bytes(&memory, &[11, 2047]), [0, 0]);
        }
    }

    #[test]
    fn a_page_that_comes_twice_does_not_undo_what_the_guest_wrote() {
        for sharing in [Sharing::Shared, Sharing::Private] {
            let memory = memory(sharing);
            let lazy = Lazy::new(&memory, &pages(&[5, 6])).unwrap();
            let page = PageId::ram(Pfn(5));
            lazy.arrived(page, &[1; PAGE_SIZE]).unwrap();
            memory.write(Gpa(0x5000), &[2]).unwrap();
            lazy.arrived(page, &[1; PAGE_SIZE]).unwrap();
            assert_eq!(first_bytes(&memory, &[5]), [2]);
            // Nor if it was given back meanwhile: what is a hole again is zeros, and no page of before.
            memory.discard(Pfn(5), PageCount(1)).unwrap();
            lazy.arrived(page, &[1; PAGE_SIZE]).unwrap();
            assert_eq!(first_bytes(&memory, &[5]), [0]);
            assert_eq!(lazy.left(), PageCount(1));
        }
    }

    #[test]
    fn what_has_not_come_is_no_hole_for_the_next_shadow() {
        let memory = memory(Sharing::Shared);
        let lazy = Lazy::new(&memory, &pages(&[5])).unwrap();
        assert!(memory.holes().is_empty(), "nobody knows while pages are missing");
        lazy.arrived(PageId::ram(Pfn(5)), &[1; PAGE_SIZE]).unwrap();
        assert_eq!(memory.holes().count(), PageCount(2047));
    }

    #[test]
    fn memory_that_is_cleared_waits_for_nothing() {
        let memory = memory(Sharing::Shared);
        let lazy = Lazy::new(&memory, &pages(&[5, 6])).unwrap();
        memory.clear().unwrap();
        assert_eq!(first_bytes(&memory, &[5, 6]), [0, 0]);
        assert_eq!(lazy.left(), PageCount::ZERO);
        lazy.arrived(PageId::ram(Pfn(5)), &[1; PAGE_SIZE]).unwrap();
        assert_eq!(first_bytes(&memory, &[5]), [0]);
    }

    #[test]
    fn memory_that_was_taken_at_the_start_is_refused_and_so_is_a_second_time() {
        let shape = Shape::new(1, Bytes::mib(8), Sharing::Shared).unwrap();
        let backing = Backing {
            prefault: true,
            ..Backing::default()
        };
        let taken = Arc::new(Memory::backed_by(shape, backing).unwrap());
        let refused = Lazy::new(&taken, &pages(&[1])).err().unwrap().to_string();
        assert!(
            refused.starts_with("memory: huge pages and memory taken at the start"),
            "{refused}"
        );
        let memory = memory(Sharing::Shared);
        let _first = Lazy::new(&memory, &pages(&[1])).unwrap();
        assert!(Lazy::new(&memory, &pages(&[2])).is_err());
    }
}
