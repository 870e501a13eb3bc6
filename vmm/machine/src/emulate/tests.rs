//! Every instruction against the processor that runs the tests, and everything else against the manual.

use std::arch::asm;

use proptest::prelude::*;

use super::{Cpu, Instruction, Mode, Refused, Table, World, fetch, step};

const MEMORY: usize = 64 << 10;
const CODE: u64 = 0x1000;

/// 64 KiB of memory, and the rest as plain values.
struct Sandbox {
    memory: Vec<u8>,
    xcr0: u64,
    mxcsr: u32,
    x87_status: u16,
    x87_empty: bool,
    flushed: u32,
}

impl Sandbox {
    fn new() -> Self {
        Self {
            memory: vec![0; MEMORY],
            xcr0: 7,
            mxcsr: 0x1f80,
            x87_status: 0,
            x87_empty: false,
            flushed: 0,
        }
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.memory[at..at + 8].try_into().unwrap())
    }

    fn put(&mut self, at: usize, word: u64) {
        self.memory[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }

    fn place(&self, at: u64, bytes: usize) -> Result<std::ops::Range<usize>, Refused> {
        let at = usize::try_from(at).unwrap();
        let end = at.checked_add(bytes).filter(|end| *end <= MEMORY);
        end.map(|end| at..end)
            .ok_or_else(|| Refused(format!("there is no memory at {at:#x}")))
    }
}

