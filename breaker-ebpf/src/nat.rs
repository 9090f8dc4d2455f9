//! Translation to the backend (DNAT) and back (revNAT): changes addresses, ports and checksums, nothing else.

use breaker_common::{PROTO_TCP, PROTO_UDP, PassReason, csum};
use network_types::{tcp::TcpHdr, udp::UdpHdr};

use crate::{
    family::Family,
    packet::{Frame, Packet},
    parse::Segment,
};

/// TCP and UDP headers both begin with the ports.
const SOURCE_PORT: usize = 0;
const DESTINATION_PORT: usize = 2;
pub const TCP_CHECK: usize = core::mem::offset_of!(TcpHdr, check);
const UDP_CHECK: usize = core::mem::offset_of!(UdpHdr, check);

/// One end of a tuple.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source = 0,
    Destination = 1,
}

impl Side {
    /// Offset of this end's address in the IP header.
    #[inline(always)]
    pub fn addr_at<A: Family>(self) -> usize {
        match self {
            Self::Source => A::SOURCE_OFFSET,
            Self::Destination => A::DESTINATION_OFFSET,
        }
    }

    /// Offset of this end's port in the TCP or UDP header.
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

/// Offset of the checksum in the header of a protocol: TCP, or UDP for every other value.
#[inline(always)]
pub fn check_at(proto: u8) -> usize {
    if proto == PROTO_TCP { TCP_CHECK } else { UDP_CHECK }
}

/// Changes the destination of a segment to a backend, and its source port to `source_port` if that differs.
/// Addresses and ports are in wire order.
///
/// # Errors
/// [`PassReason::RewriteFailed`]: the headers are not at the offsets that were parsed, which cannot happen.
#[inline(always)]
pub fn to_backend<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    backend: A,
    backend_port: [u8; 2],
    source_port: [u8; 2],
) -> Result<(), PassReason> {
    replace(packet, segment, Side::Destination, backend, backend_port, source_port).ok_or(PassReason::RewriteFailed)
}

/// Changes the source of a backend's reply to the frontend that the client connected to, and its destination port
/// to the client's own port. Addresses and ports are in wire order.
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
    replace(packet, segment, Side::Source, vip, vip_port, client_port).ok_or(PassReason::RewriteFailed)
}

/// Replaces an address in the IP header at `l3` and updates the header's checksum, by direct writes only. (For IPv4
/// the header's total sum does not change, so a device's own sum over the packet stays correct.)
#[inline(always)]
pub fn replace_address<A: Family>(packet: &Packet<'_>, l3: usize, end: Side, old: A, new: A) -> Option<()> {
    if let Some(check_at) = A::CHECK_OFFSET {
        let check = u16::from_be(packet.read::<u16>(l3 + check_at)?);
        packet.write(l3 + check_at, csum::replaced(check, old.words(), new.words()).to_be())?;
    }
    packet.write(l3 + end.addr_at::<A>(), new)
}

/// Replaces the address and the port at one end, and the port at the other end.
#[inline(always)]
fn replace<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    end: Side,
    addr: A,
    port: [u8; 2],
    other_port: [u8; 2],
) -> Option<()> {
    let (old_addr, old_port, old_other) = match end {
        Side::Source => (segment.source, segment.ports.source, segment.ports.destination),
        Side::Destination => (segment.destination, segment.ports.destination, segment.ports.source),
    };
    // All direct writes come first: the checksum helpers invalidate pointers into the packet.
    replace_address(packet, segment.l3(), end, old_addr, addr)?;
    packet.write(segment.l4() + end.port_at(), u16::from_ne_bytes(port))?;
    let other_changed = old_other != other_port;
    if other_changed {
        packet.write(segment.l4() + end.other().port_at(), u16::from_ne_bytes(other_port))?;
    }
    let check_at = segment.l4() + check_at(segment.proto);
    let before = packet.read::<u16>(check_at)?;
    // UDP without a checksum stays without one (RFC 768).
    if before == 0 && segment.proto == PROTO_UDP {
        return Some(());
    }
    let difference = old_addr.csum_diff(addr);
    packet.update_csum_for_addr(check_at, difference)?;
    if A::CHECK_OFFSET.is_none() {
        packet.update_complete_csum(difference);
    }
    if old_port != port || other_changed {
        ports_changed(packet, check_at, before, difference, [(old_port, port), (old_other, other_port)])?;
    }
    // A UDP checksum of zero would mean that there is none, so its other representation is written (RFC 768). A
    // partial checksum is not final, and the device applies this rule to the result.
    if segment.proto == PROTO_UDP && packet.read::<u16>(check_at)? == 0 {
        packet.write(check_at, [0xff_u8; 2])?;
    }
    Some(())
}

/// A port before and after the translation, wire order.
type PortChange = ([u8; 2], [u8; 2]);

/// Updates the checksum at `check_at` after ports changed. A complete checksum covers the ports, a partial one does
/// not. A program cannot read the kind of the checksum, but the value that the helper wrote for the changed address
/// reveals it. A second call of the helper would cost as much as the rest of the translation, so the helper is
/// called again only if both kinds would have given the same value.
///
/// `before`: the checksum as it was before the address changed. `difference`: the change of the address.
#[inline(always)]
fn ports_changed(
    packet: &Packet<'_>,
    check_at: usize,
    before: u16,
    difference: u32,
    ports: [PortChange; 2],
) -> Option<()> {
    let after = packet.read::<u16>(check_at)?;
    let complete = csum::complete_after(before, difference);
    let partial = csum::partial_after(before, difference);
    if complete == partial {
        for (old, new) in ports {
            packet.update_csum_for_port(check_at, old, new)?;
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
