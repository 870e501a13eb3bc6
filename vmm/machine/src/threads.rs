//! The threads a machine makes, and a way to be told of each as it starts.
//!
//! What a thread may do (its user, its capabilities, its system calls) belongs to the thread in Linux. Whoever confines a
//! process must therefore be called *on* each of its threads, before that thread does anything else. This is process-wide,
//! as a panic hook is: threads are made deep inside a machine, and confinement is the process's business.

use std::io;
use std::sync::OnceLock;
use std::thread::JoinHandle;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadClass {
    /// Runs guest code: enters the guest, and answers its port and MMIO accesses.
    Vcpu,
    /// Works for a device (queues, files, network interfaces, sockets), or for the machine: loads it again after a reset.
    Device,
}

static ON_START: OnceLock<fn(ThreadClass)> = OnceLock::new();

/// Call `tell` on every thread of every machine of this process, first of all. Only the first call has an effect; it says
/// whether it was that.
pub fn on_thread_start(tell: fn(ThreadClass)) -> bool {
    ON_START.set(tell).is_ok()
}

/// Start a thread.
pub(crate) fn spawn(
    class: ThreadClass,
    builder: std::thread::Builder,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    builder.spawn(move || {
        if let Some(tell) = ON_START.get() {
            tell(class);
        }
        body();
    })
}
