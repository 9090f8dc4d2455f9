//! Translating there (DNAT) and back (revNAT): addresses, ports, the checksums, nothing else.

use breaker_common::{PROTO_TCP, PROTO_UDP, PassReason};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

use crate::{
    csum,
    family::Family,
    packet::{Frame, Packet},
    parse::Segment,
};

/// TCP's and UDP's headers both begin with the ports.
const SOURCE_PORT: usize = 0;
const DESTINATION_PORT: usize = 2;
pub const TCP_CHECK: usize = core::mem::offset_of!(TcpHdr, check);
const UDP_CHECK: usize = core::mem::offset_of!(UdpHdr, check);

/// One end of a tuple.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source = 0,
    Destination = 1,
}

impl End {
    /// Where the end's address stands in the IP header.
    #[inline(always)]
    pub fn addr_at<A: Family>(self) -> usize {
        match self {
            Self::Source => A::SOURCE_AT,
            Self::Destination => A::DESTINATION_AT,
        }
    }

    /// Where the end's port stands in the TCP or UDP header.
    #[inline(always)]
    pub fn port_at(self) -> usize {
        match self {
            Self::Source => SOURCE_PORT,
            Self::Destination => DESTINATION_PORT,
        }
    }

    #[inline(always)]
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// Where a protocol's checksum stands in its header.
#[inline(always)]
pub fn check_at(proto: u8) -> usize {
    if proto == PROTO_TCP { TCP_CHECK } else { UDP_CHECK }
}

/// Sends a segment to another destination; from another source port too, where `source_port` is not the segment's.
///
/// # Errors
/// [`PassReason::RewriteFailed`]: the headers are not where they were parsed, which cannot happen.
#[inline(always)]
pub fn to_backend<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    backend: A,
    backend_port: [u8; 2],
    source_port: [u8; 2],
) -> Result<(), PassReason> {
    replace(packet, segment, End::Destination, backend, backend_port, source_port).ok_or(PassReason::RewriteFailed)
}

/// Makes a reply come from the address that the client connected to, to the port that it connected from.
///
/// # Errors
/// As for [`to_backend`].
#[inline(always)]
pub fn from_backend<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    vip: A,
    vip_port: [u8; 2],
    client_port: [u8; 2],
) -> Result<(), PassReason> {
    replace(packet, segment, End::Source, vip, vip_port, client_port).ok_or(PassReason::RewriteFailed)
}

/// Replaces an address in the IP header at `l3`, and corrects the header's own checksum. Direct writes only. (The header's
/// sum stays what it was, so a device's own sum over the packet stays right as well, for IPv4.)
#[inline(always)]
pub fn replace_address<A: Family>(packet: &Packet<'_>, l3: usize, end: End, old: A, new: A) -> Option<()> {
    if let Some(check_at) = A::CHECK_AT {
        let check = u16::from_be(packet.read::<u16>(l3 + check_at)?);
        packet.write(l3 + check_at, csum::replaced(check, old.words(), new.words()).to_be())?;
    }
    packet.write(l3 + end.addr_at::<A>(), new)
}

/// Replaces address and port at one end, and the port at the other.
#[inline(always)]
fn replace<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    end: End,
    addr: A,
    port: [u8; 2],
    other_port: [u8; 2],
) -> Option<()> {
    let (old_addr, old_port, old_other) = match end {
        End::Source => (segment.source, segment.ports.source, segment.ports.destination),
        End::Destination => (segment.destination, segment.ports.destination, segment.ports.source),
    };
    // All direct writes first: the checksum helpers void the pointers.
    replace_address(packet, segment.l3(), end, old_addr, addr)?;
    packet.write(segment.l4() + end.port_at(), u16::from_ne_bytes(port))?;
    let other_changed = old_other != other_port;
    if other_changed {
        packet.write(segment.l4() + end.other().port_at(), u16::from_ne_bytes(other_port))?;
    }
    let check_at = segment.l4() + check_at(segment.proto);
    let before = packet.read::<u16>(check_at)?;
    // UDP without a checksum stays without (RFC 768).
    if before == 0 && segment.proto == PROTO_UDP {
        return Some(());
    }
    let difference = old_addr.difference(addr);
    packet.pseudo_changed(check_at, difference)?;
    if A::CHECK_AT.is_none() {
        packet.sum_changed(difference);
    }
    if old_port != port || other_changed {
        ports_changed(packet, check_at, before, difference, [(old_port, port), (old_other, other_port)])?;
    }
    // What came out as zero would say that there is none; its other representation is meant (RFC 768). A partial one is
    // not at its end yet, and the device knows the rule.
    if segment.proto == PROTO_UDP && packet.read::<u16>(check_at)? == 0 {
        packet.write(check_at, [0xff_u8; 2])?;
    }
    Some(())
}

/// A port and its replacement.
type Change = ([u8; 2], [u8; 2]);

/// Tells the checksum that ports changed. A partial checksum does not have them in it, a complete one does; a program
/// cannot ask which it is, but what the helper has just made of the changed address tells, and another call of it costs as
/// much as all the rest of the translation. Only where both would have come out the same is the helper asked again.
#[inline(always)]
fn ports_changed(packet: &Packet<'_>, check_at: usize, before: u16, difference: u32, ports: [Change; 2]) -> Option<()> {
    let after = packet.read::<u16>(check_at)?;
    let complete = csum::complete_after(before, difference);
    let partial = csum::partial_after(before, difference);
    if complete == partial {
        for (old, new) in ports {
            packet.payload_changed(check_at, old, new)?;
        }
        return Some(());
    }
    if after == partial {
        return Some(());
    }
    let old = csum::word(ports[0].0) + csum::word(ports[1].0);
    let new = csum::word(ports[0].1) + csum::word(ports[1].1);
    packet.write(check_at, csum::replaced(u16::from_be(after), old, new).to_be())
}
