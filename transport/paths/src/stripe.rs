//! An urgent block cut into shards, and the parity that makes any `k` of `k + m` enough.
//!
//! A block is a row of data shards of `shard_bytes` (the last may be shorter); `k` of them in a row make a stripe, each
//! with `m` parity shards. The last stripe may have fewer data shards.
//!
//! # One code for every shape
//!
//! Reed-Solomon codes of different `(k, m)` would each need a matrix of their own, and building one for `k = 128` takes
//! milliseconds (an inversion), inside a pause. But a code may be *shortened*: data shards that are zero at both ends
//! need not travel, and parity rows that nobody computes do not matter. So there is one matrix, that of
//! `ReedSolomon(128, 128)`, built once per process; every `k ≤ 128` and `m ≤ 128` uses its first `k` columns and first
//! `m` rows. Any square part of it is invertible, because any `k` rows of the code are. The library gives the matrix and
//! the SIMD kernel; decoding solves only for the shards that are missing, so that a new pattern of losses costs
//! `e³` byte operations for `e` missing shards and not `k³`.

use std::sync::OnceLock;

use bytes::Bytes;
use reed_solomon_erasure::Field as _;
use reed_solomon_erasure::galois_8::{Field, ReedSolomon, div, mul};
use umbra_units::{Malformed, Reader, Writer};

use crate::limits;

/// How a block is cut. Fixed when the block is first sent, since shards of two cuts do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    block_bytes: u32,
    shard_bytes: u16,
    /// Data shards of a full stripe, `1..=STRIPE_DATA`.
    k: u8,
    /// Parity shards of every stripe, `0..=STRIPE_SHARDS − STRIPE_DATA`.
    m: u8,
}

impl Layout {
    /// Bytes of a layout on the wire.
    pub(crate) const BYTES: usize = 8;

    /// A cut; `None` if it is outside the limits.
    pub(crate) fn new(block_bytes: usize, shard_bytes: usize, k: usize, m: usize) -> Option<Self> {
        let ok = (1..=limits::BLOCK_BYTES).contains(&block_bytes)
            && (limits::SHARD_BYTES_MIN..=limits::SHARD_BYTES_MAX).contains(&shard_bytes)
            && (1..=limits::STRIPE_DATA).contains(&k)
            && m <= limits::STRIPE_SHARDS - limits::STRIPE_DATA
            && block_bytes.div_ceil(shard_bytes).div_ceil(k) <= usize::from(u16::MAX);
        ok.then(|| Self {
            block_bytes: u32::try_from(block_bytes).expect("checked against BLOCK_BYTES"),
            shard_bytes: u16::try_from(shard_bytes).expect("checked against SHARD_BYTES_MAX"),
            k: u8::try_from(k).expect("checked against STRIPE_DATA"),
            m: u8::try_from(m).expect("checked against STRIPE_SHARDS"),
        })
    }

    pub(crate) fn write(self, w: &mut Writer) {
        w.u32(self.block_bytes).u16(self.shard_bytes).u8(self.k).u8(self.m);
    }

    pub(crate) fn read(r: &mut Reader<'_>) -> Result<Self, Malformed> {
        let block_bytes = usize::try_from(r.u32("layout block length")?).unwrap_or(usize::MAX);
        let shard_bytes = usize::from(r.u16("layout shard length")?);
        let (k, m) = (
            usize::from(r.u8("layout data shards")?),
            usize::from(r.u8("layout parity shards")?),
        );
        Self::new(block_bytes, shard_bytes, k, m).ok_or_else(|| r.malformed("layout"))
    }

    pub(crate) const fn block_bytes(self) -> usize {
        self.block_bytes as usize
    }

    pub(crate) const fn shard_len(self) -> usize {
        self.shard_bytes as usize
    }

    pub(crate) const fn m(self) -> usize {
        self.m as usize
    }

    /// Data shards of the whole block.
    pub(crate) const fn data_shards(self) -> usize {
        self.block_bytes().div_ceil(self.shard_len())
    }

    pub(crate) const fn stripes(self) -> usize {
        self.data_shards().div_ceil(self.k as usize)
    }

    /// Data shards of `stripe`; the stripe must exist.
    pub(crate) fn data_of(self, stripe: usize) -> usize {
        (self.data_shards() - self.first_of(stripe)).min(usize::from(self.k))
    }

    /// The block's number of the first data shard of `stripe`.
    pub(crate) fn first_of(self, stripe: usize) -> usize {
        stripe * usize::from(self.k)
    }

    /// Stripe and place in it of data shard `shard` of the block.
    pub(crate) fn place_of(self, shard: usize) -> (usize, usize) {
        (shard / usize::from(self.k), shard % usize::from(self.k))
    }

