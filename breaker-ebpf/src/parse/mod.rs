//! Parses headers to a tuple: Ethernet with VLAN tags, IPv4 and IPv6, TCP and UDP, ICMP errors, fragments.

mod ipv4;
mod ipv6;
mod peek;
mod transport;

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use breaker_common::{PROTO_TCP, PROTO_UDP, PassReason};
use network_types::eth::{EthHdr, EtherType};

use self::{
    peek::BasicHeader,
    transport::{is_control, is_fin_or_rst, is_request},
};
pub use self::{
    peek::{Peek, peek},
    transport::{Ports, flags},
};
use crate::{
    count,
    packet::Frame,
    wire::{V4, V6, Wire},
};

/// A family's parser.
pub trait Parse: Wire {
    /// Parses the IP header at offset `l3` and the headers behind it.
    ///
    /// # Errors
    /// See [`headers`].
    fn parse(packet: &impl Frame, l3: usize, segment: &mut Segment<Self>) -> Result<Kind, PassReason>;
    /// Reads the IP header at offset `l3`. `None` if it has options or extension headers, or the packet is a
    /// fragment.
    fn read_basic(packet: &impl Frame, l3: usize) -> Option<BasicHeader<Self>>;
    /// The family's scratch memory.
    fn segments() -> &'static Segments<Self>;
}

/// Scratch memory of the parser, index = [`Direction`].
pub type Segments<A> = PerCpuArray<Segment<A>, 2>;

#[btf_map]
static SEGMENTS4: Segments<V4> = Segments::new();
#[btf_map]
static SEGMENTS6: Segments<V6> = Segments::new();

/// Direction of the tc hook that a program runs on. XDP counts as ingress.
#[derive(Clone, Copy)]
pub enum Direction {
    Ingress = 0,
    Egress = 1,
}

/// What kind of packet was parsed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any other packet: breaker passes it.
    Other,
    /// A TCP segment or UDP datagram, whole or its first fragment.
    Transport,
    /// A later fragment: it has addresses, but no ports.
    LaterFragment,
    /// An ICMP error. `l4` is the offset of its ICMP header.
    IcmpError,
}

/// A parsed packet. Addresses and ports are in wire order.
///
/// It is kept in a per-CPU map with one value for each hook, not on the stack. The stack is small, and the verifier
/// follows every value on the stack along every path through the headers, which exceeds its limit on instructions.
/// A value from a map is just an unknown number to the verifier.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Segment<A> {
    pub source: A,
    pub destination: A,
    pub ports: Ports,
    /// As in [`breaker_common::FragmentKey`], wire order. Valid for fragments only.
    pub fragment_id: [u8; 4],
    /// As in [`breaker_common::FragmentKey`]. Valid for fragments only.
    pub fragment_proto: u8,
    /// 1 if later fragments follow, else 0.
    pub more_fragments: u8,
    /// IP protocol number of the header at `l4`.
    pub proto: u8,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
    /// TCP sequence number, wire order; 0 for UDP.
    pub sequence: [u8; 4],
    l3: u32,
    l4: u32,
    end: u32,
    more_fragments_offset: u32,
}

impl<A: Parse> Segment<A> {
    /// This CPU's scratch segment for a hook, to parse into. The hooks do not share one: a packet that the ingress
    /// program sends back may pass the egress program before the ingress program has ended. (`None` cannot occur:
    /// the map has a value for each hook.)
    #[inline(always)]
    pub fn scratch(direction: Direction) -> Option<&'static mut Self> {
        let segment = A::segments().get_ptr_mut(direction as u32)?;
        // SAFETY: the value is this CPU's own, and programs of one hook do not interrupt each other (they run with
        // softirqs off).
        Some(unsafe { &mut *segment })
    }

    /// Offset of the IP header in the frame: 14 without VLAN tags in the packet.
    #[inline(always)]
    pub fn l3(&self) -> usize {
        (self.l3 & 0x1f) as usize
    }

    /// Offset of the TCP, UDP or ICMP header in the frame.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        (self.l4 & 0x1ff) as usize
    }

    /// Offset in the frame of the 16-bit word with the flag "more fragments". Valid for a first fragment only.
    #[inline(always)]
    pub fn more_fragments_offset(&self) -> usize {
        (self.more_fragments_offset & 0x1ff) as usize
    }

    /// Offset in the frame at which the packet ends according to its IP header; the frame's bytes behind it are
    /// padding. May lie beyond the end of the frame.
    #[inline(always)]
    pub fn end(&self) -> usize {
        self.end as usize
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.proto == PROTO_TCP
    }

    /// Whether it is a connection request: SYN is set; ACK, RST and FIN are not.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        is_request(self.flags)
    }

    /// Whether it may be the first packet of its flow: a connection request, or any datagram.
    #[inline(always)]
    pub fn may_start_flow(&self) -> bool {
        !self.is_tcp() || self.is_syn()
    }

    /// Whether it has FIN or RST: the sender sends no more data. Never true for a datagram.
    #[inline(always)]
    pub fn is_fin_or_rst(&self) -> bool {
        is_fin_or_rst(self.flags)
    }

    /// Whether it changes the state of a connection: SYN, FIN or RST. Never true for a datagram.
    #[inline(always)]
    pub fn is_control(&self) -> bool {
        is_control(self.flags)
    }

    /// Whether it answers a connection request: SYN and ACK.
    #[inline(always)]
    pub fn is_syn_ack(&self) -> bool {
        self.flags & (flags::SYN | flags::ACK) == flags::SYN | flags::ACK
    }

    #[inline(always)]
    pub fn is_rst(&self) -> bool {
        self.flags & flags::RST != 0
    }
}

