//! What is checked, in which order, and how it is reported.
//!
//! Cheap checks come first, so that a slip is found in seconds. Everything that is compiled to be run is compiled in one
//! profile, `checked`, and always with the whole workspace selected: cargo would otherwise unite features differently
//! from step to step and compile the heavy dependencies again (docs/decisions/0008-one-profile-for-all-tests.md).

use std::{
    io::{self, BufRead as _, BufReader, Write},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use crate::{
    book, edges, fuzz,
    house::{House, Outcome, show},
    linux,
    setup::{self, Abilities},
};

/// The profile of everything the checks run: optimised, with debug assertions and overflow checks.
const CHECKED: &str = "checked";

/// How one step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Passed,
    Skipped(String),
    Failed(String),
}

/// What `cargo test` counted, over all steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Tally {
    /// Reads a line such as `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; ...`.
    fn count(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        for part in result.split(['.', ';']) {
            match part.trim().split_once(' ') {
                Some((n, "passed")) => self.passed += n.parse::<u64>().unwrap_or(0),
                Some((n, "failed")) => self.failed += n.parse::<u64>().unwrap_or(0),
                Some((n, "ignored")) => self.ignored += n.parse::<u64>().unwrap_or(0),
                _ => {}
            }
        }
    }
}

/// Runs steps one after the other until one fails.
struct Run {
    done: Vec<(String, Duration, End)>,
    tally: Tally,
    environment: Vec<(&'static str, String)>,
}

impl Run {
    /// One step that is a command.
    fn command(&mut self, name: &str, mut command: Command) {
        for (key, value) in &self.environment {
            command.env(key, value);
        }
        let mut tally = Tally::default();
        self.step(name, &show(&command), || {
            counted(&mut command, &mut tally, &mut io::stdout())
        });
        self.tally.passed += tally.passed;
        self.tally.failed += tally.failed;
        self.tally.ignored += tally.ignored;
    }

    /// One step: `how` is what somebody would type to repeat it.
    fn step(&mut self, name: &str, how: &str, work: impl FnOnce() -> Outcome<()>) {
        if self.has_failed() {
            return;
        }
        println!("\n==> {}. {name}: {how}", self.done.len() + 1);
        let start = Instant::now();
        let end = match work() {
            Ok(()) => End::Passed,
            Err(why) => End::Failed(format!("{why}\nrepeat it with: {how}")),
        };
        self.done.push((name.to_owned(), start.elapsed(), end));
    }

    /// One step that this machine cannot take.
    fn skip(&mut self, name: &str, why: &str) {
        if !self.has_failed() {
            println!("\n==> {}. {name}: SKIPPED: {why}", self.done.len() + 1);
            self.done
                .push((name.to_owned(), Duration::ZERO, End::Skipped(why.to_owned())));
        }
    }

    fn has_failed(&self) -> bool {
        matches!(self.done.last(), Some((_, _, End::Failed(_))))
    }

    fn skipped(&self) -> usize {
        self.done
            .iter()
            .filter(|(_, _, end)| matches!(end, End::Skipped(_)))
            .count()
    }

