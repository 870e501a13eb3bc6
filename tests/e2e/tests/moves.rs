//! A guest moves: idle, busy, with several vCPUs, there and back.
//!
//! Every move here compares each page of both memories at the cut, by both sides, and the guest goes on checking its own
//! memory and counting its beats afterwards.

use anyhow::Result;
use serde_json::json;
use umbra_e2e::{Guest, Move, Weather, World, named, story};

/// `guest` moves over three perfect paths, and goes on.
fn moves(world: &World, guest: &Guest) -> Result<()> {
    let (here, there) = (world.host("here")?, world.host("there")?);
    let mut vm = here.launch(guest)?;
    vm.is_ready()?;
    let shadow = there.shadow_for(&here)?;
    let roads = world.roads(&shadow, &[Weather::clear(); 3])?;
    vm.protect(&shadow, &roads)?;
    let (mut vm, report) = vm.migrate_to(shadow, &Move::verified())?;
    assert!(report.audited(), "{report:?}");
    vm.checks_on(10_000)?;
    if guest.cpus > 1 {
        // A guest whose second vCPU stands still notices that after five seconds of its own.
        vm.beats_on(6_000)?;
    }
    let silence = vm.console.longest_gap(0);
    println!(
        "{}: pause {:?}, longest silence {silence:?}",
        guest.options,
        report.pause()
    );
    vm.stop()
}

#[test]
fn an_idle_guest_moves_to_its_shadow_and_beats_on() {
    story(|world| moves(world, &Guest::idle().with("fill=16M content=text")));
}

#[test]
fn a_guest_that_rewrites_counters_moves_with_every_page_of_it() {
    story(|world| moves(world, &Guest::dirty("40M", "counter")));
}

#[test]
fn a_guest_that_rewrites_all_kinds_of_pages_moves_with_every_page_of_it() {
    story(|world| moves(world, &Guest::dirty("20M", "mixed")));
}

#[test]
fn a_guest_that_rewrites_noise_moves_with_every_page_of_it() {
    story(|world| moves(world, &Guest::dirty("20M", "random").with("pattern=zipf")));
}

#[test]
fn both_vcpus_of_a_guest_arrive() {
    story(|world| moves(world, &Guest::dirty("20M", "mixed").with_cpus(2)));
}

#[test]
fn a_guest_that_computes_keeps_its_registers() {
    story(|world| moves(world, &Guest::compute().with_cpus(2).with("fill=8M")));
}

#[test]
fn only_one_copy_ever_beats_and_the_shadows_process_is_the_guests_vmm_afterwards() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut vm = here.launch_with(&Guest::dirty("10M", "counter"), &["--name", "web"])?;
        let guest = vm.process.status()?["guest"].clone();
        let shadow = there.shadow_for(&here)?;
        vm.protect_directly(&shadow)?;
        assert_eq!(vm.process.status()?["role"], "source");
        let refused = shadow.process.refuses("pause", &json!(null))?;
        assert!(refused.contains("the guest is not here"), "{refused}");
        let refused = shadow.process.refuses("migrate", &json!({}))?;
        assert!(refused.contains("the guest is not here"), "{refused}");

        let job = vm.migrate(&Move::verified())?;
        vm.process.until("the guest is given up", named("gave-up"))?;
        // The console fails the story if a beat comes twice or is missing; the source's process has ended when this
        // returns, so it can say nothing more.
        // Which of the two processes is *heard* first proves nothing: they are two pipes, read by two threads.
        let (mut vm, report) = vm.arrives_at(shadow, job)?;
        vm.beats_on(500)?;

        let status = vm.process.status()?;
        assert_eq!(
            (&status["role"], &status["guest_state"]),
            (&json!("running"), &json!("running"))
        );
        assert_eq!((&status["guest"], &status["term"]), (&guest, &report.0["term"]));
        assert_eq!(status["vcpus"], 1);
        vm.process.put("pause", &json!(null))?;
        assert_eq!(vm.process.status()?["guest_state"], "paused");
        vm.process.put("resume", &json!(null))?;
        vm.beats_on(100)?;
        let refused = vm.process.refuses("migrate", &json!({}))?;
        assert!(refused.contains("`protect` it first"), "{refused}");
        vm.stop()
    });
}

#[test]
fn a_guest_goes_there_and_back_ten_times() {
    story(|world| {
        let hosts = [world.host("here")?, world.host("there")?];
        let mut vm = hosts[0].launch(&Guest::dirty("10M", "mixed"))?;
        vm.is_ready()?;
        let mut pauses = Vec::new();
        for leg in 1..=20 {
            let (from, to) = (&hosts[(leg + 1) % 2], &hosts[leg % 2]);
            let shadow = to.shadow_for(from)?;
            let roads = world.roads(&shadow, &[Weather::clear(); 2])?;
            vm.protect(&shadow, &roads)?;
            let how = if leg % 5 == 0 { Move::verified() } else { Move::usual() };
            let (there, report) = vm.migrate_to(shadow, &how)?;
            vm = there;
            assert_eq!(report.0["term"], leg + 1, "one term per move");
            pauses.push(report.pause());
        }
        vm.checks_on(20_000)?;
        pauses.sort();
        println!(
            "pauses of 20 moves: least {:?}, middle {:?}, most {:?}; longest silence {:?}",
            pauses[0],
            pauses[pauses.len() / 2],
            pauses[pauses.len() - 1],
            vm.console.longest_gap(0)
        );
        vm.stop()
    });
}
