//! A machine's life: it boots, beats, pauses, goes on, and ends.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::sync::mpsc;

use common::{Console, PATIENCE, Snippet, image, kernel, launch};
use umbra_core::guest::{Guest, GuestError};
use umbra_machine::{ExitReason, FaultPlan, Machine, MachineConfig, OnReset, Sharing, Sinks};
use umbra_units::Bytes;

#[test]
fn a_guest_boots_and_beats_on_both_its_vcpus() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(64), "cpus=2 work=dirty wss=1M run=1", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Code(0)));
    assert!(console.text().contains("umbra-guest: done"), "{}", console.text());
}

#[test]
fn a_paused_guest_changes_nothing_and_goes_on_where_it_was() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(32), "cpus=2 work=dirty wss=4M rate=0", &console);
    for _ in 0..10 {
        machine.resume().unwrap();
        console.wait_more(20);
        machine.pause().unwrap();
        let (before, heard) = (image(&*machine), console.len());
        let records = machine.save().unwrap();
        assert!(before == image(&*machine), "memory changed while paused");
        assert_eq!(heard, console.len());
        let again = machine.save().unwrap();
        assert_eq!(records.len(), again.len());
    }
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn pausing_and_resuming_twice_is_doing_it_once() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(1, Bytes::mib(16), "", &console);
    machine.pause().unwrap();
    machine.resume().unwrap();
    machine.resume().unwrap();
    console.wait_for("0123");
    machine.pause().unwrap();
    machine.pause().unwrap();
    machine.resume().unwrap();
    console.wait_more(5);
}

#[test]
fn a_guest_stops_and_goes_a_thousand_times_without_losing_a_kick() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=compute", &console);
    for _ in 0..1_000 {
        machine.resume().unwrap();
        machine.pause().unwrap();
    }
    machine.resume().unwrap();
    console.wait_for("ready");
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn a_guest_that_never_exits_by_itself_is_stopped_whenever_the_kick_comes() {
    needs_kvm!();
    // jmp to itself: only a kick gets this vCPU out, and one lost would hang here.
    let machine = Snippet::new("spin", &[0xeb, 0xfe]).launch(Sinks::discard());
    for round in 0..3_000 {
        machine.resume().unwrap();
        for _ in 0..round * 7 % 5_000 {
            std::hint::spin_loop();
        }
        machine.pause().unwrap();
    }
}

#[test]
fn guests_with_private_memory_and_with_memory_above_four_gib_boot() {
    needs_kvm!();
    for (memory, sharing, cmdline) in [
        (Bytes::mib(64), Sharing::Private, "work=dirty wss=1M run=1"),
        (Bytes::mib(3200), Sharing::Shared, "run=1"),
    ] {
        let console = Console::default();
        let config = MachineConfig::new(kernel(), 1, memory).unwrap();
        let config = config.with_cmdline(cmdline).unwrap().with_sharing(sharing);
        let machine = Machine::launch(&config, console.sinks()).unwrap();
        machine.resume().unwrap();
        assert_eq!(
            machine.wait_exit(Some(PATIENCE)),
            Some(ExitReason::Code(0)),
            "{}",
            console.text()
        );
    }
}

#[test]
fn a_guest_that_pulls_the_reset_line_and_is_not_to_restart_says_so() {
    needs_kvm!();
    // mov al, 0xfe; out 0x64, al; hlt
    let kernel = Snippet::new("reset", &[0xb0, 0xfe, 0xe6, 0x64, 0xf4]);
    let machine = Machine::launch(&kernel.config().with_on_reset(OnReset::Exit), Sinks::discard()).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Reset));
    assert_eq!(
        machine.resume(),
        Err(GuestError::WrongState("cannot run: the guest is over"))
    );
    machine.pause().unwrap();
    assert_eq!(
        machine.save(),
        Err(GuestError::WrongState("cannot save: the guest is over"))
    );
}

#[test]
fn a_triple_fault_and_a_jump_into_nowhere_are_faults_that_say_where() {
    needs_kvm!();
    // ud2, without an interrupt table; jmp to the device hole, where no instruction can be fetched.
    let nowhere = [0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0];
    for (name, code) in [("triple", &[0x90, 0x0f, 0x0b][..]), ("nowhere", &nowhere[..])] {
        let kernel = Snippet::new(name, code);
        let machine = Machine::launch(&kernel.config().with_on_reset(OnReset::Exit), Sinks::discard()).unwrap();
        machine.resume().unwrap();
        let Some(ExitReason::Fault(text)) = machine.wait_exit(Some(PATIENCE)) else {
            panic!("{name}: {:?}", machine.exit_reason());
        };
        assert!(text.starts_with("vcpu 0 at rip 0x"), "{text}");
    }
}

#[test]
fn what_is_typed_reaches_the_guest() {
    needs_kvm!();
    let console = Console::default();
    let machine = Snippet::new("echo", &common::ECHO).launch(console.sinks());
    assert_eq!(machine.console_input(b"HAL"), 3);
    machine.resume().unwrap();
    console.wait_for("IBM");
    machine.console_input(b"@");
    console.wait_for("IBMA");
}

