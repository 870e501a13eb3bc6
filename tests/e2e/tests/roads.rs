//! Bad networks are a non-event: paths are cut in every phase, all of them are lossy, all of them go dark.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use umbra_e2e::{Guest, Loss, Move, Roads, Vm, Weather, World, named, phase, story};
use umbra_netem::Cause;
use umbra_units::{Bandwidth, Bytes, Ratio};

/// One way. A final epoch then takes a third of a second, in which things can be made to happen.
const FAR: Duration = Duration::from_millis(150);

/// A guest that was never stopped beats within this, however busy the machine that tests it is.
const UNNOTICED: Duration = Duration::from_secs(5);

/// Three paths that are quick enough, and slow enough that a first copy takes a while.
fn ordinary() -> [Weather; 3] {
    [Weather::link(Bandwidth::mbit(100), Duration::from_millis(2)); 3]
}

/// Nothing started anew: there was one session, it was seeded once, and what it said of its progress never ran backwards.
fn nothing_restarted(vm: &Vm) -> Result<()> {
    let events = vm.process.events().all();
    let count = |wanted: &dyn Fn(&umbra_e2e::Event) -> bool| events.iter().filter(|event| wanted(event)).count();
    ensure!(count(&named("protecting")) == 1, "one session");
    ensure!(count(&phase("seeding")) == 1, "seeded once");
    let seeded = events.iter().filter_map(|event| event.properties["seeded"].as_f64());
    ensure!(seeded.is_sorted(), "progress ran backwards");
    Ok(())
}

/// A guest whose shadow is complete, over `weather`.
fn followed(world: &World, guest: &Guest, weather: &[Weather]) -> Result<(Vm, umbra_e2e::Shadow, Roads)> {
    let (here, there) = (world.host("here")?, world.host("there")?);
    let mut vm = here.launch(guest)?;
    vm.is_ready()?;
    let shadow = there.shadow_for(&here)?;
    let roads = world.roads(&shadow, weather)?;
    vm.protect(&shadow, &roads)?;
    vm.is_following()?;
    Ok((vm, shadow, roads))
}

/// Move, and see that nobody but the clock could notice.
fn arrives_well(vm: Vm, shadow: umbra_e2e::Shadow, how: &Move) -> Result<()> {
    let (mut vm, report) = vm.migrate_to(shadow, how)?;
    ensure!(report.audited(), "{report:?}");
    vm.checks_on(10_000)?;
    println!(
        "pause {:?}, longest silence {:?}",
        report.pause(),
        vm.console.longest_gap(0)
    );
    vm.stop()
}

#[test]
fn a_path_cut_during_the_first_copy_is_a_non_event() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut vm = here.launch(&Guest::idle().with("fill=40M content=random"))?;
        vm.is_ready()?;
        let shadow = there.shadow_for(&here)?;
        let roads = world.roads(&shadow, &ordinary())?;
        vm.protect(&shadow, &roads)?;
        vm.process.until("the first copy", phase("seeding"))?;
        roads.carries(1, Bytes::mib(2))?;
        roads.cut(1);
        ensure!(
            vm.process.told(phase("following")).is_none(),
            "the cut came in the middle of the first copy"
        );
        vm.is_following()?;
        nothing_restarted(&vm)?;
        roads.mend(1);
        arrives_well(vm, shadow, &Move::verified().patient())
    });
}

#[test]
fn a_path_cut_while_following_is_a_non_event_and_so_is_its_return() {
    story(|world| {
        let (mut vm, shadow, roads) = followed(world, &Guest::dirty("5M", "mixed"), &ordinary())?;
        roads.cut(0);
        vm.console.read();
        let from = vm.console.beats();
        // The others carry what the guest goes on writing.
        roads.carries(1, Bytes::kib(512))?;
        roads.carries(2, Bytes::kib(512))?;
        roads.mend(0);
        roads.cut(2);
        // It comes back and does its share.
        roads.carries(0, Bytes::kib(512))?;
        vm.beats_on(500)?;
        let silence = vm.console.longest_gap(from);
        ensure!(silence < UNNOTICED, "the guest noticed: silent for {silence:?}");
        nothing_restarted(&vm)?;
        arrives_well(vm, shadow, &Move::verified().patient())
    });
}

#[test]
fn a_path_cut_under_the_final_block_does_not_stop_the_move() {
    story(|world| {
        let (mut vm, shadow, roads) = followed(world, &Guest::dirty("2M", "mixed"), &[Weather::clear(); 3])?;
        roads.all(Weather {
            delay: FAR,
            ..Weather::clear()
        });
        let job = vm.migrate(&Move::verified().patient())?;
        vm.process.until("the final epoch", phase("final"))?;
        roads.cut(0);
        let (mut vm, report) = vm.arrives_at(shadow, job)?;
        vm.checks_on(10_000)?;
        println!("pause {:?} where {FAR:?} is one way", report.pause());
        vm.stop()
    });
}

#[test]
fn roads_that_become_a_hundred_times_longer_from_one_moment_to_the_next_are_a_non_event() {
    story(|world| {
        let (vm, shadow, roads) = followed(world, &Guest::dirty("2M", "mixed"), &[Weather::clear(); 3])?;
        roads.all(Weather {
            delay: FAR,
            ..Weather::clear()
        });
        let (mut vm, report) = vm.migrate_to(shadow, &Move::verified().patient())?;
        vm.checks_on(10_000)?;
        println!("pause {:?} where {FAR:?} is one way and nobody knew", report.pause());
        vm.stop()
    });
}

