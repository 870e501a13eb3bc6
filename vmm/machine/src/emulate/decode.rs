//! Which instruction some bytes are, and what it works on (SDM volume 2, chapter 2 and appendix A).

use super::{Cpu, Instruction, LONGEST, Mode, Refused};

/// One instruction, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decoded {
    pub(super) instruction: Instruction,
    /// RIP of the one after it.
    pub(super) next: u64,
    /// Bytes of its operands: 1, 2, 4 or 8.
    pub(super) size: u8,
    /// The register that ModRM.reg names.
    pub(super) reg: usize,
    /// The register that VEX.vvvv names.
    pub(super) vvvv: usize,
    pub(super) rm: Rm,
    pub(super) immediate: u8,
}

/// What ModRM.rm names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rm {
    Register(usize),
    /// Bits 8 to 15 of one of the first four registers.
    HighByte(usize),
    /// A linear address, or none if it is not canonical: then the fault is a stack fault (true) or not.
    Memory(Result<u64, bool>),
    /// There is no ModRM.
    None,
}

/// Prefixes that take part in the choice of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mandatory {
    None,
    P66,
    PF3,
    PF2,
}

/// The opcode maps met here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Map {
    One,
    Two,
    T38,
    T3a,
}

#[derive(Debug, Default)]
struct Prefixes {
    operand: bool,
    address: bool,
    lock: bool,
    /// 0xf2 or 0xf3, whichever came last.
    repeat: u8,
    segment: Option<usize>,
    rex: u8,
    /// There is a REX prefix, even one that sets nothing.
    has_rex: bool,
}

const REX_W: u8 = 8;
const REX_R: u8 = 4;
const REX_X: u8 = 2;
const REX_B: u8 = 1;

const ES: usize = 0;
const CS: usize = 1;
const SS: usize = 2;
const DS: usize = 3;
const FS: usize = 4;
const GS: usize = 5;

const RSP: usize = 4;
const RBP: usize = 5;

/// The bytes, and how far they were read.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn u8(&mut self) -> Result<u8, Refused> {
        let byte = self.bytes.get(self.at).copied().filter(|_| self.at < LONGEST);
        self.at += 1;
        byte.ok_or_else(|| Refused("the instruction's end is missing".to_owned()))
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn i8(&mut self) -> Result<i64, Refused> {
        Ok(i64::from(self.u8()?.cast_signed()))
    }

    fn i32(&mut self) -> Result<i64, Refused> {
        let word = [self.u8()?, self.u8()?, self.u8()?, self.u8()?];
        Ok(i64::from(i32::from_le_bytes(word)))
    }
}

/// Opcode, prefixes and whatever VEX says: all there is before ModRM.
struct Opcode {
    prefixes: Prefixes,
    vex: Option<Vex>,
    map: Map,
    byte: u8,
    mandatory: Mandatory,
}

struct Vex {
    vvvv: usize,
    long: bool,
}

pub(super) fn decode(cpu: &Cpu, bytes: &[u8]) -> Result<Decoded, Refused> {
    if cpu.mode == Mode::Real {
        return Err(Refused("16-bit code is not emulated".to_owned()));
    }
    let mut cursor = Cursor { bytes, at: 0 };
    let opcode = read_opcode(cpu.mode, &mut cursor)?;
    let unknown = || Refused("it is not among those emulated here".to_owned());
    let modrm = if has_modrm(&opcode) { Some(cursor.u8()?) } else { None };
    let instruction = choose(&opcode, modrm).ok_or_else(unknown)?;
    if opcode.prefixes.lock && instruction != Instruction::Cmpxchg16b {
        return Err(unknown());
    }
    let immediate_bytes = usize::from(matches!(instruction, Instruction::IntN | Instruction::Rorx));
    let rex = opcode.prefixes.rex;
    let (reg, rm) = match modrm {
        None => (0, Pointer::None),
        Some(modrm) => {
            let reg = usize::from(modrm >> 3 & 7) | extension(rex, REX_R);
            (reg, read_rm(cpu, &opcode.prefixes, modrm, &mut cursor)?)
        }
    };
    let immediate = if immediate_bytes == 1 { cursor.u8()? } else { 0 };
    let next = cpu.rip.wrapping_add(cursor.at as u64);
    let next = if cpu.mode == Mode::Long {
        next
    } else {
        next & 0xffff_ffff
    };
    let size = operand_size(instruction, &opcode, cpu.mode);
    let rm = match rm.linear(cpu, &opcode.prefixes, next) {
        Rm::Register(register @ 4..=7) if size == 1 && !opcode.prefixes.has_rex => Rm::HighByte(register - 4),
        other => other,
    };
    Ok(Decoded {
        instruction,
        next,
        size,
        reg,
        vvvv: opcode.vex.as_ref().map_or(0, |vex| vex.vvvv),
        rm,
        immediate,
    })
}