#[test]
fn typing_at_a_paused_guest_raises_no_interrupt_until_it_goes_on() {
    needs_kvm!();
    // PIC initialised, nothing masked; serial: interrupt on input (mov dx, 0x3f9; mov al, 1; out); a byte; jmp to itself.
    let mut code = Vec::new();
    for (port, value) in [(0x20, 0x11), (0x21, 0x40), (0x21, 0x04), (0x21, 0x01), (0x21, 0x00)] {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code.extend([0x66, 0xba, 0xf9, 0x03, 0xb0, 0x01, 0xee, 0xb2, 0xf8, 0xee, 0xeb, 0xfe]);
    let console = Console::default();
    let machine = Snippet::new("interrupt", &code).launch(console.sinks());
    machine.resume().unwrap();
    console.wait("its byte", |heard| !heard.is_empty());
    machine.pause().unwrap();
    let pic = || common::record(&mut machine.save().unwrap(), "irqchip/pic0").clone();
    let before = pic();
    assert_eq!(machine.console_input(b"k"), 1);
    assert_eq!(pic(), before);
    machine.resume().unwrap();
    machine.pause().unwrap();
    assert_ne!(pic(), before);
}

#[test]
fn a_string_written_to_a_port_arrives_byte_by_byte() {
    needs_kvm!();
    // mov dx, 0x3f8; mov esi, text; mov ecx, 5; cld; rep outsb; hlt
    let mut code = vec![
        0x66, 0xba, 0xf8, 0x03, 0xbe, 0x14, 0x00, 0x10, 0x00, 0xb9, 5, 0, 0, 0, 0xfc, 0xf3, 0x6e, 0xf4,
    ];
    code.extend([0x90, 0x90]);
    code.extend(b"hello");
    let console = Console::default();
    let machine = Snippet::new("string", &code).launch(console.sinks());
    machine.resume().unwrap();
    console.wait_for("hello");
}

#[test]
fn held_output_is_released_in_order() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(1, Bytes::mib(16), "run=1 beat=1000", &console);
    machine.hold_output();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Code(0)));
    assert_eq!(console.text(), "");
    machine.release_output();
    assert!(console.text().starts_with("umbra-guest 1 ") && console.text().contains("umbra-guest: done"));
}

#[test]
fn the_end_is_told_once_and_the_machine_may_be_dropped_by_whoever_is_told() {
    needs_kvm!();
    let (tell, told) = mpsc::channel();
    let holder = std::sync::Arc::new(std::sync::Mutex::new(None));
    let held = holder.clone();
    // mov al, 7; out 0xf4, al; then again
    let machine =
        Snippet::new("code", &[0xb0, 7, 0xe6, 0xf4, 0xeb, 0xfa]).launch(Sinks::discard().with_on_exit(move |reason| {
            tell.send(reason.clone()).unwrap();
            drop(held.lock().unwrap().take());
        }));
    *holder.lock().unwrap() = Some(machine.clone());
    machine.resume().unwrap();
    drop(machine);
    assert_eq!(told.recv_timeout(PATIENCE), Ok(ExitReason::Code(7)));
    assert!(
        told.recv_timeout(PATIENCE).is_err(),
        "told once; then the sender is gone with the machine"
    );
}

#[test]
fn a_running_machine_can_be_dropped() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(2, Bytes::mib(16), "cpus=2 work=compute", &console);
    machine.resume().unwrap();
    console.wait_for("ready");
    drop(machine);
    let heard = console.len();
    assert_eq!(heard, console.len());
}

#[test]
fn a_kernel_that_cannot_be_used_is_refused_in_one_line_that_names_it() {
    needs_kvm!();
    let error = |path: &str| {
        let config = MachineConfig::new(path, 1, Bytes::mib(8)).unwrap();
        Machine::launch(&config, Sinks::discard()).unwrap_err().to_string()
    };
    assert_eq!(
        error("/nonexistent/kernel"),
        "/nonexistent/kernel: cannot open the kernel: No such file or directory (os error 2)"
    );
    let not_elf = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    assert!(
        error(not_elf).starts_with(&format!("{not_elf}: not a kernel for us: ")),
        "{}",
        error(not_elf)
    );
    assert!(!error(not_elf).contains('\n'));
}

#[test]
fn a_failed_save_leaves_a_second_one_correct() {
    needs_kvm!();
    let plan = FaultPlan::new(1, 0);
    let console = Console::default();
    let config = MachineConfig::new(kernel(), 1, Bytes::mib(16))
        .unwrap()
        .with_fault(plan.clone());
    let machine = Machine::launch(&config, console.sinks()).unwrap();
    machine.resume().unwrap();
    console.wait_for("ready");
    machine.pause().unwrap();
    let error = machine.save().unwrap_err();
    assert_eq!(error.to_string(), "fault/0 cannot be saved: a test planned it so");
    let records = machine.save().unwrap();
    let fail_once = FaultPlan::new(0, 1);
    let there = console.clone();
    let builder = Machine::builder(move || there.sinks()).with_fault(fail_once);
    let twin = builder.build_machine(&machine.describe()).unwrap();
    common::copy_memory(&*machine, &*twin);
    let error = twin.restore(&records).unwrap_err();
    assert_eq!(error.to_string(), "fault/0 cannot be restored: a test planned it so");
    assert!(matches!(twin.resume(), Err(GuestError::WrongState(_))));
    twin.restore(&records).unwrap();
    drop(machine);
    twin.resume().unwrap();
    console.wait_more(20);
}
