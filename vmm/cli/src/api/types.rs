//! What travels over the API socket. Names here are promises: they may be added to, never changed.
//!
//! Times are milliseconds as numbers with a fraction, sizes are bytes, shares lie between 0 and 1; the name says which.
//! A field that does not apply is `null`, never missing.

use core::time::Duration;
use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_core::batch;
use umbra_core::guest::CaptureBy;
use umbra_core::report;
use umbra_node::snapshot;
use utoipa::ToSchema;

pub(crate) use crate::args::{Compression, Order, Verify};

/// `GET /api/v1/ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Ping {
    /// The program's version.
    pub(crate) version: String,
    /// The process.
    pub(crate) pid: u32,
    /// What the guest is called.
    pub(crate) name: String,
}

/// What this process is to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Its VMM; nobody shadows it.
    Running,
    /// Its VMM, with a shadow elsewhere.
    Source,
    /// Holds, or waits for, its shadow.
    Shadow,
    /// Was one of these; the process is about to end.
    Ended,
}

/// What the guest itself is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum GuestState {
    /// Its vCPUs run here.
    Running,
    /// An operator paused it here.
    Paused,
    /// A switchover is under way: it runs here, or is stopped for its final epoch.
    Switching,
    /// It was given up: only the shadow may run it.
    HandedOver,
    /// Not here: this is a shadow.
    Elsewhere,
    /// Over, or moved away.
    Ended,
}

/// `GET /api/v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Status {
    /// The program's version.
    pub(crate) version: String,
    /// The process.
    pub(crate) pid: u32,
    /// Since the process began.
    pub(crate) uptime_ms: f64,
    /// What this process is.
    pub(crate) role: Role,
    /// What people call the guest.
    pub(crate) name: String,
    /// The guest's identity, the same wherever it runs: 32 hexadecimal digits. `null` at a shadow nobody has come to.
    pub(crate) guest: Option<String>,
    /// What the guest is doing.
    pub(crate) guest_state: GuestState,
    /// The term the guest runs in, or was given up in.
    pub(crate) term: Option<u64>,
    /// How many vCPUs.
    pub(crate) vcpus: Option<u8>,
    /// How much memory.
    pub(crate) memory_bytes: Option<u64>,
    /// The fingerprint of this process's certificate: what the other side pins.
    pub(crate) identity: String,
    /// Where this process listens for sources.
    pub(crate) listen: Vec<String>,
    /// The fingerprint of the other side, while there is one.
    pub(crate) peer: Option<String>,
    /// The phase of the session: joining, seeding, following, ...; `null` without one.
    pub(crate) phase: Option<String>,
    /// The epoch that pages shipped now belong to. At a source only.
    pub(crate) epoch: Option<u64>,
    /// Pages the guest has.
    pub(crate) pages: Option<u64>,
    /// Share of them that the shadow has held at least once (at a source), or holds fresh (at a shadow).
    pub(crate) seeded: Option<f64>,
    /// Pages whose newest content the shadow has not acknowledged. At a source only.
    pub(crate) debt: Option<u64>,
    /// Of those, pages that wait for the end because they would be written again before they are needed. At a source only.
    pub(crate) deferred: Option<u64>,
    /// Pages found written by the latest harvest. At a source only.
    pub(crate) latest_harvest: Option<u64>,
    /// What is to be expected of the debt. At a source only.
    pub(crate) outlook: Option<Outlook>,
    /// The pause if the guest were stopped now. At a source only.
    pub(crate) predicted_pause_ms: Option<f64>,
    /// Bytes of batches so far. At a source only.
    pub(crate) shipped_bytes: Option<u64>,
    /// How pages travelled so far.
    pub(crate) counts: Option<PageCounts>,
    /// How batches were compressed and contents kept. At a source only.
    pub(crate) encode: Option<EncodeStatus>,
    /// Whether a switchover is under way.
    pub(crate) switching: bool,
    /// Whether an epoch is being cut. At a source only.
    #[serde(default)]
    pub(crate) cutting: bool,
    /// The last epoch that was committed and can be gone back to.
    #[serde(default)]
    pub(crate) committed: Option<CommittedEpoch>,
    /// Bytes put aside to keep it apart from what came after. At a shadow only.
    #[serde(default)]
    pub(crate) staged_bytes: Option<u64>,
    /// So many at most. At a shadow only.
    #[serde(default)]
    pub(crate) staging_bytes: Option<u64>,
    /// Everything that speaks against a switchover now.
    pub(crate) reasons: Vec<String>,
    /// Every path that was ever up.
    pub(crate) paths: Vec<PathStatus>,
    /// The paths together.
    pub(crate) link: Option<LinkStatus>,
    /// The latest long job, running or over.
    pub(crate) job: Option<Job>,
    /// The last switchover that this process was part of as the source.
    pub(crate) last_switchover: Option<SwitchoverReport>,
    /// The last thing that went wrong, on either side.
    pub(crate) last_error: Option<String>,
    /// Why the process is about to end.
    pub(crate) exit: Option<String>,
}

