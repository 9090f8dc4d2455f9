//! The full path on the tc hooks, for packets that the [prefilter](super::glance) does not pass.
//!
//! # From a client (tc ingress on the host side of a pod's veth)
//!
//! If the packet is for a frontend: the first packet of a flow is decided, the decision is pinned, and the packet
//! is translated if it goes to a backup. Later packets follow their flow's decision.
//!
//! # To a client (tc egress on the host side of a pod's veth)
//!
//! If the packet is from a backend that has flows in the tables, it is translated back.
//!
//! Both programs run on the client's own veth: on a bridge CNI a reply between two pods of one node is bridged and
//! never routed, so only this veth sees every reply.
//!
//! # On an uplink
//!
//! The same steps serve external clients. Their flows to a backup are masqueraded, whichever node the backup is on,
//! so that replies come back to this node and this interface. kube-proxy does the same (externalTrafficPolicy:
//! Cluster).
//!
//! # Both directions
//!
//! ICMP errors about translated packets and later fragments of translated packets are translated, too.
//!
//! # Fast path (`fastPath: PeerRedirect`)
//!
//! A flow to a backup pod of this node, from another pod or from an external client, may bypass the host network
//! stack. Its replies then pass neither the client's veth nor the stack: the program on the backup's veth
//! translates them and redirects them into the client's namespace or out of the uplink.
//!
//! # Stack frames
//!
//! A function that returns an action (`i32`) and is not inlined is a BPF subprogram with a stack frame of its own:
//! all of them in one frame would exceed the 512 bytes of stack that a program has. For the same reason they do not
//! call each other. [`from_client`] calls them one after the other and is part of the entry point's frame. Kernel
//! 6.1 rounds each frame up to 32 bytes and counts 32 bytes for an empty one (`check_max_stack_depth` in
//! kernel/bpf/verifier.c). Newer kernels round up to 16 bytes where they JIT-compile the program.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use breaker_common::{
    BreakerState, DEFAULT_MASQUERADE_MARK, EndpointRole, EventKind, Flow, FlowKey, FlowKind, NONE, PROTO_TCP,
    PassReason, Reverse, ReverseKey, SLOT_PASSTHROUGH, SLOT_REJECT, Switch, backend_use, exit, flow_way, seen,
    switch_flags,
};

use super::{by_family, limited};
use crate::{
    agent, count, endpoint, event,
    family::{Family, V4, V6},
    fib,
    flow::{self, Peer},
    fragment,
    icmp::{self, Quote},
    nat::{self, End},
    packet::Packet,
    parse::{self, Hook, Kind, Segment},
    reset, select, service,
    verdict::{self, Step, Verdict},
};

/// kube-proxy's masquerade mark. The loader sets it to the mark that the node uses.
#[unsafe(no_mangle)]
static MASQUERADE_MARK: aya_ebpf::Global<u32> = aya_ebpf::Global::new(DEFAULT_MASQUERADE_MARK);

/// Full path for a packet that a pod sends.
#[inline(always)]
pub fn from_pod(ctx: &TcContext) -> i32 {
    by_family::<false>(ctx, from_client::<V4, false>, from_client::<V6, false>)
}

/// Full path for a packet that comes in on an uplink.
#[inline(always)]
pub fn from_outside(ctx: &TcContext) -> i32 {
    by_family::<true>(ctx, from_client::<V4, true>, from_client::<V6, true>)
}

/// Full path for a packet to a pod.
#[inline(always)]
pub fn to_pod(ctx: &TcContext) -> i32 {
    by_family::<false>(ctx, to_client::<V4>, to_client::<V6>)
}

/// Full path for a packet that leaves on an uplink.
#[inline(always)]
pub fn to_outside(ctx: &TcContext) -> i32 {
    by_family::<true>(ctx, to_client::<V4>, to_client::<V6>)
}

