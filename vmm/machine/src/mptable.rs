//! The table that tells a kernel without ACPI which processors and interrupt lines there are.
//!
//! Intel MultiProcessor Specification 1.4: a floating pointer where kernels look for it (the last KiB of low memory), then
//! the configuration table: processors, one ISA bus, one IOAPIC, its sixteen ISA interrupts, and the two local ones.

use umbra_units::{Gpa, Writer};

use crate::error::Error;
use crate::memory::Memory;

/// Where the floating pointer lies: the last KiB below 640 KiB.
pub(crate) const BASE: Gpa = Gpa(0x9_fc00);

const POINTER_BYTES: u64 = 16;
const HEADER_BYTES: usize = 44;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const ISA_INTERRUPTS: u8 = 16;
/// "All local APICs".
const EVERYBODY: u8 = 0xff;

/// Write both structures for a machine of `cpus` processors.
pub(crate) fn write(memory: &Memory, cpus: u8) -> Result<(), Error> {
    let table = table(cpus);
    let at = BASE.0 + POINTER_BYTES;
    let mut pointer = Writer::new();
    let at32 = u32::try_from(at).expect("the table lies below 1 MiB");
    // Length in paragraphs, specification revision 1.4, checksum to come, no default configuration.
    pointer.put(b"_MP_").u32(at32).u8(1).u8(4).u8(0).put(&[0; 5]);
    let mut pointer = pointer.into_bytes();
    pointer[10] = checksum(&pointer);
    memory.write(BASE, &pointer)?;
    memory.write(Gpa(at), &table)
}

fn table(cpus: u8) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut w = Writer::new();
    // Header: length, revision, checksum and entry count are filled in below.
    w.put(b"PCMP").u16(0).u8(4).u8(0).put(b"UMBRA   ").put(b"MACHINE     ");
    w.u32(0).u16(0).u16(0).u32(LAPIC_ADDRESS).u16(0).u8(0).u8(0);
    let mut entries: u16 = 0;
    for cpu in 0..cpus {
        // Enabled; bit 1: the bootstrap processor. Signature and features of a P6: nobody reads them beside CPUID.
        w.u8(0)
            .u8(cpu)
            .u8(APIC_VERSION)
            .u8(1 | u8::from(cpu == 0) << 1)
            .u32(0x600)
            .u32(0x201)
            .u64(0);
        entries += 1;
    }
    w.u8(1).u8(0).put(b"ISA   ");
    w.u8(2).u8(ioapic_id).u8(APIC_VERSION).u8(1).u32(IOAPIC_ADDRESS);
    entries += 2;
    for irq in 0..ISA_INTERRUPTS {
        // KVM wires the PIT (irq 0) to pin 2 as well as pin 0, and kernels look for it where irq 0 says.
        w.u8(3).u8(0).u16(0).u8(0).u8(irq).u8(ioapic_id).u8(irq);
        entries += 1;
    }
    // LINT0: the PIC's interrupt (ExtINT). LINT1: NMI.
    w.u8(4).u8(3).u16(0).u8(0).u8(0).u8(EVERYBODY).u8(0);
    w.u8(4).u8(1).u16(0).u8(0).u8(0).u8(EVERYBODY).u8(1);
    entries += 2;

    let mut bytes = w.into_bytes();
    let len = u16::try_from(bytes.len()).expect("at most 32 processors");
    bytes[4..6].copy_from_slice(&len.to_le_bytes());
    bytes[34..36].copy_from_slice(&entries.to_le_bytes());
    bytes[7] = checksum(&bytes);
    debug_assert!(bytes.len() > HEADER_BYTES);
    bytes
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    #[test]
    fn the_table_sums_to_zero_and_fits_below_640_kib_for_every_number_of_processors() {
        for cpus in 1..=limits::CPUS {
            let table = table(cpus);
            assert_eq!(checksum(&table), 0);
            assert!(BASE.0 + POINTER_BYTES + table.len() as u64 <= 0xa_0000);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), HEADER_BYTES + 20 * usize::from(cpus) + 8 * (2 + 16 + 2));
        }
    }
}
