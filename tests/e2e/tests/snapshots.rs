//! A guest is kept in a folder while it runs, and goes on from there in another process.
//!
//! The guest checks its own memory as it goes, before the cut and after; each snapshot here compares, in its pause, every
//! page of memory with what was kept, unless the story says otherwise.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use umbra_e2e::{Guest, Move, Vm, World, story};

fn full() -> Value {
    json!({ "verify": "full" })
}

fn differential() -> Value {
    json!({ "kind": "differential", "verify": "full" })
}

/// A guest that changes pages of all kinds while it is kept.
fn busy() -> Guest {
    Guest::dirty("20M", "mixed")
}

/// A guest of which a snapshot takes a while and much room.
fn large() -> Guest {
    Guest::dirty("10M", "random")
        .with_memory_mib(512)
        .with("fill=400M scrub=off")
}

fn folder(world: &World) -> Result<PathBuf> {
    let folder = world.fresh_path("snapshots");
    fs::create_dir(&folder)?;
    Ok(folder)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// It beats on, and a good part of its memory is found right.
fn is_well(vm: &mut Vm) -> Result<()> {
    vm.checks_on(10_000)?;
    vm.beats_on(1_500)
}

#[test]
fn a_guest_kept_three_times_while_it_runs_goes_on_from_each_in_a_new_process() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let mut vm = host.launch(&busy().with_cpus(2))?;
        vm.is_ready()?;
        let mut pauses = Vec::new();
        for (n, name) in ["a", "b", "c"].into_iter().enumerate() {
            let request = if n == 0 { full() } else { differential() };
            let report = vm.keep(&folder.join(name), &request)?;
            ensure!(report["cut"] == n + 1 && report["audited"] == true, "{report}");
            pauses.push(report["pause_ms"].clone());
            vm.beats_on(300)?;
        }
        println!("pauses with all of memory compared: {pauses:?}");
        ensure!(names(&folder)? == ["a", "b", "c"]);
        let guest = vm.process.status()?["guest"].clone();
        vm.process.kill()?;

        for name in ["a", "c"] {
            let mut vm = host.restore(&folder.join(name), &[])?;
            is_well(&mut vm)?;
            let status = vm.process.status()?;
            ensure!(
                status["guest"] != guest && status["term"] == 1,
                "a guest of its own: {status}"
            );
            vm.stop()?;
        }
        Ok(())
    });
}

#[test]
fn a_guest_kept_in_its_pause_goes_on_at_the_very_next_beat() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let mut vm = host.launch(&busy())?;
        vm.is_ready()?;
        vm.keep(&folder.join("a"), &json!({ "pause": true }))?;
        let status = vm.process.status()?;
        ensure!(status["guest_state"] == "paused", "{status}");
        vm.is_silent_for(Duration::from_millis(300))?;
        // Kept again while it stands: nothing has changed, and it still stands.
        let report = vm.keep(&folder.join("b"), &differential())?;
        ensure!(report["counts"]["raw"] == 0 && report["rounds"] == 0, "{report}");
        vm.is_silent_for(Duration::from_millis(100))?;
        vm.process.kill()?;

        let restored = host.restore(&folder.join("b"), &["--paused", "--same-id"])?;
        let now = restored.process.status()?;
        ensure!(
            now["guest_state"] == "paused" && now["guest"] == status["guest"],
            "{now}"
        );
        ensure!(now["term"] == 2, "a term above the one it was kept in: {now}");
        let mut vm = vm.goes_on_as(restored);
        vm.is_silent_for(Duration::from_millis(300))?;
        vm.process.put("resume", &json!(null))?;
        is_well(&mut vm)?;
        vm.stop()
    });
}

#[test]
fn a_guest_is_kept_while_a_shadow_follows_it_and_both_have_every_write() {
    story(|world| {
        let (here, there, folder) = (world.host("here")?, world.host("there")?, folder(world)?);
        let mut vm = here.launch(&busy())?;
        vm.is_ready()?;
        vm.keep(&folder.join("a"), &full())?;
        let shadow = there.shadow_for(&here)?;
        vm.protect_directly(&shadow)?;
        vm.is_following()?;
        vm.beats_on(300)?;
        vm.keep(&folder.join("b"), &differential())?;
        vm.beats_on(300)?;
        vm.keep(&folder.join("c"), &differential())?;
        // The move compares every page too: what the snapshots harvested, the session must have heard of.
        let (mut vm, report) = vm.migrate_to(shadow, &Move::verified())?;
        ensure!(report.audited(), "{report:?}");
        // There it begins anew: what was kept elsewhere is nobody's parent here.
        let refused = vm
            .process
            .refuses("snapshot", &json!({ "to": folder.join("d"), "kind": "differential" }))?;
        ensure!(refused.contains("take a full one first"), "{refused}");
        vm.keep(&folder.join("d"), &full())?;
        is_well(&mut vm)?;
        vm.stop()?;
        let mut vm = here.restore(&folder.join("c"), &[])?;
        is_well(&mut vm)?;
        vm.stop()
    });
}

