//! Atomic operations on map values. For this target `core::sync::atomic` offers no read-modify-write operations,
//! but the intrinsics behind it work (BPF_ATOMIC instructions, target-cpu v3).

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or, atomic_xadd, atomic_xsub};

/// Replaces `*at` by `new` if it equals `old`. Returns whether it did.
///
/// # Safety
/// `at` points to a live, aligned map value that nobody accesses without atomics.
#[inline(always)]
pub unsafe fn compare_exchange(at: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
}

/// [`compare_exchange`] for 32 bits.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn compare_exchange32(at: *mut u32, old: u32, new: u32) -> bool {
    // SAFETY: the caller's promise.
    unsafe { atomic_cxchg::<u32, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
}

/// Adds one to `*at`.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn increment(at: *mut u32) {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(at, 1) };
}

/// [`increment`] for 64 bits.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn increment64(at: *mut u64) {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::SeqCst }>(at, 1) };
}

/// Subtracts one from `*at`.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn decrement(at: *mut u32) {
    // SAFETY: the caller's promise.
    unsafe { atomic_xsub::<u32, u32, { AtomicOrdering::SeqCst }>(at, 1) };
}

/// Sets bits in `*at`, a 32-bit word.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn or(at: *mut u32, bits: u32) {
    // SAFETY: the caller's promise.
    unsafe { atomic_or::<u32, u32, { AtomicOrdering::SeqCst }>(at, bits) };
}

/// Sets bits in `*at`, a 64-bit word.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn or64(at: *mut u64, bits: u64) {
    // SAFETY: the caller's promise.
    unsafe { atomic_or::<u64, u64, { AtomicOrdering::SeqCst }>(at, bits) };
}

/// Reads a 64-bit word in one access, which the compiler may neither split nor repeat.
///
/// # Safety
/// `at` points to a live, aligned map value.
#[inline(always)]
pub unsafe fn load(at: *const u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::read_volatile(at) }
}

/// [`load`] for 32 bits.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
pub unsafe fn load32(at: *const u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::read_volatile(at) }
}
