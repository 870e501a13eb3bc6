//! `umbra doctor`: what this host's KVM can do.

use serde_json::{Value, json};
use umbra_machine::{HostReport, Ring0, Userfaultfd, probe};

use crate::args::DoctorArgs;
use crate::exit::{Code, Failure};
use crate::say;

/// Find out and say it.
pub(crate) fn doctor(args: &DoctorArgs) -> Result<Code, Failure> {
    let report = probe()?;
    if args.json {
        say::line(format!("{:#}", to_json(&report)));
    } else {
        say::line(&report);
        for advice in advice(&report) {
            say::line(format!("note: {advice}"));
        }
    }
    Ok(Code::Success)
}

/// What an operator should know that the bare facts do not say.
fn advice(report: &HostReport) -> Vec<&'static str> {
    let mut advice = Vec::new();
    if report.ring0 == Ring0::Emulated {
        advice.push("this host virtualises in software; guests run, kernel code slowly, and only kernels made for it");
    }
    if !report.manual_dirty_log {
        advice.push("without a manual dirty log every harvest write-protects all of memory at once");
    }
    if report.eager_page_split == Some(false) {
        advice.push("large pages are split by the guest's own writes while these are recorded: load kvm with eager_page_split=Y");
    }
    if !report.tsc_scaling {
        advice.push("without TSC scaling a guest can only come from a host of the same TSC frequency");
    }
    advice
}

fn to_json(report: &HostReport) -> Value {
    let ring0 = match &report.ring0 {
        Ring0::Native => json!("native"),
        Ring0::Emulated => json!("emulated"),
        Ring0::Unknown(why) => json!({ "unknown": why }),
    };
    let userfaultfd = match &report.userfaultfd {
        Userfaultfd::No(why) => json!({ "no": why }),
        Userfaultfd::UserModeOnly => json!("user-mode-only"),
        Userfaultfd::Full {
            write_protect,
            write_protect_shared,
        } => {
            json!({ "write_protect": write_protect, "write_protect_shared": write_protect_shared })
        }
    };
    json!({
        "kvm_api_version": report.api_version,
        "vcpus_recommended": report.vcpus.0,
        "vcpus_max": report.vcpus.1,
        "guest_kernel_code": ring0,
        "manual_dirty_log": report.manual_dirty_log,
        "dirty_log_initially_set": report.dirty_log_initially_set,
        "dirty_ring_entries": report.dirty_ring_entries,
        "eager_page_split": report.eager_page_split,
        "userfaultfd": userfaultfd,
        "irqfd": report.irqfd,
        "ioeventfd": report.ioeventfd,
        "memfd": report.memfd,
        "xsave_bytes": report.xsave_bytes,
        "clock_realtime": report.clock_realtime,
        "tsc_khz": report.tsc_khz,
        "tsc_stable": report.tsc_stable,
        "tsc_scaling": report.tsc_scaling,
    })
}
