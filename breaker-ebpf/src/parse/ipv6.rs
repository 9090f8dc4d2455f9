//! IPv6 headers and extension headers (RFC 8200).

use breaker_common::PassReason;

use super::{
    BasicHeader, Kind, MAX_EXTENSION_HEADERS, MAX_EXTENSIONS_LEN, Parse, SEGMENTS6, Segment, Segments, is_supported,
    proto, transport::transport, unsupported,
};
use crate::{packet::Frame, wire::V6};

/// An IPv6 header (RFC 8200, section 3), divided into fields that are cheap to read. Integers are in wire order.
#[derive(Clone, Copy)]
#[repr(C)]
struct Ipv6 {
    version: [u8; 4],
    length: u16,
    next: u8,
    hop_limit: u8,
    source: V6,
    destination: V6,
}

#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(next, proto::HOP_BY_HOP | proto::ROUTING | proto::FRAGMENT | proto::AUTHENTICATION | proto::DESTINATION)
}

impl Parse for V6 {
    #[inline(always)]
    fn parse(packet: &impl Frame, l3: usize, segment: &mut Segment<V6>) -> Result<Kind, PassReason> {
        let Some(ip) = packet.at::<Ipv6>(l3) else { return Err(PassReason::Truncated) };
        // SAFETY: `at` checked the bounds; any bytes are a valid value; see `Frame::read` on alignment.
        let ip = unsafe { &*ip };
        if ip.version[0] >> 4 != 6 {
            return Err(PassReason::Truncated);
        }
        let mut next = ip.next;
        let length = u16::from_be(ip.length) as usize;
        segment.l3 = l3 as u32;
        segment.more_fragments = 0;
        segment.source = ip.source;
        segment.destination = ip.destination;
        let mut behind = 0;
        for _ in 0..MAX_EXTENSION_HEADERS {
            if is_supported::<V6>(next) || !is_extension(next) {
                break;
            }
            let Some(header) = packet.read::<[u8; 8]>(l3 + 40 + behind) else { return Err(PassReason::Truncated) };
            match next {
                proto::FRAGMENT => {
                    // RFC 8200, section 4.5.
                    let fragment = u16::from_be_bytes([header[2], header[3]]);
                    segment.more_fragments = (fragment & 1) as u8;
                    segment.more_fragments_offset = (l3 + 40 + behind + 2) as u32;
                    segment.fragment_id = [header[4], header[5], header[6], header[7]];
                    segment.fragment_proto = header[0];
                    if fragment & 0xfff8 != 0 {
                        return Ok(Kind::LaterFragment);
                    }
                    behind += 8;
                }
                // RFC 4302, section 2.2: the length field counts 4-byte words, minus 2.
                proto::AUTHENTICATION => behind += (header[1] as usize + 2) * 4,
                // RFC 8200, section 4.4: while "Segments Left" is not 0, the IPv6 header does not hold the final
                // destination, and the TCP or UDP checksum covers the final one.
                proto::ROUTING if header[3] != 0 => return Err(PassReason::ExtensionHeaders),
                _ => behind += (header[1] as usize + 1) * 8,
            }
            if behind > MAX_EXTENSIONS_LEN {
                return Err(PassReason::ExtensionHeaders);
            }
            next = header[0];
        }
        if !is_supported::<V6>(next) {
            return if is_extension(next) { Err(PassReason::ExtensionHeaders) } else { Ok(unsupported(next)) };
        }
        segment.proto = next;
        let Some(rest) = length.checked_sub(behind) else { return Err(PassReason::Truncated) };
        transport(packet, l3 + 40 + behind, rest, segment)
    }

    #[inline(always)]
    fn read_basic(packet: &impl Frame, l3: usize) -> Option<BasicHeader<V6>> {
        let ip = packet.at::<Ipv6>(l3)?;
        // SAFETY: as in `parse`.
        let ip = unsafe { &*ip };
        if ip.version[0] >> 4 != 6 {
            return None;
        }
        let rest = u16::from_be(ip.length) as usize;
        Some(BasicHeader { source: ip.source, destination: ip.destination, proto: ip.next, rest })
    }

    #[inline(always)]
    fn segments() -> &'static Segments<Self> {
        &SEGMENTS6
    }
}
