//! Which kind of kernel a file is, and loading it.

use std::fs::File;

use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use umbra_units::Gpa;
use vm_memory::GuestAddress;

use super::{HIGH_MEMORY, linux};
use crate::error::Error;
use crate::limits;
use crate::memory::Memory;

/// A loaded kernel.
pub(super) struct Image {
    pub(super) protocol: Protocol,
    /// Where what it needs for itself while it starts ends.
    pub(super) end: u64,
    /// The initial RAM disk must end here or before.
    pub(super) initrd_end: u64,
    /// Longest command line it takes, without the final zero.
    cmdline_bytes: u64,
}

/// How it is to be entered.
pub(super) enum Protocol {
    Pvh(Gpa),
    Linux { entry: Gpa, header: setup_header },
}

/// What a file's first bytes say it is.
enum Format {
    Elf,
    BzImage,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Where a bzImage has its magic (Linux, "The Linux/x86 Boot Protocol", The Real-Mode Kernel Header).
const HEADER_MAGIC_AT: u64 = 0x202;
const HEADER_MAGIC: [u8; 4] = *b"HdrS";
/// The first version whose header says whether there is a 64-bit entry.
const VERSION_WITH_64_BIT_ENTRY: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// An initrd of a kernel that says nothing about it may lie anywhere below 4 GiB.
const ANYWHERE: u64 = 1 << 32;

impl Image {
    /// Find out what `path` is, and load it.
    pub(super) fn load(memory: &Memory, path: &Path) -> Result<Self, Error> {
        let refuse = |why: String| Error::File {
            path: path.to_owned(),
            why,
        };
        let mut file = File::open(path).map_err(|error| refuse(format!("cannot open the kernel: {error}")))?;
        let format = Format::of(&file).map_err(|error| refuse(format!("cannot read the kernel: {error}")))?;
        match format {
            Some(Format::Elf) => Self::load_elf(memory, &mut file),
            Some(Format::BzImage) => Self::load_bzimage(memory, &mut file),
            None => Err("expected an ELF file (vmlinux) or a bzImage".to_owned()),
        }
        .map_err(|why| refuse(format!("not a kernel for us: {why}")))
    }

    fn load_elf(memory: &Memory, file: &mut File) -> Result<Self, String> {
        // The file leaves out what begins as zeros; all of memory does, at every boot.
        let loaded = Elf::load(memory.ram(), None, file, None).map_err(|error| error.to_string())?;
        let KernelLoaderResult {
            kernel_load,
            kernel_end,
            pvh_boot_cap,
            ..
        } = loaded;
        let protocol = match pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => Protocol::Pvh(Gpa(entry.0)),
            _ if kernel_load.0 >= HIGH_MEMORY => Protocol::Linux {
                entry: Gpa(kernel_load.0),
                header: linux::header_of_ours(),
            },
            _ => {
                return Err(format!(
                    "it has neither a PVH note (XEN_ELFNOTE_PHYS32_ENTRY) nor an entry above 1 MiB, but at {:#x}",
                    kernel_load.0
                ));
            }
        };
        Ok(Self {
            protocol,
            end: kernel_end,
            initrd_end: ANYWHERE,
            cmdline_bytes: limits::CMDLINE_BYTES as u64 - 1,
        })
    }

    fn load_bzimage(memory: &Memory, file: &mut File) -> Result<Self, String> {
        let loaded = BzImage::load(memory.ram(), None, file, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|error| error.to_string())?;
        let header = loaded.setup_header.ok_or("it has no setup header")?;
        let (version, flags) = (header.version, header.xloadflags);
        if version < VERSION_WITH_64_BIT_ENTRY || flags & XLF_KERNEL_64 == 0 {
            return Err(format!(
                "expected a bzImage with a 64-bit entry (protocol 2.12 or later), this one is of protocol {}.{}{}",
                version >> 8,
                version & 0xff,
                if flags & XLF_KERNEL_64 == 0 { " without" } else { "" }
            ));
        }
        // It unpacks itself to its preferred address or, if it was loaded above that, to where it was loaded.
        let start = header.pref_address.max(loaded.kernel_load.0);
        let end = start.saturating_add(header.init_size.into()).max(loaded.kernel_end);
        let ram_end = memory.blocks()[0].pages.bytes();
        if end > ram_end {
            return Err(format!(
                "it needs memory up to {} MiB to start, there are {} MiB",
                end.div_ceil(1 << 20),
                ram_end >> 20
            ));
        }
        Ok(Self {
            protocol: Protocol::Linux {
                entry: Gpa(loaded.kernel_load.0 + ENTRY_64),
                header,
            },
            end,
            initrd_end: u64::from(header.initrd_addr_max) + 1,
            cmdline_bytes: u64::from(header.cmdline_size),
        })
    }

    /// Whether its own bound allows this command line. That it fits ours was checked when the machine was configured.
    pub(super) fn takes(&self, cmdline: &str) -> Result<(), Error> {
        if cmdline.len() as u64 > self.cmdline_bytes {
            return Err(Error::Config {
                field: "cmdline",
                expected: format!(
                    "this kernel takes at most {} bytes, got {}",
                    self.cmdline_bytes,
                    cmdline.len()
                ),
            });
        }
        Ok(())
    }
}

impl Format {
    fn of(file: &File) -> std::io::Result<Option<Self>> {
        let is_at = |at, magic: [u8; 4]| {
            let mut here = [0; 4];
            match file.read_exact_at(&mut here, at) {
                Ok(()) => Ok(here == magic),
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
                Err(error) => Err(error),
            }
        };
        Ok(if is_at(0, ELF_MAGIC)? {
            Some(Self::Elf)
        } else if is_at(HEADER_MAGIC_AT, HEADER_MAGIC)? {
            Some(Self::BzImage)
        } else {
            None
        })
    }
}
