//! The machine: everything put together, and its life.
//!
//! ```text
//!   launch(config) ─────────────▶ Paused ◀─────────── pause ───┐
//!                                   │  ▲                       │
//!                                   │  └── restore ──┐         │
//!                                   └─── resume ───────────▶ Running ──▶ (over: ExitReason)
//!   builder().build(description) ─▶ Blank ── restore ─▶ Paused
//!                                     ▲
//!                        a failed restore: Blank again
//! ```
//!
//! # A reset, in place
//!
//! A guest that asks for a reset is booted again in the same VM, by the same process: vCPUs, interrupt controllers, timer and
//! devices go back to power-on, memory to zeros, and the kernel is read again from its files. To whoever follows the guest
//! this is a guest that writes much of its memory at once: each byte changed is recorded, and between two harvests of a
//! paused guest there is no half of a reset. Carrying it out needs every vCPU parked, so no vCPU does it: the `restart`
//! thread does, or a pause that came first. The guest's clock and time-stamp counter go on.
//!
//! A blank machine has no state of its own and refuses to run. Memory may be applied to it, and a restore makes it a
//! paused one.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};
use umbra_core::guest::{
    Arrivals, CaptureBy, Captured, Guest, GuestBuilder, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord,
};
use umbra_devices::{FaultPlan, Out};
use umbra_units::{Bytes, Gpa, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SpaceId};

use crate::acpi::Tables;
use crate::board::Board;
use crate::board::fit;
use crate::board::spec::Spec;
use crate::boot::{self, BootFiles};
use crate::capture::{Capturer, Spare, only_ram};
use crate::config::devices::Devices;
use crate::config::{Backing, DirtyLog, MachineConfig, OnReset, Shape};
use crate::counters::{Counters, Tally};
use crate::cpu::{self, Cpuid, MsrRange, Template};
use crate::dirty::choose::{self, DirtyLogReport};
use crate::dirty::{self, Tracker, WriteLog};
use crate::error::Error;
use crate::fate::{ExitReason, Fate, OnExit};
use crate::gate::{Gate, Work};
use crate::lazy::Lazy;
use crate::limits;
use crate::memory::Memory;
use crate::output::Output;
use crate::probe;
use crate::state::platform::{self, Platform};
use crate::state::restart::Restart;
use crate::state::time::{ClockReport, Reading, TscPlaced};
use crate::state::vcpu::{self as vcpu_state, Host, Processor, VcpuState};
use crate::state::{Description, Incoming, describe};
use crate::threads::{self, ThreadClass};
use crate::vcpu::{RunPage, Thread, Vcpu, lock};

/// What a machine is connected to.
pub struct Sinks {
    serial: Arc<dyn Out>,
    console: Arc<dyn Out>,
    on_exit: Box<OnExit>,
    on_restart: Box<OnRestart>,
}

/// Told each time the guest was booted again.
type OnRestart = dyn Fn() + Send + Sync;

/// A KVM guest. See the [crate] for what it does and [`Guest`] for how it is moved.
///
/// Dropping it ends the guest, wherever it is, and joins its threads.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    /// One per vCPU.
    tallies: Vec<Arc<Tally>>,
    /// Joined by `drop`, before anything else of the machine goes.
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    fate: Arc<Fate>,
    board: Arc<Board>,
    /// What the guest says on its serial port, and on its paravirtual console.
    output: Arc<Output>,
    console: Arc<Output>,
    tracker: Tracker,
    /// What the tracker joins with what devices write.
    log: Arc<dyn WriteLog>,
    dirty_log: DirtyLogReport,
    capturer: Capturer,
    host: Host,
    description: Description,
    /// Save and restore vCPUs on their own threads: see [`Machine::each_vcpu`].
    in_parallel: bool,
    /// How the guest's clocks went on after the last restore.
    clock: Mutex<Option<ClockReport>>,
    phase: Mutex<Phase>,
    /// What a reset goes back to.
    power_on: PowerOn,
    restart: Mutex<Restart>,
    /// What the guest can be booted from here.
    boot_files: Option<BootFiles>,
    on_restart: Box<OnRestart>,
    /// A copy of whether `phase` is running, for page access.
    running: AtomicBool,
    memory: Arc<Memory>,
}

/// Everything but memory and devices, as KVM made it: by vCPU, and what is nobody's.
struct PowerOn {
    vcpus: Arc<Vec<VcpuState>>,
    platform: Platform,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No state yet, or one that could not be restored.
    Blank,
    Paused,
    Running,
}

/// Builds twins of described machines.
pub struct MachineBuilder {
    sinks: Box<dyn Fn() -> Sinks + Send + Sync>,
    on_build: Box<OnBuild>,
    memory_most: Bytes,
    devices: Devices,
    backing: Backing,
    boot_files: Option<BootFiles>,
    fault: FaultPlan,
    dirty_log: DirtyLog,
    /// Made with the builder, because a process that is confined when it builds could not.
    spare: Spare,
}

/// Told of each machine built.
type OnBuild = dyn Fn(&Arc<Machine>) + Send + Sync;

