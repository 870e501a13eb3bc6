//! Where KVM could not emulate an instruction: one vCPU's registers and memory, for [`emulate`](mod@emulate).
//!
//! Reached from `KVM_EXIT_INTERNAL_ERROR` alone. The instruction's bytes come with that exit; where an older kernel gives
//! fewer than it needs, they are read from memory.

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use crate::emulate::{self, Cpu, Instruction, LONGEST, Mode, Refused, Table, World};
use crate::memory::{Memory, Ram};
use crate::state::vcpu::Host;
use crate::vcpu::Internal;

/// What KVM says it could not do: `KVM_INTERNAL_ERROR_EMULATION`.
pub(crate) const EMULATION: u32 = 1;

/// Do the instruction KVM could not. If that cannot be done here either, the text says what it was.
pub(crate) fn emulate(fd: &VcpuFd, memory: &Memory, host: &Host, internal: &Internal) -> Result<Instruction, String> {
    let known = instruction_bytes(internal);
    let failed = |why: &dyn std::fmt::Display, bytes: &[u8]| {
        format!("KVM could not emulate the instruction {}: {why}", spelled(bytes))
    };
    let regs = fd.get_regs().map_err(|error| failed(&error, &known))?;
    let sregs = fd.get_sregs().map_err(|error| failed(&error, &known))?;
    let mut cpu = registers(&regs, &sregs);
    let mut world = Guest {
        fd,
        ram: memory.ram(),
        host,
    };
    let mut bytes = known;
    let mut done = emulate::step(&mut cpu, &mut world, &bytes);
    if done.is_err() && bytes.len() < LONGEST {
        bytes = emulate::fetch(&cpu, &mut world);
        done = emulate::step(&mut cpu, &mut world, &bytes);
    }
    let instruction = done.map_err(|why| failed(&why, &bytes))?;
    put_back(fd, &cpu, &regs, &sregs).map_err(|error| failed(&error, &bytes))?;
    Ok(instruction)
}

/// The bytes KVM says it read: `data[0]` has flags, the first byte behind it counts, the instruction follows (kvm/api.rst,
/// `emulation_failure`).
fn instruction_bytes(internal: &Internal) -> Vec<u8> {
    let [flags, rest @ ..] = internal.data() else {
        return Vec::new();
    };
    if flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) == 0 {
        return Vec::new();
    }
    let bytes: Vec<u8> = rest.iter().flat_map(|word| word.to_le_bytes()).collect();
    let Some((count, bytes)) = bytes.split_first() else {
        return Vec::new();
    };
    bytes[..usize::from(*count).min(LONGEST).min(bytes.len())].to_vec()
}

fn spelled(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "(unreadable)".to_owned();
    }
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("[{}]", bytes.join(" "))
}

fn registers(regs: &kvm_regs, sregs: &kvm_sregs) -> Cpu {
    const EFER_LMA: u64 = 1 << 10;
    let long = sregs.efer & EFER_LMA != 0;
    let segments = [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs];
    Cpu {
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
            regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
        mode: if long && sregs.cs.l != 0 {
            Mode::Long
        } else if sregs.cs.db != 0 {
            Mode::Protected
        } else {
            Mode::Real
        },
        cpl: sregs.ss.dpl,
        cs: sregs.cs.selector,
        ss: sregs.ss.selector,
        bases: segments.map(|segment| segment.base),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        long_paging: long,
        idt: Table {
            base: sregs.idt.base,
            limit: sregs.idt.limit.into(),
        },
        tss: table(&sregs.tr),
    }
}

const fn table(segment: &kvm_segment) -> Table {
    Table {
        base: segment.base,
        limit: segment.limit,
    }
}

fn put_back(fd: &VcpuFd, cpu: &Cpu, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), kvm_ioctls::Error> {
    if cpu.cr2 != sregs.cr2 {
        fd.set_sregs(&kvm_sregs { cr2: cpu.cr2, ..*sregs })?;
    }
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = cpu.gpr;
    let (rip, rflags) = (cpu.rip, cpu.rflags);
    let after = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    };
    if after == *regs {
        return Ok(());
    }
    fd.set_regs(&after)
}

/// One vCPU's surroundings.
struct Guest<'a> {
    fd: &'a VcpuFd,
    ram: &'a Ram,
    host: &'a Host,
}

fn kvm(error: kvm_ioctls::Error) -> Refused {
    Refused(format!("KVM: {error}"))
}

fn no_memory(at: u64) -> Refused {
    Refused(format!("there is no memory at {at:#x}"))
}

impl Guest<'_> {
    /// Do something with `bytes` of guest memory through a pointer, and mark the page as written if it says so.
    ///
    /// `act` is given an address that is aligned for `bytes`, a power of two, and valid for as many.
    fn in_place<T>(&self, at: u64, bytes: usize, act: impl FnOnce(*mut u8) -> (T, bool)) -> Result<T, Refused> {
        let slice = self.ram.get_slice(GuestAddress(at), bytes).map_err(|_| no_memory(at))?;
        let guard = slice.ptr_guard_mut();
        let pointer = guard.as_ptr();
        if !pointer.addr().is_multiple_of(bytes) {
            return Err(Refused(format!("{at:#x} is not aligned")));
        }
        let (result, written) = act(pointer);
        if written {
            slice.bitmap().mark_dirty(0, bytes);
        }
        Ok(result)
    }
}

