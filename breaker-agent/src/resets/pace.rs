//! The pace of resets: clients connect anew at once, and not all of them at the same time.

use std::time::Duration;

use tokio::time::Instant;

/// Number of connections that are reset without a pause.
const AT_ONCE: u32 = 200;
/// Mean length of a step. All connections that are due within one come at its end: a wake-up for each would cost as much as
/// the reset.
const STEP: Duration = Duration::from_millis(5);

/// Says when the next connection is due: a token bucket that holds [`AT_ONCE`] tokens at the beginning and is not filled
/// up again. Steps are of random length, so that clients do not come in a rhythm.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    interval: Duration,
    at_once: u32,
    due: Instant,
    /// Mean length of a step, and the end of the one under way.
    step: Duration,
    step_end: Instant,
}

impl Pace {
    /// `per_second`: connections a second after the first [`AT_ONCE`]; at least 1.
    pub(super) fn new(per_second: u32, now: Instant) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self { interval, at_once: AT_ONCE, due: now, step: STEP, step_end: now }
    }

    /// The same without connections at once, and without steps.
    pub(super) fn steady(per_second: u32, now: Instant) -> Self {
        Self { at_once: 0, step: Duration::ZERO, ..Self::new(per_second, now) }
    }

    /// When the next connection is due. Time that passed unused is not made up for.
    pub(super) fn next(&mut self, now: Instant) -> Instant {
        if self.at_once > 0 {
            self.at_once -= 1;
            (self.due, self.step_end) = (now, now);
            return now;
        }
        // A timer is late by up to a millisecond: only what is longer ago was not used.
        let earliest = now.checked_sub(Duration::from_millis(20)).unwrap_or(now);
        self.due = self.due.max(earliest) + self.interval;
        if self.due > self.step_end {
            self.step_end = self.due + self.step.mul_f64(0.5 + fastrand::f64());
        }
        self.step_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// In no second more connections are due than the first ones and the pace together, and a pace that is kept up
        /// with is reached.
        #[test]
        fn the_pace_is_kept(per_second in 1u32..20_000, late_us in 0u64..2_000) {
            let start = crate::clock::instant();
            let mut pace = Pace::new(per_second, start);
            let mut now = start;
            let count = AT_ONCE + per_second.min(5_000);
            for n in 0..count {
                let due = pace.next(now);
                now = now.max(due + Duration::from_micros(if n >= AT_ONCE && due > now { late_us } else { 0 }));
                let allowed = f64::from(AT_ONCE) + (now - start).as_secs_f64() * f64::from(per_second) + 1.0;
                prop_assert!(f64::from(n) <= allowed, "{n} after {:?}", now - start);
            }
            // The last one comes at the end of a step.
            let planned = f64::from(count - AT_ONCE) / f64::from(per_second);
            prop_assert!((now - start).as_secs_f64() <= planned * 1.1 + 0.02, "{:?} of {planned} s", now - start);
        }
    }
}
