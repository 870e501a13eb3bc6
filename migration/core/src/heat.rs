//! How often each page is written.
//!
//! Per page two counters of harvests that found it written, each forgetting half of itself in its own half-life: the
//! quick one follows a guest that changes what it does, the slow one tells a page written every second from one written
//! every ten (algorithms §3.5). What is asked of them is the rate of writes, and from it the chance that a page is written
//! again before it is needed.
//!
//! # Decay costs nothing until somebody looks
//!
//! A page keeps the tick in which its counters were last brought up to date. Whoever reads them computes what is left of
//! them by then; a harvest brings up to date the pages it found, and no others. Ticks are 16 bits and come round after 68
//! minutes, so a slow sweep looks at every page every half hour, a handful per harvest, and clears those long forgotten:
//! a counter that is not zero is therefore always younger than one turn of the clock.
//!
//! # Read heat
//!
//! Which pages a guest *reads* is not known here: KVM tells of writes only, and the host's accessed bits are neither
//! offered by the [`Guest`](crate::guest::Guest) contract nor kept for a guest's pages by every kernel. The one hint of
//! residency there is, pages that nothing has touched since the guest was built
//! ([`Guest::untouched`](crate::guest::Guest::untouched)), is used: such pages never travel and count as free.

use std::time::Duration;

use umbra_units::{Now, PageCount, PageSet, Pfn, SpaceId};

/// Half-life of the quick counter.
pub const QUICK: Duration = Duration::from_millis(500);
/// Half-life of the slow counter.
pub const SLOW: Duration = Duration::from_secs(4);

/// An eighth of the quick half-life, a sixty-fourth of the slow one.
const TICK_US: u64 = 62_500;
const TICKS_PER_QUICK: u16 = 8;
const TICKS_PER_SLOW: u16 = 64;
/// One harvest that found the page written, in a counter. Counters saturate at 2047 of them: a page written in every
/// harvest, 5 ms apart, stands at 1155.
const HIT: u16 = 32;
/// Counts of the slow counter per second and write per second, and so on: `rate = count × ln 2 / half-life`.
const QUICK_RATE: f32 = core::f32::consts::LN_2 / 0.5 / 32.0;
const SLOW_RATE: f32 = core::f32::consts::LN_2 / 4.0 / 32.0;
/// Ages above this are those of a moment that was named a little late, not of a page from before the clock came round.
const OUT_OF_ORDER: u16 = u16::MAX - 64;
/// In which the sweep comes by every page: well below a turn of the clock.
const SWEEP: Duration = Duration::from_secs(30 * 60);

/// How often a page is written, in writes per second.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Rate(pub f32);

impl Rate {
    /// Never, as far as anybody remembers.
    pub const ZERO: Self = Self(0.0);

    /// The chance that a page written at this rate is written within `span`.
    pub fn again_within(self, span: Duration) -> f32 {
        -(-self.0 * span.as_secs_f32()).exp_m1()
    }

    /// The rate at which a page is written within `span` with this chance.
    pub fn of_chance(chance: f32, span: Duration) -> Self {
        Self(-(-chance).ln_1p() / span.as_secs_f32())
    }
}

/// What a page is like, coldest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Nothing has touched it since the guest was built: zeros, which never travel.
    Free,
    /// Not written lately.
    Cold,
    /// Written now and then: less than once in two seconds.
    Warm,
    /// Written often.
    Hot,
    /// Hot, owed, and left for the end: it would be written again before it is needed.
    Deferred,
}

impl Class {
    /// All of them, coldest first.
    pub const ALL: [Self; 5] = [Self::Free, Self::Cold, Self::Warm, Self::Hot, Self::Deferred];

    /// Written at least so often is warm: once in twenty seconds.
    pub const WARM: Rate = Rate(0.05);
    /// Written at least so often is hot: once in two seconds.
    pub const HOT: Rate = Rate(0.5);

    /// Of a page of which nothing but its rate is known.
    pub fn of(rate: Rate) -> Self {
        if rate >= Self::HOT {
            Self::Hot
        } else if rate >= Self::WARM {
            Self::Warm
        } else {
            Self::Cold
        }
    }

    /// Its name for an operator.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Hot => "hot",
            Self::Deferred => "deferred",
        }
    }
}

