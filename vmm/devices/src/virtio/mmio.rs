//! What the guest sees of a device: registers in a window of memory (virtio 1.2, Virtio Over MMIO).
//!
//! Only version 2, which Linux has spoken since 2015; the legacy layout is not offered. Registers are 32 bits wide and
//! aligned; any other access reads zeros and writes nothing, except in the configuration space, where any width is allowed.
//!
//! ```text
//!   status written:   1, 2 ─▶ features ─▶ 8 (FEATURES_OK) ─▶ queues ─▶ 4 (DRIVER_OK) ─▶ at work
//!                     0 ─▶ power-on, from anywhere
//! ```
//!
//! A driver that leaves this order is not obeyed: features are fixed by `FEATURES_OK`, which is refused (the bit reads as
//! zero) when they are not a subset of those offered or lack `VERSION_1`; queues can be set up only between the two; a bit
//! once set is only taken away by a reset.

use std::fmt;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::engine::{Engine, Work, lock};
use super::interrupt::Interrupt;
use super::rings::Setup;
use super::{Bell, Ram, Virtio, bit, state};
use crate::contract::{Device, Line, Restore, RestoreError, SaveError, SavedState};

/// How many addresses a device takes.
pub const WINDOW: u64 = 0x1000;

/// Where in the window the driver writes the number of a queue that has work, as 32 bits.
pub const NOTIFY: u64 = register::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// `virt` (virtio 1.2, MMIO Device Register Layout, MagicValue).
const MAGIC: u32 = 0x7472_6976;

/// Not the legacy layout.
const LAYOUT: u32 = 2;

/// `UMBR`. Drivers ignore it.
const VENDOR: u32 = 0x5242_4d55;

/// What the transport offers beside the device's own features.
pub const FEATURES: u64 = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_RING_F_EVENT_IDX) | bit(VIRTIO_RING_F_INDIRECT_DESC);

/// What a virtio device is connected to.
#[derive(Clone)]
pub struct Wiring<W> {
    /// Guest memory.
    pub ram: Ram,
    /// The device's interrupt.
    pub line: Arc<dyn Line>,
    /// How the device's worker hears of a queue that has work.
    pub bell: Arc<dyn Bell>,
    /// What the device itself is connected to.
    pub device: W,
}

/// A device on the MMIO bus.
pub struct Mmio<D: Virtio> {
    kind: String,
    registers: Registers,
    bell: Arc<dyn Bell>,
    interrupt: Arc<Interrupt>,
    engine: Arc<Mutex<Engine<D>>>,
}

/// What the driver wrote, and only the driver changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    /// Without `NEEDS_RESET`, which is the rings' to say.
    pub(super) status: u32,
    pub(super) queues: Vec<Setup>,
}

impl<D: Virtio> Mmio<D> {
    /// The device at power-on, paused.
    pub fn new(wiring: Wiring<D::Wiring>) -> Self {
        let Wiring {
            ram,
            line,
            bell,
            device,
        } = wiring;
        let device = D::new(device);
        let interrupt = Arc::new(Interrupt::new(line));
        Self {
            kind: device.kind().to_owned(),
            registers: Registers::new(device.queues().len()),
            bell,
            interrupt: interrupt.clone(),
            engine: Arc::new(Mutex::new(Engine::new(device, ram, interrupt))),
        }
    }

    /// The greatest size of each queue. There is one event to be watched per queue.
    pub fn queues(&self) -> Vec<u16> {
        lock(&self.engine).device().queues()
    }

    /// What the device's worker calls. It stays the same for as long as this device exists.
    pub fn work(&self) -> Arc<dyn Work> {
        self.engine.clone()
    }

    /// The engine, for whoever knows the device's type: [`Engine::act`].
    pub fn engine(&self) -> Arc<Mutex<Engine<D>>> {
        self.engine.clone()
    }

    /// The interrupt: what the driver has not acknowledged.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// Become `restored`, which was built with the same wiring. Whoever has this device's [`work`](Self::work) now works on the
    /// restored one. Like anything restored, it is paused.
    pub fn take_over(&mut self, restored: Self) {
        self.registers = restored.registers;
        self.interrupt.hush();
        self.interrupt
            .set(restored.interrupt.status(), restored.interrupt.config_generation());
        lock(&self.engine).replace(&mut lock(&restored.engine), self.interrupt.clone());
    }

