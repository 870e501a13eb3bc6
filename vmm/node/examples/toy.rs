//! Embedding Umbra around a guest that is not ours: an array of pages and a thread that writes them.
//!
//! Everything a VMM must bring is in `impl Guest for Toy` and `impl GuestBuilder for ToyBuilder`. The rest of this file
//! starts a shadow, follows the toy over two paths, and moves it: `cargo run -p umbra-node --example toy`.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use umbra_core::guest::{Guest, GuestBuilder, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_core::report::SwitchoverReport;
use umbra_core::shadow::ShadowConfig;
use umbra_core::source::SwitchoverOptions;
use umbra_node::{GuestIdentity, ProtectConfig, Protection, ShadowNode, TakenOver};
use umbra_quic::{ConnectConfig, Identity, ListenConfig, Listener, Peers, Tuning, connect};
use umbra_units::{GuestId, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SessionId, SpaceId, Term};

/// A guest: some pages, the set of those written since the last harvest, and a counter that is its only register.
pub(crate) struct Toy {
    pages: PageCount,
    memory: Mutex<Memory>,
    running: Arc<AtomicBool>,
    steps: Arc<AtomicU64>,
}

struct Memory {
    bytes: Vec<u8>,
    dirty: PageSet,
}

impl Toy {
    /// A toy of so many pages, all zeros, not running.
    pub(crate) fn new(pages: PageCount) -> Arc<Self> {
        let bytes = vec![0; usize::try_from(pages.bytes()).expect("a toy is small")];
        Arc::new(Self {
            pages,
            memory: Mutex::new(Memory {
                bytes,
                dirty: PageSet::new(pages),
            }),
            running: Arc::default(),
            steps: Arc::default(),
        })
    }

    /// One step of its life: count, and write the count into some page.
    pub(crate) fn step(&self) {
        let mut memory = self.memory();
        if !self.running.load(Ordering::SeqCst) {
            return; // paused while this step waited for the lock
        }
        let step = self.steps.fetch_add(1, Ordering::SeqCst);
        let pfn = Pfn(step * 7 % self.pages.0);
        let at = offset(pfn);
        memory.bytes[at..at + 8].copy_from_slice(&step.to_le_bytes());
        memory.dirty.insert(pfn);
    }

    /// Its register.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }

    /// Whether it runs.
    pub(crate) fn runs(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// Its memory must be exactly what so many steps leave behind.
    pub(crate) fn is_sound(&self) -> bool {
        let memory = self.memory();
        let steps = self.steps();
        let newest = steps.saturating_sub(self.pages.0)..steps;
        newest.into_iter().all(|step| {
            let at = offset(Pfn(step * 7 % self.pages.0));
            memory.bytes[at..at + 8] == step.to_le_bytes()
        })
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn offset(pfn: Pfn) -> usize {
    usize::try_from(pfn.0).expect("a toy is small") * PAGE_SIZE
}

impl PageReader for Toy {
    fn read_pages(&self, _space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        let memory = self.memory();
        pages
            .iter()
            .for_each(|pfn| out.extend_from_slice(&memory.bytes[offset(*pfn)..][..PAGE_SIZE]));
        Ok(())
    }
}

impl Guest for Toy {
    fn describe(&self) -> StateRecord {
        StateRecord {
            kind: "toy".to_owned(),
            version: 1,
            bytes: self.pages.0.to_le_bytes().to_vec(),
        }
    }

    fn spaces(&self) -> Vec<Space> {
        vec![Space::ram(self.pages)]
    }

    fn track(&self, _on: bool) -> Result<(), GuestError> {
        Ok(()) // a toy always records what it writes
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        let dirty = std::mem::replace(&mut self.memory().dirty, PageSet::new(self.pages));
        Ok(Harvest {
            dirty: vec![(SpaceId::RAM, dirty)],
        })
    }

    fn put_back(&self, harvest: &Harvest) {
        harvest
            .dirty
            .iter()
            .for_each(|(_, set)| self.memory().dirty.union_with(set));
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        out.copy_from_slice(&self.memory().bytes[offset(page.pfn)..][..PAGE_SIZE]);
        Ok(())
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        self.memory().bytes[offset(page.pfn)..][..PAGE_SIZE].copy_from_slice(bytes);
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        let _between_steps = self.memory();
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        let bytes = self.steps().to_le_bytes().to_vec();
        Ok(vec![StateRecord {
            kind: "steps".to_owned(),
            version: 1,
            bytes,
        }])
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        let [record] = records else {
            return Err(GuestError::Malformed("a toy has one record".to_owned()));
        };
        if (record.kind.as_str(), record.version) != ("steps", 1) {
            return Err(GuestError::Incompatible(format!(
                "record {} version {}",
                record.kind, record.version
            )));
        }
        let steps = record
            .bytes
            .as_slice()
            .try_into()
            .map_err(|_| GuestError::Malformed("steps".to_owned()))?;
        self.steps.store(u64::from_le_bytes(steps), Ordering::SeqCst);
        Ok(())
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}

/// Builds toys for the shadow, and remembers the last one so that its owner can look at it.
#[derive(Default)]
pub(crate) struct ToyBuilder {
    built: Mutex<Option<Arc<Toy>>>,
}

impl ToyBuilder {
    /// The toy built last.
    pub(crate) fn built(&self) -> Option<Arc<Toy>> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl GuestBuilder for ToyBuilder {
    fn build(&self, description: &StateRecord) -> Result<Arc<dyn Guest>, GuestError> {
        let pages = description.bytes.as_slice().try_into().map(u64::from_le_bytes);
        let Ok(pages @ 1..=65_536) = pages else {
            return Err(GuestError::Malformed("a toy of how many pages?".to_owned()));
        };
        let toy = Toy::new(PageCount(pages));
        *self.built.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&toy));
        Ok(toy)
    }
}

/// Let a toy live in a thread of its own, paused or not, until nobody else holds it.
pub(crate) fn live(toy: Arc<Toy>) {
    thread::spawn(move || {
        while Arc::strong_count(&toy) > 1 {
            toy.step();
            thread::yield_now();
        }
    });
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Both nodes in one process: a source and a shadow that know each other's certificates.
pub(crate) struct TwoNodes {
    source: Arc<Identity>,
    shadow_peers: Peers,
    listener: Listener,
}

impl TwoNodes {
    /// Identities for both, and a listener on so many loopback ports.
    pub(crate) fn new(paths: usize) -> Result<Self, AnyError> {
        let (source, shadow) = (
            Arc::new(Identity::generate("source")?),
            Arc::new(Identity::generate("shadow")?),
        );
        let addrs = (0..paths)
            .map(|_| "quic:127.0.0.1:0".parse())
            .collect::<Result<_, _>>()?;
        let peers = Peers::only(source.fingerprint());
        let listener = Listener::bind(ListenConfig {
            addrs,
            identity: Arc::clone(&shadow),
            peers,
            tuning: Tuning::default(),
        })?;
        Ok(Self {
            source,
            shadow_peers: Peers::only(shadow.fingerprint()),
            listener,
        })
    }

    /// Follow `toy` from one node to the other and let `meanwhile` decide when to move it.
    pub(crate) async fn move_toy(
        self,
        toy: Arc<Toy>,
        builder: Arc<ToyBuilder>,
    ) -> Result<(SwitchoverReport, TakenOver), AnyError> {
        let paths = self
            .listener
            .addrs()
            .iter()
            .map(|addr| umbra_quic::PathSpec::to(*addr))
            .collect();
        let (node, _handle) = ShadowNode::new(self.listener, builder, ShadowConfig::default());
        let shadow = tokio::spawn(node.run());
        let link = connect(ConnectConfig::new(paths, self.source, self.shadow_peers)).await?;
        let identity = GuestIdentity {
            guest: GuestId([7; 16]),
            term: Term(1),
        };
        let protection = Protection::start(toy, identity, SessionId([8; 16]), link, ProtectConfig::default())?;
        let report = protection
            .switchover(SwitchoverOptions {
                audit: true,
                ..SwitchoverOptions::default()
            })
            .await?;
        Ok((report, shadow.await??))
    }
}

#[tokio::main]
#[cfg_attr(test, expect(dead_code, reason = "the tests include this file for its toy"))]
async fn main() -> Result<(), AnyError> {
    let toy = Toy::new(PageCount(4_096));
    toy.resume()?;
    live(Arc::clone(&toy));
    let builder = Arc::new(ToyBuilder::default());
    let (report, taken) = TwoNodes::new(2)?
        .move_toy(Arc::clone(&toy), Arc::clone(&builder))
        .await?;
    let moved = builder.built().ok_or("nothing was built")?;
    println!("toy {} runs at the shadow in term {}", taken.id, taken.term);
    println!(
        "it was paused for {:?} with {} pages left to send",
        report.breakdown.pause(),
        report.stop_pages
    );
    println!("runs: {} here, {} there", toy.runs(), moved.runs());
    println!(
        "steps: {} here, {} there; sound: {}",
        toy.steps(),
        moved.steps(),
        moved.is_sound()
    );
    Ok(())
}
