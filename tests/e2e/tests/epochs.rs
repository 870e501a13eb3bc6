//! Epochs are cut while the guest runs on, and the last one that was committed is what its host's death leaves.
//!
//! What a cut kept is proven by going back to it: the guest that runs on there checks every page of its memory against its
//! own account of what it wrote, which came with the same cut. A page that is newer than the cut, or older, or half of
//! each, would not agree. `verify` proves something else, that both memories are equal page by page, and needs the guest
//! to stand while they are compared.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use umbra_e2e::{Event, Guest, Host, Move, Roads, Shadow, Vm, Weather, World, named, phase, story};
use umbra_units::{Bandwidth, Bytes};

/// Every way to keep the pages of a cut while the guest runs on.
const WAYS: [&str; 3] = ["copy", "parallel", "protect"];

/// A link on which a cut of a few MiB takes a while.
fn narrow() -> Weather {
    Weather::link(Bandwidth::mbit(60), Duration::from_millis(2))
}

struct Scene {
    here: Host,
    there: Host,
    vm: Vm,
    shadow: Shadow,
    roads: Roads,
}

/// A guest whose shadow is complete, and may take so much memory to keep an epoch apart.
fn followed(world: &World, guest: &Guest, staging: Option<&str>) -> Result<Scene> {
    let (here, there) = (world.host("here")?, world.host("there")?);
    let mut vm = here.launch(guest)?;
    vm.is_ready()?;
    let staging: Vec<&str> = staging.into_iter().flat_map(|size| ["--staging", size]).collect();
    let shadow = there.shadow_with(&[&here], &staging)?;
    let roads = world.roads(&shadow, &[Weather::clear(); 2])?;
    vm.protect(&shadow, &roads)?;
    vm.is_following()?;
    vm.shadow_is_ready()?;
    Ok(Scene {
        here,
        there,
        vm,
        shadow,
        roads,
    })
}

/// Another session of a process that has followed, been followed or cut before: those lead to `following` as well, and the
/// first copy is what tells this one's from theirs.
fn follow_anew(vm: &mut Vm, shadow: &Shadow, roads: &Roads) -> Result<()> {
    vm.protect(shadow, roads)?;
    vm.process.until("the first copy", phase("seeding"))?;
    vm.is_following()
}

/// The number of the epoch that a side says is committed.
fn committed(status: &Value) -> Option<u64> {
    status["committed"]["epoch"].as_u64()
}

/// An event of this name that is about this epoch.
fn of_epoch(name: &str, epoch: u64) -> impl Fn(&Event) -> bool + '_ {
    move |event| event.name == name && event.properties["epoch"] == epoch
}

impl Scene {
    /// Cut an epoch and see both sides say so; its number.
    fn commits(&mut self, request: &Value) -> Result<u64> {
        let report = self.vm.cut(request)?;
        let epoch = report["epoch"].as_u64().context("an epoch's number")?;
        ensure!(report["audited"] == (request["verify"] == "full"), "{report}");
        if let Some(by) = request["capture"].as_str() {
            ensure!(report["capture"] == by, "asked for {by}: {report}");
        }
        self.vm.process.once("the source tells of it", of_epoch("cut", epoch))?;
        self.shadow
            .process
            .once("the shadow tells of it", of_epoch("committed", epoch))?;
        let (here, there) = (self.vm.process.status()?, self.shadow.process.status()?);
        ensure!(committed(&here) == Some(epoch), "the source: {}", here["committed"]);
        ensure!(committed(&there) == Some(epoch), "the shadow: {}", there["committed"]);
        ensure!(
            here["guest_state"] == "running" && here["phase"] == "following",
            "{here}"
        );
        Ok(epoch)
    }

    /// Many pages are written and few of them shipped, so that a cut begun now has much to ship while the guest runs on.
    fn falls_behind(&mut self) -> Result<()> {
        self.roads.all(narrow());
        self.vm.beats_on(300)
    }

