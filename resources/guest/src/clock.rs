//! What a TSC tick is worth.
//!
//! Five sources, best first: the VMM says so (CPUID 0x4000_0010); kvmclock's scale; CPUID 0x15; the PIT; and
//! without one, the LAPIC timer at the rate it has under KVM and QEMU. CPUID is asked at CPL0, where it is what
//! the VMM configured.

use crate::cpu;
use core::cell::UnsafeCell;
use umbra_guest::config::CPUS_MAX;

const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;

/// Rates, measured once by the BSP.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    /// TSC ticks per millisecond.
    pub(crate) tsc_khz: u64,
    /// Who said so.
    pub(crate) source: &'static str,
    /// LAPIC timer counts per TSC tick, 32.32.
    pub(crate) lapic_ratio: u64,
    /// There is a kvmclock.
    pub(crate) kvm: bool,
}

impl Clock {
    /// Finds the rates out; takes one to fifteen milliseconds.
    pub(crate) fn calibrate() -> Self {
        let hypervisor = cpu::cpuid(0x4000_0000, 0);
        // "KVMKVMKVM\0\0\0"
        let on_kvm = hypervisor[1..] == [0x4b4d_564b, 0x564b_4d56, 0x4d];
        let kvm = on_kvm && cpu::cpuid(0x4000_0001, 0)[0] & KVM_FEATURE_CLOCKSOURCE2 != 0;
        let (tsc_khz, source) = tsc_khz(hypervisor[0], kvm);
        Self {
            tsc_khz,
            source,
            lapic_ratio: cpu::lapic_ratio(tsc_khz),
            kvm,
        }
    }

    /// Microseconds in TSC ticks.
    pub(crate) fn ticks(&self, us: u64) -> u64 {
        (u128::from(us) * u128::from(self.tsc_khz) / 1000) as u64
    }
}

fn tsc_khz(hypervisor_leaves: u32, kvm: bool) -> (u64, &'static str) {
    if (0x4000_0010..0x4000_1000).contains(&hypervisor_leaves) {
        let khz = cpu::cpuid(0x4000_0010, 0)[0];
        if khz != 0 {
            return (u64::from(khz), "hypervisor");
        }
    }
    if kvm && let Some(khz) = KvmClock::start(0).tsc_khz() {
        return (khz, "kvmclock");
    }
    if cpu::cpuid(0, 0)[0] >= 0x15 {
        let [denominator, numerator, crystal_hz, _] = cpu::cpuid(0x15, 0);
        if denominator != 0 && numerator != 0 && crystal_hz != 0 {
            let hz = u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator);
            return (hz / 1000, "cpuid");
        }
    }
    pit_khz().map_or_else(|| (lapic_khz(), "lapic"), |khz| (khz, "pit"))
}

/// Counts the TSC over ten milliseconds of PIT channel 0, by reading its count: the usual way, by the output of
/// channel 2, needs port 0x61, which small machines leave out. Its interrupt is masked at the PIC.
fn pit_khz() -> Option<u64> {
    const COUNTS: u16 = 11932; // 1.193182 MHz * 10 ms
    cpu::out8(0x43, 0x30); // channel 0, both bytes, mode 0: counts down once
    cpu::out8(0x40, 0xff);
    cpu::out8(0x40, 0xff);
    let (start, first) = pit_moment();
    loop {
        let (now, count) = pit_moment();
        let passed = first.wrapping_sub(count);
        if passed >= COUNTS {
            // A missing PIT reads as ones and never gets here; a slow host counts more than asked for.
            return Some((now - start) * 1193 / u64::from(passed));
        }
        // At any plausible rate, a count that has not come by now never will.
        if now.wrapping_sub(start) > 1 << 30 {
            return None;
        }
    }
}

/// Channel 0's count and when that was: the count is latched by the first write and read at leisure.
fn pit_moment() -> (u64, u16) {
    let before = cpu::tsc();
    cpu::out8(0x43, 0);
    let after = cpu::tsc();
    (
        before + (after - before) / 2,
        u16::from_le_bytes([cpu::in8(0x40), cpu::in8(0x40)]),
    )
}

/// The LAPIC timer of KVM and QEMU counts nanoseconds.
fn lapic_khz() -> u64 {
    let ratio = cpu::lapic_ratio(1_000_000);
    (1_000_000u64 << 32) / ratio.max(1)
}

/// The structure KVM keeps up to date (kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
#[repr(C, align(64))]
struct Pvclock(UnsafeCell<[u32; 8]>);

// SAFETY: written by the host only, and read with volatile accesses under its version lock.
unsafe impl Sync for Pvclock {}

static PVCLOCKS: [Pvclock; CPUS_MAX] = [const { Pvclock(UnsafeCell::new([0; 8])) }; CPUS_MAX];

/// One CPU's kvmclock.
pub(crate) struct KvmClock(*const u32);

impl KvmClock {
    /// Registers this CPU's structure. The host must have one to offer.
    pub(crate) fn start(cpu: usize) -> Self {
        let page = PVCLOCKS[cpu].0.get();
        cpu::write_msr(KVM_SYSTEM_TIME, page as u64 | 1);
        Self(page.cast())
    }

    fn word(&self, index: usize) -> u32 {
        // SAFETY: `index` < 8, of a static of eight words.
        unsafe { self.0.add(index).read_volatile() }
    }

    fn long(&self, index: usize) -> u64 {
        u64::from(self.word(index)) | (u64::from(self.word(index + 1)) << 32)
    }

    fn tsc_khz(&self) -> Option<u64> {
        let (multiplier, shift) = (u64::from(self.word(6)), self.word(7) as i8);
        // ns = (ticks << shift) * multiplier / 2^32
        let khz = (1_000_000u64 << 32).checked_div(multiplier)?;
        Some(if shift < 0 { khz << -shift } else { khz >> shift })
    }

    /// Nanoseconds since the host's epoch for this machine.
    pub(crate) fn now_ns(&self) -> u64 {
        loop {
            let version = self.word(0);
            let (stamp, base_ns) = (self.long(2), self.long(4));
            let (multiplier, shift) = (self.word(6), self.word(7) as i8);
            let elapsed = cpu::tsc().wrapping_sub(stamp);
            let scaled = if shift < 0 { elapsed >> -shift } else { elapsed << shift };
            let ns = base_ns.wrapping_add(((u128::from(scaled) * u128::from(multiplier)) >> 32) as u64);
            if version & 1 == 0 && version == self.word(0) {
                return ns;
            }
        }
    }
}
