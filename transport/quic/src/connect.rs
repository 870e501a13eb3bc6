//! The connecting side: dial every path, for ever.
//!
//! One task per path: bind, connect, join, hand the connection to the driver, wait until it ends, and again. The first
//! path that is up makes the link; the others come when they can. Attempts follow each other after 50 ms at first and
//! 2 s at last; when trying again is pointless without somebody's help, always after 2 s, because somebody may help.

use crate::address::{self, PathSpec};
use crate::driver::{self, Joining, Liveness, Start, close_code};
use crate::error::{ConnectError, Ended, PathError, Refusal, readable};
use crate::handle::LinkHandle;
use crate::identity::{Fingerprint, Identity, Peers};
use crate::join::{self, Answer, Broken, Join, LinkId, Token};
use crate::limits;
use crate::socket::LargePackets;
use crate::tls::{self, Pin};
use crate::tuning::Tuning;
use core::time::Duration;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, TokioRuntime};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use umbra_paths::LinkConfig;
use umbra_units::PathId;

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_LAST: Duration = Duration::from_secs(2);

/// What it takes to connect.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    /// The paths. Each one's place in this list is its [`PathId`], at both ends.
    pub paths: Vec<PathSpec>,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// Who the peer may be.
    pub peers: Peers,
    /// How the link behaves.
    pub link: LinkConfig,
    /// How the connections behave.
    pub tuning: Tuning,
    /// How long [`connect`] tries before it gives up.
    pub patience: Duration,
}

impl ConnectConfig {
    /// To `paths`, as `identity`, expecting `peers`; everything else as it usually is.
    pub fn new(paths: Vec<PathSpec>, identity: Arc<Identity>, peers: Peers) -> Self {
        Self {
            paths,
            identity,
            peers,
            link: LinkConfig::default(),
            tuning: Tuning::default(),
            patience: Duration::from_secs(10),
        }
    }
}

/// Connect. Succeeds when the first path is up; the others keep trying in the background, and so does every path that
/// dies, as long as the link lives.
///
/// # Errors
/// The peer refused the link, every path failed for good, or none came up in time.
pub async fn connect(config: ConnectConfig) -> Result<LinkHandle, ConnectError> {
    let limit = umbra_paths::limits::PATHS;
    if config.paths.is_empty() || config.paths.len() > limit {
        return Err(ConnectError::Paths {
            got: config.paths.len(),
            limit,
        });
    }
    let (reports, mut joinings) = mpsc::channel(config.paths.len() * 2);
    let shared = Arc::new(Shared {
        link: LinkId::draw(),
        identity: config.identity,
        peers: config.peers,
        tuning: config.tuning,
        joined: OnceLock::new(),
        reports,
    });
    let mut dialers = JoinSet::new();
    for (path, spec) in (0..).map(PathId).zip(&config.paths) {
        dialers.spawn(
            Dialer {
                shared: Arc::clone(&shared),
                path,
                spec: *spec,
                last_trouble: None,
            }
            .run(),
        );
    }
    let until = Instant::now() + config.patience;
    let (path, connection) = first(&config.paths, &mut joinings, until).await?;
    let joined = shared
        .joined
        .get()
        .expect("a dialer reports a connection only after it has joined");
    let (liveness, _) = watch::channel(Liveness {
        connections: 0,
        since: Instant::now(),
    });
    let start = Start {
        link: shared.link,
        peer: joined.peer,
        version: joined.version,
        config: config.link,
        first: Some((path, connection)),
        joinings,
        liveness,
    };
    let (handle, driver) = driver::start(start);
    tokio::spawn(async move {
        driver.await;
        // No more dialling: the set aborts its tasks when it is dropped.
        drop(dialers);
    });
    Ok(handle)
}

/// Wait for the first connection, or for a reason to stop waiting.
async fn first(
    paths: &[PathSpec],
    joinings: &mut mpsc::Receiver<Joining>,
    until: Instant,
) -> Result<(PathId, Connection), ConnectError> {
    let mut troubles: Vec<Option<PathError>> = vec![None; paths.len()];
    loop {
        let Ok(Some(joining)) = timeout_at(until, joinings.recv()).await else {
            return Err(no_path(paths, troubles));
        };
        match joining {
            Joining::Up(path, connection) => return Ok((path, connection)),
            Joining::Trouble(path, error) => {
                let at = usize::from(path.0);
                if matches!(error, PathError::Refused(_) | PathError::VersionMismatch { .. }) {
                    return Err(ConnectError::Refused { path: paths[at], error });
                }
                troubles[at] = Some(error);
                if troubles
                    .iter()
                    .all(|trouble| trouble.as_ref().is_some_and(PathError::is_final))
                {
                    return Err(no_path(paths, troubles));
                }
            }
            // Only a link that has been joined can be forgotten, and then a connection was reported before.
            Joining::Over(_) => return Err(no_path(paths, troubles)),
        }
    }
}