    /// The guest is well here, and another shadow follows it, commits an epoch of it, and takes it.
    fn goes_on_elsewhere(self, world: &World) -> Result<()> {
        let Self {
            here,
            there,
            mut vm,
            shadow,
            ..
        } = self;
        vm.beats_on(200)?;
        drop(shadow);
        if vm.process.status()?["role"] == "source" {
            vm.process.put("unprotect", &json!(null))?;
        }
        let shadow = there.shadow_for(&here)?;
        let roads = world.roads(&shadow, &[Weather::clear(); 2])?;
        follow_anew(&mut vm, &shadow, &roads)?;
        let mut scene = Self {
            here,
            there,
            vm,
            shadow,
            roads,
        };
        scene.commits(&json!({ "verify": "full" }))?;
        let (mut vm, report) = scene.vm.migrate_to(scene.shadow, &Move::verified().patient())?;
        ensure!(report.audited(), "{report:?}");
        vm.checks_on(10_000)?;
        vm.stop()
    }
}

/// A guest that writes like this is cut again and again, in every way, with every page compared and without.
fn is_cut_again_and_again(guest: &Guest) {
    story(|world| {
        let mut scene = followed(world, guest, None)?;
        let mut latest = 0;
        for verify in [json!(null), json!("full")] {
            for way in WAYS {
                scene.vm.beats_on(100)?;
                let epoch = scene.commits(&json!({ "capture": way, "verify": verify }))?;
                ensure!(epoch > latest, "epoch {epoch} after {latest}");
                latest = epoch;
            }
        }
        scene.vm.checks_on(10_000)?;
        let (mut vm, report) = scene.vm.migrate_to(scene.shadow, &Move::verified().patient())?;
        ensure!(
            report.audited() && report.0["epoch"].as_u64() > Some(latest),
            "{report:?}"
        );
        vm.checks_on(10_000)?;
        vm.stop()
    });
}

#[test]
fn a_guest_that_writes_all_over_its_memory_is_cut_again_and_again() {
    is_cut_again_and_again(&Guest::dirty("40M", "mixed"));
}

#[test]
fn a_guest_that_writes_some_pages_much_oftener_is_cut_again_and_again() {
    is_cut_again_and_again(&Guest::dirty("40M", "random").with("pattern=zipf").with_cpus(2));
}

#[test]
fn a_guest_that_writes_page_after_page_is_cut_again_and_again() {
    is_cut_again_and_again(&Guest::dirty("40M", "text").with("pattern=seq"));
}

#[test]
fn a_guest_that_moves_from_place_to_place_is_cut_again_and_again() {
    is_cut_again_and_again(&Guest::dirty("40M", "counter").with("pattern=phase phase=200ms"));
}

/// A guest is cut, kept in this way, while both of its vCPUs write; its host dies later; it goes on from the cut.
fn goes_back_to_its_cut(way: &str, guest: &Guest) {
    story(|world| {
        let mut scene = followed(world, &guest.clone().with_cpus(2), None)?;
        // Twice: what is put aside for the first epoch is dropped when the second is committed.
        scene.commits(&json!({ "capture": way }))?;
        scene.vm.beats_on(200)?;
        // Nothing settles first, so that as much as can be is captured and then written over while it ships.
        scene.falls_behind()?;
        let before = scene.vm.console.counted();
        let epoch = scene.commits(&json!({ "capture": way, "settle_ms": 1, "timeout_ms": 60_000 }))?;
        scene.roads.all(Weather::clear());
        // More than a thousand beats, so that the guest's next count there is one that it has passed here.
        scene.vm.beats_on(1_500)?;
        let lost = scene.vm.console.counted();
        scene.vm.process.kill()?;
        scene.shadow.process.until("the loss is told", named("link-down"))?;
        let Scene {
            here,
            there,
            vm,
            shadow,
            ..
        } = scene;
        ensure!(shadow.is_silent(), "the shadow ran without being told");
        let status = shadow.process.status()?;
        ensure!(
            committed(&status) == Some(epoch) && status["staged_bytes"].as_u64() > Some(0),
            "what came after the cut is put aside: {status}"
        );
        let refused = shadow.process.refuses("resume", &json!(null))?;
        ensure!(refused.contains("--peer-is-dead"), "{refused}");

        shadow.process.put("resume", &json!({ "peer_is_dead": true }))?;
        shadow.runs_its_guest()?;
        let mut vm = vm.goes_back_in(shadow);
        vm.checks_on(20_000)?;
        vm.beats_on(1_000)?;
        let began = vm.console.counted() - vm.console.beats();
        ensure!(
            (before..lost).contains(&began),
            "cut after beat {before}, lost at {lost}, went on from {began}"
        );
        // Where it runs now, it is followed and cut as it was before.
        let shadow = here.shadow_for(&there)?;
        let roads = world.roads(&shadow, &[Weather::clear(); 2])?;
        follow_anew(&mut vm, &shadow, &roads)?;
        let mut scene = Scene {
            here: there,
            there: here,
            vm,
            shadow,
            roads,
        };
        scene.commits(&json!({ "capture": way }))?;
        scene.commits(&json!({ "capture": way, "verify": "full" }))?;
        scene.vm.checks_on(5_000)?;
        scene.vm.stop()
    });
}

