//! The port a test kernel ends itself through.
//!
//! A write of one, two or four bytes ends the guest with that little-endian number; reads give zero. QEMU has the same
//! device at the same place (`isa-debug-exit`), though it reports `2 * code + 1`, so one kernel serves both.

mod device;

pub use device::{ExitPort, Wiring};

/// Where the port is: what QEMU's `isa-debug-exit,iobase=0xf4` made a custom of.
pub const PORT: u64 = 0xf4;

/// Four ports wide, so that a 32-bit code fits.
pub const PORTS: u64 = 4;
