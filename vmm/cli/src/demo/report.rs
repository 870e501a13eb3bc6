//! What a demonstration showed, for people and for programs.

use core::fmt::Write;

use serde::Serialize;
use umbra_units::{Bytes, PAGE_SIZE};

use crate::api::types::{PageCounts, SwitchoverReport};
use crate::units::percent;

/// The whole of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Report {
    /// The program's version.
    pub(crate) version: String,
    /// Whether everything was as it should be.
    pub(crate) ok: bool,
    /// Everything that was not.
    pub(crate) problems: Vec<String>,
    /// How long it all took.
    pub(crate) took_s: f64,
    /// The guest that moved.
    pub(crate) guest: Guest,
    /// What happened when.
    pub(crate) timeline: Vec<Moment>,
    /// The networks.
    pub(crate) paths: Vec<Path>,
    /// How pages travelled until the switchover.
    pub(crate) counts: PageCounts,
    /// Bytes of batches until the switchover.
    pub(crate) shipped_bytes: u64,
    /// How long the first copy took.
    pub(crate) seeding_s: f64,
    /// The switchover, as the source saw it.
    pub(crate) switchover: SwitchoverReport,
    /// The move, as an outsider at the console saw it.
    pub(crate) outside: Outside,
    /// What became of the guest's memory.
    pub(crate) memory: Memory,
    /// How the two processes ended.
    pub(crate) exit_codes: ExitCodes,
}

/// The guest that moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Guest {
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) cmdline: String,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Moment {
    pub(crate) at_s: f64,
    pub(crate) what: String,
}

/// One network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Path {
    pub(crate) id: usize,
    pub(crate) rate_mbit: u64,
    pub(crate) rtt_ms: f64,
    pub(crate) loss: f64,
    /// When it was cut.
    pub(crate) cut: Option<String>,
    /// Bytes it brought to the shadow.
    pub(crate) delivered_bytes: u64,
    /// Its share of them.
    pub(crate) share: f64,
    /// Packets it lost, to weather and cuts.
    pub(crate) lost_packets: u64,
}

/// The move from outside.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Outside {
    /// How often the guest beats.
    pub(crate) beat_ms: f64,
    /// From the last beat at the source to the first at the shadow.
    pub(crate) gap_ms: Option<f64>,
    /// The longest silence at any other time.
    pub(crate) longest_elsewhere_ms: f64,
    pub(crate) beats_at_source: usize,
    pub(crate) beats_at_shadow: usize,
    /// Beats that did not follow the one before.
    pub(crate) out_of_order: usize,
}

/// What became of the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Both hosts compared every page while the guest was stopped, and found them equal.
    pub(crate) compared: bool,
    /// Page checks the guest had made by its own count, before and after.
    pub(crate) checked_by_guest: u64,
    /// What it found wrong.
    pub(crate) complaints: Vec<String>,
}

/// How the two processes ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct ExitCodes {
    pub(crate) source: Option<i32>,
    pub(crate) shadow: Option<i32>,
}

impl Report {
    /// For people, to be read in a minute.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        self.write_text(&mut out).expect("writing to a string");
        out
    }

    fn write_text(&self, out: &mut String) -> core::fmt::Result {
        let switchover = &self.switchover;
        writeln!(out, "\nWHAT THE WORLD SAW")?;
        match self.outside.gap_ms {
            Some(gap) => writeln!(
                out,
                "  The guest beats every {:.0} ms. It was silent for {gap:.1} ms when it moved; at any other time for {:.1} ms at most.",
                self.outside.beat_ms, self.outside.longest_elsewhere_ms
            )?,
            None => writeln!(out, "  The guest was not heard at both hosts.")?,
        }
        writeln!(
            out,
            "  {} beats at the source, {} at the shadow, {}.",
            self.outside.beats_at_source,
            self.outside.beats_at_shadow,
            match self.outside.out_of_order {
                0 => "none lost and none said twice".to_owned(),
                some => format!("{some} out of order"),
            }
        )?;
        writeln!(
            out,
            "\nWHERE THE PAUSE WENT  ({:.1} ms as the source saw it)",
            switchover.pause_ms
        )?;
        for (name, part) in switchover.breakdown_ms.parts() {
            writeln!(out, "  {name:<9} {part:>8.2} ms  {}", bar(part, switchover.pause_ms))?;
        }
        let verify = switchover.breakdown_ms.verify;
        writeln!(
            out,
            "  Predicted {:.1} ms without comparing memory; it was {:.1} ms, and {verify:.1} ms to compare every page of both.",
            switchover.predicted_ms,
            switchover.pause_ms - verify
        )?;
        writeln!(out, "\nTHE NETWORKS")?;
        for path in &self.paths {
            let cut = path.cut.as_ref().map_or_else(String::new, |cut| format!(", cut {cut}"));
            writeln!(
                out,
                "  path {}: {:>3} Mbit/s, {:>2.0} ms, {:>5} loss{cut}: brought {} ({}), lost {} packets",
                path.id,
                path.rate_mbit,
                path.rtt_ms,
                percent(path.loss),
                Bytes(path.delivered_bytes),
                percent(path.share),
                path.lost_packets
            )?;
        }
        self.write_memory(out)?;
        if self.ok {
            writeln!(out, "\nALL WELL, in {:.1} s.", self.took_s)
        } else {
            writeln!(out, "\nNOT AS IT SHOULD BE:")?;
            self.problems
                .iter()
                .try_for_each(|problem| writeln!(out, "  {problem}"))
        }
    }

    fn write_memory(&self, out: &mut String) -> core::fmt::Result {
        let PageCounts {
            same,
            zero,
            delta,
            raw,
            dup,
        } = self.counts;
        writeln!(out, "\nTHE MEMORY")?;
        writeln!(
            out,
            "  First copy in {:.1} s; {} of pages became {} until the switchover:",
            self.seeding_s,
            Bytes((same + zero + delta + raw + dup).saturating_mul(PAGE_SIZE as u64)),
            Bytes(self.shipped_bytes)
        )?;
        writeln!(
            out,
            "  {raw} pages went whole, {delta} as changes, {dup} as copies, {zero} as zero, {same} not at all (unchanged)."
        )?;
        let compared = if self.memory.compared {
            "compared page by page while stopped: equal"
        } else {
            "not compared"
        };
        writeln!(out, "  Both copies {compared}.")?;
        writeln!(
            out,
            "  The guest checked {} pages by itself, before and after: {}.",
            self.memory.checked_by_guest,
            match self.memory.complaints.first() {
                None => "all as it had written them".to_owned(),
                Some(first) => format!("it found {} wrong, first: {first}", self.memory.complaints.len()),
            }
        )
    }
}

