//! What a link can say about itself.

use core::time::Duration;

use umbra_units::{Bandwidth, PathId, Ratio};

use crate::event::Suspicion;

/// Whether a path carries traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PathState {
    /// It does.
    Up,
    /// Its connection exists, but only probes are sent on it.
    Suspect(Suspicion),
    /// It has no connection.
    Down,
}

/// One path, as this end sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct PathStats {
    /// Which path.
    pub path: PathId,
    /// Whether it carries traffic.
    pub state: PathState,
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Smallest round trip of the last seconds.
    pub rtt_min: Duration,
    /// Mean deviation of the round trip.
    pub rtt_var: Duration,
    /// What it is believed to carry.
    pub rate: Bandwidth,
    /// Mean loss of packets.
    pub loss: Ratio,
    /// Loss that nine of ten further looks would find below.
    pub loss_high: Ratio,
    /// Mean number of packets lost in a row.
    pub burst: f64,
    /// Chance that the path lives through the next second, from how often it died.
    pub alive: Ratio,
    /// Bytes laid on it and not yet acknowledged.
    pub outstanding_bytes: u64,
    /// Bytes it may hold unacknowledged.
    pub window_bytes: u64,
    /// Bytes laid on it that its driver has not yet handed to the connection.
    pub queued_bytes: u64,
    /// Message bytes sent on it.
    pub message_bytes: u64,
    /// Bulk block bytes sent on it.
    pub bulk_bytes: u64,
    /// Urgent block bytes sent on it, parity and repairs included.
    pub urgent_bytes: u64,
    /// Shards sent on it.
    pub shards: u64,
    /// Its share of all block bytes sent.
    pub share: Ratio,
    /// How often it was suspected.
    pub suspected: u64,
    /// How often its connection went away.
    pub died: u64,
}

/// The link as a whole, counted from its beginning.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LinkStats {
    /// Every path that was ever up, in order.
    pub paths: Vec<PathStats>,
    /// Messages accepted for sending.
    pub messages_sent: u64,
    /// Messages delivered to our user.
    pub messages_received: u64,
    /// Blocks accepted for sending.
    pub blocks_sent: u64,
    /// Blocks the peer said it holds.
    pub blocks_delivered: u64,
    /// Blocks received whole.
    pub blocks_received: u64,
    /// Block bytes not yet acknowledged, laid or waiting.
    pub held_bytes: u64,
    /// Block bytes waiting for room on a path.
    pub waiting_bytes: u64,
    /// Parity bytes sent.
    pub parity_bytes: u64,
    /// Block bytes sent again because their path died or was suspected, or an urgent block stayed incomplete.
    pub resent_bytes: u64,
    /// Block bytes sent a second time so that a lagging path does not hold up the end.
    pub reinjected_bytes: u64,
    /// Messages sent again.
    pub messages_resent: u64,
    /// Received stripes that parity completed.
    pub stripes_repaired: u64,
    /// Received frames with nothing new in them.
    pub duplicates: u64,
    /// Urgent blocks sent as shards, as streams, and as copies in one datagram each.
    pub urgent_as_shards: u64,
    /// See [`LinkStats::urgent_as_shards`].
    pub urgent_as_streams: u64,
    /// See [`LinkStats::urgent_as_shards`].
    pub urgent_as_copies: u64,
    /// Bytes of the peer's blocks and messages held here: ready, in pieces or out of order.
    pub receiving_bytes: u64,
}
