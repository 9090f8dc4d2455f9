//! From what the API says to what the engine gets: pure, so that every rule about Services, EndpointSlices, grants and
//! conflicts is here and can be tried without a cluster.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use breaker_common::NAME_LEN;
use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{
    api::{
        Backup, Check, CircuitBreaker, CircuitBreakerSpec, FastPath, GROUP, Override, Port, ReferenceGrant, Topology,
    },
    endpoints::{Endpoint, Endpoints, Family},
    network_policy,
    objects::{EndpointSlice, Service, ServicePort},
    policy::Policies,
    wish::{self, Key, Owner, OwnerKind, Wish},
};
use crate::model::{self, Backend, Frontend, Protocol, ServiceName, Tier};

/// How long kube-proxy may take to write its rules for an endpoint that it heard of (its minSyncPeriod is 1 s by default,
/// and a sync takes a moment).
const SETTLE: Duration = Duration::from_secs(2);

/// The node that an agent is on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its uid, once known.
    pub uid: Option<String>,
    /// Its addresses: where NodePorts answer.
    pub addresses: Vec<IpAddr>,
    /// Whether Kubernetes hears of it.
    pub ready: bool,
    /// Its zone (label topology.kubernetes.io/zone).
    pub zone: Option<String>,
}

impl NodeView {
    /// Whether an endpoint is on it.
    fn has(&self, endpoint: &Endpoint) -> bool {
        endpoint.node.as_deref() == Some(self.name.as_str())
    }
}

/// What the API says, at one moment.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// This node.
    pub node: NodeView,
    /// All CircuitBreakers.
    pub breakers: Vec<Arc<CircuitBreaker>>,
    /// All grants.
    pub grants: Vec<Arc<ReferenceGrant>>,
    /// All Services.
    pub services: HashMap<Key, Arc<Service>>,
    /// Slices by Service; no entry = not known yet.
    pub endpoints: HashMap<Key, Vec<Arc<EndpointSlice>>>,
    /// NetworkPolicies.
    pub policies: network_policy::ByNamespace,
}

/// Why something cannot be had: a condition's reason and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One word in CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

fn refuse<T>(reason: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, message: message.into() })
}

/// What came of a wish.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Who asked.
    pub owner: Owner,
    /// Its uid.
    pub uid: String,
    /// The generation that this is about.
    pub generation: i64,
    /// The Service to protect.
    pub service: Key,
    /// Condition Accepted.
    pub accepted: Result<(), Refusal>,
    /// Condition ResolvedRefs.
    pub resolved: Result<(), Refusal>,
    /// Condition BackupReachable.
    pub reachable: Result<(), Refusal>,
    /// What the engine gets, by the Service's port.
    pub ports: BTreeMap<i32, model::Service>,
    /// What was asked for and is not done, in words.
    pub notes: Vec<String>,
    /// What is asked for is not in force: something is not known yet, or it is wrong, and what was good before goes on.
    pub hold: bool,
    /// Endpoints are not known yet.
    pub pending: bool,
}

/// What came of all wishes.
#[derive(Clone, Debug, Default)]
pub struct Resolution {
    /// By age, oldest first.
    pub subjects: Vec<Subject>,
    /// Services whose endpoints are needed.
    pub wanted: BTreeSet<Key>,
    /// When time alone changes the outcome: an override ends.
    pub next: Option<Timestamp>,
}

