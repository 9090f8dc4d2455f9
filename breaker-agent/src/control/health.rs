//! The health endpoints for kubelet: whether the agent is alive and whether it is ready. There are two paths
//! without secret content, meant for the loopback address.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result};
use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::command::Command;

/// Time limit for an answer of the main loop. A loop that takes longer counts as hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves `/livez` (the main loop answers) and `/readyz` (the agent has a configuration, and the programs are
/// attached).
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(address: SocketAddr, commands: mpsc::Sender<Command>) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("agent.listen: cannot listen on {address}; choose another port"))?;
    let app = Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).with_state(commands);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!("the health endpoints on {address} ended: {error}");
        }
    });
    Ok(())
}

async fn ask(commands: &mpsc::Sender<Command>) -> Option<Result<(), String>> {
    let (reply, answer) = oneshot::channel();
    timeout(ANSWER_TIMEOUT, commands.send(Command::Ready(reply))).await.ok()?.ok()?;
    timeout(ANSWER_TIMEOUT, answer).await.ok()?.ok()
}

async fn livez(State(commands): State<mpsc::Sender<Command>>) -> (StatusCode, String) {
    match ask(&commands).await {
        Some(_) => (StatusCode::OK, "alive\n".into()),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the agent's main loop does not answer\n".into()),
    }
}

async fn readyz(State(commands): State<mpsc::Sender<Command>>) -> (StatusCode, String) {
    match ask(&commands).await {
        Some(Ok(())) => (StatusCode::OK, "ready\n".into()),
        Some(Err(why)) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the agent's main loop does not answer\n".into()),
    }
}
