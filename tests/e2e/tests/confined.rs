//! What a guest's process gives up before its guest runs, and that it can do its work without.

use std::fs;

use anyhow::{Context, Result, ensure};
use umbra_e2e::{Guest, Move, Process, Vm, story};

/// A field of `/proc/PID/task/TID/status` of every thread, by the thread's name.
fn of_every_thread(process: &Process, field: &str) -> Result<Vec<(String, String)>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.id()))?;
    let mut found = Vec::new();
    for task in tasks {
        // A thread may end while we look.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        let get = |name: &str| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        found.push((get("Name").context("a name")?, get(field).context("the field")?));
    }
    ensure!(found.len() > 3, "only {found:?}");
    Ok(found)
}

fn every_thread(process: &Process, field: &str, expected: &str) -> Result<()> {
    for (thread, value) in of_every_thread(process, field)? {
        ensure!(value == expected, "{}: {thread}: {field} is {value}", process.name());
    }
    Ok(())
}

fn no_thread_has_rights(vm: &Vm) -> Result<()> {
    for (field, expected) in [
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        every_thread(&vm.process, field, expected)?;
    }
    Ok(())
}

#[test]
fn no_thread_of_a_guests_process_has_rights_it_does_not_need_before_a_move_or_after() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut vm = here.launch(&Guest::dirty("10M", "mixed").with_cpus(2))?;
        vm.beats_on(100)?;
        no_thread_has_rights(&vm)?;
        // What a vCPU may call is less than what the others may.
        let filters = of_every_thread(&vm.process, "Seccomp_filters")?;
        let most = |vcpu: bool| {
            let of = filters.iter().filter(|(name, _)| name.starts_with("vcpu/") == vcpu);
            of.filter_map(|(_, filters)| filters.parse::<u32>().ok())
                .collect::<Vec<_>>()
        };
        ensure!(
            most(true) == [1, 1] && most(false).iter().all(|filters| *filters == 1),
            "{filters:?}"
        );
        let shadow = there.shadow_for(&here)?;
        vm.protect_directly(&shadow)?;
        let (mut vm, _) = vm.migrate_to(shadow, &Move::verified())?;
        vm.beats_on(1_000)?;
        no_thread_has_rights(&vm)?;
        vm.stop()
    });
}

#[test]
fn a_guest_runs_and_moves_with_every_file_out_of_reach() {
    story(|world| {
        let (here, there) = (world.host("here")?, world.host("there")?);
        let mut vm = here.launch_with(&Guest::dirty("10M", "mixed"), &["--landlock"])?;
        vm.beats_on(100)?;
        let shadow = there.shadow_with(&[&here], &["--landlock"])?;
        vm.protect_directly(&shadow)?;
        let (mut vm, _) = vm.migrate_to(shadow, &Move::verified())?;
        vm.beats_on(1_000)?;
        vm.stop()
    });
}

#[test]
fn a_guest_runs_as_somebody_else() {
    story(|world| {
        let mut vm = world
            .host("here")?
            .launch_with(&Guest::dirty("10M", "mixed"), &["--uid", "65534", "--gid", "65534"])?;
        vm.beats_on(100)?;
        every_thread(&vm.process, "Uid", "65534 65534 65534 65534")?;
        every_thread(&vm.process, "Gid", "65534 65534 65534 65534")?;
        every_thread(&vm.process, "CapPrm", "0000000000000000")?;
        vm.stop()
    });
}

#[test]
fn a_guest_runs_as_another_group_alone() {
    story(|world| {
        let mut vm = world
            .host("here")?
            .launch_with(&Guest::dirty("10M", "mixed"), &["--gid", "65534"])?;
        vm.beats_on(100)?;
        every_thread(&vm.process, "Gid", "65534 65534 65534 65534")?;
        every_thread(&vm.process, "Groups", "")?;
        vm.stop()
    });
}
