//! The server side of the control socket.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path as FsPath, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use breaker_api::{
    commands::{ErrorBody, HandoverBody, TripBody},
    events::EventLine,
};
use breaker_core::engine::CommandError;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use crate::command::Command;

/// A control socket that is being served. When dropped, the socket file is removed.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path);
    }
}

/// Serves the control socket. A socket file that no process listens on is replaced.
///
/// # Errors
/// Another process listens on the socket, or the path cannot be bound.
pub fn serve(path: &FsPath, commands: mpsc::Sender<Command>, latest: watch::Receiver<u64>) -> Result<Socket> {
    if UnixStream::connect(path).is_ok() {
        bail!("another process already listens on the control socket {}", path.display());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create the directory {}", dir.display()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove the old socket {}", path.display()));
        }
        _ => {}
    }
    // The umask keeps other users out between bind and chmod.
    let old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(old);
    let listener = listener.with_context(|| format!("bind the control socket {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("restrict the control socket {}", path.display()))?;
    let app = router(Shared { commands, latest });
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!("the control socket ended: {error}");
        }
    });
    Ok(Socket { path: path.to_owned(), task })
}

#[derive(Clone)]
struct Shared {
    commands: mpsc::Sender<Command>,
    latest: watch::Receiver<u64>,
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/services/{*rest}", get(service_get).post(service_post))
        .route("/v1/events", get(events))
        .route("/v1/handover", post(handover))
        .route("/v1/ping", post(|| async { "pong" }).get(|| async { "pong" }))
        .fallback(|| async { Failure(StatusCode::NOT_FOUND, "unknown path; see docs/CONTROL.md".into()) })
        .with_state(shared)
}

/// An error response.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        let status = match error {
            CommandError::UnknownService { .. } => StatusCode::NOT_FOUND,
            CommandError::Configured { .. } => StatusCode::CONFLICT,
            CommandError::Datapath(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error.to_string())
    }
}

/// Sends a request to the main loop and waits for the answer.
async fn ask<T>(shared: &Shared, request: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Failure> {
    let (reply, answer) = oneshot::channel();
    let gone = || Failure(StatusCode::SERVICE_UNAVAILABLE, "the agent is shutting down".into());
    shared.commands.send(request(reply)).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())
}

async fn status(State(shared): State<Shared>) -> Result<Response, Failure> {
    Ok(Json(ask(&shared, Command::Status).await?).into_response())
}

#[derive(Deserialize)]
struct FlowsQuery {
    limit: Option<usize>,
}

/// Answers GET /v1/services/NAME and /v1/services/NAME/flows. A name may contain a slash (namespace/name), so only
/// the part after the last slash can be the verb.
async fn service_get(
    State(shared): State<Shared>,
    Path(rest): Path<String>,
    Query(query): Query<FlowsQuery>,
) -> Result<Response, Failure> {
    if let Some(name) = rest.strip_suffix("/flows") {
        let (name, limit) = (name.to_owned(), query.limit.unwrap_or(100));
        return json(ask(&shared, |reply| Command::Flows { name, limit, reply }).await?);
    }
    json(ask(&shared, |reply| Command::Get(rest, reply)).await?)
}

async fn service_post(
    State(shared): State<Shared>,
    Path(rest): Path<String>,
    body: Bytes,
) -> Result<Response, Failure> {
    if let Some(name) = rest.strip_suffix("/trip") {
        let body: TripBody = if body.is_empty() {
            TripBody::default()
        } else {
            serde_json::from_slice(&body).map_err(|error| {
                Failure(
                    StatusCode::BAD_REQUEST,
                    format!("body: {error}; allowed: {{\"seconds\": N, \"reason\": \"…\"}}"),
                )
            })?
        };
        if body.seconds == Some(0) {
            return Err(Failure(StatusCode::BAD_REQUEST, "seconds: 0 is not allowed; allowed: at least 1".into()));
        }
        let (name, duration) = (name.to_owned(), body.seconds.map(Duration::from_secs));
        return json(ask(&shared, |reply| Command::Trip { name, duration, reason: body.reason, reply }).await?);
    }
    if let Some(name) = rest.strip_suffix("/reset") {
        let name = name.to_owned();
        return json(ask(&shared, |reply| Command::Reset(name, reply)).await?);
    }
    Err(Failure(StatusCode::NOT_FOUND, "POST allows only /v1/services/NAME/trip and /v1/services/NAME/reset".into()))
}

async fn handover(State(shared): State<Shared>, body: Bytes) -> Result<Response, Failure> {
    let allowed = "allowed: {\"seconds\": N}, N from 1 to 86400";
    let refuse = |why: String| Failure(StatusCode::BAD_REQUEST, format!("{why}; {allowed}"));
    let body: HandoverBody = serde_json::from_slice(&body).map_err(|error| refuse(format!("body: {error}")))?;
    if !(1..=86_400).contains(&body.seconds) {
        return Err(refuse(format!("seconds: {} is not allowed", body.seconds)));
    }
    let duration = Duration::from_secs(body.seconds);
    ask(&shared, |reply| Command::Handover { duration, reply }).await?;
    Ok(Json(body).into_response())
}

fn json<T: Serialize>(outcome: Result<T, CommandError>) -> Result<Response, Failure> {
    Ok(Json(outcome?).into_response())
}

#[derive(Deserialize)]
struct EventsQuery {
    #[serde(default)]
    after: u64,
    #[serde(default)]
    follow: bool,
}

/// Answers with one JSON object per line. With `follow`, the answer does not end.
async fn events(State(shared): State<Shared>, Query(query): Query<EventsQuery>) -> Result<Response, Failure> {
    let first = ask(&shared, |reply| Command::Events { after: query.after, reply }).await?;
    let content_type = [(header::CONTENT_TYPE, "application/x-ndjson")];
    if !query.follow {
        return Ok((content_type, lines(&first)).into_response());
    }
    let start = (shared, Some(first), query.after);
    let stream = futures_util::stream::unfold(start, |(mut shared, batch, mut after)| async move {
        let batch = match batch {
            Some(batch) => batch,
            None => {
                shared.latest.changed().await.ok()?;
                ask(&shared, |reply| Command::Events { after, reply }).await.ok()?
            }
        };
        after = batch.last().map_or(after, |event| event.id);
        Some((Ok::<_, Infallible>(lines(&batch)), (shared, None, after)))
    });
    Ok((content_type, Body::from_stream(stream)).into_response())
}

fn lines(events: &[EventLine]) -> Bytes {
    let mut text = Vec::new();
    for event in events {
        // An event consists of strings and numbers only, so this cannot fail.
        let _ = serde_json::to_writer(&mut text, event);
        text.push(b'\n');
    }
    text.into()
}
