//! Threads that help with one piece of work now and then, and sleep otherwise.
//!
//! Whoever has work does it together with those of the crew that wake in time: a helper that comes when everything is
//! done finds nothing, and nobody waited for it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::error::Error;
use crate::threads::{self, ThreadClass};

/// Something several threads can do at once: each comes back when it finds nothing more to do.
pub(super) type Job = dyn Fn() + Send + Sync;

pub(super) struct Crew {
    desk: Arc<Desk>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Desk {
    state: Mutex<State>,
    /// There is another job, or none will come.
    changed: Condvar,
    /// Nobody is at work.
    idle: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Arc<Job>>,
    /// Grows with each job; a helper takes part in each once.
    round: u64,
    at_work: usize,
    over: bool,
}

impl Crew {
    pub(super) fn new(helpers: usize) -> Result<Self, Error> {
        let mut crew = Self {
            desk: Arc::default(),
            threads: Vec::new(),
        };
        for n in 0..helpers {
            let desk = crew.desk.clone();
            let name = std::thread::Builder::new().name(format!("capture/{n}"));
            let thread = threads::spawn(ThreadClass::Device, name, move || desk.help());
            crew.threads.push(thread.map_err(|source| Error::Host {
                doing: "start a thread that copies",
                source,
            })?);
        }
        Ok(crew)
    }

    /// How many threads work on a job, the caller's among them.
    pub(super) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Do it, and come back when nobody does it any more. One job at a time.
    pub(super) fn work(&self, job: Arc<Job>) {
        let mut state = self.desk.state();
        state.job = Some(job.clone());
        state.round += 1;
        drop(state);
        self.desk.changed.notify_all();
        job();
        let mut state = self.desk.state();
        state.job = None;
        while state.at_work > 0 {
            state = self.desk.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.desk.state().over = true;
        self.desk.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that copies panicked");
            }
        }
    }
}

impl Desk {
    fn help(&self) {
        let mut done = 0;
        let mut state = self.state();
        while !state.over {
            let job = state.job.clone().filter(|_| state.round != done);
            let Some(job) = job else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            done = state.round;
            state.at_work += 1;
            drop(state);
            job();
            drop(job);
            state = self.state();
            state.at_work -= 1;
            if state.at_work == 0 {
                self.idle.notify_all();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_job_is_done_when_work_returns_whoever_did_it() {
        let crew = Crew::new(3).unwrap();
        for _ in 0..200 {
            let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let (mine, counted) = (next.clone(), done.clone());
            crew.work(Arc::new(move || {
                while mine.fetch_add(1, Ordering::SeqCst) < 50 {
                    counted.fetch_add(1, Ordering::SeqCst);
                }
            }));
            assert_eq!(done.load(Ordering::SeqCst), 50);
            assert_eq!(Arc::strong_count(&next), 1, "nobody is at it any more");
        }
    }
}
