//! Both directions of the host side of a pod's veth.
//!
//! From the pod (tc ingress): is it for a frontend? → a SYN: decide, pin, translate → another segment: what was
//! decided for its flow.
//!
//! To the pod (tc egress): is it from a backend that has flows of ours? → translate back.
//!
//! Both on the client's own veth: on a bridge CNI a reply between two pods of one node is bridged and never routed, so
//! this is the only place that every reply passes.
//!
//! On an uplink the same, for clients outside: their flows are masqueraded on the way to the backup, whichever node it is
//! on, so that its replies come back to this node and this interface. kube-proxy does so too (externalTrafficPolicy:
//! Cluster).

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use breaker_common::{
    BreakerState, DEFAULT_MASQUERADE_MARK, EventKind, Flow4, FlowKey4, FlowKind, NONE, PassReason, SLOT_PASSTHROUGH,
    SLOT_REJECT, Switch, backend_use, switch_flags, tcp_seen,
};

use crate::{
    agent, count, endpoint, event, flow, nat,
    packet::Packet,
    parse::{self, Segment},
    reset, select, service,
    verdict::Verdict,
};

/// kube-proxy's masquerade mark; the loader sets it to what the node uses.
#[unsafe(no_mangle)]
static MASQUERADE_MARK: aya_ebpf::Global<u32> = aya_ebpf::Global::new(DEFAULT_MASQUERADE_MARK);

/// A packet that a pod sends.
#[inline(always)]
pub fn try_from_pod(ctx: &TcContext) -> Result<Verdict, PassReason> {
    try_from_client::<false>(ctx)
}

/// A packet that comes in by an uplink.
#[inline(always)]
pub fn try_from_outside(ctx: &TcContext) -> Result<Verdict, PassReason> {
    try_from_client::<true>(ctx)
}

/// `OUTSIDE`: the way back must be led past us.
#[inline(always)]
fn try_from_client<const OUTSIDE: bool>(ctx: &TcContext) -> Result<Verdict, PassReason> {
    let packet = Packet::new(ctx);
    let mut segment = Segment::empty();
    if !parse::ipv4_tcp(&packet, &mut segment)? {
        return Ok(Verdict::Next);
    }
    let Some(role) = endpoint::find(segment.destination, segment.destination_port) else { return Ok(Verdict::Next) };
    if let Some(service) = endpoint::index(role.service) {
        return to_frontend::<OUTSIDE>(ctx, &packet, &segment, service);
    }
    // From outside, what goes to a pod itself is other nodes' business (their probes above all): it is masqueraded by nobody
    // here, so it shares no reverse key with what is.
    if OUTSIDE {
        return Ok(Verdict::Next);
    }
    if let Some(backend) = endpoint::index(role.backend) {
        return to_backend_directly(&packet, &segment, backend);
    }
    Ok(Verdict::Next)
}

/// A packet that a pod gets.
#[inline(always)]
pub fn try_to_pod(ctx: &TcContext) -> Result<Verdict, PassReason> {
    let packet = Packet::new(ctx);
    let mut segment = Segment::empty();
    if !parse::ipv4_tcp(&packet, &mut segment)? {
        return Ok(Verdict::Next);
    }
    let Some(role) = endpoint::find(segment.source, segment.source_port) else { return Ok(Verdict::Next) };
    let Some(backend) = endpoint::index(role.backend) else { return Ok(Verdict::Next) };
    if select::backend_in_use(backend) == 0 {
        return Ok(Verdict::Next);
    }
    let Some(reverse) = flow::find_reverse(&flow::reverse_key(&segment)) else { return Ok(Verdict::Next) };
    flow::touch_reverse(reverse, &segment);
    if reverse.vip == segment.source
        && reverse.vip_port == segment.source_port
        && reverse.client_port == segment.destination_port
    {
        return Ok(Verdict::Next);
    }
    nat::from_backend(&packet, &segment, reverse.vip, reverse.vip_port, reverse.client_port)?;
    count::service(reverse.service, |c| c.translated += 1);
    Ok(Verdict::Next)
}

#[inline(always)]
fn to_frontend<const OUTSIDE: bool>(
    ctx: &TcContext,
    packet: &Packet<'_>,
    segment: &Segment,
    service: u32,
) -> Result<Verdict, PassReason> {
    let switch = service::switch(service).ok_or(PassReason::UnknownService)?;
    if segment.is_syn() {
        return new_connection::<OUTSIDE>(ctx, packet, segment, service, &switch);
    }
    // Closed and settled: no flow of ours can exist, so nothing needs to be looked up.
    if !switch.has(switch_flags::TRACK) {
        return Ok(Verdict::Next);
    }
    let key = flow::key(segment);
    match flow::find(&key) {
        Some(flow) => established::<OUTSIDE>(packet, segment, service, &switch, &key, flow),
        None => unseen(packet, segment, service, &switch, &key),
    }
}

