//! The virtio devices of a machine, as an operator describes them: on the command line, in a file, over the API.
//!
//! The same value describes two things. Given to [`MachineConfig::with_devices`](crate::MachineConfig::with_devices) it
//! says which devices the guest has and what of this host is behind them. Given to
//! [`MachineBuilder::with_devices`](crate::MachineBuilder::with_devices) it says only the latter: which devices a twin has
//! is in the guest's description, and this says, by id, where each finds its file or interface on *this* host. A
//! description never names a path, so no peer can make a node open a file of its choosing.
//!
//! What the guest can see (read-only or not, MAC, MTU, CID) is decided where the guest is launched. A twin's operator may
//! leave it out; what is said all the same must agree.
//!
//! Field names are those of the command line. Whatever is left out has the default named at the field.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::limits;

/// All virtio devices of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Devices {
    /// Disks, in the order the guest finds them.
    pub disk: Vec<DiskConfig>,
    /// Network interfaces, in the order the guest finds them.
    pub net: Vec<NetConfig>,
    /// A source of random numbers.
    pub rng: Option<RngConfig>,
    /// A socket between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A balloon, and what the guest tells of memory it does not use.
    pub balloon: Option<BalloonConfig>,
    /// A paravirtual console, beside the serial one.
    pub console: Option<ConsoleConfig>,
}

/// `--disk`: a block device over a raw file or a block device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// What the disk is called on every host it will ever be on; its number among the disks, if not given.
    pub id: Option<Id>,
    /// Whether the guest may only read; no, if not given.
    pub readonly: Option<bool>,
    /// Go around the host's page cache.
    pub direct: bool,
    /// How much of the host's disk the guest may take; all it can, if not given.
    pub rate_limit: Option<RateLimit>,
}

/// `--net`: an Ethernet interface over a TAP device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// The TAP interface, by name. Either this or `fd`.
    pub tap: Option<String>,
    /// The TAP interface, as a descriptor this process was started with. Either this or `tap`.
    pub fd: Option<i32>,
    /// What the interface is called on every host it will ever be on; its number among the interfaces, if not given.
    pub id: Option<Id>,
    /// Its address; a locally administered one made of the id, if not given.
    pub mac: Option<Mac>,
    /// The largest packet, which the guest is told; the guest's own default, if not given.
    pub mtu: Option<u16>,
    /// How much of the host's network the guest may take; all it can, if not given.
    pub rate_limit: Option<RateLimit>,
}

/// `--rng`: random numbers of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RngConfig {
    /// Where they are read.
    pub src: PathBuf,
}

/// `--vsock`: a socket between guest and host that needs no network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: u32,
    /// The UNIX socket that host programs connect to; the guest's own connections arrive at `SOCKET_PORT`.
    pub socket: PathBuf,
}

/// `--balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// Bytes the guest gives back from the start.
    pub size: u64,
    /// The guest may take memory back from the balloon before it runs out.
    pub deflate_on_oom: bool,
    /// The guest tells which pages it does not use: they need no memory of the host, and do not travel.
    pub free_page_reporting: bool,
}

/// `--console`: a paravirtual console. Where it leads is the [`Sinks`](crate::Sinks)' to say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsoleConfig {}

/// Two token buckets, one for bytes and one for operations. A size of zero is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// Bytes per `bw_refill_time`.
    pub bw_size: u64,
    /// Bytes allowed once, beyond the rate.
    pub bw_one_time_burst: u64,
    /// Milliseconds in which `bw_size` bytes are allowed.
    pub bw_refill_time: u64,
    /// Operations per `ops_refill_time`.
    pub ops_size: u64,
    /// Operations allowed once, beyond the rate.
    pub ops_one_time_burst: u64,
    /// Milliseconds in which `ops_size` operations are allowed.
    pub ops_refill_time: u64,
}

/// What a device is called: 1 to 32 letters, digits, `-`, `_` or `.`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

/// An Ethernet address of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// What such a value must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, got '{got}'")]
pub struct BadName {
    expected: &'static str,
    got: String,
}

