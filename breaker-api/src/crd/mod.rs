//! The Kubernetes API of breaker: group `breaker.dev`, version `v1alpha1`. `cargo xtask crdgen` generates the CRDs in
//! k8s/base/crds.yaml and k8s/chart/templates/crds.yaml from these types, so `kubectl explain` shows these doc comments.

/// Defines an enum whose variants are the words of a field.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$attr:meta])* $word:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[allow(missing_docs, reason = "a documented variant is a schema of its own, which is not structural")]
        pub enum $name { $($(#[$attr])* $word),+ }

        impl $name {
            /// The name in JSON and in output.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$word => stringify!($word)),+ }
            }
        }
    };
}
mod breaker;
mod check;
mod grant;
mod limits;
mod report;
mod status;

use kube::CustomResourceExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use breaker::{
    Backup, Breaker, CircuitBreaker, CircuitBreakerSpec, EstablishedPolicy, FastPath, Mode, OnAgentLoss, Override,
    ProbeFrom, ServiceRef, Topology, WhenAllUnhealthy, Window,
};
pub use check::{Check, GrpcAction, Header, HttpGetAction, Scheme, TcpSocketAction};
pub use grant::{GrantFrom, GrantTo, ReferenceGrant, ReferenceGrantSpec};
pub use limits::{BackupLimits, ClientLimits, LimitScope, Limits, OnLimit};
pub use report::{
    AttachMode, GONE, NodeReport, NodeReportSpec, OwnerKind, RefusedService, ReportedAgent, ReportedLimit,
    ReportedService, ReportedTier,
};
pub use status::{CircuitBreakerStatus, NodeCounts, NodeStatus, PortStatus, ReportedState};

/// Name of the Lease that elects the agent which writes the statuses, in the agents' namespace.
pub const STATUS_LEASE: &str = "breaker-status";

/// Name of the statuses' field manager in managedFields.
pub const STATUS_MANAGER: &str = "breaker";

/// Annotation of a CircuitBreaker with an override that holds instead of the spec's: see
/// [`CircuitBreaker::spec_in_force`].
pub const OVERRIDE_ANNOTATION: &str = "breaker.dev/override";

/// Annotation of a CircuitBreaker with the end of the override in [`OVERRIDE_ANNOTATION`].
pub const UNTIL_ANNOTATION: &str = "breaker.dev/until";

/// Annotation of a CircuitBreaker with the operator's reason for an override, for people.
pub const REASON_ANNOTATION: &str = "breaker.dev/override-reason";

/// The API group.
pub const GROUP: &str = "breaker.dev";

/// A port of a Service, by name or by number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged, from = "WrittenPort")]
pub enum Port {
    /// Its number.
    Number(i64),
    /// Its name.
    Name(String),
}

/// A port as people write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenPort {
    Number(i64),
    Text(String),
}

impl From<WrittenPort> for Port {
    /// A port's name has a letter (RFC 6335), so digits alone are a number, also between quotes.
    fn from(written: WrittenPort) -> Self {
        match written {
            WrittenPort::Number(number) => Self::Number(number),
            WrittenPort::Text(text) => text.parse().map_or(Self::Name(text), Self::Number),
        }
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl JsonSchema for Port {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Port".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            // Without it, tools that check offline accept an object.
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "x-kubernetes-int-or-string": true,
            "x-kubernetes-validations": [{
                "rule": "type(self) == int ? self >= 1 && self <= 65535 : size(self) >= 1 && size(self) <= 63",
                "message": "a port's number, 1 to 65535, or its name",
            }],
        })
    }
}

/// The CRDs of all types, as YAML documents.
///
/// # Errors
/// A definition cannot be serialized; a test serializes all of them.
pub fn definitions() -> Result<String, serde_saphyr::ser_error::Error> {
    let mut text = String::from("# Generated from breaker-api/src/crd by `cargo xtask crdgen`.\n");
    for crd in [CircuitBreaker::crd(), NodeReport::crd(), ReferenceGrant::crd()] {
        let is_breaker = crd.spec.names.kind == "CircuitBreaker";
        let mut crd = serde_json::json!(crd);
        for version in crd["spec"]["versions"].as_array_mut().into_iter().flatten() {
            let schema = &mut version["schema"]["openAPIV3Schema"];
            remove_defaults_in_lists(schema, false);
            if let Some(status) = schema.pointer_mut("/properties/status").filter(|_| is_breaker) {
                status["default"] = first_status();
            }
        }
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(&crd)?);
    }
    Ok(text)
}

/// The status of a CircuitBreaker that no agent has seen: the API server adds it. Without it, tools that wait would take
/// a cluster without agents for one in which everything is done.
fn first_status() -> serde_json::Value {
    serde_json::json!({
        "conditions": [{
            "type": "Reconciling",
            "status": "True",
            "reason": "NoAgents",
            "message": "no agent has reported yet",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }],
    })
}

/// Removes the defaults of fields inside of lists that belong to one manager as a whole (`x-kubernetes-list-type:
/// atomic`, which is the default). The API server would add them to a client's list, and a later server-side apply of the
/// same list would conflict with it. The agent adds them when it reads the object.
fn remove_defaults_in_lists(schema: &mut serde_json::Value, inside: bool) {
    let Some(fields) = schema.as_object_mut() else { return };
    if inside {
        fields.remove("default");
    }
    let atomic = fields.get("x-kubernetes-list-type").is_none_or(|kind| kind == "atomic");
    if let Some(items) = fields.get_mut("items") {
        remove_defaults_in_lists(items, inside || atomic);
    }
    for field in fields.get_mut("properties").and_then(|fields| fields.as_object_mut()).into_iter().flatten() {
        remove_defaults_in_lists(field.1, inside);
    }
}

/// Backups of a CircuitBreaker, at most.
pub const MOST_BACKUPS: usize = 8;
/// Protected ports that a CircuitBreaker names, at most.
pub const MOST_PORTS: usize = 16;

fn date_time(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": "string", "format": "date-time" })
}

#[cfg(test)]
mod tests;
