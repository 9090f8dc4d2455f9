//! New flows: decides the first packet, pins the decision, and translates packets to a backend.

use aya_log_ebpf::debug;
use breaker_common::{
    BreakerState, DEFAULT_MASQUERADE_MARK, EventKind, Flow, FlowKey, FlowKind, PROTO_TCP, PassReason, SLOT_PASSTHROUGH,
    SLOT_REJECT, Switch, backend_use, egress, flow_path, switch_flags,
};

use super::{context::PacketContext, forward::forward_to_backend};
use crate::{
    agent, count, event,
    family::Family,
    fib,
    flow::{self, Peer, removed},
    fragment, nat,
    packet::Packet,
    parse::{self, Segment},
    pin::{self, ReplyPath},
    return_path, select, service, syns,
    verdict::{self, Stage, Verdict},
};

/// kube-proxy's masquerade mark. The loader sets it to the mark that the node uses.
#[unsafe(no_mangle)]
static MASQUERADE_MARK: aya_ebpf::Global<u32> = aya_ebpf::Global::new(DEFAULT_MASQUERADE_MARK);

/// 1 if the kernel has `bpf_skb_get_xfrm_state` (CONFIG_XFRM). The loader sets it.
#[unsafe(no_mangle)]
static HAS_XFRM: aya_ebpf::Global<u8> = aya_ebpf::Global::new(0);

/// Decides the first packet of a flow. Every SYN is decided anew, because clients reuse ports, and because a client
/// without an answer must be able to move. A datagram is decided anew if its flow is unknown or was decided in
/// another epoch.
#[inline(never)]
pub(super) fn decide<A: Family>(segment: &Segment<A>, context: &mut PacketContext<A>) -> i32 {
    verdict::into_action(Ok(Verdict::Continue(choose(segment, context))))
}

/// Chooses the destination and returns the next stage: to apply the decision, or, for a service with limits, to ask
/// whether they admit the packet.
#[inline(always)]
fn choose<A: Family>(segment: &Segment<A>, context: &mut PacketContext<A>) -> Stage {
    let (service, switch) = (context.service, Switch::from_word(context.switch));
    let key = flow::key(segment);
    let now_ns = agent::now_ns();
    let mut earlier = 0;
    if service::record_epoch(service, switch.epoch) {
        event::send(EventKind::StateAdopted, service, &switch, &key, None);
    }
    if service::tracks(service, &switch) {
        earlier = flow::remove(&key, segment.sequence, switch.epoch);
    }
    context.now_ns = now_ns;
    if agent::may_act_on_decision(&switch, now_ns) {
        let repeated = earlier & (removed::SAME_SYN | removed::SAME_EPOCH) == removed::SAME_SYN | removed::SAME_EPOCH;
        let choice = select::choose(service, context.route, &switch, &key, repeated);
        (context.slot, context.permit) = (choice.slot, choice.permit as u32);
        if choice.slot < SLOT_REJECT && answers_may_be_lost(context.ingress, service, earlier) {
            count::reason(PassReason::NoAnswerSeen);
            context.slot = SLOT_PASSTHROUGH;
        }
    } else {
        count::reason(PassReason::AgentLost);
        count::service(service, |c| &mut c.agent_lost);
        context.slot = SLOT_PASSTHROUGH;
    }
    let limited = switch.has(switch_flags::LIMITED) && context.slot != SLOT_REJECT;
    if limited { Stage::Admit } else { Stage::Apply }
}

/// Whether a connection should not be redirected because answers to this interface's clients seem to bypass the
/// programs. `earlier`: bits of [`removed`].
#[inline(always)]
fn answers_may_be_lost(ingress: u32, service: u32, earlier: u32) -> bool {
    const MISSING: u32 = removed::SAME_SYN | removed::UNANSWERED;
    return_path::is_suspended(ingress, service)
        || earlier & MISSING == MISSING
            && return_path::count_missing_answer(ingress, service)
            && service::primary_accepts(service)
}

/// Applies the decision for the first packet of a flow.
#[inline(never)]
pub(super) fn apply_decision<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    context: &mut PacketContext<A>,
) -> i32 {
    verdict::into_action(try_apply_decision::<A, UPLINK>(packet, segment, context))
}

#[inline(always)]
fn try_apply_decision<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    context: &mut PacketContext<A>,
) -> Result<Verdict, PassReason> {
    let (service, switch) = (context.service, Switch::from_word(context.switch));
    let key = flow::key(segment);
    let mut flow = pin::passed(&key, service, switch.epoch, segment.sequence, context.now_ns);
    if switch.has(switch_flags::DRY_RUN) {
        let would_move = context.slot != SLOT_PASSTHROUGH;
        count::service(service, |c| &mut c.new_primary);
        if would_move {
            count::service(service, |c| &mut c.dry_run);
        }
        return Ok(Verdict::Next);
    }
    match context.slot {
        SLOT_PASSTHROUGH => {
            let permit = context.permit;
            count::service(service, |c| &mut c.new_primary);
            if permit != 0 {
                count::service(service, |c| &mut c.half_open);
            }
            pass_and_pin(&switch, &key, &mut flow)
        }
        SLOT_REJECT => {
            count::service(service, |c| &mut c.rejected);
            event::send(EventKind::Rejected, service, &switch, &key, None);
            Ok(Verdict::Continue(Stage::Refuse))
        }
        id => redirect::<A, UPLINK>(packet, segment, context, &switch, &key, id, &mut flow),
    }
}

