//! The guest's serial console: where its bytes go, and where typed ones come from.
//!
//! The guest's bytes come on a vCPU's thread, and whoever waits there stops the guest. So nothing here waits for a
//! reader: what standard output or an attached client does not take at once goes into a ring, and a thread brings it
//! there when they do. A file is written directly.
//!
//! | `--serial` | while nobody reads | typing |
//! |---|---|---|
//! | `stdio` | up to 1 MiB is kept, then bytes are dropped and counted | standard input; Ctrl-A x on a terminal stops the guest |
//! | `off` | | |
//! | `file=PATH` | | |
//! | `socket=PATH` | the newest 64 KiB are kept for the next client | what the client sends |

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use umbra_machine::{Machine, Out};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::terminal::Terminal;

use crate::args::Serial;
use crate::confine::{self, Class};
use crate::exit::Failure;
use crate::limits;
use crate::socket::PrivateSocket;

/// Between two tries to type into a guest that has no room.
const TYPE_AGAIN: Duration = Duration::from_millis(5);
/// A guest that reads nothing for this long does not get what was typed.
const TYPE_PATIENCE: Duration = Duration::from_secs(2);
/// Ctrl-A, as in QEMU.
const ESCAPE: u8 = 1;

/// The console of this process's guest.
pub(crate) struct Console {
    sink: Sink,
    keyboard: Arc<Keyboard>,
    /// Standard input, once a guest runs here.
    typing: OnceLock<()>,
    /// Whether the terminal was changed and must be changed back.
    raw: AtomicBool,
}

enum Sink {
    Off,
    File(FileSink),
    Pipe { ring: Arc<Ring>, interactive: bool },
    Socket { line: Arc<Line>, _socket: PrivateSocket },
}

impl Console {
    /// The console that `--serial` asks for.
    pub(crate) fn new(serial: &Serial) -> Result<Arc<Self>, Failure> {
        let keyboard = Arc::new(Keyboard::default());
        let sink = match serial {
            Serial::Off => Sink::Off,
            Serial::File(path) => {
                let on = Failure::on(format!("serial: {}", path.display()));
                Sink::File(FileSink::new(File::create(path).map_err(on)?))
            }
            Serial::Stdio => stdout()?,
            Serial::Socket(path) => {
                let (socket, listener) = PrivateSocket::bind(path)?;
                let line = Line::start(listener, Arc::clone(&keyboard)).map_err(Failure::on("serial"))?;
                Sink::Socket { line, _socket: socket }
            }
        };
        Ok(Arc::new(Self {
            sink,
            keyboard,
            typing: OnceLock::new(),
            raw: AtomicBool::new(false),
        }))
    }

    /// From now on the console is this machine's. `stop` is what Ctrl-A x does.
    pub(crate) fn plug(self: &Arc<Self>, machine: &Arc<Machine>, stop: impl Fn() + Send + 'static) {
        let guest: Weak<Machine> = Arc::downgrade(machine);
        self.keyboard.plug(guest);
        if matches!(self.sink, Sink::Pipe { interactive: true, .. }) && self.typing.set(()).is_ok() {
            let on_terminal = std::io::stdin().is_terminal();
            if on_terminal {
                self.raw
                    .store(std::io::stdin().lock().set_raw_mode().is_ok(), Ordering::SeqCst);
            }
            let keyboard = Arc::clone(&self.keyboard);
            let typing = thread::Builder::new().name("umbra-typing".to_owned());
            if let Err(error) = typing.spawn(move || {
                confine::enter_or_end(Class::Host);
                type_from_stdin(&keyboard, on_terminal, &stop);
            }) {
                tracing::warn!(%error, "standard input is not forwarded");
            }
        }
    }

    /// Wait, not for long, until what the guest said has been read.
    pub(crate) fn drain(&self) {
        match &self.sink {
            Sink::Off | Sink::File(_) => {}
            Sink::Pipe { ring, .. } => ring.drain(),
            Sink::Socket { line, .. } => line.drain(),
        }
    }

