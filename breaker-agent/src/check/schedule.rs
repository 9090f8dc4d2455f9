//! When to probe: every period, with jitter, faster while a change is under way. One task a backend; it keeps the
//! rise and fall, and reports every result with the health that follows from it.

use std::{net::SocketAddr, time::Duration};

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

/// A running check of one backend; ends when dropped.
#[derive(Debug)]
pub struct Checker {
    check: Check,
    task: JoinHandle<()>,
}

impl Checker {
    /// Starts to check. The first probe comes at once, but for a little spread so that a thousand checks do not start
    /// in one moment. `known` is what is known of its health already.
    #[must_use]
    pub fn start(target: Target, check: Check, known: Health, prober: Prober, reports: mpsc::Sender<Report>) -> Self {
        let task = tokio::spawn(run(target, check.clone(), known, prober, reports));
        Self { check, task }
    }

    /// What it does.
    #[must_use]
    pub const fn check(&self) -> &Check {
        &self.check
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The most that a first probe is put off.
const START_SPREAD: Duration = Duration::from_millis(100);

async fn run(target: Target, check: Check, known: Health, prober: Prober, reports: mpsc::Sender<Report>) {
    let mut health = RiseFall::starting(check.success_threshold, check.failure_threshold, known);
    let mut due = Instant::now() + START_SPREAD.min(check.fast_period).mul_f64(fastrand::f64());
    loop {
        sleep_until(due).await;
        let started = Instant::now();
        let result = prober.probe(&check, target.backend).await;
        let flipped = health.observe(result.code.passes()).is_some();
        let report = Report { target: target.clone(), result, health: health.health(), flipped };
        if reports.send(report).await.is_err() {
            return;
        }
        let period = if health.in_transition() { check.fast_period } else { check.period };
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
