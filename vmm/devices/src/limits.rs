//! Every bound on what a guest, a console client or a saved state may make a device hold.

use core::time::Duration;

/// Bytes a 16550 of ours keeps for the guest to read: the FIFO of the model in `vm-superio`.
pub const SERIAL_FIFO_BYTES: usize = 64;

/// Console input waiting behind the FIFO: a pasted page of text, and no more.
pub const SERIAL_INPUT_BYTES: usize = 4096;

/// Bytes of CMOS memory behind the index port, the clock's registers among them.
pub const CMOS_BYTES: usize = 128;

/// Queues one virtio device may have.
pub const VIRTIO_QUEUES: usize = 64;

/// Pieces of guest memory in one chain, indirect ones included. A driver keeps to the size of its queue (virtio 1.2, The
/// Virtqueue Descriptor Table), which is at most this with every device here.
pub const CHAIN_SEGMENTS: usize = 1024;

/// Chains a device takes in one call, so that whoever calls can look up in between: a driver may refill its queue as fast as it
/// is emptied.
pub const CHAINS_PER_CALL: u32 = 128;

/// Random bytes put into one chain: Linux asks for tens. A driver that asks for more gets this much, which the device may do (virtio
/// 1.2, Entropy Device, Device Operation), so that a call's worth of chains is made in a millisecond or two.
pub const RNG_BYTES_PER_CHAIN: usize = 4096;

/// Bytes of data in one disk request. Drivers ask for a few MiB at most; a request of gigabytes would hold up the pause that waits for it.
pub const BLK_REQUEST_BYTES: u64 = 64 << 20;

/// Sectors in one request to discard: 1 GiB, of which only the file's map is changed.
pub const BLK_DISCARD_SECTORS: u32 = 1 << 21;

/// Sectors in one request to write zeros: 64 MiB, which a file system without holes must write.
pub const BLK_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// Connections of one socket device, both directions together.
pub const VSOCK_CONNECTIONS: usize = 512;

/// Pieces of news a socket device hears at once.
pub const VSOCK_NEWS: usize = 64;

/// Frames a network card moves in one call, in each direction: neither is to wait for an end of the other.
pub const NET_FRAMES_PER_CALL: usize = 64;

/// Buffers a network card puts one frame into. With [`NET_FRAMES_PER_CALL`] chains for the other direction these are in one call's
/// [`CHAINS_PER_CALL`], so that a frame's turn comes. A frame of 64 KiB takes 44 of Linux's smallest buffers.
pub const NET_BUFFERS_PER_FRAME: usize = 64;

/// Bytes of one connection from the guest that wait for the program to take them. Firecracker's figure.
pub const VSOCK_BUFFER_BYTES: u32 = 64 << 10;

/// The greatest payload of one packet: `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of Linux.
pub const VSOCK_PACKET_BYTES: usize = 64 << 10;

/// Packets to the guest in one call.
pub const VSOCK_PACKETS_PER_CALL: usize = 64;

/// Resets waiting for buffers of the guest. With so many, nothing more is taken from it.
pub const VSOCK_RESETS: usize = 256;

/// How long a program waits for the guest to take its connection.
pub const VSOCK_ANSWER: Duration = Duration::from_secs(10);

/// Pages one chain of a balloon may name; what is beyond is left as it is. Linux names 256.
pub const BALLOON_PFNS_PER_CHAIN: usize = 4096;

/// Statistics that are known, and read from one chain.
pub const BALLOON_STATISTICS: usize = 16;

/// Keys waiting for a guest's buffers: a pasted page of text, and no more.
pub const CONSOLE_INPUT_BYTES: usize = 4096;

/// Text taken from one chain of a console. Linux puts 32 KiB into one at most.
pub const CONSOLE_BYTES_PER_CHAIN: usize = 256 << 10;
