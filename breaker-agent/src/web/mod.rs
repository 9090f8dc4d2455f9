//! The agent's servers on TCP: health for kubelet, metrics, and the live page.
//!
//! | address | paths |
//! |---|---|
//! | `agent.listen` | `/livez`, `/healthz`, `/readyz`, `/metrics`; if it is a loopback address, also the page `/` and its data `/v1/…` |
//! | `agent.metricsListen`, off by default | `/metrics` |
//!
//! Everything here only reads. An address that is in use does not end the agent: the listener tries again, and the
//! status says so.

mod health;
mod metrics;
mod page;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::Router;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use crate::{command::Command, metrics::Instruments};

/// Pause between two attempts to listen on an address that is in use.
const RETRY: Duration = Duration::from_secs(5);
/// Time limit for an answer of the main loop. A loop that takes longer counts as hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// The listeners by name, each with the reason why it does not listen.
#[derive(Clone, Debug, Default)]
pub struct Listeners {
    state: Arc<Mutex<BTreeMap<&'static str, Result<(), String>>>>,
}

impl Listeners {
    fn set(&self, name: &'static str, outcome: Result<(), String>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).insert(name, outcome);
    }

    /// Each listener, and the reason why it does not listen.
    #[must_use]
    pub fn all(&self) -> Vec<(&'static str, Result<(), String>)> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.iter().map(|(name, outcome)| (*name, outcome.clone())).collect()
    }

    /// What does not work, in words.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.all().into_iter().filter_map(|(_, outcome)| outcome.err()).collect()
    }
}

/// The agent's addresses, and the name of its node.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// For health, metrics and the page.
    pub local: Option<SocketAddr>,
    /// For metrics alone.
    pub metrics: Option<SocketAddr>,
    /// The node's name, for the page.
    pub node: String,
}

/// Listens at the addresses. Returns after the first attempt. `latest`: the id of the latest event.
pub async fn serve(
    addresses: Addresses,
    commands: &mpsc::Sender<Command>,
    latest: watch::Receiver<u64>,
    instruments: &Arc<Instruments>,
) -> Listeners {
    let listeners = Listeners::default();
    let exporter = metrics::Exporter::new(commands.clone(), instruments.clone());
    if let Some(address) = addresses.local {
        let mut app = health::routes(commands.clone()).merge(metrics::routes(exporter.clone()));
        // The page asks nobody for a password, so it stays on the node.
        if address.ip().is_loopback() {
            app = app.merge(page::start(addresses.node, commands.clone(), latest));
        } else {
            tracing::info!("agent.listen: {address} is no loopback address, so the live page is not served there");
        }
        listen("Local", "agent.listen", address, app, &listeners).await;
    }
    if let Some(address) = addresses.metrics {
        listen("Metrics", "agent.metricsListen", address, metrics::routes(exporter), &listeners).await;
    }
    listeners
}

async fn listen(name: &'static str, field: &'static str, address: SocketAddr, app: Router, listeners: &Listeners) {
    let listeners = listeners.clone();
    let mut listener = bind(name, field, address, &listeners).await;
    tokio::spawn(async move {
        loop {
            if let Some(listener) = listener.take()
                && let Err(error) = axum::serve(listener, app.clone()).await
            {
                tracing::error!("{field}: the listener on {address} ended: {error}");
            }
            sleep(RETRY).await;
            listener = bind(name, field, address, &listeners).await;
        }
    });
}

/// Tries to listen. A failure is logged once.
async fn bind(
    name: &'static str,
    field: &'static str,
    address: SocketAddr,
    listeners: &Listeners,
) -> Option<TcpListener> {
    let before = listeners.all().into_iter().find_map(|(known, outcome)| (known == name).then_some(outcome));
    match TcpListener::bind(address).await {
        Ok(listener) => {
            if before.is_some_and(|outcome| outcome.is_err()) {
                tracing::info!("{field}: listening on {address} now");
            }
            listeners.set(name, Ok(()));
            Some(listener)
        }
        Err(error) => {
            let problem = format!("{field}: cannot listen on {address}: {error}; choose another port");
            if before.is_none() {
                tracing::warn!("{problem}; trying again every {} s", RETRY.as_secs());
            }
            listeners.set(name, Err(problem));
            None
        }
    }
}

/// Sends a request to the main loop. `None`: no answer in time.
async fn ask<T>(commands: &mpsc::Sender<Command>, request: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    timeout(ANSWER_TIMEOUT, commands.send(request(reply))).await.ok()?.ok()?;
    timeout(ANSWER_TIMEOUT, answer).await.ok()?.ok()
}

/// The answer when the main loop does not answer.
const HUNG: &str = "the agent's main loop does not answer\n";
