//! The real ledger, heat and orders against a trace, over a link that carries so many pages a second: what is left, how
//! much travelled in vain, and whether that was foreseen.
//!
//! No protocol, no weather: pages are taken one by one as the link carries them, and are held the moment they are. So two
//! orders are compared by nothing but what they choose.

use core::fmt;
use std::time::Duration;

use umbra_core::convergence::Convergence;
use umbra_core::guest::Space;
use umbra_core::ledger::Ledger;
use umbra_core::order::Order;
use umbra_units::{Now, PAGE_SIZE, PageCount};

use crate::dirt::Trace;

/// What a replay is about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Which page ships next.
    pub order: Order,
    /// Pages the link carries in a second.
    pub link: f64,
    /// A debt of so many pages is small enough to stop.
    pub budget: u64,
    /// Give up after so long.
    pub cap: Duration,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// When the debt first was within the budget, if it ever was.
    pub stopped: Option<Duration>,
    /// Pages left then; without a stop, over the last fifth of the time on average.
    pub left: f64,
    /// Pages that travelled.
    pub sent: u64,
    /// Over pages that there are.
    pub resend_factor: f64,
    /// Where rounds would have ended, as foreseen at the end.
    pub floor_round: Option<f64>,
    /// Where the coldest first would have ended.
    pub floor_cold: f64,
}

/// Live through a trace, again and again if it is shorter than the plan.
pub fn replay(trace: &Trace, plan: Plan) -> Outcome {
    let ram = [Space::ram(PageCount(u64::from(trace.pages)))];
    let mut ledger = Ledger::new(&ram, plan.order);
    let mut convergence = Convergence::new(&ram);
    let (mut now, mut sent, mut due) = (Now::ZERO, 0, 0.0);
    let end = Now::ZERO + plan.cap;
    let tail = Now::ZERO + plan.cap.mul_f64(0.8);
    let (mut left, mut looks, mut stopped) = (0, 0_u32, None);
    for dirt in trace.harvests.iter().cycle() {
        if now >= end || trace.span().is_zero() {
            break;
        }
        // What the link carries until this harvest, as the pages are by then.
        due += plan.link * dirt.since.as_secs_f64();
        while due >= 1.0 {
            due -= 1.0;
            let (batch, taken) = ledger.take(now, PageCount(1), None);
            if taken.is_empty() {
                ledger.held(batch);
                due = 0.0; // an idle link saves nothing up
                break;
            }
            sent += taken.len() as u64;
            ledger.held(batch);
        }
        now = now + dirt.since;
        let harvest = dirt.harvest(trace.pages);
        convergence.harvest(now, &harvest);
        ledger.owe(now, &harvest);
        let owed = ledger.owed().0;
        if now >= tail {
            left += owed;
            looks += 1;
        }
        if owed <= plan.budget && ledger.seeded() == ledger.present() {
            stopped = Some(now.since(Now::ZERO));
            (left, looks) = (owed, 1);
            break;
        }
    }
    Outcome {
        stopped,
        left: as_f64(left) / f64::from(looks.max(1)),
        sent,
        resend_factor: as_f64(sent) / f64::from(trace.pages),
        floor_round: convergence.curve().round_floor(plan.link),
        floor_cold: ledger.rates(now).cold_floor(plan.link),
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.stopped {
            Some(when) => write!(f, "stops after {:.1} s", when.as_secs_f64())?,
            None => write!(f, "never stops")?,
        }
        let mib = as_f64(self.sent) * as_f64(PAGE_SIZE as u64) / as_f64(1 << 20);
        write!(
            f,
            " with {:.0} pages left; {} pages sent ({mib:.0} MiB whole), {:.2} times memory; foreseen: {:.0} by rounds, \
             {:.0} coldest first",
            self.left,
            self.sent,
            self.resend_factor,
            self.floor_round.unwrap_or(f64::NAN),
            self.floor_cold
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "an account of pages")]
const fn as_f64(n: u64) -> f64 {
    n as f64
}
