//! Every bound on what a peer may make this node hold. Lengths are compared with these *before* anything is allocated.

/// Longest [`StateRecord`](crate::guest::StateRecord) kind: `vcpu/255` with room to spare.
pub const RECORD_KIND_BYTES: usize = 64;

/// Largest single state record. A vCPU's XSAVE area with AMX is 11 KiB; a device with full queues stays below 1 MiB.
pub const RECORD_BYTES: usize = 4 << 20;

/// Most state records of one guest: 255 vCPUs and as many devices.
pub const RECORDS: usize = 1024;

/// Longest error or reason text that travels to the other side.
pub const TEXT_BYTES: usize = 1024;