impl World for Sandbox {
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Refused> {
        out.copy_from_slice(&self.memory[self.place(at, out.len())?]);
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Refused> {
        let place = self.place(at, bytes.len())?;
        self.memory[place].copy_from_slice(bytes);
        Ok(())
    }

    fn set_bits(&mut self, at: u64, bits: u64) -> Result<(), Refused> {
        let at = self.place(at, 8)?.start;
        self.put(at, self.word(at) | bits);
        Ok(())
    }

    fn compare_exchange(&mut self, at: u64, expected: u128, new: u128) -> Result<u128, Refused> {
        let place = self.place(at, 16)?;
        let found = u128::from_le_bytes(self.memory[place.clone()].try_into().unwrap());
        if found == expected {
            self.memory[place].copy_from_slice(&new.to_le_bytes());
        }
        Ok(found)
    }

    fn xcr0(&mut self) -> Result<u64, Refused> {
        Ok(self.xcr0)
    }

    fn msr(&mut self, index: u32) -> Result<u64, Refused> {
        Ok(u64::from(index) << 32 | 0x5555)
    }

    fn mxcsr(&mut self) -> Result<u32, Refused> {
        Ok(self.mxcsr)
    }

    fn set_mxcsr(&mut self, value: u32) -> Result<(), Refused> {
        self.mxcsr = value;
        Ok(())
    }

    fn x87_status(&mut self) -> Result<u16, Refused> {
        Ok(self.x87_status)
    }

    fn empty_x87(&mut self) -> Result<(), Refused> {
        self.x87_empty = true;
        Ok(())
    }

    fn flush_tlb(&mut self) -> Result<(), Refused> {
        self.flushed += 1;
        Ok(())
    }
}

/// A 64-bit kernel without paging, which no processor has and which leaves addresses as they are.
fn cpu() -> Cpu {
    Cpu {
        gpr: std::array::from_fn(|n| 0x0101_0101_0101_0101 * n as u64),
        rip: CODE,
        rflags: 2,
        mode: Mode::Long,
        cpl: 0,
        cs: 0x10,
        ss: 0x18,
        bases: [0, 0, 0, 0, 0x8000, 0x9000],
        cr0: 0x8000_0023 & !(1 << 31),
        cr2: 0,
        cr3: 0,
        cr4: 1 << 9 | 1 << 18,
        long_paging: true,
        idt: Table {
            base: 0x2000,
            limit: 0xfff,
        },
        tss: Table {
            base: 0x3000,
            limit: 0x67,
        },
    }
}

fn done(bytes: &[u8]) -> (Cpu, Sandbox) {
    let (mut cpu, mut world) = (cpu(), Sandbox::new());
    step(&mut cpu, &mut world, bytes).unwrap();
    (cpu, world)
}

fn refused(cpu: &Cpu, bytes: &[u8]) -> String {
    let mut after = cpu.clone();
    let why = step(&mut after, &mut Sandbox::new(), bytes).unwrap_err();
    assert_eq!(after, *cpu, "what is refused changes nothing");
    why.0
}

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const ZF: u64 = 1 << 6;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const AC: u64 = 1 << 18;

#[test]
fn the_table_reads_each_encoding_as_its_instruction_and_length() {
    use Instruction as I;
    for (bytes, instruction) in [
        (&[0x9b][..], I::Fwait),
        (&[0x0f, 0x77], I::Emms),
        (&[0x0f, 0x01, 0xca], I::Clac),
        (&[0x0f, 0x01, 0xcb], I::Stac),
        (&[0x0f, 0x01, 0xf9], I::Rdtscp),
        (&[0x0f, 0xae, 0xe8], I::Fence),
        (&[0x0f, 0xae, 0x55, 0x80], I::Ldmxcsr),
        (&[0x0f, 0xae, 0x9d, 0, 0, 0, 0], I::Stmxcsr),
        (&[0xf0, 0x48, 0x0f, 0xc7, 0x0d, 0xf7, 0, 0, 0], I::Cmpxchg16b),
        (&[0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 0x10, 0, 0], I::Invpcid),
        (&[0xf3, 0x0f, 0xb8, 0xc0], I::Popcnt),
        (&[0x66, 0xf3, 0x41, 0x0f, 0xb8, 0xc0], I::Popcnt),
        (&[0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x04, 0x25, 0x10, 0, 0, 0], I::Popcnt),
        (&[0xf3, 0x0f, 0xbc, 0xc1], I::Tzcnt),
        (&[0xf3, 0x0f, 0xbd, 0xc1], I::Lzcnt),
        (&[0xf2, 0x0f, 0x38, 0xf1, 0xc1], I::Crc32),
        (&[0x66, 0x0f, 0x38, 0xf6, 0xc1], I::Adcx),
        (&[0xf3, 0x0f, 0x38, 0xf6, 0xc1], I::Adox),
        (&[0xc4, 0xe2, 0x70, 0xf2, 0xc2], I::Andn),
        (&[0xc4, 0xe2, 0x70, 0xf3, 0xca], I::Blsr),
        (&[0xc4, 0xe2, 0x70, 0xf3, 0xd2], I::Blsmsk),
        (&[0xc4, 0xe2, 0x70, 0xf3, 0xda], I::Blsi),
        (&[0xc4, 0xe2, 0x70, 0xf5, 0xc2], I::Bzhi),
        (&[0xc4, 0xe2, 0x72, 0xf5, 0xc2], I::Pext),
        (&[0xc4, 0xe2, 0x73, 0xf5, 0xc2], I::Pdep),
        (&[0xc4, 0xe2, 0x73, 0xf6, 0xc2], I::Mulx),
        (&[0xc4, 0xe2, 0x70, 0xf7, 0xc2], I::Bextr),
        (&[0xc4, 0xe2, 0x71, 0xf7, 0xc2], I::Shlx),
        (&[0xc4, 0xe2, 0x72, 0xf7, 0xc2], I::Sarx),
        (&[0xc4, 0xe2, 0x73, 0xf7, 0xc2], I::Shrx),
        (&[0xc4, 0xe3, 0x7b, 0xf0, 0xc2, 5], I::Rorx),
    ] {
        let (mut cpu, mut world) = (cpu(), Sandbox::new());
        cpu.gpr = [0; 16];
        cpu.gpr[5] = 0x1000;
        world.put(0xf80, 0x1f80);
        let longer = [bytes, &[0x90; 3]].concat();
        assert_eq!(step(&mut cpu, &mut world, &longer), Ok(instruction), "{bytes:x?}");
        assert_eq!(cpu.rip, CODE + bytes.len() as u64, "{bytes:x?}");
        for len in 0..bytes.len() {
            assert_eq!(
                refused(&cpu, &bytes[..len]),
                "the instruction's end is missing",
                "{bytes:x?}"
            );
        }
    }
}

#[test]
fn what_is_not_in_the_table_is_refused_and_changes_nothing() {
    for bytes in [
        &[0x90][..],                        // nop
        &[0x66, 0x0f, 0xef, 0xc0],          // pxor
        &[0xf0, 0xf3, 0x0f, 0xb8, 0xc0],    // lock popcnt
        &[0x0f, 0xc7, 0x0e],                // cmpxchg8b
        &[0x0f, 0xae, 0xd0],                // ldmxcsr of a register
        &[0x66, 0x0f, 0x38, 0x82, 0xc0],    // invpcid of a register
        &[0xc4, 0xe2, 0x74, 0xf2, 0xc2],    // andn, 256 bits
        &[0xc4, 0xe3, 0x73, 0xf0, 0xc2, 0], // rorx with a second source
        &[0xc5, 0xf8, 0x77],                // vzeroupper
        &[0x0f, 0x38, 0xf0, 0x00],          // movbe: KVM knows it
    ] {
        assert_eq!(
            refused(&cpu(), bytes),
            "it is not among those emulated here",
            "{bytes:x?}"
        );
    }
    assert_eq!(refused(&cpu(), &[0x66; 20]), "the instruction's end is missing");
    let real = Cpu {
        mode: Mode::Real,
        ..cpu()
    };
    assert_eq!(refused(&real, &[0xcc]), "16-bit code is not emulated");
    let stepping = Cpu { rflags: TF, ..cpu() };
    assert_eq!(refused(&stepping, &[0x9b]), "fwait while single-stepping");
}

#[test]
fn an_operand_is_found_by_every_way_of_addressing() {
    // popcnt rax, [..]: the word there has as many ones as its address is high.
    let count = |address: &[u8], set: &[(usize, u64)]| {
        let (mut cpu, mut world) = (cpu(), Sandbox::new());
        for (register, value) in set {
            cpu.gpr[*register] = *value;
        }
        for n in 1..=40 {
            world.put(n * 0x100, u64::MAX >> (64 - n));
        }
        world.put(0x8100, 0x1ff_ffff);
        let bytes = [&[0xf3][..], address].concat();
        step(&mut cpu, &mut world, &bytes).unwrap();
        cpu.gpr[RAX]
    };
    // [rcx]; [rcx+disp8]; [rcx+disp32]; [disp32]; [rip+disp32]; [rbx+rcx*4]; [r13]; [r12+r12*8]; [rcx*8+disp32]; fs:[rcx]
    assert_eq!(count(&[0x48, 0x0f, 0xb8, 0x01], &[(RCX, 0x300)]), 3);
    assert_eq!(count(&[0x48, 0x0f, 0xb8, 0x41, 0x80], &[(RCX, 0x480)]), 4);
    assert_eq!(
        count(&[0x48, 0x0f, 0xb8, 0x81, 0x00, 0xf0, 0xff, 0xff], &[(RCX, 0x1500)]),
        5
    );
    assert_eq!(count(&[0x48, 0x0f, 0xb8, 0x04, 0x25, 0x00, 0x06, 0, 0], &[]), 6);
    assert_eq!(count(&[0x48, 0x0f, 0xb8, 0x05, 0xf7, 0xfb, 0xff, 0xff], &[]), 12);
    assert_eq!(count(&[0x48, 0x0f, 0xb8, 0x04, 0x8b], &[(RBX, 0x300), (RCX, 0x100)]), 7);
    assert_eq!(count(&[0x49, 0x0f, 0xb8, 0x45, 0x00], &[(13, 0x800)]), 8);
    assert_eq!(count(&[0x4b, 0x0f, 0xb8, 0x04, 0xe4], &[(12, 0x100)]), 9);
    assert_eq!(
        count(&[0x48, 0x0f, 0xb8, 0x04, 0xcd, 0x00, 0x02, 0, 0], &[(RCX, 0x100)]),
        10
    );
    assert_eq!(count(&[0x64, 0x48, 0x0f, 0xb8, 0x01], &[(RCX, 0x100)]), 25);
    // 32-bit addresses wrap at 4 GiB; a segment that long mode ignores is ignored.
    assert_eq!(
        count(&[0x67, 0x48, 0x0f, 0xb8, 0x41, 0x10], &[(RCX, 0xffff_ffff_0000_0af0)]),
        11
    );
    assert_eq!(count(&[0x26, 0x48, 0x0f, 0xb8, 0x01], &[(RCX, 0x300)]), 3);
}

/// What the processor running this test makes of rax, rcx, rdx and the flags.
type Native = fn([u64; 3], u64) -> ([u64; 3], u64);

macro_rules! native {
    ($text:literal) => {
        |[mut rax, mut rcx, mut rdx]: [u64; 3], mut flags: u64| {
            // SAFETY: an instruction that reads and writes these registers and flags only, and a push and a pop.
            unsafe {
                asm!(
                    "push {flags}", "popfq", $text, "pushfq", "pop {flags}",
                    flags = inout(reg) flags, inout("rax") rax, inout("rcx") rcx, inout("rdx") rdx
                );
            }
            ([rax, rcx, rdx], flags)
        }
    };
}

/// All arithmetic flags.
const ALL: u64 = 0x8d5;
/// Overflow, sign, zero, carry: what most of BMI define.
const FOUR: u64 = 0x8c1;

/// Encoding, the same as text, and which flags are defined afterwards.
#[rustfmt::skip]
const ARITHMETIC: &[(&[u8], Native, u64)] = &[
    (&[0xf3, 0x48, 0x0f, 0xb8, 0xc2], native!("popcnt rax, rdx"), ALL),
    (&[0xf3, 0x0f, 0xb8, 0xc2], native!("popcnt eax, edx"), ALL),
    (&[0x66, 0xf3, 0x0f, 0xb8, 0xc2], native!("popcnt ax, dx"), ALL),
    (&[0xf3, 0x48, 0x0f, 0xbc, 0xc2], native!("tzcnt rax, rdx"), 0x41),
    (&[0x66, 0xf3, 0x0f, 0xbc, 0xc2], native!("tzcnt ax, dx"), 0x41),
    (&[0xf3, 0x48, 0x0f, 0xbd, 0xc2], native!("lzcnt rax, rdx"), 0x41),
    (&[0xf3, 0x0f, 0xbd, 0xc2], native!("lzcnt eax, edx"), 0x41),
    (&[0xf2, 0x0f, 0x38, 0xf0, 0xc2], native!("crc32 eax, dl"), ALL),
    (&[0xf2, 0x0f, 0x38, 0xf0, 0xc6], native!("crc32 eax, dh"), ALL),
    (&[0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc2], native!("crc32 eax, dx"), ALL),
    (&[0xf2, 0x0f, 0x38, 0xf1, 0xc2], native!("crc32 eax, edx"), ALL),
    (&[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc2], native!("crc32 rax, rdx"), ALL),
    (&[0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc2], native!("adcx rax, rdx"), ALL),
    (&[0x66, 0x0f, 0x38, 0xf6, 0xc2], native!("adcx eax, edx"), ALL),
    (&[0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xc2], native!("adox rax, rdx"), ALL),
    (&[0xc4, 0xe2, 0xf0, 0xf2, 0xc2], native!("andn rax, rcx, rdx"), FOUR),
    (&[0xc4, 0xe2, 0x70, 0xf2, 0xc2], native!("andn eax, ecx, edx"), FOUR),
    (&[0xc4, 0xe2, 0xf0, 0xf7, 0xc2], native!("bextr rax, rdx, rcx"), 0x841),
    (&[0xc4, 0xe2, 0x70, 0xf7, 0xc2], native!("bextr eax, edx, ecx"), 0x841),
    (&[0xc4, 0xe2, 0xf0, 0xf3, 0xca], native!("blsr rcx, rdx"), FOUR),
    (&[0xc4, 0xe2, 0x70, 0xf3, 0xca], native!("blsr ecx, edx"), FOUR),
    (&[0xc4, 0xe2, 0xf0, 0xf3, 0xd2], native!("blsmsk rcx, rdx"), FOUR),
    (&[0xc4, 0xe2, 0x70, 0xf3, 0xd2], native!("blsmsk ecx, edx"), FOUR),
    (&[0xc4, 0xe2, 0xf0, 0xf3, 0xda], native!("blsi rcx, rdx"), FOUR),
    (&[0xc4, 0xe2, 0x70, 0xf3, 0xda], native!("blsi ecx, edx"), FOUR),
    (&[0xc4, 0xe2, 0xf0, 0xf5, 0xc2], native!("bzhi rax, rdx, rcx"), FOUR),
    (&[0xc4, 0xe2, 0x70, 0xf5, 0xc2], native!("bzhi eax, edx, ecx"), FOUR),
    (&[0xc4, 0xe2, 0xf2, 0xf5, 0xc2], native!("pext rax, rcx, rdx"), ALL),
    (&[0xc4, 0xe2, 0x72, 0xf5, 0xc2], native!("pext eax, ecx, edx"), ALL),
    (&[0xc4, 0xe2, 0xf3, 0xf5, 0xc2], native!("pdep rax, rcx, rdx"), ALL),
    (&[0xc4, 0xe2, 0xf3, 0xf6, 0xc2], native!("mulx rax, rcx, rdx"), ALL),
    (&[0xc4, 0xe2, 0x73, 0xf6, 0xc2], native!("mulx eax, ecx, edx"), ALL),
    (&[0xc4, 0xe2, 0xf3, 0xf6, 0xc9], native!("mulx rcx, rcx, rcx"), ALL),
    (&[0xc4, 0xe2, 0xf1, 0xf7, 0xc2], native!("shlx rax, rdx, rcx"), ALL),
    (&[0xc4, 0xe2, 0x71, 0xf7, 0xc2], native!("shlx eax, edx, ecx"), ALL),
    (&[0xc4, 0xe2, 0xf3, 0xf7, 0xc2], native!("shrx rax, rdx, rcx"), ALL),
    (&[0xc4, 0xe2, 0xf2, 0xf7, 0xc2], native!("sarx rax, rdx, rcx"), ALL),
    (&[0xc4, 0xe2, 0x72, 0xf7, 0xc2], native!("sarx eax, edx, ecx"), ALL),
    (&[0xc4, 0xe3, 0xfb, 0xf0, 0xc2, 13], native!("rorx rax, rdx, 13"), ALL),
    (&[0xc4, 0xe3, 0x7b, 0xf0, 0xc2, 32], native!("rorx eax, edx, 32"), ALL),
];

/// Values where arithmetic goes wrong, and any others.
fn operand() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..300_u64,
        (0..64_u32).prop_map(|bit| 1 << bit),
        Just(u64::MAX),
        Just(0xffff_ffff),
        Just(0x8000_0000),
    ]
}

