//! What an address is to us. Most packets' addresses are nothing: a filter says so at a tenth of what the look-up costs.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use breaker_common::{COUNTED, EndpointKey, EndpointRole, FILTER_WORDS, FilterWords, NONE, PROTO_TCP, filter_bit};

use crate::{atomic, family::Family};

/// Bits for every endpoint that there is, which others may share (Bloom filters of one hash). The agent has it in its memory,
/// sets a bit before what it says is so, and clears it after.
#[btf_map]
static FILTER: Array<FilterWords, { FILTER_WORDS as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// What the filter says of an address and port.
#[derive(Clone, Copy)]
pub struct Guess {
    /// It may be a frontend: what may be the first packet of a flow to it counts.
    pub frontend: bool,
    /// Every packet counts: it may be a backend, or a frontend of a service whose flows are looked for. Not so for those of a
    /// service that is closed and settled, nor for nearly all that have no role.
    pub every: bool,
}

impl Guess {
    /// Whether a packet counts that may be the first of its flow, or not. Of a service that is closed and settled others do not.
    #[inline(always)]
    pub fn counts(self, may_begin: bool) -> bool {
        self.every || self.frontend && may_begin
    }
}

/// Asks the filter for an address and port (wire order) under a protocol.
#[inline(always)]
pub fn guess<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Guess {
    let (place, bit) = filter_bit(addr, port, proto);
    FILTER.get(place).map_or(Guess { frontend: false, every: false }, |words| Guess {
        frontend: words.frontend & bit != 0,
        every: words.every & bit != 0,
    })
}

/// Whether an address and port (wire order) may be a TCP frontend of a service that counts connections: then SYN, FIN and RST
/// count, both ways.
#[inline(always)]
pub fn is_counted<A: Family>(addr: A, port: [u8; 2]) -> bool {
    guess(addr, port, PROTO_TCP | COUNTED).frontend
}

/// Tells the filter that every packet to an address and port (wire order) counts from now on. The agent keeps the bit, or
/// clears it when no flow needs it any more.
#[inline(always)]
pub fn watch<A: Family>(addr: A, port: [u8; 2], proto: u8) {
    let (place, bit) = filter_bit(addr, port, proto);
    let Some(words) = FILTER.get_ptr_mut(place) else { return };
    // SAFETY: the kernel returned a pointer to a value of this map; the field is 8 bytes, aligned.
    unsafe {
        let at = &raw mut (*words).every;
        // Reading first keeps the cache line shared.
        if atomic::load(at) & bit == 0 {
            atomic::or64(at, bit);
        }
    }
}

/// The role of an address and port (wire order) under a protocol, if it has one.
#[inline(always)]
pub fn find<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Option<EndpointRole> {
    let guess = guess(addr, port, proto);
    if guess.frontend || guess.every { look_up(addr, port, proto) } else { None }
}

/// As [`find`], where the filter was asked already.
#[inline(always)]
pub fn look_up<A: Family>(addr: A, port: [u8; 2], proto: u8) -> Option<EndpointRole> {
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
