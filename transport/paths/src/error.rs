//! Two kinds of "no": ours to the caller ([`Refused`]) and ours to the peer ([`PeerMisbehaved`]).

use thiserror::Error;
use umbra_units::Malformed;

/// The link did not take it; nothing changed. Wait for the event the variant names and try again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refused {
    /// Longer than the peer would take. Split it.
    #[error("{what} of {len} bytes refused: at most {limit} bytes are carried at once")]
    TooLong {
        /// Message or block.
        what: &'static str,
        /// How long it is.
        len: usize,
        /// How long it may be.
        limit: usize,
    },
    /// A block of no bytes says nothing.
    #[error("empty block refused: a block carries at least one byte")]
    Empty,
    /// The link already holds as much unacknowledged data as it may. Try again after
    /// [`LinkEvent::BlockDelivered`](crate::LinkEvent::BlockDelivered), or for a message after any progress.
    #[error("{what} of {len} bytes refused: {held} bytes of at most {limit} await acknowledgement")]
    Full {
        /// Messages or blocks.
        what: &'static str,
        /// How long the refused one is.
        len: usize,
        /// How much is held.
        held: usize,
        /// How much may be held.
        limit: usize,
    },
}

/// The peer sent what no correct peer sends. The driver closes *that path's* connection with this text; if it happens on
/// a fresh connection again, the peer is not one to talk to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PeerMisbehaved {
    /// The bytes are not a frame.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// It speaks another version of the frames.
    #[error("frame version {got} received, {want} expected")]
    Version {
        /// What it said.
        got: u8,
        /// What we speak.
        want: u8,
    },
    /// It acknowledges what was never sent: not the peer of this link, or one that lost its memory.
    #[error("acknowledgement of {what} {number} received, but only {sent} were sent")]
    AcknowledgedUnsent {
        /// Messages, blocks or datagrams.
        what: &'static str,
        /// Which one it acknowledged.
        number: u64,
        /// How many were sent.
        sent: u64,
    },
    /// It sends further ahead than the window allows.
    #[error("{what} {number} received while only numbers below {end} may be")]
    BeyondWindow {
        /// Message or block.
        what: &'static str,
        /// Which one came.
        number: u64,
        /// First number that may not come yet.
        end: u64,
    },
    /// It makes this end hold more than was agreed.
    #[error("{what}: more than {limit} bytes to hold")]
    Flood {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// Two of its frames about one block contradict each other.
    #[error("frames of block {block} contradict each other")]
    Contradiction {
        /// Which block.
        block: u64,
    },
}
