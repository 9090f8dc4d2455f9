//! The schedule of probes: one per period, with jitter. While a backend's health is about to change, the shorter period
//! applies.
//!
//! Each pair of backend and check has one task, even if several services use it. The task applies rise and fall for
//! every target, and reports each result together with the resulting health.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use breaker_core::{
    health::{Health, RiseFall},
    model::{Check, ServiceName, TierRole},
    probe::{ProbeLoad, ProbeReport, Target},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use super::{Prober, reports::Outbox};
use crate::{clock, metrics::Instruments, supervise::TaskThread};

/// The identity of a probe task. Services that check the same backend in the same way share one task.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Probe {
    backend: SocketAddr,
    check: Check,
}

/// All checks of an agent, in threads of their own: neither the main loop nor another task makes a probe late. The
/// threads end when this value is dropped.
#[derive(Debug)]
pub struct Checkers {
    /// At least one.
    threads: Vec<Thread>,
    steps: Arc<Steps>,
    reports: Outbox,
    instruments: Arc<Instruments>,
    running: HashMap<Arc<Probe>, Checker>,
    targets: BTreeMap<Target, Arc<Probe>>,
    epochs: BTreeMap<ServiceName, Epoch>,
}

/// A thread that makes probes.
#[derive(Debug)]
struct Thread {
    tasks: TaskThread,
    prober: Prober,
}

impl Thread {
    /// Starts a thread. `prober` is called in its runtime.
    fn start(prober: impl FnOnce() -> Prober) -> Result<Self> {
        let tasks = TaskThread::start("probes")?;
        let prober = {
            let _entered = tasks.handle().enter();
            prober()
        };
        Ok(Self { tasks, prober })
    }
}

/// Number of probes from which on all threads make probes. Fewer are cheaper on one of them, which wakes less often.
const MANY: usize = 2000;
/// Threads that make probes, at most.
const MOST_THREADS: usize = 4;

/// The epoch of a service's current state, for its probes to note when they begin.
type Epoch = Arc<AtomicU32>;

/// The engine's knowledge of a target at the start of its check.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Its health.
    pub health: Health,
    /// The epoch of its service's state.
    pub epoch: u32,
}

impl Checkers {
    /// Creates an empty set of checks. Results go to `reports`, and their durations to `instruments`.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(reports: Outbox, instruments: Arc<Instruments>) -> Result<Self> {
        let mut threads = vec![Thread::start(Prober::start)?];
        let count = std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
        while threads.len() < count {
            threads.push(Thread::start(|| threads[0].prober.for_this_thread())?);
        }
        Ok(Self {
            threads,
            steps: Arc::new(Steps::new()),
            reports,
            instruments,
            running: HashMap::new(),
            targets: BTreeMap::new(),
            epochs: BTreeMap::new(),
        })
    }

    /// How busy the probes are.
    #[must_use]
    pub fn load(&self) -> ProbeLoad {
        self.threads[0].prober.load()
    }

    /// Tells the probes of a service that its breaker has made a transition. Those under way do not count any more.
    pub fn begin_epoch(&self, service: &ServiceName, epoch: u32) {
        if let Some(known) = self.epochs.get(service) {
            known.store(epoch, Ordering::Relaxed);
        }
    }

    /// Starts checks that are new or changed, and stops checks that are not in `wanted`. `known` returns the health and
    /// the epoch with which a new target starts.
    pub fn set_targets(&mut self, wanted: BTreeMap<Target, Check>, known: impl Fn(&Target) -> Known) {
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
            let probe = self.running.get_key_value(&probe).map_or_else(|| Arc::new(probe.clone()), |(p, _)| p.clone());
            let number = self.running.len();
            let spread = start_spread(number, &probe.check);
            let checker = self.running.entry(probe.clone()).or_insert_with(|| {
                let (changes, changes_out) = mpsc::unbounded_channel();
                let thread = &self.threads[if number < MANY { 0 } else { number % self.threads.len() }];
                let means = Means {
                    steps: self.steps.clone(),
                    prober: thread.prober.clone(),
                    reports: self.reports.clone(),
                    instruments: self.instruments.clone(),
                };
                let task = thread.tasks.handle().spawn(run(probe.clone(), spread, changes_out, means));
                Checker { members: 0, changes, task }
            });
            checker.members += 1;
            let known = known(&target);
            let epoch = self.epochs.entry(target.service.clone()).or_default();
            epoch.store(known.epoch, Ordering::Relaxed);
            let _ = checker.changes.send(Change::Join(target.clone(), known.health, epoch.clone()));
            self.targets.insert(target, probe);
        }
        self.running.retain(|_, checker| checker.members > 0);
        self.steps.set_probes(self.running.len());
        let services: BTreeSet<&ServiceName> = self.targets.keys().map(|target| &target.service).collect();
        self.epochs.retain(|service, _| services.contains(service));
    }
}

/// A change of the targets that get a task's results.
#[derive(Debug)]
enum Change {
    Join(Target, Health, Epoch),
    Leave(Target),
}

