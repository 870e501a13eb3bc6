//! A device's own thread: what it waits for, and how it is stopped.
//!
//! ```text
//!            a queue's event          the world's descriptor        a moment that was asked for
//!                   │                           │                              │
//!   working: ── notified(queue) ──────────── world() ──────────────────────── world() ──▶ again if there is more
//!      │ pause()                                                                 ▲
//!      ▼                                                                         │
//!   draining: world() until nothing is busy ──▶ paused ── resume() ── everything once
//! ```
//!
//! A [`Post`] is a device with what it waits for. Events are watched edge-triggered: a worker never reads an event, so a
//! notification costs it one system call, and a descriptor that stays readable because its device has no room does not keep it
//! awake. In return every edge must lead to a look: while it drains, a worker lets queue notifications pass, and looks at
//! everything once when it is let go on.
//!
//! # Pausing
//!
//! The vCPUs have stopped and the devices are paused (they take nothing more from their queues) before a worker is told. It goes
//! on collecting what its devices have handed to the world, and says so when nothing is left: from then on nothing of it
//! writes to guest memory, and the harvest after that is the last.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use umbra_devices::virtio::{Wake, Work};
use umbra_units::Now;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::threads::{self, ThreadClass};

/// One device's place at a worker.
pub(crate) struct Post {
    pub(crate) duty: Arc<dyn Work>,
    /// One per queue, signalled by KVM and by the device's bell.
    pub(crate) queues: Vec<Arc<EventFd>>,
    /// Descriptors whose readiness is the world's news. They are open for as long as the post exists.
    pub(crate) world: Vec<RawFd>,
}

/// A thread that works for some devices. Dropping it ends the thread.
pub(crate) struct Worker {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

struct Orders {
    state: Mutex<State>,
    /// The state changed: for whoever waits for a pause, and for the paused thread.
    changed: Condvar,
    /// Gets the thread out of waiting for events.
    call: EventFd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Working,
    Draining,
    Paused,
    /// Leave as soon as possible.
    Quit,
    /// The thread has ended.
    Gone,
}

impl Worker {
    /// Start a thread called `name`, paused, that works at these posts.
    pub(crate) fn start(name: &str, posts: Vec<Post>) -> Result<Self, Error> {
        let failed = |source| Error::Host {
            doing: "start a device worker",
            source,
        };
        let orders = Arc::new(Orders {
            state: Mutex::new(State::Paused),
            changed: Condvar::new(),
            call: event().map_err(failed)?,
        });
        let bench = Bench::new(posts, &orders).map_err(failed)?;
        let builder = std::thread::Builder::new().name(name.to_owned());
        let thread = threads::spawn(ThreadClass::Device, builder, {
            let orders = orders.clone();
            move || {
                let _gone = Gone(&orders);
                bench.run(&orders);
            }
        })
        .map_err(failed)?;
        Ok(Self {
            orders,
            thread: Some(thread),
        })
    }

    /// Let it work. Its devices are resumed.
    pub(crate) fn resume(&self) {
        self.orders
            .set(State::Working, |state| matches!(state, State::Paused | State::Draining));
    }

    /// Have it finish what is under way. Its devices are paused. [`drained`](Self::drained) waits for it.
    pub(crate) fn pause(&self) {
        self.orders.set(State::Draining, |state| state == State::Working);
    }

