//! Kubernetes as a source of services. CircuitBreakers and annotated Services become [`breaker_core::model`] services;
//! NodeReports, statuses and Events are written back to the API.
//!
//! ```text
//! watch, watches ──▶ resolve (pure) ──▶ model::Service ──▶ the agent's loop
//!                       │                                      │ NodeState
//!                       ▼                                      ▼
//!                 ResolvedBreaker ─▶ status_writer        node_report (every agent writes its NodeReport)
//!                                    (one elected agent)       │
//!                                    └─▶ aggregate (pure) ◀────┘ ──▶ statuses, Events
//! ```
//!
//! Without an answer from the API server, the agent keeps its last state: the datapath and the checks continue
//! unchanged, and reports and statuses are written once the server answers again. Only this module uses the kube
//! crate.

mod access;
pub mod aggregate_reports;
pub mod annotations;
pub mod endpoints;
mod event_publisher;
mod hold;
pub mod intent;
pub mod kube_proxy;
pub mod lease;
pub mod network_policy;
pub mod node_report;
pub mod objects;
pub mod resolve;
pub mod spec_policies;
mod status_writer;
mod text;
mod watch;
mod watches;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result};
use breaker_api::crd::AttachMode;
use breaker_core::{engine::snapshot::Summary, limits::Scope, model};
use jiff::Timestamp;
use kube::{Client, Config};
use tokio::{
    sync::{Notify, watch as channel},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use self::{
    hold::Held,
    resolve::{LastValidSpecs, NodeView, ResolvedBreaker, resolve},
    spec_policies::Policies,
    status_writer::Published,
    watch::Observer,
    watches::Watches,
};
use crate::{
    clock,
    config::FrontendRules,
    metrics::Instruments,
    supervise::{self, contained_call},
};
pub use access::Access;

/// Delay between a change and the resolution. Changes come in bursts (a rolling update, the first list); one
/// resolution covers the whole burst.
const BATCH_DELAY: Duration = Duration::from_millis(50);
/// Interval at which the number of nodes is compared with the number in use. Only needed while a limit is divided by
/// the number of nodes (`scope: Cluster`).
const NODE_COUNT_INTERVAL: Duration = Duration::from_secs(1);
/// How long the agent waits for the release of the Lease when it ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Result of one resolution: the services for the engine, and the objects that they come from.
#[derive(Debug, Default)]
pub struct Update {
    /// False in the initial value only. The first real update follows when all watched objects were listed once.
    pub synced: bool,
    /// Number of the update, counted from 1.
    pub serial: u64,
    /// This node.
    pub node: NodeView,
    /// One result for each CircuitBreaker and annotated Service: CircuitBreakers first, each group oldest first.
    pub results: Vec<ResolvedBreaker>,
}

impl Update {
    /// The services that the engine is to run.
    #[must_use]
    pub fn services(&self) -> Vec<Arc<model::Service>> {
        self.results.iter().flat_map(ResolvedBreaker::services).map(|(_, _, service)| service.clone()).collect()
    }
}

/// State of this node, as reported by the agent's loop. The NodeReport is made from it.
#[derive(Clone, Debug)]
pub struct NodeState {
    /// The update that the engine works with.
    pub update: Arc<Update>,
    /// The current state of the services of that update.
    pub summaries: Vec<Summary>,
    /// How programs are attached.
    pub attach: AttachMode,
    /// Number of interfaces that have programs.
    pub interfaces: usize,
    /// Interfaces that should have programs but have none, as `name: error`.
    pub failed_interfaces: Vec<String>,
    /// Why connections of the node's own processes are not redirected; `None` if they are.
    pub sockets: Option<String>,
    /// The socket load balancer that hides Services' addresses from the programs; `None` if there is none.
    pub incompatible: Option<String>,
    /// Programs of another datapath, which may deliver answers past breaker's programs; `None` if there are none.
    pub bypass: Option<String>,
    /// What the programs cannot see on the node, in words.
    pub unseen: Vec<String>,
    /// What the agent does without, in words.
    pub degraded: Vec<String>,
    /// Interfaces on which a service's new connections are left to kube-proxy, because no answers were seen there: name
    /// of the service, and the interfaces.
    pub suspended: BTreeMap<String, Vec<String>>,
}

/// Identity of an agent in the cluster, and its access to the API server.
#[derive(Clone, Debug)]
pub struct NodeIdentity {
    /// Name of the Node that the agent runs on.
    pub node: String,
    /// Namespace of the agent, which holds the Lease.
    pub namespace: String,
    /// Path of a kubeconfig file. `None`: the default kubeconfig or the pod's service account ([`Config::infer`]).
    pub kubeconfig: Option<std::path::PathBuf>,
    /// Maximum number of Services that the node can protect.
    pub room: usize,
    /// Which addresses of Services are protected, beside their cluster IPs.
    pub frontends: FrontendRules,
}

/// Makes a client for the API server, from a kubeconfig file or from the environment.
///
/// # Errors
/// There is neither a kubeconfig nor a service account, or it is invalid.
pub async fn client(kubeconfig: Option<&std::path::Path>) -> Result<Client> {
    client_of(breaker_cli::cluster::connection::config(kubeconfig, None).await?)
}

/// Makes a client with the agent's timeouts and without automatic retries.
///
/// # Errors
/// The configuration is invalid.
pub fn client_of(mut config: Config) -> Result<Client> {
    config.connect_timeout = Some(Duration::from_secs(5));
    // Longer than a watch lasts (120 s, `WATCH_SECONDS`), because a watch sends nothing while nothing changes.
    config.read_timeout = Some(Duration::from_secs(150));
    config.write_timeout = Some(Duration::from_secs(20));
    // Each caller decides by itself whether and when to retry.
    config.default_retry = false;
    Client::try_from(config).context("make a client for the API server")
}

/// The Kubernetes source. Its tasks end when it is dropped.
#[derive(Debug)]
pub struct KubeSource {
    updates: channel::Receiver<Arc<Update>>,
    state: channel::Sender<Option<Arc<NodeState>>>,
    ending: CancellationToken,
    publisher: Mutex<Option<JoinHandle<()>>>,
    tasks: Vec<JoinHandle<()>>,
    access: Access,
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
    /// Starts to watch the API. Returns at once, whether the API server answers or not.
    #[must_use]
    pub fn start(client: &Client, identity: &NodeIdentity, instruments: &Arc<Instruments>) -> Self {
        instruments.expect_kube();
        let (updates_in, updates) = channel::channel(Arc::new(Update::default()));
        let (state, state_out) = channel::channel(None);
        let changed = Arc::new(Notify::new());
        let access = Access::default();
        let observer = Observer { changed: changed.clone(), instruments: instruments.clone(), access: access.clone() };
        let watches = Watches::start(client, &identity.node, &observer);
        let published = Published::new(watches.breakers(), instruments.clone(), access.clone());
        let ending = CancellationToken::new();
        let tasks = vec![
            tokio::spawn(follow(watches, changed, updates_in, identity.clone(), published.clone())),
            supervise::spawn("the writer of the NodeReport", {
                let (client, published) = (client.clone(), published.clone());
                move || node_report::run(client.clone(), state_out.clone(), published.clone())
            }),
        ];
        let (namespace, node) = (identity.namespace.clone(), identity.node.clone());
        let publisher = supervise::spawn("the writer of statuses", {
            let (client, updates, ending) = (client.clone(), updates.clone(), ending.clone());
            move || {
                let input = (updates.clone(), published.clone());
                status_writer::run(client.clone(), namespace.clone(), node.clone(), input, ending.clone())
            }
        });
        Self { updates, state, ending, publisher: Mutex::new(Some(publisher)), tasks, access }
    }

    /// What the API server refuses to let the agent read.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access.clone()
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

    /// Hands over the current state for this node's NodeReport. The report is written only if it changed.
    pub fn publish_node_state(&self, state: NodeState) {
        self.state.send_replace(Some(Arc::new(state)));
    }

    /// Stops publishing and releases the Lease, so that another agent takes over at once. Takes at most
    /// `SHUTDOWN_TIMEOUT`.
    pub async fn shutdown(&self) {
        self.ending.cancel();
        let publisher = self.publisher.lock().ok().and_then(|mut publisher| publisher.take());
        if let Some(publisher) = publisher {
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, publisher).await;
        }
    }
}

