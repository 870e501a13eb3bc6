//! A node that holds shadows: waits for a source, follows it, and runs the guest when told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinHandle;
use umbra_core::batch::Batch;
use umbra_core::error::Fault;
use umbra_core::event::Event;
use umbra_core::guest::{Guest, GuestBuilder, Space, StateRecord};
use umbra_core::shadow::{Applied, Image, Outcome, Output, Sequence, Shadow, ShadowConfig, ShadowStatus, Step};
use umbra_core::wire::Message;
use umbra_paths::{LinkConfig, LinkEvent};
use umbra_quic::{Incoming, LinkReceiver, LinkSender, Listener, Refusal, Stats};
use umbra_units::{Epoch, GuestId, Now, PageId, Term};

use crate::clock::Clock;
use crate::error::{CommandError, StartError};
use crate::hands::{Answers, Hand};
use crate::link::Mouth;

/// A source that has been silent on all paths for this long may be replaced by another.
const FORGET_AFTER: Duration = Duration::from_secs(15);
/// How long a source may take to hear that its guest runs here; it asks again over whatever path comes back.
const LINGER: Duration = Duration::from_secs(3600);
/// Batches that may wait to be applied before the link is read no further, so that a source faster than this host's
/// memory is held back instead of being stored.
const APPLY_AHEAD: usize = 64;
/// Events that a slow listener may be behind before it misses some.
const EVENTS_KEPT: usize = 256;

/// A guest that was taken over: it runs here now.
pub struct TakenOver {
    /// The guest, running.
    pub guest: Arc<dyn Guest>,
    /// Which guest.
    pub id: GuestId,
    /// The term it runs in here.
    pub term: Term,
    /// Ends when the source has heard that its guest runs here, or an hour has passed. A process that ends before
    /// leaves a source that does not know; dropping this changes nothing.
    pub farewell: JoinHandle<()>,
}

impl std::fmt::Debug for TakenOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TakenOver")
            .field("id", &self.id)
            .field("term", &self.term)
            .finish_non_exhaustive()
    }
}

/// A shadow node's account of itself.
#[derive(Debug, Clone)]
pub struct ShadowNodeStatus {
    /// What the state machine says.
    pub shadow: ShadowStatus,
    /// What the link says, while there is one.
    pub link: Option<Stats>,
    /// How long ago the committed epoch was committed, if there is one.
    pub committed_age: Option<Duration>,
    /// The last thing that went wrong, on either side, if anything did.
    pub last_error: Option<String>,
}

#[derive(Debug)]
enum Command {
    Status(oneshot::Sender<ShadowNodeStatus>),
    Vouch(oneshot::Sender<Result<(), CommandError>>),
    End(String, oneshot::Sender<Result<(), CommandError>>),
}

/// A handle to a shadow node's loop.
#[derive(Debug, Clone)]
pub struct ShadowHandle {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<Event>,
}

impl ShadowHandle {
    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Where everything stands.
    pub async fn status(&self) -> Result<ShadowNodeStatus, CommandError> {
        self.ask(Command::Status).await
    }

    /// Run the final epoch that stands prepared, or the last one that was committed. The caller vouches that the source is dead and will not return.
    pub async fn vouch(&self) -> Result<(), CommandError> {
        self.ask(Command::Vouch).await?
    }

    /// End the session under way and wait for another source.
    pub async fn end(&self, why: &str) -> Result<(), CommandError> {
        self.ask(|answer| Command::End(why.to_owned(), answer)).await?
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, CommandError> {
        let (answer, answered) = oneshot::channel();
        let over = || CommandError::Over("the guest was taken over, or the node is stopping".to_owned());
        self.commands.send(command(answer)).await.map_err(|_| over())?;
        answered.await.map_err(|_| over())
    }
}

/// A node that waits for sources, one at a time.
pub struct ShadowNode {
    listener: Listener,
    builder: Arc<dyn GuestBuilder>,
    config: ShadowConfig,
    commands: mpsc::Receiver<Command>,
    events: broadcast::Sender<Event>,
    last_error: Option<String>,
}

impl std::fmt::Debug for ShadowNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShadowNode")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// How one session ended, for the node.
enum Ended {
    TakenOver {
        guest: Arc<dyn Guest>,
        id: GuestId,
        term: Term,
        /// For the farewell.
        link: (Mouth, LinkReceiver),
    },
    Dropped,
    /// Another source takes the silent one's place.
    Replaced(Incoming),
}

impl ShadowNode {
    /// A node that accepts sources on `listener` and builds their guests' twins with `builder`.
    pub fn new(listener: Listener, builder: Arc<dyn GuestBuilder>, config: ShadowConfig) -> (Self, ShadowHandle) {
        let (commands_in, commands) = mpsc::channel(16);
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let handle = ShadowHandle {
            commands: commands_in,
            events: events.clone(),
        };
        (
            Self {
                listener,
                builder,
                config,
                commands,
                events,
                last_error: None,
            },
            handle,
        )
    }

