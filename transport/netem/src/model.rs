//! What happens to a packet on its way.
//!
//! ```text
//!  send ─▶ blackout? ─▶ too big? ─▶ queue (tail drop) ─▶ serialise at the rate ─▶ loss chain ─▶ delay + jitter ─▶ arrives
//! ```
//!
//! The order matters: a packet that the weather loses has already taken its turn in the queue, as on a radio link, and
//! one that finds the queue full never moves the loss chain.
//!
//! Each kind of chance draws from its own generator. Switching duplication on therefore does not change which packets
//! are lost: two runs that differ in one setting differ in that setting only.

use core::fmt;
use core::time::Duration;
use umbra_units::{Bandwidth, Bytes, Now, Ratio, Rng};

/// What a UDP datagram carries over IPv4 on Ethernet.
const ETHERNET_PAYLOAD: usize = 1_500 - 20 - 8;

/// The state of one direction of a path. [`Weather::clear`] is a perfect one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// What the bottleneck carries; `None` is no bottleneck.
    pub rate: Option<Bandwidth>,
    /// Time on the way, one way, after the bottleneck.
    pub delay: Duration,
    /// Added to `delay`, uniform within `0..=jitter`. It never reorders: a packet waits for those before it.
    pub jitter: Duration,
    /// Which packets vanish on the way.
    pub loss: Loss,
    /// How many arrive twice.
    pub duplicate: Ratio,
    /// How many are overtaken by later ones.
    pub reorder: Reorder,
    /// How many arrive with one bit flipped.
    pub corrupt: Ratio,
    /// Largest packet (for the relay: UDP payload) that passes; larger ones vanish without a word, as in a black hole.
    pub mtu: Option<usize>,
    /// What may wait for the bottleneck; a packet that finds more than that waiting is dropped. Without a rate nothing waits.
    pub queue: Bytes,
    /// Nothing passes at all.
    pub blackout: bool,
}

impl Weather {
    /// A perfect path: everything arrives at once.
    pub const fn clear() -> Self {
        Self {
            rate: None,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: Loss::NONE,
            duplicate: Ratio::NONE,
            reorder: Reorder {
                share: Ratio::NONE,
                by: Duration::from_millis(1),
            },
            corrupt: Ratio::NONE,
            mtu: None,
            queue: Bytes::kib(256),
            blackout: false,
        }
    }

    /// A link of this rate and one-way delay that loses nothing of itself, with what home and office routers have: a
    /// queue of 50 ms at that rate (and no less than 64 KiB), and room for 1,500-byte IPv4 packets. Without that last
    /// bound an end that discovers the path's MTU would find loopback's, and two of its packets would fill the queue.
    pub fn link(rate: Bandwidth, delay: Duration) -> Self {
        let queue = Bytes((rate.0 / 20).max(Bytes::kib(64).0));
        Self {
            rate: Some(rate),
            delay,
            queue,
            mtu: Some(ETHERNET_PAYLOAD),
            ..Self::clear()
        }
    }

    /// The same with this loss.
    #[must_use]
    pub const fn losing(mut self, loss: Loss) -> Self {
        self.loss = loss;
        self
    }
}

impl Default for Weather {
    fn default() -> Self {
        Self::clear()
    }
}

/// A Gilbert-Elliott chain: two states, each with its own loss, stepped once per packet. Losses on real paths come in
/// bursts, and everything that protects against loss is fooled by assuming otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    to_bad: f64,
    to_good: f64,
    in_good: f64,
    in_bad: f64,
}

impl Loss {
    /// Nothing is lost.
    pub const NONE: Self = Self {
        to_bad: 0.0,
        to_good: 1.0,
        in_good: 0.0,
        in_bad: 0.0,
    };

    /// Each packet for itself.
    pub const fn random(share: Ratio) -> Self {
        Self {
            in_good: share.get(),
            ..Self::NONE
        }
    }

    /// `share` of the packets, in runs of `mean_burst` on average. `None` when no chain does that: a run is at least
    /// one packet long, and runs so short cannot add up to so large a share.
    pub fn bursty(share: Ratio, mean_burst: f64) -> Option<Self> {
        if share == Ratio::NONE {
            return Some(Self::NONE);
        }
        // Share lost = to_bad / (to_bad + to_good), mean run = 1 / to_good.
        let to_good = 1.0 / mean_burst;
        let to_bad = to_good * share.get() / (1.0 - share.get());
        let possible = mean_burst >= 1.0 && mean_burst.is_finite() && (0.0..=1.0).contains(&to_bad);
        possible.then_some(Self {
            to_bad,
            to_good,
            in_good: 0.0,
            in_bad: 1.0,
        })
    }

