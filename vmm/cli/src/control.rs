//! The commands that talk to a guest's process over its API socket.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::api::client::{Client, EventStream};
use crate::api::types::{
    Accepted, Counters, CutRequest, Event, Job, JobState, MigrateRequest, ProtectRequest, ResizeRequest, ResumeRequest,
    Role, SnapshotKind, SnapshotRequest, Status, SwitchoverReport, ms,
};
use crate::args::{CutArgs, MigrateArgs, ProtectArgs, ResizeArgs, ResumeArgs, SnapshotArgs, StatusArgs, TargetArgs};
use crate::exit::{Code, Failure};
use crate::limits;
use crate::process;
use crate::say;
use crate::status;
use crate::units::percent;

/// Between two looks of `status --watch`.
const WATCH: Duration = Duration::from_secs(1);
/// Between two looks of `protect --wait`.
const LOOK: Duration = Duration::from_millis(100);

/// Nothing to say.
#[derive(serde::Serialize)]
struct Nothing {}

/// A command that is its own name: `PUT /api/v1/NAME`.
pub(crate) fn simple(target: &TargetArgs, name: &str) -> Result<Code, Failure> {
    let client = Client::new(&target.api_socket);
    process::small_runtime()?.block_on(client.put(name, &Nothing {}))?;
    Ok(Code::Success)
}

/// `umbra resume`.
pub(crate) fn resume(args: &ResumeArgs) -> Result<Code, Failure> {
    let client = Client::new(&args.target.api_socket);
    let request = ResumeRequest {
        peer_is_dead: args.peer_is_dead,
    };
    process::small_runtime()?.block_on(client.put("resume", &request))?;
    Ok(Code::Success)
}

/// `umbra resize`.
pub(crate) fn resize(args: &ResizeArgs) -> Result<Code, Failure> {
    let client = Client::new(&args.target.api_socket);
    let request = ResizeRequest {
        balloon_bytes: args.balloon.0,
    };
    process::small_runtime()?.block_on(client.put("resize", &request))?;
    Ok(Code::Success)
}

/// `umbra counters`.
pub(crate) fn counters(target: &TargetArgs) -> Result<Code, Failure> {
    let client = Client::new(&target.api_socket);
    let counters: Counters = process::small_runtime()?.block_on(client.get("counters"))?;
    let text = serde_json::to_string_pretty(&counters).map_err(Failure::failed)?;
    say::line(text);
    Ok(Code::Success)
}

/// `umbra events`.
pub(crate) fn events(args: &TargetArgs) -> Result<Code, Failure> {
    let client = Client::new(&args.api_socket);
    process::small_runtime()?.block_on(async {
        let mut events = client.events().await?;
        while let Some(line) = events.next_line().await? {
            if !say::line_heard(String::from_utf8_lossy(&line)) {
                break;
            }
        }
        Ok(Code::Success)
    })
}

/// `umbra status`.
pub(crate) fn status(args: &StatusArgs) -> Result<Code, Failure> {
    let client = Client::new(&args.target.api_socket);
    process::small_runtime()?.block_on(async {
        if !show_status(&client, args.json).await? || !args.watch {
            return Ok(Code::Success);
        }
        loop {
            tokio::time::sleep(WATCH).await;
            match show_status(&client, args.json).await {
                Ok(true) => {}
                Ok(false) => return Ok(Code::Success),
                // It was there a moment ago: the process has ended, and so does watching it.
                Err(failure) if failure.code == Code::NoAnswer => return Ok(Code::Success),
                Err(failure) => return Err(failure),
            }
        }
    })
}

/// Say where everything stands; false when nobody reads any more.
async fn show_status(client: &Client, json: bool) -> Result<bool, Failure> {
    Ok(if json {
        let bytes = client.get_bytes("status").await?;
        say::line_heard(String::from_utf8_lossy(&bytes))
    } else {
        say::line_heard(status::text(&client.get::<Status>("status").await?))
    })
}

/// `umbra protect`.
pub(crate) fn protect(args: &ProtectArgs) -> Result<Code, Failure> {
    let peers = process::peers(&args.peers)?;
    let absolute = |dir: &std::path::PathBuf| std::path::absolute(dir).map_err(Failure::on("identity"));
    let follow = args.follow.unwrap_or_default();
    let request = ProtectRequest {
        to: args.to.iter().map(ToString::to_string).collect(),
        peers: peers.iter().map(ToString::to_string).collect(),
        identity: args.identity.as_ref().map(absolute).transpose()?,
        cache_bytes: follow.cache.map(|cache| cache.0),
        compression: follow.compression,
        harvest_ms: follow.harvest.map(ms),
        encode_threads: follow.encode_threads,
        encode_cpu_percent: follow.encode_cpu_percent,
        order: follow.order,
        pause_promise_ms: follow.pause_promise.map(ms),
    };
    let client = Client::new(&args.target.api_socket);
    process::small_runtime()?.block_on(async {
        client.put("protect", &request).await?;
        say::line("the shadow has answered, and follows the guest");
        if args.wait {
            wait_until_ready(&client).await?;
        }
        Ok(Code::Success)
    })
}

