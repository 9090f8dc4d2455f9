//! Translating there (DNAT) and back (revNAT): addresses, ports, the checksums, nothing else.

use breaker_common::PassReason;
use network_types::{ip::Ipv4Hdr, tcp::TcpHdr};

use crate::{
    csum,
    packet::Packet,
    parse::{L3, Segment},
};

const IP_CHECK: usize = L3 + core::mem::offset_of!(Ipv4Hdr, check);
const IP_SOURCE: usize = L3 + core::mem::offset_of!(Ipv4Hdr, src_addr);
const IP_DESTINATION: usize = L3 + core::mem::offset_of!(Ipv4Hdr, dst_addr);
const TCP_SOURCE: usize = core::mem::offset_of!(TcpHdr, source);
const TCP_DESTINATION: usize = core::mem::offset_of!(TcpHdr, dest);
pub const TCP_CHECK: usize = core::mem::offset_of!(TcpHdr, check);

/// One end of a tuple and its replacement.
#[derive(Clone, Copy)]
enum End {
    Source,
    Destination,
}

/// Sends a segment to another destination; from another source port too, where `source_port` is not the segment's.
///
/// # Errors
/// [`PassReason::RewriteFailed`]: the headers are not where they were parsed, which cannot happen.
#[inline(always)]
pub fn to_backend(
    packet: &Packet<'_>,
    segment: &Segment,
    backend: [u8; 4],
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
pub fn from_backend(
    packet: &Packet<'_>,
    segment: &Segment,
    vip: [u8; 4],
    vip_port: [u8; 2],
    client_port: [u8; 2],
) -> Result<(), PassReason> {
    replace(packet, segment, End::Source, vip, vip_port, client_port).ok_or(PassReason::RewriteFailed)
}

/// Replaces address and port at one end, and the port at the other.
#[inline(always)]
fn replace(
    packet: &Packet<'_>,
    segment: &Segment,
    end: End,
    addr: [u8; 4],
    port: [u8; 2],
    other_port: [u8; 2],
) -> Option<()> {
    let (addr_at, port_at, old_addr, old_port, other_at, old_other) = match end {
        End::Source => {
            (IP_SOURCE, TCP_SOURCE, segment.source, segment.source_port, TCP_DESTINATION, segment.destination_port)
        }
        End::Destination => (
            IP_DESTINATION,
            TCP_DESTINATION,
            segment.destination,
            segment.destination_port,
            TCP_SOURCE,
            segment.source_port,
        ),
    };
    // All direct writes first: the checksum helpers void the pointers. The IP checksum is always complete, and the
    // header's sum stays what it was, so a device's own sum over the packet stays right as well.
    let check = u16::from_be_bytes(packet.read::<[u8; 2]>(IP_CHECK)?);
    let check = csum::replaced(check, csum::words4(old_addr), csum::words4(addr));
    packet.write(IP_CHECK, check.to_be_bytes())?;
    packet.write(addr_at, addr)?;
    packet.write(segment.l4 + port_at, port)?;
    let other_changed = old_other != other_port;
    if other_changed {
        packet.write(segment.l4 + other_at, other_port)?;
    }
    let check_at = segment.l4 + TCP_CHECK;
    packet.pseudo_changed(check_at, old_addr, addr)?;
    if old_port != port {
        packet.payload_changed(check_at, old_port, port)?;
    }
    if other_changed {
        packet.payload_changed(check_at, old_other, other_port)?;
    }
    Some(())
}
