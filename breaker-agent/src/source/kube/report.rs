//! What this node's agent tells the others: makes its NodeReport, and writes it when it changed.

use std::{collections::HashMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client, ResourceExt as _,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use tokio::sync::watch;

use super::{
    Facts,
    api::{NodeReport, NodeReportSpec, ReportedAgent, ReportedService, ReportedTier},
    watch::{Patience, words},
};
use crate::agent::status::{Summary, TierSummary};

/// The least between two writes.
const PAUSE: Duration = Duration::from_millis(200);
/// Writes a second that all nodes together may cost when something happens to all of them at once.
const WRITES_PER_SECOND: f64 = 100.0;
/// Clusters up to this size need no spreading.
const SMALL: usize = 20;
/// How often the report is looked for without a change.
const CHECK: Duration = Duration::from_secs(300);
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
                port: *port,
                desired_generation: subject.generation,
                applied_generation,
                state: summary.state.to_owned(),
                since: summary.since,
                reason: summary.reason.to_owned(),
                message: summary.message.clone(),
                share: coarse(summary.share),
                error: summary.error.clone(),
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
            incompatible: facts.incompatible.clone(),
            host_network_pods: count(facts.update.host_network_pods),
        },
        services,
    }
}

fn tier(tier: &TierSummary) -> ReportedTier {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    ReportedTier { name: tier.name.clone(), up: count(tier.up), total: count(tier.total), active: tier.active }
}

/// A ramp moves the share ten times a second; a tenth of the way is worth a word.
fn coarse(share: u16) -> i32 {
    match share {
        0 | 1000 => i32::from(share),
        _ => i32::from((share / 100 * 100).clamp(100, 900)),
    }
}

/// Writes the report whenever it changed, for ever. `nodes` is how many there are.
pub(super) async fn publish(
    client: Client,
    mut facts: watch::Receiver<Option<Arc<Facts>>>,
    nodes: watch::Receiver<usize>,
) {
    let api: Api<NodeReport> = Api::all(client);
    let mut written: Option<NodeReportSpec> = None;
    let mut applied = HashMap::new();
    let mut patience = Patience::default();
    let mut lost = false;
    loop {
        let ready = facts.borrow().as_ref().is_none_or(|facts| facts.update.node.ready);
        let pause = if ready { CHECK } else { SIGN_OF_LIFE };
        // Once in a while without a change: somebody may have deleted it, or the Node came back as another one.
        tokio::select! {
            changed = facts.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause.mul_f64(0.75 + 0.5 * fastrand::f64())) => {
                if !ready {
                    written = None;
                }
                let name = facts.borrow().as_ref().map(|facts| facts.update.node.name.clone());
                if let Some(name) = name && matches!(api.get_metadata_opt(&name).await, Ok(None)) {
                    written = None;
                }
            }
        }
        // All nodes see the same thing at the same time; their writes need not come at the same time.
        let wait = spread(*nodes.borrow());
        tokio::time::sleep(wait).await;
        loop {
            let Some(now) = facts.borrow_and_update().clone() else { break };
            let mut report = make(&now, &mut applied);
            if written.as_ref() == Some(&report) {
                break;
            }
            report.agent.reported_at = Some(Timestamp::now());
            let outcome = write(&api, &now, &report).await;
            report.agent.reported_at = None;
            match outcome {
                Ok(()) => {
                    if lost {
                        lost = false;
                        tracing::info!("this node's report is written again");
                    }
                    kube::runtime::utils::Backoff::reset(&mut patience);
                    written = Some(report);
                    tokio::time::sleep(PAUSE).await;
                }
                Err(error) => {
                    if !lost {
                        lost = true;
                        tracing::warn!("this node's report cannot be written, trying again: {}", words(&error));
                    }
                    tokio::time::sleep(patience.next().unwrap_or(PAUSE)).await;
                }
            }
        }
    }
}

fn spread(nodes: usize) -> Duration {
    if nodes <= SMALL {
        return Duration::ZERO;
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of nodes")]
    let span = Duration::from_secs_f64(nodes as f64 / WRITES_PER_SECOND).min(LONGEST);
    span.mul_f64(fastrand::f64())
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
