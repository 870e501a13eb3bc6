//! The account of a switchover: where the pause went.

use std::time::Duration;

use umbra_units::{Bytes, Epoch, PageCount, Term};

use crate::batch::PageCounts;
use crate::guest::CaptureBy;
use crate::source::CutReason;

/// Where the pause of one switchover went, as the source saw it. The parts add up to [`pause`](Self::pause).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PauseBreakdown {
    /// Asking the vCPUs to stop until the last had.
    pub stop: Duration,
    /// The last dirty pages: both final harvests.
    pub harvest: Duration,
    /// vCPU and device state.
    pub save: Duration,
    /// Copying and encoding the final epoch.
    pub encode: Duration,
    /// On the network, both ways.
    pub transfer: Duration,
    /// Writing the final epoch into the shadow's memory.
    pub apply: Duration,
    /// Comparing digests, and the audit if one was asked for.
    pub verify: Duration,
    /// Loading vCPU and device state at the shadow.
    pub restore: Duration,
    /// Giving up, saying go, and the vCPUs' start at the shadow; includes one round trip.
    pub resume: Duration,
}

impl PauseBreakdown {
    /// The whole pause: from asking the vCPUs to stop to hearing that they run elsewhere, so an upper bound.
    pub fn pause(&self) -> Duration {
        self.parts().iter().map(|(_, part)| *part).sum()
    }

    /// The parts in the order they happen, with their names.
    pub const fn parts(&self) -> [(&'static str, Duration); 9] {
        [
            ("stop", self.stop),
            ("harvest", self.harvest),
            ("save", self.save),
            ("encode", self.encode),
            ("transfer", self.transfer),
            ("apply", self.apply),
            ("verify", self.verify),
            ("restore", self.restore),
            ("resume", self.resume),
        ]
    }
}

/// What a finished switchover did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchoverReport {
    /// The final epoch.
    pub epoch: Epoch,
    /// The term the guest runs in now.
    pub term: Term,
    /// From the request to the shadow's word that the guest runs there.
    pub total: Duration,
    /// Rounds of shrinking the debt before the stop.
    pub rounds: u32,
    /// The pause as predicted when the guest was stopped.
    pub predicted: Duration,
    /// The pause as it was.
    pub breakdown: PauseBreakdown,
    /// Pages left to send at the stop.
    pub stop_pages: PageCount,
    /// Bytes of the final epoch's batches.
    pub final_bytes: Bytes,
    /// How the final epoch's pages travelled.
    pub final_counts: PageCounts,
    /// Whether both sides audited all of memory.
    pub audited: bool,
}

/// Where the pause of a cut went: the guest stood still for so long. The parts add up to [`pause`](Self::pause).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CutPause {
    /// Asking the vCPUs to stop until the last had.
    pub stop: Duration,
    /// The last dirty pages: both harvests.
    pub harvest: Duration,
    /// vCPU and device state.
    pub save: Duration,
    /// Seeing to it that the pages of the cut can be read as they are.
    pub capture: Duration,
    /// Letting the vCPUs run.
    pub resume: Duration,
}

impl CutPause {
    /// The whole pause.
    pub fn pause(&self) -> Duration {
        self.parts().iter().map(|(_, part)| *part).sum()
    }

    /// The parts in the order they happen, with their names.
    pub const fn parts(&self) -> [(&'static str, Duration); 5] {
        [
            ("stop", self.stop),
            ("harvest", self.harvest),
            ("save", self.save),
            ("capture", self.capture),
            ("resume", self.resume),
        ]
    }
}

/// What a cut did, once the shadow committed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutReport {
    /// Which epoch.
    pub epoch: Epoch,
    /// Why it was cut.
    pub reason: CutReason,
    /// How long the guest stood still.
    pub pause: CutPause,
    /// How the pages of the cut were kept.
    pub by: CaptureBy,
    /// How many they were.
    pub pages: PageCount,
    /// What they became on the link, with the state.
    pub bytes: Bytes,
    /// From the request until the guest was asked to stop.
    pub settle: Duration,
    /// From the request until the shadow's word.
    pub total: Duration,
    /// Whether both sides audited all of memory.
    pub audited: bool,
}
