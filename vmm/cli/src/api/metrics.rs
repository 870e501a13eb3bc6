//! The status as Prometheus reads it: one line per number, named with its unit.

use core::fmt::{Display, Write};

use crate::api::types::{Counters, GuestState, Outlook, Role, Status, VcpuCounters};

/// The text of `GET /api/v1/metrics`.
pub(crate) fn text(status: &Status, counters: &Counters) -> String {
    let mut page = Page(String::new());
    page.one("umbra_uptime_seconds", "counter", status.uptime_ms / 1e3);
    page.head("umbra_role", "gauge");
    for (name, role) in [
        ("running", Role::Running),
        ("source", Role::Source),
        ("shadow", Role::Shadow),
    ] {
        page.line("umbra_role", &format!("role=\"{name}\""), u8::from(status.role == role));
    }
    let runs = matches!(status.guest_state, GuestState::Running | GuestState::Switching);
    page.one("umbra_guest_running", "gauge", u8::from(runs));
    page.some("umbra_guest_memory_bytes", "gauge", status.memory_bytes);
    page.some("umbra_term", "gauge", status.term);
    page.some("umbra_pages", "gauge", status.pages);
    page.some("umbra_seeded_ratio", "gauge", status.seeded);
    page.some("umbra_debt_pages", "gauge", status.debt);
    page.some("umbra_latest_harvest_pages", "gauge", status.latest_harvest);
    page.some("umbra_deferred_pages", "gauge", status.deferred);
    if let Some(outlook) = &status.outlook {
        page.outlook(outlook);
    }
    page.some(
        "umbra_predicted_pause_seconds",
        "gauge",
        status.predicted_pause_ms.map(|ms| ms / 1e3),
    );
    page.some("umbra_shipped_bytes_total", "counter", status.shipped_bytes);
    if let Some(counts) = status.counts {
        page.head("umbra_shipped_pages_total", "counter");
        for (encoding, count) in [
            ("same", counts.same),
            ("zero", counts.zero),
            ("delta", counts.delta),
            ("raw", counts.raw),
            ("dup", counts.dup),
        ] {
            page.line("umbra_shipped_pages_total", &format!("encoding=\"{encoding}\""), count);
        }
    }
    if let Some(encode) = &status.encode {
        page.head("umbra_batches_total", "counter");
        for (method, count) in [
            ("none", encode.batches_none),
            ("lz4", encode.batches_lz4),
            ("zstd", encode.batches_zstd),
        ] {
            page.line("umbra_batches_total", &format!("method=\"{method}\""), count);
        }
        page.one("umbra_batch_bytes_before_total", "counter", encode.bytes_before);
        page.one("umbra_batch_bytes_after_total", "counter", encode.bytes_after);
        page.head("umbra_kept_pages_total", "counter");
        for (what, count) in [
            ("hit", encode.cache_hits),
            ("miss", encode.cache_misses),
            ("useless", encode.cache_useless),
            ("eviction", encode.cache_evictions),
        ] {
            page.line("umbra_kept_pages_total", &format!("what=\"{what}\""), count);
        }
    }
    page.some(
        "umbra_parity_bytes_total",
        "counter",
        status.link.as_ref().map(|link| link.parity_bytes),
    );
    page.some(
        "umbra_resent_bytes_total",
        "counter",
        status.link.as_ref().map(|link| link.resent_bytes),
    );
    if !status.paths.is_empty() {
        page.paths(status);
    }
    page.vcpus(counters);
    page.some("umbra_balloon_bytes", "gauge", counters.balloon_bytes);
    page.0
}

struct Page(String);

impl Page {
    fn outlook(&mut self, outlook: &Outlook) {
        self.head("umbra_dirty_pages", "gauge");
        for dirty in &outlook.dirty {
            let within = format!("within_ms=\"{:.0}\"", dirty.span_ms);
            self.line("umbra_dirty_pages", &within, dirty.pages);
        }
        self.one(
            "umbra_link_pages_per_second",
            "gauge",
            outlook.link_pages_per_second.round(),
        );
        self.head("umbra_debt_floor_pages", "gauge");
        for (order, floor) in [("round", outlook.floor_round), ("cold-first", outlook.floor_cold)] {
            if let Some(floor) = floor {
                self.line("umbra_debt_floor_pages", &format!("order=\"{order}\""), floor.pages);
            }
        }
        self.some("umbra_converges", "gauge", outlook.converges.map(u8::from));
        self.head("umbra_heat_pages", "gauge");
        for (class, pages) in outlook.classes.named() {
            self.line("umbra_heat_pages", &format!("class=\"{class}\""), pages);
        }
    }

