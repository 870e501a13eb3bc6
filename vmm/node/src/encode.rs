//! The threads that copy pages out of the guest, encode them and hand them to the link.
//!
//! Making a batch has two parts. What a page becomes depends on everything that was shipped before it, so plans are
//! *drafted* one after the other, in their order, by whoever has the encoder. *Packing* a draft depends on nothing and takes
//! several times as long: it is done by whoever drafted it, after letting go of the encoder.
//!
//! ```text
//!   thread 1   ▐ draft 7 ▌ pack 7           ▶ link ▐ draft 10 ▌ …
//!   thread 2             ▐ draft 8 ▌ pack 8           ▶ link ▐ draft 11 …
//!   thread 3                       ▐ draft 9 ▌ pack 9   ▶ link
//! ```
//!
//! So all threads are alike, one of them is enough, and with one batches reach the link in their order; with several they
//! may overtake each other, and the shadow puts them back. The digest of a closing batch covers everything before it, and an
//! audit stands behind everything before it, because both are the encoder's, in the order of the queue.
//!
//! # The budget
//!
//! Encoding competes with the guest for processors. What may be used is given in cores, and kept by the processor time that
//! these threads really took: a bucket that fills with time and empties with work. Nothing waits for it while a switchover
//! is under way.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use umbra_core::batch::{Draft, PageCounts};
use umbra_core::choose::{Chooser, PackCounts};
use umbra_core::error::Fault;
use umbra_core::guest::{Guest, PageReader};
use umbra_core::pack::{Compression, Packer};
use umbra_core::source::{CacheCounts, Encoder, Plan};
use umbra_units::{Bandwidth, BatchId, Bytes, Now, PageId};

use crate::clock::{Clock, thread_time};
use crate::error::StartError;

/// More threads than this pack more than one encoder can draft.
const MOST_BY_DEFAULT: usize = 4;
/// So long a time without work may be made up for at once.
const SAVED_UP: Duration = Duration::from_millis(50);

/// How much of this host encoding may use, and for what.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncodeConfig {
    /// When batches are compressed, and how.
    pub compression: Compression,
    /// Threads that encode; at least one.
    pub threads: usize,
    /// Cores that all of them together may use while no switchover is under way; `None`: as many as there are threads.
    pub cores: Option<f64>,
}

impl Default for EncodeConfig {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            compression: Compression::Auto,
            threads: (cores / 2).clamp(1, MOST_BY_DEFAULT),
            cores: None,
        }
    }
}

/// What encoding chose so far, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeStatus {
    /// How batches were compressed.
    pub packed: PackCounts,
    /// How well keeping contents went.
    pub cache: CacheCounts,
}

/// What came of a piece of work.
#[derive(Debug)]
pub(crate) enum Done {
    /// A batch was handed to the link: its bytes, and how its pages travel.
    Encoded(BatchId, Bytes, PageCounts),
    /// Where the guest's memory differs from what was shipped.
    Audited(Vec<PageId>),
    Failed(Fault),
}

/// A piece of work.
enum Work {
    Encode {
        plan: Plan,
        from: Arc<dyn PageReader>,
        hurry: bool,
    },
    Audit(Arc<dyn Guest>),
}

impl Work {
    /// Whether somebody waits for it.
    const fn hurries(&self) -> bool {
        match self {
            Self::Encode { hurry, .. } => *hurry,
            Self::Audit(_) => true,
        }
    }
}

/// Where batches go: whether somebody waits for it, and its bytes.
type Ship = Box<dyn Fn(bool, Vec<u8>) + Send + Sync>;
/// Where answers go, and when that was.
type Answer = Box<dyn Fn(Now, Done) + Send + Sync>;

/// The threads. Dropping this ends them once they have done what they are at.
pub(crate) struct Encoders {
    shared: Arc<Shared>,
}

