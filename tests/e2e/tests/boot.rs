//! A guest is started, paused, stopped, ends by itself, or is not started at all for a reason given in one line.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use umbra_e2e::{Guest, Host, Signal, named, story};

#[test]
fn a_guest_beats_in_order_and_finds_its_memory_well() {
    story(|world| {
        let mut vm = world.host("here")?.launch(&Guest::dirty("10M", "mixed"))?;
        vm.is_ready()?;
        vm.beats_on(2_100)?;
        vm.checks_on(1_000)?;
        let first = vm.process.serial().first_at().context("a first byte")?;
        println!(
            "first byte {:?} after the process was started",
            first - vm.process.began()
        );
        let status = vm.process.status()?;
        ensure!(
            status["role"] == "running" && status["memory_bytes"] == 96 << 20,
            "{status}"
        );
        vm.stop()
    });
}

#[test]
fn a_pause_stops_the_beats_and_a_resume_lets_them_go_on_where_they_were() {
    story(|world| {
        let mut vm = world.host("here")?.launch(&Guest::idle().with_cpus(2))?;
        vm.beats_on(200)?;
        vm.process.put("pause", &json!(null))?;
        vm.process
            .put("pause", &json!(null))
            .context("twice is as good as once")?;
        let span = Duration::from_millis(300);
        let beats = vm.is_silent_for(span)?;
        ensure!(vm.process.status()?["guest_state"] == "paused", "and says so");
        ensure!(
            vm.process
                .refuses("migrate", &json!({}))?
                .contains("`protect` it first"),
            "nothing to migrate to"
        );
        vm.process.put("resume", &json!(null))?;
        vm.beats_on(1_000)?;
        ensure!(vm.console.longest_gap(beats - 1) >= span, "it beat while it was paused");
        vm.stop()
    });
}

#[test]
fn a_guest_that_is_built_paused_says_nothing_until_it_is_resumed() {
    story(|world| {
        let mut vm = world.host("here")?.launch_with(&Guest::idle(), &["--paused"])?;
        vm.process.until("it is built", named("created"))?;
        vm.is_silent_for(Duration::from_millis(200))?;
        ensure!(vm.process.serial().is_empty(), "it ran before it was resumed");
        vm.process.put("resume", &json!(null))?;
        vm.beats_on(100)?;
        vm.stop()
    });
}

#[test]
fn a_process_that_is_terminated_ends_well_and_the_last_event_says_how() {
    story(|world| {
        let mut vm = world.host("here")?.launch(&Guest::idle())?;
        vm.beats_on(10)?;
        vm.process.signal(Signal::TERM)?;
        let ending = vm.process.until("the end", named("ending"))?;
        ensure!(ending.properties["exit"] == "stopped by SIGTERM", "{ending}");
        ensure!(vm.process.end()? == Some(0), "success");
        ensure!(!vm.process.socket().exists(), "its API socket is gone");
        Ok(())
    });
}

#[test]
fn the_exit_code_says_how_the_guest_ended() {
    story(|world| {
        let here = world.host("here")?;
        let done = here.launch(&Guest::idle().with("run=200ms"))?;
        ensure!(done.process.end()? == Some(0), "a guest that ends itself well");
        let failed = here.launch(&Guest::idle().with("cpus=9"))?;
        ensure!(failed.process.end()? == Some(5), "a guest that ends itself with a code");
        ensure!(
            failed.process.log().contains("the guest ended with code 2"),
            "{}",
            failed.process.log()
        );
        Ok(())
    });
}