/// A SYN always decides anew: ports get used again, and a client that got no answer must be able to move.
#[inline(always)]
fn new_connection<const OUTSIDE: bool>(
    ctx: &TcContext,
    packet: &Packet<'_>,
    segment: &Segment,
    service: u32,
    switch: &Switch<u8>,
) -> Result<Verdict, PassReason> {
    let key = flow::key(segment);
    let now_ns = agent::now_ns();
    if service::adopt(service, switch.epoch) {
        event::send(EventKind::StateAdopted, now_ns, service, switch, &key, None);
    }
    let dry_run = switch.has(switch_flags::DRY_RUN);
    let tracked = switch.has(switch_flags::TRACK);
    if !tracked && !dry_run {
        // Closed and settled: nothing to decide.
        count::service(service, |c| c.new_primary += 1);
        return Ok(Verdict::Next);
    }
    if tracked {
        flow::forget(&key);
    }
    if !agent::decision_holds(switch, now_ns) {
        count::reason(PassReason::AgentLost);
        count::service(service, |c| {
            c.agent_lost += 1;
            c.new_primary += 1;
        });
        return pass_and_pin(service, switch, &key, now_ns);
    }
    let choice = select::choose(service, switch, &key);
    if dry_run {
        let would_move = choice.slot != SLOT_PASSTHROUGH;
        count::service(service, |c| {
            c.new_primary += 1;
            c.dry_run += would_move as u64;
        });
        return Ok(Verdict::Next);
    }
    match choice.slot {
        SLOT_PASSTHROUGH => {
            count::service(service, |c| {
                c.new_primary += 1;
                c.half_open += choice.trial as u64;
            });
            pass_and_pin(service, switch, &key, now_ns)
        }
        SLOT_REJECT => {
            count::service(service, |c| c.rejected += 1);
            event::send(EventKind::Rejected, now_ns, service, switch, &key, None);
            Ok(Verdict::Redirect(reset::refuse(packet, segment)?))
        }
        id => redirect::<OUTSIDE>(ctx, packet, segment, service, switch, &key, id, now_ns),
    }
}

/// Sends a new connection to a backend.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the packet's whole story so far")]
fn redirect<const OUTSIDE: bool>(
    ctx: &TcContext,
    packet: &Packet<'_>,
    segment: &Segment,
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey4,
    id: u32,
    now_ns: u64,
) -> Result<Verdict, PassReason> {
    let Some(backend) = select::backend(id) else {
        return fail_open(service, switch, key, now_ns, PassReason::UnknownBackend);
    };
    let mut flow = flow::to(backend, key, FlowKind::Redirected, service, id, switch.epoch, now_ns);
    if let Err(reason) = flow::pin(key, &mut flow) {
        return fail_open(service, switch, key, now_ns, reason);
    }
    select::mark_in_use(id, backend_use::REDIRECTED);
    let hairpin = key.client == flow.backend;
    if hairpin || OUTSIDE {
        // The pod would drop a packet from itself: let netfilter masquerade it, as kube-proxy's hairpin does.
        packet.add_mark(MASQUERADE_MARK.load());
    }
    debug!(ctx, "moved {:i}:{} to {:i}", key.client, u16::from_be_bytes(key.client_port), flow.backend);
    event::send(EventKind::FlowMoved, now_ns, service, switch, key, Some(&flow));
    let port_changed = flow.source_port != key.client_port;
    count::service(service, |c| {
        c.new_backup += 1;
        c.translated += 1;
        c.hairpin += hairpin as u64;
        c.port_changed += port_changed as u64;
    });
    nat::to_backend(packet, segment, flow.backend, flow.backend_port, flow.source_port)?;
    Ok(Verdict::Next)
}

/// Leaves a new connection that should have moved to kube-proxy. That is pinned too, if there is room: its next segment
/// must not be taken for one from before.
#[inline(always)]
fn fail_open(
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey4,
    now_ns: u64,
    reason: PassReason,
) -> Result<Verdict, PassReason> {
    count::service(service, |c| c.failed_open += 1);
    let _ = flow::pin_passed(key, service, switch.epoch, now_ns);
    Err(reason)
}

