//! Where everything stands: the status, put together from what this process knows itself and what its loops answer.

use umbra_core::source::SourceStatus;
use umbra_node::{ProtectionStatus, ShadowHandle, ShadowNodeStatus};
use umbra_paths::{LinkStats, PathState, Suspicion};
use umbra_quic::{PathSpec, Stats};

use super::{Here, Place, Session, Vm};
use crate::api::types::{CommittedEpoch, GuestState, Job, LinkStatus, Outlook, PathStatus, Ping, Role, Status, ms};
use crate::events::{shadow_word, word};

impl Vm {
    /// Who this is.
    pub(crate) fn ping(&self) -> Ping {
        Ping {
            version: version(),
            pid: std::process::id(),
            name: self.name(),
        }
    }

    /// The latest long job.
    pub(crate) fn last_job(&self) -> Option<Job> {
        self.state().job.clone()
    }

    /// What people call the guest.
    pub(crate) fn name(&self) -> String {
        let guest = self.state().here().ok().map(|here| here.identity.guest.to_string());
        self.name_of(guest.as_deref())
    }

    pub(super) fn name_of(&self, guest: Option<&str>) -> String {
        let by_guest = || guest.map_or_else(|| "shadow".to_owned(), |guest| format!("guest-{}", &guest[..8]));
        self.name.clone().unwrap_or_else(by_guest)
    }

    /// Where everything stands.
    pub(crate) async fn status(&self) -> Status {
        let ending = self.ending.borrow().clone();
        let (mut status, session, shadow) = self.own_status();
        if let Some(session) = session {
            if let Ok(protection) = session.protection.status().await {
                status.add_session(&session, &protection);
            }
        } else if let Some(shadow) = shadow
            && let Ok(shadow) = shadow.status().await
        {
            status.add_shadow(&shadow);
            status.name = self.name_of(status.guest.as_deref());
        }
        if let Some(ending) = ending {
            status.role = Role::Ended;
            status.guest_state = GuestState::Ended;
            status.exit = Some(ending.to_string());
        }
        status
    }

    /// What this process knows without asking its loops, and whom to ask.
    fn own_status(&self) -> (Status, Option<Session>, Option<ShadowHandle>) {
        let name = self.name();
        let state = self.state();
        let mut status = Status {
            version: version(),
            pid: std::process::id(),
            uptime_ms: ms(self.began.elapsed()),
            role: Role::Shadow,
            name,
            guest: None,
            guest_state: GuestState::Elsewhere,
            term: None,
            vcpus: None,
            memory_bytes: None,
            identity: self.identity.fingerprint().to_string(),
            listen: state.listen.clone(),
            peer: None,
            phase: None,
            epoch: None,
            pages: None,
            seeded: None,
            debt: None,
            deferred: None,
            latest_harvest: None,
            outlook: None,
            predicted_pause_ms: None,
            shipped_bytes: None,
            counts: None,
            encode: None,
            switching: state.switching(),
            cutting: false,
            committed: None,
            staged_bytes: None,
            staging_bytes: None,
            reasons: Vec::new(),
            paths: Vec::new(),
            link: None,
            job: state.job.clone(),
            last_switchover: state.last_switchover.clone(),
            last_error: state.last_error.clone(),
            exit: None,
        };
        let (session, shadow) = match &state.place {
            Place::Nowhere => (None, None),
            Place::Shadow(handle) => (None, Some(handle.clone())),
            Place::Here(here) => {
                status.role = if here.session.is_some() {
                    Role::Source
                } else {
                    Role::Running
                };
                status.guest = Some(here.identity.guest.to_string());
                status.term = Some(here.identity.term.0);
                status.vcpus = Some(here.resident.vcpus);
                status.memory_bytes = Some(here.resident.memory.0);
                status.guest_state = match here {
                    Here { paused: true, .. } => GuestState::Paused,
                    Here {
                        session: Some(Session { gave_up: Some(_), .. }),
                        ..
                    } => GuestState::HandedOver,
                    _ if state.switching() => GuestState::Switching,
                    _ => GuestState::Running,
                };
                (here.session.clone(), None)
            }
        };
        (status, session, shadow)
    }
}

