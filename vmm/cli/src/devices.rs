//! Options that describe virtio devices, the same for `run`, which makes them, and `shadow`, which says where on this host
//! what is behind them lies.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use umbra_machine::config::devices::{
    BalloonConfig, ConsoleConfig, Devices, DiskConfig, NetConfig, RateLimit, RngConfig, VsockConfig,
};
use umbra_machine::{Out, Sinks};

use crate::exit::Failure;
use crate::units::{self, BadValue, Fields};

/// `--disk`, `--net`, `--rng`, `--vsock`, `--balloon`, `--console`.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// A disk: an image file or block device of this host. At a shadow: where the guest's disk of that id lies here
    #[arg(long, value_name = DISK, value_parser = disk)]
    pub(crate) disk: Vec<DiskConfig>,
    /// An interface over a TAP of this host, by name or as an open descriptor. At a shadow: which TAP the guest's interface of
    /// that id has here
    #[arg(long, value_name = NET, value_parser = net)]
    pub(crate) net: Vec<NetConfig>,
    /// A socket between the guest and programs of this host, as Firecracker's
    #[arg(long, value_name = VSOCK, value_parser = vsock)]
    pub(crate) vsock: Option<VsockConfig>,
    /// A balloon: memory the guest gives back from the start, and whether it tells which pages it does not use
    #[arg(long, value_name = BALLOON, value_parser = balloon)]
    pub(crate) balloon: Option<BalloonConfig>,
    /// A paravirtual console, beside the serial one; at a shadow: where its output goes, if the guest has one
    #[arg(long, value_name = CONSOLE, value_parser = console, default_value = "off")]
    pub(crate) console: Switched<PathBuf>,
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
            net: self.net.clone(),
            rng: self.rng.option(),
            vsock: self.vsock.clone(),
            balloon: self.balloon.clone(),
            console: self.console.option().map(|_| ConsoleConfig::default()),
        }
    }

    /// `sinks`, with the paravirtual console's output where it was asked for.
    pub(crate) fn console(&self) -> Result<impl Fn(Sinks) -> Sinks + Send + Sync + 'static, Failure> {
        let file = self.console.option().map(|path| {
            let file = File::create(&path);
            file.map_err(|error| Failure::failed(format!("console: cannot write {}: {error}", path.display())))
        });
        let file = file.transpose()?.map(Arc::new);
        Ok(move |sinks: Sinks| match &file {
            Some(file) => sinks.with_console(ToFile(Arc::clone(file))),
            None => sinks,
        })
    }
}

/// Output that goes to a file. What a full disk does not take is lost.
struct ToFile(Arc<File>);

impl Out for ToFile {
    fn put(&self, bytes: &[u8]) {
        let _ = (&*self.0).write_all(bytes);
    }
}

const DISK: &str = "path=PATH[,id=ID][,readonly=on|off][,direct=on|off][,RATES]";
const NET: &str = "tap=NAME|fd=N[,id=ID][,mac=MAC][,mtu=N][,RATES]";
const VSOCK: &str = "cid=N,socket=PATH";
const BALLOON: &str = "size=SIZE[,deflate_on_oom=on|off][,free_page_reporting=on|off]";
const CONSOLE: &str = "off|file=PATH";
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

fn net(text: &str) -> Result<NetConfig, BadValue> {
    let fields = Fields::of(text, &with_rates(&["tap", "fd", "id", "mac", "mtu"]))?;
    let (tap, fd) = (fields.read("tap", path)?, fields.read("fd", number)?);
    if tap.is_some() == fd.is_some() {
        return Err(BadValue::new("net", NET, text));
    }
    Ok(NetConfig {
        tap: tap.map(str::to_owned),
        fd,
        id: fields.read("id", parsed)?,
        mac: fields.read("mac", parsed)?,
        mtu: fields.read("mtu", number)?,
        rate_limit: rates(&fields)?,
    })
}

fn vsock(text: &str) -> Result<VsockConfig, BadValue> {
    let fields = Fields::of(text, &["cid", "socket"])?;
    let (cid, socket) = (fields.read("cid", number)?, fields.read("socket", path)?);
    match (cid, socket) {
        (Some(cid), Some(socket)) => Ok(VsockConfig {
            cid,
            socket: socket.into(),
        }),
        _ => Err(BadValue::new("vsock", VSOCK, text)),
    }
}

fn balloon(text: &str) -> Result<BalloonConfig, BadValue> {
    let fields = Fields::of(text, &["size", "deflate_on_oom", "free_page_reporting"])?;
    let size = fields
        .read("size", units::size)?
        .ok_or_else(|| BadValue::new("size", BALLOON, text))?;
    Ok(BalloonConfig {
        size: size.0,
        deflate_on_oom: fields.read("deflate_on_oom", units::toggle)?.unwrap_or(false),
        free_page_reporting: fields.read("free_page_reporting", units::toggle)?.unwrap_or(false),
    })
}

fn console(text: &str) -> Result<Switched<PathBuf>, BadValue> {
    match text.split_once('=') {
        None if text == "off" => Ok(Switched::Off),
        Some(("file", path)) if !path.is_empty() => Ok(Switched::On(path.into())),
        _ => Err(BadValue::new("console", CONSOLE, text)),
    }
}

fn number<T: core::str::FromStr>(key: &str, text: &str) -> Result<T, BadValue> {
    text.parse()
        .map_err(|_| BadValue::new(key, "a number in its range", text))
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
    fn the_other_devices_are_too() {
        let card = net("tap=tap0,id=eth0,mac=02:00:00:00:00:01,mtu=1400").unwrap();
        assert_eq!(
            (card.tap.as_deref(), card.fd, card.mtu),
            (Some("tap0"), None, Some(1400))
        );
        assert_eq!(card.mac, "02:00:00:00:00:01".parse().ok());
        assert_eq!(net("fd=7").map(|net| net.fd), Ok(Some(7)));
        let socket = vsock("cid=3,socket=/run/v.sock").unwrap();
        assert_eq!((socket.cid, socket.socket), (3, "/run/v.sock".into()));
        let balloon = balloon("size=64M,free_page_reporting=on").unwrap();
        assert_eq!(
            (balloon.size, balloon.free_page_reporting, balloon.deflate_on_oom),
            (64 << 20, true, false)
        );
        assert_eq!(console("off"), Ok(Switched::Off));
        assert_eq!(console("file=/c.log"), Ok(Switched::On("/c.log".into())));
        for (line, got) in [
            (
                net("tap=a,fd=3").unwrap_err(),
                format!("net: expected {NET}, got 'tap=a,fd=3'"),
            ),
            (
                net("tap=a,mac=01:00:00:00:00:00").unwrap_err(),
                "mac: expected an interface's address as 02:00:00:00:00:01, got '01:00:00:00:00:00'".to_owned(),
            ),
            (
                net("tap=a,mtu=70000").unwrap_err(),
                "mtu: expected a number in its range, got '70000'".to_owned(),
            ),
            (
                vsock("cid=3").unwrap_err(),
                format!("vsock: expected {VSOCK}, got 'cid=3'"),
            ),
            (
                console("tty").unwrap_err(),
                format!("console: expected {CONSOLE}, got 'tty'"),
            ),
        ] {
            assert_eq!(line.to_string(), got);
        }
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
