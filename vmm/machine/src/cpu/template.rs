//! Templates: what a guest may see of its host's processor.
//!
//! A template is a TOML file; the program carries some (`resources/cpu-templates`), and reads others from disk:
//!
//! ```toml
//! description = "for web servers"
//! needs = ["avx2"]                  # a host without these is refused
//! without = ["rtm", "0x7.edx.4"]    # hidden, by name or by register and bit
//! hide-msrs = ["0x48", "0x480-0x491"]
//! [only]                            # of these registers, nothing but
//! "0x7.ebx" = ["fsgsbase", "avx2"]
//! ```
//!
//! Nothing is *added* by a template: what KVM does not support here stays away. A hidden MSR raises a general protection
//! fault when the guest uses it, where the kernel can filter MSRs.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;

use serde::Deserialize;

use super::features::{Features, REGISTERS_OF_FEATURES, REPEATED, Register, feature};
use super::table::dynamic;
use crate::error::Error;
use crate::limits;

/// What a guest may see of its host's processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    name: String,
    description: String,
    needs: Vec<(Register, u32)>,
    masks: BTreeMap<Register, u32>,
    /// Registers that `only` names.
    limited: Vec<Register>,
    hidden: Vec<MsrRange>,
}

/// MSRs from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MsrRange {
    pub(crate) first: u32,
    pub(crate) last: u32,
}

/// x2APIC's registers, which the kernel serves without looking at its filter.
const X2APIC: MsrRange = MsrRange {
    first: 0x800,
    last: 0x8ff,
};

impl MsrRange {
    /// From the first to the last, if a guest's view of them can be filtered.
    pub(crate) fn new(first: u32, last: u32) -> Result<Self, &'static str> {
        if first > last || last - first >= limits::MSRS_OF_A_RANGE {
            return Err("a first and a last MSR, at most 12288 of them");
        }
        if first <= X2APIC.last && last >= X2APIC.first {
            return Err("none of x2APIC's MSRs, 0x800 to 0x8ff, which no kernel can hide");
        }
        Ok(Self { first, last })
    }
}

/// The file, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    description: String,
    #[serde(default)]
    needs: Vec<String>,
    #[serde(default)]
    without: Vec<String>,
    #[serde(default)]
    only: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    hide_msrs: Vec<String>,
}

macro_rules! built_in {
    ($($name:literal,)*) => {
        const BUILT_IN: &[(&str, &str)] = &[$(
            ($name, include_str!(concat!("../../../../resources/cpu-templates/", $name, ".toml"))),
        )*];
    };
}

built_in! {
    "host",
    "x86-64-v2",
    "x86-64-v3",
    "x86-64-v4",
    "emulated",
}

impl Template {
    /// The names of the templates that the program carries.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// One of those that the program carries.
    pub fn named(name: &str) -> Option<Self> {
        let (name, text) = BUILT_IN.iter().find(|(known, _)| *known == name)?;
        Some(Self::parse(name, text).expect("a test reads every template there is"))
    }

    /// The built-in template of this name; if there is none, the file.
    pub fn find(name: &str) -> Result<Self, Error> {
        if let Some(template) = Self::named(name) {
            return Ok(template);
        }
        let path = Path::new(name);
        let refuse = |why: String| Error::File {
            path: path.to_owned(),
            why,
        };
        let known = Self::built_in().collect::<Vec<_>>().join(", ");
        let file = std::fs::File::open(path).map_err(|error| {
            refuse(format!(
                "neither a template ({known}) nor a file that can be read: {error}"
            ))
        })?;
        let mut text = String::new();
        file.take(limits::TEMPLATE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|error| refuse(format!("cannot read the template: {error}")))?;
        if text.len() as u64 > limits::TEMPLATE_BYTES {
            return Err(refuse(format!("expected at most {} bytes", limits::TEMPLATE_BYTES)));
        }
        Self::parse(name, &text)
    }

