//! Device models: registers, interrupts and saved state, and nothing of the host.
//!
//! A device here is a plain value. It knows no KVM, starts no thread, waits for nothing and opens nothing: what it does
//! to the world (a byte on a console, an interrupt, the end of the guest) goes through a small trait that somebody
//! hands in. So a device can be tested by calling it, and moved by saving it and building another from what was saved.
//!
//! ```text
//!        bus (ports, MMIO)                      injected effects
//!   ─── read/write ───▶  Device  ─── Out::put ───────▶ console
//!                          │     ─── Line::pulse ────▶ interrupt
//!                          │     ─── Ending::end ────▶ the guest is over
//!             save ▼       ▲ restore (a constructor)
//!                      SavedState { kind, version, bytes }
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`contract`] | what every device promises: [`Device`], [`Restore`], [`SavedState`] |
//! | [`bus`] | which device answers at an address |
//! | [`serial`] | a 16550 serial port |
//! | [`acpi_pm`] | ACPI's fixed hardware: power button, power-off, reset |
//! | [`exit`] | the port a test kernel ends itself through |
//! | [`i8042`] | the keyboard controller, for its reset line |
//! | [`rtc`] | the CMOS clock and its memory |
//! | [`virtio`] | virtio devices: transport over MMIO, queues, and the devices themselves |
//! | [`vmgenid`] | the generation of a guest, for those that restore it twice |
//! | [`fault`] | a device that makes saving or restoring fail, for tests of everything above |
//! | [`limits`] | every bound |
#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod bus;
pub mod contract;
pub mod exit;
pub mod fault;
pub mod i8042;
pub mod limits;
pub mod rtc;
pub mod serial;
pub mod virtio;
pub mod vmgenid;

pub use acpi_pm::AcpiPm;
pub use bus::{Bus, BusError, Span};
pub use contract::{Device, End, Ending, Level, Line, Out, Restore, RestoreError, SaveError, SavedState};
pub use exit::ExitPort;
pub use fault::{FaultDevice, FaultPlan};
pub use i8042::I8042;
pub use rtc::{Rtc, WallClock};
pub use serial::Serial;
