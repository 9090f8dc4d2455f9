//! The elected agent's task: combines the nodes' reports into the status of every CircuitBreaker, and emits Events.

use breaker_api::crd::{
    CircuitBreaker, CircuitBreakerStatus, GONE, GROUP, NodeReport, OwnerKind, STATUS_LEASE, STATUS_MANAGER,
};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use jiff::SignedDuration;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use serde_json::json;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Access, Update,
    aggregate_reports::{self, NodeReportView, NodeReports},
    event_publisher::EventPublisher,
    intent::Owner,
    lease::Election,
    objects::{Guarded, Node},
    resolve::ResolvedBreaker,
    watch::{Observer, Watch, always, error_text},
};
use crate::{
    clock,
    metrics::{
        Instruments,
        instruments::{KubeObject, WriteResult},
    },
    supervise,
};

/// Delay between a change and the round. The reports of several nodes arrive close together; one write covers all of
/// them.
const BATCH_DELAY: Duration = Duration::from_millis(150);
/// Shortest time between two rounds, so that a service that flaps causes a bounded number of writes.
const PAUSE: Duration = Duration::from_millis(500);
/// Maximum number of concurrent writes.
const AT_ONCE: usize = 8;
/// An agent counts as silent if its Node is not Ready and its last report is older than this.
const SILENT: SignedDuration = SignedDuration::from_secs(30);
/// Timeout of one request to the API server.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Time between rounds without a change, in which a write that failed is tried again.
const ROUND: Duration = Duration::from_secs(5);

/// Facts about all agents and statuses, shared by the tasks of this agent.
#[derive(Clone)]
pub(super) struct Published {
    /// The CircuitBreakers with their published statuses, without `status.nodes`.
    breakers: Store<Guarded>,
    /// Number of agents in the cluster; 0 while it is unknown.
    agents: Arc<AtomicUsize>,
    instruments: Arc<Instruments>,
    access: Access,
}

impl Published {
    pub(super) fn new(breakers: Store<Guarded>, instruments: Arc<Instruments>, access: Access) -> Self {
        Self { breakers, agents: Arc::default(), instruments, access }
    }

    /// Counts a request that writes to the API server. `None`: it had no answer in time.
    pub(super) fn count_write<T>(&self, object: KubeObject, outcome: Option<&Result<T, kube::Error>>) {
        let result = match outcome {
            Some(Ok(_)) => WriteResult::Ok,
            Some(Err(kube::Error::Api(status))) if status.code == 409 => WriteResult::Conflict,
            Some(Err(_)) | None => WriteResult::Error,
        };
        self.instruments.count_kube_write(object, result);
    }

    fn get(&self, owner: &Owner) -> Option<CircuitBreakerStatus> {
        if owner.kind != OwnerKind::CircuitBreaker {
            return None;
        }
        let key = ObjectRef::new(&owner.key.name).within(&owner.key.namespace);
        self.breakers.get(&key)?.0.as_ref().ok()?.status.clone()
    }

    /// Number of agents in the cluster. Each agent spaces its requests in proportion to it. 0 while it is unknown.
    pub(super) fn agents(&self) -> usize {
        self.agents.load(Ordering::Relaxed)
    }
}

