//! How the bytes of a whole batch become fewer, and back.
//!
//! What pages do not say by themselves ([`page`](crate::page)) is left to general compression, over a batch at a time.
//! [`Packer`] holds what the compressors need between two batches, one per thread; which method a batch gets is decided by
//! the [`Chooser`](crate::choose::Chooser).

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use umbra_units::Malformed;

/// A level of zstd: below zero quicker than level 1, above it tighter and slower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(i8);

impl Level {
    /// Quick: half as quick as lz4, and a third tighter.
    pub const QUICK: Self = Self(-1);
    /// What zstd calls one.
    pub const ONE: Self = Self(1);
    /// As tight as is worth its time on a batch.
    pub const TIGHT: Self = Self(3);

    /// The level of this number: -7 to 19, but not 0.
    pub fn new(number: i8) -> Option<Self> {
        (number != 0 && (-7..=19).contains(&number)).then_some(Self(number))
    }

    /// Its number.
    pub const fn number(self) -> i8 {
        self.0
    }
}

/// How a batch is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Not at all.
    None,
    /// By lz4, as a block without a frame.
    Lz4,
    /// By zstd.
    Zstd(Level),
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{}", level.number()),
        }
    }
}

/// What an operator may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Compression {
    /// Whatever brings pages to the shadow soonest: by what is measured of the link and of this host.
    #[default]
    Auto,
    /// Never any.
    Off,
    /// Always lz4. Batches that do not shrink still travel as they are.
    Lz4,
    /// Always zstd, likewise.
    Zstd(Level),
}

/// Not a way to compress.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no way to compress: expected auto, off, lz4, zstd, or zstd:LEVEL with a level from -7 to 19 other than 0"
)]
pub struct NotCompression(String);

impl FromStr for Compression {
    type Err = NotCompression;

    fn from_str(text: &str) -> Result<Self, NotCompression> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            // What lz4 was called when there was nothing else.
            "lz4" | "on" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd(Level::ONE)),
            _ => {
                let level = text.strip_prefix("zstd:").and_then(|level| level.parse().ok());
                let level = level.and_then(Level::new).map(Self::Zstd);
                level.ok_or_else(|| NotCompression(text.to_owned()))
            }
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{}", level.number()),
        }
    }
}

/// What the compressors keep between two batches. One per thread.
#[derive(Default)]
pub struct Packer {
    lz4: Option<CompressTable>,
    zstd: Option<(Level, zstd::bulk::Compressor<'static>)>,
    /// As long as the longest output there may have been, and reused: clearing it for every batch would cost more than
    /// copying what came out of it.
    room: Vec<u8>,
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Packer")
    }
}

impl Packer {
    /// With nothing allocated yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Append `body`, compressed, to `out`, if that makes it smaller; otherwise leave `out` as it was and say no.
    pub fn pack(&mut self, method: Method, body: &[u8], out: &mut Vec<u8>) -> bool {
        let most = match method {
            Method::None => return false,
            Method::Lz4 => get_maximum_output_size(body.len()),
            Method::Zstd(_) => zstd::zstd_safe::compress_bound(body.len()),
        };
        let mut room = std::mem::take(&mut self.room);
        if room.len() < most {
            room.resize(most, 0);
        }
        let packed = match method {
            Method::None => None,
            Method::Lz4 => {
                let table = self.lz4.get_or_insert_with(CompressTable::large);
                compress_into_with_table(body, &mut room, table).ok()
            }
            Method::Zstd(level) => self
                .zstd(level)
                .and_then(|zstd| zstd.compress_to_buffer(body, room.as_mut_slice()).ok()),
        };
        let packed = packed.filter(|len| *len < body.len());
        out.extend_from_slice(&room[..packed.unwrap_or(0)]);
        self.room = room;
        packed.is_some()
    }

