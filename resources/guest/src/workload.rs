//! What a vCPU does all day: fill, work, scrub, beat, sleep.
//!
//! One loop for all; what differs is decided once, in [`Task`]. Every turn looks at the clock, so that a beat is
//! late by no more than one page.

use crate::EXIT_CORRUPT;
use crate::beat::Beat;
use crate::blk::Timed;
use crate::blkcheck::Check;
use crate::boot::{CpuCell, Share};
use crate::console::{fatal, silenced};
use crate::cpu::{self, Timer};
use crate::health::Health;
use crate::net::Net;
use crate::plan::{Partition, Plan};
use crate::rng::Random;
use core::sync::atomic::{Ordering, compiler_fence};
use umbra_guest::config::{Pattern, Work};
use umbra_guest::pattern::{Rng, Shuffle, Zipf};
use umbra_guest::proof::{PAGE_BYTES, PAGE_WORDS, Version};

/// A paced CPU works in spells this far apart, rather than waking for each page.
const SPELL_US: u64 = 1_000;
/// Work that a pause or a slow host left undone is made up for, up to this much; the rest is forgotten, so
/// that a guest coming back from a pause does not write in a burst.
const ARREARS_US: u64 = 20_000;
/// Sleep shorter than this is not worth the exits.
const NAP_US: u64 = 60;
/// A CPU with nothing to do wakes this often, to scrub.
const IDLE_US: u64 = 10_000;
/// Time between two pages of scrubbing: well below a hundredth of a CPU.
const SCRUB_US: u64 = 125;
/// A scrubber that has fallen behind makes up for this many pages at most.
const SCRUB_ARREARS: u64 = 64;

/// Runs one CPU for ever; the BSP brings the heartbeat.
pub(crate) fn run(cpu: usize, share: &'static Share, mut beat: Option<Beat>) -> ! {
    let timer = Timer::start(cpu, share.clock.lapic_ratio);
    let mut health = Health::plant(cpu, share);
    let mut pages = Pages::new(cpu, share);
    pages.write_all_once(&mut health, &mut beat);
    pages.me.set_stage(2);

    let clock = &share.clock;
    let mut task = Task::new(share, &pages, health.look());
    let mut scrub = Scrub::new(share, health.look());
    let (nap, idle) = (clock.ticks(NAP_US), clock.ticks(IDLE_US));
    let mut before = health.look();
    let mut turns = 0;
    loop {
        // Before anything is looked at: an interrupt from here on ends the sleep below before it begins.
        let ticks = timer.ticks();
        let now = health.look();
        turns += 1;
        pages.me.set_turns(turns);
        if let Some(beat) = &mut beat {
            beat.poll(now);
        } else if silenced() {
            cpu::park();
        }
        let rest = task.step(&mut pages, now);
        scrub.step(&mut pages, now);
        let Some(rest) = rest else {
            health.expect_ticks(&timer, before, now);
            before = now;
            continue;
        };
        let wake = rest.min(now + idle).min(beat.as_ref().map_or(u64::MAX, Beat::next));
        let now = health.look();
        if wake > now + nap {
            health.forget_tick();
            timer.sleep(ticks, wake - now);
        }
        before = health.look();
    }
}

/// The proof pages one CPU owns, and what it does with them.
struct Pages {
    cpu: usize,
    me: CpuCell,
    plan: &'static Plan,
    mine: Partition,
    verify: bool,
    written: u64,
    checked: u64,
}

impl Pages {
    fn new(cpu: usize, share: &'static Share) -> Self {
        let (me, plan) = (share.root_cpu(cpu), &share.plan);
        Self {
            cpu,
            me,
            plan,
            mine: plan.partition(cpu),
            verify: share.config.verify,
            written: 0,
            checked: 0,
        }
    }

