//! The lab's service: answers requests, and simulates a failure on request.
//!
//! | request | normal mode | fake-error mode |
//! |---|---|---|
//! | `GET /alive` | 200 `OK` | 200 `OK` |
//! | `GET /ready` | 200 `OK FROM <local address>` | 503 `BUSY FROM <local address>` |
//! | `GET /` | 200 `SOMERESPONSE FROM <local address>` | after 30 s 503 `ERROR FROM <local address>` |
//! | `GET /client` | 200 `CLIENT <client's address as the server sees it> FROM <local address>` | the same |
//! | `POST /fakeerrormodeon`, `POST /fakeerrormodeoff` | 200 | 200 |
//! | any datagram on the same port | `SOMERESPONSE FROM <local address>` | no answer |

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
    /// Address and port to listen on, TCP and UDP; `[::]` accepts both IP families
    #[arg(long, default_value = "[::]:80")]
    listen: SocketAddr,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Send one request and print the body; fail unless the status is 200
    Ask {
        /// http://ADDRESS:PORT/PATH, or udp://ADDRESS:PORT to send a datagram
        url: String,
        /// GET or POST
        #[arg(long, default_value = "GET")]
        method: String,
        /// Time limit of the request, in milliseconds
        #[arg(long, default_value_t = 2000)]
        timeout_millis: u64,
    },
    /// Send requests until stopped, and print a line for each
    Load {
        /// http://ADDRESS:PORT/PATH, each request on a new connection; udp://ADDRESS:PORT, all from one socket
        url: String,
        /// Interval between requests, in milliseconds
        #[arg(long, default_value_t = 20)]
        every_millis: u64,
        /// Time limit of a request, in milliseconds
        #[arg(long, default_value_t = 2000)]
        timeout_millis: u64,
    },
    /// Wait, POST to each URL once, then idle until stopped
    Later {
        /// http://ADDRESS:PORT/PATH
        urls: Vec<String>,
        /// Time to wait before the requests, in milliseconds
        #[arg(long)]
        after_millis: u64,
    },
    /// Idle until stopped: keeps a container up in which to run the other commands
    Wait,
}

/// How long `GET /` hangs in fake-error mode. Other requests are not delayed.
const HANG: Duration = Duration::from_secs(30);

/// Both ends of a connection: the local address that the client connected to, and the client's address.
#[derive(Clone, Copy)]
struct Local(SocketAddr, SocketAddr);

impl Connected<IncomingStream<'_, TcpListener>> for Local {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let local = stream.io().local_addr().unwrap_or_else(|_| ([0, 0, 0, 0], 0).into());
        Self(canonical(local), canonical(*stream.remote_addr()))
    }
}

/// Converts an IPv4-mapped IPv6 address (from a socket for both families) to IPv4.
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
            idle()
        }
        Some(Command::Wait) => {
            end_on_sigterm()?;
            idle()
        }
    }
}

fn idle() -> Result<()> {
    loop {
        std::thread::park();
    }
}

/// Exits on SIGTERM. The first process of a container ignores signals for which it has no handler (pid_namespaces(7)).
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
        // The host has no IPv6.
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
        .route("/client", get(client))
        .route("/fakeerrormodeon", post(|State(mode): State<Mode>| async move { mode.store(true, Ordering::SeqCst) }))
        .route("/fakeerrormodeoff", post(|State(mode): State<Mode>| async move { mode.store(false, Ordering::SeqCst) }))
        .with_state(mode);
    axum::serve(listener, app.into_make_service_with_connect_info::<Local>()).await.context("serve HTTP")
}

async fn bind(listen: SocketAddr) -> std::io::Result<(TcpListener, UdpSocket)> {
    Ok((TcpListener::bind(listen).await?, UdpSocket::bind(listen).await?))
}

/// Answers datagrams, except in fake-error mode.
async fn datagrams(socket: UdpSocket, mode: Mode) {
    let mut buffer = [0; 1500];
    while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
        if mode.load(Ordering::SeqCst) {
            continue;
        }
        // The received datagram does not show its destination address. The answer names the address that it leaves
        // from.
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

async fn client(ConnectInfo(Local(at, client)): ConnectInfo<Local>) -> String {
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
