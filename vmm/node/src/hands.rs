//! The threads that do what the state machines decide: everything that blocks or computes happens here, so that the
//! loops stay responsive.
//!
//! A *hand* is one thread with a queue: it does its work in order and answers each piece with the moment it was done,
//! read right there, so that a busy loop does not blur the breakdown of a pause.

use std::sync::mpsc;
use std::thread;

use tokio::sync::mpsc::UnboundedSender;
use umbra_units::Now;

use crate::clock::Clock;
use crate::error::StartError;

/// Where a hand puts its answers. As many are outstanding as pieces of work, which the state machines bound.
pub(crate) type Answers<A> = UnboundedSender<(Now, A)>;

/// A thread that does pieces of work `W` in order. Dropping it lets the queue run empty and the thread end.
#[derive(Debug)]
pub(crate) struct Hand<W> {
    queue: mpsc::Sender<W>,
}

impl<W: Send + 'static> Hand<W> {
    /// Start a thread called `name` that answers each piece of work with what `work` makes of it.
    pub(crate) fn start<A: Send + 'static>(
        name: &str,
        clock: Clock,
        answers: Answers<A>,
        mut work: impl FnMut(W) -> Option<A> + Send + 'static,
    ) -> Result<Self, StartError> {
        let (queue, pieces) = mpsc::channel();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                for piece in pieces {
                    // Nobody listens any more once the session is over; the work is done all the same, because it may
                    // be letting the guest run on.
                    if let Some(answer) = work(piece) {
                        let _ = answers.send((clock.now(), answer));
                    }
                }
            })
            .map_err(|error| StartError::Host(format!("cannot start the thread {name}: {error}")))?;
        Ok(Self { queue })
    }

    /// Queue a piece of work.
    pub(crate) fn give(&self, piece: W) {
        // The thread only ends when this end is dropped, or by a panic that has been reported already.
        let _ = self.queue.send(piece);
    }
}