    /// Wait until nothing of it is under way.
    pub(crate) fn drained(&self) {
        let mut state = self.orders.state();
        while *state == State::Draining {
            state = self.orders.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.orders.set(State::Quit, |state| state != State::Gone);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("a device worker panicked");
        }
    }
}

impl Orders {
    fn set(&self, next: State, from: impl FnOnce(State) -> bool) {
        let mut state = self.state();
        if from(*state) {
            *state = next;
            drop(state);
            self.changed.notify_all();
            // Full only after 2^64 - 2 calls that nobody heard: then there is one waiting anyway.
            let _ = self.call.write(1);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever waits for a thread that is no more, by its own panic, must not wait for ever.
struct Gone<'a>(&'a Orders);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        *self.0.state() = State::Gone;
        self.0.changed.notify_all();
    }
}

/// An event nobody waits to signal.
pub(crate) fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// What the thread works with.
struct Bench {
    posts: Vec<Post>,
    /// Per post, when it wants to be called again.
    wakes: Vec<Option<Now>>,
    epoll: Epoll,
    began: Instant,
    /// Looks that are due, each at most once.
    due: VecDeque<(usize, Cause)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Queue(u16),
    World,
}

/// What an epoll event's number says: the caller, or a post and what of it.
const CALL: u64 = u64::MAX;
const WORLD: u64 = 0xffff_ffff;
/// Events taken from the kernel at once.
const EVENTS: usize = 32;

impl Bench {
    fn new(posts: Vec<Post>, orders: &Orders) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let watch = |fd: RawFd, number: u64| {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, number);
            epoll.ctl(ControlOperation::Add, fd, event)
        };
        watch(orders.call.as_raw_fd(), CALL)?;
        for (index, post) in (0_u64..).zip(&posts) {
            for (queue, event) in (0_u64..).zip(&post.queues) {
                watch(event.as_raw_fd(), index << 32 | queue)?;
            }
            for fd in &post.world {
                watch(*fd, index << 32 | WORLD)?;
            }
        }
        Ok(Self {
            wakes: posts.iter().map(|_| None).collect(),
            posts,
            epoll,
            began: Instant::now(),
            due: VecDeque::new(),
        })
    }

    fn run(mut self, orders: &Orders) {
        let mut looked = false;
        loop {
            let state = *orders.state();
            match state {
                State::Quit | State::Gone => return,
                State::Working if !looked => {
                    looked = true;
                    self.look_at_everything();
                }
                State::Working => {}
                State::Draining => {
                    looked = false;
                    self.due.clear();
                    self.wakes.fill(None);
                    self.collect();
                    if self.posts.iter().all(|post| post.duty.busy() == 0) {
                        let mut state = orders.state();
                        if *state == State::Draining {
                            *state = State::Paused;
                        }
                        drop(state);
                        orders.changed.notify_all();
                        continue;
                    }
                }
                State::Paused => {
                    looked = false;
                    let mut state = orders.state();
                    while *state == State::Paused {
                        state = orders.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    }
                    continue;
                }
            }
            if let Err(error) = self.wait(state) {
                // Nothing a guest does leads here: the kernel has no memory for an event, or the process is broken.
                tracing::error!(%error, "a device worker cannot wait for events and gives up");
                return;
            }
            if state == State::Working {
                self.work();
            }
        }
    }

    /// Wait for something to do, and note it down.
    fn wait(&mut self, state: State) -> io::Result<()> {
        let timeout = if self.due.is_empty() {
            self.wakes
                .iter()
                .flatten()
                .min()
                .map_or(-1, |moment| milliseconds(moment.since(self.now())))
        } else {
            0
        };
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        if state != State::Working {
            return Ok(()); // whatever it was, the next round of draining collects everything
        }
        for event in &events[..count] {
            match event.data() {
                CALL => {}
                number => {
                    let post = usize::try_from(number >> 32).unwrap_or(usize::MAX);
                    let cause = match number & 0xffff_ffff {
                        WORLD => Cause::World,
                        queue => Cause::Queue(u16::try_from(queue).unwrap_or(u16::MAX)),
                    };
                    self.note(post, cause);
                }
            }
        }
        let now = self.now();
        for post in 0..self.posts.len() {
            if self.wakes[post].is_some_and(|moment| moment <= now) {
                self.wakes[post] = None;
                self.note(post, Cause::World);
            }
        }
        Ok(())
    }

    fn note(&mut self, post: usize, cause: Cause) {
        if post < self.posts.len() && !self.due.contains(&(post, cause)) {
            self.due.push_back((post, cause));
        }
    }

    /// Do what is due now, each once.
    fn work(&mut self) {
        for _ in 0..self.due.len() {
            let Some((post, cause)) = self.due.pop_front() else {
                return;
            };
            let (now, duty) = (self.now(), &self.posts[post].duty);
            let wake = match cause {
                Cause::Queue(queue) => duty.notified(queue, now),
                Cause::World => duty.world(now),
            };
            match wake {
                Wake::Again => self.note(post, Cause::World),
                Wake::At(moment) => {
                    self.wakes[post] = Some(self.wakes[post].map_or(moment, |other| other.min(moment)));
                }
                Wake::Idle => {}
            }
        }
    }

    /// After a pause: anything may have happened.
    fn look_at_everything(&mut self) {
        for post in 0..self.posts.len() {
            for queue in (0..=u16::MAX).take(self.posts[post].queues.len()) {
                self.note(post, Cause::Queue(queue));
            }
            self.note(post, Cause::World);
        }
    }

    /// Take back what the world has finished.
    fn collect(&self) {
        let now = self.now();
        for post in &self.posts {
            post.duty.world(now);
        }
    }

    fn now(&self) -> Now {
        Now::ZERO + self.began.elapsed()
    }
}

