//! What is told to userspace as it happens. A full ring loses the event, never the packet.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    btf_maps::RingBuf,
    macros::btf_map,
};
use breaker_common::{BreakerState, Event, EventKind, Flow4, FlowKey4, PassReason, Switch};

use crate::count;

/// 256 KiB: six thousand events.
#[btf_map]
static EVENTS: RingBuf<Event, { 256 * 1024 }> = RingBuf::new();

/// Tells of a connection. `flow` is where it went, if anywhere.
#[inline(always)]
pub fn send(kind: EventKind, now_ns: u64, service: u32, switch: &Switch<u8>, key: &FlowKey4, flow: Option<&Flow4>) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        count::reason(PassReason::EventLost);
        return;
    };
    let state = match switch.state {
        1 => BreakerState::Open,
        2 => BreakerState::HalfOpen,
        _ => BreakerState::Closed,
    };
    entry.write(Event {
        at_ns: now_ns,
        service,
        epoch: switch.epoch,
        client: key.client,
        vip: key.vip,
        backend: flow.map_or([0; 4], |f| f.backend),
        client_port: key.client_port,
        vip_port: key.vip_port,
        backend_port: flow.map_or([0; 2], |f| f.backend_port),
        kind,
        state,
        pad: 0,
    });
    // The agent looks into the ring regularly; only news about a state is worth waking it up.
    let wake = if kind as u8 == EventKind::StateAdopted as u8 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    entry.submit(wake as u64);
}
