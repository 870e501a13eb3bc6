//! A batch: page copies of one epoch on their way, and what closes it. The bytes are in
//! `docs/wire.md`, under *Batch*.
//!
//! A batch is made once, by [`BatchWriter`], from page contents the node copied a moment before, and read once, by
//! [`Batch::parse`], which believes nothing. The sans-IO [`Source`](crate::source::Source) and
//! [`Shadow`](crate::shadow::Shadow) see only its number and counts.
//!
//! # Two steps
//!
//! Making a batch has a part that must be done in the order of their numbers, because each leans on what was shipped
//! before, and a part that need not: compressing the bytes. So a writer ends in a [`Draft`], which is whole but for that,
//! and which any thread may turn into the bytes that travel.

use umbra_units::{BatchId, Bytes, Epoch, Malformed, PageId, Pfn, Reader, SpaceId, Writer};

use crate::digest::{Digest, PageHash};
use crate::guest::StateRecord;
use crate::limits;
use crate::pack::{Level, Method, Packer, unpack};
use crate::page::{DUP_BYTES, Encoding};

/// First byte of every batch: what it is and which layout.
const MAGIC: u8 = 0xb2;
/// The layout before this one: no duplicates, no zstd, entries before payloads. Snapshots of that time are still read.
const MAGIC_1: u8 = 0xb1;
/// Flag: the body is compressed by lz4.
const LZ4: u8 = 1;
/// Flag: the batch closes its epoch.
const CLOSES: u8 = 2;
/// Flag: the body is compressed by zstd.
const ZSTD: u8 = 4;
/// mark, flags, number, epoch, owed, pages, body length, payload length
const HEADER_BYTES: usize = LEAST_BYTES + 4;
/// A batch of the first layout without a body.
pub(crate) const LEAST_BYTES: usize = 1 + 1 + 8 + 8 + 8 + 4 + 4;
/// The longest batch there is: one that is not compressed.
pub(crate) const MOST_BYTES: usize = HEADER_BYTES + limits::BATCH_BYTES;
/// Flag of a close: both sides hash all of memory.
const AUDIT: u8 = 1;
/// Flag of a close: the guest goes with the epoch.
const FINAL: u8 = 2;
/// space, page number, encoding, length, hash
const ENTRY_BYTES: usize = 2 + 4 + 1 + 2 + 8;

/// What ends an epoch: the digest its memory must have, and everything that is not memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// The digest of all memory at the cut.
    pub digest: Digest,
    /// Whether the shadow is asked to hash its memory itself before it says it is prepared.
    pub audit: bool,
    /// Whether the guest goes with it: the shadow is to be prepared, not only to commit.
    pub is_final: bool,
    /// vCPU and device state.
    pub records: Vec<StateRecord>,
}

/// How many pages travelled in which way, and how many did not have to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageCounts {
    /// Equal to what the shadow holds: not sent.
    pub same: u64,
    /// All zeros.
    pub zero: u64,
    /// As changed words.
    pub delta: u64,
    /// Whole.
    pub raw: u64,
    /// As copies of other pages.
    pub dup: u64,
}

impl PageCounts {
    /// Pages looked at.
    pub const fn total(&self) -> u64 {
        self.same + self.travelled()
    }

    /// Pages that travelled.
    pub const fn travelled(&self) -> u64 {
        self.zero + self.delta + self.raw + self.dup
    }

    /// Add another count to this one.
    pub const fn add(&mut self, other: &Self) {
        self.same += other.same;
        self.zero += other.zero;
        self.delta += other.delta;
        self.raw += other.raw;
        self.dup += other.dup;
    }

    /// One more page travelled like this.
    pub const fn travels(&mut self, encoding: Encoding) {
        let count = match encoding {
            Encoding::Zero => &mut self.zero,
            Encoding::Delta => &mut self.delta,
            Encoding::Raw => &mut self.raw,
            Encoding::Dup => &mut self.dup,
        };
        *count += 1;
    }
}

