//! One end of a link: where the rooms meet.
//!
//! Everything that happens is one of three things: a fact arrives and is booked (`handle_*`, `path_*`), the books are looked
//! at and work is laid on paths (`pump`, at the end of every fact and command), or the driver takes what is to
//! be done. Decisions are made in `pump` and below it only.
//!
//! # Life of a block
//!
//! ```text
//!             send_block                pump               peer's ack
//!  (nothing) ───────────▶ waiting ──────────────▶ laid ───────────────▶ delivered
//!                            ▲                     │
//!                            └─────────────────────┘
//!                        path died, or is suspected, and no other lay is on a trusted path
//! ```
//!
//! A bulk block goes back to waiting whole. An urgent block that was started never does: what is missing of it is
//! learned from the peer (`Gaps`) and laid as patches, so that a repair costs what was lost and no more.
//!
//! # Acknowledgements
//!
//! Built when they are taken ([`Link::poll_output`]), so that they say the newest: a driver that polls events first lets
//! each report what its user has taken. Messages, blocks and answers to probes are acknowledged at once; shards every
//! sixteenth or after a millisecond of quiet, and then with the gaps.

use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

use bytes::{Bytes, BytesMut};
use umbra_units::{Now, PathId, Ratio};

use crate::bulk::{Blocks, Held, Lay};
use crate::config::LinkConfig;
use crate::control::{Laid, MessageInbox, Outbox};
use crate::error::{PeerMisbehaved, Refused};
use crate::event::{BlockId, Class, LinkEvent, Output, PathFacts, PathSample, Priority, StreamId, Suspicion};
use crate::frames::{Ack, BLOCK_HEAD, Frame, Gaps, MESSAGE_HEAD, SHARD_HEAD};
use crate::limits;
use crate::path::{Path, Queued};
use crate::reassembly::{Arrival, Inbox};
use crate::redundancy::{Lossy, Table};
use crate::scheduler::{self, Lane};
use crate::stats::{LinkStats, PathState, PathStats};
use crate::stripe::{self, Layout};

/// Shards received before an acknowledgement goes out whatever else happens.
const SHARDS_PER_ACK: u32 = 16;
/// Quiet after which a delayed acknowledgement goes out: a driver's timer tick.
const ACK_DELAY: Duration = Duration::from_millis(1);
/// Processor time of a shard beyond that of as many stream bytes: (1/0.27 − 1/0.4) s/GB at 1,452 bytes, from
/// `transport.md` §1. It decides between shards and streams on fast links only.
const SHARD_EXTRA: f64 = 1.7e-6;
/// A repair round takes 9/8 round trips (RFC 9002's time threshold) and this for acknowledgement delays and timers.
const REPAIR_EXTRA: f64 = 0.003;
/// How much worse a millisecond of repair is than one of transfer: somebody waits, and it may be more.
const REPAIR_WEIGHT: f64 = 1.5;
/// Shard length where no path takes datagrams: only a granularity of repairs then.
const STREAM_SHARD: usize = 1_024;
/// How long after something arrived more is expected.
const RECEIVING: Duration = Duration::from_millis(100);
/// At least so far apart are looks for a lagging tail.
const REINJECT_PAUSE: Duration = Duration::from_millis(1);
/// Lateness of our own loop that counts as ours.
const LATE: Duration = Duration::from_millis(5);
/// Loss above which a message's copy on a second path is worth its bytes.
const COPY_LOSS: f64 = 1e-3;

/// When the next acknowledgement goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum AckDue {
    Never,
    At(Now),
    Immediately,
}

#[derive(Debug, Default)]
struct Counters {
    messages_sent: u64,
    messages_received: u64,
    messages_resent: u64,
    blocks_sent: u64,
    blocks_delivered: u64,
    blocks_received: u64,
    bulk_bytes: u64,
    parity_bytes: u64,
    resent_bytes: u64,
    reinjected_bytes: u64,
    duplicates: u64,
    as_shards: u64,
    as_streams: u64,
    as_copies: u64,
}

/// One end of the bundle of all paths to one peer. See the [crate] page for how to drive it.
#[derive(Debug)]
pub struct Link {
    config: LinkConfig,
    /// The latest moment anyone named. Time does not go back.
    now: Now,
    paths: BTreeMap<PathId, Path>,
    /// Some path is trusted.
    carrying: bool,
    /// It was said that none is.
    was_down: bool,
    next_stream: u64,

    outbox: Outbox,
    blocks: Blocks,
    table: Table,
    outputs: VecDeque<Output>,
    reinject_at: Now,

    message_inbox: MessageInbox,
    inbox: Inbox,
    events: VecDeque<LinkEvent>,
    ack: AckDue,
    /// The next acknowledgement lists what is missing.
    ack_gaps: bool,
    /// The next acknowledgement goes on two paths.
    ack_twice: bool,
    shards_unacked: u32,
    /// When a message or a piece of a block last arrived.
    received_at: Option<Now>,
    /// Bytes taken since the last acknowledgement.
    taken_unacked: u64,
    ack_number: u64,
    peer_ack: Option<u64>,

    count: Counters,
}

impl Link {
    /// An end with no paths yet. The peer's end must be as new: the two number what they send from zero.
    pub fn new(config: LinkConfig) -> Self {
        stripe::warm_up();
        Self {
            config,
            now: Now::ZERO,
            paths: BTreeMap::new(),
            carrying: false,
            was_down: false,
            next_stream: 0,
            outbox: Outbox::default(),
            blocks: Blocks::default(),
            table: Table::default(),
            outputs: VecDeque::new(),
            reinject_at: Now::ZERO,
            message_inbox: MessageInbox::default(),
            inbox: Inbox::default(),
            events: VecDeque::new(),
            ack: AckDue::Never,
            ack_gaps: false,
            ack_twice: false,
            shards_unacked: 0,
            received_at: None,
            taken_unacked: 0,
            ack_number: 0,
            peer_ack: None,
            count: Counters::default(),
        }
    }

    // Facts.

    /// A path's connection is established, for the first time or again. Beyond [`limits::PATHS`] paths it is ignored.
    pub fn path_up(&mut self, now: Now, path: PathId, facts: PathFacts) {
        self.advance(now);
        if !self.paths.contains_key(&path) && self.paths.len() >= limits::PATHS {
            return;
        }
        if self.paths.get(&path).is_some_and(|known| !known.is_down()) {
            self.drop_path(path);
        }
        let now = self.now;
        let known = self
            .paths
            .entry(path)
            .or_insert_with(|| Path::new(now, path, &self.config));
        known.came_up(now, facts);
        self.events.push_back(LinkEvent::PathUp(path));
        // What the peer knows may have died with another path.
        self.want_ack(AckDue::Immediately, true);
        self.pump();
    }

    /// A path's connection is gone; it may come up again later.
    pub fn path_down(&mut self, now: Now, path: PathId) {
        self.advance(now);
        if self.paths.get(&path).is_some_and(|known| !known.is_down()) {
            self.drop_path(path);
            self.pump();
        }
    }

    /// What the connection's statistics say now: for each path ten times a second, and while blocks flow more often.
    pub fn handle_sample(&mut self, now: Now, path: PathId, sample: PathSample) {
        self.advance(now);
        let now = self.now;
        if let Some(path) = self.paths.get_mut(&path).filter(|path| !path.is_down()) {
            path.on_sample(now, sample);
        }
        self.pump();
    }

