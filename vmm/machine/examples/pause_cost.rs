//! Measures what a move's pause is made of: `pause_cost KERNEL [VCPUS [MIB [ROUNDS]]]`, medians and worst of all rounds.
//!
//! The guest rewrites memory as fast as it can while it is followed; each round then stops it, harvests, saves, harvests
//! again, restores the state in a twin that was built before, and lets the guest go on.

use std::time::{Duration, Instant};

use umbra_core::guest::{Guest, PageReader};
use umbra_machine::{Machine, MachineConfig, Sinks};
use umbra_units::{Bytes, Pfn, SpaceId};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: pause_cost KERNEL [VCPUS [MIB [ROUNDS]]]")?;
    let cpus: u8 = args.next().map_or(Ok(2), |arg| arg.parse())?;
    let mib: u64 = args.next().map_or(Ok(256), |arg| arg.parse())?;
    let rounds: usize = args.next().map_or(Ok(200), |arg| arg.parse())?;

    let cmdline = format!("cpus={cpus} work=dirty wss={}M rate=100M beat=1000", mib / 2);
    let config = MachineConfig::new(kernel, cpus, Bytes::mib(mib))?.with_cmdline(cmdline)?;
    let machine = Machine::launch(&config, Sinks::discard())?;
    let build = Instant::now();
    let twin = Machine::builder(Sinks::discard).build_machine(&machine.describe())?;
    println!("build a twin     {:>9.1?}", build.elapsed());
    machine.resume()?;
    std::thread::sleep(Duration::from_secs(2));
    machine.track(true)?;

    let mut steps: Vec<(&str, Vec<Duration>)> = [
        "harvest running",
        "stop",
        "harvest paused",
        "save",
        "harvest saved",
        "restore",
        "resume",
        "copy 1000 pages",
    ]
    .map(|name| (name, Vec::new()))
    .into();
    let mut bytes = Vec::new();
    for _ in 0..rounds {
        std::thread::sleep(Duration::from_millis(10));
        let mut at = Instant::now();
        let mut spent = Vec::new();
        let mut lap = |at: &mut Instant| {
            spent.push(at.elapsed());
            *at = Instant::now();
        };
        machine.harvest()?;
        lap(&mut at);
        machine.pause()?;
        lap(&mut at);
        machine.harvest()?;
        lap(&mut at);
        let records = machine.save()?;
        lap(&mut at);
        machine.harvest()?;
        lap(&mut at);
        twin.restore(&records)?;
        lap(&mut at);
        machine.resume()?;
        lap(&mut at);
        bytes.clear();
        let pages: Vec<Pfn> = (512..1512).map(Pfn).collect();
        machine.read_pages(SpaceId::RAM, &pages, &mut bytes)?;
        lap(&mut at);
        steps
            .iter_mut()
            .zip(spent)
            .for_each(|((_, all), spent)| all.push(spent));
    }
    for (name, mut all) in steps {
        all.sort_unstable();
        println!(
            "{name:<16} {:>9.1?} median {:>9.1?} worst",
            all[all.len() / 2],
            all[all.len() - 1]
        );
    }
    println!("{:?}", machine.exit_reason());
    Ok(())
}
