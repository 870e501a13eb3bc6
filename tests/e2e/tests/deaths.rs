//! Either side dies, in any phase. The guest goes on where it is, or waits for an operator; it never runs twice.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use umbra_e2e::{Guest, Host, Move, Roads, Shadow, Signal, Vm, Weather, World, named, phase, story};
use umbra_netem::Way;
use umbra_units::{Bandwidth, Bytes};

/// One way. Between the moment a word is said and the moment it is heard, somebody can die.
const FAR: Weather = Weather {
    delay: Duration::from_millis(150),
    ..Weather::clear()
};

/// Long enough to say that a guest is silent: three hundred beats do not come.
const SILENCE: Duration = Duration::from_millis(300);

struct Scene {
    here: Host,
    there: Host,
    vm: Vm,
    shadow: Shadow,
    roads: Roads,
}

/// A guest whose first copy is under way and takes a while.
fn seeding(world: &World) -> Result<Scene> {
    let slow = Weather::link(Bandwidth::mbit(50), Duration::from_millis(2));
    let scene = protected(world, &Guest::idle().with("fill=40M content=random"), slow)?;
    scene.roads.carries(0, Bytes::mib(1))?;
    ensure!(
        scene.vm.process.told(phase("following")).is_none(),
        "still the first copy"
    );
    Ok(scene)
}

/// A guest whose shadow is complete.
fn following(world: &World) -> Result<Scene> {
    let mut scene = protected(world, &Guest::dirty("4M", "mixed"), Weather::clear())?;
    scene.vm.is_following()?;
    scene.vm.shadow_is_ready()?;
    Ok(scene)
}

fn protected(world: &World, guest: &Guest, weather: Weather) -> Result<Scene> {
    let (here, there) = (world.host("here")?, world.host("there")?);
    let mut vm = here.launch(guest)?;
    vm.is_ready()?;
    let shadow = there.shadow_for(&here)?;
    let roads = world.roads(&shadow, &[weather; 2])?;
    vm.protect(&shadow, &roads)?;
    vm.process.until("the first copy", phase("seeding"))?;
    Ok(Scene {
        here,
        there,
        vm,
        shadow,
        roads,
    })
}

impl Scene {
    /// Stop the guest for its final epoch, over paths so long that it stays there for a while. The job's number.
    fn final_epoch(&mut self, how: &Move) -> Result<u64> {
        self.roads.all(FAR);
        self.vm.knows_its_roads(FAR.delay * 3 / 2)?;
        let job = self.vm.migrate(how)?;
        self.vm.process.until("the final epoch", phase("final"))?;
        Ok(job)
    }

    /// Give the guest up, over paths so long that the shadow has not heard of it.
    fn given_up(&mut self) -> Result<u64> {
        let job = self.final_epoch(&Move::verified().patient())?;
        self.vm.process.until("the guest is given up", named("gave-up"))?;
        Ok(job)
    }

    /// The guest is well here, and moves to a new shadow as if nothing had been.
    fn moves_elsewhere(self, world: &World) -> Result<()> {
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
        vm.protect(&shadow, &roads)?;
        let (mut vm, report) = vm.migrate_to(shadow, &Move::verified().patient())?;
        ensure!(report.audited(), "{report:?}");
        vm.checks_on(10_000)?;
        vm.stop()
    }

    /// The shadow that lost its source runs nothing, and another guest of the same host can come.
    fn shadow_serves_another(self) -> Result<()> {
        let Self { here, shadow, vm, .. } = self;
        drop(vm);
        ensure!(shadow.is_silent(), "the shadow ran a guest");
        let mut vm = here.launch(&Guest::dirty("4M", "counter"))?;
        vm.protect_directly(&shadow)?;
        let (vm, _) = vm.migrate_to(shadow, &Move::verified().patient())?;
        vm.stop()
    }
}

#[test]
fn a_shadow_killed_during_the_first_copy_costs_the_guest_nothing() {
    story(|world| {
        let scene = seeding(world)?;
        scene.shadow.process.kill()?;
        scene.moves_elsewhere(world)
    });
}

