//! The state of the whole cluster for `kubectl breaker`, read once from the API server.

use anyhow::{Context as _, Result};
use breaker_api::crd::{CircuitBreaker, CircuitBreakerSpec, CircuitBreakerStatus, NodeReport, NodeReportSpec};
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use serde::{Deserialize, Serialize};

/// All CircuitBreakers and NodeReports of the cluster.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// All CircuitBreakers.
    pub circuit_breakers: Vec<BreakerView>,
    /// The reports of all nodes.
    pub nodes: Vec<NodeView>,
}

/// A CircuitBreaker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Desired state.
    pub spec: CircuitBreakerSpec,
    /// Observed state; absent until an agent has written it.
    pub status: Option<CircuitBreakerStatus>,
}

/// A node's report.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    /// Name of the node.
    pub node: String,
    /// The last report of its agent.
    pub report: NodeReportSpec,
}

/// Reads all CircuitBreakers and NodeReports.
///
/// # Errors
/// The API server does not answer, denies access, or does not have breaker's CRDs.
pub async fn read(client: Client) -> Result<Overview> {
    let breakers: Api<CircuitBreaker> = Api::all(client.clone());
    let reports: Api<NodeReport> = Api::all(client);
    let all = ListParams::default();
    let remedy = "is breaker installed (kubectl apply -k k8s/base), and may you list its objects?";
    let breakers = breakers.list(&all).await.with_context(|| format!("list CircuitBreakers; {remedy}"))?;
    let reports = reports.list(&all).await.with_context(|| format!("list NodeReports; {remedy}"))?;
    let breaker = |b: CircuitBreaker| BreakerView {
        namespace: b.namespace().unwrap_or_default(),
        name: b.name_any(),
        spec: b.spec,
        status: b.status,
    };
    Ok(Overview {
        circuit_breakers: breakers.items.into_iter().map(breaker).collect(),
        nodes: reports.items.into_iter().map(|r| NodeView { node: r.name_any(), report: r.spec }).collect(),
    })
}
