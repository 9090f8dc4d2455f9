//! Detects when limits begin and cease to refuse connections: one event at the start, then at most one a minute.

use std::{fmt, time::Duration};

use breaker_common::{LimitCounters, LimitKind};

use crate::{
    model::TierRole,
    time::{Instant, Now, UnixNanos},
};

/// The shortest time between two events about one service's limits; also the time without a refusal after which no
/// limit counts as active any more.
const MINUTE: Duration = Duration::from_secs(60);

/// Refused connections by tier and kind of limit.
type Counts = [[u64; 4]; 2];

/// One limit of one tier. Its text form is like `primary newConnectionsPerSecond`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitName {
    /// The tier.
    pub tier: TierRole,
    /// The kind of limit.
    pub kind: LimitKind,
}

impl fmt::Display for LimitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.tier.label(), self.kind.label())
    }
}

/// A limit that refuses connections now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActiveLimit {
    /// When limits of the service began to refuse connections.
    pub since_unix_ns: UnixNanos,
    /// The limit that refused most.
    pub limit: LimitName,
    /// New connections over any limit of the service in the last full minute, or until now in the first minute.
    pub per_minute: u64,
}

/// Follows the limit counters of one service.
#[derive(Debug, Default)]
pub(super) struct LimitWatch {
    /// The counters at the last call of [`LimitWatch::observe`]; `None` before the first one.
    last: Option<Counts>,
    /// The counters at the last event, and its time; `None` while no limit is active.
    reported: Option<(Counts, Instant)>,
    active: Option<ActiveLimit>,
}

impl LimitWatch {
    /// The limit that refuses connections now.
    pub const fn active(&self) -> Option<&ActiveLimit> {
        self.active.as_ref()
    }

    /// Processes the counters. Returns the text of an event, at most once a minute.
    pub fn observe(&mut self, now: Now, counters: &LimitCounters) -> Option<String> {
        let counts = sum(&counters.limited, &counters.dry_run);
        // Refusals from before this agent started are not reported.
        let before = self.last.replace(counts).unwrap_or(counts);
        let Some((reported, reported_at)) = self.reported else {
            let per_minute = increase(&counts, &before);
            if per_minute == 0 {
                return None;
            }
            self.reported = Some((before, now.mono));
            let (limit, most) = largest_increase(&counts, &before);
            self.active = Some(ActiveLimit { since_unix_ns: now.unix_ns, limit, per_minute });
            return Some(format!("{limit} is reached: {most} new connections over it so far"));
        };
        if now.mono.saturating_sub(reported_at) < MINUTE {
            return None;
        }
        self.reported = Some((counts, now.mono));
        let per_minute = increase(&counts, &reported);
        if per_minute == 0 {
            (self.reported, self.active) = (None, None);
            return None;
        }
        let (limit, most) = largest_increase(&counts, &reported);
        let since_unix_ns = self.active.as_ref().map_or(now.unix_ns, |active| active.since_unix_ns);
        self.active = Some(ActiveLimit { since_unix_ns, limit, per_minute });
        Some(format!("{limit} is reached: {most} new connections over it in the last minute"))
    }
}

fn sum(a: &Counts, b: &Counts) -> Counts {
    std::array::from_fn(|tier| std::array::from_fn(|kind| a[tier][kind] + b[tier][kind]))
}

/// The increase of all counters together.
fn increase(now: &Counts, before: &Counts) -> u64 {
    now.as_flattened().iter().zip(before.as_flattened()).map(|(now, before)| now.saturating_sub(*before)).sum()
}

/// The limit whose counter grew most, and by how much.
fn largest_increase(now: &Counts, before: &Counts) -> (LimitName, u64) {
    let none = (LimitName { tier: TierRole::Primary, kind: LimitKind::NewConnections }, 0);
    let all = [TierRole::Primary, TierRole::Backup].into_iter().enumerate().flat_map(|(index, tier)| {
        LimitKind::ALL.iter().map(move |kind| {
            let count = usize::from(*kind as u8);
            (LimitName { tier, kind: *kind }, now[index][count].saturating_sub(before[index][count]))
        })
    });
    all.max_by_key(|(_, count)| *count).unwrap_or(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(primary: u64, backup: u64) -> LimitCounters {
        LimitCounters { limited: [[primary, 0, 0, 0], [0, 0, backup, 0]], ..LimitCounters::default() }
    }

    #[test]
    fn an_active_limit_is_an_event_at_once_and_then_once_a_minute() {
        let mut watch = LimitWatch::default();
        let mut at = |seconds: u64, counters: LimitCounters| {
            let unix_ns = (1_000_000 + seconds) * 1_000_000_000;
            let event = watch.observe(Now { mono: Duration::from_secs(seconds), unix_ns }, &counters);
            (event, watch.active().map(|active| (active.limit.to_string(), active.per_minute)))
        };
        let primary = |count| Some(("primary newConnectionsPerSecond".to_owned(), count));
        assert_eq!(at(0, counters(7, 0)), (None, None), "counted before this agent started");
        let first = "primary newConnectionsPerSecond is reached: 3 new connections over it so far";
        assert_eq!(at(2, counters(10, 0)), (Some(first.into()), primary(3)));
        assert_eq!(at(30, counters(100, 500)), (None, primary(3)), "the minute is not over yet");
        let second = "backup concurrentConnections is reached: 500 new connections over it in the last minute";
        assert_eq!(
            at(62, counters(100, 500)),
            (Some(second.into()), Some(("backup concurrentConnections".into(), 593)))
        );
        assert_eq!(at(122, counters(100, 500)), (None, None), "nothing was over a limit for a minute");
        assert!(at(124, counters(101, 500)).0.is_some(), "the next excess is reported at once");
    }
}
