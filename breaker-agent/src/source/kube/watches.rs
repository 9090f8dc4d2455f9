//! All watches of an agent.
//!
//! The agent watches all Services, as kube-proxy does, because no selector can match annotations. It also watches all
//! CircuitBreakers, ReferenceGrants and NetworkPolicies. EndpointSlices are the most numerous and change most often,
//! so it watches only those of referenced Services: one watch per namespace, by label. Of the Nodes it watches only
//! its own, or all of them while a CircuitBreaker prefers pods of its zone. It does not watch pods, because EndpointSlices contain all that it needs about pods. All objects are
//! trimmed before they are stored.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io::{BufRead as _, BufReader},
    sync::Arc,
};

use breaker_api::crd::{CircuitBreaker, OVERRIDE_ANNOTATION, REASON_ANNOTATION, ReferenceGrant, UNTIL_ANNOTATION};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::{
    Api, Client, ResourceExt as _,
    runtime::{
        reflector::{self, ObjectRef},
        watcher,
    },
};

use super::{
    intent::Key,
    kube_proxy::KubeProxy,
    network_policy,
    objects::{EndpointSlice, Guarded, Node, NodeStatus, Service},
    resolve::{NodeView, World},
    watch::{Observer, Watch, always},
};
use crate::config::FrontendRules;

/// The label with the name of an EndpointSlice's Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Maximum number of names in a label selector, which is a part of the URL. With more names, all EndpointSlices of
/// the namespace are watched.
const MOST_NAMES: usize = 64;

/// The annotations of a CircuitBreaker that the agent reads.
const ANNOTATIONS: [&str; 3] = [OVERRIDE_ANNOTATION, UNTIL_ANNOTATION, REASON_ANNOTATION];

/// All watches of an agent.
pub(super) struct Watches {
    client: Client,
    observer: Observer,
    node_name: String,
    breakers: Watch<Guarded>,
    grants: Watch<ReferenceGrant>,
    services: Watch<Service>,
    nodes: Watch<Node>,
    /// All Nodes, for their zones, while a CircuitBreaker needs them.
    zones: Option<Watch<Node>>,
    policies: Watch<NetworkPolicy>,
    slices: BTreeMap<String, NamespaceSlices>,
    /// Each CircuitBreaker in the last version that could be parsed.
    last_parsed: HashMap<ObjectRef<Guarded>, Arc<Guarded>>,
}

/// The watch on the EndpointSlices of one namespace.
struct NamespaceSlices {
    names: BTreeSet<String>,
    watch: Watch<EndpointSlice>,
    /// The previous watch, and the Service names that it covers. Kept until the new watch is ready.
    before: Option<(BTreeSet<String>, Watch<EndpointSlice>)>,
}

