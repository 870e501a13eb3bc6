//! How the next batch is compressed: by what is the bottleneck.
//!
//! Encoding and sending overlap, so a byte of a batch costs the longer of two times: what the processor needs to compress
//! it, and what the link needs for what comes out. The [`Chooser`] predicts both for every method, from what it measured on
//! this guest's batches on this host, and takes the method that costs least. So batches travel as they are where the link is
//! quicker than the processor, and the slower the link, the tighter. In the pause somebody waits for each step, and the two
//! times add up.
//!
//! ```text
//!   time per byte         none: 1 / link
//!      │ \                 lz4: max(1 / speed, ratio / link)
//!      │   \ none         zstd: likewise, slower and tighter
//!      │╌╌╌╌╌\╌╌╌╌╌ zstd's processor time
//!      │───────\──── lz4's
//!      └──────────────── link's rate
//!        zstd   lz4  none
//! ```
//!
//! What it does not use it cannot measure. So now and then one batch is a probe of another method, unless that could not
//! come near; a method that was never tried is thought of as `handbook` transport §4 found it. And a change to what needs
//! more of the processor must be worth it: two methods that cost about the same are not taken in turns.

use std::time::Duration;

use umbra_units::{Bandwidth, Bytes};

use crate::pack::{Compression, Level, Method};

/// What [`Compression::Auto`] chooses from, with speed (bytes per second of one core) and ratio as they were found on the
/// memory of a key-value store, a compiler and a page cache. What needs more of the processor stands further down.
const CANDIDATES: [(Method, f64, f64); 5] = [
    (Method::None, f64::INFINITY, 1.0),
    (Method::Lz4, 0.9e9, 0.45),
    (Method::Zstd(Level::QUICK), 0.65e9, 0.38),
    (Method::Zstd(Level::ONE), 0.55e9, 0.33),
    (Method::Zstd(Level::TIGHT), 0.25e9, 0.30),
];
/// A method is left for another that costs less than this share of it.
const WORTH_A_CHANGE: f64 = 0.9;
/// And for one that needs less of the processor if that costs no more than so much of it.
const AS_GOOD: f64 = 1.02;
/// A probe of one method comes after so many batches. 31 in 32 batches of what nothing can shrink travel as they are.
const PROBE_AFTER: u32 = 32;
/// What is predicted to cost more than so many times what the best does is not probed: its measure would have to be off
/// by as much.
const NEAR: f64 = 2.0;
/// With a fixed method: above this ratio a batch did not shrink, and the next ones are not tried.
const WORTH_COMPRESSING: f64 = 0.9;
/// One batch makes a method look no slower than so many times what it was.
const SLOWER: f64 = 3.0;
/// So little is not worth compressing: it is one packet in any case.
const LITTLE: Bytes = Bytes(512);
/// A measure is the mean over about so many bytes.
const REMEMBERED_BYTES: f64 = 4e6;

/// How batches were compressed, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PackCounts {
    /// Batches that travelled as they are.
    pub none: u64,
    /// Batches compressed by lz4.
    pub lz4: u64,
    /// Batches compressed by zstd, at any level.
    pub zstd: u64,
    /// Bytes of all batches before compression.
    pub before: Bytes,
    /// Bytes of all batches as they travelled.
    pub after: Bytes,
}

/// Chooses a method for every batch. See the [module](self).
#[derive(Debug, Clone)]
pub struct Chooser {
    wanted: Compression,
    /// `None` until anything is known of it.
    link: Option<Bandwidth>,
    /// Cores that encoding may use: threads, or less if there is a budget.
    cores: f64,
    measures: [Measure; CANDIDATES.len()],
    /// What is used unless something else is better by far.
    current: usize,
    /// Batches until the next probe; with a fixed method, until it is tried again.
    patience: u32,
    /// Which candidate is probed next.
    probe: usize,
    counts: PackCounts,
}

/// What is known of a method on this guest's batches.
#[derive(Debug, Clone, Copy)]
struct Measure {
    method: Method,
    /// Bytes per second that one thread takes in.
    speed: f64,
    /// Bytes out per byte in.
    ratio: f64,
    measured: bool,
}

