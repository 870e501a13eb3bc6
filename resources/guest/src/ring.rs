//! A split virtqueue, from the driver's side (virtio 1.2, Split Virtqueues).
//!
//! Requests live in *slots*: slot `n` owns descriptors `n * per_slot ..`, for as long as the ring lives, so there is
//! no free list to keep and a used id that no slot of ours was given is the device's fault and seen at once.
//!
//! ```text
//! offer(slot, parts) ... publish() -> notify? ... take() -> slot, bytes written
//! ```

use core::sync::atomic::{Ordering, fence};

/// Most descriptors of a ring.
pub const SIZE_MAX: u16 = 256;
/// Memory of a ring of any size: descriptors, available ring and used ring, each from a page of its own.
pub const RING_BYTES: usize = 3 * 4096;
/// Memory of an indirect table of [`PARTS_MAX`] descriptors.
pub const TABLE_BYTES: usize = 16 * PARTS_MAX;
/// Most parts of a request.
pub const PARTS_MAX: usize = 4;

const AVAIL: usize = 4096;
const USED: usize = 8192;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A piece of guest memory in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest-physical address.
    pub address: u64,
    /// How much.
    pub bytes: u32,
    /// The device writes it; otherwise it reads it.
    pub for_device_to_write: bool,
}

/// What a device may not do with a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It used a descriptor that no request began with.
    Foreign(u32),
    /// It claims to have used more requests than there were.
    Ahead(u16),
}

/// Whether an index that moved from `old` to `new` has passed `event` (virtio 1.2, Used Buffer Notification
/// Suppression: `vring_need_event`).
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The driver's half of one virtqueue.
pub struct Ring {
    memory: *mut u8,
    size: u16,
    per_slot: u16,
    event_idx: bool,
    polling: bool,
    offered: u16,
    published: u16,
    used: u16,
    in_flight: [bool; SIZE_MAX as usize],
}

