//! Places that are found by a tag: see [`breaker_common::Bucket`].
//!
//! A tag has two buckets, and a new one takes the first free place in either. With half of all places taken, one in a
//! million finds none.
//!
//! Eight tags are compared without a jump: the verifier follows every way through the jumps of a program, and for each of
//! them all that comes behind.

use core::arch::asm;

use breaker_common::{Bucket, WAYS};

use crate::atomic;

/// The highest bit of a word. Not a mere shift, of which the compiler makes a jump. Nor may it change the order of these, or
/// it would do eight at a time, for which there are no registers.
#[inline(always)]
pub fn highest(word: u64) -> u64 {
    let bit: u64;
    // SAFETY: arithmetic on one register.
    unsafe { asm!("{0} >>= 63", inout(reg) word => bit, options(nostack)) };
    bit
}

/// 1 if two words differ, else 0. Not `!=`, of which the compiler makes a jump: this target has no other instruction for it.
#[inline(always)]
fn differs(a: u64, b: u64) -> u64 {
    let difference = a ^ b;
    // Of a number that is not 0, it or its negative has the highest bit.
    highest(difference | difference.wrapping_neg())
}

/// A bit for each place whose tag is `tag`.
#[inline(always)]
fn with_tag<S>(bucket: *mut Bucket<S>, tag: u64) -> u64 {
    let mut found = 0;
    for way in 0..WAYS {
        // SAFETY: the caller has the bucket from its map; the place is inside.
        let other = unsafe { atomic::load(&raw const (*bucket).tags[way]) };
        found |= (1 - differs(other, tag)) << way;
    }
    found
}

/// A bit for each place whose state makes it free: `free` returns 1 for those, else 0.
#[inline(always)]
pub fn where_free<S>(bucket: *mut Bucket<S>, free: impl Fn(*mut S) -> u64) -> u64 {
    let mut found = 0;
    for way in 0..WAYS {
        // SAFETY: as above.
        found |= free(unsafe { &raw mut (*bucket).states[way] }) << way;
    }
    found
}

/// 1 if a word is 0, else 0, without a jump.
#[inline(always)]
pub fn is_zero(word: u64) -> u64 {
    1 - differs(word, 0)
}

/// The lowest bit that is set, of eight: by a de Bruijn sequence, as there is no instruction for it.
#[inline(always)]
fn lowest(bits: u64) -> usize {
    let alone = bits & bits.wrapping_neg();
    let at = ((alone * 0x17) & 0xff) >> 5;
    ((0x5637_4210_u64 >> (at * 4)) & 7) as usize
}

/// Indices of a tag's two buckets; `mask` is the number of buckets, a power of two, less 1.
#[inline(always)]
pub fn of_tag(tag: u64, mask: u32) -> [u32; 2] {
    let first = (tag >> 8) as u32 & mask;
    [first, (first ^ ((tag >> 36) as u32 | 1)) & mask]
}

/// The place with a tag, in one bucket.
#[inline(always)]
pub fn find<S>(bucket: *mut Bucket<S>, tag: u64) -> Option<usize> {
    let found = with_tag(bucket, tag);
    if found == 0 { None } else { Some(lowest(found)) }
}

/// Claims one of the places of `candidates` (a bit for each) for a tag, or a free one. A place that another CPU was faster at
/// is left to it, and one more is tried.
#[inline(always)]
pub fn claim<S>(bucket: *mut Bucket<S>, tag: u64, candidates: u64) -> Option<usize> {
    let mut left = with_tag(bucket, 0) | candidates;
    for _ in 0..2 {
        if left == 0 {
            return None;
        }
        let way = lowest(left);
        // SAFETY: the caller has the bucket from its map; the place is inside; tags are only changed by atomics.
        unsafe {
            let at = &raw mut (*bucket).tags[way];
            let before = atomic::load(at);
            if atomic::compare_exchange(at, before, tag) {
                return Some(way);
            }
        }
        left &= left - 1;
    }
    None
}

/// Frees a place.
#[inline(always)]
pub fn free<S>(bucket: *mut Bucket<S>, way: usize) {
    // SAFETY: as above.
    unsafe { (&raw mut (*bucket).tags[way & (WAYS - 1)]).write_volatile(0) };
}