    /// Give the terminal back as it was.
    pub(crate) fn restore_terminal(&self) {
        if self.raw.swap(false, Ordering::SeqCst) {
            let _ = std::io::stdin().lock().set_canon_mode();
        }
    }
}

/// A machine's way to the console.
pub(crate) struct ConsoleOut(pub(crate) Arc<Console>);

impl Out for ConsoleOut {
    fn put(&self, bytes: &[u8]) {
        match &self.0.sink {
            Sink::Off => {}
            Sink::File(file) => file.put(bytes),
            Sink::Pipe { ring, .. } => ring.put(bytes),
            Sink::Socket { line, .. } => line.put(bytes),
        }
    }
}

/// A file that takes everything at once.
struct FileSink {
    file: File,
    failed: AtomicBool,
}

impl FileSink {
    const fn new(file: File) -> Self {
        Self {
            file,
            failed: AtomicBool::new(false),
        }
    }

    fn put(&self, bytes: &[u8]) {
        if let Err(error) = (&self.file).write_all(bytes)
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "the serial console's file takes no more");
        }
    }
}

/// Standard output: a file is written directly, anything that may make us wait is not.
fn stdout() -> Result<Sink, Failure> {
    let copy = std::io::stdout()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Failure::on("standard output"))?;
    let file = File::from(copy);
    if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(Sink::File(FileSink::new(file)));
    }
    let ring = Ring::start(file).map_err(Failure::on("serial"))?;
    Ok(Sink::Pipe {
        ring,
        interactive: in_foreground(),
    })
}

/// Whether this process may read its terminal without being stopped for it (SIGTTIN). A process without a terminal may
/// read its standard input at any time.
fn in_foreground() -> bool {
    if !std::io::stdin().is_terminal() {
        return true;
    }
    // proc(5): pid (comm) state ppid pgrp session tty_nr tpgid; the name may hold anything, so count from its end.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields.len() > 5 && fields[2] == fields[5]
}

/// Bytes on their way to a reader that may be slow.
struct Ring {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// Never longer than [`limits::CONSOLE_PIPE_RING`].
    bytes: VecDeque<u8>,
    dropped: u64,
    /// The thread holds bytes it took from here.
    writing: bool,
    /// The reader is gone.
    broken: bool,
}

impl Ring {
    fn start(mut to: impl Write + Send + 'static) -> std::io::Result<Arc<Self>> {
        let ring = Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let writer = Arc::clone(&ring);
        thread::Builder::new().name("umbra-console".to_owned()).spawn(move || {
            confine::enter_or_end(Class::Host);
            while let Some(bytes) = writer.next() {
                let broken = to.write_all(&bytes).and_then(|()| to.flush()).is_err();
                let mut state = writer.state();
                state.writing = false;
                state.broken |= broken;
                writer.changed.notify_all();
            }
        })?;
        Ok(ring)
    }

    fn put(&self, bytes: &[u8]) {
        let mut state = self.state();
        let room = if state.dropped > 0 {
            0
        } else {
            limits::CONSOLE_PIPE_RING - state.bytes.len()
        };
        let kept = bytes.len().min(room);
        state.bytes.extend(&bytes[..kept]);
        state.dropped += (bytes.len() - kept) as u64;
        drop(state);
        self.changed.notify_all();
    }

