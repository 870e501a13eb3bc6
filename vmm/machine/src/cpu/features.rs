//! Features by the names operators know them by, and how two sets of them differ.

use std::collections::BTreeMap;
use std::fmt;

/// A CPUID register that is a set of features: each bit is something a guest may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Register {
    pub(crate) leaf: u32,
    pub(crate) index: u32,
    /// 0 to 3: eax, ebx, ecx, edx.
    pub(crate) register: usize,
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const NAMES_OF_REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

const fn register(leaf: u32, index: u32, register: usize) -> Register {
    Register { leaf, index, register }
}

/// All of them.
pub(crate) const REGISTERS_OF_FEATURES: &[Register] = &[
    register(1, 0, ECX),
    register(1, 0, EDX),
    register(7, 0, EBX),
    register(7, 0, ECX),
    register(7, 0, EDX),
    register(7, 1, EAX),
    register(7, 1, ECX),
    register(7, 1, EDX),
    register(0xd, 0, EAX),
    register(0xd, 0, EDX),
    register(0xd, 1, EAX),
    register(0xd, 1, ECX),
    register(0xd, 1, EDX),
    // KVM's own features (kvm/cpuid.rst).
    register(0x4000_0001, 0, EAX),
    register(0x8000_0001, 0, ECX),
    register(0x8000_0001, 0, EDX),
    register(0x8000_0008, 0, EBX),
    register(0x8000_000a, 0, EDX),
    register(0x8000_0021, 0, EAX),
];

/// Leaf 0x80000001 edx repeats these bits of leaf 1 on some processors; they have no names of their own.
pub(crate) const REPEATED: u32 = 0x0183_f3ff;

/// Names as Linux has them in `/proc/cpuinfo`, by register and bit.
#[rustfmt::skip]
const NAMES: &[(Register, &[(u32, &str)])] = &[
    (register(1, 0, ECX), &[
        (0, "sse3"), (1, "pclmulqdq"), (3, "monitor"), (9, "ssse3"), (12, "fma"), (13, "cx16"), (15, "pdcm"),
        (17, "pcid"), (19, "sse4_1"), (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"),
        (24, "tsc_deadline_timer"), (25, "aes"), (26, "xsave"), (27, "osxsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"),
        (31, "hypervisor"),
    ]),
    (register(1, 0, EDX), &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
        (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
        (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"), (28, "ht"),
    ]),
    (register(7, 0, EBX), &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (3, "bmi1"), (4, "hle"), (5, "avx2"), (7, "smep"), (8, "bmi2"), (9, "erms"),
        (10, "invpcid"), (11, "rtm"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"),
        (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (28, "avx512cd"), (29, "sha_ni"), (30, "avx512bw"),
        (31, "avx512vl"),
    ]),
    (register(7, 0, ECX), &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512_vbmi2"), (8, "gfni"), (9, "vaes"),
        (10, "vpclmulqdq"), (11, "avx512_vnni"), (12, "avx512_bitalg"), (14, "avx512_vpopcntdq"), (16, "la57"),
        (22, "rdpid"), (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"),
    ]),
    (register(7, 0, EDX), &[
        (4, "fsrm"), (8, "avx512_vp2intersect"), (10, "md_clear"), (14, "serialize"), (16, "tsxldtrk"), (22, "amx_bf16"),
        (23, "avx512_fp16"), (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"), (27, "intel_stibp"), (28, "flush_l1d"),
        (29, "arch_capabilities"), (31, "spec_ctrl_ssbd"),
    ]),
    (register(7, 1, EAX), &[(4, "avx_vnni"), (5, "avx512_bf16"), (21, "amx_fp16"), (23, "avx_ifma")]),
    (register(0xd, 0, EAX), &[
        (0, "xcr0_x87"), (1, "xcr0_sse"), (2, "xcr0_avx"), (5, "xcr0_opmask"), (6, "xcr0_zmm_low"), (7, "xcr0_zmm_high"),
        (9, "xcr0_pkru"), (17, "xcr0_tilecfg"), (18, "xcr0_tiledata"),
    ]),
    (register(0xd, 1, EAX), &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (register(0x4000_0001, 0, EAX), &[
        (0, "kvm_clocksource"), (1, "kvm_nop_io_delay"), (3, "kvm_clocksource2"), (4, "kvm_async_pf"), (5, "kvm_steal_time"),
        (6, "kvm_pv_eoi"), (7, "kvm_pv_unhalt"), (9, "kvm_pv_tlb_flush"), (10, "kvm_async_pf_vmexit"), (11, "kvm_pv_send_ipi"),
        (12, "kvm_poll_control"), (13, "kvm_pv_sched_yield"), (14, "kvm_async_pf_int"), (15, "kvm_msi_ext_dest_id"),
        (16, "kvm_hc_map_gpa_range"), (17, "kvm_migration_control"), (24, "kvm_clocksource_stable"),
    ]),
    (register(0x8000_0001, 0, ECX), &[
        (0, "lahf_lm"), (1, "cmp_legacy"), (4, "cr8_legacy"), (5, "abm"), (6, "sse4a"), (7, "misalignsse"),
        (8, "3dnowprefetch"), (9, "osvw"), (22, "topoext"), (23, "perfctr_core"),
    ]),
    (register(0x8000_0001, 0, EDX), &[
        (11, "syscall"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"),
    ]),
];

impl Register {
    /// Read `LEAF.REGISTER` or `LEAF.INDEX.REGISTER`, the numbers in hexadecimal with 0x.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('.').collect();
        let (leaf, index, name) = match parts[..] {
            [leaf, name] => (leaf, "0x0", name),
            [leaf, index, name] => (leaf, index, name),
            _ => return None,
        };
        let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        let found = register(
            number(leaf)?,
            number(index)?,
            NAMES_OF_REGISTERS.iter().position(|known| *known == name)?,
        );
        REGISTERS_OF_FEATURES.contains(&found).then_some(found)
    }

    fn names(self) -> &'static [(u32, &'static str)] {
        NAMES
            .iter()
            .find(|(register, _)| *register == self)
            .map_or(&[], |(_, names)| names)
    }

    /// What one of its bits is called.
    fn name_of(self, bit: u32) -> String {
        match self.names().iter().find(|(named, _)| *named == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("{self}.{bit}"),
        }
    }
}

/// A feature by its name, or by its place: `REGISTER.BIT`.
pub(crate) fn feature(text: &str) -> Option<(Register, u32)> {
    let by_name = NAMES.iter().find_map(|(register, names)| {
        let (bit, _) = names.iter().find(|(_, name)| *name == text)?;
        Some((*register, *bit))
    });
    by_name.or_else(|| {
        let (register, bit) = text.rsplit_once('.')?;
        let bit = bit.parse().ok().filter(|bit| *bit < 32)?;
        Some((Register::parse(register)?, bit))
    })
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES_OF_REGISTERS[self.register];
        match self.index {
            0 => write!(f, "{:#x}.{name}", self.leaf),
            index => write!(f, "{:#x}.{index:#x}.{name}", self.leaf),
        }
    }
}

/// What a processor can do, as far as CPUID tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features(BTreeMap<Register, u32>);

impl FromIterator<(Register, u32)> for Features {
    fn from_iter<T: IntoIterator<Item = (Register, u32)>>(iter: T) -> Self {
        let mut features = Self::default();
        for (register, bits) in iter {
            *features.0.entry(register).or_default() |= bits;
        }
        features
    }
}

impl Features {
    /// Their names, by register.
    pub fn names(&self) -> Vec<String> {
        self.beyond(&Self::default())
    }

    fn known_to(&self, other: &Self) -> Self {
        let known = self.0.iter().filter(|(register, _)| other.0.contains_key(register));
        known.map(|(register, bits)| (*register, *bits)).collect()
    }

    /// The names of what this has and `other` lacks.
    pub(crate) fn beyond(&self, other: &Self) -> Vec<String> {
        let mut names = Vec::new();
        for (register, bits) in &self.0 {
            let lacking = bits & !other.0.get(register).copied().unwrap_or(0);
            names.extend(
                (0..32)
                    .filter(|bit| lacking >> bit & 1 == 1)
                    .map(|bit| register.name_of(bit)),
            );
        }
        names
    }
}

/// As a template that allows exactly these: what one host writes, another can compare itself with.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[only]")?;
        for (register, bits) in &self.0 {
            let names = (0..32)
                .filter(|bit| bits >> bit & 1 == 1)
                .map(|bit| format!("{:?}", register.name_of(bit)));
            writeln!(f, "\"{register}\" = [{}]", names.collect::<Vec<_>>().join(", "))?;
        }
        Ok(())
    }
}

