//! The saved layout of a network card, behind the transport's.
//!
//! Version 1: a byte that says whether the driver still owes an announcement. Then for each direction, to the guest and from it: its
//! limiter, and a length-prefixed frame that waits, empty if there is none.

use umbra_units::{Malformed, Reader, Writer};

use super::device::Net;
use super::{FRAME_BYTES, FRAME_LEAST};

pub(super) const VERSION: u32 = 1;

pub(super) fn write(net: &Net, w: &mut Writer) {
    let (receiving, sending, announce_asked) = net.parts();
    w.u8(announce_asked.into());
    for lane in [receiving, sending] {
        lane.limiter.save(w);
        w.bytes(&lane.frame);
    }
}

pub(super) fn read(net: &mut Net, r: &mut Reader<'_>) -> Result<(), Malformed> {
    let announce_asked = match r.u8("announcement owed")? {
        0 => false,
        1 => true,
        _ => return Err(r.malformed("announcement owed")),
    };
    for lane in net.lanes() {
        lane.limiter.load(r)?;
        let frame = r.bytes_within(FRAME_BYTES, "waiting frame")?;
        if !frame.is_empty() && frame.len() < FRAME_LEAST {
            return Err(r.malformed("waiting frame"));
        }
        lane.frame = frame.to_vec();
    }
    net.arrive(announce_asked);
    Ok(())
}
