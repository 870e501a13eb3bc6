//! Disks and networks beside QEMU's, and what an answer takes.
//!
//! The guest is the tiny kernel with its own drivers, the same image under both, and the two take turns. It polls for the
//! throughput figures, so that what is compared is the way through the device and not the cost of interrupts, and sleeps
//! until it is interrupted for the latency of a disk.
//!
//! Disk images lie in the story's folder, are written once before anything is measured, and both sides use the host's
//! page cache as they do by default. The network is a bridge with a TAP each in a namespace of the run, and a
//! program at the other end, here, that sends datagrams and counts those that come back.

use std::fs::File;
use std::io::Write as _;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_socket_recv_buffer_size;
use umbra_e2e::lan::Lan;
use umbra_e2e::{Guest, Host, World};

use crate::figure::{Aim, Figure};
use crate::peers;

const MEMORY_MIB: u32 = 64;
const DISK_MIB: usize = 64;

/// What disks are asked for.
const DISK_WORK: [&str; 3] = [
    "op=read bs=4K depth=32 pattern=uniform",
    "op=write bs=4K depth=32 pattern=uniform",
    "op=mixed bs=64K depth=16 pattern=seq",
];
const DISK_LATENCY: &str = "op=read bs=4K depth=1 pattern=uniform wait=irq";

fn guest(options: &str) -> Guest {
    Guest {
        cpus: 1,
        memory_mib: MEMORY_MIB,
        options: options.to_owned(),
    }
}

/// Where the image is that both run.
fn kernel(host: &Host) -> Result<PathBuf> {
    let args = host.run_args(&guest("work=idle"));
    let at = args.iter().position(|arg| arg == "--kernel").context("a kernel")?;
    Ok(PathBuf::from(&args[at + 1]))
}

/// Says that figures cannot be taken, and takes none.
fn skipped(names: &str, why: &str) -> Vec<Figure> {
    eprintln!("SKIPPED: {names}: {why}");
    Vec::new()
}

/// The number behind `key=` in the guest's summary.
fn number(said: &str, key: &str) -> Result<f64> {
    let line = said
        .lines()
        .find(|line| line.starts_with("umbra-guest: disk op="))
        .with_context(|| format!("no summary: {said}"))?;
    ensure!(line.ends_with(" errors=0"), "{line}");
    line.split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        .with_context(|| format!("no {key} in: {line}"))
}

/// The middle of several ratios by size: two that are inverse to each other make one.
fn geometric_mean(ratios: &[f64]) -> f64 {
    let logs: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    let count: f64 = ratios.iter().map(|_| 1.0).sum();
    (logs / count).exp()
}

/// A disk under both.
struct Disks {
    host: Host,
    kernel: PathBuf,
    image: PathBuf,
}

impl Disks {
    fn new(world: &World) -> Result<Self> {
        let host = world.host("here")?;
        let image = world.fresh_path("disk");
        let mut file = File::create(&image)?;
        // Not zeros, and no holes: what a guest reads has been written.
        let mib: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251).to_le_bytes()[0] | 1).collect();
        for _ in 0..DISK_MIB {
            file.write_all(&mib)?;
        }
        file.sync_all()?;
        let kernel = kernel(&host)?;
        Ok(Self { host, kernel, image })
    }

    fn ours(&self, options: &str) -> Result<String> {
        let disk = format!("id=disk,path={}", self.image.display());
        let mut args = self.host.run_args(&guest(options));
        args.extend(["--disk".to_owned(), disk]);
        let output = self
            .host
            .command(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "umbra ended with {}: {said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(said)
    }

    fn theirs(&self, options: &str) -> Result<String> {
        let drive = format!("if=none,id=disk,format=raw,file={}", self.image.display());
        let devices = ["-drive", &drive, "-device", "virtio-blk-device,drive=disk"].map(str::to_owned);
        peers::says(&self.kernel, MEMORY_MIB, options, &devices)
    }

    /// Ours and theirs, one after the other.
    fn both(&self, work: &str, key: &str) -> Result<(f64, f64)> {
        let options = format!("work=blk beat=0 seconds=500ms {work}");
        Ok((
            number(&self.ours(&options)?, key)?,
            number(&self.theirs(&options)?, key)?,
        ))
    }
}

