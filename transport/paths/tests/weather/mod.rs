//! A world of two links and bad weather between them, in virtual time and from a seed.
//!
//! Each path is a pair of pipes. A pipe sends one packet after the other at its rate, datagrams before streams and streams
//! by priority, as quinn does; packets are lost by a two-state chain, delayed, reordered and (datagrams) doubled; in a
//! blackout all are lost. Lost stream packets are sent again after 9/8 of a round trip, as QUIC would; lost datagrams are
//! gone. A connection may die and come back.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use umbra_paths::{BlockId, Class, Link, LinkConfig, LinkEvent, Output, PathFacts, PathSample, StreamId, limits};
use umbra_units::{Now, PathId, Rng};

pub(crate) const MS: Duration = Duration::from_millis(1);
pub(crate) const SECOND: Duration = Duration::from_secs(1);
const PACKET: usize = 1_200;

/// What a pipe does to packets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    pub(crate) delay: Duration,
    /// Bytes per second.
    pub(crate) rate: u64,
    pub(crate) loss: f64,
    pub(crate) burst: f64,
    pub(crate) double: f64,
    pub(crate) jitter: Duration,
    pub(crate) dark: bool,
    pub(crate) max_datagram: usize,
    /// Packets longer than this vanish.
    pub(crate) swallow: usize,
}

impl Weather {
    /// A path without faults: `mbit` megabits per second, `rtt` there and back.
    pub(crate) fn clear(mbit: u64, rtt: Duration) -> Self {
        Self {
            delay: rtt / 2,
            rate: mbit * 125_000,
            loss: 0.0,
            burst: 1.0,
            double: 0.0,
            jitter: Duration::ZERO,
            dark: false,
            max_datagram: PACKET,
            swallow: usize::MAX,
        }
    }

    pub(crate) fn lossy(mut self, loss: f64, burst: f64) -> Self {
        (self.loss, self.burst) = (loss, burst);
        self
    }
}

#[derive(Debug, Clone)]
struct Packet {
    stream: Option<StreamId>,
    len: usize,
    datagram: Bytes,
}

#[derive(Debug)]
struct Sending {
    left: Vec<usize>,
    to_arrive: usize,
    bytes: Bytes,
    /// Not handed over entirely yet.
    fresh: bool,
}

#[derive(Debug)]
struct Pipe {
    weather: Weather,
    rng: Rng,
    bad: bool,
    free_at: Now,
    datagrams: std::collections::VecDeque<Bytes>,
    /// By priority (highest first), then order.
    order: BTreeSet<(i32, StreamId)>,
    streams: BTreeMap<StreamId, (i32, Sending)>,
    sent_packets: u64,
    lost_packets: u64,
    sent_bytes: u64,
}

impl Pipe {
    fn new(weather: Weather, rng: Rng) -> Self {
        Self {
            weather,
            rng,
            bad: false,
            free_at: Now::ZERO,
            datagrams: std::collections::VecDeque::new(),
            order: BTreeSet::new(),
            streams: BTreeMap::new(),
            sent_packets: 0,
            lost_packets: 0,
            sent_bytes: 0,
        }
    }

    fn idle(&self) -> bool {
        self.datagrams.is_empty() && self.order.is_empty()
    }

    fn lose(&mut self) -> bool {
        let weather = self.weather;
        if weather.loss > 0.0 {
            let leave = 1.0 / weather.burst;
            let enter = weather.loss * leave / (1.0 - weather.loss);
            self.bad = if self.bad {
                !self.rng.chance(leave)
            } else {
                self.rng.chance(enter)
            };
        } else {
            self.bad = false;
        }
        self.bad || weather.dark
    }
}

#[derive(Debug)]
enum Happening {
    Arrive {
        path: usize,
        to: usize,
        era: u64,
        packet: Packet,
    },
    Retry {
        path: usize,
        from: usize,
        era: u64,
        stream: StreamId,
        len: usize,
    },
    Sample,
    /// The end notices that the connection died, or came up.
    Down {
        path: usize,
        side: usize,
        era: u64,
    },
    Up {
        path: usize,
        side: usize,
        era: u64,
    },
    Script(Script),
}

/// Something that happens at a given moment.
#[derive(Debug, Clone)]
pub(crate) enum Script {
    /// The path's weather changes, both ways or only from one side.
    Turn {
        path: usize,
        from: Option<usize>,
        weather: Weather,
    },
    /// The connection dies; the two ends notice after these spans.
    Die {
        path: usize,
        noticed: [Duration; 2],
    },
    /// A new connection.
    Revive {
        path: usize,
    },
    Message {
        side: usize,
    },
    Block {
        side: usize,
        class: Class,
        len: usize,
    },
}