impl Chooser {
    /// One that keeps to what is wanted, for an encoder that may use so many cores.
    pub fn new(wanted: Compression, cores: f64) -> Self {
        let measures = CANDIDATES.map(|(method, speed, ratio)| Measure {
            method,
            speed,
            ratio,
            measured: method == Method::None,
        });
        Self {
            wanted,
            link: None,
            cores: cores.max(0.01),
            measures,
            current: 1, // lz4, until the link's rate is known
            patience: 0,
            probe: 0,
            counts: PackCounts::default(),
        }
    }

    /// What the link carries by now.
    pub const fn link(&mut self, rate: Bandwidth) {
        self.link = if rate.0 == 0 { None } else { Some(rate) };
    }

    /// What was chosen so far, and what came of it.
    pub const fn counts(&self) -> PackCounts {
        self.counts
    }

    /// How to compress a batch of this size. `urgent` if somebody waits for it.
    pub fn choose(&mut self, body: Bytes, urgent: bool) -> Method {
        if body < LITTLE {
            return Method::None;
        }
        match self.wanted {
            Compression::Off => Method::None,
            Compression::Lz4 => self.unless_hopeless(Method::Lz4),
            Compression::Zstd(level) => self.unless_hopeless(Method::Zstd(level)),
            Compression::Auto => self.cheapest(urgent),
        }
    }

    /// A batch was given to `method`, and became so many bytes in so long a time.
    pub fn packed(&mut self, method: Method, became: Method, before: Bytes, after: Bytes, took: Duration) {
        let count = match became {
            Method::None => &mut self.counts.none,
            Method::Lz4 => &mut self.counts.lz4,
            Method::Zstd(_) => &mut self.counts.zstd,
        };
        *count += 1;
        self.counts.before += before;
        self.counts.after += after;
        if method == Method::None || before == Bytes::ZERO {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "sizes of batches")]
        let (before, after) = (before.0 as f64, after.0 as f64);
        let ratio = (after / before).min(1.0);
        if self.wanted != Compression::Auto && ratio > WORTH_COMPRESSING {
            self.patience = PROBE_AFTER - 1;
        }
        if let Some(measure) = self.measures.iter_mut().find(|measure| measure.method == method) {
            measure.learn(before, ratio, took);
        }
    }

    fn unless_hopeless(&mut self, method: Method) -> Method {
        if self.patience == 0 {
            return method;
        }
        self.patience -= 1;
        Method::None
    }

    fn cheapest(&mut self, urgent: bool) -> Method {
        let Some(link) = self.link else {
            return self.measures[self.current].method;
        };
        let cost = |measure: &Measure| measure.cost(link, self.cores, urgent);
        let costs = self.measures.each_ref().map(cost);
        let best = (0..costs.len()).min_by(|a, b| costs[*a].total_cmp(&costs[*b]));
        let best = best.expect("there are candidates");
        if urgent {
            // Nothing is tried out and no habit is kept while somebody waits.
            return self.measures[best].method;
        }
        // What needs more of the processor must be better by far, what needs less only as good.
        let cheaper = (0..self.current).find(|n| costs[*n] <= costs[self.current] * AS_GOOD);
        if costs[best] < costs[self.current] * WORTH_A_CHANGE {
            self.current = best;
        } else if let Some(cheaper) = cheaper {
            self.current = cheaper;
        }
        self.patience = self.patience.saturating_sub(1);
        if self.patience == 0 {
            self.patience = PROBE_AFTER;
            let near = |candidate: &usize| {
                let (n, measure) = (*candidate, &self.measures[*candidate]);
                // One that was never measured may be better than it is thought to be.
                let far = if measure.measured { NEAR } else { 2.0 * NEAR };
                n != self.current && measure.method != Method::None && costs[n] < costs[self.current] * far
            };
            let others = (1..=costs.len()).map(|n| (self.probe + n) % costs.len());
            if let Some(probe) = others.into_iter().find(near) {
                self.probe = probe;
                return self.measures[probe].method;
            }
        }
        self.measures[self.current].method
    }
}