    /// One line per step, then the count. The last line is for machines.
    fn summary(&self) -> String {
        let mut text = String::from("\n");
        for (n, (name, took, end)) in self.done.iter().enumerate() {
            let took = took.as_secs_f64();
            let (word, why) = match end {
                End::Passed => ("passed", String::new()),
                End::Skipped(why) => ("SKIPPED", format!(": {}", first_line(why))),
                End::Failed(why) => ("FAILED", format!(": {why}")),
            };
            text.push_str(&format!("{:>3}. {took:>7.1} s  {word:<8}{name}{why}\n", n + 1));
        }
        let total: Duration = self.done.iter().map(|(_, took, _)| *took).sum();
        let failed = usize::from(self.has_failed());
        let Tally {
            passed,
            failed: tests_failed,
            ignored,
        } = self.tally;
        // A step that failed without a test's help must not end in "0 failed".
        let tests_failed = tests_failed.max(u64::from(self.has_failed()));
        let steps = self.done.len() - failed - self.skipped();
        let (skipped, total) = (self.skipped(), total.as_secs_f64());
        text.push_str(&format!(
            "{steps} steps passed, {failed} failed, {skipped} skipped in {total:.0} s\n"
        ));
        text.push_str(&format!("{passed} passed, {tests_failed} failed, {ignored} ignored\n"));
        text
    }
}

/// `cargo xtask test`: everything that people and CI check.
pub(crate) fn test(house: &House, long: bool) -> Outcome<ExitCode> {
    let mut run = Run {
        done: vec![],
        tally: Tally::default(),
        environment: vec![],
    };
    let mut able = Abilities {
        no_kvm: None,
        no_style: None,
    };
    run.step("setup", "cargo xtask setup", || {
        able = setup::setup()?;
        Ok(())
    });
    if able.no_kvm.is_some() {
        run.environment.push(("UMBRA_SKIP_KVM", "1".to_owned()));
    }
    if long {
        run.environment.push(("PROPTEST_CASES", "4096".to_owned()));
    }
    let image = guest_image(house);
    let program = house.target().join(CHECKED).join("umbra");
    run.environment.push(("UMBRA_GUEST", image.display().to_string()));
    run.environment.push(("UMBRA_BIN", program.display().to_string()));

    run.command("the lock file is whole", house.cargo(&["fetch", "--locked"]));
    match &able.no_style {
        None => {
            run.command("format", house.cargo(&["fmt", "--all", "--", "--check"]));
            run.command("format of the guest", guest_cargo(house, "fmt", &["--", "--check"]));
        }
        Some(why) => run.skip("format", why),
    }
    run.step("crate edges", "cargo xtask edges", || none_of(edges::check(house)?));
    run.step("documents and tour", "cargo xtask tour", || {
        none_of(book::check(house)?)
    });
    run.command("guest kernel", guest_cargo(house, "build", &["--release", "--locked"]));
    run.command(
        "guest's own tests",
        guest_cargo(house, "test", &["--release", "--locked"]),
    );
    let all = ["--workspace", "--all-targets", "--profile", CHECKED];
    match &able.no_style {
        None => {
            run.command(
                "clippy",
                house.cargo(&[&["clippy"], &all[..], &["--", "--deny", "warnings"]].concat()),
            );
            let deny = ["--", "--deny", "warnings"];
            run.command(
                "clippy of the guest",
                guest_cargo(house, "clippy", &[&["--release"], &deny[..]].concat()),
            );
        }
        Some(why) => run.skip("clippy", why),
    }
    let mut doc = house.cargo(&["doc", "--workspace", "--no-deps", "--profile", CHECKED]);
    doc.env("RUSTDOCFLAGS", "--deny warnings");
    run.command("rustdoc", doc);
    run.command("build of everything", house.cargo(&[&["build"], &all[..]].concat()));
    match &able.no_kvm {
        // After the build, because `umbra doctor` says which command line this host's guests need.
        None => {
            let mut found = vec![];
            run.step("Linux for guests", "cargo xtask linux", || {
                found = linux::ready(house)?.environment();
                Ok(())
            });
            run.environment.extend(found);
        }
        Some(why) => run.skip("Linux for guests", why),
    }
    let test = |which: &[&str]| {
        house.cargo(&[&["test", "--workspace", "--profile", CHECKED, "--no-fail-fast"], which].concat())
    };
    run.command("unit and property tests", test(&["--lib", "--bins", "--examples"]));
    run.command("documentation examples", test(&["--doc"]));
    // A seed that fails is replayed by `--seed N`; debug assertions are on here as in all steps.
    let seeds = if long { "0..100000" } else { "0..2000" };
    run.command("simulation", built(house, "umbra-sim", &["--seeds", seeds]));
    let ignored: &[&str] = if long {
        &["--test", "*", "--", "--include-ignored"]
    } else {
        &["--test", "*"]
    };
    run.command("integration and end-to-end tests", test(ignored));
    run.step("C++ for the fuzz targets", "cargo xtask fuzz", fuzz::setup);
    run.command("build of the fuzz targets", fuzz::build(house));
    for (target, command) in fuzz::short(house)? {
        run.command(&format!("fuzz, short form: {target}"), command);
    }
    match &able.no_kvm {
        None => {
            run.command("demo", built(house, "umbra", &["demo"]));
            run.command("benchmarks, short form", built(house, "umbra-bench", &["--short"]));
        }
        Some(why) => {
            let why = format!("{why}; so were the end-to-end tests that need a guest");
            run.skip("demo", &why);
            run.skip("benchmarks, short form", &why);
        }
    }

    print!("{}", run.summary());
    if run.has_failed() {
        return Ok(ExitCode::FAILURE);
    }
    if run.skipped() > 0 {
        if let Some(why) = &able.no_kvm {
            eprintln!("{}", setup::banner(why));
        }
        if setup::is_ci() {
            eprintln!("xtask: CI=true, and a check that was skipped proves nothing: this run fails");
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `cargo xtask demo`: build, then become `umbra demo`.
pub(crate) fn demo(house: &House, args: &[String]) -> Outcome<ExitCode> {
    let image = ready(house, &["build", "--release", "--package", "umbra"])?;
    let program = house.target().join("release/umbra");
    let mut demo = Command::new(&program);
    demo.arg("demo")
        .args(args)
        .env("UMBRA_GUEST", image)
        .env("UMBRA_BIN", &program);
    exit_of(demo)
}

/// `cargo xtask bench`: build, then become the benchmark program.
pub(crate) fn bench(house: &House, args: &[String]) -> Outcome<ExitCode> {
    let image = ready(
        house,
        &["build", "--release", "--package", "umbra", "--package", "umbra-bench"],
    )?;
    let release = house.target().join("release");
    let mut bench = Command::new(release.join("umbra-bench"));
    bench
        .args(args)
        .env("UMBRA_GUEST", image)
        .env("UMBRA_BIN", release.join("umbra"))
        .envs(linux::ready(house)?.environment());
    exit_of(bench)
}

/// Builds the tiny kernel in release and says where it is.
pub(crate) fn build_guest(house: &House) -> Outcome<PathBuf> {
    setup::setup()?;
    finish(&mut guest_cargo(house, "build", &["--release", "--locked"]))?;
    Ok(guest_image(house))
}

/// Guest and programs, built for people to run.
fn ready(house: &House, build: &[&str]) -> Outcome<PathBuf> {
    let image = build_guest(house)?;
    finish(&mut house.cargo(build))?;
    Ok(image)
}

/// The guest has a target folder of its own: its profile and link script are not the workspace's.
fn guest_target(house: &House) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => house.root.join(dir).join("guest"),
        None => house.path("resources/guest/target"),
    }
}

fn guest_image(house: &House) -> PathBuf {
    guest_target(house).join("release/umbra-guest")
}

fn guest_cargo(house: &House, verb: &str, args: &[&str]) -> Command {
    let mut command = house.cargo(&[&[verb, "--manifest-path", "resources/guest/Cargo.toml"], args].concat());
    command.env("CARGO_TARGET_DIR", guest_target(house));
    command
}

/// A program that "build of everything" built.
fn built(house: &House, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(house.target().join(CHECKED).join(program));
    command.args(args).current_dir(&house.root);
    command
}

fn none_of(complaints: Vec<String>) -> Outcome<()> {
    if complaints.is_empty() {
        Ok(())
    } else {
        Err(complaints.join("\n"))
    }
}

/// Runs a command whose standard output is passed on to `out` and read along the way, for what `cargo test` counts.
fn counted(command: &mut Command, tally: &mut Tally, out: &mut dyn Write) -> Outcome<()> {
    let shown = show(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    let output = child.stdout.take().expect("stdout is piped: asked for above");
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    // By bytes: a guest's console may print anything.
    while lines
        .read_until(b'\n', &mut line)
        .map_err(|error| format!("cannot read from `{shown}`: {error}"))?
        > 0
    {
        let _ = out.write_all(&line);
        tally.count(&String::from_utf8_lossy(&line));
        line.clear();
    }
    let status = child
        .wait()
        .map_err(|error| format!("cannot wait for `{shown}`: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{status}"))
    }
}

/// Runs a build step for people: its standard output is not what they asked for.
fn finish(command: &mut Command) -> Outcome<()> {
    let shown = show(command);
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`{shown}` failed ({status})"))
    }
}

/// Runs a command with our own terminal and passes its exit code on.
fn exit_of(mut command: Command) -> Outcome<ExitCode> {
    let shown = show(&command);
    let status = command
        .status()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    match status.code().map(u8::try_from) {
        Some(Ok(code)) => Ok(ExitCode::from(code)),
        _ => Err(format!("`{shown}` ended by {status}")),
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Run {
        Run {
            done: vec![],
            tally: Tally::default(),
            environment: vec![],
        }
    }

    #[test]
    fn the_first_failure_ends_the_run_and_names_the_command_to_repeat() {
        let mut run = fresh();
        run.step("good", "true", || Ok(()));
        run.command("bad", Command::new("false"));
        run.step("never", "true", || panic!("a step after a failure must not run"));
        run.skip("nor this", "because");
        assert!(run.has_failed());
        assert_eq!(run.done.len(), 2);
        let summary = run.summary();
        assert!(
            summary.contains("FAILED  bad: exit status: 1\nrepeat it with: false"),
            "{summary}"
        );
        assert!(summary.contains("1 steps passed, 1 failed, 0 skipped"), "{summary}");
        assert!(summary.ends_with("\n0 passed, 1 failed, 0 ignored\n"), "{summary}");
    }

    #[test]
    fn a_skipped_step_is_shown_and_counted_apart() {
        let mut run = fresh();
        run.skip("demo", "no kvm\nload the module");
        assert!(!run.has_failed());
        let summary = run.summary();
        assert!(summary.contains("SKIPPED demo: no kvm\n"), "{summary}");
        assert!(summary.contains("0 steps passed, 0 failed, 1 skipped"), "{summary}");
    }

    #[test]
    fn what_cargo_test_counts_is_added_up() {
        let line = "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.1s\n";
        let mut echo = Command::new("echo");
        echo.args(["-n", "running\n", line]);
        let (mut tally, mut shown) = (Tally::default(), Vec::new());
        counted(&mut echo, &mut tally, &mut shown).unwrap();
        assert_eq!(String::from_utf8(shown).unwrap(), format!("running\n {line}"));
        assert_eq!(tally, Tally::default(), "a result begins its line");

        let mut echo = Command::new("echo");
        echo.args(["-n", line]);
        counted(&mut echo, &mut tally, &mut Vec::new()).unwrap();
        tally.count("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        tally.count("a line that says 5 passed");
        assert_eq!(
            tally,
            Tally {
                passed: 15,
                failed: 2,
                ignored: 1
            }
        );

        let run = Run { tally, ..fresh() };
        assert!(run.summary().ends_with("\n15 passed, 2 failed, 1 ignored\n"));
    }

    #[test]
    fn children_learn_what_the_machine_cannot_do() {
        let mut run = fresh();
        run.environment.push(("UMBRA_SKIP_KVM", "1".to_owned()));
        let mut check = Command::new("sh");
        check.args(["-c", "test \"$UMBRA_SKIP_KVM\" = 1"]);
        run.command("env", check);
        assert!(!run.has_failed());
    }
}
