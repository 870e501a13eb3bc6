//! A host: an identity that its peers pin, and the processes started on it.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use crate::console::Console;
use crate::events::named;
use crate::guest::Guest;
use crate::process::Process;
use crate::vm::Vm;
use crate::world::Shared;

/// One of the story's hosts. They share a machine and nothing else.
#[derive(Debug)]
pub struct Host {
    pub(crate) world: Arc<Shared>,
    pub(crate) name: String,
    identity: PathBuf,
    fingerprint: String,
}

impl Host {
    pub(crate) fn new(world: Arc<Shared>, name: &str) -> Result<Self> {
        let identity = world.fresh(&format!("identity-{name}"));
        let mut host = Self {
            world,
            name: name.to_owned(),
            identity,
            fingerprint: String::new(),
        };
        let dir = host.identity.display().to_string();
        let made = host.command(&["identity", "create", "--dir", &dir, "--name", name])?;
        let text = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "identity create: {text}");
        host.fingerprint = String::from_utf8(made.stdout)?.trim().to_owned();
        Ok(host)
    }

    /// What peers pin.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Where its key and certificate are.
    pub fn identity(&self) -> &std::path::Path {
        &self.identity
    }

    /// Run one `umbra` command to its end.
    pub fn command(&self, args: &[&str]) -> Result<Output> {
        Command::new(&self.world.programs.umbra)
            .args(args)
            .output()
            .context("umbra")
    }

    /// `umbra run` with the tiny kernel.
    pub fn launch(&self, guest: &Guest) -> Result<Vm> {
        self.launch_with(guest, &[])
    }

    /// The same with more arguments.
    pub fn launch_with(&self, guest: &Guest, more: &[&str]) -> Result<Vm> {
        let mut args = self.run_args(guest);
        args.extend(more.iter().map(ToString::to_string));
        let process = Process::start(&self.world, &format!("source on {}", self.name), &args, 0)?;
        let console = Console::new(Arc::clone(process.serial()));
        Ok(Vm::new(process, console))
    }

    /// `umbra restore` of a snapshot that was taken while its guest ran on: it goes on from somewhere.
    pub fn restore(&self, from: &std::path::Path, more: &[&str]) -> Result<Vm> {
        let (from, identity) = (from.display().to_string(), self.identity.display().to_string());
        let mut args = vec!["restore", "--from", &from, "--identity", &identity];
        args.extend(more);
        let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        let process = Process::start(&self.world, &format!("restored on {}", self.name), &args, 0)?;
        let console = Console::in_the_middle(Arc::clone(process.serial()));
        Ok(Vm::new(process, console))
    }

    /// The arguments of `umbra run` for this guest.
    pub fn run_args(&self, guest: &Guest) -> Vec<String> {
        let kernel = self.world.programs.guest.display().to_string();
        let identity = self.identity.display().to_string();
        let (cpus, memory) = (format!("boot={}", guest.cpus), format!("size={}M", guest.memory_mib));
        let args = [
            "run",
            // The tiny kernel never asks for a reset: a triple fault of it is an end, not a new beginning.
            "--no-reboot",
            "--kernel",
            &kernel,
            "--cmdline",
            &guest.options,
            "--identity",
            &identity,
        ];
        let machine = ["--cpus", &cpus, "--memory", &memory];
        args.into_iter().chain(machine).map(str::to_owned).collect()
    }

    /// `umbra shadow` that lets sources of this one host come.
    pub fn shadow_for(&self, source: &Self) -> Result<Shadow> {
        self.shadow_with(&[source], &[])
    }

    /// The same for sources of several hosts, with more arguments.
    pub fn shadow_with(&self, sources: &[&Self], more: &[&str]) -> Result<Shadow> {
        let identity = self.identity.display().to_string();
        let mut args = vec!["shadow", "--identity", &identity];
        for source in sources {
            args.extend(["--peer", source.fingerprint()]);
        }
        if !more.contains(&"--listen") {
            args.extend(["--listen", "quic:127.0.0.1:0"]);
        }
        args.extend(more);
        let listens = args.iter().filter(|arg| **arg == "--listen").count();
        let args: Vec<String> = args.into_iter().map(str::to_owned).collect();
        let process = Process::start(&self.world, &format!("shadow on {}", self.name), &args, listens)?;
        let said = process.bell().wait(crate::PATIENCE, || {
            let said = process.serial().said();
            (said.len() == listens || process.serial().has_ended()).then_some(said)
        });
        let address = |line: &String| line.strip_prefix("listening on ").map(str::to_owned);
        let listen: Option<Vec<String>> = said.unwrap_or_default().iter().map(address).collect();
        let listen = listen.filter(|listen| listen.len() == listens);
        let listen = listen.with_context(|| format!("the shadow does not say where it listens: {}", process.log()))?;
        Ok(Shadow {
            process,
            listen,
            fingerprint: self.fingerprint.clone(),
        })
    }
}

/// A running `umbra shadow`.
#[derive(Debug)]
pub struct Shadow {
    /// The process.
    pub process: Process,
    /// Where it listens, `quic:IP:PORT`.
    pub listen: Vec<String>,
    pub(crate) fingerprint: String,
}

impl Shadow {
    /// What sources pin.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Wait until a guest runs here. What the session tells of the same moment may come before it or after.
    pub fn runs_its_guest(&self) -> Result<()> {
        self.process.holds("the guest runs at its shadow", |events| {
            events.iter().any(named("running"))
        })
    }

    /// Whether no guest ever said a word here.
    pub fn is_silent(&self) -> bool {
        self.process.serial().is_empty()
    }
}
