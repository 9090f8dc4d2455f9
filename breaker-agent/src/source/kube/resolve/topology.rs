//! Which pods of a backup are preferred, and the weight of each.

use std::{collections::BTreeMap, net::SocketAddr};

use breaker_api::crd::Topology;
use breaker_core::model::{Backend, Tier};

use super::{Resolver, World, references::ResolvedBackup};
use crate::source::kube::endpoints::{Endpoint, Endpoints};

impl Resolver<'_> {
    /// The endpoints of one priority as tiers: one tier or, if `topology` prefers close pods, one tier for each
    /// distance (same node, same zone, elsewhere).
    pub(super) fn tiers_by_distance(
        &mut self,
        name: &str,
        pools: &[(&&ResolvedBackup<'_>, Endpoints)],
        model: &Tier,
    ) -> Vec<Tier> {
        let (node, world) = (&self.world.node, self.world);
        let zone_of = |e: &Endpoint| zone_of(world, e);
        let same_zone = |e: &Endpoint| node.zone.is_some() && zone_of(e) == node.zone;
        let nobody = || !pools.iter().flat_map(|(_, endpoints)| endpoints.usable()).any(|e| zone_of(e).is_some());
        if self.spec.topology == Topology::PreferSameZone && (node.zone.is_none() || nobody()) {
            let what = if node.zone.is_none() { "this Node" } else { "the Node of any of its pods" };
            self.result.notes.push(format!(
                "topology PreferSameZone has no effect on {name}: {what} has no label topology.kubernetes.io/zone"
            ));
        }
        let rank = |e: &Endpoint| match self.spec.topology {
            Topology::Any => 0,
            Topology::PreferSameNode => match () {
                () if node.has(e) => 0,
                () if same_zone(e) => 1,
                () => 2,
            },
            Topology::PreferSameZone => u8::from(!same_zone(e)),
        };
        let label = |rank: u8| match (self.spec.topology, rank) {
            (Topology::PreferSameNode, 0) => format!("{name} (same node)"),
            (Topology::PreferSameNode, 1) | (Topology::PreferSameZone, 0) => format!("{name} (same zone)"),
            _ => name.to_owned(),
        };
        let mut tiers: BTreeMap<u8, Tier> = BTreeMap::new();
        let empty = |rank: u8| Tier { name: label(rank), backends: Vec::new(), draining: Vec::new(), ..model.clone() };
        for (rank_, weights) in [0, 1, 2].map(|r| (r, weighted_backends(pools, |e| rank(e) == r))) {
            if !weights.is_empty() {
                tiers.entry(rank_).or_insert_with(|| empty(rank_)).backends = weights;
            }
        }
        let draining: Vec<SocketAddr> = pools.iter().flat_map(|(_, e)| e.draining()).map(|e| e.address).collect();
        // A backup without endpoints stays a tier: the status names it, and it is used again once it has endpoints.
        let last = tiers.len().checked_sub(1);
        let mut tiers: Vec<Tier> = tiers.into_values().collect();
        match last.and_then(|last| tiers.get_mut(last)) {
            Some(tier) => tier.draining = draining,
            None => tiers.push(Tier { draining, ..empty(2) }),
        }
        tiers
    }
}

/// The zone of an endpoint's Node. The slice has the zone that the Node had when the endpoint was added: Kubernetes does
/// not update it when the Node's label changes.
fn zone_of(world: &World, endpoint: &Endpoint) -> Option<String> {
    let node = endpoint.node.as_deref();
    match &world.zones {
        Some(zones) if node.is_some() => node.and_then(|node| zones.get(node)).cloned(),
        _ if node == Some(world.node.name.as_str()) => world.node.zone.clone(),
        _ => endpoint.zone.clone(),
    }
}

/// The backends of several Services. A Service's part of the connections depends on its weight, not on its number of
/// pods.
fn weighted_backends(pools: &[(&&ResolvedBackup<'_>, Endpoints)], wanted: impl Fn(&Endpoint) -> bool) -> Vec<Backend> {
    let members: Vec<(u64, Vec<&Endpoint>)> = pools
        .iter()
        .map(|(found, endpoints)| {
            (
                u64::try_from(found.intent.weight).unwrap_or(1),
                endpoints.usable().filter(|e| wanted(e)).collect::<Vec<_>>(),
            )
        })
        .filter(|(_, endpoints)| !endpoints.is_empty())
        .collect();
    if members.len() == 1 {
        return members[0].1.iter().map(|e| Backend { address: e.address, weight: 1 }).collect();
    }
    // The pod with the largest part gets weight 1000, the others in proportion, but at least 1.
    let per_pod = |weight: u64, pods: usize| weight * 1_000_000 / pods as u64;
    let most = members.iter().map(|(weight, pods)| per_pod(*weight, pods.len())).max().unwrap_or(1).max(1);
    let weight = |w: u64, pods: usize| u16::try_from((per_pod(w, pods) * 1000 / most).max(1)).unwrap_or(1000);
    members
        .iter()
        .flat_map(|(w, pods)| pods.iter().map(move |e| Backend { address: e.address, weight: weight(*w, pods.len()) }))
        .collect()
}
