//! The API as a client meets it: a real server on a real socket, a real session over loopback, and a guest that needs no
//! KVM.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use umbra_core::guest::{Guest, GuestBuilder, GuestError, Harvest, PageBytes, PageReader, Space, StateRecord};
use umbra_core::shadow::ShadowConfig;
use umbra_netem::{Relay, RelayConfig, Weather};
use umbra_node::ShadowNode;
use umbra_quic::{Identity, ListenConfig, Listener, Peers, Tuning};
use umbra_units::{Bytes, PageCount, PageId, Pfn, SpaceId};

use super::client::{Client, EventStream};
use super::openapi;
use super::server::Server;
use super::types::{
    Accepted, Captures, Counters, Event, GuestState, Heat, Job, JobKind, JobState, Order, ProtectRequest, Role,
    SnapshotKind, Status, VcpuCounters,
};
use crate::events::Events;
use crate::exit::{Code, Failure};
use crate::limits;
use crate::process;
use crate::socket::PrivateSocket;
use crate::toy::{Toy, ToyBuilder, live};
use crate::vm::{Ending, Resident, Vm};

const PATIENCE: Duration = Duration::from_secs(20);

/// One process's guest and its API.
struct Process {
    vm: Arc<Vm>,
    client: Client,
    server: Server,
    _socket: PrivateSocket,
    _dir: tempfile::TempDir,
}

