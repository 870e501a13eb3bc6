//! What the card does.

use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Now, Reader, Writer};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_OK, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::announce::{self, Announcement};
use super::wire::{Offloads, Sent, Tap};
use super::{CONTROL, CONTROL_SIZE, FRAME_BYTES, FRAME_LEAST, HEADER_BYTES, QUEUE_SIZE, RECEIVE, TRANSMIT};
use crate::limits::{NET_BUFFERS_PER_FRAME, NET_FRAMES_PER_CALL};
use crate::virtio::limiter::{Limiter, Limits};
use crate::virtio::{Cause, Chain, Rings, Virtio, Wake, bit};

/// What a network card is, and what it is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// Which card this is, the `eth0` in `net/eth0`.
    pub id: String,
    /// The guest's address.
    pub mac: [u8; 6],
    /// The longest packet of the network, if the guest is to know it.
    pub mtu: Option<u16>,
    /// Whether checksums and segmentation may be left to the host, and the other way round.
    pub offload: bool,
    /// Whether the driver is asked to announce the guest after a move (`VIRTIO_NET_F_GUEST_ANNOUNCE`). The card speaks for it
    /// anyway.
    pub guest_announce: bool,
    /// Limits on what the guest receives.
    pub receive_limits: Limits,
    /// Limits on what the guest sends.
    pub send_limits: Limits,
    /// The other end.
    pub tap: Arc<dyn Tap>,
}

/// A network card.
pub struct Net {
    kind: String,
    wiring: Wiring,
    /// What the driver settled for.
    features: u64,
    /// The TAP has not been told what the driver settled for. Told by the first work, and not before: a twin that waits to run
    /// says nothing to the world.
    offload_due: bool,
    receiving: Lane,
    sending: Lane,
    /// The driver was asked to announce the guest and has not said that it did.
    announce_asked: bool,
    announcement: Announcement,
    counts: Counts,
}

/// One direction.
pub(super) struct Lane {
    pub(super) limiter: Limiter,
    /// The frame that could not go on: none of the guest's buffers would hold it, the world did not take it, or the limit was
    /// reached. Empty if there is none, at most [`FRAME_BYTES`].
    pub(super) frame: Vec<u8>,
    /// The limiter has let it pass.
    paid: bool,
    /// When the limiter will let it pass.
    opens: Option<Now>,
}

/// What a card did since it was built or restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames put into the guest's buffers.
    pub received: u64,
    /// Frames the world took.
    pub sent: u64,
    /// Frames for the guest that fit into no buffer of its driver's.
    pub dropped: u64,
    /// Frames from the guest that are none: too long, too short, with a header that was not agreed upon.
    pub malformed: u64,
}

/// What became of a frame for the guest.
enum Delivery {
    /// It took so many chains.
    Done(usize),
    /// There are too few buffers now.
    Waits,
    /// No buffers will ever do.
    Impossible,
}

/// Everything that depends on offloads.
const OFFLOADS: u64 = bit(VIRTIO_NET_F_CSUM)
    | bit(VIRTIO_NET_F_GUEST_CSUM)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6);

impl Lane {
    fn new(limits: Limits) -> Self {
        Self {
            limiter: Limiter::new(limits),
            frame: Vec::new(),
            paid: false,
            opens: None,
        }
    }

    /// Whether the limiter lets the frame pass.
    fn pay(&mut self, now: Now) -> bool {
        if !self.paid {
            self.opens = self.limiter.take(now, self.frame.len() as u64).err();
            self.paid = self.opens.is_none();
        }
        self.paid
    }

    /// The frame is gone.
    fn clear(&mut self) {
        self.frame.clear();
        self.paid = false;
    }
}

impl Net {
    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Show the network where the guest is, from the next work on.
    pub const fn announce(&mut self) {
        self.announcement = Announcement::due();
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & bit(feature) != 0
    }

    /// Frames for the guest, from the TAP into its buffers.
    fn receive(&mut self, now: Now, rings: &mut Rings) -> Wake {
        if !rings.is_active(RECEIVE) {
            self.wiring.tap.listen(false);
            return Wake::Idle;
        }
        let mut chains = 0;
        for _ in 0..NET_FRAMES_PER_CALL {
            if chains >= NET_BUFFERS_PER_FRAME {
                break;
            }
            if self.receiving.frame.is_empty() && !self.fetch() {
                self.wiring.tap.listen(true);
                return Wake::Idle;
            }
            if !self.receiving.pay(now) {
                self.wiring.tap.listen(false);
                return Wake::Idle;
            }
            match self.deliver(rings) {
                Delivery::Done(used) => {
                    chains += used;
                    self.counts.received += 1;
                }
                Delivery::Impossible => self.counts.dropped += 1,
                Delivery::Waits => {
                    self.wiring.tap.listen(false);
                    return Wake::Idle;
                }
            }
            self.receiving.clear();
        }
        Wake::Again
    }

