//! Two real links over modelled connections.
//!
//! A *road* is one path: netem's pipe in each direction and a QUIC-like connection over both. Datagrams are sent once
//! and may be lost, doubled or overtaken. Streams are cut into segments that are sent again until they arrive, urgent
//! ones first, as far as the congestion window goes. A connection that hears nothing for a while dies at that end, and
//! the source's end dials again when the weather lets it. What was on a dead connection is gone: keeping the promise
//! across that is the links' business.

use core::fmt;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use bytes::Bytes;
use umbra_core::predict::LinkFacts;
use umbra_netem::{Fate, Loss, Pipe, Reorder, Weather};
use umbra_paths::{
    Class, Link, LinkConfig, LinkEvent, Output, PathFacts, PathSample, PathState, PeerMisbehaved, Priority, StreamId,
    limits,
};
use umbra_units::{Bandwidth, Now, PathId, Ratio, Rng};

use crate::carrier::{Arrival, Carrier, End};
use crate::conditions::{log_uniform, pick};

/// What travels at once of a stream: a few packets, so that a world costs fewer events.
const SEGMENT: usize = 4_800;
/// How often connections are looked after: statistics, silence, dialling.
const TICK: Duration = Duration::from_millis(25);
/// A datagram that the connection takes.
const DATAGRAM: usize = 1_200;

/// The roads of a world and how their ends behave.
#[derive(Debug, Clone)]
pub(crate) struct RoadConditions {
    pub(crate) paths: Vec<RoadWeather>,
    link: LinkConfig,
    /// A connection that hears nothing for so long is dead.
    idle_timeout: Duration,
}

/// One road.
#[derive(Debug, Clone)]
pub(crate) struct RoadWeather {
    ways: [Weather; 2],
    /// Bytes of streams under way at once.
    window: usize,
}

impl RoadConditions {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let count = 1 + rng.below(3);
        let survive = if count > 1 && rng.chance(0.3) { 1 } else { 0 };
        let heartbeat = if rng.chance(0.5) {
            Duration::from_millis(50)
        } else {
            log_uniform(rng, 5_000, 200_000)
        };
        let initial_rate = Bandwidth(1 << (17 + rng.below(10)));
        let link = LinkConfig::default().with_heartbeat(heartbeat);
        let link = link.and_then(|link| link.with_survive_paths(survive));
        let link = link.and_then(|link| link.with_initial_rate(initial_rate));
        Self {
            paths: (0..count).map(|_| RoadWeather::draw(rng)).collect(),
            link: link.expect("drawn within what works"),
            idle_timeout: log_uniform(rng, 300_000, 3_000_000),
        }
    }
}

impl RoadWeather {
    fn draw(rng: &mut Rng) -> Self {
        let there = draw_weather(rng);
        // Most roads are the same both ways.
        let back = if rng.chance(0.8) { there } else { draw_weather(rng) };
        Self {
            ways: [there, back],
            window: 1 << (15 + rng.below(6)),
        }
    }
}

fn draw_weather(rng: &mut Rng) -> Weather {
    let mut weather = match rng.below(4) {
        0 => Weather {
            delay: Duration::from_micros(20),
            ..Weather::clear()
        },
        _ => Weather::link(Bandwidth(1 << (18 + rng.below(10))), log_uniform(rng, 50, 100_000)),
    };
    weather.mtu = None; // a segment stands for several packets
    if rng.chance(0.5) {
        let share = Ratio::new([0.001, 0.01, 0.05, 0.2][pick(rng, 4)]).expect("a share");
        let loss = if rng.chance(0.5) {
            Loss::bursty(share, 3.0)
        } else {
            Some(Loss::random(share))
        };
        weather = weather.losing(loss.expect("small shares in short bursts"));
    }
    if rng.chance(0.3) {
        weather.jitter = log_uniform(rng, 10, 20_000);
        weather.duplicate = Ratio::new(0.05 * rng.unit()).expect("a share");
        weather.reorder = Reorder {
            share: Ratio::new(0.1 * rng.unit()).expect("a share"),
            by: log_uniform(rng, 100, 50_000),
        };
    }
    weather
}