impl Watches {
    pub(super) fn start(client: &Client, node_name: &str, observer: &Observer) -> Self {
        let all = watcher::Config::default;
        Self {
            breakers: Watch::start(
                Api::all(client.clone()),
                all(),
                "CircuitBreakers".into(),
                observer.clone(),
                |breaker: &mut Guarded| {
                    // `status.nodes` is for people, and is the largest part of the object.
                    if let Some(status) = breaker.0.as_mut().ok().and_then(|breaker| breaker.status.as_mut()) {
                        status.nodes = Vec::new();
                    }
                    breaker.annotations_mut().retain(|name, _| ANNOTATIONS.contains(&name.as_str()));
                    if let Err(error) = &breaker.0 {
                        tracing::warn!(
                            "CircuitBreaker {}/{} cannot be parsed (its last valid version stays in use): {error}",
                            breaker.namespace().unwrap_or_default(),
                            breaker.name_any()
                        );
                    }
                },
                // A status does not affect the resolution, so a change of the status alone is ignored. The reason of an
                // override is read together with the override.
                |old, new| match (&old.0, &new.0) {
                    (Ok(old), Ok(new)) => {
                        let key = |b: &CircuitBreaker| {
                            let forced =
                                [OVERRIDE_ANNOTATION, UNTIL_ANNOTATION].map(|name| b.annotations().get(name).cloned());
                            (b.uid(), b.metadata.deletion_timestamp.clone(), forced)
                        };
                        old.spec != new.spec
                            || old.metadata.generation != new.metadata.generation
                            || key(old) != key(new)
                    }
                    _ => true,
                },
            ),
            grants: Watch::start(
                Api::all(client.clone()),
                all(),
                "ReferenceGrants".into(),
                observer.clone(),
                |grant: &mut ReferenceGrant| grant.annotations_mut().clear(),
                always,
            ),
            services: Watch::start(
                Api::all(client.clone()),
                all(),
                "Services".into(),
                observer.clone(),
                trim_service,
                always,
            ),
            nodes: Watch::start(
                Api::all(client.clone()),
                all().fields(&format!("metadata.name={node_name}")),
                "this Node".into(),
                observer.clone(),
                trim_node,
                |old, new| node_view("", Some(old)) != node_view("", Some(new)),
            ),
            policies: Watch::start(
                Api::all(client.clone()),
                all(),
                "NetworkPolicies".into(),
                observer.clone(),
                |policy: &mut NetworkPolicy| {
                    policy.annotations_mut().clear();
                    policy.labels_mut().clear();
                },
                |old, new| old.spec != new.spec,
            ),
            zones: None,
            slices: BTreeMap::new(),
            last_parsed: HashMap::new(),
            client: client.clone(),
            observer: observer.clone(),
            node_name: node_name.to_owned(),
        }
    }

    /// Watches the zones of all Nodes, or of this one only.
    pub(super) fn set_needs_zones(&mut self, needs: bool) {
        if !needs {
            self.zones = None;
        } else if self.zones.is_none() {
            self.zones = Some(Watch::start(
                Api::all(self.client.clone()),
                watcher::Config::default(),
                "the zones of Nodes".into(),
                self.observer.clone(),
                |node: &mut Node| {
                    trim_node(node);
                    node.status = NodeStatus::default();
                },
                |old, new| zone(old) != zone(new),
            ));
        }
    }

    /// Watches the EndpointSlices of these Services, and of no others.
    pub(super) fn set_wanted(&mut self, wanted: &BTreeSet<Key>) {
        let mut by_namespace: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for key in wanted {
            by_namespace.entry(&key.namespace).or_default().insert(key.name.clone());
        }
        self.slices.retain(|namespace, _| by_namespace.contains_key(namespace.as_str()));
        for (namespace, names) in by_namespace {
            let old = self.slices.remove(namespace);
            let new = match old {
                Some(old) if old.names == names => old,
                // A watch of the whole namespace already has every name. Slices of the new names may have arrived
                // before they were wanted, so no further event may come for them: trigger a resolution here.
                Some(old) if old.names.len() > MOST_NAMES && names.len() > MOST_NAMES => {
                    self.observer.changed.notify_one();
                    NamespaceSlices { names, ..old }
                }
                old => {
                    let labels = if names.len() > MOST_NAMES {
                        SERVICE_LABEL.to_owned()
                    } else {
                        format!(
                            "{SERVICE_LABEL} in ({})",
                            names.iter().map(String::as_str).collect::<Vec<_>>().join(",")
                        )
                    };
                    let watch = Watch::start(
                        Api::namespaced(self.client.clone(), namespace),
                        watcher::Config::default().labels(&labels),
                        format!("EndpointSlices of namespace {namespace}"),
                        self.observer.clone(),
                        trim_slice,
                        always,
                    );
                    // The last watch with a complete list stands in until the new watch has one.
                    let before = old.and_then(|old| match old.watch.get() {
                        Some(_) => Some((old.names, old.watch)),
                        None => old.before,
                    });
                    NamespaceSlices { names, watch, before }
                }
            };
            self.slices.insert(namespace.to_owned(), new);
        }
    }

