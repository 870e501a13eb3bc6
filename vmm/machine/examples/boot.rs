//! Boots a kernel with its console on standard output: `boot KERNEL [COMMAND LINE]`.

use umbra_core::guest::Guest;
use umbra_machine::{Machine, MachineConfig, Sinks};
use umbra_units::Bytes;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: boot KERNEL [COMMAND LINE]")?;
    let config = MachineConfig::new(kernel, 2, Bytes::mib(64))?.with_cmdline(args.collect::<Vec<_>>().join(" "))?;
    let machine = Machine::launch(&config, Sinks::stdout())?;
    machine.resume()?;
    println!(
        "\nthe guest {}",
        machine.wait_exit(None).ok_or("a guest without an end")?
    );
    Ok(())
}