fn read_opcode(mode: Mode, cursor: &mut Cursor<'_>) -> Result<Opcode, Refused> {
    let mut prefixes = Prefixes::default();
    let first = loop {
        let byte = cursor.u8()?;
        match byte {
            0x66 => prefixes.operand = true,
            0x67 => prefixes.address = true,
            0xf0 => prefixes.lock = true,
            0xf2 | 0xf3 => prefixes.repeat = byte,
            // The other segments begin at zero in long mode, whatever their prefix.
            0x26 => prefixes.segment = Some(ES).filter(|_| mode != Mode::Long),
            0x2e => prefixes.segment = Some(CS).filter(|_| mode != Mode::Long),
            0x36 => prefixes.segment = Some(SS).filter(|_| mode != Mode::Long),
            0x3e => prefixes.segment = Some(DS).filter(|_| mode != Mode::Long),
            0x64 => prefixes.segment = Some(FS),
            0x65 => prefixes.segment = Some(GS),
            0x40..=0x4f if mode == Mode::Long => {
                // Only right before the opcode does it count.
                prefixes.rex = byte & 0xf;
                prefixes.has_rex = true;
                match cursor.peek() {
                    Some(0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x40..=0x4f) => {
                        prefixes.rex = 0;
                        prefixes.has_rex = false;
                    }
                    _ => break cursor.u8()?,
                }
            }
            other => break other,
        }
    };
    // In 32-bit code these are LES and LDS, unless what would be ModRM names a register.
    let is_vex =
        matches!(first, 0xc4 | 0xc5) && (mode == Mode::Long || cursor.peek().is_some_and(|next| next >> 6 == 3));
    if is_vex {
        return read_vex(first, prefixes, mode, cursor);
    }
    let (map, byte) = match first {
        0x0f => match cursor.u8()? {
            0x38 => (Map::T38, cursor.u8()?),
            0x3a => (Map::T3a, cursor.u8()?),
            other => (Map::Two, other),
        },
        other => (Map::One, other),
    };
    let mandatory = match (prefixes.repeat, prefixes.operand) {
        (0xf2, _) => Mandatory::PF2,
        (0xf3, _) => Mandatory::PF3,
        (_, true) => Mandatory::P66,
        _ => Mandatory::None,
    };
    Ok(Opcode {
        prefixes,
        vex: None,
        map,
        byte,
        mandatory,
    })
}

fn read_vex(first: u8, mut prefixes: Prefixes, mode: Mode, cursor: &mut Cursor<'_>) -> Result<Opcode, Refused> {
    if prefixes.operand || prefixes.repeat != 0 || prefixes.lock || prefixes.has_rex {
        return Err(Refused("VEX behind a prefix that it excludes".to_owned()));
    }
    let one = cursor.u8()?;
    let (map, last) = if first == 0xc5 {
        (1, one)
    } else {
        (one & 0x1f, cursor.u8()?)
    };
    // R, X and B are kept inverted. 32-bit code has no registers for them to name.
    if mode == Mode::Long {
        prefixes.rex |= if one & 0x80 == 0 { REX_R } else { 0 };
        if first == 0xc4 {
            prefixes.rex |= if one & 0x40 == 0 { REX_X } else { 0 };
            prefixes.rex |= if one & 0x20 == 0 { REX_B } else { 0 };
            prefixes.rex |= if last & 0x80 != 0 { REX_W } else { 0 };
        }
    }
    let map = match map {
        1 => Map::Two,
        2 => Map::T38,
        3 => Map::T3a,
        _ => return Err(Refused("an opcode map nobody knows".to_owned())),
    };
    let mandatory = match last & 3 {
        0 => Mandatory::None,
        1 => Mandatory::P66,
        2 => Mandatory::PF3,
        _ => Mandatory::PF2,
    };
    let vvvv = usize::from(!last >> 3 & if mode == Mode::Long { 15 } else { 7 });
    Ok(Opcode {
        prefixes,
        vex: Some(Vex {
            vvvv,
            long: last & 4 != 0,
        }),
        map,
        byte: cursor.u8()?,
        mandatory,
    })
}

