//! What goes into a link and what comes out of it: facts, outputs, events.

use core::fmt;
use core::time::Duration;

use bytes::Bytes;
use umbra_units::PathId;

/// A block of this link's sender. Grows by one per block, so that a receiver remembers what it has by a watermark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockId(pub u64);

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}", self.0)
    }
}

/// One stream that a link asked its driver to send. Never reused, whatever path it is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// How a block wants to travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// As many bytes per second as the paths give; nobody waits for this block in particular.
    Bulk,
    /// Somebody waits for exactly this block: the final block of a switchover, the tail of a checkpoint.
    Urgent,
}

/// Which of two streams of one connection goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Bulk blocks.
    Bulk,
    /// Urgent blocks and their repairs.
    Urgent,
    /// Messages and acknowledgements.
    Control,
}

impl Priority {
    /// As a stream priority of quinn (higher goes first; its default is 0, which is bulk's).
    pub const fn level(self) -> i32 {
        match self {
            Self::Bulk => 0,
            Self::Urgent => 1,
            Self::Control => 2,
        }
    }
}

/// What the driver knows of a path whose connection has just been established.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathFacts {
    /// Largest unreliable datagram the connection takes; 0 if it takes none.
    pub max_datagram: usize,
    /// The handshake's round trip, if it was measured.
    pub rtt: Option<Duration>,
}

/// What the driver's connection statistics say. Counters count from the connection's beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathSample {
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Congestion window in bytes.
    pub cwnd: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Of those, packets declared lost.
    pub lost_packets: u64,
    /// Bytes sent, headers included.
    pub sent_bytes: u64,
    /// Of those, bytes in packets declared lost.
    pub lost_bytes: u64,
    /// Largest unreliable datagram the connection takes now; 0 if it takes none.
    pub max_datagram: usize,
}

/// Something the driver shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send `bytes` as one unreliable datagram on `path`.
    Datagram {
        /// On which path.
        path: PathId,
        /// The whole datagram.
        bytes: Bytes,
    },
    /// Send `head` and then `body` as one whole one-way stream on `path`, and finish it. They are two so that a block
    /// need not be copied to be framed; when the last byte has been handed to the connection, say so with
    /// [`Link::handle_sent`](crate::Link::handle_sent).
    Stream {
        /// On which path.
        path: PathId,
        /// Names the stream in a later [`Output::ResetStream`].
        stream: StreamId,
        /// Who goes first.
        priority: Priority,
        /// First bytes of the stream.
        head: Bytes,
        /// All other bytes of the stream; may be empty.
        body: Bytes,
    },
    /// What `stream` carries is no longer wanted: reset it if it is not finished, else ignore this.
    ResetStream {
        /// On which path.
        path: PathId,
        /// Which stream of an earlier [`Output::Stream`].
        stream: StreamId,
    },
}

/// Why a path is suspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Suspicion {
    /// Probes stay unanswered.
    Silent,
    /// Probes are answered but what was laid on the path does not arrive: a black hole for large packets, or a peer
    /// that acknowledges nothing.
    Stalled,
}

/// Something the driver's own user should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The next message of the peer, in the order it was sent.
    Message(Bytes),
    /// A block of the peer, whole. Blocks come in any order.
    Block {
        /// The peer's number for it.
        id: BlockId,
        /// The block.
        bytes: Bytes,
    },
    /// The peer's link holds this block of ours, whole; it will not be sent again.
    BlockDelivered(BlockId),
    /// The path carries traffic (again).
    PathUp(PathId),
    /// The path is not trusted for now: what was laid on it is laid elsewhere, and only probes go there.
    PathSuspect(PathId, Suspicion),
    /// The path's connection is gone.
    PathDown(PathId),
    /// No path carries traffic. Everything unacknowledged waits for one.
    AllPathsDown,
    /// A path carries traffic again after [`LinkEvent::AllPathsDown`].
    Restored,
}
