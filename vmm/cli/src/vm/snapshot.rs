//! Keeping the guest in a folder: a long job like a switchover, answered at once.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use umbra_node::snapshot::{After, Kind, SnapshotError, SnapshotRequest as Wanted, Watch};
use umbra_units::SnapshotId;

use super::{Denied, Done, JobKind, Vm, draw};
use crate::api::types::{SnapshotKind, SnapshotReport, SnapshotRequest, Verify};
use crate::events::Teller;
use crate::limits;

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(250);

impl From<SnapshotError> for Denied {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Refused(text) => Self::Refused(text),
            other => Self::Failed(other.to_string()),
        }
    }
}

impl Vm {
    /// Start keeping the guest in a folder; says the job's number.
    pub(crate) fn snapshot(self: &Arc<Self>, request: SnapshotRequest) -> Result<u64, Denied> {
        let _turn = self.take_turn()?;
        if !request.to.is_absolute() {
            let text = format!("to: expected an absolute path, got '{}'", request.to.display());
            return Err(Denied::Malformed(text));
        }
        let kind = match request.kind {
            SnapshotKind::Full => Kind::Full,
            SnapshotKind::Differential => Kind::Differential,
        };
        let id = SnapshotId(draw().map_err(|failure| Denied::Failed(failure.text))?);
        let name = self.name();
        let watch = Arc::new(Watch::default());
        let (job, snapshots, wanted) = {
            let mut state = self.state();
            let here = state.here()?;
            state.not_switching()?;
            state.not_keeping()?;
            state.not_cutting()?;
            let snapshots = Arc::clone(&here.snapshots);
            // Nobody holds it: only a snapshot under way does.
            let snapshotter = snapshots.lock().unwrap_or_else(PoisonError::into_inner);
            snapshotter.check(&request.to, kind)?;
            drop(snapshotter);
            let wanted = Wanted {
                to: request.to,
                kind,
                id,
                identity: here.identity,
                name,
                runs: !here.paused,
                after: if request.pause { After::StayPaused } else { After::RunOn },
                record: request.record,
                audit: request.verify == Some(Verify::Full),
            };
            state.snapshot = Some(Arc::clone(&watch));
            (state.begin_job(JobKind::Snapshot), snapshots, wanted)
        };
        let started = json!({ "job": job, "kind": JobKind::Snapshot, "to": &wanted.to });
        self.events.tell(Teller::Job, "job-started", started);
        tokio::spawn(Arc::clone(self).tell_snapshot(job, Arc::clone(&watch)));
        let vm = Arc::clone(self);
        tokio::spawn(async move {
            vm.hold_cuts(true).await;
            let keeper = Arc::clone(&vm);
            let stands = tokio::task::spawn_blocking(move || {
                let (vm, guest) = (keeper, wanted.identity.guest.to_string());
                let taken = snapshots
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take(&wanted, &watch);
                let stays = taken.is_ok() && wanted.after == After::StayPaused;
                if stays && wanted.runs {
                    vm.note_paused(true);
                }
                vm.state().snapshot = None;
                let kept = |report| Done::Kept(Box::new(SnapshotReport::of(&report, guest)));
                vm.finish_job(JobKind::Snapshot, taken.map(kept).map_err(|error| error.to_string()));
                stays || !wanted.runs
            });
            if !stands.await.unwrap_or(false) {
                vm.hold_cuts(false).await;
            }
        });
        Ok(job)
    }

    /// Tell how far a snapshot is, while it is under way.
    async fn tell_snapshot(self: Arc<Self>, job: u64, watch: Arc<Watch>) {
        let mut tick = tokio::time::interval(PROGRESS);
        tick.tick().await;
        loop {
            tick.tick().await;
            let is_under_way = self
                .state()
                .snapshot
                .as_ref()
                .is_some_and(|now| Arc::ptr_eq(now, &watch));
            if !is_under_way {
                return;
            }
            let (copied, left) = watch.progress();
            let progress = json!({ "job": job, "copied_pages": copied.0, "left_pages": left.0 });
            self.events.tell(Teller::Job, "job-progress", progress);
        }
    }

    /// Take the snapshot under way back; false if there is none.
    pub(super) fn cancel_snapshot(&self) -> bool {
        let watch = self.state().snapshot.clone();
        watch.as_ref().inspect(|watch| watch.cancel()).is_some()
    }

    /// The process ends: take the snapshot under way back, so that nothing of it is left behind.
    pub(crate) async fn end_snapshot(&self) {
        let deadline = Instant::now() + limits::SNAPSHOT_LAST_WORDS;
        while self.cancel_snapshot() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
