//! Active checks, in the vocabulary of Kubernetes' probes.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Port;

/// How pods are checked: exactly one of httpGet, tcpSocket and grpc, with the field names of a container's probe. Every
/// node's agent addresses the pods directly, so neither the Service nor breaker itself is in the way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.httpGet) ? 1 : 0) + (has(self.tcpSocket) ? 1 : 0) + (has(self.grpc) ? 1 : 0) == 1")
        .message("exactly one of httpGet, tcpSocket and grpc is allowed"),
    validation = Rule::new("!has(self.periodSeconds) || !has(self.periodMillis)")
        .message("periodSeconds and periodMillis exclude each other"),
    validation = Rule::new("!has(self.timeoutSeconds) || !has(self.timeoutMillis)")
        .message("timeoutSeconds and timeoutMillis exclude each other"),
)]
pub struct Check {
    /// An HTTP GET: passes by status and, if wanted, body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGetAction>,
    /// A TCP connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocketAction>,
    /// The gRPC health checking protocol, v1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcAction>,
    /// Seconds from one probe to the next; 3 if neither this nor periodMillis is given.
    #[schemars(range(min = 1, max = 86400))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period_seconds: Option<i32>,
    /// Milliseconds from one probe to the next, for less than a second.
    #[schemars(range(min = 10, max = 86_400_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period_millis: Option<i32>,
    /// Milliseconds from one probe to the next while the health is about to change, or not known yet; the period if not
    /// given, and never longer than it.
    #[schemars(range(min = 10, max = 86_400_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fast_period_millis: Option<i32>,
    /// Seconds that a probe may take; 1 if neither this nor timeoutMillis is given.
    #[schemars(range(min = 1, max = 3600))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<i32>,
    /// Milliseconds that a probe may take.
    #[schemars(range(min = 10, max = 3_600_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_millis: Option<i32>,
    /// Failures in a row that make a pod Down.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "one")]
    pub failure_threshold: i32,
    /// Passes in a row that make a pod Up again.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "one")]
    pub success_threshold: i32,
    /// A period varies by up to this part of itself, in percent.
    #[schemars(range(min = 0, max = 50))]
    #[serde(default)]
    pub jitter_percent: i32,
}

/// An HTTP GET.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpGetAction {
    /// The path, with a leading slash.
    #[schemars(regex(pattern = r"^/"), length(max = 1024))]
    #[serde(default = "root")]
    pub path: String,
    /// Another port of the pod than the one that serves: a number, or the name of a port of the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// HTTP or HTTPS; the certificate is not verified, as kubelet does not.
    #[serde(default)]
    pub scheme: Scheme,
    /// The Host header and SNI, if not the pod's address.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// More headers.
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub http_headers: Vec<Header>,
    /// Statuses that pass: numbers and ranges, like 200-399 or 200,204.
    #[schemars(
        regex(pattern = r"^[1-5][0-9]{2}(-[1-5][0-9]{2})?(,[1-5][0-9]{2}(-[1-5][0-9]{2})?)*$"),
        length(max = 128)
    )]
    #[serde(default = "statuses")]
    pub expected_statuses: String,
    /// Text that the first 64 KiB of the body must contain.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_contains: Option<String>,
}

/// HTTP or HTTPS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "a documented variant is a schema of its own, which is not structural")]
pub enum Scheme {
    #[default]
    #[serde(rename = "HTTP")]
    Http,
    #[serde(rename = "HTTPS")]
    Https,
}

/// A header of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Header {
    /// Its name.
    #[schemars(regex(pattern = r"^[-!#$%&'*+.^_`|~0-9A-Za-z]+$"), length(max = 256))]
    pub name: String,
    /// Its value.
    #[schemars(regex(pattern = r"^[\t\x20-\x7e]*$"), length(max = 1024))]
    pub value: String,
}

/// A TCP connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TcpSocketAction {
    /// Another port of the pod than the one that serves: a number, or the name of a port of the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
}

/// The gRPC health checking protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GrpcAction {
    /// Another port of the pod than the one that serves: a number, or the name of a port of the Service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// The service that is asked about; empty = the server as a whole.
    #[schemars(length(max = 256))]
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub service: String,
}

const fn one() -> i32 {
    1
}

fn root() -> String {
    "/".into()
}

fn statuses() -> String {
    "200-399".into()
}
