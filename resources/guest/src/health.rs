//! What a vCPU keeps besides memory, checked as it goes: registers, clocks, its timer.
//!
//! A pattern is planted in every register that the compiler never uses, so that it lives nowhere but in the
//! saved state of the vCPU: the bases of fs and gs (where CPL3 may set them), the eight MMX registers, the x87
//! control word, and a harmless bit of MXCSR. The SSE registers need none: the page checks live in them.
//!
//! With `simd=on` also zmm16, zmm31 and k7, where the CPU has them. Not by default: a host that runs CPL3 natively
//! shows it AVX-512 already enabled, though nobody enabled it *for this guest*, and a VMM that was told of no such
//! state (QEMU on such a host) rightly does not carry it.

use crate::EXIT_CORRUPT;
use crate::boot::Share;
use crate::clock::KvmClock;
use crate::console::fatal;
use crate::cpu::{self, Timer};
use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use umbra_guest::pattern::mix;

/// Registers and clocks are looked at this often.
const LOOK_US: u64 = 5_000;
/// A busy CPU asks for a tick this far ahead.
const TICK_US: u64 = 10_000;
/// And calls the timer dead after running this long without one.
const TICK_LOST_US: u64 = 3_000_000;
/// Default MXCSR with flush-to-zero; nothing here computes denormals.
const MXCSR: u32 = 0x9f80;
/// Bits 0..6 of MXCSR are sticky flags that any floating-point operation may raise.
const MXCSR_KEPT: u32 = !0x3f;
/// x87: all masked, extended precision, round towards zero. The compiler never uses the x87.
const X87_CONTROL: u16 = 0x0f7f;

/// One CPU's health.
pub(crate) struct Health {
    cpu: usize,
    seed: u64,
    fsgsbase: bool,
    avx512: bool,
    kvmclock: Option<KvmClock>,
    last_tsc: u64,
    last_ns: u64,
    next_look: u64,
    look_ticks: u64,
    // The busy CPU's watch on its timer: interrupts seen, when the one asked for is due (none if 0), and how
    // long this CPU has been running since.
    ticks_seen: u64,
    tick_due: u64,
    tick_missing: u64,
    tick_ahead: u64,
    tick_lost: u64,
}

impl Health {
    /// Plants the patterns.
    pub(crate) fn plant(cpu: usize, share: &Share) -> Self {
        let ticks = |us| share.clock.ticks(us);
        let health = Self {
            cpu,
            seed: mix(0x0ba5_e000 + cpu as u64),
            fsgsbase: cpu::cpuid(0, 0)[0] >= 7 && cpu::cpuid(7, 0)[1] & 1 != 0,
            avx512: share.config.simd && enable_avx512(),
            kvmclock: share.clock.kvm.then(|| KvmClock::start(cpu)),
            last_tsc: 0,
            last_ns: 0,
            next_look: 0,
            look_ticks: ticks(LOOK_US),
            ticks_seen: 0,
            tick_due: 0,
            tick_missing: 0,
            tick_ahead: ticks(TICK_US),
            tick_lost: ticks(TICK_LOST_US),
        };
        health.plant_registers();
        health
    }

    /// Looks at the clock, and now and then at everything else. Returns the time.
    #[inline(always)]
    pub(crate) fn look(&mut self) -> u64 {
        let now = cpu::tsc();
        if now < self.last_tsc {
            self.corrupt("tsc", self.last_tsc, now);
        }
        self.last_tsc = now;
        if now >= self.next_look {
            self.next_look = now + self.look_ticks;
            self.look_closely();
        }
        now
    }

    #[inline(never)]
    fn look_closely(&mut self) {
        if let Some(kvmclock) = &self.kvmclock {
            let ns = kvmclock.now_ns();
            if ns < self.last_ns {
                self.corrupt("kvmclock", self.last_ns, ns);
            }
            self.last_ns = ns;
        }
        self.check_registers();
    }

    /// For a CPU that does not sleep: keeps a tick coming, and notices when it does not.
    #[inline(always)]
    pub(crate) fn expect_ticks(&mut self, timer: &Timer, before: u64, now: u64) {
        let ticks = timer.ticks();
        if ticks != self.ticks_seen || self.tick_due == 0 {
            self.ticks_seen = ticks;
            self.tick_missing = 0;
            self.tick_due = now + self.tick_ahead;
            timer.arm(self.tick_ahead);
        } else if now > self.tick_due {
            // A jump means that this CPU did not run, so neither did its timer's handler.
            self.tick_missing += (now - before).min(self.tick_ahead);
            if self.tick_missing > self.tick_lost {
                self.corrupt("timer", ticks + 1, ticks);
            }
        }
    }

    /// The timer was used for something else: the tick asked for will not come.
    pub(crate) fn forget_tick(&mut self) {
        self.tick_due = 0;
    }

    fn pattern(&self, register: u64) -> u64 {
        mix(self.seed + register)
    }

    /// An address-like value: 47 bits, so that it is canonical.
    fn base_pattern(&self, register: u64) -> u64 {
        self.pattern(register) >> 17
    }

