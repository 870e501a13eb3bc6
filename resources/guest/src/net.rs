//! `work=net`: a host on the network, and a source and a sink of datagrams.
//!
//! | UDP port | what it does |
//! |---|---|
//! | 7 | sends every datagram back |
//! | 9 | counts datagrams, which begin with their number (8 bytes, from 0); number 2^64-1 asks for the account and begins a new one |
//! | 19 | streams datagrams to whoever asks: 8 bytes for how many us, 8 for how many bytes each; they begin with their number, from 0 |
//!
//! Numbers are little-endian. The account has eight: datagrams and bytes counted, the next number expected, datagrams
//! that came out of order, nanoseconds from the first to the last, datagrams streamed last, their bytes, nanoseconds
//! that took. Pings and ARP are answered. Whoever runs the VMM measures; the guest only does it, as fast as it can.
//!
//! When the device asks for it (`VIRTIO_NET_F_GUEST_ANNOUNCE`), a gratuitous ARP tells everybody where the guest is now.

use crate::EXIT_CORRUPT;
use crate::boot::{CpuCell, Share};
use crate::console::{fatal, say};
use crate::virtio::{NET, Queue, Shared, Transport};
use core::slice;
use umbra_guest::frame::{self, Address, DATAGRAM_HEADERS, FRAME_MAX, Incoming, PAYLOAD_MAX};
use umbra_guest::ring::{Part, RING_BYTES, SIZE_MAX};

/// Features (virtio 1.2, Network Device, Feature bits).
const MAC: u64 = 1 << 5;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const GUEST_ANNOUNCE: u64 = 1 << 21;
/// `struct virtio_net_config`: the MAC at 0, the status at 6.
const CONFIG_STATUS: u64 = 6;
const STATUS_ANNOUNCE: u16 = 2;
/// `VIRTIO_NET_CTRL_ANNOUNCE`, `VIRTIO_NET_CTRL_ANNOUNCE_ACK`.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];

/// `struct virtio_net_hdr`, all zeros here: no offloads.
const HEADER: usize = 12;
/// A buffer: header and frame.
const BUFFER: usize = 2048;

const ECHO: u16 = 7;
const SINK: u16 = 9;
const STREAM: u16 = 19;
const ACCOUNT: u64 = u64::MAX;
/// Longest stream: nobody can make a guest babble for ever.
const STREAM_US_MAX: u64 = 60_000_000;
/// Frames taken from a ring in one turn, so that beats are not late.
const BATCH: usize = 64;

/// Memory it shares with its device.
pub(crate) const SHARED_BYTES: u64 = 3 * RING_BYTES as u64 + 2 * (SIZE_MAX as u64 * BUFFER as u64) + 4096;

/// A queue whose slot `n` has buffer `n`.
struct Lane {
    queue: Queue,
    buffers: *mut u8,
}

impl Lane {
    fn new(transport: &Transport, index: u32, shared: &mut Shared) -> Self {
        let queue = transport.queue(index, 1, shared);
        let buffers = shared.take(u64::from(queue.slots()) * BUFFER as u64);
        Self { queue, buffers }
    }

    fn buffer(&self, slot: u16) -> *mut u8 {
        self.buffers.wrapping_add(usize::from(slot) * BUFFER)
    }

    fn offer(&mut self, slot: u16, bytes: usize, for_device_to_write: bool) {
        let part = Part {
            address: self.buffer(slot) as u64,
            bytes: bytes as u32,
            for_device_to_write,
        };
        // SAFETY: the slot's own buffer.
        unsafe { self.queue.offer(slot, None, &[part]) };
    }
}

/// `work=net`.
pub(crate) struct Net {
    transport: Transport,
    me: Address,
    receive: Lane,
    send: Lane,
    /// Slots of `send` that are free; the first `free` of them.
    free_slots: [u16; SIZE_MAX as usize],
    free: usize,
    control: Option<Queue>,
    control_page: *mut u8,
    sink: Sink,
    stream: Option<Stream>,
    streamed: [u64; 3],
    /// The last turn had enough of frames before there were no more.
    behind: bool,
    tsc_khz: u64,
}

/// What port 9 has counted.
#[derive(Clone, Copy, Default)]
struct Sink {
    datagrams: u64,
    bytes: u64,
    next: u64,
    disordered: u64,
    first: u64,
    last: u64,
}

/// What port 19 is sending.
#[derive(Clone, Copy)]
struct Stream {
    to: Address,
    port: u16,
    payload: usize,
    next: u64,
    since: u64,
    until: u64,
}

