//! The manifest: what a snapshot is of, and what its parts must be. Lines of text, so that people can read it too.
//!
//! ```text
//! umbra-snapshot 1
//! id 6b0c…                               this snapshot: 32 hexadecimal digits
//! guest 91d2…                            the guest it was taken of
//! name web-1                             what people called it
//! term 1                                 the term it ran in
//! cut 2                                  how many cuts its chain has, this one included
//! taken 1790000000                       seconds since 1970, by its host's clock
//! kind differential                      or `full`, and then without the next three lines
//! parent-folder monday                   beside this snapshot's own folder
//! parent-id 0f3a…
//! parent-checksum 77e1…                  the last line of the parent's manifest
//! space 0 pages 65536 present 0+65536    each space of pages, with its runs of pages that exist
//! digest 55aa…                           of all memory at the cut
//! batches 17 42                          the first one's number, and how many
//! part state 8817 1c9e…                  bytes and checksum
//! part memory 73400320 e20b…
//! part index 176 9b54…
//! checksum 4d01…                         of every byte before this line
//! ```
//!
//! There is one way to write a manifest, and a reader accepts no other.

use core::fmt::Write as _;
use core::str::FromStr;

use umbra_units::{BatchId, Epoch, GuestId, PageCount, Pfn, SnapshotId, SpaceId, Term};

use super::{Checksum, Index, Unreadable};
use crate::batch::MOST_BYTES;
use crate::digest::Digest;
use crate::guest::Space;
use crate::limits;

/// The version of a snapshot's format that this build writes, and reads.
pub const VERSION: u32 = 1;

const MARK: &str = "umbra-snapshot";

/// What a snapshot is of, and what its parts must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// This snapshot.
    pub id: SnapshotId,
    /// The guest it was taken of.
    pub guest: GuestId,
    /// What people called the guest.
    pub name: String,
    /// The term the guest ran in.
    pub term: Term,
    /// How many cuts its chain has, this one included: 1 for a full snapshot.
    pub cut: Epoch,
    /// When: seconds since 1970, by the clock of the host.
    pub taken: u64,
    /// What a differential snapshot goes on from.
    pub parent: Option<Parent>,
    /// The guest's spaces.
    pub spaces: Vec<Space>,
    /// Of all memory at the cut.
    pub digest: Digest,
    /// The number of its first batch; 1 for a full snapshot.
    pub first_batch: BatchId,
    /// How many batches its memory part has.
    pub batches: u64,
    /// Description and state records.
    pub state: Part,
    /// Batches.
    pub memory: Part,
    /// How long each batch is.
    pub index: Part,
}

/// What a differential snapshot goes on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parent {
    /// The name of its folder, which lies beside the child's.
    pub folder: String,
    /// Its id.
    pub id: SnapshotId,
    /// The checksum of its manifest.
    pub checksum: Checksum,
}

/// What a part must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// How many bytes.
    pub bytes: u64,
    /// Their checksum.
    pub checksum: Checksum,
}

impl Part {
    /// The part with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            checksum: Checksum::of(bytes),
        }
    }
}

impl Parent {
    /// Whether a folder of this name can be named in a manifest: one name, nothing that leads elsewhere, nothing that
    /// would break a line.
    pub fn can_be_named(folder: &str) -> bool {
        is_name(folder) && !folder.contains('/') && folder != "." && folder != ".."
    }
}

impl Manifest {
    /// The number of the batch after its last.
    pub const fn next_batch(&self) -> BatchId {
        BatchId(self.first_batch.0 + self.batches)
    }

