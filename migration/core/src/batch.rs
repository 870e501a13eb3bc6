//! A batch: page copies of one epoch on their way, and for a final epoch what closes it. The bytes are in
//! `docs/wire.md`, under *Batch*.
//!
//! A batch is made once, by [`BatchWriter`], from page contents the node copied a moment before, and read once, by
//! [`Batch::parse`], which believes nothing. The sans-IO [`Source`](crate::source::Source) and
//! [`Shadow`](crate::shadow::Shadow) see only its number and counts.

use umbra_units::{BatchId, Bytes, Epoch, Malformed, PageId, Pfn, Reader, SpaceId, Writer};

use crate::digest::{Digest, PageHash};
use crate::guest::StateRecord;
use crate::limits;
use crate::page::Encoding;

/// First byte of every batch: what it is and which layout.
const MAGIC: u8 = 0xb1;
/// Flag: the body is lz4-compressed.
const LZ4: u8 = 1;
/// Flag: the batch closes its epoch.
const CLOSES: u8 = 2;
pub(crate) const HEADER_BYTES: usize = 1 + 1 + 8 + 8 + 8 + 4 + 4;
/// space, page number, encoding, length, hash
const ENTRY_BYTES: usize = 2 + 4 + 1 + 2 + 8;

/// What ends a final epoch: the digest its memory must have, and everything that is not memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Close {
    /// The digest of all memory at the cut.
    pub digest: Digest,
    /// Whether the shadow is asked to hash its memory itself before it says it is prepared.
    pub audit: bool,
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
}

impl PageCounts {
    /// Pages looked at.
    pub const fn total(&self) -> u64 {
        self.same + self.zero + self.delta + self.raw
    }

    /// Add another count to this one.
    pub const fn add(&mut self, other: &Self) {
        self.same += other.same;
        self.zero += other.zero;
        self.delta += other.delta;
        self.raw += other.raw;
    }

    const fn slot(&mut self, encoding: Encoding) -> &mut u64 {
        match encoding {
            Encoding::Zero => &mut self.zero,
            Encoding::Delta => &mut self.delta,
            Encoding::Raw => &mut self.raw,
        }
    }
}

/// Builds one batch.
#[derive(Debug)]
pub struct BatchWriter {
    id: BatchId,
    epoch: Epoch,
    owed: u64,
    entries: Writer,
    payload: Writer,
    counts: PageCounts,
    close: Option<Close>,
}

impl BatchWriter {
    /// Start batch `id` of `epoch`; the source owes `owed` more pages beyond it.
    pub fn new(id: BatchId, epoch: Epoch, owed: u64) -> Self {
        let (entries, payload) = (Writer::new(), Writer::with_capacity(64 * umbra_units::PAGE_SIZE));
        Self {
            id,
            epoch,
            owed,
            entries,
            payload,
            counts: PageCounts::default(),
            close: None,
        }
    }

    /// A page that need not travel.
    pub const fn same(&mut self) {
        self.counts.same += 1;
    }

    /// Add a page whose content hashes to `hash`; `encode` appends its bytes to the payload.
    ///
    /// # Panics
    /// When a page beyond the limits is added: the ledger takes no more than a batch holds.
    pub fn page(&mut self, page: PageId, hash: PageHash, encoding: Encoding, encode: impl FnOnce(&mut Writer)) {
        let before = self.payload.len();
        encode(&mut self.payload);
        let len = u16::try_from(self.payload.len() - before).expect("a page's encoding is at most 4 KiB");
        let pfn = u32::try_from(page.pfn.0).expect("limits::SPACE_PAGES bounds page numbers");
        self.entries
            .u16(page.space.0)
            .u32(pfn)
            .u8(encoding.to_wire())
            .u16(len)
            .u64(hash.0);
        *self.counts.slot(encoding) += 1;
    }

    /// This batch ends its epoch.
    pub fn close(&mut self, close: Close) {
        self.close = Some(close);
    }

    /// How its pages travel.
    pub const fn counts(&self) -> PageCounts {
        self.counts
    }