fn this_processor_has_it_all() -> bool {
    let all = is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("adx")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("sse4.2");
    if !all {
        eprintln!("SKIPPED: this processor lacks some of the instructions");
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn arithmetic_is_what_the_processor_makes_of_it(
        rax in operand(), rcx in operand(), rdx in operand(), flags in any::<u64>(), which in 0..ARITHMETIC.len(),
    ) {
        if !this_processor_has_it_all() {
            return Ok(());
        }
        let (bytes, native, defined) = ARITHMETIC[which];
        let flags = flags & ALL | 0x202;
        let (expected, expected_flags) = native([rax, rcx, rdx], flags);
        let mut cpu = cpu();
        cpu.gpr[..3].copy_from_slice(&[rax, rcx, rdx]);
        cpu.rflags = flags;
        step(&mut cpu, &mut Sandbox::new(), bytes).unwrap();
        prop_assert_eq!(&cpu.gpr[..3], &expected, "{:x?} of {:x} {:x} {:x}", bytes, rax, rcx, rdx);
        prop_assert_eq!(cpu.rflags & defined, expected_flags & defined, "flags of {:x?} of {:x} {:x} {:x}", bytes, rax, rcx, rdx);
    }

    #[test]
    fn no_bytes_and_no_registers_make_it_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..20),
        likely in proptest::option::of(0..ARITHMETIC.len()),
        prefixes in proptest::collection::vec(proptest::sample::select(&[0x66_u8, 0x67, 0xf0, 0xf2, 0xf3, 0x48, 0x64, 0x26][..]), 0..3),
        gpr in any::<[u64; 16]>(),
        control in any::<[u64; 4]>(),
        tables in any::<[u64; 6]>(),
        long in any::<bool>(),
        cpl in 0..4_u8,
    ) {
        if let Some(likely) = likely {
            bytes = [&prefixes[..], ARITHMETIC[likely].0, &bytes].concat();
        }
        let [cr0, cr3, cr4, rflags] = control;
        let mut cpu = Cpu {
            gpr,
            cr0,
            cr3: cr3 & 0xffff,
            cr4,
            rflags,
            bases: tables,
            mode: if long { Mode::Long } else { Mode::Protected },
            long_paging: long,
            cpl,
            idt: Table { base: gpr[3], limit: 0xfff },
            ..cpu()
        };
        let mut world = Sandbox::new();
        for (n, word) in tables.into_iter().enumerate() {
            world.put(n * 8, word);
        }
        let before = cpu.clone();
        if step(&mut cpu, &mut world, &bytes).is_err() {
            prop_assert_eq!(cpu, before, "what is refused changes nothing");
        }
    }
}