/// An epoch that the shadow committed: it can go back to it whatever comes after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct CommittedEpoch {
    /// Its number.
    pub(crate) epoch: u64,
    /// How old it is: from the instant it is of (at a source), or from when it was committed (at a shadow).
    pub(crate) age_ms: f64,
    /// The account of its cut. At a source only.
    pub(crate) cut: Option<CutReport>,
}

/// What a cut did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct CutReport {
    /// The epoch.
    pub(crate) epoch: u64,
    /// Why it was cut.
    pub(crate) reason: String,
    /// From the request to the shadow's word that it is committed.
    pub(crate) total_ms: f64,
    /// Of that, until the guest was asked to stop: pages that had settled were shipped.
    pub(crate) settle_ms: f64,
    /// How long the guest stood still.
    pub(crate) pause_ms: f64,
    /// Where the pause went. The parts add up to it.
    pub(crate) breakdown_ms: CutPause,
    /// How the pages of the cut were kept while the guest ran on.
    pub(crate) capture: Capture,
    /// How many they were.
    pub(crate) pages: u64,
    /// Bytes of the batches that carried them.
    pub(crate) bytes: u64,
    /// Whether both sides compared all of memory.
    pub(crate) audited: bool,
}

impl From<report::CutReport> for CutReport {
    fn from(report: report::CutReport) -> Self {
        let report::CutPause {
            stop,
            harvest,
            save,
            capture,
            resume,
        } = report.pause;
        Self {
            epoch: report.epoch.0,
            reason: report.reason.to_string(),
            total_ms: ms(report.total),
            settle_ms: ms(report.settle),
            pause_ms: ms(report.pause.pause()),
            breakdown_ms: CutPause {
                stop: ms(stop),
                harvest: ms(harvest),
                save: ms(save),
                capture: ms(capture),
                resume: ms(resume),
            },
            capture: report.by.into(),
            pages: report.pages.0,
            bytes: report.bytes.0,
            audited: report.audited,
        }
    }
}

/// Where the pause of a cut went, in the order it happened.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct CutPause {
    /// Asking the vCPUs to stop until the last had.
    pub(crate) stop: f64,
    /// The last dirty pages.
    pub(crate) harvest: f64,
    /// vCPU and device state.
    pub(crate) save: f64,
    /// Keeping the pages as they are.
    pub(crate) capture: f64,
    /// Letting the vCPUs run.
    pub(crate) resume: f64,
}

/// How the pages of a cut are kept while the guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Capture {
    /// Copied in the pause by one thread.
    Copy,
    /// Copied in the pause by several threads.
    Parallel,
    /// Write-protected in the pause, and copied before the guest's first write to each.
    Protect,
}

impl From<CaptureBy> for Capture {
    fn from(by: CaptureBy) -> Self {
        match by {
            CaptureBy::Copy => Self::Copy,
            CaptureBy::ParallelCopy => Self::Parallel,
            CaptureBy::Protect => Self::Protect,
        }
    }
}

