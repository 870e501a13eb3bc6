//! What following a guest costs it: recording its writes, harvesting them, and capturing the pages of a cut.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use umbra_core::guest::{CaptureBy, Guest, Harvest};
use umbra_machine::{DirtyLog, Machine, MachineConfig, RingEntries, Sharing, Sinks, dirty_log_costs};
use umbra_units::{Bytes, PAGE_SIZE, PageSet, Pfn, SpaceId};

use crate::devices::tiny_kernel;
use crate::figure::{Aim, Figure};

/// A guest that has come to its work.
fn busy(config: MachineConfig, work: &str) -> Result<Arc<Machine>> {
    let machine = Machine::launch(&config.with_cmdline(work)?, Sinks::discard())?;
    machine.resume()?;
    run(&machine, Duration::from_secs(2))?;
    Ok(machine)
}

fn run(machine: &Machine, time: Duration) -> Result<()> {
    let ended = machine.wait_exit(Some(time));
    ensure!(ended.is_none(), "the guest ended: {ended:?}");
    Ok(())
}

/// `harvest_cost_gib`, `harvest_cost_gib_ring`: a harvest of a paused guest of 1 GiB of which about one page in a hundred was
/// written, all over half of its memory; `harvest_ring_vs_bitmap`: the ratio of two that follow each other.
/// `first_write_bitmap`, `first_write_ring`: what a guest pays for its first write to a page after a harvest.
pub(crate) fn logs(samples: usize) -> Result<Vec<Figure>> {
    let mut guests = Vec::new();
    for log in [DirtyLog::Bitmap, DirtyLog::Ring(RingEntries::default())] {
        let config = MachineConfig::new(tiny_kernel()?, 1, Bytes::mib(1024))?.with_dirty_log(log);
        let machine = busy(config, "work=dirty wss=512M rate=100M beat=0 scrub=off")?;
        machine.track(true)?;
        machine.pause()?;
        machine.harvest()?;
        guests.push(machine);
    }
    let mut costs = [Vec::new(), Vec::new()];
    for _ in 0..samples {
        for (machine, costs) in guests.iter().zip(&mut costs) {
            machine.resume()?;
            run(machine, Duration::from_millis(107))?;
            machine.pause()?;
            let began = Instant::now();
            let written = machine.harvest()?;
            costs.push(began.elapsed().as_secs_f64() * 1e3);
            let share = written.count().0 * 1000 / (1 << 18);
            ensure!(
                (2..=30).contains(&share),
                "{share} pages in a thousand were written, not ten"
            );
        }
    }
    let [bitmap, ring] = costs;
    let ratios = ring.iter().zip(&bitmap).map(|(ring, bitmap)| ring / bitmap).collect();
    let (mut on_bitmap, mut on_ring) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let (bitmap, ring) = dirty_log_costs()?;
        on_bitmap.push(bitmap.write_ns / 1e3);
        on_ring.push(ring.write_ns / 1e3);
    }
    Ok(vec![
        Figure::new("harvest_cost_gib", "ms", Aim::AtMost(1.0), bitmap),
        Figure::new("harvest_cost_gib_ring", "ms", Aim::AtMost(1.0), ring),
        Figure::new("harvest_ring_vs_bitmap", "ratio", Aim::None, ratios),
        Figure::new("first_write_bitmap", "us", Aim::None, on_bitmap),
        Figure::new("first_write_ring", "us", Aim::None, on_ring),
    ])
}

/// How captures are compared: every way, and the one that is chosen when nobody asks.
const WAYS: [Option<CaptureBy>; 4] = [
    Some(CaptureBy::Copy),
    Some(CaptureBy::ParallelCopy),
    Some(CaptureBy::Protect),
    None,
];

/// `capture_1k_…`, `capture_20k_…`: how long the pause of a guest of 256 MiB and 2 vCPUs that dirties 20 MB/s is prolonged by
/// capturing so many pages, every second one of those it works with; `capture_20k_4g`: 20,000 by the way that is chosen,
/// of a guest with 4 GiB; `capture_20k_size_ratio`: that, over the same of 256 MiB, taken in turns with it.
pub(crate) fn captures(samples: usize) -> Result<Vec<Figure>> {
    let guest = |mib| -> Result<Arc<Machine>> {
        let config = MachineConfig::new(tiny_kernel()?, 2, Bytes::mib(mib))?.with_sharing(Sharing::Shared);
        let machine = busy(config, "cpus=2 work=dirty wss=200M rate=20M beat=0 scrub=off")?;
        machine.track(true)?;
        Ok(machine)
    };
    let (small, large) = (guest(256)?, guest(4096)?);
    let mut pauses: [[Vec<f64>; 4]; 2] = Default::default();
    let (mut of_large, mut ratios) = (Vec::new(), Vec::new());
    // The first of each finds no memory set aside for it, and is not counted.
    for sample in 0..=samples {
        for (pages, pauses) in [1_000, 20_000].into_iter().zip(&mut pauses) {
            for (by, pauses) in WAYS.into_iter().zip(pauses) {
                let pause = capture(&small, pages, by)?;
                if sample > 0 {
                    pauses.push(pause);
                }
            }
        }
    }
    for sample in 0..=samples {
        let of_small = capture(&small, 20_000, None)?;
        let pause = capture(&large, 20_000, None)?;
        if sample > 0 {
            of_large.push(pause);
            ratios.push(pause / of_small);
        }
    }
    let [few, many] = pauses;
    let names = [
        [
            "capture_1k_copy",
            "capture_1k_parallel",
            "capture_1k_protect",
            "capture_1k",
        ],
        [
            "capture_20k_copy",
            "capture_20k_parallel",
            "capture_20k_protect",
            "capture_20k",
        ],
    ];
    let mut figures = Vec::new();
    for (names, pauses) in names.into_iter().zip([few, many]) {
        let figure = |(name, pauses)| Figure::new(name, "ms", Aim::None, pauses);
        figures.extend(names.into_iter().zip(pauses).map(figure));
    }
    figures.push(Figure::new("capture_20k_4g", "ms", Aim::None, of_large));
    figures.push(Figure::new("capture_20k_size_ratio", "ratio", Aim::AtMost(1.2), ratios));
    Ok(figures)
}

/// Stop the guest, capture, let it run on for a while, and say how many milliseconds the capture took of the pause.
fn capture(machine: &Machine, pages: u64, by: Option<CaptureBy>) -> Result<f64> {
    machine.pause()?;
    machine.harvest()?;
    let mut set = PageSet::new(machine.spaces()[0].pages);
    // The tiny kernel works from its first few MiB on.
    let first = (4 << 20) / PAGE_SIZE as u64;
    (0..pages).map(|n| Pfn(first + 2 * n)).for_each(|page| {
        set.insert(page);
    });
    let cut = Harvest {
        dirty: vec![(SpaceId::RAM, set)],
    };
    let began = Instant::now();
    let captured = machine.capture(&cut, by)?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    machine.resume()?;
    run(machine, Duration::from_millis(50))?;
    drop(captured);
    Ok(took)
}
