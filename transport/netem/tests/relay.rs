//! The relay on real sockets: what passes, what does not, and that it goes away when dropped.
#![cfg(feature = "relay")]
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::unwrap_used,
    reason = "these tests are about real sockets and real time"
)]

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};
use umbra_netem::limits::CLIENTS_MAX;
use umbra_netem::{Cause, Counters, Loss, Relay, RelayConfig, Way, Weather};
use umbra_units::{Bandwidth, Bytes, Ratio};

const PATIENCE: Duration = Duration::from_secs(10);

struct World {
    relay: Relay,
    target: UdpSocket,
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn world(configure: impl FnOnce(&mut RelayConfig)) -> World {
    let target = socket();
    let mut config = RelayConfig::to(target.local_addr().unwrap(), Weather::clear());
    configure(&mut config);
    World {
        relay: Relay::start(config).unwrap(),
        target,
    }
}

impl World {
    fn client(&self) -> UdpSocket {
        let client = socket();
        client.connect(self.relay.addr()).unwrap();
        client
    }

    fn arrives(&self) -> (Vec<u8>, SocketAddr) {
        receive(&self.target)
    }

    fn nothing_arrives(&self) {
        self.target.set_nonblocking(true).unwrap();
        let got = self.target.recv(&mut [0; 2_000]).unwrap_err();
        assert_eq!(got.kind(), ErrorKind::WouldBlock);
        self.target.set_nonblocking(false).unwrap();
    }
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 65_535];
    let (len, from) = socket.recv_from(&mut buffer).expect("a datagram arrives");
    (buffer[..len].to_vec(), from)
}

#[test]
fn each_client_gets_its_own_answers() {
    let world = world(|_| ());
    let (a, b) = (world.client(), world.client());
    a.send(b"from a").unwrap();
    let (bytes, a_as_seen) = world.arrives();
    assert_eq!(bytes, b"from a");
    b.send(b"from b").unwrap();
    let (bytes, b_as_seen) = world.arrives();
    assert_eq!(bytes, b"from b");
    assert_ne!(a_as_seen, b_as_seen);
    world.target.send_to(b"to b", b_as_seen).unwrap();
    world.target.send_to(b"to a", a_as_seen).unwrap();
    assert_eq!(receive(&a).0, b"to a");
    assert_eq!(receive(&b).0, b"to b");
}

#[test]
fn datagrams_up_to_the_largest_pass_whole() {
    let world = world(|_| ());
    let client = world.client();
    for len in [0, 1, 1_452, 9_000, 65_507] {
        let sent: Vec<u8> = (0..len).map(|i: u32| u8::try_from(i % 251).unwrap()).collect();
        client.send(&sent).unwrap();
        assert_eq!(world.arrives().0, sent);
    }
}

#[test]
fn nothing_passes_a_blackout_and_everything_passes_after_it() {
    let world = world(|_| ());
    let client = world.client();
    world.relay.blackout(true);
    client.send(b"lost").unwrap();
    let dark = world.relay.wait_until(PATIENCE, |c| c.up.taken == 1).unwrap();
    assert_eq!(dark.up.dropped[&Cause::Blackout], 1);
    world.nothing_arrives();
    world.relay.blackout(false);
    client.send(b"found").unwrap();
    assert_eq!(world.arrives().0, b"found");
}

#[test]
fn a_blackout_loses_what_is_under_way_in_its_direction() {
    let hour = Weather {
        delay: Duration::from_secs(3_600),
        ..Weather::clear()
    };
    let world = world(|config| config.up = hour);
    world.client().send(b"under way").unwrap();
    world.relay.wait_until(PATIENCE, |c| c.up.held == 1).unwrap();
    world.relay.blackout_way(Way::Down, true);
    assert_eq!(world.relay.counters().up.held, 1);
    world.relay.blackout_way(Way::Up, true);
    let after = world.relay.counters();
    assert_eq!((after.up.held, after.up.dropped_total()), (0, 1));
}

#[test]
fn a_script_is_played_from_the_relays_start() {
    let world = world(|config| config.script = "at 20ms blackout; at 600ms return".parse().unwrap());
    let client = world.client();
    // Nothing but the script can bring either about; how soon is the machine's affair.
    let until = |reached: &dyn Fn(&Counters) -> bool| {
        (0..1_000)
            .find_map(|_| {
                client.send(b"?").unwrap();
                world.relay.wait_until(Duration::from_millis(10), reached).ok()
            })
            .expect("the script is played")
    };
    let dark = until(&|c| c.up.dropped.contains_key(&Cause::Blackout));
    until(&|c| c.up.delivered > dark.up.delivered);
    assert!(!world.relay.weather(Way::Up).blackout);
}

