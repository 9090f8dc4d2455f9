//! One protected port of a Service in one IP family: its frontends, its primary, its backups by priority.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use breaker_api::crd::{Check, FastPath, Override, Port};
use breaker_core::model::{self, Backend, Frontend, Protocol, Tier};
use jiff::Timestamp;

use super::{
    Refusal, Resolver,
    checks::{self, ports_of, with_port},
    frontends::{outside_frontends, policies_of},
    references::{ResolvedBackup, is_named, protocol_of},
    refuse,
};
use crate::source::kube::{
    endpoints::{Endpoints, Family, Twice},
    intent::Key,
    kube_proxy::{Choice, Place, Target, Way},
    network_policy,
    objects::{Service, ServicePort},
};

/// The backups of one priority, with the check that they share.
type BackupTier<'a, 'b> = (Vec<&'b ResolvedBackup<'a>>, Option<Check>);

/// Grace period for a new primary backend: kube-proxy may not have programmed its endpoint yet (kube-proxy's
/// minSyncPeriod is 1 s by default, and a sync takes a moment).
const GRACE_PERIOD: Duration = Duration::from_secs(2);

/// A protected port of a Service in one IP family.
#[derive(Clone)]
pub(super) struct PortPlan {
    pub(super) port: i32,
    /// For connections from outside only, because the others go to other endpoints.
    pub(super) outside: bool,
    /// The service that this port and family alone would make; it has no name.
    pub(super) service: model::Service,
    /// The pod behind each address, for all pods of the primary and the backups, including terminating ones.
    pub(super) pods: BTreeMap<SocketAddr, String>,
}

impl PortPlan {
    fn keep_frontends(&mut self, wanted: impl Fn(&Frontend) -> bool) {
        self.service.frontends.retain(&wanted);
        self.service.keep_client.frontends.retain(&wanted);
    }
}

/// The endpoints that decide about connections that come this way: those that kube-proxy uses on this node.
///
/// Where `externalTrafficPolicy: Local` keeps connections from outside from every endpoint, their load balancer sends
/// none to this node. All endpoints decide then: a node without pods of the primary is no failure.
fn judged(choice: &Choice<'_>, way: Way) -> Vec<Backend> {
    let target = match (choice.target(way), way) {
        (Target::Drop, Way::FromOutside) => choice.target(Way::FromThisNode),
        (target, _) => target,
    };
    match target {
        Target::Endpoints(endpoints) => endpoints.iter().map(|e| Backend { address: e.address, weight: 1 }).collect(),
        Target::Drop | Target::Reject => Vec::new(),
    }
}

/// Why a port cannot be protected.
enum Problem {
    /// A reference does not resolve. Other ports are not affected.
    Ref(Refusal),
    /// The spec is invalid, so no port is protected.
    Invalid(String),
}