struct Shared {
    queue: Mutex<Queue>,
    /// Work came, or it is over.
    changed: Condvar,
    /// Whoever has it takes work from the queue: so plans are drafted in their order.
    encoder: Mutex<Encoder>,
    chooser: Mutex<Chooser>,
    clock: Clock,
    ship: Ship,
    answer: Answer,
}

struct Queue {
    work: VecDeque<Work>,
    over: bool,
    budget: Budget,
    cache: CacheCounts,
}

impl Encoders {
    /// Start them.
    pub(crate) fn start(
        config: EncodeConfig,
        encoder: Encoder,
        clock: Clock,
        ship: impl Fn(bool, Vec<u8>) + Send + Sync + 'static,
        answer: impl Fn(Now, Done) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let threads = config.threads.max(1);
        #[expect(clippy::cast_precision_loss, reason = "a handful of threads")]
        let cores = config.cores.unwrap_or(f64::INFINITY).min(threads as f64);
        let queue = Queue {
            work: VecDeque::new(),
            over: false,
            budget: Budget::new(config.cores, clock.now()),
            cache: CacheCounts::default(),
        };
        let encoders = Self {
            shared: Arc::new(Shared {
                queue: Mutex::new(queue),
                changed: Condvar::new(),
                encoder: Mutex::new(encoder),
                chooser: Mutex::new(Chooser::new(config.compression, cores)),
                clock,
                ship: Box::new(ship),
                answer: Box::new(answer),
            }),
        };
        for n in 0..threads {
            let shared = Arc::clone(&encoders.shared);
            let name = format!("umbra-encode/{n}");
            thread::Builder::new()
                .name(name.clone())
                .spawn(move || shared.work())
                .map_err(|error| StartError::Host(format!("cannot start the thread {name}: {error}")))?;
        }
        Ok(encoders)
    }

    /// Encode a plan, whose pages are read from `from`. Plans are given in the order of their numbers. In a `hurry` no budget
    /// is kept.
    pub(crate) fn encode(&self, plan: Plan, from: Arc<dyn PageReader>, hurry: bool) {
        self.give(Work::Encode { plan, from, hurry });
    }

    /// Compare the paused guest's memory with what was shipped, everything given before included.
    pub(crate) fn audit(&self, guest: Arc<dyn Guest>) {
        self.give(Work::Audit(guest));
    }

    /// What the link carries by now.
    pub(crate) fn link(&self, rate: Bandwidth) {
        lock(&self.shared.chooser).link(rate);
    }

    /// What was chosen so far.
    pub(crate) fn status(&self) -> EncodeStatus {
        EncodeStatus {
            packed: lock(&self.shared.chooser).counts(),
            cache: lock(&self.shared.queue).cache,
        }
    }

    fn give(&self, work: Work) {
        lock(&self.shared.queue).work.push_back(work);
        self.shared.changed.notify_all();
    }
}

