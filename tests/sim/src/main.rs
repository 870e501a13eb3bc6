//! `umbra-sim --seed N` tells one world's story; `umbra-sim --seeds A..B` lives through many and counts;
//! `umbra-sim replay TRACE` ships a recorded guest's writes in one order or another.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use umbra_core::order::Order;
use umbra_sim::dirt::Trace;
use umbra_sim::replay::{Plan, replay};
use umbra_sim::{Guests, Lines, Report, Tally, run};

const USAGE: &str = "usage: umbra-sim --seed N | --seeds A..B [--guests drawn|idle|busy]\n\
    \x20      umbra-sim replay TRACE [--order ORDER|all] [--link PAGES_PER_S] [--budget PAGES] [--seconds N]\n\
    --seed N       print the conditions that N draws, then one line per event\n\
    --seeds A..B   live through the worlds A to B-1 and print what happened how often\n\
    --guests KIND  make every guest idle, or every guest busy (default: as drawn)\n\
    replay TRACE   a file that `umbra-bench record` wrote, or zipf:SKEW:LOAD (32768 pages, writing LOAD of the link)\n\
    --order        cold-first, round, skip-redirtied, oldest, hot-first, or all of them (default)\n\
    --link         what the link carries (default 6000)\n\
    --budget       a debt small enough to stop at (default 300)\n\
    --seconds      give up after so long (default 60)";

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    One(u64),
    Many(u64, u64),
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((_, rest)) = arguments.split_first().filter(|(first, _)| *first == "replay") {
        return match replays(rest) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => {
                eprintln!("umbra-sim: {problem}\n{USAGE}");
                ExitCode::from(2)
            }
        };
    }
    match parse(&arguments) {
        Ok((Asked::One(seed), guests)) => one(seed, guests),
        Ok((Asked::Many(first, end), guests)) => many(first, end, guests),
        Err(problem) => {
            eprintln!("umbra-sim: {problem}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(arguments: &[String]) -> Result<(Asked, Guests), String> {
    let (mut asked, mut guests) = (None, Guests::Drawn);
    for option in arguments.chunks(2) {
        let [name, value] = option else {
            return Err(format!("{}: a value expected", option.concat()));
        };
        match name.as_str() {
            "--seed" => {
                let seed = value
                    .parse()
                    .map_err(|_| format!("--seed: a number expected, got {value:?}"))?;
                asked = Some(Asked::One(seed));
            }
            "--seeds" => {
                let (first, end) = parse_range(value)
                    .ok_or_else(|| format!("--seeds: A..B with A below B expected, got {value:?}"))?;
                asked = Some(Asked::Many(first, end));
            }
            "--guests" => {
                guests = match value.as_str() {
                    "drawn" => Guests::Drawn,
                    "idle" => Guests::Idle,
                    "busy" => Guests::Busy,
                    _ => return Err(format!("--guests: drawn, idle or busy expected, got {value:?}")),
                }
            }
            _ => return Err(format!("{name}: no such option")),
        }
    }
    Ok((asked.ok_or("one of --seed and --seeds expected")?, guests))
}

/// `umbra-sim replay`.
fn replays(arguments: &[String]) -> Result<(), String> {
    let (source, options) = arguments.split_first().ok_or("replay: a trace expected")?;
    let (mut orders, mut link, mut budget, mut seconds) = (Order::ALL.to_vec(), 6_000.0_f64, 300_u64, 60_u64);
    for option in options.chunks(2) {
        let [name, value] = option else {
            return Err(format!("{}: a value expected", option.concat()));
        };
        let number = || {
            value
                .parse()
                .map_err(|_| format!("{name}: a number expected, got {value:?}"))
        };
        match name.as_str() {
            "--order" if value == "all" => {}
            "--order" => {
                orders = vec![
                    value
                        .parse()
                        .map_err(|error| format!("--order: {error}, got {value:?}"))?,
                ]
            }
            "--link" => {
                let rate = value.parse::<f64>().ok().filter(|rate| rate.is_finite() && *rate > 0.0);
                link = rate.ok_or_else(|| format!("--link: pages a second expected, got {value:?}"))?;
            }
            "--budget" => budget = number()?,
            "--seconds" => seconds = number()?,
            _ => return Err(format!("{name}: no such option")),
        }
    }
    let trace = read_trace(source, link)?;
    println!(
        "{} pages, {} harvests over {:.1} s; a link of {link:.0} pages/s",
        trace.pages,
        trace.harvests.len(),
        trace.span().as_secs_f64()
    );
    for order in orders {
        let plan = Plan {
            order,
            link,
            budget,
            cap: Duration::from_secs(seconds),
        };
        println!("{order:<15} {}", replay(&trace, plan));
    }
    Ok(())
}

fn read_trace(source: &str, link: f64) -> Result<Trace, String> {
    let Some(zipf) = source.strip_prefix("zipf:") else {
        let bytes = std::fs::read(source).map_err(|error| format!("{source}: {error}"))?;
        return Trace::decode(&bytes).map_err(|error| format!("{source}: {error}"));
    };
    let bad = || format!("{source}: zipf:SKEW:LOAD expected, as zipf:1.0:0.8");
    let (skew, load) = zipf.split_once(':').ok_or_else(bad)?;
    let number = |text: &str| text.parse::<f64>().ok().filter(|number| (0.0..=10.0).contains(number));
    let (skew, load) = (number(skew).ok_or_else(bad)?, number(load).ok_or_else(bad)?);
    let (span, every) = (Duration::from_secs(20), Duration::from_millis(20));
    Ok(Trace::zipf(32_768, skew, link * load, span, every, 1))
}

fn parse_range(range: &str) -> Option<(u64, u64)> {
    let (first, end) = range.split_once("..")?;
    let (first, end) = (first.parse().ok()?, end.parse().ok()?);
    (first < end).then_some((first, end))
}

fn one(seed: u64, guests: Guests) -> ExitCode {
    let report = run(seed, guests, Lines::Printed);
    match report.wrong {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    }
}

fn many(first: u64, end: u64, guests: Guests) -> ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(first);
    let results: Mutex<(Tally, Vec<Report>)> = Mutex::new((Tally::default(), Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let report = live_through(seed, guests);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.0.add(&report.tally);
                    if report.wrong.is_some() {
                        results.1.push(report);
                    }
                }
            });
        }
    });
    let (tally, mut failed) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_by_key(|report| report.seed);
    summary(first, end, &tally, &failed, began.elapsed().as_secs_f64());
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A bug's `assert!` is a finding like any other, with its seed.
fn live_through(seed: u64, guests: Guests) -> Report {
    std::panic::catch_unwind(|| run(seed, guests, Lines::Dropped)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Report {
            seed,
            wrong: Some(format!("panic: {}", text.unwrap_or_default())),
            tally: Tally::default(),
            hash: None,
        }
    })
}

#[expect(clippy::cast_precision_loss, reason = "rates for a reader")]
fn summary(first: u64, end: u64, tally: &Tally, failed: &[Report], seconds: f64) {
    let count = end - first;
    print!("{tally}");
    println!(
        "{count} seeds in {seconds:.1} s: {:.0} seeds/s, {:.0} virtual seconds/s",
        count as f64 / seconds,
        tally.virtual_ms as f64 / 1_000.0 / seconds
    );
    for report in failed.iter().take(20) {
        println!(
            "seed {} FAILED: {}",
            report.seed,
            report.wrong.as_deref().unwrap_or_default()
        );
    }
    match failed.first() {
        None => println!("every rule held"),
        Some(first) => println!(
            "{} of {count} seeds failed; replay the first with --seed {}",
            failed.len(),
            first.seed
        ),
    }
}
