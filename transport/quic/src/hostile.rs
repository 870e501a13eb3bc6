//! Peers that lie, stall, flood or are not who they say: played with bare connections, because a correct peer cannot.

use crate::connect::{ConnectConfig, connect};
use crate::driver::{HalfWritten, Unfit, close_code, read_stream, sample_of};
use crate::error::{ConnectError, Ended, PathError, Refusal, Refused};
use crate::handle::{Event, LinkHandle};
use crate::identity::{Identity, Peers};
use crate::join::{self, Answer, Broken, Join, LinkId, Token};
use crate::listen::{Knock, ListenConfig, Listener};
use crate::tls::{self, Pin};
use crate::{PathSpec, Tuning, limits};
use core::time::Duration;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, ServerConfig, VarInt};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use umbra_paths::LinkConfig;
use umbra_units::{PathId, Rng};

const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

fn tuning() -> Tuning {
    Tuning {
        join_deadline: Duration::from_millis(400),
        ..Tuning::default()
    }
}

fn localhost() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A correct listener, and somebody who may connect to it and then does as it likes.
struct Scene {
    listener: Listener,
    shadow: Arc<Identity>,
    caller: Arc<Identity>,
    endpoint: Endpoint,
}

impl Scene {
    fn new() -> Self {
        let (shadow, caller) = (identity(), identity());
        let listener = listener(&shadow, Peers::only(caller.fingerprint()));
        Self {
            listener,
            shadow,
            caller,
            endpoint: Endpoint::client(localhost()).unwrap(),
        }
    }

    fn addr(&self) -> SocketAddr {
        self.listener.addrs()[0]
    }

    /// A connection that has proven who it is and said nothing yet.
    async fn connection(&self) -> Connection {
        self.connection_as(&self.caller).await
    }

    async fn connection_as(&self, caller: &Identity) -> Connection {
        let pin = Pin::new(Peers::only(self.shadow.fingerprint()));
        let mut config = ClientConfig::new(tls::client(caller, pin));
        config.transport_config(tuning().transport(self.addr()));
        let connecting = self
            .endpoint
            .connect_with(config, self.addr(), tls::SERVER_NAME)
            .unwrap();
        soon("a connection", connecting).await.unwrap()
    }

    async fn turned_away(&mut self) -> PathError {
        match soon("somebody turned away", self.listener.knock()).await {
            Knock::TurnedAway { error, .. } => error,
            Knock::Link(_) => panic!("it was taken for a link"),
        }
    }

    /// A connection that has joined a link, the link's correct end, and what it takes to join again.
    async fn joined(&mut self) -> (Connection, LinkHandle, Join) {
        let connection = self.connection().await;
        let question = question();
        let accepted = async { self.listener.accept().await.accept(LinkConfig::default()) };
        let (answer, link) = soon("a link", async {
            tokio::join!(join::ask(&connection, &question), accepted)
        })
        .await;
        let token = token(answer);
        let again = Join {
            token: Some(token),
            ..question
        };
        (connection, link, again)
    }
}

fn identity() -> Arc<Identity> {
    Arc::new(Identity::generate("test").unwrap())
}

fn listener(identity: &Arc<Identity>, peers: Peers) -> Listener {
    let addrs = vec!["quic:127.0.0.1:0".parse().unwrap()];
    let identity = Arc::clone(identity);
    Listener::bind(ListenConfig {
        addrs,
        identity,
        peers,
        tuning: tuning(),
    })
    .unwrap()
}

fn question() -> Join {
    Join {
        versions: vec![1],
        link: LinkId::draw(),
        token: None,
        path: PathId(0),
    }
}

fn token(answer: Result<Answer, Broken>) -> Token {
    match answer {
        Ok(Answer::Joined { token, .. }) => token,
        Ok(Answer::Refused(refused)) => panic!("refused: {refused}"),
        Err(_) => panic!("no answer"),
    }
}

