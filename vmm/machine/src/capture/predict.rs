//! Which way of capturing costs a guest least: a prediction, and nothing else.
//!
//! What is compared is the time a vCPU loses: all of a pause, and its share of the faults that protected pages cost after
//! it. Copying costs by the page, and more where the copy's own memory is new to this process; protecting costs by the
//! run of pages, and later a fault for each page that is written before it was copied behind the guest's back.
//!
//! What a step costs is measured once, in a moment, on memory that is not the guest's. So what each way really took of a
//! pause is [`Learned`], and the next prediction is corrected by it.

use std::time::Duration;

use umbra_core::guest::CaptureBy;

/// What each thing costs on this host, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Costs {
    /// Copying a page.
    pub(super) copy: f64,
    /// Copying it to memory that this process has to be given first, beyond that.
    pub(super) fresh: f64,
    /// Having helpers begin.
    pub(super) wake: f64,
    /// Protecting anything: a thread is woken that copies, and takes turns with the vCPUs.
    pub(super) protect: f64,
    /// Protecting a run of pages.
    pub(super) protect_run: f64,
    /// Each page of it.
    pub(super) protect_page: f64,
    /// A write to a protected page.
    pub(super) fault: f64,
}

/// What is to be captured, and by whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) pages: usize,
    /// Of them, pages whose copies have no memory yet.
    pub(super) fresh: usize,
    /// Runs of pages to be protected; `None` if they cannot be.
    pub(super) runs: Option<usize>,
    /// Threads that copy at once.
    pub(super) threads: usize,
    pub(super) vcpus: usize,
    /// How many pages the guest writes per second, any of which may be one of these.
    pub(super) written_per_second: u64,
}

/// What one way would cost each vCPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Way {
    pub(super) by: CaptureBy,
    /// Inside the pause, in nanoseconds, before it is corrected.
    pause: f64,
    /// The same, corrected by what was learned, and what is lost afterwards.
    total: f64,
}

impl Way {
    pub(super) fn total(&self) -> Duration {
        Duration::from_secs_f64(self.total / 1e9)
    }
}

/// How far predictions of pauses were off: what was taken, over what was predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Learned {
    copy: f64,
    parallel: f64,
    protect: f64,
}

impl Default for Learned {
    fn default() -> Self {
        Self {
            copy: 1.0,
            parallel: 1.0,
            protect: 1.0,
        }
    }
}

impl Learned {
    const fn of(&mut self, by: CaptureBy) -> &mut f64 {
        match by {
            CaptureBy::Copy => &mut self.copy,
            CaptureBy::ParallelCopy => &mut self.parallel,
            CaptureBy::Protect => &mut self.protect,
        }
    }

    /// This way took so long. What is not used is forgotten, little by little: it may have been a bad moment, and a way
    /// that is never taken again could not show that it is better than its name.
    pub(super) fn learn(&mut self, way: &Way, took: Duration) {
        // Beyond this a thread was not run at all for a while, which says nothing of the way.
        const MOST: f64 = 8.0;
        let off = (took.as_secs_f64() * 1e9 / way.pause.max(1.0)).clamp(1.0 / MOST, MOST);
        for by in [CaptureBy::Copy, CaptureBy::ParallelCopy, CaptureBy::Protect] {
            let factor = self.of(by);
            *factor += if by == way.by {
                (off - *factor) / 4.0
            } else {
                (1.0 - *factor) / 20.0
            };
        }
    }
}