    /// Brings every page to its first version.
    fn write_all_once(&mut self, health: &mut Health, beat: &mut Option<Beat>) {
        for n in 0..self.mine.pages() {
            self.write(self.mine.page(n), 0);
            let now = health.look();
            if let Some(beat) = beat {
                beat.poll(now);
            }
        }
    }

    /// Checks a page against the table, and moves it to its next version.
    #[inline(always)]
    fn rewrite(&mut self, page: u64) {
        let sequence = self.plan.sequence(page);
        if self.verify {
            self.check(page, sequence);
        }
        self.write(page, sequence);
    }

    /// Moves a page on from this version. The order is the promise: see [`umbra_guest::proof`].
    #[inline(always)]
    fn write(&mut self, page: u64, from: u64) {
        if self.me.journal_to() != 0 {
            self.corrupt_journal(page);
        }
        let to = from + 1;
        self.me.open_journal(page, from, to);
        compiler_fence(Ordering::SeqCst);
        // SAFETY: one owner, and the plan's pages are RAM.
        unsafe {
            Version {
                page,
                sequence: to,
                class: self.plan.class(page),
            }
            .write(self.plan.address(page))
        };
        compiler_fence(Ordering::SeqCst);
        // SAFETY: one owner.
        unsafe { self.plan.set_sequence(page, to) };
        compiler_fence(Ordering::SeqCst);
        self.me.close_journal();
        self.written += 1;
        self.me.set_written(self.written);
    }

    /// Stops the guest unless the page is exactly this version.
    #[inline(always)]
    fn check(&mut self, page: u64, sequence: u64) {
        let version = Version {
            page,
            sequence,
            class: self.plan.class(page),
        };
        // SAFETY: the plan's pages are RAM; one owner, who is not writing it now.
        if !unsafe { version.matches(self.plan.address(page)) } {
            self.corrupt(version);
        }
        self.checked += 1;
        self.me.set_checked(self.checked);
    }

    #[cold]
    #[inline(never)]
    fn corrupt(&self, version: Version) -> ! {
        let address = self.plan.address(version.page);
        let mut copy = [0; PAGE_WORDS];
        for (i, word) in copy.iter_mut().enumerate() {
            // SAFETY: as in `check`. Volatile: read once, and look at the copy.
            *word = unsafe { address.cast::<u64>().add(i).read_volatile() };
        }
        let (cpu, page, want, gpa) = (self.cpu, version.page, version.sequence, address as u64);
        match version.flaw(&copy) {
            Some((flaw, found)) => {
                let word = copy_difference(&version, &copy);
                let why = flaw.name();
                fatal(
                    EXIT_CORRUPT,
                    format_args!(
                        "CORRUPT cpu={cpu} page={page} gpa={gpa:#x} want={want} found={found} why={why} word={word}"
                    ),
                )
            }
            // It was wrong and now it is right: a register was lost in the middle of the check, or something
            // else is still writing this memory.
            None => fatal(
                EXIT_CORRUPT,
                format_args!("CORRUPT cpu={cpu} page={page} gpa={gpa:#x} want={want} found={want} why=unsteady word=0"),
            ),
        }
    }

    #[cold]
    #[inline(never)]
    fn corrupt_journal(&self, page: u64) -> ! {
        let (cpu, found) = (self.cpu, self.me.journal_to());
        fatal(
            EXIT_CORRUPT,
            format_args!("CORRUPT what=journal cpu={cpu} page={page} want=0 found={found}"),
        )
    }
}

/// The first word of a copy that is not as this version has it.
fn copy_difference(version: &Version, copy: &umbra_guest::proof::Page) -> usize {
    let mut wanted = [0; PAGE_WORDS];
    // SAFETY: `wanted` is ours.
    unsafe { version.write(&raw mut wanted) };
    wanted
        .iter()
        .zip(copy)
        .position(|(wanted, found)| wanted != found)
        .unwrap_or(0)
}

