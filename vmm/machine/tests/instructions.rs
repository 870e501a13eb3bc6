//! Instructions in a guest's kernel do what the architecture says: by the processor, by KVM, or by this VMM where KVM
//! cannot. The same expectations hold on every host.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::arch::x86_64::__cpuid_count;
use std::sync::Arc;

use common::{PATIENCE, Snippet, image};
use umbra_core::guest::Guest;
use umbra_machine::{ExitReason, Machine, Ring0, Sinks, probe};
use umbra_units::Gpa;

/// From PVH's 32-bit start into long mode, then to the cases at 2 MiB. Every table is written by the test.
///
/// `mov eax, cr4; or eax, PAE|OSFXSR|OSXMMEXCPT|OSXSAVE; mov cr4, eax; mov eax, 0x10000; mov cr3, eax;
/// mov ecx, EFER; rdmsr; or eax, LME; wrmsr; lgdt [0x8000]; mov eax, cr0; or eax, PG|NE|MP|PE; mov cr0, eax; jmp 8:0x100040`
/// and, in long mode, `lidt [0x8010]; mov eax, 0x10; mov ds, eax; mov es, eax; mov ss, eax; mov eax, 0x200000; jmp rax`.
const START: &[u8] = &[
    0x0f, 0x20, 0xe0, 0x0d, 0x20, 0x06, 0x04, 0x00, 0x0f, 0x22, 0xe0, 0xb8, 0x00, 0x00, 0x01, 0x00, 0x0f, 0x22, 0xd8,
    0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x00, 0x00, 0x0f, 0x30, 0x0f, 0x01, 0x15, 0x00, 0x80,
    0x00, 0x00, 0x0f, 0x20, 0xc0, 0x0d, 0x23, 0x00, 0x01, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x40, 0x00, 0x10, 0x00, 0x08,
    0x00, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, // 64 bytes so far
    0x0f, 0x01, 0x1c, 0x25, 0x10, 0x80, 0x00, 0x00, 0xb8, 0x10, 0x00, 0x00, 0x00, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0,
    0xb8, 0x00, 0x00, 0x20, 0x00, 0xff, 0xe0,
];
const CASES: u64 = 0x20_0000;
const RESULTS: u64 = 0x30_0000;
/// What one case leaves: sixteen registers, flags, CR2, then its stack.
const RESULT: u64 = 0x200;
/// For instructions that work on memory.
const DATA: u64 = 0x38_0000;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSI: usize = 6;
const RDI: usize = 7;
const R8: usize = 8;
const R9: usize = 9;

const CF: u64 = 1;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;

const BMI2: u32 = 8;
const INVPCID: u32 = 10;
const SMAP: u32 = 20;

/// One instruction, or a few, and what must come of it.
#[derive(Debug, Clone, Default)]
struct Case {
    name: &'static str,
    code: Vec<u8>,
    registers: Vec<(usize, u64)>,
    flags: u64,
    then: Vec<(usize, u64)>,
    /// Flags that are defined, and those of them that are set.
    then_flags: (u64, u64),
    /// The vector of an exception, its error code, and CR2 if that matters.
    raises: Option<(u64, Option<u64>, Option<u64>)>,
    /// The VMM must have done this itself where ring 0 is emulated.
    by_us: Option<&'static str>,
    /// The feature without which the processor itself would refuse: a bit of CPUID leaf 7, ebx.
    needs: Option<u32>,
}

fn case(name: &'static str, code: &[u8]) -> Case {
    Case {
        name,
        code: code.to_vec(),
        ..Case::default()
    }
}

impl Case {
    fn with(mut self, register: usize, value: u64) -> Self {
        self.registers.push((register, value));
        self
    }

    fn flags(mut self, flags: u64) -> Self {
        self.flags = flags;
        self
    }

    fn gives(mut self, register: usize, value: u64) -> Self {
        self.then.push((register, value));
        self
    }

    fn sets(mut self, defined: u64, set: u64) -> Self {
        self.then_flags = (defined, set);
        self
    }

    fn raises(mut self, vector: u64, code: Option<u64>, cr2: Option<u64>) -> Self {
        self.raises = Some((vector, code, cr2));
        self
    }

    fn by_us(mut self, name: &'static str) -> Self {
        self.by_us = Some(name);
        self
    }

    fn needs(mut self, bit: u32) -> Self {
        self.needs = Some(bit);
        self
    }
}

/// `mov register, value`.
fn mov(register: usize, value: u64) -> Vec<u8> {
    let n = u8::try_from(register).unwrap();
    let mut code = vec![0x48 | n >> 3, 0xb8 | n & 7];
    code.extend(value.to_le_bytes());
    code
}