#[test]
fn a_guest_whose_host_dies_goes_on_from_a_cut_that_was_copied() {
    goes_back_to_its_cut("copy", &Guest::dirty("60M", "mixed"));
}

#[test]
fn a_guest_whose_host_dies_goes_on_from_a_cut_that_was_copied_by_several() {
    goes_back_to_its_cut("parallel", &Guest::dirty("60M", "text").with("pattern=zipf"));
}

#[test]
fn a_guest_whose_host_dies_goes_on_from_a_cut_that_was_protected() {
    goes_back_to_its_cut("protect", &Guest::dirty("60M", "mixed").with("pattern=seq"));
}

/// How far a cut has come when something befalls it.
#[derive(Debug, Clone, Copy)]
enum When {
    /// Pages that have settled ship.
    Settling,
    /// The guest stands, or has just run on.
    Stopped,
    /// The guest runs on, and the cut's pages ship.
    Shipping,
}

/// Begin a cut that has much to ship, and wait until it has come so far. The job's number.
fn cut_until(scene: &mut Scene, when: When, request: &Value) -> Result<u64> {
    scene.falls_behind()?;
    let mut request = request.clone();
    request["settle_ms"] = json!(if matches!(when, When::Settling) { 10_000 } else { 1 });
    let job = scene.vm.begin_cut(&request)?;
    scene.vm.process.until("the cut begins", named("cut-began"))?;
    if matches!(when, When::Stopped | When::Shipping) {
        scene.vm.process.until("the guest stands", phase("cutting"))?;
    }
    if matches!(when, When::Shipping) {
        scene.vm.process.until("the guest runs on", phase("following"))?;
    }
    Ok(job)
}

fn busy() -> Guest {
    Guest::dirty("60M", "random")
}

#[test]
fn a_shadow_killed_at_any_moment_of_a_cut_costs_the_guest_nothing() {
    for (when, way) in [When::Settling, When::Stopped, When::Shipping].into_iter().zip(WAYS) {
        story(|world| {
            let mut scene = followed(world, &busy(), None)?;
            let request = json!({ "capture": way, "timeout_ms": 4_000 });
            let job = cut_until(&mut scene, when, &request)?;
            scene.shadow.process.kill()?;
            let why = scene.vm.cut_fails(job)?;
            println!("killed at {when:?}: {why}");
            scene.goes_on_elsewhere(world)
        });
    }
}

#[test]
fn a_cut_taken_back_at_any_moment_leaves_the_guest_running_and_the_next_cut_whole() {
    story(|world| {
        let mut scene = followed(world, &busy(), None)?;
        let first = scene.commits(&json!({}))?;
        for way in WAYS {
            for when in [When::Settling, When::Stopped, When::Shipping] {
                let job = cut_until(&mut scene, when, &json!({ "capture": way, "timeout_ms": 60_000 }))?;
                scene.vm.process.put("cancel", &json!(null))?;
                let why = scene.vm.cut_fails(job)?;
                ensure!(why.contains("cancelled by an operator"), "{when:?}, {way}: {why}");
                let status = scene.vm.process.status()?;
                ensure!(
                    committed(&status) == Some(first) && status["cutting"] == false,
                    "{when:?}, {way}: {status}"
                );
                scene.vm.beats_on(50)?;
                scene.roads.all(Weather::clear());
            }
        }
        let epoch = scene.commits(&json!({ "verify": "full" }))?;
        ensure!(epoch > first, "{epoch} after {first}");
        scene.goes_on_elsewhere(world)
    });
}

