//! What a link's user holds: a sender that can be cloned and handed to encoding threads, and the one receiver.

use crate::error::{Ended, PathError, SendError};
use crate::identity::Fingerprint;
use crate::join::LinkId;
use crate::limits;
use bytes::Bytes;
use core::net::SocketAddr;
use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use umbra_paths::{BlockId, Class, LinkEvent, LinkStats, Refused};
use umbra_units::PathId;

/// Something the link's user should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A message, a block, or news of a path.
    Link(LinkEvent),
    /// A path cannot be had (again), and why; the attempts go on. Said once per reason.
    Trouble {
        /// Which path.
        path: PathId,
        /// Why.
        error: PathError,
    },
    /// The link is over. Nothing follows.
    Ended(Ended),
}

/// A link and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// What the link says.
    pub link: LinkStats,
    /// What each live connection says.
    pub connections: Vec<ConnectionStats>,
    /// How often the link was told what a connection's statistics say: every 10 ms per connection while there is traffic.
    pub samples: u64,
}

/// One live connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionStats {
    /// The path it is.
    pub path: PathId,
    /// The peer's address.
    pub remote: SocketAddr,
    /// Smoothed round trip.
    pub rtt: Duration,
    /// Largest UDP payload that passes.
    pub mtu: u16,
    /// Congestion window in bytes.
    pub cwnd: u64,
    /// UDP bytes sent.
    pub sent_bytes: u64,
    /// UDP bytes received.
    pub received_bytes: u64,
    /// Packets sent and lost.
    pub lost_packets: u64,
}

/// Both halves of a link's end.
#[derive(Debug)]
pub struct LinkHandle {
    sender: LinkSender,
    receiver: LinkReceiver,
}

impl LinkHandle {
    pub(crate) const fn new(sender: LinkSender, receiver: LinkReceiver) -> Self {
        Self { sender, receiver }
    }

    /// The sending half; clone it at will.
    pub const fn sender(&self) -> &LinkSender {
        &self.sender
    }

    /// See [`LinkReceiver::recv`].
    pub async fn recv(&mut self) -> Option<Event> {
        self.receiver.recv().await
    }

    /// Both halves.
    pub fn split(self) -> (LinkSender, LinkReceiver) {
        (self.sender, self.receiver)
    }
}

/// Derefs so that a handle can be used where no split is needed.
impl core::ops::Deref for LinkHandle {
    type Target = LinkSender;
    fn deref(&self) -> &LinkSender {
        &self.sender
    }
}

/// The sending half. The link lives until [`LinkSender::close`], the peer's close, or until the receiver or every
/// sender is dropped.
#[derive(Debug, Clone)]
pub struct LinkSender {
    pub(crate) facts: Arc<Facts>,
    pub(crate) messages: mpsc::Sender<Bytes>,
    pub(crate) urgent: mpsc::Sender<Block>,
    pub(crate) bulk: mpsc::Sender<Block>,
    pub(crate) asks: mpsc::Sender<Ask>,
    pub(crate) room: watch::Receiver<usize>,
}

/// What is settled when the link begins.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) link: LinkId,
    pub(crate) peer: Fingerprint,
    pub(crate) version: u16,
}

/// A block on its way to the driver.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) bytes: Bytes,
    pub(crate) taken: oneshot::Sender<Result<BlockId, SendError>>,
}

/// What else the driver can be asked.
#[derive(Debug)]
pub(crate) enum Ask {
    Stats(oneshot::Sender<Stats>),
    Close { reason: String, done: oneshot::Sender<()> },
}

impl LinkSender {
    /// Send a control message: exactly once, in order, whichever path dies. Returns when it is queued; waits while the
    /// link holds as much as it may.
    ///
    /// # Errors
    /// It is too long, or the link is over.
    pub async fn send_message(&self, bytes: impl Into<Bytes>) -> Result<(), SendError> {
        let bytes = message(bytes.into())?;
        self.messages.send(bytes).await.map_err(|_| SendError::Ended)
    }

    /// The same from a thread outside the runtime.
    ///
    /// # Errors
    /// As [`LinkSender::send_message`].
    ///
    /// # Panics
    /// Inside the runtime, where it would block everybody.
    pub fn send_message_blocking(&self, bytes: impl Into<Bytes>) -> Result<(), SendError> {
        let bytes = message(bytes.into())?;
        self.messages.blocking_send(bytes).map_err(|_| SendError::Ended)
    }

    /// Send a block: exactly once, in any order. Returns when the link has taken it; waits while it holds as much as it
    /// may. [`LinkEvent::BlockDelivered`] with this number follows when the peer's link holds it.
    ///
    /// # Errors
    /// It is empty or too long, or the link is over.
    pub async fn send_block(&self, class: Class, bytes: impl Into<Bytes>) -> Result<BlockId, SendError> {
        let (taken, answer) = oneshot::channel();
        let block = Block {
            bytes: block(bytes.into())?,
            taken,
        };
        self.blocks(class).send(block).await.map_err(|_| SendError::Ended)?;
        answer.await.unwrap_or(Err(SendError::Ended))
    }

    /// The same from a thread outside the runtime.
    ///
    /// # Errors
    /// As [`LinkSender::send_block`].
    ///
    /// # Panics
    /// Inside the runtime, where it would block everybody.
    pub fn send_block_blocking(&self, class: Class, bytes: impl Into<Bytes>) -> Result<BlockId, SendError> {
        let (taken, answer) = oneshot::channel();
        let block = Block {
            bytes: block(bytes.into())?,
            taken,
        };
        self.blocks(class).blocking_send(block).map_err(|_| SendError::Ended)?;
        answer.blocking_recv().unwrap_or(Err(SendError::Ended))
    }

