//! The figures of `docs/numbers.md`, one JSON line each: `cargo xtask bench [NAME…] [--short]`.
//!
//! Every figure is taken from whole processes as an operator would run them: real guests, real QUIC over loopback, an
//! observer outside who stamps each byte of the guest's console. Figures that are compared are measured in alternation,
//! because machines drift. Nothing here passes or fails: a figure says whether it met its aim, and that is all.
//!
//! | module | what |
//! |---|---|
//! | `traffic` | disks and networks, beside QEMU's |
//! | `peers` | QEMU, with the same guest |
//! | `codec` | what pages become on the wire, and how quickly |
//! | `devices` | exits to devices, and saving and restoring them |
//! | `figure` | a figure: samples, median, 99th percentile, aim |
//! | `harvest` | recording writes, harvesting them, capturing pages |
//! | `moves` | pauses and evacuation |
//! | `order`, `follow` | what the order of shipping is worth; what being followed costs the guest |
//! | `record` | not a figure: `umbra-bench record FILE …` writes down what a guest writes, for `umbra-sim replay` |
//! | `seeding` | the first full copy |
//! | `snapshots` | keeping a guest in a folder, and bringing it back |
//! | `start` | starting a guest, what it costs, and the demo |
//! | `usage` | what the kernel says of a process |
#![forbid(unsafe_code)]

mod codec;
mod devices;
mod figure;
mod follow;
mod harvest;
mod moves;
mod order;
mod peers;
mod record;
mod seeding;
mod snapshots;
mod start;
mod traffic;
mod usage;

use std::process::ExitCode;

use anyhow::{Result, bail};

use figure::Figure;

/// A family of figures that are measured together.
struct Family {
    names: &'static [&'static str],
    measure: fn(samples: usize) -> Result<Vec<Figure>>,
    /// Samples of the full form and of the short one.
    samples: (usize, usize),
}

const FAMILIES: &[Family] = &[
    Family {
        names: &["pause_idle_256m", "pause_idle_1g"],
        measure: moves::idle,
        samples: (20, 3),
    },
    Family {
        names: &["pause_busy_1g", "evacuate_1g"],
        measure: moves::busy,
        samples: (20, 2),
    },
    Family {
        names: &["seed_throughput", "seed_cpu_tx", "seed_cpu_rx"],
        measure: seeding::incompressible,
        samples: (20, 2),
    },
    Family {
        names: &[
            "bytes_per_dirty_counter",
            "bytes_per_dirty_keyvalue",
            "bytes_per_dirty_text",
            "bytes_per_dirty_mixed",
            "bytes_per_dirty_random",
        ],
        measure: codec::bytes,
        samples: (20, 2),
    },
    Family {
        names: &["encode_throughput", "zero_scan"],
        measure: codec::speed,
        samples: (20, 2),
    },
    Family {
        names: &["seed_bytes_linux"],
        measure: codec::linux,
        samples: (5, 1),
    },
    Family {
        names: &["stop_pages_ratio", "stop_pages_cold", "stop_pages_round"],
        measure: order::stop_pages,
        samples: (10, 1),
    },
    Family {
        names: &["resend_factor"],
        measure: order::resend,
        samples: (10, 1),
    },
    Family {
        names: &["guest_slowdown_follow"],
        measure: follow::slowdown,
        samples: (20, 2),
    },
    Family {
        names: &["snapshot_pause", "snapshot_total", "restore_total"],
        measure: snapshots::idle,
        samples: (20, 2),
    },
    Family {
        names: &["snapshot_pause_busy", "snapshot_total_busy"],
        measure: snapshots::busy,
        samples: (20, 2),
    },
    Family {
        names: &["first_byte", "vmm_overhead"],
        measure: start::launch,
        samples: (20, 5),
    },
    Family {
        names: &["blk_vs_qemu", "blk_latency", "blk_latency_qemu"],
        measure: traffic::disks,
        samples: (20, 1),
    },
    Family {
        names: &["exit_pio", "exit_mmio", "exit_ioeventfd"],
        measure: devices::exits,
        samples: (20, 2),
    },
    Family {
        names: &[
            "state_save_1",
            "state_restore_1",
            "state_save_2",
            "state_restore_2",
            "state_save_8",
            "state_restore_8",
        ],
        measure: devices::state,
        samples: (50, 3),
    },
    Family {
        names: &[
            "harvest_cost_gib",
            "harvest_cost_gib_ring",
            "harvest_ring_vs_bitmap",
            "first_write_bitmap",
            "first_write_ring",
        ],
        measure: harvest::logs,
        samples: (20, 2),
    },
    Family {
        names: &[
            "capture_1k_copy",
            "capture_1k_parallel",
            "capture_1k_protect",
            "capture_1k",
            "capture_20k_copy",
            "capture_20k_parallel",
            "capture_20k_protect",
            "capture_20k",
            "capture_20k_4g",
            "capture_20k_size_ratio",
        ],
        measure: harvest::captures,
        samples: (20, 2),
    },
    Family {
        names: &["net_vs_qemu", "net_latency", "net_latency_qemu"],
        measure: traffic::networks,
        samples: (20, 1),
    },
    Family {
        names: &["linux_boot"],
        measure: start::linux,
        samples: (10, 1),
    },
    Family {
        names: &["demo_wall"],
        measure: start::demo,
        samples: (5, 1),
    },
];

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Vec<String>) -> Result<()> {
    if args.first().is_some_and(|arg| arg == codec::STORE) {
        return codec::store();
    }
    if let Some((_, rest)) = args.split_first().filter(|(first, _)| *first == "record") {
        return record::record(rest);
    }
    let (options, wanted): (Vec<String>, Vec<String>) = args.into_iter().partition(|arg| arg.starts_with("--"));
    // The lines are JSON anyway; `--json` is there for whoever expects to have to ask for them.
    if let Some(unknown) = options
        .iter()
        .find(|option| !matches!(option.as_str(), "--json" | "--short"))
    {
        bail!("unknown option {unknown}: expected --json or --short");
    }
    let names: Vec<&str> = FAMILIES.iter().flat_map(|family| family.names).copied().collect();
    if let Some(unknown) = wanted.iter().find(|name| !names.contains(&name.as_str())) {
        bail!("no figure is called {unknown}: expected some of {}", names.join(", "));
    }
    let short = options.iter().any(|option| option == "--short");
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    for family in FAMILIES
        .iter()
        .filter(|family| family.names.iter().any(|name| is_wanted(name)))
    {
        let samples = if short { family.samples.1 } else { family.samples.0 };
        for figure in (family.measure)(samples)?
            .iter()
            .filter(|figure| is_wanted(figure.name))
        {
            println!("{}", figure.line());
        }
    }
    Ok(())
}