/// `mov [at], register`.
fn store(at: u64, register: usize) -> Vec<u8> {
    let n = u8::try_from(register).unwrap();
    let mut code = vec![0x48 | (n >> 3) << 2, 0x89, 0x04 | (n & 7) << 3, 0x25];
    code.extend(u32::try_from(at).unwrap().to_le_bytes());
    code
}

/// The whole guest program: each case in its turn.
fn program(cases: &[Case]) -> Vec<u8> {
    let mut code = Vec::new();
    for (n, case) in (0..).zip(cases) {
        let result = RESULTS + n * RESULT;
        code.extend(mov(4, result + RESULT));
        for register in (0..14).filter(|register| *register != 4) {
            let value = case.registers.iter().find(|(r, _)| *r == register);
            code.extend(mov(register, value.map_or(0x1111_1111_1111_1111, |(_, value)| *value)));
        }
        // Where an exception's handler goes on: r14. What it leaves: its vector in r15.
        let set_r14_at = code.len();
        code.extend(mov(14, 0));
        code.extend(mov(15, u64::MAX));
        code.push(0x68);
        code.extend(u32::try_from(case.flags | 2).unwrap().to_le_bytes());
        code.push(0x9d);
        code.extend(&case.code);
        let next = CASES + code.len() as u64;
        code[set_r14_at..set_r14_at + 10].copy_from_slice(&mov(14, next));
        for register in 0..16 {
            code.extend(store(result + register as u64 * 8, register));
        }
        // pushfq; pop rax; mov [..], rax; mov rax, cr2; mov [..], rax
        code.extend([0x9c, 0x58]);
        code.extend(store(result + 128, RAX));
        code.extend([0x0f, 0x20, 0xd0]);
        code.extend(store(result + 136, RAX));
    }
    // xor eax, eax; out 0xf4, al
    code.extend([0x31, 0xc0, 0xe6, 0xf4]);
    assert!(code.len() < 0x10_0000);
    code
}

/// A machine about to run the cases.
fn machine(name: &str, cases: &[Case]) -> Arc<Machine> {
    let machine = Snippet::new(name, START).launch(Sinks::discard());
    let put = |at: u64, bytes: &[u8]| machine.write_memory(Gpa(at), bytes).unwrap();
    let words = |at: u64, words: &[u64]| {
        put(
            at,
            &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>(),
        );
    };
    // Page tables: 8 MiB as they are; 16 MiB is not there.
    words(0x1_0000, &[0x1_1003]);
    words(0x1_1000, &[0x1_2003]);
    words(0x1_2000, &[0x83, 0x20_0083, 0x40_0083, 0x60_0083]);
    // GDT and IDT, and where they are.
    words(0x8100, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    put(0x8000, &[&[0x17, 0][..], &0x8100_u32.to_le_bytes(), &[0; 4]].concat());
    put(0x8010, &[&[0xff, 0x0f][..], &0x9000_u64.to_le_bytes()].concat());
    for vector in 0..256_u64 {
        let handler = 0x1_4000 + vector * 16;
        words(
            0x9000 + vector * 16,
            &[handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48, 0],
        );
        // mov r15d, vector; jmp r14
        let vector = u32::try_from(vector).unwrap().to_le_bytes();
        put(handler, &[&[0x41, 0xbf][..], &vector, &[0x41, 0xff, 0xe6]].concat());
    }
    put(CASES, &program(cases));
    machine
}

fn has(need: Option<u32>) -> bool {
    need.is_none_or(|bit| __cpuid_count(7, 0).ebx >> bit & 1 == 1)
}

fn run(name: &str, cases: Vec<Case>) {
    let cases: Vec<Case> = cases
        .into_iter()
        .filter(|case| {
            let has = has(case.needs);
            if !has {
                eprintln!("SKIPPED: {}: this processor does not have it", case.name);
            }
            has
        })
        .collect();
    let machine = machine(name, &cases);
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Code(0)));
    machine.pause().unwrap();
    let memory = image(&*machine);
    let word = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_le_bytes(memory[at..at + 8].try_into().unwrap())
    };
    for (n, case) in (0..).zip(&cases) {
        check(case, RESULTS + n * RESULT, &word);
    }
    let counters = machine.counters().total();
    println!("emulated: {:?}", counters.emulated);
    let emulating = probe().unwrap().ring0 == Ring0::Emulated;
    for name in cases.iter().filter_map(|case| case.by_us) {
        assert_eq!(
            counters.emulated.contains_key(name),
            emulating,
            "{name}: {:?}",
            counters.emulated
        );
    }
    assert_eq!(counters.exits["emulation"], counters.emulated.values().sum::<u64>());
    assert_eq!(counters.exits["port_write"], 1);
}