impl From<Capture> for CaptureBy {
    fn from(by: Capture) -> Self {
        match by {
            Capture::Copy => Self::Copy,
            Capture::Parallel => Self::ParallelCopy,
            Capture::Protect => Self::Protect,
        }
    }
}

/// `PUT /api/v1/cut`. What is `null` or missing is as `umbra cut --help` says.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CutRequest {
    /// How long pages that have settled may be shipped before the guest is stopped.
    pub(crate) settle_ms: Option<f64>,
    /// Give up when the last page could not be handed to the link within this time.
    pub(crate) timeout_ms: Option<f64>,
    /// Send with parity, because somebody waits for it.
    pub(crate) urgent: bool,
    /// How the pages are kept while the guest runs on; as seems best, if `null`.
    pub(crate) capture: Option<Capture>,
    /// What is compared.
    pub(crate) verify: Option<Verify>,
}

/// How batches were compressed and contents kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct EncodeStatus {
    /// Batches that travelled as they are.
    pub(crate) batches_none: u64,
    /// Batches compressed by lz4.
    pub(crate) batches_lz4: u64,
    /// Batches compressed by zstd.
    pub(crate) batches_zstd: u64,
    /// Bytes of all batches before compression.
    pub(crate) bytes_before: u64,
    /// Bytes of all batches as they travelled.
    pub(crate) bytes_after: u64,
    /// Pages that travelled as what changed, because their content was kept.
    pub(crate) cache_hits: u64,
    /// Pages that had travelled before and whose content was not kept.
    pub(crate) cache_misses: u64,
    /// Pages whose content was kept and of which too much had changed.
    pub(crate) cache_useless: u64,
    /// Contents that made room for those of busier pages.
    pub(crate) cache_evictions: u64,
}

impl From<umbra_node::EncodeStatus> for EncodeStatus {
    fn from(status: umbra_node::EncodeStatus) -> Self {
        let umbra_node::EncodeStatus { packed, cache } = status;
        Self {
            batches_none: packed.none,
            batches_lz4: packed.lz4,
            batches_zstd: packed.zstd,
            bytes_before: packed.before.0,
            bytes_after: packed.after.0,
            cache_hits: cache.hits,
            cache_misses: cache.misses,
            cache_useless: cache.useless,
            cache_evictions: cache.evictions,
        }
    }
}

/// Whether the debt will become small enough for a short pause, at the link's present rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Outlook {
    /// Which page ships next.
    pub(crate) order: Order,
    /// Between two harvests now.
    pub(crate) harvest_ms: f64,
    /// Different pages written within a while, for each while that is counted over.
    pub(crate) dirty: Vec<DirtyWithin>,
    /// Pages the link carries in a second, as they are encoded now.
    pub(crate) link_pages_per_second: f64,
    /// Where the debt would end in rounds over memory.
    pub(crate) floor_round: Option<DebtFloor>,
    /// Where it would end with the coldest page first.
    pub(crate) floor_cold: Option<DebtFloor>,
    /// Where it will end in the order in use.
    pub(crate) floor: Option<DebtFloor>,
    /// Whether the pause there keeps to the limit of the switchover under way, or to the promised pause without one.
    pub(crate) converges: Option<bool>,
    /// The rate that the link would need for that, if it does not.
    pub(crate) needs_mbit: Option<f64>,
    /// Why the switchover under way has not stopped the guest yet.
    pub(crate) obstacle: Option<String>,
    /// The guest's pages by how often they are written.
    pub(crate) classes: HeatClasses,
}

/// Different pages written within a while.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct DirtyWithin {
    /// The while.
    pub(crate) span_ms: f64,
    /// Pages.
    pub(crate) pages: u64,
    /// The same as a rate.
    pub(crate) pages_per_second: f64,
}

/// A debt that waiting does not shrink.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct DebtFloor {
    /// Pages left.
    pub(crate) pages: u64,
    /// The pause with so many left; `null` without a link.
    pub(crate) pause_ms: Option<f64>,
}

