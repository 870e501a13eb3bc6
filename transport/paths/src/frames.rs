//! The wire: what one datagram or one stream between two links is made of.
//!
//! Little-endian throughout; golden bytes in the tests below. A *stream* carries exactly one frame:
//!
//! ```text
//! version:u8 kind:u8 body
//! ```
//!
//! A *datagram* carries exactly one frame too, and says in which order its path sent it, so that the receiver can count
//! what never came:
//!
//! ```text
//! version:u8 kind:u8 path:u16 number:u64 body
//! ```
//!
//! | kind | body |
//! |---|---|
//! | 1 probe | stamp:u64 |
//! | 2 ack | below |
//! | 3 message | number:u64, bytes to the end |
//! | 4 block | id:u64, class:u8, bytes to the end |
//! | 5 shard | id:u64, layout, stripe:u16, index:u8, bytes to the end |
//! | 6 patch | id:u64, layout, runs:u16, (first:u32, count:u32) each, bytes to the end |
//!
//! A *layout* says how an urgent block is cut: block_bytes:u32 shard_bytes:u16 k:u8 m:u8. An *ack* is
//!
//! ```text
//! number:u64 flags:u8 [echo:u64, with flag 1]
//! message_next:u64 message_seen:u64 message_taken:u64 block_next:u64 block_taken:u64
//! ranges:u8  (start:u32 after block_next, length:u32) each
//! reports:u8 (path:u16 highest:u64 received:u64 lost:u64 runs:u64) each
//! [gaps:u8   (id:u64 stripes:u16 (stripe:u16 bytes:u8 bitmap) each) each, with flag 2; flag 4: there was more]
//! ```
//!
//! `path` is the *sender's* number of the path, and comes back in the reports: the two ends need not agree on numbers.
//! Any frame may come either way; which way is the sender's choice. Nothing is allocated for a length before it was
//! compared with the bytes that are really there.

use bytes::Bytes;
use umbra_units::{PathId, Reader, Writer};

use crate::error::PeerMisbehaved;
use crate::event::{BlockId, Class};
use crate::limits;
use crate::stripe::Layout;

/// First byte of everything. Changes with any layout here and any bound in [`limits`].
pub const VERSION: u8 = 1;

/// Bytes before the body of a datagram.
pub(crate) const DATAGRAM_HEAD: usize = 12;

/// Bytes before the shard in a datagram.
pub(crate) const SHARD_HEAD: usize = DATAGRAM_HEAD + 8 + Layout::BYTES + 3;

/// Bytes before the block in a datagram.
pub(crate) const BLOCK_HEAD: usize = DATAGRAM_HEAD + 9;

/// Bytes before the message in a datagram.
pub(crate) const MESSAGE_HEAD: usize = DATAGRAM_HEAD + 8;

/// Bytes of an [`Ack`] with every list empty, echo and gaps present, in a datagram.
const ACK_HEAD: usize = DATAGRAM_HEAD + 8 + 1 + 8 + 3 * 8 + 2 * 8 + 2 + 1 + 1 + 1;
const RANGE_BYTES: usize = 8;
const REPORT_BYTES: usize = 34;
const BLOCK_GAPS_BYTES: usize = 11;

const PROBE: u8 = 1;
const ACK: u8 = 2;
const MESSAGE: u8 = 3;
const BLOCK: u8 = 4;
const SHARD: u8 = 5;
const PATCH: u8 = 6;

const FLAG_ECHO: u8 = 1;
const FLAG_GAPS: u8 = 2;
const FLAG_MORE: u8 = 4;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// "Are you there?" Answered at once, on the same path, by an [`Ack`] that echoes `stamp`.
    Probe { stamp: u64 },
    /// Everything this end knows about what it received.
    Ack(Ack),
    /// One control message.
    Message { number: u64, bytes: Bytes },
    /// One whole block.
    Block { id: BlockId, class: Class, bytes: Bytes },
    /// One shard of an urgent block.
    Shard {
        id: BlockId,
        layout: Layout,
        stripe: u16,
        index: u8,
        bytes: Bytes,
    },
    /// Runs of data shards of an urgent block, as `(first, count)`, their bytes one after the other.
    Patch {
        id: BlockId,
        layout: Layout,
        runs: Vec<(u32, u32)>,
        bytes: Bytes,
    },
}

