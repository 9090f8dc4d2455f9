//! Active checks of pods, with the field names of Kubernetes' probes.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Port;

/// How pods are checked: exactly one of httpGet, tcpSocket, grpc, dns and udp. The fields of the first three have the
/// names of a container's probe. The agent of every node connects to the pods directly, not through the Service, and
/// breaker does not redirect its connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("[has(self.httpGet), has(self.tcpSocket), has(self.grpc), has(self.dns), has(self.udp)].filter(x, x).size() == 1")
        .message("exactly one of httpGet, tcpSocket, grpc, dns and udp is allowed"),
    validation = Rule::new("!has(self.periodSeconds) || !has(self.periodMillis)")
        .message("periodSeconds and periodMillis exclude each other"),
    validation = Rule::new("!has(self.timeoutSeconds) || !has(self.timeoutMillis)")
        .message("timeoutSeconds and timeoutMillis exclude each other"),
)]
pub struct Check {
    /// An HTTP GET request. It passes if the status and, if bodyContains is given, the body match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGetAction>,
    /// A TCP connection. It passes if the connection is established or, with send or expect, if the answer matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocketAction>,
    /// A request of the gRPC health checking protocol (grpc.health.v1).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcAction>,
    /// A DNS question over UDP. It passes if the response code and the addresses match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<DnsAction>,
    /// A datagram. It passes if an answer comes and matches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<UdpAction>,
    /// Seconds from the start of one probe to the start of the next; 3 if neither this nor periodMillis is given.
    #[schemars(range(min = 1, max = 86400))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period_seconds: Option<i32>,
    /// Milliseconds from the start of one probe to the start of the next, instead of periodSeconds.
    #[schemars(range(min = 10, max = 86_400_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub period_millis: Option<i32>,
    /// Milliseconds from the start of one probe to the start of the next while the health of the pod is unknown or
    /// about to change. The default is the period, which is also the longest possible value.
    #[schemars(range(min = 10, max = 86_400_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fast_period_millis: Option<i32>,
    /// Seconds after which a probe without an answer fails; 1 if neither this nor timeoutMillis is given.
    #[schemars(range(min = 1, max = 3600))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<i32>,
    /// Milliseconds after which a probe without an answer fails, instead of timeoutSeconds.
    #[schemars(range(min = 10, max = 3_600_000))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_millis: Option<i32>,
    /// Number of consecutive failures after which a pod is Down.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "one")]
    pub failure_threshold: i32,
    /// Number of consecutive passes after which a pod that was Down is Up. A new pod is Up after its first pass.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default = "one")]
    pub success_threshold: i32,
    /// Random variation of the period, in percent: each period is up to this much shorter or longer.
    #[schemars(range(min = 0, max = 50))]
    #[serde(default)]
    pub jitter_percent: i32,
}

/// An HTTP GET request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpGetAction {
    /// The path, with a leading slash.
    #[schemars(regex(pattern = r"^/([-._~!$&'()*+,;=:@/?\[\]0-9A-Za-z]|%[0-9A-Fa-f]{2})*$"), length(max = 1024))]
    #[serde(default = "root")]
    pub path: String,
    /// The port of the pod to connect to: a number, or the name of a port of the Service. The default is the pods'
    /// port for the first protected TCP port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// HTTP or HTTPS. The certificate is not verified, as in kubelet's probes.
    #[serde(default)]
    pub scheme: Scheme,
    /// Value of the Host header and of SNI. The default is the pod's address.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Additional headers of the request.
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub http_headers: Vec<Header>,
    /// HTTP statuses that pass: numbers and ranges, like 200-399 or 200,204.
    #[schemars(
        regex(pattern = r"^[1-5][0-9]{2}(-[1-5][0-9]{2})?(,[1-5][0-9]{2}(-[1-5][0-9]{2})?)*$"),
        length(max = 128)
    )]
    #[serde(default = "statuses")]
    pub expected_statuses: String,
    /// Text that must occur in the first 64 KiB of the body.
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

/// A header of the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Header {
    /// Name of the header.
    #[schemars(regex(pattern = r"^[-!#$%&'*+.^_`|~0-9A-Za-z]+$"), length(max = 256))]
    pub name: String,
    /// Value of the header.
    #[schemars(regex(pattern = r"^[\t\x20-\x7e]*$"), length(max = 1024))]
    pub value: String,
}