/// `blk_vs_qemu`, the geometric mean of three kinds of work; `blk_latency` and `blk_latency_qemu`, a read of 4 KiB alone,
/// told of by an interrupt.
pub(crate) fn disks(samples: usize) -> Result<Vec<Figure>> {
    if let Some(why) = peers::missing() {
        return Ok(skipped("blk_vs_qemu, blk_latency", &why));
    }
    let world = World::new()?;
    let disks = Disks::new(&world)?;
    let (mut ratios, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples {
        let mut round = Vec::new();
        for work in DISK_WORK {
            let (mine, yours) = disks.both(work, "ops")?;
            eprintln!("  disk {work}: {mine} operations to {yours}");
            round.push(mine / yours);
        }
        ratios.push(geometric_mean(&round));
        let (mine, yours) = disks.both(DISK_LATENCY, "p50_ns")?;
        ours.push(mine / 1e3);
        theirs.push(yours / 1e3);
    }
    let theirs = Figure::new("blk_latency_qemu", "us", Aim::None, theirs);
    let aim = Aim::AtMost(theirs.median());
    Ok(vec![
        Figure::new("blk_vs_qemu", "x", Aim::AtLeast(1.0), ratios),
        Figure::new("blk_latency", "us", aim, ours),
        theirs,
    ])
}

/// One side of the comparison: its TAP, and the guest's address there.
#[derive(Clone, Copy)]
struct Side {
    tap: &'static str,
    guest: &'static str,
}

const OURS: Side = Side {
    tap: "tap-umbra",
    guest: "10.0.0.2",
};
const THEIRS: Side = Side {
    tap: "tap-qemu",
    guest: "10.0.0.3",
};

/// What a side's network did.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// MB/s of payload from the guest.
    stream: f64,
    /// MB/s of payload there and back, with [`WINDOW`] datagrams under way.
    echo: f64,
    /// us for one small datagram there and back, alone.
    round_trip: f64,
}

const ECHO: u16 = 7;
const STREAM: u16 = 19;
/// Payload of a datagram that fills a frame of the usual size.
const PAYLOAD: usize = 1472;
const WINDOW: u32 = 64;
const SPAN: Duration = Duration::from_millis(500);
const ROUND_TRIPS: usize = 1_000;
/// A datagram that is not back by then is lost.
const LOST: Duration = Duration::from_millis(300);
/// A guest that has not answered by then does not run.
const PATIENCE: Duration = Duration::from_secs(30);

/// The program at the other end.
struct Probe {
    socket: UdpSocket,
    guest: &'static str,
    buffer: Vec<u8>,
}

impl Probe {
    fn new(guest: &'static str) -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        set_socket_recv_buffer_size(&socket, 8 << 20)?;
        socket.set_read_timeout(Some(LOST))?;
        Ok(Self {
            socket,
            guest,
            buffer: vec![0; 2048],
        })
    }

    fn send(&self, port: u16, payload: &[u8]) {
        // A queue that is full is the network's way to lose something.
        let _ = self.socket.send_to(payload, (self.guest, port));
    }

    /// The number in the next datagram that comes, and its length; nothing if none comes.
    fn hear(&mut self) -> Option<(u64, usize)> {
        let length = self.socket.recv(&mut self.buffer).ok()?;
        let number = self.buffer.get(..8)?.try_into().ok()?;
        Some((u64::from_le_bytes(number), length))
    }

    fn until_it_answers(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            self.send(ECHO, &u64::MAX.to_le_bytes());
            if self.hear().is_some() {
                return Ok(());
            }
            ensure!(
                began.elapsed() < PATIENCE,
                "the guest at {} does not answer",
                self.guest
            );
        }
    }

    fn round_trip(&mut self) -> Result<f64> {
        let mut took = Vec::with_capacity(ROUND_TRIPS);
        for n in 0..ROUND_TRIPS {
            let sent = Instant::now();
            self.send(ECHO, &(n as u64).to_le_bytes());
            while let Some((number, _)) = self.hear() {
                if number == n as u64 {
                    took.push(sent.elapsed().as_secs_f64() * 1e6);
                    break;
                }
            }
        }
        ensure!(
            took.len() > ROUND_TRIPS / 2,
            "of {ROUND_TRIPS} pings {} came back",
            took.len()
        );
        took.sort_by(f64::total_cmp);
        Ok(took[took.len() / 2])
    }

    fn echo(&mut self) -> f64 {
        let mut payload = vec![0x5a; PAYLOAD];
        let (mut sent, mut under_way, mut bytes) = (0u64, 0u32, 0.0);
        let began = Instant::now();
        while began.elapsed() < SPAN {
            while under_way < WINDOW {
                payload[..8].copy_from_slice(&sent.to_le_bytes());
                self.send(ECHO, &payload);
                sent += 1;
                under_way += 1;
            }
            match self.hear() {
                Some((_, length)) => {
                    bytes += megabytes(length);
                    under_way = under_way.saturating_sub(1);
                }
                // Those under way are lost.
                None => under_way = 0,
            }
        }
        let rate = bytes / began.elapsed().as_secs_f64();
        while self.hear().is_some() {}
        rate
    }

    fn stream(&mut self) -> f64 {
        let mut order = [0; 16];
        let span = u64::try_from(SPAN.as_micros()).unwrap_or(u64::MAX);
        order[..8].copy_from_slice(&span.to_le_bytes());
        order[8..].copy_from_slice(&(PAYLOAD as u64).to_le_bytes());
        self.send(STREAM, &order);
        let (mut bytes, mut first, mut last) = (0.0, None, Instant::now());
        while let Some((_, length)) = self.hear() {
            last = Instant::now();
            first.get_or_insert(last);
            bytes += megabytes(length);
        }
        let took = first.map_or(0.0, |first| (last - first).as_secs_f64());
        bytes / took.max(SPAN.as_secs_f64() / 2.0)
    }

    fn measure(side: Side) -> Result<Seen> {
        let mut probe = Self::new(side.guest)?;
        probe.until_it_answers()?;
        Ok(Seen {
            stream: probe.stream(),
            echo: probe.echo(),
            round_trip: probe.round_trip()?,
        })
    }
}

