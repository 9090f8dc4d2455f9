//! Bounds what one service can write to the journal: a service whose breaker flaps fills neither the log nor the list of
//! events. What is left out is counted, and told in one line.

use std::{collections::BTreeMap, time::Duration};

use crate::{model::ServiceName, time::Instant};

/// Lines of a service that are written at once.
const BURST: u32 = 60;
/// Afterwards, one more line is written in each interval of this length.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long lines are left out before a summary tells their number.
const SUMMARY: Duration = Duration::from_secs(10);

/// What was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    /// Number of lines.
    pub lines: u64,
    /// In which time.
    pub during: Duration,
}

/// Token buckets of the services that wrote lately.
#[derive(Debug, Default)]
pub(super) struct FloodGuard {
    buckets: BTreeMap<ServiceName, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Lines that may be written at once.
    room: u32,
    /// When `room` was last increased.
    filled: Instant,
    left_out: u64,
    /// When the first line since the last summary was left out.
    since: Instant,
}

impl FloodGuard {
    /// Creates a guard that has seen nothing yet.
    pub const fn new() -> Self {
        Self { buckets: BTreeMap::new() }
    }

    /// Asks for one line of a service. Returns whether it may be written.
    pub fn admit(&mut self, now: Instant, service: &ServiceName) -> bool {
        let new = || Bucket { room: BURST, filled: now, left_out: 0, since: now };
        let bucket = self.buckets.entry(service.clone()).or_insert_with(new);
        bucket.fill(now);
        if bucket.room > 0 {
            bucket.room -= 1;
            return true;
        }
        if bucket.left_out == 0 {
            bucket.since = now;
        }
        bucket.left_out += 1;
        false
    }

    /// Returns the summaries that are due, and forgets the services that were silent for long.
    pub fn summaries(&mut self, now: Instant) -> Vec<(ServiceName, LeftOut)> {
        let mut due = Vec::new();
        self.buckets.retain(|service, bucket| {
            bucket.fill(now);
            let during = now.saturating_sub(bucket.since);
            if bucket.left_out > 0 && during >= SUMMARY {
                due.push((service.clone(), LeftOut { lines: std::mem::take(&mut bucket.left_out), during }));
            }
            bucket.left_out > 0 || bucket.room < BURST
        });
        due
    }
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let intervals = now.saturating_sub(self.filled).as_millis() / INTERVAL.as_millis();
        let more = u32::try_from(intervals).unwrap_or(u32::MAX);
        self.room = self.room.saturating_add(more).min(BURST);
        self.filled += INTERVAL.saturating_mul(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flapping_service_is_bounded_and_the_rest_is_told() {
        let (mut guard, noisy, quiet) = (FloodGuard::new(), ServiceName::new("noisy"), ServiceName::new("quiet"));
        let mut written = 0;
        let mut summaries = Vec::new();
        for ms in (0..60_000).step_by(10) {
            let now = Duration::from_millis(ms);
            written += u32::from(guard.admit(now, &noisy));
            summaries.extend(guard.summaries(now));
        }
        assert!((BURST..=BURST + 60).contains(&written), "{written}");
        assert!((4..=6).contains(&summaries.len()), "{summaries:?}");
        let told: u64 = summaries.iter().map(|(_, left_out)| left_out.lines).sum();
        assert!(told > 4000, "{told}");
        assert!(guard.admit(Duration::from_mins(1), &quiet), "one service must not silence another");
    }

    #[test]
    fn a_silent_service_is_forgotten() {
        let (mut guard, service) = (FloodGuard::new(), ServiceName::new("a"));
        assert!(guard.admit(Duration::ZERO, &service));
        assert!(guard.summaries(Duration::from_secs(5)).is_empty());
        assert!(guard.buckets.is_empty());
    }
}
