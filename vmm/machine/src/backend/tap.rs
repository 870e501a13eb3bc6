//! The host's end of a guest's network card: a TAP.
//!
//! A TAP is named, and then made if there is none of that name, or inherited as a descriptor that somebody with more
//! rights has opened. A TAP made here gets its MTU and is brought up here, because nobody else knows of it; one that
//! exists is an operator's, and is left as it is.
//!
//! # One descriptor to wait for
//!
//! Who drives the card waits for [`HostTap`]'s descriptor and then lets the card work; that is all. Behind it is an epoll
//! of our own, because *when* there is something to do changes: a card without buffers must not be woken for frames it
//! cannot take, a card whose frame was refused must be woken when there is room again.
//!
//! # Held frames
//!
//! While output is held ([`HostTap::hold`]), frames are kept in order, at most [`limits::HELD_FRAME_BYTES`] of them; then
//! the card is told to wait, and the guest's own queue fills. So nothing is lost and nothing overtakes.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use umbra_devices::virtio::net::{HEADER_BYTES, Offloads, Sent, Tap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::limits;

/// Where a card's frames go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TapSource {
    /// The TAP of this name; it is made if there is none and this process may.
    Named(String),
    /// A TAP that somebody opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` and left to this process.
    Inherited(RawFd),
}

/// A TAP in use by one card.
pub(crate) struct HostTap {
    file: File,
    name: String,
    created: bool,
    /// What [`AsRawFd`] shows: readable when there is something to do.
    ready: Epoll,
    /// Tells that held frames were let go, to a card that waits for it.
    released: EventFd,
    lost: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    held: bool,
    /// Frames not yet sent, in order. At most [`limits::HELD_FRAME_BYTES`] in all.
    queue: VecDeque<Box<[u8]>>,
    queued_bytes: usize,
    /// A frame was refused: its card waits to be woken.
    refused: bool,
    listening: bool,
    /// The kernel refused a frame: wait for it to take some.
    blocked: bool,
}

/// The start of `struct ifreq` of linux/if.h, as large as all of it: a name and, of the union, flags or an MTU.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    value: u32,
    rest: [u8; 20],
}

const _: () = assert!(size_of::<IfReq>() == size_of::<libc::ifreq>());

impl HostTap {
    /// Open `source`. `mtu` is given to a TAP that is made here; one that exists keeps its own.
    pub(crate) fn open(source: &TapSource, mtu: Option<u16>) -> Result<Self, Error> {
        match source {
            TapSource::Named(name) => Self::named(name, mtu),
            TapSource::Inherited(fd) => Self::inherited(*fd),
        }
    }

    fn named(name: &str, mtu: Option<u16>) -> Result<Self, Error> {
        let valid = !name.is_empty()
            && name.len() < libc::IFNAMSIZ
            && name.bytes().all(|b| b.is_ascii_graphic() && !b"/%:".contains(&b))
            && name != "."
            && name != "..";
        if !valid {
            return Err(refusal(
                name,
                "not the name of an interface: 1 to 15 characters, none of / % : or space",
            ));
        }
        let existed = interface_exists(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|error| refusal(name, &format!("cannot open /dev/net/tun: {error}")))?;
        let mut request = IfReq::new(name, TAP_FLAGS);
        set_interface(&file, &mut request).map_err(|error| refusal(name, &why_not_attached(&error, existed)))?;
        let tap = Self::with_file(file, name.to_owned(), !existed)?;
        if tap.created {
            tap.configure(mtu)?;
        }
        Ok(tap)
    }

    fn inherited(fd: RawFd) -> Result<Self, Error> {
        let label = format!("fd {fd}");
        let file =
            duplicate(fd).map_err(|error| refusal(&label, &format!("not a descriptor of this process: {error}")))?;
        let request = interface_of(&file).map_err(|_| refusal(&label, "not an open TAP"))?;
        if request.value & IFF_TAP == 0 {
            return Err(refusal(&label, "a TUN, expected a TAP: frames, not packets"));
        }
        if request.value & IFF_VNET_HDR == 0 || request.value & IFF_NO_PI == 0 {
            return Err(refusal(&label, "expected a TAP opened with IFF_VNET_HDR and IFF_NO_PI"));
        }
        set_nonblocking(&file).map_err(host("make a TAP non-blocking"))?;
        let name = request.name();
        Self::with_file(file, name, false)
    }

