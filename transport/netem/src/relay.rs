//! A UDP relay under a weather: real sockets, real time, no special rights.
//!
//! ```text
//!  client ──▶ listen socket ─ up pipe ──▶ one socket per client ──▶ target
//!  client ◀── listen socket ◀─ down pipe ─ the same socket      ◀── target
//! ```
//!
//! Blocking sockets and threads: one thread reads what clients send, one per client reads what the target answers, and
//! one, the *line*, delivers what the weather delays. A datagram that is due at once goes straight from the reader's
//! buffer to the other socket; only delayed ones are copied and queued. The line sleeps on a condition variable until
//! the earliest is due; the kernel's timer slack makes that about 60 µs late on average, which is what a real link's
//! interrupt moderation costs too, and burns no processor. A timer of the async runtime would be late by a millisecond.
//!
//! A blackout drops what is already under way as well: a cut cable delivers nothing.
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the relay is the one module of this crate that is clock, threads and sockets"
)]

use crate::limits::{CLIENTS_MAX, DATAGRAM_MAX, HELD_MAX};
use crate::model::{Arrival, Cause, Fate, Pipe, Weather};
use crate::script::{Player, Script, Way};
use core::time::Duration;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::Instant;
use umbra_units::{Bytes, Now, Rng};

/// How often a reader looks whether it should stop, and so how long a relay takes to drop at most.
const STOP_CHECK: Duration = Duration::from_millis(25);

/// Socket buffers: enough for 20 ms at 1 Gbit/s, so that the relay itself adds no loss. The kernel may give less.
const SOCKET_BUFFER: usize = 4 << 20;

/// What a relay needs to know.
#[derive(Debug, Clone)]
pub struct RelayConfig {
    /// Where clients send. Port 0 takes a free one: see [`Relay::addr`].
    pub listen: SocketAddr,
    /// Where their datagrams go.
    pub to: SocketAddr,
    /// The weather from the clients to the target.
    pub up: Weather,
    /// The weather from the target to the clients.
    pub down: Weather,
    /// What happens to both, from the start of the relay.
    pub script: Script,
    /// The seed of all chance.
    pub seed: u64,
}

impl RelayConfig {
    /// A relay to `to` on a free port of the loopback of the same address family, with `weather` both ways.
    pub fn to(to: SocketAddr, weather: Weather) -> Self {
        let ip = if to.is_ipv6() {
            IpAddr::V6(Ipv6Addr::LOCALHOST)
        } else {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        };
        Self {
            listen: SocketAddr::new(ip, 0),
            to,
            up: weather,
            down: weather,
            script: Script::default(),
            seed: 0,
        }
    }
}

/// What passed in one direction and what did not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WayCounters {
    /// Datagrams that came in.
    pub taken: u64,
    /// Their bytes.
    pub taken_bytes: Bytes,
    /// Datagrams that went out, duplicates included.
    pub delivered: u64,
    /// Their bytes.
    pub delivered_bytes: Bytes,
    /// Datagrams that did not, by why.
    pub dropped: BTreeMap<Cause, u64>,
    /// Datagrams that this host's sockets would not take, or for which the relay had no room.
    pub host_dropped: u64,
    /// Datagrams under way now.
    pub held: u64,
}

impl WayCounters {
    /// Everything dropped by the weather.
    pub fn dropped_total(&self) -> u64 {
        self.dropped.values().sum()
    }
}

/// Both directions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// From the clients to the target.
    pub up: WayCounters,
    /// From the target to the clients.
    pub down: WayCounters,
}

