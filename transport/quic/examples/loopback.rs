//! What one link carries over loopback on this machine, and how long a small urgent block takes.
//!
//! `cargo run --release -p umbra-quic --example loopback [-- MEGABYTES]`
//!
//! Both ends share this process: processor time is that of both together.
#![expect(clippy::cast_precision_loss, reason = "a measurement prints figures")]

use bytes::Bytes;
use std::error::Error;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Runtime};
use umbra_paths::{Class, LinkConfig, LinkEvent};
use umbra_quic::{
    ConnectConfig, Event, Identity, LinkHandle, LinkReceiver, ListenConfig, Listener, Mtu, PathSpec, Peers, Tuning,
    connect,
};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const BLOCK: usize = 256 << 10;

fn main() -> Fallible<()> {
    let megabytes: u64 = std::env::args().nth(1).map_or(Ok(400), |text| text.parse())?;
    println!(
        "{:>6} {:>6} {:>9} {:>8} {:>12} {:>22} {:>18}",
        "paths", "MTU", "runtime", "MB/s", "CPU s/GB", "4 KiB urgent p50/p99", "message p50/p99"
    );
    for (name, runtime) in [("1 thread", one as fn() -> _), ("2 threads", two)] {
        for mtu in [Mtu::UpTo(1_452), Mtu::UpTo(8_952), Mtu::UpTo(16_000), Mtu::Auto] {
            for paths in [1, 3] {
                runtime()?.block_on(measure(name, mtu, paths, megabytes << 20))?;
            }
        }
    }
    Ok(())
}

fn one() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn two() -> std::io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

async fn measure(name: &str, mtu: Mtu, paths: usize, bytes: u64) -> Fallible<()> {
    let (source, mut shadow) = link(
        Tuning {
            mtu,
            ..Tuning::default()
        },
        paths,
    )
    .await?;
    let (sender, _events) = source.split();
    let blocks = bytes / BLOCK as u64;
    bulk(&sender, &mut shadow, blocks / 8).await?;
    let (begin, cpu) = (Instant::now(), cpu_seconds()?);
    bulk(&sender, &mut shadow, blocks).await?;
    let (span, cpu) = (begin.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    let rate = bytes as f64 / 1e6 / span;
    let cost = cpu / (bytes as f64 / 1e9);
    let (shadow_sender, mut shadow_events) = shadow.split();
    let mut urgent = Vec::new();
    let mut message = Vec::new();
    for _ in 0..500 {
        let begin = Instant::now();
        sender.send_block(Class::Urgent, vec![7; 4_096]).await?;
        wait(&mut shadow_events, |event| matches!(event, LinkEvent::Block { .. })).await?;
        urgent.push(begin.elapsed());
        let begin = Instant::now();
        sender.send_message(vec![7; 100]).await?;
        wait(&mut shadow_events, |event| matches!(event, LinkEvent::Message(_))).await?;
        message.push(begin.elapsed());
    }
    let found = sender
        .stats()
        .await?
        .connections
        .iter()
        .map(|c| c.mtu)
        .max()
        .unwrap_or(0);
    println!(
        "{paths:>6} {found:>6} {name:>9} {rate:>8.0} {cost:>12.2} {:>22} {:>18}",
        show(&mut urgent),
        show(&mut message)
    );
    if std::env::var_os("VERBOSE").is_some() {
        println!("{:#?}", sender.stats().await?);
    }
    drop(shadow_sender);
    Ok(())
}

async fn link(tuning: Tuning, paths: usize) -> Fallible<(LinkHandle, LinkHandle)> {
    let (source, shadow) = (
        Arc::new(Identity::generate("source")?),
        Arc::new(Identity::generate("shadow")?),
    );
    let addrs = vec!["quic:127.0.0.1:0".parse()?; paths];
    let peers = Peers::only(source.fingerprint());
    let mut listener = Listener::bind(ListenConfig {
        addrs,
        identity: Arc::clone(&shadow),
        peers,
        tuning: tuning.clone(),
    })?;
    let paths = listener.addrs().iter().copied().map(PathSpec::to).collect();
    let config = ConnectConfig::new(paths, source, Peers::only(shadow.fingerprint()));
    let (ours, theirs) = tokio::join!(connect(ConnectConfig { tuning, ..config }), async {
        listener.accept().await.accept(LinkConfig::default())
    });
    // The listener is kept for the life of the process: its links' paths come back through it.
    std::mem::forget(listener);

    Ok((ours?, theirs))
}

async fn bulk(sender: &umbra_quic::LinkSender, shadow: &mut LinkHandle, blocks: u64) -> Fallible<()> {
    let bytes = Bytes::from(vec![7; BLOCK]);
    let sender = sender.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..blocks {
            sender.send_block(Class::Bulk, bytes.clone()).await?;
        }
        Ok::<_, umbra_quic::SendError>(())
    });
    for _ in 0..blocks {
        while !matches!(
            shadow.recv().await.ok_or("the link ended")?,
            Event::Link(LinkEvent::Block { .. })
        ) {}
    }
    sending.await??;
    Ok(())
}

async fn wait(events: &mut LinkReceiver, wanted: impl Fn(&LinkEvent) -> bool) -> Fallible<()> {
    loop {
        match events.recv().await.ok_or("the link ended")? {
            Event::Link(event) if wanted(&event) => return Ok(()),
            _ => {}
        }
    }
}

fn show(spans: &mut [Duration]) -> String {
    spans.sort();
    format!("{:.0?}/{:.0?}", spans[spans.len() / 2], spans[spans.len() * 99 / 100])
}

/// Processor time of this process, from /proc: user + system.
fn cpu_seconds() -> Fallible<f64> {
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
