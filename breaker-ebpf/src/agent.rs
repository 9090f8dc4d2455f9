//! The agent's heartbeat, and the clocks.

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE, btf_maps::Array, helpers::generated::bpf_ktime_get_coarse_ns, macros::btf_map,
};
use breaker_common::{Heartbeat, Switch, TICK_SHIFT, switch_flags};

/// Holds one value. The agent maps it into its memory and writes it there.
#[btf_map]
static HEARTBEAT: Array<Heartbeat, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Current time in ns, `CLOCK_MONOTONIC` as in the heartbeat. The resolution is a few milliseconds: this coarse
/// clock costs half as much as the fine one.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: no arguments, no side effects.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Time of the agent's last heartbeat, ns of `CLOCK_MONOTONIC`. Serves as a clock with a resolution of one second
/// that costs one array look-up.
#[inline(always)]
pub fn heartbeat_ns() -> u64 {
    HEARTBEAT.get(0).map_or(0, |beat| beat.beat_ns)
}

/// Time of the agent's last heartbeat in ticks (see [`TICK_SHIFT`]).
#[inline(always)]
pub fn heartbeat_tick() -> u32 {
    tick(heartbeat_ns())
}

/// Whether any service may have flows on the fast path, which bypasses the host network stack.
#[inline(always)]
pub fn fast_path_in_use() -> bool {
    HEARTBEAT.get(0).is_some_and(|beat| beat.fast != 0)
}

/// Whether any service limits concurrent connections. Then the programs must act when a socket of the node is closed.
#[inline(always)]
pub fn counts_sockets() -> bool {
    HEARTBEAT.get(0).is_some_and(|beat| beat.counts_sockets != 0)
}

/// Converts a time in ns to ticks (see [`TICK_SHIFT`]).
#[inline(always)]
pub fn tick(ns: u64) -> u32 {
    (ns >> TICK_SHIFT) as u32
}

/// Whether the programs may act on the agent's last decision: `onAgentLoss` is `Hold`, or the agent's lease is valid.
/// `now_ns`: see [`now_ns`].
#[inline(always)]
pub fn may_act_on_decision(switch: &Switch<u8>, now_ns: u64) -> bool {
    switch.has(switch_flags::HOLD) || lease_is_valid(now_ns)
}

/// Whether the agent's last heartbeat is within its lease. A lease of 0 never runs out.
#[inline(always)]
pub fn lease_is_valid(now_ns: u64) -> bool {
    match HEARTBEAT.get(0) {
        Some(beat) => beat.lease_ns == 0 || now_ns.saturating_sub(beat.beat_ns) <= beat.lease_ns,
        None => true,
    }
}
