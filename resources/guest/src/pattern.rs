//! Which page is written next: chance, from a seed.
//!
//! One idea needs explaining. [`Zipf`] must be exact, cheap, without tables as large as the working set, and
//! without a maths library. It therefore draws by rejection under a staircase: ranks are grouped in octaves
//! `[2^k, 2^(k+1))`, an octave is drawn as if all its ranks were as likely as its first, a rank is drawn
//! uniformly from it, and kept with the ratio of its true weight to that of the first. For exponent 1 about
//! seven draws of ten are kept.

/// A small, fast generator (xorshift64*), never zero.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A stream for this seed; any seed will do.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed) | 1)
    }

    /// The next 64 bits.
    #[inline]
    pub fn next_word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in `0..n`. The bias of the multiplication is below n / 2^64.
    #[inline]
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_word()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in `0.0..1.0`.
    fn unit(&mut self) -> f64 {
        (self.next_word() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Scrambles 64 bits, one to one (the finalizer of SplitMix64).
#[inline(always)]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A fixed permutation of `0..n`: ranks to pages, so that hot pages do not lie together.
///
/// A four-round Feistel network over the next even power of two, walked until it lands inside.
#[derive(Clone, Debug)]
pub struct Shuffle {
    n: u64,
    half_bits: u32,
    seed: u64,
}

impl Shuffle {
    /// A permutation of `0..n`.
    pub fn new(n: u64, seed: u64) -> Self {
        assert!(n > 0, "nothing to shuffle");
        let bits = 64 - (n - 1).leading_zeros();
        Self {
            n,
            half_bits: bits.div_ceil(2).max(1),
            seed,
        }
    }

    /// Where `rank` went.
    pub fn place(&self, rank: u64) -> u64 {
        let mut x = rank;
        loop {
            x = self.scramble(x);
            if x < self.n {
                return x;
            }
        }
    }

    fn scramble(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..4 {
            let keyed = mix(right ^ self.seed.wrapping_add(round << 56));
            (left, right) = (right, left ^ (keyed & mask));
        }
        (left << self.half_bits) | right
    }
}

const OCTAVES: usize = 40;

/// Ranks `0..n`, rank r drawn in proportion to `(r + 1)^-s`. How: see the module docs.
#[derive(Clone, Debug)]
pub struct Zipf {
    n: u64,
    exponent: f64,
    /// Running sums of the staircase; entry k belongs to ranks `2^k .. 2^(k+1)`, counted from 1.
    stairs: [f64; OCTAVES],
    octaves: usize,
}

impl Zipf {
    /// For `n` ranks and an exponent in thousandths.
    pub fn new(n: u64, exponent_milli: u32) -> Self {
        assert!(n > 0 && n < 1 << OCTAVES, "ranks out of range");
        let exponent = f64::from(exponent_milli) / 1000.0;
        let octaves = n.ilog2() as usize + 1;
        let mut stairs = [0.0; OCTAVES];
        let mut sum = 0.0;
        for (k, stair) in stairs.iter_mut().enumerate().take(octaves) {
            let first = 1u64 << k;
            let ranks = first.min(n + 1 - first);
            sum += ranks as f64 * exp2(-exponent * k as f64);
            *stair = sum;
        }
        Self {
            n,
            exponent,
            stairs,
            octaves,
        }
    }

    /// Draws a rank.
    pub fn draw(&self, rng: &mut Rng) -> u64 {
        loop {
            let at = rng.unit() * self.stairs[self.octaves - 1];
            let k = self.stairs[..self.octaves]
                .iter()
                .position(|&sum| at < sum)
                .unwrap_or(self.octaves - 1);
            let first = 1u64 << k;
            let rank = first + rng.below(first.min(self.n + 1 - first));
            let keep = exp2(self.exponent * (k as f64 - log2(rank as f64)));
            if rng.unit() < keep {
                return rank - 1;
            }
        }
    }
}

/// log2 of a normal number >= 1, good to about 1e-7.
fn log2(x: f64) -> f64 {
    let bits = x.to_bits();
    let exponent = ((bits >> 52) as i64 - 1023) as f64;
    let mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    // ln m = 2 atanh t, with t in 0 ..= 1/3
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let t2 = t * t;
    let series = 1.0 + t2 * (1.0 / 3.0 + t2 * (1.0 / 5.0 + t2 * (1.0 / 7.0 + t2 * (1.0 / 9.0 + t2 * (1.0 / 11.0)))));
    exponent + 2.0 * t * series * core::f64::consts::LOG2_E
}

/// 2^x for x in -1000 ..= 1000, good to about 1e-7.
fn exp2(x: f64) -> f64 {
    let whole = x as i64 - i64::from(x < 0.0);
    let f = (x - whole as f64) * core::f64::consts::LN_2;
    let series = 1.0
        + f * (1.0 + f / 2.0 * (1.0 + f / 3.0 * (1.0 + f / 4.0 * (1.0 + f / 5.0 * (1.0 + f / 6.0 * (1.0 + f / 7.0))))));
    series * f64::from_bits(((whole + 1023) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_logarithm_agrees_with_the_real_one() {
        for i in 1..100_000u64 {
            let x = i as f64 * 1.37 + 0.0;
            if x >= 1.0 {
                assert!((log2(x) - x.log2()).abs() < 1e-6, "log2({x})");
            }
            let y = -(i as f64) / 2000.0;
            assert!((exp2(y) / y.exp2() - 1.0).abs() < 1e-5, "exp2({y})");
        }
    }

    #[test]
    fn a_shuffle_reaches_every_page_once() {
        for n in [1, 2, 3, 5, 64, 1000, 4097] {
            let shuffle = Shuffle::new(n, 7);
            let mut seen = vec![false; n as usize];
            for rank in 0..n {
                let page = shuffle.place(rank) as usize;
                assert!(!std::mem::replace(&mut seen[page], true), "page {page} of {n} twice");
            }
        }
    }

    #[test]
    fn ranks_are_drawn_in_proportion() {
        for (n, milli) in [
            (1u64, 1000),
            (2, 1000),
            (100, 1000),
            (100, 0),
            (1000, 700),
            (1000, 2000),
        ] {
            let zipf = Zipf::new(n, milli);
            let weight = |r: u64| ((r + 1) as f64).powf(-f64::from(milli) / 1000.0);
            let total: f64 = (0..n).map(weight).sum();
            let draws = 400_000;
            let mut rng = Rng::new(n);
            let mut hits = vec![0u32; n as usize];
            for _ in 0..draws {
                hits[zipf.draw(&mut rng) as usize] += 1;
            }
            for r in [0, 1, n / 10, n / 2, n - 1].into_iter().filter(|&r| r < n) {
                let expected = f64::from(draws) * weight(r) / total;
                let error = (f64::from(hits[r as usize]) - expected).abs();
                assert!(
                    error < 6.0 * expected.sqrt() + 1.0,
                    "n {n} s {milli} rank {r}: {} vs {expected}",
                    hits[r as usize]
                );
            }
        }
    }
}
