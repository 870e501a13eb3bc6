//! CPUID, the table that tells a guest what its processor is.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use umbra_units::{Malformed, Reader, Writer};

use super::features::{Features, REGISTERS_OF_FEATURES, Register};
use super::template::Template;
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

/// Leaf 1 ecx: nested VMX. Its state would have to travel too, so guests do not get it.
const VMX: u32 = 1 << 5;
/// Leaf 0x80000001 ecx: nested SVM, likewise.
const SVM: u32 = 1 << 2;
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

    /// This table, as `template` shows it.
    pub(crate) fn shown_by(mut self, template: &Template) -> Self {
        for leaf in &mut self.0 {
            for register in REGISTERS_OF_FEATURES {
                if register.leaf == leaf.function && register.index == leaf.index {
                    leaf.registers[register.register] &= template.mask(*register);
                }
            }
        }
        self.fit_xsave();
        self
    }

    /// Leaf 0xd describes each part of the XSAVE area and how large they are together: keep only the parts that XCR0 may
    /// have (SDM, CPUID leaf 0x0d).
    fn fit_xsave(&mut self) {
        let xcr0 = self.xcr0();
        let mut end = 576;
        for leaf in self.0.iter_mut().filter(|leaf| leaf.function == 0xd && leaf.index >= 2) {
            let [size, offset, flags, _] = leaf.registers;
            let supervisor = flags & 1 != 0;
            if supervisor {
                continue;
            }
            if leaf.index < 64 && xcr0 >> leaf.index & 1 == 1 {
                end = end.max(offset.saturating_add(size));
            } else {
                leaf.registers = [0; 4];
            }
        }
        let main = self.0.iter_mut().find(|leaf| leaf.function == 0xd && leaf.index == 0);
        if let Some(main) = main {
            main.registers[ECX] = if xcr0 == 0 { 0 } else { end };
        }
    }

    /// How the name of the processor's vendor begins.
    pub(crate) fn vendor(&self) -> u32 {
        self.register(0, 0, EBX)
    }

    /// The features in it.
    pub(crate) fn features(&self) -> Features {
        let bits = |register: &Register| {
            let leaf = self
                .0
                .iter()
                .find(|leaf| (leaf.function, leaf.index) == (register.leaf, register.index));
            leaf.map_or(0, |leaf| leaf.without_dynamic().registers[register.register])
        };
        REGISTERS_OF_FEATURES
            .iter()
            .map(|register| (*register, bits(register)))
            .collect()
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
        let names = self.features().beyond(&host.features());
        (!names.is_empty()).then(|| names.join(", "))
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
        for (register, value) in self.registers.iter_mut().enumerate() {
            *value &= !dynamic(Register {
                leaf: self.function,
                index: if self.function == 1 { 0 } else { self.index },
                register,
            });
        }
        self.flags &= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        self
    }
}

/// The bits of a register that follow the guest's control registers.
pub(crate) const fn dynamic(register: Register) -> u32 {
    match (register.leaf, register.index, register.register) {
        (1, 0, ECX) => OSXSAVE,
        (1, 0, EDX) => APIC,
        (7, 0, ECX) => OSPKE,
        // Size of the XSAVE area for the features enabled now.
        (0xd, 0 | 1, EBX) => u32::MAX,
        _ => 0,
    }
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
        assert_eq!(guest.beyond(&host).unwrap(), "cx16, 0x7.ebx.6, avx512f");
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
    fn a_template_hides_features_and_the_parts_of_the_xsave_area_that_go_with_them() {
        let area = |index, size, offset| leaf(0xd, index, [size, offset, 0, 0]);
        let host = Cpuid(vec![
            leaf(1, 0, [9, 9, 1 << 13 | 1, 1]),
            leaf(0xd, 0, [0b111, 0, 2000, 0]),
            area(2, 256, 576),
            area(5, 64, 1936),
        ]);
        let text = "description = \"x\"\nwithout = [\"cx16\"]\n[only]\n\"0xd.eax\" = [\"xcr0_x87\", \"xcr0_sse\"]\n";
        let shown = host.shown_by(&Template::parse("x", text).unwrap());
        assert_eq!(shown.0[0].registers, [9, 9, 1, 1]);
        assert_eq!(shown.0[1].registers, [0b11, 0, 576, 0]);
        assert_eq!((shown.0[2].registers, shown.0[3].registers), ([0; 4], [0; 4]));
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
