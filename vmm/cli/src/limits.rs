//! Every bound on what a client of the API, a console or a slow reader may make this process hold or wait for.

use core::time::Duration;

/// Connections to the API socket at once; more wait in the kernel's queue.
pub(crate) const API_CONNECTIONS: usize = 32;

/// Largest request body: sixty-four paths and as many peers with room to spare.
pub(crate) const REQUEST_BYTES: usize = 64 << 10;

/// Largest file of options: a thousand devices with room to spare.
pub(crate) const CONFIG_BYTES: u64 = 256 << 10;

/// Most regions of a heat map that may be asked for: 2.5 MiB of answer.
pub(crate) const HEAT_REGIONS: usize = 16_384;

/// Regions of a heat map when nobody says how many.
pub(crate) const HEAT_REGIONS_USUAL: u32 = 1_024;

/// Largest answer a client reads. A status with 64 paths is 30 KiB.
pub(crate) const ANSWER_BYTES: usize = 4 << 20;

/// Longest line of an event stream a client reads.
pub(crate) const EVENT_LINE_BYTES: usize = 256 << 10;

/// Most paths one session may be asked to have; as the transport.
pub(crate) const PATHS: usize = umbra_paths::limits::PATHS;

/// Most peers one command may allow.
pub(crate) const PEERS: usize = 64;

/// Longest name of a guest.
pub(crate) const NAME_CHARS: usize = 63;

/// Events a slow listener may be behind before it misses some, and is told how many.
pub(crate) const EVENTS_KEPT: usize = 512;

/// Console bytes kept for whoever attaches next.
pub(crate) const CONSOLE_SOCKET_RING: usize = 64 << 10;

/// Console bytes kept for a reader of standard output that is slower than the guest; what comes after is dropped and
/// counted, because a console that waits would stop the guest.
pub(crate) const CONSOLE_PIPE_RING: usize = 1 << 20;

/// How long the end of the process may wait for console bytes to be read.
pub(crate) const CONSOLE_DRAIN: Duration = Duration::from_secs(1);

/// How long the end of the process may wait for clients to read their last answers and events.
pub(crate) const API_LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a stopped process waits for a session to say goodbye.
pub(crate) const SESSION_LAST_WORDS: Duration = Duration::from_secs(2);

/// How long a stopped process waits for a snapshot to be taken back: the one batch being written.
pub(crate) const SNAPSHOT_LAST_WORDS: Duration = Duration::from_secs(2);

/// How long a process that was told to end waits for the shadow's word about a guest it has handed over.
pub(crate) const HAND_OVER_WORD: Duration = Duration::from_secs(5);

/// How long `umbra migrate` waits for that word before it says that it does not know.
pub(crate) const MIGRATE_WORD: Duration = Duration::from_secs(30);

/// Threads that encode for one guest.
pub(crate) const ENCODE_THREADS: core::ops::RangeInclusive<u8> = 1..=64;

/// Processor time that they may use, in percent of one core.
pub(crate) const ENCODE_CPU_PERCENT: core::ops::RangeInclusive<u32> = 1..=6400;
