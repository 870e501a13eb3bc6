//! The plugin boundary: what a virtual machine monitor must offer so that Umbra can shadow its guests.
//!
//! [`Guest`] is the whole contract. `vmm/machine` implements it over KVM; `vmm/node` drives *any* guest through it and
//! cannot reach `machine`; another VMM embeds Umbra by implementing this one trait.
//!
//! ```text
//!                 source                                     shadow
//!   describe ──────────────────────────────────▶ GuestBuilder::build   (a guest that has never run)
//!   track(true)
//!   harvest, read_pages … (running) ────────────▶ apply_pages …
//!   pause
//!   harvest, save, harvest, read_pages ─────────▶ apply_pages, restore
//!   give_up     ────────────── go ──────────────▶ resume
//! ```
//!
//! # Dirty pages across failed attempts
//!
//! No write may fall between two harvests (DESIGN §3.2). A harvest *consumes*: KVM's log and the device bitmap both
//! start afresh. So whoever harvests owns what it got, and either hands it to the ledger or gives it back with
//! [`Guest::put_back`], also when half of the harvest failed. An implementation that cannot tell which pages were
//! written (a log read failed after another was cleared) must report all of them at the next harvest.
//!
//! All methods take `&self` and may be called from several threads: pages are read while the guest runs and while the
//! next harvest is taken. They block; the node calls them from threads that may.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use umbra_units::{PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SpaceId};

/// One page's bytes.
pub type PageBytes = [u8; PAGE_SIZE];

/// A space of pages the guest has, and which of them exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Its number; RAM is [`SpaceId::RAM`].
    pub id: SpaceId,
    /// One past the highest page number, holes included.
    pub pages: PageCount,
    /// The runs of pages that exist, ascending and disjoint. RAM has a hole below 4 GiB for devices.
    pub present: Vec<(Pfn, PageCount)>,
}

impl Space {
    /// RAM without holes.
    pub fn ram(pages: PageCount) -> Self {
        Self {
            id: SpaceId::RAM,
            pages,
            present: vec![(Pfn(0), pages)],
        }
    }

    /// How many pages exist.
    pub fn present_pages(&self) -> PageCount {
        self.present.iter().map(|(_, count)| *count).sum()
    }

    /// The pages that exist, as a set.
    pub fn present_set(&self) -> PageSet {
        let mut set = PageSet::new(self.pages);
        for (first, count) in &self.present {
            for n in 0..count.0 {
                set.insert(*first + PageCount(n));
            }
        }
        set
    }
}

/// The pages of each space written since the previous harvest: KVM's log joined with the VMM's own writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Harvest {
    /// One set per space that has written pages; at most one per space.
    pub dirty: Vec<(SpaceId, PageSet)>,
}

impl Harvest {
    /// How many pages were written.
    pub fn count(&self) -> PageCount {
        self.dirty.iter().map(|(_, set)| set.count()).sum()
    }

    /// Put every page of `other` in.
    pub fn join(&mut self, other: &Self) {
        for (space, set) in &other.dirty {
            match self.dirty.iter_mut().find(|(mine, _)| mine == space) {
                Some((_, mine)) => mine.union_with(set),
                None => self.dirty.push((*space, set.clone())),
            }
        }
    }
}

/// A piece of saved state that only its owner understands: a vCPU's registers, a device's queues.
///
/// `kind` names the owner and instance (`vcpu/0`, `serial/0`). An unknown kind or version is a refusal, never a guess.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRecord {
    /// Whose state this is; at most [`limits::RECORD_KIND_BYTES`](crate::limits::RECORD_KIND_BYTES) long.
    pub kind: String,
    /// The layout of `bytes`, by its owner's own count.
    pub version: u32,
    /// The state; at most [`limits::RECORD_BYTES`](crate::limits::RECORD_BYTES) long.
    pub bytes: Vec<u8>,
}

/// Why a guest could not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// The host refused: a system call failed, memory ran out. The guest's own state is unharmed.
    #[error("{0}")]
    Host(String),
    /// The state or description is for a machine this one cannot be: an unknown kind, a CPU feature that is missing.
    #[error("{0}")]
    Incompatible(String),
    /// The state is not what its owner wrote.
    #[error("{0}")]
    Malformed(String),
    /// Asked at the wrong time, for example to save a running guest.
    #[error("{0}")]
    WrongState(&'static str),
}