impl fmt::Display for RoadConditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "link        {:?}, idle timeout {:?}", self.link, self.idle_timeout)?;
        for (n, road) in self.paths.iter().enumerate() {
            for (way, weather) in ["there", "back"].iter().zip(&road.ways) {
                let rate = weather
                    .rate
                    .map_or_else(|| "no bottleneck".to_owned(), |rate| rate.to_string());
                writeln!(
                    f,
                    "path {n} {way:<5} {rate}, {:?} + {:?}, loss {:.4}, twice {:.3}, overtaken {:.3}, window {}",
                    weather.delay,
                    weather.jitter,
                    weather.loss.share().get(),
                    weather.duplicate.get(),
                    weather.reorder.share.get(),
                    road.window,
                )?;
            }
        }
        Ok(())
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Roads {
    conditions: RoadConditions,
    rng: Rng,
    now: Now,
    ends: [Site; 2],
    roads: Vec<Road>,
    agenda: BinaryHeap<Reverse<(Now, u64, Happening)>>,
    booked: u64,
    outage: bool,
    healed: bool,
    wrong: Option<String>,
}

/// What stands at one end.
#[derive(Debug)]
struct Site {
    /// Gone when its process is.
    link: Option<Link>,
    /// Something may be there to be heard.
    ready: bool,
    facts: LinkFacts,
    /// The other end is gone for good, and this one will hear of it.
    lost: bool,
}

#[derive(Debug)]
struct Road {
    /// By the end that sends.
    ways: [Way; 2],
    /// Grows with each connection: what an older one carried is gone.
    era: u64,
    up: [bool; 2],
    heard: [Now; 2],
    dialling: bool,
    dark: bool,
}

#[derive(Debug)]
struct Way {
    pipe: Pipe,
    clear: Weather,
    /// Streams in the order they are served.
    streams: BTreeMap<(Reverse<Priority>, StreamId), Stream>,
    under_way: usize,
    sent: u64,
    lost: u64,
}

#[derive(Debug)]
struct Stream {
    bytes: Bytes,
    /// Bytes not yet handed to the pipe for the first time.
    fresh: usize,
    /// Segments to be sent again.
    again: Vec<usize>,
    to_arrive: usize,
    tries: u32,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Datagram {
        road: usize,
        to: usize,
        era: u64,
        bytes: Bytes,
    },
    Segment {
        road: usize,
        from: usize,
        era: u64,
        stream: (Reverse<Priority>, StreamId),
        len: usize,
    },
    Acknowledged {
        road: usize,
        from: usize,
        era: u64,
        len: usize,
    },
    Missing {
        road: usize,
        from: usize,
        era: u64,
        stream: (Reverse<Priority>, StreamId),
        len: usize,
    },
    Up {
        road: usize,
        end: usize,
        era: u64,
    },
    Down {
        road: usize,
        end: usize,
        era: u64,
    },
    Lost {
        end: usize,
    },
    Tick,
}

impl Roads {
    pub(crate) fn new(now: Now, conditions: RoadConditions, mut rng: Rng) -> Self {
        let site = || Site {
            link: Some(Link::new(conditions.link.clone())),
            ready: false,
            facts: LinkFacts::default(),
            lost: false,
        };
        let mut way = |weather: Weather| Way {
            pipe: Pipe::new(weather, rng.fork()),
            clear: weather,
            streams: BTreeMap::new(),
            under_way: 0,
            sent: 0,
            lost: 0,
        };
        let roads = conditions.paths.iter().map(|path| Road {
            ways: path.ways.map(&mut way),
            era: 0,
            up: [false, false],
            heard: [now, now],
            dialling: false,
            dark: false,
        });
        let mut roads = Self {
            roads: roads.collect(),
            rng,
            now,
            ends: [site(), site()],
            agenda: BinaryHeap::new(),
            booked: 0,
            outage: false,
            healed: false,
            wrong: None,
            conditions,
        };
        roads.book(now, Happening::Tick);
        roads
    }