const fn has_modrm(opcode: &Opcode) -> bool {
    match opcode.map {
        Map::One => false,
        Map::Two => opcode.byte != 0x77,
        Map::T38 | Map::T3a => true,
    }
}

/// The table: which instruction it is, of those done here.
fn choose(opcode: &Opcode, modrm: Option<u8>) -> Option<Instruction> {
    use Instruction as I;
    use Mandatory::{None as Np, P66, PF2, PF3};
    let digit = modrm.map_or(0, |modrm| modrm >> 3 & 7);
    let memory = modrm.is_some_and(|modrm| modrm >> 6 != 3);
    let wide = opcode.prefixes.rex & REX_W != 0;
    if let Some(vex) = &opcode.vex {
        if vex.long {
            return None;
        }
        return Some(match (opcode.map, opcode.mandatory, opcode.byte, digit) {
            (Map::T38, Np, 0xf2, _) => I::Andn,
            (Map::T38, Np, 0xf3, 1) => I::Blsr,
            (Map::T38, Np, 0xf3, 2) => I::Blsmsk,
            (Map::T38, Np, 0xf3, 3) => I::Blsi,
            (Map::T38, Np, 0xf5, _) => I::Bzhi,
            (Map::T38, PF3, 0xf5, _) => I::Pext,
            (Map::T38, PF2, 0xf5, _) => I::Pdep,
            (Map::T38, PF2, 0xf6, _) => I::Mulx,
            (Map::T38, Np, 0xf7, _) => I::Bextr,
            (Map::T38, P66, 0xf7, _) => I::Shlx,
            (Map::T38, PF3, 0xf7, _) => I::Sarx,
            (Map::T38, PF2, 0xf7, _) => I::Shrx,
            (Map::T3a, PF2, 0xf0, _) if vex.vvvv == 0 => I::Rorx,
            _ => return None,
        });
    }
    Some(match (opcode.map, opcode.mandatory, opcode.byte) {
        (Map::One, _, 0x9b) => I::Fwait,
        (Map::One, _, 0xcc) => I::Int3,
        (Map::One, _, 0xcd) => I::IntN,
        (Map::Two, Np, 0x01) => match modrm? {
            0xca => I::Clac,
            0xcb => I::Stac,
            0xd0 => I::Xgetbv,
            0xf9 => I::Rdtscp,
            _ => return None,
        },
        (Map::Two, Np, 0x77) => I::Emms,
        (Map::Two, Np, 0xae) => match (memory, digit) {
            (true, 2) => I::Ldmxcsr,
            (true, 3) => I::Stmxcsr,
            (false, 5..=7) => I::Fence,
            _ => return None,
        },
        (Map::Two, PF3, 0xb8) => I::Popcnt,
        (Map::Two, PF3, 0xbc) => I::Tzcnt,
        (Map::Two, PF3, 0xbd) => I::Lzcnt,
        (Map::Two, Np, 0xc7) if memory && digit == 1 && wide => I::Cmpxchg16b,
        (Map::T38, P66, 0x82) if memory => I::Invpcid,
        (Map::T38, PF2, 0xf0 | 0xf1) => I::Crc32,
        (Map::T38, P66, 0xf6) => I::Adcx,
        (Map::T38, PF3, 0xf6) => I::Adox,
        _ => return None,
    })
}