/// What capturing would cost each vCPU, by every way there is. The first is the cheapest.
pub(super) fn predict(costs: &Costs, mut learned: Learned, task: &Task) -> Vec<Way> {
    let number = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    let (pages, threads) = (number(task.pages), number(task.threads.max(1)));
    let copying = pages.mul_add(costs.copy, number(task.fresh) * costs.fresh);
    let mut ways = Vec::new();
    let mut add = |by, pause: f64, after: f64| {
        ways.push(Way {
            by,
            pause,
            total: pause.mul_add(*learned.of(by), after),
        });
    };
    add(CaptureBy::Copy, copying, 0.0);
    if task.threads > 1 {
        // Threads share the host's memory bus and its locks: the second is not worth a whole one.
        const WORTH: f64 = 0.8;
        let together = 1.0 + (threads - 1.0) * WORTH;
        add(CaptureBy::ParallelCopy, costs.wake + copying / together, 0.0);
    }
    if let Some(runs) = task.runs {
        #[expect(clippy::cast_precision_loss, reason = "no guest writes 2^52 pages in a second")]
        let per_ns = task.written_per_second as f64 / 1e9;
        // A page can fault once.
        let faults = (per_ns * copying).min(pages);
        let lost = faults * costs.fault / number(task.vcpus.max(1));
        let protecting = costs.protect + number(runs).mul_add(costs.protect_run, pages * costs.protect_page);
        add(CaptureBy::Protect, protecting, lost);
    }
    ways.sort_by(|one, other| one.total.total_cmp(&other.total));
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    const COSTS: Costs = Costs {
        copy: 400.0,
        fresh: 600.0,
        wake: 60_000.0,
        protect: 30_000.0,
        protect_run: 1500.0,
        protect_page: 40.0,
        fault: 40_000.0,
    };

    const TASK: Task = Task {
        pages: 1000,
        fresh: 0,
        runs: Some(100),
        threads: 4,
        vcpus: 2,
        written_per_second: 1_000,
    };

    fn best(costs: Costs, task: Task) -> CaptureBy {
        predict(&costs, Learned::default(), &task)[0].by
    }

    #[test]
    fn few_pages_are_copied_by_one_thread() {
        let few = Task {
            pages: 50,
            runs: Some(50),
            ..TASK
        };
        assert_eq!(best(COSTS, few), CaptureBy::Copy);
    }

    #[test]
    fn more_are_copied_by_several_unless_there_is_one_thread_only() {
        let more = Task {
            pages: 2000,
            runs: Some(2000),
            ..TASK
        };
        assert_eq!(best(COSTS, more), CaptureBy::ParallelCopy);
        assert_eq!(best(COSTS, Task { threads: 1, ..more }), CaptureBy::Copy);
    }

    #[test]
    fn very_many_are_protected_unless_the_guest_writes_too_much_or_they_cannot_be() {
        let many = Task {
            pages: 200_000,
            runs: Some(500),
            ..TASK
        };
        assert_eq!(best(COSTS, many), CaptureBy::Protect);
        assert_eq!(best(COSTS, Task { runs: None, ..many }), CaptureBy::ParallelCopy);
        let busy = Task {
            written_per_second: 100_000,
            ..many
        };
        assert_eq!(best(COSTS, busy), CaptureBy::ParallelCopy);
        let dear = Costs {
            fault: 400_000.0,
            protect_run: 60_000.0,
            ..COSTS
        };
        assert_eq!(best(dear, many), CaptureBy::ParallelCopy);
    }

    #[test]
    fn a_prediction_is_what_its_parts_add_up_to() {
        let by = |by| {
            let ways = predict(&COSTS, Learned::default(), &Task { fresh: 100, ..TASK });
            ways.into_iter().find(|way| way.by == by).unwrap().total().as_nanos()
        };
        let copying = 1000 * 400 + 100 * 600;
        assert_eq!(by(CaptureBy::Copy), copying);
        assert_eq!(by(CaptureBy::ParallelCopy), 60_000 + copying * 10 / 34);
        // Half a fault is expected, and there are two vCPUs to bear it.
        assert_eq!(by(CaptureBy::Protect), 30_000 + 100 * 1500 + 1000 * 40 + 460 * 40 / 2);
    }

    #[test]
    fn a_way_that_took_longer_than_predicted_is_left_for_another_and_tried_again_later() {
        let many = Task {
            pages: 200_000,
            runs: Some(500),
            ..TASK
        };
        let mut learned = Learned::default();
        let best = |learned| predict(&COSTS, learned, &many)[0];
        let first = best(learned);
        assert_eq!(first.by, CaptureBy::Protect);
        let exact = Duration::from_secs_f64(first.pause / 1e9);
        learned.learn(&first, exact);
        assert_eq!(best(learned).by, CaptureBy::Protect);
        for _ in 0..8 {
            learned.learn(&first, exact * 20);
        }
        let second = best(learned);
        assert_ne!(second.by, CaptureBy::Protect);
        for _ in 0..100 {
            learned.learn(&second, Duration::from_secs_f64(second.pause / 1e9));
        }
        assert_eq!(best(learned).by, CaptureBy::Protect);
    }
}