/// One feature that one side has and the other lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name, or its place in CPUID.
    pub feature: String,
    /// Who has it.
    pub side: Side,
}

/// Who has a feature that the other lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The guest, or whatever is to move: it cannot run here.
    Source,
    /// This host: no obstacle, the guest just does not use it.
    Here,
}

/// Every feature in which `source`, a guest or the host it runs on, and `here` differ; first what `here` lacks. Registers
/// that only one of them knows of are not compared: a template that says nothing of a register allows all of it.
pub fn compare(source: &Features, here: &Features) -> Vec<Difference> {
    let (source, here) = (&source.known_to(here), &here.known_to(source));
    let of = |names: Vec<String>, side| names.into_iter().map(move |feature| Difference { feature, side });
    of(source.beyond(here), Side::Source)
        .chain(of(here.beyond(source), Side::Here))
        .collect()
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.side {
            Side::Source => "the guest has it, this host does not",
            Side::Here => "this host has it, the guest does not",
        };
        write!(f, "{}: {who}", self.feature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_named_with_the_side_that_has_it() {
        let leaf7 = Register::parse("0x7.ebx").unwrap();
        let extra = Register::parse("0xd.0x1.eax").unwrap();
        let unknown = Register::parse("0x1.ecx").unwrap();
        let source = Features::from_iter([(leaf7, 1 << 16 | 1 << 6 | 1), (extra, 0), (unknown, 1)]);
        let here = Features::from_iter([(leaf7, 1), (extra, 1)]);
        let lines: Vec<String> = compare(&source, &here).iter().map(Difference::to_string).collect();
        assert_eq!(
            lines,
            [
                "0x7.ebx.6: the guest has it, this host does not",
                "avx512f: the guest has it, this host does not",
                "xsaveopt: this host has it, the guest does not",
            ]
        );
        assert!(compare(&source, &source).is_empty());
    }

    #[test]
    fn every_name_and_every_place_is_read_as_it_is_written() {
        let mut seen = std::collections::BTreeSet::new();
        for register in REGISTERS_OF_FEATURES {
            assert_eq!(Register::parse(&register.to_string()), Some(*register));
            for bit in 0..32 {
                let name = register.name_of(bit);
                assert_eq!(feature(&name), Some((*register, bit)), "{name}");
                assert!(seen.insert(name));
            }
        }
        for wrong in [
            "",
            "0x7",
            "7.ebx",
            "0x7.exx",
            "0x7.ebx.32",
            "0x2.eax.1",
            "0x7.0x9.eax.1",
            "nothing",
            "0x1.0x0.0x0.ecx.1",
        ] {
            assert_eq!(feature(wrong), None, "{wrong}");
        }
    }
}
