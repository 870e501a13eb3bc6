//! Fuzzing: `tests/fuzz`, built so that libFuzzer sees which branches an input reaches.
//!
//! That needs no nightly compiler: the pass that instruments branches is part of the stable one. What is missing without
//! nightly are the sanitizers, which would look for what safe code cannot do.
//!
//! What was found to reach something new is kept below the target folder and is where the next run begins. An input that
//! breaks a target is kept beside it, and the command to repeat it is printed.

use std::process::{Command, ExitCode};

use crate::house::{House, Outcome, show};
use crate::setup::{Tool, install_missing};

/// Every target, and how long an input may be: long enough for what it is the input of.
const TARGETS: &[(&str, u32)] = &[
    ("batch", 16_384),
    ("delta", 4_096),
    ("manifest", 4_096),
    ("message", 4_096),
    ("virtio", 1_024),
    ("walk", 4_096),
];

const TOOLS: &[Tool] = &[Tool {
    program: "c++",
    probe: &["--version"],
    packages: &["g++"],
    why: "compiles libFuzzer",
}];

/// Machines differ; the instrumented code is for the one it is built on.
const HOST: &str = "x86_64-unknown-linux-gnu";

/// Count branches and what is compared in them.
const INSTRUMENT: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// One input may take so long, and a target so much memory: more is found as a fault.
const SECONDS_PER_INPUT: u32 = 10;
const MIB: u32 = 1024;

/// `cargo xtask fuzz [--minutes N] [TARGET...]`.
pub(crate) fn fuzz(house: &House, words: &[String]) -> Outcome<ExitCode> {
    let (minutes, wanted) = read(words)?;
    setup()?;
    run(&mut build(house), "build")?;
    for (target, longest) in TARGETS.iter().filter(|(name, _)| wanted.contains(name)) {
        run(&mut target_for(house, target, *longest, minutes * 60)?, target)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Minutes for each target, and which targets.
fn read(words: &[String]) -> Outcome<(u32, Vec<&'static str>)> {
    let names = || TARGETS.iter().map(|(name, _)| *name);
    let (mut minutes, mut wanted) = (1, vec![]);
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        if word == "--minutes" {
            let given = words.next().and_then(|minutes| minutes.parse().ok());
            minutes = given
                .filter(|minutes| (1..=10_000).contains(minutes))
                .ok_or("`--minutes` takes a number from 1 to 10000")?;
        } else if let Some(name) = names().find(|name| *name == word) {
            wanted.push(name);
        } else {
            let known: Vec<&str> = names().collect();
            return Err(format!("`fuzz` has no target `{word}`: expected {}", known.join(", ")));
        }
    }
    if wanted.is_empty() {
        wanted.extend(names());
    }
    Ok((minutes, wanted))
}

/// What fuzzing needs beside what everything needs.
pub(crate) fn setup() -> Outcome<()> {
    install_missing(TOOLS)
}

/// Build the targets.
pub(crate) fn build(house: &House) -> Command {
    let manifest = ["--manifest-path", "tests/fuzz/Cargo.toml"];
    // With a target named, build scripts are built without the flags.
    let mut build = house.cargo(&[&["build", "--release", "--locked", "--target", HOST], &manifest[..]].concat());
    build
        .env("CARGO_TARGET_DIR", house.target().join("fuzz"))
        .env("RUSTFLAGS", INSTRUMENT.join(" "));
    build
}

/// A few seconds of every target, for CI.
pub(crate) fn short(house: &House) -> Outcome<Vec<(&'static str, Command)>> {
    let short = |(name, longest): &(&'static str, u32)| Ok((*name, target_for(house, name, *longest, 5)?));
    TARGETS.iter().map(short).collect()
}

fn target_for(house: &House, target: &str, longest: u32, seconds: u32) -> Outcome<Command> {
    let kept = house.target().join("fuzz");
    let (corpus, found) = (kept.join("corpus").join(target), kept.join("found").join(target));
    for folder in [&corpus, &found] {
        std::fs::create_dir_all(folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    }
    let mut command = Command::new(kept.join(HOST).join("release").join(target));
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={longest}"))
        .arg(format!("-timeout={SECONDS_PER_INPUT}"))
        .arg(format!("-rss_limit_mb={MIB}"))
        .arg(format!("-artifact_prefix={}/", found.display()))
        .args(["-verbosity=0", "-print_final_stats=1"])
        .arg(corpus)
        .current_dir(&house.root);
    Ok(command)
}

fn run(command: &mut Command, what: &str) -> Outcome<()> {
    println!("==> fuzz {what}: {}", show(command));
    let status = command
        .status()
        .map_err(|error| format!("cannot start `{}`: {error}", show(command)))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!(
            "fuzz {what}: {status}; to repeat it, give the program the file it wrote"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_line(line: &str) -> Outcome<(u32, Vec<&'static str>)> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        read(&words)
    }

    #[test]
    fn without_words_every_target_has_a_minute() {
        let (minutes, wanted) = read_line("").unwrap();
        assert_eq!((minutes, wanted.len()), (1, TARGETS.len()));
        assert_eq!(read_line("--minutes 5 batch"), Ok((5, vec!["batch"])));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        assert!(
            read_line("bach")
                .unwrap_err()
                .contains("no target `bach`: expected batch,")
        );
        assert!(read_line("--minutes 0").is_err());
        assert!(read_line("batch --minutes").is_err());
    }

    #[test]
    fn every_target_is_there_to_be_built() {
        let house = House::find().unwrap();
        let manifest = house.read("tests/fuzz/Cargo.toml").unwrap();
        for (name, _) in TARGETS {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    }
}
