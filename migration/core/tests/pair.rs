//! A source and a shadow side by side, with nothing between them but two queues: the protocol as a story.
//!
//! The simulator (`tests/sim`) is where everything goes wrong at once; here one thing happens at a time.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use umbra_core::batch::Batch;
use umbra_core::error::Fault;
use umbra_core::event::Event;
use umbra_core::guest::{CaptureBy, Captured, Guest, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_core::heat::Class;
use umbra_core::phase::{ShadowPhase, SourcePhase};
use umbra_core::predict::LinkFacts;
use umbra_core::report::{CutReport, SwitchoverReport};
use umbra_core::shadow::{self, Image, Sequence, Shadow, ShadowConfig};
use umbra_core::source::{self, CutOptions, CutReason, Encoder, Source, SourceConfig, StepKind, SwitchoverOptions};
use umbra_core::wire::Message;
use umbra_units::{
    Bandwidth, Bytes, GuestId, Now, PAGE_SIZE, PageCount, PageId, PageSet, Pfn, SessionId, SpaceId, Term,
};

/// A guest that is nothing but pages and one number.
struct Toy {
    pages: u64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    memory: Vec<u8>,
    dirty: Vec<u64>,
    number: u8,
    running: bool,
    /// What only one host may hold.
    holds_disks: bool,
    /// Saving writes this page, as a device that updates its ring does.
    writes_while_saving: Option<u64>,
    fail_restore: bool,
    fail_resume: bool,
}

impl Toy {
    fn new(pages: u64) -> Self {
        let memory = vec![0; usize::try_from(pages).unwrap() * PAGE_SIZE];
        Self {
            pages,
            inner: Mutex::new(Inner {
                memory,
                ..Inner::default()
            }),
        }
    }

    fn write(&self, page: u64, byte: u8) {
        let mut inner = self.inner.lock().unwrap();
        let at = usize::try_from(page).unwrap() * PAGE_SIZE;
        inner.memory[at..at + 100].fill(byte);
        inner.dirty.push(page);
    }

    fn memory(&self) -> Vec<u8> {
        self.inner.lock().unwrap().memory.clone()
    }

    fn holds_disks(&self) -> bool {
        self.inner.lock().unwrap().holds_disks
    }

    fn runs(&self) -> bool {
        self.inner.lock().unwrap().running
    }
}

impl PageReader for Toy {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        let mut page = [0; PAGE_SIZE];
        for pfn in pages {
            self.read_page(PageId { space, pfn: *pfn }, &mut page)?;
            out.extend_from_slice(&page);
        }
        Ok(())
    }
}

impl Guest for Toy {
    fn describe(&self) -> StateRecord {
        StateRecord {
            kind: "toy".to_owned(),
            version: 1,
            bytes: Vec::new(),
        }
    }

    fn spaces(&self) -> Vec<Space> {
        vec![Space::ram(PageCount(self.pages))]
    }

    fn track(&self, _on: bool) -> Result<(), GuestError> {
        Ok(())
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        let mut set = PageSet::new(PageCount(self.pages));
        self.inner.lock().unwrap().dirty.drain(..).for_each(|page| {
            set.insert(Pfn(page));
        });
        Ok(Harvest {
            dirty: vec![(SpaceId::RAM, set)],
        })
    }

    fn put_back(&self, harvest: &Harvest) {
        let pages = harvest.dirty.iter().flat_map(|(_, set)| set.iter()).map(|pfn| pfn.0);
        self.inner.lock().unwrap().dirty.extend(pages);
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        let at = usize::try_from(page.pfn.0).unwrap() * PAGE_SIZE;
        out.copy_from_slice(&self.inner.lock().unwrap().memory[at..at + PAGE_SIZE]);
        Ok(())
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        let at = usize::try_from(page.pfn.0).unwrap() * PAGE_SIZE;
        self.inner.lock().unwrap().memory[at..at + PAGE_SIZE].copy_from_slice(bytes);
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.inner.lock().unwrap().running = false;
        Ok(())
    }

    fn resume(&self) -> Result<(), GuestError> {
        let mut inner = self.inner.lock().unwrap();
        if inner.fail_resume {
            return Err(GuestError::Host("no vCPUs today".to_owned()));
        }
        inner.running = true;
        inner.holds_disks = true;
        Ok(())
    }

    fn give_up(&self) {
        self.inner.lock().unwrap().holds_disks = false;
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        let writes = self.inner.lock().unwrap().writes_while_saving;
        writes.into_iter().for_each(|page| self.write(page, 0xdd));
        let bytes = vec![self.inner.lock().unwrap().number];
        Ok(vec![StateRecord {
            kind: "number".to_owned(),
            version: 1,
            bytes,
        }])
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        let mut inner = self.inner.lock().unwrap();
        if inner.fail_restore {
            return Err(GuestError::Incompatible("this host lacks numbers".to_owned()));
        }
        inner.number = records[0].bytes[0];
        Ok(())
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}

/// Both machines, both guests, and what is on its way between them.
struct Pair {
    now: Now,
    here: Toy,
    there: Toy,
    source: Source,
    encoder: Encoder,
    shadow: Shadow,
    sequence: Sequence<Vec<u8>>,
    /// What the source captured.
    captured: Option<Box<dyn Captured>>,
    /// Cuts that were committed.
    staging: Bytes,
    /// Of both sides.
    events: Vec<Event>,
    image: Option<Image>,
    to_shadow: VecDeque<Vec<u8>>,
    batches: VecDeque<Vec<u8>>,
    to_source: VecDeque<Message>,
    /// Messages of this kind are lost, as if the link had died for good just then.
    lose: fn(&Message) -> bool,
    source_end: Option<source::Outcome>,
    shadow_end: Option<shadow::Outcome>,
    shipped: u64,
}

impl Pair {
    fn new(pages: u64) -> Self {
        Self::with(pages, ShadowConfig::default())
    }

    fn with(pages: u64, config: ShadowConfig) -> Self {
        // Nothing waits for the end, so that each test sees what it wrote travel.
        let source = SourceConfig {
            pause_promise: Duration::ZERO,
            ..SourceConfig::default()
        };
        Self::between(pages, source, config)
    }

