//! Seeded chance.

/// A small deterministic generator (xoshiro256++, seeded by SplitMix64: Blackman and Vigna, "Scrambled linear
/// pseudorandom number generators", 2018). The same seed gives the same draws on every machine and in every release:
/// a simulation's seed is a bug report. Not for secrets.
#[derive(Debug, Clone)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The generator of this seed.
    pub const fn new(seed: u64) -> Self {
        let mut state = [0; 4];
        let mut x = seed;
        let mut i = 0;
        while i < 4 {
            x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = x;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            state[i] = z ^ (z >> 31);
            i += 1;
        }
        Self { state }
    }

    /// An independent generator, so that drawing more in one place does not change another.
    #[must_use]
    pub const fn fork(&mut self) -> Self {
        Self::new(self.next_u64())
    }

    /// 64 uniform bits.
    pub const fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform within `0..bound` (Lemire's multiply; its bias of at most `bound / 2⁶⁴` is below notice here).
    ///
    /// # Panics
    /// When `bound` is zero: there is nothing to draw from.
    pub const fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing to draw from");
        ((self.next_u64() as u128 * bound as u128) >> 64) as u64
    }

    /// Uniform within `0.0..1.0`.
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit a f64 exactly")]
    pub const fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with probability `p` (anything at or below zero: never; at or above one: always).
    pub const fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Fill `out` with uniform bytes.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_names_one_sequence_for_ever() {
        let mut rng = Rng::new(1);
        let draws: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
        assert_eq!(
            draws,
            [0xcfc5_d07f_6f03_c29b, 0xbf42_4132_963f_e08d, 0x19a3_7d57_57aa_f520]
        );
    }

    #[test]
    fn draws_stay_in_bounds_and_reach_them() {
        let mut rng = Rng::new(7);
        let mut seen = [false; 5];
        for _ in 0..1_000 {
            seen[usize::try_from(rng.below(5)).unwrap()] = true;
            assert!((0.0..1.0).contains(&rng.unit()));
        }
        assert_eq!(seen, [true; 5]);
        assert!(!rng.chance(0.0) && rng.chance(1.0));
    }
}
