//! What a link makes of bad weather: goodput and the time of one urgent block of 1 MB under a named profile, each path
//! behind a relay of its own.
//!
//! `cargo run --release -p umbra-quic --example weather -- [PROFILE] [MEGABYTES] [BLOCKS]`
#![expect(clippy::cast_precision_loss, reason = "a measurement prints figures")]

use bytes::Bytes;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};
use umbra_netem::{Profile, Relay, RelayConfig};
use umbra_paths::{Class, LinkConfig, LinkEvent};
use umbra_quic::{
    ConnectConfig, Event, Identity, LinkHandle, LinkSender, ListenConfig, Listener, PathSpec, Peers, Tuning, connect,
};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const BULK: usize = 128 << 10;
const URGENT: usize = 1_000_000;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Fallible<()> {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_else(|| "wan".to_owned());
    let megabytes: u64 = args.next().map_or(Ok(60), |text| text.parse())?;
    let blocks: usize = args.next().map_or(Ok(30), |text| text.parse())?;
    let profile =
        Profile::named(&name).ok_or_else(|| format!("profile {name}: one of {:?} expected", Profile::NAMES))?;
    let (source, shadow) = (
        Arc::new(Identity::generate("source")?),
        Arc::new(Identity::generate("shadow")?),
    );
    let mut listener = Listener::bind(ListenConfig {
        addrs: vec!["quic:127.0.0.1:0".parse()?; profile.paths.len()],
        identity: Arc::clone(&shadow),
        peers: Peers::only(source.fingerprint()),
        tuning: Tuning::default(),
    })?;
    let mut relays = Vec::new();
    for ((weather, script), addr) in profile.paths.iter().zip(&profile.scripts).zip(listener.addrs()) {
        relays.push(Relay::start(RelayConfig {
            script: script.clone(),
            ..RelayConfig::to(*addr, *weather)
        })?);
    }
    let paths = relays.iter().map(|relay| PathSpec::to(relay.addr())).collect();
    let config = ConnectConfig::new(paths, source, Peers::only(shadow.fingerprint()));
    let accepting = async { listener.accept().await.accept(LinkConfig::default()) };
    let (link, mut there) = tokio::join!(connect(config), accepting);
    let (sender, _events) = link?.split();
    let count = (megabytes << 20) / BULK as u64;
    transfer(&sender, &mut there, count / 4).await?;
    let begin = Instant::now();
    transfer(&sender, &mut there, count).await?;
    let mbit = count as f64 * BULK as f64 * 8e-6 / begin.elapsed().as_secs_f64();
    println!("{name}: {mbit:.1} Mbit/s of bulk");
    let mut spans: Vec<Duration> = Vec::new();
    for _ in 0..blocks {
        let begin = Instant::now();
        sender.send_block(Class::Urgent, vec![7; URGENT]).await?;
        blocks_arrive(&mut there, 1).await?;
        spans.push(begin.elapsed());
    }
    spans.sort();
    let (median, worst) = (spans[spans.len() / 2], spans[spans.len() - 1]);
    println!("{name}: urgent block of 1 MB in {median:.0?} at the median, {worst:.0?} at worst of {blocks}");
    println!("{:#?}", sender.stats().await?);
    Ok(())
}

async fn transfer(sender: &LinkSender, there: &mut LinkHandle, count: u64) -> Fallible<()> {
    let sender = sender.clone();
    let sending = tokio::spawn(async move {
        let bytes = Bytes::from(vec![7; BULK]);
        for _ in 0..count {
            sender.send_block(Class::Bulk, bytes.clone()).await?;
        }
        Ok::<_, umbra_quic::SendError>(())
    });
    blocks_arrive(there, count).await?;
    Ok(sending.await??)
}

async fn blocks_arrive(there: &mut LinkHandle, count: u64) -> Fallible<()> {
    for _ in 0..count {
        while !matches!(
            there.recv().await.ok_or("the link ended")?,
            Event::Link(LinkEvent::Block { .. })
        ) {}
    }
    Ok(())
}
