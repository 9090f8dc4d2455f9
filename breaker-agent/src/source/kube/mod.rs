//! Kubernetes as the source: CircuitBreakers and annotated Services in, [`crate::model`] out; NodeReports, statuses and
//! Events back.
//!
//! ```text
//! watch (reflectors) ──▶ resolve (pure) ──▶ model::Service ──▶ the agent's loop
//!                          │                                        │ Facts: what is in the kernel
//!                          ▼                                        ▼
//!                       Subject ──▶ publish (one elected agent) ◀── report (NodeReport, every agent)
//!                                      └──▶ aggregate (pure) ──▶ status, Events
//! ```
//!
//! Whatever the API server does, the last state goes on: what the agent has, it keeps until it is told of something else,
//! and what it has to tell waits until it can. Only this module uses kube.

pub mod aggregate;
pub mod annotations;
pub mod api;
pub mod endpoints;
pub mod lease;
pub mod network_policy;
pub mod objects;
pub mod overview;
pub mod policy;
mod publish;
pub mod report;
pub mod resolve;
mod watch;
pub mod wish;

#[cfg(test)]
mod resolve_tests;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use kube::{Client, Config};
use tokio::{
    sync::{Notify, watch as channel},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{agent::status::Summary, limits::Scope, model};
use policy::Policies;
use publish::Published;
use resolve::{Good, NodeView, Subject, resolve};
use watch::Watches;
use wish::Owner;

/// Changes come in bursts (a rolling update, a list): one resolution for all of a moment's.
const GATHER: Duration = Duration::from_millis(50);
/// How often the number of nodes is looked at, where limits are divided by it.
const NODES: Duration = Duration::from_secs(1);
/// How long a last word may take when the agent ends.
const FAREWELL: Duration = Duration::from_secs(2);

/// What came of the API's objects: what the engine is to do, and for whom.
#[derive(Debug, Default)]
pub struct Update {
    /// Whether everything was listed at least once.
    pub synced: bool,
    /// Counts the updates.
    pub serial: u64,
    /// This node.
    pub node: NodeView,
    /// What came of every wish, oldest first.
    pub subjects: Vec<Subject>,
}

impl Update {
    /// What the engine is to do.
    #[must_use]
    pub fn services(&self) -> Vec<model::Service> {
        self.subjects.iter().flat_map(|subject| subject.ports.values()).cloned().collect()
    }
}

/// What the agent's loop tells of itself.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The update that the engine works with.
    pub update: Arc<Update>,
    /// Its services.
    pub summaries: Vec<Summary>,
    /// How programs are attached.
    pub attach: String,
    /// Interfaces with programs.
    pub interfaces: usize,
    /// Interfaces without, that should have them.
    pub failed_interfaces: Vec<String>,
    /// Why the node's own sockets are not seen, if they are not.
    pub sockets: Option<String>,
    /// What hides VIPs from the programs.
    pub incompatible: Option<String>,
}

/// Where an agent is in the cluster.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its Node.
    pub node: String,
    /// Its own namespace, where the Lease is.
    pub namespace: String,
    /// A kubeconfig; the pod's service account without one.
    pub kubeconfig: Option<std::path::PathBuf>,
    /// How many Services the node has room for.
    pub room: usize,
}

/// A client for where we are.
///
/// # Errors
/// No kubeconfig, no service account, or one that makes no sense.
pub async fn client(kubeconfig: Option<&std::path::Path>) -> Result<Client> {
    crate::install_crypto();
    let config = match kubeconfig {
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
            Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await?
        }
        None => {
            Config::infer().await.context("find the API server: neither a kubeconfig nor a pod's service account")?
        }
    };
    client_of(config)
}

/// A client with timeouts that suit an agent.
///
/// # Errors
/// A configuration that makes no sense.
pub fn client_of(mut config: Config) -> Result<Client> {
    config.connect_timeout = Some(Duration::from_secs(5));
    // Longer than a watch lasts, which is silent for as long as nothing happens.
    config.read_timeout = Some(Duration::from_secs(150));
    config.write_timeout = Some(Duration::from_secs(20));
    // Whoever asks knows what to do about an answer that is none, and when.
    config.default_retry = false;
    Client::try_from(config).context("make a client for the API server")
}

