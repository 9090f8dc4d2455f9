//! Requests to the main loop, from the control socket, from kubelet, from scrapes of metrics and from the page. Each carries
//! the channel for its answer.

use std::time::Duration;

use breaker_api::{
    events::EventLine,
    flows::FlowView,
    status::{AgentStatus, ServiceStatus},
};
use breaker_core::{
    engine::{
        CommandError,
        measures::{Query, ServiceMeasures},
    },
    model::ServiceName,
};
use tokio::sync::oneshot;

use crate::metrics::{Level, Snapshot};

/// One of the checks that together say whether the agent is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadyCheck {
    /// Its name.
    pub name: &'static str,
    /// The error says what is wrong.
    pub outcome: Result<(), String>,
    /// If true, the agent is not ready while this check fails.
    pub counts: bool,
}

/// A request to the main loop.
#[derive(Debug)]
pub enum Command {
    /// The status of the agent and of every service.
    Status(oneshot::Sender<AgentStatus>),
    /// The status of the agent without services.
    Agent(oneshot::Sender<AgentStatus>),
    /// The status of some services.
    Services {
        /// Only services whose names come after this one.
        after: Option<ServiceName>,
        /// This many services, at most.
        most: usize,
        /// Channel for the answer.
        reply: oneshot::Sender<Vec<ServiceStatus>>,
    },
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
    /// Whether the agent is ready.
    Ready(oneshot::Sender<Vec<ReadyCheck>>),
    /// The numbers for a scrape of metrics, without those of the services.
    Metrics {
        /// The level; `None` = that of the configuration.
        level: Option<Level>,
        /// Channel for the answer.
        reply: oneshot::Sender<Snapshot>,
    },
    /// The numbers of some services.
    Measures {
        /// Which ones.
        query: Query,
        /// Channel for the answer.
        reply: oneshot::Sender<Vec<ServiceMeasures>>,
    },
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
