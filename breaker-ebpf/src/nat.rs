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
    let before = packet.read::<u16>(check_at)?;
    packet.pseudo_changed(check_at, old_addr, addr)?;
    if old_port == port && !other_changed {
        return Some(());
    }
    ports_changed(packet, check_at, before, (old_addr, addr), [(old_port, port), (old_other, other_port)])
}

/// A port and its replacement.
type Change = ([u8; 2], [u8; 2]);

/// Tells the TCP checksum that ports changed. A partial checksum does not have them in it, a complete one does; a program
/// cannot ask which it is, but what the helper has just made of the changed address tells, and another call of it costs as
/// much as all the rest of the translation. Only where both would have come out the same is the helper asked again.
#[inline(always)]
fn ports_changed(
    packet: &Packet<'_>,
    check_at: usize,
    before: u16,
    (from, to): ([u8; 4], [u8; 4]),
    ports: [Change; 2],
) -> Option<()> {
    let after = packet.read::<u16>(check_at)?;
    let (from, to) = (u32::from_ne_bytes(from), u32::from_ne_bytes(to));
    let complete = csum::complete_after(before, from, to);
    let partial = csum::partial_after(before, from, to);
    if complete == partial {
        for (old, new) in ports {
            packet.payload_changed(check_at, old, new)?;
        }
        return Some(());
    }
    if after == partial {
        return Some(());
    }
    let sum = |ports: [[u8; 2]; 2]| u16::from_be_bytes(ports[0]) as u64 + u16::from_be_bytes(ports[1]) as u64;
    let (old, new) = (sum([ports[0].0, ports[1].0]), sum([ports[0].1, ports[1].1]));
    packet.write(check_at, csum::replaced(u16::from_be(after), old, new).to_be_bytes())
}