    fn between(pages: u64, source: SourceConfig, config: ShadowConfig) -> Self {
        let (here, there) = (Toy::new(pages), Toy::new(pages));
        here.resume().unwrap();
        here.inner.lock().unwrap().number = 42;
        let spaces = here.spaces();
        let ids = (GuestId([1; 16]), SessionId([2; 16]), Term(1));
        let mut source = Source::new(source, ids.0, ids.1, ids.2, here.describe(), &spaces);
        source.handle_link(LinkFacts {
            rate: Bandwidth::mbit(1_000),
            rtt: Duration::from_millis(1),
        });
        Self {
            now: Now::ZERO,
            here,
            there,
            source,
            encoder: Encoder::new(&spaces, Bytes::mib(1)),
            sequence: Sequence::new(config.window),
            staging: config.staging_for(&spaces),
            shadow: Shadow::new(config),
            captured: None,
            events: Vec::new(),
            image: None,
            to_shadow: VecDeque::new(),
            batches: VecDeque::new(),
            to_source: VecDeque::new(),
            lose: |_| false,
            source_end: None,
            shadow_end: None,
            shipped: 0,
        }
    }

    /// Let everything that can happen happen, until only time can bring more.
    fn settle(&mut self) {
        while self.source_steps() | self.ship() | self.deliver() | self.shadow_steps() {
            assert!(!(self.here.runs() && self.there.runs()), "two copies run");
        }
    }

    fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        loop {
            self.settle();
            let next = self.source.poll_timeout().min(self.shadow.poll_timeout());
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            self.source.handle_time(self.now);
            self.shadow.handle_time(self.now);
        }
        self.now = end;
        self.settle();
    }

    fn source_steps(&mut self) -> bool {
        let mut any = false;
        while let Some(output) = self.source.poll_output() {
            any = true;
            match output {
                source::Output::Send(Message::Go { .. }) if self.here.holds_disks() => {
                    panic!("the shadow may run, and the disks are still held here")
                }
                source::Output::Send(message) if (self.lose)(&message) => {}
                source::Output::Send(message) => self.to_shadow.push_back(message.encode()),
                source::Output::Do(step) => self.source_step(step),
                source::Output::Event(event) => self.events.push(event),
                source::Output::End(outcome) => self.source_end = Some(outcome),
            }
        }
        any
    }

    fn source_step(&mut self, step: source::Step) {
        use source::Step;
        match step {
            Step::Track => self.source.handle_tracked(self.now, &self.here.untouched()),
            Step::Harvest => self.source.handle_harvest(self.now, &self.here.harvest().unwrap()),
            Step::Pause => {
                self.here.pause().unwrap();
                self.source.handle_paused(self.now);
            }
            Step::Save => self.source.handle_saved(self.now, self.here.save().unwrap()),
            Step::Audit => {
                let differing = self.encoder.audit(&self.here).unwrap();
                self.source.handle_audited(self.now, &differing);
            }
            Step::Capture(pages, by) => {
                let captured = self.here.capture(&pages, by).unwrap();
                if self.source.handle_captured(self.now, captured.by()) {
                    self.captured = Some(captured);
                }
            }
            Step::Release => self.captured = None,
            Step::Resume => {
                self.here.resume().unwrap();
                self.source.handle_resumed(self.now);
            }
            Step::GiveUp => self.here.give_up(),
            Step::Untrack(debt) => self.here.put_back(&debt),
        }
    }

    fn ship(&mut self) -> bool {
        let mut any = false;
        while let Some(plan) = self.source.take_plan(self.now) {
            any = true;
            let encoded = self.encode(plan);
            let size = Bytes::of_len(encoded.bytes.len());
            self.shipped += encoded.counts.total() - encoded.counts.same;
            self.batches.push_back(encoded.bytes);
            self.source.handle_encoded(self.now, encoded.id, size, encoded.counts);
        }
        any
    }

    fn encode(&mut self, plan: source::Plan) -> source::Encoded {
        let captured = self.captured.as_deref().map(|captured| captured as &dyn PageReader);
        let from = captured.filter(|_| plan.captured).unwrap_or(&self.here);
        self.encoder.encode(plan, from, true).unwrap()
    }

    fn deliver(&mut self) -> bool {
        let any = !self.batches.is_empty();
        for bytes in std::mem::take(&mut self.batches) {
            self.arrives(bytes);
        }
        any | self.deliver_messages()
    }

    fn deliver_messages(&mut self) -> bool {
        let mut any = !(self.to_shadow.is_empty() && self.to_source.is_empty());
        for bytes in std::mem::take(&mut self.to_shadow) {
            self.shadow.handle_message(self.now, Message::decode(&bytes).unwrap());
        }
        any |= self.shadow_steps();
        for message in std::mem::take(&mut self.to_source) {
            self.source.handle_message(self.now, message);
        }
        any
    }

    fn arrives(&mut self, bytes: Vec<u8>) {
        self.sequence.arrived(bytes).unwrap();
        while let Some(bytes) = self.sequence.take() {
            self.apply(&bytes);
        }
    }

    fn apply(&mut self, bytes: &[u8]) {
        let batch = Batch::parse(bytes).unwrap();
        match self.image.as_mut().unwrap().apply(batch, &self.there) {
            Ok(applied) => self.shadow.handle_applied(self.now, self.now, applied),
            Err(fault) => self.shadow.handle_failed(fault),
        }
    }

    fn shadow_steps(&mut self) -> bool {
        let mut any = false;
        while let Some(output) = self.shadow.poll_output() {
            any = true;
            match output {
                shadow::Output::Send(message) if (self.lose)(&message) => {}
                shadow::Output::Send(message) => self.to_source.push_back(message),
                shadow::Output::Do(step) => self.shadow_step(step),
                shadow::Output::Event(event) => self.events.push(event),
                shadow::Output::End(outcome) => self.shadow_end = Some(outcome),
            }
        }
        any
    }

    fn shadow_step(&mut self, step: shadow::Step) {
        use shadow::Step;
        match step {
            Step::Build(_, spaces) => {
                self.image = Some(Image::new(&spaces).with_staging(self.staging));
                self.shadow.handle_built(Ok(self.there.spaces()));
            }
            Step::Audit(epoch) => {
                let differing = self.image.as_ref().unwrap().audit(&self.there).unwrap();
                self.shadow.handle_audited(self.now, epoch, &differing);
            }
            Step::Recall => {
                let recalled = self.image.as_mut().unwrap().recall(&self.there);
                let recalled = recalled.and_then(|(epoch, records)| {
                    self.there.restore(&records)?;
                    Ok(epoch)
                });
                self.shadow.handle_recalled(recalled);
            }
            Step::Restore(epoch, records) => {
                let restored = self.there.restore(&records).map_err(Fault::from);
                self.shadow.handle_restored(self.now, epoch, restored);
            }
            Step::Resume(epoch) => {
                let sealed = self.image.as_mut().unwrap().seal(epoch);
                let resumed = sealed.and_then(|()| Ok(self.there.resume().map(|()| Duration::from_micros(7))?));
                self.shadow.handle_resumed(resumed);
            }
        }
    }

