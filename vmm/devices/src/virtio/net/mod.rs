//! A network card (virtio 1.2, Network Device).
//!
//! ```text
//!   queue 0  frames to the guest   ◀── Tap::receive
//!   queue 1  frames from the guest ──▶ Tap::send
//!   queue 2  control: the guest acknowledges that it announced itself
//! ```
//!
//! # No frame is dropped here
//!
//! Frames for the guest wait in the TAP until the driver offers buffers; at most one waits in the card, because its length is
//! known only once it was taken. Frames from the guest wait in its queue while the world does not take them or the rate
//! limit is reached; again at most one is in the card. Both travel with the guest. What *is* dropped is a frame that fits into no
//! buffer of the driver's, and counted.
//!
//! # Who tells the network that a guest has moved
//!
//! Switches learn where a station is from the frames it sends, and a guest that only listens sends none. So a card that
//! was restored speaks for it as soon as it runs: [`announce`] makes frames in the name of the guest's address, five rounds
//! of them at growing intervals, because the first may be lost while a port comes up. Where the driver can
//! (`VIRTIO_NET_F_GUEST_ANNOUNCE`) it is asked to announce its IP addresses and VLANs too, which only it knows.
//!
//! # Features
//!
//! | bit | offered | what |
//! |---|---|---|
//! | `MAC`, `STATUS`, `CTRL_VQ`, `GUEST_ANNOUNCE`, `MRG_RXBUF` | always | |
//! | `MTU` | when the wiring has one | |
//! | `CSUM`, `GUEST_CSUM`, `HOST_TSO4`, `HOST_TSO6`, `GUEST_TSO4`, `GUEST_TSO6` | unless offloads are off | |
//!
//! Not offered: several queue pairs, receive filters, UFO and USO, RSS, changing offloads or the address at run time. A
//! control command of those is answered with an error.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | behaviour |
//! | `wire.rs` | the host's end, as a trait |
//! | [`announce`] | what is sent in the guest's name after a move, and when |
//! | `state.rs` | the saved layout |

pub mod announce;
mod device;
mod state;
mod wire;

pub use device::{Counts, Net, Wiring};
pub use wire::{Offloads, Sent, Tap};

/// Bytes of `struct virtio_net_hdr_v1`, which is before every frame (virtio 1.2, Packet Transmission).
pub const HEADER_BYTES: usize = 12;

/// The longest frame with its header: an IP packet of 64 KiB less one byte, an Ethernet header with a VLAN tag, and ours.
pub const FRAME_BYTES: usize = 65_535 + 18 + HEADER_BYTES;

/// The shortest: an Ethernet header, and ours.
pub const FRAME_LEAST: usize = 14 + HEADER_BYTES;

/// Chains of the receive and of the transmit queue.
pub const QUEUE_SIZE: u16 = 256;

/// Chains of the control queue.
pub const CONTROL_SIZE: u16 = 64;

/// The queue of frames to the guest.
pub const RECEIVE: u16 = 0;

/// The queue of frames from the guest.
pub const TRANSMIT: u16 = 1;

/// The queue of commands.
pub const CONTROL: u16 = 2;

#[cfg(test)]
mod tests;