fn no_path(paths: &[PathSpec], troubles: Vec<Option<PathError>>) -> ConnectError {
    let silent = |spec: &PathSpec| PathError::Unreachable {
        remote: spec.remote,
        text: "no answer yet".to_owned(),
    };
    let told = paths.iter().zip(troubles);
    ConnectError::NoPath(
        told.map(|(spec, trouble)| (*spec, trouble.unwrap_or_else(|| silent(spec))))
            .collect(),
    )
}

/// What the dialers of one link have in common.
struct Shared {
    link: LinkId,
    identity: Arc<Identity>,
    peers: Peers,
    tuning: Tuning,
    /// What the first answer said. Every later one must say the same.
    joined: OnceLock<Joined>,
    reports: mpsc::Sender<Joining>,
}

#[derive(PartialEq, Eq)]
struct Joined {
    peer: Fingerprint,
    version: u16,
    token: Token,
}

struct Dialer {
    shared: Arc<Shared>,
    path: PathId,
    spec: PathSpec,
    last_trouble: Option<PathError>,
}

/// What an attempt came to.
enum Attempt {
    Up(Connection),
    Failed(PathError),
    /// The link is over.
    Over(Ended),
}

impl Dialer {
    async fn run(mut self) {
        let mut endpoint = None;
        let mut backoff = BACKOFF_FIRST;
        loop {
            let over = match self.attempt(&mut endpoint).await {
                Attempt::Up(connection) => {
                    backoff = BACKOFF_FIRST;
                    self.last_trouble = None;
                    self.report(Joining::Up(self.path, connection.clone())).await;
                    let error = connection.closed().await;
                    tracing::debug!(path = %self.path, spec = %self.spec, %error, "path is down");
                    said_closed(&error)
                }
                Attempt::Failed(error) => {
                    if error.is_final() {
                        backoff = BACKOFF_LAST;
                    }
                    self.trouble(error).await;
                    None
                }
                Attempt::Over(why) => Some(why),
            };
            if let Some(why) = over {
                return self.report(Joining::Over(why)).await;
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_LAST);
        }
    }

    async fn report(&self, joining: Joining) {
        // A driver that is gone takes its dialers with it.
        let _ = self.shared.reports.send(joining).await;
    }

    async fn trouble(&mut self, error: PathError) {
        if self.last_trouble.as_ref() != Some(&error) {
            tracing::info!(path = %self.path, %error, "path cannot be had");
            self.last_trouble = Some(error.clone());
            self.report(Joining::Trouble(self.path, error)).await;
        }
    }

