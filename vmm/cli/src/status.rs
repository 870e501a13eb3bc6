//! Status and switchover reports as people read them.

use core::fmt::Write;

use umbra_units::{Bytes, PAGE_SIZE};

use crate::api::types::{
    Capture, CommittedEpoch, CutReport, EncodeStatus, GuestState, JobKind, JobState, PathStatus, Role, SnapshotKind,
    SnapshotReport, Status, SwitchoverReport,
};
use crate::heat;
use crate::units::percent;

/// A status in a few lines, the most important first.
pub(crate) fn text(status: &Status) -> String {
    let mut out = String::new();
    let role = match status.role {
        Role::Running => "running, no shadow",
        Role::Source => "source",
        Role::Shadow => "shadow",
        Role::Ended => "ending",
    };
    row(&mut out, "guest", &guest(status));
    row(
        &mut out,
        "this process",
        &format!("{role}, pid {}, up {}", status.pid, seconds(status.uptime_ms)),
    );
    if let Some(exit) = &status.exit {
        row(&mut out, "ending", exit);
    }
    for addr in &status.listen {
        row(&mut out, "listening on", addr);
    }
    if let Some(phase) = &status.phase {
        row(&mut out, "session", &session(status, phase));
    }
    if let (Some(debt), Some(harvest)) = (status.debt, status.latest_harvest) {
        let pages = |pages: u64| format!("{pages} pages ({})", Bytes(pages.saturating_mul(PAGE_SIZE as u64)));
        row(
            &mut out,
            "behind by",
            &format!("{}, {harvest} written at the last look", pages(debt)),
        );
    }
    if let Some(outlook) = &status.outlook {
        for (name, text) in heat::outlook(outlook) {
            row(&mut out, name, &text);
        }
    }
    if let Some(shipped) = status.shipped_bytes {
        row(&mut out, "shipped", &Bytes(shipped).to_string());
    }
    if let Some(counts) = status.counts {
        let text = format!(
            "{} whole, {} as changes, {} as copies, {} zero, {} the same",
            counts.raw, counts.delta, counts.dup, counts.zero, counts.same
        );
        row(&mut out, "pages", &text);
    }
    if let Some(encode) = &status.encode {
        row(&mut out, "batches", &batches(encode));
        let text = format!(
            "{} of use, {} missing, {} of no use, {} made room",
            encode.cache_hits, encode.cache_misses, encode.cache_useless, encode.cache_evictions
        );
        row(&mut out, "kept pages", &text);
    }
    if status.role == Role::Source {
        let pause = status
            .predicted_pause_ms
            .map_or_else(|| "cannot be predicted".to_owned(), |ms| format!("{ms:.1} ms"));
        row(&mut out, "pause if now", &pause);
    }
    if let Some(committed) = &status.committed {
        row(&mut out, "committed", &self::committed(status, committed));
    }
    for reason in &status.reasons {
        row(&mut out, "not ready", reason);
    }
    for path in &status.paths {
        row(&mut out, &format!("path {}", path.id), &path_text(path));
    }
    if let Some(link) = &status.link {
        let LinkTexts {
            parity,
            resent,
            reinjected,
        } = LinkTexts::of(link);
        row(
            &mut out,
            "link",
            &format!("{parity} parity, {resent} sent again, {reinjected} sent twice in time"),
        );
    }
    if let Some(job) = &status.job {
        let text = match (job.state, &job.error) {
            (JobState::Running, _) => "under way".to_owned(),
            (JobState::Done, _) => "done".to_owned(),
            (JobState::Failed, error) => format!("failed: {}", error.as_deref().unwrap_or("no reason given")),
        };
        let name = match job.kind {
            JobKind::Migrate => "switchover",
            JobKind::Snapshot => "snapshot",
            JobKind::Cut => "cut",
        };
        row(&mut out, name, &text);
    }
    if let Some(error) = &status.last_error {
        row(&mut out, "last error", error);
    }
    row(&mut out, "identity", &status.identity);
    out
}

fn committed(status: &Status, committed: &CommittedEpoch) -> String {
    let mut text = format!("epoch {}, {} old", committed.epoch, seconds(committed.age_ms));
    if let Some(cut) = &committed.cut {
        let _ = write!(text, ", {:.1} ms of pause for {} pages", cut.pause_ms, cut.pages);
    }
    if let (Some(staged), Some(staging)) = (status.staged_bytes, status.staging_bytes) {
        let _ = write!(text, ", {} of {} put aside for it", Bytes(staged), Bytes(staging));
    }
    text
}