    /// Serve sources until a guest runs here.
    pub async fn run(mut self) -> Result<TakenOver, StartError> {
        let mut next = None;
        loop {
            let incoming = match next.take() {
                Some(incoming) => incoming,
                None => self.wait_for_source().await,
            };
            match self.serve(incoming).await? {
                Ended::TakenOver { guest, id, term, link } => {
                    let farewell = tokio::spawn(linger(self.listener, link));
                    return Ok(TakenOver {
                        guest,
                        id,
                        term,
                        farewell,
                    });
                }
                Ended::Dropped => {}
                Ended::Replaced(incoming) => next = Some(incoming),
            }
        }
    }

    async fn wait_for_source(&mut self) -> Incoming {
        let listening = Shadow::new(self.config.clone());
        loop {
            tokio::select! {
                incoming = self.listener.accept() => return incoming,
                Some(command) = self.commands.recv() => match command {
                    Command::Status(answer) => {
                        let (shadow, last_error) = (listening.status(), self.last_error.clone());
                        let _ = answer.send(ShadowNodeStatus { shadow, link: None, committed_age: None, last_error });
                    }
                    Command::Vouch(answer) | Command::End(_, answer) => {
                        let text = "no session is under way".to_owned();
                        let _ = answer.send(Err(CommandError::Refused(text)));
                    }
                },
            }
        }
    }

    async fn serve(&mut self, incoming: Incoming) -> Result<Ended, StartError> {
        let clock = Clock::new();
        let (answer, mut answers) = mpsc::unbounded_channel();
        let twin_hand = start_twin_hand(Arc::clone(&self.builder), self.config.clone(), clock, answer)?;
        let (sender, mut link) = incoming.accept(LinkConfig::default()).split();
        let mut session = ShadowTask {
            sequence: Sequence::new(self.config.window),
            shadow: Shadow::new(self.config.clone()),
            mouth: Mouth::start(sender.clone()),
            sender,
            twin_hand,
            events: self.events.clone(),
            clock,
            applying: 0,
            last_error: None,
            taken: None,
            outcome: None,
        };
        loop {
            session.perform();
            if let Some(outcome) = session.outcome.take() {
                self.last_error = session.last_error.take();
                return Ok(session.finish(outcome, link, &mut self.last_error).await);
            }
            tokio::select! {
                biased;
                Some((at, answer)) = answers.recv() => session.handle_answer(at, answer),
                Some(news) = link.recv(), if session.applying < APPLY_AHEAD => session.handle_link(news),
                Some(command) = self.commands.recv() => session.handle_command(command).await,
                incoming = self.listener.accept() => {
                    if let Some(incoming) = session.consider(incoming) {
                        session.mouth.close("another source took this shadow after a long silence".to_owned()).await;
                        return Ok(Ended::Replaced(incoming));
                    }
                }
                () = clock.sleep_until(session.shadow.poll_timeout()) => session.shadow.handle_time(clock.now()),
            }
        }
    }
}

/// What the twin's hand is given.
enum Work {
    Step(Step),
    Apply(Arrived),
}

/// A batch that arrived at this moment.
struct Arrived {
    at: Now,
    bytes: bytes::Bytes,
}

impl AsRef<[u8]> for Arrived {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// What the twin's hand answers.
enum Answer {
    Built(Result<Vec<Space>, Fault>),
    Applied(Now, Applied),
    Audited(Epoch, Vec<PageId>),
    Restored(Epoch, Result<(), Fault>),
    Recalled(Result<Epoch, Fault>),
    Resumed(Result<(Duration, Arc<dyn Guest>), Fault>),
    Failed(Fault),
}

/// The guest's twin and what it holds; lives on its hand's thread.
struct Twin {
    guest: Arc<dyn Guest>,
    image: Image,
}

/// One thread builds the twin, applies batches, loads state and starts the vCPUs, in that order: nothing it does can
/// overlap, so nothing needs a lock.
fn start_twin_hand(
    builder: Arc<dyn GuestBuilder>,
    config: ShadowConfig,
    clock: Clock,
    answers: Answers<Answer>,
) -> Result<Hand<Work>, StartError> {
    let mut twin: Option<Twin> = None;
    Hand::start("umbra-twin", clock, answers, move |work| {
        let Some(twin) = &mut twin else {
            return begin(&*builder, &config, work, &mut twin);
        };
        Some(match work {
            Work::Apply(Arrived { at, bytes }) => match twin.apply(&bytes) {
                Ok(applied) => Answer::Applied(at, applied),
                Err(fault) => Answer::Failed(fault),
            },
            Work::Step(Step::Build(..)) => Answer::Failed(Fault::PeerMisbehaved("it described two guests".to_owned())),
            Work::Step(Step::Audit(epoch)) => match twin.image.audit(&*twin.guest) {
                Ok(differing) => Answer::Audited(epoch, differing),
                Err(fault) => Answer::Failed(fault),
            },
            Work::Step(Step::Recall) => Answer::Recalled(twin.recall()),
            Work::Step(Step::Restore(epoch, records)) => Answer::Restored(epoch, twin.restore(&records)),
            Work::Step(Step::Resume(epoch)) => Answer::Resumed(twin.resume(epoch)),
        })
    })
}

fn begin(builder: &dyn GuestBuilder, config: &ShadowConfig, work: Work, twin: &mut Option<Twin>) -> Option<Answer> {
    let Work::Step(Step::Build(description, _)) = work else {
        return Some(Answer::Failed(Fault::PeerMisbehaved(
            "it sent pages before a guest".to_owned(),
        )));
    };
    let built = builder.build(&description).map(|guest| {
        let spaces = guest.spaces();
        *twin = Some(Twin {
            image: Image::new(&spaces).with_staging(config.staging_for(&spaces)),
            guest,
        });
        spaces
    });
    Some(Answer::Built(built.map_err(Fault::from)))
}

impl Twin {
    fn apply(&mut self, bytes: &[u8]) -> Result<Applied, Fault> {
        self.image.apply(Batch::parse(bytes)?, &*self.guest)
    }

