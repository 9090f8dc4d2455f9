//! Compare-and-swap and friends. `core::sync::atomic` offers no read-modify-write for this target, the intrinsics
//! behind it do (BPF_ATOMIC instructions, target-cpu v3).

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_or};

/// Replaces `*at` by `new` if it is `old`.
///
/// # Safety
/// `at` points to a live, aligned map value that nobody accesses without atomics.
#[inline(always)]
pub unsafe fn compare_exchange(at: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's promise.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
}

/// Sets bits in `*at`.
///
/// # Safety
/// As for [`compare_exchange`].
#[inline(always)]
pub unsafe fn or(at: *mut u32, bits: u32) {
    // SAFETY: the caller's promise.
    unsafe { atomic_or::<u32, u32, { AtomicOrdering::SeqCst }>(at, bits) };
}

/// Reads a word at once; the compiler may not split or repeat it.
///
/// # Safety
/// `at` points to a live, aligned map value.
#[inline(always)]
pub unsafe fn load(at: *const u64) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::read_volatile(at) }
}
