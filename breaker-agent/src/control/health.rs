//! What kubelet asks: is the agent alive, is it ready. Two paths, no secrets, on the loopback address.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::Request;

/// The loop answers within this, or it hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// Serves `/livez` (the loop answers) and `/readyz` (it has a configuration, and the programs are attached).
///
/// # Errors
/// An address that cannot be bound.
pub async fn serve(address: SocketAddr, requests: mpsc::Sender<Request>) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("agent.listen: {address} cannot be listened on; choose another port"))?;
    let app = Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).with_state(requests);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!("{address} is not served any more: {error}");
        }
    });
    Ok(())
}

async fn ask(requests: &mpsc::Sender<Request>) -> Option<Result<(), String>> {
    let (reply, answer) = oneshot::channel();
    timeout(PATIENCE, requests.send(Request::Ready(reply))).await.ok()?.ok()?;
    timeout(PATIENCE, answer).await.ok()?.ok()
}

async fn livez(State(requests): State<mpsc::Sender<Request>>) -> (StatusCode, String) {
    match ask(&requests).await {
        Some(_) => (StatusCode::OK, "alive\n".into()),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the agent's loop does not answer\n".into()),
    }
}

async fn readyz(State(requests): State<mpsc::Sender<Request>>) -> (StatusCode, String) {
    match ask(&requests).await {
        Some(Ok(())) => (StatusCode::OK, "ready\n".into()),
        Some(Err(why)) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the agent's loop does not answer\n".into()),
    }
}