    /// Take the next frame from the TAP.
    fn fetch(&mut self) -> bool {
        let frame = &mut self.receiving.frame;
        frame.resize(FRAME_BYTES, 0);
        let len = self.wiring.tap.receive(frame).unwrap_or(0);
        frame.truncate(len);
        len > 0
    }

    /// Put the frame that arrived into as many buffers as it takes, or into none.
    fn deliver(&mut self, rings: &mut Rings) -> Delivery {
        let most = if self.has(VIRTIO_NET_F_MRG_RXBUF) {
            NET_BUFFERS_PER_FRAME
        } else {
            1
        };
        let needed = self.receiving.frame.len() as u64;
        let mut chains = Vec::new();
        let mut room = 0;
        while room < needed {
            let next = if chains.len() < most { rings.pop(RECEIVE) } else { None };
            let Some(chain) = next else {
                let enough = chains.len() < most;
                chains
                    .iter()
                    .rev()
                    .for_each(|chain: &Chain| rings.put_back(chain.token()));
                return if enough { Delivery::Waits } else { Delivery::Impossible };
            };
            room += chain.writable.bytes();
            chains.push(chain);
        }
        // How many buffers the frame takes is said in its header (virtio 1.2, Processing of Incoming Packets).
        let count = u16::try_from(chains.len()).expect("at most 64");
        self.receiving.frame[HEADER_BYTES - 2..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        self.fill(chains, rings)
    }

    fn fill(&self, chains: Vec<Chain>, rings: &mut Rings) -> Delivery {
        let mut rest = &self.receiving.frame[..];
        let mut used = Vec::with_capacity(chains.len());
        let mut whole = true;
        for mut chain in chains {
            let room = usize::try_from(chain.writable.bytes()).unwrap_or(usize::MAX);
            let (here, after) = rest.split_at(room.min(rest.len()));
            rest = after;
            whole &= chain.writable.write(rings.ram(), here).is_ok();
            used.push((chain.token(), u32::try_from(here.len()).expect("a frame is short")));
        }
        if !whole {
            // A buffer lies outside of memory. The driver gets its buffers back, with nothing in them.
            used.iter_mut().for_each(|(_, written)| *written = 0);
        }
        rings.push_together(&used);
        if whole {
            Delivery::Done(used.len())
        } else {
            Delivery::Impossible
        }
    }

    /// Frames from the guest, out of its buffers to the TAP.
    fn transmit(&mut self, now: Now, rings: &mut Rings) -> Wake {
        for _ in 0..NET_FRAMES_PER_CALL {
            if self.sending.frame.is_empty() {
                let Some(mut chain) = rings.pop(TRANSMIT) else {
                    return Wake::Idle;
                };
                let taken = self.take(&mut chain, rings);
                // The frame is a copy of ours: its buffer is free, whatever becomes of it.
                rings.push(chain.token(), 0);
                if !taken {
                    self.sending.clear();
                    self.counts.malformed += 1;
                    continue;
                }
            }
            if !self.sending.pay(now) || self.wiring.tap.send(&self.sending.frame) == Sent::NotNow {
                return Wake::Idle;
            }
            self.counts.sent += 1;
            self.sending.clear();
        }
        Wake::Again
    }

    /// Copy a frame out of guest memory; `false` if it is none.
    fn take(&mut self, chain: &mut Chain, rings: &Rings) -> bool {
        let bytes = usize::try_from(chain.readable.bytes()).unwrap_or(usize::MAX);
        if !(FRAME_LEAST..=FRAME_BYTES).contains(&bytes) {
            return false;
        }
        self.sending.frame.resize(bytes, 0);
        chain.readable.read(rings.ram(), &mut self.sending.frame).is_ok() && self.is_agreed_header(&self.sending.frame)
    }

    /// Whether a frame asks for nothing that was not agreed upon: the header goes to the host's kernel as it is.
    fn is_agreed_header(&self, frame: &[u8]) -> bool {
        let (flags, segmentation) = (u32::from(frame[0]), u32::from(frame[1]));
        let flags_agreed = match flags {
            0 => true,
            VIRTIO_NET_HDR_F_NEEDS_CSUM => self.has(VIRTIO_NET_F_CSUM),
            _ => false,
        };
        let segmentation_agreed = match segmentation {
            VIRTIO_NET_HDR_GSO_NONE => true,
            VIRTIO_NET_HDR_GSO_TCPV4 => self.has(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => self.has(VIRTIO_NET_F_HOST_TSO6),
            _ => false,
        };
        flags_agreed && segmentation_agreed
    }

    /// Commands of the driver.
    fn control(&mut self, rings: &mut Rings) {
        while let Some(mut chain) = rings.pop(CONTROL) {
            let mut command = [0; 2];
            let answer = match chain.readable.read(rings.ram(), &mut command) {
                Ok(()) => self.command(command),
                Err(_) => VIRTIO_NET_ERR,
            };
            let answer = [u8::try_from(answer).expect("an answer is one byte")];
            let written = chain.writable.write(rings.ram(), &answer).map_or(0, |()| 1);
            rings.push(chain.token(), written);
        }
    }

    fn command(&mut self, [class, command]: [u8; 2]) -> u32 {
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                self.announce_asked = false;
                VIRTIO_NET_OK
            }
            _ => VIRTIO_NET_ERR,
        }
    }

