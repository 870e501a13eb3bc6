//! What travels beside memory: the state of vCPUs, interrupt controllers, timers and clock, as records.
//!
//! | kind | version | bytes |
//! |---|---|---|
//! | `machine` | 2 | the [`Description`]: what a twin must be built as |
//! | `boot` | 1 | how it is booted again: see [`restart`] |
//! | `clock` | 1 | `kvm_clock_data` |
//! | `irqchip/pic0`, `irqchip/pic1`, `irqchip/ioapic` | 1 | `kvm_irqchip` |
//! | `pit/0` | 1 | `kvm_pit_state2` |
//! | `vcpu/N` | 2 | see [`vcpu`] |
//! | `serial/0`, `exit/0`, … | theirs | see `umbra-devices` |
//!
//! Structures of KVM's interface are kept as the bytes the kernel reads and writes: that layout is promised for ever
//! (kvm/api.rst, "API description"). Their lengths are checked; what is in them, the kernel checks.
//!
//! # The order
//!
//! *Saving*: each vCPU's `mp_state` first, because reading it makes KVM act on a pending INIT or SIPI, which changes
//! everything else; `vcpu_events` last, after whatever might still deliver an event. All vCPUs must have stopped before
//! the first is saved, or one could still interrupt another whose LAPIC was already read.
//!
//! *Restoring*: interrupt controllers and PIT, then the clock, then each vCPU: `mp_state`, general registers, special
//! registers (they carry EFER and the APIC base), XCRs before XSAVE (which they permit), debug registers, LAPIC after the
//! APIC base, MSRs after the LAPIC (`TSC_DEADLINE` is refused while the LAPIC timer is in another mode, and so comes last
//! of all; it is a value of the TSC, which goes on before: see [`time`]), events at the end.
//!
//! Nothing is applied before everything is decoded, every expected record was found and none is left over.
//!
//! # What differs when it is saved twice
//!
//! Time goes on while a guest is paused. A record saved, restored and saved again is the same bytes except for:
//! `clock` (the clock itself, `realtime`, `host_tsc`), `pit/0` (`count_load_time` of each channel), and in `vcpu/N` the
//! MSRs `IA32_TSC` and `IA32_TSC_DEADLINE`'s remainder, the TSC at the clock's instant, and the LAPIC's current count.

pub(crate) mod describe;
pub(crate) mod platform;
pub(crate) mod restart;
pub(crate) mod time;
pub(crate) mod uapi;
pub(crate) mod vcpu;

pub(crate) use describe::Description;

use umbra_core::guest::StateRecord;

use crate::error::Error;

/// Records on their way in: taken by name, each once, and all of them.
pub(crate) struct Incoming<'a>(Vec<Option<&'a StateRecord>>);

impl<'a> Incoming<'a> {
    pub(crate) fn new(records: &'a [StateRecord]) -> Self {
        Self(records.iter().map(Some).collect())
    }

    /// The record `kind`.
    pub(crate) fn take(&mut self, kind: &str) -> Result<&'a StateRecord, Error> {
        let place = self
            .0
            .iter_mut()
            .find(|record| record.is_some_and(|record| record.kind == kind));
        place
            .and_then(Option::take)
            .ok_or_else(|| Error::Malformed(format!("{kind}: the state has no such record")))
    }

    /// The bytes of the record `kind`, which must be of `version`.
    pub(crate) fn bytes(&mut self, kind: &str, version: u32) -> Result<&'a [u8], Error> {
        let record = self.take(kind)?;
        if record.version != version {
            let found = record.version;
            return Err(Error::Incompatible(format!(
                "{kind} is saved in version {found}, this build knows {version}"
            )));
        }
        Ok(&record.bytes)
    }

    /// Succeeds when nothing is left.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self.0.into_iter().flatten().next() {
            None => Ok(()),
            Some(record) => Err(Error::Incompatible(format!(
                "{}: this machine has nothing of that kind",
                record.kind
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: &str) -> StateRecord {
        StateRecord {
            kind: kind.to_owned(),
            version: 1,
            bytes: vec![1],
        }
    }

    #[test]
    fn every_record_must_be_there_once_understood_and_used() {
        let records = [record("a"), record("b"), record("b")];
        let mut incoming = Incoming::new(&records);
        assert_eq!(incoming.bytes("a", 1).unwrap(), [1]);
        assert_eq!(
            incoming.bytes("a", 1).unwrap_err().to_string(),
            "a: the state has no such record"
        );
        assert_eq!(
            incoming.bytes("b", 2).unwrap_err().to_string(),
            "b is saved in version 1, this build knows 2"
        );
        assert_eq!(
            incoming.finish().unwrap_err().to_string(),
            "b: this machine has nothing of that kind"
        );
    }
}
