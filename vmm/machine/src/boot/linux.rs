//! Linux's own way, in 64 bits (Linux, "The Linux/x86 Boot Protocol", 64-bit Boot Protocol).
//!
//! The processor starts in long mode with memory mapped onto itself, and `rsi` points to the *zero page*: the setup
//! header of a bzImage, or one of ours, with the command line, the initial RAM disk, the e820 map and ACPI's root.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use umbra_units::{Gpa, Writer};
use vm_memory::GuestAddress;

use super::{CMDLINE, CODE64, Initrd, flat, memory_map, protected};
use crate::error::Error;
use crate::memory::Memory;

const ZERO_PAGE: Gpa = Gpa(0x8000);
const PAGE_TABLES: Gpa = Gpa(0x9000);

/// A boot loader without an assigned number (Documentation/arch/x86/boot.rst, `type_of_loader`).
const LOADER_UNDEFINED: u8 = 0xff;

/// GiB of memory mapped onto themselves: all below 4 GiB, where everything is that the kernel is told of.
const MAPPED_GIB: u64 = 4;
const PAGE: u64 = 0x1000;
const TABLE_ENTRIES: u64 = 512;
/// Present, writable; a leaf of 2 MiB.
const ENTRY: u64 = 0x3;
const LEAF: u64 = 0x83;

/// The header a `vmlinux` does not have: what a kernel looks at that was entered without its own boot code.
pub(super) fn header_of_ours() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        // "HdrS"
        header: 0x5372_6448,
        version: 0x020f,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    }
}

/// Tell the kernel what there is.
pub(super) fn write(
    memory: &Memory,
    header: setup_header,
    cmdline: &str,
    initrd: Option<Initrd>,
    acpi_root: Gpa,
) -> Result<(), Error> {
    let below_4g = |n: u64| u32::try_from(n).expect("everything the kernel is told of lies below 4 GiB");
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: acpi_root.0,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = below_4g(CMDLINE.0);
    params.hdr.cmdline_size = below_4g(cmdline.len() as u64);
    if let Some((address, bytes)) = initrd {
        params.hdr.ramdisk_image = below_4g(address.0);
        params.hdr.ramdisk_size = below_4g(bytes);
    }
    let map = memory_map(memory.space());
    for (place, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *place = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind as u32,
        };
    }
    params.e820_entries = u8::try_from(map.len()).expect("a handful");
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE.0));
    LinuxBootConfigurator::write_bootparams(&params, memory.ram())
        .map_err(|error| Error::Incompatible(error.to_string()))?;
    memory.write(PAGE_TABLES, &page_tables())
}

/// The first 4 GiB mapped onto themselves in leaves of 2 MiB.
fn page_tables() -> Vec<u8> {
    let directories = PAGE_TABLES.0 + 2 * PAGE;
    let mut w = Writer::new();
    let mut table = |filled: u64, entry: &dyn Fn(u64) -> u64| {
        for n in 0..TABLE_ENTRIES {
            w.u64(if n < filled { entry(n) } else { 0 });
        }
    };
    table(1, &|_| (PAGE_TABLES.0 + PAGE) | ENTRY);
    table(MAPPED_GIB, &|n| (directories + n * PAGE) | ENTRY);
    for gib in 0..MAPPED_GIB {
        table(TABLE_ENTRIES, &|n| (gib << 30) | (n << 21) | LEAF);
    }
    w.into_bytes()
}

/// Long mode, `rsi` at the zero page.
pub(super) fn enter(sregs: &mut kvm_sregs, regs: &mut kvm_regs, entry: Gpa) {
    const CR0_PAGING: u64 = 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LONG_MODE_ENABLED_AND_ACTIVE: u64 = 1 << 8 | 1 << 10;
    let code = kvm_segment {
        db: 0,
        l: 1,
        ..flat(CODE64, 0xb)
    };
    protected(sregs, code);
    sregs.cr3 = PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 |= CR0_PAGING;
    sregs.efer = EFER_LONG_MODE_ENABLED_AND_ACTIVE;
    regs.rip = entry.0;
    regs.rsi = ZERO_PAGE.0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_tables_map_four_gib_onto_themselves() {
        let tables = page_tables();
        assert!(
            PAGE_TABLES.0 + tables.len() as u64 <= 0xf000,
            "the map in mod.rs says so"
        );
        let entry = |table: u64, n: u64| {
            let at = usize::try_from(table - PAGE_TABLES.0 + n * 8).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [
            0,
            0x8000,
            0x10_0000,
            0x3fff_ffff,
            0x4000_0000,
            0xfee0_0000,
            0xffff_ffff_u64,
        ] {
            let pointers = entry(PAGE_TABLES.0, 0) & !0xfff;
            let directory = entry(pointers, address >> 30) & !0xfff;
            let leaf = entry(directory, address >> 21 & 0x1ff);
            assert_eq!(leaf & 0xfff, LEAF);
            assert_eq!((leaf & !0xfff) | (address & 0x1f_ffff), address);
        }
    }
}