impl Machine {
    /// Build the machine and load its kernel. It is paused, ready for its first instruction.
    pub fn launch(config: &MachineConfig, sinks: Sinks) -> Result<Arc<Self>, Error> {
        let plan = Plan {
            shape: config.shape(),
            cpu: WantedCpu::Template(config.template()),
            devices: Wanted::Launched(config.devices()),
            backing: config.backing(),
            boot_files: Some(config.boot_files()),
            fault: config.fault(),
            dirty_log: config.dirty_log(),
            spare: None,
        };
        let machine = Self::assemble(&plan, sinks)?;
        machine.board.take_hold()?;
        machine.will_restart(config.restart());
        machine.load()?;
        *machine.phase() = Phase::Paused;
        machine.settle()
    }

    /// Builds twins, each connected to the sinks it is then given.
    pub fn builder(sinks: impl Fn() -> Sinks + Send + Sync + 'static) -> MachineBuilder {
        MachineBuilder {
            sinks: Box::new(sinks),
            on_build: Box::new(|_| {}),
            memory_most: limits::MEMORY_MOST,
            devices: Devices::default(),
            backing: Backing::default(),
            boot_files: None,
            fault: FaultPlan::default(),
            dirty_log: DirtyLog::default(),
            spare: Spare::new(),
        }
    }

    /// Its vCPUs and memory.
    pub const fn shape(&self) -> Shape {
        self.description.shape
    }

