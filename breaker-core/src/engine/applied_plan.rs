//! The desired and the applied plan of one service: when to make a plan, when to write it, and when to retry.

use std::time::Duration;

use breaker_common::{BreakerState, SHARE_ALL};

use crate::{plan::ServicePlan, time::Instant};

/// How long after a failed write the next attempt is made.
pub(super) const RETRY: Duration = Duration::from_millis(200);

/// Whether the inputs of the plan have changed since it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PlanState {
    /// No input has changed: the same plan would result.
    Current,
    /// An input has changed.
    Outdated,
}

/// How the last write ended.
#[derive(Clone, Debug)]
enum LastWrite {
    /// It succeeded, or there was none yet.
    Succeeded,
    /// It failed: the maps may hold parts of the old plan and of the new one.
    Failed { error: String, retry_at: Instant },
}

/// Desired and applied plan of one service.
#[derive(Debug)]
pub(super) struct AppliedPlan {
    applied: Option<ServicePlan>,
    plan: PlanState,
    last_write: LastWrite,
    /// Failed writes since the agent started.
    pub failed_writes: u64,
}

impl AppliedPlan {
    /// Nothing was written yet.
    pub const fn new() -> Self {
        Self { applied: None, plan: PlanState::Outdated, last_write: LastWrite::Succeeded, failed_writes: 0 }
    }

    /// Records that an input of the plan changed.
    pub fn outdate(&mut self) {
        self.plan = PlanState::Outdated;
    }

    /// As [`AppliedPlan::outdate`], if `changed`.
    pub fn outdate_if(&mut self, changed: bool) {
        if changed {
            self.outdate();
        }
    }

    /// Returns `true` if the plan must be made again. `has_aged` tells whether time alone has made another one, as during a
    /// ramp.
    pub fn needs_plan(&self, has_aged: impl FnOnce(&ServicePlan) -> bool) -> bool {
        self.is_outdated() || self.applied.as_ref().is_none_or(has_aged)
    }

    /// Whether an input changed since the last successful write.
    pub fn is_outdated(&self) -> bool {
        self.plan == PlanState::Outdated
    }

    /// Whether `plan` needs a new epoch, so that flows that were decided in the current epoch do not keep their
    /// decision. While open, other backups are in use: a backup is usable again, or a preferred one is. While closed, the ramp ends, and the flows went to the backup because of the ramp.
    pub fn needs_new_epoch(&self, plan: &ServicePlan) -> bool {
        let Some(before) = self.applied.as_ref().filter(|before| before.decision.epoch == plan.decision.epoch) else {
            return false;
        };
        match plan.decision.state {
            BreakerState::Closed => before.decision.share < SHARE_ALL && plan.decision.share >= SHARE_ALL,
            BreakerState::Open => {
                let backends = plan.backends();
                !backends.is_empty() && before.backends().is_disjoint(&backends)
            }
            // An epoch has a budget of half-open connections; a new epoch would grant it a second time.
            BreakerState::HalfOpen => false,
        }
    }

    /// Whether `plan` has to be written now.
    pub fn needs_write(&mut self, now: Instant, plan: &ServicePlan) -> bool {
        match &self.last_write {
            LastWrite::Succeeded if self.applied.as_ref() == Some(plan) => {
                self.plan = PlanState::Current;
                false
            }
            LastWrite::Succeeded => true,
            LastWrite::Failed { retry_at, .. } => now >= *retry_at,
        }
    }

    /// Records a successful write. Returns whether the write before it had failed.
    pub fn succeeded(&mut self, plan: ServicePlan) -> bool {
        self.applied = Some(plan);
        self.plan = PlanState::Current;
        matches!(std::mem::replace(&mut self.last_write, LastWrite::Succeeded), LastWrite::Failed { .. })
    }

    /// Records a failed write. Returns whether it is the first one in a row.
    pub fn failed(&mut self, now: Instant, error: String) -> bool {
        self.failed_writes += 1;
        let failed = LastWrite::Failed { error, retry_at: now + RETRY };
        matches!(std::mem::replace(&mut self.last_write, failed), LastWrite::Succeeded)
    }

    /// The plan that was written last.
    pub const fn applied(&self) -> Option<&ServicePlan> {
        self.applied.as_ref()
    }

    /// Whether the maps hold exactly the applied plan.
    pub fn is_in_force(&self) -> bool {
        self.applied.is_some() && self.error().is_none()
    }

    /// Why the last write failed.
    pub fn error(&self) -> Option<&str> {
        match &self.last_write {
            LastWrite::Succeeded => None,
            LastWrite::Failed { error, .. } => Some(error),
        }
    }

    /// When the next attempt is due.
    pub const fn retry_at(&self) -> Option<Instant> {
        match &self.last_write {
            LastWrite::Succeeded => None,
            LastWrite::Failed { retry_at, .. } => Some(*retry_at),
        }
    }

    /// Whether the breaker is closed in the plan that was written last.
    pub fn is_closed_in_maps(&self) -> bool {
        self.applied.as_ref().is_some_and(|plan| plan.decision.state == BreakerState::Closed)
    }
}
