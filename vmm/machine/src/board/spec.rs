//! What a guest can see of its virtio devices: what every host it moves to must offer it again.
//!
//! In the machine's description, after the devices' names: a `u32` count, and per device its type `u8` and its properties,
//! all integers little-endian, ids as length-prefixed texts. There is nothing of a host in it, no path and no interface.
//!
//! | type | properties |
//! |---|---|
//! | 1 rng | |
//! | 2 disk | id, sectors `u64`, block `u32`, physical block `u32`, read-only `u8`, discard `u8`, write zeroes `u8` |
//! | 3 net | id, MAC 6 bytes, MTU `u16` (0: not told) |
//! | 4 vsock | |
//! | 5 balloon | target at power-on in pages `u32`, deflate on OOM `u8`, free page reporting `u8` |
//! | 6 console | |

use umbra_devices::virtio::block::Geometry;
use umbra_units::{Malformed, Reader, Writer};

use crate::config::devices::{Id, Mac};
use crate::limits;

/// One virtio device, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Spec {
    Rng,
    Disk {
        id: Id,
        geometry: Geometry,
    },
    Net {
        id: Id,
        mac: [u8; 6],
        mtu: Option<u16>,
    },
    Vsock,
    Balloon {
        target: u32,
        deflate_on_oom: bool,
        reporting: bool,
    },
    Console,
}

const RNG: u8 = 1;
const DISK: u8 = 2;
const NET: u8 = 3;
const VSOCK: u8 = 4;
const BALLOON: u8 = 5;
const CONSOLE: u8 = 6;

/// Largest block a disk may have (virtio 1.2 names none; Linux takes no larger one).
const BLOCK_MOST: u32 = 64 << 10;

impl Spec {
    /// The device's name.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Rng => "rng/0".to_owned(),
            Self::Disk { id, .. } => format!("disk/{id}"),
            Self::Net { id, .. } => format!("net/{id}"),
            Self::Vsock => "vsock/0".to_owned(),
            Self::Balloon { .. } => "balloon/0".to_owned(),
            Self::Console => "console/0".to_owned(),
        }
    }

    pub(crate) fn encode(&self, w: &mut Writer) {
        match self {
            Self::Rng => {
                w.u8(RNG);
            }
            Self::Disk { id, geometry } => {
                let Geometry {
                    sectors,
                    block,
                    physical_block,
                    read_only,
                    discard,
                    write_zeroes,
                } = *geometry;
                w.u8(DISK).text(id.as_str(), limits::ID_BYTES);
                w.u64(sectors).u32(block).u32(physical_block);
                w.u8(read_only.into()).u8(discard.into()).u8(write_zeroes.into());
            }
            Self::Net { id, mac, mtu } => {
                w.u8(NET).text(id.as_str(), limits::ID_BYTES);
                w.put(mac).u16(mtu.unwrap_or(0));
            }
            Self::Vsock => {
                w.u8(VSOCK);
            }
            Self::Balloon {
                target,
                deflate_on_oom,
                reporting,
            } => {
                w.u8(BALLOON).u32(*target);
                w.u8((*deflate_on_oom).into()).u8((*reporting).into());
            }
            Self::Console => {
                w.u8(CONSOLE);
            }
        }
    }

    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        match r.u8("device type")? {
            RNG => Ok(Self::Rng),
            DISK => {
                let id = id(r)?;
                let geometry = Geometry {
                    sectors: r.u64("disk size")?,
                    block: r.u32("disk block")?,
                    physical_block: r.u32("disk block")?,
                    read_only: flag(r)?,
                    discard: flag(r)?,
                    write_zeroes: flag(r)?,
                };
                let block = |bytes: u32| bytes.is_power_of_two() && (512..=BLOCK_MOST).contains(&bytes);
                let sane = block(geometry.block)
                    && block(geometry.physical_block)
                    && geometry.physical_block >= geometry.block
                    && geometry.sectors <= u64::MAX / 512;
                if sane {
                    Ok(Self::Disk { id, geometry })
                } else {
                    Err(r.malformed("disk block"))
                }
            }
            NET => {
                let (id, mac) = (id(r)?, r.array("MAC")?);
                let mtu = Some(r.u16("MTU")?).filter(|mtu| *mtu > 0);
                if Mac::new(mac).is_some() {
                    Ok(Self::Net { id, mac, mtu })
                } else {
                    Err(r.malformed("MAC"))
                }
            }
            VSOCK => Ok(Self::Vsock),
            BALLOON => Ok(Self::Balloon {
                target: r.u32("balloon size")?,
                deflate_on_oom: flag(r)?,
                reporting: flag(r)?,
            }),
            CONSOLE => Ok(Self::Console),
            _ => Err(r.malformed("device type")),
        }
    }
}

fn id(r: &mut Reader<'_>) -> Result<Id, Malformed> {
    let text = r.text_within(limits::ID_BYTES, "device id")?;
    text.parse().map_err(|_| r.malformed("device id"))
}

fn flag(r: &mut Reader<'_>) -> Result<bool, Malformed> {
    match r.u8("flag")? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(r.malformed("flag")),
    }
}
