//! What a network card is connected to, and what it says over it.

/// The host's end of the wire: a TAP, or a test.
///
/// A frame is a `virtio_net_hdr` of [`HEADER_BYTES`](super::HEADER_BYTES) and an Ethernet frame behind it, in one
/// buffer. Nothing here waits: it is called with the device locked.
pub trait Tap: Send + Sync {
    /// Send one frame. Frames leave in the order in which they are taken.
    fn send(&self, frame: &[u8]) -> Sent;

    /// The next frame that came, put into `frame`, and its length; `None` when there is none. `frame` has room for the
    /// largest there can be.
    fn receive(&self, frame: &mut [u8]) -> Option<usize>;

    /// Whether a frame that waits to be received is worth waking anybody for. A wire is born listening.
    fn listen(&self, yes: bool);

    /// What the guest takes undone from the host: [`Tap::receive`] may from now on yield such frames.
    fn offload(&self, offloads: Offloads);
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way, or lost on it, as frames may be.
    Taken,
    /// It was not taken: offer it again when the world calls.
    NotNow,
}

/// Work that a guest's driver is willing to take over from the host's network stack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets whose checksum is only begun.
    pub checksum: bool,
    /// TCP over IPv4 in segments larger than the wire takes.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
}
