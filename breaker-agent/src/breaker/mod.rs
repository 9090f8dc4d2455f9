//! The circuit breaker: a pure state machine. Time comes in as an argument, transitions go out as values; nothing in
//! here reads a clock, a map or a socket.
//!
//! ```text
//!             primary Down, failure rate, no endpoints, operator
//!   ┌────────┐ ─────────────────────────────────────────────▶ ┌──────┐
//!   │ Closed │                                                │ Open │
//!   └────────┘ ◀────────── half-open connections = 0 ──────── └──────┘
//!        ▲                                                     │    ▲
//!        │ enough passes,            open time over, primary Up│    │ primary Down
//!        │ or time over and primary Up                         ▼    │
//!        └───────────────────────────────────────────────── ┌──────────┐
//!                                                           │ HalfOpen │
//!                                                           └──────────┘
//! ```

mod backoff;
mod window;

use std::time::Duration;

use breaker_common::{BreakerState, SHARE_ALL, StateReason};
use serde::Serialize;

use crate::{
    model::{BreakerPolicy, Override},
    pool::TierHealth,
};
use backoff::Backoff;
use window::Window;

/// Time on a clock that never goes back, from an origin that the caller chose.
pub type Instant = Duration;

/// A change of state: what is logged, counted, shown and published; one source for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Transition {
    /// From.
    #[serde(serialize_with = "serialize_state")]
    pub from: BreakerState,
    /// To.
    #[serde(serialize_with = "serialize_state")]
    pub to: BreakerState,
    /// Why.
    #[serde(serialize_with = "serialize_reason")]
    pub reason: StateReason,
    /// When.
    #[serde(skip)]
    pub at: Instant,
}

fn serialize_state<S: serde::Serializer>(state: &BreakerState, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(state.label())
}

fn serialize_reason<S: serde::Serializer>(reason: &StateReason, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(reason.label())
}

/// Where a restarted agent finds its breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The state.
    pub state: BreakerState,
    /// Why.
    pub reason: StateReason,
    /// How long it is in it already.
    pub age: Duration,
    /// Trips in a row.
    pub trips: u32,
}

/// One service's breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    policy: BreakerPolicy,
    state: BreakerState,
    since: Instant,
    reason: StateReason,
    /// When an open breaker may be tried, or a half-open one must end.
    deadline: Instant,
    /// Passes seen while half-open.
    passes: u32,
    /// Where the ramp began; `None` when it is over or there is none.
    ramp_from: Option<Instant>,
    override_: Override,
    primary: TierHealth,
    /// What the last failure was.
    cause: StateReason,
    backoff: Backoff,
    window: Option<Window>,
}

impl Breaker {
    /// A closed breaker. `seed` makes its jitter its own.
    #[must_use]
    pub fn new(policy: BreakerPolicy, seed: u64, now: Instant) -> Self {
        Self {
            state: BreakerState::Closed,
            since: now,
            reason: StateReason::Initial,
            deadline: now,
            passes: 0,
            ramp_from: None,
            override_: Override::Auto,
            primary: TierHealth::Unknown,
            cause: StateReason::NoEndpoints,
            backoff: Backoff::new(seed),
            window: policy.window.map(Window::new),
            policy,
        }
    }

    /// A breaker as it was when an earlier agent ended.
    #[must_use]
    pub fn restore(policy: BreakerPolicy, seed: u64, now: Instant, was: Restored) -> Self {
        let mut breaker = Self::new(policy, seed, now);
        breaker.state = was.state;
        breaker.reason = was.reason;
        breaker.since = now.saturating_sub(was.age);
        breaker.backoff.restore(was.trips, now);
        breaker.deadline = match was.state {
            BreakerState::Closed => now,
            BreakerState::Open => now + breaker.backoff.open_time(&breaker.policy).saturating_sub(was.age),
            BreakerState::HalfOpen => now + breaker.policy.half_open_timeout.saturating_sub(was.age),
        };
        breaker
    }

    /// The state.
    #[must_use]
    pub const fn state(&self) -> BreakerState {
        self.state
    }

    /// Since when.
    #[must_use]
    pub const fn since(&self) -> Instant {
        self.since
    }

    /// Why.
    #[must_use]
    pub const fn reason(&self) -> StateReason {
        self.reason
    }

    /// Trips in a row.
    #[must_use]
    pub const fn trips(&self) -> u32 {
        self.backoff.trips()
    }

    /// What the operator wants.
    #[must_use]
    pub const fn operator(&self) -> Override {
        self.override_
    }

    /// What the checks said of the primary last.
    #[must_use]
    pub const fn primary(&self) -> TierHealth {
        self.primary
    }

    /// The primary's part of new connections, permille. Half-open counts as 0: its few are given out one by one.
    #[must_use]
    pub fn share(&self, now: Instant) -> u16 {
        match (self.state, self.ramp_from) {
            (BreakerState::Open | BreakerState::HalfOpen, _) => 0,
            (BreakerState::Closed, None) => SHARE_ALL,
            (BreakerState::Closed, Some(from)) => {
                let passed = now.saturating_sub(from).as_millis();
                let whole = self.policy.ramp.as_millis().max(1);
                if passed >= whole {
                    return SHARE_ALL;
                }
                let start = u128::from(self.policy.ramp_start.min(SHARE_ALL));
                let grown = start + (u128::from(SHARE_ALL) - start) * passed / whole;
                u16::try_from(grown).unwrap_or(SHARE_ALL)
            }
        }
    }

