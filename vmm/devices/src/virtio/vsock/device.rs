//! All connections of a socket device, and its queues.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Now, Reader, Writer};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::connection::{Connection, Fate, Phase};
use super::packet::{self, HEADER_BYTES, Header, Ports};
use super::streams::{News, StreamId, Streams};
use super::{EVENT, FIRST_HOST_PORT, HOST_CID, QUEUE_SIZE, RECEIVE, TRANSMIT};
use crate::limits::{
    VSOCK_ANSWER, VSOCK_CONNECTIONS, VSOCK_NEWS, VSOCK_PACKET_BYTES, VSOCK_PACKETS_PER_CALL, VSOCK_RESETS,
};
use crate::virtio::{Cause, Chain, Rings, Virtio, Wake, bit};

/// What a socket device is, and what it is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// The guest's address among its host's guests. It may be another after a move.
    pub cid: u64,
    /// The programs of the host.
    pub streams: Arc<dyn Streams>,
}

/// A socket device.
pub struct Vsock {
    wiring: Wiring,
    /// At most [`VSOCK_CONNECTIONS`].
    connections: BTreeMap<Ports, Connection>,
    /// Which connection a stream belongs to.
    by_stream: BTreeMap<StreamId, Ports>,
    /// Those that have something to say, each once, in turn.
    ready: VecDeque<Ports>,
    /// Resets to be sent. While there are [`VSOCK_RESETS`], the guest is not listened to.
    resets: VecDeque<Reset>,
    next_host_port: u32,
    /// The guest is to be told that its connections are gone.
    event_owed: bool,
    news: Vec<News>,
    packet: Box<[u8]>,
    counts: Counts,
}

/// What a socket device did since it was built or restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections that the guest opened.
    pub opened_by_guest: u64,
    /// Connections that programs of the host opened.
    pub opened_by_host: u64,
    /// Resets sent: connections that ended, were refused or broke the rules.
    pub resets: u64,
    /// Packets that are none.
    pub malformed: u64,
}

/// A reset to be sent, as seen from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reset {
    cid: u64,
    ports: Ports,
    kind: u16,
}

/// The feature that names what is there without any feature: byte streams (virtio 1.2, Socket Device, Feature bits).
const VIRTIO_VSOCK_F_STREAM: u32 = 0;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;

impl Vsock {
    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Connections there are.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    // From the host.

    fn hear_news(&mut self, now: Now) -> Wake {
        let mut news = std::mem::take(&mut self.news);
        self.wiring.streams.poll(&mut news);
        let wake = if news.len() >= VSOCK_NEWS {
            Wake::Again
        } else {
            Wake::Idle
        };
        for piece in news.drain(..) {
            match piece {
                News::Asked { stream, port } => self.asked(stream, port, now),
                News::Ready { stream, can } => {
                    let Some(ports) = self.by_stream.get(&stream).copied() else {
                        continue;
                    };
                    self.with(ports, |connection, streams| {
                        if can.read {
                            connection.readable();
                        }
                        if can.write {
                            connection.flush(streams)
                        } else {
                            Fate::GoesOn
                        }
                    });
                }
            }
        }
        self.news = news;
        wake
    }

    /// A program wants to talk to a port of the guest.
    fn asked(&mut self, stream: StreamId, port: u32, now: Now) {
        // A guest that takes no packets is asked no more.
        if self.connections.len() >= VSOCK_CONNECTIONS || self.resets.len() >= VSOCK_RESETS {
            return self.wiring.streams.close(stream);
        }
        let mut ports = Ports {
            host: self.next_host_port,
            guest: port,
        };
        while self.connections.contains_key(&ports) {
            ports.host = following(ports.host);
        }
        self.next_host_port = following(ports.host);
        self.insert(ports, Connection::new(stream, Phase::Asked, now));
    }

    /// Programs that wait for a guest that does not answer are sent away.
    fn expire(&mut self, now: Now) -> Wake {
        let waits = |connection: &Connection| matches!(connection.phase, Phase::Asked | Phase::Waiting);
        let overdue: Vec<Ports> = self
            .connections
            .iter()
            .filter(|(_, connection)| waits(connection) && connection.since + VSOCK_ANSWER <= now)
            .map(|(ports, _)| *ports)
            .collect();
        overdue.into_iter().for_each(|ports| self.reset_connection(ports));
        let next = self.connections.values().filter(|c| waits(c)).map(|c| c.since).min();
        next.map_or(Wake::Idle, |since| Wake::At(since + VSOCK_ANSWER))
    }

    // From the guest.

    /// Packets from the guest; says whether it has to be listened to again.
    fn transmit(&mut self, now: Now, rings: &mut Rings) -> Wake {
        while self.resets.len() < VSOCK_RESETS {
            let Some(mut chain) = rings.pop(TRANSMIT) else {
                return Wake::Idle;
            };
            if self.packet(&mut chain, now, rings).is_none() {
                self.counts.malformed += 1;
            }
            rings.push(chain.token(), 0);
        }
        // Goes on when resets were taken: see `work`.
        Wake::Idle
    }

