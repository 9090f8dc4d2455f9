//! Keys and values of the maps.

use crate::{BreakerState, EventKind, FlowKind, NONE, StateReason};

/// IPPROTO_TCP (RFC 9293).
pub const PROTO_TCP: u8 = 6;

/// An IPv4 destination or source: key of `ENDPOINTS4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EndpointKey4 {
    /// Address, wire order.
    pub addr: [u8; 4],
    /// Port, wire order.
    pub port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
}

impl EndpointKey4 {
    /// A key from wire-order parts.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: [u8; 4], port: [u8; 2], proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
    }
}

/// What an address is to us: value of `ENDPOINTS4`. It may be both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointRole {
    /// The service that it is a frontend of, or [`NONE`].
    pub service: u32,
    /// The backend that it is, or [`NONE`].
    pub backend: u32,
}

impl EndpointRole {
    /// Neither.
    pub const NOTHING: Self = Self { service: NONE, backend: NONE };
}

/// The word that everything hangs on: value of `SWITCHES`, read and written as one aligned 64-bit word, so that
/// state, share, policy and epoch change together. `S` is [`BreakerState`] in the programs, `u8` in userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Switch<S = BreakerState> {
    /// Counts the changes of state; a flow remembers the one in which it was decided.
    pub epoch: u32,
    /// How many of 1000 flow hashes go to the primary.
    pub share: u16,
    /// Where the breaker stands.
    pub state: S,
    /// Bits of [`switch_flags`].
    pub flags: u8,
}

/// Bits of [`Switch::flags`].
pub mod switch_flags {
    /// Flows may exist that the tables must be asked for; without it a data packet costs one look-up.
    pub const TRACK: u8 = 1;
    /// Reset established flows that are on the primary and were decided in an older epoch, or never seen.
    pub const RESET_PRIMARY: u8 = 1 << 1;
    /// Reset established flows that are on a backup and were decided in an older epoch.
    pub const RESET_BACKUP: u8 = 1 << 2;
    /// Decide and count, rewrite nothing.
    pub const DRY_RUN: u8 = 1 << 3;
    /// Go on by the last decision when the agent's lease runs out.
    pub const HOLD: u8 = 1 << 4;
    /// Which of the two buffers of slot tables holds.
    pub const BUFFER: u8 = 1 << 5;
}

impl<S> Switch<S> {
    /// Whether a bit of [`switch_flags`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The buffer of slot tables that holds: 0 or 1.
    #[inline(always)]
    #[must_use]
    pub const fn buffer(&self) -> u32 {
        if self.has(switch_flags::BUFFER) { 1 } else { 0 }
    }
}

impl Switch<u8> {
    /// The word as the map holds it (native byte order: kernel and agent are on one machine).
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let e = self.epoch.to_ne_bytes();
        let s = self.share.to_ne_bytes();
        u64::from_ne_bytes([e[0], e[1], e[2], e[3], s[0], s[1], self.state, self.flags])
    }

    /// The reverse of [`Switch::to_word`].
    #[inline(always)]
    #[must_use]
    pub const fn from_word(word: u64) -> Self {
        let b = word.to_ne_bytes();
        Self {
            epoch: u32::from_ne_bytes([b[0], b[1], b[2], b[3]]),
            share: u16::from_ne_bytes([b[4], b[5]]),
            state: b[6],
            flags: b[7],
        }
    }
}

/// Longest service name: a Kubernetes namespace and name with a slash between them would be longer than anyone
/// writes; a file's names are refused beyond it.
pub const NAME_LEN: usize = 128;

/// What the agent must find again after a restart: value of `SERVICES`. `R` is [`StateReason`] in the programs,
/// `u8` in userspace. An entry whose name is empty is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceRecord<R = StateReason> {
    /// UTF-8, filled up with zeros.
    pub name: [u8; NAME_LEN],
    /// Since when it is in its state, `CLOCK_REALTIME`.
    pub since_unix_ns: u64,
    /// When an operator's word ends, `CLOCK_REALTIME`; 0 = never.
    pub override_until_unix_ns: u64,
    /// Mixed into the flow hash, so that two services do not move the same clients.
    pub seed: u32,
    /// Connections that a half-open breaker lets through to the primary.
    pub half_open_limit: u32,
    /// Trips in a row, for the backoff.
    pub trips: u32,
    /// Why it is in its state.
    pub reason: R,
    /// 0 none, 1 forced open, 2 forced closed.
    pub override_kind: u8,
    /// Always 0.
    pub pad: u16,
}

