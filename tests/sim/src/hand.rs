//! A hand: does pieces of work one after the other, each in its own time, as the node's threads do.
//!
//! The real node has such threads, so a step takes effect at one instant and is answered at a later one, while the
//! guest runs on and messages come in. Whether the effect is early or late within the step is drawn.

use std::collections::VecDeque;
use std::time::Duration;

use umbra_units::Now;

/// A queue of work `W` with answers `A`.
#[derive(Debug)]
pub(crate) struct Hand<W, A> {
    queue: VecDeque<W>,
    busy: Option<Busy<W, A>>,
}

#[derive(Debug)]
struct Busy<W, A> {
    until: Now,
    state: State<W, A>,
}

#[derive(Debug)]
enum State<W, A> {
    /// Takes effect when it is done.
    Late(W),
    /// Took effect when it began.
    Early(A),
}

/// A hand wants to begin or end something.
#[derive(Debug)]
pub(crate) enum Due<W, A> {
    /// Do this; it takes effect now and is answered then: see [`Hand::answer_at`].
    Begin(W, Now),
    /// Do this and take the answer at once.
    Finish(W),
    /// It was done a while ago; this is the answer.
    Answer(A),
}

impl<W, A> Hand<W, A> {
    pub(crate) const fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            busy: None,
        }
    }

    pub(crate) fn give(&mut self, work: W) {
        self.queue.push_back(work);
    }

    /// Pieces that are not answered.
    pub(crate) fn load(&self) -> usize {
        self.queue.len() + usize::from(self.busy.is_some())
    }

    /// When it next has something to do or to say.
    pub(crate) fn next_time(&self, now: Now) -> Now {
        match &self.busy {
            Some(busy) => busy.until,
            None if self.queue.is_empty() => Now::NEVER,
            None => now,
        }
    }

    /// The answer to a piece that took effect when it began.
    pub(crate) const fn early_answer(&self) -> Option<&A> {
        match &self.busy {
            Some(Busy {
                state: State::Early(answer),
                ..
            }) => Some(answer),
            _ => None,
        }
    }

    /// What is due. `draw` says how long the next piece takes and whether it takes effect early.
    pub(crate) fn poll(&mut self, now: Now, draw: impl FnOnce(&W) -> (Duration, bool)) -> Option<Due<W, A>> {
        if let Some(busy) = &self.busy {
            if busy.until > now {
                return None;
            }
            let busy = self.busy.take().expect("seen just now");
            return Some(match busy.state {
                State::Late(work) => Due::Finish(work),
                State::Early(answer) => Due::Answer(answer),
            });
        }
        let work = self.queue.pop_front()?;
        let (takes, early) = draw(&work);
        let until = now + takes;
        if early {
            return Some(Due::Begin(work, until));
        }
        self.busy = Some(Busy {
            until,
            state: State::Late(work),
        });
        None
    }

    /// What was begun early is answered then.
    pub(crate) fn answer_at(&mut self, until: Now, answer: A) {
        self.busy = Some(Busy {
            until,
            state: State::Early(answer),
        });
    }
}