    fn moved(&self) -> SwitchoverReport {
        match &self.source_end {
            Some(source::Outcome::Moved(report)) => **report,
            other => panic!("the guest did not move: {other:?}"),
        }
    }
}

fn switchover(pair: &mut Pair, options: SwitchoverOptions) {
    pair.source.switchover(pair.now, options).unwrap();
    pair.run_for(Duration::from_secs(1));
}

#[test]
fn a_guest_moves_to_its_shadow() {
    let mut pair = Pair::new(200);
    (0..50).for_each(|page| pair.here.write(page, 1));
    pair.run_for(Duration::from_secs(1));
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::Following, ShadowPhase::Following)
    );
    assert_eq!(pair.here.memory(), pair.there.memory());

    pair.here.write(7, 9);
    switchover(&mut pair, SwitchoverOptions::default());
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::Done, ShadowPhase::Running)
    );
    assert!(!pair.here.runs() && pair.there.runs());
    assert_eq!(pair.here.memory(), pair.there.memory());
    assert_eq!(pair.there.inner.lock().unwrap().number, 42);
    assert_eq!(pair.moved().term, Term(2));
    assert_eq!(pair.shadow_end, Some(shadow::Outcome::Runs(Term(2))));
}

#[test]
fn zeros_and_unchanged_pages_never_travel_and_small_changes_travel_small() {
    let mut pair = Pair::new(1_000);
    (0..10).for_each(|page| pair.here.write(page, 1));
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.shipped, 10, "990 pages are zeros, as at the shadow");
    for byte in 2..5 {
        pair.here.write(3, byte);
        pair.here.write(4, 1); // written, but not changed
        pair.run_for(Duration::from_millis(200));
    }
    let counts = pair.source.status().counts;
    assert_eq!(
        (counts.raw, counts.dup, counts.delta),
        (2, 9, 2),
        "nine are as the first; the second copy is kept, the third and fourth are deltas to it"
    );
}

#[test]
fn what_is_written_over_and_over_waits_for_the_end_and_is_not_forgotten() {
    let mut pair = Pair::between(1_000, SourceConfig::default(), ShadowConfig::default());
    (0..1_000).for_each(|page| pair.here.write(page, 1));
    pair.run_for(Duration::from_secs(1));
    for n in 0..100_u8 {
        pair.here.write(3, n);
        pair.here.write(u64::from(n) + 100, 7);
        pair.run_for(Duration::from_millis(20));
    }
    let status = pair.source.status();
    assert_eq!(status.deferred, PageCount(1));
    assert!(status.debt >= status.deferred, "what waits is debt");
    assert_eq!(status.classes.of(Class::Deferred), 1);
    assert!(pair.shipped < 1_000 + 100 + 10, "the hot page did not travel each time");

    switchover(&mut pair, SwitchoverOptions::default());
    assert_eq!(pair.here.memory(), pair.there.memory());
    assert!(pair.there.runs());
}

#[test]
fn a_page_that_cools_waits_no_longer() {
    let mut pair = Pair::between(1_000, SourceConfig::default(), ShadowConfig::default());
    for n in 0..100_u8 {
        pair.here.write(3, n);
        pair.run_for(Duration::from_millis(20));
    }
    assert_eq!(pair.source.status().deferred, PageCount(1));
    pair.run_for(Duration::from_secs(15));
    assert_eq!(pair.source.status().debt, PageCount::ZERO);
    assert_eq!(pair.here.memory(), pair.there.memory());
}

#[test]
fn that_a_switchover_will_not_converge_is_said_long_before_its_timeout() {
    let mut pair = Pair::new(1_000);
    pair.run_for(Duration::from_secs(1));
    // A link that needs longer for the guest's registers than the pause may last.
    pair.source.handle_link(LinkFacts {
        rate: Bandwidth(10_000),
        rtt: Duration::from_millis(1),
    });
    let options = SwitchoverOptions {
        downtime_limit: Duration::from_millis(50),
        timeout: Duration::from_secs(60),
        ..SwitchoverOptions::default()
    };
    pair.source.switchover(pair.now, options).unwrap();
    let mut stamp = 0_u8;
    for n in 0..150 {
        stamp = stamp.wrapping_add(1);
        (0..50).for_each(|page| pair.here.write((n * 50 + page) % 900, stamp));
        pair.run_for(Duration::from_millis(20));
    }
    let warned = pair
        .events
        .iter()
        .filter(|event| matches!(event, Event::WillNotConverge { .. }));
    assert_eq!(warned.count(), 1, "{:?}", pair.source.status());
    let obstacle = pair.source.status().obstacle.unwrap();
    assert!(obstacle.starts_with("will not converge: about "), "{obstacle}");
    assert_eq!(pair.source.status().phase, SourcePhase::Following, "the limit is kept");
    pair.source.cancel_switchover().unwrap();
}

#[test]
fn what_saving_writes_is_in_the_final_epoch() {
    let mut pair = Pair::new(50);
    pair.here.inner.lock().unwrap().writes_while_saving = Some(20);
    pair.run_for(Duration::from_secs(1));
    switchover(
        &mut pair,
        SwitchoverOptions {
            audit: true,
            ..SwitchoverOptions::default()
        },
    );
    assert!(pair.moved().audited);
    assert_eq!(pair.there.memory()[20 * PAGE_SIZE], 0xdd);
}

#[test]
fn a_shadow_that_cannot_load_the_state_says_why_and_the_guest_runs_on() {
    let mut pair = Pair::new(50);
    pair.there.inner.lock().unwrap().fail_restore = true;
    pair.run_for(Duration::from_secs(1));
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(pair.here.runs() && !pair.there.runs());
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::Following, ShadowPhase::Following)
    );

    pair.there.inner.lock().unwrap().fail_restore = false;
    let before = pair.shipped;
    pair.here.write(1, 1);
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(pair.there.runs());
    assert!(pair.shipped - before < 5, "the second attempt is incremental");
}

