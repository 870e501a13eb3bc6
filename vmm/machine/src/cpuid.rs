//! What processor the guest sees, and whether another host can be that processor.

use std::fmt::Write as _;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use umbra_units::{Malformed, Reader, Writer};

use crate::error::Error;
use crate::limits;

/// A CPUID table: at most [`limits::CPUID_ENTRIES`] leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cpuid(Vec<Leaf>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leaf {
    function: u32,
    index: u32,
    flags: u32,
    /// eax, ebx, ecx, edx.
    registers: [u32; 4],
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// Leaf 1 ecx: nested VMX. Its state would have to travel too, so guests do not get it.
const VMX: u32 = 1 << 5;
/// Leaf 0x80000001 ecx: nested SVM, likewise.
const SVM: u32 = 1 << 2;
/// Leaf 1 ecx.
const CX16: u32 = 1 << 13;
/// Leaf 7 ebx.
const ERMS: u32 = 1 << 9;
/// Leaf 7 ebx.
const INVPCID: u32 = 1 << 10;
/// Leaf 7 ebx.
const SMAP: u32 = 1 << 20;
/// Leaf 1 ecx.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ecx: CR4.OSXSAVE, kept up to date by KVM.
const OSXSAVE: u32 = 1 << 27;
/// Leaf 1 ecx: runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 edx: the APIC is enabled, kept up to date by KVM.
const APIC: u32 = 1 << 9;
/// Leaf 1 edx: more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 7 ecx: CR4.PKE, kept up to date by KVM.
const OSPKE: u32 = 1 << 4;

