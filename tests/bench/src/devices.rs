//! What an exit costs, and the state of a machine with devices: measured inside one process, without a move around it.
//!
//! A guest of a few instructions does one thing over and over and ends itself; the same guest without that one thing is
//! the zero that is subtracted, in alternation. On a software-virtualised host the guest's loop itself is emulated, which
//! the subtraction takes out again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use umbra_core::guest::Guest as _;
use umbra_e2e::{Guest, World};
use umbra_machine::config::devices::{Devices, DiskConfig, RngConfig};
use umbra_machine::{ExitReason, Machine, MachineConfig, Sinks};
use umbra_units::Bytes;

use crate::figure::{Aim, Figure};

/// How often a guest does its one thing.
const TIMES: u32 = 20_000;
/// A guest that takes longer has got lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// `exit_pio`, `exit_mmio`, `exit_ioeventfd`: µs per access that leaves the guest for a device and comes back.
pub(crate) fn exits(samples: usize) -> Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    // out dx, al, to a port that nobody answers at, as most accesses of a kernel that probes.
    let pio = kernel(folder.path(), "pio", &[0xee])?;
    // mov [0xd0fff000], eax: nobody either.
    let mmio = kernel(folder.path(), "mmio", &[0xa3, 0x00, 0xf0, 0xff, 0xd0])?;
    // mov [0xd0000050], eax: the notification of the first virtio device's first queue, which KVM turns into an event.
    let notify = kernel(folder.path(), "notify", &[0xa3, 0x50, 0x00, 0x00, 0xd0])?;
    // nop
    let nothing = kernel(folder.path(), "nothing", &[0x90])?;
    let mut costs = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..samples {
        let zero = time(&nothing)?;
        for (costs, kernel) in costs.iter_mut().zip([&pio, &mmio, &notify]) {
            costs.push(time(kernel)?.saturating_sub(zero).as_secs_f64() * 1e6 / f64::from(TIMES));
        }
    }
    let [pio, mmio, notify] = costs;
    Ok(vec![
        Figure::new("exit_pio", "us", Aim::None, pio),
        Figure::new("exit_mmio", "us", Aim::None, mmio),
        Figure::new("exit_ioeventfd", "us", Aim::None, notify),
    ])
}

/// `state_save_N`, `state_restore_N`: ms for all state beside memory of N vCPUs and the devices, of a guest that works.
pub(crate) fn state(samples: usize) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (cpus, save, restore) in [
        (1, "state_save_1", "state_restore_1"),
        (2, "state_save_2", "state_restore_2"),
        (8, "state_save_8", "state_restore_8"),
    ] {
        let (saves, restores) = save_and_restore(cpus, samples)?;
        let aim = Aim::AtMost(f64::from(cpus));
        figures.push(Figure::new(save, "ms", aim, saves));
        figures.push(Figure::new(restore, "ms", aim, restores));
    }
    Ok(figures)
}

fn save_and_restore(cpus: u8, samples: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(16 << 20)?;
    let config = MachineConfig::new(tiny_kernel()?, cpus, Bytes::mib(64))?
        .with_cmdline(format!("cpus={cpus} work=blkcheck rate=0 span=16M wait=irq"))?
        .with_devices(devices(disk.path()))?;
    let machine = Machine::launch(&config, Sinks::discard())?;
    let twin = Machine::builder(Sinks::discard)
        .with_devices(devices(disk.path()))?
        .build_machine(&machine.describe())?;
    let (mut saves, mut restores) = (Vec::new(), Vec::new());
    // Every sample meets the guest at work somewhere else; the first one, in which it boots, is not counted.
    for sample in 0..=samples {
        machine.resume()?;
        let ended = machine.wait_exit(Some(Duration::from_millis(20)));
        ensure!(ended.is_none(), "the guest ended: {ended:?}");
        machine.pause()?;
        let began = Instant::now();
        let records = machine.save()?;
        let saved = began.elapsed();
        let began = Instant::now();
        twin.restore(&records)?;
        let restored = began.elapsed();
        if sample > 0 {
            saves.push(saved.as_secs_f64() * 1e3);
            restores.push(restored.as_secs_f64() * 1e3);
        }
    }
    Ok((saves, restores))
}

fn devices(disk: &Path) -> Devices {
    Devices {
        disk: vec![DiskConfig {
            path: disk.to_owned(),
            ..DiskConfig::default()
        }],
        rng: Some(RngConfig::default()),
        ..Devices::default()
    }
}

/// Where the tests' kernel is.
pub(crate) fn tiny_kernel() -> Result<PathBuf> {
    let args = World::new()?.host("here")?.run_args(&Guest::idle());
    let mut args = args.into_iter().skip_while(|arg| arg != "--kernel");
    args.nth(1).map(PathBuf::from).context("umbra run takes a kernel")
}

/// How long a guest of `kernel` runs.
fn time(kernel: &Path) -> Result<Duration> {
    let devices = Devices {
        rng: Some(RngConfig::default()),
        ..Devices::default()
    };
    let config = MachineConfig::new(kernel, 1, Bytes::mib(8))?
        // It reads no command line: told of its devices, it is not told again.
        .with_cmdline("virtio_mmio.device=")?
        .with_devices(devices)?;
    let machine = Machine::launch(&config, Sinks::discard())?;
    let began = Instant::now();
    machine.resume()?;
    let ended = machine.wait_exit(Some(PATIENCE));
    let took = began.elapsed();
    ensure!(
        ended == Some(ExitReason::Code(0)),
        "the guest ended otherwise: {ended:?}"
    );
    Ok(took)
}

/// A kernel for the PVH contract that does `what` [`TIMES`] times, with `dx` at port 0x80 and `eax` 0, and ends with code 0.
fn kernel(folder: &Path, name: &str, what: &[u8]) -> Result<PathBuf> {
    // mov ecx, TIMES; mov dx, 0x80; xor eax, eax
    let mut code = vec![0xb9];
    code.extend(TIMES.to_le_bytes());
    code.extend([0x66, 0xba, 0x80, 0x00, 0x31, 0xc0]);
    // again: what; dec ecx; jnz again
    code.extend(what);
    code.extend([0x49, 0x75]);
    let back = i8::try_from(what.len() + 3).context("a short loop")?;
    code.extend((-back).to_le_bytes());
    // mov dx, 0xf4; out dx, eax; hlt
    code.extend([0x66, 0xba, 0xf4, 0x00, 0xef, 0xf4]);
    let path = folder.join(name);
    std::fs::write(&path, elf(&code))?;
    Ok(path)
}

/// An ELF file with one segment at 1 MiB, entered there by PVH.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<_>>();
    let longs = |longs: &[u64]| longs.iter().flat_map(|long| long.to_le_bytes()).collect::<Vec<_>>();
    // XEN_ELFNOTE_PHYS32_ENTRY
    let mut note = words(&[4, 4, 18]);
    note.extend(b"Xen\0");
    note.extend(words(&[0x10_0000]));
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(halves(&[2, 0x3e]));
    file.extend(words(&[1]));
    file.extend(longs(&[BASE, 64, 0]));
    file.extend(words(&[0]));
    file.extend(halves(&[64, 56, 2, 64, 0, 0]));
    let code_at = HEADERS + note.len() as u64;
    for (kind, at, bytes) in [(4, HEADERS, note.len() as u64), (1, code_at, code.len() as u64)] {
        let address = if kind == 1 { BASE } else { 0 };
        file.extend(words(&[kind, 7]));
        file.extend(longs(&[at, address, address, bytes, bytes, 4]));
    }
    file.extend(note);
    file.extend(code);
    file
}