#[test]
fn a_guest_moves_over_three_paths_that_lose_one_packet_in_twenty() {
    story(|world| {
        let loss = Ratio::new(0.05)
            .and_then(|share| Loss::bursty(share, 3.0))
            .context("a loss")?;
        let weather = Weather::link(Bandwidth::mbit(100), Duration::from_millis(10)).losing(loss);
        let (vm, shadow, roads) = followed(world, &Guest::dirty("2M", "mixed"), &[weather; 3])?;
        nothing_restarted(&vm)?;
        arrives_well(vm, shadow, &Move::verified().patient())?;
        for path in 0..3 {
            let up = roads.counters(path).up;
            let lost = up.dropped.get(&Cause::Loss).copied().unwrap_or(0);
            ensure!(
                lost * 50 > up.taken,
                "path {path} lost {lost} of {} datagrams",
                up.taken
            );
        }
        Ok(())
    });
}

#[test]
fn a_guest_whose_paths_all_go_dark_runs_on_and_only_what_it_wrote_meanwhile_is_sent() {
    story(|world| {
        let guest = Guest::dirty("2M", "random").with("fill=40M wss=4M");
        let (mut vm, shadow, roads) = followed(world, &guest, &ordinary())?;
        vm.shadow_is_ready()?;
        vm.console.read();
        let from = vm.console.beats();
        roads.cut_all();
        vm.process.until("the link is down", named("link-down"))?;
        let before = roads.delivered();

        // A switchover now is not refused, but it waits, says why, and has an end.
        let job = vm.migrate(&Move::usual().with("timeout_ms", json!(500)))?;
        let why = vm.migration_fails(job)?;
        ensure!(why.contains("path"), "the reason is not the missing paths: {why}");
        vm.beats_on(2_000)?;
        let status = vm.process.status()?;
        ensure!(status["phase"] == "following" && status["seeded"] == 1.0, "{status}");
        ensure!(!status["reasons"].as_array().context("reasons")?.is_empty(), "{status}");

        roads.mend_all();
        vm.process.until("the link is back", named("link-up"))?;
        let silence = vm.console.longest_gap(from);
        ensure!(silence < UNNOTICED, "the guest noticed: silent for {silence:?}");
        nothing_restarted(&vm)?;
        arrives_well(vm, shadow, &Move::verified().patient())?;
        let again = roads.delivered().0 - before.0;
        ensure!(
            again < Bytes::mib(24).0,
            "{again} bytes since the outage: that is a new first copy"
        );
        Ok(())
    });
}

#[test]
fn a_switchover_that_is_cancelled_while_it_waits_leaves_the_guest_followed() {
    story(|world| {
        let (mut vm, shadow, _roads) = followed(world, &Guest::dirty("10M", "counter"), &[Weather::clear(); 2])?;
        // No pause is that short, so it waits.
        let job = vm.migrate(&Move::usual().with("downtime_limit_ms", json!(0.001)))?;
        vm.process.until("a round", named("round"))?;
        for act in ["pause", "resume", "stop", "unprotect", "migrate"] {
            let refused = vm.process.refuses(act, &json!(null))?;
            ensure!(refused.contains("a switchover is under way"), "{act}: {refused}");
        }
        vm.process.put("cancel", &json!(null))?;
        let why = vm.migration_fails(job)?;
        ensure!(why.contains("cancelled by an operator"), "{why}");
        let refused = vm.process.refuses("cancel", &json!(null))?;
        ensure!(refused.contains("no switchover is under way"), "{refused}");
        ensure!(vm.process.status()?["phase"] == "following", "following goes on");
        nothing_restarted(&vm)?;
        arrives_well(vm, shadow, &Move::verified().patient())
    });
}

#[test]
fn a_switchover_that_is_cancelled_in_its_final_epoch_lets_the_guest_run_on() {
    story(|world| {
        let (mut vm, shadow, roads) = followed(world, &Guest::dirty("2M", "counter"), &[Weather::clear(); 2])?;
        roads.all(Weather {
            delay: FAR,
            ..Weather::clear()
        });
        let job = vm.migrate(&Move::usual().patient())?;
        vm.process.until("the final epoch", phase("final"))?;
        vm.process.put("cancel", &json!(null))?;
        let why = vm.migration_fails(job)?;
        ensure!(why.contains("cancelled by an operator"), "{why}");
        vm.beats_on(500)?;
        ensure!(shadow.is_silent(), "the shadow ran a guest that was taken back");
        roads.all(Weather::clear());
        nothing_restarted(&vm)?;
        arrives_well(vm, shadow, &Move::verified().patient())
    });
}

#[test]
fn a_final_epoch_that_does_not_get_through_within_the_pause_limit_is_taken_back() {
    story(|world| {
        let (mut vm, shadow, roads) = followed(world, &Guest::dirty("2M", "counter"), &[Weather::clear(); 2])?;
        roads.all(Weather {
            delay: FAR,
            ..Weather::clear()
        });
        let job = vm.migrate(&Move::usual().patient().with("pause_limit_ms", json!(600)))?;
        vm.process.until("the final epoch", phase("final"))?;
        roads.cut_all();
        let why = vm.migration_fails(job)?;
        ensure!(why.contains("pause limit of 600 ms"), "{why}");
        vm.beats_on(500)?;
        let silence = vm.console.longest_gap(0);
        ensure!(
            silence < Duration::from_secs(10),
            "the guest was stopped for {silence:?}"
        );
        roads.all(Weather::clear());
        roads.mend_all();
        nothing_restarted(&vm)?;
        arrives_well(vm, shadow, &Move::verified().patient())
    });
}
