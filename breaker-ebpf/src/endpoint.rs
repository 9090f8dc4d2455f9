//! The role of an address and port. Most have none; the filter shows this at a tenth of the cost of the look-up.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{COUNTED, EndpointKey, EndpointRole, FILTER_WORDS, FilterWords, NONE, PROTO_TCP, filter_bit};

use crate::{atomic, family::Family};

/// Bits for every endpoint, which other endpoints may share: Bloom filters with one hash function. The agent maps
/// the array into its memory. It sets a bit before the fact that the bit stands for becomes true, and clears the
/// bit after the fact has ended.
#[btf_map]
static FILTER: Array<FilterWords, { FILTER_WORDS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The filter's answer for an address and port. A set bit may be a false positive; a clear bit is certain.
#[derive(Clone, Copy)]
pub struct FilterMatch {
    /// Possibly a frontend: packets that may be the first of a flow take the full path.
    pub frontend: bool,
    /// All packets take the full path. Set for backends and for frontends of services with tracked flows. Clear for
    /// services that are closed and idle (no tracked flows), and, up to hash collisions, for every other address.
    pub all_packets: bool,
}

impl FilterMatch {
    /// Whether a packet takes the full path. `may_start_flow`: it may be the first of its flow.
    #[inline(always)]
    pub fn matches(self, may_start_flow: bool) -> bool {
        self.all_packets || self.frontend && may_start_flow
    }
}

/// Looks up an address, port (both in wire order) and protocol in the filter.
#[inline(always)]
pub fn filter_match<A: Family>(addr: A, port: [u8; 2], proto: u8) -> FilterMatch {
    let (word_index, bit) = filter_bit(addr, port, proto);
    FILTER.get(word_index).map_or(FilterMatch { frontend: false, all_packets: false }, |words| FilterMatch {
        frontend: words.frontend & bit != 0,
        all_packets: words.all_packets & bit != 0,
    })
}

/// Whether an address and port (wire order) may be a TCP frontend of a service that counts connections. Its packets
/// with SYN, FIN or RST then take the full path, in both directions.
#[inline(always)]
pub fn may_count_connections<A: Family>(addr: A, port: [u8; 2]) -> bool {
    filter_match(addr, port, PROTO_TCP | COUNTED).frontend
}

/// Sets the filter's bit `all_packets` for an address and port (wire order): all their packets take the full path from
/// now on. The agent clears the bit when no flow needs it any more.
#[inline(always)]
pub fn set_all_packets_bit<A: Family>(addr: A, port: [u8; 2], proto: u8) {
    let (word_index, bit) = filter_bit(addr, port, proto);
    let Some(words) = FILTER.get_ptr_mut(word_index) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field has 8 bytes and is aligned.
    unsafe {
        let at = &raw mut (*words).all_packets;
        // Writing only on a change keeps the cache line shared between CPUs.
        if atomic::load(at) & bit == 0 {
            atomic::or64(at, bit);
        }
    }
}

/// The role of an address and port (wire order) under a protocol, if it has one. Asks the filter first.
#[inline(always)]
pub fn find<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Option<EndpointRole> {
    let filter_match = filter_match(addr, port, proto);
    if filter_match.frontend || filter_match.all_packets { look_up(addr, port, proto) } else { None }
}

/// As [`find`], for a caller that has already asked the filter.
#[inline(always)]
pub fn look_up<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Option<EndpointRole> {
    let key = EndpointKey::new(addr, port, proto);
    // SAFETY: the value is copied out at once. If the agent replaces the entry meanwhile, each field is the old or
    // the new one: both are valid indices, and the next packet reads the new ones.
    unsafe { A::endpoints().get(key) }.copied()
}

/// The index in a field of a role; `None` for [`NONE`].
#[inline(always)]
pub fn index(field: u32) -> Option<u32> {
    if field == NONE { None } else { Some(field) }
}
