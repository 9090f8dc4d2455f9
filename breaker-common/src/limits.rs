//! Layout of the maps for limits: the configured limits, the token buckets and connection counts that the programs
//! maintain, and the connections and clients that are remembered.
//!
//! A *limiter* is one tier of one service. Its index is twice the service's index, plus 0 for the primary or 1 for
//! the backup.
//!
//! Connections and clients are identified by a 64-bit *tag*, a hash that is never 0. A tag's entry is in one of two
//! buckets of [`WAYS`] entries each. An entry is free if its tag is 0, and is claimed by compare-and-swap of the
//! tag.

use crate::V6;

/// Entries in a bucket. Their tags fill one cache line (64 bytes).
pub const WAYS: usize = 8;

/// The limits of one tier: part of [`ServiceLimits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TierLimits {
    /// Time for one new connection; 0 = no limit. `interval` in [`crate::gcra`].
    pub interval_ns: u64,
    /// How far the theoretical arrival time may be ahead of now. `tolerance` in [`crate::gcra`].
    pub tolerance_ns: u64,
    /// As `interval_ns`, for each client separately.
    pub client_interval_ns: u64,
    /// As `tolerance_ns`, for each client separately.
    pub client_tolerance_ns: u64,
    /// Maximum number of concurrent connections; 0 = no limit.
    pub concurrent: u32,
    /// As `concurrent`, for each client separately.
    pub client_concurrent: u32,
    /// What happens to a connection over a limit: the number of a [`crate::LimitAction`].
    pub action: u32,
    /// Always 0.
    pub pad: u32,
}

impl TierLimits {
    /// Returns whether concurrent connections are limited, so that connections must be counted.
    #[inline(always)]
    #[must_use]
    pub const fn counts_connections(&self) -> bool {
        self.concurrent | self.client_concurrent != 0
    }

    /// Returns whether there is a limit per client.
    #[inline(always)]
    #[must_use]
    pub const fn has_client_limits(&self) -> bool {
        self.client_interval_ns != 0 || self.client_concurrent != 0
    }

    /// Returns whether there is any limit.
    #[inline(always)]
    #[must_use]
    pub const fn any(&self) -> bool {
        self.interval_ns != 0 || self.counts_connections() || self.has_client_limits()
    }
}

/// Limits of a service: value of `LIMITS`. The index is the service's.
///
/// The value is meaningful while [`crate::switch_flags::LIMITED`] is set. The agent writes it field by field: a
/// packet that passes at the same time may see some old and some new limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceLimits {
    /// Limits by tier: 0 = primary, 1 = backup.
    pub tiers: [TierLimits; 2],
    /// Key of the tag hash. It is random, so that nobody can choose addresses that share an entry.
    pub hash_key: u64,
    /// Mask of the bits of an IPv6 address that identify a client, wire order.
    pub client_mask: V6,
    /// Bits of [`limit_flags`].
    pub flags: u32,
    /// Always 0.
    pub pad: u32,
}

impl ServiceLimits {
    /// No limits.
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
    /// Census: every packet of a client marks its connection as alive, not only SYN, FIN and RST. The agent asks for
    /// it while a limit on concurrent connections is nearly reached.
    pub const CENSUS: u32 = 1;
}

/// State of a limiter, maintained by the programs: value of `LIMITERS`. It fills one cache line, so that limiters do
/// not slow each other down by false sharing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Limiter {
    /// Theoretical arrival time (see [`crate::gcra`]).
    pub arrival_ns: u64,
    /// Number of counted connections.
    pub concurrent: u32,
    /// Used in the primary's limiter only: 1 after a new connection was sent to the backup because of a limit. The
    /// programs set it; the agent clears it.
    pub overflowed: u32,
    /// Always 0.
    pub pad: [u64; 6],
}

/// A bucket with entries for connections or clients: value of `CONNECTIONS` and `CLIENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Bucket<S> {
    /// Tag of each entry; 0 = the entry is free.
    pub tags: [u64; WAYS],
    /// State of each entry.
    pub states: [S; WAYS],
}

