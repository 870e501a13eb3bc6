//! How often what happened, so that a run of many seeds shows that it visited what it claims to test.

use core::fmt;

macro_rules! tally {
    ($($(#[$doc:meta])* $name:ident: $label:literal,)+) => {
        /// Counts of outcomes, over one world or many.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Tally { $($(#[$doc])* pub $name: u64,)+ }

        impl Tally {
            pub(crate) const fn new() -> Self {
                Self { $($name: 0,)+ }
            }

            /// Add another world's counts to these.
            pub const fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)+
            }

            /// Each count with its name.
            pub fn parts(&self) -> Vec<(&'static str, u64)> {
                vec![$(($label, self.$name),)+]
            }
        }
    };
}

tally! {
    /// Worlds.
    worlds: "worlds",
    /// Sessions begun.
    sessions: "sessions",
    /// Switchovers that operators asked for.
    asked: "switchovers asked",
    /// Final epochs begun.
    stopped: "guests stopped",
    /// Guests given up.
    gave_up: "guests given up",
    /// Guests that moved.
    moved: "moved",
    /// Final epochs taken back.
    withdrew: "final epochs taken back",
    /// Switchovers that were not stopped for within their time.
    not_stopped: "timed out before the stop",
    /// Guests handed back by the shadow.
    handed_back: "handed back",
    /// Guests reclaimed by an operator.
    reclaimed: "reclaimed",
    /// Shadows started on an operator's word.
    vouched: "vouched for",
    /// Cuts begun.
    cuts: "cuts begun",
    /// Of those, because the shadow's staging was nearly full.
    cuts_for_staging: "cuts begun for staging",
    /// Cuts that failed.
    cuts_failed: "cuts failed",
    /// Cuts that the source heard were committed.
    cuts_committed: "epochs committed",
    /// Committed epochs that a shadow could not keep.
    epochs_given_up: "committed epochs given up",
    /// Shadows that went back to their committed epoch.
    recalled: "committed epochs gone back to",
    /// Audits that found a page.
    audits_failed: "audits that found a page",
    /// Sessions that ended with the guest staying.
    stayed: "sessions ended, guest stayed",
    /// Shadows dropped.
    dropped: "shadows dropped",
    /// Cancels that were accepted.
    cancelled: "cancels",
    /// Steps that failed as drawn.
    failed_steps: "steps failed",
    /// Nodes that died.
    killed: "nodes killed",
    /// Shadow processes that were restarted.
    restarted: "shadow processes restarted",
    /// Links that went down at an end.
    links_down: "links down",
    /// Guests that died with their node.
    died: "guests that died with their node",
    /// Batches applied.
    batches: "batches applied",
    /// Batches that arrived before their turn.
    overtaken: "batches before their turn",
    /// Pages shipped whole.
    raw: "pages raw",
    /// Pages shipped as deltas.
    delta: "pages as deltas",
    /// Pages shipped as zeros.
    zero: "pages as zeros",
    /// Pages not shipped because they were equal.
    same: "pages unchanged",
    /// Worlds in which following settled with nothing owed.
    settled: "worlds settled",
    /// Worlds over real links.
    over_links: "worlds over real links",
    /// Events.
    events: "events",
    /// Virtual milliseconds.
    virtual_ms: "virtual ms",
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (label, count) in self.parts() {
            writeln!(f, "  {label:<34} {count:>12}")?;
        }
        Ok(())
    }
}