impl World for Guest<'_> {
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Refused> {
        self.ram.read_slice(out, GuestAddress(at)).map_err(|_| no_memory(at))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Refused> {
        self.ram.write_slice(bytes, GuestAddress(at)).map_err(|_| no_memory(at))
    }

    fn set_bits(&mut self, at: u64, bits: u64) -> Result<(), Refused> {
        self.in_place(at, size_of::<u64>(), |word| {
            // SAFETY: `in_place` gives eight valid, aligned bytes. vCPUs change them too, by single instructions, which is
            // what an atomic is for; copies of them by other threads of ours go through opaque instructions (memory.rs).
            let word = unsafe { AtomicU64::from_ptr(word.cast()) };
            // x86 is little-endian, and this crate is for nothing else.
            word.fetch_or(bits, Ordering::SeqCst);
            ((), true)
        })
    }

    fn compare_exchange(&mut self, at: u64, expected: u128, new: u128) -> Result<u128, Refused> {
        if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
            return Err(Refused("this host's processor has no cmpxchg16b either".to_owned()));
        }
        self.in_place(at, size_of::<u128>(), |pair| {
            // SAFETY: the processor has the instruction (asked above), and `in_place` gives sixteen valid, aligned bytes,
            // which nobody refers to: see memory.rs.
            let found = unsafe { cmpxchg16b(pair, expected, new) };
            // Even a comparison that fails is a write to the processor (SDM, CMPXCHG16B), and marking is cheap.
            (found, true)
        })
    }

    fn xcr0(&mut self) -> Result<u64, Refused> {
        let xcrs = self.fd.get_xcrs().map_err(kvm)?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0).min(xcrs.xcrs.len());
        let first = xcrs.xcrs[..count].iter().find(|xcr| xcr.xcr == 0);
        first
            .map(|xcr| xcr.value)
            .ok_or_else(|| Refused("KVM does not tell XCR0".to_owned()))
    }

    fn msr(&mut self, index: u32) -> Result<u64, Refused> {
        let msr = crate::state::vcpu::read_msr(self.fd, index).map_err(|error| Refused(error.to_string()))?;
        msr.ok_or_else(|| Refused(format!("MSR {index:#x} cannot be read")))
    }

    fn mxcsr(&mut self) -> Result<u32, Refused> {
        // Not by KVM_GET_FPU, which has a field for it and does not fill it in.
        let area = self.host.read_xsave(self.fd);
        Ok(area.map_err(|error| Refused(error.to_string()))?.mxcsr())
    }

    fn set_mxcsr(&mut self, value: u32) -> Result<(), Refused> {
        self.host
            .change_xsave(self.fd, |area| area.set_mxcsr(value))
            .map_err(|error| Refused(error.to_string()))
    }

    fn x87_status(&mut self) -> Result<u16, Refused> {
        Ok(self.fd.get_fpu().map_err(kvm)?.fsw)
    }

    fn empty_x87(&mut self) -> Result<(), Refused> {
        self.host
            .change_xsave(self.fd, crate::state::vcpu::XsaveArea::empty_x87)
            .map_err(|error| Refused(error.to_string()))
    }

    fn flush_tlb(&mut self) -> Result<(), Refused> {
        // KVM drops what it knows of the guest's page tables when paging changes its rules: so change one, and back
        // (SDM volume 3, 4.10.4.1: MOV to CR4 that modifies PGE).
        const PGE: u64 = 1 << 7;
        let sregs = self.fd.get_sregs().map_err(kvm)?;
        let other = kvm_sregs {
            cr4: sregs.cr4 ^ PGE,
            ..sregs
        };
        self.fd.set_sregs(&other).map_err(kvm)?;
        self.fd.set_sregs(&sregs).map_err(kvm)
    }
}

/// Replace 16 bytes by `new` if they are `expected`; says what was there.
///
/// # Safety
/// The processor must have the instruction; `at` must be aligned, and valid for reads and writes.
unsafe fn cmpxchg16b(at: *mut u8, expected: u128, new: u128) -> u128 {
    let half = |value: u128| u64::try_from(value & u128::from(u64::MAX)).expect("64 bits were kept");
    let (mut low, mut high) = (half(expected), half(expected >> 64));
    // SAFETY: the caller's. rbx belongs to the compiler and is given back as it was.
    unsafe {
        asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") at, inout("rsi") half(new) => _, in("rcx") half(new >> 64),
            inout("rax") low, inout("rdx") high,
            options(nostack)
        );
    }
    u128::from(high) << 64 | u128::from(low)
}
