//! Headers to a tuple: Ethernet and its VLAN tags, IPv4 and IPv6, TCP and UDP, ICMP errors, fragments.

use breaker_common::{PROTO_TCP, PROTO_UDP, PassReason};
use network_types::eth::{EthHdr, EtherType};

use crate::{
    count,
    family::{Family, V4, V6},
    packet::Frame,
};

/// TCP flags as they stand in byte 13 of the header (RFC 9293, section 3.1).
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
}

/// Where a program sits.
#[derive(Clone, Copy)]
pub enum Hook {
    Ingress = 0,
    Egress = 1,
}

/// What a packet is to us.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing that we look at.
    Other,
    /// A TCP segment or UDP datagram, or its first fragment.
    Transport,
    /// A later fragment: addresses, and no ports.
    LaterFragment,
    /// An ICMP error; `l4` is where its header starts.
    IcmpError,
}

/// The ports, as TCP's and UDP's headers begin. One word: what is stored in pieces and read as a whole, the processor has to wait
/// for.
#[derive(Clone, Copy)]
#[repr(C, align(4))]
pub struct Ports {
    pub source: [u8; 2],
    pub destination: [u8; 2],
}

/// The part of a TCP header that we read (RFC 9293, section 3.1).
#[repr(C)]
struct Tcp {
    ports: Ports,
    numbers: [u32; 2],
    offset: u8,
    flags: u8,
    rest: [u16; 3],
}

/// A UDP header (RFC 768), or the begin of an ICMP message.
#[repr(C)]
struct Udp {
    ports: Ports,
    rest: [u16; 2],
}

/// What we know of a packet after parsing. Addresses and ports in wire order.
///
/// It lives in a map of one value for each CPU and hook, not on the stack: there is little of that, and the verifier, which
/// follows every value on the stack along every way through the headers, gives up before the end. What comes out of a map
/// is just a number to it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Segment<A> {
    pub source: A,
    pub destination: A,
    pub ports: Ports,
    /// As in [`breaker_common::FragmentKey`]; means something for fragments only.
    pub fragment_id: [u8; 4],
    pub fragment_proto: u8,
    /// Whether later fragments follow: 0 or 1.
    pub more: u8,
    /// IP protocol number of what is at `l4`.
    pub proto: u8,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
    l3: u32,
    l4: u32,
    end: u32,
    more_at: u32,
}

impl<A: Family> Segment<A> {
    /// This CPU's place to parse into, for a hook. A packet that we send back from one hook may pass the other one before
    /// the first is done.
    #[inline(always)]
    pub fn place(hook: Hook) -> Option<&'static mut Self> {
        let place = A::segments().get_ptr_mut(hook as u32)?;
        // SAFETY: this CPU's own, and a hook's programs do not interrupt themselves (they run with softirqs off).
        Some(unsafe { &mut *place })
    }

    /// Where the IP header starts, from the Ethernet header on: 14 without VLAN tags in the packet.
    #[inline(always)]
    pub fn l3(&self) -> usize {
        (self.l3 & 0x1f) as usize
    }

    /// Where the TCP, UDP or ICMP header starts, from the Ethernet header on.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        (self.l4 & 0x1ff) as usize
    }

    /// Where the word stands that says whether later fragments follow; means something for a first fragment only.
    #[inline(always)]
    pub fn more_at(&self) -> usize {
        (self.more_at & 0x1ff) as usize
    }

    /// Where the packet ends, by what its IP header says: what follows in the frame is padding. It may end beyond the frame.
    #[inline(always)]
    pub fn end(&self) -> usize {
        self.end as usize
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.proto == PROTO_TCP
    }

    /// A connection request.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        is_request(self.flags)
    }

    /// Whether it may be the first of its flow: a connection request, or any datagram.
    #[inline(always)]
    pub fn may_begin(&self) -> bool {
        !self.is_tcp() || self.is_syn()
    }

    /// The sender's last word, or nearly: FIN or RST.
    #[inline(always)]
    pub fn ends(&self) -> bool {
        ends(self.flags)
    }

    /// Whether it changes the state of a connection: SYN, FIN or RST. Never a datagram.
    #[inline(always)]
    pub fn is_control(&self) -> bool {
        is_control(self.flags)
    }

    #[inline(always)]
    pub fn is_rst(&self) -> bool {
        self.flags & flags::RST != 0
    }
}

/// Where the IP header starts, without VLAN tags in the packet.
pub const L3: usize = EthHdr::LEN;
/// VLAN tags that may stand in a packet (one more is in the kernel's own notes: it takes the outer one off).
const TAGS: usize = 2;
const TAG_LEN: usize = 4;
/// IPv6 extension headers that are walked.
const EXTENSIONS: usize = 6;
/// Bytes of them that are walked.
const EXTENSIONS_LEN: usize = 256;
/// Longest headers that we look at: Ethernet, IPv4 or IPv6, TCP, each with all options that we walk.
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

/// The network layer of a frame, and where it starts. `TAGGED`: VLAN tags in the packet are stepped over; there are none on
/// a pod's interface.
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

/// Parses what is at `l3` into `segment`.
///
/// # Errors
/// [`PassReason::Truncated`], [`PassReason::ExtensionHeaders`].
#[inline(always)]
pub fn at<A: Family>(packet: &impl Frame, l3: usize, segment: &mut Segment<A>) -> Result<Kind, PassReason> {
    match A::parse(packet, l3, segment) {
        // The headers may lie outside of the linear part: fetch them, once.
        Err(PassReason::Truncated) => {
            let want = if packet.len() < LONGEST { packet.len() } else { LONGEST };
            packet.pull(want).ok_or(PassReason::Truncated)?;
            A::parse(packet, l3, segment)
        }
        outcome => outcome,
    }
}

