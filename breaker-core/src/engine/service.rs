//! One protected service at run time: its breaker, its backends, its epoch, and the plan that follows from them.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use breaker_common::{BreakerState, SHARE_ALL, StateReason};

use super::{
    applied_plan::AppliedPlan,
    backends::{Tiers, backup_addresses},
    established::EstablishedCounts,
    limit_watch::LimitWatch,
    tally::Tally,
    tracking::{DrainingFrontends, RemovedBackends, Tracking},
};
use crate::{
    breaker::{Breaker, Restored, Transition},
    datapath::Adopted,
    model::{EstablishedPolicy, Frontend, Override, Protocol, Service},
    plan::{Decision, ServicePlan},
    pool::TierHealth,
    time::{Instant, Now, UnixNanos, elapsed},
};

/// How long the first pods of a new service may fail their checks before that counts.
const FIRST_START: Duration = Duration::from_secs(10);

/// Whether a service is still configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifecycle {
    /// It is in the configuration.
    Configured,
    /// It left the configuration. It stays, closed, until its flows on backups have ended.
    Leaving,
}

/// The facts about the override that the breaker itself does not keep.
#[derive(Clone, Copy, Debug)]
pub(super) struct OperatorOverride {
    /// When it ends; `None` = never, or there is none.
    pub until_unix_ns: Option<UnixNanos>,
    /// The configuration's override at the last call of [`ServiceState::override_change`].
    configured: Override,
}

/// A change of the override.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OverrideChange {
    /// The override that holds from now on.
    pub wanted: Override,
    /// Whether its time limit ran out.
    pub expired: bool,
}

/// The state of one service.
#[derive(Debug)]
pub(super) struct ServiceState {
    pub service: Arc<Service>,
    pub breaker: Breaker,
    pub tiers: Tiers,
    pub epoch: u32,
    /// The epoch that began with the last transition of the breaker. A probe that began in another one is late.
    pub state_epoch: u32,
    /// Probes without a result since the service was first seen.
    pub local_errors: u64,
    /// When the breaker entered its state.
    pub since_unix_ns: UnixNanos,
    /// When a drain ends that began when the breaker last opened or closed. A trial in between does not begin it anew.
    drain_end: Instant,
    pub message: String,
    /// Whether the primary has been Up since the service was first seen, as far as this agent knows.
    pub was_up: bool,
    /// When the primary first had a backend.
    first_backend: Option<Instant>,
    pub operator: OperatorOverride,
    pub lifecycle: Lifecycle,
    pub tracking: Tracking,
    /// Live flows on backups at the last sweep.
    pub flows: usize,
    pub draining_frontends: DrainingFrontends,
    pub removed_backends: RemovedBackends,
    pub sync: AppliedPlan,
    pub limit_watch: LimitWatch,
    /// The established connections of the tiers that the service has left: of the primary, and of the backup.
    pub established: [Option<EstablishedCounts>; 2],
    pub tally: Tally,
}