fn check(case: &Case, result: u64, word: &dyn Fn(u64) -> u64) {
    let name = case.name;
    let raised = word(result + 15 * 8);
    match case.raises {
        None => assert_eq!(
            raised,
            u64::MAX,
            "{name} raised an exception; CR2 {:#x}",
            word(result + 136)
        ),
        Some((vector, code, cr2)) => {
            assert_eq!(raised, vector, "{name}");
            let frame = word(result + 4 * 8);
            if let Some(code) = code {
                assert_eq!(word(frame), code, "{name}: error code");
            }
            let frame = frame + if code.is_some() { 8 } else { 0 };
            assert_eq!(word(frame + 8), 8, "{name}: cs");
            assert_eq!(word(frame + 24), result + RESULT, "{name}: rsp");
            assert_eq!(word(frame + 32), 0x10, "{name}: ss");
            // A trap's handler returns behind the instruction, a fault's to it.
            let next = word(result + 14 * 8);
            let trap = matches!(vector, 3 | 0x80);
            let back = if trap { next } else { next - case.code.len() as u64 };
            assert_eq!(word(frame), back, "{name}: rip");
            if let Some(cr2) = cr2 {
                assert_eq!(word(result + 136), cr2, "{name}: CR2");
            }
        }
    }
    for (register, value) in &case.then {
        let found = word(result + *register as u64 * 8);
        assert_eq!(
            found, *value,
            "{name}: register {register} is {found:#x}, not {value:#x}"
        );
    }
    let untouched = |register: &usize| case.then.iter().all(|(changed, _)| changed != register);
    for register in (0..14).filter(|register| *register != 4).filter(untouched) {
        let given = case.registers.iter().find(|(r, _)| *r == register);
        let value = given.map_or(0x1111_1111_1111_1111, |(_, value)| *value);
        assert_eq!(word(result + register as u64 * 8), value, "{name}: register {register}");
    }
    let (defined, set) = case.then_flags;
    let flags = word(result + 128);
    assert_eq!(flags & defined, set, "{name}: flags {flags:#x}");
}

const ALL: u64 = OF | SF | ZF | CF | 1 << 2 | 1 << 4;

#[test]
fn counting_bits_and_checksums() {
    needs_kvm!();
    let ones = 0xf0f0_0000_8000_0001;
    run(
        "bits",
        vec![
            case("popcnt rax, rdi", &[0xf3, 0x48, 0x0f, 0xb8, 0xc7])
                .with(RDI, ones)
                .flags(ALL)
                .gives(RAX, 10)
                .sets(ALL, 0)
                .by_us("popcnt"),
            case("popcnt eax, edi", &[0xf3, 0x0f, 0xb8, 0xc7])
                .with(RDI, ones)
                .gives(RAX, 2),
            case("popcnt ax, di: nothing set", &[0x66, 0xf3, 0x0f, 0xb8, 0xc7])
                .with(RDI, 0xffff_0000)
                .gives(RAX, 0x1111_1111_1111_0000)
                .sets(ALL, ZF),
            case("popcnt r9, [rsi+rcx*8-8]", &[0xf3, 0x4c, 0x0f, 0xb8, 0x4c, 0xce, 0xf8])
                .with(RSI, 0x9000 - 8)
                .with(RCX, 2)
                .gives(R9, u64::from(gate(0).count_ones())),
            case("crc32 eax, cl", &[0xf2, 0x0f, 0x38, 0xf0, 0xc1])
                .with(RAX, 0xffff_ffff)
                .with(RCX, 0x61)
                .gives(RAX, 0x3e2f_bccf)
                .by_us("crc32"),
            case("crc32 eax, ch", &[0xf2, 0x0f, 0x38, 0xf0, 0xc5])
                .with(RAX, 0xffff_ffff)
                .with(RCX, 0x6100)
                .gives(RAX, 0x3e2f_bccf),
            // The check value of CRC-32C is that of "123456789".
            case(
                "crc32 rax, rcx; crc32 eax, dl",
                &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc1, 0xf2, 0x0f, 0x38, 0xf0, 0xc2],
            )
            .with(RAX, 0xffff_ffff)
            .with(RCX, u64::from_le_bytes(*b"12345678"))
            .with(RDX, 0x39)
            .gives(RAX, !0xe306_9283 & 0xffff_ffff),
        ],
    );
}

