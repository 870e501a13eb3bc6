//! Whole links over real sockets: what is promised when paths die, return, lie or never were.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test says what went wrong by panicking"
)]

use bytes::Bytes;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use umbra_netem::{Relay, RelayConfig, Way, Weather};
use umbra_paths::{Class, LinkConfig, LinkEvent};
use umbra_quic::{
    ConnectConfig, ConnectError, Ended, Event, Fingerprint, Identity, Knock, LinkHandle, ListenConfig, Listener,
    PathError, PathSpec, Peers, Refusal, SendError, Tuning, connect,
};
use umbra_units::{Bandwidth, PathId, Rng};

/// Nothing here takes this long; without it a broken promise would hang instead of fail.
const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

fn identity() -> Arc<Identity> {
    Arc::new(Identity::generate("test").unwrap())
}

/// Silence is noticed sooner than in the field, so that tests about it take less time.
fn tuning() -> Tuning {
    Tuning {
        idle: Duration::from_millis(600),
        keep_alive: Duration::from_millis(150),
        ..Tuning::default()
    }
}

struct World {
    source: Arc<Identity>,
    shadow: Arc<Identity>,
    listener: Listener,
}

impl World {
    /// A listener on as many loopback addresses.
    fn new(paths: usize) -> Self {
        let (source, shadow) = (identity(), identity());
        let listener = listen(
            &shadow,
            source.fingerprint(),
            &vec!["127.0.0.1:0".parse().unwrap(); paths],
        );
        Self {
            source,
            shadow,
            listener,
        }
    }

    fn to(&self, addrs: &[SocketAddr]) -> ConnectConfig {
        let paths = addrs.iter().copied().map(PathSpec::to).collect();
        let config = ConnectConfig::new(paths, Arc::clone(&self.source), Peers::only(self.shadow.fingerprint()));
        ConnectConfig {
            tuning: tuning(),
            ..config
        }
    }

    /// A relay in front of each address.
    fn relays(&self, weather: Weather) -> Vec<Relay> {
        let start = |addr: &SocketAddr| Relay::start(RelayConfig::to(*addr, weather)).unwrap();
        self.listener.addrs().iter().map(start).collect()
    }

    /// A link over these addresses: the connecting end, the accepting end.
    async fn link(&mut self, addrs: &[SocketAddr]) -> (LinkHandle, LinkHandle) {
        let config = self.to(addrs);
        let accepted = async { self.listener.accept().await.accept(LinkConfig::default()) };
        let (ours, theirs) = soon("a link", async { tokio::join!(connect(config), accepted) }).await;
        (ours.unwrap(), theirs)
    }
}

fn listen(identity: &Arc<Identity>, peer: Fingerprint, addrs: &[SocketAddr]) -> Listener {
    let addrs = addrs
        .iter()
        .map(|addr| format!("quic:{addr}").parse().unwrap())
        .collect();
    Listener::bind(ListenConfig {
        addrs,
        identity: Arc::clone(identity),
        peers: Peers::only(peer),
        tuning: tuning(),
    })
    .unwrap()
}

fn addrs(relays: &[Relay]) -> Vec<SocketAddr> {
    relays.iter().map(Relay::addr).collect()
}