/// An IPv4 header (RFC 791, section 3.1), with its fields as they are best read. Numbers are in wire order.
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

/// See [`Family::parse`].
#[inline(always)]
pub fn ipv4(packet: &impl Frame, l3: usize, segment: &mut Segment<V4>) -> Result<Kind, PassReason> {
    let Some(ip) = packet.at::<Ipv4>(l3) else { return Err(PassReason::Truncated) };
    // SAFETY: `at` checked the bounds; any bytes are a value; `Packet::read` has the word on alignment.
    let ip = unsafe { &*ip };
    if !is_ours::<V4>(ip.proto) {
        return Ok(other(ip.proto));
    }
    // Length of the header in bytes; the mask tells the verifier that it is 60 at the most.
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
    // More fragments, or the offset of this one.
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
    // What follows the total length is padding, not a header.
    let length = u16::from_be(total_length) as usize;
    let Some(rest) = length.checked_sub(ihl) else { return Err(PassReason::Truncated) };
    transport(packet, l3 + ihl, rest, segment)
}

/// An IPv6 header (RFC 8200, section 3), as [`Ipv4`].
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

/// See [`Family::parse`].
#[inline(always)]
pub fn ipv6(packet: &impl Frame, l3: usize, segment: &mut Segment<V6>) -> Result<Kind, PassReason> {
    let Some(ip) = packet.at::<Ipv6>(l3) else { return Err(PassReason::Truncated) };
    // SAFETY: as for IPv4.
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
            // RFC 4302, section 2.2: in words, and two less.
            proto::AUTHENTICATION => behind += (header[1] as usize + 2) * 4,
            // RFC 8200, section 4.4: the destination in the header is not the last one, and the checksum is about the last.
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

/// Whether we look at a protocol.
#[inline(always)]
fn is_ours<A: Family>(next: u8) -> bool {
    next == PROTO_TCP || next == PROTO_UDP || next == A::ICMP
}

/// A protocol that we do not look at.
#[inline(always)]
fn other(next: u8) -> Kind {
    if next == proto::SCTP {
        count::reason(PassReason::Sctp);
    }
    Kind::Other
}

/// Parses the header at `l4`; `rest` bytes are in the packet from there on, by what the IP header says.
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

/// How the header at `l4` begins, of which there must be `rest` bytes, and TCP's flags.
#[inline(always)]
fn ports(packet: &impl Frame, l4: usize, rest: usize, proto: u8) -> Option<(Ports, u8)> {
    if proto == PROTO_TCP {
        let tcp = packet.at::<Tcp>(l4)?;
        if rest < size_of::<Tcp>() {
            return None;
        }
        // SAFETY: `at` checked the bounds; any bytes are a value.
        let tcp = unsafe { &*tcp };
        return Some((tcp.ports, tcp.flags));
    }
    // UDP's and ICMP's headers are as long as each other.
    let header = packet.at::<Udp>(l4)?;
    if rest < size_of::<Udp>() {
        return None;
    }
    // SAFETY: as above.
    Some((unsafe { (*header).ports }, 0))
}

/// The two ends of a packet of the commonest kind.
#[derive(Clone, Copy)]
pub struct Glance<A> {
    pub source: A,
    pub destination: A,
    pub ports: Ports,
    pub proto: u8,
    /// It may be the first of its flow.
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

/// The ends of a segment or datagram without IP options and extension headers, whole, and with its headers where they can be
/// read at once. Nothing is written down: it is for those that go on untouched. Everything else, and what does not go on, is
/// parsed.
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

/// What an IP header without options and extension headers says of a whole packet.
pub struct Plain<A> {
    source: A,
    destination: A,
    proto: u8,
    /// How many bytes follow the header.
    rest: usize,
}

/// See [`Family::plain`].
#[inline(always)]
pub fn plain4(packet: &impl Frame, l3: usize) -> Option<Plain<V4>> {
    let ip = packet.at::<Ipv4>(l3)?;
    // SAFETY: `at` checked the bounds; any bytes are a value; `Packet::read` has the word on alignment.
    let ip = unsafe { &*ip };
    if ip.version_and_length != 0x45 || u16::from_be(ip.fragment) & 0x3fff != 0 {
        return None;
    }
    let rest = (u16::from_be(ip.total_length) as usize).checked_sub(size_of::<Ipv4>())?;
    Some(Plain { source: ip.source, destination: ip.destination, proto: ip.proto, rest })
}

/// See [`Family::plain`].
#[inline(always)]
pub fn plain6(packet: &impl Frame, l3: usize) -> Option<Plain<V6>> {
    let ip = packet.at::<Ipv6>(l3)?;
    // SAFETY: as for IPv4.
    let ip = unsafe { &*ip };
    if ip.version[0] >> 4 != 6 {
        return None;
    }
    let rest = u16::from_be(ip.length) as usize;
    Some(Plain { source: ip.source, destination: ip.destination, proto: ip.next, rest })
}

/// A connection request: SYN without ACK. (With RST or FIN beside it, it is none: hosts drop those.)
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

/// Whether an ICMP type quotes the packet that it is about, and tells of an error (RFC 792, RFC 4443 section 2.1).
#[inline(always)]
fn is_error<A: Family>(kind: u8) -> bool {
    if A::VERSION == 4 { matches!(kind, 3 | 4 | 11 | 12) } else { matches!(kind, 1..=4) }
}