/// A part of a whole, to be seen at a glance.
fn bar(part: f64, whole: f64) -> String {
    const WIDTH: f64 = 40.0;
    let share = if whole > 0.0 {
        (part / whole).clamp(0.0, 1.0)
    } else {
        0.0
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 40"
    )]
    let length = (share * WIDTH).round() as usize;
    "#".repeat(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::Breakdown;

    fn report() -> Report {
        Report {
            version: "0.1.0".to_owned(),
            ok: true,
            problems: Vec::new(),
            took_s: 12.3,
            guest: Guest {
                vcpus: 2,
                memory_bytes: 256 << 20,
                cmdline: "cpus=2".to_owned(),
            },
            timeline: Vec::new(),
            paths: vec![Path {
                id: 0,
                rate_mbit: 400,
                rtt_ms: 2.0,
                loss: 0.005,
                cut: Some("while the first copy was under way".to_owned()),
                delivered_bytes: 10 << 20,
                share: 0.4,
                lost_packets: 12,
            }],
            counts: PageCounts {
                same: 1,
                zero: 2,
                delta: 3,
                raw: 250,
                dup: 4,
            },
            shipped_bytes: 512 << 10,
            seeding_s: 2.5,
            switchover: SwitchoverReport {
                guest: "ab".repeat(16),
                to: Vec::new(),
                epoch: 1,
                term: 2,
                total_ms: 100.0,
                rounds: 2,
                predicted_ms: 9.0,
                pause_ms: 20.0,
                breakdown_ms: Breakdown {
                    transfer: 10.0,
                    verify: 10.0,
                    ..Breakdown::default()
                },
                stop_pages: 10,
                final_bytes: 1000,
                final_counts: PageCounts::default(),
                audited: true,
            },
            outside: Outside {
                beat_ms: 2.0,
                gap_ms: Some(21.5),
                longest_elsewhere_ms: 4.2,
                beats_at_source: 3000,
                beats_at_shadow: 1000,
                out_of_order: 0,
            },
            memory: Memory {
                compared: true,
                checked_by_guest: 123_456,
                complaints: Vec::new(),
            },
            exit_codes: ExitCodes {
                source: Some(0),
                shadow: Some(0),
            },
        }
    }

    #[test]
    fn a_newcomer_reads_what_happened_in_a_minute() {
        let expected = "
WHAT THE WORLD SAW
  The guest beats every 2 ms. It was silent for 21.5 ms when it moved; at any other time for 4.2 ms at most.
  3000 beats at the source, 1000 at the shadow, none lost and none said twice.

WHERE THE PAUSE WENT  (20.0 ms as the source saw it)
  stop          0.00 ms  
  harvest       0.00 ms  
  save          0.00 ms  
  encode        0.00 ms  
  transfer     10.00 ms  ####################
  apply         0.00 ms  
  verify       10.00 ms  ####################
  restore       0.00 ms  
  resume        0.00 ms  
  Predicted 9.0 ms without comparing memory; it was 10.0 ms, and 10.0 ms to compare every page of both.

THE NETWORKS
  path 0: 400 Mbit/s,  2 ms, 0.5 % loss, cut while the first copy was under way: brought 10.0 MiB (40.0 %), lost 12 packets

THE MEMORY
  First copy in 2.5 s; 1.0 MiB of pages became 512.0 KiB until the switchover:
  250 pages went whole, 3 as changes, 4 as copies, 2 as zero, 1 not at all (unchanged).
  Both copies compared page by page while stopped: equal.
  The guest checked 123456 pages by itself, before and after: all as it had written them.

ALL WELL, in 12.3 s.
";
        assert_eq!(report().text(), expected);
    }

    #[test]
    fn what_went_wrong_is_said_last_and_plainly() {
        let problems = vec!["the guest found its memory corrupt".to_owned()];
        let text = Report {
            ok: false,
            problems,
            ..report()
        }
        .text();
        assert!(
            text.ends_with("\nNOT AS IT SHOULD BE:\n  the guest found its memory corrupt\n"),
            "{text}"
        );
    }
}
