//! `umbra demo`: a guest moves between two real processes over three bad networks, two of which are cut on the way.
//!
//! Nothing here is staged. Two children of this program are started as an operator would start them; a UDP relay per
//! network gives each its rate, delay and loss; an observer outside listens to the guest's console at both ends. Cuts
//! are made on what is seen to happen, not after so many seconds. The guest checks its own memory all the while.
//!
//! ```text
//!                       path 0: 400 Mbit/s   2 ms    0 %    cut while the first copy is under way, then back
//!   source  ═══════════ path 1: 200 Mbit/s  10 ms  0.5 %    cut while the guest is stopped
//!     │                 path 2: 100 Mbit/s  25 ms    2 %
//!     └── console ──▶ observer ◀── console ──┐
//!                                          shadow
//! ```

mod observer;
mod report;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use umbra_netem::{Loss, Relay, RelayConfig, Way, Weather};
use umbra_quic::Identity;
use umbra_units::{Bandwidth, Bytes, Ratio};

use crate::api::client::Client;
use crate::api::types::{Accepted, Job, MigrateRequest, Ping, ProtectRequest, Status, SwitchoverReport, Verify};
use crate::args::DemoArgs;
use crate::exit::{Code, Failure};
use crate::process;
use crate::say;
use observer::{Account, Observer};
use report::{ExitCodes, Guest, Memory, Moment, Outside, Report};

/// The kernel beside its sources, and beside a build directory of its own.
const KERNEL: [&str; 2] = [
    "resources/guest/target/release/umbra-guest",
    "guest/release/umbra-guest",
];
const VCPUS: u8 = 2;
const MEMORY: Bytes = Bytes::mib(256);
const BEAT: Duration = Duration::from_millis(2);

/// Between two looks at a status.
const LOOK: Duration = Duration::from_millis(20);
/// A child answers within this, even on a busy machine.
const AWAKE: Duration = Duration::from_secs(10);
/// The first copy takes two seconds on the machines we have, and a few more on a busy one.
const SEEDED: Duration = Duration::from_secs(40);
/// A path that was cut comes back within its dialler's longest wait and a handshake.
const BACK: Duration = Duration::from_secs(8);
/// The switchover's own limits are shorter.
const MOVED: Duration = Duration::from_secs(70);
/// How much the first path has brought when it is cut.
const CUT_AFTER: Bytes = Bytes::mib(8);
/// How long it is followed before it is moved, and how long it runs on afterwards: in beats.
const BEATS_FOLLOWED: usize = 1000;
const BEATS_AFTER: usize = 1500;

/// The network between the two hosts.
const NETWORKS: [Network; 3] = [
    Network {
        mbit: 400,
        rtt: Duration::from_millis(2),
        loss: 0.0,
    },
    Network {
        mbit: 200,
        rtt: Duration::from_millis(10),
        loss: 0.005,
    },
    Network {
        mbit: 100,
        rtt: Duration::from_millis(25),
        loss: 0.02,
    },
];
/// Cut while the first copy is under way, and while the guest is stopped.
const CUT_SEEDING: usize = 0;
const CUT_STOPPED: usize = 1;

struct Network {
    mbit: u64,
    rtt: Duration,
    loss: f64,
}

/// Show it.
pub(crate) fn demo(args: &DemoArgs) -> Result<Code, Failure> {
    let kernel = kernel()?;
    umbra_machine::probe()?;
    let report = process::small_runtime()?.block_on(async {
        let mut stage = Stage::set(kernel, !args.json)?;
        match stage.play().await {
            Ok(report) => Ok(report),
            Err(failure) => Err(stage.explain(failure)),
        }
    })?;
    let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
    if let Some(path) = &args.report {
        fs::write(path, &json).map_err(Failure::on(format!("report: {}", path.display())))?;
    }
    say::line(if args.json { json } else { report.text() });
    Ok(if report.ok { Code::Success } else { Code::Failure })
}

