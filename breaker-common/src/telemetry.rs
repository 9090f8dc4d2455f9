//! Heartbeat, counters and events: data that the agent and the programs exchange, and that operators read.

use crate::{BreakerState, EventKind, addr::V6};

/// The agent's heartbeat: the single value of `HEARTBEAT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Heartbeat {
    /// Time of the last heartbeat; 0 = no agent has written one yet.
    pub beat_ns: u64,
    /// How long the programs trust the agent's decisions after a heartbeat; 0 = for ever.
    pub lease_ns: u64,
    /// Time of the last heartbeat, `CLOCK_REALTIME`, for display.
    pub beat_unix_ns: u64,
    /// The agent's process id in its own pid namespace.
    pub pid: u32,
    /// [`crate::ABI_VERSION`] of the agent.
    pub abi_version: u32,
    /// 1 if a service may have fast-path flows. Only then do the programs also look up the source of packets that
    /// pods send.
    pub fast: u32,
    /// 1 if a service limits concurrent connections. Only then do the programs act when a socket in the host network
    /// namespace is closed.
    pub counts_sockets: u32,
}

/// Counters of one service: value of `COUNTERS`, which has one for each CPU, and of `MORE_COUNTERS`. The key is the
/// service's index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceCounters {
    /// New connections left to the primary.
    pub new_primary: u64,
    /// New connections sent to a backup.
    pub new_backup: u64,
    /// New connections refused.
    pub rejected: u64,
    /// Trial connections to the primary while half-open (included in `new_primary`).
    pub half_open: u64,
    /// Segments of established flows that were answered with resets, by the policy `onOpen: Reset` or
    /// `onClose: Reset`.
    pub resets: u64,
    /// Packets that were translated, in both directions.
    pub translated: u64,
    /// ICMP errors about translated packets that were translated too.
    pub icmp_errors: u64,
    /// New connections that got another source port, because the client's port was taken toward the backend.
    pub port_changed: u64,
    /// New connections whose client is the selected backup itself (hairpin).
    pub hairpin: u64,
    /// New connections that a dry run would have sent to a backup or refused.
    pub dry_run: u64,
    /// New connections left to the primary because the agent's lease had run out.
    pub agent_lost: u64,
    /// New connections left to the primary because of an error; `REASONS` counts the errors by [`crate::PassReason`].
    pub failed_open: u64,
    /// SYN-ACKs of the primary that came after the client's repeated SYN had been sent to a backup. They were dropped.
    pub late_answers: u64,
}

/// An event in the ring buffer `EVENTS`.
///
/// `E` is [`EventKind`] in the programs and `u8` in userspace; `R` is [`BreakerState`] or `u8`. IPv4 addresses are
/// in their IPv4-mapped IPv6 form, `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event<E = EventKind, R = BreakerState, A = V6> {
    /// When the event happened.
    pub at_ns: u64,
    /// Index of the service.
    pub service: u32,
    /// The service's epoch.
    pub epoch: u32,
    /// Client's address, wire order; zero if unknown.
    pub client: A,
    /// Address that the client connected to, wire order.
    pub vip: A,
    /// Address of the backend that the connection was sent to, wire order; zero if none.
    pub backend: A,
    /// Client's port, wire order.
    pub client_port: [u8; 2],
    /// Port that the client connected to, wire order.
    pub vip_port: [u8; 2],
    /// Port of the backend that the connection was sent to, wire order; zero if none.
    pub backend_port: [u8; 2],
    /// What happened.
    pub kind: E,
    /// The breaker's state when the program decided.
    pub state: R,
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 7],
}