    /// When something will change by time alone; `None` = never.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.state {
            BreakerState::Closed => self.ramp_from.map(|from| from + self.policy.ramp),
            // Without a primary that is Up, time alone changes nothing.
            BreakerState::Open => {
                (self.override_ == Override::Auto && self.primary == TierHealth::Up).then_some(self.deadline)
            }
            BreakerState::HalfOpen => Some(self.deadline),
        }
    }

    /// The policy changed; the state stays, and times that are running keep their ends.
    pub fn set_policy(&mut self, policy: BreakerPolicy) {
        if policy.window != self.policy.window {
            self.window = policy.window.map(Window::new);
        }
        self.policy = policy;
    }

    /// One observation of a primary backend. `health` is what the tier as a whole is by now, `cause` what a failure
    /// was.
    pub fn observe(&mut self, now: Instant, pass: bool, health: TierHealth, cause: StateReason) -> Option<Transition> {
        if self.state == BreakerState::HalfOpen && pass {
            self.passes += 1;
        }
        if !pass {
            self.cause = cause;
        }
        let rate_tripped = self.window.as_mut().is_some_and(|w| w.observe(now, pass));
        self.primary = health;
        if rate_tripped && self.state == BreakerState::Closed && self.override_ == Override::Auto {
            return self.trip(now, StateReason::FailureRate);
        }
        self.step(now)
    }

    /// The set of primary backends changed, without an observation.
    pub fn set_primary(&mut self, now: Instant, health: TierHealth) -> Option<Transition> {
        self.primary = health;
        self.step(now)
    }

    /// Time went on.
    pub fn tick(&mut self, now: Instant) -> Option<Transition> {
        self.backoff.decay(now, &self.policy, self.state == BreakerState::Closed);
        if let Some(from) = self.ramp_from
            && now >= from + self.policy.ramp
        {
            self.ramp_from = None;
        }
        self.step(now)
    }

    /// The operator's word.
    pub fn set_override(&mut self, now: Instant, wanted: Override, expired: bool) -> Option<Transition> {
        let before = self.override_;
        self.override_ = wanted;
        let reason = if expired { StateReason::OverrideExpired } else { StateReason::Operator };
        match wanted {
            Override::ForceOpen if self.state != BreakerState::Open => {
                Some(self.enter(now, BreakerState::Open, reason))
            }
            Override::ForceClosed if self.state != BreakerState::Closed => {
                Some(self.enter(now, BreakerState::Closed, reason))
            }
            Override::Auto if before == Override::ForceOpen => {
                // What an operator opened is not owed an open time.
                self.deadline = now;
                // Without knowing that the primary is well, wait for its checks to say so.
                match self.primary {
                    TierHealth::Up => self.leave_open(now, reason),
                    TierHealth::Unknown | TierHealth::Down | TierHealth::Empty => None,
                }
            }
            Override::Auto if before == Override::ForceClosed => self.step(now),
            _ => None,
        }
    }

    /// The operator wants a fresh start: no override, no backoff, no memory; closed unless the primary is Down now.
    pub fn reset(&mut self, now: Instant) -> Option<Transition> {
        self.override_ = Override::Auto;
        self.backoff.forget();
        if let Some(window) = &mut self.window {
            window.clear();
        }
        if self.state == BreakerState::Open {
            self.deadline = now;
        }
        match (self.state, self.primary) {
            (BreakerState::Closed, _) | (_, TierHealth::Down | TierHealth::Empty) => self.step(now),
            _ => Some(self.enter(now, BreakerState::Closed, StateReason::Operator)),
        }
    }

    /// What follows from the primary's health and the time.
    fn step(&mut self, now: Instant) -> Option<Transition> {
        if self.override_ != Override::Auto {
            return None;
        }
        let bad = match self.primary {
            TierHealth::Down => Some(self.cause),
            TierHealth::Empty => Some(StateReason::NoEndpoints),
            TierHealth::Up | TierHealth::Unknown => None,
        };
        match (self.state, bad) {
            (BreakerState::Closed | BreakerState::HalfOpen, Some(reason)) => self.trip(now, reason),
            (BreakerState::Closed, None) | (BreakerState::Open, Some(_)) => None,
            (BreakerState::Open, None) if now >= self.deadline && self.primary == TierHealth::Up => {
                self.leave_open(now, StateReason::Recovered)
            }
            (BreakerState::Open, None) => None,
            (BreakerState::HalfOpen, None) => {
                let enough = self.passes >= self.policy.half_open_passes.max(1);
                (enough || now >= self.deadline)
                    .then(|| self.enter(now, BreakerState::Closed, StateReason::TrialPassed))
            }
        }
    }

    fn leave_open(&mut self, now: Instant, reason: StateReason) -> Option<Transition> {
        Some(if self.policy.half_open_connections == 0 {
            self.enter(now, BreakerState::Closed, reason)
        } else {
            self.enter(now, BreakerState::HalfOpen, StateReason::OpenTimeOver)
        })
    }

    fn trip(&mut self, now: Instant, reason: StateReason) -> Option<Transition> {
        self.backoff.trip(now);
        Some(self.enter(now, BreakerState::Open, reason))
    }

    fn enter(&mut self, now: Instant, to: BreakerState, reason: StateReason) -> Transition {
        let from = std::mem::replace(&mut self.state, to);
        self.since = now;
        self.reason = reason;
        self.passes = 0;
        self.ramp_from = None;
        match to {
            BreakerState::Open => self.deadline = now + self.backoff.open_time(&self.policy),
            BreakerState::HalfOpen => self.deadline = now + self.policy.half_open_timeout,
            BreakerState::Closed => {
                if !self.policy.ramp.is_zero() {
                    self.ramp_from = Some(now);
                }
                // What was seen before says nothing of the primary as it is now.
                if let Some(window) = &mut self.window {
                    window.clear();
                }
            }
        }
        Transition { from, to, reason, at: now }
    }
}

#[cfg(test)]
mod tests;
