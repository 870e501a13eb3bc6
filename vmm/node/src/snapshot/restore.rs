//! A guest from a snapshot: the chain is opened and checked, a twin is built, memory applied link by link, state loaded.
//!
//! This is a shadow whose source is a disk: the same builder makes the twin, the same [`Image`] applies the same batches.
//! Nothing of it runs before every page has matched its hash, every part its checksum, and all of memory the digest of the
//! cut.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use umbra_core::batch::{Batch, PageCounts};
use umbra_core::error::Fault;
use umbra_core::guest::{Guest, GuestBuilder, StateRecord};
use umbra_core::limits;
use umbra_core::shadow::Image;
use umbra_core::snapshot::{Checksum, Index, Manifest, Summing, decode_state, goes_on};
use umbra_units::Bytes;

use super::SnapshotError;
use super::folder::{Folder, MANIFEST};
use crate::clock::Clock;

/// A guest that stands as it did at the cut, paused.
pub struct Restored {
    /// The guest. Nobody has resumed it.
    pub guest: Arc<dyn Guest>,
    /// What it was restored from.
    pub manifest: Manifest,
    /// What that took.
    pub report: RestoreReport,
}

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreReport {
    /// Snapshots read: a full one and what was made from it.
    pub links: usize,
    /// Bytes of their memory parts.
    pub bytes: Bytes,
    /// How their pages were kept.
    pub counts: PageCounts,
    /// Building the twin.
    pub build: Duration,
    /// Reading, checking and applying memory.
    pub memory: Duration,
    /// Loading vCPU and device state.
    pub state: Duration,
}

impl fmt::Debug for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Restored({}, {:?})", self.manifest.id, self.report)
    }
}

/// One snapshot of a chain.
struct Link {
    folder: Folder,
    manifest: Manifest,
    checksum: Checksum,
}

/// Build the guest that was kept in the folder `from`, and let it stand as it did at the cut.
pub fn restore(from: &Path, builder: &dyn GuestBuilder) -> Result<Restored, SnapshotError> {
    let clock = Clock::new();
    let chain = open_chain(from)?;
    let newest = chain.last().expect("a chain has at least the snapshot that was named");
    let (description, records) = read_state(newest)?;
    let state = |error: &dyn fmt::Display| newest.folder.wrong("state", error);

    let began = clock.now();
    let guest = builder.build(&description).map_err(|error| state(&error))?;
    let build = clock.now().since(began);
    let spaces = guest.spaces();
    if spaces != newest.manifest.spaces {
        let text = "expected the spaces of the guest that the state describes, got others";
        return Err(newest.folder.wrong(MANIFEST, text));
    }

    let began = clock.now();
    let mut image = Image::new(&spaces);
    let mut counts = PageCounts::default();
    for link in &chain {
        apply(link, &mut image, &*guest, &mut counts)?;
    }
    let memory = clock.now().since(began);

    let began = clock.now();
    guest.restore(&records).map_err(|error| state(&error))?;
    let report = RestoreReport {
        links: chain.len(),
        bytes: Bytes(chain.iter().map(|link| link.manifest.memory.bytes).sum()),
        counts,
        build,
        memory,
        state: clock.now().since(began),
    };
    let manifest = newest.manifest.clone();
    Ok(Restored {
        guest,
        manifest,
        report,
    })
}

/// The snapshot in `from` and everything it goes on from, the full one first.
fn open_chain(from: &Path) -> Result<Vec<Link>, SnapshotError> {
    let mut chain = vec![Link::open(Folder::open(from)?)?];
    while let Some(child) = chain.last().filter(|link| link.manifest.parent.is_some()) {
        let parent = child.manifest.parent.as_ref().expect("just seen");
        if chain.len() == limits::SNAPSHOT_CHAIN {
            let text = format!(
                "expected a chain of at most {} snapshots, got more",
                limits::SNAPSHOT_CHAIN
            );
            return Err(chain[0].folder.wrong(MANIFEST, text));
        }
        let link = Link::open(child.folder.sibling(&parent.folder)?)?;
        // A chain cannot lead back into itself: the number of a cut is one less at each step.
        goes_on(&link.manifest, link.checksum, &child.manifest).map_err(|error| {
            let text = format!("{error}, by {}", child.folder.path().join(MANIFEST).display());
            link.folder.wrong(MANIFEST, text)
        })?;
        chain.push(link);
    }
    chain.reverse();
    Ok(chain)
}

impl Link {
    fn open(folder: Folder) -> Result<Self, SnapshotError> {
        let (manifest, checksum) = folder.manifest()?;
        // That a part is missing or cut short is found before anything is built.
        for (name, part) in manifest.parts() {
            folder.open_part(name, part)?;
        }
        Ok(Self {
            folder,
            manifest,
            checksum,
        })
    }
}

fn read_state(link: &Link) -> Result<(StateRecord, Vec<StateRecord>), SnapshotError> {
    let bytes = link.folder.part("state", link.manifest.state)?;
    decode_state(&bytes).map_err(|error| link.folder.wrong("state", error))
}

/// Apply one link's batches, and hold the image against the link's digest.
fn apply(link: &Link, image: &mut Image, guest: &dyn Guest, counts: &mut PageCounts) -> Result<(), SnapshotError> {
    let Link { folder, manifest, .. } = link;
    let index = folder.part("index", manifest.index)?;
    let index = Index::decode(&index, manifest.batches, manifest.memory.bytes);
    let index = index.map_err(|error| folder.wrong("index", error))?;
    let mut file = folder.open_part("memory", manifest.memory)?;
    let mut summing = Summing::new();
    let mut bytes = Vec::new();
    let mut expected = manifest.first_batch;
    for length in index.lengths() {
        let at = summing.bytes();
        let wrong = |what: &dyn fmt::Display| folder.wrong("memory", format!("batch {expected} at byte {at}: {what}"));
        bytes.resize(length, 0);
        file.read_exact(&mut bytes).map_err(|error| wrong(&error))?;
        summing.add(&bytes);
        let batch = Batch::parse(&bytes).map_err(|error| wrong(&error))?;
        if (batch.id, batch.epoch, batch.close.is_some()) != (expected, manifest.cut, false) {
            let text = format!(
                "expected batch {expected} of cut {}, got batch {} of cut {}",
                manifest.cut, batch.id, batch.epoch
            );
            return Err(wrong(&text));
        }
        let applied = image.apply(batch, guest).map_err(|fault| match fault {
            Fault::PeerMisbehaved(text) | Fault::PeerIncompatible(text) | Fault::PeerEnded(text) => wrong(&text),
            Fault::Host(text) => SnapshotError::Host(text),
        })?;
        counts.add(&applied.counts);
        expected = expected.next();
    }
    let checksum = summing.finish();
    if checksum != manifest.memory.checksum {
        let text = format!("expected checksum {}, got {checksum}", manifest.memory.checksum);
        return Err(folder.wrong("memory", text));
    }
    if image.digest() != manifest.digest {
        let text = format!(
            "expected the digest {} of all memory, got {}",
            manifest.digest,
            image.digest()
        );
        return Err(folder.wrong("memory", text));
    }
    Ok(())
}