#[test]
fn a_shadow_that_cannot_start_hands_the_guest_back() {
    let mut pair = Pair::new(50);
    pair.there.inner.lock().unwrap().fail_resume = true;
    pair.run_for(Duration::from_secs(1));
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(pair.here.runs() && !pair.there.runs());
    let Some(source::Outcome::Stayed { term, text, .. }) = &pair.source_end else {
        panic!("it should have stayed")
    };
    assert_eq!(*term, Term(3), "the shadow's term is void");
    assert!(text.contains("no vCPUs today"), "{text}");
}

#[test]
fn the_disks_are_let_go_of_before_the_shadow_may_run() {
    // That it holds at the very moment is asserted wherever a source says "go".
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    assert!(pair.here.holds_disks());
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(!pair.here.holds_disks() && pair.there.holds_disks());
}

#[test]
fn a_guest_that_is_handed_back_takes_hold_of_its_disks_again() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.there.inner.lock().unwrap().fail_resume = true;
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(pair.here.runs() && pair.here.holds_disks());
}

#[test]
fn a_lost_go_leaves_nobody_running_until_an_operator_vouches_for_one_side() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.lose = |message| matches!(message, Message::Go { .. });
    switchover(&mut pair, SwitchoverOptions::default());
    pair.source.handle_link_lost("all paths are gone");
    pair.shadow.handle_link_lost("all paths are gone");
    pair.run_for(Duration::from_secs(3600));
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::HandedOver, ShadowPhase::Prepared)
    );
    assert!(!pair.here.runs() && !pair.there.runs());
    assert!(pair.source.end("tired of waiting").is_err());

    pair.shadow.vouch().unwrap();
    pair.settle();
    assert!(!pair.here.runs() && pair.there.runs());
}

#[test]
fn a_lost_confirmation_never_brings_the_source_back_by_itself() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.lose = |message| matches!(message, Message::Running { .. });
    switchover(&mut pair, SwitchoverOptions::default());
    pair.source.handle_link_lost("all paths are gone");
    pair.run_for(Duration::from_secs(3600));
    assert_eq!(pair.source.phase(), SourcePhase::HandedOver);
    assert!(!pair.here.runs() && pair.there.runs());
}

#[test]
fn a_shadow_that_is_not_prepared_in_time_is_given_up_and_the_guest_runs_on() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.lose = |message| matches!(message, Message::Prepared { .. });
    switchover(
        &mut pair,
        SwitchoverOptions {
            pause_limit: Duration::from_millis(500),
            ..SwitchoverOptions::default()
        },
    );
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::Following, ShadowPhase::Following)
    );
    assert!(pair.here.runs());
}

#[test]
fn a_shadow_may_be_prepared_before_the_source_hears_that_it_sent() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.source.switchover(pair.now, SwitchoverOptions::default()).unwrap();
    let plan = loop {
        pair.source_steps();
        match pair.source.take_plan(pair.now) {
            Some(plan) if plan.close.is_some() => break plan,
            Some(plan) => pair
                .batches
                .push_back(pair.encoder.encode(plan, &pair.here, true).unwrap().bytes),
            None => {}
        }
        pair.deliver();
    };
    let encoded = pair.encoder.encode(plan, &pair.here, true).unwrap();
    let size = Bytes::of_len(encoded.bytes.len());
    pair.batches.push_back(encoded.bytes);
    pair.settle();
    pair.source.handle_encoded(pair.now, encoded.id, size, encoded.counts);
    pair.settle();
    assert!(pair.there.runs() && !pair.here.runs());
    assert_eq!(pair.moved().term, Term(2));
}

#[test]
fn a_closing_batch_that_arrives_after_its_withdrawal_prepares_nothing() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.source.switchover(pair.now, SwitchoverOptions::default()).unwrap();
    while pair.source.phase() != SourcePhase::Final || pair.ship() || pair.batches.is_empty() {
        pair.source_steps();
        if pair.source.phase() != SourcePhase::Final {
            pair.ship();
            pair.deliver();
            pair.shadow_steps();
        }
    }
    pair.source.cancel_switchover().unwrap();
    let late = std::mem::take(&mut pair.batches);
    pair.settle();
    late.into_iter().for_each(|bytes| pair.arrives(bytes));
    pair.settle();
    assert_eq!(pair.shadow.phase(), ShadowPhase::Following);
    switchover(&mut pair, SwitchoverOptions::default());
    assert_eq!(pair.moved().epoch.0, 2);
}

#[test]
fn batches_are_applied_in_their_order_or_not_at_all() {
    let mut pair = Pair::new(4);
    let batch_of = |pair: &mut Pair, byte| {
        pair.here.write(1, byte);
        pair.run_for(Duration::ZERO);
        pair.source.handle_harvest(pair.now, &pair.here.harvest().unwrap());
        let plan = pair.source.take_plan(pair.now).unwrap();
        pair.encoder.encode(plan, &pair.here, false).unwrap().bytes
    };
    pair.settle();
    let (older, newer) = (batch_of(&mut pair, 1), batch_of(&mut pair, 2));
    let Pair { image, there, .. } = &mut pair;
    let image = image.as_mut().unwrap();
    let mut apply = |bytes: &[u8]| image.apply(Batch::parse(bytes).unwrap(), there);
    assert!(apply(&newer).is_err(), "the one before is missing");
    apply(&older).unwrap();
    assert!(apply(&older).is_err(), "a second time");
    apply(&newer).unwrap();
    assert_eq!(there.memory()[PAGE_SIZE], 2);
}

#[test]
fn batches_that_overtake_each_other_are_put_in_order_and_the_source_hears_so() {
    let mut pair = Pair::new(2_000);
    (0..1_500).for_each(|page| pair.here.write(page, 1));
    while pair.batches.len() < 5 {
        pair.source_steps();
        pair.ship();
        pair.deliver_messages();
    }
    let mut flying: Vec<_> = std::mem::take(&mut pair.batches).into();
    let first = flying.remove(0);
    flying.into_iter().rev().for_each(|bytes| pair.arrives(bytes));
    assert_eq!(pair.shadow.status().counts.total(), 0, "all of them wait for the first");
    pair.arrives(first);
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.here.memory(), pair.there.memory());
    assert_eq!(pair.source.status().debt, PageCount::ZERO);
}