/// Rounded up, so that a moment is not asked for before it has come.
fn milliseconds(span: Duration) -> i32 {
    i32::try_from(span.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({:?})", self.orders.state())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use umbra_devices::virtio::Counters;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Tells of each look, and answers as it is told to.
    struct Told {
        to: Mutex<mpsc::Sender<Cause>>,
        next: Mutex<VecDeque<Wake>>,
        busy: AtomicUsize,
    }

    impl Told {
        fn tell(&self, cause: Cause) -> Wake {
            // The answer is taken first: once a test has heard of a look, what it says next is for the next one.
            let answer = self.next.lock().unwrap().pop_front().unwrap_or(Wake::Idle);
            self.to.lock().unwrap().send(cause).unwrap();
            answer
        }
    }

    impl Work for Told {
        fn notified(&self, queue: u16, _now: Now) -> Wake {
            self.tell(Cause::Queue(queue))
        }

        fn world(&self, _now: Now) -> Wake {
            self.tell(Cause::World)
        }

        fn busy(&self) -> usize {
            self.busy.load(Ordering::SeqCst)
        }

        fn kind(&self) -> String {
            "told/0".to_owned()
        }

        fn counters(&self) -> Counters {
            Counters::default()
        }
    }

    struct Scene {
        duty: Arc<Told>,
        told: mpsc::Receiver<Cause>,
        queues: Vec<Arc<EventFd>>,
        world: EventFd,
        worker: Worker,
    }

    fn scene() -> Scene {
        let (to, told) = mpsc::channel();
        let duty = Arc::new(Told {
            to: Mutex::new(to),
            next: Mutex::default(),
            busy: AtomicUsize::new(0),
        });
        let queues: Vec<_> = (0..2).map(|_| Arc::new(event().unwrap())).collect();
        let world = event().unwrap();
        let post = Post {
            duty: duty.clone(),
            queues: queues.clone(),
            world: vec![world.as_raw_fd()],
        };
        let worker = Worker::start("test-worker", vec![post]).unwrap();
        Scene {
            duty,
            told,
            queues,
            world,
            worker,
        }
    }

    impl Scene {
        fn next(&self) -> Cause {
            self.told.recv_timeout(PATIENCE).unwrap()
        }

        /// Resume, and hear the look at everything.
        fn begin(&self) {
            self.worker.resume();
            let everything = [self.next(), self.next(), self.next()];
            assert_eq!(everything, [Cause::Queue(0), Cause::Queue(1), Cause::World]);
        }
    }

    #[test]
    fn every_notification_and_every_news_of_the_world_leads_to_a_look() {
        let scene = scene();
        scene.begin();
        for _ in 0..3 {
            scene.queues[1].write(1).unwrap();
            assert_eq!(scene.next(), Cause::Queue(1));
            scene.world.write(1).unwrap();
            assert_eq!(scene.next(), Cause::World);
        }
        scene.queues[0].write(1).unwrap();
        assert_eq!(scene.next(), Cause::Queue(0));
    }

    #[test]
    fn a_device_that_has_more_to_do_or_a_time_to_do_it_is_called_again() {
        let scene = scene();
        scene.begin();
        *scene.duty.next.lock().unwrap() = [Wake::Again, Wake::Again, Wake::At(Now::from_us(1)), Wake::Idle].into();
        scene.queues[0].write(1).unwrap();
        let heard: Vec<Cause> = (0..4).map(|_| scene.next()).collect();
        assert_eq!(heard, [Cause::Queue(0), Cause::World, Cause::World, Cause::World]);
    }

    #[test]
    fn a_pause_waits_for_what_is_under_way_and_notifications_wait_for_its_end() {
        let scene = scene();
        scene.begin();
        scene.duty.busy.store(2, Ordering::SeqCst);
        scene.worker.pause();
        assert_eq!(scene.next(), Cause::World);
        assert_eq!(*scene.worker.orders.state(), State::Draining);
        scene.queues[0].write(1).unwrap();
        for left in [1, 0] {
            scene.duty.busy.store(left, Ordering::SeqCst);
            scene.world.write(1).unwrap();
        }
        scene.worker.drained();
        assert_eq!(*scene.worker.orders.state(), State::Paused);
        while let Ok(cause) = scene.told.try_recv() {
            assert_eq!(cause, Cause::World, "nothing is taken from a queue meanwhile");
        }
        scene.queues[1].write(1).unwrap();
        scene.begin();
        scene.worker.pause();
        scene.worker.drained();
    }

    #[test]
    fn a_worker_that_is_gone_keeps_nobody_waiting() {
        struct Bad;
        impl Work for Bad {
            fn notified(&self, _queue: u16, _now: Now) -> Wake {
                panic!("planned by a test")
            }
            fn world(&self, _now: Now) -> Wake {
                panic!("planned by a test")
            }
            fn busy(&self) -> usize {
                1
            }
            fn kind(&self) -> String {
                "bad/0".to_owned()
            }
            fn counters(&self) -> Counters {
                Counters::default()
            }
        }
        let post = Post {
            duty: Arc::new(Bad),
            queues: vec![Arc::new(event().unwrap())],
            world: Vec::new(),
        };
        let worker = Worker::start("test-worker", vec![post]).unwrap();
        worker.resume();
        worker.pause();
        worker.drained();
    }
}
