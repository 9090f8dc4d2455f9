//! Events for userspace. If the ring buffer is full, the event is lost; the packet is not affected. All CPUs share the
//! ring buffer's lock, so each CPU sends a bounded number of events about single connections.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    btf_maps::{PerCpuArray, RingBuf},
    macros::btf_map,
};
use breaker_common::{Address as _, BreakerState, Event, EventKind, Flow, FlowKey, PassReason, Switch};

use crate::{
    agent, count,
    family::{Family, V6},
};

/// 256 KiB: room for about 3,000 events.
#[btf_map]
static EVENTS: RingBuf<Event, { 256 * 1024 }> = RingBuf::new();

/// Number of events about single connections that a CPU sends between two heartbeats of the agent (about one second).
const EVENTS_PER_BEAT: u32 = 256;

/// What a CPU has sent since a heartbeat.
#[repr(C)]
pub struct EventBudget {
    /// Time of the heartbeat, in ticks (see [`breaker_common::TICK_SHIFT`]).
    beat_tick: u32,
    /// Number of events since then.
    sent: u32,
}

#[btf_map]
static EVENT_BUDGET: PerCpuArray<EventBudget, 1> = PerCpuArray::new();

/// Whether this CPU may send one more event about a single connection; counts it.
#[inline(always)]
fn is_within_budget() -> bool {
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return false };
    // SAFETY: the kernel returned a pointer to this CPU's value; see `count::service` on preemption.
    let budget = unsafe { &mut *budget };
    let beat = agent::heartbeat_tick();
    if budget.beat_tick != beat {
        *budget = EventBudget { beat_tick: beat, sent: 0 };
    }
    budget.sent += 1;
    budget.sent <= EVENTS_PER_BEAT
}

/// Sends an event about a connection. `flow`: the decision that sent it to a backend, if any. BPF subprogram (not
/// inlined), for a stack frame of its own: see [`crate::hook::from_client`].
#[inline(never)]
pub fn send<A: Family>(kind: EventKind, service: u32, switch: &Switch<u8>, key: &FlowKey<A>, flow: Option<&Flow<A>>) {
    let is_first_of_epoch = kind as u8 == EventKind::StateAdopted as u8;
    let room = is_first_of_epoch || is_within_budget();
    let Some(mut entry) = room.then(|| EVENTS.reserve(0)).flatten() else {
        count::reason(PassReason::EventLost);
        return;
    };
    let state = match switch.state {
        1 => BreakerState::Open,
        2 => BreakerState::HalfOpen,
        _ => BreakerState::Closed,
    };
    let event: Event<EventKind, BreakerState, V6> = Event {
        at_ns: agent::now_ns(),
        service,
        epoch: switch.epoch,
        client: key.client.mapped(),
        vip: key.vip.mapped(),
        backend: flow.map_or(V6::ZERO, |f| f.backend.mapped()),
        client_port: key.client_port,
        vip_port: key.vip_port,
        backend_port: flow.map_or([0; 2], |f| f.backend_port),
        kind,
        state,
        proto: key.proto,
        pad: [0; 7],
    };
    // SAFETY: the type differs from the map's only in the address type, which has the same size, alignment and bytes.
    unsafe { entry.as_mut_ptr().cast::<Event<EventKind, BreakerState, V6>>().write(event) };
    // The agent polls the ring buffer regularly; only an adopted state is worth waking it up.
    let wake = if is_first_of_epoch { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    entry.submit(wake as u64);
}
