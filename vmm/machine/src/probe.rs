//! What this host's KVM can do, found out by trying.
//!
//! Nothing here is assumed from a processor's name or a kernel's version: each answer comes from asking or doing.

use std::arch::x86_64::__cpuid;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::OnceLock;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VmFd};
use umbra_units::{Bytes, Gpa};

use crate::config::{Shape, Sharing};
use crate::dirty;
use crate::dirty::ring::DirtyRing;
use crate::error::Error;
use crate::limits;
use crate::memory::Memory;
use crate::uffd::{PROTECTED, PROTECTED_OF_SHARED, Uffd};

const DEV_KVM: &str = "/dev/kvm";

/// What `umbra doctor` tells. Every field was found by asking or trying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostReport {
    /// KVM's API version; 12 since 2007.
    pub api_version: i32,
    /// vCPUs recommended at most, and possible at most, per VM.
    pub vcpus: (usize, usize),
    /// The dirty log can be cleared apart from reading it.
    pub manual_dirty_log: bool,
    /// Logging can begin without write-protecting everything.
    pub dirty_log_initially_set: bool,
    /// Entries of the largest dirty ring; 0 without one.
    pub dirty_ring_entries: u32,
    /// Large pages are split ahead of the guest's writes when these are recorded; `None` if this host does not say.
    pub eager_page_split: Option<bool>,
    /// Interrupts by eventfd.
    pub irqfd: bool,
    /// Guest accesses to eventfd.
    pub ioeventfd: bool,
    /// Bytes of a vCPU's XSAVE area.
    pub xsave_bytes: usize,
    /// The guest's clock can be set by wall time.
    pub clock_realtime: bool,
    /// The host's time-stamp counters agree with each other.
    pub tsc_stable: bool,
    /// A guest's time-stamp counter frequency.
    pub tsc_khz: u32,
    /// Guests can have another frequency than the host's.
    pub tsc_scaling: bool,
    /// Kernel code of guests runs on the processor, not in KVM's instruction emulator.
    pub ring0: Ring0,
    /// Memory can be watched for missing and written pages.
    pub userfaultfd: Userfaultfd,
    /// Guest memory can live in a memfd.
    pub memfd: bool,
}

/// How a guest's most privileged code runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ring0 {
    /// On the processor, by VMX or SVM.
    Native,
    /// In KVM's emulator, which knows few instructions: a software-virtualised host.
    Emulated,
    /// It could not be found out.
    Unknown(String),
}

/// What userfaultfd gives this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Userfaultfd {
    /// Nothing, and why.
    No(String),
    /// Only faults of user space, which KVM's are not.
    UserModeOnly,
    /// All faults; with write protection of anonymous and of shared memory, or not.
    Full {
        /// Anonymous memory can be write-protected.
        write_protect: bool,
        /// Shared memory can be.
        write_protect_shared: bool,
    },
}

/// Open `/dev/kvm`, or say what the operator can do about it.
pub(crate) fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| Error::NoKvm(why_no_kvm(std::io::Error::from_raw_os_error(error.errno()))))?;
    match kvm.get_api_version() {
        version if u32::try_from(version) == Ok(KVM_API_VERSION) => Ok(kvm),
        version => Err(Error::NoKvm(format!(
            "{DEV_KVM}: expected API version {KVM_API_VERSION}, got {version}"
        ))),
    }
}

fn why_no_kvm(error: std::io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => format!(
            "{DEV_KVM} does not exist: this host has no KVM (processor without VMX or SVM, virtualisation switched off in \
             the firmware, or the kvm_intel or kvm_amd module not loaded)"
        ),
        ErrorKind::PermissionDenied => {
            format!(
                "{DEV_KVM} may not be opened by this user: it needs read and write permission{}",
                owner_of_kvm()
            )
        }
        _ => format!("{DEV_KVM} cannot be opened: {error}"),
    }
}

fn owner_of_kvm() -> String {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    std::fs::metadata(Path::new(DEV_KVM)).map_or_else(
        |_| String::new(),
        |metadata| {
            let (group, mode) = (metadata.gid(), metadata.permissions().mode() & 0o777);
            format!(
                "; its mode is {mode:o} and its group {}, usually \"kvm\": add the user to it",
                group_name(group)
            )
        },
    )
}

fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let of = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    };
    groups.lines().find_map(of).unwrap_or_else(|| gid.to_string())
}

/// Find out what this host can do. An error means that it can run no guest at all.
pub fn probe() -> Result<HostReport, Error> {
    let kvm = open_kvm()?;
    let vm = kvm.create_vm().map_err(Error::kvm("create a VM"))?;
    let raw = |cap: u32| u32::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
    let manual = raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
    let clock = vm.get_clock().map_err(Error::kvm("read the clock"))?;
    let xsave2 = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let adjust_clock = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
    Ok(HostReport {
        api_version: kvm.get_api_version(),
        vcpus: (kvm.get_nr_vcpus(), kvm.get_max_vcpus()),
        manual_dirty_log: manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
        dirty_log_initially_set: manual & KVM_DIRTY_LOG_INITIALLY_SET != 0,
        dirty_ring_entries: DirtyRing::most_entries(&vm).unwrap_or(0),
        eager_page_split: eager_page_split(),
        irqfd: vm.check_extension(Cap::Irqfd),
        ioeventfd: vm.check_extension(Cap::Ioeventfd),
        xsave_bytes: xsave2.max(4096),
        clock_realtime: adjust_clock & KVM_CLOCK_REALTIME != 0,
        tsc_stable: clock.flags & KVM_CLOCK_TSC_STABLE != 0,
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        tsc_scaling: vm.check_extension(Cap::TscControl),
        ring0: try_ring0(&kvm).unwrap_or_else(|error| Ring0::Unknown(error.to_string())),
        userfaultfd: try_userfaultfd(),
        memfd: Memory::new(tiny(Sharing::Shared)).is_ok(),
    })
}

/// Whether KVM splits large pages when logging begins or is renewed, and not only when a vCPU writes to them. Needs the
/// two-dimensional paging's own MMU as well (kernel-parameters, `kvm.eager_page_split`). `None` where the module does not say.
fn eager_page_split() -> Option<bool> {
    let parameter = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/module/kvm/parameters/{name}")).ok()?;
        Some(matches!(text.trim(), "Y" | "1"))
    };
    Some(parameter("eager_page_split")? && parameter("tdp_mmu").unwrap_or(true))
}

fn tiny(sharing: Sharing) -> Shape {
    Shape::new(1, limits::MEMORY_LEAST, sharing).expect("the least memory is enough")
}

fn try_userfaultfd() -> Userfaultfd {
    match Uffd::features_offered(false) {
        Ok(features) => Userfaultfd::Full {
            write_protect: features & PROTECTED != 0,
            write_protect_shared: features & PROTECTED_OF_SHARED != 0,
        },
        Err(error) if Uffd::features_offered(true).is_err() => Userfaultfd::No(error.to_string()),
        Err(_) => Userfaultfd::UserModeOnly,
    }
}

/// Whether this host emulates its guests' kernels; asked once per process.
///
/// Trying takes a VM of its own, so it is tried only where the processor shows neither VMX nor SVM: then KVM must have
/// another way, and emulation is one.
pub(crate) fn emulates_kernels(kvm: &Kvm) -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        const VMX: u32 = 1 << 5;
        const SVM: u32 = 1 << 2;
        let has = __cpuid(1).ecx & VMX != 0 || __cpuid(0x8000_0001).ecx & SVM != 0;
        !has && matches!(try_ring0(kvm), Ok(Ring0::Emulated))
    })
}

/// Run `popcnt` in ring 0 of a throwaway VM: KVM's emulator does not know it, every processor does.
fn try_ring0(kvm: &Kvm) -> Result<Ring0, Error> {
    const CODE: [u8; 6] = [0xf3, 0x0f, 0xb8, 0xc1, 0xe6, PORT];
    const PORT: u8 = 0x10;
    let vm = std::sync::Arc::new(kvm.create_vm().map_err(Error::kvm("create a VM"))?);
    let memory = Memory::new(tiny(Sharing::Private))?;
    dirty::set_slots(&vm, memory.blocks(), false)?;
    memory.write(Gpa(0x1000), &CODE)?;
    let answer = run_flat(&vm, kvm, 0x1000);
    // The VM goes before its memory.
    drop(vm);
    drop(memory);
    answer
}

