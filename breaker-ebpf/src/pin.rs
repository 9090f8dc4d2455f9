//! Pins the decision for a new flow: creates its entries.

use aya_ebpf::bindings::BPF_ANY;
use breaker_common::{Backend, Flow, FlowKey, FlowKind, NONE, PassReason, Reverse, egress};

use crate::{
    agent,
    claim::{EPHEMERAL_FIRST, PORT_FIRST, claim, claim_other_port},
    family::Family,
};

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

/// The entry of a new flow that is left to kube-proxy. `sequence`: that of its SYN, wire order; 0 for datagrams. `now_ns`:
/// time of the decision, ns of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn passed<A: Family>(key: &FlowKey<A>, service: u32, epoch: u32, sequence: [u8; 4], now_ns: u64) -> Flow<A> {
    Flow {
        backend: key.vip,
        backend_port: key.vip_port,
        source_port: key.client_port,
        service,
        backend_id: NONE,
        epoch,
        kind: FlowKind::Passed,
        seen: 0,
        path: 0,
        pad: 0,
        created_tick: agent::tick(now_ns),
        sequence,
        last_seen_tick: agent::heartbeat_tick(),
    }
}

/// Turns the entry of a new flow into one that leads to a backend, through the stack and with the client's own port.
#[inline(always)]
pub fn lead_to<A: Family>(flow: &mut Flow<A>, backend: &Backend<A>, backend_id: u32, kind: FlowKind) {
    (flow.backend, flow.backend_port) = (backend.addr, backend.port);
    (flow.backend_id, flow.kind) = (backend_id, kind);
}

/// Pins the decision to leave a flow to kube-proxy, whatever `flow` led to.
///
/// # Errors
/// [`PassReason::FlowTableFull`].
#[inline(always)]
pub fn pin_passed<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>) -> Result<(), PassReason> {
    match pin_passed_in_table(key, flow) {
        PINNED => Ok(()),
        _ => Err(PassReason::FlowTableFull),
    }
}

/// [`pin_passed`] as a BPF subprogram (not inlined), for a stack frame of its own. Returns `PINNED` or `TABLE_FULL`.
#[inline(never)]
fn pin_passed_in_table<A: Family>(key: &FlowKey<A>, flow: &mut Flow<A>) -> u32 {
    (flow.backend, flow.backend_port, flow.source_port) = (key.vip, key.vip_port, key.client_port);
    (flow.backend_id, flow.kind, flow.path) = (NONE, FlowKind::Passed, 0);
    if A::pending().insert(key, &*flow, BPF_ANY as u64).is_ok() { PINNED } else { TABLE_FULL }
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