    fn book(&mut self, at: Now, what: Happening) {
        self.booked += 1;
        self.agenda.push(Reverse((at, self.booked, what)));
    }

    fn happen(&mut self, what: Happening) {
        let now = self.now;
        match what {
            Happening::Datagram { road, to, era, bytes } => {
                if self.hears(road, to, era) {
                    self.tell(to, |link| link.handle_datagram(now, path(road), bytes));
                }
            }
            Happening::Segment {
                road,
                from,
                era,
                stream,
                len,
            } => {
                let (to, rtt) = (1 - from, self.round_trip(road));
                if !self.hears(road, to, era) {
                    // Nobody is there any more: no acknowledgement either, so the other end falls silent in time.
                    return self.book(
                        now + rtt * 2,
                        Happening::Missing {
                            road,
                            from,
                            era,
                            stream,
                            len,
                        },
                    );
                }
                self.book(now + rtt / 2, Happening::Acknowledged { road, from, era, len });
                let way = &mut self.roads[road].ways[from];
                let Some(sending) = way.streams.get_mut(&stream) else {
                    return;
                };
                sending.to_arrive -= len;
                if sending.to_arrive == 0 {
                    let bytes = way.streams.remove(&stream).expect("seen just now").bytes;
                    self.tell(to, |link| link.handle_stream(now, path(road), bytes));
                }
            }
            Happening::Acknowledged { road, from, era, len } => {
                if self.hears(road, from, era) {
                    let way = &mut self.roads[road].ways[from];
                    way.under_way = way.under_way.saturating_sub(len);
                    self.transmit(road, from);
                    self.flush(from);
                }
            }
            Happening::Missing {
                road,
                from,
                era,
                stream,
                len,
            } => {
                if self.roads[road].era == era && self.roads[road].up[from] {
                    let way = &mut self.roads[road].ways[from];
                    way.under_way = way.under_way.saturating_sub(len);
                    if let Some(sending) = way.streams.get_mut(&stream) {
                        sending.again.push(len);
                        sending.tries += 1;
                    }
                    self.transmit(road, from);
                    self.flush(from);
                }
            }
            Happening::Up { road, end, era } => self.come_up(road, end, era),
            Happening::Down { road, end, era } => {
                if self.roads[road].era == era {
                    self.go_down(road, end);
                }
            }
            Happening::Lost { end } => {
                self.ends[end].lost = true;
                self.ends[end].ready = true;
            }
            Happening::Tick => self.tick(),
        }
    }

    /// Whether what a connection of this era brings is heard at this end.
    fn hears(&mut self, road: usize, end: usize, era: u64) -> bool {
        let road = &mut self.roads[road];
        let hears = road.era == era && road.up[end] && self.ends[end].link.is_some();
        if hears {
            road.heard[end] = self.now;
        }
        hears
    }

    fn tell(&mut self, end: usize, what: impl FnOnce(&mut Link) -> Result<(), PeerMisbehaved>) {
        let site = &mut self.ends[end];
        let Some(link) = &mut site.link else { return };
        site.ready = true;
        if let Err(misbehaved) = what(link) {
            self.wrong
                .get_or_insert_with(|| format!("a link calls its honest peer a liar: {misbehaved}"));
        }
        self.flush(end);
    }

    /// Do what a link wants done.
    fn flush(&mut self, end: usize) {
        loop {
            let Some(output) = self.ends[end].link.as_mut().and_then(Link::poll_output) else {
                return;
            };
            match output {
                Output::Datagram { path, bytes } => self.datagram(index(path), end, bytes),
                Output::Stream {
                    path,
                    stream,
                    priority,
                    head,
                    body,
                } => {
                    let bytes: Bytes = [head, body].concat().into();
                    let sending = Stream {
                        fresh: bytes.len(),
                        to_arrive: bytes.len(),
                        bytes,
                        again: Vec::new(),
                        tries: 0,
                    };
                    let road = &mut self.roads[index(path)];
                    if road.up[end] {
                        road.ways[end].streams.insert((Reverse(priority), stream), sending);
                        self.transmit(index(path), end);
                    }
                }
                Output::ResetStream { path, stream } => {
                    let way = &mut self.roads[index(path)].ways[end];
                    way.streams.retain(|(_, other), _| *other != stream);
                }
            }
        }
    }

