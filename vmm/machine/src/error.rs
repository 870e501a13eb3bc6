//! What can go wrong, and whose it is.

use std::path::PathBuf;

use umbra_core::guest::GuestError;
use umbra_devices::{BusError, RestoreError, SaveError};
use umbra_units::Malformed;

/// Why a machine could not do as asked. The text is one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration asks for something that cannot be. Nothing was built.
    #[error("{field}: {expected}")]
    Config {
        /// Which field of [`MachineConfig`](crate::MachineConfig).
        field: &'static str,
        /// What it must be, and what it was.
        expected: String,
    },
    /// A kernel or initrd file cannot be used.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// `/dev/kvm` cannot be used; the text says what to do.
    #[error("{0}")]
    NoKvm(String),
    /// A call to KVM failed.
    #[error("KVM: cannot {doing}: {source}")]
    Kvm {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: kvm_ioctls::Error,
    },
    /// Another system call failed.
    #[error("cannot {doing}: {source}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// This host cannot be what the description or state asks for.
    #[error("{0}")]
    Incompatible(String),
    /// A description or state record is not what its owner wrote.
    #[error("{0}")]
    Malformed(String),
    /// Asked at the wrong time.
    #[error("{0}")]
    WrongState(&'static str),
}

impl Error {
    /// For `map_err` after a KVM call.
    pub(crate) const fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { doing, source }
    }

    /// The last system call's error.
    pub(crate) fn last_os(doing: &'static str) -> Self {
        Self::Host {
            doing,
            source: std::io::Error::last_os_error(),
        }
    }

    /// For `map_err` after decoding the record `kind`.
    pub(crate) fn malformed(kind: &str) -> impl FnOnce(Malformed) -> Self + '_ {
        move |source| Self::Malformed(format!("{kind}: {source}"))
    }
}

impl From<Error> for GuestError {
    fn from(error: Error) -> Self {
        match error {
            Error::Incompatible(text) => Self::Incompatible(text),
            Error::Malformed(text) => Self::Malformed(text),
            Error::WrongState(text) => Self::WrongState(text),
            Error::Config { .. } => Self::Incompatible(error.to_string()),
            Error::File { .. } | Error::NoKvm(_) | Error::Kvm { .. } | Error::Host { .. } => {
                Self::Host(error.to_string())
            }
        }
    }
}

impl From<BusError> for Error {
    fn from(error: BusError) -> Self {
        Self::Incompatible(error.to_string())
    }
}

impl From<SaveError> for Error {
    fn from(error: SaveError) -> Self {
        Self::Incompatible(error.to_string())
    }
}

impl From<RestoreError> for Error {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Malformed { .. } => Self::Malformed(error.to_string()),
            _ => Self::Incompatible(error.to_string()),
        }
    }
}
