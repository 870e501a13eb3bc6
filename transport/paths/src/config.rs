//! The knobs of a link. Every value is checked when it is set, so that a [`LinkConfig`] is always a working one.

use core::time::Duration;

use thiserror::Error;
use umbra_units::{Bandwidth, Ratio};

use crate::limits;

/// How a link behaves; [`Default`] suits everything from loopback to a lossy transatlantic line.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkConfig {
    pub(crate) heartbeat: Duration,
    pub(crate) held_bytes: usize,
    pub(crate) path_floor_bytes: usize,
    pub(crate) initial_rate: Bandwidth,
    pub(crate) residual: Ratio,
    pub(crate) survive_paths: u8,
    pub(crate) reinject: Ratio,
}

/// A value outside what works, with what would.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field}: {expected} expected, got {got}")]
pub struct BadConfig {
    /// Which knob.
    pub field: &'static str,
    /// What it takes.
    pub expected: &'static str,
    /// What it was given.
    pub got: String,
}

fn check(ok: bool, field: &'static str, expected: &'static str, got: impl ToString) -> Result<(), BadConfig> {
    if ok {
        Ok(())
    } else {
        Err(BadConfig {
            field,
            expected,
            got: got.to_string(),
        })
    }
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            held_bytes: 128 << 20,
            path_floor_bytes: 128 << 10,
            initial_rate: Bandwidth::mbit(20),
            residual: Ratio::new(1e-3).expect("a share of a whole"),
            survive_paths: 0,
            reinject: Ratio::new(0.05).expect("a share of a whole"),
        }
    }
}

impl LinkConfig {
    /// How often an idle path is probed. Silence is noticed after a few of these.
    pub fn with_heartbeat(mut self, heartbeat: Duration) -> Result<Self, BadConfig> {
        let ok = (Duration::from_millis(1)..=Duration::from_secs(10)).contains(&heartbeat);
        check(ok, "heartbeat", "1 ms to 10 s", format_args!("{heartbeat:?}"))?;
        self.heartbeat = heartbeat;
        Ok(self)
    }

    /// Most block bytes held until the peer acknowledges them; `send_block` refuses beyond.
    pub fn with_held_bytes(mut self, held_bytes: usize) -> Result<Self, BadConfig> {
        let ok = (limits::BLOCK_BYTES..=(16 << 30)).contains(&held_bytes);
        check(ok, "held_bytes", "8 MiB to 16 GiB", held_bytes)?;
        self.held_bytes = held_bytes;
        Ok(self)
    }

    /// What a path may hold unacknowledged even if it seems slow: below a few blocks, streams cannot follow each other.
    pub fn with_path_floor_bytes(mut self, path_floor_bytes: usize) -> Result<Self, BadConfig> {
        let ok = ((16 << 10)..=limits::BLOCK_BYTES).contains(&path_floor_bytes);
        check(ok, "path_floor_bytes", "16 KiB to 8 MiB", path_floor_bytes)?;
        self.path_floor_bytes = path_floor_bytes;
        Ok(self)
    }

    /// What a path is believed to carry before anything was measured.
    pub fn with_initial_rate(mut self, initial_rate: Bandwidth) -> Result<Self, BadConfig> {
        check(
            initial_rate.0 >= 1_000,
            "initial_rate",
            "at least 1000 bytes per second",
            initial_rate.0,
        )?;
        self.initial_rate = initial_rate;
        Ok(self)
    }

    /// How often an urgent block may need a repair round after all its shards went out.
    pub fn with_residual(mut self, residual: Ratio) -> Result<Self, BadConfig> {
        let ok = (1e-9..=0.5).contains(&residual.get());
        check(ok, "residual", "0.000000001 to 0.5", residual.get())?;
        self.residual = residual;
        Ok(self)
    }

    /// How many paths may die under an urgent block without any repair round (as long as more paths than that are up).
    /// Costs `survive / (paths − survive)` of the block's bytes in parity.
    pub fn with_survive_paths(mut self, survive_paths: u8) -> Result<Self, BadConfig> {
        check(survive_paths <= 8, "survive_paths", "0 to 8", survive_paths)?;
        self.survive_paths = survive_paths;
        Ok(self)
    }

    /// Share of bulk bytes that may be sent twice to keep a lagging path from holding up the end.
    pub fn with_reinject(mut self, reinject: Ratio) -> Result<Self, BadConfig> {
        check(reinject.get() <= 0.5, "reinject", "0 to 0.5", reinject.get())?;
        self.reinject = reinject;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_value_is_named_with_what_would_do() {
        let error = LinkConfig::default().with_heartbeat(Duration::ZERO).unwrap_err();
        assert_eq!(error.to_string(), "heartbeat: 1 ms to 10 s expected, got 0ns");
        assert!(LinkConfig::default().with_held_bytes(1).is_err());
        assert!(LinkConfig::default().with_path_floor_bytes(1).is_err());
        assert!(LinkConfig::default().with_initial_rate(Bandwidth(0)).is_err());
        assert!(LinkConfig::default().with_residual(Ratio::NONE).is_err());
        assert!(LinkConfig::default().with_survive_paths(9).is_err());
        assert!(LinkConfig::default().with_reinject(Ratio::ALL).is_err());
    }
}
