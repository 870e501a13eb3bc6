//! What each instruction does (SDM volume 2).

use super::decode::{Decoded, Rm};
use super::walk::{self, Access};
use super::{Cpu, Exception, Instruction, Refused, Stop, World, event};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR0_NE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_OSXSAVE: u64 = 1 << 18;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

const IA32_TSC: u32 = 0x10;
const TSC_AUX: u32 = 0xc000_0103;

/// Bits of MXCSR that no processor has.
const MXCSR_RESERVED: u32 = 0xffff_0000;
/// x87 status: an exception waits to be heard of.
const X87_SUMMARY: u16 = 1 << 7;

/// CRC-32C, its bits in reverse as the instruction has them.
const CRC32C: u32 = 0x82f6_3b78;

/// Do it. RIP is moved by the caller, except by what goes to a handler.
pub(super) fn execute(cpu: &mut Cpu, world: &mut dyn World, d: &Decoded) -> Result<(), Stop> {
    use Instruction as I;
    match d.instruction {
        I::Int3 => interrupt(cpu, world, d, 3)?,
        I::IntN => interrupt(cpu, world, d, d.immediate)?,
        I::Fence => {}
        I::Fwait => {
            if cpu.cr0 & CR0_MP != 0 && cpu.cr0 & CR0_TS != 0 {
                return Err(Exception::DEVICE_NOT_AVAILABLE);
            }
            no_x87_exception(cpu, world)?;
        }
        I::Emms => {
            vector_unit_on(cpu)?;
            no_x87_exception(cpu, world)?;
            world.empty_x87()?;
        }
        I::Clac | I::Stac => {
            if cpu.cpl != 0 {
                return Err(Exception::UNDEFINED);
            }
            set_flag(cpu, AC, d.instruction == I::Stac);
        }
        I::Xgetbv => xgetbv(cpu, world)?,
        I::Rdtscp => {
            let (tsc, aux) = (world.msr(IA32_TSC)?, world.msr(TSC_AUX)?);
            set_pair(cpu, tsc);
            cpu.gpr[RCX] = aux & 0xffff_ffff;
        }
        I::Ldmxcsr => {
            sse_on(cpu)?;
            let value = u32::try_from(source(cpu, world, d)?).expect("a load of four bytes");
            if value & MXCSR_RESERVED != 0 {
                return Err(Exception::PROTECTION);
            }
            world.set_mxcsr(value)?;
        }
        I::Stmxcsr => {
            sse_on(cpu)?;
            let value = world.mxcsr()?;
            walk::write(cpu, world, address(d)?, &value.to_le_bytes(), Access::Write)?;
        }
        I::Cmpxchg16b => cmpxchg16b(cpu, world, d)?,
        I::Invpcid => invpcid(cpu, world, d)?,
        I::Crc32 => {
            let value = source(cpu, world, d)?;
            let bytes = value.to_le_bytes();
            let start = u32::try_from(cpu.gpr[d.reg] & 0xffff_ffff).expect("32 bits were kept");
            cpu.gpr[d.reg] = bytes[..usize::from(d.size)].iter().fold(start, crc32c).into();
        }
        _ => integer(cpu, world, d)?,
    }
    Ok(())
}