/// Context of a packet from a client, handed from one step to the next.
pub struct Case<A> {
    pub service: u32,
    pub route: u32,
    /// Id of the backend, if the packet is for a backend's own address; [`NONE`] otherwise.
    backend: u32,
    /// The decision for the first packet of a flow: the content of a slot.
    pub slot: u32,
    /// 1 if the connection holds one of the half-open breaker's permits, else 0.
    pub trial: u32,
    /// Time of the decision, ns of `CLOCK_MONOTONIC`.
    pub now_ns: u64,
    /// The service's switch, packed into one word ([`Switch::to_word`]).
    pub switch: u64,
    /// Destination of the packet: the backend, or the other end of a connection that is reset.
    peer: Peer<A>,
}

/// Runs the steps for a packet from a client, in order.
///
/// `look` is not inlined, for IPv4 either, although its frame is smaller there. This function's frame stays on the
/// stack while every step runs; with `look` inlined, kernel 6.1 counted 576 bytes, and the limit is 512.
///
/// `OUTSIDE`: the hook is on an uplink, so replies must be made to come back through it.
#[inline(always)]
fn from_client<A: Family, const OUTSIDE: bool>(packet: &Packet<'_>, l3: usize) -> i32 {
    let Some(segment) = Segment::<A>::place(Hook::Ingress) else { return verdict::settle(Ok(Verdict::Next)) };
    let peer = Peer { addr: A::ZERO, port: [0; 2], source_port: [0; 2], way: 0, exit: exit::STACK };
    let slot = SLOT_PASSTHROUGH;
    let mut case = Case { service: NONE, route: NONE, backend: NONE, slot, trial: 0, now_ns: 0, switch: 0, peer };
    let mut action = look::<A, OUTSIDE>(packet, l3, segment, &mut case);
    if action == Step::Decide as i32 {
        action = decide(segment, &mut case);
    }
    if action == Step::Admit as i32 {
        action = limited::admit(packet, segment, &mut case, false);
    }
    if action == Step::AdmitToBackup as i32 {
        action = limited::admit(packet, segment, &mut case, true);
    }
    if action == Step::CarryOut as i32 {
        action = carry_out::<A, OUTSIDE>(packet, segment, &mut case);
    }
    if action == Step::Translate as i32 {
        action = translate_first::<A, OUTSIDE>(packet, segment, &case);
    }
    if action == Step::Refuse as i32 {
        action = if segment.is_tcp() { refuse_segment(packet, segment) } else { refuse_datagram(packet, segment) };
    }
    if action == Step::Reset as i32 {
        action = reset_both(packet, segment, &case);
    }
    if action == Step::Error as i32 {
        action = error_from_client::<A, OUTSIDE>(packet, segment);
    }
    if action == Step::AnswerError as i32 {
        action = error_to_client::<A, true>(packet, segment);
    }
    if action == Step::Direct as i32 {
        action = to_backend_directly(packet, segment, case.backend);
    }
    if action == Step::Answer as i32 {
        action = answer(packet, segment);
    }
    action
}

/// Classifies a packet from a client: returns an action, or the [`Step`] that the packet needs.
#[inline(never)]
fn look<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    l3: usize,
    segment: &mut Segment<A>,
    case: &mut Case<A>,
) -> i32 {
    verdict::settle(try_look::<A, OUTSIDE>(packet, l3, segment, case))
}

/// Handles a packet to a client.
#[inline(never)]
fn to_client<A: Family>(packet: &Packet<'_>, l3: usize) -> i32 {
    verdict::settle(try_to_client::<A>(packet, l3))
}

