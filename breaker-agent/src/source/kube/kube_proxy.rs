//! Which endpoints of a Service kube-proxy uses on a node, as a pure function: health is judged where clients go.
//!
//! The rules are those of kube-proxy 1.34 to 1.37 (k8s.io/kubernetes/pkg/proxy: `topology.go`, `endpointslicecache.go`).
//! Hints of the slices count, and not the Service's `trafficDistribution`, from which they were made. What differs
//! between versions and modes is in [`KubeProxy`].

use super::endpoints::{Endpoint, Endpoints, Twice};

/// What differs between kube-proxies.
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

/// What kube-proxy does with a connection.
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
        let filtered = |wanted: &dyn Fn(&Endpoint) -> bool| -> Vec<&'a Endpoint> {
            endpoints.all().filter(|endpoint| wanted(endpoint)).collect()
        };
        let mut cluster = Vec::new();
        if !policies.internal_local || policies.external {
            let hinted = hint_mode(endpoints, place);
            cluster = filtered(&|e| e.is_ready() && hinted(e));
            if !endpoints.all().any(Endpoint::is_ready) {
                cluster = filtered(&Endpoint::ends_and_serves);
            }
        }
        let mut local = Vec::new();
        let has_local_list = policies.internal_local || (policies.external_local && policies.external);
        if has_local_list {
            let here = |e: &Endpoint| e.node.as_deref() == Some(place.node);
            local = filtered(&|e| here(e) && e.is_ready());
            if local.is_empty() {
                local = filtered(&|e| here(e) && e.ends_and_serves());
            }
        }
        let anybody = || endpoints.all().any(|e| e.is_ready() || e.ends_and_serves());
        let any = !cluster.is_empty() || (has_local_list && anybody());
        Self { cluster, local, any, policies, ipvs: proxy.ipvs }
    }

    /// What happens to a connection that comes this way.
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

/// Which ready endpoints the hints let through. They hold only if every ready endpoint has one, and one of them is for
/// this node, or else for this zone.
fn hint_mode<'p>(endpoints: &Endpoints, place: Place<'p>) -> Box<dyn Fn(&Endpoint) -> bool + 'p> {
    let ready = || endpoints.all().filter(|e| e.is_ready());
    let for_node = move |e: &Endpoint| e.hinted_nodes().any(|name| name == place.node);
    let for_zone = move |e: &Endpoint| e.hinted_zones().any(|name| Some(name) == place.zone);
    if ready().all(|e| e.hinted_nodes().next().is_some()) && ready().any(for_node) {
        return Box::new(for_node);
    }
    if ready().all(|e| e.hinted_zones().next().is_some()) && ready().any(for_zone) {
        return Box::new(for_zone);
    }
    Box::new(|_| true)
}

#[cfg(test)]
#[path = "kube_proxy_tests.rs"]
mod tests;
