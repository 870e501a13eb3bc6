//! The adversarial link: keeps the promise of one to the letter and nothing beside it.
//!
//! Real links rarely let a message overtake a block by seconds, or a block the one before it. The promise allows it,
//! so the core must live with it; this courier takes any time for anything.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use umbra_core::predict::LinkFacts;
use umbra_paths::Class;
use umbra_units::{Now, Rng};

use crate::carrier::{Arrival, Carrier, End};
use crate::conditions::CourierConditions;

#[derive(Debug)]
pub(crate) struct Courier {
    conditions: CourierConditions,
    rng: Rng,
    now: Now,
    outage: bool,
    /// What travels to each end.
    ways: [Way; 2],
}

/// One direction.
#[derive(Debug)]
struct Way {
    /// Arrivals never run backwards: the promise of order.
    messages: VecDeque<(Now, Bytes)>,
    blocks: Vec<(Now, Bytes)>,
    /// When the bottleneck has sent everything it was given.
    busy_until: Now,
    /// The end that listens is gone: nothing more arrives.
    deaf: bool,
    /// The end that speaks is gone.
    mute: bool,
    /// What the listening end will come to believe of the link, and when.
    beliefs: VecDeque<(Now, bool)>,
    believes: bool,
    lost_at: Now,
}

impl Courier {
    pub(crate) fn new(conditions: CourierConditions, rng: Rng) -> Self {
        let way = || Way {
            messages: VecDeque::new(),
            blocks: Vec::new(),
            busy_until: Now::ZERO,
            deaf: false,
            mute: false,
            beliefs: VecDeque::new(),
            believes: true,
            lost_at: Now::NEVER,
        };
        Self {
            conditions,
            rng,
            now: Now::ZERO,
            outage: false,
            ways: [way(), way()],
        }
    }

    fn delay(&mut self) -> Duration {
        let c = &self.conditions;
        let late = if self.rng.chance(c.late) {
            c.late_by.mul_f64(self.rng.unit())
        } else {
            Duration::ZERO
        };
        c.delay + c.jitter.mul_f64(self.rng.unit()) + late
    }

    fn believe(&mut self, now: Now, up: bool) {
        for way in &mut self.ways {
            let after = way.beliefs.back().map_or(now, |(at, _)| *at);
            let at = (now + self.conditions.notice.mul_f64(self.rng.unit())).max(after);
            way.beliefs.push_back((at, up));
        }
    }
}

impl Carrier for Courier {
    fn send_message(&mut self, now: Now, from: End, bytes: &Bytes) -> bool {
        let at = now + self.delay();
        let way = &mut self.ways[from.other().index()];
        let last = way.messages.back().map_or(Now::ZERO, |(at, _)| *at);
        way.messages.push_back((at.max(last), bytes.clone()));
        true
    }

    fn send_block(&mut self, now: Now, from: End, _class: Class, bytes: &Bytes) -> bool {
        let delay = self.delay();
        let serial = self.conditions.rate.time_for(umbra_units::Bytes::of_len(bytes.len()));
        let way = &mut self.ways[from.other().index()];
        way.busy_until = way.busy_until.max(now) + serial.expect("a rate above zero");
        way.blocks.push((way.busy_until + delay, bytes.clone()));
        true
    }

    fn room(&self, from: End) -> usize {
        let way = &self.ways[from.other().index()];
        let under_way: usize = way.blocks.iter().map(|(_, bytes)| bytes.len()).sum();
        self.conditions.window.saturating_sub(under_way)
    }

    fn facts(&self, _from: End) -> LinkFacts {
        LinkFacts {
            rate: self.conditions.rate,
            rtt: self.conditions.delay * 2,
        }
    }