impl Measure {
    /// Seconds per byte of a batch.
    fn cost(&self, link: Bandwidth, cores: f64, urgent: bool) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate that was estimated")]
        let travelling = self.ratio / link.0 as f64;
        if urgent {
            1.0 / self.speed + travelling
        } else {
            (1.0 / (self.speed * cores)).max(travelling)
        }
    }

    fn learn(&mut self, bytes: f64, ratio: f64, took: Duration) {
        // Times rather than speeds: the mean of what a byte took is what the next will take. A thread that had to wait for
        // a processor says little about the method: no more than that it was slow.
        let took = (took.as_secs_f64().max(1e-9) / bytes).min(SLOWER / self.speed);
        let weight = if self.measured {
            (bytes / REMEMBERED_BYTES).min(0.5)
        } else {
            1.0
        };
        self.measured = true;
        self.speed = 1.0 / (took * weight + (1.0 - weight) / self.speed);
        self.ratio = ratio * weight + self.ratio * (1.0 - weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest's memory and a host, as far as compression goes.
    struct World {
        /// Per method, in the order of [`CANDIDATES`]: bytes per second of a core, and the ratio.
        methods: [(f64, f64); CANDIDATES.len()],
        chooser: Chooser,
    }

    const BODY: Bytes = Bytes(256 << 10);
    const TEXT: [(f64, f64); 5] = [
        (f64::INFINITY, 1.0),
        (0.9e9, 0.38),
        (0.6e9, 0.30),
        (0.5e9, 0.25),
        (0.2e9, 0.23),
    ];
    const NOISE: [(f64, f64); 5] = [(f64::INFINITY, 1.0), (6e9, 1.0), (2e9, 1.0), (1e9, 1.0), (0.5e9, 1.0)];

    impl World {
        fn new(wanted: Compression, cores: f64, methods: [(f64, f64); 5]) -> Self {
            let chooser = Chooser::new(wanted, cores);
            Self { methods, chooser }
        }

        /// Ship a batch; the method it was given to.
        fn ship(&mut self, urgent: bool) -> Method {
            let method = self.chooser.choose(BODY, urgent);
            let at = CANDIDATES.iter().position(|(candidate, ..)| *candidate == method);
            let (speed, ratio) = self.methods[at.unwrap()];
            let took = Duration::from_secs_f64(BODY.0 as f64 / speed);
            let after = Bytes::kib((0..256).filter(|kib| f64::from(*kib) < 256.0 * ratio).count() as u64);
            let became = if ratio < 1.0 { method } else { Method::None };
            self.chooser.packed(method, became, BODY, after, took);
            method
        }

        fn ship_some(&mut self, batches: usize) {
            for _ in 0..batches {
                self.ship(false);
            }
        }

        /// What most of the next batches are given to, and how many are not.
        fn settles_on(&mut self) -> (Method, usize) {
            self.ship_some(200);
            let methods: Vec<Method> = (0..320).map(|_| self.ship(false)).collect();
            let count = |method: Method| methods.iter().filter(|other| **other == method).count();
            let most = methods.iter().copied().max_by_key(|method| count(*method)).unwrap();
            (most, methods.len() - count(most))
        }
    }

    fn auto(link: Bandwidth, cores: f64, methods: [(f64, f64); 5]) -> (Method, usize) {
        let mut world = World::new(Compression::Auto, cores, methods);
        world.chooser.link(link);
        world.settles_on()
    }

    #[test]
    fn the_slower_the_link_the_tighter_and_a_quick_one_takes_pages_as_they_are() {
        let settled = [50, 200, 1_000, 4_000, 40_000].map(|mbit| auto(Bandwidth::mbit(mbit), 1.0, TEXT).0);
        assert_eq!(settled[0], Method::Zstd(Level::TIGHT));
        assert_eq!(settled[2], Method::Zstd(Level::ONE));
        assert_eq!(settled[3], Method::Lz4);
        assert_eq!(settled[4], Method::None);
    }

    #[test]
    fn more_cores_make_tighter_methods_worth_it_and_fewer_make_none() {
        let link = Bandwidth::mbit(4_000);
        assert_eq!(auto(link, 0.5, TEXT).0, Method::None);
        assert_eq!(auto(link, 1.0, TEXT).0, Method::Lz4);
        assert!(matches!(auto(link, 4.0, TEXT).0, Method::Zstd(_)));
    }

    #[test]
    fn what_nothing_shrinks_is_hardly_ever_tried() {
        for wanted in [Compression::Auto, Compression::Lz4, Compression::Zstd(Level::ONE)] {
            let mut world = World::new(wanted, 1.0, NOISE);
            world.chooser.link(Bandwidth::mbit(1_000));
            let (method, others) = world.settles_on();
            assert_eq!(method, Method::None, "{wanted}");
            assert!((1..=20).contains(&others), "{others} of 320 for {wanted}");
        }
    }

    #[test]
    fn a_guest_whose_memory_changes_is_found_out() {
        let mut world = World::new(Compression::Auto, 1.0, NOISE);
        world.chooser.link(Bandwidth::mbit(1_000));
        assert_eq!(world.settles_on().0, Method::None);
        world.methods = TEXT;
        world.ship_some(600);
        assert_ne!(world.settles_on().0, Method::None);
        world.methods = NOISE;
        world.ship_some(600);
        assert_eq!(world.settles_on().0, Method::None);
    }

    #[test]
    fn two_methods_that_cost_the_same_are_not_taken_in_turns() {
        let mut world = World::new(Compression::Auto, 1.0, TEXT);
        world.chooser.link(Bandwidth::mbit(1_000));
        world.settles_on();
        let mut changes = 0;
        let mut last = None;
        for n in 0..2_000u64 {
            // A link that is a tenth quicker or slower each time, about where two methods meet.
            world
                .chooser
                .link(Bandwidth::mbit(if n % 2 == 0 { 3_250 } else { 3_450 }));
            world.ship(false);
            let current = Some(world.chooser.current);
            changes += usize::from(last.is_some() && last != current);
            last = current;
        }
        assert!(changes <= 2, "{changes}");
    }

    #[test]
    fn in_the_pause_nothing_is_tried_out_and_both_times_count() {
        let mut world = World::new(Compression::Auto, 4.0, TEXT);
        world.chooser.link(Bandwidth::mbit(2_000));
        assert!(matches!(world.settles_on().0, Method::Zstd(_)));
        let methods: Vec<Method> = (0..100).map(|_| world.ship(true)).collect();
        assert!(methods.iter().all(|method| *method == methods[0]), "{methods:?}");
        world.chooser.link(Bandwidth::mbit(8_000));
        assert_eq!(world.ship(true), Method::None, "1 ns as it is, 1.1 and 0.4 by lz4");
    }

    #[test]
    fn one_batch_that_waited_for_a_processor_changes_nothing() {
        let mut world = World::new(Compression::Auto, 1.0, TEXT);
        world.chooser.link(Bandwidth::mbit(1_000));
        let settled = world.settles_on();
        let zstd = Method::Zstd(Level::ONE);
        world
            .chooser
            .packed(zstd, zstd, BODY, Bytes(BODY.0 / 4), Duration::from_millis(500));
        assert_eq!(world.settles_on().0, settled.0);
    }

    #[test]
    fn little_is_not_compressed_and_everything_is_counted() {
        let mut chooser = Chooser::new(Compression::Lz4, 1.0);
        assert_eq!(chooser.choose(Bytes(100), false), Method::None);
        assert_eq!(chooser.choose(BODY, false), Method::Lz4);
        let took = Duration::from_millis(1);
        chooser.packed(Method::Lz4, Method::Lz4, Bytes(1_000), Bytes(300), took);
        chooser.packed(Method::Lz4, Method::None, Bytes(1_000), Bytes(1_000), took);
        let zstd = Method::Zstd(Level::ONE);
        chooser.packed(zstd, zstd, Bytes(1_000), Bytes(200), took);
        let expected = PackCounts {
            none: 1,
            lz4: 1,
            zstd: 1,
            before: Bytes(3_000),
            after: Bytes(1_500),
        };
        assert_eq!(chooser.counts(), expected);
    }

    #[test]
    fn off_is_off_and_before_the_link_is_known_it_is_lz4() {
        let mut off = World::new(Compression::Off, 1.0, TEXT);
        assert_eq!(off.settles_on(), (Method::None, 0));
        let mut auto = World::new(Compression::Auto, 1.0, TEXT);
        assert_eq!(auto.settles_on(), (Method::Lz4, 0));
    }
}