    fn vcpus(&mut self, counters: &Counters) {
        if counters.vcpus.is_empty() {
            return;
        }
        self.head("umbra_vcpu_exits_total", "counter");
        for (n, vcpu) in counters.vcpus.iter().enumerate() {
            for (kind, count) in &vcpu.exits {
                self.line(
                    "umbra_vcpu_exits_total",
                    &format!("vcpu=\"{n}\",kind=\"{kind}\""),
                    count,
                );
            }
        }
        self.head("umbra_vcpu_emulated_total", "counter");
        for (n, vcpu) in counters.vcpus.iter().enumerate() {
            for (name, count) in &vcpu.emulated {
                let labels = format!("vcpu=\"{n}\",instruction=\"{name}\"");
                self.line("umbra_vcpu_emulated_total", &labels, count);
            }
        }
        self.head("umbra_captures_total", "counter");
        let captures = &counters.captures;
        for (by, count) in [
            ("copy", captures.copy),
            ("parallel-copy", captures.parallel_copy),
            ("protect", captures.protect),
        ] {
            self.line("umbra_captures_total", &format!("by=\"{by}\""), count);
        }
        self.one("umbra_capture_faults_total", "counter", captures.faults);
        self.of_vcpus("umbra_vcpu_written_pages_total", "counter", counters, |vcpu| {
            vcpu.written_pages
        });
        self.of_vcpus("umbra_vcpu_written_pages_per_second", "gauge", counters, |vcpu| {
            vcpu.written_pages_per_second
        });
    }

    /// What is known of some vCPUs only.
    fn of_vcpus(&mut self, name: &str, kind: &str, counters: &Counters, of: impl Fn(&VcpuCounters) -> Option<u64>) {
        let known = counters.vcpus.iter().enumerate();
        let mut known = known.filter_map(|(n, vcpu)| Some((n, of(vcpu)?))).peekable();
        if known.peek().is_some() {
            self.head(name, kind);
        }
        for (n, value) in known {
            self.line(name, &format!("vcpu=\"{n}\""), value);
        }
    }
}

impl Page {
    fn head(&mut self, name: &str, kind: &str) {
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, value: impl Display) {
        self.head(name, kind);
        let _ = writeln!(self.0, "{name} {value}");
    }

    fn some(&mut self, name: &str, kind: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.one(name, kind, value);
        }
    }

    fn paths(&mut self, status: &Status) {
        self.head("umbra_path_up", "gauge");
        for path in &status.paths {
            self.line(
                "umbra_path_up",
                &format!("path=\"{}\"", path.id),
                u8::from(path.state == "up"),
            );
        }
        self.head("umbra_path_rtt_seconds", "gauge");
        for path in &status.paths {
            self.line(
                "umbra_path_rtt_seconds",
                &format!("path=\"{}\"", path.id),
                path.rtt_ms / 1e3,
            );
        }
        self.head("umbra_path_loss_ratio", "gauge");
        for path in &status.paths {
            self.line("umbra_path_loss_ratio", &format!("path=\"{}\"", path.id), path.loss);
        }
        self.head("umbra_path_bytes_total", "counter");
        for path in &status.paths {
            self.line("umbra_path_bytes_total", &format!("path=\"{}\"", path.id), path.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::source;

    #[test]
    fn every_number_has_a_type_and_a_unit_in_its_name() {
        let text = text(&source(), &Counters::default());
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let name = name.split('{').next().unwrap();
            assert!(text.contains(&format!("# TYPE {name} ")), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
        }
        assert!(
            text.contains("umbra_shipped_pages_total{encoding=\"delta\"} 300\n"),
            "{text}"
        );
        assert!(text.contains("umbra_path_up{path=\"1\"} 0\n"), "{text}");
        assert!(text.contains("umbra_predicted_pause_seconds 0.0123\n"), "{text}");
    }
}
