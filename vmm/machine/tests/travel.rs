//! Moving: what is saved on one machine goes on in another, and what does not fit is refused by name.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use common::{Console, Snippet, copy_memory, image, launch, move_to_twin, record};
use umbra_core::guest::{Guest, GuestBuilder, GuestError, StateRecord};
use umbra_machine::{Machine, Sinks};
use umbra_units::{Bytes, PAGE_SIZE, PageId, Pfn};

#[test]
fn a_guest_moves_a_hundred_times_and_never_notices() {
    needs_kvm!();
    let console = Console::default();
    let mut machine = launch(
        2,
        Bytes::mib(16),
        "cpus=2 work=dirty wss=4M rate=0 simd=on content=mixed",
        &console,
    );
    machine.resume().unwrap();
    console.wait_for("ready");
    for round in 0..100 {
        // Runs until it has been heard a few times more, so every move meets it somewhere else.
        console.wait_more(1 + round % 7);
        machine.pause().unwrap();
        assert_eq!(machine.exit_reason(), None, "round {round}: {}", console.text());
        let twin = move_to_twin(&*machine, &console);
        machine = twin;
        machine.resume().unwrap();
    }
    console.wait_more(100);
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
    assert!(!console.text().contains("CORRUPT"), "{}", console.text());
    every_beat_was_heard_once(&console.text());
}