/// The running task of one probe. The task ends when this value is dropped.
#[derive(Debug)]
struct Checker {
    members: usize,
    changes: mpsc::UnboundedSender<Change>,
    task: JoinHandle<()>,
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Longest delay of a first probe. It spreads the start of many checks: up to a hundred in the first 100 ms, more over
/// a longer time, but never over more than a period.
fn start_spread(running: usize, check: &Check) -> Duration {
    let by_number = Duration::from_micros(100).saturating_mul(u32::try_from(running).unwrap_or(u32::MAX));
    let short = Duration::from_millis(100).min(check.fast_period);
    short.max(by_number).min(check.period)
}

/// The times at which probes begin. Those that are due at nearly the same time begin together, so that a thread need not
/// wake for each of them. Where there are many probes, each wake-up has enough of them anyway.
#[derive(Debug)]
struct Steps {
    origin: Instant,
    /// Length of a step, in milliseconds.
    millis: AtomicU32,
}

impl Steps {
    fn new() -> Self {
        Self { origin: clock::instant(), millis: AtomicU32::new(10) }
    }

    fn set_probes(&self, count: usize) {
        self.millis.store(if count < MANY { 10 } else { 1 }, Ordering::Relaxed);
    }

    /// The first step that is not before `due`.
    fn next(&self, due: Instant) -> Instant {
        let step = Duration::from_millis(self.millis.load(Ordering::Relaxed).into()).as_nanos();
        let since = due.saturating_duration_since(self.origin).as_nanos();
        let rest = u64::try_from(since.next_multiple_of(step) - since).unwrap_or(0);
        due + Duration::from_nanos(rest)
    }
}

/// One target of a task's results.
struct Member {
    health: RiseFall,
    epoch: Epoch,
    /// The epoch in which the probe that is under way began.
    began: u32,
}

/// The parts of the agent that the task of a probe uses.
struct Means {
    steps: Arc<Steps>,
    prober: Prober,
    reports: Outbox,
    instruments: Arc<Instruments>,
}

async fn run(
    probe: Arc<Probe>,
    spread: Duration,
    mut changes: mpsc::UnboundedReceiver<Change>,
    Means { steps, prober, reports, instruments }: Means,
) {
    let Probe { backend, check } = &*probe;
    let mut members: BTreeMap<Target, Member> = BTreeMap::new();
    let soon = || clock::instant() + spread.mul_f64(fastrand::f64());
    let mut due = soon();
    loop {
        tokio::select! {
            change = changes.recv() => match change {
                None => return,
                Some(Change::Join(target, known, epoch)) => {
                    let health = RiseFall::starting(check.success_threshold, check.failure_threshold, known);
                    members.insert(target, Member { health, epoch, began: 0 });
                    // A target that joins later need not wait for a whole period.
                    due = due.min(soon());
                    continue;
                }
                Some(Change::Leave(target)) => {
                    members.remove(&target);
                    continue;
                }
            },
            () = sleep_until(steps.next(due)) => {}
        }
        let late = clock::instant().saturating_duration_since(due);
        prober.note_start(late);
        instruments.observe_lateness(late);
        for member in members.values_mut() {
            member.began = member.epoch.load(Ordering::Relaxed);
        }
        let result = prober.probe(check, *backend).await;
        if result.code.is_result() {
            let roles: BTreeSet<TierRole> = members.keys().map(|target| TierRole::of(target.tier)).collect();
            instruments.observe_check(&check.action, roles, result.duration);
        }
        for (target, Member { health, epoch, began }) in &mut members {
            let before = health.health();
            // A probe counts only in the state in which it began.
            if result.code.is_result() && epoch.load(Ordering::Relaxed) == *began {
                health.observe(result.code.passes());
            }
            let health = health.health();
            let report = ProbeReport { target: target.clone(), result: result.clone(), health, began: *began };
            let failed = result.code.is_result() && !result.code.passes();
            reports.send(report, health != before || (failed && health != Health::Down));
        }
        let fast = members.values().any(|member| member.health.in_transition());
        let period = if fast { check.fast_period } else { check.period };
        // The period counts from the time at which the last probe was due: a slow answer does not lengthen it, and a
        // probe that took longer than the period is followed by the next one at once.
        due = (due + jittered(period, check.jitter_percent, fastrand::f64())).max(clock::instant());
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
    fn probes_that_are_due_within_a_step_begin_together() {
        let steps = Steps::new();
        let ms = Duration::from_millis;
        let begins = |due: u64| steps.next(steps.origin + ms(due)) - steps.origin;
        for (due, expected) in [(0, 0), (1, 10), (9, 10), (10, 10), (1001, 1010)] {
            assert_eq!(begins(due), ms(expected), "{due}");
        }
        steps.set_probes(MANY);
        assert_eq!(begins(1001), ms(1001));
    }

    #[test]
    fn jitter_stays_within_its_part_of_the_period() {
        let period = Duration::from_secs(10);
        assert_eq!(jittered(period, 0, 0.7), period);
        assert_eq!(jittered(period, 20, 0.0), Duration::from_secs(8));
        assert_eq!(jittered(period, 20, 1.0), Duration::from_secs(12));
    }
}
