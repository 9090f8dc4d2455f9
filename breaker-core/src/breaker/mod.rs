//! The circuit breaker: a pure state machine. The time is an argument and a transition is a return value. Nothing
//! in this module reads a clock, a map or a socket.
//!
//! Closed means that traffic flows to the primary.
//!
//! ```text
//!             primary Down, failure rate, no endpoints, operator
//!   ┌────────┐ ─────────────────────────────────────────────▶ ┌──────┐
//!   │ Closed │                                                │ Open │
//!   └────────┘ ◀────────── half-open connections = 0 ──────── └──────┘
//!        ▲                                                     │    ▲
//!        │ enough passes, or         open time over, primary Up│    │ primary Down
//!        │ time over and primary not Down                      ▼    │
//!        └───────────────────────────────────────────────── ┌──────────┐
//!                                                           │ HalfOpen │
//!                                                           └──────────┘
//! ```

mod backoff;
mod window;

use std::time::Duration;

use breaker_common::{BreakerState, SHARE_ALL, StateReason};

use crate::{
    model::{BreakerPolicy, Override},
    pool::TierHealth,
    time::Instant,
};
use backoff::Backoff;
use window::Window;

/// A change of state, or of the reason for being open: a breaker that an operator opened goes from open to open if the
/// override ends while the primary is Down or has no backends. The log, the counters, the status and the published
/// events are all derived from this value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The old state.
    pub from: BreakerState,
    /// The new state.
    pub to: BreakerState,
    /// Why the breaker is in the new state.
    pub reason: StateReason,
}

/// The state of a breaker that a restarted agent found in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The state.
    pub state: BreakerState,
    /// Why the breaker is in this state.
    pub reason: StateReason,
    /// How long the breaker has been in this state.
    pub age: Duration,
    /// Number of trips in a row.
    pub trips: u32,
}

/// The breaker of one service.
#[derive(Clone, Debug)]
pub struct Breaker {
    policy: BreakerPolicy,
    state: BreakerState,
    reason: StateReason,
    /// When an open breaker may first leave its state, or when a half-open breaker must leave it.
    deadline: Instant,
    /// Number of passed probes of the primary since the breaker became half-open.
    passes: u32,
    /// When the ramp began; `None` if no ramp is running.
    ramp_from: Option<Instant>,
    override_: Override,
    primary: TierHealth,
    /// The cause of the latest failure.
    cause: StateReason,
    backoff: Backoff,
    window: Option<Window>,
}

impl Breaker {
    /// Creates a closed breaker. `seed` is the seed of its jitter; different services should have different seeds.
    #[must_use]
    pub fn new(policy: BreakerPolicy, seed: u64, now: Instant) -> Self {
        Self {
            state: BreakerState::Closed,
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

    /// Recreates a breaker in the state that an earlier agent left. The time already spent in the state counts
    /// toward its deadline.
    #[must_use]
    pub fn restore(policy: BreakerPolicy, seed: u64, now: Instant, was: Restored) -> Self {
        let mut breaker = Self::new(policy, seed, now);
        breaker.state = was.state;
        // A closed breaker cannot be closed because of a failure: such a pair is of a service that was being removed.
        breaker.reason = if was.state == BreakerState::Closed && was.reason.is_failure() {
            StateReason::Initial
        } else {
            was.reason
        };
        breaker.backoff.restore(was.trips, now);
        breaker.deadline = match was.state {
            BreakerState::Closed => now,
            BreakerState::Open => now + breaker.backoff.open_time(&breaker.policy).saturating_sub(was.age),
            BreakerState::HalfOpen => now + breaker.policy.half_open_timeout.saturating_sub(was.age),
        };
        breaker
    }

    /// The current state.
    #[must_use]
    pub const fn state(&self) -> BreakerState {
        self.state
    }

    /// Why the breaker entered its state.
    #[must_use]
    pub const fn reason(&self) -> StateReason {
        self.reason
    }

    /// Number of trips in a row, after decay.
    #[must_use]
    pub const fn trips(&self) -> u32 {
        self.backoff.trips()
    }

    /// The override.
    #[must_use]
    pub const fn operator(&self) -> Override {
        self.override_
    }

    /// The health of the primary at the last input.
    #[must_use]
    pub const fn primary(&self) -> TierHealth {
        self.primary
    }

    /// The primary's share of new connections that are chosen by hash, permille. It is 0 while half-open: there,
    /// connections reach the primary by permit, one by one.
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

    /// When the state or the ramp changes because time passed; `None` if only another input can change them.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.state {
            BreakerState::Closed => self.ramp_from.map(|from| from + self.policy.ramp),
            // An open breaker leaves its state only when the primary is Up. Until then, time alone changes nothing.
            BreakerState::Open => {
                (self.override_ == Override::Auto && self.primary == TierHealth::Up).then_some(self.deadline)
            }
            BreakerState::HalfOpen => Some(self.deadline),
        }
    }

    /// Replaces the policy. The state stays, and a deadline that is already set is kept. A running ramp follows the
    /// new policy. A changed failure window starts empty.
    pub fn set_policy(&mut self, policy: BreakerPolicy) {
        if policy.window != self.policy.window {
            self.window = policy.window.map(Window::new);
        }
        self.policy = policy;
    }

    /// Processes one probe of a primary backend. `health` is the health of the whole primary tier after the probe,
    /// and `cause` is the reason of the failure, used only if `pass` is false.
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

    /// Processes a new health of the primary that is not the result of a probe, for example because its set of
    /// backends changed.
    pub fn set_primary(&mut self, now: Instant, health: TierHealth) -> Option<Transition> {
        self.primary = health;
        self.step(now)
    }

    /// Does what is due at `now`: decay of the backoff, end of the ramp, end of the open or half-open time.
    pub fn tick(&mut self, now: Instant) -> Option<Transition> {
        self.backoff.decay(now, &self.policy, self.state == BreakerState::Closed);
        if let Some(from) = self.ramp_from
            && now >= from + self.policy.ramp
        {
            self.ramp_from = None;
        }
        self.step(now)
    }

    /// Sets the override. A forced transition has the reason `Operator`. With `Auto`, the measurements decide again.
    /// `expired`: whether the time limit of an operator override ran out; the transition then has the reason
    /// `OverrideExpired`.
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
                // A breaker that an operator opened need not stay open for an open time.
                self.deadline = now;
                match self.primary {
                    TierHealth::Up => self.leave_open(now, reason),
                    // If the primary is not known to be Up, wait for its checks.
                    TierHealth::Unknown | TierHealth::Down | TierHealth::Empty => self.step(now),
                }
            }
            Override::Auto if before == Override::ForceClosed => self.step(now),
            _ => None,
        }
    }

    /// Restarts the breaker at the operator's request: removes the override, the backoff and the content of the
    /// failure window. Afterwards the breaker is closed, unless the primary is Down or has no backends.
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

    /// Makes the transition, if any, that follows from the primary's health and the time. An override other than
    /// `Auto` prevents it.
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
            // The override that opened the breaker is over, and now the failure keeps it open.
            (BreakerState::Open, Some(reason)) if !self.reason.is_failure() => self.trip(now, reason),
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
                // Observations from before the transition do not describe the primary as it is now.
                if let Some(window) = &mut self.window {
                    window.clear();
                }
            }
        }
        Transition { from, to, reason }
    }
}

#[cfg(test)]
mod tests;