fn refusal(answer: Result<Answer, Broken>) -> Refused {
    match answer {
        Ok(Answer::Refused(refused)) => refused,
        Ok(Answer::Joined { .. }) => panic!("it was let in"),
        Err(Broken::Connection(error)) => panic!("no answer: {error}"),
        Err(Broken::Message(text)) => panic!("no answer: {text}"),
    }
}

/// Say `bytes` where a join is expected; what comes back.
async fn say(connection: &Connection, bytes: &[u8], finish: bool) -> Result<Vec<u8>, quinn::ReadToEndError> {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    if finish {
        send.finish().unwrap();
    }
    let answer = soon("an answer", recv.read_to_end(limits::JOIN_BYTES)).await;
    drop(send);
    answer
}

async fn end_of(link: &mut LinkHandle) -> Ended {
    let end = async {
        loop {
            if let Event::Ended(why) = link.recv().await.expect("an end is announced") {
                return why;
            }
        }
    };
    soon("the end", end).await
}

fn code_of(error: &ConnectionError) -> (VarInt, String) {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            (close.error_code, String::from_utf8_lossy(&close.reason).into_owned())
        }
        other => panic!("not closed by the peer: {other}"),
    }
}

#[tokio::test]
async fn a_join_that_is_none_is_refused_in_words() {
    let mut scene = Scene::new();
    let connection = scene.connection().await;
    let answer = say(&connection, b"GET / HTTP/1.1\r\n\r\n", true).await.unwrap();
    let refused = refusal(Ok(Answer::decode(&answer).unwrap()));
    assert_eq!(
        (refused.code, &refused.text[..]),
        (Refusal::Malformed, "malformed join magic at byte 0")
    );
    let error = scene.turned_away().await;
    assert!(matches!(error, PathError::PeerMisbehaved { .. }), "{error}");
}

#[tokio::test]
async fn a_join_without_end_is_cut_off() {
    let mut scene = Scene::new();
    let connection = scene.connection().await;
    say(&connection, &vec![b'u'; limits::JOIN_BYTES * 4], true)
        .await
        .unwrap_err();
    let error = scene.turned_away().await;
    assert!(matches!(error, PathError::PeerMisbehaved { .. }), "{error}");
    soon("the connection is closed", connection.closed()).await;
}

#[tokio::test]
async fn whoever_says_nothing_or_stops_half_way_loses_its_place() {
    let mut scene = Scene::new();
    let silent = scene.connection().await;
    let error = scene.turned_away().await;
    assert!(error.to_string().contains("no join in time"), "{error}");
    soon("the silent one is closed", silent.closed()).await;
    let slow = scene.connection().await;
    let half = question().encode();
    say(&slow, &half[..half.len() / 2], false).await.unwrap_err();
    let error = scene.turned_away().await;
    assert!(error.to_string().contains("no join in time"), "{error}");
}

#[tokio::test]
async fn a_full_house_turns_away_and_has_room_again_later() {
    let mut scene = Scene::new();
    let mut silent = Vec::new();
    let mut refused = false;
    for _ in 0..limits::JOINING * 2 {
        let pin = Pin::new(Peers::only(scene.shadow.fingerprint()));
        let config = ClientConfig::new(tls::client(&scene.caller, pin));
        let connecting = scene
            .endpoint
            .connect_with(config, scene.addr(), tls::SERVER_NAME)
            .unwrap();
        match soon("an answer", connecting).await {
            Ok(connection) => silent.push(connection),
            Err(_) => {
                refused = true;
                break;
            }
        }
    }
    // On a slow machine the first lose their places before the last have come; then nobody need be refused.
    assert!(refused || silent.len() == limits::JOINING * 2);
    for connection in &silent {
        soon("each loses its place", connection.closed()).await;
    }
    scene.joined().await;
}

