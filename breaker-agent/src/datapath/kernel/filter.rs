//! The filter that most packets' way ends at: two bits for every endpoint, which several may share.
//!
//! *Present*: a bit that is missing would make the programs pass an endpoint's packets by, so it is set before its endpoint is
//! there and cleared after; one too many costs a look-up. *Tracked*: flows to it are looked for; one that is missing, or too many,
//! costs a look-up.

use std::{
    collections::HashMap,
    mem::offset_of,
    sync::atomic::{AtomicU64, Ordering},
};

use breaker_common::{Address, EndpointKey, FILTER_WORDS, FilterWords, filter_bit};

use super::mmap::SharedArray;

/// A bit's place.
pub(super) type Bit = (u32, u64);

/// See the module.
#[derive(Debug)]
pub(super) struct Filter {
    words: SharedArray,
    /// How many endpoints have a bit.
    present: HashMap<Bit, u32>,
    /// The same of frontends that are tracked.
    tracked: HashMap<Bit, u32>,
}

/// The bit of an endpoint.
pub(super) fn bit_of<A: Address>(key: &EndpointKey<A>) -> Bit {
    filter_bit(key.addr, key.port, key.proto)
}

impl Filter {
    /// As it is in the map, until it is adopted.
    pub(super) fn new(words: SharedArray) -> Self {
        Self { words, present: HashMap::new(), tracked: HashMap::new() }
    }

    /// Takes over what is there after a restart: bits of endpoints that never came, or that went as the agent died, are cleared.
    /// `bits`: of all endpoints that are there. None is tracked until it is said anew.
    pub(super) fn adopt(&mut self, bits: &[Bit]) {
        let mut words = vec![0; FILTER_WORDS as usize];
        (self.present, self.tracked) = (HashMap::new(), HashMap::new());
        for (word, bit) in bits {
            words[*word as usize] |= bit;
            *self.present.entry((*word, *bit)).or_default() += 1;
        }
        for (index, word) in (0..).zip(words) {
            self.words.store(index, offset_of!(FilterWords, present), word);
            self.words.store(index, offset_of!(FilterWords, tracked), 0);
        }
    }

    /// Before an endpoint is there.
    pub(super) fn add(&mut self, bit: Bit) {
        set(&mut self.present, bit, self.words.word(bit.0, offset_of!(FilterWords, present)));
    }

    /// After an endpoint is gone.
    pub(super) fn remove(&mut self, bit: Bit) {
        clear(&mut self.present, bit, self.words.word(bit.0, offset_of!(FilterWords, present)));
    }

    /// A frontend's flows are looked for.
    pub(super) fn track(&mut self, bit: Bit) {
        set(&mut self.tracked, bit, self.words.word(bit.0, offset_of!(FilterWords, tracked)));
    }

    /// They are not any more.
    pub(super) fn untrack(&mut self, bit: Bit) {
        clear(&mut self.tracked, bit, self.words.word(bit.0, offset_of!(FilterWords, tracked)));
    }
}

/// Counts one more that has a bit.
fn set(counts: &mut HashMap<Bit, u32>, bit: Bit, word: &AtomicU64) {
    *counts.entry(bit).or_default() += 1;
    word.fetch_or(bit.1, Ordering::SeqCst);
}

/// Counts one less; with the last the bit goes.
fn clear(counts: &mut HashMap<Bit, u32>, bit: Bit, word: &AtomicU64) {
    let Some(count) = counts.get_mut(&bit) else { return };
    *count -= 1;
    if *count == 0 {
        counts.remove(&bit);
        word.fetch_and(!bit.1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two endpoints may share a bit: it stays until both are gone.
    #[test]
    fn a_shared_bit_stays_for_the_other() {
        let (mut counts, word, shared) = (HashMap::new(), AtomicU64::new(0b1), (7, 0b100));
        set(&mut counts, shared, &word);
        set(&mut counts, shared, &word);
        clear(&mut counts, shared, &word);
        assert_eq!(word.load(Ordering::SeqCst), 0b101);
        clear(&mut counts, shared, &word);
        clear(&mut counts, shared, &word);
        assert_eq!((word.load(Ordering::SeqCst), counts.len()), (0b1, 0));
    }
}