/// How many pages are of which class, in the order of [`Class::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClassCounts(pub [u64; 5]);

impl ClassCounts {
    /// One more page of this class.
    pub const fn count(&mut self, class: Class) {
        self.0[class as usize] += 1;
    }

    /// Pages of this class.
    pub const fn of(&self, class: Class) -> u64 {
        self.0[class as usize]
    }

    /// Join another count.
    pub fn add(&mut self, other: &Self) {
        self.0
            .iter_mut()
            .zip(other.0)
            .for_each(|(mine, theirs)| *mine += theirs);
    }

    /// All pages counted.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// The heat of all of a guest's memory, by regions.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeatMap {
    /// Every space.
    pub spaces: Vec<SpaceHeat>,
}

/// The heat of one space.
#[derive(Debug, Clone, PartialEq)]
pub struct SpaceHeat {
    /// Which.
    pub space: SpaceId,
    /// One past its highest page, holes included.
    pub pages: PageCount,
    /// How many pages make a region: a power of two.
    pub region: PageCount,
    /// All of its regions, lowest first; the last may be shorter.
    pub regions: Vec<Region>,
}

/// Neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Region {
    /// Pages of each class. Pages that do not exist are of none.
    pub classes: ClassCounts,
    /// How often any of them is written, in writes per second.
    pub rate: Rate,
    /// How often the hottest of them is.
    pub hottest: Rate,
}

/// The write heat of one space.
#[derive(Debug, Clone)]
pub struct Heat {
    pages: Vec<PageHeat>,
    /// Every page whose counters may be above zero.
    warmed: PageSet,
    /// When counting began; `None` until the first harvest.
    began: Option<Now>,
    latest: Now,
    /// Between two harvests, on average.
    every: Duration,
    swept: Pfn,
    swept_at: Now,
}

/// Six bytes a page.
#[derive(Debug, Clone, Copy, Default)]
struct PageHeat {
    quick: u16,
    slow: u16,
    /// When both were right.
    tick: u16,
}

impl Heat {
    /// Of a space of so many pages, none of which was ever seen written.
    pub fn new(pages: PageCount) -> Self {
        Self {
            pages: vec![PageHeat::default(); index(Pfn(pages.0))],
            warmed: PageSet::new(pages),
            began: None,
            latest: Now::ZERO,
            every: Duration::ZERO,
            swept: Pfn(0),
            swept_at: Now::ZERO,
        }
    }

    /// A harvest is about to be counted: the clock goes on, and some long forgotten pages are cleared.
    pub fn harvest(&mut self, now: Now) {
        if self.began.is_none() {
            self.began = Some(now);
            self.swept_at = now;
        } else {
            let newest = now.since(self.latest);
            self.every = if self.every.is_zero() {
                newest
            } else {
                self.every * 15 / 16 + newest / 16
            };
        }
        self.latest = now;
        self.sweep(now);
    }

    /// The time between two harvests, on average: a page written twice in between was seen written once.
    pub const fn every(&self) -> Duration {
        self.every
    }

    /// The harvest found this page written.
    pub fn written(&mut self, now: Now, pfn: Pfn) {
        let tick = tick(now);
        let page = &mut self.pages[index(pfn)];
        let (quick, slow) = page.left(tick);
        *page = PageHeat {
            quick: quick.saturating_add(HIT),
            slow: slow.saturating_add(HIT),
            tick,
        };
        self.warmed.insert(pfn);
    }

    /// How often the page is written: the mean of what the two counters say. Too low while counting has only begun, so
    /// that nothing is taken for hot in haste.
    pub fn rate(&self, now: Now, pfn: Pfn) -> Rate {
        let page = &self.pages[index(pfn)];
        if page.slow == 0 {
            return Rate::ZERO;
        }
        let (quick, slow) = page.left(tick(now));
        Rate(f32::midpoint(
            f32::from(quick) * QUICK_RATE,
            f32::from(slow) * SLOW_RATE,
        ))
    }

