//! What machine to build: a value that cannot be wrong.
//!
//! Everything is checked once, here, with one line that names the field and what was expected of it; whoever holds a
//! [`MachineConfig`] need not check again. Whether the *host* can provide it (enough memory, the kernel file) is found
//! out by building it.

pub mod devices;

use std::path::{Path, PathBuf};

use umbra_devices::FaultPlan;
use umbra_units::{Bytes, PAGE_SIZE, PageCount, Pfn, SpaceId};

use umbra_core::guest::Space;

use self::devices::Devices;
use crate::boot::BootFiles;
use crate::cpu::Template;
use crate::error::Error;
use crate::limits;
use crate::state::restart::Restart;

/// A machine to launch.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    shape: Shape,
    /// Always [complete](Devices::complete).
    devices: Devices,
    backing: Backing,
    on_reset: OnReset,
    fault: Option<FaultPlan>,
    template: Option<Template>,
    dirty_log: DirtyLog,
}

/// How writes of the guest are recorded. The host's own affair: it does not travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyLog {
    /// As is cheaper on this host, by a measurement that takes milliseconds, once per process.
    #[default]
    Auto,
    /// In KVM's bitmap.
    Bitmap,
    /// In rings of KVM's, one per vCPU, of so many entries.
    Ring(RingEntries),
}

/// How many entries a dirty ring has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingEntries(
    /// Always a power of two within the limits.
    u32,
);

impl RingEntries {
    /// So many.
    pub fn new(entries: u32) -> Result<Self, Error> {
        let (least, most) = (limits::RING_ENTRIES_LEAST, limits::RING_ENTRIES_MOST);
        if !(least..=most).contains(&entries) || !entries.is_power_of_two() {
            return Err(bad(
                "dirty-log",
                &format!("entries: expected a power of two from {least} to {most}, got {entries}"),
            ));
        }
        Ok(Self(entries))
    }

    /// How many.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl Default for RingEntries {
    /// A vCPU that writes to pages as fast as it can fills them in a twentieth of a second; they take 256 KiB.
    fn default() -> Self {
        Self(1 << 14)
    }
}

/// What a host backs guest memory with. The host's own affair: it does not travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backing {
    /// Pages of the host's reserve of huge ones; ordinary ones without.
    pub huge_pages: Option<HugePages>,
    /// Take all of it at the start, not each page when it is first touched.
    pub prefault: bool,
}

/// A size of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// 2 MiB.
    #[default]
    TwoMib,
    /// 1 GiB.
    OneGib,
}

impl HugePages {
    /// How large one is.
    pub const fn bytes(self) -> Bytes {
        match self {
            Self::TwoMib => Bytes::mib(2),
            Self::OneGib => Bytes::mib(1 << 10),
        }
    }
}

