//! Harvesting: no write falls between two harvests.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use common::{Console, all_pages, follow, image, launch, page_of, pages};
use umbra_core::guest::{Guest, Harvest, PageReader};
use umbra_units::{Bytes, Gpa, PAGE_SIZE, PageCount, Pfn, SpaceId};

#[test]
fn a_shadow_that_follows_two_busy_vcpus_is_equal_at_every_cut() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(32), "cpus=2 work=dirty wss=8M rate=0 fill=8M", &console);
    let mut shadow = vec![0; 32 << 20];
    machine.track(true).unwrap();
    machine.resume().unwrap();
    let mut copied = 0;
    for cut in 0..20 {
        for _ in 0..5 {
            console.wait_more(1);
            copied += follow(&machine, &mut shadow);
        }
        machine.pause().unwrap();
        machine.save().unwrap();
        copied += follow(&machine, &mut shadow);
        let now = image(&*machine);
        let wrong: Vec<usize> = (0..now.len() / PAGE_SIZE)
            .filter(|n| page_of(&now, *n) != page_of(&shadow, *n))
            .collect();
        assert!(
            wrong.is_empty(),
            "cut {cut}: {} pages differ, first {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(8)]
        );
        machine.resume().unwrap();
    }
    assert!(copied > 8192, "the guest wrote next to nothing: {copied} pages");
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn tracking_can_be_switched_off_and_on_while_the_guest_writes() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=dirty wss=2M rate=0", &console);
    machine.resume().unwrap();
    for _ in 0..3 {
        machine.track(true).unwrap();
        machine.track(true).unwrap();
        let mut shadow = image(&*machine);
        console.wait_more(5);
        follow(&machine, &mut shadow);
        machine.pause().unwrap();
        follow(&machine, &mut shadow);
        assert!(shadow == image(&*machine));
        machine.track(false).unwrap();
        assert!(machine.harvest().is_err());
        machine.resume().unwrap();
        console.wait_more(5);
    }
}

#[test]
fn a_write_of_the_vmm_and_a_page_put_back_are_in_the_next_harvest() {
    needs_kvm!();
    let machine = launch(1, Bytes::mib(8), "", &Console::default());
    machine.track(true).unwrap();
    machine.harvest().unwrap();
    assert_eq!(
        machine.harvest().unwrap(),
        Harvest::default(),
        "a guest that does not run writes nothing"
    );
    machine.write_memory(Gpa(0x3_0ffe), b"four").unwrap();
    let written = machine.harvest().unwrap();
    assert_eq!(pages(&written), [Pfn(0x30), Pfn(0x31)]);
    assert_eq!(written.count(), PageCount(2));
    assert_eq!(machine.harvest().unwrap(), Harvest::default());
    machine.put_back(&written);
    machine.write_memory(Gpa(0), b"x").unwrap();
    assert_eq!(pages(&machine.harvest().unwrap()), [Pfn(0), Pfn(0x30), Pfn(0x31)]);
    assert_eq!(machine.harvest().unwrap(), Harvest::default());
}

#[test]
fn a_twin_is_tracked_from_its_first_instruction() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=dirty wss=2M rate=0", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    machine.pause().unwrap();
    let twin = common::move_to_twin(&*machine, &console);
    twin.track(true).unwrap();
    let mut shadow = image(&*machine);
    drop(machine);
    follow(&twin, &mut shadow);
    twin.resume().unwrap();
    console.wait_more(10);
    twin.pause().unwrap();
    follow(&twin, &mut shadow);
    assert!(shadow == image(&*twin));
}

#[test]
fn reading_memory_that_the_guest_never_touched_does_not_fill_it() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(1, Bytes::mib(512), "", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("RssShmem:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let all = all_pages(&machine.spaces()[0]);
    let before = resident();
    let mut out = Vec::new();
    for batch in all.chunks(4096) {
        out.clear();
        machine.read_pages(SpaceId::RAM, batch, &mut out).unwrap();
    }
    let grown = resident().saturating_sub(before);
    assert!(
        grown < 128 << 10,
        "{grown} KiB more after reading 512 MiB of which little was touched"
    );
}