#[tokio::test]
async fn a_link_belongs_to_the_certificate_that_began_it() {
    let (shadow, first, second) = (identity(), identity(), identity());
    let peers = Peers::only(first.fingerprint()).and(second.fingerprint());
    let listener = listener(&shadow, peers);
    let endpoint = Endpoint::client(localhost()).unwrap();
    let mut scene = Scene {
        listener,
        shadow,
        caller: first,
        endpoint,
    };
    let (_connection, _link, again) = scene.joined().await;
    let intruder = scene.connection_as(&second).await;
    let refused = refusal(soon("an answer", join::ask(&intruder, &again)).await);
    assert_eq!(refused.code, Refusal::Stranger);
}

#[tokio::test]
async fn a_wrong_token_is_a_link_begun_elsewhere() {
    let mut scene = Scene::new();
    let (_connection, _link, again) = scene.joined().await;
    let other = scene.connection().await;
    let wrong = Join {
        token: Some(Token::draw()),
        ..again
    };
    let refused = refusal(soon("an answer", join::ask(&other, &wrong)).await);
    assert_eq!(refused.code, Refusal::LinkUnknown);
}

#[tokio::test]
async fn a_path_that_comes_after_the_close_learns_the_reason() {
    let mut scene = Scene::new();
    let (connection, link, again) = scene.joined().await;
    connection.close(VarInt::from_u32(0), b"");
    link.close("moved away").await;
    // The listener learns of the end when the driver's own task has run; until then the link is there, and ending.
    while !scene.listener.links().is_empty() {
        tokio::task::yield_now().await;
    }
    let late = scene.connection().await;
    let refused = refusal(soon("an answer", join::ask(&late, &again)).await);
    assert_eq!(refused.code, Refusal::LinkClosed);
    assert!(refused.text.contains("moved away"), "{}", refused.text);
}

#[tokio::test]
async fn garbage_closes_its_path_and_repeated_garbage_ends_the_link() {
    let mut scene = Scene::new();
    let (mut connection, mut link, again) = scene.joined().await;
    let mut rng = Rng::new(5);
    for round in 1..=limits::MISBEHAVIOURS {
        let mut garbage = [0; 100];
        rng.fill(&mut garbage);
        if round % 2 == 0 {
            connection.send_datagram(garbage.to_vec().into()).unwrap();
        } else {
            let mut stream = connection.open_uni().await.unwrap();
            stream.write_all(&garbage).await.unwrap();
            stream.finish().unwrap();
        }
        let (code, text) = code_of(&soon("the path is closed", connection.closed()).await);
        assert_eq!(code, close_code::MISBEHAVED);
        assert!(!text.is_empty());
        if round < limits::MISBEHAVIOURS {
            connection = scene.connection().await;
            token(soon("an answer", join::ask(&connection, &again)).await);
        }
    }
    let why = end_of(&mut link).await;
    assert!(matches!(why, Ended::PeerMisbehaved(_)), "{why}");
}

#[tokio::test]
async fn a_path_joined_anew_replaces_its_older_self_and_outlives_it() {
    let mut scene = Scene::new();
    let (old, link, again) = scene.joined().await;
    let new = scene.connection().await;
    token(soon("an answer", join::ask(&new, &again)).await);
    let (code, _) = code_of(&soon("the old one is closed", old.closed()).await);
    assert_eq!(code, close_code::REPLACED);
    // The end of the old one must not take the new one for its own: the link's heartbeats go on there.
    for _ in 0..4 {
        soon("a heartbeat", new.read_datagram()).await.unwrap();
    }
    assert_eq!(link.stats().await.unwrap().connections.len(), 1);
}

#[tokio::test]
async fn a_stream_longer_than_any_block_is_cut_off() {
    let mut scene = Scene::new();
    let (connection, _link, _) = scene.joined().await;
    let mut stream = connection.open_uni().await.unwrap();
    let endless = vec![0; 1 << 20];
    while stream.write_all(&endless).await.is_ok() {}
    let (code, text) = code_of(&soon("the path is closed", connection.closed()).await);
    assert_eq!(code, close_code::MISBEHAVED);
    assert!(text.contains("stream longer than"), "{text}");
}