    /// Where data shard `shard` lies in the block.
    pub(crate) fn range_of(self, shard: usize) -> core::ops::Range<usize> {
        let start = shard * self.shard_len();
        start..(start + self.shard_len()).min(self.block_bytes())
    }

    /// Where a run of data shards lies in the block; `None` if it is empty or leaves the block.
    pub(crate) fn run_range(self, (first, count): (u32, u32)) -> Option<core::ops::Range<usize>> {
        let first = usize::try_from(first).ok()?;
        let end = first.checked_add(usize::try_from(count).ok()?)?;
        (first < end && end <= self.data_shards()).then(|| self.range_of(first).start..self.range_of(end - 1).end)
    }

    /// How long the shard `index` of `stripe` is on the wire; `None` if there is no such shard.
    pub(crate) fn shard_bytes(self, stripe: u16, index: u8) -> Option<usize> {
        let (stripe, index) = (usize::from(stripe), usize::from(index));
        if stripe >= self.stripes() {
            return None;
        }
        let k = self.data_of(stripe);
        if index < k {
            Some(self.range_of(self.first_of(stripe) + index).len())
        } else {
            (index < k + self.m()).then(|| self.shard_len())
        }
    }
}

/// Coefficients of the one code: `rows[j][i]` is what data shard `i` contributes to parity shard `j`.
struct Code {
    rows: Vec<[u8; limits::STRIPE_DATA]>,
}

fn code() -> &'static Code {
    static CODE: OnceLock<Code> = OnceLock::new();
    CODE.get_or_init(|| {
        const K: usize = limits::STRIPE_DATA;
        const M: usize = limits::STRIPE_SHARDS - limits::STRIPE_DATA;
        let library = ReedSolomon::new(K, M).expect("128 + 128 shards are what GF(2^8) has room for");
        // Encoding the unit vectors, one per byte column, spells out the matrix.
        let mut units = vec![[0; K]; K];
        units.iter_mut().enumerate().for_each(|(i, unit)| unit[i] = 1);
        let mut rows = vec![[0; K]; M];
        library
            .encode_sep(&units, &mut rows)
            .expect("all shards are K bytes long");
        Code { rows }
    })
}

/// Build the code now rather than when somebody waits for it.
pub(crate) fn warm_up() {
    code();
}

/// The parity shards of one stripe of `block`.
pub(crate) fn parity(layout: Layout, block: &[u8], stripe: usize) -> Vec<Bytes> {
    let len = layout.shard_len();
    let mut out = vec![0; len * layout.m()];
    let first = layout.first_of(stripe);
    for i in 0..layout.data_of(stripe) {
        let data = &block[layout.range_of(first + i)];
        for (row, shard) in code().rows.iter().zip(out.chunks_exact_mut(len)) {
            // A short last shard is followed by zeros, which contribute nothing.
            Field::mul_slice_add(row[i], data, &mut shard[..data.len()]);
        }
    }
    let out = Bytes::from(out);
    (0..layout.m()).map(|j| out.slice(j * len..(j + 1) * len)).collect()
}

/// Put the missing data shards of one stripe into `data`.
///
/// `data` holds the stripe's data shards one after the other, each of full length (the last padded with zeros);
/// `missing` says which of them are not there, in growing order; `parity` holds as many parity shards with their rows.
///
/// # Panics
/// When there are not exactly as many parity shards as missing data shards: the caller counts.
pub(crate) fn restore(data: &mut [u8], shard_len: usize, missing: &[usize], mut parity: Vec<(usize, Vec<u8>)>) {
    assert_eq!(missing.len(), parity.len(), "one parity shard per missing data shard");
    // Take out of the parity what is known, so that it speaks of the missing shards only.
    for (i, shard) in data.chunks_exact(shard_len).enumerate() {
        if missing.binary_search(&i).is_err() {
            for (row, syndrome) in &mut parity {
                Field::mul_slice_add(code().rows[*row][i], shard, syndrome);
            }
        }
    }
    let matrix = parity
        .iter()
        .map(|(row, _)| missing.iter().map(|i| code().rows[*row][*i]).collect())
        .collect();
    let inverse = invert(matrix);
    for (place, coefficients) in missing.iter().zip(inverse) {
        let out = &mut data[place * shard_len..(place + 1) * shard_len];
        out.fill(0);
        for (coefficient, (_, syndrome)) in coefficients.into_iter().zip(&parity) {
            Field::mul_slice_add(coefficient, syndrome, out);
        }
    }
}

