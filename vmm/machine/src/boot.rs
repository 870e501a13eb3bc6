//! Starting a kernel: the PVH way.
//!
//! PVH is the simplest contract a VMM and a kernel can have (Xen, "x86/HVM direct boot ABI"): the ELF file names a 32-bit
//! entry in a note, the processor starts there in protected mode without paging, and `ebx` points to a structure that
//! says where the command line, the memory map and the initial RAM disk are. Linux and our own tiny kernel both speak it,
//! and so does QEMU's `-kernel`.
//!
//! ```text
//! 0x0_0500   GDT for the segments the processor starts with
//! 0x0_6000   hvm_start_info
//! 0x0_6100   module list (the initial RAM disk)
//! 0x0_7000   memory map
//! 0x2_0000   command line
//! 0x9_fc00   MP table (see mptable.rs)
//! 0xa_0000   reserved, as on every PC
//! 0x10_0000  the kernel, usually
//!            ... the initial RAM disk at the end of RAM below the hole
//! ```

use std::fs::File;
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use umbra_core::guest::Space;
use umbra_units::{Gpa, Writer};
use vm_memory::{Bytes as _, GuestAddress};

use crate::config::MachineConfig;
use crate::error::Error;
use crate::memory::Memory;
use crate::mptable;

const GDT: Gpa = Gpa(0x500);
const START_INFO: Gpa = Gpa(0x6000);
const MODULES: Gpa = Gpa(0x6100);
const MEMORY_MAP: Gpa = Gpa(0x7000);
const CMDLINE: Gpa = Gpa(0x2_0000);

/// Where a PC's usable low memory ends, below the tables firmware keeps there.
const LOW_MEMORY_END: u64 = mptable::BASE.0;
/// Where a PC's usable memory goes on.
const HIGH_MEMORY: u64 = 0x10_0000;

/// xen/include/public/arch-x86/hvm/start_info.h
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

/// Where a loaded kernel begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(Gpa);

/// Put the kernel and everything it is told into memory.
pub(crate) fn load(memory: &Memory, config: &MachineConfig) -> Result<Entry, Error> {
    let (entry, kernel_end) = load_kernel(memory, config.kernel())?;
    let initrd = config
        .initrd()
        .map(|path| load_initrd(memory, path, kernel_end))
        .transpose()?;
    write_start_info(memory, config, initrd)?;
    mptable::write(memory, config.shape().cpus())?;
    memory.write(GDT, &gdt())?;
    Ok(entry)
}

fn load_kernel(memory: &Memory, path: &Path) -> Result<(Entry, u64), Error> {
    let refuse = |why: String| Error::File {
        path: path.to_owned(),
        why,
    };
    let mut file = File::open(path).map_err(|error| refuse(format!("cannot open the kernel: {error}")))?;
    let KernelLoaderResult {
        pvh_boot_cap,
        kernel_end,
        ..
    } = Elf::load(memory.ram(), None, &mut file, None)
        .map_err(|error| refuse(format!("not a kernel for us: {error}")))?;
    let PvhBootCapability::PvhEntryPresent(entry) = pvh_boot_cap else {
        return Err(refuse(
            "expected an ELF file with a PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY)".to_owned(),
        ));
    };
    Ok((Entry(Gpa(entry.0)), kernel_end))
}

/// Put the initial RAM disk at the end of RAM below the hole, where no kernel unpacks itself.
fn load_initrd(memory: &Memory, path: &Path, kernel_end: u64) -> Result<(Gpa, u64), Error> {
    let refuse = |why: String| Error::File {
        path: path.to_owned(),
        why,
    };
    let cannot = |error: std::io::Error| refuse(format!("cannot read the initrd: {error}"));
    let mut file = File::open(path).map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    let ram_end = memory.blocks()[0].pages.bytes();
    let start = ram_end
        .checked_sub(bytes)
        .map(|start| start & !0xfff)
        .filter(|start| *start >= kernel_end);
    let Some(start) = start else {
        return Err(refuse(format!(
            "an initrd of {bytes} bytes does not fit beside the kernel in {ram_end} bytes"
        )));
    };
    let len = usize::try_from(bytes).map_err(|_| refuse("too large".to_owned()))?;
    memory
        .ram()
        .read_exact_volatile_from(GuestAddress(start), &mut file, len)
        .map_err(|error| refuse(format!("cannot read the initrd: {error}")))?;
    Ok((Gpa(start), bytes))
}

fn write_start_info(memory: &Memory, config: &MachineConfig, initrd: Option<(Gpa, u64)>) -> Result<(), Error> {
    let mut cmdline = config.cmdline().as_bytes().to_vec();
    cmdline.push(0);
    memory.write(CMDLINE, &cmdline)?;

    let map = memory_map(memory.space());
    let mut w = Writer::new();
    for (address, bytes, kind) in &map {
        w.u64(*address).u64(*bytes).u32(*kind).u32(0);
    }
    memory.write(MEMORY_MAP, w.as_slice())?;

    if let Some((address, bytes)) = initrd {
        let mut w = Writer::new();
        w.u64(address.0).u64(bytes).u64(0).u64(0);
        memory.write(MODULES, w.as_slice())?;
    }

    let entries = u32::try_from(map.len()).expect("a handful");
    let mut w = Writer::new();
    w.u32(START_INFO_MAGIC)
        .u32(START_INFO_VERSION)
        .u32(0)
        .u32(u32::from(initrd.is_some()));
    w.u64(if initrd.is_some() { MODULES.0 } else { 0 }).u64(CMDLINE.0);
    // No ACPI: the root pointer stays zero.
    w.u64(0).u64(MEMORY_MAP.0).u32(entries).u32(0);
    memory.write(START_INFO, w.as_slice())
}

/// What the kernel may use: all RAM but the last KiB of low memory (tables) and what is between 640 KiB and 1 MiB.
fn memory_map(ram: &Space) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_MEMORY_END, MAP_RAM),
        (LOW_MEMORY_END, HIGH_MEMORY - LOW_MEMORY_END, MAP_RESERVED),
    ];
    for (first, pages) in &ram.present {
        let start = first.gpa().0.max(HIGH_MEMORY);
        map.push((start, first.gpa().0 + pages.bytes() - start, MAP_RAM));
    }
    map
}

/// Flat 4 GiB segments, and the task state a processor must have.
fn gdt() -> Vec<u8> {
    let mut w = Writer::new();
    w.u64(0)
        .u64(0x00cf_9b00_0000_ffff)
        .u64(0x00cf_9300_0000_ffff)
        .u64(0x0000_8b00_0000_0067);
    w.into_bytes()
}

/// Set the boot processor at the kernel's door, as the ABI wants it: protected mode, no paging, flat segments,
/// interrupts off, `ebx` at the start info.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read special registers"))?;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x08, 0xb);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(0x10, 0x3);
    }
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = 0x1f;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    // Protection enabled, extension type (which processors fix to 1).
    sregs.cr0 = 0x11;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set special registers"))?;
    let regs = kvm_regs {
        rip: entry.0.0,
        rbx: START_INFO.0,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))
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
                (0, 0x9_fc00, MAP_RAM),
                (0x9_fc00, 0x6_0400, MAP_RESERVED),
                (0x10_0000, 0xbff0_0000, MAP_RAM),
                (0x1_0000_0000, 0x8000_0000, MAP_RAM)
            ]
        );
    }
}
