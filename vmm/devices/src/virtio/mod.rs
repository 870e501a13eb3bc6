//! Virtio devices: what they are to the guest, to the machine around them, and to whoever writes another one.
//!
//! ```text
//!            vCPU thread                              worker thread of the machine
//!       read, write │                                 │ notified, world
//!                   ▼                                 ▼
//!   registers  Mmio<D> ── start, reset, config ──▶ Mutex<Engine<D>>
//!                   │                               ├─ D: Virtio     one device type: what requests mean
//!                   │                               └─ Rings         its queues in guest memory
//!                   └──────── Arc<Interrupt> ◀────────── raise
//!                             status bits, Line
//! ```
//!
//! | file | what |
//! |---|---|
//! | [`mmio`] | the register file that the guest sees (virtio 1.2, Virtio Over MMIO), version 2 only |
//! | [`engine`] | a device, its queues, and when it works; [`Work`] is what a worker thread sees of it |
//! | [`rings`], [`chain`] | taking requests out of guest memory and putting answers back |
//! | [`interrupt`] | the status bits and the line behind them |
//! | `state` | the saved layout, one record for transport and device |
//! | [`testing`] | a driver that behaves, one that does not, and what to watch them with |
//! | [`limiter`] | token buckets, for devices that may do only so much |
//! | [`rng`] | entropy: the simplest device, to copy from |
//! | [`block`] | disks |
//! | [`net`] | a network card |
//! | [`vsock`] | sockets between the guest and programs of its host |
//! | [`balloon`] | memory that the guest gives back |
//! | [`console`] | a console of one port |
//!
//! # Writing a device
//!
//! Implement [`Virtio`]. Effects on the world are traits in its `Wiring`, called with the engine locked: none may wait.
//! What takes time (a disk) is *handed over* as a value and collected later; [`Virtio::busy`] counts what is out.
//!
//! A device is told to [`work`](Virtio::work) with a [`Cause`] and looks for itself what there is to do: causes may come
//! too often, never too rarely. It takes chains until [`Rings::pop`] says `None`. `None` means that the ring is empty and
//! the driver will notify again, or that this call has done its share and another call is certain. A device that stops
//! *before* `None` (it was limited, the disk is full of work) is not notified again, and must come back by itself: by a
//! [`Wake`], or because something it handed over will end.
//!
//! # The driver is a stranger
//!
//! Everything in guest memory is an allegation. The queues see that chains end, are not longer than
//! [`CHAIN_SEGMENTS`](crate::limits::CHAIN_SEGMENTS), put what the device may read before what it may write, and that no more chains
//! are out than the queue has places. A chain that breaks this is returned unread with length 0 and counted. A queue that
//! cannot be used at all (rings outside of memory, indices that make no sense) breaks the device: it asks for a reset
//! and is silent until then (virtio 1.2, Device Status Field, `DEVICE_NEEDS_RESET`). Addresses *within* a chain are
//! checked when they are used: see [`chain::Segments`].
//!
//! # How the machine drives a device
//!
//! 1. Build `Mmio::new(Wiring { ram, line, bell, device })`, claim [`mmio::WINDOW`] bytes of the MMIO bus for it.
//! 2. Give the [`Work`] of [`Mmio::work`] to a worker thread, with one event per queue ([`Mmio::queues`] says how many). The
//!    event is signalled by a write of the queue's number to [`mmio::NOTIFY`] (KVM can do that alone), and by
//!    [`Bell::ring`].
//! 3. The worker calls [`Work::notified`] when a queue's event fires, and [`Work::world`] when the world moved (a file
//!    descriptor became readable, a disk request ended) or a [`Wake::At`] is due. After [`Wake::Again`] it calls
//!    [`Work::world`] again once it has looked at its own orders.
//!    File descriptors of the world are watched edge-triggered: a device reads until there is nothing, or until it has
//!    no room; and when room appears it looks at the world by itself.
//! 4. To pause: stop the vCPUs, [`Device::pause`](crate::Device::pause), go on calling [`Work::world`] until [`Work::busy`] is 0, then
//!    [`Device::save`](crate::Device::save). A paused device takes nothing from its queues and raises no interrupt; it only finishes what it
//!    handed over.
//! 5. To go on: [`Device::resume`](crate::Device::resume). It rings the bell of every queue in use, because a notification may have
//!    been lost in an event of another process, and pulses the line if an interrupt is unacknowledged, for the same reason. A spurious
//!    notification or interrupt is harmless.
//! 6. To restore into a machine whose workers and events exist: [`Mmio::restore`](crate::Restore::restore) with the same wiring, and once
//!    every device is restored, [`Mmio::take_over`], which cannot fail.
//!
//! # Memory
//!
//! [`Ram`] marks what is written through it in a bitmap, because KVM's dirty log does not see it. There is no other way
//! from here to guest memory, so no device can forget (docs/decisions/0016-devices-see-guest-memory.md).

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod engine;
pub mod interrupt;
pub mod limiter;
mod marks;
pub mod mmio;
pub mod net;
pub mod rings;
pub mod rng;
mod state;
pub mod testing;
#[cfg(test)]
mod tests;
pub mod vsock;