    /// One packet; `None` if it is none.
    fn packet(&mut self, chain: &mut Chain, now: Now, rings: &Rings) -> Option<()> {
        let mut header = [0; HEADER_BYTES];
        chain.readable.read(rings.ram(), &mut header).ok()?;
        let header = Header::read(&header).ok()?;
        if header.from_cid != self.wiring.cid {
            return None;
        }
        let ports = Ports {
            host: header.to_port,
            guest: header.from_port,
        };
        if header.to_cid != HOST_CID || header.kind != packet::STREAM {
            // Not an address or a kind of socket of ours. A reset is never answered.
            if header.op != packet::RST {
                self.reset(header.to_cid, ports, header.kind);
            }
            return Some(());
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            match header.op {
                packet::REQUEST => self.open(ports, &header, now),
                packet::RST => {}
                _ => self.reset(HOST_CID, ports, packet::STREAM),
            }
            return Some(());
        };
        connection.learn(header.room, header.forwarded);
        match (header.op, connection.phase) {
            (packet::RST, _) => self.remove(ports),
            (packet::RESPONSE, Phase::Waiting) => {
                connection.phase = Phase::Open;
                self.counts.opened_by_host += 1;
                self.with(ports, |connection, streams| {
                    let told = streams.accepted(connection.stream, ports.host);
                    if told { Fate::GoesOn } else { Fate::Reset }
                });
            }
            (packet::RW, Phase::Open) => return self.data(ports, &header, chain, rings),
            (packet::CREDIT_UPDATE, Phase::Open) => self.with(ports, |_, _| Fate::GoesOn),
            (packet::CREDIT_REQUEST, Phase::Open) => self.with(ports, |connection, _| {
                connection.ask_credit();
                Fate::GoesOn
            }),
            (packet::SHUTDOWN, Phase::Open) => {
                self.with(ports, |connection, streams| connection.shut(header.flags, streams));
            }
            // A second request, a response nobody waits for, an unknown operation.
            _ => self.reset_connection(ports),
        }
        Some(())
    }

    /// The guest wants to talk to a program.
    fn open(&mut self, ports: Ports, header: &Header, now: Now) {
        let room = self.connections.len() < VSOCK_CONNECTIONS;
        let Some(stream) = room.then(|| self.wiring.streams.connect(ports.host)).flatten() else {
            return self.reset(HOST_CID, ports, packet::STREAM);
        };
        let mut connection = Connection::new(stream, Phase::Taken, now);
        connection.learn(header.room, header.forwarded);
        self.counts.opened_by_guest += 1;
        self.insert(ports, connection);
    }

    /// Bytes from the guest.
    fn data(&mut self, ports: Ports, header: &Header, chain: &mut Chain, rings: &Rings) -> Option<()> {
        let connection = self.connections.get(&ports)?;
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let whole = len <= VSOCK_PACKET_BYTES && header.len <= connection.room();
        if !whole || chain.readable.read(rings.ram(), &mut self.packet[..len]).is_err() {
            // More than was allowed, or not what it says: bytes of the stream are missing now.
            self.reset_connection(ports);
            return None;
        }
        let packet = std::mem::take(&mut self.packet);
        self.with(ports, |connection, streams| connection.receive(&packet[..len], streams));
        self.packet = packet;
        Some(())
    }

    // To the guest.

    /// Packets to the guest, as many as there are, it has buffers for, and one call may take.
    fn receive(&mut self, rings: &mut Rings) -> Wake {
        for _ in 0..VSOCK_PACKETS_PER_CALL {
            if self.resets.is_empty() && self.ready.is_empty() {
                return Wake::Idle;
            }
            let Some(mut chain) = rings.pop(RECEIVE) else {
                return Wake::Idle;
            };
            let room = usize::try_from(chain.writable.bytes()).unwrap_or(usize::MAX);
            let Some(payload) = room.checked_sub(HEADER_BYTES) else {
                self.counts.malformed += 1;
                rings.push(chain.token(), 0);
                continue;
            };
            let Some((ports, len)) = self.compose(payload.min(VSOCK_PACKET_BYTES)) else {
                rings.put_back(chain.token());
                return Wake::Idle;
            };
            let sent = chain.writable.write(rings.ram(), &self.packet[..len]).is_ok();
            let written = if sent { len } else { 0 };
            rings.push(chain.token(), u32::try_from(written).expect("a packet is short"));
            if !sent {
                self.counts.malformed += 1;
                self.reset_connection(ports);
            }
        }
        Wake::Again
    }

    /// Make the next packet, in `self.packet`; says whose it is, and its length.
    fn compose(&mut self, most: usize) -> Option<(Ports, usize)> {
        if let Some(Reset { cid, ports, kind }) = self.resets.pop_front() {
            self.counts.resets += 1;
            let header = Header {
                from_cid: cid,
                kind,
                ..self.header(ports, packet::RST)
            };
            self.packet[..HEADER_BYTES].copy_from_slice(&header.write());
            return Some((ports, HEADER_BYTES));
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else {
                continue;
            };
            connection.queued = false;
            let payload = &mut self.packet[HEADER_BYTES..][..most];
            let Some(outgoing) = connection.next(payload, &*self.wiring.streams) else {
                self.attend(ports);
                continue;
            };
            let (room, forwarded) = connection.tell();
            let header = Header {
                len: u32::try_from(outgoing.len).expect("a packet is short"),
                flags: outgoing.flags,
                room,
                forwarded,
                ..self.header(ports, outgoing.op)
            };
            self.packet[..HEADER_BYTES].copy_from_slice(&header.write());
            self.attend(ports);
            return Some((ports, HEADER_BYTES + outgoing.len));
        }
        None
    }

