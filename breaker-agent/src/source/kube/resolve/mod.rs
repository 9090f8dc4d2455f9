//! Resolution: from the watched Kubernetes objects to the services for the engine. It is a pure function, so that every
//! rule about Services, EndpointSlices, ReferenceGrants and conflicts can be tested without a cluster.
//!
//! | module | one concern |
//! |---|---|
//! | this one | which object protects which Service: conflicts, order, the last valid spec |
//! | [`references`] | the Service's ports, the backups, ReferenceGrants |
//! | [`port`] | one protected port in one IP family |
//! | [`frontends`] | the addresses that clients connect to |
//! | [`checks`] | port names in checks |
//! | [`topology`] | which backup pods are preferred, and the weight of each |
//! | [`merge`] | merging all ports and families into one service |

mod checks;
mod frontends;
mod merge;
mod port;
mod references;
mod topology;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use breaker_api::crd::{CircuitBreakerSpec, Override, OwnerKind, ReferenceGrant, Topology};
use breaker_common::NAME_LEN;
use breaker_core::model::{self, Frontend, ServiceName};
use jiff::{SignedDuration, Timestamp};

use super::{
    annotations,
    endpoints::Endpoint,
    intent::{self, Intent, Key, Owner},
    kube_proxy::KubeProxy,
    network_policy,
    objects::{EndpointSlice, Guarded, Service},
    spec_policies::Policies,
};
use crate::config::FrontendRules;

/// How long a new Service whose pods have never been ready counts as starting, and not as failed.
const STARTING: SignedDuration = SignedDuration::from_mins(5);

/// The Node that this agent runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Name of the Node.
    pub name: String,
    /// Uid of the Node; `None` until the Node was read.
    pub uid: Option<String>,
    /// Internal and external addresses of the Node, on which NodePorts accept connections.
    pub addresses: Vec<IpAddr>,
    /// Whether the Node's condition Ready is True.
    pub ready: bool,
    /// Zone of the Node (label topology.kubernetes.io/zone).
    pub zone: Option<String>,
    /// The node's kube-proxy.
    pub kube_proxy: KubeProxy,
}

impl NodeView {
    /// Whether an endpoint is on this node.
    fn has(&self, endpoint: &Endpoint) -> bool {
        endpoint.node.as_deref() == Some(self.name.as_str())
    }
}

/// Snapshot of the watched objects: the input of [`resolve`].
#[derive(Clone, Debug, Default)]
pub struct World {
    /// This node.
    pub node: NodeView,
    /// All CircuitBreakers, each in the last version that could be parsed.
    pub breakers: Vec<Arc<Guarded>>,
    /// All ReferenceGrants.
    pub grants: Vec<Arc<ReferenceGrant>>,
    /// All Services.
    pub services: HashMap<Key, Arc<Service>>,
    /// EndpointSlices by Service. The endpoints of a Service without an entry are not known yet.
    pub endpoints: HashMap<Key, Vec<Arc<EndpointSlice>>>,
    /// Zone of each Node that has one, by the Node's name; `None` while nobody needs them, or they are not known yet.
    pub zones: Option<HashMap<String, String>>,
    /// All NetworkPolicies.
    pub policies: network_policy::ByNamespace,
    /// Which addresses of Services are frontends, beside their cluster IPs.
    pub frontends: FrontendRules,
}

/// Why a request, or a part of it, is refused: reason and message of a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The condition's reason, one word in CamelCase.
    pub reason: &'static str,
    /// The condition's message, for people.
    pub message: String,
}

fn refuse<T>(reason: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, message: message.into() })
}

