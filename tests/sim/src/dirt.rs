//! What a guest wrote, harvest by harvest: recorded from a real one, or made up; and its file.
//!
//! ```text
//!  "UMBRADRT"  version u8  pages u32  { since u32 µs  count u32  gaps: count × (LEB128) }*
//! ```
//!
//! Gaps lead from one page written to the next: the first counts from page 0, every other from the page behind its
//! predecessor. Numbers are little-endian. A file says how long each piece is before it comes, and nobody believes it beyond
//! [`PAGES`] and [`HARVESTS`].

use std::time::Duration;

use umbra_core::guest::Harvest;
use umbra_units::{Malformed, PageCount, PageSet, Pfn, Reader, Rng, SpaceId, Writer};

const MAGIC: &[u8; 8] = b"UMBRADRT";
const VERSION: u8 = 1;
/// Most pages of a guest in a trace: 64 GiB.
pub const PAGES: u32 = 1 << 24;
/// Most harvests of a trace: an hour and a half at the closest pace.
pub const HARVESTS: usize = 1 << 20;

/// A guest's writes over some time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Pages the guest has, all in one space.
    pub pages: u32,
    /// Its harvests.
    pub harvests: Vec<Dirt>,
}

/// One harvest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirt {
    /// Since the harvest before.
    pub since: Duration,
    /// Pages found written, ascending.
    pub pages: Vec<u32>,
}

impl Dirt {
    /// As a guest would tell it.
    pub fn harvest(&self, pages: u32) -> Harvest {
        let mut set = PageSet::new(PageCount(u64::from(pages)));
        for pfn in self.pages.iter().filter(|pfn| **pfn < pages) {
            set.insert(Pfn(u64::from(*pfn)));
        }
        Harvest {
            dirty: vec![(SpaceId::RAM, set)],
        }
    }
}

impl Trace {
    /// How long it is.
    pub fn span(&self) -> Duration {
        self.harvests.iter().map(|dirt| dirt.since).sum()
    }

    /// As a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.put(MAGIC);
        out.put(&[VERSION]);
        out.put(&self.pages.to_le_bytes());
        for dirt in &self.harvests {
            let since = u32::try_from(dirt.since.as_micros()).unwrap_or(u32::MAX);
            let count = u32::try_from(dirt.pages.len()).unwrap_or(u32::MAX);
            out.put(&since.to_le_bytes());
            out.put(&count.to_le_bytes());
            let mut next = 0;
            for pfn in &dirt.pages {
                put_gap(&mut out, pfn - next);
                next = pfn + 1;
            }
        }
        out.as_slice().to_vec()
    }

    /// What a file says, if it can be believed.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if &reader.array::<8>("no trace of a guest's writes")? != MAGIC {
            return Err(reader.malformed("no trace of a guest's writes"));
        }
        if reader.u8("version")? != VERSION {
            return Err(reader.malformed("a version of traces that is not known here"));
        }
        let pages = reader.u32("pages")?;
        if !(1..=PAGES).contains(&pages) {
            return Err(reader.malformed("more pages than a trace may have, or none"));
        }
        let mut harvests = Vec::new();
        while reader.remaining() > 0 {
            if harvests.len() == HARVESTS {
                return Err(reader.malformed("more harvests than a trace may have"));
            }
            let since = Duration::from_micros(u64::from(reader.u32("time of a harvest")?));
            let count = reader.len_within(usize::try_from(pages).unwrap_or(usize::MAX), "pages of a harvest")?;
            // Every gap takes a byte at least: what is not there is not allocated for.
            let mut written = Vec::with_capacity(count.min(reader.remaining()));
            let mut next = 0_u32;
            for _ in 0..count {
                let pfn = next.checked_add(take_gap(&mut reader)?).filter(|pfn| *pfn < pages);
                let pfn = pfn.ok_or_else(|| reader.malformed("a page beyond the guest's last"))?;
                written.push(pfn);
                next = pfn + 1;
            }
            harvests.push(Dirt { since, pages: written });
        }
        Ok(Self { pages, harvests })
    }

    /// A guest of `pages`, half of them idle and the others written by Zipf's law with this skew, scattered over memory, so
    /// that in a second `unique` different pages are written.
    pub fn zipf(pages: u32, skew: f64, unique: f64, span: Duration, every: Duration, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut places: Vec<u32> = (0..pages).collect();
        for last in (1..places.len()).rev() {
            let other = rng.below(last as u64 + 1);
            places.swap(last, usize::try_from(other).expect("an index"));
        }
        places.truncate(places.len() / 2);
        let shares: Vec<f64> = (1..=places.len())
            .map(|rank| f64::from(u32::try_from(rank).expect("a page")).powf(-skew))
            .collect();
        let within =
            |total: f64, span: f64| -> f64 { shares.iter().map(|share| -(-total * share * span).exp_m1()).sum() };
        let mut total = 1.0;
        while within(total, 1.0) < unique && total < 1e12 {
            total *= 1.01;
        }
        let seconds = every.as_secs_f64();
        let chances: Vec<f64> = shares
            .iter()
            .map(|share| -(-total * share * seconds).exp_m1())
            .collect();
        let steps = span.as_micros() / every.as_micros().max(1);
        let harvests = (0..steps).map(|_| {
            let drawn = places.iter().zip(&chances).filter(|(_, chance)| rng.chance(**chance));
            let mut pages: Vec<u32> = drawn.map(|(pfn, _)| *pfn).collect();
            pages.sort_unstable();
            Dirt { since: every, pages }
        });
        Self {
            pages,
            harvests: harvests.collect(),
        }
    }
}

