//! Weather with a name. The profiles that promises and benchmarks refer to, so that "on the WAN profile" means one thing.

use crate::model::{Loss, Weather};
use crate::script::{Change, Script, Step};
use core::time::Duration;
use umbra_units::{Bandwidth, Ratio};

/// A named set of paths. Both directions of a path have the same weather: the delay here is half of the round trip.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// What it is called.
    pub name: &'static str,
    /// The weather of each path.
    pub paths: Vec<Weather>,
    /// What happens to each path afterwards; as many as there are paths, most of them empty.
    pub scripts: Vec<Script>,
}

impl Profile {
    /// Every profile's name, for help texts and error messages.
    pub const NAMES: [&'static str; 4] = ["loopback", "metro", "wan", "wan-cut"];

    /// The profile of this name.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "loopback" => Some(Self::calm("loopback", vec![Weather::clear()])),
            "metro" => Some(Self::calm(
                "metro",
                vec![path(100, 10, 0.001, 1.0), path(100, 15, 0.001, 1.0)],
            )),
            "wan" => Some(Self::wan()),
            "wan-cut" => Some(Self::wan_cut(Duration::from_secs(1))),
            _ => None,
        }
    }

    /// Three unequal paths: 100, 50 and 20 Mbit/s; 20, 60 and 120 ms round trip; 0.1, 1 and 3 % lost in bursts of three.
    pub fn wan() -> Self {
        let paths = vec![
            path(100, 20, 0.001, 3.0),
            path(50, 60, 0.01, 3.0),
            path(20, 120, 0.03, 3.0),
        ];
        Self::calm("wan", paths)
    }

    /// The same, and the fastest path goes dark after `until`.
    pub fn wan_cut(until: Duration) -> Self {
        let mut profile = Self {
            name: "wan-cut",
            ..Self::wan()
        };
        profile.scripts[0] = Script::of(vec![Step {
            at: until,
            way: None,
            changes: vec![Change::Blackout(true)],
        }]);
        profile
    }

    fn calm(name: &'static str, paths: Vec<Weather>) -> Self {
        let scripts = vec![Script::default(); paths.len()];
        Self { name, paths, scripts }
    }
}

fn path(mbit: u64, rtt_ms: u64, lost: f64, burst: f64) -> Weather {
    let loss = Ratio::new(lost).and_then(|share| Loss::bursty(share, burst));
    Weather::link(Bandwidth::mbit(mbit), Duration::from_micros(rtt_ms * 500))
        .losing(loss.expect("the profiles name small shares and short bursts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_its_profile_and_every_path_its_script() {
        for name in Profile::NAMES {
            let profile = Profile::named(name).unwrap();
            assert_eq!(profile.name, name);
            assert_eq!(profile.paths.len(), profile.scripts.len());
        }
        assert_eq!(Profile::named("sunny"), None);
    }

    #[test]
    fn the_wan_is_the_one_the_promises_name() {
        let wan = Profile::named("wan").unwrap();
        let rates: Vec<_> = wan.paths.iter().map(|p| p.rate.unwrap()).collect();
        assert_eq!(rates, [Bandwidth::mbit(100), Bandwidth::mbit(50), Bandwidth::mbit(20)]);
        let delays: Vec<_> = wan.paths.iter().map(|p| p.delay.as_millis()).collect();
        assert_eq!(delays, [10, 30, 60]);
        for (path, share) in wan.paths.iter().zip([0.001, 0.01, 0.03]) {
            assert!((path.loss.share().get() - share).abs() < 1e-9);
        }
    }
}
