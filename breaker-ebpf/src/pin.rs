//! Pins the decision for a new flow: creates its entries.

use aya_ebpf::bindings::BPF_ANY;
use breaker_common::{Backend, Flow, FlowKey, FlowKind, NONE, PassReason, Reverse, egress};

use crate::{
    agent,
    claim::{EPHEMERAL_FIRST, PORT_FIRST, claim, claim_other_port},
    family::Family,
};

/// What a decision about a flow was based on.
pub struct Decision {
    /// Index of the service; [`NONE`] for a direct connection.
    pub service: u32,
    /// The service's epoch.
    pub epoch: u32,
    /// Sequence number of the SYN, wire order; 0 for datagrams.
    pub sequence: [u8; 4],
    /// When it was made, ns of `CLOCK_MONOTONIC`.
    pub now_ns: u64,
}

/// The way of a flow's replies.
pub struct ReplyPath<A> {
    /// As [`Reverse::egress`].
    pub egress: u32,
    /// As [`Reverse::ingress`].
    pub ingress: u32,
    /// As [`Reverse::next_hop`].
    pub next_hop: A,
}

impl<A: Family> ReplyPath<A> {
    /// Through the network stack. `ingress`: the interface on which the client's packet came in.
    #[inline(always)]
    pub fn through_stack(ingress: u32) -> Self {
        Self { egress: egress::STACK, ingress, next_hop: A::ZERO }
    }
}

/// The entry of a new flow to a backend, through the stack and with the client's own port.
#[inline(always)]
pub fn new_flow<A: Family>(
    backend: &Backend<A>,
    key: &FlowKey<A>,
    kind: FlowKind,
    backend_id: u32,
    decision: &Decision,
) -> Flow<A> {
    Flow {
        backend: backend.addr,
        backend_port: backend.port,
        source_port: key.client_port,
        service: decision.service,
        backend_id,
        epoch: decision.epoch,
        kind,
        seen: 0,
        path: 0,
        pad: 0,
        created_tick: agent::tick(decision.now_ns),
        sequence: decision.sequence,
        last_seen_tick: agent::heartbeat_tick(),
    }
}

/// Pins the decision to leave a flow to kube-proxy.
///
/// # Errors
/// [`PassReason::FlowTableFull`].
#[inline(always)]
pub fn pin_passed<A: Family>(key: &FlowKey<A>, decision: &Decision) -> Result<(), PassReason> {
    match pin_passed_in_table(key, decision) {
        PINNED => Ok(()),
        _ => Err(PassReason::FlowTableFull),
    }
}

/// [`pin_passed`] as a BPF subprogram (not inlined), for a stack frame of its own. Returns `PINNED` or `TABLE_FULL`.
#[inline(never)]
fn pin_passed_in_table<A: Family>(key: &FlowKey<A>, decision: &Decision) -> u32 {
    let flow = Flow {
        backend: key.vip,
        backend_port: key.vip_port,
        source_port: key.client_port,
        service: decision.service,
        backend_id: NONE,
        epoch: decision.epoch,
        kind: FlowKind::Passed,
        seen: 0,
        path: 0,
        pad: 0,
        created_tick: agent::tick(decision.now_ns),
        sequence: decision.sequence,
        last_seen_tick: agent::heartbeat_tick(),
    };
    if A::pending().insert(key, flow, BPF_ANY as u64).is_ok() { PINNED } else { TABLE_FULL }
}

/// Pins a flow to a backend in both tables, under a reverse key of its own. If another live flow uses the client's
/// port toward this backend, the flow gets another source port, as conntrack does.
///
/// conntrack prevents such collisions for the connections that it sees. It does not see a flow on the fast path,
/// and the client may use the same port toward the same backend through a Service that breaker does not protect. So
/// a flow on the fast path always gets a port that the client's kernel would not choose.
///
/// `flow`: the decision. Its `source_port` is set to the port that the flow got. `reply`: the way of its replies.
///
/// # Errors
/// [`PassReason::NoSourcePort`], [`PassReason::FlowTableFull`]. Neither leaves an entry behind.
#[inline(always)]
pub fn pin<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>, reply: &ReplyPath<A>) -> Result<(), PassReason> {
    match pin_in_tables(key, flow, reply) {
        PINNED => Ok(()),
        NO_SOURCE_PORT => Err(PassReason::NoSourcePort),
        _ => Err(PassReason::FlowTableFull),
    }
}

const PINNED: u32 = 0;
const NO_SOURCE_PORT: u32 = 1;
const TABLE_FULL: u32 = 2;

/// [`pin`] as a BPF subprogram (not inlined), which can return only a number.
#[inline(never)]
fn pin_in_tables<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>, reply: &ReplyPath<A>) -> u32 {
    let mut reverse_key = key.reverse_key(flow);
    let reverse = reverse_of(key, flow, reply);
    let fast = reply.egress != egress::STACK;
    if fast || !claim(key, &reverse_key, &reverse) {
        let (first, last) = if fast { (PORT_FIRST, EPHEMERAL_FIRST - 1) } else { (PORT_FIRST, u16::MAX) };
        flow.source_port = claim_other_port(key, &mut reverse_key, &reverse, first, last);
        if flow.source_port == [0; 2] {
            return NO_SOURCE_PORT;
        }
    }
    if A::pending().insert(key, &*flow, BPF_ANY as u64).is_err() {
        let _ = A::pending_reverse().remove(&reverse_key);
        return TABLE_FULL;
    }
    PINNED
}

/// The reverse entry of a flow.
#[inline(always)]
fn reverse_of<A: Family>(key: &FlowKey<A>, flow: &Flow<A>, reply: &ReplyPath<A>) -> Reverse<A> {
    Reverse {
        vip: key.vip,
        vip_port: key.vip_port,
        client_port: key.client_port,
        service: flow.service,
        seen: 0,
        pad: [0; 3],
        last_seen_tick: flow.last_seen_tick,
        egress: reply.egress,
        ingress: reply.ingress,
        next_hop: reply.next_hop,
    }
}