/// A gate for `vector`: where its handler is, its type, and which of the interrupt stacks it wants.
fn gate(world: &mut Sandbox, vector: usize, handler: u64, kind: u64, stack: u64) {
    let low = handler & 0xffff | 0x10 << 16 | stack << 32 | kind << 40 | (handler >> 16 & 0xffff) << 48;
    world.put(0x2000 + vector * 16, low);
    world.put(0x2000 + vector * 16 + 8, handler >> 32);
}

const INTERRUPT: u64 = 0x8e;
const TRAP: u64 = 0x8f;

#[test]
fn a_breakpoint_is_in_its_handler_with_its_frame_written_before_anybody_else_can_look() {
    let (mut cpu, mut world) = (cpu(), Sandbox::new());
    gate(&mut world, 3, 0xffff_8000_1234_5678, INTERRUPT, 0);
    cpu.gpr[RSP] = 0x7003;
    cpu.rflags = IF | TF | AC | 2;
    let flags = cpu.rflags;
    assert_eq!(step(&mut cpu, &mut world, &[0xcc]), Ok(Instruction::Int3));
    assert_eq!((cpu.rip, cpu.gpr[RSP]), (0xffff_8000_1234_5678, 0x7000 - 40));
    assert_eq!(cpu.rflags, AC | 2, "no further interrupts, no single steps");
    let frame: Vec<u64> = (0..5).map(|n| world.word(0x7000 - 40 + n * 8)).collect();
    assert_eq!(frame, [CODE + 1, 0x10, flags, 0x7003, 0x18]);
}

