//! What a CircuitBreaker's status says: an aggregate, conditions, and the nodes one by one, up to a limit.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is, as the nodes report it. One writer (an elected agent) puts it together; it is written when it changes, never
/// at a probe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CircuitBreakerStatus {
    /// The generation of the spec that this is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// Closed, HalfOpen or Open: the most open state of all nodes. Absent until a node has programmed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Since when.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Why: Initial, HttpStatus, ConnectFailed, ConnectTimeout, NoEndpoints, Operator, and so on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// More about why, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What takes over, and how many of its pods are Up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The primary's share of new connections in percent, over all nodes that report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// Nodes where it is open, of those that report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open: Option<String>,
    /// By how many nodes each limit is divided: 1 with scope Node. Absent without limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits_shared_by: Option<i32>,
    /// New connections over a limit in a minute, on all nodes, and the limit that is reached most: like 1200/min primary
    /// newConnectionsPerSecond. Absent while no limit bites.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited: Option<String>,
    /// Nodes, counted.
    #[serde(default)]
    pub counts: NodeCounts,
    /// Accepted, ResolvedRefs, Programmed, Degraded, DatapathCompatible.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Nodes one by one: with more than 32, those with an error or an open breaker first; `counts` has them all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["node".into()]))]
    pub nodes: Vec<NodeStatus>,
}

/// Nodes, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeCounts {
    /// Nodes whose agent reports.
    pub nodes: i32,
    /// Of these, closed.
    pub closed: i32,
    /// Of these, half-open.
    pub half_open: i32,
    /// Of these, open.
    pub open: i32,
    /// Of these, with the current generation in the kernel.
    pub programmed: i32,
    /// Nodes whose report is old because they are not Ready; they are in no other count.
    pub silent: i32,
}

/// What one node reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// Closed, HalfOpen, Open; Unknown for a node that is silent.
    pub state: String,
    /// Since when.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// More about why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The primary's share of new connections, permille.
    pub share: i32,
    /// The generation that the agent works with.
    pub desired_generation: i64,
    /// The generation that is in the kernel.
    pub applied_generation: i64,
    /// Its protected ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortStatus>,
    /// What went wrong there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A protected port on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PortStatus {
    /// The Service's port.
    pub port: i32,
    /// Closed, HalfOpen, Open.
    pub state: String,
    /// Pods of the primary that are Up, of all.
    pub primary: String,
    /// Pods of the backup that are Up, of all.
    pub backup: String,
}

fn date_time(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "string", "format": "date-time" })
}