    fn datagram(&mut self, road: usize, from: usize, bytes: Bytes) {
        let (now, era) = (self.now, self.roads[road].era);
        if !self.roads[road].up[from] {
            return;
        }
        let way = &mut self.roads[road].ways[from];
        way.sent += 1;
        match way.pipe.send(now, bytes.len()) {
            Fate::Arrives { first, again } => {
                for arrival in [Some(first), again].into_iter().flatten() {
                    let bytes = bytes.clone();
                    self.book(
                        arrival.at,
                        Happening::Datagram {
                            road,
                            to: 1 - from,
                            era,
                            bytes,
                        },
                    );
                }
            }
            Fate::Lost(_) => way.lost += 1,
        }
    }

    /// Send what the window takes.
    fn transmit(&mut self, road: usize, from: usize) {
        let (now, era, window) = (self.now, self.roads[road].era, self.conditions.paths[road].window);
        let rtt = self.round_trip(road);
        loop {
            let way = &mut self.roads[road].ways[from];
            let full = way.under_way > 0 && way.under_way + SEGMENT > window;
            let next = way
                .streams
                .iter_mut()
                .find(|(_, it)| it.fresh > 0 || !it.again.is_empty());
            let (Some((name, sending)), false) = (next, full) else {
                return;
            };
            let name = *name;
            let (len, was_fresh) = match sending.again.pop() {
                Some(len) => (len, false),
                None => (sending.fresh.min(SEGMENT), true),
            };
            if was_fresh {
                sending.fresh -= len;
            }
            let all_sent = was_fresh && sending.fresh == 0;
            let patience = rtt * 2 * (1 << sending.tries.min(5)) + Duration::from_millis(5);
            way.under_way += len;
            way.sent += 1;
            match way.pipe.send(now, len) {
                Fate::Arrives { first, .. } => {
                    self.book(
                        first.at,
                        Happening::Segment {
                            road,
                            from,
                            era,
                            stream: name,
                            len,
                        },
                    );
                }
                Fate::Lost(_) => {
                    way.lost += 1;
                    self.book(
                        now + patience,
                        Happening::Missing {
                            road,
                            from,
                            era,
                            stream: name,
                            len,
                        },
                    );
                }
            }
            if let (true, Some(link)) = (all_sent, &mut self.ends[from].link) {
                link.handle_sent(now, path(road), name.1);
            }
        }
    }

    fn round_trip(&self, road: usize) -> Duration {
        self.roads[road].ways.iter().map(|way| way.pipe.weather().delay).sum()
    }

    fn come_up(&mut self, road: usize, end: usize, era: u64) {
        let (now, rtt) = (self.now, self.round_trip(road));
        if self.roads[road].era != era || self.ends[end].link.is_none() {
            return;
        }
        self.roads[road].dialling &= end != End::Source.index();
        self.roads[road].up[end] = true;
        self.roads[road].heard[end] = now;
        let facts = PathFacts {
            max_datagram: DATAGRAM,
            rtt: Some(rtt),
        };
        self.tell(end, |link| {
            link.path_up(now, path(road), facts);
            Ok(())
        });
    }

    fn go_down(&mut self, road: usize, end: usize) {
        let now = self.now;
        if !std::mem::take(&mut self.roads[road].up[end]) {
            return;
        }
        let way = &mut self.roads[road].ways[end];
        way.streams.clear();
        way.under_way = 0;
        self.tell(end, |link| {
            link.path_down(now, path(road));
            Ok(())
        });
    }

    /// Look after the connections.
    fn tick(&mut self) {
        let now = self.now;
        for road in 0..self.roads.len() {
            for end in 0..2 {
                let silent = now.since(self.roads[road].heard[end]) > self.conditions.idle_timeout;
                if self.roads[road].up[end] && silent {
                    self.go_down(road, end);
                }
            }
            self.dial(road);
            self.sample(road);
        }
        for end in 0..2 {
            self.look_at(end);
        }
        // Ticks end with the ends.
        if self.ends.iter().any(|site| site.link.is_some()) {
            self.book(now + TICK, Happening::Tick);
        }
    }

