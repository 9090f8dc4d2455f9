//! Keys and values of the maps.

use crate::{BreakerState, EventKind, FlowKind, NONE, StateReason};

/// IPPROTO_TCP (RFC 9293).
pub const PROTO_TCP: u8 = 6;
/// IPPROTO_UDP (RFC 768).
pub const PROTO_UDP: u8 = 17;

/// An address as it stands in a packet, in wire order. Every map that is keyed by addresses exists once for each family,
/// with the family's number at the end of its name.
pub trait Address: Copy + Eq + Ord + core::hash::Hash + core::fmt::Debug + 'static {
    /// All zeros.
    const ZERO: Self;
    /// 4 or 6.
    const VERSION: u8;

    /// In 64 bits, for hashes: the words as they are in memory, so that it is the same for whoever holds the address as words.
    fn folded(self) -> u64;
}

/// Folds an IPv6 address's words; see [`Address::folded`].
#[inline(always)]
#[must_use]
pub const fn fold_words(words: [u32; 4]) -> u64 {
    let [a, b, c, d] = words;
    (((a as u64) << 32) | b as u64).wrapping_mul(GOLDEN) ^ (((c as u64) << 32) | d as u64)
}

/// 2^64 divided by the golden ratio, odd: multiplying by it spreads what differs little.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// An IPv4 address as it stands in maps. Aligned as the word that the programs take it for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct V4 {
    /// Wire order.
    pub bytes: [u8; 4],
}

/// An IPv6 address as it stands in maps. Aligned as the words that the programs take it for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct V6 {
    /// Wire order.
    pub bytes: [u8; 16],
}

impl V4 {
    /// From wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(bytes: [u8; 4]) -> Self {
        Self { bytes }
    }
}

impl V6 {
    /// From wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self { bytes }
    }
}

impl core::fmt::Debug for V4 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::Ipv4Addr::from(self.bytes), f)
    }
}

impl core::fmt::Debug for V6 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&core::net::Ipv6Addr::from(self.bytes), f)
    }
}

impl Address for V4 {
    const ZERO: Self = Self::new([0; 4]);
    const VERSION: u8 = 4;

    #[inline(always)]
    fn folded(self) -> u64 {
        u32::from_ne_bytes(self.bytes) as u64
    }
}

impl Address for V6 {
    const ZERO: Self = Self::new([0; 16]);
    const VERSION: u8 = 6;

    #[inline(always)]
    fn folded(self) -> u64 {
        let word = |at: usize| {
            u32::from_ne_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
        };
        fold_words([word(0), word(4), word(8), word(12)])
    }
}

/// What is known of 64 places of endpoints, a bit for each: value of `FILTER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FilterWords {
    /// A frontend is there: what may be the first packet of a flow counts.
    pub frontend: u64,
    /// Every packet counts: a backend is there, or a frontend of a service whose flows are looked for ([`switch_flags::TRACK`]).
    pub every: u64,
}

/// Set in a protocol number, it names a second bit of a frontend in `FILTER`, among those of [`FilterWords::frontend`]: its
/// service counts connections, so the segments that begin and end them (SYN, FIN, RST) take the full path. No IP protocol
/// that has frontends has this bit.
pub const COUNTED: u8 = 0x80;

/// Where an endpoint's bit is in `FILTER`: index of the words, and the bit in them.
#[inline(always)]
#[must_use]
pub fn filter_bit<A: Address>(addr: A, port: [u8; 2], proto: u8) -> (u32, u64) {
    let rest = ((u16::from_ne_bytes(port) as u64) << 32) | ((proto as u64) << 48);
    let hash = (addr.folded() ^ rest).wrapping_mul(GOLDEN);
    ((hash >> (64 - crate::FILTER_WORDS.ilog2())) as u32, 1 << ((hash >> 32) & 63))
}

/// A destination or source: key of `ENDPOINTS4` and `ENDPOINTS6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EndpointKey<A> {
    /// Address, wire order.
    pub addr: A,
    /// Port, wire order.
    pub port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
}

impl<A> EndpointKey<A> {
    /// A key from wire-order parts.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: A, port: [u8; 2], proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
    }
}

/// What an address is to us: value of `ENDPOINTS4` and `ENDPOINTS6`. It may be both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointRole {
    /// The service that it is a frontend of, or [`NONE`].
    pub service: u32,
    /// Index of the frontend's [`Route`]; means nothing without a service.
    pub route: u32,
    /// The backend (of the address's family) that it is, or [`NONE`].
    pub backend: u32,
}

impl EndpointRole {
    /// Neither.
    pub const NOTHING: Self = Self { service: NONE, route: NONE, backend: NONE };
}

