//! Counters. Userspace adds up those of the CPUs.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{HashMap, PerCpuArray},
    macros::btf_map,
};
use breaker_common::{DEFAULT_SERVICES, PassReason, ServiceCounters};

use crate::atomic;

/// Counters of the services with the lowest indices, index = service. Nearly every packet to a backup is counted, and an
/// array costs a tenth of a hash. Its memory is taken for every possible CPU, so the loader bounds its size.
#[btf_map]
static COUNTERS: PerCpuArray<ServiceCounters, { DEFAULT_SERVICES as usize }> = PerCpuArray::new();

/// Counters of the other services, key = index of the service. The agent adds a service's entry. All CPUs share it: a
/// per-CPU hash without preallocation takes four values for each pair of possible CPUs when it is created (kernel,
/// kernel/bpf/memalloc.c, `prefill_mem_cache`).
#[btf_map]
static MORE_COUNTERS: HashMap<u32, ServiceCounters, { DEFAULT_SERVICES as usize }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// Number of times that each [`PassReason`] occurred, index = reason.
#[btf_map]
static REASONS: PerCpuArray<u64, { PassReason::ALL.len() }> = PerCpuArray::new();

/// Adds one to the counter of a service that `counter` selects. An index without a service, such as `NONE`, is ignored.
#[inline(always)]
pub fn service(service: u32, counter: impl Fn(&mut ServiceCounters) -> &mut u64) {
    if let Some(own) = COUNTERS.get_ptr_mut(service) {
        // SAFETY: the kernel returned a pointer to this CPU's value. A program that interrupts this one on the same
        // CPU can at worst make it lose an increment.
        *counter(unsafe { &mut *own }) += 1;
    } else if let Some(shared) = MORE_COUNTERS.get_ptr_mut(service) {
        // SAFETY: the kernel returned a pointer to the value, whose counters all programs change by atomics.
        unsafe { atomic::increment64(counter(&mut *shared)) };
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
