//! A guest that is nothing but pages, a write log and a counter: the [`Guest`] contract without a hypervisor.
//!
//! It has what makes real guests hard. Its writes reach one of two logs (the processor's and the devices'). While it
//! runs, a page may be read half before and half after a write. Saving its devices writes to its memory. A harvest may
//! fail with half of the log gone. It also keeps the hash of every page, so that the oracle compares two memories in
//! no time, and it notes when somebody treats it as the contract forbids.

use std::sync::{Arc, Mutex, MutexGuard};

use umbra_core::digest::PageHash;
use umbra_core::guest::{Guest, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_units::{PAGE_SIZE, PageId, PageSet, Pfn, Rng, SpaceId};

use crate::program::{Content, Program};

/// Which pages a guest has, numbered through.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) spaces: Vec<Space>,
    /// The present pages of all spaces, in order.
    pub(crate) pages: Vec<PageId>,
}

impl Layout {
    pub(crate) fn new(spaces: Vec<Space>) -> Self {
        let pages = spaces
            .iter()
            .flat_map(|space| {
                let present: Vec<Pfn> = space.present_set().iter().collect();
                present.into_iter().map(|pfn| PageId { space: space.id, pfn })
            })
            .collect();
        Self { spaces, pages }
    }

    fn index(&self, page: PageId) -> Option<usize> {
        self.pages.binary_search(&page).ok()
    }

    fn nothing(&self) -> Harvest {
        let sets = self.spaces.iter().map(|space| (space.id, PageSet::new(space.pages)));
        Harvest { dirty: sets.collect() }
    }

    fn harvest_of(&self, pages: impl Iterator<Item = bool>) -> Harvest {
        let mut harvest = self.nothing();
        for (page, _) in self.pages.iter().zip(pages).filter(|(_, is_in)| *is_in) {
            let (_, set) = harvest
                .dirty
                .iter_mut()
                .find(|(space, _)| *space == page.space)
                .expect("one set per space");
            set.insert(page.pfn);
        }
        harvest
    }
}

/// What a guest can be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// Built, and never ran.
    Twin,
    /// A twin that took on state.
    Restored,
    Running,
    Paused,
}

/// How this copy of the guest behaves where the contract leaves it free.
#[derive(Debug, Clone)]
pub(crate) struct Manners {
    /// Chance that a page is read while it is being written.
    pub(crate) tear: f64,
    /// Pages that saving the devices writes, at most.
    pub(crate) save_writes: u64,
    /// Whether the first harvest after tracking began reports everything.
    pub(crate) all_dirty_at_first: bool,
    /// Whether it says which pages nobody ever touched.
    pub(crate) knows_untouched: bool,
    /// Chance that a write is missing from the log: a hypervisor's bug, for audits to find.
    pub(crate) forget: f64,
}

/// One copy of the guest.
#[derive(Debug)]
pub(crate) struct FakeGuest {
    pub(crate) layout: Arc<Layout>,
    manners: Manners,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    pages: Vec<Page>,
    life: Life,
    tracking: bool,
    /// A harvest failed with part of the log gone: the next one must report everything.
    log_lost: bool,
    /// The "registers": changes whenever the guest runs, so that an old state is told from a new one.
    ticks: u64,
    fail_next: bool,
    holds_disks: bool,
    misuse: Option<String>,
    rng: Rng,
}

#[derive(Debug)]
struct Page {
    bytes: Box<PageBytes>,
    hash: PageHash,
    older: Option<Box<PageBytes>>,
    touched: bool,
    /// In the processor's log.
    by_cpu: bool,
    /// In the devices' bitmap.
    by_device: bool,
    /// Given back by somebody who harvested it.
    given_back: bool,
    /// Written without a log entry.
    forgotten: bool,
}

/// Everything about a guest at one instant.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) pages: Vec<PageBytes>,
    pub(crate) ticks: u64,
}