/// Receive until `wanted` gives something.
async fn until<T>(what: &str, link: &mut LinkHandle, mut wanted: impl FnMut(Event) -> Option<T>) -> T {
    let search = async {
        loop {
            let event = link.recv().await.unwrap_or_else(|| panic!("{what}: the link ended"));
            if let Event::Ended(why) = &event {
                if let Some(found) = wanted(event.clone()) {
                    return found;
                }
                panic!("{what}: the link ended: {why}");
            }
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    };
    soon(what, search).await
}

async fn until_event(what: &str, link: &mut LinkHandle, event: LinkEvent) {
    until(what, link, |seen| (seen == Event::Link(event.clone())).then_some(())).await;
}

async fn until_up(link: &mut LinkHandle, paths: u16) {
    let mut missing: BTreeSet<PathId> = (0..paths).map(PathId).collect();
    until("every path up", link, |event| {
        if let Event::Link(LinkEvent::PathUp(path)) = event {
            missing.remove(&path);
        }
        missing.is_empty().then_some(())
    })
    .await;
}

async fn end_of(link: &mut LinkHandle) -> Ended {
    until("the end", link, |event| {
        if let Event::Ended(why) = event { Some(why) } else { None }
    })
    .await
}

/// A block that says which one it is, and is no other's beginning.
fn block(number: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    Rng::new(number).fill(&mut bytes);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes.into()
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

/// Everything that arrives until these many blocks and messages have: blocks once each and whole, messages in order.
async fn receive_all(link: &mut LinkHandle, blocks: u64, messages: u64, len: usize) {
    let mut seen = BTreeSet::new();
    let mut next_message = 0;
    until(&format!("{blocks} blocks and {messages} messages"), link, |event| {
        match event {
            Event::Link(LinkEvent::Block { bytes, .. }) => {
                assert!(seen.insert(number(&bytes)), "block {} came twice", number(&bytes));
                assert_eq!(bytes, block(number(&bytes), len), "block {} is damaged", number(&bytes));
            }
            Event::Link(LinkEvent::Message(bytes)) => {
                assert_eq!(number(&bytes), next_message, "messages out of order");
                next_message += 1;
            }
            _ => {}
        }
        (seen.len() as u64 == blocks && next_message == messages).then_some(())
    })
    .await;
}

/// Send this many blocks, every fourth urgent, and a message after each.
fn send_all(link: &LinkHandle, blocks: u64, len: usize) -> tokio::task::JoinHandle<Result<(), SendError>> {
    let sender = link.sender().clone();
    tokio::spawn(async move {
        for i in 0..blocks {
            let class = if i % 4 == 3 { Class::Urgent } else { Class::Bulk };
            sender.send_block(class, block(i, len)).await?;
            sender.send_message(i.to_le_bytes().to_vec()).await?;
        }
        Ok(())
    })
}

async fn crosses(paths: u16) {
    let mut world = World::new(usize::from(paths));
    let targets = world.listener.addrs().to_vec();
    let (mut source, mut shadow) = world.link(&targets).await;
    assert_eq!(source.link(), shadow.link());
    assert_eq!(
        (source.peer(), shadow.peer()),
        (world.shadow.fingerprint(), world.source.fingerprint())
    );
    until_up(&mut source, paths).await;
    for (from, to) in [(&source, &mut shadow)] {
        let sent = send_all(from, 100, 70_000);
        receive_all(to, 100, 100, 70_000).await;
        sent.await.unwrap().unwrap();
    }
    let back = send_all(&shadow, 20, 300);
    receive_all(&mut source, 20, 20, 300).await;
    back.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_and_messages_cross_over_one_path() {
    crosses(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_and_messages_cross_over_three_paths() {
    crosses(3).await;
}

#[tokio::test]
async fn a_link_works_in_a_runtime_of_one_thread() {
    crosses(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_a_path_goes_dark_under_a_transfer() {
    let mut world = World::new(3);
    let relays = world.relays(Weather::link(Bandwidth::mbit(200), Duration::from_millis(2)));
    let (mut source, mut shadow) = world.link(&addrs(&relays)).await;
    until_up(&mut source, 3).await;
    let sent = send_all(&source, 300, 65_536);
    let cut = relays[1].control();
    let dark = tokio::task::spawn_blocking(move || {
        let some = umbra_units::Bytes::kib(64);
        cut.wait_until_bytes(Way::Up, some, PATIENCE).unwrap();
        cut.blackout(true);
    });
    receive_all(&mut shadow, 300, 300, 65_536).await;
    dark.await.unwrap();
    sent.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_died_returns_to_the_same_link() {
    let mut world = World::new(2);
    let relays = world.relays(Weather::clear());
    let (mut source, mut shadow) = world.link(&addrs(&relays)).await;
    until_up(&mut source, 2).await;
    relays[1].blackout(true);
    until_event("the path is down", &mut source, LinkEvent::PathDown(PathId(1))).await;
    until_event("the path is down there", &mut shadow, LinkEvent::PathDown(PathId(1))).await;
    relays[1].blackout(false);
    until_event("the path is back", &mut source, LinkEvent::PathUp(PathId(1))).await;
    until_event("the path is back there", &mut shadow, LinkEvent::PathUp(PathId(1))).await;
    relays[0].blackout(true);
    // Only the returned path is left.
    let sent = send_all(&source, 20, 10_000);
    receive_all(&mut shadow, 20, 20, 10_000).await;
    sent.await.unwrap().unwrap();
    assert_eq!(world.listener.links().len(), 1, "it is still the same link");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_outlives_all_its_paths() {
    let mut world = World::new(2);
    let relays = world.relays(Weather::clear());
    let (mut source, mut shadow) = world.link(&addrs(&relays)).await;
    until_up(&mut source, 2).await;
    relays.iter().for_each(|relay| relay.blackout(true));
    let sent = send_all(&source, 40, 30_000);
    let (mut gone, mut dark) = (0, false);
    until("all paths down", &mut source, |event| {
        gone += usize::from(matches!(event, Event::Link(LinkEvent::PathDown(_))));
        dark |= event == Event::Link(LinkEvent::AllPathsDown);
        (gone == 2 && dark).then_some(())
    })
    .await;
    relays.iter().for_each(|relay| relay.blackout(false));
    until_event("restored", &mut source, LinkEvent::Restored).await;
    receive_all(&mut shadow, 40, 40, 30_000).await;
    sent.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_path_that_is_not_there_at_first_joins_when_it_is() {
    let mut world = World::new(2);
    let relays = world.relays(Weather::clear());
    relays[1].blackout(true);
    let (mut source, _shadow) = world.link(&addrs(&relays)).await;
    relays[1].blackout(false);
    until_event("the late path", &mut source, LinkEvent::PathUp(PathId(1))).await;
}

#[tokio::test]
async fn a_path_leaves_from_the_local_address_it_was_given() {
    let mut world = World::new(1);
    let mut config = world.to(world.listener.addrs());
    config.paths[0].local = Some("127.0.0.2:0".parse().unwrap());
    let accepted = async {
        let incoming = world.listener.accept().await;
        (incoming.remote(), incoming.accept(LinkConfig::default()))
    };
    let (source, (remote, _shadow)) = soon("a link", async { tokio::join!(connect(config), accepted) }).await;
    source.unwrap();
    assert_eq!(remote.ip().to_string(), "127.0.0.2");
}

#[tokio::test]
async fn a_peer_with_another_certificate_is_refused_and_both_ends_say_why() {
    let mut world = World::new(1);
    let stranger = identity().fingerprint();
    let config = ConnectConfig {
        peers: Peers::only(stranger),
        ..world.to(world.listener.addrs())
    };
    let (error, knock) = soon("refusal", async {
        tokio::join!(connect(config), world.listener.knock())
    })
    .await;
    let remote = world.listener.addrs()[0];
    let (got, expected) = (world.shadow.fingerprint(), stranger);
    let Err(ConnectError::NoPath(attempts)) = error else {
        panic!("it connected")
    };
    assert_eq!(
        attempts[0].1,
        PathError::WrongCertificate {
            remote,
            got,
            expected: vec![expected]
        }
    );
    let text = attempts[0].1.to_string();
    assert!(
        text.contains(&got.to_string()) && text.contains(&expected.to_string()),
        "{text}"
    );
    let Knock::TurnedAway { error, .. } = knock else {
        panic!("the listener took it for a link")
    };
    let text = error.to_string();
    assert!(matches!(error, PathError::NotWelcome { .. }), "{text}");
    assert!(
        text.contains(&format!("certificate {got} is not allowed here")),
        "{text}"
    );
}

#[tokio::test]
async fn a_certificate_that_is_not_on_the_list_is_refused_and_both_ends_say_why() {
    let mut world = World::new(1);
    let stranger = identity();
    let config = ConnectConfig {
        identity: Arc::clone(&stranger),
        ..world.to(world.listener.addrs())
    };
    let (error, knock) = soon("refusal", async {
        tokio::join!(connect(config), world.listener.knock())
    })
    .await;
    let Knock::TurnedAway { error: theirs, .. } = knock else {
        panic!("the listener took it for a link")
    };
    let PathError::WrongCertificate { got, expected, .. } = &theirs else {
        panic!("{theirs}")
    };
    assert_eq!(
        (*got, &expected[..]),
        (stranger.fingerprint(), &[world.source.fingerprint()][..])
    );
    let Err(ConnectError::NoPath(attempts)) = error else {
        panic!("it connected")
    };
    let text = attempts[0].1.to_string();
    assert!(matches!(attempts[0].1, PathError::NotWelcome { .. }), "{text}");
    assert!(
        text.contains(&format!("certificate {} is not allowed here", stranger.fingerprint())),
        "{text}"
    );
}

#[tokio::test]
async fn ends_without_a_common_version_refuse_and_both_say_why() {
    let mut world = World::new(1);
    let mut config = world.to(world.listener.addrs());
    config.tuning.versions = vec![7, 8];
    let (error, knock) = soon("refusal", async {
        tokio::join!(connect(config), world.listener.knock())
    })
    .await;
    let Err(ConnectError::Refused { error, .. }) = error else {
        panic!("it connected or was not refused")
    };
    assert!(matches!(error, PathError::VersionMismatch { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("this end speaks 7 or 8") && text.contains("it speaks [1], was offered [7, 8]"),
        "{text}"
    );
    let Knock::TurnedAway { error, .. } = knock else {
        panic!("the listener took it for a link")
    };
    assert!(
        error.to_string().contains("this end speaks 1") && error.to_string().contains("[7, 8]"),
        "{error}"
    );
}

#[tokio::test]
async fn a_second_link_is_refused_with_the_acceptors_words_while_the_first_may_return() {
    let mut world = World::new(1);
    let targets = world.listener.addrs().to_vec();
    let (first, mut first_there) = world.link(&targets).await;
    until_up(&mut first_there, 1).await;
    let config = world.to(&targets);
    let decide = async {
        let incoming = world.listener.accept().await;
        let rival = incoming.rival(Duration::from_secs(60)).expect("the first link lives");
        incoming.refuse(Refusal::Busy, rival.to_string());
        rival
    };
    let (error, rival) = soon("busy", async { tokio::join!(connect(config), decide) }).await;
    assert_eq!((rival.link, rival.connections, rival.dark_for), (first.link(), 1, None));
    let Err(ConnectError::Refused {
        error: PathError::Refused(refused),
        ..
    }) = error
    else {
        panic!("not refused")
    };
    assert_eq!(refused.code, Refusal::Busy);
    assert!(refused.text.contains("is live over 1 connections"), "{}", refused.text);
    first.close("making room").await;
    assert_eq!(
        end_of(&mut first_there).await,
        Ended::ClosedByPeer("making room".to_owned())
    );
    let (_second, _there) = world.link(&targets).await;
}

#[tokio::test]
async fn a_link_that_nobody_takes_is_refused() {
    let mut world = World::new(1);
    let config = world.to(world.listener.addrs());
    let decide = async { drop(world.listener.accept().await) };
    let (error, ()) = soon("refusal", async { tokio::join!(connect(config), decide) }).await;
    let Err(ConnectError::Refused {
        error: PathError::Refused(refused),
        ..
    }) = error
    else {
        panic!("not refused")
    };
    assert_eq!(
        (refused.code, &refused.text[..]),
        (Refusal::Unwanted, "nobody took the link")
    );
}

#[test]
fn a_restarted_listener_does_not_take_a_running_link_for_a_new_one() {
    let (source, shadow) = (identity(), identity());
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    // Two runtimes stand for two processes; dropping one is as abrupt as a kill.
    let (here, there) = (runtime(), runtime());
    let peer = source.fingerprint();
    let any = ["127.0.0.1:0".parse().unwrap()];
    let mut listener = {
        let _guard = there.enter();
        listen(&shadow, peer, &any)
    };
    let addr = listener.addrs()[0];
    let config = ConnectConfig::new(vec![PathSpec::to(addr)], source, Peers::only(shadow.fingerprint()));
    let config = ConnectConfig {
        tuning: tuning(),
        ..config
    };
    let accepted = there.spawn(async move {
        let link = listener.accept().await.accept(LinkConfig::default());
        (listener, link)
    });
    let mut link = here.block_on(async { soon("a link", connect(config)).await.unwrap() });
    let kept = here.block_on(async { soon("accepted", accepted).await.unwrap() });
    there.shutdown_timeout(PATIENCE);
    drop(kept);
    let _again = {
        let _guard = here.enter();
        listen(&shadow, peer, &[addr])
    };
    let why = here.block_on(end_of(&mut link));
    assert!(matches!(why, Ended::PeerForgot(_)), "{why}");
}

#[tokio::test]
async fn paths_that_lead_to_different_ends_make_no_link() {
    let mut world = World::new(1);
    let mut other = listen(
        &world.shadow,
        world.source.fingerprint(),
        &["127.0.0.1:0".parse().unwrap()],
    );
    let config = world.to(&[world.listener.addrs()[0], other.addrs()[0]]);
    let accepted = async {
        let here = world.listener.accept().await.accept(LinkConfig::default());
        (here, other.accept().await.accept(LinkConfig::default()))
    };
    let (source, _both) = soon("a link", async { tokio::join!(connect(config), accepted) }).await;
    let why = end_of(&mut source.unwrap()).await;
    assert!(
        matches!(why, Ended::PeerForgot(_)) && why.to_string().contains("different ends"),
        "{why}"
    );
}

#[tokio::test]
async fn what_was_sent_before_a_close_arrives_before_the_end() {
    let mut world = World::new(2);
    let targets = world.listener.addrs().to_vec();
    let (source, mut shadow) = world.link(&targets).await;
    send_all(&source, 30, 50_000).await.unwrap().unwrap();
    source.close("all \u{1b}[31msaid").await;
    receive_all(&mut shadow, 30, 30, 50_000).await;
    assert_eq!(
        end_of(&mut shadow).await,
        Ended::ClosedByPeer("all  [31msaid".to_owned())
    );
    assert!(soon("nothing follows", shadow.recv()).await.is_none());
    assert_eq!(shadow.send_message(vec![1]).await, Err(SendError::Ended));
    assert_eq!(source.send_block(Class::Bulk, vec![1]).await, Err(SendError::Ended));
    assert!(source.stats().await.is_err());
}

#[tokio::test]
async fn a_dropped_handle_ends_the_link_at_both_ends() {
    let mut world = World::new(1);
    let targets = world.listener.addrs().to_vec();
    let (source, mut shadow) = world.link(&targets).await;
    drop(source);
    assert!(matches!(end_of(&mut shadow).await, Ended::ClosedByPeer(_)));
    while !world.listener.links().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_receiver_slows_the_sender_and_loses_nothing() {
    const LEN: usize = 1 << 20;
    let mut world = World::new(1);
    let mut config = world.to(world.listener.addrs());
    config.link = config.link.with_held_bytes(8 << 20).unwrap();
    let accepted = async { world.listener.accept().await.accept(LinkConfig::default()) };
    let (source, mut shadow) = soon("a link", async { tokio::join!(connect(config), accepted) }).await;
    let source = source.unwrap();
    let mut sent = 0;
    // The receiver takes nothing: what the two ends hold is bounded, and then the sender waits.
    while timeout(
        Duration::from_millis(300),
        source.send_block(Class::Bulk, block(sent, LEN)),
    )
    .await
    .is_ok()
    {
        sent += 1;
        assert!(sent < 200, "nothing ever waits");
    }
    // The one that was given up is on its way as well: giving up waiting is not taking back.
    receive_all(&mut shadow, sent + 1, 0, LEN).await;
}

#[tokio::test]
async fn nobody_there_is_an_error_that_names_each_path() {
    let world = World::new(1);
    let nowhere = Relay::start(RelayConfig::to(
        world.listener.addrs()[0],
        Weather {
            blackout: true,
            ..Weather::clear()
        },
    ));
    let mut config = world.to(&[nowhere.as_ref().unwrap().addr(), "127.0.0.1:9".parse().unwrap()]);
    config.paths[1].local = Some("192.0.2.77:0".parse().unwrap());
    config.patience = Duration::from_millis(900);
    let error = soon("giving up", connect(config)).await.unwrap_err().to_string();
    assert!(
        error.contains("does not answer") && error.contains("cannot use local address 192.0.2.77:0"),
        "{error}"
    );
    let none = ConnectConfig {
        paths: Vec::new(),
        ..world.to(&[])
    };
    assert_eq!(
        connect(none).await.unwrap_err().to_string(),
        "paths: 1 to 64 expected, got 0"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_handle_says_how_its_connections_are() {
    let mut world = World::new(1);
    let targets = world.listener.addrs().to_vec();
    let (mut source, mut shadow) = world.link(&targets).await;
    until_up(&mut source, 1).await;
    let sent = send_all(&source, 50, 65_536);
    receive_all(&mut shadow, 50, 50, 65_536).await;
    sent.await.unwrap().unwrap();
    let stats = source.stats().await.unwrap();
    assert_eq!((stats.connections.len(), stats.connections[0].remote), (1, targets[0]));
    assert!(stats.connections[0].sent_bytes > 50 * 65_536, "{stats:?}");
    assert!(
        stats.connections[0].mtu > 9_000,
        "loopback carries more than a network: {stats:?}"
    );
    assert_eq!(stats.link.blocks_sent, 50);
    assert_eq!(
        stats.link.paths[0].queued_bytes, 0,
        "everything was handed to the connection: {stats:?}"
    );
    assert!(stats.samples > 0, "the link was told nothing: {stats:?}");
    let mut room = source.room();
    soon("room", room.wait_for(|room| *room > 0)).await.unwrap();
}

#[tokio::test]
async fn what_a_connection_has_taken_no_longer_waits_for_it() {
    let mut world = World::new(1);
    let relays = world.relays(Weather::clear());
    let (mut source, _shadow) = world.link(&addrs(&relays)).await;
    until_up(&mut source, 1).await;
    // Nothing arrives, so nothing is acknowledged: only the connection's word can move the block on.
    relays[0].blackout(true);
    source.send_block(Class::Bulk, block(0, 32_768)).await.unwrap();
    let path = source.stats().await.unwrap().link.paths.remove(0);
    assert_eq!((path.bulk_bytes > 0, path.queued_bytes), (true, 0), "{path:?}");
}
