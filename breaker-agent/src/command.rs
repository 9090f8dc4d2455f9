//! Requests to the main loop, from the control socket and from kubelet. Each carries the channel for its answer.

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
        /// Duration of the override; `None` = until a reset.
        duration: Option<Duration>,
        /// The operator's reason, shown in the status and in events.
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
        /// Maximum number of flows.
        limit: usize,
        /// Channel for the answer.
        reply: oneshot::Sender<Result<Vec<FlowView>, CommandError>>,
    },
    /// Whether the agent has a configuration; otherwise the reason why not.
    Ready(oneshot::Sender<Result<(), String>>),
    /// The agent is about to be replaced: extend the lease, so that the programs trust the last decision for longer.
    Handover {
        /// Duration of the extended lease.
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
