//! Port names in checks: a check of a CircuitBreaker may name a port, and probes need its number.

use std::{collections::BTreeMap, net::SocketAddr};

use breaker_api::crd::{Check, Port};

use crate::source::kube::endpoints::Endpoints;

/// The port that a check names or numbers; `None` if it uses the port of the backend.
pub(super) fn port(check: &Check) -> Option<&Port> {
    let ports = [
        check.http_get.as_ref().and_then(|action| action.port.as_ref()),
        check.tcp_socket.as_ref().and_then(|action| action.port.as_ref()),
        check.grpc.as_ref().and_then(|action| action.port.as_ref()),
        check.dns.as_ref().and_then(|action| action.port.as_ref()),
        check.udp.as_ref().and_then(|action| action.port.as_ref()),
    ];
    ports.into_iter().flatten().next()
}

/// A copy of a check with another port.
pub(super) fn with_port(check: &Check, number: u16) -> Check {
    let mut check = check.clone();
    let ports = [
        check.http_get.as_mut().and_then(|action| action.port.as_mut()),
        check.tcp_socket.as_mut().and_then(|action| action.port.as_mut()),
        check.grpc.as_mut().and_then(|action| action.port.as_mut()),
        check.dns.as_mut().and_then(|action| action.port.as_mut()),
        check.udp.as_mut().and_then(|action| action.port.as_mut()),
    ];
    ports.into_iter().flatten().for_each(|port| *port = Port::Number(i64::from(number)));
    check
}

/// The number of a check's named port at each endpoint. Pods of one Service may have different numbers for one name:
/// each of their slices says its own (a rollout to a new container port, for example).
pub(super) fn ports_of(check: Option<&Check>, endpoints: &Endpoints) -> BTreeMap<SocketAddr, u16> {
    let Some(Port::Name(name)) = check.and_then(port) else { return BTreeMap::new() };
    endpoints.all().filter_map(|endpoint| Some((endpoint.address, endpoint.port_named(name)?))).collect()
}
