//! Capturing: what is read of a cut is what the guest held at that instant, whatever it does since.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Console, all_pages, image, kernel, logs, page_of, pages};
use umbra_core::guest::{CaptureBy, Captured, Guest, Harvest};
use umbra_machine::config::devices::{Devices, RngConfig};
use umbra_machine::{DirtyLog, Machine, MachineConfig, Sharing, Userfaultfd};
use umbra_units::{Bytes, Gpa, PAGE_SIZE, PageCount, PageSet, Pfn, SpaceId};

const WAYS: [CaptureBy; 3] = [CaptureBy::Copy, CaptureBy::ParallelCopy, CaptureBy::Protect];

/// Every way this host has, with both kinds of memory.
fn kinds() -> Vec<(CaptureBy, Sharing)> {
    let host = umbra_machine::probe().unwrap();
    let protects = matches!(
        host.userfaultfd,
        Userfaultfd::Full {
            write_protect: true,
            write_protect_shared: true
        }
    );
    if !protects {
        eprintln!("SKIPPED for write protection: userfaultfd here: {}", host.userfaultfd);
    }
    let ways = WAYS.into_iter().filter(|by| protects || *by != CaptureBy::Protect);
    ways.flat_map(|by| [(by, Sharing::Shared), (by, Sharing::Private)])
        .collect()
}

fn launch(sharing: Sharing, log: DirtyLog, mib: u64, cmdline: &str, console: &Console) -> Arc<Machine> {
    let config = MachineConfig::new(kernel(), 2, Bytes::mib(mib)).unwrap();
    let config = config.with_sharing(sharing).with_dirty_log(log);
    Machine::launch(&config.with_cmdline(cmdline).unwrap(), console.sinks()).unwrap()
}

/// Read what was captured, a few pages at a time and not in their order, and compare it with an image of the guest.
fn assert_captured(captured: &dyn Captured, wanted: &[Pfn], image: &[u8], when: &str) {
    let mut out = Vec::new();
    for some in wanted.chunks(7).rev() {
        out.clear();
        captured.read_pages(SpaceId::RAM, some, &mut out).unwrap();
        assert_eq!(out.len(), some.len() * PAGE_SIZE);
        for (page, bytes) in some.iter().zip(out.as_chunks::<PAGE_SIZE>().0) {
            let expected = page_of(image, usize::try_from(page.0).unwrap());
            assert!(bytes == expected, "{when}: page {page} is not as it was at the cut");
        }
    }
}

fn everything(machine: &Machine) -> Harvest {
    let space = &machine.spaces()[0];
    Harvest {
        dirty: vec![(SpaceId::RAM, space.present_set())],
    }
}

fn of_pages(machine: &Machine, pages: impl IntoIterator<Item = u64>) -> Harvest {
    let mut set = PageSet::new(machine.spaces()[0].pages);
    pages.into_iter().for_each(|page| {
        set.insert(Pfn(page));
    });
    Harvest {
        dirty: vec![(SpaceId::RAM, set)],
    }
}

#[test]
fn a_cut_of_two_busy_vcpus_is_one_instant_by_every_way() {
    needs_kvm!();
    for ((by, sharing), log) in kinds().into_iter().zip(logs().into_iter().cycle()) {
        let console = Console::default();
        let machine = launch(sharing, log, 32, "cpus=2 work=dirty wss=4M rate=0", &console);
        machine.track(true).unwrap();
        machine.resume().unwrap();
        console.wait_for("ready");
        for cut in 0..8 {
            let when = format!("{by:?}, {sharing:?}, {log:?}, cut {cut}");
            console.wait_more(2);
            machine.pause().unwrap();
            let mut written = machine.harvest().unwrap();
            machine.save().unwrap();
            written.join(&machine.harvest().unwrap());
            let now = image(&*machine);
            let captured = machine.capture(&written, Some(by)).unwrap();
            machine.resume().unwrap();
            assert_eq!(captured.by(), by, "{when}");
            // Read while the guest writes the same pages, or when it has written them all over again.
            if cut % 2 == 1 {
                console.wait_more(3);
            }
            let wanted = pages(&written);
            assert!(!wanted.is_empty());
            assert_captured(&*captured, &wanted, &now, &when);
            console.wait_more(1);
            assert_captured(&*captured, &wanted, &now, &format!("{when}, again"));
        }
        let counters = machine.counters().captures;
        let counts = [counters.copies, counters.parallel_copies, counters.protections];
        assert_eq!(counts.map(|count| count > 0), WAYS.map(|way| way == by), "{counters:?}");
        assert_eq!(machine.exit_reason(), None, "{}", console.text());
    }
}

