//! From a linear address to a physical one, as the processor walks page tables (SDM volume 3, 4.5 and 4.6).
//!
//! Not obeyed: protection keys and reserved bits. A kernel sets neither against itself.

use super::{Cpu, Exception, Refused, Stop, World};

/// What an address is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    /// A table of the system, or an instruction that has already been fetched once.
    System,
    /// The frame of an exception.
    SystemWrite,
}

const PAGING: u64 = 1 << 31;
const WRITE_PROTECT: u64 = 1 << 16;
const LA57: u64 = 1 << 12;
const SMAP: u64 = 1 << 21;
const AC: u64 = 1 << 18;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bytes of the page an address lies in, from the address to its end.
pub(super) const fn rest_of_page(address: u64) -> u64 {
    4096 - (address & 4095)
}

/// Where `linear` is. Marks the page accessed, and dirty if it will be written.
pub(super) fn translate(cpu: &Cpu, world: &mut dyn World, linear: u64, access: Access) -> Result<u64, Stop> {
    if cpu.cr0 & PAGING == 0 {
        return Ok(linear);
    }
    if !cpu.long_paging {
        return Err(Refused::because("page tables of 32-bit code are not emulated"));
    }
    let write = matches!(access, Access::Write | Access::SystemWrite);
    let user_mode = cpu.cpl == 3 && matches!(access, Access::Read | Access::Write);
    let fault = |present: bool| {
        Stop::Exception(Exception {
            vector: 14,
            code: Some(u32::from(present) | u32::from(write) << 1 | u32::from(user_mode) << 2),
            address: Some(linear),
        })
    };
    let levels = if cpu.cr4 & LA57 == 0 { 4 } else { 5 };
    let mut table = cpu.cr3 & ADDRESS;
    let mut rights = WRITABLE | USER;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let at = table + (linear >> shift & 511) * 8;
        let mut bytes = [0; 8];
        world.read(at, &mut bytes)?;
        let entry = u64::from_le_bytes(bytes);
        if entry & PRESENT == 0 {
            return Err(fault(false));
        }
        rights &= entry;
        let last = level == 0 || (level <= 2 && entry & LARGE != 0);
        if last {
            // What the system does by itself never has AC on its side.
            let smap =
                cpu.cr4 & SMAP != 0 && (cpu.rflags & AC == 0 || matches!(access, Access::System | Access::SystemWrite));
            let forbidden = (write && rights & WRITABLE == 0 && (user_mode || cpu.cr0 & WRITE_PROTECT != 0))
                || (user_mode && rights & USER == 0)
                || (!user_mode && rights & USER != 0 && smap);
            if forbidden {
                return Err(fault(true));
            }
        }
        let marks = ACCESSED | if last && write { DIRTY } else { 0 };
        if entry & marks != marks {
            world.set_bits(at, marks)?;
        }
        if last {
            let within = (1 << shift) - 1;
            return Ok(entry & ADDRESS & !within | linear & within);
        }
        table = entry & ADDRESS;
    }
    unreachable!("level 0 is always the last")
}

/// Read at a linear address, across pages if need be.
pub(super) fn read(cpu: &Cpu, world: &mut dyn World, linear: u64, out: &mut [u8], access: Access) -> Result<(), Stop> {
    let mut at = linear;
    let mut rest = out;
    while !rest.is_empty() {
        let here = rest
            .len()
            .min(usize::try_from(rest_of_page(at)).expect("at most a page"));
        let (now, later) = rest.split_at_mut(here);
        let physical = translate(cpu, world, at, access)?;
        world.read(physical, now)?;
        at = wrapped(cpu, at.wrapping_add(here as u64));
        rest = later;
    }
    Ok(())
}

/// Write at a linear address. Every page is translated before the first byte is written.
pub(super) fn write(cpu: &Cpu, world: &mut dyn World, linear: u64, bytes: &[u8], access: Access) -> Result<(), Stop> {
    let mut places = Vec::with_capacity(2);
    let (mut at, mut rest) = (linear, bytes);
    while !rest.is_empty() {
        let here = rest
            .len()
            .min(usize::try_from(rest_of_page(at)).expect("at most a page"));
        let (now, later) = rest.split_at(here);
        places.push((translate(cpu, world, at, access)?, now));
        at = wrapped(cpu, at.wrapping_add(here as u64));
        rest = later;
    }
    for (physical, bytes) in places {
        world.write(physical, bytes)?;
    }
    Ok(())
}

const fn wrapped(cpu: &Cpu, address: u64) -> u64 {
    match cpu.mode {
        super::Mode::Long => address,
        super::Mode::Protected | super::Mode::Real => address & 0xffff_ffff,
    }
}