#[inline(always)]
fn try_look<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    l3: usize,
    segment: &mut Segment<A>,
    case: &mut Case<A>,
) -> Result<Verdict, PassReason> {
    match parse::at(packet, l3, segment)? {
        Kind::Other => return Ok(Verdict::Next),
        Kind::LaterFragment => return follow(packet, segment, End::Destination),
        Kind::IcmpError => return Ok(Verdict::Then(Step::Error)),
        Kind::Transport => fragment::forget(segment, End::Destination),
    }
    let (addr, port, proto) = (segment.destination, segment.ports.destination, segment.proto);
    let guess = endpoint::guess(addr, port, proto);
    // Most packets to a service whose breaker is open belong to a known flow, which names the service.
    let mut unknown = false;
    if guess.frontend && guess.every && !segment.is_syn() {
        match flow::find_going_on(&flow::key(segment)) {
            Some(flow) => {
                if let Some(switch) = tracked_by(flow, segment) {
                    (case.service, case.switch) = (flow.service, switch.to_word());
                    if switch.has(switch_flags::LIMITED) && segment.is_tcp() {
                        limited::note_client(segment, flow.service);
                    }
                    return established::<A, OUTSIDE>(packet, segment, &switch, case, flow);
                }
            }
            None => unknown = true,
        }
    }
    let counts = guess.counts(segment.may_begin()) || guess.frontend && segment.ends();
    let role = if counts { endpoint::look_up(addr, port, proto) } else { None };
    let role = role.unwrap_or(EndpointRole::NOTHING);
    if let Some(service) = endpoint::index(role.service) {
        (case.service, case.route) = (service, role.route);
        return to_frontend::<A, OUTSIDE>(packet, segment, case, unknown);
    }
    if !OUTSIDE
        && agent::any_fast()
        && uses_of(segment.source, segment.ports.source, segment.proto) & backend_use::FAST != 0
    {
        return Ok(Verdict::Then(Step::Answer));
    }
    // On an uplink, packets to a pod's own address are left alone: they are the traffic of other nodes, above all
    // their probes. (Where pods can be reached from outside, a client that uses one source port both for a backup's
    // own address and for a frontend is not told apart.)
    if OUTSIDE {
        return Ok(Verdict::Next);
    }
    if let Some(backend) = endpoint::index(role.backend) {
        case.backend = backend;
        return Ok(Verdict::Then(Step::Direct));
    }
    Ok(Verdict::Next)
}

#[inline(always)]
fn try_to_client<A: Family>(packet: &Packet<'_>, l3: usize) -> Result<Verdict, PassReason> {
    let Some(segment) = Segment::<A>::place(Hook::Egress) else { return Ok(Verdict::Next) };
    match parse::at(packet, l3, segment)? {
        Kind::Other => return Ok(Verdict::Next),
        Kind::LaterFragment => return follow(packet, segment, End::Source),
        Kind::IcmpError => return Ok(Verdict::Settled(error_to_client::<A, false>(packet, segment))),
        Kind::Transport => fragment::forget(segment, End::Source),
    }
    if segment.is_control() && endpoint::is_counted(segment.source, segment.ports.source) {
        limited::note_server(segment);
    }
    if uses_of(segment.source, segment.ports.source, segment.proto) == 0 {
        return Ok(Verdict::Next);
    }
    let Some(reverse) = flow::find_reverse(&flow::reverse_key(segment)) else { return Ok(Verdict::Next) };
    translate_back(packet, segment, reverse, exit::STACK)
}

/// Handles a packet from a pod that may be a backend's reply on the fast path, on the backend's own veth.
#[inline(never)]
fn answer<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::settle(try_answer(packet, segment))
}

#[inline(always)]
fn try_answer<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> Result<Verdict, PassReason> {
    let reverse = flow::find_reverse(&flow::reverse_key(segment)).filter(|reverse| reverse.exit != exit::STACK);
    let Some(reverse) = reverse else { return Ok(Verdict::Next) };
    translate_back(packet, segment, reverse, reverse.exit)
}