/// The source. Its tasks end when it is dropped.
#[derive(Debug)]
pub struct KubeSource {
    updates: channel::Receiver<Arc<Update>>,
    facts: channel::Sender<Option<Arc<Facts>>>,
    ending: CancellationToken,
    publisher: Mutex<Option<JoinHandle<()>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for KubeSource {
    fn drop(&mut self) {
        self.ending.cancel();
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl KubeSource {
    /// Starts to follow the API. Returns at once, whether the API server answers or not.
    #[must_use]
    pub fn start(client: &Client, place: &Place) -> Self {
        let (updates_in, updates) = channel::channel(Arc::new(Update::default()));
        let (facts, facts_out) = channel::channel(None);
        let changed = Arc::new(Notify::new());
        let watches = Watches::start(client, &place.node, &changed);
        let published = Published::new(watches.breakers());
        let ending = CancellationToken::new();
        let tasks = vec![
            tokio::spawn(follow(watches, changed, updates_in, place.room, published.clone())),
            tokio::spawn(report::publish(client.clone(), facts_out, published.clone())),
        ];
        let (namespace, node) = (place.namespace.clone(), place.node.clone());
        let publisher =
            tokio::spawn(publish::run(client.clone(), namespace, node, (updates.clone(), published), ending.clone()));
        Self { updates, facts, ending, publisher: Mutex::new(Some(publisher)), tasks }
    }

    /// Waits for the next update. Safe to cancel.
    pub async fn changed(&mut self) -> Arc<Update> {
        loop {
            if self.updates.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            let update = self.updates.borrow_and_update().clone();
            if update.synced {
                return update;
            }
        }
    }

    /// Tells the others what this node does; they hear of it when it changed.
    pub fn report(&self, facts: Facts) {
        self.facts.send_replace(Some(Arc::new(facts)));
    }

    /// Lets go of what others could do instead.
    pub async fn farewell(&self) {
        self.ending.cancel();
        let publisher = self.publisher.lock().ok().and_then(|mut publisher| publisher.take());
        if let Some(publisher) = publisher {
            let _ = tokio::time::timeout(FAREWELL, publisher).await;
        }
    }
}

/// From the API to updates, for ever.
async fn follow(
    mut watches: Watches,
    changed: Arc<Notify>,
    updates: channel::Sender<Arc<Update>>,
    room: usize,
    published: Published,
) {
    let mut policies = Policies::default();
    let mut good = Good::new();
    let mut next: Option<Timestamp> = None;
    let mut held: BTreeMap<Owner, BTreeMap<i32, model::Service>> = BTreeMap::new();
    let mut serial = 0;
    // Limits that all nodes share, and how many nodes that was.
    let (mut shares, mut nodes) = (false, 0);
    loop {
        let due =
            next.map(|at| Instant::now() + Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or_default());
        tokio::select! {
            () = changed.notified() => {}
            () = wait_until(due) => {}
            () = sleep(NODES), if shares && published.agents() == nodes => continue,
            () = std::future::ready(()), if shares && published.agents() != nodes => {}
        }
        sleep(GATHER).await;
        let Some(world) = watches.world() else { continue };
        let mut resolution = resolve(&world, &mut policies, &mut good, Timestamp::now(), room);
        policies.turn();
        next = resolution.next;
        watches.want(&resolution.wanted);
        // The first word must be whole: what an earlier agent left and nobody asks for any more is taken away.
        if serial == 0 && resolution.subjects.iter().any(|subject| subject.pending) {
            continue;
        }
        // What is not known yet changes nothing.
        for subject in &mut resolution.subjects {
            if subject.pending
                && let Some(before) = held.get(&subject.owner)
            {
                subject.ports.clone_from(before);
            }
        }
        nodes = published.agents();
        let services = resolution.subjects.iter_mut().flat_map(|subject| subject.ports.values_mut());
        let shared = services.filter_map(|service| service.limits.as_mut()).filter(|l| l.scope == Scope::Cluster);
        shares = false;
        for limits in shared {
            shares = true;
            limits.nodes = u32::try_from(nodes).unwrap_or(u32::MAX).max(1);
        }
        held = resolution.subjects.iter().map(|s| (s.owner.clone(), s.ports.clone())).collect();
        serial += 1;
        let update = Update { synced: true, serial, node: world.node, subjects: resolution.subjects };
        updates.send_replace(Arc::new(update));
    }
}

async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
