//! Both directions of the host side of a pod's veth, for what does not go on after a [glance](super::glance).
//!
//! From the pod (tc ingress): is it for a frontend? → a first packet: decide, pin, translate → another one: what was
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
//!
//! Besides, both ways: ICMP errors about translated packets, and later fragments of translated packets.
//!
//! Past the stack (`fastPath: PeerRedirect`): a flow to a backup pod of this node may leave the stack out, from another pod as
//! from outside. Then there is no way back through the client's veth or the stack: what the backend sends is translated where it
//! comes from the backend, and goes into the client's namespace, or out of the uplink, at once.
//!
//! Functions that return an action (`i32`) are functions to the kernel, too, and are not inlined: a frame each, because all
//! of it together would not fit into the 512 bytes of stack that a program has. For the same reason they are called one
//! after the other, not one by the other: [`from_client`] has their order, and is in the entry point's own frame. A frame is
//! rounded up to 32 bytes on kernel 6.1, and an empty one takes as many (`check_max_stack_depth` in kernel/bpf/verifier.c); newer
//! ones round to 16, where they compile the program.

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

/// kube-proxy's masquerade mark; the loader sets it to what the node uses.
#[unsafe(no_mangle)]
static MASQUERADE_MARK: aya_ebpf::Global<u32> = aya_ebpf::Global::new(DEFAULT_MASQUERADE_MARK);

/// A packet that a pod sends.
#[inline(always)]
pub fn from_pod(ctx: &TcContext) -> i32 {
    by_family::<false>(ctx, from_client::<V4, false>, from_client::<V6, false>)
}

/// A packet that comes in by an uplink.
#[inline(always)]
pub fn from_outside(ctx: &TcContext) -> i32 {
    by_family::<true>(ctx, from_client::<V4, true>, from_client::<V6, true>)
}

/// A packet that a pod gets.
#[inline(always)]
pub fn to_pod(ctx: &TcContext) -> i32 {
    by_family::<false>(ctx, to_client::<V4>, to_client::<V6>)
}

/// A packet that leaves by an uplink.
#[inline(always)]
pub fn to_outside(ctx: &TcContext) -> i32 {
    by_family::<true>(ctx, to_client::<V4>, to_client::<V6>)
}

/// What is known of a client's packet, from one function to the next.
pub struct Case<A> {
    pub service: u32,
    pub route: u32,
    /// The backend whose own address it is for.
    backend: u32,
    /// What was decided for the first packet of a flow: a slot's content.
    pub slot: u32,
    /// 1 if it is one of the half-open breaker's trial connections, else 0.
    pub trial: u32,
    /// When it was decided.
    pub now_ns: u64,
    /// The service's switch, as a word.
    pub switch: u64,
    /// Where the packet is to go: the backend, or the other end of the connection that is reset.
    peer: Peer<A>,
}

/// What looks closer is a function of its own, also for IPv4, which has the smaller frame: this one lies under the frames of
/// all steps that follow, and kernel 6.1 had no room for that: 576 bytes by its reckoning.
///
/// `OUTSIDE`: the way back must be led past us.
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

/// What does a client send?
#[inline(never)]
fn look<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    l3: usize,
    segment: &mut Segment<A>,
    case: &mut Case<A>,
) -> i32 {
    verdict::settle(try_look::<A, OUTSIDE>(packet, l3, segment, case))
}

/// What a client gets.
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
    // Most packets to a service that is open go on with a flow, which says of which service it is.
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
    // From outside, what goes to a pod itself is other nodes' business (their probes above all). (Where pods can be reached
    // from outside at all, a client that asks a backup both directly and by a frontend, from one port, is not told apart.)
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

/// A backend's packet, on the backend's own interface: to the client at once, if its flow leaves the stack out.
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

/// Makes a backend's packet what the client expects.
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

/// On to the stack, or past it.
#[inline(always)]
fn onward(packet: &Packet<'_>, exit: u32) -> Verdict {
    if exit == exit::STACK { Verdict::Next } else { Verdict::Redirect(packet.send_by(exit)) }
}

