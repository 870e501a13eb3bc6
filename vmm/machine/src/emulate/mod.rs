//! The instructions KVM's own emulator does not know.
//!
//! A host with VMX or SVM runs a guest's kernel on the processor. A software-virtualised host runs it in KVM's instruction
//! emulator, which was made for the few instructions that touch devices; where it gives up, KVM hands the vCPU back with
//! `KVM_EXIT_INTERNAL_ERROR` and leaves everything as it was before the instruction. Most of what kernels use beyond the
//! emulator is small (a breakpoint, a bit count, a flag), so it is done here. On other hosts this code is never reached.
//!
//! ```text
//!   bytes ── decode ──▶ instruction + operands ── execute ──▶ registers, memory
//!                                                    │ exception, int3, int n
//!                                                    ▼
//!                                             event::deliver ──▶ the guest's own handler
//! ```
//!
//! Nothing in here knows KVM: registers are a value ([`Cpu`]), and whatever else an instruction may reach is behind
//! [`World`]. `fallback.rs` joins the two to a vCPU.
//!
//! # All or nothing
//!
//! [`step`] either does one instruction whole, or refuses and changes no register. That includes exceptions: a breakpoint is
//! *delivered* here, frame and all, and not left pending with KVM, because such a host does not report a pending breakpoint
//! among a vCPU's events, and a guest stopped between the two would lose it on its way (docs/decisions/0013-breakpoints-are-delivered-whole.md).
//!
//! # What is not here
//!
//! 16-bit code, 32-bit paging, vector arithmetic, XSAVE and XRSTOR, single-stepping. A guest that needs them ends with one
//! line that shows the instruction.

mod decode;
mod event;
mod execute;
#[cfg(test)]
mod tests;
mod walk;

use std::fmt;

/// The registers an instruction may read or change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cpu {
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15: the processor's own numbering.
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) mode: Mode,
    /// The privilege of the code, 0 to 3.
    pub(crate) cpl: u8,
    pub(crate) cs: u16,
    pub(crate) ss: u16,
    /// Where es, cs, ss, ds, fs and gs begin.
    pub(crate) bases: [u64; 6],
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    /// EFER.LMA: page tables are those of long mode.
    pub(crate) long_paging: bool,
    pub(crate) idt: Table,
    pub(crate) tss: Table,
}

/// A descriptor table or task state: where, and its last byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Table {
    pub(crate) base: u64,
    pub(crate) limit: u32,
}

/// How instructions are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Long,
    Protected,
    /// 16-bit code, which is not emulated.
    Real,
}

/// What an instruction may reach beside registers. Addresses are physical.
pub(crate) trait World {
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Refused>;
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Refused>;
    /// Set bits of an aligned word, which other vCPUs may be changing.
    fn set_bits(&mut self, at: u64, bits: u64) -> Result<(), Refused>;
    /// Replace 16 aligned bytes by `new` if they are `expected`, in one step for every vCPU; says what was there.
    fn compare_exchange(&mut self, at: u64, expected: u128, new: u128) -> Result<u128, Refused>;
    fn xcr0(&mut self) -> Result<u64, Refused>;
    fn msr(&mut self, index: u32) -> Result<u64, Refused>;
    fn mxcsr(&mut self) -> Result<u32, Refused>;
    fn set_mxcsr(&mut self, value: u32) -> Result<(), Refused>;
    /// The x87 status word.
    fn x87_status(&mut self) -> Result<u16, Refused>;
    /// Mark all x87 registers empty.
    fn empty_x87(&mut self) -> Result<(), Refused>;
    /// Forget every translation of this vCPU.
    fn flush_tlb(&mut self) -> Result<(), Refused>;
}

/// Why an instruction was not done. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused(pub(crate) String);

impl Refused {
    fn because(why: &str) -> Stop {
        Stop::Refused(Self(why.to_owned()))
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why an instruction did not end in the usual way.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stop {
    Exception(Exception),
    Refused(Refused),
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        Self::Refused(refused)
    }
}

/// A fault of the instruction's own making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exception {
    vector: u8,
    code: Option<u32>,
    /// What CR2 becomes.
    address: Option<u64>,
}