#[test]
fn a_restored_guest_is_kept_and_moved_like_any_other() {
    story(|world| {
        let (here, there, folder) = (world.host("here")?, world.host("there")?, folder(world)?);
        let mut vm = here.launch(&busy())?;
        vm.is_ready()?;
        vm.keep(&folder.join("a"), &full())?;
        vm.stop()?;
        let mut vm = here.restore(&folder.join("a"), &[])?;
        vm.keep(&folder.join("b"), &full())?;
        let shadow = there.shadow_for(&here)?;
        vm.protect_directly(&shadow)?;
        vm.is_following()?;
        let (mut vm, _) = vm.migrate_to(shadow, &Move::verified())?;
        is_well(&mut vm)?;
        vm.stop()
    });
}

#[test]
fn a_snapshot_that_cannot_be_written_costs_the_guest_nothing() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let mut vm = host.launch(&busy())?;
        vm.is_ready()?;
        for (to, expected) in [
            (PathBuf::from("/proc/umbra"), "/proc/umbra: "),
            (PathBuf::from("relative"), "to: expected an absolute path"),
            (folder.join("no/such"), "no/such: the folder "),
        ] {
            let request = json!({ "to": to });
            let answer = vm.process.ask("PUT", "snapshot", &request)?;
            let why = if answer.is_ok() {
                let job = answer.body["job"].as_u64().context("a job's number")?;
                vm.job_ends(job)?["error"].as_str().unwrap_or_default().to_owned()
            } else {
                answer.error().to_owned()
            };
            ensure!(why.contains(expected), "{why}");
        }
        is_well(&mut vm)?;
        let said = host.command(&[
            "snapshot",
            "--api-socket",
            &vm.process.socket().display().to_string(),
            "--to",
            &folder.join("a").display().to_string(),
            "--json",
        ])?;
        ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        let report: Value = serde_json::from_slice(&said.stdout)?;
        ensure!(
            report["kind"] == "full" && report["pause_ms"].as_f64() > Some(0.0),
            "{report}"
        );
        vm.stop()
    });
}

#[test]
fn a_disk_that_is_full_leaves_what_was_kept_before_and_the_retry_is_whole() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let Some(disk) = SmallDisk::new(folder.join("disk"), 24)? else {
            return Ok(());
        };
        let mut vm = host.launch(&Guest::dirty("20M", "random"))?;
        vm.is_ready()?;
        // Beside the disk there is room: the snapshot that others go on from.
        let why = vm.keeping_fails(&disk.path.join("a"), &full())?;
        ensure!(why.contains("disk/a/memory: No space left on device"), "{why}");
        disk.grows_to(64)?;
        vm.keep(&disk.path.join("a"), &full())?;
        disk.shrinks_to_what_it_holds()?;
        for (name, request) in [("b", differential()), ("a", full())] {
            vm.beats_on(500)?;
            let why = vm.keeping_fails(&disk.path.join(name), &request)?;
            ensure!(why.contains("No space left on device"), "{why}");
        }
        ensure!(
            names(&disk.path)? == ["a"],
            "nothing is left behind: {:?}",
            names(&disk.path)?
        );
        disk.grows_to(256)?;
        vm.keep(&disk.path.join("b"), &differential())?;
        is_well(&mut vm)?;
        vm.process.kill()?;
        for name in ["a", "b"] {
            let mut vm = host.restore(&disk.path.join(name), &[])?;
            is_well(&mut vm)?;
            vm.stop()?;
        }
        Ok(())
    });
}

#[test]
fn a_process_killed_while_it_keeps_its_guest_leaves_what_was_kept_before() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let mut vm = host.launch(&large())?;
        vm.is_ready()?;
        vm.keep(&folder.join("a"), &json!({}))?;
        let job = vm.begin_keeping(&folder.join("a"), &json!({}))?;
        vm.process.until("the snapshot is under way", |event| {
            event.name == "job-progress" && event.properties["job"] == job
        })?;
        vm.process.kill()?;
        ensure!(names(&folder)?.len() == 2, "a draft is left: {:?}", names(&folder)?);
        let mut vm = host.restore(&folder.join("a"), &[])?;
        vm.beats_on(1_500)?;
        vm.keep(&folder.join("a"), &json!({}))?;
        ensure!(names(&folder)? == ["a"], "the draft is gone: {:?}", names(&folder)?);
        vm.stop()
    });
}

