//! Every bound on what a guest, a console client or a saved state may make a device hold.

/// Bytes a 16550 of ours keeps for the guest to read: the FIFO of the model in `vm-superio`.
pub const SERIAL_FIFO_BYTES: usize = 64;

/// Console input waiting behind the FIFO: a pasted page of text, and no more.
pub const SERIAL_INPUT_BYTES: usize = 4096;

/// Bytes of CMOS memory behind the index port, the clock's registers among them.
pub const CMOS_BYTES: usize = 128;
