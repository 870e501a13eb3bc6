//! QEMU beside us: the same guest image, devices of the same kind, in the same run.
//!
//! `-M microvm` with virtio-mmio is the machine of QEMU's that is most like ours. It boots the tiny kernel by the same
//! note, and appends the same `virtio_mmio.device=` words to its command line. The processor is the host's, without the
//! one MSR (`arch-capabilities`) that software-virtualised hosts refuse; devices have QEMU's own defaults.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const QEMU: &str = "qemu-system-x86_64";

/// Why there is nobody to compare with; nothing if there is.
pub(crate) fn missing() -> Option<String> {
    let version = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match version {
        Ok(status) if status.success() => None,
        _ => Some(format!(
            "{QEMU} does not run here: install it (Debian: apt-get install qemu-system-x86)"
        )),
    }
}

/// QEMU with this guest and these devices.
fn command(kernel: &Path, memory_mib: u32, options: &str, devices: &[String]) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args(["-M", "microvm,acpi=off,auto-kernel-cmdline=on,rtc=off", "-accel", "kvm"])
        .args([
            "-cpu",
            "host,-arch-capabilities",
            "-smp",
            "1",
            "-m",
            &memory_mib.to_string(),
        ])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args([
            "-nographic",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"])
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", options])
        .args(devices)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// What a guest says that ends by itself.
pub(crate) fn says(kernel: &Path, memory_mib: u32, options: &str, devices: &[String]) -> Result<String> {
    let output = command(kernel, memory_mib, options, devices).output().context(QEMU)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    // isa-debug-exit turns the guest's code 0 into 1.
    ensure!(
        output.status.code() == Some(1),
        "{QEMU} ended with {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// A guest under QEMU that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Running(Child);

/// Starts one.
pub(crate) fn launch(kernel: &Path, memory_mib: u32, options: &str, devices: &[String]) -> Result<Running> {
    let mut command = command(kernel, memory_mib, options, devices);
    // What it says is not needed, and a pipe that nobody reads would stop it.
    command.stdout(Stdio::null()).stderr(Stdio::inherit());
    Ok(Running(command.spawn().context(QEMU)?))
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
