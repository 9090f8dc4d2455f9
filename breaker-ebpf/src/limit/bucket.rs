//! Hash buckets whose entries are found by a tag: see [`breaker_common::Bucket`].
//!
//! A tag has two candidate buckets and gets the first free entry in either. With half of all entries in use, about
//! one tag in a million finds no free entry.
//!
//! The loops below can exit at every entry, and the verifier explores the code that follows for each exit. They are
//! therefore called from small global functions that return the number of an entry.

use breaker_common::{Bucket, WAYS};

use crate::atomic;

/// Indexes of a tag's two buckets. `mask` is the number of buckets, a power of two, minus 1.
#[inline(always)]
pub fn of_tag(tag: u64, mask: u32) -> [u32; 2] {
    let first = (tag >> 8) as u32 & mask;
    [first, (first ^ ((tag >> 36) as u32 | 1)) & mask]
}

/// Number of an entry: its index over all buckets, plus 1. 0 stands for "no entry".
#[inline(always)]
pub fn number(bucket: u32, way: usize) -> u32 {
    bucket * WAYS as u32 + way as u32 + 1
}

/// Bucket index and index in the bucket of the entry with a [`number`]; `None` for 0.
#[inline(always)]
pub fn of_number(number: u32) -> Option<(u32, usize)> {
    let entry = number.checked_sub(1)?;
    Some((entry / WAYS as u32, entry as usize & (WAYS - 1)))
}

/// Finds the entry with a tag in one bucket and returns its index in the bucket.
#[inline(always)]
pub fn find<S>(bucket: *mut Bucket<S>, tag: u64) -> Option<usize> {
    // SAFETY: the caller got the bucket from its map, and `way` is in bounds.
    (0..WAYS).find(|way| unsafe { atomic::load(&raw const (*bucket).tags[*way]) } == tag)
}

/// Claims a free entry for a tag. If another CPU claims the same entry first, the next free entry is tried.
#[inline(always)]
pub fn claim<S>(bucket: *mut Bucket<S>, tag: u64) -> Option<usize> {
    for way in 0..WAYS {
        // SAFETY: as in `find`; tags are changed by atomics only.
        unsafe {
            let at = &raw mut (*bucket).tags[way];
            if atomic::load(at) == 0 && atomic::compare_exchange(at, 0, tag) {
                return Some(way);
            }
        }
    }
    None
}

/// Takes over an entry whose state `is_replaceable` accepts, whoever owns it. The search begins at entry `from`.
#[inline(always)]
pub fn take_over<S>(
    bucket: *mut Bucket<S>,
    tag: u64,
    from: usize,
    is_replaceable: impl Fn(*const S) -> bool,
) -> Option<usize> {
    for step in 0..WAYS {
        let way = (from + step) & (WAYS - 1);
        // SAFETY: as in `claim`.
        unsafe {
            let at = &raw mut (*bucket).tags[way];
            let before = atomic::load(at);
            if is_replaceable(&raw const (*bucket).states[way]) && atomic::compare_exchange(at, before, tag) {
                return Some(way);
            }
        }
    }
    None
}

/// Frees an entry if it still has this tag: meanwhile, another CPU may have freed it and a third one claimed it.
#[inline(always)]
pub fn free<S>(bucket: *mut Bucket<S>, way: usize, tag: u64) {
    // SAFETY: as in `claim`.
    unsafe { atomic::compare_exchange(&raw mut (*bucket).tags[way & (WAYS - 1)], tag, 0) };
}
