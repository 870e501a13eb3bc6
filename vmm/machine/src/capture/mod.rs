//! Capturing: pages of a paused guest stay readable as they are now, while the guest runs on.
//!
//! | by | inside the pause | afterwards |
//! |---|---|---|
//! | [`Copy`](CaptureBy::Copy) | each page is copied | nothing |
//! | [`ParallelCopy`](CaptureBy::ParallelCopy) | the same, by several threads | nothing |
//! | [`Protect`](CaptureBy::Protect) | each run of pages is write-protected | pages are copied while the guest runs; a write to one that is not copied yet waits for its copy |
//!
//! Which costs the guest least is [predicted](mod@predict) from what each step costs on this host, measured once per process
//! when a guest is first followed, and from what is to be captured.
//!
//! What a capture takes is one copy of the pages captured, at most the guest's memory once more, until it is dropped;
//! see [`chunks`] for what of it is kept for the next.
//!
//! Protection needs a userfaultfd, which a confined process may not make: it is made with the machine, or with the
//! builder of machines to come ([`Spare`]). Where there is none, or it cannot protect this kind of memory, pages are
//! copied, whoever asked for protection; the log says why.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use umbra_core::guest::{CaptureBy, Captured, GuestError, Harvest};
use umbra_units::{PAGE_SIZE, PageSet, SpaceId};

use self::chunks::{CHUNK, Chunk, Pool};
use self::copied::CopiedPages;
use self::crew::Crew;
use self::plan::Plan;
use self::predict::{Costs, Learned, Task, predict};
use self::protect::Protector;
use crate::config::{Backing, Shape, Sharing};
use crate::error::Error;
use crate::memory::{Anonymous, Memory};
use crate::uffd::{PROTECTED, PROTECTED_HOLES, PROTECTED_OF_SHARED, Uffd};

mod chunks;
mod copied;
mod crew;
mod plan;
mod predict;
mod protect;

pub(crate) const NOT_CAPTURED: GuestError = GuestError::WrongState("cannot read a page that was not captured");

/// What was captured of one machine, by which way, since it was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CaptureCounters {
    /// Captures by copying.
    pub copies: u64,
    /// Captures by copying with several threads.
    pub parallel_copies: u64,
    /// Captures by write protection.
    pub protections: u64,
    /// Writes of the guest that had to wait for a copy.
    pub faults: u64,
}

/// Captures one guest's pages.
pub(crate) struct Capturer {
    memory: Arc<Memory>,
    vcpus: usize,
    pool: Arc<Pool>,
    /// To protect with, or why that cannot be.
    uffd: Result<Arc<Uffd>, String>,
    /// Made when the guest is first followed, or captured.
    ready: OnceLock<Ready>,
    learned: Mutex<Learned>,
    counters: Mutex<CaptureCounters>,
}

/// The threads that capture, and what capturing costs.
struct Ready {
    crew: Option<Mutex<Crew>>,
    protector: Result<Arc<Protector>, String>,
    costs: Costs,
}

/// A userfaultfd for machines that are built later, by a process that may not make one then.
#[derive(Debug, Clone)]
pub(crate) struct Spare(Result<Descriptor, String>);

/// A userfaultfd, and which of the features of protection it has.
type Descriptor = (Arc<Uffd>, u64);

impl Spare {
    pub(crate) fn new() -> Self {
        Self(open())
    }

    /// It is told the faults of one machine at a time.
    fn lend(&self) -> Result<Descriptor, String> {
        let spare = self.0.as_ref().map_err(Clone::clone)?;
        if Arc::strong_count(&spare.0) > 1 {
            return Err("this process has one userfaultfd, and another guest uses it".to_owned());
        }
        Ok(spare.clone())
    }
}

fn open() -> Result<Descriptor, String> {
    let known = PROTECTED | PROTECTED_OF_SHARED | PROTECTED_HOLES;
    Uffd::features_offered(false)
        .and_then(|offered| Ok((Arc::new(Uffd::new(offered & known)?), offered & known)))
        .map_err(|error| format!("this process may not have a userfaultfd: {error}"))
}

/// Why memory of this kind cannot be protected, holes and all, with these features.
fn lacks(features: u64, sharing: Sharing) -> Option<&'static str> {
    let (needed, what) = match sharing {
        Sharing::Shared => (
            PROTECTED | PROTECTED_OF_SHARED,
            "this kernel's userfaultfd cannot write-protect shared memory (it can from 5.19)",
        ),
        Sharing::Private => (
            PROTECTED | PROTECTED_HOLES,
            "this kernel's userfaultfd cannot write-protect private memory that was never touched (it can from 6.4)",
        ),
    };
    (features & needed != needed).then_some(what)
}