#[test]
fn no_more_is_on_its_way_than_the_shadow_granted_in_the_final_epoch_too() {
    let window = Bytes::kib(600);
    let config = ShadowConfig {
        window,
        ..ShadowConfig::default()
    };
    let mut pair = Pair::with(2_000, config);
    let mut most = 0;
    (0..1_500).for_each(|page| pair.here.write(page, u8::try_from(page % 250 + 1).unwrap()));
    let noise = |pair: &Pair, seed| {
        let mut rng = umbra_units::Rng::new(seed);
        rng.fill(&mut pair.here.inner.lock().unwrap().memory[..1_500 * PAGE_SIZE]);
        pair.here.inner.lock().unwrap().dirty.extend(0..1_500);
    };
    noise(&pair, 1);
    for round in 0..200 {
        pair.source_steps();
        pair.ship();
        let outstanding: usize = pair.batches.iter().map(Vec::len).sum();
        most = most.max(outstanding);
        assert!(
            Bytes::of_len(outstanding) <= window,
            "{outstanding} bytes are on their way"
        );
        pair.deliver();
        pair.shadow_steps();
        pair.now = pair.now + Duration::from_millis(3);
        pair.source.handle_time(pair.now);
        pair.shadow.handle_time(pair.now);
        if round == 60 {
            noise(&pair, 2);
            let options = SwitchoverOptions {
                downtime_limit: Duration::from_secs(60),
                ..SwitchoverOptions::default()
            };
            pair.source.switchover(pair.now, options).unwrap();
        }
    }
    assert!(most > 400 << 10, "the window was used: {most}");
    assert!(pair.there.runs());
    assert_eq!(pair.here.memory(), pair.there.memory());
}

#[test]
fn a_shadow_that_holds_what_was_never_made_ends_the_session() {
    let mut pair = following(10);
    let (through, room) = (umbra_units::BatchId(1_000), Bytes::mib(1));
    let (left, staging) = (PageCount::ZERO, PageCount::ZERO);
    let held = Message::Held {
        through,
        room,
        left,
        staging,
    };
    pair.source.handle_message(pair.now, held);
    pair.source_steps();
    assert!(matches!(
        &pair.source_end,
        Some(source::Outcome::Stayed {
            fault: Some(Fault::PeerMisbehaved(_)),
            ..
        })
    ));
    assert!(pair.here.runs());
}

#[test]
fn a_page_that_does_not_match_its_hash_ends_the_session_and_the_guest_stays() {
    let mut pair = Pair::new(50);
    pair.run_for(Duration::from_secs(1));
    pair.here.write(3, 1);
    pair.source.handle_harvest(pair.now, &pair.here.harvest().unwrap());
    let plan = pair.source.take_plan(pair.now).unwrap();
    let mut bytes = pair.encoder.encode(plan, &pair.here, false).unwrap().bytes;
    *bytes.last_mut().unwrap() ^= 1;
    pair.apply(&bytes);
    pair.settle();
    assert!(matches!(
        &pair.shadow_end,
        Some(shadow::Outcome::Dropped {
            fault: Some(Fault::PeerMisbehaved(_)),
            ..
        })
    ));
    let ended = matches!(
        &pair.source_end,
        Some(source::Outcome::Stayed {
            fault: Some(Fault::PeerEnded(_)),
            ..
        })
    );
    assert!(ended, "{:?}", pair.source_end);
    assert!(pair.here.runs());
}

#[test]
fn a_debt_that_never_shrinks_is_named_when_the_timeout_strikes() {
    let mut pair = Pair::new(2_000);
    pair.run_for(Duration::from_secs(1));
    pair.source.handle_link(LinkFacts {
        rate: Bandwidth(32 << 10),
        rtt: Duration::from_millis(1),
    });
    let options = SwitchoverOptions {
        timeout: Duration::from_secs(2),
        ..SwitchoverOptions::default()
    };
    pair.source.switchover(pair.now, options).unwrap();
    for round in 0..300u32 {
        (0..1_000).for_each(|page| pair.here.write(page, u8::try_from(round % 250 + 1).unwrap()));
        pair.run_for(Duration::from_millis(10));
    }
    let status = pair.source.status();
    assert!(pair.here.runs() && !status.switching, "{status:?}");
}

/// A pair whose source follows, with the outputs of everything before taken.
fn following(pages: u64) -> Pair {
    let mut pair = Pair::new(pages);
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.source.phase(), SourcePhase::Following);
    pair
}

fn number(byte: u8) -> Vec<StateRecord> {
    vec![StateRecord {
        kind: "number".to_owned(),
        version: 1,
        bytes: vec![byte],
    }]
}

// The tests below began as seeds of the simulator; each says what was wrong there.

#[test]
fn nothing_is_copied_before_writes_are_recorded() {
    // A page copied before recording began was written again in between, and nobody ever knew.
    let mut pair = Pair::new(10);
    let room = Bytes::mib(1);
    pair.source
        .handle_message(pair.now, Message::Welcome { version: 2, room });
    assert_eq!(pair.source.take_plan(pair.now), None);
    pair.source.handle_tracked(pair.now, &Harvest::default());
    assert_eq!(pair.source.take_plan(pair.now).unwrap().pages.len(), 10);
}

#[test]
fn the_answers_of_a_withdrawn_attempt_are_not_taken_for_those_of_the_next() {
    // A host slow to save answered the first attempt during the second: the guest woke up with old registers.
    let (mut pair, nothing) = (following(10), Harvest::default());
    let now = pair.now;
    pair.source.switchover(now, SwitchoverOptions::default()).unwrap();
    pair.source.handle_harvest(now, &nothing);
    assert_eq!(pair.source.phase(), SourcePhase::Final);
    pair.source.handle_paused(now);
    pair.source.cancel_switchover().unwrap();
    pair.source.switchover(now, SwitchoverOptions::default()).unwrap();

    pair.source.handle_harvest(now, &nothing);
    assert_eq!(pair.source.phase(), SourcePhase::Final, "the next attempt");
    pair.source.handle_saved(now, number(1));
    pair.source.handle_harvest(now, &nothing);
    pair.source.handle_harvest(now, &nothing);
    assert_eq!(pair.source.take_plan(now), None);

    pair.source.handle_paused(now);
    pair.source.handle_harvest(now, &nothing);
    pair.source.handle_saved(now, number(2));
    pair.source.handle_harvest(now, &nothing);
    let close = pair.source.take_plan(now).unwrap().close.unwrap();
    assert_eq!(close.records, number(2));
}