#[test]
fn a_cut_whose_paths_are_gone_is_committed_when_they_are_back() {
    story(|world| {
        let mut scene = followed(world, &busy(), None)?;
        let job = cut_until(&mut scene, When::Shipping, &json!({ "timeout_ms": 60_000 }))?;
        scene.roads.cut_all();
        scene.vm.process.until("the loss is told", named("link-down"))?;
        scene.vm.beats_on(200)?;
        scene.roads.all(Weather::clear());
        scene.roads.mend_all();
        let done = scene.vm.job_ends(job)?;
        ensure!(done["state"] == "done", "{done}");
        scene.goes_on_elsewhere(world)
    });
}

#[test]
fn a_cut_whose_paths_are_gone_for_too_long_is_given_up_and_the_next_is_committed() {
    story(|world| {
        let mut scene = followed(world, &busy(), None)?;
        let first = scene.commits(&json!({}))?;
        let job = cut_until(&mut scene, When::Shipping, &json!({ "timeout_ms": 2_000 }))?;
        scene.roads.cut_all();
        let why = scene.vm.cut_fails(job)?;
        ensure!(why.contains("timeout"), "{why}");
        scene.vm.process.until("the loss is told", named("link-down"))?;
        scene.vm.beats_on(200)?;
        ensure!(committed(&scene.shadow.process.status()?) == Some(first), "it is kept");
        scene.roads.all(Weather::clear());
        scene.roads.mend_all();
        scene.vm.process.until("a path is back", named("link-up"))?;
        let epoch = scene.commits(&json!({ "verify": "full" }))?;
        ensure!(epoch > first, "{epoch} after {first}");
        scene.goes_on_elsewhere(world)
    });
}

#[test]
fn a_shadow_with_little_staging_is_kept_whole_by_cuts_of_the_sources_own() {
    story(|world| {
        let mut scene = followed(world, &Guest::dirty("3M", "mixed"), Some("16M"))?;
        let first = scene.commits(&json!({}))?;
        for n in 1..=3 {
            let began = scene.vm.process.until("a cut of its own", named("cut-began"))?;
            let reason = began.properties["reason"].to_string();
            if reason.contains("asked") {
                continue;
            }
            ensure!(reason.contains("staging"), "{n}: {reason}");
            let cut = scene.vm.process.until("it is committed", named("cut"))?;
            ensure!(cut.properties["epoch"].as_u64() > Some(first), "{cut}");
        }
        let status = scene.shadow.process.status()?;
        ensure!(status["staging_bytes"] == Bytes::mib(16).0, "{status}");
        ensure!(
            status["staged_bytes"].as_u64() <= status["staging_bytes"].as_u64(),
            "{status}"
        );
        ensure!(
            scene.shadow.process.told(named("epoch-given-up")).is_none(),
            "nothing was given up"
        );
        scene.vm.checks_on(5_000)?;
        // Whatever is the latest now, it can be gone back to.
        scene.vm.process.kill()?;
        scene.shadow.process.until("the loss is told", named("link-down"))?;
        scene.shadow.process.put("resume", &json!({ "peer_is_dead": true }))?;
        scene.shadow.runs_its_guest()?;
        let mut vm = scene.vm.goes_back_in(scene.shadow);
        vm.checks_on(10_000)?;
        vm.stop()
    });
}

