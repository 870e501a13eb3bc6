//! What the relay carries on this machine, and how late the line delivers.
//!
//! `cargo run --release -p umbra-netem --example relay_throughput`
#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::cast_precision_loss,
    reason = "a measurement of real sockets and real time"
)]

use std::error::Error;
use std::fs;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use umbra_netem::{Relay, RelayConfig, Weather};
use umbra_units::Bandwidth;

const SPAN: Duration = Duration::from_secs(2);

fn main() -> Result<(), Box<dyn Error>> {
    println!(
        "{:>7} {:>22} {:>12} {:>10} {:>10} {:>14}",
        "bytes", "weather", "Mbit/s out", "offered", "lost %", "CPU s/GB (all)"
    );
    let delayed = Weather {
        delay: Duration::from_millis(10),
        ..Weather::clear()
    };
    let limited = Weather {
        mtu: None,
        ..Weather::link(Bandwidth::mbit(1_000), Duration::from_millis(1))
    };
    for (name, weather) in [
        ("clear", Weather::clear()),
        ("delay 10ms", delayed),
        ("1 Gbit/s, 1 ms", limited),
    ] {
        for len in [1_452, 8_900, 32_000] {
            throughput(name, weather, len)?;
        }
    }
    for delay in [Duration::from_micros(500), Duration::from_millis(10)] {
        lateness(delay)?;
    }
    Ok(())
}

/// Send as fast as sockets allow, in bursts that leave the receiver time, and count what comes out.
fn throughput(name: &str, weather: Weather, len: usize) -> Result<(), Box<dyn Error>> {
    let target = UdpSocket::bind("127.0.0.1:0")?;
    socket2::SockRef::from(&target).set_recv_buffer_size(4 << 20)?;
    target.set_read_timeout(Some(Duration::from_millis(200)))?;
    let relay = Relay::start(RelayConfig::to(target.local_addr()?, weather))?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.connect(relay.addr())?;
    let stop = AtomicBool::new(false);
    let cpu = cpu_seconds()?;
    let begin = Instant::now();
    let (offered, received) = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buffer = vec![0; 65_535];
            let mut bytes = 0u64;
            while !stop.load(Ordering::Relaxed) {
                bytes += target.recv(&mut buffer).unwrap_or(0) as u64;
            }
            bytes
        });
        let packet = vec![7; len];
        let mut offered = 0u64;
        while begin.elapsed() < SPAN {
            // At most a megabyte beyond what the relay has taken: what is measured is the relay, not a socket buffer.
            if offered.saturating_sub(relay.counters().up.taken_bytes.0) < 1 << 20 {
                offered += (0..16).map(|_| client.send(&packet).unwrap_or(0) as u64).sum::<u64>();
            } else {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        (offered, reader.join().expect("the reader does not panic"))
    });
    let seconds = begin.elapsed().as_secs_f64();
    let mbit = |bytes: u64| bytes as f64 * 8.0 / 1e6 / seconds;
    let lost = 100.0 * (1.0 - received as f64 / offered as f64);
    let cpu = (cpu_seconds()? - cpu) / (received as f64 / 1e9);
    println!(
        "{len:>7} {name:>22} {:>12.0} {:>10.0} {lost:>10.1} {cpu:>14.2}",
        mbit(received),
        mbit(offered)
    );
    Ok(())
}

/// One packet at a time: how much later than the delay it arrives.
fn lateness(delay: Duration) -> Result<(), Box<dyn Error>> {
    let target = UdpSocket::bind("127.0.0.1:0")?;
    let relay = Relay::start(RelayConfig::to(
        target.local_addr()?,
        Weather {
            delay,
            ..Weather::clear()
        },
    ))?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.connect(relay.addr())?;
    let mut late = Vec::new();
    let cpu = cpu_seconds()?;
    for _ in 0..300 {
        let sent = Instant::now();
        client.send(&[0; 100])?;
        target.recv(&mut [0; 200])?;
        late.push(sent.elapsed().saturating_sub(delay));
    }
    late.sort();
    let cpu = cpu_seconds()? - cpu;
    println!(
        "delay {delay:?}: late by p50 {:?}, p90 {:?}, worst {:?}; {cpu:.2} CPU s for 300",
        late[150], late[270], late[299]
    );
    Ok(())
}

/// Processor time of this process, from /proc: user + system.
fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit(')').next().ok_or("no name in /proc/self/stat")?;
    let ticks: Vec<f64> = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / 100.0)
}
