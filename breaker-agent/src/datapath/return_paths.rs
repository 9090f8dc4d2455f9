//! Interfaces whose clients do not get the answers of backups: given up for a time, one service at a time.
//!
//! The programs count, for each pair of interface and service, redirected connection attempts whose answer passed the
//! programs, and repetitions of those whose answer did not (see [`ReturnPath`]). When missing answers are the rule, the
//! way back bypasses the programs, or the backup does not answer these clients. In both cases kube-proxy serves them
//! better. The agent then suspends redirection there, and tries again later.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use breaker_common::{ReturnPath, ReturnPathKey};
use breaker_core::model::ServiceName;

use super::KernelDatapath;

/// Number of repeated attempts from which on missing answers may be the rule. Clients repeat an attempt after 1 s, 3 s
/// and 7 s.
const MOST_UNANSWERED: u32 = 5;
/// The same after a suspension: the trial has failed.
const MOST_UNANSWERED_IN_TRIAL: u32 = 2;
/// Answers after which an interface that was suspended is trusted as before.
const ANSWERS_TO_RECOVER: u32 = 5;
/// How long the first suspension lasts; each further one lasts twice as long.
const FIRST_SUSPENSION: Duration = Duration::from_secs(60);
/// The longest suspension.
const LONGEST_SUSPENSION: Duration = Duration::from_secs(15 * 60);
/// How often the counts are halved, so that old evidence fades.
const HALF_LIFE: Duration = Duration::from_secs(30);

/// What is known about one interface and service.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    /// When the current suspension ends; `None` if there is none.
    suspended_until: Option<Duration>,
    /// Suspensions in a row.
    strikes: u32,
    /// When the counts were halved last.
    halved_at: Duration,
}

/// What the agent does after it has read an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing.
    Leave,
    /// Replaces the entry.
    Write(ReturnPath),
    /// Leaves the interface's new connections to kube-proxy for this long.
    Suspend(Duration),
    /// Redirects again.
    Resume,
}

impl Watched {
    /// Decides about an entry that was just read. `now`: time on the engine's clock.
    fn step(&mut self, now: Duration, path: ReturnPath) -> Step {
        if let Some(until) = self.suspended_until {
            if now < until {
                return Step::Leave;
            }
            self.suspended_until = None;
            self.halved_at = now;
            return Step::Resume;
        }
        let most = if self.strikes == 0 { MOST_UNANSWERED } else { MOST_UNANSWERED_IN_TRIAL };
        if path.unanswered >= most && path.is_doubtful() {
            let duration = (FIRST_SUSPENSION * 2_u32.saturating_pow(self.strikes.min(8))).min(LONGEST_SUSPENSION);
            self.strikes += 1;
            self.suspended_until = Some(now + duration);
            return Step::Suspend(duration);
        }
        if path.answered >= ANSWERS_TO_RECOVER && !path.is_doubtful() {
            self.strikes = 0;
        }
        if now < self.halved_at + HALF_LIFE || path.answered + path.unanswered == 0 {
            return Step::Leave;
        }
        self.halved_at = now;
        Step::Write(ReturnPath { answered: path.answered / 2, unanswered: path.unanswered / 2, suspended: 0, pad: 0 })
    }
}

/// The watched pairs of interface and service.
#[derive(Debug, Default)]
pub(super) struct ReturnPaths(BTreeMap<ReturnPathKey, Watched>);

/// A pair of interface and service that was suspended, or is redirected again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReturnPathChange {
    /// Index of the interface.
    pub interface: u32,
    /// The service.
    pub service: ServiceName,
    /// Answers that were seen, and repeated attempts without one, lately.
    pub counts: (u32, u32),
    /// How long new connections are left to kube-proxy; `None`: they are redirected again.
    pub suspended_for: Option<Duration>,
}

/// A pair of interface and service whose new connections are left to kube-proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuspendedPath {
    /// Index of the interface.
    pub interface: u32,
    /// The service.
    pub service: ServiceName,
    /// When the next trial begins, on the engine's clock.
    pub until: Duration,
}

