//! ACPI's fixed hardware: the power button, the way off, and the reset register.
//!
//! As much of it as a guest needs to be powered off in good order (ACPI 6.5, 4.8): the PM1 event block, whose only event
//! is the power button; the PM1 control block, whose only sleep is *soft off*; and the reset register, at the port where
//! PC chipsets have theirs, so that kernels that write there without asking ACPI reset as well. The machine is always in
//! ACPI mode: there is no other.

mod device;

pub use device::{AcpiPm, Wiring};

/// PM1 event block: status, then enable, 16 bits each (ACPI 6.5, 4.8.3.1).
pub const EVENT_PORT: u64 = 0x600;

/// PM1 control block, 16 bits (ACPI 6.5, 4.8.3.2).
pub const CONTROL_PORT: u64 = 0x604;

/// Ports from [`EVENT_PORT`] on.
pub const PORTS: u64 = 6;

/// The reset register: the reset control register of PC chipsets (Intel ICH, `RST_CNT`).
pub const RESET_PORT: u64 = 0xcf9;

/// What resets when it is written there: the system, by the processor's line.
pub const RESET_VALUE: u8 = 0x06;

/// The system control interrupt: level-triggered, active high.
pub const SCI_IRQ: u16 = 9;

/// `SLP_TYP` of soft off: what the DSDT's `\_S5` says.
pub const SLEEP_TYPE_OFF: u8 = 5;