    async fn attempt(&self, endpoint: &mut Option<Endpoint>) -> Attempt {
        let shared = &self.shared;
        let pin = Pin::new(shared.peers.clone());
        let connection = match timeout(shared.tuning.join_deadline, self.dial(endpoint, &pin)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Attempt::Failed(error),
            Err(_) => return Attempt::Failed(self.unreachable("the handshake took too long")),
        };
        let question = Join {
            versions: shared.tuning.versions.clone(),
            link: shared.link,
            token: shared.joined.get().map(|joined| joined.token),
            path: self.path,
        };
        let answer = match timeout(shared.tuning.join_deadline, join::ask(&connection, &question)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(Broken::Connection(error))) => {
                return said_closed(&error)
                    .map_or_else(|| Attempt::Failed(self.refused_by(&error, &pin)), Attempt::Over);
            }
            Ok(Err(Broken::Message(text))) => {
                connection.close(close_code::MISBEHAVED, text.as_bytes());
                return Attempt::Failed(PathError::PeerMisbehaved {
                    remote: self.spec.remote,
                    text,
                });
            }
            Err(_) => {
                connection.close(close_code::MISBEHAVED, b"no answer to the join in time");
                return Attempt::Failed(self.unreachable("no answer to the join"));
            }
        };
        self.judge(connection, answer)
    }

    fn judge(&self, connection: Connection, answer: Answer) -> Attempt {
        let (version, token) = match answer {
            Answer::Joined { version, token } => (version, token),
            Answer::Refused(refused) => {
                connection.close(close_code::CLOSED, b"");
                return match refused.code {
                    Refusal::LinkUnknown => Attempt::Over(Ended::PeerForgot(refused.text)),
                    Refusal::LinkClosed => Attempt::Over(Ended::ClosedByPeer(refused.text)),
                    Refusal::Version => Attempt::Failed(PathError::VersionMismatch {
                        ours: self.shared.tuning.versions.clone(),
                        text: refused.text,
                    }),
                    _ => Attempt::Failed(PathError::Refused(refused)),
                };
            }
        };
        let Some(peer) = tls::peer_of(&connection).filter(|_| self.shared.tuning.versions.contains(&version)) else {
            let text = format!("it chose version {version}, which was not offered");
            connection.close(close_code::MISBEHAVED, text.as_bytes());
            return Attempt::Failed(PathError::PeerMisbehaved {
                remote: self.spec.remote,
                text,
            });
        };
        let joined = Joined { peer, version, token };
        if *self.shared.joined.get_or_init(|| Joined { ..joined }) == joined {
            return Attempt::Up(connection);
        }
        // Two acceptors answered for one link: one of them has been restarted, or the paths lead to different hosts.
        let text = "its paths are answered by different ends".to_owned();
        connection.close(close_code::CLOSED, text.as_bytes());
        Attempt::Over(Ended::PeerForgot(text))
    }

    async fn dial(&self, endpoint: &mut Option<Endpoint>, pin: &Arc<Pin>) -> Result<Connection, PathError> {
        let bound = match endpoint {
            Some(bound) => bound,
            None => endpoint.insert(self.bind()?),
        };
        let mut config = ClientConfig::new(tls::client(&self.shared.identity, Arc::clone(pin)));
        config.transport_config(self.shared.tuning.transport(self.spec.remote));
        let connecting = bound.connect_with(config, self.spec.remote, tls::SERVER_NAME);
        let connecting = connecting.map_err(|error| self.unreachable(&error.to_string()))?;
        connecting.await.map_err(|error| self.refused_by(&error, pin))
    }

    fn bind(&self) -> Result<Endpoint, PathError> {
        let local = self.spec.bind_addr();
        let socket = address::bind(local)?;
        let endpoint = LargePackets::new(socket).and_then(|socket| {
            Endpoint::new_with_abstract_socket(self.shared.tuning.endpoint(), None, socket, Arc::new(TokioRuntime))
        });
        endpoint.map_err(|error| PathError::Bind {
            local,
            text: error.to_string(),
        })
    }

    fn unreachable(&self, text: &str) -> PathError {
        PathError::Unreachable {
            remote: self.spec.remote,
            text: text.to_owned(),
        }
    }

    /// What a connection that ended before it was joined means.
    fn refused_by(&self, error: &ConnectionError, pin: &Pin) -> PathError {
        if let Some(got) = pin.refused() {
            return PathError::WrongCertificate {
                remote: self.spec.remote,
                got,
                expected: pin.expected(),
            };
        }
        explain(error, self.spec.remote, self.shared.identity.fingerprint())
    }
}

/// Did the peer say that the link is over?
fn said_closed(error: &ConnectionError) -> Option<Ended> {
    match error {
        ConnectionError::ApplicationClosed(close) if close.error_code == close_code::CLOSED => {
            Some(Ended::ClosedByPeer(readable(&close.reason, limits::REASON_TEXT)))
        }
        _ => None,
    }
}

/// What the end of a connection that never became a path means.
pub(crate) fn explain(error: &ConnectionError, remote: SocketAddr, ours: Fingerprint) -> PathError {
    // TLS alerts travel as 0x100 + alert; these are about certificates (RFC 8446, Alert Protocol; RFC 9001, TLS Errors).
    const CERTIFICATE_ALERTS: [u8; 8] = [41, 42, 43, 44, 45, 46, 48, 116];
    match error {
        ConnectionError::ConnectionClosed(close)
            if CERTIFICATE_ALERTS
                .iter()
                .any(|alert| close.error_code == quinn::TransportErrorCode::crypto(*alert)) =>
        {
            let text = readable(&close.reason, limits::REASON_TEXT);
            PathError::NotWelcome {
                remote,
                ours,
                text: tls::refusal_in(&text).to_owned(),
            }
        }
        ConnectionError::ApplicationClosed(close) if close.error_code == close_code::MISBEHAVED => {
            let text = readable(&close.reason, limits::REASON_TEXT);
            PathError::PeerMisbehaved {
                remote,
                text: format!("it says that we do: {text}"),
            }
        }
        ConnectionError::TransportError(error) => PathError::PeerMisbehaved {
            remote,
            text: error.to_string(),
        },
        error => PathError::Unreachable {
            remote,
            text: readable(error.to_string().as_bytes(), limits::REASON_TEXT),
        },
    }
}
