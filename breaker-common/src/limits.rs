//! What stands in the maps about limits: what is configured, the buckets and counts that the programs keep, and which
//! connections and clients they belong to.
//!
//! A *limiter* is a tier of a service: its index is twice the service's, plus 0 for the primary or 1 for the backup.
//!
//! Connections and clients are found by a 64-bit *tag*, a keyed hash of what they are told apart by, in one of two buckets of
//! [`WAYS`] places. A place is claimed by compare-and-swap of its tag, and free when that is 0.

use crate::V6;

/// Places in a bucket: their tags fill one cache line.
pub const WAYS: usize = 8;

/// The limits of one tier: part of [`ServiceLimits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TierLimits {
    /// Time for one new connection; 0 = no limit. See [`crate::gcra`].
    pub interval_ns: u64,
    /// How far the theoretical arrival time may be ahead.
    pub tolerance_ns: u64,
    /// As `interval_ns`, for each client.
    pub client_interval_ns: u64,
    /// As `tolerance_ns`, for each client.
    pub client_tolerance_ns: u64,
    /// Connections at the same time; 0 = no limit.
    pub concurrent: u32,
    /// As `concurrent`, for each client.
    pub client_concurrent: u32,
    /// What happens over a limit: a [`crate::LimitAction`].
    pub action: u32,
    /// Always 0.
    pub pad: u32,
}

impl TierLimits {
    /// Whether connections at the same time are limited.
    #[inline(always)]
    #[must_use]
    pub const fn counts(&self) -> bool {
        self.concurrent | self.client_concurrent != 0
    }

    /// Whether there is a limit for each client.
    #[inline(always)]
    #[must_use]
    pub const fn tells_clients(&self) -> bool {
        self.client_interval_ns != 0 || self.client_concurrent != 0
    }

    /// Whether there is any limit.
    #[inline(always)]
    #[must_use]
    pub const fn any(&self) -> bool {
        self.interval_ns != 0 || self.counts() || self.tells_clients()
    }
}

/// A service's limits: value of `LIMITS`, index = service. Means something while [`crate::switch_flags::LIMITED`] is set.
/// Written by the agent; a packet meanwhile may see some of the old and some of the new limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceLimits {
    /// The primary's and the backup's.
    pub tiers: [TierLimits; 2],
    /// Mixed into tags. Random, so that nobody can choose addresses that share a place.
    pub hash_key: u64,
    /// Bits of an IPv6 client's address that tell clients apart, wire order.
    pub client_mask: V6,
    /// Bits of [`limit_flags`].
    pub flags: u32,
    /// Always 0.
    pub pad: u32,
}

impl ServiceLimits {
    /// No limits at all.
    pub const NONE: Self = Self {
        tiers: [TierLimits {
            interval_ns: 0,
            tolerance_ns: 0,
            client_interval_ns: 0,
            client_tolerance_ns: 0,
            concurrent: 0,
            client_concurrent: 0,
            action: 0,
            pad: 0,
        }; 2],
        hash_key: 0,
        client_mask: V6::new([0; 16]),
        flags: 0,
        pad: 0,
    };
}

/// Bits of [`ServiceLimits::flags`].
pub mod limit_flags {
    /// Every packet of the service's clients is taken as a sign that its connection lives.
    pub const CENSUS: u32 = 1;
}

/// What the programs keep for a limiter: value of `LIMITERS`. A cache line of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Limiter {
    /// Theoretical arrival time of the next new connection.
    pub arrival_ns: u64,
    /// Connections that are counted.
    pub concurrent: u32,
    /// Of the primary: 1 after a new connection was sent to the backup because of a limit. Set by the programs, cleared by
    /// the agent.
    pub overflowed: u32,
    /// Always 0.
    pub pad: [u64; 6],
}

/// Places for connections or clients: value of `CONNECTIONS` and `CLIENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Bucket<S> {
    /// Tags; 0 = the place is free.
    pub tags: [u64; WAYS],
    /// What is known, by place.
    pub states: [S; WAYS],
}

