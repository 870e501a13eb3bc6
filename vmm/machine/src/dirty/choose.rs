//! Which log a machine gets, and why.
//!
//! Who names one gets it, or a refusal. Otherwise both are tried on a scratch VM of one vCPU: it writes to some dozen
//! pages again and again, and between times they are harvested. Three costs come of it: of a page written first after a
//! harvest (the guest pays), of harvesting a page, and of harvesting per page of memory that was not written (the
//! bitmap's alone). What they add up to for a guest of this size, of which [`TYPICAL`] is written between two harvests, is
//! compared.
//!
//! The measuring takes a few milliseconds and is done once per process, and only where there is a choice. It can be
//! disturbed by other work of the host, so each figure is the least of several, and the bitmap stays unless the ring is
//! clearly cheaper: its logging begins without write-protecting all of memory, and it is never full.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use umbra_units::{Bytes, Gpa, PAGE_SIZE, PageCount};

use super::bitmap::DirtyBitmap;
use super::ring::DirtyRing;
use super::{WriteLog, index, set_slots};
use crate::config::{DirtyLog, RingEntries, Shape, Sharing};
use crate::error::Error;
use crate::memory::Memory;
use crate::probe;

/// The log a machine uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyLogReport {
    /// Entries of each vCPU's ring; `None` if it is the bitmap.
    pub ring_entries: Option<u32>,
    /// Why it is this one.
    pub why: String,
}

impl DirtyLogReport {
    /// `bitmap` or `ring`.
    pub const fn name(&self) -> &'static str {
        match self.ring_entries {
            Some(_) => "ring",
            None => "bitmap",
        }
    }
}

/// The log for a machine of this shape. Must come before the VM has vCPUs, or slots that are logged.
pub(crate) fn log(
    vm: &Arc<VmFd>,
    wanted: DirtyLog,
    shape: Shape,
) -> Result<(Arc<dyn WriteLog>, DirtyLogReport), Error> {
    let (choice, why) = match wanted {
        DirtyLog::Bitmap => (None, "asked for".to_owned()),
        DirtyLog::Ring(entries) => (Some(entries.get()), "asked for".to_owned()),
        DirtyLog::Auto => choose(vm, shape.ram().present_pages()),
    };
    let log: Arc<dyn WriteLog> = match choice {
        Some(entries) => Arc::new(DirtyRing::new(vm.clone(), entries, shape.cpus())?),
        None => Arc::new(DirtyBitmap::new(vm.clone())?),
    };
    let report = DirtyLogReport {
        ring_entries: choice,
        why,
    };
    tracing::info!(
        log = report.name(),
        entries = choice,
        why = report.why,
        "how writes are recorded"
    );
    Ok((log, report))
}

/// How many entries of a ring, if it is to be the ring; and why.
fn choose(vm: &VmFd, memory: PageCount) -> (Option<u32>, String) {
    static MEASURED: OnceLock<Result<(DirtyLogCosts, DirtyLogCosts), String>> = OnceLock::new();
    let Some(most) = DirtyRing::most_entries(vm) else {
        return (None, "this kernel has no dirty ring".to_owned());
    };
    let entries = RingEntries::default().get().min(most);
    match MEASURED.get_or_init(|| dirty_log_costs().map_err(|error| error.to_string())) {
        Ok((bitmap, ring)) => {
            let (of_bitmap, of_ring) = (bitmap.of_a_round(memory), ring.of_a_round(memory));
            let why = format!(
                "measured: a harvest of {} pages of {} costs guest and host {} us with the bitmap, {} us with the ring",
                typical(memory),
                memory.0,
                of_bitmap.as_micros(),
                of_ring.as_micros()
            );
            (clearly_less(of_ring, of_bitmap).then_some(entries), why)
        }
        Err(why) => (None, format!("it cannot be measured here: {why}")),
    }
}

/// One in so many pages is written between two harvests.
const TYPICAL: u64 = 100;

const fn typical(memory: PageCount) -> u64 {
    memory.0.div_ceil(TYPICAL)
}

/// By a tenth at least: what a measurement of milliseconds can tell.
fn clearly_less(this: Duration, that: Duration) -> bool {
    this.as_nanos() * 10 < that.as_nanos() * 9
}

/// What one log costs here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DirtyLogCosts {
    /// The guest, per page written first after a harvest.
    pub write_ns: f64,
    /// The harvest, per page written.
    pub harvest_ns: f64,
    /// The harvest, per page of memory.
    pub memory_ns: f64,
}

