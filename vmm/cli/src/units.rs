//! Values as an operator writes them: `key=value` lists, sizes, spans of time, `on|off`.
//!
//! The style is cloud-hypervisor's: `--memory size=1G,shared=on`. The first key may be left out (`--memory 1G`), keys
//! come in any order, none twice. Whatever is wrong is said in one line that names the key and what was expected.

use core::time::Duration;

use umbra_units::{Bytes, Ratio};

/// A value that is not what its option takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadValue(pub(crate) String);

impl BadValue {
    /// `key` takes `expected`, and was given `got`.
    pub(crate) fn new(key: &str, expected: &str, got: &str) -> Self {
        const SHOWN: usize = 60;
        let got = if got.chars().count() > SHOWN {
            got.chars().take(SHOWN).chain("...".chars()).collect()
        } else {
            got.to_owned()
        };
        Self(format!("{key}: expected {expected}, got '{got}'"))
    }
}

/// The parts of one `key=value,key=value` list.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    fields: Vec<(&'a str, &'a str)>,
}

impl<'a> Fields<'a> {
    /// Take `text` apart. `keys` are those it may have; the first one may be left out before its value.
    pub(crate) fn of(text: &'a str, keys: &[&'static str]) -> Result<Self, BadValue> {
        let mut fields: Vec<(&str, &str)> = Vec::new();
        for (index, part) in text.split(',').enumerate() {
            let (key, value) = match part.split_once('=') {
                Some(field) => field,
                None if index == 0 => (keys[0], part),
                None => return Err(BadValue::new(part, "key=value", part)),
            };
            if !keys.contains(&key) {
                return Err(BadValue::new("key", &format!("one of {}", keys.join(", ")), key));
            }
            if value.is_empty() {
                return Err(BadValue::new(key, "a value", ""));
            }
            if fields.iter().any(|(known, _)| *known == key) {
                return Err(BadValue(format!("{key}: given twice")));
            }
            fields.push((key, value));
        }
        Ok(Self { fields })
    }

    /// The value of `key`, read by `read`, if it was given.
    pub(crate) fn read<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&'static str, &'a str) -> Result<T, BadValue>,
    ) -> Result<Option<T>, BadValue> {
        let given = self.fields.iter().find(|(known, _)| *known == key);
        given.map(|(_, value)| read(key, value)).transpose()
    }
}

/// `4096`, `512K`, `256M`, `2G`, `1T`: bytes, in powers of 1,024. `M`, `MiB` and `m` mean the same.
pub(crate) fn size(key: &str, text: &str) -> Result<Bytes, BadValue> {
    let bad = || BadValue::new(key, "a size as 4096, 512K, 256M or 2G", text);
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().trim_end_matches("IB") {
        "" if !unit.is_empty() => return Err(bad()),
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).map(Bytes).ok_or_else(bad)
}

/// `300ms`, `2s`, `1m`, `250us`. The unit is never left out: `--timeout 60` means seconds to one reader and
/// milliseconds to the next.
pub(crate) fn span(key: &str, text: &str) -> Result<Duration, BadValue> {
    let bad = || BadValue::new(key, "a time with its unit, as 250us, 300ms, 2s or 1m", text);
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    match unit {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs).ok_or_else(bad),
        _ => Err(bad()),
    }
}

/// `on` or `off`.
pub(crate) fn toggle(key: &str, text: &str) -> Result<bool, BadValue> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(BadValue::new(key, "on or off", text)),
    }
}

/// A share as people read it.
pub(crate) fn percent(share: f64) -> String {
    Ratio::new(share.clamp(0.0, 1.0)).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_its_keys_in_any_order_and_may_leave_the_first_one_out() {
        let read = |text: &'static str| {
            let fields = Fields::of(text, &["size", "shared"]).unwrap();
            (
                fields.read("size", size).unwrap(),
                fields.read("shared", toggle).unwrap(),
            )
        };
        assert_eq!(read("size=256M,shared=on"), (Some(Bytes::mib(256)), Some(true)));
        assert_eq!(read("shared=off,size=1G"), (Some(Bytes::mib(1024)), Some(false)));
        assert_eq!(read("512M"), (Some(Bytes::mib(512)), None));
        assert_eq!(read("512M,shared=on"), (Some(Bytes::mib(512)), Some(true)));
    }

    #[test]
    fn what_is_wrong_with_a_list_is_said_in_one_line_that_names_the_key() {
        fn read(text: &str) -> Result<(), BadValue> {
            let fields = Fields::of(text, &["size", "shared"])?;
            fields.read("size", size)?;
            fields.read("shared", toggle).map(drop)
        }
        let line = |text: &str| read(text).unwrap_err().to_string();
        assert_eq!(line("sise=1G"), "key: expected one of size, shared, got 'sise'");
        assert_eq!(line("size=1G,size=2G"), "size: given twice");
        assert_eq!(line("size=1G,on"), "on: expected key=value, got 'on'");
        assert_eq!(line("size="), "size: expected a value, got ''");
        assert_eq!(line("shared=yes"), "shared: expected on or off, got 'yes'");
        assert_eq!(
            line("size=1X"),
            "size: expected a size as 4096, 512K, 256M or 2G, got '1X'"
        );
        assert_eq!(line(""), "size: expected a value, got ''");
        assert!(line(&"x".repeat(100_000)).len() < 200);
    }

    #[test]
    fn sizes_are_powers_of_1024_and_never_overflow() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("8k", 8 << 10),
            ("1MiB", 1 << 20),
            ("3T", 3 << 40),
        ] {
            assert_eq!(size("size", text), Ok(Bytes(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "1 G",
            "1Q",
            "1iB",
            "99999999999999999999",
            "16777217T",
        ] {
            assert!(size("size", text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_time_needs_its_unit() {
        assert_eq!(span("timeout", "300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(span("timeout", "2s"), Ok(Duration::from_secs(2)));
        assert_eq!(span("timeout", "1m"), Ok(Duration::from_secs(60)));
        assert_eq!(span("timeout", "250us"), Ok(Duration::from_micros(250)));
        assert_eq!(
            span("timeout", "60").unwrap_err().to_string(),
            "timeout: expected a time with its unit, as 250us, 300ms, 2s or 1m, got '60'"
        );
        for text in ["", "s", "1h", "-1s", "1.5s", "18446744073709551615m"] {
            assert!(span("timeout", text).is_err(), "{text}");
        }
    }
}
