//! What happens once: gates, the loader's information, the shared state, the other CPUs.

use crate::beat::Beat;
use crate::clock::Clock;
use crate::console::{self, fatal};
use crate::cpu;
use crate::plan::{Memory, Plan};
use crate::{EXIT_CORRUPT, refuse};
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use umbra_guest::config::{CPUS_MAX, Config, Content};
use umbra_guest::proof::{PerCpu, ROOT_MAGIC, Root};

global_asm!(include_str!("boot.s"));

unsafe extern "C" {
    fn service_gate();
    fn ignore_gate();
    fn timer_gates();
    fn device_gate();
    fn fault_gates();
    static trampoline: u8;
    static trampoline_end: u8;
}

/// A page that both this kernel and an observer use by address.
#[repr(transparent)]
struct RootPage(UnsafeCell<Root>);

// SAFETY: written by the BSP alone until published; after that each CPU writes its own `PerCpu`.
unsafe impl Sync for RootPage {}

#[unsafe(no_mangle)]
#[unsafe(link_section = ".root")]
#[allow(non_upper_case_globals, reason = "the link script names it")]
static root_page: RootPage = RootPage(UnsafeCell::new(Root::empty()));

/// Vector, error code, RIP, RSP and CR2 of the last fault, written by `boot.s`.
#[unsafe(no_mangle)]
pub(crate) static FAULT: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];
/// Which CPU the trampoline is starting, read by `boot.s`.
#[unsafe(no_mangle)]
static AP_CPU: AtomicU32 = AtomicU32::new(0);

/// Interrupt descriptors; `boot.s` loads their address before they are filled in.
#[repr(C, align(4096))]
struct Idt([AtomicU64; 512]);

#[unsafe(no_mangle)]
static IDT: Idt = Idt([const { AtomicU64::new(0) }; 512]);

/// Fills the interrupt descriptor table. Before this, any fault is a triple fault.
pub(crate) fn install_gates() {
    for vector in 0..256 {
        gate(vector, ignore_gate as *const () as usize, 0);
    }
    for fault in 0..32 {
        gate(fault, fault_gates as *const () as usize + fault * 16, 0);
    }
    gate(6, service_gate as *const () as usize, 3);
    gate(cpu::DEVICE_VECTOR, device_gate as *const () as usize, 0);
    for cpu in 0..CPUS_MAX {
        gate(cpu::TIMER_VECTOR + cpu, timer_gates as *const () as usize + cpu * 32, 0);
    }
}

/// An interrupt gate (type 0xE: IF is cleared) to CPL0.
fn gate(vector: usize, handler: usize, callable_from: u64) {
    let handler = handler as u64;
    let low = (handler & 0xffff) | (0x10 << 16) | (0xe << 40) | (callable_from << 45) | (1 << 47);
    IDT.0[vector * 2].store(low | ((handler >> 16 & 0xffff) << 48), Ordering::Relaxed);
    IDT.0[vector * 2 + 1].store(handler >> 32, Ordering::Relaxed);
}

const COMMAND_LINE_BYTES: usize = 1024;

/// What the loader left in memory (xen/include/public/arch-x86/hvm/start_info.h), copied out before anything
/// else is written there.
pub(crate) struct Loader {
    command_line: [u8; COMMAND_LINE_BYTES],
    command_line_len: usize,
    memory: Memory,
}

impl Loader {
    const MAGIC: u32 = 0x336e_c578;

    /// Reads `hvm_start_info` at this address.
    pub(crate) fn read(start_info: u32) -> Self {
        let mut loader = Self {
            command_line: [0; COMMAND_LINE_BYTES],
            command_line_len: 0,
            memory: Memory::UNKNOWN,
        };
        let info = u64::from(start_info);
        if start_info == 0 || peek32(info) != Self::MAGIC {
            refuse("", format_args!("a PVH loader, with hvm_start_info in ebx"));
        }
        loader.copy_command_line(peek64(info + 24));
        let version = peek32(info + 4);
        let (map, entries) = (peek64(info + 40), peek32(info + 48));
        if version >= 1 && map != 0 && is_mapped(map) {
            // 128 as in Linux (E820_MAX_ENTRIES_ZEROPAGE): a guard against nonsense.
            for entry in 0..u64::from(entries.min(128)) {
                let at = map + entry * 24;
                if peek32(at + 16) == 1 {
                    loader.memory.add(peek64(at), peek64(at + 8));
                }
            }
        }
        loader
    }

    fn copy_command_line(&mut self, from: u64) {
        if from == 0 || !is_mapped(from) {
            return;
        }
        loop {
            let byte = peek8(from + self.command_line_len as u64);
            if byte == 0 {
                return;
            }
            if self.command_line_len == COMMAND_LINE_BYTES {
                refuse("...", format_args!("a command line of at most 1024 bytes"));
            }
            self.command_line[self.command_line_len] = byte;
            self.command_line_len += 1;
        }
    }

    /// The command line.
    pub(crate) fn command_line(&self) -> &str {
        let bytes = &self.command_line[..self.command_line_len];
        core::str::from_utf8(bytes).unwrap_or_else(|_| refuse("?", format_args!("ASCII")))
    }

    /// RAM, as far as the loader says.
    pub(crate) fn memory(&self) -> Memory {
        self.memory
    }
}

/// Whether the boot page tables reach it, with room for what is read there.
fn is_mapped(address: u64) -> bool {
    address < (1 << 32) - 8192
}

fn peek8(address: u64) -> u8 {
    // SAFETY: callers checked `is_mapped`, or got it in a 32-bit register; reading RAM has no effects.
    unsafe { (address as *const u8).read_volatile() }
}

