//! What a probe returns, and whom it is about. The agent's `check` module executes probes.

use std::{net::SocketAddr, time::Duration};

use breaker_common::StateReason;

use crate::{health::Health, model::ServiceName};

/// Outcome of a probe in HAProxy's vocabulary (its management guide, section 9.3, `check_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckCode {
    /// Connected, and that is all that was wanted.
    L4Ok,
    /// Refused, unreachable, broken.
    L4Con,
    /// Not connected in time.
    L4Tout,
    /// The TLS handshake failed.
    L6Rsp,
    /// A good answer.
    L7Ok,
    /// An answer with another status than expected.
    L7Sts,
    /// Connected, but no answer in time.
    L7Tout,
    /// An answer that is none, or one that does not match.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeResult {
    /// What came of it.
    pub code: CheckCode,
    /// In words: the status, the error.
    pub detail: String,
    /// How long it took.
    pub duration: Duration,
}

/// Whom a probe is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The service.
    pub service: ServiceName,
    /// 0 = the primary, then the backups.
    pub tier: usize,
    /// The backend.
    pub backend: SocketAddr,
}

/// A probe's result and what it makes of the backend's health.
#[derive(Clone, Debug)]
pub struct ProbeReport {
    /// Whom it is about.
    pub target: Target,
    /// What came of it.
    pub result: ProbeResult,
    /// The health by now.
    pub health: Health,
}