impl Backing {
    /// Whether memory of this shape can be like that: whole huge pages.
    pub(crate) fn fits(self, shape: Shape) -> Result<(), Error> {
        match self.huge_pages {
            Some(huge) if !shape.memory.0.is_multiple_of(huge.bytes().0) => Err(bad(
                "memory",
                &format!(
                    "expected a multiple of huge pages of {}, got {}",
                    huge.bytes(),
                    shape.memory
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// What happens when the guest asks for a reset: by ACPI, the keyboard controller, or a triple fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnReset {
    /// It is booted again, in place: everything is as at power-on, and the kernel is read again from its file.
    #[default]
    Restart,
    /// It is over, as with QEMU's `-no-reboot`: [`ExitReason::Reset`](crate::ExitReason::Reset), or for a triple fault a
    /// [`Fault`](crate::ExitReason::Fault) that says where.
    Exit,
}

/// What of a machine its twin must match: how many vCPUs, how much memory, and how that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Always within `1..=limits::CPUS`.
    cpus: u8,
    /// Always a whole number of pages within the limits.
    memory: Bytes,
    sharing: Sharing,
}

/// How guest memory is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// In a memfd that other processes and clones can map.
    #[default]
    Shared,
    /// In anonymous memory of this process alone: cheaper to touch first, and large pages come by themselves.
    Private,
}

impl MachineConfig {
    /// A machine that boots `kernel`, an ELF file (with a PVH note or a Linux entry) or a bzImage, with `cpus` vCPUs and
    /// `memory` bytes of RAM.
    pub fn new(kernel: impl Into<PathBuf>, cpus: u8, memory: Bytes) -> Result<Self, Error> {
        let kernel = kernel.into();
        if kernel.as_os_str().is_empty() {
            return Err(bad(
                "kernel",
                "expected the path of an ELF file or a bzImage, got nothing",
            ));
        }
        let shape = Shape::new(cpus, memory, Sharing::default())?;
        Ok(Self {
            kernel,
            initrd: None,
            cmdline: String::new(),
            shape,
            devices: Devices::default(),
            backing: Backing::default(),
            on_reset: OnReset::default(),
            fault: None,
            template: None,
            dirty_log: DirtyLog::default(),
        })
    }

    /// Pass this command line to the kernel.
    pub fn with_cmdline(mut self, cmdline: impl Into<String>) -> Result<Self, Error> {
        let cmdline = cmdline.into();
        let most = limits::CMDLINE_BYTES - 1;
        if cmdline.len() > most {
            return Err(bad(
                "cmdline",
                &format!("expected at most {most} bytes, got {}", cmdline.len()),
            ));
        }
        if cmdline.contains('\0') {
            return Err(bad("cmdline", "expected text without zero bytes"));
        }
        self.cmdline = cmdline;
        Ok(self)
    }

    /// Give the kernel this initial RAM disk.
    #[must_use]
    pub fn with_initrd(mut self, initrd: impl Into<PathBuf>) -> Self {
        self.initrd = Some(initrd.into());
        self
    }

    /// Give it these virtio devices, in place of any given before.
    pub fn with_devices(mut self, devices: Devices) -> Result<Self, Error> {
        self.devices = devices.complete()?;
        Ok(self)
    }

    /// Keep guest memory like this.
    #[must_use]
    pub const fn with_sharing(mut self, sharing: Sharing) -> Self {
        self.shape.sharing = sharing;
        self
    }

    /// Show the guest of its processor what this template allows. Without one it is `host`, and `emulated` where KVM
    /// emulates the guest's kernel.
    #[must_use]
    pub fn with_template(mut self, template: Template) -> Self {
        self.template = Some(template);
        self
    }

    /// Back guest memory with this.
    pub fn with_backing(mut self, backing: Backing) -> Result<Self, Error> {
        backing.fits(self.shape)?;
        self.backing = backing;
        Ok(self)
    }

    /// Record writes like this.
    #[must_use]
    pub const fn with_dirty_log(mut self, dirty_log: DirtyLog) -> Self {
        self.dirty_log = dirty_log;
        self
    }

    /// Do this when the guest asks for a reset.
    #[must_use]
    pub const fn with_on_reset(mut self, on_reset: OnReset) -> Self {
        self.on_reset = on_reset;
        self
    }

    /// Add a device that makes saving or restoring fail by plan, for tests.
    #[must_use]
    pub fn with_fault(mut self, plan: FaultPlan) -> Self {
        self.fault = Some(plan);
        self
    }

    /// The kernel file.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The initial RAM disk, if any.
    pub fn initrd(&self) -> Option<&Path> {
        self.initrd.as_deref()
    }

    /// The kernel's command line.
    pub fn cmdline(&self) -> &str {
        &self.cmdline
    }

    /// Its vCPUs and memory.
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) const fn backing(&self) -> Backing {
        self.backing
    }

    pub(crate) const fn dirty_log(&self) -> DirtyLog {
        self.dirty_log
    }

    pub(crate) fn boot_files(&self) -> BootFiles {
        BootFiles {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
        }
    }

    pub(crate) fn restart(&self) -> Restart {
        Restart {
            on_reset: self.on_reset,
            cmdline: self.cmdline.clone(),
        }
    }

    /// Its virtio devices, every disk and interface with an id.
    pub const fn devices(&self) -> &Devices {
        &self.devices
    }

    pub(crate) const fn template(&self) -> Option<&Template> {
        self.template.as_ref()
    }

    pub(crate) const fn fault(&self) -> Option<&FaultPlan> {
        self.fault.as_ref()
    }
}

impl Shape {
    /// `cpus` vCPUs and `memory` bytes of RAM, if a machine can be like that.
    pub fn new(cpus: u8, memory: Bytes, sharing: Sharing) -> Result<Self, Error> {
        if !(1..=limits::CPUS).contains(&cpus) {
            return Err(bad("cpus", &format!("expected 1 to {}, got {cpus}", limits::CPUS)));
        }
        if memory < limits::MEMORY_LEAST || memory > limits::MEMORY_MOST {
            let (least, most) = (limits::MEMORY_LEAST, limits::MEMORY_MOST);
            return Err(bad("memory", &format!("expected {least} to {most}, got {memory}")));
        }
        if !memory.0.is_multiple_of(PAGE_SIZE as u64) {
            return Err(bad(
                "memory",
                &format!("expected a multiple of 4 KiB, got {} bytes", memory.0),
            ));
        }
        Ok(Self { cpus, memory, sharing })
    }

    /// How many vCPUs.
    pub const fn cpus(self) -> u8 {
        self.cpus
    }

    /// How much RAM.
    pub const fn memory(self) -> Bytes {
        self.memory
    }

    /// How RAM is kept.
    pub const fn sharing(self) -> Sharing {
        self.sharing
    }

    /// Where RAM lies: from address 0 up to 3 GiB, and what is more from 4 GiB. Between them are the devices, as on
    /// any PC: LAPIC and IOAPIC just below 4 GiB, the pages KVM wants for itself, and room for MMIO.
    pub fn ram(self) -> Space {
        let pages = PageCount::holding(self.memory.0);
        let low = PageCount(pages.0.min(RAM_BELOW_HOLE.0));
        let mut space = Space {
            id: SpaceId::RAM,
            pages: low,
            present: vec![(Pfn(0), low)],
        };
        if pages > low {
            let high = pages - low;
            space.pages = PageCount(RAM_ABOVE_HOLE.0) + high;
            space.present.push((RAM_ABOVE_HOLE, high));
        }
        space
    }
}

/// RAM that fits below the hole: 3 GiB.
pub(crate) const RAM_BELOW_HOLE: PageCount = PageCount::holding(3 << 30);

/// Where RAM continues: 4 GiB.
pub(crate) const RAM_ABOVE_HOLE: Pfn = Pfn((4 << 30) / PAGE_SIZE as u64);

fn bad(field: &'static str, expected: &str) -> Error {
    Error::Config {
        field,
        expected: expected.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_in_one_line_that_names_the_field() {
        let line = |result: Result<MachineConfig, Error>| result.unwrap_err().to_string();
        let ok = || MachineConfig::new("k", 1, Bytes::mib(64)).unwrap();
        assert_eq!(
            line(MachineConfig::new("", 1, Bytes::mib(64))),
            "kernel: expected the path of an ELF file or a bzImage, got nothing"
        );
        assert_eq!(
            line(MachineConfig::new("k", 0, Bytes::mib(64))),
            "cpus: expected 1 to 32, got 0"
        );
        assert_eq!(
            line(MachineConfig::new("k", 33, Bytes::mib(64))),
            "cpus: expected 1 to 32, got 33"
        );
        assert_eq!(
            line(MachineConfig::new("k", 1, Bytes::mib(7))),
            "memory: expected 8.0 MiB to 1024.00 GiB, got 7.0 MiB"
        );
        assert_eq!(
            line(MachineConfig::new("k", 1, Bytes(Bytes::mib(64).0 + 1))),
            "memory: expected a multiple of 4 KiB, got 67108865 bytes"
        );
        assert_eq!(
            line(ok().with_cmdline("x".repeat(2048))),
            "cmdline: expected at most 2047 bytes, got 2048"
        );
        for entries in [0, 512, 3000, 1 << 17] {
            assert_eq!(
                RingEntries::new(entries).unwrap_err().to_string(),
                format!("dirty-log: entries: expected a power of two from 1024 to 65536, got {entries}")
            );
        }
        assert_eq!(
            line(ok().with_cmdline("a\0b")),
            "cmdline: expected text without zero bytes"
        );
    }

    #[test]
    fn memory_beyond_three_gib_lies_above_the_hole() {
        let ram = |mib| Shape::new(1, Bytes::mib(mib), Sharing::Shared).unwrap().ram();
        assert_eq!(ram(256), Space::ram(PageCount(65_536)));
        assert_eq!(ram(3072), Space::ram(PageCount(786_432)));
        let big = ram(5120);
        assert_eq!(
            big.present,
            [(Pfn(0), PageCount(786_432)), (Pfn(1 << 20), PageCount(524_288))]
        );
        assert_eq!(
            (big.pages, big.present_pages()),
            (PageCount((1 << 20) + 524_288), PageCount(1_310_720))
        );
    }
}
