//! A device and its queues, and when the device works.
//!
//! Two kinds of thread come here, and lock the engine to do so: vCPUs, for the few registers that concern the device (status,
//! configuration), and the device's worker. Neither waits long for the other, because nothing here waits, with one exception
//! that must be: a driver that resets the device, or takes a queue out of use, is about to use its memory for something else,
//! so that vCPU waits until the world has let go of it ([`Virtio::quiesce`]).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_units::Now;

use super::interrupt::Interrupt;
use super::rings::{Position, Rings, Setup};
use super::{Cause, Ram, Virtio, Wake};
use crate::limits::VIRTIO_QUEUES;

/// A device at work.
pub struct Engine<D> {
    device: D,
    rings: Rings,
    paused: bool,
    /// The world may have moved while the device could not look.
    world_due: bool,
}

/// What happened to a device's queues since it was built or restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Well-formed chains that were taken.
    pub chains: u64,
    /// Chains that were given back unread.
    pub malformed: u64,
    /// Times the driver made a queue unusable.
    pub broken: u64,
    /// Pulses of the interrupt line.
    pub interrupts: u64,
}

/// An engine as its worker sees it, whatever the device. The [module above](super) says who calls what, and when.
pub trait Work: Send + Sync {
    /// The device's name: `disk/rootfs`.
    fn kind(&self) -> String;

    /// A queue's event fired.
    fn notified(&self, queue: u16, now: Now) -> Wake;

    /// The world moved, or a wake is due.
    fn world(&self, now: Now) -> Wake;

    /// How many requests the world still has. To be waited for between pausing and saving.
    fn busy(&self) -> usize;

    /// What happened so far.
    fn counters(&self) -> Counters;
}

impl<D: Virtio> Engine<D> {
    /// A device at power-on, paused.
    ///
    /// # Panics
    /// When the device has more queues than a device may have, or one whose size is not a power of two up to 32768: its author's
    /// mistake.
    pub(super) fn new(device: D, ram: Ram, interrupt: Arc<Interrupt>) -> Self {
        let sizes = device.queues();
        assert!(
            sizes.len() <= VIRTIO_QUEUES && sizes.iter().all(|size| size.is_power_of_two()),
            "{}: queues of {sizes:?}",
            device.kind()
        );
        Self {
            rings: Rings::new(ram, interrupt, &sizes),
            device,
            paused: true,
            world_due: false,
        }
    }

    /// The driver may have put chains into `queue`. One that it does not use is ignored.
    pub fn notified(&mut self, queue: u16, now: Now) -> Wake {
        self.rings.note(queue);
        self.run(now)
    }

    /// The world moved, or a moment the device asked for has come.
    pub fn world(&mut self, now: Now) -> Wake {
        self.world_due = true;
        self.run(now)
    }

    fn run(&mut self, now: Now) -> Wake {
        if self.paused && self.device.busy() == 0 || !self.rings.is_live() {
            self.collect_for_nobody(now);
            return Wake::Idle;
        }
        self.rings.begin();
        let mut wake = Wake::Idle;
        // A device that is paused and busy only collects: its rings are closed, and what was noted stays noted.
        if self.world_due || self.paused {
            self.world_due = self.paused;
            wake = self.device.work(now, Cause::World, &mut self.rings);
        }
        let due = if self.paused { 0 } else { self.rings.take_due() };
        for queue in (0..64).filter(|queue| due >> queue & 1 == 1) {
            wake = wake.min(self.device.work(now, Cause::Notified(queue), &mut self.rings));
        }
        self.rings.finish();
        match (self.paused, self.rings.has_due()) {
            (true, _) => Wake::Idle,
            (false, true) => Wake::Again,
            (false, false) => wake,
        }
    }

    /// Requests may still come back after their queues broke. Nobody waits for them, but they must not count as out for ever.
    fn collect_for_nobody(&mut self, now: Now) {
        if self.device.busy() > 0 {
            self.device.work(now, Cause::World, &mut self.rings);
        }
    }

    /// Do something to the device from outside of the guest (another size for a balloon, a key on a console), with its rings open
    /// unless it is paused.
    pub fn act<R>(&mut self, what: impl FnOnce(&mut D, &mut Rings) -> R) -> R {
        self.rings.begin();
        let result = what(&mut self.device, &mut self.rings);
        self.rings.finish();
        result
    }

    /// Take nothing more from the queues and raise no interrupt.
    pub fn pause(&mut self) {
        self.paused = true;
        self.rings.set_open(false);
    }

    /// Go on, and look at everything once: see the [module above](super), point 5.
    pub fn resume(&mut self) {
        self.paused = false;
        self.world_due = true;
        self.rings.set_open(true);
        self.rings.note_all();
    }

    /// How many requests the world still has.
    pub fn busy(&self) -> usize {
        self.device.busy()
    }

    /// The device.
    pub const fn device(&self) -> &D {
        &self.device
    }

    /// Whether the driver made a queue unusable and has not reset the device since.
    pub const fn is_broken(&self) -> bool {
        self.rings.is_broken()
    }

    /// The queues the driver uses.
    pub fn active(&self) -> Vec<u16> {
        self.rings.active()
    }

    pub(super) fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The driver is ready.
    pub(super) fn start(&mut self, features: u64, setups: &[Setup]) {
        self.rings.start(features, setups);
        self.world_due = true;
    }

    /// Go on where another instance stopped.
    pub(super) fn go_on(
        &mut self,
        features: u64,
        queues: &[(Setup, Position)],
        broken: bool,
    ) -> Result<(), &'static str> {
        self.rings.go_on(features, queues, broken)
    }

    /// The driver takes a queue out of use.
    pub(super) fn stop(&mut self, queue: u16) {
        self.device.quiesce();
        self.rings.stop(queue);
    }

    /// The driver, or the machine, resets the device.
    pub(super) fn reset(&mut self) {
        self.device.quiesce();
        self.device.reset();
        self.rings.reset();
        self.world_due = false;
    }

    /// Change places with `other`, which was built apart, but keep this engine's interrupt.
    pub(super) fn replace(&mut self, other: &mut Self, interrupt: Arc<Interrupt>) {
        // What this device has out comes back to it, not to the other.
        self.device.quiesce();
        self.device.reset();
        std::mem::swap(self, other);
        self.rings.connect(interrupt);
    }

    pub(super) fn position(&self, queue: usize) -> Position {
        self.rings.position(queue)
    }

    fn counters(&self) -> Counters {
        self.rings.counters()
    }
}

impl<D: Virtio> Work for Mutex<Engine<D>> {
    fn kind(&self) -> String {
        lock(self).device.kind().to_owned()
    }

    fn notified(&self, queue: u16, now: Now) -> Wake {
        lock(self).notified(queue, now)
    }

    fn world(&self, now: Now) -> Wake {
        lock(self).world(now)
    }

    fn busy(&self) -> usize {
        lock(self).busy()
    }

    fn counters(&self) -> Counters {
        lock(self).counters()
    }
}

/// An engine's lock outlives a panic of somebody else: a device that was interrupted in its work is still one that a driver can
/// reset.
pub(super) fn lock<T>(engine: &Mutex<T>) -> MutexGuard<'_, T> {
    engine.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<D: Virtio> fmt::Debug for Engine<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paused = if self.paused { ", paused" } else { "" };
        write!(f, "Engine({}, {:?}{paused})", self.device.kind(), self.rings)
    }
}