impl Net {
    /// Starts the first network device there is.
    pub(crate) fn new(share: &Share) -> Self {
        let mut shared = Shared::new(share);
        let mut transport = Transport::find(share, NET, MAC | STATUS | CTRL_VQ | GUEST_ANNOUNCE);
        let mac = if transport.has(MAC) {
            core::array::from_fn(|n| transport.config8(n as u64))
        } else {
            // Locally administered, as no other host of ours.
            [2, 0x75, 0x6d, 0x62, 0x72, share.config.ip[3]]
        };
        let me = Address {
            mac,
            ip: share.config.ip,
        };
        let receive = Lane::new(&transport, 0, &mut shared);
        let send = Lane::new(&transport, 1, &mut shared);
        let control = transport.has(CTRL_VQ).then(|| transport.queue(2, 3, &mut shared));
        transport.start();
        let slots = send.queue.slots();
        let mut net = Self {
            transport,
            me,
            receive,
            send,
            free_slots: core::array::from_fn(|n| n as u16),
            free: usize::from(slots),
            control,
            control_page: shared.take(4096),
            sink: Sink::default(),
            stream: None,
            streamed: [0; 3],
            behind: false,
            tsc_khz: share.clock.tsc_khz,
        };
        for slot in 0..net.receive.queue.slots() {
            net.receive.offer(slot, BUFFER, true);
        }
        net.receive.queue.publish();
        let [a, b, c, d, e, f] = mac;
        let [w, x, y, z] = me.ip;
        say!("umbra-guest: net mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} ip={w}.{x}.{y}.{z}");
        net.announce();
        net
    }

    /// One turn.
    pub(crate) fn step(&mut self, cell: CpuCell, now: u64) -> Option<u64> {
        let news = self.transport.listen(now);
        if news.config {
            self.config_changed();
        }
        if news.requests {
            self.reclaim();
        }
        if news.requests || self.behind {
            self.behind = self.hear(cell, now) == BATCH;
        }
        self.babble(now);
        self.send.queue.publish();
        self.receive.queue.publish();
        if self.behind || self.stream.is_some() {
            return None;
        }
        let Self { receive, send, .. } = self;
        self.transport.expect(now, &mut [&mut receive.queue, &mut send.queue])
    }

    /// Takes back the buffers of frames that were sent.
    fn reclaim(&mut self) {
        while let Some((slot, _)) = self.send.queue.take() {
            self.free_slots[self.free] = slot;
            self.free += 1;
        }
        if let Some(control) = &mut self.control {
            while control.take().is_some() {}
        }
    }

    /// Takes frames that came, at most [`BATCH`].
    fn hear(&mut self, cell: CpuCell, now: u64) -> usize {
        let mut taken = 0;
        while taken < BATCH
            && let Some((slot, bytes)) = self.receive.queue.take()
        {
            taken += 1;
            let length = (bytes as usize).wrapping_sub(HEADER);
            if length > BUFFER - HEADER {
                fatal(
                    EXIT_CORRUPT,
                    format_args!("CORRUPT what=net-receive slot={slot} want=12..2048 found={bytes}"),
                );
            }
            // SAFETY: the slot's own buffer, which the device is done with.
            let frame = unsafe { slice::from_raw_parts(self.receive.buffer(slot).add(HEADER), length) };
            self.answer(frame, now);
            self.receive.offer(slot, BUFFER, true);
        }
        if taken > 0 {
            cell.set_ops(cell.ops() + taken as u64);
        }
        taken
    }

    fn answer(&mut self, frame: &[u8], now: u64) {
        let me = self.me;
        match frame::understand(&me, frame) {
            Incoming::WhoIs(asker) => self.say(|out| frame::answer_arp(&me, &asker, out)),
            Incoming::Ping => self.send_back(frame),
            Incoming::Datagram { to_port: ECHO, .. } => self.send_back(frame),
            Incoming::Datagram {
                from,
                from_port,
                to_port: SINK,
                payload,
            } => {
                let payload = &frame[payload];
                match number(payload, 0) {
                    Some(ACCOUNT) => self.account(from, from_port),
                    Some(found) => self.sink.count(found, payload.len(), now),
                    None => {}
                }
            }
            Incoming::Datagram {
                from,
                from_port,
                to_port: STREAM,
                payload,
            } => {
                if let (Some(us), Some(bytes)) = (number(&frame[payload.clone()], 0), number(&frame[payload], 8)) {
                    let ticks = us.min(STREAM_US_MAX) * self.tsc_khz / 1000;
                    self.stream = Some(Stream {
                        to: from,
                        port: from_port,
                        payload: bytes.clamp(8, PAYLOAD_MAX as u64) as usize,
                        next: 0,
                        since: now,
                        until: now + ticks,
                    });
                }
            }
            Incoming::Datagram { .. } | Incoming::Other => {}
        }
    }

