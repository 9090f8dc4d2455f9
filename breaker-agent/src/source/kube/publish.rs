//! The elected agent's part: puts the nodes' reports together into the status of every CircuitBreaker, and emits Events.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        events::{Event, EventType, Recorder, Reporter},
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
    Update,
    aggregate::{self, Happening, News, NodeNews},
    api::{CircuitBreaker, CircuitBreakerStatus, GROUP, NodeReport},
    lease::Election,
    objects::Node,
    resolve::Subject,
    watch::{Guarded, Watch, always, words},
    wish::{Owner, OwnerKind},
};

/// Who writes the status, in managedFields.
const MANAGER: &str = "breaker";
/// Reports of several nodes come close together: one write for all of them.
const GATHER: Duration = Duration::from_millis(150);
/// The least between two rounds, so that a service that flaps costs a bounded number of writes.
const PAUSE: Duration = Duration::from_millis(500);
/// Writes under way at a time.
const AT_ONCE: usize = 8;
/// A Node that is not Ready and whose agent has not reported for this long is silent.
const SILENT: SignedDuration = SignedDuration::from_secs(30);
/// A Node that is Ready and whose agent has not reported for this long has none any more: they write every five minutes.
const GONE: SignedDuration = SignedDuration::from_mins(15);
/// How long the API server may take for one thing.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often everything is looked at without a change: a write that failed is tried again.
const ROUND: Duration = Duration::from_secs(5);

/// What is told of all agents, at any moment.
#[derive(Clone)]
pub(super) struct Published {
    /// The CircuitBreakers' statuses, without the nodes one by one.
    breakers: Store<Guarded>,
    /// How many agents there are.
    agents: Arc<AtomicUsize>,
}

impl Published {
    pub(super) fn new(breakers: Store<Guarded>) -> Self {
        Self { breakers, agents: Arc::default() }
    }

    fn get(&self, owner: &Owner) -> Option<CircuitBreakerStatus> {
        if owner.kind != OwnerKind::CircuitBreaker {
            return None;
        }
        let key = ObjectRef::new(&owner.key.name).within(&owner.key.namespace);
        self.breakers.get(&key)?.0.as_ref().ok()?.status.clone()
    }

    /// How many agents there are: all take turns with their requests by that.
    pub(super) fn agents(&self) -> usize {
        self.agents.load(Ordering::Relaxed)
    }
}

/// Runs for ever: takes part in the election, and does the work while elected.
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
    loop {
        let outcome = match timeout(PATIENCE, election.look(published.agents())).await {
            Ok(outcome) => outcome.map_err(|error| words(&error)),
            Err(_) => Err("no answer in time".into()),
        };
        match outcome {
            Ok(()) => {
                lost = false;
                // Who holds it counts for itself.
                if !election.is_held() {
                    published.agents.store(election.agents(), Ordering::Relaxed);
                }
            }
            Err(error) if !lost => {
                lost = true;
                tracing::warn!("the Lease {namespace}/{} cannot be read or written: {error}", super::lease::NAME);
            }
            Err(_) => {}
        }
        match (election.is_held(), &work) {
            (true, None) => {
                tracing::info!("this agent writes the statuses from now on");
                work = Some(tokio::spawn(publish(client.clone(), node.clone(), updates.clone(), published.clone())));
            }
            (false, Some(task)) => {
                tracing::info!("this agent writes the statuses no more");
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
                return;
            }
        }
    }
}

struct Publisher {
    client: Client,
    recorder: Recorder,
    reporter: Reporter,
    published: Published,
    /// What we wrote last, and for which object of this name.
    written: HashMap<Owner, (String, CircuitBreakerStatus)>,
    /// What we found instead of it and wrote over: once, so that two writers do not fight.
    repaired: HashMap<Owner, CircuitBreakerStatus>,
}

async fn publish(client: Client, node: String, mut updates: watch::Receiver<Arc<Update>>, published: Published) {
    let changed = Arc::new(Notify::new());
    let reports = Watch::<NodeReport>::start(
        Api::all(client.clone()),
        watcher::Config::default(),
        "NodeReports".into(),
        changed.clone(),
        |report: &mut NodeReport| report.annotations_mut().clear(),
        always,
    );
    let all_nodes = Watch::<Node>::start(
        Api::all(client.clone()),
        watcher::Config::default(),
        "Nodes".into(),
        changed.clone(),
        trim,
        |old, new| old.is_ready() != new.is_ready(),
    );
    let reporter = Reporter { controller: GROUP.into(), instance: Some(node) };
    let recorder = Recorder::new(client.clone(), reporter.clone());
    let mut publisher =
        Publisher { client, recorder, reporter, published, written: HashMap::new(), repaired: HashMap::new() };
    loop {
        let mut quiet = false;
        tokio::select! {
            () = changed.notified() => tokio::time::sleep(GATHER).await,
            outcome = updates.changed() => match outcome {
                Ok(()) => tokio::time::sleep(GATHER).await,
                Err(_) => return,
            },
            () = tokio::time::sleep(ROUND) => quiet = true,
        }
        let (Some(reports), Some(nodes)) = (reports.get(), all_nodes.get()) else { continue };
        let update = updates.borrow_and_update().clone();
        if !update.synced {
            continue;
        }
        let now = Timestamp::now();
        let ready: HashMap<String, bool> = nodes.iter().map(|node| (node.name_any(), node.is_ready())).collect();
        let news: Vec<NodeNews> = reports
            .into_iter()
            .filter_map(|report| {
                let node = report.name_any();
                let said = report.spec.agent.reported_at.map(|at| now.duration_since(at));
                // A Node that is not Ready may have lost the API server only, not its agent; one that is may have lost its
                // agent.
                let limit = if *ready.get(&node)? { GONE } else { SILENT };
                Some(NodeNews { node, ready: said.is_some_and(|age| age < limit), report })
            })
            .collect();
        publisher.published.agents.store(news.len(), Ordering::Relaxed);
        publisher.round(&update, &News::new(&news), quiet).await;
        tokio::time::sleep(PAUSE).await;
    }
}

