//! A guest that asks for a reset is booted again in place, and whoever follows it misses nothing.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Console, PATIENCE, Snippet, follow, image, launch, move_to_twin};
use umbra_core::guest::Guest;
use umbra_machine::{BootFiles, ExitReason, Machine, OnReset};
use umbra_units::Bytes;

/// `mov dx, 0x3f8; mov al, [data]; out dx, al; inc byte [data]; mov al, [0x300000]; add al, '0'; out dx, al;
/// mov byte [0x300000], 5; mov dl, 0xfd; again: in al, dx; test al, 1; jz again; mov al, 0xfe; out 0x64, al; jmp $;
/// data: db 'a'`: tells a byte of its image and one of memory, changes both, and resets when something is typed.
const CHANGE_AND_RESET: [u8; 49] = [
    0x66, 0xba, 0xf8, 0x03, 0xa0, 0x30, 0, 0x10, 0, 0xee, 0xfe, 0x05, 0x30, 0, 0x10, 0, 0xa0, 0, 0, 0x30, 0, 0x04,
    b'0', 0xee, 0xc6, 0x05, 0, 0, 0x30, 0, 5, 0xb2, 0xfd, 0xec, 0xa8, 1, 0x74, 0xfb, 0xb0, 0xfe, 0xe6, 0x64, 0xeb,
    0xfe, 0x90, 0x90, 0x90, 0x90, b'a',
];

/// `mov dx, 0x3f8; mov al, 'b'; out dx, al`, then a reset.
fn resetting(how: &[u8]) -> Vec<u8> {
    [&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'b', 0xee], how].concat()
}

#[test]
fn every_way_to_ask_for_a_reset_boots_the_guest_again_and_again() {
    needs_kvm!();
    for (name, how) in [
        // mov al, 0xfe; out 0x64, al; jmp $
        ("keyboard", &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe][..]),
        // mov dx, 0xcf9; mov al, 6; out dx, al; jmp $
        ("acpi", &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe]),
        // ud2, without an interrupt table: a triple fault
        ("triple", &[0x0f, 0x0b]),
    ] {
        let console = Console::default();
        let restarts = Arc::new(AtomicU32::new(0));
        let count = restarts.clone();
        let sinks = console.sinks().with_on_restart(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let kernel = Snippet::new(name, &resetting(how));
        let machine = Machine::launch(&kernel.config(), sinks).unwrap();
        machine.resume().unwrap();
        console.wait_for("bbbbb");
        assert_eq!(machine.exit_reason(), None);
        assert!(restarts.load(Ordering::Relaxed) >= 4);
    }
}

#[test]
fn a_guest_booted_again_finds_its_image_and_memory_as_the_first_time() {
    needs_kvm!();
    let console = Console::default();
    let kernel = Snippet::new("change", &CHANGE_AND_RESET);
    let machine = kernel.launch(console.sinks());
    machine.resume().unwrap();
    for boots in 1..4 {
        console.wait_for(&"a0".repeat(boots));
        machine.console_input(b"r");
    }
    console.wait_for("a0a0a0a0");
}

#[test]
fn all_vcpus_of_a_guest_that_is_reset_from_outside_start_again() {
    needs_kvm!();
    let console = Console::default();
    let machine = launch(3, Bytes::mib(32), "cpus=3 work=dirty wss=2M", &console);
    machine.resume().unwrap();
    for boots in 1..4 {
        console.wait("it to boot again", |heard| {
            String::from_utf8_lossy(heard).matches("ready").count() == boots
        });
        console.wait_more(50);
        machine.reset().unwrap();
    }
    machine.pause().unwrap();
    machine.reset().unwrap();
    let heard = console.len();
    assert!(!machine.is_running() && machine.exit_reason().is_none());
    let at_power_on = image(&*machine);
    machine.reset().unwrap();
    assert!(at_power_on == image(&*machine), "every boot begins alike");
    machine.resume().unwrap();
    console.wait("it to boot once more", |all| {
        String::from_utf8_lossy(&all[heard..]).contains("ready")
    });
    assert_eq!(machine.exit_reason(), None, "{}", console.text());
}