/// Whoever pages can be copied from: a guest, or what was captured of one.
pub trait PageReader: Send + Sync {
    /// Copy `pages` of `space`, in order, to the end of `out`. Of a guest that runs a page may be torn, in which case
    /// it is also in the next harvest.
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError>;
}

/// How pages are kept as they are at a cut while the guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CaptureBy {
    /// Copied inside the pause, by one thread: best for few pages.
    Copy,
    /// Copied inside the pause, by several threads.
    ParallelCopy,
    /// Write-protected inside the pause and copied while the guest runs, before its first write to each: the pause
    /// does not grow with the pages, each first write costs a fault.
    Protect,
}

/// Pages as they were when they were captured, whatever the guest has written since. Only those that were captured can
/// be read. Dropping it lets go of whatever keeps them.
pub trait Captured: PageReader {
    /// How they are kept.
    fn by(&self) -> CaptureBy;
}

/// Pages of a guest that runs before they have come: what a lazy switchover left behind. Whoever touches one of them waits
/// for it, vCPUs and devices alike. Dropping it before all have come leaves those who wait waiting.
pub trait Arrivals: Send + Sync {
    /// Pages that somebody waits for and that were not answered before, at most `most`; waits for the first until
    /// `patience` is over.
    fn wanted(&self, most: PageCount, patience: Duration) -> Vec<PageId>;

    /// This page has come: put it in its place and let whoever waits go on. One that came before is left alone, because
    /// the guest may have written to it since.
    fn arrived(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError>;

    /// How many have not come.
    fn left(&self) -> PageCount;
}

/// A virtual machine as Umbra needs to see it. See the [module](self) for the order of calls.
pub trait Guest: PageReader {
    /// What [`GuestBuilder::build`] on another host needs to build this guest's twin.
    fn describe(&self) -> StateRecord;

    /// The guest's spaces. Never changes while the guest lives.
    fn spaces(&self) -> Vec<Space>;

    /// Start or stop recording writes. Starting twice is harmless. The first harvest after starting may report more
    /// pages than were written, never fewer.
    fn track(&self, on: bool) -> Result<(), GuestError>;

    /// Pages that certainly hold zeros because nothing has touched them since the guest was built. Asked once, after
    /// [`track`](Self::track) began to record: what is written later is in the harvests. Knowing none is always right.
    fn untouched(&self) -> Harvest {
        Harvest::default()
    }

    /// Take the pages written since the previous harvest. See the module on failure.
    fn harvest(&self) -> Result<Harvest, GuestError>;

    /// Report these pages again at the next harvest: nobody took care of them.
    fn put_back(&self, harvest: &Harvest);

    /// Copy one page of a guest that is not running, to use as a delta's base or to verify.
    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError>;

    /// Write pages of a guest that is not running. Different pages may be written from different threads at once.
    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError>;

    /// Stop every vCPU and quiesce every device; returns when nothing of the guest executes any more. Writes that were
    /// under way are complete, and appear in the next harvest.
    fn pause(&self) -> Result<(), GuestError>;

    /// Keep these pages of the paused guest as they are now, to be read after it runs on. `by` insists on a way of doing
    /// it; a guest that has only one, or is not asked, does what it predicts to be quickest.
    fn capture(&self, pages: &Harvest, by: Option<CaptureBy>) -> Result<Box<dyn Captured>, GuestError> {
        let _ = by;
        Ok(Box::new(Copied::of(self, pages)?))
    }

    /// Let a paused or restored guest run. A guest whose disks are locked by somebody else does not run: that is an error.
    fn resume(&self) -> Result<(), GuestError>;

    /// The state of everything but the spaces, of a paused guest. Saving may itself write to guest memory: harvest
    /// once more afterwards.
    fn save(&self) -> Result<Vec<StateRecord>, GuestError>;

    /// Take on saved state, on a guest that is not running. All or nothing: after an error the guest may be restored
    /// again, never run.
    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError>;