#[test]
fn a_trap_gate_leaves_interrupts_on_and_an_interrupt_stack_is_used() {
    let (mut cpu, mut world) = (cpu(), Sandbox::new());
    gate(&mut world, 0x80, 0x4000, TRAP, 2);
    world.put(0x3000 + 36 + 8, 0x6000);
    cpu.rflags = IF | 2;
    assert_eq!(step(&mut cpu, &mut world, &[0xcd, 0x80]), Ok(Instruction::IntN));
    assert_eq!((cpu.rip, cpu.gpr[RSP], cpu.rflags), (0x4000, 0x6000 - 40, IF | 2));
    assert_eq!(world.word(0x6000 - 40), CODE + 2);
}

#[test]
fn an_event_that_cannot_be_delivered_is_refused_by_its_vector() {
    let try_it = |change: fn(&mut Cpu, &mut Sandbox)| {
        let (mut cpu, mut world) = (cpu(), Sandbox::new());
        gate(&mut world, 3, 0x4000, INTERRUPT, 0);
        change(&mut cpu, &mut world);
        let before = cpu.clone();
        let why = step(&mut cpu, &mut world, &[0xcc]).unwrap_err();
        assert_eq!(cpu, before);
        why.0
    };
    let cannot = "vector 3 cannot be delivered: ";
    for (change, why) in [
        (
            (|cpu, _| cpu.idt.limit = 62) as fn(&mut Cpu, &mut Sandbox),
            "the interrupt table is too short",
        ),
        (|_, world| gate(world, 3, 0x4000, 0x0e, 0), "the guest has no handler"),
        (|_, world| gate(world, 3, 0x4000, 0x85, 0), "the guest has no handler"),
        (|cpu, _| cpu.cs = 0x20, "its handler runs in another code segment"),
        (
            |_, world| gate(world, 3, 0x4000, INTERRUPT, 7),
            "there is no memory at 0xffffffffffffffd8",
        ),
        (|cpu, _| cpu.cpl = 3, "only events of a 64-bit kernel are emulated"),
        (|cpu, _| cpu.gpr[RSP] = 0x10_0000, "there is no memory at 0xfffd8"),
    ] {
        assert_eq!(try_it(change), format!("{cannot}{why}"));
    }
}

