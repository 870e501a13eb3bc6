//! A virtio device behind a window of registers (virtio 1.2, Virtio Over MMIO), and its queues.
//!
//! Devices are where the command line says (`virtio_mmio.device=`); if it says nothing, where Umbra has them, side by side
//! from [`FIRST_WINDOW`] on. (Umbra tells by ACPI, which would be much to read for one number.) A driver finds its device
//! by type, agrees on features, gives it queues in memory of its own, and from then on looks at rings. What a device may
//! not do stops the guest as memory that lies does.
//!
//! # Interrupts
//!
//! With `wait=irq` a driver sleeps until the device interrupts, and takes nothing from a ring otherwise, as an
//! operating system does: an interrupt that gets lost on a journey is then noticed ([`Transport::expect`]), where a
//! driver that polls would never miss it.

use crate::EXIT_CORRUPT;
use crate::boot::Share;
use crate::console::fatal;
use crate::{cpu, refuse};
use umbra_guest::config::{Config, WINDOWS_MAX, Wait, Window};
use umbra_guest::ring::{Part, RING_BYTES, Ring, SIZE_MAX};

/// Device types (virtio 1.2, Device Types).
pub(crate) const NET: u32 = 1;
/// See [`NET`].
pub(crate) const BLOCK: u32 = 2;
/// See [`NET`].
pub(crate) const ENTROPY: u32 = 4;

/// Features of every device (virtio 1.2, Reserved Feature Bits).
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Where devices are if nobody says.
const FIRST_WINDOW: u64 = 0xd000_0000;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const MAGIC_VALUE: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_AREAS: [u64; 3] = [0x080, 0x090, 0x0a0];
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const CONFIG_CHANGED: u32 = 2;

/// How often a device is asked whether it is well, and whether its configuration changed.
const LOOK_US: u64 = 100_000;
/// A completion that has been in the ring this long without an interrupt will not get one.
const INTERRUPT_LOST_US: u64 = 2_000_000;
/// And must have been looked at so often in that time: a guest that was paused did not wait.
const INTERRUPT_LOST_LOOKS: u32 = 100;
/// A request that takes longer is lost.
const REQUEST_LOST_US: u64 = 30_000_000;

/// Memory that a driver shares with its device: handed out once, from the front.
pub(crate) struct Shared {
    at: u64,
    left: u64,
}

impl Shared {
    /// All of it.
    pub(crate) fn new(share: &Share) -> Self {
        Self {
            at: share.plan.shared_gpa,
            left: share.plan.shared_bytes,
        }
    }

    /// So many bytes, from a page of their own.
    pub(crate) fn take(&mut self, bytes: u64) -> *mut u8 {
        let (at, bytes) = (self.at, bytes.next_multiple_of(4096));
        assert!(bytes <= self.left, "the plan has too little shared memory");
        self.at += bytes;
        self.left -= bytes;
        at as *mut u8
    }
}

/// A device and what was agreed with it.
pub(crate) struct Transport {
    base: u64,
    irq: u32,
    wait: Wait,
    features: u64,
    /// Interrupts taken into account.
    interrupts: u64,
    /// The device owes an interrupt for whatever it completes from now on; until then rings are left alone.
    awaiting: bool,
    next_look: u64,
    look_ticks: u64,
    /// Since when, and for how many looks, completions have waited for an interrupt.
    overdue: Option<(u64, u32)>,
    overdue_ticks: u64,
    lost_ticks: u64,
}

impl Transport {
    /// The first device of this type, agreed on these features besides the usual ones.
    pub(crate) fn find(share: &Share, device: u32, wanted: u64) -> Self {
        let config = &share.config;
        let mut named = config.windows().iter().copied();
        let found = if config.window_count > 0 {
            named.find(|window| is_a(window.base, device))
        } else {
            usual_windows().find(|window| is_a(window.base, device))
        };
        let Some(window) = found else { lacks(config, device) };
        let ticks = |us| share.clock.ticks(us);
        let mut transport = Self {
            base: window.base,
            irq: window.irq,
            wait: config.wait,
            features: 0,
            interrupts: cpu::device_interrupts(),
            awaiting: false,
            next_look: 0,
            look_ticks: ticks(LOOK_US),
            overdue: None,
            overdue_ticks: ticks(INTERRUPT_LOST_US),
            lost_ticks: ticks(REQUEST_LOST_US),
        };
        transport.agree(wanted);
        transport
    }

