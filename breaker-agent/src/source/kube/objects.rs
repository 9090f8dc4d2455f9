//! Kubernetes' own objects, cut down to the fields that matter here: what is not read is neither kept nor compiled in.
//! Names, defaults and meanings are those of core/v1 and discovery/v1.

use std::collections::BTreeMap;

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::{Resource, api::ObjectMeta};
use serde::Deserialize;

/// A Service.
#[derive(Clone, Debug, Default, Deserialize, Resource)]
#[resource(inherit = core::Service)]
pub struct Service {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// What is wanted.
    #[serde(default)]
    pub spec: ServiceSpec,
    /// What is.
    #[serde(default)]
    pub status: ServiceStatus,
}

/// What is wanted of a Service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// ClusterIP, NodePort, LoadBalancer, ExternalName.
    pub r#type: String,
    /// Its address; `None` as a word for a headless Service.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    /// Its addresses of both families.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// More addresses.
    #[serde(rename = "externalIPs")]
    pub external_ips: Vec<String>,
    /// Local: clients in the cluster are sent to pods of their own node only.
    pub internal_traffic_policy: Option<String>,
    /// Local: clients outside are sent to pods of the node that they came to only, and keep their address.
    pub external_traffic_policy: Option<String>,
    /// Who may use its load balancer; everybody if empty.
    pub load_balancer_source_ranges: Vec<String>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The labels of its pods.
    pub selector: BTreeMap<String, String>,
}

/// A Service's port.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// Its name; the only port may have none.
    pub name: Option<String>,
    /// TCP, UDP, SCTP.
    pub protocol: Option<String>,
    /// Its number.
    pub port: i32,
    /// Where nodes answer.
    pub node_port: Option<i32>,
}

impl ServicePort {
    /// TCP is what a port is if it does not say.
    #[must_use]
    pub fn protocol(&self) -> &str {
        self.protocol.as_deref().unwrap_or("TCP")
    }
}

/// What a Service is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// Its load balancer.
    pub load_balancer: LoadBalancer,
}

/// A load balancer's side of a Service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancer {
    /// Where it answers.
    pub ingress: Vec<Ingress>,
}

/// Where a load balancer answers.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ingress {
    /// Its address.
    pub ip: Option<String>,
    /// VIP: packets arrive with that destination. Proxy: with another one.
    pub ip_mode: Option<String>,
}

/// Some of a Service's endpoints.
#[derive(Clone, Debug, Default, Deserialize, Resource)]
#[resource(inherit = discovery::EndpointSlice)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// IPv4, IPv6, FQDN.
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
    /// Its addresses; the first one stands for it.
    pub addresses: Vec<String>,
    /// How it is.
    pub conditions: Conditions,
    /// Where it is.
    pub node_name: Option<String>,
    /// Where that is.
    pub zone: Option<String>,
    /// The pod that it is.
    pub target_ref: Option<TargetRef>,
}

/// What an endpoint stands for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Unique in space and time.
    pub uid: Option<String>,
}

/// How an endpoint is; absent means ready, serving as ready, not terminating.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// It may get connections.
    pub ready: Option<bool>,
    /// It could, but for its end.
    pub serving: Option<bool>,
    /// It is about to end.
    pub terminating: Option<bool>,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// The Service's name of it.
    pub name: Option<String>,
    /// TCP, UDP, SCTP.
    pub protocol: Option<String>,
    /// The pods' number.
    pub port: Option<i32>,
}

/// A Node.
#[derive(Clone, Debug, Default, Deserialize, Resource)]
#[resource(inherit = core::Node)]
pub struct Node {
    /// Its metadata.
    pub metadata: ObjectMeta,
    /// What it is.
    #[serde(default)]
    pub status: NodeStatus,
}

impl Node {
    /// Whether Kubernetes hears of it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status.conditions.iter().any(|condition| condition.r#type == "Ready" && condition.status == "True")
    }
}

/// What a Node is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses.
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<NodeAddress>,
    /// How it is.
    #[serde(deserialize_with = "or_default")]
    pub conditions: Vec<NodeCondition>,
}

/// A Node's address.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeAddress {
    /// InternalIP, ExternalIP, Hostname.
    pub r#type: String,
    /// The address.
    pub address: String,
}

/// A Node's condition, without the heartbeat that changes all the time.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeCondition {
    /// Ready, and others.
    pub r#type: String,
    /// True, False, Unknown.
    pub status: String,
}

/// Go's nil slices are `null` in JSON.
fn or_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