fn peek32(address: u64) -> u32 {
    // SAFETY: as above.
    unsafe { (address as *const u32).read_unaligned() }
}

fn peek64(address: u64) -> u64 {
    // SAFETY: as above.
    unsafe { (address as *const u64).read_unaligned() }
}

/// What all CPUs share and none changes.
pub(crate) struct Share {
    /// What was asked for.
    pub(crate) config: Config,
    /// What a tick is worth.
    pub(crate) clock: Clock,
    /// Where proof pages lie.
    pub(crate) plan: Plan,
}

struct ShareCell(UnsafeCell<MaybeUninit<Share>>);

// SAFETY: written once by the BSP, before any other CPU runs; read-only after.
unsafe impl Sync for ShareCell {}

static SHARE: ShareCell = ShareCell(UnsafeCell::new(MaybeUninit::uninit()));

/// Makes the decisions of the BSP known: to the APs, and in the root page to an observer.
pub(crate) fn publish(config: Config, clock: Clock, plan: Plan) -> &'static Share {
    let root = root_page.0.get();
    // SAFETY: the BSP is alone, and nobody else has a reference to either static yet.
    unsafe {
        (*root).version = 1;
        (*root).cpus = config.cpus as u32;
        (*root).pages = plan.pages;
        (*root).working = plan.working;
        (*root).low_gpa = plan.low_gpa;
        (*root).low_pages = plan.low_pages;
        (*root).high_gpa = plan.high_gpa;
        (*root).table_gpa = plan.table as u64;
        (*root).content = match config.content {
            Content::Zero => 0,
            Content::Counter => 1,
            Content::Text => 2,
            Content::Random => 3,
            Content::Mixed => 4,
        };
        (&raw mut (*root).cpu[0].stage).write_volatile(1);
        (&raw mut (*root).magic).write_volatile(ROOT_MAGIC);
        (*SHARE.0.get()).write(Share { config, clock, plan })
    }
}

/// What the BSP published.
pub(crate) fn share() -> &'static Share {
    // SAFETY: only APs call this, and the BSP publishes before it starts any.
    unsafe { (*SHARE.0.get()).assume_init_ref() }
}

impl Share {
    /// A CPU's part of the root page.
    pub(crate) fn root_cpu(&self, cpu: usize) -> CpuCell {
        assert!(cpu < CPUS_MAX, "cpu {cpu}");
        // SAFETY: in bounds.
        CpuCell(unsafe { &raw mut (*root_page.0.get()).cpu[cpu] })
    }
}

/// A CPU's part of the root page: written by that CPU alone, and read by anyone (an observer may look between
/// any two instructions, hence volatile).
#[derive(Clone, Copy)]
pub(crate) struct CpuCell(*mut PerCpu);

macro_rules! cells {
    ($($field:ident $set:ident),*) => { $(
        /// Reads the field of this name.
        #[inline(always)]
        pub(crate) fn $field(self) -> u64 {
            // SAFETY: points into the root page.
            unsafe { (&raw const (*self.0).$field).read_volatile() }
        }
        /// Writes the field of this name; only its own CPU may.
        #[inline(always)]
        pub(crate) fn $set(self, value: u64) {
            // SAFETY: as above, and one owner.
            unsafe { (&raw mut (*self.0).$field).write_volatile(value) }
        }
    )* };
}

impl CpuCell {
    cells!(written set_written, checked set_checked, ops set_ops, turns set_turns, stage set_stage);

    /// Opens the journal: this page is being moved from one version to another.
    #[inline(always)]
    pub(crate) fn open_journal(self, page: u64, from: u64, to: u64) {
        // SAFETY: points into the root page; one owner.
        unsafe {
            (&raw mut (*self.0).journal.page).write_volatile(page);
            (&raw mut (*self.0).journal.from).write_volatile(from);
            (&raw mut (*self.0).journal.to).write_volatile(to);
        }
    }

    /// The version being written, 0 if none.
    #[inline(always)]
    pub(crate) fn journal_to(self) -> u64 {
        // SAFETY: points into the root page.
        unsafe { (&raw const (*self.0).journal.to).read_volatile() }
    }

    /// Closes it.
    #[inline(always)]
    pub(crate) fn close_journal(self) {
        // SAFETY: points into the root page; one owner.
        unsafe { (&raw mut (*self.0).journal.to).write_volatile(0) };
    }
}

/// Starts one more CPU and waits until it runs, beating all the while.
pub(crate) fn start_ap(ap: usize, share: &'static Share, beat: &mut Beat) {
    let (from, to) = ((&raw const trampoline) as usize, cpu::TRAMPOLINE);
    let len = (&raw const trampoline_end) as usize - from;
    // SAFETY: RAM below 640 KiB, of no more use to anyone: the loader's data has been copied.
    unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
    AP_CPU.store(ap as u32, Ordering::SeqCst);
    let online = |beat: &mut Beat, us: u64| {
        let start = cpu::tsc();
        while cpu::tsc().wrapping_sub(start) < share.clock.ticks(us) {
            beat.poll(cpu::tsc());
            if share.root_cpu(ap).stage() != 0 {
                return true;
            }
        }
        false
    };
    cpu::send_init(ap as u32);
    online(beat, 100);
    // SDM vol. 3, MP Initialization: the start-up IPI is sent twice, lest the first is lost. Seldom needed.
    for _ in 0..2 {
        cpu::send_startup(ap as u32);
        if online(beat, 50_000) {
            return;
        }
    }
    // A loaded host may simply be slow.
    if !online(beat, 10_000_000) {
        console::start_line();
        fatal(EXIT_CORRUPT, format_args!("umbra-guest: cpu {ap} did not start"));
    }
}