impl Ring {
    /// A ring of `size` descriptors, `per_slot` of them for each request.
    ///
    /// # Safety
    /// `memory` must be [`RING_BYTES`] of page-aligned memory that only this ring and its device ever touch.
    pub unsafe fn new(memory: *mut u8, size: u16, per_slot: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two() && size <= SIZE_MAX && per_slot > 0 && per_slot <= size);
        // SAFETY: the caller's memory.
        unsafe { memory.write_bytes(0, RING_BYTES) };
        Self {
            memory,
            size,
            per_slot,
            event_idx,
            polling: false,
            offered: 0,
            published: 0,
            used: 0,
            in_flight: [false; SIZE_MAX as usize],
        }
    }

    /// Requests that fit at once.
    pub fn slots(&self) -> u16 {
        self.size / self.per_slot
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the device finds descriptors, available ring and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [0, AVAIL, USED].map(|at| self.memory as u64 + at as u64)
    }

    /// Whether the device has this slot.
    pub fn is_in_flight(&self, slot: u16) -> bool {
        self.in_flight[usize::from(slot)]
    }

    /// How many slots the device has, as far as has been looked.
    pub fn in_flight(&self) -> u16 {
        self.offered.wrapping_sub(self.used)
    }

    /// Puts a request into a free slot; the device sees it after [`Self::publish`].
    pub fn offer(&mut self, slot: u16, parts: &[Part]) {
        assert!(!parts.is_empty() && parts.len() <= usize::from(self.per_slot));
        let head = slot * self.per_slot;
        for (n, part) in parts.iter().enumerate() {
            let last = n + 1 == parts.len();
            self.describe(self.memory, head, n as u16, part, last);
        }
        self.make_available(slot);
    }

    /// The same by an indirect table, which must be given to this slot alone.
    ///
    /// # Safety
    /// `table` must be [`TABLE_BYTES`] of memory that only this slot and its device touch.
    pub unsafe fn offer_indirect(&mut self, slot: u16, table: *mut u8, parts: &[Part]) {
        assert!(!parts.is_empty() && parts.len() <= PARTS_MAX);
        for (n, part) in parts.iter().enumerate() {
            self.describe(table, 0, n as u16, part, n + 1 == parts.len());
        }
        let head = slot * self.per_slot;
        let bytes = 16 * parts.len() as u32;
        self.write_descriptor(self.memory, head, table as u64, bytes, INDIRECT, 0);
        self.make_available(slot);
    }

    fn describe(&self, table: *mut u8, head: u16, n: u16, part: &Part, last: bool) {
        let write = if part.for_device_to_write { WRITE } else { 0 };
        let next = if last { 0 } else { NEXT };
        self.write_descriptor(table, head + n, part.address, part.bytes, write | next, head + n + 1);
    }

    fn write_descriptor(&self, table: *mut u8, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        // SAFETY: a descriptor of the ring (`head + n` < size, by the slot arithmetic) or of a table the caller of
        // `offer_indirect` vouched for.
        unsafe {
            let at = table.add(usize::from(index) * 16);
            at.cast::<u64>().write_volatile(address);
            at.add(8).cast::<u32>().write_volatile(bytes);
            at.add(12).cast::<u16>().write_volatile(flags);
            at.add(14).cast::<u16>().write_volatile(next);
        }
    }

    fn make_available(&mut self, slot: u16) {
        assert!(!self.in_flight[usize::from(slot)], "slot {slot} offered twice");
        self.in_flight[usize::from(slot)] = true;
        let place = usize::from(self.offered % self.size);
        self.set16(AVAIL + 4 + 2 * place, slot * self.per_slot);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device everything offered so far. Whether it wants to be notified of that.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.offered);
        if old == new {
            return false;
        }
        fence(Ordering::Release);
        self.set16(AVAIL + 2, new);
        self.published = new;
        // The device sets its wish before it looks at the index a last time; so the index goes first here.
        fence(Ordering::SeqCst);
        if self.event_idx {
            passed(self.get16(USED + 4 + 8 * usize::from(self.size)), new, old)
        } else {
            self.get16(USED) & NO_NOTIFY == 0
        }
    }

    /// A request the device is done with, and how many bytes it wrote.
    #[inline]
    pub fn take(&mut self) -> Result<Option<(u16, u32)>, Flaw> {
        let there = self.get16(USED + 2);
        if there == self.used {
            return Ok(None);
        }
        if there.wrapping_sub(self.used) > self.published.wrapping_sub(self.used) {
            return Err(Flaw::Ahead(there));
        }
        fence(Ordering::Acquire);
        let at = USED + 4 + 8 * usize::from(self.used % self.size);
        let (id, written) = (self.get32(at), self.get32(at + 4));
        let slot = id / u32::from(self.per_slot);
        let known = id % u32::from(self.per_slot) == 0 && slot < u32::from(self.slots());
        if !known || !self.in_flight[slot as usize] {
            return Err(Flaw::Foreign(id));
        }
        self.in_flight[slot as usize] = false;
        self.used = self.used.wrapping_add(1);
        if self.polling && self.used.is_multiple_of(0x1000) {
            self.look_away();
        }
        Ok(Some((slot as u16, written)))
    }

    /// Whether there is something to take.
    #[inline]
    pub fn has_used(&self) -> bool {
        self.get16(USED + 2) != self.used
    }

    /// Asks for no interrupts from now on.
    pub fn poll(&mut self) {
        self.polling = true;
        self.set16(AVAIL, NO_INTERRUPT);
        self.look_away();
    }

    /// With event indices there is no "never": half a round away, and moved on in time.
    fn look_away(&self) {
        self.set16(AVAIL + 4 + 2 * usize::from(self.size), self.used.wrapping_add(0x8000));
    }

    /// Asks for an interrupt at the next request the device is done with. False if there already is one: look again.
    pub fn await_interrupt(&mut self) -> bool {
        self.set16(AVAIL + 4 + 2 * usize::from(self.size), self.used);
        fence(Ordering::SeqCst);
        !self.has_used()
    }

    fn get16(&self, at: usize) -> u16 {
        // SAFETY: within the ring's memory, whatever the size: see the constants.
        unsafe { self.memory.add(at).cast::<u16>().read_volatile() }
    }

    fn get32(&self, at: usize) -> u32 {
        // SAFETY: as above.
        unsafe { self.memory.add(at).cast::<u32>().read_volatile() }
    }

    fn set16(&self, at: usize, value: u16) {
        // SAFETY: as above.
        unsafe { self.memory.add(at).cast::<u16>().write_volatile(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Memory([u8; RING_BYTES]);

    /// A ring and a device that is one by hand.
    struct Pair {
        memory: Box<Memory>,
        ring: Ring,
    }

    impl Pair {
        fn new(size: u16, per_slot: u16, event_idx: bool) -> Self {
            let mut memory = Box::new(Memory([0xff; RING_BYTES]));
            // SAFETY: the box outlives the ring, which is dropped with it, and nobody else uses it.
            let ring = unsafe { Ring::new(memory.0.as_mut_ptr(), size, per_slot, event_idx) };
            Self { memory, ring }
        }

        fn word(&self, at: usize) -> u16 {
            self.ring.get16(at)
        }

        fn uses(&mut self, nth: u16, id: u32, written: u32) {
            let at = USED + 4 + 8 * usize::from(nth % self.ring.size);
            self.memory.0[at..at + 4].copy_from_slice(&id.to_le_bytes());
            self.memory.0[at + 4..at + 8].copy_from_slice(&written.to_le_bytes());
            self.ring.set16(USED + 2, nth.wrapping_add(1));
        }
    }

    const fn part(address: u64, bytes: u32, for_device_to_write: bool) -> Part {
        Part {
            address,
            bytes,
            for_device_to_write,
        }
    }

    #[test]
    fn a_request_is_a_chain_of_the_slots_own_descriptors() {
        let mut pair = Pair::new(16, 3, false);
        pair.ring.offer(
            2,
            &[part(0x1000, 16, false), part(0x2000, 512, true), part(0x3000, 1, true)],
        );
        assert_eq!(pair.word(AVAIL + 2), 0, "nothing is shown before it is published");
        assert!(pair.ring.publish(), "a device that says nothing wants to be notified");
        assert_eq!((pair.word(AVAIL + 2), pair.word(AVAIL + 4)), (1, 6));
        let flags = [6, 7, 8].map(|n| (pair.word(n * 16 + 12), pair.word(n * 16 + 14)));
        assert_eq!(flags, [(NEXT, 7), (NEXT | WRITE, 8), (WRITE, 9)]);
        assert_eq!(pair.ring.take(), Ok(None));
        pair.uses(0, 6, 513);
        assert_eq!(pair.ring.take(), Ok(Some((2, 513))));
        assert!(!pair.ring.is_in_flight(2));
    }

    #[test]
    fn rings_go_round_more_often_than_an_index_can_count() {
        let mut pair = Pair::new(4, 1, true);
        for n in 0..70_000u32 {
            let slot = (n % 4) as u16;
            pair.ring.offer(slot, &[part(0x1000, 1, true)]);
            pair.ring.publish();
            pair.uses(n as u16, u32::from(slot), n);
            assert_eq!(pair.ring.take(), Ok(Some((slot, n))));
        }
    }

    #[test]
    fn a_device_that_answers_what_nobody_asked_is_found_out() {
        for id in [0, 1, 6, 15, 16, u32::MAX] {
            let mut pair = Pair::new(16, 3, false);
            pair.ring.offer(1, &[part(0x1000, 16, false)]);
            pair.ring.publish();
            pair.uses(0, id, 0);
            assert_eq!(pair.ring.take(), Err(Flaw::Foreign(id)), "{id}");
        }
        let mut pair = Pair::new(16, 3, false);
        pair.ring.set16(USED + 2, 1);
        assert_eq!(pair.ring.take(), Err(Flaw::Ahead(1)));
    }

    #[test]
    fn a_device_is_notified_only_when_it_wishes() {
        let mut pair = Pair::new(8, 1, true);
        pair.ring.set16(USED + 4 + 8 * 8, 1); // tell me when the second request is there
        pair.ring.offer(0, &[part(0x1000, 1, true)]);
        assert!(!pair.ring.publish());
        pair.ring.offer(1, &[part(0x1000, 1, true)]);
        assert!(pair.ring.publish());
        assert!(!pair.ring.publish(), "nothing new");
        let mut plain = Pair::new(8, 1, false);
        plain.ring.set16(USED, NO_NOTIFY);
        plain.ring.offer(0, &[part(0x1000, 1, true)]);
        assert!(!plain.ring.publish());
    }

    #[test]
    fn a_driver_that_polls_is_never_interrupted_and_one_that_waits_is_told_if_it_need_not() {
        let mut pair = Pair::new(4, 1, true);
        pair.ring.poll();
        for n in 0..70_000u32 {
            pair.ring.offer((n % 4) as u16, &[part(0x1000, 1, true)]);
            pair.ring.publish();
            pair.uses(n as u16, n % 4, 0);
            let event = pair.word(AVAIL + 4 + 2 * 4);
            assert!(!passed(event, (n as u16).wrapping_add(1), n as u16), "{n}");
            pair.ring.take().unwrap();
        }
        assert!(pair.ring.await_interrupt());
        pair.ring.offer(0, &[part(0x1000, 1, true)]);
        pair.ring.publish();
        pair.uses(70_000u32 as u16, 0, 0);
        assert!(!pair.ring.await_interrupt(), "it is there already");
    }

    #[test]
    fn an_indirect_request_takes_one_descriptor() {
        let mut pair = Pair::new(4, 1, false);
        let mut table = [0u8; TABLE_BYTES];
        // SAFETY: `table` is ours, and the device of this test does not look at it.
        unsafe {
            pair.ring
                .offer_indirect(3, table.as_mut_ptr(), &[part(1, 2, false), part(3, 4, true)])
        };
        assert_eq!((pair.word(3 * 16 + 8), pair.word(3 * 16 + 12)), (32, INDIRECT));
        assert_eq!(table[12..16], [1, 0, 1, 0]);
        assert_eq!(table[28..30], [2, 0]);
    }
}
