//! The elected agent's part: puts the nodes' reports together into the status of every CircuitBreaker, and emits Events.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::{
        events::{Event, EventType, Recorder, Reporter},
        watcher,
    },
};
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Update,
    aggregate::{self, Happening, News, NodeNews},
    api::{CircuitBreaker, CircuitBreakerStatus, GROUP, NodeReport},
    lease::Election,
    objects::Node,
    resolve::Subject,
    watch::{Watch, words},
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
/// How often everything is looked at without a change: a write that failed is tried again.
const ROUND: Duration = Duration::from_secs(5);

/// Runs for ever: takes part in the election, and does the work while elected.
pub(super) async fn run(
    client: Client,
    namespace: String,
    node: String,
    updates: watch::Receiver<Arc<Update>>,
    ending: CancellationToken,
) {
    let mut election = Election::new(&client, &namespace, &node);
    let mut work: Option<tokio::task::JoinHandle<()>> = None;
    let mut lost = false;
    loop {
        match election.look().await {
            Ok(()) => lost = false,
            Err(error) if !lost => {
                lost = true;
                tracing::warn!(
                    "the Lease {namespace}/{} cannot be read or written: {}",
                    super::lease::NAME,
                    words(&error)
                );
            }
            Err(_) => {}
        }
        match (election.is_held(), &work) {
            (true, None) => {
                tracing::info!("this agent writes the statuses from now on");
                work = Some(tokio::spawn(publish(client.clone(), node.clone(), updates.clone())));
            }
            (false, Some(task)) => {
                tracing::info!("another agent writes the statuses from now on");
                task.abort();
                work = None;
            }
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(election.pause(nodes(&updates.borrow()))) => {}
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

/// How many nodes the statuses say there are.
pub(super) fn nodes(update: &Update) -> usize {
    let counts = update.published.values().map(|status| status.counts.nodes).max();
    usize::try_from(counts.unwrap_or_default()).unwrap_or_default()
}

struct Publisher {
    client: Client,
    recorder: Recorder,
    /// What we wrote last.
    written: HashMap<Owner, CircuitBreakerStatus>,
}

async fn publish(client: Client, node: String, mut updates: watch::Receiver<Arc<Update>>) {
    let changed = Arc::new(Notify::new());
    let reports = Watch::<NodeReport>::start(
        Api::all(client.clone()),
        watcher::Config::default(),
        "NodeReports".into(),
        changed.clone(),
        |report| report.annotations_mut().clear(),
    );
    let all_nodes = Watch::<Node>::start(
        Api::all(client.clone()),
        watcher::Config::default(),
        "Nodes".into(),
        changed.clone(),
        trim,
    );
    let reporter = Reporter { controller: GROUP.into(), instance: Some(node) };
    let mut publisher =
        Publisher { recorder: Recorder::new(client.clone(), reporter), client, written: HashMap::new() };
    loop {
        tokio::select! {
            () = changed.notified() => tokio::time::sleep(GATHER).await,
            outcome = updates.changed() => match outcome {
                Ok(()) => tokio::time::sleep(GATHER).await,
                Err(_) => return,
            },
            () = tokio::time::sleep(ROUND) => {}
        }
        let (Some(reports), Some(nodes)) = (reports.get(), all_nodes.get()) else { continue };
        let update = updates.borrow_and_update().clone();
        if !update.synced {
            continue;
        }
        let now = Timestamp::now();
        let ready: HashMap<String, bool> = nodes.iter().map(|node| (node.name_any(), node.is_ready())).collect();
        let news: Vec<NodeNews> = reports
            .iter()
            .filter_map(|report| {
                let node = report.name_any();
                // A Node that is not Ready may have lost the API server only, not its agent.
                let heard = report.spec.agent.reported_at.is_some_and(|at| now.duration_since(at) < SILENT);
                let ready = *ready.get(&node)? || heard;
                Some(NodeNews { node, ready, report: Arc::new(report.spec.clone()) })
            })
            .collect();
        publisher.round(&update, &News::new(&news)).await;
        tokio::time::sleep(PAUSE).await;
    }
}

fn trim(node: &mut Node) {
    node.annotations_mut().clear();
    node.labels_mut().clear();
    node.status.addresses.clear();
}

impl Publisher {
    async fn round(&mut self, update: &Update, news: &News<'_>) {
        self.written.retain(|owner, _| update.subjects.iter().any(|subject| subject.owner == *owner));
        let now = Timestamp::now();
        let due: Vec<Due<'_>> = update
            .subjects
            .iter()
            .filter_map(|subject| {
                let written = self.written.get(&subject.owner);
                let old = written.or_else(|| update.published.get(&subject.owner)).cloned();
                let new = aggregate::status(subject, news, old.as_ref(), now);
                (written != Some(&new)).then_some((subject, new, old))
            })
            .collect();
        let (client, recorder) = (&self.client, &self.recorder);
        let jobs: Vec<BoxFuture<'_, _>> = due.into_iter().map(|job| one(client, recorder, job).boxed()).collect();
        let outcomes: Vec<Option<(Owner, CircuitBreakerStatus)>> =
            stream::iter(jobs).buffer_unordered(AT_ONCE).collect().await;
        self.written.extend(outcomes.into_iter().flatten());
    }
}

/// Writes one status, and tells what happened; `None` if it must be tried again.
async fn one(
    client: &Client,
    recorder: &Recorder,
    (subject, new, old): Due<'_>,
) -> Option<(Owner, CircuitBreakerStatus)> {
    let owner = subject.owner.clone();
    if owner.kind == OwnerKind::CircuitBreaker
        && let Err(error) = write(client, &owner, &new).await
    {
        tracing::warn!("the status of {owner} cannot be written, trying again: {}", words(&error));
        return None;
    }
    for happening in aggregate::happenings(old.as_ref(), &new) {
        if let Err(error) = tell(recorder, subject, &happening).await {
            tracing::warn!("an Event about {owner} is lost ({}): {}", happening.reason, words(&error));
        }
    }
    Some((owner, new))
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

async fn tell(recorder: &Recorder, subject: &Subject, happening: &Happening) -> Result<(), kube::Error> {
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
        action: "Protect".into(),
        secondary: None,
    };
    recorder.publish(&event, &about).await
}
