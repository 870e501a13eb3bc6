//! Harvesting: no write falls between two harvests.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{Console, all_pages, assert_same, follow, image, launch, launch_with, logs, pages};
use umbra_core::guest::{Guest, Harvest, PageReader};
use umbra_machine::{DirtyLog, Machine, MachineConfig};
use umbra_units::{Bytes, Gpa, PageCount, Pfn, SpaceId};

#[test]
fn a_shadow_that_follows_busy_vcpus_is_equal_at_every_cut() {
    needs_kvm!();
    for (log, cpus) in logs().into_iter().zip([2, 3]) {
        let console = Console::default();
        let cmdline = format!("cpus={cpus} work=dirty wss=8M rate=0 fill=8M");
        let machine = launch_with(log, cpus, Bytes::mib(32), &cmdline, &console);
        machine.track(true).unwrap();
        let mut shadow = image(&*machine);
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
            assert_same(&shadow, &image(&*machine), &format!("{log:?}, cut {cut}"));
            assert_eq!(machine.harvest().unwrap(), Harvest::default(), "nothing is told twice");
            machine.resume().unwrap();
        }
        assert!(
            copied > 8192,
            "{log:?}: the guest wrote next to nothing: {copied} pages"
        );
        assert_eq!(machine.exit_reason(), None, "{}", console.text());
    }
}

#[test]
fn a_guest_that_fills_its_rings_while_nobody_harvests_loses_no_write() {
    needs_kvm!();
    for log in logs() {
        let console = Console::default();
        let machine = launch_with(log, 2, Bytes::mib(64), "cpus=2 work=dirty wss=24M rate=0", &console);
        machine.resume().unwrap();
        console.wait_for("ready");
        machine.track(true).unwrap();
        let mut shadow = image(&*machine);
        for cut in 0..5 {
            console.wait_more(20);
            machine.pause().unwrap();
            let written = follow(&machine, &mut shadow);
            assert_same(&shadow, &image(&*machine), &format!("{log:?}, cut {cut}"));
            assert!(cut == 0 || written < 16 << 10, "not everything: {written}");
            machine.resume().unwrap();
        }
        let counters = machine.counters().total();
        match log {
            DirtyLog::Ring(_) => {
                assert!(counters.exits["dirty_ring_full"] > 0, "it was never full: {counters:?}");
                let writes = counters.writes.expect("rings tell who writes");
                assert!(writes.pages > 1024, "{writes:?}");
                while machine.counters().total().writes.unwrap().pages_per_second == 0 {
                    console.wait_more(20);
                    machine.harvest().unwrap();
                }
            }
            _ => assert_eq!((counters.exits["dirty_ring_full"], counters.writes), (0, None)),
        }
    }
}

#[test]
fn full_rings_harvests_and_pauses_may_come_together() {
    needs_kvm!();
    for log in logs() {
        let console = Console::default();
        let machine = launch_with(log, 3, Bytes::mib(48), "cpus=3 work=dirty wss=16M rate=0", &console);
        machine.resume().unwrap();
        console.wait_for("ready");
        machine.track(true).unwrap();
        let mut shadow = image(&*machine);
        let over = AtomicBool::new(false);
        // What one thread harvests while the other pauses is put back: nobody copied it.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    machine.put_back(&machine.harvest().unwrap());
                }
            });
            for _ in 0..100 {
                console.wait_more(1);
                machine.pause().unwrap();
                machine.resume().unwrap();
            }
            over.store(true, Ordering::Relaxed);
        });
        machine.pause().unwrap();
        follow(&machine, &mut shadow);
        assert_same(&shadow, &image(&*machine), &format!("{log:?}"));
    }
}

#[test]
fn tracking_can_be_switched_off_and_on_while_the_guest_writes() {
    needs_kvm!();
    for log in logs() {
        let console = Console::default();
        let machine = launch_with(log, 2, Bytes::mib(16), "cpus=2 work=dirty wss=6M rate=0", &console);
        machine.resume().unwrap();
        for round in 0..4 {
            machine.track(true).unwrap();
            machine.track(true).unwrap();
            let mut shadow = image(&*machine);
            console.wait_more(5);
            follow(&machine, &mut shadow);
            machine.pause().unwrap();
            follow(&machine, &mut shadow);
            assert_same(&shadow, &image(&*machine), &format!("{log:?}, round {round}"));
            if round % 2 == 0 {
                machine.track(false).unwrap();
                machine.resume().unwrap();
            } else {
                machine.resume().unwrap();
                console.wait_more(5);
                machine.track(false).unwrap();
            }
            assert!(machine.harvest().is_err());
            console.wait_more(5);
        }
    }
}

#[test]
fn a_write_of_the_vmm_and_a_page_put_back_are_in_the_next_harvest() {
    needs_kvm!();
    for log in logs() {
        let machine = launch_with(log, 1, Bytes::mib(8), "", &Console::default());
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
}

#[test]
fn a_twin_records_writes_from_its_first_instruction_by_its_own_hosts_choice() {
    needs_kvm!();
    for (ours, theirs) in logs().into_iter().zip(logs().into_iter().rev()) {
        let console = Console::default();
        let machine = launch_with(ours, 2, Bytes::mib(16), "cpus=2 work=dirty wss=6M rate=0", &console);
        machine.resume().unwrap();
        console.wait_for("ready");
        machine.pause().unwrap();
        let ears = console.clone();
        let builder = Machine::builder(move || ears.sinks()).with_dirty_log(theirs);
        let twin = builder.build_machine(&machine.describe()).unwrap();
        let records = machine.save().unwrap();
        common::copy_memory(&*machine, &*twin);
        twin.restore(&records).unwrap();
        twin.track(true).unwrap();
        let mut shadow = image(&*machine);
        drop(machine);
        follow(&twin, &mut shadow);
        twin.resume().unwrap();
        console.wait_more(10);
        twin.pause().unwrap();
        follow(&twin, &mut shadow);
        assert_same(&shadow, &image(&*twin), &format!("{ours:?} to {theirs:?}"));
        let expected = if theirs == DirtyLog::Bitmap { "bitmap" } else { "ring" };
        assert_eq!(
            (twin.dirty_log().name(), &*twin.dirty_log().why),
            (expected, "asked for")
        );
    }
}

#[test]
fn a_log_that_is_chosen_says_why() {
    needs_kvm!();
    let config = MachineConfig::new(common::kernel(), 1, Bytes::mib(8)).unwrap();
    let machine = Machine::launch(&config, Console::default().sinks()).unwrap();
    let log = machine.dirty_log();
    let why = &log.why;
    assert!(
        why.starts_with("measured: ") || why == "this kernel has no dirty ring",
        "{why}"
    );
    assert_eq!(log.ring_entries.is_some(), log.name() == "ring");
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
