//! IPv4 headers (RFC 791).

use breaker_common::PassReason;

use super::{BasicHeader, Kind, Parse, SEGMENTS4, Segment, Segments, is_supported, transport::transport, unsupported};
use crate::{packet::Frame, wire::V4};

/// An IPv4 header (RFC 791, section 3.1), divided into fields that are cheap to read. Integers are in wire order.
#[derive(Clone, Copy)]
#[repr(C)]
struct Ipv4 {
    version_and_length: u8,
    tos: u8,
    total_length: u16,
    id: [u8; 2],
    fragment: u16,
    ttl: u8,
    proto: u8,
    check: u16,
    source: V4,
    destination: V4,
}

impl Parse for V4 {
    #[inline(always)]
    fn parse(packet: &impl Frame, l3: usize, segment: &mut Segment<V4>) -> Result<Kind, PassReason> {
        let Some(ip) = packet.at::<Ipv4>(l3) else { return Err(PassReason::Truncated) };
        // SAFETY: `at` checked the bounds; any bytes are a valid value; see `Frame::read` on alignment.
        let ip = unsafe { &*ip };
        if !is_supported::<V4>(ip.proto) {
            return Ok(unsupported(ip.proto));
        }
        // Length of the header in bytes. The mask shows the verifier that it is at most 60.
        let ihl = ((ip.version_and_length & 0x0f) as usize * 4) & 0x3c;
        if ip.version_and_length >> 4 != 4 || ihl < size_of::<Ipv4>() {
            return Err(PassReason::Truncated);
        }
        segment.source = ip.source;
        segment.destination = ip.destination;
        segment.proto = ip.proto;
        segment.l3 = l3 as u32;
        let fragment = u16::from_be(ip.fragment);
        segment.more_fragments = 0;
        // The flag "more fragments", or a fragment offset other than 0.
        if fragment & 0x3fff != 0 {
            segment.more_fragments = (fragment & 0x2000 != 0) as u8;
            segment.more_fragments_offset = (l3 + 6) as u32;
            segment.fragment_id = [0, 0, ip.id[0], ip.id[1]];
            segment.fragment_proto = ip.proto;
            if fragment & 0x1fff != 0 {
                return Ok(Kind::LaterFragment);
            }
        }
        let total_length = ip.total_length;
        // Bytes behind the total length are padding, not a header.
        let length = u16::from_be(total_length) as usize;
        let Some(rest) = length.checked_sub(ihl) else { return Err(PassReason::Truncated) };
        transport(packet, l3 + ihl, rest, segment)
    }

    #[inline(always)]
    fn read_basic(packet: &impl Frame, l3: usize) -> Option<BasicHeader<V4>> {
        let ip = packet.at::<Ipv4>(l3)?;
        // SAFETY: `at` checked the bounds; any bytes are a valid value; see `Frame::read` on alignment.
        let ip = unsafe { &*ip };
        if ip.version_and_length != 0x45 || u16::from_be(ip.fragment) & 0x3fff != 0 {
            return None;
        }
        let rest = (u16::from_be(ip.total_length) as usize).checked_sub(size_of::<Ipv4>())?;
        Some(BasicHeader { source: ip.source, destination: ip.destination, proto: ip.proto, rest })
    }

    #[inline(always)]
    fn segments() -> &'static Segments<Self> {
        &SEGMENTS4
    }
}
