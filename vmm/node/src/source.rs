//! One guest that runs here, and the loop that keeps its shadow.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use umbra_core::error::Fault;
use umbra_core::event::Event;
use umbra_core::guest::{Captured, Guest, Harvest, PageReader, StateRecord};
use umbra_core::heat::HeatMap;
use umbra_core::phase::SourcePhase;
use umbra_core::predict::LinkFacts;
use umbra_core::report::{CutReport, SwitchoverReport};
use umbra_core::source::{
    CutOptions, Encoder, Outcome, Output, Source, SourceConfig, SourceStatus, Step, StepKind, SwitchoverOptions,
};
use umbra_core::wire::Message;
use umbra_paths::{Class, LinkEvent};
use umbra_quic::{LinkHandle, LinkReceiver, LinkSender, Stats};
use umbra_units::{Bytes, GuestId, Now, SessionId, Term};

use crate::clock::Clock;
use crate::encode::{Done, EncodeConfig, EncodeStatus, Encoders};
use crate::error::{CommandError, StartError, SwitchoverError};
use crate::hands::{Answers, Hand};
use crate::link::{Mouth, facts_of};

/// Batches that are ready for an encoding thread, beside those under way.
const ENCODE_AHEAD: usize = 2;
/// How often the link's rate is looked at while nothing else happens.
const LOOK_AT_LINK: Duration = Duration::from_millis(20);
/// Events that a slow listener may be behind before it misses some.
const EVENTS_KEPT: usize = 256;

/// How a guest is protected.
#[derive(Debug, Clone, PartialEq)]
pub struct ProtectConfig {
    /// Pace and batch size.
    pub source: SourceConfig,
    /// Page contents kept to make deltas against.
    pub cache: Bytes,
    /// How much of this host encoding may use, and for what.
    pub encode: EncodeConfig,
}

impl Default for ProtectConfig {
    fn default() -> Self {
        Self {
            source: SourceConfig::default(),
            cache: umbra_core::source::DEFAULT_CACHE,
            encode: EncodeConfig::default(),
        }
    }
}

/// What a protected guest is called, and who runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestIdentity {
    /// Which guest.
    pub guest: GuestId,
    /// The term it runs in here.
    pub term: Term,
}

/// A session's account of itself, link and all.
#[derive(Debug, Clone)]
pub struct ProtectionStatus {
    /// What the state machine says.
    pub source: SourceStatus,
    /// What encoding chose, and what came of it.
    pub encode: EncodeStatus,
    /// What the link says; `None` once it is over.
    pub link: Option<Stats>,
    /// The last thing that went wrong, on either side, if anything did.
    pub last_error: Option<String>,
    /// How old the committed epoch is: from its instant until now.
    pub committed_age: Option<Duration>,
}

/// A guest that is being shadowed: a handle to the session's loop. Dropping it does not end the session.
#[derive(Debug, Clone)]
pub struct Protection {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<Event>,
    outcome: watch::Receiver<Option<Outcome>>,
}

#[derive(Debug)]
enum Command {
    Status(oneshot::Sender<ProtectionStatus>),
    Heat(usize, oneshot::Sender<HeatMap>),
    Switchover(
        SwitchoverOptions,
        oneshot::Sender<Result<SwitchoverReport, SwitchoverError>>,
    ),
    CancelSwitchover(oneshot::Sender<Result<(), CommandError>>),
    Cut(CutOptions, oneshot::Sender<Result<CutReport, CommandError>>),
    CancelCut(oneshot::Sender<Result<(), CommandError>>),
    HoldCuts(bool, oneshot::Sender<()>),
    End(String, oneshot::Sender<Result<(), CommandError>>),
    Reclaim(oneshot::Sender<Result<(), CommandError>>),
}

