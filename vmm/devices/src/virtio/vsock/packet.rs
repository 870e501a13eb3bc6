//! The header of a packet: `struct virtio_vsock_hdr` (virtio 1.2, Socket Device, Device Operation).

use umbra_units::{Malformed, Reader, Writer};

pub(super) const HEADER_BYTES: usize = 44;

pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RST: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const RW: u16 = 5;
pub(super) const CREDIT_UPDATE: u16 = 6;
pub(super) const CREDIT_REQUEST: u16 = 7;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// The sender of a `SHUTDOWN` will receive no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// The sender of a `SHUTDOWN` will send no more.
pub(super) const NO_SEND: u32 = 2;

/// Who talks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) from_cid: u64,
    pub(super) to_cid: u64,
    pub(super) from_port: u32,
    pub(super) to_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes of this connection that the sender can hold.
    pub(super) room: u32,
    /// Bytes of this connection that the sender has passed on, modulo 2³².
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        Ok(Self {
            from_cid: r.u64("source CID")?,
            to_cid: r.u64("destination CID")?,
            from_port: r.u32("source port")?,
            to_port: r.u32("destination port")?,
            len: r.u32("length")?,
            kind: r.u16("type")?,
            op: r.u16("operation")?,
            flags: r.u32("flags")?,
            room: r.u32("buffer space")?,
            forwarded: r.u32("bytes passed on")?,
        })
    }

    pub(super) fn write(&self) -> Vec<u8> {
        let mut w = Writer::with_capacity(HEADER_BYTES);
        w.u64(self.from_cid)
            .u64(self.to_cid)
            .u32(self.from_port)
            .u32(self.to_port)
            .u32(self.len)
            .u16(self.kind)
            .u16(self.op)
            .u32(self.flags)
            .u32(self.room)
            .u32(self.forwarded);
        w.into_bytes()
    }
}
