//! The one task that owns a [`Link`]: it carries facts in and outputs out, and decides nothing.
//!
//! ```text
//!  senders ──▶ messages, urgent, bulk ─┐                     ┌─▶ datagrams, streams ──▶ quinn
//!  dialers / listener ──▶ connections ─┼─▶ driver (Link) ────┼─▶ events ──▶ receiver
//!  readers, one set per connection ────┘        ▲            └─▶ room
//!                                               └── clock
//! ```
//!
//! One turn: take what is there (in order of urgency, each bounded), tell the link the time if it asked, and then do
//! everything it wants until it wants nothing. Only then wait. On the way of a small block there is no timer, no lock
//! of ours and no task but this one: quinn is called right here, and a stream that it takes whole at once, as it nearly
//! always does, never leaves this task. Only one that has to wait for the window is handed to a task of its own.
//!
//! Every queue into the driver is bounded, and none of them waits for another: a peer's streams wait at the peer when
//! this end's user is slow, and that does not hold up this end's own sending.

use crate::error::{Ended, PathError, SendError, readable};
use crate::handle::{Ask, Block, ConnectionStats, Event, EventSender, LinkSender, Stats};
use crate::join::LinkId;
use crate::limits;
use crate::{handle, identity::Fingerprint};
use bytes::Bytes;
use core::future::{Future, pending};
use core::pin::{Pin, pin};
use core::task::{Context, Poll, Waker};
use core::time::Duration;
use quinn::{Connection, ConnectionError, ReadToEndError, RecvStream, SendStream, VarInt};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use umbra_paths::{
    BlockId, Class, Link, LinkConfig, Output, PathFacts, PathSample, PeerMisbehaved, Priority, StreamId,
};
use umbra_units::{Now, PathId};

/// Why a connection was closed, for the other side's machine; the text is for its people.
pub(crate) mod close_code {
    use quinn::VarInt;

    // Zero is what quinn sends when a connection is dropped without a word, as by a process that is going down in
    // disorder. It means no more than that the path is gone.

    /// The link is over.
    pub(crate) const CLOSED: VarInt = VarInt::from_u32(1);
    /// The join was refused.
    pub(crate) const REFUSED: VarInt = VarInt::from_u32(2);
    /// The other side broke the rules.
    pub(crate) const MISBEHAVED: VarInt = VarInt::from_u32(3);
    /// The same path was joined anew.
    pub(crate) const REPLACED: VarInt = VarInt::from_u32(4);
}

/// How often the connections' statistics are read while there is traffic.
const SAMPLE_EVERY: Duration = Duration::from_millis(10);

/// What is taken of one queue before the others have their turn and the link its say.
const TURN: usize = 64;

/// How long a closing link waits for what was sent to arrive.
const LINGER: Duration = Duration::from_millis(500);

/// How long the peer is given to acknowledge that the link is over.
const FAREWELL: Duration = Duration::from_millis(300);

/// How long after the first "closed" of a peer the other paths may still bring what was sent before it.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What dialers and listeners tell the driver.
#[derive(Debug)]
pub(crate) enum Joining {
    /// A path's connection is established and joined.
    Up(PathId, Connection),
    /// A path cannot be had for now.
    Trouble(PathId, PathError),
    /// The acceptor no longer knows this link.
    Over(Ended),
}

/// How many connections a link has, and since when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Liveness {
    pub(crate) connections: usize,
    pub(crate) since: Instant,
}

/// What a new driver needs.
pub(crate) struct Start {
    pub(crate) link: LinkId,
    pub(crate) peer: Fingerprint,
    pub(crate) version: u16,
    pub(crate) config: LinkConfig,
    /// The connection that made the link, at the connecting side.
    pub(crate) first: Option<(PathId, Connection)>,
    pub(crate) joinings: mpsc::Receiver<Joining>,
    pub(crate) liveness: watch::Sender<Liveness>,
}

