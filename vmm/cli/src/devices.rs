//! Options that describe virtio devices, the same for `run`, which makes them, and `shadow`, which says where on this host
//! what is behind them lies.

use clap::Args;
use umbra_machine::config::devices::{Devices, DiskConfig, RateLimit, RngConfig};

use crate::units::{self, BadValue, Fields};

/// `--disk`, `--rng`.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// A disk: an image file or block device of this host. At a shadow: where the guest's disk of that id lies here
    #[arg(long, value_name = DISK, value_parser = disk)]
    pub(crate) disk: Vec<DiskConfig>,
    /// Where the guest's random numbers come from, if it gets any
    #[arg(long, value_name = RNG, value_parser = rng, default_value = "src=/dev/urandom")]
    pub(crate) rng: Switched<RngConfig>,
}

/// A device there is at most one of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Switched<T> {
    Off,
    On(T),
}

impl<T> Switched<T> {
    fn option(&self) -> Option<T>
    where
        T: Clone,
    {
        match self {
            Self::Off => None,
            Self::On(value) => Some(value.clone()),
        }
    }
}

impl DeviceArgs {
    /// As the machine takes them.
    pub(crate) fn devices(&self) -> Devices {
        Devices {
            disk: self.disk.clone(),
            rng: self.rng.option(),
            ..Devices::default()
        }
    }
}

const DISK: &str = "path=PATH[,id=ID][,readonly=on|off][,direct=on|off][,RATES]";
const RNG: &str = "src=PATH|off";

/// The keys of a rate limiter, as cloud-hypervisor has them: bytes (`bw_`) and operations (`ops_`) per so many milliseconds.
const RATES: [&str; 6] = [
    "bw_size",
    "bw_refill_time",
    "bw_one_time_burst",
    "ops_size",
    "ops_refill_time",
    "ops_one_time_burst",
];

fn disk(text: &str) -> Result<DiskConfig, BadValue> {
    let fields = Fields::of(text, &with_rates(&["path", "id", "readonly", "direct"]))?;
    let path = fields
        .read("path", path)?
        .ok_or_else(|| BadValue::new("path", DISK, text))?;
    Ok(DiskConfig {
        path: path.into(),
        id: fields.read("id", parsed)?,
        readonly: fields.read("readonly", units::toggle)?,
        direct: fields.read("direct", units::toggle)?.unwrap_or(false),
        rate_limit: rates(&fields)?,
    })
}

fn rng(text: &str) -> Result<Switched<RngConfig>, BadValue> {
    if text == "off" {
        return Ok(Switched::Off);
    }
    let src = Fields::of(text, &["src"])?.read("src", path)?;
    src.map(|src| Switched::On(RngConfig { src: src.into() }))
        .ok_or_else(|| BadValue::new("src", RNG, text))
}

fn with_rates(keys: &[&'static str]) -> Vec<&'static str> {
    keys.iter().chain(&RATES).copied().collect()
}

/// A rate limiter, if any of its keys was given.
fn rates(fields: &Fields<'_>) -> Result<Option<RateLimit>, BadValue> {
    let bytes = |key, text: &str| units::size(key, text).map(|size| size.0);
    let mut values = [None; RATES.len()];
    for (value, key) in values.iter_mut().zip(RATES) {
        *value = if key.ends_with("size") || key.ends_with("burst") {
            fields.read(key, bytes)?
        } else {
            fields.read(key, milliseconds)?
        };
    }
    if values.iter().all(Option::is_none) {
        return Ok(None);
    }
    let [
        bw_size,
        bw_refill_time,
        bw_one_time_burst,
        ops_size,
        ops_refill_time,
        ops_one_time_burst,
    ] = values.map(Option::unwrap_or_default);
    Ok(Some(RateLimit {
        bw_size,
        bw_one_time_burst,
        bw_refill_time,
        ops_size,
        ops_one_time_burst,
        ops_refill_time,
    }))
}

fn milliseconds(key: &str, text: &str) -> Result<u64, BadValue> {
    text.parse()
        .map_err(|_| BadValue::new(key, "a number of milliseconds", text))
}

fn path<'a>(_key: &str, text: &'a str) -> Result<&'a str, BadValue> {
    Ok(text)
}

fn parsed<T: core::str::FromStr<Err = umbra_machine::config::devices::BadName>>(
    key: &str,
    text: &str,
) -> Result<T, BadValue> {
    text.parse().map_err(|error| BadValue(format!("{key}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_described_as_in_cloud_hypervisor() {
        let plain = DiskConfig {
            path: "/a.img".into(),
            ..DiskConfig::default()
        };
        assert_eq!(disk("/a.img"), Ok(plain.clone()));
        assert_eq!(disk("path=/a.img"), Ok(plain.clone()));
        let full = "path=/a.img,id=rootfs,readonly=on,direct=on,bw_size=1M,bw_refill_time=100,ops_size=50,ops_refill_time=1000,ops_one_time_burst=10";
        let limit = RateLimit {
            bw_size: 1 << 20,
            bw_refill_time: 100,
            ops_size: 50,
            ops_refill_time: 1000,
            ops_one_time_burst: 10,
            bw_one_time_burst: 0,
        };
        assert_eq!(
            disk(full),
            Ok(DiskConfig {
                id: "rootfs".parse().ok(),
                readonly: Some(true),
                direct: true,
                rate_limit: Some(limit),
                ..plain
            })
        );
        assert_eq!(rng("off"), Ok(Switched::Off));
        assert_eq!(
            rng("src=/dev/hwrng"),
            Ok(Switched::On(RngConfig {
                src: "/dev/hwrng".into()
            }))
        );
    }

    #[test]
    fn what_is_wrong_with_a_device_is_said_in_one_line() {
        let line = |text: &str| disk(text).unwrap_err().to_string();
        assert_eq!(
            line("path=a,id=a/b"),
            "id: expected 1 to 32 letters, digits, '-', '_' or '.', got 'a/b'"
        );
        assert_eq!(line("id=a"), format!("path: expected {DISK}, got 'id=a'"));
        assert_eq!(line("path=a,direct=1"), "direct: expected on or off, got '1'");
        assert_eq!(
            line("path=a,bw_size=1M,bw_refill_time=1s"),
            "bw_refill_time: expected a number of milliseconds, got '1s'"
        );
        assert!(line("path=a,bs=1").starts_with("key: expected one of path, id, readonly, direct, bw_size"));
    }
}
