//! `kubectl breaker flows`: asks the agents in their pods, because no object of the API holds connections.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, anyhow, bail};
use breaker_api::{crd::NodeReport, flows::FlowView};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt as _,
    api::{AttachParams, ListParams},
};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt as _;

use super::{
    AGENT_PODS, AGENTS,
    args::FlowsArgs,
    connection::{Connection, explain},
};
use crate::{
    output::{out, print_as},
    show,
    table::{Paint, RED},
    visible::visible,
};

/// Connections on one node.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeFlows {
    /// The node.
    node: String,
    /// Connections, youngest first.
    flows: Vec<FlowView>,
}

pub(super) async fn run(connection: &Connection, args: &FlowsArgs) -> Result<()> {
    let (_, namespace, name) = connection.one(&args.name);
    let services = service_names(connection, &namespace, name).await?;
    let pods = agents(&connection.client, args.node.as_deref()).await?;
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    for pod in pods {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        match of_pod(&connection.client, &pod, &services, args.limit).await {
            Ok(flows) => found.push(NodeFlows { node, flows }),
            Err(error) => failed.push(format!("{node}: {error:#}")),
        }
    }
    let paint = Paint::for_stdout();
    print_as(args.output, &found, || {
        let mut text = String::new();
        for node in visible(&found)? {
            text.push_str(&format!("{}:\n{}", node.node, show::flows(&node.flows, None, paint)));
        }
        Ok(text)
    })?;
    for failure in &failed {
        out(&format!("{}\n", paint.with(RED, failure)))?;
    }
    if found.is_empty() { bail!("no agent answered") } else { Ok(()) }
}

/// The names under which the agents know a breaker: one for each protected port and kind of access.
async fn service_names(connection: &Connection, namespace: &str, name: &str) -> Result<Vec<String>> {
    let service = connection.breaker(&format!("{namespace}/{name}")).await?.spec.service.name;
    let reports = Api::<NodeReport>::all(connection.client.clone()).list(&ListParams::default()).await;
    let reports = reports.map_err(|error| explain(error, "list NodeReports"))?;
    let services = reports.items.into_iter().flat_map(|report| report.spec.services);
    let of_breaker = services.filter(|s| s.namespace == namespace && s.name == name);
    let names: BTreeSet<String> = of_breaker.map(|s| s.service_name(&service)).collect();
    if names.is_empty() { bail!("no node protects {namespace}/{name}") } else { Ok(names.into_iter().collect()) }
}

async fn agents(client: &Client, node: Option<&str>) -> Result<Vec<Pod>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), AGENTS);
    let mut params = ListParams::default().labels(AGENT_PODS);
    if let Some(node) = node {
        params = params.fields(&format!("spec.nodeName={node}"));
    }
    let pods = api.list(&params).await.map_err(|error| explain(error, "list the agents' pods in breaker-system"))?;
    if pods.items.is_empty() {
        bail!("there is no agent{} in breaker-system", node.map(|node| format!(" on node {node}")).unwrap_or_default());
    }
    Ok(pods.items)
}

async fn of_pod(client: &Client, pod: &Pod, services: &[String], limit: usize) -> Result<Vec<FlowView>> {
    let api: Api<Pod> = Api::namespaced(client.clone(), AGENTS);
    let mut flows = Vec::new();
    for service in services {
        let command = ["/breaker", "flows", service, "--limit", &limit.to_string(), "-o", "json"].map(str::to_owned);
        let params = AttachParams::default().container("agent");
        let mut process =
            api.exec(&pod.name_any(), command, &params).await.context("run `breaker flows` in the agent's pod")?;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let mut streams = (process.stdout(), process.stderr());
        let status = process.take_status();
        if let Some(stream) = &mut streams.0 {
            stream.read_to_string(&mut stdout).await?;
        }
        if let Some(stream) = &mut streams.1 {
            stream.read_to_string(&mut stderr).await?;
        }
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        if status.is_some_and(|status| status.status.as_deref() != Some("Success")) {
            return Err(anyhow!("{}", stderr.trim()));
        }
        flows.extend(serde_json::from_str::<Vec<FlowView>>(&stdout).context("read the agent's answer")?);
    }
    Ok(flows)
}