/// Everything that computes a register from others and a source, and perhaps flags.
fn integer(cpu: &mut Cpu, world: &mut dyn World, d: &Decoded) -> Result<(), Stop> {
    use Instruction as I;
    let bits = u32::from(d.size) * 8;
    let mask = u64::MAX >> (64 - bits);
    let top = 1 << (bits - 1);
    let src = source(cpu, world, d)?;
    let other = cpu.gpr[d.vvvv] & mask;
    let mut flags = Flags::default();
    let (register, result) = match d.instruction {
        I::Popcnt => {
            flags = Flags::clear(OF | SF | AF | CF | PF).with(ZF, src == 0);
            (d.reg, u64::from(src.count_ones()))
        }
        I::Tzcnt | I::Lzcnt => {
            let zeros = match d.instruction {
                I::Tzcnt => src.trailing_zeros().min(bits),
                _ => src.leading_zeros() - (64 - bits),
            };
            flags = Flags::default().with(CF, src == 0).with(ZF, zeros == 0);
            (d.reg, zeros.into())
        }
        I::Adcx | I::Adox => {
            let carry = if d.instruction == I::Adcx { CF } else { OF };
            let sum = u128::from(cpu.gpr[d.reg] & mask) + u128::from(src) + u128::from(cpu.rflags & carry != 0);
            flags = Flags::default().with(carry, sum >> bits != 0);
            (d.reg, low(sum))
        }
        I::Andn => {
            let result = !other & src;
            flags = Flags::clear(OF | CF).of(result, top);
            (d.reg, result)
        }
        I::Bextr => {
            let (start, len) = (low_byte(other), low_byte(other >> 8));
            let shifted = src.checked_shr(start).unwrap_or(0);
            let result = shifted & low((1_u128 << len.min(64)) - 1);
            flags = Flags::clear(OF | CF).with(ZF, result == 0);
            (d.reg, result)
        }
        I::Blsi => {
            let result = src & src.wrapping_neg();
            flags = Flags::clear(OF).of(result, top).with(CF, src != 0);
            (d.vvvv, result)
        }
        I::Blsmsk => {
            let result = (src ^ src.wrapping_sub(1)) & mask;
            flags = Flags::clear(OF).of(result, top).with(CF, src == 0);
            (d.vvvv, result)
        }
        I::Blsr => {
            let result = src & src.wrapping_sub(1);
            flags = Flags::clear(OF).of(result, top).with(CF, src == 0);
            (d.vvvv, result)
        }
        I::Bzhi => {
            let index = low_byte(other);
            let result = src & low((1_u128 << index.min(64)) - 1);
            flags = Flags::clear(OF).of(result, top).with(CF, index >= bits);
            (d.reg, result)
        }
        I::Mulx => {
            let product = u128::from(cpu.gpr[RDX] & mask) * u128::from(src);
            put(cpu, d.vvvv, d.size, low(product) & mask);
            (d.reg, low(product >> bits))
        }
        I::Pdep => (d.reg, deposit(other, src)),
        I::Pext => (d.reg, extract(other, src)),
        I::Rorx => {
            let by = u32::from(d.immediate) & (bits - 1);
            (d.reg, (src >> by | src.checked_shl(bits - by).unwrap_or(0)) & mask)
        }
        I::Shlx => (d.reg, src << (other & u64::from(bits - 1)) & mask),
        I::Shrx => (d.reg, src >> (other & u64::from(bits - 1))),
        I::Sarx => {
            let signed = (src << (64 - bits)).cast_signed() >> (64 - bits);
            (d.reg, (signed >> (other & u64::from(bits - 1))).cast_unsigned() & mask)
        }
        other => unreachable!("{} computes no integer", other.name()),
    };
    put(cpu, register, d.size, result);
    cpu.rflags = cpu.rflags & !flags.clear | flags.set;
    Ok(())
}

/// What becomes of the flags that an instruction defines.
#[derive(Default)]
struct Flags {
    clear: u64,
    set: u64,
}

impl Flags {
    const fn clear(clear: u64) -> Self {
        Self { clear, set: 0 }
    }

    const fn with(mut self, flag: u64, set: bool) -> Self {
        self.clear |= flag;
        if set {
            self.set |= flag;
        }
        self
    }

    /// Zero and sign of a result.
    const fn of(self, result: u64, top: u64) -> Self {
        self.with(ZF, result == 0).with(SF, result & top != 0)
    }
}

fn interrupt(cpu: &mut Cpu, world: &mut dyn World, d: &Decoded, vector: u8) -> Result<(), Stop> {
    cpu.rip = d.next;
    event::software(cpu, world, vector)
}

fn xgetbv(cpu: &mut Cpu, world: &mut dyn World) -> Result<(), Stop> {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(Exception::UNDEFINED);
    }
    match cpu.gpr[RCX] & 0xffff_ffff {
        0 => {
            let xcr0 = world.xcr0()?;
            set_pair(cpu, xcr0);
            Ok(())
        }
        1 => Err(Refused::because("which vector registers are in use is not known here")),
        _ => Err(Exception::PROTECTION),
    }
}

fn cmpxchg16b(cpu: &mut Cpu, world: &mut dyn World, d: &Decoded) -> Result<(), Stop> {
    let linear = address(d)?;
    if linear & 15 != 0 {
        return Err(Exception::PROTECTION);
    }
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let expected = pair(cpu.gpr[RDX], cpu.gpr[RAX]);
    let new = pair(cpu.gpr[RCX], cpu.gpr[RBX]);
    // Sixteen aligned bytes lie in one page.
    let at = walk::translate(cpu, world, linear, Access::Write)?;
    let found = world.compare_exchange(at, expected, new)?;
    set_flag(cpu, ZF, found == expected);
    if found != expected {
        cpu.gpr[RAX] = low(found);
        cpu.gpr[RDX] = low(found >> 64);
    }
    Ok(())
}