    /// These pages have not come, and the guest is going to run without them, once in its life: from now on whoever touches
    /// one waits until it has [arrived](Arrivals::arrived), be it [`restore`](Self::restore). What they hold now is
    /// dropped. An error leaves the guest as it was; one that cannot do this says so.
    fn await_pages(&self, missing: &Harvest) -> Result<Arc<dyn Arrivals>, GuestError> {
        let _ = missing;
        let text = "this guest cannot run before all of its pages have come";
        Err(GuestError::Incompatible(text.to_owned()))
    }

    /// The guest, which is paused, is about to be somebody else's: let go of what only one host may hold (locks of disk
    /// images), so that the shadow can take hold of it. Called before anybody is told that the guest was given up, and
    /// so must neither wait nor fail. Until the next [`resume`](Self::resume) nothing here touches what was let go of; that
    /// `resume`, if the guest ever comes back, takes hold again, and refuses if it cannot.
    fn give_up(&self) {}

    /// Keep what the guest sends to the outside (packets, console bytes) instead of releasing it.
    fn hold_output(&self);

    /// Release what was held, in order, and hold no longer.
    fn release_output(&self);
}

/// Builds the twin of a described guest: memory, vCPUs and devices in place, nothing running.
pub trait GuestBuilder: Send + Sync {
    /// Build it, or say by name what this host lacks.
    fn build(&self, description: &StateRecord) -> Result<Arc<dyn Guest>, GuestError>;
}

/// Pages captured by copying them: what [`Guest::capture`] does unless a guest knows better.
#[derive(Debug, Default)]
pub struct Copied {
    /// Per space, where each captured page is in `bytes`, in pages.
    places: BTreeMap<SpaceId, BTreeMap<Pfn, usize>>,
    bytes: Vec<u8>,
}

impl Copied {
    /// Copy these pages, which must not change meanwhile.
    pub fn of<P: PageReader + ?Sized>(reader: &P, pages: &Harvest) -> Result<Self, GuestError> {
        let mut copied = Self::default();
        for (space, set) in &pages.dirty {
            let pfns: Vec<Pfn> = set.iter().collect();
            let first = copied.bytes.len() / PAGE_SIZE;
            reader.read_pages(*space, &pfns, &mut copied.bytes)?;
            let places = copied.places.entry(*space).or_default();
            places.extend(pfns.into_iter().zip(first..));
        }
        Ok(copied)
    }
}

impl PageReader for Copied {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        for pfn in pages {
            let place = self.places.get(&space).and_then(|places| places.get(pfn));
            let at = *place.ok_or(GuestError::WrongState("cannot read a page that was not captured"))? * PAGE_SIZE;
            out.extend_from_slice(&self.bytes[at..at + PAGE_SIZE]);
        }
        Ok(())
    }
}

impl Captured for Copied {
    fn by(&self) -> CaptureBy {
        CaptureBy::Copy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every page is filled with its own number.
    struct Numbered;

    impl PageReader for Numbered {
        fn read_pages(&self, _space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
            pages
                .iter()
                .for_each(|pfn| out.extend([u8::try_from(pfn.0).unwrap(); PAGE_SIZE]));
            Ok(())
        }
    }

    #[test]
    fn what_was_captured_is_read_in_any_order_and_nothing_else_is() {
        let mut set = PageSet::new(PageCount(100));
        for pfn in [3, 40, 99] {
            set.insert(Pfn(pfn));
        }
        let harvest = Harvest {
            dirty: vec![(SpaceId::RAM, set)],
        };
        let copied = Copied::of(&Numbered, &harvest).unwrap();
        let mut out = Vec::new();
        copied.read_pages(SpaceId::RAM, &[Pfn(99), Pfn(3)], &mut out).unwrap();
        assert_eq!((out[0], out[PAGE_SIZE], out.len()), (99, 3, 2 * PAGE_SIZE));
        let error = copied.read_pages(SpaceId::RAM, &[Pfn(4)], &mut out).unwrap_err();
        assert_eq!(error.to_string(), "cannot read a page that was not captured");
        assert!(copied.read_pages(SpaceId(1), &[Pfn(3)], &mut out).is_err());
    }
}
