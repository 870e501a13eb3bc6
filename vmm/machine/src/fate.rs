//! Whether the guest is over, and why; and whether it wants to be booted again.
//!
//! A device or a vCPU that notices either tells it here, from a vCPU's thread, and the vCPUs stop. An end is final. A reset
//! is carried out by whoever next has all vCPUs parked: the `restart` thread ([`Fate::next_reset`]), or a pause that came
//! first, so that a paused guest never has a reset pending and its state can always be saved.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use umbra_devices::{End, Ending};

use crate::gate::Gate;

/// Why a guest is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// It powered itself off.
    Shutdown,
    /// It asked for a reset, and was to be over then: [`OnReset::Exit`](crate::OnReset::Exit).
    Reset,
    /// It asked for a reset and cannot be booted again here. The text says why.
    NoRestart(String),
    /// It wrote this code to the exit port.
    Code(u32),
    /// It cannot go on: a triple fault, or something KVM could not do. The text says where and what.
    Fault(String),
}

/// Told once, when the guest is over.
pub(crate) type OnExit = dyn Fn(&ExitReason) + Send + Sync;

/// The first reason given for a guest's end, and who wants to know it.
pub(crate) struct Fate {
    gate: Arc<Gate>,
    state: Mutex<State>,
    known: Condvar,
    /// Tells the `restart` thread that it has something to do.
    asked: Condvar,
    /// A reset boots the guest again.
    restarts: AtomicBool,
    on_exit: Box<OnExit>,
    /// A copy of whether `reason` is a fault, for the vCPU loops.
    fault: OnceLock<()>,
}

#[derive(Default)]
struct State {
    over: Option<ExitReason>,
    /// The guest wants to be booted again. Means nothing once it is over.
    reset: bool,
    /// The machine is being dropped.
    quit: bool,
}

impl Fate {
    pub(crate) fn new(gate: Arc<Gate>, on_exit: Box<OnExit>) -> Self {
        Self {
            gate,
            state: Mutex::default(),
            known: Condvar::new(),
            asked: Condvar::new(),
            restarts: AtomicBool::new(false),
            on_exit,
            fault: OnceLock::new(),
        }
    }

    /// The guest is over: stop every vCPU and tell. Only the first reason counts.
    pub(crate) fn end(&self, reason: ExitReason) {
        let mut state = self.state();
        if state.over.is_some() {
            return;
        }
        if matches!(reason, ExitReason::Fault(_)) {
            let _ = self.fault.set(());
        }
        state.over = Some(reason.clone());
        drop(state);
        self.gate.halt();
        self.known.notify_all();
        (self.on_exit)(&reason);
    }

    /// From now on a reset boots the guest again, or ends it.
    pub(crate) fn restart_on_reset(&self, yes: bool) {
        self.restarts.store(yes, Ordering::Release);
    }

    /// The guest wants a reset: stop every vCPU for it. Where resets are an end, this is one, of the kind given.
    pub(crate) fn reset(&self, otherwise: ExitReason) {
        if !self.restarts.load(Ordering::Acquire) {
            return self.end(otherwise);
        }
        self.state().reset = true;
        self.gate.halt();
        self.asked.notify_all();
    }

    /// Whether the guest waits to be booted again.
    pub(crate) fn wants_reset(&self) -> bool {
        self.state().wants_reset()
    }

    /// Whether the guest waits to be booted again, which the caller now does. Its vCPUs must be parked: what they still
    /// asked for then belongs to the life that is over.
    pub(crate) fn take_reset(&self) -> bool {
        let mut state = self.state();
        let wanted = state.wants_reset();
        state.reset = false;
        wanted
    }

    /// Wait for the next reset; says no when there will be none, because the machine goes.
    pub(crate) fn next_reset(&self) -> bool {
        let mut state = self.state();
        while !state.quit && !state.wants_reset() {
            state = self.asked.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.quit
    }

    /// The machine goes.
    pub(crate) fn quit(&self) {
        self.state().quit = true;
        self.asked.notify_all();
    }

    /// The reason, if the guest is over.
    pub(crate) fn known(&self) -> Option<ExitReason> {
        self.state().over.clone()
    }

    /// Whether the guest is over because it cannot go on: then nothing of it may be entered again.
    pub(crate) fn is_fault(&self) -> bool {
        self.fault.get().is_some()
    }

    /// Wait until the guest is over, for at most `patience` if there is a limit to it.
    pub(crate) fn wait(&self, patience: Option<Duration>) -> Option<ExitReason> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut state = self.state();
        while state.over.is_none() {
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.known.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => {
                    self.known
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        state.over.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    const fn wants_reset(&self) -> bool {
        self.reset && self.over.is_none()
    }
}

impl Ending for Fate {
    fn end(&self, why: End) {
        match why {
            End::Code(code) => self.end(ExitReason::Code(code)),
            End::Reset => self.reset(ExitReason::Reset),
            End::PowerOff => self.end(ExitReason::Shutdown),
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("powered off"),
            Self::Reset => f.write_str("asked for a reset"),
            Self::NoRestart(why) => write!(f, "asked for a reset and cannot be booted again here: {why}"),
            Self::Code(code) => write!(f, "ended with code {code}"),
            Self::Fault(text) => write!(f, "cannot go on: {text}"),
        }
    }
}

impl fmt::Debug for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fate({:?})", self.known())
    }
}