    /// A datagram arrived. An error is the peer's fault: close this path's connection with its text.
    pub fn handle_datagram(&mut self, now: Now, path: PathId, bytes: Bytes) -> Result<(), PeerMisbehaved> {
        self.advance(now);
        if self.paths.get(&path).is_none_or(Path::is_down) {
            return Ok(());
        }
        let (peer, number, frame) = Frame::from_datagram(&bytes)?;
        if let Some(known) = self.paths.get_mut(&path) {
            known.arrivals.note(peer, number);
        }
        let result = self.frame(path, frame);
        self.pump();
        result
    }

    /// A stream arrived, whole. An error is the peer's fault: close this path's connection with its text.
    pub fn handle_stream(&mut self, now: Now, path: PathId, bytes: Bytes) -> Result<(), PeerMisbehaved> {
        self.advance(now);
        if self.paths.get(&path).is_none_or(Path::is_down) {
            return Ok(());
        }
        let frame = Frame::from_stream(&bytes)?;
        let result = self.frame(path, frame);
        self.pump();
        result
    }

    /// The driver has handed all of `stream` to the connection.
    pub fn handle_sent(&mut self, now: Now, path: PathId, stream: StreamId) {
        self.advance(now);
        if let Some(bytes) = self.blocks.handed(path, stream)
            && let Some(path) = self.paths.get_mut(&path)
        {
            path.queued_bytes = path.queued_bytes.saturating_sub(bytes);
        }
        self.pump();
    }

    /// Time has passed. Earlier than [`Link::poll_timeout`] asked is harmless.
    pub fn handle_time(&mut self, now: Now) {
        self.advance(now);
        self.pump();
    }

    // Commands.

    /// Send a control message: exactly once, in order, whichever path dies.
    pub fn send_message(&mut self, now: Now, bytes: impl Into<Bytes>) -> Result<(), Refused> {
        self.advance(now);
        self.outbox.push(bytes.into())?;
        self.count.messages_sent += 1;
        self.pump();
        Ok(())
    }

    /// Send a block: exactly once, in any order.
    pub fn send_block(&mut self, now: Now, class: Class, bytes: impl Into<Bytes>) -> Result<BlockId, Refused> {
        self.advance(now);
        let id = self.blocks.push(class, bytes.into(), self.config.held_bytes)?;
        self.count.blocks_sent += 1;
        self.pump();
        Ok(id)
    }

    // What to do, what to know, when to come again.

    /// When [`Link::handle_time`] wants to be called; [`Now::NEVER`] if it does not.
    pub fn poll_timeout(&self) -> Now {
        let ack = match self.ack {
            AckDue::At(at) if self.ack_path().is_some() => at,
            _ => Now::NEVER,
        };
        let busy = self.busy();
        let of_path = |path: &Path| match path.state {
            PathState::Down => Now::NEVER,
            PathState::Up => path
                .probe_at(busy || path.outstanding() > 0)
                .min(path.silent_at())
                .min(path.stalled_at()),
            PathState::Suspect(_) => path.probe_at(!self.carrying),
        };
        let paths = self.paths.values().map(of_path).min().unwrap_or(Now::NEVER);
        let message = if self.carrying { self.outbox.due() } else { Now::NEVER };
        let reinject = if self.may_reinject() {
            self.reinject_at
        } else {
            Now::NEVER
        };
        // A deadline that could not be kept for lack of a path must not make the driver spin.
        let soonest = ack.min(paths).min(message).min(reinject);
        if soonest == Now::NEVER {
            soonest
        } else {
            soonest.max(self.now + Duration::from_micros(50))
        }
    }

