//! The saved layout of a serial port.
//!
//! Version 1: nine registers of one byte (divisor low, divisor high, IER, IIR, LCR, LSR, MCR, MSR, SCR), then two
//! length-prefixed byte strings: the receive FIFO and the input waiting behind it.

use std::collections::VecDeque;

use umbra_units::{Malformed, Reader, Writer};
use vm_superio::serial::SerialState;

use super::device::{Serial, Wiring};
use crate::contract::{Device, RestoreError, SavedState};
use crate::limits::{SERIAL_FIFO_BYTES, SERIAL_INPUT_BYTES};

const VERSION: u32 = 1;

pub(super) fn encode(serial: &Serial) -> SavedState {
    let (state, waiting) = serial.parts();
    let mut w = Writer::new();
    w.u8(state.baud_divisor_low)
        .u8(state.baud_divisor_high)
        .u8(state.interrupt_enable)
        .u8(state.interrupt_identification)
        .u8(state.line_control)
        .u8(state.line_status)
        .u8(state.modem_control)
        .u8(state.modem_status)
        .u8(state.scratch)
        .bytes(&state.in_buffer)
        .bytes(&waiting.iter().copied().collect::<Vec<_>>());
    SavedState {
        kind: serial.kind().to_owned(),
        version: VERSION,
        bytes: w.into_bytes(),
    }
}

pub(super) fn decode(saved: &SavedState, wiring: Wiring) -> Result<Serial, RestoreError> {
    let kind = format!("serial/{}", wiring.index);
    let (state, waiting) = read(saved.expect(&kind, VERSION)?).map_err(RestoreError::malformed(&kind))?;
    Ok(Serial::with_state(wiring, &state, waiting))
}

fn read(bytes: &[u8]) -> Result<(SerialState, VecDeque<u8>), Malformed> {
    let mut r = Reader::new(bytes);
    let state = SerialState {
        baud_divisor_low: r.u8("divisor low")?,
        baud_divisor_high: r.u8("divisor high")?,
        interrupt_enable: r.u8("IER")?,
        interrupt_identification: r.u8("IIR")?,
        line_control: r.u8("LCR")?,
        line_status: r.u8("LSR")?,
        modem_control: r.u8("MCR")?,
        modem_status: r.u8("MSR")?,
        scratch: r.u8("SCR")?,
        in_buffer: r.bytes_within(SERIAL_FIFO_BYTES, "receive FIFO")?.to_vec(),
    };
    let waiting = r
        .bytes_within(SERIAL_INPUT_BYTES, "waiting input")?
        .iter()
        .copied()
        .collect();
    r.finish("end of serial state")?;
    Ok((state, waiting))
}