    fn offered(&self) -> u64 {
        FEATURES | lock(&self.engine).device().features()
    }

    fn status(&self) -> u32 {
        let needs_reset = lock(&self.engine).is_broken();
        self.registers.status | if needs_reset { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
    }

    fn selected(&self) -> Option<Setup> {
        self.registers.queues.get(self.registers.selected()).copied()
    }

    fn read_register(&self, at: u32) -> u32 {
        match at {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => LAYOUT,
            register::VIRTIO_MMIO_DEVICE_ID => D::ID,
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            register::VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), self.registers.device_features_sel),
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let size = self.queues().get(self.registers.selected()).copied();
                size.unwrap_or(0).into()
            }
            register::VIRTIO_MMIO_QUEUE_READY => self.selected().is_some_and(|queue| queue.ready).into(),
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            register::VIRTIO_MMIO_STATUS => self.status(),
            // No shared memory region: all ones for every one that is asked for (virtio 1.2, Shared Memory Regions).
            register::VIRTIO_MMIO_SHM_LEN_LOW
            | register::VIRTIO_MMIO_SHM_LEN_HIGH
            | register::VIRTIO_MMIO_SHM_BASE_LOW
            | register::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            register::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, at: u32, value: u32) {
        match at {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES => self.registers.accept(value),
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            register::VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            register::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            register::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::VIRTIO_MMIO_STATUS => self.write_status(value),
            register::VIRTIO_MMIO_QUEUE_READY if value == 0 => self.stop_queue(),
            _ => self.registers.set_up_queue(at, value),
        }
    }

    /// The guest's notification came as an exit, because nobody catches it before.
    fn notify(&self, queue: u32) {
        if let Ok(queue) = u16::try_from(queue)
            && usize::from(queue) < self.registers.queues.len()
        {
            self.bell.ring(queue);
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let added = value & !self.registers.status;
        self.registers.status |=
            added & !(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET);
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0
            && self.registers.has(VIRTIO_CONFIG_S_DRIVER)
            && self.features_agree()
        {
            self.registers.status |= VIRTIO_CONFIG_S_FEATURES_OK;
            let features = self.registers.driver_features;
            lock(&self.engine).device_mut().accept(features);
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.registers.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            self.registers.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.start();
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.give_up();
        }
    }

    fn features_agree(&self) -> bool {
        let wanted = self.registers.driver_features;
        wanted & !self.offered() == 0 && wanted & bit(VIRTIO_F_VERSION_1) != 0
    }

    fn start(&self) {
        lock(&self.engine).start(self.registers.driver_features, &self.registers.queues);
        self.ring_all();
    }

    /// The driver has given the device up: it uses no queue any more, and nothing but a reset will change that.
    fn give_up(&mut self) {
        let mut engine = lock(&self.engine);
        for (queue, setup) in (0..).zip(&mut self.registers.queues) {
            setup.ready = false;
            engine.stop(queue);
        }
    }

    /// Drivers put chains into queues before they say that they are ready, and need not say it again afterwards.
    fn ring_all(&self) {
        let active = lock(&self.engine).active();
        active.into_iter().for_each(|queue| self.bell.ring(queue));
    }

    fn stop_queue(&mut self) {
        let selected = self.registers.selected();
        if let Some(queue) = self.registers.queues.get_mut(selected)
            && queue.ready
        {
            queue.ready = false;
            lock(&self.engine)
                .stop(u16::try_from(selected).expect("a device has few queues: asserted when it is built"));
        }
    }

    fn read_config(&self, from: u64, data: &mut [u8]) {
        let space = lock(&self.engine).device().config();
        data.fill(0);
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(space.iter().skip(from)) {
            *byte = *value;
        }
    }
}

