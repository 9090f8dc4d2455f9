//! The lab's service: answers, or plays dead when told to.
//!
//! | request | well | fake-error mode |
//! |---|---|---|
//! | `GET /alive` | 200 `OK` | the same |
//! | `GET /ready` | 200 `OK FROM <local address>` | 503 `BUSY FROM <local address>` |
//! | `GET /` | 200 `SOMERESPONSE FROM <local address>` | after 30 s 503 `ERROR FROM <local address>` |
//! | `POST /fakeerrormodeon`, `POST /fakeerrormodeoff` | 200 | 200 |

mod client;

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
use clap::{Parser, Subcommand};
use tokio::net::TcpListener;

use client::Target;

/// The lab's service, and clients for it.
#[derive(Parser)]
struct Cli {
    /// Where to listen.
    #[arg(long, default_value = "0.0.0.0:80")]
    listen: SocketAddr,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// One request: prints the body; fails unless the status is 200.
    Ask {
        /// http://ADDRESS:PORT/PATH
        url: String,
        /// GET or POST.
        #[arg(long, default_value = "GET")]
        method: String,
        /// Milliseconds that it may take.
        #[arg(long, default_value_t = 2000)]
        timeout_millis: u64,
    },
    /// Requests until told to end, a line for each.
    Load {
        /// http://ADDRESS:PORT/PATH
        url: String,
        /// Milliseconds from one to the next.
        #[arg(long, default_value_t = 20)]
        every_millis: u64,
        /// Milliseconds that each may take.
        #[arg(long, default_value_t = 2000)]
        timeout_millis: u64,
    },
    /// POST to each of these once a while has passed, then do nothing until told to end.
    Later {
        /// http://ADDRESS:PORT/PATH
        urls: Vec<String>,
        /// How long to wait first.
        #[arg(long)]
        after_millis: u64,
    },
    /// Do nothing until told to end: a place to run the others in.
    Wait,
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

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        None => serve(cli.listen),
        Some(Command::Ask { url, method, timeout_millis }) => {
            let (status, body) = client::ask(&Target::parse(&url)?, &method, Duration::from_millis(timeout_millis))?;
            println!("{body}");
            anyhow::ensure!(status == 200, "status {status}");
            Ok(())
        }
        Some(Command::Load { url, every_millis, timeout_millis }) => {
            end_on_sigterm()?;
            let (every, timeout) = (Duration::from_millis(every_millis), Duration::from_millis(timeout_millis));
            client::keep_asking(&Target::parse(&url)?, every, timeout)
        }
        Some(Command::Later { urls, after_millis }) => {
            end_on_sigterm()?;
            std::thread::sleep(Duration::from_millis(after_millis));
            for url in urls {
                let outcome = client::ask(&Target::parse(&url)?, "POST", Duration::from_secs(5));
                println!("{url}: {outcome:?}");
            }
            rest()
        }
        Some(Command::Wait) => {
            end_on_sigterm()?;
            rest()
        }
    }
}

fn rest() -> Result<()> {
    loop {
        std::thread::park();
    }
}

/// The first process of a container ignores signals that it does not ask for.
fn end_on_sigterm() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            if let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
                terminate.recv().await;
            }
        });
        std::process::exit(0);
    });
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn serve(listen: SocketAddr) -> Result<()> {
    end_on_sigterm()?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
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
