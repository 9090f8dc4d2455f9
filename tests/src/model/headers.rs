//! Parses a frame into the fields on which the datapath decides: addresses, ports, flags.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use breaker_common::PassReason;

use super::{
    bytes::{Sum, word},
    fragment::FragmentId,
};

/// IP protocol numbers.
pub mod proto {
    #![allow(missing_docs, reason = "the names are those of iana.org/assignments/protocol-numbers")]
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION: u8 = 60;
    pub const SCTP: u8 = 132;
}

/// Content of a frame, as the datapath distinguishes it.
#[derive(Clone, Debug)]
pub enum Frame {
    /// Nothing that the datapath handles.
    Other,
    /// A packet that the datapath passes untouched and counts under this reason.
    LeftAlone(PassReason),
    /// A TCP segment or UDP datagram, or the first fragment of one.
    Transport(Headers),
    /// A fragment after the first.
    LaterFragment(Later),
    /// An ICMP error, which quotes another packet.
    Error(Headers),
}

/// A fragment after the first of a packet. It has addresses, but no ports.
#[derive(Clone, Copy, Debug)]
pub struct Later {
    /// Offset of the IP header.
    pub l3: usize,
    /// The packet that the fragment belongs to.
    pub id: FragmentId,
}

/// The headers of a packet.
#[derive(Clone, Debug)]
pub struct Headers {
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the TCP, UDP or ICMP header.
    pub l4: usize,
    /// Offset of the packet's end: where the IP length ends, or the frame, whichever is first. Padding may follow.
    pub end: usize,
    /// Source address and port; port 0 for ICMP.
    pub source: SocketAddr,
    /// Destination address and port; port 0 for ICMP.
    pub destination: SocketAddr,
    /// Protocol number.
    pub proto: u8,
    /// TCP flags; 0 for other protocols.
    pub flags: u8,
    /// Set for the first of several fragments: the packet's id, and the offset of the 16-bit word that holds the flag
    /// "more fragments".
    pub first_of: Option<(FragmentId, usize)>,
}

impl Headers {
    /// Whether it is a TCP segment.
    #[must_use]
    pub const fn is_tcp(&self) -> bool {
        self.proto == proto::TCP
    }

    /// Whether it is a connection request: SYN, and none of ACK, RST, FIN.
    #[must_use]
    pub const fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether it answers a connection request: SYN and ACK.
    #[must_use]
    pub const fn is_syn_ack(&self) -> bool {
        self.is_tcp() && self.flags & (SYN | ACK) == SYN | ACK
    }

    /// Whether it is a TCP reset.
    #[must_use]
    pub const fn is_rst(&self) -> bool {
        self.flags & RST != 0
    }

    /// Whether it has FIN or RST.
    #[must_use]
    pub const fn ends(&self) -> bool {
        self.flags & (RST | FIN) != 0
    }

    /// Whether the IP version is 4.
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// The checksums that cover the IP addresses.
    #[must_use]
    pub fn sums_over_addresses(&self) -> Vec<Sum> {
        let own = self.is_v4().then_some(ip_sum(self.l3));
        own.into_iter().chain([self.sum()]).collect()
    }

    /// The checksum of the TCP or UDP header.
    #[must_use]
    pub const fn sum(&self) -> Sum {
        transport_sum(self.proto, self.l4)
    }
}

/// The checksum of an IPv4 header.
#[must_use]
pub const fn ip_sum(l3: usize) -> Sum {
    Sum { at: l3 + 10, zero_is_none: false }
}

/// The checksum of a TCP, UDP or ICMP header.
#[must_use]
pub const fn transport_sum(proto: u8, l4: usize) -> Sum {
    let offset = match proto {
        proto::TCP => 16,
        proto::UDP => 6,
        _ => 2,
    };
    Sum { at: l4 + offset, zero_is_none: proto == proto::UDP }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Offsets of the source and the destination address in an IP header, and the length of an address in bytes.
#[must_use]
pub const fn addresses_at(v4: bool) -> ([usize; 2], usize) {
    if v4 { ([12, 16], 4) } else { ([8, 24], 16) }
}

/// The bytes of an address in network byte order: 4 or 16.
#[must_use]
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Reads the source and the destination address of the IP header at offset `l3`.
#[must_use]
pub fn addresses(frame: &[u8], l3: usize, v4: bool) -> (IpAddr, IpAddr) {
    let ([source, destination], length) = addresses_at(v4);
    let read = |at: usize| {
        let bytes = &frame[l3 + at..l3 + at + length];
        if v4 {
            IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).unwrap_or_default()))
        } else {
            IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).unwrap_or_default()))
        }
    };
    (read(source), read(destination))
}

