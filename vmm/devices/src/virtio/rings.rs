//! A device's queues, as the device sees them while it works: chains out, answers in.
//!
//! The rings themselves are `virtio-queue`'s. This file adds what a device must not be trusted to remember:
//!
//! - every chain that is handed out is well-formed, and there are never more out than the queue has places;
//! - notifications are switched back on exactly when a queue was seen empty, so that none is lost;
//! - one call takes at most [`CHAINS_PER_CALL`] chains, and what is left is looked at in another;
//! - one interrupt per call at most, and only if the driver asked for one;
//! - answers for a driver that has reset the device since go nowhere;
//! - a ring that cannot be used breaks the device, which is silent from then on.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::chain::{Chain, Token};
use super::engine::Counters;
use super::interrupt::Interrupt;
use super::{Ram, bit};
use crate::limits::CHAINS_PER_CALL;

/// The queues of one device.
pub struct Rings {
    ram: Ram,
    interrupt: Arc<Interrupt>,
    slots: Vec<Slot>,
    /// What the driver settled for.
    features: u64,
    /// The driver said `DRIVER_OK`, and nothing has broken since.
    live: bool,
    /// Chains may be taken: the device is not paused.
    open: bool,
    broken: bool,
    generation: u32,
    /// Chains that may still be taken in this call.
    left: u32,
    /// Queues to look at: bit per queue.
    due: u64,
    counters: Counters,
}

/// One queue.
struct Slot {
    /// `ready` while the driver uses it.
    queue: Queue,
    /// Answers were put in since the driver was last considered for an interrupt.
    answered: bool,
    /// Where the used ring stood when the driver was last considered for an interrupt.
    considered: u16,
    /// The driver was told not to notify. Only without `EVENT_IDX`, where being silent is something to be written.
    silenced: bool,
}

/// Where the driver put a queue, as it wrote it into the registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Setup {
    pub(super) size: u32,
    pub(super) ready: bool,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// How far a queue has come: the next entries to look at, in the available and in the used ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) available: u16,
    pub(super) used: u16,
}

/// A queue cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Self {
        Self
    }
}

impl Rings {
    pub(super) fn new(ram: Ram, interrupt: Arc<Interrupt>, sizes: &[u16]) -> Self {
        let slot = |size: &u16| Slot::new(*size);
        Self {
            ram,
            interrupt,
            slots: sizes.iter().map(slot).collect(),
            features: 0,
            live: false,
            open: false,
            broken: false,
            generation: 0,
            left: 0,
            due: 0,
            counters: Counters::default(),
        }
    }

    // What a device does.

    /// The next chain of a queue. `None` says that the device need not look again by itself: the queue is empty and the
    /// driver will notify, or another call is certain.
    pub fn pop(&mut self, queue: u16) -> Option<Chain> {
        loop {
            let generation = self.generation;
            if !self.live || !self.open {
                return None;
            }
            let slot = self.slots.get_mut(usize::from(queue))?;
            if !slot.queue.ready() {
                return None;
            }
            if self.left == 0 {
                self.due |= bit(queue.into());
                return None;
            }
            let popped = slot.next(&self.ram, |head| Token::taken(queue, head, generation));
            match popped {
                Ok(Some((token, chain))) => {
                    self.left -= 1;
                    if let Some(chain) = chain {
                        self.counters.chains += 1;
                        return Some(chain);
                    }
                    self.counters.malformed += 1;
                    self.push(token, 0);
                }
                Ok(None) => return None,
                Err(Broken) => self.fail(),
            }
        }
    }

    /// Whether anybody waits for a chain: its driver has neither reset the device since, nor taken the queue out of use, nor broken it.
    /// If not, its memory is somebody else's by now.
    pub fn is_awaited(&mut self, token: Token) -> bool {
        self.live && slot_of(&mut self.slots, self.generation, token).is_some()
    }

    /// Undo the last [`pop`](Self::pop) of a chain's queue: the chain will be the next again. Nothing may have been popped from that
    /// queue in between, and the device must come back by itself.
    pub fn put_back(&mut self, chain: impl Into<Token>) {
        if let Some(slot) = slot_of(&mut self.slots, self.generation, chain.into()) {
            slot.queue.go_to_previous_position();
            self.counters.chains = self.counters.chains.saturating_sub(1);
        }
    }

    /// Give a chain back, with the number of bytes written to it, from its front.
    pub fn push(&mut self, token: Token, written: u32) {
        if !self.live {
            return;
        }
        let Self {
            ram, slots, generation, ..
        } = self;
        let Some(slot) = slot_of(slots, *generation, token) else {
            return;
        };
        slot.answered = true;
        if slot.queue.add_used(ram, token.head(), written).is_err() {
            self.fail();
        }
    }

