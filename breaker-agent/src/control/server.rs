//! The server side of the control socket.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use axum::{
    Json, Router,
    body::Body,
    extract::{Query, State},
    http::{StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use breaker_api::{
    commands::{ErrorBody, HandoverBody, TripBody},
    events::EventLine,
};
use breaker_core::engine::CommandError;
use bytes::Bytes;
use percent_encoding::percent_decode_str;
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

/// Serves the control socket. A socket file that no process listens on is replaced; a file of another kind is not.
///
/// # Errors
/// Another process listens on the socket, something else is there, or the path cannot be bound.
pub fn serve(path: &Path, commands: mpsc::Sender<Command>, latest: watch::Receiver<u64>) -> Result<Socket> {
    if UnixStream::connect(path).is_ok() {
        bail!("another process already listens on the control socket {}", path.display());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("create the directory {}", dir.display()))?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => {
            fs::remove_file(path).with_context(|| format!("remove the old socket {}", path.display()))?;
        }
        Ok(_) => bail!("agent.socket: {} is no socket; allowed: a path where nothing is, or a socket", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("look at the control socket {}", path.display())),
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

/// The common prefix of all paths of services.
const SERVICES: &str = "/v1/services/";

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

/// The name in the path of a request, decoded, and the verb behind it, if it is one of `verbs`. A name may contain a
/// slash (namespace/name). The client encodes it, so that a name that ends like a verb is not taken for one.
fn name_and_verb(uri: &Uri, verbs: &[&'static str]) -> (String, Option<&'static str>) {
    let path = uri.path();
    let rest = path.strip_prefix(SERVICES).unwrap_or(path);
    let verb = verbs.iter().find_map(|verb| Some((rest.strip_suffix(verb)?.strip_suffix('/')?, *verb)));
    let (name, verb) = verb.map_or((rest, None), |(name, verb)| (name, Some(verb)));
    (percent_decode_str(name).decode_utf8_lossy().into_owned(), verb)
}

/// Answers GET /v1/services/NAME and /v1/services/NAME/flows.
async fn service_get(
    State(shared): State<Shared>,
    uri: Uri,
    Query(query): Query<FlowsQuery>,
) -> Result<Response, Failure> {
    let (name, verb) = name_and_verb(&uri, &["flows"]);
    if verb.is_some() {
        let limit = query.limit.unwrap_or(100);
        return json(ask(&shared, |reply| Command::Flows { name, limit, reply }).await?);
    }
    json(ask(&shared, |reply| Command::Get(name, reply)).await?)
}

async fn service_post(State(shared): State<Shared>, uri: Uri, body: Bytes) -> Result<Response, Failure> {
    let (name, verb) = name_and_verb(&uri, &["trip", "reset"]);
    if verb == Some("trip") {
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
        let duration = body.seconds.map(Duration::from_secs);
        return json(ask(&shared, |reply| Command::Trip { name, duration, reason: body.reason, reply }).await?);
    }
    if verb == Some("reset") {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// HARDENING F4.
    #[test]
    fn a_name_that_ends_like_a_verb_is_a_name() {
        let rows = [
            ("/v1/services/dummy", "dummy", None),
            ("/v1/services/prod/shop:80", "prod/shop:80", None),
            ("/v1/services/prod/shop/flows", "prod/shop", Some("flows")),
            ("/v1/services/prod%2Fflows", "prod/flows", None),
            ("/v1/services/prod%2fflows/flows", "prod/flows", Some("flows")),
            ("/v1/services/flows", "flows", None),
        ];
        for (path, name, verb) in rows {
            let uri: Uri = path.parse().unwrap();
            assert_eq!(name_and_verb(&uri, &["flows"]), (name.to_owned(), verb), "{path}");
        }
    }

    /// HARDENING F3.
    #[tokio::test]
    async fn only_a_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, socket) = (dir.path().join("file"), dir.path().join("link"), dir.path().join("socket"));
        fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let serve = |path: &Path| super::serve(path, mpsc::channel(1).0, watch::channel(0).1);
        for path in [&file, &link] {
            let error = serve(path).unwrap_err().to_string();
            assert!(error.contains("is no socket; allowed: "), "{error}");
        }
        assert_eq!(fs::read_to_string(&link).unwrap(), "precious");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert!(serve(&socket).is_ok(), "a socket without a process is replaced");
    }
}