    /// `None` if there is no memory for it: then batches travel as they are.
    fn zstd(&mut self, level: Level) -> Option<&mut zstd::bulk::Compressor<'static>> {
        if self.zstd.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            let compressor = zstd::bulk::Compressor::new(i32::from(level.number())).ok()?;
            self.zstd = Some((level, compressor));
        }
        self.zstd.as_mut().map(|(_, compressor)| compressor)
    }
}

thread_local! {
    /// What zstd needs to decompress: a sixth of a MiB, which is not worth allocating for every batch.
    static UNPACKER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Fill `body`, all of it, with what `packed` was made from. The caller has held the length of `body` against a bound.
pub(crate) fn unpack(method: Method, packed: &[u8], body: &mut [u8], at: usize) -> Result<(), Malformed> {
    let (filled, what) = match method {
        Method::None => unreachable!("what was not packed is not unpacked"),
        Method::Lz4 => (decompress_into(packed, body).ok(), "lz4 batch body"),
        Method::Zstd(_) => {
            let filled = UNPACKER.with_borrow_mut(|unpacker| {
                if unpacker.is_none() {
                    *unpacker = zstd::bulk::Decompressor::new().ok();
                }
                unpacker.as_mut()?.decompress_to_buffer(packed, body).ok()
            });
            (filled, "zstd batch body")
        }
    };
    if filled == Some(body.len()) {
        Ok(())
    } else {
        Err(Malformed { what, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const METHODS: [Method; 4] = [
        Method::Lz4,
        Method::Zstd(Level::QUICK),
        Method::Zstd(Level::ONE),
        Method::Zstd(Level::TIGHT),
    ];

    #[test]
    fn what_an_operator_writes_is_read_and_written_back() {
        for text in ["auto", "off", "lz4", "zstd:1", "zstd:-7", "zstd:19"] {
            assert_eq!(text.parse::<Compression>().unwrap().to_string(), text);
        }
        assert_eq!("on".parse(), Ok(Compression::Lz4), "as it was called");
        assert_eq!("zstd".parse(), Ok(Compression::Zstd(Level::ONE)));
        for text in ["", "zip", "zstd:0", "zstd:20", "zstd:-8", "zstd:", "zstd:1000"] {
            let error = text.parse::<Compression>().unwrap_err();
            assert!(error.to_string().contains("expected auto, off, lz4"), "{error}");
        }
    }

    #[test]
    fn what_does_not_shrink_is_not_packed() {
        let mut noise = vec![0; 10_000];
        umbra_units::Rng::new(1).fill(&mut noise);
        let mut packer = Packer::new();
        for method in METHODS {
            let mut out = vec![7; 3];
            assert!(!packer.pack(method, &noise, &mut out), "{method}");
            assert!(!packer.pack(method, &[], &mut out), "{method}");
            assert_eq!(out, [7; 3]);
        }
        assert!(!packer.pack(Method::None, &[0; 1_000], &mut Vec::new()));
    }

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked(seed: u64, len in 0usize..20_000, period in 1usize..3_000) {
            let mut body = vec![0; len];
            umbra_units::Rng::new(seed).fill(&mut body);
            (period..len).for_each(|at| body[at] = body[at - period]);
            let mut packer = Packer::new();
            for method in METHODS {
                let mut out = vec![9; 5];
                if packer.pack(method, &body, &mut out) {
                    let mut back = vec![1; len];
                    unpack(method, &out[5..], &mut back, 0).unwrap();
                    prop_assert_eq!(&back, &body);
                    // Neither a body that is claimed to be longer nor a shorter one is this one.
                    prop_assert!(unpack(method, &out[5..], &mut vec![0; len + 1], 0).is_err());
                    prop_assert!(unpack(method, &out[5..], &mut vec![0; len - 1], 0).is_err());
                }
            }
        }

        #[test]
        fn no_bytes_make_unpacking_panic(packed in prop::collection::vec(any::<u8>(), 0..400), len in 0usize..5_000) {
            for method in METHODS {
                let _ = unpack(method, &packed, &mut vec![0; len], 0);
            }
        }
    }
}