    /// What there is to write, when there is something; `None` when there is no reader any more.
    fn next(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        while state.bytes.is_empty() && state.dropped == 0 && !state.broken {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.broken {
            return None;
        }
        state.writing = true;
        let mut bytes: Vec<u8> = state.bytes.drain(..).collect();
        if state.dropped > 0 {
            bytes.extend(format!("\n[{} bytes were dropped: nobody read]\n", state.dropped).bytes());
            state.dropped = 0;
        }
        Some(bytes)
    }

    fn drain(&self) {
        let busy = |state: &mut Waiting| !state.broken && (state.writing || !state.bytes.is_empty());
        let _ = self
            .changed
            .wait_timeout_while(self.state(), limits::CONSOLE_DRAIN, busy);
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket that one client at a time may attach to; the next one waits its turn.
struct Line {
    state: Mutex<Attached>,
    drained: Condvar,
    /// Wakes the thread when the client did not take everything.
    behind: EventFd,
}

#[derive(Default)]
struct Attached {
    client: Option<UnixStream>,
    /// What the client, or the next one, shall get first. Never longer than [`limits::CONSOLE_SOCKET_RING`]: the
    /// newest bytes stay.
    bytes: VecDeque<u8>,
}

impl Attached {
    /// Give the client what it takes without waiting.
    fn push(&mut self) {
        while let (Some(client), false) = (&mut self.client, self.bytes.is_empty()) {
            match client.write(self.bytes.as_slices().0) {
                Ok(taken @ 1..) => drop(self.bytes.drain(..taken)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The thread sees the same end of the connection.
                Ok(_) | Err(_) => self.client = None,
            }
        }
    }
}

/// What woke the socket's thread.
const CLIENT: u64 = 0;
const BEHIND: u64 = 1;

impl Line {
    fn start(listener: UnixListener, keyboard: Arc<Keyboard>) -> std::io::Result<Arc<Self>> {
        let line = Arc::new(Self {
            state: Mutex::default(),
            drained: Condvar::new(),
            behind: EventFd::new(EFD_NONBLOCK)?,
        });
        let server = Arc::clone(&line);
        thread::Builder::new().name("umbra-console".to_owned()).spawn(move || {
            confine::enter_or_end(Class::Host);
            for client in listener.incoming() {
                if let Err(error) = client.and_then(|client| server.serve(&client, &keyboard)) {
                    tracing::debug!(%error, "a console client left");
                }
                server.state().client = None;
                server.drained.notify_all();
            }
        })?;
        Ok(line)
    }

    fn put(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.bytes.extend(bytes);
        state.push();
        let waiting = state.bytes.len();
        if waiting > 0 {
            let excess = waiting.saturating_sub(limits::CONSOLE_SOCKET_RING);
            state.bytes.drain(..excess);
            if state.client.is_some() {
                let _ = self.behind.write(1);
            }
        }
    }

    /// Serve one client until it leaves.
    fn serve(&self, client: &UnixStream, keyboard: &Keyboard) -> std::io::Result<()> {
        client.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let watch = |op, fd, events, id| epoll.ctl(op, fd, EpollEvent::new(events, id));
        watch(ControlOperation::Add, client.as_raw_fd(), EventSet::IN, CLIENT)?;
        watch(ControlOperation::Add, self.behind.as_raw_fd(), EventSet::IN, BEHIND)?;
        self.state().client = Some(client.try_clone()?);
        // A client that has nothing more to type may still listen.
        let mut types = true;
        loop {
            let behind = {
                let mut state = self.state();
                state.push();
                !state.bytes.is_empty()
            };
            self.drained.notify_all();
            let mut wants = EventSet::empty();
            wants.set(EventSet::IN, types);
            wants.set(EventSet::OUT, behind);
            watch(ControlOperation::Modify, client.as_raw_fd(), wants, CLIENT)?;
            let mut events = [EpollEvent::default(); 2];
            let count = match epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                count => count?,
            };
            for event in &events[..count] {
                if event.data() == BEHIND {
                    let _ = self.behind.read();
                    continue;
                }
                let left = event.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
                if types && (left || event.event_set().contains(EventSet::IN)) {
                    types = self.typed(client, keyboard)?;
                }
                // What it typed before it left is typed first: this comes again until there is nothing more.
                if left && !types {
                    return Ok(());
                }
            }
        }
    }

    /// Type what the client sent; false when nothing more will come.
    fn typed(&self, mut client: &UnixStream, keyboard: &Keyboard) -> std::io::Result<bool> {
        let mut bytes = [0; 256];
        match client.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                keyboard.type_in(&bytes[..count]);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn drain(&self) {
        let busy = |state: &mut Attached| state.client.is_some() && !state.bytes.is_empty();
        let _ = self
            .drained
            .wait_timeout_while(self.state(), limits::CONSOLE_DRAIN, busy);
    }

    fn state(&self) -> MutexGuard<'_, Attached> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that can be typed into: a machine, as far as this file cares.
trait Typable: Send + Sync {
    fn room_for(&self, bytes: &[u8]) -> usize;
}

impl Typable for Machine {
    fn room_for(&self, bytes: &[u8]) -> usize {
        self.console_input(bytes)
    }
}

/// Types into whichever guest runs here, if one does.
#[derive(Default)]
struct Keyboard {
    guest: Mutex<Option<Weak<dyn Typable>>>,
}

impl Keyboard {
    fn plug(&self, guest: Weak<dyn Typable>) {
        *self.guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest);
    }

    /// Type `bytes`, waiting for room as long as the guest goes on reading.
    fn type_in(&self, mut bytes: &[u8]) {
        let mut latest = Instant::now();
        while !bytes.is_empty() {
            let guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let Some(guest) = guest.and_then(|guest| guest.upgrade()) else {
                return;
            };
            match guest.room_for(bytes) {
                0 if latest.elapsed() > TYPE_PATIENCE => {
                    return tracing::warn!(
                        bytes = bytes.len(),
                        "the guest does not read its console: input dropped"
                    );
                }
                0 => thread::sleep(TYPE_AGAIN),
                taken => {
                    bytes = &bytes[taken..];
                    latest = Instant::now();
                }
            }
        }
    }
}

fn type_from_stdin(keyboard: &Keyboard, on_terminal: bool, stop: &dyn Fn()) {
    // A copy of the descriptor, not `Stdin`: its lock would be held while waiting, and the terminal's mode needs it.
    let Ok(copy) = std::io::stdin().as_fd().try_clone_to_owned() else {
        return;
    };
    let mut stdin = File::from(copy);
    let mut escapes = Escapes::default();
    let mut bytes = [0; 256];
    loop {
        let count = match stdin.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if !on_terminal {
            keyboard.type_in(&bytes[..count]);
            continue;
        }
        let (typed, wants_stop) = escapes.strip(&bytes[..count]);
        keyboard.type_in(&typed);
        if wants_stop {
            stop();
        }
    }
}

/// Ctrl-A x stops, Ctrl-A Ctrl-A is one Ctrl-A, and anything else after Ctrl-A is itself.
#[derive(Debug, Default)]
struct Escapes {
    /// The previous byte was a Ctrl-A.
    escaped: bool,
}

impl Escapes {
    /// What is left for the guest, and whether it is to be stopped.
    fn strip(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut typed = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (self.escaped, byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x') => return (typed, true),
                _ => {
                    self.escaped = false;
                    typed.push(byte);
                }
            }
        }
        (typed, false)
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufRead;
    use std::sync::mpsc;

    use super::*;

    /// A writer that takes nothing until it is told to.
    struct Stuck {
        allowed: mpsc::Receiver<()>,
        written: mpsc::Sender<Vec<u8>>,
    }

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.allowed.recv();
            let _ = self.written.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_does_not_read_never_stops_the_guest_and_hears_what_it_missed() {
        let (allow, allowed) = mpsc::channel();
        let (written, chunks) = mpsc::channel();
        let ring = Ring::start(Stuck { allowed, written }).unwrap();
        ring.put(b"first");
        // The thread holds "first" now; everything else stays in the ring, up to its bound.
        while !ring.state().writing {
            thread::yield_now();
        }
        let line = vec![b'x'; 1000];
        for _ in 0..2 * limits::CONSOLE_PIPE_RING / line.len() {
            ring.put(&line);
        }
        assert_eq!(ring.state().bytes.len(), limits::CONSOLE_PIPE_RING);
        drop(allow);
        assert_eq!(chunks.recv().unwrap(), b"first");
        let rest = chunks.recv().unwrap();
        assert!(rest.len() > limits::CONSOLE_PIPE_RING && rest.ends_with(b" bytes were dropped: nobody read]\n"));
        ring.drain();
        ring.put(b"and on");
        assert_eq!(chunks.recv().unwrap(), b"and on");
    }

    fn line() -> (tempfile::TempDir, Arc<Line>, Arc<Keyboard>, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let keyboard = Arc::new(Keyboard::default());
        let line = Line::start(UnixListener::bind(&path).unwrap(), Arc::clone(&keyboard)).unwrap();
        (dir, line, keyboard, path)
    }

    #[test]
    fn a_client_gets_the_newest_bytes_said_while_nobody_listened_and_then_what_follows() {
        let (_dir, line, _keyboard, path) = line();
        line.put(&vec![b'o'; limits::CONSOLE_SOCKET_RING]);
        line.put(b"news\n");
        let mut client = std::io::BufReader::new(UnixStream::connect(&path).unwrap());
        let mut text = String::new();
        client.read_line(&mut text).unwrap();
        assert_eq!(text.len(), limits::CONSOLE_SOCKET_RING, "bounded");
        assert!(text.ends_with("onews\n"));
        line.put(b"more\n");
        text.clear();
        client.read_line(&mut text).unwrap();
        assert_eq!(text, "more\n");
    }

    #[test]
    fn a_client_that_reads_slowly_gets_everything_the_ring_can_hold() {
        let (_dir, line, _keyboard, path) = line();
        let mut client = UnixStream::connect(&path).unwrap();
        line.put(b"!");
        client.read_exact(&mut [0]).unwrap();
        // Until the client's socket is full, and a little more.
        let mut sent = 0_u32;
        let mut put = |line: &Line| {
            line.put(&sent.to_le_bytes());
            sent += 1;
        };
        while line.state().bytes.is_empty() {
            put(&line);
        }
        for _ in 0..1000 {
            put(&line);
        }
        // Nothing more is said: what is left in the ring must come by itself.
        for expected in 0..sent {
            let mut got = [0; 4];
            client.read_exact(&mut got).unwrap();
            assert_eq!(u32::from_le_bytes(got), expected);
        }
    }

    #[test]
    fn a_client_that_has_nothing_to_type_goes_on_listening() {
        let (_dir, line, _keyboard, path) = line();
        let mut client = UnixStream::connect(&path).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        for word in [b"one", b"two"] {
            line.put(word);
            let mut got = [0; 3];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, word);
        }
        drop(client);
        let mut next = UnixStream::connect(&path).unwrap();
        line.put(b"6");
        next.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn the_next_client_is_served_when_the_first_has_left() {
        let (_dir, line, _keyboard, path) = line();
        for word in [b"one", b"two"] {
            let mut client = UnixStream::connect(&path).unwrap();
            line.put(word);
            let mut got = [0; 3];
            client.read_exact(&mut got).unwrap();
            assert_eq!(&got, word);
        }
    }

    /// A guest with room for so many bytes at a time.
    struct Slow(Mutex<Vec<u8>>, usize);

    impl Typable for Slow {
        fn room_for(&self, bytes: &[u8]) -> usize {
            let taken = bytes.len().min(self.1);
            self.0.lock().unwrap().extend(&bytes[..taken]);
            taken
        }
    }

    #[test]
    fn what_a_client_types_reaches_the_guest_in_order_however_little_it_takes_at_once() {
        let (_dir, line, keyboard, path) = line();
        let guest = Arc::new(Slow(Mutex::default(), 3));
        let weak: Weak<Slow> = Arc::downgrade(&guest);
        keyboard.plug(weak);
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hello, guest").unwrap();
        drop(client);
        // The client left after typing: once the next one is served, all of it was typed.
        let mut next = UnixStream::connect(&path).unwrap();
        line.put(b".");
        next.read_exact(&mut [0]).unwrap();
        assert_eq!(*guest.0.lock().unwrap(), b"hello, guest");
    }

    #[test]
    fn ctrl_a_x_stops_and_ctrl_a_twice_is_typed_once() {
        let mut escapes = Escapes::default();
        assert_eq!(escapes.strip(b"ls\n"), (b"ls\n".to_vec(), false));
        assert_eq!(escapes.strip(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(escapes.strip(b"\x01b"), (b"\x01b".to_vec(), false));
        assert_eq!(escapes.strip(b"\x01q"), (b"q".to_vec(), false));
        assert_eq!(escapes.strip(b"y\x01"), (b"y".to_vec(), false));
        assert_eq!(escapes.strip(b"xz"), (Vec::new(), true));
    }
}