    /// Why the guest is over, if it is.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.fate.known()
    }

    /// Wait until the guest is over, for at most `patience` if there is a limit to it.
    pub fn wait_exit(&self, patience: Option<Duration>) -> Option<ExitReason> {
        self.fate.wait(patience)
    }

    /// Whether vCPUs are let run. They may have stopped by themselves: see [`Machine::exit_reason`].
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Type on the guest's console; says how many bytes there was room for.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.board.console_input(bytes)
    }

    /// The guest may have become two: it was restored from a snapshot, or taken over after its host was lost. Called
    /// before it runs. Its kernel is told, and draws new random numbers.
    pub fn renew_generation(&self) {
        self.board.renew_generation();
    }

    /// Press the guest's power button. Says whether it listens: its kernel knows ACPI and has come to its driver.
    pub fn power_button(&self) -> bool {
        self.board.power_button()
    }

    /// Pull the reset line: the guest is booted again, whatever it does and whatever its own resets would do. A paused
    /// one stays paused, ready for its first instruction.
    pub fn reset(&self) -> Result<(), Error> {
        let phase = self.phase();
        if self.fate.known().is_some() {
            return Err(Error::WrongState("cannot reset: the guest is over"));
        }
        if *phase == Phase::Blank {
            return Err(Error::WrongState("cannot reset: this machine has no state yet"));
        }
        if self.boot_files.is_none() {
            return Err(Error::WrongState(NO_FILES));
        }
        self.gate.stop();
        self.board.pause();
        self.fate.take_reset();
        let result = self.boot_again();
        if *phase == Phase::Running && self.fate.known().is_none() {
            self.board.resume();
            self.gate.go();
        }
        result
    }

    /// Type on the guest's paravirtual console; says how many bytes there was room for, none if it has no such console.
    pub fn virtio_console_input(&self, bytes: &[u8]) -> usize {
        self.board.virtio_console_input(bytes)
    }

    /// Ask the guest to leave this much of its memory to the balloon. It takes its time.
    pub fn resize_balloon(&self, size: Bytes) -> Result<(), Error> {
        let pages = u32::try_from(PageCount::holding(size.0).0).unwrap_or(u32::MAX);
        if self.board.resize_balloon(pages) {
            Ok(())
        } else {
            Err(Error::WrongState("the guest has no balloon"))
        }
    }

    /// How much of its memory the guest says it has left to the balloon, if it has one.
    pub fn balloon(&self) -> Option<Bytes> {
        let pages = self.board.balloon_pages()?;
        Some(Bytes(PageCount(pages.into()).bytes()))
    }

    /// Write to guest memory as a device does, recorded for the next harvest.
    pub fn write_memory(&self, at: Gpa, bytes: &[u8]) -> Result<(), Error> {
        self.memory.write(at, bytes)
    }

    /// What its vCPUs left the guest for since the machine was built.
    pub fn counters(&self) -> Counters {
        let mut vcpus: Vec<_> = self.tallies.iter().map(|tally| tally.read()).collect();
        if let Some(writes) = self.tracker.by_vcpu() {
            for (vcpu, writes) in vcpus.iter_mut().zip(writes) {
                vcpu.writes = Some(writes);
            }
        }
        Counters {
            vcpus,
            captures: self.capturer.counters(),
        }
    }

    /// How its writes are recorded, and why so.
    pub const fn dirty_log(&self) -> &DirtyLogReport {
        &self.dirty_log
    }

    /// How the guest's clocks went on when it was last restored here, as measured then; `None` if it never was.
    pub fn clock_report(&self) -> Option<ClockReport> {
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assemble(plan: &Plan<'_>, sinks: Sinks) -> Result<Self, Error> {
        let kvm = probe::open_kvm()?;
        let cpus = plan.shape.cpus();
        let vm = Arc::new(create_vm(&kvm)?);
        let memory = Arc::new(Memory::backed_by(plan.shape, plan.backing)?);
        let (log, dirty_log) = choose::log(&vm, plan.dirty_log, plan.shape)?;
        dirty::set_slots(&vm, memory.blocks(), false)?;
        let gate = Gate::new(cpus.into())?;
        let fate = Arc::new(Fate::new(gate.clone(), sinks.on_exit));
        let output = Arc::new(Output::new(sinks.serial));
        let console = Arc::new(Output::new(sinks.console));
        let fits = match plan.devices {
            Wanted::Launched(devices) => fit::launched(devices, &memory, &console)?,
            Wanted::Described(specs, devices) => fit::described(specs, devices, &memory, &console)?,
        };
        let board = Arc::new(Board::new(&vm, &memory, fits, &output, fate.clone(), plan.fault)?);

        let mut vcpus = Vec::new();
        for index in 0..cpus {
            let fd = vm.create_vcpu(index.into()).map_err(Error::kvm("create a vCPU"))?;
            log.attach(&fd)?;
            let processor = Processor::of(&fd)?;
            vcpus.push(Arc::new(Mutex::new(Vcpu {
                index,
                fd,
                processor,
                tell_of_pause: false,
            })));
        }
        let (host, hidden_msrs) = give_cpu(&kvm, &vm, &vcpus, plan)?;
        let processor = lock(&vcpus[0]).processor.clone();
        let power_on = PowerOn::of(&vm, &vcpus, &host)?;
        let devices = board.kinds();
        let description = Description {
            shape: plan.shape,
            devices,
            virtio: board.specs().to_vec(),
            processor,
            hidden_msrs,
        };
        let mut machine = Self {
            tracker: Tracker::new(log.clone(), memory.space()),
            log,
            dirty_log,
            capturer: Capturer::new(&memory, plan.shape, plan.backing, plan.spare),
            vm,
            tallies: vcpus.iter().map(|_| Arc::default()).collect(),
            vcpus,
            threads: Vec::new(),
            gate,
            fate,
            board,
            output,
            console,
            host,
            description,
            in_parallel: worth_parallel(cpus.into()),
            clock: Mutex::new(None),
            phase: Mutex::new(Phase::Blank),
            power_on,
            restart: Mutex::default(),
            boot_files: plan.boot_files.clone(),
            on_restart: sinks.on_restart,
            running: AtomicBool::new(false),
            memory,
        };
        // From here on, whatever fails, `drop` ends the threads already started.
        for (vcpu, tally) in machine.vcpus.iter().zip(&machine.tallies) {
            machine.threads.push(machine.start_thread(vcpu, tally)?);
        }
        Ok(machine)
    }

    /// Give it its last thread, which needs to know the machine as its owner does.
    fn settle(self) -> Result<Arc<Self>, Error> {
        let mut failed = None;
        let machine = Arc::new_cyclic(|me: &Weak<Self>| {
            let mut machine = self;
            let (me, fate) = (me.clone(), machine.fate.clone());
            let name = std::thread::Builder::new().name("restart".to_owned());
            let spawned = threads::spawn(ThreadClass::Device, name, move || {
                while fate.next_reset() {
                    // Without a machine there is nothing to boot, and `quit` is about to be said.
                    let Some(machine) = me.upgrade() else { return };
                    machine.carry_out_reset();
                }
            });
            match spawned {
                Ok(thread) => machine.threads.push(thread),
                Err(source) => failed = Some(source),
            }
            machine
        });
        failed.map_or(Ok(machine), |source| {
            Err(Error::Host {
                doing: "start the restart thread",
                source,
            })
        })
    }

    /// What happens when the guest asks for a reset, and how it is booted then.
    fn will_restart(&self, restart: Restart) {
        self.fate.restart_on_reset(restart.on_reset == OnReset::Restart);
        *self.restart.lock().unwrap_or_else(PoisonError::into_inner) = restart;
    }

    /// Load the kernel, and set the boot processor at its door. Both are as at power-on.
    fn load(&self) -> Result<(), Error> {
        let files = self.boot_files.as_ref().ok_or(Error::WrongState(NO_FILES))?;
        let cmdline = self
            .restart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .cmdline
            .clone();
        let entry = boot::load(&self.memory, files, &cmdline, &self.tables())?;
        boot::enter(&lock(&self.vcpus[0]).fd, entry)
    }

    /// Boot the guest again if it still wants it: a pause, or its end, may have come first.
    fn carry_out_reset(&self) {
        let phase = self.phase();
        if *phase != Phase::Running || !self.fate.wants_reset() {
            return;
        }
        self.gate.stop();
        self.board.pause();
        self.reset_if_wanted();
        if self.fate.known().is_none() {
            self.board.resume();
            self.gate.go();
        }
    }

    /// Boot the guest again if it wants it. Its vCPUs must be parked and its devices paused; they stay so.
    fn reset_if_wanted(&self) {
        if self.fate.take_reset() {
            // A failure is the guest's end, and told as such.
            let _ = self.boot_again();
        }
    }

    /// Boot the guest again. If that fails there is nothing left that could run.
    fn boot_again(&self) -> Result<(), Error> {
        let result = self.to_first_instruction();
        match &result {
            Ok(()) => {
                tracing::info!("the guest was booted again");
                (self.on_restart)();
            }
            Err(error) => self.fate.end(ExitReason::NoRestart(error.to_string())),
        }
        result
    }

    fn to_first_instruction(&self) -> Result<(), Error> {
        // The vCPUs first: as long as their clocks are on, KVM may write to memory for them.
        let states = self.power_on.vcpus.clone();
        self.each_vcpu(move |vcpu, host| {
            vcpu.tell_of_pause = false;
            states[usize::from(vcpu.index)].put(&vcpu.fd, host)
        })?;
        self.board.reset();
        self.power_on.platform.reset(&self.vm)?;
        self.memory.clear()?;
        self.load()
    }

    /// What a kernel is told about this machine.
    fn tables(&self) -> Tables<'_> {
        Tables {
            cpus: self.shape().cpus(),
            ..self.board.tables()
        }
    }

    fn start_thread(&self, vcpu: &Arc<Mutex<Vcpu>>, tally: &Arc<Tally>) -> Result<JoinHandle<()>, Error> {
        let (index, page) = {
            let vcpu = lock(vcpu);
            (vcpu.index, Arc::new(RunPage::map(&vcpu.fd)?))
        };
        let thread = Thread {
            vcpu: vcpu.clone(),
            gate: self.gate.clone(),
            board: self.board.clone(),
            fate: self.fate.clone(),
            memory: self.memory.clone(),
            host: self.host.clone(),
            tally: tally.clone(),
            log: self.log.clone(),
        };
        let name = std::thread::Builder::new().name(format!("vcpu/{index}"));
        threads::spawn(ThreadClass::Vcpu, name, move || thread.work(page)).map_err(|source| Error::Host {
            doing: "start a vCPU thread",
            source,
        })
    }

    fn try_pause(&self) {
        let mut phase = self.phase();
        if *phase == Phase::Running {
            self.gate.stop();
            self.board.pause();
            self.reset_if_wanted();
            for vcpu in &self.vcpus {
                lock(vcpu).tell_of_pause = true;
            }
            *phase = Phase::Paused;
            self.running.store(false, Ordering::Release);
        }
    }

    fn try_resume(&self) -> Result<(), Error> {
        let mut phase = self.phase();
        if self.fate.known().is_some() {
            return Err(Error::WrongState("cannot run: the guest is over"));
        }
        match *phase {
            Phase::Running => return Ok(()),
            Phase::Blank => {
                return Err(Error::WrongState(
                    "cannot run: this machine has no state yet; restore one first",
                ));
            }
            Phase::Paused => {}
        }
        self.board.take_hold()?;
        self.memory.written_by_others();
        self.running.store(true, Ordering::Release);
        *phase = Phase::Running;
        self.board.resume();
        self.gate.go();
        Ok(())
    }

    fn try_save(&self) -> Result<Vec<StateRecord>, Error> {
        let phase = self.phase();
        match *phase {
            Phase::Running => return Err(Error::WrongState("cannot save: the guest is running; pause it first")),
            Phase::Blank => return Err(Error::WrongState("cannot save: this machine has no state yet")),
            Phase::Paused => {}
        }
        if self.fate.known().is_some() {
            return Err(Error::WrongState("cannot save: the guest is over"));
        }
        let mut records = vec![self.description.encode()];
        records.push(self.restart.lock().unwrap_or_else(PoisonError::into_inner).encode());
        let (platform, clocks) = platform::save(&self.vm)?;
        records.extend(platform);
        records.extend(self.each_vcpu(move |vcpu, host| Ok(VcpuState::of(vcpu, host, &clocks)?.encode(vcpu.index)))?);
        records.extend(self.board.save()?);
        Ok(records)
    }

    fn try_restore(&self, records: &[StateRecord]) -> Result<(), Error> {
        let mut phase = self.phase();
        if *phase == Phase::Running {
            return Err(Error::WrongState(
                "cannot restore: the guest is running; pause it first",
            ));
        }
        if self.fate.known().is_some() {
            return Err(Error::WrongState("cannot restore: this machine's own guest is over"));
        }
        let mut incoming = Incoming::new(records);
        self.same_machine(incoming.take(describe::KIND)?)?;
        let restart = Restart::decode(&mut incoming)?;
        let platform = Platform::decode(&mut incoming)?;
        let mut states = Vec::with_capacity(self.vcpus.len());
        for index in 0..self.shape().cpus() {
            let kind = vcpu_state::kind(index);
            let bytes = incoming.bytes(&kind, vcpu_state::VERSION)?;
            let state = VcpuState::decode(bytes).map_err(Error::malformed(&kind))?;
            state.check(&kind, &self.host)?;
            states.push(state);
        }
        let put_devices_in_place = self.board.prepare(&mut |kind| incoming.take(kind).cloned())?;
        incoming.finish()?;

        // Everything is understood. What fails from here on is the host's refusal, and leaves no state to run.
        *phase = Phase::Blank;
        let (then, now) = (platform.clocks(), platform.apply(&self.vm)?);
        // KVM writes a vCPU's clock into guest memory as soon as it is told where. A twin that is only prepared holds
        // what was shipped and nothing else: its source may take the epoch back, and the next delta would not fit. What
        // is put back here KVM writes again when the vCPU first runs, because it is told of the pause then.
        // covered by: preparing_a_twin_changes_no_byte_of_its_memory
        let mut shipped: BTreeMap<Pfn, Box<PageBytes>> = BTreeMap::new();
        for page in states.iter().flat_map(VcpuState::written_by_kvm) {
            let mut bytes = Box::new([0; PAGE_SIZE]);
            if self.memory.read_page(page, &mut bytes).is_ok() {
                shipped.insert(page, bytes);
            }
        }
        let states = Arc::new(states);
        let of_vcpus = states.clone();
        let applied = self.each_vcpu(move |vcpu, host| {
            let placed = of_vcpus[usize::from(vcpu.index)].apply(vcpu, host, &then, &now)?;
            vcpu.tell_of_pause = true;
            Ok(placed)
        });
        for (page, bytes) in &shipped {
            self.memory.apply_page(*page, bytes)?;
        }
        self.report_clocks(&then, &states, &applied?)?;
        put_devices_in_place();
        self.will_restart(restart);
        *phase = Phase::Paused;
        Ok(())
    }

    /// Read the clocks, and tell by how much they are not what they should be, having been restored.
    fn report_clocks(&self, then: &Reading, states: &[VcpuState], placed: &[TscPlaced]) -> Result<(), Error> {
        let from = platform::clocks(&self.vm)?;
        let mut tscs = Vec::with_capacity(states.len());
        for vcpu in &self.vcpus {
            tscs.push(vcpu_state::read_msr(&lock(vcpu).fd, vcpu_state::IA32_TSC)?);
        }
        let to = platform::clocks(&self.vm)?;
        let errors = states
            .iter()
            .zip(tscs)
            .filter_map(|(state, found)| Some(state.tsc()?.error_ns(then, found?, &from, &to)));
        let (away_ns, error_ns) = to.since(then);
        let report = ClockReport {
            away_ns,
            error_ns,
            tsc: placed
                .iter()
                .copied()
                .find(|placed| *placed != TscPlaced::Offset)
                .unwrap_or(TscPlaced::Offset),
            tsc_error_ns: errors.max_by_key(|error| error.unsigned_abs()),
        };
        let ClockReport { tsc_error_ns, tsc, .. } = report;
        let tsc = tsc.why();
        tracing::info!(away_ns, error_ns, tsc_error_ns, tsc, "the guest's clocks were restored");
        if report.is_off_by(limits::CLOCK_ERROR_NS) {
            tracing::warn!(
                error_ns,
                tsc_error_ns,
                "the guest's clocks are off by more than they should be: it may see time jump"
            );
        }
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = Some(report);
        Ok(())
    }

    /// Saved state fits a machine of the same description; the processor is compared feature by feature elsewhere.
    fn same_machine(&self, record: &StateRecord) -> Result<(), Error> {
        let theirs = Description::decode(record)?;
        let mine = &self.description;
        if theirs.shape.cpus() != mine.shape.cpus() || theirs.shape.memory() != mine.shape.memory() {
            return Err(Error::Incompatible(format!(
                "machine: the state is of {} vCPUs and {}, this machine has {} and {}",
                theirs.shape.cpus(),
                theirs.shape.memory(),
                mine.shape.cpus(),
                mine.shape.memory()
            )));
        }
        same_devices(&theirs.devices, &mine.devices)
    }

    /// Do something with each vCPU, and collect what comes of it in their order.
    ///
    /// The caller does a few vCPUs itself: each takes a dozen calls of microseconds, and waking another thread costs as
    /// much, and far more on a busy host. Many vCPUs are done by their own threads at once.
    fn each_vcpu<T: Send + 'static>(
        &self,
        act: impl Fn(&mut Vcpu, &Host) -> Result<T, Error> + Send + Sync + 'static,
    ) -> Result<Vec<T>, Error> {
        if !self.in_parallel {
            return self.vcpus.iter().map(|vcpu| act(&mut lock(vcpu), &self.host)).collect();
        }
        let empty: Vec<Option<Result<T, Error>>> = self.vcpus.iter().map(|_| None).collect();
        let done = Arc::new(Mutex::new(empty));
        let (places, host) = (done.clone(), self.host.clone());
        let work: Arc<Work> = Arc::new(move |vcpu: &mut Vcpu| {
            let result = act(vcpu, &host);
            places.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(vcpu.index)] = Some(result);
        });
        self.gate.work(work);
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.drain(..)
            .map(|result| result.unwrap_or(Err(Error::WrongState("the machine is being ended"))))
            .collect()
    }

    fn page_access(&self) -> Result<(), Error> {
        if self.is_running() {
            return Err(Error::WrongState(
                "cannot read or apply single pages: the guest is running; pause it first",
            ));
        }
        Ok(())
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a twin cannot be booted again.
const NO_FILES: &str = "it came from another host, and this one was given no kernel to boot it from";

/// Whether vCPUs are saved and restored faster by their own threads than one after the other.
///
/// Measured with `examples/pause_cost.rs` on two busy cores: for 2 and 4 vCPUs the medians are equal within noise (0.24
/// and 0.45 ms), but the worst of 200 saves is 0.5 ms one by one against 20 ms by their threads; for 8 the threads' median
/// is twice as long. So only where there are many vCPUs and a core for each.
fn worth_parallel(vcpus: usize) -> bool {
    const MANY: usize = 8;
    vcpus >= MANY && std::thread::available_parallelism().is_ok_and(|cores| cores.get() >= vcpus)
}

/// What to assemble.
struct Plan<'a> {
    shape: Shape,
    cpu: WantedCpu<'a>,
    devices: Wanted<'a>,
    backing: Backing,
    boot_files: Option<BootFiles>,
    fault: Option<&'a FaultPlan>,
    dirty_log: DirtyLog,
    /// A userfaultfd that was made before; without it the machine makes its own.
    spare: Option<&'a Spare>,
}

