//! Which device answers at an address.
//!
//! A [`Bus`] is one address space: the I/O ports, or the MMIO holes. Ranges never overlap, so the order of insertion
//! means nothing. An address nobody claims reads as all ones and swallows writes, as an empty ISA bus does.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::contract::Device;

/// A run of addresses that one device claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first address.
    pub first: u64,
    /// How many there are.
    pub len: u64,
}

/// Why a range cannot be claimed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Empty, or past the end of the address space.
    #[error("{kind} claims {span}, which is no range of addresses")]
    NoRange {
        /// The device.
        kind: String,
        /// What it claims.
        span: Span,
    },
    /// Somebody else is there.
    #[error("{kind} claims {span}, where {other} already answers")]
    Taken {
        /// The device.
        kind: String,
        /// What it claims.
        span: Span,
        /// Who has it.
        other: String,
    },
}

/// One address space and the devices in it.
#[derive(Default)]
pub struct Bus {
    /// Ascending and disjoint.
    claims: Vec<Claim>,
}

struct Claim {
    span: Span,
    /// Where offset 0 of the device lies: at or before the span.
    base: u64,
    device: Arc<Mutex<dyn Device>>,
}

impl Bus {
    /// An empty address space.
    pub const fn new() -> Self {
        Self { claims: Vec::new() }
    }

    /// Let `device` answer at `span`, and see offsets from `base`. A device with a gap in its registers claims several
    /// spans with one base.
    pub fn claim(&mut self, span: Span, base: u64, device: Arc<Mutex<dyn Device>>) -> Result<(), BusError> {
        let kind = lock(&device).kind().to_owned();
        if span.len == 0 || span.first.checked_add(span.len - 1).is_none() || base > span.first {
            return Err(BusError::NoRange { kind, span });
        }
        if let Some(other) = self.claims.iter().find(|claim| claim.span.overlaps(span)) {
            return Err(BusError::Taken {
                kind,
                span,
                other: lock(&other.device).kind().to_owned(),
            });
        }
        let place = self.claims.partition_point(|claim| claim.span.first < span.first);
        self.claims.insert(place, Claim { span, base, device });
        Ok(())
    }

    /// The guest reads. Says whether a device answered; if none did, `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some(claim) = self.at(address) else {
            data.fill(0xff);
            return false;
        };
        lock(&claim.device).read(address - claim.base, data);
        true
    }

    /// The guest writes. Says whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let claim = self.at(address);
        if let Some(claim) = claim {
            lock(&claim.device).write(address - claim.base, data);
        }
        claim.is_some()
    }

    fn at(&self, address: u64) -> Option<&Claim> {
        let after = self.claims.partition_point(|claim| claim.span.first <= address);
        self.claims[..after].last().filter(|claim| claim.span.contains(address))
    }
}

impl Span {
    /// `len` addresses from `first`.
    pub const fn new(first: u64, len: u64) -> Self {
        Self { first, len }
    }

    const fn contains(self, address: u64) -> bool {
        address >= self.first && address - self.first < self.len
    }

    const fn overlaps(self, other: Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..+{:#x}", self.first, self.len)
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.claims.iter().map(|claim| claim.span))
            .finish()
    }
}

/// A device's lock outlives a panic of somebody else: its registers are plain values, whole after every access.
fn lock<D: ?Sized>(device: &Mutex<D>) -> std::sync::MutexGuard<'_, D> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads give the offset, writes are remembered.
    struct Echo(Vec<(u64, u8)>);

    impl Device for Echo {
        fn kind(&self) -> &str {
            "echo/0"
        }
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data[0]));
        }
        fn reset(&mut self) {}
        fn pause(&mut self) {}
        fn resume(&mut self) {}
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(Vec::new())))
    }

    #[test]
    fn the_device_at_an_address_answers_and_nobody_else() {
        let (a, b) = (echo(), echo());
        let mut bus = Bus::new();
        bus.claim(Span::new(0x64, 1), 0x60, b.clone()).unwrap();
        bus.claim(Span::new(0x60, 1), 0x60, b.clone()).unwrap();
        bus.claim(Span::new(0x3f8, 8), 0x3f8, a.clone()).unwrap();
        let mut data = [0; 1];
        assert!(bus.read(0x3ff, &mut data) && data == [7]);
        assert!(bus.read(0x64, &mut data) && data == [4]);
        assert!(bus.write(0x60, &[9]) && b.lock().unwrap().0 == [(0, 9)]);
        for nobody in [0, 0x5f, 0x61, 0x63, 0x65, 0x3f7, 0x400, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(nobody, &mut data) && data == [0xff; 4], "{nobody:#x}");
            assert!(!bus.write(nobody, &[1]));
        }
        assert!(a.lock().unwrap().0.is_empty());
    }

    #[test]
    fn a_range_that_is_taken_or_none_is_refused_by_name() {
        let mut bus = Bus::new();
        bus.claim(Span::new(0x10, 0x10), 0x10, echo()).unwrap();
        for span in [
            Span::new(0x1f, 1),
            Span::new(0, 0x11),
            Span::new(0, u64::MAX),
            Span::new(0x12, 2),
        ] {
            let error = bus.claim(span, span.first, echo()).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("echo/0 claims {span}, where echo/0 already answers")
            );
        }
        for span in [Span::new(0x30, 0), Span::new(u64::MAX, 2)] {
            assert!(matches!(
                bus.claim(span, span.first, echo()),
                Err(BusError::NoRange { .. })
            ));
        }
        bus.claim(Span::new(u64::MAX, 1), 0, echo()).unwrap();
        bus.claim(Span::new(0, 0x10), 0, echo()).unwrap();
    }
}
