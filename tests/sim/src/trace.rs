//! What happened, one line per event in fixed columns.

use std::fmt::Write as _;

use umbra_units::Now;

/// Prints lines, hashes them, or neither.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    print: bool,
    hash: Option<u64>,
    lines: u64,
    line: String,
}

impl Trace {
    pub(crate) fn new(print: bool, hashed: bool) -> Self {
        Self {
            print,
            // FNV-1a's basis: good enough to tell two traces apart, and the same everywhere.
            hash: hashed.then_some(0xcbf2_9ce4_8422_2325),
            ..Self::default()
        }
    }

    pub(crate) fn say(&mut self, now: Now, who: &str, what: &str, detail: impl FnOnce() -> String) {
        self.lines += 1;
        if !self.print && self.hash.is_none() {
            return;
        }
        self.line.clear();
        let _ = write!(self.line, "{:>12}  {who:<9} {what:<10} {}", now.to_string(), detail());
        if let Some(hash) = &mut self.hash {
            for byte in self.line.bytes() {
                *hash = (*hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        if self.print {
            println!("{}", self.line);
        }
    }

    pub(crate) const fn hash(&self) -> Option<u64> {
        self.hash
    }

    pub(crate) const fn lines(&self) -> u64 {
        self.lines
    }
}
