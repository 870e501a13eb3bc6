//! `umbra run`: a guest from its first instruction.

use std::sync::Arc;

use umbra_core::guest::Guest;
use umbra_machine::{Machine, MachineConfig, OnReset, Sharing, Template};

use crate::args::RunArgs;
use crate::confine::{self, Class, Plans};
use crate::exit::{Code, Failure};
use crate::process::{self, Process};
use crate::restore;
use crate::say;

/// Run a guest until it, its operator or a switchover ends it here.
pub(crate) fn run(args: &RunArgs) -> Result<Code, Failure> {
    if let Some(wanted) = &args.restore {
        return restore::go_on(wanted, None, &args.devices, &args.process);
    }
    let config = config(args)?;
    // A guest that resets is loaded again from its files.
    let boot = args.kernel.iter().chain(&args.initramfs);
    confine::prepare(&args.process, Plans::of(boot, &args.devices.devices()))?;
    let process = Process::new(&args.process)?;
    let machine = Machine::launch(
        &config,
        args.devices.console()?(Process::sinks(&process.console, &process.vm)),
    )?;
    let resident = Process::move_in(&process.console, &process.vm, Arc::clone(&machine));
    confine::enter(Class::Host)?;
    process.vm.launched(resident, args.paused)?;
    if !args.paused {
        machine.resume().map_err(Failure::failed)?;
    }
    drop(machine);
    // The guest runs while the rest is made ready.
    if process.new_identity && args.process.api_socket.is_some() {
        say::note(format!("identity {}", process.vm.identity().fingerprint()));
    }
    let runtime = process::runtime()?;
    let code = runtime.block_on(process.live());
    runtime.shutdown_background();
    Ok(code)
}

fn config(args: &RunArgs) -> Result<MachineConfig, Failure> {
    let sharing = if args.memory.shared {
        Sharing::Shared
    } else {
        Sharing::Private
    };
    let mut config = MachineConfig::new(
        args.kernel.clone().unwrap_or_default(),
        args.cpus.boot,
        args.memory.size,
    )?
    .with_sharing(sharing)
    .with_devices(args.devices.devices())?
    .with_backing(args.memory.backing)?
    .with_dirty_log(args.process.dirty_log)
    .with_cmdline(args.cmdline.clone())?;
    if let Some(template) = &args.cpus.template {
        config = config.with_template(Template::find(template)?);
    }
    if args.no_reboot {
        config = config.with_on_reset(OnReset::Exit);
    }
    if let Some(initrd) = &args.initramfs {
        config = config.with_initrd(initrd);
    }
    Ok(config)
}