/// What an address is as a backend: bits of [`backend_use`]. With none its packets need no look into the flow tables.
#[inline(always)]
fn uses_of<A: Family>(addr: A, port: [u8; 2], proto: u8) -> u32 {
    if !endpoint::guess(addr, port, proto).every {
        return 0;
    }
    let backend = endpoint::look_up(addr, port, proto).and_then(|role| endpoint::index(role.backend));
    backend.map_or(0, select::backend_in_use::<A>)
}

/// A fragment without ports: as its first one.
#[inline(always)]
fn follow<A: Family>(packet: &Packet<'_>, segment: &Segment<A>, end: End) -> Result<Verdict, PassReason> {
    let exit = fragment::follow(packet, segment, end)?;
    Ok(onward(packet, exit))
}

/// An error that a router or the backend tells a client of: it quotes what the client sent, as we translated it. `FAST`: it
/// comes from the backend, on the backend's own interface, and is looked at only if the flow leaves the stack out.
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

/// An error that a client tells a backend of: it quotes what the backend sent, as we translated it.
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

/// The switch of a flow's service, if the flow holds for a packet.
#[inline(always)]
fn tracked_by<A: Family>(flow: &Flow<A>, segment: &Segment<A>) -> Option<Switch<u8>> {
    let switch = service::switch(flow.service)?;
    (service::tracks(flow.service, &switch) && holds(flow, segment, &switch)).then_some(switch)
}

/// A datagram's flow holds for its service's epoch only: with the next one a client may be somewhere else.
#[inline(always)]
fn holds<A: Family>(flow: &Flow<A>, segment: &Segment<A>, switch: &Switch<u8>) -> bool {
    segment.is_tcp() || flow.epoch == switch.epoch
}

/// `unknown`: it was looked for its flow, and there is none.
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
    // Closed and settled: no flow of ours can exist, so nothing needs to be looked up.
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

/// A packet for a service that is closed, and has been for long enough.
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

/// A SYN always decides anew: ports get used again, and a client that got no answer must be able to move. So does a
/// datagram of a flow that is not known, or was decided in another epoch.
#[inline(never)]
fn decide<A: Family>(segment: &Segment<A>, case: &mut Case<A>) -> i32 {
    verdict::settle(Ok(Verdict::Then(choose(segment, case))))
}

/// Decides where it goes, and what comes next: to carry that out, or, where there are limits, to ask whether it is admitted.
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

/// Carries out what was decided for the first packet of a flow.
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

/// Sends a new connection to a backend.
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
    // How it goes is decided once: netfilter does not take up a connection that it has not seen from the start.
    let mut uses = backend_use::REDIRECTED;
    let mut back_by = exit::STACK;
    if backend.ifindex != 0 && !hairpin {
        // (A frame's VLAN tag would be the pod's business; the routes say that a tagged client is behind another interface.)
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

/// Sends a packet of a redirected flow on its way.
#[inline(always)]
fn translate<A: Family, const OUTSIDE: bool>(
    packet: &Packet<'_>,
    segment: &Segment<A>,
    service: u32,
    to: &Peer<A>,
) -> Result<Verdict, PassReason> {
    // The pod would drop a packet from itself: let netfilter masquerade it, as kube-proxy's hairpin does.
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

/// Leaves a new connection that should have moved to kube-proxy. That is pinned too, if there is room: its next segment
/// must not be taken for one from before.
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

/// Leaves a new connection to kube-proxy. While the breaker is not closed that is a decision like another, and pinned:
/// what is established later on the primary and not pinned is from before, and the policy for it may be a reset.
///
/// Datagrams know no reset. They are pinned while they try the primary only; where the backup is missing, or the agent, each
/// of them is decided anew, and moves as soon as there is one again.
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

/// A packet of a flow that we decided: it stays where it is, unless the policy for the other side says reset.
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

/// A segment of a flow that we did not see from its SYN: never rewritten, only passed or, by policy, reset.
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

/// A client's own connection to a backend. It takes part only so that it never shares a reverse key with a flow of a
/// frontend: whoever comes second gets another source port.
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
    // A datagram does not say that it is the first one; it matters only where flows of a frontend come, too.
    if !segment.is_tcp() && in_use == 0 {
        return Ok(Verdict::Next);
    }
    let key = flow::key(segment);
    // Without a changed port only a connection's end matters: then its reverse key is free again.
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