impl Capturer {
    pub(crate) fn new(memory: &Arc<Memory>, shape: Shape, backing: Backing, spare: Option<&Spare>) -> Self {
        let uffd = match (backing.huge_pages, spare) {
            (Some(_), _) => Err("memory of huge pages is not protected page by page".to_owned()),
            (None, Some(spare)) => spare.lend(),
            (None, None) => open(),
        };
        let uffd = uffd.and_then(|(uffd, features)| match lacks(features, shape.sharing()) {
            Some(why) => Err(why.to_owned()),
            None => Ok(uffd),
        });
        Self {
            memory: memory.clone(),
            vcpus: shape.cpus().into(),
            pool: Pool::new(shape.memory()),
            uffd,
            ready: OnceLock::new(),
            learned: Mutex::default(),
            counters: Mutex::default(),
        }
    }

    /// Start the threads and measure, so that no pause has to.
    pub(crate) fn prepare(&self) {
        self.ready();
    }

    /// Keep these pages as they are. The guest is paused, and lately wrote so many pages a second.
    pub(crate) fn capture(
        &self,
        pages: &Harvest,
        wanted: Option<CaptureBy>,
        written_per_second: u64,
    ) -> Result<Box<dyn Captured>, Error> {
        let none = PageSet::new(self.memory.space().pages);
        let mut set = &none;
        for (space, pages) in &pages.dirty {
            only_ram(*space)?;
            set = pages;
        }
        let plan = Arc::new(Plan::of(set));
        // Also of what is only protected now and read later.
        for run in plan.runs() {
            self.memory.addresses(&(run.first.0..run.first.0 + run.pages as u64))?;
        }
        let ready = self.ready();
        let task = Task {
            pages: plan.pages(),
            // A chunk is cleared as a whole when it is first touched.
            fresh: (plan.chunks() * CHUNK).saturating_sub(self.pool.pages()),
            // Memory whose pages are still to come is watched for those.
            runs: (ready.protector.is_ok() && !self.memory.is_waiting()).then(|| plan.ranges()),
            threads: ready.crew.as_ref().map_or(1, |crew| lock(crew).threads()),
            vcpus: self.vcpus,
            written_per_second,
        };
        let learned = *lock(&self.learned);
        let ways = predict(&ready.costs, learned, &task);
        let by = wanted.unwrap_or(ways[0].by);
        let began = Instant::now();
        let captured = match by {
            CaptureBy::Protect => self.protect(ready, &plan),
            CaptureBy::Copy | CaptureBy::ParallelCopy => None,
        };
        let captured = match captured {
            Some(captured) => captured,
            None => self.copy(ready, &plan, by)?,
        };
        let took = began.elapsed();
        let predicted = ways.iter().find(|way| way.by == captured.by());
        tracing::debug!(by = ?captured.by(), ?took, predicted = ?predicted.map(predict::Way::total), ?task, "captured");
        // Of a handful of pages the clock says more than the way.
        const TELLING: usize = 64;
        if let Some(predicted) = predicted.filter(|_| task.pages >= TELLING) {
            lock(&self.learned).learn(predicted, took);
        }
        let mut counters = lock(&self.counters);
        match captured.by() {
            CaptureBy::Copy => counters.copies += 1,
            CaptureBy::ParallelCopy => counters.parallel_copies += 1,
            CaptureBy::Protect => counters.protections += 1,
        }
        Ok(captured)
    }

