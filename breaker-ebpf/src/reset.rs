//! Refuses new connections and datagrams, and resets established connections.
//!
//! # TCP
//!
//! The packet itself becomes the reset: it is truncated behind its headers, and flags, numbers and addresses are
//! rewritten. IP options and extension headers stay in place, so no bytes have to be moved.
//!
//! Sequence numbers:
//!
//! * The answer to a SYN is RST+ACK. It acknowledges the SYN's sequence number plus its length (RFC 9293, section
//!   3.5.2, rule 1).
//! * A reset to an established client has the sequence number that the client expects next, which is the one that it
//!   acknowledged last. By RFC 5961, section 3.2, a client accepts no other number at once.
//! * The peer gets two resets, and one of them has the number that it expects next, which is the only one that it
//!   accepts at once. The first has the segment's own number: the peer expects it if the segment brings something new.
//!   The second has the number behind the segment: the peer expects it if it has the segment's data already. A segment
//!   without data may be a keepalive or window probe, whose number is one too low (RFC 9293, sections 3.8.4 and 3.8.6.1),
//!   so there the second has the number plus one.
//!
//! # UDP
//!
//! The packet is truncated behind its UDP header and quoted in an ICMP "port unreachable" from the address that it
//! was sent to.

use breaker_common::{POKE_NUMBER_BITS, PROTO_TCP, PassReason, csum};
use network_types::{eth::EthHdr, tcp::TcpHdr, udp::UdpHdr};

use crate::{
    family::{Family, V4},
    flow::Peer,
    nat::{Side, TCP_CHECK},
    packet::{Frame, Packet},
    parse::{Segment, UNTAGGED_L3_OFFSET, flags},
    wire::Wire as _,
};

/// The acknowledgment number of the agent's pokes without its top bit. The loader sets it.
#[unsafe(no_mangle)]
static POKE_NUMBER: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);

/// Fields of a segment that its answer depends on. Numbers are in host byte order.
#[derive(Clone, Copy)]
struct Numbers {
    /// The segment's sequence number.
    sequence: u32,
    /// The segment's acknowledgment number; 0 without ACK.
    acknowledgment: u32,
    /// The sequence number that follows the segment.
    next: u32,
    /// The sequence number of the second reset to the peer.
    second: u32,
    /// MAC addresses of the segment's sender and receiver.
    sender: [u8; 6],
    receiver: [u8; 6],
}

/// A reset to write: MAC addresses, then addresses and ports in wire order, then numbers in host byte order.
struct Reset<A> {
    sender: [u8; 6],
    receiver: [u8; 6],
    source: A,
    destination: A,
    source_port: [u8; 2],
    destination_port: [u8; 2],
    sequence: u32,
    acknowledgment: u32,
}

/// Turns a SYN into its answer, RST+ACK. The caller sends it back.
///
/// # Errors
/// [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn refuse_segment<A: Family>(packet: &impl Frame, segment: &Segment<A>) -> Result<(), PassReason> {
    let numbers = shorten(packet, segment).ok_or(PassReason::RewriteFailed)?;
    write(packet, segment, &to_client(segment, &numbers)).ok_or(PassReason::RewriteFailed)
}

/// Turns a datagram into its answer, an ICMP "port unreachable". The caller sends it back.
///
/// # Errors
/// [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn refuse_datagram<A: Family>(packet: &impl Frame, segment: &Segment<A>) -> Result<(), PassReason> {
    unreachable(packet, segment).ok_or(PassReason::RewriteFailed)
}