#[test]
fn while_a_guest_is_being_kept_others_wait_and_it_can_be_taken_back() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let mut vm = host.launch(&large())?;
        vm.is_ready()?;
        let job = vm.begin_keeping(&folder.join("a"), &json!({}))?;
        for path in ["pause", "resume"] {
            let refused = vm.process.refuses(path, &json!(null))?;
            ensure!(refused.contains("a snapshot is under way"), "{refused}");
        }
        vm.process.put("cancel", &json!(null))?;
        let ended = vm.job_ends(job)?;
        ensure!(ended["error"] == "cancelled by an operator", "{ended}");
        ensure!(names(&folder)?.is_empty(), "{:?}", names(&folder)?);
        // Stopped in the middle of the next one: nothing of it is left behind either.
        vm.begin_keeping(&folder.join("b"), &json!({}))?;
        vm.beats_on(20)?;
        vm.stop()?;
        ensure!(names(&folder)?.is_empty(), "{:?}", names(&folder)?);
        Ok(())
    });
}

#[test]
fn a_snapshot_that_was_damaged_is_refused_in_one_line_that_names_the_file() {
    story(|world| {
        let (host, folder) = (world.host("here")?, folder(world)?);
        let mut vm = host.launch(&busy())?;
        vm.is_ready()?;
        vm.keep(&folder.join("a"), &full())?;
        vm.beats_on(100)?;
        vm.keep(&folder.join("b"), &differential())?;
        vm.stop()?;
        let refused = || -> Result<String> {
            let said = host.command(&[
                "restore",
                "--serial",
                "off",
                "--from",
                &folder.join("b").display().to_string(),
            ])?;
            ensure!(said.status.code() == Some(1), "{said:?}");
            let text = String::from_utf8_lossy(&said.stderr).trim().to_owned();
            ensure!(text.starts_with("umbra: /") && !text.contains('\n'), "{text}");
            Ok(text)
        };
        for (part, place) in [
            ("a/memory", 100_000),
            ("b/memory", 50),
            ("b/state", 700),
            ("a/manifest", 70),
            ("b/index", 9),
        ] {
            let path = folder.join(part);
            let whole = fs::read(&path)?;
            let mut damaged = whole.clone();
            damaged[place] ^= 0x10;
            fs::write(&path, damaged)?;
            let text = refused()?;
            ensure!(
                text.contains(part) && (text.contains("expected") || text.contains("batch")),
                "{part}: {text}"
            );
            fs::write(&path, whole)?;
        }
        fs::rename(folder.join("a"), folder.join("elsewhere"))?;
        let text = refused()?;
        ensure!(text.ends_with("/a: expected the parent's folder, found none"), "{text}");
        fs::rename(folder.join("elsewhere"), folder.join("a"))?;
        let mut vm = host.restore(&folder.join("b"), &[])?;
        is_well(&mut vm)?;
        vm.stop()
    });
}

/// A file system with so little room, gone when this is dropped; `None`, loudly, where nobody may mount.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn new(path: PathBuf, mib: u64) -> Result<Option<Self>> {
        fs::create_dir(&path)?;
        let size = format!("size={mib}m");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(&path)
            .output();
        if done.as_ref().is_ok_and(|done| done.status.success()) {
            return Ok(Some(Self { path }));
        }
        eprintln!("SKIPPED: a full disk needs the right to mount one: {done:?}");
        Ok(None)
    }

    fn grows_to(&self, mib: u64) -> Result<()> {
        self.resize(&format!("remount,size={mib}m"))
    }

    /// No page more than it holds now.
    fn shrinks_to_what_it_holds(&self) -> Result<()> {
        let mut bytes = 1 << 20;
        for part in fs::read_dir(self.path.join("a"))? {
            bytes += part?.metadata()?.len();
        }
        self.resize(&format!("remount,size={}m", bytes.div_ceil(1 << 20)))
    }

    fn resize(&self, options: &str) -> Result<()> {
        let done = Command::new("mount").args(["-o", options]).arg(&self.path).status()?;
        ensure!(done.success(), "mount -o {options}: {done}");
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
