//! The machine's devices: which there are, where they answer, and how they are saved and restored together.
//!
//! ```text
//!   port    device              interrupt
//!   0x60,64 i8042/0 (reset)
//!   0x70    rtc/0
//!   0xf4    exit/0
//!   0x3f8   serial/0            4
//!   0x5fa   fault/0             (only when a test asks for it)
//!   0x600   acpi-pm/0           9, level
//!   0xcf9   acpi-pm/0 (reset)
//!   memory  generation/0        3
//! ```
//!
//! Virtio devices answer in memory, and most of what they do happens on threads of their own: see [`virtio`].
//!
//! PIC, IOAPIC, LAPIC and PIT are KVM's, and answer before an access reaches here.
//!
//! # An interrupt line without a delay
//!
//! KVM offers two ways to raise a line. An eventfd (`KVM_IRQFD`) costs least to signal, but for a line of the PIC or
//! IOAPIC the kernel injects it later, from a work queue: a guest saved in between loses its interrupt. `KVM_IRQ_LINE`
//! injects before it returns. A console does not interrupt often enough for the difference to matter, so it uses the
//! latter, and its saved state need not wonder where its interrupt is.

pub(crate) mod fit;
pub(crate) mod spec;
mod virtio;

use std::fmt;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_ioctls::VmFd;
use umbra_core::guest::StateRecord;
use umbra_devices::virtio::{Engine, Virtio, balloon, block, console, net, rng, vsock};
use umbra_devices::vmgenid::Generation;
use umbra_devices::{
    AcpiPm, Bus, Ending, ExitPort, FaultDevice, FaultPlan, I8042, Level, Line, Restore, Rtc, SavedState, Serial, Span,
    WallClock, acpi_pm, exit, fault, i8042, rtc, serial, vmgenid,
};
use umbra_units::Gpa;

use self::fit::{Backend, Fit};
use self::spec::Spec;
use crate::acpi::{Generation as Location, MmioWindow, Tables};
use crate::backend::entropy::HostEntropy;
use crate::backend::image::Image;
use crate::backend::tap::HostTap;
use crate::error::Error;
use crate::memory::Memory;
use crate::output::Output;
use crate::worker::{Post, Worker};

/// All devices of one machine.
pub(crate) struct Board {
    /// Joined before what they work for goes.
    workers: Vec<Worker>,
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    serial: Arc<Mutex<Serial>>,
    power: Arc<Mutex<AcpiPm>>,
    generation: Arc<Mutex<Generation>>,
    /// In the order they are saved.
    slots: Vec<Box<dyn Slot>>,
    /// What the guest sees of its virtio devices, in the order of `windows`.
    specs: Vec<Spec>,
    windows: Vec<MmioWindow>,
    /// Locked while the guest runs here.
    images: Vec<Arc<Image>>,
    /// Where the guest's frames go, or wait.
    taps: Vec<Arc<HostTap>>,
    balloon: Option<Known<balloon::Balloon>>,
    console: Option<Known<console::Console>>,
    /// Devices have a way into it, and so it must not go before them.
    memory: Arc<Memory>,
}

/// A device that somebody outside of the guest acts on.
type Known<D> = Arc<Mutex<Engine<D>>>;

/// A device in its place.
trait Slot: Send + Sync {
    fn kind(&self) -> String;
    fn reset(&self);
    fn pause(&self);
    fn resume(&self);
    fn save(&self) -> Result<SavedState, Error>;
    /// Build the device that `saved` describes; putting it in this place is left to the result, which cannot fail.
    fn prepare<'a>(&'a self, saved: &SavedState) -> Result<Box<dyn FnOnce() + 'a>, Error>;
}

struct Place<D: Restore> {
    device: Arc<Mutex<D>>,
    wiring: D::Wiring,
}

impl<D: Restore> Place<D> {
    fn device(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Restore> Slot for Place<D> {
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

    fn prepare<'a>(&'a self, saved: &SavedState) -> Result<Box<dyn FnOnce() + 'a>, Error> {
        let device = D::restore(saved, self.wiring.clone())?;
        Ok(Box::new(move || *self.device() = device))
    }
}

