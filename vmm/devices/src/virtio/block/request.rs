//! What the model hands to the machine, and what it gets back.

use std::fmt;

use crate::virtio::{Ram, Segments};

/// Names a request until it has come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(pub(super) u64);

/// Something to be done to the disk. Every range lies within the disk and within guest memory: checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// To be given back with the outcome.
    pub tag: Tag,
    /// What to do.
    pub op: Op,
}

/// What to do. Places and lengths are in bytes, and multiples of [`SECTOR`](super::SECTOR).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Read into guest memory.
    Read {
        /// From where on the disk.
        at: u64,
        /// To where, and how much.
        to: Segments,
    },
    /// Write from guest memory.
    Write {
        /// To where on the disk.
        at: u64,
        /// From where, and how much.
        from: Segments,
        /// When it comes back it is on stable storage.
        durable: bool,
    },
    /// When it comes back, every write that had come back when this was submitted is on stable storage.
    Flush,
    /// The content is of no interest any more.
    Discard {
        /// From where on the disk.
        at: u64,
        /// How much.
        bytes: u64,
    },
    /// Reads as zeros afterwards.
    WriteZeroes {
        /// From where on the disk.
        at: u64,
        /// How much.
        bytes: u64,
        /// The space may be given back.
        unmap: bool,
        /// When it comes back it is on stable storage.
        durable: bool,
    },
}

/// A request that has come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub tag: Tag,
    /// How it ended.
    pub outcome: Outcome,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done.
    Done,
    /// It failed, perhaps after some of it was done.
    Failed,
    /// This disk cannot do such a thing.
    Unsupported,
}

/// The disk behind the model. Called with the device locked: nothing but [`quiesce`](Self::quiesce) may wait.
///
/// An implementation that completes a request calls [`Work::world`](crate::virtio::Work::world) afterwards, on the device's worker. It
/// must mark what it reads into guest memory as written, which every access through [`Ram`](crate::virtio::Ram) does.
pub trait Disk: Send + Sync {
    /// Take a request, whose data lies in `ram`. It must come back by [`completed`](Self::completed), whatever happens. There are
    /// never more out than the queues of the device have places.
    fn submit(&self, request: Request, ram: &Ram);

    /// A request that has come back, if there is one.
    fn completed(&self) -> Option<Completion>;

    /// Wait until every request that was submitted has come back: [`completed`](Self::completed) gives it. Those that had not
    /// begun may fail instead of being done.
    fn quiesce(&self);
}

/// What a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Its size.
    pub sectors: u64,
    /// Bytes of a block: what the guest reads and writes at least. A power of two from 512 to 64 KiB.
    pub block: u32,
    /// Bytes that the guest should write at once to spare the disk a read: a power of two, at least a block.
    pub physical_block: u32,
    /// It cannot be written.
    pub read_only: bool,
    /// It can discard.
    pub discard: bool,
    /// It can write zeros without being given any.
    pub write_zeroes: bool,
}

impl Geometry {
    /// A writable disk of this many sectors with blocks of 512 bytes, which can do everything.
    pub const fn of_sectors(sectors: u64) -> Self {
        Self {
            sectors,
            block: 512,
            physical_block: 4096,
            read_only: false,
            discard: true,
            write_zeroes: true,
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {}", self.0)
    }
}