/// Which virtio devices there are to be.
enum Wanted<'a> {
    /// These.
    Launched(&'a Devices),
    /// Those, found on this host as this says.
    Described(&'a [Spec], &'a Devices),
}

/// A VM with KVM's interrupt controllers and PIT.
fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().map_err(Error::kvm("create a VM"))?;
    // Three pages for Intel's task state and one for its identity map, in the hole where no RAM is.
    vm.set_identity_map_address(0xfffb_c000)
        .map_err(Error::kvm("place the identity map"))?;
    vm.set_tss_address(0xfffb_d000)
        .map_err(Error::kvm("place the task state"))?;
    vm.create_irq_chip()
        .map_err(Error::kvm("create the interrupt controllers"))?;
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(config).map_err(Error::kvm("create the PIT"))?;
    Ok(vm)
}

/// What processor a machine is to have.
enum WantedCpu<'a> {
    /// As this template shows it, or the one that suits the host.
    Template(Option<&'a Template>),
    /// For a twin: as the guest it is to be has it, with these MSRs hidden.
    Like(&'a Processor, &'a [MsrRange]),
}

/// Make every vCPU the processor it is to be; says what the host can, and which MSRs are hidden.
fn give_cpu(kvm: &Kvm, vm: &VmFd, vcpus: &[Arc<Mutex<Vcpu>>], plan: &Plan<'_>) -> Result<(Host, Vec<MsrRange>), Error> {
    let cpus = plan.shape.cpus();
    let supported = Cpuid::supported(kvm, cpus)?;
    let mut first = lock(&vcpus[0]);
    // What a vCPU has after asking for what is supported is what this host can: more than supported, on hosts whose
    // guests see the processor itself.
    supported.for_vcpu(0, cpus).give_to(&first.fd)?;
    first.processor = Processor::of(&first.fd)?;
    let possible = first.processor.clone();
    let host = Host::learn(kvm, vm, &first.fd, possible.clone())?;
    drop(first);
    let (wanted, hidden) = match plan.cpu {
        WantedCpu::Like(cpu, hidden) => {
            if let Some(missing) = cpu.cpuid.beyond(&possible.cpuid) {
                return Err(Error::Incompatible(format!("cpu: this host lacks {missing}")));
            }
            (cpu.clone(), hidden.to_vec())
        }
        WantedCpu::Template(template) => {
            let template = template.cloned().unwrap_or_else(|| cpu::suitable(kvm));
            let missing = template.needs().beyond(&possible.cpuid.features());
            if !missing.is_empty() {
                return Err(Error::Config {
                    field: "cpus",
                    expected: format!("template {}: this host lacks {}", template.name(), missing.join(", ")),
                });
            }
            let cpuid = supported.shown_by(&template);
            let processor = Processor {
                tsc_khz: possible.tsc_khz,
                cpuid,
            };
            (processor, template.hidden_msrs().to_vec())
        }
    };
    cpu::hide_msrs(vm, &hidden)?;
    for vcpu in vcpus {
        let Vcpu {
            index, fd, processor, ..
        } = &mut *lock(vcpu);
        processor.become_like(
            &Processor {
                tsc_khz: wanted.tsc_khz,
                cpuid: wanted.cpuid.for_vcpu(*index, cpus),
            },
            fd,
        )?;
    }
    if matches!(plan.cpu, WantedCpu::Template(_)) {
        cpu::tell_of_what_shows_anyway(&lock(&vcpus[0]).processor.cpuid, &wanted.cpuid);
    }
    Ok((host, hidden))
}

