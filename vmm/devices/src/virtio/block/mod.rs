//! A disk (virtio 1.2, Block Device).
//!
//! ```text
//!    queue ──pop──▶ Block ──checked Request { tag, op }──▶ Disk::submit ─ ─ ▶ a file, on threads of the machine
//!                     │                                                          │
//!    queue ◀─push── status byte ◀────── Completion { tag, outcome } ◀── Disk::completed
//! ```
//!
//! The model does no I/O and never waits for any. It takes requests out of the queues, checks every number in them, and
//! hands over what is left as values; their pages of guest memory are named, not copied, so that the machine moves the bytes
//! directly between file and guest while nothing is locked. When a request comes back the model writes its status byte and
//! gives the chain back. Requests come back in any order.
//!
//! # What a write means
//!
//! Without a word from the driver the disk has a volatile cache: what was written is safe once a later flush has come back.
//! A driver that does not know flushes, or that switched the cache off (`CONFIG_WCE`), gets writes that are safe when they
//! come back ([`Op::Write`], `durable`). Nothing is ordered against anything else that is in flight: a flush covers the writes
//! that had come back when it was submitted (virtio 1.2, Block Device, Device Operation).
//!
//! # Reset, pause and requests in flight
//!
//! A driver that resets the device will use the memory of its requests for something else. [`Disk::quiesce`] returns when every
//! request has come back; the answers belong to a queue of a former life and are dropped. Before the device is saved, the
//! requests in flight must have come back: [`Virtio::busy`](super::Virtio::busy) counts them.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | behaviour and the saved layout |
//! | `parse.rs` | from a chain to a request |
//! | `request.rs` | what is handed to the machine |

mod device;
mod parse;
mod request;

pub use device::{Block, Counters, Wiring};
pub use request::{Completion, Disk, Geometry, Op, Outcome, Request, Tag};

/// Bytes of a sector, the unit of every number the driver and the device exchange, whatever the disk's blocks are.
pub const SECTOR: u64 = 512;

/// Chains a driver may have in one queue.
pub const QUEUE_SIZE: u16 = 256;

/// Pieces of data in one request: a whole queue, less header and status.
pub const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// Bytes of a disk's serial number (virtio 1.2, Block Device, Device Operation, `VIRTIO_BLK_T_GET_ID`).
pub const SERIAL_BYTES: usize = 20;

/// What a driver says: a header of each kind, with what follows it.
#[cfg(test)]
pub(crate) fn words() -> Vec<Vec<u8>> {
    use virtio_bindings::virtio_blk as spec;

    let message = |kind: u32, sector: u64, rest: &[u8]| {
        let mut w = umbra_units::Writer::new();
        w.u32(kind).u32(0).u64(sector).put(rest);
        w.into_bytes()
    };
    let mut range = umbra_units::Writer::new();
    range.u64(3).u32(2).u32(0);
    vec![
        message(spec::VIRTIO_BLK_T_IN, 1, &[]),
        message(spec::VIRTIO_BLK_T_IN, 2, &[]),
        message(spec::VIRTIO_BLK_T_OUT, 3, &[7; 512]),
        message(spec::VIRTIO_BLK_T_OUT, 4, &[8; 1536]),
        message(spec::VIRTIO_BLK_T_FLUSH, 0, &[]),
        message(spec::VIRTIO_BLK_T_GET_ID, 0, &[]),
        message(spec::VIRTIO_BLK_T_DISCARD, 0, range.as_slice()),
        message(spec::VIRTIO_BLK_T_WRITE_ZEROES, 0, range.as_slice()),
    ]
}
