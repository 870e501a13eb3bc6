//! `umbra-bench record`: what a real guest wrote, harvest by harvest, in a file that `umbra-sim replay` reads.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use umbra_core::guest::Guest as _;
use umbra_machine::{Machine, MachineConfig, Sinks};
use umbra_sim::dirt::{Dirt, HARVESTS, PAGES, Trace};
use umbra_units::{Bytes, SpaceId};

use crate::devices::tiny_kernel;

pub(crate) const USAGE: &str = "usage: umbra-bench record FILE [--seconds N] [--every MS] [--mib N] [--cpus N] \
    [--settle S] [--kernel FILE] [KERNEL OPTIONS...]\n\
    \x20 as in: umbra-bench record zipf.trace --seconds 30 work=dirty rate=40M wss=64M pattern=zipf zipf=1.0";

/// What is recorded.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    file: PathBuf,
    kernel: Option<PathBuf>,
    options: Vec<String>,
    seconds: u64,
    every: Duration,
    mib: u64,
    cpus: u8,
    settle: u64,
}

impl Wanted {
    fn parse(args: &[String]) -> Result<Self> {
        let mut wanted = Self {
            file: PathBuf::new(),
            kernel: None,
            options: Vec::new(),
            seconds: 20,
            every: Duration::from_millis(20),
            mib: 128,
            cpus: 1,
            settle: 2,
        };
        let mut args = args.iter();
        wanted.file = args.next().context(USAGE)?.into();
        while let Some(arg) = args.next() {
            if !arg.starts_with("--") {
                wanted.options.push(arg.clone());
                continue;
            }
            let value = args.next().with_context(|| format!("{arg}: a value expected"))?;
            let number = |least: u64, most: u64| {
                let number = value.parse::<u64>().ok().filter(|n| (least..=most).contains(n));
                number.with_context(|| format!("{arg}: {least} to {most} expected, got {value}"))
            };
            match arg.as_str() {
                "--seconds" => wanted.seconds = number(1, 3_600)?,
                "--every" => wanted.every = Duration::from_millis(number(1, 10_000)?),
                "--mib" => wanted.mib = number(8, u64::from(PAGES) / 256)?,
                "--cpus" => wanted.cpus = u8::try_from(number(1, 32)?)?,
                "--settle" => wanted.settle = number(0, 600)?,
                "--kernel" => wanted.kernel = Some(value.into()),
                _ => bail!("{arg}: no such option\n{USAGE}"),
            }
        }
        Ok(wanted)
    }
}

/// `umbra-bench record`.
pub(crate) fn record(args: &[String]) -> Result<()> {
    let wanted = Wanted::parse(args)?;
    let kernel = wanted.kernel.map_or_else(tiny_kernel, Ok)?;
    let mut cmdline = wanted.options.join(" ");
    if wanted.cpus > 1 && !cmdline.contains("cpus=") {
        cmdline = format!("cpus={} {cmdline}", wanted.cpus);
    }
    let config = MachineConfig::new(kernel, wanted.cpus, Bytes::mib(wanted.mib))?.with_cmdline(cmdline)?;
    let machine = Machine::launch(&config, Sinks::discard())?;
    machine.resume()?;
    std::thread::sleep(Duration::from_secs(wanted.settle));
    machine.track(true)?;
    // What came before is nobody's.
    machine.harvest()?;
    let spaces = machine.spaces();
    let ram = spaces.first().context("a guest with memory")?;
    let mut trace = Trace {
        pages: u32::try_from(ram.pages.0)?,
        harvests: Vec::new(),
    };
    let (began, mut last) = (Instant::now(), Instant::now());
    let end = Duration::from_secs(wanted.seconds);
    while began.elapsed() < end && trace.harvests.len() < HARVESTS {
        std::thread::sleep(wanted.every.saturating_sub(last.elapsed()));
        let harvest = machine.harvest()?;
        let now = Instant::now();
        let dirty = harvest.dirty.iter().find(|(space, _)| *space == SpaceId::RAM);
        let pages = dirty.map(|(_, set)| set.iter().map(|pfn| u32::try_from(pfn.0)).collect::<Result<_, _>>());
        trace.harvests.push(Dirt {
            since: now - last,
            pages: pages.transpose()?.unwrap_or_default(),
        });
        last = now;
        if let Some(reason) = machine.exit_reason() {
            bail!("the guest {reason}");
        }
    }
    let bytes = trace.encode();
    std::fs::write(&wanted.file, &bytes).with_context(|| wanted.file.display().to_string())?;
    let written: usize = trace.harvests.iter().map(|dirt| dirt.pages.len()).sum();
    println!(
        "{}: {} harvests of {} pages in {:.1} s, {written} pages found written, {} KiB",
        wanted.file.display(),
        trace.harvests.len(),
        trace.pages,
        trace.span().as_secs_f64(),
        bytes.len() >> 10
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Wanted> {
        Wanted::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_guest_is_described_by_options_and_its_kernels_words() {
        let wanted = parse("x.trace --seconds 5 work=dirty --cpus 2 rate=1M").unwrap();
        assert_eq!((wanted.seconds, wanted.cpus), (5, 2));
        assert_eq!(wanted.options, ["work=dirty", "rate=1M"]);
        for (line, wrong) in [
            ("", "usage"),
            ("x --seconds", "--seconds: a value expected"),
            ("x --every 0", "--every: 1 to 10000 expected, got 0"),
            ("x --colour red", "--colour: no such option"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.starts_with(wrong), "{error}");
        }
    }
}
