//! Parses headers to a tuple: Ethernet with VLAN tags, IPv4 and IPv6, TCP and UDP, ICMP errors, fragments.

use breaker_common::{PROTO_TCP, PROTO_UDP, PassReason};
use network_types::eth::{EthHdr, EtherType};

use crate::{
    count,
    family::{Family, V4, V6},
    packet::Frame,
};

/// TCP flags, as in byte 13 of the header (RFC 9293, section 3.1).
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// Direction of the tc hook that a program runs on. XDP counts as ingress.
#[derive(Clone, Copy)]
pub enum Hook {
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

/// The first four bytes of a TCP or UDP header: the ports, wire order. Aligned as one word, so that it is stored by
/// one instruction: the CPU stalls when one load spans several smaller stores.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
pub struct Ports {
    pub source: [u8; 2],
    pub destination: [u8; 2],
}

/// A TCP header without options (RFC 9293, section 3.1).
#[repr(C)]
struct Tcp {
    ports: Ports,
    numbers: [u32; 2],
    offset: u8,
    flags: u8,
    rest: [u16; 3],
}

/// A UDP header (RFC 768), or the first 8 bytes of an ICMP message.
#[repr(C)]
struct Udp {
    ports: Ports,
    rest: [u16; 2],
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
    pub more: u8,
    /// IP protocol number of the header at `l4`.
    pub proto: u8,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
    l3: u32,
    l4: u32,
    end: u32,
    more_at: u32,
}

impl<A: Family> Segment<A> {
    /// This CPU's scratch segment for a hook, to parse into. The hooks do not share one: a packet that the ingress
    /// program sends back may pass the egress program before the ingress program has ended. (`None` cannot occur:
    /// the map has a value for each hook.)
    #[inline(always)]
    pub fn place(hook: Hook) -> Option<&'static mut Self> {
        let place = A::segments().get_ptr_mut(hook as u32)?;
        // SAFETY: the value is this CPU's own, and programs of one hook do not interrupt each other (they run with
        // softirqs off).
        Some(unsafe { &mut *place })
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
    pub fn more_at(&self) -> usize {
        (self.more_at & 0x1ff) as usize
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
    pub fn may_begin(&self) -> bool {
        !self.is_tcp() || self.is_syn()
    }

    /// Whether it has FIN or RST: the sender sends no more data. Never true for a datagram.
    #[inline(always)]
    pub fn ends(&self) -> bool {
        ends(self.flags)
    }

    /// Whether it changes the state of a connection: SYN, FIN or RST. Never true for a datagram.
    #[inline(always)]
    pub fn is_control(&self) -> bool {
        is_control(self.flags)
    }

    #[inline(always)]
    pub fn is_rst(&self) -> bool {
        self.flags & flags::RST != 0
    }
}

/// Offset of the IP header in a frame without VLAN tags.
pub const L3: usize = EthHdr::LEN;
/// Largest number of VLAN tags in the packet that are skipped. (The kernel moves the outermost tag to the packet's
/// metadata, so a frame may have one tag more.)
const TAGS: usize = 2;
const TAG_LEN: usize = 4;
/// Largest number of IPv6 extension headers that are parsed.
const EXTENSIONS: usize = 6;
/// Largest length in bytes of all IPv6 extension headers together.
const EXTENSIONS_LEN: usize = 256;
/// Largest length in bytes of all headers that are parsed: Ethernet, IPv4 or IPv6, TCP, with all their options.
const LONGEST: u32 = (EthHdr::LEN + TAGS * TAG_LEN + 40 + EXTENSIONS_LEN + 60) as u32;

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
    let mut at = L3;
    if TAGGED {
        for _ in 0..TAGS {
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
pub fn at<A: Family>(packet: &impl Frame, l3: usize, segment: &mut Segment<A>) -> Result<Kind, PassReason> {
    match A::parse(packet, l3, segment) {
        // The headers may lie outside of the linear part of the packet: pull them in and try once more.
        Err(PassReason::Truncated) => {
            let want = if packet.len() < LONGEST { packet.len() } else { LONGEST };
            packet.pull(want).ok_or(PassReason::Truncated)?;
            A::parse(packet, l3, segment)
        }
        outcome => outcome,
    }
}

/// An IPv4 header (RFC 791, section 3.1), divided into fields that are cheap to read. Integers are in wire order.
#[derive(Clone, Copy)]
#[repr(C)]
struct Ipv4 {
    version_and_length: u8,
    tos: u8,
    total_length: u16,
    id: [u8; 2],
    fragment: u16,
    ttl: u8,
    proto: u8,
    check: u16,
    source: V4,
    destination: V4,
}

/// Implements [`Family::parse`] for IPv4.
#[inline(always)]
pub fn ipv4(packet: &impl Frame, l3: usize, segment: &mut Segment<V4>) -> Result<Kind, PassReason> {
    let Some(ip) = packet.at::<Ipv4>(l3) else { return Err(PassReason::Truncated) };
    // SAFETY: `at` checked the bounds; any bytes are a valid value; see `Frame::read` on alignment.
    let ip = unsafe { &*ip };
    if !is_ours::<V4>(ip.proto) {
        return Ok(other(ip.proto));
    }
    // Length of the header in bytes. The mask shows the verifier that it is at most 60.
    let ihl = ((ip.version_and_length & 0x0f) as usize * 4) & 0x3c;
    if ip.version_and_length >> 4 != 4 || ihl < size_of::<Ipv4>() {
        return Err(PassReason::Truncated);
    }
    segment.source = ip.source;
    segment.destination = ip.destination;
    segment.proto = ip.proto;
    segment.l3 = l3 as u32;
    let fragment = u16::from_be(ip.fragment);
    segment.more = 0;
    // The flag "more fragments", or a fragment offset other than 0.
    if fragment & 0x3fff != 0 {
        segment.more = (fragment & 0x2000 != 0) as u8;
        segment.more_at = (l3 + 6) as u32;
        segment.fragment_id = [0, 0, ip.id[0], ip.id[1]];
        segment.fragment_proto = ip.proto;
        if fragment & 0x1fff != 0 {
            return Ok(Kind::LaterFragment);
        }
    }
    let total_length = ip.total_length;
    // Bytes behind the total length are padding, not a header.
    let length = u16::from_be(total_length) as usize;
    let Some(rest) = length.checked_sub(ihl) else { return Err(PassReason::Truncated) };
    transport(packet, l3 + ihl, rest, segment)
}

/// An IPv6 header (RFC 8200, section 3), divided as [`Ipv4`] is.
#[derive(Clone, Copy)]
#[repr(C)]
struct Ipv6 {
    version: [u8; 4],
    length: u16,
    next: u8,
    hop_limit: u8,
    source: V6,
    destination: V6,
}

/// Implements [`Family::parse`] for IPv6.
#[inline(always)]
pub fn ipv6(packet: &impl Frame, l3: usize, segment: &mut Segment<V6>) -> Result<Kind, PassReason> {
    let Some(ip) = packet.at::<Ipv6>(l3) else { return Err(PassReason::Truncated) };
    // SAFETY: as in `ipv4`.
    let ip = unsafe { &*ip };
    if ip.version[0] >> 4 != 6 {
        return Err(PassReason::Truncated);
    }
    let mut next = ip.next;
    let length = u16::from_be(ip.length) as usize;
    segment.l3 = l3 as u32;
    segment.more = 0;
    segment.source = ip.source;
    segment.destination = ip.destination;
    let mut behind = 0;
    for _ in 0..EXTENSIONS {
        if is_ours::<V6>(next) || !is_extension(next) {
            break;
        }
        let Some(header) = packet.read::<[u8; 8]>(l3 + 40 + behind) else { return Err(PassReason::Truncated) };
        match next {
            proto::FRAGMENT => {
                // RFC 8200, section 4.5.
                let fragment = u16::from_be_bytes([header[2], header[3]]);
                segment.more = (fragment & 1) as u8;
                segment.more_at = (l3 + 40 + behind + 2) as u32;
                segment.fragment_id = [header[4], header[5], header[6], header[7]];
                segment.fragment_proto = header[0];
                if fragment & 0xfff8 != 0 {
                    return Ok(Kind::LaterFragment);
                }
                behind += 8;
            }
            // RFC 4302, section 2.2: the length field counts 4-byte words, minus 2.
            proto::AUTHENTICATION => behind += (header[1] as usize + 2) * 4,
            // RFC 8200, section 4.4: while "Segments Left" is not 0, the IPv6 header does not hold the final
            // destination, and the TCP or UDP checksum covers the final one.
            proto::ROUTING if header[3] != 0 => return Err(PassReason::ExtensionHeaders),
            _ => behind += (header[1] as usize + 1) * 8,
        }
        if behind > EXTENSIONS_LEN {
            return Err(PassReason::ExtensionHeaders);
        }
        next = header[0];
    }
    if !is_ours::<V6>(next) {
        return if is_extension(next) { Err(PassReason::ExtensionHeaders) } else { Ok(other(next)) };
    }
    segment.proto = next;
    let Some(rest) = length.checked_sub(behind) else { return Err(PassReason::Truncated) };
    transport(packet, l3 + 40 + behind, rest, segment)
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(next, proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT | proto::AUTHENTICATION | proto::DESTINATION)
}

/// Whether breaker handles an IP protocol: TCP, UDP, or the family's ICMP.
#[inline(always)]
fn is_ours<A: Family>(next: u8) -> bool {
    next == PROTO_TCP || next == PROTO_UDP || next == A::ICMP
}

/// The kind of a packet whose protocol breaker does not handle. Counts SCTP.
#[inline(always)]
fn other(next: u8) -> Kind {
    if next == proto::SCTP {
        count::reason(PassReason::Sctp);
    }
    Kind::Other
}

/// Parses the TCP, UDP or ICMP header at offset `l4`. `rest`: number of bytes in the packet from `l4` on, according
/// to the IP header.
#[inline(always)]
fn transport<A: Family>(
    packet: &impl Frame,
    l4: usize,
    rest: usize,
    segment: &mut Segment<A>,
) -> Result<Kind, PassReason> {
    segment.l4 = l4 as u32;
    segment.end = (l4 + rest) as u32;
    let (ports, flags) = ports(packet, l4, rest, segment.proto).ok_or(PassReason::Truncated)?;
    if segment.proto == A::ICMP {
        return Ok(if is_error::<A>(ports.source[0]) { Kind::IcmpError } else { Kind::Other });
    }
    segment.flags = flags;
    segment.ports = ports;
    Ok(Kind::Transport)
}

/// The first four bytes of the header at offset `l4`, and the TCP flags (0 for other protocols). `None` if the
/// header is longer than `rest`, or lies outside of the linear part.
#[inline(always)]
fn ports(packet: &impl Frame, l4: usize, rest: usize, proto: u8) -> Option<(Ports, u8)> {
    if proto == PROTO_TCP {
        let tcp = packet.at::<Tcp>(l4)?;
        if rest < size_of::<Tcp>() {
            return None;
        }
        // SAFETY: `at` checked the bounds; any bytes are a valid value.
        let tcp = unsafe { &*tcp };
        return Some((tcp.ports, tcp.flags));
    }
    // UDP and ICMP headers have the same length.
    let header = packet.at::<Udp>(l4)?;
    if rest < size_of::<Udp>() {
        return None;
    }
    // SAFETY: as above.
    Some((unsafe { (*header).ports }, 0))
}

/// Tuple and flags of a packet of the most common kind, for the prefilter: see [`glance`].
#[derive(Clone, Copy)]
pub struct Glance<A> {
    pub source: A,
    pub destination: A,
    pub ports: Ports,
    pub proto: u8,
    /// As [`Segment::may_begin`].
    pub may_begin: bool,
    /// TCP flags; 0 for UDP.
    flags: u8,
}

impl<A> Glance<A> {
    /// As [`Segment::ends`].
    #[inline(always)]
    pub fn ends(&self) -> bool {
        ends(self.flags)
    }

    /// As [`Segment::is_control`].
    #[inline(always)]
    pub fn is_control(&self) -> bool {
        is_control(self.flags)
    }
}

/// The prefilter's parser: reads the tuple of a TCP segment or UDP datagram that has neither IP options nor
/// extension headers, is no fragment, and has its headers in the linear part. `None` for every other packet.
///
/// It stores nothing, because most packets then pass unchanged. The full parser ([`at`]) handles all other packets,
/// and those that need the full path.
#[inline(always)]
pub fn glance<A: Family>(packet: &impl Frame, l3: usize) -> Option<Glance<A>> {
    let ip = A::plain(packet, l3)?;
    if ip.proto != PROTO_TCP && ip.proto != PROTO_UDP {
        return None;
    }
    let (ports, flags) = ports(packet, l3 + A::HEADER, ip.rest, ip.proto)?;
    let may_begin = ip.proto != PROTO_TCP || is_request(flags);
    Some(Glance { source: ip.source, destination: ip.destination, ports, proto: ip.proto, may_begin, flags })
}

/// Fields of an IP header without options and extension headers, of a packet that is no fragment.
pub struct Plain<A> {
    source: A,
    destination: A,
    proto: u8,
    /// Number of bytes behind the header, according to the header.
    rest: usize,
}

/// Implements [`Family::plain`] for IPv4.
#[inline(always)]
pub fn plain4(packet: &impl Frame, l3: usize) -> Option<Plain<V4>> {
    let ip = packet.at::<Ipv4>(l3)?;
    // SAFETY: `at` checked the bounds; any bytes are a valid value; see `Frame::read` on alignment.
    let ip = unsafe { &*ip };
    if ip.version_and_length != 0x45 || u16::from_be(ip.fragment) & 0x3fff != 0 {
        return None;
    }
    let rest = (u16::from_be(ip.total_length) as usize).checked_sub(size_of::<Ipv4>())?;
    Some(Plain { source: ip.source, destination: ip.destination, proto: ip.proto, rest })
}

/// Implements [`Family::plain`] for IPv6.
#[inline(always)]
pub fn plain6(packet: &impl Frame, l3: usize) -> Option<Plain<V6>> {
    let ip = packet.at::<Ipv6>(l3)?;
    // SAFETY: as in `plain4`.
    let ip = unsafe { &*ip };
    if ip.version[0] >> 4 != 6 {
        return None;
    }
    let rest = u16::from_be(ip.length) as usize;
    Some(Plain { source: ip.source, destination: ip.destination, proto: ip.next, rest })
}

/// Whether TCP flags are those of a connection request: SYN without ACK. (Hosts drop a SYN that also has RST or FIN.)
#[inline(always)]
fn is_request(tcp_flags: u8) -> bool {
    tcp_flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN
}

#[inline(always)]
fn ends(tcp_flags: u8) -> bool {
    tcp_flags & (flags::FIN | flags::RST) != 0
}

#[inline(always)]
fn is_control(tcp_flags: u8) -> bool {
    tcp_flags & (flags::SYN | flags::FIN | flags::RST) != 0
}

/// Whether an ICMP type is an error that quotes the packet which caused it (RFC 792; RFC 4443, section 2.1).
#[inline(always)]
fn is_error<A: Family>(kind: u8) -> bool {
    if A::VERSION == 4 { matches!(kind, 3 | 4 | 11 | 12) } else { matches!(kind, 1..=4) }
}
