//! Everything a seed decides before the world begins, so that it can be printed first.
//!
//! Each dimension is dull as often as it is wild: an idle guest, a perfect link, a node that never fails. Busy and
//! broken worlds hide what only quiet ones show (a guest that rewrites a page hides that the page was lost).

use core::fmt;
use core::time::Duration;

use umbra_core::guest::CaptureBy;
use umbra_core::guest::Space;
use umbra_core::order::Order;
use umbra_core::shadow::ShadowConfig;
use umbra_core::source::{CutOptions, SourceConfig, SwitchoverOptions};
use umbra_units::{Bandwidth, Bytes, Now, PageCount, Pfn, Ratio, Rng, SpaceId};

use crate::carrier::End;
use crate::guest::Manners;
use crate::program::Program;
use crate::roads::RoadConditions;

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Host {
    A,
    B,
}

impl Host {
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

/// What joins the two nodes.
#[derive(Debug, Clone)]
pub(crate) enum Transport {
    /// Keeps a link's promise (messages once and in order, blocks once) and nothing more: any delay for anything.
    Courier(CourierConditions),
    /// Two real links over modelled connections.
    Roads(RoadConditions),
}

/// How the courier takes its time.
#[derive(Debug, Clone)]
pub(crate) struct CourierConditions {
    pub(crate) delay: Duration,
    pub(crate) jitter: Duration,
    /// Chance that something takes much longer.
    pub(crate) late: f64,
    /// How much longer, at most.
    pub(crate) late_by: Duration,
    pub(crate) rate: Bandwidth,
    /// Bytes of blocks under way before it asks to wait.
    pub(crate) window: usize,
    /// Until an outage is noticed, at most.
    pub(crate) notice: Duration,
}

/// How long a node takes for its steps.
#[derive(Debug, Clone)]
pub(crate) struct Speed {
    pub(crate) typical: Duration,
    /// Chance that a step takes twenty times as long.
    pub(crate) stumbles: f64,
}

/// Chances that a step fails.
#[derive(Debug, Clone, Default)]
pub(crate) struct Failures {
    pub(crate) track: f64,
    pub(crate) harvest: f64,
    pub(crate) pause: f64,
    pub(crate) save: f64,
    pub(crate) capture: f64,
    pub(crate) encode: f64,
    pub(crate) build: f64,
    pub(crate) apply: f64,
    pub(crate) restore: f64,
    pub(crate) start: f64,
}

/// A moment of a switchover that chance alone would seldom hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The source decided to stop the guest.
    Stopped,
    /// The shadow has the final epoch and could run.
    Prepared,
    /// The source gave the guest up and says go.
    GaveUp,
    /// The source took the final epoch back.
    Withdrew,
    /// The guest runs at the shadow.
    Runs,
    /// The source decided to stop the guest for a cut.
    Cutting,
    /// The pages of a cut were captured.
    Captured,
    /// The shadow committed an epoch.
    Committed,
}

impl Moment {
    const ALL: [Self; 8] = [
        Self::Stopped,
        Self::Prepared,
        Self::GaveUp,
        Self::Withdrew,
        Self::Runs,
        Self::Cutting,
        Self::Captured,
        Self::Committed,
    ];
}

/// Something that happens so long after the first moment of its kind.
#[derive(Debug, Clone)]
pub(crate) struct Ambush {
    pub(crate) moment: Moment,
    pub(crate) after: Duration,
    pub(crate) act: Act,
}

/// Something that happens at its time.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Switchover(SwitchoverOptions),
    Cancel,
    Cut(CutOptions),
    CancelCut,
    EndSource,
    EndShadow,
    /// The node dies and does not return.
    Kill(Host),
    /// The node of this end dies and does not return.
    KillEnd(End),
    /// The shadow's process dies; a new one knows nothing.
    RestartShadow,
    /// Nothing passes for so long.
    Outage(Duration),
    /// One path is dark for so long.
    Dark(usize, Duration),
    /// One path's connection breaks.
    Break(usize),
    /// An operator who knows that the other node is dead decides.
    Decide,
}