/// Resets an established connection at both ends, given a segment from the client. Sends a reset back to the client,
/// has the interface receive one for the peer as if the client had sent it, and turns the packet into another one for the
/// peer, which the caller sends on.
///
/// # Errors
/// [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn both_ends<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, peer: &Peer<A>) -> Result<(), PassReason> {
    let numbers = shorten(packet, segment).ok_or(PassReason::RewriteFailed)?;
    write(packet, segment, &to_client(segment, &numbers)).ok_or(PassReason::RewriteFailed)?;
    // A veth whose queue is full drops the copy. The peer is reset nevertheless, and the client's next segment is
    // answered.
    let _ = packet.send_copy_back();
    let from_client = Reset {
        sender: numbers.sender,
        receiver: numbers.receiver,
        source: segment.source,
        destination: segment.destination,
        source_port: segment.ports.source,
        destination_port: segment.ports.destination,
        sequence: numbers.second,
        acknowledgment: numbers.acknowledgment,
    };
    write(packet, segment, &from_client).ok_or(PassReason::RewriteFailed)?;
    let _ = packet.receive_copy();
    let forward_to = Reset {
        sender: numbers.sender,
        receiver: numbers.receiver,
        source: segment.source,
        destination: peer.addr,
        source_port: peer.source_port,
        destination_port: peer.port,
        sequence: numbers.sequence,
        acknowledgment: numbers.acknowledgment,
    };
    write(packet, segment, &forward_to).ok_or(PassReason::RewriteFailed)
}

/// Whether a reset without ACK has the number that a poke acknowledges. The client has no such connection, and nobody on
/// the way knows one, so the reset must not travel on: behind NAT, it would be sent back.
#[inline(always)]
pub fn has_poke_number<A>(segment: &Segment<A>) -> bool {
    u32::from_be_bytes(segment.sequence) & POKE_NUMBER_BITS == POKE_NUMBER.load()
}

/// The reset that goes back to the sender of a segment.
#[inline(always)]
fn to_client<A: Family>(segment: &Segment<A>, numbers: &Numbers) -> Reset<A> {
    Reset {
        sender: numbers.receiver,
        receiver: numbers.sender,
        source: segment.destination,
        destination: segment.source,
        source_port: segment.ports.destination,
        destination_port: segment.ports.source,
        sequence: numbers.acknowledgment,
        acknowledgment: numbers.next,
    }
}

/// The offset of the IP header's length field, and how many bytes in front of the TCP or UDP header this field
/// counts.
#[inline(always)]
fn length_field<A: Family>(segment: &Segment<A>) -> (usize, usize) {
    let headers = segment.l4() - segment.l3();
    if A::VERSION == 4 { (segment.l3() + 2, headers) } else { (segment.l3() + 4, headers - A::HEADER) }
}

/// Reads the fields that the answer needs and truncates the packet to a TCP header without options.
#[inline(always)]
fn shorten<A: Family>(packet: &impl Frame, segment: &Segment<A>) -> Option<Numbers> {
    let eth = packet.read::<EthHdr>(0)?;
    let (length_at, counted) = length_field(segment);
    let length = u16::from_be_bytes(packet.read::<[u8; 2]>(length_at)?) as u32;
    let tcp = packet.read::<[u8; TcpHdr::LEN]>(segment.l4())?;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let acknowledgment =
        if segment.flags & flags::ACK != 0 { u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]) } else { 0 };
    // Length of the segment in sequence space: its payload, plus one each for SYN and FIN (RFC 9293, section 3.4).
    let headers = counted as u32 + ((tcp[12] >> 4) as u32) * 4;
    let payload = length.saturating_sub(headers);
    let syn = (segment.flags & flags::SYN != 0) as u32;
    let fin = (segment.flags & flags::FIN != 0) as u32;
    packet.cut((segment.l4() + TcpHdr::LEN) as u32)?;
    if segment.more_fragments != 0 {
        make_whole(packet, segment)?;
    }
    let length = payload + syn + fin;
    Some(Numbers {
        sequence,
        acknowledgment,
        next: sequence.wrapping_add(length),
        second: sequence.wrapping_add(if length == 0 { 1 } else { length }),
        sender: eth.src_addr,
        receiver: eth.dst_addr,
    })
}

