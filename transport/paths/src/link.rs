//! One end of a link: where the rooms meet.

use bytes::Bytes;
use umbra_units::{Now, PathId};

use crate::config::LinkConfig;
use crate::error::{PeerMisbehaved, Refused};
use crate::event::{BlockId, Class, LinkEvent, Output, PathFacts, PathSample, StreamId};
use crate::stats::LinkStats;

/// One end of the bundle of all paths to one peer. See the [crate] page for how to drive it.
#[derive(Debug)]
pub struct Link {
    config: LinkConfig,
}

impl Link {
    /// An end with no paths yet. The peer's end must be as new: the two number what they send from zero.
    pub fn new(config: LinkConfig) -> Self {
        Self { config }
    }

    /// A path's connection is established (again).
    pub fn path_up(&mut self, now: Now, path: PathId, facts: PathFacts) {
        let _ = (now, path, facts);
    }

    /// A path's connection is gone; it may come up again later.
    pub fn path_down(&mut self, now: Now, path: PathId) {
        let _ = (now, path);
    }

    /// What the connection's statistics say now.
    pub fn handle_sample(&mut self, now: Now, path: PathId, sample: PathSample) {
        let _ = (now, path, sample);
    }

    /// A datagram arrived.
    pub fn handle_datagram(&mut self, now: Now, path: PathId, bytes: Bytes) -> Result<(), PeerMisbehaved> {
        let _ = (now, path, bytes);
        Ok(())
    }

    /// A stream arrived, whole.
    pub fn handle_stream(&mut self, now: Now, path: PathId, bytes: Bytes) -> Result<(), PeerMisbehaved> {
        let _ = (now, path, bytes);
        Ok(())
    }

    /// The driver has handed all of `stream` to the connection.
    pub fn handle_sent(&mut self, now: Now, path: PathId, stream: StreamId) {
        let _ = (now, path, stream);
    }

    /// Time has passed.
    pub fn handle_time(&mut self, now: Now) {
        let _ = now;
    }

    /// When [`Link::handle_time`] wants to be called; [`Now::NEVER`] if it does not.
    pub fn poll_timeout(&self) -> Now {
        Now::NEVER
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        None
    }

    /// The next thing to know.
    pub fn poll_event(&mut self) -> Option<LinkEvent> {
        None
    }

    /// Send a control message: exactly once, in order, whichever path dies.
    pub fn send_message(&mut self, now: Now, bytes: impl Into<Bytes>) -> Result<(), Refused> {
        let _ = (now, bytes.into());
        Ok(())
    }

    /// Send a block: exactly once, in any order.
    pub fn send_block(&mut self, now: Now, class: Class, bytes: impl Into<Bytes>) -> Result<BlockId, Refused> {
        let _ = (now, class, bytes.into());
        Ok(BlockId(0))
    }

    /// Bytes of bulk the paths would take now without queueing on dead or full ones.
    pub fn room(&self) -> usize {
        self.config.held_bytes
    }

    /// Where everything stands.
    pub fn stats(&self) -> LinkStats {
        LinkStats::default()
    }
}
