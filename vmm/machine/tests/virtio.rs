//! Virtio devices with real guests: the tiny kernel's drivers check everything they get, sleep until they are interrupted, and say
//! so when a request is never answered, answered twice, or answered with something else.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use common::{Console, PATIENCE, all_pages, copy_memory, image, kernel};
use tempfile::NamedTempFile;
use umbra_core::guest::{Guest, Harvest, PageReader};
use umbra_machine::config::devices::{Devices, DiskConfig, RngConfig};
use umbra_machine::{ExitReason, Machine, MachineConfig};
use umbra_units::{Bytes, PAGE_SIZE, SpaceId};

const DISK: u64 = 16 << 20;

fn disk_file(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn one_disk(file: &NamedTempFile) -> Devices {
    let disk = DiskConfig {
        path: file.path().to_owned(),
        id: "data".parse().ok(),
        ..DiskConfig::default()
    };
    Devices {
        disk: vec![disk],
        rng: Some(RngConfig::default()),
        ..Devices::default()
    }
}

fn config(cmdline: &str, devices: Devices) -> MachineConfig {
    let config = MachineConfig::new(kernel(), 1, Bytes::mib(32)).unwrap();
    config.with_cmdline(cmdline).unwrap().with_devices(devices).unwrap()
}

fn start(cmdline: &str, devices: Devices, console: &Console) -> Arc<Machine> {
    let machine = Machine::launch(&config(cmdline, devices), console.sinks()).unwrap();
    machine.resume().unwrap();
    machine
}

fn twin_of(source: &Machine, devices: Devices, console: &Console) -> Arc<Machine> {
    let ears = console.clone();
    let builder = Machine::builder(move || ears.sinks()).with_devices(devices).unwrap();
    builder.build_machine(&source.describe()).unwrap()
}

/// Stop the guest wherever it is, and let it go on in a twin that finds its disks where `devices` says.
fn travel(source: &Machine, devices: Devices, console: &Console) -> Arc<Machine> {
    let twin = twin_of(source, devices, console);
    source.pause().unwrap();
    let records = source.save().unwrap();
    copy_memory(source, &*twin);
    twin.restore(&records).unwrap();
    source.give_up();
    twin.resume().unwrap();
    twin
}

fn must_be_well(machine: &Machine, console: &Console) {
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
    assert!(!console.text().contains("CORRUPT"), "{}", console.text());
}

/// The last number the guest was promised to find again on this disk.
fn promised(console: &Console) -> u64 {
    let text = console.text();
    let numbers = text.lines().filter_map(|line| {
        let number = line.strip_prefix("umbra-guest: disk ")?.strip_suffix(" ok")?;
        number.parse::<u64>().ok()
    });
    numbers.max().unwrap_or(0)
}

/// What a guest that reads all of the disk finds there without a gap.
fn found(devices: Devices) -> u64 {
    let console = Console::default();
    let machine = start("work=blkcheck op=verify span=16M", devices, &console);
    assert_eq!(
        machine.wait_exit(Some(PATIENCE)),
        Some(ExitReason::Code(0)),
        "{}",
        console.text()
    );
    let text = console.text();
    let verdict = text.lines().find(|line| line.contains("disk found")).unwrap();
    let number = verdict.split("consistent=").nth(1).unwrap().split(' ').next().unwrap();
    number.parse().unwrap()
}

#[test]
fn a_guest_with_many_requests_in_flight_moves_and_every_promise_of_its_disk_holds() {
    needs_kvm!();
    for wait in ["poll", "irq"] {
        let (file, console) = (disk_file(DISK), Console::default());
        let cmdline = format!("work=blkcheck depth=32 rate=0 span=16M wait={wait}");
        let mut machine = start(&cmdline, one_disk(&file), &console);
        console.wait_for(" ok\n");
        for round in 0..12 {
            console.wait_more(20 + 7 * round);
            machine = travel(&machine, one_disk(&file), &console);
            must_be_well(&machine, &console);
        }
        console.wait_more(200);
        must_be_well(&machine, &console);
        machine.pause().unwrap();
        machine.give_up();
        let promised = promised(&console);
        assert!(promised > 0, "{}", console.text());
        assert!(
            found(one_disk(&file)) >= promised,
            "of {promised} promised writes some are lost"
        );
    }
}

#[test]
fn a_guest_that_was_saved_in_vain_goes_on_with_its_disk() {
    needs_kvm!();
    let (file, console) = (disk_file(DISK), Console::default());
    let machine = start(
        "work=blkcheck depth=32 rate=0 span=16M wait=irq",
        one_disk(&file),
        &console,
    );
    for _ in 0..20 {
        console.wait_more(20);
        machine.pause().unwrap();
        machine.save().unwrap();
        machine.resume().unwrap();
    }
    console.wait_more(100);
    must_be_well(&machine, &console);
}

#[test]
fn what_a_disk_writes_into_memory_is_in_the_harvests_to_the_last_page() {
    needs_kvm!();
    let (file, console) = (disk_file(DISK), Console::default());
    let machine = start(
        "work=blkcheck depth=32 rate=0 op=mixed span=16M wait=irq",
        one_disk(&file),
        &console,
    );
    console.wait_for(" ok\n");
    machine.track(true).unwrap();
    let mut follower = image(&*machine);
    let pages = all_pages(&machine.spaces()[0]);
    let mut follow = |harvest: &Harvest| {
        for (space, set) in &harvest.dirty {
            assert_eq!(*space, SpaceId::RAM);
            let dirty: Vec<_> = set.iter().collect();
            let mut bytes = Vec::new();
            machine.read_pages(SpaceId::RAM, &dirty, &mut bytes).unwrap();
            for (page, bytes) in dirty.iter().zip(bytes.chunks_exact(PAGE_SIZE)) {
                let at = pages.binary_search(page).unwrap() * PAGE_SIZE;
                follower[at..at + PAGE_SIZE].copy_from_slice(bytes);
            }
        }
        follower.clone()
    };
    for _ in 0..10 {
        console.wait_more(30);
        follow(&machine.harvest().unwrap());
    }
    for cut in 0..5 {
        console.wait_more(30);
        machine.pause().unwrap();
        follow(&machine.harvest().unwrap());
        machine.save().unwrap();
        let copy = follow(&machine.harvest().unwrap());
        let truth = image(&*machine);
        let differing: Vec<_> = (0..pages.len())
            .filter(|n| copy[n * PAGE_SIZE..(n + 1) * PAGE_SIZE] != truth[n * PAGE_SIZE..(n + 1) * PAGE_SIZE])
            .map(|n| pages[n])
            .collect();
        assert!(
            differing.is_empty(),
            "cut {cut}: written and never harvested: {differing:x?}"
        );
        // Nothing writes any more: not a worker, not a late completion.
        assert_eq!(machine.harvest().unwrap().count().0, 0, "cut {cut}");
        machine.resume().unwrap();
    }
    must_be_well(&machine, &console);
}

#[test]
fn random_numbers_keep_coming_over_many_moves() {
    needs_kvm!();
    for wait in ["poll", "irq"] {
        let console = Console::default();
        let devices = || Devices {
            rng: Some(RngConfig::default()),
            ..Devices::default()
        };
        let mut machine = start(&format!("work=rng wait={wait}"), devices(), &console);
        console.wait_for("rng ");
        for _ in 0..10 {
            console.wait_more(30);
            machine = travel(&machine, devices(), &console);
        }
        console.wait_more(100);
        must_be_well(&machine, &console);
    }
}

#[test]
fn an_error_of_the_hosts_disk_is_an_error_of_the_guests_and_nothing_worse() {
    needs_kvm!();
    let (file, console) = (disk_file(DISK), Console::default());
    let machine = start(
        "work=blkcheck op=read rate=0 span=16M wait=irq",
        one_disk(&file),
        &console,
    );
    console.wait_for("disk found");
    file.as_file().set_len(4096).unwrap();
    console.wait_for("disk error op=");
    file.as_file().set_len(DISK).unwrap();
    console.wait_more(100);
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn a_disk_that_may_only_be_read_is_never_written() {
    needs_kvm!();
    let (file, console) = (disk_file(DISK), Console::default());
    file.as_file().write_all_at(&[7; 512], DISK - 512).unwrap();
    let before = std::fs::read(file.path()).unwrap();
    let mut devices = one_disk(&file);
    devices.disk[0].readonly = Some(true);
    let machine = start("work=blkcheck rate=0 span=16M wait=irq", devices.clone(), &console);
    console.wait_for("disk is read-only and refuses to be written");
    console.wait_more(50);
    must_be_well(&machine, &console);
    // Two may read it at once.
    let other = Machine::launch(&config("work=idle", devices), Console::default().sinks()).unwrap();
    other.resume().unwrap();
    assert!(std::fs::read(file.path()).unwrap() == before);
}

#[test]
fn an_image_is_used_by_one_guest_at_a_time_and_a_move_hands_its_lock_over() {
    needs_kvm!();
    let (file, console) = (disk_file(DISK), Console::default());
    let machine = start("work=idle", one_disk(&file), &console);
    let locked = format!(
        "{}: the image is locked: another guest or program is using it",
        file.path().display()
    );
    let second = Machine::launch(&config("work=idle", one_disk(&file)), Console::default().sinks());
    assert_eq!(second.unwrap_err().to_string(), locked);

    // A twin stands ready beside the guest, and even restored it does not run before the source has let go.
    let twin = twin_of(&machine, one_disk(&file), &console);
    machine.pause().unwrap();
    let records = machine.save().unwrap();
    copy_memory(&*machine, &*twin);
    twin.restore(&records).unwrap();
    assert_eq!(twin.resume().unwrap_err().to_string(), locked);
    machine.give_up();
    twin.resume().unwrap();
    assert_eq!(
        machine.resume().unwrap_err().to_string(),
        locked,
        "nobody goes back to it now"
    );
    console.wait_more(20);

    // Handed back: the source takes hold again.
    twin.pause().unwrap();
    twin.give_up();
    machine.resume().unwrap();
    drop(twin);
    console.wait_more(20);
    must_be_well(&machine, &console);
}

#[test]
fn what_a_host_does_not_have_for_a_twin_is_said_by_the_devices_name() {
    needs_kvm!();
    let (file, console) = (disk_file(DISK), Console::default());
    let machine = start("work=idle", one_disk(&file), &console);
    let refused = |devices: Devices| {
        let builder = Machine::builder(umbra_machine::Sinks::discard)
            .with_devices(devices)
            .unwrap();
        builder.build_machine(&machine.describe()).unwrap_err().to_string()
    };
    assert_eq!(
        refused(Devices::default()),
        "disk/data: say where it is on this host: --disk id=data,path=PATH"
    );
    let mut other = one_disk(&file);
    other.disk[0].id = "root".parse().ok();
    assert_eq!(
        refused(other),
        "disk/root: given here, but the guest has no such device"
    );
    let mut other = one_disk(&file);
    other.disk[0].readonly = Some(true);
    assert_eq!(
        refused(other),
        "disk/data: readonly was given as true, but the guest's is false"
    );
    let small = disk_file(4096);
    assert_eq!(
        refused(one_disk(&small)),
        format!(
            "{}: cannot be disk/data: it has 8 sectors, the guest's disk has 32768",
            small.path().display()
        )
    );
    let mut missing = one_disk(&file);
    missing.disk[0].path = "/nowhere/a.img".into();
    assert_eq!(
        refused(missing),
        "/nowhere/a.img: cannot open the image of disk/data: No such file or directory (os error 2)"
    );
    // A description names no path of the source's.
    let described = machine.describe().bytes;
    let path = file.path().to_str().unwrap().as_bytes();
    assert!(!described.windows(path.len()).any(|window| window == path));
}
