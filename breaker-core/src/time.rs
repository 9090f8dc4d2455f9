//! The two clocks, as values. Only the agent reads clocks (its `clock.rs`); the functions of this crate take the
//! time as an argument.

use std::time::Duration;

/// A point on a clock that never goes back, as the time since an origin that the caller chose.
pub type Instant = Duration;

/// A point on the wall clock, nanoseconds since 1970-01-01 UTC.
pub type UnixNanos = u64;

/// The time on both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The monotonic clock, on which all decisions are based.
    pub mono: Instant,
    /// The wall clock, for output and for times in the maps, which outlive the agent.
    pub unix_ns: UnixNanos,
}

/// Adds `by` to a wall-clock time. `None` on overflow, in the year 2554.
#[must_use]
pub fn later(unix_ns: UnixNanos, by: Duration) -> Option<UnixNanos> {
    unix_ns.checked_add(u64::try_from(by.as_nanos()).ok()?)
}

/// The time from `earlier` to `later`; zero if the clock was set back in between.
#[must_use]
pub const fn elapsed(earlier: UnixNanos, later: UnixNanos) -> Duration {
    Duration::from_nanos(later.saturating_sub(earlier))
}
