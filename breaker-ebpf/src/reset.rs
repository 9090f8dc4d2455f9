//! Refusing a connection request and resetting an established connection.
//!
//! The packet itself is turned into the reset: cut behind its headers, flags, numbers and addresses written anew.
//! IP options stay where they are, so that nothing moves.
//!
//! Sequence numbers. To a SYN: RST+ACK that acknowledges its sequence number plus its length (RFC 9293, section
//! 3.5.2, rule 1). To an established client: the sequence number that it expects next is what it acknowledged last
//! (RFC 5961, section 3.2, accepts nothing else at once). To the peer: the client's own next sequence number.

use breaker_common::{PROTO_TCP, PassReason};
use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr};

use crate::{
    csum,
    nat::TCP_CHECK,
    packet::Packet,
    parse::{L3, Segment, flags},
};

/// What we need to know of a segment to answer it.
#[derive(Clone, Copy)]
struct Numbers {
    /// Its sequence number.
    sequence: u32,
    /// Its acknowledgment number; 0 without ACK.
    acknowledgment: u32,
    /// The sequence number behind it.
    next: u32,
    /// Its sender's and receiver's MAC addresses.
    sender: [u8; 6],
    receiver: [u8; 6],
}

/// One reset to write.
struct Reset {
    sender: [u8; 6],
    receiver: [u8; 6],
    source: [u8; 4],
    destination: [u8; 4],
    source_port: [u8; 2],
    destination_port: [u8; 2],
    sequence: u32,
    acknowledgment: u32,
}

/// Where the other end of a connection to be reset is.
pub struct Peer {
    pub addr: [u8; 4],
    pub port: [u8; 2],
    /// The client's port as the peer knows it.
    pub source_port: [u8; 2],
}

/// Answers a SYN with RST+ACK; the value is the verdict for the kernel.
///
/// # Errors
/// [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn refuse(packet: &Packet<'_>, segment: &Segment) -> Result<i32, PassReason> {
    let numbers = shorten(packet, segment).ok_or(PassReason::RewriteFailed)?;
    write(packet, segment.l4, &to_client(segment, &numbers)).ok_or(PassReason::RewriteFailed)?;
    Ok(packet.send_back())
}

/// Resets an established connection at both ends, on a segment of the client's: the client is answered, and the
/// packet goes on to the peer as a reset.
///
/// # Errors
/// [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn both_ends(packet: &Packet<'_>, segment: &Segment, peer: &Peer) -> Result<(), PassReason> {
    let numbers = shorten(packet, segment).ok_or(PassReason::RewriteFailed)?;
    write(packet, segment.l4, &to_client(segment, &numbers)).ok_or(PassReason::RewriteFailed)?;
    // A veth whose queue is full drops the copy; the peer is told all the same, and the client asks again.
    let _ = packet.send_copy_back();
    let onward = Reset {
        sender: numbers.sender,
        receiver: numbers.receiver,
        source: segment.source,
        destination: peer.addr,
        source_port: peer.source_port,
        destination_port: peer.port,
        sequence: numbers.sequence,
        acknowledgment: numbers.acknowledgment,
    };
    write(packet, segment.l4, &onward).ok_or(PassReason::RewriteFailed)
}

#[inline(always)]
fn to_client(segment: &Segment, numbers: &Numbers) -> Reset {
    Reset {
        sender: numbers.receiver,
        receiver: numbers.sender,
        source: segment.destination,
        destination: segment.source,
        source_port: segment.destination_port,
        destination_port: segment.source_port,
        sequence: numbers.acknowledgment,
        acknowledgment: numbers.next,
    }
}

