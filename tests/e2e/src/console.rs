//! What a guest says on its serial port, read across the processes it runs in.
//!
//! The tiny kernel's protocol (`resources/guest/README.md`): one digit per beat, the last of their count; lines that
//! interrupt a row of beats begin behind a line feed and end with one; after every thousandth beat a line `#1000 ... ok`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Everything one process wrote to its standard output, with the moments it was heard.
#[derive(Debug, Default)]
pub struct Recording {
    heard: Mutex<Heard>,
}

#[derive(Debug, Default)]
struct Heard {
    /// Lines of the program itself, before the guest's.
    preface: Vec<String>,
    chunks: Vec<(Instant, Vec<u8>)>,
    ended: bool,
}

impl Recording {
    pub(crate) fn preface(&self, line: String) {
        self.heard().preface.push(line);
    }

    pub(crate) fn hear(&self, bytes: &[u8]) {
        self.heard().chunks.push((Instant::now(), bytes.to_vec()));
    }

    pub(crate) fn end(&self) {
        self.heard().ended = true;
    }

    /// Whether nothing can follow: the process is gone.
    pub fn has_ended(&self) -> bool {
        self.heard().ended
    }

    /// The program's own lines.
    pub fn said(&self) -> Vec<String> {
        self.heard().preface.clone()
    }

