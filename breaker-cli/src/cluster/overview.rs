//! CircuitBreakers and NodeReports, read once from the API server.

use std::borrow::Cow;

use anyhow::Result;
use breaker_api::crd::{
    CircuitBreaker, CircuitBreakerSpec, CircuitBreakerStatus, NodeReport, NodeReportSpec, REASON_ANNOTATION,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Api, ResourceExt as _, api::ListParams};
use serde::{Deserialize, Serialize};

use super::connection::{Connection, explain};

/// The breakers of a namespace or of the cluster, and the nodes' views of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// The CircuitBreakers.
    pub circuit_breakers: Vec<BreakerView>,
    /// The reports of all nodes; empty if the caller may not read them.
    pub nodes: Vec<NodeView>,
    /// Why the reports are missing.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub nodes_missing: Option<String>,
}

/// A CircuitBreaker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BreakerView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Why it is forced, in the words of whoever forced it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub override_reason: Option<String>,
    /// Desired state, with the override that is in force.
    pub spec: CircuitBreakerSpec,
    /// Observed state; absent until an agent has written it.
    pub status: Option<CircuitBreakerStatus>,
}

impl From<CircuitBreaker> for BreakerView {
    fn from(breaker: CircuitBreaker) -> Self {
        Self {
            namespace: breaker.namespace().unwrap_or_default(),
            name: breaker.name_any(),
            override_reason: breaker.annotations().get(REASON_ANNOTATION).cloned(),
            // Of annotations that are wrong, condition Accepted tells.
            spec: breaker.spec_in_force(Timestamp::now()).map_or_else(|_| breaker.spec.clone(), Cow::into_owned),
            status: breaker.status,
        }
    }
}

/// A node's report.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    /// Name of the node.
    pub node: String,
    /// The last report of its agent.
    pub report: NodeReportSpec,
}

/// How bad a condition is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Severity {
    /// The request is carried out, and something is not as it should be.
    Warning,
    /// The request, or a part of it, is not carried out.
    Error,
}

/// How bad a condition is; `None` if it shows no problem. `Stalled` repeats `Accepted` or `ResolvedRefs`.
pub(super) fn severity(condition: &Condition) -> Option<Severity> {
    match (condition.type_.as_str(), condition.status.as_str()) {
        ("Stalled", _) => None,
        ("Degraded" | "Reconciling", status) => (status == "True").then_some(Severity::Warning),
        (_, status) => (status == "False").then_some(Severity::Error),
    }
}

/// Reads the CircuitBreakers of the namespace that is meant, and the NodeReports if the caller may. Of the reports, only
/// the services of that namespace are kept.
///
/// # Errors
/// The API server does not answer, denies access, or does not have breaker's CRDs.
pub(super) async fn read(connection: &Connection) -> Result<Overview> {
    let all = ListParams::default();
    let breakers = connection.api::<CircuitBreaker>().list(&all).await;
    let breakers = breakers.map_err(|error| explain(error, "list CircuitBreakers"))?;
    let reports = Api::<NodeReport>::all(connection.client.clone()).list(&all).await;
    let (reports, nodes_missing) = match reports {
        Ok(reports) => (reports.items, None),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            (Vec::new(), Some("you may not list NodeReports, which belong to the whole cluster".to_owned()))
        }
        Err(error) => (Vec::new(), Some(format!("{:#}", explain(error, "list NodeReports")))),
    };
    let view = |report: NodeReport| {
        let mut view = NodeView { node: report.name_any(), report: report.spec };
        if let Some(namespace) = &connection.namespace {
            view.report.services.retain(|service| service.namespace == *namespace);
            view.report.refused.retain(|service| service.namespace == *namespace);
        }
        view
    };
    Ok(Overview {
        circuit_breakers: breakers.items.into_iter().map(BreakerView::from).collect(),
        nodes: reports.into_iter().map(view).collect(),
        nodes_missing,
    })
}