impl Protection {
    /// Start shadowing `guest`, which runs here, over `link`. Needs a tokio runtime.
    pub fn start(
        guest: Arc<dyn Guest>,
        identity: GuestIdentity,
        session: SessionId,
        link: LinkHandle,
        config: ProtectConfig,
    ) -> Result<Self, StartError> {
        let (commands, inbox) = mpsc::channel(16);
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (outcome_in, outcome) = watch::channel(None);
        let (sender, receiver) = link.split();
        let task = SourceTask::new(guest, identity, session, sender, config, events.clone())?;
        tokio::spawn(async move {
            let outcome = task.run(receiver, inbox).await;
            outcome_in.send_replace(Some(outcome));
        });
        Ok(Self {
            commands,
            events,
            outcome,
        })
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Where everything stands.
    pub async fn status(&self) -> Result<ProtectionStatus, CommandError> {
        self.ask(Command::Status).await
    }

    /// How hot the guest's memory is, in at most so many regions.
    pub async fn heat_map(&self, regions: usize) -> Result<HeatMap, CommandError> {
        self.ask(|answer| Command::Heat(regions, answer)).await
    }

    /// Move the guest to its shadow. Returns when it runs there, or with the reason why it does not.
    pub async fn switchover(&self, options: SwitchoverOptions) -> Result<SwitchoverReport, SwitchoverError> {
        let over = |error: CommandError| SwitchoverError {
            text: error.to_string(),
            fault: None,
        };
        self.ask(|answer| Command::Switchover(options, answer))
            .await
            .map_err(over)?
    }

    /// Take back a switchover that has not reached its commit point.
    pub async fn cancel_switchover(&self) -> Result<(), CommandError> {
        self.ask(Command::CancelSwitchover).await?
    }

    /// Cut an epoch while the guest runs on. Returns when the shadow has committed it, or with the reason why it was not.
    pub async fn cut(&self, options: CutOptions) -> Result<CutReport, CommandError> {
        self.ask(|answer| Command::Cut(options, answer)).await?
    }

    /// Take back a cut whose last page is not on its way yet.
    pub async fn cancel_cut(&self) -> Result<(), CommandError> {
        self.ask(Command::CancelCut).await?
    }

    /// Before and after somebody else stops the guest or lets it run: nothing here does meanwhile. Returns when nothing does.
    pub async fn hold_cuts(&self, hold: bool) -> Result<(), CommandError> {
        self.ask(|answer| Command::HoldCuts(hold, answer)).await
    }

    /// End the session; the guest stays here.
    pub async fn end(&self, why: &str) -> Result<(), CommandError> {
        self.ask(|answer| Command::End(why.to_owned(), answer)).await?
    }

    /// Take back a guest that was handed over and never confirmed. The caller vouches that the shadow is dead.
    pub async fn reclaim(&self) -> Result<(), CommandError> {
        self.ask(Command::Reclaim).await?
    }

    /// How the session ended, once it has.
    pub async fn outcome(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        let ended = outcome
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|outcome| outcome.clone());
        // The task never goes away without an outcome unless it panicked or the runtime is shutting down.
        ended.unwrap_or_else(|| std::panic::panic_any("the session's task ended without an outcome"))
    }

    /// How the session ended, if it has.
    pub fn ended(&self) -> Option<Outcome> {
        self.outcome.borrow().clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, CommandError> {
        let (answer, answered) = oneshot::channel();
        let over = || CommandError::Over(self.ended().map_or_else(String::new, |outcome| describe(&outcome)));
        self.commands.send(command(answer)).await.map_err(|_| over())?;
        answered.await.map_err(|_| over())
    }
}

/// An outcome in words for an operator.
pub fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Moved(report) => format!("the guest moved in term {}", report.term),
        Outcome::Stayed { text, .. } => text.clone(),
    }
}

/// What the hands answer.
enum Answer {
    Tracked(Harvest),
    Harvested(Harvest),
    Paused,
    Saved(Vec<StateRecord>),
    Captured(Arc<dyn Captured>),
    Resumed,
    Encoder(Done),
    StepFailed(StepKind, Fault),
}

