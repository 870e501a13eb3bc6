//! What a socket device promises, beyond what every device does.
#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use umbra_units::Rng;

use super::packet::{CREDIT_REQUEST, CREDIT_UPDATE, HEADER_BYTES, Header, NO_RECEIVE, NO_SEND, Ports};
use super::packet::{REQUEST, RESPONSE, RST, RW, SHUTDOWN, STREAM};
use super::*;
use crate::contract::Device as _;
use crate::limits::{VSOCK_BUFFER_BYTES, VSOCK_CONNECTIONS, VSOCK_NEWS, VSOCK_RESETS};
use crate::virtio::testing::hostile::Storm;
use crate::virtio::testing::{Driver, Placed, hostile, virtio_tests};

/// The programs of a host.
#[derive(Default)]
struct World(Mutex<Programs>);

#[derive(Default)]
struct Programs {
    next: u64,
    asking: VecDeque<(StreamId, u32)>,
    all: BTreeMap<StreamId, Program>,
    /// Ports at which a program listens.
    listening: Vec<u32>,
}

#[derive(Debug, Default, Clone)]
struct Program {
    /// What it wants to say, and whether that is all.
    says: VecDeque<u8>,
    said_all: bool,
    heard: Vec<u8>,
    /// The guest's side was finished.
    heard_end: bool,
    /// How much it takes before it takes a rest.
    takes: usize,
    interest: Interest,
    accepted_at: Option<u32>,
}

impl Streams for World {
    fn poll(&self, news: &mut Vec<News>) {
        let mut programs = self.0.lock().unwrap();
        while let Some((stream, port)) = programs.asking.pop_front()
            && news.len() < VSOCK_NEWS
        {
            news.push(News::Asked { stream, port });
        }
        for (stream, program) in &programs.all {
            let can = Interest {
                read: program.interest.read && (program.said_all || !program.says.is_empty()),
                write: program.interest.write && program.takes > 0,
            };
            if (can.read || can.write) && news.len() < VSOCK_NEWS {
                news.push(News::Ready { stream: *stream, can });
            }
        }
    }

    fn connect(&self, port: u32) -> Option<StreamId> {
        let mut programs = self.0.lock().unwrap();
        programs.listening.contains(&port).then(|| programs.add())
    }

    fn accepted(&self, stream: StreamId, port: u32) -> bool {
        self.with(stream, |program| program.accepted_at = Some(port)).is_some()
    }

    fn read(&self, stream: StreamId, bytes: &mut [u8]) -> Progress {
        assert!(!bytes.is_empty(), "reading nothing says nothing");
        let read = |program: &mut Program| {
            let len = bytes.len().min(program.says.len());
            for (to, from) in bytes.iter_mut().zip(program.says.drain(..len)) {
                *to = from;
            }
            match (len, program.said_all) {
                (0, true) => Progress::Ended,
                (0, false) => Progress::Later,
                _ => Progress::Bytes(len),
            }
        };
        self.with(stream, read).unwrap_or(Progress::Ended)
    }

    fn write(&self, stream: StreamId, bytes: &[u8]) -> Progress {
        let write = |program: &mut Program| {
            assert!(!program.heard_end, "nothing is written after the end");
            let len = bytes.len().min(program.takes);
            program.heard.extend(&bytes[..len]);
            program.takes -= len;
            if len == 0 {
                Progress::Later
            } else {
                Progress::Bytes(len)
            }
        };
        self.with(stream, write).unwrap_or(Progress::Ended)
    }

    fn watch(&self, stream: StreamId, interest: Interest) {
        self.with(stream, |program| program.interest = interest);
    }

    fn finish(&self, stream: StreamId) {
        self.with(stream, |program| program.heard_end = true);
    }

    fn close(&self, stream: StreamId) {
        self.0.lock().unwrap().all.remove(&stream);
    }
}

impl Programs {
    fn add(&mut self) -> StreamId {
        let stream = StreamId(self.next);
        self.next += 1;
        let program = Program {
            takes: usize::MAX,
            ..Program::default()
        };
        self.all.insert(stream, program);
        stream
    }
}

impl World {
    fn with<R>(&self, stream: StreamId, what: impl FnOnce(&mut Program) -> R) -> Option<R> {
        self.0.lock().unwrap().all.get_mut(&stream).map(what)
    }