/// What `umbra run` says with one argument changed; none of these can start a guest.
fn run(host: &Host, change: &[&str], with: &[&str]) -> Result<Output> {
    let mut args = host.run_args(&Guest::idle());
    if let [option] = change {
        let at = args
            .iter()
            .position(|arg| arg == option)
            .context("an argument to change")?;
        args.drain(at..at + 2);
    }
    args.extend(with.iter().map(ToString::to_string));
    host.command(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn what_cannot_be_started_is_refused_in_one_line_that_names_the_option() {
    story(|world| {
        let here = world.host("here")?;
        let text = world.fresh_path("text");
        std::fs::write(&text, "no kernel")?;
        let text = text.display().to_string();
        let nowhere = world.fresh_path("nowhere").display().to_string();
        let long = "x".repeat(3_000);
        for (change, with, expected) in [
            (
                &["--kernel"][..],
                &["--kernel", nowhere.as_str()][..],
                &["kernel", "nowhere"][..],
            ),
            (&["--kernel"], &["--kernel", &text], &["kernel", "ELF"]),
            (&["--memory"], &["--memory", "size=1M"], &["memory", "8"]),
            (
                &["--memory"],
                &["--memory", "size=64M,colour=red"],
                &["--memory", "colour"],
            ),
            (&["--cpus"], &["--cpus", "boot=0"], &["--cpus", "1 to 32"]),
            (&["--identity"], &["--identity", &nowhere], &["nowhere"]),
            (&["--cmdline"], &["--cmdline", &long], &["cmdline", "2047"]),
            (&[], &["--memroy", "64M"], &["--memroy"]),
        ] {
            let output = run(&here, change, with)?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let line = said.lines().next().unwrap_or_default();
            ensure!(
                output.status.code() == Some(2),
                "{with:?} ended with {}: {said}",
                output.status
            );
            for word in expected {
                ensure!(
                    line.contains(word),
                    "{with:?}: expected a line with {word:?}, got: {said}"
                );
            }
            ensure!(output.stdout.is_empty(), "{with:?}: a guest ran");
        }
        Ok(())
    });
}

#[test]
fn a_command_to_nobody_says_so() {
    story(|world| {
        let here = world.host("here")?;
        let socket = world.fresh_path("nobody").display().to_string();
        for command in ["status", "pause", "migrate", "stop", "events"] {
            let output = here.command(&[command, "--api-socket", &socket])?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(
                output.status.code() == Some(7),
                "{command} ended with {}: {said}",
                output.status
            );
            ensure!(said.lines().count() == 1 && said.contains("nobody"), "{said}");
        }
        Ok(())
    });
}

#[test]
fn the_commands_do_what_the_api_does() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut vm = here.launch(&Guest::dirty("4M", "counter"))?;
        vm.is_ready()?;
        let shadow = there.shadow_for(&here)?;
        let socket = vm.process.socket().display().to_string();
        let certificate = there.identity().join("cert.pem").display().to_string();
        let umbra = |args: &[&str]| -> Result<String> {
            let output = here.command(&[args, &["--api-socket", &socket]].concat())?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(output.status.success(), "{args:?} ended with {}: {said}", output.status);
            Ok(String::from_utf8(output.stdout)?)
        };
        umbra(&["pause"])?;
        ensure!(umbra(&["status"])?.contains("paused"), "a status for people");
        umbra(&["resume"])?;
        let ready = umbra(&["protect", "--to", &shadow.listen[0], "--peer", &certificate, "--wait"])?;
        ensure!(ready.ends_with("ready\n"), "{ready}");
        let status: serde_json::Value = serde_json::from_str(&umbra(&["status", "--json"])?)?;
        ensure!(status["phase"] == "following", "{status}");
        let report: serde_json::Value = serde_json::from_str(&umbra(&["migrate", "--verify", "full", "--json"])?)?;
        ensure!(report["audited"] == true, "{report}");
        ensure!(vm.process.end()? == Some(0), "the source ends with success");
        shadow.runs_its_guest()?;
        let mut vm = vm.goes_on_in(shadow);
        vm.beats_on(200)?;
        let socket = vm.process.socket().display().to_string();
        let stopped = here.command(&["stop", "--api-socket", &socket])?;
        ensure!(stopped.status.success() && vm.process.end()? == Some(0), "stopped");
        Ok(())
    });
}