/// The tiny kernel: where the environment says, else where the xtask builds it.
fn kernel() -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os("UMBRA_GUEST") {
        return std::path::absolute(path).map_err(Failure::on("UMBRA_GUEST"));
    }
    let here = std::env::current_dir().ok();
    // A program in a checkout's build directory finds that checkout's kernel from anywhere.
    let program = std::env::current_exe().ok();
    let beside = program
        .iter()
        .flat_map(|program| program.ancestors().skip(1))
        .map(Path::to_owned);
    let mut places = here
        .into_iter()
        .chain(beside)
        .flat_map(|dir| KERNEL.map(|kernel| dir.join(kernel)));
    places.find(|place| place.is_file()).ok_or_else(|| {
        let [kernel, _] = KERNEL;
        Failure::failed(format!(
            "the tiny kernel {kernel} is not here: `cargo xtask demo` builds it, or set UMBRA_GUEST"
        ))
    })
}

/// Everything the demonstration needs, and what it has seen.
struct Stage {
    kernel: PathBuf,
    home: Home,
    began: Instant,
    aloud: bool,
    timeline: Vec<Moment>,
}

/// A directory that goes away.
struct Home(PathBuf);

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One of the two hosts.
struct Host {
    child: Child,
    api: Client,
}

impl Stage {
    fn set(kernel: PathBuf, aloud: bool) -> Result<Self, Failure> {
        let dir = std::env::temp_dir().join(format!("umbra-demo-{}", std::process::id()));
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        made.map_err(Failure::on(dir.display()))?;
        Ok(Self {
            kernel,
            home: Home(dir),
            began: Instant::now(),
            aloud,
            timeline: Vec::new(),
        })
    }

    /// Note what happened, and tell those who watch.
    fn note(&mut self, what: impl Into<String>) {
        let moment = Moment {
            at_s: round(self.began.elapsed().as_secs_f64(), 1e3),
            what: what.into(),
        };
        if self.aloud {
            say::line(format!("{:>7.2} s  {}", moment.at_s, moment.what));
        }
        self.timeline.push(moment);
    }

    async fn play(&mut self) -> Result<Report, Failure> {
        for name in ["source", "shadow"] {
            Identity::generate(name)
                .and_then(|identity| identity.save(&self.path(name)))
                .map_err(Failure::failed)?;
        }
        let (mut shadow, listening) = self.start_shadow().await?;
        let relays = relays(listening)?;
        let mut source = self.start_source().await?;
        let at_source = Observer::attach(&self.path("source.serial"), AWAKE)?;
        let at_shadow = Observer::attach(&self.path("shadow.serial"), AWAKE)?;
        if !heard(&at_source, 100).await {
            return Err(Failure::failed("the guest is not heard"));
        }
        self.note(format!(
            "a guest runs at the source: {VCPUS} vCPUs, {MEMORY}, {}",
            cmdline()
        ));

        let seeding = Instant::now();
        self.protect(&source, &relays).await?;
        self.cut_while_seeding(&source, &relays).await?;
        let seeding_s = round(seeding.elapsed().as_secs_f64(), 1e3);
        let beats = at_source.clone();
        self.mend(&source, &relays).await?;
        let followed = self.follow(&source, &beats).await?;
        let switchover = self.switch(&source, &relays).await?;

        let source_code = self.wait_for(&mut source, "the source").await?;
        self.note(format!("the source's process ended with code {}", shown(source_code)));
        if !heard(&at_shadow, BEATS_AFTER).await {
            return Err(Failure::failed("the guest is not heard at the shadow"));
        }
        self.note("the guest goes on beating at the shadow");
        shadow.api.put("stop", &serde_json::json!({})).await?;
        let shadow_code = self.wait_for(&mut shadow, "the shadow").await?;
        for observer in [&at_source, &at_shadow] {
            let observer = observer.clone();
            let ended = tokio::task::spawn_blocking(move || observer.wait_for_end(AWAKE));
            let _ = ended.await;
        }
        let account = Account::of(&at_source, &at_shadow);
        let exit_codes = ExitCodes {
            source: source_code,
            shadow: shadow_code,
        };
        Ok(self.report(&followed, seeding_s, switchover, &account, &relays, exit_codes))
    }

