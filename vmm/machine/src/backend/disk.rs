//! A disk's half in this host: requests of the model on one side, a file on the other.
//!
//! # What waits, and where
//!
//! The model's lock is held when a request is submitted, so nothing here waits. What the page cache can do at once is done
//! at once, on the device's worker (`RWF_NOWAIT`): a cached read costs a copy and no other thread. Everything else goes to a
//! pool: reads that miss, writes (which some file systems cannot do without perhaps waiting), flushes, discards. Why
//! threads and not io_uring: docs/decisions/0018-threads-for-disks.md.
//!
//! A request's bytes move between the file and guest memory without a lock and without a copy. A flush is `fdatasync` after
//! everything that came back before it was submitted, which is all that is promised.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use umbra_devices::virtio::block::{Completion, Disk, Geometry, Op, Outcome, Request, Tag};
use umbra_devices::virtio::{Ram, Segments};
use vmm_sys_util::eventfd::EventFd;

use super::image::{Image, SECTOR};
use super::pool::Pool;
use super::transfer::{self, Patience, Run, transfer};
use crate::error::Error;
use crate::ioctls::Way;
use crate::memory::Memory;
use crate::worker::event;

/// Threads of one disk: as many requests wait for the host's disk at once.
const THREADS: usize = 4;

/// A disk over an image.
pub(crate) struct FileDisk {
    /// Joined, with every request done, before the rest goes.
    pool: Pool,
    shared: Arc<Shared>,
}

/// What the pool's threads know.
struct Shared {
    kind: String,
    image: Arc<Image>,
    /// What the model has too: cloning that for each request would cost an allocation.
    ram: Ram,
    state: Mutex<State>,
    /// Nothing is in the pool any more.
    idle: Condvar,
    /// Something has come back from the pool.
    event: EventFd,
    /// The file system can say that a write would wait.
    impatient_writes: AtomicBool,
    /// An error was logged: a guest may cause as many as it likes.
    complained: AtomicBool,
    /// Keeps what `ram` points into, and so comes last.
    _memory: Arc<Memory>,
}

#[derive(Default)]
struct State {
    done: VecDeque<Completion>,
    /// Requests in the pool. Those and `done` are never more than the device's queues have places.
    out: usize,
}

impl FileDisk {
    /// The disk `kind` over `image`.
    pub(crate) fn new(kind: &str, image: Arc<Image>, memory: &Arc<Memory>) -> Result<Self, Error> {
        let event = event().map_err(|source| Error::Host {
            doing: "make an event for a disk",
            source,
        })?;
        Ok(Self {
            pool: Pool::start("disk-io", THREADS)?,
            shared: Arc::new(Shared {
                kind: kind.to_owned(),
                image,
                ram: memory.for_devices(),
                state: Mutex::default(),
                idle: Condvar::new(),
                event,
                impatient_writes: AtomicBool::new(true),
                complained: AtomicBool::new(false),
                _memory: memory.clone(),
            }),
        })
    }

    /// Becomes readable when something has come back.
    pub(crate) fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn in_the_pool(&self, tag: Tag, job: impl FnOnce(&Shared) -> io::Result<()> + Send + 'static) {
        self.shared.state().out += 1;
        let shared = self.shared.clone();
        self.pool.give(move || {
            let outcome = shared.outcome(job(&shared));
            let mut state = shared.state();
            state.done.push_back(Completion { tag, outcome });
            state.out -= 1;
            let idle = state.out == 0;
            drop(state);
            if idle {
                shared.idle.notify_all();
            }
            // Full only after 2^64 - 2 events that nobody heard: then there is one waiting anyway.
            let _ = shared.event.write(1);
        });
    }
}

/// What a disk over this image is.
pub(crate) fn geometry(image: &Image) -> Geometry {
    let block = image.alignment().clamp(512, 65_536);
    Geometry {
        sectors: image.bytes() / SECTOR,
        block,
        physical_block: block.max(4096),
        read_only: image.is_readonly(),
        discard: !image.is_readonly(),
        write_zeroes: !image.is_readonly(),
    }
}

impl Disk for FileDisk {
    fn submit(&self, Request { tag, op }: Request, _ram: &Ram) {
        match op {
            Op::Read { at, to } => {
                let runs = runs(&to);
                match self.shared.move_bytes(Way::In, &runs, at, Patience::None) {
                    Err(error) if is_impatience(&error) => {
                        self.in_the_pool(tag, move |disk| disk.move_bytes(Way::In, &runs, at, Patience::All));
                    }
                    done => self.shared.finish(tag, done),
                }
            }
            Op::Write { at, from, durable } => {
                let runs = runs(&from);
                if !durable && self.shared.impatient_writes.load(Ordering::Relaxed) {
                    match self.shared.move_bytes(Way::Out, &runs, at, Patience::None) {
                        Err(error) if is_impatience(&error) => {
                            let can = error.kind() != io::ErrorKind::Unsupported;
                            self.shared.impatient_writes.store(can, Ordering::Relaxed);
                        }
                        done => return self.shared.finish(tag, done),
                    }
                }
                self.in_the_pool(tag, move |disk| {
                    disk.move_bytes(Way::Out, &runs, at, Patience::All)?;
                    disk.if_durable(durable)
                });
            }
            Op::Flush => self.in_the_pool(tag, |disk| disk.if_durable(true)),
            Op::Discard { at, bytes } => {
                self.in_the_pool(tag, move |disk| transfer::discard(&disk.image, at, bytes));
            }
            Op::WriteZeroes {
                at,
                bytes,
                unmap,
                durable,
            } => self.in_the_pool(tag, move |disk| {
                transfer::write_zeroes(&disk.image, at, bytes, unmap)?;
                disk.if_durable(durable)
            }),
        }
    }

    fn completed(&self) -> Option<Completion> {
        self.shared.state().done.pop_front()
    }

    fn quiesce(&self) {
        let mut state = self.shared.state();
        while state.out > 0 {
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn move_bytes(&self, way: Way, runs: &[Run], at: u64, patience: Patience) -> io::Result<()> {
        transfer(&self.image, &self.ram, way, runs, at, patience)
    }

    fn if_durable(&self, durable: bool) -> io::Result<()> {
        if durable { self.image.file().sync_data() } else { Ok(()) }
    }

    /// Something was done at once: whoever submitted it looks for it before it goes.
    fn finish(&self, tag: Tag, result: io::Result<()>) {
        let outcome = self.outcome(result);
        self.state().done.push_back(Completion { tag, outcome });
    }

    fn outcome(&self, result: io::Result<()>) -> Outcome {
        let Err(error) = result else { return Outcome::Done };
        if !self.complained.swap(true, Ordering::Relaxed) {
            let path = self.image.path().display();
            tracing::warn!(disk = %self.kind, %path, %error, "a request failed; further failures of this disk are not logged");
        }
        Outcome::Failed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_impatience(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Unsupported)
}

fn runs(segments: &Segments) -> Vec<Run> {
    segments.iter().map(|segment| (segment.at, segment.len)).collect()
}

impl fmt::Debug for FileDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state();
        write!(
            f,
            "FileDisk({}, {} out, {} done)",
            self.shared.kind,
            state.out,
            state.done.len()
        )
    }
}
