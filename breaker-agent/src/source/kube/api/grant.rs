//! Leave for others to use a Service as their backup.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A namespace's leave for CircuitBreakers of other namespaces to redirect to its Services; shaped like the Gateway API's
/// type of this name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "breaker.dev",
    version = "v1alpha1",
    kind = "ReferenceGrant",
    namespaced,
    category = "breaker",
    doc = "Leave for CircuitBreakers of other namespaces to use this namespace's Services as their backup.",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct ReferenceGrantSpec {
    /// Who may.
    #[schemars(length(min = 1, max = 64))]
    pub from: Vec<GrantFrom>,
    /// What they may use.
    #[schemars(length(min = 1, max = 64))]
    pub to: Vec<GrantTo>,
}

/// Who may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantFrom {
    /// The group of what refers; only breaker.dev means anything here.
    #[schemars(length(max = 253))]
    pub group: String,
    /// The kind of what refers: CircuitBreaker; it covers annotated Services, too.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// The namespace of what refers.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
}

/// What they may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantTo {
    /// The group of what is referred to; empty = core.
    #[schemars(length(max = 253))]
    #[serde(default)]
    pub group: String,
    /// The kind of what is referred to: Service.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// One of that kind; all of them if not given.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
