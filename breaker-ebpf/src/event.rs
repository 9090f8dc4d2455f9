//! Events for userspace. If the ring buffer is full, the event is lost; the packet is not affected.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    btf_maps::RingBuf,
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

/// Sends an event about a connection. `flow`: the decision that sent it to a backend, if any. BPF subprogram (not
/// inlined), for a stack frame of its own: see [`crate::hook::from_client`].
#[inline(never)]
pub fn send<A: Family>(kind: EventKind, service: u32, switch: &Switch<u8>, key: &FlowKey<A>, flow: Option<&Flow<A>>) {
    let Some(mut entry) = EVENTS.reserve(0) else {
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
    let wake = if kind as u8 == EventKind::StateAdopted as u8 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    entry.submit(wake as u64);
}