    fn agree(&mut self, wanted: u64) {
        self.write(STATUS, 0);
        while self.read(STATUS) != 0 {
            core::hint::spin_loop();
        }
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(DEVICE_FEATURES_SEL, half);
            offered |= u64::from(self.read(DEVICE_FEATURES)) << (32 * half);
        }
        self.features = offered & (wanted | VERSION_1 | EVENT_IDX | INDIRECT_DESC);
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (self.features >> (32 * half)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.read(STATUS) & FEATURES_OK == 0 || self.features & VERSION_1 == 0 {
            self.corrupt("features", self.features, offered);
        }
    }

    /// Whether all of these features were agreed on.
    pub(crate) fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Whether requests are described by tables.
    pub(crate) fn indirect(&self) -> bool {
        self.has(INDIRECT_DESC)
    }

    /// Sets queue `index` up, with so many descriptors for each request.
    pub(crate) fn queue(&self, index: u32, per_slot: u16, shared: &mut Shared) -> Queue {
        self.write(QUEUE_SEL, index);
        let most = self.read(QUEUE_SIZE_MAX).min(u32::from(SIZE_MAX)) as u16;
        if !most.is_power_of_two() {
            self.corrupt("queue-size", u64::from(SIZE_MAX), u64::from(most));
        }
        let memory = shared.take(RING_BYTES as u64);
        // SAFETY: memory handed out to this ring alone, aligned to a page.
        let mut ring = unsafe { Ring::new(memory, most, per_slot, self.has(EVENT_IDX)) };
        if self.wait == Wait::Poll {
            ring.poll();
        }
        self.write(QUEUE_SIZE, u32::from(most));
        for (register, address) in QUEUE_AREAS.into_iter().zip(ring.addresses()) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        Queue {
            ring,
            index,
            notify: self.base + QUEUE_NOTIFY,
        }
    }

    /// The queues are there: lets the device begin.
    pub(crate) fn start(&mut self) {
        if self.wait == Wait::Irq {
            cpu::route_interrupt(self.irq)
                .unwrap_or_else(|most| refuse("wait=irq", format_args!("an interrupt line up to {most}")));
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Words of the configuration; the device must not change them while it is looked.
    pub(crate) fn config32(&self, at: u64) -> u32 {
        self.read(CONFIG + at)
    }

    /// A byte of it.
    pub(crate) fn config8(&self, at: u64) -> u8 {
        // SAFETY: as in `read`.
        unsafe { ((self.base + CONFIG + at) as *const u8).read_volatile() }
    }

    /// Half a word of it.
    pub(crate) fn config16(&self, at: u64) -> u16 {
        // SAFETY: as in `read`.
        unsafe { ((self.base + CONFIG + at) as *const u16).read_volatile() }
    }

    /// What the device said since the last time: whether to take from the rings, and whether its configuration is
    /// another.
    #[inline(always)]
    pub(crate) fn listen(&mut self, now: u64) -> News {
        match self.wait {
            Wait::Poll if now < self.next_look => News {
                requests: true,
                config: false,
            },
            Wait::Poll => self.look(now),
            Wait::Irq => {
                let interrupts = cpu::device_interrupts();
                if interrupts != self.interrupts {
                    self.interrupts = interrupts;
                    self.awaiting = false;
                    self.overdue = None;
                    return self.look(now);
                }
                if now >= self.next_look {
                    self.check(now);
                }
                News {
                    requests: !self.awaiting,
                    config: false,
                }
            }
        }
    }

    #[inline(never)]
    fn look(&mut self, now: u64) -> News {
        self.check(now);
        let status = self.read(INTERRUPT_STATUS);
        if status != 0 {
            self.write(INTERRUPT_ACK, status);
        }
        News {
            requests: true,
            config: status & CONFIG_CHANGED != 0,
        }
    }

    fn check(&mut self, now: u64) {
        if now >= self.next_look {
            self.next_look = now + self.look_ticks;
            let status = self.read(STATUS);
            if status & (NEEDS_RESET | DRIVER_OK) != DRIVER_OK {
                self.corrupt("device-status", 15, u64::from(status));
            }
        }
    }

    /// Until when a driver with nothing else to do may sleep: for ever where interrupts wake it, not at all where it
    /// polls, or where something was completed before the device knew that we want to be told.
    #[inline(always)]
    pub(crate) fn expect(&mut self, now: u64, queues: &mut [&mut Queue]) -> Option<u64> {
        if self.wait == Wait::Poll {
            return None;
        }
        if self.awaiting {
            if queues.iter().any(|queue| queue.ring.has_used()) {
                self.overdue(now);
            }
            return Some(u64::MAX);
        }
        // Every queue is asked, whatever the others say.
        let mut quiet = true;
        for queue in queues {
            quiet &= queue.ring.await_interrupt();
        }
        self.awaiting = quiet;
        quiet.then_some(u64::MAX)
    }

    /// There are completions, and their interrupt has not come: it stops the guest if it is not just late.
    fn overdue(&mut self, now: u64) {
        let (since, looks) = self.overdue.get_or_insert((now, 0));
        *looks += 1;
        if now - *since > self.overdue_ticks && *looks > INTERRUPT_LOST_LOOKS {
            self.corrupt("interrupt", self.interrupts + 1, self.interrupts);
        }
    }

    /// Stops the guest if a request has been with the device for so long that it must be lost.
    pub(crate) fn is_patient(&self, what: &str, since: u64, now: u64) {
        if now.saturating_sub(since) > self.lost_ticks {
            fatal(
                EXIT_CORRUPT,
                format_args!("CORRUPT what={what} want=completion found=none"),
            );
        }
    }

    #[cold]
    fn corrupt(&self, what: &str, want: u64, found: u64) -> ! {
        let base = self.base;
        fatal(
            EXIT_CORRUPT,
            format_args!("CORRUPT what={what} device={base:#x} want={want:#x} found={found:#x}"),
        )
    }

    fn read(&self, register: u64) -> u32 {
        read(self.base, register)
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as in `read`.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) };
    }
}

