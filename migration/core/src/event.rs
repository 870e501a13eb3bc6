//! What happened, typed: one stream that log lines, counters, the simulator's columns and tests all read.

use std::time::Duration;

use umbra_units::{Epoch, PageCount, PageId, Term};

use crate::phase::{ShadowPhase, SourcePhase};
use crate::report::CutReport;
use crate::source::CutReason;

/// Something worth telling, from either side.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A source's phase changed.
    Source {
        /// From.
        from: SourcePhase,
        /// To.
        to: SourcePhase,
    },
    /// A shadow's phase changed.
    Shadow {
        /// From.
        from: ShadowPhase,
        /// To.
        to: ShadowPhase,
    },
    /// A switchover was asked for.
    SwitchoverAsked,
    /// One round of shrinking the debt before the stop.
    Round {
        /// Counted from one.
        round: u32,
        /// What is left to send.
        debt: PageCount,
        /// The pause if the guest were stopped now.
        predicted: Duration,
    },
    /// The pause will not come within the limit at the link's present rate. Said once for each attempt.
    WillNotConverge {
        /// Pages that are left however long one waits.
        floor: PageCount,
        /// The pause with so many left.
        predicted: Duration,
        /// The whole of it, in words for an operator.
        text: String,
    },
    /// The guest is to be stopped, with this much left to send.
    StopDecided {
        /// What is left to send.
        debt: PageCount,
        /// The pause as predicted.
        predicted: Duration,
    },
    /// The switchover did not happen; the guest runs on at the source.
    SwitchoverFailed {
        /// Why, in words for an operator.
        text: String,
    },
    /// An epoch is to be cut while the guest goes on.
    CutBegan {
        /// Its number.
        epoch: Epoch,
        /// Why.
        reason: CutReason,
    },
    /// The epoch was not cut; the guest runs on, and following goes on.
    CutFailed {
        /// Why, in words for an operator.
        text: String,
    },
    /// The shadow committed an epoch that was cut here: the account of it.
    Cut(Box<CutReport>),
    /// This shadow committed an epoch: it could go back to it whatever comes.
    Committed {
        /// Which.
        epoch: Epoch,
    },
    /// The shadow could not keep its committed epoch apart from what came after it. It follows on, and holds nothing that may
    /// run until the next is committed.
    EpochGivenUp {
        /// Which.
        epoch: Epoch,
        /// Why, in words for an operator.
        text: String,
    },
    /// The committed epoch could not be gone back to; it is still kept.
    RecallFailed {
        /// Why, in words for an operator.
        text: String,
    },
    /// An audit found pages whose memory is not what was shipped. A bug in write tracking, ours or the kernel's.
    AuditFailed {
        /// The first few of them.
        pages: Vec<PageId>,
        /// How many there are.
        count: usize,
    },
    /// The shadow's verdict on a switchover changed.
    ReadinessChanged {
        /// Everything that speaks against one; nothing, if empty.
        reasons: Vec<String>,
    },
    /// The source gave the guest up: from here on only the shadow may run it, in this term.
    GaveUp {
        /// The final epoch.
        epoch: Epoch,
        /// The shadow's term.
        term: Term,
    },
    /// No path to the peer is left.
    LinkDown,
    /// A path to the peer is back.
    LinkUp,
}
