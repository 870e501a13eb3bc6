//! A child process, observed: its events, its console, its log, its end.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use crate::api::{self, Answer};
use crate::console::Recording;
use crate::events::{Event, Events};
use crate::world::{Bell, PATIENCE, Shared};

/// What is kept of a process when it is gone.
#[derive(Debug)]
pub(crate) struct Evidence {
    name: String,
    id: u32,
    command: String,
    began: Instant,
    serial: Arc<Recording>,
    events: Arc<Events>,
    exit: OnceLock<ExitStatus>,
    log: PathBuf,
}

impl Evidence {
    /// All of it, as text; moments count from `began`.
    pub(crate) fn text(&self, began: Instant) -> String {
        let mut text = format!("---- {}: {}\n", self.name, self.command);
        text.push_str(&format!("  started at {:.3} s, ", (self.began - began).as_secs_f64()));
        match self.exit.get() {
            Some(exit) => text.push_str(&format!("ended with {exit}\n")),
            None => text.push_str("not ended\n"),
        }
        for event in self.events.all() {
            text.push_str(&format!("  {:8.3} {event}\n", (event.at - began).as_secs_f64()));
        }
        text.push_str(&format!("  console ends with:\n{}\n", self.serial.tail(400)));
        text.push_str(&format!("  log:\n{}", self.log()));
        text
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A running `umbra run` or `umbra shadow`. Dropping it kills it.
pub struct Process {
    evidence: Arc<Evidence>,
    bell: Arc<Bell>,
    pidfd: OwnedFd,
    socket: PathBuf,
    /// Events before this one were waited for already.
    seen: usize,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("name", &self.evidence.name)
            .finish_non_exhaustive()
    }
}

impl Process {
    /// Start `umbra` with these arguments and those that make it observable. The first `preface` lines of its standard
    /// output are its own; the guest's console follows.
    pub(crate) fn start(world: &Shared, name: &str, args: &[String], preface: usize) -> Result<Self> {
        let socket = world.fresh("api");
        let log = world.fresh("log");
        // The event monitor is a pipe in the place of standard input, which these guests do not read.
        let (events_out, events_in) = std::io::pipe()?;
        let mut command = Command::new(&world.programs.umbra);
        command
            .args(args)
            .arg("-v")
            .arg("--api-socket")
            .arg(&socket)
            .args(["--event-monitor", "fd=0"]);
        command
            .stdin(events_in)
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?);
        let shown = format!("{command:?}");
        let mut child = command.spawn().with_context(|| shown.clone())?;
        drop(command); // and with it our copy of the pipe's end
        let evidence = Arc::new(Evidence {
            name: name.to_owned(),
            id: child.id(),
            command: shown,
            began: Instant::now(),
            serial: Arc::default(),
            events: Arc::default(),
            exit: OnceLock::new(),
            log,
        });
        world.keep(Arc::clone(&evidence));
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process id")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        let bell = Arc::clone(&world.bell);
        hear_console(stdout, preface, Arc::clone(&evidence.serial), Arc::clone(&bell))?;
        hear_events(events_out, Arc::clone(&evidence.events), Arc::clone(&bell))?;
        hear_the_end(child, Arc::clone(&evidence), Arc::clone(&bell))?;
        let mut process = Self {
            evidence,
            bell,
            pidfd,
            socket,
            seen: 0,
        };
        // By its first event the API socket is there.
        process.until("a sign of life", |_| true)?;
        process.seen = 0;
        Ok(process)
    }

    /// What it was called.
    pub fn name(&self) -> &str {
        &self.evidence.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.evidence.id
    }

    /// Everything the guest said here.
    pub fn serial(&self) -> &Arc<Recording> {
        &self.evidence.serial
    }

    /// Everything it told.
    pub fn events(&self) -> &Events {
        &self.evidence.events
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        self.evidence.log()
    }

    /// When it was started.
    pub fn began(&self) -> Instant {
        self.evidence.began
    }

