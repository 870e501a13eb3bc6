//! A 16550 serial port: the guest's console.
//!
//! The registers are `vm-superio`'s model; this room adds what a moving guest needs: input that arrives while the guest
//! is paused waits, unread input travels with the guest, and restoring raises no interrupt. The last needs a word:
//! [`Line::pulse`](crate::contract::Line::pulse) returns only when the interrupt controller has the interrupt, so the
//! controller's own saved state holds it, and raising it again would give the guest one too many.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | behaviour |
//! | `state.rs` | the saved layout |

mod device;
mod state;

pub use device::{Serial, Wiring};

/// Registers of a 16550, from its base: eight byte-wide ports (PC16550D data sheet, Table II).
pub const REGISTERS: u64 = 8;

/// The first serial port of a PC, `ttyS0` to Linux.
pub const COM1_PORT: u64 = 0x3f8;

/// The interrupt of the first serial port of a PC.
pub const COM1_IRQ: u32 = 4;
