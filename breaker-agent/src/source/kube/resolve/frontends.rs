//! The addresses that clients connect to, and which of them keep the client's address.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use breaker_core::model::{Frontend, Protocol};

use super::{Resolver, refuse};
use crate::source::kube::{
    endpoints::Family,
    kube_proxy::Policies,
    objects::{Service, ServicePort},
};

impl Resolver<'_> {
    /// The addresses that clients connect to, for one port and IP family: cluster IPs, external IPs, load balancer
    /// addresses and the NodePort on the node's own addresses.
    pub(super) fn frontends(
        &mut self,
        service: &Service,
        port: &ServicePort,
        protocol: Protocol,
        family: Family,
    ) -> Vec<Frontend> {
        let spec = &service.spec;
        // kube-proxy serves an IP family only if the Service has a cluster IP of that family.
        if !spec.all_cluster_ips().any(|ip| Family::of(SocketAddr::new(ip, 0)) == family) {
            return Vec::new();
        }
        let number = u16::try_from(port.port).unwrap_or_default();
        if !spec.external_ips.is_empty() && !self.world.frontends.external_ips {
            self.note("external IPs are not protected (agent.externalIPs: Deny)".into());
        }
        let external = spec.external_ips.iter().filter(|_| self.world.frontends.external_ips);
        let external: Vec<IpAddr> = external.filter_map(|ip| self.owned(ip, true)).collect();
        let balancers = service.status.load_balancer.ingress.iter();
        // netfilter drops packets from other sources before it translates them. The programs would translate before
        // netfilter sees the packet, and so bypass that rule.
        let limited = !spec.load_balancer_source_ranges.is_empty();
        if limited && !service.status.load_balancer.ingress.is_empty() {
            self.note("load balancer addresses are not protected: the Service has loadBalancerSourceRanges".into());
        }
        let balancers = balancers.filter(|_| !limited);
        // With ipMode Proxy, packets arrive with a destination that the load balancer chose.
        let balancers = balancers.filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip.as_ref());
        let balancers: Vec<IpAddr> = balancers.filter_map(|ip| self.owned(ip, false)).collect();
        let all = spec.all_cluster_ips().chain(external).chain(balancers);
        let mut addresses: BTreeSet<SocketAddr> = all.map(|ip| SocketAddr::new(ip, number)).collect();
        if let Some(node_port) = port.node_port.and_then(|p| u16::try_from(p).ok()).filter(|p| *p > 0) {
            let own = self.world.frontends.node_ports.of(&self.world.node.addresses);
            addresses.extend(own.into_iter().map(|ip| SocketAddr::new(ip, node_port)));
        }
        let ours = addresses.into_iter().filter(|address| Family::of(*address) == family);
        ours.map(|address| Frontend { address, protocol }).collect()
    }

    /// An address that the Service has beside its cluster IPs; `None` if it is no address, or not the Service's. In the
    /// second case the condition ResolvedRefs says so. `chosen`: the Service's author chose it, and not a load balancer.
    fn owned(&mut self, address: &str, chosen: bool) -> Option<IpAddr> {
        let ip = address.parse::<IpAddr>().ok()?;
        let own = &self.result.service;
        let why = match self.cluster_ips.get(&ip) {
            Some(owner) if *owner != own => format!("the cluster IP of Service {owner}"),
            // k3s gives the addresses of nodes to load balancers.
            _ if chosen && self.world.node.addresses.contains(&ip) => "an address of a node".to_owned(),
            _ if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => "no address of a host".to_owned(),
            _ => return Some(ip),
        };
        let message = format!("{ip} is {why}, and not protected for Service {own}");
        self.result.resolved = refuse("FrontendNotOwned", message);
        None
    }
}

/// The frontends for connections from outside of the cluster: all except the cluster IPs.
pub(super) fn outside_frontends(service: &Service, frontends: &[Frontend]) -> BTreeSet<Frontend> {
    let inside = |ip: IpAddr| service.spec.all_cluster_ips().any(|own| own == ip);
    frontends.iter().filter(|frontend| !inside(frontend.address.ip())).copied().collect()
}

/// The fields of a Service that decide which endpoints kube-proxy uses.
pub(super) fn policies_of(service: &Service) -> Policies {
    let spec = &service.spec;
    let is_local = |policy: &Option<String>| policy.as_deref() == Some("Local");
    Policies {
        internal_local: is_local(&spec.internal_traffic_policy),
        external_local: is_local(&spec.external_traffic_policy),
        external: spec.ports.iter().any(|port| port.node_port.is_some_and(|port| port > 0))
            || !spec.external_ips.is_empty()
            || !service.status.load_balancer.ingress.is_empty(),
    }
}