    /// Give back several chains of one queue, in this order, such that the driver sees all of them or none: buffers of one frame
    /// (virtio 1.2, Network Device, Setting Up Receive Buffers).
    pub fn push_together(&mut self, chains: &[(Token, u32)]) {
        let Some(((last, written), others)) = chains.split_last() else {
            return;
        };
        if !self.live {
            return;
        }
        let Some(slot) = slot_of(&mut self.slots, self.generation, *last) else {
            return;
        };
        if slot.place(&self.ram, others).is_err() {
            return self.fail();
        }
        self.push(*last, *written);
    }

    /// Guest memory.
    pub const fn ram(&self) -> &Ram {
        &self.ram
    }

    /// What the driver settled for.
    pub const fn features(&self) -> u64 {
        self.features
    }

    /// Whether the driver uses this queue.
    pub fn is_active(&self, queue: u16) -> bool {
        self.live
            && self
                .slots
                .get(usize::from(queue))
                .is_some_and(|slot| slot.queue.ready())
    }

    /// Whether chains may be taken and given back: the driver is ready and the device not paused.
    pub const fn is_open(&self) -> bool {
        self.live && self.open
    }

    /// The configuration space is not what it was: tell the driver.
    pub fn config_changed(&mut self) {
        if self.live {
            self.interrupt.config();
        }
    }

    /// There is no talking to this driver: the device stops, and asks to be reset.
    pub fn fail(&mut self) {
        if self.live {
            self.live = false;
            self.broken = true;
            self.due = 0;
            self.counters.broken += 1;
            self.interrupt.config();
        }
    }

    // What the engine does.

    /// A call begins.
    pub(super) const fn begin(&mut self) {
        self.left = CHAINS_PER_CALL;
    }

    /// A call ends: interrupt the driver, if there are answers it wants to hear of.
    pub(super) fn finish(&mut self) {
        let mut wanted = false;
        for slot in self.slots.iter_mut().filter(|slot| slot.answered) {
            slot.answered = false;
            match slot.wants_interrupt(&self.ram) {
                Ok(wants) => wanted |= wants,
                Err(Broken) => {
                    self.fail();
                    return;
                }
            }
        }
        if wanted && self.live {
            self.interrupt.answers();
        }
    }

    /// Look at this queue in the next call.
    pub(super) fn note(&mut self, queue: u16) {
        if self.is_active(queue) {
            self.due |= bit(queue.into());
        }
    }

    /// Look at every queue in the next call.
    pub(super) fn note_all(&mut self) {
        for queue in self.active() {
            self.note(queue);
        }
    }

    /// The queues the driver uses.
    pub(super) fn active(&self) -> Vec<u16> {
        (0..)
            .zip(&self.slots)
            .map(|(queue, _)| queue)
            .filter(|queue| self.is_active(*queue))
            .collect()
    }

    /// Take the queues to look at.
    pub(super) const fn take_due(&mut self) -> u64 {
        std::mem::replace(&mut self.due, 0)
    }

    pub(super) const fn has_due(&self) -> bool {
        self.due != 0
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            interrupts: self.interrupt.pulses(),
            ..self.counters
        }
    }

    pub(super) const fn is_live(&self) -> bool {
        self.live
    }

    pub(super) const fn is_broken(&self) -> bool {
        self.broken
    }

    pub(super) const fn set_open(&mut self, open: bool) {
        self.open = open;
    }

    /// The driver is ready. Queues that cannot be used break the device.
    pub(super) fn start(&mut self, features: u64, setups: &[Setup]) {
        self.features = features;
        self.live = true;
        for (slot, setup) in self.slots.iter_mut().zip(setups) {
            let Ok(()) = slot.start(features, setup, Position::default(), &self.ram) else {
                self.fail();
                return;
            };
        }
        self.note_all();
    }

    /// Go on where another instance stopped. `broken` says that it had broken; then its queues are not looked at.
    pub(super) fn go_on(
        &mut self,
        features: u64,
        queues: &[(Setup, Position)],
        broken: bool,
    ) -> Result<(), &'static str> {
        self.features = features;
        self.live = !broken;
        self.broken = broken;
        for (slot, (setup, position)) in self.slots.iter_mut().zip(queues) {
            let started = slot.start(features, setup, *position, &self.ram);
            if !broken && (started.is_err() || slot.outstanding() > slot.queue.size()) {
                return Err("a queue in use");
            }
        }
        Ok(())
    }

    /// The driver no longer uses this queue.
    pub(super) fn stop(&mut self, queue: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(queue)) {
            slot.queue.set_ready(false);
            self.due &= !bit(queue.into());
        }
    }

    /// Back to power-on. Chains that are out belong to nobody.
    pub(super) fn reset(&mut self) {
        for slot in &mut self.slots {
            *slot = Slot::new(slot.queue.max_size());
        }
        self.features = 0;
        self.live = false;
        self.broken = false;
        self.due = 0;
        self.generation = self.generation.wrapping_add(1);
    }

    /// How far a queue has come. One that is not in use has not begun.
    pub(super) fn position(&self, queue: usize) -> Position {
        let queue = &self.slots[queue].queue;
        if !queue.ready() {
            return Position::default();
        }
        Position {
            available: queue.next_avail(),
            used: queue.next_used(),
        }
    }

    /// Answer to another device's interrupt: these rings were built apart from it.
    pub(super) fn connect(&mut self, interrupt: Arc<Interrupt>) {
        self.interrupt = interrupt;
    }
}