impl DirtyLogCosts {
    /// A harvest of a guest with so much memory, and the writes that it finds.
    fn of_a_round(self, memory: PageCount) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "page counts are far below 2^52")]
        let (written, all) = (typical(memory) as f64, memory.0 as f64);
        let ns = (self.write_ns + self.harvest_ns).mul_add(written, self.memory_ns * all);
        Duration::from_secs_f64(ns / 1e9)
    }
}

/// Measure what recording writes costs on this host, in some milliseconds: with the bitmap, and with a ring.
pub fn dirty_log_costs() -> Result<(DirtyLogCosts, DirtyLogCosts), Error> {
    let kvm = probe::open_kvm()?;
    let bitmap = costs(&kvm, |vm| Ok(Arc::new(DirtyBitmap::new(vm.clone())?)))?;
    let ring = costs(&kvm, |vm| Ok(Arc::new(DirtyRing::new(vm.clone(), RINGS_ENTRIES, 1)?)))?;
    tracing::debug!(?bitmap, ?ring, "what recording writes costs here");
    Ok((bitmap, ring))
}

/// Pages the scratch guest writes to: few enough for a ring of these entries and for a moment, enough for the clock.
const WRITTEN: u32 = 64;
const RINGS_ENTRIES: u32 = 1024;
const ROUNDS: usize = 3;

fn costs(kvm: &Kvm, log: impl FnOnce(&Arc<VmFd>) -> Result<Arc<dyn WriteLog>, Error>) -> Result<DirtyLogCosts, Error> {
    // Made first, so that it goes last.
    let memory = Memory::new(Shape::new(1, Bytes::mib(64), Sharing::Private)?)?;
    let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("create a VM"))?);
    let log = log(&vm)?;
    set_slots(&vm, memory.blocks(), false)?;
    let mut writer = Writer::new(kvm, &vm, &memory)?;
    log.attach(&writer.vcpu)?;
    let blocks = memory.blocks();
    let pages = memory.space().pages;
    let mut words = vec![0; index(pages.0.div_ceil(64))];
    let timed = |doing: &mut dyn FnMut() -> Result<(), Error>| {
        let start = Instant::now();
        doing()?;
        Ok::<_, Error>(start.elapsed().as_secs_f64() * 1e9)
    };
    writer.write()?;
    log.start(blocks)?;
    // The first harvest may be of everything.
    log.take(blocks, &mut words)?;
    let mut least = [f64::MAX; 3];
    for _ in 0..ROUNDS {
        let write = timed(&mut || writer.write())?;
        words.fill(0);
        let harvest = timed(&mut || log.take(blocks, &mut words))?;
        let found: u32 = words.iter().map(|word| word.count_ones()).sum();
        if found < WRITTEN {
            return Err(Error::WrongState("a log did not record what a scratch guest wrote"));
        }
        let nothing = timed(&mut || log.take(blocks, &mut words))?;
        for (least, now) in least.iter_mut().zip([write, harvest, nothing]) {
            *least = least.min(now);
        }
    }
    let [write, harvest, nothing] = least;
    #[expect(clippy::cast_precision_loss, reason = "a small number of pages")]
    let memory_ns = nothing / pages.0 as f64;
    Ok(DirtyLogCosts {
        write_ns: write / f64::from(WRITTEN),
        harvest_ns: (harvest - nothing).max(0.0) / f64::from(WRITTEN),
        memory_ns,
    })
}

/// A vCPU whose guest writes to one page after the other, over and over.
struct Writer {
    vcpu: VcpuFd,
}

/// Where its page tables, its code and what it writes to begin, and where it says that it is done.
const TABLES: u64 = 0x2000;
const CODE: u64 = 0x1000;
const FIRST: u64 = 0x20_0000;
const DONE: u64 = 0x4000_0000;