/// One end and what is expected of it.
#[derive(Debug)]
pub(crate) struct Side {
    pub(crate) link: Link,
    pub(crate) messages_in: Vec<(Now, Bytes)>,
    pub(crate) blocks_in: BTreeMap<BlockId, (Now, Bytes)>,
    pub(crate) messages_out: Vec<(Now, Bytes)>,
    pub(crate) blocks_out: BTreeMap<BlockId, (Now, Bytes)>,
    pub(crate) delivered: BTreeSet<BlockId>,
    pub(crate) events: Vec<(Now, LinkEvent)>,
    /// Sends that were refused and wait.
    backlog: Vec<(Class, Bytes)>,
    /// The user looks at events only so often.
    pub(crate) slow_user: Option<Duration>,
    looked: Now,
}

/// Two links, some paths, and time.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Now,
    pub(crate) sides: [Side; 2],
    pipes: Vec<[Pipe; 2]>,
    up: Vec<[bool; 2]>,
    era: Vec<u64>,
    agenda: BTreeMap<(Now, u64), Happening>,
    next: u64,
    rng: Rng,
    pub(crate) samples: bool,
    /// Some messages are long.
    pub(crate) long_messages: bool,
}

impl World {
    pub(crate) fn new(seed: u64, weathers: &[Weather], config: &LinkConfig) -> Self {
        let mut rng = Rng::new(seed);
        let side = || Side {
            link: Link::new(config.clone()),
            messages_in: Vec::new(),
            blocks_in: BTreeMap::new(),
            messages_out: Vec::new(),
            blocks_out: BTreeMap::new(),
            delivered: BTreeSet::new(),
            events: Vec::new(),
            backlog: Vec::new(),
            slow_user: None,
            looked: Now::ZERO,
        };
        let pipes = weathers
            .iter()
            .map(|w| [Pipe::new(*w, rng.fork()), Pipe::new(*w, rng.fork())])
            .collect();
        let mut world = Self {
            now: Now::ZERO,
            sides: [side(), side()],
            pipes,
            up: vec![[false; 2]; weathers.len()],
            era: vec![0; weathers.len()],
            agenda: BTreeMap::new(),
            next: 0,
            rng,
            samples: true,
            long_messages: true,
        };
        for path in 0..weathers.len() {
            world.at(Duration::ZERO, Script::Revive { path });
        }
        world.book(Now::from_us(20_000), Happening::Sample);
        world
    }

    fn book(&mut self, at: Now, what: Happening) {
        self.agenda.insert((at, self.next), what);
        self.next += 1;
    }

    /// Let `what` happen so long after the beginning.
    pub(crate) fn at(&mut self, when: Duration, what: Script) {
        self.book(Now::ZERO + when, Happening::Script(what));
    }

    /// Bytes by which blocks and messages can be told apart, and damage noticed.
    fn content(&mut self, len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        Rng::new(self.rng.next_u64()).fill(&mut bytes);
        bytes.into()
    }

    pub(crate) fn send_message(&mut self, side: usize) {
        let len = usize::try_from(if self.long_messages && self.rng.chance(0.1) {
            self.rng.below(200_000)
        } else {
            self.rng.below(300)
        })
        .unwrap();
        let bytes = self.content(len);
        let now = self.now;
        self.sides[side]
            .link
            .send_message(now, bytes.clone())
            .expect("the tests stay within the bounds");
        self.sides[side].messages_out.push((now, bytes));
    }

    pub(crate) fn send_block(&mut self, side: usize, class: Class, len: usize) -> Option<BlockId> {
        let bytes = self.content(len);
        self.try_block(side, class, bytes)
    }

    fn try_block(&mut self, side: usize, class: Class, bytes: Bytes) -> Option<BlockId> {
        let now = self.now;
        let side = &mut self.sides[side];
        match side.link.send_block(now, class, bytes.clone()) {
            Ok(id) => {
                side.blocks_out.insert(id, (now, bytes));
                Some(id)
            }
            Err(_) => {
                side.backlog.push((class, bytes));
                None
            }
        }
    }

    pub(crate) fn set_weather(&mut self, path: usize, from: Option<usize>, weather: Weather) {
        for side in (0..2).filter(|side| from.is_none_or(|from| from == *side)) {
            self.pipes[path][side].weather = weather;
        }
    }