impl Status {
    fn add_session(&mut self, session: &Session, protection: &ProtectionStatus) {
        let ProtectionStatus {
            source,
            encode,
            link,
            last_error,
            committed_age,
        } = protection;
        let SourceStatus {
            phase,
            term,
            epoch,
            pages,
            seeded,
            debt,
            latest_harvest,
            counts,
            shipped,
            ..
        } = source;
        self.peer = Some(session.peer.to_string());
        self.phase = Some(word(*phase));
        self.term = Some(term.0);
        self.epoch = Some(epoch.0);
        self.pages = Some(pages.0);
        self.seeded = Some(seeded.get());
        self.debt = Some(debt.0);
        self.deferred = Some(source.deferred.0);
        self.latest_harvest = Some(latest_harvest.0);
        self.outlook = Some(Outlook::of(source));
        self.predicted_pause_ms = source.predicted_pause.map(ms);
        self.shipped_bytes = Some(shipped.0);
        self.counts = Some((*counts).into());
        self.encode = Some((*encode).into());
        self.reasons.clone_from(&source.reasons);
        self.cutting = source.cutting;
        self.committed = source
            .committed
            .zip(*committed_age)
            .map(|(committed, age)| CommittedEpoch {
                epoch: committed.epoch.0,
                age_ms: ms(age),
                cut: Some(committed.report.into()),
            });
        self.last_error = last_error.clone().or_else(|| self.last_error.take());
        self.add_link(link.as_ref(), Some(&session.paths));
    }

    fn add_shadow(&mut self, status: &ShadowNodeStatus) {
        let ShadowNodeStatus {
            shadow,
            link,
            last_error,
            committed_age,
        } = status;
        self.phase = Some(shadow_word(shadow.phase));
        self.reasons.clone_from(&shadow.reasons);
        self.committed = shadow
            .committed
            .zip(*committed_age)
            .map(|((epoch, _), age)| CommittedEpoch {
                epoch: epoch.0,
                age_ms: ms(age),
                cut: None,
            });
        if shadow.committed.is_some() {
            self.staged_bytes = Some(shadow.staged.used.0 * umbra_units::PAGE_SIZE as u64);
            self.staging_bytes = Some(shadow.staged.most.0 * umbra_units::PAGE_SIZE as u64);
        }
        self.last_error = last_error.clone().or_else(|| self.last_error.take());
        if let Some(hello) = &shadow.hello {
            self.guest = Some(hello.guest.to_string());
            self.term = Some(hello.term.0);
            self.pages = Some(hello.spaces.iter().map(|space| space.present_pages().0).sum());
            self.seeded = Some(shadow.complete.get());
            self.counts = Some(shadow.counts.into());
        }
        self.add_link(link.as_ref(), None);
    }

    fn add_link(&mut self, stats: Option<&Stats>, specs: Option<&[PathSpec]>) {
        let Some(Stats { link, connections, .. }) = stats else {
            return;
        };
        let LinkStats {
            blocks_sent,
            blocks_delivered,
            blocks_received,
            parity_bytes,
            ..
        } = *link;
        let LinkStats {
            resent_bytes,
            reinjected_bytes,
            stripes_repaired,
            ..
        } = *link;
        self.link = Some(LinkStatus {
            blocks_sent,
            blocks_delivered,
            blocks_received,
            parity_bytes,
            resent_bytes,
            reinjected_bytes,
            stripes_repaired,
        });
        self.paths = link.paths.iter().map(PathStatus::from).collect();
        for path in &mut self.paths {
            let spec = specs.and_then(|specs| specs.get(usize::from(path.id)));
            let connected = connections.iter().find(|connection| connection.path.0 == path.id);
            path.local = spec.and_then(|spec| spec.local).map(|local| local.to_string());
            let remote = spec
                .map(|spec| spec.remote)
                .or_else(|| connected.map(|connected| connected.remote));
            path.remote = remote.map(|remote| remote.to_string());
        }
    }
}

impl From<&umbra_paths::PathStats> for PathStatus {
    fn from(path: &umbra_paths::PathStats) -> Self {
        let state = match path.state {
            PathState::Up => "up",
            PathState::Suspect(Suspicion::Silent) => "silent",
            PathState::Suspect(Suspicion::Stalled) => "stalled",
            PathState::Down => "down",
        };
        #[expect(clippy::cast_precision_loss, reason = "a display rounds anyway")]
        let rate_mbit = path.rate.0 as f64 * 8.0 / 1e6;
        Self {
            id: path.path.0,
            local: None,
            remote: None,
            state: state.to_owned(),
            rtt_ms: ms(path.rtt),
            rate_mbit,
            loss: path.loss.get(),
            bytes: path.message_bytes + path.bulk_bytes + path.urgent_bytes,
            share: path.share.get(),
            outstanding_bytes: path.outstanding_bytes,
            suspected: path.suspected,
            died: path.died,
        }
    }
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}
