//! The life of a process that is, or becomes, a guest's VMM: what `run` and `shadow` have in common.

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Weak};

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use umbra_machine::{ExitReason, Machine, Sinks};
use umbra_quic::{Identity, Peers};
use umbra_units::Bytes;

use crate::api::server::Server;
use crate::api::types::{Captures, Counters, DirtyLogChoice, VcpuCounters};
use crate::args::ProcessArgs;
use crate::console::{Console, ConsoleOut};
use crate::events::{Events, Teller};
use crate::exit::{Code, Failure};
use crate::say;
use crate::socket::PrivateSocket;
use crate::vm::{Ending, LastWord, Panel, Resident, Vm};

/// Everything of the process but the guest.
pub(crate) struct Process {
    pub(crate) vm: Arc<Vm>,
    pub(crate) console: Arc<Console>,
    api: Option<(PrivateSocket, UnixListener)>,
    /// The identity was made for this process: peers must be told its fingerprint.
    pub(crate) new_identity: bool,
}

impl Process {
    /// Open what the options name.
    pub(crate) fn new(args: &ProcessArgs) -> Result<Self, Failure> {
        let api = args.api_socket.as_deref().map(PrivateSocket::bind).transpose()?;
        let console = Console::new(&args.serial)?;
        let events = Events::new(args.event_monitor.as_ref())?;
        let identity = match &args.identity {
            Some(dir) => Identity::load(dir).map_err(Failure::arguments)?,
            None => Identity::generate("umbra").map_err(Failure::failed)?,
        };
        let vm = Vm::new(args.name.clone(), identity, events);
        Ok(Self {
            vm,
            console,
            api,
            new_identity: args.identity.is_none(),
        })
    }

    /// What a machine of this process is connected to.
    pub(crate) fn sinks(console: &Arc<Console>, vm: &Arc<Vm>) -> Sinks {
        let (vm, same) = (Arc::downgrade(vm), Arc::downgrade(vm));
        Sinks::new(ConsoleOut(Arc::clone(console)))
            .with_on_exit(move |reason| {
                if let Some(vm) = vm.upgrade() {
                    vm.end(Ending::Guest(reason.clone()));
                }
            })
            .with_on_restart(move || {
                if let Some(vm) = same.upgrade() {
                    vm.events().tell(Teller::Guest, "rebooted", json!({}));
                }
            })
    }

    /// The machine is this process's guest from now on: what is typed goes there.
    pub(crate) fn move_in(console: &Arc<Console>, vm: &Arc<Vm>, machine: Arc<Machine>) -> Resident {
        let stopping = Arc::clone(vm);
        console.plug(&machine, move || {
            if let Err(denied) = stopping.stop("from its console") {
                say::note(denied);
            }
        });
        let shape = machine.shape();
        Resident {
            vcpus: shape.cpus(),
            memory: shape.memory(),
            panel: Arc::new(FrontPanel(Arc::downgrade(&machine))),
            guest: machine,
        }
    }

    /// Be there for the guest, the API's clients and signals until one of them ends it.
    pub(crate) async fn live(self) -> Code {
        let Self { vm, console, api, .. } = self;
        let (code, text) = Self::until_the_end(&vm, &console, api).await;
        console.restore_terminal();
        say::note(text);
        code
    }

    async fn until_the_end(
        vm: &Arc<Vm>,
        console: &Console,
        api: Option<(PrivateSocket, UnixListener)>,
    ) -> (Code, String) {
        let mut signals = match Signals::new() {
            Ok(signals) => signals,
            Err(error) => return (Code::Failure, format!("cannot listen to signals: {error}")),
        };
        let mut _socket = None;
        let mut server = None;
        if let Some((socket, listener)) = api {
            match Server::start(listener, Arc::clone(vm)) {
                Ok(started) => (_socket, server) = (Some(socket), Some(started)),
                Err(error) => return (Code::Failure, format!("api-socket: {error}")),
            }
        }
        let mut told = vm.ending();
        let ending = loop {
            tokio::select! {
                ending = told.wait_for(Option::is_some) => match ending.map(|ending| ending.clone()) {
                    Ok(Some(ending)) => break ending,
                    _ => break Ending::Failed("the process lost its guest".to_owned()),
                },
                name = signals.next() => vm.end(Ending::Stopped(format!("by {name}"))),
            }
        };
        let (code, text) = tokio::select! {
            end = wind_down(vm, &ending) => end,
            name = signals.next() => (Code::Failure, format!("{ending}; ended at once by {name}")),
        };
        console.drain();
        vm.events()
            .tell(Teller::Process, "ending", json!({ "exit": text, "code": code as u8 }));
        vm.events().close();
        if let Some(server) = server {
            server.close().await;
        }
        (code, text)
    }
}

/// The buttons of our machine. They do not keep it alive.
struct FrontPanel(Weak<Machine>);

impl Panel for FrontPanel {
    fn power_button(&self) -> bool {
        self.0.upgrade().is_some_and(|machine| machine.power_button())
    }

    fn reset(&self) -> Result<(), String> {
        let machine = self.0.upgrade().ok_or("there is no guest here any more")?;
        machine.reset().map_err(|error| error.to_string())
    }

