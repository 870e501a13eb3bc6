//! Every bound on what a peer may make this node hold. Lengths are compared with these *before* anything is allocated.

/// Longest [`StateRecord`](crate::guest::StateRecord) kind: `vcpu/255` with room to spare.
pub const RECORD_KIND_BYTES: usize = 64;

/// Largest single state record. A vCPU's XSAVE area with AMX is 11 KiB; a device with full queues stays below 1 MiB.
pub const RECORD_BYTES: usize = 4 << 20;

/// Most state records of one guest: 255 vCPUs and as many devices.
pub const RECORDS: usize = 1024;

/// Longest error or reason text that travels to the other side.
pub const TEXT_BYTES: usize = 1024;

/// Most pages of one batch: 1 MiB of memory, so that a batch is applied in well under a millisecond.
pub const BATCH_PAGES: usize = 256;

/// Largest batch on the wire: every page raw with its entry, and the records of a cut.
pub const BATCH_BYTES: usize = BATCH_PAGES * (umbra_units::PAGE_SIZE + 32) + CLOSE_BYTES;

/// Largest set of state records in a cut: 255 vCPUs of 16 KiB and as much again for devices.
pub const CLOSE_BYTES: usize = 8 << 20;

/// Largest control message: the description of a guest and its spaces.
pub const MESSAGE_BYTES: usize = 1 << 20;

/// Most protocol versions one hello may offer.
pub const VERSIONS: usize = 16;

/// Most spaces of one guest: RAM and 254 disks.
pub const SPACES: usize = 255;

/// Most runs of present pages in one space. RAM has two; a hot-plugged machine a few dozen.
pub const SPACE_RUNS: usize = 256;

/// Most pages of one space: 16 TiB, and what a 32-bit page number on the wire can name.
pub const SPACE_PAGES: u64 = 1 << 32;

/// Most batches a source has on their way: 256 MiB of pages at 64 a batch. Their bytes are bounded by what the shadow grants.
pub const BATCHES_IN_FLIGHT: usize = 1024;

/// Most reasons a shadow gives against a switchover.
pub const REASONS: usize = 32;

/// Largest manifest of a snapshot: every space with every run of pages it may have, as text.
pub const SNAPSHOT_MANIFEST_BYTES: u64 = 4 << 20;

/// Largest state part of a snapshot: a description and the records of a cut.
pub const SNAPSHOT_STATE_BYTES: u64 = 16 << 20;

/// Largest index of a snapshot: 16 million batches, which are 16 TiB of full ones.
pub const SNAPSHOT_INDEX_BYTES: u64 = 64 << 20;

/// Most snapshots that one restore goes through: a full one and what was made from it.
pub const SNAPSHOT_CHAIN: usize = 256;

/// Longest name of a guest, and of a folder, that a manifest may hold.
pub const SNAPSHOT_NAME_BYTES: usize = 255;

/// Most regions of a heat map: a picture of 256 by 256.
pub const HEAT_REGIONS: usize = 65_536;
