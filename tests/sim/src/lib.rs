//! Deterministic simulation: one seed, one world.
//!
//! A seed draws everything: the guest's memory and what it writes, how many paths there are and their weather, how long
//! each step takes and whether it fails, what operators ask and which node dies. Then the real [`Source`], [`Shadow`],
//! encoder and image, over either a real pair of links or a courier that takes every liberty a link may take, live
//! through it in virtual time, in one thread, and an oracle watches every event.
//!
//! ```text
//!            draw                    everything may go wrong          everything must end well
//!  seed ───────────▶ Conditions ───────────────────────────▶ heal ───────────────────────────▶ Report
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | `conditions` | everything the seed decides before the world begins |
//! | `program`, `guest` | what the guest writes; a guest that is nothing but pages and logs |
//! | `hand`, `ends` | how a node drives the two state machines |
//! | `carrier`, `courier`, `roads` | what joins the ends |
//! | `oracle`, `tally` | the rules; how often what happened |
//! | `world`, `trace` | time, acts, the two phases; one line per event |
//! | [`dirt`], [`replay`] | what a guest wrote, recorded or made up; orders of shipping compared on it |
//!
//! A failing seed is a bug report: `cargo run -p umbra-sim --release -- --seed N` tells its story.
//!
//! [`Source`]: umbra_core::source::Source
//! [`Shadow`]: umbra_core::shadow::Shadow
#![forbid(unsafe_code)]

mod carrier;
mod conditions;
mod courier;
pub mod dirt;
mod ends;
mod guest;
mod hand;
mod oracle;
mod program;
pub mod replay;
mod roads;
mod tally;
mod trace;
mod world;

pub use program::Guests;
pub use tally::Tally;
pub use world::{Lines, Report, run};
