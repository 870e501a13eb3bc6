//! Between the thread that copies pages and the thread that writes them to disk.
//!
//! Batches wait here up to a bound in bytes. In the pause that is what makes the disk's slowness nobody's business: the
//! belt is emptied before the guest is stopped, the last pages are laid on it, and the guest runs on while they are written.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Most bytes that wait: more than any but a furious writer leaves for the pause.
const MOST: usize = 64 << 20;

#[derive(Default)]
pub(super) struct Belt {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    /// Bytes laid on the belt and not yet written.
    bytes: usize,
    /// Nothing follows.
    over: bool,
    /// Nothing is taken any more.
    broken: bool,
}

impl Belt {
    /// Lay a batch on the belt, when there is room. False if nobody takes it.
    pub(super) fn put(&self, batch: Vec<u8>) -> bool {
        let full = |state: &State| !state.broken && state.bytes > 0 && state.bytes + batch.len() > MOST;
        let mut state = self.wait_while(full);
        if state.broken {
            return false;
        }
        state.bytes += batch.len();
        state.waiting.push_back(batch);
        self.changed.notify_all();
        true
    }

    /// Wait until everything has been written. False if nobody takes anything any more.
    pub(super) fn wait_empty(&self) -> bool {
        !self.wait_while(|state| !state.broken && state.bytes > 0).broken
    }

    /// The next batch, or `None` when nothing follows.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        self.wait_while(|state| state.waiting.is_empty() && !state.over)
            .waiting
            .pop_front()
    }

    /// What was taken, so many bytes, is written.
    pub(super) fn written(&self, bytes: usize) {
        self.state().bytes -= bytes;
        self.changed.notify_all();
    }

    /// Nothing follows once this is dropped, be it by a panic: whoever takes must not wait for ever.
    pub(super) const fn over_when_dropped(&self) -> Over<'_> {
        Over(self)
    }

    fn finish(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// Nothing is taken any more.
    pub(super) fn break_down(&self) {
        self.state().broken = true;
        self.changed.notify_all();
    }

    fn wait_while(&self, not_yet: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        self.changed
            .wait_while(self.state(), |state| not_yet(state))
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// While this lives, something may follow on the belt.
pub(super) struct Over<'a>(&'a Belt);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_come_off_the_belt_in_order_and_never_more_than_the_bound_wait() {
        let belt = Belt::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..200u8 {
                    assert!(belt.put(vec![n; 1 << 20]));
                }
                assert!(belt.wait_empty());
                belt.finish();
            });
            let mut next = 0;
            while let Some(batch) = belt.take() {
                assert!(belt.state().bytes <= MOST);
                assert_eq!(batch[0], next);
                next += 1;
                belt.written(batch.len());
            }
            assert_eq!(next, 200);
        });
    }

    #[test]
    fn a_belt_that_broke_down_lets_nobody_wait() {
        let belt = Belt::default();
        assert!(belt.put(vec![0; MOST]));
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(!belt.put(vec![0; 1])));
            scope.spawn(|| assert!(!belt.wait_empty()));
            belt.break_down();
        });
    }
}
