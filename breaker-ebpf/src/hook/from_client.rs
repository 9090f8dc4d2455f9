//! The full path for packets from a client: tc ingress on the host side of a pod's veth, and on an uplink.
//!
//! A packet for a frontend follows the decision for its flow. The first packet of a flow is decided
//! ([`super::new_flow`]) and the decision is pinned. [`from_client`] runs the stages in order; read it first.
//!
//! On an uplink the same stages serve external clients. Their flows to a backup are masqueraded, whichever node the
//! backup is on, so that replies come back to this node and this interface. kube-proxy does the same
//! (externalTrafficPolicy: Cluster).
//!
//! # Stack frames
//!
//! A function that returns an action (`i32`) and is not inlined is a BPF subprogram with a stack frame of its own:
//! all of them in one frame would exceed the 512 bytes of stack that a program has. For the same reason they do not
//! call each other. [`from_client`] calls them one after the other and is part of the entry point's frame. Kernel
//! 6.1 rounds each frame up to 32 bytes and counts 32 bytes for an empty one (`check_max_stack_depth` in
//! kernel/bpf/verifier.c). Newer kernels round up to 16 bytes where they JIT-compile the program.

use aya_ebpf::programs::TcContext;
use breaker_common::{
    EndpointRole, EventKind, Flow, FlowKind, NONE, PassReason, SLOT_PASSTHROUGH, Switch, backend_use, egress, seen,
    switch_flags,
};

use super::{
    admission, by_family,
    context::PacketContext,
    direct::to_backend_directly,
    forward::follow,
    icmp_error::{error_from_client, error_to_client},
    new_flow::{apply_decision, decide, translate, translate_first},
    refuse::{refuse_datagram, refuse_segment, reset_both},
    to_client::fast_path_reply,
};
use crate::{
    agent, count, endpoint, event,
    family::{Family, V4, V6},
    flow::{self, Peer},
    fragment,
    nat::Side,
    packet::Packet,
    parse::{self, Direction, Kind, Segment, flags},
    reset, return_path, select, service, syns,
    verdict::{self, Stage, Verdict},
};

/// Full path for a packet that a pod sends.
#[inline(always)]
pub fn from_pod(ctx: &TcContext) -> i32 {
    by_family::<false>(ctx, from_client::<V4, false>, from_client::<V6, false>)
}

/// Full path for a packet that comes in on an uplink.
#[inline(always)]
pub fn from_uplink(ctx: &TcContext) -> i32 {
    by_family::<true>(ctx, from_client::<V4, true>, from_client::<V6, true>)
}

/// Runs the stages for a packet from a client, in order.
///
/// `classify` is not inlined, for IPv4 either, although its frame is smaller there. This function's frame stays on
/// the stack while every stage runs; with `classify` inlined, kernel 6.1 counted 576 bytes, and the limit is 512.
///
/// `UPLINK`: the hook is on an uplink, so replies must be made to come back through it.
#[inline(always)]
fn from_client<A: Family, const UPLINK: bool>(packet: &Packet<'_>, l3: usize) -> i32 {
    let Some(segment) = Segment::<A>::scratch(Direction::Ingress) else {
        return verdict::into_action(Ok(Verdict::Next));
    };
    let peer = Peer { addr: A::ZERO, port: [0; 2], source_port: [0; 2], path: 0, egress: egress::STACK };
    let slot = SLOT_PASSTHROUGH;
    let ingress = packet.ifindex();
    let mut context = PacketContext {
        service: NONE,
        route: NONE,
        backend: NONE,
        slot,
        permit: 0,
        ingress,
        now_ns: 0,
        switch: 0,
        peer,
    };
    let mut action = classify::<A, UPLINK>(packet, l3, segment, &mut context);
    if action == Stage::Decide as i32 {
        action = decide(segment, &mut context);
    }
    if action == Stage::Admit as i32 {
        action = admission::admit(segment, &mut context, false);
    }
    if action == Stage::AdmitToBackup as i32 {
        action = admission::admit(segment, &mut context, true);
    }
    if action == Stage::Apply as i32 {
        action = apply_decision::<A, UPLINK>(packet, segment, &mut context);
    }
    if action == Stage::Translate as i32 {
        action = translate_first::<A, UPLINK>(packet, segment, &context);
    }
    if action == Stage::Refuse as i32 {
        action = if segment.is_tcp() { refuse_segment(packet, segment) } else { refuse_datagram(packet, segment) };
    }
    if action == Stage::Reset as i32 {
        action = reset_both(packet, segment, &context);
    }
    if action == Stage::IcmpErrorFromClient as i32 {
        action = error_from_client::<A, UPLINK>(packet, segment);
    }
    if action == Stage::FastPathIcmpError as i32 {
        action = error_to_client::<A, true>(packet, segment);
    }
    if action == Stage::DirectToBackend as i32 {
        action = to_backend_directly(packet, segment, context.backend);
    }
    if action == Stage::FastPathReply as i32 {
        action = fast_path_reply(packet, segment);
    }
    action
}