impl ServiceState {
    /// Creates a service that enters the configuration. `adopted`: its state as an earlier agent left it in the maps.
    pub fn new(now: Now, service: Arc<Service>, adopted: Option<&Adopted>) -> Self {
        // FNV-1a: a seed of its own for each service, the same after a restart.
        let seed = service.name.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let policy = service.breaker.clone();
        let (breaker, epoch, since_unix_ns, until_unix_ns) = match adopted {
            None => (Breaker::new(policy, seed, now.mono), 1, now.unix_ns, None),
            Some(was) => {
                let age = elapsed(was.since_unix_ns, now.unix_ns);
                let restored = Restored { state: was.state, reason: was.reason, age, trips: was.trips };
                let mut breaker = Breaker::restore(policy, seed, now.mono, restored);
                // The state is restored already, so the override changes nothing now.
                let _ = breaker.set_override(now.mono, was.override_.0, false);
                (breaker, was.epoch, was.since_unix_ns, Some(was.override_.1).filter(|until| *until > 0))
            }
        };
        // Backends to which an earlier agent sent connections count as Up until a probe decides. Otherwise new
        // connections would go back to a failed primary in the meantime.
        let tiers = Tiers::new(&service, |backend| {
            adopted.is_some_and(|a| service.addresses(backend.address).any(|b| a.backup.contains(&b)))
        });
        Self {
            operator: OperatorOverride { until_unix_ns, configured: service.override_ },
            breaker,
            tiers,
            epoch,
            state_epoch: epoch,
            local_errors: 0,
            since_unix_ns,
            drain_end: now.mono + service.drain.saturating_sub(elapsed(since_unix_ns, now.unix_ns)),
            first_backend: None,
            was_up: adopted.is_some_and(|was| (was.state, was.reason) != (BreakerState::Closed, StateReason::Initial)),
            message: if adopted.is_some() { "adopted from an earlier agent".into() } else { String::new() },
            lifecycle: Lifecycle::Configured,
            // Flows of an earlier agent, or of a service that had these frontends before, may be alive.
            tracking: Tracking::Active { since: Some(now.mono) },
            flows: 0,
            draining_frontends: DrainingFrontends::default(),
            removed_backends: RemovedBackends::new(adopted.is_some()),
            sync: AppliedPlan::new(),
            limit_watch: LimitWatch::default(),
            established: [None; 2],
            tally: Tally::default(),
            service,
        }
    }

    /// Creates a service that an earlier agent left in the maps and that is not configured any more. It leaves at
    /// once.
    pub fn orphan(now: Now, adopted: &Adopted) -> Self {
        let service = Service { frontends: adopted.frontends.clone(), ..Service::empty(adopted.name.clone()) };
        let mut state = Self {
            lifecycle: Lifecycle::Leaving,
            // Its backends are unknown: all its flows go on until they end.
            removed_backends: RemovedBackends::new(false),
            ..Self::new(now, Arc::new(service), Some(adopted))
        };
        state.new_epoch();
        state
    }

    /// Takes over a changed configuration of the service.
    pub fn reconfigure(&mut self, now: Now, service: Arc<Service>) {
        if self.service == service {
            // The source of the configuration holds the new one as well.
            self.service = service;
            return;
        }
        self.sync.outdate();
        self.breaker.set_policy(service.breaker.clone());
        self.tiers.reconfigure(now, &service);
        self.tally.reconfigure(&self.service, &service);
        self.removed_backends.update(&backup_addresses(&self.service), &backup_addresses(&service));
        // Flows that the new configuration would not track must still be translated until they end.
        self.tracking = Tracking::Active { since: Some(now.mono) };
        self.drain_end = (self.drain_end + service.drain).saturating_sub(self.service.drain);
        let before = std::mem::replace(&mut self.service, service);
        self.drain_frontends(before.frontends.clone());
    }

    /// Begins to leave: the service is not in the configuration any more.
    pub fn leave(&mut self, now: Now) {
        self.lifecycle = Lifecycle::Leaving;
        self.sync.outdate();
        self.new_epoch();
        self.tracking = Tracking::Active { since: Some(now.mono) };
    }

    /// Marks the service as configured. If it was leaving, it stays.
    pub fn stay(&mut self) {
        self.sync.outdate_if(self.lifecycle == Lifecycle::Leaving);
        self.lifecycle = Lifecycle::Configured;
    }

    /// Lets connections to the frontends of an earlier configuration (`before`) continue, except to those that are
    /// still configured. UDP has no connections: the next datagram to a removed frontend is left to kube-proxy.
    pub fn drain_frontends(&mut self, before: Vec<Frontend>) {
        let configured = &self.service.frontends;
        let removed = |frontend: &Frontend| !configured.contains(frontend);
        let new_epoch = before.iter().any(|frontend| frontend.protocol == Protocol::Udp && removed(frontend));
        self.draining_frontends.add(before, configured);
        if new_epoch {
            self.new_epoch();
        }
    }