    /// The general chain: chances per packet of turning bad and good again, and of loss in either state.
    pub const fn chain(to_bad: Ratio, to_good: Ratio, in_good: Ratio, in_bad: Ratio) -> Self {
        Self {
            to_bad: to_bad.get(),
            to_good: to_good.get(),
            in_good: in_good.get(),
            in_bad: in_bad.get(),
        }
    }

    /// The share of packets lost in the long run.
    pub fn share(&self) -> Ratio {
        let turns = self.to_bad + self.to_good;
        let bad = if turns > 0.0 { self.to_bad / turns } else { 0.0 };
        Ratio::new(bad.mul_add(self.in_bad, (1.0 - bad) * self.in_good)).unwrap_or(Ratio::ALL)
    }
}

impl Default for Loss {
    fn default() -> Self {
        Self::NONE
    }
}

/// Packets held back so that later ones overtake them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reorder {
    /// How many.
    pub share: Ratio,
    /// For how long.
    pub by: Duration,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It arrives, perhaps twice.
    Arrives {
        /// The packet.
        first: Arrival,
        /// Its duplicate.
        again: Option<Arrival>,
    },
    /// It does not.
    Lost(Cause),
}

/// One arrival of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// When.
    pub at: Now,
    /// The draw that says which bit is flipped, for [`Arrival::damage`]; `None` arrives whole.
    pub damaged: Option<u64>,
}

impl Arrival {
    /// Flip the bit of `bytes` that the weather chose, if it chose one.
    pub fn damage(&self, bytes: &mut [u8]) {
        let bits = 8 * bytes.len() as u64;
        let (Some(draw), 1..) = (self.damaged, bits) else {
            return;
        };
        let bit = draw % bits;
        let byte = usize::try_from(bit / 8).expect("below the length of a slice");
        bytes[byte] ^= 1 << (bit % 8);
    }
}

/// Why a packet did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Nothing passes at the moment.
    Blackout,
    /// Larger than the path's MTU.
    TooBig,
    /// The queue before the bottleneck was full.
    QueueFull,
    /// Lost on the way.
    Loss,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blackout => "blackout",
            Self::TooBig => "too big",
            Self::QueueFull => "queue full",
            Self::Loss => "loss",
        })
    }
}

/// One direction of a path: the weather, what waits at the bottleneck, and the state of chance.
#[derive(Debug, Clone)]
pub struct Pipe {
    weather: Weather,
    /// When the bottleneck has sent everything it was given, in ns on the scale of [`Now`].
    busy_until_ns: u64,
    /// What integer division left over of the last packet's time, in ns × bytes per second: always below the rate, so
    /// that a million packets take exactly the time their bytes take.
    left_over: u64,
    /// No packet in order arrives before this.
    last_arrival: Now,
    bad: bool,
    chance: Chance,
}

/// One generator per kind of chance.
#[derive(Debug, Clone)]
struct Chance {
    loss: Rng,
    jitter: Rng,
    duplicate: Rng,
    reorder: Rng,
    corrupt: Rng,
}

impl Pipe {
    /// A pipe in this weather, with this chance.
    pub const fn new(weather: Weather, mut rng: Rng) -> Self {
        let chance = Chance {
            loss: rng.fork(),
            jitter: rng.fork(),
            duplicate: rng.fork(),
            reorder: rng.fork(),
            corrupt: rng.fork(),
        };
        Self {
            weather,
            busy_until_ns: 0,
            left_over: 0,
            last_arrival: Now::ZERO,
            bad: false,
            chance,
        }
    }

    /// The weather now.
    pub const fn weather(&self) -> &Weather {
        &self.weather
    }

    /// Change the weather. Packets whose fate is known keep it; what still waits at the bottleneck goes on at the new
    /// rate as far as later packets are concerned.
    pub fn set_weather(&mut self, now: Now, weather: Weather) {
        let waiting = self.waiting(now);
        self.left_over = 0;
        self.weather = weather;
        let drain_ns = weather.rate.map_or(0, |rate| serialise_ns(waiting.0, rate, 0).0);
        self.busy_until_ns = ns(now).saturating_add(drain_ns);
    }