#[test]
fn a_shadow_killed_while_following_costs_the_guest_nothing() {
    story(|world| {
        let mut scene = following(world)?;
        scene.shadow.process.kill()?;
        scene.vm.process.until("the loss is told", named("link-down"))?;
        let reasons = scene.vm.process.status()?["reasons"].to_string();
        ensure!(reasons.contains("path"), "{reasons}");
        scene.moves_elsewhere(world)
    });
}

#[test]
fn a_shadow_killed_in_the_final_epoch_gives_the_guest_back_within_the_pause_limit() {
    story(|world| {
        let mut scene = following(world)?;
        let job = scene.final_epoch(&Move::verified().patient().with("pause_limit_ms", json!(800)))?;
        scene.shadow.process.kill()?;
        let why = scene.vm.migration_fails(job)?;
        ensure!(why.contains("pause limit of 800 ms"), "{why}");
        ensure!(scene.vm.process.told(named("gave-up")).is_none(), "given up to nobody");
        scene.moves_elsewhere(world)
    });
}

#[test]
fn a_shadow_that_hangs_in_the_final_epoch_and_wakes_up_later_does_not_run_what_was_taken_back() {
    story(|world| {
        let mut scene = following(world)?;
        let job = scene.final_epoch(&Move::verified().patient().with("pause_limit_ms", json!(800)))?;
        scene.shadow.process.signal(Signal::STOP)?;
        let why = scene.vm.migration_fails(job)?;
        ensure!(why.contains("pause limit of 800 ms"), "{why}");
        scene.vm.beats_on(500)?;
        scene.roads.all(Weather::clear());
        scene.shadow.process.signal(Signal::CONT)?;
        let Scene { vm, shadow, .. } = scene;
        ensure!(shadow.is_silent(), "the shadow ran what was taken back");
        let (mut vm, report) = vm.migrate_to(shadow, &Move::verified().patient())?;
        ensure!(report.audited(), "{report:?}");
        vm.checks_on(10_000)?;
        vm.stop()
    });
}

#[test]
fn a_shadow_killed_after_the_guest_was_given_up_leaves_it_stopped_until_an_operator_takes_it_back() {
    story(|world| {
        let mut scene = following(world)?;
        let job = scene.given_up()?;
        // The go is under way and arrives nowhere.
        scene.shadow.process.kill()?;
        ensure!(
            scene.shadow.is_silent(),
            "the shadow ran before it could have been told"
        );
        let beats = scene.vm.is_silent_for(SILENCE)?;
        for act in ["pause", "resume", "stop", "unprotect", "migrate", "cancel"] {
            let refused = scene.vm.process.refuses(act, &json!(null))?;
            ensure!(refused.contains("handed over"), "{act}: {refused}");
        }
        ensure!(
            scene.vm.process.status()?["guest_state"] == "handed-over",
            "and says so"
        );
        ensure!(
            scene.vm.is_silent_for(SILENCE)? == beats,
            "a guest that was given up ran on"
        );

        scene.vm.process.put("resume", &json!({ "peer_is_dead": true }))?;
        let why = scene.vm.migration_fails(job)?;
        println!("taken back: {why}");
        scene.vm.process.until("the session is over", named("unprotected"))?;
        scene.moves_elsewhere(world)
    });
}

#[test]
fn a_source_killed_during_the_first_copy_leaves_a_shadow_that_runs_nothing_and_takes_the_next() {
    story(|world| {
        let mut scene = seeding(world)?;
        scene.vm.process.kill()?;
        scene.shadow.process.until("the loss is told", named("link-down"))?;
        scene.shadow.process.put("unprotect", &json!(null))?;
        scene.shadow.process.until("the session is over", phase("abandoned"))?;
        scene.shadow_serves_another()
    });
}

