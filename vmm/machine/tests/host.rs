//! What this host can do.

mod common;

use umbra_machine::{Ring0, probe};

#[test]
fn the_host_is_described_by_trying() {
    needs_kvm!();
    let report = probe().unwrap();
    println!("{report}");
    assert_eq!(report.api_version, 12);
    assert!(report.vcpus.1 >= 1 && report.tsc_khz > 0 && report.memfd);
    assert!(!matches!(report.ring0, Ring0::Unknown(_)), "{report}");
    assert_eq!(report.to_string().lines().count(), 12);
}