fn same_devices(theirs: &[String], mine: &[String]) -> Result<(), Error> {
    let only_in = |these: &[String], those: &[String]| these.iter().find(|kind| !those.contains(kind)).cloned();
    if let Some(kind) = only_in(theirs, mine) {
        return Err(Error::Incompatible(format!("{kind}: this machine has no such device")));
    }
    if let Some(kind) = only_in(mine, theirs) {
        return Err(Error::Incompatible(format!(
            "{kind}: the guest has no such device, this machine does"
        )));
    }
    Ok(())
}

impl PowerOn {
    fn of(vm: &VmFd, vcpus: &[Arc<Mutex<Vcpu>>], host: &Host) -> Result<Self, Error> {
        let platform = Platform::of(vm)?;
        let clocks = platform.clocks();
        let state_of = |vcpu: &Arc<Mutex<Vcpu>>| Ok(VcpuState::of(&lock(vcpu), host, &clocks)?.without_counter());
        Ok(Self {
            vcpus: Arc::new(vcpus.iter().map(state_of).collect::<Result<_, Error>>()?),
            platform,
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.fate.quit();
        self.gate.quit();
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // A thread of its own may drop the machine: a vCPU's from `on_exit`, `restart` when it was the last to know
            // it. It returns by itself, without entering again.
            if thread.thread().id() != here && thread.join().is_err() {
                tracing::error!("a thread of the machine panicked");
            }
        }
    }
}

impl PageReader for Machine {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        only_ram(space)?;
        Ok(self.memory.read_pages(pages, out)?)
    }
}

