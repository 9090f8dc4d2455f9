//! What this node's agent tells the others: makes its NodeReport, and writes it when it changed.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client, ResourceExt as _,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::utils::Backoff as _,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    Facts,
    aggregate::short,
    api::{NodeReport, NodeReportSpec, ReportedAgent, ReportedLimit, ReportedService, ReportedTier},
    publish::Published,
    watch::{Patience, words},
};
use crate::agent::status::{Summary, TierSummary};

/// The least between two writes.
const PAUSE: Duration = Duration::from_millis(200);
/// Writes a second that all nodes together may cost when something happens to all of them at once.
const WRITES_PER_SECOND: f64 = 100.0;
/// Clusters up to this size need no spreading.
const SMALL: usize = 20;
/// The least between two writes about what can wait, in a small cluster.
const CALM: Duration = Duration::from_secs(1);
/// How often it is written without a change.
const REFRESH: Duration = Duration::from_secs(300);
/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is written while the Node is not Ready.
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// The longest that a write is put off for the others' sake.
const LONGEST: Duration = Duration::from_secs(30);

/// Makes the report. `applied` remembers the generation that was in the kernel last, by name.
#[must_use]
pub fn make(facts: &Facts, applied: &mut HashMap<String, i64>) -> NodeReportSpec {
    let by_name: HashMap<&str, &Summary> = facts.summaries.iter().map(|s| (s.name.as_str(), s)).collect();
    let mut services = Vec::new();
    let mut now_applied = HashMap::new();
    for subject in &facts.update.subjects {
        for (port, service) in &subject.ports {
            let name = service.name.as_str();
            let Some(summary) = by_name.get(name) else { continue };
            let last = applied.get(name).copied().unwrap_or_default();
            let applied_generation = if summary.in_force && !subject.hold { subject.generation } else { last };
            now_applied.insert(name.to_owned(), applied_generation);
            services.push(ReportedService {
                kind: subject.owner.kind.label().to_owned(),
                namespace: subject.owner.key.namespace.clone(),
                name: subject.owner.key.name.clone(),
                uid: subject.uid.clone(),
                port: *port,
                desired_generation: subject.generation,
                applied_generation,
                state: summary.state.to_owned(),
                since: summary.since,
                reason: summary.reason.to_owned(),
                message: short(&summary.message),
                share: coarse(summary.share),
                error: summary.error.as_deref().map(short),
                limits_shared_by: i32::try_from(summary.limits_shared_by).unwrap_or(i32::MAX),
                limited: summary.limited.as_ref().map(|biting| ReportedLimit {
                    since: Some(biting.since),
                    limit: biting.limit.clone(),
                    per_minute: i64::try_from(biting.per_minute).unwrap_or(i64::MAX),
                }),
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
            attach: facts.attach.clone(),
            interfaces: count(facts.interfaces),
            failed_interfaces: facts.failed_interfaces.clone(),
            services: count(services.len()),
            open: count(services.iter().filter(|s| s.state == "Open").count()),
            node_sockets: facts.sockets.as_deref().map(short),
            incompatible: facts.incompatible.clone(),
        },
        services,
    }
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

/// A ramp moves the share ten times a second; a tenth of the way is worth a word.
fn coarse(share: u16) -> i32 {
    match share {
        0 | 1000 => i32::from(share),
        _ => i32::from((share / 100 * 100).clamp(100, 900)),
    }
}

/// Whether one report says something of another that others should know soon: not how many pods of how many are Up, nor
/// how many interfaces there are.
fn is_urgent(old: Option<&NodeReportSpec>, new: &NodeReportSpec) -> bool {
    let Some(old) = old else { return true };
    let usable = |s: &ReportedService| s.backups.iter().any(|tier| tier.active);
    old.services.len() != new.services.len()
        || old.agent.failed_interfaces != new.agent.failed_interfaces
        || old.agent.incompatible != new.agent.incompatible
        || old.services.iter().zip(&new.services).any(|(a, b)| {
            (&a.name, &a.namespace, a.port, &a.kind) != (&b.name, &b.namespace, b.port, &b.kind)
                || (a.desired_generation, a.applied_generation) != (b.desired_generation, b.applied_generation)
                || (&a.state, &a.since, &a.reason, &a.error) != (&b.state, &b.since, &b.reason, &b.error)
                || usable(a) != usable(b)
                || (a.limited.is_some(), a.limits_shared_by) != (b.limited.is_some(), b.limits_shared_by)
        })
}

/// Writes the report whenever it changed, for ever.
pub(super) async fn publish(client: Client, mut facts: watch::Receiver<Option<Arc<Facts>>>, published: Published) {
    let api: Api<NodeReport> = Api::all(client);
    // For which Node, and what.
    let mut written: Option<(Option<String>, NodeReportSpec)> = None;
    let mut written_at = Instant::now();
    let mut applied = HashMap::new();
    let mut patience = Patience::default();
    let mut lost = false;
    loop {
        let Some(now) = facts.borrow_and_update().clone() else {
            if facts.changed().await.is_err() {
                return;
            }
            continue;
        };
        let nodes = published.agents();
        let (ready, uid) = (now.update.node.ready, now.update.node.uid.clone());
        let mut report = make(&now, &mut applied);
        let known = written.as_ref().filter(|(node, _)| *node == uid).map(|(_, report)| report);
        // Without a change it is written once in a while: somebody may have deleted it, and others see that we live.
        let again = written_at + if ready { REFRESH } else { SIGN_OF_LIFE };
        let due = match known {
            Some(known) if *known == report => again,
            known if is_urgent(known, &report) => written_at + pause(nodes),
            _ => (written_at + calm(nodes)).min(again),
        };
        if Instant::now() < due {
            tokio::select! {
                changed = facts.changed() => if changed.is_err() { return },
                () = sleep_until(due) => {}
            }
            continue;
        }
        // All nodes see the same thing at the same time; their writes need not come at the same time.
        sleep(spread(nodes)).await;
        report.agent.reported_at = Some(Timestamp::now());
        let outcome = match timeout(PATIENCE, write(&api, &now, &report)).await {
            Ok(outcome) => outcome.map_err(|error| words(&error)),
            Err(_) => Err("no answer in time".into()),
        };
        report.agent.reported_at = None;
        match outcome {
            Ok(()) => {
                if lost {
                    lost = false;
                    tracing::info!("this node's report is written again");
                }
                patience.reset();
                written = Some((uid, report));
                written_at = Instant::now();
            }
            Err(error) => {
                if !lost {
                    lost = true;
                    tracing::warn!("this node's report cannot be written, trying again: {error}");
                }
                sleep(patience.next().unwrap_or(PAUSE)).await;
            }
        }
    }
}

/// The least between two writes, so that all nodes together keep their bound.
fn pause(nodes: usize) -> Duration {
    PAUSE.max(seconds(nodes, WRITES_PER_SECOND))
}

/// The least between two writes about what can wait.
fn calm(nodes: usize) -> Duration {
    seconds(nodes, WRITES_PER_SECOND / 10.0).clamp(CALM, Duration::from_secs(60))
}

fn seconds(nodes: usize, per_second: f64) -> Duration {
    #[expect(clippy::cast_precision_loss, reason = "a count of nodes")]
    Duration::from_secs_f64(nodes as f64 / per_second)
}

fn spread(nodes: usize) -> Duration {
    if nodes <= SMALL {
        return Duration::ZERO;
    }
    seconds(nodes, WRITES_PER_SECOND).min(LONGEST).mul_f64(fastrand::f64())
}

async fn write(api: &Api<NodeReport>, facts: &Facts, report: &NodeReportSpec) -> Result<(), kube::Error> {
    let node = &facts.update.node;
    let mut object = NodeReport::new(&node.name, report.clone());
    // When the Node goes, its report goes with it.
    object.metadata = ObjectMeta {
        name: Some(node.name.clone()),
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
    match api.get_metadata_opt(&node.name).await? {
        None => drop(api.create(&PostParams::default(), &object).await?),
        // Lists are replaced as a whole by a merge patch (RFC 7396); this object has one writer.
        Some(found) => {
            let gone = serde_json::json!({ "metadata": { "ownerReferences": object.metadata.owner_references }, "spec": nulled(report)? });
            drop(api.patch_metadata(&found.name_any(), &PatchParams::default(), &Patch::Merge(&gone)).await?);
        }
    }
    Ok(())
}

/// Fields that are left out when empty must be taken away by name.
fn nulled(report: &NodeReportSpec) -> Result<serde_json::Value, kube::Error> {
    let mut spec = serde_json::to_value(report).map_err(kube::Error::SerdeError)?;
    if let Some(agent) = spec["agent"].as_object_mut() {
        for field in ["failedInterfaces", "incompatible"] {
            agent.entry(field).or_insert(serde_json::Value::Null);
        }
    }
    Ok(spec)
}