/// The conditions of one world.
#[derive(Debug, Clone)]
pub(crate) struct Conditions {
    pub(crate) seed: u64,
    pub(crate) spaces: Vec<Space>,
    /// Share of memory the guest has written before the story begins.
    pub(crate) filled: f64,
    pub(crate) program: Program,
    pub(crate) manners: Manners,
    pub(crate) transport: Transport,
    pub(crate) speeds: [Speed; 2],
    /// Whether a node encodes bulk batches beside its steps or between them.
    pub(crate) two_workers: bool,
    pub(crate) source: SourceConfig,
    pub(crate) shadow: ShadowConfig,
    pub(crate) cache: Bytes,
    pub(crate) compress: bool,
    pub(crate) audits: bool,
    pub(crate) failures: Failures,
    pub(crate) acts: Vec<(Now, Act)>,
    pub(crate) ambushes: Vec<Ambush>,
    /// When weather clears, failures stop and everything must come to its end.
    pub(crate) heals: Now,
    /// Whether the guest stops writing then, so that following must settle before the last switchover.
    pub(crate) settles: bool,
}

impl Conditions {
    /// What `seed` says.
    pub(crate) fn draw(seed: u64) -> Self {
        // Separate generators, so that a new draw in one place does not change what old seeds mean elsewhere.
        let mut root = Rng::new(seed ^ 0x0075_6d62_7261);
        let [mut memory, mut guest, mut net, mut node, mut fate, mut acts, mut ship] =
            core::array::from_fn(|_| root.fork());
        let program = Program::draw(&mut guest);
        let heals = Now::ZERO + log_uniform(&mut fate, 300_000, 4_000_000);
        let audits = fate.chance(0.25);
        let failures = Failures::draw(&mut fate);
        let transport = if net.chance(0.5) {
            Transport::Courier(CourierConditions::draw(&mut net))
        } else {
            Transport::Roads(RoadConditions::draw(&mut net))
        };
        let paths = match &transport {
            Transport::Courier(_) => 1,
            Transport::Roads(roads) => roads.paths.len(),
        };
        Self {
            seed,
            spaces: draw_spaces(&mut memory),
            filled: [0.0, 0.1, 0.5, 1.0][pick(&mut memory, 4)],
            manners: Manners {
                tear: if guest.chance(0.5) { 0.0 } else { 0.5 },
                save_writes: if guest.chance(0.5) { 0 } else { 1 + guest.below(3) },
                all_dirty_at_first: guest.chance(0.5),
                knows_untouched: guest.chance(0.5),
                forget: if audits && guest.chance(0.3) { 0.02 } else { 0.0 },
            },
            program,
            transport,
            speeds: [Speed::draw(&mut node), Speed::draw(&mut node)],
            two_workers: node.chance(0.5),
            source: SourceConfig {
                harvest_every: log_uniform(&mut node, 1_000, 60_000),
                harvest_idle: log_uniform(&mut node, 20_000, 200_000),
                batch_pages: PageCount(1 + node.below(64)),
                order: if ship.chance(0.5) {
                    Order::default()
                } else {
                    Order::ALL[pick(&mut ship, 5)]
                },
                harvest_least: [Duration::ZERO, Duration::from_millis(5)][pick(&mut ship, 2)],
                pause_promise: [0, 20, 50, 2_000].map(Duration::from_millis)[pick(&mut ship, 4)],
            },
            shadow: ShadowConfig {
                complete_at: Ratio::new(0.9 * node.unit()).expect("a share"),
                gather: log_uniform(&mut node, 100, 20_000),
                // No smaller than the largest batch: a guest that writes more than that in a round trip is never ready.
                window: [Bytes::kib(512), Bytes::mib(1), Bytes::mib(64)][pick(&mut node, 3)],
                staging: [None, Some(0), Some(3), Some(10), Some(40)][pick(&mut node, 5)]
                    .map(|pages| Bytes(pages * umbra_units::PAGE_SIZE as u64)),
            },
            cache: [Bytes::ZERO, Bytes::kib(16), Bytes::mib(64)][pick(&mut node, 3)],
            compress: node.chance(0.5),
            audits,
            failures,
            acts: draw_acts(&mut acts, heals, paths, audits),
            ambushes: draw_ambushes(&mut acts, paths),
            heals,
            settles: fate.chance(0.5),
        }
    }
}

