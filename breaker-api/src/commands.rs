//! Bodies of requests to the control socket, and the body of an error.

use serde::{Deserialize, Serialize};

/// Body of `POST /v1/services/NAME/trip`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TripBody {
    /// How long the override holds, in seconds; absent: until it is reset.
    pub seconds: Option<u64>,
    /// Why the breaker is forced open; appears in the status and the events.
    pub reason: Option<String>,
}

/// Body of `POST /v1/handover`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HandoverBody {
    /// How long the last decision stays in force without an agent, in seconds.
    pub seconds: u64,
}

/// Body of every answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: String,
}
