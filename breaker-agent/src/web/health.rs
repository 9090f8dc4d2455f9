//! Health for kubelet and for people: whether the agent is alive, and whether it is ready.

use axum::{
    Router,
    extract::{Query, State},
    http::StatusCode,
    routing::get,
};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{HUNG, ask};
use crate::command::{Command, ReadyCheck};

/// `/livez` and its alias `/healthz`: the main loop answers. `/readyz`: the agent has a configuration, and the programs
/// are attached; with `?verbose`, one line for each check, in the form of kube-apiserver.
pub(super) fn routes(commands: mpsc::Sender<Command>) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/healthz", get(livez))
        .route("/readyz", get(readyz))
        .with_state(commands)
}

#[derive(Deserialize)]
struct ReadyQuery {
    verbose: Option<String>,
}

async fn livez(State(commands): State<mpsc::Sender<Command>>) -> (StatusCode, String) {
    match ask(&commands, Command::Ready).await {
        Some(_) => (StatusCode::OK, "alive\n".into()),
        None => (StatusCode::SERVICE_UNAVAILABLE, HUNG.into()),
    }
}

async fn readyz(
    State(commands): State<mpsc::Sender<Command>>,
    Query(query): Query<ReadyQuery>,
) -> (StatusCode, String) {
    let Some(checks) = ask(&commands, Command::Ready).await else {
        return (StatusCode::SERVICE_UNAVAILABLE, HUNG.into());
    };
    let failed = checks.iter().find(|check| check.counts && check.outcome.is_err());
    let status = if failed.is_some() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let text = match failed {
        _ if query.verbose.is_some() => verbose(&checks, failed.is_none()),
        Some(ReadyCheck { outcome: Err(why), .. }) => format!("not ready: {why}\n"),
        _ => "ready\n".to_owned(),
    };
    (status, text)
}

fn verbose(checks: &[ReadyCheck], ready: bool) -> String {
    let mut text = String::new();
    for ReadyCheck { name, outcome, counts } in checks {
        text.push_str(&match outcome {
            Ok(()) => format!("[+]{name} ok\n"),
            Err(why) if *counts => format!("[-]{name} failed: {why}\n"),
            Err(why) => format!("[!]{name} degraded, does not count: {why}\n"),
        });
    }
    text.push_str(if ready { "readyz check passed\n" } else { "readyz check failed\n" });
    text
}
