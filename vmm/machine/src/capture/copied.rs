//! Captured by copying inside the pause, by one thread or several.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use umbra_core::guest::{CaptureBy, Captured, GuestError, PageReader};
use umbra_units::{PAGE_SIZE, Pfn, SpaceId};

use super::chunks::{CHUNK, Chunk, Pool};
use super::crew::Crew;
use super::plan::Plan;
use super::{NOT_CAPTURED, only_ram};
use crate::error::Error;
use crate::memory::Memory;

/// Pages that were copied.
pub(super) struct CopiedPages {
    plan: Arc<Plan>,
    chunks: Vec<Chunk>,
    pool: Arc<Pool>,
    by: CaptureBy,
}

/// Where one thread leaves what it copied.
type Place = Mutex<Option<Result<Chunk, Error>>>;

/// Copy one chunk of what was planned.
pub(super) fn fill(memory: &Memory, plan: &Plan, chunk: usize, into: &mut Chunk) -> Result<(), Error> {
    let pages = into.pages_mut();
    for run in plan.runs_of(chunk) {
        let at = run.number % CHUNK;
        memory.read_run(run.first, pages[at..at + run.pages].as_flattened_mut())?;
    }
    Ok(())
}

impl CopiedPages {
    /// By this thread alone.
    pub(super) fn alone(memory: &Memory, plan: &Arc<Plan>, pool: &Arc<Pool>) -> Result<Self, Error> {
        let mut copied = Self {
            plan: plan.clone(),
            chunks: Vec::new(),
            pool: pool.clone(),
            by: CaptureBy::Copy,
        };
        for chunk in 0..copied.plan.chunks() {
            let mut into = pool.take()?;
            let done = fill(memory, &copied.plan, chunk, &mut into);
            copied.chunks.push(into);
            done?;
        }
        Ok(copied)
    }

    /// With a crew.
    pub(super) fn together(
        memory: &Arc<Memory>,
        plan: &Arc<Plan>,
        pool: &Arc<Pool>,
        crew: &Crew,
    ) -> Result<Self, Error> {
        let places: Arc<[Place]> = (0..plan.chunks()).map(|_| Place::default()).collect();
        let next = AtomicUsize::new(0);
        let (mine, theirs) = (plan.clone(), places.clone());
        let (memory, from) = (memory.clone(), pool.clone());
        crew.work(Arc::new(move || {
            loop {
                let chunk = next.fetch_add(1, Ordering::Relaxed);
                let Some(place) = theirs.get(chunk) else { return };
                let copy = || {
                    let mut into = from.take()?;
                    fill(&memory, &mine, chunk, &mut into)?;
                    Ok(into)
                };
                *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(copy());
            }
        }));
        let mut copied = Self {
            plan: plan.clone(),
            chunks: Vec::new(),
            pool: pool.clone(),
            by: CaptureBy::ParallelCopy,
        };
        for place in places.iter() {
            let chunk = place.lock().unwrap_or_else(PoisonError::into_inner).take();
            copied.chunks.push(chunk.expect("each chunk was somebody's work")?);
        }
        Ok(copied)
    }
}

impl PageReader for CopiedPages {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        only_ram(space)?;
        out.reserve(pages.len() * PAGE_SIZE);
        for page in pages {
            let number = self.plan.find(*page).ok_or(NOT_CAPTURED)?;
            out.extend_from_slice(&self.chunks[number / CHUNK].pages()[number % CHUNK]);
        }
        Ok(())
    }
}

impl Captured for CopiedPages {
    fn by(&self) -> CaptureBy {
        self.by
    }
}

impl Drop for CopiedPages {
    fn drop(&mut self) {
        self.pool.give(self.chunks.drain(..));
    }
}
