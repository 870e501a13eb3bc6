//! What happens to the weather, and the compact texts for weather and scripts.
//!
//! ```text
//! weather:  rate 100mbit, delay 10ms, loss 1%/3
//! script:   at 2s blackout; at 4s return; at 5s up rate 10mbit, loss 5%
//! ```
//!
//! | setting | values |
//! |---|---|
//! | `rate` | `10mbit`, `500kbit`, `2gbit`, `unlimited` |
//! | `delay`, `jitter` | `10ms`, `250us`, `1.5s`, `0` |
//! | `loss` | `1%`, `0.01`, or `1%/3` for runs of three on average |
//! | `duplicate`, `corrupt` | a share |
//! | `reorder` | a share, or `1%/2ms` for how far back |
//! | `mtu` | bytes, or `none` |
//! | `queue` | `64k`, `1m`, bytes |
//! | `blackout`, `return` | nothing passes; it does again |
//! | `clear` | everything back to a perfect path |
//!
//! A setting and its value are separated by a space or by `=`. `up` and `down` limit a step to one direction: up is
//! from the relay's clients to its target.

use crate::limits::{SCRIPT_STEPS_MAX, SPAN_MAX};
use crate::model::{Loss, Reorder, Weather};
use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use umbra_units::{Bandwidth, Bytes, Now, Ratio};

/// Timed changes, in the order of their moments.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Script {
    steps: Vec<Step>,
}

/// What changes at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// When, from the script's start.
    pub at: Duration,
    /// In which direction; `None` is both.
    pub way: Option<Way>,
    /// What.
    pub changes: Vec<Change>,
}

/// A direction of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From the clients to the target.
    Up,
    /// From the target to the clients.
    Down,
}

impl Way {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Up, Self::Down];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

/// One setting of the weather.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Change {
    /// The bottleneck's rate.
    Rate(Option<Bandwidth>),
    /// The one-way delay.
    Delay(Duration),
    /// What is added to it at most.
    Jitter(Duration),
    /// The loss chain.
    Loss(Loss),
    /// The share that arrives twice.
    Duplicate(Ratio),
    /// The share that is overtaken; `by` stays as it is when `None`.
    Reorder {
        /// How many.
        share: Ratio,
        /// How far back.
        by: Option<Duration>,
    },
    /// The share that is damaged.
    Corrupt(Ratio),
    /// The largest packet.
    Mtu(Option<usize>),
    /// The queue before the bottleneck.
    Queue(Bytes),
    /// Whether nothing passes.
    Blackout(bool),
    /// Back to a perfect path.
    Clear,
}

impl Change {
    /// Apply this to `weather`.
    pub fn apply(self, weather: &mut Weather) {
        match self {
            Self::Rate(rate) => weather.rate = rate,
            Self::Delay(delay) => weather.delay = delay,
            Self::Jitter(jitter) => weather.jitter = jitter,
            Self::Loss(loss) => weather.loss = loss,
            Self::Duplicate(share) => weather.duplicate = share,
            Self::Reorder { share, by } => {
                weather.reorder = Reorder {
                    share,
                    by: by.unwrap_or(weather.reorder.by),
                }
            }
            Self::Corrupt(share) => weather.corrupt = share,
            Self::Mtu(mtu) => weather.mtu = mtu,
            Self::Queue(queue) => weather.queue = queue,
            Self::Blackout(blackout) => weather.blackout = blackout,
            Self::Clear => *weather = Weather::clear(),
        }
    }
}

impl Script {
    /// These steps, put in order.
    pub fn of(mut steps: Vec<Step>) -> Self {
        steps.sort_by_key(|step| step.at);
        Self { steps }
    }

    /// The steps in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

/// A script being played.
#[derive(Debug, Clone)]
pub struct Player {
    script: Script,
    next: usize,
    start: Now,
}

impl Player {
    /// Play `script`, whose zero is `start`.
    pub const fn new(script: Script, start: Now) -> Self {
        Self { script, next: 0, start }
    }

    /// When the next step is due; `None` after the last.
    pub fn poll_timeout(&self) -> Option<Now> {
        self.script.steps.get(self.next).map(|step| self.start + step.at)
    }