/// Wait until the shadow has everything and nothing speaks against a switchover.
async fn wait_until_ready(client: &Client) -> Result<(), Failure> {
    let mut told = Progress::default();
    loop {
        let status: Status = client.get("status").await?;
        if status.role != Role::Source {
            let why = status
                .last_error
                .or(status.exit)
                .unwrap_or_else(|| "no reason given".to_owned());
            return Err(Failure::failed(format!("the session ended: {why}")));
        }
        if status.phase.as_deref() == Some("following") && status.reasons.is_empty() {
            say::line("ready");
            return Ok(());
        }
        if let (Some(phase), Some(seeded)) = (&status.phase, status.seeded) {
            told.tell(phase, seeded, status.debt.unwrap_or(0));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What was said of a first copy, so that nothing is said twice.
#[derive(Default)]
struct Progress {
    said: Option<(String, u64)>,
}

impl Progress {
    fn tell(&mut self, phase: &str, seeded: f64, debt: u64) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share in percent"
        )]
        let now = (phase.to_owned(), (seeded * 100.0) as u64);
        if self.said.as_ref() != Some(&now) {
            say::line(format!("{phase} {}, {debt} pages to go", percent(seeded)));
            self.said = Some(now);
        }
    }
}

/// `umbra migrate`.
pub(crate) fn migrate(args: &MigrateArgs) -> Result<Code, Failure> {
    let request = MigrateRequest {
        downtime_limit_ms: Some(ms(args.downtime_limit)),
        timeout_ms: Some(ms(args.timeout)),
        pause_limit_ms: Some(ms(args.pause_limit)),
        verify: Some(args.verify),
    };
    let client = Client::new(&args.target.api_socket);
    let report = process::small_runtime()?.block_on(async {
        // Listening first: the process may be gone before anybody could ask how it went.
        let events = client.events().await?;
        let Accepted { job } = client.put_for("migrate", &request).await?;
        Watching {
            job,
            quiet: args.json,
            progress: Progress::default(),
            gave_up: None,
        }
        .until_done(events)
        .await
    })?;
    if args.json {
        say::line(serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        say::line(status::report(&report));
    }
    Ok(Code::Success)
}

/// `umbra cut`.
pub(crate) fn cut(args: &CutArgs) -> Result<Code, Failure> {
    let request = CutRequest {
        settle_ms: Some(ms(args.settle)),
        timeout_ms: Some(ms(args.timeout)),
        urgent: args.urgent,
        capture: args.capture,
        verify: Some(args.verify),
    };
    let client = Client::new(&args.target.api_socket);
    let runtime = process::small_runtime()?;
    if !args.wait && !args.json {
        let Accepted { job } = runtime.block_on(client.put_for("cut", &request))?;
        say::line(format!("job {job}: `events` and `status` say what becomes of it"));
        return Ok(Code::Success);
    }
    let job = runtime.block_on(job_done(&client, "cut", &request))?;
    let (JobState::Done, Some(report)) = (job.state, job.cut) else {
        return Err(Failure::failed(
            job.error.unwrap_or_else(|| "no reason given".to_owned()),
        ));
    };
    if args.json {
        say::line(serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        say::line(status::cut(&report));
    }
    Ok(Code::Success)
}

/// Ask for a long job, and wait until it is over.
async fn job_done(client: &Client, name: &str, request: &impl serde::Serialize) -> Result<Job, Failure> {
    let mut events = client.events().await?;
    let Accepted { job } = client.put_for(name, request).await?;
    loop {
        let event = events.next().await?;
        let event =
            event.ok_or_else(|| Failure::failed(format!("the guest's process ended before the {name} was done")))?;
        if event.event == "job-finished" {
            let on = Failure::on("the event job-finished");
            let finished: Job = serde_json::from_value(event.properties).map_err(on)?;
            if finished.id == job {
                return Ok(finished);
            }
        }
    }
}

/// `umbra snapshot`.
pub(crate) fn snapshot(args: &SnapshotArgs) -> Result<Code, Failure> {
    let request = SnapshotRequest {
        to: std::path::absolute(&args.to).map_err(Failure::on("to"))?,
        kind: if args.diff {
            SnapshotKind::Differential
        } else {
            SnapshotKind::Full
        },
        pause: args.pause,
        record: args.record,
        verify: Some(args.verify),
    };
    let client = Client::new(&args.target.api_socket);
    let job = process::small_runtime()?.block_on(job_done(&client, "snapshot", &request))?;
    let (JobState::Done, Some(report)) = (job.state, job.snapshot) else {
        return Err(Failure::failed(
            job.error.unwrap_or_else(|| "no reason given".to_owned()),
        ));
    };
    if args.json {
        say::line(serde_json::to_string(&report).expect("a report is plain data"));
    } else {
        say::line(status::snapshot(&report));
    }
    Ok(Code::Success)
}

/// Following one switchover.
struct Watching {
    job: u64,
    quiet: bool,
    progress: Progress,
    /// When the source gave the guest up.
    gave_up: Option<Instant>,
}

impl Watching {
    async fn until_done(mut self, mut events: EventStream) -> Result<SwitchoverReport, Failure> {
        loop {
            let patience = self
                .gave_up
                .map(|since| limits::MIGRATE_WORD.saturating_sub(since.elapsed()));
            let event = match patience {
                None => events.next().await?,
                Some(patience) => match tokio::time::timeout(patience, events.next()).await {
                    Ok(event) => event?,
                    Err(_) => return Err(self.unknown("it has not answered for 30 s")),
                },
            };
            match event {
                Some(event) => {
                    if let Some(result) = self.heard(&event) {
                        return result;
                    }
                }
                None if self.gave_up.is_some() => return Err(self.unknown("the source's process ended")),
                None => return Err(Failure::failed("the guest's process ended before the switchover did")),
            }
        }
    }

    fn unknown(&self, why: &str) -> Failure {
        let text = format!(
            "the guest was handed over, and the shadow has not said that it runs there: {why}. It runs there or nowhere; \
             `status` at both ends says more, and `resume --peer-is-dead` settles it if one of them is dead for good"
        );
        Failure::new(Code::HandedOver, text)
    }

    /// Say what is worth saying; the result, if this was the end.
    fn heard(&mut self, event: &Event) -> Option<Result<SwitchoverReport, Failure>> {
        let number = |name: &str| event.properties.get(name).and_then(Value::as_u64).unwrap_or(0);
        let share = |name: &str| event.properties.get(name).and_then(Value::as_f64).unwrap_or(0.0);
        let predicted = || match event.properties.get("predicted_ms").and_then(Value::as_f64) {
            Some(ms) => format!("{ms:.1} ms of pause predicted"),
            None => "no pause can be predicted".to_owned(),
        };
        match event.event.as_str() {
            "progress" if !self.quiet => {
                let phase = event
                    .properties
                    .get("phase")
                    .and_then(Value::as_str)
                    .unwrap_or_default();
                self.progress.tell(phase, share("seeded"), number("debt"));
            }
            "round" if !self.quiet => {
                say::line(format!(
                    "round {}: {} pages to go, {}",
                    number("round"),
                    number("debt"),
                    predicted()
                ));
            }
            "will-not-converge" => {
                let text = event.properties.get("text").and_then(Value::as_str);
                say::line(text.unwrap_or_default());
            }
            "stop-decided" if !self.quiet => {
                say::line(format!("stopping with {} pages to go, {}", number("debt"), predicted()));
            }
            "gave-up" => {
                self.gave_up = Some(Instant::now());
                if !self.quiet {
                    say::line(format!("handed over in term {}", number("term")));
                }
            }
            "job-finished" => return self.finished(&event.properties),
            _ => {}
        }
        None
    }

    fn finished(&self, properties: &Value) -> Option<Result<SwitchoverReport, Failure>> {
        let job: Job = match serde_json::from_value(properties.clone()) {
            Ok(job) => job,
            Err(error) => return Some(Err(Failure::failed(format!("the event job-finished: {error}")))),
        };
        if job.id != self.job {
            return None;
        }
        Some(match (job.state, job.report) {
            (JobState::Done, Some(report)) => Ok(report),
            _ => Err(Failure::failed(
                job.error.unwrap_or_else(|| "no reason given".to_owned()),
            )),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::types::Timestamp;

    fn watching() -> Watching {
        Watching {
            job: 2,
            quiet: true,
            progress: Progress::default(),
            gave_up: None,
        }
    }

    fn event(name: &str, properties: Value) -> Event {
        let timestamp = Timestamp { secs: 0, nanos: 0 };
        Event {
            timestamp,
            source: "job".to_owned(),
            event: name.to_owned(),
            properties,
        }
    }

    #[test]
    fn only_the_end_of_this_very_job_is_the_end() {
        let finished = |id| json!({ "id": id, "kind": "migrate", "state": "failed", "error": "cancelled by an operator", "report": null, "snapshot": null });
        assert_eq!(watching().heard(&event("job-finished", finished(1))), None);
        let failure = Failure::failed("cancelled by an operator");
        assert_eq!(
            watching().heard(&event("job-finished", finished(2))),
            Some(Err(failure))
        );
    }

    #[test]
    fn once_the_guest_was_given_up_a_silent_shadow_means_not_knowing() {
        let mut watching = watching();
        assert_eq!(
            watching.heard(&event("gave-up", json!({ "epoch": 1, "term": 2 }))),
            None
        );
        assert!(watching.gave_up.is_some());
        assert_eq!(watching.unknown("why").code, Code::HandedOver);
    }
}