#[test]
fn whoever_follows_a_guest_that_resets_all_the_time_is_equal_at_every_cut() {
    needs_kvm!();
    // Writes all over 1 MiB from 3 MiB on, then resets: mov edi, 0x300000; mov ecx, 256; again: mov [edi], ecx;
    // add edi, 4096; loop again; mov al, 0xfe; out 0x64, al; jmp $
    let code = [
        0xbf, 0, 0, 0x30, 0, 0xb9, 0, 1, 0, 0, 0x89, 0x0f, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf6, 0xb0, 0xfe, 0xe6,
        0x64, 0xeb, 0xfe,
    ];
    let console = Console::default();
    let kernel = Snippet::new("often", &resetting(&code));
    let machine = kernel.launch(console.sinks());
    machine.resume().unwrap();
    console.wait_more(2);
    machine.track(true).unwrap();
    let mut shadow = image(&*machine);
    for cut in 0..30 {
        console.wait_more(cut % 3);
        follow(&machine, &mut shadow);
        machine.pause().unwrap();
        follow(&machine, &mut shadow);
        machine.save().unwrap();
        follow(&machine, &mut shadow);
        assert!(shadow == image(&*machine), "cut {cut}");
        machine.resume().unwrap();
    }
    assert_eq!(machine.exit_reason(), None);
}

#[test]
fn a_guest_that_moved_boots_again_from_the_files_its_new_host_was_given_or_says_that_there_are_none() {
    needs_kvm!();
    let kernel = Snippet::new("moved", &CHANGE_AND_RESET);
    for given in [true, false] {
        let console = Console::default();
        let machine = kernel.launch(console.sinks());
        machine.resume().unwrap();
        console.wait_for("a0");
        machine.pause().unwrap();
        let heard = console.clone();
        let mut builder = Machine::builder(move || heard.sinks());
        if given {
            builder = builder.with_boot_files(BootFiles {
                kernel: kernel.path().to_owned(),
                initrd: None,
            });
        }
        let twin = builder.build_machine(&machine.describe()).unwrap();
        common::copy_memory(&*machine, &*twin);
        twin.restore(&machine.save().unwrap()).unwrap();
        drop(machine);
        twin.resume().unwrap();
        twin.console_input(b"r");
        if given {
            console.wait_for("a0a0");
        } else {
            let why = "it came from another host, and this one was given no kernel to boot it from";
            let over = twin.wait_exit(Some(PATIENCE));
            assert_eq!(over, Some(ExitReason::NoRestart(why.to_owned())));
            assert_eq!(twin.reset().unwrap_err().to_string(), "cannot reset: the guest is over");
        }
    }
}

#[test]
fn what_a_reset_does_moves_with_the_guest() {
    needs_kvm!();
    let console = Console::default();
    let kernel = Snippet::new("exits", &CHANGE_AND_RESET);
    let machine = Machine::launch(&kernel.config().with_on_reset(OnReset::Exit), console.sinks()).unwrap();
    machine.resume().unwrap();
    console.wait_for("a0");
    machine.pause().unwrap();
    let twin = move_to_twin(&*machine, &console);
    drop(machine);
    twin.resume().unwrap();
    twin.console_input(b"r");
    assert_eq!(twin.wait_exit(Some(PATIENCE)), Some(ExitReason::Reset));
}

#[test]
fn a_kernel_that_has_gone_meanwhile_is_a_reset_that_ends_and_says_so() {
    needs_kvm!();
    let console = Console::default();
    let kernel = Snippet::new("gone", &CHANGE_AND_RESET);
    let machine = kernel.launch(console.sinks());
    let path = kernel.path().display().to_string();
    drop(kernel);
    machine.resume().unwrap();
    machine.console_input(b"r");
    let Some(ExitReason::NoRestart(why)) = machine.wait_exit(Some(PATIENCE)) else {
        panic!("{:?}", machine.exit_reason());
    };
    assert!(why.starts_with(&format!("{path}: cannot open the kernel: ")), "{why}");
}

#[test]
fn a_guest_that_resets_all_the_time_can_be_dropped_at_any_moment() {
    needs_kvm!();
    for round in 0..20 {
        let console = Console::default();
        let kernel = Snippet::new("drop", &resetting(&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe]));
        let machine = kernel.launch(console.sinks());
        machine.resume().unwrap();
        console.wait_more(round % 4);
        drop(machine);
    }
}