/// Where connections to a frontend may go: value of `ROUTES`. A service has one for each family, protocol and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Route {
    /// By buffer ([`switch_flags::BUFFER`]) and tier (0 = primary): index of a selection table in `SLOTS`, or
    /// [`crate::SLOT_PASSTHROUGH`], [`crate::SLOT_REJECT`], or [`crate::TABLE_OF_ONE`] and a backend's id, for a table that
    /// would hold nothing else.
    pub tables: [[u32; 2]; 2],
    /// Bits of [`route_flags`].
    pub flags: u32,
}

impl Route {
    /// Everything is left to kube-proxy.
    pub const NOTHING: Self = Self { tables: [[crate::SLOT_PASSTHROUGH; 2]; 2], flags: 0 };
}

/// A selection table: value of `SLOTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Backend ids, [`crate::SLOT_PASSTHROUGH`] or [`crate::SLOT_REJECT`]. The first [`crate::SLOTS`] mean something; the rest, zeros,
    /// is there for the verifier, which must see that an index is inside.
    pub slots: [u32; crate::SLOTS.next_power_of_two() as usize],
}

/// Bits of [`Route::flags`].
pub mod route_flags {
    /// A client outside keeps its address toward a backend of this node (`externalTrafficPolicy: Local`).
    pub const KEEP_CLIENT: u32 = 1;
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
    /// Flows may exist that the tables must be asked for; without it a data packet costs a glance.
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
    /// New flows to a backup pod of this node leave the stack out (`fastPath: PeerRedirect`).
    pub const FAST: u8 = 1 << 6;
    /// The service has limits: see [`crate::ServiceLimits`].
    pub const LIMITED: u8 = 1 << 7;
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

/// One destination: value of `BACKENDS4` and `BACKENDS6`, index = backend id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend<A> {
    /// Address, wire order.
    pub addr: A,
    /// Port, wire order.
    pub port: [u8; 2],
    /// IP protocol number; 0 = the entry is free.
    pub proto: u8,
    /// Always 0.
    pub pad: u8,
    /// Bits of [`backend_use`]: set by the programs, cleared by the agent when no flow is left.
    pub in_use: u32,
    /// Index of the host-side interface of the pod that it is, if it is on this node and that interface has our programs;
    /// 0 otherwise. Written by the agent.
    pub ifindex: u32,
}

/// Bits of [`Backend::in_use`].
pub mod backend_use {
    /// Replies of this backend may need translation.
    pub const REDIRECTED: u32 = 1;
    /// Direct connections to this backend may need another source port.
    pub const DIRECT: u32 = 2;
    /// Replies of this backend may go to their client's veth at once.
    pub const FAST: u32 = 4;
}

/// A connection as its client sees it: key of `FLOWS*` and `PENDING*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct FlowKey<A> {
    /// Client's address, wire order.
    pub client: A,
    /// Address that the client connects to, wire order.
    pub vip: A,
    /// Client's port, wire order.
    pub client_port: [u8; 2],
    /// Port that the client connects to, wire order.
    pub vip_port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// A tick is 2^30 ns of `CLOCK_MONOTONIC`, a little more than a second: fine enough for flows, and half the size.
pub const TICK_SHIFT: u32 = 30;

/// The pinned decision for a connection: value of `FLOWS*` and `PENDING*`. `K` is [`FlowKind`] in the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow<A, K = FlowKind> {
    /// Where the connection goes, wire order.
    pub backend: A,
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
    /// Bits of [`seen`], from the client's packets.
    pub seen: u8,
    /// Bits of [`flow_way`].
    pub way: u8,
    /// Always 0.
    pub pad: u8,
    /// When its first packet came, in ticks (see [`TICK_SHIFT`]).
    pub created_tick: u32,
    /// The agent's heartbeat at the last packet of the client, in ticks (no clock to read).
    pub last_seen_tick: u32,
}

/// Bits of [`Flow::way`]: how a flow's packets go, decided with the first one. A connection that netfilter has not seen
/// from the start is INVALID to it.
pub mod flow_way {
    /// From interface to interface, without the stack: into the backend's veth, and its answers back from there.
    pub const FAST: u8 = 1;
    /// From outside under the client's own address: nothing is masqueraded.
    pub const KEEP_CLIENT: u8 = 2;
}

/// Where packets go that leave the stack out: an interface's index, and one bit. Indices are positive numbers of 31 bits
/// (`struct ifreq`, netdevice(7)).
pub mod exit {
    /// Through the stack.
    pub const STACK: u32 = 0;
    /// Out of the interface, to the neighbor that the node's routes name; without it, into the namespace behind a veth.
    pub const NEIGHBOR: u32 = 1 << 31;
}