impl Devices {
    /// Check everything that can be checked without looking at the host, and give every disk and interface an id and
    /// an address.
    pub(crate) fn complete(mut self) -> Result<Self, Error> {
        for (index, disk) in self.disk.iter_mut().enumerate() {
            let id = disk.id.get_or_insert_with(|| Id(index.to_string())).clone();
            if disk.path.as_os_str().is_empty() {
                return Err(bad("disk", &format!("path: expected the disk's file, for disk/{id}")));
            }
            check_rate("disk", disk.rate_limit)?;
        }
        for (index, net) in self.net.iter_mut().enumerate() {
            let id = net.id.get_or_insert_with(|| Id(index.to_string())).clone();
            net.check(&id)?;
        }
        unique("disk", self.disk.iter().filter_map(|disk| disk.id.as_ref()))?;
        unique("net", self.net.iter().filter_map(|net| net.id.as_ref()))?;
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        let count = self.count();
        if count > limits::VIRTIO_DEVICES {
            let most = limits::VIRTIO_DEVICES;
            return Err(bad(
                "devices",
                &format!("expected at most {most} virtio devices, got {count}"),
            ));
        }
        Ok(self)
    }

    /// How many devices these are.
    pub fn count(&self) -> usize {
        let single = [
            self.rng.is_some(),
            self.vsock.is_some(),
            self.balloon.is_some(),
            self.console.is_some(),
        ];
        self.disk.len() + self.net.len() + single.into_iter().filter(|there| *there).count()
    }
}

impl NetConfig {
    fn check(&self, id: &Id) -> Result<(), Error> {
        match (&self.tap, self.fd) {
            (Some(tap), None) => {
                // IFNAMSIZ, its final zero included.
                if tap.is_empty() || tap.len() > 15 || tap.contains(['/', '\0']) {
                    return Err(bad(
                        "net",
                        &format!("tap: expected the name of an interface, got '{tap}', for net/{id}"),
                    ));
                }
            }
            (None, Some(fd)) => {
                if fd < 3 {
                    return Err(bad(
                        "net",
                        &format!("fd: expected the number of an open descriptor from 3 up, got {fd}, for net/{id}"),
                    ));
                }
            }
            _ => {
                return Err(bad("net", &format!("expected tap=NAME or fd=N, for net/{id}")));
            }
        }
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(bad("net", &format!("mtu: expected 68 to 65535, for net/{id}")));
        }
        check_rate("net", self.rate_limit)
    }

    /// Its address: the one given, or one made of the id, the same on every host.
    pub fn mac(&self) -> Mac {
        let id = self.id.as_ref().map_or("", Id::as_str);
        self.mac.unwrap_or_else(|| Mac::made_of(id))
    }
}

impl VsockConfig {
    fn check(&self) -> Result<(), Error> {
        if !(3..u32::MAX).contains(&self.cid) {
            let (most, got) = (u32::MAX - 1, self.cid);
            return Err(bad("vsock", &format!("cid: expected 3 to {most}, got {got}")));
        }
        let bytes = self.socket.as_os_str().len();
        // sockaddr_un holds 108 bytes, its final zero included, and the guest's connections append `_` and a port.
        if bytes == 0 || bytes > 96 {
            return Err(bad("vsock", "socket: expected a path of 1 to 96 bytes"));
        }
        Ok(())
    }
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: "/dev/urandom".into(),
        }
    }
}

fn check_rate(field: &'static str, rate: Option<RateLimit>) -> Result<(), Error> {
    let Some(rate) = rate else { return Ok(()) };
    for (what, size, refill, burst) in [
        ("bw", rate.bw_size, rate.bw_refill_time, rate.bw_one_time_burst),
        ("ops", rate.ops_size, rate.ops_refill_time, rate.ops_one_time_burst),
    ] {
        if size > 0 && refill == 0 {
            return Err(bad(
                field,
                &format!("{what}_refill_time: expected milliseconds, with {what}_size"),
            ));
        }
        if size == 0 && (refill > 0 || burst > 0) {
            return Err(bad(
                field,
                &format!("{what}_size: expected it with {what}_refill_time and {what}_one_time_burst"),
            ));
        }
    }
    Ok(())
}

fn unique<'a>(field: &'static str, ids: impl Iterator<Item = &'a Id>) -> Result<(), Error> {
    let mut seen: Vec<&Id> = Vec::new();
    for id in ids {
        if seen.contains(&id) {
            return Err(bad(field, &format!("id: '{id}' is given twice")));
        }
        seen.push(id);
    }
    Ok(())
}

fn bad(field: &'static str, expected: &str) -> Error {
    Error::Config {
        field,
        expected: expected.to_owned(),
    }
}

