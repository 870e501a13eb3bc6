//! One vCPU: its thread, and what it does with each exit.
//!
//! A vCPU belongs to its thread while it runs; while it is parked whoever controls the machine may lock it and save or
//! restore it. The thread is started when the machine is built, long before it is needed, so that a shadow takes over
//! without creating anything.
//!
//! # Leaving the guest cleanly
//!
//! When a vCPU leaves `KVM_RUN` to have a port or MMIO read answered, the instruction is *not* finished: KVM completes it
//! at the next entry, moving the answer into a register and RIP past the instruction. State saved before that would show
//! neither, and the guest would read the port again on the other side, or lose what it read. So before parking, a vCPU
//! enters once more with `immediate_exit` set: KVM completes what is pending and comes back without running the guest
//! (kvm/api.rst, `KVM_RUN`, "immediate_exit"). Completing may write to guest memory (`rep ins`), which is why it is
//! part of stopping and not of saving: the last harvest must come after it. One instruction may need several exits (a
//! string, an access across two pages), so it enters again until KVM says it was interrupted.

use std::fmt;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
    kvm_run__bindgen_ty_1__bindgen_ty_4 as IoExit,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, unblock_signal};

use crate::board::Board;
use crate::counters::{Exit, Tally};
use crate::dirty::WriteLog;
use crate::error::Error;
use crate::fallback;
use crate::fate::{ExitReason, Fate};
use crate::gate::{Gate, Kick, Next};
use crate::ioctls::thread_id;
use crate::memory::Memory;
use crate::state::vcpu::{Host, Processor};

/// A vCPU and which one it is.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) fd: VcpuFd,
    /// Always what KVM would say of `fd`.
    pub(crate) processor: Processor,
    /// Tell the guest at its next entry that it was stopped, so that its watchdogs do not mistake the pause for a hang.
    pub(crate) tell_of_pause: bool,
}

/// What a vCPU's thread needs.
pub(crate) struct Thread {
    pub(crate) vcpu: Arc<Mutex<Vcpu>>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) board: Arc<Board>,
    pub(crate) fate: Arc<Fate>,
    /// Held so that guest memory lives as long as a vCPU that may write to it; touched only for an instruction that KVM
    /// cannot emulate.
    pub(crate) memory: Arc<Memory>,
    pub(crate) host: Host,
    pub(crate) tally: Arc<Tally>,
    /// May ask for room: see [`WriteLog::make_room`].
    pub(crate) log: Arc<dyn WriteLog>,
}

/// Our own mapping of the page KVM and a vCPU talk through.
///
/// kvm-ioctls has one too, and makes Rust references into it; this one is at another address and is accessed only
/// through atomics and volatile reads, so a thread may set `immediate_exit` while the vCPU's own thread is inside
/// `KVM_RUN`.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<kvm_run>);

// SAFETY: the page is plain memory shared with the kernel; every access below is atomic or volatile and by value.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(crate) fn map(vcpu: &VcpuFd) -> Result<Self, Error> {
        let (bytes, prot) = (size_of::<kvm_run>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping wherever the kernel likes replaces nothing. A vCPU can be mapped any number of times.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(Error::last_os("map a vCPU's run page"));
        }
        Ok(Self(
            NonNull::new(page.cast()).expect("the kernel maps nothing at address zero"),
        ))
    }

    /// Have `KVM_RUN` return as soon as it is entered, or no longer.
    pub(crate) fn leave_at_once(&self, yes: bool) {
        // SAFETY: the field is one byte within our mapping, which lives as long as `self`.
        let field = unsafe { &raw mut (*self.0.as_ptr()).immediate_exit };
        // SAFETY: a byte is aligned for AtomicU8, and everybody in this process accesses it atomically through this
        // mapping; the kernel reads it once per entry.
        let atomic = unsafe { AtomicU8::from_ptr(field) };
        atomic.store(u8::from(yes), Ordering::SeqCst);
    }

    /// Bytes per access of the port exit just taken: kvm-ioctls tells only the total of a string of them.
    fn port_access_bytes(&self) -> usize {
        // SAFETY: the union lies within our mapping; taking its address reads nothing.
        let io: *const IoExit = unsafe { &raw const (*self.0.as_ptr()).__bindgen_anon_1 }.cast();
        // SAFETY: `io` is plain bytes, valid for any bit pattern; the kernel writes it only inside KVM_RUN, and the
        // vCPU's thread, which alone calls this, is outside.
        let io = unsafe { io.read_volatile() };
        io.size.into()
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and ends with its only owner.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

/// Whether KVM still has to finish an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pending {
    Yes,
    No,
}