    /// The next thing to do, until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        if let Some((path, stamp)) = self
            .paths
            .values_mut()
            .find_map(|path| Some((path.id, path.echo.take()?)))
        {
            return Some(self.build_ack(path, Some(stamp)));
        }
        if self.ack == AckDue::Immediately
            && let Some(path) = self.ack_path()
        {
            let second = core::mem::take(&mut self.ack_twice)
                .then(|| self.second_path(path))
                .flatten();
            if let Some(second) = second {
                let copy = self.build_ack(second, None);
                self.outputs.push_front(copy);
            }
            return Some(self.build_ack(path, None));
        }
        self.outputs.pop_front()
    }

    /// The next thing to know, until `None`. Taking a message or a block is what makes room for more of the peer's.
    pub fn poll_event(&mut self) -> Option<LinkEvent> {
        let event = self.events.pop_front()?;
        let taken = match &event {
            LinkEvent::Message(bytes) => {
                self.message_inbox.take(bytes);
                bytes.len() as u64 * (limits::BLOCK_WINDOW_BYTES / limits::MESSAGE_WINDOW_BYTES) + 1
            }
            LinkEvent::Block { bytes, .. } => {
                self.inbox.take(bytes.len());
                bytes.len() as u64
            }
            _ => 0,
        };
        self.taken_unacked += taken;
        if self.taken_unacked >= limits::BLOCK_WINDOW_BYTES / 4 {
            self.want_ack(AckDue::Immediately, false);
        } else if taken > 0 {
            self.want_ack(AckDue::At(self.now + ACK_DELAY), false);
        }
        Some(event)
    }

    /// Bytes of bulk the paths would take now without queueing on dead or full ones. While this is zero, look again after
    /// the next fact: a delivered block, an answer, a returning path each may make room.
    pub fn room(&self) -> usize {
        let of_path = |path: &Path| path.window().saturating_sub(path.outstanding());
        let paths: u64 = self
            .paths
            .values()
            .filter(|path| path.takes_bulk(self.now))
            .map(of_path)
            .sum();
        let paths = paths.min(self.blocks.credit(Class::Bulk));
        let paths = usize::try_from(paths)
            .unwrap_or(usize::MAX)
            .saturating_sub(self.blocks.waiting_bytes());
        paths.min(self.config.held_bytes - self.blocks.held_bytes())
    }

    /// Where everything stands.
    pub fn stats(&self) -> LinkStats {
        let count = &self.count;
        let all: u64 = self
            .paths
            .values()
            .map(|path| path.sent.bulk_bytes + path.sent.urgent_bytes)
            .sum();
        LinkStats {
            paths: self.paths.values().map(|path| self.path_stats(path, all)).collect(),
            messages_sent: count.messages_sent,
            messages_received: count.messages_received,
            blocks_sent: count.blocks_sent,
            blocks_delivered: count.blocks_delivered,
            blocks_received: count.blocks_received,
            held_bytes: self.blocks.held_bytes() as u64,
            waiting_bytes: self.blocks.waiting_bytes() as u64,
            parity_bytes: count.parity_bytes,
            resent_bytes: count.resent_bytes,
            reinjected_bytes: count.reinjected_bytes,
            messages_resent: count.messages_resent,
            stripes_repaired: self.inbox.repaired(),
            duplicates: count.duplicates,
            urgent_as_shards: count.as_shards,
            urgent_as_streams: count.as_streams,
            urgent_as_copies: count.as_copies,
            receiving_bytes: (self.inbox.held() + self.message_inbox.held()) as u64,
        }
    }

    fn path_stats(&self, path: &Path, all: u64) -> PathStats {
        let known = &path.estimator;
        let share = |value: f64| Ratio::new(value.clamp(0.0, 1.0)).unwrap_or_default();
        let sent = path.sent.bulk_bytes + path.sent.urgent_bytes;
        PathStats {
            path: path.id,
            state: path.state,
            rtt: known.rtt(),
            rtt_min: known.rtt_min(),
            rtt_var: known.rtt_var(),
            rate: known.rate(),
            loss: share(known.loss()),
            loss_high: share(known.loss_high()),
            burst: known.burst(),
            alive: share(known.alive(self.now, Duration::from_secs(1))),
            outstanding_bytes: path.outstanding(),
            window_bytes: path.window(),
            queued_bytes: path.queued_bytes,
            message_bytes: path.sent.message_bytes,
            bulk_bytes: path.sent.bulk_bytes,
            urgent_bytes: path.sent.urgent_bytes,
            shards: path.sent.shards,
            share: if all == 0 { Ratio::NONE } else { Ratio::of(sent, all) },
            suspected: path.suspected,
            died: u64::from(known.deaths()),
        }
    }

    // Facts, booked.

    /// Time moves to `now`. If this is later than we asked to be called, our loop was late, and silence in the meantime is
    /// not the paths' fault.
    fn advance(&mut self, now: Now) {
        if now <= self.now {
            return;
        }
        let late = now.since(self.poll_timeout());
        self.now = now;
        if late > LATE {
            self.paths.values_mut().for_each(|path| path.excuse(late));
        }
    }

    fn frame(&mut self, path: PathId, frame: Frame) -> Result<(), PeerMisbehaved> {
        if !matches!(frame, Frame::Probe { .. } | Frame::Ack(_)) {
            self.received_at = Some(self.now);
        }
        match frame {
            Frame::Probe { stamp } => {
                if let Some(path) = self.paths.get_mut(&path) {
                    path.echo = Some(stamp);
                }
                Ok(())
            }
            Frame::Ack(ack) => self.on_ack(path, &ack),
            Frame::Message { number, bytes } => {
                self.want_ack(AckDue::Immediately, false);
                match self.message_inbox.insert(number, bytes)? {
                    Some(ready) => {
                        self.count.messages_received += ready.len() as u64;
                        self.events.extend(ready.into_iter().map(LinkEvent::Message));
                    }
                    None => self.count.duplicates += 1,
                }
                Ok(())
            }
            Frame::Block { id, class, bytes } => {
                let arrival = self.inbox.whole(id, bytes)?;
                self.on_arrival(id, class, arrival);
                Ok(())
            }
            Frame::Shard {
                id,
                layout,
                stripe,
                index,
                bytes,
            } => {
                let arrival = self.inbox.shard(id, layout, (stripe, index), bytes)?;
                self.on_arrival(id, Class::Urgent, arrival);
                Ok(())
            }
            Frame::Patch {
                id,
                layout,
                runs,
                bytes,
            } => {
                let arrival = self.inbox.patch(id, layout, &runs, &bytes)?;
                self.on_arrival(id, Class::Urgent, arrival);
                Ok(())
            }
        }
    }

    fn on_arrival(&mut self, id: BlockId, class: Class, arrival: Arrival) {
        match arrival {
            Arrival::Complete(bytes) => {
                self.count.blocks_received += 1;
                self.events.push_back(LinkEvent::Block { id, bytes });
                self.ack_twice |= class == Class::Urgent;
                self.want_ack(AckDue::Immediately, false);
            }
            Arrival::Duplicate | Arrival::Piece => {
                self.count.duplicates += u64::from(arrival == Arrival::Duplicate);
                self.shards_unacked += 1;
                if self.shards_unacked >= SHARDS_PER_ACK {
                    self.want_ack(AckDue::Immediately, false);
                } else {
                    // Each piece begins the quiet anew: the gaps are worth saying once pieces stop coming.
                    self.ack = if self.ack == AckDue::Immediately {
                        self.ack
                    } else {
                        AckDue::At(self.now + ACK_DELAY)
                    };
                }
            }
        }
    }

    fn on_ack(&mut self, path: PathId, ack: &Ack) -> Result<(), PeerMisbehaved> {
        let now = self.now;
        if let Some((stamp, path)) = ack.echo.zip(self.paths.get_mut(&path)) {
            path.on_echo(now, stamp);
        }
        for done in self
            .outbox
            .acknowledge(ack.message_next, ack.message_seen, ack.message_taken)?
        {
            // Where it lay on more than one path, nobody knows which one brought it.
            if done.laid.len() > 1 {
                self.cancel(&done.laid);
            }
        }
        for (id, held) in self.blocks.acknowledge(ack.block_next, &ack.ranges, ack.block_taken)? {
            self.delivered(id, held);
        }
        // Reports and gaps are of their moment: an older one that comes late says nothing.
        if self.peer_ack.is_some_and(|newest| ack.number <= newest) {
            return Ok(());
        }
        self.peer_ack = Some(ack.number);
        for report in &ack.reports {
            let Some(path) = self.paths.get_mut(&report.path).filter(|path| !path.is_down()) else {
                continue;
            };
            let Some(settled) = path.on_report(now, *report) else {
                let (number, sent) = (report.highest, report.highest);
                return Err(PeerMisbehaved::AcknowledgedUnsent {
                    what: "datagram",
                    number,
                    sent,
                });
            };
            settled.into_iter().for_each(|id| self.settle(id));
        }
        if let Some(gaps) = &ack.gaps {
            self.on_gaps(gaps);
        }
        Ok(())
    }

    /// The fate of one datagram of a block is known.
    fn settle(&mut self, id: BlockId) {
        if let Some(held) = self.blocks.get_mut(id) {
            held.urgent.unsettled = held.urgent.unsettled.saturating_sub(1);
        }
    }

    /// The peer holds a block: take it off every path.
    fn delivered(&mut self, id: BlockId, held: Held) {
        let only = held.lays.len() == 1 && held.urgent.layout.is_none();
        for lay in &held.lays {
            if let Some(path) = self.paths.get_mut(&lay.laid.path) {
                path.lift(self.now, lay.bytes, lay.handed, only.then_some(lay.mark));
            }
        }
        if !only {
            let laid: Vec<Laid> = held.lays.iter().map(|lay| lay.laid).collect();
            self.cancel(&laid);
        }
        if held.urgent.unsettled > 0 {
            self.paths.values_mut().for_each(|path| drop(path.unqueue(Some(id))));
        }
        self.count.blocks_delivered += 1;
        self.events.push_back(LinkEvent::BlockDelivered(id));
    }

    /// What these streams carry is not wanted any more. Whichever of them has arrived ignores it.
    fn cancel(&mut self, laid: &[Laid]) {
        let up = laid
            .iter()
            .filter(|laid| self.paths.get(&laid.path).is_some_and(|path| !path.is_down()));
        let resets = up.map(|laid| Output::ResetStream {
            path: laid.path,
            stream: laid.stream,
        });
        self.outputs.extend(resets.collect::<Vec<_>>());
    }

    /// The connection is gone: nothing that was on it will ever be acknowledged by it.
    fn drop_path(&mut self, id: PathId) {
        let now = self.now;
        let Some(path) = self.paths.get_mut(&id) else { return };
        path.went_down(now);
        self.outputs.retain(|output| match output {
            Output::Datagram { path, .. } | Output::Stream { path, .. } | Output::ResetStream { path, .. } => {
                *path != id
            }
        });
        self.outbox.forget(id);
        self.unload(id);
        for block in self.blocks.on_path(id) {
            self.blocks.lift(block, |lay| lay.laid.path == id);
        }
        self.events.push_back(LinkEvent::PathDown(id));
    }

    /// A path stops carrying traffic: whatever lies on it and nowhere else that is trusted has to be laid again.
    fn unload(&mut self, id: PathId) {
        for block in self.blocks.on_path(id) {
            if !self.lies_on_trusted(block) {
                self.blocks.wait(block);
            }
        }
        let Some(path) = self.paths.get_mut(&id) else { return };
        let grounded = path.ground();
        let queued = path.unqueue(None);
        grounded.into_iter().for_each(|block| self.settle(block));
        for shard in queued {
            match self.quickest(
                |path| path.takes_shards() && path.max_datagram >= SHARD_HEAD + shard.bytes as usize,
                shard.bytes,
            ) {
                Some(other) => other.enqueue(shard),
                None => self.settle(shard.block),
            }
        }
        // What is missing of urgent blocks now is the peer's to say.
        if !self.blocks.urgent_under_way.is_empty() {
            self.probe_all();
        }
    }

    fn lies_on_trusted(&self, block: BlockId) -> bool {
        let trusted = |lay: &Lay| self.paths.get(&lay.laid.path).is_some_and(Path::is_up);
        self.blocks.get(block).is_some_and(|held| held.lays.iter().any(trusted))
    }

    /// The fitting path on which so many urgent bytes arrive first.
    fn quickest(&mut self, fits: impl Fn(&Path) -> bool, bytes: u32) -> Option<&mut Path> {
        let fitting: Vec<PathId> = self
            .paths
            .values()
            .filter(|path| fits(path))
            .map(|path| path.id)
            .collect();
        let lanes: Vec<Lane> = fitting.iter().map(|id| self.paths[id].urgent_lane()).collect();
        let best = fitting.get(scheduler::earliest(&lanes, f64::from(bytes))?)?;
        self.paths.get_mut(best)
    }

    // Decisions.

    /// Look at the books and lay what can be laid.
    fn pump(&mut self) {
        self.watch_paths();
        if self.carrying {
            self.lay_messages();
            self.lay_urgent();
            self.release_shards();
            self.lay_bulk();
            self.reinject();
        }
        if let AckDue::At(at) = self.ack
            && at <= self.now
        {
            self.want_ack(AckDue::Immediately, true);
        }
    }

    /// Messages and urgent blocks make every path's answers matter; and so does receiving, since acknowledgements must
    /// not vanish on a path that died meanwhile.
    fn busy(&self) -> bool {
        let receiving = self.received_at.is_some_and(|at| self.now.since(at) < RECEIVING);
        receiving || !self.outbox.is_empty() || !self.blocks.urgent_under_way.is_empty()
    }

    /// Suspect, trust, probe.
    fn watch_paths(&mut self) {
        let now = self.now;
        let ids: Vec<PathId> = self.paths.keys().copied().collect();
        for id in &ids {
            let others = self.paths.values().any(|other| other.is_up() && other.id != *id);
            let Some(path) = self.paths.get_mut(id) else { continue };
            let why = match path.state {
                PathState::Up if path.silent_at() <= now => Some(Suspicion::Silent),
                // With nowhere else to go, a path that at least answers is the best there is.
                PathState::Up if path.stalled_at() <= now && others => Some(Suspicion::Stalled),
                _ => None,
            };
            if let Some(why) = why {
                path.suspect(now, why);
                self.events.push_back(LinkEvent::PathSuspect(*id, why));
                self.unload(*id);
            } else if path.trusted(now) {
                path.trust(now);
                self.events.push_back(LinkEvent::PathUp(*id));
            }
        }
        let carrying = self.paths.values().any(Path::is_up);
        if carrying != self.carrying {
            self.carrying = carrying;
            if !carrying {
                self.was_down = true;
                self.events.push_back(LinkEvent::AllPathsDown);
            } else if core::mem::take(&mut self.was_down) {
                self.events.push_back(LinkEvent::Restored);
            }
        }
        let busy = self.busy();
        for id in ids {
            let Some(path) = self.paths.get(&id).filter(|path| !path.is_down()) else {
                continue;
            };
            let busy = if path.is_up() {
                busy || path.outstanding() > 0
            } else {
                !self.carrying
            };
            if path.probe_at(busy) <= now {
                self.probe(id);
            }
        }
    }

    fn probe_all(&mut self) {
        let up: Vec<PathId> = self
            .paths
            .values()
            .filter(|path| path.is_up())
            .map(|path| path.id)
            .collect();
        up.into_iter().for_each(|id| self.probe(id));
    }

    fn probe(&mut self, id: PathId) {
        let now = self.now;
        if let Some(path) = self.paths.get_mut(&id) {
            let stamp = path.probe(now);
            self.send_small(id, Frame::Probe { stamp }, 8);
        }
    }

    /// Send a frame that nobody acknowledges: as a datagram where that fits, else as a stream.
    fn send_small(&mut self, id: PathId, frame: Frame, bytes: usize) {
        let output = self.small(id, frame, bytes);
        self.outputs.push_back(output);
    }

    fn small(&mut self, id: PathId, frame: Frame, bytes: usize) -> Output {
        let path = self
            .paths
            .get_mut(&id)
            .expect("callers name a path they have just looked at");
        if path.max_datagram >= bytes + crate::frames::DATAGRAM_HEAD {
            let number = path.number();
            return Output::Datagram {
                path: id,
                bytes: frame.into_datagram(id, number),
            };
        }
        let (head, body) = frame.into_stream();
        Output::Stream {
            path: id,
            stream: self.stream(),
            priority: Priority::Control,
            head,
            body,
        }
    }

    fn stream(&mut self) -> StreamId {
        let stream = StreamId(self.next_stream);
        self.next_stream += 1;
        stream
    }

    // Messages.

    /// Trusted paths, best for messages first.
    fn message_paths(&self) -> Vec<PathId> {
        let mut up: Vec<(Duration, PathId)> = self
            .paths
            .values()
            .filter(|path| path.is_up())
            .map(|path| (path.cost(self.now), path.id))
            .collect();
        up.sort_unstable();
        up.into_iter().map(|(_, id)| id).collect()
    }

    fn lay_messages(&mut self) {
        if self.outbox.is_empty() {
            return;
        }
        let paths = self.message_paths();
        while let Some(number) = self.outbox.start() {
            self.lay_message(number, &paths);
        }
        // Nothing is trusted that lies on no trusted path; and the oldest may be overdue.
        let trusted = |laid: &Laid| self.paths.get(&laid.path).is_some_and(Path::is_up);
        let overdue = self.outbox.due() <= self.now;
        let again = self
            .outbox
            .select(|message| !message.laid.iter().any(trusted) || (overdue && message.due <= self.now));
        for number in again {
            let laid = self.lay_message(number, &paths);
            self.count.messages_resent += u64::from(laid);
        }
    }

    /// Lay a message on the best path where it is not yet; on a lossy one with a copy on the next. A path that is up and
    /// has it already needs no second one: its connection repairs losses itself. Says whether it was laid anywhere.
    fn lay_message(&mut self, number: u64, paths: &[PathId]) -> bool {
        let now = self.now;
        let Some(message) = self.outbox.get_mut(number) else {
            return false;
        };
        let first = message.tries == 0;
        let fresh = paths
            .iter()
            .find(|id| !message.laid.iter().any(|laid| laid.path == **id))
            .copied();
        let best = self
            .paths
            .get(&fresh.unwrap_or(paths[0]))
            .expect("message_paths names known paths");
        let needed = best
            .forecast()
            .rate
            .time_for(umbra_units::Bytes::of_len(message.bytes.len()))
            .unwrap_or_default();
        message.due = now + (best.rto() + needed) * (1 << message.tries.min(6));
        message.tries += 1;
        let (Some(id), bytes) = (fresh, message.bytes.clone()) else {
            return false;
        };
        let lossy = best.estimator.loss_seen() > COPY_LOSS;
        let laid = Laid {
            path: id,
            stream: self.stream(),
        };
        if let Some(message) = self.outbox.get_mut(number) {
            message.laid.push(laid);
        }
        self.book_message(id, bytes.len());
        let (head, body) = Frame::Message {
            number,
            bytes: bytes.clone(),
        }
        .into_stream();
        let priority = Priority::Control;
        self.outputs.push_back(Output::Stream {
            path: id,
            stream: laid.stream,
            priority,
            head,
            body,
        });
        let second = paths.iter().find(|other| **other != id && first && lossy).copied();
        let Some(second) = second.and_then(|second| self.paths.get_mut(&second)) else {
            return true;
        };
        if second.max_datagram >= MESSAGE_HEAD + bytes.len() {
            let (path, datagram) = (second.id, second.number());
            let output = Frame::Message {
                number,
                bytes: bytes.clone(),
            }
            .into_datagram(path, datagram);
            self.outputs.push_back(Output::Datagram { path, bytes: output });
            self.book_message(path, bytes.len());
        }
        true
    }

    fn book_message(&mut self, id: PathId, bytes: usize) {
        if let Some(path) = self.paths.get_mut(&id) {
            path.sent.message_bytes += bytes as u64;
        }
    }

    // Bulk.

    fn lay_bulk(&mut self) {
        while let Some(id) = self.blocks.waiting_bulk.first().copied() {
            // It may lie on a path that is trusted again.
            if self.lies_on_trusted(id) {
                self.blocks.unwait(id);
                continue;
            }
            if !self.blocks.may_start(id) {
                return;
            }
            let open: Vec<&Path> = self.paths.values().filter(|path| path.takes_bulk(self.now)).collect();
            let lanes: Vec<Lane> = open.iter().map(|path| path.bulk_lane()).collect();
            let Some(held) = self.blocks.get(id) else { return };
            let Some(best) = scheduler::earliest(&lanes, f64_of(held.bytes.len())) else {
                return;
            };
            let (path, again, len) = (open[best].id, held.started, held.bytes.len() as u64);
            self.blocks.unwait(id);
            *(if again {
                &mut self.count.resent_bytes
            } else {
                &mut self.count.bulk_bytes
            }) += len;
            self.lay_whole(id, path);
        }
    }

    /// Lay a whole block on a path, as one stream.
    fn lay_whole(&mut self, id: BlockId, path: PathId) {
        self.blocks.start(id);
        let Some(held) = self.blocks.get(id) else { return };
        let (class, bytes) = (held.class, held.bytes.clone());
        let len = bytes.len() as u64;
        self.lay_stream(id, path, len, None, Frame::Block { id, class, bytes });
    }

    /// Lay a stream with `bytes` of a block, and book it.
    fn lay_stream(&mut self, id: BlockId, path: PathId, bytes: u64, patch: Option<u32>, frame: Frame) {
        let now = self.now;
        let laid = Laid {
            path,
            stream: self.stream(),
        };
        let class = self.blocks.get(id).map_or(Class::Bulk, |held| held.class);
        let Some(path) = self.paths.get_mut(&path) else { return };
        let lane = if class == Class::Urgent {
            path.urgent_lane()
        } else {
            path.bulk_lane()
        };
        #[expect(clippy::cast_precision_loss, reason = "a prediction needs no more than 53 bits")]
        let expected = now + Duration::from_secs_f64(lane.arrival(bytes as f64).min(1e6));
        let mark = path.lay(now, bytes);
        let priority = match class {
            Class::Bulk => {
                path.sent.bulk_bytes += bytes;
                Priority::Bulk
            }
            Class::Urgent => {
                path.sent.urgent_bytes += bytes;
                Priority::Urgent
            }
        };
        let (head, body) = frame.into_stream();
        self.outputs.push_back(Output::Stream {
            path: laid.path,
            stream: laid.stream,
            priority,
            head,
            body,
        });
        self.blocks.lay(
            id,
            Lay {
                laid,
                bytes,
                mark,
                expected,
                handed: false,
                patch,
            },
        );
    }

    /// Something could be gained by laying a lagging block twice.
    fn may_reinject(&self) -> bool {
        self.carrying
            && self.blocks.waiting_bulk.is_empty()
            && self.blocks.held_bytes() > 0
            && self.paths.values().filter(|path| path.is_up()).count() > 1
            && self.reinject_budget() > 0
    }

    /// Bytes that may still be sent twice.
    fn reinject_budget(&self) -> u64 {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a budget"
        )]
        let share = (self.count.bulk_bytes as f64 * self.config.reinject.get()) as u64;
        share.saturating_sub(self.count.reinjected_bytes)
    }

    /// When no bulk waits and a path would finish much later than another one would if it began now, give the other one
    /// a copy of the last block. Within a budget, each block once.
    fn reinject(&mut self) {
        if self.now < self.reinject_at || !self.may_reinject() {
            return;
        }
        let now = self.now;
        self.reinject_at = now + REINJECT_PAUSE;
        let budget = self.reinject_budget();
        let lagging = self
            .blocks
            .iter()
            .filter(|(_, held)| held.class == Class::Bulk && !held.reinjected);
        let lagging = lagging.filter(|(_, held)| held.lays.len() == 1 && held.bytes.len() as u64 <= budget);
        let Some((id, held)) = lagging.max_by_key(|(_, held)| held.lays[0].expected) else {
            return;
        };
        let lay = &held.lays[0];
        let Some(slow) = self.paths.get(&lay.laid.path) else {
            return;
        };
        // An overdue block has been unlucky once; give it the time of a repair.
        let left = lay
            .expected
            .since(now)
            .max(if lay.expected < now { slow.rto() } else { Duration::ZERO });
        let open: Vec<&Path> = self
            .paths
            .values()
            .filter(|path| path.takes_bulk(self.now) && path.id != lay.laid.path)
            .collect();
        let lanes: Vec<Lane> = open.iter().map(|path| path.bulk_lane()).collect();
        let len = held.bytes.len();
        let Some(best) = scheduler::earliest(&lanes, f64_of(len)) else {
            return;
        };
        let (path, arrival) = (open[best].id, lanes[best].arrival(f64_of(len)));
        if left.as_secs_f64() > 2.0 * arrival + 0.001 {
            self.count.reinjected_bytes += len as u64;
            if let Some(held) = self.blocks.get_mut(id) {
                held.reinjected = true;
            }
            self.lay_whole(id, path);
            // One at a time: the books have changed, and the next look sees them.
            self.reinject_at = now;
        }
    }

    // Urgent.

    fn lay_urgent(&mut self) {
        while let Some(id) = self.blocks.waiting_urgent.first().copied() {
            if !self.blocks.may_start(id) {
                return;
            }
            self.blocks.unwait(id);
            self.blocks.start(id);
            let Some(held) = self.blocks.get(id) else { continue };
            let bytes = held.bytes.clone();
            if !self.lay_copies(id, &bytes) {
                self.lay_spread(id, &bytes);
            }
        }
    }

    /// A block that fits into one datagram: two of them, on the two best paths. Says whether it does.
    fn lay_copies(&mut self, id: BlockId, bytes: &Bytes) -> bool {
        let mut paths = self.message_paths();
        paths.retain(|path| self.paths[path].max_datagram >= BLOCK_HEAD + bytes.len());
        let Some(first) = paths.first().copied() else {
            return false;
        };
        let second = paths.get(1).copied().unwrap_or(first);
        for path in [first, second] {
            let now = self.now;
            let Some(path) = self.paths.get_mut(&path) else {
                continue;
            };
            let number = path.number();
            path.fly(now, number, bytes.len() as u64, id);
            path.sent.urgent_bytes += bytes.len() as u64;
            let frame = Frame::Block {
                id,
                class: Class::Urgent,
                bytes: bytes.clone(),
            };
            let output = Output::Datagram {
                path: path.id,
                bytes: frame.into_datagram(path.id, number),
            };
            self.outputs.push_back(output);
        }
        if let Some(held) = self.blocks.get_mut(id) {
            held.urgent.unsettled = 2;
        }
        self.count.as_copies += 1;
        true
    }

    /// A larger block: shards or streams, whichever is predicted to be there first, over all paths so that they end
    /// together.
    fn lay_spread(&mut self, id: BlockId, bytes: &Bytes) {
        let plan = self.plan_shards(bytes.len());
        let streams = self.predict_streams(bytes.len());
        match plan {
            Some(plan) if plan.seconds < streams || self.config.survive_paths > 0 => self.lay_shards(id, plan),
            plan => {
                let layout = plan.map(|plan| plan.layout);
                let layout = layout.or_else(|| Layout::new(bytes.len(), STREAM_SHARD, limits::STRIPE_DATA, 0));
                let layout = layout.expect("a block within BLOCK_BYTES has a layout");
                if let Some(held) = self.blocks.get_mut(id) {
                    held.urgent.layout = Some(layout);
                }
                self.count.as_streams += 1;
                self.lay_patches(id, layout, &[(0, count_u32(layout.data_shards()))]);
            }
        }
    }

    fn plan_shards(&mut self, len: usize) -> Option<Plan> {
        let paths: Vec<PathId> = self
            .paths
            .values()
            .filter(|path| path.takes_shards())
            .map(|path| path.id)
            .collect();
        let smallest = paths.iter().map(|id| self.paths[id].max_datagram).min()?;
        let shard = (smallest - SHARD_HEAD).min(limits::SHARD_BYTES_MAX);
        let data = len.div_ceil(shard);
        let stripes = data.div_ceil(limits::STRIPE_DATA);
        let k = data.div_ceil(stripes);
        let lanes: Vec<Lane> = paths.iter().map(|id| self.paths[id].urgent_lane()).collect();
        let filling = scheduler::water_fill(&lanes, f64_of(len))?;
        let lossy: Vec<Lossy> = paths
            .iter()
            .zip(&filling.bytes)
            .map(|(id, bytes)| {
                let forecast = self.paths[id].forecast();
                Lossy {
                    share: bytes / f64_of(len),
                    loss: forecast.loss,
                    burst: forecast.burst,
                }
            })
            .collect();
        let most = limits::STRIPE_SHARDS - limits::STRIPE_DATA;
        let mut m = self.table.parity(k, most, stripes, &lossy, self.config.residual.get());
        // algorithms.md §3.3, path-cut protection: with shares evenly dealt, the dead paths' part is at most m.
        let dying = usize::from(self.config.survive_paths).min(paths.len() - 1);
        if dying > 0 {
            m = m.max((k * dying).div_ceil(paths.len() - dying)).min(most);
        }
        let layout = Layout::new(len, shard, k, m)?;
        let volume = f64_of((data + stripes * m) * shard);
        let mut filling = scheduler::water_fill(&lanes, volume)?;
        if dying > 0 {
            // Paths beyond the water line still have to take what the others may not.
            filling
                .bytes
                .iter_mut()
                .for_each(|bytes| *bytes = bytes.max(volume * 1e-6));
        }
        let seconds = filling.time + f64_of(data + stripes * m) * SHARD_EXTRA;
        Some(Plan {
            layout,
            paths,
            weights: filling.bytes,
            per_path: m.checked_div(dying).unwrap_or(usize::MAX),
            seconds,
        })
    }

    /// Seconds until a block laid as streams has arrived, repairs included.
    fn predict_streams(&self, len: usize) -> f64 {
        let up: Vec<&Path> = self.paths.values().filter(|path| path.is_up()).collect();
        let lanes: Vec<Lane> = up.iter().map(|path| path.urgent_lane()).collect();
        let Some(filling) = scheduler::water_fill(&lanes, f64_of(len)) else {
            return f64::INFINITY;
        };
        let mut repair: f64 = 0.0;
        for (path, bytes) in up.iter().zip(&filling.bytes).filter(|(_, bytes)| **bytes > 0.0) {
            let packets = bytes / f64_of(path.max_datagram.max(1_200));
            let loss = path.forecast().loss;
            // Expected rounds: the chance that some packet is lost i times in a row, summed over i.
            let rounds: f64 = (1..=8).map(|i| 1.0 - (1.0 - loss.powi(i)).powf(packets)).sum();
            repair = repair.max(rounds * (path.forecast().rtt.as_secs_f64() * 1.125 + REPAIR_EXTRA));
        }
        filling.time + REPAIR_WEIGHT * repair
    }

    fn lay_shards(&mut self, id: BlockId, plan: Plan) {
        let layout = plan.layout;
        let per_stripe = layout.data_of(0) + layout.m();
        let dealt = scheduler::deal(
            &plan.weights,
            layout.data_shards() + layout.stripes() * layout.m(),
            per_stripe,
            plan.per_path,
        );
        // Dealt stripe by stripe, so that each stripe is spread evenly; sent across stripes, so that a burst of losses
        // hits many stripes once rather than one stripe often; data first, so that parity is computed while it flies.
        let mut order: Vec<(u8, u16, usize)> = Vec::with_capacity(dealt.len());
        let mut lanes = dealt.into_iter();
        for stripe in 0..layout.stripes() {
            for index in 0..layout.data_of(stripe) + layout.m() {
                let lane = lanes.next().expect("as many were dealt");
                order.push((
                    u8::try_from(index).expect("k + m is at most 256"),
                    u16::try_from(stripe).expect("Layout"),
                    lane,
                ));
            }
        }
        order.sort_unstable();
        for (index, stripe, lane) in &order {
            let bytes = layout.shard_bytes(*stripe, *index).expect("the shard exists");
            let shard = Queued {
                block: id,
                stripe: *stripe,
                index: *index,
                bytes: count_u32(bytes),
            };
            if let Some(path) = self.paths.get_mut(&plan.paths[*lane]) {
                path.enqueue(shard);
            }
        }
        if let Some(held) = self.blocks.get_mut(id) {
            held.urgent.layout = Some(layout);
            held.urgent.unsettled = order.len();
            held.urgent.parity = vec![None; layout.stripes()];
        }
        self.count.as_shards += 1;
    }

    /// Send queued shards as far as the paths' windows allow.
    fn release_shards(&mut self) {
        let ids: Vec<PathId> = self
            .paths
            .values()
            .filter(|path| path.is_up() && !path.queue.is_empty())
            .map(|p| p.id)
            .collect();
        for id in ids {
            while let Some(shard) = self.paths.get_mut(&id).and_then(Path::release) {
                self.send_shard(id, shard);
            }
        }
    }

    fn send_shard(&mut self, path: PathId, shard: Queued) {
        let now = self.now;
        let (Some(held), Some(path)) = (self.blocks.get_mut(shard.block), self.paths.get_mut(&path)) else {
            return;
        };
        let Some(layout) = held.urgent.layout else { return };
        if path.max_datagram < SHARD_HEAD + shard.bytes as usize {
            // The path's datagrams have shrunk since: as good as lost, and the peer will say so.
            held.urgent.unsettled = held.urgent.unsettled.saturating_sub(1);
            return;
        }
        let (stripe, index) = (usize::from(shard.stripe), usize::from(shard.index));
        let k = layout.data_of(stripe);
        let bytes = if index < k {
            held.bytes.slice(layout.range_of(layout.first_of(stripe) + index))
        } else {
            let block = &held.bytes;
            let parity = held.urgent.parity[stripe].get_or_insert_with(|| stripe::parity(layout, block, stripe));
            self.count.parity_bytes += u64::from(shard.bytes);
            parity[index - k].clone()
        };
        let number = path.number();
        path.fly(now, number, u64::from(shard.bytes), shard.block);
        path.sent.shards += 1;
        path.sent.urgent_bytes += u64::from(shard.bytes);
        let frame = Frame::Shard {
            id: shard.block,
            layout,
            stripe: shard.stripe,
            index: shard.index,
            bytes,
        };
        self.outputs.push_back(Output::Datagram {
            path: path.id,
            bytes: frame.into_datagram(path.id, number),
        });
    }

    /// What the peer lacks of our urgent blocks: repair those of which nothing is under way any more.
    fn on_gaps(&mut self, gaps: &Gaps) {
        // No honest peer can know the fate of a repair sooner; another one must not make us send without end.
        let rtts = self
            .paths
            .values()
            .filter(|path| path.is_up())
            .map(|path| path.estimator.rtt_min());
        let rtt = rtts.min().unwrap_or(ACK_DELAY) / 2;
        let under_way: Vec<BlockId> = self.blocks.urgent_under_way.iter().copied().collect();
        for id in under_way {
            let listed = gaps.blocks.iter().find(|block| block.id == id);
            self.lift_landed(id, listed.map(|block| &block.stripes[..]), gaps.more);
            let Some(held) = self.blocks.get(id) else { continue };
            let asked_too_often = self.now < held.urgent.repair_after;
            if held.urgent.unsettled > 0 || self.lies_on_trusted(id) || !self.carrying || asked_too_often {
                continue;
            }
            let (layout, len) = (held.urgent.layout, held.bytes.len());
            if let Some(held) = self.blocks.get_mut(id) {
                held.urgent.repair_after = self.now + rtt;
            }
            match (layout, listed) {
                (Some(layout), Some(listed)) => {
                    let missing = missing_runs(layout, &listed.stripes);
                    self.book_resent(layout, &missing);
                    self.lay_patches(id, layout, &missing);
                }
                // Not listed although everything was listed: the peer has none of it.
                (Some(layout), None) if !gaps.more => {
                    let all = [(0, count_u32(layout.data_shards()))];
                    self.book_resent(layout, &all);
                    self.lay_patches(id, layout, &all);
                }
                (None, None) if !gaps.more => {
                    self.count.resent_bytes += len as u64;
                    if let Some(best) = self.message_paths().first() {
                        self.lay_whole(id, *best);
                    }
                }
                _ => {}
            }
        }
    }

    fn book_resent(&mut self, layout: Layout, runs: &[(u32, u32)]) {
        let bytes = runs
            .iter()
            .filter_map(|run| layout.run_range(*run))
            .map(|range| range.len() as u64);
        self.count.resent_bytes += bytes.sum::<u64>();
    }

    /// Patches arrive whole: one whose first shard the peer has is there.
    fn lift_landed(&mut self, id: BlockId, listed: Option<&[(u16, Vec<u8>)]>, more: bool) {
        let Some(layout) = self.blocks.get(id).and_then(|held| held.urgent.layout) else {
            return;
        };
        let Some(stripes) = listed else { return };
        // Stripes are listed in order: what is missing from the list is complete, up to where the list was cut.
        let known = if more {
            stripes.last().map_or(0, |(last, _)| usize::from(*last))
        } else {
            layout.stripes()
        };
        let landed = |lay: &Lay| {
            let Some(first) = lay.patch else { return false };
            let (stripe, index) = layout.place_of(first as usize);
            match stripes.iter().find(|(s, _)| usize::from(*s) == stripe) {
                Some((_, have)) => have.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1),
                None => stripe < known,
            }
        };
        let gone = self.blocks.lift(id, landed);
        for lay in gone {
            if let Some(path) = self.paths.get_mut(&lay.laid.path) {
                path.lift(self.now, lay.bytes, lay.handed, Some(lay.mark));
            }
        }
    }

    /// Lay runs of data shards as streams over all paths, to end together.
    fn lay_patches(&mut self, id: BlockId, layout: Layout, runs: &[(u32, u32)]) {
        let up: Vec<PathId> = self
            .paths
            .values()
            .filter(|path| path.is_up())
            .map(|path| path.id)
            .collect();
        let lanes: Vec<Lane> = up.iter().map(|id| self.paths[id].urgent_lane()).collect();
        let total: u32 = runs.iter().map(|(_, count)| count).sum();
        let Some(filling) = scheduler::water_fill(&lanes, f64_of(total as usize * layout.shard_len())) else {
            return;
        };
        let sum: f64 = filling.bytes.iter().sum();
        let mut left: VecDeque<(u32, u32)> = runs.iter().copied().collect();
        let (mut share, mut cut) = (0.0, 0);
        for (path, bytes) in up.into_iter().zip(filling.bytes) {
            share += bytes / sum.max(f64::MIN_POSITIVE);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a share of a u32"
            )]
            let upto = ((f64::from(total) * share).round() as u32).min(total);
            let part = take_runs(&mut left, upto.saturating_sub(cut));
            cut = cut.max(upto);
            self.lay_parts(id, path, layout, part);
        }
        // Rounding may leave a shard over.
        let rest = left.into_iter().collect();
        if let Some(best) = self.message_paths().first().copied() {
            self.lay_parts(id, best, layout, rest);
        }
    }

    fn lay_parts(&mut self, id: BlockId, path: PathId, layout: Layout, runs: Vec<(u32, u32)>) {
        for runs in runs.chunks(limits::STRIPE_SHARDS) {
            let Some(held) = self.blocks.get(id) else { return };
            let ranges: Vec<_> = runs.iter().filter_map(|run| layout.run_range(*run)).collect();
            let bytes = match &ranges[..] {
                [one] => held.bytes.slice(one.clone()),
                many => {
                    let mut joined = BytesMut::with_capacity(many.iter().map(ExactSizeIterator::len).sum());
                    many.iter()
                        .for_each(|range| joined.extend_from_slice(&held.bytes[range.clone()]));
                    joined.freeze()
                }
            };
            let len = bytes.len() as u64;
            let frame = Frame::Patch {
                id,
                layout,
                runs: runs.to_vec(),
                bytes,
            };
            self.lay_stream(id, path, len, Some(runs[0].0), frame);
        }
    }

    // Acknowledgements.

    fn want_ack(&mut self, due: AckDue, gaps: bool) {
        self.ack_gaps |= gaps;
        self.ack = match (self.ack, due) {
            (AckDue::At(a), AckDue::At(b)) => AckDue::At(a.min(b)),
            (a, b) => a.max(b),
        };
    }

    /// Where acknowledgements go: the quickest trusted path, or any that has a connection.
    fn ack_path(&self) -> Option<PathId> {
        let connected = self.paths.values().filter(|path| !path.is_down());
        connected
            .min_by_key(|path| (!path.is_up(), path.cost(self.now)))
            .map(|path| path.id)
    }

    fn second_path(&self, first: PathId) -> Option<PathId> {
        let others = self.paths.values().filter(|path| path.is_up() && path.id != first);
        others.min_by_key(|path| path.cost(self.now)).map(|path| path.id)
    }

    fn build_ack(&mut self, path: PathId, echo: Option<u64>) -> Output {
        let budget = self
            .paths
            .get(&path)
            .map_or(0, |path| path.max_datagram)
            .min(limits::ACK_BYTES);
        // Too small a datagram, or none: a stream takes any length.
        let budget = if budget < Ack::floor() {
            limits::ACK_BYTES
        } else {
            budget
        };
        let reports: Vec<_> = self
            .paths
            .values()
            .filter(|p| !p.is_down())
            .filter_map(|p| p.arrivals.report())
            .collect();
        let received = self.inbox.received();
        let (n_reports, n_ranges, room) = Ack::rooms(budget, reports.len(), received.ranges());
        let gaps = (self.ack_gaps || echo.is_some()).then(|| self.inbox.gaps(room));
        let ack = Ack {
            number: self.ack_number,
            echo,
            message_next: self.message_inbox.next(),
            message_seen: self.message_inbox.seen(),
            message_taken: self.message_inbox.taken(),
            block_next: received.next(),
            block_taken: self.inbox.taken(),
            ranges: received.some_ranges(n_ranges, self.ack_number),
            reports: reports.into_iter().take(n_reports).collect(),
            gaps,
        };
        self.ack_number += 1;
        // An answer goes where its probe came from, which may be a path that loses it; what else was due stays due.
        if echo.is_none() || self.ack_path() == Some(path) {
            (self.ack, self.ack_gaps) = (AckDue::Never, false);
            (self.shards_unacked, self.taken_unacked) = (0, 0);
        }
        self.small(path, Frame::Ack(ack), budget - crate::frames::DATAGRAM_HEAD)
    }
}

