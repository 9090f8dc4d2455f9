//! Keys and values of the maps.

use crate::{BreakerState, EventKind, FlowKind, NONE, StateReason};

/// IPPROTO_TCP (RFC 9293).
pub const PROTO_TCP: u8 = 6;
/// IPPROTO_UDP (RFC 768).
pub const PROTO_UDP: u8 = 17;

/// An IP address in wire order, as a packet contains it. Every map that is keyed by addresses exists once per IP
/// family, with the family's version (4 or 6) at the end of its name.
pub trait Address: Copy + Eq + Ord + core::hash::Hash + core::fmt::Debug + 'static {
    /// The address with all bits zero.
    const ZERO: Self;
    /// IP version: 4 or 6.
    const VERSION: u8;

    /// Folds the address to 64 bits for hashing. The input is the address as 32-bit words in native byte order, so a
    /// type that stores words and a type that stores bytes give the same result.
    fn folded(self) -> u64;
}

/// Folds the four words of an IPv6 address to 64 bits; see [`Address::folded`].
#[inline(always)]
#[must_use]
pub const fn fold_words(words: [u32; 4]) -> u64 {
    let [a, b, c, d] = words;
    (((a as u64) << 32) | b as u64).wrapping_mul(GOLDEN) ^ (((c as u64) << 32) | d as u64)
}

/// 2^64 divided by the golden ratio, an odd number. Multiplication by it spreads similar values over the 64-bit
/// range (Fibonacci hashing).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// An IPv4 address in a map. Aligned to 4 bytes, because the programs access it as one 32-bit word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct V4 {
    /// The address in wire order.
    pub bytes: [u8; 4],
}

/// An IPv6 address in a map. Aligned to 4 bytes, because the programs access it as four 32-bit words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct V6 {
    /// The address in wire order.
    pub bytes: [u8; 16],
}

impl V4 {
    /// Makes an address from its bytes in wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(bytes: [u8; 4]) -> Self {
        Self { bytes }
    }
}

impl V6 {
    /// Makes an address from its bytes in wire order.
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

/// 64 bits of each of the prefilter's two bitmaps: value of `FILTER`.
///
/// Each bitmap is a Bloom filter with one hash function ([`filter_bit`]): a clear bit means that no endpoint at this
/// position has the property; a set bit means that one may have it. The agent sets a bit before the property becomes
/// true and clears it afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FilterWords {
    /// A frontend is at this position: packets that may start a flow (SYNs and all datagrams) take the full path.
    pub frontend: u64,
    /// All packets take the full path: a backend is at this position, or a frontend of a service whose flows are
    /// tracked ([`switch_flags::TRACK`]).
    pub every: u64,
}

/// Flag in the protocol number that is passed to [`filter_bit`]: gives the position of a frontend's second bit in
/// [`FilterWords::frontend`]. That bit is set if the frontend's service counts connections; the segments that start
/// and end connections (SYN, FIN, RST) then take the full path. No IP protocol that frontends use has this bit in
/// its number.
pub const COUNTED: u8 = 0x80;

/// Position of an endpoint's bit in `FILTER`: the index of the entry, and the bit as a mask.
///
/// `port` is in wire order. `proto` is the IP protocol number, with or without [`COUNTED`].
#[inline(always)]
#[must_use]
pub fn filter_bit<A: Address>(addr: A, port: [u8; 2], proto: u8) -> (u32, u64) {
    let rest = ((u16::from_ne_bytes(port) as u64) << 32) | ((proto as u64) << 48);
    let hash = (addr.folded() ^ rest).wrapping_mul(GOLDEN);
    ((hash >> (64 - crate::FILTER_WORDS.ilog2())) as u32, 1 << ((hash >> 32) & 63))
}

/// Address, port and protocol of an endpoint (frontend or backend): key of `ENDPOINTS4` and `ENDPOINTS6`.
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
    /// Makes a key. `addr` and `port` are in wire order.
    #[inline(always)]
    #[must_use]
    pub const fn new(addr: A, port: [u8; 2], proto: u8) -> Self {
        Self { addr, port, proto, pad: 0 }
    }
}

/// Role of an address and port: value of `ENDPOINTS4` and `ENDPOINTS6`. It may be a frontend and a backend at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct EndpointRole {
    /// Index of the service that this is a frontend of, or [`NONE`].
    pub service: u32,
    /// Index of the frontend's [`Route`]. Meaningless if `service` is [`NONE`].
    pub route: u32,
    /// Id of the backend (of the same IP family) that this is, or [`NONE`].
    pub backend: u32,
}

impl EndpointRole {
    /// Neither frontend nor backend.
    pub const NOTHING: Self = Self { service: NONE, route: NONE, backend: NONE };
}