struct SourceTask {
    source: Source,
    guest: Arc<dyn Guest>,
    sender: LinkSender,
    mouth: Mouth,
    guest_hand: Hand<Step>,
    encoders: Encoders,
    answers: mpsc::UnboundedReceiver<(Now, Answer)>,
    events: broadcast::Sender<Event>,
    clock: Clock,
    /// Plans given to the encoders and not yet answered, and how many there may be.
    encoding: usize,
    encoding_most: usize,
    facts: LinkFacts,
    /// The pages of the cut under way.
    captured: Option<Arc<dyn Captured>>,
    cutter: Option<oneshot::Sender<Result<CutReport, CommandError>>>,
    /// Who waits for this task to keep its hands off the guest.
    holders: Vec<oneshot::Sender<()>>,
    mover: Option<oneshot::Sender<Result<SwitchoverReport, SwitchoverError>>>,
    last_error: Option<String>,
    outcome: Option<Outcome>,
}

impl SourceTask {
    fn new(
        guest: Arc<dyn Guest>,
        identity: GuestIdentity,
        session: SessionId,
        sender: LinkSender,
        config: ProtectConfig,
        events: broadcast::Sender<Event>,
    ) -> Result<Self, StartError> {
        let spaces = guest.spaces();
        let clock = Clock::new();
        let (answer, answers) = mpsc::unbounded_channel();
        let source = Source::new(
            config.source,
            identity.guest,
            session,
            identity.term,
            guest.describe(),
            &spaces,
        );
        // The session is drawn by chance and nothing the guest could know.
        let [.., a, b, c, d, e, f, g, h] = session.0;
        let encoder = Encoder::new(&spaces, config.cache).keyed(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        let (link, done) = (sender.clone(), answer.clone());
        let encoders = Encoders::start(
            config.encode,
            encoder,
            clock,
            move |urgent, bytes| {
                let class = if urgent { Class::Urgent } else { Class::Bulk };
                // A link that takes no more is closed, and says so itself.
                let _ = link.send_block_blocking(class, bytes);
            },
            // Nobody listens any more once the session is over.
            move |at, what| drop(done.send((at, Answer::Encoder(what)))),
        )?;
        Ok(Self {
            source,
            guest_hand: start_guest_hand(Arc::clone(&guest), clock, answer)?,
            encoders,
            guest,
            mouth: Mouth::start(sender.clone()),
            sender,
            answers,
            events,
            clock,
            encoding: 0,
            encoding_most: config.encode.threads.max(1) + ENCODE_AHEAD,
            facts: LinkFacts::default(),
            captured: None,
            cutter: None,
            holders: Vec::new(),
            mover: None,
            last_error: None,
            outcome: None,
        })
    }

    async fn run(mut self, mut link: LinkReceiver, mut commands: mpsc::Receiver<Command>) -> Outcome {
        let mut room = self.sender.room();
        let mut look_at_link = tokio::time::interval(LOOK_AT_LINK);
        loop {
            self.perform();
            if let Some(outcome) = self.outcome.take() {
                self.finish(&outcome).await;
                return outcome;
            }
            tokio::select! {
                biased;
                Some((at, answer)) = self.answers.recv() => self.handle_answer(at, answer),
                Some(news) = link.recv() => self.handle_link(news),
                Some(command) = commands.recv() => self.handle_command(command).await,
                Ok(()) = room.changed() => {}
                _ = look_at_link.tick() => self.look_at_link().await,
                () = self.clock.sleep_until(self.source.poll_timeout()) => self.source.handle_time(self.clock.now()),
            }
        }
    }

    /// Do everything the state machine wants done, and keep the encoders busy while the link has room.
    fn perform(&mut self) {
        loop {
            while let Some(output) = self.source.poll_output() {
                match output {
                    Output::Send(message) => self.mouth.say(&message),
                    Output::Do(Step::Audit) => self.encoders.audit(Arc::clone(&self.guest)),
                    // Here and now, not by the hand: what follows is "go".
                    Output::Do(Step::GiveUp) => self.guest.give_up(),
                    Output::Do(Step::Release) => self.captured = None,
                    Output::Do(step) => self.guest_hand.give(step),
                    Output::Event(event) => self.tell(event),
                    Output::End(outcome) => self.outcome = Some(outcome),
                }
            }
            if self.source.is_hands_off() {
                for holder in self.holders.drain(..) {
                    let _ = holder.send(()); // whoever went away does not want it any more
                }
            }
            let urgent = self.source.phase() == SourcePhase::Final;
            if self.encoding >= self.encoding_most || !(urgent || *self.sender.room().borrow() > 0) {
                return;
            }
            let Some(plan) = self.source.take_plan(self.clock.now()) else {
                return;
            };
            self.encoding += 1;
            let hurry = urgent || plan.urgent || self.source.is_switching();
            let from: Arc<dyn PageReader> = match self.captured.clone().filter(|_| plan.captured) {
                Some(captured) => captured,
                None => Arc::clone(&self.guest) as _,
            };
            self.encoders.encode(plan, from, hurry);
        }
    }

    fn handle_answer(&mut self, at: Now, answer: Answer) {
        match answer {
            Answer::Tracked(untouched) => self.source.handle_tracked(at, &untouched),
            Answer::Harvested(harvest) => self.source.handle_harvest(at, &harvest),
            Answer::Paused => self.source.handle_paused(at),
            Answer::Saved(records) => self.source.handle_saved(at, records),
            Answer::Captured(captured) => {
                if self.source.handle_captured(at, captured.by()) {
                    self.captured = Some(captured);
                }
            }
            Answer::Resumed => self.source.handle_resumed(at),
            Answer::Encoder(Done::Audited(differing)) => self.source.handle_audited(at, &differing),
            Answer::Encoder(Done::Encoded(batch, bytes, counts)) => {
                self.encoding -= 1;
                self.source.handle_encoded(at, batch, bytes, counts);
            }
            Answer::StepFailed(step, fault) => {
                self.last_error = Some(fault.to_string());
                self.source.handle_step_failed(at, step, fault);
            }
            Answer::Encoder(Done::Failed(fault)) => {
                self.last_error = Some(fault.to_string());
                self.source.handle_failed(fault);
            }
        }
    }

    fn handle_link(&mut self, news: umbra_quic::Event) {
        use umbra_quic::Event as News;
        let now = self.clock.now();
        match news {
            News::Link(LinkEvent::Message(bytes)) => match Message::decode(&bytes) {
                Ok(message) => self.source.handle_message(now, message),
                Err(malformed) => self.source.handle_failed(malformed.into()),
            },
            News::Link(LinkEvent::Block { .. }) => {
                self.source
                    .handle_failed(Fault::PeerMisbehaved("a shadow sends no pages".to_owned()));
            }
            News::Link(LinkEvent::AllPathsDown) => self.source.handle_link_up(now, false),
            News::Link(LinkEvent::Restored) => self.source.handle_link_up(now, true),
            News::Link(event) => crate::link::log(&event),
            News::Trouble { path, error } => {
                tracing::warn!(%path, %error, "path");
                self.last_error = Some(format!("{path}: {error}"));
            }
            News::Ended(why) => {
                self.last_error = Some(why.to_string());
                self.source.handle_link_lost(&why.to_string());
            }
        }
    }

    async fn handle_command(&mut self, command: Command) {
        let now = self.clock.now();
        // A caller that went away does not want the answer any more.
        match command {
            Command::Status(answer) => drop(answer.send(self.status().await)),
            Command::Heat(regions, answer) => drop(answer.send(self.source.heat_map(regions))),
            Command::Switchover(options, answer) => match self.source.switchover(now, options) {
                Ok(()) => self.mover = Some(answer),
                Err(refused) => drop(answer.send(Err(SwitchoverError {
                    text: refused.0,
                    fault: None,
                }))),
            },
            Command::CancelSwitchover(answer) => drop(answer.send(self.source.cancel_switchover().map_err(Into::into))),
            Command::Cut(options, answer) => match self.source.cut(now, options) {
                Ok(()) => self.cutter = Some(answer),
                Err(refused) => drop(answer.send(Err(refused.into()))),
            },
            Command::CancelCut(answer) => drop(answer.send(self.source.cancel_cut(now).map_err(Into::into))),
            Command::HoldCuts(hold, answer) => {
                self.source.hold_cuts(now, hold);
                self.holders.push(answer);
            }
            Command::End(why, answer) => drop(answer.send(self.source.end(&why).map_err(Into::into))),
            Command::Reclaim(answer) => drop(answer.send(self.source.reclaim().map_err(Into::into))),
        }
    }

    async fn look_at_link(&mut self) {
        let Ok(stats) = self.sender.stats().await else { return };
        let facts = facts_of(&stats.link);
        if facts != self.facts {
            self.facts = facts;
            self.encoders.link(facts.rate);
            self.source.handle_link(facts);
        }
    }

    fn tell(&mut self, event: Event) {
        tracing::info!(?event, "source");
        if let Event::SwitchoverFailed { text } = &event {
            self.last_error = Some(text.clone());
            if let Some(mover) = self.mover.take() {
                let _ = mover.send(Err(SwitchoverError {
                    text: text.clone(),
                    fault: None,
                }));
            }
        }
        let cut = match &event {
            Event::CutFailed { text } => {
                self.last_error = Some(text.clone());
                Some(Err(CommandError::Refused(text.clone())))
            }
            Event::Cut(report) => Some(Ok(**report)),
            _ => None,
        };
        if let Some((cutter, cut)) = cut.and_then(|cut| Some((self.cutter.take()?, cut))) {
            let _ = cutter.send(cut);
        }
        let _ = self.events.send(event);
    }

    async fn status(&self) -> ProtectionStatus {
        let link = self.sender.stats().await.ok();
        let source = self.source.status();
        let now = self.clock.now();
        ProtectionStatus {
            committed_age: source.committed.map(|committed| now.since(committed.at)),
            source,
            encode: self.encoders.status(),
            link,
            last_error: self.last_error.clone(),
        }
    }

    async fn finish(mut self, outcome: &Outcome) {
        if let Some(mover) = self.mover.take() {
            let result = match outcome {
                Outcome::Moved(report) => Ok(**report),
                Outcome::Stayed { fault, text, .. } => Err(SwitchoverError {
                    text: text.clone(),
                    fault: fault.clone(),
                }),
            };
            let _ = mover.send(result);
        }
        self.mouth.close(describe(outcome)).await;
    }
}

/// The hand that touches the guest: it stops it, saves it, lets it run.
fn start_guest_hand(guest: Arc<dyn Guest>, clock: Clock, answers: Answers<Answer>) -> Result<Hand<Step>, StartError> {
    Hand::start("umbra-guest", clock, answers, move |step: Step| {
        let kind = step.kind();
        let done = match step {
            // Recording first: what is written after the look for untouched pages must be in a harvest.
            Step::Track => guest.track(true).map(|()| Some(Answer::Tracked(guest.untouched()))),
            Step::Harvest => guest.harvest().map(|harvest| Some(Answer::Harvested(harvest))),
            Step::Pause => guest.pause().map(|()| Some(Answer::Paused)),
            Step::Save => guest.save().map(|records| Some(Answer::Saved(records))),
            Step::Capture(pages, by) => guest
                .capture(&pages, by)
                .map(|captured| Some(Answer::Captured(captured.into()))),
            Step::Resume => guest.resume().map(|()| Some(Answer::Resumed)),
            Step::Untrack(debt) => {
                guest.put_back(&debt);
                guest.track(false).map(|()| None)
            }
            Step::Audit => unreachable!("audits go to the encoders, who have the table"),
            Step::GiveUp | Step::Release => unreachable!("done by the task itself"),
        };
        done.unwrap_or_else(|error| Some(Answer::StepFailed(kind, error.into())))
    })
}
