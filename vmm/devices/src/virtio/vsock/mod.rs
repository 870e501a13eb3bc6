//! Sockets between the guest and programs of its host (virtio 1.2, Socket Device).
//!
//! ```text
//!   queue 0  packets to the guest     ◀─┐              ┌─ read ◀──┐
//!   queue 1  packets from the guest   ──┴─ connections ┴─ write ──┴─ Streams ─ programs of the host
//!   queue 2  events: the transport was reset
//! ```
//!
//! # Credit
//!
//! Each side says how many bytes of a connection it can hold, and how many it has passed on; the other never sends more
//! than fits (virtio 1.2, Buffer Space Management). A guest that sends more than [`VSOCK_BUFFER_BYTES`](crate::limits::VSOCK_BUFFER_BYTES)
//! beyond what its peer has taken is reset. Nothing is read from a program before there is room for it in the guest.
//!
//! # What a move does to connections
//!
//! Their other ends are programs of the old host, so no connection travels. The guest is told so by an event
//! (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`): its connections end, its listeners stay, and it reads anew which CID it has, which the
//! receiving host chose. That is the whole state of this device: nothing.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | all connections, and the queues |
//! | `connection.rs` | one connection: its phase, its credit, what it owes the guest |
//! | `packet.rs` | the header of a packet |
//! | `streams.rs` | the host's programs, as a trait |

mod connection;
mod device;
mod packet;
mod streams;

pub use device::{Counts, Vsock, Wiring};
pub use streams::{Interest, News, Progress, StreamId, Streams};

/// The CID by which a guest knows its host (virtio 1.2, Socket Device, Addressing).
pub const HOST_CID: u64 = 2;

/// The least CID a guest may have: 0 to 2 mean something else.
pub const CID_LEAST: u64 = 3;

/// The greatest: the upper 32 bits are reserved, and all ones is "any".
pub const CID_MOST: u64 = 0xffff_fffe;

/// Chains of each queue.
pub const QUEUE_SIZE: u16 = 128;

/// The queue of packets to the guest.
pub const RECEIVE: u16 = 0;

/// The queue of packets from the guest.
pub const TRANSMIT: u16 = 1;

/// The queue of events.
pub const EVENT: u16 = 2;

/// The first port given to a program of the host that connects to the guest. Firecracker's, so that programs which know it see
/// what they expect.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

#[cfg(test)]
mod tests;