/// Clears the flag "more fragments". A reset made from a first fragment has no later ones, so no host could
/// reassemble it.
#[inline(always)]
fn make_whole<A: Family>(packet: &impl Frame, segment: &Segment<A>) -> Option<()> {
    let old = packet.read::<[u8; 2]>(segment.more_fragments_offset())?;
    let new = if A::VERSION == 4 { [old[0] & !0x20, old[1]] } else { [old[0], old[1] & !1] };
    packet.write(segment.more_fragments_offset(), new)?;
    if let Some(check_at) = A::CHECK_OFFSET {
        let check = u16::from_be_bytes(packet.read::<[u8; 2]>(segment.l3() + check_at)?);
        let check = csum::replaced(check, csum::word(old), csum::word(new));
        packet.write(segment.l3() + check_at, check.to_be_bytes())?;
    }
    Some(())
}

/// Writes the length, the addresses and, for IPv4, the header's checksum. The checksum is updated by the fields
/// that changed, because options, if any, did not. `total`: value of the length field.
#[inline(always)]
fn write_ip<A: Family>(packet: &impl Frame, segment: &Segment<A>, total: u16, source: A, destination: A) -> Option<()> {
    let (length_at, _) = length_field(segment);
    let (source_at, destination_at) =
        (segment.l3() + Side::Source.addr_at::<A>(), segment.l3() + Side::Destination.addr_at::<A>());
    if let Some(check_at) = A::CHECK_OFFSET {
        let check = packet.read::<[u8; 2]>(segment.l3() + check_at)?;
        let old = csum::word(packet.read::<[u8; 2]>(length_at)?)
            + packet.read::<A>(source_at)?.words()
            + packet.read::<A>(destination_at)?.words();
        let new = total as u64 + source.words() + destination.words();
        let check = csum::replaced(u16::from_be_bytes(check), old, new);
        packet.write(segment.l3() + check_at, check.to_be_bytes())?;
    }
    packet.write(length_at, total.to_be_bytes())?;
    packet.write(source_at, source)?;
    packet.write(destination_at, destination)
}

/// Writes a reset over the packet's headers.
#[inline(always)]
fn write<A: Family>(packet: &impl Frame, segment: &Segment<A>, reset: &Reset<A>) -> Option<()> {
    write_all(packet, segment, reset).then_some(())
}

/// [`try_write`] as a BPF subprogram (not inlined), which can return only a number: whether it succeeded.
#[inline(never)]
fn write_all<A: Family>(packet: &impl Frame, segment: &Segment<A>, reset: &Reset<A>) -> bool {
    try_write(packet, segment, reset).is_some()
}

#[inline(always)]
fn try_write<A: Family>(packet: &impl Frame, segment: &Segment<A>, reset: &Reset<A>) -> Option<()> {
    let eth = packet.read::<EthHdr>(0)?;
    packet.write(0, EthHdr { dst_addr: reset.receiver, src_addr: reset.sender, ether_type: eth.ether_type })?;
    let (_, counted) = length_field(segment);
    write_ip(packet, segment, (counted + TcpHdr::LEN) as u16, reset.source, reset.destination)?;
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
        // Header length of five words; RST and ACK; no window, no urgent pointer. The checksum is written below.
        5 << 4,
        flags::RST | flags::ACK,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    packet.write(segment.l4(), header)?;
    write_checksum(packet, segment.l4(), reset)
}

/// Writes the TCP checksum: complete, or, if the device adds the rest (CHECKSUM_PARTIAL, the rule on a veth), only
/// the sum of the pseudo header.
#[inline(always)]
fn write_checksum<A: Family>(packet: &impl Frame, l4: usize, reset: &Reset<A>) -> Option<()> {
    let at = l4 + TCP_CHECK;
    let partial = packet.probe_is_partial(at)?;
    let pseudo = csum::pseudo(reset.source.words(), reset.destination.words(), PROTO_TCP, TcpHdr::LEN as u16);
    let check = if partial {
        csum::fold(pseudo)
    } else {
        let ports = csum::word(reset.source_port) + csum::word(reset.destination_port);
        let numbers = csum::words4(reset.sequence.to_be_bytes()) + csum::words4(reset.acknowledgment.to_be_bytes());
        !csum::fold(pseudo + ports + numbers + (5 << 12) + (flags::RST | flags::ACK) as u64)
    };
    packet.write(at, check.to_be_bytes())
}

