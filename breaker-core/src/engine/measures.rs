//! Read-only views for metrics: numbers only, at a cost that allows a scrape of thousands of services.

use std::{net::SocketAddr, time::Duration};

use breaker_common::{BreakerState, ServiceCounters};

use super::{Engine, backends::BackendState, service::ServiceState, tally::Tally};
use crate::{
    datapath::{Datapath, LimitReport},
    health::Health,
    limits::Limits,
    model::{FastPath, Mode, Override, ServiceName, TierRole},
    time::{Now, UnixNanos, elapsed},
};

/// How long a closed breaker stays among those that are shown in [`Scope::Noteworthy`] after its last transition.
const RECENT: Duration = Duration::from_secs(300);

/// Which services [`Engine::measures`] describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    All,
    /// Those that are not closed, have an override, are not applied, or made a transition in the last five minutes.
    Noteworthy,
}

/// A part of the services, for [`Engine::measures`]. A caller that wants all of them asks again, so that other work of
/// the main loop need not wait for thousands.
#[derive(Clone, Debug)]
pub struct Query {
    /// Which services.
    pub scope: Scope,
    /// Whether to describe each of their backends.
    pub each_backend: bool,
    /// Only services whose names come after this one.
    pub after: Option<ServiceName>,
    /// This many services, at most.
    pub most: usize,
}

/// The numbers of one service.
#[derive(Clone, Debug)]
pub struct ServiceMeasures {
    /// Its name.
    pub name: ServiceName,
    /// The breaker's state.
    pub state: BreakerState,
    /// The primary's share of new connections, permille.
    pub share: u16,
    /// Whether the maps hold the wanted plan.
    pub is_applied: bool,
    /// Failed writes since the agent started.
    pub failed_writes: u64,
    /// When it entered its state.
    pub since_unix_ns: UnixNanos,
    /// The override in force, and when it ends; 0 = it does not.
    pub override_: (Override, UnixNanos),
    /// Whether decisions are carried out.
    pub mode: Mode,
    /// How packets to backup pods of this node are delivered.
    pub fast_path: FastPath,
    /// Number of backends by health: of the primary, and of all backups together.
    pub backends: [HealthCounts; 2],
    /// Live flows on a backup at the last sweep.
    pub flows: usize,
    /// Counts of this agent.
    pub tally: Tally,
    /// Probes without a result, because of an error of this node.
    pub local_errors: u64,
    /// Counters in the maps; `None` if they cannot be read.
    pub counters: Option<ServiceCounters>,
    /// Its limits with their counters, if it has any.
    pub limits: Option<(Limits, LimitReport)>,
    /// Each backend, if asked for.
    pub each_backend: Vec<BackendMeasures>,
}

/// Number of backends by health.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HealthCounts {
    /// Usable.
    pub up: u64,
    /// Not usable.
    pub down: u64,
    /// Not known yet.
    pub unknown: u64,
    /// In a tier without a check.
    pub unchecked: u64,
}

impl HealthCounts {
    const fn count(&mut self, health: Option<Health>) {
        match health {
            Some(Health::Up) => self.up += 1,
            Some(Health::Down) => self.down += 1,
            Some(Health::Unknown) => self.unknown += 1,
            None => self.unchecked += 1,
        }
    }
}

/// The numbers of one backend.
#[derive(Clone, Debug)]
pub struct BackendMeasures {
    /// The role of its tier.
    pub role: TierRole,
    /// Its address and port.
    pub address: SocketAddr,
    /// Whether it is usable. A backend without a check is.
    pub is_up: bool,
    /// Duration of the last probe with a result.
    pub last_probe: Option<Duration>,
}

impl Engine {
    /// Number of configured services, by the number of their state.
    pub fn by_state(&self) -> [u64; BreakerState::ALL.len()] {
        let mut counts = [0; BreakerState::ALL.len()];
        for state in self.services.values().filter(|state| state.is_configured()) {
            counts[state.breaker.state() as usize] += 1;
        }
        counts
    }

    /// The numbers of a part of the services, by name.
    pub fn measures(&self, now: Now, datapath: &dyn Datapath, query: &Query) -> Vec<ServiceMeasures> {
        let services = self.configured_after(query.after.as_ref());
        let wanted = services.filter(|state| query.scope == Scope::All || state.is_noteworthy(now));
        wanted.take(query.most).map(|state| state.measures(now, datapath, query.each_backend)).collect()
    }
}

impl ServiceState {
    /// Whether somebody who looks only at what is not as usual should see the service.
    fn is_noteworthy(&self, now: Now) -> bool {
        let transitions: u64 = self.tally.transitions.iter().sum();
        self.breaker.state() != BreakerState::Closed
            || self.breaker.operator() != Override::Auto
            || !self.sync.is_in_force()
            || transitions > 0 && elapsed(self.since_unix_ns, now.unix_ns) < RECENT
    }

    fn measures(&self, now: Now, datapath: &dyn Datapath, each_backend: bool) -> ServiceMeasures {
        let (service, name) = (&self.service, &self.service.name);
        let mut backends = [HealthCounts::default(); 2];
        let mut each = Vec::new();
        for (index, (tier, states)) in service.tiers().zip(self.tiers.iter()).enumerate() {
            let role = TierRole::of(index);
            for state in states {
                let health = tier.check.is_some().then_some(state.health);
                backends[usize::from(role == TierRole::Backup)].count(health);
                if each_backend {
                    each.push(state.measures(role, health));
                }
            }
        }
        ServiceMeasures {
            name: name.clone(),
            state: self.breaker.state(),
            share: self.breaker.share(now.mono),
            is_applied: self.sync.is_in_force(),
            failed_writes: self.sync.failed_writes,
            since_unix_ns: self.since_unix_ns,
            override_: (self.breaker.operator(), self.operator.until_unix_ns.unwrap_or(0)),
            mode: service.mode,
            fast_path: service.fast_path,
            backends,
            flows: self.flows,
            tally: self.tally.clone(),
            local_errors: self.local_errors,
            counters: datapath.counters(name).ok(),
            limits: service.limits.map(|limits| (limits, datapath.limits(name, 0).unwrap_or_default())),
            each_backend: each,
        }
    }
}

impl BackendState {
    fn measures(&self, role: TierRole, health: Option<Health>) -> BackendMeasures {
        BackendMeasures {
            role,
            address: self.backend.address,
            is_up: health.is_none_or(|health| health == Health::Up),
            last_probe: self.last.as_ref().map(|last| last.duration),
        }
    }
}
