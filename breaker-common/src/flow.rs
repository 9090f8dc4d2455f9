//! Flows: the pinned decisions, later fragments, sockets of the host network namespace.

use crate::{FlowKind, addr::V6};

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

impl<A: Copy> FlowKey<A> {
    /// The reverse key of the flow with this key.
    #[inline(always)]
    #[must_use]
    pub const fn reverse_key<K>(&self, flow: &Flow<A, K>) -> ReverseKey<A> {
        ReverseKey {
            backend: flow.backend,
            client: self.client,
            backend_port: flow.backend_port,
            client_port: flow.source_port,
            proto: self.proto,
            pad: [0; 3],
        }
    }
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
    /// Index of the service; [`crate::NONE`] for a direct connection.
    pub service: u32,
    /// Backend id; [`crate::NONE`] if the connection was left to kube-proxy.
    pub backend_id: u32,
    /// The service's epoch when the flow was decided.
    pub epoch: u32,
    /// The decision.
    pub kind: K,
    /// Bits of [`seen`], from packets of the client.
    pub seen: u8,
    /// Bits of [`flow_path`].
    pub path: u8,
    /// Always 0.
    pub pad: u8,
    /// When the first packet was seen, in ticks (see [`TICK_SHIFT`]).
    pub created_tick: u32,
    /// Sequence number of the client's SYN, wire order: a SYN with the same number is a repetition. 0 for datagrams.
    pub sequence: [u8; 4],
    /// Time of the agent's latest heartbeat when the client's last packet was seen, in ticks. The heartbeat serves
    /// as a coarse clock because reading it is cheaper than reading a kernel clock.
    pub last_seen_tick: u32,
}

/// Bits of [`Flow::path`]: the path that a flow's packets take. The first packet determines it for the whole flow,
/// because conntrack classifies packets of a TCP connection that it has not seen from the start as INVALID.
pub mod flow_path {
    /// Fast path: packets are redirected into the backend's veth and replies are redirected back from there, both
    /// without the host network stack.
    pub const FAST: u8 = 1;
    /// The client is external and keeps its own address: no masquerading.
    pub const KEEP_CLIENT: u8 = 2;
}

/// Egress of packets on the fast path: an interface index, and a flag in the top bit. Interface indexes are positive
/// 31-bit numbers (`struct ifreq`, netdevice(7)).
pub mod egress {
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

    /// Whether a connection was reset, or closed from both sides. `client` and `backend`: bits that were seen of each
    /// side. Without `both_sides`, the backend's packets are not seen, and the client's FIN is enough.
    #[inline(always)]
    #[must_use]
    pub const fn has_ended(client: u8, backend: u8, both_sides: bool) -> bool {
        (client | backend) & RST != 0 || client & FIN != 0 && (!both_sides || backend & FIN != 0)
    }
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
    /// Index of the service; [`crate::NONE`] for a direct connection.
    pub service: u32,
    /// Bits of [`seen`], from packets of the backend.
    pub seen: u8,
    /// Always 0.
    pub pad: [u8; 3],
    /// Time of the agent's latest heartbeat when the backend's last packet was seen, in ticks (see [`TICK_SHIFT`]).
    pub last_seen_tick: u32,
    /// Egress of replies, encoded as in [`egress`]: the client's interface on the fast path ([`flow_path::FAST`]),
    /// else [`egress::STACK`].
    pub egress: u32,
    /// Index of the interface on which the client's first packet came in.
    pub ingress: u32,
    /// On the fast path out of an uplink ([`egress::NEIGHBOR`]): address of the next hop that the node's routes named
    /// for the client, wire order. Otherwise 0.
    pub next_hop: A,
}

/// An interface and a service: key of `RETURN_PATHS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct ReturnPathKey {
    /// Index of the interface on which connection attempts come in.
    pub interface: u32,
    /// Index of the service.
    pub service: u32,
}

/// Whether the answers to an interface's clients pass the programs: value of `RETURN_PATHS`. An entry exists once an
/// attempt was answered or repeated. The programs count; the agent halves the counts and writes `suspended`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ReturnPath {
    /// Redirected connection attempts whose answer was seen. The programs stop counting at [`ReturnPath::ENOUGH`].
    pub answered: u32,
    /// Repetitions of redirected connection attempts whose answer was not seen.
    pub unanswered: u32,
    /// 1 while the agent has given up the interface for the service: new connections are left to kube-proxy.
    pub suspended: u32,
    /// Always 0.
    pub pad: u32,
}

impl ReturnPath {
    /// Number of answers from which on more of them prove nothing.
    pub const ENOUGH: u32 = 1024;

    /// Whether missing answers are common enough that the cause is the path, and not a lost packet or a slow backend:
    /// one missing answer for every four that were seen. With no answer at all, the first missing one counts.
    #[inline(always)]
    #[must_use]
    pub const fn is_doubtful(&self) -> bool {
        self.unanswered as u64 * 4 > self.answered as u64
    }
}

impl<A: PartialEq> Reverse<A> {
    /// Whether the entry belongs to the flow with this key.
    #[inline(always)]
    pub fn belongs_to(&self, key: &FlowKey<A>) -> bool {
        self.vip == key.vip && self.vip_port == key.vip_port && self.client_port == key.client_port
    }
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
    /// Egress, encoded as in [`egress`].
    pub egress: u32,
    /// As [`Reverse::next_hop`].
    pub next_hop: A,
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
