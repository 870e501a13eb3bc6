//! What a twin must be built as.
//!
//! Version 2: memory in bytes `u64`; shared (1) or private (0) `u8`; vCPUs `u8`; runs of RAM as a `u32` count and first
//! page and page count `u64` each; device names as a `u32` count and length-prefixed texts; virtio devices as in
//! [`crate::board::spec`]; TSC frequency in kHz `u32`; the CPUID table all vCPUs share, as in [`super::vcpu`];
//! MSRs hidden from the guest as a `u32` count and the first and last of each range, `u32` each.
//!
//! The layout follows from the memory's size in *this* build; that it is written down lets another build with another
//! rule notice.

use umbra_core::guest::StateRecord;
use umbra_units::{Bytes, Malformed, PageCount, Pfn, Reader, Writer};

use crate::board::spec::Spec;
use crate::config::{Shape, Sharing};
use crate::cpu::{Cpuid, MsrRange};
use crate::error::Error;
use crate::limits;
use crate::state::vcpu::Processor;

/// The record's kind, also in a guest's saved state, where it guards against restoring into another machine.
pub(crate) const KIND: &str = "machine";
pub(crate) const VERSION: u32 = 2;

/// Runs of RAM a layout may have.
const RUNS: usize = 2;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Description {
    pub(crate) shape: Shape,
    pub(crate) devices: Vec<String>,
    /// Those of them that are virtio's, in the order the guest finds them.
    pub(crate) virtio: Vec<Spec>,
    /// What vCPU 0 is; the others differ in their numbers only.
    pub(crate) processor: Processor,
    /// What the guest does not see.
    pub(crate) hidden_msrs: Vec<MsrRange>,
}

impl Description {
    pub(crate) fn encode(&self) -> StateRecord {
        let mut w = Writer::new();
        w.u64(self.shape.memory().0);
        w.u8(u8::from(self.shape.sharing() == Sharing::Shared))
            .u8(self.shape.cpus());
        let ram = self.shape.ram();
        w.u32(len(ram.present.len()));
        for (first, pages) in &ram.present {
            w.u64(first.0).u64(pages.0);
        }
        w.u32(len(self.devices.len()));
        for device in &self.devices {
            w.text(device, limits::DEVICE_KIND_BYTES);
        }
        w.u32(len(self.virtio.len()));
        self.virtio.iter().for_each(|spec| spec.encode(&mut w));
        w.u32(self.processor.tsc_khz);
        self.processor.cpuid.encode(&mut w);
        w.u32(len(self.hidden_msrs.len()));
        for range in &self.hidden_msrs {
            w.u32(range.first).u32(range.last);
        }
        StateRecord {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: w.into_bytes(),
        }
    }

    pub(crate) fn decode(record: &StateRecord) -> Result<Self, Error> {
        if record.kind != KIND {
            return Err(Error::Incompatible(format!(
                "expected the description of a {KIND}, found {}",
                record.kind
            )));
        }
        if record.version != VERSION {
            let found = record.version;
            return Err(Error::Incompatible(format!(
                "{KIND} is described in version {found}, this build knows {VERSION}"
            )));
        }
        let raw = Raw::read(&record.bytes).map_err(Error::malformed(KIND))?;
        let shape = Shape::new(raw.cpus, Bytes(raw.memory), raw.sharing)
            .map_err(|error| Error::Incompatible(format!("{KIND}: {error}")))?;
        if shape.ram().present != raw.runs {
            return Err(Error::Incompatible(format!(
                "{KIND}: its memory is laid out as this build cannot"
            )));
        }
        Ok(Self {
            shape,
            devices: raw.devices,
            virtio: raw.virtio,
            processor: raw.processor,
            hidden_msrs: raw.hidden_msrs,
        })
    }
}

struct Raw {
    memory: u64,
    sharing: Sharing,
    cpus: u8,
    runs: Vec<(Pfn, PageCount)>,
    devices: Vec<String>,
    virtio: Vec<Spec>,
    processor: Processor,
    hidden_msrs: Vec<MsrRange>,
}

