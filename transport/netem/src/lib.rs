//! Bad weather for tests and demonstrations: a seeded model of a path and a real UDP relay that obeys it.
//!
//! A path is two pipes, one per direction. A [`Pipe`] under some [`Weather`] decides the [`Fate`] of each packet: when
//! it arrives, whether twice, whether damaged, or why not at all. It reads no clock and rolls no die of its own: the
//! same seed, moments and lengths give the same fates, so the simulation and the relay share it. A [`Script`] changes
//! the weather at given moments. The [`relay`] applies both to real datagrams on loopback, without special rights, so
//! that whole processes can be put through a storm.
//!
//! It is no model of TCP, of routers or of radio: one bottleneck, one delay, one loss chain per direction, which is what
//! `docs` and benchmarks promise numbers for.
//!
//! | module | what it holds |
//! |---|---|
//! | [`model`] | [`Weather`], [`Pipe`], [`Fate`]: what happens to a packet |
//! | [`script`] | [`Script`]: what happens to the weather, and the compact texts for both |
//! | [`profile`] | weather with a name: loopback, metro, wan, wan-cut |
//! | [`relay`] | a UDP relay under a weather (feature `relay`, on by default) |
#![forbid(unsafe_code)]

pub mod limits;
pub mod model;
pub mod profile;
#[cfg(feature = "relay")]
pub mod relay;
pub mod script;

pub use model::{Arrival, Cause, Fate, Loss, Pipe, Reorder, Weather};
pub use profile::Profile;
#[cfg(feature = "relay")]
pub use relay::{Counters, Impatient, Relay, RelayConfig, RelayControl, WayCounters};
pub use script::{Change, Player, Script, Step, Unreadable, Way};