#[test]
fn a_shadow_whose_staging_is_far_too_small_says_that_it_gave_its_epoch_up() {
    story(|world| {
        let mut scene = followed(world, &Guest::dirty("60M", "mixed"), Some("1M"))?;
        let epoch = scene.vm.cut(&json!({}))?["epoch"].as_u64().context("an epoch")?;
        let given_up =
            |event: &Event| event.name == "epoch-given-up" && event.properties["epoch"].as_u64() >= Some(epoch);
        let told = scene.shadow.process.once("the shadow says so", given_up)?;
        ensure!(told.properties["reason"].to_string().contains("staging"), "{told}");
        scene.vm.process.once("the source says so", given_up)?;
        // Following goes on, and whole epochs are committed all the same.
        scene.vm.process.until("the next cut", |event| {
            event.name == "cut" && event.properties["epoch"].as_u64() > Some(epoch)
        })?;
        scene.goes_on_elsewhere(world)
    });
}

#[test]
fn a_paused_guest_is_not_let_run_by_a_cut() {
    story(|world| {
        // So little staging that the source wants cuts of its own all the time.
        let mut scene = followed(world, &Guest::dirty("20M", "mixed"), Some("4M"))?;
        scene.vm.cut(&json!({}))?;
        for _ in 0..5 {
            scene.vm.beats_on(100)?;
            scene.vm.process.put("pause", &json!(null))?;
            let refused = scene.vm.process.refuses("cut", &json!({}))?;
            ensure!(refused.contains("paused"), "{refused}");
            let beats = scene.vm.is_silent_for(Duration::from_millis(100))?;
            ensure!(
                scene.vm.is_silent_for(Duration::from_millis(100))? == beats,
                "a cut let a paused guest run"
            );
            scene.vm.process.put("resume", &json!(null))?;
        }
        scene.vm.beats_on(200)?;
        scene.vm.process.until("another cut of its own", named("cut"))?;
        scene.goes_on_elsewhere(world)
    });
}

#[test]
fn a_guest_that_was_paused_and_runs_again_is_cut_as_before() {
    story(|world| {
        let mut scene = followed(world, &Guest::dirty("20M", "mixed"), None)?;
        for _ in 0..3 {
            scene.vm.process.put("pause", &json!(null))?;
            scene.vm.process.put("resume", &json!(null))?;
            scene.commits(&json!({}))?;
        }
        scene.vm.stop()
    });
}

#[test]
fn a_cut_under_way_is_in_the_way_of_pause_move_and_snapshot_and_they_of_it() {
    story(|world| {
        let mut scene = followed(world, &busy(), None)?;
        let job = cut_until(&mut scene, When::Shipping, &json!({ "timeout_ms": 60_000 }))?;
        let to = world.fresh_path("snapshot");
        for (act, body) in [
            ("pause", json!(null)),
            ("migrate", json!({})),
            ("cut", json!({})),
            ("snapshot", json!({ "to": to })),
        ] {
            let refused = scene.vm.process.refuses(act, &body)?;
            ensure!(refused.contains("a cut is under way"), "{act}: {refused}");
        }
        scene.vm.process.put("cancel", &json!(null))?;
        scene.vm.cut_fails(job)?;
        scene.roads.all(Weather::clear());

        let job = scene.vm.begin_keeping(&to, &json!({}))?;
        let refused = scene.vm.process.refuses("cut", &json!({}))?;
        ensure!(refused.contains("a snapshot is under way"), "{refused}");
        let kept = scene.vm.job_ends(job)?;
        ensure!(kept["state"] == "done", "{kept}");
        scene.commits(&json!({ "verify": "full" }))?;
        scene.goes_on_elsewhere(world)
    });
}

#[test]
fn snapshots_and_cuts_of_the_sources_own_leave_each_other_whole() {
    story(|world| {
        let mut scene = followed(world, &Guest::dirty("20M", "mixed"), Some("4M"))?;
        scene.vm.cut(&json!({}))?;
        for _ in 0..3 {
            scene
                .vm
                .keep(&world.fresh_path("snapshot"), &json!({ "verify": "full" }))?;
            scene.vm.process.until("another cut of its own", named("cut"))?;
        }
        scene.goes_on_elsewhere(world)
    });
}