/// Pages by how often they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct HeatClasses {
    /// Never touched since the guest was built: they do not travel.
    pub(crate) free: u64,
    /// Less than once in twenty seconds.
    pub(crate) cold: u64,
    /// Less than once in two seconds.
    pub(crate) warm: u64,
    /// More often.
    pub(crate) hot: u64,
    /// Hot, and waiting for the end.
    pub(crate) deferred: u64,
}

/// `GET /api/v1/heat`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Heat {
    /// Every space: memory is number 0.
    pub(crate) spaces: Vec<SpaceHeat>,
}

/// The heat of one space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SpaceHeat {
    /// Its number.
    pub(crate) space: u16,
    /// One past its highest page, holes included.
    pub(crate) pages: u64,
    /// How many pages make a region.
    pub(crate) region_pages: u64,
    /// All of its regions, lowest first; the last may be shorter.
    pub(crate) regions: Vec<RegionHeat>,
}

/// The heat of neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct RegionHeat {
    /// Its pages by class; those that do not exist are of none.
    pub(crate) classes: HeatClasses,
    /// How often any of them is written.
    pub(crate) writes_per_second: f32,
    /// How often the hottest of them is.
    pub(crate) hottest_per_second: f32,
}

/// The query of `GET /api/v1/heat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct HeatQuery {
    /// How many regions at most: 1 to 16384, 1024 if not given.
    pub(crate) regions: Option<u32>,
}

/// How pages travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct PageCounts {
    /// Not at all: the shadow has that very content.
    pub(crate) same: u64,
    /// As a word that says zero.
    pub(crate) zero: u64,
    /// As what changed.
    pub(crate) delta: u64,
    /// Whole (the batch may be compressed).
    pub(crate) raw: u64,
    /// As the name of another page with that very content.
    #[serde(default)]
    pub(crate) dup: u64,
}

impl From<batch::PageCounts> for PageCounts {
    fn from(counts: batch::PageCounts) -> Self {
        let batch::PageCounts {
            same,
            zero,
            delta,
            raw,
            dup,
        } = counts;
        Self {
            same,
            zero,
            delta,
            raw,
            dup,
        }
    }
}

/// One network route.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct PathStatus {
    /// Its place in the operator's list.
    pub(crate) id: u16,
    /// Where it leaves from, if that was given.
    pub(crate) local: Option<String>,
    /// Where it goes.
    pub(crate) remote: Option<String>,
    /// `up`, `silent`, `stalled` or `down`.
    pub(crate) state: String,
    /// Smoothed round trip.
    pub(crate) rtt_ms: f64,
    /// What it is believed to carry, in megabits per second.
    pub(crate) rate_mbit: f64,
    /// Mean loss of packets.
    pub(crate) loss: f64,
    /// Bytes of blocks and messages sent on it.
    pub(crate) bytes: u64,
    /// Its share of all block bytes sent.
    pub(crate) share: f64,
    /// Bytes laid on it and not yet acknowledged.
    pub(crate) outstanding_bytes: u64,
    /// How often it was suspected.
    pub(crate) suspected: u64,
    /// How often its connection went away.
    pub(crate) died: u64,
}

/// The paths together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct LinkStatus {
    /// Blocks accepted for sending.
    pub(crate) blocks_sent: u64,
    /// Of those, held by the other side.
    pub(crate) blocks_delivered: u64,
    /// Blocks received whole.
    pub(crate) blocks_received: u64,
    /// Parity bytes sent.
    pub(crate) parity_bytes: u64,
    /// Bytes sent again because their path died or was suspected.
    pub(crate) resent_bytes: u64,
    /// Bytes sent a second time so that a lagging path does not hold up the end.
    pub(crate) reinjected_bytes: u64,
    /// Received stripes that parity completed.
    pub(crate) stripes_repaired: u64,
}

