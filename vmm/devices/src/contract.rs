//! What every device promises.
//!
//! # A device's life, and the vCPUs'
//!
//! ```text
//!            new / restore              resume                 pause
//!   nothing ───────────────▶ paused ─────────────▶ working ─────────────▶ paused ──▶ save
//!                              ▲                                            │
//!                              └────────────────────────────────────────────┘
//! ```
//!
//! A device is born paused. The vCPUs start after every device was resumed and have stopped before any is paused, so a
//! paused device hears nothing from the guest. It may still hear from the *world* (a key is pressed): it accepts what it
//! is given, within its bounds, and makes nothing of it until it is resumed. In particular a paused device raises no
//! interrupt, because the interrupt controllers may already have been saved.
//!
//! # Saying no
//!
//! [`Device::save`] says *not migratable* unless a device says otherwise: a device whose author forgot to think about it
//! stops the migration by name, it does not corrupt the guest on the other side. Restoring is a constructor
//! ([`Restore::restore`]): it either yields a whole device or a reason, so there is never a half-restored one.

use std::fmt;

use umbra_units::Malformed;

/// A device's saved state, which only the device itself understands.
///
/// `kind` names the device and which of them it is (`serial/0`); `version` counts the layouts of `bytes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedState {
    /// Whose state this is.
    pub kind: String,
    /// The layout of `bytes`.
    pub version: u32,
    /// The state.
    pub bytes: Vec<u8>,
}

/// Why a device could not be saved. It is unharmed and goes on working.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// The device cannot travel.
    #[error("{0} cannot be migrated")]
    NotMigratable(String),
    /// It can, but not now.
    #[error("{kind} cannot be saved: {why}")]
    Refused {
        /// The device.
        kind: String,
        /// What stands against it.
        why: String,
    },
}

/// Why no device could be made from saved state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The state is another device's.
    #[error("expected the state of {expected}, found {found}")]
    WrongKind {
        /// The device asked to restore itself.
        expected: String,
        /// The device that saved.
        found: String,
    },
    /// A layout this build does not know: a refusal, never a guess.
    #[error("{kind} is saved in version {found}, this build knows {known}")]
    UnknownVersion {
        /// The device.
        kind: String,
        /// The version saved.
        found: u32,
        /// The only version understood here.
        known: u32,
    },
    /// The bytes are not what the device wrote.
    #[error("{kind}: {source}")]
    Malformed {
        /// The device.
        kind: String,
        /// What and where.
        source: Malformed,
    },
    /// This host cannot take the device over.
    #[error("{kind} cannot be restored: {why}")]
    Refused {
        /// The device.
        kind: String,
        /// What stands against it.
        why: String,
    },
}

/// One device as the machine sees it. See the [module](self) for the order of calls.
pub trait Device: Send {
    /// The name its state travels under: `serial/0`.
    fn kind(&self) -> &str;

    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the device's base.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` from the device's base.
    fn write(&mut self, offset: u64, data: &[u8]);

    /// Back to the state at power-on. What was paused stays paused.
    fn reset(&mut self);

    /// Make nothing more of what the world sends; keep accepting it. Pausing twice is pausing once.
    fn pause(&mut self);

    /// Go on.
    fn resume(&mut self);

    /// Everything another instance needs to continue. Unless a device implements this, it cannot be migrated.
    fn save(&self) -> Result<SavedState, SaveError> {
        Err(SaveError::NotMigratable(self.kind().to_owned()))
    }
}

/// A device that can travel: restoring is building a new one, born paused.
pub trait Restore: Device + Sized {
    /// The effects a device is connected to; state does not carry them.
    type Wiring: Clone + Send + Sync;

    /// Build the device that `saved` describes, connected by `wiring`.
    fn restore(saved: &SavedState, wiring: Self::Wiring) -> Result<Self, RestoreError>;
}

/// Where a device's output bytes go. Called on a vCPU's thread: an implementation that waits stops the guest.
pub trait Out: Send + Sync {
    /// Take these bytes.
    fn put(&self, bytes: &[u8]);
}

/// An edge-triggered interrupt line.
pub trait Line: Send + Sync {
    /// Raise the interrupt once. When this returns, the interrupt controller knows: no interrupt may be on its way
    /// somewhere else while the guest is saved.
    fn pulse(&self);
}

/// A level-triggered interrupt line.
pub trait Level: Send + Sync {
    /// Where the line is from now on. When this returns, the interrupt controller knows.
    fn set(&self, high: bool);
}

/// What a guest wants to happen to itself, as a device can know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest ended itself with this code.
    Code(u32),
    /// The guest asked for a reset: to be booted again, or over, as whoever runs it decides.
    Reset,
    /// The guest powered itself off.
    PowerOff,
}

/// Who is told that the guest is to stop where it is.
pub trait Ending: Send + Sync {
    /// The guest must not run on.
    fn end(&self, why: End);
}