    fn asks(&self, port: u32) -> StreamId {
        let mut programs = self.0.lock().unwrap();
        let stream = programs.add();
        programs.asking.push_back((stream, port));
        stream
    }

    fn listens(&self, port: u32) {
        self.0.lock().unwrap().listening.push(port);
    }

    /// A program says `bytes`.
    fn says(&self, stream: StreamId, bytes: &[u8]) {
        self.with(stream, |program| program.says.extend(bytes));
    }

    fn program(&self, stream: StreamId) -> Option<Program> {
        self.0.lock().unwrap().all.get(&stream).cloned()
    }

    fn open(&self) -> usize {
        self.0.lock().unwrap().all.len()
    }

    fn last(&self) -> StreamId {
        StreamId(self.0.lock().unwrap().next - 1)
    }
}

const CID: u64 = 52;
const ROOM: u32 = 4096;

/// A guest that has a socket device and its host.
struct Guest {
    world: Arc<World>,
    driver: Driver<Vsock>,
    buffers: VecDeque<Placed>,
    /// Bytes this guest can hold, and those it has passed on: what its packets say.
    room: u32,
    forwarded: u32,
}

fn wiring(world: &Arc<World>) -> Wiring {
    Wiring {
        cid: CID,
        streams: world.clone(),
    }
}

fn guest() -> Guest {
    let world = Arc::new(World::default());
    let driver = Driver::at_work(wiring(&world));
    let mut guest = Guest {
        world,
        driver,
        buffers: VecDeque::new(),
        room: ROOM,
        forwarded: 0,
    };
    guest.offer_buffers(64);
    guest
}

impl Guest {
    fn offer_buffers(&mut self, count: usize) {
        while self.buffers.len() < count {
            self.buffers.push_back(self.driver.add(RECEIVE, &[], &[4096]));
        }
        self.driver.kick(RECEIVE);
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            from_cid: CID,
            to_cid: HOST_CID,
            from_port: ports.guest,
            to_port: ports.host,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            room: self.room,
            forwarded: self.forwarded,
        }
    }

    fn send_header(&mut self, header: &Header, payload: &[u8]) {
        let bytes = header.write();
        let pieces = [&bytes[..], payload];
        let used = if payload.is_empty() { &pieces[..1] } else { &pieces };
        self.driver.add(TRANSMIT, used, &[]);
        self.driver.kick(TRANSMIT);
        assert!(self.driver.used(TRANSMIT).is_some(), "its buffer comes back");
    }

    fn send(&mut self, ports: Ports, op: u16) {
        self.send_header(&self.header(ports, op), &[]);
    }

    fn send_bytes(&mut self, ports: Ports, bytes: &[u8]) {
        let header = Header {
            len: u32::try_from(bytes.len()).unwrap(),
            ..self.header(ports, RW)
        };
        self.send_header(&header, bytes);
    }

    fn shut(&mut self, ports: Ports, flags: u32) {
        let header = Header {
            flags,
            ..self.header(ports, SHUTDOWN)
        };
        self.send_header(&header, &[]);
    }

    /// All that came, without offering other buffers.
    fn take(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some((head, written)) = self.driver.used(RECEIVE) {
            let buffer = self.buffers.pop_front().expect("a buffer was offered");
            assert_eq!(head, buffer.head);
            let bytes = self.driver.get(buffer.writable[0], written);
            let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().expect("a whole header");
            let header = Header::read(header).unwrap();
            assert_eq!(
                (header.to_cid, usize::try_from(header.len).unwrap()),
                (CID, payload.len())
            );
            all.push((header, payload.to_vec()));
        }
        all
    }

    fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.driver.world();
        let all = self.take();
        self.offer_buffers(64);
        all
    }

    /// The operations of all that came.
    fn ops(&mut self) -> Vec<u16> {
        self.receive().iter().map(|(header, _)| header.op).collect()
    }

    /// The guest opens a connection to a program.
    fn dial(&mut self, host: u32, guest: u32) -> (Ports, StreamId) {
        self.world.listens(host);
        let ports = Ports { host, guest };
        self.send(ports, REQUEST);
        assert_eq!(self.ops(), [RESPONSE]);
        (ports, self.world.last())
    }

    /// A program opens a connection to the guest.
    fn answer(&mut self, port: u32) -> (Ports, StreamId) {
        let stream = self.world.asks(port);
        let [(header, _)] = self.receive().try_into().expect("one packet");
        assert_eq!((header.op, header.to_port, header.from_cid), (REQUEST, port, HOST_CID));
        let ports = Ports {
            host: header.from_port,
            guest: port,
        };
        self.send(ports, RESPONSE);
        assert_eq!(self.world.program(stream).unwrap().accepted_at, Some(ports.host));
        (ports, stream)
    }

    fn heard(&self, stream: StreamId) -> Vec<u8> {
        self.world.program(stream).expect("it is there").heard
    }
}