    /// From now on packets longer than `most` vanish on this path, both ways.
    pub(crate) fn swallow(&mut self, path: usize, most: usize) {
        self.pipes[path].iter_mut().for_each(|pipe| pipe.weather.swallow = most);
    }

    /// Packets put on any wire so far.
    pub(crate) fn sent_packets(&self) -> u64 {
        self.pipes.iter().flatten().map(|pipe| pipe.sent_packets).sum()
    }

    /// Everything sent has arrived and is known to have.
    pub(crate) fn settled(&self) -> bool {
        (0..2).all(|i| {
            let (from, to) = (&self.sides[i], &self.sides[1 - i]);
            from.backlog.is_empty()
                && to.messages_in.len() == from.messages_out.len()
                && from.delivered.len() == from.blocks_out.len()
                && to.blocks_in.len() == from.blocks_out.len()
        })
    }

    /// Run until `done` or the moment `end`; says whether it was `done`.
    pub(crate) fn run(&mut self, end: Now, done: impl Fn(&Self) -> bool) -> bool {
        loop {
            (0..2).for_each(|side| self.drive(side));
            self.check();
            if done(self) {
                return true;
            }
            let next = self.next_moment();
            if next > end {
                self.now = end;
                return false;
            }
            self.now = next;
            let now = self.now;
            while let Some(entry) = self.agenda.first_entry().filter(|entry| entry.key().0 <= now) {
                let what = entry.remove();
                self.happen(what);
            }
            for path in 0..self.pipes.len() {
                (0..2).for_each(|from| self.transmit(path, from));
            }
            for side in &mut self.sides {
                if side.link.poll_timeout() <= now {
                    side.link.handle_time(now);
                }
            }
        }
    }

