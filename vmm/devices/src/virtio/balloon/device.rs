//! What the balloon does.

use std::fmt;
use std::sync::Arc;

use umbra_units::{Malformed, Now, PAGE_SIZE, PageCount, Pfn, Reader, Writer};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{DEFLATE, INFLATE, QUEUE_SIZE};
use crate::limits::{BALLOON_PFNS_PER_CHAIN, BALLOON_STATISTICS};
use crate::virtio::{Cause, Chain, Rings, Token, Virtio, Wake, bit};

/// Where memory is given back.
pub trait MemoryAdvice: Send + Sync {
    /// These pages of the guest are not used: they may be zeros from now on, and their memory the host's. What is not memory of
    /// the guest is left alone. The pages count as written: see the [module](super).
    fn discard(&self, first: Pfn, pages: PageCount);
}

/// What a balloon is, and what it is connected to.
#[derive(Clone)]
pub struct Wiring {
    /// How many pages the guest is asked to give up at power-on.
    pub target: u32,
    /// All pages of the guest: more is never asked for.
    pub most: u32,
    /// The guest may take pages back when it has no others left, rather than ending programs.
    pub deflate_on_oom: bool,
    /// The guest is asked to report free pages as it goes.
    pub reporting: bool,
    /// Where memory is given back.
    pub advice: Arc<dyn MemoryAdvice>,
}

/// A balloon.
pub struct Balloon {
    wiring: Wiring,
    roles: Roles,
    /// Pages the guest is asked to have given up. At most `wiring.most`.
    target: u32,
    /// Pages it says it has.
    actual: u32,
    /// The buffer by which the driver can be asked for statistics.
    statistics_chain: Option<Token>,
    statistics: Statistics,
    counts: Counts,
}

/// What a balloon did since it was built or restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that were given up when asked, repetitions included.
    pub inflated: u64,
    /// Pages that were reported as free, repetitions included.
    pub reported: u64,
}

/// What the guest last said about its memory. All in bytes or events since its start (virtio 1.2, Memory Statistics Tags);
/// `None` what it did not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// By tag, from `VIRTIO_BALLOON_S_SWAP_IN` (0) up.
    pub by_tag: [Option<u64>; BALLOON_STATISTICS],
}

/// Which queue is which. A queue whose feature was not accepted is not there, and those behind it move up: so Linux and QEMU
/// count them, and with the queues in this order the numbers of the specification come out when all features are accepted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Roles {
    statistics: Option<u16>,
    reporting: Option<u16>,
}

// Feature bits (virtio 1.2, Traditional Memory Balloon Device, Feature bits).
const F_STATS_VQ: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_PAGE_REPORTING: u32 = 5;

/// One statistic: a tag of 16 bits and a value of 64, packed.
const STATISTIC_BYTES: usize = 10;

/// Bytes of the configuration before the driver's own field, and behind it.
const ACTUAL: std::ops::Range<u64> = 4..8;

impl Roles {
    const fn of(features: u64) -> Self {
        let mut next = DEFLATE;
        let mut roles = Self {
            statistics: None,
            reporting: None,
        };
        if has_feature(features, F_STATS_VQ) {
            next += 1;
            roles.statistics = Some(next);
        }
        if has_feature(features, F_PAGE_REPORTING) {
            next += 1;
            roles.reporting = Some(next);
        }
        roles
    }
}

const fn has_feature(features: u64, feature: u32) -> bool {
    features & bit(feature) != 0
}

impl Balloon {
    /// Ask the guest to have given up `pages` pages in all. More than there are is all.
    pub fn resize(&mut self, pages: u32, rings: &mut Rings) {
        self.target = pages.min(self.wiring.most);
        rings.config_changed();
    }

    /// Pages the guest is asked to have given up, and those it says it has.
    pub const fn size(&self) -> (u32, u32) {
        (self.target, self.actual)
    }

    /// Ask the guest for statistics; `false` if it cannot be asked now: it has not offered any, was
    /// asked already, or is paused. They come with one of the next notifications.
    pub fn ask_statistics(&mut self, rings: &mut Rings) -> bool {
        let chain = rings.is_open().then(|| self.statistics_chain.take()).flatten();
        if let Some(token) = chain {
            rings.push(token, 0);
        }
        chain.is_some()
    }