    async fn start_shadow(&mut self) -> Result<(Host, SocketAddr), Failure> {
        let mut command = self.command();
        command
            .args(["shadow", "--listen", "quic:127.0.0.1:0", "--peer"])
            .arg(self.path("source/cert.pem"));
        let mut host = self.start(command, "shadow").await?;
        let stdout = host
            .child
            .stdout
            .take()
            .ok_or_else(|| Failure::failed("the shadow has no standard output"))?;
        let mut lines = BufReader::new(stdout).lines();
        let line = timeout(AWAKE, lines.next_line())
            .await
            .map_err(|_| Failure::failed("the shadow says nothing"))?;
        let line = line.map_err(Failure::failed)?.unwrap_or_default();
        let addr = line
            .strip_prefix("listening on quic:")
            .and_then(|addr| addr.parse().ok());
        let addr = addr.ok_or_else(|| Failure::failed(format!("the shadow says '{line}', not where it listens")))?;
        self.note(format!("a shadow waits at {addr}"));
        Ok((host, addr))
    }

    async fn start_source(&self) -> Result<Host, Failure> {
        let mut command = self.command();
        command
            .arg("run")
            .arg("--kernel")
            .arg(&self.kernel)
            .args(["--cmdline", &cmdline()]);
        command.args([
            "--cpus",
            &format!("boot={VCPUS}"),
            "--memory",
            &format!("size={}", MEMORY.0),
        ]);
        self.start(command, "source").await
    }

