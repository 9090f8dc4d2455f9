//! Limits: how many new connections per second, and how many connections at the same time, a tier accepts from all
//! clients together and from each client.
//!
//! Each node enforces the limits by itself. With [`Scope::Cluster`], a limit is divided by the number of nodes that
//! report.

use std::time::Duration;

use breaker_common::{LimitAction, ServiceLimits, TierLimits as KernelLimits, V6, gcra};

/// Largest allowed rate, burst and number of connections.
pub const MAX_LIMIT: u32 = 1_000_000;
/// Default length of the prefix, in bits, that identifies an IPv6 client: hosts choose the other bits by themselves
/// (RFC 4291, section 2.5.4).
pub const CLIENT_PREFIX: u8 = 64;
/// Default time after which a connection without packets is no longer counted, as in IPVS (`ipvsadm --set`).
pub const IDLE: Duration = Duration::from_secs(900);
/// Smallest default burst.
const MIN_DEFAULT_BURST: u32 = 5;

/// A rate limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// New connections per second, from 1 to [`MAX_LIMIT`].
    pub per_second: u32,
    /// New connections that are accepted at once after a pause (bucket size), from 1 to [`MAX_LIMIT`].
    pub burst: u32,
}

impl Rate {
    /// The default burst for a rate: the connections of a tenth of a second, and at least five.
    #[must_use]
    pub fn default_burst(per_second: u32) -> u32 {
        per_second.div_ceil(10).max(MIN_DEFAULT_BURST)
    }
}

/// What happens to a new connection over a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLimit {
    /// The connection is refused at once: TCP reset, or ICMP "port unreachable" for UDP.
    #[default]
    Reset,
    /// The packet is dropped.
    Drop,
    /// The connection goes to the other tier. In the backup tier this means `Reset`.
    Failover,
}

/// Whether a limit is meant for one node or for the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// The limit is enforced in full on each node.
    #[default]
    Node,
    /// The limit is for all nodes together: each node enforces its part.
    Cluster,
}

/// The limits of one tier. `None` means no limit of that kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierLimits {
    /// New connections per second, all clients together.
    pub rate: Option<Rate>,
    /// Connections at the same time, all clients together.
    pub concurrent: Option<u32>,
    /// New connections per second from each client.
    pub client_rate: Option<Rate>,
    /// Connections at the same time from each client.
    pub client_concurrent: Option<u32>,
    /// What happens to a new connection over a limit.
    pub on_limit: OnLimit,
}

impl TierLimits {
    /// Whether the tier has any limit.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.rate.is_some() || self.client_rate.is_some() || self.counts()
    }

    /// Whether the tier limits connections at the same time.
    #[must_use]
    pub const fn counts(&self) -> bool {
        self.concurrent.is_some() || self.client_concurrent.is_some()
    }

    /// The limits for one node, if they are shared by `nodes` nodes (0 counts as 1). A burst and a number of
    /// connections are at least 1 on each node, so the nodes together may accept more than a small limit.
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

/// The limits of one service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The limits of the primary.
    pub primary: TierLimits,
    /// The limits of the backups, together.
    pub backup: TierLimits,
    /// Length of the prefix, in bits, that identifies an IPv6 client: 1 to 128.
    pub client_prefix: u8,
    /// Time after which a connection without packets is no longer counted, once a count is close to its limit.
    pub idle: Duration,
    /// Whether the limits are for each node or for the cluster.
    pub scope: Scope,
    /// Number of nodes that report; 1 if it is not known.
    pub nodes: u32,
}

impl Limits {
    /// Whether the service has any limit.
    #[must_use]
    pub const fn any(&self) -> bool {
        self.primary.any() || self.backup.any()
    }

    /// Whether the service limits connections at the same time. The programs must then see the ends of connections.
    #[must_use]
    pub const fn counts(&self) -> bool {
        self.primary.counts() || self.backup.counts()
    }

    /// Number of nodes by which the limits are divided.
    #[must_use]
    pub const fn shared_by(&self) -> u32 {
        match self.scope {
            Scope::Node => 1,
            Scope::Cluster => self.nodes,
        }
    }

    /// This node's limits as the map `LIMITS` stores them. The datapath fills in the key and the flags.
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
        assert_eq!((many.tolerance_ns, many.concurrent), (0, 1), "a part is never zero");
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
