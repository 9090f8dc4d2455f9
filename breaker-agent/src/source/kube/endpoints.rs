//! A Service's endpoints for one of its ports, from its EndpointSlices.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::objects::{EndpointSlice, Hints, SliceEndpoint, SlicePort};

/// An endpoint of a Service for one port and one IP family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address and port.
    pub address: SocketAddr,
    /// Name of its Node.
    pub node: Option<String>,
    /// Zone of its Node.
    pub zone: Option<String>,
    /// Identity of the pod over all its addresses and ports: its uid or, if the slice has none, its IP address.
    pub pod: String,
    ready: bool,
    serving: bool,
    terminating: bool,
    hints: Hints,
    /// The TCP ports of its slice, by name: other endpoints of the Service may have other numbers.
    named_ports: Arc<BTreeMap<String, u16>>,
}

impl Endpoint {
    fn new(raw: &SliceEndpoint, port: u16, named_ports: &Arc<BTreeMap<String, u16>>) -> Option<Self> {
        // The first address stands for the endpoint (EndpointSlice API: consumers use one of them).
        let ip: IpAddr = raw.addresses.first()?.parse().ok()?;
        // An absent condition means what it means to kube-proxy: ready, serving, not terminating.
        Some(Self {
            address: SocketAddr::new(ip, port),
            node: raw.node_name.clone(),
            zone: raw.zone.clone(),
            pod: raw.target_ref.as_ref().and_then(|r| r.uid.clone()).unwrap_or_else(|| ip.to_string()),
            ready: raw.conditions.ready.unwrap_or(true),
            serving: raw.conditions.serving.unwrap_or(true),
            terminating: raw.conditions.terminating.unwrap_or(false),
            hints: raw.hints.clone(),
            named_ports: named_ports.clone(),
        })
    }

    /// Whether it may get new connections at any time.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether it is terminating and still accepts connections. It then gets new ones while nobody is ready.
    #[must_use]
    pub const fn ends_and_serves(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }

    /// Whether it accepts connections at all.
    #[must_use]
    pub const fn can_serve(&self) -> bool {
        self.ready || self.ends_and_serves()
    }

    /// The nodes that it is meant for.
    pub fn hinted_nodes(&self) -> impl Iterator<Item = &str> {
        self.hints.for_nodes.iter().map(|hint| hint.name.as_str())
    }

    /// The zones that it is meant for.
    pub fn hinted_zones(&self) -> impl Iterator<Item = &str> {
        self.hints.for_zones.iter().map(|hint| hint.name.as_str())
    }

    /// The number that a named TCP port of the Service has at this endpoint.
    #[must_use]
    pub fn port_named(&self, name: &str) -> Option<u16> {
        self.named_ports.get(name).copied()
    }

    /// How useful it is, compared with another entry of the same address.
    const fn rank(&self) -> u8 {
        match () {
            () if self.ready => 2,
            () if self.ends_and_serves() => 1,
            () => 0,
        }
    }
}

/// Which of two entries with the same address stays: the address of a pod that has ended may be another pod's by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Twice<'a> {
    /// The more useful one.
    Better,
    /// The first one, unless the later one is on this node.
    FirstUnlessLocal(&'a str),
    /// The later one, unless it is terminating.
    LaterUnlessTerminating,
}

impl Twice<'_> {
    /// Whether `later` replaces `first`. Both are in the same slice, in this order.
    fn replaces(self, first: &Endpoint, later: &Endpoint) -> bool {
        match self {
            Self::Better => later.rank() > first.rank(),
            Self::FirstUnlessLocal(node) => later.node.as_deref() == Some(node),
            Self::LaterUnlessTerminating => !later.terminating,
        }
    }

    /// Whether `other` replaces `first`, if they are in different slices. The order of slices means nothing.
    fn prefers(self, first: &Endpoint, other: &Endpoint) -> bool {
        let [of_first, of_other] = [first, other].map(|e| match self {
            Self::Better => false,
            Self::FirstUnlessLocal(node) => e.node.as_deref() == Some(node),
            Self::LaterUnlessTerminating => !e.terminating,
        });
        (of_other, other.rank()) > (of_first, first.rank())
    }
}

/// An IP family. An EndpointSlice holds addresses of one family only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4 (RFC 791).
    V4,
    /// IPv6 (RFC 8200).
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The other family.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }

    /// The family's name, as EndpointSlices have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// A Service's endpoints for one port and one IP family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Port number at the pods; `None` if no slice has the port.
    pub port: Option<u16>,
    endpoints: Vec<Endpoint>,
}