    /// Begins a new epoch, which separates later decisions from earlier ones. UDP flows of an earlier epoch are
    /// decided again, and the policies for established connections apply to flows of earlier epochs.
    pub const fn new_epoch(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
    }

    /// Takes over a transition of the breaker.
    pub fn enter(&mut self, now: Now, transition: Transition, message: &str) {
        self.sync.outdate();
        self.tally.count_transition(transition);
        self.new_epoch();
        self.state_epoch = self.epoch;
        self.since_unix_ns = now.unix_ns;
        if [transition.from, transition.to].contains(&BreakerState::Closed) {
            self.drain_end = now.mono + self.service.drain;
        }
        message.clone_into(&mut self.message);
        self.tracking = Tracking::Active { since: (transition.to == BreakerState::Closed).then_some(now.mono) };
    }

    /// Returns the override that holds from now on, if it differs from the breaker's. The configuration's override
    /// takes precedence over the operator's, which may have a time limit.
    pub fn override_change(&mut self, now: Now) -> Option<OverrideChange> {
        let expired = self.operator.until_unix_ns.take_if(|until| *until <= now.unix_ns).is_some();
        self.sync.outdate_if(expired);
        let configured = self.service.override_;
        let current = self.breaker.operator();
        let wanted = match configured {
            // The configuration has no override: the operator's holds until it ends.
            Override::Auto if expired || self.operator.configured != Override::Auto => Override::Auto,
            Override::Auto => current,
            forced => forced,
        };
        self.operator.configured = configured;
        (wanted != current).then_some(OverrideChange { wanted, expired })
    }

    /// Whether the next plan adds frontends to the maps.
    pub fn gains_frontends(&self) -> bool {
        let known = |frontend| self.sync.applied().is_some_and(|plan| plan.frontends().any(|f| f == frontend));
        self.sync.is_outdated() && self.lifecycle == Lifecycle::Configured && !self.service.frontends.iter().all(known)
    }

    /// The primary's health as it counts for the breaker. A primary that is starting has not failed.
    pub fn primary_health(&mut self, now: Now) -> TierHealth {
        let health = self.tiers.primary_health(now, &self.service);
        self.was_up |= health == TierHealth::Up;
        if health != TierHealth::Empty {
            self.first_backend.get_or_insert(now.mono);
        }
        // A pod without a readiness probe is ready before its process listens.
        let first_start = self.first_backend.is_none_or(|at| now.mono < at + FIRST_START);
        match health {
            TierHealth::Empty if self.is_starting() => TierHealth::Unknown,
            TierHealth::Down if self.is_starting() && first_start => TierHealth::Unknown,
            health => health,
        }
    }

    /// Whether the primary may never have been ready yet.
    pub fn is_starting(&self) -> bool {
        self.service.starting && !self.was_up
    }

    /// The details of the state, for people.
    pub fn shown_message(&self) -> String {
        let is_initial = self.breaker.state() == BreakerState::Closed && self.message.is_empty();
        if is_initial && self.is_starting() {
            "starting: the primary has not been ready yet".into()
        } else {
            self.message.clone()
        }
    }

    /// The primary's share of new connections, permille. A service that leaves is closed.
    pub fn share(&self, now: Now) -> u16 {
        match self.lifecycle {
            Lifecycle::Configured => self.breaker.share(now.mono),
            Lifecycle::Leaving => SHARE_ALL,
        }
    }

    /// Whether the breaker is closed and its ramp is over.
    pub fn is_fully_closed(&self, now: Now) -> bool {
        self.breaker.state() == BreakerState::Closed && self.breaker.share(now.mono) == SHARE_ALL
    }

