//! Counts of what happened to one service since this agent first saw it. The counters of connections and packets are
//! in the maps instead, because they outlive the agent.

use std::{collections::BTreeMap, time::Duration};

use breaker_common::{BreakerState, StateReason};

use crate::{
    breaker::Transition,
    model::{Check, Service, TierRole},
    probe::{CheckCode, ProbeResult},
};

/// Counts of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Transitions to each state, by the state's number.
    pub transitions: [u64; BreakerState::ALL.len()],
    /// Transitions to open, by reason.
    pub trips: BTreeMap<StateReason, u64>,
    /// Probes of the primary, and of all backups together.
    pub probes: [ProbeTally; 2],
}

/// Counts of the probes of one role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeTally {
    /// Probes by result. Probes without a result are not included.
    pub by_code: BTreeMap<CheckCode, u64>,
    /// Time that the probes in `by_code` took, all together.
    pub time: Duration,
}

impl Tally {
    pub(super) fn count_transition(&mut self, transition: Transition) {
        self.transitions[transition.to as usize] += 1;
        if transition.to == BreakerState::Open {
            *self.trips.entry(transition.reason).or_default() += 1;
        }
    }

    pub(super) fn count_probe(&mut self, tier: usize, result: &ProbeResult) {
        let tally = &mut self.probes[usize::from(TierRole::of(tier) == TierRole::Backup)];
        *tally.by_code.entry(result.code).or_default() += 1;
        tally.time += result.duration;
    }

    /// Begins anew to count the probes of a role whose check is now another one: their codes and times cannot be
    /// compared with those of the earlier check.
    pub(super) fn reconfigure(&mut self, old: &Service, new: &Service) {
        let checks = |service: &Service, role: TierRole| -> Vec<Option<Check>> {
            let of_role = service.tiers().enumerate().filter(move |(tier, _)| TierRole::of(*tier) == role);
            of_role.map(|(_, tier)| tier.check.clone()).collect()
        };
        for (tally, role) in self.probes.iter_mut().zip([TierRole::Primary, TierRole::Backup]) {
            if checks(old, role) != checks(new, role) {
                *tally = ProbeTally::default();
            }
        }
    }
}
