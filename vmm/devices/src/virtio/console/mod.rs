//! A console of one port (virtio 1.2, Console Device): what a 16550 does, a chain at a time instead of a byte.
//!
//! ```text
//!   queue 0  keys for the guest
//!   queue 1  text from the guest ──▶ Out
//! ```
//!
//! Offered are `SIZE` (the guest is told how large the terminal is, and when that changes) and `EMERG_WRITE` (a guest writes
//! single bytes before it has queues); not several ports.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | behaviour |
//! | `state.rs` | the saved layout |

mod device;
mod state;

pub use device::{Console, Wiring};

/// Chains of each queue.
pub const QUEUE_SIZE: u16 = 64;

/// The queue of keys.
pub const RECEIVE: u16 = 0;

/// The queue of text.
pub const TRANSMIT: u16 = 1;

#[cfg(test)]
mod tests;
