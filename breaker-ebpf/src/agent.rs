//! The agent's sign of life.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE, btf_maps::Array, helpers::generated::bpf_ktime_get_coarse_ns, macros::btf_map,
};
use breaker_common::{Heartbeat, Switch, TICK_SHIFT, switch_flags};

/// One value; the agent maps it into its memory.
#[btf_map]
static HEARTBEAT: Array<Heartbeat, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Now, on the clock that the heartbeat is written in, a few milliseconds coarse (half the price of the fine one).
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments, no side effects.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The last heartbeat: a clock of a second's resolution that costs an array look-up.
#[inline(always)]
pub fn beat_ns() -> u64 {
    HEARTBEAT.get(0).map_or(0, |beat| beat.beat_ns)
}

/// The last heartbeat in ticks.
#[inline(always)]
pub fn beat_tick() -> u32 {
    tick(beat_ns())
}

/// Whether some service may have flows that leave the stack out.
#[inline(always)]
pub fn any_fast() -> bool {
    HEARTBEAT.get(0).is_some_and(|beat| beat.fast != 0)
}

/// Whether some service counts connections, so that the end of the node's own sockets matters.
#[inline(always)]
pub fn counts_sockets() -> bool {
    HEARTBEAT.get(0).is_some_and(|beat| beat.counts_sockets != 0)
}

/// A time in ticks.
#[inline(always)]
pub fn tick(ns: u64) -> u32 {
    (ns >> TICK_SHIFT) as u32
}

/// Whether the agent's last decision may still be acted on.
#[inline(always)]
pub fn decision_holds(switch: &Switch<u8>, now_ns: u64) -> bool {
    switch.has(switch_flags::HOLD) || is_heard(now_ns)
}

/// Whether the agent has given a sign of life within its lease.
#[inline(always)]
pub fn is_heard(now_ns: u64) -> bool {
    match HEARTBEAT.get(0) {
        Some(beat) => beat.lease_ns == 0 || now_ns.saturating_sub(beat.beat_ns) <= beat.lease_ns,
        None => true,
    }
}
