//! The generation of a guest: 16 random bytes that change whenever the guest may have become two.
//!
//! A guest that is restored from a snapshot goes on with the random numbers, addresses and locks it had when it was saved,
//! as may another restored from the same one. Linux mixes a new generation into its entropy pool as soon as it is notified;
//! other systems give up cached tickets and half-finished transactions ("Virtual Machine Generation ID", Microsoft).
//!
//! The bytes lie in guest memory, where ACPI tells the guest to look, and an interrupt of an ACPI event device tells it that they
//! changed. The tables are the machine's; this is the page's owner.
//!
//! # When it changes
//!
//! | | generation |
//! |---|---|
//! | restored from a snapshot, taken over after a failure | new: [`renew`](Generation::renew) before it runs |
//! | moved as planned | the same: there is still only one |
//! | reset | the same, put into its place again |
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | behaviour and, since it is so short, the saved layout |

mod device;

pub use device::{Generation, Wiring};

/// Bytes of a generation.
pub const BYTES: usize = 16;

/// The bytes begin at a multiple of this, in memory that the guest does not use for anything else.
pub const ALIGNMENT: u64 = 8;

/// The value of the ACPI notification by which a guest learns of a new generation.
pub const NOTIFICATION: u8 = 0x80;