    fn recall(&mut self) -> Result<Epoch, Fault> {
        let (epoch, records) = self.image.recall(&*self.guest)?;
        self.guest.restore(&records)?;
        Ok(epoch)
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), Fault> {
        Ok(self.guest.restore(records)?)
    }

    fn resume(&mut self, epoch: Epoch) -> Result<(Duration, Arc<dyn Guest>), Fault> {
        let began = Instant::now();
        self.image.seal(epoch)?;
        self.guest.resume()?;
        Ok((began.elapsed(), Arc::clone(&self.guest)))
    }
}

/// The source waits for our word that the guest runs, and closes the link when it has it. The link must live so long,
/// over an outage too, and the listener with it, because a path that died comes back through it; but nobody here has to
/// wait for it.
async fn linger(mut listener: Listener, (mouth, mut link): (Mouth, LinkReceiver)) {
    let over = tokio::time::sleep(LINGER);
    tokio::pin!(over);
    loop {
        tokio::select! {
            news = link.recv() => if news.is_none() { return },
            incoming = listener.accept() => incoming.refuse(Refusal::Unwanted, "a guest runs here: this is no shadow any more"),
            () = &mut over => return mouth.close("the guest runs here".to_owned()).await,
        }
    }
}

struct ShadowTask {
    shadow: Shadow,
    /// Batches that came before their turn.
    sequence: Sequence<Arrived>,
    sender: LinkSender,
    mouth: Mouth,
    twin_hand: Hand<Work>,
    events: broadcast::Sender<Event>,
    clock: Clock,
    /// Batches given to the hand and not yet answered.
    applying: usize,
    last_error: Option<String>,
    taken: Option<Arc<dyn Guest>>,
    outcome: Option<Outcome>,
}

impl ShadowTask {
    fn perform(&mut self) {
        while let Some(output) = self.shadow.poll_output() {
            match output {
                Output::Send(message) => self.mouth.say(&message),
                Output::Do(step) => self.twin_hand.give(Work::Step(step)),
                Output::Event(event) => {
                    tracing::info!(?event, "shadow");
                    let _ = self.events.send(event);
                }
                Output::End(outcome) => self.outcome = Some(outcome),
            }
        }
    }