/// What the receiver knows. Cumulative: the newest one says everything that older ones said, so none is ever repeated
/// for its own sake, and a lost one costs only time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ack {
    /// Grows with each acknowledgement, so that a late one cannot undo what a newer one said.
    pub(crate) number: u64,
    /// The stamp of the probe this answers, when it answers one.
    pub(crate) echo: Option<u64>,
    /// Every message below this number was received.
    pub(crate) message_next: u64,
    /// Bit `i`: message `message_next + 1 + i` was received too.
    pub(crate) message_seen: u64,
    /// Message bytes that the receiver's user has taken, ever.
    pub(crate) message_taken: u64,
    /// Every block below this number was received.
    pub(crate) block_next: u64,
    /// Block bytes that the receiver's user has taken, ever.
    pub(crate) block_taken: u64,
    /// Blocks received beyond `block_next`, as half-open ranges in growing order, as many as fit.
    pub(crate) ranges: Vec<(u64, u64)>,
    /// What arrived on each of the other side's paths.
    pub(crate) reports: Vec<PathReport>,
    /// Urgent blocks of which some but not all arrived; `None` when nobody looked.
    pub(crate) gaps: Option<Gaps>,
}

/// Datagrams of one path, counted since the path's last connection came up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PathReport {
    /// The path, by its sender's number.
    pub(crate) path: PathId,
    /// Highest datagram number seen.
    pub(crate) highest: u64,
    /// How many were received.
    pub(crate) received: u64,
    /// How many are given up as lost.
    pub(crate) lost: u64,
    /// In how many runs they were lost.
    pub(crate) runs: u64,
}

/// What is missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Gaps {
    /// There was more than fits: what is not listed is not thereby absent.
    pub(crate) more: bool,
    /// Blocks begun and not complete.
    pub(crate) blocks: Vec<BlockGaps>,
}

/// What is missing of one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockGaps {
    /// Which block.
    pub(crate) id: BlockId,
    /// Its incomplete stripes, with a bit per shard that is there (data first). May be cut short.
    pub(crate) stripes: Vec<(u16, Vec<u8>)>,
}

impl Ack {
    /// How many ranges, reports and gap bytes fit into `budget` bytes of datagram, reports first.
    pub(crate) fn rooms(budget: usize, reports: usize, ranges: usize) -> (usize, usize, usize) {
        let mut left = budget.saturating_sub(ACK_HEAD);
        let reports = reports.min(left / REPORT_BYTES).min(limits::PATHS);
        left -= reports * REPORT_BYTES;
        let ranges = ranges.min(left / RANGE_BYTES).min(128);
        left -= ranges * RANGE_BYTES;
        (reports, ranges, left)
    }

    /// Smallest budget that [`Ack::rooms`] can work with.
    pub(crate) const fn floor() -> usize {
        ACK_HEAD + 2 * REPORT_BYTES + 4 * RANGE_BYTES
    }