/// Classifies a packet from a client: returns an action, or the [`Stage`] that the packet needs.
#[inline(never)]
fn classify<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    l3: usize,
    segment: &mut Segment<A>,
    context: &mut PacketContext<A>,
) -> i32 {
    verdict::into_action(try_classify::<A, UPLINK>(packet, l3, segment, context))
}

#[inline(always)]
fn try_classify<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    l3: usize,
    segment: &mut Segment<A>,
    context: &mut PacketContext<A>,
) -> Result<Verdict, PassReason> {
    match parse::headers(packet, l3, segment)? {
        Kind::Other => return Ok(Verdict::Next),
        Kind::LaterFragment => return Ok(Verdict::Final(follow(packet, segment, Side::Destination))),
        Kind::IcmpError => return Ok(Verdict::Continue(Stage::IcmpErrorFromClient)),
        Kind::Transport => fragment::remove_stale(segment, Side::Destination),
    }
    let (addr, port, proto) = (segment.destination, segment.ports.destination, segment.proto);
    let filter_match = endpoint::filter_match(addr, port, proto);
    // Most packets to a service whose breaker is open belong to a known flow, which names the service.
    let mut already_missed = false;
    if filter_match.frontend && filter_match.all_packets && !segment.is_syn() {
        match flow::find_or_promote(&flow::key(segment)) {
            Some(flow) => {
                if let Some(switch) = switch_if_tracked(flow, segment) {
                    (context.service, context.switch) = (flow.service, switch.to_word());
                    if switch.has(switch_flags::LIMITED) && segment.is_tcp() {
                        admission::record_client_segment(segment, flow.service);
                    }
                    return established::<A, UPLINK>(packet, segment, &switch, context, flow);
                }
            }
            None => already_missed = true,
        }
    }
    let may_have_role =
        filter_match.matches(segment.may_start_flow()) || filter_match.frontend && segment.is_fin_or_rst();
    let role = if may_have_role { endpoint::look_up(addr, port, proto) } else { None };
    let role = role.unwrap_or(EndpointRole::NOTHING);
    if let Some(service) = endpoint::index(role.service) {
        (context.service, context.route) = (service, role.route);
        return to_frontend::<A, UPLINK>(packet, segment, context, already_missed);
    }
    if !UPLINK
        && agent::fast_path_in_use()
        && select::backend_uses(segment.source, segment.ports.source, segment.proto) & backend_use::FAST != 0
    {
        return Ok(Verdict::Continue(Stage::FastPathReply));
    }
    // On an uplink, packets to a pod's own address are left alone: they are the traffic of other nodes, above all
    // their probes. (Consequence: where pods can be reached from outside, the programs cannot distinguish two
    // connections of a client that uses one source port both for a backup's own address and for a frontend.)
    if UPLINK {
        return Ok(Verdict::Next);
    }
    if let Some(backend) = endpoint::index(role.backend) {
        context.backend = backend;
        return Ok(Verdict::Continue(Stage::DirectToBackend));
    }
    Ok(Verdict::Next)
}

/// The switch of a flow's service, if the service has tracked flows and the flow's decision still holds for the
/// packet.
#[inline(always)]
fn switch_if_tracked<A: Family>(flow: &Flow<A>, segment: &Segment<A>) -> Option<Switch<u8>> {
    let switch = service::switch(flow.service)?;
    (service::tracks(flow.service, &switch) && is_current(flow, segment, &switch)).then_some(switch)
}

/// Whether a flow's decision still holds for a packet. A datagram's decision holds in the service's current epoch
/// only: the next epoch may send the client elsewhere.
#[inline(always)]
fn is_current<A: Family>(flow: &Flow<A>, segment: &Segment<A>, switch: &Switch<u8>) -> bool {
    segment.is_tcp() || flow.epoch == switch.epoch
}