    /// What the guest last said.
    pub const fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// What happened so far.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Pages by number, as the traditional queues name them: 32 bits each.
    fn inflate(&mut self, chain: &mut Chain, rings: &Rings) {
        let named = usize::try_from(chain.readable.bytes() / 4).unwrap_or(usize::MAX);
        let mut bytes = vec![0; 4 * named.min(BALLOON_PFNS_PER_CHAIN)];
        // What cannot be read names no page.
        if chain.readable.read(rings.ram(), &mut bytes).is_err() {
            return;
        }
        let mut pages: Vec<u32> = bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes).collect();
        // A driver names pages one by one, often neighbours in falling order: one call for each run of them.
        pages.sort_unstable();
        pages.dedup();
        self.counts.inflated += pages.len() as u64;
        for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            self.wiring
                .advice
                .discard(Pfn(run[0].into()), PageCount(run.len() as u64));
        }
    }

    /// Free pages, named by the buffer itself.
    fn report(&mut self, chain: &Chain) {
        for segment in chain.writable.iter() {
            let page = PAGE_SIZE as u64;
            let first = segment.at.0.div_ceil(page);
            let end = segment.at.0.saturating_add(segment.len.into()) / page;
            if first < end {
                self.counts.reported += end - first;
                self.wiring.advice.discard(Pfn(first), PageCount(end - first));
            }
        }
    }

    /// The driver's statistics, in a buffer that is kept to ask for the next.
    fn learn(&mut self, mut chain: Chain, rings: &mut Rings) {
        let named = usize::try_from(chain.readable.bytes()).unwrap_or(usize::MAX) / STATISTIC_BYTES;
        let mut bytes = vec![0; STATISTIC_BYTES * named.min(BALLOON_STATISTICS)];
        if chain.readable.read(rings.ram(), &mut bytes).is_ok() {
            self.statistics = Statistics::read(&bytes);
        }
        // A driver has one buffer for this. Whoever gives more gets the older one back.
        if let Some(older) = self.statistics_chain.replace(chain.token()) {
            rings.push(older, 0);
        }
    }

    pub(super) const fn parts(&self) -> (u32, u32, Option<Token>) {
        (self.target, self.actual, self.statistics_chain)
    }

    /// Take up what was saved. A target beyond this guest's memory and a buffer of a queue that is not in use are refused.
    pub(super) fn take_up(&mut self, target: u32, actual: u32, statistics_head: Option<u16>) -> bool {
        self.target = target;
        self.actual = actual;
        self.statistics_chain = statistics_head
            .zip(self.roles.statistics)
            .map(|(head, queue)| Token::held(queue, head));
        target <= self.wiring.most && self.statistics_chain.is_some() == statistics_head.is_some()
    }
}

impl Statistics {
    fn read(bytes: &[u8]) -> Self {
        let mut statistics = Self::default();
        for statistic in bytes.as_chunks::<STATISTIC_BYTES>().0 {
            let mut r = Reader::new(statistic);
            let (Ok(tag), Ok(value)) = (r.u16("tag"), r.u64("value")) else {
                break;
            };
            // A tag that this build does not know is another build's.
            if let Some(place) = statistics.by_tag.get_mut(usize::from(tag)) {
                *place = Some(value);
            }
        }
        statistics
    }
}

impl Virtio for Balloon {
    const ID: u32 = VIRTIO_ID_BALLOON;
    const VERSION: u32 = super::state::VERSION;
    type Wiring = Wiring;

    fn new(wiring: Wiring) -> Self {
        Self {
            roles: Roles::default(),
            target: wiring.target.min(wiring.most),
            actual: 0,
            statistics_chain: None,
            statistics: Statistics::default(),
            counts: Counts::default(),
            wiring,
        }
    }

    fn kind(&self) -> &str {
        "balloon/0"
    }

    fn queues(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4]
    }

    fn features(&self) -> u64 {
        let mut features = bit(F_STATS_VQ);
        for (offered, feature) in [
            (self.wiring.deflate_on_oom, F_DEFLATE_ON_OOM),
            (self.wiring.reporting, F_PAGE_REPORTING),
        ] {
            if offered {
                features |= bit(feature);
            }
        }
        features
    }

    fn accept(&mut self, features: u64) {
        self.roles = Roles::of(features);
    }

    /// `struct virtio_balloon_config` up to `actual`: what is behind belongs to features that are not offered.
    fn config(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(self.target).u32(self.actual);
        w.into_bytes()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.actual.to_le_bytes();
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            if ACTUAL.contains(&at) {
                actual[usize::try_from(at - ACTUAL.start).expect("less than 4")] = *byte;
            }
        }
        self.actual = u32::from_le_bytes(actual);
    }

    fn work(&mut self, _now: Now, cause: Cause, rings: &mut Rings) -> Wake {
        let Cause::Notified(queue) = cause else {
            return Wake::Idle;
        };
        while let Some(mut chain) = rings.pop(queue) {
            if Some(queue) == self.roles.statistics {
                self.learn(chain, rings);
                continue;
            }
            if queue == INFLATE {
                self.inflate(&mut chain, rings);
            } else if Some(queue) == self.roles.reporting {
                self.report(&chain);
            }
            // Of pages taken back nothing need be done: they come when they are touched.
            rings.push(chain.token(), 0);
        }
        Wake::Idle
    }

    fn reset(&mut self) {
        let (target, counts) = (self.target, self.counts);
        *self = Self::new(self.wiring.clone());
        // What the operator asked for last is asked of the next driver too.
        self.target = target;
        self.counts = counts;
    }

    fn save(&self, w: &mut Writer) {
        super::state::write(self, w);
    }

    fn load(&mut self, r: &mut Reader<'_>) -> Result<(), Malformed> {
        super::state::read(self, r)
    }
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Balloon({} of {} pages)", self.actual, self.target)
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring(balloon/0, {} pages of {})", self.target, self.most)
    }
}