    /// Apply every step due by `now` to the weather of both directions; whether there was one.
    pub fn handle_time(&mut self, now: Now, up: &mut Weather, down: &mut Weather) -> bool {
        let before = self.next;
        while self.poll_timeout().is_some_and(|due| due <= now) {
            let step = &self.script.steps[self.next];
            for change in &step.changes {
                if step.way != Some(Way::Down) {
                    change.apply(up);
                }
                if step.way != Some(Way::Up) {
                    change.apply(down);
                }
            }
            self.next += 1;
        }
        self.next > before
    }
}

/// A text that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}`: expected {expected}")]
pub struct Unreadable {
    /// The part that could not be read.
    pub text: String,
    /// What should have stood there.
    pub expected: &'static str,
}

fn unreadable(text: &str, expected: &'static str) -> Unreadable {
    // A whole file pasted into an option must not come back as one error line.
    let text = text.chars().take(60).collect();
    Unreadable { text, expected }
}

const STEP: &str = "`at TIME`, then settings, as in `at 2s blackout`";
const SETTING: &str =
    "one of rate, delay, jitter, loss, duplicate, reorder, corrupt, mtu, queue, blackout, return, clear";
const SPAN: &str = "a time of at most a day, as in 2s, 500ms or 250us";
const RATE: &str = "a rate, as in 10mbit, 500kbit, 2gbit or unlimited";
const SHARE: &str = "a share, as in 1% or 0.01";
const LOSS: &str = "a share that runs of that length can make, as in 1% or 1%/3";
const SIZE: &str = "a size in bytes, as in 1500, 64k or 1m";
const MTU: &str = "a size in bytes, as in 1500, or none";
const NO_VALUE: &str = "no value after blackout, return or clear";

impl FromStr for Weather {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let mut weather = Self::clear();
        for change in changes(text)? {
            change.apply(&mut weather);
        }
        Ok(weather)
    }
}

impl FromStr for Script {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let parts: Vec<&str> = text
            .split([';', '\n'])
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .collect();
        if parts.len() > SCRIPT_STEPS_MAX {
            return Err(unreadable(text, "at most 1024 steps"));
        }
        Ok(Self::of(parts.into_iter().map(step).collect::<Result<_, _>>()?))
    }
}

fn step(text: &str) -> Result<Step, Unreadable> {
    let (at, rest) = word(text);
    if at != "at" {
        return Err(unreadable(text, STEP));
    }
    let (when, rest) = word(rest);
    let at = span(when)?;
    let (way, rest) = match word(rest) {
        ("up", rest) => (Some(Way::Up), rest),
        ("down", rest) => (Some(Way::Down), rest),
        _ => (None, rest),
    };
    let changes = changes(rest)?;
    if changes.is_empty() {
        return Err(unreadable(text, STEP));
    }
    Ok(Step { at, way, changes })
}

/// The first word and what follows it.
fn word(text: &str) -> (&str, &str) {
    let text = text.trim();
    text.split_once(|c: char| c.is_whitespace() || c == '=')
        .map_or((text, ""), |(first, rest)| (first, rest.trim()))
}

fn changes(text: &str) -> Result<Vec<Change>, Unreadable> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(change)
        .collect()
}

fn change(text: &str) -> Result<Change, Unreadable> {
    let (name, value) = word(text);
    let alone = |change| {
        if value.is_empty() {
            Ok(change)
        } else {
            Err(unreadable(text, NO_VALUE))
        }
    };
    match name {
        "rate" => rate(value).map(Change::Rate),
        "delay" => span(value).map(Change::Delay),
        "jitter" => span(value).map(Change::Jitter),
        "loss" => loss(value).map(Change::Loss),
        "duplicate" => share(value).map(Change::Duplicate),
        "reorder" => reorder(value),
        "corrupt" => share(value).map(Change::Corrupt),
        "mtu" => mtu(value).map(Change::Mtu),
        "queue" => size(value).map(|bytes| Change::Queue(Bytes(bytes))),
        "blackout" => alone(Change::Blackout(true)),
        "return" => alone(Change::Blackout(false)),
        "clear" => alone(Change::Clear),
        _ => Err(unreadable(text, SETTING)),
    }
}

fn reorder(text: &str) -> Result<Change, Unreadable> {
    let (part, by) = match text.split_once('/') {
        Some((part, by)) => (part, Some(span(by)?)),
        None => (text, None),
    };
    Ok(Change::Reorder {
        share: share(part)?,
        by,
    })
}