    /// Show the network where the guest is, if a round of that is due, and have its driver do so.
    fn announce_if_due(&mut self, now: Now, rings: &mut Rings) {
        if self.announcement.take_round(now) {
            // Lost or not taken: the next round is there for that.
            self.wiring.tap.send(&announce::frame(self.wiring.mac));
            if self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) {
                self.announce_asked = true;
                rings.config_changed();
            }
        }
    }

    /// When something will be due though nothing happens. Said by every call: the last one counts.
    fn next_moment(&self) -> Wake {
        let moments = [self.announcement.next(), self.receiving.opens, self.sending.opens];
        moments.into_iter().flatten().min().map_or(Wake::Idle, Wake::At)
    }

    pub(super) const fn parts(&self) -> (&Lane, &Lane, bool) {
        (&self.receiving, &self.sending, self.announce_asked)
    }

    pub(super) const fn lanes(&mut self) -> [&mut Lane; 2] {
        [&mut self.receiving, &mut self.sending]
    }

    /// The card is another host's from now on, or was stored: the network does not know where.
    pub(super) const fn arrive(&mut self, announce_asked: bool) {
        self.announce_asked = announce_asked;
        self.announce();
    }
}

impl Virtio for Net {
    const ID: u32 = VIRTIO_ID_NET;
    const VERSION: u32 = super::state::VERSION;
    type Wiring = Wiring;

    fn new(wiring: Wiring) -> Self {
        Self {
            kind: format!("net/{}", wiring.id),
            features: 0,
            offload_due: true,
            receiving: Lane::new(wiring.receive_limits),
            sending: Lane::new(wiring.send_limits),
            announce_asked: false,
            announcement: Announcement::over(),
            counts: Counts::default(),
            wiring,
        }
    }

    fn kind(&self) -> &str {
        &self.kind
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE, CONTROL_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features =
            bit(VIRTIO_NET_F_MAC) | bit(VIRTIO_NET_F_STATUS) | bit(VIRTIO_NET_F_CTRL_VQ) | bit(VIRTIO_NET_F_MRG_RXBUF);
        if self.wiring.guest_announce {
            features |= bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
        }
        if self.wiring.mtu.is_some() {
            features |= bit(VIRTIO_NET_F_MTU);
        }
        if self.wiring.offload {
            features |= OFFLOADS;
        }
        features
    }

    fn accept(&mut self, features: u64) {
        self.features = features;
        self.offload_due = true;
    }

    /// `struct virtio_net_config` up to `mtu` (virtio 1.2, Network Device, Device configuration layout).
    fn config(&self) -> Vec<u8> {
        let announce = if self.announce_asked { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = u16::try_from(VIRTIO_NET_S_LINK_UP | announce).expect("two low bits");
        let mut w = Writer::new();
        w.put(&self.wiring.mac)
            .u16(status)
            .u16(1)
            .u16(self.wiring.mtu.unwrap_or(0));
        w.into_bytes()
    }

    fn work(&mut self, now: Now, cause: Cause, rings: &mut Rings) -> Wake {
        if std::mem::take(&mut self.offload_due) {
            self.wiring.tap.offload(Offloads {
                checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
                tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
                tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            });
        }
        let wake = match cause {
            Cause::Notified(RECEIVE) => self.receive(now, rings),
            Cause::Notified(TRANSMIT) => self.transmit(now, rings),
            Cause::Notified(_) => {
                self.control(rings);
                Wake::Idle
            }
            Cause::World => {
                self.announce_if_due(now, rings);
                let transmit = self.transmit(now, rings);
                transmit.min(self.receive(now, rings))
            }
        };
        wake.min(self.next_moment())
    }

    fn reset(&mut self) {
        let counts = self.counts;
        *self = Self {
            counts,
            ..Self::new(self.wiring.clone())
        };
    }

    fn save(&self, w: &mut Writer) {
        super::state::write(self, w);
    }

    fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed> {
        super::state::read(self, r)
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Net({}, {:?})", self.kind, self.counts)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(net/{})", self.id)
    }
}
