//! A driver that behaves.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use umbra_units::{Now, PAGE_SIZE};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use crate::contract::{Device, Line, Restore as _};
use crate::virtio::{Bell, Mmio, Ram, Virtio, Wake, Wiring};

/// The guest's memory: two runs with a hole between them.
pub const RAM: [(GuestAddress, usize); 2] = [(GuestAddress(0), 1 << 20), (GuestAddress(2 << 20), 1 << 20)];

/// Queues lie below, buffers from here to the end of the first run.
const BUFFERS: u64 = 0x8_0000;
/// Room for one queue of up to 256 places, and for the device's most queues below [`BUFFERS`].
const QUEUE_BYTES: u64 = 0x2000;

/// A driver, its guest's memory, its device and the device's worker, all in one thread.
pub struct Driver<D: Virtio> {
    /// The device.
    pub mmio: Mmio<D>,
    /// What the device's line and bell did.
    pub watch: Arc<Watch>,
    /// The time, as the worker knows it.
    pub now: Now,
    /// Chains are put into tables of their own.
    pub indirect: bool,
    wiring: Wiring<D::Wiring>,
    queues: Vec<Queue>,
    /// Where the next buffer goes.
    free: u64,
}

/// The interrupt line and the bell of a device under test.
#[derive(Debug, Default)]
pub struct Watch {
    pulses: AtomicU64,
    rung: Mutex<BTreeSet<u16>>,
}

/// A chain that was put into a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The descriptor it begins with.
    pub head: u16,
    /// Where its readable buffers are.
    pub readable: Vec<GuestAddress>,
    /// Where its writable buffers are.
    pub writable: Vec<GuestAddress>,
}

/// A queue from the driver's side.
#[derive(Debug, Clone, Default)]
struct Queue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    /// The next descriptor to be used: chains take consecutive ones, round and round.
    next: u16,
    /// The index in the available ring.
    added: u16,
    /// The index in the used ring, as far as it was looked at.
    seen: u16,
}

impl Watch {
    /// How often the line was pulsed.
    pub fn pulses(&self) -> u64 {
        self.pulses.load(Ordering::SeqCst)
    }

