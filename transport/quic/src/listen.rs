//! The accepting side: who knocks, and which link they belong to.
//!
//! A [`Listener`] turns connections into paths. The first path of a link that it does not know becomes an
//! [`Incoming`], and its user decides; paths that join meanwhile wait for that decision. Paths of a live link go straight
//! to its driver. A link that was closed is remembered for a while, so that a path which comes late learns why.
//!
//! Keep the listener as long as its links: a path that died comes back through it.

use crate::address::{self, ListenSpec};
use crate::connect::explain;
use crate::driver::{self, Joining, Liveness, Start, close_code};
use crate::error::{Ended, PathError, Refusal, Refused};
use crate::handle::LinkHandle;
use crate::identity::{Fingerprint, Identity, Peers};
use crate::join::{self, Answer, Broken, Join, LinkId, Token};
use crate::limits;
use crate::socket::LargePackets;
use crate::tls::{self, Pin};
use crate::tuning::Tuning;
use core::fmt;
use core::time::Duration;
use quinn::{Connection, Endpoint, SendStream, ServerConfig, TokioRuntime};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use umbra_paths::LinkConfig;
use umbra_units::PathId;

/// What it takes to listen.
#[derive(Debug, Clone)]
pub struct ListenConfig {
    /// Where.
    pub addrs: Vec<ListenSpec>,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// Who may come.
    pub peers: Peers,
    /// How the connections behave.
    pub tuning: Tuning,
}

/// Accepts links.
#[derive(Debug)]
pub struct Listener {
    knocks: mpsc::Receiver<Knock>,
    addrs: Vec<SocketAddr>,
    shared: Arc<Shared>,
    /// Dropped with the listener: the accept loops end.
    _loops: JoinSet<()>,
}

/// Somebody at the door.
#[derive(Debug)]
pub enum Knock {
    /// A new link: accept or refuse it.
    Link(Incoming),
    /// Somebody who did not get that far.
    TurnedAway {
        /// From where.
        remote: SocketAddr,
        /// Why.
        error: PathError,
    },
}

impl Listener {
    /// Listen on every address.
    ///
    /// # Errors
    /// An address cannot be bound.
    pub fn bind(config: ListenConfig) -> Result<Self, PathError> {
        let (knock, knocks) = mpsc::channel(limits::UNDECIDED);
        let shared = Arc::new(Shared {
            identity: config.identity,
            peers: config.peers,
            tuning: config.tuning,
            knock,
            links: Mutex::new(Links::default()),
            joining: Arc::new(Semaphore::new(limits::JOINING)),
        });
        let mut loops = JoinSet::new();
        let mut addrs = Vec::new();
        for ListenSpec(addr) in config.addrs {
            let endpoint = shared.endpoint(addr)?;
            addrs.push(endpoint.local_addr().map_err(|error| PathError::Bind {
                local: addr,
                text: error.to_string(),
            })?);
            loops.spawn(accept_loop(endpoint, Arc::downgrade(&shared)));
        }
        Ok(Self {
            knocks,
            addrs,
            shared,
            _loops: loops,
        })
    }

    /// Where it listens, ports filled in.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// The next new link. Those who are turned away are logged. Cancel safe.
    pub async fn accept(&mut self) -> Incoming {
        loop {
            match self.knock().await {
                Knock::Link(incoming) => return incoming,
                Knock::TurnedAway { remote, error } => tracing::warn!(%remote, %error, "turned away"),
            }
        }
    }

    /// The next new link, or who was turned away. Cancel safe.
    ///
    /// # Panics
    /// Never: the listener itself holds the other end of the queue.
    pub async fn knock(&mut self) -> Knock {
        self.knocks
            .recv()
            .await
            .expect("the listener's own `shared` holds a sender")
    }

    /// The links that live now.
    pub fn links(&self) -> Vec<LiveLink> {
        self.shared.live_links()
    }
}

/// A link that lives at this listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveLink {
    /// Its name.
    pub link: LinkId,
    /// Who is at the other end.
    pub peer: Fingerprint,
    /// How many connections it has.
    pub connections: usize,
    /// How long it has had none; `None` while it has one.
    pub dark_for: Option<Duration>,
}

impl fmt::Display for LiveLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dark_for {
            None => write!(
                f,
                "link {} of {} is live over {} connections",
                self.link, self.peer, self.connections
            ),
            Some(span) => write!(f, "link {} of {} has been dark for {span:.1?}", self.link, self.peer),
        }
    }
}