impl KernelDatapath {
    /// Reads what the programs counted, suspends pairs of interface and service without answers, and ends suspensions
    /// that are over. `now`: time on the engine's clock. `exists`: whether an interface exists.
    ///
    /// # Errors
    /// The map cannot be read or written.
    pub fn watch_return_paths(&mut self, now: Duration, exists: impl Fn(u32) -> bool) -> Result<Vec<ReturnPathChange>> {
        let names = self.names();
        let entries: Vec<(ReturnPathKey, ReturnPath)> = self.maps.return_paths.iter().flatten().collect();
        let known: BTreeMap<ReturnPathKey, ReturnPath> = entries.into_iter().collect();
        self.return_paths.0.retain(|key, _| known.contains_key(key));
        let mut changes = Vec::new();
        for (key, path) in known {
            let Some(service) = names.get(&key.service).filter(|_| exists(key.interface)) else {
                self.forget_return_path(&key);
                continue;
            };
            let fresh = || Watched {
                // An earlier agent suspended it; when is not known.
                suspended_until: (path.suspended != 0).then_some(now + FIRST_SUSPENSION),
                strikes: u32::from(path.suspended != 0),
                halved_at: now,
            };
            let watched = self.return_paths.0.entry(key).or_insert_with(fresh);
            let (value, suspended_for) = match watched.step(now, path) {
                Step::Leave => continue,
                Step::Write(value) => (value, None),
                Step::Suspend(duration) => (ReturnPath { suspended: 1, ..path }, Some(duration)),
                Step::Resume => (ReturnPath::default(), None),
            };
            self.maps.return_paths.insert(key, value, 0).context("write a return path")?;
            if suspended_for.is_some() || path.suspended != 0 {
                let counts = (path.answered, path.unanswered);
                changes.push(ReturnPathChange {
                    interface: key.interface,
                    service: service.clone(),
                    counts,
                    suspended_for,
                });
            }
        }
        Ok(changes)
    }

    /// The pairs of interface and service whose new connections are left to kube-proxy now.
    #[must_use]
    pub fn suspended_paths(&self) -> Vec<SuspendedPath> {
        let names = self.names();
        let suspended = self.return_paths.0.iter().filter_map(|(key, watched)| {
            let service = names.get(&key.service)?.clone();
            Some(SuspendedPath { interface: key.interface, service, until: watched.suspended_until? })
        });
        suspended.collect()
    }

    /// Forgets what was counted for a service that leaves: its index may belong to another one next.
    pub(super) fn remove_return_paths_of(&mut self, service: u32) {
        let of_service = |key: &ReturnPathKey| key.service == service;
        let keys: Vec<ReturnPathKey> = self.maps.return_paths.keys().flatten().filter(of_service).collect();
        keys.iter().for_each(|key| self.forget_return_path(key));
    }

    fn forget_return_path(&mut self, key: &ReturnPathKey) {
        self.return_paths.0.remove(key);
        // It may be gone already.
        let _ = self.maps.return_paths.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(answered: u32, unanswered: u32) -> ReturnPath {
        ReturnPath { answered, unanswered, ..ReturnPath::default() }
    }

    #[test]
    fn missing_answers_suspend_only_where_they_are_the_rule() {
        let now = Duration::from_secs(100);
        let step = |path| Watched { halved_at: now, ..Watched::default() }.step(now, path);
        assert_eq!(step(path(0, 4)), Step::Leave, "too few to tell");
        assert_eq!(step(path(0, 5)), Step::Suspend(FIRST_SUSPENSION));
        assert_eq!(step(path(8, 5)), Step::Suspend(FIRST_SUSPENSION), "one of several next hops");
        assert_eq!(step(path(20, 5)), Step::Leave, "lost packets, a slow backup");
        assert_eq!(step(path(ReturnPath::ENOUGH, 200)), Step::Leave);
    }

    #[test]
    fn a_suspension_ends_with_a_trial_and_lasts_longer_each_time() {
        let mut watched = Watched::default();
        let mut now = Duration::from_secs(1);
        let mut lengths = Vec::new();
        for _ in 0..6 {
            let Step::Suspend(length) = watched.step(now, path(0, 5)) else { panic!("{watched:?}") };
            lengths.push(length.as_secs());
            assert_eq!(watched.step(now + length - Duration::from_secs(1), path(0, 5)), Step::Leave);
            now += length;
            assert_eq!(watched.step(now, path(0, 5)), Step::Resume);
            assert_eq!(watched.step(now, path(0, 1)), Step::Leave, "one lost packet is no failed trial");
        }
        assert_eq!(lengths, [60, 120, 240, 480, 900, 900]);
        assert_eq!(watched.step(now, path(5, 0)), Step::Leave);
        assert_eq!(watched.strikes, 0, "answers are back");
    }

    #[test]
    fn old_evidence_fades() {
        let mut watched = Watched::default();
        assert_eq!(watched.step(HALF_LIFE / 2, path(10, 3)), Step::Leave, "doubtful, but too few");
        assert_eq!(watched.step(HALF_LIFE, path(13, 3)), Step::Write(path(6, 1)));
        assert_eq!(watched.step(HALF_LIFE, path(6, 1)), Step::Leave);
        assert_eq!(watched.step(HALF_LIFE * 2, path(0, 0)), Step::Leave, "nothing to fade");
    }
}
