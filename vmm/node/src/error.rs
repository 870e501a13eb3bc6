//! What can go wrong before a session runs, and how a session that ran ended badly.

use umbra_core::error::{Fault, Refused};

/// Why a session could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// This host failed.
    #[error("{0}")]
    Host(String),
}

/// Why a command to a session was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Wrong time; nothing changed.
    #[error("{0}")]
    Refused(String),
    /// The session is over.
    #[error("the session is over: {0}")]
    Over(String),
}

impl From<Refused> for CommandError {
    fn from(Refused(text): Refused) -> Self {
        Self::Refused(text)
    }
}

/// Why a switchover did not happen. The guest runs on at the source unless the text says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct SwitchoverError {
    /// In words for an operator.
    pub text: String,
    /// Whose fault it was, if anybody's.
    pub fault: Option<Fault>,
}
