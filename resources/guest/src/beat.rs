//! The heartbeat: one byte per period, and a status line after every thousandth.
//!
//! Time is the TSC. A beat that is late does not bring the next one forward: after a pause the beats go on at
//! their period *from now*, so an observer sees one gap and no burst.

use crate::boot::Share;
use crate::console::{self, say};
use crate::{EXIT_CORRUPT, cpu};
use umbra_guest::config::{CPUS_MAX, Work};

const BEATS_PER_STATUS: u64 = 1000;
/// Without beats, all else that beats bring is seen to at this period.
const QUIET_US: u64 = 10_000;
/// And a status line comes after so many.
const QUIET_PER_STATUS: u64 = 100;
/// An AP that has not turned once while the BSP ran this long is lost.
const AP_LOST_US: u64 = 5_000_000;

/// The BSP's heartbeat.
pub(crate) struct Beat {
    share: &'static Share,
    beating: bool,
    period: u64,
    next: u64,
    /// Beats sent.
    count: u64,
    /// Periods gone by.
    periods: u64,
    started: u64,
    run: Option<u64>,
    /// What each AP's turns were when it was last seen to turn, and how long the BSP has run since.
    watch: [(u64, u64); CPUS_MAX],
    watch_at: u64,
    ready: bool,
}

impl Beat {
    /// Starts now.
    pub(crate) fn new(share: &'static Share) -> Self {
        let now = cpu::tsc();
        let beating = share.config.beat_us != 0;
        let period = share.clock.ticks(if beating { share.config.beat_us } else { QUIET_US });
        Self {
            share,
            beating,
            period,
            next: now,
            count: 0,
            periods: 0,
            started: now,
            run: share.config.run_us.map(|us| share.clock.ticks(us)),
            watch: [(0, 0); CPUS_MAX],
            watch_at: now,
            ready: false,
        }
    }

    /// When the next beat is due.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Beats, if it is time.
    #[inline(always)]
    pub(crate) fn poll(&mut self, now: u64) {
        if now >= self.next {
            self.due(now);
        }
    }

    #[inline(never)]
    fn due(&mut self, now: u64) {
        if console::silenced() {
            cpu::park();
        }
        self.next += self.period;
        if self.next <= now {
            self.next = now + self.period;
        }
        self.watch(now);
        if self.beating {
            console::beat(b'0' + (self.count % 10) as u8);
            self.count += 1;
        }
        self.announce();
        self.periods += 1;
        let per_status = if self.beating {
            BEATS_PER_STATUS
        } else {
            QUIET_PER_STATUS
        };
        if self.periods.is_multiple_of(per_status) {
            self.status();
        }
        if self.run.is_some_and(|run| now - self.started >= run) {
            self.status();
            say!("umbra-guest: done");
            cpu::exit(0);
        }
    }

    /// Says once when all memory has been written for the first time.
    fn announce(&mut self) {
        let cpus = self.share.config.cpus;
        if !self.ready && (0..cpus).all(|cpu| self.share.root_cpu(cpu).stage() == 2) {
            self.ready = true;
            let (plan, clock) = (&self.share.plan, &self.share.clock);
            say!(
                "umbra-guest: ready pages={} working={} tsc_khz={} clock={}",
                plan.pages,
                plan.working,
                clock.tsc_khz,
                clock.source
            );
        }
    }

    fn status(&self) {
        let cpus = self.share.config.cpus;
        let sum =
            |of: fn(crate::boot::CpuCell) -> u64| -> u64 { (0..cpus).map(|cpu| of(self.share.root_cpu(cpu))).sum() };
        let (pages, checked) = (sum(|cpu| cpu.written()), sum(|cpu| cpu.checked()));
        let work = self.share.config.work;
        if work == Work::Compute || work.drives_a_device() {
            let ops = sum(|cpu| cpu.ops());
            say!(
                "#{} pages={pages} checked={checked} cpus={cpus} ops={ops} ok",
                self.count
            );
        } else {
            say!("#{} pages={pages} checked={checked} cpus={cpus} ok", self.count);
        }
    }

    /// Notices an AP that does not come back, for instance from a migration. Only time during which the BSP
    /// itself ran counts, so that a pause of the whole machine is nobody's fault.
    fn watch(&mut self, now: u64) {
        let awake = now.wrapping_sub(self.watch_at).min(2 * self.period);
        self.watch_at = now;
        for cpu in 1..self.share.config.cpus {
            let turns = self.share.root_cpu(cpu).turns();
            let (seen, missing) = &mut self.watch[cpu];
            if turns != *seen || turns == 0 {
                (*seen, *missing) = (turns, 0);
                continue;
            }
            *missing += awake;
            if *missing > self.share.clock.ticks(AP_LOST_US) {
                console::fatal(
                    EXIT_CORRUPT,
                    format_args!("CORRUPT what=cpu cpu={cpu} want=running found=stopped"),
                );
            }
        }
    }
}