use std::fmt;

use umbra_units::{Malformed, Now, Reader, Writer};
use vm_memory::GuestMemoryMmap;

pub use chain::{Chain, Segment, Segments, Token};
pub use engine::{Counters, Engine, Work};
pub use interrupt::Interrupt;
pub use marks::WriteMarks;
pub use mmio::{Mmio, Wiring};
pub use rings::Rings;

/// Guest memory as devices see it: every write is marked in the bitmap.
pub type Ram = GuestMemoryMmap<WriteMarks>;

/// One device type: what its requests mean. Everything about registers, queues and interrupts is the transport's.
pub trait Virtio: Send + 'static {
    /// The device's number (virtio 1.2, Device Types).
    const ID: u32;

    /// The layout of what [`save`](Self::save) writes; at most 65535.
    const VERSION: u32;

    /// What this device is, and the effects it is connected to. State does not carry it.
    type Wiring: Clone + Send + Sync;

    /// The device at power-on.
    fn new(wiring: Self::Wiring) -> Self;

    /// The name its state travels under: `disk/rootfs`.
    fn kind(&self) -> &str;

    /// The greatest size of each queue, a power of two. The number of queues is at most
    /// [`VIRTIO_QUEUES`](crate::limits::VIRTIO_QUEUES), and neither ever changes.
    fn queues(&self) -> Vec<u16>;

    /// The feature bits of this device type that are offered. The transport adds its own.
    fn features(&self) -> u64;

    /// The driver has settled for these features (`FEATURES_OK`), the device's and the transport's. Called before any work, again
    /// when a device is restored, and never with a bit that was not offered.
    fn accept(&mut self, _features: u64) {}

    /// The configuration space, whole.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver writes to the configuration space: any offset, any length up to 8.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Something may have happened: look, and do what there is to do, without waiting.
    fn work(&mut self, now: Now, cause: Cause, rings: &mut Rings) -> Wake;

    /// How many requests were handed to the world and have not come back.
    fn busy(&self) -> usize {
        0
    }

    /// Wait until every request that was handed over has come back from the world, and so no guest memory is touched any more. The
    /// only method that may wait, and only for that: the driver is about to use the memory for something else. What has come
    /// back is collected by the next [`work`](Self::work) as ever.
    fn quiesce(&mut self) {}

    /// Back to power-on: forget the driver and all it asked for. Called after [`quiesce`](Self::quiesce).
    fn reset(&mut self);

    /// Write everything another instance needs to continue. Called only when nothing is [`busy`](Self::busy).
    fn save(&self, w: &mut Writer);

    /// Take up, at power-on, what [`save`](Self::save) wrote; [`accept`](Self::accept) has been called.
    fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed>;
}

/// Why a device is asked to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The driver may have put chains into this queue.
    Notified(u16),
    /// Something outside may have happened, or a moment that was asked for has come.
    World,
}

/// When a device wants to be called again although nothing happens. The newest answer replaces all before it. Ordered: the
/// sooner, the smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// There is more to do: as soon as the caller has looked at what else there is.
    Again,
    /// At this moment, or later.
    At(Now),
    /// Never: something will happen first.
    Idle,
}

/// How the transport tells a device's worker that a queue has work, when the guest's notification did not reach the worker by
/// itself. Called on vCPU threads: it may not wait, and must work while the worker is paused.
pub trait Bell: Send + Sync {
    /// See to it that [`Work::notified`] is called with this queue.
    fn ring(&self, queue: u16);
}

impl fmt::Display for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Again => f.write_str("again"),
            Self::At(moment) => write!(f, "at {moment}"),
            Self::Idle => f.write_str("idle"),
        }
    }
}

/// The feature bit of this number.
pub(crate) const fn bit(number: u32) -> u64 {
    1 << number
}