fn run_flat(vm: &VmFd, kvm: &Kvm, rip: u64) -> Result<Ring0, Error> {
    let mut vcpu = vm.create_vcpu(0).map_err(Error::kvm("create a vCPU"))?;
    crate::cpu::Cpuid::supported(kvm, 1)?.for_vcpu(0, 1).give_to(&vcpu)?;
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read special registers"))?;
    let flat = |type_| kvm_segment {
        limit: 0xffff_ffff,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        ..flat(0xb)
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = kvm_segment {
            selector: 16,
            ..flat(3)
        };
    }
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set special registers"))?;
    let regs = kvm_regs {
        rip,
        rcx: 0xff,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))?;
    Ok(match vcpu.run().map_err(Error::kvm("run a vCPU"))? {
        VcpuExit::IoOut(..) => Ring0::Native,
        VcpuExit::InternalError => Ring0::Emulated,
        other => Ring0::Unknown(format!("unexpected exit {other:?}")),
    })
}

impl fmt::Display for HostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |yes: bool| if yes { "yes" } else { "no" };
        writeln!(f, "KVM API            {}", self.api_version)?;
        writeln!(
            f,
            "vCPUs per guest    {} recommended, {} at most",
            self.vcpus.0, self.vcpus.1
        )?;
        writeln!(f, "guest kernel code  {}", self.ring0)?;
        writeln!(
            f,
            "dirty log          manual clear {}, starts set {}",
            yes(self.manual_dirty_log),
            yes(self.dirty_log_initially_set)
        )?;
        writeln!(f, "dirty ring         {} entries", self.dirty_ring_entries)?;
        let split = match self.eager_page_split {
            Some(true) => "split ahead of writes",
            Some(false) => "split by the write itself: see kvm.eager_page_split, kvm.tdp_mmu",
            None => "unknown",
        };
        writeln!(f, "large pages        {split}")?;
        writeln!(f, "userfaultfd        {}", self.userfaultfd)?;
        writeln!(f, "irqfd, ioeventfd   {}, {}", yes(self.irqfd), yes(self.ioeventfd))?;
        writeln!(f, "memfd              {}", yes(self.memfd))?;
        writeln!(f, "XSAVE area         {}", Bytes::of_len(self.xsave_bytes))?;
        writeln!(f, "clock by wall time {}", yes(self.clock_realtime))?;
        write!(
            f,
            "TSC                {} kHz, stable {}, scaling {}",
            self.tsc_khz,
            yes(self.tsc_stable),
            yes(self.tsc_scaling)
        )
    }
}

impl fmt::Display for Ring0 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("on the processor"),
            Self::Emulated => f.write_str("emulated (software-virtualised host): stock kernels will not boot"),
            Self::Unknown(why) => write!(f, "unknown: {why}"),
        }
    }
}

impl fmt::Display for Userfaultfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No(why) => write!(f, "no: {why}"),
            Self::UserModeOnly => f.write_str("user mode only: of no use for guests"),
            Self::Full {
                write_protect,
                write_protect_shared,
            } => {
                let yes = |yes: bool| if yes { "yes" } else { "no" };
                write!(
                    f,
                    "yes, write protection {}, of shared memory {}",
                    yes(*write_protect),
                    yes(*write_protect_shared)
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let missing = why_no_kvm(std::io::Error::from_raw_os_error(libc::ENOENT));
        assert!(
            missing.starts_with("/dev/kvm does not exist: this host has no KVM"),
            "{missing}"
        );
        let denied = why_no_kvm(std::io::Error::from_raw_os_error(libc::EACCES));
        assert!(
            denied.starts_with("/dev/kvm may not be opened by this user: it needs read and write permission"),
            "{denied}"
        );
    }
}