#[test]
fn a_source_killed_while_following_leaves_a_shadow_that_lets_another_in_after_a_long_silence() {
    story(|world| {
        let mut scene = following(world)?;
        scene.vm.process.kill()?;
        scene.shadow.process.until("the loss is told", named("link-down"))?;
        let refused = scene
            .shadow
            .process
            .refuses("resume", &json!({ "peer_is_dead": true }))?;
        ensure!(
            refused.contains("no epoch is committed"),
            "what is no consistent cut must not run: {refused}"
        );
        ensure!(scene.shadow.is_silent(), "the shadow ran what is no consistent cut");

        // Another knocks at once, is told why it must wait, and gets in when the first has been gone for long.
        let mut other = scene.here.launch(&Guest::dirty("4M", "counter"))?;
        let body = json!({ "to": scene.shadow.listen, "peers": [scene.shadow.fingerprint()] });
        let refused = other.process.refuses("protect", &body)?;
        ensure!(refused.contains("this node shadows guest"), "{refused}");
        let dead = other.console.beats();
        while !other.process.ask("PUT", "protect", &body)?.is_ok() {
            other.beats_on(500)?;
            ensure!(
                other.console.beats() < dead + 40_000,
                "a dead source keeps its shadow for ever"
            );
        }
        let (vm, _) = other.migrate_to(scene.shadow, &Move::verified().patient())?;
        vm.stop()
    });
}

#[test]
fn a_source_killed_after_the_shadow_was_told_leaves_the_guest_running_there() {
    story(|world| {
        let mut scene = following(world)?;
        scene.given_up()?;
        scene.shadow.process.until("the shadow is told", phase("starting"))?;
        // Its word that the guest runs is still under way.
        scene.vm.process.kill()?;
        let Scene { vm, shadow, .. } = scene;
        shadow.runs_its_guest()?;
        let mut vm = vm.goes_on_in(shadow);
        vm.beats_on(500)?;
        vm.checks_on(10_000)?;
        vm.stop()
    });
}

#[test]
fn a_source_killed_before_its_go_arrived_leaves_a_shadow_that_runs_by_an_operators_word_alone() {
    story(|world| {
        let mut scene = following(world)?;
        let job = scene.final_epoch(&Move::verified().patient())?;
        scene
            .shadow
            .process
            .until("the shadow is prepared", phase("prepared"))?;
        // What the source says from here on is lost: first of all, its go.
        scene.roads.cut_all_one_way(Way::Up);
        scene.vm.process.until("the guest is given up", named("gave-up"))?;
        scene.vm.process.kill()?;
        println!("job {job} died with its process");
        scene.shadow.process.until("the loss is told", named("link-down"))?;
        let Scene { vm, shadow, .. } = scene;
        let refused = shadow.process.refuses("resume", &json!(null))?;
        ensure!(refused.contains("--peer-is-dead"), "{refused}");
        ensure!(shadow.process.status()?["phase"] == "prepared", "it waits");
        ensure!(shadow.is_silent(), "the shadow ran without being told");

        shadow.process.put("resume", &json!({ "peer_is_dead": true }))?;
        shadow.runs_its_guest()?;
        let mut vm = vm.goes_on_in(shadow);
        vm.beats_on(500)?;
        vm.checks_on(10_000)?;
        vm.stop()
    });
}

#[test]
fn a_go_that_is_lost_is_said_again_when_the_paths_are_back_and_nobody_runs_the_guest_before() {
    story(|world| {
        let mut scene = following(world)?;
        let job = scene.final_epoch(&Move::verified().patient())?;
        scene
            .shadow
            .process
            .until("the shadow is prepared", phase("prepared"))?;
        scene.roads.cut_all_one_way(Way::Up);
        scene.vm.process.until("the guest is given up", named("gave-up"))?;
        scene.roads.cut_all();
        let Scene {
            mut vm,
            mut shadow,
            roads,
            ..
        } = scene;
        vm.process.until("the source notices", named("link-down"))?;
        shadow.process.until("the shadow notices", named("link-down"))?;
        vm.is_silent_for(SILENCE)?;
        ensure!(shadow.is_silent(), "the shadow ran without being told");
        roads.all(Weather::clear());
        roads.mend_all();
        let (mut vm, report) = vm.arrives_at(shadow, job)?;
        vm.checks_on(10_000)?;
        println!("pause {:?} over an outage", report.pause());
        vm.stop()
    });
}