/// Builds one batch.
#[derive(Debug)]
pub struct BatchWriter {
    id: BatchId,
    epoch: Epoch,
    owed: u64,
    /// A header's room, and the payloads behind it.
    bytes: Writer,
    entries: Writer,
    counts: PageCounts,
    close: Option<Close>,
}

impl BatchWriter {
    /// Start batch `id` of `epoch`; the source owes `owed` more pages beyond it.
    pub fn new(id: BatchId, epoch: Epoch, owed: u64) -> Self {
        let mut bytes = Writer::new();
        bytes.put(&[0; HEADER_BYTES]);
        Self {
            id,
            epoch,
            owed,
            bytes,
            entries: Writer::new(),
            counts: PageCounts::default(),
            close: None,
        }
    }

    /// A page that need not travel.
    pub const fn same(&mut self) {
        self.counts.same += 1;
    }

    /// Add a page whose content hashes to `hash`; `encode` appends its payload.
    ///
    /// # Panics
    /// When a page beyond the limits is added: the ledger takes no more than a batch holds.
    pub fn page(&mut self, page: PageId, hash: PageHash, encoding: Encoding, encode: impl FnOnce(&mut Writer)) {
        self.page_if(page, hash, encoding, |out| {
            encode(out);
            true
        });
    }

    fn entry(&mut self, page: PageId, hash: PageHash, encoding: Encoding, len: usize) {
        let len = u16::try_from(len).expect("a page's encoding is at most 4 KiB");
        let pfn = u32::try_from(page.pfn.0).expect("limits::SPACE_PAGES bounds page numbers");
        self.entries
            .u16(page.space.0)
            .u32(pfn)
            .u8(encoding.to_wire())
            .u16(len)
            .u64(hash.0);
        self.counts.travels(encoding);
    }

    /// Add a page if `encode` has a payload for it, which then returns true; otherwise it must have appended nothing.
    pub fn page_if(
        &mut self,
        page: PageId,
        hash: PageHash,
        encoding: Encoding,
        encode: impl FnOnce(&mut Writer) -> bool,
    ) {
        let before = self.bytes.len();
        if encode(&mut self.bytes) {
            self.entry(page, hash, encoding, self.bytes.len() - before);
        }
    }

    /// This batch ends its epoch.
    pub fn close(&mut self, close: Close) {
        self.close = Some(close);
    }

    /// How its pages travel.
    pub const fn counts(&self) -> PageCounts {
        self.counts
    }

    /// The batch, whole but for being compressed.
    pub fn draft(mut self) -> Draft {
        let payload = self.bytes.len() - HEADER_BYTES;
        self.bytes.put(self.entries.as_slice());
        if let Some(close) = &self.close {
            write_close(close, &mut self.bytes);
        }
        let header = Header {
            flags: if self.close.is_some() { CLOSES } else { 0 },
            id: self.id,
            epoch: self.epoch,
            owed: self.owed,
            pages: u32::try_from(self.counts.travelled()).expect("at most limits::BATCH_PAGES"),
            body: u32::try_from(self.bytes.len() - HEADER_BYTES).expect("at most limits::BATCH_BYTES"),
            payload: u32::try_from(payload).expect("at most limits::BATCH_BYTES"),
        };
        Draft {
            header,
            bytes: self.bytes.into_bytes(),
            counts: self.counts,
        }
    }

    /// The finished batch; `compress` asks for lz4.
    pub fn finish(self, compress: bool) -> Vec<u8> {
        let method = if compress { Method::Lz4 } else { Method::None };
        self.draft().pack(method, &mut Packer::new()).0
    }
}

#[derive(Debug, Clone, Copy)]
struct Header {
    flags: u8,
    id: BatchId,
    epoch: Epoch,
    owed: u64,
    pages: u32,
    body: u32,
    payload: u32,
}