/// Handles a packet to a frontend. `already_missed`: the flow tables were already searched and have no entry for the
/// packet.
#[inline(always)]
fn to_frontend<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    context: &mut PacketContext<A>,
    already_missed: bool,
) -> Result<Verdict, PassReason> {
    let switch = service::switch(context.service).ok_or(PassReason::UnknownService)?;
    context.switch = switch.to_word();
    // The answer to a poke is for the agent to find.
    if segment.is_tcp() && segment.is_fin_or_rst() && !answers_poke(segment) {
        syns::forget(&flow::key(segment));
    }
    let tracks = service::tracks(context.service, &switch);
    let limited = switch.has(switch_flags::LIMITED);
    if limited && segment.is_tcp() && !segment.is_syn() {
        admission::record_client_segment(segment, context.service);
    }
    // Closed and idle: the flow tables hold no flow of this service, so no look-up is needed.
    if !tracks && !switch.has(switch_flags::DRY_RUN) {
        return if limited {
            Ok(admission::admit_to_idle_service(segment, context, &switch))
        } else {
            closed(segment, context.service, &switch)
        };
    }
    if segment.is_syn() {
        return Ok(Verdict::Continue(Stage::Decide));
    }
    if !tracks {
        return Ok(if segment.is_tcp() { Verdict::Next } else { Verdict::Continue(Stage::Decide) });
    }
    let flow = if already_missed { None } else { flow::find_or_promote(&flow::key(segment)) };
    match flow {
        Some(flow) if is_current(flow, segment, &switch) => {
            established::<A, UPLINK>(packet, segment, &switch, context, flow)
        }
        None if segment.is_tcp() => untracked_segment(segment, &switch, context),
        _ => Ok(Verdict::Continue(Stage::Decide)),
    }
}

/// Passes a packet to a service that is closed and idle (no tracked flows). Counts a new TCP connection, and
/// reports the first one of the epoch.
#[inline(always)]
fn closed<A: Family>(segment: &Segment<A>, service: u32, switch: &Switch<u8>) -> Result<Verdict, PassReason> {
    if segment.is_syn() {
        if service::record_epoch(service, switch.epoch) {
            event::send(EventKind::StateAdopted, service, switch, &flow::key(segment), None);
        }
        syns::note(&flow::key(segment));
        count::service(service, |c| &mut c.new_primary);
    }
    Ok(Verdict::Next)
}

/// Handles a packet of a decided flow: the flow keeps its destination, unless it was decided in an older epoch and
/// the policy for its tier demands a reset.
#[inline(always)]
fn established<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    switch: &Switch<u8>,
    context: &mut PacketContext<A>,
    flow: &mut Flow<A>,
) -> Result<Verdict, PassReason> {
    if switch.has(switch_flags::RESET_PRIMARY | switch_flags::RESET_BACKUP) && answers_poke(segment) {
        return Ok(Verdict::Continue(Stage::Reset));
    }
    flow::touch(flow, segment);
    let redirected = flow.kind as u8 == FlowKind::Redirected as u8;
    let resets = if redirected {
        switch.has(switch_flags::RESET_BACKUP) && service::resets_on_backup(flow, switch)
    } else {
        switch.has(switch_flags::RESET_PRIMARY) && flow.epoch != switch.epoch
    };
    if resets && !segment.is_rst() && agent::may_act_on_decision(switch, agent::now_ns()) {
        flow.seen |= seen::RST;
        context.peer = Peer::of(flow);
        return Ok(Verdict::Continue(Stage::Reset));
    }
    if !redirected {
        return Ok(Verdict::Next);
    }
    translate::<A, UPLINK>(packet, segment, context.service, &Peer::of(flow))
}

/// Whether the segment is the answer to a poke of a client that has no such connection: a reset without ACK that has the
/// poke's number.
#[inline(always)]
fn answers_poke<A: Family>(segment: &Segment<A>) -> bool {
    segment.flags & (flags::RST | flags::ACK) == flags::RST && reset::has_poke_number(segment)
}

/// Handles a segment of a connection that the programs have not seen from its SYN. Such a segment is never
/// rewritten, only passed or, by policy, reset. On an interface that was given up for the service, new connections go to
/// the primary: there a reset would lead nowhere else, and many connections may be from after the opening.
#[inline(always)]
fn untracked_segment<A: Family>(
    segment: &Segment<A>,
    switch: &Switch<u8>,
    context: &mut PacketContext<A>,
) -> Result<Verdict, PassReason> {
    // Of resets, only the answer to a poke may be dropped.
    if !switch.has(switch_flags::RESET_PRIMARY) || segment.is_rst() && !answers_poke(segment) {
        return Ok(Verdict::Next);
    }
    if !agent::may_act_on_decision(switch, agent::now_ns()) {
        return Err(PassReason::AgentLost);
    }
    if !segment.is_rst() && return_path::is_suspended(context.ingress, context.service) {
        return Ok(Verdict::Next);
    }
    context.peer = Peer::addressed_by(segment);
    Ok(Verdict::Continue(Stage::Reset))
}
