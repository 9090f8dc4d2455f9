//! The open time: how long the breaker stays open. It is the base time multiplied by the number of trips in a row,
//! with jitter, up to a cap. The number of trips decays again while the breaker is closed.

use std::time::Duration;

use crate::{model::BreakerPolicy, time::Instant};

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

    /// Subtracts one trip for each `policy.decay` that the breaker has been closed (Envoy decrements its ejection
    /// multiplier in the same way). If `decay` is zero, all trips are forgotten as soon as the breaker is closed.
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

    /// The open time of the latest trip. Jitter shortens or lengthens it, but never beyond `policy.max_open`.
    pub(super) fn open_time(&mut self, policy: &BreakerPolicy) -> Duration {
        let grown = policy.open.saturating_mul(self.trips.max(1)).min(policy.max_open);
        let span = grown.mul_f64(f64::from(policy.jitter_percent.min(100)) / 100.0);
        (grown.saturating_sub(span) + span.mul_f64(2.0 * self.next_unit())).min(policy.max_open)
    }

    /// A pseudo-random number from 0 to 1 (splitmix64). Jitter needs no better generator, and tests need a
    /// reproducible one.
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
