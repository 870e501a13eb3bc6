//! Cutting an epoch: the shadow commits a consistent state of the guest, which runs on. A long job, answered at once.

use std::sync::Arc;

use serde_json::json;
use umbra_node::Protection;

use super::{Denied, Done, JobKind, Vm, request};
use crate::api::types::{CutReport, CutRequest};
use crate::events::Teller;

impl Vm {
    /// Start cutting an epoch; says the job's number.
    pub(crate) fn cut(self: &Arc<Self>, request: &CutRequest) -> Result<u64, Denied> {
        let _turn = self.take_turn()?;
        let options = request::cut(request)?;
        let (job, protection) = {
            let mut state = self.state();
            let here = state.here()?;
            let Some(session) = here.session.clone() else {
                return Err(Denied::Refused(
                    "nobody shadows this guest; `protect` it first".to_owned(),
                ));
            };
            state.not_switching()?;
            state.not_keeping()?;
            state.not_cutting()?;
            if here.paused {
                return Err(Denied::Refused(
                    "the guest is paused, and a cut would let it run on; `resume` it first".to_owned(),
                ));
            }
            (state.begin_job(JobKind::Cut), session.protection)
        };
        let started = json!({ "job": job, "kind": JobKind::Cut });
        self.events.tell(Teller::Job, "job-started", started);
        let vm = Arc::clone(self);
        tokio::spawn(async move {
            let cut = protection.cut(options).await;
            let done = |report| Done::Cut(Box::new(CutReport::from(report)));
            vm.finish_job(JobKind::Cut, cut.map(done).map_err(|error| error.to_string()));
        });
        Ok(job)
    }

    /// Somebody is about to stop the guest or let it run: no cut may do so meanwhile. Without a session nobody would.
    pub(super) async fn hold_cuts(&self, hold: bool) {
        let protection: Option<Protection> = self.state().session().map(|session| session.protection.clone());
        if let Some(protection) = protection {
            let _ = protection.hold_cuts(hold).await; // it ended: nothing of it stops the guest any more
        }
    }
}
