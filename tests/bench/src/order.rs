//! What the order of shipping is worth: coldest first against rounds, over a link that is nearly full.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use umbra_e2e::{Guest, Host, Move, Vm, Weather, World};
use umbra_units::{Bandwidth, Bytes};

use crate::figure::{Aim, Figure};

/// Pages of noise that the link carries in a second, as it is set up below.
const LINK_PAGES: u64 = 6_000;
/// Pages that a guest has to write in a second by Zipf's law with skew 1, of 16384 in its working set, for 4800 of them to be
/// different: `4800 = Σ 1 - exp(-λ / (i H))`. That is 0.8 of the link.
const NEARLY_FULL: &str = "75M";
/// The same for 1800: 0.3 of the link.
const WITH_ROOM: &str = "18763K";
/// For how long a shadow has followed before the guest is asked to move: in beats, a thousand a second.
const FOLLOWED: usize = 8_000;

/// A guest that goes back and forth over one road of a fixed rate.
struct Traveller {
    vm: Vm,
    hosts: [Host; 2],
    at: usize,
}

/// What one move was like.
struct Seen {
    /// Pages left to send when the guest was stopped.
    stop_pages: f64,
    /// Pages sent until the shadow had caught up, over pages that had to be sent at all.
    resent: f64,
}

impl Traveller {
    /// 128 MiB, half of it written once and the other half over and over.
    fn launch(world: &World, rate: &str) -> Result<Self> {
        let guest = Guest::dirty(rate, "random")
            .with_memory_mib(144)
            .with("wss=64M fill=64M pattern=zipf zipf=1.0 scrub=off");
        let hosts = [world.host("a")?, world.host("b")?];
        let mut vm = hosts[0].launch(&guest)?;
        vm.is_ready()?;
        Ok(Self { vm, hosts, at: 0 })
    }

    fn travel(self, world: &World, order: &str, settled: usize) -> Result<(Self, Seen)> {
        let Self { mut vm, hosts, at } = self;
        let shadow = hosts[1 - at].shadow_for(&hosts[at])?;
        // A page of noise and what carries it: headers of the batch, QUIC, UDP and IP are about a twentieth.
        let rate = Bandwidth(LINK_PAGES * 4_096 * 21 / 20);
        let weather = Weather {
            rate: Some(rate),
            delay: Duration::from_millis(1),
            queue: Bytes::kib(512),
            ..Weather::clear()
        };
        let roads = world.roads(&shadow, &[weather])?;
        let follow = json!({
            "to": roads.to(), "peers": [shadow.fingerprint()], "compression": "off", "order": order, "pause_promise_ms": 0,
        });
        vm.process.put("protect", &follow)?;
        vm.is_following()?;
        let sent = vm.process.status()?;
        let count = |name: &str| sent["counts"][name].as_f64().unwrap_or(0.0);
        let travelled = count("raw") + count("delta") + count("zero") + count("dup");
        let free = sent["outlook"]["classes"]["free"].as_f64().unwrap_or(0.0);
        let pages = sent["pages"].as_f64().context("a status with pages")?;
        vm.beats_on(settled)?;
        let patient = Move::usual()
            .with("downtime_limit_ms", json!(20_000))
            .with("pause_limit_ms", json!(60_000));
        let (vm, report) = vm.migrate_to(shadow, &patient)?;
        let seen = Seen {
            stop_pages: report.0["stop_pages"].as_f64().context("a report with stop_pages")?,
            resent: travelled / (pages - free).max(1.0),
        };
        Ok((Self { vm, hosts, at: 1 - at }, seen))
    }
}

/// `stop_pages_ratio`: pages left at the stop, the coldest first over rounds, in alternation.
pub(crate) fn stop_pages(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let mut traveller = Traveller::launch(&world, NEARLY_FULL)?;
    let (mut colds, mut rounds, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples {
        let (cold, round);
        (traveller, cold) = traveller.travel(&world, "cold-first", FOLLOWED)?;
        (traveller, round) = traveller.travel(&world, "round", FOLLOWED)?;
        colds.push(cold.stop_pages);
        rounds.push(round.stop_pages);
        ratios.push(cold.stop_pages / round.stop_pages.max(1.0));
    }
    Ok(vec![
        Figure::new("stop_pages_ratio", "", Aim::AtMost(0.33), ratios),
        Figure::new("stop_pages_cold", "pages", Aim::None, colds),
        Figure::new("stop_pages_round", "pages", Aim::None, rounds),
    ])
}

/// `resend_factor`: pages sent until the shadow holds all of a guest that writes 0.3 of what the link carries.
pub(crate) fn resend(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let mut traveller = Traveller::launch(&world, WITH_ROOM)?;
    let mut factors = Vec::new();
    for _ in 0..samples {
        let seen;
        (traveller, seen) = traveller.travel(&world, "cold-first", 500)?;
        factors.push(seen.resent);
    }
    Ok(vec![Figure::new("resend_factor", "", Aim::AtMost(1.15), factors)])
}
