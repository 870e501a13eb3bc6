//! A peer that sends anything at all: never a panic, never more held than the limits say, never more answers than questions.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures for people"
)]

use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use umbra_paths::{Class, Link, LinkConfig, Output, PathFacts, PathSample, limits};
use umbra_units::{Now, PathId};

fn link(paths: u16) -> Link {
    let mut link = Link::new(LinkConfig::default());
    for path in 0..paths {
        let facts = PathFacts {
            max_datagram: 1_200,
            rtt: Some(Duration::from_millis(10)),
        };
        link.path_up(Now::ZERO, PathId(path), facts);
    }
    link
}

/// Take everything the link wants sent.
fn drain(link: &mut Link) -> Vec<Output> {
    std::iter::from_fn(|| link.poll_output()).collect()
}

fn within_limits(link: &Link) {
    let limit = limits::BLOCK_WINDOW_BYTES + limits::MESSAGE_WINDOW_BYTES;
    assert!(link.stats().receiving_bytes <= limit);
}

/// Something a busy, honest link sends: outputs of all kinds.
fn traffic() -> Vec<Bytes> {
    let mut here = link(2);
    let sample = PathSample {
        rtt: Duration::from_millis(10),
        cwnd: 100_000,
        sent_packets: 10_000,
        lost_packets: 300,
        sent_bytes: 12_000_000,
        lost_bytes: 360_000,
        max_datagram: 1_200,
    };
    (0..2).for_each(|path| here.handle_sample(Now::from_us(1), PathId(path), sample));
    here.send_message(Now::from_us(2), vec![1; 100]).unwrap();
    here.send_block(Now::from_us(3), Class::Bulk, vec![2; 3_000]).unwrap();
    here.send_block(Now::from_us(4), Class::Urgent, vec![3; 50_000])
        .unwrap();
    here.send_block(Now::from_us(5), Class::Urgent, vec![4; 500]).unwrap();
    let mut there = link(2);
    let mut wire = Vec::new();
    for output in drain(&mut here) {
        match output {
            Output::Datagram { path, bytes } => {
                // Lose some, so that the other end has gaps to report.
                if bytes.len() % 3 > 0 {
                    there
                        .handle_datagram(Now::from_us(10_000), path, bytes.clone())
                        .unwrap();
                }
                wire.push(bytes);
            }
            Output::Stream { path, head, body, .. } => {
                let bytes: Bytes = [head, body].concat().into();
                there.handle_stream(Now::from_us(10_000), path, bytes.clone()).unwrap();
                wire.push(bytes);
            }
            Output::ResetStream { .. } => {}
        }
    }
    there.handle_time(Now::from_us(20_000));
    wire.extend(drain(&mut there).into_iter().filter_map(|output| match output {
        Output::Datagram { bytes, .. } => Some(bytes),
        _ => None,
    }));
    wire
}

#[test]
fn the_specimens_of_traffic_hold_every_kind_of_frame() {
    let kinds: std::collections::BTreeSet<u8> = traffic().iter().map(|bytes| bytes[1]).collect();
    assert!([1, 2, 3, 4, 5].iter().all(|kind| kinds.contains(kind)), "{kinds:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_bytes_do_no_harm(frames in proptest::collection::vec((any::<bool>(), 0u8..8, proptest::collection::vec(any::<u8>(), 0..200)), 1..40)) {
        let mut link = link(2);
        link.send_block(Now::ZERO, Class::Urgent, vec![0; 40_000]).unwrap();
        link.send_message(Now::ZERO, vec![0; 40]).unwrap();
        drain(&mut link);
        for (i, (stream, kind, bytes)) in frames.into_iter().enumerate() {
            let now = Now::from_us(1_000 * (i as u64 + 1));
            let whole: Bytes = [&[1, kind][..], &bytes].concat().into();
            let _ = if stream { link.handle_stream(now, PathId(0), whole) } else { link.handle_datagram(now, PathId(1), whole) };
            within_limits(&link);
            drain(&mut link);
        }
    }

    #[test]
    fn damaged_traffic_does_no_harm(damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..60)) {
        let wire = traffic();
        let mut link = link(2);
        link.send_block(Now::ZERO, Class::Urgent, vec![0; 60_000]).unwrap();
        link.send_block(Now::ZERO, Class::Bulk, vec![0; 60_000]).unwrap();
        drain(&mut link);
        for (i, (which, place, with, cut)) in damage.into_iter().enumerate() {
            let mut bytes = which.get(&wire).to_vec();
            // The heads matter more than the contents.
            let at = place.index(bytes.len().min(48));
            bytes[at] ^= with;
            if cut {
                bytes.truncate(at);
            }
            let now = Now::from_us(500 * (i as u64 + 1));
            let _ = link.handle_datagram(now, PathId(0), bytes.clone().into());
            let _ = link.handle_stream(now, PathId(1), bytes.into());
            within_limits(&link);
            link.handle_time(now);
            while link.poll_event().is_some() {}
            drain(&mut link);
        }
    }
}

#[test]
fn a_flood_of_probes_is_answered_once_per_look() {
    let mut link = link(1);
    drain(&mut link);
    let probe = traffic().into_iter().find(|bytes| bytes[1] == 1).unwrap();
    for i in 0..10_000 {
        link.handle_datagram(Now::from_us(1_000 + i), PathId(0), probe.clone())
            .unwrap();
    }
    let answers = drain(&mut link).len();
    assert!(answers <= 4, "{answers} answers wait");
}

#[test]
fn a_peer_that_announces_many_blocks_and_finishes_none_is_cut_off() {
    let mut link = link(1);
    // One shard each of ever new blocks of 8 MiB: version, shard, path, number, id, layout, stripe, index.
    let mut refused = None;
    for id in 0..100u64 {
        let mut bytes = vec![1, 5, 0, 0];
        bytes.extend(id.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend((8u32 << 20).to_le_bytes());
        bytes.extend(1_024u16.to_le_bytes());
        bytes.extend([128, 10, 0, 0, 0]);
        bytes.extend([0; 1_024]);
        if let Err(error) = link.handle_datagram(Now::from_us(1_000 + id), PathId(0), bytes.into()) {
            refused = Some(error);
            break;
        }
        within_limits(&link);
    }
    assert!(
        matches!(refused, Some(umbra_paths::PeerMisbehaved::Flood { .. })),
        "{refused:?}"
    );
}

#[test]
fn acknowledging_what_was_never_sent_is_the_peers_fault() {
    let (mut ours, mut other) = (link(1), link(1));
    drain(&mut ours);
    // An honest acknowledgement, but of somebody else's messages.
    let mut third = link(1);
    third.send_message(Now::ZERO, vec![1; 10]).unwrap();
    for output in drain(&mut third) {
        if let Output::Stream { head, body, .. } = output {
            other
                .handle_stream(Now::from_us(100), PathId(0), [head, body].concat().into())
                .unwrap();
        }
    }
    let mut verdicts = drain(&mut other).into_iter().filter_map(|output| match output {
        Output::Datagram { bytes, .. } => Some(ours.handle_datagram(Now::from_us(200), PathId(0), bytes)),
        _ => None,
    });
    assert!(verdicts.any(|verdict| verdict.is_err()));
}
