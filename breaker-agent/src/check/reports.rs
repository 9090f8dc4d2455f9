//! The way of results from the probes' thread to the main loop. A result that may change something wakes the loop at
//! once. Others wait for a moment, so that a thousand probes a second do not wake it a thousand times.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use breaker_core::probe::ProbeReport;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::clock;

/// How long a result that changes nothing may wait.
const BATCH: Duration = Duration::from_millis(50);
/// Results that wait, at most. Only a loop that hangs lets so many wait; results that change nothing are then dropped.
const MOST: usize = 65_536;

/// Creates both ends.
#[must_use]
pub fn channel() -> (Outbox, Inbox) {
    let shared = Arc::new(Shared::default());
    (Outbox { shared: shared.clone() }, Inbox { shared, due: None })
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    reports: Vec<ProbeReport>,
    urgent: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where probes leave their results.
#[derive(Clone, Debug)]
pub struct Outbox {
    shared: Arc<Shared>,
}

impl Outbox {
    /// Leaves a result. `urgent`: it may change something.
    pub fn send(&self, report: ProbeReport, urgent: bool) {
        let mut waiting = self.shared.lock();
        if !urgent && waiting.reports.len() >= MOST {
            return;
        }
        // The loop sleeps while nothing waits, and until the batch is due otherwise.
        let wake = waiting.reports.is_empty() || (urgent && !waiting.urgent);
        waiting.reports.push(report);
        waiting.urgent |= urgent;
        drop(waiting);
        if wake {
            self.shared.news.notify_one();
        }
    }
}

/// Where the main loop takes results.
#[derive(Debug)]
pub struct Inbox {
    shared: Arc<Shared>,
    /// When the batch that waits is due.
    due: Option<Instant>,
}

impl Inbox {
    /// Waits for results, and returns all of them, oldest first. Safe to cancel.
    pub async fn recv(&mut self) -> Vec<ProbeReport> {
        loop {
            let (urgent, empty) = {
                let waiting = self.shared.lock();
                (waiting.urgent, waiting.reports.is_empty())
            };
            if urgent {
                return self.take();
            }
            if empty {
                self.due = None;
                self.shared.news.notified().await;
                continue;
            }
            let due = *self.due.get_or_insert_with(|| clock::instant() + BATCH);
            tokio::select! {
                () = self.shared.news.notified() => {}
                () = sleep_until(due) => return self.take(),
            }
        }
    }

    fn take(&mut self) -> Vec<ProbeReport> {
        self.due = None;
        let mut waiting = self.shared.lock();
        waiting.urgent = false;
        std::mem::take(&mut waiting.reports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use breaker_core::{
        health::Health,
        model::ServiceName,
        probe::{CheckCode, ProbeResult, Target},
    };
    use tokio::time::timeout;

    fn report(detail: &str) -> ProbeReport {
        let service = ServiceName::new("a");
        ProbeReport {
            target: Target { service, tier: 0, backend: "10.0.0.1:80".parse().unwrap() },
            result: ProbeResult { code: CheckCode::L4Ok, detail: detail.into(), duration: Duration::ZERO },
            health: Health::Up,
            began: 0,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_matters_comes_at_once_with_all_that_waits() {
        let (outbox, mut inbox) = channel();
        assert!(timeout(Duration::from_secs(1), inbox.recv()).await.is_err(), "nothing waits");
        let started = clock::instant();
        outbox.send(report("one"), false);
        outbox.send(report("two"), false);
        assert_eq!(inbox.recv().await.len(), 2);
        assert_eq!(clock::instant() - started, BATCH);
        let started = clock::instant();
        outbox.send(report("three"), false);
        outbox.send(report("four"), true);
        let details: Vec<String> = inbox.recv().await.into_iter().map(|report| report.result.detail).collect();
        assert_eq!(details, ["three", "four"]);
        assert_eq!(clock::instant(), started);
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_not_postponed_by_a_loop_that_does_other_things() {
        let (outbox, mut inbox) = channel();
        outbox.send(report("one"), false);
        let started = clock::instant();
        let mut got = Vec::new();
        while got.is_empty() {
            if let Ok(batch) = timeout(Duration::from_millis(10), inbox.recv()).await {
                got = batch;
            }
        }
        assert!(clock::instant() - started <= BATCH + Duration::from_millis(10));
    }
}