impl Counters {
    /// Those of one direction.
    pub const fn way(&self, way: Way) -> &WayCounters {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    const fn way_mut(&mut self, way: Way) -> &mut WayCounters {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

/// What was waited for did not happen in time. Carries what did.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the relay did not reach it within {patience:?}: {counters:?}")]
pub struct Impatient {
    /// How long it waited.
    pub patience: Duration,
    /// How far it came.
    pub counters: Box<Counters>,
}

/// A running relay. Dropping it stops it and joins its threads.
#[derive(Debug)]
pub struct Relay {
    control: RelayControl,
    threads: Vec<JoinHandle<()>>,
}

/// A handle on a running relay, to be passed around.
#[derive(Debug, Clone)]
pub struct RelayControl {
    shared: Arc<Shared>,
}

impl Relay {
    /// Start relaying.
    ///
    /// # Errors
    /// The listen address cannot be bound, or a thread cannot be started.
    pub fn start(config: RelayConfig) -> io::Result<Self> {
        let socket = UdpSocket::bind(config.listen)?;
        prepare(&socket)?;
        let shared = Arc::new(Shared::new(socket, &config)?);
        let mut relay = Self {
            control: RelayControl {
                shared: Arc::clone(&shared),
            },
            threads: Vec::new(),
        };
        let line = Arc::clone(&shared);
        relay.threads.push(
            thread::Builder::new()
                .name("netem-line".to_owned())
                .spawn(move || line.deliver_loop())?,
        );
        relay.threads.push(
            thread::Builder::new()
                .name("netem-up".to_owned())
                .spawn(move || shared.up_loop())?,
        );
        Ok(relay)
    }

    /// Where clients send.
    pub fn addr(&self) -> SocketAddr {
        self.control.shared.addr
    }

    /// A handle that can be cloned and outlives this one without keeping the relay running.
    pub fn control(&self) -> RelayControl {
        self.control.clone()
    }
}

impl core::ops::Deref for Relay {
    type Target = RelayControl;
    fn deref(&self) -> &RelayControl {
        &self.control
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let shared = &self.control.shared;
        shared.stop.store(true, Ordering::Relaxed);
        // Under the lock, so that the line cannot miss it between looking and sleeping.
        drop(shared.state());
        shared.due.notify_all();
        shared.happened.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has already said why; the relay is going away either way.
            let _ = thread.join();
        }
        shared.state().clients.clear();
    }
}

impl RelayControl {
    /// Change the weather of both directions.
    pub fn set_weather(&self, up: Weather, down: Weather) {
        let now = self.shared.now();
        let mut state = self.shared.state();
        state.up.set_weather(now, up);
        state.down.set_weather(now, down);
    }

    /// The weather of a direction now.
    pub fn weather(&self, way: Way) -> Weather {
        *self.shared.state().pipe(way).weather()
    }

    /// Nothing passes in either direction while `on`, and what is under way is lost.
    pub fn blackout(&self, on: bool) {
        for way in Way::BOTH {
            self.blackout_way(way, on);
        }
    }

    /// The same for one direction.
    pub fn blackout_way(&self, way: Way, on: bool) {
        let now = self.shared.now();
        let mut state = self.shared.state();
        let weather = Weather {
            blackout: on,
            ..*state.pipe(way).weather()
        };
        state.pipe_mut(way).set_weather(now, weather);
        if on {
            state.lose_held(way);
        }
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        self.shared.state().counters.clone()
    }

    /// Block until `reached` holds of the counters, and say what they were then.
    ///
    /// # Errors
    /// It did not within `patience`, or the relay was stopped.
    pub fn wait_until(
        &self,
        patience: Duration,
        mut reached: impl FnMut(&Counters) -> bool,
    ) -> Result<Counters, Impatient> {
        let shared = &self.shared;
        let until = Instant::now() + patience;
        let mut state = shared.state();
        state.waiters += 1;
        let result = loop {
            if reached(&state.counters) {
                break Ok(state.counters.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || shared.stop.load(Ordering::Relaxed) {
                break Err(Impatient {
                    patience,
                    counters: Box::new(state.counters.clone()),
                });
            }
            state = shared
                .happened
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        state.waiters -= 1;
        result
    }

    /// Block until `bytes` have been delivered in one direction since the relay started.
    ///
    /// # Errors
    /// They were not within `patience`.
    pub fn wait_until_bytes(&self, way: Way, bytes: Bytes, patience: Duration) -> Result<Counters, Impatient> {
        self.wait_until(patience, |counters| counters.way(way).delivered_bytes >= bytes)
    }
}

#[derive(Debug)]
struct Shared {
    socket: UdpSocket,
    addr: SocketAddr,
    to: SocketAddr,
    start: Instant,
    stop: AtomicBool,
    state: Mutex<State>,
    /// Something is due earlier than the line thinks.
    due: Condvar,
    /// A counter moved and somebody waits for that.
    happened: Condvar,
}

#[derive(Debug)]
struct State {
    up: Pipe,
    down: Pipe,
    player: Player,
    counters: Counters,
    held: BinaryHeap<Reverse<Held>>,
    held_bytes: Bytes,
    next_number: u64,
    /// The line is delivering what it took from `held`: a datagram due at once must queue behind it.
    delivering: bool,
    /// Until when the line sleeps; it needs a nudge only for something earlier.
    asleep_until: Now,
    clients: BTreeMap<SocketAddr, Client>,
    waiters: usize,
}

#[derive(Debug)]
struct Client {
    socket: Arc<UdpSocket>,
    last_heard: Now,
    /// Dropped with the client: its reader looks whether it is still there.
    _alive: Arc<()>,
}

/// A datagram under way. Ordered by when it is due, then by when it came.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    at: Now,
    number: u64,
    way: Way,
    client: SocketAddr,
    bytes: Vec<u8>,
}

impl State {
    const fn pipe(&self, way: Way) -> &Pipe {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }

    const fn pipe_mut(&mut self, way: Way) -> &mut Pipe {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }

    /// A cut cable loses what is under way.
    fn lose_held(&mut self, way: Way) {
        let before = self.held.len();
        self.held.retain(|Reverse(held)| held.way != way);
        let lost = (before - self.held.len()) as u64;
        self.held_bytes = self
            .held
            .iter()
            .map(|Reverse(held)| Bytes::of_len(held.bytes.len()))
            .sum();
        let counters = self.counters.way_mut(way);
        counters.held -= lost;
        *counters.dropped.entry(Cause::Blackout).or_default() += lost;
    }

    fn hold(&mut self, way: Way, client: SocketAddr, arrival: Arrival, bytes: &[u8]) {
        let size = Bytes::of_len(bytes.len());
        if self.held_bytes + size > HELD_MAX {
            self.counters.way_mut(way).host_dropped += 1;
            return;
        }
        self.held_bytes += size;
        let mut bytes = bytes.to_vec();
        arrival.damage(&mut bytes);
        self.counters.way_mut(way).held += 1;
        let number = self.next_number;
        self.next_number += 1;
        self.held.push(Reverse(Held {
            at: arrival.at,
            number,
            way,
            client,
            bytes,
        }));
    }

    fn upstream(&self, client: SocketAddr) -> Option<Arc<UdpSocket>> {
        self.clients.get(&client).map(|client| Arc::clone(&client.socket))
    }
}

impl Shared {
    fn new(socket: UdpSocket, config: &RelayConfig) -> io::Result<Self> {
        let mut rng = Rng::new(config.seed);
        let state = State {
            up: Pipe::new(config.up, rng.fork()),
            down: Pipe::new(config.down, rng.fork()),
            player: Player::new(config.script.clone(), Now::ZERO),
            counters: Counters::default(),
            held: BinaryHeap::new(),
            held_bytes: Bytes::ZERO,
            next_number: 0,
            delivering: false,
            asleep_until: Now::ZERO,
            clients: BTreeMap::new(),
            waiters: 0,
        };
        Ok(Self {
            addr: socket.local_addr()?,
            socket,
            to: config.to,
            start: Instant::now(),
            stop: AtomicBool::new(false),
            state: Mutex::new(state),
            due: Condvar::new(),
            happened: Condvar::new(),
        })
    }

    fn now(&self) -> Now {
        Now::from_us(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything in it can panic; a poisoned lock holds a good state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Read what clients send until the relay stops.
    fn up_loop(self: Arc<Self>) {
        let mut buffer = vec![0; DATAGRAM_MAX];
        while !self.stopped() {
            // Errors here are a client's port being gone (ICMP) or the stop check; the next datagram is another matter.
            let Ok((len, client)) = self.socket.recv_from(&mut buffer) else {
                continue;
            };
            if self.welcome(client) {
                self.carry(Way::Up, client, &mut buffer[..len]);
            }
        }
    }

    /// Read what the target answers to one client until the relay stops or the client is forgotten.
    fn down_loop(shared: &Weak<Self>, socket: &UdpSocket, client: SocketAddr, alive: &Weak<()>) {
        let mut buffer = vec![0; DATAGRAM_MAX];
        while alive.strong_count() > 0 {
            let Ok(len) = socket.recv(&mut buffer) else { continue };
            let Some(shared) = shared.upgrade() else { return };
            shared.carry(Way::Down, client, &mut buffer[..len]);
        }
    }

    /// See to it that this client has a socket towards the target. Whether it has.
    fn welcome(self: &Arc<Self>, client: SocketAddr) -> bool {
        let now = self.now();
        if let Some(known) = self.state().clients.get_mut(&client) {
            known.last_heard = now;
            return true;
        }
        match self.new_client(client, now) {
            Ok(new) => {
                let mut state = self.state();
                if state.clients.len() >= CLIENTS_MAX {
                    let idlest = state
                        .clients
                        .iter()
                        .min_by_key(|(_, c)| c.last_heard)
                        .map(|(addr, _)| *addr);
                    idlest.and_then(|addr| state.clients.remove(&addr));
                }
                state.clients.insert(client, new);
                true
            }
            Err(error) => {
                tracing::warn!(%client, %error, "relay cannot open a socket for a client");
                self.state().counters.up.host_dropped += 1;
                false
            }
        }
    }

    fn new_client(self: &Arc<Self>, client: SocketAddr, now: Now) -> io::Result<Client> {
        let any = match self.to {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(self.to)?;
        prepare(&socket)?;
        let socket = Arc::new(socket);
        let alive = Arc::new(());
        let (shared, theirs, watch) = (Arc::downgrade(self), Arc::clone(&socket), Arc::downgrade(&alive));
        // Not joined: it holds nothing of the relay and ends at its next stop check after the client is dropped.
        thread::Builder::new()
            .name("netem-down".to_owned())
            .spawn(move || Self::down_loop(&shared, &theirs, client, &watch))?;
        Ok(Client {
            socket,
            last_heard: now,
            _alive: alive,
        })
    }

    /// Put one datagram through the weather of its direction.
    fn carry(&self, way: Way, client: SocketAddr, bytes: &mut [u8]) {
        let now = self.now();
        let mut state = self.state();
        let counters = state.counters.way_mut(way);
        counters.taken += 1;
        counters.taken_bytes += Bytes::of_len(bytes.len());
        match state.pipe_mut(way).send(now, bytes.len()) {
            Fate::Lost(cause) => *state.counters.way_mut(way).dropped.entry(cause).or_default() += 1,
            Fate::Arrives { first, again: None } if first.at <= now && state.held.is_empty() && !state.delivering => {
                let upstream = state.upstream(client);
                drop(state);
                first.damage(bytes);
                let sent = self.put_out(way, client, upstream.as_deref(), bytes);
                state = self.state();
                count_delivery(&mut state, way, bytes.len(), sent);
            }
            Fate::Arrives { first, again } => {
                state.hold(way, client, first, bytes);
                if let Some(again) = again {
                    state.hold(way, client, again, bytes);
                }
                if first.at < state.asleep_until {
                    state.asleep_until = first.at;
                    self.due.notify_one();
                }
            }
        }
        if state.waiters > 0 {
            self.happened.notify_all();
        }
    }

    fn put_out(&self, way: Way, client: SocketAddr, upstream: Option<&UdpSocket>, bytes: &[u8]) -> bool {
        match way {
            Way::Down => self.socket.send_to(bytes, client).is_ok(),
            Way::Up => upstream.is_some_and(|socket| socket.send(bytes).is_ok()),
        }
    }

    /// The line: deliver what is due, play the script, sleep until the next of either.
    fn deliver_loop(self: Arc<Self>) {
        let mut batch = Vec::new();
        let mut state = self.state();
        while !self.stopped() {
            let now = self.now();
            play(&mut state, now);
            while state.held.peek().is_some_and(|Reverse(held)| held.at <= now) {
                let Some(Reverse(held)) = state.held.pop() else { break };
                state.held_bytes = state.held_bytes - Bytes::of_len(held.bytes.len());
                let upstream = state.upstream(held.client);
                batch.push((held, upstream));
            }
            if batch.is_empty() {
                state = self.sleep(state, now);
                continue;
            }
            state.delivering = true;
            drop(state);
            let sent: Vec<bool> = batch
                .iter()
                .map(|(held, upstream)| self.put_out(held.way, held.client, upstream.as_deref(), &held.bytes))
                .collect();
            state = self.state();
            state.delivering = false;
            for ((held, _), sent) in batch.drain(..).zip(sent) {
                state.counters.way_mut(held.way).held -= 1;
                count_delivery(&mut state, held.way, held.bytes.len(), sent);
            }
            if state.waiters > 0 {
                self.happened.notify_all();
            }
        }
    }

    fn sleep<'a>(&self, mut state: MutexGuard<'a, State>, now: Now) -> MutexGuard<'a, State> {
        let held = state.held.peek().map_or(Now::NEVER, |Reverse(held)| held.at);
        let until = held.min(state.player.poll_timeout().unwrap_or(Now::NEVER));
        state.asleep_until = until;
        state = if until == Now::NEVER {
            self.due.wait(state).unwrap_or_else(PoisonError::into_inner)
        } else {
            self.due
                .wait_timeout(state, until.since(now))
                .unwrap_or_else(PoisonError::into_inner)
                .0
        };
        // Awake: until it sleeps again it needs no nudge.
        state.asleep_until = Now::ZERO;
        state
    }
}

fn play(state: &mut State, now: Now) {
    let (mut up, mut down) = (*state.up.weather(), *state.down.weather());
    if !state.player.handle_time(now, &mut up, &mut down) {
        return;
    }
    for (way, weather) in [(Way::Up, up), (Way::Down, down)] {
        let before = state.pipe(way).weather().blackout;
        state.pipe_mut(way).set_weather(now, weather);
        if weather.blackout && !before {
            state.lose_held(way);
        }
    }
}

fn count_delivery(state: &mut State, way: Way, len: usize, sent: bool) {
    let counters = state.counters.way_mut(way);
    if sent {
        counters.delivered += 1;
        counters.delivered_bytes += Bytes::of_len(len);
    } else {
        counters.host_dropped += 1;
    }
}

fn prepare(socket: &UdpSocket) -> io::Result<()> {
    let options = socket2::SockRef::from(socket);
    // The kernel gives what its own limits allow and says nothing; a smaller buffer only costs loss under load.
    options.set_recv_buffer_size(SOCKET_BUFFER)?;
    options.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_read_timeout(Some(STOP_CHECK))
}