fn draw_spaces(rng: &mut Rng) -> Vec<Space> {
    let pages = 8 + rng.below(if rng.clone().chance(0.7) { 40 } else { 192 });
    let mut ram = Space::ram(PageCount(pages));
    if rng.chance(0.3) {
        let hole = 1 + rng.below(pages / 2);
        let below = 1 + rng.below(pages - hole - 1);
        ram.present = vec![
            (Pfn(0), PageCount(below)),
            (Pfn(below + hole), PageCount(pages - hole - below)),
        ];
    }
    let mut spaces = vec![ram];
    if rng.chance(0.2) {
        let pages = PageCount(1 + rng.below(16));
        spaces.push(Space {
            id: SpaceId(1),
            pages,
            present: vec![(Pfn(0), pages)],
        });
    }
    spaces
}

fn draw_acts(rng: &mut Rng, heals: Now, paths: usize, audits: bool) -> Vec<(Now, Act)> {
    let mut acts = Vec::new();
    let mut at = |rng: &mut Rng, act: Act| acts.push((Now::from_us(rng.below(heals.as_us())), act));
    for _ in 0..rng.below(5) {
        let options = draw_switchover(rng, audits);
        at(rng, Act::Switchover(options));
    }
    if rng.chance(0.3) {
        for _ in 0..=rng.below(3) {
            at(rng, Act::Cancel);
        }
    }
    if rng.chance(0.6) {
        for _ in 0..rng.below(8) {
            let options = draw_cut(rng, audits);
            at(rng, Act::Cut(options));
        }
        if rng.chance(0.2) {
            at(rng, Act::CancelCut);
        }
    }
    if rng.chance(0.08) {
        at(rng, Act::EndSource);
    }
    if rng.chance(0.08) {
        at(rng, Act::EndShadow);
    }
    if rng.chance(0.5) {
        for _ in 0..rng.below(6) {
            let long = log_uniform(rng, 1_000, 2_000_000);
            let path = pick(rng, paths as u64);
            let act = match rng.below(4) {
                0 => Act::Outage(long),
                1 | 2 => Act::Dark(path, long),
                _ => Act::Break(path),
            };
            at(rng, act);
        }
    }
    if rng.chance(0.1) {
        let host = if rng.chance(0.5) { Host::A } else { Host::B };
        at(rng, Act::Kill(host));
        at(rng, Act::Decide);
    }
    if rng.chance(0.1) {
        at(rng, Act::RestartShadow);
        at(rng, Act::Decide);
    }
    acts.sort_by_key(|(at, _)| *at);
    acts
}

fn draw_ambushes(rng: &mut Rng, paths: usize) -> Vec<Ambush> {
    if rng.chance(0.6) {
        return Vec::new();
    }
    let ambushes = (0..=rng.below(2)).map(|_| {
        let long = log_uniform(rng, 1_000, 1_000_000);
        let act = match rng.below(11) {
            0 | 9 => Act::KillEnd(End::Source),
            10 => Act::CancelCut,
            1 => Act::KillEnd(End::Shadow),
            2 => Act::RestartShadow,
            3 | 4 => Act::Outage(long),
            5 => Act::Break(pick(rng, paths as u64)),
            6 => Act::Cancel,
            7 => Act::EndShadow,
            _ => Act::EndSource,
        };
        Ambush {
            moment: Moment::ALL[pick(rng, 8)],
            after: if rng.chance(0.5) {
                Duration::ZERO
            } else {
                log_uniform(rng, 10, 100_000)
            },
            act,
        }
    });
    ambushes.collect()
}

fn draw_switchover(rng: &mut Rng, audit: bool) -> SwitchoverOptions {
    SwitchoverOptions {
        downtime_limit: log_uniform(rng, 3_000, 10_000_000),
        timeout: log_uniform(rng, 50_000, 10_000_000),
        pause_limit: log_uniform(rng, 3_000, 5_000_000),
        audit,
    }
}

fn draw_cut(rng: &mut Rng, audit: bool) -> CutOptions {
    CutOptions {
        settle: if rng.chance(0.3) {
            Duration::ZERO
        } else {
            log_uniform(rng, 1_000, 500_000)
        },
        timeout: log_uniform(rng, 50_000, 10_000_000),
        urgent: rng.chance(0.5),
        capture: [None, Some(CaptureBy::Copy), Some(CaptureBy::Protect)][pick(rng, 3)],
        audit: audit && rng.chance(0.5),
    }
}

