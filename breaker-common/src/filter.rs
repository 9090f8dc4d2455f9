//! The prefilter's map: which endpoints may need the full path.

use crate::{addr::Address, addr::GOLDEN};

/// 64 bits of each of the prefilter's two bitmaps: value of `FILTER`.
///
/// Each bitmap is a Bloom filter with one hash function ([`filter_bit`]): a clear bit means that no endpoint at this
/// position has the property; a set bit means that one may have it. The agent sets a bit before the property becomes
/// true and clears it afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FilterWords {
    /// A frontend is at this position: packets that may start a flow (SYNs and all datagrams) take the full path.
    pub frontend: u64,
    /// All packets take the full path: a backend is at this position, or a frontend of a service whose flows are
    /// tracked ([`crate::switch_flags::TRACK`]).
    pub all_packets: u64,
}

/// Flag in the protocol number that is passed to [`filter_bit`]: gives the position of a frontend's second bit in
/// [`FilterWords::frontend`]. That bit is set if the frontend's service counts connections; the segments that start
/// and end connections (SYN, FIN, RST) then take the full path. No IP protocol that frontends use has this bit in
/// its number.
pub const COUNTED: u8 = 0x80;

/// Position of an endpoint's bit in `FILTER`: the index of the entry, and the bit as a mask.
///
/// `port` is in wire order. `proto` is the IP protocol number, with or without [`COUNTED`].
#[inline(always)]
#[must_use]
pub fn filter_bit<A: Address>(addr: A, port: [u8; 2], proto: u8) -> (u32, u64) {
    let rest = ((u16::from_ne_bytes(port) as u64) << 32) | ((proto as u64) << 48);
    let hash = (addr.folded() ^ rest).wrapping_mul(GOLDEN);
    ((hash >> (64 - crate::FILTER_WORDS.ilog2())) as u32, 1 << ((hash >> 32) & 63))
}
