//! This node's NodeReport. The module makes it from the agent's state, and writes it when it changed.

use breaker_api::crd::{
    NodeReport, NodeReportSpec, OwnerKind, RefusedService, ReportedAgent, ReportedLimit, ReportedService,
    ReportedState, ReportedTier,
};
use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::utils::Backoff as _,
};
use serde::Serialize;
use tokio::{
    sync::watch,
    time::{sleep, sleep_until, timeout},
};

use super::{
    NodeState,
    resolve::ResolvedBreaker,
    status_writer::Published,
    text::short,
    watch::{Backoff, error_text},
};
use crate::{clock, metrics::instruments::KubeObject, view};
use breaker_core::engine::snapshot::{Summary, TierSummary};

/// Shortest time between two writes.
const MIN_INTERVAL: Duration = Duration::from_millis(200);
/// Limit on writes per second by all nodes together, when something happens to all of them at once.
const WRITES_PER_SECOND: f64 = 100.0;
/// In clusters of up to this many nodes, writes have no random delay.
const SMALL_CLUSTER_NODES: usize = 20;
/// Shortest time between two writes of changes that are not urgent, in a small cluster.
const MIN_CALM_INTERVAL: Duration = Duration::from_secs(1);
/// How often the report is written without a change.
const REFRESH: Duration = Duration::from_secs(300);
/// Timeout of one write.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often the report is written while the Node is not Ready. The report then serves as the agent's heartbeat for
/// the other agents.
const REFRESH_NOT_READY: Duration = Duration::from_secs(10);
/// Longest random delay of a write.
const MAX_DELAY: Duration = Duration::from_secs(30);

/// Number of refused Services in a report.
const REFUSED: usize = 50;

/// Makes the report. `applied` holds the generation that was in force last, by service name, and is updated.
#[must_use]
pub fn make(state: &NodeState, applied: &mut HashMap<String, i64>) -> NodeReportSpec {
    let by_name: HashMap<&str, &Summary> = state.summaries.iter().map(|s| (s.name.as_str(), s)).collect();
    let mut services = Vec::new();
    let mut now_applied = HashMap::new();
    for result in &state.update.results {
        for (port, outside, service) in result.services() {
            let name = service.name.as_str();
            let Some(summary) = by_name.get(name) else { continue };
            let last = applied.get(name).copied().unwrap_or_default();
            let applied_generation = if summary.in_force && !result.hold { result.generation } else { last };
            now_applied.insert(name.to_owned(), applied_generation);
            services.push(ReportedService {
                kind: Some(result.owner.kind),
                namespace: result.owner.key.namespace.clone(),
                name: result.owner.key.name.clone(),
                uid: result.uid.clone(),
                port,
                outside,
                desired_generation: result.generation,
                applied_generation,
                state: summary.applied.map_or(ReportedState::NotProgrammed, |applied| applied.state.into()),
                since: summary.applied.map(|applied| clock::timestamp(applied.since_unix_ns)),
                reason: summary.applied.map(|applied| applied.reason),
                message: short(&summary.message),
                share: coarse(summary.applied.map_or(0, |applied| applied.share)),
                error: summary.error.as_deref().map(short),
                suspended_on: state.suspended.get(name).cloned().unwrap_or_default(),
                limits_shared_by: i32::try_from(summary.limits_shared_by).unwrap_or(i32::MAX),
                limited: summary.limited.as_ref().map(|active| ReportedLimit {
                    since: Some(clock::timestamp(active.since_unix_ns)),
                    limit: active.limit.to_string(),
                    per_minute: i64::try_from(active.per_minute).unwrap_or(i64::MAX),
                }),
                established: summary.established.map(view::established),
                primary: summary.tiers.first().map(tier).unwrap_or_default(),
                backups: summary.tiers.iter().skip(1).map(tier).collect(),
            });
        }
    }
    *applied = now_applied;
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    NodeReportSpec {
        agent: ReportedAgent {
            reported_at: None,
            version: env!("CARGO_PKG_VERSION").into(),
            attach: Some(state.attach),
            interfaces: count(state.interfaces),
            failed_interfaces: state.failed_interfaces.clone(),
            services: count(services.len()),
            open: count(services.iter().filter(|s| s.state == ReportedState::Open).count()),
            node_sockets: state.sockets.as_deref().map(short),
            incompatible: state.incompatible.clone(),
            bypass: state.bypass.clone(),
            unseen: state.unseen.iter().map(|note| short(note)).collect(),
            degraded: state.degraded.iter().map(|problem| short(problem)).collect(),
        },
        services,
        refused: state.update.results.iter().filter_map(refused).take(REFUSED).collect(),
    }
}