/// Page tables at 0xa000: one page of 4 KiB at linear 0x4000_0000 is physical 0x5000, with `rights` on its entry.
fn paged(rights: u64) -> (Cpu, Sandbox) {
    let (mut cpu, mut world) = (cpu(), Sandbox::new());
    for (at, entry) in [
        (0xa000, 0xb007),
        (0xb000, 0x83),
        (0xb008, 0xc007),
        (0xc000, 0xd007),
        (0xd000, 0x5000 | rights),
    ] {
        world.put(at, entry);
    }
    gate(&mut world, 14, 0x4000, INTERRUPT, 0);
    cpu.cr0 |= 1 << 31 | 1 << 16;
    cpu.cr3 = 0xa000;
    cpu.cr4 |= 1 << 5;
    cpu.gpr[RSP] = 0x7000;
    cpu.gpr[RCX] = 0x4000_0000;
    (cpu, world)
}

#[test]
fn page_tables_are_walked_and_marked_and_their_faults_go_to_the_guest() {
    const LOAD: &[u8] = &[0xf3, 0x48, 0x0f, 0xb8, 0x01];
    const STORE: &[u8] = &[0x0f, 0xae, 0x19];
    for (rights, cr4, flags, code, fault) in [
        (0x3, 0, 2, LOAD, None),
        (0x3, 0, 2, STORE, None),
        (0x2, 0, 2, LOAD, Some(0)),
        (0x2, 0, 2, STORE, Some(2)),
        (0x1, 0, 2, LOAD, None),
        (0x1, 0, 2, STORE, Some(3)),
        // A page of user space: forbidden by SMAP unless AC says otherwise.
        (0x7, 1 << 21, 2, LOAD, Some(1)),
        (0x7, 1 << 21, 2, STORE, Some(3)),
        (0x7, 1 << 21, AC | 2, STORE, None),
    ] {
        let (mut cpu, mut world) = paged(rights);
        world.put(0x5000, 0xff);
        cpu.cr4 |= cr4;
        cpu.rflags = flags;
        step(&mut cpu, &mut world, code).unwrap();
        let entry = world.word(0xd000);
        if let Some(expected) = fault {
            assert_eq!(cpu.rip, 0x4000, "rights {rights:x} of {code:x?}");
            assert_eq!(
                (world.word(0x7000 - 48), cpu.cr2),
                (expected, 0x4000_0000),
                "rights {rights:x} of {code:x?}"
            );
            assert_eq!(world.word(0x7000 - 40), CODE, "the handler may try again");
            assert_eq!(entry, 0x5000 | rights, "what was not used is not marked");
        } else {
            assert_eq!(cpu.rip, CODE + code.len() as u64, "rights {rights:x} of {code:x?}");
            let marks = if code == LOAD { 0x20 } else { 0x60 };
            assert_eq!(entry, 0x5000 | rights | marks, "rights {rights:x} of {code:x?}");
            let found = if code == LOAD { cpu.gpr[RAX] } else { world.word(0x5000) };
            assert_eq!(found, if code == LOAD { 8 } else { 0x1f80 });
        }
    }
}

