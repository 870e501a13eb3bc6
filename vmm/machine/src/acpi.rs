//! The tables by which a kernel with ACPI learns what machine this is (ACPI 6.5, 5.2).
//!
//! As small as a machine with the fixed hardware of a PC can have them: which processors and interrupt controllers there
//! are (MADT), where the power button, the way off and the way to a reset are (FADT, for [`umbra_devices::AcpiPm`]), and
//! in bytecode (DSDT) what no kernel can find by itself: the serial port, virtio devices in memory, the VM generation
//! counter. There is no PCI. A kernel without ACPI finds the processors in the MP table instead (see [`crate::mptable`]).
//!
//! Fixed hardware and not the "reduced" profile of ACPI 5: a fixed power button needs no bytecode to be heard, and the
//! interrupt controllers of a PC are here anyway.

use acpi_tables::Aml;
use acpi_tables::aml::{self, EISAName, Interrupt, Memory32Fixed, Name, Path, ResourceTemplate};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use umbra_devices::acpi_pm;
use umbra_units::{Gpa, Writer};

use crate::error::Error;
use crate::memory::Memory;

/// Where the root pointer lies: in what firmware of old kept for itself, where kernels look for it even untold.
const BASE: Gpa = Gpa(0xe_0000);
/// Where the tables must end.
const END: u64 = 0x10_0000;

const OEM: [u8; 6] = *b"UMBRA ";
const OEM_TABLE: [u8; 8] = *b"MACHINE ";
const REVISION: u32 = 1;

const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;

/// `IAPC_BOOT_ARCH`: there are devices on an ISA bus; there is no VGA. No bit for a keyboard controller: there is only
/// its reset line, and a kernel that is not told does not wait for a keyboard to answer.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2;

/// What the tables say.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tables<'a> {
    pub(crate) cpus: u8,
    /// Virtio devices, in the order they are numbered.
    pub(crate) mmio: &'a [MmioWindow],
    pub(crate) generation: Option<Generation>,
}

/// Where a virtio device answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MmioWindow {
    pub(crate) base: u32,
    pub(crate) len: u32,
    /// Its interrupt line, edge-triggered.
    pub(crate) irq: u32,
}

/// Where the VM generation counter lies, and the edge-triggered line that says it has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation {
    pub(crate) at: Gpa,
    pub(crate) irq: u32,
}

/// Write all tables; says where the root is.
pub(crate) fn write(memory: &Memory, tables: &Tables<'_>) -> Result<Gpa, Error> {
    let bytes = lay_out(tables);
    if BASE.0 + bytes.len() as u64 > END {
        return Err(Error::Incompatible(format!(
            "ACPI tables of {} bytes do not fit below 1 MiB: fewer devices, please",
            bytes.len()
        )));
    }
    memory.write(BASE, &bytes)?;
    Ok(BASE)
}

/// All tables, from [`BASE`] on: the root first, because it must lie at a multiple of 16, and FACS at one of 64.
fn lay_out(tables: &Tables<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    let mut put = |table: &dyn Aml| {
        let at = BASE.0 + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        bytes.resize(bytes.len().next_multiple_of(64), 0);
        at
    };
    let facs = put(&FACS::new());
    let dsdt = put(&dsdt(tables));
    let fadt = put(&fadt(facs, dsdt));
    let madt = put(&madt(tables.cpus));
    let mut root = XSDT::new(OEM, OEM_TABLE, REVISION);
    root.add_entry(fadt);
    root.add_entry(madt);
    let root = put(&root);
    let mut pointer = Vec::new();
    Rsdp::new(OEM, root).to_aml_bytes(&mut pointer);
    bytes[..pointer.len()].copy_from_slice(&pointer);
    bytes
}

/// The fixed hardware: always in ACPI mode, so no command switches it on.
fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    let low = |at: u64| u32::try_from(at).expect("the tables lie below 1 MiB");
    let port = |at: u64| u32::try_from(at).expect("a port number");
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .firmware_ctrl_32(low(facs))
        .dsdt_32(low(dsdt))
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Not a button of ours: the power button is fixed hardware, because its flag is not set.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = acpi_pm::SCI_IRQ.into();
    fadt.pm1a_evt_blk = port(acpi_pm::EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = port(acpi_pm::CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    // No C2 and no C3: latencies beyond what counts as a state (ACPI 6.5, table 5.9).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = 0x32;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        acpi_pm::RESET_PORT,
    );
    fadt.reset_value = acpi_pm::RESET_VALUE;
    fadt.finalize()
}

/// Processors and interrupt controllers.
fn madt(cpus: u8) -> Sdt {
    let mut w = Writer::new();
    // LAPICs at the usual place, and the two PICs of a PC beside them.
    w.u32(LAPIC_ADDRESS).u32(1);
    for cpu in 0..cpus {
        w.u8(0).u8(8).u8(cpu).u8(cpu).u32(1);
    }
    w.u8(1).u8(12).u8(cpus).u8(0).u32(IOAPIC_ADDRESS).u32(0);
    // The SCI is level-triggered and active high, unlike what else is on an ISA bus.
    let sci = acpi_pm::SCI_IRQ;
    w.u8(2)
        .u8(10)
        .u8(0)
        .u8(u8::try_from(sci).expect("an ISA interrupt"))
        .u32(sci.into())
        .u16(0x000d);
    // Every processor's LINT1 is the NMI.
    w.u8(4).u8(6).u8(0xff).u16(0).u8(1);
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, REVISION);
    madt.append_slice(w.as_slice());
    madt
}