/// Start a link. The future is the driver: it completes when the link is over, with why.
pub(crate) fn start(start: Start) -> (handle::LinkHandle, impl Future<Output = Ended> + Send) {
    let (events, receiver) = EventSender::channel();
    let (messages_in, messages) = mpsc::channel(limits::COMMANDS);
    let (urgent_in, urgent) = mpsc::channel(limits::COMMANDS);
    let (bulk_in, bulk) = mpsc::channel(limits::COMMANDS);
    let (asks_in, asks) = mpsc::channel(limits::COMMANDS);
    let link = Link::new(start.config);
    let (room_in, room) = watch::channel(link.room());
    let facts = Arc::new(handle::Facts {
        link: start.link,
        peer: start.peer,
        version: start.version,
    });
    let sender = LinkSender {
        facts,
        messages: messages_in,
        urgent: urgent_in,
        bulk: bulk_in,
        asks: asks_in,
        room,
    };
    let mut driver = Driver {
        link,
        begin: Instant::now(),
        connections: BTreeMap::new(),
        next_generation: 0,
        misbehaviours: 0,
        inbox: Inbox::new(),
        joinings: Some(start.joinings),
        commands: Commands {
            messages,
            urgent,
            bulk,
            asks,
            message: None,
            urgent_block: None,
            bulk_block: None,
        },
        events,
        room: room_in,
        liveness: start.liveness,
        active: false,
        sample_at: None,
        samples: 0,
        ending: None,
    };
    if let Some((path, connection)) = start.first {
        driver.path_up(path, connection);
    }
    (handle::LinkHandle::new(sender, receiver), driver.run())
}

/// Facts from the connections.
#[derive(Debug)]
enum Arrival {
    Stream {
        path: PathId,
        bytes: Bytes,
        _room: Option<OwnedSemaphorePermit>,
    },
    /// The connection broke the rules below the link's.
    Bad {
        path: PathId,
        generation: u64,
        text: String,
    },
    /// The peer says that the link is over, and why.
    Farewell { text: String },
    /// The connection has ended and everything it brought has been handed in.
    Gone {
        path: PathId,
        generation: u64,
        error: ConnectionError,
    },
}

/// A stream that had to wait has been written, or cannot be.
#[derive(Debug)]
struct Written {
    path: PathId,
    generation: u64,
    stream: StreamId,
    sent: Option<SendStream>,
}

#[derive(Debug)]
struct Inbox {
    datagrams: mpsc::Receiver<(PathId, Bytes)>,
    arrivals: mpsc::Receiver<Arrival>,
    written: mpsc::UnboundedReceiver<Written>,
    out: Outlets,
}

/// The other ends of the inbox, as readers and writers hold them.
#[derive(Debug, Clone)]
struct Outlets {
    datagrams: mpsc::Sender<(PathId, Bytes)>,
    arrivals: mpsc::Sender<Arrival>,
    /// Not bounded of itself: there is one entry per stream that the link has laid and not yet seen written.
    written: mpsc::UnboundedSender<Written>,
    unfinished: Arc<Semaphore>,
}

impl Inbox {
    fn new() -> Self {
        let (datagrams_in, datagrams) = mpsc::channel(limits::ARRIVALS);
        let (arrivals_in, arrivals) = mpsc::channel(limits::ARRIVALS);
        let (written_in, written) = mpsc::unbounded_channel();
        let unfinished = Arc::new(Semaphore::new(limits::UNFINISHED_BYTES));
        let out = Outlets {
            datagrams: datagrams_in,
            arrivals: arrivals_in,
            written: written_in,
            unfinished,
        };
        Self {
            datagrams,
            arrivals,
            written,
            out,
        }
    }
}

/// What the link's user asked for, and what of it the link had no room for yet.
#[derive(Debug)]
struct Commands {
    messages: mpsc::Receiver<Bytes>,
    urgent: mpsc::Receiver<Block>,
    bulk: mpsc::Receiver<Block>,
    asks: mpsc::Receiver<Ask>,
    message: Option<Bytes>,
    urgent_block: Option<Block>,
    bulk_block: Option<Block>,
}

/// One live connection.
#[derive(Debug)]
struct Conn {
    connection: Connection,
    generation: u64,
    /// Streams that a task of their own is writing; dropping the sender resets the stream.
    writing: BTreeMap<StreamId, oneshot::Sender<()>>,
    /// The last streams written whole, oldest first: quinn may still hold them.
    finished: VecDeque<(StreamId, SendStream)>,
    supervisor: JoinHandle<()>,
}

/// The link is about to be over.
#[derive(Debug)]
struct Ending {
    why: Ended,
    until: Instant,
    done: Vec<oneshot::Sender<()>>,
    /// Resolves when the peer's QUIC has everything we sent. `None` when the peer closed.
    flushed: Option<JoinHandle<()>>,
}