/// Translates a backend's packet back to the frontend that the client connected to. `exit`: where the packet goes,
/// see [`exit`].
#[inline(always)]
fn translate_back<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    reverse: &mut Reverse<A>,
    exit: u32,
) -> Result<Verdict, PassReason> {
    flow::touch_reverse(reverse, segment);
    if segment.is_control() && reverse.service != NONE {
        limited::note_backend(segment, reverse);
    }
    if reverse.vip == segment.source
        && reverse.vip_port == segment.ports.source
        && reverse.client_port == segment.ports.destination
    {
        return Ok(Verdict::Next);
    }
    fragment::note(segment, End::Source, reverse.vip, 0, exit);
    nat::from_backend(packet, segment, reverse.vip, reverse.vip_port, reverse.client_port)?;
    count::service(reverse.service, |c| c.translated += 1);
    Ok(onward(packet, exit))
}

/// The verdict for a packet that goes to `exit`: through the stack, or past it by a redirect.
#[inline(always)]
fn onward(packet: &Packet<'_>, exit: u32) -> Verdict {
    if exit == exit::STACK { Verdict::Next } else { Verdict::Redirect(packet.send_by(exit)) }
}

/// How an address is used as a backend: bits of [`backend_use`]. If 0, its packets need no look-up in the flow
/// tables.
#[inline(always)]
fn uses_of<A: Family>(addr: A, port: [u8; 2], proto: u8) -> u32 {
    if !endpoint::guess(addr, port, proto).every {
        return 0;
    }
    let backend = endpoint::look_up(addr, port, proto).and_then(|role| endpoint::index(role.backend));
    backend.map_or(0, select::backend_in_use::<A>)
}

/// Translates a later fragment, which has no ports, as its first fragment was translated.
#[inline(always)]
fn follow<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, end: End) -> Result<Verdict, PassReason> {
    let exit = fragment::follow(packet, segment, end)?;
    Ok(onward(packet, exit))
}

/// Handles an ICMP error from a router or a backend to a client. It quotes the client's packet as breaker
/// translated it, so the quote is translated back. `FAST`: the error comes from the backend, on the backend's own
/// veth, and is translated only if its flow is on the fast path.
#[inline(never)]
fn error_to_client<A: Family, const FAST: bool>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::settle(try_error_to_client::<A, FAST>(packet, segment))
}

#[inline(always)]
fn try_error_to_client<A: Family, const FAST: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
) -> Result<Verdict, PassReason> {
    let mut quote = Quote::<A>::empty();
    if icmp::read(packet, segment, &mut quote).is_none()
        || uses_of(quote.destination, quote.destination_port, quote.proto) == 0
    {
        return Ok(Verdict::Next);
    }
    let key = ReverseKey {
        backend: quote.destination,
        client: quote.source,
        backend_port: quote.destination_port,
        client_port: quote.source_port,
        proto: quote.proto,
        pad: [0; 3],
    };
    let Some(reverse) = flow::find_reverse(&key) else { return Ok(Verdict::Next) };
    let exit = if FAST { reverse.exit } else { exit::STACK };
    if FAST && exit == exit::STACK {
        return Ok(Verdict::Next);
    }
    let service = reverse.service;
    let change = icmp::Change {
        end: End::Destination,
        addr: reverse.vip,
        port: reverse.vip_port,
        other_port: reverse.client_port,
    };
    icmp::translate(packet, segment, &quote, &change)?;
    count::service(service, |c| c.icmp_errors += 1);
    Ok(onward(packet, exit))
}

/// Handles an ICMP error from a client to a backend. It quotes the backend's packet as breaker translated it, so
/// the quote is translated back.
#[inline(never)]
fn error_from_client<A: Family, const OUTSIDE: bool>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::settle(try_error_from_client::<A, OUTSIDE>(packet, segment))
}

