//! What limits do, for people: the status of a service's limits, and when one of them begins and ceases to bite.

use std::{collections::BTreeMap, time::Duration};

use breaker_common::{LimitAction, LimitCounters, LimitKind, ServiceLimits};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    breaker::Instant,
    datapath::{LimitReport, LimitedClientView},
    limits::{Limits, OnLimit, Rate, Scope, TierLimits},
};

/// How often a limit that goes on biting is told of, and for how long it must not bite to be over.
const MINUTE: Duration = Duration::from_secs(60);
/// Clients shown at the most.
pub const CLIENTS: usize = 10;
/// The tiers, as they are shown.
const TIERS: [&str; 2] = ["primary", "backup"];

/// The limits of a service in `GET /v1/services/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LimitsStatus {
    /// `Node` or `Cluster`.
    pub scope: String,
    /// By how many nodes the limits below are divided.
    pub shared_by: u32,
    /// The primary's.
    pub primary: TierLimitsStatus,
    /// The backup's.
    pub backup: TierLimitsStatus,
    /// New connections sent to the backup because the primary was at a limit.
    pub failed_over: u64,
    /// New connections admitted because every compare-and-swap lost its race.
    pub contended: u64,
    /// SYNs that were sent again and datagrams of known flows.
    pub repeated: u64,
    /// New connections admitted and not counted, because there was no room to remember them.
    pub untracked: u64,
    /// What bites now; absent if nothing did for a minute.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub limited: Option<Biting>,
    /// Clients that were refused most often in the last minute, most first.
    #[serde(default)]
    pub limited_clients: Vec<LimitedClientView>,
}

/// A tier's limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierLimitsStatus {
    /// The limits, by the names that they have in the configuration.
    pub limits: BTreeMap<String, u32>,
    /// `Reset`, `Drop` or `Failover`.
    pub on_limit: String,
    /// Connections that are counted now.
    pub concurrent: u32,
    /// New connections over a limit since the service is in the maps, by limit.
    pub limited: BTreeMap<String, u64>,
    /// New connections that would have been over a limit, were this not a dry run.
    pub dry_run: BTreeMap<String, u64>,
}

/// A limit that bites.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Biting {
    /// Since when.
    pub since: Timestamp,
    /// The tier and the limit that refused most, like `primary newConnectionsPerSecond`.
    pub limit: String,
    /// New connections over a limit in the last minute that was counted; in the first one, so far.
    pub per_minute: u64,
}

/// A service's limits as they are.
pub(super) fn show(limits: &Limits, report: LimitReport, biting: Option<Biting>) -> LimitsStatus {
    let counters = &report.counters;
    let tier = |index: usize, limits: &TierLimits| TierLimitsStatus {
        limits: configured(limits),
        on_limit: format!("{:?}", limits.on_limit),
        concurrent: report.concurrent[index],
        limited: by_kind(&counters.limited[index]),
        dry_run: by_kind(&counters.dry_run[index]),
    };
    LimitsStatus {
        scope: format!("{:?}", limits.scope),
        shared_by: limits.shared_by(),
        primary: tier(0, &limits.primary),
        backup: tier(1, &limits.backup),
        failed_over: counters.failed_over,
        contended: counters.contended,
        repeated: counters.repeated,
        untracked: counters.untracked,
        limited: biting,
        limited_clients: report.clients,
    }
}

/// A service's limits as the programs enforce them, where no agent is there to say what was configured.
pub(crate) fn show_left(limits: &ServiceLimits, report: LimitReport) -> LimitsStatus {
    let tier = |limits: &breaker_common::TierLimits| {
        let rate = |interval: u64, tolerance: u64| {
            let per_second = u32::try_from(1_000_000_000_u64.checked_div(interval)?).ok()?;
            let burst = u32::try_from(tolerance / interval + 1).unwrap_or(u32::MAX);
            Some(Rate { per_second: per_second.max(1), burst })
        };
        let count = |count: u32| (count > 0).then_some(count);
        TierLimits {
            rate: rate(limits.interval_ns, limits.tolerance_ns),
            concurrent: count(limits.concurrent),
            client_rate: rate(limits.client_interval_ns, limits.client_tolerance_ns),
            client_concurrent: count(limits.client_concurrent),
            on_limit: match u8::try_from(limits.action).ok().and_then(|number| LimitAction::try_from(number).ok()) {
                Some(LimitAction::Drop) => OnLimit::Drop,
                Some(LimitAction::Failover) => OnLimit::Failover,
                Some(LimitAction::Reset) | None => OnLimit::Reset,
            },
        }
    };
    let [primary, backup] = limits.tiers.each_ref().map(tier);
    let limits = Limits { primary, backup, client_prefix: 0, idle: Duration::ZERO, scope: Scope::Node, nodes: 1 };
    show(&limits, report, None)
}

