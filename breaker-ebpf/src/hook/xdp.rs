//! XDP on an uplink: refuses new connections in the driver, at a fraction of what a refusal costs in the network
//! stack. If a service is open, has no usable backup and refuses (`whenAllUnhealthy: Reject`), its clients send a
//! flood of connection requests.
//!
//! Every other packet is left to tc. A packet to a backup of another node must be masqueraded, by a mark that only
//! a packet in the network stack can carry. A packet to a backup of this node goes through the stack in any case.
//! It could not be translated here either: an XDP program cannot find out whether a checksum is complete, and on an
//! uplink that is a veth many are partial.

use aya_ebpf::{
    bindings::xdp_action::{XDP_PASS, XDP_TX},
    programs::XdpContext,
};
use breaker_common::{BreakerState, EventKind, PassReason, SLOT_REJECT, switch_flags};
use network_types::eth::EtherType;

use crate::{
    agent, count, endpoint, event,
    family::{Family, V4, V6},
    flow,
    packet::{Frame as _, XdpPacket},
    parse::{self, Direction, Kind, Peek, Segment},
    reset, select, service,
};

/// Handles a packet that comes in on an uplink.
#[inline(always)]
pub fn from_uplink(ctx: &XdpContext) -> u32 {
    let packet = XdpPacket::new(ctx);
    let mut l3 = 0;
    match parse::network::<true>(&packet, &mut l3) {
        Some(EtherType::Ipv4) => refuse::<V4>(&packet, l3),
        Some(EtherType::Ipv6) => refuse::<V6>(&packet, l3),
        _ => XDP_PASS,
    }
}

#[inline(always)]
fn refuse<A: Family>(packet: &XdpPacket<'_>, l3: usize) -> u32 {
    if parse::peek::<A>(packet, l3).is_some_and(|tuple| !may_be_refused(&tuple)) {
        return XDP_PASS;
    }
    let Some(segment) = Segment::<A>::scratch(Direction::Ingress) else { return XDP_PASS };
    let mut service = 0;
    if !is_refused(packet, l3, segment, &mut service) {
        return XDP_PASS;
    }
    let answered = if segment.is_tcp() { refuse_segment(packet, segment) } else { refuse_datagram(packet, segment) };
    if !answered {
        count::reason(PassReason::RewriteFailed);
        return XDP_PASS;
    }
    count::service(service, |c| &mut c.rejected);
    XDP_TX
}

/// Whether the packet may be the first of a flow to a frontend.
#[inline(always)]
fn may_be_refused<A: Family>(tuple: &Peek<A>) -> bool {
    tuple.may_start_flow && endpoint::filter_match(tuple.destination, tuple.ports.destination, tuple.proto).frontend
}

/// Whether the packet is the first of a connection that is to be refused; sets `service` if so. A packet that
/// cannot be parsed is passed to tc, which counts it.
#[inline(never)]
fn is_refused<A: Family>(packet: &XdpPacket<'_>, l3: usize, segment: &mut Segment<A>, service: &mut u32) -> bool {
    let Ok(Kind::Transport) = parse::headers(packet, l3, segment) else { return false };
    if !segment.may_start_flow() {
        return false;
    }
    let Some(role) = endpoint::find(segment.destination, segment.ports.destination, segment.proto) else {
        return false;
    };
    let Some(index) = endpoint::index(role.service) else { return false };
    let Some(switch) = service::switch(index) else { return false };
    // A packet in several buffers: only its first one can be read, and cut.
    if segment.end() > packet.len() as usize {
        return false;
    }
    // While half-open, permits are counted, and only the full path does that.
    if switch.state != BreakerState::Open as u8 || switch.has(switch_flags::DRY_RUN) || segment.more_fragments != 0 {
        return false;
    }
    let key = flow::key(segment);
    if !segment.is_tcp() && flow::find(&key).is_some() {
        return false;
    }
    if !agent::may_act_on_decision(&switch, agent::now_ns())
        || select::choose(index, role.route, &switch, &key, false).slot != SLOT_REJECT
    {
        return false;
    }
    // An earlier connection with the same ports may have left its flow.
    flow::remove(&key, segment.sequence, switch.epoch);
    event::send(EventKind::Rejected, index, &switch, &key, None);
    *service = index;
    true
}

#[inline(never)]
fn refuse_segment<A: Family>(packet: &XdpPacket<'_>, segment: &Segment<A>) -> bool {
    reset::refuse_segment(packet, segment).is_ok()
}

#[inline(never)]
fn refuse_datagram<A: Family>(packet: &XdpPacket<'_>, segment: &Segment<A>) -> bool {
    reset::refuse_datagram(packet, segment).is_ok()
}
