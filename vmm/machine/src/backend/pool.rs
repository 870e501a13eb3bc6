//! A few threads that do what may take time, so that nobody who holds a device's lock does.
//!
//! The threads exist from the beginning: a guest's first flush should not wait for the kernel to make one, and what is
//! made before the guest runs needs no permission while it runs.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::Error;
use crate::threads::{self, ThreadClass};

/// Something to do once.
type Job = Box<dyn FnOnce() + Send>;

/// Threads that do jobs in the order they come, several at once. Dropping it finishes what was given to it.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// As long as what the guest has in its queues, which is what bounds it.
    queue: Mutex<Queue>,
    /// Something was queued, or the pool ends.
    changed: Condvar,
}

struct Queue {
    jobs: VecDeque<Job>,
    open: bool,
}

impl Pool {
    /// `threads` threads called `name`.
    pub(crate) fn start(name: &str, threads: usize) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                jobs: VecDeque::new(),
                open: true,
            }),
            changed: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
        };
        for _ in 0..threads {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new()
                .name(name.to_owned())
                .stack_size(STACK_BYTES);
            let thread =
                threads::spawn(ThreadClass::Device, builder, move || shared.work()).map_err(|source| Error::Host {
                    doing: "start an I/O thread",
                    source,
                })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Have this done.
    pub(crate) fn give(&self, job: impl FnOnce() + Send + 'static) {
        self.shared.queue().jobs.push_back(Box::new(job));
        self.shared.changed.notify_one();
    }
}

/// The jobs are system calls and a few vectors.
const STACK_BYTES: usize = 128 << 10;

impl Shared {
    fn work(&self) {
        loop {
            let mut queue = self.queue();
            let job = loop {
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None if !queue.open => return,
                    None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(queue);
            // The next job needs this thread. What a job leaves behind when it panics is for it to know: it was moved here,
            // and nothing else of it is left.
            if panic::catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a job of an I/O thread panicked");
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.queue().open = false;
        self.shared.changed.notify_all();
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // A job may hold the last reference to what owns the pool: its thread ends by itself.
            if thread.thread().id() != here && thread.join().is_err() {
                tracing::error!("an I/O thread panicked");
            }
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.shared.queue().jobs.len();
        write!(f, "Pool({} threads, {waiting} jobs waiting)", self.threads.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn jobs_run_side_by_side_and_all_of_them_before_the_pool_is_gone() {
        let pool = Pool::start("test-io", 3).unwrap();
        let (meeting, done) = (Arc::new(Barrier::new(3)), Arc::new(AtomicUsize::new(0)));
        for _ in 0..30 {
            let (meeting, done) = (meeting.clone(), done.clone());
            // Ends only if three run at once.
            pool.give(move || {
                meeting.wait();
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        drop(pool);
        assert_eq!(done.load(Ordering::SeqCst), 30);
    }

    #[test]
    fn a_job_that_panics_takes_no_thread_with_it() {
        let pool = Pool::start("test-io", 1).unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        for n in 0..10 {
            let done = done.clone();
            pool.give(move || {
                assert!(n % 2 == 1, "on purpose");
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        drop(pool);
        assert_eq!(done.load(Ordering::SeqCst), 5);
    }
}
