//! A disk: its requests, and `work=blk`, which times them.
//!
//! [`Disk`] is the driver: it keeps as many requests in flight as it is given slots, each with a header, a status and
//! a table of its own. [`Timed`] asks for one thing over and over and says how long it took. The other user of a disk
//! is [`crate::blkcheck`].

use crate::boot::{CpuCell, Share};
use crate::console::say;
use crate::virtio::{BLOCK, Queue, Shared, Transport};
use crate::{cpu, refuse};
use core::sync::atomic::{Ordering, compiler_fence};
use umbra_guest::config::{DEPTH_MAX, Op, Pattern};
use umbra_guest::latency::Latencies;
use umbra_guest::pattern::Rng;
use umbra_guest::ring::{Part, RING_BYTES};

/// Features (virtio 1.2, Block Device, Feature bits).
const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;

/// Bytes of a sector, in which all positions are counted.
pub(crate) const SECTOR: u64 = 512;
/// What a slot shares with the device besides data: header at 0, status at 16, table at 32.
const CONTROL_BYTES: u64 = 128;
/// Memory of the driver itself.
pub(crate) const DRIVER_BYTES: u64 = RING_BYTES as u64 + CONTROL_BYTES * DEPTH_MAX as u64;

/// Request types (virtio 1.2, Block Device, Device Operation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// From the disk.
    Read = 0,
    /// To the disk.
    Write = 1,
    /// What was written stays written.
    Flush = 4,
}

impl Kind {
    /// One word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// The driver of one disk.
pub(crate) struct Disk {
    pub(crate) transport: Transport,
    queue: Queue,
    controls: *mut u8,
    depth: u16,
    /// When each slot's request was made.
    started: [u64; DEPTH_MAX as usize],
}

impl Disk {
    /// Starts the first disk there is.
    pub(crate) fn start(share: &Share, shared: &mut Shared) -> Self {
        let mut transport = Transport::find(share, BLOCK, RO | FLUSH);
        let per_slot = if transport.indirect() { 1 } else { 3 };
        let queue = transport.queue(0, per_slot, shared);
        let depth = share.config.depth.min(queue.slots());
        let controls = shared.take(CONTROL_BYTES * u64::from(DEPTH_MAX));
        transport.start();
        Self {
            transport,
            queue,
            controls,
            depth,
            started: [0; DEPTH_MAX as usize],
        }
    }

    /// Sectors there are (virtio 1.2, Block Device, Device configuration layout: `capacity`).
    pub(crate) fn sectors(&self) -> u64 {
        u64::from(self.transport.config32(0)) | (u64::from(self.transport.config32(4)) << 32)
    }

    /// Whether it refuses writes.
    pub(crate) fn is_read_only(&self) -> bool {
        self.transport.has(RO)
    }

    /// Whether there is a cache to be flushed.
    pub(crate) fn flushes(&self) -> bool {
        self.transport.has(FLUSH)
    }

    /// Slots in use.
    pub(crate) fn depth(&self) -> u16 {
        self.depth
    }

    /// How many requests are with the device.
    pub(crate) fn in_flight(&self) -> u16 {
        self.queue.in_flight()
    }

    /// A slot that is free.
    pub(crate) fn free_slot(&self) -> Option<u16> {
        if self.queue.in_flight() >= self.depth {
            return None;
        }
        (0..self.depth).find(|&slot| !self.queue.is_in_flight(slot))
    }

    /// Makes a request with a free slot; the device sees it after [`Self::publish`].
    ///
    /// # Safety
    /// `data` must be so many bytes that are this request's alone until it is taken again.
    pub(crate) unsafe fn ask(&mut self, slot: u16, kind: Kind, sector: u64, data: *mut u8, bytes: u32, now: u64) {
        // SAFETY: each slot has its own part of `controls`, and it is not in flight (the ring checks that).
        let control = unsafe { self.controls.add(usize::from(slot) * CONTROL_BYTES as usize) };
        // SAFETY: as above.
        unsafe {
            control.cast::<u32>().write_volatile(kind as u32);
            control.add(4).cast::<u32>().write_volatile(0);
            control.add(8).cast::<u64>().write_volatile(sector);
            // No device ever says this: a status that was not written is not mistaken for one that was.
            control.add(16).write_volatile(0xff);
        }
        compiler_fence(Ordering::SeqCst);
        let part = |address: u64, bytes, for_device_to_write| Part {
            address,
            bytes,
            for_device_to_write,
        };
        let header = part(control as u64, 16, false);
        let status = part(control as u64 + 16, 1, true);
        let data = part(data as u64, bytes, kind == Kind::Read);
        let table = self.transport.indirect().then(|| control.wrapping_add(32));
        self.started[usize::from(slot)] = now;
        // SAFETY: the slot's own control, and the caller's data.
        unsafe {
            if kind == Kind::Flush {
                self.queue.offer(slot, table, &[header, status]);
            } else {
                self.queue.offer(slot, table, &[header, data, status]);
            }
        }
    }

    /// Shows the device what was asked.
    pub(crate) fn publish(&mut self) {
        self.queue.publish();
    }

    /// An answer: its slot, its status (0 is well), and how long it took.
    #[inline]
    pub(crate) fn answer(&mut self, now: u64) -> Option<(u16, u8, u64)> {
        let (slot, _) = self.queue.take()?;
        let at = usize::from(slot) * CONTROL_BYTES as usize + 16;
        // SAFETY: the slot's own control.
        let status = unsafe { self.controls.add(at).read_volatile() };
        Some((slot, status, now.saturating_sub(self.started[usize::from(slot)])))
    }

