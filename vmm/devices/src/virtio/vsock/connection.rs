//! One connection: its phase, its credit in both directions, and what it owes the guest.
//!
//! ```text
//!   a program asks:    Asked ── REQUEST sent ──▶ Waiting ── RESPONSE came ──▶ Open
//!   the guest asks:    Taken ── RESPONSE sent ──────────────────────────────▶ Open
//! ```
//!
//! A connection ends by being removed, with or without a reset to the guest; there is no phase for that.

use std::collections::VecDeque;

use umbra_units::Now;

use super::packet;
use super::streams::{Interest, Progress, StreamId, Streams};
use crate::limits::VSOCK_BUFFER_BYTES;

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: StreamId,
    pub(super) phase: Phase,
    /// When it was asked for: a guest that does not answer is not waited for without end.
    pub(super) since: Now,
    /// It is among those that have something to say.
    pub(super) queued: bool,
    /// From the guest, to be written to the stream. At most [`VSOCK_BUFFER_BYTES`].
    pending: VecDeque<u8>,
    /// Bytes the guest sent, and of these the bytes written to the stream, modulo 2³².
    received: u32,
    forwarded: u32,
    /// What the guest was last told of `forwarded`.
    told: u32,
    /// The guest asked what it may send.
    credit_asked: bool,
    /// Bytes sent to the guest; what it can hold, and what it has passed on.
    sent: u32,
    guest_room: u32,
    guest_forwarded: u32,
    /// The guest was asked for room, since there was last some.
    room_asked: bool,
    /// The stream may have bytes.
    readable: bool,
    /// Who still sends, and who still takes.
    guest_sends: bool,
    guest_receives: bool,
    host_sends: bool,
    /// The guest was told that the host sends no more.
    end_told: bool,
    watched: Interest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest is to be asked.
    Asked,
    /// The guest was asked.
    Waiting,
    /// The guest is to be told that its wish was granted.
    Taken,
    Open,
}

/// A packet to the guest, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) len: usize,
}

/// Whether a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Fate {
    GoesOn,
    /// It is over, and the guest is told so by a reset: the end of an orderly shutdown, or a disorder.
    Reset,
}

/// What the guest may send beyond what was passed on: our buffer.
const ROOM: u32 = VSOCK_BUFFER_BYTES;

impl Connection {
    pub(super) const fn new(stream: StreamId, phase: Phase, since: Now) -> Self {
        Self {
            stream,
            phase,
            since,
            queued: false,
            pending: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            credit_asked: false,
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
            room_asked: false,
            readable: false,
            guest_sends: true,
            guest_receives: true,
            host_sends: true,
            end_told: false,
            watched: Interest {
                read: false,
                write: false,
            },
        }
    }

    /// Bytes the guest has room for. A guest that says nonsense has none.
    pub(super) const fn credit(&self) -> u32 {
        self.guest_room
            .saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// What a header says about credit.
    pub(super) const fn learn(&mut self, room: u32, forwarded: u32) {
        self.guest_room = room;
        self.guest_forwarded = forwarded;
        if self.credit() > 0 {
            self.room_asked = false;
        }
    }

    /// What the guest is told about credit by any packet.
    pub(super) const fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.credit_asked = false;
        (ROOM, self.forwarded)
    }

    /// The guest asks what it may send.
    pub(super) const fn ask_credit(&mut self) {
        self.credit_asked = true;
    }

    /// How many bytes may come from the guest now.
    pub(super) const fn room(&self) -> u32 {
        ROOM - self.received.wrapping_sub(self.forwarded)
    }

    /// Bytes from the guest, no more than there is [`room`](Self::room) for.
    pub(super) fn receive(&mut self, bytes: &[u8], streams: &dyn Streams) -> Fate {
        if !self.guest_sends {
            return Fate::Reset;
        }
        let len = u32::try_from(bytes.len()).expect("no more than there is room for");
        self.received = self.received.wrapping_add(len);
        self.pending.extend(bytes);
        self.flush(streams)
    }

    /// The guest will send, or take, no more.
    pub(super) fn shut(&mut self, flags: u32, streams: &dyn Streams) -> Fate {
        let was_sending = self.guest_sends;
        self.guest_sends &= flags & packet::NO_SEND == 0;
        self.guest_receives &= flags & packet::NO_RECEIVE == 0;
        if was_sending && !self.guest_sends && self.pending.is_empty() {
            streams.finish(self.stream);
        }
        self.end()
    }