/// Reads the numbers and cuts the packet behind a TCP header without options.
#[inline(always)]
fn shorten(packet: &Packet<'_>, segment: &Segment) -> Option<Numbers> {
    let eth = packet.read::<EthHdr>(0)?;
    let ip = packet.read::<Ipv4Hdr>(L3)?;
    let tcp = packet.read::<[u8; TcpHdr::LEN]>(segment.l4)?;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let acknowledgment =
        if segment.flags & flags::ACK != 0 { u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]) } else { 0 };
    // What the segment takes up in sequence space: its payload, its SYN, its FIN (RFC 9293, section 3.4).
    let headers = (segment.l4 - L3) as u32 + ((tcp[12] >> 4) as u32) * 4;
    let payload = (u16::from_be_bytes(ip.tot_len) as u32).saturating_sub(headers);
    let syn = (segment.flags & flags::SYN != 0) as u32;
    let fin = (segment.flags & flags::FIN != 0) as u32;
    packet.cut((segment.l4 + TcpHdr::LEN) as u32)?;
    Some(Numbers {
        sequence,
        acknowledgment,
        next: sequence.wrapping_add(payload + syn + fin),
        sender: eth.src_addr,
        receiver: eth.dst_addr,
    })
}

/// Writes a reset over the headers.
#[inline(always)]
fn write(packet: &Packet<'_>, l4: usize, reset: &Reset) -> Option<()> {
    let eth = packet.read::<EthHdr>(0)?;
    packet.write(0, EthHdr { dst_addr: reset.receiver, src_addr: reset.sender, ether_type: eth.ether_type })?;

    let old = packet.read::<Ipv4Hdr>(L3)?;
    let total = ((l4 - L3) + TcpHdr::LEN) as u16;
    let mut ip = old;
    ip.tot_len = total.to_be_bytes();
    ip.src_addr = reset.source;
    ip.dst_addr = reset.destination;
    // Options, if any, did not change: the checksum follows from the fields that did.
    let before = u16::from_be_bytes(old.tot_len) as u64 + csum::words4(old.src_addr) + csum::words4(old.dst_addr);
    let after = total as u64 + csum::words4(reset.source) + csum::words4(reset.destination);
    ip.check = csum::replaced(u16::from_be_bytes(old.check), before, after).to_be_bytes();
    packet.write(L3, ip)?;

    let s = reset.sequence.to_be_bytes();
    let a = reset.acknowledgment.to_be_bytes();
    let (sp, dp) = (reset.source_port, reset.destination_port);
    let header = [
        sp[0],
        sp[1],
        dp[0],
        dp[1],
        s[0],
        s[1],
        s[2],
        s[3],
        a[0],
        a[1],
        a[2],
        a[3],
        // Five words of header; RST and ACK; no window, no urgent pointer; the checksum comes below.
        5 << 4,
        flags::RST | flags::ACK,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    packet.write(l4, header)?;
    write_checksum(packet, l4, reset)
}

/// Writes the TCP checksum: the whole one, or only the pseudo header's sum where the device adds the rest
/// (CHECKSUM_PARTIAL, the rule on a veth). A program cannot ask which it is, but the helper for a changed port knows:
/// it leaves a partial checksum alone and changes any other.
#[inline(always)]
fn write_checksum(packet: &Packet<'_>, l4: usize, reset: &Reset) -> Option<()> {
    const PROBE: [u8; 2] = [0x12, 0x34];
    let at = l4 + TCP_CHECK;
    packet.write(at, PROBE)?;
    packet.payload_changed(at, [0, 0], [0, 1])?;
    let partial = packet.read::<[u8; 2]>(at)? == PROBE;
    let pseudo = csum::pseudo4(reset.source, reset.destination, PROTO_TCP, TcpHdr::LEN as u16);
    let check = if partial {
        csum::fold(pseudo)
    } else {
        let ports = u16::from_be_bytes(reset.source_port) as u64 + u16::from_be_bytes(reset.destination_port) as u64;
        let numbers = csum::words4(reset.sequence.to_be_bytes()) + csum::words4(reset.acknowledgment.to_be_bytes());
        !csum::fold(pseudo + ports + numbers + (5 << 12) + (flags::RST | flags::ACK) as u64)
    };
    packet.write(at, check.to_be_bytes())
}