/// The first word of an interrupt gate, as `machine` writes it.
fn gate(vector: u64) -> u64 {
    let handler = 0x1_4000 + vector * 16;
    handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48
}

#[test]
fn breakpoints_and_software_interrupts_reach_their_handlers() {
    needs_kvm!();
    run(
        "traps",
        vec![
            case("int3", &[0xcc]).raises(3, None, None).by_us("int3"),
            case("int 0x80", &[0xcd, 0x80]).raises(0x80, None, None).by_us("int"),
        ],
    );
}

#[test]
fn small_instructions_of_kernels() {
    needs_kvm!();
    run(
        "small",
        vec![
            case("stac", &[0x0f, 0x01, 0xcb])
                .needs(SMAP)
                .sets(AC | CF, AC)
                .by_us("stac"),
            case("clac", &[0x0f, 0x01, 0xca])
                .needs(SMAP)
                .flags(AC | CF)
                .sets(AC | CF, CF)
                .by_us("clac"),
            case("fwait", &[0x9b]).by_us("fwait"),
            case("emms", &[0x0f, 0x77]).by_us("emms"),
            case("xgetbv", &[0x0f, 0x01, 0xd0])
                .with(RCX, 0)
                .gives(RAX, 1)
                .gives(RDX, 0)
                .by_us("xgetbv"),
            case("xgetbv of what is not", &[0x0f, 0x01, 0xd0])
                .with(RCX, 9)
                .raises(13, Some(0), None),
            case(
                "lfence; mfence; sfence",
                &[0x0f, 0xae, 0xe8, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0xf8],
            ),
            case("endbr64", &[0xf3, 0x0f, 0x1e, 0xfa]),
        ],
    );
}

#[test]
fn control_of_vector_arithmetic() {
    needs_kvm!();
    // mov [rsi], eax; ldmxcsr [rsi]; stmxcsr [rsi+4]; mov ecx, [rsi+4]
    let set_and_get = [0x89, 0x06, 0x0f, 0xae, 0x16, 0x0f, 0xae, 0x5e, 0x04, 0x8b, 0x4e, 0x04];
    let set = |name, value: u64| {
        case(name, &set_and_get)
            .with(RSI, DATA)
            .with(RAX, value)
            .gives(RCX, value)
    };
    run(
        "mxcsr",
        vec![
            case("stmxcsr after reset", &[0x0f, 0xae, 0x1e, 0x8b, 0x0e])
                .with(RSI, DATA)
                .gives(RCX, 0x1f80)
                .by_us("stmxcsr"),
            set("ldmxcsr", 0x1fa0).by_us("ldmxcsr"),
            set("ldmxcsr of flush to zero", 0x9fc0),
            case(
                "ldmxcsr of what is not",
                &[0x0f, 0xae, 0x14, 0x25, 0x00, 0x90, 0x00, 0x00],
            )
            .raises(13, Some(0), None),
            set("ldmxcsr back", 0x1f80),
        ],
    );
}

#[test]
fn a_pair_of_words_is_compared_and_exchanged() {
    needs_kvm!();
    // mov [rsi], r8; mov [rsi+8], r9; lock cmpxchg16b [rsi]; mov r8, [rsi]; mov r9, [rsi+8]
    let code = [
        0x4c, 0x89, 0x06, 0x4c, 0x89, 0x4e, 0x08, 0xf0, 0x48, 0x0f, 0xc7, 0x0e, 0x4c, 0x8b, 0x06, 0x4c, 0x8b, 0x4e,
        0x08,
    ];
    let try_it = |name, expected: u64| {
        case(name, &code)
            .with(RSI, DATA)
            .with(R8, 5)
            .with(R9, 6)
            .with(RAX, expected)
            .with(RDX, 6)
            .with(RBX, 7)
            .with(RCX, 8)
    };
    run(
        "pair",
        vec![
            try_it("as expected", 5)
                .gives(R8, 7)
                .gives(R9, 8)
                .sets(ZF, ZF)
                .by_us("cmpxchg16b"),
            try_it("not as expected", 4)
                .flags(ZF)
                .gives(RAX, 5)
                .gives(RDX, 6)
                .sets(ZF, 0),
            case("not aligned", &[0xf0, 0x48, 0x0f, 0xc7, 0x0e])
                .with(RSI, DATA + 8)
                .raises(13, Some(0), None),
        ],
    );
}

