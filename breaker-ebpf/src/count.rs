//! Counters, per CPU: userspace sums them up.

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use breaker_common::{DEFAULT_SERVICES, PassReason, ServiceCounters};

/// Per service.
#[btf_map]
static COUNTERS: PerCpuArray<ServiceCounters, { DEFAULT_SERVICES as usize }> = PerCpuArray::new();

/// Packets that failed open, index = [`PassReason`].
#[btf_map]
static REASONS: PerCpuArray<u64, { PassReason::ALL.len() }> = PerCpuArray::new();

/// Changes a service's counters.
#[inline(always)]
pub fn service(service: u32, change: impl FnOnce(&mut ServiceCounters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(service) {
        // SAFETY: the kernel returned a pointer to this CPU's value; programs of this type do not preempt each other
        // on one CPU in a way that matters to a counter.
        change(unsafe { &mut *counters });
    }
}

/// Counts a packet that failed open.
#[inline(always)]
pub fn reason(reason: PassReason) {
    if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: as above.
        unsafe { *count += 1 };
    }
}