    const fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            from_cid: HOST_CID,
            to_cid: self.wiring.cid,
            from_port: ports.host,
            to_port: ports.guest,
            len: 0,
            kind: packet::STREAM,
            op,
            flags: 0,
            room: 0,
            forwarded: 0,
        }
    }

    /// Tell the guest that its connections are gone, if it has to be told and listens.
    fn event(&mut self, rings: &mut Rings) {
        if self.event_owed
            && let Some(mut chain) = rings.pop(EVENT)
        {
            let event = TRANSPORT_RESET.to_le_bytes();
            self.event_owed = chain.writable.write(rings.ram(), &event).is_err();
            let written = if self.event_owed { 0 } else { 4 };
            rings.push(chain.token(), written);
        }
    }

    // Connections.

    fn insert(&mut self, ports: Ports, connection: Connection) {
        self.by_stream.insert(connection.stream, ports);
        self.connections.insert(ports, connection);
        self.attend(ports);
    }

    /// Do something with a connection, and draw the consequences.
    fn with(&mut self, ports: Ports, what: impl FnOnce(&mut Connection, &dyn Streams) -> Fate) {
        let streams = self.wiring.streams.clone();
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        match what(connection, &*streams) {
            Fate::GoesOn => self.attend(ports),
            Fate::Reset => self.reset_connection(ports),
        }
    }

    /// See to it that a connection is watched, and heard if it has something to say.
    fn attend(&mut self, ports: Ports) {
        let Some(connection) = self.connections.get_mut(&ports) else {
            return;
        };
        connection.watch(&*self.wiring.streams);
        if connection.has_news() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(ports);
        }
    }

    fn reset_connection(&mut self, ports: Ports) {
        if self.connections.contains_key(&ports) {
            self.remove(ports);
            self.reset(HOST_CID, ports, packet::STREAM);
        }
    }

    fn reset(&mut self, cid: u64, ports: Ports, kind: u16) {
        self.resets.push_back(Reset { cid, ports, kind });
    }

    fn remove(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.remove(&ports) {
            self.by_stream.remove(&connection.stream);
            self.wiring.streams.close(connection.stream);
            if connection.queued {
                self.ready.retain(|other| *other != ports);
            }
        }
    }
}

const fn following(port: u32) -> u32 {
    if port == u32::MAX { FIRST_HOST_PORT } else { port + 1 }
}

impl Virtio for Vsock {
    const ID: u32 = VIRTIO_ID_VSOCK;
    /// Version 1: nothing.
    const VERSION: u32 = 1;
    type Wiring = Wiring;

    fn new(wiring: Wiring) -> Self {
        Self {
            wiring,
            connections: BTreeMap::new(),
            by_stream: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            event_owed: false,
            news: Vec::new(),
            packet: vec![0; HEADER_BYTES + VSOCK_PACKET_BYTES].into_boxed_slice(),
            counts: Counts::default(),
        }
    }

    fn kind(&self) -> &str {
        "vsock/0"
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        bit(VIRTIO_VSOCK_F_STREAM)
    }

    /// `struct virtio_vsock_config` (virtio 1.2, Socket Device, Device configuration layout).
    fn config(&self) -> Vec<u8> {
        self.wiring.cid.to_le_bytes().to_vec()
    }

    fn work(&mut self, now: Now, cause: Cause, rings: &mut Rings) -> Wake {
        let stalled = self.resets.len() >= VSOCK_RESETS;
        let mut wake = Wake::Idle;
        self.event(rings);
        match cause {
            Cause::World => wake = self.hear_news(now),
            Cause::Notified(TRANSMIT) => wake = self.transmit(now, rings),
            Cause::Notified(_) => {}
        }
        wake = wake.min(self.expire(now)).min(self.receive(rings));
        if stalled && self.resets.len() < VSOCK_RESETS {
            wake = wake.min(self.transmit(now, rings)).min(self.receive(rings));
        }
        wake
    }

    fn reset(&mut self) {
        // What was there before is dropped, which closes its streams.
        let counts = self.counts;
        *self = Self::new(self.wiring.clone());
        self.counts = counts;
    }

    fn save(&self, _w: &mut Writer) {}

    fn load(&mut self, _r: &mut Reader<'_>) -> Result<(), Malformed> {
        self.event_owed = true;
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        for connection in self.connections.values() {
            self.wiring.streams.close(connection.stream);
        }
    }
}

impl fmt::Debug for Vsock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vsock({} connections, {:?})", self.connections.len(), self.counts)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(vsock/0, CID {})", self.cid)
    }
}
