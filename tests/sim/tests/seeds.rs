//! Some hundred worlds, and the ones that once went wrong.
//!
//! Seeds keep their meaning only as long as nothing draws differently, so every bug that a seed found also has a story
//! of its own in `migration/core/tests/pair.rs`; what is pinned here is pinned because it is still a rare world.

use umbra_sim::{Guests, Lines, Tally, run};

fn live_through(seeds: impl Iterator<Item = u64>, guests: Guests) -> Tally {
    let mut tally = Tally::default();
    for seed in seeds {
        let report = run(seed, guests, Lines::Dropped);
        if let Some(wrong) = report.wrong {
            panic!("{wrong}; replay with: cargo run -p umbra-sim --release -- --seed {seed}");
        }
        tally.add(&report.tally);
    }
    tally
}

#[test]
fn in_hundreds_of_drawn_worlds_no_rule_breaks_and_everything_ends_well() {
    let tally = live_through(0..300, Guests::Drawn);
    // A run that never visits what it claims to test proves nothing.
    for (what, count) in [
        ("moved", tally.moved),
        ("withdrew", tally.withdrew),
        ("handed back", tally.handed_back),
        ("killed", tally.killed),
        ("restarted", tally.restarted),
        ("cancelled", tally.cancelled),
        ("failed steps", tally.failed_steps),
        ("audits failed", tally.audits_failed),
        ("links down", tally.links_down),
        ("overtaken", tally.overtaken),
        ("cuts committed", tally.cuts_committed),
        ("cuts failed", tally.cuts_failed),
        ("cuts for staging", tally.cuts_for_staging),
        ("epochs given up", tally.epochs_given_up),
        ("gone back to a committed epoch", tally.recalled),
        ("settled", tally.settled),
        ("over real links", tally.over_links),
    ] {
        assert!(count > 0, "no world has {what}:\n{tally}");
    }
}

#[test]
fn an_idle_guest_hides_nothing() {
    live_through(1_000..1_100, Guests::Idle);
}

#[test]
fn a_busy_guest_is_followed_and_moves() {
    live_through(2_000..2_100, Guests::Busy);
}

#[test]
fn a_seed_tells_one_story() {
    for seed in 0..40 {
        let [once, again] = [(); 2].map(|()| run(seed, Guests::Drawn, Lines::Hashed));
        assert_eq!((once.hash, once.tally), (again.hash, again.tally), "seed {seed}");
        assert!(once.hash.is_some());
    }
}

#[test]
fn whether_lines_are_wanted_changes_nothing() {
    for seed in 0..20 {
        let (hashed, dropped) = (
            run(seed, Guests::Drawn, Lines::Hashed),
            run(seed, Guests::Drawn, Lines::Dropped),
        );
        assert_eq!(hashed.tally, dropped.tally, "seed {seed}");
    }
}
