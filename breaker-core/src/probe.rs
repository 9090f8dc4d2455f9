//! The result of a probe, and the backend that it is about. The agent's `check` module executes probes.

use std::{net::SocketAddr, time::Duration};

use breaker_common::StateReason;

use crate::{health::Health, model::ServiceName};

/// Outcome of a probe in HAProxy's vocabulary (its management guide, section 9.3, `check_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CheckCode {
    /// The connection was established, and the check asks for no more.
    L4Ok,
    /// The connection was refused or broke, or the address is unreachable.
    L4Con,
    /// Not connected in time.
    L4Tout,
    /// The TLS handshake did not end in time.
    L6Tout,
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
    /// The probe has no result, because something on this node kept it from asking: no free descriptor, no memory, no
    /// local port, a local firewall, no route, or an agent that did not get to run. It says nothing about the backend.
    /// HAProxy has no such code: its `SOCKERR` counts as a failure.
    LocalError,
}

impl CheckCode {
    /// As HAProxy prints it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::L4Ok => "L4OK",
            Self::L4Con => "L4CON",
            Self::L4Tout => "L4TOUT",
            Self::L6Tout => "L6TOUT",
            Self::L6Rsp => "L6RSP",
            Self::L7Ok => "L7OK",
            Self::L7Sts => "L7STS",
            Self::L7Tout => "L7TOUT",
            Self::L7Rsp => "L7RSP",
            Self::LocalError => "LocalError",
        }
    }

    /// Whether the probe has a result: it passed or failed. Without one, nothing is known about the backend.
    #[must_use]
    pub const fn is_result(self) -> bool {
        !matches!(self, Self::LocalError)
    }

    /// Whether the backend accepted the probe's connection, or may have: its answer does not matter.
    #[must_use]
    pub const fn is_accepted(self) -> bool {
        !matches!(self, Self::L4Con | Self::L4Tout)
    }

    /// Whether the probe passed.
    #[must_use]
    pub const fn passes(self) -> bool {
        matches!(self, Self::L4Ok | Self::L7Ok)
    }

    /// The reason of a transition that a probe with this code causes. A probe without a result causes none.
    #[must_use]
    pub const fn reason(self) -> StateReason {
        match self {
            Self::L4Ok | Self::L7Ok | Self::LocalError => StateReason::Recovered,
            Self::L4Con => StateReason::ConnectFailed,
            Self::L4Tout => StateReason::ConnectTimeout,
            Self::L6Tout | Self::L6Rsp => StateReason::TlsFailed,
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
    /// The epoch of the breaker's state in which the probe began (see `Engine::state_epoch`). A probe counts only in
    /// the state in which it began.
    pub began: u32,
}

/// How busy the probes are. `breaker status` shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeLoad {
    /// Probes at the same time, at most. It follows from the limit of descriptors.
    pub most: usize,
    /// Probes that run now.
    pub running: usize,
    /// Probes that wait for their turn.
    pub waiting: u64,
    /// Probes that began more than 20 ms late: too many others were running, or the agent did not get to run.
    pub late: u64,
    /// Probes without a result because of an error of this node, since the start.
    pub local_errors: u64,
}
