//! What the API server is asked to tell: watches with reflectors behind them, started anew for ever, and kept as narrow as
//! the API lets them be.
//!
//! Services are watched whole, as kube-proxy does (an annotation cannot be selected by); CircuitBreakers and grants, too.
//! EndpointSlices, of which there are most and which change most, are watched for the Services that are referred to, one
//! watch a namespace, by label; of Nodes only this one. Pods are not watched at all: slices have what matters of them.
//! Everything is trimmed before it is kept.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt as _;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::{
    Api, Client, Resource, ResourceExt as _,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt as _,
        reflector::{self, ObjectRef},
        utils::Backoff as _,
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, task::JoinHandle};

use super::{
    api::{CircuitBreaker, ReferenceGrant},
    network_policy,
    objects::{EndpointSlice, Node, Service},
    resolve::{NodeView, World},
    wish::Key,
};

/// A watch ends at the latest after this long and goes on from where it was: a connection that died in silence (the
/// server's machine lost power) is noticed by then. Below the client's own read timeout.
const WATCH_SECONDS: u32 = 120;
/// Objects asked for at a time when everything is listed.
const PAGE: u32 = 500;
/// The label of a slice's Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// More names than this are not put into a selector (it travels in the URL): all slices of the namespace are watched.
const MOST_NAMES: usize = 64;

/// A running watch and what it found; ends when dropped.
pub(super) struct Watch<K: Resource<DynamicType = ()> + 'static> {
    store: reflector::Store<K>,
    ready: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl<K: Resource<DynamicType = ()> + 'static> Drop for Watch<K> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    pub(super) fn start(
        api: Api<K>,
        config: watcher::Config,
        what: String,
        changed: Arc<Notify>,
        trim: impl Fn(&mut K) + Send + 'static,
        matters: impl Fn(&K, &K) -> bool + Send + 'static,
    ) -> Self {
        let (store, mut writer) = reflector::store::<K>();
        let ready = Arc::new(AtomicBool::new(false));
        let is_ready = ready.clone();
        let config = config.timeout(WATCH_SECONDS).page_size(PAGE);
        let known = store.clone();
        let task = tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher(api, config).modify(move |object| {
                object.managed_fields_mut().clear();
                trim(object);
            }));
            let mut lost = false;
            let mut patience = Patience::default();
            while let Some(event) = events.next().await {
                match event {
                    Ok(event) => {
                        // The start of a list is no success yet.
                        let good = !matches!(event, watcher::Event::Init);
                        if good && lost {
                            tracing::info!("the API server tells of {what} again");
                        }
                        if good {
                            lost = false;
                            patience.reset();
                        }
                        let whole = match &event {
                            watcher::Event::Init | watcher::Event::InitApply(_) => false,
                            watcher::Event::InitDone | watcher::Event::Delete(_) => true,
                            watcher::Event::Apply(new) => {
                                known.get(&ObjectRef::from_obj(new)).is_none_or(|old| matters(&old, new))
                            }
                        };
                        writer.apply_watcher_event(&event);
                        if whole {
                            is_ready.store(true, Ordering::Release);
                            changed.notify_one();
                        }
                    }
                    Err(error) => {
                        // Said once: what is known goes on, and the watch is started anew.
                        if !lost && !is_expired(&error) {
                            lost = true;
                            let words = words(&error);
                            tracing::warn!("the API server does not tell of {what}: {words}; what is known goes on");
                        }
                        tokio::time::sleep(patience.next().unwrap_or_default()).await;
                    }
                }
            }
        });
        Self { store, ready, task }
    }

    /// What it found, to look at from elsewhere.
    pub(super) fn store(&self) -> reflector::Store<K> {
        self.store.clone()
    }

    /// Everything, once the first list was whole.
    pub(super) fn get(&self) -> Option<Vec<Arc<K>>> {
        self.ready.load(Ordering::Acquire).then(|| self.store.state())
    }
}

/// The chain of an error's causes in one line.
pub(super) fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// 410 Gone: the server forgot the version that we were at. The watcher lists again; nothing is wrong.
fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

/// How long to wait after an error: from 200 ms, doubled, at most 5 s, with jitter. A server that comes back finds its
/// agents soon, and not all in one moment.
#[derive(Debug, Default)]
pub(super) struct Patience {
    errors: u32,
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let base = Duration::from_millis(200 << self.errors.min(6)).min(Duration::from_secs(5));
        self.errors += 1;
        Some(base.mul_f64(0.5 + fastrand::f64()))
    }
}

impl kube::runtime::utils::Backoff for Patience {
    fn reset(&mut self) {
        self.errors = 0;
    }
}

/// A CircuitBreaker, or why it cannot be understood (one of a later version, say): it must not keep the others from being
/// heard.
pub(super) type Guarded = DeserializeGuard<CircuitBreaker>;