#[test]
fn an_operand_that_is_not_mapped_is_a_page_fault_that_the_guest_handles() {
    needs_kvm!();
    run(
        "fault",
        vec![
            case("popcnt rax, [rsi]", &[0xf3, 0x48, 0x0f, 0xb8, 0x06])
                .with(RSI, 0x100_0123)
                .raises(14, Some(0), Some(0x100_0123)),
            case("stmxcsr [rsi]", &[0x0f, 0xae, 0x1e])
                .with(RSI, 0x100_0ffe)
                .raises(14, Some(2), Some(0x100_0ffe)),
            case("popcnt rax, [rsi]: not canonical", &[0xf3, 0x48, 0x0f, 0xb8, 0x06])
                .with(RSI, 1 << 60)
                .raises(13, Some(0), None),
        ],
    );
}

#[test]
fn forgetting_translations_shows_the_new_page() {
    needs_kvm!();
    // mov dword [0x600000], 6; mov dword [0x400000], 4; mov eax, [0x400000];
    // mov dword [0x12010], 0x600083; invpcid rcx, [rsi]; mov ecx, [0x400000]; mov dword [0x12010], 0x400083; invpcid..
    let code = [
        &[0xc7, 0x04, 0x25, 0x00, 0x00, 0x60, 0x00, 6, 0, 0, 0][..],
        &[0xc7, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00, 4, 0, 0, 0],
        &[0x8b, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00],
        &[0xc7, 0x04, 0x25, 0x10, 0x20, 0x01, 0x00, 0x83, 0x00, 0x60, 0x00],
        &[0x66, 0x0f, 0x38, 0x82, 0x0e],
        &[0x8b, 0x14, 0x25, 0x00, 0x00, 0x40, 0x00],
    ]
    .concat();
    run(
        "invpcid",
        vec![
            case("invpcid of everything", &code)
                .needs(INVPCID)
                .with(RCX, 2)
                .with(RSI, DATA)
                .gives(RAX, 4)
                .gives(RDX, 6)
                .by_us("invpcid"),
            case("invpcid of what is not", &[0x66, 0x0f, 0x38, 0x82, 0x0e])
                .needs(INVPCID)
                .with(RCX, 4)
                .with(RSI, DATA)
                .raises(13, Some(0), None),
        ],
    );
}

#[test]
fn bit_manipulation() {
    needs_kvm!();
    let bmi = |case: Case| case.needs(BMI2).with(RCX, 0xff00).with(RDX, 0x1234_5678);
    run(
        "bmi",
        vec![
            // dest rax, vvvv rcx, rm rdx
            bmi(case("andn rax, rcx, rdx", &[0xc4, 0xe2, 0xf0, 0xf2, 0xc2]))
                .gives(RAX, 0x1234_0078)
                .by_us("andn"),
            bmi(case("pext rax, rcx, rdx", &[0xc4, 0xe2, 0xf2, 0xf5, 0xc2]))
                .gives(RAX, extract(0xff00, 0x1234_5678))
                .by_us("pext"),
            bmi(case("shlx rax, rdx, rcx", &[0xc4, 0xe2, 0xf1, 0xf7, 0xc2]))
                .gives(RAX, 0x1234_5678)
                .by_us("shlx"),
            bmi(case("rorx eax, edx, 8", &[0xc4, 0xe3, 0x7b, 0xf0, 0xc2, 8]))
                .gives(RAX, 0x7812_3456)
                .by_us("rorx"),
            bmi(case("mulx rax, rcx, rcx", &[0xc4, 0xe2, 0xf3, 0xf6, 0xc1]))
                .gives(RAX, 0)
                .gives(RCX, 0x1234_5678 * 0xff00)
                .by_us("mulx"),
        ],
    );
}

fn extract(source: u64, mask: u64) -> u64 {
    let bits = (0..64).filter(|bit| mask >> bit & 1 == 1);
    (0..).zip(bits).map(|(to, from)| (source >> from & 1) << to).sum()
}

#[test]
fn an_instruction_that_nobody_can_do_ends_the_guest_with_its_bytes_and_place() {
    needs_kvm!();
    if probe().unwrap().ring0 != Ring0::Emulated {
        eprintln!("SKIPPED: this host's processor does every instruction itself");
        return;
    }
    // pxor xmm0, xmm0
    let machine = machine("nobody", &[case("pxor", &[0x66, 0x0f, 0xef, 0xc0])]);
    machine.resume().unwrap();
    let Some(ExitReason::Fault(text)) = machine.wait_exit(Some(PATIENCE)) else {
        panic!("{:?}", machine.exit_reason());
    };
    assert!(
        text.starts_with("vcpu 0 at rip 0x2000")
            && text.contains(": KVM could not emulate the instruction [66 0f ef c0")
            && text.ends_with("]: it is not among those emulated here"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1);
}
