//! Every bound on what a guest, a console client or a saved state may make a device hold.

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