/// The name that the engine knows a protected port by: the same whoever asks for it, so that its state survives when the
/// object that asks is replaced.
#[must_use]
pub fn engine_name(service: &Key, port: i32) -> ServiceName {
    let full = format!("{service}:{port}");
    if full.len() < NAME_LEN {
        return ServiceName::new(&full);
    }
    // Names that do not fit are cut, and told apart by a sum over the whole (FNV-1a, 32 bits).
    let sum = full.bytes().fold(0x811c_9dc5_u32, |sum, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let end = format!("~{sum:08x}:{port}");
    let cut = full.get(..NAME_LEN - 1 - end.len()).unwrap_or_default();
    ServiceName::new(&format!("{cut}{end}"))
}

/// The last spec of each owner that could be carried out: what a wrong one leaves in force, on the pods of now.
pub type Good = HashMap<Owner, Arc<CircuitBreakerSpec>>;

/// Resolves everything. `limit` is how many ports can be protected.
#[must_use]
pub fn resolve(world: &World, policies: &mut Policies, good: &mut Good, now: Timestamp, limit: usize) -> Resolution {
    let mut wishes: Vec<Wish> = world
        .breakers
        .iter()
        .filter(|breaker| breaker.metadata.deletion_timestamp.is_none())
        .map(|breaker| wish::of_breaker(breaker))
        .chain(world.services.values().filter_map(|service| wish::of_service(service)))
        .collect();
    wishes.sort_by(|a, b| (a.owner.kind, a.created, &a.owner.key).cmp(&(b.owner.kind, b.created, &b.owner.key)));
    let mut resolution = Resolution::default();
    let mut taken: HashMap<Key, Owner> = HashMap::new();
    let mut frontends: HashSet<Frontend> = HashSet::new();
    let mut count = 0;
    let mut next_good = Good::new();
    for wish in wishes {
        let mut subject = Subject {
            owner: wish.owner.clone(),
            uid: wish.uid.clone(),
            generation: wish.generation,
            service: wish.service.clone(),
            accepted: Ok(()),
            resolved: Ok(()),
            reachable: Ok(()),
            ports: BTreeMap::new(),
            notes: Vec::new(),
            hold: false,
            pending: false,
        };
        if let Some(first) = taken.get(&wish.service) {
            let why = match (first.kind, wish.owner.kind) {
                (OwnerKind::CircuitBreaker, OwnerKind::Service) => "which goes before annotations",
                _ => "which is older",
            };
            let message = format!("Service {} is protected by {first} already, {why}", wish.service);
            subject.accepted = refuse("Conflicted", message);
            resolution.subjects.push(subject);
            continue;
        }
        taken.insert(wish.service.clone(), wish.owner.clone());
        let wanted = match wish.spec {
            Ok(spec) => Some(spec),
            Err(message) => {
                subject.accepted = refuse("Invalid", message);
                None
            }
        };
        let wrong = wanted.as_ref().is_none_or(|spec| {
            let mut work = Work { world, policies, spec, subject: &mut subject, wanted: &mut resolution.wanted };
            work.resolve(now);
            subject.accepted.is_err()
        });
        let in_force = if wrong { good.get(&wish.owner).cloned() } else { wanted };
        if let (true, Some(spec)) = (wrong, &in_force) {
            // What was asked for before goes on; that it is not what is asked for now stays said.
            let refused = subject.accepted.clone();
            let mut work = Work { world, policies, spec, subject: &mut subject, wanted: &mut resolution.wanted };
            work.resolve(now);
            subject.accepted = refused;
        }
        subject.hold |= wrong;
        if let Some(spec) = in_force {
            if let Some(until) = spec.until.filter(|until| *until > now && spec.r#override != Override::Auto) {
                resolution.next = Some(resolution.next.map_or(until, |next| next.min(until)));
            }
            next_good.insert(wish.owner.clone(), spec);
        }
        // A frontend belongs to one service; Kubernetes lets two Services name one external IP.
        for (port, service) in &mut subject.ports {
            service.frontends.retain(|frontend| {
                let free = frontends.insert(*frontend);
                if !free {
                    subject.notes.push(format!("{frontend} (port {port}) belongs to an older Service"));
                }
                free
            });
        }
        subject.ports.retain(|_, service| !service.frontends.is_empty());
        count += subject.ports.len();
        if count > limit {
            count -= subject.ports.len();
            subject.ports.clear();
            subject.accepted =
                refuse("TooMany", format!("{limit} ports are protected already, and a node has room for no more"));
        }
        resolution.subjects.push(subject);
    }
    *good = next_good;
    resolution
}

/// One wish being resolved.
struct Work<'a> {
    world: &'a World,
    policies: &'a mut Policies,
    spec: &'a CircuitBreakerSpec,
    subject: &'a mut Subject,
    wanted: &'a mut BTreeSet<Key>,
}

