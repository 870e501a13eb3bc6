//! Captured by write protection: the guest runs on at once, and each page is copied before it is written.
//!
//! ```text
//!   capture (paused)      protect all ranges ──▶ the guest runs on
//!   capture/copy          copies one chunk after the other, then lets go of its ranges
//!   capture/fault         a writer faults ──▶ copy its page, let go of it: the writer goes on
//!   read_pages            copies what nobody has copied yet
//!   drop                  lets go of all that is left
//! ```
//!
//! # Who may wait for whom
//!
//! Any thread but two may be stopped in the middle of a write to guest memory until its page was copied: a vCPU, a
//! device's worker, the kernel on behalf of either. The two are those here. They only ever *read* guest memory, which
//! protection does not hinder, and the locks they take are never held over a write to it:
//!
//! - `live`, over everything that protects pages or lets go of them. Letting go by an outdated decision would let a
//!   write pass that a *newer* capture has to see first; so whoever lets go makes sure, under this lock, that the
//!   capture it does so for is still the one.
//! - a chunk's own, over copying pages of that chunk. Taken after `live` or without it, never before.
//!
//! Who handles a fault is not kept waiting by who copies ahead: that one takes a chunk's lock for a few pages at a time,
//! and first lets those pass that wait at a fault.
//!
//! # One at a time
//!
//! A page that two captures want would have to be copied for both before it is let go. It is not worth the trouble: when a
//! second one begins, inside a pause, what is left of the first is copied there and then.
//!
//! # Memory that is given back
//!
//! Protection sees writes. A guest whose balloon gives pages back, or that is booted again, has holes made in its memory,
//! which no fault tells of. Whoever makes them says so first ([`Memory::before_discard`]), and those pages are copied.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use umbra_core::guest::{CaptureBy, Captured, GuestError, PageReader};
use umbra_units::{PAGE_SIZE, Pfn, SpaceId};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::chunks::{CHUNK, Chunk, Pool};
use super::plan::Plan;
use super::{NOT_CAPTURED, only_ram};
use crate::error::Error;
use crate::memory::Memory;
use crate::threads::{self, ThreadClass};
use crate::uffd::Uffd;

/// Pages copied ahead under one lock: some ten microseconds, for which a fault may have to wait.
const PIECE: usize = 32;

/// Protects one guest's memory. Has two threads, which end with it.
pub(super) struct Protector {
    shared: Arc<Shared>,
    jobs: Option<Sender<Weak<Kept>>>,
    over: EventFd,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    uffd: Arc<Uffd>,
    memory: Arc<Memory>,
    /// The capture whose pages are protected. Whatever protects pages or lets go of them holds this lock.
    live: Mutex<Option<Arc<Kept>>>,
    /// The userfaultfd knows of this memory. From the first protection on, not before: the kernel gives watched memory no
    /// new large pages. Changed under the lock.
    watched: AtomicBool,
    /// Threads that wait for a lock because somebody waits at a fault.
    urgent: AtomicUsize,
    faults: AtomicU64,
}

/// What a capture keeps, copied or still protected.
struct Kept {
    plan: Arc<Plan>,
    chunks: Box<[Mutex<Place>]>,
    memory: Arc<Memory>,
    pool: Arc<Pool>,
    /// Nobody will read it any more.
    dropped: AtomicBool,
}

#[derive(Default)]
struct Place {
    chunk: Option<Chunk>,
    /// A bit per page that was copied.
    copied: [u64; CHUNK / 64],
    /// Why one could not be: what was captured is then worth nothing, and the guest goes on all the same.
    failed: Option<GuestError>,
}

/// A capture, to whoever asked for it.
pub(super) struct ProtectedPages {
    kept: Arc<Kept>,
    protector: Arc<Protector>,
}

impl Protector {
    /// Be ready to protect this memory.
    pub(super) fn new(uffd: Arc<Uffd>, memory: Arc<Memory>) -> Result<Arc<Self>, Error> {
        let failed = |doing| move |source| Error::Host { doing, source };
        let shared = Arc::new(Shared {
            uffd,
            memory,
            live: Mutex::new(None),
            watched: AtomicBool::new(false),
            urgent: AtomicUsize::new(0),
            faults: AtomicU64::new(0),
        });
        let over = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed("create an eventfd"))?;
        let stop = over.try_clone().map_err(failed("share an eventfd"))?;
        let (jobs, queue) = mpsc::channel();
        let mut protector = Self {
            shared: shared.clone(),
            jobs: Some(jobs),
            over,
            threads: Vec::new(),
        };
        let mut start = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let name = std::thread::Builder::new().name(name.to_owned());
            let thread = threads::spawn(ThreadClass::Device, name, body);
            protector
                .threads
                .push(thread.map_err(failed("start a thread that captures"))?);
            Ok::<_, Error>(())
        };
        let handler = shared.clone();
        start("capture/fault", Box::new(move || handler.handle_faults(&stop)))?;
        let copier = shared.clone();
        start("capture/copy", Box::new(move || copier.copy_ahead(&queue)))?;
        let rescuer = Arc::downgrade(&shared);
        shared.memory.before_discard(move |first, pages| {
            if let Some(shared) = rescuer.upgrade() {
                shared.rescue(first.0..first.0 + pages.0);
            }
        });
        Ok(Arc::new(protector))
    }

    /// Protect what was planned. The guest is paused.
    pub(super) fn capture(self: &Arc<Self>, plan: &Arc<Plan>, pool: &Arc<Pool>) -> Result<ProtectedPages, Error> {
        let kept = Arc::new(Kept {
            chunks: (0..plan.chunks()).map(|_| Mutex::default()).collect(),
            plan: plan.clone(),
            memory: self.shared.memory.clone(),
            pool: pool.clone(),
            dropped: AtomicBool::new(false),
        });
        self.shared.begin(&kept)?;
        if let Some(jobs) = &self.jobs {
            // The copier lives until the protector is dropped; without it, pages are copied as they are read.
            let _ = jobs.send(Arc::downgrade(&kept));
        }
        Ok(ProtectedPages {
            kept,
            protector: self.clone(),
        })
    }

    /// Writes that had to wait for a copy so far.
    pub(super) fn faults(&self) -> u64 {
        self.shared.faults.load(Ordering::Relaxed)
    }
}

