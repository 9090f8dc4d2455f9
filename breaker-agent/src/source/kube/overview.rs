//! What all nodes say, for people: read once, over the API.

use anyhow::{Context as _, Result};
use kube::{Api, Client, ResourceExt as _, api::ListParams};
use serde::Serialize;

use super::api::{CircuitBreaker, CircuitBreakerSpec, CircuitBreakerStatus, NodeReport, NodeReportSpec};

/// The cluster as breaker's objects describe it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// Every CircuitBreaker.
    pub circuit_breakers: Vec<BreakerView>,
    /// Every node's report.
    pub nodes: Vec<NodeView>,
}

/// A CircuitBreaker.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What is wanted.
    pub spec: CircuitBreakerSpec,
    /// What is.
    pub status: Option<CircuitBreakerStatus>,
}

/// A node's report.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    /// The node.
    pub node: String,
    /// What its agent said last.
    pub report: NodeReportSpec,
}

/// Reads everything.
///
/// # Errors
/// An API server that does not answer, or does not let us; CRDs that are not there.
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