/// What a device said.
#[derive(Clone, Copy)]
pub(crate) struct News {
    /// There may be completions.
    pub(crate) requests: bool,
    /// The configuration is another.
    pub(crate) config: bool,
}

fn read(base: u64, register: u64) -> u32 {
    // SAFETY: a window that the command line named, below 4 GiB and so mapped. If it is none, the bus says ones.
    unsafe { ((base + register) as *const u32).read_volatile() }
}

fn is_a(base: u64, device: u32) -> bool {
    // Version 2 is the one without the burden of old times.
    read(base, MAGIC_VALUE) == MAGIC && read(base, VERSION) == 2 && read(base, DEVICE_ID) == device
}

/// Where Umbra has devices (`vmm/machine`, `board/virtio.rs`): up to the first window that has none.
fn usual_windows() -> impl Iterator<Item = Window> {
    const LINES: [u32; 8] = [5, 6, 7, 10, 11, 12, 14, 15];
    let window = |n: usize| Window {
        base: FIRST_WINDOW + 0x1000 * n as u64,
        irq: LINES[n % LINES.len()],
    };
    (0..WINDOWS_MAX)
        .map(window)
        .take_while(|window| read(window.base, MAGIC_VALUE) == MAGIC)
}

fn lacks(config: &Config, device: u32) -> ! {
    refuse(
        config.work.name(),
        format_args!("a virtio-mmio device (version 2) of type {device}"),
    )
}

/// One virtqueue of a device.
pub(crate) struct Queue {
    ring: Ring,
    index: u32,
    notify: u64,
}

impl Queue {
    /// Requests that fit at once.
    pub(crate) fn slots(&self) -> u16 {
        self.ring.slots()
    }

    /// How many the device has.
    pub(crate) fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// Whether the device has this slot.
    pub(crate) fn is_in_flight(&self, slot: u16) -> bool {
        self.ring.is_in_flight(slot)
    }

    /// Puts a request into a free slot, by its own table if there is one.
    ///
    /// # Safety
    /// The parts' memory, and the table's, must be this request's alone until it is taken again.
    #[inline]
    pub(crate) unsafe fn offer(&mut self, slot: u16, table: Option<*mut u8>, parts: &[Part]) {
        match table {
            // SAFETY: passed on.
            Some(table) => unsafe { self.ring.offer_indirect(slot, table, parts) },
            None => self.ring.offer(slot, parts),
        }
    }

    /// Shows the device what was offered, and rings if it wants that.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.ring.publish() {
            // SAFETY: the notify register of a window, as in `Transport::write`.
            unsafe { (self.notify as *mut u32).write_volatile(self.index) };
        }
    }

    /// A request the device is done with, and how many bytes it wrote.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<(u16, u32)> {
        self.ring.take().unwrap_or_else(|flaw| {
            let queue = self.index;
            fatal(
                EXIT_CORRUPT,
                format_args!("CORRUPT what=ring queue={queue} found={flaw:?}"),
            )
        })
    }
}