/// Gauss-Jordan over GF(2⁸). Every matrix handed in is a square part of the code's parity rows, so none is singular.
fn invert(mut a: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let n = a.len();
    let mut b: Vec<Vec<u8>> = (0..n).map(|i| (0..n).map(|j| u8::from(i == j)).collect()).collect();
    for col in 0..n {
        let pivot = (col..n)
            .find(|row| a[*row][col] != 0)
            .expect("any square part of an MDS code's parity is invertible");
        a.swap(col, pivot);
        b.swap(col, pivot);
        let scale = div(1, a[col][col]);
        a[col].iter_mut().chain(&mut b[col]).for_each(|x| *x = mul(*x, scale));
        let (pivot_a, pivot_b) = (a[col].clone(), b[col].clone());
        for row in (0..n).filter(|row| *row != col) {
            let factor = a[row][col];
            if factor != 0 {
                Field::mul_slice_add(factor, &pivot_a, &mut a[row]);
                Field::mul_slice_add(factor, &pivot_b, &mut b[row]);
            }
        }
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_units::Rng;

    fn block(len: usize, seed: u64) -> Vec<u8> {
        let mut out = vec![0; len];
        Rng::new(seed).fill(&mut out);
        out
    }

    /// Lose the shards in `lost` (a bit each, data first) of a one-stripe block and restore the data.
    fn survives(k: usize, m: usize, lost: u64) -> bool {
        let len = 256;
        let layout = Layout::new(k * len - 7, len, k, m).unwrap();
        let whole = block(k * len - 7, 3);
        let rows = parity(layout, &whole, 0);
        let mut data = whole.clone();
        data.resize(k * len, 0);
        let padded = data.clone();
        let missing: Vec<usize> = (0..k).filter(|i| lost >> i & 1 == 1).collect();
        missing.iter().for_each(|i| data[i * len..(i + 1) * len].fill(0xaa));
        let left = (0..m).filter(|j| lost >> (k + j) & 1 == 0).take(missing.len());
        let left: Vec<_> = left.map(|j| (j, rows[j].to_vec())).collect();
        restore(&mut data, len, &missing, left);
        data == padded
    }

    #[test]
    fn every_pattern_of_losses_within_the_parity_is_repaired() {
        for (k, m) in [(1, 1), (2, 3), (4, 2), (5, 4), (8, 3)] {
            for lost in 0..1u64 << (k + m) {
                if lost.count_ones() as usize <= m {
                    assert!(survives(k, m, lost), "k {k} m {m} lost {lost:b}");
                }
            }
        }
    }

    #[test]
    fn a_full_stripe_loses_as_many_as_it_has_parity() {
        let len = 256;
        let layout = Layout::new(128 * len, len, 128, 128).unwrap();
        let whole = block(128 * len, 9);
        let rows = parity(layout, &whole, 0);
        let missing: Vec<usize> = (0..128).collect();
        let mut data = vec![0; 128 * len];
        restore(
            &mut data,
            len,
            &missing,
            rows.iter().map(|row| row.to_vec()).enumerate().collect(),
        );
        assert_eq!(data, whole);
    }

    #[test]
    fn the_shortened_code_is_the_librarys_own_when_full() {
        let len = 256;
        let layout = Layout::new(128 * len, len, 128, 5).unwrap();
        let whole = block(128 * len, 1);
        let mut theirs = vec![vec![0; len]; 5];
        let data: Vec<&[u8]> = whole.chunks(len).collect();
        // A row of the library's code depends on how many data shards there are, not on how many parity shards.
        ReedSolomon::new(128, 5)
            .unwrap()
            .encode_sep(&data, &mut theirs)
            .unwrap();
        assert_eq!(parity(layout, &whole, 0), theirs);
    }

    #[test]
    fn a_layout_covers_the_block_exactly_once() {
        for (len, shard, k) in [
            (1, 256, 1),
            (256, 256, 3),
            (257, 256, 1),
            (5_000, 1_000, 4),
            (8 << 20, 1_200, 128),
        ] {
            let layout = Layout::new(len, shard, k, 1).unwrap();
            let mut at = 0;
            for stripe in 0..layout.stripes() {
                for i in 0..layout.data_of(stripe) {
                    let range = layout.range_of(layout.first_of(stripe) + i);
                    assert_eq!(layout.place_of(layout.first_of(stripe) + i), (stripe, i));
                    assert_eq!(range.start, at);
                    at = range.end;
                }
            }
            assert_eq!(at, len);
        }
    }

    #[test]
    fn a_layout_beyond_the_limits_is_refused() {
        assert!(Layout::new(0, 256, 1, 0).is_none());
        assert!(Layout::new(limits::BLOCK_BYTES + 1, 256, 1, 0).is_none());
        assert!(Layout::new(1, 255, 1, 0).is_none());
        assert!(Layout::new(1, 256, 0, 0).is_none());
        assert!(Layout::new(1, 256, 129, 0).is_none());
        assert!(Layout::new(1, 256, 1, 129).is_none());
    }
}