    /// Its bytes, and their checksum by which a child names it.
    ///
    /// # Panics
    /// When the guest's name or the parent's folder is none that a manifest can hold.
    pub fn encode(&self) -> (String, Checksum) {
        assert!(is_name(&self.name), "a guest called {:?}", self.name);
        let mut out = format!("{MARK} {VERSION}\n");
        let mut line = |text: core::fmt::Arguments<'_>| {
            let _ = writeln!(out, "{text}");
        };
        line(format_args!("id {}", self.id));
        line(format_args!("guest {}", self.guest));
        line(format_args!("name {}", self.name));
        line(format_args!("term {}", self.term));
        line(format_args!("cut {}", self.cut));
        line(format_args!("taken {}", self.taken));
        if let Some(parent) = &self.parent {
            assert!(
                Parent::can_be_named(&parent.folder),
                "a folder called {:?}",
                parent.folder
            );
            line(format_args!("kind differential"));
            line(format_args!("parent-folder {}", parent.folder));
            line(format_args!("parent-id {}", parent.id));
            line(format_args!("parent-checksum {}", parent.checksum));
        } else {
            line(format_args!("kind full"));
        }
        for space in &self.spaces {
            let runs = space
                .present
                .iter()
                .map(|(first, count)| format!(" {}+{count}", first.0));
            let runs: String = runs.collect();
            line(format_args!("space {} pages {} present{runs}", space.id.0, space.pages));
        }
        line(format_args!("digest {}", self.digest));
        line(format_args!("batches {} {}", self.first_batch, self.batches));
        for (name, part) in self.parts() {
            line(format_args!("part {name} {} {}", part.bytes, part.checksum));
        }
        let checksum = Checksum::of(out.as_bytes());
        let _ = writeln!(out, "checksum {checksum}");
        (out, checksum)
    }

    /// Read a manifest; also says its checksum.
    pub fn decode(bytes: &[u8]) -> Result<(Self, Checksum), Unreadable> {
        if bytes.len() as u64 > limits::SNAPSHOT_MANIFEST_BYTES {
            let expected = format!("at most {} bytes", limits::SNAPSHOT_MANIFEST_BYTES);
            return Err(Unreadable::expected("manifest", expected, bytes.len()));
        }
        let text = core::str::from_utf8(bytes).map_err(|error| Unreadable::expected("manifest", "text", error))?;
        let mut lines = Lines::new(text);
        let version = lines.value(MARK)?;
        if version != VERSION.to_string() {
            return Err(Unreadable::expected(MARK, format!("version {VERSION}"), version));
        }
        // Everything under the checksum first: what is wrong is said to be damaged, not to be odd.
        let (body, last) = text
            .strip_suffix('\n')
            .and_then(|text| text.rfind('\n'))
            .map(|at| text.split_at(at + 1))
            .ok_or_else(|| Unreadable::expected("manifest", "lines", "one line"))?;
        let checksum = Checksum::of(body.as_bytes());
        let told = Lines::new(last).value("checksum")?;
        if told != checksum.to_string() {
            return Err(Unreadable::expected("checksum", checksum, told));
        }
        let manifest = Self::fields(&mut lines)?;
        lines.value("checksum")?;
        if !lines.rest.is_empty() || manifest.encode().0.as_bytes() != bytes {
            return Err(Unreadable::expected("manifest", "the one way to write it", "another"));
        }
        Ok((manifest, checksum))
    }

    fn fields(lines: &mut Lines<'_>) -> Result<Self, Unreadable> {
        let id = SnapshotId(lines.id("id")?);
        let guest = GuestId(lines.id("guest")?);
        let name = lines.value("name")?;
        if !is_name(name) {
            return Err(Unreadable::expected("name", "a name", name));
        }
        let term = Term(lines.number("term")?);
        let cut = Epoch(lines.number("cut")?);
        let taken = lines.number("taken")?;
        let parent = match lines.value("kind")? {
            "full" => None,
            "differential" => {
                let folder = lines.value("parent-folder")?;
                if !Parent::can_be_named(folder) {
                    return Err(Unreadable::expected("parent-folder", "the name of a folder", folder));
                }
                Some(Parent {
                    folder: folder.to_owned(),
                    id: SnapshotId(lines.id("parent-id")?),
                    checksum: Checksum(u128::from_le_bytes(reversed(lines.id("parent-checksum")?))),
                })
            }
            other => return Err(Unreadable::expected("kind", "full or differential", other)),
        };
        let mut spaces = Vec::new();
        while let Some(space) = lines.optional("space") {
            if spaces.len() == limits::SPACES {
                return Err(Unreadable::expected(
                    "space",
                    format!("at most {}", limits::SPACES),
                    "more",
                ));
            }
            spaces.push(read_space(space)?);
        }
        let digest = Digest(u128::from_le_bytes(reversed(lines.id("digest")?)));
        let (first, count) = pair("batches", lines.value("batches")?)?;
        let manifest = Self {
            id,
            guest,
            name: name.to_owned(),
            term,
            cut,
            taken,
            parent,
            spaces,
            digest,
            first_batch: BatchId(first),
            batches: count,
            state: lines.part("state")?,
            memory: lines.part("memory")?,
            index: lines.part("index")?,
        };
        manifest.hangs_together()?;
        Ok(manifest)
    }

    /// What one field says about another, and the bounds.
    fn hangs_together(&self) -> Result<(), Unreadable> {
        let bounded = |what, got: u64, most: u64| {
            if got <= most {
                Ok(())
            } else {
                Err(Unreadable::expected(what, format!("at most {most}"), got))
            }
        };
        bounded("part state", self.state.bytes, limits::SNAPSHOT_STATE_BYTES)?;
        bounded("part index", self.index.bytes, limits::SNAPSHOT_INDEX_BYTES)?;
        if self.index.bytes != Index::bytes_for(self.batches) {
            return Err(Unreadable::expected(
                "part index",
                Index::bytes_for(self.batches),
                self.index.bytes,
            ));
        }
        let largest = MOST_BYTES as u64;
        bounded("part memory", self.memory.bytes, self.batches.saturating_mul(largest))?;
        bounded("batches", self.first_batch.0, u64::MAX - self.batches)?;
        // A parent may have no batches at all: the numbers of cuts are what grows at each link.
        let (fits, expected) = match self.parent {
            None => (
                self.first_batch.0 == 1 && self.cut.0 == 1,
                "batches from 1 and cut 1 of a full one",
            ),
            Some(_) => (
                self.first_batch.0 >= 1 && self.cut.0 >= 2,
                "batches from 1 or more and a cut above 1",
            ),
        };
        if !fits {
            let got = format!("{} and {}", self.first_batch, self.cut);
            return Err(Unreadable::expected("kind", expected, got));
        }
        Ok(())
    }

    /// Its parts, with the names of their files.
    pub const fn parts(&self) -> [(&'static str, Part); 3] {
        [("state", self.state), ("memory", self.memory), ("index", self.index)]
    }
}