    /// Its API socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Wait for an event, from the one after the last that was waited for.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let (events, serial, from) = (&self.evidence.events, &self.evidence.serial, self.seen);
        let found = self.bell.wait(PATIENCE, || {
            // Looked at before the events are: what ended meanwhile is found all the same.
            let over = events.has_ended() && serial.has_ended() && self.evidence.exit.get().is_some();
            match events.find(from, &wanted) {
                Some(found) => Some(Ok(found)),
                None => over.then_some(Err(())),
            }
        });
        match found {
            Some(Ok((at, event))) => {
                self.seen = at + 1;
                Ok(event)
            }
            Some(Err(())) => bail!("{} ended before: {what}: {}", self.name(), self.log()),
            None => bail!("{}: waited {PATIENCE:?} in vain for: {what}", self.name()),
        }
    }

    /// Wait for an event that can come only once, whether or not others that came later were waited for before. A job's
    /// end is told by another task than the session's events, and may overtake them.
    pub fn once(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let (events, serial) = (&self.evidence.events, &self.evidence.serial);
        let found = self.bell.wait(PATIENCE, || {
            // Looked at before the events are: what ended meanwhile is found all the same.
            let over = events.has_ended() && serial.has_ended() && self.evidence.exit.get().is_some();
            match events.find(0, &wanted) {
                Some((_, event)) => Some(Ok(event)),
                None => over.then_some(Err(())),
            }
        });
        match found {
            Some(Ok(event)) => Ok(event),
            Some(Err(())) => bail!("{} ended before: {what}: {}", self.name(), self.log()),
            None => bail!("{}: waited {PATIENCE:?} in vain for: {what}", self.name()),
        }
    }

    /// Wait until something holds of everything it told.
    pub fn holds(&self, what: &str, look: impl Fn(&[Event]) -> bool) -> Result<()> {
        let held = self
            .bell
            .wait(PATIENCE, || look(&self.evidence.events.all()).then_some(()));
        held.with_context(|| format!("{}: waited {PATIENCE:?} in vain for: {what}", self.name()))
    }

    /// The first event of this kind ever, whether or not it was waited for.
    pub fn told(&self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        self.evidence.events.find(0, wanted).map(|(_, event)| event)
    }

    /// Ask it something.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Answer> {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        api::ask(&self.socket, method, path, &body).with_context(|| format!("to {}", self.name()))
    }

    /// Tell it to do something, and expect that it does.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.ask("PUT", path, body)?;
        ensure!(
            answer.is_ok(),
            "{}: {path} was answered {}: {}",
            self.name(),
            answer.status,
            answer.error()
        );
        Ok(answer.body)
    }

    /// Tell it to do something, and expect that it refuses; its reason.
    pub fn refuses(&self, path: &str, body: &Value) -> Result<String> {
        let answer = self.ask("PUT", path, body)?;
        ensure!(
            !answer.is_ok(),
            "{}: {path} was carried out: {}",
            self.name(),
            answer.body
        );
        ensure!(
            !answer.error().is_empty() && !answer.error().contains('\n'),
            "no one-line reason: {}",
            answer.body
        );
        Ok(answer.error().to_owned())
    }

    /// Where everything stands.
    pub fn status(&self) -> Result<Value> {
        let answer = self.ask("GET", "status", &json!(null))?;
        ensure!(answer.is_ok(), "{}: status was answered {}", self.name(), answer.status);
        Ok(answer.body)
    }

    /// Send it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// Kill it, without a word and for good. When this returns, it is gone.
    pub fn kill(&self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.end().map(drop)
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        self.evidence.exit.get().is_none()
    }

    /// Wait for its end and everything it said until then. Its exit code; none if a signal ended it.
    pub fn end(&self) -> Result<Option<i32>> {
        let over = || {
            self.evidence
                .exit
                .get()
                .copied()
                .filter(|_| self.evidence.serial.has_ended())
        };
        let exit = self.bell.wait(PATIENCE, over);
        Ok(exit.with_context(|| format!("{} does not end", self.name()))?.code())
    }

    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its thread waits for it, so that no zombie is left.
        let _ = self.signal(Signal::KILL);
    }
}

fn hear_console(stdout: impl Read + Send + 'static, preface: usize, to: Arc<Recording>, bell: Arc<Bell>) -> Result<()> {
    thread::Builder::new().name("e2e-console".to_owned()).spawn(move || {
        let mut stdout = BufReader::with_capacity(64 << 10, stdout);
        for _ in 0..preface {
            let mut line = String::new();
            if !matches!(stdout.read_line(&mut line), Ok(1..)) {
                break;
            }
            to.preface(line.trim_end().to_owned());
            bell.ring();
        }
        while let Ok(bytes @ [_, ..]) = stdout.fill_buf() {
            to.hear(bytes);
            let count = bytes.len();
            stdout.consume(count);
            bell.ring();
        }
        to.end();
        bell.ring();
    })?;
    Ok(())
}

fn hear_events(pipe: impl Read + Send + 'static, to: Arc<Events>, bell: Arc<Bell>) -> Result<()> {
    thread::Builder::new().name("e2e-events".to_owned()).spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            to.hear(&line);
            bell.ring();
        }
        to.end();
        bell.ring();
    })?;
    Ok(())
}

fn hear_the_end(mut child: Child, to: Arc<Evidence>, bell: Arc<Bell>) -> Result<()> {
    thread::Builder::new().name("e2e-end".to_owned()).spawn(move || {
        if let Ok(exit) = child.wait() {
            let _ = to.exit.set(exit);
        }
        bell.ring();
    })?;
    Ok(())
}