/// Selection tables for new connections to a frontend: value of `ROUTES`. A service has one route per IP family,
/// protocol and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Route {
    /// By buffer ([`switch_flags::BUFFER`]) and tier (0 = primary, 1 = backup). Each element is the index of a
    /// selection table in `SLOTS`. If all slots of the table would be equal, no table exists and the element is
    /// [`crate::SLOT_PASSTHROUGH`], [`crate::SLOT_REJECT`], or [`crate::SINGLE_BACKEND`] combined with a backend id.
    pub tables: [[u32; 2]; 2],
    /// Bits of [`route_flags`].
    pub flags: u32,
}

impl Route {
    /// Leaves every connection to kube-proxy.
    pub const NOTHING: Self = Self { tables: [[crate::SLOT_PASSTHROUGH; 2]; 2], flags: 0 };
}

/// A selection table: value of `SLOTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Table {
    /// Backend ids, [`crate::SLOT_PASSTHROUGH`] or [`crate::SLOT_REJECT`]. Only the first [`crate::SLOTS`] elements
    /// are used; the rest are zeros. They make the length a power of two, so that a mask proves to the verifier that
    /// an index is in bounds.
    pub slots: [u32; crate::SLOTS.next_power_of_two() as usize],
}

/// Bits of [`Route::flags`].
pub mod route_flags {
    /// An external client keeps its address toward a backend on this node (`externalTrafficPolicy: Local`).
    pub const KEEP_CLIENT: u32 = 1;
}

/// Current decision for a service: value of `SWITCHES`.
///
/// It is read and written as one aligned 64-bit word, so that state, share, policies, buffer and epoch change
/// together. `S` is [`BreakerState`] in the programs and `u8` in userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Switch<S = BreakerState> {
    /// Number of the current decision. A flow stores the epoch in which it was decided.
    pub epoch: u32,
    /// Share of new flows that go to the primary, in permille (see [`crate::SHARE_ALL`]).
    pub share: u16,
    /// State of the breaker.
    pub state: S,
    /// Bits of [`switch_flags`].
    pub flags: u8,
}

/// Bits of [`Switch::flags`].
pub mod switch_flags {
    /// The service may have entries in the flow tables, so all its packets take the full path. While this is clear,
    /// packets of established connections pass at the prefilter.
    pub const TRACK: u8 = 1;
    /// Reset established flows on the primary that were decided in an older epoch or whose SYN the programs did not
    /// see (`onOpen: Reset`).
    pub const RESET_PRIMARY: u8 = 1 << 1;
    /// Reset established flows on a backup that were decided in an older epoch (`onClose: Reset`).
    pub const RESET_BACKUP: u8 = 1 << 2;
    /// Dry run: decide and count, but rewrite no packet.
    pub const DRY_RUN: u8 = 1 << 3;
    /// The last decision stays in force after the agent's lease has run out (`onAgentLoss: Hold`).
    pub const HOLD: u8 = 1 << 4;
    /// Which of the two buffers of [`super::Route::tables`] is in force. The agent writes the other one.
    pub const BUFFER: u8 = 1 << 5;
    /// New flows to a backup pod on this node take the fast path, which bypasses the host network stack
    /// (`fastPath: PeerRedirect`).
    pub const FAST: u8 = 1 << 6;
    /// The service has limits; see [`crate::ServiceLimits`].
    pub const LIMITED: u8 = 1 << 7;
}

impl<S> Switch<S> {
    /// Returns whether a bit of [`switch_flags`] is set.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Index of the buffer of [`Route::tables`] that is in force: 0 or 1.
    #[inline(always)]
    #[must_use]
    pub const fn buffer(&self) -> u32 {
        if self.has(switch_flags::BUFFER) { 1 } else { 0 }
    }
}

impl Switch<u8> {
    /// Packs the fields into the word that the map holds, in native byte order (the programs and the agent run on
    /// one machine).
    #[must_use]
    pub const fn to_word(self) -> u64 {
        let e = self.epoch.to_ne_bytes();
        let s = self.share.to_ne_bytes();
        u64::from_ne_bytes([e[0], e[1], e[2], e[3], s[0], s[1], self.state, self.flags])
    }