fn put_gap(out: &mut Writer, mut gap: u32) {
    while gap >= 0x80 {
        out.put(&[gap.to_le_bytes()[0] | 0x80]);
        gap >>= 7;
    }
    out.put(&[gap.to_le_bytes()[0]]);
}

fn take_gap(reader: &mut Reader<'_>) -> Result<u32, Malformed> {
    let mut gap = 0_u32;
    for shift in [0, 7, 14, 21, 28] {
        let byte = reader.u8("a gap")?;
        let bits = u32::from(byte & 0x7f);
        if shift == 28 && bits > 0xf {
            break;
        }
        gap |= bits << shift;
        if byte < 0x80 {
            return Ok(gap);
        }
    }
    Err(reader.malformed("a gap of more than 32 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        let dirt = |ms, pages: &[u32]| Dirt {
            since: Duration::from_millis(ms),
            pages: pages.to_vec(),
        };
        Trace {
            pages: 100_000,
            harvests: vec![dirt(20, &[0, 1, 127, 128, 99_999]), dirt(5, &[]), dirt(7, &[70_000])],
        }
    }

    #[test]
    fn a_trace_is_read_as_it_was_written() {
        let bytes = trace().encode();
        assert_eq!(Trace::decode(&bytes).unwrap(), trace());
        assert!(bytes.len() < 13 + 3 * 8 + 12, "it is small");
    }

    #[test]
    fn what_is_cut_short_or_claims_too_much_is_refused() {
        let bytes = trace().encode();
        for end in 0..bytes.len() {
            if let Ok(short) = Trace::decode(&bytes[..end]) {
                assert!(short.harvests.len() < 3, "{end}");
            }
        }
        let mut huge = bytes[..13].to_vec();
        huge[9..13].fill(0xff);
        assert!(Trace::decode(&huge).is_err());
        let mut claims = bytes[..21].to_vec();
        claims[17..21].copy_from_slice(&100_000_u32.to_le_bytes());
        assert!(Trace::decode(&claims).is_err());
        let mut other = bytes.clone();
        other[8] = 9;
        assert!(Trace::decode(&other).unwrap_err().to_string().contains("version"));
        let mut rng = Rng::new(5);
        for _ in 0..2_000 {
            let mut bent = bytes.clone();
            let at = usize::try_from(rng.below(bent.len() as u64)).unwrap();
            bent[at] ^= 1 << rng.below(8);
            let _ = Trace::decode(&bent);
        }
    }
}