struct Driver {
    link: Link,
    begin: Instant,
    connections: BTreeMap<PathId, Conn>,
    next_generation: u64,
    misbehaviours: u32,
    inbox: Inbox,
    /// `None` when all who could bring connections are gone.
    joinings: Option<mpsc::Receiver<Joining>>,
    commands: Commands,
    events: EventSender,
    room: watch::Sender<usize>,
    liveness: watch::Sender<Liveness>,
    /// Something was sent or received since the last sample.
    active: bool,
    sample_at: Option<Instant>,
    samples: u64,
    ending: Option<Ending>,
}

impl Driver {
    async fn run(mut self) -> Ended {
        let mut sleep = pin!(sleep_until(self.begin));
        loop {
            self.take_what_is_there();
            self.attend_to_time();
            self.do_what_the_link_wants();
            if let Some(ending) = self.over() {
                return self.finish(ending).await;
            }
            let wake_at = self.wake_at();
            if let Some(at) = wake_at
                && sleep.deadline() != at
            {
                sleep.as_mut().reset(at);
            }
            self.wait(sleep.as_mut(), wake_at.is_some()).await;
        }
    }

    fn now(&self) -> Now {
        Now::from_us(u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Wait until there is something to do, and do the first of it.
    async fn wait(&mut self, sleep: Pin<&mut tokio::time::Sleep>, asleep: bool) {
        let accepting = self.ending.is_none();
        let events_wait = !self.events.has_room();
        tokio::select! {
            biased;
            Some((path, bytes)) = self.inbox.datagrams.recv() => self.datagram(path, bytes),
            Some(written) = self.inbox.written.recv() => self.written(written),
            Some(urgent) = self.commands.urgent.recv(), if accepting && self.commands.urgent_block.is_none() => {
                self.commands.urgent_block = Some(urgent);
            }
            message = self.commands.messages.recv(), if accepting && self.commands.message.is_none() => match message {
                Some(message) => self.commands.message = Some(message),
                None => self.close("every sender was dropped", None),
            },
            Some(arrival) = self.inbox.arrivals.recv() => self.arrival(arrival),
            Some(ask) = self.commands.asks.recv() => self.answer(ask),
            joining = next(&mut self.joinings) => self.joining(joining),
            Some(bulk) = self.commands.bulk.recv(), if accepting && self.commands.bulk_block.is_none() => {
                self.commands.bulk_block = Some(bulk);
            }
            () = self.events.drained(), if events_wait => {}
            () = self.events.closed(), if accepting => self.close("the receiver was dropped", None),
            () = flushed(&mut self.ending) => {}
            () = sleep, if asleep => {}
        }
    }

    /// Take what is there, a turn of each.
    fn take_what_is_there(&mut self) {
        for _ in 0..TURN {
            let Ok((path, bytes)) = self.inbox.datagrams.try_recv() else {
                break;
            };
            self.datagram(path, bytes);
        }
        while let Ok(written) = self.inbox.written.try_recv() {
            self.written(written);
        }
        for _ in 0..TURN {
            let Ok(arrival) = self.inbox.arrivals.try_recv() else {
                break;
            };
            self.arrival(arrival);
        }
        self.take_commands();
    }

    /// Hand the link what it has room for: urgent blocks, then messages, then bulk.
    fn take_commands(&mut self) {
        let now = self.now();
        let Self {
            link,
            commands,
            ending,
            active,
            ..
        } = self;
        for _ in 0..TURN {
            let urgent = commands.urgent_block.take().or_else(|| commands.urgent.try_recv().ok());
            let Some(block) = urgent else { break };
            commands.urgent_block = give_block(link, now, Class::Urgent, block);
            *active = true;
            if commands.urgent_block.is_some() {
                break;
            }
        }
        for _ in 0..TURN {
            let message = commands.message.take().or_else(|| commands.messages.try_recv().ok());
            let Some(message) = message else { break };
            *active = true;
            // The only other refusal is of one that is too long, and the sender has seen to that.
            if let Err(umbra_paths::Refused::Full { .. }) = link.send_message(now, message.clone()) {
                commands.message = Some(message);
                break;
            }
        }
        for _ in 0..TURN {
            let bulk = commands.bulk_block.take().or_else(|| commands.bulk.try_recv().ok());
            let Some(block) = bulk else { break };
            commands.bulk_block = give_block(link, now, Class::Bulk, block);
            *active = true;
            if commands.bulk_block.is_some() {
                break;
            }
        }
        if ending.is_some() {
            // Whoever still sends learns that it is too late; what was taken before is on its way.
            commands.urgent.close();
            commands.bulk.close();
            commands.messages.close();
        }
    }

    fn datagram(&mut self, path: PathId, bytes: Bytes) {
        self.active = true;
        let result = self.link.handle_datagram(self.now(), path, bytes);
        self.judge(path, result);
    }

    fn arrival(&mut self, arrival: Arrival) {
        self.active = true;
        match arrival {
            Arrival::Stream { path, bytes, .. } => {
                let result = self.link.handle_stream(self.now(), path, bytes);
                self.judge(path, result);
            }
            Arrival::Farewell { text } => self.end(Ended::ClosedByPeer(text), Instant::now() + LAST_WORDS),
            Arrival::Bad { path, generation, text } => {
                if self.is_current(path, generation) {
                    self.misbehaved(path, text);
                }
            }
            Arrival::Gone {
                path,
                generation,
                error,
            } => {
                // What it brought last must be in before it is gone.
                while let Ok((path, bytes)) = self.inbox.datagrams.try_recv() {
                    self.datagram(path, bytes);
                }
                if self.is_current(path, generation) {
                    self.path_gone(path);
                }
                self.heed(&error);
            }
        }
    }

    fn is_current(&self, path: PathId, generation: u64) -> bool {
        self.connections
            .get(&path)
            .is_some_and(|conn| conn.generation == generation)
    }

    fn judge(&mut self, path: PathId, result: Result<(), PeerMisbehaved>) {
        if let Err(misbehaviour) = result {
            self.misbehaved(path, misbehaviour.to_string());
        }
    }

    /// Close the connection that broke the rules. A peer that does it again and again ends the link.
    fn misbehaved(&mut self, path: PathId, text: String) {
        self.misbehaviours += 1;
        tracing::warn!(%path, %text, "peer misbehaves");
        if let Some(conn) = self.connections.get(&path) {
            conn.connection.close(close_code::MISBEHAVED, text.as_bytes());
        }
        self.path_gone(path);
        if self.misbehaviours >= limits::MISBEHAVIOURS {
            self.end(Ended::PeerMisbehaved(text), Instant::now());
        }
    }

    fn path_gone(&mut self, path: PathId) {
        if self.connections.remove(&path).is_some() {
            let now = self.now();
            self.link.path_down(now, path);
            self.publish_liveness();
        }
    }

    /// Did the peer say that the link is over?
    fn heed(&mut self, error: &ConnectionError) {
        if let ConnectionError::ApplicationClosed(close) = error
            && close.error_code == close_code::CLOSED
        {
            let reason = readable(&close.reason, limits::REASON_TEXT);
            self.end(Ended::ClosedByPeer(reason), Instant::now() + LAST_WORDS);
        }
    }

    fn publish_liveness(&self) {
        self.liveness.send_replace(Liveness {
            connections: self.connections.len(),
            since: Instant::now(),
        });
    }

    fn joining(&mut self, joining: Option<Joining>) {
        match joining {
            Some(Joining::Up(path, connection)) => self.path_up(path, connection),
            Some(Joining::Trouble(path, error)) => self.events.send(Event::Trouble { path, error }),
            Some(Joining::Over(why)) => self.end(why, Instant::now()),
            None => self.joinings = None,
        }
    }

    fn path_up(&mut self, path: PathId, connection: Connection) {
        if let Some(old) = self.connections.get(&path) {
            old.connection.close(close_code::REPLACED, b"the path was joined anew");
            self.path_gone(path);
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        let facts = PathFacts {
            max_datagram: connection.max_datagram_size().unwrap_or(0),
            rtt: Some(connection.rtt()).filter(|rtt| !rtt.is_zero()),
        };
        let supervisor = tokio::spawn(supervise(connection.clone(), path, generation, self.inbox.out.clone()));
        let conn = Conn {
            connection,
            generation,
            writing: BTreeMap::new(),
            finished: VecDeque::new(),
            supervisor,
        };
        self.connections.insert(path, conn);
        self.active = true;
        let now = self.now();
        self.link.path_up(now, path, facts);
        self.publish_liveness();
    }

    fn answer(&mut self, ask: Ask) {
        match ask {
            // Whoever asked may have gone away.
            Ask::Stats(answer) => drop(answer.send(self.stats())),
            Ask::Close { reason, done } => self.close(&reason, Some(done)),
        }
    }

    fn stats(&self) -> Stats {
        let connections = self.connections.iter().map(|(path, conn)| {
            let stats = conn.connection.stats();
            ConnectionStats {
                path: *path,
                remote: conn.connection.remote_address(),
                rtt: stats.path.rtt,
                mtu: stats.path.current_mtu,
                cwnd: stats.path.cwnd,
                sent_bytes: stats.udp_tx.bytes,
                received_bytes: stats.udp_rx.bytes,
                lost_packets: stats.path.lost_packets,
            }
        });
        Stats {
            link: self.link.stats(),
            connections: connections.collect(),
            samples: self.samples,
        }
    }

    fn attend_to_time(&mut self) {
        if self.active {
            self.active = false;
            self.sample_at.get_or_insert_with(|| Instant::now() + SAMPLE_EVERY);
        }
        if self.sample_at.is_some_and(|at| at <= Instant::now()) {
            self.sample_at = None;
            self.sample();
        }
        let now = self.now();
        if self.link.poll_timeout() <= now {
            self.link.handle_time(now);
        }
    }

    fn sample(&mut self) {
        let now = self.now();
        for (path, conn) in &self.connections {
            self.link.handle_sample(now, *path, sample_of(&conn.connection));
            self.samples += 1;
        }
    }

    /// When to wake if nothing happens.
    fn wake_at(&self) -> Option<Instant> {
        let timeout = self.link.poll_timeout();
        let link = (timeout != Now::NEVER).then(|| self.begin + Duration::from_micros(timeout.as_us()));
        let ending = self.ending.as_ref().map(|ending| ending.until);
        [link, self.sample_at, ending].into_iter().flatten().min()
    }

    /// Events first: what the user's queue has taken is what the next acknowledgement reports.
    fn do_what_the_link_wants(&mut self) {
        loop {
            let mut idle = true;
            while self.events.has_room() {
                let Some(event) = self.link.poll_event() else { break };
                self.events.send(Event::Link(event));
                idle = false;
            }
            while let Some(output) = self.link.poll_output() {
                self.perform(output);
                idle = false;
            }
            if idle {
                break;
            }
        }
        let room = self.link.room();
        self.room.send_if_modified(|old| core::mem::replace(old, room) != room);
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Datagram { path, bytes } => {
                let Some(conn) = self.connections.get(&path) else {
                    return;
                };
                // One that no longer fits or comes too late is lost like any other: the link sees to it.
                let _ = conn.connection.send_datagram(bytes);
            }
            Output::Stream {
                path,
                stream,
                priority,
                head,
                body,
            } => self.send_stream(path, stream, priority, [head, body]),
            Output::ResetStream { path, stream } => {
                let Some(conn) = self.connections.get_mut(&path) else {
                    return;
                };
                // Dropping the cancel handle is the signal.
                drop(conn.writing.remove(&stream));
                if let Some(at) = conn.finished.iter().position(|(id, _)| *id == stream)
                    && let Some((_, mut sent)) = conn.finished.remove(at)
                {
                    let _ = sent.reset(VarInt::from_u32(0));
                }
            }
        }
    }

    fn send_stream(&mut self, path: PathId, stream: StreamId, priority: Priority, parts: [Bytes; 2]) {
        let Some(conn) = self.connections.get_mut(&path) else {
            return;
        };
        let mut writing = Writing {
            stage: Stage::Unopened(conn.connection.clone()),
            priority,
            parts,
        };
        match at_once(&mut writing) {
            Poll::Ready(Some(sent)) => {
                conn.remember(stream, sent);
                let now = self.now();
                self.link.handle_sent(now, path, stream);
            }
            // The connection is going away; its end will be told by its readers.
            Poll::Ready(None) => {}
            Poll::Pending => {
                let (cancel, cancelled) = oneshot::channel();
                let (out, generation) = (self.inbox.out.written.clone(), conn.generation);
                conn.writing.insert(stream, cancel);
                tokio::spawn(async move {
                    let sent = tokio::select! {
                        sent = writing.write() => sent,
                        _ = cancelled => None,
                    };
                    let _ = out.send(Written {
                        path,
                        generation,
                        stream,
                        sent,
                    });
                });
            }
        }
    }

    fn written(&mut self, written: Written) {
        let Written {
            path,
            generation,
            stream,
            sent,
        } = written;
        if !self.is_current(path, generation) {
            return;
        }
        let now = self.now();
        if let Some(conn) = self.connections.get_mut(&path) {
            let wanted = conn.writing.remove(&stream).is_some();
            if let (Some(sent), true) = (sent, wanted) {
                conn.remember(stream, sent);
                self.link.handle_sent(now, path, stream);
            }
        }
    }

    /// The user closes the link.
    fn close(&mut self, reason: &str, done: Option<oneshot::Sender<()>>) {
        if self.ending.is_none() {
            self.end(Ended::ClosedHere(reason.to_owned()), Instant::now() + LINGER);
        }
        if let Some(ending) = &mut self.ending {
            ending.done.extend(done);
        }
    }

    /// The link will be over at `until`. The first reason stands.
    fn end(&mut self, why: Ended, until: Instant) {
        if self.ending.is_none() {
            self.ending = Some(Ending {
                why,
                until,
                done: Vec::new(),
                flushed: None,
            });
        }
    }

    /// Whether the link is over now.
    fn over(&mut self) -> Option<Ending> {
        let ending = self.ending.as_mut()?;
        let settled = match ending.why {
            Ended::ClosedHere(_) => settled(ending, &self.link, &self.commands, &mut self.connections),
            _ => self.connections.is_empty(),
        };
        if settled || ending.until <= Instant::now() {
            self.ending.take()
        } else {
            None
        }
    }

    /// Tell the peer and the user.
    async fn finish(mut self, ending: Ending) -> Ended {
        let code = match ending.why {
            Ended::PeerMisbehaved(_) => close_code::MISBEHAVED,
            _ => close_code::CLOSED,
        };
        let text = match &ending.why {
            Ended::ClosedHere(reason) => reason.clone(),
            other => other.to_string(),
        };
        let mut reason = text.as_bytes();
        reason = &reason[..reason.len().min(limits::REASON_TEXT)];
        if !matches!(ending.why, Ended::ClosedByPeer(_) | Ended::PeerForgot(_)) {
            let _ = timeout(FAREWELL, self.tell(reason)).await;
        }
        for conn in self.connections.values() {
            conn.connection.close(code, reason);
        }
        // A path that has just joined must hear it too, or the other end would wait for this one for ever.
        while let Some(Ok(joining)) = self.joinings.as_mut().map(mpsc::Receiver::try_recv) {
            if let Joining::Up(_, connection) = joining {
                connection.close(code, reason);
            }
        }
        // The last packet of a connection leaves when its own task has had a turn. Its end is seen by our readers in
        // the same turn, so when they are through the packet is on its way.
        drop(self.inbox);
        for conn in self.connections.into_values() {
            let _ = timeout(LINGER, conn.supervisor).await;
        }
        tracing::debug!(why = %ending.why, "link ended");
        self.events.send(Event::Ended(ending.why.clone()));
        for done in ending.done {
            // Whoever closed may not have waited.
            let _ = done.send(());
        }
        ending.why
    }

    /// Tell the peer that the link is over. Completes when it knows by one path, or can be told by none.
    async fn tell(&self, reason: &[u8]) {
        // The last packet of a connection is sent once and, by quinn, not at all while the congestion window is full. So
        // the peer is told on a stream, which is repeated until it has arrived.
        let farewells = self.connections.values().map(|conn| farewell(&conn.connection, reason));
        let mut telling: JoinSet<bool> = farewells.collect();
        while let Some(told) = telling.join_next().await {
            if told.unwrap_or(false) {
                return;
            }
        }
    }
}

impl Conn {
    fn remember(&mut self, stream: StreamId, sent: SendStream) {
        self.finished.push_back((stream, sent));
        if self.finished.len() > limits::RESETTABLE {
            self.finished.pop_front();
        }
    }
}

/// Whether everything a closing link was given has reached the peer's QUIC, as far as can be known.
fn settled(ending: &mut Ending, link: &Link, commands: &Commands, connections: &mut BTreeMap<PathId, Conn>) -> bool {
    let queued = commands.message.is_some() || commands.urgent_block.is_some() || commands.bulk_block.is_some();
    let writing = connections.values().any(|conn| !conn.writing.is_empty());
    if connections.is_empty() {
        return true;
    }
    if queued || writing || link.stats().held_bytes > 0 {
        return false;
    }
    let flushed = ending.flushed.get_or_insert_with(|| {
        let streams: Vec<SendStream> = connections
            .values_mut()
            .flat_map(|conn| conn.finished.drain(..).map(|(_, sent)| sent))
            .collect();
        tokio::spawn(async move {
            for sent in streams {
                let _ = sent.stopped().await;
            }
        })
    });
    flushed.is_finished()
}

/// Completes when the closing link's last streams are acknowledged; never if there is nothing to wait for.
async fn flushed(ending: &mut Option<Ending>) {
    match ending.as_mut().and_then(|ending| ending.flushed.as_mut()) {
        Some(flushed) if !flushed.is_finished() => drop(flushed.await),
        _ => pending().await,
    }
}

async fn next(joinings: &mut Option<mpsc::Receiver<Joining>>) -> Option<Joining> {
    match joinings {
        Some(joinings) => joinings.recv().await,
        None => pending().await,
    }
}

/// Give the link a block; what it has no room for comes back.
fn give_block(link: &mut Link, now: Now, class: Class, block: Block) -> Option<Block> {
    let answer: Result<BlockId, SendError> = match link.send_block(now, class, block.bytes.clone()) {
        Err(umbra_paths::Refused::Full { .. }) => return Some(block),
        Err(refused) => Err(refused.into()),
        Ok(id) => Ok(id),
    };
    // Whoever sent it may not care for its number.
    let _ = block.taken.send(answer);
    None
}

/// A stream being written.
struct Writing {
    stage: Stage,
    priority: Priority,
    /// What is left: quinn takes from the front.
    parts: [Bytes; 2],
}

enum Stage {
    Unopened(Connection),
    Open(HalfWritten),
    Done,
}

/// A stream that is reset unless it is finished: quinn finishes a dropped stream, and half a block must never look like
/// a whole one.
pub(crate) struct HalfWritten(pub(crate) Option<SendStream>);

impl Drop for HalfWritten {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            let _ = stream.reset(VarInt::from_u32(0));
        }
    }
}