impl Process {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (socket, listener) = PrivateSocket::bind(&path).unwrap();
        let identity = Identity::generate(name).unwrap();
        let vm = Vm::new(Some(name.to_owned()), identity, Events::new(None).unwrap());
        let server = Server::start(listener, Arc::clone(&vm)).unwrap();
        Self {
            vm,
            client: Client::new(&path),
            server,
            _socket: socket,
            _dir: dir,
        }
    }

    fn running(toy: &Arc<Toy>) -> Self {
        let process = Self::new("source");
        process.vm.launched(resident(toy.clone()), false).unwrap();
        process
    }

    /// A shadow that lets in `source`, and where it listens.
    fn shadow_of(source: &Self, once: bool) -> (Self, Arc<ToyBuilder>, String) {
        let (process, listener, addr) = Self::listening(source);
        let builder = Arc::new(ToyBuilder::default());
        process.hold_shadows(listener, Arc::clone(&builder) as _, once);
        (process, builder, addr)
    }

    fn listening(source: &Self) -> (Self, Listener, String) {
        let process = Self::new("shadow");
        let listener = Listener::bind(ListenConfig {
            addrs: vec!["quic:127.0.0.1:0".parse().unwrap()],
            identity: process.vm.identity(),
            peers: Peers::only(source.vm.identity().fingerprint()),
            tuning: Tuning::default(),
        });
        let listener = listener.unwrap();
        let addr = format!("quic:{}", listener.addrs()[0]);
        (process, listener, addr)
    }

    /// A shadow whose guest does not start until it is told to.
    fn reluctant_shadow_of(source: &Self) -> (Self, mpsc::Sender<()>, String) {
        let (process, listener, addr) = Self::listening(source);
        let (start, told) = mpsc::channel();
        process.hold_shadows(listener, Arc::new(ReluctantBuilder(Mutex::new(Some(told)))), false);
        (process, start, addr)
    }

    fn hold_shadows(&self, listener: Listener, builder: Arc<dyn GuestBuilder>, once: bool) {
        let (node, handle) = ShadowNode::new(listener, builder, ShadowConfig::default());
        self.vm
            .shadow(node, handle, Vec::new(), once, |guest| Some(resident(guest)));
    }

    async fn status(&self) -> Status {
        self.client.get("status").await.unwrap()
    }

    /// What `GET path` answers, which must be as `docs/openapi.json` says.
    async fn assert_described(&self, path: &str) {
        let answer = self.client.get_bytes(path).await.unwrap();
        let answer = serde_json::from_slice(&answer).unwrap();
        openapi::assert_described("get", &format!("/api/v1/{path}"), 200, &answer);
    }

    async fn put(&self, path: &str, body: Value) -> Result<(), Failure> {
        self.client.put(path, &body).await
    }

    async fn refused(&self, path: &str) -> String {
        self.put(path, json!({})).await.unwrap_err().text
    }

    /// Follow `self`'s guest to `shadow` until it is ready.
    async fn protect(&self, shadow: &Self, addr: &str) {
        self.put("protect", json!({ "to": [addr], "peers": [shadow.fingerprint()] }))
            .await
            .unwrap();
        let ready = async {
            loop {
                let status = self.status().await;
                if status.phase.as_deref() == Some("following") && status.reasons.is_empty() {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, ready).await.unwrap();
    }

    fn fingerprint(&self) -> String {
        self.vm.identity().fingerprint().to_string()
    }

    async fn ending(&self) -> Ending {
        let mut ending = self.vm.ending();
        let ending = timeout(PATIENCE, ending.wait_for(Option::is_some))
            .await
            .unwrap()
            .unwrap();
        ending.clone().unwrap()
    }
}

/// A toy that starts when it is told to.
struct Reluctant {
    toy: Arc<Toy>,
    told: Mutex<mpsc::Receiver<()>>,
}

/// Builds one of them.
struct ReluctantBuilder(Mutex<Option<mpsc::Receiver<()>>>);

impl GuestBuilder for ReluctantBuilder {
    fn build(&self, description: &StateRecord) -> Result<Arc<dyn Guest>, GuestError> {
        let builder = ToyBuilder::default();
        builder.build(description)?;
        let toy = builder.built().unwrap();
        let told = Mutex::new(self.0.lock().unwrap().take().unwrap());
        Ok(Arc::new(Reluctant { toy, told }))
    }
}

impl PageReader for Reluctant {
    fn read_pages(&self, space: SpaceId, pages: &[Pfn], out: &mut Vec<u8>) -> Result<(), GuestError> {
        self.toy.read_pages(space, pages, out)
    }
}

impl Guest for Reluctant {
    fn resume(&self) -> Result<(), GuestError> {
        let _ = self.told.lock().unwrap().recv();
        self.toy.resume()
    }

    fn describe(&self) -> StateRecord {
        self.toy.describe()
    }

    fn spaces(&self) -> Vec<Space> {
        self.toy.spaces()
    }

    fn track(&self, on: bool) -> Result<(), GuestError> {
        self.toy.track(on)
    }

    fn harvest(&self) -> Result<Harvest, GuestError> {
        self.toy.harvest()
    }

    fn put_back(&self, harvest: &Harvest) {
        self.toy.put_back(harvest);
    }

    fn read_page(&self, page: PageId, out: &mut PageBytes) -> Result<(), GuestError> {
        self.toy.read_page(page, out)
    }

    fn apply_page(&self, page: PageId, bytes: &PageBytes) -> Result<(), GuestError> {
        self.toy.apply_page(page, bytes)
    }

    fn pause(&self) -> Result<(), GuestError> {
        self.toy.pause()
    }

    fn save(&self) -> Result<Vec<StateRecord>, GuestError> {
        self.toy.save()
    }

    fn restore(&self, records: &[StateRecord]) -> Result<(), GuestError> {
        self.toy.restore(records)
    }

    fn hold_output(&self) {}

    fn release_output(&self) {}
}

/// Listens to the power button from the second press on, and cannot be reset.
#[derive(Default)]
struct Buttons(std::sync::atomic::AtomicBool);

impl crate::vm::Panel for Buttons {
    fn power_button(&self) -> bool {
        self.0.swap(true, std::sync::atomic::Ordering::SeqCst)
    }

    fn reset(&self) -> Result<(), String> {
        Err("no kernel".to_owned())
    }

    fn resize_balloon(&self, size: Bytes) -> Result<(), String> {
        if size == Bytes::mib(1) {
            return Ok(());
        }
        Err("the guest has no balloon".to_owned())
    }

    fn counters(&self) -> Counters {
        let vcpu = VcpuCounters {
            exits: [("mmio_read".to_owned(), 7)].into(),
            emulated: [("stac".to_owned(), 3)].into(),
            written_pages: Some(9000),
            written_pages_per_second: None,
        };
        Counters {
            vcpus: vec![vcpu],
            balloon_bytes: Some(4096),
            dirty_log: None,
            captures: Captures {
                protect: 2,
                ..Captures::default()
            },
        }
    }
}

fn resident(guest: Arc<dyn Guest>) -> Resident {
    Resident {
        guest,
        vcpus: 1,
        memory: Bytes::mib(4),
        panel: Arc::new(Buttons::default()),
    }
}

fn running_toy() -> Arc<Toy> {
    let toy = Toy::new(PageCount(1_000));
    toy.resume().unwrap();
    live(Arc::clone(&toy));
    toy
}

async fn next(events: &mut EventStream, name: &str) -> Event {
    let wanted = async {
        loop {
            let event = events
                .next()
                .await
                .unwrap()
                .unwrap_or_else(|| panic!("the stream ended before `{name}`"));
            if event.event == name {
                return event;
            }
        }
    };
    timeout(PATIENCE, wanted)
        .await
        .unwrap_or_else(|_| panic!("no `{name}`"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_and_whoever_listens_hears_how_it_went() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, builder, addr) = Process::shadow_of(&source, false);
    assert_eq!(
        (shadow.status().await.role, source.status().await.role),
        (Role::Shadow, Role::Running)
    );
    let mut events = source.client.events().await.unwrap();
    shadow.assert_described("status").await;
    source.protect(&shadow, &addr).await;
    source.assert_described("ping").await;
    source.assert_described("status").await;
    let status = source.status().await;
    assert_eq!(
        (status.role, status.peer, status.pages),
        (Role::Source, Some(shadow.fingerprint()), Some(1_000))
    );
    assert_eq!(
        status.paths[0].remote.as_ref().map(|remote| format!("quic:{remote}")),
        Some(addr.clone())
    );

    let Accepted { job } = source
        .client
        .put_for("migrate", &json!({ "verify": "full" }))
        .await
        .unwrap();
    next(&mut events, "stop-decided").await;
    assert_eq!(next(&mut events, "gave-up").await.properties["term"], 2);
    let told = next(&mut events, "job-finished").await;
    openapi::assert_described("get", "/api/v1/events", 200, &serde_json::to_value(&told).unwrap());
    let finished: Job = serde_json::from_value(told.properties).unwrap();
    assert_eq!((finished.id, finished.state), (job, JobState::Done));
    source.assert_described("jobs/last").await;
    source.assert_described("status").await;
    let report = finished.report.unwrap();
    assert_eq!((report.term, &report.to, report.audited), (2, &vec![addr], true));

    assert!(matches!(source.ending().await, Ending::Moved(moved) if *moved == report));
    let there = shadow.status().await;
    assert_eq!(
        (there.role, there.guest_state, there.term),
        (Role::Running, GuestState::Running, Some(2))
    );
    assert_eq!(there.guest, Some(report.guest));
    let (here, there) = (toy, builder.built().unwrap());
    assert!(!here.runs() && there.runs() && there.is_sound());
    // The process ends: every stream does.
    source.vm.events().close();
    timeout(PATIENCE, async { while events.next().await.unwrap().is_some() {} })
        .await
        .unwrap();
    source.server.close().await;
    assert_eq!(
        source.client.get::<Status>("status").await.unwrap_err().code,
        Code::NoAnswer
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_kept_beside_a_session_and_whoever_listens_hears_how_it_went() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, builder, addr) = Process::shadow_of(&source, false);
    source.protect(&shadow, &addr).await;
    let dir = tempfile::tempdir().unwrap();
    let keep = async |name: &str, more: Value| {
        let mut events = source.client.events().await.unwrap();
        let mut request = json!({ "to": dir.path().join(name), "verify": "full" });
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let Accepted { job } = source.client.put_for("snapshot", &request).await?;
        assert_eq!(next(&mut events, "job-started").await.properties["kind"], "snapshot");
        let finished: Job = serde_json::from_value(next(&mut events, "job-finished").await.properties).unwrap();
        assert_eq!((finished.id, finished.kind), (job, JobKind::Snapshot));
        assert_eq!(source.status().await.job, Some(finished.clone()));
        Ok::<Job, Failure>(finished)
    };
    let full = keep("a", json!({})).await.unwrap();
    let report = full.snapshot.unwrap();
    assert_eq!(
        (full.state, full.report, report.cut, report.audited),
        (JobState::Done, None, 1, true)
    );
    let sum: f64 = report.breakdown_ms.parts().iter().map(|(_, part)| part).sum();
    assert!((sum - report.pause_ms).abs() < 1e-6, "{report:?}");
    assert!(toy.runs());
    let held = keep("b", json!({ "kind": "differential", "pause": true }))
        .await
        .unwrap();
    assert_eq!(
        (held.snapshot.unwrap().kind, source.status().await.guest_state),
        (SnapshotKind::Differential, GuestState::Paused)
    );
    assert!(!toy.runs());
    source.put("resume", json!({})).await.unwrap();
    assert!(toy.runs());
    let refused = keep("a", json!({ "kind": "differential" })).await.unwrap_err();
    assert!(
        refused
            .text
            .ends_with("a differential snapshot cannot replace one that it goes on from"),
        "{refused}"
    );
    let wrong = source.client.put("snapshot", &json!({ "to": "a" })).await.unwrap_err();
    assert_eq!(
        (wrong.code, wrong.text.as_str()),
        (Code::BadArguments, "to: expected an absolute path, got 'a'")
    );

    // Every page is compared at the move: what the snapshots harvested, the session has heard of.
    let mut events = source.client.events().await.unwrap();
    let _: Accepted = source
        .client
        .put_for("migrate", &json!({ "verify": "full" }))
        .await
        .unwrap();
    let moved: Job = serde_json::from_value(next(&mut events, "job-finished").await.properties).unwrap();
    assert_eq!((moved.kind, moved.state), (JobKind::Migrate, JobState::Done));
    assert!(builder.built().unwrap().is_sound());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_heat_of_memory_is_known_while_a_shadow_follows() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let nobody = source.client.get::<Heat>("heat").await.unwrap_err();
    assert_eq!(nobody.text, "no shadow follows the guest, so nobody looks");
    let (shadow, _builder, addr) = Process::shadow_of(&source, false);
    source.protect(&shadow, &addr).await;
    source.assert_described("heat").await;
    let pages = source.status().await.pages.unwrap();
    for regions in [1, 2, 16_384] {
        let heat: Heat = source.client.get(&format!("heat?regions={regions}")).await.unwrap();
        let all: u64 = heat
            .spaces
            .iter()
            .flat_map(|space| &space.regions)
            .flat_map(|region| region.classes.named())
            .map(|(_, pages)| pages)
            .sum();
        assert_eq!(all, pages, "every page once");
        assert!(heat.spaces.iter().all(|space| space.regions.len() <= regions));
    }
    for (query, why) in [
        ("regions=0", "regions: expected 1 to 16384, got 0"),
        ("regions=16385", "regions: expected 1 to 16384, got 16385"),
        ("regions=many", "regions: a number expected"),
        ("colour=red", "regions: a number expected"),
    ] {
        let refused = source.client.get::<Heat>(&format!("heat?{query}")).await.unwrap_err();
        assert_eq!(
            (refused.code, refused.text.as_str()),
            (Code::BadArguments, why),
            "{query}"
        );
    }
    let outlook = source.status().await.outlook.unwrap();
    assert_eq!(outlook.order, Order::ColdFirst);
    let metrics = source.client.get_bytes("metrics").await.unwrap();
    let metrics = String::from_utf8(metrics.to_vec()).unwrap();
    assert!(metrics.contains("umbra_heat_pages{class=\"cold\"} "), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_switchover_is_under_way_nobody_else_stops_or_starts_the_guest() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, _builder, addr) = Process::shadow_of(&source, false);
    source.protect(&shadow, &addr).await;
    let mut events = source.client.events().await.unwrap();
    // A microsecond of pause is never predicted: the attempt goes on until it is cancelled.
    let _: Accepted = source
        .client
        .put_for("migrate", &json!({ "downtime_limit_ms": 0.001 }))
        .await
        .unwrap();
    let under_way = "a switchover is under way; wait for it or `cancel` it";
    for command in ["pause", "resume", "stop", "unprotect", "migrate"] {
        assert_eq!(source.refused(command).await, under_way, "{command}");
    }
    let keep = source.client.put("snapshot", &json!({ "to": "/nowhere/x" })).await;
    assert_eq!(keep.unwrap_err().text, under_way);
    let protect = ProtectRequest {
        to: vec![addr],
        peers: vec![shadow.fingerprint()],
        identity: None,
        cache_bytes: None,
        compression: None,
        harvest_ms: None,
        encode_threads: None,
        encode_cpu_percent: None,
        order: None,
        pause_promise_ms: None,
    };
    let refused = source.client.put("protect", &protect).await.unwrap_err();
    assert_eq!(refused.text, "a shadow is being kept already; `unprotect` ends that");
    let status = source.status().await;
    assert_eq!((status.switching, status.guest_state), (true, GuestState::Switching));
    assert!(toy.runs());

    source.put("cancel", json!({})).await.unwrap();
    let finished: Job = serde_json::from_value(next(&mut events, "job-finished").await.properties).unwrap();
    assert_eq!(
        (finished.state, finished.error.as_deref()),
        (JobState::Failed, Some("cancelled by an operator"))
    );
    assert_eq!(source.client.get::<Job>("jobs/last").await.unwrap(), finished);
    source.put("pause", json!({})).await.unwrap();
    assert!(!toy.runs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_was_handed_over_runs_here_again_only_if_somebody_vouches_for_it() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, start, addr) = Process::reluctant_shadow_of(&source);
    source.protect(&shadow, &addr).await;
    let mut events = source.client.events().await.unwrap();
    let _: Accepted = source.client.put_for("migrate", &json!({})).await.unwrap();
    next(&mut events, "gave-up").await;
    assert_eq!(source.status().await.guest_state, GuestState::HandedOver);
    for command in ["pause", "resume", "stop", "unprotect", "migrate"] {
        let refused = source.refused(command).await;
        assert!(
            refused.starts_with("the guest was handed over in term 2 and only the shadow may run it"),
            "{refused}"
        );
    }
    assert_eq!(source.refused("cancel").await, "too late: the guest was handed over");
    // A process that is told to end now does not know whose the guest is, and says so; it does not run it.
    let (code, text) = process::wind_down(&source.vm, &Ending::Stopped("by SIGTERM".to_owned())).await;
    assert_eq!(code, Code::HandedOver);
    assert!(text.contains("the shadow has not said whether it runs there"), "{text}");
    assert!(!toy.runs());

    source.put("resume", json!({ "peer_is_dead": true })).await.unwrap();
    next(&mut events, "unprotected").await;
    let status = source.status().await;
    assert_eq!((status.role, status.guest_state), (Role::Running, GuestState::Running));
    assert!(
        status.term > Some(2),
        "the term that was given away is void: {:?}",
        status.term
    );
    // Told to run before the session was told to be over; its thread comes to it.
    let runs = async {
        while !toy.runs() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, runs).await.unwrap();
    drop(start);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_word_that_the_guest_runs_arrives_after_an_outage_of_every_path() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, start, addr) = Process::reluctant_shadow_of(&source);
    let shadow_addr = addr.strip_prefix("quic:").unwrap().parse().unwrap();
    let relay = Relay::start(RelayConfig::to(shadow_addr, Weather::clear())).unwrap();
    source.protect(&shadow, &format!("quic:{}", relay.addr())).await;
    let mut events = source.client.events().await.unwrap();
    let mut there = shadow.client.events().await.unwrap();
    let _: Accepted = source.client.put_for("migrate", &json!({})).await.unwrap();
    // The only path dies after the shadow was told; only then does the guest start there.
    next(&mut events, "gave-up").await;
    while next(&mut there, "phase").await.properties["to"] != "starting" {}
    relay.blackout(true);
    next(&mut events, "link-down").await;
    start.send(()).unwrap();
    next(&mut there, "running").await;
    // The connection is dead at both ends; the path that returns is a new one.
    let died = async {
        while source.status().await.paths[0].died == 0 {
            tokio::task::yield_now().await
        }
    };
    timeout(PATIENCE, died).await.unwrap();
    assert_eq!(source.status().await.guest_state, GuestState::HandedOver);
    relay.blackout(false);
    let finished: Job = serde_json::from_value(next(&mut events, "job-finished").await.properties).unwrap();
    assert_eq!(finished.state, JobState::Done);
    assert!(matches!(source.ending().await, Ending::Moved(_)));
    assert!(!toy.runs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_buttons_of_a_guest_are_pressed_and_what_comes_of_it_is_told() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let deaf = source.refused("power-button").await;
    assert!(
        deaf.starts_with("the guest does not listen to its power button"),
        "{deaf}"
    );
    source.put("power-button", json!({})).await.unwrap();
    assert_eq!(
        source.put("reboot", json!({})).await.unwrap_err().to_string(),
        "no kernel"
    );
    source.put("resize", json!({ "balloon_bytes": 1 << 20 })).await.unwrap();
    for (bytes, why) in [
        (2 << 20, "the guest has no balloon"),
        (
            4 << 20,
            "balloon_bytes: expected less than the guest's memory of 4.0 MiB, got 4.0 MiB",
        ),
    ] {
        let refused = source
            .put("resize", json!({ "balloon_bytes": bytes }))
            .await
            .unwrap_err();
        assert_eq!(refused.text, why);
    }
    source.assert_described("counters").await;
    let counters: Counters = source.client.get("counters").await.unwrap();
    assert_eq!(
        (counters.vcpus[0].exits["mmio_read"], counters.balloon_bytes),
        (7, Some(4096))
    );
    let metrics = source.client.get_bytes("metrics").await.unwrap();
    let metrics = String::from_utf8(metrics.to_vec()).unwrap();
    assert!(
        metrics.contains("umbra_vcpu_written_pages_total{vcpu=\"0\"} 9000\n")
            && !metrics.contains("umbra_vcpu_written_pages_per_second")
            && metrics.contains("umbra_captures_total{by=\"protect\"} 2\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("umbra_vcpu_exits_total{vcpu=\"0\",kind=\"mmio_read\"} 7\n"),
        "{metrics}"
    );
    assert!(
        metrics.contains("umbra_vcpu_emulated_total{vcpu=\"0\",instruction=\"stac\"} 3\n"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_guest_is_followed_but_not_moved() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, _builder, addr) = Process::shadow_of(&source, false);
    source.put("pause", json!({})).await.unwrap();
    source.put("pause", json!({})).await.unwrap();
    source.protect(&shadow, &addr).await;
    assert_eq!(source.status().await.guest_state, GuestState::Paused);
    let refused = source.refused("migrate").await;
    assert_eq!(
        refused,
        "the guest is paused, and would run where it arrives; `resume` it first"
    );
    source.put("resume", json!({})).await.unwrap();
    assert!(toy.runs());
    let mut events = source.client.events().await.unwrap();
    let _: Accepted = source.client.put_for("migrate", &json!({})).await.unwrap();
    next(&mut events, "job-finished").await;
    assert!(matches!(source.ending().await, Ending::Moved(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_ends_at_either_side_and_the_guest_stays() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, _builder, addr) = Process::shadow_of(&source, false);
    source.protect(&shadow, &addr).await;
    source.put("unprotect", json!({})).await.unwrap();
    let status = source.status().await;
    assert_eq!((status.role, status.phase), (Role::Running, None));

    source.protect(&shadow, &addr).await;
    let mut events = source.client.events().await.unwrap();
    shadow.put("unprotect", json!({})).await.unwrap();
    let unprotected = next(&mut events, "unprotected").await;
    let reason = unprotected.properties["reason"].as_str().unwrap();
    assert!(reason.contains("the shadow's operator ended the session"), "{reason}");
    assert!(toy.runs());
    assert_eq!(source.status().await.role, Role::Running);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shadow_for_one_session_ends_with_it() {
    let source = Process::running(&running_toy());
    let (shadow, _builder, addr) = Process::shadow_of(&source, true);
    source.protect(&shadow, &addr).await;
    source.put("unprotect", json!({})).await.unwrap();
    let why = "the session ended without the guest running here";
    assert_eq!(shadow.ending().await, Ending::Failed(why.to_owned()));
}

#[tokio::test]
async fn what_makes_no_sense_at_this_process_is_refused_and_says_what_would() {
    let source = Process::running(&running_toy());
    assert_eq!(
        source.refused("migrate").await,
        "nobody shadows this guest; `protect` it first"
    );
    assert_eq!(source.refused("unprotect").await, "nobody shadows this guest");
    assert_eq!(source.refused("cancel").await, "no switchover is under way");
    let vouched = source.put("resume", json!({ "peer_is_dead": true })).await.unwrap_err();
    assert_eq!(vouched.text, "nothing was handed over: nobody shadows this guest");
    assert_eq!(
        source.client.get::<Job>("jobs/last").await.unwrap_err().text,
        "no long job has been asked for yet"
    );

    let (shadow, _builder, _addr) = Process::shadow_of(&source, false);
    let not_here = "the guest is not here: this process holds its shadow";
    for command in ["pause", "migrate", "cancel"] {
        assert_eq!(shadow.refused(command).await, not_here, "{command}");
    }
    let resume = shadow.refused("resume").await;
    assert!(
        resume.starts_with("the guest is not here: `migrate` at its source brings it"),
        "{resume}"
    );
    let vouched = shadow.put("resume", json!({ "peer_is_dead": true })).await.unwrap_err();
    assert_eq!(vouched.text, "no session is under way");
    assert_eq!(vouched.code, Code::Failure);
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said_by_name() {
    let source = Process::running(&running_toy());
    let peer = "ab".repeat(32);
    for (path, body, expected) in [
        (
            "protect",
            json!({}),
            "request body: missing field `to` at line 1 column 2",
        ),
        (
            "protect",
            json!({ "to": [], "peers": [peer] }),
            "to: expected 1 to 64, got 0",
        ),
        (
            "protect",
            json!({ "to": ["quic:192.0.2.1:7"], "peers": [] }),
            "peers: expected 1 to 64, got 0",
        ),
        (
            "protect",
            json!({ "to": ["quic:192.0.2.1:7"], "peers": ["x"] }),
            "peers: `x`: a fingerprint of 64 hexadecimal digits expected",
        ),
        (
            "protect",
            json!({ "to": ["quic:192.0.2.1:7"], "peers": [peer], "harvest_ms": -1 }),
            "harvest_ms: expected 0.001 to 86400000 ms, got -1",
        ),
        (
            "migrate",
            json!({ "timeout_ms": 1e300 }),
            "timeout_ms: expected 0.001 to 86400000 ms, got 1",
        ),
        (
            "resume",
            json!({ "force": true }),
            "request body: unknown field `force`, expected `peer_is_dead`",
        ),
    ] {
        let failure = source.put(path, body).await.unwrap_err();
        assert!(failure.text.starts_with(expected), "{path}: {failure}");
        assert_eq!(failure.code, Code::BadArguments);
    }
    let missing = source
        .put("protect", json!({ "to": ["nowhere"], "peers": [peer] }))
        .await
        .unwrap_err();
    assert!(missing.text.starts_with("to: `nowhere`: quic:IP:PORT"), "{missing}");
    assert_eq!(
        source.client.get::<Value>("openapi.json").await.unwrap(),
        openapi::description()
    );
    let gone = source.client.get::<Value>("nothing").await.unwrap_err();
    assert_eq!(gone.text, "there is no /api/v1/nothing");
    let method = source.client.get::<Value>("pause").await.unwrap_err();
    assert_eq!(method.text, "the other method, GET or PUT, expected");
    let long = json!({ "peer_is_dead": "x".repeat(limits::REQUEST_BYTES) });
    let long = source.put("resume", long).await.unwrap_err();
    assert!(
        long.text.starts_with("request body: expected at most 65536 bytes"),
        "{long}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shadow_that_is_somebody_else_is_not_given_the_guest() {
    let toy = running_toy();
    let source = Process::running(&toy);
    let (shadow, builder, addr) = Process::shadow_of(&source, false);
    let expected = "ab".repeat(32);
    let request = json!({ "to": [addr], "peers": [expected] });
    let failure = source.put("protect", request).await.unwrap_err();
    let shows = format!(
        "shows certificate {}, but only {expected} is allowed here",
        shadow.fingerprint()
    );
    assert!(failure.text.contains(&shows), "{failure}");
    assert_eq!(
        (failure.code, source.status().await.role),
        (Code::Failure, Role::Running)
    );
    assert!(toy.runs() && builder.built().is_none());
}

#[tokio::test]
async fn stopping_ends_the_process_and_says_by_whom() {
    let source = Process::running(&running_toy());
    source.put("stop", json!({})).await.unwrap();
    assert_eq!(source.ending().await, Ending::Stopped("by its operator".to_owned()));
    let status = source.status().await;
    assert_eq!(
        (status.role, status.exit.as_deref()),
        (Role::Ended, Some("stopped by its operator"))
    );
    // Only the first reason counts.
    source.vm.end(Ending::Failed("later".to_owned()));
    assert_eq!(source.ending().await, Ending::Stopped("by its operator".to_owned()));
}

#[tokio::test]
async fn clients_beyond_the_bound_wait_for_a_place() {
    let source = Process::running(&running_toy());
    let mut streams = Vec::new();
    for _ in 0..limits::API_CONNECTIONS {
        streams.push(source.client.events().await.unwrap());
    }
    let waiting = source.client.get::<Value>("ping");
    tokio::pin!(waiting);
    assert!(
        timeout(Duration::from_millis(50), &mut waiting).await.is_err(),
        "no place is free"
    );
    drop(streams.pop());
    // The server notices that its reader is gone when it has something to say.
    source
        .vm
        .events()
        .tell(crate::events::Teller::Process, "hello", json!({}));
    let pong = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(pong["name"], "source");
}

#[tokio::test]
async fn metrics_are_there_for_those_who_scrape() {
    let source = Process::running(&running_toy());
    let text = source.client.get_bytes("metrics").await.unwrap();
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert!(
        text.contains("umbra_guest_running 1\n") && text.contains("umbra_term 1\n"),
        "{text}"
    );
}