/// What the programs keep for a service: value of `RUNTIME`, changed by compare-and-swap as one 64-bit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct ServiceRuntime {
    /// The epoch that the programs met last.
    pub epoch: u32,
    /// Connections let through to the primary in this epoch while half-open.
    pub half_open_taken: u32,
}

/// One destination: value of `BACKENDS4`, index = backend id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend4 {
    /// Address, wire order.
    pub addr: [u8; 4],
    /// Port, wire order.
    pub port: [u8; 2],
    /// IP protocol number; 0 = the entry is free.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
    /// Bits of [`backend_use`]: set by the programs, cleared by the agent when no flow is left.
    pub in_use: u32,
    /// Always 0.
    pub pad2: u32,
}

/// Bits of [`Backend4::in_use`].
pub mod backend_use {
    /// Replies of this backend may need translation.
    pub const REDIRECTED: u32 = 1;
    /// Direct connections to this backend may need another source port.
    pub const DIRECT: u32 = 2;
}

/// A connection as its client sees it: key of `FLOWS4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey4 {
    /// Client's address, wire order.
    pub client: [u8; 4],
    /// Address that the client connects to, wire order.
    pub vip: [u8; 4],
    /// Client's port, wire order.
    pub client_port: [u8; 2],
    /// Port that the client connects to, wire order.
    pub vip_port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// The pinned decision for a connection: value of `FLOWS4`. `K` is [`FlowKind`] in the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow4<K = FlowKind> {
    /// Where the connection goes, wire order.
    pub backend: [u8; 4],
    /// Its port, wire order.
    pub backend_port: [u8; 2],
    /// The client's port as the backend sees it, wire order; another one than the client's only after a collision.
    pub source_port: [u8; 2],
    /// Index of the service, [`NONE`] for a direct connection.
    pub service: u32,
    /// Backend id, [`NONE`] for a passed one.
    pub backend_id: u32,
    /// The service's epoch when it was decided.
    pub epoch: u32,
    /// What was decided.
    pub kind: K,
    /// Bits of [`tcp_seen`], from the client's packets.
    pub tcp_seen: u8,
    /// Always 0.
    pub pad: u16,
    /// When its SYN came.
    pub created_ns: u64,
    /// The agent's heartbeat at the last packet of the client (a second's resolution, and no clock to read).
    pub last_seen_ns: u64,
}

/// Bits of [`Flow4::tcp_seen`] and [`Reverse4::tcp_seen`].
pub mod tcp_seen {
    /// A FIN passed.
    pub const FIN: u8 = 1;
    /// A RST passed.
    pub const RST: u8 = 2;
    /// A SYN-ACK passed.
    pub const SYN_ACK: u8 = 4;
}

/// A connection as its backend sees it: key of `REVERSE4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ReverseKey4 {
    /// Backend's address, wire order.
    pub backend: [u8; 4],
    /// Client's address, wire order.
    pub client: [u8; 4],
    /// Backend's port, wire order.
    pub backend_port: [u8; 2],
    /// Client's port as the backend sees it, wire order.
    pub client_port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// How to translate a reply back: value of `REVERSE4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Reverse4 {
    /// Address that the client connected to, wire order.
    pub vip: [u8; 4],
    /// Its port, wire order.
    pub vip_port: [u8; 2],
    /// The client's own port, wire order.
    pub client_port: [u8; 2],
    /// Index of the service, [`NONE`] for a direct connection.
    pub service: u32,
    /// Bits of [`tcp_seen`], from the backend's packets.
    pub tcp_seen: u8,
    /// Always 0.
    pub pad: [u8; 3],
    /// The agent's heartbeat at the last packet of the backend.
    pub last_seen_ns: u64,
}

/// The agent's sign of life: the one value of `HEARTBEAT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Heartbeat {
    /// When the agent beat last; 0 = it left on purpose and nothing is enforced.
    pub beat_ns: u64,
    /// How long its word holds without another beat; 0 = for ever.
    pub lease_ns: u64,
    /// When it beat last, `CLOCK_REALTIME`: for people.
    pub beat_unix_ns: u64,
    /// Its process id in its own pid namespace.
    pub pid: u32,
    /// [`crate::ABI_VERSION`] of the agent that wrote it.
    pub abi_version: u32,
}

