//! Keeps other sites away from the page and its data.

use std::net::IpAddr;

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};

/// Adds the checks and headers to every route of `router`:
///
/// * A request must name the server by an address or as `localhost`. A site whose name resolves to a loopback address
///   (DNS rebinding) is refused.
/// * A browser that says that another site makes the request (Fetch Metadata) is refused.
/// * The answers may not be framed, guessed at or read by other origins, and the page loads nothing from elsewhere.
pub fn guarded(router: Router) -> Router {
    router.layer(middleware::from_fn(guard))
}

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

async fn guard(request: Request, next: Next) -> Response {
    if !is_addressed(request.headers()) {
        let why = "the Host of the request must be an address or localhost; a proxy in front can set it\n";
        return (StatusCode::MISDIRECTED_REQUEST, why).into_response();
    }
    if is_of_another_site(request.headers()) {
        return (StatusCode::FORBIDDEN, "another site may not use this page's data\n").into_response();
    }
    let mut response = next.run(request).await;
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Whether a browser says that another site makes the request. A link on another site may lead here.
fn is_of_another_site(headers: &HeaderMap) -> bool {
    let says = |name: &str, value: &str| headers.get(name).is_some_and(|said| said == value);
    says("sec-fetch-site", "cross-site") && !says("sec-fetch-mode", "navigate")
}

/// Whether the Host header is an address or `localhost`, with or without a port.
fn is_addressed(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else { return false };
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(host, _)| host),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_are_hosts() {
        let rows = [
            ("127.0.0.1:9810", true),
            ("127.0.0.1", true),
            ("[::1]:9810", true),
            ("[::1]", true),
            ("localhost:1234", true),
            ("LOCALHOST", true),
            ("192.0.2.1:80", true),
            ("rebound.example.com:9810", false),
            ("localhost.example.com", false),
            ("127.0.0.1.example.com", false),
            ("", false),
        ];
        for (host, expected) in rows {
            let headers = HeaderMap::from_iter([(header::HOST, HeaderValue::from_static(host))]);
            assert_eq!(is_addressed(&headers), expected, "{host:?}");
        }
        assert!(!is_addressed(&HeaderMap::new()));
    }
}