/// Offset of the IP header in a frame without VLAN tags.
pub const UNTAGGED_L3_OFFSET: usize = EthHdr::LEN;
/// Largest number of VLAN tags in the packet that are skipped. (The kernel moves the outermost tag to the packet's
/// metadata, so a frame may have one tag more.)
const MAX_VLAN_TAGS: usize = 2;
const TAG_LEN: usize = 4;
/// Largest number of IPv6 extension headers that are parsed.
const MAX_EXTENSION_HEADERS: usize = 6;
/// Largest length in bytes of all IPv6 extension headers together.
const MAX_EXTENSIONS_LEN: usize = 256;
/// Largest length in bytes of all headers that are parsed: Ethernet, IPv4 or IPv6, TCP, with all their options.
const MAX_HEADERS_LEN: u32 = (EthHdr::LEN + MAX_VLAN_TAGS * TAG_LEN + 40 + MAX_EXTENSIONS_LEN + 60) as u32;

/// IP protocol numbers (iana.org/assignments/protocol-numbers).
mod proto {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
    pub const SCTP: u8 = 132;
}

/// Finds the network layer of a frame: returns its type and stores its offset in `l3`. `None`: neither IPv4 nor
/// IPv6. `TAGGED`: VLAN tags in the packet are skipped; a pod's interface has none.
#[inline(always)]
pub fn network<const TAGGED: bool>(packet: &impl Frame, l3: &mut usize) -> Option<EtherType> {
    let eth = packet.read::<EthHdr>(0)?;
    let mut kind = eth.ether_type;
    let mut at = UNTAGGED_L3_OFFSET;
    if TAGGED {
        for _ in 0..MAX_VLAN_TAGS {
            if kind != EtherType::Ieee8021q as u16 && kind != EtherType::Ieee8021ad as u16 {
                break;
            }
            let tag = packet.read::<[u16; 2]>(at)?;
            kind = tag[1];
            at += TAG_LEN;
        }
    }
    *l3 = at;
    if kind == EtherType::Ipv4 as u16 {
        Some(EtherType::Ipv4)
    } else if kind == EtherType::Ipv6 as u16 {
        Some(EtherType::Ipv6)
    } else {
        None
    }
}

/// Parses the headers from offset `l3` on into `segment`.
///
/// # Errors
/// [`PassReason::Truncated`], [`PassReason::ExtensionHeaders`].
#[inline(always)]
pub fn headers<A: Parse>(packet: &impl Frame, l3: usize, segment: &mut Segment<A>) -> Result<Kind, PassReason> {
    match A::parse(packet, l3, segment) {
        // The headers may lie outside of the linear part of the packet: pull them in and try once more.
        Err(PassReason::Truncated) => {
            let needed = if packet.len() < MAX_HEADERS_LEN { packet.len() } else { MAX_HEADERS_LEN };
            packet.pull(needed).ok_or(PassReason::Truncated)?;
            A::parse(packet, l3, segment)
        }
        outcome => outcome,
    }
}

/// Whether breaker handles an IP protocol: TCP, UDP, or the family's ICMP.
#[inline(always)]
fn is_supported<A: Parse>(next: u8) -> bool {
    next == PROTO_TCP || next == PROTO_UDP || next == A::ICMP
}

/// The kind of a packet whose protocol breaker does not handle. Counts SCTP.
#[inline(always)]
fn unsupported(next: u8) -> Kind {
    if next == proto::SCTP {
        count::reason(PassReason::Sctp);
    }
    Kind::Other
}
