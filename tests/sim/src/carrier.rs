//! What carries a session: the promise of a link, without saying how it is kept.

use bytes::Bytes;
use umbra_core::predict::LinkFacts;
use umbra_paths::Class;
use umbra_units::Now;

/// One end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Shadow,
}

impl End {
    pub(crate) const BOTH: [Self; 2] = [Self::Source, Self::Shadow];

    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Source => Self::Shadow,
            Self::Shadow => Self::Source,
        }
    }
}

/// What an end hears.
#[derive(Debug)]
pub(crate) enum Arrival {
    Message(Bytes),
    Block(Bytes),
    /// The first path is up, or the last is down.
    Up(bool),
    /// The other end as it was is no more: its process is another one now, or it closed the link.
    Lost,
}

/// Carries messages exactly once and in order, and blocks exactly once, while both ends live.
pub(crate) trait Carrier {
    /// Whether it took the message.
    fn send_message(&mut self, now: Now, from: End, bytes: &Bytes) -> bool;
    /// Whether it took the block.
    fn send_block(&mut self, now: Now, from: End, class: Class, bytes: &Bytes) -> bool;
    /// Bytes of bulk it would like now.
    fn room(&self, from: End) -> usize;
    fn facts(&self, from: End) -> LinkFacts;
    fn poll(&mut self, to: End) -> Option<Arrival>;
    /// When [`handle_time`](Self::handle_time) wants to be called, or an end that `listens` has something to hear.
    fn next_time(&self, listens: [bool; 2]) -> Now;
    fn handle_time(&mut self, now: Now);
    /// Nothing passes, or everything again.
    fn set_outage(&mut self, now: Now, outage: bool);
    /// Nothing passes on one path, or everything again.
    fn set_dark(&mut self, now: Now, path: usize, dark: bool);
    /// One path's connection breaks.
    fn break_path(&mut self, now: Now, path: usize);
    /// All weather clears, for good.
    fn heal(&mut self, now: Now);
    /// An end is gone. If something `answers` in its place, or the end said so itself, the other learns that it is lost.
    fn end_gone(&mut self, now: Now, end: End, answers: bool);
    /// Whether everything `from` sent has been received.
    fn is_drained(&self, from: End) -> bool;
    /// What is out of its bounds.
    fn out_of_bounds(&self) -> Option<String>;
}