fn megabytes(length: usize) -> f64 {
    f64::from(u32::try_from(length).unwrap_or(0)) / 1e6
}

fn network_options(side: Side) -> String {
    format!("work=net beat=0 ip={}", side.guest)
}

fn ours(host: &Host) -> Result<Seen> {
    let net = format!("id=net,tap={}", OURS.tap);
    let _vm = host.launch_with(&guest(&network_options(OURS)), &["--net", &net])?;
    Probe::measure(OURS)
}

fn theirs(kernel: &Path) -> Result<Seen> {
    let tap = format!("tap,id=net,ifname={},script=no,downscript=no", THEIRS.tap);
    let devices = ["-netdev", &tap, "-device", "virtio-net-device,netdev=net"].map(str::to_owned);
    let _qemu = peers::launch(kernel, MEMORY_MIB, &network_options(THEIRS), &devices)?;
    Probe::measure(THEIRS)
}

/// There is no network of our own to be had.
#[derive(Debug)]
struct NoLan(anyhow::Error);

impl std::fmt::Display for NoLan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "no network of our own (it takes an administrator's rights): {:#}",
            self.0
        )
    }
}

impl std::error::Error for NoLan {}

/// Ours and theirs, in turn.
fn rounds(samples: usize) -> Result<Vec<(Seen, Seen)>> {
    let lan = Lan::new().map_err(NoLan)?;
    for Side { tap, .. } in [OURS, THEIRS] {
        lan.tap(tap)?;
    }
    let world = World::new()?;
    let host = world.host("here")?;
    let kernel = kernel(&host)?;
    (0..samples).map(|_| Ok((ours(&host)?, theirs(&kernel)?))).collect()
}

/// `net_vs_qemu`, the geometric mean of a stream from the guest and of datagrams there and back; `net_latency` and
/// `net_latency_qemu`, one small datagram there and back.
pub(crate) fn networks(samples: usize) -> Result<Vec<Figure>> {
    const NAMES: &str = "net_vs_qemu, net_latency";
    if let Some(why) = peers::missing() {
        return Ok(skipped(NAMES, &why));
    }
    // A thread that enters a network stays there: one of its own.
    let rounds = std::thread::scope(|scope| scope.spawn(|| rounds(samples)).join());
    let rounds = match rounds {
        Ok(Ok(rounds)) => rounds,
        Ok(Err(why)) if why.is::<NoLan>() => return Ok(skipped(NAMES, &format!("{why:#}"))),
        Ok(Err(why)) => return Err(why),
        Err(_) => bail!("the network's thread panicked"),
    };
    for round in &rounds {
        eprintln!("  net {round:?}");
    }
    let ratio = |(mine, yours): &(Seen, Seen)| geometric_mean(&[mine.stream / yours.stream, mine.echo / yours.echo]);
    let yours = rounds.iter().map(|(_, yours)| yours.round_trip).collect();
    let yours = Figure::new("net_latency_qemu", "us", Aim::None, yours);
    let mine = rounds.iter().map(|(mine, _)| mine.round_trip).collect();
    Ok(vec![
        Figure::new(
            "net_vs_qemu",
            "x",
            Aim::AtLeast(1.0),
            rounds.iter().map(ratio).collect(),
        ),
        Figure::new("net_latency", "us", Aim::AtMost(yours.median()), mine),
        yours,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "umbra-guest 1 cpus=1 work=blk\numbra-guest: disk op=read bs=4096 depth=32 ops=37365 bytes=153047040 \
                        ns=1000229526 p50_ns=453710 p99_ns=5847831 max_ns=9205441 errors=0\numbra-guest: done\n";

    #[test]
    fn a_summary_is_read_by_name_and_one_with_errors_is_no_measurement() {
        assert_eq!(number(SAID, "ops").unwrap().to_bits(), 37_365f64.to_bits());
        assert_eq!(number(SAID, "p50_ns").unwrap().to_bits(), 453_710f64.to_bits());
        assert!(number(SAID, "p50").is_err());
        assert!(number(&SAID.replace("errors=0", "errors=1"), "ops").is_err());
        assert!(number("umbra-guest: done", "ops").is_err());
    }

    #[test]
    fn twice_as_much_and_half_as_much_make_no_difference() {
        assert!((geometric_mean(&[2.0, 0.5]) - 1.0).abs() < 1e-9);
    }
}
