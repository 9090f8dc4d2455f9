//! Probes of real sockets on the loopback interface: small servers, each odd in one way, and the verdict about each.

mod http_servers;
mod other_servers;
mod stalls;
mod tls_servers;

use std::{net::SocketAddr, time::Duration};

use breaker_core::model::{Check, CheckAction, HttpGet};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::sleep,
};

use super::*;

/// Long enough for a busy machine, short enough for servers that never answer.
const LIMIT: Duration = Duration::from_millis(400);

fn check(action: CheckAction) -> Check {
    Check {
        action,
        period: LIMIT,
        fast_period: LIMIT,
        timeout: LIMIT,
        failure_threshold: 1,
        success_threshold: 1,
        jitter_percent: 0,
    }
}

fn get() -> HttpGet {
    HttpGet {
        path: "/ready".into(),
        https: false,
        host: Some("dummy.example".into()),
        headers: vec![("X-Probe".into(), "1".into())],
        expected_statuses: vec![200..=399],
        body_contains: None,
    }
}

fn http(get: HttpGet) -> Check {
    check(CheckAction::HttpGet { port: None, get })
}

async fn probe(check: &Check, at: SocketAddr) -> (CheckCode, String) {
    let result = Prober::start().probe(check, at).await;
    (result.code, result.detail)
}

/// One step of a server's script.
#[derive(Clone, Debug)]
enum Step {
    /// Reads until the empty line after a request's head.
    ReadHead,
    /// Waits.
    Wait(u64),
    /// Sends bytes.
    Send(Vec<u8>),
    /// Keeps the connection open and silent.
    Hang,
}

use Step::{Hang, ReadHead, Wait};

fn send(text: impl AsRef<[u8]>) -> Step {
    Step::Send(text.as_ref().to_vec())
}

/// A server that plays a script on each connection, and then closes it. The handle returns what the first client sent.
async fn server(script: Vec<Step>) -> (SocketAddr, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let task = tokio::spawn(async move { play(listener.accept().await.unwrap().0, script).await });
    (at, task)
}

async fn play(mut stream: TcpStream, script: Vec<Step>) -> Vec<u8> {
    let mut head = Vec::new();
    for step in script {
        match step {
            ReadHead => while !head.ends_with(b"\r\n\r\n") && matches!(stream.read_buf(&mut head).await, Ok(1..)) {},
            Wait(millis) => sleep(Duration::from_millis(millis)).await,
            Step::Send(bytes) => drop(stream.write_all(&bytes).await),
            Hang => sleep(Duration::from_secs(60)).await,
        }
    }
    head
}

/// An address of a port where nobody listens.
async fn closed_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}
