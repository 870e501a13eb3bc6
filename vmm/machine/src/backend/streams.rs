//! The host's end of a guest's sockets: UNIX sockets, by Firecracker's convention.
//!
//! ```text
//!   a program of the host                       a program of the guest
//!   connects to PATH, says CONNECT 52\n  ─────▶  listens on port 52
//!                     ◀──── OK 1073741824\n      (sees the peer's port 1073741824)
//!
//!   listens on PATH_52                  ◀─────  connects to port 52 of CID 2
//! ```
//!
//! Who drives the device waits for [`UnixStreams`]'s descriptor, an epoll of our own over everything that the device
//! watches for. Nothing here ever waits.
//!
//! Whoever may write to the socket at PATH may talk to the guest: its mode follows the process's umask.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_devices::limits::{VSOCK_CONNECTIONS, VSOCK_NEWS};
use umbra_devices::virtio::vsock::{Interest, News, Progress, StreamId, Streams};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::Error;
use crate::limits;

/// UNIX sockets for one guest.
pub(crate) struct UnixStreams {
    path: PathBuf,
    /// Which file of that path is ours, so that another's is not removed.
    inode: (u64, u64),
    listener: UnixListener,
    /// What [`AsRawFd`] shows: readable when there is news.
    ready: Epoll,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// At most [`VSOCK_CONNECTIONS`] beside the undecided.
    streams: BTreeMap<StreamId, Stream>,
    /// Those whose first line has not ended, oldest first. At most [`limits::VSOCK_UNDECIDED`].
    undecided: VecDeque<StreamId>,
    /// The listener is watched.
    listening: bool,
    next: u64,
}

#[derive(Debug)]
struct Stream {
    socket: UnixStream,
    /// What is watched for; nothing of it is in the epoll when both are off.
    interest: Interest,
    /// What came of the first line; `None` once it has ended.
    first_line: Option<Vec<u8>>,
}

/// The listener among the epoll's numbers; streams begin behind it.
const LISTENER: u64 = 0;

