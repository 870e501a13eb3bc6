//! The network between two hosts: one relay per path, each with its own weather, changed while everything runs.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use umbra_netem::{Counters, Relay, RelayConfig, Way, Weather};
use umbra_units::Bytes;

use crate::host::Shadow;
use crate::world::PATIENCE;

/// All paths to one shadow.
#[derive(Debug)]
pub struct Roads {
    relays: Vec<Relay>,
}

impl Roads {
    pub(crate) fn build(shadow: &Shadow, weather: &[Weather]) -> Result<Self> {
        let targets = shadow.listen.iter().cycle();
        let relay = |((weather, target), seed): ((&Weather, &String), u64)| -> Result<Relay> {
            let target: SocketAddr = target
                .trim_start_matches("quic:")
                .parse()
                .context("a listening address")?;
            let config = RelayConfig {
                seed,
                ..RelayConfig::to(target, *weather)
            };
            Relay::start(config).context("a relay")
        };
        let relays = weather.iter().zip(targets).zip(1..).map(relay).collect::<Result<_>>()?;
        Ok(Self { relays })
    }

    /// The paths as `umbra protect --to` has them.
    pub fn to(&self) -> Vec<String> {
        self.relays
            .iter()
            .map(|relay| format!("quic:{}", relay.addr()))
            .collect()
    }

    /// Give all paths this weather, both ways.
    pub fn all(&self, weather: Weather) {
        for relay in &self.relays {
            relay.set_weather(weather, weather);
        }
    }

    /// Cut one path, both ways; what is under way on it is lost.
    pub fn cut(&self, path: usize) {
        self.relays[path].blackout(true);
    }

    /// Mend it.
    pub fn mend(&self, path: usize) {
        self.relays[path].blackout(false);
    }

    /// Cut all paths.
    pub fn cut_all(&self) {
        (0..self.relays.len()).for_each(|path| self.cut(path));
    }

    /// Cut all paths in one direction: [`Way::Up`] leads to the shadow.
    pub fn cut_all_one_way(&self, way: Way) {
        for relay in &self.relays {
            relay.blackout_way(way, true);
        }
    }

    /// Mend all paths.
    pub fn mend_all(&self) {
        (0..self.relays.len()).for_each(|path| self.mend(path));
    }

    /// What passed on one path so far.
    pub fn counters(&self, path: usize) -> Counters {
        self.relays[path].counters()
    }

    /// Bytes delivered to the shadow so far, over all paths.
    pub fn delivered(&self) -> Bytes {
        self.relays
            .iter()
            .map(|relay| relay.counters().up.delivered_bytes)
            .sum()
    }

    /// Wait until one path has delivered this many more bytes to the shadow.
    pub fn carries(&self, path: usize, bytes: Bytes) -> Result<()> {
        let relay = &self.relays[path];
        let wanted = relay.counters().up.delivered_bytes + bytes;
        relay.wait_until_bytes(Way::Up, wanted, PATIENCE)?;
        Ok(())
    }
}
