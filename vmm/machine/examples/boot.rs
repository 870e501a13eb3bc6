//! Boots a kernel with its console on standard output: `boot KERNEL [COMMAND LINE]`.

use std::io::Write;

use umbra_core::guest::Guest;
use umbra_machine::{Machine, MachineConfig, Out, Sinks};
use umbra_units::Bytes;

struct Stdout;

impl Out for Stdout {
    fn put(&self, bytes: &[u8]) {
        // A console nobody listens to is no reason to stop the guest.
        let _ = std::io::stdout()
            .write_all(bytes)
            .and_then(|()| std::io::stdout().flush());
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: boot KERNEL [COMMAND LINE]")?;
    let config = MachineConfig::new(kernel, 2, Bytes::mib(64))?.with_cmdline(args.collect::<Vec<_>>().join(" "))?;
    let machine = Machine::launch(&config, Sinks::new(Stdout))?;
    machine.resume()?;
    println!(
        "\nthe guest {}",
        machine.wait_exit(None).ok_or("a guest without an end")?
    );
    Ok(())
}
