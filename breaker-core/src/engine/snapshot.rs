//! Read-only views of the services: the full view of one service, and the summary that is published to other nodes.

use std::net::SocketAddr;

use breaker_common::{BreakerState, ServiceCounters, StateReason};

use super::{
    backends::{BackendState, LocalErrors},
    established::EstablishedCounts,
    limit_watch::ActiveLimit,
    service::{Lifecycle, ServiceState},
};
use crate::{
    datapath::{Datapath, LimitReport},
    health::Health,
    limits::Limits,
    model::{FastPath, Frontend, Mode, Override, Service, ServiceName, Tier, TierRole, WhenAllUnhealthy},
    plan::ServicePlan,
    probe::ProbeResult,
    time::{Now, UnixNanos},
};

/// Refused clients in a snapshot, at most.
const CLIENTS: usize = 10;

/// Everything that is known of one service.
#[derive(Clone, Debug)]
pub struct ServiceSnapshot {
    /// Its name.
    pub name: ServiceName,
    /// The breaker's state.
    pub state: BreakerState,
    /// When it entered its state.
    pub since_unix_ns: UnixNanos,
    /// The reason for the state.
    pub reason: StateReason,
    /// Details of the reason in words: the last failed probe, or the operator's text.
    pub message: String,
    /// The primary's share of new connections, permille.
    pub share: u16,
    /// Counter of decisions.
    pub epoch: u32,
    /// Trips in a row.
    pub trips: u32,
    /// Whether decisions are carried out.
    pub mode: Mode,
    /// The override in force.
    pub override_: Override,
    /// When the override ends.
    pub override_until_unix_ns: Option<UnixNanos>,
    /// How packets to backup pods of this node are delivered.
    pub fast_path: FastPath,
    /// The fate of a new connection while neither the primary nor a backup can be used.
    pub when_all_unhealthy: WhenAllUnhealthy,
    /// Its frontends.
    pub frontends: Vec<Frontend>,
    /// The primary, then the backups.
    pub tiers: Vec<TierSnapshot>,
    /// The decision that the maps should have.
    pub desired: DecisionSnapshot,
    /// The decision that the maps have; `None` before the first write.
    pub applied: Option<DecisionSnapshot>,
    /// Why the last write failed.
    pub error: Option<String>,
    /// Failed writes since the agent started.
    pub failed_writes: u64,
    /// Live flows on a backup at the last sweep.
    pub flows: usize,
    /// The established connections of a tier that the service has left, first of all the primary; `None` if there are none.
    pub established: Option<EstablishedCounts>,
    /// Probes without a result since the agent first saw the service.
    pub local_errors: u64,
    /// Counters since the service was added to the maps.
    pub counters: ServiceCounters,
    /// Its limits, if it has any.
    pub limits: Option<LimitsSnapshot>,
}

/// The part of a plan that the status shows, to compare the desired with the applied plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecisionSnapshot {
    /// The state.
    pub state: BreakerState,
    /// The primary's share, permille.
    pub share: u16,
    /// The epoch.
    pub epoch: u32,
}

impl From<&ServicePlan> for DecisionSnapshot {
    fn from(plan: &ServicePlan) -> Self {
        Self { state: plan.decision.state, share: plan.decision.share, epoch: plan.decision.epoch }
    }
}

/// One tier.
#[derive(Clone, Debug)]
pub struct TierSnapshot {
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: TierRole,
    /// Whether new connections go to it now (during a ramp: also to it).
    pub active: bool,
    /// Its backends.
    pub backends: Vec<BackendSnapshot>,
}

/// One backend.
#[derive(Clone, Debug)]
pub struct BackendSnapshot {
    /// Its address and port.
    pub address: SocketAddr,
    /// Its health; `None` in a tier without a check.
    pub health: Option<Health>,
    /// When it got its health.
    pub since_unix_ns: Option<UnixNanos>,
    /// The last probe with a result.
    pub last: Option<ProbeResult>,
    /// The probes since then, if they had no result.
    pub local_errors: Option<LocalErrors>,
    /// Its weight.
    pub weight: u16,
    /// Whether it is known to be a pod of this node. Always false for a service that does not need to know.
    pub local: bool,
}

/// The limits of a service, and their effect.
#[derive(Clone, Debug)]
pub struct LimitsSnapshot {
    /// As configured.
    pub configured: Limits,
    /// Counters, and the clients that the limits refuse.
    pub report: LimitReport,
    /// The limit that refuses connections now.
    pub active: Option<ActiveLimit>,
}

/// A service in short: what the programs act on, and how many backends are Up. Two summaries are equal as long as
/// nothing changed that other nodes should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its name.
    pub name: ServiceName,
    /// The decision in the maps; `None` before the first write.
    pub applied: Option<AppliedSummary>,
    /// Details of the reason.
    pub message: String,
    /// Whether the maps hold exactly the applied plan.
    pub in_force: bool,
    /// Why the last write failed.
    pub error: Option<String>,
    /// The primary, then the backups.
    pub tiers: Vec<TierSummary>,
    /// By how many nodes its limits are divided; 0 without limits.
    pub limits_shared_by: u32,
    /// The limit that refuses connections now.
    pub limited: Option<ActiveLimit>,
    /// The established connections of a tier that the service has left, first of all the primary; `None` if there are none.
    pub established: Option<EstablishedCounts>,
}