    /// Write on to the stream what the guest sent.
    pub(super) fn flush(&mut self, streams: &dyn Streams) -> Fate {
        if self.pending.is_empty() {
            return Fate::GoesOn;
        }
        while !self.pending.is_empty() {
            match streams.write(self.stream, self.pending.as_slices().0) {
                Progress::Bytes(bytes) => {
                    let bytes = bytes.min(self.pending.len());
                    self.pending.drain(..bytes);
                    let bytes = u32::try_from(bytes).expect("within the buffer");
                    self.forwarded = self.forwarded.wrapping_add(bytes);
                }
                Progress::Later => return Fate::GoesOn,
                // Nobody will ever take these bytes.
                Progress::Ended => return Fate::Reset,
            }
        }
        // An idle connection keeps no buffer.
        self.pending = VecDeque::new();
        if !self.guest_sends {
            streams.finish(self.stream);
        }
        self.end()
    }

    /// Over, when the guest neither sends nor takes and what it sent is on its way (virtio 1.2, Stream Sockets).
    fn end(&self) -> Fate {
        if self.guest_sends || self.guest_receives || !self.pending.is_empty() {
            Fate::GoesOn
        } else {
            Fate::Reset
        }
    }

    /// The stream was said to have bytes.
    pub(super) const fn readable(&mut self) {
        self.readable = true;
    }

    /// Whether there may be something to say to the guest.
    pub(super) fn has_news(&self) -> bool {
        match self.phase {
            Phase::Asked | Phase::Taken => true,
            Phase::Waiting => false,
            Phase::Open => {
                let end = !self.host_sends && !self.end_told;
                let asks = self.wants_room() && !self.room_asked;
                end || asks || self.owes_credit() || self.may_read()
            }
        }
    }

    /// A quarter of the buffer: often enough that a sender never stands still, seldom enough to cost nothing.
    fn owes_credit(&self) -> bool {
        self.guest_sends && (self.credit_asked || self.forwarded.wrapping_sub(self.told) >= ROOM / 4)
    }

    const fn wants_room(&self) -> bool {
        self.readable && self.host_sends && self.guest_receives && self.credit() == 0
    }

    const fn may_read(&self) -> bool {
        self.readable && self.host_sends && self.guest_receives && self.credit() > 0
    }

    /// The next packet to the guest, its payload put into `payload`. `None` if there is nothing to say after all.
    pub(super) fn next(&mut self, payload: &mut [u8], streams: &dyn Streams) -> Option<Outgoing> {
        let plain = |op| Some(Outgoing { op, flags: 0, len: 0 });
        match self.phase {
            Phase::Asked => {
                self.phase = Phase::Waiting;
                return plain(packet::REQUEST);
            }
            Phase::Taken => {
                self.phase = Phase::Open;
                return plain(packet::RESPONSE);
            }
            Phase::Waiting => return None,
            Phase::Open => {}
        }
        if self.owes_credit() {
            return plain(packet::CREDIT_UPDATE);
        }
        if self.may_read() && !payload.is_empty() {
            let most = usize::try_from(self.credit()).unwrap_or(usize::MAX).min(payload.len());
            match streams.read(self.stream, &mut payload[..most]) {
                Progress::Bytes(len) => {
                    let len = len.min(most);
                    let bytes = u32::try_from(len).expect("within the credit");
                    self.sent = self.sent.wrapping_add(bytes);
                    let (op, flags) = (packet::RW, 0);
                    return Some(Outgoing { op, flags, len });
                }
                Progress::Later => self.readable = false,
                Progress::Ended => self.host_sends = false,
            }
        }
        if !self.host_sends && !self.end_told {
            self.end_told = true;
            let (op, flags, len) = (packet::SHUTDOWN, packet::NO_SEND, 0);
            return Some(Outgoing { op, flags, len });
        }
        if self.wants_room() && !self.room_asked {
            self.room_asked = true;
            return plain(packet::CREDIT_REQUEST);
        }
        None
    }

    /// Have the stream watched for exactly what would be news.
    pub(super) fn watch(&mut self, streams: &dyn Streams) {
        let open = self.phase == Phase::Open;
        let interest = Interest {
            read: open && !self.readable && self.host_sends && self.guest_receives,
            write: open && !self.pending.is_empty(),
        };
        if interest != self.watched {
            self.watched = interest;
            streams.watch(self.stream, interest);
        }
    }
}
