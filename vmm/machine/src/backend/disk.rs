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
        let mut owed = Owed::new(&self.shared, tag);
        self.pool.give(move || owed.pay(job));
    }
}

/// A request in the pool, given back when this is dropped: as failed, if its job never came to its end. Whoever pauses
/// the guest waits for all of them.
struct Owed {
    shared: Arc<Shared>,
    tag: Tag,
    outcome: Outcome,
}

impl Owed {
    fn new(shared: &Arc<Shared>, tag: Tag) -> Self {
        shared.state().out += 1;
        Self {
            shared: shared.clone(),
            tag,
            outcome: Outcome::Failed,
        }
    }

    fn pay(&mut self, job: impl FnOnce(&Shared) -> io::Result<()>) {
        self.outcome = self.shared.outcome(job(&self.shared));
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let Self { shared, tag, outcome } = self;
        let mut state = shared.state();
        state.done.push_back(Completion {
            tag: *tag,
            outcome: *outcome,
        });
        state.out -= 1;
        let idle = state.out == 0;
        drop(state);
        if idle {
            shared.idle.notify_all();
        }
        // Full only after 2^64 - 2 events that nobody heard: then there is one waiting anyway.
        let _ = shared.event.write(1);
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

#[cfg(test)]
mod tests {
    use umbra_devices::virtio::block::{Block, Wiring};
    use umbra_devices::virtio::limiter::Limits;
    use umbra_devices::virtio::testing::Driver;
    use umbra_units::Bytes;
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;
    use crate::config::devices::DiskConfig;
    use crate::config::{Shape, Sharing};

    /// A disk all of whose jobs panic.
    #[derive(Debug)]
    struct Cursed(FileDisk);

    impl Disk for Cursed {
        fn submit(&self, Request { tag, .. }: Request, _ram: &Ram) {
            self.0.in_the_pool(tag, |_| panic!("on purpose"));
        }

        fn completed(&self) -> Option<Completion> {
            self.0.completed()
        }

        fn quiesce(&self) {
            self.0.quiesce();
        }
    }

    #[test]
    fn a_request_whose_job_panics_comes_back_as_failed_and_holds_up_no_pause() {
        const IN: [u8; 16] = [0; 16];
        const IO_ERROR: u8 = 1;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let config = DiskConfig {
            path: file.path().to_owned(),
            ..DiskConfig::default()
        };
        let image = Arc::new(Image::open("disk/0", &config, false).unwrap());
        let memory = Arc::new(Memory::new(Shape::new(1, Bytes::mib(8), Sharing::Private).unwrap()).unwrap());
        let disk = Arc::new(Cursed(FileDisk::new("disk/0", image.clone(), &memory).unwrap()));
        let mut driver = Driver::<Block>::at_work(Wiring {
            id: "0".to_owned(),
            serial: String::new(),
            geometry: geometry(&image),
            queues: 1,
            limits: Limits::default(),
            disk: disk.clone(),
        });
        let told = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        told.ctl(ControlOperation::Add, disk.0.event(), event).unwrap();
        // More than there are threads: none is lost.
        for _ in 0..2 * THREADS {
            let placed = driver.add(0, &[&IN], &[512, 1]);
            driver.kick(0);
            assert_eq!(
                told.wait(10_000, &mut [EpollEvent::default()]).unwrap(),
                1,
                "nobody said so"
            );
            disk.quiesce();
            driver.world();
            assert!(driver.used(0).is_some());
            assert_eq!(driver.get(placed.writable[1], 1), [IO_ERROR]);
        }
    }
}