#[inline(always)]
fn try_error_from_client<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
) -> Result<Verdict, PassReason> {
    let mut quote = Quote::<A>::empty();
    if icmp::read(packet, segment, &mut quote).is_none() {
        return Ok(Verdict::Next);
    }
    let role = endpoint::find(quote.source, quote.source_port, quote.proto);
    let Some(service) = role.and_then(|role| endpoint::index(role.service)) else {
        return Ok(if !OUTSIDE && agent::any_fast() { Verdict::Then(Step::AnswerError) } else { Verdict::Next });
    };
    let key = FlowKey {
        client: quote.destination,
        vip: quote.source,
        client_port: quote.destination_port,
        vip_port: quote.source_port,
        proto: quote.proto,
        pad: [0; 3],
    };
    let Some(flow) = flow::find(&key) else { return Ok(Verdict::Next) };
    if flow.kind as u8 != FlowKind::Redirected as u8 {
        return Ok(Verdict::Next);
    }
    let change =
        icmp::Change { end: End::Source, addr: flow.backend, port: flow.backend_port, other_port: flow.source_port };
    let exit = Peer::of(flow).exit;
    icmp::translate(packet, segment, &quote, &change)?;
    count::service(service, |c| c.icmp_errors += 1);
    Ok(onward(packet, exit))
}

/// The switch of a flow's service, if the service has tracked flows and the flow's decision still holds for the
/// packet.
#[inline(always)]
fn tracked_by<A: Family>(flow: &Flow<A>, segment: &Segment<A>) -> Option<Switch<u8>> {
    let switch = service::switch(flow.service)?;
    (service::tracks(flow.service, &switch) && holds(flow, segment, &switch)).then_some(switch)
}

/// Whether a flow's decision still holds for a packet. A datagram's decision holds in the service's current epoch
/// only: the next epoch may send the client elsewhere.
#[inline(always)]
fn holds<A: Family>(flow: &Flow<A>, segment: &Segment<A>, switch: &Switch<u8>) -> bool {
    segment.is_tcp() || flow.epoch == switch.epoch
}

/// Handles a packet to a frontend. `unknown`: the flow tables were already searched and have no entry for the packet.
#[inline(always)]
fn to_frontend<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    case: &mut Case<A>,
    unknown: bool,
) -> Result<Verdict, PassReason> {
    let switch = service::switch(case.service).ok_or(PassReason::UnknownService)?;
    case.switch = switch.to_word();
    let tracks = service::tracks(case.service, &switch);
    let limited = switch.has(switch_flags::LIMITED);
    if limited && segment.is_tcp() && !segment.is_syn() {
        limited::note_client(segment, case.service);
    }
    // Closed and idle: the flow tables hold no flow of this service, so no look-up is needed.
    if !tracks && !switch.has(switch_flags::DRY_RUN) {
        return if limited {
            Ok(limited::closed(segment, case, &switch))
        } else {
            closed(segment, case.service, &switch)
        };
    }
    if segment.is_syn() {
        return Ok(Verdict::Then(Step::Decide));
    }
    if !tracks {
        return Ok(if segment.is_tcp() { Verdict::Next } else { Verdict::Then(Step::Decide) });
    }
    let flow = if unknown { None } else { flow::find_going_on(&flow::key(segment)) };
    match flow {
        Some(flow) if holds(flow, segment, &switch) => established::<A, OUTSIDE>(packet, segment, &switch, case, flow),
        None if segment.is_tcp() => unseen(segment, &switch, case),
        _ => Ok(Verdict::Then(Step::Decide)),
    }
}

/// Passes a packet to a service that is closed and idle (no tracked flows). Counts a new TCP connection, and
/// reports the first one of the epoch.
#[inline(always)]
fn closed<A: Family>(segment: &Segment<A>, service: u32, switch: &Switch<u8>) -> Result<Verdict, PassReason> {
    if segment.is_syn() {
        if service::adopt(service, switch.epoch) {
            event::send(EventKind::StateAdopted, service, switch, &flow::key(segment), None);
        }
        count::service(service, |c| c.new_primary += 1);
    }
    Ok(Verdict::Next)
}

