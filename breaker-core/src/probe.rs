//! The result of a probe, and the backend that it is about. The agent's `check` module executes probes.

use std::{net::SocketAddr, time::Duration};

use breaker_common::StateReason;

use crate::{health::Health, model::ServiceName};

/// Outcome of a probe in HAProxy's vocabulary (its management guide, section 9.3, `check_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckCode {
    /// The connection was established, and the check asks for no more.
    L4Ok,
    /// The connection was refused or broke, or the address is unreachable.
    L4Con,
    /// Not connected in time.
    L4Tout,
    /// The TLS handshake failed.
    L6Rsp,
    /// The answer passes the check.
    L7Ok,
    /// An answer with another status than expected.
    L7Sts,
    /// Connected, but no answer in time.
    L7Tout,
    /// The answer is not valid for the protocol, or its content does not match.
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

    /// The reason of a transition that a probe with this code causes.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeResult {
    /// The outcome as a code.
    pub code: CheckCode,
    /// Details in words: the status or the error.
    pub detail: String,
    /// Duration of the probe.
    pub duration: Duration,
}

/// The backend that a probe is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The service.
    pub service: ServiceName,
    /// Index of the tier: 0 is the primary, then the backups.
    pub tier: usize,
    /// The backend.
    pub backend: SocketAddr,
}

/// A probe's result, and the health of the backend after it.
#[derive(Clone, Debug)]
pub struct ProbeReport {
    /// The backend that was probed.
    pub target: Target,
    /// Result of the probe.
    pub result: ProbeResult,
    /// Health of the backend after the probe.
    pub health: Health,
}