/// The refusal of a Service's annotations.
fn refused(result: &ResolvedBreaker) -> Option<RefusedService> {
    let refusal = result.refusal()?;
    (result.owner.kind == OwnerKind::Service).then(|| RefusedService {
        namespace: result.owner.key.namespace.clone(),
        name: result.owner.key.name.clone(),
        reason: refusal.reason.to_owned(),
        message: short(&refusal.message),
    })
}

fn tier(tier: &TierSummary) -> ReportedTier {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    ReportedTier {
        name: tier.name.clone(),
        up: count(tier.up),
        total: count(tier.total),
        checking: count(tier.checking),
        active: tier.active,
    }
}

/// Rounds the share (permille) down to hundreds, within 100 to 900, because a ramp changes the share ten times a
/// second. 0 and 1000 stay as they are.
fn coarse(share: u16) -> i32 {
    match share {
        0 | 1000 => i32::from(share),
        _ => i32::from((share / 100 * 100).clamp(100, 900)),
    }
}

/// Whether the report changed in a way that the other agents must learn soon. The numbers of pods that are Up and of
/// interfaces can wait.
fn is_urgent(old: Option<&NodeReportSpec>, new: &NodeReportSpec) -> bool {
    let Some(old) = old else { return true };
    let usable = |s: &ReportedService| s.backups.iter().any(|tier| tier.active);
    old.services.len() != new.services.len()
        || old.agent.failed_interfaces != new.agent.failed_interfaces
        || old.agent.degraded != new.agent.degraded
        || (&old.agent.incompatible, &old.agent.bypass) != (&new.agent.incompatible, &new.agent.bypass)
        || old.services.iter().zip(&new.services).any(|(a, b)| {
            (&a.name, &a.namespace, a.port, &a.kind) != (&b.name, &b.namespace, b.port, &b.kind)
                || (a.desired_generation, a.applied_generation) != (b.desired_generation, b.applied_generation)
                || (&a.state, &a.since, &a.reason, &a.error) != (&b.state, &b.since, &b.reason, &b.error)
                || usable(a) != usable(b)
                || a.suspended_on != b.suspended_on
                || (a.limited.is_some(), a.limits_shared_by) != (b.limited.is_some(), b.limits_shared_by)
        })
}

/// Writes the report whenever it changed. Returns when the sender of `state` is dropped.
pub(super) async fn run(client: Client, mut state: watch::Receiver<Option<Arc<NodeState>>>, published: Published) {
    let api: Api<NodeReport> = Api::all(client);
    // The uid of the Node and the report that were written last.
    let mut written: Option<(Option<String>, NodeReportSpec)> = None;
    let mut written_at = clock::instant();
    let mut applied = HashMap::new();
    let mut backoff = Backoff::default();
    let mut lost = false;
    loop {
        let Some(now) = state.borrow_and_update().clone() else {
            if state.changed().await.is_err() {
                return;
            }
            continue;
        };
        let nodes = published.agents();
        let (ready, uid) = (now.update.node.ready, now.update.node.uid.clone());
        let mut report = make(&now, &mut applied);
        let known = written.as_ref().filter(|(node, _)| *node == uid).map(|(_, report)| report);
        // Without a change, the report is still written from time to time: it may have been deleted, and it shows the
        // others that this agent is alive.
        let again = written_at + if ready { REFRESH } else { REFRESH_NOT_READY };
        let due = match known {
            Some(known) if *known == report => again,
            known if is_urgent(known, &report) => written_at + pause(nodes),
            _ => (written_at + calm(nodes)).min(again),
        };
        if clock::instant() < due {
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                () = sleep_until(due) => {}
            }
            continue;
        }
        // All nodes see the same event at the same time; the random delay spreads their writes.
        sleep(spread(nodes)).await;
        report.agent.reported_at = Some(clock::wall());
        let outcome = timeout(TIMEOUT, write(&api, &now, &report)).await;
        published.count_write(KubeObject::Report, outcome.as_ref().ok());
        let outcome = match outcome {
            Ok(outcome) => outcome.map_err(|error| error_text(&error)),
            Err(_) => Err("no answer in time".into()),
        };
        report.agent.reported_at = None;
        match outcome {
            Ok(()) => {
                if lost {
                    lost = false;
                    tracing::info!("this node's NodeReport is written again");
                }
                backoff.reset();
                written = Some((uid, report));
                written_at = clock::instant();
            }
            Err(error) => {
                if !lost {
                    lost = true;
                    tracing::warn!("cannot write this node's NodeReport, trying again: {error}");
                }
                sleep(backoff.next().unwrap_or(MIN_INTERVAL)).await;
            }
        }
    }
}

