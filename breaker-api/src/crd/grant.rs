//! The `ReferenceGrant` resource: permission for other namespaces to use a Service as their backup.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which CircuitBreakers of other namespaces may use which Services of this namespace as backups. The fields are
/// those of the Gateway API's ReferenceGrant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "breaker.dev",
    version = "v1alpha1",
    kind = "ReferenceGrant",
    namespaced,
    category = "breaker",
    doc = "Permission for CircuitBreakers of other namespaces to use Services of this namespace as backups.",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct ReferenceGrantSpec {
    /// The objects that may use the Services.
    #[schemars(length(min = 1, max = 64))]
    pub from: Vec<GrantFrom>,
    /// The Services that they may use.
    #[schemars(length(min = 1, max = 64))]
    pub to: Vec<GrantTo>,
}

/// The objects that may use the Services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantFrom {
    /// API group of the objects. Only breaker.dev has an effect.
    #[schemars(length(max = 253))]
    pub group: String,
    /// Kind of the objects. Only CircuitBreaker has an effect; it includes Services with breaker's annotations.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// Namespace of the objects.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
}

/// The Services that may be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GrantTo {
    /// API group of the Services: the empty string, which is the core group.
    #[schemars(length(max = 253))]
    #[serde(default)]
    pub group: String,
    /// Kind of the Services: Service.
    #[schemars(length(min = 1, max = 63))]
    pub kind: String,
    /// Name of one Service. Without it, all Services of the namespace may be used.
    #[schemars(length(min = 1, max = 253))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}
