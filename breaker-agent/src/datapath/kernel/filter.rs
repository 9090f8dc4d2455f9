//! The filter that most packets' way ends at: two bits for every endpoint, which several may share.
//!
//! A bit that is missing would make the programs pass packets by that they should look at, so it is set before what it says is
//! so, and cleared after; one too many costs a look-up.

use std::{
    collections::HashMap,
    mem::offset_of,
    sync::atomic::{AtomicU64, Ordering},
};

use breaker_common::{Address, EndpointKey, EndpointRole, FILTER_WORDS, FilterWords, NONE, filter_bit};

use super::mmap::SharedArray;

/// A bit's place.
pub(super) type Bit = (u32, u64);

/// What a bit says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Says {
    /// [`FilterWords::frontend`].
    Frontend,
    /// [`FilterWords::every`].
    Every,
}

impl Says {
    const fn offset(self) -> usize {
        match self {
            Self::Frontend => offset_of!(FilterWords, frontend),
            Self::Every => offset_of!(FilterWords, every),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Filter {
    words: SharedArray,
    /// How many have a bit.
    counts: HashMap<(Says, Bit), u32>,
}

/// What its bit says of an endpoint by itself; of a frontend it may say more.
pub(super) fn said_of(role: &EndpointRole) -> impl Iterator<Item = Says> + use<> {
    let frontend = (role.service != NONE).then_some(Says::Frontend);
    frontend.into_iter().chain((role.backend != NONE).then_some(Says::Every))
}

/// The bit of an endpoint.
pub(super) fn bit_of<A: Address>(key: &EndpointKey<A>) -> Bit {
    filter_bit(key.addr, key.port, key.proto)
}

impl Filter {
    /// As it is in the map, until it is adopted.
    pub(super) fn new(words: SharedArray) -> Self {
        Self { words, counts: HashMap::new() }
    }

    /// Before it is so.
    pub(super) fn add(&mut self, says: Says, bit: Bit) {
        set(&mut self.counts, (says, bit), self.words.word(bit.0, says.offset()));
    }

    /// When it is so no more.
    pub(super) fn remove(&mut self, says: Says, bit: Bit) {
        clear(&mut self.counts, (says, bit), self.words.word(bit.0, says.offset()));
    }

    /// After a restart, when all that is so was added: bits of what never came, or went as the agent died, are cleared.
    pub(super) fn settle(&self) {
        for says in [Says::Frontend, Says::Every] {
            let mut words = vec![0; FILTER_WORDS as usize];
            for (_, (word, bit)) in self.counts.keys().filter(|(said, _)| *said == says) {
                words[*word as usize] |= bit;
            }
            for (index, word) in (0..).zip(words) {
                self.words.store(index, says.offset(), word);
            }
        }
    }
}

/// Counts one more that has a bit.
fn set(counts: &mut HashMap<(Says, Bit), u32>, key: (Says, Bit), word: &AtomicU64) {
    *counts.entry(key).or_default() += 1;
    word.fetch_or(key.1.1, Ordering::SeqCst);
}

/// Counts one less; with the last the bit goes.
fn clear(counts: &mut HashMap<(Says, Bit), u32>, key: (Says, Bit), word: &AtomicU64) {
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
        let (mut counts, word, shared) = (HashMap::new(), AtomicU64::new(0b1), (Says::Every, (7, 0b100)));
        set(&mut counts, shared, &word);
        set(&mut counts, shared, &word);
        clear(&mut counts, shared, &word);
        assert_eq!(word.load(Ordering::SeqCst), 0b101);
        clear(&mut counts, shared, &word);
        clear(&mut counts, shared, &word);
        assert_eq!((word.load(Ordering::SeqCst), counts.len()), (0b1, 0));
    }
}