/// A TCP connection. Without further fields, the agent resets it before it is complete, so that the server's process
/// never sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.send) || !has(self.sendHex)").message("send and sendHex exclude each other"),
    validation = Rule::new("!has(self.expect) || !has(self.expectHex)")
        .message("expect and expectHex exclude each other"),
    validation = Rule::new("has(self.send) || has(self.sendHex) || has(self.expect) || has(self.expectHex) || !(has(self.quit) || has(self.tls) || has(self.host))")
        .message("quit, tls and host need send or expect"),
)]
pub struct TcpSocketAction {
    /// The port of the pod to connect to: a number, or the name of a port of the Service. The default is the pods'
    /// port for the first protected TCP port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// Whether the connection is completed and closed, so that the server's process accepts it. The probe then also
    /// sees a full accept queue, and many servers log it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept: Option<bool>,
    /// Text to send. Without it, the server speaks first.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send: Option<String>,
    /// Bytes to send, as hexadecimal digits, instead of send.
    #[schemars(regex(pattern = r"^\s*([0-9A-Fa-f]{2}\s*)+$"), length(max = 4096))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_hex: Option<String>,
    /// Text that must occur in the first 64 KiB of the answer. Without it, any answer passes.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
    /// Bytes that must occur in the first 64 KiB of the answer, as hexadecimal digits, instead of expect.
    #[schemars(regex(pattern = r"^\s*([0-9A-Fa-f]{2}\s*)+$"), length(max = 4096))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect_hex: Option<String>,
    /// Text to send after the answer, before the connection is closed.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quit: Option<String>,
    /// Whether to use TLS. The certificate is not verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<bool>,
    /// Value of SNI.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// A datagram and its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.send) != has(self.sendHex)").message("exactly one of send and sendHex is needed"),
    validation = Rule::new("!has(self.expect) || !has(self.expectHex)")
        .message("expect and expectHex exclude each other"),
)]
pub struct UdpAction {
    /// The port of the pod to send to: a number, or the name of a port of the Service. The default is the pods' port
    /// for the first protected port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// Text to send.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send: Option<String>,
    /// Bytes to send, as hexadecimal digits, instead of send.
    #[schemars(regex(pattern = r"^\s*([0-9A-Fa-f]{2}\s*)+$"), length(max = 4096))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_hex: Option<String>,
    /// Text that must occur in the answer. Without it, any answer passes.
    #[schemars(length(min = 1, max = 1024))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
    /// Bytes that must occur in the answer, as hexadecimal digits, instead of expect.
    #[schemars(regex(pattern = r"^\s*([0-9A-Fa-f]{2}\s*)+$"), length(max = 4096))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expect_hex: Option<String>,
}

/// A DNS question. The probe asks for no recursion: it is about this server only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DnsAction {
    /// The port of the pod to send to: a number, or the name of a port of the Service. The default is the pods' port
    /// for the first protected port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// The name to ask for. It should be one that the server itself holds.
    #[schemars(regex(pattern = r"^([-_0-9A-Za-z]{1,63}\.?)+$|^\.$"), length(min = 1, max = 254))]
    pub name: String,
    /// The type of record to ask for.
    #[serde(rename = "type", default)]
    pub record: DnsRecordType,
    /// The response code that passes; ANY: every answer passes.
    #[serde(default)]
    pub rcode: DnsResponseCode,
    /// Addresses that must all be in the answer.
    #[schemars(length(max = 16))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expected_addresses: Vec<String>,
}

/// A type of DNS record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "a documented variant is a schema of its own, which is not structural")]
pub enum DnsRecordType {
    #[default]
    A,
    Aaaa,
    Cname,
    Mx,
    Ns,
    Ptr,
    Soa,
    Srv,
    Txt,
}

/// A response code of DNS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "a documented variant is a schema of its own, which is not structural")]
pub enum DnsResponseCode {
    #[default]
    NoError,
    ServFail,
    NxDomain,
    Refused,
    Any,
}

/// A request of the gRPC health checking protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GrpcAction {
    /// The port of the pod to connect to: a number, or the name of a port of the Service. The default is the pods'
    /// port for the first protected TCP port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
    /// The gRPC service to ask about. Empty: the server as a whole.
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