/// Something to print in a line and read back.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= limits::SNAPSHOT_NAME_BYTES && !text.chars().any(char::is_control)
}

fn reversed(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes.reverse();
    bytes
}

fn number<T: FromStr>(what: &str, text: &str) -> Result<T, Unreadable> {
    text.parse().map_err(|_| Unreadable::expected(what, "a number", text))
}

fn pair(what: &str, text: &str) -> Result<(u64, u64), Unreadable> {
    let (a, b) = text
        .split_once(' ')
        .ok_or_else(|| Unreadable::expected(what, "two numbers", text))?;
    Ok((number(what, a)?, number(what, b)?))
}

/// Sixteen bytes as 32 hexadecimal digits, and nothing else.
fn hex(what: &str, text: &str) -> Result<[u8; 16], Unreadable> {
    let bad = || Unreadable::expected(what, "32 hexadecimal digits", text);
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(bad()),
    };
    let digits: &[u8; 32] = text.as_bytes().try_into().map_err(|_| bad())?;
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(bytes)
}

/// `0 pages 65536 present 0+65536`
fn read_space(text: &str) -> Result<Space, Unreadable> {
    let bad = || Unreadable::expected("space", "NUMBER pages COUNT present FIRST+COUNT …, ascending", text);
    let (id, rest) = text.split_once(" pages ").ok_or_else(bad)?;
    let (pages, runs) = rest.split_once(" present").ok_or_else(bad)?;
    let pages = PageCount(number("space", pages)?);
    if pages.0 > limits::SPACE_PAGES {
        return Err(bad());
    }
    let mut space = Space {
        id: SpaceId(number("space", id)?),
        pages,
        present: Vec::new(),
    };
    let mut end = 0;
    for run in runs.split(' ').skip(1) {
        let (first, count) = run.split_once('+').ok_or_else(bad)?;
        let (first, count): (u64, u64) = (number("space", first)?, number("space", count)?);
        let next = first
            .checked_add(count)
            .filter(|next| first >= end && count > 0 && *next <= pages.0);
        end = next
            .filter(|_| space.present.len() < limits::SPACE_RUNS)
            .ok_or_else(bad)?;
        space.present.push((Pfn(first), PageCount(count)));
    }
    Ok(space)
}