impl UnixStreams {
    /// Listen at `path`.
    pub(crate) fn listen(path: &Path) -> Result<Self, Error> {
        // The longest name made from it: `_4294967295` is put behind.
        if path.as_os_str().len() + 11 >= SUN_PATH_BYTES {
            let most = SUN_PATH_BYTES - 12;
            return Err(refusal(
                path,
                &format!("the path of a socket may have {most} bytes at most"),
            ));
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(|error| refusal(path, &format!("cannot listen: {error}")))?;
        listener
            .set_nonblocking(true)
            .map_err(|error| refusal(path, &error.to_string()))?;
        let about = std::fs::metadata(path).map_err(|error| refusal(path, &error.to_string()))?;
        let ready = Epoll::new().map_err(|error| refusal(path, &error.to_string()))?;
        let streams = Self {
            path: path.to_owned(),
            inode: (about.dev(), about.ino()),
            listener,
            ready,
            state: Mutex::new(State {
                next: LISTENER + 1,
                ..State::default()
            }),
        };
        streams.heed_listener(&mut streams.state());
        Ok(streams)
    }

    /// Watch the listener while there is room for what it brings.
    fn heed_listener(&self, state: &mut State) {
        let room = state.streams.len() < VSOCK_CONNECTIONS;
        if room != state.listening {
            state.listening = room;
            let operation = if room {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            self.control(operation, self.listener.as_raw_fd(), EventSet::IN, LISTENER);
        }
    }

    fn control(&self, operation: ControlOperation, fd: RawFd, events: EventSet, number: u64) {
        if let Err(error) = self.ready.ctl(operation, fd, EpollEvent::new(events, number)) {
            tracing::warn!(path = %self.path.display(), %error, "cannot say what to wait for");
        }
    }

    /// Take in who connects.
    fn accept(&self, state: &mut State) {
        for _ in 0..VSOCK_NEWS {
            if state.streams.len() >= VSOCK_CONNECTIONS {
                break;
            }
            match self.listener.accept() {
                Ok((socket, _)) => {
                    if socket.set_nonblocking(true).is_ok() {
                        self.greet(state, socket);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // No descriptors are left, most likely: do not be woken for it until a stream ended or the guest calls.
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "cannot accept a connection");
                    state.listening = false;
                    return self.control(
                        ControlOperation::Delete,
                        self.listener.as_raw_fd(),
                        EventSet::IN,
                        LISTENER,
                    );
                }
            }
        }
        self.heed_listener(state);
    }

    fn greet(&self, state: &mut State, socket: UnixStream) {
        if state.undecided.len() >= limits::VSOCK_UNDECIDED
            && let Some(oldest) = state.undecided.front().copied()
        {
            self.forget(state, oldest);
        }
        let stream = state.add(socket, Some(Vec::new()));
        state.undecided.push_back(stream);
        let read = Interest {
            read: true,
            write: false,
        };
        self.set_interest(state, stream, read);
    }

    /// Read on in a program's first line; the port it asks for when the line has ended.
    fn first_line(&self, state: &mut State, stream: StreamId) -> Option<u32> {
        let line = state.streams.get_mut(&stream)?;
        let read = line.read_first_line();
        let port = match read {
            FirstLine::Unfinished => return None,
            FirstLine::Asks(port) => {
                line.first_line = None;
                Some(port)
            }
            FirstLine::Nonsense => None,
        };
        if port.is_some() {
            state.undecided.retain(|other| *other != stream);
            self.set_interest(state, stream, Interest::default());
        } else {
            self.forget(state, stream);
        }
        port
    }

    fn set_interest(&self, state: &mut State, id: StreamId, interest: Interest) {
        let Some(stream) = state.streams.get_mut(&id) else {
            return;
        };
        let none = Interest::default();
        // A stream that is not watched is not in the epoll at all: it would be told there that its peer is gone.
        let operation = match (stream.interest == none, interest == none) {
            (true, true) => return,
            (true, false) => ControlOperation::Add,
            (false, true) => ControlOperation::Delete,
            (false, false) if stream.interest == interest => return,
            (false, false) => ControlOperation::Modify,
        };
        stream.interest = interest;
        let mut events = EventSet::empty();
        events.set(EventSet::IN, interest.read);
        events.set(EventSet::OUT, interest.write);
        let fd = stream.socket.as_raw_fd();
        self.control(operation, fd, events, id.0);
    }

    fn forget(&self, state: &mut State, stream: StreamId) {
        // Closing the socket takes it out of the epoll too.
        state.streams.remove(&stream);
        state.undecided.retain(|other| *other != stream);
        self.heed_listener(state);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Streams for UnixStreams {
    fn poll(&self, news: &mut Vec<News>) {
        let mut state = self.state();
        self.heed_listener(&mut state);
        let mut events = [EpollEvent::default(); VSOCK_NEWS];
        let count = self.ready.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            if event.data() == LISTENER {
                self.accept(&mut state);
                continue;
            }
            let stream = StreamId(event.data());
            let Some(about) = state.streams.get(&stream) else {
                continue;
            };
            if about.first_line.is_some() {
                if let Some(port) = self.first_line(&mut state, stream) {
                    news.push(News::Asked { stream, port });
                }
                continue;
            }
            let set = event.event_set();
            let over = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
            let can = Interest {
                read: over || set.contains(EventSet::IN),
                write: over || set.contains(EventSet::OUT),
            };
            news.push(News::Ready { stream, can });
        }
    }

    fn connect(&self, port: u32) -> Option<StreamId> {
        let mut state = self.state();
        if state.streams.len() >= VSOCK_CONNECTIONS {
            return None;
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let socket = connect(path.as_bytes()).ok()?;
        let stream = state.add(socket, None);
        self.heed_listener(&mut state);
        Some(stream)
    }

    fn accepted(&self, stream: StreamId, port: u32) -> bool {
        let line = format!("OK {port}\n");
        // A socket nobody has written to has room for a line.
        self.write(stream, line.as_bytes()) == Progress::Bytes(line.len())
    }

    fn read(&self, stream: StreamId, bytes: &mut [u8]) -> Progress {
        let state = self.state();
        state
            .streams
            .get(&stream)
            .map_or(Progress::Ended, |stream| progress(|| (&stream.socket).read(bytes)))
    }

    fn write(&self, stream: StreamId, bytes: &[u8]) -> Progress {
        let state = self.state();
        state
            .streams
            .get(&stream)
            .map_or(Progress::Ended, |stream| progress(|| (&stream.socket).write(bytes)))
    }

    fn watch(&self, stream: StreamId, interest: Interest) {
        self.set_interest(&mut self.state(), stream, interest);
    }

    fn finish(&self, stream: StreamId) {
        if let Some(stream) = self.state().streams.get(&stream) {
            // Fails when the program is gone, which reading will tell.
            let _ = stream.socket.shutdown(Shutdown::Write);
        }
    }

    fn close(&self, stream: StreamId) {
        self.forget(&mut self.state(), stream);
    }
}

impl AsRawFd for UnixStreams {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

impl Drop for UnixStreams {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|about| (about.dev(), about.ino()) == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl fmt::Debug for UnixStreams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let streams = self.state().streams.len();
        write!(f, "UnixStreams({}, {streams} streams)", self.path.display())
    }
}

impl State {
    fn add(&mut self, socket: UnixStream, first_line: Option<Vec<u8>>) -> StreamId {
        let stream = StreamId(self.next);
        self.next += 1;
        let stream_state = Stream {
            socket,
            interest: Interest::default(),
            first_line,
        };
        self.streams.insert(stream, stream_state);
        stream
    }
}

enum FirstLine {
    Unfinished,
    Asks(u32),
    Nonsense,
}

impl Stream {
    /// Byte by byte: what follows the line is the guest's.
    fn read_first_line(&mut self) -> FirstLine {
        let Some(line) = &mut self.first_line else {
            return FirstLine::Nonsense;
        };
        let mut byte = [0];
        loop {
            match progress(|| (&self.socket).read(&mut byte)) {
                Progress::Later => return FirstLine::Unfinished,
                Progress::Ended => return FirstLine::Nonsense,
                Progress::Bytes(_) if byte == *b"\n" => return asked_port(line),
                Progress::Bytes(_) if line.len() >= limits::VSOCK_FIRST_LINE_BYTES => return FirstLine::Nonsense,
                Progress::Bytes(_) => line.push(byte[0]),
            }
        }
    }
}

/// The port of `CONNECT 52`.
fn asked_port(line: &[u8]) -> FirstLine {
    let text = std::str::from_utf8(line).unwrap_or_default();
    let mut words = text.split_ascii_whitespace();
    let command = words.next().unwrap_or_default();
    match (words.next().map(str::parse), words.next()) {
        (Some(Ok(port)), None) if command.eq_ignore_ascii_case("connect") => FirstLine::Asks(port),
        _ => FirstLine::Nonsense,
    }
}

fn progress(mut transfer: impl FnMut() -> std::io::Result<usize>) -> Progress {
    loop {
        return match transfer() {
            Ok(0) => Progress::Ended,
            Ok(bytes) => Progress::Bytes(bytes),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Progress::Later,
            Err(_) => Progress::Ended,
        };
    }
}

/// A socket file that nobody listens at was left behind by a process that was killed.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let Ok(about) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !about.file_type().is_socket() {
        return Err(refusal(path, "there is a file that is not a socket"));
    }
    match connect(path.as_os_str().as_bytes()) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => {
            std::fs::remove_file(path).map_err(|error| refusal(path, &format!("cannot remove the old one: {error}")))
        }
        _ => Err(refusal(path, "another process listens there")),
    }
}

/// `sun_path` of sockaddr_un: unix(7).
const SUN_PATH_BYTES: usize = 108;

/// Connect without ever waiting: a blocking connect waits while the listener's backlog is full (unix(7)).
fn connect(path: &[u8]) -> std::io::Result<UnixStream> {
    // SAFETY: a sockaddr_un is integers and bytes, for which zero is a value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if path.len() >= address.sun_path.len() || path.contains(&0) {
        return Err(ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX.try_into().expect("address families are small");
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes integers only.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let bytes = libc::socklen_t::try_from(size_of_val(&address)).expect("110 fits");
    // SAFETY: connect reads `bytes` bytes of the address, which is as long and lives across the call.
    let done = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), bytes) };
    if done < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(UnixStream::from(fd))
}