#[test]
fn an_attempt_withdrawn_before_its_last_batch_is_encoded_closes_nothing() {
    // The last batch was copied from a guest that ran again, and the shadow called itself prepared.
    let (mut pair, nothing) = (following(10), Harvest::default());
    let now = pair.now;
    pair.source.switchover(now, SwitchoverOptions::default()).unwrap();
    pair.source.handle_harvest(now, &nothing);
    pair.source.handle_paused(now);
    pair.source.handle_harvest(now, &nothing);
    pair.source.handle_saved(now, number(1));
    pair.source.handle_harvest(now, &nothing);
    let plan = pair.source.take_plan(now).unwrap();
    assert!(plan.close.is_some());
    pair.source.cancel_switchover().unwrap();
    let encoded = pair.encoder.encode(plan, &pair.here, false).unwrap();
    assert_eq!(Batch::parse(&encoded.bytes).unwrap().close, None);
}

/// The shadow stands prepared for an epoch that the source took back without the shadow hearing of it.
fn taken_back_unheard() -> Pair {
    let mut pair = following(10);
    pair.lose = |message| matches!(message, Message::Prepared { .. } | Message::Withdraw { .. });
    switchover(
        &mut pair,
        SwitchoverOptions {
            pause_limit: Duration::from_millis(100),
            ..SwitchoverOptions::default()
        },
    );
    assert!(pair.here.runs());
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::Following, ShadowPhase::Prepared)
    );
    pair
}

#[test]
fn a_page_of_the_next_epoch_takes_the_last_one_back() {
    // Pages overtook the word that the epoch was taken back: the shadow stood prepared to run a mixture of two.
    let mut pair = taken_back_unheard();
    pair.here.write(5, 9);
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.shadow.phase(), ShadowPhase::Following);
    assert!(pair.shadow.vouch().is_err());

    pair.lose = |_| false;
    switchover(&mut pair, SwitchoverOptions::default());
    assert_eq!(pair.moved().epoch, umbra_units::Epoch(2));
    assert_eq!(pair.here.memory(), pair.there.memory());
}

#[test]
fn a_late_withdrawal_of_an_old_epoch_leaves_the_next_alone() {
    // The late word for the first epoch unmade the second, and go found nobody prepared.
    let mut pair = taken_back_unheard();
    pair.lose = |message| matches!(message, Message::Prepared { .. });
    switchover(&mut pair, SwitchoverOptions::default());
    let first = Message::Withdraw {
        epoch: umbra_units::Epoch(1),
        text: "late".to_owned(),
    };
    assert_eq!(pair.shadow.phase(), ShadowPhase::Prepared);
    pair.shadow.handle_message(pair.now, first);
    assert_eq!(pair.shadow.phase(), ShadowPhase::Prepared);
}

#[test]
fn a_shadow_that_starts_on_an_operators_word_runs_no_mixture_and_is_written_to_no_more() {
    // The word came while a page of the next epoch was being applied.
    let mut pair = taken_back_unheard();
    pair.shadow.vouch().unwrap();
    pair.here.write(5, 9);
    let harvest = pair.here.harvest().unwrap();
    pair.source.handle_harvest(pair.now, &harvest);
    pair.ship();
    let late = pair.batches.pop_front().unwrap();
    let batch = |bytes: &[u8]| Batch::parse(bytes).unwrap();
    let image = pair.image.as_mut().unwrap();
    image.apply(batch(&late), &pair.there).unwrap();
    pair.shadow_steps();
    assert!(!pair.there.runs());
    assert!(matches!(pair.shadow_end, Some(shadow::Outcome::Dropped { .. })));

    let image = pair.image.as_mut().unwrap();
    image.seal(umbra_units::Epoch(2)).unwrap();
    pair.here.write(6, 9);
    let harvest = pair.here.harvest().unwrap();
    pair.source.handle_harvest(pair.now, &harvest);
    pair.ship();
    let later = pair.batches.pop_front().unwrap();
    assert!(pair.image.as_mut().unwrap().apply(batch(&later), &pair.there).is_err());
}

#[test]
fn a_shadow_that_was_ended_before_it_heard_go_hands_the_guest_back() {
    // It could say that it never ran the guest, and the source waited for an operator all the same.
    let mut pair = following(10);
    pair.lose = |message| matches!(message, Message::Go { .. });
    switchover(&mut pair, SwitchoverOptions::default());
    assert_eq!(
        (pair.source.phase(), pair.shadow.phase()),
        (SourcePhase::HandedOver, ShadowPhase::Prepared)
    );
    pair.shadow.end("an operator wants it so").unwrap();
    pair.settle();
    assert!(pair.here.runs() && !pair.there.runs());
    assert_eq!(pair.source.term(), Term(3));
}

/// Ask for a cut and let everything come of it that can.
fn cut(pair: &mut Pair) -> CutReport {
    pair.source.cut(pair.now, CutOptions::default()).unwrap();
    pair.run_for(Duration::from_secs(1));
    pair.source.status().committed.expect("the shadow committed it").report
}

#[test]
fn an_epoch_is_cut_while_the_guest_runs_on_and_runs_again_when_its_source_is_dead() {
    let mut pair = following(200);
    (0..50).for_each(|page| pair.here.write(page, 1));
    let report = cut(&mut pair);
    assert!(pair.here.runs(), "nobody but the shadow took notice");
    let committed = pair.here.memory();
    assert_eq!((report.epoch.0, report.reason), (1, CutReason::Asked));
    assert_eq!(pair.shadow.status().committed.unwrap().0, report.epoch);

    (20..100).for_each(|page| pair.here.write(page, 2));
    pair.here.inner.lock().unwrap().number = 43;
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.there.memory(), pair.here.memory(), "following goes on over it");

    pair.shadow.handle_link_lost("the source is dead");
    assert_eq!(pair.shadow.phase(), ShadowPhase::Following, "it waits for an operator");
    pair.shadow.vouch().unwrap();
    pair.shadow_steps();
    assert!(pair.there.runs());
    assert_eq!(pair.there.memory(), committed, "exactly what the guest was at the cut");
    assert_eq!(pair.there.inner.lock().unwrap().number, 42);
    assert_eq!(pair.shadow_end, Some(shadow::Outcome::Runs(Term(4))));
}

#[test]
fn epochs_are_cut_one_after_the_other_and_the_newest_counts() {
    let mut pair = following(100);
    for round in 1..=5u8 {
        (0..u64::from(round) * 10).for_each(|page| pair.here.write(page, round));
        assert_eq!(cut(&mut pair).epoch.0, u64::from(round));
        pair.here.write(99, round);
        pair.run_for(Duration::from_millis(300));
    }
    pair.shadow.vouch().unwrap();
    pair.shadow_steps();
    let memory = pair.there.memory();
    assert_eq!((memory[0], memory[49 * PAGE_SIZE], memory[99 * PAGE_SIZE]), (5, 5, 4));
}