/// Takes part in the election, and publishes statuses while elected. Returns when `ending` is cancelled.
pub(super) async fn run(
    client: Client,
    namespace: String,
    node: String,
    (updates, published): (watch::Receiver<Arc<Update>>, Published),
    ending: CancellationToken,
) {
    let mut election = Election::new(&client, &namespace, &node);
    let mut work: Option<tokio::task::JoinHandle<()>> = None;
    let mut lost = false;
    let instruments = published.instruments.clone();
    loop {
        let outcome = match timeout(TIMEOUT, election.acquire_or_renew(published.agents())).await {
            Ok(outcome) => outcome.map_err(|error| error_text(&error)),
            Err(_) => Err("no answer in time".into()),
        };
        match outcome {
            Ok(write) => {
                if let Some(result) = write {
                    instruments.count_kube_write(KubeObject::Lease, result);
                }
                lost = false;
                // The holder of the Lease counts the agents itself.
                if !election.is_held() {
                    published.agents.store(election.agents(), Ordering::Relaxed);
                }
            }
            Err(error) => {
                instruments.count_kube_write(KubeObject::Lease, WriteResult::Error);
                if !std::mem::replace(&mut lost, true) {
                    tracing::warn!("cannot read or write the Lease {namespace}/{}: {error}", STATUS_LEASE);
                }
            }
        }
        instruments.set_status_writer(election.is_held());
        match (election.is_held(), &work) {
            (true, None) => {
                tracing::info!("this agent was elected: it writes the statuses of CircuitBreakers now");
                let (client, node, updates, published) =
                    (client.clone(), node.clone(), updates.clone(), published.clone());
                work = Some(supervise::spawn("the writer of statuses", move || {
                    publish(client.clone(), node.clone(), updates.clone(), published.clone())
                }));
            }
            (false, Some(task)) => {
                tracing::info!("this agent is no longer elected: it stops writing the statuses of CircuitBreakers");
                task.abort();
                work = None;
            }
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(election.pause()) => {}
            () = ending.cancelled() => {
                if let Some(task) = &work {
                    task.abort();
                }
                election.release().await;
                instruments.set_status_writer(false);
                return;
            }
        }
    }
}

struct Publisher {
    client: Client,
    events: EventPublisher,
    published: Published,
    /// The status that this agent wrote last for each owner, and the uid of the owner then.
    written: HashMap<Owner, (String, CircuitBreakerStatus)>,
    /// For each owner, the foreign status that this agent found and overwrote. It overwrites the same status once
    /// only, so that two writers do not overwrite each other for ever.
    repaired: HashMap<Owner, CircuitBreakerStatus>,
}

async fn publish(client: Client, node: String, mut updates: watch::Receiver<Arc<Update>>, published: Published) {
    let changed = Arc::new(Notify::new());
    let observer = Observer {
        changed: changed.clone(),
        instruments: published.instruments.clone(),
        access: published.access.clone(),
    };
    let reports = Watch::<NodeReport>::start(
        Api::all(client.clone()),
        watcher::Config::default(),
        "NodeReports".into(),
        observer.clone(),
        |report: &mut NodeReport| report.annotations_mut().clear(),
        always,
    );
    let all_nodes = Watch::<Node>::start(
        Api::all(client.clone()),
        watcher::Config::default(),
        "Nodes".into(),
        observer,
        trim,
        |old, new| old.is_ready() != new.is_ready(),
    );
    let events = EventPublisher::new(client.clone(), node);
    let mut publisher = Publisher { client, events, published, written: HashMap::new(), repaired: HashMap::new() };
    loop {
        let mut quiet = false;
        tokio::select! {
            () = changed.notified() => tokio::time::sleep(BATCH_DELAY).await,
            outcome = updates.changed() => match outcome {
                Ok(()) => tokio::time::sleep(BATCH_DELAY).await,
                Err(_) => return,
            },
            () = tokio::time::sleep(ROUND) => quiet = true,
        }
        let (Some(reports), Some(nodes)) = (reports.get(), all_nodes.get()) else { continue };
        let update = updates.borrow_and_update().clone();
        if !update.synced {
            continue;
        }
        let now = clock::wall();
        let ready: HashMap<String, bool> = nodes.iter().map(|node| (node.name_any(), node.is_ready())).collect();
        let reports: Vec<NodeReportView> = reports
            .into_iter()
            .filter_map(|report| {
                let node = report.name_any();
                let said = report.spec.agent.reported_at.map(|at| now.duration_since(at));
                // A Node that is not Ready may still have a working agent, and a Node that is Ready may have none. So
                // the age of the report decides.
                let limit = if *ready.get(&node)? { GONE } else { SILENT };
                Some(NodeReportView { node, ready: said.is_some_and(|age| age < limit), report })
            })
            .collect();
        publisher.published.agents.store(reports.len(), Ordering::Relaxed);
        publisher.round(&update, &NodeReports::new(&reports), quiet).await;
        tokio::time::sleep(PAUSE).await;
    }
}

