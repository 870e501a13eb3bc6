//! A device that makes saving or restoring fail, as often as a test wants.
//!
//! A failed attempt to move a guest must leave a second one correct. To prove it somebody has to fail at the right
//! moment, after everything else succeeded; this device does, by plan, and otherwise behaves: it holds one byte that
//! the guest may write and read, and that travels like any other state.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use umbra_units::Reader;

use crate::contract::{Device, Restore, RestoreError, SaveError, SavedState};

const KIND: &str = "fault/0";
/// Version 1: the byte.
const VERSION: u32 = 1;

/// Where the device answers.
pub const PORT: u64 = 0x5fa;

/// How often to fail. Shared with whoever wrote the plan, who may change it at any time.
#[derive(Debug, Clone, Default)]
pub struct FaultPlan(Arc<Plan>);

#[derive(Debug, Default)]
struct Plan {
    saves: AtomicU32,
    restores: AtomicU32,
}

impl FaultPlan {
    /// Fail the next `saves` attempts to save and the next `restores` attempts to restore.
    pub fn new(saves: u32, restores: u32) -> Self {
        Self(Arc::new(Plan {
            saves: AtomicU32::new(saves),
            restores: AtomicU32::new(restores),
        }))
    }

    /// Fail the next `count` attempts to save.
    pub fn fail_saves(&self, count: u32) {
        self.0.saves.store(count, Ordering::SeqCst);
    }

    /// Fail the next `count` attempts to restore.
    pub fn fail_restores(&self, count: u32) {
        self.0.restores.store(count, Ordering::SeqCst);
    }

    /// How many saves and restores are still to fail.
    pub fn left(&self) -> (u32, u32) {
        (
            self.0.saves.load(Ordering::SeqCst),
            self.0.restores.load(Ordering::SeqCst),
        )
    }
}

/// Whether this attempt is one that fails.
fn due(left: &AtomicU32) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
        .is_ok()
}

/// The device.
#[derive(Debug)]
pub struct FaultDevice {
    plan: FaultPlan,
    byte: u8,
}

impl FaultDevice {
    /// A device that fails by `plan`.
    pub const fn new(plan: FaultPlan) -> Self {
        Self { plan, byte: 0 }
    }
}

impl Device for FaultDevice {
    fn kind(&self) -> &str {
        KIND
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.byte);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.byte = data.first().copied().unwrap_or(self.byte);
    }

    fn reset(&mut self) {
        self.byte = 0;
    }

    fn pause(&mut self) {}

    fn resume(&mut self) {}

    fn save(&self) -> Result<SavedState, SaveError> {
        if due(&self.plan.0.saves) {
            return Err(SaveError::Refused {
                kind: KIND.to_owned(),
                why: PLANNED.to_owned(),
            });
        }
        Ok(SavedState {
            kind: KIND.to_owned(),
            version: VERSION,
            bytes: vec![self.byte],
        })
    }
}

impl Restore for FaultDevice {
    type Wiring = FaultPlan;

    fn restore(saved: &SavedState, plan: FaultPlan) -> Result<Self, RestoreError> {
        if due(&plan.0.restores) {
            return Err(RestoreError::Refused {
                kind: KIND.to_owned(),
                why: PLANNED.to_owned(),
            });
        }
        let mut r = Reader::new(saved.expect(KIND, VERSION)?);
        let byte = r.u8("byte").map_err(RestoreError::malformed(KIND))?;
        r.finish("end of fault state").map_err(RestoreError::malformed(KIND))?;
        Ok(Self { plan, byte })
    }
}

const PLANNED: &str = "a test planned it so";

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (saves, restores) = self.left();
        write!(f, "fail {saves} saves and {restores} restores")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::contract_tests;

    contract_tests!(
        contract,
        make: || FaultDevice::new(FaultPlan::default()),
        restore: |saved| FaultDevice::restore(saved, FaultPlan::default()),
        poke: |device: &mut FaultDevice| device.write(0, &[5])
    );

    #[test]
    fn it_fails_as_often_as_planned_and_then_works() {
        let plan = FaultPlan::new(2, 1);
        let device = FaultDevice::new(plan.clone());
        assert!(device.save().is_err() && device.save().is_err());
        let saved = device.save().unwrap();
        assert!(FaultDevice::restore(&saved, plan.clone()).is_err());
        assert!(FaultDevice::restore(&saved, plan.clone()).is_ok());
        assert_eq!(plan.left(), (0, 0));
    }
}
