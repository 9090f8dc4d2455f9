//! `tcpSocket` with `send` or `expect`, and `udp`: a request and an answer in any protocol.

use std::net::SocketAddr;

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::UdpSocket,
};

use super::{
    CheckCode,
    connect::{self, End},
    outcome::{Outcome, Progress, Stage, of_connection},
    tls::{Inner, Tls},
};
use breaker_core::model::{Exchange, Transport};

/// Largest part of an answer, in bytes, that is read and searched.
const ANSWER_LIMIT: usize = 64 * 1024;

pub(super) async fn probe(at: SocketAddr, exchange: &Exchange, tls: &Tls, progress: &Progress) -> Outcome {
    converse(at, exchange, tls, progress).await.unwrap_or_else(|outcome| outcome)
}

async fn converse(at: SocketAddr, exchange: &Exchange, tls: &Tls, progress: &Progress) -> Result<Outcome, Outcome> {
    match &exchange.transport {
        Transport::Udp => over_udp(at, exchange, progress).await,
        Transport::Tcp => over_stream(connect::tcp(at, End::Fin).await?.stream()?, exchange, progress).await,
        Transport::Tls { host } => {
            let stream = connect::tcp(at, End::Fin).await?.stream()?;
            progress.reached(Stage::Handshake);
            let stream = tls.connect(stream, host.as_deref(), at.ip(), Inner::Other).await?;
            over_stream(stream, exchange, progress).await
        }
    }
}

async fn over_stream(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    exchange: &Exchange,
    progress: &Progress,
) -> Result<Outcome, Outcome> {
    progress.reached(Stage::Answer);
    // A server may answer and close before it has read the request, so a failed write is no verdict yet.
    let sent = stream.write_all(&exchange.send).await.err();
    let mut answer = BytesMut::with_capacity(512);
    let passed = loop {
        if is_answered(&answer, &exchange.expect) {
            break true;
        }
        if answer.len() >= ANSWER_LIMIT {
            break false;
        }
        match stream.read_buf(&mut answer).await {
            Ok(0) => break false,
            Ok(_) => {}
            Err(error) if answer.is_empty() => return Err(of_connection(&error)),
            Err(_) => break false,
        }
    };
    if let (Some(error), true) = (sent, answer.is_empty()) {
        return Err(of_connection(&error));
    }
    if passed && !exchange.quit.is_empty() {
        let _ = stream.write_all(&exchange.quit).await;
    }
    let _ = stream.shutdown().await;
    Ok(verdict(passed, &answer, &exchange.expect))
}

async fn over_udp(at: SocketAddr, exchange: &Exchange, progress: &Progress) -> Result<Outcome, Outcome> {
    let socket = connect::udp(at)?;
    progress.reached(Stage::Answer);
    send(&socket, &exchange.send).await?;
    let mut answer = BytesMut::with_capacity(ANSWER_LIMIT);
    socket.recv_buf(&mut answer).await.map_err(|error| of_connection(&error))?;
    // An empty datagram is an answer, too.
    let passed = exchange.expect.is_empty() || is_answered(&answer, &exchange.expect);
    Ok(verdict(passed, &answer, &exchange.expect))
}

/// Sends a datagram.
///
/// # Errors
/// The outcome of the probe: an error of this node, or an ICMP error about an earlier datagram.
pub(super) async fn send(socket: &UdpSocket, datagram: &[u8]) -> Result<(), Outcome> {
    use rustix::io::Errno;
    match socket.send(datagram).await {
        Ok(_) => Ok(()),
        Err(error) => Err(match Errno::from_io_error(&error) {
            Some(Errno::CONNREFUSED) | None => of_connection(&error),
            Some(errno) => super::outcome::refused_by_this_node("send", errno),
        }),
    }
}

fn is_answered(answer: &[u8], expect: &[u8]) -> bool {
    if expect.is_empty() { !answer.is_empty() } else { contains(answer, expect) }
}

/// Returns whether `wanted` occurs in `text`.
pub(super) fn contains(text: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || text.windows(wanted.len()).any(|window| window == wanted)
}

fn verdict(passed: bool, answer: &[u8], expect: &[u8]) -> Outcome {
    if passed {
        return (CheckCode::L7Ok, "the answer is as expected".into());
    }
    let detail = if answer.is_empty() {
        "the server closed the connection without an answer".into()
    } else {
        format!("the answer {} does not contain {}", shown(answer), shown(expect))
    };
    (CheckCode::L7Rsp, detail)
}

/// The first bytes of an answer, with everything escaped that is not visible ASCII.
fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 40;
    let more = if bytes.len() > MOST { "..." } else { "" };
    format!("\"{}{more}\"", bytes[..bytes.len().min(MOST)].escape_ascii())
}