    /// What waits at the bottleneck.
    pub fn waiting(&self, now: Now) -> Bytes {
        let Some(rate) = self.weather.rate else {
            return Bytes::ZERO;
        };
        let span_ns = self.busy_until_ns.saturating_sub(ns(now));
        let bytes = u128::from(span_ns) * u128::from(rate.0) / 1_000_000_000;
        Bytes(u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    /// The fate of a packet of `len` bytes sent at `now`.
    pub fn send(&mut self, now: Now, len: usize) -> Fate {
        if self.weather.blackout {
            return Fate::Lost(Cause::Blackout);
        }
        if self.weather.mtu.is_some_and(|mtu| len > mtu) {
            return Fate::Lost(Cause::TooBig);
        }
        let Some(sent) = self.serialise(now, len) else {
            return Fate::Lost(Cause::QueueFull);
        };
        if self.loses() {
            return Fate::Lost(Cause::Loss);
        }
        let first = self.arrival(sent);
        let again = self
            .chance
            .duplicate
            .chance(self.weather.duplicate.get())
            .then(|| self.arrival(sent));
        Fate::Arrives { first, again }
    }

    /// When the bottleneck has sent this packet; `None` when the queue has no room for it.
    fn serialise(&mut self, now: Now, len: usize) -> Option<Now> {
        let Some(rate) = self.weather.rate else {
            return Some(now);
        };
        let waiting = self.waiting(now);
        // A packet larger than the whole queue still passes an idle bottleneck: it goes straight into service.
        if waiting > Bytes::ZERO && waiting + Bytes::of_len(len) > self.weather.queue {
            return None;
        }
        if self.busy_until_ns <= ns(now) {
            self.busy_until_ns = ns(now);
            self.left_over = 0;
        }
        let (span_ns, left_over) = serialise_ns(len as u64, rate, self.left_over);
        self.busy_until_ns = self.busy_until_ns.saturating_add(span_ns);
        self.left_over = left_over;
        Some(Now::from_us(self.busy_until_ns.div_ceil(1_000)))
    }

    /// Step the loss chain by one packet.
    fn loses(&mut self) -> bool {
        let loss = self.weather.loss;
        let turn = if self.bad { loss.to_good } else { loss.to_bad };
        // Two draws each time, needed or not: then a changed setting does not shift the draws of all later packets.
        let turns = self.chance.loss.chance(turn);
        let draw = self.chance.loss.unit();
        self.bad ^= turns;
        draw < if self.bad { loss.in_bad } else { loss.in_good }
    }

    fn arrival(&mut self, sent: Now) -> Arrival {
        let weather = self.weather;
        let jitter = weather.jitter.mul_f64(self.chance.jitter.unit());
        let mut at = (sent + weather.delay + jitter).max(self.last_arrival);
        if self.chance.reorder.chance(weather.reorder.share.get()) {
            at = at + weather.reorder.by;
        } else {
            self.last_arrival = at;
        }
        let damaged = self
            .chance
            .corrupt
            .chance(weather.corrupt.get())
            .then(|| self.chance.corrupt.next_u64());
        Arrival { at, damaged }
    }
}

/// Nanoseconds on the scale of [`Now`].
const fn ns(now: Now) -> u64 {
    now.as_us().saturating_mul(1_000)
}

/// How long `bytes` take at `rate`, in ns, and what the division leaves over. At rate zero: for ever.
fn serialise_ns(bytes: u64, rate: Bandwidth, left_over: u64) -> (u64, u64) {
    if rate.0 == 0 {
        return (u64::MAX, 0);
    }
    let total = u128::from(bytes) * 1_000_000_000 + u128::from(left_over);
    let span = u64::try_from(total / u128::from(rate.0)).unwrap_or(u64::MAX);
    let rest = u64::try_from(total % u128::from(rate.0)).expect("a remainder is below its u64 divisor");
    (span, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: u32 = 100_000;

    fn share(value: f64) -> Ratio {
        Ratio::new(value).unwrap()
    }

    fn pipe(weather: Weather) -> Pipe {
        Pipe::new(weather, Rng::new(42))
    }

    /// The fates of `N` packets, 1 ms apart.
    fn fates(weather: Weather) -> Vec<Fate> {
        let mut pipe = pipe(weather);
        (0..u64::from(N))
            .map(|i| pipe.send(Now::from_us(1_000 * i), 1_200))
            .collect()
    }

    fn lost(fates: &[Fate]) -> Vec<bool> {
        fates.iter().map(|fate| matches!(fate, Fate::Lost(_))).collect()
    }

    fn loss_rate_and_mean_burst(lost: &[bool]) -> (f64, f64) {
        let losses = lost.iter().filter(|l| **l).count();
        let bursts = lost.windows(2).filter(|w| !w[0] && w[1]).count() + usize::from(lost[0]);
        let losses = f64::from(u32::try_from(losses).unwrap());
        (
            losses / f64::from(N),
            losses / f64::from(u32::try_from(bursts).unwrap()),
        )
    }

    fn near(got: f64, want: f64, tolerance: f64) {
        assert!(
            (got - want).abs() <= tolerance * want,
            "got {got}, wanted {want} within {tolerance}"
        );
    }

    #[test]
    fn a_clear_path_delivers_everything_at_once() {
        let whole = |i: u64| Arrival {
            at: Now::from_us(1_000 * i),
            damaged: None,
        };
        for (i, fate) in (0..).zip(fates(Weather::clear())) {
            assert_eq!(
                fate,
                Fate::Arrives {
                    first: whole(i),
                    again: None
                }
            );
        }
    }

    #[test]
    fn random_loss_loses_its_share_one_by_one() {
        let (rate, burst) = loss_rate_and_mean_burst(&lost(&fates(Weather::clear().losing(Loss::random(share(0.05))))));
        near(rate, 0.05, 0.05);
        near(burst, 1.0 / 0.95, 0.05);
    }

    #[test]
    fn bursty_loss_loses_its_share_in_runs_of_the_named_length() {
        for (rate, run) in [(0.01, 3.0), (0.03, 3.0), (0.2, 8.0)] {
            let loss = Loss::bursty(share(rate), run).unwrap();
            near(loss.share().get(), rate, 1e-9);
            let (measured, burst) = loss_rate_and_mean_burst(&lost(&fates(Weather::clear().losing(loss))));
            near(measured, rate, 0.12);
            near(burst, run, 0.12);
        }
    }

    #[test]
    fn a_burst_that_no_chain_has_is_refused() {
        assert_eq!(Loss::bursty(share(0.1), 0.5), None, "a run is at least one packet");
        assert_eq!(
            Loss::bursty(share(0.9), 2.0),
            None,
            "runs of two cannot make nine of ten"
        );
        assert_eq!(Loss::bursty(share(0.1), f64::NAN), None);
        assert_eq!(Loss::bursty(Ratio::ALL, 3.0), None, "that is a blackout");
        assert_eq!(Loss::bursty(Ratio::NONE, 3.0), Some(Loss::NONE));
    }

    #[test]
    fn the_rate_is_exact_however_odd_it_is() {
        let rate = Bandwidth(12_345_677);
        let mut pipe = pipe(Weather {
            rate: Some(rate),
            queue: Bytes::mib(1_000),
            ..Weather::clear()
        });
        let mut last = Now::ZERO;
        for _ in 0..N {
            let Fate::Arrives { first, .. } = pipe.send(Now::ZERO, 1_201) else {
                panic!("nothing is lost here")
            };
            last = first.at;
        }
        let exact_us = (u128::from(N) * 1_201 * 1_000_000).div_ceil(u128::from(rate.0));
        assert_eq!(u128::from(last.as_us()), exact_us);
    }

    #[test]
    fn the_delay_is_exact_and_jitter_only_adds_within_its_bound() {
        let delay = Duration::from_millis(10);
        let jitter = Duration::from_millis(3);
        let mut previous = Now::ZERO;
        let mut longest = Duration::ZERO;
        for (i, fate) in (0..).zip(fates(Weather {
            delay,
            jitter,
            ..Weather::clear()
        })) {
            let Fate::Arrives { first, .. } = fate else {
                panic!("nothing is lost here")
            };
            let took = first.at.since(Now::from_us(1_000 * i));
            assert!(took >= delay && took <= delay + jitter, "packet {i} took {took:?}");
            assert!(first.at >= previous, "jitter reordered packet {i}");
            previous = first.at;
            longest = longest.max(took);
        }
        assert!(longest > delay + jitter.mul_f64(0.9));
    }

    #[test]
    fn a_full_queue_drops_the_newest_and_drains_at_the_rate() {
        let rate = Bandwidth::mbit(8); // a byte per µs
        let mut pipe = pipe(Weather {
            rate: Some(rate),
            queue: Bytes(3_000),
            ..Weather::clear()
        });
        let sent: Vec<bool> = (0..5)
            .map(|_| pipe.send(Now::ZERO, 1_000) != Fate::Lost(Cause::QueueFull))
            .collect();
        assert_eq!(sent, [true, true, true, false, false]);
        assert_eq!(pipe.waiting(Now::from_us(500)), Bytes(2_500));
        assert_ne!(
            pipe.send(Now::from_us(1_000), 1_000),
            Fate::Lost(Cause::QueueFull),
            "one has left"
        );
    }

    #[test]
    fn a_packet_larger_than_the_queue_passes_when_nothing_waits() {
        let mut pipe = pipe(Weather {
            rate: Some(Bandwidth::mbit(8)),
            queue: Bytes(10),
            ..Weather::clear()
        });
        assert!(matches!(pipe.send(Now::ZERO, 9_000), Fate::Arrives { .. }));
        assert_eq!(pipe.send(Now::ZERO, 9_000), Fate::Lost(Cause::QueueFull));
    }

    #[test]
    fn a_slower_link_takes_what_waits_along() {
        let mut pipe = pipe(Weather {
            rate: Some(Bandwidth::mbit(8)),
            ..Weather::clear()
        });
        pipe.send(Now::ZERO, 10_000);
        pipe.set_weather(
            Now::ZERO,
            Weather {
                rate: Some(Bandwidth(100_000)),
                ..Weather::clear()
            },
        );
        assert_eq!(pipe.waiting(Now::ZERO), Bytes(10_000));
        let Fate::Arrives { first, .. } = pipe.send(Now::ZERO, 1_000) else {
            panic!("it fits")
        };
        assert_eq!(first.at, Now::from_us(110_000));
    }

    #[test]
    fn a_rate_of_zero_delivers_never_and_says_so_without_overflow() {
        let mut pipe = pipe(Weather {
            rate: Some(Bandwidth(0)),
            ..Weather::clear()
        });
        let Fate::Arrives { first, .. } = pipe.send(Now::from_us(5), 1) else {
            panic!("it waits")
        };
        assert!(first.at > Now::from_us(u64::MAX / 2_000));
        pipe.send(Now::NEVER, usize::MAX);
    }

    #[test]
    fn duplicates_reordering_and_damage_come_in_their_shares() {
        let weather = Weather {
            duplicate: share(0.02),
            reorder: Reorder {
                share: share(0.03),
                by: Duration::from_micros(2_500),
            },
            corrupt: share(0.04),
            ..Weather::clear()
        };
        let (mut twice, mut late, mut damaged) = (0, 0, 0);
        for (i, fate) in (0..).zip(fates(weather)) {
            let Fate::Arrives { first, again } = fate else {
                panic!("nothing is lost here")
            };
            twice += u32::from(again.is_some());
            late += u32::from(first.at > Now::from_us(1_000 * i));
            damaged += u32::from(first.damaged.is_some());
        }
        near(f64::from(twice) / f64::from(N), 0.02, 0.1);
        near(f64::from(late) / f64::from(N), 0.03, 0.1);
        near(f64::from(damaged) / f64::from(N), 0.04, 0.1);
    }

    #[test]
    fn damage_flips_one_bit() {
        let whole = [0u8; 100];
        for draw in [0, 799, 800, u64::MAX] {
            let mut bytes = whole;
            Arrival {
                at: Now::ZERO,
                damaged: Some(draw),
            }
            .damage(&mut bytes);
            assert_eq!(bytes.iter().map(|b| b.count_ones()).sum::<u32>(), 1);
        }
        Arrival {
            at: Now::ZERO,
            damaged: Some(3),
        }
        .damage(&mut []);
    }

    #[test]
    fn nothing_passes_a_blackout_and_nothing_too_big_passes_the_mtu() {
        let dark = Weather {
            blackout: true,
            ..Weather::clear()
        };
        assert!(fates(dark).iter().all(|fate| *fate == Fate::Lost(Cause::Blackout)));
        let mut narrow = pipe(Weather {
            mtu: Some(1_200),
            ..Weather::clear()
        });
        assert!(matches!(narrow.send(Now::ZERO, 1_200), Fate::Arrives { .. }));
        assert_eq!(narrow.send(Now::ZERO, 1_201), Fate::Lost(Cause::TooBig));
    }

    #[test]
    fn the_same_seed_gives_the_same_fates() {
        let weather = Weather {
            jitter: Duration::from_millis(2),
            duplicate: share(0.01),
            corrupt: share(0.01),
            ..Weather::link(Bandwidth::mbit(50), Duration::from_millis(5))
        }
        .losing(Loss::bursty(share(0.02), 3.0).unwrap());
        assert_eq!(fates(weather), fates(weather));
    }

    #[test]
    fn one_kind_of_chance_does_not_disturb_another() {
        let chain = Loss::chain(share(0.05), share(0.3), share(0.01), share(0.5));
        let losing = Weather::clear().losing(chain);
        let also = Weather {
            duplicate: share(0.5),
            corrupt: share(0.5),
            jitter: Duration::from_millis(1),
            ..losing
        };
        assert_eq!(lost(&fates(losing)), lost(&fates(also)));
    }
}
