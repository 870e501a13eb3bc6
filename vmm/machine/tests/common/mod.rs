//! What the machine's tests share: consoles to listen at, kernels to boot, guests to move.
#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use umbra_core::guest::{Guest, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_machine::{DirtyLog, Machine, MachineConfig, Out, RingEntries, Sinks};
use umbra_units::{Bytes, PAGE_SIZE, PageCount, PageId, Pfn, SpaceId};

/// Long enough for anything here on a busy machine; nothing waits for it when all is well.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Whether KVM tests can run. They fail without KVM, unless somebody says that this is known.
pub(crate) fn kvm_is_here() -> bool {
    match umbra_machine::probe() {
        Ok(_) => true,
        Err(why) if std::env::var_os("UMBRA_SKIP_KVM").is_some_and(|value| value == "1") => {
            eprintln!("SKIPPED: {why}");
            false
        }
        Err(why) => panic!("this test needs KVM (set UMBRA_SKIP_KVM=1 to skip it): {why}"),
    }
}

/// Leaves the test when there is no KVM and that is known.
#[macro_export]
macro_rules! needs_kvm {
    () => {
        if !$crate::common::kvm_is_here() {
            return;
        }
    };
}

/// The tiny kernel.
pub(crate) fn kernel() -> PathBuf {
    let path = std::env::var_os("UMBRA_GUEST").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/guest/target/release/umbra-guest"),
        PathBuf::from,
    );
    assert!(
        path.exists(),
        "{} is missing: cargo build --release --manifest-path resources/guest/Cargo.toml, or set UMBRA_GUEST",
        path.display()
    );
    path
}

/// A console that somebody listens to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Console(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Out for Console {
    fn put(&self, bytes: &[u8]) {
        self.0.0.lock().unwrap().extend_from_slice(bytes);
        self.0.1.notify_all();
    }
}

impl Console {
    pub(crate) fn sinks(&self) -> Sinks {
        Sinks::new(self.clone())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.0.lock().unwrap().len()
    }

    /// Wait until `enough` of what was heard.
    pub(crate) fn wait(&self, what: &str, enough: impl Fn(&[u8]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = self.0.0.lock().unwrap();
        while !enough(&heard) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "waited in vain for {what}; heard:\n{}",
                String::from_utf8_lossy(&heard)
            );
            heard = self.0.1.wait_timeout(heard, left).unwrap().0;
        }
    }

    pub(crate) fn wait_for(&self, text: &str) {
        self.wait(text, |heard| {
            heard.windows(text.len()).any(|window| window == text.as_bytes())
        });
    }

    /// Wait for `n` more bytes than now.
    pub(crate) fn wait_more(&self, n: usize) {
        let now = self.len();
        self.wait("more output", |heard| heard.len() >= now + n);
    }
}

/// A machine running the tiny kernel.
pub(crate) fn launch(cpus: u8, memory: Bytes, cmdline: &str, console: &Console) -> Arc<Machine> {
    launch_with(DirtyLog::Bitmap, cpus, memory, cmdline, console)
}

/// The same, with this log.
pub(crate) fn launch_with(log: DirtyLog, cpus: u8, memory: Bytes, cmdline: &str, console: &Console) -> Arc<Machine> {
    let config = MachineConfig::new(kernel(), cpus, memory)
        .unwrap()
        .with_dirty_log(log)
        .with_cmdline(cmdline)
        .unwrap();
    Machine::launch(&config, console.sinks()).unwrap()
}

/// Both logs, if the kernel has both. The ring is the smallest: busy guests fill it again and again.
pub(crate) fn logs() -> Vec<DirtyLog> {
    let mut logs = vec![DirtyLog::Bitmap];
    if umbra_machine::probe().is_ok_and(|host| host.dirty_ring_entries > 0) {
        logs.push(DirtyLog::Ring(RingEntries::new(1024).unwrap()));
    } else {
        eprintln!("SKIPPED for the dirty ring: this kernel has none");
    }
    logs
}

/// All pages of RAM that exist.
pub(crate) fn all_pages(space: &Space) -> Vec<Pfn> {
    space
        .present
        .iter()
        .flat_map(|(first, count)| (0..count.0).map(|n| *first + PageCount(n)))
        .collect()
}

/// All of RAM.
pub(crate) fn image(guest: &dyn Guest) -> Vec<u8> {
    let mut out = Vec::new();
    guest
        .read_pages(SpaceId::RAM, &all_pages(&guest.spaces()[0]), &mut out)
        .unwrap();
    out
}

/// Build the twin of `source`, which is paused, and give it memory and state.
pub(crate) fn move_to_twin(source: &dyn Guest, console: &Console) -> Arc<Machine> {
    let console = console.clone();
    let twin = Machine::builder(move || console.sinks())
        .build_machine(&source.describe())
        .unwrap();
    let records = source.save().unwrap();
    copy_memory(source, &*twin);
    twin.restore(&records).unwrap();
    twin
}