/// What must be told in bytecode.
fn dsdt(tables: &Tables<'_>) -> Sdt {
    let mut code = Vec::new();
    let sleep = acpi_pm::SLEEP_TYPE_OFF;
    Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&sleep, &sleep, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut code);
    serial_port(&mut code);
    for (number, window) in (0_u32..).zip(tables.mmio) {
        virtio_device(number, *window, &mut code);
    }
    if let Some(generation) = tables.generation {
        generation_counter(generation, &mut code);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn serial_port(code: &mut Vec<u8>) {
    let ports = aml::IO::new(0x3f8, 0x3f8, 1, 8);
    let irq = Interrupt::new(true, true, false, false, 4);
    aml::Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &irq])),
        ],
    )
    .to_aml_bytes(code);
}

/// Linux knows a virtio device in memory by this name (drivers/virtio/virtio_mmio.c, `virtio_mmio_acpi_match`).
fn virtio_device(number: u32, window: MmioWindow, code: &mut Vec<u8>) {
    let memory = Memory32Fixed::new(true, window.base, window.len);
    let irq = Interrupt::new(true, true, false, false, window.irq);
    aml::Device::new(
        Path::new(&format!("_SB_.V{number:03X}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &irq])),
        ],
    )
    .to_aml_bytes(code);
}

/// The counter ("Virtual Machine Generation ID", Microsoft), and the event device (ACPI 6.5, 5.6.9) that turns its
/// interrupt into the notification a driver waits for.
fn generation_counter(generation: Generation, code: &mut Vec<u8>) {
    let half = |shift: u32| u32::try_from(generation.at.0 >> shift & 0xffff_ffff).expect("32 bits");
    let (low, high) = (half(0), half(32));
    aml::Device::new(
        Path::new("_SB_.VGEN"),
        vec![
            &Name::new("_HID".into(), &"UMBRAGEN"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(code);
    let irq = Interrupt::new(true, true, false, false, generation.irq);
    let changed: u8 = 0x80;
    aml::Device::new(
        Path::new("_SB_.GED_"),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&irq])),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(&Path::new("\\_SB_.VGEN"), &changed)],
            ),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, cut to its length.
    fn table(bytes: &[u8], at: u64) -> &[u8] {
        let at = usize::try_from(at - BASE.0).unwrap();
        let len = usize::try_from(u32_at(bytes, at + 4)).unwrap();
        &bytes[at..at + len]
    }

    fn contains(haystack: &[u8], needle: &[u8]) -> bool {
        haystack.windows(needle.len()).any(|window| window == needle)
    }

    #[test]
    fn a_kernel_that_follows_the_pointers_finds_every_table_whole() {
        for cpus in [1, 8, crate::limits::CPUS] {
            let bytes = lay_out(&Tables {
                cpus,
                ..Tables::default()
            });
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
            let root = table(&bytes, u64_at(&bytes, 24));
            assert_eq!((&root[..4], sum(root), root.len()), (&b"XSDT"[..], 0, 52));
            let fadt = table(&bytes, u64_at(root, 36));
            assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
            let facs = u32_at(fadt, 36);
            assert_eq!((facs % 64, &table(&bytes, facs.into())[..4]), (0, &b"FACS"[..]));
            let dsdt = table(&bytes, u32_at(fadt, 40).into());
            assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
            assert!(contains(dsdt, b"_S5_") && contains(dsdt, b"COM1"));
            let madt = table(&bytes, u64_at(root, 44));
            assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
            let mut structures = &madt[44..];
            let mut processors = Vec::new();
            while let [kind, len, ..] = *structures {
                if kind == 0 {
                    processors.push(structures[3]);
                }
                structures = &structures[usize::from(len)..];
            }
            assert_eq!(processors, (0..cpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_fixed_hardware_is_where_the_device_answers() {
        let mut fadt = Vec::new();
        super::fadt(0xe_0040, 0xe_0080).to_aml_bytes(&mut fadt);
        assert_eq!(fadt.len(), 276);
        assert_eq!(fadt[46], 9, "SCI_INT");
        assert_eq!((u32_at(&fadt, 56), u32_at(&fadt, 64)), (0x600, 0x604));
        assert_eq!((fadt[88], fadt[89]), (4, 2), "lengths of the event and control block");
        assert_eq!(u32_at(&fadt, 48), 0, "no SMI command: always in ACPI mode");
        assert_eq!(u32_at(&fadt, 112) >> 4 & 1, 0, "the power button is fixed hardware");
        assert_eq!((u64_at(&fadt, 120), fadt[128]), (0xcf9, 6), "the reset register");
    }

    #[test]
    fn devices_that_no_kernel_finds_by_itself_are_named() {
        let windows = [0xd000_0000, 0xd000_1000].map(|base| MmioWindow {
            base,
            len: 0x1000,
            irq: 5,
        });
        let mut bytes = Vec::new();
        dsdt(&Tables {
            cpus: 1,
            mmio: &windows,
            generation: Some(Generation {
                at: Gpa(0xf_f000),
                irq: 10,
            }),
        })
        .to_aml_bytes(&mut bytes);
        assert_eq!(sum(&bytes), 0);
        for name in [&b"V000"[..], b"V001", b"LNRO0005", b"VM_Gen_Counter", b"ACPI0013"] {
            assert!(contains(&bytes, name), "{}", String::from_utf8_lossy(name));
        }
        assert!(contains(&bytes, &0xd000_1000_u32.to_le_bytes()));
        assert!(contains(&bytes, &0xf_f000_u32.to_le_bytes()));
    }
}
