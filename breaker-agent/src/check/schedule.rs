//! The schedule of probes: one per period, with jitter. While a backend's health is about to change, the shorter period
//! applies.
//!
//! Each pair of backend and check has one task, even if several services use it. The task applies rise and fall for
//! every target, and reports each result together with the resulting health.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::Duration,
};

use breaker_core::{
    health::{Health, RiseFall},
    model::Check,
    probe::{ProbeReport, Target},
};
use tokio::{sync::mpsc, task::JoinHandle, time::sleep_until};

use super::Prober;
use crate::clock;

/// The identity of a probe task. Services that check the same backend in the same way share one task.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Probe {
    backend: SocketAddr,
    check: Check,
}

/// All checks of an agent. Their tasks end when this value is dropped.
#[derive(Debug)]
pub struct Checkers {
    prober: Prober,
    reports: mpsc::Sender<ProbeReport>,
    running: HashMap<Probe, Checker>,
    targets: BTreeMap<Target, Probe>,
}

impl Checkers {
    /// Creates an empty set of checks. Results are sent to `reports`.
    #[must_use]
    pub fn new(reports: mpsc::Sender<ProbeReport>) -> Self {
        Self { prober: Prober::default(), reports, running: HashMap::new(), targets: BTreeMap::new() }
    }

    /// Starts checks that are new or changed, and stops checks that are not in `wanted`. `known` returns the health
    /// with which a new target starts.
    pub fn set_targets(&mut self, wanted: BTreeMap<Target, Check>, known: impl Fn(&Target) -> Health) {
        let old = std::mem::take(&mut self.targets);
        for (target, probe) in old {
            let stays = wanted.get(&target) == Some(&probe.check);
            if stays {
                self.targets.insert(target, probe);
            } else if let Some(checker) = self.running.get_mut(&probe) {
                checker.members -= 1;
                // `send` fails only if the task has ended. A task that has ended needs no message.
                let _ = checker.changes.send(Change::Leave(target));
            }
        }
        for (target, check) in wanted {
            if self.targets.contains_key(&target) {
                continue;
            }
            let probe = Probe { backend: target.backend, check };
            let checker = self
                .running
                .entry(probe.clone())
                .or_insert_with(|| Checker::start(probe.clone(), self.prober.clone(), self.reports.clone()));
            checker.members += 1;
            let _ = checker.changes.send(Change::Join(target.clone(), known(&target)));
            self.targets.insert(target, probe);
        }
        self.running.retain(|_, checker| checker.members > 0);
    }
}

/// A change of the targets that get a task's results.
#[derive(Debug)]
enum Change {
    Join(Target, Health),
    Leave(Target),
}

/// The running task of one probe. The task ends when this value is dropped.
#[derive(Debug)]
struct Checker {
    members: usize,
    changes: mpsc::UnboundedSender<Change>,
    task: JoinHandle<()>,
}

impl Checker {
    fn start(probe: Probe, prober: Prober, reports: mpsc::Sender<ProbeReport>) -> Self {
        let (changes, changes_out) = mpsc::unbounded_channel();
        let task = tokio::spawn(run(probe, changes_out, prober, reports));
        Self { members: 0, changes, task }
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Longest delay of a first probe. It spreads the start of many checks.
const START_SPREAD: Duration = Duration::from_millis(100);

async fn run(
    Probe { backend, check }: Probe,
    mut changes: mpsc::UnboundedReceiver<Change>,
    prober: Prober,
    reports: mpsc::Sender<ProbeReport>,
) {
    let mut members: BTreeMap<Target, RiseFall> = BTreeMap::new();
    let soon = || clock::instant() + START_SPREAD.min(check.fast_period).mul_f64(fastrand::f64());
    let mut due = soon();
    loop {
        tokio::select! {
            change = changes.recv() => match change {
                None => return,
                Some(Change::Join(target, known)) => {
                    members.insert(target, RiseFall::starting(check.success_threshold, check.failure_threshold, known));
                    // A target that joins later need not wait for a whole period.
                    due = due.min(soon());
                    continue;
                }
                Some(Change::Leave(target)) => {
                    members.remove(&target);
                    continue;
                }
            },
            () = sleep_until(due) => {}
        }
        let started = clock::instant();
        let result = prober.probe(&check, backend).await;
        for (target, health) in &mut members {
            health.observe(result.code.passes());
            let report = ProbeReport { target: target.clone(), result: result.clone(), health: health.health() };
            if reports.send(report).await.is_err() {
                return;
            }
        }
        let fast = members.values().any(RiseFall::in_transition);
        let period = if fast { check.fast_period } else { check.period };
        // The period counts from the start of the last probe: a slow answer does not lengthen it, and a probe that
        // took longer than the period is followed by the next one at once.
        due = started + jittered(period, check.jitter_percent, fastrand::f64());
    }
}

/// Shortens or lengthens a period by up to `percent`. `unit` is a random number from 0 to 1.
fn jittered(period: Duration, percent: u8, unit: f64) -> Duration {
    let span = f64::from(percent) / 100.0;
    period.mul_f64(1.0 - span + 2.0 * span * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_within_its_part_of_the_period() {
        let period = Duration::from_secs(10);
        assert_eq!(jittered(period, 0, 0.7), period);
        assert_eq!(jittered(period, 20, 0.0), Duration::from_secs(8));
        assert_eq!(jittered(period, 20, 1.0), Duration::from_secs(12));
    }
}
