//! ICMP errors about translated packets. An error quotes the packet as breaker translated it. The quoted header is
//! translated back, so that the host that receives the error recognizes its own packet. This matters above all for
//! path MTU discovery (RFC 1191, RFC 8201; RFC 5508, section 7.2).

use breaker_common::{PROTO_TCP, PROTO_UDP, PassReason, csum};

use crate::{
    family::Family,
    nat::{self, Side},
    packet::{Frame, Packet},
    parse::Segment,
};

/// Length of an ICMP header; the quote follows it.
const HEADER: usize = 8;
const CHECK_OFFSET: usize = 2;

/// The tuple of the packet that an error quotes, in wire order, and the offsets of its headers.
#[derive(Clone, Copy)]
pub struct Quote<A> {
    pub source: A,
    pub destination: A,
    pub source_port: [u8; 2],
    pub destination_port: [u8; 2],
    pub proto: u8,
    l3: usize,
    l4: usize,
}

impl<A: Family> Quote<A> {
    /// A quote of zeros, for [`read`] to fill.
    #[inline(always)]
    pub fn empty() -> Self {
        Self {
            source: A::ZERO,
            destination: A::ZERO,
            source_port: [0; 2],
            destination_port: [0; 2],
            proto: 0,
            l3: 0,
            l4: 0,
        }
    }
}

/// Reads the quote of an error. `None` if it quotes neither TCP nor UDP, or if the quote has no ports. Padding
/// behind the error is not part of the quote.
#[inline(always)]
pub fn read<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, quote: &mut Quote<A>) -> Option<()> {
    let l3 = segment.l4() + HEADER;
    // The quote may lie behind the bytes that parsing made linear.
    if packet.at::<[u8; 48]>(l3).is_none() {
        let needed = (l3 + A::HEADER + 40 + 8) as u32;
        packet.pull(if packet.len() < needed { packet.len() } else { needed })?;
    }
    // Reads two bytes: from the bounds check of a single byte the verifier learns no range.
    let first = packet.read::<[u8; 2]>(l3)?[0];
    if first >> 4 != A::VERSION {
        return None;
    }
    let (length, proto) = if A::VERSION == 4 {
        // A later fragment has no ports.
        let fragment = u16::from_be_bytes(packet.read::<[u8; 2]>(l3 + 6)?);
        if fragment & 0x1fff != 0 {
            return None;
        }
        (((first & 0x0f) as usize * 4) & 0x3c, packet.read::<[u8; 2]>(l3 + 8)?[1])
    } else {
        (A::HEADER, packet.read::<[u8; 2]>(l3 + 6)?[0])
    };
    if length < A::HEADER || (proto != PROTO_TCP && proto != PROTO_UDP) {
        return None;
    }
    let l4 = l3 + length;
    if l4 + size_of::<[u16; 2]>() > segment.end() {
        return None;
    }
    let ports = packet.read::<[u8; 4]>(l4)?;
    *quote = Quote {
        source: packet.read::<A>(l3 + A::SOURCE_OFFSET)?,
        destination: packet.read::<A>(l3 + A::DESTINATION_OFFSET)?,
        source_port: [ports[0], ports[1]],
        destination_port: [ports[2], ports[3]],
        proto,
        l3,
        l4,
    };
    Some(())
}

/// The new address and port at one end of a quote, and the new port at the other end. Wire order.
#[derive(Clone, Copy)]
pub struct QuoteRewrite<A> {
    pub end: Side,
    pub addr: A,
    pub port: [u8; 2],
    pub other_port: [u8; 2],
}

/// Translates the quote, and also the error's own address at the opposite end if it equals the translated one.
///
/// # Errors
/// [`PassReason::RewriteFailed`].
#[inline(always)]
pub fn translate<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    quote: &Quote<A>,
    change: &QuoteRewrite<A>,
) -> Result<(), PassReason> {
    try_translate(packet, segment, quote, change).ok_or(PassReason::RewriteFailed)
}

#[inline(always)]
fn try_translate<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    quote: &Quote<A>,
    change: &QuoteRewrite<A>,
) -> Option<()> {
    let (old_addr, old_port, old_other) = match change.end {
        Side::Source => (quote.source, quote.source_port, quote.destination_port),
        Side::Destination => (quote.destination, quote.destination_port, quote.source_port),
    };
    // The sums of all words under the error's checksum that change: before and after.
    let (mut old, mut new) = (old_addr.words(), change.addr.words());
    if let Some(at) = A::CHECK_OFFSET {
        let check = packet.read::<[u8; 2]>(quote.l3 + at)?;
        old += csum::word(check);
        new += csum::replaced(u16::from_be_bytes(check), old_addr.words(), change.addr.words()) as u64;
    }
    nat::replace_address(packet, quote.l3, change.end, old_addr, change.addr)?;
    let ports_old = csum::word(old_port) + csum::word(old_other);
    let ports_new = csum::word(change.port) + csum::word(change.other_port);
    packet.write(quote.l4 + change.end.port_at(), change.port)?;
    packet.write(quote.l4 + change.end.other().port_at(), change.other_port)?;
    old += ports_old;
    new += ports_new;
    // An error quotes at least eight bytes behind the IP header. These include UDP's checksum, but not always TCP's.
    let check_at = quote.l4 + nat::check_at(quote.proto);
    let is_quoted = check_at + size_of::<u16>() <= segment.end();
    if is_quoted && let Some(check) = packet.read::<[u8; 2]>(check_at) {
        let number = u16::from_be_bytes(check);
        let (old_sum, new_sum) = (old_addr.words() + ports_old, change.addr.words() + ports_new);
        let number = if quote.proto == PROTO_UDP {
            csum::replaced_udp(number, old_sum, new_sum)
        } else {
            csum::replaced(number, old_sum, new_sum)
        };
        packet.write(check_at, number.to_be_bytes())?;
        old += csum::word(check);
        new += number as u64;
    }
    // An error that the backend itself sent, or that is addressed to the VIP, has the translated address in its own
    // IP header, too.
    let (outer, outer_addr) = match change.end {
        Side::Source => (Side::Destination, segment.destination),
        Side::Destination => (Side::Source, segment.source),
    };
    if outer_addr == old_addr {
        nat::replace_address(packet, segment.l3(), outer, old_addr, change.addr)?;
        // ICMPv6's checksum covers the addresses (RFC 4443, section 2.3).
        if A::CHECK_OFFSET.is_none() {
            old += old_addr.words();
            new += change.addr.words();
        }
    }
    let at = segment.l4() + CHECK_OFFSET;
    let check = u16::from_be_bytes(packet.read::<[u8; 2]>(at)?);
    packet.write(at, csum::replaced(check, old, new).to_be_bytes())
}
