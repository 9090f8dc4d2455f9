//! The lab's service: answers, or plays dead when told to.
//!
//! | request | well | fake-error mode |
//! |---|---|---|
//! | `GET /alive` | 200 `OK` | the same |
//! | `GET /ready` | 200 `OK FROM <local address>` | 503 `BUSY FROM <local address>` |
//! | `GET /` | 200 `SOMERESPONSE FROM <local address>` | after 30 s 503 `ERROR FROM <local address>` |
//! | `GET /client` | 200 `CLIENT <its address as we see it> FROM <local address>` | the same |
//! | `POST /fakeerrormodeon`, `POST /fakeerrormodeoff` | 200 | 200 |
//! | any datagram on the same port | `SOMERESPONSE FROM <local address>` | silence |

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
use tokio::net::{TcpListener, UdpSocket};

use client::Target;

/// The lab's service, and clients for it.
#[derive(Parser)]
struct Cli {
    /// Where to listen, for connections and datagrams; both IP families on `[::]`.
    #[arg(long, default_value = "[::]:80")]
    listen: SocketAddr,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// One request: prints the body; fails unless the status is 200.
    Ask {
        /// http://ADDRESS:PORT/PATH, or udp://ADDRESS:PORT for a datagram
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
        /// http://ADDRESS:PORT/PATH, each on a connection of its own; udp://ADDRESS:PORT, all from one socket
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

/// The address that a client reached us at, and the client's own as we see it.
#[derive(Clone, Copy)]
struct Local(SocketAddr, SocketAddr);

impl Connected<IncomingStream<'_, TcpListener>> for Local {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let local = stream.io().local_addr().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into());
        Self(canonical(local), canonical(*stream.remote_addr()))
    }
}

/// IPv4 as such, on a socket of both families.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
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
    let (listener, socket) = match bind(listen).await {
        // A host without IPv6.
        Err(_) if listen.ip() == std::net::Ipv6Addr::UNSPECIFIED => bind(([0, 0, 0, 0], listen.port()).into()).await,
        bound => bound,
    }
    .with_context(|| format!("listen on {listen}"))?;
    let mode = Mode::default();
    tokio::spawn(datagrams(socket, mode.clone()));
    let app = Router::new()
        .route("/alive", get(|| async { "OK" }))
        .route("/ready", get(ready))
        .route("/", get(root))
        .route("/client", get(whose))
        .route("/fakeerrormodeon", post(|State(mode): State<Mode>| async move { mode.store(true, Ordering::SeqCst) }))
        .route("/fakeerrormodeoff", post(|State(mode): State<Mode>| async move { mode.store(false, Ordering::SeqCst) }))
        .with_state(mode);
    axum::serve(listener, app.into_make_service_with_connect_info::<Local>()).await.context("serve")
}

async fn bind(listen: SocketAddr) -> std::io::Result<(TcpListener, UdpSocket)> {
    Ok((TcpListener::bind(listen).await?, UdpSocket::bind(listen).await?))
}

/// Answers datagrams.
async fn datagrams(socket: UdpSocket, mode: Mode) {
    let mut buffer = [0; 1500];
    while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
        if mode.load(Ordering::SeqCst) {
            continue;
        }
        // Which of our addresses it came to, a datagram does not say; it is the one that an answer leaves from.
        let port = socket.local_addr().map_or(0, |at| at.port());
        let own = std::net::UdpSocket::bind(if from.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })
            .and_then(|socket| socket.connect(from).and_then(|()| socket.local_addr()));
        let at = own.map_or(from, |own| SocketAddr::new(own.ip().to_canonical(), port));
        let _ = socket.send_to(format!("SOMERESPONSE FROM {at}").as_bytes(), from).await;
    }
}

async fn ready(State(mode): State<Mode>, ConnectInfo(Local(at, _)): ConnectInfo<Local>) -> (StatusCode, String) {
    if mode.load(Ordering::SeqCst) {
        (StatusCode::SERVICE_UNAVAILABLE, format!("BUSY FROM {at}"))
    } else {
        (StatusCode::OK, format!("OK FROM {at}"))
    }
}

async fn whose(ConnectInfo(Local(at, client)): ConnectInfo<Local>) -> String {
    format!("CLIENT {} FROM {at}", client.ip())
}

async fn root(State(mode): State<Mode>, ConnectInfo(Local(at, _)): ConnectInfo<Local>) -> (StatusCode, String) {
    if mode.load(Ordering::SeqCst) {
        tokio::time::sleep(HANG).await;
        (StatusCode::SERVICE_UNAVAILABLE, format!("ERROR FROM {at}"))
    } else {
        (StatusCode::OK, format!("SOMERESPONSE FROM {at}"))
    }
}