impl Header {
    fn write(&self, out: &mut [u8]) {
        let mut header = Writer::with_capacity(HEADER_BYTES);
        header.u8(MAGIC).u8(self.flags);
        header.u64(self.id.0).u64(self.epoch.0).u64(self.owed);
        header.u32(self.pages).u32(self.body).u32(self.payload);
        out.copy_from_slice(header.as_slice());
    }
}

/// A batch that is whole but for being compressed. See the [module](self).
#[derive(Debug)]
pub struct Draft {
    header: Header,
    /// A header's room, and the body behind it.
    bytes: Vec<u8>,
    counts: PageCounts,
}

impl Draft {
    /// Its number.
    pub const fn id(&self) -> BatchId {
        self.header.id
    }

    /// How its pages travel.
    pub const fn counts(&self) -> PageCounts {
        self.counts
    }

    /// What there is to compress.
    pub const fn body(&self) -> Bytes {
        Bytes::of_len(self.bytes.len() - HEADER_BYTES)
    }

    /// The finished batch, and how it is compressed: by `method`, or not at all if that makes it no smaller.
    pub fn pack(mut self, method: Method, packer: &mut Packer) -> (Vec<u8>, Method) {
        if method != Method::None {
            let mut packed = vec![0; HEADER_BYTES];
            if packer.pack(method, &self.bytes[HEADER_BYTES..], &mut packed) {
                self.header.flags |= if method == Method::Lz4 { LZ4 } else { ZSTD };
                self.header.write(&mut packed[..HEADER_BYTES]);
                return (packed, method);
            }
        }
        self.header.write(&mut self.bytes[..HEADER_BYTES]);
        (self.bytes, Method::None)
    }
}

/// A batch that was read: whose pages can be walked once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its number.
    pub id: BatchId,
    /// The epoch its pages belong to.
    pub epoch: Epoch,
    /// Pages the source owed beyond this batch when it was made.
    pub owed: u64,
    /// What closes the epoch, if this batch does.
    pub close: Option<Close>,
    entries: Vec<Entry>,
    body: Vec<u8>,
}

/// How the bytes of a batch lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    First,
    Now,
}

impl Layout {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        match reader.u8("batch")? {
            MAGIC => Ok(Self::Now),
            MAGIC_1 => Ok(Self::First),
            _ => Err(Malformed {
                what: "batch mark",
                at: 0,
            }),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    page: PageId,
    encoding: Encoding,
    hash: PageHash,
    payload: core::ops::Range<usize>,
}

impl Batch {
    /// The number of an encoded batch, without reading the rest.
    pub fn number(bytes: &[u8]) -> Result<BatchId, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.u8("batch")? != MAGIC {
            return Err(Malformed {
                what: "batch mark",
                at: 0,
            });
        }
        reader.u8("batch flags")?;
        Ok(BatchId(reader.u64("batch number")?))
    }

