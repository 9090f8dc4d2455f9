//! The limits of a service and their effect, in `GET /v1/services/NAME`.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    crd::{LimitScope, OnLimit},
    tier::TierRole,
};

/// The limits of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitsStatus {
    /// Whether they hold for each node or for the cluster.
    pub scope: LimitScope,
    /// Number of nodes that share the limits: each node enforces this fraction of them. 1 with scope `Node`.
    pub shared_by: u32,
    /// The limits of the primary.
    pub primary: TierLimitsStatus,
    /// The limits of the backups, together.
    pub backup: TierLimitsStatus,
    /// New connections sent to the backup because the primary was at a limit.
    pub failed_over: u64,
    /// New connections admitted without a decision: every compare-and-swap attempt lost its race, or a count was at
    /// its limit after the agent's lease had expired.
    pub contended: u64,
    /// Retransmitted SYNs and datagrams of known flows. They belong to connections that were already admitted.
    pub repeated: u64,
    /// New connections admitted and not counted, because there was no room to remember them.
    pub untracked: u64,
    /// The limit that refuses connections now; absent if none did for a minute.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub limited: Option<ActiveLimit>,
    /// Clients that were refused most often in the last minute, in descending order.
    #[serde(default)]
    pub limited_clients: Vec<RefusedClient>,
}

/// The limits of one tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierLimitsStatus {
    /// The configured limits, by their names in the configuration.
    pub limits: BTreeMap<String, u32>,
    /// What happens to a new connection over a limit.
    pub on_limit: OnLimit,
    /// Number of connections that are counted now.
    pub concurrent: u32,
    /// New connections over a limit since the service was added to the maps, by limit.
    pub limited: BTreeMap<String, u64>,
    /// New connections that would have been over a limit, but were not refused because of `mode: DryRun`; by limit.
    pub dry_run: BTreeMap<String, u64>,
}

/// A limit that refuses connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActiveLimit {
    /// When limits of the service began to refuse connections.
    pub since: Timestamp,
    /// The tier and the limit with the most connections over it, for example `primary newConnectionsPerSecond`.
    pub limit: String,
    /// New connections over any limit of the service in the last full minute, or until now in the first minute.
    pub per_minute: u64,
}

/// A client whose new connections limits refuse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedClient {
    /// Its address, or the IPv6 network that counts as one client, like `fd42::/64`; absent for the node's own
    /// processes.
    pub client: Option<String>,
    /// The tier whose limit refused it.
    pub tier: TierRole,
    /// New connections over a limit in the last minute; an estimate where many clients are refused.
    pub refused: u64,
}