#[test]
fn an_operand_across_two_pages_is_whole_or_nothing() {
    // The next page is physical 0x3000, so its half of the operand is not behind the first.
    let (mut cpu, mut world) = paged(0x3);
    world.put(0xd008, 0x3003);
    world.memory[0x5ffe..0x6000].fill(0xff);
    world.memory[0x3000..0x3006].fill(0x01);
    world.memory[0x6000..0x6006].fill(0x77);
    cpu.gpr[RCX] = 0x4000_0ffe;
    step(&mut cpu, &mut world, &[0xf3, 0x48, 0x0f, 0xb8, 0x01]).unwrap();
    assert_eq!(cpu.gpr[RAX], 16 + 6);
    // stmxcsr, with the second page gone: nothing is written to the first.
    world.put(0xd008, 0x3002);
    cpu.rip = CODE;
    step(&mut cpu, &mut world, &[0x0f, 0xae, 0x19]).unwrap();
    assert_eq!((cpu.rip, cpu.cr2), (0x4000, 0x4000_1000));
    assert_eq!(world.memory[0x5ffe..0x6000], [0xff, 0xff]);
}

#[test]
fn the_instruction_is_read_through_the_guests_own_page_tables() {
    let (mut cpu, mut world) = paged(0x3);
    world.memory[0x5ffd..0x6000].copy_from_slice(&[0xf3, 0x48, 0x0f]);
    cpu.rip = 0x4000_0ffd;
    assert_eq!(
        fetch(&cpu, &mut world),
        [0xf3, 0x48, 0x0f],
        "the next page is not there"
    );
    world.put(0xd008, 0x3003);
    world.memory[0x3000..0x3002].copy_from_slice(&[0xb8, 0xc0]);
    let bytes = fetch(&cpu, &mut world);
    assert_eq!((bytes.len(), &bytes[..5]), (15, &[0xf3, 0x48, 0x0f, 0xb8, 0xc0][..]));
}

