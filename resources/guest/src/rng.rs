//! `work=rng`: random numbers that look random.
//!
//! Not a test of their quality, but of the way they come: every request brings new bytes, as many as it says, with about
//! as many ones as zeros, into memory that held something else.

use crate::EXIT_CORRUPT;
use crate::boot::{CpuCell, Share};
use crate::console::{fatal, say};
use crate::virtio::{ENTROPY, Queue, Shared, Transport};
use umbra_guest::ring::{Part, RING_BYTES};

const WORDS: usize = 64;
const BYTES: usize = WORDS * 8;
/// Requests at once.
const SLOTS: u16 = 4;
/// Time between two lines.
const LINE_US: u64 = 100_000;

/// Memory it shares with its device.
pub(crate) const SHARED_BYTES: u64 = RING_BYTES as u64 + (SLOTS as usize * BYTES).next_multiple_of(4096) as u64;

/// `work=rng`.
pub(crate) struct Random {
    transport: Transport,
    queue: Queue,
    buffers: *mut u8,
    started: [u64; SLOTS as usize],
    last: [u64; 2],
    bytes: u64,
    next_line: u64,
    line_ticks: u64,
}

impl Random {
    /// Starts the first source of entropy there is.
    pub(crate) fn new(share: &Share) -> Self {
        let mut shared = Shared::new(share);
        let mut transport = Transport::find(share, ENTROPY, 0);
        let queue = transport.queue(0, 1, &mut shared);
        let buffers = shared.take(u64::from(SLOTS) * BYTES as u64);
        transport.start();
        Self {
            transport,
            queue,
            buffers,
            started: [0; SLOTS as usize],
            last: [0; 2],
            bytes: 0,
            next_line: 0,
            line_ticks: share.clock.ticks(LINE_US),
        }
    }

    /// One turn.
    pub(crate) fn step(&mut self, me: CpuCell, now: u64) -> Option<u64> {
        if self.transport.listen(now).requests {
            while let Some((slot, written)) = self.queue.take() {
                self.judge(slot, written as usize);
                me.set_ops(me.ops() + 1);
            }
        }
        if now >= self.next_line {
            self.next_line = now + self.line_ticks;
            say!("umbra-guest: rng {} ok", self.bytes);
            for slot in (0..SLOTS).filter(|&slot| self.queue.is_in_flight(slot)) {
                self.transport
                    .is_patient("rng-request", self.started[usize::from(slot)], now);
            }
        }
        for slot in 0..SLOTS.min(self.queue.slots()) {
            if !self.queue.is_in_flight(slot) {
                self.ask(slot, now);
            }
        }
        self.queue.publish();
        self.transport.expect(now, &mut [&mut self.queue])
    }

    fn word(&self, slot: u16, n: usize) -> *mut u64 {
        self.buffers.cast::<u64>().wrapping_add(usize::from(slot) * WORDS + n)
    }

    fn ask(&mut self, slot: u16, now: u64) {
        for n in 0..WORDS {
            // SAFETY: the buffer of a free slot.
            unsafe { self.word(slot, n).write_volatile(0) };
        }
        self.started[usize::from(slot)] = now;
        let part = Part {
            address: self.word(slot, 0) as u64,
            bytes: BYTES as u32,
            for_device_to_write: true,
        };
        // SAFETY: as above.
        unsafe { self.queue.offer(slot, None, &[part]) };
    }

    fn judge(&mut self, slot: u16, written: usize) {
        let mut ones = 0;
        for n in 0..written.min(BYTES) / 8 {
            // SAFETY: the slot's own buffer, which the device is done with.
            let word = unsafe { self.word(slot, n).read_volatile() };
            ones += word.count_ones() as usize;
            // Once in 2^64 times it may; then somebody has a story to tell.
            if word == 0 || self.last.contains(&word) {
                fatal(
                    EXIT_CORRUPT,
                    format_args!("CORRUPT what=rng slot={slot} word={n} want=news found={word:#x}"),
                );
            }
            self.last = [self.last[1], word];
        }
        let bits = written.min(BYTES) / 8 * 64;
        // Ten standard deviations of a fair coin, plus one for nothing at all.
        let off = ones.abs_diff(bits / 2);
        if written == 0 || written > BYTES || off * off > 25 * bits + 1 {
            fatal(
                EXIT_CORRUPT,
                format_args!("CORRUPT what=rng slot={slot} want={BYTES} found={written} ones={ones}"),
            );
        }
        self.bytes += written as u64;
    }
}