    /// Read a batch. Every length is checked before it is believed.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let layout = Layout::read(&mut reader)?;
        let flags = reader.u8("batch flags")?;
        let known = LZ4 | CLOSES | if layout == Layout::Now { ZSTD } else { 0 };
        let method = match flags & (LZ4 | ZSTD) {
            0 => Some(Method::None),
            LZ4 => Some(Method::Lz4),
            ZSTD => Some(Method::Zstd(Level::ONE)),
            _ => None,
        };
        let method = method.filter(|_| flags & !known == 0);
        let method = method.ok_or_else(|| reader.malformed("batch flags"))?;
        let id = BatchId(reader.u64("batch number")?);
        let epoch = Epoch(reader.u64("batch epoch")?);
        let owed = reader.u64("batch owed pages")?;
        let pages = reader.len_within(limits::BATCH_PAGES, "batch page count")?;
        let len = reader.len_within(limits::BATCH_BYTES, "batch length")?;
        let payload = match layout {
            Layout::Now => Some(reader.len_within(len, "batch payload length")?),
            Layout::First => None,
        };
        let body = if method == Method::None {
            let body = reader.take(len, "batch body")?.to_vec();
            reader.finish("batch")?;
            body
        } else {
            let at = reader.position();
            let mut body = vec![0; len];
            unpack(method, reader.rest(), &mut body, at)?;
            body
        };
        let mut reader = Reader::new(&body);
        let mut payload_at = payload.map_or(pages * ENTRY_BYTES, |_| 0);
        if let Some(payload) = payload {
            reader.take(payload, "batch payload")?;
        }
        let mut entries = Vec::with_capacity(pages);
        for _ in 0..pages {
            let entry = read_entry(&mut reader, payload_at, layout)?;
            payload_at = entry.payload.end;
            entries.push(entry);
        }
        match payload {
            // Payloads beyond their part would be read from what follows it.
            Some(payload) if payload != payload_at => return Err(reader.malformed("batch payload length")),
            Some(_) => {}
            None => {
                reader.take(payload_at - pages * ENTRY_BYTES, "batch payload")?;
            }
        }
        let close = if flags & CLOSES == 0 {
            None
        } else {
            Some(read_close(&mut reader)?)
        };
        reader.finish("batch body")?;
        Ok(Self {
            id,
            epoch,
            owed,
            close,
            entries,
            body,
        })
    }

    /// Its pages: which, how encoded, the hash of the content, and the encoded bytes.
    pub fn pages(&self) -> impl Iterator<Item = (PageId, Encoding, PageHash, &[u8])> {
        self.entries.iter().map(|entry| {
            (
                entry.page,
                entry.encoding,
                entry.hash,
                &self.body[entry.payload.clone()],
            )
        })
    }

    /// How many pages it carries.
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it carries none.
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Its size once uncompressed.
    pub const fn size(&self) -> Bytes {
        Bytes::of_len(self.body.len())
    }
}

fn read_entry(reader: &mut Reader<'_>, payload_at: usize, layout: Layout) -> Result<Entry, Malformed> {
    let page = PageId {
        space: SpaceId(reader.u16("page's space")?),
        pfn: Pfn(u64::from(reader.u32("page number")?)),
    };
    let number = reader.u8("page encoding")?;
    let encoding = Encoding::from_wire(number).ok_or_else(|| reader.malformed("page encoding"))?;
    let len = usize::from(reader.u16("page length")?);
    let fits = match encoding {
        Encoding::Zero => len == 0,
        Encoding::Raw => len == umbra_units::PAGE_SIZE,
        Encoding::Delta => len < umbra_units::PAGE_SIZE,
        Encoding::Dup => len == DUP_BYTES && layout == Layout::Now,
    };
    if !fits {
        return Err(reader.malformed("page length"));
    }
    let hash = PageHash(reader.u64("page hash")?);
    Ok(Entry {
        page,
        encoding,
        hash,
        payload: payload_at..payload_at + len,
    })
}

fn write_close(close: &Close, out: &mut Writer) {
    let audit = if close.audit { AUDIT } else { 0 };
    let is_final = if close.is_final { FINAL } else { 0 };
    out.u128(close.digest.0).u8(audit | is_final);
    write_records(&close.records, out);
}

fn read_close(reader: &mut Reader<'_>) -> Result<Close, Malformed> {
    let digest = Digest(reader.u128("close digest")?);
    let flags = reader.u8("close flags")?;
    if flags & !(AUDIT | FINAL) != 0 {
        return Err(reader.malformed("close flags"));
    }
    Ok(Close {
        digest,
        audit: flags & AUDIT != 0,
        is_final: flags & FINAL != 0,
        records: read_records(reader)?,
    })
}

/// Append state records as they travel: a count, then each one's kind, version and bytes.
///
/// # Panics
/// When there are more than [`limits::RECORDS`]: no machine of ours has as many parts.
pub fn write_records(records: &[StateRecord], out: &mut Writer) {
    assert!(records.len() <= limits::RECORDS, "a guest of {} records", records.len());
    out.u32(u32::try_from(records.len()).expect("checked above"));
    for record in records {
        out.bytes(record.kind.as_bytes())
            .u32(record.version)
            .bytes(&record.bytes);
    }
}