#[test]
fn instructions_for_units_that_are_off_raise_what_the_architecture_says() {
    const UNDEFINED: u64 = 6;
    const NOT_AVAILABLE: u64 = 7;
    const PROTECTION: u64 = 13;
    const X87: u64 = 16;
    let raised = |bytes: &[u8], change: fn(&mut Cpu, &mut Sandbox)| {
        let (mut cpu, mut world) = (cpu(), Sandbox::new());
        for vector in 0..32 {
            gate(&mut world, vector, 0x4000 + vector as u64, INTERRUPT, 0);
        }
        cpu.gpr[RSP] = 0x7000;
        cpu.gpr[RCX] = 0x5000;
        change(&mut cpu, &mut world);
        step(&mut cpu, &mut world, bytes).unwrap();
        cpu.rip.checked_sub(0x4000)
    };
    let as_it_is: fn(&mut Cpu, &mut Sandbox) = |_, _| {};
    let switched: fn(&mut Cpu, &mut Sandbox) = |cpu, _| cpu.cr0 |= 8;
    let emulated: fn(&mut Cpu, &mut Sandbox) = |cpu, _| cpu.cr0 |= 4;
    let broken: fn(&mut Cpu, &mut Sandbox) = |_, world| world.x87_status = 0x80;
    let (fwait, emms, ldmxcsr, xgetbv) = (
        &[0x9b][..],
        &[0x0f, 0x77][..],
        &[0x0f, 0xae, 0x11][..],
        &[0x0f, 0x01, 0xd0][..],
    );
    for (bytes, change, expected) in [
        (fwait, as_it_is, None),
        (fwait, switched, Some(NOT_AVAILABLE)),
        (fwait, broken, Some(X87)),
        (emms, switched, Some(NOT_AVAILABLE)),
        (emms, emulated, Some(UNDEFINED)),
        (emms, broken, Some(X87)),
        (ldmxcsr, as_it_is, None),
        (ldmxcsr, switched, Some(NOT_AVAILABLE)),
        (ldmxcsr, |cpu, _| cpu.cr4 &= !(1 << 9), Some(UNDEFINED)),
        (ldmxcsr, |_, world| world.put(0x5000, 0x1_0000), Some(PROTECTION)),
        (xgetbv, as_it_is, Some(PROTECTION)),
        (xgetbv, |cpu, _| cpu.gpr[RCX] = 0, None),
        (xgetbv, |cpu, _| cpu.cr4 &= !(1 << 18), Some(UNDEFINED)),
    ] {
        assert_eq!(raised(bytes, change), expected, "{bytes:x?}");
    }
}

#[test]
fn what_reaches_beyond_registers_reaches_there() {
    assert!(done(&[0x0f, 0x77]).1.x87_empty);
    let (cpu, _) = done(&[0x0f, 0x01, 0xf9]);
    assert_eq!((cpu.gpr[RAX], cpu.gpr[RDX], cpu.gpr[RCX]), (0x5555, 0x10, 0x5555));
    let (mut cpu, mut world) = (self::cpu(), Sandbox::new());
    (cpu.gpr[RCX], cpu.gpr[RBX]) = (0x5000, 2);
    // invpcid rbx, [rcx]
    step(&mut cpu, &mut world, &[0x66, 0x0f, 0x38, 0x82, 0x19]).unwrap();
    assert_eq!(world.flushed, 1);
    world.memory[0x5000..0x5010].copy_from_slice(&(9_u128 << 64 | 7).to_le_bytes());
    for (expected, zero, left) in [(7, 0, (7, 9)), (7, ZF, (7, 9))] {
        // lock cmpxchg16b [rsi], first with the wrong upper half, then with what it said.
        cpu.gpr[6] = 0x5000;
        cpu.gpr[RAX] = expected;
        cpu.gpr[RDX] = if zero == 0 { 8 } else { cpu.gpr[RDX] };
        step(&mut cpu, &mut world, &[0xf0, 0x48, 0x0f, 0xc7, 0x0e]).unwrap();
        assert_eq!((cpu.rflags & ZF, cpu.gpr[RAX], cpu.gpr[RDX]), (zero, left.0, left.1));
    }
    assert_eq!((world.word(0x5000), world.word(0x5008)), (cpu.gpr[RBX], cpu.gpr[RCX]));
}
