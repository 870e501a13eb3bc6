//! The join handshake: how a connection becomes a path of a link.
//!
//! ```text
//!  connector                                  acceptor
//!     │  first bidirectional stream, finished   │
//!     │── Join { versions, link, token, path }─▶│  knows the link? or asks its user
//!     │◀── Joined { version, token } ───────────│  ─▶ a path of the link
//!     │◀── or Refused { code, text } ───────────│  ─▶ closed
//! ```
//!
//! The connector draws the *link* id, the acceptor draws the *token* when its user accepts the link. From the first
//! `Joined` on the connector shows the token with every further join. So an acceptor that was restarted says "link
//! unknown" instead of taking a running link for a new one, and a connector whose paths were answered by two different
//! acceptors notices. Neither is a secret: who may join is decided by certificates.
//!
//! This layout is the same for every version, because it decides which version is spoken. Later versions may append to
//! either message; what follows the known fields is ignored.

use crate::error::{Refusal, Refused, readable};
use crate::limits;
use core::fmt;
use quinn::Connection;
use ring::rand::{SecureRandom, SystemRandom};
use umbra_units::{Malformed, PathId, Reader, Writer};

const MAGIC: [u8; 8] = *b"umbra/jn";

/// The bundle of all paths between two ends: 16 random bytes drawn by the connecting side.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub [u8; 16]);

impl LinkId {
    pub(crate) fn draw() -> Self {
        Self(random())
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkId({self})")
    }
}

/// The acceptor's half of a link's name. All zero on the wire: none yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token([u8; 16]);

impl Token {
    pub(crate) fn draw() -> Self {
        Self(random())
    }
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    SystemRandom::new()
        .fill(&mut bytes)
        .expect("the kernel gives random bytes");
    bytes
}

/// The connecting side's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Join {
    pub(crate) versions: Vec<u16>,
    pub(crate) link: LinkId,
    pub(crate) token: Option<Token>,
    pub(crate) path: PathId,
}

/// The accepting side's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Joined { version: u16, token: Token },
    Refused(Refused),
}

impl Join {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let versions = &self.versions[..self.versions.len().min(limits::JOIN_VERSIONS)];
        w.put(&MAGIC)
            .u8(u8::try_from(versions.len()).expect("at most JOIN_VERSIONS"));
        versions.iter().for_each(|version| {
            w.u16(*version);
        });
        w.put(&self.link.0)
            .put(&self.token.map_or([0; 16], |token| token.0))
            .u16(self.path.0);
        w.into_bytes()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        magic(&mut r)?;
        let count = r.u8("join versions")?;
        if usize::from(count) > limits::JOIN_VERSIONS {
            return Err(r.malformed("join versions"));
        }
        let versions = (0..count).map(|_| r.u16("join versions")).collect::<Result<_, _>>()?;
        let link = LinkId(r.array("join link")?);
        let token = Some(r.array("join token")?)
            .filter(|token| *token != [0; 16])
            .map(Token);
        let path = PathId(r.u16("join path")?);
        if usize::from(path.0) >= umbra_paths::limits::PATHS {
            return Err(r.malformed("join path"));
        }
        Ok(Self {
            versions,
            link,
            token,
            path,
        })
    }
}

impl Answer {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.put(&MAGIC);
        match self {
            Self::Joined { version, token } => w.u8(0).u16(*version).put(&token.0),
            Self::Refused(refused) => w
                .u8(refusal_to_wire(refused.code))
                .text(&refused.text, limits::REFUSAL_TEXT),
        };
        w.into_bytes()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes);
        magic(&mut r)?;
        let code = match r.u8("join answer")? {
            0 => {
                let version = r.u16("join version")?;
                return Ok(Self::Joined {
                    version,
                    token: Token(r.array("join token")?),
                });
            }
            code => refusal_from_wire(code),
        };
        let text = r.bytes_within(limits::REFUSAL_TEXT, "refusal text")?;
        Ok(Self::Refused(Refused {
            code,
            text: readable(text, limits::REFUSAL_TEXT),
        }))
    }
}

fn magic(r: &mut Reader<'_>) -> Result<(), Malformed> {
    if r.array("join magic")? == MAGIC {
        Ok(())
    } else {
        Err(Malformed {
            what: "join magic",
            at: 0,
        })
    }
}

const fn refusal_to_wire(code: Refusal) -> u8 {
    match code {
        Refusal::Version => 1,
        Refusal::Busy => 2,
        Refusal::LinkUnknown => 3,
        Refusal::LinkClosed => 4,
        Refusal::Stranger => 5,
        Refusal::Unwanted => 6,
        Refusal::Malformed => 7,
    }
}

/// A code of a later version is a refusal like any other; its text says the rest.
const fn refusal_from_wire(code: u8) -> Refusal {
    match code {
        1 => Refusal::Version,
        2 => Refusal::Busy,
        3 => Refusal::LinkUnknown,
        4 => Refusal::LinkClosed,
        5 => Refusal::Stranger,
        7 => Refusal::Malformed,
        _ => Refusal::Unwanted,
    }
}

/// What went wrong in the exchange itself.
pub(crate) enum Broken {
    /// The connection ended under it.
    Connection(quinn::ConnectionError),
    /// The other side's message is not one.
    Message(String),
}