/// What a cut did, in words.
pub(crate) fn cut(report: &CutReport) -> String {
    let parts = report.breakdown_ms;
    let capture = match report.capture {
        Capture::Copy => "copied",
        Capture::Parallel => "copied by several threads",
        Capture::Protect => "write-protected",
    };
    format!(
        "epoch {} is committed: {:.1} ms of pause (stop {:.1}, harvest {:.1}, save {:.1}, capture {:.1}, resume {:.1}), \
         {} pages {capture}, {} sent, {} in all",
        report.epoch,
        report.pause_ms,
        parts.stop,
        parts.harvest,
        parts.save,
        parts.capture,
        parts.resume,
        report.pages,
        Bytes(report.bytes),
        seconds(report.total_ms)
    )
}

fn batches(encode: &EncodeStatus) -> String {
    let mut text = format!(
        "{} as they are, {} by lz4, {} by zstd",
        encode.batches_none, encode.batches_lz4, encode.batches_zstd
    );
    if encode.bytes_before > encode.bytes_after {
        let _ = write!(
            text,
            "; {} became {}",
            Bytes(encode.bytes_before),
            Bytes(encode.bytes_after)
        );
    }
    text
}

struct LinkTexts {
    parity: Bytes,
    resent: Bytes,
    reinjected: Bytes,
}

impl LinkTexts {
    const fn of(link: &crate::api::types::LinkStatus) -> Self {
        Self {
            parity: Bytes(link.parity_bytes),
            resent: Bytes(link.resent_bytes),
            reinjected: Bytes(link.reinjected_bytes),
        }
    }
}

fn row(out: &mut String, name: &str, text: &str) {
    let _ = writeln!(out, "{name:<13} {text}");
}

fn guest(status: &Status) -> String {
    let state = match status.guest_state {
        GuestState::Running => "running",
        GuestState::Paused => "paused",
        GuestState::Switching => "being moved",
        GuestState::HandedOver => "handed over, unconfirmed",
        GuestState::Elsewhere if status.guest.is_none() => "none yet",
        GuestState::Elsewhere => "elsewhere",
        GuestState::Ended => "over",
    };
    let mut text = format!("{}, {state}", status.name);
    if let (Some(vcpus), Some(memory)) = (status.vcpus, status.memory_bytes) {
        let plural = if vcpus == 1 { "" } else { "s" };
        let _ = write!(text, ", {vcpus} vCPU{plural}, {}", Bytes(memory));
    }
    if let Some(term) = status.term {
        let _ = write!(text, ", term {term}");
    }
    text
}

fn session(status: &Status, phase: &str) -> String {
    let seeded = status.seeded.map(percent);
    match (status.role, seeded) {
        (Role::Shadow, Some(complete)) => format!("{phase}, {complete} complete"),
        (_, Some(seeded)) => format!("{phase}, {seeded} seeded"),
        (_, None) => phase.to_owned(),
    }
}

fn path_text(path: &PathStatus) -> String {
    let from = path
        .local
        .as_ref()
        .map_or_else(String::new, |local| format!("{local} to "));
    let to = path.remote.as_deref().unwrap_or("somewhere");
    format!(
        "{:<7} {from}{to}, {:.1} ms, {:.1} Mbit/s, {} lost, {} ({})",
        path.state,
        path.rtt_ms,
        path.rate_mbit,
        percent(path.loss),
        Bytes(path.bytes),
        percent(path.share),
    )
}

fn seconds(ms: f64) -> String {
    format!("{:.1} s", ms / 1e3)
}

/// The end of a switchover, and where its pause went.
pub(crate) fn report(report: &SwitchoverReport) -> String {
    let mut out = String::new();
    let to = if report.to.is_empty() {
        "its shadow".to_owned()
    } else {
        report.to.join(" ")
    };
    let _ = writeln!(
        out,
        "moved to {to} in term {}: paused {:.1} ms ({:.1} predicted), {} altogether",
        report.term,
        report.pause_ms,
        report.predicted_ms,
        seconds(report.total_ms)
    );
    for (name, part) in report.breakdown_ms.parts() {
        let share = if report.pause_ms > 0.0 {
            part / report.pause_ms
        } else {
            0.0
        };
        let _ = writeln!(out, "  {name:<9} {part:>9.3} ms {:>7}", percent(share));
    }
    let counts = report.final_counts;
    let _ = write!(
        out,
        "last {} pages in {}: {} whole, {} as changes, {} as copies, {} zero, {} the same; {}",
        report.stop_pages,
        Bytes(report.final_bytes),
        counts.raw,
        counts.delta,
        counts.dup,
        counts.zero,
        counts.same,
        if report.audited {
            "all of memory compared"
        } else {
            "digest compared"
        }
    );
    out
}