/// A new link that waits for a decision. Dropping it refuses it.
#[derive(Debug)]
pub struct Incoming {
    shared: Arc<Shared>,
    link: LinkId,
    peer: Fingerprint,
    remote: SocketAddr,
    version: u16,
    decision: Option<watch::Sender<Decision>>,
}

#[derive(Debug, Clone)]
enum Decision {
    Pending,
    Live,
    Refused(Refused),
}

impl Incoming {
    /// Its name.
    pub const fn link(&self) -> LinkId {
        self.link
    }

    /// Who asks. One of the allowed.
    pub const fn peer(&self) -> Fingerprint {
        self.peer
    }

    /// From where the first path came.
    pub const fn remote(&self) -> SocketAddr {
        self.remote
    }

    /// A link that lives, or has been dark for less than `patience` and may come back: the reason to refuse this one
    /// where only one is wanted.
    pub fn rival(&self, patience: Duration) -> Option<LiveLink> {
        self.shared
            .live_links()
            .into_iter()
            .find(|link| link.dark_for.is_none_or(|span| span < patience))
    }

    /// Take it. Its paths join as soon as the runtime comes to them.
    pub fn accept(mut self, config: LinkConfig) -> LinkHandle {
        let (joinings_in, joinings) = mpsc::channel(umbra_paths::limits::PATHS);
        let (liveness_in, liveness) = watch::channel(Liveness {
            connections: 0,
            since: Instant::now(),
        });
        let live = Live {
            peer: self.peer,
            version: self.version,
            token: Token::draw(),
            joinings: joinings_in,
            liveness,
        };
        self.shared.links().entries.insert(self.link, Entry::Live(live));
        let start = Start {
            link: self.link,
            peer: self.peer,
            version: self.version,
            config,
            first: None,
            joinings,
            liveness: liveness_in,
        };
        let (handle, driver) = driver::start(start);
        let (shared, link) = (Arc::downgrade(&self.shared), self.link);
        tokio::spawn(async move {
            let why = driver.await;
            if let Some(shared) = shared.upgrade() {
                shared.links().forget(link, &why);
            }
        });
        if let Some(decision) = self.decision.take() {
            decision.send_replace(Decision::Live);
        }
        handle
    }

    /// Refuse it with words for the other side.
    pub fn refuse(mut self, code: Refusal, text: impl Into<String>) {
        self.turn_down(Refused {
            code,
            text: text.into(),
        });
    }

    fn turn_down(&mut self, refused: Refused) {
        if let Some(decision) = self.decision.take() {
            self.shared.links().entries.remove(&self.link);
            decision.send_replace(Decision::Refused(refused));
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.turn_down(Refused {
            code: Refusal::Unwanted,
            text: "nobody took the link".to_owned(),
        });
    }
}

#[derive(Debug)]
struct Shared {
    identity: Arc<Identity>,
    peers: Peers,
    tuning: Tuning,
    knock: mpsc::Sender<Knock>,
    links: Mutex<Links>,
    joining: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Links {
    entries: BTreeMap<LinkId, Entry>,
    closed: VecDeque<(LinkId, String)>,
}

#[derive(Debug)]
enum Entry {
    Undecided(watch::Receiver<Decision>),
    Live(Live),
}

#[derive(Debug)]
struct Live {
    peer: Fingerprint,
    version: u16,
    token: Token,
    joinings: mpsc::Sender<Joining>,
    liveness: watch::Receiver<Liveness>,
}

impl Links {
    fn forget(&mut self, link: LinkId, why: &Ended) {
        self.entries.remove(&link);
        self.closed.push_back((link, why.to_string()));
        if self.closed.len() > limits::REMEMBERED {
            self.closed.pop_front();
        }
    }
}

/// What a join comes to, as far as the listener can say by itself.
enum Verdict {
    Joined {
        version: u16,
        token: Token,
        joinings: mpsc::Sender<Joining>,
    },
    Wait(watch::Receiver<Decision>),
    Refused(Refused),
}

impl Verdict {
    fn refused(code: Refusal, text: impl Into<String>) -> Self {
        Self::Refused(Refused {
            code,
            text: text.into(),
        })
    }
}

impl Shared {
    fn links(&self) -> MutexGuard<'_, Links> {
        // Nothing between lock and unlock can panic half-way through a change.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn live_links(&self) -> Vec<LiveLink> {
        let links = self.links();
        let live = links.entries.iter().filter_map(|(link, entry)| match entry {
            Entry::Live(live) => Some((link, live)),
            Entry::Undecided(_) => None,
        });
        live.map(|(link, live)| {
            let Liveness { connections, since } = *live.liveness.borrow();
            let dark_for = (connections == 0).then(|| since.elapsed());
            LiveLink {
                link: *link,
                peer: live.peer,
                connections,
                dark_for,
            }
        })
        .collect()
    }