impl Raw {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        let memory = r.u64("memory size")?;
        let sharing = match r.u8("memory sharing")? {
            0 => Sharing::Private,
            1 => Sharing::Shared,
            _ => return Err(r.malformed("memory sharing")),
        };
        let cpus = r.u8("vCPUs")?;
        let runs = (0..r.len_within(RUNS, "memory layout")?)
            .map(|_| Ok((Pfn(r.u64("memory layout")?), PageCount(r.u64("memory layout")?))))
            .collect::<Result<_, Malformed>>()?;
        let devices = (0..r.len_within(limits::DEVICES, "devices")?)
            .map(|_| r.text_within(limits::DEVICE_KIND_BYTES, "device").map(str::to_owned))
            .collect::<Result<_, _>>()?;
        let virtio = (0..r.len_within(limits::VIRTIO_DEVICES, "virtio devices")?)
            .map(|_| Spec::decode(&mut r))
            .collect::<Result<_, _>>()?;
        let processor = Processor {
            tsc_khz: r.u32("TSC frequency")?,
            cpuid: Cpuid::decode(&mut r)?,
        };
        let hidden_msrs = (0..r.len_within(limits::MSR_RANGES, "hidden MSRs")?)
            .map(|_| {
                let (first, last) = (r.u32("hidden MSRs")?, r.u32("hidden MSRs")?);
                MsrRange::new(first, last).map_err(|_| r.malformed("hidden MSRs"))
            })
            .collect::<Result<_, _>>()?;
        r.finish("end of description")?;
        Ok(Self {
            memory,
            sharing,
            cpus,
            runs,
            devices,
            virtio,
            processor,
            hidden_msrs,
        })
    }
}

fn len(n: usize) -> u32 {
    u32::try_from(n).expect("limits.rs keeps every count small")
}

#[cfg(test)]
mod tests {
    use umbra_devices::virtio::block::Geometry;

    use super::*;

    fn description() -> Description {
        let empty = Cpuid::decode(&mut Reader::new(&[0; 4])).unwrap();
        let devices = vec!["serial/0".to_owned(), "exit/0".to_owned()];
        Description {
            shape: Shape::new(2, Bytes::mib(4096), Sharing::Private).unwrap(),
            devices,
            virtio: vec![
                Spec::Rng,
                Spec::Disk {
                    id: "rootfs".parse().unwrap(),
                    geometry: Geometry::of_sectors(9),
                },
                Spec::Net {
                    id: "eth0".parse().unwrap(),
                    mac: [2, 0, 0, 0, 0, 1],
                    mtu: Some(1500),
                },
                Spec::Vsock,
                Spec::Balloon {
                    target: 7,
                    deflate_on_oom: true,
                    reporting: false,
                },
                Spec::Console,
            ],
            processor: Processor {
                tsc_khz: 9,
                cpuid: empty,
            },
            hidden_msrs: vec![MsrRange::new(0x480, 0x491).unwrap()],
        }
    }

    #[test]
    fn a_description_is_what_was_described() {
        assert_eq!(Description::decode(&description().encode()).unwrap(), description());
    }

    #[test]
    fn a_description_cut_anywhere_is_malformed() {
        let whole = description().encode();
        for len in 0..whole.bytes.len() {
            let cut = StateRecord {
                bytes: whole.bytes[..len].to_vec(),
                ..whole.clone()
            };
            assert!(
                matches!(Description::decode(&cut), Err(Error::Malformed(_))),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn a_machine_this_build_cannot_be_is_refused_by_name() {
        let refused = |change: fn(&mut StateRecord)| {
            let mut record = description().encode();
            change(&mut record);
            Description::decode(&record).unwrap_err().to_string()
        };
        assert_eq!(
            refused(|r| r.kind = "disk/0".to_owned()),
            "expected the description of a machine, found disk/0"
        );
        assert_eq!(
            refused(|r| r.version = 1),
            "machine is described in version 1, this build knows 2"
        );
        assert_eq!(refused(|r| r.bytes[9] = 0), "machine: cpus: expected 1 to 32, got 0");
        assert_eq!(
            refused(|r| r.bytes[0] = 1),
            "machine: memory: expected a multiple of 4 KiB, got 4294967297 bytes"
        );
        assert_eq!(
            refused(|r| r.bytes[14] = 1),
            "machine: its memory is laid out as this build cannot"
        );
    }
}