    fn dial(&mut self, road: usize) {
        let source = End::Source.index();
        let both = self.ends.iter().all(|site| site.link.is_some());
        let passes = !self.outage && !self.roads[road].dark;
        if self.roads[road].up[source] || self.roads[road].dialling || !both || !passes {
            return;
        }
        self.roads[road].dialling = true;
        self.roads[road].era += 1;
        let (era, now, rtt) = (self.roads[road].era, self.now, self.round_trip(road));
        // The shadow's old connection is replaced by the new one.
        self.go_down(road, End::Shadow.index());
        self.book(
            now + rtt / 2,
            Happening::Up {
                road,
                end: End::Shadow.index(),
                era,
            },
        );
        self.book(now + rtt, Happening::Up { road, end: source, era });
    }

    fn sample(&mut self, road: usize) {
        let (now, rtt, window) = (self.now, self.round_trip(road), self.conditions.paths[road].window);
        for end in 0..2 {
            if !self.roads[road].up[end] {
                continue;
            }
            let way = &self.roads[road].ways[end];
            let sample = PathSample {
                rtt,
                cwnd: window as u64,
                sent_packets: way.sent,
                lost_packets: way.lost,
                sent_bytes: way.sent * 1_000,
                lost_bytes: way.lost * 1_000,
                max_datagram: DATAGRAM,
            };
            self.tell(end, |link| {
                link.handle_sample(now, path(road), sample);
                Ok(())
            });
        }
    }

    fn look_at(&mut self, end: usize) {
        let Some(link) = &self.ends[end].link else { return };
        let stats = link.stats();
        let live = || stats.paths.iter().filter(|path| path.state == PathState::Up);
        self.ends[end].facts = LinkFacts {
            rate: Bandwidth(live().map(|path| path.rate.0).sum()),
            rtt: live().map(|path| path.rtt).min().unwrap_or(Duration::ZERO),
        };
        let most = limits::BLOCK_WINDOW_BYTES + limits::MESSAGE_WINDOW_BYTES;
        if stats.receiving_bytes > most {
            self.wrong
                .get_or_insert_with(|| format!("a link holds {} bytes of its peer's", stats.receiving_bytes));
        }
    }

    fn weather(&mut self, road: usize) {
        let now = self.now;
        let blackout = self.outage || self.roads[road].dark;
        for way in &mut self.roads[road].ways {
            let weather = Weather { blackout, ..way.clear };
            way.pipe.set_weather(now, weather);
        }
    }
}

impl Carrier for Roads {
    fn send_message(&mut self, now: Now, from: End, bytes: &Bytes) -> bool {
        self.now = now;
        let Some(link) = &mut self.ends[from.index()].link else {
            return true;
        };
        let taken = link.send_message(now, bytes.clone()).is_ok();
        self.flush(from.index());
        taken
    }

    fn send_block(&mut self, now: Now, from: End, class: Class, bytes: &Bytes) -> bool {
        self.now = now;
        let Some(link) = &mut self.ends[from.index()].link else {
            return true;
        };
        let taken = link.send_block(now, class, bytes.clone()).is_ok();
        self.flush(from.index());
        taken
    }

    fn room(&self, from: End) -> usize {
        self.ends[from.index()].link.as_ref().map_or(0, Link::room)
    }

    fn facts(&self, from: End) -> LinkFacts {
        self.ends[from.index()].facts
    }

    fn poll(&mut self, to: End) -> Option<Arrival> {
        let end = to.index();
        while self.ends[end].ready {
            let event = self.ends[end].link.as_mut().and_then(Link::poll_event);
            self.flush(end);
            match event {
                Some(LinkEvent::Message(bytes)) => return Some(Arrival::Message(bytes)),
                Some(LinkEvent::Block { bytes, .. }) => return Some(Arrival::Block(bytes)),
                Some(LinkEvent::AllPathsDown) => return Some(Arrival::Up(false)),
                Some(LinkEvent::Restored) => return Some(Arrival::Up(true)),
                Some(_) => {}
                None => {
                    self.ends[end].ready = false;
                    if std::mem::take(&mut self.ends[end].lost) {
                        return Some(Arrival::Lost);
                    }
                }
            }
        }
        None
    }