    fn resize_balloon(&self, size: Bytes) -> Result<(), String> {
        let machine = self.0.upgrade().ok_or("there is no guest here any more")?;
        machine.resize_balloon(size).map_err(|error| error.to_string())
    }

    fn counters(&self) -> Counters {
        let machine = self.0.upgrade();
        let balloon_bytes = machine
            .as_ref()
            .and_then(|machine| machine.balloon())
            .map(|size| size.0);
        let dirty_log = machine.as_ref().map(|machine| {
            let log = machine.dirty_log();
            DirtyLogChoice {
                log: log.name().to_owned(),
                ring_entries: log.ring_entries,
                why: log.why.clone(),
            }
        });
        let counters = machine.map(|machine| machine.counters()).unwrap_or_default();
        let captures = Captures {
            copy: counters.captures.copies,
            parallel_copy: counters.captures.parallel_copies,
            protect: counters.captures.protections,
            faults: counters.captures.faults,
        };
        let names =
            |counts: BTreeMap<&'static str, u64>| counts.into_iter().map(|(name, n)| (name.to_owned(), n)).collect();
        let vcpus = counters.vcpus.into_iter().map(|vcpu| VcpuCounters {
            exits: names(vcpu.exits),
            emulated: names(vcpu.emulated),
            written_pages: vcpu.writes.map(|writes| writes.pages),
            written_pages_per_second: vcpu.writes.map(|writes| writes.pages_per_second),
        });
        Counters {
            vcpus: vcpus.collect(),
            balloon_bytes,
            dirty_log,
            captures,
        }
    }
}

/// Do what an ending asks for; says how the process ends.
pub(crate) async fn wind_down(vm: &Vm, ending: &Ending) -> (Code, String) {
    let text = ending.to_string();
    vm.end_snapshot().await;
    let word = match ending {
        Ending::Moved(_) => LastWord::Moved,
        Ending::Stopped(_) => vm.end_session(&format!("its process was {text}")).await,
        _ => vm.end_session(&text).await,
    };
    match word {
        LastWord::GuestIsOurs => {}
        LastWord::Moved if matches!(ending, Ending::Moved(_)) => return (Code::Success, text),
        LastWord::Moved => return (Code::Success, format!("{text}; the guest had moved to its shadow")),
        LastWord::Unknown => {
            let text = format!(
                "{text}; the guest was handed over, and the shadow has not said whether it runs there: it does not run here"
            );
            return (Code::HandedOver, text);
        }
    }
    if let Some(guest) = vm.take_guest() {
        // Its last bytes are on the console when this returns. It is over anyway: an error here changes nothing.
        let _ = tokio::task::spawn_blocking(move || guest.pause()).await;
    }
    (code_of(ending), text)
}

const fn code_of(ending: &Ending) -> Code {
    match ending {
        Ending::Guest(ExitReason::Shutdown | ExitReason::Reset | ExitReason::Code(0)) => Code::Success,
        Ending::Guest(ExitReason::Code(_)) => Code::EndedByGuest,
        Ending::Guest(ExitReason::Fault(_)) => Code::GuestFault,
        Ending::Stopped(_) | Ending::Moved(_) => Code::Success,
        Ending::Guest(ExitReason::NoRestart(_)) | Ending::Failed(_) => Code::Failure,
    }
}

/// The signals that end a process in good order.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// A runtime for a guest's process. Two threads: one may be busy with the network while the other answers; the pages
/// are copied and encoded elsewhere.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .thread_name("umbra-net")
        .enable_all()
        .build()
        .map_err(Failure::on("cannot start threads"))
}

/// A runtime for a command that asks something and ends.
pub(crate) fn small_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::on("cannot start"))
}

/// The peers an operator named, by file or fingerprint.
pub(crate) fn peers(named: &[String]) -> Result<Peers, Failure> {
    let and = |peers: Peers, name: &String| peers.and_named(name);
    named
        .iter()
        .try_fold(Peers::none(), and)
        .map_err(|error| Failure::arguments(format!("peer: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_guest_ended_is_the_exit_code() {
        for (reason, code, text) in [
            (ExitReason::Shutdown, Code::Success, "the guest powered off"),
            (ExitReason::Reset, Code::Success, "the guest asked for a reset"),
            (
                ExitReason::NoRestart("no kernel".to_owned()),
                Code::Failure,
                "the guest asked for a reset and cannot be booted again here: no kernel",
            ),
            (ExitReason::Code(0), Code::Success, "the guest ended with code 0"),
            (ExitReason::Code(3), Code::EndedByGuest, "the guest ended with code 3"),
            (
                ExitReason::Fault("triple fault".to_owned()),
                Code::GuestFault,
                "the guest cannot go on: triple fault",
            ),
        ] {
            let ending = Ending::Guest(reason);
            assert_eq!((code_of(&ending), ending.to_string()), (code, text.to_owned()));
        }
        assert_eq!(code_of(&Ending::Stopped("by SIGTERM".to_owned())), Code::Success);
        assert_eq!(code_of(&Ending::Failed("no".to_owned())), Code::Failure);
    }
}