    /// Unpacks a word from the map: the inverse of [`Switch::to_word`].
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

/// Size of [`ServiceRecord::name`] in bytes. A name has at most `NAME_LEN - 1` bytes. A longer name in the
/// configuration file is rejected; a longer name from Kubernetes (namespace, name and port) is shortened and made
/// unique by a hash.
pub const NAME_LEN: usize = 128;

/// State of a service that a restarted agent needs: value of `SERVICES`.
///
/// `R` is [`StateReason`] in the programs and `u8` in userspace. An entry with an empty name is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ServiceRecord<R = StateReason> {
    /// Name in UTF-8, padded with zeros.
    pub name: [u8; NAME_LEN],
    /// When the service entered its state, `CLOCK_REALTIME`.
    pub since_unix_ns: u64,
    /// When the operator's override expires, `CLOCK_REALTIME`; 0 = never.
    pub override_until_unix_ns: u64,
    /// Mixed into the flow hash, so that different services move different clients.
    pub seed: u32,
    /// Number of trial connections to the primary that a half-open breaker permits per epoch.
    pub half_open_limit: u32,
    /// Consecutive trips, for the backoff.
    pub trips: u32,
    /// Why the service is in its state.
    pub reason: R,
    /// Override: 0 = none, 1 = forced open, 2 = forced closed.
    pub override_kind: u8,
    /// Always 0.
    pub pad: u16,
}

/// State of a service that the programs maintain: value of `RUNTIME`. Both fields change by compare-and-swap as one
/// 64-bit word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct ServiceRuntime {
    /// The latest epoch that the programs have seen.
    pub epoch: u32,
    /// Trial connections to the primary that were permitted in this epoch (state half-open).
    pub half_open_taken: u32,
}

/// A backend: value of `BACKENDS4` and `BACKENDS6`. The index is the backend id.
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
    /// Bits of [`backend_use`]. The programs set them; the agent clears them when no flow needs them any more.
    pub in_use: u32,
    /// Index of the host-side interface of the backend's pod, if the pod is on this node and breaker's programs are
    /// attached to that interface; 0 otherwise. Written by the agent.
    pub ifindex: u32,
}

/// Bits of [`Backend::in_use`].
pub mod backend_use {
    /// The backend has redirected flows: its replies may need translation.
    pub const REDIRECTED: u32 = 1;
    /// Direct connections to the backend may have a translated source port.
    pub const DIRECT: u32 = 2;
    /// The backend has fast-path flows: its replies may have to be redirected straight to the client's interface.
    pub const FAST: u32 = 4;
}

/// A connection as the client sees it: key of `FLOWS*` and `PENDING*`.
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

/// A tick is 2^30 ns (about 1.07 s) of `CLOCK_MONOTONIC`. That resolution is enough for flows, and a tick counter
/// takes half the space of a time in nanoseconds.
pub const TICK_SHIFT: u32 = 30;

/// The pinned decision for a connection: value of `FLOWS*` and `PENDING*`. `K` is [`FlowKind`] in the programs and
/// `u8` in userspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow<A, K = FlowKind> {
    /// Destination address, wire order.
    pub backend: A,
    /// Destination port, wire order.
    pub backend_port: [u8; 2],
    /// The client's port as the backend sees it, wire order. It differs from the client's own port if that one is
    /// taken toward this backend, and on the fast path.
    pub source_port: [u8; 2],
    /// Index of the service; [`NONE`] for a direct connection.
    pub service: u32,
    /// Backend id; [`NONE`] if the connection was left to kube-proxy.
    pub backend_id: u32,
    /// The service's epoch when the flow was decided.
    pub epoch: u32,
    /// The decision.
    pub kind: K,
    /// Bits of [`seen`], from packets of the client.
    pub seen: u8,
    /// Bits of [`flow_way`].
    pub way: u8,
    /// Always 0.
    pub pad: u8,
    /// When the first packet was seen, in ticks (see [`TICK_SHIFT`]).
    pub created_tick: u32,
    /// Time of the agent's latest heartbeat when the client's last packet was seen, in ticks. The heartbeat serves
    /// as a coarse clock because reading it is cheaper than reading a kernel clock.
    pub last_seen_tick: u32,
}

/// Bits of [`Flow::way`]: the path that a flow's packets take. The first packet determines it for the whole flow,
/// because conntrack classifies packets of a TCP connection that it has not seen from the start as INVALID.
pub mod flow_way {
    /// Fast path: packets are redirected into the backend's veth and replies are redirected back from there, both
    /// without the host network stack.
    pub const FAST: u8 = 1;
    /// The client is external and keeps its own address: no masquerading.
    pub const KEEP_CLIENT: u8 = 2;
}

/// Egress of packets on the fast path: an interface index, and a flag in the top bit. Interface indexes are positive
/// 31-bit numbers (`struct ifreq`, netdevice(7)).
pub mod exit {
    /// No fast path: the packet continues through the host network stack.
    pub const STACK: u32 = 0;
    /// Send out of the interface to the next hop that the node's routes name (`bpf_redirect_neigh`). If clear:
    /// redirect into the network namespace at the other end of the veth (`bpf_redirect_peer`).
    pub const NEIGHBOR: u32 = 1 << 31;
}

