//! The PC's keyboard controller, without a keyboard.
//!
//! It is here for its reset line: command `0xfe` is how a kernel without ACPI restarts the machine. Beside that it
//! answers what a driver asks while looking for a controller (self test, control byte, port tests), so that the probe
//! ends at once instead of timing out; no keyboard or mouse ever answers behind it.

mod device;

pub use device::{I8042, Wiring};

/// Data register: input and output buffer.
pub const DATA_PORT: u64 = 0x60;

/// Status on reading, command on writing.
pub const COMMAND_PORT: u64 = 0x64;