fn loss(text: &str) -> Result<Loss, Unreadable> {
    let Some((part, run)) = text.split_once('/') else {
        return share(text).map(Loss::random);
    };
    let run = run.trim().parse().map_err(|_| unreadable(text, LOSS))?;
    Loss::bursty(share(part)?, run).ok_or_else(|| unreadable(text, LOSS))
}

fn mtu(text: &str) -> Result<Option<usize>, Unreadable> {
    if text == "none" {
        return Ok(None);
    }
    size(text)
        .ok()
        .and_then(|bytes| usize::try_from(bytes).ok())
        .map(Some)
        .ok_or_else(|| unreadable(text, MTU))
}

fn share(text: &str) -> Result<Ratio, Unreadable> {
    let text = text.trim();
    let (number, scale) = text
        .strip_suffix('%')
        .map_or((text, 1.0), |number| (number.trim_end(), 0.01));
    number
        .parse::<f64>()
        .ok()
        .and_then(|n| Ratio::new(n * scale))
        .ok_or_else(|| unreadable(text, SHARE))
}

fn span(text: &str) -> Result<Duration, Unreadable> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let seconds = scaled(text, &units).filter(|s| *s <= SPAN_MAX.as_secs_f64());
    // Through whole microseconds, because nothing finer is ever used and 0.1 has no exact binary form.
    seconds
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .map(|d| Duration::from_micros(u64::try_from((d.as_nanos() + 500) / 1_000).unwrap_or(u64::MAX)))
        .ok_or_else(|| unreadable(text, SPAN))
}

