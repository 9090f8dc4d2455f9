//! Maglev hashing: fills a selection table so that each backend gets its share of the slots, and so that few slots
//! change when a backend comes or goes (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load
//! Balancer", NSDI 2016, section 3.4). Pure: no clock, no input or output.

use breaker_common::TABLE_SIZES;

/// A backend that gets slots.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// The backend's identity. It must not change with the backend's position in the list: it is derived from the
    /// address.
    pub key: u64,
    /// The backend's share, relative to the other weights. 0 counts as 1.
    pub weight: u16,
}

/// Number of slots that the candidate with the smallest weight should have. With fewer, the rounding to whole slots would
/// change its share by more than a sixth.
const SLOTS_FOR_SMALLEST: u64 = 6;

/// Returns the smallest of [`TABLE_SIZES`] in which every candidate gets its share of slots, or the largest.
#[must_use]
pub fn size_for(candidates: &[Candidate]) -> u32 {
    let (sum, smallest) = sum_and_smallest(candidates);
    let wanted = (sum * SLOTS_FOR_SMALLEST).div_ceil(smallest);
    let [.., largest] = TABLE_SIZES;
    TABLE_SIZES.into_iter().find(|size| u64::from(*size) >= wanted).unwrap_or(largest)
}

/// Returns the sum of all weights, and the smallest one.
fn sum_and_smallest(candidates: &[Candidate]) -> (u64, u64) {
    let weights = || candidates.iter().map(|c| u64::from(c.weight.max(1)));
    (weights().sum(), weights().min().unwrap_or(1))
}

/// Fills a table of `size` slots (one of [`TABLE_SIZES`]) with indices into `candidates`. Returns an empty table if there
/// are no candidates.
///
/// The candidates take turns in choosing a slot. The number of turns is proportional to the weight: the candidate
/// with the largest weight has one in every round. If the weights differ so much that the lightest candidates would get
/// no slot, each candidate chooses one before the first round. If there are more candidates than slots, some candidates
/// get no slot.
#[must_use]
pub fn fill(candidates: &[Candidate], size: u32) -> Vec<usize> {
    let Some(heaviest) = candidates.iter().map(|c| u32::from(c.weight.max(1))).max() else { return Vec::new() };
    let length = size as usize;
    // Candidates choose in the order of their keys: the result must not depend on the order of the list.
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(|&i| candidates[i].key);
    let permutation = |key: u64| {
        let offset = mix(key) % u64::from(size);
        let skip = mix(key ^ 0x9e37_79b9_7f4a_7c15) % u64::from(size - 1) + 1;
        (offset, skip)
    };
    let (sum, smallest) = sum_and_smallest(candidates);
    let mut everyone_chooses = sum > smallest * u64::from(size);
    let mut next = vec![0u64; candidates.len()];
    let mut credit = vec![0u32; candidates.len()];
    let mut table = vec![usize::MAX; length];
    let mut filled = 0;
    loop {
        for &i in &order {
            if !everyone_chooses {
                credit[i] += u32::from(candidates[i].weight.max(1));
                if credit[i] < heaviest {
                    continue;
                }
                credit[i] -= heaviest;
            }
            let (offset, skip) = permutation(candidates[i].key);
            loop {
                // The size is prime, so the steps reach every slot. A slot is free, or the function would have returned.
                let slot = usize::try_from((offset + next[i] * skip) % u64::from(size)).unwrap_or(0);
                next[i] += 1;
                if table[slot] == usize::MAX {
                    table[slot] = i;
                    break;
                }
            }
            filled += 1;
            if filled == length {
                return table;
            }
        }
        everyone_chooses = false;
    }
}

/// Mixes the bits of a key: one step of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn even(keys: impl IntoIterator<Item = u64>) -> Vec<Candidate> {
        keys.into_iter().map(|key| Candidate { key, weight: 1 }).collect()
    }

    fn table_of(candidates: &[Candidate]) -> Vec<usize> {
        fill(candidates, size_for(candidates))
    }

    /// The candidates' keys in a table of 251 slots.
    fn keys_of(candidates: &[Candidate]) -> Vec<u64> {
        fill(candidates, 251).iter().map(|&i| candidates[i].key).collect()
    }

    #[test]
    fn nobody_fills_nothing() {
        assert!(table_of(&[]).is_empty());
    }

    #[test]
    fn weights_are_kept_within_a_slot_or_two() {
        let candidates = [Candidate { key: 1, weight: 3 }, Candidate { key: 2, weight: 1 }];
        let threes = table_of(&candidates).iter().filter(|&&i| i == 0).count();
        assert!((45..=46).contains(&threes), "{threes} of 61 for a weight of 3 to 1");
    }

    /// TRIALS E6: 300 backends, and a weight of 1 beside 300, 1,000 or 65,535.
    #[test]
    fn every_backend_gets_slots() {
        let slots_of = |candidates: &[Candidate]| {
            let mut slots = vec![0_usize; candidates.len()];
            table_of(candidates).iter().for_each(|&i| slots[i] += 1);
            slots
        };
        for number in [62, 63, 251, 300, 1_000, 5_000] {
            let slots = slots_of(&even(0..number));
            let (fewest, most) = (slots.iter().min().unwrap(), slots.iter().max().unwrap());
            assert!(*fewest > 0 && most - fewest <= 1, "{number} backends: {fewest} to {most} slots");
        }
        for heavy in [60, 300, 1_000, 10_000, 65_535] {
            let slots = slots_of(&[Candidate { key: 1, weight: heavy }, Candidate { key: 2, weight: 1 }]);
            assert!(slots[1] >= 1 && slots[0] > slots[1], "{heavy} to 1: {slots:?}");
        }
        let sizes = [2, 10, 11, 41, 42, 170, 171, 682, 683].map(|number| size_for(&even(0..number)));
        assert_eq!(sizes, [61, 61, 251, 251, 1021, 1021, 4093, 4093, 16_381]);
    }

    /// The size of the tables that [`keys_of`] makes.
    const LEN: usize = 251;

    proptest! {
        #[test]
        fn the_table_is_full_even_and_independent_of_order(keys in prop::collection::hash_set(any::<u64>(), 1..60)) {
            let mut candidates = even(keys);
            let table = keys_of(&candidates);
            let n = candidates.len();
            for candidate in &candidates {
                let slots = table.iter().filter(|key| **key == candidate.key).count();
                // Candidates choose in turn, so no candidate is more than one slot ahead of another.
                prop_assert!(slots == LEN / n || slots == LEN / n + 1, "{slots} slots of {LEN} for one of {n}");
            }
            candidates.reverse();
            prop_assert_eq!(table, keys_of(&candidates));
        }

        /// The disruption bound: when one of n candidates leaves, its own slots must change. Of the others' slots,
        /// at most as many again plus a fifth of the table may change. (The paper finds a few percent for tables of
        /// at least 100 n slots. This table is small, so the bound is loose: 55 of 251 were seen once in many
        /// thousand cases, with n = 9.)
        #[test]
        fn one_that_leaves_moves_few_slots_of_others(keys in prop::collection::hash_set(any::<u64>(), 2..12), gone in any::<prop::sample::Index>()) {
            let before = even(keys);
            let gone = gone.index(before.len());
            let mut after = before.clone();
            let left = after.remove(gone).key;
            let (old, new) = (keys_of(&before), keys_of(&after));
            let moved = old.iter().zip(&new).filter(|(o, n)| **o != left && o != n).count();
            prop_assert!(moved <= LEN / before.len() + LEN / 5, "{moved} slots of others moved, {} candidates", before.len());
            prop_assert!(!new.contains(&left));
        }
    }
}
