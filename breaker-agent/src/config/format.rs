//! The format of the configuration file. Fields have the same names as in Kubernetes, where Kubernetes has such a
//! field. Every field that can be wrong by itself is [`Spanned`], so that the message contains its line. The defaults
//! are in the modules that convert each section: `agent`, `breaker`, `check`, `limits` and `service`.

use serde::Deserialize;
use serde_saphyr::Spanned;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct File {
    #[serde(default)]
    pub agent: Agent,
    pub services: Spanned<Vec<Service>>,
}

/// The file of an agent whose services come from another source.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct AgentFile {
    #[serde(default)]
    pub agent: Agent,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Agent {
    pub pin_path: Option<Spanned<String>>,
    pub socket: Option<Spanned<String>>,
    pub listen: Option<Spanned<String>>,
    pub metrics_listen: Option<Spanned<String>>,
    #[serde(default)]
    pub metrics: Metrics,
    pub veths: Option<bool>,
    pub uplinks: Option<bool>,
    pub node_sockets: Option<bool>,
    #[serde(default)]
    pub interfaces: Vec<Spanned<String>>,
    pub attach: Option<Spanned<String>>,
    pub attach_order: Option<Spanned<String>>,
    pub xdp: Option<Spanned<String>>,
    pub connections: Option<Spanned<String>>,
    pub lease_seconds: Option<Spanned<u64>>,
    pub max_services: Option<Spanned<u64>>,
    pub max_flows: Option<Spanned<u64>>,
    pub masquerade_mark: Option<Spanned<u64>>,
    pub masquerade_rule: Option<bool>,
    #[serde(default)]
    pub node_port_addresses: Vec<Spanned<String>>,
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Metrics {
    pub level: Option<Spanned<String>>,
    pub per_backend: Option<bool>,
    pub max_backends: Option<Spanned<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Service {
    pub name: Spanned<String>,
    pub frontends: Spanned<Vec<Frontend>>,
    pub primary: Primary,
    pub backups: Spanned<Vec<Backup>>,
    #[serde(default)]
    pub breaker: Breaker,
    pub mode: Option<Spanned<String>>,
    #[serde(rename = "override")]
    pub override_: Option<Spanned<String>>,
    pub on_open: Option<Spanned<String>>,
    pub drain_seconds: Option<Spanned<u64>>,
    pub resets_per_second: Option<Spanned<u64>>,
    pub on_close: Option<Spanned<String>>,
    pub on_backup_down: Option<Spanned<String>>,
    pub when_all_unhealthy: Option<Spanned<String>>,
    pub on_agent_loss: Option<Spanned<String>>,
    pub fast_path: Option<Spanned<String>>,
    pub limits: Option<Spanned<Limits>>,
}

/// The primary's limits, and settings for both tiers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Limits {
    pub new_connections_per_second: Option<Spanned<f64>>,
    pub burst: Option<Spanned<f64>>,
    pub concurrent_connections: Option<Spanned<f64>>,
    pub per_client: Option<ClientLimits>,
    pub on_limit: Option<Spanned<String>>,
    pub backup: Option<TierLimits>,
    #[serde(rename = "clientPrefixLengthIPv6")]
    pub client_prefix_length: Option<Spanned<u64>>,
    pub idle_seconds: Option<Spanned<u64>>,
    pub scope: Option<Spanned<String>>,
}

/// The backup's limits.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct TierLimits {
    pub new_connections_per_second: Option<Spanned<f64>>,
    pub burst: Option<Spanned<f64>>,
    pub concurrent_connections: Option<Spanned<f64>>,
    pub per_client: Option<ClientLimits>,
    pub on_limit: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct ClientLimits {
    pub new_connections_per_second: Option<Spanned<f64>>,
    pub burst: Option<Spanned<f64>>,
    pub concurrent_connections: Option<Spanned<f64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Frontend {
    pub address: Spanned<String>,
    pub port: Spanned<u64>,
    pub protocol: Option<Spanned<String>>,
    pub external_traffic_policy: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Primary {
    pub name: Option<String>,
    #[serde(default)]
    pub backends: Vec<Backend>,
    pub check: Option<Check>,
    pub min_healthy: Option<Spanned<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Backup {
    pub name: Option<String>,
    pub backends: Spanned<Vec<Backend>>,
    pub check: Option<Check>,
    pub min_healthy: Option<Spanned<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Backend {
    pub address: Spanned<String>,
    pub port: Spanned<u64>,
    pub weight: Option<Spanned<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Check {
    pub http_get: Option<Spanned<HttpGet>>,
    pub tcp_socket: Option<Spanned<TcpSocket>>,
    pub grpc: Option<Spanned<Grpc>>,
    pub dns: Option<Spanned<Dns>>,
    pub udp: Option<Spanned<Udp>>,
    pub period_seconds: Option<Spanned<u64>>,
    pub period_millis: Option<Spanned<u64>>,
    pub fast_period_millis: Option<Spanned<u64>>,
    pub timeout_seconds: Option<Spanned<u64>>,
    pub timeout_millis: Option<Spanned<u64>>,
    pub failure_threshold: Option<Spanned<u64>>,
    pub success_threshold: Option<Spanned<u64>>,
    pub jitter_percent: Option<Spanned<u64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct HttpGet {
    pub path: Option<Spanned<String>>,
    pub port: Option<Spanned<u64>>,
    pub scheme: Option<Spanned<String>>,
    pub host: Option<Spanned<String>>,
    #[serde(default)]
    pub http_headers: Vec<Header>,
    pub expected_statuses: Option<Spanned<String>>,
    pub body_contains: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Header {
    pub name: Spanned<String>,
    pub value: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct TcpSocket {
    pub port: Option<Spanned<u64>>,
    pub accept: Option<Spanned<bool>>,
    pub send: Option<Spanned<String>>,
    pub send_hex: Option<Spanned<String>>,
    pub expect: Option<Spanned<String>>,
    pub expect_hex: Option<Spanned<String>>,
    pub quit: Option<Spanned<String>>,
    pub tls: Option<Spanned<bool>>,
    pub host: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Udp {
    pub port: Option<Spanned<u64>>,
    pub send: Option<Spanned<String>>,
    pub send_hex: Option<Spanned<String>>,
    pub expect: Option<Spanned<String>>,
    pub expect_hex: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Dns {
    pub port: Option<Spanned<u64>>,
    pub name: Spanned<String>,
    #[serde(rename = "type")]
    pub record: Option<Spanned<String>>,
    pub rcode: Option<Spanned<String>>,
    #[serde(default)]
    pub expected_addresses: Vec<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Grpc {
    pub port: Option<Spanned<u64>>,
    pub service: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Breaker {
    pub open_millis: Option<Spanned<u64>>,
    pub max_open_millis: Option<Spanned<u64>>,
    pub jitter_percent: Option<Spanned<u64>>,
    pub decay_millis: Option<Spanned<u64>>,
    pub half_open_connections: Option<Spanned<u64>>,
    pub half_open_timeout_millis: Option<Spanned<u64>>,
    pub half_open_passes: Option<Spanned<u64>>,
    pub ramp_millis: Option<Spanned<u64>>,
    pub ramp_start_permille: Option<Spanned<u64>>,
    pub window: Option<Window>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Window {
    pub length_millis: Option<Spanned<u64>>,
    pub minimum_volume: Option<Spanned<u64>>,
    pub failure_rate_percent: Option<Spanned<u64>>,
}