/// Result of the resolution for one CircuitBreaker or annotated Service.
#[derive(Clone, Debug)]
pub struct ResolvedBreaker {
    /// The object that requests protection.
    pub owner: Owner,
    /// Uid of that object.
    pub uid: String,
    /// Generation of the spec that the result is about; 0 for annotations.
    pub generation: i64,
    /// The Service to protect.
    pub service: Key,
    /// Condition Accepted: `Err` if the spec is invalid or conflicts with another object.
    pub accepted: Result<(), Refusal>,
    /// Condition ResolvedRefs: `Err` if a Service, a port or a ReferenceGrant is missing.
    pub resolved: Result<(), Refusal>,
    /// Condition BackupReachable: `Err` if a NetworkPolicy keeps the primary's clients from a backup, or if no backup has
    /// an address of a frontend's IP family.
    pub reachable: Result<(), Refusal>,
    /// The service for the engine, by the Service's port. There is at most one entry: all ports of a Service form one
    /// service, under the port that stands for all of them. Empty if nothing is protected.
    pub ports: BTreeMap<i32, Arc<model::Service>>,
    /// The same for connections from outside of the cluster (node port, load balancer, external IP), if kube-proxy
    /// serves these with other endpoints than the cluster IP: one of the two traffic policies is Local. Otherwise empty,
    /// and their frontends are in `ports`.
    pub outside: BTreeMap<i32, Arc<model::Service>>,
    /// Parts of the request that are not carried out, and side effects of the request, in words for people.
    pub notes: Vec<String>,
    /// The requested spec is not in force: endpoints are not known yet, or the spec is invalid. The previous services
    /// stay in force.
    pub hold: bool,
    /// The endpoints of the Service or of a backup are not known yet.
    pub pending: bool,
    /// The Service has endpoints, but no EndpointSlice has one of its protected ports.
    pub no_slice_has_the_port: bool,
}

impl ResolvedBreaker {
    /// The services for the engine: the Service's port, and whether the service is for connections from outside only.
    pub fn services(&self) -> impl Iterator<Item = (i32, bool, &Arc<model::Service>)> {
        let inside = self.ports.iter().map(|(port, service)| (*port, false, service));
        inside.chain(self.outside.iter().map(|(port, service)| (*port, true, service)))
    }

    /// The same, to change them.
    pub fn services_mut(&mut self) -> impl Iterator<Item = &mut model::Service> {
        self.ports.values_mut().chain(self.outside.values_mut()).map(Arc::make_mut)
    }

    /// Why the request, or a part of it, is refused; `None` if it is not.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        self.accepted.as_ref().err().or(self.resolved.as_ref().err())
    }

    fn keep_services(&mut self, wanted: impl Fn(&model::Service) -> bool) {
        self.ports.retain(|_, service| wanted(service));
        self.outside.retain(|_, service| wanted(service));
    }
}

/// Result of the resolution for all CircuitBreakers and annotated Services.
#[derive(Clone, Debug, Default)]
pub struct Resolution {
    /// CircuitBreakers first, then annotated Services; each group oldest first.
    pub results: Vec<ResolvedBreaker>,
    /// Services whose EndpointSlices must be watched.
    pub wanted: BTreeSet<Key>,
    /// Whether the zones of other Nodes matter.
    pub needs_zones: bool,
    /// When the result changes without a change of an object: the earliest end of an override.
    pub next: Option<Timestamp>,
}

