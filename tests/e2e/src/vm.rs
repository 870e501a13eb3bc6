//! A guest that runs, and what can be done with it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::console::Console;
use crate::events::phase;
use crate::host::Shadow;
use crate::process::Process;
use crate::roads::Roads;
use crate::world::PATIENCE;

/// How long bytes that a guest said before it was stopped may take to be heard.
const UNDER_WAY: Duration = Duration::from_secs(5);

/// How a guest is moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Move {
    request: Value,
}

impl Move {
    /// With everything as usual.
    pub fn usual() -> Self {
        Self { request: json!({}) }
    }

    /// With every page of both memories compared at the cut.
    pub fn verified() -> Self {
        Self::usual().with("verify", json!("full"))
    }

    /// Over paths so bad, or machines so busy, that only the proof matters and not the pause.
    #[must_use]
    pub fn patient(self) -> Self {
        self.with("downtime_limit_ms", json!(10_000))
            .with("pause_limit_ms", json!(30_000))
    }

    /// With this field of the request.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.request[field] = value;
        self
    }
}

/// The account of a switchover.
#[derive(Debug, Clone, PartialEq)]
pub struct Report(pub Value);

impl Report {
    /// The pause as the source measured it.
    pub fn pause(&self) -> Duration {
        Duration::from_secs_f64(self.0["pause_ms"].as_f64().unwrap_or(f64::MAX / 1e10) / 1e3)
    }

    /// Whether both sides compared all of memory.
    pub fn audited(&self) -> bool {
        self.0["audited"] == true
    }
}

/// A guest, the process it runs in, and its console since its first word.
#[derive(Debug)]
pub struct Vm {
    /// Where it runs.
    pub process: Process,
    /// What it says.
    pub console: Console,
}

impl Vm {
    pub(crate) const fn new(process: Process, console: Console) -> Self {
        Self { process, console }
    }

    /// Wait until its console shows something.
    pub fn shows<T>(&mut self, what: &str, mut look: impl FnMut(&Console) -> Option<T>) -> Result<T> {
        let Self { process, console } = self;
        let found = process.bell().wait(PATIENCE, || {
            console.read();
            if let Some(wrong) = console.wrong() {
                return Some(Err(wrong.to_owned()));
            }
            let over = process.serial().has_ended();
            match look(console) {
                Some(found) => Some(Ok(found)),
                None => over.then(|| Err("nothing more can come".to_owned())),
            }
        });
        match found {
            Some(Ok(found)) => Ok(found),
            Some(Err(why)) => bail!("{}: {why} while waiting for: {what}", process.name()),
            None => bail!("{}: waited {PATIENCE:?} in vain for: {what}", process.name()),
        }
    }

    /// It beats so many more times, in order, and its memory is well.
    pub fn beats_on(&mut self, more: usize) -> Result<()> {
        self.console.read();
        let wanted = self.console.beats() + more;
        self.shows(&format!("beat {wanted}"), |console| {
            (console.beats() >= wanted).then_some(())
        })
    }

    /// It has written all of its memory once.
    pub fn is_ready(&mut self) -> Result<()> {
        let ready = |console: &Console| {
            console
                .lines()
                .iter()
                .any(|(_, line)| line.contains(": ready "))
                .then_some(())
        };
        self.shows("the guest is ready", ready)
    }

    /// It checks so many more pages of its memory and finds them right.
    pub fn checks_on(&mut self, more: u64) -> Result<()> {
        self.console.read();
        let wanted = self.console.latest("checked").unwrap_or(0) + more;
        self.shows(&format!("{wanted} pages checked"), |console| {
            console
                .latest("checked")
                .is_some_and(|checked| checked >= wanted)
                .then_some(())
        })
    }

    /// It says nothing for this long, once what was already under way has been heard. How often it had beaten by then.
    pub fn is_silent_for(&mut self, span: Duration) -> Result<usize> {
        let Self { process, console } = self;
        let began = Instant::now();
        loop {
            console.read();
            let beats = console.beats();
            let more = process.bell().wait(span, || {
                console.read();
                (console.beats() > beats).then_some(())
            });
            if more.is_none() {
                return Ok(beats);
            }
            ensure!(began.elapsed() < UNDER_WAY, "{} does not fall silent", process.name());
        }
    }

    /// Start following, over these roads.
    pub fn protect(&mut self, shadow: &Shadow, roads: &Roads) -> Result<()> {
        self.process
            .put("protect", &json!({ "to": roads.to(), "peers": [shadow.fingerprint()] }))
            .map(drop)
    }

    /// Start following, directly.
    pub fn protect_directly(&mut self, shadow: &Shadow) -> Result<()> {
        self.process
            .put(
                "protect",
                &json!({ "to": shadow.listen, "peers": [shadow.fingerprint()] }),
            )
            .map(drop)
    }

    /// Wait until every page has been there once.
    pub fn is_following(&mut self) -> Result<()> {
        self.process.until("following", phase("following")).map(drop)
    }

    /// Wait until the shadow says that nothing speaks against a switchover.
    pub fn shadow_is_ready(&self) -> Result<()> {
        self.process.holds("a ready shadow", |events| {
            events
                .iter()
                .rfind(|event| event.name == "readiness")
                .is_some_and(|event| event.properties["ready"] == true)
        })
    }

    /// Wait until every path is known to have at least this round trip. A path is suspected by what it is used to, so one
    /// that has just become long is another story than one that is long.
    pub fn knows_its_roads(&mut self, rtt: Duration) -> Result<()> {
        let known = |path: &Value| path["state"] == "up" && path["rtt_ms"].as_f64() >= Some(rtt.as_secs_f64() * 1e3);
        let began = Instant::now();
        while !self.process.status()?["paths"]
            .as_array()
            .is_some_and(|paths| paths.iter().all(known))
        {
            ensure!(
                began.elapsed() < PATIENCE,
                "the paths' round trips are not known: {}",
                self.process.status()?
            );
            // The guest's own beats are the clock.
            self.beats_on(50)?;
        }
        Ok(())
    }