/// Bits of [`Flow::seen`] and [`Reverse::seen`].
pub mod seen {
    /// A FIN passed.
    pub const FIN: u8 = 1;
    /// A RST passed.
    pub const RST: u8 = 2;
    /// The backend answered: a SYN-ACK, or any datagram.
    pub const ANSWERED: u8 = 4;
}

/// A connection as its backend sees it: key of `REVERSE*` and `PENDING_REVERSE*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct ReverseKey<A> {
    /// Backend's address, wire order.
    pub backend: A,
    /// Client's address, wire order.
    pub client: A,
    /// Backend's port, wire order.
    pub backend_port: [u8; 2],
    /// Client's port as the backend sees it, wire order.
    pub client_port: [u8; 2],
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// How to translate a reply back: value of `REVERSE*` and `PENDING_REVERSE*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Reverse<A> {
    /// Address that the client connected to, wire order.
    pub vip: A,
    /// Its port, wire order.
    pub vip_port: [u8; 2],
    /// The client's own port, wire order.
    pub client_port: [u8; 2],
    /// Index of the service, [`NONE`] for a direct connection.
    pub service: u32,
    /// Bits of [`seen`], from the backend's packets.
    pub seen: u8,
    /// Always 0.
    pub pad: [u8; 3],
    /// The agent's heartbeat at the last packet of the backend, in ticks.
    pub last_seen_tick: u32,
    /// The client's interface, where replies go there at once ([`flow_way::FAST`]): see [`exit`].
    pub exit: u32,
}

/// A fragmented packet: key of `FRAGMENTS4` and `FRAGMENTS6` (RFC 791, section 3.2; RFC 8200, section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentKey<A> {
    /// From, wire order, as it came.
    pub source: A,
    /// To, wire order, as it came.
    pub destination: A,
    /// Identification, wire order; IPv4's two bytes come last.
    pub id: [u8; 4],
    /// IPv4's protocol, IPv6's next header after the fragment header.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// What was done to a packet's first fragment: value of `FRAGMENTS4` and `FRAGMENTS6`. The others have no ports; the same
/// is done to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Fragment<A> {
    /// What an address was replaced by, wire order.
    pub addr: A,
    /// Bits that were set in the packet's mark.
    pub mark: u32,
    /// Where it went: see [`exit`].
    pub exit: u32,
    /// Which address: 0 the source, 1 the destination.
    pub end: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// A socket of the node's own and the backend that it was sent to: key of `SOCKETS`. An IPv4 address is in its mapped form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketKey<A = V6> {
    /// The socket's number for its life (bpf_get_socket_cookie).
    pub cookie: u64,
    /// Where its connection or datagram went, wire order.
    pub backend: A,
    /// Its port, wire order.
    pub backend_port: [u8; 2],
    /// Always 0.
    pub pad: [u8; 6],
}

/// What a socket of the node's own believes to talk to: value of `SOCKETS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SocketOrigin<A = V6> {
    /// Address that it connected or sent to, wire order.
    pub vip: A,
    /// Its port, wire order.
    pub vip_port: [u8; 2],
    /// Always 0.
    pub pad: u16,
    /// Index of the service.
    pub service: u32,
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
    /// 1 where some service may have flows that leave the stack out: only then what pods send is asked for by its source, too.
    pub fast: u32,
    /// 1 where some service limits concurrent connections: only then the end of the node's own sockets is looked at.
    pub counts_sockets: u32,
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
    /// ICMP errors about translated packets, translated too.
    pub icmp_errors: u64,
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

