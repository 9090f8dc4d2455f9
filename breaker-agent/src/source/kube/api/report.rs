//! What a node's agent tells the others: `NodeReport`, one object a node, written by that node's agent only.

use jiff::Timestamp;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one node's agent does. Written by it alone, when something changed; the elected agent makes the status of
/// CircuitBreakers of it, and `kubectl breaker` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "breaker.dev",
    version = "v1alpha1",
    kind = "NodeReport",
    plural = "nodereports",
    category = "breaker",
    derive = "PartialEq",
    doc = "What breaker's agent on one node does; written by that agent only, for the agents and for kubectl breaker.",
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".spec.agent.version"}"#,
    printcolumn = r#"{"name":"Attach","type":"string","jsonPath":".spec.agent.attach"}"#,
    printcolumn = r#"{"name":"Interfaces","type":"integer","jsonPath":".spec.agent.interfaces"}"#,
    printcolumn = r#"{"name":"Services","type":"integer","jsonPath":".spec.agent.services"}"#,
    printcolumn = r#"{"name":"Open","type":"integer","jsonPath":".spec.agent.open"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeReportSpec {
    /// About the agent.
    pub agent: ReportedAgent,
    /// What it protects.
    pub services: Vec<ReportedService>,
}

/// About an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedAgent {
    /// When it wrote this; it writes when something changed and, while its Node is not Ready, every few seconds: then this
    /// is its sign of life.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Timestamp>,
    /// Its version.
    pub version: String,
    /// How programs are attached: Tcx or Clsact.
    pub attach: String,
    /// Interfaces with programs.
    pub interfaces: i32,
    /// Interfaces that should have programs and have none, with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_interfaces: Vec<String>,
    /// Protected ports.
    pub services: i32,
    /// Of these, open.
    pub open: i32,
    /// Why the node's own processes and pods with hostNetwork are not protected, if they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_sockets: Option<String>,
    /// What hides Services' addresses from the programs, if anything does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incompatible: Option<String>,
}

/// A protected port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedService {
    /// What asked for it: CircuitBreaker, or Service for one with annotations.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid: one that is made again under the same name is another.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The Service's port; of several protected ones the first, which stands for all.
    pub port: i32,
    /// The generation that the agent works with (of a Service: 0).
    pub desired_generation: i64,
    /// The generation that is in the kernel.
    pub applied_generation: i64,
    /// Closed, HalfOpen or Open, as it is in the kernel.
    pub state: String,
    /// Since when.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Why.
    pub reason: String,
    /// More about why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The primary's share of new connections, permille.
    pub share: i32,
    /// What goes wrong in the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// By how many nodes its limits are divided; absent without limits.
    #[serde(skip_serializing_if = "is_zero")]
    pub limits_shared_by: i32,
    /// The limit that bites, if one does; at most once a minute it says how often.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited: Option<ReportedLimit>,
    /// The primary.
    pub primary: ReportedTier,
    /// The backups, in order of preference.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backups: Vec<ReportedTier>,
}

/// A limit that bites. Clients' addresses stay on the node: `breaker get` shows them there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedLimit {
    /// Since when.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The tier and the limit that is reached most, like primary newConnectionsPerSecond.
    pub limit: String,
    /// New connections over a limit in a minute.
    pub per_minute: i64,
}

/// A tier, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedTier {
    /// Its name.
    pub name: String,
    /// Pods that are Up, or not checked.
    pub up: i32,
    /// Pods.
    pub total: i32,
    /// Pods that were not checked yet.
    #[serde(skip_serializing_if = "is_zero")]
    pub checking: i32,
    /// Whether it is the one that takes, or would take, the connections.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub active: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's shape")]
const fn is_zero(number: &i32) -> bool {
    *number == 0
}

fn date_time(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "string", "format": "date-time" })
}
