//! The `NodeReport` resource: what the agent of one node reports. There is one object per node, which only that
//! node's agent writes.

use breaker_common::StateReason;
use jiff::{SignedDuration, Timestamp};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ReportedState, date_time};
use crate::established::EstablishedCounts;

/// A report that is older than this has no agent behind it, also if its Node is Ready. Agents write every five minutes
/// without a change.
pub const GONE: SignedDuration = SignedDuration::from_mins(15);

/// What the agent of one node reports. Only that agent writes the object, and only when something changed. The
/// elected agent makes the status of CircuitBreakers from all reports, and `kubectl breaker` shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "breaker.dev",
    version = "v1alpha1",
    kind = "NodeReport",
    plural = "nodereports",
    category = "breaker",
    derive = "PartialEq",
    doc = "What breaker's agent on one node reports. Only that agent writes it; the elected agent and kubectl breaker \
           read it.",
    printcolumn = r#"{"name":"Version","type":"string","jsonPath":".spec.agent.version"}"#,
    printcolumn = r#"{"name":"Attach","type":"string","jsonPath":".spec.agent.attach"}"#,
    printcolumn = r#"{"name":"Interfaces","type":"integer","jsonPath":".spec.agent.interfaces"}"#,
    printcolumn = r#"{"name":"Services","type":"integer","jsonPath":".spec.agent.services"}"#,
    printcolumn = r#"{"name":"Open","type":"integer","jsonPath":".spec.agent.open"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeReportSpec {
    /// State of the agent.
    pub agent: ReportedAgent,
    /// State of the protected Services.
    pub services: Vec<ReportedService>,
    /// Services whose annotations are refused, for as long as they are, up to 50. A refused CircuitBreaker says so in
    /// its own status.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<RefusedService>,
}

/// A Service whose annotations are refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RefusedService {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The reason in one word, like Invalid or BackupNotFound.
    pub reason: String,
    /// The reason for people: the annotation, its value and what is allowed.
    pub message: String,
}

/// State of an agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedAgent {
    /// When the agent wrote this report. It writes when something changed, every five minutes without a change and,
    /// while its Node is not Ready, every ten seconds: then the report serves as heartbeat.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Timestamp>,
    /// Version of the agent.
    pub version: String,
    /// How the programs are attached: Tcx or Clsact.
    #[schemars(with = "String")]
    #[serde(with = "crate::text::or_empty")]
    pub attach: Option<AttachMode>,
    /// Number of interfaces with programs.
    pub interfaces: i32,
    /// Interfaces that should have programs but have none, each with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed_interfaces: Vec<String>,
    /// Number of protected Services.
    pub services: i32,
    /// Number of protected Services whose breaker is open.
    pub open: i32,
    /// Why connections of the node's own processes and of pods with hostNetwork are not redirected. Absent if they
    /// are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_sockets: Option<String>,
    /// The socket load balancer that hides Services' addresses from the programs. Absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incompatible: Option<String>,
    /// Programs of another datapath, which may deliver answers past breaker's programs. Absent if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bypass: Option<String>,
    /// What the programs cannot see on the node: pods without a host side, patterns without an interface.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unseen: Vec<String>,
    /// What the agent does without because of an error, like an address that it cannot listen on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub degraded: Vec<String>,
}

/// State of one protected Service on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedService {
    /// Kind of the object that asks for protection: CircuitBreaker, or Service for a Service with annotations.
    #[schemars(with = "String")]
    #[serde(with = "crate::text::or_empty")]
    pub kind: Option<OwnerKind>,
    /// Namespace of that object.
    pub namespace: String,
    /// Name of that object.
    pub name: String,
    /// Uid of that object. An object that is created again under the same name has another uid.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The protected port of the Service. If there are several, one of them stands for all.
    pub port: i32,
    /// The entry is about connections from outside of the cluster only, because kube-proxy serves them with other pods
    /// than the cluster IP: one of the Service's traffic policies is Local.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// Generation of the spec that the agent works with; 0 for a Service with annotations.
    pub desired_generation: i64,
    /// Generation of the spec that is in force in the kernel.
    pub applied_generation: i64,
    /// Closed, HalfOpen or Open, as in the kernel.
    #[schemars(with = "String")]
    pub state: ReportedState,
    /// When the state began.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Why the breaker is in this state.
    #[schemars(with = "String")]
    #[serde(with = "crate::text::or_empty")]
    pub reason: Option<StateReason>,
    /// Details of the reason.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The primary's share of new connections, in permille. During a ramp it is rounded to hundreds.
    pub share: i32,
    /// Error of the last write to the kernel. Absent if the write succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Interfaces on which no answers of the backup were seen. New connections are left to kube-proxy there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub suspended_on: Vec<String>,
    /// Number of nodes by which the limits are divided. Absent without limits.
    #[serde(skip_serializing_if = "is_zero")]
    pub limits_shared_by: i32,
    /// The limit that is being exceeded, updated at most once a minute. Absent if none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited: Option<ReportedLimit>,
    /// The connections that were established when the service left a tier. Absent if there were none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub established: Option<EstablishedCounts>,
    /// The primary.
    pub primary: ReportedTier,
    /// The backups, in order of preference.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backups: Vec<ReportedTier>,
}

impl ReportedService {
    /// The name under which the node's agent knows it. `service`: the name of the protected Service.
    #[must_use]
    pub fn service_name(&self, service: &str) -> String {
        format!("{}/{service}:{}{}", self.namespace, self.port, if self.outside { "/outside" } else { "" })
    }
}

/// The kind of the object that asks for protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum OwnerKind {
    /// A CircuitBreaker.
    CircuitBreaker,
    /// A Service with annotations.
    Service,
}

impl OwnerKind {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::CircuitBreaker => "CircuitBreaker",
            Self::Service => "Service",
        }
    }
}

/// A limit that is being exceeded. The addresses of the clients stay on the node, where `breaker get` shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedLimit {
    /// When the limit was first exceeded.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Tier and name of the limit that is exceeded most often, like primary newConnectionsPerSecond.
    pub limit: String,
    /// Number of new connections per minute over a limit.
    pub per_minute: i64,
}

/// A tier and the number of its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ReportedTier {
    /// Name of the tier.
    pub name: String,
    /// Number of pods that are Up or have no check.
    pub up: i32,
    /// Number of pods.
    pub total: i32,
    /// Number of pods that were not checked yet.
    #[serde(skip_serializing_if = "is_zero")]
    pub checking: i32,
    /// For a backup: whether it gets the connections while the breaker is open.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub active: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's skip_serializing_if passes a reference")]
const fn is_zero(number: &i32) -> bool {
    *number == 0
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttachMode {
    /// tcx links where the kernel has them, clsact filters elsewhere.
    Auto,
    /// tcx links (kernel 6.6).
    Tcx,
    /// cls_bpf filters on a clsact qdisc.
    Clsact,
}

impl AttachMode {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Auto => "Auto",
            Self::Tcx => "Tcx",
            Self::Clsact => "Clsact",
        }
    }
}