/// Length of an ICMP header.
const ICMP: usize = 8;
/// Number of bytes of a refused datagram that are quoted behind its IP header (RFC 792). RFC 4443 asks for as many
/// as fit, but no host needs more than the ports.
const QUOTED: usize = UdpHdr::LEN;

/// Turns a datagram into an ICMP "port unreachable" about itself. `None` for a datagram with VLAN tags or IPv6
/// extension headers: it passes instead.
#[inline(always)]
fn unreachable<A: Family>(packet: &impl Frame, segment: &Segment<A>) -> Option<()> {
    if segment.l3() != UNTAGGED_L3_OFFSET || (A::VERSION == 6 && segment.l4() != UNTAGGED_L3_OFFSET + A::HEADER) {
        return None;
    }
    let (client, vip) = (segment.source, segment.destination);
    let eth = packet.read::<EthHdr>(0)?;
    let quote = (segment.l4() - UNTAGGED_L3_OFFSET + QUOTED) as u16;
    let udp = packet.read::<[u8; QUOTED]>(segment.l4())?;
    // The sum of the quoted IP header. An IPv4 header, with its options, sums up to zero because of its own checksum.
    let quoted_header = if A::VERSION == 4 {
        0
    } else {
        let first = packet.read::<[u8; 8]>(UNTAGGED_L3_OFFSET)?;
        csum::words4([first[0], first[1], first[2], first[3]])
            + csum::words4([first[4], first[5], first[6], first[7]])
            + client.words()
            + vip.words()
    };
    let quoted =
        quoted_header + csum::words4([udp[0], udp[1], udp[2], udp[3]]) + csum::words4([udp[4], udp[5], udp[6], udp[7]]);
    packet.cut((segment.l4() + QUOTED) as u32)?;
    packet.make_room((A::HEADER + ICMP) as u32)?;
    packet.write(0, EthHdr { dst_addr: eth.src_addr, src_addr: eth.dst_addr, ether_type: eth.ether_type })?;
    let icmp_length = ICMP as u16 + quote;
    // Type and code of "port unreachable": RFC 792; RFC 4443, section 3.1.
    let (kind, code) = if A::VERSION == 4 { (3, 3) } else { (1, 4) };
    let under = if A::VERSION == 4 { 0 } else { csum::pseudo(client.words(), vip.words(), A::ICMP, icmp_length) };
    let check = !csum::fold(under + csum::word([kind, code]) + quoted);
    let c = check.to_be_bytes();
    packet.write(UNTAGGED_L3_OFFSET + A::HEADER, [kind, code, c[0], c[1], 0, 0, 0, 0])?;
    if A::VERSION == 4 {
        let t = (V4::HEADER as u16 + icmp_length).to_be_bytes();
        // Precedence "internetwork control", as RFC 1812, section 4.3.2.5 asks for; "don't fragment"; TTL 64.
        packet.write(UNTAGGED_L3_OFFSET, [0x45, 0xc0, t[0], t[1], 0, 0, 0x40, 0, 64, A::ICMP, 0, 0])?;
        let sum = csum::word([0x45, 0xc0]) + csum::word(t) + 0x4000 + csum::word([64, A::ICMP]);
        packet.write(UNTAGGED_L3_OFFSET + 10, (!csum::fold(sum + vip.words() + client.words())).to_be_bytes())?;
    } else {
        let l = icmp_length.to_be_bytes();
        packet.write(UNTAGGED_L3_OFFSET, [0x60, 0, 0, 0, l[0], l[1], A::ICMP, 64])?;
    }
    packet.write(UNTAGGED_L3_OFFSET + A::SOURCE_OFFSET, vip)?;
    packet.write(UNTAGGED_L3_OFFSET + A::DESTINATION_OFFSET, client)
}
