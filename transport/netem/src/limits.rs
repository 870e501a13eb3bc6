//! Bounds. A relay between strangers must not become the thing that runs out of memory.

use core::time::Duration;
use umbra_units::Bytes;

/// Steps of one script; a longer one is a program and belongs in a test.
pub const SCRIPT_STEPS_MAX: usize = 1_024;

/// Longest span a weather or a script may name. A day of delay is a typing mistake.
pub const SPAN_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Client addresses a relay serves at once; the one silent for longest gives way to a new one. A client that binds a
/// new port on each attempt to reconnect uses them up at that pace.
pub const CLIENTS_MAX: usize = 64;

/// What a relay holds in its delay lines before it drops: 200 ms at 10 Gbit/s.
pub const HELD_MAX: Bytes = Bytes::mib(256);

/// The largest UDP payload there is.
pub const DATAGRAM_MAX: usize = 65_535;