/// Whatever it asks to forget, everything is forgotten: that is always allowed.
fn invpcid(cpu: &Cpu, world: &mut dyn World, d: &Decoded) -> Result<(), Stop> {
    if cpu.cpl != 0 {
        return Err(Exception::PROTECTION);
    }
    let mut descriptor = [0; 16];
    walk::read(cpu, world, address(d)?, &mut descriptor, Access::Read)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, linear) = (low(descriptor), low(descriptor >> 64));
    let kind = cpu.gpr[d.reg] & if d.size == 8 { u64::MAX } else { 0xffff_ffff };
    let of_one_pcid = kind <= 1;
    let wrong = kind > 3
        || (of_one_pcid && pcid >> 12 != 0)
        || (of_one_pcid && pcid != 0 && cpu.cr4 & CR4_PCIDE == 0)
        || (kind == 0 && !cpu.is_canonical(linear));
    if wrong {
        return Err(Exception::PROTECTION);
    }
    Ok(world.flush_tlb()?)
}

/// The operand that ModRM.rm names, as many bytes as the operand has.
fn source(cpu: &Cpu, world: &mut dyn World, d: &Decoded) -> Result<u64, Stop> {
    let size = usize::from(d.size);
    match d.rm {
        Rm::Register(register) => Ok(cpu.gpr[register] & u64::MAX >> (64 - u32::from(d.size) * 8)),
        // ah, ch, dh, bh
        Rm::HighByte(register) => Ok(cpu.gpr[register] >> 8 & 0xff),
        Rm::Memory(_) => {
            let mut bytes = [0; 8];
            walk::read(cpu, world, address(d)?, &mut bytes[..size], Access::Read)?;
            Ok(u64::from_le_bytes(bytes))
        }
        Rm::None => unreachable!("whoever has a source has ModRM"),
    }
}

fn address(d: &Decoded) -> Result<u64, Stop> {
    match d.rm {
        Rm::Memory(Ok(linear)) => Ok(linear),
        Rm::Memory(Err(on_stack)) => Err(Stop::Exception(Exception {
            vector: if on_stack { 12 } else { 13 },
            code: Some(0),
            address: None,
        })),
        Rm::Register(_) | Rm::HighByte(_) | Rm::None => unreachable!("the table lets these be memory only"),
    }
}

/// Write a register as the processor does: 32 bits clear what is above, 16 do not.
const fn put(cpu: &mut Cpu, register: usize, size: u8, value: u64) {
    let place = &mut cpu.gpr[register];
    *place = match size {
        8 => value,
        4 => value & 0xffff_ffff,
        _ => *place & !0xffff | value & 0xffff,
    };
}

/// edx:eax.
const fn set_pair(cpu: &mut Cpu, value: u64) {
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
}

const fn set_flag(cpu: &mut Cpu, flag: u64, set: bool) {
    if set {
        cpu.rflags |= flag;
    } else {
        cpu.rflags &= !flag;
    }
}

fn no_x87_exception(cpu: &Cpu, world: &mut dyn World) -> Result<(), Stop> {
    if world.x87_status()? & X87_SUMMARY == 0 {
        Ok(())
    } else if cpu.cr0 & CR0_NE != 0 {
        Err(Exception::X87)
    } else {
        Err(Refused::because("x87 exceptions by interrupt are not emulated"))
    }
}

const fn vector_unit_on(cpu: &Cpu) -> Result<(), Stop> {
    if cpu.cr0 & CR0_EM != 0 {
        Err(Exception::UNDEFINED)
    } else if cpu.cr0 & CR0_TS != 0 {
        Err(Exception::DEVICE_NOT_AVAILABLE)
    } else {
        Ok(())
    }
}

const fn sse_on(cpu: &Cpu) -> Result<(), Stop> {
    if cpu.cr4 & CR4_OSFXSR == 0 {
        return Err(Exception::UNDEFINED);
    }
    vector_unit_on(cpu)
}

fn crc32c(crc: u32, byte: &u8) -> u32 {
    (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
        crc >> 1 ^ if crc & 1 == 1 { CRC32C } else { 0 }
    })
}

/// The low bits of `source`, laid out where `mask` has ones.
fn deposit(source: u64, mask: u64) -> u64 {
    let (mut result, mut left, mut next) = (0, mask, source);
    while left != 0 {
        let place = left & left.wrapping_neg();
        if next & 1 == 1 {
            result |= place;
        }
        next >>= 1;
        left ^= place;
    }
    result
}

/// The bits of `source` where `mask` has ones, put together.
fn extract(source: u64, mask: u64) -> u64 {
    let (mut result, mut left, mut at) = (0, mask, 0);
    while left != 0 {
        let place = left & left.wrapping_neg();
        if source & place != 0 {
            result |= 1 << at;
        }
        at += 1;
        left ^= place;
    }
    result
}

fn low(value: u128) -> u64 {
    u64::try_from(value & u128::from(u64::MAX)).expect("64 bits were kept")
}

fn low_byte(value: u64) -> u32 {
    u32::try_from(value & 0xff).expect("8 bits were kept")
}