/// The engine's name for a protected port. The name depends only on the Service and the port, so that the state
/// survives when the object that requests protection is replaced. It has at most `NAME_LEN - 1` bytes.
#[must_use]
pub fn engine_name(service: &Key, port: i32, outside: bool) -> ServiceName {
    let port = format!("{port}{}", if outside { "/outside" } else { "" });
    let full = format!("{service}:{port}");
    if full.len() < NAME_LEN {
        return ServiceName::new(&full);
    }
    // A longer name is cut; a checksum of the whole name (FNV-1a, 32 bits) distinguishes the cut names.
    let sum = full.bytes().fold(0x811c_9dc5_u32, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let end = format!("~{sum:08x}:{port}");
    let cut = full.get(..NAME_LEN - 1 - end.len()).unwrap_or_default();
    ServiceName::new(&format!("{cut}{end}"))
}

/// The last valid spec of each owner. While the current spec is invalid, the last valid one stays in force, with the
/// current pods.
pub type LastValidSpecs = HashMap<Owner, Arc<CircuitBreakerSpec>>;

/// Resolves all CircuitBreakers and annotated Services. At most `limit` Services are protected; the others are
/// refused with reason TooMany. `last_valid` is replaced by the specs that are now in force.
#[must_use]
pub fn resolve(
    world: &World,
    policies: &mut Policies,
    last_valid: &mut LastValidSpecs,
    now: Timestamp,
    limit: usize,
) -> Resolution {
    let mut intents: Vec<Intent> = world
        .breakers
        .iter()
        .filter_map(|breaker| breaker.0.as_ref().ok())
        .filter(|breaker| breaker.metadata.deletion_timestamp.is_none())
        .map(|breaker| intent::of_breaker(breaker, now))
        .chain(world.services.values().filter_map(|service| intent::of_service(service)))
        .collect();
    intents.sort_by(|a, b| (a.owner.kind, a.created, &a.owner.key).cmp(&(b.owner.kind, b.created, &b.owner.key)));
    let mut resolution = Resolution::default();
    let mut taken: HashMap<Key, Owner> = HashMap::new();
    let cluster_ips = cluster_ips(world);
    let mut count = 0;
    let mut next_valid = LastValidSpecs::new();
    for intent in intents {
        let mut result = ResolvedBreaker {
            owner: intent.owner.clone(),
            uid: intent.uid.clone(),
            generation: intent.generation,
            service: intent.service.clone(),
            accepted: Ok(()),
            resolved: Ok(()),
            reachable: Ok(()),
            ports: BTreeMap::new(),
            outside: BTreeMap::new(),
            notes: intent.note.into_iter().collect(),
            hold: false,
            pending: false,
            no_slice_has_the_port: false,
        };
        if let Some(first) = taken.get(&intent.service) {
            let why = match (first.kind, intent.owner.kind) {
                (OwnerKind::CircuitBreaker, OwnerKind::Service) => "which takes precedence over annotations",
                _ => "which is older",
            };
            let message = format!("Service {} is already protected by {first}, {why}", intent.service);
            result.accepted = refuse("Conflicted", message);
            resolution.results.push(result);
            continue;
        }
        taken.insert(intent.service.clone(), intent.owner.clone());
        let wanted = match intent.spec {
            Ok(spec) => Some(spec),
            Err(message) => {
                result.accepted = refuse("Invalid", message);
                None
            }
        };
        let mut apply = |spec: &CircuitBreakerSpec, result: &mut ResolvedBreaker| {
            resolution.needs_zones |= spec.topology != Topology::Any;
            let (cluster_ips, wanted) = (&cluster_ips, &mut resolution.wanted);
            Resolver { world, cluster_ips, policies, spec, result, wanted }.resolve(now);
        };
        let wrong = wanted.as_ref().is_none_or(|spec| {
            apply(spec, &mut result);
            result.accepted.is_err()
        });
        let in_force = if wrong { last_valid.get(&intent.owner).cloned() } else { wanted };
        if let (true, Some(spec)) = (wrong, &in_force) {
            // The last valid spec stays in force; condition Accepted still reports the error of the current spec.
            let refused = result.accepted.clone();
            apply(spec, &mut result);
            result.accepted = refused;
        }
        result.hold |= wrong;
        if let Some(spec) = in_force {
            if let Some(until) = spec.until.filter(|until| *until > now && spec.r#override != Override::Auto) {
                resolution.next = Some(resolution.next.map_or(until, |next| next.min(until)));
            }
            next_valid.insert(intent.owner.clone(), spec);
        }
        let needed = result.services().count();
        count += needed;
        if count > limit {
            count -= needed;
            result.keep_services(|_| false);
            result.accepted =
                refuse("TooMany", format!("the limit of {limit} protected Services is reached (agent.maxServices)"));
        }
        // A Service that was made a moment ago has pods that have never been ready.
        let made = world.services.get(&intent.service).and_then(|service| service.metadata.creation_timestamp.as_ref());
        let until = made.and_then(|made| made.0.checked_add(STARTING).ok());
        if let Some(until) = until.filter(|until| *until > now && !result.ports.is_empty()) {
            for service in result.services_mut() {
                service.starting = true;
            }
            resolution.next = Some(resolution.next.map_or(until, |next| next.min(until)));
        }
        for service in result.services_mut() {
            service.override_reason.clone_from(&intent.override_reason);
        }
        resolution.results.push(result);
    }
    claim_frontends(&mut resolution.results);
    *last_valid = next_valid;
    resolution
}

/// Gives each frontend to one service: Kubernetes allows two Services with the same external IP. The first one gets it,
/// but one that only watches (`mode: DryRun`) takes nothing from one that acts.
fn claim_frontends(results: &mut [ResolvedBreaker]) {
    let mut taken: HashSet<Frontend> = HashSet::new();
    for mode in [model::Mode::Enforce, model::Mode::DryRun] {
        for result in &mut *results {
            let mut lost = Vec::new();
            for service in result.services_mut().filter(|service| service.mode == mode) {
                service.frontends.retain(|frontend| {
                    let free = taken.insert(*frontend);
                    if !free {
                        lost.push(format!("{frontend} belongs to another protected Service"));
                    }
                    free
                });
            }
            result.notes.extend(lost);
            result.keep_services(|service| !service.frontends.is_empty());
        }
    }
}

/// The Service that each cluster IP belongs to.
fn cluster_ips(world: &World) -> HashMap<IpAddr, &Key> {
    let all = world.services.iter().flat_map(|(key, service)| service.spec.all_cluster_ips().map(move |ip| (ip, key)));
    all.collect()
}

/// The resolution of one `Intent`.
struct Resolver<'a> {
    world: &'a World,
    cluster_ips: &'a HashMap<IpAddr, &'a Key>,
    policies: &'a mut Policies,
    spec: &'a CircuitBreakerSpec,
    result: &'a mut ResolvedBreaker,
    wanted: &'a mut BTreeSet<Key>,
}

