//! What the kernel says of a process (proc(5)).

use std::fs;

use anyhow::{Context, Result};
use umbra_e2e::Process;

/// Clock ticks of `/proc/*/stat`: USER_HZ is 100 on every x86 Linux.
const TICKS_PER_SECOND: f64 = 100.0;
/// The name of a vCPU's thread begins so: its time is the guest's, not ours.
const VCPU: &str = "vcpu";
/// The name of guest memory among a process's mappings.
const GUEST_MEMORY: &str = "memfd:umbra-guest";

/// The process's number, by its own word.
pub(crate) fn pid(process: &Process) -> Result<u64> {
    process.status()?["pid"].as_u64().context("a status with a pid")
}

/// Seconds of processor time that the VMM's own threads have used, vCPUs left out.
pub(crate) fn cpu_seconds(pid: u64) -> Result<f64> {
    thread_seconds(pid, |name| !name.starts_with(VCPU))
}

/// Seconds of processor time that the vCPUs have used: the guest's, and what leaving it costs.
pub(crate) fn vcpu_seconds(pid: u64) -> Result<f64> {
    thread_seconds(pid, |name| name.starts_with(VCPU))
}

fn thread_seconds(pid: u64, counts: impl Fn(&str) -> bool) -> Result<f64> {
    let mut ticks = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let dir = task?.path();
        // A thread may end between being listed and being read.
        let Ok(stat) = fs::read_to_string(dir.join("stat")) else {
            continue;
        };
        let (head, fields) = stat.rsplit_once(") ").context("a stat line")?;
        if !head.split_once('(').is_some_and(|(_, name)| counts(name)) {
            continue;
        }
        // utime and stime are fields 14 and 15, and `fields` begins with the third.
        let times = fields.split(' ').skip(11).take(2).map(str::parse::<f64>);
        ticks += times.sum::<Result<f64, _>>()?;
    }
    Ok(ticks / TICKS_PER_SECOND)
}

/// MiB that a process keeps resident beside its guest's memory: code, heap, stacks, everything.
pub(crate) fn overhead_mib(pid: u64) -> Result<f64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut kib = 0.0;
    let mut counts = false;
    for line in maps.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            let value = rss.trim().trim_end_matches(" kB").parse::<f64>()?;
            kib += if counts { value } else { 0.0 };
        } else if line.split(' ').next().is_some_and(|range| range.contains('-')) {
            counts = !line.contains(GUEST_MEMORY);
        }
    }
    Ok(kib / 1024.0)
}