/// Resolves the watched objects after each change and sends the result as an update. Never returns.
async fn follow(
    mut watches: Watches,
    changed: Arc<Notify>,
    updates: channel::Sender<Arc<Update>>,
    identity: NodeIdentity,
    published: Published,
) {
    let mut policies = Policies::default();
    let mut last_valid = LastValidSpecs::new();
    let mut next: Option<Timestamp> = None;
    let mut held = Held::default();
    let mut serial = 0;
    // Whether any service has a limit that is divided between nodes, and the number of nodes that was used.
    let (mut shares, mut nodes) = (false, 0);
    loop {
        let due =
            next.map(|at| clock::instant() + Duration::try_from(at.duration_since(clock::wall())).unwrap_or_default());
        tokio::select! {
            () = changed.notified() => {}
            () = wait_until(due) => {}
            () = sleep(NODE_COUNT_INTERVAL), if shares && published.agents() == nodes => continue,
            () = std::future::ready(()), if shares && published.agents() != nodes => {}
        }
        sleep(BATCH_DELAY).await;
        let Some(mut world) = watches.world() else { continue };
        world.frontends.clone_from(&identity.frontends);
        let resolved = contained_call(|| resolve(&world, &mut policies, &mut last_valid, clock::wall(), identity.room));
        let mut resolution = match resolved {
            Ok(resolution) => resolution,
            // An object that nobody thought of. The last update stays in force until the objects change.
            Err(panic) => {
                tracing::error!("the objects of the API server cannot be resolved, the last state is kept: {panic}");
                continue;
            }
        };
        policies.evict_unused();
        next = resolution.next;
        watches.set_wanted(&resolution.wanted);
        watches.set_needs_zones(resolution.needs_zones);
        // The first update must be complete, because the engine removes every service of an earlier agent that is not
        // in it.
        if serial == 0 && resolution.results.iter().any(|result| result.pending) {
            continue;
        }
        let held_until = held.apply(&mut resolution.results, clock::wall());
        next = [next, held_until].into_iter().flatten().min();
        nodes = published.agents();
        let services = resolution.results.iter_mut().flat_map(ResolvedBreaker::services_mut);
        let shared = services.filter_map(|service| service.limits.as_mut()).filter(|l| l.scope == Scope::Cluster);
        shares = false;
        for limits in shared {
            shares = true;
            limits.nodes = u32::try_from(nodes).unwrap_or(u32::MAX).max(1);
        }
        serial += 1;
        let update = Update { synced: true, serial, node: world.node, results: resolution.results };
        updates.send_replace(Arc::new(update));
    }
}

async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
