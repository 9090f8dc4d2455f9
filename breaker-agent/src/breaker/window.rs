//! A sliding window over observations: trips on a rate, once there is enough to speak of a rate.

use std::collections::VecDeque;

use super::Instant;
use crate::model::FailureWindow;

#[derive(Clone, Debug)]
pub(super) struct Window {
    rule: FailureWindow,
    seen: VecDeque<(Instant, bool)>,
    failures: usize,
}

/// The window's memory is bounded, whatever the rate of observations: the oldest go first.
const MOST: usize = 10_000;

impl Window {
    pub(super) fn new(rule: FailureWindow) -> Self {
        Self { rule, seen: VecDeque::new(), failures: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.seen.clear();
        self.failures = 0;
    }

    /// Takes in an observation; true when the rule is broken.
    pub(super) fn observe(&mut self, now: Instant, pass: bool) -> bool {
        self.seen.push_back((now, pass));
        self.failures += usize::from(!pass);
        while self.seen.len() > MOST
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