impl FakeGuest {
    /// A guest of zeros that does not run.
    pub(crate) fn new(layout: Arc<Layout>, manners: Manners, rng: Rng) -> Self {
        let page = || Page {
            bytes: Box::new([0; PAGE_SIZE]),
            hash: PageHash::zero(),
            older: None,
            touched: false,
            by_cpu: false,
            by_device: false,
            given_back: false,
            forgotten: false,
        };
        let inner = Inner {
            pages: layout.pages.iter().map(|_| page()).collect(),
            life: Life::Twin,
            tracking: false,
            log_lost: false,
            ticks: 0,
            fail_next: false,
            holds_disks: false,
            misuse: None,
            rng,
        };
        Self {
            layout,
            manners,
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("one thread, and it does not panic while it holds this")
    }

    /// Run for an instant: write what the program says.
    pub(crate) fn run(&self, program: &Program, wild: bool, rng: &mut Rng) {
        let mut inner = self.lock();
        if inner.life == Life::Running {
            inner.ticks += 1;
            for (page, content) in program.writes(inner.pages.len(), inner.ticks, rng) {
                let by_device = rng.chance(0.1);
                let forget = wild && self.manners.forget > 0.0 && rng.chance(self.manners.forget);
                inner.write(page, content, by_device, forget, rng);
            }
        }
    }

    /// Begin with some memory already written, as a guest that has run for a while.
    pub(crate) fn boot(&self, filled: f64, rng: &mut Rng) {
        let mut inner = self.lock();
        for page in 0..inner.pages.len() {
            if rng.chance(filled) {
                inner.write(page, Content::Random, false, false, rng);
            }
        }
        inner.life = Life::Running;
        inner.holds_disks = true;
    }

    /// The next call that can fail will.
    pub(crate) fn fail_next(&self) {
        self.lock().fail_next = true;
    }

    /// It did not come to that.
    pub(crate) fn fail_no_more(&self) {
        self.lock().fail_next = false;
    }

    pub(crate) fn life(&self) -> Life {
        self.lock().life
    }

    pub(crate) fn is_running(&self) -> bool {
        self.life() == Life::Running
    }

    /// Whether it has what only one copy may have: from when it first ran until it was given up.
    pub(crate) fn holds_disks(&self) -> bool {
        self.lock().holds_disks
    }

    /// What somebody did that the contract forbids.
    pub(crate) fn misuse(&self) -> Option<String> {
        self.lock().misuse.clone()
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        Snapshot {
            pages: inner.pages.iter().map(|page| *page.bytes).collect(),
            ticks: inner.ticks,
        }
    }

    /// The first page that is not as in `snapshot`, byte for byte, and whether the counter is.
    pub(crate) fn differs_from(&self, snapshot: &Snapshot) -> Option<String> {
        if let Some(page) = self.memory_differs_from(snapshot) {
            return Some(page);
        }
        let inner = self.lock();
        (inner.ticks != snapshot.ticks).then(|| {
            format!(
                "its state is from tick {}, the cut was at tick {}",
                inner.ticks, snapshot.ticks
            )
        })
    }

    /// The first page that is not as in `snapshot`, byte for byte.
    pub(crate) fn memory_differs_from(&self, snapshot: &Snapshot) -> Option<String> {
        let inner = self.lock();
        let pages = inner.pages.iter().zip(&snapshot.pages).zip(&self.layout.pages);
        for ((page, cut), id) in pages {
            if *page.bytes != *cut {
                return Some(format!("{id} is not as it was at the cut"));
            }
        }
        None
    }

    /// Pages of this guest that differ from `other`'s, although they are in no log and not in `known`.
    pub(crate) fn unknown_differences(&self, other: &Self, known: &[&Harvest]) -> Option<PageId> {
        let (mine, theirs) = (self.lock(), other.lock());
        if mine.tracking && mine.log_lost {
            return None;
        }
        let differ = mine.pages.iter().zip(&theirs.pages).zip(&self.layout.pages);
        differ
            .filter(|((mine, theirs), _)| mine.hash != theirs.hash && !mine.is_logged() && !mine.forgotten)
            .map(|(_, id)| *id)
            .find(|id| {
                let names_it = |harvest: &&Harvest| {
                    harvest
                        .dirty
                        .iter()
                        .any(|(space, set)| *space == id.space && set.contains(id.pfn))
                };
                !known.iter().any(names_it)
            })
    }

    /// Whether the next harvest will find something.
    pub(crate) fn has_unharvested(&self) -> bool {
        let inner = self.lock();
        inner.log_lost || inner.pages.iter().any(Page::is_logged)
    }
}

impl Page {
    const fn is_logged(&self) -> bool {
        self.by_cpu || self.by_device || self.given_back
    }

