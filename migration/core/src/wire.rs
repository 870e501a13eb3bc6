//! What source and shadow say to each other on the control channel. The bytes are in `docs/wire.md`, under *Messages*.
//!
//! The channel delivers each message exactly once and in order while the session lives, whatever happens to single
//! paths (`transport/paths`), so nothing here is numbered or repeated. Page contents travel beside it as
//! [batches](crate::batch).

use umbra_units::{
    BatchId, Bytes, Epoch, GuestId, Malformed, PageCount, Pfn, Reader, SessionId, SpaceId, Term, Writer,
};

use crate::batch::{read_records, write_records};
use crate::guest::{Space, StateRecord};
use crate::limits;

/// The protocol versions this build speaks, oldest first.
pub const VERSIONS: &[u16] = &[2];

/// How long each step of preparing took at the shadow, for the breakdown an operator sees. Microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrepareTimes {
    /// From the first batch of the final epoch's arrival to the last one's application.
    pub apply_us: u64,
    /// Comparing digests, and the audit if one was asked for.
    pub verify_us: u64,
    /// Loading vCPU and device state.
    pub restore_us: u64,
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Source: I would like you to shadow this guest.
    Hello(Hello),
    /// Shadow: its twin stands; we speak this version.
    Welcome {
        /// One of the offered versions.
        version: u16,
        /// Bytes of batches that may be on their way at once.
        room: Bytes,
    },
    /// Shadow: I hold every batch up to this one, applied and checked. Cumulative: batches are applied in order.
    Held {
        /// The last one.
        through: BatchId,
        /// Bytes of batches beyond it that may be on their way.
        room: Bytes,
        /// Pages that can still change before the committed epoch can be kept no longer.
        left: PageCount,
        /// Of so many in all; 0 while no epoch is kept.
        staging: PageCount,
    },
    /// Shadow: I hold this epoch whole and verified, and can go back to it whatever comes after.
    Committed {
        /// Which epoch.
        epoch: Epoch,
    },
    /// Shadow: I can go back to this epoch no longer.
    Uncommitted {
        /// Which epoch.
        epoch: Epoch,
        /// Why, in words for an operator.
        text: String,
    },
    /// Shadow: how complete I am, and everything that speaks against a switchover now (nothing, if empty).
    Readiness {
        /// Pages whose newest version I hold, as far as I know, of all pages.
        fresh: PageCount,
        /// In words for an operator.
        reasons: Vec<String>,
    },
    /// Shadow: I hold the whole final epoch, verified, and could run it this instant.
    Prepared {
        /// Which epoch.
        epoch: Epoch,
        /// Where the time went.
        times: PrepareTimes,
    },
    /// Shadow: I could not prepare this epoch; take it back.
    Unprepared {
        /// Which epoch.
        epoch: Epoch,
        /// Why, in words for an operator.
        text: String,
    },
    /// Source: I have given the guest up for good. It is yours, in this term.
    Go {
        /// Which epoch.
        epoch: Epoch,
        /// The term the shadow runs in.
        term: Term,
    },
    /// Shadow: the guest runs here.
    Running {
        /// In which term.
        term: Term,
        /// How long starting took, µs.
        resume_us: u64,
    },
    /// Shadow: I did not run the guest and never will; it is yours again.
    Declined {
        /// The term that is void now.
        term: Term,
        /// Why, in words for an operator.
        text: String,
    },
    /// Source: I take the final epoch back and run on; following goes on.
    Withdraw {
        /// Which epoch.
        epoch: Epoch,
        /// Why, in words for an operator.
        text: String,
    },
    /// Either: this session is over.
    Goodbye {
        /// Why, in words for an operator.
        text: String,
    },
}

/// The first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The versions the source speaks.
    pub versions: Vec<u16>,
    /// Which guest.
    pub guest: GuestId,
    /// Which attempt.
    pub session: SessionId,
    /// The term the source runs in.
    pub term: Term,
    /// What the guest is, for [`GuestBuilder`](crate::guest::GuestBuilder).
    pub description: StateRecord,
    /// The guest's spaces.
    pub spaces: Vec<Space>,
}