/// A long command: it was answered at once and goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Job {
    /// Counted from one in each process.
    pub(crate) id: u64,
    /// What was asked for.
    pub(crate) kind: JobKind,
    /// How it stands.
    pub(crate) state: JobState,
    /// Why it failed.
    pub(crate) error: Option<String>,
    /// What it did, if it was a switchover that succeeded.
    pub(crate) report: Option<SwitchoverReport>,
    /// What it did, if it was a snapshot that succeeded.
    pub(crate) snapshot: Option<SnapshotReport>,
    /// What it did, if it was a cut that succeeded.
    #[serde(default)]
    pub(crate) cut: Option<CutReport>,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum JobKind {
    /// Move the guest.
    Migrate,
    /// Keep it in a folder.
    Snapshot,
    /// Have the shadow commit an epoch.
    Cut,
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum JobState {
    /// Under way.
    Running,
    /// It succeeded.
    Done,
    /// It did not.
    Failed,
}

/// What a finished switchover did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SwitchoverReport {
    /// The guest.
    pub(crate) guest: String,
    /// Where it runs now: the paths to there.
    pub(crate) to: Vec<String>,
    /// The final epoch.
    pub(crate) epoch: u64,
    /// The term the guest runs in now.
    pub(crate) term: u64,
    /// From the request to the shadow's word that the guest runs there.
    pub(crate) total_ms: f64,
    /// Rounds of shrinking the debt before the stop.
    pub(crate) rounds: u32,
    /// The pause as predicted when the guest was stopped.
    pub(crate) predicted_ms: f64,
    /// The pause as it was: from asking the vCPUs to stop to hearing that they run elsewhere.
    pub(crate) pause_ms: f64,
    /// Where the pause went. The parts add up to it.
    pub(crate) breakdown_ms: Breakdown,
    /// Pages left to send at the stop.
    pub(crate) stop_pages: u64,
    /// Bytes of the final epoch's batches.
    pub(crate) final_bytes: u64,
    /// How the final epoch's pages travelled.
    pub(crate) final_counts: PageCounts,
    /// Whether both sides compared all of memory.
    pub(crate) audited: bool,
}

/// Where a pause went, in the order it happened.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Breakdown {
    /// Asking the vCPUs to stop until the last had.
    pub(crate) stop: f64,
    /// The last dirty pages.
    pub(crate) harvest: f64,
    /// vCPU and device state.
    pub(crate) save: f64,
    /// Copying and encoding the final epoch.
    pub(crate) encode: f64,
    /// On the network, both ways.
    pub(crate) transfer: f64,
    /// Writing the final epoch into the shadow's memory.
    pub(crate) apply: f64,
    /// Comparing digests, and all of memory if that was asked for.
    pub(crate) verify: f64,
    /// Loading vCPU and device state at the shadow.
    pub(crate) restore: f64,
    /// Giving up, saying go, and the vCPUs' start at the shadow.
    pub(crate) resume: f64,
}