/// What the ring buffer carries. `E` is [`EventKind`] in the programs, `u8` in userspace; `R` likewise. An IPv4 address is
/// in its mapped form, `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event<E = EventKind, R = BreakerState, A = V6> {
    /// When.
    pub at_ns: u64,
    /// Index of the service.
    pub service: u32,
    /// The service's epoch.
    pub epoch: u32,
    /// Client's address, wire order; zero where there is none.
    pub client: A,
    /// Address that it connected to, wire order.
    pub vip: A,
    /// Where it went, wire order; zero for nowhere.
    pub backend: A,
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
    /// IP protocol number.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 7],
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    /// Sizes are the ABI: whoever changes one raises `ABI_VERSION`.
    #[test]
    fn sizes_are_pinned() {
        assert_eq!(crate::ABI_VERSION, 7, "check every number below when you raise this");
        assert_eq!((size_of::<EndpointKey<V4>>(), size_of::<EndpointKey<V6>>()), (8, 20));
        assert_eq!(size_of::<EndpointRole>(), 12);
        assert_eq!(size_of::<FilterWords>(), 16);
        assert_eq!(size_of::<Route>(), 20);
        assert_eq!(size_of::<Table>(), 1024);
        assert_eq!((size_of::<Switch>(), align_of::<Switch>()), (8, 8));
        assert_eq!(size_of::<ServiceRecord>(), 160);
        assert_eq!((size_of::<ServiceRuntime>(), align_of::<ServiceRuntime>()), (8, 8));
        assert_eq!((size_of::<Backend<V4>>(), size_of::<Backend<V6>>()), (16, 28));
        assert_eq!((size_of::<FlowKey<V4>>(), size_of::<FlowKey<V6>>()), (16, 40));
        assert_eq!((size_of::<Flow<V4>>(), size_of::<Flow<V6>>()), (32, 44));
        assert_eq!((size_of::<ReverseKey<V4>>(), size_of::<ReverseKey<V6>>()), (16, 40));
        assert_eq!((size_of::<Reverse<V4>>(), size_of::<Reverse<V6>>()), (24, 36));
        assert_eq!((size_of::<FragmentKey<V4>>(), size_of::<FragmentKey<V6>>()), (16, 40));
        assert_eq!((size_of::<Fragment<V4>>(), size_of::<Fragment<V6>>()), (16, 28));
        assert_eq!((size_of::<SocketKey>(), size_of::<SocketOrigin>()), (32, 24));
        assert_eq!(size_of::<Heartbeat>(), 40);
        assert_eq!(size_of::<ServiceCounters>(), 96);
        assert_eq!(size_of::<Event>(), 80);
    }

    #[test]
    fn userspace_and_programs_agree_on_the_layout() {
        assert_eq!(size_of::<Switch>(), size_of::<Switch<u8>>());
        assert_eq!(size_of::<ServiceRecord>(), size_of::<ServiceRecord<u8>>());
        assert_eq!(size_of::<Flow<V4>>(), size_of::<Flow<V4, u8>>());
        assert_eq!(size_of::<Flow<V6>>(), size_of::<Flow<V6, u8>>());
        assert_eq!(size_of::<Event>(), size_of::<Event<u8, u8>>());
    }

    /// The last field ends where the type ends: no hole at the end; the sums above leave none in between.
    #[test]
    fn no_implicit_padding() {
        assert_eq!(offset_of!(ServiceRecord, pad) + 2, size_of::<ServiceRecord>());
        for (address, flow, last) in [
            (4, size_of::<Flow<V4>>(), offset_of!(Flow<V4>, last_seen_tick)),
            (16, size_of::<Flow<V6>>(), offset_of!(Flow<V6>, last_seen_tick)),
        ] {
            assert_eq!((flow, last + 4), (address + 28, address + 2 + 2 + 4 + 4 + 4 + 1 + 1 + 1 + 1 + 4 + 4));
        }
        for (address, reverse, last) in [
            (4, size_of::<Reverse<V4>>(), offset_of!(Reverse<V4>, exit)),
            (16, size_of::<Reverse<V6>>(), offset_of!(Reverse<V6>, exit)),
        ] {
            assert_eq!((reverse, last + 4), (address + 20, address + 2 + 2 + 4 + 1 + 3 + 4 + 4));
        }
        assert_eq!(offset_of!(Event, pad) + 7, 8 + 4 + 4 + 3 * 16 + 2 + 2 + 2 + 1 + 1 + 1 + 7);
    }

    /// Both sides compute it: a program that looks elsewhere than the agent wrote would never see the endpoint.
    #[test]
    fn an_endpoints_bit_stays_where_it_is() {
        let v4 = filter_bit(V4::new([10, 43, 0, 10]), 8080_u16.to_be_bytes(), PROTO_TCP);
        let v6 = filter_bit(V6::new([0xfd, 0, 0, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10]), [0x1f, 0x90], PROTO_TCP);
        assert_eq!((v4, v6), ((15_801, 1 << 4), (797, 1 << 14)));
    }

    /// One family's addresses in a row take places far apart, so that few others share them.
    #[test]
    fn endpoints_share_few_bits() {
        let mut words = [0_u64; crate::FILTER_WORDS as usize];
        let mut shared = 0;
        for n in 0..32_768_u32 {
            let [_, _, c, d] = n.to_be_bytes();
            let (word, bit) = filter_bit(V4::new([10, 42, c, d]), [0, 80], PROTO_TCP);
            shared += u32::from(words[word as usize] & bit != 0);
            words[word as usize] |= bit;
        }
        assert!(shared < 1500, "{shared}");
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