/// The decision in the maps, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppliedSummary {
    /// The state.
    pub state: BreakerState,
    /// When it was entered.
    pub since_unix_ns: UnixNanos,
    /// The reason for the state.
    pub reason: StateReason,
    /// The primary's share, permille.
    pub share: u16,
}

/// A tier in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierSummary {
    /// Its name.
    pub name: String,
    /// Number of backends that are Up; all of them in a tier without a check.
    pub up: usize,
    /// Number of backends.
    pub total: usize,
    /// Number of backends whose health is still unknown.
    pub checking: usize,
    /// Whether this is the backup that would take over; false for the primary.
    pub active: bool,
}

impl ServiceState {
    pub(super) fn snapshot(&self, now: Now, datapath: &dyn Datapath) -> ServiceSnapshot {
        let (service, breaker) = (&self.service, &self.breaker);
        ServiceSnapshot {
            name: service.name.clone(),
            state: breaker.state(),
            since_unix_ns: self.since_unix_ns,
            reason: breaker.reason(),
            message: self.shown_message(),
            share: breaker.share(now.mono),
            epoch: self.epoch,
            trips: breaker.trips(),
            mode: service.mode,
            override_: breaker.operator(),
            override_until_unix_ns: self.operator.until_unix_ns,
            fast_path: service.fast_path,
            when_all_unhealthy: service.when_all_unhealthy,
            frontends: service.frontends.clone(),
            tiers: self.tier_snapshots(datapath),
            desired: (&self.plan(now)).into(),
            applied: self.sync.applied().map(DecisionSnapshot::from),
            error: self.sync.error().map(str::to_owned),
            failed_writes: self.sync.failed_writes,
            flows: self.flows,
            established: self.established(),
            local_errors: self.local_errors,
            counters: datapath.counters(&service.name).unwrap_or_default(),
            limits: service.limits.map(|configured| LimitsSnapshot {
                configured,
                report: datapath.limits(&service.name, CLIENTS).unwrap_or_default(),
                active: self.limit_watch.active().cloned(),
            }),
        }
    }

    fn tier_snapshots(&self, datapath: &dyn Datapath) -> Vec<TierSnapshot> {
        let closed = self.breaker.state() == BreakerState::Closed;
        let active_backup = self.tiers.active_backup(&self.service).map(|(index, _)| index + 1);
        let tiers = self.service.tiers().zip(self.tiers.iter()).enumerate();
        tiers
            .map(|(index, (tier, backends))| TierSnapshot {
                name: tier.name.clone(),
                role: TierRole::of(index),
                active: if index == 0 { closed } else { !closed && active_backup == Some(index) },
                backends: backends
                    .iter()
                    .map(|state| state.snapshot(tier, is_local(&self.service, state.backend.address, datapath)))
                    .collect(),
            })
            .collect()
    }

    pub(super) fn summary(&self) -> Summary {
        let active = self.tiers.active_backup(&self.service).map(|(index, _)| index + 1);
        let tiers = self.service.tiers().enumerate().map(|(index, tier)| {
            let healths = self.tiers.healths(index);
            let count = |wanted: Health| healths.iter().filter(|health| **health == wanted).count();
            let (up, checking) = match tier.check {
                Some(_) => (count(Health::Up), count(Health::Unknown)),
                None => (tier.backends.len(), 0),
            };
            TierSummary {
                name: tier.name.clone(),
                up,
                total: tier.backends.len(),
                checking,
                active: active == Some(index),
            }
        });
        Summary {
            name: self.service.name.clone(),
            applied: self.sync.applied().map(|plan| AppliedSummary {
                state: plan.decision.state,
                since_unix_ns: plan.decision.since_unix_ns,
                reason: plan.decision.reason,
                share: plan.decision.share,
            }),
            message: self.shown_message(),
            in_force: self.sync.is_in_force(),
            error: self.sync.error().map(str::to_owned),
            tiers: tiers.collect(),
            limits_shared_by: self.service.limits.map_or(0, |limits| limits.shared_by()),
            limited: self.limit_watch.active().cloned(),
            established: self.established(),
        }
    }

    fn established(&self) -> Option<EstablishedCounts> {
        self.established.into_iter().flatten().next()
    }

    /// Whether the service is configured. Only configured services are shown.
    pub(super) fn is_configured(&self) -> bool {
        self.lifecycle == Lifecycle::Configured
    }
}

impl BackendState {
    fn snapshot(&self, tier: &Tier, local: bool) -> BackendSnapshot {
        BackendSnapshot {
            address: self.backend.address,
            health: tier.check.is_some().then_some(self.health),
            since_unix_ns: self.since_unix_ns,
            last: self.last.clone(),
            local_errors: self.local_errors.clone(),
            weight: self.backend.weight,
            local,
        }
    }
}

/// Whether a backend is known to be a pod of this node. Always false for a service that does not need to know.
fn is_local(service: &Service, backend: SocketAddr, datapath: &dyn Datapath) -> bool {
    let protocols = || service.frontends.iter().map(|frontend| frontend.protocol);
    service.needs_local_backends()
        && service.addresses(backend).any(|address| protocols().any(|p| datapath.is_local((address, p))))
}
