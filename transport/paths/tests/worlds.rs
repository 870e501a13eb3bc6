//! Whole links in simulated worlds: first whatever may happen happens and nothing may be wrong, then it heals and
//! everything must arrive. A failing seed is a bug report: `UMBRA_SEED=n cargo test -p umbra-paths --test worlds`
//! replays it; `UMBRA_SEEDS=n` runs more of them.
#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures for people"
)]

mod weather;

use std::time::Duration;

use umbra_paths::{Class, LinkConfig, LinkEvent};
use umbra_units::{Now, Ratio, Rng};
use weather::{MS, SECOND, Script, Weather, World};

fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// Dull as often as wild.
fn draw_weather(rng: &mut Rng) -> Weather {
    let rtt = Duration::from_micros([200, 2_000, 20_000, 80_000, 200_000][to_usize(rng.below(5))]);
    let mut weather = Weather::clear([10, 50, 200, 1_000][to_usize(rng.below(4))], rtt);
    if rng.chance(0.5) {
        weather = weather.lossy(rng.unit() * [0.01, 0.2][to_usize(rng.below(2))], 1.0 + rng.unit() * 3.0);
    }
    if rng.chance(0.3) {
        weather.double = rng.unit() * 0.1;
    }
    if rng.chance(0.3) {
        weather.jitter = weather.delay.mul_f64(rng.unit());
    }
    if rng.chance(0.1) {
        weather.max_datagram = [0, 100, 300, 9_000][to_usize(rng.below(4))];
    }
    weather
}

fn draw_len(rng: &mut Rng, class: Class) -> usize {
    let most = match class {
        Class::Bulk => [100, 64 << 10, 512 << 10][to_usize(rng.below(3))],
        Class::Urgent => [1_000, 64 << 10, 2 << 20][to_usize(rng.below(3))],
    };
    to_usize(1 + rng.below(most))
}

/// One seed, one world. Returns what happened, for replays.
fn live(seed: u64) -> World {
    let mut rng = Rng::new(seed);
    let paths = to_usize([1, 2, 3, 3, 5][to_usize(rng.below(5))]);
    let weathers: Vec<Weather> = (0..paths).map(|_| draw_weather(&mut rng)).collect();
    let mut config = LinkConfig::default();
    if rng.chance(0.3) {
        config = config.with_survive_paths(1).unwrap();
    }
    if rng.chance(0.2) {
        config = config.with_reinject(Ratio::NONE).unwrap();
    }
    let mut world = World::new(rng.next_u64(), &weathers, &config);
    world.samples = rng.chance(0.7);
    if rng.chance(0.2) {
        world.sides[to_usize(rng.below(2))].slow_user = Some(Duration::from_micros(1 + rng.below(200_000)));
    }
    let trouble = 3 * SECOND;
    let when = |rng: &mut Rng| trouble.mul_f64(rng.unit());
    for side in 0..2 {
        for _ in 0..rng.below(60) {
            world.at(when(&mut rng), Script::Message { side });
        }
        for (class, most) in [(Class::Bulk, 30), (Class::Urgent, 6)] {
            for _ in 0..rng.below(most) {
                let len = draw_len(&mut rng, class);
                world.at(when(&mut rng), Script::Block { side, class, len });
            }
        }
    }
    if rng.chance(0.6) {
        for _ in 0..rng.below(8) {
            let path = to_usize(rng.below(paths as u64));
            let at = when(&mut rng);
            let weather = draw_weather(&mut rng);
            let from = rng.chance(0.3).then(|| to_usize(rng.below(2)));
            match rng.below(3) {
                0 => world.at(at, Script::Turn { path, from, weather }),
                1 => {
                    world.at(
                        at,
                        Script::Turn {
                            path,
                            from,
                            weather: Weather {
                                dark: true,
                                ..weathers[path]
                            },
                        },
                    );
                    world.at(
                        at + when(&mut rng) / 4,
                        Script::Turn {
                            path,
                            from,
                            weather: weathers[path],
                        },
                    );
                }
                _ => {
                    let noticed = [when(&mut rng) / 4, when(&mut rng) / 4];
                    world.at(at, Script::Die { path, noticed });
                    world.at(
                        at + noticed[0].max(noticed[1]) + MS + when(&mut rng) / 4,
                        Script::Revive { path },
                    );
                }
            }
        }
    }
    world.run(Now::ZERO + 2 * trouble, |_| false);
    world.check_contents();
    // Now everything heals.
    for path in 0..paths {
        world.set_weather(path, None, Weather::clear(100, 20 * MS));
    }
    for side in &mut world.sides {
        side.slow_user = None;
    }
    let end = world.now + 60 * SECOND;
    let settled = world.run(end, World::settled);
    world.check_contents();
    if !settled {
        for side in &world.sides {
            eprintln!("{:#?}", side.link.stats());
            eprintln!(
                "blocks {}/{} delivered, {} in",
                side.delivered.len(),
                side.blocks_out.len(),
                side.blocks_in.len()
            );
            eprintln!("messages out {} in {}", side.messages_out.len(), side.messages_in.len());
        }
        panic!("seed {seed}: not everything arrived within a minute of good weather");
    }
    for side in &world.sides {
        let stats = side.link.stats();
        assert_eq!(
            (stats.held_bytes, stats.receiving_bytes),
            (0, 0),
            "seed {seed}: something is still held"
        );
    }
    world
}

#[test]
fn whatever_the_weather_everything_arrives_once_and_intact() {
    if let Ok(seed) = std::env::var("UMBRA_SEED") {
        let world = live(seed.parse().expect("UMBRA_SEED is a number"));
        for (i, side) in world.sides.iter().enumerate() {
            for (now, event) in &side.events {
                match event {
                    LinkEvent::Message(bytes) => println!("{now} side {i} message of {} bytes", bytes.len()),
                    LinkEvent::Block { id, bytes } => println!("{now} side {i} {id} of {} bytes", bytes.len()),
                    other => println!("{now} side {i} {other:?}"),
                }
            }
        }
        return;
    }
    let seeds = std::env::var("UMBRA_SEEDS").map_or(300, |n| n.parse().expect("UMBRA_SEEDS is a number"));
    (0..seeds).for_each(|seed| drop(live(seed)));
}

#[test]
fn the_same_seed_is_the_same_world() {
    let trace = |seed| live(seed).sides.map(|side| side.events);
    assert_eq!(trace(7), trace(7));
}