/// Decides the first packet of a flow. Every SYN is decided anew, because clients reuse ports, and because a client
/// without an answer must be able to move. A datagram is decided anew if its flow is unknown or was decided in
/// another epoch.
#[inline(never)]
fn decide<A: Family>(segment: &Segment<A>, case: &mut Case<A>) -> i32 {
    verdict::settle(Ok(Verdict::Then(choose(segment, case))))
}

/// Chooses the destination and returns the next step: to apply the decision, or, for a service with limits, to ask
/// whether they admit the packet.
#[inline(always)]
fn choose<A: Family>(segment: &Segment<A>, case: &mut Case<A>) -> Step {
    let (service, switch) = (case.service, Switch::from_word(case.switch));
    let key = flow::key(segment);
    let now_ns = agent::now_ns();
    if service::adopt(service, switch.epoch) {
        event::send(EventKind::StateAdopted, service, &switch, &key, None);
    }
    if service::tracks(service, &switch) {
        flow::forget(&key);
    }
    case.now_ns = now_ns;
    if agent::decision_holds(&switch, now_ns) {
        let choice = select::choose(service, case.route, &switch, &key);
        (case.slot, case.trial) = (choice.slot, choice.trial as u32);
    } else {
        count::reason(PassReason::AgentLost);
        count::service(service, |c| c.agent_lost += 1);
        case.slot = SLOT_PASSTHROUGH;
    }
    let limited = switch.has(switch_flags::LIMITED) && case.slot != SLOT_REJECT;
    if limited { Step::Admit } else { Step::CarryOut }
}

/// Applies the decision for the first packet of a flow.
#[inline(never)]
fn carry_out<A: Family, const OUTSIDE: bool>(packet: &Packet<'_>, segment: &Segment<A>, case: &mut Case<A>) -> i32 {
    verdict::settle(try_carry_out::<A, OUTSIDE>(packet, segment, case))
}

#[inline(always)]
fn try_carry_out<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    case: &mut Case<A>,
) -> Result<Verdict, PassReason> {
    let (service, switch, now_ns) = (case.service, Switch::from_word(case.switch), case.now_ns);
    let key = flow::key(segment);
    if switch.has(switch_flags::DRY_RUN) {
        let would_move = case.slot != SLOT_PASSTHROUGH;
        count::service(service, |c| {
            c.new_primary += 1;
            c.dry_run += would_move as u64;
        });
        return Ok(Verdict::Next);
    }
    match case.slot {
        SLOT_PASSTHROUGH => {
            let trial = case.trial;
            count::service(service, |c| {
                c.new_primary += 1;
                c.half_open += trial as u64;
            });
            pass_and_pin(service, &switch, &key, now_ns)
        }
        SLOT_REJECT => {
            count::service(service, |c| c.rejected += 1);
            event::send(EventKind::Rejected, service, &switch, &key, None);
            Ok(Verdict::Then(Step::Refuse))
        }
        id => redirect::<A, OUTSIDE>(packet, segment, case, &switch, &key, id, now_ns),
    }
}