#[test]
fn a_delay_is_never_short() {
    let delay = Duration::from_millis(20);
    let world = world(|config| {
        config.up = Weather {
            delay,
            ..Weather::clear()
        }
    });
    let client = world.client();
    for _ in 0..5 {
        let sent = Instant::now();
        client.send(b"slow").unwrap();
        world.arrives();
        assert!(sent.elapsed() >= delay, "took {:?}", sent.elapsed());
    }
}

#[test]
fn a_rate_is_never_exceeded_and_order_is_kept() {
    let rate = Bandwidth::mbit(80);
    let world = world(|config| {
        config.up = Weather {
            rate: Some(rate),
            queue: Bytes::mib(4),
            ..Weather::clear()
        }
    });
    let client = world.client();
    let begin = Instant::now();
    for i in 0..200u8 {
        client.send(&[i; 1_000]).unwrap();
    }
    for i in 0..200u8 {
        assert_eq!(world.arrives().0, [i; 1_000]);
    }
    assert!(
        begin.elapsed() >= Duration::from_millis(20),
        "took {:?}",
        begin.elapsed()
    );
}

#[test]
fn losses_are_counted_by_cause() {
    let half = Loss::random(Ratio::new(0.5).unwrap());
    let world = world(|config| {
        config.up = Weather {
            mtu: Some(1_000),
            ..Weather::clear()
        }
        .losing(half)
    });
    let client = world.client();
    client.send(&[0; 1_001]).unwrap();
    for _ in 0..400 {
        client.send(&[0; 10]).unwrap();
    }
    let counters = world.relay.wait_until(PATIENCE, |c| c.up.taken == 401).unwrap().up;
    assert_eq!(counters.dropped[&Cause::TooBig], 1);
    assert!((120..280).contains(&counters.dropped[&Cause::Loss]), "{counters:?}");
    assert_eq!(
        counters.taken,
        counters.delivered + counters.dropped_total() + counters.host_dropped
    );
}

#[test]
fn duplicates_arrive_twice_and_damage_flips_a_bit() {
    for (duplicate, copies) in [(Ratio::NONE, 1), (Ratio::ALL, 2)] {
        let weather = Weather {
            duplicate,
            corrupt: Ratio::ALL,
            ..Weather::clear()
        };
        let world = world(|config| config.up = weather);
        world.client().send(&[0; 64]).unwrap();
        for _ in 0..copies {
            let flipped: u32 = world.arrives().0.iter().map(|byte| byte.count_ones()).sum();
            assert_eq!(flipped, 1);
        }
    }
}

#[test]
fn waiting_for_what_does_not_come_ends_with_how_far_it_came() {
    let world = world(|_| ());
    world.client().send(b"12345").unwrap();
    world.relay.wait_until_bytes(Way::Up, Bytes(5), PATIENCE).unwrap();
    let short = Duration::from_millis(20);
    let impatient = world.relay.wait_until_bytes(Way::Up, Bytes(6), short).unwrap_err();
    assert_eq!(impatient.counters.up.delivered_bytes, Bytes(5));
}

#[test]
fn more_clients_than_it_serves_push_out_the_idlest() {
    let world = world(|_| ());
    let clients: Vec<UdpSocket> = (0..=CLIENTS_MAX).map(|_| world.client()).collect();
    let mut seen = Vec::new();
    for client in &clients {
        client.send(b"hello").unwrap();
        seen.push(world.arrives().1);
    }
    world.target.send_to(b"newest", seen[CLIENTS_MAX]).unwrap();
    assert_eq!(receive(&clients[CLIENTS_MAX]).0, b"newest");
    clients[0].send(b"again").unwrap();
    assert_eq!(
        world.arrives().0,
        b"again",
        "the one pushed out is welcomed like a new one"
    );
}

#[test]
fn a_dropped_relay_gives_its_port_back_at_once() {
    let world = world(|_| ());
    let (addr, control) = (world.relay.addr(), world.relay.control());
    world.client().send(b"x").unwrap();
    world.arrives();
    drop(world.relay);
    drop(control);
    UdpSocket::bind(addr).expect("the port is free");
}

#[test]
fn a_relay_works_over_ipv6() {
    let Ok(target) = UdpSocket::bind("[::1]:0") else {
        eprintln!("SKIPPED: this host has no IPv6 loopback");
        return;
    };
    let relay = Relay::start(RelayConfig::to(target.local_addr().unwrap(), Weather::clear())).unwrap();
    let client = UdpSocket::bind("[::1]:0").unwrap();
    client.send_to(b"six", relay.addr()).unwrap();
    target.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(receive(&target).0, b"six");
}