    /// Until when there is nothing to do but wait for answers.
    pub(crate) fn rest(&mut self, now: u64) -> Option<u64> {
        self.transport.expect(now, &mut [&mut self.queue])
    }

    /// Stops the guest if an answer will not come any more.
    pub(crate) fn is_patient(&self, now: u64) {
        for slot in (0..self.depth).filter(|&slot| self.queue.is_in_flight(slot)) {
            self.transport
                .is_patient("disk-request", self.started[usize::from(slot)], now);
        }
    }
}

/// Before it counts: caches fill, the host's threads start.
const WARM_UP_US: u64 = 300_000;

/// `work=blk`.
pub(crate) struct Timed {
    disk: Disk,
    op: Op,
    pattern: Pattern,
    bytes: u32,
    buffers: *mut u8,
    /// Requests that fit into the span.
    places: u64,
    cursor: u64,
    rng: Rng,
    latencies: Latencies,
    errors: u64,
    /// When it began to count, and when it ends; 0 while warming up.
    since: u64,
    until: u64,
    measure_ticks: u64,
    tsc_khz: u64,
    next_patience: u64,
}

impl Timed {
    /// Memory it shares with its device.
    pub(crate) fn shared_bytes(depth: u16, request_bytes: u32) -> u64 {
        DRIVER_BYTES + (u64::from(request_bytes) * u64::from(depth)).next_multiple_of(4096)
    }

    /// Starts now.
    pub(crate) fn new(share: &Share) -> Self {
        let config = &share.config;
        let mut shared = Shared::new(share);
        let disk = Disk::start(share, &mut shared);
        let bytes = config.request_bytes;
        let places = (disk.sectors() * SECTOR).min(config.span_bytes) / u64::from(bytes);
        if places == 0 {
            refuse(
                "bs=",
                format_args!("a request that is smaller than the disk and the span"),
            );
        }
        if config.op == Op::Verify || (config.op != Op::Read && disk.is_read_only()) {
            refuse(
                config.op.name(),
                format_args!("read, write or mixed, and read for a disk that is read-only"),
            );
        }
        if !matches!(config.pattern, Pattern::Seq | Pattern::Uniform) {
            refuse("pattern=", format_args!("seq or uniform for work=blk"));
        }
        let buffers = shared.take(u64::from(bytes) * u64::from(disk.depth()));
        let mut rng = Rng::new(1);
        for n in 0..u64::from(bytes) * u64::from(disk.depth()) / 8 {
            // SAFETY: memory just taken. Noise, so that nothing on the way makes it small.
            unsafe { buffers.cast::<u64>().add(n as usize).write_volatile(rng.next_word()) };
        }
        Self {
            disk,
            op: config.op,
            pattern: config.pattern,
            bytes,
            buffers,
            places,
            cursor: 0,
            rng,
            latencies: Latencies::none(),
            errors: 0,
            since: 0,
            until: cpu::tsc() + share.clock.ticks(WARM_UP_US),
            measure_ticks: share.clock.ticks(config.measure_us),
            tsc_khz: share.clock.tsc_khz,
            next_patience: 0,
        }
    }

    /// One turn.
    pub(crate) fn step(&mut self, me: CpuCell, now: u64) -> Option<u64> {
        if self.disk.transport.listen(now).requests {
            while let Some((_, status, took)) = self.disk.answer(cpu::tsc()) {
                self.errors += u64::from(status != 0);
                self.latencies.record(took);
                me.set_ops(me.ops() + 1);
            }
        }
        if now >= self.until {
            self.turn_of_the_hour(now);
        }
        if now >= self.next_patience {
            self.next_patience = now + self.tsc_khz * 100;
            self.disk.is_patient(now);
        }
        while let Some(slot) = self.disk.free_slot() {
            self.ask(slot);
        }
        self.disk.publish();
        self.disk.rest(now)
    }

    fn ask(&mut self, slot: u16) {
        let place = match self.pattern {
            Pattern::Seq => {
                self.cursor = if self.cursor + 1 < self.places {
                    self.cursor + 1
                } else {
                    0
                };
                self.cursor
            }
            _ => self.rng.below(self.places),
        };
        let kind = match self.op {
            Op::Write => Kind::Write,
            Op::Mixed if self.rng.below(2) == 0 => Kind::Write,
            _ => Kind::Read,
        };
        let sector = place * u64::from(self.bytes) / SECTOR;
        let data = self.buffers.wrapping_add(usize::from(slot) * self.bytes as usize);
        // SAFETY: each slot has its own buffer.
        unsafe { self.disk.ask(slot, kind, sector, data, self.bytes, cpu::tsc()) };
    }

    /// Warm: begins to count. Counted: says what, and ends.
    fn turn_of_the_hour(&mut self, now: u64) {
        if self.since == 0 {
            (self.since, self.until) = (now, now + self.measure_ticks);
            (self.latencies, self.errors) = (Latencies::none(), 0);
            return;
        }
        let ns = |ticks: u64| (u128::from(ticks) * 1_000_000 / u128::from(self.tsc_khz)) as u64;
        let (ops, found) = (self.latencies.count(), &self.latencies);
        say!(
            "umbra-guest: disk op={} bs={} depth={} ops={ops} bytes={} ns={} p50_ns={} p99_ns={} max_ns={} errors={}",
            self.op.name(),
            self.bytes,
            self.disk.depth(),
            ops * u64::from(self.bytes),
            ns(now - self.since),
            ns(found.permille(500)),
            ns(found.permille(990)),
            ns(found.most()),
            self.errors
        );
        say!("umbra-guest: done");
        cpu::exit(0)
    }
}
