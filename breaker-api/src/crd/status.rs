//! The status of a CircuitBreaker: a summary over all nodes, conditions, and the state of up to 32 nodes.

use breaker_common::{BreakerState, StateReason};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::date_time;
use crate::established::EstablishedCounts;

/// The state of the CircuitBreaker on the nodes. Only the elected agent writes it, from the nodes' reports, and only
/// when it changes, never after a mere probe.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CircuitBreakerStatus {
    /// Generation of the spec that every reporting node works with.
    #[serde(default)]
    pub observed_generation: i64,
    /// Closed, HalfOpen or Open: the most open state of all nodes. NotProtected if the request is refused and nothing is
    /// in force. Absent until the first node reports a state.
    #[schemars(with = "Option<String>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ReportedState>,
    /// When the state began.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Why the breaker is in this state: Initial, HttpStatus, ConnectFailed, ConnectTimeout, NoEndpoints, Operator,
    /// and so on; the reason of the condition that refuses the request, if the state is NotProtected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Details of the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The backup that takes over and how many of its pods are Up, as seen by the node that sees the fewest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The primary's share of new connections in percent, as the mean of all nodes that report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// Number of nodes where the breaker is open, of the nodes that report, like 1/3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open: Option<String>,
    /// Number of nodes by which each limit is divided: 1 with scope Node. Absent without limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits_shared_by: Option<i32>,
    /// New connections per minute over a limit, on all nodes together, and the limit that is exceeded most often,
    /// like 1200/min primary newConnectionsPerSecond. Absent while no limit is exceeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limited: Option<String>,
    /// The connections that were established when the service left a tier, on all nodes together. Absent if there were
    /// none. `status.nodes` has those of each node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub established: Option<EstablishedCounts>,
    /// Number of nodes by state.
    #[serde(default)]
    pub counts: NodeCounts,
    /// The conditions Accepted, ResolvedRefs, BackupReachable, Programmed, Degraded and DatapathCompatible; and, for tools
    /// that wait, Reconciling and Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// State on each node. Of more than 32 nodes, 32 are listed, those with an error or an open breaker first; counts
    /// has all nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["node".into()]))]
    pub nodes: Vec<NodeStatus>,
}

/// The state of a breaker as a node reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReportedState {
    /// Nothing is in the kernel yet.
    #[default]
    #[serde(rename = "")]
    NotProgrammed,
    /// The request is refused, and nothing is in force. No node reports this; it is the state of the whole object.
    NotProtected,
    /// Traffic flows to the primary.
    Closed,
    /// A few connections try the primary, all others go to the backup.
    HalfOpen,
    /// Traffic flows to the backup.
    Open,
    /// A node that is silent, or a state that only another version knows.
    #[serde(other)]
    Unknown,
}

impl ReportedState {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::NotProgrammed => "",
            Self::NotProtected => "NotProtected",
            Self::Closed => "Closed",
            Self::HalfOpen => "HalfOpen",
            Self::Open => "Open",
        }
    }

    /// Rank of the state, to find the most open state of several: 0 if it is not the state of a breaker.
    #[must_use]
    pub const fn openness(self) -> u8 {
        match self {
            Self::Unknown | Self::NotProgrammed | Self::NotProtected => 0,
            Self::Closed => 1,
            Self::HalfOpen => 2,
            Self::Open => 3,
        }
    }

    /// Whether it is a state of a breaker.
    #[must_use]
    pub const fn is_known(self) -> bool {
        matches!(self, Self::Closed | Self::HalfOpen | Self::Open)
    }
}

impl From<BreakerState> for ReportedState {
    fn from(state: BreakerState) -> Self {
        match state {
            BreakerState::Closed => Self::Closed,
            BreakerState::HalfOpen => Self::HalfOpen,
            BreakerState::Open => Self::Open,
        }
    }
}

/// Number of nodes by state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeCounts {
    /// Nodes whose agent reports a state.
    pub nodes: i32,
    /// Of these, nodes where the breaker is closed.
    pub closed: i32,
    /// Of these, nodes where the breaker is half-open.
    pub half_open: i32,
    /// Of these, nodes where the breaker is open.
    pub open: i32,
    /// Of these, nodes with the current generation in force in the kernel.
    pub programmed: i32,
    /// Nodes whose last report is too old: older than 30 seconds if the Node is not Ready, 15 minutes if it is. They
    /// are in no other count.
    pub silent: i32,
}

/// State on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// Name of the node.
    pub node: String,
    /// Closed, HalfOpen or Open; Unknown if the node's last report is too old.
    #[schemars(with = "String")]
    pub state: ReportedState,
    /// When the state began.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Why the breaker is in this state.
    #[schemars(with = "String")]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "crate::text::lenient")]
    pub reason: Option<StateReason>,
    /// Details of the reason.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The primary's share of new connections, in permille.
    pub share: i32,
    /// Generation of the spec that the agent works with.
    pub desired_generation: i64,
    /// Generation of the spec that is in force in the kernel.
    pub applied_generation: i64,
    /// State of the protected ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortStatus>,
    /// Error of the last write to the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The connections that were established when the service left a tier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub established: Option<EstablishedCounts>,
}

/// State of a protected port on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PortStatus {
    /// The protected port of the Service. If there are several, one of them stands for all.
    pub port: i32,
    /// The entry is about connections from outside of the cluster only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// Closed, HalfOpen or Open.
    #[schemars(with = "String")]
    pub state: ReportedState,
    /// Number of the primary's pods that are Up, of all its pods, like 1/2.
    pub primary: String,
    /// Number of the backup's pods that are Up, of all its pods, like 1/2.
    pub backup: String,
}
