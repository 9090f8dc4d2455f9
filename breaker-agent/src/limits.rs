//! Limits: how many new connections a second and how many at the same time a tier takes, of all clients and of each.
//!
//! A limit holds for each node. With [`Scope::Cluster`] it is divided by the number of nodes that report.

use std::time::Duration;

use breaker_common::{LimitAction, ServiceLimits, TierLimits as KernelLimits, V6, gcra};
use serde::Serialize;

/// The largest rate, burst and number of connections that can be asked for.
pub const MOST: u32 = 1_000_000;
/// How many bits of an IPv6 client's address tell clients apart by default: hosts choose the rest by themselves (RFC 4291,
/// section 2.5.4).
pub const CLIENT_PREFIX: u8 = 64;
/// How long a connection without packets counts by default, as in IPVS (`ipvsadm --set`).
pub const IDLE: Duration = Duration::from_secs(900);
/// The least burst by default.
const LEAST_BURST: u32 = 5;

/// A rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rate {
    /// New connections a second, from 1 to [`MOST`].
    pub per_second: u32,
    /// How many may come at once from a full bucket, from 1 to [`MOST`].
    pub burst: u32,
}

impl Rate {
    /// The burst of a rate for which none is given: a tenth of a second's connections, and at least five.
    #[must_use]
    pub fn default_burst(per_second: u32) -> u32 {
        per_second.div_ceil(10).max(LEAST_BURST)
    }
}

/// What happens to a new connection over a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum OnLimit {
    /// It is refused at once: TCP reset, ICMP "port unreachable".
    #[default]
    Reset,
    /// Its packet is dropped.
    Drop,
    /// It goes to the other tier; from the backup, as `Reset`.
    Failover,
}

/// For how much of the cluster a limit is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum Scope {
    /// For each node.
    #[default]
    Node,
    /// For all nodes together.
    Cluster,
}

/// The limits of a tier. `None`: there is no such limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TierLimits {
    /// New connections a second.
    pub rate: Option<Rate>,
    /// Connections at the same time.
    pub concurrent: Option<u32>,
    /// New connections a second of each client.
    pub client_rate: Option<Rate>,
    /// Connections at the same time of each client.
    pub client_concurrent: Option<u32>,
    /// What happens over a limit.
    pub on_limit: OnLimit,
}

impl TierLimits {
    /// Whether there is any limit.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.rate.is_some() || self.client_rate.is_some() || self.counts()
    }

    /// Whether connections at the same time are limited.
    #[must_use]
    pub const fn counts(&self) -> bool {
        self.concurrent.is_some() || self.client_concurrent.is_some()
    }

    /// One of `nodes` nodes' part. No part is less than one connection, so that many nodes together may allow more than a
    /// small limit.
    fn for_node(&self, nodes: u32) -> KernelLimits {
        let nodes = nodes.max(1);
        let rate = |rate: Option<Rate>| {
            rate.map_or((0, 0), |rate| {
                let interval = gcra::interval(rate.per_second, nodes);
                (interval, gcra::tolerance((rate.burst / nodes).max(1), interval))
            })
        };
        let part = |count: Option<u32>| count.map_or(0, |count| (count / nodes).max(1));
        let ((interval_ns, tolerance_ns), (client_interval_ns, client_tolerance_ns)) =
            (rate(self.rate), rate(self.client_rate));
        let action = match self.on_limit {
            OnLimit::Reset => LimitAction::Reset,
            OnLimit::Drop => LimitAction::Drop,
            OnLimit::Failover => LimitAction::Failover,
        };
        KernelLimits {
            interval_ns,
            tolerance_ns,
            client_interval_ns,
            client_tolerance_ns,
            concurrent: part(self.concurrent),
            client_concurrent: part(self.client_concurrent),
            action: action as u32,
            pad: 0,
        }
    }
}

/// The limits of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// The primary's.
    pub primary: TierLimits,
    /// The backups', together.
    pub backup: TierLimits,
    /// How many leading bits of an IPv6 client's address tell clients apart, 1 to 128.
    pub client_prefix: u8,
    /// How long a connection without packets counts, where the limit is nearly reached.
    pub idle: Duration,
    /// For how much of the cluster.
    pub scope: Scope,
    /// Nodes that report; 1 if it is not known.
    pub nodes: u32,
}

impl Limits {
    /// Whether there is any limit.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.primary.any() || self.backup.any()
    }

    /// Whether connections at the same time are limited, so that their ends must be seen.
    #[must_use]
    pub const fn counts(&self) -> bool {
        self.primary.counts() || self.backup.counts()
    }

    /// By how many nodes the limits are divided.
    #[must_use]
    pub const fn shared_by(&self) -> u32 {
        match self.scope {
            Scope::Node => 1,
            Scope::Cluster => self.nodes,
        }
    }

    /// What stands in the maps; the key and the flags are the datapath's own affair.
    #[must_use]
    pub fn in_kernel(&self) -> ServiceLimits {
        let nodes = self.shared_by();
        let mask = u128::MAX.checked_shl(128 - u32::from(self.client_prefix)).unwrap_or(0);
        ServiceLimits {
            tiers: [self.primary.for_node(nodes), self.backup.for_node(nodes)],
            client_mask: V6::new(mask.to_be_bytes()),
            ..ServiceLimits::NONE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(primary: TierLimits) -> Limits {
        let backup = TierLimits::default();
        Limits { primary, backup, client_prefix: 64, idle: IDLE, scope: Scope::Node, nodes: 3 }
    }

    #[test]
    fn a_cluster_shares_what_a_node_has_for_itself() {
        let rate = Rate { per_second: 100, burst: 9 };
        let tier = TierLimits { rate: Some(rate), concurrent: Some(10), ..TierLimits::default() };
        let node = limits(tier).in_kernel().tiers[0];
        assert_eq!((node.interval_ns, node.tolerance_ns, node.concurrent), (10_000_000, 80_000_000, 10));
        let cluster = Limits { scope: Scope::Cluster, ..limits(tier) }.in_kernel().tiers[0];
        assert_eq!((cluster.interval_ns, cluster.tolerance_ns, cluster.concurrent), (30_000_000, 60_000_000, 3));
        let many = Limits { scope: Scope::Cluster, nodes: 1000, ..limits(tier) }.in_kernel().tiers[0];
        assert_eq!((many.tolerance_ns, many.concurrent), (0, 1), "never nothing at all");
    }

    #[test]
    fn a_prefix_is_a_mask() {
        let mask = |client_prefix| Limits { client_prefix, ..limits(TierLimits::default()) }.in_kernel().client_mask;
        assert_eq!(mask(64).bytes[..9], [255, 255, 255, 255, 255, 255, 255, 255, 0]);
        assert_eq!((mask(128).bytes, mask(1).bytes[..2].to_vec()), ([255; 16], vec![0x80, 0]));
    }

    #[test]
    fn the_default_burst_is_a_tenth_of_a_second_and_at_least_five() {
        assert_eq!([1, 10, 100, 1000].map(Rate::default_burst), [5, 5, 10, 100]);
    }
}