fn rate(text: &str) -> Result<Option<Bandwidth>, Unreadable> {
    if text == "unlimited" {
        return Ok(None);
    }
    let units = [("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9), ("bit", 1.0)];
    let bits = scaled(text, &units).filter(|bits| (8.0..=1e15).contains(bits));
    bits.map(|bits| Some(Bandwidth(whole(bits / 8.0))))
        .ok_or_else(|| unreadable(text, RATE))
}

fn size(text: &str) -> Result<u64, Unreadable> {
    let units = [("k", 1024.0), ("m", 1_048_576.0), ("", 1.0)];
    let bytes = scaled(text, &units).filter(|bytes| (1.0..=1e12).contains(bytes));
    bytes.map(whole).ok_or_else(|| unreadable(text, SIZE))
}

/// A non-negative number followed by one of these units.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let (number, scale) = units
        .iter()
        .find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, scale)))?;
    let plain = !number.is_empty() && number.chars().all(|c| c.is_ascii_digit() || c == '.');
    plain.then(|| number.parse::<f64>().ok()).flatten().map(|n| n * scale)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the callers keep it within 0..=1e15, which a u64 holds"
)]
fn whole(number: f64) -> u64 {
    number.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weather(text: &str) -> Weather {
        text.parse().unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn a_weather_reads_as_it_is_written() {
        let read = weather(
            "rate 10mbit, delay=10ms, jitter 1.5ms, loss 1%/3, duplicate 0.1%, reorder 2%/250us, corrupt 0.5, \
             mtu 1500, queue 64k, blackout",
        );
        let written = Weather {
            rate: Some(Bandwidth::mbit(10)),
            delay: Duration::from_millis(10),
            jitter: Duration::from_micros(1_500),
            loss: Loss::bursty(Ratio::new(0.01).unwrap(), 3.0).unwrap(),
            duplicate: Ratio::new(0.001).unwrap(),
            reorder: Reorder {
                share: Ratio::new(0.02).unwrap(),
                by: Duration::from_micros(250),
            },
            corrupt: Ratio::new(0.5).unwrap(),
            mtu: Some(1_500),
            queue: Bytes::kib(64),
            blackout: true,
        };
        assert_eq!(read, written);
        assert_eq!(weather("rate 3mbit, blackout, clear"), Weather::clear());
        assert_eq!(weather(""), Weather::clear());
        assert_eq!(
            weather("rate 5mbit, rate unlimited, mtu 900, mtu none, loss 0, delay 0"),
            Weather::clear()
        );
    }

    #[test]
    fn a_script_changes_the_weather_at_its_moments() {
        let script: Script = "at 5s rate 10mbit; at 2s blackout; at 4s return, delay 1ms"
            .parse()
            .unwrap();
        let start = Now::from_us(100);
        let mut player = Player::new(script, start);
        let (mut up, mut down) = (Weather::clear(), Weather::clear());
        assert_eq!(player.poll_timeout(), Some(start + Duration::from_secs(2)));
        assert!(!player.handle_time(start + Duration::from_millis(1_999), &mut up, &mut down));
        assert!(player.handle_time(start + Duration::from_secs(2), &mut up, &mut down));
        assert!(up.blackout && down.blackout && up.rate.is_none());
        assert!(
            player.handle_time(start + Duration::from_secs(60), &mut up, &mut down),
            "two steps were missed"
        );
        assert_eq!(up, weather("rate 10mbit, delay 1ms"));
        assert_eq!(up, down);
        assert_eq!(player.poll_timeout(), None);
    }

    #[test]
    fn a_step_may_concern_one_direction() {
        let mut player = Player::new("at 0 up blackout\nat 1ms down rate 1mbit".parse().unwrap(), Now::ZERO);
        let (mut up, mut down) = (Weather::clear(), Weather::clear());
        player.handle_time(Now::from_us(1_000), &mut up, &mut down);
        assert_eq!((up, down), (weather("blackout"), weather("rate 1mbit")));
    }

    #[test]
    fn what_cannot_be_read_is_named_with_what_was_expected() {
        let weather = |text: &str| text.parse::<Weather>().unwrap_err().to_string();
        let script = |text: &str| text.parse::<Script>().unwrap_err().to_string();
        assert_eq!(
            weather("rate fast"),
            "`fast`: expected a rate, as in 10mbit, 500kbit, 2gbit or unlimited"
        );
        assert_eq!(
            weather("rate 0mbit"),
            "`0mbit`: expected a rate, as in 10mbit, 500kbit, 2gbit or unlimited"
        );
        assert_eq!(
            weather("delay 10"),
            "`10`: expected a time of at most a day, as in 2s, 500ms or 250us"
        );
        assert_eq!(
            weather("delay -1s"),
            "`-1s`: expected a time of at most a day, as in 2s, 500ms or 250us"
        );
        assert_eq!(
            weather("jitter 9999999s"),
            "`9999999s`: expected a time of at most a day, as in 2s, 500ms or 250us"
        );
        assert_eq!(weather("loss 120%"), "`120%`: expected a share, as in 1% or 0.01");
        assert_eq!(
            weather("loss 90%/2"),
            "`90%/2`: expected a share that runs of that length can make, as in 1% or 1%/3"
        );
        assert_eq!(
            weather("mtu tiny"),
            "`tiny`: expected a size in bytes, as in 1500, or none"
        );
        assert_eq!(
            weather("queue 0"),
            "`0`: expected a size in bytes, as in 1500, 64k or 1m"
        );
        assert_eq!(
            weather("blackout 3s"),
            "`blackout 3s`: expected no value after blackout, return or clear"
        );
        assert!(
            weather("fog").starts_with("`fog`: expected one of rate, delay,"),
            "{}",
            weather("fog")
        );
        assert_eq!(script("in 2s blackout"), format!("`in 2s blackout`: expected {STEP}"));
        assert_eq!(script("at 2s"), format!("`at 2s`: expected {STEP}"));
        assert_eq!(script("at noon blackout"), format!("`noon`: expected {SPAN}"));
        assert!(script(&"at 1s clear;".repeat(2_000)).ends_with("expected at most 1024 steps"));
        assert!(
            script(&"x".repeat(5_000)).len() < 200,
            "a long text does not come back whole"
        );
    }

    #[test]
    fn no_text_panics() {
        let mut rng = umbra_units::Rng::new(3);
        let words = [
            "at",
            "2s",
            "rate",
            "=",
            "1e9",
            "%",
            "/",
            ",",
            ";",
            "loss",
            "\u{e9}",
            "0.",
            ".",
            "99999999999",
            "up",
        ];
        for _ in 0..20_000 {
            let text: String = (0..rng.below(8))
                .map(|_| words[usize::try_from(rng.below(words.len() as u64)).unwrap()])
                .collect::<Vec<_>>()
                .join(if rng.chance(0.5) { " " } else { "" });
            let _ = (text.parse::<Weather>(), text.parse::<Script>());
        }
    }
}
