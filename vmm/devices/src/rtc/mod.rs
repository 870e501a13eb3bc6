//! The PC's real-time clock and the battery-backed memory beside it.
//!
//! The guest writes a register's number to the index port and reads or writes it at the data port. The clock's registers
//! show the host's wall clock in UTC, so they need no saving and are right after any move; what the guest writes to them
//! is swallowed. All other bytes are memory and travel with the guest.

mod device;

pub use device::{Rtc, WallClock, Wiring};

/// The index port; the data port follows it.
pub const PORT: u64 = 0x70;

/// Index and data.
pub const PORTS: u64 = 2;
