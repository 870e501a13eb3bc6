//! Somebody outside who listens to the guest's console at both hosts, with a watch in hand.
//!
//! The observer knows nothing of Umbra. It writes down every byte with the moment it arrived; afterwards the two
//! records, one after the other, must read as if the guest had never moved: the beats count on, and the longest silence
//! between two of them is the pause as the world saw it.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::exit::Failure;

/// Between two tries to reach a console that is not there yet.
const AGAIN: Duration = Duration::from_millis(5);
/// More than this nobody writes down; the guest of the demonstration says 100 KiB.
const HEARD_MOST: usize = 16 << 20;

/// Listens to one console until it ends.
#[derive(Debug, Clone)]
pub(super) struct Observer {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Debug, Default, Clone)]
struct Heard {
    chunks: Vec<(Instant, Vec<u8>)>,
    bytes: usize,
    ended: bool,
}

impl Observer {
    /// Listen to the console at `socket`, which may take `patience` to appear.
    pub(super) fn attach(socket: &Path, patience: Duration) -> Result<Self, Failure> {
        let until = Instant::now() + patience;
        let mut stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => {
                    return Err(Failure::failed(format!("the console {}: {error}", socket.display())));
                }
                Err(_) => thread::sleep(AGAIN),
            }
        };
        let shared = Arc::new(Shared::default());
        let observer = Self {
            shared: Arc::clone(&shared),
        };
        let listening = move || {
            let mut bytes = [0; 4096];
            loop {
                let count = stream.read(&mut bytes).unwrap_or(0);
                let at = Instant::now();
                let mut heard = shared.heard();
                if count == 0 || heard.bytes > HEARD_MOST {
                    heard.ended = true;
                    shared.more.notify_all();
                    return;
                }
                heard.chunks.push((at, bytes[..count].to_vec()));
                heard.bytes += count;
                shared.more.notify_all();
            }
        };
        thread::Builder::new()
            .name("observer".to_owned())
            .spawn(listening)
            .map_err(Failure::on("the observer"))?;
        Ok(observer)
    }

    /// Wait until this much was heard; false if that was not within `patience`, or will never be.
    pub(super) fn wait_for(&self, bytes: usize, patience: Duration) -> bool {
        let waiting = |heard: &mut Heard| heard.bytes < bytes && !heard.ended;
        let waited = self
            .shared
            .more
            .wait_timeout_while(self.shared.heard(), patience, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.bytes >= bytes
    }

    /// How much was heard so far.
    pub(super) fn heard_bytes(&self) -> usize {
        self.shared.heard().bytes
    }

    /// Wait until the console has ended.
    pub(super) fn wait_for_end(&self, patience: Duration) {
        let _ = self
            .shared
            .more
            .wait_timeout_while(self.shared.heard(), patience, |heard| !heard.ended);
    }

    /// What was heard so far.
    fn chunks(&self) -> Vec<(Instant, Vec<u8>)> {
        self.shared.heard().chunks.clone()
    }
}

impl Shared {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the two records say, read as one.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Account {
    /// Beats heard at the source and at the shadow.
    pub(super) beats: (usize, usize),
    /// Beats that did not follow the one before: some were lost, or said twice.
    pub(super) out_of_order: usize,
    /// From the last beat at the source to the first at the shadow; `None` if one of them was silent.
    pub(super) gap: Option<Duration>,
    /// The longest silence between any two other beats.
    pub(super) longest_elsewhere: Duration,
    /// The guest's complaints about its memory, processor or clock.
    pub(super) complaints: Vec<String>,
    /// Page checks the guest had made when it last said so.
    pub(super) checked: u64,
}

impl Account {
    /// Read what was heard at both.
    pub(super) fn of(source: &Observer, shadow: &Observer) -> Self {
        Self::read(&source.chunks(), &shadow.chunks())
    }

