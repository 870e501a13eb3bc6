//! Every bound on what a peer may make this end hold, and on what this end will send so that an honest peer keeps them.
//!
//! Each bound has two sides: the sender never exceeds it, and the receiver treats more as [`PeerMisbehaved`]. Both ends
//! therefore use the same constants; changing one is a change of the wire ([`frames::VERSION`]).
//!
//! [`PeerMisbehaved`]: crate::PeerMisbehaved
//! [`frames::VERSION`]: crate::frames::VERSION

/// Longest control message.
pub const MESSAGE_BYTES: usize = 1 << 20;

/// Messages that may be under way beyond the last one received in order.
pub const MESSAGE_WINDOW: u64 = 1024;

/// Message bytes that may be under way or received but not yet taken.
pub const MESSAGE_WINDOW_BYTES: u64 = 8 << 20;

/// Message bytes (and, at one byte each, messages) that may await their turn on the sending side.
pub const MESSAGES_HELD_BYTES: usize = 32 << 20;

/// Longest block. The final block of a switchover is several of these if it must be.
pub const BLOCK_BYTES: usize = 8 << 20;

/// Blocks that may be under way beyond the first one missing.
pub const BLOCK_WINDOW: u64 = 1 << 16;

/// Block bytes that may be under way or received but not yet taken by the receiver's user. At 800 MB/s this is a
/// twelfth of a second.
pub const BLOCK_WINDOW_BYTES: u64 = 64 << 20;

/// Longest stream that a peer may send: a whole block with its head. The driver reads no further than this.
pub const STREAM_BYTES: usize = BLOCK_BYTES + 64;

/// Shards of one stripe, data and parity: what GF(2⁸) has elements for.
pub const STRIPE_SHARDS: usize = 256;

/// Data shards of one stripe as this end lays them: enough for parity to be cheap (`algorithms.md` §3.3: use 100–200).
pub const STRIPE_DATA: usize = 128;

/// Smallest shard. A block of [`BLOCK_BYTES`] is then at most 32 Ki data shards.
pub const SHARD_BYTES_MIN: usize = 256;

/// Largest shard: a datagram of a jumbo frame and more.
pub const SHARD_BYTES_MAX: usize = 32 << 10;

/// Paths of one link.
pub const PATHS: usize = 64;

/// Longest acknowledgement, on connections whose datagrams could be longer.
pub const ACK_BYTES: usize = 4 << 10;
