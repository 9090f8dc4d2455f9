//! The Kubernetes objects that the agent reads, reduced to the fields that it uses: other fields are neither parsed
//! nor stored. Names, defaults and meanings are those of core/v1 and discovery/v1.

use std::{collections::BTreeMap, net::IpAddr};

use breaker_api::crd::CircuitBreaker;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::{Resource, api::ObjectMeta, core::DeserializeGuard};
use serde::Deserialize;

/// A CircuitBreaker, or the error with which it could not be parsed (for example, because it is of a later version).
/// One such object must not hide the others.
pub type Guarded = DeserializeGuard<CircuitBreaker>;

/// A Service.
#[derive(Clone, Debug, Default, Deserialize, Resource)]
#[resource(inherit = core::Service)]
pub struct Service {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// Desired state.
    #[serde(default)]
    pub spec: ServiceSpec,
    /// Observed state.
    #[serde(default)]
    pub status: ServiceStatus,
}

/// Desired state of a Service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// ClusterIP, NodePort, LoadBalancer, ExternalName.
    pub r#type: String,
    /// Cluster IP; the text `None` for a headless Service, empty for an ExternalName.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// Cluster IPs of both IP families.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// Endpoints count as ready even if their pods are not.
    pub publish_not_ready_addresses: bool,
    /// Port at which kube-proxy tells load balancers whether a node has ready pods.
    pub health_check_node_port: Option<i32>,
    /// Additional addresses at which nodes accept traffic for the Service.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<String>,
    /// `Local`: clients in the cluster reach only pods of their own node.
    pub internal_traffic_policy: Option<String>,
    /// `Local`: external clients reach only pods of the node where they enter the cluster, and keep their address.
    pub external_traffic_policy: Option<String>,
    /// Networks whose clients may use the load balancer; empty: all.
    pub load_balancer_source_ranges: Vec<String>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Labels that select its pods.
    pub selector: BTreeMap<String, String>,
}

impl ServiceSpec {
    /// The cluster IPs of both IP families.
    pub fn all_cluster_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster_ips.iter().chain([&self.cluster_ip]).filter_map(|ip| ip.parse().ok())
    }
}

/// A Service's port.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Name of the port; may be absent if the Service has only one port.
    pub name: Option<String>,
    /// TCP, UDP or SCTP; absent: TCP.
    pub protocol: Option<String>,
    /// Port number at the Service's addresses.
    pub port: i32,
    /// Port number at the nodes' addresses (NodePort).
    pub node_port: Option<i32>,
}

impl ServicePort {
    /// The protocol; TCP if the field is absent.
    #[must_use]
    pub fn protocol(&self) -> &str {
        self.protocol.as_deref().unwrap_or("TCP")
    }
}

/// Observed state of a Service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// Its load balancer.
    pub load_balancer: LoadBalancer,
}

/// Observed state of a Service's load balancer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancer {
    /// Its addresses.
    pub ingress: Vec<Ingress>,
}

/// One address of a load balancer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ingress {
    /// The IP address; absent if the load balancer has only a host name.
    pub ip: Option<String>,
    /// `VIP`: packets arrive with the address as destination. `Proxy`: packets arrive with another destination.
    pub ip_mode: Option<String>,
}

/// A part of a Service's endpoints.
#[derive(Clone, Debug, Default, Deserialize, Resource)]
#[resource(inherit = discovery::EndpointSlice)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// IPv4, IPv6 or FQDN.
    #[serde(default)]
    pub address_type: String,
    /// Its endpoints.
    #[serde(default, deserialize_with = "or_default")]
    pub endpoints: Vec<SliceEndpoint>,
    /// Its ports.
    #[serde(default, deserialize_with = "or_default")]
    pub ports: Vec<SlicePort>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Its addresses; the first one stands for the endpoint.
    pub addresses: Vec<String>,
    /// Whether it is ready, serving or terminating.
    pub conditions: Conditions,
    /// Name of the Node that it is on.
    pub node_name: Option<String>,
    /// Zone of that Node.
    pub zone: Option<String>,
    /// The object that it stands for, usually a pod.
    pub target_ref: Option<TargetRef>,
    /// Who should use it.
    #[serde(deserialize_with = "or_default")]
    pub hints: Hints,
}

/// For whom an endpoint is meant. kube-proxy obeys, if every ready endpoint of a port has a hint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hints {
    /// For clients in these zones.
    #[serde(deserialize_with = "or_default")]
    pub for_zones: Vec<Hint>,
    /// For clients on these nodes.
    #[serde(deserialize_with = "or_default")]
    pub for_nodes: Vec<Hint>,
}

/// A zone or a node in a hint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Hint {
    /// Its name.
    pub name: String,
}

/// Reference to the object that an endpoint stands for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Uid of the object.
    pub uid: Option<String>,
}

/// Conditions of an endpoint. Absent conditions mean: ready, serving, not terminating.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// It may get new connections.
    pub ready: Option<bool>,
    /// It accepts connections, also while it is terminating.
    pub serving: Option<bool>,
    /// It is terminating.
    pub terminating: Option<bool>,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// Name of the port in the Service.
    pub name: Option<String>,
    /// TCP, UDP, SCTP.
    pub protocol: Option<String>,
    /// Port number at the pods.
    pub port: Option<i32>,
}

/// A Node.
#[derive(Clone, Debug, Default, Deserialize, Resource)]
#[resource(inherit = core::Node)]
pub struct Node {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// Observed state.
    #[serde(default)]
    pub status: NodeStatus,
}

impl Node {
    /// Whether the condition Ready is True.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|condition| condition.r#type == "Ready" && condition.status == "True")
    }
}

/// Observed state of a Node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses.
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<NodeAddress>,
    /// Its conditions.
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<NodeCondition>,
    /// Versions of its software.
    #[serde(rename = "nodeInfo")]
    pub node_info: NodeInfo,
}

/// Versions of a Node's software.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeInfo {
    /// The kubelet's version, like `v1.34.1+k3s1`. kube-proxy usually has the same.
    pub kubelet_version: String,
}

/// A Node's address.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeAddress {
    /// InternalIP, ExternalIP, Hostname.
    pub r#type: String,
    /// The address.
    pub address: String,
}

/// A condition of a Node, without the heartbeat time, which changes all the time.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeCondition {
    /// Ready, or another condition.
    pub r#type: String,
    /// True, False, Unknown.
    pub status: String,
}

/// Deserializes `null` as the default: Go writes a nil slice as `null`.
fn or_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