/// Shortest time between two writes, such that all nodes together stay below [`WRITES_PER_SECOND`].
fn pause(nodes: usize) -> Duration {
    MIN_INTERVAL.max(seconds(nodes, WRITES_PER_SECOND))
}

/// Shortest time between two writes of changes that are not urgent.
fn calm(nodes: usize) -> Duration {
    seconds(nodes, WRITES_PER_SECOND / 10.0).clamp(MIN_CALM_INTERVAL, Duration::from_secs(60))
}

fn seconds(nodes: usize, per_second: f64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "a count of nodes")]
    Duration::from_secs_f64(nodes as f64 / per_second)
}

/// A random delay, such that all nodes together stay below [`WRITES_PER_SECOND`]; zero in small clusters.
fn spread(nodes: usize) -> Duration {
    if nodes <= SMALL_CLUSTER_NODES {
        return Duration::ZERO;
    }
    seconds(nodes, WRITES_PER_SECOND).min(MAX_DELAY).mul_f64(fastrand::f64())
}

async fn write(api: &Api<NodeReport>, state: &NodeState, report: &NodeReportSpec) -> Result<(), kube::Error> {
    let node = &state.update.node;
    let metadata = ObjectMeta {
        name: Some(node.name.clone()),
        // The garbage collector deletes the report together with its Node.
        owner_references: node.uid.as_ref().map(|uid| {
            vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: node.name.clone(),
                uid: uid.clone(),
                ..OwnerReference::default()
            }]
        }),
        ..ObjectMeta::default()
    };
    if api.get_metadata_opt(&node.name).await?.is_none() {
        let object = NodeReport { metadata, ..NodeReport::new(&node.name, report.clone()) };
        drop(api.create(&PostParams::default(), &object).await?);
        return Ok(());
    }
    // A merge patch replaces lists as a whole (RFC 7396). That is safe, because this object has one writer.
    let patch = WholeReport { metadata: &metadata, spec: WholeSpec::new(report).map_err(kube::Error::SerdeError)? };
    drop(api.patch_metadata(&node.name, &PatchParams::default(), &Patch::Merge(&patch)).await?);
    Ok(())
}

/// A merge patch that replaces all of a report.
#[derive(Debug, Serialize)]
struct WholeReport<'a> {
    metadata: &'a ObjectMeta,
    spec: WholeSpec<'a>,
}

/// The spec of a report, with `null` for the fields that are omitted when empty: a merge patch removes a field only by
/// `null`. The list of services may be long; it is written as it is.
#[derive(Debug, Serialize)]
struct WholeSpec<'a> {
    agent: serde_json::Value,
    services: &'a [ReportedService],
    refused: Option<&'a [RefusedService]>,
}

impl<'a> WholeSpec<'a> {
    fn new(report: &'a NodeReportSpec) -> Result<Self, serde_json::Error> {
        let NodeReportSpec { agent, services, refused } = report;
        let mut agent = serde_json::to_value(agent)?;
        if let Some(agent) = agent.as_object_mut() {
            for field in OMITTED_OF_AGENT {
                agent.entry(*field).or_insert(serde_json::Value::Null);
            }
        }
        Ok(Self { agent, services, refused: (!refused.is_empty()).then_some(refused) })
    }
}

/// Fields of a report's agent that are omitted when empty.
const OMITTED_OF_AGENT: &[&str] =
    &["reportedAt", "failedInterfaces", "nodeSockets", "incompatible", "bypass", "unseen", "degraded"];

#[cfg(test)]
mod tests {
    use super::*;

    /// A merge patch that leaves a field out keeps its old value.
    #[test]
    fn an_empty_report_clears_every_field_of_a_full_one() {
        let some = || Some("x".to_owned());
        let full = NodeReportSpec {
            agent: ReportedAgent {
                reported_at: Some(clock::timestamp(1)),
                failed_interfaces: vec![String::new()],
                node_sockets: some(),
                incompatible: some(),
                bypass: some(),
                unseen: vec![String::new()],
                degraded: vec![String::new()],
                ..ReportedAgent::default()
            },
            refused: vec![RefusedService::default()],
            ..NodeReportSpec::default()
        };
        let full = serde_json::to_value(&full).unwrap();
        let cleared = serde_json::to_value(WholeSpec::new(&NodeReportSpec::default()).unwrap()).unwrap();
        let keys = |value: &serde_json::Value, at: &str| -> Vec<String> {
            let mut keys: Vec<String> = value.pointer(at).unwrap().as_object().unwrap().keys().cloned().collect();
            keys.sort();
            keys
        };
        for at in ["", "/agent"] {
            assert_eq!(keys(&cleared, at), keys(&full, at), "{at:?}");
        }
        // All fields of the types are in the comparison.
        assert_eq!(keys(&full, "/agent").len(), 12);
    }
}