/// Pins a new connection to backend `id`. The next step translates its first packet.
#[inline(always)]
fn redirect<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    case: &mut Case<A>,
    switch: &Switch<u8>,
    key: &FlowKey<A>,
    id: u32,
    now_ns: u64,
) -> Result<Verdict, PassReason> {
    let service = case.service;
    let Some(backend) = select::backend::<A>(id) else {
        return fail_open(service, switch, key, now_ns, PassReason::UnknownBackend);
    };
    let mut flow = flow::to(backend, key, FlowKind::Redirected, service, id, switch.epoch, now_ns);
    let hairpin = key.client == flow.backend;
    // The path is decided once: for netfilter a connection that it has not seen from the start is INVALID.
    let mut uses = backend_use::REDIRECTED;
    let mut back_by = exit::STACK;
    if backend.ifindex != 0 && !hairpin {
        // (A packet with VLAN tags does not take the fast path: the pod would receive the tags, and the routes name
        // another interface, that of the VLAN, for its client.)
        if switch.has(switch_flags::FAST) && (!OUTSIDE || segment.l3() == parse::L3 && fib::leads_back(packet, key)) {
            flow.way = flow_way::FAST;
            uses |= backend_use::FAST;
            back_by = packet.ifindex() | if OUTSIDE { exit::NEIGHBOR } else { 0 };
        } else if OUTSIDE && select::keeps_client(case.route) {
            flow.way = flow_way::KEEP_CLIENT;
        }
    }
    if let Err(reason) = flow::pin(key, &mut flow, back_by) {
        return fail_open(service, switch, key, now_ns, reason);
    }
    select::mark_in_use::<A>(id, uses);
    debug!(packet.context(), "moved port {} to backend {}", u16::from_be_bytes(key.client_port), id);
    event::send(EventKind::FlowMoved, service, switch, key, Some(&flow));
    let port_changed = flow.source_port != key.client_port && back_by == exit::STACK;
    count::service(service, |c| {
        c.new_backup += 1;
        c.hairpin += hairpin as u64;
        c.port_changed += port_changed as u64;
    });
    case.peer = Peer::of(&flow);
    Ok(Verdict::Then(Step::Translate))
}

#[inline(never)]
fn translate_first<A: Family, const OUTSIDE: bool>(packet: &Packet<'_>, segment: &Segment<A>, case: &Case<A>) -> i32 {
    verdict::settle(translate::<A, OUTSIDE>(packet, segment, case.service, &case.peer))
}

/// Translates a packet of a redirected flow and sends it to the backend.
#[inline(always)]
fn translate<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    service: u32,
    to: &Peer<A>,
) -> Result<Verdict, PassReason> {
    // A pod drops a packet that comes from its own address: netfilter must masquerade it, as for kube-proxy's
    // hairpin.
    let masquerade = OUTSIDE && to.way == 0 || segment.source == to.addr;
    let mark = if masquerade { MASQUERADE_MARK.load() } else { 0 };
    if mark != 0 {
        packet.add_mark(mark);
    }
    fragment::note(segment, End::Destination, to.addr, mark, to.exit);
    nat::to_backend(packet, segment, to.addr, to.port, to.source_port)?;
    count::service(service, |c| c.translated += 1);
    Ok(onward(packet, to.exit))
}

/// Leaves a new connection to kube-proxy because it could not be moved to a backend. This is pinned, too, if there
/// is room: otherwise its next segment would look like one of a connection from before the trip.
#[inline(always)]
fn fail_open<A: Family>(
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey<A>,
    now_ns: u64,
    reason: PassReason,
) -> Result<Verdict, PassReason> {
    count::service(service, |c| c.failed_open += 1);
    let _ = flow::pin_passed(key, service, switch.epoch, now_ns);
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
fn pass_and_pin<A: Family>(
    service: u32,
    switch: &Switch<u8>,
    key: &FlowKey<A>,
    now_ns: u64,
) -> Result<Verdict, PassReason> {
    let tries = switch.state == BreakerState::HalfOpen as u8;
    if switch.state != BreakerState::Closed as u8 && (key.proto == PROTO_TCP || tries) {
        flow::pin_passed(key, service, switch.epoch, now_ns)?;
    }
    Ok(Verdict::Next)
}

/// Handles a packet of a decided flow: the flow keeps its destination, unless it was decided in an older epoch and
/// the policy for its tier says reset.
#[inline(always)]
fn established<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    switch: &Switch<u8>,
    case: &mut Case<A>,
    flow: &mut Flow<A>,
) -> Result<Verdict, PassReason> {
    flow::touch(flow, segment);
    let redirected = flow.kind as u8 == FlowKind::Redirected as u8;
    let policy = if redirected { switch_flags::RESET_BACKUP } else { switch_flags::RESET_PRIMARY };
    if switch.has(policy)
        && flow.epoch != switch.epoch
        && !segment.is_rst()
        && agent::decision_holds(switch, agent::now_ns())
    {
        flow.seen |= seen::RST;
        case.peer = Peer::of(flow);
        return Ok(Verdict::Then(Step::Reset));
    }
    if !redirected {
        return Ok(Verdict::Next);
    }
    translate::<A, OUTSIDE>(packet, segment, case.service, &Peer::of(flow))
}

