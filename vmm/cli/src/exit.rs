//! How the program ends: one table of exit codes for every command, and the one line that goes with a bad end.

use core::fmt;
use std::process::ExitCode;

/// What the process's exit code says. `docs/running.md` has the table for operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// It went well: the guest powered off, was stopped by its operator or moved away; the command was carried out.
    Success = 0,
    /// It did not: the host failed, or the command was refused.
    Failure = 1,
    /// The command line or a value in it is wrong. Nothing was done. (clap's own code for the same.)
    BadArguments = 2,
    /// The guest cannot go on: a triple fault, or something KVM could not do.
    GuestFault = 3,
    /// `/dev/kvm` cannot be used.
    NoKvm = 4,
    /// The guest ended itself with a code other than zero.
    EndedByGuest = 5,
    /// The guest was handed over and the shadow has not said that it runs: it may run there, and never again here.
    HandedOver = 6,
    /// Nobody answers at the API socket.
    NoAnswer = 7,
}

impl Code {
    /// Every code, for documentation and its test.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 8] = [
        Self::Success,
        Self::Failure,
        Self::BadArguments,
        Self::GuestFault,
        Self::NoKvm,
        Self::EndedByGuest,
        Self::HandedOver,
        Self::NoAnswer,
    ];
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// Why a command ends badly: an exit code and one line for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(code: Code, text: impl fmt::Display) -> Self {
        // One line, whatever a library put into its message.
        let text = text.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Self { code, text }
    }

    /// The host failed, or somebody refused.
    pub(crate) fn failed(text: impl fmt::Display) -> Self {
        Self::new(Code::Failure, text)
    }

    /// Something on the command line is wrong.
    pub(crate) fn arguments(text: impl fmt::Display) -> Self {
        Self::new(Code::BadArguments, text)
    }

    /// For `map_err` after something was done to a file.
    pub(crate) fn on<E: fmt::Display>(what: impl fmt::Display) -> impl FnOnce(E) -> Self {
        move |error| Self::failed(format!("{what}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<umbra_machine::Error> for Failure {
    fn from(error: umbra_machine::Error) -> Self {
        use umbra_machine::Error as E;
        let code = match &error {
            E::Config { .. } | E::File { .. } => Code::BadArguments,
            E::NoKvm(_) => Code::NoKvm,
            _ => Code::Failure,
        };
        Self::new(code, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_line() {
        assert_eq!(Failure::failed("a\n  b\tc").to_string(), "a b c");
    }

    #[test]
    fn the_book_lists_every_exit_code() {
        let book = include_str!("../../../docs/running.md");
        for code in Code::ALL {
            assert!(
                book.contains(&format!("| {} | ", code as u8)),
                "docs/running.md lacks exit code {}",
                code as u8
            );
        }
    }
}