    /// This very program.
    fn command(&self) -> Command {
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("umbra"));
        let mut command = Command::new(program);
        command.current_dir(&self.home.0);
        command
    }

    async fn start(&self, mut command: Command, name: &str) -> Result<Host, Failure> {
        let log = fs::File::create(self.path(&format!("{name}.err"))).map_err(Failure::failed)?;
        let api = self.path(&format!("{name}.api"));
        command
            .arg("--identity")
            .arg(self.path(name))
            .arg("--api-socket")
            .arg(&api);
        command
            .arg("--serial")
            .arg(format!("socket={}", self.path(&format!("{name}.serial")).display()));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        let child = command
            .spawn()
            .map_err(Failure::on(format!("cannot start the {name}")))?;
        let host = Host {
            child,
            api: Client::new(&api),
        };
        let awake = timeout(AWAKE, async {
            while host.api.get::<Ping>("ping").await.is_err() {
                tokio::time::sleep(LOOK).await;
            }
        });
        awake
            .await
            .map_err(|_| Failure::failed(format!("the {name} does not answer")))?;
        Ok(host)
    }

    async fn protect(&mut self, source: &Host, relays: &[Relay]) -> Result<(), Failure> {
        let shadow = umbra_quic::Fingerprint::of_file(&self.path("shadow/cert.pem")).map_err(Failure::failed)?;
        let request = ProtectRequest {
            to: relays.iter().map(|relay| format!("quic:{}", relay.addr())).collect(),
            peers: vec![shadow.to_string()],
            identity: None,
            cache_bytes: None,
            compression: None,
            harvest_ms: None,
            encode_threads: None,
            encode_cpu_percent: None,
            order: None,
            pause_promise_ms: None,
        };
        source.api.put("protect", &request).await?;
        self.note("its shadow is being filled, over three networks at once");
        Ok(())
    }

    /// Cut one network as soon as it has brought enough, and wait until the shadow has everything all the same.
    async fn cut_while_seeding(&mut self, source: &Host, relays: &[Relay]) -> Result<(), Failure> {
        let relay = relays[CUT_SEEDING].control();
        let cut = tokio::task::spawn_blocking(move || {
            let brought = relay.wait_until_bytes(Way::Up, CUT_AFTER, SEEDED);
            relay.blackout(true);
            brought.is_ok()
        });
        if !cut.await.unwrap_or(false) {
            return Err(Failure::failed("the first copy does not get on"));
        }
        let status: Status = source.api.get("status").await?;
        let seeded = crate::units::percent(status.seeded.unwrap_or(0.0));
        self.note(format!(
            "path {CUT_SEEDING}, the fastest, is cut; the first copy is {seeded} done"
        ));
        until(source, SEEDED, "the first copy is not done in time", |status| {
            status.phase.as_deref() == Some("following") && status.reasons.is_empty()
        })
        .await?;
        self.note("the shadow has everything, over the other two");
        Ok(())
    }

    async fn mend(&mut self, source: &Host, relays: &[Relay]) -> Result<(), Failure> {
        relays[CUT_SEEDING].blackout(false);
        until(source, BACK, "the cut network does not come back", |status| {
            status.paths.iter().all(|path| path.state == "up")
        })
        .await?;
        self.note(format!("path {CUT_SEEDING} is mended, and in use again"));
        Ok(())
    }

    /// Let the shadow follow for a while; the status before the switchover.
    async fn follow(&mut self, source: &Host, beats: &Observer) -> Result<Status, Failure> {
        let enough = beats.heard_bytes() + BEATS_FOLLOWED;
        if !heard(beats, enough).await {
            return Err(Failure::failed("the guest fell silent while it was followed"));
        }
        let status = until(source, SEEDED, "the shadow is not ready", |status| {
            status.reasons.is_empty()
        })
        .await?;
        let pause = status
            .predicted_pause_ms
            .map_or_else(|| "unknown".to_owned(), |ms| format!("{ms:.1} ms"));
        self.note(format!(
            "the guest goes on writing and the shadow follows, {} pages behind; a move now would pause it for {pause}",
            status.debt.unwrap_or(0)
        ));
        Ok(status)
    }

    /// Move the guest, and cut another network in the middle of it.
    async fn switch(&mut self, source: &Host, relays: &[Relay]) -> Result<SwitchoverReport, Failure> {
        let mut events = source.api.events().await?;
        let request = MigrateRequest {
            verify: Some(Verify::Full),
            ..MigrateRequest::default()
        };
        let Accepted { job } = source.api.put_for("migrate", &request).await?;
        let moving = async {
            while let Some(event) = events.next().await? {
                match event.event.as_str() {
                    "switchover-asked" => self.note("the move is asked for"),
                    "stop-decided" => {
                        relays[CUT_STOPPED].blackout(true);
                        self.note(format!(
                            "the guest is being stopped; path {CUT_STOPPED} is cut at this very moment"
                        ));
                    }
                    "gave-up" => self.note("the source gave the guest up: from here on only the shadow may run it"),
                    "job-finished" => {
                        let finished: Job = serde_json::from_value(event.properties).map_err(Failure::failed)?;
                        if finished.id == job {
                            let why = finished.error.unwrap_or_else(|| "no reason given".to_owned());
                            return finished
                                .report
                                .ok_or_else(|| Failure::failed(format!("the guest did not move: {why}")));
                        }
                    }
                    _ => {}
                }
            }
            Err(Failure::failed("the source's process ended before the move did"))
        };
        let report = timeout(MOVED, moving)
            .await
            .map_err(|_| Failure::failed("the move is not done in time"))??;
        self.note(format!(
            "the guest runs at the shadow, in term {}; it paused for {:.1} ms",
            report.term, report.pause_ms
        ));
        Ok(report)
    }

    async fn wait_for(&self, host: &mut Host, name: &str) -> Result<Option<i32>, Failure> {
        let ended = timeout(AWAKE, host.child.wait()).await;
        let status = ended.map_err(|_| Failure::failed(format!("{name}'s process does not end")))?;
        Ok(status.map_err(Failure::on(name))?.code())
    }

    fn report(
        &self,
        followed: &Status,
        seeding_s: f64,
        switchover: SwitchoverReport,
        account: &Account,
        relays: &[Relay],
        exit_codes: ExitCodes,
    ) -> Report {
        let ms = crate::api::types::ms;
        let memory = Memory {
            compared: switchover.audited,
            checked_by_guest: account.checked,
            complaints: account.complaints.clone(),
        };
        let outside = Outside {
            beat_ms: ms(BEAT),
            gap_ms: account.gap.map(ms),
            longest_elsewhere_ms: ms(account.longest_elsewhere),
            beats_at_source: account.beats.0,
            beats_at_shadow: account.beats.1,
            out_of_order: account.out_of_order,
        };
        let problems = problems(&memory, &outside, exit_codes);
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ok: problems.is_empty(),
            problems,
            took_s: round(self.began.elapsed().as_secs_f64(), 1e3),
            guest: Guest {
                vcpus: VCPUS,
                memory_bytes: MEMORY.0,
                cmdline: cmdline(),
            },
            timeline: self.timeline.clone(),
            paths: paths(relays),
            counts: followed.counts.unwrap_or_default(),
            shipped_bytes: followed.shipped_bytes.unwrap_or(0),
            seeding_s,
            switchover,
            outside,
            memory,
            exit_codes,
        }
    }

    /// A failure with what the two processes had to say about it.
    fn explain(&self, failure: Failure) -> Failure {
        let said = ["source", "shadow"].map(|name| {
            let text = fs::read_to_string(self.path(&format!("{name}.err"))).unwrap_or_default();
            text.lines()
                .last()
                .map_or_else(String::new, |last| format!("; the {name} said: {last}"))
        });
        Failure::new(failure.code, format!("{}{}", failure.text, said.concat()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.0.join(Path::new(name))
    }
}

/// What the guest does: both vCPUs rewrite a working set, all other memory holds something too.
fn cmdline() -> String {
    format!(
        "cpus={VCPUS} work=dirty rate=16M wss=32M content=mixed fill=128M beat={}",
        BEAT.as_micros()
    )
}

fn relays(shadow: SocketAddr) -> Result<Vec<Relay>, Failure> {
    let relay = |(seed, network): (u64, &Network)| {
        let share = Ratio::new(network.loss).expect("a small share");
        let loss = Loss::bursty(share, 2.0).expect("short bursts of a small share");
        let weather = Weather::link(Bandwidth::mbit(network.mbit), network.rtt / 2).losing(loss);
        Relay::start(RelayConfig {
            seed,
            ..RelayConfig::to(shadow, weather)
        })
    };
    (1..)
        .zip(&NETWORKS)
        .map(relay)
        .collect::<Result<_, _>>()
        .map_err(Failure::on("a network"))
}

fn paths(relays: &[Relay]) -> Vec<report::Path> {
    let counters: Vec<_> = relays.iter().map(|relay| relay.counters()).collect();
    let all: u64 = counters.iter().map(|counters| counters.up.delivered_bytes.0).sum();
    let path = |(id, (network, counters)): (usize, (&Network, &umbra_netem::Counters))| report::Path {
        id,
        rate_mbit: network.mbit,
        rtt_ms: crate::api::types::ms(network.rtt),
        loss: network.loss,
        cut: match id {
            CUT_SEEDING => Some("while the first copy was under way".to_owned()),
            CUT_STOPPED => Some("while the guest was stopped".to_owned()),
            _ => None,
        },
        delivered_bytes: counters.up.delivered_bytes.0,
        share: Ratio::of(counters.up.delivered_bytes.0, all).get(),
        lost_packets: counters.up.dropped_total() + counters.down.dropped_total(),
    };
    NETWORKS.iter().zip(&counters).enumerate().map(path).collect()
}

/// Everything that is not as it should be.
fn problems(memory: &Memory, outside: &Outside, exit_codes: ExitCodes) -> Vec<String> {
    let mut problems = memory.complaints.clone();
    if !memory.compared {
        problems.push("the two memories were not compared".to_owned());
    }
    if memory.checked_by_guest == 0 {
        problems.push("the guest did not check its memory".to_owned());
    }
    if outside.gap_ms.is_none() {
        problems.push("the guest was not heard at both hosts".to_owned());
    }
    if outside.out_of_order > 0 {
        problems.push(format!("{} beats were lost or said twice", outside.out_of_order));
    }
    for (name, code) in [("source", exit_codes.source), ("shadow", exit_codes.shadow)] {
        if code != Some(0) {
            problems.push(format!("the {name}'s process ended with code {}", shown(code)));
        }
    }
    problems
}

/// Look at a host's status until it is as wanted.
async fn until(
    host: &Host,
    patience: Duration,
    otherwise: &str,
    wanted: impl Fn(&Status) -> bool,
) -> Result<Status, Failure> {
    let looking = async {
        loop {
            let status: Status = host.api.get("status").await?;
            if status.phase.is_none() {
                let why = status.last_error.unwrap_or_else(|| "no reason given".to_owned());
                return Err(Failure::failed(format!("the session ended: {why}")));
            }
            if wanted(&status) {
                return Ok(status);
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    timeout(patience, looking)
        .await
        .map_err(|_| Failure::failed(otherwise))?
}

async fn heard(observer: &Observer, bytes: usize) -> bool {
    let observer = observer.clone();
    tokio::task::spawn_blocking(move || observer.wait_for(bytes, SEEDED))
        .await
        .unwrap_or(false)
}

fn shown(code: Option<i32>) -> String {
    code.map_or_else(|| "none (killed)".to_owned(), |code| code.to_string())
}

fn round(value: f64, steps: f64) -> f64 {
    (value * steps).round() / steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> (Memory, Outside, ExitCodes) {
        (
            Memory {
                compared: true,
                checked_by_guest: 1,
                complaints: Vec::new(),
            },
            Outside {
                beat_ms: 2.0,
                gap_ms: Some(10.0),
                longest_elsewhere_ms: 3.0,
                beats_at_source: 5,
                beats_at_shadow: 5,
                out_of_order: 0,
            },
            ExitCodes {
                source: Some(0),
                shadow: Some(0),
            },
        )
    }

    #[test]
    fn all_is_well_only_if_nothing_was_lost_torn_or_unseen() {
        let (memory, outside, codes) = good();
        assert_eq!(problems(&memory, &outside, codes), Vec::<String>::new());
        assert_eq!(
            problems(
                &Memory {
                    compared: false,
                    ..memory.clone()
                },
                &outside,
                codes
            )
            .len(),
            1
        );
        assert_eq!(
            problems(
                &Memory {
                    checked_by_guest: 0,
                    ..memory.clone()
                },
                &outside,
                codes
            )
            .len(),
            1
        );
        let complaints = vec!["CORRUPT page=1".to_owned()];
        assert_eq!(
            problems(
                &Memory {
                    complaints,
                    ..memory.clone()
                },
                &outside,
                codes
            ),
            ["CORRUPT page=1"]
        );
        assert_eq!(
            problems(
                &memory,
                &Outside {
                    gap_ms: None,
                    ..outside.clone()
                },
                codes
            )
            .len(),
            1
        );
        assert_eq!(
            problems(
                &memory,
                &Outside {
                    out_of_order: 1,
                    ..outside.clone()
                },
                codes
            )
            .len(),
            1
        );
        assert_eq!(
            problems(&memory, &outside, ExitCodes { source: None, ..codes }).len(),
            1
        );
    }

    #[test]
    fn the_networks_of_the_demonstration_can_be_had() {
        let relays = relays("127.0.0.1:9".parse().unwrap()).unwrap();
        let paths = paths(&relays);
        assert_eq!(
            paths.iter().map(|path| path.rate_mbit).collect::<Vec<_>>(),
            [400, 200, 100]
        );
        assert!(paths[CUT_SEEDING].cut.is_some() && paths[CUT_STOPPED].cut.is_some() && paths[2].cut.is_none());
    }
}
