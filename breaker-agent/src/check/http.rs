//! `httpGet` probes: each sends one request on a connection of its own, as kubelet and NGINX Plus do.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::BytesMut;
use reqwest::{Client, Response, redirect};

use super::{CheckCode, Outcome};
use breaker_core::model::CheckAction;

/// Largest part of a response body, in bytes, that is read and searched.
const BODY_LIMIT: usize = 64 * 1024;

/// HTTP clients by time limit. Checks with the same limit share a client: a client holds a TLS configuration, and a
/// thousand checks should not hold a thousand of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Clients {
    by_limit: Arc<Mutex<HashMap<Duration, Client>>>,
}

impl Clients {
    fn get(&self, limit: Duration) -> reqwest::Result<Client> {
        let mut clients = self.by_limit.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&limit) {
            return Ok(client.clone());
        }
        let client = builder(limit).build()?;
        clients.insert(limit, client.clone());
        Ok(client)
    }
}

fn builder(limit: Duration) -> reqwest::ClientBuilder {
    Client::builder()
        .user_agent(concat!("breaker/", env!("CARGO_PKG_VERSION")))
        // A redirect counts as an answer: its status is in the default range 200-399.
        .redirect(redirect::Policy::none())
        .no_proxy()
        .http1_only()
        .pool_max_idle_per_host(0)
        // As in kubelet: a check asks whether the service answers, not who signed its certificate.
        .tls_danger_accept_invalid_certs(true)
        .timeout(limit)
        // Slightly shorter than the total limit, so that the error tells which of the two limits expired.
        .connect_timeout(limit.saturating_sub(Duration::from_millis(2)).max(Duration::from_millis(1)))
}

pub(super) async fn probe(clients: &Clients, action: &CheckAction, at: SocketAddr, limit: Duration) -> Outcome {
    let CheckAction::HttpGet { path, https, host, headers, expected_statuses, body_contains, .. } = action else {
        return (CheckCode::L7Rsp, "internal error: this is not an HTTP check".into());
    };
    let scheme = if *https { "https" } else { "http" };
    // With TLS, a host name is sent in the handshake (SNI), so it must be part of the URL; `resolve` makes it lead
    // to the probed address. An IP address is never sent as SNI (RFC 6066, section 3).
    let named = host.as_deref().filter(|_| *https).map(|host| host.split(':').next().unwrap_or(host));
    let named = named.filter(|name| name.parse::<IpAddr>().is_err() && !name.starts_with('['));
    let (client, authority) = match named {
        Some(name) => (builder(limit).resolve(name, at).build(), format!("{name}:{}", at.port())),
        None => (clients.get(limit), at.to_string()),
    };
    let client = match client {
        Ok(client) => client,
        Err(error) => return (CheckCode::L7Rsp, describe(&error)),
    };
    let mut request = client.get(format!("{scheme}://{authority}{path}"));
    if let Some(host) = host {
        request = request.header(reqwest::header::HOST, host);
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    match request.send().await {
        Ok(response) => judge(response, expected_statuses, body_contains.as_deref()).await,
        Err(error) => classify(&error),
    }
}

async fn judge(response: Response, expected: &[std::ops::RangeInclusive<u16>], body_contains: Option<&str>) -> Outcome {
    let status = response.status();
    let words = || format!("status {status}");
    if !expected.iter().any(|range| range.contains(&status.as_u16())) {
        return (CheckCode::L7Sts, words());
    }
    let Some(wanted) = body_contains else { return (CheckCode::L7Ok, words()) };
    match read_body(response).await {
        Ok(body) if contains(&body, wanted.as_bytes()) => (CheckCode::L7Ok, words()),
        Ok(_) => (CheckCode::L7Rsp, format!("{}, but the body does not contain {wanted:?}", words())),
        Err(error) => classify(&error),
    }
}

async fn read_body(mut response: Response) -> reqwest::Result<BytesMut> {
    let mut body = BytesMut::new();
    while body.len() < BODY_LIMIT {
        let Some(chunk) = response.chunk().await? else { break };
        body.extend_from_slice(&chunk);
    }
    body.truncate(BODY_LIMIT);
    Ok(body)
}

fn contains(body: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || body.windows(wanted.len()).any(|window| window == wanted)
}

fn classify(error: &reqwest::Error) -> Outcome {
    let tls = chain(error).any(is_tls);
    let code = match (error.is_timeout(), error.is_connect()) {
        _ if tls => CheckCode::L6Rsp,
        (true, true) => CheckCode::L4Tout,
        (true, false) => CheckCode::L7Tout,
        (false, true) => CheckCode::L4Con,
        // The connection failed while the probe waited for the answer: an error of the connection, if it came from
        // the socket.
        (false, false) if chain(error).any(|cause| cause.is::<std::io::Error>()) => CheckCode::L4Con,
        (false, false) => CheckCode::L7Rsp,
    };
    (code, describe(error))
}

/// Whether an error is a TLS error. `source()` does not return the error that an I/O error wraps, so this function
/// looks inside.
fn is_tls(cause: &(dyn std::error::Error + 'static)) -> bool {
    let inner = cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
    cause.is::<rustls::Error>() || inner.is_some_and(|inner| is_tls(inner))
}

fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |cause| cause.source())
}

/// Describes an error by its innermost cause: "connection refused" rather than "error sending request".
fn describe(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return if error.is_connect() { "not connected in time".into() } else { "no answer in time".into() };
    }
    chain(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}
