//! What an address is to us. Most packets' addresses are nothing: a filter says so at a tenth of what the look-up costs.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{EndpointKey, EndpointRole, FILTER_WORDS, NONE, filter_bit};

use crate::family::Family;

/// A bit for every endpoint that there is, which others may share (a Bloom filter of one hash). The agent has it in its
/// memory, sets a bit before the endpoint is there, and clears it when it is gone.
#[btf_map]
static FILTER: Array<u64, { FILTER_WORDS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// Whether an address and port (wire order) may have a role under a protocol; without one it is false for nearly all.
#[inline(always)]
fn may_be<A: Family>(addr: A, port: [u8; 2], proto: u8) -> bool {
    let (word, bit) = filter_bit(addr, port, proto);
    FILTER.get(word).is_some_and(|word| *word & bit != 0)
}

/// The role of an address and port (wire order) under a protocol, if it has one.
#[inline(always)]
pub fn find<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Option<EndpointRole> {
    if !may_be(addr, port, proto) {
        return None;
    }
    let key = EndpointKey::new(addr, port, proto);
    // SAFETY: the value is copied out at once. An entry that is replaced meanwhile shows its old or its new fields:
    // both index existing places, and the next packet sees the new ones.
    unsafe { A::endpoints().get(key) }.copied()
}

/// The index behind a field of a role.
#[inline(always)]
pub fn index(field: u32) -> Option<u32> {
    if field == NONE { None } else { Some(field) }
}
