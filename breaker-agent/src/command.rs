//! What others ask the main loop for. Every command carries the channel for its answer.

use std::time::Duration;

use breaker_api::{
    events::EventLine,
    flows::FlowView,
    status::{AgentStatus, ServiceStatus},
};
use breaker_core::engine::CommandError;
use tokio::sync::oneshot;

/// A request to the main loop.
#[derive(Debug)]
pub enum Command {
    /// The status of the agent and of every service.
    Status(oneshot::Sender<AgentStatus>),
    /// The status of one service.
    Get(String, oneshot::Sender<Result<ServiceStatus, CommandError>>),
    /// Force a service open.
    Trip {
        /// The service's name.
        name: String,
        /// How long; `None` = until it is reset.
        duration: Option<Duration>,
        /// Why; shown to everybody who looks.
        reason: Option<String>,
        /// Channel for the answer.
        reply: oneshot::Sender<Result<ServiceStatus, CommandError>>,
    },
    /// End an operator's override.
    Reset(String, oneshot::Sender<Result<ServiceStatus, CommandError>>),
    /// A service's flows.
    Flows {
        /// The service's name.
        name: String,
        /// How many at most.
        limit: usize,
        /// Channel for the answer.
        reply: oneshot::Sender<Result<Vec<FlowView>, CommandError>>,
    },
    /// Whether the agent has a configuration; otherwise the reason.
    Ready(oneshot::Sender<Result<(), String>>),
    /// The agent is about to be replaced: its last decision is to hold longer than the usual lease.
    Handover {
        /// How long.
        duration: Duration,
        /// Channel for the answer.
        reply: oneshot::Sender<()>,
    },
    /// Events after an id.
    Events {
        /// The last id that is known.
        after: u64,
        /// Channel for the answer.
        reply: oneshot::Sender<Vec<EventLine>>,
    },
}