/// What a snapshot is, and where its pause went.
pub(crate) fn snapshot(report: &SnapshotReport) -> String {
    let mut out = String::new();
    let kind = match report.kind {
        SnapshotKind::Full => "a full snapshot",
        SnapshotKind::Differential => "a differential snapshot",
    };
    let _ = writeln!(
        out,
        "{kind}, {} on disk, in {}: paused {:.1} ms, {} altogether",
        Bytes(report.bytes),
        report.to.display(),
        report.pause_ms,
        seconds(report.total_ms)
    );
    for (name, part) in report.breakdown_ms.parts() {
        let _ = writeln!(out, "  {name:<9} {part:>9.3} ms");
    }
    let counts = report.counts;
    let _ = write!(
        out,
        "{} whole, {} as copies, {} zero, {} the same; the last {} pages in the pause; {}",
        counts.raw,
        counts.dup,
        counts.zero,
        counts.same,
        report.stop_pages,
        if report.audited {
            "all of memory compared"
        } else {
            "digest kept"
        }
    );
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::api::types::{Breakdown, EncodeStatus, LinkStatus, PageCounts};

    fn path(id: u16, state: &str) -> PathStatus {
        PathStatus {
            id,
            local: (id == 1).then(|| "192.0.2.9:0".to_owned()),
            remote: Some(format!("192.0.2.{id}:7000")),
            state: state.to_owned(),
            rtt_ms: 20.04,
            rate_mbit: 98.76,
            loss: 0.001,
            bytes: 5 << 20,
            share: 0.5,
            outstanding_bytes: 0,
            suspected: 0,
            died: 0,
        }
    }

    /// A source in the middle of its work.
    pub(crate) fn source() -> Status {
        Status {
            version: "0.1.0".to_owned(),
            pid: 4711,
            uptime_ms: 12_345.6,
            role: Role::Source,
            name: "web-1".to_owned(),
            guest: Some("ab".repeat(16)),
            guest_state: GuestState::Running,
            term: Some(1),
            vcpus: Some(2),
            memory_bytes: Some(256 << 20),
            identity: "cd".repeat(32),
            listen: Vec::new(),
            peer: Some("ef".repeat(32)),
            phase: Some("following".to_owned()),
            epoch: Some(1),
            pages: Some(65_536),
            seeded: Some(1.0),
            debt: Some(512),
            deferred: Some(12),
            latest_harvest: Some(400),
            outlook: None,
            predicted_pause_ms: Some(12.3),
            shipped_bytes: Some(10 << 20),
            counts: Some(PageCounts {
                same: 100,
                zero: 200,
                delta: 300,
                raw: 400,
                dup: 50,
            }),
            encode: Some(EncodeStatus {
                batches_none: 1,
                batches_lz4: 20,
                batches_zstd: 3,
                bytes_before: 30 << 20,
                bytes_after: 10 << 20,
                cache_hits: 300,
                cache_misses: 40,
                cache_useless: 5,
                cache_evictions: 6,
            }),
            switching: false,
            cutting: false,
            committed: None,
            staged_bytes: None,
            staging_bytes: None,
            reasons: vec!["the shadow says: 80.0 % complete, 90.0 % wanted".to_owned()],
            paths: vec![path(0, "up"), path(1, "silent")],
            link: Some(LinkStatus {
                blocks_sent: 10,
                blocks_delivered: 9,
                blocks_received: 0,
                parity_bytes: 1024,
                resent_bytes: 2048,
                reinjected_bytes: 0,
                stripes_repaired: 0,
            }),
            job: None,
            last_switchover: None,
            last_error: Some("path 1: 192.0.2.1:7000 does not answer: timed out".to_owned()),
            exit: None,
        }
    }

    #[test]
    fn a_source_shows_what_an_operator_asks_first() {
        let expected = format!(
            "\
guest         web-1, running, 2 vCPUs, 256.0 MiB, term 1
this process  source, pid 4711, up 12.3 s
session       following, 100.0 % seeded
behind by     512 pages (2.0 MiB), 400 written at the last look
shipped       10.0 MiB
pages         400 whole, 300 as changes, 50 as copies, 200 zero, 100 the same
batches       1 as they are, 20 by lz4, 3 by zstd; 30.0 MiB became 10.0 MiB
kept pages    300 of use, 40 missing, 5 of no use, 6 made room
pause if now  12.3 ms
not ready     the shadow says: 80.0 % complete, 90.0 % wanted
path 0        up      192.0.2.0:7000, 20.0 ms, 98.8 Mbit/s, 0.1 % lost, 5.0 MiB (50.0 %)
path 1        silent  192.0.2.9:0 to 192.0.2.1:7000, 20.0 ms, 98.8 Mbit/s, 0.1 % lost, 5.0 MiB (50.0 %)
link          1.0 KiB parity, 2.0 KiB sent again, 0 B sent twice in time
last error    path 1: 192.0.2.1:7000 does not answer: timed out
identity      {}
",
            "cd".repeat(32)
        );
        assert_eq!(text(&source()), expected);
    }

    #[test]
    fn a_shadow_nobody_came_to_says_where_it_listens() {
        let status = Status {
            role: Role::Shadow,
            name: "shadow".to_owned(),
            guest: None,
            guest_state: GuestState::Elsewhere,
            term: None,
            vcpus: None,
            memory_bytes: None,
            listen: vec!["quic:127.0.0.1:7000".to_owned()],
            phase: Some("listening".to_owned()),
            seeded: None,
            debt: None,
            counts: None,
            encode: None,
            shipped_bytes: None,
            reasons: Vec::new(),
            paths: Vec::new(),
            link: None,
            last_error: None,
            ..source()
        };
        let text = text(&status);
        assert!(
            text.starts_with("guest         shadow, none yet\nthis process  shadow, pid 4711"),
            "{text}"
        );
        assert!(
            text.contains("listening on  quic:127.0.0.1:7000\nsession       listening\n"),
            "{text}"
        );
    }

    #[test]
    fn a_report_shows_where_the_pause_went_and_what_was_predicted() {
        let report = SwitchoverReport {
            guest: "ab".repeat(16),
            to: vec!["quic:192.0.2.1:7000".to_owned()],
            epoch: 2,
            term: 2,
            total_ms: 1_234.5,
            rounds: 3,
            predicted_ms: 9.0,
            pause_ms: 10.0,
            breakdown_ms: Breakdown {
                stop: 0.25,
                transfer: 7.5,
                resume: 2.25,
                ..Breakdown::default()
            },
            stop_pages: 64,
            final_bytes: 70_000,
            final_counts: PageCounts {
                same: 1,
                zero: 2,
                delta: 3,
                raw: 4,
                dup: 5,
            },
            audited: true,
        };
        assert_eq!(
            super::report(&report),
            "\
moved to quic:192.0.2.1:7000 in term 2: paused 10.0 ms (9.0 predicted), 1.2 s altogether
  stop          0.250 ms   2.5 %
  harvest       0.000 ms   0.0 %
  save          0.000 ms   0.0 %
  encode        0.000 ms   0.0 %
  transfer      7.500 ms  75.0 %
  apply         0.000 ms   0.0 %
  verify        0.000 ms   0.0 %
  restore       0.000 ms   0.0 %
  resume        2.250 ms  22.5 %
last 64 pages in 68.4 KiB: 4 whole, 3 as changes, 5 as copies, 2 zero, 1 the same; all of memory compared"
        );
    }

    #[test]
    fn a_snapshot_shows_where_it_is_and_where_the_pause_went() {
        let report = SnapshotReport {
            id: "ab".repeat(16),
            guest: "cd".repeat(16),
            to: "/snapshots/tuesday".into(),
            kind: SnapshotKind::Differential,
            cut: 2,
            total_ms: 250.0,
            pause_ms: 1.25,
            breakdown_ms: crate::api::types::CutBreakdown {
                stop: 0.25,
                encode: 1.0,
                ..Default::default()
            },
            rounds: 2,
            stop_pages: 40,
            counts: PageCounts {
                same: 1,
                zero: 2,
                delta: 0,
                raw: 300,
                dup: 6,
            },
            bytes: 1_300_000,
            audited: false,
        };
        let text = snapshot(&report);
        assert!(
            text.starts_with(
                "a differential snapshot, 1.2 MiB on disk, in /snapshots/tuesday: paused 1.2 ms, 0.2 s altogether\n"
            ),
            "{text}"
        );
        assert!(text.contains("\n  encode        1.000 ms\n"), "{text}");
        assert!(
            text.ends_with("300 whole, 6 as copies, 2 zero, 1 the same; the last 40 pages in the pause; digest kept"),
            "{text}"
        );
    }
}