    /// What the slow counter alone says, made up for the time that it has been counting at all: less nervous, and so
    /// better to add up over many pages.
    pub fn steady_rate(&self, now: Now, pfn: Pfn) -> Rate {
        let (_, slow) = self.pages[index(pfn)].left(tick(now));
        let counting = self.began.map_or(Duration::ZERO, |began| now.since(began));
        Rate(f32::from(slow) * SLOW_RATE / heard(counting, SLOW))
    }

    /// Whether the page was seen written after this moment's tick began. Exact to a tick.
    pub(crate) fn written_since(&self, pfn: Pfn, then: u16) -> bool {
        let age = self.pages[index(pfn)].tick.wrapping_sub(then);
        age > 0 && age < u16::MAX / 2
    }

    /// Every page that may have been written lately, lowest first.
    pub fn warmed(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.warmed.iter()
    }

    /// Look at the next few pages: all of them in half an hour, whatever the size of memory.
    fn sweep(&mut self, now: Now) {
        let pages = self.pages.len() as u64;
        let due = u128::from(pages) * now.since(self.swept_at).as_micros() / SWEEP.as_micros();
        let due = u64::try_from(due).unwrap_or(pages).min(pages);
        if due == 0 {
            return;
        }
        self.swept_at = now;
        let tick = tick(now);
        let end = Pfn((self.swept.0 + due).min(pages));
        let forgotten: Vec<Pfn> = self
            .warmed
            .from(self.swept)
            .take_while(|pfn| *pfn < end)
            .filter(|pfn| self.pages[index(*pfn)].left(tick).1 == 0)
            .collect();
        for pfn in forgotten {
            self.pages[index(pfn)] = PageHeat::default();
            self.warmed.remove(pfn);
        }
        self.swept = if end.0 == pages { Pfn(0) } else { end };
    }
}

impl PageHeat {
    /// What is left of both counters at `tick`.
    fn left(&self, tick: u16) -> (u16, u16) {
        let age = match tick.wrapping_sub(self.tick) {
            OUT_OF_ORDER.. => 0,
            age => age,
        };
        (
            decayed(self.quick, age, TICKS_PER_QUICK),
            decayed(self.slow, age, TICKS_PER_SLOW),
        )
    }
}

/// `count` after `age` ticks of which `half_life` halve it.
fn decayed(count: u16, age: u16, half_life: u16) -> u16 {
    let halvings = age / half_life;
    if count == 0 || halvings >= 16 {
        return 0;
    }
    let step = usize::from(age % half_life * (TICKS_PER_SLOW / half_life));
    let product = u32::from(count >> halvings) * SIXTY_FOURTHS[step];
    u16::try_from((product + (1 << 15)) >> 16).unwrap_or(u16::MAX)
}

/// `2^(-n/64)` in 65536ths.
static SIXTY_FOURTHS: [u32; 64] = {
    // Multiplied up in 2^32nds; 4248703... is 2^(-1/64) of them.
    let mut table = [0; 64];
    let mut value: u64 = 1 << 32;
    let mut n = 0;
    while n < 64 {
        #[expect(clippy::cast_possible_truncation, reason = "at most 2^16")]
        {
            table[n] = (value >> 16) as u32;
        }
        value = (value * 4_248_701_965) >> 32;
        n += 1;
    }
    table
};

/// The share of its final value that a counter of a page written ever since counting began has come to.
fn heard(counting: Duration, half_life: Duration) -> f32 {
    let share = 1.0 - (-counting.as_secs_f32() / half_life.as_secs_f32()).exp2();
    // At the very beginning one write is no proof of a rate: as if counting had gone on for a tenth of a half-life.
    share.max(0.07)
}

/// The tick of a moment. Comes round after 68 minutes.
#[expect(clippy::cast_possible_truncation, reason = "the clock comes round, see the module")]
pub(crate) const fn tick(now: Now) -> u16 {
    (now.as_us() / TICK_US) as u16
}

