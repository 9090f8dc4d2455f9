//! The parser of the prefilter: the tuple of the most common packets, without storing anything.

use breaker_common::{PROTO_TCP, PROTO_UDP};

use super::{
    Parse,
    transport::{Ports, is_control, is_fin_or_rst, is_request, ports},
};
use crate::packet::Frame;

/// Tuple and flags of a packet of the most common kind, for the prefilter: see [`peek`].
#[derive(Clone, Copy)]
pub struct Peek<A> {
    pub source: A,
    pub destination: A,
    pub ports: Ports,
    pub proto: u8,
    /// As [`super::Segment::may_start_flow`].
    pub may_start_flow: bool,
    /// TCP flags; 0 for UDP.
    flags: u8,
}

impl<A> Peek<A> {
    /// As [`super::Segment::is_fin_or_rst`].
    #[inline(always)]
    pub fn is_fin_or_rst(&self) -> bool {
        is_fin_or_rst(self.flags)
    }

    /// As [`super::Segment::is_control`].
    #[inline(always)]
    pub fn is_control(&self) -> bool {
        is_control(self.flags)
    }
}

/// The prefilter's parser: reads the tuple of a TCP segment or UDP datagram that has neither IP options nor
/// extension headers, is no fragment, and has its headers in the linear part. `None` for every other packet.
///
/// It stores nothing, because most packets then pass unchanged. The full parser ([`super::headers`]) handles all
/// other packets, and those that need the full path.
#[inline(always)]
pub fn peek<A: Parse>(packet: &impl Frame, l3: usize) -> Option<Peek<A>> {
    let ip = A::read_basic(packet, l3)?;
    if ip.proto != PROTO_TCP && ip.proto != PROTO_UDP {
        return None;
    }
    let (ports, flags, _) = ports(packet, l3 + A::HEADER, ip.rest, ip.proto)?;
    let may_start_flow = ip.proto != PROTO_TCP || is_request(flags);
    Some(Peek { source: ip.source, destination: ip.destination, ports, proto: ip.proto, may_start_flow, flags })
}

/// Fields of an IP header without options and extension headers, of a packet that is no fragment.
pub struct BasicHeader<A> {
    pub(super) source: A,
    pub(super) destination: A,
    pub(super) proto: u8,
    /// Number of bytes behind the header, according to the header.
    pub(super) rest: usize,
}