/// Beats are digits counting up; lines of text come in between.
fn every_beat_was_heard_once(heard: &str) {
    let beats: Vec<u8> = heard
        .lines()
        .filter(|line| line.bytes().all(|byte| byte.is_ascii_digit()))
        .flat_map(str::bytes)
        .map(|byte| byte - b'0')
        .collect();
    for (n, pair) in beats.windows(2).enumerate() {
        assert_eq!(pair[1], (pair[0] + 1) % 10, "beat {n} was lost or came twice: {heard}");
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn a_guests_clock_goes_on_over_a_move_and_its_error_is_known() {
    needs_kvm!();
    // kvm_clock_data begins with the clock.
    let clock = |machine: &Machine| number(&record(&mut machine.save().unwrap(), "clock").bytes, 0);
    let console = Console::default();
    let mut machine = launch(2, Bytes::mib(16), "cpus=2 work=dirty wss=1M rate=10M", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    assert_eq!(machine.clock_report(), None, "it never moved");
    for _ in 0..5 {
        console.wait_more(5);
        machine.pause().unwrap();
        let before = clock(&machine);
        machine = move_to_twin(&*machine, &console);
        let report = machine.clock_report().unwrap();
        let after = clock(&machine);
        println!("{report:?}");
        assert!(after > before, "{after} after {before}");
        if let Some((away, error)) = report.away_ns.zip(report.error_ns) {
            // A clock that stood still would be off by all the time that it was away.
            assert!(away > 0 && error.abs() < away / 2, "{report:?}");
        }
        let error = report.tsc_error_ns.expect("every kernel tells what IA32_TSC is");
        assert!(error.abs() < 1_000_000_000, "{report:?}");
        machine.resume().unwrap();
    }
    console.wait_more(20);
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn what_a_restored_counter_shows_is_what_the_report_says_whatever_the_kernel_made_of_it() {
    needs_kvm!();
    const LEAP: u64 = 1 << 40;
    let (mut records, twin) = paused_and_twin();
    let clock_then = number(&record(&mut records, "clock").bytes, 0);
    let vcpu = &mut record(&mut records, "vcpu/0").bytes;
    let khz = u64::from(u32::from_le_bytes(vcpu[..4].try_into().unwrap()));
    let at = vcpu.len() - 8;
    assert_eq!(vcpu[at - 1], 1, "every kernel tells what IA32_TSC is");
    // As if the guest's counter were far ahead of this host's.
    let tsc_then = number(vcpu, at) + LEAP;
    vcpu[at..].copy_from_slice(&tsc_then.to_le_bytes());
    twin.restore(&records).unwrap();
    let report = twin.clock_report().unwrap();
    println!("{report:?}");

    let mut again = twin.save().unwrap();
    let clock = number(&record(&mut again, "clock").bytes, 0);
    let vcpu = &record(&mut again, "vcpu/0").bytes;
    let (_, places) = places_of_time(vcpu);
    // What the guest would read, and what is carried on from here, are the same moment's but for the time of reading.
    let shown = number(vcpu, places[0]);
    let error = |shown: u64| {
        let due = tsc_then + (clock - clock_then) * khz / 1_000_000;
        i64::try_from((i128::from(shown) - i128::from(due)) * 1_000_000 / i128::from(khz)).unwrap()
    };
    let told = report.tsc_error_ns.unwrap();
    for value in [shown, number(vcpu, vcpu.len() - 8)] {
        assert!(
            (error(value) - told).abs() < 5_000_000_000,
            "{} and {told}",
            error(value)
        );
    }
    // Either it leapt, or the report says that it did not: by minutes, whatever the frequency.
    assert!(told.abs() < 5_000_000_000 || told < -60_000_000_000, "{report:?}");
}

#[test]
fn preparing_a_twin_changes_no_byte_of_its_memory() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=dirty wss=4M rate=10M", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    for _ in 0..5 {
        console.wait_more(20);
        machine.pause().unwrap();
        let records = machine.save().unwrap();
        let ears = console.clone();
        let twin = Machine::builder(move || ears.sinks())
            .build_machine(&machine.describe())
            .unwrap();
        copy_memory(&*machine, &*twin);
        let shipped = image(&*twin);
        twin.restore(&records).unwrap();
        let prepared = image(&*twin);
        let pages = shipped.chunks(4096).zip(prepared.chunks(4096));
        let changed: Vec<usize> = (0..).zip(pages).filter(|(_, (a, b))| a != b).map(|(n, _)| n).collect();
        assert!(changed.is_empty(), "pages changed by preparing: {changed:x?}");
        machine.resume().unwrap();
    }
}

#[test]
fn guests_of_one_and_of_eight_vcpus_move() {
    needs_kvm!();
    for cpus in [1, 8] {
        let console = Console::default();
        let cmdline = format!("cpus={cpus} work=dirty wss=1M rate=10M");
        let mut machine = launch(cpus, Bytes::mib(16), &cmdline, &console);
        machine.resume().unwrap();
        console.wait_for("ready");
        for _ in 0..5 {
            console.wait_more(20);
            machine.pause().unwrap();
            machine = move_to_twin(&*machine, &console);
            machine.resume().unwrap();
        }
        console.wait_more(20);
        assert_eq!(machine.exit_reason(), None, "{}", console.text());
    }
}

#[test]
fn a_guest_that_was_saved_in_vain_goes_on_here() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=dirty wss=1M rate=0", &console);
    for _ in 0..50 {
        machine.resume().unwrap();
        console.wait_more(3);
        machine.pause().unwrap();
        machine.save().unwrap();
    }
    machine.resume().unwrap();
    console.wait_more(50);
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn an_idle_guest_is_woken_by_its_timer_after_every_move() {
    needs_kvm!();
    let console = Console::default();
    let mut machine = launch(2, Bytes::mib(8), "cpus=2 work=idle", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    for _ in 0..20 {
        console.wait_more(5);
        machine.pause().unwrap();
        machine = move_to_twin(&*machine, &console);
        machine.resume().unwrap();
    }
    console.wait_more(20);
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn a_port_read_that_a_stop_interrupts_is_neither_lost_nor_repeated() {
    needs_kvm!();
    // The guest does nothing but read ports, so nearly every stop meets it in a read. Each byte typed comes back once.
    let console = Console::default();
    let mut machine = Snippet::new("echo-moving", &common::ECHO).launch(console.sinks());
    machine.resume().unwrap();
    let mut typed = Vec::new();
    for round in 0..150_u8 {
        let bytes: Vec<u8> = (0..3).map(|n| round.wrapping_mul(3).wrapping_add(n)).collect();
        assert_eq!(machine.console_input(&bytes), 3);
        typed.extend(bytes.iter().map(|byte| byte.wrapping_add(1)));
        console.wait("an echo", |heard| heard.len() + 3 > typed.len());
        machine.pause().unwrap();
        machine = move_to_twin(&*machine, &console);
        machine.resume().unwrap();
    }
    console.wait("the last echo", |heard| heard.len() >= typed.len());
    machine.pause().unwrap();
    assert!(console.bytes() == typed, "what came back is not what was typed");
}

/// Fields that go on by themselves while a guest is paused, as `state/mod.rs` lists them, blanked out.
fn without_time(mut records: Vec<StateRecord>) -> Vec<StateRecord> {
    // kvm_clock_data: clock at 0, realtime at 16, host_tsc at 24.
    let clock = &mut record(&mut records, "clock").bytes;
    for at in [0, 16, 24] {
        clock[at..at + 8].fill(0);
    }
    // kvm_pit_channel_state: 24 bytes, count_load_time in the last eight.
    let pit = &mut record(&mut records, "pit/0").bytes;
    for channel in 0..3 {
        pit[channel * 24 + 16..channel * 24 + 24].fill(0);
    }
    for vcpu in records.iter_mut().filter(|record| record.kind.starts_with("vcpu/")) {
        blank_time_of(&mut vcpu.bytes);
    }
    records
}

/// The LAPIC's current count, the MSRs IA32_TSC and IA32_TSC_DEADLINE, and the TSC at the clock's instant.
fn blank_time_of(vcpu: &mut [u8]) {
    let (count, entries) = places_of_time(vcpu);
    vcpu[count..count + 4].fill(0);
    for value in entries {
        vcpu[value..value + 8].fill(0);
    }
}

/// Where a vCPU's record has the LAPIC's current count; and where each value of the TSC, IA32_TSC first, that at the
/// clock's instant last.
fn places_of_time(vcpu: &[u8]) -> (usize, Vec<usize>) {
    let mut lapic_count = 0;
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let mut at = 4;
    at += 4 + 28 * word(vcpu, at);
    for field in [
        "mp_state",
        "regs",
        "sregs",
        "xcrs",
        "debugregs",
        "lapic",
        "events",
        "xsave",
    ] {
        let (start, len) = (at + 4, word(vcpu, at));
        if field == "lapic" {
            lapic_count = start + 0x390;
        }
        at = start + len;
    }
    let count = word(vcpu, at);
    at += 4;
    let entries = (0..count).map(|msr| at + msr * 12);
    let of_time = entries.filter(|entry| [0x10, 0x6e0].contains(&word(vcpu, *entry)));
    let mut values: Vec<usize> = of_time.map(|entry| entry + 4).collect();
    values.push(vcpu.len() - 8);
    (lapic_count, values)
}

fn same_but_for_time(machine: &Machine) {
    let records = machine.save().unwrap();
    let twin = Machine::builder(Sinks::discard)
        .build_machine(&machine.describe())
        .unwrap();
    twin.restore(&records).unwrap();
    let again = twin.save().unwrap();
    for (here, there) in without_time(records).iter().zip(&without_time(again)) {
        assert_eq!((&here.kind, here.version), (&there.kind, there.version));
        let len = here.bytes.len().max(there.bytes.len());
        let differs: Vec<usize> = (0..len).filter(|n| here.bytes.get(*n) != there.bytes.get(*n)).collect();
        assert!(differs.is_empty(), "{} differs at {differs:?}", here.kind);
    }
}

#[test]
fn a_record_restored_and_saved_again_is_the_same_but_for_time() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=compute simd=on", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    machine.pause().unwrap();
    same_but_for_time(&machine);
}

#[test]
fn every_device_that_a_guest_touched_is_restored_as_it_was_left() {
    needs_kvm!();
    let out = |port: u8, value: u8| [0xb0, value, 0xe6, port];
    let mut code = Vec::new();
    // PIT: channel 2, mode 2, count 0x1234. PIC: initialised, all masked but one. CMOS: a byte. i8042: its self test.
    for (port, value) in [
        (0x43, 0xb4),
        (0x42, 0x34),
        (0x42, 0x12),
        (0x20, 0x11),
        (0x21, 0x40),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0xfb),
        (0x70, 0x50),
        (0x71, 0xab),
        (0x64, 0xaa),
    ] {
        code.extend(out(port, value));
    }
    // A debug register (mov eax, 0x1234; mov dr0, eax).
    code.extend([0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x23, 0xc0]);
    // Serial: scratch register (mov dx, 0x3ff; mov al, 0x77; out dx, al), then a byte to say so (mov dl, 0xf8; out).
    code.extend([0x66, 0xba, 0xff, 0x03, 0xb0, 0x77, 0xee, 0xb2, 0xf8, 0xee, 0xeb, 0xfe]);
    let console = Console::default();
    let machine = Snippet::new("touch", &code).launch(console.sinks());
    let untouched = machine.save().unwrap();
    machine.resume().unwrap();
    console.wait_for("w");
    machine.pause().unwrap();
    let (mut before, mut after) = (without_time(untouched), without_time(machine.save().unwrap()));
    for kind in ["pit/0", "irqchip/pic0", "rtc/0", "i8042/0", "serial/0"] {
        assert_ne!(
            record(&mut before, kind),
            record(&mut after, kind),
            "the guest touched it"
        );
    }
    same_but_for_time(&machine);
}

#[test]
fn a_restore_that_the_host_refuses_leaves_nothing_to_run_and_can_be_done_again() {
    needs_kvm!();
    let (records, twin) = paused_and_twin();
    let mut refused = records.clone();
    let vcpu = &mut record(&mut refused, "vcpu/0").bytes;
    let leaves = u32::from_le_bytes(vcpu[4..8].try_into().unwrap()) as usize;
    // mp_state, behind its length: no such state.
    vcpu[8 + 28 * leaves + 4] = 99;
    twin.restore(&records).unwrap();
    assert!(matches!(twin.restore(&refused), Err(GuestError::Host(_))));
    assert!(matches!(twin.resume(), Err(GuestError::WrongState(_))));
    twin.restore(&records).unwrap();
}

/// A paused guest's records, and a blank twin.
fn paused_and_twin() -> (Vec<StateRecord>, std::sync::Arc<Machine>) {
    let console = Console::default();
    let machine = launch(1, Bytes::mib(8), "", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    machine.pause().unwrap();
    let twin = Machine::builder(Sinks::discard)
        .build_machine(&machine.describe())
        .unwrap();
    (machine.save().unwrap(), twin)
}

#[test]
fn records_missing_unknown_cut_or_of_another_version_are_refused_by_name() {
    needs_kvm!();
    let (records, twin) = paused_and_twin();
    let kinds: Vec<String> = records.iter().map(|record| record.kind.clone()).collect();
    for kind in &kinds {
        let missing: Vec<_> = records.iter().filter(|record| record.kind != *kind).cloned().collect();
        assert_eq!(
            twin.restore(&missing),
            Err(GuestError::Malformed(format!("{kind}: the state has no such record")))
        );
        let mut newer = records.clone();
        record(&mut newer, kind).version += 1;
        let error = twin.restore(&newer).unwrap_err();
        assert!(
            matches!(&error, GuestError::Incompatible(text) if text.contains(kind)),
            "{error}"
        );
        let mut cut = records.clone();
        let bytes = &mut record(&mut cut, kind).bytes;
        bytes.truncate(bytes.len() / 2);
        let error = twin.restore(&cut).unwrap_err();
        assert!(
            matches!(&error, GuestError::Malformed(text) if text.contains(kind)),
            "{error}"
        );
        let mut long = records.clone();
        record(&mut long, kind).bytes.push(0);
        let error = twin.restore(&long).unwrap_err();
        assert!(
            matches!(&error, GuestError::Malformed(text) if text.contains(kind)),
            "{error}"
        );
    }
    let mut unknown = records.clone();
    unknown.push(StateRecord {
        kind: "net/0".to_owned(),
        version: 1,
        bytes: Vec::new(),
    });
    let text = "net/0: this machine has nothing of that kind".to_owned();
    assert_eq!(twin.restore(&unknown), Err(GuestError::Incompatible(text)));
    let mut twice = records.clone();
    twice.push(records[0].clone());
    let text = "machine: this machine has nothing of that kind".to_owned();
    assert_eq!(twin.restore(&twice), Err(GuestError::Incompatible(text)));
    // After all these, the right ones still fit.
    twin.restore(&records).unwrap();
}

#[test]
fn a_vcpu_record_cut_at_any_byte_is_refused() {
    needs_kvm!();
    let (records, twin) = paused_and_twin();
    let whole = records
        .iter()
        .find(|record| record.kind == "vcpu/0")
        .unwrap()
        .bytes
        .len();
    for len in (0..whole).step_by(97).chain(whole - 3..whole) {
        let mut cut = records.clone();
        record(&mut cut, "vcpu/0").bytes.truncate(len);
        assert!(
            matches!(twin.restore(&cut), Err(GuestError::Malformed(_))),
            "{len} bytes"
        );
    }
}

#[test]
fn a_machine_without_state_refuses_to_run_or_to_be_saved() {
    needs_kvm!();
    let (records, twin) = paused_and_twin();
    let text = "cannot run: this machine has no state yet; restore one first";
    assert_eq!(twin.resume(), Err(GuestError::WrongState(text)));
    assert_eq!(
        twin.save(),
        Err(GuestError::WrongState("cannot save: this machine has no state yet"))
    );
    twin.restore(&records).unwrap();
    twin.save().unwrap();
}

#[test]
fn a_running_guest_refuses_what_needs_it_paused() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(1, Bytes::mib(8), "", &console);
    machine.resume().unwrap();
    assert!(matches!(machine.save(), Err(GuestError::WrongState(_))));
    assert!(matches!(machine.restore(&[]), Err(GuestError::WrongState(_))));
    let page = PageId::ram(Pfn(0));
    let mut bytes = [0; PAGE_SIZE];
    assert!(matches!(
        machine.read_page(page, &mut bytes),
        Err(GuestError::WrongState(_))
    ));
    assert!(matches!(
        machine.apply_page(page, &bytes),
        Err(GuestError::WrongState(_))
    ));
}

#[test]
fn a_twin_this_host_cannot_be_is_refused_when_it_is_built_by_the_name_of_what_lacks() {
    needs_kvm!();
    let machine = launch(1, Bytes::mib(8), "", &Console::default());
    let good = machine.describe();
    let build = |description: &StateRecord| {
        let builder = Machine::builder(Sinks::discard).with_memory_most(Bytes::mib(8));
        GuestBuilder::build(&builder, description)
            .err()
            .map(|error| error.to_string())
    };
    assert_eq!(build(&good), None);
    let big = launch(1, Bytes::mib(16), "", &Console::default()).describe();
    assert_eq!(
        build(&big).unwrap(),
        "machine: memory: 16.0 MiB asked for, at most 8.0 MiB allowed here"
    );

    // Description: memory 8, sharing 1, cpus 1, runs 4 + 16, devices 4, then "serial/0" behind its length.
    let mut strange = good.clone();
    strange.bytes[8 + 1 + 1 + 20 + 4 + 4] = b'S';
    assert_eq!(build(&strange).unwrap(), "Serial/0: this machine has no such device");

    // The CPUID table is last: find leaf 7, give it every feature there could ever be.
    let mut wizard = good.clone();
    let leaf7 = [7_u32, 0].map(u32::to_le_bytes).concat();
    let at = wizard.bytes.windows(8).rposition(|window| window == leaf7).unwrap();
    wizard.bytes[at + 12 + 4..at + 12 + 8].fill(0xff);
    let text = build(&wizard).unwrap();
    assert!(text.starts_with("cpu: this host lacks "), "{text}");
    assert!(matches!(build(&StateRecord { bytes: vec![0; 5], ..good }), Some(text) if text.starts_with("machine: ")));
}

#[test]
fn state_of_a_larger_machine_does_not_fit_a_smaller_one() {
    needs_kvm!();
    let (_, small) = paused_and_twin();
    let console = Console::default();
    let large = launch(2, Bytes::mib(16), "cpus=2", &console);
    let error = small.restore(&large.save().unwrap()).unwrap_err();
    let text = "machine: the state is of 2 vCPUs and 16.0 MiB, this machine has 1 and 8.0 MiB";
    assert_eq!(error, GuestError::Incompatible(text.to_owned()));
}

#[test]
fn a_guest_that_may_have_become_two_has_a_new_generation_and_one_that_moved_has_its_own() {
    needs_kvm!();
    // Where the ACPI tables say it is.
    let generation = |machine: &Machine| {
        let mut bytes = [0; PAGE_SIZE];
        machine.read_page(PageId::ram(Pfn(0xdf)), &mut bytes).unwrap();
        bytes[..16].to_vec()
    };
    let console = Console::default();
    let machine = launch(1, Bytes::mib(16), "work=idle", &console);
    machine.resume().unwrap();
    console.wait_more(10);
    machine.pause().unwrap();
    let first = generation(&machine);
    assert_ne!(first, [0; 16]);
    let records = machine.save().unwrap();
    for (renewed, twins) in [(false, "moved"), (true, "restored")] {
        let ears = Console::default();
        let mouth = ears.clone();
        let twin = Machine::builder(move || mouth.sinks())
            .build_machine(&machine.describe())
            .unwrap();
        copy_memory(&*machine, &*twin);
        twin.restore(&records).unwrap();
        if renewed {
            twin.renew_generation();
        }
        twin.resume().unwrap();
        ears.wait_more(10);
        twin.pause().unwrap();
        assert_eq!(generation(&twin) != first, renewed, "{twins}");
    }
}
