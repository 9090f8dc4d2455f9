//! The tiers that services have left: no new connection goes there, and established ones end by themselves or are reset.

use std::{collections::BTreeSet, net::SocketAddr};

use breaker_common::{BreakerState, switch_flags};

use super::{Engine, established::EstablishedCounts, service::ServiceState};
use crate::{
    model::{Protocol, ServiceName, TierRole},
    plan::ServicePlan,
};

/// A tier that a service has left by the plan in the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    /// The service.
    pub service: ServiceName,
    /// The tier, or the backends, that it has left.
    pub from: Departed,
    /// The epoch since when new connections go elsewhere.
    pub epoch: u32,
    /// The service's TCP frontends.
    pub frontends: Vec<SocketAddr>,
    /// Connections that are reset in a second; `None` if they may go on, at least until a drain ends.
    pub resets_per_second: Option<u32>,
}

/// A tier, or backends of one, that a service has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departed {
    /// The primary: the breaker is open.
    Primary,
    /// The backup: the breaker is closed again.
    Backup,
    /// These backends of the backup, which are Down.
    DownBackends(BTreeSet<SocketAddr>),
}

impl Departed {
    /// The tier.
    #[must_use]
    pub const fn tier(&self) -> TierRole {
        match self {
            Self::Primary => TierRole::Primary,
            Self::Backup | Self::DownBackends(_) => TierRole::Backup,
        }
    }
}

impl Engine {
    /// The tiers that configured services have left by the plans in the datapath, and that may still have established
    /// connections. What is known of those of the other tiers is forgotten.
    pub fn departures(&mut self) -> Vec<Departure> {
        let mut all = Vec::new();
        for state in self.services.values_mut() {
            let departures = if state.is_configured() { state.departures() } else { Vec::new() };
            for (index, counts) in state.established.iter_mut().enumerate() {
                let has_left = departures.iter().any(|left| left.from.tier() == TierRole::of(index));
                self.changes += u64::from(!has_left && counts.take().is_some());
            }
            all.extend(departures);
        }
        all
    }

    /// Takes over what is known of the established connections of a tier that a service has left. Ignored if the service has
    /// returned meanwhile.
    pub fn note_established(&mut self, name: &ServiceName, counts: EstablishedCounts) {
        let Some(state) = self.services.get_mut(name) else { return };
        if state.departures().iter().any(|left| left.from.tier() == counts.tier) {
            self.changes += 1;
            state.established[usize::from(counts.tier == TierRole::Backup)] =
                Some(counts).filter(|counts| counts.found > 0);
        }
    }
}

impl ServiceState {
    fn departures(&self) -> Vec<Departure> {
        // After a failed write, the maps may hold the plan of an earlier state.
        let Some(plan) = self.sync.applied().filter(|_| self.sync.is_in_force()) else { return Vec::new() };
        let is_set = |flag: u8| plan.flags & flag != 0;
        if is_set(switch_flags::DRY_RUN) || plan.decision.state != self.breaker.state() {
            return Vec::new();
        }
        let mut found = Vec::new();
        match plan.decision.state {
            BreakerState::Open if !plan.backends().is_empty() => {
                found.push((Departed::Primary, is_set(switch_flags::RESET_PRIMARY)));
            }
            BreakerState::Closed if is_set(switch_flags::RESET_BACKUP) && plan.decision.draining => {
                found.push((Departed::Backup, true));
            }
            _ => {}
        }
        if !plan.down.is_empty() {
            found.push((Departed::DownBackends(plan.down.clone()), true));
        }
        found.into_iter().map(|(from, resets)| self.departure(plan, from, resets)).collect()
    }

    fn departure(&self, plan: &ServicePlan, from: Departed, resets: bool) -> Departure {
        let tcp = self.service.frontends.iter().filter(|frontend| frontend.protocol == Protocol::Tcp);
        Departure {
            service: self.service.name.clone(),
            // The primary was left when the breaker opened; a change of the backup begins a new epoch, too. Of flows to the
            // backup, the programs reset those of an earlier epoch than the plan's.
            epoch: if from == Departed::Primary { self.state_epoch } else { plan.decision.epoch },
            from,
            frontends: tcp.map(|frontend| frontend.address).collect(),
            resets_per_second: resets.then_some(self.service.resets_per_second),
        }
    }
}
