//! The clocks. In the agent, only this file reads them (clippy's `disallowed-methods`). All other code gets the time
//! as an argument, or calls the functions here.
#![allow(clippy::disallowed_methods, reason = "see above")]

use std::time::Duration;

use breaker_core::time::{Now, UnixNanos};
use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// Both clocks of the main loop, with the start of the agent as the origin of the monotonic one.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that starts now.
    #[must_use]
    pub fn start() -> Self {
        Self { origin: instant() }
    }

    /// The time on both clocks.
    #[must_use]
    pub fn now(&self) -> Now {
        Now { mono: self.origin.elapsed(), unix_ns: unix_nanos(wall()) }
    }

    /// The instant for tokio's timers at which the monotonic clock shows `mono`.
    #[must_use]
    pub fn instant_of(&self, mono: Duration) -> Instant {
        self.origin + mono
    }
}

/// The monotonic clock of tokio, which tests can pause.
#[must_use]
pub fn instant() -> Instant {
    Instant::now()
}

/// The monotonic clock, to measure how long something takes.
#[must_use]
pub fn stopwatch() -> std::time::Instant {
    std::time::Instant::now()
}

/// Time that has passed since a value of [`stopwatch`].
#[must_use]
pub fn since(start: std::time::Instant) -> Duration {
    start.elapsed()
}

/// Returns the time in nanoseconds of the clock that the programs use (`bpf_ktime_get_coarse_ns`): `CLOCK_MONOTONIC`.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// The clock that also counts while the machine is suspended: `CLOCK_BOOTTIME`.
#[must_use]
pub fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The wall clock.
#[must_use]
pub fn wall() -> Timestamp {
    Timestamp::now()
}

/// Converts a wall-clock time to the number that the engine and the maps use.
#[must_use]
pub fn unix_nanos(time: Timestamp) -> UnixNanos {
    u64::try_from(time.as_nanosecond()).unwrap_or(0)
}

/// Converts the number that the engine and the maps use to a wall-clock time.
#[must_use]
pub fn timestamp(unix_ns: UnixNanos) -> Timestamp {
    // 2^64 nanoseconds end in the year 2554, a Timestamp in 9999.
    Timestamp::from_nanosecond(i128::from(unix_ns)).unwrap_or_default()
}