impl Drop for Protector {
    fn drop(&mut self) {
        self.jobs = None;
        // Nothing is left to be protected: whoever captured holds the protector. An eventfd that is full has been written.
        let _ = self.over.write(1);
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            if thread.thread().id() != here && thread.join().is_err() {
                tracing::error!("a thread that captures panicked");
            }
        }
    }
}

impl Shared {
    /// Protect all of this capture's pages, after copying what an older one still has to.
    fn begin(&self, kept: &Arc<Kept>) -> Result<(), Error> {
        let mut live = self.live();
        if let Some(older) = live.take() {
            older.copy_all();
            self.let_go_of(&older);
        }
        if !self.watched.load(Ordering::Relaxed) {
            self.watch()?;
            self.watched.store(true, Ordering::Relaxed);
        }
        for chunk in 0..kept.plan.chunks() {
            for range in kept.plan.ranges_of(chunk) {
                let protected = self
                    .addresses(&range)
                    .and_then(|addresses| self.uffd.protect(addresses, true).map_err(cannot_protect));
                if let Err(error) = protected {
                    self.let_go_of(kept);
                    return Err(error);
                }
            }
        }
        *live = Some(kept.clone());
        Ok(())
    }

    fn watch(&self) -> Result<(), Error> {
        self.memory.blocks().iter().try_for_each(|block| {
            self.uffd.watch_writes(block.addresses()).map_err(|source| Error::Host {
                doing: "watch guest memory for writes",
                source,
            })
        })
    }

    /// Nobody needs this capture any more.
    fn end(&self, kept: &Arc<Kept>) {
        kept.dropped.store(true, Ordering::Relaxed);
        let mut live = self.live();
        if live.as_ref().is_some_and(|live| Arc::ptr_eq(live, kept)) {
            *live = None;
            self.let_go_of(kept);
        }
    }

    /// Let everybody write to a capture's pages again. Under the lock.
    fn let_go_of(&self, kept: &Kept) {
        for chunk in 0..kept.plan.chunks() {
            self.let_go_of_chunk(kept, chunk);
        }
    }

    fn let_go_of_chunk(&self, kept: &Kept, chunk: usize) {
        for range in kept.plan.ranges_of(chunk) {
            if let Ok(addresses) = self.addresses(&range) {
                self.unprotect(addresses);
            }
        }
    }

    fn unprotect(&self, addresses: Range<usize>) {
        if let Err(error) = self.uffd.protect(addresses, false) {
            // Memory that is registered and mapped can be let go of; whoever waits there would wait for ever.
            tracing::error!(%error, "cannot let go of write-protected memory");
        }
    }

    /// The thread that answers faults. It writes to no guest memory, and waits for nobody who does.
    fn handle_faults(&self, over: &EventFd) {
        if let Err(error) = self.watch_faults(over) {
            tracing::error!(%error, "cannot watch protected memory any more: whoever writes there waits until it is let go of");
        }
    }

