//! `tcpSocket` probes without an exchange: an established connection passes.

use std::net::SocketAddr;

use super::{
    CheckCode,
    connect::{self, End},
    outcome::Outcome,
};

/// `accept`: whether the server's process is to see the connection. Otherwise the probe sees only whether the kernel of
/// the server's host knows a listening socket with that port.
pub(super) async fn probe(at: SocketAddr, accept: bool) -> Outcome {
    let end = if accept { End::Fin } else { End::BeforeAccept };
    match connect::tcp(at, end).await {
        Ok(_) => (CheckCode::L4Ok, "connected".into()),
        Err(outcome) => outcome,
    }
}
