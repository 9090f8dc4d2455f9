//! `kubectl breaker uninstall`: stops the agents, removes what they left in each node's kernel, and leaves no status that
//! is not true any more. Objects that users have made stay. The chart runs it before `helm uninstall`.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, bail};
use breaker_api::crd::{CircuitBreaker, GROUP, NodeReport, STATUS_LEASE, STATUS_MANAGER};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    batch::v1::Job,
    coordination::v1::Lease,
    core::v1::{Node, Pod},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    AGENT_PODS, AGENTS, DAEMON_SET,
    args::UninstallArgs,
    connection::{Connection, explain},
};
use crate::output::out;

/// The Job that cleans one node. NODE stands for the node's name.
const JOB: &str = include_str!("../../../k8s/cleanup/job.yaml");
/// The image in [`JOB`], which is replaced by that of the agents.
const JOB_IMAGE: &str = "localhost:5000/breaker:0.1.0";
/// Label of the Jobs.
const JOBS: &str = "app.kubernetes.io/component=cleanup";

pub(super) async fn run(connection: &Connection, args: &UninstallArgs) -> Result<()> {
    let client = &connection.client;
    let end = Instant::now() + args.timeout;
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), AGENTS);
    let set = sets.get_opt(DAEMON_SET).await.map_err(|error| explain(error, "read the DaemonSet"))?;
    let image = args.image.clone().or_else(|| set.as_ref().and_then(image_of));
    let Some(image) = image else { bail!("--image is missing: there is no DaemonSet breaker-agent that names one") };
    if set.is_some() {
        sets.delete(DAEMON_SET, &DeleteParams::background())
            .await
            .map_err(|error| explain(error, "delete the DaemonSet"))?;
        out("the agents stop\n")?;
    }
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await;
    let nodes = nodes.map_err(|error| explain(error, "list Nodes"))?.items;
    let (ready, others): (Vec<Node>, Vec<Node>) = nodes.into_iter().partition(is_ready);
    let ready: Vec<String> = ready.iter().map(ResourceExt::name_any).collect();
    agents_gone(client, &ready, end).await?;
    let jobs: Api<Job> = Api::namespaced(client.clone(), AGENTS);
    for node in &ready {
        let text = JOB.replace("NODE", node).replace(JOB_IMAGE, &image);
        let job: Job = serde_saphyr::from_str(&text).context("read the Job that cleans a node")?;
        match jobs.create(&PostParams::default(), &job).await {
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            outcome => drop(outcome.map_err(|error| explain(error, "create the Job that cleans a node"))?),
        }
    }
    let missing = jobs_done(&jobs, &ready, end).await?;
    forget(client).await?;
    jobs.delete_collection(&DeleteParams::background(), &ListParams::default().labels(JOBS)).await?;
    let cleaned = ready.len() - missing.len();
    out(&format!("nothing of breaker is left in the kernels of {cleaned} nodes\n"))?;
    let left: Vec<String> = missing.into_iter().chain(others.iter().map(ResourceExt::name_any)).collect();
    if left.is_empty() {
        return Ok(());
    }
    // An uninstall must not fail because of a node that is off: its programs act for the lease, and end with its next boot.
    out(&format!("not reached: {}; run `breaker cleanup` there, or restart the node\n", left.join(", ")))
}

fn image_of(set: &DaemonSet) -> Option<String> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.clone()
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Waits until no agent runs on these nodes. The pods of a node that is not ready stay.
async fn agents_gone(client: &Client, nodes: &[String], end: Instant) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), AGENTS);
    loop {
        let list = pods.list(&ListParams::default().labels(AGENT_PODS)).await?;
        let is_here =
            |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()).is_some_and(|n| nodes.contains(n));
        if !list.items.iter().any(is_here) {
            return Ok(());
        }
        if Instant::now() >= end {
            bail!("agents still run; look at kubectl -n {AGENTS} get pods -o wide");
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// Waits for the Jobs. Returns the nodes whose Jobs did not end in time.
async fn jobs_done(jobs: &Api<Job>, nodes: &[String], end: Instant) -> Result<Vec<String>> {
    loop {
        let list = jobs.list(&ListParams::default().labels(JOBS)).await?;
        let done: BTreeMap<String, bool> = list
            .into_iter()
            .map(|job| (job.name_any(), job.status.is_some_and(|status| status.succeeded.unwrap_or_default() > 0)))
            .collect();
        let is_done = |node: &&String| done.get(&format!("breaker-cleanup-{node}")).copied().unwrap_or_default();
        let missing: Vec<String> = nodes.iter().filter(|node| !is_done(node)).cloned().collect();
        if missing.is_empty() || Instant::now() >= end {
            return Ok(missing);
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// Says in each status that no agent runs, and deletes what only agents use.
async fn forget(client: &Client) -> Result<()> {
    let breakers = Api::<CircuitBreaker>::all(client.clone()).list(&ListParams::default()).await?;
    let conditions: Vec<_> = [("Programmed", "Unknown"), ("Reconciling", "True")]
        .map(|(type_, status)| {
            json!({
                "type": type_, "status": status, "reason": "NoAgents", "message": "breaker was uninstalled",
                "lastTransitionTime": Timestamp::now(),
            })
        })
        .into();
    for breaker in breakers {
        let api: Api<CircuitBreaker> = Api::namespaced(client.clone(), &breaker.namespace().unwrap_or_default());
        let status = json!({
            "apiVersion": format!("{GROUP}/v1alpha1"), "kind": "CircuitBreaker", "status": { "conditions": conditions },
        });
        let params = PatchParams::apply(STATUS_MANAGER).force();
        api.patch_status(&breaker.name_any(), &params, &Patch::Apply(&status)).await?;
    }
    Api::<NodeReport>::all(client.clone()).delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), AGENTS);
    match leases.delete(STATUS_LEASE, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        outcome => outcome.map(drop).map_err(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_job_cleans_the_node_with_the_agents_image() {
        let text = JOB.replace("NODE", "n1").replace(JOB_IMAGE, "registry.example.com/breaker@sha256:1");
        let job: Job = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(job.name_any(), "breaker-cleanup-n1");
        let pod = job.spec.unwrap().template.spec.unwrap();
        assert_eq!(pod.node_name.as_deref(), Some("n1"));
        assert_eq!(pod.containers[0].image.as_deref(), Some("registry.example.com/breaker@sha256:1"));
    }
}