/// A text, line by line.
struct Lines<'a> {
    rest: &'a str,
}

impl<'a> Lines<'a> {
    const fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    /// The value of the next line, if its key is `key`.
    fn optional(&mut self, key: &str) -> Option<&'a str> {
        let (line, rest) = self.rest.split_once('\n')?;
        let value = line.strip_prefix(key)?.strip_prefix(' ')?;
        self.rest = rest;
        Some(value)
    }

    /// The value of the next line, whose key must be `key`.
    fn value(&mut self, key: &str) -> Result<&'a str, Unreadable> {
        let line = self.rest.lines().next().unwrap_or_default();
        self.optional(key)
            .ok_or_else(|| Unreadable::expected("manifest", format!("a line '{key} …'"), line))
    }

    fn number(&mut self, key: &str) -> Result<u64, Unreadable> {
        number(key, self.value(key)?)
    }

    fn id(&mut self, key: &str) -> Result<[u8; 16], Unreadable> {
        hex(key, self.value(key)?)
    }

    fn part(&mut self, name: &str) -> Result<Part, Unreadable> {
        let key = format!("part {name}");
        let value = self.value(&key)?;
        let (bytes, checksum) = value
            .split_once(' ')
            .ok_or_else(|| Unreadable::expected(&key, "bytes and checksum", value))?;
        Ok(Part {
            bytes: number(&key, bytes)?,
            checksum: Checksum(u128::from_le_bytes(reversed(hex(&key, checksum)?))),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in crate::snapshot) fn full() -> Manifest {
        let ram = Space {
            id: SpaceId::RAM,
            pages: PageCount(8),
            present: vec![(Pfn(0), PageCount(3)), (Pfn(5), PageCount(3))],
        };
        Manifest {
            id: SnapshotId([1; 16]),
            guest: GuestId([2; 16]),
            name: "web-1".to_owned(),
            term: Term(3),
            cut: Epoch(1),
            taken: 1_790_000_000,
            parent: None,
            spaces: vec![ram],
            digest: Digest(0xabc),
            first_batch: BatchId(1),
            batches: 2,
            state: Part::of(b"state"),
            memory: Part {
                bytes: 400_000,
                checksum: Checksum(5),
            },
            index: Part {
                bytes: 16,
                checksum: Checksum(6),
            },
        }
    }

    pub(in crate::snapshot) fn differential() -> Manifest {
        let parent = Parent {
            folder: "monday".to_owned(),
            id: SnapshotId([1; 16]),
            checksum: full().encode().1,
        };
        Manifest {
            id: SnapshotId([4; 16]),
            cut: Epoch(2),
            parent: Some(parent),
            first_batch: BatchId(3),
            ..full()
        }
    }

    /// A text with the checksum it should have.
    fn sealed(text: &str) -> String {
        format!("{text}checksum {}\n", Checksum::of(text.as_bytes()))
    }

    fn changed(from: &str, to: &str) -> Result<(Manifest, Checksum), Unreadable> {
        let (text, _) = differential().encode();
        let body = &text[..text.rfind("checksum").unwrap()];
        assert!(body.contains(from), "{from}");
        Manifest::decode(sealed(&body.replacen(from, to, 1)).as_bytes())
    }

    #[test]
    fn the_text_of_a_manifest() {
        let (text, checksum) = differential().encode();
        let parent = full().encode().1;
        let state = Checksum::of(b"state");
        assert_eq!(
            text,
            format!(
                "umbra-snapshot 1\nid 04040404040404040404040404040404\nguest 02020202020202020202020202020202\n\
                 name web-1\nterm 3\ncut 2\ntaken 1790000000\nkind differential\nparent-folder monday\n\
                 parent-id 01010101010101010101010101010101\nparent-checksum {parent}\n\
                 space 0 pages 8 present 0+3 5+3\ndigest 00000000000000000000000000000abc\nbatches 3 2\n\
                 part state 5 {state}\npart memory 400000 00000000000000000000000000000005\n\
                 part index 16 00000000000000000000000000000006\nchecksum {checksum}\n"
            )
        );
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_no_shorter() {
        for manifest in [full(), differential()] {
            let (text, checksum) = manifest.encode();
            assert_eq!(Manifest::decode(text.as_bytes()), Ok((manifest, checksum)));
            for len in 0..text.len() {
                assert!(Manifest::decode(&text.as_bytes()[..len]).is_err(), "{len}");
            }
        }
    }

    #[test]
    fn every_flipped_bit_of_a_manifest_is_noticed() {
        let (text, _) = differential().encode();
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut bytes = text.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                assert!(Manifest::decode(&bytes).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line_with_what_was_expected() {
        let line = |from: &str, to: &str| changed(from, to).unwrap_err().to_string();
        assert_eq!(
            line("umbra-snapshot 1", "umbra-snapshot 2"),
            "umbra-snapshot: expected version 1, got '2'"
        );
        assert_eq!(line("cut 2", "cut x"), "cut: expected a number, got 'x'");
        assert_eq!(
            line("kind d", "kind b"),
            "kind: expected full or differential, got 'bifferential'"
        );
        assert_eq!(
            line("id 04", "id 4"),
            "id: expected 32 hexadecimal digits, got '4040404040404040404040404040404'"
        );
        for folder in ["..", ".", "a/b", "/etc", ""] {
            let text = line("parent-folder monday", &format!("parent-folder {folder}"));
            assert!(
                text.starts_with("parent-folder: expected the name of a folder"),
                "{text}"
            );
        }
        for (from, to, what) in [
            ("part state 5", "part state 99999999999", "part state: expected at most"),
            ("part index 16", "part index 20", "part index: expected 16"),
            (
                "part memory 400000",
                "part memory 99999999999",
                "part memory: expected at most",
            ),
            (
                "batches 3 2",
                "batches 18446744073709551615 2",
                "batches: expected at most",
            ),
            (
                "cut 2",
                "cut 1",
                "kind: expected batches from 1 or more and a cut above 1",
            ),
            ("batches 3 2", "batches 0 2", "kind: expected batches from 1 or more"),
            ("0+3 5+3", "0+3 2+3", "space: "),
            ("0+3 5+3", "0+3 5+4", "space: "),
            ("0+3 5+3", "0+18446744073709551615", "space: "),
            ("pages 8", "pages 99999999999", "space: "),
            ("term 3", "term 03", "manifest: expected the one way to write it"),
            (
                "term 3\n",
                "term 3\nterm 3\n",
                "manifest: expected a line 'cut …', got 'term 3'",
            ),
        ] {
            let text = line(from, to);
            assert!(text.starts_with(what), "{from} {to}: {text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_reading_a_manifest_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..600, len in 0usize..40) {
            let _ = Manifest::decode(&bytes);
            // A good one with something foreign in it, and the right checksum for that.
            let (text, _) = differential().encode();
            let body = &text[..text.rfind("checksum").unwrap()];
            let at = at.min(body.len());
            let end = (at + len).min(body.len());
            let foreign = String::from_utf8_lossy(&bytes).into_owned();
            let _ = Manifest::decode(sealed(&format!("{}{foreign}{}", &body[..at], &body[end..])).as_bytes());
        }
    }
}
