//! One CPU: its services, ports, time stamp, LAPIC and timer.
//!
//! Nothing here knows what the kernel is for.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use umbra_guest::config::CPUS_MAX;

/// Tells a service call from a genuine #UD (`boot.s`, SERVICE_MAGIC).
const SERVICE_MAGIC: u32 = 0x554d_4252;
/// Where `boot.s` expects the AP trampoline to be (TRAMPOLINE): any free page below 640 KiB.
pub(crate) const TRAMPOLINE: usize = 0x8000;
/// Timer vector of CPU 0; CPU n has the n-th after it.
pub(crate) const TIMER_VECTOR: usize = 0x40;
/// The vector of all devices.
pub(crate) const DEVICE_VECTOR: usize = 0x60;

/// A counter on a line of its own; `boot.s` steps by 64 bytes.
#[repr(C, align(64))]
pub(crate) struct Ticks(pub(crate) AtomicU64);

/// Timer interrupts taken, per CPU. Written by the CPL0 handlers in `boot.s`.
#[unsafe(no_mangle)]
pub(crate) static TICKS: [Ticks; CPUS_MAX] = [const { Ticks(AtomicU64::new(0)) }; CPUS_MAX];

/// Interrupts of devices taken, all of them by CPU 0. Written by the CPL0 handler in `boot.s`.
#[unsafe(no_mangle)]
pub(crate) static DEVICE_INTERRUPTS: AtomicU64 = AtomicU64::new(0);

/// How many there were.
#[inline(always)]
pub(crate) fn device_interrupts() -> u64 {
    DEVICE_INTERRUPTS.load(Ordering::Relaxed)
}

/// Asks the CPL0 stub for something only it may do (`boot.s`, Services).
///
/// # Safety
/// As safe as the service itself with these arguments.
unsafe fn service(number: u32, a: u64, b: u64, c: u64) -> u64 {
    let result;
    // SAFETY: the gate keeps all registers but rax, rcx and rdx, and runs on a stack of its own, so the red
    // zone is not touched. Memory is clobbered by default.
    unsafe {
        asm!("ud2", inout("rax") u64::from(number) => result, in("rdi") a, in("rsi") b, in("r8") c,
            in("r11") SERVICE_MAGIC, out("rcx") _, out("rdx") _, options(nostack));
    }
    result
}

/// Writes a model-specific register that is known to exist.
pub(crate) fn write_msr(msr: u32, value: u64) {
    // SAFETY: exclusive machine; the callers only write paravirtual clock registers.
    unsafe { service(2, u64::from(msr), value, 0) };
}

/// CPUID as CPL0 sees it: what the VMM configured, where CPL3 may see the host's.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut registers = [0; 4];
    // SAFETY: the service writes 16 bytes at its last argument.
    unsafe { service(4, u64::from(leaf), u64::from(subleaf), (&raw mut registers) as u64) };
    registers
}

/// Lets interrupts in from here on.
pub(crate) fn enable_interrupts() {
    // SAFETY: all vectors have gates by now.
    unsafe { service(5, 0, 0, 0) };
}

/// Turns on the use of extended state.
///
/// # Safety
/// CPUID must say that XSAVE and all of these components exist.
pub(crate) unsafe fn enable_extended_state(components: u32) {
    // SAFETY: passed on.
    unsafe { service(6, u64::from(components), 0, 0) };
}

/// The time stamp counter.
#[inline(always)]
pub(crate) fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits so many TSC ticks.
pub(crate) fn spin(ticks: u64) {
    let start = tsc();
    while tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Writes a byte to a port.
#[inline(always)]
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: exclusive machine. Memory stays clobbered: what came before must be in memory by then.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes a word of 32 bits to a port.
pub(crate) fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// Writes a string of bytes to a port, with one instruction.
pub(crate) fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: as in `out8`; the instruction reads exactly `bytes`.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(nostack, preserves_flags));
    }
}