    const fn blocks(&self, class: Class) -> &mpsc::Sender<Block> {
        match class {
            Class::Urgent => &self.urgent,
            Class::Bulk => &self.bulk,
        }
    }

    /// Bytes of bulk that the paths would take now. Await its changes to decide what to encode next as late as possible.
    pub fn room(&self) -> watch::Receiver<usize> {
        self.room.clone()
    }

    /// Where the link and its connections stand.
    ///
    /// # Errors
    /// The link is over.
    pub async fn stats(&self) -> Result<Stats, SendError> {
        let (ask, answer) = oneshot::channel();
        self.asks.send(Ask::Stats(ask)).await.map_err(|_| SendError::Ended)?;
        answer.await.map_err(|_| SendError::Ended)
    }

    /// Close the link: what was sent before is given half a second to reach the peer, then the peer is told the reason.
    /// Returns when that is done, or at once if the link is over already.
    pub async fn close(&self, reason: impl Into<String>) {
        let (done, closed) = oneshot::channel();
        if self
            .asks
            .send(Ask::Close {
                reason: reason.into(),
                done,
            })
            .await
            .is_ok()
        {
            let _ = closed.await;
        }
    }

    /// The link's name, the same at both ends.
    pub fn link(&self) -> LinkId {
        self.facts.link
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Fingerprint {
        self.facts.peer
    }

    /// The protocol version both ends agreed on.
    pub fn version(&self) -> u16 {
        self.facts.version
    }
}

fn message(bytes: Bytes) -> Result<Bytes, SendError> {
    within("message", umbra_paths::limits::MESSAGE_BYTES, bytes)
}

fn block(bytes: Bytes) -> Result<Bytes, SendError> {
    if bytes.is_empty() {
        return Err(Refused::Empty.into());
    }
    within("block", umbra_paths::limits::BLOCK_BYTES, bytes)
}

fn within(what: &'static str, limit: usize, bytes: Bytes) -> Result<Bytes, SendError> {
    if bytes.len() > limit {
        Err(Refused::TooLong {
            what,
            len: bytes.len(),
            limit,
        }
        .into())
    } else {
        Ok(bytes)
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct LinkReceiver {
    events: mpsc::UnboundedReceiver<Event>,
    gauge: Arc<Gauge>,
}

impl LinkReceiver {
    /// The next event; `None` after [`Event::Ended`]. Cancel safe.
    pub async fn recv(&mut self) -> Option<Event> {
        let event = self.events.recv().await?;
        self.gauge.taken(weight(&event));
        Some(event)
    }

    /// The same from a thread outside the runtime.
    ///
    /// # Panics
    /// Inside the runtime, where it would block everybody.
    pub fn recv_blocking(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv()?;
        self.gauge.taken(weight(&event));
        Some(event)
    }
}

/// How many bytes of events wait for the user. A bounded channel counts events, and one may be 8 MiB.
#[derive(Debug, Default)]
struct Gauge {
    bytes: AtomicUsize,
    drained: Notify,
}

impl Gauge {
    fn taken(&self, weight: usize) {
        let before = self.bytes.fetch_sub(weight, Ordering::AcqRel);
        if before >= limits::EVENT_BYTES && before - weight < limits::EVENT_BYTES {
            self.drained.notify_one();
        }
    }
}

/// What an event counts for; none for nothing, so that a flood of small ones is bounded too.
fn weight(event: &Event) -> usize {
    const OVERHEAD: usize = 256;
    match event {
        Event::Link(LinkEvent::Message(bytes) | LinkEvent::Block { bytes, .. }) => bytes.len() + OVERHEAD,
        _ => OVERHEAD,
    }
}

/// The driver's end of the events.
#[derive(Debug)]
pub(crate) struct EventSender {
    events: mpsc::UnboundedSender<Event>,
    gauge: Arc<Gauge>,
}

impl EventSender {
    pub(crate) fn channel() -> (Self, LinkReceiver) {
        let (send, receive) = mpsc::unbounded_channel();
        let gauge = Arc::new(Gauge::default());
        (
            Self {
                events: send,
                gauge: Arc::clone(&gauge),
            },
            LinkReceiver { events: receive, gauge },
        )
    }

    /// Whether the user has room for another event.
    pub(crate) fn has_room(&self) -> bool {
        self.gauge.bytes.load(Ordering::Acquire) < limits::EVENT_BYTES
    }

    /// Completes when there may be room again.
    pub(crate) async fn drained(&self) {
        self.gauge.drained.notified().await;
    }

    /// Completes when the receiver is gone.
    pub(crate) async fn closed(&self) {
        self.events.closed().await;
    }

    pub(crate) fn send(&self, event: Event) {
        self.gauge.bytes.fetch_add(weight(&event), Ordering::AcqRel);
        // A receiver that is gone ends the link: see the driver.
        let _ = self.events.send(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_beyond_the_bound_wait_until_some_are_taken() {
        let (send, mut receive) = EventSender::channel();
        let block = |len| Event::Link(LinkEvent::Message(Bytes::from(vec![0; len])));
        send.send(block(limits::EVENT_BYTES));
        assert!(!send.has_room());
        receive.recv().await.unwrap();
        assert!(send.has_room());
        send.drained().await;
    }

    #[test]
    fn what_no_link_would_take_is_refused_before_it_is_queued() {
        assert_eq!(block(Bytes::new()), Err(SendError::Refused(Refused::Empty)));
        assert!(block(Bytes::from(vec![0; umbra_paths::limits::BLOCK_BYTES + 1])).is_err());
        assert!(message(Bytes::from(vec![0; umbra_paths::limits::MESSAGE_BYTES + 1])).is_err());
        assert!(message(Bytes::new()).is_ok());
    }
}