impl Breakdown {
    /// The parts in order, with their names.
    pub(crate) const fn parts(&self) -> [(&'static str, f64); 9] {
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

/// A span as the API writes it, to the microsecond.
pub(crate) fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}

impl From<report::PauseBreakdown> for Breakdown {
    fn from(parts: report::PauseBreakdown) -> Self {
        Self {
            stop: ms(parts.stop),
            harvest: ms(parts.harvest),
            save: ms(parts.save),
            encode: ms(parts.encode),
            transfer: ms(parts.transfer),
            apply: ms(parts.apply),
            verify: ms(parts.verify),
            restore: ms(parts.restore),
            resume: ms(parts.resume),
        }
    }
}

impl SwitchoverReport {
    /// The core's account, of `guest`, which went `to` there.
    pub(crate) fn of(report: &report::SwitchoverReport, guest: String, to: Vec<String>) -> Self {
        Self {
            guest,
            to,
            epoch: report.epoch.0,
            term: report.term.0,
            total_ms: ms(report.total),
            rounds: report.rounds,
            predicted_ms: ms(report.predicted),
            pause_ms: ms(report.breakdown.pause()),
            breakdown_ms: report.breakdown.into(),
            stop_pages: report.stop_pages.0,
            final_bytes: report.final_bytes.0,
            final_counts: report.final_counts.into(),
            audited: report.audited,
        }
    }
}

/// `PUT /api/v1/protect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ProtectRequest {
    /// Paths to the shadow, `quic:IP:PORT[,local=IP[:PORT]]`.
    pub(crate) to: Vec<String>,
    /// Fingerprints the shadow may have.
    pub(crate) peers: Vec<String>,
    /// A directory with the identity to show; the process's own, if `null`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub(crate) identity: Option<PathBuf>,
    /// Page contents kept to make deltas against.
    #[serde(default)]
    pub(crate) cache_bytes: Option<u64>,
    /// When batches are compressed, and how: `auto`, `off`, `lz4` (also called `on`), `zstd` or `zstd:LEVEL`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub(crate) compression: Option<Compression>,
    /// Between two harvests of a guest that writes, at most.
    #[serde(default)]
    pub(crate) harvest_ms: Option<f64>,
    /// Threads that encode, 1 to 64; by default half of the host's cores, but at most 4.
    #[serde(default)]
    pub(crate) encode_threads: Option<u8>,
    /// Processor time that encoding may use while no switchover is under way, in percent of one core, 1 to 6400.
    #[serde(default)]
    pub(crate) encode_cpu_percent: Option<u32>,
    /// Which page ships next.
    #[serde(default)]
    pub(crate) order: Option<Order>,
    /// The pause that a stop with all hot pages still to go must keep to; 0 if none may wait.
    #[serde(default)]
    pub(crate) pause_promise_ms: Option<f64>,
}

/// `PUT /api/v1/migrate`. What is `null` or missing is as `umbra migrate --help` says.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MigrateRequest {
    /// Stop the guest only when the pause is predicted to be at most this.
    pub(crate) downtime_limit_ms: Option<f64>,
    /// Give up when the guest could not be stopped within this time.
    pub(crate) timeout_ms: Option<f64>,
    /// Once stopped, run the guest on here when the shadow is not prepared within this time.
    pub(crate) pause_limit_ms: Option<f64>,
    /// What is compared.
    pub(crate) verify: Option<Verify>,
}

/// `PUT /api/v1/snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SnapshotRequest {
    /// The folder it is to be; an absolute path.
    #[schema(value_type = String)]
    pub(crate) to: PathBuf,
    /// How much it holds.
    #[serde(default)]
    pub(crate) kind: SnapshotKind,
    /// Leave the guest paused at the cut.
    #[serde(default)]
    pub(crate) pause: bool,
    /// Go on recording writes, so that a differential snapshot may follow.
    #[serde(default = "yes")]
    pub(crate) record: bool,
    /// What is compared.
    #[serde(default)]
    pub(crate) verify: Option<Verify>,
}

const fn yes() -> bool {
    true
}

/// How much a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SnapshotKind {
    /// All of memory.
    #[default]
    Full,
    /// What was written since the snapshot before.
    Differential,
}

/// What a finished snapshot is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct SnapshotReport {
    /// Its identity.
    pub(crate) id: String,
    /// The guest.
    pub(crate) guest: String,
    /// Where it is.
    #[schema(value_type = String)]
    pub(crate) to: PathBuf,
    /// How much it holds.
    pub(crate) kind: SnapshotKind,
    /// How many snapshots its chain has, this one included.
    pub(crate) cut: u64,
    /// From the request until it stood on disk.
    pub(crate) total_ms: f64,
    /// From asking the vCPUs to stop until they ran again; of a guest that was or stays paused, the time its cut took.
    pub(crate) pause_ms: f64,
    /// Where the pause went. The parts add up to it.
    pub(crate) breakdown_ms: CutBreakdown,
    /// Rounds of copying before the pause.
    pub(crate) rounds: u32,
    /// Pages left for the pause.
    pub(crate) stop_pages: u64,
    /// How pages were kept.
    pub(crate) counts: PageCounts,
    /// Bytes on disk.
    pub(crate) bytes: u64,
    /// Whether all of memory was compared with what was kept.
    pub(crate) audited: bool,
}