/// Reads a byte from a port.
pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as in `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Ends the machine: the exit port, then the keyboard controller's reset line, then silence.
pub(crate) fn exit(code: u32) -> ! {
    out32(0xf4, code);
    out8(0x64, 0xfe);
    park()
}

/// Stops this CPU for good.
pub(crate) fn park() -> ! {
    let never = 0u64;
    loop {
        // SAFETY: halts, as `never` is 0.
        unsafe { service(3, 0, (&raw const never) as u64, 0) };
    }
}

/// Masks both legacy interrupt controllers, which firmware may have left open.
pub(crate) fn mask_pic() {
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
}

/// The I/O APIC (82093AA datasheet): a register is chosen by the first word and read or written by the other.
const IO_APIC: usize = 0xfec0_0000;
const IO_APIC_VERSION: u32 = 1;
const IO_APIC_REDIRECTION: u32 = 0x10;

/// Leads an interrupt line, by its edge, to the device vector of CPU 0. If there is no such line, the last there is.
pub(crate) fn route_interrupt(line: u32) -> Result<(), u32> {
    let select = |register: u32| {
        // SAFETY: the I/O APIC's page, mapped and ours.
        unsafe { (IO_APIC as *mut u32).write_volatile(register) };
        (IO_APIC + 0x10) as *mut u32
    };
    // SAFETY: as above.
    let last = unsafe { select(IO_APIC_VERSION).read_volatile() } >> 16 & 0xff;
    if line > last {
        return Err(last);
    }
    let register = IO_APIC_REDIRECTION + 2 * line;
    // SAFETY: as above. The high half, with the destination, goes first: the low half unmasks.
    unsafe { select(register + 1).write_volatile(0) };
    // SAFETY: as above.
    unsafe { select(register).write_volatile(DEVICE_VECTOR as u32) };
    Ok(())
}

const LAPIC: usize = 0xfee0_0000;
const SPURIOUS: usize = 0xf0;
const COMMAND_LOW: usize = 0x300;
const COMMAND_HIGH: usize = 0x310;
const TIMER_LVT: usize = 0x320;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;
const MASKED: u32 = 1 << 16;

fn lapic_write(register: usize, value: u32) {
    // SAFETY: the xAPIC page, mapped and ours.
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) };
}

fn lapic_read(register: usize) -> u32 {
    // SAFETY: as above.
    unsafe { ((LAPIC + register) as *const u32).read_volatile() }
}

/// LAPIC timer counts per TSC tick, as a 32.32 fraction, from about a millisecond's comparison.
pub(crate) fn lapic_ratio(tsc_khz: u64) -> u64 {
    lapic_write(SPURIOUS, 0x1ff);
    lapic_write(TIMER_DIVIDE, 0xb);
    lapic_write(TIMER_LVT, MASKED | TIMER_VECTOR as u32);
    lapic_write(TIMER_INITIAL, u32::MAX);
    let (first_tsc, first) = lapic_moment(tsc_khz);
    spin(tsc_khz);
    let (last_tsc, last) = lapic_moment(tsc_khz);
    lapic_write(TIMER_INITIAL, 0);
    let counts = u64::from(first.wrapping_sub(last)).max(1);
    ((counts as u128) << 32).div_ceil(u128::from(last_tsc - first_tsc).max(1)) as u64
}

/// The timer's count and when that was, to within 20 us if the host allows it.
fn lapic_moment(tsc_khz: u64) -> (u64, u32) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..20 {
        let before = tsc();
        let count = lapic_read(TIMER_CURRENT);
        let took = tsc() - before;
        if took < best.0 {
            best = (took, before + took / 2, count);
        }
        if took < tsc_khz / 50 {
            break;
        }
    }
    (best.1, best.2)
}

/// Sends an INIT to the CPU with this APIC id.
pub(crate) fn send_init(id: u32) {
    lapic_write(COMMAND_HIGH, id << 24);
    lapic_write(COMMAND_LOW, 0x4500);
}

/// Sends it to the trampoline.
pub(crate) fn send_startup(id: u32) {
    lapic_write(COMMAND_HIGH, id << 24);
    lapic_write(COMMAND_LOW, 0x4600 | (TRAMPOLINE >> 12) as u32);
}

/// This CPU's one-shot timer.
pub(crate) struct Timer {
    ticks: &'static AtomicU64,
    lapic_ratio: u64,
}

impl Timer {
    /// Turns the LAPIC on and lets its timer interrupt.
    pub(crate) fn start(cpu: usize, lapic_ratio: u64) -> Self {
        lapic_write(SPURIOUS, 0x1ff);
        lapic_write(TIMER_DIVIDE, 0xb);
        lapic_write(TIMER_LVT, (TIMER_VECTOR + cpu) as u32);
        enable_interrupts();
        Self {
            ticks: &TICKS[cpu].0,
            lapic_ratio,
        }
    }

    /// Interrupts taken so far.
    pub(crate) fn ticks(&self) -> u64 {
        self.ticks.load(Ordering::Relaxed)
    }

    /// One interrupt in so many TSC ticks, instead of any still to come.
    pub(crate) fn arm(&self, delay: u64) {
        let counts = (u128::from(delay) * u128::from(self.lapic_ratio)) >> 32;
        lapic_write(TIMER_INITIAL, counts.clamp(1, u128::from(u32::MAX)) as u32);
    }

    /// Halts for about so many TSC ticks, unless there was an interrupt since `seen` were counted; less, if an older
    /// tick was still to come, or a device interrupts.
    pub(crate) fn sleep(&self, seen: u64, delay: u64) {
        self.arm(delay);
        // SAFETY: halts only while the counter is still `seen`, so the tick just armed ends it.
        unsafe { service(3, seen, self.ticks.as_ptr() as u64, 0) };
    }
}
