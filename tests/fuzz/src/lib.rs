//! What the fuzz targets share: memory that is nothing but pages.

use std::collections::BTreeMap;
use std::sync::Mutex;

use umbra_core::guest::{Guest, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_core::snapshot::Walk;
use umbra_core::source::Plan;
use umbra_units::{BatchId, Epoch, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SpaceId};

/// Memory of several spaces.
#[derive(Debug)]
pub struct Flat {
    /// Its spaces.
    pub spaces: Vec<Space>,
    pages: Mutex<BTreeMap<PageId, Box<PageBytes>>>,
}

impl Flat {
    /// Of spaces with these numbers and sizes in pages.
    pub fn new(sizes: &[(u16, u64)]) -> Self {
        let space = |(id, pages): &(u16, u64)| Space {
            id: SpaceId(*id),
            ..Space::ram(PageCount(*pages))
        };
        Self {
            spaces: sizes.iter().map(space).collect(),
            pages: Mutex::default(),
        }
    }

    fn get(&self, page: PageId) -> PageBytes {
        let pages = self.pages.lock().expect("nobody panics here");
        pages.get(&page).map_or([0; PAGE_SIZE], |content| **content)
    }
}

impl PageReader for Flat {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        for pfn in pages {
            out.extend_from_slice(&self.get(PageId { space, pfn: *pfn }));
        }
        Ok(())
    }
}

impl Guest for Flat {
    fn spaces(&self) -> Vec<Space> {
        self.spaces.clone()
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        *out = self.get(page);
        Ok(())
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        let mut pages = self.pages.lock().expect("nobody panics here");
        pages.insert(page, Box::new(*bytes));
        Ok(())
    }

    fn describe(&self) -> StateRecord {
        unreachable!("only its pages are asked for")
    }

    fn track(&self, _on: bool) -> Result<(), GuestError> {
        Ok(())
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        Ok(Harvest::default())
    }

    fn put_back(&self, _harvest: &Harvest) {}

    fn pause(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        Ok(Vec::new())
    }

    fn restore(&self, _records: &[StateRecord]) -> Result<(), GuestError> {
        Ok(())
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}

/// A plan for batch 1 of epoch 1 with page 0 of RAM, to be changed.
pub fn plan() -> Plan {
    let dirty = vec![(SpaceId::RAM, PageSet::full(PageCount(1)))];
    let plan = Walk::new(Harvest { dirty }).next_plan(BatchId(1), Epoch(1));
    plan.expect("it has a page")
}