fn operand_size(instruction: Instruction, opcode: &Opcode, mode: Mode) -> u8 {
    use Instruction as I;
    let wide = opcode.prefixes.rex & REX_W != 0;
    match instruction {
        I::Crc32 if opcode.byte == 0xf0 => 1,
        I::Ldmxcsr | I::Stmxcsr => 4,
        I::Invpcid if mode == Mode::Long => 8,
        _ if wide => 8,
        I::Popcnt | I::Tzcnt | I::Lzcnt | I::Crc32 if opcode.prefixes.operand => 2,
        _ => 4,
    }
}

fn extension(rex: u8, bit: u8) -> usize {
    if rex & bit == 0 { 0 } else { 8 }
}

/// ModRM and what follows it, before RIP of the next instruction is known.
enum Pointer {
    None,
    Register(usize),
    Memory {
        /// Base and scaled index, and the displacement.
        sum: u64,
        relative_to_rip: bool,
        on_stack: bool,
    },
}

fn read_rm(cpu: &Cpu, prefixes: &Prefixes, modrm: u8, cursor: &mut Cursor<'_>) -> Result<Pointer, Refused> {
    let (kind, low) = (modrm >> 6, usize::from(modrm & 7));
    let rex = prefixes.rex;
    if kind == 3 {
        return Ok(Pointer::Register(low | extension(rex, REX_B)));
    }
    if cpu.mode == Mode::Protected && prefixes.address {
        return Err(Refused("16-bit addresses are not emulated".to_owned()));
    }
    let (mut sum, mut on_stack, mut relative_to_rip) = (0_u64, false, false);
    let mut displacement_only = kind == 0 && low == RBP;
    if low == RSP {
        let sib = cursor.u8()?;
        let (scale, index, base) = (sib >> 6, usize::from(sib >> 3 & 7), usize::from(sib & 7));
        let index = index | extension(rex, REX_X);
        if index != RSP {
            sum = cpu.gpr[index] << scale;
        }
        displacement_only = kind == 0 && base == RBP;
        if !displacement_only {
            let base = base | extension(rex, REX_B);
            on_stack = matches!(base, RSP | RBP);
            sum = sum.wrapping_add(cpu.gpr[base]);
        }
    } else if displacement_only {
        relative_to_rip = cpu.mode == Mode::Long;
    } else {
        let base = low | extension(rex, REX_B);
        on_stack = base == RBP;
        sum = cpu.gpr[base];
    }
    let displacement = match kind {
        1 => cursor.i8()?,
        2 => cursor.i32()?,
        _ if displacement_only => cursor.i32()?,
        _ => 0,
    };
    Ok(Pointer::Memory {
        sum: sum.wrapping_add(displacement.cast_unsigned()),
        relative_to_rip,
        on_stack,
    })
}

impl Pointer {
    fn linear(self, cpu: &Cpu, prefixes: &Prefixes, next: u64) -> Rm {
        let (sum, relative_to_rip, on_stack) = match self {
            Self::None => return Rm::None,
            Self::Register(register) => return Rm::Register(register),
            Self::Memory {
                sum,
                relative_to_rip,
                on_stack,
            } => (sum, relative_to_rip, on_stack),
        };
        let offset = sum.wrapping_add(if relative_to_rip { next } else { 0 });
        let segment = prefixes.segment.unwrap_or(if on_stack { SS } else { DS });
        if cpu.mode == Mode::Protected {
            let offset = offset & 0xffff_ffff;
            return Rm::Memory(Ok(cpu.bases[segment].wrapping_add(offset) & 0xffff_ffff));
        }
        let offset = if prefixes.address { offset & 0xffff_ffff } else { offset };
        let base = if matches!(segment, FS | GS) {
            cpu.bases[segment]
        } else {
            0
        };
        let linear = base.wrapping_add(offset);
        Rm::Memory(if cpu.is_canonical(linear) {
            Ok(linear)
        } else {
            Err(on_stack && prefixes.segment.is_none())
        })
    }
}

impl Cpu {
    /// Whether long mode can translate this address at all.
    pub(super) fn is_canonical(&self, linear: u64) -> bool {
        const LA57: u64 = 1 << 12;
        let unused = if self.cr4 & LA57 == 0 { 16 } else { 7 };
        (linear << unused).cast_signed() >> unused == linear.cast_signed()
    }
}
