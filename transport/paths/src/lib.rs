//! Several unreliable paths as one good one, without I/O.
//!
//! A *link* is the bundle of all *paths* to one peer. Each path is one QUIC connection that somebody else runs (the
//! driver, `transport/quic`); this crate decides what travels on which of them, and keeps the promise that the paths
//! alone cannot: control messages arrive exactly once and in order, blocks exactly once, whichever path dies under
//! them. It reads no clock, rolls no die and opens no socket.
//!
//! # The idea
//!
//! Nothing is ever in *one* place only until the peer has acknowledged it. A path is a place where bytes may get lost
//! for a while; the [`Link`] keeps every message and block until the peer's own [`Link`] says that it holds them, and lays
//! them on another path when a path dies or falls silent. Acknowledgements are cumulative, carry everything the other
//! side needs to know, and are never acknowledged themselves.
//!
//! Three kinds of traffic share the paths:
//!
//! | traffic | promise | how it travels |
//! |---|---|---|
//! | messages ([`Link::send_message`]) | exactly once, in order | a high-priority stream on the best path, elsewhere when that takes too long |
//! | bulk blocks ([`Class::Bulk`]) | exactly once, any order | one stream each on the path where it arrives first; no parity |
//! | urgent blocks ([`Class::Urgent`]) | exactly once, as predictably as possible | Reed-Solomon shards over all paths, laid to end together |
//!
//! # How to drive a link
//!
//! Four kinds of method, as in `quinn-proto`: facts go in (`path_up`, `path_down`, `handle_*`), commands go in
//! (`send_*`), decisions come out (`poll_output`, `poll_event`, `poll_timeout`), getters look (`room`, `stats`). After
//! every fact and command, poll until both polls return `None`, events first: what has been taken by
//! [`Link::poll_event`] is what the next acknowledgement reports.
//!
//! ```
//! use core::time::Duration;
//! use umbra_paths::{Class, Link, LinkConfig, LinkEvent, Output, PathFacts};
//! use umbra_units::{Now, PathId};
//!
//! let (mut here, mut there) = (Link::new(LinkConfig::default()), Link::new(LinkConfig::default()));
//! let facts = PathFacts { max_datagram: 1_200, rtt: Some(Duration::from_millis(10)) };
//! here.path_up(Now::ZERO, PathId(0), facts);
//! there.path_up(Now::ZERO, PathId(0), facts);
//! here.send_block(Now::ZERO, Class::Bulk, b"pages".to_vec()).unwrap();
//!
//! let arrival = Now::from_us(5_000);
//! while let Some(output) = here.poll_output() {
//!     match output {
//!         Output::Datagram { path, bytes } => there.handle_datagram(arrival, path, bytes).unwrap(),
//!         Output::Stream { path, head, body, .. } => {
//!             there.handle_stream(arrival, path, [head, body].concat().into()).unwrap();
//!         }
//!         Output::ResetStream { .. } => {}
//!     }
//! }
//! let block = core::iter::from_fn(|| there.poll_event()).find_map(|event| match event {
//!     LinkEvent::Block { bytes, .. } => Some(bytes),
//!     _ => None,
//! });
//! assert_eq!(block.unwrap(), &b"pages"[..]);
//! ```
//!
//! # The map
//!
//! [`link`] joins the rooms and is the only one with public moves; [`frames`](mod@frames) is the wire; `control` and `bulk`
//! keep what was sent until it is acknowledged; `stripe` and `reassembly` are the two ends of an urgent block;
//! `estimator`, `predictor`, `redundancy` and `scheduler` are what the decisions are made of; [`limits`] is what a
//! hostile peer runs into.
#![forbid(unsafe_code)]

mod bulk;
pub mod config;
mod control;
pub mod error;
mod estimator;
pub mod event;
pub mod frames;
pub mod limits;
pub mod link;
mod path;
mod predictor;
mod reassembly;
mod redundancy;
mod scheduler;
pub mod stats;
mod stripe;

pub use config::{BadConfig, LinkConfig};
pub use error::{PeerMisbehaved, Refused};
pub use event::{BlockId, Class, LinkEvent, Output, PathFacts, PathSample, Priority, StreamId, Suspicion};
pub use link::Link;
pub use stats::{LinkStats, PathState, PathStats};
