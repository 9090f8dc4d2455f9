//! Port names in checks: a check of a CircuitBreaker may name a port, and probes need its number.

use breaker_api::crd::{Check, Port};

/// Whether a check names the port that it uses.
pub(super) fn names_a_port(check: &Check) -> bool {
    check.http_get.as_ref().is_some_and(|action| action.port.is_some())
        || check.tcp_socket.as_ref().is_some_and(|action| action.port.is_some())
        || check.grpc.as_ref().is_some_and(|action| action.port.is_some())
        || check.dns.as_ref().is_some_and(|action| action.port.is_some())
        || check.udp.as_ref().is_some_and(|action| action.port.is_some())
}

/// A copy of a check with port numbers in place of port names. `number` maps a name to the pods' port.
///
/// # Errors
/// The name that `number` does not know.
pub(super) fn numbered(check: &Check, number: impl Fn(&str) -> Option<u16>) -> Result<Check, String> {
    let mut check = check.clone();
    let ports = [
        check.http_get.as_mut().and_then(|action| action.port.as_mut()),
        check.tcp_socket.as_mut().and_then(|action| action.port.as_mut()),
        check.grpc.as_mut().and_then(|action| action.port.as_mut()),
        check.dns.as_mut().and_then(|action| action.port.as_mut()),
        check.udp.as_mut().and_then(|action| action.port.as_mut()),
    ];
    for port in ports.into_iter().flatten() {
        if let Port::Name(name) = port {
            let found = number(name).ok_or_else(|| name.clone())?;
            *port = Port::Number(i64::from(found));
        }
    }
    Ok(check)
}
