//! What a user asks for: `CircuitBreaker`.

use jiff::Timestamp;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Check, CircuitBreakerStatus, Port};

/// Which Service is protected, what takes over, and how that is decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "breaker.dev",
    version = "v1alpha1",
    kind = "CircuitBreaker",
    namespaced,
    shortname = "cb",
    category = "breaker",
    status = "CircuitBreakerStatus",
    derive = "PartialEq",
    doc = "Keeps a Service answering when its pods fail: on every node an agent checks the pods, and while they fail, new connections for the Service go to a backup, in the kernel, with no proxy in the path.",
    printcolumn = r#"{"name":"Service","type":"string","jsonPath":".spec.service.name","description":"The Service that is protected."}"#,
    printcolumn = r#"{"name":"State","type":"string","jsonPath":".status.state","description":"Closed: traffic flows to the primary. Open: to the backup. HalfOpen: a few connections try the primary. The most open state of all nodes."}"#,
    printcolumn = r#"{"name":"Since","type":"date","jsonPath":".status.since","description":"How long it has been in this state."}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.reason","description":"Why it is in this state."}"#,
    printcolumn = r#"{"name":"Backup","type":"string","jsonPath":".status.backup","description":"What takes over, and how many of its pods are Up."}"#,
    printcolumn = r#"{"name":"Share","type":"string","jsonPath":".status.share","description":"The primary's share of new connections, over all nodes."}"#,
    printcolumn = r#"{"name":"Limited","type":"string","jsonPath":".status.limited","description":"New connections over a limit in a minute, and the limit that is reached most."}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Open","type":"string","jsonPath":".status.open","description":"Nodes where it is open, of those that report.","priority":1}"#,
    printcolumn = r#"{"name":"Override","type":"string","jsonPath":".spec.override","description":"What the operator wants.","priority":1}"#,
    printcolumn = r#"{"name":"Mode","type":"string","jsonPath":".spec.mode","description":"Whether decisions are carried out.","priority":1}"#,
    printcolumn = r#"{"name":"Message","type":"string","jsonPath":".status.message","description":"More about why.","priority":1}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.backups.all(b, has(b.__namespace__) || b.name != self.service.name)")
        .message("a Service cannot be its own backup").field_path(".backups"),
    validation = Rule::new("self.backups.all(b, self.backups.exists_one(o, o.name == b.name && (has(o.__namespace__) ? o.__namespace__ : '') == (has(b.__namespace__) ? b.__namespace__ : '')))")
        .message("a Service can be a backup once").field_path(".backups"),
    validation = Rule::new("!has(self.until) || self.override != 'Auto'")
        .message("until says when an override ends: it needs override ForceOpen or ForceClosed").field_path(".until"),
    validation = Rule::new("self.probeFrom == 'EveryNode'")
        .message("Elected is not built yet; allowed: EveryNode").field_path(".probeFrom"),
    validation = Rule::new("!has(self.minHealthy) || has(self.check)")
        .message("minHealthy counts pods that pass a check: it needs check").field_path(".minHealthy"),
)]
pub struct CircuitBreakerSpec {
    /// The Service that is protected, of the same namespace.
    pub service: ServiceRef,
    /// The Services that take over, in order of preference.
    #[schemars(length(min = 1, max = 8))]
    pub backups: Vec<Backup>,
    /// How pods are checked, the backups' too: exactly one of httpGet, tcpSocket and grpc, with the fields of a container's
    /// probe. Without it, the breaker opens only when no endpoint of the primary is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
    /// How many pods of the primary must be Up for it to be Up; 1 if not given.
    #[schemars(range(min = 1, max = 10_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_healthy: Option<i32>,
    /// How the state changes. The defaults are those of an NGINX Plus ambassador: open at the first failure, closed at
    /// the first pass.
    #[serde(default)]
    pub breaker: Breaker,
    /// Which of the backup's pods are preferred: any, those of the client's node (then its zone), or those of its zone.
    #[serde(default)]
    pub topology: Topology,
    /// Established connections to the primary when the breaker opens: reset at both ends, or kept.
    #[serde(default = "reset")]
    pub on_open: Established,
    /// Established connections to the backup when the breaker closes: kept until they end, or reset.
    #[serde(default = "keep")]
    pub on_close: Established,
    /// What new connections get when no backup is usable either: the primary such as it is, or a reset at once.
    #[serde(default)]
    pub when_all_unhealthy: Unhealthy,
    /// What the programs do on a node whose agent gives no sign of life for longer than its lease: new connections go to
    /// the primary, or the last decision holds.
    #[serde(default)]
    pub on_agent_loss: Loss,
    /// How new connections to a backup pod of the client's own node, or of the node that a client outside comes in by, go: as
    /// all others, or past the stack, which is faster and leaves netfilter out, and with it the NetworkPolicies that netfilter
    /// enforces.
    #[serde(default)]
    pub fast_path: FastPath,
    /// How many new connections a second, and how many at the same time, go to the primary and to the backup, of all clients
    /// and of each; no limit if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// What the operator wants, apart from what is measured: nothing, the backup, or the primary.
    #[serde(default)]
    pub r#override: Override,
    /// When the override ends; without it, it holds until it is changed.
    #[schemars(schema_with = "date_time")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Whether decisions are carried out, or only counted and shown.
    #[serde(default)]
    pub mode: Mode,
    /// Which nodes check: every node for itself. Elected (a few nodes check for all) is not built yet.
    #[serde(default)]
    pub probe_from: ProbeFrom,
}

