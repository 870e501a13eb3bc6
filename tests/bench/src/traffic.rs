//! Disks beside QEMU's, and what an answer takes.
//!
//! The guest is the tiny kernel with its own drivers, the same image under both, and the two take turns. It polls for the
//! throughput figures, so that what is compared is the way through the device and not the cost of interrupts, and sleeps
//! until it is interrupted for the latency of a disk.
//!
//! Disk images lie in the story's folder, are written once before anything is measured, and both sides use the host's
//! page cache as they do by default.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use umbra_e2e::{Guest, Host, World};

use crate::figure::{Aim, Figure};
use crate::peers;

const MEMORY_MIB: u32 = 64;
const DISK_MIB: usize = 64;

/// What disks are asked for.
const DISK_WORK: [&str; 3] = [
    "op=read bs=4K depth=32 pattern=uniform",
    "op=write bs=4K depth=32 pattern=uniform",
    "op=mixed bs=64K depth=16 pattern=seq",
];
const DISK_LATENCY: &str = "op=read bs=4K depth=1 pattern=uniform wait=irq";

fn guest(options: &str) -> Guest {
    Guest {
        cpus: 1,
        memory_mib: MEMORY_MIB,
        options: options.to_owned(),
    }
}

/// Where the image is that both run.
fn kernel(host: &Host) -> Result<PathBuf> {
    let args = host.run_args(&guest("work=idle"));
    let at = args.iter().position(|arg| arg == "--kernel").context("a kernel")?;
    Ok(PathBuf::from(&args[at + 1]))
}

/// Says that figures cannot be taken, and takes none.
fn skipped(names: &str, why: &str) -> Vec<Figure> {
    eprintln!("SKIPPED: {names}: {why}");
    Vec::new()
}

/// The number behind `key=` in the guest's summary.
fn number(said: &str, key: &str) -> Result<f64> {
    let line = said
        .lines()
        .find(|line| line.starts_with("umbra-guest: disk op="))
        .with_context(|| format!("no summary: {said}"))?;
    ensure!(line.ends_with(" errors=0"), "{line}");
    line.split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
        .with_context(|| format!("no {key} in: {line}"))
}

/// The middle of several ratios by size: two that are inverse to each other make one.
fn geometric_mean(ratios: &[f64]) -> f64 {
    let logs: f64 = ratios.iter().map(|ratio| ratio.ln()).sum();
    let count: f64 = ratios.iter().map(|_| 1.0).sum();
    (logs / count).exp()
}

/// A disk under both.
struct Disks {
    host: Host,
    kernel: PathBuf,
    image: PathBuf,
}

impl Disks {
    fn new(world: &World) -> Result<Self> {
        let host = world.host("here")?;
        let image = world.fresh_path("disk");
        let mut file = File::create(&image)?;
        // Not zeros, and no holes: what a guest reads has been written.
        let mib: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251).to_le_bytes()[0] | 1).collect();
        for _ in 0..DISK_MIB {
            file.write_all(&mib)?;
        }
        file.sync_all()?;
        let kernel = kernel(&host)?;
        Ok(Self { host, kernel, image })
    }

    fn ours(&self, options: &str) -> Result<String> {
        let disk = format!("id=disk,path={}", self.image.display());
        let mut args = self.host.run_args(&guest(options));
        args.extend(["--disk".to_owned(), disk]);
        let output = self
            .host
            .command(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "umbra ended with {}: {said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(said)
    }

    fn theirs(&self, options: &str) -> Result<String> {
        let drive = format!("if=none,id=disk,format=raw,file={}", self.image.display());
        let devices = ["-drive", &drive, "-device", "virtio-blk-device,drive=disk"].map(str::to_owned);
        peers::says(&self.kernel, MEMORY_MIB, options, &devices)
    }

    /// Ours and theirs, one after the other.
    fn both(&self, work: &str, key: &str) -> Result<(f64, f64)> {
        let options = format!("work=blk beat=0 seconds=500ms {work}");
        Ok((
            number(&self.ours(&options)?, key)?,
            number(&self.theirs(&options)?, key)?,
        ))
    }
}

/// `blk_vs_qemu`, the geometric mean of three kinds of work; `blk_latency` and `blk_latency_qemu`, a read of 4 KiB alone,
/// told of by an interrupt.
pub(crate) fn disks(samples: usize) -> Result<Vec<Figure>> {
    if let Some(why) = peers::missing() {
        return Ok(skipped("blk_vs_qemu, blk_latency", &why));
    }
    let world = World::new()?;
    let disks = Disks::new(&world)?;
    let (mut ratios, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples {
        let mut round = Vec::new();
        for work in DISK_WORK {
            let (mine, yours) = disks.both(work, "ops")?;
            eprintln!("  disk {work}: {mine} operations to {yours}");
            round.push(mine / yours);
        }
        ratios.push(geometric_mean(&round));
        let (mine, yours) = disks.both(DISK_LATENCY, "p50_ns")?;
        ours.push(mine / 1e3);
        theirs.push(yours / 1e3);
    }
    let theirs = Figure::new("blk_latency_qemu", "us", Aim::None, theirs);
    let aim = Aim::AtMost(theirs.median());
    Ok(vec![
        Figure::new("blk_vs_qemu", "x", Aim::AtLeast(1.0), ratios),
        Figure::new("blk_latency", "us", aim, ours),
        theirs,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "umbra-guest 1 cpus=1 work=blk\numbra-guest: disk op=read bs=4096 depth=32 ops=37365 bytes=153047040 \
                        ns=1000229526 p50_ns=453710 p99_ns=5847831 max_ns=9205441 errors=0\numbra-guest: done\n";

    #[test]
    fn a_summary_is_read_by_name_and_one_with_errors_is_no_measurement() {
        assert_eq!(number(SAID, "ops").unwrap().to_bits(), 37_365f64.to_bits());
        assert_eq!(number(SAID, "p50_ns").unwrap().to_bits(), 453_710f64.to_bits());
        assert!(number(SAID, "p50").is_err());
        assert!(number(&SAID.replace("errors=0", "errors=1"), "ops").is_err());
        assert!(number("umbra-guest: done", "ops").is_err());
    }

    #[test]
    fn twice_as_much_and_half_as_much_make_no_difference() {
        assert!((geometric_mean(&[2.0, 0.5]) - 1.0).abs() < 1e-9);
    }
}
