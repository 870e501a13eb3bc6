//! Virtio devices on the board: where they answer, how they are heard, and whose thread works for them.
//!
//! ```text
//!   0xd000_0000 + n * 0x1000   device n; a write of queue q to its NOTIFY register signals event q (ioeventfd)
//!   interrupt                  LINES[n % 8], edge-triggered, shared from the ninth device on (irqfd)
//!   threads                    disk/ID each; virtio: all others
//! ```
//!
//! # An interrupt that may still be on its way
//!
//! An irqfd of the PIC or IOAPIC injects from a work queue, a moment after it was signalled: a guest saved in that moment
//! has the interrupt nowhere. Here that is allowed, other than for the console (see [the board](super)): a virtio device keeps what its
//! driver has not acknowledged in its status register, which is saved, and pulses its line again for that when it is resumed.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use umbra_devices::virtio::mmio::{NOTIFY, WINDOW, Wiring};
use umbra_devices::virtio::{Bell, Mmio, Virtio};
use umbra_devices::{Device as _, Line, Restore as _, SavedState};
use vmm_sys_util::eventfd::EventFd;

use super::Slot;
use crate::acpi::MmioWindow;
use crate::error::Error;
use crate::limits;
use crate::worker::event;

/// Where the first device answers: in the hole below 4 GiB, clear of what KVM and the interrupt controllers have there.
const FIRST_WINDOW: u32 = 0xd000_0000;

/// Interrupt lines of an ISA bus that nothing else here uses: not the timer (0), keyboard (1), cascade (2), serial ports (3, 4),
/// clock (8), ACPI (9) or coprocessor (13).
const LINES: [u32; 8] = [5, 6, 7, 10, 11, 12, 14, 15];

/// Where the `n`th virtio device of a machine answers.
pub(super) fn window(n: usize) -> MmioWindow {
    assert!(
        n < limits::VIRTIO_DEVICES,
        "a machine's devices are counted when it is configured"
    );
    let len = u32::try_from(WINDOW).expect("a page");
    MmioWindow {
        base: FIRST_WINDOW + u32::try_from(n).expect("a few devices") * len,
        len,
        irq: LINES[n % LINES.len()],
    }
}

/// A device with all that connects it.
pub(super) struct Plugged<D: Virtio> {
    pub(super) device: Arc<Mutex<Mmio<D>>>,
    wiring: Wiring<D::Wiring>,
    pub(super) queues: Vec<Arc<EventFd>>,
}

/// Build a device that answers at `window`, and have KVM signal its queues' events.
pub(super) fn plug<D: Virtio>(
    vm: &Arc<VmFd>,
    window: MmioWindow,
    ram: umbra_devices::virtio::Ram,
    device: D::Wiring,
) -> Result<Plugged<D>, Error> {
    let bell = Arc::new(Queues(OnceLock::new()));
    let wiring = Wiring {
        ram,
        line: Arc::new(Irqfd::new(vm, window.irq)?),
        bell: bell.clone(),
        device,
    };
    let device = Mmio::<D>::new(wiring.clone());
    let mut queues = Vec::new();
    for queue in 0..u32::try_from(device.queues().len()).expect("few queues") {
        let event = new_event()?;
        let notify = IoEventAddress::Mmio(u64::from(window.base) + NOTIFY);
        vm.register_ioevent(&event, &notify, queue)
            .map_err(Error::kvm("have a queue's notifications caught"))?;
        queues.push(Arc::new(event));
    }
    bell.0.set(queues.clone()).expect("set once, here");
    Ok(Plugged {
        device: Arc::new(Mutex::new(device)),
        wiring,
        queues,
    })
}

fn new_event() -> Result<EventFd, Error> {
    event().map_err(|source| Error::Host {
        doing: "make an event for a device",
        source,
    })
}

/// The events of a device's queues.
struct Queues(OnceLock<Vec<Arc<EventFd>>>);

impl Bell for Queues {
    fn ring(&self, queue: u16) {
        let events = self.0.get().map_or(&[][..], Vec::as_slice);
        if let Some(event) = events.get(usize::from(queue)) {
            // Full only after 2^64 - 2 notifications that nobody heard: then there is one waiting anyway.
            let _ = event.write(1);
        }
    }
}

/// A line that is pulsed by signalling an event. See the [module](self).
struct Irqfd(EventFd);

impl Irqfd {
    fn new(vm: &VmFd, irq: u32) -> Result<Self, Error> {
        let event = new_event()?;
        vm.register_irqfd(&event, irq)
            .map_err(Error::kvm("connect an interrupt line"))?;
        Ok(Self(event))
    }
}

impl Line for Irqfd {
    fn pulse(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::warn!(%error, "cannot raise an interrupt");
        }
    }
}

impl<D: Virtio> Plugged<D> {
    fn device(&self) -> MutexGuard<'_, Mmio<D>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Virtio> Slot for Plugged<D> {
    fn kind(&self) -> String {
        self.device().kind().to_owned()
    }

    fn reset(&self) {
        self.device().reset();
    }

    fn pause(&self) {
        self.device().pause();
    }

    fn resume(&self) {
        self.device().resume();
    }

    fn save(&self) -> Result<SavedState, Error> {
        Ok(self.device().save()?)
    }

    /// The device's worker knows its engine, so what was restored moves into it.
    fn prepare<'a>(&'a self, saved: &SavedState) -> Result<Box<dyn FnOnce() + 'a>, Error> {
        let restored = Mmio::<D>::restore(saved, self.wiring.clone())?;
        Ok(Box::new(move || self.device().take_over(restored)))
    }
}

impl<D: Virtio> fmt::Debug for Plugged<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Plugged({:?})", self.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_in_the_hole_side_by_side_and_lines_are_shared_late() {
        let windows: Vec<MmioWindow> = (0..limits::VIRTIO_DEVICES).map(window).collect();
        for pair in windows.windows(2) {
            assert_eq!(pair[0].base + pair[0].len, pair[1].base);
        }
        assert!(windows[0].base >= 0xc000_0000 && windows.last().is_some_and(|last| last.base < 0xfec0_0000));
        for first in &windows[..LINES.len()] {
            assert_eq!(
                windows[..LINES.len()]
                    .iter()
                    .filter(|other| other.irq == first.irq)
                    .count(),
                1
            );
        }
    }
}
