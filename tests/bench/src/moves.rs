//! Pauses, as an outside observer of the guest's console sees them, and how long an evacuation takes.

use std::time::Instant;

use anyhow::{Context, Result};
use umbra_e2e::{Guest, Host, Move, Vm, World};

use crate::figure::{Aim, Figure};

/// Beats, a thousand a second, for which a shadow has followed before it counts as standing: what a busy guest wrote
/// again during the first copy has been sent by then.
const FOLLOWED: usize = 1_000;

/// A guest that goes back and forth between two hosts.
struct Traveller {
    vm: Vm,
    hosts: [Host; 2],
    /// Which host it is on.
    at: usize,
}

/// What one move looked like from outside, in milliseconds.
struct Seen {
    /// The longest time between two beats around the move.
    pause: f64,
    /// From the request to the first beat heard at the shadow.
    evacuation: f64,
}

impl Traveller {
    fn launch(world: &World, name: &str, guest: &Guest) -> Result<Self> {
        let hosts = [world.host(&format!("{name}-a"))?, world.host(&format!("{name}-b"))?];
        let mut vm = hosts[0].launch(guest)?;
        vm.is_ready()?;
        Ok(Self { vm, hosts, at: 0 })
    }

    fn travel(self) -> Result<(Self, Seen)> {
        let Self { mut vm, hosts, at } = self;
        let shadow = hosts[1 - at].shadow_for(&hosts[at])?;
        let there = std::sync::Arc::clone(shadow.process.serial());
        vm.protect_directly(&shadow)?;
        vm.is_following()?;
        vm.beats_on(FOLLOWED)?;
        let before = vm.console.beats();
        let asked = Instant::now();
        let (vm, _) = vm.migrate_to(shadow, &Move::usual())?;
        let first = there.first_at().context("a beat at the shadow")?;
        let seen = Seen {
            pause: vm.console.longest_gap(before - 1).as_secs_f64() * 1e3,
            evacuation: first.duration_since(asked).as_secs_f64() * 1e3,
        };
        Ok((Self { vm, hosts, at: 1 - at }, seen))
    }
}

/// `pause_idle_256m` and `pause_idle_1g`, one after the other in turn: the second must not depend on the size.
pub(crate) fn idle(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let mut small = Traveller::launch(&world, "small", &Guest::idle().with_memory_mib(256))?;
    let mut large = Traveller::launch(&world, "large", &Guest::idle().with_memory_mib(1024))?;
    let (mut of_small, mut of_large) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let seen;
        (small, seen) = small.travel()?;
        of_small.push(seen.pause);
        let seen;
        (large, seen) = large.travel()?;
        of_large.push(seen.pause);
    }
    let small = Figure::new("pause_idle_256m", "ms", Aim::AtMost(3.0), of_small);
    let same = Aim::AtMost(small.median() * 1.2);
    Ok(vec![small, Figure::new("pause_idle_1g", "ms", same, of_large)])
}

/// `pause_busy_1g` and `evacuate_1g`: 100 MB/s in a working set of 64 MiB, all other memory filled once.
pub(crate) fn busy(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let guest = Guest::dirty("100M", "mixed")
        .with_cpus(2)
        .with_memory_mib(1024)
        .with("wss=64M fill=768M");
    let mut traveller = Traveller::launch(&world, "busy", &guest)?;
    let (mut pauses, mut evacuations) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let seen;
        (traveller, seen) = traveller.travel()?;
        pauses.push(seen.pause);
        evacuations.push(seen.evacuation);
    }
    Ok(vec![
        Figure::new("pause_busy_1g", "ms", Aim::AtMost(10.0), pauses),
        Figure::new("evacuate_1g", "ms", Aim::AtMost(50.0), evacuations),
    ])
}
