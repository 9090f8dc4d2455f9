//! The answers to connections and datagrams that are refused, and the packets that reset a connection.

use std::net::SocketAddr;

use super::{
    bytes::{Edit, long, word},
    headers::{Headers, addresses_at, ip_sum, octets, proto, transport_sum},
};

const RST_ACK: u8 = 0x14;

/// Answers a SYN with RST+ACK. It acknowledges everything that the SYN takes up in sequence space (RFC 9293, section
/// 3.5.2, rule 1).
#[must_use]
pub fn refuse_segment(frame: &[u8], headers: &Headers) -> Edit {
    let l4 = headers.l4;
    // The payload's length is computed from the header fields, because the frame may be truncated.
    let says = if headers.is_v4() { word(frame, headers.l3 + 2) } else { word(frame, headers.l3 + 4) };
    let before = if headers.is_v4() { l4 - headers.l3 } else { l4 - headers.l3 - 40 };
    let payload = usize::from(says).saturating_sub(before + usize::from(frame[l4 + 12] >> 4) * 4);
    let next = long(frame, l4 + 4).wrapping_add(u32::try_from(payload).unwrap_or(0)).wrapping_add(1);
    let mut answer = reset(frame, headers, headers.destination, headers.source, [0, next]);
    swap_macs(&mut answer.frame);
    answer
}

/// Builds the RST that the peer gets in place of the client's segment, when a connection is reset.
#[must_use]
pub fn reset_peer(frame: &[u8], headers: &Headers, source_port: u16, peer: SocketAddr) -> Edit {
    let acknowledged = if headers.flags & 16 == 0 { 0 } else { long(frame, headers.l4 + 8) };
    let numbers = [long(frame, headers.l4 + 4), acknowledged];
    reset(frame, headers, SocketAddr::new(headers.source.ip(), source_port), peer, numbers)
}

/// Builds a RST from the headers of a segment: they stay, except for lengths and addresses. The RST is not a fragment,
/// even if the segment was one. `numbers`: sequence and acknowledgment number.
fn reset(frame: &[u8], headers: &Headers, source: SocketAddr, destination: SocketAddr, numbers: [u32; 2]) -> Edit {
    let (l3, l4, v4) = (headers.l3, headers.l4, headers.is_v4());
    let mut edit = Edit::new(&frame[..l4]);
    let under: &[_] = if v4 { &[ip_sum(l3)] } else { &[] };
    if let Some((_, at)) = headers.first_of {
        let more = if v4 { 0x2000 } else { 1 };
        edit.replace(at, &(word(frame, at) & !more).to_be_bytes(), under);
    }
    let length = if v4 { l4 - l3 + 20 } else { l4 - l3 - 40 + 20 };
    let length = u16::try_from(length).unwrap_or(0).to_be_bytes();
    edit.replace(l3 + if v4 { 2 } else { 4 }, &length, under);
    let ([source_at, destination_at], _) = addresses_at(v4);
    edit.replace(l3 + source_at, &octets(source.ip()), under);
    edit.replace(l3 + destination_at, &octets(destination.ip()), under);
    let mut tcp = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    tcp.extend(numbers.into_iter().flat_map(u32::to_be_bytes));
    tcp.extend([5 << 4, RST_ACK, 0, 0, 0, 0, 0, 0]);
    edit.frame.extend(&tcp);
    let pseudo = pseudo(source, destination, proto::TCP, 20);
    edit.checksum(transport_sum(proto::TCP, l4), &[&pseudo, &tcp]);
    edit
}

/// Answers a datagram with an ICMP "port unreachable" that quotes its IP header and eight bytes (RFC 792; RFC 4443,
/// section 3.1). Returns `None` for a datagram with VLAN tags or extension headers, which passes instead.
#[must_use]
pub fn refuse_datagram(frame: &[u8], headers: &Headers) -> Option<Edit> {
    let (l3, l4, v4) = (headers.l3, headers.l4, headers.is_v4());
    if l3 != 14 || !v4 && l4 != l3 + 40 {
        return None;
    }
    let (client, vip) = (headers.source, headers.destination);
    let quote = &frame[l3..l4 + 8];
    let mut icmp = if v4 { vec![3, 3] } else { vec![1, 4] };
    icmp.extend([0; 6]);
    icmp.extend(quote);
    let length = u16::try_from(icmp.len()).unwrap_or(0);
    let mut edit = Edit::new(&frame[..14]);
    swap_macs(&mut edit.frame);
    if v4 {
        let total = (20 + length).to_be_bytes();
        // Precedence "internetwork control" (RFC 1812, section 4.3.2.5), don't fragment, TTL 64.
        edit.frame.extend([0x45, 0xc0, total[0], total[1], 0, 0, 0x40, 0, 64, proto::ICMP, 0, 0]);
    } else {
        let length = length.to_be_bytes();
        edit.frame.extend([0x60, 0, 0, 0, length[0], length[1], proto::ICMPV6, 64]);
    }
    edit.frame.extend(octets(vip.ip()));
    edit.frame.extend(octets(client.ip()));
    let at = edit.frame.len();
    edit.frame.extend(&icmp);
    if v4 {
        let header = edit.frame[14..34].to_vec();
        edit.checksum(ip_sum(14), &[&header]);
        edit.checksum(transport_sum(proto::ICMP, at), &[&icmp]);
    } else {
        let pseudo = pseudo(vip, client, proto::ICMPV6, length);
        edit.checksum(transport_sum(proto::ICMPV6, at), &[&pseudo, &icmp]);
    }
    Some(edit)
}

/// The pseudo-header under a transport checksum (RFC 9293, section 3.1; RFC 8200, section 8.1).
fn pseudo(source: SocketAddr, destination: SocketAddr, proto: u8, length: u16) -> Vec<u8> {
    let mut bytes = [octets(source.ip()), octets(destination.ip())].concat();
    bytes.extend([0, proto]);
    bytes.extend(length.to_be_bytes());
    bytes
}

fn swap_macs(frame: &mut [u8]) {
    let (receiver, sender) = frame[..12].split_at_mut(6);
    receiver.swap_with_slice(sender);
}