/// Handles a segment of a connection that the programs have not seen from its SYN. Such a segment is never
/// rewritten, only passed or, by policy, reset.
#[inline(always)]
fn unseen<A: Family>(segment: &Segment<A>, switch: &Switch<u8>, case: &mut Case<A>) -> Result<Verdict, PassReason> {
    if !switch.has(switch_flags::RESET_PRIMARY) || segment.is_rst() {
        return Ok(Verdict::Next);
    }
    if !agent::decision_holds(switch, agent::now_ns()) {
        return Err(PassReason::AgentLost);
    }
    case.peer = Peer::addressed_by(segment);
    Ok(Verdict::Then(Step::Reset))
}

#[inline(never)]
fn reset_both<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, case: &Case<A>) -> i32 {
    count::service(case.service, |c| c.resets += 1);
    let switch = Switch::from_word(case.switch);
    event::send(EventKind::FlowReset, case.service, &switch, &flow::key(segment), None);
    verdict::settle(reset::both_ends(packet, segment, &case.peer).map(|()| onward(packet, case.peer.exit)))
}

#[inline(never)]
fn refuse_segment<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::settle(reset::refuse_segment(packet, segment).map(|()| Verdict::Redirect(packet.send_back())))
}

#[inline(never)]
fn refuse_datagram<A: Family>(packet: &Packet<'_>, segment: &Segment<A>) -> i32 {
    verdict::settle(reset::refuse_datagram(packet, segment).map(|()| Verdict::Redirect(packet.send_back())))
}

/// Handles a packet of a client's direct connection to a backend. It is tracked only so that its reverse key never
/// equals that of a flow to a frontend: the later one of the two gets another source port.
#[inline(never)]
fn to_backend_directly<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, id: u32) -> i32 {
    verdict::settle(try_to_backend_directly(packet, segment, id))
}

#[inline(always)]
fn try_to_backend_directly<A: Family>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    id: u32,
) -> Result<Verdict, PassReason> {
    let in_use = select::backend_in_use::<A>(id);
    // A datagram does not show whether it is the first of its flow. It matters only if the backend has other
    // tracked flows.
    if !segment.is_tcp() && in_use == 0 {
        return Ok(Verdict::Next);
    }
    let key = flow::key(segment);
    // While no direct connection to this backend has a changed port, only SYN, FIN and RST matter: FIN and RST free
    // the reverse key.
    if segment.is_tcp() && !segment.is_syn() && in_use & backend_use::DIRECT == 0 && !segment.ends() {
        return Ok(Verdict::Next);
    }
    let known = if segment.is_syn() { None } else { flow::find_going_on(&key) };
    let source_port = match known {
        Some(flow) => {
            flow::touch(flow, segment);
            flow.source_port
        }
        None if segment.is_tcp() && !segment.is_syn() => return Ok(Verdict::Next),
        None => {
            flow::forget(&key);
            let backend = select::backend(id).ok_or(PassReason::UnknownBackend)?;
            let mut flow = flow::to(backend, &key, FlowKind::Direct, NONE, id, 0, agent::now_ns());
            flow::pin(&key, &mut flow, exit::STACK)?;
            if flow.source_port != key.client_port {
                select::mark_in_use::<A>(id, backend_use::DIRECT);
            }
            flow.source_port
        }
    };
    if source_port != key.client_port {
        fragment::note(segment, End::Destination, key.vip, 0, exit::STACK);
        nat::to_backend(packet, segment, key.vip, key.vip_port, source_port)?;
    }
    Ok(Verdict::Next)
}