    fn set(&mut self, new: Box<PageBytes>) {
        self.hash = PageHash::of(&new);
        self.older = Some(std::mem::replace(&mut self.bytes, new));
        self.touched = true;
    }
}

impl Inner {
    fn write(&mut self, at: usize, content: Content, by_device: bool, forget: bool, rng: &mut Rng) {
        let page = &mut self.pages[at];
        // The buffer of the older content becomes the newer one: writing allocates nothing.
        let had_older = page.older.is_some();
        let mut new = page.older.take().unwrap_or_else(|| page.bytes.clone());
        match content {
            Content::Zeros => new.fill(0),
            Content::Random => rng.fill(&mut new[..]),
            Content::Counter => {
                new.copy_from_slice(&page.bytes[..]);
                let slot = usize::try_from(rng.below(4)).expect("small") * 1_000;
                let word = &mut new[slot..slot + 8];
                let count = u64::from_le_bytes((&*word).try_into().expect("eight bytes"));
                word.copy_from_slice(&count.wrapping_add(1).to_le_bytes());
            }
            Content::Older if had_older => {}
            Content::Older | Content::Same => new.copy_from_slice(&page.bytes[..]),
        }
        page.set(new);
        if forget && self.tracking {
            page.forgotten = true;
            return;
        }
        page.forgotten = false;
        if by_device {
            page.by_device = true;
        } else if self.tracking {
            page.by_cpu = true;
        }
    }

    fn may_fail(&mut self, what: &str) -> Result<(), GuestError> {
        if std::mem::take(&mut self.fail_next) {
            return Err(GuestError::Host(format!("{what} failed, as drawn")));
        }
        Ok(())
    }

    fn misused(&mut self, what: String) {
        self.misuse.get_or_insert(what);
    }
}

impl PageReader for FakeGuest {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.may_fail("read")?;
        let mut rng = inner.rng.fork();
        let torn = inner.life == Life::Running && rng.chance(self.manners.tear);
        let victim = rng.below(pages.len().max(1) as u64);
        for (n, pfn) in pages.iter().enumerate() {
            let index = self
                .layout
                .index(PageId { space, pfn: *pfn })
                .ok_or_else(|| GuestError::Malformed(format!("there is no page {pfn}")))?;
            let (first, second) = (PAGE_SIZE / 2, PAGE_SIZE);
            out.extend_from_slice(&inner.pages[index].bytes[..first]);
            if torn && n as u64 == victim {
                inner.ticks += 1;
                inner.write(index, Content::Random, false, false, &mut rng);
            }
            out.extend_from_slice(&inner.pages[index].bytes[first..second]);
        }
        Ok(())
    }
}

impl Guest for FakeGuest {
    fn describe(&self) -> StateRecord {
        StateRecord {
            kind: "fake".to_owned(),
            version: 1,
            bytes: Vec::new(),
        }
    }

    fn spaces(&self) -> Vec<Space> {
        self.layout.spaces.clone()
    }