/// Where the pause of a snapshot went, in the order it happened.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct CutBreakdown {
    /// Asking the vCPUs to stop until the last had.
    pub(crate) stop: f64,
    /// The last dirty pages.
    pub(crate) harvest: f64,
    /// vCPU and device state.
    pub(crate) save: f64,
    /// Copying and encoding the last pages.
    pub(crate) encode: f64,
    /// Comparing all of memory, if that was asked for.
    pub(crate) audit: f64,
    /// Letting the guest run.
    pub(crate) resume: f64,
}

impl CutBreakdown {
    /// The parts in order, with their names.
    pub(crate) const fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("stop", self.stop),
            ("harvest", self.harvest),
            ("save", self.save),
            ("encode", self.encode),
            ("audit", self.audit),
            ("resume", self.resume),
        ]
    }
}

impl SnapshotReport {
    /// The node's account, of `guest`.
    pub(crate) fn of(report: &snapshot::SnapshotReport, guest: String) -> Self {
        let snapshot::CutBreakdown {
            stop,
            harvest,
            save,
            encode,
            audit,
            resume,
        } = report.breakdown;
        Self {
            id: report.id.to_string(),
            guest,
            to: report.folder.clone(),
            kind: match report.kind {
                snapshot::Kind::Full => SnapshotKind::Full,
                snapshot::Kind::Differential => SnapshotKind::Differential,
            },
            cut: report.cut.0,
            total_ms: ms(report.total),
            pause_ms: ms(report.breakdown.pause()),
            breakdown_ms: CutBreakdown {
                stop: ms(stop),
                harvest: ms(harvest),
                save: ms(save),
                encode: ms(encode),
                audit: ms(audit),
                resume: ms(resume),
            },
            rounds: report.rounds,
            stop_pages: report.stop_pages.0,
            counts: report.counts.into(),
            bytes: report.bytes.0,
            audited: report.audited,
        }
    }
}

/// The answer to `PUT /api/v1/migrate` and `snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Accepted {
    /// The job's number: see [`Status::job`] and the event `job-finished`.
    pub(crate) job: u64,
}

/// `PUT /api/v1/resume`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ResumeRequest {
    /// The operator vouches that the other host is dead and will not run the guest.
    pub(crate) peer_is_dead: bool,
}

/// `PUT /api/v1/resize`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResizeRequest {
    /// How much of its memory the guest is asked to leave to the balloon. It takes its time.
    pub(crate) balloon_bytes: u64,
}

/// `GET /api/v1/counters`: since the guest's machine was built here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Counters {
    /// One per vCPU.
    pub(crate) vcpus: Vec<VcpuCounters>,
    /// How much of its memory the guest says it has left to its balloon.
    pub(crate) balloon_bytes: Option<u64>,
    /// How its writes are recorded.
    pub(crate) dirty_log: Option<DirtyLogChoice>,
    /// How the pages of its cuts were kept while it ran on.
    pub(crate) captures: Captures,
}

/// How many cuts' pages were kept by which means, each time by the one predicted to cost the guest least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Captures {
    /// Copied inside the pause.
    pub(crate) copy: u64,
    /// The same, by several threads.
    pub(crate) parallel_copy: u64,
    /// Write-protected, and copied while the guest ran.
    pub(crate) protect: u64,
    /// Writes of the guest that had to wait for such a copy.
    pub(crate) faults: u64,
}

/// How a guest's writes are recorded on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct DirtyLogChoice {
    /// `bitmap` or `ring`.
    pub(crate) log: String,
    /// Entries of each vCPU's ring.
    pub(crate) ring_entries: Option<u32>,
    /// Why it is this one.
    pub(crate) why: String,
}

/// What one vCPU has done.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct VcpuCounters {
    /// How often it left the guest, by what for.
    pub(crate) exits: BTreeMap<String, u64>,
    /// Instructions that KVM could not emulate and this program did, on hosts that virtualise in software.
    pub(crate) emulated: BTreeMap<String, u64>,
    /// Pages it was recorded to have written, where it has a dirty ring.
    pub(crate) written_pages: Option<u64>,
    /// How many that are per second, lately.
    pub(crate) written_pages_per_second: Option<u64>,
}