#[test]
fn a_capture_that_is_dropped_lets_the_guest_go_on_and_the_next_is_right() {
    needs_kvm!();
    for (by, sharing) in kinds() {
        let console = Console::default();
        let machine = launch(
            sharing,
            DirtyLog::Bitmap,
            64,
            "cpus=2 work=dirty wss=16M rate=0",
            &console,
        );
        machine.resume().unwrap();
        console.wait_for("ready");
        for _ in 0..5 {
            machine.pause().unwrap();
            drop(machine.capture(&everything(&machine), Some(by)).unwrap());
            machine.resume().unwrap();
            console.wait_more(1);
            machine.pause().unwrap();
            let dropped_early = machine.capture(&everything(&machine), Some(by)).unwrap();
            machine.resume().unwrap();
            drop(dropped_early);
            console.wait_more(1);
        }
        machine.pause().unwrap();
        let now = image(&*machine);
        let captured = machine.capture(&everything(&machine), Some(by)).unwrap();
        machine.resume().unwrap();
        console.wait_more(2);
        let all = all_pages(&machine.spaces()[0]);
        assert_captured(&*captured, &all, &now, &format!("{by:?}, {sharing:?}"));
        // What was captured outlives the guest.
        drop(machine);
        assert_captured(&*captured, &all, &now, &format!("{by:?}, {sharing:?}, afterwards"));
        assert!(!console.text().contains("CORRUPT"), "{}", console.text());
    }
}

#[test]
fn two_captures_at_once_are_two_instants() {
    needs_kvm!();
    for (by, sharing) in kinds() {
        let console = Console::default();
        let machine = launch(
            sharing,
            DirtyLog::Bitmap,
            32,
            "cpus=2 work=dirty wss=8M rate=0",
            &console,
        );
        machine.resume().unwrap();
        console.wait_for("ready");
        let mut kept = Vec::new();
        for _ in 0..3 {
            machine.pause().unwrap();
            let now = image(&*machine);
            kept.push((machine.capture(&everything(&machine), Some(by)).unwrap(), now));
            machine.resume().unwrap();
            console.wait_more(1);
        }
        let all = all_pages(&machine.spaces()[0]);
        // The one in the middle goes first.
        for n in [1, 0, 0] {
            let (captured, now) = kept.remove(n);
            assert_captured(&*captured, &all, &now, &format!("{by:?}, {sharing:?}, {n}"));
        }
    }
}

#[test]
fn what_devices_write_to_captured_pages_waits_for_its_copy_and_nothing_hangs() {
    needs_kvm!();
    for (by, sharing) in kinds() {
        let console = Console::default();
        let config = MachineConfig::new(kernel(), 1, Bytes::mib(32))
            .unwrap()
            .with_sharing(sharing);
        let devices = Devices {
            rng: Some(RngConfig::default()),
            ..Devices::default()
        };
        let config = config.with_cmdline("work=rng").unwrap().with_devices(devices).unwrap();
        let machine = Machine::launch(&config, console.sinks()).unwrap();
        machine.resume().unwrap();
        console.wait_for("ready");
        let over = AtomicBool::new(false);
        // As a device does, to a page that the guest does not use.
        let own = Gpa(31 << 20);
        let write = |n: u8| machine.write_memory(own, &[n; PAGE_SIZE]).unwrap();
        write(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 0;
                while !over.load(Ordering::Relaxed) {
                    n = if n == 250 { 0 } else { n + 1 };
                    write(n);
                }
            });
            for cut in 0..10 {
                machine.pause().unwrap();
                let captured = machine.capture(&everything(&machine), Some(by)).unwrap();
                let mut first = Vec::new();
                captured.read_pages(SpaceId::RAM, &[own.pfn()], &mut first).unwrap();
                machine.resume().unwrap();
                console.wait_more(1);
                let mut again = Vec::new();
                captured.read_pages(SpaceId::RAM, &[own.pfn()], &mut again).unwrap();
                assert!(first == again, "{by:?}, {sharing:?}, cut {cut}");
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(machine.exit_reason(), None, "{}", console.text());
        assert!(!console.text().contains("CORRUPT"), "{}", console.text());
    }
}

