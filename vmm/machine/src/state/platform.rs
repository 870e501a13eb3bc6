//! The state that belongs to no single vCPU: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};
use umbra_core::guest::StateRecord;

use super::Incoming;
use super::time::Reading;
use super::uapi::{Uapi, bytes_of, from_bytes};
use crate::error::Error;

const VERSION: u32 = 1;
const CLOCK: &str = "clock";
const PIT: &str = "pit/0";
const IRQCHIPS: [(&str, u32); 3] = [
    ("irqchip/pic0", KVM_IRQCHIP_PIC_MASTER),
    ("irqchip/pic1", KVM_IRQCHIP_PIC_SLAVE),
    ("irqchip/ioapic", KVM_IRQCHIP_IOAPIC),
];

/// Everything here, decoded.
pub(crate) struct Platform {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// Read the clocks.
pub(crate) fn clocks(vm: &VmFd) -> Result<Reading, Error> {
    let clock = vm.get_clock().map_err(Error::kvm("read the clock"))?;
    Ok(Reading::of(&clock))
}

/// Save it, of a VM whose vCPUs have all stopped; with the clocks as they were read.
pub(crate) fn save(vm: &VmFd) -> Result<(Vec<StateRecord>, Reading), Error> {
    let mut records = Vec::with_capacity(IRQCHIPS.len() + 2);
    let clock = vm.get_clock().map_err(Error::kvm("read the clock"))?;
    records.push(record(CLOCK, &clock));
    for (kind, chip_id) in IRQCHIPS {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)
            .map_err(Error::kvm("read an interrupt controller"))?;
        records.push(record(kind, &chip));
    }
    let pit = vm.get_pit2().map_err(Error::kvm("read the PIT"))?;
    records.push(record(PIT, &pit));
    Ok((records, Reading::of(&clock)))
}

impl Platform {
    pub(crate) fn decode(records: &mut Incoming<'_>) -> Result<Self, Error> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for ((kind, chip_id), place) in IRQCHIPS.into_iter().zip(&mut irqchips) {
            *place = take(records, kind)?;
            if place.chip_id != chip_id {
                return Err(Error::Malformed(format!(
                    "{kind}: this is the state of controller {}",
                    place.chip_id
                )));
            }
        }
        Ok(Self {
            irqchips,
            pit: take(records, PIT)?,
            clock: take(records, CLOCK)?,
        })
    }

    /// What `vm` has now.
    pub(crate) fn of(vm: &VmFd) -> Result<Self, Error> {
        let (records, _) = save(vm)?;
        Self::decode(&mut Incoming::new(&records))
    }

    /// Bring interrupt controllers and timer back to this. The clock goes on: a reset does not turn it back.
    pub(crate) fn reset(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip)
                .map_err(Error::kvm("reset an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(Error::kvm("reset the PIT"))
    }

    /// The clocks when it was saved.
    pub(crate) fn clocks(&self) -> Reading {
        Reading::of(&self.clock)
    }

    /// Take it on, and read the clocks as they are then. What time passed since it was saved is added to the guest's
    /// clock, if both hosts can tell.
    pub(crate) fn apply(&self, vm: &VmFd) -> Result<Reading, Error> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip)
                .map_err(Error::kvm("restore an interrupt controller"))?;
        }
        vm.set_pit2(&self.pit).map_err(Error::kvm("restore the PIT"))?;
        // The capability's value is the set of flags this kernel takes (kvm/api.rst, KVM_SET_CLOCK); the record's say
        // whether the source's kernel filled in `realtime`.
        let known = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        let flags = known & self.clock.flags & KVM_CLOCK_REALTIME;
        let clock = kvm_clock_data { flags, ..self.clock };
        vm.set_clock(&clock).map_err(Error::kvm("restore the clock"))?;
        clocks(vm)
    }
}

fn record<T: Uapi>(kind: &str, value: &T) -> StateRecord {
    StateRecord {
        kind: kind.to_owned(),
        version: VERSION,
        bytes: bytes_of(value).to_vec(),
    }
}

fn take<T: Uapi>(records: &mut Incoming<'_>, kind: &str) -> Result<T, Error> {
    from_bytes(records.bytes(kind, VERSION)?, "length").map_err(Error::malformed(kind))
}
