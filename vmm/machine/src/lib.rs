//! A KVM virtual machine that can be moved while it runs.
//!
//! This crate is the VMM proper: it boots a kernel, runs its vCPUs, and implements [`Guest`](umbra_core::guest::Guest),
//! the contract by which Umbra shadows, saves and restores it. It knows nothing of networks, nodes or sessions, and it is
//! the only crate with unsafe code: every block of it is a call to the kernel or an access to guest memory, and carries
//! its proof.
//!
//! ```text
//!              MachineConfig                    description (a record)
//!                    │ launch                          │ builder().build
//!                    ▼                                 ▼
//!     source      Paused ── resume ─▶ Running        Blank      shadow
//!                    ▲                  │              │  apply_page …
//!                    └───── pause ──────┘              │
//!     track, harvest, read_pages (running or not)      │
//!                  save ───────── records ──────────▶ restore ─▶ Paused ─ resume ─▶ Running
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`config`] | what machine to build: a value that cannot be wrong |
//! | [`machine`] | everything put together, and its life |
//! | `memory` | guest memory: mapped once, copied from and to, never referred to |
//! | `backing` | whether the host has the memory, asked before it is taken |
//! | `lazy`, `uffd` | memory that comes after the guest: faults that this process handles |
//! | `dirty` | harvesting: KVM's log joined with the VMM's own |
//! | `capture` | pages of a cut, readable while the guest runs on |
//! | `gate`, `vcpu` | stop and go; one vCPU's thread and exits |
//! | `emulate`, `fallback` | instructions that KVM's emulator does not know, on hosts that need it |
//! | `counters` | what vCPUs left the guest for |
//! | `state` | records: what travels beside memory, and in which order |
//! | [`cpu`] | what processor the guest sees, and whether another host can be it |
//! | `board`, `output` | the devices in their places; console output held and released |
//! | `backend`, `worker` | what of the host is behind a virtio device, and the threads that work for it |
//! | `boot`, `acpi`, `mptable` | kernels of three kinds, and the tables they read |
//! | [`probe`](mod@probe) | what this host's KVM can do, found by trying |
//! | `threads` | how its threads start, and who is told |
//! | `ioctls` | raw calls that kvm-ioctls lacks |
//! | [`limits`] | every bound |
//!
//! ```
//! use umbra_core::guest::Guest;
//! use umbra_machine::{ExitReason, Machine, MachineConfig, Sinks};
//! use umbra_units::Bytes;
//!
//! # if std::env::var("UMBRA_SKIP_KVM").is_ok_and(|skip| skip == "1") {
//! #     eprintln!("SKIPPED: no guest can run here");
//! #     return Ok(());
//! # }
//! # // `cargo xtask test` builds the tiny kernel and says where; `cargo xtask guest` does the former.
//! # let kernel = std::env::var("UMBRA_GUEST").unwrap_or("../../resources/guest/target/release/umbra-guest".into());
//! let config = MachineConfig::new(kernel, 2, Bytes::mib(64))?.with_cmdline("cpus=2 work=compute run=1")?;
//! let machine = Machine::launch(&config, Sinks::stdout())?;
//! machine.resume()?;
//! assert_eq!(machine.wait_exit(None), Some(ExitReason::Code(0)));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What a host may differ in
//!
//! Everything that varies between hosts is asked for: dirty-log features, XSAVE size, readable MSRs, clock flags, CPUID. A
//! twin that a host cannot be is refused when it is *built*, by the name of what is missing, long before the guest moves.

pub mod config;
pub mod cpu;
pub mod error;
pub mod limits;
pub mod machine;
pub mod probe;

mod acpi;
mod backend;
mod backing;
mod board;
mod boot;
mod capture;
mod counters;
mod dirty;
mod emulate;
mod fallback;
mod fate;
mod gate;
mod ioctls;
mod lazy;
mod memory;
mod mptable;
mod output;
mod state;
mod threads;
mod uffd;
mod vcpu;
mod worker;

pub use boot::BootFiles;
pub use capture::CaptureCounters;
pub use config::{Backing, DirtyLog, HugePages, MachineConfig, OnReset, RingEntries, Shape, Sharing};
pub use counters::{Counters, VcpuCounters};
pub use cpu::Template;
pub use dirty::VcpuWrites;
pub use dirty::choose::{DirtyLogCosts, DirtyLogReport, dirty_log_costs};
pub use error::Error;
pub use fate::ExitReason;
pub use machine::{Machine, MachineBuilder, Sinks};
pub use probe::{HostReport, Ring0, Userfaultfd, probe};
pub use state::time::{ClockReport, TscPlaced};
pub use threads::{ThreadClass, on_thread_start};
pub use umbra_devices::{FaultPlan, Out};