    fn endpoint(&self, addr: SocketAddr) -> Result<Endpoint, PathError> {
        let mut config = self.server(addr, Pin::new(self.peers.clone()));
        config.max_incoming(limits::JOINING);
        let socket = address::bind(addr)?;
        let endpoint = LargePackets::new(socket).and_then(|socket| {
            let runtime = Arc::new(TokioRuntime);
            Endpoint::new_with_abstract_socket(self.tuning.endpoint(), Some(config), socket, runtime)
        });
        endpoint.map_err(|error| PathError::Bind {
            local: addr,
            text: error.to_string(),
        })
    }

    fn server(&self, remote: SocketAddr, pin: Arc<Pin>) -> ServerConfig {
        let mut config = ServerConfig::with_crypto(tls::server(&self.identity, pin));
        config.transport_config(self.tuning.transport(remote));
        config
    }

    /// From first packet to path.
    async fn admit(self: Arc<Self>, incoming: quinn::Incoming) {
        let remote = incoming.remote_address();
        let pin = Pin::new(self.peers.clone());
        let config = Arc::new(self.server(remote, Arc::clone(&pin)));
        let heard = timeout(self.tuning.join_deadline, hear(incoming, config)).await;
        let (connection, question, send) = match heard {
            Ok(Ok(heard)) => heard,
            Ok(Err(broken)) => return self.turned_away(remote, self.explain(broken, remote, &pin)),
            // Dropping the attempt closes the connection.
            Err(_) => {
                let text = "no join in time".to_owned();
                return self.turned_away(remote, PathError::PeerMisbehaved { remote, text });
            }
        };
        let path = question.as_ref().map_or(PathId(0), |join| join.path);
        match self.decide(&connection, question).await {
            Ok((version, token, joinings)) => {
                let answered = join::answer(&connection, send, &Answer::Joined { version, token }).await;
                if answered.is_ok() && joinings.send(Joining::Up(path, connection.clone())).await.is_err() {
                    // The link ended in this very moment; the next attempt will learn why.
                    connection.close(close_code::REFUSED, b"the link has just ended");
                }
            }
            Err(refused) => self.refuse(&connection, send, refused).await,
        }
    }

    async fn decide(
        self: &Arc<Self>,
        connection: &Connection,
        question: Result<Join, umbra_units::Malformed>,
    ) -> Result<(u16, Token, mpsc::Sender<Joining>), Refused> {
        let refused = |code, text: String| Refused { code, text };
        let join = question.map_err(|error| refused(Refusal::Malformed, error.to_string()))?;
        let peer = tls::peer_of(connection).ok_or_else(|| refused(Refusal::Stranger, "no certificate".to_owned()))?;
        let version = join::common_version(&self.tuning.versions, &join.versions).ok_or_else(|| {
            refused(
                Refusal::Version,
                format!("it speaks {:?}, was offered {:?}", self.tuning.versions, join.versions),
            )
        })?;
        loop {
            match self.look_up(&join, peer, version, connection.remote_address()) {
                Verdict::Joined {
                    version,
                    token,
                    joinings,
                } => return Ok((version, token, joinings)),
                Verdict::Refused(refused) => return Err(refused),
                Verdict::Wait(mut decision) => {
                    let waited = timeout(
                        limits::DECISION_DEADLINE,
                        decision.wait_for(|decision| !matches!(decision, Decision::Pending)),
                    );
                    match waited.await {
                        Ok(Ok(decision)) => match &*decision {
                            Decision::Refused(refused) => return Err(refused.clone()),
                            Decision::Live | Decision::Pending => {}
                        },
                        Ok(Err(_)) => return Err(refused(Refusal::Unwanted, "nobody took the link".to_owned())),
                        Err(_) => return Err(refused(Refusal::Busy, "nobody decided on the link in time".to_owned())),
                    }
                }
            }
        }
    }

