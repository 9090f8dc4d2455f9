//! A sliding window over observations. It trips at a failure rate, once it holds enough observations for a rate.

use std::collections::VecDeque;

use crate::{model::FailureWindow, time::Instant};

#[derive(Clone, Debug)]
pub(super) struct Window {
    rule: FailureWindow,
    seen: VecDeque<(Instant, bool)>,
    failures: usize,
}

/// Largest number of observations that the window holds, whatever their rate: it bounds the memory. The oldest are
/// dropped first, so at a high rate the window covers less time than `rule.length`.
const MAX_OBSERVATIONS: usize = 10_000;

impl Window {
    pub(super) fn new(rule: FailureWindow) -> Self {
        Self { rule, seen: VecDeque::new(), failures: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.seen.clear();
        self.failures = 0;
    }

    /// Adds an observation. Returns true if the window holds the minimum volume and the failure rate is reached.
    pub(super) fn observe(&mut self, now: Instant, pass: bool) -> bool {
        self.seen.push_back((now, pass));
        self.failures += usize::from(!pass);
        while self.seen.len() > MAX_OBSERVATIONS
            || self.seen.front().is_some_and(|(at, _)| now.saturating_sub(*at) > self.rule.length)
        {
            if let Some((_, passed)) = self.seen.pop_front() {
                self.failures -= usize::from(!passed);
            }
        }
        self.seen.len() >= self.rule.minimum_volume.max(1) as usize
            && self.failures * 100 >= usize::from(self.rule.failure_rate_percent.max(1)) * self.seen.len()
    }
}
