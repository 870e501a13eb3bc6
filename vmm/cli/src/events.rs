//! What happens, told to whoever listens: the API's event stream, `--event-monitor`, and this program's own commands.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::broadcast;
use umbra_core::event::Event as CoreEvent;
use umbra_core::phase::{ShadowPhase, SourcePhase};

use crate::api::types::{CutReport, Event, Timestamp, ms};
use crate::args::Monitor;
use crate::confine::{self, Class};
use crate::exit::Failure;
use crate::limits;

/// Who tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Teller {
    /// The guest, or somebody on its behalf.
    Guest,
    /// The session between source and shadow.
    Session,
    /// A long command.
    Job,
    /// This process.
    Process,
}

impl Teller {
    const fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Session => "session",
            Self::Job => "job",
            Self::Process => "process",
        }
    }
}

/// Where events are told.
#[derive(Debug)]
pub(crate) struct Events {
    /// `None` ends every stream.
    told: broadcast::Sender<Option<Arc<Event>>>,
    monitor: Option<MonitorThread>,
}

#[derive(Debug)]
struct MonitorThread {
    queue: mpsc::Sender<Option<Arc<Event>>>,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

/// One listener's place in the stream.
#[derive(Debug)]
pub(crate) struct Listening(broadcast::Receiver<Option<Arc<Event>>>);

impl Events {
    /// Events, also written to `monitor` if there is one.
    pub(crate) fn new(monitor: Option<&Monitor>) -> Result<Self, Failure> {
        let monitor = monitor.map(MonitorThread::start).transpose()?;
        Ok(Self {
            told: broadcast::Sender::new(limits::EVENTS_KEPT),
            monitor,
        })
    }

    /// Tell everybody.
    pub(crate) fn tell(&self, source: Teller, event: &str, properties: Value) {
        let event = Arc::new(stamp(source, event, properties));
        if let Some(monitor) = &self.monitor {
            let _ = monitor.queue.send(Some(Arc::clone(&event)));
        }
        // Nobody need be listening.
        let _ = self.told.send(Some(event));
    }

    /// Tell what a session's state machine said.
    pub(crate) fn tell_core(&self, event: &CoreEvent) {
        let (name, properties) = of_core(event);
        self.tell(Teller::Session, name, properties);
    }

    /// Listen from now on.
    pub(crate) fn listen(&self) -> Listening {
        Listening(self.told.subscribe())
    }

