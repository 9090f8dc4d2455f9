//! `tcpSocket` probes: an established connection passes.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{net::TcpStream, time::timeout};

use super::{CheckCode, Outcome};

pub(super) async fn probe(at: SocketAddr, limit: Duration) -> Outcome {
    match timeout(limit, TcpStream::connect(at)).await {
        Ok(Ok(_stream)) => (CheckCode::L4Ok, "connected".into()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => (CheckCode::L4Tout, error.to_string()),
        Ok(Err(error)) => (CheckCode::L4Con, error.to_string()),
        Err(_) => (CheckCode::L4Tout, format!("not connected within {limit:?}")),
    }
}
