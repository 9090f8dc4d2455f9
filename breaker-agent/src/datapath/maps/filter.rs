//! The filter that lets the prefilter pass most packets: two bits for every endpoint, and a third one for a frontend
//! whose service counts connections. Several endpoints may share a bit.
//!
//! If a bit were missing, the programs would pass packets that need the full path. Therefore the agent sets a bit
//! before the endpoint is in the maps, and clears it after the endpoint is gone. A bit too many only costs a
//! look-up.

use std::{
    collections::HashMap,
    mem::offset_of,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use breaker_common::{
    Address, COUNTED, EndpointKey, EndpointRole, FILTER_WORDS, FilterWords, NONE, V4, V6, filter_bit,
};
use breaker_core::model::Frontend;

use super::{family::number, mmap::SharedArray};

/// Position of a bit: the index of its word in `FILTER`, and the mask of the bit in that word.
pub(crate) type BitPosition = (u32, u64);

/// Meaning of a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FilterBit {
    /// A frontend is at this position, see [`FilterWords::frontend`]; at a [`counted_position`], a frontend whose
    /// service counts connections.
    Frontend,
    /// All packets to or from the endpoint take the full path, see [`FilterWords::all_packets`].
    AllPackets,
}

impl FilterBit {
    const fn offset(self) -> usize {
        match self {
            Self::Frontend => offset_of!(FilterWords, frontend),
            Self::AllPackets => offset_of!(FilterWords, all_packets),
        }
    }
}

/// The map `FILTER`, and how many users each of its bits has.
#[derive(Debug)]
pub(crate) struct Filter {
    words: SharedArray,
    /// Number of endpoints that use a bit. Bits that no endpoint uses are absent.
    counts: HashMap<(FilterBit, BitPosition), u32>,
}

/// Returns the bits that an endpoint needs because of its role alone. A frontend may need more, depending on its
/// service.
pub(crate) fn bits_for(role: &EndpointRole) -> impl Iterator<Item = FilterBit> + use<> {
    let frontend = (role.service != NONE).then_some(FilterBit::Frontend);
    frontend.into_iter().chain((role.backend != NONE).then_some(FilterBit::AllPackets))
}

/// Returns the position of an endpoint's bit.
pub(crate) fn position_of<A: Address>(key: &EndpointKey<A>) -> BitPosition {
    filter_bit(key.addr, key.port, key.proto)
}

/// Returns the position of a frontend's bit.
pub(crate) fn frontend_position(frontend: &Frontend) -> BitPosition {
    position_with(frontend, number(frontend.protocol))
}

/// Returns the position of a frontend's second bit, which is set if its service counts connections ([`COUNTED`]).
pub(crate) fn counted_position(frontend: &Frontend) -> BitPosition {
    position_with(frontend, number(frontend.protocol) | COUNTED)
}

fn position_with(frontend: &Frontend, proto: u8) -> BitPosition {
    let port = frontend.address.port().to_be_bytes();
    match frontend.address {
        SocketAddr::V4(v4) => position_of(&EndpointKey::new(V4::new(v4.ip().octets()), port, proto)),
        SocketAddr::V6(v6) => position_of(&EndpointKey::new(V6::new(v6.ip().octets()), port, proto)),
    }
}

impl Filter {
    /// Takes over the map with the bits that are set in it. They stay set until [`Filter::rebuild`].
    pub(crate) fn new(words: SharedArray) -> Self {
        Self { words, counts: HashMap::new() }
    }

    /// Adds a user of a bit and sets the bit. Call it before the reason for the bit is visible in other maps.
    pub(crate) fn add(&mut self, bit: FilterBit, at: BitPosition) {
        set(&mut self.counts, (bit, at), self.words.word(at.0, bit.offset()));
    }

    /// Removes a user of a bit; the last one clears the bit. Call it after the reason for the bit is gone from
    /// other maps.
    pub(crate) fn remove(&mut self, bit: FilterBit, at: BitPosition) {
        clear(&mut self.counts, (bit, at), self.words.word(at.0, bit.offset()));
    }

    /// Clears the bits that have no user. An agent that has restarted calls this after it has added all bits that
    /// are needed: the earlier agent may have died before it wrote an endpoint, or before it cleared the bit of one
    /// that it removed.
    pub(crate) fn rebuild(&self) {
        for bit in [FilterBit::Frontend, FilterBit::AllPackets] {
            let mut words = vec![0; FILTER_WORDS as usize];
            for (_, (word, mask)) in self.counts.keys().filter(|(counted, _)| *counted == bit) {
                words[*word as usize] |= mask;
            }
            for (index, word) in (0..).zip(words) {
                self.words.store(index, bit.offset(), word);
            }
        }
    }
}

/// Adds a user to the count of a bit, and sets the bit in its word.
fn set(counts: &mut HashMap<(FilterBit, BitPosition), u32>, key: (FilterBit, BitPosition), word: &AtomicU64) {
    *counts.entry(key).or_default() += 1;
    word.fetch_or(key.1.1, Ordering::SeqCst);
}

/// Removes a user from the count of a bit. The last one clears the bit in its word.
fn clear(counts: &mut HashMap<(FilterBit, BitPosition), u32>, key: (FilterBit, BitPosition), word: &AtomicU64) {
    let Some(count) = counts.get_mut(&key) else { return };
    *count -= 1;
    if *count == 0 {
        counts.remove(&key);
        word.fetch_and(!key.1.1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two endpoints may share a bit: it stays until both are gone.
    #[test]
    fn a_shared_bit_stays_for_the_other() {
        let (mut counts, word, shared) = (HashMap::new(), AtomicU64::new(0b1), (FilterBit::AllPackets, (7, 0b100)));
        set(&mut counts, shared, &word);
        set(&mut counts, shared, &word);
        clear(&mut counts, shared, &word);
        assert_eq!(word.load(Ordering::SeqCst), 0b101);
        clear(&mut counts, shared, &word);
        clear(&mut counts, shared, &word);
        assert_eq!((word.load(Ordering::SeqCst), counts.len()), (0b1, 0));
    }
}