    fn track(&self, on: bool) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.may_fail("track")?;
        let fresh = on && !inner.tracking;
        inner.tracking = on;
        for page in &mut inner.pages {
            if fresh {
                page.by_cpu = self.manners.all_dirty_at_first;
            } else if !on {
                page.by_cpu = false;
                page.forgotten = false;
            }
        }
        Ok(())
    }

    fn untouched(&self) -> Harvest {
        let inner = self.lock();
        if self.manners.knows_untouched {
            self.layout.harvest_of(inner.pages.iter().map(|page| !page.touched))
        } else {
            Harvest::default()
        }
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        let mut inner = self.lock();
        if !inner.tracking {
            return Err(GuestError::WrongState("nothing is recorded"));
        }
        if inner.fail_next {
            // One log was read and cleared, the other was not.
            inner.pages.iter_mut().for_each(|page| page.by_cpu = false);
            inner.log_lost = true;
        }
        inner.may_fail("harvest")?;
        let all = std::mem::take(&mut inner.log_lost);
        let harvest = self
            .layout
            .harvest_of(inner.pages.iter().map(|page| all || page.is_logged()));
        for page in &mut inner.pages {
            (page.by_cpu, page.by_device, page.given_back) = (false, false, false);
        }
        Ok(harvest)
    }

    fn put_back(&self, harvest: &Harvest) {
        let mut inner = self.lock();
        for (space, set) in &harvest.dirty {
            for pfn in set.iter() {
                if let Some(index) = self.layout.index(PageId { space: *space, pfn }) {
                    inner.pages[index].given_back = true;
                }
            }
        }
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        let mut inner = self.lock();
        if inner.life == Life::Running {
            inner.misused(format!("{page} read singly while the guest runs"));
        }
        let index = self
            .layout
            .index(page)
            .ok_or_else(|| GuestError::Malformed(format!("there is no {page}")))?;
        out.copy_from_slice(&inner.pages[index].bytes[..]);
        Ok(())
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.may_fail("apply")?;
        if inner.life == Life::Running {
            inner.misused(format!("{page} overwritten while the guest runs"));
        }
        let index = self
            .layout
            .index(page)
            .ok_or_else(|| GuestError::Malformed(format!("there is no {page}")))?;
        let page = &mut inner.pages[index];
        let mut new = page.older.take().unwrap_or_else(|| page.bytes.clone());
        new.copy_from_slice(bytes);
        page.set(new);
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.may_fail("pause")?;
        if inner.life == Life::Running {
            inner.life = Life::Paused;
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.may_fail("resume")?;
        if inner.life == Life::Twin {
            inner.misused("resumed without state".to_owned());
        }
        inner.life = Life::Running;
        inner.holds_disks = true;
        Ok(())
    }

    fn give_up(&self) {
        let mut inner = self.lock();
        if inner.life != Life::Paused {
            inner.misused("given up while it was not paused".to_owned());
        }
        inner.holds_disks = false;
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        let mut inner = self.lock();
        if inner.life != Life::Paused {
            return Err(GuestError::WrongState("only a paused guest can be saved"));
        }
        inner.may_fail("save")?;
        let mut rng = inner.rng.fork();
        for _ in 0..self.manners.save_writes {
            let at = usize::try_from(rng.below(inner.pages.len() as u64)).expect("an index");
            inner.write(at, Content::Counter, true, false, &mut rng);
        }
        let record = |kind: &str, bytes: Vec<u8>| StateRecord {
            kind: kind.to_owned(),
            version: 1,
            bytes,
        };
        Ok(vec![
            record("vcpu/0", inner.ticks.to_le_bytes().to_vec()),
            record("serial/0", vec![7; 40]),
        ])
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        let mut inner = self.lock();
        inner.may_fail("restore")?;
        if inner.life == Life::Running || inner.life == Life::Paused {
            let life = inner.life;
            inner.misused(format!("restored in the life {life:?}"));
        }
        let vcpu = records.iter().find(|record| record.kind == "vcpu/0");
        let bytes = vcpu.and_then(|record| record.bytes.clone().try_into().ok());
        let bytes = bytes.ok_or_else(|| GuestError::Malformed("no vcpu/0".to_owned()))?;
        inner.ticks = u64::from_le_bytes(bytes);
        inner.life = Life::Restored;
        Ok(())
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}
