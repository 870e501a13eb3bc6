//! What a kernel finds when it starts, by each of the ways it can be started.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

mod common;

use common::{Console, PATIENCE, Snippet, kernel};
use umbra_core::guest::{Guest, PageReader};
use umbra_machine::{ExitReason, Machine, MachineConfig, Sharing, Sinks};
use umbra_units::{Bytes, Pfn, SpaceId};

/// In 64 bits: the zero page at rsi, 32 bytes of command line and 8 of initial RAM disk where it says, to the console.
/// `mov dx, 0x3f8; cld; mov ecx, 4096; rep outsb; mov rbx, rsi; mov esi, [rbx-4096+0x228]; mov ecx, 32; rep outsb;
/// mov esi, [rbx-4096+0x218]; mov ecx, 8; rep outsb; mov al, 7; out 0xf4, al; hlt`
const TELL_ZERO_PAGE: [u8; 50] = [
    0x66, 0xba, 0xf8, 0x03, 0xfc, 0xb9, 0x00, 0x10, 0x00, 0x00, 0xf3, 0x6e, 0x48, 0x89, 0xf3, 0x8b, 0xb3, 0x28, 0xf2,
    0xff, 0xff, 0xb9, 0x20, 0x00, 0x00, 0x00, 0xf3, 0x6e, 0x8b, 0xb3, 0x18, 0xf2, 0xff, 0xff, 0xb9, 0x08, 0x00, 0x00,
    0x00, 0xf3, 0x6e, 0xb0, 0x07, 0xe6, 0xf4, 0xf4, 0x90, 0x90, 0x90, 0x90,
];

/// In 32 bits: the start info at ebx, and where it says 32 bytes of command line and ACPI's root, to the console.
/// `mov dx, 0x3f8; cld; mov esi, ebx; mov ecx, 56; rep outsb; mov esi, [ebx+24]; mov ecx, 32; rep outsb;
/// mov esi, [ebx+32]; mov ecx, 36; rep outsb; mov al, 7; out 0xf4, al; hlt`
const TELL_START_INFO: [u8; 39] = [
    0x66, 0xba, 0xf8, 0x03, 0xfc, 0x89, 0xde, 0xb9, 56, 0, 0, 0, 0xf3, 0x6e, 0x8b, 0x73, 24, 0xb9, 32, 0, 0, 0, 0xf3,
    0x6e, 0x8b, 0x73, 32, 0xb9, 36, 0, 0, 0, 0xf3, 0x6e, 0xb0, 0x07, 0xe6, 0xf4, 0xf4,
];

/// What a guest told on its console before it ended with code 7.
fn told(config: &MachineConfig) -> Vec<u8> {
    let console = Console::default();
    let machine = Machine::launch(config, console.sinks()).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Code(7)));
    console.bytes()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// What a kernel entered by Linux's protocol was told of a machine of 16 MiB.
fn is_told_everything(kernel: &Snippet) {
    let initrd = Snippet::file("initrd", b"INITRD..and more");
    let config = MachineConfig::new(kernel.path(), 1, Bytes::mib(16)).unwrap();
    let config = config
        .with_cmdline("console=ttyS0 quiet")
        .unwrap()
        .with_initrd(initrd.path());
    let told = told(&config);
    let (zero_page, rest) = told.split_at(4096);
    assert_eq!(zero_page[0x202..0x206], *b"HdrS");
    assert_eq!(zero_page[0x210], 0xff, "a loader without a number");
    assert_eq!(u64_at(zero_page, 0x70), 0xe_0000, "ACPI's root");
    assert_eq!(u32_at(zero_page, 0x21c), 16, "bytes of initrd");
    let initrd_at = u32_at(zero_page, 0x218);
    assert!(
        initrd_at.is_multiple_of(4096) && initrd_at + 4096 == 16 << 20,
        "{initrd_at:#x}"
    );
    let map: Vec<_> = (0..usize::from(zero_page[0x1e8]))
        .map(|n| {
            let entry = &zero_page[0x2d0 + n * 20..];
            (u64_at(entry, 0), u64_at(entry, 8), u32_at(entry, 16))
        })
        .collect();
    let expected = [(0, 0x9_fc00, 1), (0x9_fc00, 0x6_0400, 2), (0x10_0000, 15 << 20, 1)];
    assert_eq!(map, expected);
    assert_eq!(rest[..20], *b"console=ttyS0 quiet\0");
    assert_eq!(rest[32..], *b"INITRD..");
}

#[test]
fn a_vmlinux_without_a_pvh_note_is_entered_in_long_mode_and_told_everything() {
    needs_kvm!();
    is_told_everything(&Snippet::linux("vmlinux", &TELL_ZERO_PAGE));
}

#[test]
fn a_bzimage_is_entered_in_long_mode_and_told_everything() {
    needs_kvm!();
    is_told_everything(&Snippet::bzimage("bzimage", &TELL_ZERO_PAGE));
}

