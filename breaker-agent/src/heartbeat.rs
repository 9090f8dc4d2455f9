//! How long the programs trust the agent: the lease, and its extension while the agent is being replaced.

use std::time::Duration;

use breaker_core::time::Instant;

/// Interval between two heartbeats.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// Number of heartbeats between two looks at what others may have taken away.
const RESTORE: u32 = 5;
/// Number of heartbeats between two searches for a socket load balancer.
const SOCKET_LB_SCAN: u32 = 30;

/// The lease of this agent.
#[derive(Debug)]
pub struct Lease {
    /// The configured lease; zero never expires.
    configured: Duration,
    /// End of the extension, while this agent is about to be replaced; `None` without an extension.
    handover_until: Option<Instant>,
    beats: u32,
}

impl Lease {
    /// Creates a lease with the configured duration; zero never expires.
    #[must_use]
    pub const fn new(configured: Duration) -> Self {
        Self { configured, handover_until: None, beats: 0 }
    }

    /// Extends the lease: the programs trust the last decision for `duration`, even without an agent.
    pub fn hand_over(&mut self, now: Instant, duration: Duration) {
        self.handover_until = Some(now + duration);
    }

    /// Counts a heartbeat, and returns the lease to send with it.
    pub fn beat(&mut self, now: Instant) -> Duration {
        self.beats = self.beats.wrapping_add(1);
        match self.handover_until {
            // The agent was not replaced in time, or not at all: return to the usual lease.
            Some(until) if until <= now => self.handover_until = None,
            // A lease of zero never expires and need not be extended.
            Some(until) if !self.configured.is_zero() => return self.configured.max(until - now),
            _ => {}
        }
        self.configured
    }

    /// Whether it is time to look at what others may have taken away.
    #[must_use]
    pub const fn is_restore_due(&self) -> bool {
        self.beats.is_multiple_of(RESTORE)
    }

    /// Whether it is time to search for a socket load balancer again.
    #[must_use]
    pub const fn is_scan_due(&self) -> bool {
        self.beats.is_multiple_of(SOCKET_LB_SCAN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_handover_extends_the_lease_until_it_is_over() {
        let mut lease = Lease::new(SECOND * 5);
        assert_eq!(lease.beat(SECOND), SECOND * 5);
        lease.hand_over(SECOND, SECOND * 60);
        assert_eq!(lease.beat(SECOND * 2), SECOND * 59);
        assert_eq!(lease.beat(SECOND * 58), SECOND * 5, "never shorter than configured");
        assert_eq!(lease.beat(SECOND * 61), SECOND * 5);
    }

    #[test]
    fn a_lease_of_zero_is_not_extended() {
        let mut lease = Lease::new(Duration::ZERO);
        lease.hand_over(SECOND, SECOND * 60);
        assert_eq!(lease.beat(SECOND * 2), Duration::ZERO);
    }
}
