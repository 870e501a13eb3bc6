//! Has this machine what a build needs, and can it run guests?
//!
//! A fresh Debian machine needs little: cargo brings its compiler, the guest kernel is built for the ordinary Linux
//! target. What is missing is installed when we are root and there is an apt, and named otherwise.

use std::{
    env,
    fmt::Write as _,
    fs::OpenOptions,
    io::{self, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use crate::house::{Outcome, show};

/// A program the build or the tests call, and where Debian keeps it.
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    /// A harmless call that succeeds when the tool is in order.
    pub(crate) probe: &'static [&'static str],
    pub(crate) packages: &'static [&'static str],
    pub(crate) why: &'static str,
}

const TOOLS: &[Tool] = &[
    Tool {
        program: "cc",
        probe: &["--version"],
        packages: &["gcc", "libc6-dev"],
        why: "links every program, and compiles the C parts of ring and reed-solomon-erasure",
    },
    Tool {
        program: "ld",
        probe: &["--version"],
        packages: &["binutils"],
        why: "lays out the guest kernel",
    },
    Tool {
        program: "ip",
        probe: &["-V"],
        packages: &["iproute2"],
        why: "makes the networks of the tests with network cards, each in a namespace of its own",
    },
    Tool {
        program: "mkfs.ext4",
        probe: &["-V"],
        packages: &["e2fsprogs"],
        why: "makes the filesystem that a guest keeps across moves",
    },
];

/// What this machine can do beyond building.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// Why no guest can run here; `None` when guests can.
    pub(crate) no_kvm: Option<String>,
    /// rustfmt and clippy are missing, and this is how to add them.
    pub(crate) no_style: Option<String>,
}

/// Checks and installs; says what it did and what the machine can do.
pub(crate) fn setup() -> Outcome<Abilities> {
    install_missing(TOOLS)?;
    let abilities = Abilities {
        no_kvm: kvm_refusal(Path::new("/dev/kvm")),
        no_style: style_refusal(),
    };
    eprintln!("setup: build tools are here");
    match &abilities.no_style {
        None => eprintln!("setup: rustfmt and clippy are here"),
        Some(why) => eprintln!("setup: {why}"),
    }
    match &abilities.no_kvm {
        None => eprintln!("setup: /dev/kvm opens for reading and writing: guests can run here"),
        Some(why) => eprintln!("{}", banner(why)),
    }
    Ok(abilities)
}

/// What nobody should overlook.
pub(crate) fn banner(why: &str) -> String {
    let bar = "!".repeat(96);
    let mut text = format!("{bar}\n!! NO GUEST CAN RUN ON THIS MACHINE. Everything that needs one will be SKIPPED.\n");
    for line in why.lines() {
        let _ = writeln!(text, "!! {line}");
    }
    text.push_str(&bar);
    text
}

/// Sees to it that these tools are here, or says what to install.
pub(crate) fn install_missing(tools: &[Tool]) -> Outcome<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| !answers(tool.program, tool.probe)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut needed = String::new();
    for tool in &missing {
        let _ = write!(
            needed,
            "\n  {} ({}), package {}",
            tool.program,
            tool.why,
            tool.packages.join(" ")
        );
    }
    let packages: Vec<&str> = missing.iter().flat_map(|tool| tool.packages).copied().collect();
    let by_hand = format!("apt-get update && apt-get install --yes {}", packages.join(" "));
    if !is_root() || !answers("apt-get", &["--version"]) {
        return Err(format!(
            "this machine lacks:{needed}\ninstall them as root, on Debian by\n  {by_hand}"
        ));
    }
    eprintln!("setup: this machine lacks:{needed}");
    apt(&["update"])?;
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&packages);
    apt(&install)?;
    match missing.iter().find(|tool| !answers(tool.program, tool.probe)) {
        None => Ok(()),
        Some(tool) => Err(format!("`{}` still does not work after `{by_hand}`", tool.program)),
    }
}

/// Fetches the lists of packages, where this user may.
pub(crate) fn update_lists() -> Outcome<()> {
    if is_root() && answers("apt-get", &["--version"]) {
        apt(&["update"])
    } else {
        Err("this machine has no list of Debian's packages: `apt-get update` as root fetches it, on Debian".to_owned())
    }
}

fn apt(args: &[&str]) -> Outcome<()> {
    let mut command = Command::new("apt-get");
    // Nobody is there to answer a question.
    command
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    // Standard output is for what was asked for, for example the path that `xtask guest` prints.
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot start apt-get: {error}"))?;
    let _ = io::stderr().write_all(&output.stdout);
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("`{}` failed ({})", show(&command), output.status))
    }
}

/// Why style cannot be checked, after having tried to make it possible.
fn style_refusal() -> Option<String> {
    let present = || answers("cargo", &["fmt", "--version"]) && answers("cargo", &["clippy", "--version"]);
    if present() {
        return None;
    }
    if answers("rustup", &["--version"]) {
        eprintln!("setup: adding rustfmt and clippy");
        let _ = Command::new("rustup")
            .args(["component", "add", "rustfmt", "clippy"])
            .stdin(Stdio::null())
            .status();
        if present() {
            return None;
        }
    }
    Some(
        "rustfmt or clippy is missing: `rustup component add rustfmt clippy`, or install your distribution's \
         rustfmt and rust-clippy"
            .to_owned(),
    )
}

/// Why no guest can run here, in words that say what to do about it.
fn kvm_refusal(device: &Path) -> Option<String> {
    let name = device.display();
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => None,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(format!(
            "{name} does not exist: load kvm_intel or kvm_amd, switch virtualisation on in the firmware,\n\
             or, in a virtual machine, allow nested virtualisation."
        )),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Some(format!(
            "{name} exists, but this user may not open it for reading and writing:\n\
             join its group (usually `usermod --append --groups kvm USER`) and log in again."
        )),
        Err(error) => Some(format!("{name} does not open: {error}")),
    }
}

fn answers(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    let id = Command::new("id").arg("--user").output();
    id.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

/// Whether this is a machine that must not let anything pass unseen.
pub(crate) fn is_ci() -> bool {
    env::var("CI").is_ok_and(|value| value == "true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_kvm_is_told_what_to_do() {
        let refusal = kvm_refusal(Path::new("/nonexistent/kvm")).unwrap();
        assert!(
            refusal.starts_with("/nonexistent/kvm does not exist: load kvm_intel or kvm_amd"),
            "{refusal}"
        );
        let shown = banner(&refusal);
        assert!(shown.contains("!! NO GUEST CAN RUN ON THIS MACHINE"), "{shown}");
        assert!(shown.lines().all(|line| line.starts_with("!!")), "{shown}");
    }

    #[test]
    fn a_device_that_opens_is_no_refusal() {
        assert_eq!(kvm_refusal(Path::new("/dev/null")), None);
    }

    #[test]
    fn a_program_that_is_not_there_does_not_answer() {
        assert!(answers("cargo", &["--version"]));
        assert!(!answers("a-program-nobody-has", &["--version"]));
        assert!(!answers("false", &[]), "a program that fails is not in order");
    }
}
