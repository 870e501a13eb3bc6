//! The PVH way (Xen, "x86/HVM direct boot ABI").
//!
//! The simplest contract a VMM and a kernel can have: the ELF file names a 32-bit entry in a note, the processor starts
//! there in protected mode without paging, and `ebx` points to a structure that says where the command line, the memory
//! map, the initial RAM disk and ACPI's root are. Linux and our own tiny kernel both speak it, and so does QEMU's
//! `-kernel`.

use kvm_bindings::{kvm_regs, kvm_sregs};
use umbra_units::{Gpa, Writer};

use super::{CMDLINE, CODE32, Initrd, flat, memory_map, protected};
use crate::error::Error;
use crate::memory::Memory;

const START_INFO: Gpa = Gpa(0x6000);
const MODULES: Gpa = Gpa(0x6100);
const MEMORY_MAP: Gpa = Gpa(0x7000);

/// xen/include/public/arch-x86/hvm/start_info.h
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;

/// Tell the kernel what there is.
pub(super) fn write(memory: &Memory, initrd: Option<Initrd>, acpi_root: Gpa) -> Result<(), Error> {
    let map = memory_map(memory.space());
    let mut w = Writer::new();
    for (address, bytes, kind) in &map {
        w.u64(*address).u64(*bytes).u32(*kind as u32).u32(0);
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
    w.u64(acpi_root.0).u64(MEMORY_MAP.0).u32(entries).u32(0);
    memory.write(START_INFO, w.as_slice())
}

/// Protected mode, no paging, `ebx` at the start info.
pub(super) fn enter(sregs: &mut kvm_sregs, regs: &mut kvm_regs, entry: Gpa) {
    protected(sregs, flat(CODE32, 0xb));
    regs.rip = entry.0;
    regs.rbx = START_INFO.0;
}
