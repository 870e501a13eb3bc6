//! One host: the loops that join any guest, the core and the link.
//!
//! This is the library to embed. A VMM that implements [`Guest`](umbra_core::guest::Guest) for its machine and
//! [`GuestBuilder`](umbra_core::guest::GuestBuilder) for building its twin gets a standing shadow, planned switchovers
//! and all the transport beneath, without giving up its own process, API or threads. The `toy` example does it around a
//! guest that is nothing but an array of pages.
//!
//! ```text
//!   commands ──▶ ┌────────────┐  plans   ┌─────────────┐ batches ┌──────┐        ┌──────┐ batches ┌───────────┐
//!                │ source     ├─────────▶│ encoders    ├────────▶│      │  QUIC  │      ├────────▶│ twin hand │
//!   events   ◀── │ task       │          └─────────────┘         │ link │◀══════▶│ link │         └─────┬─────┘
//!                │ (Source)   │  steps   ┌─────────────┐         │      │ paths  │      │  messages     │ answers
//!                │            ├─────────▶│ guest hand  │         │      │        │      │◀────────┐     ▼
//!                └─────┬──────┘          └─────────────┘         └──┬───┘        └──────┘     ┌───┴─────────┐
//!                      └────────────── messages ───────────────────┘                         │ shadow task │
//!                                                                                             └─────────────┘
//! ```
//!
//! Beside the sessions stands [`snapshot`]: the same guests, kept in files.
//!
//! A *task* is an async loop around one sans-IO state machine; a *hand* is a thread that does what blocks or computes.
//! This crate reads the only clock in the product ([`Clock`]). It cannot reach `vmm/machine`.
#![forbid(unsafe_code)]

mod clock;
mod encode;
mod error;
mod hands;
mod link;
pub mod shadow;
pub mod snapshot;
pub mod source;

pub use clock::Clock;
pub use encode::{EncodeConfig, EncodeStatus};
pub use error::{CommandError, StartError, SwitchoverError};
pub use shadow::{ShadowHandle, ShadowNode, ShadowNodeStatus, TakenOver};
pub use source::{GuestIdentity, ProtectConfig, Protection, ProtectionStatus};
