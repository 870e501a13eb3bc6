//! The words Umbra's rooms share.
//!
//! A page number plus a page count is not a page number, and a time plus a time is nothing at all: the compiler says
//! so here, once, so that no other crate has to. This crate has no dependencies, does no I/O, reads no clock and rolls
//! no die; chance is a seeded [`Rng`] that somebody hands in.
//!
//! | module | words |
//! |---|---|
//! | [`memory`] | [`Pfn`], [`Gpa`], [`PageCount`], [`SpaceId`], [`PageId`], [`PageSet`] |
//! | [`size`] | [`Bytes`], [`Bandwidth`], [`Ratio`] |
//! | [`time`] | [`Now`] |
//! | [`ids`] | [`Epoch`], [`Term`], [`BatchId`], [`GuestId`], [`SessionId`], [`SnapshotId`], [`PathId`] |
//! | [`cursor`] | [`Reader`] and [`Writer`]: the only way bytes become numbers |
//! | [`rng`] | [`Rng`] |
#![forbid(unsafe_code)]

pub mod cursor;
pub mod ids;
pub mod memory;
pub mod rng;
pub mod size;
pub mod time;

pub use cursor::{Malformed, Reader, Writer};
pub use ids::{BatchId, Epoch, GuestId, PathId, SessionId, SnapshotId, Term};
pub use memory::{Gpa, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SpaceId};
pub use rng::Rng;
pub use size::{Bandwidth, Bytes, Ratio};
pub use time::Now;