/// Leaves a new connection to kube-proxy. While the breaker is not closed that is a decision like another, and pinned:
/// what is established later on the primary and not pinned is from before, and the policy for it may be a reset.
#[inline(always)]
fn pass_and_pin(service: u32, switch: &Switch<u8>, key: &FlowKey4, now_ns: u64) -> Result<Verdict, PassReason> {
    if switch.state != BreakerState::Closed as u8 {
        flow::pin_passed(key, service, switch.epoch, now_ns)?;
    }
    Ok(Verdict::Next)
}

/// A segment of a flow that we decided: it stays where it is, unless the policy for the other side says reset.
#[inline(always)]
fn established<const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment,
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey4,
    flow: &mut Flow4,
) -> Result<Verdict, PassReason> {
    let first_of_beat = flow::touch(flow, segment);
    let redirected = flow.kind as u8 == FlowKind::Redirected as u8;
    if redirected && (OUTSIDE || key.client == flow.backend) {
        packet.add_mark(MASQUERADE_MARK.load());
    }
    let policy = if redirected { switch_flags::RESET_BACKUP } else { switch_flags::RESET_PRIMARY };
    if switch.has(policy)
        && flow.epoch != switch.epoch
        && !segment.is_rst()
        && agent::decision_holds(switch, agent::now_ns())
    {
        flow.tcp_seen |= tcp_seen::RST;
        let peer = reset::Peer { addr: flow.backend, port: flow.backend_port, source_port: flow.source_port };
        return reset_both(packet, segment, service, switch, key, &peer);
    }
    if !redirected {
        return Ok(Verdict::Next);
    }
    if first_of_beat {
        flow::keep_reverse(key, flow);
    }
    let (backend, backend_port, source_port) = (flow.backend, flow.backend_port, flow.source_port);
    nat::to_backend(packet, segment, backend, backend_port, source_port)?;
    count::service(service, |c| c.translated += 1);
    Ok(Verdict::Next)
}

/// A segment of a flow that we did not see from its SYN: never rewritten, only passed or, by policy, reset.
#[inline(always)]
fn unseen(
    packet: &Packet<'_>,
    segment: &Segment,
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey4,
) -> Result<Verdict, PassReason> {
    if !switch.has(switch_flags::RESET_PRIMARY) || segment.is_rst() {
        return Ok(Verdict::Next);
    }
    if !agent::decision_holds(switch, agent::now_ns()) {
        return Err(PassReason::AgentLost);
    }
    let peer =
        reset::Peer { addr: segment.destination, port: segment.destination_port, source_port: segment.source_port };
    reset_both(packet, segment, service, switch, key, &peer)
}

#[inline(always)]
fn reset_both(
    packet: &Packet<'_>,
    segment: &Segment,
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey4,
    peer: &reset::Peer,
) -> Result<Verdict, PassReason> {
    count::service(service, |c| c.resets += 1);
    event::send(EventKind::FlowReset, agent::now_ns(), service, switch, key, None);
    reset::both_ends(packet, segment, peer)?;
    Ok(Verdict::Next)
}

/// A client's own connection to a backend. It takes part only so that it never shares a reverse key with a flow of a
/// frontend: whoever comes second gets another source port.
#[inline(always)]
fn to_backend_directly(packet: &Packet<'_>, segment: &Segment, id: u32) -> Result<Verdict, PassReason> {
    let key = flow::key(segment);
    let source_port = if segment.is_syn() {
        flow::forget(&key);
        let backend = select::backend(id).ok_or(PassReason::UnknownBackend)?;
        let mut flow = flow::to(backend, &key, FlowKind::Direct, NONE, id, 0, agent::now_ns());
        flow::pin(&key, &mut flow)?;
        if flow.source_port == key.client_port {
            return Ok(Verdict::Next);
        }
        select::mark_in_use(id, backend_use::DIRECT);
        flow.source_port
    } else {
        // Without a changed port only its end matters: then its reverse key is free again.
        if select::backend_in_use(id) & backend_use::DIRECT == 0 && !segment.ends() {
            return Ok(Verdict::Next);
        }
        let Some(flow) = flow::find(&key) else { return Ok(Verdict::Next) };
        flow::touch(flow, segment);
        flow.source_port
    };
    if source_port != key.client_port {
        nat::to_backend(packet, segment, key.vip, key.vip_port, source_port)?;
    }
    Ok(Verdict::Next)
}
