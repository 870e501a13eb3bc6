//! The guest stands still, and what ends an epoch is gathered: pause, harvest, save, harvest.
//!
//! The same for an epoch after which the guest runs on ([`cut`](super::cut)) and for the one with which it leaves
//! ([`switchover`](super::switchover)). The steps are asked all at once, so that nothing waits between them for anybody.

use umbra_units::{Bytes, Now};

use super::{Output, Source, Step};
use crate::error::Fault;
use crate::guest::StateRecord;
use crate::limits;

/// What was gathered. Moments are `None` until they have come.
#[derive(Debug)]
pub(super) struct Gathering {
    pub(super) asked: Now,
    pub(super) paused: Option<Now>,
    pub(super) first_harvest: Option<Now>,
    pub(super) saved: Option<Now>,
    pub(super) records: Option<Vec<StateRecord>>,
    pub(super) second_harvest: Option<Now>,
    pub(super) state_bytes: Bytes,
}

impl Gathering {
    pub(super) const fn new(now: Now) -> Self {
        Self {
            asked: now,
            paused: None,
            first_harvest: None,
            saved: None,
            records: None,
            second_harvest: None,
            state_bytes: Bytes::ZERO,
        }
    }

    /// A harvest was answered. Whether another is still to come.
    fn harvested(&mut self, now: Now) -> bool {
        // One that was asked for before the pause may answer late; it counts for neither.
        if self.paused.is_none() {
            return true;
        }
        if self.first_harvest.is_none() {
            self.first_harvest = Some(now);
            return true;
        }
        if self.saved.is_some() {
            self.second_harvest = Some(now);
        }
        false
    }

    /// Everything is there.
    pub(super) const fn is_complete(&self) -> bool {
        self.second_harvest.is_some()
    }
}

/// Answers that are still to come, of steps asked in this attempt and in those taken back before: a host may be slow,
/// and a new attempt may begin before it has done the steps of the last. Steps of one kind are answered in order.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) pause: Answers,
    pub(super) save: Answers,
    pub(super) capture: Answers,
    pub(super) audit: Answers,
    pub(super) resume: Answers,
}

#[derive(Debug, Default)]
pub(super) struct Answers {
    due: u32,
    /// Of those, answers that nobody wants any more.
    stale: u32,
}

impl Answers {
    pub(super) const fn ask(&mut self) {
        self.due += 1;
    }

    /// An answer came. Whether it is this attempt's.
    // covered by: the_answers_of_a_withdrawn_attempt_are_not_taken_for_those_of_the_next
    pub(super) const fn came(&mut self) -> bool {
        self.due = self.due.saturating_sub(1);
        let wanted = self.stale == 0;
        self.stale = self.stale.saturating_sub(1);
        wanted
    }
}

impl Due {
    /// Nothing that stops the guest or lets it run is outstanding.
    pub(super) const fn is_hands_off(&self) -> bool {
        self.pause.due == 0 && self.resume.due == 0
    }

    pub(super) const fn forget(&mut self) {
        self.pause.stale = self.pause.due;
        self.save.stale = self.save.due;
        self.capture.stale = self.capture.due;
        self.audit.stale = self.audit.due;
        self.resume.stale = self.resume.due;
    }
}

impl Source {
    /// Ask for the steps; the answers go into whichever [`Gathering`] is under way.
    pub(super) fn gather(&mut self) {
        self.due.pause.ask();
        self.due.save.ask();
        self.outputs.push_back(Output::Do(Step::Pause));
        // Writes that were under way when the vCPUs stopped are in the first harvest; saving device state may itself
        // write to guest memory, and that is what the second is for (DESIGN §3.2).
        self.harvesting = true;
        self.outputs.push_back(Output::Do(Step::Harvest));
        self.outputs.push_back(Output::Do(Step::Save));
        self.outputs.push_back(Output::Do(Step::Harvest));
    }

    pub(super) fn ask_resume(&mut self) {
        self.due.resume.ask();
        self.outputs.push_back(Output::Do(Step::Resume));
    }

    fn gathering(&mut self) -> Option<&mut Gathering> {
        match (&mut self.closing, &mut self.cut) {
            (Some(closing), _) => Some(&mut closing.gathering),
            (None, Some(cut)) => cut.gathering.as_mut(),
            (None, None) => None,
        }
    }

    /// The answer to [`Step::Pause`].
    pub fn handle_paused(&mut self, now: Now) {
        if !self.due.pause.came() {
            return;
        }
        if let Some(gathering) = self.gathering().filter(|it| it.paused.is_none()) {
            gathering.paused = Some(now);
        }
    }

    /// The answer to [`Step::Save`].
    pub fn handle_saved(&mut self, now: Now, records: Vec<StateRecord>) {
        if !self.due.save.came() {
            return;
        }
        let size: usize = records
            .iter()
            .map(|record| record.bytes.len() + record.kind.len() + 12)
            .sum();
        let Some(gathering) = self.gathering().filter(|it| it.saved.is_none()) else {
            return;
        };
        if records.len() > limits::RECORDS || size > limits::CLOSE_BYTES {
            return self.end_by(Fault::Host(format!(
                "the guest's state is {size} bytes in {} records",
                records.len()
            )));
        }
        gathering.state_bytes = Bytes::of_len(size);
        gathering.saved = Some(now);
        gathering.records = Some(records);
    }

    /// A harvest was answered while the guest stands still.
    pub(super) fn gathering_harvest(&mut self, now: Now) {
        let more = self.gathering().is_some_and(|gathering| gathering.harvested(now));
        self.harvesting = more;
        self.maybe_capture();
    }
}
