//! Which endpoints of a Service kube-proxy uses on a node, as a pure function: health is judged where clients go.
//!
//! The rules are those of kube-proxy 1.34 to 1.37 (k8s.io/kubernetes/pkg/proxy: `topology.go`, `endpointslicecache.go`).
//! Hints of the slices count, and not the Service's `trafficDistribution`, from which they were made. What differs
//! between versions and modes is in [`KubeProxy`].

use super::endpoints::{Endpoint, Endpoints, Twice};

/// The differences between kube-proxies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KubeProxy {
    /// Minor version of Kubernetes 1, as in 34 for 1.34; 0 = unknown, which is treated as the newest known one.
    pub minor: u32,
    /// Mode `ipvs`; otherwise `iptables` or `nftables`.
    pub ipvs: bool,
}

impl KubeProxy {
    /// The kube-proxy of a version like `v1.34.1+k3s1`.
    #[must_use]
    pub fn of_version(version: &str, ipvs: bool) -> Self {
        let minor = version.strip_prefix("v1.").and_then(|rest| rest.split('.').next());
        Self { minor: minor.and_then(|minor| minor.parse().ok()).unwrap_or(0), ipvs }
    }

    /// Which of two entries with the same address this kube-proxy uses on a node. The rule changed with 1.36.
    #[must_use]
    pub const fn twice(self, node: &str) -> Twice<'_> {
        match self.minor {
            1..=35 => Twice::FirstUnlessLocal(node),
            _ => Twice::LaterUnlessTerminating,
        }
    }
}

/// The node on which kube-proxy runs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Name of the Node.
    pub node: &'a str,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<&'a str>,
}

/// The fields of a Service that decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policies {
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// The Service has a node port, a load balancer address or an external IP.
    pub external: bool,
}

/// How a connection comes to a Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the cluster IP.
    ClusterIp,
    /// By a node port, a load balancer address or an external IP, from outside of the cluster.
    FromOutside,
    /// By one of these, from the node itself or from a pod on it.
    FromThisNode,
}

/// The place to which kube-proxy sends a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// It goes to one of these.
    Endpoints(Vec<&'a Endpoint>),
    /// It is dropped: other nodes have endpoints.
    Drop,
    /// It is rejected: nobody has endpoints.
    Reject,
}

/// The choices of a kube-proxy for one port of a Service in one IP family.
#[derive(Clone, Debug)]
pub struct Choice<'a> {
    cluster: Vec<&'a Endpoint>,
    local: Vec<&'a Endpoint>,
    any: bool,
    policies: Policies,
    ipvs: bool,
}

impl<'a> Choice<'a> {
    /// Makes the lists. Each address must be in `endpoints` once.
    #[must_use]
    pub fn of(endpoints: &'a Endpoints, place: Place<'_>, policies: Policies, proxy: KubeProxy) -> Self {
        let some = |wanted: fn(&Endpoint) -> bool| -> Vec<&'a Endpoint> {
            endpoints.all().filter(|endpoint| wanted(endpoint)).collect()
        };
        let ready = some(Endpoint::is_ready);
        let ending = || some(Endpoint::ends_and_serves);
        let mut local = Vec::new();
        let has_local_list = policies.internal_local || (policies.external_local && policies.external);
        if has_local_list {
            let here = |e: &&Endpoint| e.node.as_deref() == Some(place.node);
            local = ready.iter().copied().filter(here).collect();
            if local.is_empty() {
                local = ending().into_iter().filter(here).collect();
            }
        }
        let cluster = match !policies.internal_local || policies.external {
            false => Vec::new(),
            true if ready.is_empty() => ending(),
            true => hinted(ready, place),
        };
        let any = !cluster.is_empty() || (has_local_list && endpoints.all().any(Endpoint::can_serve));
        Self { cluster, local, any, policies, ipvs: proxy.ipvs }
    }

    /// The place to which a connection goes that comes this way.
    #[must_use]
    pub fn target(&self, way: Way) -> Target<'a> {
        let local = match way {
            Way::ClusterIp => self.policies.internal_local,
            Way::FromOutside => self.policies.external_local,
            Way::FromThisNode => false,
        };
        let list = match local {
            // In this mode, an empty local list is replaced by the other one.
            true if self.local.is_empty() && self.ipvs => &self.cluster,
            true => &self.local,
            false => &self.cluster,
        };
        match list.is_empty() {
            false => Target::Endpoints(list.clone()),
            true if self.any => Target::Drop,
            true => Target::Reject,
        }
    }
}

/// The ready endpoints that their hints let through. Hints hold only if every ready endpoint has one, and one of them is
/// for this node, or else for this zone.
fn hinted<'a>(ready: Vec<&'a Endpoint>, place: Place<'_>) -> Vec<&'a Endpoint> {
    let for_node = |e: &&Endpoint| e.hinted_nodes().any(|name| name == place.node);
    let for_zone = |e: &&Endpoint| e.hinted_zones().any(|name| Some(name) == place.zone);
    if ready.iter().all(|e| e.hinted_nodes().next().is_some()) && ready.iter().any(for_node) {
        return ready.into_iter().filter(for_node).collect();
    }
    if ready.iter().all(|e| e.hinted_zones().next().is_some()) && ready.iter().any(for_zone) {
        return ready.into_iter().filter(for_zone).collect();
    }
    ready
}

#[cfg(test)]
#[path = "kube_proxy_tests.rs"]
mod tests;
