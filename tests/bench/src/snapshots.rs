//! Keeping a guest in a folder, and bringing it back.

use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use umbra_e2e::{Guest, Host, Vm, World};

use crate::figure::{Aim, Figure};

/// 256 MiB, most of it filled with what nothing can shrink.
fn guest(work: Guest) -> Guest {
    work.with_memory_mib(256).with("fill=192M scrub=off")
}

/// What one full snapshot looked like, in milliseconds.
struct Seen {
    /// The longest time between two beats while it was taken.
    pause: f64,
    /// From the request to its end.
    total: f64,
}

fn keep(vm: &mut Vm, to: &std::path::Path) -> Result<Seen> {
    vm.beats_on(300)?;
    let before = vm.console.beats();
    let report: Value = vm.keep(to, &json!({ "record": false }))?;
    vm.beats_on(100)?;
    Ok(Seen {
        pause: vm.console.longest_gap(before - 1).as_secs_f64() * 1e3,
        total: report["total_ms"].as_f64().context("a total")?,
    })
}

fn measure(world: &World, host: &Host, guest: &Guest, samples: usize) -> Result<(Vec<Seen>, std::path::PathBuf)> {
    let folder = world.fresh_path("snapshots");
    std::fs::create_dir(&folder)?;
    let to = folder.join("a");
    let mut vm = host.launch(guest)?;
    vm.is_ready()?;
    let seen = (0..samples).map(|_| keep(&mut vm, &to)).collect::<Result<_>>()?;
    vm.stop()?;
    Ok((seen, to))
}

/// `snapshot_pause`, `snapshot_total`: a full snapshot of an idle guest; `restore_total`: from the start of the process that
/// restores it to the guest's first byte there.
pub(crate) fn idle(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let host = world.host("here")?;
    let (seen, from) = measure(&world, &host, &guest(Guest::idle().with("content=random")), samples)?;
    let mut restores = Vec::new();
    for _ in 0..samples {
        let mut vm = host.restore(&from, &[])?;
        let began: Instant = vm.process.began();
        vm.beats_on(1)?;
        let first = vm.process.serial().first_at().context("a first byte")?;
        restores.push(first.duration_since(began).as_secs_f64() * 1e3);
        vm.stop()?;
    }
    Ok(vec![
        Figure::new(
            "snapshot_pause",
            "ms",
            Aim::AtMost(5.0),
            seen.iter().map(|seen| seen.pause).collect(),
        ),
        Figure::new(
            "snapshot_total",
            "ms",
            Aim::None,
            seen.iter().map(|seen| seen.total).collect(),
        ),
        Figure::new("restore_total", "ms", Aim::None, restores),
    ])
}

/// The same of a guest that dirties 100 MB/s in a working set of 32 MiB.
pub(crate) fn busy(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let host = world.host("here")?;
    let work = guest(Guest::dirty("100M", "mixed").with("wss=32M"));
    let (seen, _) = measure(&world, &host, &work, samples)?;
    Ok(vec![
        Figure::new(
            "snapshot_pause_busy",
            "ms",
            Aim::None,
            seen.iter().map(|seen| seen.pause).collect(),
        ),
        Figure::new(
            "snapshot_total_busy",
            "ms",
            Aim::None,
            seen.iter().map(|seen| seen.total).collect(),
        ),
    ])
}