/// A Service of the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRef {
    /// Its name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Ports of it, by name or number; all of its TCP ports if not given. Each is a breaker of its own, shown as one.
    #[schemars(length(min = 1, max = 16))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<Port>>,
}

/// A Service that takes over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backup {
    /// Its name.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Its namespace, if another one: a ReferenceGrant there must allow it.
    #[schemars(length(min = 1, max = 63))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its port, by name or number; the one of the same name or number as the protected port, or its only one, if not
    /// given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// Lower is preferred; its place in the list if not given. Backups of one priority share the connections by weight.
    #[schemars(range(min = 0, max = 127))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// Its part of the new connections among backups of the same priority.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default = "one")]
    pub weight: i32,
    /// How its pods are checked, if not as the primary's. Backups of one priority share one check.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<Check>,
}

/// How the state changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.openMillis) || self.maxOpenMillis >= self.openMillis")
        .message("maxOpenMillis must be at least openMillis").field_path(".maxOpenMillis"),
    validation = Rule::new("!has(self.window) || !has(self.openMillis) || self.openMillis >= 1")
        .message("with a window, openMillis must be at least 1: a rate that tripped says nothing of the next moment")
        .field_path(".openMillis"),
)]
pub struct Breaker {
    /// Milliseconds that it stays open at least, after the first trip in a row; 0 (the length of the window, where there
    /// is one) if not given.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_millis: Option<i32>,
    /// The longest that it grows to with more trips in a row, milliseconds.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(default = "five_minutes")]
    pub max_open_millis: i32,
    /// An open time varies by up to this part of itself, in percent.
    #[schemars(range(min = 0, max = 50))]
    #[serde(default)]
    pub jitter_percent: i32,
    /// Trips in a row are forgotten one by one, each after this long without a new one, milliseconds.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(default = "minute")]
    pub decay_millis: i32,
    /// Real connections that try the primary while half-open; 0 = from open straight to closed.
    #[schemars(range(min = 0, max = 1_000_000))]
    #[serde(default)]
    pub half_open_connections: i32,
    /// How long half-open lasts at the most, milliseconds.
    #[schemars(range(min = 10, max = 86_400_000))]
    #[serde(default = "half_minute")]
    pub half_open_timeout_millis: i32,
    /// Passes of the primary's check that close a half-open breaker.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "three")]
    pub half_open_passes: i32,
    /// How long the primary's share grows after closing, milliseconds; 0 = all at once.
    #[schemars(range(min = 0, max = 86_400_000))]
    #[serde(default)]
    pub ramp_millis: i32,
    /// Where the ramp starts, permille.
    #[schemars(range(min = 0, max = 1000))]
    #[serde(default = "hundred")]
    pub ramp_start_permille: i32,
    /// Trips on the rate of failed probes, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            open_millis: None,
            max_open_millis: five_minutes(),
            jitter_percent: 0,
            decay_millis: minute(),
            half_open_connections: 0,
            half_open_timeout_millis: half_minute(),
            half_open_passes: three(),
            ramp_millis: 0,
            ramp_start_permille: hundred(),
            window: None,
        }
    }
}

