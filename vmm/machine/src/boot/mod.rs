//! Starting a kernel: what it finds in memory, and how the boot processor meets it.
//!
//! Three kinds of file are understood, told apart by what is in them:
//!
//! | file | contract | entered |
//! |---|---|---|
//! | ELF with a PVH note | Xen, "x86/HVM direct boot ABI" | 32-bit, no paging |
//! | ELF without one (`vmlinux`) | Linux, "The Linux/x86 Boot Protocol", 64-bit | long mode, at the ELF entry |
//! | bzImage of protocol 2.12 or later | the same | long mode, 0x200 behind the image's start |
//!
//! A bzImage unpacks itself, which takes the guest some hundred million instructions: an instant on a processor with
//! virtualisation, minutes on hosts that emulate the guest's kernel mode (`umbra doctor` tells). There, give the `vmlinux`.
//!
//! ```text
//! 0x0_0500   GDT for the segments the processor starts with
//! 0x0_6000   PVH: hvm_start_info, the module list (the initial RAM disk), memory map at 0x7000
//! 0x0_8000   Linux: the zero page
//! 0x0_9000   Linux: page tables, up to 0xf000
//! 0x2_0000   command line
//! 0x9_fc00   MP table (see mptable.rs)
//! 0xa_0000   reserved, as on every PC
//! 0xe_0000   ACPI tables (see acpi.rs)
//! 0x10_0000  the kernel, usually
//!            ... the initial RAM disk at the end of RAM below the hole
//! ```
//!
//! Everything is read again from the same files when the guest is booted again: see [`BootFiles`].

mod announce;
mod image;
mod linux;
mod pvh;

use std::fs::File;
use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use umbra_core::guest::Space;
use umbra_units::{Gpa, Writer};
use vm_memory::{Bytes as _, GuestAddress};

use crate::acpi::Tables;
use crate::error::Error;
use crate::memory::Memory;
use crate::{acpi, mptable};
use image::{Image, Protocol};

const GDT: Gpa = Gpa(0x500);
const CMDLINE: Gpa = Gpa(0x2_0000);

/// Where a PC's usable low memory ends, below the tables firmware keeps there.
const LOW_MEMORY_END: u64 = mptable::BASE.0;
/// Where a PC's usable memory goes on.
const HIGH_MEMORY: u64 = 0x10_0000;

/// The files a guest is booted from, the first time and again after each reset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk, if it has one.
    pub initrd: Option<PathBuf>,
}

/// Where a loaded kernel begins, and in which state it wants the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    Pvh(Gpa),
    Linux(Gpa),
}

/// The initial RAM disk's place and length.
type Initrd = (Gpa, u64);

/// What kind of memory a run of the map is; Xen and e820 use the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One run of the memory map: address, bytes, kind.
type Run = (u64, u64, Kind);

/// Put the kernel and everything it is told into memory.
pub(crate) fn load(memory: &Memory, files: &BootFiles, cmdline: &str, tables: &Tables<'_>) -> Result<Entry, Error> {
    let image = Image::load(memory, &files.kernel)?;
    let cmdline = announce::cmdline(&files.kernel, cmdline, tables.mmio).map_err(|error| Error::File {
        path: files.kernel.clone(),
        why: format!("cannot read the kernel: {error}"),
    })?;
    image.takes(&cmdline)?;
    let initrd = files
        .initrd
        .as_deref()
        .map(|path| load_initrd(memory, path, &image))
        .transpose()?;
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    memory.write(CMDLINE, &line)?;
    let root = acpi::write(memory, tables)?;
    mptable::write(memory, tables.cpus)?;
    memory.write(GDT, &gdt())?;
    match image.protocol {
        Protocol::Pvh(entry) => {
            pvh::write(memory, initrd, root)?;
            Ok(Entry::Pvh(entry))
        }
        Protocol::Linux { entry, header } => {
            linux::write(memory, header, &cmdline, initrd, root)?;
            Ok(Entry::Linux(entry))
        }
    }
}

/// Put the initial RAM disk at the end of RAM below the hole, where no kernel unpacks itself.
fn load_initrd(memory: &Memory, path: &Path, image: &Image) -> Result<Initrd, Error> {
    let refuse = |why: String| Error::File {
        path: path.to_owned(),
        why,
    };
    let cannot = |error: std::io::Error| refuse(format!("cannot read the initrd: {error}"));
    let mut file = File::open(path).map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    let end = memory.blocks()[0].pages.bytes().min(image.initrd_end);
    let start = end
        .checked_sub(bytes)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= image.end);
    let Some(start) = start else {
        return Err(refuse(format!(
            "an initrd of {bytes} bytes does not fit beside the kernel, which needs all up to {} of {end} bytes",
            image.end
        )));
    };
    let len = usize::try_from(bytes).map_err(|_| refuse("too large".to_owned()))?;
    memory
        .ram()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len)
        .map_err(|error| refuse(format!("cannot read the initrd: {error}")))?;
    Ok((Gpa(start), bytes))
}

/// What the kernel may use: all RAM but the last KiB of low memory (tables) and what is between 640 KiB and 1 MiB.
fn memory_map(ram: &Space) -> Vec<Run> {
    let mut map = vec![
        (0, LOW_MEMORY_END, Kind::Ram),
        (LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, Kind::Reserved),
    ];
    for (first, pages) in &ram.present {
        let start = first.gpa().0.max(HIGH_MEMORY);
        map.push((start, first.gpa().0 + pages.bytes() - start, Kind::Ram));
    }
    map
}

/// Flat segments for both contracts, and the task state a processor must have. Linux wants its code at 0x10 and its data
/// at 0x18; PVH leaves the choice to us.
fn gdt() -> Vec<u8> {
    let mut w = Writer::new();
    // Nothing, 32-bit code, 64-bit code, data, task state.
    w.u64(0)
        .u64(0x00cf_9b00_0000_ffff)
        .u64(0x00af_9b00_0000_ffff)
        .u64(0x00cf_9300_0000_ffff)
        .u64(0x0000_8b00_0000_0067);
    w.into_bytes()
}

const CODE32: u16 = 0x08;
const CODE64: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
const GDT_BYTES: u16 = 0x28;

/// Set the boot processor, which is at power-on, at the kernel's door. Interrupts are off under both contracts.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read special registers"))?;
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(DATA, 0x3);
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TASK,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = GDT_BYTES - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let mut regs = kvm_regs {
        rflags: 2,
        ..Default::default()
    };
    match entry {
        Entry::Pvh(at) => pvh::enter(&mut sregs, &mut regs, at),
        Entry::Linux(at) => linux::enter(&mut sregs, &mut regs, at),
    }
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set special registers"))?;
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))
}

/// A segment that is all of the address space.
fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// CR0: protection enabled, extension type (which processors fix to 1).
const CR0_PROTECTED: u64 = 0x11;

/// Set what both contracts set differently from power-on.
const fn protected(sregs: &mut kvm_sregs, code: kvm_segment) {
    sregs.cs = code;
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr4 = 0;
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Bytes;

    use crate::config::{Shape, Sharing};

    #[test]
    fn the_memory_map_is_all_of_ram_but_what_every_pc_reserves() {
        let map = memory_map(&Shape::new(1, Bytes::mib(5120), Sharing::Private).unwrap().ram());
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, Kind::Ram),
                (0x9_fc00, 0x6_0400, Kind::Reserved),
                (0x10_0000, 0xbff0_0000, Kind::Ram),
                (0x1_0000_0000, 0x8000_0000, Kind::Ram)
            ]
        );
    }
}
