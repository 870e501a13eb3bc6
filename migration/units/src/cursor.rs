//! How bytes become numbers and back: little-endian, bounds checked, nothing else.
//!
//! Every decoder of the wire, of saved state and of virtio headers reads through [`Reader`], so that a truncated or
//! hostile input can only ever be [`Malformed`]. A length read from a peer is compared with a named bound *before*
//! anything is allocated for it: [`Reader::len_within`] is the only way to read one.

use core::fmt;

/// The bytes are not what they claim to be. Carries the place, because "malformed" alone helps nobody at three in the morning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed {
    /// What was being read.
    pub what: &'static str,
    /// Byte offset at which it went wrong.
    pub at: usize,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed {} at byte {}", self.what, self.at)
    }
}

impl core::error::Error for Malformed {}

/// Reads numbers and slices from the front of a byte string.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Start at the front of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes are left.
    pub const fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Bytes consumed so far.
    pub const fn position(&self) -> usize {
        self.at
    }

    /// An error about `what`, here. For checks the caller makes itself.
    pub const fn malformed(&self, what: &'static str) -> Malformed {
        Malformed { what, at: self.at }
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let end = self
            .at
            .checked_add(n)
            .filter(|end| *end <= self.bytes.len())
            .ok_or_else(|| self.malformed(what))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// The next `N` bytes, by value.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    /// One byte.
    pub fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        self.array::<1>(what).map(|[byte]| byte)
    }

    /// Two bytes.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        self.array(what).map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Sixteen bytes.
    pub fn u128(&mut self, what: &'static str) -> Result<u128, Malformed> {
        self.array(what).map(u128::from_le_bytes)
    }

    /// A `u32` length, refused when it exceeds `limit` (a constant of some `limits.rs`) before anyone allocates for it.
    pub fn len_within(&mut self, limit: usize, what: &'static str) -> Result<usize, Malformed> {
        let at = self.at;
        let len = usize::try_from(self.u32(what)?).unwrap_or(usize::MAX);
        if len > limit {
            Err(Malformed { what, at })
        } else {
            Ok(len)
        }
    }

    /// A length-prefixed byte string of at most `limit` bytes.
    pub fn bytes_within(&mut self, limit: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let len = self.len_within(limit, what)?;
        self.take(len, what)
    }

    /// A length-prefixed UTF-8 string of at most `limit` bytes.
    pub fn text_within(&mut self, limit: usize, what: &'static str) -> Result<&'a str, Malformed> {
        let at = self.at;
        core::str::from_utf8(self.bytes_within(limit, what)?).map_err(|_| Malformed { what, at })
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.at..];
        self.at = self.bytes.len();
        rest
    }

    /// Succeeds only when everything was consumed: trailing bytes are somebody's misunderstanding.
    pub fn finish(self, what: &'static str) -> Result<(), Malformed> {
        if self.remaining() == 0 {
            Ok(())
        } else {
            Err(self.malformed(what))
        }
    }
}

/// Appends numbers and slices to a byte string.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Start with nothing.
    pub const fn new() -> Self {
        Self { bytes: Vec::new() }
    }

    /// Start with nothing, and room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(capacity),
        }
    }

    /// How many bytes were written.
    pub const fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Append `bytes` as they are.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.put(&[value])
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// Sixteen bytes.
    pub fn u128(&mut self, value: u128) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// A length-prefixed byte string, as [`Reader::bytes_within`] reads it.
    ///
    /// # Panics
    /// When `bytes` is longer than a `u32` can say: the caller's own limits are far below.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(u32::try_from(bytes.len()).expect("limits.rs keeps every length far below 4 GiB"))
            .put(bytes)
    }

    /// A length-prefixed string, cut at a character boundary to at most `limit` bytes: a peer's bound on an error text
    /// must not turn the error into another one.
    pub fn text(&mut self, text: &str, limit: usize) -> &mut Self {
        let mut end = text.len().min(limit);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&text.as_bytes()[..end])
    }

    /// Write four bytes over those at `at`, for a length known only afterwards.
    ///
    /// # Panics
    /// When `at` is not four written bytes: a caller's bug.
    pub fn patch_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// What was written.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    /// What was written, by value.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut w = Writer::new();
        w.u8(1).u16(2).u32(3).u64(4).u128(5).bytes(b"six").text("sev\u{e9}n", 5);
        let mut r = Reader::new(w.as_slice());
        assert_eq!(r.u8("a"), Ok(1));
        assert_eq!(r.u16("b"), Ok(2));
        assert_eq!(r.u32("c"), Ok(3));
        assert_eq!(r.u64("d"), Ok(4));
        assert_eq!(r.u128("e"), Ok(5));
        assert_eq!(r.bytes_within(3, "f"), Ok(&b"six"[..]));
        assert_eq!(r.text_within(10, "g"), Ok("sev\u{e9}"));
        r.finish("end").unwrap();
    }

    #[test]
    fn a_length_beyond_its_limit_is_refused_before_it_is_believed() {
        let mut w = Writer::new();
        w.u32(u32::MAX);
        assert_eq!(
            Reader::new(w.as_slice()).bytes_within(16, "name"),
            Err(Malformed { what: "name", at: 0 })
        );
    }

    #[test]
    fn a_truncated_or_overlong_input_is_malformed_where_it_ends() {
        let mut r = Reader::new(&[1, 2, 3]);
        assert_eq!(r.u16("x"), Ok(0x201));
        assert_eq!(r.u32("y"), Err(Malformed { what: "y", at: 2 }));
        assert_eq!(r.finish("z"), Err(Malformed { what: "z", at: 2 }));
    }
}
