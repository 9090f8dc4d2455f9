//! `GET /v1/stream`: the messages of a hub as server-sent events (WHATWG HTML, section 9.2).

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
    routing::get,
};

use crate::hub::{Hub, MOST_READERS};

/// A comment goes out after this time without a message, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The route of the stream.
pub fn routes(hub: Arc<Hub>) -> Router {
    Router::new().route("/v1/stream", get(stream)).with_state(hub)
}

async fn stream(State(hub): State<Arc<Hub>>, headers: HeaderMap) -> Response {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
    let Some(reader) = hub.read(last) else {
        let why = format!("{MOST_READERS} pages are open, which is the limit; close one\n");
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    };
    let messages = futures_util::stream::unfold(reader, |mut reader| async move {
        let message = reader.next().await?;
        let event = Event::default().id(&message.id).data(&message.json);
        Some((Ok::<_, Infallible>(event), reader))
    });
    Sse::new(messages).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}
