//! The lab's service: answers, or plays dead when told to.
//!
//! | request | well | fake-error mode |
//! |---|---|---|
//! | `GET /alive` | 200 `OK` | the same |
//! | `GET /ready` | 200 `OK FROM <local address>` | 503 `BUSY FROM <local address>` |
//! | `GET /` | 200 `SOMERESPONSE FROM <local address>` | after 30 s 503 `ERROR FROM <local address>` |
//! | `POST /fakeerrormodeon`, `POST /fakeerrormodeoff` | 200 | 200 |

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::{ConnectInfo, State, connect_info::Connected},
    http::StatusCode,
    routing::{get, post},
    serve::IncomingStream,
};
use clap::Parser;
use tokio::net::TcpListener;

/// The lab's service.
#[derive(Parser)]
struct Cli {
    /// Where to listen.
    #[arg(long, default_value = "0.0.0.0:80")]
    listen: SocketAddr,
}

/// How long a request hangs in fake-error mode; others are not held up.
const HANG: Duration = Duration::from_secs(30);

/// The address that a client reached us at.
#[derive(Clone, Copy)]
struct Local(SocketAddr);

impl Connected<IncomingStream<'_, TcpListener>> for Local {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.io().local_addr().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into()))
    }
}

type Mode = Arc<AtomicBool>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let listener = TcpListener::bind(cli.listen).await.with_context(|| format!("listen on {}", cli.listen))?;
    let app = Router::new()
        .route("/alive", get(|| async { "OK" }))
        .route("/ready", get(ready))
        .route("/", get(root))
        .route("/fakeerrormodeon", post(|State(mode): State<Mode>| async move { mode.store(true, Ordering::SeqCst) }))
        .route("/fakeerrormodeoff", post(|State(mode): State<Mode>| async move { mode.store(false, Ordering::SeqCst) }))
        .with_state(Mode::default());
    axum::serve(listener, app.into_make_service_with_connect_info::<Local>()).await.context("serve")
}

async fn ready(State(mode): State<Mode>, ConnectInfo(Local(at)): ConnectInfo<Local>) -> (StatusCode, String) {
    if mode.load(Ordering::SeqCst) {
        (StatusCode::SERVICE_UNAVAILABLE, format!("BUSY FROM {at}"))
    } else {
        (StatusCode::OK, format!("OK FROM {at}"))
    }
}

async fn root(State(mode): State<Mode>, ConnectInfo(Local(at)): ConnectInfo<Local>) -> (StatusCode, String) {
    if mode.load(Ordering::SeqCst) {
        tokio::time::sleep(HANG).await;
        (StatusCode::SERVICE_UNAVAILABLE, format!("ERROR FROM {at}"))
    } else {
        (StatusCode::OK, format!("SOMERESPONSE FROM {at}"))
    }
}
