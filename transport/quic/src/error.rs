//! Whose fault it is, in words that name the next step.

use crate::address::PathSpec;
use crate::identity::Fingerprint;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why one path is not up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// This host: the local address cannot be used. Tried again; the address may come back with its interface.
    #[error("cannot use local address {local}: {text}")]
    Bind {
        /// Which address.
        local: SocketAddr,
        /// What the host said.
        text: String,
    },
    /// Nobody's: no answer, or a connection that broke. Tried again.
    #[error("{remote} does not answer: {text}")]
    Unreachable {
        /// Who was asked.
        remote: SocketAddr,
        /// What happened instead.
        text: String,
    },
    /// The peer is not who it should be. Compare the fingerprints on both hosts; if they were renewed, pin the new one.
    #[error(
        "the peer at {remote} shows certificate {got}, but only {} is allowed here",
        list(expected)
    )]
    WrongCertificate {
        /// Who answered.
        remote: SocketAddr,
        /// What it showed.
        got: Fingerprint,
        /// What is pinned here.
        expected: Vec<Fingerprint>,
    },
    /// The peer does not know us. Pin `ours` at the peer.
    #[error("the peer at {remote} does not accept our certificate {ours}: {text}")]
    NotWelcome {
        /// Who refused.
        remote: SocketAddr,
        /// What we showed.
        ours: Fingerprint,
        /// What it said.
        text: String,
    },
    /// The two ends have no version in common. Upgrade the older one.
    #[error("no common version: this end speaks {}, the peer said: {text}", list(ours))]
    VersionMismatch {
        /// What was offered or expected here.
        ours: Vec<u16>,
        /// The peer's side of it.
        text: String,
    },
    /// The peer said no.
    #[error("refused by the peer: {0}")]
    Refused(Refused),
    /// The peer sent what no correct peer sends.
    #[error("the peer at {remote} misbehaves: {text}")]
    PeerMisbehaved {
        /// Who.
        remote: SocketAddr,
        /// What it did.
        text: String,
    },
}

impl PathError {
    /// Whether trying again without a change on either side is pointless.
    pub const fn is_final(&self) -> bool {
        !matches!(self, Self::Bind { .. } | Self::Unreachable { .. })
    }
}

/// A refusal, as it travels in a join answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct Refused {
    /// What kind.
    pub code: Refusal,
    /// The refusing side's words.
    pub text: String,
}

/// What kind of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// No version in common.
    Version,
    /// Another link is live, and the acceptor wants only one.
    Busy,
    /// A path wants to join a link that this listener does not know: it was restarted.
    LinkUnknown,
    /// A path wants to join a link that was closed; the text is the reason for closing.
    LinkClosed,
    /// The certificate is allowed, but not the one that began this link.
    Stranger,
    /// The acceptor does not want it for a reason of its own.
    Unwanted,
    /// The join was not understood.
    Malformed,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "no common version",
            Self::Busy => "busy",
            Self::LinkUnknown => "link unknown",
            Self::LinkClosed => "link closed",
            Self::Stranger => "another peer's link",
            Self::Unwanted => "unwanted",
            Self::Malformed => "join not understood",
        })
    }
}

/// Why there is no link.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Bad configuration.
    #[error("paths: 1 to {limit} expected, got {got}")]
    Paths {
        /// How many were given.
        got: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Every path failed for good, or none came up in time. Each says why.
    #[error("no path came up: {}", attempts(.0))]
    NoPath(Vec<(PathSpec, PathError)>),
    /// One path was answered, and the answer holds for the whole link.
    #[error("{path}: {error}")]
    Refused {
        /// On which path the answer came.
        path: PathSpec,
        /// The answer.
        error: PathError,
    },
}

/// Why a link is over. Nothing can be sent or received on it any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// This side closed it.
    #[error("closed here: {0}")]
    ClosedHere(String),
    /// The peer closed it.
    #[error("closed by the peer: {0}")]
    ClosedByPeer(String),
    /// The peer was restarted and does not know this link. What it acknowledged before is gone with it.
    #[error("the peer was restarted and does not know this link: {0}")]
    PeerForgot(String),
    /// The peer broke the rules repeatedly.
    #[error("the peer misbehaves: {0}")]
    PeerMisbehaved(String),
}

/// Why something was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The link would never take it.
    #[error(transparent)]
    Refused(#[from] umbra_paths::Refused),
    /// The link is over; its receiver says why.
    #[error("the link is over")]
    Ended,
}

/// Something about an identity or a peer's certificate on disk.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// Others may read the key.
    #[error("{}: mode {mode:04o} lets others read the private key; 0600 expected (chmod 600)", path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file is not what it should be.
    #[error("{}: {expected} expected, {got}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What is.
        got: String,
    },
    /// There is an identity already. Replacing it would lock this host out of every peer that pinned it.
    #[error("{}: an identity exists already; remove it first if it shall be replaced", path.display())]
    Exists {
        /// The key file.
        path: PathBuf,
    },
    /// The name cannot stand in a certificate.
    #[error("identity name `{name}`: {expected} expected")]
    Name {
        /// What was given.
        name: String,
        /// What would do.
        expected: &'static str,
    },
}

/// A text that is not a path, a listening address or a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}`: {expected} expected")]
pub struct Unreadable {
    /// What was given, shortened.
    pub text: String,
    /// What would do.
    pub expected: &'static str,
}

impl Unreadable {
    pub(crate) fn new(text: &str, expected: &'static str) -> Self {
        Self {
            text: text.chars().take(80).collect(),
            expected,
        }
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    const SHOWN: usize = 4;
    let mut text = items
        .iter()
        .take(SHOWN)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" or ");
    match items.len() {
        0 => text.push_str("none"),
        1..=SHOWN => {}
        more => text.push_str(&format!(" or {} others", more - SHOWN)),
    }
    text
}

fn attempts(attempts: &[(PathSpec, PathError)]) -> String {
    attempts
        .iter()
        .map(|(path, error)| format!("{path}: {error}"))
        .collect::<Vec<_>>()
        .join("; ")
}

/// What a peer wrote for people to read: cut to a bound and stripped of what a terminal would obey.
pub(crate) fn readable(bytes: &[u8], limit: usize) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(limit)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_cannot_command_a_terminal_or_fill_a_log() {
        assert_eq!(readable(b"no\x1b[2J\nway", 512), "no [2J way");
        assert_eq!(readable(&[b'x'; 9_000], 16).len(), 16);
        assert_eq!(readable(b"\xff\xfeok", 512), "\u{fffd}\u{fffd}ok");
    }

    #[test]
    fn long_lists_are_shortened() {
        assert_eq!(list::<u16>(&[]), "none");
        assert_eq!(list(&[1, 2]), "1 or 2");
        assert_eq!(list(&[1, 2, 3, 4, 5, 6]), "1 or 2 or 3 or 4 or 2 others");
    }
}
