//! Whether the guest is over, and why.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use umbra_devices::{End, Ending};

use crate::gate::Gate;

/// Why a guest is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// It powered itself off.
    Shutdown,
    /// It asked for a reset.
    Reset,
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
    reason: Mutex<Option<ExitReason>>,
    known: Condvar,
    on_exit: Box<OnExit>,
    /// A copy of whether `reason` is a fault, for the vCPU loops.
    fault: OnceLock<()>,
}

impl Fate {
    pub(crate) fn new(gate: Arc<Gate>, on_exit: Box<OnExit>) -> Self {
        Self {
            gate,
            reason: Mutex::new(None),
            known: Condvar::new(),
            on_exit,
            fault: OnceLock::new(),
        }
    }

    /// The guest is over: stop every vCPU and tell. Only the first reason counts.
    pub(crate) fn end(&self, reason: ExitReason) {
        let mut known = self.reason();
        if known.is_some() {
            return;
        }
        if matches!(reason, ExitReason::Fault(_)) {
            let _ = self.fault.set(());
        }
        *known = Some(reason.clone());
        drop(known);
        self.gate.halt();
        self.known.notify_all();
        (self.on_exit)(&reason);
    }

    /// The reason, if the guest is over.
    pub(crate) fn known(&self) -> Option<ExitReason> {
        self.reason().clone()
    }

    /// Whether the guest is over because it cannot go on: then nothing of it may be entered again.
    pub(crate) fn is_fault(&self) -> bool {
        self.fault.get().is_some()
    }

    /// Wait until the guest is over, for at most `patience` if there is a limit to it.
    pub(crate) fn wait(&self, patience: Option<Duration>) -> Option<ExitReason> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut known = self.reason();
        while known.is_none() {
            known = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.known.wait(known).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => {
                    self.known
                        .wait_timeout(known, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
        known.clone()
    }

    fn reason(&self) -> MutexGuard<'_, Option<ExitReason>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ending for Fate {
    fn end(&self, why: End) {
        self.end(match why {
            End::Code(code) => ExitReason::Code(code),
            End::Reset => ExitReason::Reset,
            End::PowerOff => ExitReason::Shutdown,
        });
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("powered off"),
            Self::Reset => f.write_str("asked for a reset"),
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