/// All watches of an agent.
pub(super) struct Watches {
    client: Client,
    changed: Arc<Notify>,
    node_name: String,
    breakers: Watch<Guarded>,
    grants: Watch<ReferenceGrant>,
    services: Watch<Service>,
    nodes: Watch<Node>,
    policies: Watch<NetworkPolicy>,
    slices: BTreeMap<String, NamespaceSlices>,
    /// Every CircuitBreaker as it was understood last.
    understood: HashMap<ObjectRef<Guarded>, Arc<CircuitBreaker>>,
}

/// The slices of one namespace.
struct NamespaceSlices {
    names: BTreeSet<String>,
    watch: Watch<EndpointSlice>,
    /// The watch before this one, for the names that it had: kept until this one is ready.
    before: Option<(BTreeSet<String>, Watch<EndpointSlice>)>,
}

impl Watches {
    pub(super) fn start(client: &Client, node_name: &str, changed: &Arc<Notify>) -> Self {
        let all = watcher::Config::default;
        let changed = changed.clone();
        Self {
            breakers: Watch::start(
                Api::all(client.clone()),
                all(),
                "CircuitBreakers".into(),
                changed.clone(),
                |breaker: &mut Guarded| {
                    // The nodes' details are for people; they are most of the object.
                    if let Some(status) = breaker.0.as_mut().ok().and_then(|breaker| breaker.status.as_mut()) {
                        status.nodes.clear();
                    }
                    breaker.annotations_mut().clear();
                    if let Err(error) = &breaker.0 {
                        tracing::warn!(
                            "CircuitBreaker {}/{} is not understood (what was understood of it before goes on): {error}",
                            breaker.namespace().unwrap_or_default(),
                            breaker.name_any()
                        );
                    }
                },
                // A status is written for people: nothing follows from it.
                |old, new| match (&old.0, &new.0) {
                    (Ok(old), Ok(new)) => {
                        let key = |b: &CircuitBreaker| (b.uid(), b.metadata.deletion_timestamp.clone());
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
                changed.clone(),
                |grant: &mut ReferenceGrant| grant.annotations_mut().clear(),
                always,
            ),
            services: Watch::start(
                Api::all(client.clone()),
                all(),
                "Services".into(),
                changed.clone(),
                trim_service,
                always,
            ),
            nodes: Watch::start(
                Api::all(client.clone()),
                all().fields(&format!("metadata.name={node_name}")),
                "this Node".into(),
                changed.clone(),
                trim_node,
                |old, new| node_view("", Some(old)) != node_view("", Some(new)),
            ),
            policies: Watch::start(
                Api::all(client.clone()),
                all(),
                "NetworkPolicies".into(),
                changed.clone(),
                |policy: &mut NetworkPolicy| {
                    policy.annotations_mut().clear();
                    policy.labels_mut().clear();
                },
                |old, new| old.spec != new.spec,
            ),
            slices: BTreeMap::new(),
            understood: HashMap::new(),
            client: client.clone(),
            changed,
            node_name: node_name.to_owned(),
        }
    }

    /// Watches the slices of these Services, and no others.
    pub(super) fn want(&mut self, wanted: &BTreeSet<Key>) {
        let mut by_namespace: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for key in wanted {
            by_namespace.entry(&key.namespace).or_default().insert(key.name.clone());
        }
        self.slices.retain(|namespace, _| by_namespace.contains_key(namespace.as_str()));
        for (namespace, names) in by_namespace {
            let old = self.slices.remove(namespace);
            let new = match old {
                Some(old) if old.names == names => old,
                // A watch of the whole namespace has every name, and may have told of the new ones before they were wanted.
                Some(old) if old.names.len() > MOST_NAMES && names.len() > MOST_NAMES => {
                    self.changed.notify_one();
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
                        self.changed.clone(),
                        trim_slice,
                        always,
                    );
                    // The last one that is whole stands in until the new one is.
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

    /// What is known; `None` until everything was listed once.
    pub(super) fn world(&mut self) -> Option<World> {
        let services = self.services.get()?;
        let node = self.nodes.get()?;
        let before = std::mem::take(&mut self.understood);
        for guarded in self.breakers.get()? {
            let key = ObjectRef::from_obj(&*guarded);
            let known = before.get(&key);
            let breaker = match &guarded.0 {
                Ok(breaker) => Some(match known {
                    Some(known) if known.resource_version() == breaker.resource_version() => known.clone(),
                    _ => Arc::new(breaker.clone()),
                }),
                Err(_) => known.cloned(),
            };
            self.understood.extend(breaker.map(|breaker| (key, breaker)));
        }
        let mut world = World {
            node: node_view(&self.node_name, node.first().map(|node| &**node)),
            breakers: self.understood.values().cloned().collect(),
            grants: self.grants.get()?,
            services: services.into_iter().map(|service| (Key::of(&*service), service)).collect(),
            endpoints: HashMap::new(),
            // Nothing waits for them: without them there is less to warn of.
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

    /// The CircuitBreakers with what their statuses say, at any moment.
    pub(super) fn breakers(&self) -> reflector::Store<Guarded> {
        self.breakers.store()
    }
}

/// Every change matters.
pub(super) const fn always<K>(_: &K, _: &K) -> bool {
    true
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
        zone: node.labels().get("topology.kubernetes.io/zone").cloned(),
    }
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