impl Board {
    /// The devices, at power-on and paused.
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        memory: &Arc<Memory>,
        fits: Vec<Fit>,
        output: &Arc<Output>,
        ending: Arc<dyn Ending>,
        fault_plan: Option<&FaultPlan>,
    ) -> Result<Self, Error> {
        let line = Arc::new(IsaLine {
            vm: vm.clone(),
            irq: serial::COM1_IRQ,
        });
        let com1 = serial::Wiring {
            index: 0,
            out: output.clone(),
            line,
        };
        let console = Arc::new(Mutex::new(Serial::new(com1.clone())));
        let power_wiring = acpi_pm::Wiring {
            ending: ending.clone(),
            sci: Arc::new(IsaLine {
                vm: vm.clone(),
                irq: acpi_pm::SCI_IRQ.into(),
            }),
        };
        let power = Arc::new(Mutex::new(AcpiPm::new(power_wiring.clone())));
        let generation_wiring = vmgenid::Wiring {
            ram: memory.for_devices(),
            at: GENERATION.at,
            entropy: Arc::new(HostEntropy::kernel()?),
            line: Arc::new(IsaLine {
                vm: vm.clone(),
                irq: GENERATION.irq,
            }),
        };
        let generation = Arc::new(Mutex::new(Generation::new(generation_wiring.clone())));
        let mut board = Self {
            workers: Vec::new(),
            ports: Bus::new(),
            mmio: Bus::new(),
            serial: console.clone(),
            power: power.clone(),
            generation: generation.clone(),
            slots: Vec::new(),
            specs: Vec::new(),
            windows: Vec::new(),
            images: Vec::new(),
            taps: Vec::new(),
            balloon: None,
            console: None,
            memory: memory.clone(),
        };
        board.place(
            console,
            com1,
            serial::COM1_PORT,
            &[Span::new(serial::COM1_PORT, serial::REGISTERS)],
        )?;
        let wiring = exit::Wiring { ending: ending.clone() };
        let device = Arc::new(Mutex::new(ExitPort::new(wiring.clone())));
        board.place(device, wiring, exit::PORT, &[Span::new(exit::PORT, exit::PORTS)])?;
        let wiring = i8042::Wiring { ending };
        let device = Arc::new(Mutex::new(I8042::new(wiring.clone())));
        let spans = [Span::new(i8042::DATA_PORT, 1), Span::new(i8042::COMMAND_PORT, 1)];
        board.place(device, wiring, i8042::DATA_PORT, &spans)?;
        let wiring = rtc::Wiring {
            clock: Arc::new(HostClock),
        };
        let device = Arc::new(Mutex::new(Rtc::new(wiring.clone())));
        board.place(device, wiring, rtc::PORT, &[Span::new(rtc::PORT, rtc::PORTS)])?;
        let spans = [
            Span::new(acpi_pm::EVENT_PORT, acpi_pm::PORTS),
            Span::new(acpi_pm::RESET_PORT, 1),
        ];
        board.place(power, power_wiring, acpi_pm::EVENT_PORT, &spans)?;
        // It is in memory, and answers nowhere else.
        board.place(generation, generation_wiring, 0, &[])?;
        if let Some(plan) = fault_plan {
            let device = Arc::new(Mutex::new(FaultDevice::new(plan.clone())));
            board.place(device, plan.clone(), fault::PORT, &[Span::new(fault::PORT, 1)])?;
        }
        board.place_virtio(vm, fits)?;
        Ok(board)
    }

    /// Place the virtio devices, and start their workers.
    fn place_virtio(&mut self, vm: &Arc<VmFd>, fits: Vec<Fit>) -> Result<(), Error> {
        let mut shared = Vec::new();
        for Fit { spec, backend } in fits {
            match backend {
                Backend::Rng(wiring) => shared.push(self.plug::<rng::Rng>(vm, wiring, Vec::new())?),
                Backend::Disk { image, disk, wiring } => {
                    let name = spec.kind();
                    let post = self.plug::<block::Block>(vm, wiring, vec![disk.event()])?;
                    self.workers.push(Worker::start(&name, vec![post])?);
                    self.images.push(image);
                }
                Backend::Net { tap, wiring } => {
                    let post = self.plug::<net::Net>(vm, wiring, vec![tap.as_raw_fd()])?;
                    self.workers.push(Worker::start(&spec.kind(), vec![post])?);
                    self.taps.push(tap);
                }
                Backend::Vsock { streams, wiring } => {
                    let post = self.plug::<vsock::Vsock>(vm, wiring, vec![streams.as_raw_fd()])?;
                    self.workers.push(Worker::start("vsock", vec![post])?);
                }
                Backend::Balloon(wiring) => {
                    let (post, engine) = self.plug_known::<balloon::Balloon>(vm, wiring, Vec::new())?;
                    self.balloon = Some(engine);
                    shared.push(post);
                }
                Backend::Console(wiring) => {
                    let (post, engine) = self.plug_known::<console::Console>(vm, wiring, Vec::new())?;
                    self.console = Some(engine);
                    shared.push(post);
                }
            }
            self.specs.push(spec);
        }
        if !shared.is_empty() {
            self.workers.push(Worker::start("virtio", shared)?);
        }
        Ok(())
    }

    /// One more virtio device, whose world is `world`.
    fn plug<D: Virtio>(&mut self, vm: &Arc<VmFd>, wiring: D::Wiring, world: Vec<RawFd>) -> Result<Post, Error> {
        Ok(self.plug_known::<D>(vm, wiring, world)?.0)
    }

    /// The same, of a device that somebody outside of the guest acts on.
    fn plug_known<D: Virtio>(
        &mut self,
        vm: &Arc<VmFd>,
        wiring: D::Wiring,
        world: Vec<RawFd>,
    ) -> Result<(Post, Known<D>), Error> {
        let window = virtio::window(self.windows.len());
        let plugged = virtio::plug::<D>(vm, window, self.memory.for_devices(), wiring)?;
        let span = Span::new(window.base.into(), window.len.into());
        self.mmio.claim(span, span.first, plugged.device.clone())?;
        let (duty, engine) = {
            let device = plugged.device.lock().unwrap_or_else(PoisonError::into_inner);
            (device.work(), device.engine())
        };
        let post = Post {
            duty,
            queues: plugged.queues.clone(),
            world,
        };
        self.slots.push(Box::new(plugged));
        self.windows.push(window);
        Ok((post, engine))
    }

    fn place<D: Restore + 'static>(
        &mut self,
        device: Arc<Mutex<D>>,
        wiring: D::Wiring,
        base: u64,
        spans: &[Span],
    ) -> Result<(), Error>
    where
        D::Wiring: 'static,
    {
        for span in spans {
            self.ports.claim(*span, base, device.clone())?;
        }
        self.slots.push(Box::new(Place { device, wiring }));
        Ok(())
    }

    /// The devices' names, in the order they are saved.
    pub(crate) fn kinds(&self) -> Vec<String> {
        self.slots.iter().map(|slot| slot.kind()).collect()
    }

    /// Back to power-on; they must be paused, and stay so.
    pub(crate) fn reset(&self) {
        self.slots.iter().for_each(|slot| slot.reset());
    }

    /// Have every device make nothing more of anything, and wait until what was under way is done: when this returns,
    /// nothing here writes to guest memory any more.
    pub(crate) fn pause(&self) {
        self.slots.iter().for_each(|slot| slot.pause());
        self.workers.iter().for_each(Worker::pause);
        self.workers.iter().for_each(Worker::drained);
    }

    pub(crate) fn resume(&self) {
        self.slots.iter().for_each(|slot| slot.resume());
        self.workers.iter().for_each(Worker::resume);
    }

    /// Take hold of what only one host may have. All or nothing.
    pub(crate) fn take_hold(&self) -> Result<(), Error> {
        let taken = self.images.iter().try_for_each(|image| image.lock());
        if taken.is_err() {
            self.let_go();
        }
        taken
    }

    /// Let go of what only one host may have.
    pub(crate) fn let_go(&self) {
        self.images.iter().for_each(|image| image.unlock());
    }

    /// Keep what the guest sends over its networks from now on.
    pub(crate) fn hold_output(&self) {
        self.taps.iter().for_each(|tap| tap.hold());
    }

    /// Send what was kept, in order, and keep nothing more.
    pub(crate) fn release_output(&self) {
        self.taps.iter().for_each(|tap| tap.release());
    }

    /// Ask the guest to give up so much memory to its balloon; says whether it has one.
    pub(crate) fn resize_balloon(&self, pages: u32) -> bool {
        let Some(balloon) = &self.balloon else { return false };
        let mut balloon = balloon.lock().unwrap_or_else(PoisonError::into_inner);
        balloon.act(|balloon, rings| balloon.resize(pages, rings));
        true
    }

    /// Pages that the guest says it has left to its balloon, if it has one.
    pub(crate) fn balloon_pages(&self) -> Option<u32> {
        let balloon = self.balloon.as_ref()?;
        let balloon = balloon.lock().unwrap_or_else(PoisonError::into_inner);
        Some(balloon.device().size().1)
    }

    /// Somebody types on the paravirtual console; says how many bytes there was room for.
    pub(crate) fn virtio_console_input(&self, bytes: &[u8]) -> usize {
        let Some(console) = &self.console else { return 0 };
        let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
        console.act(|console, rings| console.input(bytes, rings))
    }

    /// What the guest sees of its virtio devices.
    pub(crate) fn specs(&self) -> &[Spec] {
        &self.specs
    }

    pub(crate) fn save(&self) -> Result<Vec<StateRecord>, Error> {
        self.slots
            .iter()
            .map(|slot| {
                let SavedState { kind, version, bytes } = slot.save()?;
                Ok(StateRecord { kind, version, bytes })
            })
            .collect()
    }

    /// Build every device that `take` finds a record for; the result puts them all in place at once.
    pub(crate) fn prepare<'a>(
        &'a self,
        take: &mut dyn FnMut(&str) -> Result<StateRecord, Error>,
    ) -> Result<Box<dyn FnOnce() + 'a>, Error> {
        let mut ready = Vec::new();
        for slot in &self.slots {
            let StateRecord { kind, version, bytes } = take(&slot.kind())?;
            ready.push(slot.prepare(&SavedState { kind, version, bytes })?);
        }
        Ok(Box::new(move || {
            ready.into_iter().for_each(|put_in_place| put_in_place())
        }))
    }

    /// What a kernel is to be told about the devices.
    pub(crate) fn tables(&self) -> Tables<'_> {
        Tables {
            cpus: 0,
            mmio: &self.windows,
            generation: Some(GENERATION),
        }
    }

    /// The guest may have become two: tell it, when it goes on.
    pub(crate) fn renew_generation(&self) {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner).renew();
    }

    /// Somebody presses the power button; says whether the guest listens.
    pub(crate) fn power_button(&self) -> bool {
        self.power.lock().unwrap_or_else(PoisonError::into_inner).press()
    }

    /// Somebody types on the console; says how many bytes there was room for.
    pub(crate) fn console_input(&self, bytes: &[u8]) -> usize {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).input(bytes)
    }
}

/// Where the guest's generation lies: on a page of its own below the ACPI tables, which no memory map calls usable.
const GENERATION: Location = Location {
    at: Gpa(0xd_f000),
    irq: 3,
};

/// A line of the PIC and IOAPIC. See the [module](self).
struct IsaLine {
    vm: Arc<VmFd>,
    irq: u32,
}

impl Line for IsaLine {
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl Level for IsaLine {
    fn set(&self, high: bool) {
        if let Err(error) = self.vm.set_irq_line(self.irq, high) {
            tracing::warn!(irq = self.irq, %error, "cannot raise or lower an interrupt");
        }
    }
}

/// What the guest's battery-backed clock shows. Nothing here decides anything by it.
struct HostClock;

impl WallClock for HostClock {
    fn unix_seconds(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs())
    }
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.kinds()).finish()
    }
}