    fn plant_registers(&self) {
        if self.fsgsbase {
            // SAFETY: `boot.s` set CR4.FSGSBASE by the same CPUID bit; nothing here uses fs or gs.
            unsafe {
                asm!("wrfsbase {}", "wrgsbase {}", in(reg) self.base_pattern(1), in(reg) self.base_pattern(2), options(nostack))
            };
        }
        let words: [u64; 8] = core::array::from_fn(|i| self.pattern(10 + i as u64));
        // SAFETY: reads what it is given; MMX and x87 are ours alone. MXCSR keeps what Rust relies on: all
        // exceptions masked, round to nearest.
        unsafe {
            asm!("fldcw [{control}]", "ldmxcsr [{mxcsr}]",
                "movq mm0, [{words}]", "movq mm1, [{words} + 8]", "movq mm2, [{words} + 16]", "movq mm3, [{words} + 24]",
                "movq mm4, [{words} + 32]", "movq mm5, [{words} + 40]", "movq mm6, [{words} + 48]", "movq mm7, [{words} + 56]",
                control = in(reg) &X87_CONTROL, mxcsr = in(reg) &MXCSR, words = in(reg) &words, options(nostack));
        }
        if self.avx512 {
            // SAFETY: the CPU has these registers, they are enabled, and SSE code never names them.
            unsafe {
                asm!("vmovdqu64 zmm16, [{words}]", "vmovdqu64 zmm31, [{words}]", "kmovw k7, {mask:e}",
                    words = in(reg) &words, mask = in(reg) self.pattern(20) as u32 & 0xffff, options(nostack));
            }
        }
    }

    fn check_registers(&self) {
        if self.fsgsbase {
            let (fs, gs): (u64, u64);
            // SAFETY: as in `plant_registers`.
            unsafe { asm!("rdfsbase {}", "rdgsbase {}", out(reg) fs, out(reg) gs, options(nostack)) };
            self.expect("fsbase", self.base_pattern(1), fs);
            self.expect("gsbase", self.base_pattern(2), gs);
        }
        let (mut control, mut mxcsr, mut words) = (0u16, 0u32, [0u64; 8]);
        // SAFETY: writes what it is given.
        unsafe {
            asm!("fnstcw [{control}]", "stmxcsr [{mxcsr}]",
                "movq [{words}], mm0", "movq [{words} + 8], mm1", "movq [{words} + 16], mm2", "movq [{words} + 24], mm3",
                "movq [{words} + 32], mm4", "movq [{words} + 40], mm5", "movq [{words} + 48], mm6", "movq [{words} + 56], mm7",
                control = in(reg) &mut control, mxcsr = in(reg) &mut mxcsr, words = in(reg) &mut words, options(nostack));
        }
        self.expect("fcw", u64::from(X87_CONTROL), u64::from(control));
        self.expect("mxcsr", u64::from(MXCSR), u64::from(mxcsr & MXCSR_KEPT));
        self.expect_words("mmx", &words);
        if self.avx512 {
            let (mut high, mut low, mask) = ([0u64; 8], [0u64; 8], 0u32);
            let mut mask = mask;
            // SAFETY: as in `plant_registers`.
            unsafe {
                asm!("vmovdqu64 [{low}], zmm16", "vmovdqu64 [{high}], zmm31", "kmovw {mask:e}, k7",
                    low = in(reg) &mut low, high = in(reg) &mut high, mask = inout(reg) mask, options(nostack));
            }
            self.expect_words("zmm16", &low);
            self.expect_words("zmm31", &high);
            self.expect("k7", self.pattern(20) & 0xffff, u64::from(mask));
        }
    }

    fn expect_words(&self, what: &str, found: &[u64; 8]) {
        for (i, &word) in found.iter().enumerate() {
            self.expect(what, self.pattern(10 + i as u64), word);
        }
    }

    fn expect(&self, what: &str, want: u64, found: u64) {
        if want != found {
            self.corrupt(what, want, found);
        }
    }

    #[cold]
    fn corrupt(&self, what: &str, want: u64, found: u64) -> ! {
        let cpu = self.cpu;
        fatal(
            EXIT_CORRUPT,
            format_args!("CORRUPT what={what} cpu={cpu} want={want:#x} found={found:#x}"),
        )
    }
}

/// Whether AVX-512 state can be used, after turning it on where that takes turning on (SDM vol. 1, Detection of
/// AVX-512 Foundation Instructions).
///
/// CPUID is asked at CPL3: these registers are used there, and a host that runs CPL3 natively has its own idea
/// of XCR0.
fn enable_avx512() -> bool {
    const XSAVE: u32 = 1 << 26;
    const OSXSAVE: u32 = 1 << 27;
    const AVX512F: u32 = 1 << 16;
    /// x87, SSE, AVX, and the three parts of AVX-512.
    const COMPONENTS: u32 = 0xe7;
    if __cpuid_count(0, 0).eax < 0xd || __cpuid_count(1, 0).ecx & XSAVE == 0 {
        return false;
    }
    if __cpuid_count(1, 0).ecx & OSXSAVE == 0 {
        let components = __cpuid_count(0xd, 0).eax & COMPONENTS;
        // AVX-512 comes whole or not at all, as XSETBV insists.
        let components = if components == COMPONENTS {
            components
        } else {
            components & 7
        };
        // SAFETY: CPUID lists XSAVE and these components.
        unsafe { cpu::enable_extended_state(components) };
    }
    let xcr0: u32;
    // SAFETY: OSXSAVE is set.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nostack, nomem)) };
    xcr0 & COMPONENTS == COMPONENTS && __cpuid_count(7, 0).ebx & AVX512F != 0
}
