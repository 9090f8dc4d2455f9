//! HTTP/2 for probes, where the server chooses it in the TLS handshake. The kubelet offers it, too.

use breaker_core::model::HttpGet;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    CheckCode,
    http_message::{Answer, BODY_LIMIT, default_headers},
    outcome::{Outcome, Progress, of_connection},
};

/// Headers that belong to a connection, and have no meaning in HTTP/2 (RFC 9113, section 8.2.2). Host is `:authority`.
const NOT_IN_HTTP2: [&str; 5] = ["host", "connection", "keep-alive", "proxy-connection", "upgrade"];

/// Sends the request and reads the answer.
///
/// # Errors
/// The outcome of the probe, if there is no valid answer.
pub(super) async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    get: &HttpGet,
    authority: &str,
    progress: &Progress,
) -> Result<Answer, Outcome> {
    let request =
        request(get, authority).map_err(|error| (CheckCode::LocalError, format!("make the request: {error}")))?;
    let (sender, connection) = h2::client::handshake(stream).await.map_err(|error| outcome(&error))?;
    tokio::pin!(connection);
    tokio::select! {
        biased;
        answer = exchange(sender, request, progress) => answer,
        ended = &mut connection => Err(match ended {
            Ok(()) => (CheckCode::L7Rsp, "the server closed the connection without an answer".into()),
            Err(error) => outcome(&error),
        }),
    }
}

async fn exchange(sender: SendRequest<Bytes>, request: Request<()>, progress: &Progress) -> Result<Answer, Outcome> {
    let failed = |error: h2::Error| outcome(&error);
    let mut sender = sender.ready().await.map_err(failed)?;
    let (response, _) = sender.send_request(request, true).map_err(failed)?;
    let response = response.await.map_err(failed)?;
    let status = response.status().as_u16();
    progress.answered(status);
    let mut body = Vec::new();
    let mut stream = response.into_body();
    // The status has come, so an error ends the body only.
    while let Some(Ok(chunk)) = stream.data().await {
        body.extend_from_slice(&chunk);
        if body.len() >= BODY_LIMIT {
            break;
        }
        let _ = stream.flow_control().release_capacity(chunk.len());
    }
    body.truncate(BODY_LIMIT);
    Ok(Answer { status, body })
}

fn request(get: &HttpGet, authority: &str) -> Result<Request<()>, http::Error> {
    let uri = Uri::builder().scheme("https").authority(authority).path_and_query(get.path.as_str()).build()?;
    let mut request = Request::builder().method(Method::GET).uri(uri);
    for (name, value) in default_headers(get) {
        request = request.header(name, value);
    }
    for (name, value) in &get.headers {
        if !NOT_IN_HTTP2.iter().any(|other| name.eq_ignore_ascii_case(other)) {
            request = request.header(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
        }
    }
    request.body(())
}

fn outcome(error: &h2::Error) -> Outcome {
    match error.get_io() {
        Some(io) => of_connection(io),
        None => (CheckCode::L7Rsp, error.to_string()),
    }
}
