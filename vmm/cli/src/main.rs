//! The `umbra` program: joins the machine and the node, and gives operators a command line.
//!
//! One process per guest. `umbra run` starts a guest and is its VMM; `umbra shadow` holds the shadow of a guest and is
//! its VMM from the moment it is handed over. Both answer the other commands over a UNIX socket; nothing is decided in
//! those commands that the API does not offer to everybody.
//!
//! ```text
//!   umbra run ─────▶ process ◀── vm ──▶ Protection (node) ═══ paths ═══ ShadowNode (node) ◀── vm ──▶ process ◀── umbra shadow
//!                       ▲          └──▶ Machine                            Machine ◀──┘          ▲
//!                       │ api                                                                    │ api
//!   umbra protect, migrate, status, …                                            umbra status, stop, …
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`args`], [`units`], [`config`] | the command line, values as operators write them, and a command line kept in a file |
//! | [`run`], [`restore`], [`shadow`], [`process`] | the kinds of process, and what they have in common |
//! | [`vm`] | one guest and everything that can be done about it: where the machine and the node meet |
//! | [`api`], [`events`] | JSON over HTTP on a UNIX socket; what happens, as a stream |
//! | [`control`], [`status`] | the commands that talk to a process, and how they show what they hear |
//! | [`confine`] | what the process gives up before its guest runs |
//! | [`console`], [`socket`] | the guest's serial console; sockets only their owner may use |
//! | [`demo`] | a guest moves over three bad networks, told so that anybody understands it |
//! | [`identity`], [`doctor`], [`cpu`], [`manual`], [`logging`] | small commands |
//! | [`exit`], [`limits`], [`say`] | exit codes, bounds, printing |
#![forbid(unsafe_code)]

mod api;
mod args;
mod config;
mod confine;
mod console;
mod control;
mod cpu;
mod demo;
mod devices;
mod doctor;
mod events;
mod exit;
mod heat;
mod identity;
mod limits;
mod logging;
mod manual;
mod process;
mod restore;
mod run;
mod say;
mod shadow;
mod socket;
mod status;
#[cfg(test)]
#[path = "../../node/examples/toy.rs"]
#[allow(dead_code, reason = "the tests want its guest, not its nodes")]
mod toy;
mod units;
mod vm;

use std::process::ExitCode;

use crate::args::Command;
use crate::config::{Asked, Unread};
use crate::exit::{Code, Failure};

fn main() -> ExitCode {
    let cli = match config::read(std::env::args_os().collect()) {
        Ok(Asked::Command(cli)) => cli,
        Ok(Asked::Print(text)) => {
            say::line(text.trim_end());
            return ExitCode::from(Code::Success);
        }
        Err(Unread::Line(error)) => {
            let _ = error.print();
            // Asking for help is no error; everything else clap says is.
            return ExitCode::from(if error.use_stderr() {
                Code::BadArguments
            } else {
                Code::Success
            });
        }
        Err(Unread::File(text)) => {
            say::note(text);
            return ExitCode::from(Code::BadArguments);
        }
    };
    let code = logging::start(&cli.log).and_then(|()| dispatch(&cli.command));
    ExitCode::from(code.unwrap_or_else(|failure| {
        say::note(&failure);
        failure.code
    }))
}

fn dispatch(command: &Command) -> Result<Code, Failure> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Restore(args) => restore::restore(args),
        Command::Shadow(args) => shadow::shadow(args),
        Command::Protect(args) => control::protect(args),
        Command::Unprotect(args) => control::simple(args, "unprotect"),
        Command::Migrate(args) => control::migrate(args),
        Command::Cut(args) => control::cut(args),
        Command::Snapshot(args) => control::snapshot(args),
        Command::Cancel(args) => control::simple(args, "cancel"),
        Command::Status(args) => control::status(args),
        Command::Pause(args) => control::simple(args, "pause"),
        Command::Resume(args) => control::resume(args),
        Command::PowerButton(args) => control::simple(args, "power-button"),
        Command::Reboot(args) => control::simple(args, "reboot"),
        Command::Resize(args) => control::resize(args),
        Command::Counters(args) => control::counters(args),
        Command::Heat(args) => heat::run(args),
        Command::Stop(args) => control::simple(args, "stop"),
        Command::Events(args) => control::events(args),
        Command::Identity(command) => identity::identity(command),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Cpu(command) => cpu::cpu(command),
        Command::Demo(args) => demo::demo(args),
        Command::Completions(args) => Ok(manual::completions(args)),
        Command::Man(args) => manual::man(args),
    }
}
