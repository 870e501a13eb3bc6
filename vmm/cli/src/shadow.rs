//! `umbra shadow`: wait for a source, keep its guest's shadow, and be the guest's VMM once it is handed over.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use umbra_core::guest::Guest;
use umbra_core::shadow::ShadowConfig;
use umbra_machine::{BootFiles, Machine, MachineBuilder};
use umbra_node::ShadowNode;
use umbra_quic::{ListenConfig, Listener, Tuning};

use crate::args::ShadowArgs;
use crate::confine::{self, Class, Plans};
use crate::exit::{Code, Failure};
use crate::process::{self, Process};
use crate::say;

/// The twin built last: the node drives it as a guest, and this process knows it as a machine.
type Twin = Arc<Mutex<Weak<Machine>>>;

/// Hold shadows until a guest is handed over, then run it until it, its operator or a switchover ends it here.
pub(crate) fn shadow(args: &ShadowArgs) -> Result<Code, Failure> {
    let peers = process::peers(&args.peers)?;
    // A host without KVM says so now, not when a guest is about to come.
    umbra_machine::probe()?;
    // A guest that resets here is loaded from these files.
    let boot = args.kernel.iter().chain(&args.initramfs);
    confine::prepare(&args.process, Plans::of(boot, &args.devices.devices()))?;
    let process = Process::new(&args.process)?;
    let twin = Twin::default();
    let builder = builder(args, &process, &twin)?;
    confine::enter(Class::Host)?;
    let runtime = process::runtime()?;
    let code = runtime.block_on(async {
        let config = ListenConfig {
            addrs: args.listen.clone(),
            identity: process.vm.identity(),
            peers,
            tuning: Tuning::default(),
        };
        let listener = Listener::bind(config).map_err(Failure::failed)?;
        let listen: Vec<String> = listener.addrs().iter().map(|addr| format!("quic:{addr}")).collect();
        let shadowing = ShadowConfig {
            staging: args.staging,
            ..ShadowConfig::default()
        };
        let (node, handle) = ShadowNode::new(listener, Arc::new(builder), shadowing);
        let (vm, console) = (Arc::clone(&process.vm), Arc::clone(&process.console));
        let resident = move |guest: Arc<dyn Guest>| {
            let machine = twin.lock().unwrap_or_else(PoisonError::into_inner).upgrade()?;
            let same = std::ptr::addr_eq(Arc::as_ptr(&guest), Arc::as_ptr(&machine));
            same.then(|| Process::move_in(&console, &vm, machine))
        };
        process.vm.shadow(node, handle, listen.clone(), args.once, resident);
        if process.new_identity {
            say::line(format!("identity {}", process.vm.identity().fingerprint()));
        }
        for addr in listen {
            say::line(format!("listening on {addr}"));
        }
        Ok(process.live().await)
    });
    runtime.shutdown_background();
    code
}

fn builder(args: &ShadowArgs, process: &Process, twin: &Twin) -> Result<MachineBuilder, Failure> {
    let (vm, console, twin) = (Arc::clone(&process.vm), Arc::clone(&process.console), Arc::clone(twin));
    let with_console = args.devices.console()?;
    let mut builder = Machine::builder(move || with_console(Process::sinks(&console, &vm))).on_build(move |machine| {
        *twin.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(machine);
    });
    builder = builder.with_dirty_log(args.process.dirty_log);
    if let Some(memory) = args.memory {
        builder = builder.with_backing(memory.0);
    }
    if let Some(kernel) = args.kernel.clone() {
        let initrd = args.initramfs.clone();
        builder = builder.with_boot_files(BootFiles { kernel, initrd });
    }
    let builder = builder.with_devices(args.devices.devices())?;
    Ok(match args.memory_limit {
        Some(limit) => builder.with_memory_most(limit),
        None => builder,
    })
}
