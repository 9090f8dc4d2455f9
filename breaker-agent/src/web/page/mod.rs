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

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::StatusCode,
    routing::get,
};
use breaker_api::{
    events::EventLine,
    status::{AgentStatus, ServiceStatus},
};
use breaker_core::model::ServiceName;
use breaker_web::{
    failure::Failure,
    files, guard,
    hub::Hub,
    rows::{Detail, Scope, ScopeKind},
    stream,
};
use serde::Deserialize;
use tokio::{
    sync::{Mutex, Semaphore, mpsc, oneshot, watch},
    time::sleep,
};

use super::{HUNG, ask};
use crate::{clock, command::Command};

/// Requests that wait for the main loop at the same time, at most: everybody on the node may make them.
const AT_ONCE: usize = 4;
/// How long an answer with all services serves others.
const FRESH: Duration = Duration::from_secs(1);

/// State of the handlers.
#[derive(Clone)]
struct Shared {
    node: String,
    commands: mpsc::Sender<Command>,
    turns: Arc<Semaphore>,
    /// The last answer with all services.
    status: Arc<Mutex<Option<(std::time::Instant, AgentStatus)>>>,
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
        .with_state(Shared { node, commands, turns: Arc::new(Semaphore::new(AT_ONCE)), status: Arc::default() });
    guard::guarded(files::routes().merge(stream::routes(hub)).merge(data))
}

impl Shared {
    /// Asks the main loop, when it is this request's turn.
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Failure> {
        let _turn = self.turns.acquire().await;
        ask(&self.commands, request).await.ok_or_else(hung)
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
    // One request reads the services, and its answer serves those that wait.
    let mut last = shared.status.lock().await;
    if let Some((_, status)) = last.as_ref().filter(|(at, _)| clock::since(*at) < FRESH) {
        return Ok(Json(status.clone()));
    }
    let mut services: Vec<ServiceStatus> = Vec::new();
    loop {
        let after = services.last().map(|service| ServiceName::new(&service.name));
        let part = shared.ask(|reply| Command::Services { after, most: feed::PART, reply }).await?;
        let is_last = part.len() < feed::PART;
        services.extend(part.into_iter().map(without_clients));
        if is_last {
            break;
        }
        sleep(feed::TURN).await;
    }
    let status = AgentStatus { services, ..shared.ask(Command::Agent).await? };
    *last = Some((clock::stopwatch(), status.clone()));
    Ok(Json(status))
}

async fn get_service(shared: &Shared, name: String) -> Result<ServiceStatus, Failure> {
    let answer = shared.ask(|reply| Command::Get(name, reply)).await?;
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
    let agent = shared.ask(Command::Agent).await?;
    Ok(Json(rows::detail(&shared.node, &service, &agent.datapath.suspended)))
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
    let events = shared.ask(|reply| Command::Events { after: query.after, reply }).await?;
    Ok(Json(events.into_iter().filter(rows::is_public).collect()))
}
