//! Health checks. One execution of a check is a probe. Only this module opens probe sockets.
//!
//! A probe goes from the node directly to the address of a backend. The programs do not redirect it, because they
//! redirect only connections to addresses of frontends.

mod grpc;
mod http;
mod schedule;
mod tcp;

use std::net::SocketAddr;

use breaker_core::{
    model::{Check, CheckAction},
    probe::{CheckCode, ProbeResult},
};

use crate::clock;

pub use schedule::Checkers;

/// The code of a probe's outcome and a description of it.
type Outcome = (CheckCode, String);

/// Executes probes. All probes share its HTTP clients.
#[derive(Clone, Debug, Default)]
pub struct Prober {
    clients: http::Clients,
}

impl Prober {
    /// Probes a backend once. A probe takes little longer than the check's timeout (for gRPC, twice that).
    pub async fn probe(&self, check: &Check, backend: SocketAddr) -> ProbeResult {
        let started = clock::stopwatch();
        let at = |port: Option<u16>| SocketAddr::new(backend.ip(), port.unwrap_or(backend.port()));
        let (code, detail) = match &check.action {
            CheckAction::TcpSocket { port } => tcp::probe(at(*port), check.timeout).await,
            CheckAction::Grpc { port, service } => grpc::probe(at(*port), service, check.timeout).await,
            CheckAction::HttpGet { port, .. } => {
                http::probe(&self.clients, &check.action, at(*port), check.timeout).await
            }
        };
        ProbeResult { code, detail, duration: clock::since(started) }
    }
}

#[cfg(test)]
mod tests;
