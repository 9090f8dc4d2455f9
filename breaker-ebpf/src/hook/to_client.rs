//! The full path for packets to a client: tc egress on the host side of a pod's veth, and on an uplink. Also
//! replies on the fast path, which pass tc ingress of the backend's own veth.
//!
//! A packet from a backend that has flows in the tables is translated back. The program runs on the client's own
//! veth: on a bridge CNI, a reply between two pods of one node is bridged and never routed, so only this veth sees
//! every reply.
//!
//! # Fast path (`fastPath: PeerRedirect`)
//!
//! A flow to a backup pod of this node, from another pod or from an external client, may bypass the host network
//! stack. Its replies then pass neither the client's veth nor the stack: the program on the backup's veth
//! translates them and redirects them into the client's namespace or out of the uplink.

use aya_ebpf::{bindings::TC_ACT_SHOT, programs::TcContext};
use breaker_common::{NONE, PassReason, Reverse, egress};

use super::{
    admission, by_family,
    forward::{follow, forward_to_client},
    icmp_error::error_to_client,
};
use crate::{
    count, endpoint,
    family::{Family, V4, V6},
    flow, fragment,
    nat::{self, Side},
    packet::Packet,
    parse::{self, Direction, Kind, Segment},
    select,
    verdict::{self, Verdict},
};

/// Full path for a packet to a pod.
#[inline(always)]
pub fn to_pod(ctx: &TcContext) -> i32 {
    by_family::<false>(ctx, to_client::<V4>, to_client::<V6>)
}

/// Full path for a packet that leaves on an uplink.
#[inline(always)]
pub fn to_uplink(ctx: &TcContext) -> i32 {
    by_family::<true>(ctx, to_client::<V4>, to_client::<V6>)
}

/// Handles a packet to a client.
#[inline(never)]
fn to_client<A: Family>(packet: &Packet<'_>, l3: usize) -> i32 {
    verdict::into_action(try_to_client::<A>(packet, l3))
}

#[inline(always)]
fn try_to_client<A: Family>(packet: &Packet<'_>, l3: usize) -> Result<Verdict, PassReason> {
    let Some(segment) = Segment::<A>::scratch(Direction::Egress) else { return Ok(Verdict::Next) };
    match parse::headers(packet, l3, segment)? {
        Kind::Other => return Ok(Verdict::Next),
        Kind::LaterFragment => return Ok(Verdict::Final(follow(packet, segment, Side::Source))),
        Kind::IcmpError => return Ok(Verdict::Final(error_to_client::<A, false>(packet, segment))),
        Kind::Transport => fragment::remove_stale(segment, Side::Source),
    }
    if segment.is_syn_ack() && is_late_answer(segment) {
        return Ok(Verdict::Final(TC_ACT_SHOT));
    }
    if segment.is_control() && endpoint::may_count_connections(segment.source, segment.ports.source) {
        admission::record_server_segment(segment);
    }
    if select::backend_uses(segment.source, segment.ports.source, segment.proto) == 0 {
        return Ok(Verdict::Next);
    }
    let Some(reverse) = flow::find_reverse(&flow::reverse_key(segment)) else { return Ok(Verdict::Next) };
    translate_back(packet, segment, reverse, egress::STACK)
}

/// Whether a segment is the primary's answer to a SYN that has been sent to a backup since. The client would take the
/// answer, and its next segment would go to a backup that does not know the connection. Counts the answer.
#[inline(always)]
fn is_late_answer<A: Family>(segment: &Segment<A>) -> bool {
    if !endpoint::filter_match(segment.source, segment.ports.source, segment.proto).frontend {
        return false;
    }
    let role = endpoint::look_up(segment.source, segment.ports.source, segment.proto);
    let Some(service) = role.and_then(|role| endpoint::index(role.service)) else { return false };
    let is_late = flow::awaits_other_answer(segment);
    if is_late {
        count::service(service, |c| &mut c.late_answers);
    }
    is_late
}

/// Handles a packet from a pod that may be a backend's reply on the fast path, on the backend's own veth.
#[inline(never)]
pub(super) fn fast_path_reply<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::into_action(try_fast_path_reply(packet, segment))
}

#[inline(always)]
fn try_fast_path_reply<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> Result<Verdict, PassReason> {
    let reverse = flow::find_reverse(&flow::reverse_key(segment)).filter(|reverse| reverse.egress != egress::STACK);
    let Some(reverse) = reverse else { return Ok(Verdict::Next) };
    translate_back(packet, segment, reverse, reverse.egress)
}

/// Translates a backend's packet back to the frontend that the client connected to. `egress`: where the packet goes,
/// see [`egress`].
#[inline(always)]
fn translate_back<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    reverse: &mut Reverse<A>,
    egress: u32,
) -> Result<Verdict, PassReason> {
    flow::touch_reverse(reverse, segment);
    if segment.is_control() && reverse.service != NONE {
        admission::record_backend_segment(segment, reverse);
    }
    if reverse.vip == segment.source
        && reverse.vip_port == segment.ports.source
        && reverse.client_port == segment.ports.destination
    {
        return Ok(Verdict::Next);
    }
    fragment::note_to_client(segment, reverse, egress);
    nat::from_backend(packet, segment, reverse.vip, reverse.vip_port, reverse.client_port)?;
    count::service(reverse.service, |c| &mut c.translated);
    Ok(forward_to_client(packet, egress, reverse.next_hop))
}