    fn look_up(self: &Arc<Self>, join: &Join, peer: Fingerprint, version: u16, remote: SocketAddr) -> Verdict {
        let mut links = self.links();
        match links.entries.get(&join.link) {
            Some(Entry::Undecided(decision)) => return Verdict::Wait(decision.clone()),
            Some(Entry::Live(live)) if live.peer != peer || live.version != version => {
                return Verdict::refused(Refusal::Stranger, format!("link {} belongs to another peer", join.link));
            }
            Some(Entry::Live(live)) if join.token.is_none_or(|token| token == live.token) => {
                return Verdict::Joined {
                    version,
                    token: live.token,
                    joinings: live.joinings.clone(),
                };
            }
            Some(Entry::Live(_)) => {
                return Verdict::refused(
                    Refusal::LinkUnknown,
                    format!("link {} was begun with another end", join.link),
                );
            }
            None => {}
        }
        if let Some((_, why)) = links.closed.iter().find(|(link, _)| *link == join.link) {
            return Verdict::refused(Refusal::LinkClosed, why);
        }
        if join.token.is_some() {
            return Verdict::refused(
                Refusal::LinkUnknown,
                format!("no link {} here: this end was restarted", join.link),
            );
        }
        let (decision, decided) = watch::channel(Decision::Pending);
        let incoming = Incoming {
            shared: Arc::clone(self),
            link: join.link,
            peer,
            remote,
            version,
            decision: Some(decision),
        };
        links.entries.insert(join.link, Entry::Undecided(decided.clone()));
        // Not under the lock: an `Incoming` that finds no room is dropped, and that takes the lock.
        drop(links);
        if let Err(refused) = self.knock.try_send(Knock::Link(incoming)) {
            drop(refused);
            return Verdict::refused(Refusal::Busy, "too many links wait for a decision");
        }
        Verdict::Wait(decided)
    }

    /// Answer "no" and give the peer the time to read it.
    async fn refuse(&self, connection: &Connection, send: SendStream, refused: Refused) {
        let remote = connection.remote_address();
        let text = refused.to_string();
        let error = match refused.code {
            Refusal::Version => PathError::VersionMismatch {
                ours: self.tuning.versions.clone(),
                text: text.clone(),
            },
            Refusal::Malformed => PathError::PeerMisbehaved {
                remote,
                text: text.clone(),
            },
            _ => PathError::Refused(refused.clone()),
        };
        self.turned_away(remote, error);
        if join::answer(connection, send, &Answer::Refused(refused)).await.is_ok() {
            let _ = timeout(self.tuning.join_deadline, connection.closed()).await;
        }
        connection.close(close_code::REFUSED, text.as_bytes());
    }

    fn explain(&self, broken: Broken, remote: SocketAddr, pin: &Pin) -> PathError {
        match broken {
            Broken::Message(text) => PathError::PeerMisbehaved { remote, text },
            Broken::Connection(error) => match pin.refused() {
                Some(got) => PathError::WrongCertificate {
                    remote,
                    got,
                    expected: pin.expected(),
                },
                None => explain(&error, remote, self.identity.fingerprint()),
            },
        }
    }

    fn turned_away(&self, remote: SocketAddr, error: PathError) {
        tracing::debug!(%remote, %error, "turned away");
        // News for people: when nobody reads it, it is not worth a queue.
        let _ = self.knock.try_send(Knock::TurnedAway { remote, error });
    }
}

/// Handshake and question.
async fn hear(
    incoming: quinn::Incoming,
    config: Arc<ServerConfig>,
) -> Result<(Connection, Result<Join, umbra_units::Malformed>, SendStream), Broken> {
    let connecting = incoming.accept_with(config).map_err(Broken::Connection)?;
    let connection = connecting.await.map_err(Broken::Connection)?;
    let (question, send) = join::listen(&connection).await?;
    Ok((connection, question, send))
}

async fn accept_loop(endpoint: Endpoint, shared: Weak<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        let Some(shared) = shared.upgrade() else { return };
        let Ok(place) = Arc::clone(&shared.joining).try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        // Nearly full: whoever comes now shows first that its address is real.
        let crowded = limits::JOINING - shared.joining.available_permits() > limits::JOINING_UNPROVEN;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(async move {
            shared.admit(incoming).await;
            drop(place);
        });
    }
}