    /// Ask for a switchover. The job's number.
    pub fn migrate(&mut self, how: &Move) -> Result<u64> {
        let accepted = self.process.put("migrate", &how.request)?;
        accepted["job"].as_u64().context("a job's number")
    }

    /// Wait for the end of a switchover that fails; why.
    pub fn migration_fails(&mut self, job: u64) -> Result<String> {
        let done = self.process.once("the end of the switchover", |event| {
            event.name == "job-finished" && event.properties["id"] == job
        })?;
        ensure!(
            done.properties["state"] == "failed",
            "expected a switchover that fails: {done}"
        );
        Ok(done.properties["error"].as_str().unwrap_or_default().to_owned())
    }

    /// Wait for the end of a switchover that succeeds: the process here ends well, and the guest goes on in the shadow's.
    pub fn arrives_at(self, shadow: Shadow, job: u64) -> Result<(Self, Report)> {
        let done = self.process.once("the end of the switchover", |event| {
            event.name == "job-finished" && event.properties["id"] == job
        })?;
        ensure!(done.properties["state"] == "done", "the switchover failed: {done}");
        let report = Report(done.properties["report"].clone());
        let code = self.process.end()?;
        ensure!(
            code == Some(0),
            "{} ended with {code:?} after a switchover",
            self.process.name()
        );
        shadow.runs_its_guest()?;
        Ok((self.goes_on_in(shadow), report))
    }

    /// The guest runs in the shadow's process now; this one is gone, or will be heard to its end first.
    #[must_use]
    pub fn goes_on_in(mut self, shadow: Shadow) -> Self {
        self.console.goes_on(Arc::clone(shadow.process.serial()));
        Self {
            process: shadow.process,
            console: self.console,
        }
    }

    /// Move it, and see it beat on there.
    pub fn migrate_to(mut self, shadow: Shadow, how: &Move) -> Result<(Self, Report)> {
        let job = self.migrate(how)?;
        let (mut vm, report) = self.arrives_at(shadow, job)?;
        vm.beats_on(200)?;
        Ok((vm, report))
    }

    /// Cut an epoch of it, with these fields of the request, and wait until the shadow has committed it; the account.
    pub fn cut(&self, request: &Value) -> Result<Value> {
        let done = self.job_ends(self.begin_cut(request)?)?;
        ensure!(done["state"] == "done", "the cut failed: {done}");
        Ok(done["cut"].clone())
    }

    /// Ask for a cut. The job's number.
    pub fn begin_cut(&self, request: &Value) -> Result<u64> {
        let accepted = self.process.put("cut", request)?;
        accepted["job"].as_u64().context("a job's number")
    }

    /// Wait for the end of a cut that fails; why.
    pub fn cut_fails(&self, job: u64) -> Result<String> {
        let done = self.job_ends(job)?;
        ensure!(done["state"] == "failed", "expected a cut that fails: {done}");
        Ok(done["error"].as_str().unwrap_or_default().to_owned())
    }

    /// Keep it in the folder `to`, with these fields of the request; the report.
    pub fn keep(&self, to: &Path, request: &Value) -> Result<Value> {
        let done = self.keeping_ends(to, request)?;
        ensure!(done["state"] == "done", "the snapshot failed: {done}");
        Ok(done["snapshot"].clone())
    }

    /// The same when it is to fail; why.
    pub fn keeping_fails(&self, to: &Path, request: &Value) -> Result<String> {
        let done = self.keeping_ends(to, request)?;
        ensure!(done["state"] == "failed", "the snapshot succeeded: {done}");
        let why = done["error"].as_str().unwrap_or_default().to_owned();
        ensure!(!why.is_empty() && !why.contains('\n'), "no one-line reason: {done}");
        Ok(why)
    }

    /// Begin to keep it; the job's number.
    pub fn begin_keeping(&self, to: &Path, request: &Value) -> Result<u64> {
        let mut request = request.clone();
        request["to"] = json!(to);
        let accepted = self.process.put("snapshot", &request)?;
        accepted["job"].as_u64().context("a job's number")
    }

    /// The end of a job.
    pub fn job_ends(&self, job: u64) -> Result<Value> {
        let ended = self.process.once("the end of the job", |event| {
            event.name == "job-finished" && event.properties["id"] == job
        })?;
        Ok(ended.properties)
    }

    fn keeping_ends(&self, to: &Path, request: &Value) -> Result<Value> {
        self.job_ends(self.begin_keeping(to, request)?)
    }

    /// The guest that `restored` brought back is this one, and goes on at the very beat after its last: it was kept while
    /// it stood still, and this process has ended.
    #[must_use]
    pub fn goes_on_as(mut self, restored: Self) -> Self {
        self.console.goes_on(Arc::clone(restored.process.serial()));
        Self {
            process: restored.process,
            console: self.console,
        }
    }

    /// The guest was lost with its process, and goes back in the shadow's to what it was at a cut: from a beat of before.
    #[must_use]
    pub fn goes_back_in(self, shadow: Shadow) -> Self {
        let console = Console::in_the_middle(Arc::clone(shadow.process.serial()));
        Self {
            process: shadow.process,
            console,
        }
    }

    /// End it as an operator does.
    pub fn stop(&self) -> Result<()> {
        self.process.put("stop", &json!(null))?;
        let code = self.process.end()?;
        ensure!(
            code == Some(0),
            "{} ended with {code:?} when it was stopped",
            self.process.name()
        );
        Ok(())
    }
}