    /// The finished batch. `compress` asks for lz4, which is used only if it makes the body smaller.
    pub fn finish(self, compress: bool) -> Vec<u8> {
        let mut body = self.entries;
        body.put(self.payload.as_slice());
        if let Some(close) = &self.close {
            write_close(close, &mut body);
        }
        let body = body.into_bytes();
        let packed = (compress && !body.is_empty())
            .then(|| lz4_flex::block::compress(&body))
            .filter(|p| p.len() < body.len());
        let flags = if packed.is_some() { LZ4 } else { 0 } | if self.close.is_some() { CLOSES } else { 0 };
        let pages = self.counts.total() - self.counts.same;
        let mut out = Writer::with_capacity(HEADER_BYTES + body.len());
        out.u8(MAGIC).u8(flags).u64(self.id.0).u64(self.epoch.0).u64(self.owed);
        out.u32(u32::try_from(pages).expect("at most limits::BATCH_PAGES"));
        out.u32(u32::try_from(body.len()).expect("at most limits::BATCH_BYTES"));
        out.put(packed.as_deref().unwrap_or(&body));
        out.into_bytes()
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
        if reader.u8("batch")? != MAGIC {
            return Err(Malformed {
                what: "batch mark",
                at: 0,
            });
        }
        let flags = reader.u8("batch flags")?;
        if flags & !(LZ4 | CLOSES) != 0 {
            return Err(reader.malformed("batch flags"));
        }
        let id = BatchId(reader.u64("batch number")?);
        let epoch = Epoch(reader.u64("batch epoch")?);
        let owed = reader.u64("batch owed pages")?;
        let pages = reader.len_within(limits::BATCH_PAGES, "batch page count")?;
        let len = reader.len_within(limits::BATCH_BYTES, "batch length")?;
        let body = if flags & LZ4 == 0 {
            let body = reader.take(len, "batch body")?.to_vec();
            reader.finish("batch")?;
            body
        } else {
            let at = reader.position();
            let malformed = Malformed {
                what: "lz4 batch body",
                at,
            };
            let body = lz4_flex::block::decompress(reader.rest(), len).map_err(|_| malformed)?;
            if body.len() == len { body } else { return Err(malformed) }
        };
        let mut reader = Reader::new(&body);
        let mut entries = Vec::with_capacity(pages);
        let mut payload_at = pages * ENTRY_BYTES;
        for _ in 0..pages {
            let entry = read_entry(&mut reader, payload_at)?;
            payload_at = entry.payload.end;
            entries.push(entry);
        }
        reader.take(payload_at - pages * ENTRY_BYTES, "batch payload")?;
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

fn read_entry(reader: &mut Reader<'_>, payload_at: usize) -> Result<Entry, Malformed> {
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
    out.u128(close.digest.0).u8(u8::from(close.audit));
    write_records(&close.records, out);
}

fn read_close(reader: &mut Reader<'_>) -> Result<Close, Malformed> {
    let digest = Digest(reader.u128("close digest")?);
    let audit = match reader.u8("close audit flag")? {
        0 => false,
        1 => true,
        _ => return Err(reader.malformed("close audit flag")),
    };
    Ok(Close {
        digest,
        audit,
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
    use proptest::prelude::*;
    use umbra_units::PAGE_SIZE;

    fn sample(compress: bool) -> Vec<u8> {
        let mut writer = BatchWriter::new(BatchId(3), Epoch(1), 9);
        writer.same();
        writer.page(PageId::ram(Pfn(5)), PageHash::zero(), Encoding::Zero, |_| {});
        writer.page(PageId::ram(Pfn(6)), PageHash(77), Encoding::Raw, |out| {
            out.put(&[1; PAGE_SIZE]);
        });
        let records = vec![StateRecord {
            kind: "vcpu/0".to_owned(),
            version: 1,
            bytes: vec![1, 2, 3],
        }];
        writer.close(Close {
            digest: Digest(8),
            audit: true,
            records,
        });
        assert_eq!(
            writer.counts(),
            PageCounts {
                same: 1,
                zero: 1,
                delta: 0,
                raw: 1
            }
        );
        writer.finish(compress)
    }

    #[test]
    fn a_batch_is_read_as_it_was_written_compressed_or_not() {
        for compress in [false, true] {
            let bytes = sample(compress);
            assert_eq!(bytes.len() < 1_000, compress);
            let batch = Batch::parse(&bytes).unwrap();
            assert_eq!((batch.id, batch.epoch, batch.owed), (BatchId(3), Epoch(1), 9));
            let pages: Vec<_> = batch
                .pages()
                .map(|(page, how, hash, bytes)| (page.pfn.0, how, hash, bytes.len()))
                .collect();
            let raw = (6, Encoding::Raw, PageHash(77), PAGE_SIZE);
            assert_eq!(pages, [(5, Encoding::Zero, PageHash::zero(), 0), raw]);
            assert_eq!(batch.close.unwrap().records[0].kind, "vcpu/0");
        }
    }

    #[test]
    fn golden_bytes_of_an_empty_closing_batch() {
        let mut writer = BatchWriter::new(BatchId(2), Epoch(1), 0);
        let records = vec![StateRecord {
            kind: "a".to_owned(),
            version: 4,
            bytes: vec![5],
        }];
        writer.close(Close {
            digest: Digest(0x0102),
            audit: false,
            records,
        });
        let hex: String = writer.finish(false).iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = [
            "b102",
            "0200000000000000",
            "0100000000000000",
            "0000000000000000",
            "00000000",
            "23000000",
            "02010000000000000000000000000000",
            "00",
            "01000000",
            "0100000061",
            "04000000",
            "0100000005",
        ];
        assert_eq!(hex, expected.concat());
    }

    #[test]
    fn a_truncated_batch_is_malformed_at_every_length() {
        for compress in [false, true] {
            let bytes = sample(compress);
            for len in 0..bytes.len() {
                assert!(Batch::parse(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_parsing_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300), flags in 0u8..4) {
            if let [magic, f, ..] = bytes.as_mut_slice() {
                (*magic, *f) = (MAGIC, flags);
            }
            let _ = Batch::parse(&bytes);
        }

        #[test]
        fn a_flipped_bit_is_never_a_panic(at in 0usize..4_000, bit in 0u32..8) {
            let mut bytes = sample(false);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = Batch::parse(&bytes);
        }
    }
}