    fn account(&mut self, to: Address, port: u16) {
        let (sink, streamed) = (self.sink, self.streamed);
        self.sink = Sink::default();
        let ns = (u128::from(sink.last - sink.first) * 1_000_000 / u128::from(self.tsc_khz)) as u64;
        let account = [sink.datagrams, sink.bytes, sink.next, sink.disordered, ns];
        let me = self.me;
        self.say(|out| {
            let numbers = account.into_iter().chain(streamed);
            for (place, number) in out[DATAGRAM_HEADERS..].chunks_exact_mut(8).zip(numbers) {
                place.copy_from_slice(&number.to_le_bytes());
            }
            frame::datagram((&me, SINK), (&to, port), 64, out)
        });
    }

    /// Sends one frame that `write` writes and tells the length of; drops it if there is no room, as networks do.
    fn say(&mut self, write: impl FnOnce(&mut [u8]) -> usize) {
        if self.free == 0 {
            self.reclaim();
        }
        let Some(free) = self.free.checked_sub(1) else {
            return;
        };
        self.free = free;
        let slot = self.free_slots[free];
        // SAFETY: the buffer of a free slot.
        let buffer = unsafe { slice::from_raw_parts_mut(self.send.buffer(slot), HEADER + FRAME_MAX) };
        let (header, frame) = buffer.split_at_mut(HEADER);
        header.fill(0);
        let length = write(frame);
        self.send.offer(slot, HEADER + length, false);
    }

    fn send_back(&mut self, frame: &[u8]) {
        if frame.len() <= FRAME_MAX {
            self.say(|out| {
                let out = &mut out[..frame.len()];
                out.copy_from_slice(frame);
                frame::turn_round(out);
                frame.len()
            });
        }
    }

    /// Fills the free slots with the stream.
    fn babble(&mut self, now: u64) {
        let Some(mut stream) = self.stream else { return };
        if now >= stream.until {
            let ns = (u128::from(now - stream.since) * 1_000_000 / u128::from(self.tsc_khz)) as u64;
            self.streamed = [stream.next, stream.next * stream.payload as u64, ns];
            self.stream = None;
            return;
        }
        self.reclaim();
        let me = self.me;
        for _ in 0..self.free.min(BATCH) {
            self.say(|out| {
                let length = frame::datagram((&me, STREAM), (&stream.to, stream.port), stream.payload, out);
                out[DATAGRAM_HEADERS..][..8].copy_from_slice(&stream.next.to_le_bytes());
                length
            });
            stream.next += 1;
        }
        self.stream = Some(stream);
    }

    fn announce(&mut self) {
        let me = self.me;
        self.say(|out| frame::announcement(&me, out));
        self.send.queue.publish();
    }

    /// The device has something to say: that we are somewhere else now, perhaps.
    fn config_changed(&mut self) {
        let wanted = self.transport.has(GUEST_ANNOUNCE | STATUS)
            && self.transport.config16(CONFIG_STATUS) & STATUS_ANNOUNCE != 0;
        if !wanted {
            return;
        }
        self.announce();
        let page = self.control_page;
        let Some(control) = self.control.as_mut().filter(|control| !control.is_in_flight(0)) else {
            return;
        };
        // SAFETY: the page of slot 0, which is free.
        unsafe {
            page.cast::<[u8; 2]>().write_volatile(ANNOUNCE_ACK);
            page.add(64).write_volatile(0xff);
        }
        let part = |at: usize, bytes, for_device_to_write| Part {
            address: page as u64 + at as u64,
            bytes,
            for_device_to_write,
        };
        // SAFETY: as above.
        unsafe { control.offer(0, None, &[part(0, 2, false), part(64, 1, true)]) };
        control.publish();
    }
}

impl Sink {
    fn count(&mut self, found: u64, bytes: usize, now: u64) {
        if self.datagrams == 0 {
            self.first = now;
        }
        self.last = now;
        self.datagrams += 1;
        self.bytes += bytes as u64;
        self.disordered += u64::from(found < self.next);
        self.next = self.next.max(found.saturating_add(1));
    }
}

/// The number at this place of a payload.
fn number(payload: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(payload.get(at..at + 8)?.try_into().ok()?))
}