/// What happened to a service's packets on one CPU: value of `COUNTERS`, index = service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceCounters {
    /// New connections left to the primary.
    pub new_primary: u64,
    /// New connections sent to a backup.
    pub new_backup: u64,
    /// New connections refused.
    pub rejected: u64,
    /// New connections let through to the primary while half-open (part of `new_primary`).
    pub half_open: u64,
    /// Segments answered with a reset, because their connection was established on the wrong side.
    pub resets: u64,
    /// Packets translated on their way to a backup, and their way back.
    pub translated: u64,
    /// New connections that needed another source port, because theirs was taken toward the backend.
    pub port_changed: u64,
    /// New connections whose client was the chosen backup itself.
    pub hairpin: u64,
    /// New connections that would have gone to a backup, were this not a dry run.
    pub dry_run: u64,
    /// New connections left to the primary because the agent's lease ran out.
    pub agent_lost: u64,
    /// New connections left to the primary because something failed: see `REASONS`.
    pub failed_open: u64,
}

/// What the ring buffer carries. `E` is [`EventKind`] in the programs, `u8` in userspace; `R` likewise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event<E = EventKind, R = BreakerState> {
    /// When.
    pub at_ns: u64,
    /// Index of the service.
    pub service: u32,
    /// The service's epoch.
    pub epoch: u32,
    /// Client's address, wire order; zero where there is none.
    pub client: [u8; 4],
    /// Address that it connected to, wire order.
    pub vip: [u8; 4],
    /// Where it went, wire order.
    pub backend: [u8; 4],
    /// Client's port, wire order.
    pub client_port: [u8; 2],
    /// Port that it connected to, wire order.
    pub vip_port: [u8; 2],
    /// Where it went, wire order.
    pub backend_port: [u8; 2],
    /// What happened.
    pub kind: E,
    /// The state that the programs acted on.
    pub state: R,
    /// Always 0.
    pub pad: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    /// Sizes are the ABI: whoever changes one raises `ABI_VERSION`.
    #[test]
    fn sizes_are_pinned() {
        assert_eq!(crate::ABI_VERSION, 1, "check every number below when you raise this");
        assert_eq!(size_of::<EndpointKey4>(), 8);
        assert_eq!(size_of::<EndpointRole>(), 8);
        assert_eq!((size_of::<Switch>(), align_of::<Switch>()), (8, 8));
        assert_eq!(size_of::<ServiceRecord>(), 160);
        assert_eq!((size_of::<ServiceRuntime>(), align_of::<ServiceRuntime>()), (8, 8));
        assert_eq!(size_of::<Backend4>(), 16);
        assert_eq!(size_of::<FlowKey4>(), 16);
        assert_eq!(size_of::<Flow4>(), 40);
        assert_eq!(size_of::<ReverseKey4>(), 16);
        assert_eq!(size_of::<Reverse4>(), 24);
        assert_eq!(size_of::<Heartbeat>(), 32);
        assert_eq!(size_of::<ServiceCounters>(), 88);
        assert_eq!(size_of::<Event>(), 40);
    }

    #[test]
    fn userspace_and_programs_agree_on_the_layout() {
        assert_eq!(size_of::<Switch>(), size_of::<Switch<u8>>());
        assert_eq!(size_of::<ServiceRecord>(), size_of::<ServiceRecord<u8>>());
        assert_eq!(size_of::<Flow4>(), size_of::<Flow4<u8>>());
        assert_eq!(size_of::<Event>(), size_of::<Event<u8, u8>>());
    }

    /// The last field ends where the type ends: no hole at the end; the sums above leave none in between.
    #[test]
    fn no_implicit_padding() {
        assert_eq!(offset_of!(ServiceRecord, pad) + 2, size_of::<ServiceRecord>());
        assert_eq!(offset_of!(Flow4, last_seen_ns) + 8, 4 + 2 + 2 + 4 + 4 + 4 + 1 + 1 + 2 + 8 + 8);
        assert_eq!(offset_of!(Reverse4, last_seen_ns) + 8, 4 + 2 + 2 + 4 + 1 + 3 + 8);
        assert_eq!(offset_of!(Event, pad) + 4, 8 + 4 + 4 + 4 + 4 + 4 + 2 + 2 + 2 + 1 + 1 + 4);
    }

    #[test]
    fn the_switch_is_one_word() {
        let switch = Switch { epoch: 0x0102_0304, share: 999, state: BreakerState::HalfOpen as u8, flags: 0x21 };
        assert_eq!(Switch::from_word(switch.to_word()), switch);
        assert_eq!(switch.buffer(), 1);
        assert_eq!(offset_of!(Switch<u8>, share), 4);
        assert_eq!(offset_of!(Switch<u8>, state), 6);
    }

    #[test]
    fn numbers_convert_back_and_unknown_ones_do_not() {
        for &reason in StateReason::ALL {
            assert_eq!(StateReason::try_from(reason as u8), Ok(reason));
        }
        assert_eq!(BreakerState::try_from(3), Err(crate::UnknownNumber(3)));
    }
}
