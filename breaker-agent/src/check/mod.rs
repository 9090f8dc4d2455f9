//! Active checks: one execution is a probe, and only this module opens probe sockets.
//!
//! A probe addresses a backend directly and leaves from the node itself, so it never meets our own translation, which
//! sits on the pods' interfaces and knows frontends only.

mod grpc;
mod http;
mod schedule;
mod tcp;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use breaker_common::StateReason;
use serde::Serialize;

use crate::model::{Check, CheckAction};

pub use schedule::{Checkers, Report, Target};

/// Outcome of a probe in HAProxy's vocabulary (its management guide, section 9.3, `check_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum CheckCode {
    /// Connected, and that is all that was wanted.
    #[serde(rename = "L4OK")]
    L4Ok,
    /// Refused, unreachable, broken.
    #[serde(rename = "L4CON")]
    L4Con,
    /// Not connected in time.
    #[serde(rename = "L4TOUT")]
    L4Tout,
    /// The TLS handshake failed.
    #[serde(rename = "L6RSP")]
    L6Rsp,
    /// A good answer.
    #[serde(rename = "L7OK")]
    L7Ok,
    /// An answer with another status than expected.
    #[serde(rename = "L7STS")]
    L7Sts,
    /// Connected, but no answer in time.
    #[serde(rename = "L7TOUT")]
    L7Tout,
    /// An answer that is none, or one that does not match.
    #[serde(rename = "L7RSP")]
    L7Rsp,
}

impl CheckCode {
    /// As HAProxy prints it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::L4Ok => "L4OK",
            Self::L4Con => "L4CON",
            Self::L4Tout => "L4TOUT",
            Self::L6Rsp => "L6RSP",
            Self::L7Ok => "L7OK",
            Self::L7Sts => "L7STS",
            Self::L7Tout => "L7TOUT",
            Self::L7Rsp => "L7RSP",
        }
    }

    /// Whether the probe passed.
    #[must_use]
    pub const fn passes(self) -> bool {
        matches!(self, Self::L4Ok | Self::L7Ok)
    }

    /// What a failure is to the breaker.
    #[must_use]
    pub const fn reason(self) -> StateReason {
        match self {
            Self::L4Ok | Self::L7Ok => StateReason::Recovered,
            Self::L4Con => StateReason::ConnectFailed,
            Self::L4Tout => StateReason::ConnectTimeout,
            Self::L6Rsp => StateReason::TlsFailed,
            Self::L7Sts => StateReason::HttpStatus,
            Self::L7Tout => StateReason::ResponseTimeout,
            Self::L7Rsp => StateReason::BadResponse,
        }
    }
}

/// Outcome of one probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProbeResult {
    /// What came of it.
    pub code: CheckCode,
    /// In words: the status, the error.
    pub detail: String,
    /// How long it took.
    #[serde(serialize_with = "as_millis")]
    pub duration: Duration,
}

fn as_millis<S: serde::Serializer>(duration: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_f64((duration.as_secs_f64() * 100_000.0).round() / 100.0)
}

/// What the parts of a probe return: a code and words for it.
type Outcome = (CheckCode, String);

/// Executes checks; holds what probes share.
#[derive(Clone, Debug, Default)]
pub struct Prober {
    clients: http::Clients,
}

impl Prober {
    /// Probes a backend once. Never takes much longer than the check's timeout.
    pub async fn probe(&self, check: &Check, backend: SocketAddr) -> ProbeResult {
        let started = Instant::now();
        let at = |port: Option<u16>| SocketAddr::new(backend.ip(), port.unwrap_or(backend.port()));
        let (code, detail) = match &check.action {
            CheckAction::TcpSocket { port } => tcp::probe(at(*port), check.timeout).await,
            CheckAction::Grpc { port, service } => grpc::probe(at(*port), service, check.timeout).await,
            CheckAction::HttpGet { port, .. } => {
                http::probe(&self.clients, &check.action, at(*port), check.timeout).await
            }
        };
        ProbeResult { code, detail, duration: started.elapsed() }
    }
}

#[cfg(test)]
mod tests;