    /// Protect them, if that is possible here.
    fn protect(&self, ready: &Ready, plan: &Arc<Plan>) -> Option<Box<dyn Captured>> {
        let protected = ready
            .protector
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|protector| protector.capture(plan, &self.pool).map_err(|error| error.to_string()));
        match protected {
            Ok(protected) => Some(Box::new(protected)),
            Err(why) => {
                tracing::warn!(why, "captured by copying instead of write protection");
                None
            }
        }
    }

    /// Copy them, by several threads unless one was asked for or is all there is.
    fn copy(&self, ready: &Ready, plan: &Arc<Plan>, by: CaptureBy) -> Result<Box<dyn Captured>, Error> {
        Ok(match &ready.crew {
            Some(crew) if by != CaptureBy::Copy => {
                Box::new(CopiedPages::together(&self.memory, plan, &self.pool, &lock(crew))?)
            }
            _ => Box::new(CopiedPages::alone(&self.memory, plan, &self.pool)?),
        })
    }

    pub(crate) fn counters(&self) -> CaptureCounters {
        let protector = self.ready.get().and_then(|ready| ready.protector.as_ref().ok());
        CaptureCounters {
            faults: protector.map_or(0, |protector| protector.faults()),
            ..*lock(&self.counters)
        }
    }

    fn ready(&self) -> &Ready {
        self.ready.get_or_init(|| {
            // Few guests have so many pages to copy, and so much memory bandwidth, that more would help.
            const HELPERS: usize = 3;
            let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            let crew = Crew::new(cores.saturating_sub(1).clamp(1, HELPERS));
            let crew = crew
                .inspect_err(|error| tracing::warn!(%error, "pages are captured by one thread"))
                .ok();
            let protector = self
                .uffd
                .clone()
                .and_then(|uffd| Protector::new(uffd, self.memory.clone()).map_err(|error| error.to_string()));
            if let Err(why) = &protector {
                tracing::info!(why, "pages are captured by copying, never by write protection");
            }
            if let Err(error) = self.pool.warm() {
                tracing::debug!(%error, "no memory was set aside for captures");
            }
            let uffd = self.uffd.as_ref().ok().filter(|_| protector.is_ok());
            let costs = costs(uffd);
            Ready {
                // A helper on the only core is no help, except to who insists.
                crew: crew.map(Mutex::new),
                protector,
                costs,
            }
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn only_ram(space: SpaceId) -> Result<(), Error> {
    if space == SpaceId::RAM {
        return Ok(());
    }
    Err(Error::Incompatible(format!(
        "space {}: this guest has no such space",
        space.0
    )))
}

/// What capturing costs here, measured once per process in a millisecond or two. What cannot be measured is taken from
/// the slowest host seen.
fn costs(uffd: Option<&Arc<Uffd>>) -> Costs {
    static MEASURED: OnceLock<Costs> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let mut costs = Costs {
            copy: 500.0,
            fresh: 500.0,
            // Waking a thread that sleeps, on a host with something else to do.
            wake: 60_000.0,
            protect: 30_000.0,
            protect_run: 3000.0,
            protect_page: 50.0,
            fault: 72_000.0,
        };
        if let Err(error) = measure_copying(&mut costs) {
            tracing::debug!(%error, "what copying costs was not measured");
        }
        if let Some(uffd) = uffd
            && let Err(error) = measure_protecting(uffd, &mut costs)
        {
            tracing::debug!(%error, "what protecting costs was not measured");
        }
        tracing::debug!(?costs, "what capturing costs here");
        costs
    })
}

/// Nanoseconds that something takes.
fn timed(act: impl FnOnce()) -> f64 {
    let start = Instant::now();
    act();
    start.elapsed().as_secs_f64() * 1e9
}

#[expect(clippy::cast_precision_loss, reason = "a few hundred pages")]
fn measure_copying(costs: &mut Costs) -> Result<(), Error> {
    // Enough that the second copy is not from the nearest cache.
    const CHUNKS: usize = 3;
    let chunks = || (0..CHUNKS).map(|_| Chunk::new()).collect::<Result<Vec<_>, _>>();
    let (mut from, mut to) = (chunks()?, chunks()?);
    for chunk in &mut from {
        chunk.pages_mut().fill([1; PAGE_SIZE]);
    }
    let mut copy = || {
        let pairs = from.iter().zip(&mut to);
        let each = pairs.map(|(from, to)| timed(|| to.pages_mut().copy_from_slice(std::hint::black_box(from.pages()))));
        middle(each.collect()) / CHUNK as f64
    };
    let (first, second) = (copy(), copy());
    costs.copy = second;
    costs.fresh = (first - second).max(0.0);
    Ok(())
}

/// What faults cost is told by those of this process's own memory. A vCPU's cost more, by what KVM does then; but the
/// next write to a page that was just harvested costs that anyway.
#[expect(clippy::cast_precision_loss, reason = "a few hundred pages")]
fn measure_protecting(uffd: &Uffd, costs: &mut Costs) -> Result<(), Error> {
    const SINGLE: usize = 32;
    let failed = |source| Error::Host {
        doing: "write-protect scratch memory",
        source,
    };
    let mut scratch = Anonymous::new(CHUNK * PAGE_SIZE)?;
    // Pages of its own, not one large one: protecting a part of that would split it.
    scratch.without_large_pages();
    scratch.bytes_mut().fill(1);
    let range = scratch.addresses();
    uffd.watch_writes(range.clone()).map_err(failed)?;
    let protected = |range: Range<usize>, yes| {
        let mut done = Ok(());
        let ns = timed(|| done = uffd.protect(range, yes));
        done.map_err(failed).map(|()| ns)
    };
    let all = protected(range.clone(), true)?;
    protected(range.clone(), false)?;
    let mut single = Vec::with_capacity(SINGLE);
    for n in 0..SINGLE {
        let at = range.start + 2 * n * PAGE_SIZE;
        single.push(protected(at..at + PAGE_SIZE, true)?);
    }
    // The protector's thread finds that nobody captured these, and lets go of them one by one.
    let faults = (0..SINGLE).map(|n| timed(|| scratch.touch(2 * n))).collect();
    costs.protect_page = all / CHUNK as f64;
    costs.protect_run = (middle(single) - costs.protect_page).max(0.0);
    costs.fault = middle(faults);
    Ok(())
}

/// The middle one: threads are interrupted now and then.
fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

impl fmt::Debug for Capturer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Capturer({:?}, {:?})", self.pool, self.uffd.as_ref().err())
    }
}
