//! The saved layout of a balloon, behind the transport's.
//!
//! Version 1: target and actual size, 32 bits each; a byte that says whether the driver has left a buffer for statistics,
//! and the 16 bits of its head, zero if not. Statistics are asked for anew.

use umbra_units::{Malformed, Reader, Writer};

use super::device::Balloon;

pub(super) const VERSION: u32 = 1;

pub(super) fn write(balloon: &Balloon, w: &mut Writer) {
    let (target, actual, chain) = balloon.parts();
    w.u32(target)
        .u32(actual)
        .u8(chain.is_some().into())
        .u16(chain.map_or(0, |token| token.head()));
}

pub(super) fn read(balloon: &mut Balloon, r: &mut Reader<'_>) -> Result<(), Malformed> {
    let (target, actual) = (r.u32("target size")?, r.u32("actual size")?);
    let head = match (r.u8("statistics buffer")?, r.u16("statistics buffer's head")?) {
        (0, 0) => None,
        (1, head) => Some(head),
        _ => return Err(r.malformed("statistics buffer")),
    };
    if balloon.take_up(target, actual, head) {
        Ok(())
    } else {
        Err(r.malformed("balloon of another guest"))
    }
}