#[test]
fn a_page_planned_before_the_pause_is_copied_before_it() {
    // Copied after the guest ran on it would be newer than the cut, and no digest would see it.
    let mut pair = following(100);
    (0..50).for_each(|page| pair.here.write(page, 1));
    let harvest = pair.here.harvest().unwrap();
    pair.source.handle_harvest(pair.now, &harvest);
    let plan = pair.source.take_plan(pair.now).unwrap();
    let options = CutOptions {
        settle: Duration::ZERO,
        ..CutOptions::default()
    };
    pair.source.cut(pair.now, options).unwrap();
    pair.source.handle_time(pair.now);
    pair.source_steps();
    assert_eq!(
        pair.source.phase(),
        SourcePhase::Following,
        "the guest is not stopped yet"
    );
    assert_eq!(pair.source.take_plan(pair.now), None, "and nothing more is planned");

    let encoded = pair.encode(plan);
    let size = Bytes::of_len(encoded.bytes.len());
    pair.batches.push_back(encoded.bytes);
    pair.source.handle_encoded(pair.now, encoded.id, size, encoded.counts);
    assert_eq!(pair.source.phase(), SourcePhase::Cutting);
    pair.settle();
    assert!(pair.here.runs());
    assert_eq!(pair.source.status().committed.unwrap().epoch.0, 1);
}