    /// Read a template's text.
    pub fn parse(name: &str, text: &str) -> Result<Self, Error> {
        let refuse = |field: &str, expected: &str, found: &str| Error::File {
            path: name.into(),
            why: format!("{field}: expected {expected}, got \"{found}\""),
        };
        let file: File = toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            Error::File {
                path: name.into(),
                why: format!("line {line}: {}", error.message().replace('\n', " ")),
            }
        })?;
        let known = |field: &str, text: &str| {
            feature(text).ok_or_else(|| refuse(field, "a feature by name, or REGISTER.BIT as 0x7.ebx.16", text))
        };
        let mut masks: BTreeMap<Register, u32> = REGISTERS_OF_FEATURES
            .iter()
            .map(|register| (*register, u32::MAX))
            .collect();
        let mut limited = Vec::new();
        for (key, names) in &file.only {
            let register = Register::parse(key)
                .ok_or_else(|| refuse("only", "a register of features as 0x7.ebx or 0xd.0x1.eax", key))?;
            let mut mask = if register == REPEATING { REPEATED } else { 0 };
            for name in names {
                let field = format!("only.{register}");
                let (place, bit) = known(&field, name)?;
                if place != register {
                    return Err(refuse(&field, "a feature of this register", name));
                }
                mask |= 1 << bit;
            }
            masks.insert(register, mask);
            limited.push(register);
        }
        for name in &file.without {
            let (register, bit) = known("without", name)?;
            masks.entry(register).and_modify(|mask| *mask &= !(1 << bit));
        }
        let mut needs = Vec::new();
        for name in &file.needs {
            let (register, bit) = known("needs", name)?;
            if masks[&register] >> bit & 1 == 0 {
                return Err(refuse("needs", "a feature that the template does not hide", name));
            }
            needs.push((register, 1 << bit));
        }
        if file.hide_msrs.len() > limits::MSR_RANGES {
            let most = limits::MSR_RANGES;
            return Err(refuse(
                "hide-msrs",
                &format!("at most {most} ranges"),
                &file.hide_msrs.len().to_string(),
            ));
        }
        let mut hidden = Vec::new();
        for text in &file.hide_msrs {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let number = |text: &str| u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok();
            let (Some(first), Some(last)) = (number(first), number(last)) else {
                return Err(refuse("hide-msrs", "an MSR as 0x48 or a range as 0x480-0x491", text));
            };
            hidden.push(MsrRange::new(first, last).map_err(|why| refuse("hide-msrs", why, text))?);
        }
        Ok(Self {
            name: name.to_owned(),
            description: file.description,
            needs,
            masks,
            limited,
            hidden,
        })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is for.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The features it allows, of those registers that it limits: what a host must have to show all of it. Bits that
    /// follow the guest's own control registers are no feature of a host.
    pub fn features(&self) -> Features {
        let repeated = |register: &Register| if *register == REPEATING { REPEATED } else { 0 };
        let limits = self
            .limited
            .iter()
            .map(|register| (*register, self.masks[register] & !repeated(register)));
        limits
            .chain(self.needs.iter().copied())
            .map(|(register, bits)| (register, bits & !dynamic(register)))
            .collect()
    }

    /// The features without which it cannot be what it says.
    pub(crate) fn needs(&self) -> Features {
        let fixed = |(register, bits): &(Register, u32)| (*register, bits & !dynamic(*register));
        self.needs.iter().map(fixed).collect()
    }

    pub(crate) fn mask(&self, register: Register) -> u32 {
        self.masks.get(&register).copied().unwrap_or(u32::MAX)
    }

    pub(crate) fn hidden_msrs(&self) -> &[MsrRange] {
        &self.hidden
    }
}