/// How an urgent block is to be laid as shards.
#[derive(Debug)]
struct Plan {
    layout: Layout,
    paths: Vec<PathId>,
    weights: Vec<f64>,
    /// Most shards of one stripe on one path.
    per_path: usize,
    seconds: f64,
}

/// Runs of data shards that complete the listed stripes: of each as many as it needs.
fn missing_runs(layout: Layout, stripes: &[(u16, Vec<u8>)]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for (stripe, have) in stripes {
        let stripe = usize::from(*stripe);
        if stripe >= layout.stripes() {
            continue;
        }
        let k = layout.data_of(stripe);
        let has = |i: usize| have.get(i / 8).is_some_and(|byte| byte >> (i % 8) & 1 == 1);
        let there = (0..k + layout.m()).filter(|i| has(*i)).count();
        for i in (0..k).filter(|i| !has(*i)).take(k.saturating_sub(there)) {
            let shard = count_u32(layout.first_of(stripe) + i);
            match runs.last_mut() {
                Some((first, count)) if *first + *count == shard => *count += 1,
                _ => runs.push((shard, 1)),
            }
        }
    }
    runs
}

/// The first `n` shards of some runs.
fn take_runs(runs: &mut VecDeque<(u32, u32)>, mut n: u32) -> Vec<(u32, u32)> {
    let mut taken = Vec::new();
    while n > 0
        && let Some((first, count)) = runs.pop_front()
    {
        let some = count.min(n);
        taken.push((first, some));
        if some < count {
            runs.push_front((first + some, count - some));
        }
        n -= some;
    }
    taken
}