impl Exception {
    const UNDEFINED: Stop = Stop::Exception(Self::plain(6));
    const DEVICE_NOT_AVAILABLE: Stop = Stop::Exception(Self::plain(7));
    const X87: Stop = Stop::Exception(Self::plain(16));
    const PROTECTION: Stop = Stop::Exception(Self {
        vector: 13,
        code: Some(0),
        address: None,
    });

    const fn plain(vector: u8) -> Self {
        Self {
            vector,
            code: None,
            address: None,
        }
    }
}

macro_rules! instructions {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// What can be done here.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Instruction {
            $($(#[$doc])* $variant,)*
        }

        impl Instruction {
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),*];

            /// What assemblers call it.
            pub(crate) const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

instructions! {
    Int3 => "int3",
    IntN => "int",
    Fwait => "fwait",
    Emms => "emms",
    Clac => "clac",
    Stac => "stac",
    Xgetbv => "xgetbv",
    Rdtscp => "rdtscp",
    /// lfence, mfence and sfence: leaving the guest for this has ordered everything already.
    Fence => "fence",
    Ldmxcsr => "ldmxcsr",
    Stmxcsr => "stmxcsr",
    Cmpxchg16b => "cmpxchg16b",
    Invpcid => "invpcid",
    Popcnt => "popcnt",
    Tzcnt => "tzcnt",
    Lzcnt => "lzcnt",
    Crc32 => "crc32",
    Adcx => "adcx",
    Adox => "adox",
    Andn => "andn",
    Bextr => "bextr",
    Blsi => "blsi",
    Blsmsk => "blsmsk",
    Blsr => "blsr",
    Bzhi => "bzhi",
    Mulx => "mulx",
    Pdep => "pdep",
    Pext => "pext",
    Rorx => "rorx",
    Sarx => "sarx",
    Shlx => "shlx",
    Shrx => "shrx",
}

/// Longest instruction of the architecture.
pub(crate) const LONGEST: usize = 15;

const TF: u64 = 1 << 8;
const RF: u64 = 1 << 16;

/// Do the instruction at `cpu.rip`, of which `bytes` are the first, or all that are known. An exception it raises has been
/// delivered when this returns.
pub(crate) fn step(cpu: &mut Cpu, world: &mut dyn World, bytes: &[u8]) -> Result<Instruction, Refused> {
    let mut after = cpu.clone();
    let decoded = decode::decode(cpu, bytes)?;
    let instruction = decoded.instruction;
    let (done, resume) = match execute::execute(&mut after, world, &decoded) {
        Ok(()) => (Ok(()), after),
        Err(stop) => (Err(stop), cpu.clone()),
    };
    let mut after = resume;
    match done {
        // An event's delivery has set RIP and flags, and clears TF itself.
        Ok(()) if matches!(instruction, Instruction::Int3 | Instruction::IntN) => {}
        Ok(()) if cpu.rflags & TF != 0 => {
            return Err(Refused(format!("{} while single-stepping", instruction.name())));
        }
        Ok(()) => {
            after.rip = decoded.next;
            after.rflags &= !RF;
        }
        Err(Stop::Refused(refused)) => return Err(refused),
        Err(Stop::Exception(exception)) => event::fault(&mut after, world, exception)?,
    }
    *cpu = after;
    Ok(instruction)
}

/// The bytes at `cpu.rip`, as many as can be read.
pub(crate) fn fetch(cpu: &Cpu, world: &mut dyn World) -> Vec<u8> {
    let start = match cpu.mode {
        Mode::Long => cpu.rip,
        Mode::Protected | Mode::Real => cpu.bases[1].wrapping_add(cpu.rip) & 0xffff_ffff,
    };
    let mut bytes = Vec::new();
    for n in 0..LONGEST as u64 {
        let mut byte = [0];
        let at = start.wrapping_add(n);
        let read = walk::translate(cpu, world, at, walk::Access::System)
            .and_then(|at| world.read(at, &mut byte).map_err(Stop::from));
        if read.is_err() {
            break;
        }
        bytes.extend(byte);
    }
    bytes
}