#[test]
fn a_kernel_with_a_pvh_note_is_told_where_acpi_begins() {
    needs_kvm!();
    let kernel = Snippet::new("start-info", &TELL_START_INFO);
    let told = told(&kernel.config().with_cmdline("hello").unwrap());
    assert_eq!(u32_at(&told, 0), 0x336e_c578);
    assert_eq!(u32_at(&told, 48), 3, "runs of the memory map");
    assert_eq!(told[56..62], *b"hello\0");
    let root = &told[56 + 32..];
    assert_eq!(root[..8], *b"RSD PTR ");
    assert_eq!(root.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
}

#[test]
fn a_guest_uses_memory_above_four_gib() {
    needs_kvm!();
    // Map 4 GiB onto itself by one more page directory, at 0x50000, hung into the tables it was started with; then
    // `mov byte [4 GiB], 'H'`, read it back, tell it, end with code 9.
    let code = [
        0x48, 0xb8, 0x83, 0, 0, 0, 1, 0, 0, 0, 0x48, 0x89, 0x04, 0x25, 0, 0, 5, 0, 0xc7, 0x04, 0x25, 0x20, 0xa0, 0, 0,
        0x03, 0, 5, 0, 0x48, 0xbb, 0, 0, 0, 0, 1, 0, 0, 0, 0xc6, 0x03, 0x48, 0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee,
        0xb0, 0x09, 0xe6, 0xf4, 0xf4,
    ];
    let console = Console::default();
    let kernel = Snippet::linux("high", &code);
    let config = MachineConfig::new(kernel.path(), 1, Bytes::mib(5 << 10)).unwrap();
    for sharing in [Sharing::Shared, Sharing::Private] {
        let machine = Machine::launch(&config.clone().with_sharing(sharing), console.sinks()).unwrap();
        machine.resume().unwrap();
        assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Code(9)));
        let mut page = Vec::new();
        machine.read_pages(SpaceId::RAM, &[Pfn(1 << 20)], &mut page).unwrap();
        assert_eq!(page[..2], *b"H\0");
    }
    assert_eq!(console.text(), "HH");
}

#[test]
fn what_cannot_be_booted_is_refused_in_one_line_that_says_why() {
    needs_kvm!();
    let refused = |config: &MachineConfig| Machine::launch(config, Sinks::discard()).unwrap_err().to_string();
    let says = |config: &MachineConfig, what: &str| {
        let line = refused(config);
        assert!(line.contains(what) && !line.contains('\n'), "{line}");
    };
    let big = Snippet::bzimage("greedy", &[0xf4]);
    let mut header = std::fs::read(big.path()).unwrap();
    says(
        &big.config().with_cmdline("x".repeat(256)).unwrap(),
        "cmdline: this kernel takes at most 255 bytes, got 256",
    );
    header[0x263] = 0x10;
    let greedy = Snippet::file("greedy", &header);
    says(
        &greedy.config(),
        "it needs memory up to 262 MiB to start, there are 8 MiB",
    );
    header[0x236] = 0;
    says(
        &Snippet::file("old", &header).config(),
        "expected a bzImage with a 64-bit entry",
    );
    says(
        &Snippet::file("text", b"hello").config(),
        "expected an ELF file (vmlinux) or a bzImage",
    );
    says(&Snippet::file("cut", &header[..0x206]).config(), "not a kernel for us");
    let large = Snippet::file("large", &vec![1; 8 << 20]);
    says(
        &Snippet::new("tiny", &[0xf4]).config().with_initrd(large.path()),
        "does not fit beside the kernel",
    );
    says(
        &MachineConfig::new(kernel(), 1, Bytes::mib(8))
            .unwrap()
            .with_initrd("/nonexistent"),
        "cannot read the initrd",
    );
}

#[test]
fn a_guest_powers_itself_off_by_acpi() {
    needs_kvm!();
    // mov dx, 0x604; mov ax, 0x3400 (sleep now, type 5); out dx, ax; hlt
    let code = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xf4];
    let machine = Snippet::new("off", &code).launch(Sinks::discard());
    machine.resume().unwrap();
    assert_eq!(machine.wait_exit(Some(PATIENCE)), Some(ExitReason::Shutdown));
}

#[test]
fn a_guest_that_listens_hears_its_power_button_before_and_after_it_moved() {
    needs_kvm!();
    // mov dx, 0x602; mov ax, 0x100; out dx, ax (listen); mov dl, 0xf8; mov dh, 3; mov al, 'r'; out dx, al;
    // again: mov dx, 0x600; in ax, dx; test ah, 1; jz again; mov ax, 0x100; out dx, ax (seen);
    // mov dx, 0x3f8; mov al, 'b'; out dx, al; jmp again
    let code = [
        0x66, 0xba, 0x02, 0x06, 0x66, 0xb8, 0x00, 0x01, 0x66, 0xef, 0xb2, 0xf8, 0xb6, 0x03, 0xb0, b'r', 0xee, 0x66,
        0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf5, 0x66, 0xb8, 0x00, 0x01, 0x66, 0xef, 0x66, 0xba,
        0xf8, 0x03, 0xb0, b'b', 0xee, 0xeb, 0xe6,
    ];
    let console = Console::default();
    let machine = Snippet::new("button", &code).launch(console.sinks());
    assert!(!machine.power_button(), "not yet");
    machine.resume().unwrap();
    console.wait_for("rb");
    assert!(machine.power_button());
    console.wait_for("rbb");
    machine.pause().unwrap();
    assert!(machine.power_button(), "a press is kept while the guest is paused");
    let twin = common::move_to_twin(&*machine, &console);
    drop(machine);
    twin.resume().unwrap();
    console.wait_for("rbbb");
}
