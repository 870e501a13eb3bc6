//! A guest in about ten lines: boots the kernel that is named and prints its console until it is over.

use umbra_core::guest::Guest;
use umbra_machine::{Machine, MachineConfig, Sinks};
use umbra_units::Bytes;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kernel = std::env::args().nth(1).ok_or("usage: ten_lines KERNEL")?;
    let config = MachineConfig::new(kernel, 2, Bytes::mib(64))?.with_cmdline("console=ttyS0 run=1")?;
    let machine = Machine::launch(&config, Sinks::stdout())?;
    machine.resume()?;
    let end = machine.wait_exit(None).expect("it waited for the end");
    println!("\nthe guest {end}");
    Ok(())
}