    /// How many bytes of the guest there are.
    pub fn len(&self) -> usize {
        self.heard().chunks.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Whether the guest said nothing here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the first byte came.
    pub fn first_at(&self) -> Option<Instant> {
        self.heard().chunks.first().map(|(at, _)| *at)
    }

    /// The last bytes as text.
    pub(crate) fn tail(&self, most: usize) -> String {
        let all: Vec<u8> = self
            .heard()
            .chunks
            .iter()
            .flat_map(|(_, bytes)| bytes.iter().copied())
            .collect();
        String::from_utf8_lossy(&all[all.len().saturating_sub(most)..]).into_owned()
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest's own account, wherever it runs.
#[derive(Debug)]
pub struct Console {
    /// Where it was heard, in order.
    heard: Vec<Arc<Recording>>,
    /// The recording being read, and how many of its chunks were.
    at: (usize, usize),
    /// A line of the guest that has begun; none in a row of beats.
    line: Option<String>,
    beats: Vec<Instant>,
    /// How often it had beaten before it was first heard here.
    before: usize,
    /// That number is not known yet, but for its last digit: see [`Console::in_the_middle`].
    adrift: bool,
    /// Nothing was heard yet that begins a line or a row of beats.
    headless: bool,
    lines: Vec<(Instant, String)>,
    wrong: Option<String>,
}

impl Console {
    /// Of a guest that begins in this process.
    pub(crate) fn new(recording: Arc<Recording>) -> Self {
        Self {
            heard: vec![recording],
            at: (0, 0),
            line: None,
            beats: Vec::new(),
            before: 0,
            adrift: false,
            headless: false,
            lines: Vec::new(),
            wrong: None,
        }
    }

    /// Of a guest that goes on in this process from a moment nobody knows: what comes before its first line feed may be
    /// half of a line, the first digit is believed, and the first status line says how often it has beaten.
    pub(crate) fn in_the_middle(recording: Arc<Recording>) -> Self {
        Self {
            adrift: true,
            headless: true,
            ..Self::new(recording)
        }
    }

    /// The guest goes on in this process.
    pub(crate) fn goes_on(&mut self, recording: Arc<Recording>) {
        self.heard.push(recording);
    }

    /// Everything it said, wherever it was, whoever reads it otherwise.
    pub fn text(&self) -> String {
        let mut bytes = Vec::new();
        for recording in &self.heard {
            for (_, chunk) in &recording.heard().chunks {
                bytes.extend_from_slice(chunk);
            }
        }
        // Lossless in length, so that a place in the text stays one: consoles here speak ASCII.
        bytes
            .iter()
            .map(|byte| if byte.is_ascii() { char::from(*byte) } else { '?' })
            .collect()
    }

    /// Read what there is. The next process's words are read when the one before can say nothing more.
    pub fn read(&mut self) {
        loop {
            let (place, chunk) = self.at;
            let (fresh, over) = {
                let heard = self.heard[place].heard();
                (heard.chunks[chunk..].to_vec(), heard.ended)
            };
            self.at.1 += fresh.len();
            for (at, bytes) in fresh {
                bytes.iter().for_each(|byte| self.hear(at, *byte));
            }
            if !over || place + 1 == self.heard.len() {
                return;
            }
            self.at = (place + 1, 0);
        }
    }

    fn hear(&mut self, at: Instant, byte: u8) {
        if self.headless {
            self.headless = byte != b'\n';
            return;
        }
        match (&mut self.line, byte) {
            (Some(line), b'\n') => {
                let line = std::mem::take(line);
                self.line = None;
                self.judge(&line);
                self.lines.push((at, line));
            }
            (Some(line), _) => line.push(char::from(byte)),
            (None, b'\n') => {}
            (None, b'0'..=b'9') => {
                if self.adrift && self.beats.is_empty() {
                    self.before = usize::from(byte - b'0');
                }
                let due = self.counted() % 10;
                if usize::from(byte - b'0') != due {
                    let (count, got) = (self.counted(), char::from(byte));
                    self.fault(format!("after {count} beats {due} was due and {got} came"));
                }
                self.beats.push(at);
            }
            (None, _) => self.line = Some(char::from(byte).to_string()),
        }
    }

    fn judge(&mut self, line: &str) {
        let count: Option<usize> = line
            .strip_prefix('#')
            .and_then(|rest| rest.split(' ').next())
            .and_then(|count| count.parse().ok());
        if let (true, Some(count)) = (self.adrift, count)
            && count >= self.beats.len()
            && (self.beats.is_empty() || count % 10 == self.counted() % 10)
        {
            self.before = count - self.beats.len();
            self.adrift = false;
        }
        match count {
            Some(count) if self.counted() != count => {
                self.fault(format!(
                    "the guest counted {count} beats, {} were heard: {line}",
                    self.counted()
                ));
            }
            Some(_) if !line.ends_with(" ok") => self.fault(format!("the guest is not well: {line}")),
            None if !line.starts_with("umbra-guest") => self.fault(format!("the guest says: {line}")),
            _ => {}
        }
    }

    fn fault(&mut self, text: String) {
        self.wrong.get_or_insert(text);
    }

    /// The first thing that was wrong with what the guest said, if anything was.
    pub fn wrong(&self) -> Option<&str> {
        self.wrong.as_deref()
    }

    /// How often it has beaten in its life, as far as is known.
    pub const fn counted(&self) -> usize {
        self.before + self.beats.len()
    }

    /// How often it was heard to beat.
    pub const fn beats(&self) -> usize {
        self.beats.len()
    }

    /// When beat `n`, counted from zero, was heard.
    pub fn beat_at(&self, n: usize) -> Option<Instant> {
        self.beats.get(n).copied()
    }

    /// Its lines, with the moments they ended.
    pub fn lines(&self) -> &[(Instant, String)] {
        &self.lines
    }

    /// The longest time between two beats, from beat `start` on.
    pub fn longest_gap(&self, start: usize) -> Duration {
        let beats = self.beats.get(start..).unwrap_or_default();
        beats.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// A number from the newest status line, as `pages` or `checked`.
    pub fn latest(&self, key: &str) -> Option<u64> {
        let (_, line) = self.lines.iter().rev().find(|(_, line)| line.starts_with('#'))?;
        line.split(' ')
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(parts: &[&str]) -> Console {
        let mut console = Console::new(Arc::default());
        for (n, part) in parts.iter().enumerate() {
            if n > 0 {
                console.heard[n - 1].end();
                console.goes_on(Arc::default());
            }
            console.heard[n].hear(part.as_bytes());
        }
        console.read();
        console
    }

    #[test]
    fn a_guest_is_followed_from_process_to_process_in_the_middle_of_a_line() {
        let row = "0123456789".repeat(100);
        let console = console(&[
            "umbra-guest 1 cpus=1\n012345",
            "6789\numbra-gu",
            &format!("est: ready\n{}", &row[10..]),
            "\n#1000 pages=7 ok\n01",
        ]);
        assert_eq!(console.wrong(), None);
        assert_eq!((console.beats(), console.latest("pages")), (1002, Some(7)));
        assert_eq!(console.lines()[1].1, "umbra-guest: ready");
    }

    #[test]
    fn a_beat_lost_said_twice_or_counted_otherwise_is_noticed() {
        assert_eq!(console(&["0124"]).wrong(), Some("after 3 beats 3 was due and 4 came"));
        assert_eq!(
            console(&["012", "2"]).wrong(),
            Some("after 3 beats 3 was due and 2 came")
        );
        let counted = console(&["012\n#4 pages=1 ok\n"]);
        assert_eq!(
            counted.wrong(),
            Some("the guest counted 4 beats, 3 were heard: #4 pages=1 ok")
        );
        assert_eq!(
            console(&["0\nCORRUPT cpu=0\n"]).wrong(),
            Some("the guest says: CORRUPT cpu=0")
        );
    }

    #[test]
    fn a_guest_that_goes_on_from_somewhere_is_held_to_its_own_count() {
        let heard = |text: &str| {
            let mut console = Console::in_the_middle(Arc::default());
            console.heard[0].hear(text.as_bytes());
            console.read();
            console
        };
        for text in ["es=7 ok\n456\n#2007 pages=7 ok\n789", "3456\n#2007 pages=7 ok\n789"] {
            let console = heard(text);
            assert_eq!((console.wrong(), console.counted()), (None, 2010), "{text}");
        }
        assert_eq!(heard("x\n457").wrong(), Some("after 6 beats 6 was due and 7 came"));
        assert!(heard("x\n456\n#2008 ok\n").wrong().is_some());
        assert!(heard("x\n456\n#2007 ok\n8").wrong().is_some());
    }

    #[test]
    fn the_next_process_is_not_heard_before_the_last_one_is_over() {
        let mut console = Console::new(Arc::default());
        let next = Arc::new(Recording::default());
        console.goes_on(Arc::clone(&next));
        next.hear(b"2");
        console.heard[0].hear(b"01");
        console.read();
        assert_eq!(console.beats(), 2);
        console.heard[0].end();
        console.read();
        assert_eq!((console.beats(), console.wrong()), (3, None));
    }
}