impl Id {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty() || text.len() > limits::ID_BYTES || !text.chars().all(plain) {
            return Err(BadName {
                expected: "1 to 32 letters, digits, '-', '_' or '.'",
                got: text.chars().take(60).collect(),
            });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Id {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Mac {
    /// An address of these bytes, if one interface can have it: not a group's, and not zero.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let group = bytes[0] & 1 == 1;
        (!group && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// The bytes.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// A locally administered address that is always the same for one id: FNV-1a of it.
    fn made_of(id: &str) -> Self {
        let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = hash.to_le_bytes();
        Self([0x02, a, b, c, d, e])
    }
}

impl FromStr for Mac {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let bad = || BadName {
            expected: "an interface's address as 02:00:00:00:00:01",
            got: text.chars().take(60).collect(),
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let hex = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let part = parts.next().filter(hex).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None => Self::new(bytes).ok_or_else(bad),
            Some(_) => Err(bad()),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str, id: Option<&str>) -> DiskConfig {
        DiskConfig {
            path: path.into(),
            id: id.map(|id| id.parse().unwrap()),
            ..DiskConfig::default()
        }
    }

    fn net(tap: &str) -> NetConfig {
        NetConfig {
            tap: Some(tap.to_owned()),
            ..NetConfig::default()
        }
    }

    fn line(devices: Devices) -> String {
        devices.complete().unwrap_err().to_string()
    }

    #[test]
    fn a_device_without_an_id_is_called_by_its_number() {
        let devices = Devices {
            disk: vec![disk("a", Some("rootfs")), disk("b", None)],
            net: vec![net("tap0")],
            ..Devices::default()
        };
        let devices = devices.complete().unwrap();
        assert_eq!(devices.disk[1].id.as_ref().map(Id::to_string), Some("1".to_owned()));
        assert_eq!(devices.net[0].id.as_ref().map(Id::as_str), Some("0"));
        let mac = devices.net[0].mac().bytes();
        assert_eq!((mac[0], devices.net[0].mac()), (0x02, devices.net[0].mac()));
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_line_that_names_the_device() {
        let disks = |disk: Vec<DiskConfig>| Devices {
            disk,
            ..Devices::default()
        };
        let nets = |net: Vec<NetConfig>| Devices {
            net,
            ..Devices::default()
        };
        assert_eq!(
            line(disks(vec![disk("", None)])),
            "disk: path: expected the disk's file, for disk/0"
        );
        assert_eq!(
            line(disks(vec![disk("a", Some("x")), disk("b", Some("x"))])),
            "disk: id: 'x' is given twice"
        );
        // The second disk's number is what the first is called.
        assert_eq!(
            line(disks(vec![disk("a", Some("1")), disk("b", None)])),
            "disk: id: '1' is given twice"
        );
        assert_eq!(
            line(nets(vec![NetConfig::default()])),
            "net: expected tap=NAME or fd=N, for net/0"
        );
        assert_eq!(
            line(nets(vec![net("a/b")])),
            "net: tap: expected the name of an interface, got 'a/b', for net/0"
        );
        assert_eq!(
            line(nets(vec![NetConfig {
                mtu: Some(67),
                ..net("t")
            }])),
            "net: mtu: expected 68 to 65535, for net/0"
        );
        assert_eq!(
            line(Devices {
                vsock: Some(VsockConfig {
                    cid: 2,
                    socket: "s".into()
                }),
                ..Devices::default()
            }),
            "vsock: cid: expected 3 to 4294967294, got 2"
        );
        let rate = RateLimit {
            bw_size: 1,
            ..RateLimit::default()
        };
        assert_eq!(
            line(disks(vec![DiskConfig {
                rate_limit: Some(rate),
                ..disk("a", None)
            }])),
            "disk: bw_refill_time: expected milliseconds, with bw_size"
        );
        let many = (0..=limits::VIRTIO_DEVICES).map(|_| disk("a", None)).collect();
        assert_eq!(line(disks(many)), "devices: expected at most 32 virtio devices, got 33");
    }

    #[test]
    fn an_id_or_address_that_is_none_is_refused() {
        assert_eq!(
            "a/b".parse::<Id>().unwrap_err().to_string(),
            "expected 1 to 32 letters, digits, '-', '_' or '.', got 'a/b'"
        );
        for text in ["", " ", "ä", &"x".repeat(33)] {
            assert!(text.parse::<Id>().is_err(), "{text}");
        }
        assert_eq!(
            "02:00:00:00:00:0A".parse::<Mac>().unwrap().to_string(),
            "02:00:00:00:00:0a"
        );
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }
}
