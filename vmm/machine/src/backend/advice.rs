//! Where memory goes that a guest gives back.

use std::fmt;
use std::sync::Arc;

use umbra_devices::virtio::balloon::MemoryAdvice;
use umbra_units::{PageCount, Pfn};

use crate::memory::Memory;

/// The guest's memory, for its balloon.
pub(crate) struct Advice(Arc<Memory>);

impl Advice {
    pub(crate) const fn new(memory: Arc<Memory>) -> Self {
        Self(memory)
    }
}

impl MemoryAdvice for Advice {
    fn discard(&self, first: Pfn, pages: PageCount) {
        // It is advice: where the host does not take it, the pages stay as they are.
        if let Err(error) = self.0.discard(first, pages) {
            tracing::warn!(page = first.0, pages = pages.0, %error, "a balloon's pages stay");
        }
    }
}

impl fmt::Debug for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Advice")
    }
}