/// What a CPU is there for.
#[allow(
    clippy::large_enum_variant,
    reason = "one per CPU, on its stack: there is no heap to box it on"
)]
enum Task {
    Idle,
    Dirty { choice: Choice, pace: Option<Pace> },
    Compute { round: u64, ops: u64 },
    Blk(Timed),
    BlkCheck(Check),
    Net(Net),
    Rng(Random),
}

impl Task {
    fn new(share: &Share, pages: &Pages, now: u64) -> Self {
        match share.config.work {
            // A device has one driver.
            work if work.drives_a_device() && pages.cpu != 0 => Self::Idle,
            Work::Idle => Self::Idle,
            Work::Dirty => Self::Dirty {
                choice: Choice::new(share, pages, now),
                pace: Pace::new(share, share.config.cpus, now),
            },
            Work::Compute => Self::Compute { round: 0, ops: 0 },
            Work::Blk => Self::Blk(Timed::new(share)),
            Work::BlkCheck => Self::BlkCheck(Check::new(share, now)),
            Work::Net => Self::Net(Net::new(share)),
            Work::Rng => Self::Rng(Random::new(share)),
        }
    }

    /// Does one piece of work, or says until when there is none.
    #[inline(always)]
    fn step(&mut self, pages: &mut Pages, now: u64) -> Option<u64> {
        match self {
            Self::Idle => Some(u64::MAX),
            Self::Dirty { choice, pace } => {
                if let Some(rest) = pace.as_mut().and_then(|pace| pace.rest(now)) {
                    return Some(rest);
                }
                let page = choice.next(pages, now);
                pages.rewrite(page);
                None
            }
            Self::Compute { round, ops } => {
                *round += 1;
                *ops += compute(pages.cpu, *round);
                pages.me.set_ops(*ops);
                None
            }
            Self::Blk(timed) => timed.step(pages.me, now),
            Self::BlkCheck(check) => check.step(pages.me, now),
            Self::Net(net) => net.step(pages.me, now),
            Self::Rng(random) => random.step(pages.me, now),
        }
    }
}

/// Spreads a rate over time.
pub(crate) struct Pace {
    interval: u64,
    next: u64,
    spell: u64,
    arrears: u64,
}

impl Pace {
    /// That of one of so many CPUs that share `rate=`; `None` if there is no limit.
    pub(crate) fn new(share: &Share, cpus: usize, now: u64) -> Option<Self> {
        let (clock, config) = (&share.clock, &share.config);
        let rate = u128::from(config.rate);
        if rate == 0 {
            return None;
        }
        let per_page = u128::from(clock.tsc_khz) * 1000 * u128::from(PAGE_BYTES) * cpus as u128 / rate;
        let interval = (per_page as u64).max(1);
        Some(Self {
            interval,
            next: now,
            spell: clock.ticks(SPELL_US),
            arrears: clock.ticks(ARREARS_US),
        })
    }

    /// Until when to rest; `None` when a page is due, which it then takes as done.
    #[inline(always)]
    pub(crate) fn rest(&mut self, now: u64) -> Option<u64> {
        if now < self.next {
            return Some(self.next.max(now + self.spell));
        }
        self.next = (self.next + self.interval).max(now.saturating_sub(self.arrears));
        None
    }
}

/// Which page next.
#[allow(clippy::large_enum_variant, reason = "as Task")]
enum Choice {
    Uniform(Rng),
    Zipf {
        rng: Rng,
        zipf: Zipf,
        shuffle: Shuffle,
    },
    Seq {
        cursor: u64,
        round: u64,
    },
    Phase {
        rng: Rng,
        hot: u64,
        start: u64,
        period: u64,
    },
}

