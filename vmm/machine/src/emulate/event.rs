//! Delivering an exception or software interrupt: the frame on the stack, and on to the guest's handler (SDM volume 3, 6.14).
//!
//! Only what a kernel does to itself: 64-bit code at privilege 0 whose handler runs in the same code segment. Whatever
//! else a gate may ask for is refused by name.

use super::walk::{self, Access};
use super::{Cpu, Exception, Mode, RF, Refused, Stop, TF, World};

const IF: u64 = 1 << 9;
const NT: u64 = 1 << 14;
const VM: u64 = 1 << 17;
const RSP: usize = 4;

const PRESENT: u8 = 0x80;
const INTERRUPT_GATE: u8 = 0xe;
const TRAP_GATE: u8 = 0xf;

/// Deliver a fault: `cpu` is as before the instruction, which the handler may return to.
pub(super) fn fault(cpu: &mut Cpu, world: &mut dyn World, exception: Exception) -> Result<(), Refused> {
    let Exception { vector, code, address } = exception;
    if let Some(address) = address {
        cpu.cr2 = address;
    }
    let flags = cpu.rflags | RF;
    deliver(cpu, world, vector, code, flags).map_err(|stop| refused(vector, stop))
}

/// Deliver what `int3` and `int n` ask for: `cpu.rip` is behind the instruction already.
pub(super) fn software(cpu: &mut Cpu, world: &mut dyn World, vector: u8) -> Result<(), Stop> {
    let flags = cpu.rflags;
    deliver(cpu, world, vector, None, flags).map_err(|stop| Stop::Refused(refused(vector, stop)))
}

/// A fault on the way to a handler is a double fault, and a kernel that takes one is lost anyway.
fn refused(vector: u8, stop: Stop) -> Refused {
    match stop {
        Stop::Refused(why) => Refused(format!("vector {vector} cannot be delivered: {why}")),
        Stop::Exception(second) => Refused(format!(
            "vector {vector} cannot be delivered: that raises vector {}",
            second.vector
        )),
    }
}

fn deliver(cpu: &mut Cpu, world: &mut dyn World, vector: u8, code: Option<u32>, flags: u64) -> Result<(), Stop> {
    if cpu.mode != Mode::Long || cpu.cpl != 0 {
        return Err(Refused::because("only events of a 64-bit kernel are emulated"));
    }
    let offset = u32::from(vector) * 16;
    if offset + 15 > cpu.idt.limit {
        return Err(Refused::because("the interrupt table is too short"));
    }
    let mut gate = [0; 16];
    walk::read(
        cpu,
        world,
        cpu.idt.base.wrapping_add(offset.into()),
        &mut gate,
        Access::System,
    )?;
    let [o0, o1, s0, s1, ist, kind, o2, o3, o4, o5, o6, o7, ..] = gate;
    if kind & PRESENT == 0 || !matches!(kind & 0x1f, INTERRUPT_GATE | TRAP_GATE) {
        return Err(Refused::because("the guest has no handler"));
    }
    if u16::from_le_bytes([s0, s1]) & !3 != cpu.cs & !3 {
        return Err(Refused::because("its handler runs in another code segment"));
    }
    let before = cpu.gpr[RSP];
    let stack = match ist & 7 {
        0 => before,
        n => interrupt_stack(cpu, world, n)?,
    } & !15;
    let mut frame = Vec::with_capacity(48);
    frame.extend(code.map(u64::from));
    frame.extend([cpu.rip, cpu.cs.into(), flags, before, cpu.ss.into()]);
    let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_le_bytes()).collect();
    let top = stack.wrapping_sub(bytes.len() as u64);
    walk::write(cpu, world, top, &bytes, Access::SystemWrite)?;
    cpu.gpr[RSP] = top;
    cpu.rip = u64::from_le_bytes([o0, o1, o2, o3, o4, o5, o6, o7]);
    cpu.rflags = flags & !(TF | NT | RF | VM);
    if kind & 0x1f == INTERRUPT_GATE {
        cpu.rflags &= !IF;
    }
    Ok(())
}

/// Stack `n`, 1 to 7, of the task state's interrupt stack table.
fn interrupt_stack(cpu: &Cpu, world: &mut dyn World, n: u8) -> Result<u64, Stop> {
    let offset = 36 + (u32::from(n) - 1) * 8;
    if offset + 7 > cpu.tss.limit {
        return Err(Refused::because("the task state is too short"));
    }
    let mut stack = [0; 8];
    walk::read(
        cpu,
        world,
        cpu.tss.base.wrapping_add(offset.into()),
        &mut stack,
        Access::System,
    )?;
    Ok(u64::from_le_bytes(stack))
}
