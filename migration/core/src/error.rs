//! Three kinds of "no", by whose they are, because the operator's next step depends on it.
//!
//! A *bug* of ours is not here: it is an `assert!`, in release too.

/// Asked at the wrong time or for something that cannot be had. Nothing changed; ask differently or later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Somebody's fault. The session cannot go on as it was; the guest always can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The peer sent what no correct peer sends. End the session; do not retry without looking.
    #[error("the peer misbehaved: {0}")]
    PeerMisbehaved(String),
    /// The peer is correct but cannot work with us: another version, a missing CPU feature. Retrying will not help.
    #[error("the peer is incompatible: {0}")]
    PeerIncompatible(String),
    /// The peer gave up and said why. Its own words.
    #[error("the peer ended the session: {0}")]
    PeerEnded(String),
    /// This host failed: a system call, memory. The guest goes on if it can.
    #[error("this host failed: {0}")]
    Host(String),
}

impl From<umbra_units::Malformed> for Fault {
    fn from(malformed: umbra_units::Malformed) -> Self {
        Self::PeerMisbehaved(malformed.to_string())
    }
}

impl From<crate::guest::GuestError> for Fault {
    fn from(error: crate::guest::GuestError) -> Self {
        use crate::guest::GuestError as E;
        match error {
            E::Host(text) => Self::Host(text),
            E::Incompatible(text) => Self::PeerIncompatible(text),
            E::Malformed(text) => Self::PeerMisbehaved(text),
            E::WrongState(text) => Self::Host(text.to_owned()),
        }
    }
}
