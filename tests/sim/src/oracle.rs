//! The rules that may never break (DESIGN §3), checked after every event, and a count of what happened.

use std::collections::BTreeMap;
use std::sync::Arc;

use umbra_core::error::Fault;
use umbra_core::guest::Harvest;
use umbra_units::{Epoch, Term};

use crate::conditions::{Host, Moment};
use crate::guest::{FakeGuest, Snapshot};
use crate::tally::Tally;

/// Knows everything, touches nothing.
#[derive(Debug)]
pub(crate) struct Oracle {
    /// Every copy of the guest there is.
    pub(crate) copies: Vec<(Host, Arc<FakeGuest>)>,
    /// The highest term any copy has run in.
    pub(crate) term: Term,
    /// What the guest was at each cut of the session under way.
    pub(crate) cuts: BTreeMap<Epoch, Snapshot>,
    pub(crate) tally: Tally,
    /// What happened that somebody may lie in wait for.
    pub(crate) moments: Vec<Moment>,
    wrong: Option<String>,
}

impl Oracle {
    pub(crate) const fn new(term: Term) -> Self {
        Self {
            copies: Vec::new(),
            term,
            cuts: BTreeMap::new(),
            tally: Tally::new(),
            moments: Vec::new(),
            wrong: None,
        }
    }

    /// The first rule that broke.
    pub(crate) const fn wrong(&self) -> Option<&String> {
        self.wrong.as_ref()
    }

    pub(crate) fn broken(&mut self, rule: &str, what: impl Into<String>) {
        if self.wrong.is_none() {
            self.wrong = Some(format!("{rule}: {}", what.into()));
        }
    }

    pub(crate) fn copy_gone(&mut self, gone: &Arc<FakeGuest>) {
        self.copies.retain(|(_, copy)| !Arc::ptr_eq(copy, gone));
    }

    /// The copy that runs, if one does.
    pub(crate) fn runner(&self) -> Option<(Host, Arc<FakeGuest>)> {
        self.copies
            .iter()
            .find(|(_, copy)| copy.is_running())
            .map(|(host, copy)| (*host, Arc::clone(copy)))
    }

    /// Rule 1, and that everybody keeps to the contract of a guest.
    pub(crate) fn check_copies(&mut self) {
        let running = self.copies.iter().filter(|(_, copy)| copy.is_running()).count();
        if running > 1 {
            self.broken("one runner", format!("{running} copies run"));
        }
        let misuse = self
            .copies
            .iter()
            .find_map(|(host, copy)| Some((*host, copy.misuse()?)));
        if let Some((host, what)) = misuse {
            self.broken("contract", format!("on node {host}: {what}"));
        }
    }

    /// A shadow is about to run: it must be exactly what the source was at the cut (rule 3).
    pub(crate) fn check_start(&mut self, twin: &FakeGuest, epoch: Option<Epoch>) {
        let Some(cut) = epoch.and_then(|epoch| self.cuts.get(&epoch)) else {
            return self.broken(
                "no mixture",
                format!("the shadow starts from {epoch:?}, which was never cut"),
            );
        };
        if let Some(difference) = twin.differs_from(cut) {
            self.broken("no mixture", format!("the shadow starts and {difference}"));
        }
    }

    /// A shadow commits an epoch: its memory must be exactly what the source's was at the cut (rule 3).
    pub(crate) fn check_commit(&mut self, twin: &FakeGuest, epoch: Epoch) {
        let difference = match self.cuts.get(&epoch) {
            Some(cut) => twin.memory_differs_from(cut),
            None => Some("it was never cut".to_owned()),
        };
        if let Some(difference) = difference {
            self.broken("no mixture", format!("epoch {epoch} is committed and {difference}"));
        }
    }

    /// The shadow lets its twin run, which takes hold of the disks.
    pub(crate) fn check_disks(&mut self, twin: &FakeGuest) {
        let held = |(_, copy): &(Host, Arc<FakeGuest>)| !std::ptr::eq(&raw const **copy, twin) && copy.holds_disks();
        if self.copies.iter().any(held) {
            self.broken("one runner", "the shadow starts while another copy holds the disks");
        }
    }

    /// A copy runs in `term`, which `moved` there or was taken back.
    pub(crate) fn check_term(&mut self, term: Term, who: &str) {
        if term <= self.term {
            self.broken("terms grow", format!("{who} in term {term} after term {}", self.term));
        }
        self.term = term;
    }

    /// Rule 2: what differs is known to be owed.
    pub(crate) fn check_debt(&mut self, source: &FakeGuest, twin: &FakeGuest, known: &[&Harvest]) {
        if let Some(page) = source.unknown_differences(twin, known) {
            self.broken("no lost write", format!("{page} differs and nobody owes it"));
        }
    }

    /// A session ended by a fault. In this world nobody lies, so nobody may be called a liar.
    pub(crate) fn check_fault(&mut self, who: &str, fault: &Fault, excused: bool) {
        match fault {
            Fault::PeerMisbehaved(text) | Fault::PeerIncompatible(text) => {
                self.broken("no false accusation", format!("{who} ended the session: {text}"));
            }
            Fault::Host(_) | Fault::PeerEnded(_) if excused => {}
            Fault::Host(text) | Fault::PeerEnded(text) => {
                self.broken(
                    "no failure of itself",
                    format!("{who} ended the session without a reason: {text}"),
                );
            }
        }
    }
}
