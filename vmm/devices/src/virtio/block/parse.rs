//! From a chain to a request.
//!
//! A request is a header of 16 bytes and data to be read by the device, then data to be written by it, and as the very last byte its
//! status. How a driver cuts that into pieces is its own business. Everything is looked at once and compared with what the
//! disk is; what does not fit is answered, with the status the specification names for it.

use umbra_units::Reader;
use virtio_bindings::virtio_blk as spec;

use super::request::{Geometry, Op};
use super::{SECTOR, SERIAL_BYTES};
use crate::limits::{BLK_DISCARD_SECTORS, BLK_REQUEST_BYTES, BLK_WRITE_ZEROES_SECTORS};
use crate::virtio::{Chain, Ram, Segments};

/// Bytes before the data.
const HEADER: usize = 16;

/// Bytes of one range to be discarded or zeroed.
const RANGE: usize = 16;

/// A request that can be answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    /// The byte for the status, which lies in guest memory.
    pub(super) status: Segments,
    /// Bytes before the status byte.
    pub(super) data_bytes: u32,
    pub(super) wish: Wish,
}

/// What the driver wants.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// To be handed to the disk.
    Disk(Op),
    /// The disk's serial number, there.
    Serial(Segments),
    /// Nothing that would have to be done.
    Nothing,
    /// Something wrong.
    Wrong(Fault),
}

/// What is wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Nobody knows such a request, or it was not negotiated.
    Unsupported,
    /// Out of bounds, in memory or on the disk.
    Invalid,
}

/// What requests are held against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) geometry: Geometry,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
    /// Writes are safe when they come back.
    pub(super) durable: bool,
}

/// Read a chain. `None` if there is not even a place for an answer.
pub(super) fn parse(chain: Chain, ram: &Ram, rules: &Rules) -> Option<Parsed> {
    let (mut readable, mut data) = (chain.readable, chain.writable);
    let data_bytes = data.bytes().checked_sub(1)?;
    let mut status = data;
    data = status.take(data_bytes)?;
    if !status.is_within(ram) {
        return None;
    }
    let wish = rules.wish(&mut readable, data, ram).unwrap_or_else(Wish::Wrong);
    Some(Parsed {
        status,
        data_bytes: u32::try_from(data_bytes).ok()?,
        wish,
    })
}

impl Rules {
    fn wish(&self, readable: &mut Segments, data: Segments, ram: &Ram) -> Result<Wish, Fault> {
        let mut header = [0; HEADER];
        readable.read(ram, &mut header).map_err(|_| Fault::Invalid)?;
        let mut r = Reader::new(&header);
        let kind = r.u32("type").map_err(|_| Fault::Invalid)?;
        let sector = r.array("reserved").and_then(|_: [u8; 4]| r.u64("sector"));
        let sector = sector.map_err(|_| Fault::Invalid)?;
        let fills = matches!(kind, spec::VIRTIO_BLK_T_IN | spec::VIRTIO_BLK_T_GET_ID);
        if !fills && !data.is_empty() {
            return Err(Fault::Invalid);
        }
        match kind {
            spec::VIRTIO_BLK_T_IN => self.transfer(sector, data, ram, |at, to| Op::Read { at, to }),
            spec::VIRTIO_BLK_T_OUT => {
                let durable = self.durable;
                self.writable()?;
                self.transfer(sector, std::mem::take(readable), ram, |at, from| Op::Write {
                    at,
                    from,
                    durable,
                })
            }
            spec::VIRTIO_BLK_T_FLUSH => Ok(Wish::Disk(Op::Flush)),
            spec::VIRTIO_BLK_T_GET_ID if data.bytes() >= SERIAL_BYTES as u64 && data.is_within(ram) => {
                Ok(Wish::Serial(data))
            }
            spec::VIRTIO_BLK_T_GET_ID => Err(Fault::Invalid),
            spec::VIRTIO_BLK_T_DISCARD if self.discard => {
                self.range(readable, ram, BLK_DISCARD_SECTORS, |at, bytes, flags| match flags {
                    0 => Ok(Op::Discard { at, bytes }),
                    _ => Err(Fault::Unsupported),
                })
            }
            spec::VIRTIO_BLK_T_WRITE_ZEROES if self.write_zeroes => {
                self.range(readable, ram, BLK_WRITE_ZEROES_SECTORS, |at, bytes, flags| {
                    Ok(Op::WriteZeroes {
                        at,
                        bytes,
                        unmap: match flags {
                            0 => false,
                            spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => true,
                            _ => return Err(Fault::Unsupported),
                        },
                        durable: self.durable,
                    })
                })
            }
            _ => Err(Fault::Unsupported),
        }
    }

    fn transfer(
        &self,
        sector: u64,
        data: Segments,
        ram: &Ram,
        op: impl FnOnce(u64, Segments) -> Op,
    ) -> Result<Wish, Fault> {
        let bytes = data.bytes();
        if !bytes.is_multiple_of(SECTOR) || bytes > BLK_REQUEST_BYTES || !data.is_within(ram) {
            return Err(Fault::Invalid);
        }
        let at = self.place(sector, bytes / SECTOR)?;
        Ok(if bytes == 0 {
            Wish::Nothing
        } else {
            Wish::Disk(op(at, data))
        })
    }

    /// One range, of at most `most` sectors: the configuration says that there is one, and how long it may be.
    fn range(
        &self,
        readable: &mut Segments,
        ram: &Ram,
        most: u32,
        op: impl FnOnce(u64, u64, u32) -> Result<Op, Fault>,
    ) -> Result<Wish, Fault> {
        self.writable()?;
        let mut range = [0; RANGE];
        if readable.bytes() != RANGE as u64 {
            return Err(Fault::Invalid);
        }
        readable.read(ram, &mut range).map_err(|_| Fault::Invalid)?;
        let mut r = Reader::new(&range);
        let numbers = r
            .u64("sector")
            .and_then(|sector| Ok((sector, r.u32("sectors")?, r.u32("flags")?)));
        let (sector, sectors, flags) = numbers.map_err(|_| Fault::Invalid)?;
        if sectors > most {
            return Err(Fault::Invalid);
        }
        let at = self.place(sector, sectors.into())?;
        let op = op(at, u64::from(sectors) * SECTOR, flags)?;
        Ok(if sectors == 0 { Wish::Nothing } else { Wish::Disk(op) })
    }

    const fn writable(&self) -> Result<(), Fault> {
        if self.geometry.read_only {
            Err(Fault::Invalid)
        } else {
            Ok(())
        }
    }

    /// Where on the disk these sectors begin, if they are all there.
    fn place(&self, sector: u64, sectors: u64) -> Result<u64, Fault> {
        let end = sector.checked_add(sectors).filter(|end| *end <= self.geometry.sectors);
        end.and_then(|_| sector.checked_mul(SECTOR)).ok_or(Fault::Invalid)
    }
}
