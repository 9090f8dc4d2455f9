//! The filter that most packets' way ends at: a bit for every endpoint, which several may share.
//!
//! A bit that is missing would make the programs pass an endpoint's packets by, so it is set before its endpoint is there
//! and cleared after; one too many costs a look-up.

use std::{collections::HashMap, sync::atomic::Ordering};

use breaker_common::{Address, EndpointKey, FILTER_WORDS, filter_bit};

use super::mmap::SharedArray;

/// A bit's place.
pub(super) type Bit = (u32, u64);

/// See the module.
#[derive(Debug)]
pub(super) struct Filter {
    words: SharedArray,
    /// How many endpoints have a bit.
    endpoints: HashMap<Bit, u32>,
}

/// The bit of an endpoint.
pub(super) fn bit_of<A: Address>(key: &EndpointKey<A>) -> Bit {
    filter_bit(key.addr, key.port, key.proto)
}

impl Filter {
    /// As it is in the map, until it is adopted.
    pub(super) fn new(words: SharedArray) -> Self {
        Self { words, endpoints: HashMap::new() }
    }

    /// Takes over what is there after a restart: bits of endpoints that never came, or that went as the agent died, are cleared.
    /// `bits`: of all endpoints that are there.
    pub(super) fn adopt(&mut self, bits: &[Bit]) {
        let mut words = vec![0; FILTER_WORDS as usize];
        self.endpoints.clear();
        for (word, bit) in bits {
            words[*word as usize] |= bit;
            *self.endpoints.entry((*word, *bit)).or_default() += 1;
        }
        for (index, word) in (0..).zip(words) {
            self.words.store(index, 0, word);
        }
    }

    /// Before an endpoint is there.
    pub(super) fn add<A: Address>(&mut self, key: &EndpointKey<A>) {
        let (word, bit) = bit_of(key);
        *self.endpoints.entry((word, bit)).or_default() += 1;
        self.words.word(word, 0).fetch_or(bit, Ordering::SeqCst);
    }

    /// After an endpoint is gone.
    pub(super) fn remove<A: Address>(&mut self, key: &EndpointKey<A>) {
        let (word, bit) = bit_of(key);
        let Some(count) = self.endpoints.get_mut(&(word, bit)) else { return };
        *count -= 1;
        if *count == 0 {
            self.endpoints.remove(&(word, bit));
            self.words.word(word, 0).fetch_and(!bit, Ordering::SeqCst);
        }
    }
}