impl CourierConditions {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let perfect = rng.chance(0.4);
        Self {
            delay: if perfect {
                Duration::from_micros(50)
            } else {
                log_uniform(rng, 50, 100_000)
            },
            jitter: if perfect {
                Duration::ZERO
            } else {
                log_uniform(rng, 1, 50_000)
            },
            late: if perfect { 0.0 } else { [0.0, 0.02, 0.3][pick(rng, 3)] },
            late_by: log_uniform(rng, 10_000, 3_000_000),
            rate: Bandwidth(1 << (20 + rng.below(10))),
            window: 1 << (14 + rng.below(8)),
            notice: log_uniform(rng, 1_000, 500_000),
        }
    }
}

impl Speed {
    fn draw(rng: &mut Rng) -> Self {
        Self {
            typical: if rng.chance(0.5) {
                Duration::from_micros(30)
            } else {
                log_uniform(rng, 10, 20_000)
            },
            stumbles: if rng.chance(0.6) { 0.0 } else { 0.05 },
        }
    }

    /// How long the next step takes.
    pub(crate) fn step(&self, rng: &mut Rng) -> Duration {
        let share = 0.2 + 1.6 * rng.unit();
        let stumble = if rng.chance(self.stumbles) { 20.0 } else { 1.0 };
        self.typical.mul_f64(share * stumble)
    }
}

impl Failures {
    fn draw(rng: &mut Rng) -> Self {
        let mut failures = Self::default();
        if rng.chance(0.6) {
            return failures;
        }
        let seldom = 0.002;
        let often = [0.2, 1.0][pick(rng, 2)];
        for _ in 0..=rng.below(2) {
            match rng.below(10) {
                9 => failures.capture = often,
                0 => failures.track = 0.1,
                1 => failures.harvest = seldom,
                2 => failures.pause = often,
                3 => failures.save = often,
                4 => failures.encode = seldom,
                5 => failures.build = 0.2,
                6 => failures.apply = seldom,
                7 => failures.restore = often,
                _ => failures.start = often,
            }
        }
        failures
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages: u64 = self.spaces.iter().map(|space| space.present_pages().0).sum();
        let spaces = self.spaces.len();
        let holes: usize = self.spaces.iter().map(|space| space.present.len() - 1).sum();
        writeln!(f, "seed        {}", self.seed)?;
        writeln!(
            f,
            "memory      {pages} pages in {spaces} spaces with {holes} holes, {:.0} % filled",
            self.filled * 100.0
        )?;
        writeln!(f, "guest       {}; {:?}", self.program, self.manners)?;
        match &self.transport {
            Transport::Courier(courier) => writeln!(f, "courier     {courier:?}")?,
            Transport::Roads(roads) => write!(f, "{roads}")?,
        }
        for (host, speed) in [Host::A, Host::B].iter().zip(&self.speeds) {
            writeln!(f, "node {host}      {speed:?}")?;
        }
        writeln!(
            f,
            "encoding    two workers {}, lz4 {}, cache {}",
            self.two_workers, self.compress, self.cache
        )?;
        writeln!(f, "source      {:?}", self.source)?;
        writeln!(f, "shadow      {:?}", self.shadow)?;
        writeln!(f, "failures    {:?}", self.failures)?;
        for (at, act) in &self.acts {
            writeln!(f, "act         {at} {act:?}")?;
        }
        write!(
            f,
            "heals       at {}, guest settles {}, audits {}",
            self.heals, self.settles, self.audits
        )
    }
}

/// A duration whose order of magnitude is uniform.
#[expect(clippy::cast_precision_loss, reason = "a draw")]
pub(crate) fn log_uniform(rng: &mut Rng, low_us: u64, high_us: u64) -> Duration {
    let ratio = high_us as f64 / low_us as f64;
    Duration::from_micros(low_us).mul_f64(ratio.powf(rng.unit()))
}

/// An index below `n`.
pub(crate) fn pick(rng: &mut Rng, n: u64) -> usize {
    usize::try_from(rng.below(n)).expect("an index")
}