/// The primary's limits, and what holds for the backup's, too. Each holds for every node, or, with scope Cluster, is divided
/// by the number of nodes that report.
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
    /// New connections a second.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<i32>,
    /// How many of them may come at once; a tenth of newConnectionsPerSecond and at least 5 if not given.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
    /// Connections at the same time.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_connections: Option<i32>,
    /// The same for each client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_client: Option<ClientLimits>,
    /// What a new connection over a limit gets: a reset at once (UDP: ICMP port unreachable), nothing, or the backup.
    #[serde(default)]
    pub on_limit: OnLimit,
    /// The backup's limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupLimits>,
    /// How many leading bits of an IPv6 client's address tell clients apart.
    #[schemars(range(min = 1, max = 128))]
    #[serde(default = "sixty_four", rename = "clientPrefixLengthIPv6")]
    pub client_prefix_length: i32,
    /// How long a connection without packets counts while concurrentConnections is nearly reached, seconds.
    #[schemars(range(min = 5, max = 86_400))]
    #[serde(default = "nine_hundred")]
    pub idle_seconds: i32,
    /// Whether a limit holds for each node, or is divided by the number of nodes that report.
    #[serde(default)]
    pub scope: LimitScope,
}

/// The backup's limits.
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
    /// New connections a second.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<i32>,
    /// How many of them may come at once; a tenth of newConnectionsPerSecond and at least 5 if not given.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
    /// Connections at the same time.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_connections: Option<i32>,
    /// The same for each client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_client: Option<ClientLimits>,
    /// What a new connection over a limit gets: a reset at once, or nothing. Failover is as Reset: there is no other tier.
    #[serde(default)]
    pub on_limit: OnLimit,
}

/// The limits of each client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.newConnectionsPerSecond) || has(self.concurrentConnections)")
        .message("perClient limits nothing: it needs newConnectionsPerSecond or concurrentConnections"),
    validation = Rule::new("!has(self.burst) || has(self.newConnectionsPerSecond)")
        .message("burst says how many new connections may come at once: it needs newConnectionsPerSecond").field_path(".burst"),
)]
pub struct ClientLimits {
    /// New connections a second.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<i32>,
    /// How many of them may come at once; a tenth of newConnectionsPerSecond and at least 5 if not given.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<i32>,
    /// Connections at the same time.
    #[schemars(range(min = 1, max = 1_000_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent_connections: Option<i32>,
}

/// A sliding window over the primary's probes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// How far it looks back, milliseconds.
    #[schemars(range(min = 100, max = 86_400_000))]
    #[serde(default = "ten_seconds")]
    pub length_millis: i32,
    /// Probes that it must hold before it decides anything.
    #[schemars(range(min = 1, max = 10_000))]
    #[serde(default = "twenty")]
    pub minimum_volume: i32,
    /// Failures, in percent of the probes, that trip.
    #[schemars(range(min = 1, max = 100))]
    #[serde(default = "fifty")]
    pub failure_rate_percent: i32,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$attr:meta])* $word:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[allow(missing_docs, reason = "a documented variant is a schema of its own, which is not structural")]
        pub enum $name { $($(#[$attr])* $word),+ }
    };
}

words!(
    /// Which pods of the backup are preferred.
    Topology { #[default] Any, PreferSameNode, PreferSameZone }
);
words!(
    /// What happens to established connections.
    Established { #[default] Keep, Reset }
);
words!(
    /// What new connections get when no backup is usable.
    Unhealthy { #[default] PassThrough, Reject }
);
words!(
    /// What the programs do when the agent is gone.
    Loss { #[default] PassThrough, Hold }
);
words!(
    /// How connections between pods of one node go.
    FastPath { #[default] Off, PeerRedirect }
);
words!(
    /// What the operator wants.
    Override { #[default] Auto, ForceOpen, ForceClosed }
);
words!(
    /// What a new connection over a limit gets.
    OnLimit { #[default] Reset, Drop, Failover }
);
words!(
    /// For how much of the cluster a limit holds.
    LimitScope { #[default] Node, Cluster }
);
words!(
    /// Whether decisions are carried out.
    Mode { #[default] Enforce, DryRun }
);
words!(
    /// Which nodes check.
    ProbeFrom { #[default] EveryNode, Elected }
);

fn date_time(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "string", "format": "date-time" })
}

const fn reset() -> Established {
    Established::Reset
}
const fn keep() -> Established {
    Established::Keep
}
const fn one() -> i32 {
    1
}
const fn three() -> i32 {
    3
}
const fn twenty() -> i32 {
    20
}
const fn fifty() -> i32 {
    50
}
const fn sixty_four() -> i32 {
    64
}
const fn nine_hundred() -> i32 {
    900
}
const fn hundred() -> i32 {
    100
}
const fn ten_seconds() -> i32 {
    10_000
}
const fn half_minute() -> i32 {
    30_000
}
const fn minute() -> i32 {
    60_000
}
const fn five_minutes() -> i32 {
    300_000
}