impl SavedState {
    /// The bytes, if this is the state of `kind` in the `version` that is understood.
    pub fn expect(&self, kind: &str, version: u32) -> Result<&[u8], RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::WrongKind {
                expected: kind.to_owned(),
                found: self.kind.clone(),
            });
        }
        if self.version != version {
            let kind = kind.to_owned();
            return Err(RestoreError::UnknownVersion {
                kind,
                found: self.version,
                known: version,
            });
        }
        Ok(&self.bytes)
    }
}

impl RestoreError {
    /// Turns a decoding failure into one that names the device: `.map_err(RestoreError::malformed("serial/0"))`.
    pub fn malformed(kind: &str) -> impl Fn(Malformed) -> Self + '_ {
        move |source| Self::Malformed {
            kind: kind.to_owned(),
            source,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with code {code}"),
            Self::Reset => f.write_str("asked for a reset"),
            Self::PowerOff => f.write_str("powered off"),
        }
    }
}

/// Stamps out the conformance tests that every device must pass.
///
/// `make` builds a device at power-on, `restore` builds one from a saved state, `poke` brings a device into a state that
/// differs from power-on in everything that is saved.
#[cfg(test)]
macro_rules! contract_tests {
    ($name:ident, make: $make:expr, restore: $restore:expr, poke: $poke:expr) => {
        mod $name {
            #[allow(
                unused_imports,
                reason = "the expressions use what their device's tests import"
            )]
            use super::*;
            use $crate::contract::RestoreError;

            fn poked() -> impl $crate::contract::Device {
                let mut device = $make();
                device.resume();
                $poke(&mut device);
                device.pause();
                device
            }

            #[test]
            fn what_is_saved_is_what_is_restored() {
                for saved in [$make().save().unwrap(), poked().save().unwrap()] {
                    assert_eq!($restore(&saved).unwrap().save().unwrap(), saved);
                }
                assert_ne!(
                    $make().save().unwrap(),
                    poked().save().unwrap(),
                    "poke must change what is saved"
                );
            }

            #[test]
            fn saving_changes_nothing() {
                let device = poked();
                assert_eq!(device.save().unwrap(), device.save().unwrap());
            }

            #[test]
            fn an_unknown_version_is_refused() {
                let mut saved = poked().save().unwrap();
                saved.version += 1;
                assert!(matches!(
                    $restore(&saved).err(),
                    Some(RestoreError::UnknownVersion { .. })
                ));
            }

            #[test]
            fn another_devices_state_is_refused() {
                let mut saved = poked().save().unwrap();
                saved.kind = "other/0".to_owned();
                assert!(matches!(
                    $restore(&saved).err(),
                    Some(RestoreError::WrongKind { .. })
                ));
            }

            #[test]
            fn a_truncated_or_overlong_state_is_refused() {
                let saved = poked().save().unwrap();
                for len in 0..saved.bytes.len() {
                    let cut = $crate::contract::SavedState {
                        bytes: saved.bytes[..len].to_vec(),
                        ..saved.clone()
                    };
                    assert!(
                        matches!($restore(&cut).err(), Some(RestoreError::Malformed { .. })),
                        "{len} bytes"
                    );
                }
                let mut long = saved;
                long.bytes.push(0);
                assert!(matches!(
                    $restore(&long).err(),
                    Some(RestoreError::Malformed { .. })
                ));
            }

            #[test]
            fn pausing_twice_is_pausing_once() {
                let mut device = poked();
                let once = device.save().unwrap();
                device.pause();
                assert_eq!(device.save().unwrap(), once);
            }

            #[test]
            fn a_reset_gives_the_state_at_power_on() {
                let mut device = poked();
                device.reset();
                assert_eq!(device.save().unwrap(), $make().save().unwrap());
            }

            #[test]
            fn any_access_at_any_offset_is_survived() {
                let mut device = $make();
                device.resume();
                for offset in [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x1000, u64::MAX - 1, u64::MAX] {
                    for len in [1, 2, 4, 8] {
                        device.read(offset, &mut [0; 8][..len]);
                        device.write(offset, &[0xff; 8][..len]);
                    }
                }
            }
        }
    };
}
#[cfg(test)]
pub(crate) use contract_tests;

#[cfg(test)]
mod tests {
    use super::*;

    struct Forgotten;

    impl Device for Forgotten {
        fn kind(&self) -> &str {
            "forgotten/0"
        }
        fn read(&mut self, _offset: u64, _data: &mut [u8]) {}
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
        fn reset(&mut self) {}
        fn pause(&mut self) {}
        fn resume(&mut self) {}
    }

    #[test]
    fn a_device_that_says_nothing_cannot_be_migrated_and_is_named() {
        let error = Forgotten.save().unwrap_err();
        assert_eq!(error.to_string(), "forgotten/0 cannot be migrated");
    }
}
