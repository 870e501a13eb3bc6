//! Stop and go: how vCPU threads are let run, stopped within microseconds, and put to work while stopped.
//!
//! ```text
//!             go(Run)                     stop()
//!   parked ───────────▶ running ─────────────────────▶ parked
//!      │ go(Work)  ▲                (order, kick, wait)
//!      ▼           │
//!   working ───────┘          quit(): every thread returns
//! ```
//!
//! # No lost kick
//!
//! A vCPU in `KVM_RUN` leaves it on a signal; one that is about to enter must not. So the kicker, in this order: sets the
//! order to stop, sets `immediate_exit` in the vCPU's run page, sends the signal. The vCPU, in this order: clears
//! `immediate_exit`, looks at the order, enters. If the kick came before the vCPU looked, it sees the order; if after,
//! `immediate_exit` is still set when it enters, and KVM returns at once; if it is already inside, the signal gets it
//! out. The signal's handler does nothing: that `KVM_RUN` is interrupted is all that is wanted.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::error::Error;
use crate::ioctls::signal_thread;
use crate::vcpu::{RunPage, Vcpu};

/// What all vCPU threads are told.
pub(crate) struct Gate {
    state: Mutex<State>,
    /// Tells the threads that `round` or `order` changed.
    changed: Condvar,
    /// Tells the controller that `busy` reached zero.
    idle: Condvar,
    /// A copy of `state.order` that a running vCPU can look at cheaply.
    order: AtomicU8,
    /// One per thread, filled in as each starts.
    kicks: Box<[OnceLock<Kick>]>,
}

struct State {
    order: Order,
    /// Grows with each [`Gate::go`]; a thread takes part in each round once.
    round: u64,
    /// Threads that have not finished the current round.
    busy: usize,
    work: Option<Arc<Work>>,
}

/// Something for each vCPU's own thread to do with its vCPU.
pub(crate) type Work = dyn Fn(&mut Vcpu) + Send + Sync;

/// What a thread is to do in this round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Order {
    /// Nothing: finish and wait for the next round.
    Stop,
    /// Run the guest.
    Run,
    /// Do the [`Work`] once.
    Work,
    /// Return.
    Quit,
}

/// How to get one thread out of `KVM_RUN`.
#[derive(Debug)]
pub(crate) struct Kick {
    pub(crate) thread: i32,
    pub(crate) page: Arc<RunPage>,
}

/// What a thread does next.
pub(crate) enum Next {
    Run,
    Work(Arc<Work>),
    /// The round was over before this thread began it.
    Nothing,
    Quit,
}

impl Gate {
    /// A gate for `threads` threads, all parked.
    pub(crate) fn new(threads: usize) -> Result<Arc<Self>, Error> {
        kick_handler()?;
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                order: Order::Stop,
                round: 0,
                busy: 0,
                work: None,
            }),
            changed: Condvar::new(),
            idle: Condvar::new(),
            order: AtomicU8::new(Order::Stop as u8),
            kicks: (0..threads).map(|_| OnceLock::new()).collect(),
        }))
    }

    /// A thread has started and can be kicked.
    pub(crate) fn join(&self, thread: usize, kick: Kick) {
        self.kicks[thread].set(kick).expect("each thread joins once");
    }

    /// Let every vCPU run. They must be parked.
    pub(crate) fn go(&self) {
        self.begin(Order::Run, None);
    }

    /// Have every thread do `work` with its vCPU, and wait until all have. They must be parked.
    pub(crate) fn work(&self, work: Arc<Work>) {
        self.begin(Order::Work, Some(work));
        self.wait_idle();
    }

    /// Stop every vCPU and wait until all are parked.
    pub(crate) fn stop(&self) {
        self.halt();
        self.wait_idle();
    }

    /// Have every vCPU stop, without waiting: what a vCPU's own thread may do.
    pub(crate) fn halt(&self) {
        let mut state = self.state();
        if state.order == Order::Run {
            self.set_order(&mut state, Order::Stop);
            drop(state);
            self.kick();
        }
    }

    /// Have every thread return.
    pub(crate) fn quit(&self) {
        let mut state = self.state();
        self.set_order(&mut state, Order::Quit);
        drop(state);
        self.changed.notify_all();
        self.kick();
    }

    /// What a running vCPU is to do: anything but [`Order::Run`] means leave.
    pub(crate) fn running(&self) -> bool {
        self.order.load(Ordering::SeqCst) == Order::Run as u8
    }

    /// Wait for the round after `round`; remembers it there.
    pub(crate) fn next(&self, round: &mut u64) -> Next {
        let mut state = self.state();
        while state.order != Order::Quit && state.round == *round {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        *round = state.round;
        match state.order {
            Order::Run => Next::Run,
            Order::Work => Next::Work(state.work.clone().expect("Gate::begin gives work with the order")),
            Order::Stop => Next::Nothing,
            Order::Quit => Next::Quit,
        }
    }

    /// A thread has finished its round.
    pub(crate) fn finished(&self) {
        let mut state = self.state();
        state.busy = state.busy.saturating_sub(1);
        if state.busy == 0 {
            if state.order == Order::Work {
                self.set_order(&mut state, Order::Stop);
                state.work = None;
            }
            self.idle.notify_all();
        }
    }

    fn begin(&self, order: Order, work: Option<Arc<Work>>) {
        let mut state = self.state();
        assert_eq!(state.busy, 0, "a round begins when the one before is over");
        if state.order == Order::Quit {
            return;
        }
        state.busy = self.kicks.len();
        state.round += 1;
        state.work = work;
        self.set_order(&mut state, order);
        drop(state);
        self.changed.notify_all();
    }

    fn wait_idle(&self) {
        let mut state = self.state();
        while state.busy > 0 && state.order != Order::Quit {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn kick(&self) {
        for kick in self.kicks.iter().filter_map(OnceLock::get) {
            kick.page.leave_at_once(true);
            signal_thread(kick.thread, SIGRTMIN());
        }
    }

    fn set_order(&self, state: &mut MutexGuard<'_, State>, order: Order) {
        state.order = order;
        self.order.store(order as u8, Ordering::SeqCst);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Install the kick signal's handler, once per process.
fn kick_handler() -> Result<(), Error> {
    extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), interrupted).map_err(|error| error.errno()))
        .map_err(|errno| Error::Host {
            doing: "install the vCPU kick signal",
            source: std::io::Error::from_raw_os_error(errno),
        })
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "Gate({:?}, round {}, {} busy)", state.order, state.round, state.busy)
    }
}