/// A connection to a service with limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ConnectionState {
    /// Its limiter.
    pub limiter: u32,
    /// The sequence number of its SYN, so that one that is sent again is recognized; 0 for datagrams.
    pub number: u32,
    /// When a sign of life was seen last, in ticks (see [`crate::TICK_SHIFT`]).
    pub last_tick: u32,
    /// Bits of [`connection_state`], and above them how often the place was taken: see [`CONNECTION_TURN`].
    pub state: u32,
    /// The place of its client in `CLIENTS` plus 1; 0 = none.
    pub client: u32,
    /// Always 0.
    pub pad: u32,
}

/// Added to [`ConnectionState::state`] each time the place is taken, so that what is known of an earlier connection does not
/// change a later one.
pub const CONNECTION_TURN: u32 = 1 << 8;

/// Bits of [`ConnectionState::state`].
pub mod connection_state {
    /// It is part of [`super::Limiter::concurrent`]. Whoever clears this bit counts down.
    pub const COUNTED: u32 = 1;
    /// The server answered.
    pub const ANSWERED: u32 = 1 << 1;
    /// The client sent its FIN.
    pub const CLIENT_FIN: u32 = 1 << 2;
    /// The server sent its FIN.
    pub const SERVER_FIN: u32 = 1 << 3;
    /// A flow of datagrams.
    pub const DATAGRAMS: u32 = 1 << 4;
    /// A socket of the node's own, whose packets are not seen.
    pub const SOCKET: u32 = 1 << 5;
}

/// A client of a limiter with limits for each client.
///
/// A client whose bucket is full and that has no connections is as good as one never seen: its place may be taken, and nothing
/// is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ClientState {
    /// Theoretical arrival time of its next new connection.
    pub arrival_ns: u64,
    /// Its connections that are counted.
    pub concurrent: u32,
    /// Always 0.
    pub pad: u32,
}

/// A client that was refused: value of `LIMITED`, a list of those that are refused most often. A client that finds all of its
/// four places taken counts the last of them down, and takes it over at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LimitedClient {
    /// Its address, wire order, IPv4 in its mapped form; an IPv6 address without the bits that do not tell clients apart.
    /// Zero: a process of the node itself.
    pub client: V6,
    /// The limiter that refused it, plus 1; 0 = the place is free.
    pub limiter: u32,
    /// Which window of [`LIMITED_WINDOW_SHIFT`] `count` is of.
    pub window: u32,
    /// How often it was refused in that window.
    pub count: u32,
    /// How often in the window before.
    pub before: u32,
}

/// A window of [`LimitedClient`] is 2^36 ns of `CLOCK_MONOTONIC`: 69 seconds.
pub const LIMITED_WINDOW_SHIFT: u32 = 36;

/// What limits did on one CPU: value of `LIMIT_COUNTERS`, index = service. Refused connections are by tier (0 = primary) and
/// [`crate::LimitKind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LimitCounters {
    /// New connections over a limit: refused, or sent to the other tier.
    pub limited: [[u64; 4]; 2],
    /// New connections that would have been over a limit, were this not a dry run.
    pub dry_run: [[u64; 4]; 2],
    /// New connections sent to the backup because the primary was at a limit (part of `limited`).
    pub failed_over: u64,
    /// New connections admitted because every compare-and-swap lost its race.
    pub contended: u64,
    /// First packets of connections that were admitted before: sent again, or datagrams of a known flow.
    pub repeated: u64,
    /// New connections admitted and not counted, because there was no room to remember them or their client.
    pub untracked: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{offset_of, size_of};

    #[test]
    fn sizes_are_pinned() {
        assert_eq!((size_of::<TierLimits>(), size_of::<ServiceLimits>()), (48, 128));
        assert_eq!(size_of::<Limiter>(), 64);
        assert_eq!((size_of::<ConnectionState>(), size_of::<Bucket<ConnectionState>>()), (24, 256));
        assert_eq!((size_of::<ClientState>(), size_of::<Bucket<ClientState>>()), (16, 192));
        assert_eq!(size_of::<LimitedClient>(), 32);
        assert_eq!(size_of::<LimitCounters>(), 160);
        assert_eq!(offset_of!(ServiceLimits, pad) + 4, size_of::<ServiceLimits>());
        assert_eq!(offset_of!(Limiter, pad), 16);
    }
}