impl Writer {
    /// It runs in 64-bit user mode, where hosts without VMX or SVM run guests natively too, and says that it is done by
    /// writing where no memory is.
    fn new(kvm: &Kvm, vm: &VmFd, memory: &Memory) -> Result<Self, Error> {
        let mut code = vec![0x48, 0xbf]; // again: mov rdi, FIRST
        code.extend(FIRST.to_le_bytes());
        code.push(0xb9); // mov ecx, WRITTEN
        code.extend(WRITTEN.to_le_bytes());
        code.extend([0x88, 0x0f]); // next: mov [rdi], cl
        code.extend([0x48, 0x81, 0xc7, 0, 0x10, 0, 0]); // add rdi, 4096
        code.extend([0xff, 0xc9, 0x75, 0xf3]); // dec ecx; jnz next
        code.extend([0x89, 0x03, 0xeb, 0xe0]); // mov [rbx], eax; jmp again
        memory.write(Gpa(CODE), &code)?;
        // Present, writable, for user mode, accessed and dirty already; large where it is a leaf.
        const TABLE: u64 = 0x27;
        const LEAF: u64 = 0xe7;
        let page = PAGE_SIZE as u64;
        let put = |at: u64, entry: u64| memory.write(Gpa(at), &entry.to_le_bytes());
        let [low, done] = [TABLES + 2 * page, TABLES + 3 * page];
        put(TABLES, (TABLES + page) | TABLE)?;
        put(TABLES + page, low | TABLE)?;
        put(TABLES + page + 8, done | TABLE)?;
        put(low, LEAF)?;
        put(low + 8, FIRST | LEAF)?;
        put(done, DONE | LEAF)?;

        let vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
        crate::cpu::Cpuid::supported(kvm, 1)?.for_vcpu(0, 1).give_to(&vcpu)?;
        let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read special registers"))?;
        let flat = kvm_segment {
            limit: 0xffff_ffff,
            present: 1,
            s: 1,
            g: 1,
            dpl: 3,
            ..Default::default()
        };
        sregs.cs = kvm_segment {
            selector: 0x33,
            type_: 0xb,
            l: 1,
            ..flat
        };
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            *segment = kvm_segment {
                selector: 0x2b,
                type_: 3,
                db: 1,
                ..flat
            };
        }
        sregs.cr0 = 0x8001_0031;
        sregs.cr3 = TABLES;
        sregs.cr4 = 0x20;
        sregs.efer = 0x500;
        vcpu.set_sregs(&sregs).map_err(Error::kvm("set special registers"))?;
        let regs = kvm_regs {
            rip: CODE,
            rbx: DONE,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))?;
        Ok(Self { vcpu })
    }

    /// Write to every page once.
    fn write(&mut self) -> Result<(), Error> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(DONE, _)) => return Ok(()),
                Ok(_) => return Err(Error::WrongState("a scratch guest does not run as it should")),
                // A signal for this thread, which is not ours to wonder about.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(source) => {
                    return Err(Error::Kvm {
                        doing: "run a vCPU",
                        source,
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn costs_of(write_ns: f64, harvest_ns: f64, memory_ns: f64) -> DirtyLogCosts {
        DirtyLogCosts {
            write_ns,
            harvest_ns,
            memory_ns,
        }
    }

    #[test]
    fn a_log_that_costs_nothing_per_page_of_memory_wins_where_memory_is_large() {
        let (bitmap, ring) = (costs_of(2500.0, 30.0, 1.0), costs_of(2600.0, 40.0, 0.0));
        let wins = |ring: DirtyLogCosts, pages| {
            let memory = PageCount(pages);
            clearly_less(ring.of_a_round(memory), bitmap.of_a_round(memory))
        };
        assert!(!wins(ring, 1 << 16), "not by a tenth");
        assert!(wins(costs_of(2000.0, 40.0, 0.0), 1 << 16));
        assert_eq!(bitmap.of_a_round(PageCount(1000)), Duration::from_nanos(25_300 + 1000));
    }

    #[test]
    fn a_tenth_decides() {
        let ns = Duration::from_nanos;
        assert!(clearly_less(ns(89), ns(100)) && !clearly_less(ns(90), ns(100)));
    }

    #[test]
    fn both_logs_can_be_measured_where_there_are_both() {
        let Ok(kvm) = probe::open_kvm() else {
            eprintln!("SKIPPED: there is no KVM");
            return;
        };
        if DirtyRing::most_entries(&kvm.create_vm().unwrap()).is_none() {
            eprintln!("SKIPPED: there is no dirty ring");
            return;
        }
        let (bitmap, ring) = dirty_log_costs().unwrap();
        eprintln!("{bitmap:?} {ring:?}");
        for costs in [bitmap, ring] {
            assert!(costs.write_ns > 0.0 && costs.memory_ns > 0.0, "{costs:?}");
        }
    }
}