/// Parses a frame. `tagged`: up to two VLAN tags are skipped.
#[must_use]
pub fn read(frame: &[u8], tagged: bool) -> Frame {
    let mut at = 12;
    for _ in 0..2 {
        if !tagged || frame.len() < at + 6 || !matches!(word(frame, at), 0x8100 | 0x88a8) {
            break;
        }
        at += 4;
    }
    match word(frame, at) {
        0x0800 => ipv4(frame, at + 2),
        0x86dd => ipv6(frame, at + 2),
        _ => Frame::Other,
    }
}

const TRUNCATED: Frame = Frame::LeftAlone(PassReason::Truncated);

/// Parses an IPv4 packet (RFC 791, section 3.1).
fn ipv4(frame: &[u8], l3: usize) -> Frame {
    if frame.len() < l3 + 20 {
        return TRUNCATED;
    }
    let (proto, header) = (frame[l3 + 9], usize::from(frame[l3] & 15) * 4);
    if !matches!(proto, proto::TCP | proto::UDP | proto::ICMP) {
        return other(proto);
    }
    if frame[l3] >> 4 != 4 || header < 20 {
        return TRUNCATED;
    }
    let (source, destination) = addresses(frame, l3, true);
    let id = FragmentId { source, destination, id: word(frame, l3 + 4).into(), proto };
    let fragment = word(frame, l3 + 6);
    if fragment & 0x1fff != 0 {
        return Frame::LaterFragment(Later { l3, id });
    }
    let first_of = (fragment & 0x2000 != 0).then_some((id, l3 + 6));
    transport(frame, l3, l3 + header, l3 + usize::from(word(frame, l3 + 2)), proto, first_of)
}

/// Parses an IPv6 packet (RFC 8200, sections 3 and 4). Walks at most six extension headers, of 256 bytes together.
fn ipv6(frame: &[u8], l3: usize) -> Frame {
    if frame.len() < l3 + 40 || frame[l3] >> 4 != 6 {
        return TRUNCATED;
    }
    let (source, destination) = addresses(frame, l3, false);
    let (mut next, mut at, mut first_of) = (frame[l3 + 6], l3 + 40, None);
    let mut walked = 0;
    while is_extension(next) {
        if walked == 6 {
            return Frame::LeftAlone(PassReason::ExtensionHeaders);
        }
        let Some(header) = frame.get(at..at + 8) else { return TRUNCATED };
        let length = match next {
            proto::FRAGMENT => 8,
            proto::AUTHENTICATION => (usize::from(header[1]) + 2) * 4,
            _ => (usize::from(header[1]) + 1) * 8,
        };
        if next == proto::FRAGMENT {
            let id = FragmentId { source, destination, id: super::bytes::long(header, 4), proto: header[0] };
            if word(header, 2) & 0xfff8 != 0 {
                return Frame::LaterFragment(Later { l3, id });
            }
            first_of = (header[3] & 1 != 0).then_some((id, at + 2));
        }
        // Segments are left: the destination in the IP header is not the final one.
        if next == proto::ROUTING && header[3] != 0 {
            return Frame::LeftAlone(PassReason::ExtensionHeaders);
        }
        at += length;
        if at - l3 - 40 > 256 {
            return Frame::LeftAlone(PassReason::ExtensionHeaders);
        }
        next = header[0];
        walked += 1;
    }
    if !matches!(next, proto::TCP | proto::UDP | proto::ICMPV6) {
        return other(next);
    }
    transport(frame, l3, at, l3 + 40 + usize::from(word(frame, l3 + 4)), next, first_of)
}

const fn is_extension(next: u8) -> bool {
    matches!(next, proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT | proto::AUTHENTICATION | proto::DESTINATION)
}

const fn other(proto: u8) -> Frame {
    if proto == proto::SCTP { Frame::LeftAlone(PassReason::Sctp) } else { Frame::Other }
}

/// Parses the transport header. The whole header must lie within the packet's own length and within the frame.
fn transport(
    frame: &[u8],
    l3: usize,
    l4: usize,
    end: usize,
    proto: u8,
    first_of: Option<(FragmentId, usize)>,
) -> Frame {
    let end = end.min(frame.len());
    let header = if proto == proto::TCP { 20 } else { 8 };
    if end < l4 + header {
        return TRUNCATED;
    }
    let v4 = frame[l3] >> 4 == 4;
    let (source, destination) = addresses(frame, l3, v4);
    let has_ports = matches!(proto, proto::TCP | proto::UDP);
    let port = |at: usize| if has_ports { word(frame, at) } else { 0 };
    let headers = Headers {
        l3,
        l4,
        end,
        source: SocketAddr::new(source, port(l4)),
        destination: SocketAddr::new(destination, port(l4 + 2)),
        proto,
        flags: if proto == proto::TCP { frame[l4 + 13] } else { 0 },
        first_of,
    };
    if has_ports {
        return Frame::Transport(headers);
    }
    // Error types: RFC 792; RFC 4443, section 2.1.
    let is_error = if v4 { matches!(frame[l4], 3 | 4 | 11 | 12) } else { matches!(frame[l4], 1..=4) };
    if is_error { Frame::Error(headers) } else { Frame::Other }
}