#[tokio::test]
async fn a_farewell_without_end_is_cut_off() {
    let mut scene = Scene::new();
    let (connection, _link, _) = scene.joined().await;
    let (mut send, _recv) = soon("a stream", connection.open_bi()).await.unwrap();
    while send.write_all(&[b'x'; 1 << 16]).await.is_ok() {}
    let (code, text) = code_of(&soon("the path is closed", connection.closed()).await);
    assert_eq!(code, close_code::MISBEHAVED);
    assert!(text.contains("farewell longer than"), "{text}");
}

#[tokio::test]
async fn a_close_is_heard_even_when_its_last_packet_is_not() {
    let mut scene = Scene::new();
    let (connection, mut link, _) = scene.joined().await;
    let (mut send, _recv) = soon("a stream", connection.open_bi()).await.unwrap();
    send.write_all(b"moved \x1b[2Jaway").await.unwrap();
    send.finish().unwrap();
    // The connection itself stays open: nobody says "closed" a second time.
    assert_eq!(
        end_of(&mut link).await,
        Ended::ClosedByPeer("moved  [2Jaway".to_owned())
    );
    drop(connection);
}

#[tokio::test]
async fn a_close_in_the_middle_of_a_transfer_is_heard() {
    let mut scene = Scene::new();
    let (connection, link, _) = scene.joined().await;
    // A peer that reads nothing: the link's windows fill, and the congestion window with them.
    let sender = link.sender().clone();
    let filling = tokio::spawn(async move {
        while sender
            .send_block(umbra_paths::Class::Bulk, vec![1; 1 << 20])
            .await
            .is_ok()
        {}
    });
    let both = async { tokio::join!(link.close("enough"), connection.accept_bi()).1 };
    let (_, mut farewell) = soon("a farewell", both).await.unwrap();
    assert_eq!(soon("the reason", farewell.read_to_end(512)).await.unwrap(), b"enough");
    filling.await.unwrap();
}

#[tokio::test]
async fn unfinished_streams_are_bounded_in_sum_and_a_cut_stream_is_never_whole() {
    let scene = Scene::new();
    let server = Endpoint::server(server_config(&scene.shadow, &scene.caller), localhost()).unwrap();
    let (ours, theirs) = pair(&scene, &server).await;
    // Room for 100 bytes in sum: the first stream takes 60 of them, the second cannot have as many.
    let room = Arc::new(Semaphore::new(100));
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = ours.open_uni().await.unwrap();
        stream.write_all(&[1; 60]).await.unwrap();
        streams.push(stream);
    }
    let first = soon("a stream", theirs.accept_uni()).await.unwrap();
    let mut first = Box::pin(read_stream(first, &room));
    assert!(
        timeout(Duration::from_millis(50), &mut first).await.is_err(),
        "it is not finished"
    );
    let second = soon("a stream", theirs.accept_uni()).await.unwrap();
    let Err(Unfit::Bad(text)) = soon("a verdict", read_stream(second, &room)).await else {
        panic!("more was taken than there is room for");
    };
    assert!(text.contains("unfinished streams"), "{text}");
    // Dropped half-way, as when its path is given up: the other end must not take it for a whole one.
    drop(HalfWritten(Some(streams.remove(0))));
    assert!(matches!(soon("a verdict", first).await, Err(Unfit::Gone)));
    assert_eq!(room.available_permits(), 100, "what was given up is given back");
}

