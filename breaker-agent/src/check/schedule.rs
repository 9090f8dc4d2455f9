//! When to probe: every period, with jitter, faster while a change is under way. One task for a backend and a check,
//! however many services want to know; it keeps each one's rise and fall, and reports every result with the health that
//! follows from it.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::Duration,
};

use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{ProbeResult, Prober};
use crate::{
    health::{Health, RiseFall},
    model::{Check, ServiceName},
};

/// Whom a probe is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The service.
    pub service: ServiceName,
    /// 0 = the primary, then the backups.
    pub tier: usize,
    /// The backend.
    pub backend: SocketAddr,
}

/// A probe's result and what it makes of the backend's health.
#[derive(Clone, Debug)]
pub struct Report {
    /// Whom it is about.
    pub target: Target,
    /// What came of it.
    pub result: ProbeResult,
    /// The health by now.
    pub health: Health,
    /// Whether this result changed it.
    pub flipped: bool,
}

/// What a probe is: services that check the same backend in the same way share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Probe {
    backend: SocketAddr,
    check: Check,
}

/// All checks of an agent. They end when it is dropped.
#[derive(Debug)]
pub struct Checkers {
    prober: Prober,
    reports: mpsc::Sender<Report>,
    running: HashMap<Probe, Checker>,
    targets: BTreeMap<Target, Probe>,
}

impl Checkers {
    /// None yet. Results go to `reports`.
    #[must_use]
    pub fn new(reports: mpsc::Sender<Report>) -> Self {
        Self { prober: Prober::default(), reports, running: HashMap::new(), targets: BTreeMap::new() }
    }

    /// Starts checks that are new or different, ends those that are not wanted any more. `known` tells what is known of a
    /// target's health already.
    pub fn want(&mut self, wanted: BTreeMap<Target, Check>, known: impl Fn(&Target) -> Health) {
        let old = std::mem::take(&mut self.targets);
        for (target, probe) in old {
            let stays = wanted.get(&target) == Some(&probe.check);
            if stays {
                self.targets.insert(target, probe);
            } else if let Some(checker) = self.running.get_mut(&probe) {
                checker.members -= 1;
                // A task that has ended wants nothing.
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

/// Who wants a probe's results.
#[derive(Debug)]
enum Change {
    Join(Target, Health),
    Leave(Target),
}

/// A running check of one backend; ends when dropped.
#[derive(Debug)]
struct Checker {
    members: usize,
    changes: mpsc::UnboundedSender<Change>,
    task: JoinHandle<()>,
}

impl Checker {
    fn start(probe: Probe, prober: Prober, reports: mpsc::Sender<Report>) -> Self {
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

/// The most that a first probe is put off, so that a thousand checks do not start in one moment.
const START_SPREAD: Duration = Duration::from_millis(100);

async fn run(
    Probe { backend, check }: Probe,
    mut changes: mpsc::UnboundedReceiver<Change>,
    prober: Prober,
    reports: mpsc::Sender<Report>,
) {
    let mut members: BTreeMap<Target, RiseFall> = BTreeMap::new();
    let soon = || Instant::now() + START_SPREAD.min(check.fast_period).mul_f64(fastrand::f64());
    let mut due = soon();
    loop {
        tokio::select! {
            change = changes.recv() => match change {
                None => return,
                Some(Change::Join(target, known)) => {
                    members.insert(target, RiseFall::starting(check.success_threshold, check.failure_threshold, known));
                    // Whoever comes later need not wait for a whole period.
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
        let started = Instant::now();
        let result = prober.probe(&check, backend).await;
        for (target, health) in &mut members {
            let flipped = health.observe(result.code.passes()).is_some();
            let report = Report { target: target.clone(), result: result.clone(), health: health.health(), flipped };
            if reports.send(report).await.is_err() {
                return;
            }
        }
        let fast = members.values().any(RiseFall::in_transition);
        let period = if fast { check.fast_period } else { check.period };
        // Counted from the start of the last probe: a slow answer does not stretch the period, and a probe that took
        // longer than the period is followed at once.
        due = started + jittered(period, check.jitter_percent, fastrand::f64());
    }
}

/// `unit` is a random number in 0..1.
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