impl Thread {
    /// The thread's body: take part in every round until told to return.
    pub(crate) fn work(self, page: Arc<RunPage>) {
        // A thread inherits its maker's signal mask, and the maker may be anybody. Failing here cannot happen for a
        // valid signal; if it did, only stopping would take longer.
        if let Err(error) = unblock_signal(SIGRTMIN()) {
            tracing::warn!(%error, "cannot unblock the vCPU kick signal");
        }
        let index = usize::from(lock(&self.vcpu).index);
        self.gate.join(
            index,
            Kick {
                thread: thread_id(),
                page: page.clone(),
            },
        );
        let mut round = 0;
        loop {
            match self.gate.next(&mut round) {
                Next::Run => self.run(&mut lock(&self.vcpu), &page),
                Next::Work(work) => work(&mut lock(&self.vcpu)),
                Next::Nothing => {}
                Next::Quit => return drop(self.memory),
            }
            self.gate.finished();
        }
    }

    /// Run the guest until the gate says otherwise, and leave it with nothing pending.
    fn run(&self, vcpu: &mut Vcpu, page: &RunPage) {
        page.leave_at_once(false);
        if std::mem::take(&mut vcpu.tell_of_pause) {
            // EINVAL: the guest has not set up kvmclock, so it cannot be told and has nothing to be told about.
            let _ = vcpu.fd.kvmclock_ctrl();
        }
        let mut pending = Pending::No;
        while self.gate.running() {
            pending = self.enter(vcpu, page);
        }
        page.leave_at_once(true);
        while pending == Pending::Yes && !self.fate.is_fault() {
            pending = self.enter(vcpu, page);
        }
    }

    /// Enter the guest once and do what its exit asks for.
    fn enter(&self, vcpu: &mut Vcpu, page: &RunPage) -> Pending {
        let exit = match vcpu.fd.run() {
            Ok(exit) => exit,
            // Interrupted; or an application processor that was still waiting to be started.
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                self.tally.exit(Exit::Interrupted);
                return Pending::No;
            }
            Err(error) => return self.fault(vcpu, &format!("KVM_RUN failed: {error}")),
        };
        self.tally.exit(kind_of(&exit));
        match exit {
            VcpuExit::IoOut(port, data) => {
                for access in data.chunks(page.port_access_bytes().max(1)) {
                    self.board.ports.write(port.into(), access);
                }
                Pending::Yes
            }
            VcpuExit::IoIn(port, data) => {
                for access in data.chunks_mut(page.port_access_bytes().max(1)) {
                    self.board.ports.read(port.into(), access);
                }
                Pending::Yes
            }
            VcpuExit::MmioRead(address, data) => {
                self.board.mmio.read(address, data);
                Pending::Yes
            }
            VcpuExit::MmioWrite(address, data) => {
                self.board.mmio.write(address, data);
                Pending::Yes
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => Pending::No,
            VcpuExit::Shutdown => {
                self.fate.reset(fault_of(vcpu, "triple fault"));
                Pending::No
            }
            VcpuExit::SystemEvent(event, _) => self.system_event(vcpu, event),
            VcpuExit::InternalError => self.internal_error(vcpu),
            VcpuExit::FailEntry(reason, cpu) => self.fault(
                vcpu,
                &format!("the processor refused to enter the guest: reason {reason:#x} on cpu {cpu}"),
            ),
            VcpuExit::MemoryFault { flags, gpa, size } => self.fault(
                vcpu,
                &format!("memory fault at {gpa:#x}, {size:#x} bytes, flags {flags:#x}"),
            ),
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => {
                match self.log.make_room(self.memory.blocks(), vcpu.index) {
                    Ok(()) => Pending::No,
                    Err(error) => self.fault(vcpu, &error.to_string()),
                }
            }
            other => {
                let text = format!("unexpected exit {other:?}");
                self.fault(vcpu, &text)
            }
        }
    }