/// Bits of [`Flow::seen`] and [`Reverse::seen`].
pub mod seen {
    /// A FIN was seen.
    pub const FIN: u8 = 1;
    /// A RST was seen.
    pub const RST: u8 = 2;
    /// The backend answered: any packet except a RST. Usually a SYN-ACK or a datagram.
    pub const ANSWERED: u8 = 4;
}

/// A connection as the backend sees it: key of `REVERSE*` and `PENDING_REVERSE*`.
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

/// The translation for replies of a backend (revNAT): value of `REVERSE*` and `PENDING_REVERSE*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Reverse<A> {
    /// Address that the client connected to, wire order.
    pub vip: A,
    /// Port that the client connected to, wire order.
    pub vip_port: [u8; 2],
    /// The client's own port, wire order.
    pub client_port: [u8; 2],
    /// Index of the service; [`NONE`] for a direct connection.
    pub service: u32,
    /// Bits of [`seen`], from packets of the backend.
    pub seen: u8,
    /// Always 0.
    pub pad: [u8; 3],
    /// Time of the agent's latest heartbeat when the backend's last packet was seen, in ticks (see [`TICK_SHIFT`]).
    pub last_seen_tick: u32,
    /// Egress of replies, encoded as in [`exit`]: the client's interface on the fast path ([`flow_way::FAST`]), else
    /// [`exit::STACK`].
    pub exit: u32,
}

/// A fragmented packet: key of `FRAGMENTS4` and `FRAGMENTS6` (RFC 791, section 3.2; RFC 8200, section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FragmentKey<A> {
    /// Source address before translation, wire order.
    pub source: A,
    /// Destination address before translation, wire order.
    pub destination: A,
    /// Identification, wire order. The two bytes of IPv4's identification come last.
    pub id: [u8; 4],
    /// IPv4: the protocol. IPv6: the next header after the fragment header.
    pub proto: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// Translation of a packet's first fragment: value of `FRAGMENTS4` and `FRAGMENTS6`. It is applied to the later
/// fragments too, which have no ports to look a flow up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Fragment<A> {
    /// The new address, wire order.
    pub addr: A,
    /// Bits to set in the packet's mark.
    pub mark: u32,
    /// Egress, encoded as in [`exit`].
    pub exit: u32,
    /// Which address was replaced: 0 = source, 1 = destination.
    pub end: u8,
    /// Always 0.
    pub pad: [u8; 3],
}

/// A socket in the host network namespace and the backend that it was redirected to: key of `SOCKETS`. IPv4
/// addresses are in their IPv4-mapped IPv6 form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SocketKey<A = V6> {
    /// The socket's cookie, unique for its lifetime (`bpf_get_socket_cookie`).
    pub cookie: u64,
    /// Address of the backend that the connection or datagram was sent to, wire order.
    pub backend: A,
    /// Port of the backend, wire order.
    pub backend_port: [u8; 2],
    /// Always 0.
    pub pad: [u8; 6],
}

/// The original destination of a redirected socket in the host network namespace: value of `SOCKETS`. IPv4 addresses
/// are in their IPv4-mapped IPv6 form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SocketOrigin<A = V6> {
    /// Address that the process connected or sent to, wire order.
    pub vip: A,
    /// Port that the process connected or sent to, wire order.
    pub vip_port: [u8; 2],
    /// Always 0.
    pub pad: u16,
    /// Index of the service.
    pub service: u32,
}

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

/// Counters of one service on one CPU: value of `COUNTERS`. The index is the service's.
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
    /// New connections that would have gone to a backup if this were not a dry run.
    pub dry_run: u64,
    /// New connections left to the primary because the agent's lease had run out.
    pub agent_lost: u64,
    /// New connections left to the primary because of an error; `REASONS` counts the errors by [`crate::PassReason`].
    pub failed_open: u64,
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

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    /// Sizes are part of the ABI: raise `ABI_VERSION` when one changes.
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

    /// The last field ends where the type ends, so there is no padding at the end. The sum of the field sizes shows
    /// that there is none in between.
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

    /// The agent and the programs both compute the position. If they disagreed, the programs would never find the
    /// endpoint.
    #[test]
    fn an_endpoints_bit_stays_where_it_is() {
        let v4 = filter_bit(V4::new([10, 43, 0, 10]), 8080_u16.to_be_bytes(), PROTO_TCP);
        let v6 = filter_bit(V6::new([0xfd, 0, 0, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10]), [0x1f, 0x90], PROTO_TCP);
        assert_eq!((v4, v6), ((15_801, 1 << 4), (797, 1 << 14)));
    }

    /// Consecutive addresses get positions far apart, so that few endpoints share a bit.
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
