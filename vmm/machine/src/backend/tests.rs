//! Devices and what is behind them, together: a driver that behaves, the real model, this host's kernel.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use umbra_devices::virtio::limiter::Limits;
use umbra_devices::virtio::testing::{Driver, Placed};
use umbra_devices::virtio::{net, vsock};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::streams::UnixStreams;
use super::tap::HostTap;
use super::tap::tests::{GUEST_IP, HOST_IP, datagram, host_mac, wired};

/// Waits as a worker does: edge-triggered, so that what is not announced anew is never heard of.
struct Worker(Epoll);

impl Worker {
    fn of(world: &impl std::os::fd::AsRawFd) -> Self {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, world.as_raw_fd(), event).unwrap();
        Self(epoll)
    }

    fn wait(&self) {
        let told = self.0.wait(10_000, &mut [EpollEvent::default()]).unwrap();
        assert_eq!(told, 1, "nobody said that there is something to do");
    }
}

struct Card {
    tap: Arc<HostTap>,
    driver: Driver<net::Net>,
    buffers: Vec<Placed>,
}

fn card() -> Option<Card> {
    let tap = Arc::new(wired()?);
    let mut driver = Driver::at_work(net::Wiring {
        id: "eth0".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        offload: true,
        guest_announce: true,
        receive_limits: Limits::default(),
        send_limits: Limits::default(),
        tap: tap.clone(),
    });
    driver.kick(net::RECEIVE);
    Some(Card {
        tap,
        driver,
        buffers: Vec::new(),
    })
}

impl Card {
    fn offer(&mut self) {
        let placed = self.driver.add(net::RECEIVE, &[], &[2000]);
        self.buffers.push(placed);
        self.driver.kick(net::RECEIVE);
    }

    /// The UDP payload of the next buffer that was filled, if it holds one.
    fn received(&mut self) -> Option<Vec<u8>> {
        while let Some((_, written)) = self.driver.used(net::RECEIVE) {
            let placed = self.buffers.remove(0);
            let frame = self.driver.get(placed.writable[0], written);
            let packet = &frame[net::HEADER_BYTES..];
            if packet[12..14] == [8, 0] && packet[23] == 17 {
                return Some(packet[42..].to_vec());
            }
        }
        None
    }

    fn expect(&mut self, worker: &Worker) -> Vec<u8> {
        loop {
            if let Some(payload) = self.received() {
                return payload;
            }
            worker.wait();
            self.driver.world();
        }
    }
}

#[test]
fn a_card_hears_of_each_frame_by_an_edge_also_after_it_had_no_buffers() {
    let Some(mut card) = card() else { return };
    let worker = Worker::of(&*card.tap);
    let socket = UdpSocket::bind((Ipv4Addr::from(HOST_IP), 7)).unwrap();
    let guest = (Ipv4Addr::from(GUEST_IP), 9);
    for n in 0..5 {
        socket.send_to(&[n], guest).unwrap();
    }
    worker.wait();
    card.driver.world();
    for n in 0..5 {
        // No edge for these: the card looks at the world by itself when buffers come.
        card.offer();
        let payload = std::iter::from_fn(|| {
            let payload = card.received();
            if payload.is_none() {
                card.offer();
            }
            Some(payload)
        })
        .take(20)
        .flatten()
        .next();
        assert_eq!(payload, Some(vec![n]));
    }
    card.offer();
    socket.send_to(b"edge", guest).unwrap();
    assert_eq!(card.expect(&worker), b"edge");
}