impl Guest for Machine {
    fn describe(&self) -> StateRecord {
        self.description.encode()
    }

    fn spaces(&self) -> Vec<Space> {
        vec![self.memory.space().clone()]
    }

    fn track(&self, on: bool) -> Result<(), GuestError> {
        if on {
            self.capturer.prepare();
        }
        Ok(self.tracker.track(&self.memory, on)?)
    }

    fn untouched(&self) -> Harvest {
        Harvest {
            dirty: vec![(SpaceId::RAM, self.memory.holes())],
        }
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        Ok(self.tracker.harvest(&self.memory)?)
    }

    fn put_back(&self, harvest: &Harvest) {
        self.tracker.put_back(harvest);
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        only_ram(page.space)?;
        self.page_access()?;
        Ok(self.memory.read_page(page.pfn, out)?)
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        only_ram(page.space)?;
        self.page_access()?;
        Ok(self.memory.apply_page(page.pfn, bytes)?)
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.try_pause();
        Ok(())
    }

    fn capture(&self, pages: &Harvest, by: Option<CaptureBy>) -> Result<Box<dyn Captured>, GuestError> {
        let phase = self.phase();
        if *phase == Phase::Running {
            return Err(GuestError::WrongState(
                "cannot capture: the guest is running; pause it first",
            ));
        }
        Ok(self.capturer.capture(pages, by, self.tracker.pages_per_second())?)
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(self.try_resume()?)
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        Ok(self.try_save()?)
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        Ok(self.try_restore(records)?)
    }

