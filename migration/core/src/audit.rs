//! Hashing a paused guest's memory itself, page by page.

use umbra_units::{PAGE_SIZE, PageCount, PageId, Pfn};

use crate::digest::PageHash;
use crate::error::Fault;
use crate::guest::{Guest, PageBytes};

/// Pages read at once: 1 MiB stays in the cache while it is hashed.
const AT_ONCE: u64 = 256;

/// The present pages of `guest` whose content does not hash to what `expected` says.
pub(crate) fn differing(
    guest: &dyn Guest,
    expected: impl Fn(PageId) -> Option<PageHash>,
) -> Result<Vec<PageId>, Fault> {
    let mut differ = Vec::new();
    let mut contents = Vec::new();
    for space in guest.spaces() {
        for (first, count) in &space.present {
            for start in (0..count.0).step_by(usize::try_from(AT_ONCE).expect("small")) {
                let run: Vec<Pfn> = (start..count.0.min(start + AT_ONCE))
                    .map(|n| *first + PageCount(n))
                    .collect();
                contents.clear();
                guest.read_pages(space.id, &run, &mut contents)?;
                for (pfn, bytes) in run.iter().zip(contents.chunks_exact(PAGE_SIZE)) {
                    let page = PageId {
                        space: space.id,
                        pfn: *pfn,
                    };
                    let bytes: &PageBytes = bytes.try_into().expect("whole pages");
                    if expected(page) != Some(PageHash::of(bytes)) {
                        differ.push(page);
                    }
                }
            }
        }
    }
    Ok(differ)
}