    fn watch_faults(&self, over: &EventFd) -> std::io::Result<()> {
        let epoll = Epoll::new()?;
        for (number, fd) in [(0, over.as_raw_fd()), (1, self.uffd.as_raw_fd())] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, number))?;
        }
        let mut events = [EpollEvent::default(); 2];
        loop {
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if events[..count].iter().any(|event| event.data() == 0) {
                return Ok(());
            }
            while let Some(waiting) = self.uffd.waiting()? {
                self.fault(waiting.address);
            }
        }
    }

    /// Somebody waits to write here.
    fn fault(&self, address: usize) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.urgent.fetch_add(1, Ordering::Relaxed);
        let live = self.live();
        if let Some(kept) = live.as_ref()
            && let Some(number) = self.memory.page_at(address).and_then(|page| kept.plan.find(page))
        {
            kept.copy(number..number + 1);
        }
        // Also a page that nobody captured, between two that somebody did.
        self.unprotect(address..address + PAGE_SIZE);
        drop(live);
        self.urgent.fetch_sub(1, Ordering::Relaxed);
    }

    /// The thread that copies what nobody writes to.
    fn copy_ahead(&self, queue: &Receiver<Weak<Kept>>) {
        while let Ok(kept) = queue.recv() {
            let Some(kept) = kept.upgrade() else { continue };
            for chunk in 0..kept.plan.chunks() {
                let (first, end) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(kept.plan.pages()));
                for piece in (first..end).step_by(PIECE) {
                    while self.urgent.load(Ordering::Relaxed) > 0 {
                        std::thread::yield_now();
                    }
                    if kept.dropped.load(Ordering::Relaxed) {
                        break;
                    }
                    kept.copy(piece..(piece + PIECE).min(end));
                }
                let live = self.live();
                if !live.as_ref().is_some_and(|live| Arc::ptr_eq(live, &kept)) {
                    break;
                }
                self.let_go_of_chunk(&kept, chunk);
            }
            let mut live = self.live();
            // Everything is copied: a fault from here on is about a page that was let go of.
            if live.as_ref().is_some_and(|live| Arc::ptr_eq(live, &kept)) {
                *live = None;
            }
        }
    }

    /// These pages are about to become zeros.
    fn rescue(&self, pages: Range<u64>) {
        let live = self.live();
        if let Some(kept) = live.as_ref() {
            for run in kept.plan.runs() {
                let from = run.first.0.max(pages.start);
                let to = (run.first.0 + run.pages as u64).min(pages.end);
                if from < to {
                    let number = run.number + usize::try_from(from - run.first.0).expect("within a run");
                    kept.copy(number..number + usize::try_from(to - from).expect("within a run"));
                }
            }
        }
    }

    fn addresses(&self, pages: &Range<u64>) -> Result<Range<usize>, Error> {
        self.memory.addresses(pages)
    }

    fn live(&self) -> MutexGuard<'_, Option<Arc<Kept>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cannot_protect(source: std::io::Error) -> Error {
    Error::Host {
        doing: "write-protect guest memory",
        source,
    }
}

impl Kept {
    /// Copy those of these pages, which lie in one chunk, that are not copied yet.
    fn copy(&self, numbers: Range<usize>) {
        let chunk = numbers.start / CHUNK;
        let mut place = self.place(chunk);
        self.copy_into(&mut place, chunk, numbers);
    }

    fn copy_into(&self, place: &mut Place, chunk: usize, numbers: Range<usize>) {
        if place.failed.is_some() {
            return;
        }
        if let Err(error) = self.try_copy(place, chunk, &numbers) {
            place.failed = Some(error.into());
        }
    }

    fn try_copy(&self, place: &mut Place, chunk: usize, numbers: &Range<usize>) -> Result<(), Error> {
        let Place {
            chunk: memory, copied, ..
        } = place;
        let pages = match memory {
            Some(memory) => memory.pages_mut(),
            None => memory.insert(self.pool.take()?).pages_mut(),
        };
        let runs = self.plan.runs_of(chunk);
        let after = runs.partition_point(|run| run.number <= numbers.start);
        for run in &runs[after.saturating_sub(1)..] {
            let (from, to) = (run.number.max(numbers.start), (run.number + run.pages).min(numbers.end));
            if from >= to {
                break;
            }
            for number in from..to {
                let at = number % CHUNK;
                let bit = 1 << (at % 64);
                if copied[at / 64] & bit == 0 {
                    let page = Pfn(run.first.0 + (number - run.number) as u64);
                    self.memory.read_page(page, &mut pages[at])?;
                    copied[at / 64] |= bit;
                }
            }
        }
        Ok(())
    }

    fn copy_all(&self) {
        for chunk in 0..self.plan.chunks() {
            self.copy(chunk * CHUNK..((chunk + 1) * CHUNK).min(self.plan.pages()));
        }
    }

    fn place(&self, chunk: usize) -> MutexGuard<'_, Place> {
        self.chunks[chunk].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let chunks = self.chunks.iter_mut().filter_map(|place| {
            let place = place.get_mut().unwrap_or_else(PoisonError::into_inner);
            place.chunk.take()
        });
        self.pool.give(chunks);
    }
}

impl PageReader for ProtectedPages {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        only_ram(space)?;
        out.reserve(pages.len() * PAGE_SIZE);
        for page in pages {
            let number = self.kept.plan.find(*page).ok_or(NOT_CAPTURED)?;
            let chunk = number / CHUNK;
            let mut place = self.kept.place(chunk);
            self.kept.copy_into(&mut place, chunk, number..number + 1);
            if let Some(error) = &place.failed {
                return Err(error.clone());
            }
            let memory = place.chunk.as_ref().expect("a page was copied to it");
            out.extend_from_slice(&memory.pages()[number % CHUNK]);
        }
        Ok(())
    }
}

impl Captured for ProtectedPages {
    fn by(&self) -> CaptureBy {
        CaptureBy::Protect
    }
}

impl Drop for ProtectedPages {
    fn drop(&mut self) {
        self.protector.shared.end(&self.kept);
    }
}
