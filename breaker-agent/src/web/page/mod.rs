//! The live page of this node, and the read-only part of the control socket's requests.
//!
//! | module | one concern |
//! |---|---|
//! | [`feed`] | keeps the rows of the page current while somebody looks |
//! | [`rows`] | conversion of statuses and events to rows |
//!
//! Addresses of clients stay on the control socket, which only root may use: the answers here have no flows, no events
//! about single packets, and not the clients that limits refuse.

mod feed;
mod rows;

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
};
use breaker_api::{
    commands::ErrorBody,
    events::EventLine,
    status::{AgentStatus, ServiceStatus},
};
use breaker_web::{
    files, guard,
    hub::Hub,
    rows::{Detail, Scope, ScopeKind},
    stream,
};
use serde::Deserialize;
use tokio::sync::{mpsc, watch};

use super::{HUNG, ask};
use crate::command::Command;

/// What the handlers share.
#[derive(Clone)]
struct Shared {
    node: String,
    commands: mpsc::Sender<Command>,
}

/// Starts the feed of the page. Returns the page with its data.
pub(super) fn start(node: String, commands: mpsc::Sender<Command>, latest: watch::Receiver<u64>) -> Router {
    let scope =
        Scope { kind: ScopeKind::Node, name: node.clone(), namespace: None, version: env!("CARGO_PKG_VERSION").into() };
    let hub = Hub::new(scope);
    tokio::spawn(feed::run(hub.clone(), node.clone(), commands.clone(), latest));
    let data = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services/{*name}", get(service))
        .route("/v1/events", get(events))
        .route("/v1/breakers/{*name}", get(detail))
        .route("/v1/nodes/{node}/services/{*name}", get(service_of_node))
        .with_state(Shared { node, commands });
    guard::guarded(files::routes().merge(stream::routes(hub)).merge(data))
}

/// An error response.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

fn hung() -> Failure {
    Failure(StatusCode::SERVICE_UNAVAILABLE, HUNG.trim_end().into())
}

/// Removes the addresses of clients.
fn without_clients(mut service: ServiceStatus) -> ServiceStatus {
    if let Some(limits) = &mut service.limits {
        limits.limited_clients.clear();
    }
    service
}

async fn status(State(shared): State<Shared>) -> Result<Json<AgentStatus>, Failure> {
    let mut status = ask(&shared.commands, Command::Status).await.ok_or_else(hung)?;
    status.services = status.services.into_iter().map(without_clients).collect();
    Ok(Json(status))
}

async fn get_service(shared: &Shared, name: String) -> Result<ServiceStatus, Failure> {
    let answer = ask(&shared.commands, |reply| Command::Get(name, reply)).await.ok_or_else(hung)?;
    answer.map(without_clients).map_err(|error| Failure(StatusCode::NOT_FOUND, error.to_string()))
}

async fn service(State(shared): State<Shared>, Path(name): Path<String>) -> Result<Json<ServiceStatus>, Failure> {
    get_service(&shared, name).await.map(Json)
}

async fn service_of_node(
    State(shared): State<Shared>,
    Path((node, name)): Path<(String, String)>,
) -> Result<Json<ServiceStatus>, Failure> {
    if node != shared.node {
        return Err(Failure(StatusCode::NOT_FOUND, format!("this is node {}, not {node}", shared.node)));
    }
    get_service(&shared, name).await.map(Json)
}

async fn detail(State(shared): State<Shared>, Path(name): Path<String>) -> Result<Json<Detail>, Failure> {
    let service = get_service(&shared, name).await?;
    Ok(Json(rows::detail(&shared.node, &service)))
}

#[derive(Deserialize)]
struct EventsQuery {
    #[serde(default)]
    after: u64,
}

async fn events(
    State(shared): State<Shared>,
    Query(query): Query<EventsQuery>,
) -> Result<Json<Vec<EventLine>>, Failure> {
    let events = ask(&shared.commands, |reply| Command::Events { after: query.after, reply }).await.ok_or_else(hung)?;
    Ok(Json(events.into_iter().filter(rows::is_public).collect()))
}
