//! What the README's two commands run, and what CI runs: one program, so that the three cannot drift apart.
//!
//! It only joins other programs (cargo, apt-get, `umbra`): every check that needs more than that lives in a crate of its
//! own. It is also the first thing a fresh machine compiles, which is why it depends on a JSON reader and nothing else.
//!
//! | module | answers |
//! |---|---|
//! | [`setup`] | has this machine what a build needs, and can it run guests? |
//! | [`plan`] | what is checked, in which order, and how is it reported? |
//! | [`edges`] | do the crates depend on each other as the architecture allows? |
//! | [`fuzz`] | what do inputs that nobody thought of do? |
//! | [`linux`] | where is the Linux that guests boot, and does it have to be built? |
//! | [`book`] | do the documents name files, tests and headings that exist? |
//! | [`house`] | where is everything, and how is cargo asked for it? |
#![forbid(unsafe_code)]

mod book;
mod edges;
mod fuzz;
mod house;
mod linux;
mod plan;
mod setup;

use std::{env, process::ExitCode};

use house::{House, Outcome};

const HELP: &str = "\
cargo xtask COMMAND

  test [--long]                  set up and run every check, as CI does; --long draws more seeds and cases
  demo [ARGS...]                 set up, build and run `umbra demo ARGS`
  bench [NAME...] [--json] [--short]
                                 set up, build and run the benchmarks behind docs/numbers.md
  fuzz [--minutes N] [TARGET...] build the fuzz targets and run each for a minute, or N
  setup                          check what a build needs; installs missing Debian packages when root
  guest                          build the tiny test kernel and print its path
  linux [--print]                build a Linux for guests, once per machine, and print where it is, as lines for a shell;
                                 --print builds nothing
  edges                          check crate edges, lints and bans against the architecture
  tour                           check docs/tour.md and every link in the documents

A machine without a usable /dev/kvm runs everything else and says what it skipped; with CI=true that is a failure.";

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match run(&words) {
        Ok(code) => code,
        Err(complaint) => {
            eprintln!("xtask: {complaint}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Outcome<ExitCode> {
    let (command, rest) = match words.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", words),
    };
    let house = House::find()?;
    match command {
        "test" => {
            let long = match rest {
                [] => false,
                [flag] if flag == "--long" => true,
                _ => return Err(format!("`test` takes `--long` or nothing, not `{}`", rest.join(" "))),
            };
            plan::test(&house, long)
        }
        "demo" => plan::demo(&house, rest),
        "bench" => plan::bench(&house, rest),
        "fuzz" => fuzz::fuzz(&house, rest),
        "setup" | "guest" | "edges" | "tour" if !rest.is_empty() => Err(format!(
            "`{command}` takes no arguments, but was given `{}`",
            rest.join(" ")
        )),
        "setup" => setup::setup().map(|_| ExitCode::SUCCESS),
        "guest" => {
            println!("{}", plan::build_guest(&house)?.display());
            Ok(ExitCode::SUCCESS)
        }
        "linux" => linux::linux(&house, rest).map(|()| ExitCode::SUCCESS),
        "edges" => report("edges", &edges::check(&house)?),
        "tour" => report("tour", &book::check(&house)?),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(ExitCode::SUCCESS)
        }
        other => Err(format!("no command `{other}`\n\n{HELP}")),
    }
}

/// Prints what a check found. Nothing found is success.
fn report(check: &str, complaints: &[String]) -> Outcome<ExitCode> {
    for complaint in complaints {
        println!("{check}: {complaint}");
    }
    match complaints.len() {
        0 => {
            println!("{check}: as it should be");
            Ok(ExitCode::SUCCESS)
        }
        1 => Err(format!("{check}: 1 complaint")),
        n => Err(format!("{check}: {n} complaints")),
    }
}