impl Writing {
    /// Open, write, finish. Cancel safe: it goes on where it was. `None` if the connection or the peer would not have it.
    async fn write(&mut self) -> Option<SendStream> {
        loop {
            match &mut self.stage {
                Stage::Unopened(connection) => {
                    let stream = connection.open_uni().await.ok()?;
                    let _ = stream.set_priority(self.priority.level());
                    self.stage = Stage::Open(HalfWritten(Some(stream)));
                }
                Stage::Open(HalfWritten(Some(stream))) => {
                    let Some(first) = self.parts.iter().position(|part| !part.is_empty()) else {
                        stream.finish().ok()?;
                        let Stage::Open(HalfWritten(sent)) = &mut self.stage else {
                            return None;
                        };
                        let sent = sent.take();
                        self.stage = Stage::Done;
                        return sent;
                    };
                    stream.write_chunks(&mut self.parts[first..]).await.ok()?;
                }
                Stage::Open(HalfWritten(None)) | Stage::Done => return None,
            }
        }
    }
}

/// Do as much as can be done without waiting.
fn at_once(writing: &mut Writing) -> Poll<Option<SendStream>> {
    pin!(writing.write()).poll(&mut Context::from_waker(Waker::noop()))
}

/// What a connection says of its path now.
pub(crate) fn sample_of(connection: &Connection) -> PathSample {
    let stats = connection.stats();
    PathSample {
        rtt: stats.path.rtt,
        cwnd: stats.path.cwnd,
        sent_packets: stats.path.sent_packets,
        lost_packets: stats.path.lost_packets,
        sent_bytes: stats.udp_tx.bytes,
        lost_bytes: stats.path.lost_bytes,
        max_datagram: connection.max_datagram_size().unwrap_or(0),
    }
}