    fn await_pages(&self, missing: &Harvest) -> Result<Arc<dyn Arrivals>, GuestError> {
        self.page_access()?;
        let mut pages = PageSet::new(self.memory.space().pages);
        for (space, set) in &missing.dirty {
            only_ram(*space)?;
            pages.union_with(&PageSet::from_words(set.words().to_vec(), pages.capacity()));
        }
        pages.intersect_with(&self.memory.space().present_set());
        Ok(Arc::new(Lazy::new(&self.memory, &pages)?))
    }

    fn give_up(&self) {
        self.board.let_go();
    }

    fn hold_output(&self) {
        self.output.hold();
        self.console.hold();
        self.board.hold_output();
    }

    fn release_output(&self) {
        self.output.release();
        self.console.release();
        self.board.release_output();
    }
}

impl MachineBuilder {
    /// Tell of each machine built, so that whoever drives it only as a [`Guest`] need not know it better.
    #[must_use]
    pub fn on_build(mut self, tell: impl Fn(&Arc<Machine>) + Send + Sync + 'static) -> Self {
        self.on_build = Box::new(tell);
        self
    }

    /// Build no machine with more memory than this, whatever a description asks for.
    #[must_use]
    pub const fn with_memory_most(mut self, most: Bytes) -> Self {
        self.memory_most = most;
        self
    }

    /// Where this host has what is behind the virtio devices of twins, by their ids. Which devices a twin has is in its guest's
    /// description; one that is not found here is refused by name.
    pub fn with_devices(mut self, devices: Devices) -> Result<Self, Error> {
        self.devices = devices.complete()?;
        Ok(self)
    }

    /// Back the memory of twins with this.
    #[must_use]
    pub const fn with_backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Record writes of twins like this, however their sources did.
    #[must_use]
    pub const fn with_dirty_log(mut self, dirty_log: DirtyLog) -> Self {
        self.dirty_log = dirty_log;
        self
    }

    /// Boot twins from these files when they ask for a reset after they have moved here. Without any, a reset ends them:
    /// neither the kernel's file nor its name travels.
    #[must_use]
    pub fn with_boot_files(mut self, files: BootFiles) -> Self {
        self.boot_files = Some(files);
        self
    }

