//! A Service's endpoints for one of its ports, from its EndpointSlices.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::objects::{EndpointSlice, SlicePort};

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
    /// only port needs no name.
    #[must_use]
    pub fn of(slices: &[Arc<EndpointSlice>], port_name: Option<&str>, protocol: &str, family: Family) -> Self {
        let mut found = Self::default();
        // An endpoint may be in two slices for a moment, while the controller moves it. A ready entry wins.
        let mut by_address: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
        for slice in slices.iter().filter(|slice| slice.address_type == family.name()) {
            let name = |p: &&SlicePort| {
                p.name.as_deref().unwrap_or_default() == port_name.unwrap_or_default()
                    && p.protocol.as_deref().unwrap_or("TCP") == protocol
            };
            let Some(port) = slice.ports.iter().find(name).and_then(|p| u16::try_from(p.port?).ok()) else {
                continue;
            };
            found.port = Some(port);
            for endpoint in &slice.endpoints {
                // The first address stands for the endpoint (EndpointSlice API: consumers use one of them).
                let Some(ip) = endpoint.addresses.first().and_then(|a| a.parse::<IpAddr>().ok()) else { continue };
                let address = SocketAddr::new(ip, port);
                let conditions = endpoint.conditions;
                // Absent means: ready, serving as ready, not terminating (EndpointConditions of discovery/v1).
                let ready = conditions.ready.unwrap_or(true);
                let new = Endpoint {
                    address,
                    node: endpoint.node_name.clone(),
                    zone: endpoint.zone.clone(),
                    pod: endpoint.target_ref.as_ref().and_then(|r| r.uid.clone()).unwrap_or_else(|| ip.to_string()),
                    ready,
                    serving: conditions.serving.unwrap_or(ready),
                    terminating: conditions.terminating.unwrap_or(false),
                };
                match by_address.get(&address) {
                    Some(known) if known.ready => {}
                    _ => drop(by_address.insert(address, new)),
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
        self.endpoints.iter().filter(move |e| if any_ready { e.ready } else { e.serving && e.terminating })
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
        Endpoints::of(slices, name, "TCP", Family::V4)
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
