//! Limits on new connections per second and on concurrent connections.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Limits on connections to the primary and, in backup, to the backups. Each limit holds for every node separately
/// or, with scope Cluster, is divided by the number of nodes that report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.newConnectionsPerSecond) || has(self.concurrentConnections) || has(self.perClient) || has(self.backup)")
        .message("limits nothing: it needs newConnectionsPerSecond, concurrentConnections, perClient or backup"),
    validation = Rule::new("!has(self.burst) || has(self.newConnectionsPerSecond)")
        .message("burst says how many new connections may come at once: it needs newConnectionsPerSecond").field_path(".burst"),
    validation = Rule::new("!has(self.perClient) || !has(self.perClient.newConnectionsPerSecond) || !has(self.newConnectionsPerSecond) || self.perClient.newConnectionsPerSecond <= self.newConnectionsPerSecond")
        .message("a client's newConnectionsPerSecond must not be above that of all clients together").field_path(".perClient"),
    validation = Rule::new("!has(self.perClient) || !has(self.perClient.concurrentConnections) || !has(self.concurrentConnections) || self.perClient.concurrentConnections <= self.concurrentConnections")
        .message("a client's concurrentConnections must not be above those of all clients together").field_path(".perClient"),
)]
pub struct Limits {
    /// New connections per second.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<i32>,
    /// How many new connections may come at once; a tenth of newConnectionsPerSecond, but at least 5, if not given.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
    /// Concurrent connections.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_connections: Option<i32>,
    /// Limits for each client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_client: Option<ClientLimits>,
    /// What happens to a new connection over a limit. Reset: it is refused at once (TCP reset; UDP: ICMP port
    /// unreachable). Drop: its packet is dropped. Failover: it goes to the backup.
    #[serde(default)]
    pub on_limit: OnLimit,
    /// Limits on connections to all backups together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupLimits>,
    /// Number of leading bits of an IPv6 address that identify a client.
    #[schemars(range(min = 1, max = 128))]
    #[serde(default = "sixty_four", rename = "clientPrefixLengthIPv6")]
    pub client_prefix_length: i32,
    /// Seconds without a packet after which a connection is no longer counted. The time starts when
    /// concurrentConnections is nearly reached.
    #[schemars(range(min = 5, max = 86_400))]
    #[serde(default = "nine_hundred")]
    pub idle_seconds: i32,
    /// Node: each node enforces the whole limit. Cluster: each node enforces the limit divided by the number of nodes
    /// that report.
    #[serde(default)]
    pub scope: LimitScope,
}

/// Limits on connections to all backups together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.burst) || has(self.newConnectionsPerSecond)")
        .message("burst says how many new connections may come at once: it needs newConnectionsPerSecond").field_path(".burst"),
    validation = Rule::new("!has(self.perClient) || !has(self.perClient.newConnectionsPerSecond) || !has(self.newConnectionsPerSecond) || self.perClient.newConnectionsPerSecond <= self.newConnectionsPerSecond")
        .message("a client's newConnectionsPerSecond must not be above that of all clients together").field_path(".perClient"),
    validation = Rule::new("!has(self.perClient) || !has(self.perClient.concurrentConnections) || !has(self.concurrentConnections) || self.perClient.concurrentConnections <= self.concurrentConnections")
        .message("a client's concurrentConnections must not be above those of all clients together").field_path(".perClient"),
)]
pub struct BackupLimits {
    /// New connections per second.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<i32>,
    /// How many new connections may come at once; a tenth of newConnectionsPerSecond, but at least 5, if not given.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
    /// Concurrent connections.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_connections: Option<i32>,
    /// Limits for each client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_client: Option<ClientLimits>,
    /// What happens to a new connection over a limit. Reset: it is refused at once (TCP reset; UDP: ICMP port
    /// unreachable). Drop: its packet is dropped. Failover: like Reset, because there is no further tier.
    #[serde(default)]
    pub on_limit: OnLimit,
}

/// Limits for each client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.newConnectionsPerSecond) || has(self.concurrentConnections)")
        .message("perClient limits nothing: it needs newConnectionsPerSecond or concurrentConnections"),
    validation = Rule::new("!has(self.burst) || has(self.newConnectionsPerSecond)")
        .message("burst says how many new connections may come at once: it needs newConnectionsPerSecond").field_path(".burst"),
)]
pub struct ClientLimits {
    /// New connections per second.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<i32>,
    /// How many new connections may come at once; a tenth of newConnectionsPerSecond, but at least 5 and at most the
    /// burst of all clients together, if not given.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
    /// Concurrent connections.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_connections: Option<i32>,
}

words!(
    /// What happens to a new connection over a limit.
    OnLimit { #[default] Reset, Drop, Failover }
);
words!(
    /// Whether a limit holds for each node or is divided between the nodes.
    LimitScope { #[default] Node, Cluster }
);
const fn sixty_four() -> i32 {
    64
}
const fn nine_hundred() -> i32 {
    900
}
