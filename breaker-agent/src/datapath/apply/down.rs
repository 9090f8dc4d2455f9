//! Backends of backups that are Down, whose established flows the programs reset (`onBackupDown: Reset`).

use std::collections::BTreeSet;

use breaker_common::DownBackendKey;
use breaker_core::{datapath::Destination, model::Protocol, plan::ServicePlan};

use crate::datapath::KernelDatapath;

impl KernelDatapath {
    /// Adds what the plan needs. Called before the plan is in force. A backend that no flow ever went to has no id, and no
    /// flows to reset.
    pub(crate) fn add_down_backends(&mut self, plan: &ServicePlan, index: u32) {
        for key in self.wanted_down(plan, index) {
            if self.down_backends.contains(&key) {
                continue;
            }
            match self.maps.down_backends.insert(key, 1, 0) {
                Ok(()) => _ = self.down_backends.insert(key),
                Err(error) => tracing::warn!("connections to a backend of {} that is Down stay: {error}", plan.name),
            }
        }
    }

    /// Removes what the plan does not need. Called after the plan is in force.
    pub(crate) fn trim_down_backends(&mut self, plan: &ServicePlan, index: u32) {
        let wanted = self.wanted_down(plan, index);
        self.remove_down_backends(|key| key.service == index && !wanted.contains(key));
    }

    /// Removes the backends for which `which` is true.
    pub(crate) fn remove_down_backends(&mut self, which: impl Fn(&DownBackendKey) -> bool) {
        let gone: Vec<DownBackendKey> = self.down_backends.iter().filter(|key| which(key)).copied().collect();
        for key in gone {
            self.down_backends.remove(&key);
            // It may be gone already.
            let _ = self.maps.down_backends.remove(&key);
        }
    }

    /// Takes over what an earlier agent left.
    pub(crate) fn adopt_down_backends(&mut self) {
        self.down_backends = self.maps.down_backends.keys().flatten().collect();
    }

    fn wanted_down(&self, plan: &ServicePlan, index: u32) -> BTreeSet<DownBackendKey> {
        let ids = plan.down.iter().filter_map(|address| {
            let destination = (*address, Protocol::Tcp);
            Some(key(index, &destination, *self.backends.get(&destination)?))
        });
        ids.collect()
    }
}

/// The key of a service's backend.
pub(crate) fn key(service: u32, (address, _): &Destination, id: u32) -> DownBackendKey {
    DownBackendKey { service, backend: if address.is_ipv6() { id | DownBackendKey::IPV6 } else { id } }
}
