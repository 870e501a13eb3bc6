//! What vCPUs left the guest for, counted.
//!
//! Each vCPU has its own counters and is the only one to write them, so counting is one uncontended addition; whoever
//! reads them meanwhile may see one exit more of one kind than of another.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::capture::CaptureCounters;
use crate::dirty::VcpuWrites;
use crate::emulate::Instruction;

/// What a machine's vCPUs did since it was built here. Counters begin at zero after a move: they tell of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// In the order of the vCPUs.
    pub vcpus: Vec<VcpuCounters>,
    /// How pages were captured.
    pub captures: CaptureCounters,
}

/// What one vCPU did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VcpuCounters {
    /// How often it left the guest, by what for. Every kind is in it, also those that never happened.
    pub exits: BTreeMap<&'static str, u64>,
    /// Instructions KVM could not emulate and this VMM did, by name. Only those that happened; empty on a host whose
    /// processor runs the guest's kernel.
    pub emulated: BTreeMap<&'static str, u64>,
    /// What it writes, where writes are recorded vCPU by vCPU: in dirty rings, while they are.
    pub writes: Option<VcpuWrites>,
}

impl Counters {
    /// All vCPUs together.
    pub fn total(&self) -> VcpuCounters {
        let mut total = VcpuCounters::default();
        for vcpu in &self.vcpus {
            for (kind, count) in &vcpu.exits {
                *total.exits.entry(kind).or_default() += count;
            }
            for (name, count) in &vcpu.emulated {
                *total.emulated.entry(name).or_default() += count;
            }
            if let Some(writes) = vcpu.writes {
                let total = total.writes.get_or_insert_default();
                total.pages += writes.pages;
                total.pages_per_second += writes.pages_per_second;
            }
        }
        total
    }
}

/// What a vCPU can leave the guest for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
    /// A signal, or waiting to be started: nothing the guest did.
    Interrupted,
    Halt,
    SystemEvent,
    /// KVM could not emulate an instruction.
    Emulation,
    /// Its dirty ring has to be emptied.
    RingFull,
    /// What ends the guest, or has no meaning here.
    Other,
}

impl Exit {
    const NAMES: [&'static str; 10] = [
        "port_read",
        "port_write",
        "mmio_read",
        "mmio_write",
        "interrupted",
        "halt",
        "system_event",
        "emulation",
        "dirty_ring_full",
        "other",
    ];
}

/// One vCPU's counters.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    exits: [AtomicU64; Exit::NAMES.len()],
    emulated: [AtomicU64; Instruction::ALL.len()],
}

impl Tally {
    pub(crate) fn exit(&self, exit: Exit) {
        self.exits[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Says whether it is the first of its kind.
    pub(crate) fn emulated(&self, instruction: Instruction) -> bool {
        self.emulated[instruction as usize].fetch_add(1, Ordering::Relaxed) == 0
    }

    pub(crate) fn read(&self) -> VcpuCounters {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let emulated = Instruction::ALL.iter().zip(&self.emulated);
        VcpuCounters {
            exits: Exit::NAMES.into_iter().zip(self.exits.iter().map(count)).collect(),
            emulated: emulated
                .map(|(instruction, counter)| (instruction.name(), count(counter)))
                .filter(|(_, count)| *count > 0)
                .collect(),
            writes: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_told_under_its_own_name() {
        let tally = Tally::default();
        for _ in 0..3 {
            tally.exit(Exit::MmioWrite);
        }
        tally.exit(Exit::Other);
        assert!(tally.emulated(Instruction::Stac) && !tally.emulated(Instruction::Stac));
        let told = tally.read();
        let counted: Vec<_> = told.exits.iter().filter(|(_, count)| **count > 0).collect();
        assert_eq!(counted, [(&"mmio_write", &3), (&"other", &1)]);
        assert_eq!(told.exits.len(), Exit::Other as usize + 1, "every kind is there");
        assert_eq!(told.emulated, BTreeMap::from([("stac", 2)]));
        let two = Counters {
            vcpus: vec![told.clone(), told],
            captures: CaptureCounters::default(),
        };
        assert_eq!((two.total().exits["mmio_write"], two.total().emulated["stac"]), (6, 4));
    }
}
