//! A Service's endpoints for one of its ports, from its EndpointSlices.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::objects::{EndpointSlice, SlicePort};

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address and port.
    pub address: SocketAddr,
    /// Its node.
    pub node: Option<String>,
    /// Its zone.
    pub zone: Option<String>,
    /// What is the same for all addresses and ports of a pod: its uid or, where a slice does not say, the address.
    pub pod: String,
    ready: bool,
    serving: bool,
    terminating: bool,
}

/// An IP family, as an EndpointSlice has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

impl Family {
    /// An address's.
    #[must_use]
    pub const fn of(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    const fn address_type(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

/// A Service's endpoints for one port, of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// The pods' port, if a slice has it.
    pub port: Option<u16>,
    endpoints: Vec<Endpoint>,
}

impl Endpoints {
    /// Of the port with this name and protocol (`None` and the empty name are the same: a Service's only port needs none).
    #[must_use]
    pub fn of(slices: &[Arc<EndpointSlice>], port_name: Option<&str>, protocol: &str, family: Family) -> Self {
        let mut found = Self::default();
        // An endpoint may be in two slices for a moment, while it is moved.
        let mut by_address: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
        for slice in slices.iter().filter(|slice| slice.address_type == family.address_type()) {
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

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter()
    }

    /// Those that new connections may go to: the ready ones or, where there is none, those that serve while they
    /// terminate (the rule of kube-proxy, KEP-1669).
    pub fn usable(&self) -> impl Iterator<Item = &Endpoint> {
        let any_ready = self.endpoints.iter().any(|e| e.ready);
        self.endpoints.iter().filter(move |e| if any_ready { e.ready } else { e.serving && e.terminating })
    }

    /// Those that get no new connections, and whose connections go on.
    pub fn draining(&self) -> impl Iterator<Item = &Endpoint> {
        let usable: BTreeSet<SocketAddr> = self.usable().map(|e| e.address).collect();
        self.endpoints.iter().filter(move |e| !usable.contains(&e.address))
    }

    /// Without some.
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