#[tokio::test]
async fn what_the_link_is_told_of_a_connection_is_what_quinn_counts() {
    let scene = Scene::new();
    let server = Endpoint::server(server_config(&scene.shadow, &scene.caller), localhost()).unwrap();
    let (ours, theirs) = pair(&scene, &server).await;
    let before = sample_of(&ours);
    let mut stream = ours.open_uni().await.unwrap();
    stream.write_all(&[1; 200_000]).await.unwrap();
    stream.finish().unwrap();
    let mut reading = soon("a stream", theirs.accept_uni()).await.unwrap();
    soon("the bytes", reading.read_to_end(200_000)).await.unwrap();
    let after = sample_of(&ours);
    assert!(after.sent_bytes >= before.sent_bytes + 200_000, "{after:?}");
    assert!(
        after.sent_packets > before.sent_packets && after.lost_packets <= after.sent_packets,
        "{after:?}"
    );
    assert!(
        after.max_datagram > 1_000 && after.cwnd > 1_000 && !after.rtt.is_zero(),
        "{after:?}"
    );
}

/// A bare connection, both ends.
async fn pair(scene: &Scene, server: &Endpoint) -> (Connection, Connection) {
    let addr = server.local_addr().unwrap();
    let config = ClientConfig::new(tls::client(
        &scene.caller,
        Pin::new(Peers::only(scene.shadow.fingerprint())),
    ));
    let connecting = scene.endpoint.connect_with(config, addr, tls::SERVER_NAME).unwrap();
    let accepting = async { server.accept().await.unwrap().await.unwrap() };
    let (ours, theirs) = soon("a pair", async { tokio::join!(connecting, accepting) }).await;
    (ours.unwrap(), theirs)
}

fn server_config(identity: &Identity, peer: &Identity) -> ServerConfig {
    ServerConfig::with_crypto(tls::server(identity, Pin::new(Peers::only(peer.fingerprint()))))
}

#[tokio::test]
async fn a_client_of_another_protocol_is_turned_away() {
    let mut scene = Scene::new();
    let mut crypto = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Pin::new(Peers::only(scene.shadow.fingerprint())))
        .with_no_client_auth();
    crypto.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(crypto).unwrap();
    let config = ClientConfig::new(Arc::new(crypto));
    let connecting = scene
        .endpoint
        .connect_with(config, scene.addr(), tls::SERVER_NAME)
        .unwrap();
    soon("no connection", connecting).await.unwrap_err();
    let error = scene.turned_away().await;
    assert!(matches!(error, PathError::PeerMisbehaved { .. }), "{error}");
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_turned_away() {
    let mut scene = Scene::new();
    let mut crypto = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Pin::new(Peers::only(scene.shadow.fingerprint())))
        .with_no_client_auth();
    crypto.alpn_protocols = vec![b"umbra".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(crypto).unwrap();
    let config = ClientConfig::new(Arc::new(crypto));
    let connecting = scene
        .endpoint
        .connect_with(config, scene.addr(), tls::SERVER_NAME)
        .unwrap();
    if let Ok(connection) = soon("an answer", connecting).await {
        soon("the connection is closed", connection.closed()).await;
    }
    let error = scene.turned_away().await;
    assert!(error.to_string().to_lowercase().contains("certificate"), "{error}");
}

/// The certificate of one with the key of another: what somebody has who copied a certificate.
fn forged(certificate: &Identity, key: &Identity) -> Arc<SingleCertAndKey> {
    let signing = rustls::crypto::ring::sign::any_supported_type(&key.key()).unwrap();
    Arc::new(CertifiedKey::new(vec![certificate.certificate()], signing).into())
}

#[tokio::test]
async fn a_callers_copied_certificate_without_its_key_is_worth_nothing() {
    let mut scene = Scene::new();
    let mut crypto = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Pin::new(Peers::only(scene.shadow.fingerprint())))
        .with_client_cert_resolver(forged(&scene.caller, &identity()));
    crypto.alpn_protocols = vec![b"umbra".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(crypto).unwrap();
    let config = ClientConfig::new(Arc::new(crypto));
    let connecting = scene
        .endpoint
        .connect_with(config, scene.addr(), tls::SERVER_NAME)
        .unwrap();
    if let Ok(connection) = soon("an answer", connecting).await {
        soon("the connection is closed", connection.closed()).await;
    }
    let error = scene.turned_away().await;
    assert!(error.to_string().contains("BadSignature"), "{error}");
}

