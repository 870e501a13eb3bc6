//! What the loops want of a link, beside what it offers.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use umbra_core::predict::LinkFacts;
use umbra_core::wire::Message;
use umbra_paths::{LinkEvent, LinkStats, PathState};
use umbra_quic::LinkSender;
use umbra_units::Bandwidth;

/// How long the last words of a session may wait for the link to take them.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The rate of all live paths together and the round trip of the quickest.
pub(crate) fn facts_of(stats: &LinkStats) -> LinkFacts {
    let live = || stats.paths.iter().filter(|path| path.state == PathState::Up);
    LinkFacts {
        rate: Bandwidth(live().map(|path| path.rate.0).sum()),
        rtt: live().map(|path| path.rtt).min().unwrap_or(Duration::ZERO),
    }
}

/// Tell the log about a path.
pub(crate) fn log(event: &LinkEvent) {
    match event {
        LinkEvent::PathUp(path) => tracing::info!(%path, "path up"),
        LinkEvent::PathSuspect(path, why) => tracing::warn!(%path, ?why, "path suspected"),
        LinkEvent::PathDown(path) => tracing::warn!(%path, "path down"),
        _ => {}
    }
}

/// Says messages in order without making the loop wait: while every path is down the link takes only so many, and a
/// loop that waited for it could answer nobody. What queues here is bounded by what the state machines say on their own,
/// which is next to nothing while no acknowledgement comes in.
#[derive(Debug)]
pub(crate) struct Mouth {
    queue: mpsc::UnboundedSender<Vec<u8>>,
    speaking: JoinHandle<()>,
    sender: LinkSender,
}

impl Mouth {
    pub(crate) fn start(sender: LinkSender) -> Self {
        let (queue, mut words) = mpsc::unbounded_channel::<Vec<u8>>();
        let link = sender.clone();
        let speaking = tokio::spawn(async move {
            while let Some(bytes) = words.recv().await {
                if let Err(error) = link.send_message(bytes).await {
                    tracing::debug!(%error, "not said");
                }
            }
        });
        Self {
            queue,
            speaking,
            sender,
        }
    }

    pub(crate) fn say(&self, message: &Message) {
        let _ = self.queue.send(message.encode()); // its task ends only with this end
    }

    /// Say what is queued, then close the link.
    pub(crate) async fn close(self, why: String) {
        drop(self.queue);
        let _ = tokio::time::timeout(LAST_WORDS, self.speaking).await;
        self.sender.close(why).await;
    }
}