/// An admitted connection to a service with limits: state of an entry in `CONNECTIONS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ConnectionState {
    /// Index of the limiter that admitted the connection.
    pub limiter: u32,
    /// Sequence number of the SYN as it is in memory, by which a retransmitted SYN is recognized; 0 for datagrams.
    pub number: u32,
    /// When the connection was last known to be alive, in ticks (see [`crate::TICK_SHIFT`]).
    pub last_seen_tick: u32,
    /// Bits of [`connection_state`]. The bits above them count how often the entry was claimed; see
    /// [`ENTRY_GENERATION`].
    pub state: u32,
    /// Index of the client's entry in `CLIENTS`, counted over all buckets, plus 1; 0 = none.
    pub client: u32,
    /// Always 0.
    pub pad: u32,
}

/// Added to [`ConnectionState::state`] each time the entry is claimed. A compare-and-swap based on an earlier
/// connection's state then fails, so it cannot change a later connection in the same entry.
pub const ENTRY_GENERATION: u32 = 1 << 8;

/// Bits of [`ConnectionState::state`].
pub mod connection_state {
    /// The connection is included in [`super::Limiter::concurrent`]. Whoever clears this bit decrements that counter.
    pub const COUNTED: u32 = 1;
    /// The server answered.
    pub const ANSWERED: u32 = 1 << 1;
    /// The client sent its FIN.
    pub const CLIENT_FIN: u32 = 1 << 2;
    /// The server sent its FIN.
    pub const SERVER_FIN: u32 = 1 << 3;
    /// The entry is a flow of datagrams.
    pub const DATAGRAMS: u32 = 1 << 4;
    /// The entry is a socket in the host network namespace, whose packets the programs do not see.
    pub const SOCKET: u32 = 1 << 5;
}

/// A client of a tier with per-client limits: state of an entry in `CLIENTS`.
///
/// A client without connections and with a full token bucket is equivalent to a new client, so its entry may be
/// reused without loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ClientState {
    /// Theoretical arrival time (see [`crate::gcra`]).
    pub arrival_ns: u64,
    /// Number of the client's counted connections.
    pub concurrent: u32,
    /// Always 0.
    pub pad: u32,
}

/// A client that a limit refused: value of `LIMITED`, the list of the clients that are refused most often.
///
/// A client may be in one of four entries. If other clients occupy all four, each refusal of this client decrements
/// the count of the last one, and the client takes that entry over when the count is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct LimitedClient {
    /// Client's address, wire order, IPv4 in its IPv4-mapped IPv6 form. Of an IPv6 address, only the bits that
    /// identify a client (see [`ServiceLimits::client_mask`]). Zero: the processes in the host network namespace.
    pub client: V6,
    /// Index of the limiter that refused the client, plus 1; 0 = the entry is free.
    pub limiter: u32,
    /// Number of the window that `count` belongs to (time shifted right by [`LIMITED_WINDOW_SHIFT`]).
    pub window: u32,
    /// How often the client was refused in that window.
    pub count: u32,
    /// How often the client was refused in the window before.
    pub before: u32,
}

/// A window of [`LimitedClient`] is 2^36 ns (69 s) of `CLOCK_MONOTONIC`.
pub const LIMITED_WINDOW_SHIFT: u32 = 36;

/// Counters of the limits of one service: value of `LIMIT_COUNTERS`. The index is the service's. The
/// arrays are indexed by tier (0 = primary) and [`crate::LimitKind`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LimitCounters {
    /// New connections over a limit that were refused or sent to the backup.
    pub limited: [[u64; 4]; 2],
    /// New connections that would have been over a limit if this were not a dry run.
    pub dry_run: [[u64; 4]; 2],
    /// New connections that were sent on to the backup because the primary was at a limit (included in `limited`).
    /// The backup's own limits may still have refused them.
    pub failed_over: u64,
    /// New connections admitted although their limit was not enforced: every compare-and-swap lost its race, or a
    /// count was at its limit after the agent's lease had run out.
    pub contended: u64,
    /// First packets of connections that were already admitted: retransmitted SYNs, or datagrams of a known flow.
    pub repeated: u64,
    /// New connections that were admitted and not counted, because their entry or their client's entry could not be
    /// created.
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