    fn with_file(file: File, name: String, created: bool) -> Result<Self, Error> {
        let bytes = i32::try_from(HEADER_BYTES).expect("12 fits");
        set_header_bytes(&file, bytes).map_err(host("set the header size of a TAP"))?;
        let ready = Epoll::new().map_err(host("create an epoll"))?;
        let released = EventFd::new(EFD_NONBLOCK).map_err(host("create an eventfd"))?;
        for (fd, events) in [(file.as_raw_fd(), EventSet::IN), (released.as_raw_fd(), EventSet::IN)] {
            ready
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
                .map_err(host("watch a TAP"))?;
        }
        let tap = Self {
            file,
            name,
            created,
            ready,
            released,
            lost: AtomicU64::new(0),
            state: Mutex::new(State {
                held: false,
                queue: VecDeque::new(),
                queued_bytes: 0,
                refused: false,
                listening: true,
                blocked: false,
            }),
        };
        tap.offload(Offloads::default());
        Ok(tap)
    }

    /// Of a TAP we made: its MTU, and up.
    fn configure(&self, mtu: Option<u16>) -> Result<(), Error> {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")
            .or_else(|_| std::net::UdpSocket::bind("[::1]:0"))
            .or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))
            .map_err(host("open a socket to configure a TAP"))?;
        if let Some(mtu) = mtu {
            let request = IfReq::new(&self.name, mtu.into());
            // SAFETY: SIOCSIFMTU reads one `ifreq` (netdevice(7)), which `IfReq` is as large as.
            check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &raw const request) })
                .map_err(|error| refusal(&self.name, &format!("cannot set its MTU to {mtu}: {error}")))?;
        }
        let mut request = IfReq::new(&self.name, 0);
        // SAFETY: SIOCGIFFLAGS reads and writes one `ifreq` (netdevice(7)), which `IfReq` is as large as.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })
            .map_err(host("read a TAP's flags"))?;
        request.value = (request.value & 0xffff) | IFF_UP;
        // SAFETY: SIOCSIFFLAGS reads one `ifreq`, as above.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
            .map_err(|error| refusal(&self.name, &format!("cannot bring it up: {error}")))
    }

    /// The interface's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the interface was made here; it then ends with this value.
    pub(crate) const fn created(&self) -> bool {
        self.created
    }

    /// Frames that the host's network did not want: the interface is down, or a header makes no sense.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Keep what the guest sends from now on.
    pub(crate) fn hold(&self) {
        self.state().held = true;
    }

    /// Let out what was kept, in order, and whatever comes.
    pub(crate) fn release(&self) {
        let mut state = self.state();
        state.held = false;
        self.drain(&mut state);
        if state.refused {
            // Only tells; that the counter is full already tells as much.
            let _ = self.released.write(1);
        }
    }

    /// Send what waits, as far as the kernel takes it.
    fn drain(&self, state: &mut State) {
        while !state.held
            && let Some(frame) = state.queue.front()
        {
            if self.write(frame) == Sent::NotNow {
                return self.block(state, true);
            }
            state.queued_bytes -= frame.len();
            state.queue.pop_front();
        }
        self.block(state, false);
    }

    fn write(&self, frame: &[u8]) -> Sent {
        loop {
            match (&self.file).write(frame) {
                // A TAP takes a frame whole or not at all.
                Ok(written) if written == frame.len() => return Sent::Taken,
                Ok(_) => return self.lose(),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Sent::NotNow,
                    ErrorKind::Interrupted => {}
                    // EIO: the interface is down. EINVAL: the guest's header makes no sense. A wire may lose frames.
                    _ => return self.lose(),
                },
            }
        }
    }

    fn lose(&self) -> Sent {
        self.lost.fetch_add(1, Ordering::Relaxed);
        Sent::Taken
    }

    fn block(&self, state: &mut State, blocked: bool) {
        if state.blocked != blocked {
            state.blocked = blocked;
            self.watch(state);
        }
    }

    /// Tell the epoll what there is to wait for.
    fn watch(&self, state: &State) {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, state.listening);
        events.set(EventSet::OUT, state.blocked);
        let event = EpollEvent::new(events, 0);
        if let Err(error) = self.ready.ctl(ControlOperation::Modify, self.file.as_raw_fd(), event) {
            tracing::warn!(tap = self.name, %error, "cannot say what to wait for");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tap for HostTap {
    fn send(&self, frame: &[u8]) -> Sent {
        let mut state = self.state();
        if state.refused {
            state.refused = false;
            // Nothing to read is as good: whoever sends is awake.
            let _ = self.released.read();
        }
        self.drain(&mut state);
        if state.queue.is_empty() && !state.held {
            let sent = self.write(frame);
            state.refused = sent == Sent::NotNow;
            let blocked = state.refused;
            self.block(&mut state, blocked);
            return sent;
        }
        if state.queued_bytes + frame.len() > limits::HELD_FRAME_BYTES {
            state.refused = true;
            return Sent::NotNow;
        }
        state.queued_bytes += frame.len();
        state.queue.push_back(frame.into());
        Sent::Taken
    }

    fn receive(&self, frame: &mut [u8]) -> Option<usize> {
        loop {
            match (&self.file).read(frame) {
                Ok(len) => return Some(len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // EAGAIN, or EIO because the interface is down or gone: nothing comes either way.
                Err(_) => break,
            }
        }
        // Whoever was woken for room to send comes past here.
        let mut state = self.state();
        if state.blocked {
            self.drain(&mut state);
        }
        None
    }

    fn listen(&self, yes: bool) {
        let mut state = self.state();
        if state.listening != yes {
            state.listening = yes;
            self.watch(&state);
        }
    }

    fn offload(&self, offloads: Offloads) {
        let mut flags = 0;
        for (wanted, flag) in [
            (offloads.checksum, libc::TUN_F_CSUM),
            // The kernel refuses segmentation without checksums (tun.c, set_offload).
            (offloads.checksum && offloads.tso4, libc::TUN_F_TSO4),
            (offloads.checksum && offloads.tso6, libc::TUN_F_TSO6),
        ] {
            flags |= if wanted { flag } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes an integer by value (linux/if_tun.h) and touches no memory of ours.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if let Err(error) = check(done) {
            tracing::warn!(tap = self.name, %error, "cannot set offloads; the host does the work itself");
        }
    }
}

impl AsRawFd for HostTap {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

impl fmt::Debug for HostTap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        let frames = state.queue.len();
        write!(
            f,
            "HostTap({}, {frames} frames waiting, {} lost)",
            self.name,
            self.lost()
        )
    }
}

const IFF_UP: u32 = 0x1;
const IFF_TAP: u32 = 0x2;
const IFF_NO_PI: u32 = 0x1000;
const IFF_VNET_HDR: u32 = 0x4000;
/// Flags of linux/if_tun.h: Ethernet frames, nothing of the kernel's before them, a `virtio_net_hdr` instead.
const TAP_FLAGS: u32 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

impl IfReq {
    fn new(name: &str, value: u32) -> Self {
        let mut bytes = [0; libc::IFNAMSIZ];
        let len = name.len().min(libc::IFNAMSIZ - 1);
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        Self {
            name: bytes,
            value,
            rest: [0; 20],
        }
    }

    fn name(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        String::from_utf8_lossy(&self.name[..end]).into_owned()
    }
}

fn why_not_attached(error: &std::io::Error, existed: bool) -> String {
    match (error.raw_os_error(), existed) {
        (Some(libc::EPERM), false) => {
            "there is no such TAP, and making one needs CAP_NET_ADMIN: have somebody run `ip tuntap add`".to_owned()
        }
        (Some(libc::EPERM), true) => "no permission: it is another user's, and CAP_NET_ADMIN is missing".to_owned(),
        (Some(libc::EBUSY), _) => "busy: another process has it open".to_owned(),
        (Some(libc::EINVAL), true) => "not a TAP, or one of several queues: see `ip -d link show`".to_owned(),
        _ => format!("cannot attach to it: {error}"),
    }
}

fn interface_exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: reads one C string, which lives across the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

fn set_interface(file: &File, request: &mut IfReq) -> std::io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes one `ifreq` (tun.rst), which `IfReq` is as large as.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut *request) })
}

