//! What a process tells through `--event-monitor`, kept with the moment it was heard.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;

/// One thing that happened.
#[derive(Debug, Clone)]
pub struct Event {
    /// When it was heard.
    pub at: Instant,
    /// Who told: `guest`, `session`, `job` or `process`.
    pub source: String,
    /// What happened.
    pub name: String,
    /// The particulars.
    pub properties: Value,
}

impl Event {
    fn read(line: &str) -> Self {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|_| Value::String(line.to_owned()));
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Self {
            at: Instant::now(),
            source: text("source"),
            name: text("event"),
            properties: value["properties"].clone(),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.source, self.name, self.properties)
    }
}

/// An event of this name.
pub fn named(name: &str) -> impl Fn(&Event) -> bool + '_ {
    move |event| event.name == name
}

/// The move to this phase, on whichever side the process is.
pub fn phase(to: &str) -> impl Fn(&Event) -> bool + '_ {
    move |event| event.name == "phase" && event.properties["to"] == to
}

/// Everything a process told so far.
#[derive(Debug, Default)]
pub struct Events {
    told: Mutex<Vec<Event>>,
    ended: AtomicBool,
}

impl Events {
    pub(crate) fn hear(&self, line: &str) {
        self.told().push(Event::read(line));
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Whether nothing can follow: what the process told last was heard.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.told().len()
    }

    /// The first one from `start` on that is wanted, and its place.
    pub fn find(&self, start: usize, wanted: impl Fn(&Event) -> bool) -> Option<(usize, Event)> {
        let told = self.told();
        let at = told.iter().skip(start).position(wanted)? + start;
        Some((at, told[at].clone()))
    }

    /// All of them.
    pub fn all(&self) -> Vec<Event> {
        self.told().clone()
    }

    fn told(&self) -> MutexGuard<'_, Vec<Event>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