    /// Nothing follows: streams end, and the monitor has everything.
    pub(crate) fn close(&self) {
        let _ = self.told.send(None);
        if let Some(monitor) = &self.monitor {
            let _ = monitor.queue.send(None);
            let thread = monitor
                .thread
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .take();
            thread.map(JoinHandle::join);
        }
    }
}

impl Listening {
    /// The next event; `None` when nothing follows. A listener that was too slow hears how much it missed.
    pub(crate) async fn next(&mut self) -> Option<Arc<Event>> {
        match self.0.recv().await {
            Ok(event) => event,
            Err(broadcast::error::RecvError::Lagged(count)) => Some(Arc::new(stamp(
                Teller::Process,
                "events-missed",
                json!({ "count": count }),
            ))),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl MonitorThread {
    fn start(monitor: &Monitor) -> Result<Self, Failure> {
        let path = match monitor {
            Monitor::Path(path) => path.clone(),
            // Opened anew by its name: taking a bare number for a file is not something safe code can do.
            Monitor::Fd(fd) => PathBuf::from(format!("/proc/self/fd/{fd}")),
        };
        let on = Failure::on(format!("event-monitor: {}", path.display()));
        let mut file = OpenOptions::new().append(true).create(true).open(&path).map_err(on)?;
        let (queue, events) = mpsc::channel::<Option<Arc<Event>>>();
        let name = thread::Builder::new().name("umbra-events".to_owned());
        let thread = name.spawn(move || {
            confine::enter_or_end(Class::Host);
            while let Ok(Some(event)) = events.recv() {
                if let Err(error) = write_line(&mut file, &event) {
                    return tracing::warn!(%error, "the event monitor takes no more");
                }
            }
        });
        let thread = thread.map_err(Failure::on("event-monitor"))?;
        Ok(Self {
            queue,
            thread: std::sync::Mutex::new(Some(thread)),
        })
    }
}

fn write_line(file: &mut File, event: &Event) -> std::io::Result<()> {
    file.write_all(&line(event))
}

/// One line of the stream.
pub(crate) fn line(event: &Event) -> Vec<u8> {
    let mut line = serde_json::to_vec(event).expect("an event is plain data");
    line.push(b'\n');
    line
}

fn stamp(source: Teller, event: &str, properties: Value) -> Event {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Event {
        timestamp: Timestamp {
            secs: now.as_secs(),
            nanos: now.subsec_nanos(),
        },
        source: source.name().to_owned(),
        event: event.to_owned(),
        properties,
    }
}

/// A session's event by the name and properties that the documentation has.
fn of_core(event: &CoreEvent) -> (&'static str, Value) {
    match event {
        CoreEvent::Source { from, to } => (
            "phase",
            json!({ "side": "source", "from": word(*from), "to": word(*to) }),
        ),
        CoreEvent::Shadow { from, to } => (
            "phase",
            json!({ "side": "shadow", "from": shadow_word(*from), "to": shadow_word(*to) }),
        ),
        CoreEvent::SwitchoverAsked => ("switchover-asked", json!({})),
        CoreEvent::Round { round, debt, predicted } => (
            "round",
            json!({ "round": round, "debt": debt.0, "predicted_ms": predicted_ms(*predicted) }),
        ),
        CoreEvent::WillNotConverge { floor, predicted, text } => (
            "will-not-converge",
            json!({ "floor": floor.0, "predicted_ms": predicted_ms(*predicted), "text": text }),
        ),
        CoreEvent::StopDecided { debt, predicted } => (
            "stop-decided",
            json!({ "debt": debt.0, "predicted_ms": predicted_ms(*predicted) }),
        ),
        CoreEvent::SwitchoverFailed { text } => ("switchover-failed", json!({ "error": text })),
        CoreEvent::AuditFailed { pages, count } => {
            let pages: Vec<String> = pages.iter().map(ToString::to_string).collect();
            ("audit-failed", json!({ "count": count, "pages": pages }))
        }
        CoreEvent::CutBegan { epoch, reason } => {
            ("cut-began", json!({ "epoch": epoch.0, "reason": reason.to_string() }))
        }
        CoreEvent::CutFailed { text } => ("cut-failed", json!({ "error": text })),
        CoreEvent::Cut(report) => ("cut", json!(CutReport::from(**report))),
        CoreEvent::Committed { epoch } => ("committed", json!({ "epoch": epoch.0 })),
        CoreEvent::EpochGivenUp { epoch, text } => ("epoch-given-up", json!({ "epoch": epoch.0, "reason": text })),
        CoreEvent::RecallFailed { text } => ("recall-failed", json!({ "error": text })),
        CoreEvent::ReadinessChanged { reasons } => {
            ("readiness", json!({ "ready": reasons.is_empty(), "reasons": reasons }))
        }
        CoreEvent::GaveUp { epoch, term } => ("gave-up", json!({ "epoch": epoch.0, "term": term.0 })),
        CoreEvent::LinkDown => ("link-down", json!({})),
        CoreEvent::LinkUp => ("link-up", json!({})),
    }
}

/// `null` when nothing can be predicted.
fn predicted_ms(predicted: core::time::Duration) -> Option<f64> {
    (predicted < core::time::Duration::MAX).then(|| ms(predicted))
}

/// A source's phase as one word.
pub(crate) fn word(phase: SourcePhase) -> String {
    phase.to_string().replace(' ', "-")
}

/// A shadow's phase as one word.
pub(crate) fn shadow_word(phase: ShadowPhase) -> String {
    phase.to_string().replace(' ', "-")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use umbra_units::PageCount;

    use super::*;

    #[test]
    fn the_monitor_has_one_object_per_line_and_all_of_them_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let events = Events::new(Some(&Monitor::Path(path.clone()))).unwrap();
        for n in 0..100 {
            events.tell(Teller::Guest, "counted", json!({ "n": n }));
        }
        events.close();
        let text = std::fs::read_to_string(&path).unwrap();
        let told: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(told.len(), 100);
        assert_eq!(
            (told[7].event.as_str(), &told[7].properties),
            ("counted", &json!({ "n": 7 }))
        );
        assert!(told[0].timestamp.secs > 1_600_000_000);
    }

    #[test]
    fn an_open_descriptor_can_be_the_monitor() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let file = File::create(&path).unwrap();
        let fd = u32::try_from(file.as_raw_fd()).unwrap();
        let events = Events::new(Some(&Monitor::Fd(fd))).unwrap();
        events.tell(Teller::Process, "hello", json!({}));
        events.close();
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"hello\""));
        let error = Events::new(Some(&Monitor::Fd(999_999))).unwrap_err();
        assert!(error.text.starts_with("event-monitor: /proc/self/fd/999999"), "{error}");
    }

    #[tokio::test]
    async fn a_slow_listener_hears_how_much_it_missed_and_a_closed_stream_ends() {
        let events = Events::new(None).unwrap();
        let mut listening = events.listen();
        for n in 0..limits::EVENTS_KEPT + 10 {
            events.tell(Teller::Guest, "counted", json!({ "n": n }));
        }
        events.close();
        let first = listening.next().await.unwrap();
        assert_eq!(
            (first.event.as_str(), &first.properties),
            ("events-missed", &json!({ "count": 11 }))
        );
        let mut heard = 0;
        while listening.next().await.is_some() {
            heard += 1;
        }
        assert_eq!(heard, limits::EVENTS_KEPT - 1);
    }

    #[test]
    fn a_pause_that_cannot_be_predicted_is_null_not_an_age() {
        let event = CoreEvent::Round {
            round: 1,
            debt: PageCount(5),
            predicted: Duration::MAX,
        };
        assert_eq!(
            of_core(&event),
            ("round", json!({ "round": 1, "debt": 5, "predicted_ms": null }))
        );
    }

    #[test]
    fn phases_are_single_words() {
        let event = CoreEvent::Source {
            from: SourcePhase::Final,
            to: SourcePhase::HandedOver,
        };
        assert_eq!(
            of_core(&event).1,
            json!({ "side": "source", "from": "final", "to": "handed-over" })
        );
    }
}