impl Hello {
    /// The newest version both sides speak, or a sentence that names what each speaks.
    pub fn choose_version(&self) -> Result<u16, String> {
        let common = self.versions.iter().filter(|version| VERSIONS.contains(version)).max();
        common.copied().ok_or_else(|| {
            format!(
                "no common protocol version: the source speaks {:?}, this node speaks {VERSIONS:?}",
                self.versions
            )
        })
    }
}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const HELD: u8 = 3;
const READINESS: u8 = 4;
const PREPARED: u8 = 5;
const UNPREPARED: u8 = 6;
const GO: u8 = 7;
const RUNNING: u8 = 8;
const DECLINED: u8 = 9;
const WITHDRAW: u8 = 10;
const GOODBYE: u8 = 11;
const COMMITTED: u8 = 12;
const UNCOMMITTED: u8 = 13;

/// What a source's hello begins with, so that a stranger is told apart from a garbled friend.
const HELLO_MARK: [u8; 4] = *b"umbr";

impl Message {
    /// The message as it travels.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        match self {
            Self::Hello(hello) => write_hello(hello, &mut out),
            Self::Welcome { version, room } => {
                out.u8(WELCOME).u16(*version).u64(room.0);
            }
            Self::Held {
                through,
                room,
                left,
                staging,
            } => {
                out.u8(HELD).u64(through.0).u64(room.0).u64(left.0).u64(staging.0);
            }
            Self::Committed { epoch } => {
                out.u8(COMMITTED).u64(epoch.0);
            }
            Self::Uncommitted { epoch, text } => {
                out.u8(UNCOMMITTED).u64(epoch.0).text(text, limits::TEXT_BYTES);
            }
            Self::Readiness { fresh, reasons } => {
                out.u8(READINESS).u64(fresh.0).u32(len(reasons.len()));
                reasons.iter().for_each(|reason| {
                    out.text(reason, limits::TEXT_BYTES);
                });
            }
            Self::Prepared { epoch, times } => {
                out.u8(PREPARED)
                    .u64(epoch.0)
                    .u64(times.apply_us)
                    .u64(times.verify_us)
                    .u64(times.restore_us);
            }
            Self::Unprepared { epoch, text } => {
                out.u8(UNPREPARED).u64(epoch.0).text(text, limits::TEXT_BYTES);
            }
            Self::Go { epoch, term } => {
                out.u8(GO).u64(epoch.0).u64(term.0);
            }
            Self::Running { term, resume_us } => {
                out.u8(RUNNING).u64(term.0).u64(*resume_us);
            }
            Self::Declined { term, text } => {
                out.u8(DECLINED).u64(term.0).text(text, limits::TEXT_BYTES);
            }
            Self::Withdraw { epoch, text } => {
                out.u8(WITHDRAW).u64(epoch.0).text(text, limits::TEXT_BYTES);
            }
            Self::Goodbye { text } => {
                out.u8(GOODBYE).text(text, limits::TEXT_BYTES);
            }
        }
        out.into_bytes()
    }

    /// Read a message. Trailing bytes are malformed too.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > limits::MESSAGE_BYTES {
            return Err(Malformed {
                what: "message length",
                at: 0,
            });
        }
        let mut r = Reader::new(bytes);
        let text = |r: &mut Reader<'_>| r.text_within(limits::TEXT_BYTES, "text").map(str::to_owned);
        let message = match r.u8("message")? {
            HELLO => Self::Hello(read_hello(&mut r)?),
            WELCOME => Self::Welcome {
                version: r.u16("version")?,
                room: Bytes(r.u64("room")?),
            },
            HELD => Self::Held {
                through: BatchId(r.u64("held batch")?),
                room: Bytes(r.u64("room")?),
                left: PageCount(r.u64("staging left")?),
                staging: PageCount(r.u64("staging")?),
            },
            COMMITTED => Self::Committed {
                epoch: Epoch(r.u64("epoch")?),
            },
            UNCOMMITTED => Self::Uncommitted {
                epoch: Epoch(r.u64("epoch")?),
                text: text(&mut r)?,
            },
            READINESS => {
                let fresh = PageCount(r.u64("fresh pages")?);
                let count = r.len_within(limits::REASONS, "reason count")?;
                let reasons = (0..count).map(|_| text(&mut r)).collect::<Result<_, _>>()?;
                Self::Readiness { fresh, reasons }
            }
            PREPARED => Self::Prepared {
                epoch: Epoch(r.u64("epoch")?),
                times: PrepareTimes {
                    apply_us: r.u64("apply time")?,
                    verify_us: r.u64("verify time")?,
                    restore_us: r.u64("restore time")?,
                },
            },
            UNPREPARED => Self::Unprepared {
                epoch: Epoch(r.u64("epoch")?),
                text: text(&mut r)?,
            },
            GO => Self::Go {
                epoch: Epoch(r.u64("epoch")?),
                term: Term(r.u64("term")?),
            },
            RUNNING => Self::Running {
                term: Term(r.u64("term")?),
                resume_us: r.u64("resume time")?,
            },
            DECLINED => Self::Declined {
                term: Term(r.u64("term")?),
                text: text(&mut r)?,
            },
            WITHDRAW => Self::Withdraw {
                epoch: Epoch(r.u64("epoch")?),
                text: text(&mut r)?,
            },
            GOODBYE => Self::Goodbye { text: text(&mut r)? },
            _ => {
                return Err(Malformed {
                    what: "message kind",
                    at: 0,
                });
            }
        };
        r.finish("message")?;
        Ok(message)
    }

    /// Its size as it travels.
    pub fn size(&self) -> Bytes {
        Bytes::of_len(self.encode().len())
    }
}