fn trim(node: &mut Node) {
    node.annotations_mut().clear();
    node.labels_mut().clear();
    node.status.addresses.clear();
}

impl Publisher {
    async fn round(&mut self, update: &Update, news: &News<'_>, quiet: bool) {
        let asked: HashSet<&Owner> = update.subjects.iter().map(|subject| &subject.owner).collect();
        self.written.retain(|owner, _| asked.contains(owner));
        self.repaired.retain(|owner, _| asked.contains(owner));
        let now = Timestamp::now();
        let mut due: Vec<Due<'_>> = Vec::new();
        for subject in &update.subjects {
            let owner = &subject.owner;
            let written = self.written.get(owner).filter(|(uid, _)| *uid == subject.uid).map(|(_, status)| status);
            let published = self.published.get(owner);
            let old = written.or(published.as_ref());
            let new = aggregate::status(subject, news, old, now);
            // Nothing happened for a while, and there is something else than we wrote.
            let found = match (&published, written) {
                (Some(found), Some(written)) if quiet => {
                    let told = CircuitBreakerStatus { nodes: Vec::new(), ..written.clone() };
                    (*found != told && self.repaired.get(owner) != Some(found)).then(|| found.clone())
                }
                _ => None,
            };
            if written != Some(&new) || found.is_some() {
                due.push((subject, new, old.cloned()));
            }
            if let Some(found) = found {
                self.repaired.insert(owner.clone(), found);
            }
        }
        let tell = Teller { client: &self.client, recorder: &self.recorder, reporter: &self.reporter };
        let jobs: Vec<BoxFuture<'_, _>> = due.into_iter().map(|job| one(&tell, job).boxed()).collect();
        let outcomes: Vec<Option<(Owner, String, CircuitBreakerStatus)>> =
            stream::iter(jobs).buffer_unordered(AT_ONCE).collect().await;
        self.written.extend(outcomes.into_iter().flatten().map(|(owner, uid, status)| (owner, (uid, status))));
    }
}

/// What it takes to write and to tell.
struct Teller<'a> {
    client: &'a Client,
    recorder: &'a Recorder,
    reporter: &'a Reporter,
}

/// Writes one status, and tells what happened; `None` if it must be tried again.
async fn one(teller: &Teller<'_>, (subject, new, old): Due<'_>) -> Option<(Owner, String, CircuitBreakerStatus)> {
    let owner = subject.owner.clone();
    if owner.kind == OwnerKind::CircuitBreaker {
        let outcome = timeout(PATIENCE, write(teller.client, &owner, &new)).await;
        let error = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(words(&error)),
            Err(_) => Some("no answer in time".to_owned()),
        };
        if let Some(error) = error {
            tracing::warn!("the status of {owner} cannot be written, trying again: {error}");
            return None;
        }
    }
    let why = new.reason.as_deref().unwrap_or("Protect");
    for happening in aggregate::happenings(old.as_ref(), &new) {
        let outcome = timeout(PATIENCE, tell(teller, subject, why, &happening)).await;
        let error = match outcome {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => words(&error),
            Err(_) => "no answer in time".to_owned(),
        };
        tracing::warn!("an Event about {owner} is lost ({}): {error}", happening.reason);
    }
    Some((owner, subject.uid.clone(), new))
}

/// A status to write, and the one before it.
type Due<'a> = (&'a Subject, CircuitBreakerStatus, Option<CircuitBreakerStatus>);

/// Server-side apply: the fields are ours, and what we leave out goes.
async fn write(client: &Client, owner: &Owner, status: &CircuitBreakerStatus) -> Result<(), kube::Error> {
    let api: Api<CircuitBreaker> = Api::namespaced(client.clone(), &owner.key.namespace);
    let patch = json!({ "apiVersion": format!("{GROUP}/v1alpha1"), "kind": "CircuitBreaker", "status": status });
    let params = PatchParams::apply(MANAGER).force();
    match api.patch_status(&owner.key.name, &params, &Patch::Apply(&patch)).await {
        Ok(_) => Ok(()),
        // It was deleted meanwhile.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}

async fn tell(teller: &Teller<'_>, subject: &Subject, why: &str, happening: &Happening) -> Result<(), kube::Error> {
    let (api_version, kind) = match subject.owner.kind {
        OwnerKind::CircuitBreaker => (format!("{GROUP}/v1alpha1"), "CircuitBreaker"),
        OwnerKind::Service => ("v1".to_owned(), "Service"),
    };
    let about = ObjectReference {
        api_version: Some(api_version),
        kind: Some(kind.into()),
        namespace: Some(subject.owner.key.namespace.clone()),
        name: Some(subject.owner.key.name.clone()),
        uid: Some(subject.uid.clone()),
        ..ObjectReference::default()
    };
    let event = Event {
        type_: if happening.warning { EventType::Warning } else { EventType::Normal },
        reason: happening.reason.clone(),
        // The API takes up to 1024 bytes.
        note: Some(happening.note.chars().take(900).collect()),
        // The same thing for another reason is another Event: an Event that is counted up keeps its first words.
        action: why.to_owned(),
        secondary: None,
    };
    match teller.recorder.publish(&event, &about).await {
        // The one to count up was deleted meanwhile.
        Err(kube::Error::Api(status)) if status.code == 404 => {
            Recorder::new(teller.client.clone(), teller.reporter.clone()).publish(&event, &about).await
        }
        outcome => outcome,
    }
}
