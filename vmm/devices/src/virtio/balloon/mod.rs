//! A memory balloon (virtio 1.2, Traditional Memory Balloon Device): memory that the guest does not use, given back to its host.
//!
//! ```text
//!   queue 0  inflate     pages the guest gave up, because it was asked to
//!   queue 1  deflate     pages it takes back
//!   queue 2  statistics  what the guest knows of its memory, when asked
//!   queue 3  reporting   pages that are free just now, without being asked
//! ```
//!
//! The queues behind the second exist only with their feature, and a driver that does without one counts on (Linux does): see
//! `Roles`.
//!
//! # A discarded page is a write of zeros
//!
//! Memory that is discarded reads as zeros afterwards, here; the shadow of the guest still holds what was there before. So
//! [`MemoryAdvice::discard`] must count as a write: the page is harvested, found to be zero, and travels as a single bit. That
//! is what "need not travel" means; it keeps source and shadow equal, and a page that the guest takes into use again is
//! dirty by KVM's own account.
//!
//! Any page the driver names may be discarded, also one that is in use: a driver that lies about that harms its own guest.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | behaviour |
//! | `state.rs` | the saved layout |

mod device;
mod state;

pub use device::{Balloon, Counts, MemoryAdvice, Statistics, Wiring};

/// Chains of each queue.
pub const QUEUE_SIZE: u16 = 128;

/// The queue of pages given up.
pub const INFLATE: u16 = 0;

/// The queue of pages taken back.
pub const DEFLATE: u16 = 1;

#[cfg(test)]
mod tests;
