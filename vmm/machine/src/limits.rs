//! Every bound on what a configuration, a description from another host, or a guest may make this machine hold.

use umbra_units::Bytes;

/// Most vCPUs of one machine. The MP table has room for more; beyond this nobody has tried.
pub const CPUS: u8 = 32;

/// Least memory: below it a kernel, its page tables and the loader's data do not fit.
pub const MEMORY_LEAST: Bytes = Bytes::mib(8);

/// Most memory. The bookkeeping of it (three bits per page) then takes 96 MiB; a peer's description asks for no more.
pub const MEMORY_MOST: Bytes = Bytes::mib(1 << 20);

/// Longest kernel command line, its final zero included: Linux's `COMMAND_LINE_SIZE` on x86.
pub const CMDLINE_BYTES: usize = 2048;

/// Console bytes held back at most while output is held; what comes after is dropped and counted.
pub const HELD_OUTPUT_BYTES: usize = 1 << 20;

/// Devices a description may name.
pub const DEVICES: usize = 64;

/// Longest device name in a description.
pub const DEVICE_KIND_BYTES: usize = 64;

/// Leaves of a CPUID table: `KVM_MAX_CPUID_ENTRIES` of the kernel.
pub const CPUID_ENTRIES: usize = 256;

/// Bytes of a CPU template's file.
pub const TEMPLATE_BYTES: u64 = 64 << 10;

/// Ranges of MSRs that may be hidden: `KVM_MSR_FILTER_MAX_RANGES` of the kernel.
pub const MSR_RANGES: usize = 16;

/// MSRs of one such range: a bit each in `KVM_MSR_FILTER_MAX_BITMAP_SIZE` bytes.
pub const MSRS_OF_A_RANGE: u32 = 0x600 * 8;

/// MSRs in a vCPU's record: `KVM_MAX_MSR_ENTRIES` of kvm-bindings.
pub const MSRS: usize = 256;

/// By how much a restored guest's clocks may be off before it is warned of: what a guest's own clock discipline is troubled
/// by, and far more than reading two clocks takes.
pub const CLOCK_ERROR_NS: u64 = 1_000_000;

/// Largest XSAVE area. The architecture's largest today, with AMX, is 11 KiB.
pub const XSAVE_BYTES: usize = 64 << 10;

/// Pages cleared in KVM's dirty log by one call: 64 MiB. Each call holds the VM's MMU lock and so stops faulting vCPUs.
pub const CLEAR_PAGES: u64 = 16 << 10;

/// Least entries of a dirty ring: the kernel keeps up to 576 of them free for what a vCPU writes at once, and wants more
/// than that (`kvm_dirty_ring_get_rsvd_entries`).
pub const RING_ENTRIES_LEAST: u32 = 1 << 10;

/// Most entries of a dirty ring: `KVM_DIRTY_RING_MAX_ENTRIES` of the kernel.
pub const RING_ENTRIES_MOST: u32 = 1 << 16;

/// How often the kernel may say that it renewed no entry of a dirty ring before it is taken at its word. Each time but the
/// first a signal must have come in between.
pub const RING_RENEWALS: u32 = 1000;

/// Memory that is kept for captures to come, at most, when one is over.
pub const CAPTURE_KEPT: Bytes = Bytes::mib(256);

/// Pieces of 2 MiB that are at hand before the first capture: as much as a thousand pages.
pub const CAPTURE_WARM: usize = 2;

/// Virtio devices of one machine: each has a window of 4 KiB, an eventfd per queue and a share of ten interrupt lines.
pub const VIRTIO_DEVICES: usize = 32;

/// Longest id of a device: with its type and a slash before it, within [`DEVICE_KIND_BYTES`].
pub const ID_BYTES: usize = 32;

/// Frames of one card held back at most while output is held; then the guest's own queue fills.
pub const HELD_FRAME_BYTES: usize = 4 << 20;

/// Programs that connected to a guest's sockets and have not said which port they want. A new one ends the oldest.
pub const VSOCK_UNDECIDED: usize = 32;

/// The longest first line of such a program: `CONNECT 4294967295`, with room for the line's end.
pub const VSOCK_FIRST_LINE_BYTES: usize = 32;