    /// Let the fault device of twins that have one fail by this plan, for tests.
    #[must_use]
    pub fn with_fault(mut self, plan: FaultPlan) -> Self {
        self.fault = plan;
        self
    }

    /// Build the twin of a described machine: blank, to be restored.
    pub fn build_machine(&self, description: &StateRecord) -> Result<Arc<Machine>, Error> {
        let wanted = Description::decode(description)?;
        if wanted.shape.memory() > self.memory_most {
            let (asked, most) = (wanted.shape.memory(), self.memory_most);
            return Err(Error::Incompatible(format!(
                "machine: memory: {asked} asked for, at most {most} allowed here"
            )));
        }
        let has_fault = wanted.devices.iter().any(|kind| kind == "fault/0");
        let plan = Plan {
            shape: wanted.shape,
            cpu: WantedCpu::Like(&wanted.processor, &wanted.hidden_msrs),
            devices: Wanted::Described(&wanted.virtio, &self.devices),
            backing: self.backing,
            boot_files: self.boot_files.clone(),
            fault: has_fault.then_some(&self.fault),
            dirty_log: self.dirty_log,
            spare: Some(&self.spare),
        };
        let machine = Machine::assemble(&plan, (self.sinks)())?;
        same_devices(&wanted.devices, &machine.description.devices)?;
        let machine = machine.settle()?;
        (self.on_build)(&machine);
        Ok(machine)
    }
}

impl GuestBuilder for MachineBuilder {
    fn build(&self, description: &StateRecord) -> Result<Arc<dyn Guest>, GuestError> {
        Ok(self.build_machine(description)?)
    }
}

impl Sinks {
    /// Console output goes to `serial`.
    pub fn new(serial: impl Out + 'static) -> Self {
        Self {
            serial: Arc::new(serial),
            console: Arc::new(Discard),
            on_exit: Box::new(|_| {}),
            on_restart: Box::new(|| {}),
        }
    }

    /// Console output goes to this process's standard output.
    pub fn stdout() -> Self {
        Self::new(Stdout)
    }

    /// Nobody listens to the console.
    pub fn discard() -> Self {
        Self::new(Discard)
    }

    /// What the guest says on its paravirtual console goes to `console`.
    #[must_use]
    pub fn with_console(mut self, console: impl Out + 'static) -> Self {
        self.console = Arc::new(console);
        self
    }

    /// Tell when the guest is over, from a vCPU's thread. The callee may drop the machine but must not call into it.
    #[must_use]
    pub fn with_on_exit(mut self, tell: impl Fn(&ExitReason) + Send + Sync + 'static) -> Self {
        self.on_exit = Box::new(tell);
        self
    }

    /// Tell when the guest was booted again after a reset. The callee must not call into the machine.
    #[must_use]
    pub fn with_on_restart(mut self, tell: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_restart = Box::new(tell);
        self
    }
}

struct Stdout;

impl Out for Stdout {
    fn put(&self, bytes: &[u8]) {
        use std::io::Write as _;
        // A console nobody listens to is no reason to stop the guest.
        let mut out = std::io::stdout();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

struct Discard;

impl Out for Discard {
    fn put(&self, _bytes: &[u8]) {}
}

impl fmt::Debug for Sinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sinks")
    }
}

impl fmt::Debug for MachineBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MachineBuilder(at most {})", self.memory_most)
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Machine({:?}, {:?}, {:?})", self.shape(), self.phase(), self.gate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sharing;

    #[test]
    fn vcpus_are_saved_alike_by_the_caller_and_by_their_own_threads() {
        if let (Err(why), Some(_)) = (
            probe::open_kvm(),
            std::env::var_os("UMBRA_SKIP_KVM").filter(|skip| skip == "1"),
        ) {
            eprintln!("SKIPPED: {why}");
            return;
        }
        let shape = Shape::new(4, Bytes::mib(8), Sharing::Shared).unwrap();
        let plan = Plan {
            shape,
            cpu: WantedCpu::Template(None),
            devices: Wanted::Launched(&Devices::default()),
            backing: Backing::default(),
            boot_files: None,
            fault: None,
            dirty_log: DirtyLog::default(),
            spare: None,
        };
        let mut machine = Machine::assemble(&plan, Sinks::discard()).unwrap();
        let registers = |machine: &Machine| {
            machine
                .each_vcpu(|vcpu, _| Ok((vcpu.index, vcpu.fd.get_regs().unwrap(), std::thread::current().id())))
                .unwrap()
        };
        machine.in_parallel = false;
        let by_caller = registers(&machine);
        machine.in_parallel = true;
        let by_threads = registers(&machine);
        for ((caller, threads), index) in by_caller.iter().zip(&by_threads).zip(0..) {
            assert_eq!(
                (caller.0, caller.1, threads.0, threads.1),
                (index, threads.1, index, caller.1)
            );
            assert_ne!(caller.2, threads.2, "each on its own thread");
        }
        let failed = machine.each_vcpu(|vcpu, _| {
            if vcpu.index == 2 {
                Err(Error::WrongState("two"))
            } else {
                Ok(())
            }
        });
        assert!(matches!(failed, Err(Error::WrongState("two"))));
    }
}
