//! One guest's record of writes, for several who follow it.
//!
//! A harvest consumes (`umbra_core::guest`), so a guest's record has one reader: a page that the session harvested would be
//! missing in the next differential snapshot, and the other way round. [`SharedLog`] stands between. Whoever harvests
//! takes the guest's harvest for *everybody*: it is joined to what each [`Listener`] has coming, and each takes, and puts
//! back, only its own. To its user a listener is the guest itself.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use umbra_core::guest::{CaptureBy, Captured, Guest, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_units::{PageId, Pfn, SpaceId};

/// A guest whose writes several may follow. Copies are the same log.
#[derive(Clone)]
pub struct SharedLog {
    inner: Arc<Inner>,
}

struct Inner {
    guest: Arc<dyn Guest>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What each listener that tracks has not yet taken.
    coming: BTreeMap<u64, Harvest>,
    /// Listeners ever made.
    made: u64,
}

impl SharedLog {
    /// The log of `guest`, whose writes nobody else may harvest from now on.
    pub fn new(guest: Arc<dyn Guest>) -> Self {
        Self {
            inner: Arc::new(Inner {
                guest,
                state: Mutex::default(),
            }),
        }
    }

    /// Somebody who follows, once it tracks.
    pub fn listener(&self) -> Listener {
        let mut state = self.inner.state();
        state.made += 1;
        Listener {
            number: state.made,
            inner: Arc::clone(&self.inner),
        }
    }

    /// The guest itself.
    pub fn guest(&self) -> &Arc<dyn Guest> {
        &self.inner.guest
    }
}

impl fmt::Debug for SharedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedLog({} listeners)", self.inner.state().coming.len())
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of those who follow a guest: the guest, with a record of writes of its own. Dropping it stops that record.
pub struct Listener {
    inner: Arc<Inner>,
    number: u64,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Listener({})", self.number)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = self.track(false) {
            tracing::warn!(%error, "writes go on being recorded for nobody");
        }
    }
}

impl PageReader for Listener {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.inner.guest.read_pages(space, pages, out)
    }
}

impl Guest for Listener {
    /// The guest's own log runs while anybody tracks. Who begins while it runs may be told of writes before that.
    fn track(&self, on: bool) -> Result<(), GuestError> {
        let mut state = self.inner.state();
        if on {
            if state.coming.is_empty() {
                self.inner.guest.track(true)?;
            }
            state.coming.entry(self.number).or_default();
        } else if state.coming.remove(&self.number).is_some() && state.coming.is_empty() {
            self.inner.guest.track(false)?;
        }
        Ok(())
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        let mut state = self.inner.state();
        if !state.coming.contains_key(&self.number) {
            return Err(GuestError::WrongState(
                "cannot harvest: writes are not being recorded; track them first",
            ));
        }
        let harvest = self.inner.guest.harvest()?;
        for coming in state.coming.values_mut() {
            coming.join(&harvest);
        }
        Ok(state
            .coming
            .get_mut(&self.number)
            .map(std::mem::take)
            .unwrap_or_default())
    }

    fn put_back(&self, harvest: &Harvest) {
        if let Some(coming) = self.inner.state().coming.get_mut(&self.number) {
            coming.join(harvest);
        }
    }

    fn describe(&self) -> StateRecord {
        self.inner.guest.describe()
    }

    fn spaces(&self) -> Vec<Space> {
        self.inner.guest.spaces()
    }

    fn untouched(&self) -> Harvest {
        self.inner.guest.untouched()
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        self.inner.guest.read_page(page, out)
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        self.inner.guest.apply_page(page, bytes)
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.inner.guest.pause()
    }

    fn capture(&self, pages: &Harvest, by: Option<CaptureBy>) -> Result<Box<dyn Captured>, GuestError> {
        self.inner.guest.capture(pages, by)
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.inner.guest.resume()
    }

    // Has a default: left out here, a guest that is given up would keep its disks locked.
    fn give_up(&self) {
        self.inner.guest.give_up();
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        self.inner.guest.save()
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        self.inner.guest.restore(records)
    }

    fn hold_output(&self) {
        self.inner.guest.hold_output();
    }

    fn release_output(&self) {
        self.inner.guest.release_output();
    }
}
