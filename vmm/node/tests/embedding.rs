//! Another VMM's guest through the whole node: real QUIC over loopback, no KVM.

#[path = "../examples/toy.rs"]
mod toy;

use std::sync::Arc;

use toy::{Toy, ToyBuilder, TwoNodes, live};
use umbra_core::guest::Guest;
use umbra_units::{PageCount, Term};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_is_not_ours_moves_by_implementing_one_trait() {
    for paths in [1, 3] {
        let here = Toy::new(PageCount(2_000));
        here.resume().unwrap();
        live(Arc::clone(&here));
        let builder = Arc::new(ToyBuilder::default());
        let (report, taken) = TwoNodes::new(paths)
            .unwrap()
            .move_toy(Arc::clone(&here), Arc::clone(&builder))
            .await
            .unwrap();
        let there = builder.built().unwrap();
        assert_eq!(taken.term, Term(2));
        assert!(report.audited);
        assert!(!here.runs() && there.runs());
        assert_eq!(there.steps(), here.steps(), "it goes on where it stopped");
        assert!(there.is_sound());
    }
}