fn interface_of(file: &File) -> std::io::Result<IfReq> {
    let mut request = IfReq::new("", 0);
    // SAFETY: TUNGETIFF writes one `ifreq` (linux/if_tun.h), which `IfReq` is as large as. A descriptor that is no TUN
    // answers with an error: the number of the call says the size of what it writes, and is the TUN driver's own.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // Of the union only the 16 bits of flags were written.
    request.value &= 0xffff;
    Ok(request)
}

fn set_header_bytes(file: &File, bytes: i32) -> std::io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int (linux/if_tun.h), which lives across the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) })
}

/// A descriptor of our own for what `fd` is, so that whoever passed the number keeps what is behind it.
fn duplicate(fd: RawFd) -> std::io::Result<File> {
    // SAFETY: fcntl with F_DUPFD_CLOEXEC takes integers only, and answers an error for a number that is no descriptor.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    check(copy)?;
    // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(copy) }))
}

fn set_nonblocking(file: &File) -> std::io::Result<()> {
    // SAFETY: F_GETFL takes and answers integers only.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: F_SETFL takes integers only.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

fn check(answer: libc::c_int) -> std::io::Result<()> {
    if answer < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn host(doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Host { doing, source }
}

fn refusal(tap: &str, why: &str) -> Error {
    Error::Incompatible(format!("tap {tap}: {why}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::process::Command;

    use super::*;

    /// Give this test's thread a network of its own, which ends with it. `false` when the test was told to go without.
    fn own_network() -> bool {
        // SAFETY: unshare with CLONE_NEWNET changes which network this thread sees, and nothing of its memory.
        let done = check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
        let Err(error) = done else { return true };
        assert!(
            std::env::var_os("UMBRA_SKIP_NET").is_some(),
            "this test needs a network namespace, which root may make: {error}; UMBRA_SKIP_NET=1 goes without"
        );
        eprintln!("SKIPPED: no network namespace: {error}");
        false
    }

    fn ip(arguments: &str) {
        let done = Command::new("ip")
            .args(arguments.split(' '))
            .output()
            .expect("iproute2 is installed");
        assert!(
            done.status.success(),
            "ip {arguments}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    fn named(name: &str) -> Result<HostTap, Error> {
        HostTap::open(&TapSource::Named(name.to_owned()), None)
    }

    fn refused(name: &str) -> String {
        named(name).unwrap_err().to_string()
    }

    /// Whether the TAP's descriptor says within `ms` that there is something to do.
    fn wakes(tap: &HostTap, ms: i32) -> bool {
        let epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, tap.as_raw_fd(), event).unwrap();
        epoll.wait(ms, &mut [EpollEvent::default()]).unwrap() == 1
    }

    const PATIENCE_MS: i32 = 10_000;
    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
    pub(crate) const HOST_IP: [u8; 4] = [10, 9, 8, 1];
    pub(crate) const GUEST_IP: [u8; 4] = [10, 9, 8, 2];

    /// A network with a TAP `tap0`, whose host side is [`HOST_IP`] and knows where the guest is.
    pub(crate) fn wired() -> Option<HostTap> {
        own_network().then(|| {
            let tap = named("tap0").unwrap();
            // Nothing of IPv6: its announcements would come between.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
            ip("address add 10.9.8.1/24 dev tap0");
            ip("neighbour replace 10.9.8.2 lladdr 02:00:00:00:00:01 dev tap0");
            tap
        })
    }

    /// The next IPv4 UDP payload the host sends into the TAP.
    fn receive_udp(tap: &HostTap) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        loop {
            assert!(wakes(tap, PATIENCE_MS), "nothing came");
            while let Some(len) = tap.receive(&mut frame) {
                let packet = &frame[HEADER_BYTES..len];
                if packet[12..14] == [8, 0] && packet[23] == 17 {
                    return packet[42..].to_vec();
                }
            }
        }
    }

    /// A UDP datagram from the guest to port 7 of the host, with its `virtio_net_hdr`. No checksum: 0 says none in IPv4.
    pub(crate) fn datagram(mac: [u8; 6], payload: &[u8]) -> Vec<u8> {
        let udp_len = u16::try_from(8 + payload.len()).unwrap();
        let mut ip = vec![0x45, 0];
        ip.extend(be(20 + udp_len));
        ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        ip.extend(GUEST_IP);
        ip.extend(HOST_IP);
        let words = ip.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
        let sum: u32 = words.sum();
        let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&be(!folded));
        let mut frame = vec![0; HEADER_BYTES];
        frame.extend(mac);
        frame.extend(GUEST);
        frame.extend([8, 0]);
        frame.extend(ip);
        frame.extend(be(5000));
        frame.extend(be(7));
        frame.extend(be(udp_len));
        frame.extend([0, 0]);
        frame.extend(payload);
        frame
    }

    fn be(number: u16) -> [u8; 2] {
        [(number >> 8) as u8, (number & 0xff) as u8]
    }

    pub(crate) fn host_mac() -> [u8; 6] {
        let text = std::fs::read_to_string("/proc/self/net/dev").map(|_| ()).map(|()| {
            let done = Command::new("ip")
                .args(["-o", "link", "show", "tap0"])
                .output()
                .unwrap();
            String::from_utf8(done.stdout).unwrap()
        });
        let text = text.unwrap();
        let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let bytes: Vec<u8> = mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        bytes.try_into().unwrap()
    }

    fn listening() -> UdpSocket {
        let socket = UdpSocket::bind((Ipv4Addr::from(HOST_IP), 7)).unwrap();
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(10)))
            .unwrap();
        socket
    }

    fn heard(socket: &UdpSocket) -> Vec<u8> {
        let mut bytes = [0; 2000];
        let len = socket.recv(&mut bytes).expect("a datagram came");
        bytes[..len].to_vec()
    }

    #[test]
    fn frames_cross_in_both_directions() {
        let Some(tap) = wired() else { return };
        assert!(tap.created());
        let socket = listening();
        socket.send_to(b"to the guest", (Ipv4Addr::from(GUEST_IP), 9)).unwrap();
        assert_eq!(receive_udp(&tap), b"to the guest");
        assert_eq!(tap.send(&datagram(host_mac(), b"to the host")), Sent::Taken);
        assert_eq!(heard(&socket), b"to the host");
    }

    #[test]
    fn held_frames_leave_in_order_after_the_release_and_none_before() {
        let Some(tap) = wired() else { return };
        let (socket, mac) = (listening(), host_mac());
        tap.hold();
        for n in 0..20 {
            assert_eq!(tap.send(&datagram(mac, &[n])), Sent::Taken);
        }
        socket.set_nonblocking(true).unwrap();
        assert!(socket.recv(&mut [0; 9]).is_err(), "nothing leaves while held");
        socket.set_nonblocking(false).unwrap();
        tap.release();
        tap.send(&datagram(mac, &[20]));
        let order: Vec<u8> = (0..21).flat_map(|_| heard(&socket)).collect();
        assert_eq!(order, (0..21).collect::<Vec<u8>>());
    }

    #[test]
    fn held_frames_are_bounded_and_the_card_is_woken_when_there_is_room() {
        let Some(tap) = wired() else { return };
        tap.hold();
        let frame = vec![0; 60_000];
        let taken = (0..1000).take_while(|_| tap.send(&frame) == Sent::Taken).count();
        assert_eq!(taken, limits::HELD_FRAME_BYTES / frame.len());
        while tap.receive(&mut vec![0; 70_000]).is_some() {}
        tap.listen(false);
        assert!(!wakes(&tap, 0));
        tap.release();
        assert!(wakes(&tap, PATIENCE_MS));
        assert_eq!(tap.send(&frame), Sent::Taken);
        assert!(!wakes(&tap, 0));
    }

    #[test]
    fn a_card_that_does_not_listen_is_not_woken_and_loses_nothing() {
        let Some(tap) = wired() else { return };
        while tap.receive(&mut vec![0; 70_000]).is_some() {}
        tap.listen(false);
        listening().send_to(b"later", (Ipv4Addr::from(GUEST_IP), 9)).unwrap();
        assert!(!wakes(&tap, 0));
        tap.listen(true);
        assert_eq!(receive_udp(&tap), b"later");
    }

    #[test]
    fn frames_are_lost_and_counted_while_the_interface_is_down() {
        let Some(tap) = wired() else { return };
        ip("link set tap0 down");
        assert_eq!(tap.send(&datagram(GUEST, b"x")), Sent::Taken);
        assert_eq!(tap.lost(), 1);
        assert_eq!(tap.receive(&mut [0; 100]), None);
    }

    #[test]
    fn only_a_tap_made_here_is_brought_up_and_given_its_mtu() {
        if !own_network() {
            return;
        }
        ip("tuntap add dev old0 mode tap");
        let source = |name: &str| TapSource::Named(name.to_owned());
        let old = HostTap::open(&source("old0"), Some(9000)).unwrap();
        let new = HostTap::open(&source("new0"), Some(9000)).unwrap();
        assert_eq!((old.created(), new.created()), (false, true));
        let about = |name: &str| {
            let done = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
            String::from_utf8(done.stdout).unwrap()
        };
        assert!(about("old0").contains("mtu 1500"), "{}", about("old0"));
        assert!(!about("old0").contains(",UP"));
        assert!(about("new0").contains("mtu 9000"));
        assert!(about("new0").contains(",UP"));
    }

    #[test]
    fn an_inherited_tap_is_used_and_left_open() {
        if !own_network() {
            return;
        }
        let first = named("tap7").unwrap();
        let again = HostTap::open(&TapSource::Inherited(first.file.as_raw_fd()), None).unwrap();
        assert_eq!((again.name(), again.created()), ("tap7", false));
        drop(again);
        assert!(interface_of(&first.file).is_ok());
    }

    #[test]
    fn what_cannot_be_used_is_refused_in_one_line_that_says_why() {
        if !own_network() {
            return;
        }
        ip("tuntap add dev tun0 mode tun");
        let _busy = named("tap0").unwrap();
        for (name, why) in [
            ("tap0", "tap tap0: busy: another process has it open"),
            (
                "lo",
                "tap lo: not a TAP, or one of several queues: see `ip -d link show`",
            ),
            (
                "tun0",
                "tap tun0: not a TAP, or one of several queues: see `ip -d link show`",
            ),
            (
                "",
                "tap : not the name of an interface: 1 to 15 characters, none of / % : or space",
            ),
            (
                "a/b",
                "tap a/b: not the name of an interface: 1 to 15 characters, none of / % : or space",
            ),
        ] {
            assert_eq!(refused(name), why);
        }
        let file = File::open("/dev/null").unwrap();
        let of = |fd| HostTap::open(&TapSource::Inherited(fd), None).unwrap_err().to_string();
        assert!(of(file.as_raw_fd()).ends_with("not an open TAP"));
        assert!(of(9999).contains("not a descriptor of this process"));
    }

    #[test]
    fn every_set_of_offloads_is_accepted_by_the_kernel() {
        let Some(tap) = wired() else { return };
        for bits in 0..8 {
            tap.offload(Offloads {
                checksum: bits & 1 != 0,
                tso4: bits & 2 != 0,
                tso6: bits & 4 != 0,
            });
        }
    }
}
