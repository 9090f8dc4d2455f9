//! Merges the ports and IP families of a Service into one service for the engine.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use breaker_core::model;

use super::{Resolver, engine_name, port::PortPlan};
use crate::source::kube::intent::Key;

impl Resolver<'_> {
    /// Merges one [`PortPlan`] per port and IP family into one service; `None` if there are none. Backends are
    /// identified by their address in the first plan whose primary and backups have backends; the addresses in the
    /// other plans go to `routes`.
    pub(super) fn merge(&mut self, key: &Key, mut plans: Vec<PortPlan>) -> Option<(i32, Arc<model::Service>)> {
        if plans.is_empty() {
            return None;
        }
        let has_primary = |plan: &PortPlan| !plan.service.primary.backends.is_empty();
        let has_backup = |plan: &PortPlan| plan.service.backups.iter().any(|tier| !tier.backends.is_empty());
        let first = plans.iter().position(|plan| has_primary(plan) && has_backup(plan));
        let first = first.or_else(|| plans.iter().position(has_primary)).unwrap_or(0);
        let base = plans.remove(first);
        let mut service = base.service;
        let identities: HashMap<&str, SocketAddr> =
            base.pods.iter().map(|(address, pod)| (pod.as_str(), *address)).collect();
        for plan in &plans {
            let backends = plan
                .pods
                .iter()
                .filter_map(|(address, pod)| Some((*identities.get(pod.as_str())?, *address)))
                .collect::<BTreeMap<_, _>>();
            let backups = service.backups.iter().flat_map(|tier| &tier.backends);
            let named = backups.clone().filter(|b| backends.contains_key(&b.address)).count();
            if named < backups.count() {
                let names: Vec<String> = plan.service.frontends.iter().map(ToString::to_string).collect();
                let note = format!("not all pods of the backups can be reached from {}", names.join(", "));
                self.note(note);
            }
            service.frontends.extend(&plan.service.frontends);
            service.keep_client.frontends.extend(&plan.service.keep_client.frontends);
            service.routes.push(model::Route { frontends: plan.service.frontends.clone(), backends });
        }
        if let (Some(window), Some(check)) = (service.breaker.window, &service.primary.check) {
            let backends = service.primary.backends.len();
            if let Some(most) = window.too_few_observations(check.fast_period, backends) {
                self.note(format!(
                    "breaker.window cannot trip: with {backends} primary pod(s) it holds at most {most} observations, \
                     and minimumVolume is {}",
                    window.minimum_volume
                ));
            }
        }
        service.name = engine_name(key, base.port, base.outside);
        Some((base.port, Arc::new(service)))
    }
}