impl<'a> Resolver<'a> {
    /// Makes a `PortPlan` for every port in every IP family. TCP ports come first, because a check that names no port
    /// uses the first one.
    pub(super) fn port_plans(
        &mut self,
        now: Timestamp,
        key: &Key,
        service: &Service,
        ports: &[&ServicePort],
        backups: &[ResolvedBackup<'a>],
    ) -> Result<Vec<PortPlan>, String> {
        let mut ports = ports.to_vec();
        ports.sort_by_key(|port| port.protocol() != "TCP");
        let families =
            if service.spec.cluster_ip.contains(':') { [Family::V6, Family::V4] } else { [Family::V4, Family::V6] };
        let checked = self.spec.check.as_ref().is_some_and(|check| checks::port(check).is_none());
        if checked && ports.first().is_some_and(|port| port.protocol() != "TCP") {
            return Err(format!(
                "check: no TCP port of Service {key} is protected, so the check has no port to use; \
                 allowed: a check with a port"
            ));
        }
        let mut plans = Vec::new();
        let policies = policies_of(service);
        if policies.internal_local {
            self.note(
                "internalTrafficPolicy: Local holds for the primary only: while the breaker is open, backups on any \
                 node take over"
                    .into(),
            );
        }
        if policies.external_local {
            self.note(
                "externalTrafficPolicy: Local: on nodes with a backup, external clients keep their address; on others \
                 they are masqueraded"
                    .into(),
            );
        }
        if let Some(number) = service.spec.health_check_node_port.filter(|number| *number > 0) {
            self.note(format!(
                "healthCheckNodePort {number}: a load balancer leaves out nodes without ready pods of the primary, so \
                 its clients meet the backup only on the other nodes"
            ));
        }
        if service.spec.publish_not_ready_addresses && self.spec.check.is_none() {
            self.note(
                "publishNotReadyAddresses: pods always count as ready, so without a check the breaker does not open"
                    .into(),
            );
        }
        if self.spec.fast_path == FastPath::PeerRedirect {
            self.note(
                "fastPath: PeerRedirect: connections to a backup of the same node bypass netfilter and NetworkPolicies"
                    .into(),
            );
        }
        for port in ports {
            for family in families {
                match self.port_plan(now, key, service, port, family, backups) {
                    Ok(plan) => plans.extend(plan),
                    // A port without a matching backup port does not affect the other ports.
                    Err(Problem::Ref(refusal)) => self.result.resolved = Err(refusal),
                    Err(Problem::Invalid(message)) => return Err(message),
                }
            }
        }
        Ok(plans)
    }

    /// Resolves one protected port in one IP family. There is no plan if the Service has no address of that family, and
    /// there are two if connections from outside go to other endpoints.
    fn port_plan(
        &mut self,
        now: Timestamp,
        key: &Key,
        service: &Service,
        port: &ServicePort,
        family: Family,
        backups: &[ResolvedBackup<'a>],
    ) -> Result<Vec<PortPlan>, Problem> {
        let Some(protocol) = protocol_of(port) else { return Ok(Vec::new()) };
        let frontends = self.frontends(service, port, protocol, family);
        if frontends.is_empty() {
            return Ok(Vec::new());
        }
        let node = &self.world.node;
        let twice = node.kube_proxy.twice(&node.name);
        let primary = Endpoints::of(&self.world.endpoints[key], port.name.as_deref(), protocol.name(), family, twice);
        let slices = &self.world.endpoints[key];
        let has_port = |family| Endpoints::of(slices, port.name.as_deref(), protocol.name(), family, twice).port;
        if primary.port.or_else(|| has_port(family.other())).is_none() {
            self.result.no_slice_has_the_port |= slices.iter().any(|slice| !slice.endpoints.is_empty());
        }
        let override_ = match self.spec.until {
            Some(until) if until <= now => {
                self.note(format!("until: the override has ended at {until:.0}"));
                Override::Auto
            }
            _ => self.spec.r#override,
        };
        let primary_check = self.numbered_check(self.spec.check.as_ref(), key)?;
        let tiers = self.by_priority(backups)?;
        let checks: Vec<Option<&Check>> = tiers.iter().map(|(_, check)| check.as_ref()).collect();
        let template =
            self.policies.get(self.spec, override_, primary_check.as_ref(), &checks).map_err(Problem::Invalid)?;
        // The address of a pod that has ended may be a backup's by now.
        let of_primary = primary.all().filter(|e| e.can_serve()).map(|e| e.address);
        let avoid: BTreeSet<SocketAddr> = of_primary.chain(frontends.iter().map(|f| f.address)).collect();
        let mut pods: BTreeMap<SocketAddr, String> = primary.all().map(|e| (e.address, e.pod.clone())).collect();
        let mut backup_tiers = Vec::new();
        let outside = outside_frontends(service, &frontends);
        let policies = policies_of(service);
        let kept = if policies.external_local { outside.clone() } else { BTreeSet::new() };
        let mut keep_client = model::KeepClient { frontends: kept, ..Default::default() };
        let mut in_family = false;
        for ((members, _), model) in tiers.iter().zip(&template.backups) {
            let (mut pools, mut check_ports) = (Vec::new(), BTreeMap::new());
            for found in members {
                let endpoints = self.backup_endpoints(found, port, protocol, family)?;
                in_family |= endpoints.all().next().is_some();
                pods.extend(endpoints.all().map(|e| (e.address, e.pod.clone())));
                self.check_network_policies(
                    protocol,
                    (key, service, &primary),
                    (&found.key, found.service, &endpoints),
                );
                if !keep_client.frontends.is_empty() {
                    keep_client.backends.extend(endpoints.all().filter(|e| self.world.node.has(e)).map(|e| e.address));
                }
                let shared = endpoints.all().filter(|e| avoid.contains(&e.address)).count();
                if shared > 0 {
                    let note = format!(
                        "{shared} pods of {} are also pods of the primary and are not used as backup",
                        found.key
                    );
                    self.note(note);
                }
                check_ports.extend(ports_of(self.check_of(found), &endpoints));
                pools.push((found, endpoints.without(&avoid)));
            }
            let name = members.iter().map(|found| self.short_name(&found.key)).collect::<Vec<_>>().join("+");
            backup_tiers.extend(self.tiers_by_distance(&name, &pools, &Tier { check_ports, ..model.clone() }));
        }
        let has_other = |found: &ResolvedBackup<'_>| {
            let others = self.backup_endpoints(found, port, protocol, family.other());
            others.is_ok_and(|endpoints| endpoints.all().next().is_some())
        };
        if !in_family && self.result.reachable.is_ok() && backups.iter().any(has_other) {
            let names: Vec<String> = frontends.iter().map(ToString::to_string).collect();
            let message = format!(
                "no pod of a backup has an {} address, so connections to {} are not moved",
                family.name(),
                names.join(", ")
            );
            self.result.reachable = refuse("NoBackupInFamily", message);
        }
        let place = Place { node: &node.name, zone: node.zone.as_deref() };
        let choice = Choice::of(&primary, place, policies, node.kube_proxy);
        let service = model::Service {
            frontends,
            primary: Tier {
                name: self.short_name(key),
                backends: judged(&choice, Way::ClusterIp),
                draining: Vec::new(),
                check_ports: ports_of(self.spec.check.as_ref(), &primary),
                ..template.primary.clone()
            },
            backups: backup_tiers,
            grace_period: GRACE_PERIOD,
            keep_client,
            ..template.as_ref().clone()
        };
        let mut all = PortPlan { port: port.port, outside: false, service, pods };
        if policies.internal_local == policies.external_local || outside.is_empty() {
            return Ok(vec![all]);
        }
        let mut from_outside = all.clone();
        from_outside.outside = true;
        from_outside.service.primary.backends = judged(&choice, Way::FromOutside);
        from_outside.keep_frontends(|frontend| outside.contains(frontend));
        all.keep_frontends(|frontend| !outside.contains(frontend));
        if self.spec.limits.is_some() {
            self.note(
                "limits count connections from outside apart from those to the cluster IP, because the traffic \
                 policies differ"
                    .into(),
            );
        }
        Ok(vec![all, from_outside])
    }

    /// A check with a port number in place of a port name, for the pods of one Service. Pods with another number get
    /// their own ([`ports_of`]).
    fn numbered_check(&self, check: Option<&Check>, key: &Key) -> Result<Option<Check>, Problem> {
        let Some(check) = check else { return Ok(None) };
        let Some(Port::Name(name)) = checks::port(check) else { return Ok(Some(check.clone())) };
        let slices = &self.world.endpoints[key];
        // Without endpoints, the EndpointSlices have no ports. No pod is checked then, so any number will do.
        let nobody = slices.iter().all(|slice| slice.endpoints.is_empty());
        let of = |family| Endpoints::of(slices, Some(name), "TCP", family, Twice::Better).port;
        match of(Family::V4).or(of(Family::V6)).or(nobody.then_some(1)) {
            Some(number) => Ok(Some(with_port(check, number))),
            None => Err(Problem::Ref(Refusal {
                reason: "PortNotFound",
                message: format!("the check's port {name:?} is not a port of Service {key} that has endpoints"),
            })),
        }
    }

    /// The check of a backup: its own or, if it has none, the primary's.
    fn check_of(&self, backup: &ResolvedBackup<'a>) -> Option<&'a Check> {
        backup.intent.check.as_ref().or(self.spec.check.as_ref())
    }

    /// The backups of each priority, with the check that they share.
    fn by_priority<'b>(&self, backups: &'b [ResolvedBackup<'a>]) -> Result<Vec<BackupTier<'a, 'b>>, Problem> {
        let mut tiers: Vec<BackupTier<'a, '_>> = Vec::new();
        let mut last_priority = None;
        for found in backups {
            let own = self.numbered_check(self.check_of(found), &found.key)?;
            match tiers.last_mut() {
                Some((members, _)) if last_priority == Some(found.priority) => {
                    if self.check_of(members[0]) != self.check_of(found) {
                        return Err(Problem::Invalid(format!(
                            "backups: {} and {} have the same priority but different checks; \
                             allowed: one check for each priority",
                            members[0].key, found.key
                        )));
                    }
                    members.push(found);
                }
                _ => tiers.push((vec![found], own)),
            }
            last_priority = Some(found.priority);
        }
        Ok(tiers)
    }

    /// Sets `reachable` to an error if a NetworkPolicy keeps the primary's clients from a backup's pods. Only the
    /// first such backup is reported.
    fn check_network_policies(
        &mut self,
        protocol: Protocol,
        primary: (&Key, &Service, &Endpoints),
        backup: (&Key, &Service, &Endpoints),
    ) {
        if self.world.policies.is_empty() || self.result.reachable.is_err() {
            return;
        }
        let sides = [primary, backup];
        let addresses = sides.map(|(.., pods)| pods.usable().map(|e| e.address).collect::<Vec<_>>());
        // Without pods there are no ports and addresses to compare.
        if addresses.iter().any(Vec::is_empty) {
            return;
        }
        let names = sides.map(|(key, ..)| self.short_name(key));
        let pods = |side: usize| network_policy::Pods {
            name: &names[side],
            namespace: &sides[side].0.namespace,
            labels: &sides[side].1.spec.selector,
            protocol: protocol.name(),
            addresses: &addresses[side],
        };
        if let Some(message) = network_policy::obstacle(&self.world.policies, &pods(0), &pods(1)) {
            self.result.reachable = refuse("NetworkPolicy", message);
        }
    }

    /// A backup's endpoints for a protected port. The backup's port is the one that the spec names or, if it names
    /// none, the port with the same name, the port with the same number, or the only port of the protocol.
    fn backup_endpoints(
        &self,
        found: &ResolvedBackup<'_>,
        port: &ServicePort,
        protocol: Protocol,
        family: Family,
    ) -> Result<Endpoints, Problem> {
        let ports: Vec<&ServicePort> =
            found.service.spec.ports.iter().filter(|port| port.protocol() == protocol.name()).collect();
        let by = |wanted: &Port| ports.iter().find(|p| is_named(p, wanted)).copied();
        let chosen = match &found.intent.port {
            Some(wanted) => by(wanted),
            None => port
                .name
                .as_ref()
                .and_then(|name| by(&Port::Name(name.clone())))
                .or_else(|| by(&Port::Number(i64::from(port.port))))
                .or_else(|| if let [only] = ports[..] { Some(only) } else { None }),
        };
        let Some(chosen) = chosen else {
            let wanted = found.intent.port.as_ref().map_or_else(
                || format!("port {} (by name, by number, or as the only one)", port.port),
                |wanted| format!("port {wanted}"),
            );
            return Err(Problem::Ref(Refusal {
                reason: "PortNotFound",
                message: format!("Service {} has no {} port that matches {wanted}", found.key, protocol.name()),
            }));
        };
        let slices = &self.world.endpoints[&found.key];
        Ok(Endpoints::of(slices, chosen.name.as_deref(), protocol.name(), family, Twice::Better))
    }
}
