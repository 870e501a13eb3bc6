//! A guest that is a Linux: the kernel and first program of `resources/linux`, heard line by line.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};

use crate::console::Console;
use crate::host::{Host, Shadow};
use crate::process::Process;
use crate::vm::{Move, Report, Vm};
use crate::world::PATIENCE;

/// What a Linux guest is given and what it is to do.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// vCPUs.
    pub cpus: u8,
    /// MiB of memory.
    pub memory_mib: u32,
    /// Words for its command line beside those every boot begins with: see `resources/linux/README.md`.
    pub words: String,
    /// Whether busybox is there.
    pub tools: bool,
    /// Whether the kernel comes packed, as distributions have it.
    pub bzimage: bool,
}

impl LinuxGuest {
    /// One that does these jobs.
    pub fn doing(jobs: &str) -> Self {
        Self {
            cpus: 1,
            memory_mib: 64,
            words: format!("umbra.jobs={jobs}"),
            tools: false,
            bzimage: false,
        }
    }

    /// The same from a packed kernel.
    #[must_use]
    pub const fn from_bzimage(mut self) -> Self {
        self.bzimage = true;
        self
    }

    /// The same with so many vCPUs.
    #[must_use]
    pub const fn with_cpus(mut self, cpus: u8) -> Self {
        self.cpus = cpus;
        self
    }

    /// The same with busybox.
    #[must_use]
    pub const fn with_tools(mut self) -> Self {
        self.tools = true;
        self
    }

    /// The same with more words.
    #[must_use]
    pub fn with(mut self, words: &str) -> Self {
        self.words = format!("{} {words}", self.words);
        self
    }
}

/// A Linux guest, wherever it runs, and how far it was heard.
#[derive(Debug)]
pub struct Linux {
    /// The guest and its process.
    pub vm: Vm,
    /// Bytes of its console that were waited for already.
    heard: usize,
}

impl Host {
    /// `umbra run` of this Linux, with more arguments.
    pub fn launch_linux(&self, guest: &LinuxGuest, more: &[&str]) -> Result<Linux> {
        let kernel = made(if guest.bzimage {
            "UMBRA_LINUX_BZIMAGE"
        } else {
            "UMBRA_LINUX_KERNEL"
        })?;
        let initrd = made(if guest.tools {
            "UMBRA_LINUX_INITRD_TOOLS"
        } else {
            "UMBRA_LINUX_INITRD"
        })?;
        let common = std::env::var("UMBRA_LINUX_CMDLINE").context("UMBRA_LINUX_CMDLINE is not set")?;
        let (cpus, memory) = (format!("boot={}", guest.cpus), format!("size={}M", guest.memory_mib));
        let cmdline = format!("{common} {}", guest.words);
        let mut args: Vec<String> = ["run", "--identity", &self.identity().display().to_string()]
            .map(str::to_owned)
            .into();
        args.extend(["--kernel".to_owned(), kernel.display().to_string()]);
        args.extend(["--initramfs".to_owned(), initrd.display().to_string()]);
        args.extend(["--cmdline", &cmdline, "--cpus", &cpus, "--memory", &memory].map(str::to_owned));
        args.extend(more.iter().map(ToString::to_string));
        let process = Process::start(&self.world, &format!("Linux on {}", self.name), &args, 0)?;
        let console = Console::new(Arc::clone(process.serial()));
        Ok(Linux {
            vm: Vm::new(process, console),
            heard: 0,
        })
    }
}

fn made(variable: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    let path =
        path.with_context(|| format!("{variable} is not set: `eval \"$(cargo xtask linux)\"`, or `cargo xtask test`"))?;
    ensure!(path.is_file(), "{variable}={}: no such file", path.display());
    Ok(path)
}

impl Linux {
    /// Wait for a line with `words` in it, behind the last one waited for; the line.
    pub fn says(&mut self, words: &str) -> Result<String> {
        let Self { vm, heard } = self;
        let from = *heard;
        let found = vm.process.bell().wait(PATIENCE, || {
            let text = vm.console.text();
            let fresh = &text[from.min(text.len())..];
            let mut at = from;
            for line in fresh.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
                at += line.len();
                if line.contains("CORRUPT") || line.contains("Kernel panic") {
                    return Some(Err(line.trim().to_owned()));
                }
                if line.contains(words) {
                    return Some(Ok((at, line.trim().to_owned())));
                }
            }
            vm.process
                .serial()
                .has_ended()
                .then(|| Err("its console has ended".to_owned()))
        });
        match found {
            Some(Ok((at, line))) => {
                self.heard = at;
                Ok(line)
            }
            Some(Err(why)) => bail!("{}: {why} while waiting for: {words}", self.vm.process.name()),
            None => bail!("{}: waited {PATIENCE:?} in vain for: {words}", self.vm.process.name()),
        }
    }

    /// Skip what it has said so far.
    pub fn from_now_on(&mut self) {
        self.heard = self.vm.console.text().len();
    }

    /// How often it has said a line with `words` in it, everywhere it was.
    pub fn said(&self, words: &str) -> usize {
        self.vm
            .console
            .text()
            .lines()
            .filter(|line| line.contains(words))
            .count()
    }

    /// Have `shadow` follow it, and move it there.
    pub fn moves_to(self, shadow: Shadow, how: &Move) -> Result<(Self, Report)> {
        let Self { mut vm, heard } = self;
        vm.protect_directly(&shadow)?;
        let job = vm.migrate(how)?;
        let (vm, report) = vm.arrives_at(shadow, job)?;
        Ok((Self { vm, heard }, report))
    }
}