fn index(pfn: Pfn) -> usize {
    usize::try_from(pfn.0).expect("a page number of a mapped space fits the address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Rng;

    const STEP: Duration = Duration::from_millis(20);

    /// Harvests `STEP` apart for `span`, each page found with its own chance.
    fn harvests(heat: &mut Heat, chances: &[f64], span: Duration, now: &mut Now, rng: &mut Rng) {
        let end = *now + span;
        while *now < end {
            *now = *now + STEP;
            heat.harvest(*now);
            for (page, chance) in (0..).zip(chances) {
                if rng.chance(*chance) {
                    heat.written(*now, Pfn(page));
                }
            }
        }
    }

    #[test]
    fn a_pages_rate_is_learned_and_forgotten_again() {
        let (mut heat, mut now, mut rng) = (Heat::new(PageCount(3)), Now::ZERO, Rng::new(1));
        // 25, 2 and 0 writes a second.
        harvests(
            &mut heat,
            &[0.5, 0.04, 0.0],
            Duration::from_secs(20),
            &mut now,
            &mut rng,
        );
        let [often, seldom, never] = [0, 1, 2].map(|page| heat.rate(now, Pfn(page)));
        assert!((18.0..32.0).contains(&often.0), "{often:?}");
        assert!((0.7..6.0).contains(&seldom.0), "{seldom:?}");
        assert_eq!(never, Rate::ZERO);
        let steady = heat.steady_rate(now, Pfn(0));
        assert!((20.0..30.0).contains(&steady.0), "{steady:?}");
        let later = now + Duration::from_secs(4);
        assert!(heat.rate(later, Pfn(0)).0 < often.0 / 3.0);
        assert!((heat.steady_rate(later, Pfn(0)).0 / steady.0 - 0.5).abs() < 0.1);
        assert_eq!(heat.rate(now + Duration::from_secs(100), Pfn(0)), Rate::ZERO);
    }

    #[test]
    fn a_guest_that_turns_to_other_pages_is_soon_followed() {
        let (mut heat, mut now, mut rng) = (Heat::new(PageCount(2)), Now::ZERO, Rng::new(2));
        harvests(&mut heat, &[0.8, 0.0], Duration::from_secs(30), &mut now, &mut rng);
        harvests(&mut heat, &[0.0, 0.8], Duration::from_millis(1500), &mut now, &mut rng);
        assert!(heat.rate(now, Pfn(1)) > heat.rate(now, Pfn(0)));
    }

    #[test]
    fn the_chance_of_another_write_grows_with_rate_and_time() {
        let rate = Rate(2.0);
        assert!((rate.again_within(Duration::from_millis(500)) - 0.632).abs() < 0.001);
        assert!(rate.again_within(Duration::from_secs(9)) > 0.999);
        assert!(Rate::ZERO.again_within(Duration::from_secs(9)).abs() < f32::EPSILON);
        assert!(
            (Rate::of_chance(0.8, Duration::from_secs(1)).again_within(Duration::from_secs(1)) - 0.8).abs() < 0.001
        );
    }

    /// The clock of 16 bits comes round: what was hot an hour ago must not look hot again.
    #[test]
    fn a_page_forgotten_for_a_turn_of_the_clock_stays_cold() {
        let mut heat = Heat::new(PageCount(1_000));
        let mut now = Now::ZERO;
        for _ in 0..100 {
            now = now + STEP;
            heat.harvest(now);
            heat.written(now, Pfn(777));
        }
        assert!(heat.rate(now, Pfn(777)) > Class::HOT);
        for _ in 0..3 * 68 * 60 {
            now = now + Duration::from_secs(1);
            heat.harvest(now);
            if now.since(Now::ZERO) > Duration::from_secs(120) {
                assert_eq!(heat.rate(now, Pfn(777)), Rate::ZERO);
            }
        }
        assert_eq!(heat.warmed().count(), 0, "and costs nothing any more");
    }

    #[test]
    fn a_moment_named_late_forgets_nothing() {
        let mut heat = Heat::new(PageCount(1));
        let now = Now::from_us(10_000_000);
        heat.harvest(now);
        heat.written(now, Pfn(0));
        let before = heat.rate(now, Pfn(0));
        assert_eq!(heat.rate(now - Duration::from_millis(500), Pfn(0)), before);
    }

    #[test]
    fn decay_follows_the_power_of_two() {
        for age in 0..500 {
            let exact = 65_000.0 * (-f64::from(age) / 64.0).exp2();
            assert!(
                (f64::from(decayed(65_000, age, 64)) - exact).abs() < 2.0 + exact * 0.001,
                "{age}"
            );
        }
    }
}
