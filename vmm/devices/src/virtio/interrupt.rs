//! A device's interrupt: two status bits, and the line that makes the driver look at them.
//!
//! The bits are atomic and nothing here takes a lock, so that a vCPU which reads or acknowledges its interrupt never
//! waits for a worker in the middle of its work. The engine puts its answers into the rings *before* it sets a bit, and the
//! driver clears a bit *before* it looks into the rings: an answer is seen by this interrupt or announced by another.
//!
//! While the device is paused bits are set and the line stays still; resuming makes up for it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::contract::Line;

/// One device's interrupt.
pub struct Interrupt {
    status: AtomicU32,
    /// How often the configuration changed: a driver reads it before and after, to know that it saw one whole state.
    config_generation: AtomicU32,
    quiet: AtomicBool,
    pulses: AtomicU64,
    line: Arc<dyn Line>,
}

impl Interrupt {
    /// Nothing to say, and quiet.
    pub(super) fn new(line: Arc<dyn Line>) -> Self {
        Self {
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            quiet: AtomicBool::new(true),
            pulses: AtomicU64::new(0),
            line,
        }
    }

    /// There are answers in a ring.
    pub(super) fn answers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration, or the device's status, is not what it was.
    pub(super) fn config(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        if !self.quiet.load(Ordering::SeqCst) {
            self.pulse();
        }
    }

    fn pulse(&self) {
        self.pulses.fetch_add(1, Ordering::Relaxed);
        self.line.pulse();
    }

    /// From now on the line stays still.
    pub(super) fn hush(&self) {
        self.quiet.store(true, Ordering::SeqCst);
    }

    /// From now on the line pulses, and once if something is unacknowledged.
    pub(super) fn speak(&self) {
        self.quiet.store(false, Ordering::SeqCst);
        if self.status() != 0 {
            self.pulse();
        }
    }

    /// The driver has seen these bits.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The bits the driver has not acknowledged.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// How often the line was pulsed.
    pub fn pulses(&self) -> u64 {
        self.pulses.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, status: u32, config_generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.config_generation.store(config_generation, Ordering::SeqCst);
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Interrupt({:#x})", self.status())
    }
}
