//! The saved layout of a console, behind the transport's.
//!
//! Version 1: columns and rows, 16 bits each, then the waiting keys as a length-prefixed byte string.

use umbra_units::{Malformed, Reader, Writer};

use super::device::Console;
use crate::limits::CONSOLE_INPUT_BYTES;

pub(super) const VERSION: u32 = 1;

pub(super) fn write(console: &Console, w: &mut Writer) {
    let ((columns, rows), waiting) = console.parts();
    w.u16(columns)
        .u16(rows)
        .bytes(&waiting.iter().copied().collect::<Vec<_>>());
}

pub(super) fn read(console: &mut Console, r: &mut Reader<'_>) -> Result<(), Malformed> {
    let size = (r.u16("columns")?, r.u16("rows")?);
    let waiting = r.bytes_within(CONSOLE_INPUT_BYTES, "waiting keys")?;
    console.take_up(size, waiting.iter().copied().collect());
    Ok(())
}
