//! Which way of capturing costs a guest least: a prediction, and nothing else.
//!
//! What is compared is the time a vCPU loses: all of a pause, and its share of the faults that protected pages cost after
//! it. Copying costs by the page, and more where the copy's own memory is new to this process; protecting costs by the
//! run of pages, and later a fault for each page that is written before it was copied behind the guest's back.

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

/// What capturing would cost each vCPU, by every way there is. The first is the cheapest.
pub(super) fn predict(costs: &Costs, task: &Task) -> Vec<(CaptureBy, Duration)> {
    let number = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    let (pages, threads) = (number(task.pages), number(task.threads.max(1)));
    let copying = pages.mul_add(costs.copy, number(task.fresh) * costs.fresh);
    let mut ways = vec![(CaptureBy::Copy, copying)];
    if task.threads > 1 {
        // Threads share the host's memory bus and its locks: the second is not worth a whole one.
        const WORTH: f64 = 0.8;
        let together = 1.0 + (threads - 1.0) * WORTH;
        ways.push((CaptureBy::ParallelCopy, costs.wake + copying / together));
    }
    if let Some(runs) = task.runs {
        #[expect(clippy::cast_precision_loss, reason = "no guest writes 2^52 pages in a second")]
        let per_ns = task.written_per_second as f64 / 1e9;
        // A page can fault once.
        let faults = (per_ns * copying).min(pages);
        let lost = faults * costs.fault / number(task.vcpus.max(1));
        let protecting = costs.protect + number(runs).mul_add(costs.protect_run, pages * costs.protect_page);
        ways.push((CaptureBy::Protect, protecting + lost));
    }
    ways.sort_by(|(_, one), (_, other)| one.total_cmp(other));
    ways.into_iter()
        .map(|(by, ns)| (by, Duration::from_secs_f64(ns / 1e9)))
        .collect()
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
        predict(&costs, &task)[0].0
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
        let by = |way| {
            let ways = predict(&COSTS, &Task { fresh: 100, ..TASK });
            ways.into_iter().find(|(by, _)| *by == way).unwrap().1.as_nanos()
        };
        let copying = 1000 * 400 + 100 * 600;
        assert_eq!(by(CaptureBy::Copy), copying);
        assert_eq!(by(CaptureBy::ParallelCopy), 60_000 + copying * 10 / 34);
        // Half a fault is expected, and there are two vCPUs to bear it.
        assert_eq!(by(CaptureBy::Protect), 30_000 + 100 * 1500 + 1000 * 40 + 460 * 40 / 2);
    }
}