virtio_tests!(
    conformance,
    device: Vsock,
    wiring: || wiring(&Arc::new(World::default())),
    offer: |driver: &mut Driver<Vsock>| {
        driver.add(TRANSMIT, &[&[0; HEADER_BYTES]], &[]);
        TRANSMIT
    }
);

#[test]
fn a_program_of_the_host_talks_with_the_guest() {
    let mut guest = guest();
    let (ports, stream) = guest.answer(80);
    assert!(ports.host >= FIRST_HOST_PORT);
    guest.world.says(stream, b"hello");
    let [(header, bytes)] = guest.receive().try_into().unwrap();
    assert_eq!((header.op, &bytes[..]), (RW, &b"hello"[..]));
    guest.send_bytes(ports, b"hi");
    assert_eq!(guest.heard(stream), b"hi");
}

#[test]
fn the_guest_reaches_who_listens_and_is_refused_by_who_does_not() {
    let mut guest = guest();
    let (ports, stream) = guest.dial(7, 1000);
    guest.send_bytes(ports, b"question");
    assert_eq!(guest.heard(stream), b"question");
    guest.world.says(stream, b"answer");
    assert_eq!(guest.receive()[0].1, b"answer");
    guest.send(Ports { host: 8, guest: 1000 }, REQUEST);
    assert_eq!(guest.ops(), [RST]);
}

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for() {
    let mut guest = guest();
    let (ports, stream) = guest.dial(7, 1000);
    guest.world.says(stream, &[1; 10_000]);
    let mut got: u32 = 0;
    for _ in 0..3 {
        let packets = guest.receive();
        got += packets.iter().map(|(header, _)| header.len).sum::<u32>();
    }
    assert_eq!(got, ROOM);
    guest.forwarded = 1000;
    guest.send(ports, CREDIT_UPDATE);
    let more: u32 = guest.receive().iter().map(|(header, _)| header.len).sum();
    assert_eq!(more, 1000);
}

#[test]
fn a_guest_without_room_is_asked_for_it_once() {
    let mut guest = guest();
    guest.room = 0;
    let (ports, stream) = guest.dial(7, 1000);
    guest.world.says(stream, b"waiting");
    assert_eq!((guest.ops(), guest.ops()), (vec![CREDIT_REQUEST], vec![]));
    guest.room = 100;
    guest.send(ports, CREDIT_UPDATE);
    assert_eq!(guest.receive()[0].1, b"waiting");
}

