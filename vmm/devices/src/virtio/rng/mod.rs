//! Entropy for the guest (virtio 1.2, Entropy Device).
//!
//! One queue; each chain is a buffer to be filled. The device has no state of its own and no configuration, which makes it
//! the pattern for the others. Nothing of what was handed out is kept, so a guest that is restored from its state draws
//! something else than the one that was saved.

mod device;

pub use device::{Entropy, Rng, Wiring};

/// Chains a driver may have waiting. Linux uses one.
pub const QUEUE_SIZE: u16 = 64;
