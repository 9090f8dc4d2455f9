//! `GET /v1/events`: one JSON object a line.

use breaker_common::{BreakerState, StateReason};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventType {
    /// A breaker changed its state.
    Transition,
    /// A backend's health changed.
    Health,
    /// Probes have had no result for some time, because of an error of this node; or they have results again.
    LocalError,
    /// Events of a service were left out, because there were too many.
    LeftOut,
    /// A limit refuses new connections.
    Limited,
    /// The programs met a new epoch.
    StateAdopted,
    /// A new connection was sent to a backup.
    FlowMoved,
    /// A new connection was refused.
    Rejected,
    /// An established connection was reset.
    FlowReset,
    /// A write to the maps failed.
    WriteFailed,
    /// A write to the maps succeeded after failed ones.
    WriteRecovered,
    /// The tables of established flows fill up, or have room again.
    FlowPressure,
    /// The agent put back a part of the datapath that somebody else had taken away.
    Restored,
    /// A service's new connections on an interface are left to kube-proxy, because no answers of its backup were seen
    /// there, or are redirected again.
    ReturnPath,
    /// The established connections to a primary were reset when its breaker opened; how many.
    Resets,
    /// The configuration was read again.
    Config,
    /// A configuration was refused; nothing changed.
    ConfigRefused,
    /// An event that only another version knows.
    #[serde(other)]
    Unknown,
}

impl EventType {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Transition => "Transition",
            Self::Health => "Health",
            Self::LocalError => "LocalError",
            Self::LeftOut => "LeftOut",
            Self::Limited => "Limited",
            Self::StateAdopted => "StateAdopted",
            Self::FlowMoved => "FlowMoved",
            Self::Rejected => "Rejected",
            Self::FlowReset => "FlowReset",
            Self::WriteFailed => "WriteFailed",
            Self::WriteRecovered => "WriteRecovered",
            Self::FlowPressure => "FlowPressure",
            Self::Restored => "Restored",
            Self::ReturnPath => "ReturnPath",
            Self::Resets => "Resets",
            Self::Config => "Config",
            Self::ConfigRefused => "ConfigRefused",
            Self::Unknown => "Unknown",
        }
    }
}

/// Name in the field `service` of an event that belongs to no service.
pub const NO_SERVICE: &str = "-";

/// One event.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventLine {
    /// Increases by one with every event. A gap means that a slow reader missed events.
    pub id: u64,
    /// When it happened.
    pub at: Timestamp,
    /// The service; [`NO_SERVICE`] for an event that is not about one.
    pub service: String,
    /// What it is about.
    pub kind: EventType,
    /// A description for people.
    pub message: String,
    /// For a transition: the state before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub from: Option<BreakerState>,
    /// For a transition: the state after.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub to: Option<BreakerState>,
    /// For a transition: why.
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "crate::text::lenient")]
    pub reason: Option<StateReason>,
}