    fn write(&self, w: &mut Writer) {
        let more = self.gaps.as_ref().is_some_and(|gaps| gaps.more);
        let flags = (u8::from(self.echo.is_some()) * FLAG_ECHO)
            | (u8::from(self.gaps.is_some()) * FLAG_GAPS)
            | (u8::from(more) * FLAG_MORE);
        w.u64(self.number).u8(flags);
        if let Some(stamp) = self.echo {
            w.u64(stamp);
        }
        w.u64(self.message_next)
            .u64(self.message_seen)
            .u64(self.message_taken)
            .u64(self.block_next)
            .u64(self.block_taken);
        w.u8(short(self.ranges.len()));
        for (start, end) in &self.ranges {
            w.u32(offset(*start, self.block_next)).u32(offset(*end, *start));
        }
        w.u8(short(self.reports.len()));
        for report in &self.reports {
            w.u16(report.path.0)
                .u64(report.highest)
                .u64(report.received)
                .u64(report.lost)
                .u64(report.runs);
        }
        if let Some(gaps) = &self.gaps {
            w.u8(short(gaps.blocks.len()));
            for block in &gaps.blocks {
                w.u64(block.id.0)
                    .u16(u16::try_from(block.stripes.len()).expect("cut to an acknowledgement's size"));
                for (stripe, have) in &block.stripes {
                    w.u16(*stripe).u8(short(have.len())).put(have);
                }
            }
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, PeerMisbehaved> {
        if r.remaining() > limits::ACK_BYTES {
            return Err(r.malformed("ack length").into());
        }
        let number = r.u64("ack number")?;
        let flags = r.u8("ack flags")?;
        if flags & !(FLAG_ECHO | FLAG_GAPS | FLAG_MORE) != 0 {
            return Err(r.malformed("ack flags").into());
        }
        let echo = if flags & FLAG_ECHO == 0 {
            None
        } else {
            Some(r.u64("ack echo")?)
        };
        let mut ack = Self {
            number,
            echo,
            message_next: r.u64("ack message_next")?,
            message_seen: r.u64("ack message_seen")?,
            message_taken: r.u64("ack message_taken")?,
            block_next: r.u64("ack block_next")?,
            block_taken: r.u64("ack block_taken")?,
            ..Self::default()
        };
        let mut floor = ack.block_next;
        for _ in 0..r.u8("ack ranges")? {
            let start = ack.block_next.checked_add(u64::from(r.u32("ack range start")?));
            let end = start.and_then(|start| start.checked_add(u64::from(r.u32("ack range length").ok()?)));
            let (Some(start), Some(end)) = (start, end) else {
                return Err(r.malformed("ack range").into());
            };
            // Growing and disjoint, with a gap before each: anything else is not what a range set produces.
            if start <= floor || end <= start {
                return Err(r.malformed("ack range").into());
            }
            floor = end;
            ack.ranges.push((start, end));
        }
        for _ in 0..r.u8("ack reports")? {
            ack.reports.push(PathReport {
                path: PathId(r.u16("report path")?),
                highest: r.u64("report highest")?,
                received: r.u64("report received")?,
                lost: r.u64("report lost")?,
                runs: r.u64("report runs")?,
            });
        }
        if flags & FLAG_GAPS != 0 {
            let mut gaps = Gaps {
                more: flags & FLAG_MORE != 0,
                blocks: Vec::new(),
            };
            for _ in 0..r.u8("gap blocks")? {
                let id = BlockId(r.u64("gap block")?);
                // Growing, so that no stripe is asked for twice: a repair is never more than the block.
                if gaps.blocks.last().is_some_and(|before: &BlockGaps| before.id >= id) {
                    return Err(r.malformed("gap block").into());
                }
                let mut stripes: Vec<(u16, Vec<u8>)> = Vec::new();
                for _ in 0..r.u16("gap stripes")? {
                    let stripe = r.u16("gap stripe")?;
                    if stripes.last().is_some_and(|(before, _)| *before >= stripe) {
                        return Err(r.malformed("gap stripe").into());
                    }
                    let len = usize::from(r.u8("gap bitmap length")?);
                    stripes.push((stripe, r.take(len, "gap bitmap")?.to_vec()));
                }
                gaps.blocks.push(BlockGaps { id, stripes });
            }
            ack.gaps = Some(gaps);
        }
        Ok(ack)
    }
}

impl BlockGaps {
    /// Bytes of a block's entry before its stripes.
    pub(crate) const HEAD: usize = BLOCK_GAPS_BYTES;

    /// Bytes of one stripe's entry.
    pub(crate) const fn stripe_bytes(bitmap: usize) -> usize {
        3 + bitmap
    }
}

fn short(n: usize) -> u8 {
    u8::try_from(n).expect("every list of an acknowledgement is cut to fit")
}

fn offset(value: u64, base: u64) -> u32 {
    u32::try_from(value - base).expect("ranges lie within limits::BLOCK_WINDOW")
}

const fn class_byte(class: Class) -> u8 {
    match class {
        Class::Bulk => 0,
        Class::Urgent => 1,
    }
}

impl Frame {
    const fn kind(&self) -> u8 {
        match self {
            Self::Probe { .. } => PROBE,
            Self::Ack(_) => ACK,
            Self::Message { .. } => MESSAGE,
            Self::Block { .. } => BLOCK,
            Self::Shard { .. } => SHARD,
            Self::Patch { .. } => PATCH,
        }
    }

    /// The frame's body but for the bytes at its end, which follow uncopied when the frame goes as a stream.
    fn write(&self, w: &mut Writer) -> Bytes {
        match self {
            Self::Probe { stamp } => {
                w.u64(*stamp);
                Bytes::new()
            }
            Self::Ack(ack) => {
                ack.write(w);
                Bytes::new()
            }
            Self::Message { number, bytes } => {
                w.u64(*number);
                bytes.clone()
            }
            Self::Block { id, class, bytes } => {
                w.u64(id.0).u8(class_byte(*class));
                bytes.clone()
            }
            Self::Shard {
                id,
                layout,
                stripe,
                index,
                bytes,
            } => {
                w.u64(id.0);
                layout.write(w);
                w.u16(*stripe).u8(*index);
                bytes.clone()
            }
            Self::Patch {
                id,
                layout,
                runs,
                bytes,
            } => {
                w.u64(id.0);
                layout.write(w);
                w.u16(u16::try_from(runs.len()).expect("a patch is cut to limits::STRIPE_SHARDS runs"));
                for (first, count) in runs {
                    w.u32(*first).u32(*count);
                }
                bytes.clone()
            }
        }
    }

    /// As a stream: its first bytes, and the rest uncopied.
    pub(crate) fn into_stream(self) -> (Bytes, Bytes) {
        let mut w = Writer::with_capacity(64);
        w.u8(VERSION).u8(self.kind());
        let body = self.write(&mut w);
        (w.into_bytes().into(), body)
    }

    /// As datagram `number` of `path`.
    pub(crate) fn into_datagram(self, path: PathId, number: u64) -> Bytes {
        let tail = match &self {
            Self::Message { bytes, .. } | Self::Block { bytes, .. } | Self::Shard { bytes, .. } => bytes.len(),
            _ => 256,
        };
        let mut w = Writer::with_capacity(64 + tail);
        w.u8(VERSION).u8(self.kind()).u16(path.0).u64(number);
        let body = self.write(&mut w);
        w.put(&body);
        w.into_bytes().into()
    }

    /// A whole received stream.
    pub(crate) fn from_stream(bytes: &Bytes) -> Result<Self, PeerMisbehaved> {
        let mut r = Reader::new(bytes);
        let kind = head(&mut r)?;
        Self::read(kind, r, bytes)
    }

    /// A received datagram, with the sender's path and number.
    pub(crate) fn from_datagram(bytes: &Bytes) -> Result<(PathId, u64, Self), PeerMisbehaved> {
        let mut r = Reader::new(bytes);
        let kind = head(&mut r)?;
        let path = PathId(r.u16("datagram path")?);
        let number = r.u64("datagram number")?;
        Ok((path, number, Self::read(kind, r, bytes)?))
    }

    fn read(kind: u8, mut r: Reader<'_>, whole: &Bytes) -> Result<Self, PeerMisbehaved> {
        let rest = |r: Reader<'_>| whole.slice(r.position()..);
        Ok(match kind {
            PROBE => {
                let stamp = r.u64("probe stamp")?;
                r.finish("probe")?;
                Self::Probe { stamp }
            }
            ACK => {
                let ack = Ack::read(&mut r)?;
                r.finish("ack")?;
                Self::Ack(ack)
            }
            MESSAGE => {
                let number = r.u64("message number")?;
                if r.remaining() > limits::MESSAGE_BYTES {
                    return Err(r.malformed("message length").into());
                }
                Self::Message { number, bytes: rest(r) }
            }
            BLOCK => {
                let id = BlockId(r.u64("block id")?);
                let class = match r.u8("block class")? {
                    0 => Class::Bulk,
                    1 => Class::Urgent,
                    _ => return Err(r.malformed("block class").into()),
                };
                if !(1..=limits::BLOCK_BYTES).contains(&r.remaining()) {
                    return Err(r.malformed("block length").into());
                }
                Self::Block {
                    id,
                    class,
                    bytes: rest(r),
                }
            }
            SHARD => {
                let id = BlockId(r.u64("shard block")?);
                let layout = Layout::read(&mut r)?;
                let stripe = r.u16("shard stripe")?;
                let index = r.u8("shard index")?;
                match layout.shard_bytes(stripe, index) {
                    Some(len) if len == r.remaining() => {}
                    _ => return Err(r.malformed("shard").into()),
                }
                Self::Shard {
                    id,
                    layout,
                    stripe,
                    index,
                    bytes: rest(r),
                }
            }
            PATCH => {
                let id = BlockId(r.u64("patch block")?);
                let layout = Layout::read(&mut r)?;
                let count = usize::from(r.u16("patch runs")?);
                if count > limits::STRIPE_SHARDS {
                    return Err(r.malformed("patch runs").into());
                }
                let mut runs = Vec::with_capacity(count);
                let mut expected = 0;
                for _ in 0..count {
                    let run = (r.u32("patch first")?, r.u32("patch count")?);
                    let Some(range) = layout.run_range(run) else {
                        return Err(r.malformed("patch run").into());
                    };
                    expected += range.len();
                    runs.push(run);
                }
                if expected != r.remaining() {
                    return Err(r.malformed("patch length").into());
                }
                Self::Patch {
                    id,
                    layout,
                    runs,
                    bytes: rest(r),
                }
            }
            _ => return Err(r.malformed("frame kind").into()),
        })
    }
}

fn head(r: &mut Reader<'_>) -> Result<u8, PeerMisbehaved> {
    let got = r.u8("frame version")?;
    if got != VERSION {
        return Err(PeerMisbehaved::Version { got, want: VERSION });
    }
    Ok(r.u8("frame kind")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn layout() -> Layout {
        Layout::new(5_000, 1_000, 4, 2).unwrap()
    }

    fn specimens() -> Vec<(Frame, &'static str)> {
        let ack = Ack {
            number: 7,
            echo: Some(9),
            message_next: 3,
            message_seen: 5,
            message_taken: 2,
            block_next: 10,
            block_taken: 4,
            ranges: vec![(12, 14), (20, 21)],
            reports: vec![PathReport {
                path: PathId(2),
                highest: 100,
                received: 98,
                lost: 1,
                runs: 1,
            }],
            gaps: Some(Gaps {
                more: true,
                blocks: vec![BlockGaps {
                    id: BlockId(11),
                    stripes: vec![(1, vec![0b10])],
                }],
            }),
        };
        vec![
            (
                Frame::Probe { stamp: 0x0102_0304 },
                "0101030005000000000000000403020100000000",
            ),
            (
                Frame::Ack(ack),
                "0102030005000000000000000700000000000000070900000000000000030000000000000005000000000000000200000000000000\
                 0a0000000000000004000000000000000202000000020000000a000000010000000102006400000000000000620000000000000001\
                 000000000000000100000000000000010b000000000000000100010001\
                 02",
            ),
            (
                Frame::Message {
                    number: 4,
                    bytes: Bytes::from_static(b"hi"),
                },
                "01030300050000000000000004000000000000006869",
            ),
            (
                Frame::Block {
                    id: BlockId(6),
                    class: Class::Urgent,
                    bytes: Bytes::from_static(b"b"),
                },
                "0104030005000000000000000600000000000000\
                 0162",
            ),
        ]
    }

    #[test]
    fn the_wire_is_what_it_was() {
        for (frame, golden) in specimens() {
            let bytes = frame.clone().into_datagram(PathId(3), 5);
            let golden: String = golden.split_whitespace().collect();
            assert_eq!(hex(&bytes), golden, "{frame:?}");
        }
        let shard = Frame::Shard {
            id: BlockId(1),
            layout: layout(),
            stripe: 1,
            index: 0,
            bytes: Bytes::from(vec![0xee; 1_000]),
        };
        let bytes = shard.into_datagram(PathId(3), 5);
        assert_eq!(bytes.len(), SHARD_HEAD + 1_000);
        assert_eq!(
            hex(&bytes[..SHARD_HEAD]),
            "01050300050000000000000001000000000000008813\
                   0000e8030402010000"
        );
        let patch = Frame::Patch {
            id: BlockId(1),
            layout: layout(),
            runs: vec![(4, 1)],
            bytes: Bytes::from(vec![0xee; 1_000]),
        };
        let (head, body) = patch.into_stream();
        assert_eq!(hex(&head), "0106010000000000000088130000e803040201000400000001000000");
        assert_eq!(body.len(), 1_000);
    }

    #[test]
    fn every_frame_comes_back_either_way() {
        let bytes = Bytes::from(vec![1; 1_000]);
        let mut frames: Vec<Frame> = specimens().into_iter().map(|(frame, _)| frame).collect();
        frames.push(Frame::Shard {
            id: BlockId(1),
            layout: layout(),
            stripe: 0,
            index: 5,
            bytes: bytes.clone(),
        });
        frames.push(Frame::Patch {
            id: BlockId(1),
            layout: layout(),
            runs: vec![(3, 1)],
            bytes,
        });
        frames.push(Frame::Ack(Ack::default()));
        for frame in frames {
            let (head, body) = frame.clone().into_stream();
            assert_eq!(Frame::from_stream(&[head, body].concat().into()).unwrap(), frame);
            let datagram = frame.clone().into_datagram(PathId(9), 77);
            assert_eq!(Frame::from_datagram(&datagram).unwrap(), (PathId(9), 77, frame));
        }
    }

    #[test]
    fn a_shard_or_patch_of_another_length_than_its_layout_says_is_malformed() {
        for len in [0, 999, 1_001] {
            let (id, layout, bytes) = (BlockId(0), layout(), Bytes::from(vec![0; len]));
            let shard = Frame::Shard {
                id,
                layout,
                stripe: 0,
                index: 0,
                bytes: bytes.clone(),
            };
            assert!(
                Frame::from_datagram(&shard.into_datagram(PathId(0), 0)).is_err(),
                "{len}"
            );
            let patch = Frame::Patch {
                id,
                layout,
                runs: vec![(0, 1)],
                bytes,
            };
            let (head, body) = patch.into_stream();
            assert!(Frame::from_stream(&[head, body].concat().into()).is_err(), "{len}");
        }
    }

    #[test]
    fn nothing_missing_is_asked_for_twice() {
        let ask = |blocks: &[(u64, &[u16])]| {
            let stripes = |stripes: &[u16]| stripes.iter().map(|stripe| (*stripe, vec![0])).collect();
            let blocks = blocks
                .iter()
                .map(|(id, s)| BlockGaps {
                    id: BlockId(*id),
                    stripes: stripes(s),
                })
                .collect();
            let ack = Ack {
                gaps: Some(Gaps { more: false, blocks }),
                ..Ack::default()
            };
            Frame::from_datagram(&Frame::Ack(ack).into_datagram(PathId(0), 0))
        };
        assert!(ask(&[(1, &[0, 1]), (2, &[0])]).is_ok());
        assert!(ask(&[(1, &[0, 0])]).is_err());
        assert!(ask(&[(1, &[0]), (1, &[1])]).is_err());
    }

    #[test]
    fn another_version_is_named() {
        let error = Frame::from_stream(&Bytes::from_static(&[9, 1])).unwrap_err();
        assert_eq!(error.to_string(), "frame version 9 received, 1 expected");
    }

    #[test]
    fn a_truncated_frame_is_malformed_at_every_length() {
        for (frame, _) in specimens() {
            let short = matches!(frame, Frame::Message { .. });
            let whole = frame.into_datagram(PathId(0), 0);
            let body_free = if short { MESSAGE_HEAD } else { whole.len() };
            for len in 0..body_free {
                assert!(
                    Frame::from_datagram(&whole.slice(..len)).is_err(),
                    "{len} of {}",
                    whole.len()
                );
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_an_error(kind in 0u8..8, bytes: Vec<u8>) {
            let whole: Bytes = [&[VERSION, kind][..], &bytes].concat().into();
            let _ = Frame::from_stream(&whole);
            let _ = Frame::from_datagram(&whole);
        }
    }
}
