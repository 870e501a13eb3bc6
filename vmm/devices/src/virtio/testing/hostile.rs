//! A driver that does not behave, and a machine in a hurry.
//!
//! A [`Storm`] draws what to do from a seed: messages that are almost right, chains that loop, overlap, point into holes and rings; indices from nowhere;
//! registers and configuration at any offset and width; and among it all the machine pauses, saves, restores and resets the
//! device, as it may at any time. Descriptors come first and calls second, so that what is random meets a device at work. The only
//! promise is that the device comes back from every call, and that after a reset it works for a driver that behaves.

use umbra_units::{Now, Rng};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestAddress;

use super::driver::{Driver, RAM, flag};
use crate::contract::{Device as _, Restore as _};
use crate::virtio::{Mmio, Virtio};

/// Chance, as a driver.
#[derive(Debug)]
pub struct Storm {
    rng: Rng,
    messages: Vec<Vec<u8>>,
}

impl Storm {
    /// The storm of this seed.
    pub const fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            messages: Vec::new(),
        }
    }

    /// A storm that knows what drivers of this device say, and says it wrong. Without that it says small numbers.
    #[must_use]
    pub fn knowing(mut self, messages: Vec<Vec<u8>>) -> Self {
        self.messages = messages;
        self
    }

    /// The storm's own dice, for what a test adds to it.
    pub const fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// `steps` random things, with a device that is at work to begin with.
    pub fn rage<D: Virtio>(&mut self, driver: &mut Driver<D>, steps: u32) {
        for _ in 0..steps {
            // A device that broke is deaf: only a driver that starts again can do more harm.
            if self.rng.chance(0.5) && driver.status() & VIRTIO_CONFIG_S_NEEDS_RESET != 0 {
                recover(driver);
            }
            match self.rng.below(16) {
                0..6 => self.message(driver),
                6..9 => self.chains(driver),
                9 => self.register(driver),
                10 => self.config(driver),
                11 => self.worker(driver),
                12 => self.machine(driver),
                13 => self.setup(driver),
                _ => self.kick(driver),
            }
        }
    }

    /// A chain that is well-formed and could mean something, in a random queue, offered and notified.
    pub fn message<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        let queue = self.queue(driver);
        driver.indirect = self.rng.chance(0.3);
        for _ in 0..=self.rng.below(3) {
            let message = self.words();
            let at = self.buffer(driver, message.len());
            if let Some(at) = at {
                driver.put(at, &message);
            }
            let at = at.unwrap_or_else(|| self.address());
            let mut pieces = Vec::new();
            self.cut(at, message.len(), 0, &mut pieces);
            let mut answer = [1, 1, 1, 21, 513, 1025, 4097][usize::from(self.below(7))];
            if self.rng.chance(0.2) {
                answer = usize::from(self.below(600));
            }
            let at = match self.buffer(driver, answer) {
                Some(at) => at,
                None => self.address(),
            };
            self.cut(at, answer, flag(VRING_DESC_F_WRITE), &mut pieces);
            if !pieces.is_empty() {
                driver.add_pieces(queue, &pieces);
            }
        }
        self.notify(driver, queue);
    }

    /// What a driver could say, perhaps with a slip.
    fn words(&mut self) -> Vec<u8> {
        let mut words = match self.messages.len() as u64 {
            0 => vec![0; usize::from(self.below(600))],
            known => self.messages[usize::try_from(self.rng.below(known)).expect("a few messages")].clone(),
        };
        if self.messages.is_empty() {
            words
                .iter_mut()
                .for_each(|word| *word = self.any().to_le_bytes()[0] % 4);
        }
        while !words.is_empty() && self.rng.chance(0.25) {
            let at = usize::try_from(self.rng.below(words.len() as u64)).expect("a short message");
            words[at] = self.any().to_le_bytes()[0];
        }
        words
    }

    /// A buffer in memory; seldom none.
    fn buffer<D: Virtio>(&mut self, driver: &mut Driver<D>, len: usize) -> Option<GuestAddress> {
        self.rng.chance(0.95).then(|| driver.buffer(len))
    }

    /// One to three pieces.
    fn cut(&mut self, at: GuestAddress, len: usize, flags: u16, pieces: &mut Vec<(GuestAddress, u32, u16)>) {
        let (mut at, mut left) = (at, u32::try_from(len).expect("a short message"));
        for _ in 0..self.rng.below(3) {
            let now = u32::try_from(self.rng.below(u64::from(left) + 1)).expect("less than 32 bits");
            pieces.push((at, now, flags));
            at = GuestAddress(at.0.wrapping_add(now.into()));
            left -= now;
        }
        if left > 0 {
            pieces.push((at, left, flags));
        }
    }

    /// Random descriptors in a random queue, offered and notified.
    pub fn chains<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        let queue = self.queue(driver);
        let size = driver.mmio.queues()[usize::from(queue)].min(256);
        for _ in 0..self.rng.below(6) {
            let index = self.below(size);
            let next = if self.rng.chance(0.9) {
                self.below(size)
            } else {
                self.any()
            };
            let piece = self.piece();
            driver.put_descriptor(queue, index, piece, next);
        }
        for _ in 0..self.rng.below(4) {
            let head = if self.rng.chance(0.98) {
                self.below(size)
            } else {
                self.any()
            };
            driver.offer_head(queue, head);
        }
        if self.rng.chance(0.02) {
            let added = self.any();
            driver.set_added(queue, added);
        }
        self.noise(driver);
        driver.watch.take_rung();
        self.notify(driver, queue);
    }

    /// An address, a length and flags. Mostly what a driver could mean.
    fn piece(&mut self) -> (GuestAddress, u32, u16) {
        let len = match self.rng.below(8) {
            0 => 0,
            1 => 1,
            2 => 16,
            3 => 16 * u32::from(self.below(16)),
            4 => u32::from(self.any()),
            5 => u32::MAX - u32::from(self.below(32)),
            _ => 512 * u32::from(self.below(9)),
        };
        let mut flags = 0;
        for (bit, p) in [
            (VRING_DESC_F_NEXT, 0.5),
            (VRING_DESC_F_WRITE, 0.5),
            (VRING_DESC_F_INDIRECT, 0.2),
        ] {
            if self.rng.chance(p) {
                flags |= flag(bit);
            }
        }
        if self.rng.chance(0.02) {
            flags = self.any();
        }
        (self.address(), len, flags)
    }

    /// An address: mostly in memory, often at an edge of it or within a queue.
    fn address(&mut self) -> GuestAddress {
        let [(low, low_bytes), (high, high_bytes)] = RAM;
        let edges = [
            low.0,
            low.0 + low_bytes as u64,
            high.0,
            high.0 + high_bytes as u64,
            u64::MAX,
        ];
        let edge = edges[usize::from(self.below(5))];
        GuestAddress(match self.rng.below(8) {
            0 => edge.wrapping_sub(self.rng.below(600)),
            1 => edge.wrapping_add(self.rng.below(600)),
            2 => 0x1000 + self.rng.below(0x4000),
            3 => self.rng.next_u64(),
            4 => high.0 + self.rng.below(high_bytes as u64),
            _ => 0x8_0000 + self.rng.below(0x7_0000),
        })
    }

    /// Random bytes where descriptors, headers and tables could be.
    fn noise<D: Virtio>(&mut self, driver: &Driver<D>) {
        if self.rng.chance(0.3) {
            let mut bytes = [0; 64];
            self.rng.fill(&mut bytes);
            // Small numbers make headers that mean something.
            for byte in &mut bytes {
                if self.rng.chance(0.6) {
                    *byte %= 4;
                }
            }
            driver.put(GuestAddress(0x8_0000 + self.rng.below(0x7_0000)), &bytes);
        }
    }

    /// Any register, or none, at any width.
    pub fn register<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        let at = if self.rng.chance(0.8) {
            4 * self.rng.below(0x40)
        } else {
            self.rng.below(0x1000)
        };
        let width = [4, 4, 4, 1, 2, 8][usize::from(self.below(6))];
        let mut data = [0; 8];
        self.rng.fill(&mut data);
        if self.rng.chance(0.7) {
            data[1..].fill(0);
        }
        if self.rng.chance(0.5) {
            driver.mmio.write(at, &data[..width]);
        } else {
            driver.mmio.read(at, &mut data[..width]);
        }
    }

    /// The configuration space, and far behind it.
    pub fn config<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        let far = if self.rng.chance(0.9) { 0x100 } else { u64::MAX - 0x1000 };
        let at = far + self.rng.below(0x80);
        let width = 1 << self.rng.below(4);
        let mut data = [0; 8];
        self.rng.fill(&mut data);
        driver.mmio.read(at, &mut data[..width]);
        driver.mmio.write(at, &data[..width]);
    }

    /// The worker is called for no reason.
    pub fn worker<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        driver.now = Now::from_us(driver.now.as_us() + self.rng.below(1_000_000));
        let work = driver.mmio.work();
        if self.rng.chance(0.5) {
            work.world(driver.now);
        } else {
            work.notified(self.any(), driver.now);
        }
    }

    /// The machine does what it may do at any time.
    pub fn machine<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        match self.rng.below(6) {
            0 => driver.mmio.pause(),
            1 => driver.mmio.resume(),
            2 => driver.mmio.reset(),
            3 => self.corrupt(driver),
            _ => self.travel(driver),
        }
    }

    /// Save and restore, if nothing is out.
    fn travel<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        driver.mmio.pause();
        let pulses = driver.watch.pulses();
        driver.mmio.work().world(driver.now);
        assert_eq!(driver.watch.pulses(), pulses, "a paused device is silent");
        if let Ok(saved) = driver.mmio.save() {
            let twin = Mmio::restore(&saved, driver.wiring()).expect("what was saved can be restored");
            assert_eq!(twin.save().as_ref(), Ok(&saved), "what is saved is what is restored");
            driver.mmio.take_over(twin);
        }
        driver.mmio.resume();
    }

    /// A record that a peer altered: restored or refused, and nothing worse.
    fn corrupt<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        driver.mmio.pause();
        if let Ok(mut saved) = driver.mmio.save() {
            for _ in 0..=self.rng.below(3) {
                let at = usize::try_from(self.rng.below(saved.bytes.len() as u64)).expect("a small record");
                saved.bytes[at] = self.any().to_le_bytes()[0];
            }
            if let Ok(twin) = Mmio::restore(&saved, driver.wiring()) {
                driver.mmio.take_over(twin);
            }
        }
        driver.mmio.resume();
        driver.watch.take_rung();
    }

    /// Another life for the device, with a queue that may be anywhere and of any size.
    pub fn setup<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        let features = if self.rng.chance(0.5) {
            u64::MAX
        } else {
            self.rng.next_u64() | 1 << 32
        };
        driver.negotiate(features);
        driver.set_up_queues();
        if self.rng.chance(0.6) {
            driver.ready_quietly();
            return;
        }
        let queue = self.queue(driver);
        driver.set_register(register::VIRTIO_MMIO_QUEUE_SEL, queue.into());
        driver.set_register(register::VIRTIO_MMIO_QUEUE_READY, 0);
        for _ in 0..self.rng.below(3) {
            let at = [
                register::VIRTIO_MMIO_QUEUE_NUM,
                register::VIRTIO_MMIO_QUEUE_DESC_LOW,
                register::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
                register::VIRTIO_MMIO_QUEUE_USED_LOW,
                register::VIRTIO_MMIO_QUEUE_USED_HIGH,
            ][usize::from(self.below(5))];
            let value = if self.rng.chance(0.5) {
                1 << self.rng.below(12)
            } else {
                self.address().0
            };
            driver.set_register(at, u32::try_from(value & 0xffff_ffff).expect("32 bits were kept"));
        }
        driver.set_register(register::VIRTIO_MMIO_QUEUE_READY, 1);
        driver.ready_quietly();
    }

    /// A notification for no reason.
    pub fn kick<D: Virtio>(&mut self, driver: &mut Driver<D>) {
        let queue = self.queue(driver);
        self.notify(driver, queue);
    }

    /// A few calls of the worker: rings that feed themselves never come to an end.
    fn notify<D: Virtio>(&mut self, driver: &mut Driver<D>, queue: u16) {
        driver.set_register(register::VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
        driver.watch.take_rung();
        let work = driver.mmio.work();
        work.notified(queue, driver.now);
        work.world(driver.now);
    }

    fn queue<D: Virtio>(&mut self, driver: &Driver<D>) -> u16 {
        let queues = driver.mmio.queues().len();
        u16::try_from(self.rng.below(queues as u64)).expect("a device has few queues")
    }

    fn below(&mut self, bound: u16) -> u16 {
        u16::try_from(self.rng.below(bound.into())).expect("less than a 16-bit bound")
    }

    fn any(&mut self) -> u16 {
        u16::try_from(self.rng.below(1 << 16)).expect("16 bits")
    }
}

/// After a storm: a driver that behaves resets the device and starts it again.
pub fn recover<D: Virtio>(driver: &mut Driver<D>) {
    driver.mmio.resume();
    driver.world_once();
    assert!(driver.negotiate(u64::MAX), "a reset device negotiates");
    driver.watch.take_rung();
    driver.set_up_queues();
    driver.ready();
}