/// The queue a chain came from, if somebody still waits for the chain.
fn slot_of(slots: &mut [Slot], generation: u32, token: Token) -> Option<&mut Slot> {
    if token.generation() != generation {
        return None;
    }
    let slot = slots.get_mut(usize::from(token.queue()))?;
    slot.queue.ready().then_some(slot)
}

impl Slot {
    fn new(size: u16) -> Self {
        Self {
            queue: Queue::new(size).expect("a device's queue sizes are powers of two: asserted when it is built"),
            answered: false,
            considered: 0,
            silenced: false,
        }
    }

    /// Take a queue into use where the driver put it.
    fn start(&mut self, features: u64, setup: &Setup, position: Position, ram: &Ram) -> Result<(), Broken> {
        *self = Self::new(self.queue.max_size());
        if !setup.ready {
            return Ok(());
        }
        let size = u16::try_from(setup.size).map_err(|_| Broken)?;
        self.queue.try_set_size(size)?;
        self.queue.try_set_desc_table_address(GuestAddress(setup.descriptors))?;
        self.queue.try_set_avail_ring_address(GuestAddress(setup.available))?;
        self.queue.try_set_used_ring_address(GuestAddress(setup.used))?;
        self.queue.set_event_idx(features & bit(VIRTIO_RING_F_EVENT_IDX) != 0);
        self.queue.set_next_avail(position.available);
        self.queue.set_next_used(position.used);
        self.considered = position.used;
        self.queue.set_ready(true);
        if self.queue.is_valid(ram) { Ok(()) } else { Err(Broken) }
    }

    /// How many chains are out: every chain taken is given back once, whatever the order.
    fn outstanding(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(self.queue.next_used())
    }

    /// Take the next chain: `None` inside says that it is not well-formed. Switches notifications back on when there is none.
    fn next(&mut self, ram: &Ram, token: impl Fn(u16) -> Token) -> Result<Option<(Token, Option<Chain>)>, Broken> {
        if !self.queue.event_idx_enabled() && !self.silenced {
            self.queue.disable_notification(ram)?;
            self.silenced = true;
        }
        loop {
            if let Some(descriptors) = self.queue.iter(ram)?.next() {
                // A driver that offers a chain while all places are out offers one of those twice.
                if self.outstanding() > self.queue.size() {
                    return Err(Broken);
                }
                let token = token(descriptors.head_index());
                return Ok(Some((token, Chain::follow(descriptors, token))));
            }
            if !self.queue.enable_notification(ram)? {
                self.silenced = false;
                return Ok(None);
            }
        }
    }

    /// Put answers into the used ring behind what the driver sees of it: the next `add_used` shows them.
    fn place(&mut self, ram: &Ram, answers: &[(Token, u32)]) -> Result<(), Broken> {
        for (token, written) in answers {
            let (size, next) = (self.queue.size(), self.queue.next_used());
            if token.head() >= size {
                return Err(Broken);
            }
            // `struct virtq_used`: flags and index, then entries of a head and a length (virtio 1.2, The Virtqueue Used Ring).
            let at = GuestAddress(self.queue.used_ring())
                .checked_add(4 + 8 * u64::from(next % size))
                .ok_or(Broken)?;
            let entry = [u32::from(token.head()).to_le(), written.to_le()];
            ram.write_obj(entry, at).map_err(|_| Broken)?;
            self.queue.set_next_used(next.wrapping_add(1));
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the answers since it was last asked.
    fn wants_interrupt(&mut self, ram: &Ram) -> Result<bool, Broken> {
        if !self.queue.ready() {
            return Ok(false);
        }
        // For its fence: what it counts are single answers, and some were put in together.
        self.queue.needs_notification(ram)?;
        let (now, before) = (self.queue.next_used(), self.considered);
        self.considered = now;
        if self.queue.event_idx_enabled() {
            // Whether the ring has passed the entry the driver asked about (virtio 1.2, Used Buffer Notification Suppression).
            let after_ring = 4 + 2 * u64::from(self.queue.size());
            let at = GuestAddress(self.queue.avail_ring())
                .checked_add(after_ring)
                .ok_or(Broken)?;
            let event = u16::from_le(ram.load(at, Ordering::Relaxed).map_err(|_| Broken)?);
            return Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before));
        }
        // virtio-queue leaves the flag to its caller: virtio 1.2, Available Buffer Notification Suppression.
        let flags: u16 = ram
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| Broken)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

impl fmt::Debug for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (self.live, self.broken) {
            (true, _) => "live",
            (false, true) => "broken",
            (false, false) => "not started",
        };
        write!(f, "Rings({} queues, {state})", self.slots.len())
    }
}