#[expect(clippy::cast_precision_loss, reason = "lengths of blocks are far below 2^53")]
fn f64_of(n: usize) -> f64 {
    n as f64
}

fn count_u32(n: usize) -> u32 {
    u32::try_from(n).expect("shards and bytes of a block within BLOCK_BYTES")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Call `link` at each of its own deadlines until `end`, taking whatever it says.
    fn keep_time(link: &mut Link, end: Now) -> Vec<LinkEvent> {
        let mut events = Vec::new();
        loop {
            events.extend(core::iter::from_fn(|| link.poll_event()));
            while link.poll_output().is_some() {}
            let next = link.poll_timeout();
            if next > end {
                return events;
            }
            link.handle_time(next);
        }
    }

    #[test]
    fn a_loop_that_was_late_does_not_blame_its_paths() {
        let mut link = Link::new(LinkConfig::default());
        let facts = PathFacts {
            max_datagram: 1_200,
            rtt: Some(Duration::from_millis(20)),
        };
        link.path_up(Now::ZERO, PathId(0), facts);
        link.send_message(Now::ZERO, vec![0; 10]).unwrap();
        let suspected = |events: &[LinkEvent]| events.iter().any(|e| matches!(e, LinkEvent::PathSuspect(..)));
        assert!(!suspected(&keep_time(&mut link, Now::from_us(40_000))));
        // Half a second in which this process did not run: the answers may be waiting in the socket.
        link.handle_time(Now::from_us(540_000));
        assert!(!suspected(
            &core::iter::from_fn(|| link.poll_event()).collect::<Vec<_>>()
        ));
        // If they are not, the path is suspected soon after.
        assert!(suspected(&keep_time(&mut link, Now::from_us(640_000))));
    }

    #[test]
    fn what_is_missing_is_asked_for_once_and_only_as_much_as_needed() {
        let layout = Layout::new(10_000, 1_000, 5, 2).unwrap();
        // Stripe 0 has three of seven, one of them parity; stripe 1 has five, so it needs nothing.
        let stripes = [(0, vec![0b0010_0101]), (1, vec![0b0101_1101]), (9, vec![0])];
        assert_eq!(missing_runs(layout, &stripes), [(1, 1), (3, 1)]);
        let mut runs = VecDeque::from([(0, 3), (10, 5)]);
        assert_eq!(take_runs(&mut runs, 5), [(0, 3), (10, 2)]);
        assert_eq!(runs, [(12, 3)]);
    }
}