fn trim(node: &mut Node) {
    node.annotations_mut().clear();
    node.labels_mut().clear();
    node.status.addresses = Vec::new();
}

impl Publisher {
    async fn round(&mut self, update: &Update, reports: &NodeReports<'_>, quiet: bool) {
        let asked: HashSet<&Owner> = update.results.iter().map(|result| &result.owner).collect();
        self.written.retain(|owner, _| asked.contains(owner));
        self.repaired.retain(|owner, _| asked.contains(owner));
        let now = clock::wall();
        let mut due: Vec<Due<'_>> = Vec::new();
        for result in &update.results {
            let owner = &result.owner;
            let written = self.written.get(owner).filter(|(uid, _)| *uid == result.uid).map(|(_, status)| status);
            let published = self.published.get(owner);
            let old = written.or(published.as_ref());
            let new = aggregate_reports::status(result, reports, old, now);
            // In a round without a change: the published status differs from the one that this agent wrote.
            let found = match (&published, written) {
                (Some(found), Some(written)) if quiet => {
                    let told = CircuitBreakerStatus { nodes: Vec::new(), ..written.clone() };
                    (*found != told && self.repaired.get(owner) != Some(found)).then(|| found.clone())
                }
                _ => None,
            };
            if written != Some(&new) || found.is_some() {
                due.push((result, new, old.cloned()));
            }
            if let Some(found) = found {
                self.repaired.insert(owner.clone(), found);
            }
        }
        let publisher = &*self;
        let mut due = due.into_iter();
        let mut writes = FuturesUnordered::new();
        let mut written = Vec::new();
        loop {
            while writes.len() < AT_ONCE
                && let Some(job) = due.next()
            {
                writes.push(publisher.write_and_emit(job));
            }
            let Some(outcome) = writes.next().await else { break };
            written.extend(outcome);
        }
        drop(writes);
        self.written.extend(written.into_iter().map(|(owner, uid, status)| (owner, (uid, status))));
    }

    /// Writes one status, and emits the Events for its changes. Returns `None` if the status could not be written and
    /// must be written again; a lost Event is not repeated.
    async fn write_and_emit(&self, (result, new, old): Due<'_>) -> Option<(Owner, String, CircuitBreakerStatus)> {
        let owner = result.owner.clone();
        if owner.kind == OwnerKind::CircuitBreaker {
            let outcome = timeout(TIMEOUT, write(&self.client, &owner, &new)).await;
            self.published.count_write(KubeObject::Status, outcome.as_ref().ok());
            let error = match outcome {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error_text(&error)),
                Err(_) => Some("no answer in time".to_owned()),
            };
            if let Some(error) = error {
                tracing::warn!("cannot write the status of {owner}, trying again: {error}");
                return None;
            }
        }
        let why = new.reason.as_deref().unwrap_or("Protect");
        for record in aggregate_reports::event_records(old.as_ref(), &new) {
            let outcome = timeout(TIMEOUT, self.events.publish(result, why, &record)).await;
            self.published.count_write(KubeObject::Event, outcome.as_ref().ok());
            let error = match outcome {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error_text(&error),
                Err(_) => "no answer in time".to_owned(),
            };
            tracing::warn!("cannot emit an Event about {owner} ({}), it is lost: {error}", record.reason);
        }
        Some((owner, result.uid.clone(), new))
    }
}

/// A result, its new status, and the status before.
type Due<'a> = (&'a ResolvedBreaker, CircuitBreakerStatus, Option<CircuitBreakerStatus>);

/// Writes a status by server-side apply. The API server removes the fields of this field manager that are not in the
/// new status.
async fn write(client: &Client, owner: &Owner, status: &CircuitBreakerStatus) -> Result<(), kube::Error> {
    let api: Api<CircuitBreaker> = Api::namespaced(client.clone(), &owner.key.namespace);
    let patch = json!({ "apiVersion": format!("{GROUP}/v1alpha1"), "kind": "CircuitBreaker", "status": status });
    let params = PatchParams::apply(STATUS_MANAGER).force();
    match api.patch_status(&owner.key.name, &params, &Patch::Apply(&patch)).await {
        Ok(_) => Ok(()),
        // The object was deleted meanwhile.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}
