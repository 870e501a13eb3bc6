//! A disk in memory, which does what it is told, and when.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_units::Rng;

use crate::virtio::Ram;
use crate::virtio::block::{Completion, Disk, Op, Outcome, Request, SECTOR};

/// A disk in memory. It does every request at once, unless it is told to hold them back.
#[derive(Debug)]
pub struct MemoryDisk(Mutex<State>);

#[derive(Debug)]
struct State {
    bytes: Vec<u8>,
    /// What would be left after a power cut.
    stable: Vec<u8>,
    held: VecDeque<(Request, Ram)>,
    holding: bool,
    failing: Option<Outcome>,
    done: VecDeque<Completion>,
}

impl MemoryDisk {
    /// A disk of zeros.
    ///
    /// # Panics
    /// When it does not fit into memory.
    pub fn new(sectors: u64) -> Self {
        let bytes = vec![0; usize::try_from(sectors * SECTOR).expect("a small disk")];
        Self(Mutex::new(State {
            stable: bytes.clone(),
            bytes,
            held: VecDeque::new(),
            holding: false,
            failing: None,
            done: VecDeque::new(),
        }))
    }

    /// From now on, hold requests back, or do not.
    pub fn hold(&self, hold: bool) {
        self.state().holding = hold;
    }

    /// From now on requests end like this, and nothing is done. `None`: they are done.
    pub fn fail(&self, how: Option<Outcome>) {
        self.state().failing = how;
    }

    /// How many requests are held back.
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// Do one of the requests that are held back; which, is drawn.
    pub fn release(&self, rng: &mut Rng) -> bool {
        let mut state = self.state();
        let count = state.held.len() as u64;
        let Some(n) = (count > 0).then(|| rng.below(count)) else {
            return false;
        };
        let n = usize::try_from(n).expect("less than the number of requests");
        let (request, ram) = state.held.remove(n).expect("drawn among those that are held");
        state.perform(request, &ram);
        true
    }

    /// What is on the disk.
    pub fn content(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// What would be on it after a power cut now.
    pub fn stable(&self) -> Vec<u8> {
        self.state().stable.clone()
    }

    /// Put something on the disk.
    pub fn fill(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.bytes[..bytes.len()].copy_from_slice(bytes);
        state.stable[..bytes.len()].copy_from_slice(bytes);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn perform(&mut self, request: Request, ram: &Ram) {
        let outcome = self.failing.unwrap_or_else(|| self.act(request.op, ram));
        let tag = request.tag;
        self.done.push_back(Completion { tag, outcome });
    }

    fn act(&mut self, op: Op, ram: &Ram) -> Outcome {
        let range = |at: u64, bytes: u64| {
            let place = |n| usize::try_from(n).expect("requests lie within the disk, which is in memory");
            place(at)..place(at + bytes)
        };
        match op {
            Op::Read { at, mut to } => {
                let from = range(at, to.bytes());
                if to.write(ram, &self.bytes[from]).is_err() {
                    return Outcome::Failed;
                }
            }
            Op::Write { at, mut from, durable } => {
                let to = range(at, from.bytes());
                if from.read(ram, &mut self.bytes[to.clone()]).is_err() {
                    return Outcome::Failed;
                }
                if durable {
                    self.stable[to.clone()].copy_from_slice(&self.bytes[to]);
                }
            }
            Op::Flush => self.stable.copy_from_slice(&self.bytes),
            Op::Discard { at, bytes } => self.bytes[range(at, bytes)].fill(0),
            Op::WriteZeroes { at, bytes, durable, .. } => {
                self.bytes[range(at, bytes)].fill(0);
                if durable {
                    self.stable[range(at, bytes)].fill(0);
                }
            }
        }
        Outcome::Done
    }
}

impl Disk for MemoryDisk {
    fn submit(&self, request: Request, ram: &Ram) {
        let mut state = self.state();
        if state.holding {
            state.held.push_back((request, ram.clone()));
        } else {
            state.perform(request, ram);
        }
    }

    fn completed(&self) -> Option<Completion> {
        self.state().done.pop_front()
    }

    fn quiesce(&self) {
        let mut state = self.state();
        while let Some((request, ram)) = state.held.pop_front() {
            state.perform(request, &ram);
        }
    }
}