#[test]
fn what_a_program_does_not_take_is_kept_and_the_guest_told_when_it_is_taken() {
    let mut guest = guest();
    let (ports, stream) = guest.dial(7, 1000);
    guest.world.with(stream, |program| program.takes = 10);
    for _ in 0..VSOCK_BUFFER_BYTES / 1024 {
        guest.send_bytes(ports, &[9; 1024]);
    }
    assert_eq!((guest.heard(stream).len(), guest.ops()), (10, vec![]));
    guest.world.with(stream, |program| program.takes = usize::MAX);
    let [(header, _)] = guest.receive().try_into().unwrap();
    assert_eq!((header.op, header.forwarded), (CREDIT_UPDATE, 1 << 16));
    assert_eq!(guest.heard(stream).len(), 1 << 16);
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_reset() {
    let mut guest = guest();
    let (ports, stream) = guest.dial(7, 1000);
    guest.world.with(stream, |program| program.takes = 0);
    for _ in 0..VSOCK_BUFFER_BYTES / 1024 {
        guest.send_bytes(ports, &[9; 1024]);
    }
    assert!(guest.ops().is_empty());
    guest.send_bytes(ports, &[9]);
    assert_eq!((guest.ops(), guest.world.open()), (vec![RST], 0));
}

#[test]
fn a_program_that_has_finished_still_hears_the_guest() {
    let mut guest = guest();
    let (ports, stream) = guest.dial(7, 1000);
    guest.world.says(stream, b"bye");
    guest.world.with(stream, |program| program.said_all = true);
    let mut packets = guest.receive();
    packets.extend(guest.receive());
    let [(data, _), (end, _)] = packets.try_into().unwrap();
    assert_eq!((data.op, end.op, end.flags), (RW, SHUTDOWN, NO_SEND));
    guest.send_bytes(ports, b"still here");
    assert_eq!(guest.heard(stream), b"still here");
    guest.shut(ports, NO_SEND | NO_RECEIVE);
    assert_eq!((guest.ops(), guest.world.open()), (vec![RST], 0));
}

#[test]
fn a_guest_that_has_finished_still_hears_the_program_and_all_it_said_arrives() {
    let mut guest = guest();
    let (ports, stream) = guest.dial(7, 1000);
    guest.world.with(stream, |program| program.takes = 3);
    guest.send_bytes(ports, b"all of it");
    guest.shut(ports, NO_SEND);
    assert!(!guest.world.program(stream).unwrap().heard_end);
    guest.world.with(stream, |program| program.takes = 100);
    guest.receive();
    let program = guest.world.program(stream).unwrap();
    assert_eq!((&program.heard[..], program.heard_end), (&b"all of it"[..], true));
    guest.world.says(stream, b"answer");
    assert_eq!(guest.receive()[0].1, b"answer");
    guest.shut(ports, NO_RECEIVE);
    assert_eq!((guest.ops(), guest.world.open()), (vec![RST], 0));
}

#[test]
fn a_reset_ends_a_connection_and_is_never_answered() {
    let mut guest = guest();
    let (ports, _) = guest.dial(7, 1000);
    guest.send(ports, RST);
    assert_eq!((guest.ops(), guest.world.open()), (vec![], 0));
    guest.send(ports, RST);
    assert!(guest.ops().is_empty());
}

#[test]
fn what_belongs_to_no_connection_or_is_unknown_is_reset() {
    let mut guest = guest();
    let ports = Ports { host: 1, guest: 2 };
    for op in [RESPONSE, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, 99] {
        guest.send(ports, op);
        assert_eq!(guest.ops(), [RST], "{op}");
    }
    let seqpacket = Header {
        kind: 2,
        ..guest.header(ports, REQUEST)
    };
    guest.send_header(&seqpacket, &[]);
    assert_eq!(guest.receive()[0].0.kind, 2);
    let elsewhere = Header {
        to_cid: 77,
        ..guest.header(ports, REQUEST)
    };
    guest.send_header(&elsewhere, &[]);
    assert_eq!(guest.receive()[0].0.from_cid, 77);
    let (ports, _) = guest.dial(7, 1000);
    guest.send(ports, REQUEST);
    assert_eq!((guest.ops(), guest.world.open()), (vec![RST], 0));
}

#[test]
fn a_packet_from_somebody_else_is_nobodys() {
    let mut guest = guest();
    guest.world.listens(7);
    let header = Header {
        from_cid: CID + 1,
        ..guest.header(Ports { host: 7, guest: 1 }, REQUEST)
    };
    guest.send_header(&header, &[]);
    assert_eq!((guest.ops(), guest.world.open()), (vec![], 0));
}

#[test]
fn a_program_whose_guest_does_not_answer_is_sent_away() {
    let mut guest = guest();
    guest.world.asks(80);
    assert_eq!(guest.ops(), [REQUEST]);
    guest.driver.now = guest.driver.now + Duration::from_secs(9);
    assert_eq!((guest.ops(), guest.world.open()), (vec![], 1));
    guest.driver.now = guest.driver.now + Duration::from_secs(1);
    assert_eq!((guest.ops(), guest.world.open()), (vec![RST], 0));
}

#[test]
fn connections_are_bounded_in_both_directions() {
    let mut guest = guest();
    guest.world.listens(7);
    for n in 0..VSOCK_CONNECTIONS as u32 {
        guest.send(Ports { host: 7, guest: n }, REQUEST);
        assert_eq!(guest.ops(), [RESPONSE]);
    }
    guest.send(Ports { host: 7, guest: 5000 }, REQUEST);
    assert_eq!(guest.ops(), [RST]);
    guest.world.asks(80);
    assert_eq!((guest.ops(), guest.world.open()), (vec![], VSOCK_CONNECTIONS));
}

#[test]
fn a_guest_that_takes_no_resets_is_not_listened_to_and_then_it_is() {
    let mut guest = guest();
    for _ in 0..64 {
        guest.send(Ports { host: 1, guest: 1 }, RW);
    }
    guest.take();
    for n in 0..VSOCK_RESETS as u32 {
        guest.send(Ports { host: 1, guest: n }, RW);
    }
    let header = guest.header(Ports { host: 1, guest: 9 }, RW);
    guest.driver.add(TRANSMIT, &[&header.write()], &[]);
    guest.driver.kick(TRANSMIT);
    assert_eq!(guest.driver.used(TRANSMIT), None);
    let mut resets = 0;
    for _ in 0..20 {
        guest.offer_buffers(64);
        resets += guest.take().len();
    }
    assert!(guest.driver.used(TRANSMIT).is_some());
    assert_eq!(resets, VSOCK_RESETS + 1);
}

#[test]
fn after_a_move_every_connection_is_gone_and_the_guest_is_told() {
    let mut guest = guest();
    let (ports, _) = guest.dial(7, 1000);
    guest.answer(80);
    let event = guest.driver.add(EVENT, &[], &[8]);
    guest.driver.kick(EVENT);
    assert_eq!(guest.driver.used(EVENT), None);
    guest.driver.travel();
    assert_eq!(guest.world.open(), 0);
    assert_eq!(guest.driver.used(EVENT), Some((event.head, 4)));
    assert_eq!(guest.driver.get(event.writable[0], 4), [0; 4]);
    guest.send_bytes(ports, b"x");
    assert_eq!(guest.ops(), [RST]);
    let (ports, stream) = guest.dial(9, 1000);
    guest.send_bytes(ports, b"again");
    assert_eq!(guest.heard(stream), b"again");
}

#[test]
fn the_guest_is_told_of_a_move_as_soon_as_it_listens() {
    let mut guest = guest();
    guest.driver.travel();
    guest.driver.add(EVENT, &[], &[4]);
    guest.driver.kick(EVENT);
    assert_eq!(guest.driver.used(EVENT).map(|(_, written)| written), Some(4));
}

#[test]
fn the_driver_reads_its_cid() {
    let mut guest = guest();
    let mut config = [0; 8];
    guest.driver.mmio.read(0x100, &mut config);
    assert_eq!(u64::from_le_bytes(config), CID);
}

/// Streams of numbers both ways over several connections, with programs and a guest that take rests, buffers that run out,
/// and packets of every size: all arrives, in order, and nobody is sent more than there is room for.
#[test]
fn whatever_rests_each_byte_arrives_once_in_order_and_within_the_credit() {
    struct Side {
        ports: Ports,
        stream: StreamId,
        /// From the guest: sent, and what the device said it has passed on.
        sent: u32,
        told: u32,
        /// To the guest: said by the program, received, passed on.
        said: u32,
        received: u32,
        forwarded: u32,
    }
    let byte = |n: u32| (n % 251) as u8;
    for seed in 0..100 {
        let mut rng = Rng::new(seed);
        let mut guest = guest();
        let mut sides: Vec<Side> = (0..3)
            .map(|n| {
                let (ports, stream) = if n == 0 { guest.answer(80) } else { guest.dial(7, n) };
                Side {
                    ports,
                    stream,
                    sent: 0,
                    told: 0,
                    said: 0,
                    received: 0,
                    forwarded: 0,
                }
            })
            .collect();
        for step in 0..600 {
            let resting = step < 500;
            let n = rng.below(3) as usize;
            let side = &mut sides[n];
            match rng.below(6) {
                0 if resting => {
                    let more = rng.below(5000) as u32;
                    let bytes: Vec<u8> = (side.said..side.said + more).map(byte).collect();
                    side.said += more;
                    guest.world.says(side.stream, &bytes);
                }
                1 if resting => {
                    let free = VSOCK_BUFFER_BYTES - (side.sent - side.told);
                    let more = (rng.below(3000) as u32).min(free);
                    if more > 0 {
                        let bytes: Vec<u8> = (side.sent..side.sent + more).map(byte).collect();
                        side.sent += more;
                        guest.forwarded = side.forwarded;
                        guest.send_bytes(side.ports, &bytes);
                    }
                }
                2 => {
                    let takes = if resting { rng.below(8000) as usize } else { usize::MAX };
                    guest.world.with(side.stream, |program| program.takes = takes);
                }
                3 => {
                    side.forwarded = side.received
                        - if resting {
                            rng.below(1 + u64::from(side.received - side.forwarded)) as u32
                        } else {
                            0
                        };
                    guest.forwarded = side.forwarded;
                    guest.send(side.ports, CREDIT_UPDATE);
                }
                4 => guest.offer_buffers(if resting { rng.below(20) as usize } else { 30 }),
                _ => {}
            }
            guest.driver.world();
            for (header, payload) in guest.take() {
                let side = sides
                    .iter_mut()
                    .find(|side| side.ports.host == header.from_port && side.ports.guest == header.to_port)
                    .unwrap();
                assert!(
                    [RW, CREDIT_UPDATE, CREDIT_REQUEST].contains(&header.op),
                    "seed {seed}: {header:?}"
                );
                assert!(
                    header.forwarded >= side.told && header.forwarded <= side.sent,
                    "seed {seed}"
                );
                side.told = header.forwarded;
                let expected: Vec<u8> = (side.received..side.received + header.len).map(byte).collect();
                assert_eq!(payload, expected, "seed {seed}");
                side.received += header.len;
                assert!(
                    side.received - side.forwarded <= ROOM,
                    "seed {seed}: more than there is room for"
                );
            }
        }
        // Everybody takes all: everything arrives.
        for _ in 0..200 {
            for side in &mut sides {
                guest.world.with(side.stream, |program| program.takes = usize::MAX);
                side.forwarded = side.received;
                guest.forwarded = side.forwarded;
                guest.send(side.ports, CREDIT_UPDATE);
            }
            for (header, payload) in guest.receive() {
                let side = sides
                    .iter_mut()
                    .find(|side| side.ports.host == header.from_port && side.ports.guest == header.to_port)
                    .unwrap();
                assert_eq!(
                    payload.first().copied().unwrap_or_else(|| byte(side.received)),
                    byte(side.received)
                );
                side.received += header.len;
            }
        }
        for side in sides {
            assert_eq!(side.received, side.said, "seed {seed}");
            let expected: Vec<u8> = (0..side.sent).map(byte).collect();
            assert!(guest.heard(side.stream) == expected, "seed {seed}");
        }
    }
}

/// Headers that mean something, from a driver that means no good, while programs come and go.
#[test]
fn packets_of_every_kind_in_any_order_are_survived() {
    for seed in 0..1000 {
        let mut guest = guest();
        let mut storm = Storm::new(seed);
        guest.world.listens(0);
        guest.world.listens(1);
        for _ in 0..60 {
            let rng = storm.rng();
            let mut few = |bound: u64| u32::try_from(rng.below(bound)).unwrap();
            let header = Header {
                from_cid: CID,
                to_cid: HOST_CID,
                from_port: few(3),
                to_port: [few(3), FIRST_HOST_PORT + few(3)][few(2) as usize],
                len: [few(600), u32::MAX, 0][few(3) as usize],
                kind: STREAM,
                op: few(9) as u16,
                flags: few(4),
                room: [few(100_000), u32::MAX, 0][few(3) as usize],
                forwarded: [few(600), u32::MAX][few(2) as usize],
            };
            let payload = vec![1; few(600) as usize];
            match few(8) {
                0 => {
                    guest.world.asks(few(3));
                }
                1 => {
                    let stream = StreamId(few(8).into());
                    guest.world.says(stream, &[1; 700]);
                    guest.world.with(stream, |program| program.said_all = true);
                }
                2 => storm.machine(&mut guest.driver),
                _ => {
                    guest.driver.add(TRANSMIT, &[&header.write(), &payload], &[]);
                    guest.driver.kick(TRANSMIT);
                }
            }
            guest.driver.world();
            assert!(guest.world.open() <= VSOCK_CONNECTIONS);
        }
        let asking = guest.world.0.lock().unwrap().asking.len();
        hostile::recover(&mut guest.driver);
        assert!(
            guest.world.open() <= asking,
            "a reset device has no connections but new ones"
        );
    }
}