impl Cpuid {
    /// What KVM supports here, for a guest of `cpus` vCPUs.
    pub(crate) fn supported(kvm: &Kvm, cpus: u8) -> Result<Self, Error> {
        let table = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("ask for the supported CPUID"))?;
        let mut cpuid = Self::from_kvm(&table);
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        for leaf in &mut cpuid.0 {
            let [_, ebx, ecx, edx] = &mut leaf.registers;
            match leaf.function {
                1 => {
                    *ecx = *ecx & !VMX | HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
                    *ebx = *ebx & !0x00ff_0000 | u32::from(cpus) << 16;
                    if cpus > 1 {
                        *edx |= HTT;
                    }
                }
                0x8000_0001 => *ecx &= !SVM,
                _ => {}
            }
        }
        Ok(cpuid)
    }

    /// This table, as vCPU `index` of `cpus` sees it: its APIC id, and a topology of one thread per core.
    pub(crate) fn for_vcpu(&self, index: u8, cpus: u8) -> Self {
        let id = u32::from(index);
        let id_bits = u8::BITS - (cpus - 1).leading_zeros();
        let mut cpuid = self.clone();
        for leaf in &mut cpuid.0 {
            let [eax, ebx, ecx, edx] = &mut leaf.registers;
            match (leaf.function, leaf.index) {
                (1, _) => *ebx = *ebx & 0x00ff_ffff | id << 24,
                (0xb | 0x1f, level) => {
                    // SDM, CPUID leaf 0x0b: level 0 is threads of a core, level 1 cores of a package.
                    (*eax, *ebx, *ecx) = match level {
                        0 => (0, 1, 1 << 8),
                        1 => (id_bits, u32::from(cpus), 2 << 8 | 1),
                        other => (0, 0, other),
                    };
                    *edx = id;
                }
                (0x8000_001e, _) => {
                    // APM, CPUID leaf 0x8000001e: the APIC id, the core and its node.
                    *eax = id;
                    *ebx = id;
                }
                _ => {}
            }
        }
        cpuid
    }

    /// This table, as a host that emulates its guests' kernels serves them best: without what its emulator does not know
    /// (each use leaves the guest), and without hypercalls, which a kernel there cannot make.
    pub(crate) fn for_emulating_host(mut self) -> Self {
        for leaf in &mut self.0 {
            let [eax, ebx, ecx, _] = &mut leaf.registers;
            match (leaf.function, leaf.index) {
                (1, _) => *ecx &= !CX16,
                // erms: "rep stosb" is done byte by byte.
                (7, 0) => *ebx &= !(ERMS | INVPCID | SMAP),
                // The clocks, and that they are stable (kvm/cpuid.rst).
                (0x4000_0001, _) => *eax &= 1 | 1 << 3 | 1 << 24,
                _ => {}
            }
        }
        self
    }

    /// What a vCPU has, by KVM's word.
    pub(crate) fn of_vcpu(vcpu: &VcpuFd) -> Result<Self, Error> {
        vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map(|table| Self::from_kvm(&table))
            .map_err(Error::kvm("read CPUID"))
    }

    /// Let a vCPU have it.
    pub(crate) fn give_to(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let entries: Vec<_> = self.0.iter().copied().map(Leaf::to_kvm).collect();
        let table = CpuId::from_entries(&entries).expect("limits::CPUID_ENTRIES is what the wrapper takes");
        vcpu.set_cpuid2(&table).map_err(Error::kvm("set CPUID"))
    }

    /// Whether a guest cannot tell these apart, bits aside that follow its own control registers.
    pub(crate) fn same_for_the_guest(&self, other: &Self) -> bool {
        self.0.len() == other.0.len()
            && self
                .0
                .iter()
                .zip(&other.0)
                .all(|(mine, theirs)| mine.without_dynamic() == theirs.without_dynamic())
    }

    /// The features this has and `host` lacks, named; `None` when it lacks none.
    pub(crate) fn beyond(&self, host: &Self) -> Option<String> {
        let mut names = String::new();
        for leaf in &self.0 {
            let leaf = leaf.without_dynamic();
            for register in features_of(leaf.function, leaf.index) {
                let can = host.register(leaf.function, leaf.index, *register);
                let missing = leaf.registers[*register] & !can;
                for bit in (0..32).filter(|bit| missing >> bit & 1 == 1) {
                    if !names.is_empty() {
                        names.push_str(", ");
                    }
                    push_name(&mut names, &leaf, *register, bit);
                }
            }
        }
        (!names.is_empty()).then_some(names)
    }

    /// The XCR0 bits a guest may set.
    pub(crate) fn xcr0(&self) -> u64 {
        u64::from(self.register(0xd, 0, EDX)) << 32 | u64::from(self.register(0xd, 0, EAX))
    }

    pub(crate) fn encode(&self, w: &mut Writer) {
        w.u32(u32::try_from(self.0.len()).expect("limits::CPUID_ENTRIES at most"));
        for leaf in &self.0 {
            w.u32(leaf.function).u32(leaf.index).u32(leaf.flags);
            leaf.registers.iter().for_each(|register| {
                w.u32(*register);
            });
        }
    }

    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let count = r.len_within(limits::CPUID_ENTRIES, "CPUID table")?;
        let mut word = || r.u32("CPUID table");
        (0..count)
            .map(|_| {
                Ok(Leaf {
                    function: word()?,
                    index: word()?,
                    flags: word()?,
                    registers: [word()?, word()?, word()?, word()?],
                })
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn register(&self, function: u32, index: u32, register: usize) -> u32 {
        let leaf = self
            .0
            .iter()
            .find(|leaf| leaf.function == function && leaf.index == index);
        leaf.map_or(0, |leaf| leaf.registers[register])
    }

    fn from_kvm(table: &CpuId) -> Self {
        Self(table.as_slice().iter().map(Leaf::from_kvm).collect())
    }
}

impl Leaf {
    const fn from_kvm(entry: &kvm_cpuid_entry2) -> Self {
        let registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers,
        }
    }

    fn to_kvm(self) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = self.registers;
        let Self {
            function, index, flags, ..
        } = self;
        kvm_cpuid_entry2 {
            function,
            index,
            flags: flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// Without what KVM derives from the guest's control registers (arch/x86/kvm/cpuid.c, `kvm_update_cpuid_runtime`).
    fn without_dynamic(mut self) -> Self {
        let [_, ebx, ecx, edx] = &mut self.registers;
        match (self.function, self.index) {
            (1, _) => {
                *ecx &= !OSXSAVE;
                *edx &= !APIC;
            }
            (7, 0) => *ecx &= !OSPKE,
            // Size of the XSAVE area for the features enabled now.
            (0xd, 0 | 1) => *ebx = 0,
            _ => {}
        }
        self.flags &= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        self
    }
}

/// The registers of a leaf that are sets of features: each bit something a guest may rely on.
const fn features_of(function: u32, index: u32) -> &'static [usize] {
    match (function, index) {
        (1, _) | (0x8000_0001, _) => &[ECX, EDX],
        (7, 0) => &[EBX, ECX, EDX],
        (7, 1) => &[EAX, ECX, EDX],
        (0xd, 0) => &[EAX, EDX],
        (0xd, 1) => &[EAX, ECX, EDX],
        (0x8000_0008, _) => &[EBX],
        (0x8000_000a, _) => &[EDX],
        (0x8000_0021, _) => &[EAX],
        // KVM's own features (kvm/cpuid.rst).
        (0x4000_0001, _) => &[EAX],
        _ => &[],
    }
}

