//! The page, its data and its token.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::{Context as _, Result};
use axum::{
    Json, Router,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use breaker_web::{failure::Failure, files, guard, hub::Hub, rows::Detail, stream};
use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{agents::Agents, rows, world::World};

/// State of the handlers.
#[derive(Clone)]
struct Shared {
    world: Arc<World>,
    agents: Arc<Agents>,
    /// The words of a command before its verb.
    prefix: Arc<[String]>,
}

/// A random token of 128 bits, in hexadecimal digits.
pub(super) fn token() -> Result<String> {
    let mut bytes = [0; 16];
    let random = rustls::crypto::ring::default_provider().secure_random;
    random.fill(&mut bytes).ok().context("read random numbers for the token")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The page for everybody who reaches the address, and its data for whoever has the token: other users of this machine
/// reach the address, too.
pub(super) fn routes(
    hub: Arc<Hub>,
    world: Arc<World>,
    agents: Arc<Agents>,
    token: String,
    prefix: Vec<String>,
) -> Router {
    let data = Router::new()
        .route("/v1/breakers/{*name}", get(detail))
        .route("/v1/nodes/{node}/services/{*name}", get(service))
        .with_state(Shared { world, agents, prefix: prefix.into() })
        .merge(stream::routes(hub))
        .layer(middleware::from_fn_with_state(Arc::<str>::from(format!("Bearer {token}")), authorize));
    guard::guarded(files::routes().merge(data))
}

async fn authorize(State(expected): State<Arc<str>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes).unwrap_or_default();
    if is_same(given, expected.as_bytes()) {
        return next.run(request).await;
    }
    let why = "open the complete address that `kubectl breaker dashboard` printed: its end is the token";
    Failure(StatusCode::UNAUTHORIZED, why.into()).into_response()
}

/// Compares in constant time.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

async fn detail(State(shared): State<Shared>, Path(name): Path<String>) -> Result<Json<Detail>, Failure> {
    let cluster = rows::Cluster::of(&shared.world, BTreeMap::new(), Timestamp::now());
    let detail = cluster.detail(&name, &shared.prefix);
    detail.map(Json).ok_or_else(|| Failure(StatusCode::NOT_FOUND, format!("there is no breaker {name} here")))
}

/// Hands over what the agent of a node says of a service.
async fn service(
    State(shared): State<Shared>,
    Path((node, name)): Path<(String, String)>,
) -> Result<Response, Failure> {
    let path = format!("/v1/services/{}", utf8_percent_encode(&name, NON_ALPHANUMERIC));
    match shared.agents.get(&node, &path).await {
        Ok((status, body)) => Ok((status, [(header::CONTENT_TYPE, "application/json")], body).into_response()),
        Err(error) => Err(Failure(StatusCode::BAD_GATEWAY, format!("pods and checks are not shown: {error:#}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_random_and_compared_as_a_whole() {
        let (a, b) = (token().unwrap(), token().unwrap());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
        assert!(is_same(a.as_bytes(), a.as_bytes()));
        assert!(!is_same(&a.as_bytes()[..31], a.as_bytes()));
        assert!(!is_same(b"", a.as_bytes()));
    }
}
