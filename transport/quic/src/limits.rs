//! Bounds on what a peer, or a stranger on the network, may make this end hold or wait for.

use core::time::Duration;

/// The join handshake, either way. Its layout is fixed for all versions, and nothing in it grows.
pub const JOIN_BYTES: usize = 1 << 10;

/// Versions one side may offer.
pub const JOIN_VERSIONS: usize = 16;

/// Text of a refusal.
pub const REFUSAL_TEXT: usize = 512;

/// From a connection's first packet to its answer: long enough for four round trips of a bad satellite link, short
/// enough that a slow-loris gives its place back.
pub const JOIN_DEADLINE: Duration = Duration::from_secs(5);

/// Connections of a listener that are between first packet and join; more are turned away unheard.
pub const JOINING: usize = 64;

/// Of those, as many as this are admitted without proof that their address is real (a retry round trip).
pub const JOINING_UNPROVEN: usize = 16;

/// Links that wait for the caller's decision.
pub const UNDECIDED: usize = 16;

/// How long a connection waits for the caller to decide on its link.
pub const DECISION_DEADLINE: Duration = Duration::from_secs(10);

/// Closed links a listener remembers, so that a path that comes late learns why its link is gone.
pub const REMEMBERED: usize = 64;

/// Streams a peer may have open on one connection. An honest peer's blocks of 64 KiB in a window of 64 MiB are as many.
pub const STREAMS: u32 = 1 << 10;

/// Bytes of one link's unfinished incoming streams. The peer's window is a quarter of it: the same blocks may be under
/// way on several paths at once.
pub const UNFINISHED_BYTES: usize = 256 << 20;

/// Chance that an honest connection breaks the frames' rules: none. As many as this on one link, and the peer is not
/// one to talk to.
pub const MISBEHAVIOURS: u32 = 3;

/// Facts from the connections that wait for the driver.
pub const ARRIVALS: usize = 1 << 10;

/// Blocks and messages that wait for the driver, per kind. Each waits for the link's own room behind this.
pub const COMMANDS: usize = 8;

/// Bytes of events that wait for the link's user; beyond that the peer's blocks wait in the link, and then at the peer.
pub const EVENT_BYTES: usize = 16 << 20;

/// Finished streams per path that can still be reset while quinn holds them. An older one has long been sent.
pub const RESETTABLE: usize = 256;

/// A reason for closing, as it travels.
pub const REASON_TEXT: usize = 512;

/// A key or certificate file. Ours have a few hundred bytes.
pub const PEM_BYTES: u64 = 64 << 10;