/// Pins a new connection to backend `id`. The next stage translates its first packet.
#[inline(always)]
fn redirect<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    context: &mut PacketContext<A>,
    switch: &Switch<u8>,
    key: &FlowKey<A>,
    id: u32,
    flow: &mut Flow<A>,
) -> Result<Verdict, PassReason> {
    let service = context.service;
    let Some(backend) = select::backend::<A>(id) else {
        return fail_open(key, flow, PassReason::UnknownBackend);
    };
    // The answer would leave encrypted, and the programs would not see its header.
    if UPLINK && HAS_XFRM.load() != 0 && packet.came_by_ipsec() {
        return fail_open(key, flow, PassReason::Ipsec);
    }
    pin::lead_to(flow, backend, id, FlowKind::Redirected);
    let hairpin = key.client == flow.backend;
    // The path is decided once: netfilter classifies a connection that it has not seen from the start as INVALID.
    let mut uses = backend_use::REDIRECTED;
    let mut reply = ReplyPath::through_stack(context.ingress);
    if backend.ifindex != 0 && !hairpin {
        // (A packet with VLAN tags does not take the fast path: the pod would receive the tags, and the routes name
        // another interface, that of the VLAN, for its client.)
        if switch.has(switch_flags::FAST)
            && (!UPLINK
                || segment.l3() == parse::UNTAGGED_L3_OFFSET
                    && fib::reply_leaves_by_ingress_if(packet, key, &mut reply.next_hop))
        {
            flow.path = flow_path::FAST;
            uses |= backend_use::FAST;
            reply.egress = context.ingress | if UPLINK { egress::NEIGHBOR } else { 0 };
        } else if UPLINK && select::keeps_client(context.route) {
            flow.path = flow_path::KEEP_CLIENT;
        }
    }
    if let Err(reason) = pin::pin(key, flow, &reply) {
        return fail_open(key, flow, reason);
    }
    select::mark_in_use::<A>(id, uses);
    debug!(packet.context(), "moved port {} to backend {}", u16::from_be_bytes(key.client_port), id);
    event::send(EventKind::FlowMoved, service, switch, key, Some(&*flow));
    let port_changed = flow.source_port != key.client_port && reply.egress == egress::STACK;
    count::service(service, |c| &mut c.new_backup);
    if hairpin {
        count::service(service, |c| &mut c.hairpin);
    }
    if port_changed {
        count::service(service, |c| &mut c.port_changed);
    }
    context.peer = Peer::of(flow);
    Ok(Verdict::Continue(Stage::Translate))
}

/// Translates the first packet of a redirected flow. BPF subprogram (not inlined), for a stack frame of its own.
#[inline(never)]
pub(super) fn translate_first<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    context: &PacketContext<A>,
) -> i32 {
    verdict::into_action(translate::<A, UPLINK>(packet, segment, context.service, &context.peer))
}

/// Translates a packet of a redirected flow and sends it to the backend.
#[inline(always)]
pub(super) fn translate<A: Family, const UPLINK: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    service: u32,
    to: &Peer<A>,
) -> Result<Verdict, PassReason> {
    // A pod drops a packet that comes from its own address: netfilter must masquerade it, as for kube-proxy's
    // hairpin.
    let masquerade = UPLINK && to.path == 0 || segment.source == to.addr;
    let mark = if masquerade { MASQUERADE_MARK.load() } else { 0 };
    if mark != 0 {
        packet.add_mark(mark);
    }
    fragment::note_to_backend(segment, &to.addr, mark, to.egress);
    nat::to_backend(packet, segment, to.addr, to.port, to.source_port)?;
    count::service(service, |c| &mut c.translated);
    Ok(forward_to_backend(packet, to.egress))
}

/// Leaves a new connection to kube-proxy because it could not be moved to a backend. This decision is pinned, too, if
/// there is room. Otherwise the connection's next segment would look like a segment of a connection from before the
/// trip.
#[inline(always)]
fn fail_open<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>, reason: PassReason) -> Result<Verdict, PassReason> {
    count::service(flow.service, |c| &mut c.failed_open);
    if key.proto == PROTO_TCP {
        syns::note(key);
    }
    if let Err(full) = pin::pin_passed(key, flow) {
        count::reason(full);
    }
    Err(reason)
}

/// Leaves a new connection to kube-proxy. While the breaker is not closed, this is pinned like any other decision:
/// a connection on the primary without an entry is then known to be from before the trip, and the policy may reset
/// it.
///
/// Datagrams cannot be reset. They are pinned only in state half-open, where they try the primary. While there is
/// no usable backup, or the agent's lease has run out, each datagram is decided anew, so that the client moves as
/// soon as this has changed.
#[inline(always)]
fn pass_and_pin<A: Family>(switch: &Switch<u8>, key: &FlowKey<A>, flow: &mut Flow<A>) -> Result<Verdict, PassReason> {
    if key.proto == PROTO_TCP {
        syns::note(key);
    }
    let tries = switch.state == BreakerState::HalfOpen as u8;
    if switch.state != BreakerState::Closed as u8 && (key.proto == PROTO_TCP || tries) {
        pin::pin_passed(key, flow)?;
    }
    Ok(Verdict::Next)
}