fn len(n: usize) -> u32 {
    u32::try_from(n).expect("limits.rs bounds every list far below 2³²")
}

fn write_hello(hello: &Hello, out: &mut Writer) {
    out.u8(HELLO).put(&HELLO_MARK).u32(len(hello.versions.len()));
    hello.versions.iter().for_each(|version| {
        out.u16(*version);
    });
    out.put(&hello.guest.0).put(&hello.session.0).u64(hello.term.0);
    write_records(std::slice::from_ref(&hello.description), out);
    out.u32(len(hello.spaces.len()));
    for space in &hello.spaces {
        out.u16(space.id.0).u64(space.pages.0).u32(len(space.present.len()));
        space.present.iter().for_each(|(first, count)| {
            out.u64(first.0).u64(count.0);
        });
    }
}

fn read_hello(r: &mut Reader<'_>) -> Result<Hello, Malformed> {
    if r.array::<4>("hello mark")? != HELLO_MARK {
        return Err(r.malformed("hello mark"));
    }
    let count = r.len_within(limits::VERSIONS, "version count")?;
    let versions = (0..count).map(|_| r.u16("version")).collect::<Result<_, _>>()?;
    let guest = GuestId(r.array("guest")?);
    let session = SessionId(r.array("session")?);
    let term = Term(r.u64("term")?);
    let [description] = <[StateRecord; 1]>::try_from(read_records(r)?).map_err(|_| r.malformed("description"))?;
    let count = r.len_within(limits::SPACES, "space count")?;
    let spaces = (0..count).map(|_| read_space(r)).collect::<Result<_, _>>()?;
    Ok(Hello {
        versions,
        guest,
        session,
        term,
        description,
        spaces,
    })
}

