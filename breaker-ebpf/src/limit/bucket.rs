//! Places that are found by a tag: see [`breaker_common::Bucket`].
//!
//! A tag has two buckets, and a new one takes the first free place in either. With half of all places taken, one in a
//! million finds none.
//!
//! These loops have a way out at every place, and the verifier follows each with all that comes behind. So they are called
//! from global functions that do little else, and that return the number of a place.

use breaker_common::{Bucket, WAYS};

use crate::atomic;

/// Indices of a tag's two buckets; `mask` is the number of buckets, a power of two, less 1.
#[inline(always)]
pub fn of_tag(tag: u64, mask: u32) -> [u32; 2] {
    let first = (tag >> 8) as u32 & mask;
    [first, (first ^ ((tag >> 36) as u32 | 1)) & mask]
}

/// The number of a place plus 1; 0 stands for none.
#[inline(always)]
pub fn number(bucket: u32, way: usize) -> u32 {
    bucket * WAYS as u32 + way as u32 + 1
}

/// The bucket and the place that a [`number`] stands for.
#[inline(always)]
pub fn of_number(number: u32) -> Option<(u32, usize)> {
    let place = number.checked_sub(1)?;
    Some((place / WAYS as u32, place as usize & (WAYS - 1)))
}

/// The place with a tag, in one bucket.
#[inline(always)]
pub fn find<S>(bucket: *mut Bucket<S>, tag: u64) -> Option<usize> {
    // SAFETY: the caller has the bucket from its map; the place is inside.
    (0..WAYS).find(|way| unsafe { atomic::load(&raw const (*bucket).tags[*way]) } == tag)
}

/// Claims a free place for a tag. One that another CPU was faster at is left to it.
#[inline(always)]
pub fn claim<S>(bucket: *mut Bucket<S>, tag: u64) -> Option<usize> {
    for way in 0..WAYS {
        // SAFETY: as above; tags are only changed by atomics.
        unsafe {
            let at = &raw mut (*bucket).tags[way];
            if atomic::load(at) == 0 && atomic::compare_exchange(at, 0, tag) {
                return Some(way);
            }
        }
    }
    None
}

/// Claims a place whose state says that it may be taken from whoever has it, beginning with place `from`.
#[inline(always)]
pub fn displace<S>(bucket: *mut Bucket<S>, tag: u64, from: usize, may_go: impl Fn(*const S) -> bool) -> Option<usize> {
    for step in 0..WAYS {
        let way = (from + step) & (WAYS - 1);
        // SAFETY: as above.
        unsafe {
            let at = &raw mut (*bucket).tags[way];
            let before = atomic::load(at);
            if may_go(&raw const (*bucket).states[way]) && atomic::compare_exchange(at, before, tag) {
                return Some(way);
            }
        }
    }
    None
}

/// Frees a place.
#[inline(always)]
pub fn free<S>(bucket: *mut Bucket<S>, way: usize) {
    // SAFETY: as above.
    unsafe { (&raw mut (*bucket).tags[way & (WAYS - 1)]).write_volatile(0) };
}
