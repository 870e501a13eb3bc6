//! What the link itself costs: two of them in one thread, joined by nothing, bulk and urgent, in bytes per second.
//!
//! `cargo run --release -p umbra-paths --example throughput`

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use umbra_paths::{Class, Link, LinkConfig, LinkEvent, Output, PathFacts, PathSample};
use umbra_units::{Now, PathId};

const PATHS: u16 = 3;

fn main() {
    for (class, len, loss) in [
        (Class::Bulk, 64 << 10, 0),
        (Class::Bulk, 256 << 10, 0),
        (Class::Urgent, 1 << 20, 0),
        (Class::Urgent, 1 << 20, 30),
        (Class::Urgent, 8 << 20, 30),
    ] {
        let rate = measure(class, len, loss);
        println!(
            "{class:?} blocks of {:>4} KiB, loss {:>4.1} %: {rate:.2} GB/s",
            len >> 10,
            f64::from(loss) / 10.0
        );
    }
}

/// Both ends' work in one thread, copies into whole streams included, as a driver would make them.
#[expect(
    clippy::disallowed_methods,
    reason = "an example measures; the crate itself reads no clock"
)]
fn measure(class: Class, len: usize, loss_permille: u32) -> f64 {
    let (mut here, mut there) = (Link::new(LinkConfig::default()), Link::new(LinkConfig::default()));
    let facts = PathFacts {
        max_datagram: 1_200,
        rtt: Some(Duration::from_millis(20)),
    };
    let sample = PathSample {
        rtt: Duration::from_millis(20),
        cwnd: 4 << 20,
        sent_packets: 100_000,
        lost_packets: u64::from(loss_permille) * 100,
        sent_bytes: 0,
        lost_bytes: 0,
        max_datagram: 1_200,
    };
    for path in (0..PATHS).map(PathId) {
        here.path_up(Now::ZERO, path, facts);
        there.path_up(Now::ZERO, path, facts);
        here.handle_sample(Now::from_us(1), path, sample);
    }
    let block = Bytes::from(vec![7; len]);
    let total = 2usize << 30;
    let (mut sent, mut arrived) = (0, 0);
    let begun = Instant::now();
    while arrived < total {
        let now = Now::from_us(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX) + 2);
        while sent < total && sent - arrived < 32 << 20 {
            if here.send_block(now, class, block.clone()).is_err() {
                break;
            }
            sent += len;
        }
        carry(now, &mut here, &mut there);
        while let Some(event) = there.poll_event() {
            if let LinkEvent::Block { bytes, .. } = event {
                arrived += bytes.len();
            }
        }
        carry(now, &mut there, &mut here);
        while here.poll_event().is_some() {}
        here.handle_time(now);
        there.handle_time(now);
    }
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let rate = arrived as f64 / begun.elapsed().as_secs_f64() / 1e9;
    rate
}

fn carry(now: Now, from: &mut Link, to: &mut Link) {
    while let Some(output) = from.poll_output() {
        match output {
            Output::Datagram { path, bytes } => to.handle_datagram(now, path, bytes).expect("an honest peer"),
            Output::Stream {
                path,
                stream,
                head,
                body,
                ..
            } => {
                from.handle_sent(now, path, stream);
                let mut whole = BytesMut::with_capacity(head.len() + body.len());
                whole.extend_from_slice(&head);
                whole.extend_from_slice(&body);
                to.handle_stream(now, path, whole.freeze()).expect("an honest peer");
            }
            Output::ResetStream { .. } => {}
        }
    }
}