    fn poll(&mut self, to: End) -> Option<Arrival> {
        let (now, outage) = (self.now, self.outage);
        let way = &mut self.ways[to.index()];
        if way.deaf {
            return None;
        }
        if now >= way.lost_at {
            *way = Way {
                deaf: true,
                lost_at: Now::NEVER,
                messages: VecDeque::new(),
                blocks: Vec::new(),
                beliefs: VecDeque::new(),
                ..*way
            };
            return Some(Arrival::Lost);
        }
        while let Some(up) = pop_due(&mut way.beliefs, now) {
            if way.believes != up {
                way.believes = up;
                return Some(Arrival::Up(up));
            }
        }
        if outage {
            return None;
        }
        if let Some(bytes) = pop_due(&mut way.messages, now) {
            return Some(Arrival::Message(bytes));
        }
        let first = way.blocks.iter().enumerate().min_by_key(|(_, (at, _))| *at)?;
        let (index, (at, _)) = first;
        (*at <= now).then(|| Arrival::Block(way.blocks.swap_remove(index).1))
    }

    fn next_time(&self, listens: [bool; 2]) -> Now {
        let of = |(way, listens): (&Way, bool)| {
            if way.deaf || !listens {
                return Now::NEVER;
            }
            let belief = way.beliefs.front().map_or(Now::NEVER, |(at, _)| *at);
            let told = belief.min(way.lost_at);
            if self.outage {
                return told;
            }
            let message = way.messages.front().map_or(Now::NEVER, |(at, _)| *at);
            let block = way.blocks.iter().map(|(at, _)| *at).min().unwrap_or(Now::NEVER);
            told.min(message).min(block)
        };
        self.ways.iter().zip(listens).map(of).min().unwrap_or(Now::NEVER)
    }

    fn handle_time(&mut self, now: Now) {
        self.now = now;
    }

    fn set_outage(&mut self, now: Now, outage: bool) {
        if self.outage == outage {
            return;
        }
        self.outage = outage;
        if self.ways.iter().any(|way| way.mute) {
            return; // whoever is left believes what it believes of a dead peer
        }
        self.believe(now, !outage);
        if !outage {
            for index in 0..self.ways.len() {
                let delay = self.delay();
                let way = &mut self.ways[index];
                way.messages.iter_mut().for_each(|(at, _)| *at = (*at).max(now + delay));
                for block in 0..self.ways[index].blocks.len() {
                    let delay = self.delay();
                    let at = &mut self.ways[index].blocks[block].0;
                    *at = (*at).max(now + delay);
                }
            }
        }
    }

    fn set_dark(&mut self, now: Now, _path: usize, dark: bool) {
        self.set_outage(now, dark);
    }

    fn break_path(&mut self, _now: Now, _path: usize) {}

    fn heal(&mut self, now: Now) {
        self.conditions.late = 0.0;
        self.conditions.jitter = Duration::ZERO;
        self.conditions.delay = self.conditions.delay.min(Duration::from_millis(10));
        self.conditions.window = self.conditions.window.max(1 << 20);
        self.set_outage(now, false);
    }

    fn end_gone(&mut self, now: Now, end: End, answers: bool) {
        let gone = end.index();
        let notice = now + self.delay() + self.conditions.notice.mul_f64(self.rng.unit());
        self.ways[gone].deaf = true;
        let way = &mut self.ways[end.other().index()];
        if !way.mute {
            way.mute = true;
            // Messages arrive in order, so what still arrives of a dead end's words is a beginning of them.
            let keep = usize::try_from(self.rng.below(way.messages.len() as u64 + 1)).expect("a length");
            way.messages.truncate(keep);
            way.blocks.retain(|_| self.rng.chance(0.5));
            way.beliefs.push_back((notice, false));
        }
        if answers {
            way.lost_at = notice;
        }
    }

    fn is_drained(&self, from: End) -> bool {
        let way = &self.ways[from.other().index()];
        way.deaf || (way.messages.is_empty() && way.blocks.is_empty())
    }

    fn out_of_bounds(&self) -> Option<String> {
        None
    }
}

/// The front of a queue, if its time has come.
fn pop_due<T>(queue: &mut VecDeque<(Now, T)>, now: Now) -> Option<T> {
    if queue.front().is_some_and(|(at, _)| *at <= now) {
        queue.pop_front().map(|(_, item)| item)
    } else {
        None
    }
}
