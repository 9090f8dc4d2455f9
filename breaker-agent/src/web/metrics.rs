//! `/metrics`. The main loop hands over the numbers in parts, so that no scrape keeps it busy for long. One scrape is
//! made at a time, and its text serves others that come within a moment.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use tokio::sync::{Mutex, mpsc};

use super::{HUNG, ask};
use crate::{
    clock,
    command::Command,
    metrics::{CONTENT_TYPE, Instruments, Level, Snapshot, text},
};

/// How long the text of a scrape serves others.
const FRESH: Duration = Duration::from_millis(500);
/// Services that the main loop describes at once.
const PART: usize = 200;

/// Makes the text of scrapes.
#[derive(Clone)]
pub(super) struct Exporter {
    commands: mpsc::Sender<Command>,
    instruments: Arc<Instruments>,
    last: Arc<Mutex<Option<Scrape>>>,
}

/// The text of a scrape.
struct Scrape {
    at: std::time::Instant,
    level: Option<Level>,
    text: String,
}

impl Exporter {
    pub fn new(commands: mpsc::Sender<Command>, instruments: Arc<Instruments>) -> Self {
        Self { commands, instruments, last: Arc::default() }
    }

    async fn scrape(&self, level: Option<Level>) -> Result<String, String> {
        let mut last = self.last.lock().await;
        let is_fresh = |scrape: &&Scrape| scrape.level == level && clock::since(scrape.at) < FRESH;
        if let Some(scrape) = last.as_ref().filter(is_fresh) {
            return Ok(scrape.text.clone());
        }
        let snapshot = self.snapshot(level).await.ok_or_else(|| HUNG.to_owned())?;
        let instruments = self.instruments.clone();
        let made = tokio::task::spawn_blocking(move || text(&snapshot, &instruments)).await;
        let text = made.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        *last = Some(Scrape { at: clock::stopwatch(), level, text: text.clone() });
        Ok(text)
    }

    /// Asks the main loop for the numbers, one part after the other.
    async fn snapshot(&self, level: Option<Level>) -> Option<Snapshot> {
        let mut snapshot = ask(&self.commands, |reply| Command::Metrics { level, reply }).await?;
        let (level, each_backend) = (snapshot.level, snapshot.settings.per_backend);
        loop {
            let after = snapshot.services.last().map(|service| service.name.clone());
            let query = breaker_core::engine::measures::Query { scope: level.scope(), each_backend, after, most: PART };
            let part = ask(&self.commands, |reply| Command::Measures { query, reply }).await?;
            let is_last = part.len() < PART;
            snapshot.services.extend(part);
            if is_last {
                return Some(snapshot);
            }
        }
    }
}

/// `/metrics`; with `?level=node` or `?level=summary`, at another level than that of the configuration.
pub(super) fn routes(exporter: Exporter) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(exporter)
}

#[derive(Deserialize)]
struct MetricsQuery {
    level: Option<String>,
}

async fn metrics(State(exporter): State<Exporter>, Query(query): Query<MetricsQuery>) -> Response {
    let level = match &query.level {
        None => None,
        Some(word) => match Level::NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)) {
            Some((_, level)) => Some(*level),
            None => {
                let why = format!("level: {word:?} is not allowed; allowed: node, summary\n");
                return (StatusCode::BAD_REQUEST, why).into_response();
            }
        },
    };
    match exporter.scrape(level).await {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why).into_response(),
    }
}