/// The connecting side: ask, and read the answer.
pub(crate) async fn ask(connection: &Connection, join: &Join) -> Result<Answer, Broken> {
    let (mut send, recv) = connection.open_bi().await.map_err(Broken::Connection)?;
    let sent = send.write_all(&join.encode()).await;
    sent.map_err(|error| broken(connection, &error))?;
    // Fails only if the peer stopped the stream, and then the answer says why.
    let _ = send.finish();
    Answer::decode(&read(connection, recv).await?).map_err(|error| Broken::Message(error.to_string()))
}

/// The accepting side: read the question. The stream is for the answer.
pub(crate) async fn listen(connection: &Connection) -> Result<(Result<Join, Malformed>, quinn::SendStream), Broken> {
    let (send, recv) = connection.accept_bi().await.map_err(Broken::Connection)?;
    Ok((Join::decode(&read(connection, recv).await?), send))
}

/// The accepting side: answer. Returns when the answer is with quinn, which sends it.
pub(crate) async fn answer(
    connection: &Connection,
    mut send: quinn::SendStream,
    answer: &Answer,
) -> Result<(), Broken> {
    let sent = send.write_all(&answer.encode()).await;
    sent.map_err(|error| broken(connection, &error))?;
    let _ = send.finish();
    Ok(())
}

async fn read(connection: &Connection, mut recv: quinn::RecvStream) -> Result<Vec<u8>, Broken> {
    recv.read_to_end(limits::JOIN_BYTES)
        .await
        .map_err(|error| broken(connection, &error))
}

fn broken(connection: &Connection, error: &dyn fmt::Display) -> Broken {
    connection
        .close_reason()
        .map_or_else(|| Broken::Message(format!("join: {error}")), Broken::Connection)
}

/// The best version both speak.
pub(crate) fn common_version(ours: &[u16], theirs: &[u16]) -> Option<u16> {
    ours.iter().copied().filter(|version| theirs.contains(version)).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join() -> Join {
        Join {
            versions: vec![1, 0x0203],
            link: LinkId([7; 16]),
            token: Some(Token([9; 16])),
            path: PathId(5),
        }
    }

    #[test]
    fn the_bytes_of_a_join_never_change() {
        let mut golden = b"umbra/jn".to_vec();
        golden.extend([2, 1, 0, 3, 2]);
        golden.extend([7; 16]);
        golden.extend([9; 16]);
        golden.extend([5, 0]);
        assert_eq!(join().encode(), golden);
        assert_eq!(Join::decode(&golden), Ok(join()));
        let first = Join { token: None, ..join() };
        assert_eq!(Join::decode(&first.encode()), Ok(first));
    }

    #[test]
    fn the_bytes_of_an_answer_never_change() {
        let joined = Answer::Joined {
            version: 1,
            token: Token([4; 16]),
        };
        let mut golden = b"umbra/jn".to_vec();
        golden.extend([0, 1, 0]);
        golden.extend([4; 16]);
        assert_eq!(joined.encode(), golden);
        assert_eq!(Answer::decode(&golden), Ok(joined));
        let refused = Answer::Refused(Refused {
            code: Refusal::Busy,
            text: "no".to_owned(),
        });
        let mut golden = b"umbra/jn".to_vec();
        golden.extend([2, 2, 0, 0, 0]);
        golden.extend(b"no");
        assert_eq!(refused.encode(), golden);
        assert_eq!(Answer::decode(&golden), Ok(refused));
    }

    #[test]
    fn every_refusal_travels() {
        for code in [
            Refusal::Version,
            Refusal::Busy,
            Refusal::LinkUnknown,
            Refusal::LinkClosed,
            Refusal::Stranger,
            Refusal::Unwanted,
            Refusal::Malformed,
        ] {
            let refused = Answer::Refused(Refused {
                code,
                text: String::new(),
            });
            assert_eq!(Answer::decode(&refused.encode()), Ok(refused));
        }
    }

    #[test]
    fn what_a_later_version_appends_is_ignored() {
        let mut bytes = join().encode();
        bytes.extend(b"more");
        assert_eq!(Join::decode(&bytes), Ok(join()));
    }

    #[test]
    fn no_bytes_panic_and_every_truncation_is_malformed() {
        let whole = join().encode();
        for len in 0..whole.len() {
            assert!(Join::decode(&whole[..len]).is_err());
            let _ = Answer::decode(&whole[..len]);
        }
        let mut rng = umbra_units::Rng::new(11);
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..3 {
                let at = usize::try_from(rng.below(bytes.len() as u64)).unwrap();
                bytes[at] = rng.next_u64().to_le_bytes()[0];
            }
            let _ = (Join::decode(&bytes), Answer::decode(&bytes));
        }
        let mut far = Join {
            path: PathId(64),
            ..join()
        }
        .encode();
        assert!(Join::decode(&far).is_err(), "a path beyond the link's bound");
        far[8] = 17;
        assert!(Join::decode(&far).is_err(), "more versions than the bound");
    }

    #[test]
    fn the_best_common_version_is_chosen() {
        assert_eq!(common_version(&[1, 2, 3], &[2, 3, 9]), Some(3));
        assert_eq!(common_version(&[1], &[2]), None);
        assert_eq!(common_version(&[1], &[]), None);
    }

    #[test]
    fn two_links_are_never_named_alike() {
        assert_ne!(LinkId::draw(), LinkId::draw());
        assert_eq!(LinkId([0xab; 16]).to_string(), "ab".repeat(16));
    }
}