/// Say the reason before everything else that waits on this connection. Whether the peer has it.
fn farewell(connection: &Connection, reason: &[u8]) -> impl Future<Output = bool> + use<> {
    let (connection, reason) = (connection.clone(), reason.to_vec());
    async move {
        let Ok((mut send, _recv)) = connection.open_bi().await else {
            return false;
        };
        let _ = send.set_priority(i32::MAX);
        let said = send.write_all(&reason).await.is_ok() && send.finish().is_ok();
        said && matches!(send.stopped().await, Ok(None))
    }
}

/// Wait for the peer's farewell.
async fn hear_farewell(connection: &Connection, path: PathId, generation: u64, out: &Outlets) {
    let Ok((_send, mut recv)) = connection.accept_bi().await else {
        return;
    };
    let arrival = match recv.read_to_end(limits::REASON_TEXT).await {
        Ok(reason) => Arrival::Farewell {
            text: readable(&reason, limits::REASON_TEXT),
        },
        Err(ReadToEndError::TooLong) => {
            let text = format!("farewell longer than {} bytes", limits::REASON_TEXT);
            Arrival::Bad { path, generation, text }
        }
        Err(ReadToEndError::Read(_)) => return,
    };
    let _ = out.arrivals.send(arrival).await;
}

/// Read everything that a connection brings, until it ends; then say that it did.
async fn supervise(connection: Connection, path: PathId, generation: u64, out: Outlets) {
    let (busy, mut idle) = mpsc::channel::<()>(1);
    let ((), (), error) = tokio::join!(
        hear_farewell(&connection, path, generation, &out),
        read_datagrams(&connection, path, &out),
        accept_streams(&connection, path, generation, &out, busy)
    );
    // Every reader of a stream holds a sender: when all are gone, nothing of this connection is on its way any more.
    let _ = idle.recv().await;
    let _ = out
        .arrivals
        .send(Arrival::Gone {
            path,
            generation,
            error,
        })
        .await;
}

