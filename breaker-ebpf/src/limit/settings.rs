//! The configured limits of each service, and its counters.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap},
    macros::btf_map,
};
use breaker_common::{DEFAULT_SERVICES, LimitCounters, ServiceLimits, TierLimits};

use crate::atomic;

const SERVICES: usize = DEFAULT_SERVICES as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

/// The configured limits of each service. Written by the agent.
#[btf_map]
static LIMITS: Array<ServiceLimits, SERVICES, MMAPABLE> = Array::new();

/// Counters of each service's limits. The agent adds the entry of a service that has limits. All CPUs share it, as they
/// share the limits; see `count::MORE_COUNTERS` on per-CPU hashes.
#[btf_map]
static LIMIT_COUNTERS: HashMap<u32, LimitCounters, SERVICES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Index of the primary in [`ServiceLimits::tiers`]; also the offset of its limiter from twice the service's index.
pub const PRIMARY: u32 = 0;
/// Index of the backup; see [`PRIMARY`].
pub const BACKUP: u32 = 1;

/// Returns the limits of a service.
#[inline(always)]
pub fn limits_of(service: u32) -> Option<&'static ServiceLimits> {
    LIMITS.get(service)
}

/// Selects the limits of a tier: [`PRIMARY`] or [`BACKUP`].
#[inline(always)]
pub fn tier_limits(limits: &ServiceLimits, tier: u32) -> &TierLimits {
    if tier == PRIMARY { &limits.tiers[0] } else { &limits.tiers[1] }
}

/// Adds one to the counter of a service's limits that `counter` selects.
#[inline(always)]
pub fn count(service: u32, counter: impl FnOnce(&mut LimitCounters) -> &mut u64) {
    if let Some(counters) = LIMIT_COUNTERS.get_ptr_mut(service) {
        // SAFETY: the kernel returned a pointer to the value, whose counters all programs change by atomics.
        unsafe { atomic::increment64(counter(&mut *counters)) };
    }
}

/// Selects the counter of a tier and of the limit with the number `kind` (a [`breaker_common::LimitKind`]).
#[inline(always)]
pub fn counter_of(counters: &mut [[u64; 4]; 2], tier: u32, kind: u32) -> &mut u64 {
    let tier = if tier == PRIMARY { &mut counters[0] } else { &mut counters[1] };
    &mut tier[kind as usize & 3]
}