impl<D: Virtio> Device for Mmio<D> {
    fn kind(&self) -> &str {
        &self.kind
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match Place::of(offset, data.len()) {
            Place::Register(at) => data.copy_from_slice(&self.read_register(at).to_le_bytes()),
            Place::Config(from) => self.read_config(from, data),
            Place::Nowhere => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (Place::of(offset, data.len()), data.try_into()) {
            (Place::Register(at), Ok(value)) => self.write_register(at, u32::from_le_bytes(value)),
            (Place::Config(from), _) => lock(&self.engine).device_mut().write_config(from, data),
            _ => {}
        }
    }

    fn reset(&mut self) {
        lock(&self.engine).reset();
        self.interrupt.set(0, 0);
        self.registers = Registers::new(self.registers.queues.len());
    }

    fn pause(&mut self) {
        let mut engine = lock(&self.engine);
        engine.pause();
        self.interrupt.hush();
    }

    fn resume(&mut self) {
        {
            let mut engine = lock(&self.engine);
            engine.resume();
            self.interrupt.speak();
        }
        self.ring_all();
    }

    fn save(&self) -> Result<SavedState, SaveError> {
        state::encode(&self.kind, &self.registers, &self.interrupt, &lock(&self.engine))
    }
}

impl<D: Virtio> Restore for Mmio<D> {
    type Wiring = Wiring<D::Wiring>;

    fn restore(saved: &SavedState, wiring: Self::Wiring) -> Result<Self, RestoreError> {
        let mut mmio = Self::new(wiring);
        let offered = mmio.offered();
        mmio.registers = state::decode(saved, &mmio.kind, offered, &mmio.interrupt, &mut lock(&mmio.engine))?;
        Ok(mmio)
    }
}

impl Registers {
    pub(super) fn new(queues: usize) -> Self {
        Self {
            queues: vec![Setup::default(); queues],
            ..Self::default()
        }
    }

    const fn has(&self, status: u32) -> bool {
        self.status & status != 0
    }

    fn selected(&self) -> usize {
        usize::try_from(self.queue_sel).unwrap_or(usize::MAX)
    }

    fn accept(&mut self, value: u32) {
        if self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.driver_features_sel > 1 {
            return;
        }
        set_half(&mut self.driver_features, self.driver_features_sel == 1, value);
    }

    /// A queue's place is fixed while the driver may use it.
    fn set_up_queue(&mut self, at: u32, value: u32) {
        let open =
            self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED);
        let selected = self.selected();
        let Some(queue) = self.queues.get_mut(selected).filter(|queue| open && !queue.ready) else {
            return;
        };
        match at {
            register::VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            register::VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, false, value),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, true, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, false, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, true, value),
            register::VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, false, value),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, true, value),
            _ => {}
        }
    }
}

/// What lies at an offset.
enum Place {
    Register(u32),
    /// The configuration space, from its beginning.
    Config(u64),
    Nowhere,
}

impl Place {
    fn of(offset: u64, len: usize) -> Self {
        let config = u64::from(register::VIRTIO_MMIO_CONFIG);
        match u32::try_from(offset) {
            _ if offset >= config => Self::Config(offset - config),
            Ok(at) if len == 4 && at % 4 == 0 => Self::Register(at),
            _ => Self::Nowhere,
        }
    }
}

/// The lower or upper 32 of 64 bits; there are no others.
fn half(value: u64, which: u32) -> u32 {
    let [low, high] = halves(value);
    match which {
        0 => low,
        1 => high,
        _ => 0,
    }
}

fn set_half(value: &mut u64, upper: bool, half: u32) {
    let [low, high] = halves(*value);
    let (low, high) = if upper { (low, half) } else { (half, high) };
    *value = u64::from(high) << 32 | u64::from(low);
}

fn halves(value: u64) -> [u32; 2] {
    let low = u32::try_from(value & 0xffff_ffff).expect("32 bits were kept");
    let high = u32::try_from(value >> 32).expect("32 bits are left");
    [low, high]
}

impl<D: Virtio> fmt::Debug for Mmio<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mmio({}, status {:#x})", self.kind, self.registers.status)
    }
}

impl<W> fmt::Debug for Wiring<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiring(virtio)")
    }
}