    fn handle_answer(&mut self, at: Now, answer: Answer) {
        match answer {
            Answer::Built(built) => self.shadow.handle_built(built),
            Answer::Applied(arrived, applied) => {
                self.applying -= 1;
                self.shadow.handle_applied(at, arrived, applied);
            }
            Answer::Audited(epoch, differing) => self.shadow.handle_audited(at, epoch, &differing),
            Answer::Restored(epoch, restored) => self.shadow.handle_restored(at, epoch, restored),
            Answer::Recalled(recalled) => {
                if let Err(fault) = &recalled {
                    self.last_error = Some(fault.to_string());
                }
                self.shadow.handle_recalled(recalled);
            }
            Answer::Resumed(resumed) => {
                let took = resumed.map(|(took, guest)| {
                    self.taken = Some(guest);
                    took
                });
                self.shadow.handle_resumed(took);
            }
            Answer::Failed(fault) => self.shadow.handle_failed(fault),
        }
    }

    fn handle_link(&mut self, news: umbra_quic::Event) {
        use umbra_quic::Event as News;
        let now = self.clock.now();
        match news {
            News::Link(LinkEvent::Message(bytes)) => match Message::decode(&bytes) {
                Ok(message) => self.shadow.handle_message(now, message),
                Err(malformed) => self.shadow.handle_failed(malformed.into()),
            },
            News::Link(LinkEvent::Block { bytes, .. }) => {
                if !self.shadow.takes_batches() {
                    return;
                }
                if let Err(fault) = self.sequence.arrived(Arrived { at: now, bytes }) {
                    return self.shadow.handle_failed(fault);
                }
                while let Some(batch) = self.sequence.take() {
                    self.applying += 1;
                    self.twin_hand.give(Work::Apply(batch));
                }
            }
            News::Link(LinkEvent::AllPathsDown) => self.shadow.handle_link_up(false),
            News::Link(LinkEvent::Restored) => self.shadow.handle_link_up(true),
            News::Link(event) => crate::link::log(&event),
            News::Trouble { path, error } => tracing::warn!(%path, %error, "path"),
            News::Ended(why) => {
                self.last_error = Some(why.to_string());
                self.shadow.handle_link_lost(&why.to_string());
            }
        }
    }

    async fn handle_command(&mut self, command: Command) {
        match command {
            Command::Status(answer) => {
                let (shadow, link) = (self.shadow.status(), self.sender.stats().await.ok());
                let committed = shadow.committed.map(|(_, at)| self.clock.now().since(at));
                let _ = answer.send(ShadowNodeStatus {
                    shadow,
                    link,
                    committed_age: committed,
                    last_error: self.last_error.clone(),
                });
            }
            Command::Vouch(answer) => drop(answer.send(self.shadow.vouch().map_err(Into::into))),
            Command::End(why, answer) => drop(answer.send(self.shadow.end(&why).map_err(Into::into))),
        }
    }

    /// Another source knocks. It is let in only if ours has been silent for long and no epoch is held that could run: it may
    /// be the only copy of its guest.
    fn consider(&self, incoming: Incoming) -> Option<Incoming> {
        if !self.shadow.is_precious() && incoming.rival(FORGET_AFTER).is_none() {
            return Some(incoming);
        }
        let guest = self
            .shadow
            .status()
            .hello
            .map_or_else(|| "another guest".to_owned(), |hello| format!("guest {}", hello.guest));
        let epoch = self.shadow.status().committed.map_or_else(String::new, |(epoch, _)| {
            format!(", and holds its committed epoch {epoch}, which an operator may `resume` or `stop`")
        });
        let text = format!("this node shadows {guest}, phase {}{epoch}", self.shadow.phase());
        incoming.refuse(Refusal::Busy, text);
        None
    }

    async fn finish(mut self, outcome: Outcome, link: LinkReceiver, last_error: &mut Option<String>) -> Ended {
        match outcome {
            Outcome::Runs(term) => {
                let guest = self.taken.take().expect("a guest that runs was resumed");
                let id = self.shadow.status().hello.expect("somebody's guest").guest;
                let link = (self.mouth, link);
                Ended::TakenOver { guest, id, term, link }
            }
            Outcome::Dropped { text, .. } => {
                tracing::warn!(why = %text, "session dropped");
                *last_error = Some(text.clone());
                self.mouth.close(text).await;
                Ended::Dropped
            }
        }
    }
}