/// Features whose names an operator knows; the others are named by their place.
#[rustfmt::skip]
const NAMES: &[(u32, u32, usize, u32, &str)] = &[
    (1, 0, ECX, 0, "sse3"), (1, 0, ECX, 1, "pclmulqdq"), (1, 0, ECX, 9, "ssse3"), (1, 0, ECX, 12, "fma"),
    (1, 0, ECX, 13, "cx16"), (1, 0, ECX, 17, "pcid"), (1, 0, ECX, 19, "sse4_1"), (1, 0, ECX, 20, "sse4_2"),
    (1, 0, ECX, 21, "x2apic"), (1, 0, ECX, 22, "movbe"), (1, 0, ECX, 23, "popcnt"),
    (1, 0, ECX, 24, "tsc_deadline_timer"), (1, 0, ECX, 25, "aes"), (1, 0, ECX, 26, "xsave"), (1, 0, ECX, 28, "avx"),
    (1, 0, ECX, 29, "f16c"), (1, 0, ECX, 30, "rdrand"), (1, 0, EDX, 25, "sse"), (1, 0, EDX, 26, "sse2"),
    (1, 0, EDX, 28, "ht"),
    (7, 0, EBX, 0, "fsgsbase"), (7, 0, EBX, 3, "bmi1"), (7, 0, EBX, 5, "avx2"), (7, 0, EBX, 7, "smep"),
    (7, 0, EBX, 8, "bmi2"), (7, 0, EBX, 9, "erms"), (7, 0, EBX, 10, "invpcid"), (7, 0, EBX, 16, "avx512f"),
    (7, 0, EBX, 17, "avx512dq"), (7, 0, EBX, 18, "rdseed"), (7, 0, EBX, 19, "adx"), (7, 0, EBX, 20, "smap"),
    (7, 0, EBX, 23, "clflushopt"), (7, 0, EBX, 24, "clwb"), (7, 0, EBX, 28, "avx512cd"), (7, 0, EBX, 29, "sha_ni"),
    (7, 0, EBX, 30, "avx512bw"), (7, 0, EBX, 31, "avx512vl"),
    (7, 0, ECX, 1, "avx512vbmi"), (7, 0, ECX, 2, "umip"), (7, 0, ECX, 3, "pku"), (7, 0, ECX, 8, "gfni"),
    (7, 0, ECX, 9, "vaes"), (7, 0, ECX, 10, "vpclmulqdq"), (7, 0, ECX, 11, "avx512_vnni"), (7, 0, ECX, 16, "la57"),
    (7, 0, ECX, 22, "rdpid"), (7, 0, EDX, 4, "fsrm"), (7, 0, EDX, 22, "amx_bf16"), (7, 0, EDX, 24, "amx_tile"),
    (7, 0, EDX, 25, "amx_int8"),
    (0x8000_0001, 0, EDX, 20, "nx"), (0x8000_0001, 0, EDX, 26, "pdpe1gb"), (0x8000_0001, 0, EDX, 27, "rdtscp"),
    (0x8000_0001, 0, EDX, 29, "lm"), (0x8000_0001, 0, ECX, 5, "abm"), (0x8000_0001, 0, ECX, 6, "sse4a"),
];

fn push_name(names: &mut String, leaf: &Leaf, register: usize, bit: u32) {
    let known = NAMES
        .iter()
        .find(|(f, i, r, b, _)| (*f, *i, *r, *b) == (leaf.function, leaf.index, register, bit));
    let written = match known {
        Some((.., name)) => names.write_str(name),
        None => {
            let (function, index, register) = (leaf.function, leaf.index, REGISTERS[register]);
            write!(names, "cpuid {function:#x}.{index} {register} bit {bit}")
        }
    };
    written.expect("writing to a string cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
        Leaf {
            function,
            index,
            flags: 0,
            registers,
        }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let guest = Cpuid(vec![
            leaf(1, 0, [0, 0, 1 << 13 | OSXSAVE, APIC]),
            leaf(7, 0, [0, 1 << 16 | 1 << 6, 0, 0]),
        ]);
        let host = Cpuid(vec![leaf(1, 0, [9, 9, 0, 0])]);
        assert_eq!(guest.beyond(&host).unwrap(), "cx16, cpuid 0x7.0 ebx bit 6, avx512f");
        assert_eq!(guest.beyond(&guest), None);
        assert_eq!(host.beyond(&guest), None, "more than the guest needs is no lack");
    }

    #[test]
    fn bits_that_follow_the_guests_own_registers_make_no_difference() {
        let table = |ecx, edx, size| Cpuid(vec![leaf(1, 0, [1, 2, ecx, edx]), leaf(0xd, 0, [7, size, 0, 0])]);
        assert!(table(OSXSAVE | 1, APIC, 576).same_for_the_guest(&table(1, 0, 832)));
        assert!(!table(2, 0, 0).same_for_the_guest(&table(1, 0, 0)));
    }

    #[test]
    fn each_vcpu_sees_its_own_number_everywhere() {
        let all = Cpuid(vec![
            leaf(1, 0, [0; 4]),
            leaf(0xb, 0, [9; 4]),
            leaf(0xb, 1, [9; 4]),
            leaf(0x8000_001e, 0, [9; 4]),
        ]);
        let third = all.for_vcpu(2, 3);
        assert_eq!(third.register(1, 0, EBX) >> 24, 2);
        assert_eq!(third.0[1].registers, [0, 1, 0x100, 2]);
        assert_eq!(third.0[2].registers, [2, 3, 0x201, 2]);
        assert_eq!(third.register(0x8000_001e, 0, EAX), 2);
    }

    #[test]
    fn a_table_is_what_was_encoded_and_no_longer_than_its_bound() {
        let cpuid = Cpuid(vec![leaf(1, 2, [3, 4, 5, 6]); 3]);
        let mut w = Writer::new();
        cpuid.encode(&mut w);
        assert_eq!(Cpuid::decode(&mut Reader::new(w.as_slice())), Ok(cpuid));
        assert!(Cpuid::decode(&mut Reader::new(&257_u32.to_le_bytes())).is_err());
    }
}