const REPEATING: Register = Register {
    leaf: 0x8000_0001,
    index: 0,
    register: 3,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_that_the_program_carries_can_be_read_and_says_what_it_is_for() {
        for name in Template::built_in() {
            let template = Template::named(name).unwrap();
            assert!(!template.description().is_empty() && template.name() == name);
        }
        let host = Template::named("host").unwrap();
        assert!(host.masks.values().all(|mask| *mask == u32::MAX) && host.hidden.is_empty());
        let [v2, v3, v4] = ["x86-64-v2", "x86-64-v3", "x86-64-v4"].map(|name| Template::named(name).unwrap());
        assert!(
            v2.features().beyond(&v3.features()).is_empty(),
            "{:?}",
            v2.features().beyond(&v3.features())
        );
        assert!(
            v3.features().beyond(&v4.features()).is_empty(),
            "{:?}",
            v3.features().beyond(&v4.features())
        );
        assert!(v4.features().names().contains(&"avx512f".to_owned()));
    }

    #[test]
    fn bits_that_follow_the_guests_control_registers_are_asked_of_no_host() {
        let text = "needs = [\"osxsave\"]\n[only]\n\"0x1.ecx\" = [\"osxsave\", \"cx16\"]\n\"0x1.edx\" = [\"apic\", \"tsc\"]\n\
                    \"0x7.ecx\" = [\"umip\", \"0x7.ecx.4\"]";
        let template = Template::parse("t.toml", text).unwrap();
        assert_eq!(template.features().names(), ["cx16", "tsc", "umip"]);
        assert!(template.needs().names().is_empty());
        // They are shown all the same.
        assert_eq!(template.mask(Register::parse("0x1.edx").unwrap()), 1 << 9 | 1 << 4);
        for name in Template::built_in() {
            let features = Template::named(name).unwrap().features().names();
            assert!(
                !features.iter().any(|name| name == "osxsave" || name == "apic"),
                "{name}"
            );
        }
    }

    #[test]
    fn what_a_host_writes_of_itself_is_a_template_of_the_same_features() {
        let features = Template::named("x86-64-v3").unwrap().features();
        assert_eq!(
            Template::parse("copy", &features.to_string()).unwrap().features(),
            features
        );
    }

    #[test]
    fn a_template_that_cannot_be_is_refused_in_one_line_that_names_the_place() {
        for (text, expected) in [
            (
                "without = [\"cx61\"]",
                "without: expected a feature by name, or REGISTER.BIT as 0x7.ebx.16, got \"cx61\"",
            ),
            (
                "needs = [\"0x7.ebx.32\"]",
                "needs: expected a feature by name, or REGISTER.BIT as 0x7.ebx.16, got \"0x7.ebx.32\"",
            ),
            (
                "[only]\n\"0x7.ebp\" = []",
                "only: expected a register of features as 0x7.ebx or 0xd.0x1.eax, got \"0x7.ebp\"",
            ),
            (
                "[only]\n\"0x7.ebx\" = [\"cx16\"]",
                "only.0x7.ebx: expected a feature of this register, got \"cx16\"",
            ),
            (
                "needs = [\"avx\"]\nwithout = [\"avx\"]",
                "needs: expected a feature that the template does not hide, got \"avx\"",
            ),
            (
                "hide-msrs = [\"48\"]",
                "hide-msrs: expected an MSR as 0x48 or a range as 0x480-0x491, got \"48\"",
            ),
            (
                "hide-msrs = [\"0x2-0x1\"]",
                "hide-msrs: expected a first and a last MSR, at most 12288 of them, got \"0x2-0x1\"",
            ),
            (
                "hide-msrs = [\"0x700-0x810\"]",
                "hide-msrs: expected none of x2APIC's MSRs, 0x800 to 0x8ff, which no kernel can hide, got \"0x700-0x810\"",
            ),
        ] {
            let error = Template::parse("t.toml", text).unwrap_err().to_string();
            assert_eq!(error, format!("t.toml: {expected}"));
        }
        let error = Template::parse("t.toml", "description = \"x\"\nwithuot = []")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("t.toml: line 2: unknown field") && !error.contains('\n'),
            "{error}"
        );
        let many = format!("hide-msrs = [{}]", "\"0x1\",".repeat(17));
        let error = Template::parse("t.toml", &many).unwrap_err().to_string();
        assert_eq!(error, "t.toml: hide-msrs: expected at most 16 ranges, got \"17\"");
        assert!(
            Template::find("/nonexistent/t")
                .unwrap_err()
                .to_string()
                .starts_with("/nonexistent/t: neither a template (host, x86-64-v2")
        );
    }
}