async fn read_datagrams(connection: &Connection, path: PathId, out: &Outlets) {
    while let Ok(bytes) = connection.read_datagram().await {
        if out.datagrams.send((path, bytes)).await.is_err() {
            return;
        }
    }
}

async fn accept_streams(
    connection: &Connection,
    path: PathId,
    generation: u64,
    out: &Outlets,
    busy: mpsc::Sender<()>,
) -> ConnectionError {
    loop {
        let stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        let (out, busy) = (out.clone(), busy.clone());
        let mut reading = Box::pin(async move {
            let _busy = busy;
            let arrival = match read_stream(stream, &out.unfinished).await {
                Ok((bytes, room)) => Arrival::Stream {
                    path,
                    bytes,
                    _room: room,
                },
                Err(Unfit::Gone) => return,
                Err(Unfit::Bad(text)) => Arrival::Bad { path, generation, text },
            };
            let _ = out.arrivals.send(arrival).await;
        });
        // Most streams are there whole when they are accepted: no task for them.
        if reading
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
        {
            tokio::spawn(reading);
        }
    }
}

/// Why a stream brings nothing.
pub(crate) enum Unfit {
    /// It was reset, or its connection ended.
    Gone,
    /// No correct peer sends that.
    Bad(String),
}

/// Read one stream to its end. What has been read is counted against the link's bound until the driver has taken it.
pub(crate) async fn read_stream(
    mut stream: RecvStream,
    unfinished: &Arc<Semaphore>,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Unfit> {
    let mut chunks: Vec<Bytes> = Vec::new();
    let mut len = 0;
    let mut room: Option<OwnedSemaphorePermit> = None;
    let mut buffer: [Bytes; 32] = core::array::from_fn(|_| Bytes::new());
    while let Some(count) = stream.read_chunks(&mut buffer).await.map_err(|_| Unfit::Gone)? {
        let read: usize = buffer[..count].iter().map(Bytes::len).sum();
        len += read;
        if len > umbra_paths::limits::STREAM_BYTES {
            return Err(Unfit::Bad(format!(
                "stream longer than {} bytes",
                umbra_paths::limits::STREAM_BYTES
            )));
        }
        let more = u32::try_from(read)
            .ok()
            .and_then(|read| Arc::clone(unfinished).try_acquire_many_owned(read).ok());
        let Some(more) = more else {
            return Err(Unfit::Bad(format!(
                "more than {} bytes of unfinished streams",
                limits::UNFINISHED_BYTES
            )));
        };
        match &mut room {
            Some(room) => room.merge(more),
            None => room = Some(more),
        }
        chunks.extend(buffer[..count].iter_mut().map(core::mem::take));
    }
    let bytes = match &mut chunks[..] {
        [only] => core::mem::take(only),
        many => {
            let mut whole = Vec::with_capacity(len);
            many.iter().for_each(|chunk| whole.extend_from_slice(chunk));
            Bytes::from(whole)
        }
    };
    Ok((bytes, room))
}
