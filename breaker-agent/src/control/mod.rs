//! The control socket: a unix socket, 0600, that speaks HTTP with JSON bodies. docs/CONTROL.md describes it; the
//! command line is its first user ([`client`]).

pub mod client;
pub mod health;
mod server;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    agent::{
        engine::CommandError,
        status::{AgentStatus, EventLine, ServiceStatus},
    },
    datapath::FlowView,
};

pub use server::{Socket, serve};

/// A request to the agent's loop.
#[derive(Debug)]
pub enum Request {
    /// Everything.
    Status(oneshot::Sender<AgentStatus>),
    /// One service.
    Get(String, oneshot::Sender<Result<ServiceStatus, CommandError>>),
    /// Force a service open.
    Trip {
        /// Which.
        name: String,
        /// For how long; `None` = until it is reset.
        duration: Option<Duration>,
        /// Why, for the others.
        reason: Option<String>,
        /// To whom to answer.
        reply: oneshot::Sender<Result<ServiceStatus, CommandError>>,
    },
    /// Give a service back to the measurement.
    Reset(String, oneshot::Sender<Result<ServiceStatus, CommandError>>),
    /// A service's flows.
    Flows {
        /// Which.
        name: String,
        /// How many at the most.
        limit: usize,
        /// To whom to answer.
        reply: oneshot::Sender<Result<Vec<FlowView>, CommandError>>,
    },
    /// Whether the agent has taken up its work; why not, if not.
    Ready(oneshot::Sender<Result<(), String>>),
    /// The agent is about to be replaced: its last word is to hold for so long.
    Handover {
        /// For how long.
        duration: Duration,
        /// To whom to answer.
        reply: oneshot::Sender<()>,
    },
    /// Events after an id.
    Events {
        /// The last one known.
        after: u64,
        /// To whom to answer.
        reply: oneshot::Sender<Vec<EventLine>>,
    },
}

/// Body of `POST /v1/services/NAME/trip`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TripBody {
    /// For how long; absent = until it is reset.
    pub seconds: Option<u64>,
    /// Why.
    pub reason: Option<String>,
}

/// Body of `POST /v1/handover`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HandoverBody {
    /// For how long the last word is to hold.
    pub seconds: u64,
}

/// Body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: String,
}
