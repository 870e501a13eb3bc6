//! Telling a kernel of its virtio devices on the command line, when it cannot be told in any other way.
//!
//! A kernel that knows ACPI finds them in the tables (see [`crate::acpi`]), and must not be told twice: Linux takes a second word
//! about a device for an error, and refuses to load a driver that was given one as a parameter. A kernel without ACPI reads
//! `virtio_mmio.device=SIZE@ADDRESS:IRQ`. Which kind a kernel is shows in its file: whoever looks for ACPI's tables looks
//! for their signature. The file of a bzImage is compressed; such a kernel is taken to know ACPI unless it is told not to.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use crate::acpi::MmioWindow;

/// What marks the root of ACPI's tables, and stands in every kernel that looks for it.
const SIGNATURE: &[u8] = b"RSD PTR ";
const ELF: &[u8] = b"\x7fELF";

/// `cmdline` with what the kernel at `path` must be told of devices at `windows`.
pub(super) fn cmdline(path: &Path, cmdline: &str, windows: &[MmioWindow]) -> io::Result<String> {
    let mut line = cmdline.to_owned();
    if windows.is_empty() || cmdline.contains("virtio_mmio.device=") {
        return Ok(line); // none, or somebody takes care of it
    }
    let without_acpi = cmdline.split_ascii_whitespace().any(|word| word == "acpi=off");
    if !without_acpi && knows_acpi(&std::fs::read(path)?) {
        return Ok(line);
    }
    for MmioWindow { base, len, irq } in windows {
        let space = if line.is_empty() { "" } else { " " };
        write!(line, "{space}virtio_mmio.device={}K@{base:#x}:{irq}", len / 1024).expect("a String takes anything");
    }
    Ok(line)
}

fn knows_acpi(kernel: &[u8]) -> bool {
    !kernel.starts_with(ELF) || kernel.windows(SIGNATURE.len()).any(|here| here == SIGNATURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(kernel: &[u8], line: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), kernel).unwrap();
        let windows: Vec<MmioWindow> = (0..2)
            .map(|n| MmioWindow {
                base: 0xd000_0000 + n * 0x1000,
                len: 0x1000,
                irq: 5 + n,
            })
            .collect();
        cmdline(file.path(), line, &windows).unwrap()
    }

    #[test]
    fn a_kernel_is_told_of_its_devices_once() {
        let words = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
        assert_eq!(told(b"\x7fELF without", "quiet"), format!("quiet {words}"));
        assert_eq!(told(b"\x7fELF without", ""), words);
        assert_eq!(told(b"\x7fELF ... RSD PTR ...", "quiet"), "quiet");
        assert_eq!(
            told(b"\x7fELF ... RSD PTR ...", "acpi=off"),
            format!("acpi=off {words}")
        );
        assert_eq!(told(b"MZ compressed", "quiet"), "quiet");
        assert_eq!(
            told(b"MZ compressed", "quiet acpi=off"),
            format!("quiet acpi=off {words}")
        );
        let own = "virtio_mmio.device=4K@0x1:2";
        assert_eq!(told(b"\x7fELF without", own), own);
    }
}