impl Drop for Encoders {
    fn drop(&mut self) {
        lock(&self.shared.queue).over = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn work(&self) {
        let mut packer = Packer::new();
        // A thread that panicked has left the encoder in the middle of a page: nothing can be shipped any more.
        while let Ok(mut encoder) = self.encoder.lock() {
            let Some(work) = self.next() else { return };
            let began = thread_time();
            let done = match work {
                Work::Audit(guest) => encoder.audit(&*guest).map_or_else(Done::Failed, Done::Audited),
                Work::Encode { plan, from, .. } => {
                    let urgent = plan.urgent;
                    let draft = encoder.draft(plan, &*from);
                    let cache = encoder.cache_counts();
                    drop(encoder);
                    lock(&self.queue).cache = cache;
                    draft.map_or_else(Done::Failed, |draft| self.pack(draft, urgent, &mut packer, began))
                }
            };
            (self.answer)(self.clock.now(), done);
        }
    }

    /// The next piece of work, once there is any and the budget allows it; `None` when it is over.
    fn next(&self) -> Option<Work> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.over {
                return None;
            }
            let wait = if queue.work.is_empty() {
                None
            } else if queue.work.iter().any(Work::hurries) {
                Some(Duration::ZERO)
            } else {
                Some(queue.budget.wait(self.clock.now()))
            };
            queue = match wait {
                Some(Duration::ZERO) => return queue.work.pop_front(),
                Some(wait) => {
                    let woken = self.changed.wait_timeout(queue, wait);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn pack(&self, draft: Draft, urgent: bool, packer: &mut Packer, began: Duration) -> Done {
        let (id, counts, body) = (draft.id(), draft.counts(), draft.body());
        let method = lock(&self.chooser).choose(body, urgent);
        let packing = self.clock.now();
        let (bytes, became) = draft.pack(method, packer);
        let took = self.clock.now().since(packing);
        let size = Bytes::of_len(bytes.len());
        lock(&self.chooser).packed(method, became, body, size, took);
        let spent = thread_time().saturating_sub(began);
        lock(&self.queue).budget.spent(spent);
        (self.ship)(urgent, bytes);
        Done::Encoded(id, size, counts)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Counters and a queue: no panic leaves them half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Processor time that may be used. See the [module](self).
#[derive(Debug)]
struct Budget {
    /// Cores; `None`: any.
    cores: Option<f64>,
    /// Seconds of processor time left; below zero, what was used ahead.
    left: f64,
    at: Now,
}

impl Budget {
    const fn new(cores: Option<f64>, now: Now) -> Self {
        Self {
            cores,
            left: 0.0,
            at: now,
        }
    }

    /// How long to wait before the next piece of work.
    fn wait(&mut self, now: Now) -> Duration {
        let Some(cores) = self.cores else {
            return Duration::ZERO;
        };
        let filled = self.left + now.since(self.at).as_secs_f64() * cores;
        (self.left, self.at) = (filled.min(SAVED_UP.as_secs_f64() * cores), now);
        if self.left >= 0.0 {
            return Duration::ZERO;
        }
        // Rounded up: a wait of nothing would be no wait.
        Duration::from_secs_f64((-self.left / cores).min(3600.0)) + Duration::from_micros(1)
    }

    fn spent(&mut self, processor: Duration) {
        if self.cores.is_some() {
            self.left -= processor.as_secs_f64();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use umbra_core::batch::Batch;
    use umbra_core::guest::{GuestError, Space};
    use umbra_core::ledger::{Base, Owed};
    use umbra_units::{Epoch, PAGE_SIZE, PageCount, Pfn, SpaceId};

    /// Every page is filled with its number.
    struct Numbered;

    impl PageReader for Numbered {
        fn read_pages(&self, _space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
            for pfn in pages {
                out.extend([u8::try_from(pfn.0 % 251).unwrap(); PAGE_SIZE]);
            }
            Ok(())
        }
    }

    fn plan(batch: u64, first: u64) -> Plan {
        let owed = |pfn| Owed {
            page: PageId::ram(Pfn(pfn)),
            base: Base::Shipped,
        };
        Plan {
            batch: BatchId(batch),
            epoch: Epoch(1),
            pages: (first..first + 32).map(owed).collect(),
            owed_after: PageCount(0),
            urgent: false,
            captured: false,
            close: None,
            attempt: None,
        }
    }

    struct Watched {
        encoders: Encoders,
        shipped: mpsc::Receiver<Vec<u8>>,
        answers: mpsc::Receiver<Done>,
    }

    fn start(threads: usize, cores: Option<f64>) -> Watched {
        let config = EncodeConfig {
            threads,
            cores,
            ..EncodeConfig::default()
        };
        let encoder = Encoder::new(&[Space::ram(PageCount(10_000))], Bytes::mib(1));
        let (ship, shipped) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let encoders = Encoders::start(
            config,
            encoder,
            Clock::new(),
            move |_, bytes| drop(ship.send(bytes)),
            move |_, done| drop(answer.send(done)),
        );
        Watched {
            encoders: encoders.unwrap(),
            shipped,
            answers,
        }
    }

    #[test]
    fn every_plan_becomes_a_batch_and_one_thread_keeps_their_order() {
        for threads in [1, 3] {
            let watched = start(threads, None);
            for batch in 1..=100 {
                watched
                    .encoders
                    .encode(plan(batch, batch * 32), Arc::new(Numbered), false);
            }
            let mut shipped: Vec<u64> = (0..100).map(|_| number(&watched.shipped.recv().unwrap())).collect();
            if threads > 1 {
                shipped.sort_unstable();
            }
            assert_eq!(shipped, (1..=100).collect::<Vec<_>>());
            for _ in 0..100 {
                assert!(matches!(watched.answers.recv().unwrap(), Done::Encoded(_, _, counts) if counts.total() == 32));
            }
            let packed = watched.encoders.status().packed;
            assert_eq!(packed.none + packed.lz4 + packed.zstd, 100);
        }
    }

    fn number(batch: &[u8]) -> u64 {
        Batch::parse(batch).unwrap().id.0
    }

    #[test]
    fn a_later_plan_sees_what_an_earlier_one_shipped_whoever_packs_them() {
        let watched = start(4, None);
        for batch in 1..=200 {
            watched.encoders.encode(plan(batch, 1), Arc::new(Numbered), false);
        }
        let mut batches: Vec<Batch> = (0..200)
            .map(|_| Batch::parse(&watched.shipped.recv().unwrap()).unwrap())
            .collect();
        batches.sort_by_key(|batch| batch.id);
        assert_eq!(batches[0].len(), 32);
        assert!(batches[1..].iter().all(Batch::is_empty), "all the rest is the same");
    }

    #[test]
    fn without_a_budget_nothing_happens_until_somebody_is_in_a_hurry() {
        let watched = start(2, Some(1e-9));
        // The first is on credit; what it took takes years to earn.
        watched.encoders.encode(plan(1, 0), Arc::new(Numbered), false);
        assert_eq!(number(&watched.shipped.recv().unwrap()), 1);
        watched.answers.recv().unwrap();
        watched.encoders.encode(plan(2, 100), Arc::new(Numbered), false);
        watched.encoders.encode(plan(3, 200), Arc::new(Numbered), true);
        let mut shipped = [(); 2].map(|()| number(&watched.shipped.recv().unwrap()));
        shipped.sort_unstable();
        assert_eq!(shipped, [2, 3], "what stands before the one in a hurry hurries too");
    }

    #[test]
    fn threads_end_when_nobody_has_work_for_them_any_more() {
        let watched = start(3, Some(0.5));
        drop(watched.encoders);
        // Each thread holds an end of this until it ends.
        assert!(watched.answers.recv().is_err());
    }

    #[test]
    fn a_budget_is_kept_over_time_and_not_saved_up_for_ever() {
        let at = |ms: u64| Now::from_us(ms * 1_000);
        let mut budget = Budget::new(Some(0.5), at(0));
        assert_eq!(budget.wait(at(0)), Duration::ZERO);
        budget.spent(Duration::from_millis(10));
        let wait = budget.wait(at(0));
        assert!((20..21).contains(&wait.as_millis()), "{wait:?}");
        assert_eq!(budget.wait(at(21)), Duration::ZERO);
        // An hour without work earns no more than a moment of it.
        assert_eq!(budget.wait(at(3_600_000)), Duration::ZERO);
        budget.spent(Duration::from_millis(35));
        assert!((20..21).contains(&budget.wait(at(3_600_000)).as_millis()));
    }

    #[test]
    fn without_a_limit_nothing_is_counted() {
        let mut budget = Budget::new(None, Now::ZERO);
        budget.spent(Duration::from_secs(1_000));
        assert_eq!(budget.wait(Now::ZERO), Duration::ZERO);
    }
}