#[test]
fn pages_that_nobody_touched_are_zeros_also_when_they_are_written_later() {
    needs_kvm!();
    for (by, sharing) in kinds() {
        let machine = launch(sharing, DirtyLog::Bitmap, 64, "", &Console::default());
        let first = (48 << 20) / PAGE_SIZE as u64;
        let wanted = of_pages(&machine, (first..first + 1000).step_by(3));
        let captured = machine.capture(&wanted, Some(by)).unwrap();
        for page in (first..first + 1000).step_by(2) {
            machine.write_memory(Pfn(page).gpa(), &[9; 100]).unwrap();
        }
        let mut out = Vec::new();
        let list = pages(&wanted);
        captured.read_pages(SpaceId::RAM, &list, &mut out).unwrap();
        assert_eq!(out.len(), list.len() * PAGE_SIZE);
        assert!(out.iter().all(|byte| *byte == 0), "{by:?}, {sharing:?}");
    }
}

#[test]
fn a_guest_that_is_booted_again_does_not_spoil_what_was_captured() {
    needs_kvm!();
    for (by, sharing) in kinds() {
        let console = Console::default();
        let machine = launch(
            sharing,
            DirtyLog::Bitmap,
            32,
            "cpus=2 work=dirty wss=4M rate=0",
            &console,
        );
        machine.resume().unwrap();
        console.wait_for("ready");
        machine.pause().unwrap();
        let now = image(&*machine);
        let captured = machine.capture(&everything(&machine), Some(by)).unwrap();
        machine.reset().unwrap();
        machine.resume().unwrap();
        console.wait_more(20);
        let all = all_pages(&machine.spaces()[0]);
        assert_captured(&*captured, &all, &now, &format!("{by:?}, {sharing:?}"));
    }
}

#[test]
fn the_way_is_chosen_by_prediction_unless_somebody_insists() {
    needs_kvm!();
    let machine = launch(Sharing::Shared, DirtyLog::Bitmap, 64, "", &Console::default());
    machine.track(true).unwrap();
    let few = machine.capture(&of_pages(&machine, 0..4), None).unwrap();
    // Which it is depends on what this host was doing when it was measured; `predict` has tests of its own.
    let all = machine.capture(&everything(&machine), None).unwrap();
    let counters = machine.counters().captures;
    assert_eq!(counters.copies + counters.parallel_copies + counters.protections, 2);
    drop((few, all));
}

#[test]
fn what_cannot_be_captured_or_read_is_refused() {
    needs_kvm!();
    let machine = launch(Sharing::Shared, DirtyLog::Bitmap, 16, "", &Console::default());
    for by in WAYS {
        let captured = machine.capture(&of_pages(&machine, [3, 5]), Some(by)).unwrap();
        let mut out = Vec::new();
        let line = |result: Result<(), umbra_core::guest::GuestError>| result.unwrap_err().to_string();
        assert_eq!(
            line(captured.read_pages(SpaceId::RAM, &[Pfn(3), Pfn(4)], &mut out)),
            "cannot read a page that was not captured"
        );
        assert!(line(captured.read_pages(SpaceId(1), &[Pfn(3)], &mut out)).starts_with("space 1"));
        let mut beyond = PageSet::new(PageCount(1 << 20));
        beyond.insert(Pfn(1 << 19));
        let harvest = |space| Harvest {
            dirty: vec![(space, beyond.clone())],
        };
        let refused = |harvest: &Harvest| machine.capture(harvest, Some(by)).err().unwrap().to_string();
        assert_eq!(
            refused(&harvest(SpaceId::RAM)),
            "page 0x80000: this guest has no such page"
        );
        assert!(refused(&harvest(SpaceId(1))).starts_with("space 1"));
    }
    machine.resume().unwrap();
    assert_eq!(
        machine.capture(&Harvest::default(), None).err().unwrap().to_string(),
        "cannot capture: the guest is running; pause it first"
    );
}