/// Any answer of 400 and above.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorAnswer {
    /// Why, in one line for an operator.
    pub(crate) error: String,
}

/// One line of `GET /api/v1/events` and of `--event-monitor`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Event {
    /// Since 1970.
    pub(crate) timestamp: Timestamp,
    /// Who tells: `guest`, `session`, `job` or `process`.
    pub(crate) source: String,
    /// What happened.
    pub(crate) event: String,
    /// The particulars.
    pub(crate) properties: serde_json::Value,
}

/// A moment by the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Timestamp {
    /// Whole seconds.
    pub(crate) secs: u64,
    /// And the rest.
    pub(crate) nanos: u32,
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    #[test]
    fn requests_may_leave_out_what_has_a_default_and_name_what_is_unknown() {
        let request: MigrateRequest = from_value(json!({})).unwrap();
        assert_eq!(request, MigrateRequest::default());
        let request: MigrateRequest = from_value(json!({"verify": "full", "downtime_limit_ms": 50})).unwrap();
        assert_eq!(
            (request.verify, request.downtime_limit_ms),
            (Some(Verify::Full), Some(50.0))
        );
        let request: SnapshotRequest = from_value(json!({"to": "/s/a"})).unwrap();
        assert_eq!(
            (request.kind, request.pause, request.record),
            (SnapshotKind::Full, false, true)
        );
        let error = from_value::<MigrateRequest>(json!({"downtime": 50}))
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown field `downtime`"), "{error}");
        let error = from_value::<ProtectRequest>(json!({"to": []})).unwrap_err().to_string();
        assert!(error.contains("missing field `peers`"), "{error}");
        let protect = json!({"to": ["quic:192.0.2.1:7"], "peers": ["ab"], "compression": "off"});
        assert_eq!(
            from_value::<ProtectRequest>(protect).unwrap().compression,
            Some(Compression(umbra_core::pack::Compression::Off))
        );
    }

    #[test]
    fn words_are_written_as_the_documentation_has_them() {
        assert_eq!(to_value(Role::Source).unwrap(), json!("source"));
        assert_eq!(to_value(GuestState::HandedOver).unwrap(), json!("handed-over"));
        assert_eq!(to_value(JobState::Failed).unwrap(), json!("failed"));
        assert_eq!(to_value(JobKind::Migrate).unwrap(), json!("migrate"));
        assert_eq!(to_value(Accepted { job: 3 }).unwrap(), json!({"job": 3}));
    }

    #[test]
    fn a_report_adds_up_and_survives_the_wire() {
        let us = Duration::from_micros;
        let breakdown = report::PauseBreakdown {
            stop: us(100),
            harvest: us(200),
            save: us(300),
            encode: us(400),
            transfer: us(5_000),
            apply: us(600),
            verify: us(70),
            restore: us(800),
            resume: us(900),
        };
        let core = report::SwitchoverReport {
            epoch: umbra_units::Epoch(7),
            term: umbra_units::Term(2),
            total: us(1_234_567),
            rounds: 3,
            predicted: us(9_000),
            breakdown,
            stop_pages: umbra_units::PageCount(64),
            final_bytes: umbra_units::Bytes(70_000),
            final_counts: batch::PageCounts {
                same: 1,
                zero: 2,
                delta: 3,
                raw: 4,
                dup: 5,
            },
            audited: true,
        };
        let report = SwitchoverReport::of(&core, "ab".repeat(16), vec!["quic:192.0.2.1:7".to_owned()]);
        let sum: f64 = report.breakdown_ms.parts().iter().map(|(_, part)| part).sum();
        assert!((sum - report.pause_ms).abs() < 1e-6, "{sum} {}", report.pause_ms);
        assert_eq!((report.total_ms, report.pause_ms), (1_234.567, 8.37));
        let names: Vec<_> = core.breakdown.parts().iter().map(|(name, _)| *name).collect();
        assert_eq!(report.breakdown_ms.parts().map(|(name, _)| name).to_vec(), names);
        let there: SwitchoverReport = from_value(to_value(&report).unwrap()).unwrap();
        assert_eq!(there, report);
    }
}