    fn read(source: &[(Instant, Vec<u8>)], shadow: &[(Instant, Vec<u8>)]) -> Self {
        let mut reading = Reading::default();
        for (at, bytes) in source {
            bytes.iter().for_each(|byte| reading.byte(*at, *byte));
        }
        let at_source = reading.account.beats.0;
        // The same reader goes on: a line that began at the source ends at the shadow.
        reading.moved = true;
        for (at, bytes) in shadow {
            bytes.iter().for_each(|byte| reading.byte(*at, *byte));
        }
        let mut account = reading.account;
        account.beats = (at_source, account.beats.0 - at_source);
        account
    }
}

/// Reads the console as `resources/guest/README.md` describes it: rows of digits, one per beat, and lines of text.
#[derive(Debug, Default)]
struct Reading {
    account: Account,
    line: Vec<u8>,
    latest: Option<(Instant, u8)>,
    /// The guest has said that it is ready: until then it fills its memory, and beats when it comes to it.
    ready: bool,
    /// What comes is from the shadow.
    moved: bool,
}

impl Reading {
    fn byte(&mut self, at: Instant, byte: u8) {
        match byte {
            b'\n' => {
                let line = std::mem::take(&mut self.line);
                self.line(&String::from_utf8_lossy(&line));
            }
            b'0'..=b'9' if self.line.is_empty() => self.beat(at, byte - b'0'),
            // A guest says no line this long.
            _ if self.line.len() < 1024 => self.line.push(byte),
            _ => {}
        }
    }

    fn beat(&mut self, at: Instant, digit: u8) {
        if let Some((before, last)) = self.latest {
            if digit != (last + 1) % 10 {
                self.account.out_of_order += 1;
            }
            let silence = at.saturating_duration_since(before);
            if self.moved && self.account.gap.is_none() {
                self.account.gap = Some(silence);
            } else if self.ready {
                self.account.longest_elsewhere = self.account.longest_elsewhere.max(silence);
            }
        }
        self.account.beats.0 += 1;
        self.latest = Some((at, digit));
    }

    fn line(&mut self, line: &str) {
        if line.contains("CORRUPT") || line.contains("PANIC") {
            self.account.complaints.push(line.to_owned());
        }
        self.ready |= line.starts_with("umbra-guest: ready");
        let checked = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("checked=")?.parse().ok());
        self.account.checked = checked.unwrap_or(self.account.checked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(beginning: Instant, chunks: &[(u64, &str)]) -> Vec<(Instant, Vec<u8>)> {
        let at = |ms: &u64| beginning + Duration::from_millis(*ms);
        chunks
            .iter()
            .map(|(ms, text)| (at(ms), text.as_bytes().to_vec()))
            .collect()
    }

    #[test]
    fn two_records_read_as_one_and_the_silence_between_them_is_the_pause() {
        let t = Instant::now();
        let source = heard(
            t,
            &[
                (0, "umbra-guest 1 cpus=2\n\numbra-guest: ready\n0"),
                (1, "1"),
                (4, "2\n#1000 pages=5 che"),
            ],
        );
        let shadow = heard(t, &[(30, "cked=1234 ok\n"), (34, "3"), (36, "4")]);
        let account = Account::read(&source, &shadow);
        assert_eq!(account.beats, (3, 2));
        assert_eq!(account.gap, Some(Duration::from_millis(30)));
        assert_eq!(account.longest_elsewhere, Duration::from_millis(3));
        assert_eq!((account.out_of_order, account.checked), (0, 1234));
        assert_eq!(account.complaints, Vec::<String>::new());
    }

    #[test]
    fn silences_of_a_guest_that_still_fills_its_memory_do_not_count() {
        let t = Instant::now();
        let source = heard(t, &[(0, "0"), (50, "1\numbra-guest: ready pages=5\n2"), (52, "3")]);
        assert_eq!(Account::read(&source, &[]).longest_elsewhere, Duration::from_millis(2));
    }

    #[test]
    fn a_beat_that_is_lost_or_said_twice_and_a_complaint_are_noticed() {
        let t = Instant::now();
        let source = heard(t, &[(0, "0123"), (1, "5")]);
        let shadow = heard(t, &[(2, "5678\nCORRUPT cpu=0 page=1 why=stale\n9")]);
        let account = Account::read(&source, &shadow);
        assert_eq!(account.out_of_order, 2);
        assert_eq!(account.complaints, ["CORRUPT cpu=0 page=1 why=stale"]);
        assert_eq!(
            Account::read(&source, &[]).gap,
            None,
            "a silent shadow has no gap but an end"
        );
    }
}
