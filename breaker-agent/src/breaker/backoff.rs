//! How long the breaker stays open: base × trips in a row, capped, jittered, decaying again.

use std::time::Duration;

use super::Instant;
use crate::model::BreakerPolicy;

#[derive(Clone, Debug)]
pub(super) struct Backoff {
    trips: u32,
    last: Instant,
    random: u64,
}

impl Backoff {
    pub(super) fn new(seed: u64) -> Self {
        Self { trips: 0, last: Duration::ZERO, random: seed }
    }

    pub(super) const fn trips(&self) -> u32 {
        self.trips
    }

    pub(super) fn restore(&mut self, trips: u32, now: Instant) {
        self.trips = trips;
        self.last = now;
    }

    pub(super) fn trip(&mut self, now: Instant) {
        self.trips = self.trips.saturating_add(1);
        self.last = now;
    }

    pub(super) fn forget(&mut self) {
        self.trips = 0;
    }

    /// Forgets one trip per `decay` of being closed (Envoy decrements its ejection multiplier likewise).
    pub(super) fn decay(&mut self, now: Instant, policy: &BreakerPolicy, closed: bool) {
        if !closed {
            self.last = self.last.max(now);
            return;
        }
        if policy.decay.is_zero() {
            self.trips = 0;
        }
        while self.trips > 0 && now.saturating_sub(self.last) >= policy.decay {
            self.trips -= 1;
            self.last += policy.decay;
        }
    }

    /// The open time of the trip that was counted last; jitter shortens or lengthens it, never beyond the cap.
    pub(super) fn open_time(&mut self, policy: &BreakerPolicy) -> Duration {
        let grown = policy.open.saturating_mul(self.trips.max(1)).min(policy.max_open);
        let span = grown.mul_f64(f64::from(policy.jitter_percent.min(100)) / 100.0);
        (grown.saturating_sub(span) + span.mul_f64(2.0 * self.next_unit())).min(policy.max_open)
    }

    /// A number in 0..1 (splitmix64): jitter needs no more, and tests need it to repeat.
    fn next_unit(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.random;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[expect(clippy::cast_precision_loss, reason = "32 bits fit a double exactly")]
        let unit = (x >> 32) as f64 / f64::from(u32::MAX);
        unit
    }
}