/// A backup that can be used.
struct Found<'a> {
    wish: &'a Backup,
    key: Key,
    priority: i32,
    service: &'a Service,
}

impl<'a> Work<'a> {
    fn resolve(&mut self, now: Timestamp) {
        match self.try_resolve(now) {
            Ok(()) => {}
            Err(refusal) => self.subject.resolved = Err(refusal),
        }
    }

    fn try_resolve(&mut self, now: Timestamp) -> Result<(), Refusal> {
        let world = self.world;
        let key = self.subject.service.clone();
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
            // Why is in `resolved` already.
            return Ok(());
        }
        let missing =
            std::iter::once(&key).chain(backups.iter().map(|b| &b.key)).find(|k| !world.endpoints.contains_key(*k));
        if missing.is_some() {
            self.subject.hold = true;
            self.subject.pending = true;
            return Ok(());
        }
        match self.legs(now, &key, service, &ports, &backups) {
            Ok(legs) => {
                if let Some((port, service)) = self.join(&key, legs) {
                    self.subject.ports.insert(port, service);
                }
            }
            Err(message) => self.subject.accepted = refuse("Invalid", message),
        }
        Ok(())
    }

    /// Every port in every family, those with TCP first: what is checked is a pod's first port.
    fn legs(
        &mut self,
        now: Timestamp,
        key: &Key,
        service: &Service,
        ports: &[&ServicePort],
        backups: &[Found<'_>],
    ) -> Result<Vec<Leg>, String> {
        let mut ports = ports.to_vec();
        ports.sort_by_key(|port| port.protocol() != "TCP");
        let families =
            if service.spec.cluster_ip.contains(':') { [Family::V6, Family::V4] } else { [Family::V4, Family::V6] };
        let checked = self.spec.check.as_ref().is_some_and(|check| !names_a_port(check));
        if checked && ports.first().is_some_and(|port| port.protocol() != "TCP") {
            return Err(format!(
                "check: no TCP port of Service {key} is protected, so nothing says which one is asked; allowed: a check with a port"
            ));
        }
        let mut legs = Vec::new();
        if service.spec.internal_traffic_policy.as_deref() == Some("Local") {
            self.note(
                "internalTrafficPolicy: Local is not kept while it is open: backups on any node take over".into(),
            );
        }
        if is_local(service) {
            self.note(
                "externalTrafficPolicy: Local: clients outside keep their address toward backups of the node that they \
                 come in by; where it has none, they are masqueraded"
                    .into(),
            );
        }
        if self.spec.fast_path == FastPath::PeerRedirect {
            self.note(
                "fastPath: PeerRedirect: netfilter and its NetworkPolicies do not see what goes to a backup of the node that \
                 it comes from or comes in by; clients outside keep their address there"
                    .into(),
            );
        }
        for port in ports {
            for family in families {
                match self.leg(now, key, service, port, family, backups) {
                    Ok(leg) => legs.extend(leg),
                    // A port that cannot be backed up leaves the others alone.
                    Err(Problem::Ref(refusal)) => self.subject.resolved = Err(refusal),
                    Err(Problem::Invalid(message)) => return Err(message),
                }
            }
        }
        Ok(legs)
    }

    /// One service of all legs. The first one whose pods are there gives the backends their addresses; what the others call
    /// them is in routes.
    fn join(&mut self, key: &Key, mut legs: Vec<Leg>) -> Option<(i32, model::Service)> {
        if legs.is_empty() {
            self.note(format!("Service {key} has no address yet"));
            return None;
        }
        let first = legs.iter().position(|leg| !leg.service.primary.backends.is_empty()).unwrap_or(0);
        let base = legs.remove(first);
        let mut service = base.service;
        let identities: HashMap<&str, SocketAddr> =
            base.pods.iter().map(|(address, pod)| (pod.as_str(), *address)).collect();
        for leg in &legs {
            let backends = leg
                .pods
                .iter()
                .filter_map(|(address, pod)| Some((*identities.get(pod.as_str())?, *address)))
                .collect::<BTreeMap<_, _>>();
            let backups = service.backups.iter().flat_map(|tier| &tier.backends);
            let named = backups.clone().filter(|b| backends.contains_key(&b.address)).count();
            if named < backups.count() {
                let shown: Vec<String> = leg.service.frontends.iter().map(ToString::to_string).collect();
                let note = format!("not all pods of the backups can be reached from {}", shown.join(", "));
                self.note(note);
            }
            service.frontends.extend(&leg.service.frontends);
            service.keep_client.frontends.extend(&leg.service.keep_client.frontends);
            service.routes.push(model::Route { frontends: leg.service.frontends.clone(), backends });
        }
        service.name = engine_name(key, base.port);
        Some((base.port, service))
    }

    /// The ports to protect.
    fn ports(&mut self, service: &'a Service) -> Result<Vec<&'a ServicePort>, Refusal> {
        let key = &self.subject.service;
        let spec = &service.spec;
        if spec.r#type == "ExternalName" {
            let message = format!(
                "Service {key} is an ExternalName: its clients connect to another host, no address of it is here"
            );
            return refuse("ExternalName", message);
        }
        if spec.cluster_ip.is_empty() || spec.cluster_ip == "None" {
            let message = format!(
                "Service {key} is headless: its clients connect to the pods themselves, there is no address to redirect"
            );
            return refuse("Headless", message);
        }
        let all = spec.ports.as_slice();
        let Some(wanted) = &self.spec.service.ports else {
            let others: Vec<String> = all
                .iter()
                .filter(|port| protocol_of(port).is_none())
                .map(|port| format!("{}/{}", port.port, port.protocol()))
                .collect();
            if !others.is_empty() {
                self.subject.notes.push(format!("not protected, TCP and UDP only: {}", others.join(", ")));
            }
            let ports: Vec<_> = all.iter().filter(|port| protocol_of(port).is_some()).collect();
            if ports.is_empty() {
                return refuse("ProtocolNotSupported", format!("Service {key} has no TCP or UDP port"));
            }
            return Ok(ports);
        };
        let mut chosen = Vec::new();
        for wanted in wanted {
            let named: Vec<_> = all.iter().filter(|port| is_named(port, wanted)).collect();
            if named.is_empty() {
                let message = format!("Service {key} has no port {wanted}; it has {}", names_of(all));
                return refuse("PortNotFound", message);
            }
            // A number may be a TCP and a UDP port.
            let known: Vec<_> = named.iter().filter(|port| protocol_of(port).is_some()).copied().collect();
            if known.is_empty() {
                let message = format!(
                    "port {wanted} of Service {key} is {}; allowed: TCP, UDP",
                    named.first().map_or("", |port| port.protocol())
                );
                return refuse("ProtocolNotSupported", message);
            }
            chosen.extend(known);
        }
        Ok(chosen)
    }

    /// The backups that exist and may be used. What is wrong with the others goes to `resolved`.
    fn backups(&mut self) -> Vec<Found<'a>> {
        let from = self.subject.owner.key.namespace.clone();
        let mut found = Vec::new();
        for (place, wish) in self.spec.backups.iter().enumerate() {
            let namespace = wish.namespace.as_deref().unwrap_or(&from);
            let key = Key::new(namespace, &wish.name);
            let outcome = if namespace != from && !self.is_granted(&from, &key) {
                refuse(
                    "RefNotPermitted",
                    format!(
                        "no ReferenceGrant in namespace {namespace} allows namespace {from} to use Service {}",
                        key.name
                    ),
                )
            } else if key == self.subject.service {
                refuse("BackupIsPrimary", format!("Service {key} cannot be its own backup"))
            } else {
                match self.world.services.get(&key) {
                    None => refuse("BackupNotFound", format!("there is no Service {key}")),
                    Some(service) if service.spec.r#type == "ExternalName" => refuse(
                        "ExternalName",
                        format!("Service {key} is an ExternalName: a name has no endpoints to send to"),
                    ),
                    Some(service) => Ok(service),
                }
            };
            match outcome {
                Ok(service) => {
                    let priority = wish.priority.unwrap_or_else(|| i32::try_from(place).unwrap_or(i32::MAX));
                    found.push(Found { wish, key, priority, service });
                }
                Err(refusal) => self.subject.resolved = Err(refusal),
            }
        }
        found.sort_by_key(|found| found.priority);
        found
    }

    fn is_granted(&self, from: &str, to: &Key) -> bool {
        self.world.grants.iter().filter(|grant| grant.namespace().as_deref() == Some(&to.namespace)).any(|grant| {
            let who =
                grant.spec.from.iter().any(|f| f.group == GROUP && f.kind == "CircuitBreaker" && f.namespace == from);
            let what = grant.spec.to.iter().any(|t| {
                t.group.is_empty() && t.kind == "Service" && t.name.as_ref().is_none_or(|name| *name == to.name)
            });
            who && what
        })
    }

    /// One protected port in one family; `None` where the Service has no address of the family.
    fn leg(
        &mut self,
        now: Timestamp,
        key: &Key,
        service: &Service,
        port: &ServicePort,
        family: Family,
        backups: &[Found<'_>],
    ) -> Result<Option<Leg>, Problem> {
        let Some(protocol) = protocol_of(port) else { return Ok(None) };
        let frontends = self.frontends(service, port, protocol, family);
        if frontends.is_empty() {
            return Ok(None);
        }
        let primary = Endpoints::of(&self.world.endpoints[key], port.name.as_deref(), protocol.name(), family);
        let override_ = match self.spec.until {
            Some(until) if until <= now => Override::Auto,
            _ => self.spec.r#override,
        };
        let check = |check: Option<&Check>, key: &Key| -> Result<Option<Check>, Problem> {
            let Some(check) = check else { return Ok(None) };
            let slices = &self.world.endpoints[key];
            // A Service without endpoints has slices without ports: nobody will be asked, so any number does.
            let nobody = slices.iter().all(|slice| slice.endpoints.is_empty());
            let of = |name: &str, family| Endpoints::of(slices, Some(name), "TCP", family).port;
            let number = |name: &str| of(name, Family::V4).or(of(name, Family::V6)).or(nobody.then_some(1));
            numbered(check, number).map(Some).map_err(|name| {
                Problem::Ref(Refusal {
                    reason: "PortNotFound",
                    message: format!("the check's port {name:?} is no port of Service {key} with endpoints"),
                })
            })
        };
        let primary_check = check(self.spec.check.as_ref(), key)?;
        let mut tiers: Vec<(Vec<&Found<'_>>, Option<Check>)> = Vec::new();
        let mut last_priority = None;
        for found in backups {
            let own = check(found.wish.check.as_ref().or(self.spec.check.as_ref()), &found.key)?;
            match tiers.last_mut() {
                Some((members, check)) if last_priority == Some(found.priority) => {
                    if *check != own {
                        return Err(Problem::Invalid(format!(
                            "backups: {} and {} have the same priority and different checks; allowed: one check for a priority",
                            members[0].key, found.key
                        )));
                    }
                    members.push(found);
                }
                _ => tiers.push((vec![found], own)),
            }
            last_priority = Some(found.priority);
        }
        let checks: Vec<Option<&Check>> = tiers.iter().map(|(_, check)| check.as_ref()).collect();
        let template =
            self.policies.get(self.spec, override_, primary_check.as_ref(), &checks).map_err(Problem::Invalid)?;
        let avoid: BTreeSet<SocketAddr> =
            primary.all().map(|e| e.address).chain(frontends.iter().map(|f| f.address)).collect();
        let mut pods: BTreeMap<SocketAddr, String> = primary.all().map(|e| (e.address, e.pod.clone())).collect();
        let mut backup_tiers = Vec::new();
        let mut keep_client = model::KeepClient { frontends: self.outside(service, &frontends), ..Default::default() };
        for ((members, _), model) in tiers.iter().zip(&template.backups) {
            let mut pools = Vec::new();
            for found in members {
                let endpoints = self.backup_endpoints(found, port, protocol, family)?;
                pods.extend(endpoints.all().map(|e| (e.address, e.pod.clone())));
                self.ask_policies(protocol, (key, service, &primary), (&found.key, found.service, &endpoints));
                if !keep_client.frontends.is_empty() {
                    keep_client.backends.extend(endpoints.all().filter(|e| self.world.node.has(e)).map(|e| e.address));
                }
                let shared = endpoints.all().filter(|e| avoid.contains(&e.address)).count();
                if shared > 0 {
                    let note = format!(
                        "{shared} pods of {} are pods of the primary too, and are left out as backup",
                        found.key
                    );
                    self.note(note);
                }
                pools.push((found, endpoints.without(&avoid)));
            }
            let name = members.iter().map(|found| self.shown(&found.key)).collect::<Vec<_>>().join("+");
            backup_tiers.extend(self.split(&name, &pools, model));
        }
        let service = model::Service {
            frontends,
            primary: Tier {
                name: self.shown(key),
                backends: primary.usable().map(|e| Backend { address: e.address, weight: 1 }).collect(),
                draining: Vec::new(),
                ..template.primary.clone()
            },
            backups: backup_tiers,
            settle: SETTLE,
            keep_client,
            ..template.as_ref().clone()
        };
        Ok(Some(Leg { port: port.port, service, pods }))
    }

    /// Whether a NetworkPolicy keeps the primary's clients from a backup's pods. The first one is told.
    fn ask_policies(
        &mut self,
        protocol: Protocol,
        primary: (&Key, &Service, &Endpoints),
        backup: (&Key, &Service, &Endpoints),
    ) {
        if self.world.policies.is_empty() || self.subject.reachable.is_err() {
            return;
        }
        let sides = [primary, backup];
        let addresses = sides.map(|(.., pods)| pods.usable().map(|e| e.address).collect::<Vec<_>>());
        // Where there is nobody, nothing can be said of ports and addresses.
        if addresses.iter().any(Vec::is_empty) {
            return;
        }
        let names = sides.map(|(key, ..)| self.shown(key));
        let pods = |side: usize| network_policy::Pods {
            name: &names[side],
            namespace: &sides[side].0.namespace,
            labels: &sides[side].1.spec.selector,
            protocol: protocol.name(),
            addresses: &addresses[side],
        };
        if let Some(message) = network_policy::obstacle(&self.world.policies, &pods(0), &pods(1)) {
            self.subject.reachable = refuse("NetworkPolicy", message);
        }
    }

    /// Something to tell, once.
    fn note(&mut self, note: String) {
        if !self.subject.notes.contains(&note) {
            self.subject.notes.push(note);
        }
    }

    /// A Service's name as this one's owner would write it.
    fn shown(&self, key: &Key) -> String {
        if key.namespace == self.subject.owner.key.namespace { key.name.clone() } else { key.to_string() }
    }

    /// Where clients connect to.
    fn frontends(
        &mut self,
        service: &Service,
        port: &ServicePort,
        protocol: Protocol,
        family: Family,
    ) -> Vec<Frontend> {
        let spec = &service.spec;
        let number = u16::try_from(port.port).unwrap_or_default();
        let cluster = spec.cluster_ips.iter().chain([&spec.cluster_ip]);
        let external = spec.external_ips.iter();
        let balancers = service.status.load_balancer.ingress.iter();
        // netfilter drops sources out of the range before they are translated; we would be earlier than it.
        let limited = !spec.load_balancer_source_ranges.is_empty();
        if limited && !service.status.load_balancer.ingress.is_empty() {
            self.note("addresses of its load balancer are not protected: it has loadBalancerSourceRanges".into());
        }
        let balancers = balancers.filter(|_| !limited);
        // With ipMode Proxy the packets come with the balancer's own idea of a destination.
        let balancers = balancers.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_ref());
        let mut addresses: BTreeSet<SocketAddr> = cluster
            .chain(external)
            .chain(balancers)
            .filter_map(|ip| ip.parse::<IpAddr>().ok())
            .map(|ip| SocketAddr::new(ip, number))
            .collect();
        if let Some(node_port) = port.node_port.and_then(|p| u16::try_from(p).ok()).filter(|p| *p > 0) {
            addresses.extend(self.world.node.addresses.iter().map(|ip| SocketAddr::new(*ip, node_port)));
        }
        let ours = addresses.into_iter().filter(|address| Family::of(*address) == family);
        ours.map(|address| Frontend { address, protocol }).collect()
    }

    /// Frontends whose clients outside keep their address: all but the cluster IPs, with `externalTrafficPolicy: Local`.
    fn outside(&self, service: &Service, frontends: &[Frontend]) -> BTreeSet<Frontend> {
        let inside = |ip: IpAddr| {
            let mut cluster = service.spec.cluster_ips.iter().chain([&service.spec.cluster_ip]);
            cluster.any(|own| own.parse() == Ok(ip))
        };
        let outside = frontends.iter().filter(|frontend| !inside(frontend.address.ip()));
        if is_local(service) { outside.copied().collect() } else { BTreeSet::new() }
    }

    /// A backup's endpoints for a protected port.
    fn backup_endpoints(
        &self,
        found: &Found<'_>,
        port: &ServicePort,
        protocol: Protocol,
        family: Family,
    ) -> Result<Endpoints, Problem> {
        let ports: Vec<&ServicePort> =
            found.service.spec.ports.iter().filter(|port| port.protocol() == protocol.name()).collect();
        let by = |wanted: &Port| ports.iter().find(|p| is_named(p, wanted)).copied();
        let chosen = match &found.wish.port {
            Some(wanted) => by(wanted),
            None => port
                .name
                .as_ref()
                .and_then(|name| by(&Port::Name(name.clone())))
                .or_else(|| by(&Port::Number(i64::from(port.port))))
                .or_else(|| if let [only] = ports[..] { Some(only) } else { None }),
        };
        let Some(chosen) = chosen else {
            let wanted = found.wish.port.as_ref().map_or_else(
                || format!("port {}, by name, number or being the only one", port.port),
                |wanted| format!("port {wanted}"),
            );
            return Err(Problem::Ref(Refusal {
                reason: "PortNotFound",
                message: format!(
                    "Service {} has no {} port that could stand in for {wanted}",
                    found.key,
                    protocol.name()
                ),
            }));
        };
        Ok(Endpoints::of(&self.world.endpoints[&found.key], chosen.name.as_deref(), protocol.name(), family))
    }

    /// A priority's endpoints, as one tier or, where the near ones are preferred, as several.
    fn split(&self, name: &str, pools: &[(&&Found<'_>, Endpoints)], model: &Tier) -> Vec<Tier> {
        let node = &self.world.node;
        let same_zone = |e: &Endpoint| node.zone.is_some() && e.zone == node.zone;
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
        for (rank_, weights) in [0, 1, 2].map(|r| (r, shares(pools, |e| rank(e) == r))) {
            if !weights.is_empty() {
                tiers.entry(rank_).or_insert_with(|| empty(rank_)).backends = weights;
            }
        }
        let draining: Vec<SocketAddr> = pools.iter().flat_map(|(_, e)| e.draining()).map(|e| e.address).collect();
        // A backup without endpoints is still one: it shows, and it comes back.
        let last = tiers.len().checked_sub(1);
        let mut tiers: Vec<Tier> = tiers.into_values().collect();
        match last.and_then(|last| tiers.get_mut(last)) {
            Some(tier) => tier.draining = draining,
            None => tiers.push(Tier { draining, ..empty(2) }),
        }
        tiers
    }
}

/// Backends of several Services, each Service with its weight whatever the number of its pods.
fn shares(pools: &[(&&Found<'_>, Endpoints)], wanted: impl Fn(&Endpoint) -> bool) -> Vec<Backend> {
    let members: Vec<(u64, Vec<&Endpoint>)> = pools
        .iter()
        .map(|(found, endpoints)| {
            (
                u64::try_from(found.wish.weight).unwrap_or(1),
                endpoints.usable().filter(|e| wanted(e)).collect::<Vec<_>>(),
            )
        })
        .filter(|(_, endpoints)| !endpoints.is_empty())
        .collect();
    if members.len() == 1 {
        return members[0].1.iter().map(|e| Backend { address: e.address, weight: 1 }).collect();
    }
    // The heaviest pod gets 1000, the others in proportion; none less than 1.
    let per_pod = |weight: u64, pods: usize| weight * 1_000_000 / pods as u64;
    let most = members.iter().map(|(weight, pods)| per_pod(*weight, pods.len())).max().unwrap_or(1).max(1);
    let weight = |w: u64, pods: usize| u16::try_from((per_pod(w, pods) * 1000 / most).max(1)).unwrap_or(1000);
    members
        .iter()
        .flat_map(|(w, pods)| pods.iter().map(move |e| Backend { address: e.address, weight: weight(*w, pods.len()) }))
        .collect()
}

/// A Service's port in one family.
struct Leg {
    port: i32,
    /// As if it were the only one; without a name.
    service: model::Service,
    /// The pods behind the addresses, those of primary and backups, those that drain included.
    pods: BTreeMap<SocketAddr, String>,
}

enum Problem {
    Ref(Refusal),
    Invalid(String),
}

/// Whether clients outside are to keep their address.
fn is_local(service: &Service) -> bool {
    service.spec.external_traffic_policy.as_deref() == Some("Local")
}

fn is_named(port: &ServicePort, wanted: &Port) -> bool {
    match wanted {
        Port::Number(number) => i64::from(port.port) == *number,
        Port::Name(name) => port.name.as_ref() == Some(name),
    }
}

fn protocol_of(port: &ServicePort) -> Option<Protocol> {
    match port.protocol() {
        "TCP" => Some(Protocol::Tcp),
        "UDP" => Some(Protocol::Udp),
        _ => None,
    }
}

/// Whether a check says which port it asks.
fn names_a_port(check: &Check) -> bool {
    check.http_get.as_ref().is_some_and(|action| action.port.is_some())
        || check.tcp_socket.as_ref().is_some_and(|action| action.port.is_some())
        || check.grpc.as_ref().is_some_and(|action| action.port.is_some())
}

fn names_of(ports: &[ServicePort]) -> String {
    let name = |port: &ServicePort| match &port.name {
        Some(name) => format!("{name} ({})", port.port),
        None => port.port.to_string(),
    };
    ports.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// A check with numbers for the names of ports.
fn numbered(check: &Check, number: impl Fn(&str) -> Option<u16>) -> Result<Check, String> {
    let mut check = check.clone();
    let ports = [
        check.http_get.as_mut().and_then(|action| action.port.as_mut()),
        check.tcp_socket.as_mut().and_then(|action| action.port.as_mut()),
        check.grpc.as_mut().and_then(|action| action.port.as_mut()),
    ];
    for port in ports.into_iter().flatten() {
        if let Port::Name(name) = port {
            let found = number(name).ok_or_else(|| name.clone())?;
            *port = Port::Number(i64::from(found));
        }
    }
    Ok(check)
}