#[test]
fn held_frames_leave_when_they_are_released_though_the_card_had_to_wait() {
    let Some(mut card) = card() else { return };
    let worker = Worker::of(&*card.tap);
    let socket = UdpSocket::bind((Ipv4Addr::from(HOST_IP), 7)).unwrap();
    socket
        .set_read_timeout(Some(std::time::Duration::from_secs(10)))
        .unwrap();
    let mac = host_mac();
    card.tap.hold();
    // More than is kept: the last ones wait in the guest's queue.
    let large = crate::limits::HELD_FRAME_BYTES / 1400 + 50;
    let mut number = 0_u32;
    let mut waiting = 0;
    while (number as usize) < large {
        let mut payload = vec![0; 1350];
        payload[..4].copy_from_slice(&number.to_le_bytes());
        card.driver.add(net::TRANSMIT, &[&datagram(mac, &payload)], &[]);
        card.driver.kick(net::TRANSMIT);
        waiting = if card.driver.used(net::TRANSMIT).is_some() {
            0
        } else {
            waiting + 1
        };
        number += 1;
    }
    assert!(waiting > 0, "the guest's queue fills");
    let before = frames_from_guest();
    card.tap.release();
    while card.driver.used(net::TRANSMIT).is_none() {
        worker.wait();
        card.driver.world();
    }
    // UDP loses what the socket has no room for, so the interface counts; but nothing overtakes.
    assert_eq!((before, frames_from_guest()), (0, number));
    socket.set_nonblocking(true).unwrap();
    let (mut bytes, mut next) = ([0; 2000], 0);
    while socket.recv(&mut bytes).is_ok() {
        let this = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        assert!(this >= next);
        next = this + 1;
    }
    assert!(next > 0);
}

/// How many frames this thread's network had from the TAP.
fn frames_from_guest() -> u32 {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix("tap0:"))
        .unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn bytes_cross_a_socket_device_both_ways_and_its_worker_hears_of_them_by_an_edge() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let streams = Arc::new(UnixStreams::listen(&path).unwrap());
    let worker = Worker::of(&*streams);
    let mut driver: Driver<vsock::Vsock> = Driver::at_work(vsock::Wiring {
        cid: 3,
        streams: streams.clone(),
    });
    let mut buffers = std::collections::VecDeque::new();
    let listener = UnixListener::bind(folder.path().join("v_7")).unwrap();
    for _ in 0..60 {
        buffers.push_back(driver.add(vsock::RECEIVE, &[], &[4096]));
    }
    driver.kick(vsock::RECEIVE);
    let send = |driver: &mut Driver<vsock::Vsock>, op: u16, from: u32, to: u32, payload: &[u8]| {
        let mut w = umbra_units::Writer::new();
        w.u64(3).u64(2).u32(from).u32(to);
        w.u32(u32::try_from(payload.len()).unwrap())
            .u16(1)
            .u16(op)
            .u32(0)
            .u32(1 << 20)
            .u32(0);
        driver.add(vsock::TRANSMIT, &[w.as_slice(), payload], &[]);
        driver.kick(vsock::TRANSMIT);
        driver.used(vsock::TRANSMIT).expect("its buffer comes back");
    };
    let mut packet = |driver: &mut Driver<vsock::Vsock>| -> (u16, u32, Vec<u8>) {
        loop {
            if let Some((_, written)) = driver.used(vsock::RECEIVE) {
                let placed: Placed = buffers.pop_front().unwrap();
                let bytes = driver.get(placed.writable[0], written);
                let mut r = umbra_units::Reader::new(&bytes);
                r.take(16, "CIDs").unwrap();
                let from = r.u32("port").unwrap();
                r.take(10, "more").unwrap();
                return (r.u16("op").unwrap(), from, bytes[44..].to_vec());
            }
            worker.wait();
            driver.world();
        }
    };
    // The guest reaches a program.
    send(&mut driver, 1, 1000, 7, b"");
    assert_eq!(packet(&mut driver).0, 2);
    let (mut program, _) = listener.accept().unwrap();
    send(&mut driver, 5, 1000, 7, b"question");
    let mut question = [0; 8];
    program.read_exact(&mut question).unwrap();
    assert_eq!(&question, b"question");
    program.write_all(b"answer").unwrap();
    assert_eq!(packet(&mut driver), (5, 7, b"answer".to_vec()));
    // A program reaches the guest.
    let mut asking = UnixStream::connect(&path).unwrap();
    asking.write_all(b"CONNECT 80\n").unwrap();
    let (op, host_port, _) = packet(&mut driver);
    assert_eq!(op, 1);
    send(&mut driver, 2, 80, host_port, b"");
    let expected = format!("OK {host_port}\n");
    let mut answer = vec![0; expected.len()];
    asking.read_exact(&mut answer).unwrap();
    assert_eq!(answer, expected.as_bytes());
    // It ends: the guest is told.
    drop(program);
    assert_eq!(packet(&mut driver).0, 4);
}
