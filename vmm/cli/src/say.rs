//! What the program prints. Unlike `println!`, a reader that has gone away is no reason to panic.

use std::fmt::Display;
use std::io::Write;

/// One line of a command's result.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// One line of many; false when nobody reads any more and there is no point in going on.
pub(crate) fn line_heard(text: impl Display) -> bool {
    writeln!(std::io::stdout().lock(), "{text}").is_ok()
}

/// One line for the operator of a guest's process, whose standard output may be the guest's console.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "umbra: {text}");
}
