//! TCP, UDP and ICMP headers.

use breaker_common::{PROTO_TCP, PassReason};

use super::{Kind, Parse, Segment};
use crate::packet::Frame;

/// TCP flags, as in byte 13 of the header (RFC 9293, section 3.1).
pub mod flags {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const ACK: u8 = 0x10;
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
    /// Sequence and acknowledgment number.
    numbers: [[u8; 4]; 2],
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

/// Parses the TCP, UDP or ICMP header at offset `l4`. `rest`: number of bytes in the packet from `l4` on, according
/// to the IP header.
#[inline(always)]
pub(super) fn transport<A: Parse>(
    packet: &impl Frame,
    l4: usize,
    rest: usize,
    segment: &mut Segment<A>,
) -> Result<Kind, PassReason> {
    segment.l4 = l4 as u32;
    segment.end = (l4 + rest) as u32;
    let (ports, flags, sequence) = ports(packet, l4, rest, segment.proto).ok_or(PassReason::Truncated)?;
    if segment.proto == A::ICMP {
        return Ok(if is_error::<A>(ports.source[0]) { Kind::IcmpError } else { Kind::Other });
    }
    segment.flags = flags;
    segment.sequence = sequence;
    segment.ports = ports;
    Ok(Kind::Transport)
}

/// The first four bytes of the header at offset `l4`, and the TCP flags and sequence number (0 for other protocols).
/// `None` if the header is longer than `rest`, or lies outside of the linear part.
#[inline(always)]
pub(super) fn ports(packet: &impl Frame, l4: usize, rest: usize, proto: u8) -> Option<(Ports, u8, [u8; 4])> {
    if proto == PROTO_TCP {
        let tcp = packet.at::<Tcp>(l4)?;
        if rest < size_of::<Tcp>() {
            return None;
        }
        // SAFETY: `at` checked the bounds; any bytes are a valid value.
        let tcp = unsafe { &*tcp };
        return Some((tcp.ports, tcp.flags, tcp.numbers[0]));
    }
    // UDP and ICMP headers have the same length.
    let header = packet.at::<Udp>(l4)?;
    if rest < size_of::<Udp>() {
        return None;
    }
    // SAFETY: as above.
    Some((unsafe { (*header).ports }, 0, [0; 4]))
}

/// Whether TCP flags are those of a connection request: SYN without ACK. (Hosts drop a SYN that also has RST or FIN.)
#[inline(always)]
pub(super) fn is_request(tcp_flags: u8) -> bool {
    tcp_flags & (flags::SYN | flags::ACK | flags::RST | flags::FIN) == flags::SYN
}

/// Whether an ICMP type is an error that quotes the packet which caused it (RFC 792; RFC 4443, section 2.1).
#[inline(always)]
pub(super) fn is_error<A: Parse>(kind: u8) -> bool {
    if A::VERSION == 4 { matches!(kind, 3 | 4 | 11 | 12) } else { matches!(kind, 1..=4) }
}

#[inline(always)]
pub(super) fn is_fin_or_rst(tcp_flags: u8) -> bool {
    tcp_flags & (flags::FIN | flags::RST) != 0
}

#[inline(always)]
pub(super) fn is_control(tcp_flags: u8) -> bool {
    tcp_flags & (flags::SYN | flags::FIN | flags::RST) != 0
}