impl Endpoints {
    /// The endpoints for the port with this name and protocol. `None` and the empty name mean the same: a Service's
    /// only port needs no name. A port of a slice that has no name or no number is left out, as kube-proxy does. The
    /// order of the slices does not matter.
    #[must_use]
    pub fn of(
        slices: &[Arc<EndpointSlice>],
        port_name: Option<&str>,
        protocol: &str,
        family: Family,
        twice: Twice<'_>,
    ) -> Self {
        let mut found = Self::default();
        let mut by_address: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
        let mut slices: Vec<&EndpointSlice> =
            slices.iter().map(AsRef::as_ref).filter(|slice| slice.address_type == family.name()).collect();
        slices.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        for slice in slices {
            let number = |port: &SlicePort| u16::try_from(port.port?).ok();
            let of_protocol = |port: &&SlicePort, wanted: &str| port.protocol.as_deref().unwrap_or("TCP") == wanted;
            let wanted = |port: &&SlicePort| {
                port.name.as_deref() == Some(port_name.unwrap_or_default()) && of_protocol(port, protocol)
            };
            let Some(port) = slice.ports.iter().find(wanted).and_then(number) else { continue };
            let named = slice.ports.iter().filter(|port| of_protocol(port, "TCP"));
            let named_ports: BTreeMap<String, u16> =
                named.filter_map(|port| Some((port.name.clone()?, number(port)?))).collect();
            let named_ports = Arc::new(named_ports);
            found.port = found.port.or(Some(port));
            let mut in_slice: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
            for new in slice.endpoints.iter().filter_map(|raw| Endpoint::new(raw, port, &named_ports)) {
                match in_slice.get(&new.address) {
                    Some(known) if !twice.replaces(known, &new) => {}
                    _ => drop(in_slice.insert(new.address, new)),
                }
            }
            for new in in_slice.into_values() {
                match by_address.get(&new.address) {
                    Some(known) if !twice.prefers(known, &new) => {}
                    _ => drop(by_address.insert(new.address, new)),
                }
            }
        }
        found.endpoints = by_address.into_values().collect();
        found
    }

    /// All endpoints.
    pub fn all(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter()
    }

    /// Endpoints that may get new connections: the ready ones or, if none is ready, those that are terminating but
    /// still serving (kube-proxy's rule, KEP-1669).
    pub fn usable(&self) -> impl Iterator<Item = &Endpoint> {
        let any_ready = self.endpoints.iter().any(|e| e.ready);
        self.endpoints.iter().filter(move |e| if any_ready { e.ready } else { e.ends_and_serves() })
    }

    /// Endpoints that get no new connections, but keep their established ones.
    pub fn draining(&self) -> impl Iterator<Item = &Endpoint> {
        let usable: BTreeSet<SocketAddr> = self.usable().map(|e| e.address).collect();
        self.endpoints.iter().filter(move |e| !usable.contains(&e.address))
    }

    /// The same endpoints without those that have one of these addresses.
    #[must_use]
    pub fn without(mut self, addresses: &BTreeSet<SocketAddr>) -> Self {
        self.endpoints.retain(|e| !addresses.contains(&e.address));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(endpoints: serde_json::Value) -> Arc<EndpointSlice> {
        Arc::new(
            serde_json::from_value(serde_json::json!({
                "metadata": {"name": "s"}, "addressType": "IPv4", "ports": [{"name": "", "port": 80, "protocol": "TCP"}],
                "endpoints": endpoints
            }))
            .unwrap(),
        )
    }

    fn v4(slices: &[Arc<EndpointSlice>], name: Option<&str>) -> Endpoints {
        Endpoints::of(slices, name, "TCP", Family::V4, Twice::Better)
    }

    fn addresses<'a>(endpoints: impl Iterator<Item = &'a Endpoint>) -> Vec<String> {
        endpoints.map(|e| e.address.to_string()).collect()
    }

    #[test]
    fn ready_ones_are_used_and_the_others_drain() {
        let slice = slice(serde_json::json!([
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true, "serving": true, "terminating": false}},
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false, "terminating": false}},
            {"addresses": ["10.0.0.4"]},
        ]));
        let endpoints = v4(&[slice], None);
        assert_eq!(addresses(endpoints.usable()), ["10.0.0.1:80", "10.0.0.4:80"]);
        assert_eq!(addresses(endpoints.draining()), ["10.0.0.2:80", "10.0.0.3:80"]);
    }

    #[test]
    fn with_none_ready_those_that_still_serve_are_used() {
        let slice = slice(serde_json::json!([
            {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false, "terminating": true}},
        ]));
        assert_eq!(addresses(v4(&[slice], None).usable()), ["10.0.0.2:80"]);
    }

    #[test]
    fn a_port_goes_by_its_name_and_a_copy_in_another_slice_counts_once() {
        let one = slice(serde_json::json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": false}}]));
        let two = slice(serde_json::json!([{"addresses": ["10.0.0.1"]}]));
        let endpoints = v4(&[one.clone(), two], Some(""));
        assert_eq!(addresses(endpoints.usable()), ["10.0.0.1:80"]);
        assert_eq!(v4(&[one], Some("metrics")), Endpoints::default());
    }
}