/// Read what [`write_records`] wrote.
pub fn read_records(reader: &mut Reader<'_>) -> Result<Vec<StateRecord>, Malformed> {
    let count = reader.len_within(limits::RECORDS, "record count")?;
    let mut records = Vec::new();
    for _ in 0..count {
        records.push(StateRecord {
            kind: reader.text_within(limits::RECORD_KIND_BYTES, "record kind")?.to_owned(),
            version: reader.u32("record version")?,
            bytes: reader.bytes_within(limits::RECORD_BYTES, "record bytes")?.to_vec(),
        });
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Dup;
    use proptest::prelude::*;
    use umbra_units::PAGE_SIZE;

    fn sample(method: Method) -> Vec<u8> {
        let mut writer = BatchWriter::new(BatchId(3), Epoch(1), 9);
        writer.same();
        writer.page(PageId::ram(Pfn(5)), PageHash::zero(), Encoding::Zero, |_| {});
        writer.page(PageId::ram(Pfn(6)), PageHash(77), Encoding::Raw, |out| {
            out.put(&[1; PAGE_SIZE]);
        });
        let dup = Dup::new(PageId::ram(Pfn(6)), &[1; PAGE_SIZE]);
        writer.page(PageId::ram(Pfn(7)), PageHash(77), Encoding::Dup, |out| dup.write(out));
        let records = vec![StateRecord {
            kind: "vcpu/0".to_owned(),
            version: 1,
            bytes: vec![1, 2, 3],
        }];
        writer.close(Close {
            digest: Digest(8),
            audit: true,
            is_final: true,
            records,
        });
        assert_eq!(
            writer.counts(),
            PageCounts {
                same: 1,
                zero: 1,
                delta: 0,
                raw: 1,
                dup: 1
            }
        );
        writer.draft().pack(method, &mut Packer::new()).0
    }

    const METHODS: [Method; 3] = [Method::None, Method::Lz4, Method::Zstd(Level::ONE)];

    #[test]
    fn a_batch_is_read_as_it_was_written_however_it_is_compressed() {
        for method in METHODS {
            let bytes = sample(method);
            assert_eq!(bytes.len() < 1_000, method != Method::None, "{method}");
            let batch = Batch::parse(&bytes).unwrap();
            assert_eq!((batch.id, batch.epoch, batch.owed), (BatchId(3), Epoch(1), 9));
            let pages: Vec<_> = batch
                .pages()
                .map(|(page, how, hash, bytes)| (page.pfn.0, how, hash, bytes.len()))
                .collect();
            let zero = (5, Encoding::Zero, PageHash::zero(), 0);
            let raw = (6, Encoding::Raw, PageHash(77), PAGE_SIZE);
            assert_eq!(pages, [zero, raw, (7, Encoding::Dup, PageHash(77), DUP_BYTES)]);
            let (.., dup) = batch.pages().last().unwrap();
            assert!(Dup::read(dup).unwrap().is_proven_by(&[1; PAGE_SIZE]));
            assert_eq!(batch.close.unwrap().records[0].kind, "vcpu/0");
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn close() -> Close {
        let records = vec![StateRecord {
            kind: "a".to_owned(),
            version: 4,
            bytes: vec![5],
        }];
        Close {
            digest: Digest(0x0102),
            audit: false,
            is_final: false,
            records,
        }
    }

    #[test]
    fn golden_bytes_of_a_closing_batch() {
        let mut writer = BatchWriter::new(BatchId(2), Epoch(1), 3);
        let delta = |out: &mut Writer| {
            out.put(&[0; 8]);
        };
        writer.page(PageId::ram(Pfn(9)), PageHash(0x0a), Encoding::Delta, delta);
        let page = PageId {
            space: SpaceId(1),
            pfn: Pfn(8),
        };
        let dup = Dup::new(PageId::ram(Pfn(9)), &[0; PAGE_SIZE]);
        writer.page(page, PageHash(0x0a), Encoding::Dup, |out| dup.write(out));
        writer.close(close());
        let expected = [
            "b2",
            "02",
            "0200000000000000",
            "0100000000000000",
            "0300000000000000",
            "02000000",
            "73000000",
            "2e000000",
            // payloads: a delta of nothing, a duplicate
            "0000000000000000",
            "0000",
            "09000000",
            &hex(blake3::hash(&[0; PAGE_SIZE]).as_bytes()),
            // entries
            "0000",
            "09000000",
            "01",
            "0800",
            "0a00000000000000",
            "0100",
            "08000000",
            "03",
            "2600",
            "0a00000000000000",
            // the close
            "02010000000000000000000000000000",
            "00",
            "01000000",
            "0100000061",
            "04000000",
            "0100000005",
        ];
        assert_eq!(hex(&writer.finish(false)), expected.concat());
    }

    /// As a snapshot of that time holds it: a page of zeros and a delta.
    const FIRST_LAYOUT: &[&str] = &[
        "b102",
        "0200000000000000",
        "0100000000000000",
        "0000000000000000",
        "02000000",
        "4d000000",
        "0000050000000000000800000000000000",
        "0000090000000108000a00000000000000",
        "0000000000000000",
        "02010000000000000000000000000000",
        "00",
        "01000000",
        "0100000061",
        "04000000",
        "0100000005",
    ];

    fn unhex(text: &str) -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(byte).collect()
    }

    #[test]
    fn a_batch_of_the_first_layout_is_read_as_it_was_meant() {
        let bytes = unhex(&FIRST_LAYOUT.concat());
        let batch = Batch::parse(&bytes).unwrap();
        assert_eq!(
            (batch.id, batch.epoch, batch.close.clone()),
            (BatchId(2), Epoch(1), Some(close()))
        );
        let pages: Vec<_> = batch
            .pages()
            .map(|(page, how, hash, bytes)| (page.pfn.0, how, hash.0, bytes))
            .collect();
        assert_eq!(
            pages,
            [(5, Encoding::Zero, 8, &[][..]), (9, Encoding::Delta, 0x0a, &[0; 8])]
        );
        // What came later is not in it: neither zstd nor duplicates.
        let mut zstd = bytes.clone();
        zstd[1] |= ZSTD;
        assert!(Batch::parse(&zstd).is_err());
        let dup = unhex(&FIRST_LAYOUT.concat().replace("0108000a", "0326000a"));
        assert!(Batch::parse(&dup).is_err());
    }

    #[test]
    fn payloads_that_do_not_end_where_they_are_said_to_are_malformed() {
        for (said, is) in [(-1i8, false), (0, true), (1, false)] {
            let mut bytes = sample(Method::None);
            let at = HEADER_BYTES - 4;
            bytes[at] = bytes[at].wrapping_add_signed(said);
            assert_eq!(Batch::parse(&bytes).is_ok(), is);
        }
    }

    #[test]
    fn a_truncated_batch_is_malformed_at_every_length() {
        for method in METHODS {
            let bytes = sample(method);
            for len in 0..bytes.len() {
                assert!(Batch::parse(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_parsing_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), flags in 0u8..8, first: bool) {
            if let [magic, f, ..] = bytes.as_mut_slice() {
                (*magic, *f) = (if first { MAGIC_1 } else { MAGIC }, flags);
            }
            let _ = Batch::parse(&bytes);
        }

        #[test]
        fn a_flipped_bit_is_never_a_panic(at in 0usize..5_000, bit in 0u32..8, method in prop::sample::select(&METHODS)) {
            let mut bytes = sample(method);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = Batch::parse(&bytes);
        }
    }
}
