//! The Kubernetes API of breaker: group `breaker.dev`, version `v1alpha1`. The CRDs in k8s/base/crds are made of these
//! types (`breaker crds`), so a doc comment here is what `kubectl explain` shows.

mod breaker;
mod check;
mod grant;
mod report;
mod status;

use kube::CustomResourceExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use breaker::{
    Backup, Breaker, CircuitBreaker, CircuitBreakerSpec, Established, FastPath, Loss, Mode, Override, ProbeFrom,
    ServiceRef, Topology, Unhealthy, Window,
};
pub use check::{Check, GrpcAction, Header, HttpGetAction, Scheme, TcpSocketAction};
pub use grant::{GrantFrom, GrantTo, ReferenceGrant, ReferenceGrantSpec};
pub use report::{NodeReport, NodeReportSpec, ReportedAgent, ReportedLimit, ReportedService, ReportedTier};
pub use status::{CircuitBreakerStatus, NodeCounts, NodeStatus, PortStatus};

/// The API group.
pub const GROUP: &str = "breaker.dev";

/// A port: its name in the Service, or its number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Port {
    /// Its number.
    Number(i64),
    /// Its name.
    Name(String),
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
            "x-kubernetes-int-or-string": true,
            "x-kubernetes-validations": [{
                "rule": "type(self) == int ? self >= 1 && self <= 65535 : size(self) >= 1 && size(self) <= 63",
                "message": "a port's number, 1 to 65535, or its name",
            }],
        })
    }
}

/// The definitions of every type, as YAML documents.
///
/// # Errors
/// None that a test would not have found.
pub fn definitions() -> Result<String, serde_saphyr::ser_error::Error> {
    let mut text = String::from("# Made by `cargo xtask crdgen` of breaker-agent/src/source/kube/api; not by hand.\n");
    for crd in [CircuitBreaker::crd(), NodeReport::crd(), ReferenceGrant::crd()] {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(&crd)?);
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
