//! The pure half of the test kernel: what it is asked to do, what a page that proves itself looks like, which page is
//! written next; and what its drivers know that does not depend on a machine: virtqueues, frames, a disk that proves
//! itself.
//!
//! Nothing here touches a port, a clock or a fixed address, so it is tested on any host
//! (`cargo test --manifest-path resources/guest/Cargo.toml`), and an outside observer can link it to check a
//! memory dump against the same rules the guest checks itself by: start at [`proof::Root`].

#![cfg_attr(not(test), no_std)]

pub mod config;
pub mod disk;
pub mod frame;
pub mod latency;
pub mod pattern;
pub mod proof;
pub mod ring;
