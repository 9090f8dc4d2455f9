//! The answer to `GET /v1/services/NAME/flows`.

use std::net::SocketAddr;

use breaker_common::FlowKind;
use serde::{Deserialize, Serialize};

/// One flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowView {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The frontend that it connected to.
    pub frontend: SocketAddr,
    /// The backend that it goes to.
    pub backend: SocketAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// The client's port toward the backend.
    pub source_port: u16,
    /// The pinned decision.
    pub kind: FlowKind,
    /// The epoch of the decision.
    pub epoch: u32,
    /// How its packets are delivered.
    #[serde(rename = "way")]
    pub path: FlowPath,
    /// Time since the decision, seconds.
    pub age_seconds: u64,
    /// How far the connection has come.
    pub phase: FlowPhase,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP (RFC 9293).
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP (RFC 768).
    #[serde(rename = "UDP")]
    Udp,
}

/// How the packets of a flow are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlowPath {
    /// Through the host network stack.
    #[serde(rename = "stack")]
    Stack,
    /// By the fast path, into the backup's veth.
    #[serde(rename = "veth")]
    Veth,
}

impl FlowPath {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Stack => "stack",
            Self::Veth => "veth",
        }
    }
}

/// How far the connection of a flow has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FlowPhase {
    /// It was left to kube-proxy; the programs do not see its answers.
    #[serde(rename = "passed")]
    Passed,
    /// The backend has not answered yet.
    #[serde(rename = "unanswered")]
    Unanswered,
    /// Both sides have sent.
    #[serde(rename = "established")]
    Established,
    /// One side has closed.
    #[serde(rename = "closing")]
    Closing,
    /// Both sides have closed, or one was reset.
    #[serde(rename = "ended")]
    Ended,
}

impl FlowPhase {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Unanswered => "unanswered",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Ended => "ended",
        }
    }
}