fn refusal(path: &Path, why: &str) -> Error {
    Error::Incompatible(format!("vsock {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World {
        folder: PathBuf,
        streams: UnixStreams,
    }

    impl Drop for World {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("umbra-vsock-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn world(name: &str) -> World {
        let folder = folder(name);
        let streams = UnixStreams::listen(&folder.join("v")).unwrap();
        World { folder, streams }
    }

    const BOTH: Interest = Interest {
        read: true,
        write: true,
    };
    const READ: Interest = Interest {
        read: true,
        write: false,
    };

    impl World {
        fn path(&self) -> PathBuf {
            self.folder.join("v")
        }

        fn dial(&self, line: &str) -> UnixStream {
            let mut socket = UnixStream::connect(self.path()).unwrap();
            socket.write_all(line.as_bytes()).unwrap();
            socket
        }

        fn wakes(&self, ms: i32) -> bool {
            let epoll = Epoll::new().unwrap();
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll
                .ctl(ControlOperation::Add, self.streams.as_raw_fd(), event)
                .unwrap();
            epoll.wait(ms, &mut [EpollEvent::default()]).unwrap() == 1
        }

        /// All news there is, without waiting.
        fn news(&self) -> Vec<News> {
            let mut all = Vec::new();
            // Once to accept, once to read first lines.
            for _ in 0..2 {
                self.streams.poll(&mut all);
            }
            all
        }

        fn asked(&self) -> (StreamId, u32) {
            match self.news()[..] {
                [News::Asked { stream, port }] => (stream, port),
                ref other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_program_of_the_host_asks_for_a_port_and_is_told_when_it_is_taken() {
        let world = world("asks");
        let mut program = world.dial("CONNECT 52\nhello");
        assert!(world.wakes(10_000));
        let (stream, port) = world.asked();
        assert_eq!(port, 52);
        assert!(world.streams.accepted(stream, 1 << 30));
        let mut bytes = [0; 100];
        assert_eq!(world.streams.read(stream, &mut bytes), Progress::Bytes(5));
        assert_eq!(&bytes[..5], b"hello");
        assert_eq!(world.streams.write(stream, b"hi"), Progress::Bytes(2));
        let mut answer = [0; 16];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK 1073741824\nhi");
    }

    #[test]
    fn a_guest_reaches_who_listens_beside_the_path_and_nobody_else() {
        let world = world("reaches");
        let listener = UnixListener::bind(world.folder.join("v_7")).unwrap();
        let stream = world.streams.connect(7).unwrap();
        assert_eq!(world.streams.connect(8), None);
        let (mut program, _) = listener.accept().unwrap();
        world.streams.write(stream, b"x");
        world.streams.finish(stream);
        let mut text = String::new();
        program.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn only_what_is_watched_for_is_news_also_when_the_program_is_gone() {
        let world = world("watched");
        let listener = UnixListener::bind(world.folder.join("v_7")).unwrap();
        let stream = world.streams.connect(7).unwrap();
        let (mut program, _) = listener.accept().unwrap();
        program.write_all(b"x").unwrap();
        assert!(!world.wakes(0));
        world.streams.watch(stream, BOTH);
        assert_eq!(world.news()[0], News::Ready { stream, can: BOTH });
        world.streams.watch(stream, Interest::default());
        drop(program);
        assert!(!world.wakes(0));
        world.streams.watch(stream, READ);
        assert!(world.wakes(10_000));
        let mut bytes = [0; 9];
        assert_eq!(world.streams.read(stream, &mut bytes), Progress::Bytes(1));
        assert_eq!(world.streams.read(stream, &mut bytes), Progress::Ended);
        world.streams.close(stream);
        assert_eq!(
            (world.wakes(0), world.streams.read(stream, &mut bytes)),
            (false, Progress::Ended)
        );
    }

    #[test]
    fn nonsense_in_the_first_line_ends_the_connection() {
        let world = world("nonsense");
        for line in [
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT 4294967296\n",
            "GET / HTTP\n",
            "CONNECT 1 2\n",
            "\n",
        ] {
            let mut program = world.dial(line);
            assert_eq!(world.news(), []);
            assert_eq!(program.read(&mut [0; 9]).unwrap(), 0, "{line}");
        }
        let mut program = world.dial(&"x".repeat(100));
        assert_eq!(world.news(), []);
        // Its unread bytes make the end a reset.
        assert!(matches!(program.read(&mut [0; 9]), Ok(0) | Err(_)));
        assert!(world.streams.state().streams.is_empty());
    }

    #[test]
    fn who_says_nothing_is_ended_by_who_comes_later() {
        let world = world("silent");
        let mut silent = world.dial("");
        let crowd: Vec<_> = (0..limits::VSOCK_UNDECIDED).map(|_| world.dial("CONN")).collect();
        world.news();
        assert_eq!(silent.read(&mut [0; 9]).unwrap(), 0);
        assert_eq!(world.streams.state().undecided.len(), crowd.len());
    }

    #[test]
    fn connections_are_bounded_and_who_waits_is_heard_when_one_ends() {
        let world = world("bounded");
        let listener = UnixListener::bind(world.folder.join("v_7")).unwrap();
        let mut last = None;
        let mut programs = Vec::new();
        for _ in 0..VSOCK_CONNECTIONS {
            last = world.streams.connect(7);
            programs.push(listener.accept().unwrap());
        }
        assert_eq!(world.streams.connect(7), None);
        let _waiting = world.dial("CONNECT 9\n");
        assert!(!world.wakes(0));
        world.streams.close(last.unwrap());
        assert!(world.wakes(10_000));
        assert_eq!(world.asked().1, 9);
    }

    #[test]
    fn a_guest_is_not_stopped_by_a_listener_that_accepts_nobody() {
        let world = world("backlog");
        let _listener = UnixListener::bind(world.folder.join("v_7")).unwrap();
        let taken = (0..VSOCK_CONNECTIONS)
            .filter(|_| world.streams.connect(7).is_some())
            .count();
        assert!(taken >= 1);
    }

    #[test]
    fn a_socket_left_behind_is_replaced_one_in_use_is_not_and_ours_is_removed() {
        let first = world("stale");
        let path = first.path();
        let why = UnixStreams::listen(&path).unwrap_err().to_string();
        assert!(why.ends_with("another process listens there"), "{why}");
        let stale = first.folder.join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        drop(UnixStreams::listen(&stale).unwrap());
        assert!(!stale.exists());
        let file = first.folder.join("file");
        std::fs::write(&file, "precious").unwrap();
        let why = UnixStreams::listen(&file).unwrap_err().to_string();
        assert!(why.ends_with("there is a file that is not a socket"), "{why}");
        let why = UnixStreams::listen(Path::new(&"x".repeat(97))).unwrap_err().to_string();
        assert!(why.ends_with("96 bytes at most"), "{why}");
    }
}
