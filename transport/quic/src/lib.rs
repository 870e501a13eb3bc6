//! QUIC connections for Umbra's links: quinn and nothing clever.
//!
//! A *path* is one QUIC connection from a given local address to a remote one; a *link* is the bundle of all paths to
//! one peer. What travels on which path, what is sent again and when, is decided by [`umbra_paths::Link`], which does no
//! I/O. This crate is its hands: sockets, certificates, dialling and dialling again, streams, datagrams, time. When
//! something here looks like a decision about data, it is in the wrong crate.
//!
//! # One side connects, the other accepts
//!
//! ```no_run
//! use std::sync::Arc;
//! use umbra_paths::{Class, LinkConfig, LinkEvent};
//! use umbra_quic::{ConnectConfig, Event, Identity, ListenConfig, Listener, Peers, Tuning, connect};
//!
//! # async fn accepting(ours: Arc<Identity>, theirs: Peers) -> Result<(), Box<dyn std::error::Error>> {
//! let addrs = vec!["quic:192.0.2.1:7000".parse()?, "quic:198.51.100.1:7000".parse()?];
//! let mut listener = Listener::bind(ListenConfig { addrs, identity: ours, peers: theirs, tuning: Tuning::default() })?;
//! let mut link = listener.accept().await.accept(LinkConfig::default());
//! while let Some(event) = link.recv().await {
//!     if let Event::Link(LinkEvent::Block { bytes, .. }) = event {
//!         println!("{} bytes", bytes.len());
//!     }
//! }
//! # Ok(())
//! # }
//! # async fn connecting(ours: Arc<Identity>, theirs: Peers) -> Result<(), Box<dyn std::error::Error>> {
//! let paths = vec!["quic:192.0.2.1:7000".parse()?, "quic:198.51.100.1:7000,local=198.51.100.2".parse()?];
//! let link = connect(ConnectConfig::new(paths, ours, theirs)).await?;
//! link.send_block(Class::Urgent, vec![7; 4_096]).await?;
//! link.close("done").await;
//! # Ok(())
//! # }
//! ```
//!
//! # Who may come
//!
//! Both ends prove who they are with a self-signed certificate whose fingerprint the other has pinned ([`identity`],
//! module `tls`). A connection then says which link it belongs to ([`join`]), and only then carries anything. Every
//! step has a deadline and a bound ([`limits`]).
//!
//! # Why a link ends
//!
//! Not because paths die: with none left it waits, for days if it must. It ends when one side closes it, when the peer
//! was restarted and forgot it, or when the peer breaks the rules again and again: [`Ended`].
//!
//! # The map
//!
//! | module | what it holds |
//! |---|---|
//! | [`address`] | [`PathSpec`], [`ListenSpec`], sockets |
//! | [`identity`] | [`Identity`], [`Fingerprint`], [`Peers`] |
//! | `tls` | pinned mutual TLS |
//! | `socket` | UDP with packets larger than a network's |
//! | [`tuning`] | how connections behave: congestion control, windows, MTU, silence |
//! | [`join`] | how a connection becomes a path of a link |
//! | [`mod@connect`] | the connecting side: one dialler per path, for ever |
//! | [`listen`] | the accepting side: [`Listener`], [`Incoming`] |
//! | `driver` | the one task that owns the link |
//! | [`handle`] | [`LinkHandle`], [`LinkSender`], [`LinkReceiver`] |
#![forbid(unsafe_code)]

pub mod address;
pub mod connect;
mod driver;
pub mod error;
pub mod handle;
#[cfg(test)]
mod hostile;
pub mod identity;
pub mod join;
pub mod limits;
pub mod listen;
mod socket;
mod tls;
pub mod tuning;

pub use address::{ListenSpec, PathSpec};
pub use connect::{ConnectConfig, connect};
pub use error::{ConnectError, Ended, IdentityError, PathError, Refusal, Refused, SendError};
pub use handle::{ConnectionStats, Event, LinkHandle, LinkReceiver, LinkSender, Stats};
pub use identity::{Fingerprint, Identity, Peers};
pub use join::LinkId;
pub use listen::{Incoming, Knock, ListenConfig, Listener, LiveLink};
pub use tuning::{Mtu, Tuning};
