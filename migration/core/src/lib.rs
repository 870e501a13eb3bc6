//! One source and one shadow, without I/O.
//!
//! A *source* is the node where a guest runs; a *shadow* holds its standing replica. This crate decides everything that
//! passes between the two: which pages are owed, how they are encoded, when the guest may stop, who may run it. It never
//! reads a clock, opens a socket or starts a thread; time, chance and messages come in as arguments, so that the whole
//! protocol runs in a simulator for thousands of seeds before it meets a hypervisor.
//!
//! | module | answers |
//! |---|---|
//! | [`guest`] | what must a VMM offer? The plugin boundary |
//! | [`phase`] | what can a source and a shadow be doing, and what follows what? |
//! | [`ledger`] | what does the shadow not have yet? |
//! | [`heat`], [`order`] | how often is a page written, and which ships next? |
//! | [`page`], [`batch`], [`pack`] | how do pages travel? |
//! | [`choose`] | how is a batch compressed, if at all? |
//! | [`digest`] | are two memories equal? |
//! | [`source`], [`shadow`] | the two state machines |
//! | [`convergence`], [`pace`] | will the debt ever be small enough, and how often is it looked at? |
//! | [`predict`], [`report`] | how long will the pause be, and where did it go? |
//! | [`wire`] | what do the two say to each other? |
//! | [`snapshot`] | what is a guest kept in files? |
//! | [`event`], [`error`] | what happened, and whose fault was it? |
//! | [`limits`] | how much may a peer make us hold? |
//!
//! A page's way through these modules is told in `docs/tour.md`.
#![forbid(unsafe_code)]

mod audit;
pub mod batch;
pub mod choose;
pub mod convergence;
pub mod digest;
pub mod error;
pub mod event;
pub mod guest;
pub mod heat;
pub mod ledger;
pub mod limits;
pub mod order;
pub mod pace;
pub mod pack;
pub mod page;
pub mod phase;
pub mod predict;
pub mod report;
pub mod shadow;
pub mod snapshot;
pub mod source;
pub mod wire;
