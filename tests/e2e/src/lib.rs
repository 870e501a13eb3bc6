//! End-to-end tests, and the harness they are told with: real `umbra` processes, real KVM guests, real QUIC, and relays
//! that give every path its weather.
//!
//! ```no_run
//! use umbra_e2e::{Guest, Move, Weather, story};
//!
//! // A guest that rewrites 20 MB each second moves over three paths, and nobody but the clock notices.
//! story(|world| {
//!     let (here, there) = (world.host("here")?, world.host("there")?);
//!     let mut vm = here.launch(&Guest::dirty("20M", "counter"))?;
//!     let shadow = there.shadow_for(&here)?;
//!     let roads = world.roads(&shadow, &[Weather::clear(); 3])?;
//!     vm.protect(&shadow, &roads)?;
//!     let (mut vm, report) = vm.migrate_to(shadow, &Move::verified())?;
//!     vm.beats_on(500)?;
//!     assert!(report.audited());
//!     Ok(())
//! });
//! ```
//!
//! # How it waits
//!
//! On what happens, never for time to pass: a line of a process's event stream, a byte of the guest's console, the end
//! of a process, a counter of a relay. Whatever is observed is noted down with its moment by a thread of its own
//! ([`Recording`], [`Events`]) and wakes whoever waits ([`World::wait`]). A wait that takes [`PATIENCE`] fails, and a
//! story that fails prints everything that every process said.
//!
//! # What the guest proves
//!
//! The tiny kernel of `resources/guest` checks all of its memory as it goes and counts on its console. [`Console`] reads
//! that across processes: every beat must be the successor of the one before, wherever it was heard, and the guest's
//! own count must agree with ours. So a beat lost, a beat said twice, or two copies running at once cannot stay unseen.
//!
//! | module | what |
//! |---|---|
//! | [`world`] | one story's folder, hosts and evidence |
//! | [`host`] | a host: an identity, and the processes started on it |
//! | [`vm`], [`guest`] | a guest that runs, and what it is to do |
//! | [`linux`], [`lan`] | a guest that is a Linux, and a network for it |
//! | [`process`] | a child process, observed; [`events`] and [`console`] read what it says |
//! | [`roads`] | the network between two hosts |
//! | [`api`] | a very small HTTP client |
//!
//! # Where the programs come from
//!
//! `UMBRA_BIN` and `UMBRA_GUEST`, or else the release build of this workspace. `cargo xtask test` builds both and sets
//! both. Without `/dev/kvm` every story fails, unless `UMBRA_SKIP_KVM=1` says that this is known.
#![forbid(unsafe_code)]

pub mod api;
pub mod console;
pub mod events;
pub mod guest;
pub mod host;
pub mod lan;
pub mod linux;
pub mod process;
pub mod roads;
pub mod vm;
pub mod world;

pub use api::Answer;
pub use console::{Console, Recording};
pub use events::{Event, Events, named, phase};
pub use guest::Guest;
pub use host::{Host, Shadow};
pub use process::{Process, Signal};
pub use roads::Roads;
pub use umbra_netem::{Loss, Weather};
pub use vm::{Move, Report, Vm};
pub use world::{PATIENCE, World, story};