fn read_space(r: &mut Reader<'_>) -> Result<Space, Malformed> {
    let id = SpaceId(r.u16("space")?);
    let pages = PageCount(r.u64("space size")?);
    if pages.0 > limits::SPACE_PAGES {
        return Err(r.malformed("space size"));
    }
    let runs = r.len_within(limits::SPACE_RUNS, "run count")?;
    let mut present: Vec<(Pfn, PageCount)> = Vec::new();
    let mut end = 0;
    for _ in 0..runs {
        let (first, count) = (r.u64("run start")?, r.u64("run length")?);
        let next = first
            .checked_add(count)
            .filter(|next| first >= end && count > 0 && *next <= pages.0);
        end = next.ok_or_else(|| r.malformed("run of pages"))?;
        present.push((Pfn(first), PageCount(count)));
    }
    Ok(Space { id, pages, present })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            versions: vec![1, 2],
            guest: GuestId([1; 16]),
            session: SessionId([2; 16]),
            term: Term(3),
            description: StateRecord {
                kind: "machine".to_owned(),
                version: 1,
                bytes: vec![9],
            },
            spaces: vec![Space::ram(PageCount(4))],
        }
    }

    fn every_message() -> Vec<(Message, &'static str)> {
        let text = || "no".to_owned();
        let times = PrepareTimes {
            apply_us: 1,
            verify_us: 2,
            restore_us: 3,
        };
        vec![
            (
                Message::Hello(hello()),
                "01756d6272020000000100020001010101010101010101010101010101020202020202020202020202020202020300000000000000\
                 01000000070000006d616368696e6501000000010000000901000000000004000000000000000100000000000000000000000400000000000000",
            ),
            (
                Message::Welcome {
                    version: 2,
                    room: Bytes(6),
                },
                "0202000600000000000000",
            ),
            (
                Message::Held {
                    through: BatchId(5),
                    room: Bytes(6),
                    left: PageCount(7),
                    staging: PageCount(8),
                },
                "030500000000000000060000000000000007000000000000000800000000000000",
            ),
            (Message::Committed { epoch: Epoch(1) }, "0c0100000000000000"),
            (
                Message::Uncommitted {
                    epoch: Epoch(1),
                    text: text(),
                },
                "0d0100000000000000020000006e6f",
            ),
            (
                Message::Readiness {
                    fresh: PageCount(6),
                    reasons: vec![text()],
                },
                "04060000000000000001000000020000006e6f",
            ),
            (
                Message::Prepared { epoch: Epoch(1), times },
                "050100000000000000010000000000000002000000000000000300000000000000",
            ),
            (
                Message::Unprepared {
                    epoch: Epoch(1),
                    text: text(),
                },
                "060100000000000000020000006e6f",
            ),
            (
                Message::Go {
                    epoch: Epoch(1),
                    term: Term(4),
                },
                "0701000000000000000400000000000000",
            ),
            (
                Message::Running {
                    term: Term(4),
                    resume_us: 9,
                },
                "0804000000000000000900000000000000",
            ),
            (
                Message::Declined {
                    term: Term(4),
                    text: text(),
                },
                "090400000000000000020000006e6f",
            ),
            (
                Message::Withdraw {
                    epoch: Epoch(1),
                    text: text(),
                },
                "0a0100000000000000020000006e6f",
            ),
            (Message::Goodbye { text: text() }, "0b020000006e6f"),
        ]
    }

    #[test]
    fn golden_bytes_of_every_message() {
        for (message, golden) in every_message() {
            let hex: String = message.encode().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, golden.replace(' ', ""), "{message:?}");
        }
    }

    #[test]
    fn every_message_is_read_as_it_was_written_and_no_shorter() {
        for (message, _) in every_message() {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Ok(message));
            for len in 0..bytes.len() {
                assert!(Message::decode(&bytes[..len]).is_err());
            }
            assert!(Message::decode(&[bytes, vec![0]].concat()).is_err(), "trailing bytes");
        }
    }

    #[test]
    fn the_newest_common_version_is_chosen_or_both_sides_are_named() {
        assert_eq!(hello().choose_version(), Ok(2));
        let stranger = Hello {
            versions: vec![7, 8],
            ..hello()
        };
        assert_eq!(
            stranger.choose_version().unwrap_err(),
            "no common protocol version: the source speaks [7, 8], this node speaks [2]"
        );
    }

    #[test]
    fn runs_of_pages_that_overlap_or_leave_their_space_are_refused() {
        for present in [
            vec![(Pfn(0), PageCount(5))],
            vec![(Pfn(2), PageCount(1)), (Pfn(1), PageCount(1))],
            vec![(Pfn(u64::MAX), PageCount(2))],
            vec![(Pfn(0), PageCount(0))],
        ] {
            let space = Space {
                id: SpaceId::RAM,
                pages: PageCount(4),
                present,
            };
            let bytes = Message::Hello(Hello {
                spaces: vec![space],
                ..hello()
            })
            .encode();
            assert!(Message::decode(&bytes).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0u8..15) {
            let _ = Message::decode(&bytes);
            let _ = Message::decode(&[vec![kind], bytes].concat());
        }
    }
}