/// Limits by the names that they have in the configuration.
fn configured(limits: &TierLimits) -> BTreeMap<String, u32> {
    let rates = [
        ("newConnectionsPerSecond", limits.rate.map(|rate| rate.per_second)),
        ("burst", limits.rate.map(|rate| rate.burst)),
        ("concurrentConnections", limits.concurrent),
        ("perClient.newConnectionsPerSecond", limits.client_rate.map(|rate| rate.per_second)),
        ("perClient.burst", limits.client_rate.map(|rate| rate.burst)),
        ("perClient.concurrentConnections", limits.client_concurrent),
    ];
    rates.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn by_kind(counts: &[u64; 4]) -> BTreeMap<String, u64> {
    let kinds = LimitKind::ALL.iter().zip(counts).filter(|(_, count)| **count > 0);
    kinds.map(|(kind, count)| (kind.label().to_owned(), *count)).collect()
}

/// Follows the counters of one service: tells when limits begin to bite, and once a minute while they go on.
#[derive(Debug, Default)]
pub(super) struct Watcher {
    /// The counters at the last look; none before the first one.
    last: Option<[[u64; 4]; 2]>,
    /// The counters when it was told last, and when.
    told: Option<([[u64; 4]; 2], Instant)>,
    biting: Option<Biting>,
}

impl Watcher {
    /// What bites.
    pub(super) const fn biting(&self) -> Option<&Biting> {
        self.biting.as_ref()
    }

    /// Takes in the counters. Returns what is worth an event: at most once a minute.
    pub(super) fn look(&mut self, mono: Instant, unix: Timestamp, counters: &LimitCounters) -> Option<String> {
        let now = sum(&counters.limited, &counters.dry_run);
        // What happened before this agent came is no news.
        let before = self.last.replace(now).unwrap_or(now);
        let Some((at_told, told)) = self.told else {
            if more(&now, &before) == 0 {
                return None;
            }
            self.told = Some((before, mono));
            let (limit, count) = worst(&now, &before);
            self.biting = Some(Biting { since: unix, limit: limit.clone(), per_minute: more(&now, &before) });
            return Some(format!("{limit} is reached: {count} new connections over it so far"));
        };
        if mono.saturating_sub(told) < MINUTE {
            return None;
        }
        self.told = Some((now, mono));
        let count = more(&now, &at_told);
        if count == 0 {
            (self.told, self.biting) = (None, None);
            return None;
        }
        let (limit, most) = worst(&now, &at_told);
        let biting = self.biting.get_or_insert(Biting { since: unix, limit: limit.clone(), per_minute: 0 });
        (biting.limit, biting.per_minute) = (limit.clone(), count);
        Some(format!("{limit} is reached: {most} new connections over it in the last minute"))
    }
}

fn sum(a: &[[u64; 4]; 2], b: &[[u64; 4]; 2]) -> [[u64; 4]; 2] {
    std::array::from_fn(|tier| std::array::from_fn(|kind| a[tier][kind] + b[tier][kind]))
}

/// How much more there is of all.
fn more(now: &[[u64; 4]; 2], before: &[[u64; 4]; 2]) -> u64 {
    now.as_flattened().iter().zip(before.as_flattened()).map(|(now, before)| now.saturating_sub(*before)).sum()
}

/// The limit that there is most more of, and how much.
fn worst(now: &[[u64; 4]; 2], before: &[[u64; 4]; 2]) -> (String, u64) {
    let all = TIERS.iter().enumerate().flat_map(|(tier, name)| {
        LimitKind::ALL.iter().map(move |kind| {
            let kind_index = usize::from(*kind as u8);
            let count = now[tier][kind_index].saturating_sub(before[tier][kind_index]);
            (count, *name, kind.label())
        })
    });
    let (count, tier, kind) = all.max_by_key(|(count, ..)| *count).unwrap_or_default();
    (format!("{tier} {kind}"), count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(primary: u64, backup: u64) -> LimitCounters {
        LimitCounters { limited: [[primary, 0, 0, 0], [0, 0, backup, 0]], ..LimitCounters::default() }
    }

    #[test]
    fn a_limit_that_bites_is_told_at_once_and_then_once_a_minute() {
        let mut watcher = Watcher::default();
        let mut at = |seconds: u64, counters: LimitCounters| {
            let unix = Timestamp::from_second(1_000_000 + i64::try_from(seconds).unwrap()).unwrap();
            let told = watcher.look(Duration::from_secs(seconds), unix, &counters);
            (told, watcher.biting().map(|biting| (biting.limit.clone(), biting.per_minute)))
        };
        let primary = |count| Some(("primary newConnectionsPerSecond".to_owned(), count));
        assert_eq!(at(0, counters(7, 0)), (None, None), "from before this agent");
        let first = "primary newConnectionsPerSecond is reached: 3 new connections over it so far";
        assert_eq!(at(2, counters(10, 0)), (Some(first.into()), primary(3)));
        assert_eq!(at(30, counters(100, 500)), (None, primary(3)), "a minute is not over");
        let second = "backup concurrentConnections is reached: 500 new connections over it in the last minute";
        assert_eq!(
            at(62, counters(100, 500)),
            (Some(second.into()), Some(("backup concurrentConnections".into(), 593)))
        );
        assert_eq!(at(122, counters(100, 500)), (None, None), "a minute without");
        assert!(at(124, counters(101, 500)).0.is_some(), "and anew");
    }
}