    /// Whether the time of the policy `Drain` is over for the flows from before the breaker last opened or closed.
    fn drained(&self, now: Now) -> bool {
        let policies = [self.service.on_open, self.service.on_close];
        !policies.contains(&EstablishedPolicy::Drain) || now.mono >= self.drain_end
    }

    fn drain_ns(&self) -> u64 {
        u64::try_from(self.service.drain.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The backups' backends whose established flows are reset because the backend is Down.
    fn down_backups(&self, now: Now) -> BTreeSet<SocketAddr> {
        match self.service.on_backup_down {
            EstablishedPolicy::Keep => BTreeSet::new(),
            EstablishedPolicy::Reset => self.tiers.down_backups(&self.service, now.unix_ns),
            EstablishedPolicy::Drain => {
                self.tiers.down_backups(&self.service, now.unix_ns.saturating_sub(self.drain_ns()))
            }
        }
    }

    /// When a drain ends and established flows are reset; `None` if none is under way.
    pub fn drain_ends(&self, now: Now) -> Option<Instant> {
        let own = (!self.drained(now)).then_some(self.drain_end);
        let of_backups = (self.service.on_backup_down == EstablishedPolicy::Drain).then(|| {
            let ends = self.tiers.down_since().map(|since| since.saturating_add(self.drain_ns()));
            ends.filter(|end| *end > now.unix_ns).min().map(|end| now.mono + elapsed(now.unix_ns, end))
        });
        [own, of_backups.flatten()].into_iter().flatten().min()
    }

    /// Whether time alone has made another plan than `applied`: by a ramp, or by the end of a drain.
    pub fn has_aged(&self, now: Now, applied: &ServicePlan) -> bool {
        let down_ends = || {
            let drains = self.service.on_backup_down == EstablishedPolicy::Drain && applied.may_reset_down_backups();
            drains
                && self.tiers.active_backup(&self.service).is_some_and(|(_, backends)| !backends.is_empty())
                && applied.down != self.down_backups(now)
        };
        applied.decision.share != self.share(now) || applied.decision.drained != self.drained(now) || down_ends()
    }

    /// The content that the maps should have.
    pub fn plan(&self, now: Now) -> ServicePlan {
        let decision = Decision {
            state: match self.lifecycle {
                Lifecycle::Configured => self.breaker.state(),
                Lifecycle::Leaving => BreakerState::Closed,
            },
            share: self.share(now),
            epoch: self.epoch,
            // A service that leaves is closed whatever its breaker was: the next one must not find the reason of a trip.
            reason: match self.lifecycle {
                Lifecycle::Configured => self.breaker.reason(),
                Lifecycle::Leaving => StateReason::Initial,
            },
            since_unix_ns: self.since_unix_ns,
            trips: self.breaker.trips(),
            // The next agent finds the configuration's override in the configuration. The operator's is in the maps
            // only.
            override_: match self.service.override_ {
                Override::Auto => (self.breaker.operator(), self.operator.until_unix_ns.unwrap_or(0)),
                Override::ForceOpen | Override::ForceClosed => (Override::Auto, 0),
            },
            draining: self.tracking.is_active(),
            drained: self.drained(now),
        };
        let mut plan = match self.lifecycle {
            Lifecycle::Configured => {
                let backup = self.tiers.active_backup(&self.service).map(|(_, backends)| backends);
                let backup = backup.unwrap_or_default();
                let mut plan = ServicePlan::new(&self.service, decision, &backup);
                // Without a usable backup, a reset would break connections that have nowhere else to go.
                if !backup.is_empty() {
                    plan.reset_flows_to(self.down_backups(now));
                }
                plan
            }
            Lifecycle::Leaving => {
                let service =
                    Service { on_close: EstablishedPolicy::Keep, limits: None, ..Service::clone(&self.service) };
                ServicePlan::new(&service, decision, &[])
            }
        };
        plan.add_draining_frontends(self.draining_frontends.as_slice());
        plan.primary_accepts = self.tiers.primary_accepts();
        plan
    }
}