impl<'a> Resolver<'a> {
    fn resolve(&mut self, now: Timestamp) {
        match self.try_resolve(now) {
            Ok(()) => {}
            Err(refusal) => self.result.resolved = Err(refusal),
        }
    }

    fn try_resolve(&mut self, now: Timestamp) -> Result<(), Refusal> {
        let world = self.world;
        let key = self.result.service.clone();
        let Some(service) = world.services.get(&key) else {
            return refuse("ServiceNotFound", format!("there is no Service {key}"));
        };
        let ports = self.ports(service)?;
        let backups = self.backups();
        self.wanted.insert(key.clone());
        for backup in &backups {
            self.wanted.insert(backup.key.clone());
        }
        if backups.is_empty() {
            // `backups` has put the reason into `resolved`.
            return Ok(());
        }
        let missing =
            std::iter::once(&key).chain(backups.iter().map(|b| &b.key)).find(|k| !world.endpoints.contains_key(*k));
        if missing.is_some() {
            self.result.hold = true;
            self.result.pending = true;
            return Ok(());
        }
        match self.port_plans(now, &key, service, &ports, &backups) {
            Ok(plans) => {
                if plans.is_empty() {
                    self.note(format!("Service {key} has no address yet"));
                }
                let (outside, rest): (Vec<_>, Vec<_>) = plans.into_iter().partition(|plan| plan.outside);
                if let Some((port, service)) = self.merge(&key, rest) {
                    self.result.ports.insert(port, service);
                }
                if let Some((port, service)) = self.merge(&key, outside) {
                    self.result.outside.insert(port, service);
                }
            }
            Err(message) => {
                let message = match self.result.owner.kind {
                    OwnerKind::Service => annotations::in_words_of_annotations(&message),
                    OwnerKind::CircuitBreaker => message,
                };
                self.result.accepted = refuse("Invalid", message);
            }
        }
        Ok(())
    }

    /// Adds a note, unless the result has it already.
    pub(super) fn note(&mut self, note: String) {
        if !self.result.notes.contains(&note) {
            self.result.notes.push(note);
        }
    }

    /// A Service's name for messages: without the namespace if it is the owner's namespace.
    pub(super) fn short_name(&self, key: &Key) -> String {
        if key.namespace == self.result.owner.key.namespace { key.name.clone() } else { key.to_string() }
    }
}

#[cfg(test)]
mod tests;
