//! `umbra restore`: a guest as it was when it was kept.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use serde_json::json;
use umbra_machine::Machine;
use umbra_node::GuestIdentity;
use umbra_node::snapshot::{self, Restored};
use umbra_units::Bytes;

use crate::api::types::ms;
use crate::args::{ProcessArgs, Restore, RestoreArgs};
use crate::confine::{self, Class, Plans};
use crate::devices::DeviceArgs;
use crate::events::Teller;
use crate::exit::{Code, Failure};
use crate::process::{self, Process};
use crate::say;

/// Build the guest that a folder holds, and run it until it, its operator or a switchover ends it here.
pub(crate) fn restore(args: &RestoreArgs) -> Result<Code, Failure> {
    let wanted = Restore {
        from: args.from.clone(),
        resume: !args.paused,
        same_id: args.same_id,
    };
    go_on(&wanted, args.memory_limit, &args.devices, &args.process)
}

/// The same, however it was asked for.
pub(crate) fn go_on(
    wanted: &Restore,
    memory_limit: Option<Bytes>,
    devices: &DeviceArgs,
    args: &ProcessArgs,
) -> Result<Code, Failure> {
    // A host without KVM says so before it says anything about the snapshot.
    umbra_machine::probe()?;
    confine::prepare(args, Plans::of([], &devices.devices()))?;
    let process = Process::new(args)?;
    let twin: Arc<Mutex<Weak<Machine>>> = Arc::default();
    let built = Arc::clone(&twin);
    let (console, vm) = (Arc::clone(&process.console), Arc::clone(&process.vm));
    let mut builder = Machine::builder(move || Process::sinks(&console, &vm)).on_build(move |machine| {
        *built.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(machine);
    });
    builder = builder.with_devices(devices.devices())?.with_dirty_log(args.dirty_log);
    if let Some(limit) = memory_limit {
        builder = builder.with_memory_most(limit);
    }
    let Restored {
        guest,
        manifest,
        report,
    } = snapshot::restore(&wanted.from, &builder).map_err(Failure::failed)?;
    let machine = twin.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
    let machine =
        machine.ok_or_else(|| Failure::failed("the guest that was restored is not one this process built"))?;
    // What it drew of randomness before the cut, another guest from the same folder has drawn as well.
    machine.renew_generation();
    let resident = Process::move_in(&process.console, &process.vm, machine);
    let restored = json!({
        "snapshot": manifest.id.to_string(),
        "of_guest": manifest.guest.to_string(),
        "from": &wanted.from,
        "links": report.links,
        "bytes": report.bytes.0,
        "build_ms": ms(report.build),
        "memory_ms": ms(report.memory),
        "state_ms": ms(report.state),
    });
    process.vm.events().tell(Teller::Guest, "restored", restored);
    let same_as = wanted.same_id.then_some(GuestIdentity {
        guest: manifest.guest,
        term: manifest.term,
    });
    confine::enter(Class::Host)?;
    process.vm.restored(resident, same_as, !wanted.resume)?;
    if wanted.resume {
        guest.resume().map_err(Failure::failed)?;
    }
    drop(guest);
    if process.new_identity && args.api_socket.is_some() {
        say::note(format!("identity {}", process.vm.identity().fingerprint()));
    }
    let runtime = process::runtime()?;
    let code = runtime.block_on(process.live());
    runtime.shutdown_background();
    Ok(code)
}