    fn next_time(&self, listens: [bool; 2]) -> Now {
        let agenda = self.agenda.peek().map_or(Now::NEVER, |Reverse((at, _, _))| *at);
        let site = |(site, listens): (&Site, bool)| {
            let timeout = site.link.as_ref().map_or(Now::NEVER, Link::poll_timeout);
            if site.ready && listens { self.now } else { timeout }
        };
        self.ends
            .iter()
            .zip(listens)
            .map(site)
            .min()
            .unwrap_or(Now::NEVER)
            .min(agenda)
    }

    fn handle_time(&mut self, now: Now) {
        self.now = now;
        while self.agenda.peek().is_some_and(|Reverse((at, _, _))| *at <= now) {
            let Some(Reverse((_, _, what))) = self.agenda.pop() else {
                return;
            };
            self.happen(what);
        }
        for end in 0..2 {
            if self.ends[end]
                .link
                .as_ref()
                .is_some_and(|link| link.poll_timeout() <= now)
            {
                self.tell(end, |link| {
                    link.handle_time(now);
                    Ok(())
                });
            }
        }
    }

    fn set_outage(&mut self, now: Now, outage: bool) {
        self.now = now;
        self.outage = outage && !self.healed;
        (0..self.roads.len()).for_each(|road| self.weather(road));
    }

    fn set_dark(&mut self, now: Now, path: usize, dark: bool) {
        self.now = now;
        self.roads[path].dark = dark && !self.healed;
        self.weather(path);
    }

    fn break_path(&mut self, now: Now, path: usize) {
        self.now = now;
        let era = self.roads[path].era;
        for end in 0..2 {
            // One end may know at once, the other only when it has heard nothing for long.
            let notice = self.conditions.idle_timeout.mul_f64(self.rng.unit());
            let at = if self.rng.chance(0.5) { now } else { now + notice };
            self.book(at, Happening::Down { road: path, end, era });
        }
    }

    fn heal(&mut self, now: Now) {
        self.now = now;
        self.healed = true;
        self.outage = false;
        for road in 0..self.roads.len() {
            self.roads[road].dark = false;
            for way in &mut self.roads[road].ways {
                let delay = way.clear.delay.min(Duration::from_millis(20));
                way.clear = Weather {
                    mtu: None,
                    ..Weather::link(Bandwidth::mbit(200), delay)
                };
            }
            self.weather(road);
        }
    }

    fn end_gone(&mut self, now: Now, end: End, answers: bool) {
        self.now = now;
        let (gone, left) = (end.index(), end.other().index());
        self.ends[gone].link = None;
        self.ends[gone].ready = false;
        for road in 0..self.roads.len() {
            self.roads[road].up[gone] = false;
            self.roads[road].ways[gone].streams.clear();
            self.roads[road].dialling = false;
        }
        if answers && self.ends[left].link.is_some() {
            // A closing word, or the next attempt to join, tells; during an outage only when it is over.
            let passes = !self.outage && self.roads.iter().any(|road| !road.dark);
            let notice = if passes {
                self.round_trip(0)
            } else {
                Duration::from_secs(3)
            };
            let at = now + notice + self.conditions.idle_timeout.mul_f64(self.rng.unit());
            self.book(at, Happening::Lost { end: left });
        }
    }

    fn is_drained(&self, from: End) -> bool {
        let (Some(here), Some(there)) = (&self.ends[from.index()].link, &self.ends[from.other().index()].link) else {
            return true;
        };
        here.stats().messages_sent == there.stats().messages_received
    }

    fn out_of_bounds(&self) -> Option<String> {
        self.wrong.clone()
    }
}

fn path(road: usize) -> PathId {
    PathId(u16::try_from(road).expect("three roads at most"))
}

fn index(path: PathId) -> usize {
    usize::from(path.0)
}