pub(crate) fn copy_memory(source: &dyn Guest, twin: &dyn Guest) {
    let pages = all_pages(&source.spaces()[0]);
    let bytes = image(source);
    for (page, bytes) in pages.iter().zip(bytes.as_chunks::<PAGE_SIZE>().0) {
        twin.apply_page(PageId::ram(*page), bytes).unwrap();
    }
}

/// The pages of a harvest.
pub(crate) fn pages(harvest: &Harvest) -> Vec<Pfn> {
    harvest.dirty.iter().flat_map(|(_, set)| set.iter()).collect()
}

/// Harvest, and copy what was written into `shadow`.
pub(crate) fn follow(machine: &Machine, shadow: &mut [u8]) -> usize {
    let dirty = pages(&machine.harvest().unwrap());
    let mut bytes = Vec::new();
    machine.read_pages(SpaceId::RAM, &dirty, &mut bytes).unwrap();
    for (page, bytes) in dirty.iter().zip(bytes.as_chunks::<PAGE_SIZE>().0) {
        let at = usize::try_from(page.gpa().0).unwrap();
        shadow[at..at + PAGE_SIZE].copy_from_slice(bytes);
    }
    dirty.len()
}

/// Two images of the same memory.
pub(crate) fn assert_same(shadow: &[u8], guest: &[u8], when: &str) {
    let wrong: Vec<usize> = (0..guest.len() / PAGE_SIZE)
        .filter(|n| page_of(guest, *n) != page_of(shadow, *n))
        .collect();
    assert!(
        wrong.is_empty(),
        "{when}: {} pages differ, first {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(8)]
    );
}

pub(crate) fn record<'a>(records: &'a mut [StateRecord], kind: &str) -> &'a mut StateRecord {
    records.iter_mut().find(|record| record.kind == kind).unwrap()
}

/// Guests of a few instructions, for what the tiny kernel never does: 32-bit code at 1 MiB, in an ELF file.
pub(crate) struct Snippet(PathBuf);

impl Snippet {
    /// Entered by PVH: 32 bits, no paging.
    pub(crate) fn new(name: &str, code: &[u8]) -> Self {
        Self::file(name, &elf(code, true))
    }

    /// An ELF file without a PVH note, entered by Linux's protocol: 64 bits.
    pub(crate) fn linux(name: &str, code: &[u8]) -> Self {
        Self::file(name, &elf(code, false))
    }

    /// A bzImage, entered the same way.
    pub(crate) fn bzimage(name: &str, code: &[u8]) -> Self {
        Self::file(name, &bzimage(code))
    }

    pub(crate) fn file(name: &str, bytes: &[u8]) -> Self {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        std::fs::create_dir_all(directory).unwrap();
        // A name of its own each time: tests run at once, in this process and in others.
        static FILES: AtomicU32 = AtomicU32::new(0);
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("{name}-{}-{number}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn config(&self) -> MachineConfig {
        MachineConfig::new(&self.0, 1, Bytes::mib(8)).unwrap()
    }

    pub(crate) fn launch(&self, sinks: Sinks) -> Arc<Machine> {
        Machine::launch(&self.config(), sinks).unwrap()
    }
}

impl Drop for Snippet {
    fn drop(&mut self) {
        // Left behind, it would only take room.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Sends back each byte typed, plus one, forever:
/// `again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dl, 0xf8; in al, dx; inc al; out dx, al; jmp again`
pub(crate) const ECHO: [u8; 17] = [
    0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0xb2, 0xf8, 0xec, 0xfe, 0xc0, 0xee, 0xeb, 0xef,
];

const BASE: u64 = 0x10_0000;

/// A bzImage of protocol 2.15 whose 64-bit entry is `code`; it wants 4 MiB from 2 MiB on, and 255 bytes of command line.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024 + 0x200];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &255_u32.to_le_bytes());
    put(0x258, &0x20_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    file.extend(code);
    file
}

/// An ELF file with one segment at 1 MiB, entered there, with or without a note that says so to PVH.
fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(u32::try_from(BASE).unwrap().to_le_bytes());
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2_u16, 0x3e].iter().flat_map(|half| half.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([BASE, 64, 0].iter().flat_map(|long| long.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let code_at = HEADERS + note.len() as u64;
    let note_kind = if pvh { 4_u32 } else { 0 };
    for (kind, at, len) in [(note_kind, HEADERS, note.len() as u64), (1, code_at, code.len() as u64)] {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        let address = if kind == 1 { BASE } else { 0 };
        file.extend(
            [at, address, address, len, len, 4]
                .iter()
                .flat_map(|long| long.to_le_bytes()),
        );
    }
    file.extend(note);
    file.extend(code);
    file
}

pub(crate) fn page_of(bytes: &[u8], n: usize) -> &PageBytes {
    &bytes.as_chunks::<PAGE_SIZE>().0[n]
}