#[test]
fn what_is_written_after_the_cut_is_not_in_it_and_ships_after_it() {
    let mut pair = following(100);
    (0..80).for_each(|page| pair.here.write(page, 1));
    pair.source.cut(pair.now, CutOptions::default()).unwrap();
    while pair.captured.is_none() {
        pair.now = pair.now.max(pair.source.poll_timeout());
        pair.source.handle_time(pair.now);
        pair.source_steps();
        pair.deliver_messages();
    }
    // The guest runs, and writes before a single page of the cut was read.
    assert!(pair.here.runs());
    (0..100).for_each(|page| pair.here.write(page, 9));
    let harvest = pair.here.harvest().unwrap();
    pair.source.handle_harvest(pair.now, &harvest);
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.there.memory(), pair.here.memory());
    pair.shadow.vouch().unwrap();
    pair.shadow_steps();
    assert_eq!(pair.there.memory()[..80 * PAGE_SIZE], {
        let mut page = [0; PAGE_SIZE];
        page[..100].fill(1);
        page.repeat(80)
    });
    assert!(pair.there.memory()[80 * PAGE_SIZE..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_cut_that_fails_anywhere_leaves_the_guest_running_and_loses_no_write() {
    for fails_at in 0..40 {
        let mut pair = following(300);
        (0..290).for_each(|page| pair.here.write(page, 1));
        pair.source.cut(pair.now, CutOptions::default()).unwrap();
        for turn in 0..40 {
            if turn == fails_at {
                let _ = match turn % 3 {
                    0 => pair.source.cancel_cut(pair.now),
                    1 => {
                        pair.source.handle_link_up(pair.now, false);
                        pair.source.handle_link_up(pair.now, true);
                        Ok(())
                    }
                    _ => {
                        pair.now = pair.now + CutOptions::default().timeout;
                        pair.source.handle_time(pair.now);
                        Ok(())
                    }
                };
                pair.here.write(turn, 2);
            }
            // One thing at a time, so that it fails between any two.
            let step = pair.source.poll_output();
            match step {
                Some(source::Output::Do(step)) => pair.source_step(step),
                Some(source::Output::Send(message)) => pair.to_shadow.push_back(message.encode()),
                Some(source::Output::Event(event)) => pair.events.push(event),
                Some(source::Output::End(outcome)) => panic!("{outcome:?}"),
                None => {
                    if let Some(plan) = pair.source.take_plan(pair.now) {
                        let encoded = pair.encode(plan);
                        let size = Bytes::of_len(encoded.bytes.len());
                        pair.batches.push_back(encoded.bytes);
                        pair.source.handle_encoded(pair.now, encoded.id, size, encoded.counts);
                    } else {
                        pair.now = pair.now.max(pair.source.poll_timeout());
                        pair.source.handle_time(pair.now);
                    }
                }
            }
        }
        pair.run_for(Duration::from_secs(2));
        assert!(pair.here.runs() && pair.source_end.is_none(), "failed at {fails_at}");
        assert_eq!(pair.source.phase(), SourcePhase::Following);
        assert!(pair.captured.is_none(), "what was captured is let go of");
        assert_eq!(pair.source.status().debt, PageCount::ZERO);
        assert_eq!(pair.there.memory(), pair.here.memory(), "failed at {fails_at}");
        cut(&mut pair);
        switchover(&mut pair, SwitchoverOptions::default());
        assert!(pair.there.runs());
    }
}

#[test]
fn pages_captured_for_a_cut_that_was_taken_back_are_not_wanted() {
    // They were kept until the next cut: as much memory as they are, and the guest's writes to them waited for copies.
    let (mut pair, nothing) = (following(10), Harvest::default());
    let now = pair.now;
    pair.source.cut(now, CutOptions::default()).unwrap();
    pair.source.handle_harvest(now, &nothing);
    pair.source.handle_paused(now);
    pair.source.handle_harvest(now, &nothing);
    pair.source.handle_saved(now, number(1));
    pair.source.handle_harvest(now, &nothing);
    let asked: Vec<_> = std::iter::from_fn(|| pair.source.poll_output()).collect();
    assert!(
        asked
            .iter()
            .any(|output| matches!(output, source::Output::Do(source::Step::Capture(..))))
    );
    pair.source.cancel_cut(now).unwrap();
    assert!(
        !pair.source.handle_captured(now, CaptureBy::Copy),
        "of a cut that is over"
    );

    pair.source.cut(now, CutOptions::default()).unwrap();
    assert!(
        !pair.source.handle_captured(now, CaptureBy::Copy),
        "and not of the next"
    );
}

#[test]
fn a_step_of_a_cut_that_fails_is_only_a_cut_that_failed() {
    for step in [StepKind::Pause, StepKind::Harvest, StepKind::Save, StepKind::Capture] {
        let mut pair = following(50);
        (0..40).for_each(|page| pair.here.write(page, 1));
        pair.source.cut(pair.now, CutOptions::default()).unwrap();
        let mut failed = false;
        for _ in 0..100 {
            match pair.source.poll_output() {
                Some(source::Output::Do(asked))
                    if asked.kind() == step && pair.source.phase() == SourcePhase::Cutting && !failed =>
                {
                    failed = true;
                    let fault = Fault::Host("as the test wants it".to_owned());
                    pair.source.handle_step_failed(pair.now, step, fault);
                }
                Some(source::Output::Do(asked)) => pair.source_step(asked),
                Some(source::Output::Send(message)) => pair.to_shadow.push_back(message.encode()),
                Some(source::Output::Event(event)) => pair.events.push(event),
                Some(source::Output::End(outcome)) => panic!("{step:?}: {outcome:?}"),
                None => {
                    pair.ship();
                    pair.deliver();
                    pair.now = pair.now.max(pair.source.poll_timeout());
                    pair.source.handle_time(pair.now);
                }
            }
        }
        let told = |event: &Event| matches!(event, Event::CutFailed { text } if text.contains("as the test wants it"));
        assert!(failed && pair.events.iter().any(told), "{step:?}");
        assert!(pair.here.runs());
        cut(&mut pair);
        assert_eq!(pair.there.memory(), pair.here.memory());
    }
}

#[test]
fn a_switchover_after_a_cut_and_a_cut_after_a_switchover_that_was_cancelled() {
    let mut pair = following(100);
    (0..50).for_each(|page| pair.here.write(page, 1));
    cut(&mut pair);
    pair.here.write(7, 7);
    pair.there.inner.lock().unwrap().fail_restore = true;
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(pair.here.runs(), "the shadow could not load the state");
    assert_eq!(
        pair.shadow.status().committed.unwrap().0.0,
        1,
        "and still has the epoch from before"
    );
    pair.there.inner.lock().unwrap().fail_restore = false;
    assert_eq!(
        cut(&mut pair).epoch.0,
        3,
        "the final epoch that was taken back was the second"
    );
    pair.here.write(8, 8);
    switchover(&mut pair, SwitchoverOptions::default());
    assert!(pair.there.runs() && !pair.here.runs());
    assert_eq!(pair.there.memory(), pair.here.memory());
}

#[test]
fn a_final_epoch_taken_back_leaves_the_committed_one_whole() {
    let mut pair = following(100);
    (0..50).for_each(|page| pair.here.write(page, 1));
    cut(&mut pair);
    let committed = pair.here.memory();
    (30..70).for_each(|page| pair.here.write(page, 2));
    pair.there.inner.lock().unwrap().fail_restore = true;
    switchover(&mut pair, SwitchoverOptions::default());
    pair.there.inner.lock().unwrap().fail_restore = false;
    (60..90).for_each(|page| pair.here.write(page, 3));
    pair.run_for(Duration::from_secs(1));
    pair.shadow.vouch().unwrap();
    pair.shadow_steps();
    assert!(pair.there.runs());
    assert_eq!(pair.there.memory(), committed);
}

#[test]
fn a_shadow_with_little_staging_makes_the_source_cut_by_itself() {
    let config = ShadowConfig {
        staging: Some(Bytes(40 * PAGE_SIZE as u64)),
        ..ShadowConfig::default()
    };
    let mut pair = Pair::with(400, config);
    (0..400).for_each(|page| pair.here.write(page, 1));
    pair.run_for(Duration::from_secs(1));
    cut(&mut pair);
    for round in 2..60u8 {
        (0..8).for_each(|page| pair.here.write(u64::from(round) * 6 + page, round));
        pair.run_for(Duration::from_millis(50));
        assert!(pair.shadow.status().staged.used <= PageCount(40));
    }
    pair.run_for(Duration::from_secs(1));
    let cuts = pair.events.iter().filter(|event| {
        matches!(
            event,
            Event::CutBegan {
                reason: CutReason::Staging,
                ..
            }
        )
    });
    assert!(cuts.count() > 5);
    assert!(
        !pair
            .events
            .iter()
            .any(|event| matches!(event, Event::EpochGivenUp { .. }))
    );
    assert_eq!(pair.there.memory(), pair.here.memory(), "following goes on");
}

#[test]
fn a_committed_epoch_that_finds_no_room_is_given_up_and_following_goes_on() {
    let config = ShadowConfig {
        staging: Some(Bytes(10 * PAGE_SIZE as u64)),
        ..ShadowConfig::default()
    };
    let mut pair = Pair::with(400, config);
    (0..400).for_each(|page| pair.here.write(page, 1));
    pair.run_for(Duration::from_secs(1));
    cut(&mut pair);
    (0..400).for_each(|page| pair.here.write(page, 2));
    pair.run_for(Duration::from_secs(3));
    assert!(
        pair.events
            .iter()
            .any(|event| matches!(event, Event::EpochGivenUp { .. }))
    );
    assert_eq!(pair.there.memory(), pair.here.memory());
    let committed = pair
        .shadow
        .status()
        .committed
        .expect("the cut that followed was committed");
    assert!(committed.0.0 >= 2);
    pair.shadow.vouch().unwrap();
    pair.shadow_steps();
    assert!(pair.there.runs());
}

#[test]
fn a_source_that_ends_its_session_takes_the_committed_epoch_with_it() {
    let mut pair = following(50);
    cut(&mut pair);
    pair.source.end("no more").unwrap();
    pair.settle();
    assert!(matches!(pair.shadow_end, Some(shadow::Outcome::Dropped { .. })));
    assert!(pair.here.runs() && pair.shadow.vouch().is_err());
}

#[test]
fn an_audited_cut_compares_both_memories_before_the_guest_runs_on() {
    let mut pair = following(50);
    (0..40).for_each(|page| pair.here.write(page, 1));
    let options = CutOptions {
        audit: true,
        ..CutOptions::default()
    };
    pair.source.cut(pair.now, options.clone()).unwrap();
    pair.run_for(Duration::from_secs(1));
    assert!(pair.source.status().committed.unwrap().report.audited);

    // A write that no log ever saw.
    pair.here.inner.lock().unwrap().memory[5 * PAGE_SIZE] = 0xee;
    pair.source.cut(pair.now, options.clone()).unwrap();
    pair.run_for(Duration::from_secs(1));
    assert!(pair.here.runs() && pair.events.iter().any(|event| matches!(event, Event::CutFailed { .. })));
    pair.source.cut(pair.now, options).unwrap();
    pair.run_for(Duration::from_secs(1));
    assert_eq!(pair.source.status().committed.unwrap().epoch.0, 2, "it was owed again");
    assert_eq!(pair.there.memory()[5 * PAGE_SIZE], 0xee);
}
