//! Starting a guest, what the VMM costs beside it, and the whole demo.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use umbra_e2e::linux::LinuxGuest;
use umbra_e2e::{Guest, World};

use crate::figure::{Aim, Figure};
use crate::usage::{overhead_mib, pid};

/// `first_byte`, from the process's start to the guest's first byte; `vmm_overhead`, resident memory beyond the guest's
/// after its first beats.
pub(crate) fn launch(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let host = world.host("here")?;
    let (mut first_bytes, mut overheads) = (Vec::new(), Vec::new());
    for _ in 0..samples {
        let mut vm = host.launch(&Guest::idle().with_memory_mib(128))?;
        vm.beats_on(100)?;
        let first = vm.process.serial().first_at().context("a first byte")?;
        first_bytes.push(first.duration_since(vm.process.began()).as_secs_f64() * 1e3);
        overheads.push(overhead_mib(pid(&vm.process)?)?);
        vm.stop()?;
    }
    Ok(vec![
        Figure::new("first_byte", "ms", Aim::AtMost(125.0), first_bytes),
        Figure::new("vmm_overhead", "MiB", Aim::AtMost(5.0), overheads),
    ])
}

/// `linux_boot`: from the process's start to the first line of a Linux's user space.
pub(crate) fn linux(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let host = world.host("here")?;
    let mut boots = Vec::new();
    for _ in 0..samples {
        let mut linux = host.launch_linux(&LinuxGuest::doing("idle"), &[])?;
        let init = linux.says("umbra-linux: init")?;
        ensure!(init.ends_with("init"), "{init}");
        boots.push(linux.vm.process.began().elapsed().as_secs_f64());
        linux.vm.stop()?;
    }
    Ok(vec![Figure::new("linux_boot", "s", Aim::None, boots)])
}

/// `demo_wall`: all of `umbra demo`, as a visitor waits for it.
pub(crate) fn demo(samples: usize) -> Result<Vec<Figure>> {
    let world = World::new()?;
    let host = world.host("visitor")?;
    let mut walls = Vec::new();
    for _ in 0..samples {
        let began = Instant::now();
        let demo = host.command(&["demo", "--json"])?;
        ensure!(
            demo.status.success(),
            "the demo failed: {}",
            String::from_utf8_lossy(&demo.stderr)
        );
        walls.push(began.elapsed().as_secs_f64());
    }
    Ok(vec![Figure::new("demo_wall", "s", Aim::AtMost(30.0), walls)])
}