    pub(crate) fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        self.run(end, |_| false);
    }

    fn next_moment(&self) -> Now {
        let mut next = self.agenda.first_key_value().map_or(Now::NEVER, |((at, _), _)| *at);
        for (pipes, up) in self.pipes.iter().zip(&self.up) {
            for (pipe, _) in pipes.iter().zip(up).filter(|(pipe, up)| **up && !pipe.idle()) {
                next = next.min(pipe.free_at.max(self.now));
            }
        }
        for side in &self.sides {
            next = next.min(side.link.poll_timeout().max(self.now + Duration::from_micros(1)));
            if let Some(pause) = side.slow_user {
                next = next.min(side.looked + pause);
            }
        }
        next
    }

    fn happen(&mut self, what: Happening) {
        let now = self.now;
        match what {
            Happening::Arrive { path, to, era, packet } => {
                if era != self.era[path] || !self.up[path][to] {
                    return;
                }
                let id = PathId(u16::try_from(path).unwrap());
                let link = &mut self.sides[to].link;
                match packet.stream {
                    None => link.handle_datagram(now, id, packet.datagram).expect("an honest peer"),
                    Some(stream) => {
                        let pipe = &mut self.pipes[path][1 - to];
                        let Some((_, sending)) = pipe.streams.get_mut(&stream) else {
                            return;
                        };
                        sending.to_arrive -= packet.len;
                        if sending.to_arrive == 0 {
                            let bytes = pipe.streams.remove(&stream).unwrap().1.bytes;
                            link.handle_stream(now, id, bytes).expect("an honest peer");
                        }
                    }
                }
            }
            Happening::Retry {
                path,
                from,
                era,
                stream,
                len,
            } => {
                let pipe = &mut self.pipes[path][from];
                if era == self.era[path]
                    && let Some((priority, sending)) = pipe.streams.get_mut(&stream)
                {
                    sending.left.push(len);
                    pipe.order.insert((-*priority, stream));
                }
            }
            Happening::Sample => {
                if self.samples {
                    self.sample();
                }
                self.book(now + 20 * MS, Happening::Sample);
            }
            Happening::Down { path, era, .. } | Happening::Up { path, era, .. } if era != self.era[path] => {}
            Happening::Down { path, side, .. } => {
                self.up[path][side] = false;
                self.sides[side]
                    .link
                    .path_down(now, PathId(u16::try_from(path).unwrap()));
            }
            Happening::Up { path, side, .. } => {
                self.up[path][side] = true;
                let weather = self.pipes[path][side].weather;
                let facts = PathFacts {
                    max_datagram: weather.max_datagram,
                    rtt: Some(weather.delay * 2),
                };
                self.sides[side]
                    .link
                    .path_up(now, PathId(u16::try_from(path).unwrap()), facts);
            }
            Happening::Script(script) => self.perform(script),
        }
    }

    fn perform(&mut self, script: Script) {
        let now = self.now;
        match script {
            Script::Turn { path, from, weather } => self.set_weather(path, from, weather),
            Script::Die { path, noticed } => {
                let era = self.renew(path);
                for (side, after) in noticed.into_iter().enumerate() {
                    self.book(now + after, Happening::Down { path, side, era });
                }
            }
            Script::Revive { path } => {
                let era = self.renew(path);
                // Both at once: quinn would keep what arrives before its user has looked.
                let after = self.pipes[path][0].weather.delay;
                for side in 0..2 {
                    self.book(now + after, Happening::Up { path, side, era });
                }
            }
            Script::Message { side } => self.send_message(side),
            Script::Block { side, class, len } => {
                self.send_block(side, class, len);
            }
        }
    }

    /// Nothing of the old connection survives.
    fn renew(&mut self, path: usize) -> u64 {
        self.era[path] += 1;
        for pipe in &mut self.pipes[path] {
            pipe.datagrams.clear();
            pipe.order.clear();
            pipe.streams.clear();
            (pipe.sent_packets, pipe.lost_packets, pipe.sent_bytes) = (0, 0, 0);
        }
        self.era[path]
    }

    fn sample(&mut self) {
        let now = self.now;
        for path in 0..self.pipes.len() {
            for side in (0..2).filter(|side| self.up[path][*side]).collect::<Vec<_>>() {
                let pipe = &self.pipes[path][side];
                let rtt = pipe.weather.delay * 2;
                let sample = PathSample {
                    rtt,
                    cwnd: 15_000 + u64::try_from(u128::from(pipe.weather.rate) * rtt.as_micros() / 1_000_000).unwrap(),
                    sent_packets: pipe.sent_packets,
                    lost_packets: pipe.lost_packets,
                    sent_bytes: pipe.sent_bytes,
                    lost_bytes: pipe.lost_packets * PACKET as u64,
                    max_datagram: pipe.weather.max_datagram,
                };
                self.sides[side]
                    .link
                    .handle_sample(now, PathId(u16::try_from(path).unwrap()), sample);
            }
        }
    }

    /// Poll one side dry: events first, then outputs.
    fn drive(&mut self, i: usize) {
        let now = self.now;
        let side = &mut self.sides[i];
        if side.slow_user.is_none_or(|pause| now >= side.looked + pause) {
            side.looked = now;
            while let Some(event) = side.link.poll_event() {
                match &event {
                    LinkEvent::Message(bytes) => side.messages_in.push((now, bytes.clone())),
                    LinkEvent::Block { id, bytes } => {
                        let again = side.blocks_in.insert(*id, (now, bytes.clone()));
                        assert!(again.is_none(), "{id} delivered twice");
                    }
                    LinkEvent::BlockDelivered(id) => assert!(side.delivered.insert(*id), "{id} reported twice"),
                    _ => {}
                }
                side.events.push((now, event));
            }
        }
        if !side.backlog.is_empty() {
            for (class, bytes) in std::mem::take(&mut side.backlog) {
                self.try_block(i, class, bytes);
            }
        }
        while let Some(output) = self.sides[i].link.poll_output() {
            self.output(i, output);
        }
        for path in 0..self.pipes.len() {
            self.transmit(path, i);
        }
    }

    fn output(&mut self, from: usize, output: Output) {
        match output {
            Output::Datagram { path, bytes } => {
                let path = usize::from(path.0);
                assert!(self.up[path][from], "a datagram for a path that is down");
                let pipe = &mut self.pipes[path][from];
                // The driver was told of the size at most one sample ago.
                if bytes.len() <= pipe.weather.max_datagram {
                    pipe.datagrams.push_back(bytes);
                }
            }
            Output::Stream {
                path,
                stream,
                priority,
                head,
                body,
            } => {
                let path = usize::from(path.0);
                assert!(self.up[path][from], "a stream for a path that is down");
                let bytes: Bytes = if body.is_empty() {
                    head
                } else {
                    [head, body].concat().into()
                };
                assert!(bytes.len() <= limits::STREAM_BYTES);
                let mut left = vec![PACKET; bytes.len() / PACKET];
                left.extend(Some(bytes.len() % PACKET).filter(|rest| *rest > 0));
                let pipe = &mut self.pipes[path][from];
                let sending = Sending {
                    left,
                    to_arrive: bytes.len(),
                    bytes,
                    fresh: true,
                };
                pipe.order.insert((-priority.level(), stream));
                assert!(
                    pipe.streams.insert(stream, (priority.level(), sending)).is_none(),
                    "{stream:?} used twice"
                );
            }
            Output::ResetStream { path, stream } => {
                let pipe = &mut self.pipes[usize::from(path.0)][from];
                if let Some((priority, _)) = pipe.streams.remove(&stream) {
                    pipe.order.remove(&(-priority, stream));
                }
            }
        }
    }

    /// Put the next packet of a pipe on the wire if it is free.
    fn transmit(&mut self, path: usize, from: usize) {
        let now = self.now;
        if !self.up[path][from] {
            return;
        }
        let pipe = &mut self.pipes[path][from];
        if now < pipe.free_at || pipe.idle() {
            return;
        }
        let mut handed = None;
        let packet = if let Some(datagram) = pipe.datagrams.pop_front() {
            Packet {
                stream: None,
                len: datagram.len(),
                datagram,
            }
        } else {
            let (level, stream) = *pipe.order.first().expect("not idle");
            let (_, sending) = pipe.streams.get_mut(&stream).expect("every ordered stream is there");
            let len = sending.left.pop().expect("an ordered stream has packets left");
            if sending.left.is_empty() {
                pipe.order.remove(&(level, stream));
                handed = std::mem::take(&mut sending.fresh).then_some(stream);
            }
            Packet {
                stream: Some(stream),
                len,
                datagram: Bytes::new(),
            }
        };
        let weather = pipe.weather;
        let span = Duration::from_secs_f64((packet.len + 40) as f64 / weather.rate as f64);
        pipe.free_at = now + span.max(Duration::from_micros(1));
        pipe.sent_packets += 1;
        pipe.sent_bytes += packet.len as u64 + 40;
        let lost = pipe.lose() || packet.len > weather.swallow;
        let double = packet.stream.is_none() && pipe.rng.chance(weather.double);
        let late = Duration::from_secs_f64(weather.jitter.as_secs_f64() * pipe.rng.unit());
        let arrival = pipe.free_at + weather.delay + late;
        let (era, to) = (self.era[path], 1 - from);
        if lost {
            pipe.lost_packets += 1;
            if let Some(stream) = packet.stream {
                let at = now + (weather.delay * 2).mul_f64(1.125) + MS;
                self.book(
                    at,
                    Happening::Retry {
                        path,
                        from,
                        era,
                        stream,
                        len: packet.len,
                    },
                );
            }
        } else {
            if double {
                self.book(
                    arrival + weather.delay / 3,
                    Happening::Arrive {
                        path,
                        to,
                        era,
                        packet: packet.clone(),
                    },
                );
            }
            self.book(arrival, Happening::Arrive { path, to, era, packet });
        }
        if let Some(stream) = handed {
            self.sides[from]
                .link
                .handle_sent(now, PathId(u16::try_from(path).unwrap()), stream);
        }
    }

    /// What must hold at every moment.
    fn check(&self) {
        for side in &self.sides {
            let stats = side.link.stats();
            assert!(stats.receiving_bytes <= limits::BLOCK_WINDOW_BYTES + limits::MESSAGE_WINDOW_BYTES);
        }
    }

    /// Everything that came is what was sent.
    pub(crate) fn check_contents(&self) {
        for i in 0..2 {
            let (from, to) = (&self.sides[i], &self.sides[1 - i]);
            for (n, ((_, sent), (_, came))) in from.messages_out.iter().zip(&to.messages_in).enumerate() {
                assert!(
                    sent == came,
                    "message {n} of side {i} is not what was sent, or not in order"
                );
            }
            assert!(to.messages_in.len() <= from.messages_out.len());
            for (id, (_, came)) in &to.blocks_in {
                assert!(from.blocks_out[id].1 == *came, "{id} of side {i} is not what was sent");
            }
            assert!(from.delivered.iter().all(|id| from.blocks_out.contains_key(id)));
        }
    }

    /// How long each block of `side` took from being sent to the other user's hands.
    pub(crate) fn block_times(&self, side: usize) -> Vec<Duration> {
        let came = &self.sides[1 - side].blocks_in;
        self.sides[side]
            .blocks_out
            .iter()
            .map(|(id, (sent, _))| came[id].0.since(*sent))
            .collect()
    }

    /// The same for messages.
    pub(crate) fn message_times(&self, side: usize) -> Vec<Duration> {
        let came = self.sides[1 - side].messages_in.iter();
        self.sides[side]
            .messages_out
            .iter()
            .zip(came)
            .map(|((sent, _), (came, _))| came.since(*sent))
            .collect()
    }
}