    /// A snapshot of all watched objects; `None` until Services, this Node, CircuitBreakers and ReferenceGrants were
    /// listed once.
    pub(super) fn world(&mut self) -> Option<World> {
        let services = self.services.get()?;
        let node = self.nodes.get()?;
        let before = std::mem::take(&mut self.last_parsed);
        for guarded in self.breakers.get()? {
            let key = ObjectRef::from_obj(&*guarded);
            let parsed = if guarded.0.is_ok() { Some(guarded) } else { before.get(&key).cloned() };
            self.last_parsed.extend(parsed.map(|parsed| (key, parsed)));
        }
        let mut world = World {
            frontends: FrontendRules::default(),
            node: node_view(&self.node_name, node.first().map(|node| &**node)),
            breakers: self.last_parsed.values().cloned().collect(),
            grants: self.grants.get()?,
            services: services.into_iter().map(|service| (Key::of(&*service), service)).collect(),
            endpoints: HashMap::new(),
            zones: self.zones.as_ref().and_then(Watch::get).map(|nodes| {
                let zones = nodes.iter().filter_map(|node| Some((node.name_any(), zone(node)?)));
                zones.collect()
            }),
            // NetworkPolicies are optional: without them, only warnings are missing.
            policies: network_policy::by_namespace(self.policies.get().unwrap_or_default()),
        };
        for (namespace, slices) in &mut self.slices {
            let (names, found) = match (slices.watch.get(), &slices.before) {
                (Some(found), _) => {
                    slices.before = None;
                    (&slices.names, found)
                }
                (None, Some((names, before))) => (names, before.get().unwrap_or_default()),
                (None, None) => continue,
            };
            for name in names {
                world.endpoints.entry(Key::new(namespace, name)).or_default();
            }
            for slice in found {
                let Some(name) = slice.labels().get(SERVICE_LABEL) else { continue };
                if let Some(list) = world.endpoints.get_mut(&Key::new(namespace, name)) {
                    list.push(slice);
                }
            }
        }
        Some(world)
    }

    /// A handle to the CircuitBreakers with their current statuses.
    pub(super) fn breakers(&self) -> reflector::Store<Guarded> {
        self.breakers.store()
    }
}

fn node_view(name: &str, node: Option<&Node>) -> NodeView {
    let Some(node) = node else { return NodeView { name: name.to_owned(), ..NodeView::default() } };
    let addresses = node.status.addresses.iter();
    NodeView {
        name: name.to_owned(),
        uid: node.uid(),
        ready: node.is_ready(),
        addresses: addresses
            .filter(|address| address.r#type == "InternalIP" || address.r#type == "ExternalIP")
            .filter_map(|address| address.address.parse().ok())
            .collect(),
        zone: zone(node),
        kube_proxy: KubeProxy::of_version(&node.status.node_info.kubelet_version, has_ipvs_services()),
    }
}

fn zone(node: &Node) -> Option<String> {
    node.labels().get("topology.kubernetes.io/zone").cloned()
}

/// Whether this node's network has virtual servers of IPVS. kube-proxy in mode `ipvs` makes them.
fn has_ipvs_services() -> bool {
    let Ok(table) = File::open("/proc/net/ip_vs") else { return false };
    // The table may be long, and its first lines are usually enough.
    let mut lines = BufReader::new(table).lines().map_while(Result::ok);
    lines.any(|line| line.starts_with("TCP ") || line.starts_with("UDP "))
}

fn trim_service(service: &mut Service) {
    service.annotations_mut().retain(|name, _| name.starts_with(super::annotations::PREFIX));
    service.labels_mut().clear();
}

fn trim_slice(slice: &mut EndpointSlice) {
    slice.annotations_mut().clear();
    slice.labels_mut().retain(|name, _| name == SERVICE_LABEL);
    slice.metadata.owner_references = None;
}

fn trim_node(node: &mut Node) {
    node.annotations_mut().clear();
    node.labels_mut().retain(|name, _| name == "topology.kubernetes.io/zone");
}