    fn system_event(&self, vcpu: &Vcpu, event: u32) -> Pending {
        match event {
            KVM_SYSTEM_EVENT_SHUTDOWN => self.fate.end(ExitReason::Shutdown),
            KVM_SYSTEM_EVENT_RESET => self.fate.reset(ExitReason::Reset),
            KVM_SYSTEM_EVENT_CRASH => return self.fault(vcpu, "the guest says it has crashed"),
            other => return self.fault(vcpu, &format!("unexpected system event {other}")),
        }
        Pending::No
    }

    /// KVM_EXIT_INTERNAL_ERROR: an instruction it cannot emulate is done here, if it is one of those that can be.
    fn internal_error(&self, vcpu: &mut Vcpu) -> Pending {
        let internal = Internal::of(&mut vcpu.fd);
        if internal.suberror != fallback::EMULATION {
            return self.fault(vcpu, &internal.to_string());
        }
        match fallback::emulate(&vcpu.fd, &self.memory, &self.host, &internal) {
            Ok(instruction) => {
                if self.tally.emulated(instruction) {
                    tracing::debug!(
                        vcpu = vcpu.index,
                        instruction = instruction.name(),
                        "emulated what KVM cannot"
                    );
                }
                Pending::No
            }
            Err(why) => self.fault(vcpu, &why),
        }
    }

    /// The guest cannot go on.
    fn fault(&self, vcpu: &Vcpu, what: &str) -> Pending {
        self.fate.end(fault_of(vcpu, what));
        Pending::No
    }
}

const fn kind_of(exit: &VcpuExit<'_>) -> Exit {
    match exit {
        VcpuExit::IoIn(..) => Exit::PortRead,
        VcpuExit::IoOut(..) => Exit::PortWrite,
        VcpuExit::MmioRead(..) => Exit::MmioRead,
        VcpuExit::MmioWrite(..) => Exit::MmioWrite,
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Exit::Interrupted,
        VcpuExit::Hlt => Exit::Halt,
        VcpuExit::SystemEvent(..) => Exit::SystemEvent,
        VcpuExit::InternalError => Exit::Emulation,
        VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => Exit::RingFull,
        _ => Exit::Other,
    }
}

/// What happened, and where.
fn fault_of(vcpu: &Vcpu, what: &str) -> ExitReason {
    let at = vcpu
        .fd
        .get_regs()
        .map_or_else(|_| "an unknown place".to_owned(), |regs| format!("rip {:#x}", regs.rip));
    ExitReason::Fault(format!("vcpu {} at {at}: {what}", vcpu.index))
}

/// What KVM says with KVM_EXIT_INTERNAL_ERROR.
pub(crate) struct Internal {
    pub(crate) suberror: u32,
    count: usize,
    words: [u64; 16],
}

impl Internal {
    fn of(fd: &mut VcpuFd) -> Self {
        let run = fd.get_kvm_run();
        // SAFETY: every member of the union is plain integers, and KVM has just filled in this one: the exit reason is
        // KVM_EXIT_INTERNAL_ERROR, or we would not be here.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        Self {
            suberror: internal.suberror,
            count: usize::try_from(internal.ndata).unwrap_or(usize::MAX),
            words: internal.data,
        }
    }

    /// What comes with it.
    pub(crate) fn data(&self) -> &[u64] {
        &self.words[..self.count.min(self.words.len())]
    }
}

impl fmt::Display for Internal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.suberror {
            2 => "KVM met two events at once",
            3 => "KVM met an exception while delivering an event",
            _ => "KVM met an error of its own",
        };
        write!(f, "{kind}: suberror {}, data {:x?}", self.suberror, self.data())
    }
}

/// Lock a vCPU. Its state is KVM's and whole after every call, so a panic elsewhere does not spoil it.
pub(crate) fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vcpu({})", self.index)
    }
}