    /// The queues whose bell was rung since this was last asked.
    pub fn take_rung(&self) -> BTreeSet<u16> {
        std::mem::take(&mut *self.rung.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Line for Watch {
    fn pulse(&self) {
        self.pulses.fetch_add(1, Ordering::SeqCst);
    }
}

impl Bell for Watch {
    fn ring(&self, queue: u16) {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner).insert(queue);
    }
}

impl<D: Virtio> Driver<D> {
    /// A device at power-on, paused, in a guest whose memory is all zeros.
    ///
    /// # Panics
    /// When the host has not two mebibytes.
    pub fn new(device: D::Wiring) -> Self {
        let watch = Arc::new(Watch::default());
        let wiring = Wiring {
            ram: Ram::from_ranges(&RAM).expect("the host has two mebibytes"),
            line: watch.clone(),
            bell: watch.clone(),
            device,
        };
        let mmio = Mmio::new(wiring.clone());
        let queues = mmio.queues().len();
        Self {
            mmio,
            watch,
            now: Now::ZERO,
            indirect: false,
            wiring,
            queues: vec![Queue::default(); queues],
            free: BUFFERS,
        }
    }

    /// A device at work: resumed, everything negotiated that it offers, every queue in use.
    pub fn at_work(device: D::Wiring) -> Self {
        let mut driver = Self::new(device);
        driver.mmio.resume();
        driver.negotiate(u64::MAX);
        driver.set_up_queues();
        driver.ready();
        driver
    }

    /// What the device is connected to, for another one in its place.
    pub fn wiring(&self) -> Wiring<D::Wiring> {
        self.wiring.clone()
    }

    /// Guest memory.
    pub const fn ram(&self) -> &Ram {
        &self.wiring.ram
    }

    /// Read a register.
    pub fn register(&mut self, at: u32) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(at.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// Write a register.
    pub fn set_register(&mut self, at: u32, value: u32) {
        self.mmio.write(at.into(), &value.to_le_bytes());
    }

    /// The features that are offered.
    pub fn offered(&mut self) -> u64 {
        let mut half = |which| {
            self.set_register(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, which);
            u64::from(self.register(register::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// Settle for those of `features` that are offered; says whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        let features = features & self.offered();
        self.negotiate_exactly(features)
    }

    /// Settle for these features, offered or not; says whether the device agreed.
    pub fn negotiate_exactly(&mut self, features: u64) -> bool {
        let status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        self.set_register(register::VIRTIO_MMIO_STATUS, 0);
        self.set_register(register::VIRTIO_MMIO_STATUS, status);
        for (which, shift) in [(0, 0), (1, 32)] {
            self.set_register(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, which);
            let half = u32::try_from(features >> shift & 0xffff_ffff).expect("32 bits were kept");
            self.set_register(register::VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.set_register(register::VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_FEATURES_OK);
        self.status() & VIRTIO_CONFIG_S_FEATURES_OK != 0
    }

    /// The status register.
    pub fn status(&mut self) -> u32 {
        self.register(register::VIRTIO_MMIO_STATUS)
    }

    /// Give every queue its place, with as many entries as it may have, at most 256.
    pub fn set_up_queues(&mut self) {
        for (n, at) in (0..self.queues.len()).zip((0x1000..).step_by(0x2000)) {
            self.set_up_queue(n, at);
        }
    }

    fn set_up_queue(&mut self, n: usize, at: u64) {
        assert!(at + QUEUE_BYTES <= BUFFERS, "queue {n} lies among the buffers");
        self.set_register(
            register::VIRTIO_MMIO_QUEUE_SEL,
            u32::try_from(n).expect("a device has few queues"),
        );
        let size = self.register(register::VIRTIO_MMIO_QUEUE_NUM_MAX).min(256);
        let queue = Queue {
            size: u16::try_from(size).expect("at most 256"),
            descriptors: at,
            available: at + 0x1000,
            used: at + 0x1400,
            ..Queue::default()
        };
        self.forget_rings(&queue);
        self.set_register(register::VIRTIO_MMIO_QUEUE_NUM, size);
        for (low, address) in [
            (register::VIRTIO_MMIO_QUEUE_DESC_LOW, queue.descriptors),
            (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, queue.available),
            (register::VIRTIO_MMIO_QUEUE_USED_LOW, queue.used),
        ] {
            self.set_register(low, u32::try_from(address).expect("queues lie in the first mebibyte"));
            self.set_register(low + 4, 0);
        }
        self.set_register(register::VIRTIO_MMIO_QUEUE_READY, 1);
        self.queues[n] = queue;
    }

    fn forget_rings(&self, queue: &Queue) {
        let bytes = usize::try_from(QUEUE_BYTES).expect("two pages");
        self.put(GuestAddress(queue.descriptors), &vec![0; bytes]);
    }

    /// Say that everything is set up, and let the worker hear of it.
    pub fn ready(&mut self) -> Wake {
        let status = self.status();
        self.set_register(register::VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK);
        self.run()
    }

    /// Say that everything is set up, and let nobody hear of it.
    pub(super) fn ready_quietly(&mut self) {
        let status = self.status();
        self.set_register(register::VIRTIO_MMIO_STATUS, status | VIRTIO_CONFIG_S_DRIVER_OK);
        self.watch.take_rung();
    }

    /// Put a chain into a queue, without a word: buffers to be read, and lengths of buffers to be written.
    pub fn add(&mut self, queue: u16, readable: &[&[u8]], writable: &[u32]) -> Placed {
        let mut pieces = Vec::new();
        let mut placed = Placed {
            head: 0,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        for bytes in readable {
            let at = self.buffer(bytes.len());
            self.put(at, bytes);
            placed.readable.push(at);
            pieces.push((at, u32::try_from(bytes.len()).expect("a small buffer"), 0));
        }
        for len in writable {
            let at = self.buffer(usize::try_from(*len).expect("a small buffer"));
            placed.writable.push(at);
            pieces.push((at, *len, flag(VRING_DESC_F_WRITE)));
        }
        placed.head = self.add_pieces(queue, &pieces);
        placed
    }

    /// Put a chain of (address, length, flags) into a queue; `NEXT` is added where it belongs.
    pub fn add_pieces(&mut self, queue: u16, pieces: &[(GuestAddress, u32, u16)]) -> u16 {
        if !self.indirect {
            let first = self.queues[usize::from(queue)].next;
            self.put_table(queue, None, first, pieces);
            return self.offer(queue, pieces.len());
        }
        let table = self.buffer(16 * pieces.len());
        self.put_table(queue, Some(table), 0, pieces);
        let first = self.queues[usize::from(queue)].next;
        let bytes = u32::try_from(16 * pieces.len()).expect("a short chain");
        self.put_descriptor(queue, first, (table, bytes, flag(VRING_DESC_F_INDIRECT)), 0);
        self.offer(queue, 1)
    }

    fn put_table(&self, queue: u16, table: Option<GuestAddress>, first: u16, pieces: &[(GuestAddress, u32, u16)]) {
        let size = self.queues[usize::from(queue)].size;
        for (n, (at, len, flags)) in (0u16..).zip(pieces) {
            let last = usize::from(n) + 1 == pieces.len();
            let flags = if last { *flags } else { flags | flag(VRING_DESC_F_NEXT) };
            let (index, next) = match table {
                Some(_) => (n, n + 1),
                None => ((first + n) % size, (first + n + 1) % size),
            };
            let base = table.map_or_else(|| self.queues[usize::from(queue)].descriptors, |table| table.0);
            self.put_descriptor_at(base, index, (*at, *len, flags), next);
        }
    }

    /// Write one descriptor of a queue's table.
    pub fn put_descriptor(&self, queue: u16, index: u16, piece: (GuestAddress, u32, u16), next: u16) {
        self.put_descriptor_at(self.queues[usize::from(queue)].descriptors, index, piece, next);
    }

    fn put_descriptor_at(&self, base: u64, index: u16, (at, len, flags): (GuestAddress, u32, u16), next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(GuestAddress(base + 16 * u64::from(index)), &bytes);
    }

    /// Put the descriptors written last into the available ring.
    fn offer(&mut self, queue: u16, descriptors: usize) -> u16 {
        let place = &mut self.queues[usize::from(queue)];
        let head = place.next;
        place.next = (place.next + u16::try_from(descriptors).expect("a short chain")) % place.size;
        self.offer_head(queue, head);
        head
    }

    /// Put a head into the available ring, whatever is there.
    pub fn offer_head(&mut self, queue: u16, head: u16) {
        let place = &mut self.queues[usize::from(queue)];
        let entry = place.available + 4 + 2 * u64::from(place.added % place.size);
        place.added = place.added.wrapping_add(1);
        let (index, added) = (place.available + 2, place.added);
        self.put(GuestAddress(entry), &head.to_le_bytes());
        self.put(GuestAddress(index), &added.to_le_bytes());
    }

    /// The index of the available ring, as the driver counts and as it stands in memory after [`set_added`](Self::set_added).
    pub fn added(&self, queue: u16) -> u16 {
        self.queues[usize::from(queue)].added
    }

    /// Write an index into the available ring that has nothing to do with what was added.
    pub fn set_added(&mut self, queue: u16, added: u16) {
        let place = &mut self.queues[usize::from(queue)];
        place.added = added;
        let index = place.available + 2;
        self.put(GuestAddress(index), &added.to_le_bytes());
    }

    /// Ask for no interrupts, or for interrupts: the crude way, without `EVENT_IDX`.
    pub fn set_available_flags(&self, queue: u16, flags: u16) {
        self.put(
            GuestAddress(self.queues[usize::from(queue)].available),
            &flags.to_le_bytes(),
        );
    }

    /// The device's flags: whether it wants to be notified, without `EVENT_IDX`.
    pub fn used_flags(&self, queue: u16) -> u16 {
        self.ram()
            .read_obj(GuestAddress(self.queues[usize::from(queue)].used))
            .expect("queues lie in memory")
    }

    /// Ask for an interrupt once this many answers are in the used ring. With `EVENT_IDX`.
    pub fn set_used_event(&self, queue: u16, after: u16) {
        let place = &self.queues[usize::from(queue)];
        let at = place.available + 4 + 2 * u64::from(place.size);
        self.put(GuestAddress(at), &after.to_le_bytes());
    }

    /// At which index of the available ring the device wants to be notified. With `EVENT_IDX`.
    pub fn available_event(&self, queue: u16) -> u16 {
        let place = &self.queues[usize::from(queue)];
        let at = place.used + 4 + 8 * u64::from(place.size);
        self.ram().read_obj(GuestAddress(at)).expect("queues lie in memory")
    }

    /// Notify the device of a queue, and let its worker do all there is to do.
    pub fn kick(&mut self, queue: u16) -> Wake {
        self.set_register(register::VIRTIO_MMIO_QUEUE_NOTIFY, queue.into());
        self.run()
    }

    /// Let the worker do all there is to do, for as long as there is more.
    ///
    /// # Panics
    /// When the device never comes to an end.
    pub fn run(&mut self) -> Wake {
        let work = self.mmio.work();
        let mut wake = Wake::Idle;
        for queue in self.watch.take_rung() {
            wake = wake.min(work.notified(queue, self.now));
        }
        self.until_idle(wake)
    }

    /// Tell the device that the world moved, and let its worker do all there is to do.
    pub fn world(&mut self) -> Wake {
        let wake = self.mmio.work().world(self.now);
        self.until_idle(wake)
    }

    /// Tell the device once that the world moved.
    pub(super) fn world_once(&self) -> Wake {
        self.mmio.work().world(self.now)
    }

    fn until_idle(&self, mut wake: Wake) -> Wake {
        for _ in 0..10_000 {
            if wake != Wake::Again {
                return wake;
            }
            wake = self.mmio.work().world(self.now);
        }
        panic!("the device never comes to an end");
    }

    /// The next answer: the chain's head, and how many bytes were written.
    pub fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let place = &mut self.queues[usize::from(queue)];
        let ram = &self.wiring.ram;
        let index: u16 = ram
            .read_obj(GuestAddress(place.used + 2))
            .expect("queues lie in memory");
        if index == place.seen {
            return None;
        }
        let entry = place.used + 4 + 8 * u64::from(place.seen % place.size);
        let [head, len]: [u32; 2] = ram.read_obj(GuestAddress(entry)).expect("queues lie in memory");
        place.seen = place.seen.wrapping_add(1);
        Some((u16::try_from(head).expect("a head has 16 bits"), len))
    }

    /// Whether every answer was looked at.
    pub fn is_all_seen(&self, queue: u16) -> bool {
        let place = &self.queues[usize::from(queue)];
        let index = self.ram().read_obj(GuestAddress(place.used + 2));
        place.seen == index.unwrap_or(place.seen)
    }

    /// One request and its answer: the bytes written, or `None` if there is no answer yet.
    pub fn request(&mut self, queue: u16, readable: &[&[u8]], writable: u32) -> Option<Vec<u8>> {
        let placed = self.add(queue, readable, &[writable]);
        self.kick(queue);
        let (head, written) = self.used(queue)?;
        assert_eq!(head, placed.head, "answers come in order");
        Some(self.get(placed.writable[0], written))
    }

    /// Acknowledge every interrupt; says which bits were set.
    pub fn acknowledge(&mut self) -> u32 {
        let status = self.register(register::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.set_register(register::VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    /// Move the device: pause it, finish what is out, save it, and go on with one restored from that, in its place.
    ///
    /// # Panics
    /// When it cannot be saved or restored.
    pub fn travel(&mut self) {
        self.mmio.pause();
        self.world();
        let saved = self.mmio.save().expect("a paused device that is not busy can be saved");
        let twin = Mmio::restore(&saved, self.wiring()).expect("what was saved can be restored");
        self.mmio.take_over(twin);
        self.mmio.resume();
        self.run();
    }

    /// Room for `len` bytes, at an odd place. Buffers are reused after half a mebibyte.
    pub fn buffer(&mut self, len: usize) -> GuestAddress {
        let end = RAM[0].1 as u64;
        if self.free + len as u64 + 8 > end {
            self.free = BUFFERS;
        }
        let at = self.free;
        self.free += len as u64 + 7;
        assert!(self.free <= end, "a buffer of {len} bytes does not fit");
        GuestAddress(at)
    }

    /// Bytes of guest memory.
    pub fn get(&self, at: GuestAddress, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).expect("a small buffer")];
        self.ram().read_slice(&mut bytes, at).expect("a buffer lies in memory");
        bytes
    }

    /// Write guest memory, as a vCPU would: not marked, as far as that can be told apart.
    pub fn put(&self, at: GuestAddress, bytes: &[u8]) {
        self.ram().write_slice(bytes, at).expect("a buffer lies in memory");
    }

    /// All of guest memory, page by page, to be compared by [`unmarked`](Self::unmarked). Forgets what was marked.
    pub fn snapshot(&self) -> Vec<(GuestAddress, Vec<u8>)> {
        self.ram()
            .iter()
            .for_each(|region| region.get_mmap().bitmap().take(|_, _| {}));
        self.pages()
    }

    /// Pages that changed since `snapshot` and were not marked.
    pub fn unmarked(&self, snapshot: &[(GuestAddress, Vec<u8>)]) -> Vec<GuestAddress> {
        let changed = self
            .pages()
            .into_iter()
            .zip(snapshot)
            .filter(|(now, then)| now != *then);
        changed
            .map(|((at, _), _)| at)
            .filter(|at| !self.is_marked(*at))
            .collect()
    }

    fn is_marked(&self, at: GuestAddress) -> bool {
        use vm_memory::bitmap::Bitmap as _;
        self.ram().to_region_addr(at).is_some_and(|(region, offset)| {
            region
                .get_mmap()
                .bitmap()
                .dirty_at(usize::try_from(offset.0).unwrap_or(usize::MAX))
        })
    }

    fn pages(&self) -> Vec<(GuestAddress, Vec<u8>)> {
        RAM.iter()
            .flat_map(|(at, bytes)| (at.0..at.0 + *bytes as u64).step_by(PAGE_SIZE))
            .map(|at| (GuestAddress(at), self.get(GuestAddress(at), 4096)))
            .collect()
    }
}

/// A descriptor's flag, which has 16 bits.
pub(super) fn flag(bit: u32) -> u16 {
    u16::try_from(bit).expect("descriptor flags have 16 bits")
}

impl<D: Virtio> fmt::Debug for Driver<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Driver of {:?}", self.mmio)
    }
}
