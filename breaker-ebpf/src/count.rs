//! Counters, one set for each CPU. Userspace adds them up.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{PerCpuArray, PerCpuHashMap},
    macros::btf_map,
};
use breaker_common::{DEFAULT_SERVICES, PassReason, ServiceCounters};

/// Counters of the services with the lowest indices, index = service. Nearly every packet to a backup is counted, and an
/// array costs a tenth of a hash. Its memory is taken for every possible CPU, so the loader bounds its size.
#[btf_map]
static COUNTERS: PerCpuArray<ServiceCounters, { DEFAULT_SERVICES as usize }> = PerCpuArray::new();

/// Counters of the other services, key = index of the service. The agent adds a service's entry.
#[btf_map]
static MORE_COUNTERS: PerCpuHashMap<
    u32,
    ServiceCounters,
    { DEFAULT_SERVICES as usize },
    { BPF_F_NO_PREALLOC as usize },
> = PerCpuHashMap::new();

/// Number of times that each [`PassReason`] occurred, index = reason.
#[btf_map]
static REASONS: PerCpuArray<u64, { PassReason::ALL.len() }> = PerCpuArray::new();

/// Applies `change` to this CPU's counters of a service. An index without a service, such as `NONE`, is ignored.
#[inline(always)]
pub fn service(service: u32, change: impl FnOnce(&mut ServiceCounters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(service).or_else(|| MORE_COUNTERS.get_ptr_mut(service)) {
        // SAFETY: the kernel returned a pointer to this CPU's value. A program that interrupts this one on the same
        // CPU can at worst make it lose an increment.
        change(unsafe { &mut *counters });
    }
}

/// Counts a reason: a packet failed open, or something could not be recorded.
#[inline(always)]
pub fn reason(reason: PassReason) {
    if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: as in `service`.
        unsafe { *count += 1 };
    }
}
