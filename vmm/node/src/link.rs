//! What the loops want to know of a link.

use std::time::Duration;

use umbra_core::predict::LinkFacts;
use umbra_paths::{LinkStats, PathState};
use umbra_units::Bandwidth;

/// The rate of all live paths together and the round trip of the quickest.
pub(crate) fn facts_of(stats: &LinkStats) -> LinkFacts {
    let live = || stats.paths.iter().filter(|path| path.state == PathState::Up);
    LinkFacts {
        rate: Bandwidth(live().map(|path| path.rate.0).sum()),
        rtt: live().map(|path| path.rtt).min().unwrap_or(Duration::ZERO),
    }
}