impl Choice {
    fn new(share: &Share, pages: &Pages, now: u64) -> Self {
        let n = pages.mine.working.pages;
        let rng = Rng::new(pages.cpu as u64);
        match share.config.pattern {
            Pattern::Uniform => Self::Uniform(rng),
            Pattern::Zipf => Self::Zipf {
                rng,
                zipf: Zipf::new(n, share.config.zipf_milli),
                shuffle: Shuffle::new(n, pages.cpu as u64),
            },
            Pattern::Seq => Self::Seq { cursor: 0, round: 1 },
            Pattern::Phase => Self::Phase {
                rng,
                hot: n.div_ceil(8),
                start: now,
                period: share.clock.ticks(share.config.phase_us),
            },
        }
    }

    #[inline(always)]
    fn next(&mut self, pages: &Pages, now: u64) -> u64 {
        let mine = pages.mine.working;
        let n = match self {
            Self::Uniform(rng) => rng.below(mine.pages),
            Self::Zipf { rng, zipf, shuffle } => shuffle.place(zipf.draw(rng)),
            Self::Phase {
                rng,
                hot,
                start,
                period,
            } => {
                let phase = now.saturating_sub(*start) / *period;
                (phase * *hot + rng.below(*hot)) % mine.pages
            }
            Self::Seq { cursor, round } => {
                if *cursor == mine.pages {
                    (*cursor, *round) = (0, *round + 1);
                }
                let n = *cursor;
                *cursor += 1;
                // The edge: everything from the cursor on is at this round still, all before it one ahead.
                let (page, want) = (mine.first + n, *round);
                let found = pages.plan.sequence(page);
                if found != want {
                    let cpu = pages.cpu;
                    fatal(
                        EXIT_CORRUPT,
                        format_args!("CORRUPT what=edge cpu={cpu} page={page} want={want} found={found}"),
                    );
                }
                n
            }
        };
        mine.first + n
    }
}

/// Verifies all pages in turn, in the background.
struct Scrub {
    on: bool,
    cursor: u64,
    next: u64,
    interval: u64,
}

impl Scrub {
    fn new(share: &Share, now: u64) -> Self {
        Self {
            on: share.config.scrub,
            cursor: 0,
            next: now,
            interval: share.clock.ticks(SCRUB_US),
        }
    }

    #[inline(always)]
    fn step(&mut self, pages: &mut Pages, now: u64) {
        if now >= self.next && self.on {
            self.pages_due(pages, now);
        }
    }

    #[inline(never)]
    fn pages_due(&mut self, pages: &mut Pages, now: u64) {
        let n = pages.mine.pages();
        let due = ((now - self.next) / self.interval + 1).min(SCRUB_ARREARS).min(n);
        self.next = now + self.interval;
        for _ in 0..due {
            self.cursor = if self.cursor + 1 < n { self.cursor + 1 } else { 0 };
            let page = pages.mine.page(self.cursor);
            let sequence = pages.plan.sequence(page);
            pages.check(page, sequence);
        }
    }
}

/// Steps there and as many back per round: about 10 us.
const STEPS: u64 = 4096;
const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
const INCREMENT: u64 = 1_442_695_040_888_963_407;

/// Walks a sequence there and back again: the end must be the start. Returns how many steps that took.
#[inline(never)]
fn compute(cpu: usize, round: u64) -> u64 {
    let inverse = const { inverse(MULTIPLIER) };
    let start = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ cpu as u64;
    // The compiler could see through the whole walk otherwise.
    let mut x = core::hint::black_box(start);
    for _ in 0..STEPS {
        x = x.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        x ^= x >> 32;
    }
    x = core::hint::black_box(x);
    for _ in 0..STEPS {
        x ^= x >> 32;
        x = x.wrapping_sub(INCREMENT).wrapping_mul(inverse);
    }
    if x != start {
        fatal(
            EXIT_CORRUPT,
            format_args!("CORRUPT what=compute cpu={cpu} want={start:#x} found={x:#x}"),
        );
    }
    2 * STEPS
}

/// The inverse of an odd number modulo 2^64, by Newton's iteration: each step doubles the correct bits.
const fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    let mut step = 0;
    while step < 5 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        step += 1;
    }
    x
}
