//! What a snapshot is: a guest at one cut, as files that anybody can check.
//!
//! A snapshot is a folder of four parts. This module knows their bytes and their bounds; it opens no file (that is
//! `vmm/node/src/snapshot`), just as [`wire`](crate::wire) opens no socket.
//!
//! | part | what | format |
//! |---|---|---|
//! | `manifest` | which guest, when, what it goes on from, and size and checksum of every other part | lines of text: [`Manifest`] |
//! | `state` | the description and the state records, as they travel | [`encode_state`] |
//! | `memory` | [batches](crate::batch), one behind the other, as they travel | [`Batch`](crate::batch::Batch) |
//! | `index` | how long each batch is | [`Index`] |
//!
//! # A chain
//!
//! A *full* snapshot begins with a memory of zeros. A *differential* one holds what was written since another, its
//! parent, and names it by identity and checksum. Both are the same kind of memory file: batches are numbered through the
//! whole chain, so that a reader applies them as a [shadow](crate::shadow::Image) does, and a link that is missing, foreign
//! or given twice shows as a gap in the numbers. At each link's end the digest of all memory must be the manifest's.
//!
//! # What the checksums are for
//!
//! Every byte of a snapshot lies under a checksum: parts under the manifest's, the manifest under its own last line, the
//! parent under its child. They find faults, not forgeries: whoever may write a guest's snapshot decides what the guest
//! will be. What a forger cannot do is harm the reader: every length is compared with [`limits`](crate::limits) first.
//!
//! # Taking one
//!
//! Pages are copied while the guest runs, then those written meanwhile, and so on until little is left ([`Rounds`]
//! decides when); only that is copied in the pause. A page that was written while it was copied lies in the file more
//! than once, and the newest copy counts.

mod chain;
mod checksum;
mod index;
mod manifest;
mod rounds;
mod state;

pub use chain::goes_on;
pub use checksum::{Checksum, Summing};
pub use index::Index;
pub use manifest::{Manifest, Parent, Part, VERSION};
pub use rounds::{Rounds, Walk};
pub use state::{decode_state, encode_state};

/// A part of a snapshot that is not what its writer wrote, in one line that names what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(pub String);

impl Unreadable {
    /// `what` was expected to be `expected`, and is `got`.
    pub(crate) fn expected(what: &str, expected: impl core::fmt::Display, got: impl core::fmt::Display) -> Self {
        const SHOWN: usize = 80;
        let got: String = got
            .to_string()
            .chars()
            .filter(|c| !c.is_control())
            .take(SHOWN)
            .collect();
        Self(format!("{what}: expected {expected}, got '{got}'"))
    }
}

impl From<umbra_units::Malformed> for Unreadable {
    fn from(malformed: umbra_units::Malformed) -> Self {
        Self(malformed.to_string())
    }
}
