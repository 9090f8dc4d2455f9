//! `httpGet` probes: each sends one request on a connection of its own, as kubelet and NGINX Plus do. What the check
//! says is what goes on the wire. Redirects are not followed: their status is in the default range 200-399.

use std::net::SocketAddr;

use breaker_core::model::HttpGet;

use super::{
    CheckCode,
    connect::{self, End},
    exchange::contains,
    http_message::Answer,
    http1, http2,
    outcome::{Outcome, Progress, Stage},
    tls::{Inner, Tls},
};

pub(super) async fn probe(at: SocketAddr, get: &HttpGet, tls: &Tls, progress: &Progress) -> Outcome {
    match ask(at, get, tls, progress).await {
        Ok(answer) => judge(&answer, get),
        Err(outcome) => outcome,
    }
}

/// The outcome of a probe whose time limit ran out. If the status has come, and the body does not matter, the status
/// decides.
pub(super) fn timed_out(get: &HttpGet, progress: &Progress) -> Outcome {
    match progress.status() {
        Some(status) if get.body_contains.is_none() => judge(&Answer { status, body: Vec::new() }, get),
        _ => progress.timed_out(),
    }
}

async fn ask(at: SocketAddr, get: &HttpGet, tls: &Tls, progress: &Progress) -> Result<Answer, Outcome> {
    // After the whole answer a reset is harmless, and nothing stays in TIME_WAIT or in connection tracking.
    let stream = connect::tcp(at, End::Reset).await?.stream()?;
    let authority = authority(at, get);
    if !get.https {
        progress.reached(Stage::Answer);
        return http1::get(stream, get, &authority, progress).await;
    }
    progress.reached(Stage::Handshake);
    let name = get.host.as_deref().map(without_port);
    let stream = Box::pin(tls.connect(stream, name, at.ip(), Inner::Http)).await?;
    progress.reached(Stage::Answer);
    match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Box::pin(http2::get(stream, get, &authority, progress)).await,
        _ => http1::get(stream, get, &authority, progress).await,
    }
}

/// The value of the Host header, or of HTTP/2's `:authority`.
fn authority(at: SocketAddr, get: &HttpGet) -> String {
    let given = get.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host")).map(|(_, value)| value.as_str());
    get.host.as_deref().or(given).map_or_else(|| at.to_string(), str::to_owned)
}

/// The name in a host that may have a port. An IPv6 address in brackets stays as it is.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if !host.ends_with(']') && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

fn judge(answer: &Answer, get: &HttpGet) -> Outcome {
    let status = match http::StatusCode::from_u16(answer.status) {
        Ok(status) => format!("status {status}"),
        Err(_) => format!("status {}", answer.status),
    };
    if !get.expected_statuses.iter().any(|range| range.contains(&answer.status)) {
        return (CheckCode::L7Sts, status);
    }
    match &get.body_contains {
        Some(wanted) if !contains(&answer.body, wanted.as_bytes()) => {
            (CheckCode::L7Rsp, format!("{status}, but the body does not contain {wanted:?}"))
        }
        _ => (CheckCode::L7Ok, status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_split_where_its_port_begins() {
        let rows =
            [("a.example", "a.example"), ("a.example:8443", "a.example"), ("[::1]", "[::1]"), ("[::1]:443", "[::1]")];
        for (host, name) in rows {
            assert_eq!(without_port(host), name);
        }
    }
}