#[tokio::test]
async fn an_acceptors_copied_certificate_without_its_key_is_worth_nothing() {
    let (shadow, caller) = (identity(), identity());
    let mut crypto = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(forged(&shadow, &identity()));
    crypto.alpn_protocols = vec![b"umbra".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(crypto).unwrap();
    let server = Endpoint::server(ServerConfig::with_crypto(Arc::new(crypto)), localhost()).unwrap();
    let paths = vec![PathSpec::to(server.local_addr().unwrap())];
    let acting = tokio::spawn(async move {
        while let Some(incoming) = server.accept().await {
            assert!(incoming.await.is_err(), "it was believed");
        }
    });
    let config = ConnectConfig::new(paths, caller, Peers::only(shadow.fingerprint()));
    let error = soon("giving up", connect(config)).await.unwrap_err().to_string();
    assert!(error.contains("BadSignature"), "{error}");
    acting.abort();
}

#[tokio::test]
async fn noise_on_the_port_disturbs_nobody() {
    let mut scene = Scene::new();
    let (connection, mut link, _) = scene.joined().await;
    let noise = UdpSocket::bind(localhost()).unwrap();
    let mut rng = Rng::new(9);
    for _ in 0..500 {
        let mut bytes = vec![0; usize::try_from(rng.below(1_400)).unwrap()];
        rng.fill(&mut bytes);
        noise.send_to(&bytes, scene.addr()).unwrap();
        noise.send_to(&bytes, scene.endpoint.local_addr().unwrap()).unwrap();
    }
    connection.close(close_code::CLOSED, b"still here");
    assert_eq!(end_of(&mut link).await, Ended::ClosedByPeer("still here".to_owned()));
}

/// What `connect` makes of an acceptor that answers a join with `answer`, or not at all.
async fn acceptor_that_says(answer: Option<Vec<u8>>) -> ConnectError {
    let (shadow, caller) = (identity(), identity());
    let server = Endpoint::server(server_config(&shadow, &caller), localhost()).unwrap();
    let remote = server.local_addr().unwrap();
    let acting = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Some(incoming) = server.accept().await {
            let Ok(connection) = incoming.await else { continue };
            let Ok((mut send, recv)) = connection.accept_bi().await else {
                continue;
            };
            if let Some(bytes) = &answer {
                let _ = send.write_all(bytes).await;
                let _ = send.finish();
            }
            kept.push((connection, send, recv));
        }
    });
    let paths = vec![PathSpec::to(remote)];
    let config = ConnectConfig {
        tuning: tuning(),
        patience: Duration::from_secs(1),
        ..ConnectConfig::new(paths, caller, Peers::only(shadow.fingerprint()))
    };
    let error = soon("giving up", connect(config)).await.unwrap_err();
    acting.abort();
    error
}

#[tokio::test]
async fn an_acceptor_that_answers_nonsense_is_named_for_it() {
    for nonsense in [b"hello".to_vec(), vec![0; 4_096], Vec::new()] {
        let error = acceptor_that_says(Some(nonsense)).await.to_string();
        assert!(error.contains("misbehaves"), "{error}");
    }
    let wrong_version = Answer::Joined {
        version: 9,
        token: Token::draw(),
    };
    let error = acceptor_that_says(Some(wrong_version.encode())).await.to_string();
    assert!(error.contains("it chose version 9, which was not offered"), "{error}");
}

#[tokio::test]
async fn an_acceptor_that_never_answers_does_not_hang_the_caller() {
    let error = acceptor_that_says(None).await.to_string();
    assert!(error.contains("no answer to the join"), "{error}");
}
