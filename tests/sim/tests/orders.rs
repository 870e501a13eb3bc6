//! Orders compared on the same writes, with the figures of algorithms §5.1: 32768 pages, a link of 6000 pages a second,
//! half of memory idle and the other half written by Zipf's law, a stop at 300 pages or never.

use std::time::Duration;

use umbra_core::order::Order;
use umbra_sim::dirt::Trace;
use umbra_sim::replay::{Outcome, Plan, replay};

const LINK: f64 = 6_000.0;

fn trace(skew: f64, load: f64, seed: u64) -> Trace {
    let span = Duration::from_secs(20);
    Trace::zipf(32_768, skew, LINK * load, span, Duration::from_millis(20), seed)
}

fn run(trace: &Trace, order: Order) -> Outcome {
    let plan = Plan {
        order,
        link: LINK,
        budget: 300,
        cap: Duration::from_secs(60),
    };
    let outcome = replay(trace, plan);
    println!("{order:<15} {outcome}");
    outcome
}

#[test]
fn the_coldest_first_leaves_less_than_half_of_what_rounds_leave() {
    let trace = trace(1.0, 0.8, 1);
    let [cold, round, skip, oldest] =
        [Order::ColdFirst, Order::Round, Order::SkipRedirtied, Order::Oldest].map(|order| run(&trace, order));
    assert!(cold.left <= 0.4 * round.left, "{cold}\n{round}");
    assert!(
        cold.left < skip.left && cold.left < oldest.left,
        "{cold}\n{skip}\n{oldest}"
    );
    assert!(skip.left < round.left, "{skip}\n{round}");
}

#[test]
fn both_floors_are_foreseen() {
    let trace = trace(1.0, 0.8, 2);
    let round = run(&trace, Order::Round);
    let foreseen = round.floor_round.unwrap();
    assert!((round.left / foreseen - 1.0).abs() < 0.25, "{round}");
    let cold = run(&trace, Order::ColdFirst);
    assert!((0.8..1.5).contains(&(cold.left / cold.floor_cold)), "{cold}");
}

#[test]
fn a_link_with_room_to_spare_carries_little_twice() {
    for skew in [0.6, 1.4] {
        let trace = trace(skew, 0.3, 3);
        let [cold, round] = [Order::ColdFirst, Order::Round].map(|order| run(&trace, order));
        assert!(cold.stopped.is_some(), "{cold}");
        assert!(
            cold.resend_factor <= 1.2 && cold.resend_factor < round.resend_factor,
            "{cold}\n{round}"
        );
    }
}

#[test]
fn the_hottest_first_never_comes_to_an_end() {
    let trace = trace(1.0, 0.8, 4);
    let hot = run(&trace, Order::HotFirst);
    assert!(hot.stopped.is_none() && hot.left > 10_000.0, "{hot}");
}

#[test]
fn an_idle_guest_is_copied_once_in_any_order() {
    let trace = Trace::zipf(4_096, 1.0, 0.0, Duration::from_secs(5), Duration::from_millis(20), 5);
    for order in Order::ALL {
        let outcome = run(&trace, order);
        assert!(
            outcome.stopped.is_some() && outcome.resend_factor <= 1.01,
            "{order}: {outcome}"
        );
    }
}
