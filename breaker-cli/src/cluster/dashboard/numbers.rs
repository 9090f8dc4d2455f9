//! Sums of the nodes' counts of connections.

use std::collections::BTreeMap;

use breaker_web::rows::Counts;

/// Treatment of the counts that a node had before its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Earlier {
    /// The message before this one has it.
    Known,
    /// It belongs to the sums: the page has just been opened.
    Added,
    /// It does not: the node comes late, or was away.
    LeftOut,
}

/// The counts of all nodes that answer.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// The last counts, by node and service.
    last: BTreeMap<(String, String), Counts>,
    /// The sums, by service. Its `flows` is not used.
    sums: BTreeMap<String, Counts>,
}

impl Numbers {
    /// Takes counts of one node in. `earlier`: whether what the node counted earlier, while nobody listened, is added.
    /// Otherwise it is left out, because it would look like a burst of connections.
    pub fn take(&mut self, node: &str, counts: &BTreeMap<String, Counts>, earlier: Earlier) {
        for (service, now) in counts {
            let before = self.last.insert((node.to_owned(), service.clone()), *now);
            let new = match (earlier, before) {
                (Earlier::Known, Some(before)) => Counts {
                    primary: grown(before.primary, now.primary),
                    backup: grown(before.backup, now.backup),
                    rejected: grown(before.rejected, now.rejected),
                    flows: 0,
                },
                (Earlier::Added, None) => Counts { flows: 0, ..*now },
                (Earlier::Known | Earlier::LeftOut, None) | (Earlier::Added | Earlier::LeftOut, Some(_)) => {
                    Counts::default()
                }
            };
            *self.sums.entry(service.clone()).or_default() += new;
        }
    }

    /// A node is not heard any more: its flows are not known.
    pub fn forget(&mut self, node: &str) {
        let of_node = self.last.iter_mut().filter(|((name, _), _)| name == node);
        of_node.for_each(|(_, last)| last.flows = 0);
    }

    /// The sums by breaker. `breakers`: the breaker of each service.
    pub fn of_breakers(&self, breakers: &BTreeMap<String, String>) -> BTreeMap<String, Counts> {
        let mut sums: BTreeMap<String, Counts> = BTreeMap::new();
        let mut add = |service: &str, counts: Counts| {
            if let Some(breaker) = breakers.get(service) {
                *sums.entry(breaker.clone()).or_default() += counts;
            }
        };
        self.sums.iter().for_each(|(service, counts)| add(service, *counts));
        for ((_, service), last) in &self.last {
            add(service, Counts { flows: last.flows, ..Counts::default() });
        }
        sums
    }
}

/// How much a counter has grown. One that is smaller than before began anew.
const fn grown(before: u64, now: u64) -> u64 {
    if now < before { now } else { now - before }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(primary: u64, flows: u64) -> BTreeMap<String, Counts> {
        BTreeMap::from([("prod/shop:80".to_owned(), Counts { primary, flows, ..Counts::default() })])
    }

    #[test]
    fn sums_grow_by_what_each_node_counts_and_never_jump() {
        let breakers = BTreeMap::from([("prod/shop:80".to_owned(), "prod/shop".to_owned())]);
        let mut numbers = Numbers::default();
        let sum = |numbers: &Numbers| {
            let sum = numbers.of_breakers(&breakers)["prod/shop"];
            (sum.primary, sum.flows)
        };
        numbers.take("n1", &counts(1000, 3), Earlier::Added);
        numbers.take("n2", &counts(500, 0), Earlier::Added);
        assert_eq!(sum(&numbers), (1500, 3));
        numbers.take("n1", &counts(1010, 2), Earlier::Known);
        assert_eq!(sum(&numbers), (1510, 2));
        numbers.take("n3", &counts(70_000, 1), Earlier::LeftOut);
        assert_eq!(sum(&numbers), (1510, 3), "a node that comes later");
        numbers.take("n3", &counts(70_005, 1), Earlier::Known);
        numbers.take("n2", &counts(4, 0), Earlier::Known);
        assert_eq!(sum(&numbers), (1519, 3), "a node whose counters began anew");
        numbers.forget("n1");
        assert_eq!(sum(&numbers), (1519, 1), "a node that is not heard any more");
        numbers.take("n1", &counts(5000, 2), Earlier::LeftOut);
        assert_eq!(sum(&numbers), (1519, 3), "the same node, an hour later");
        assert!(numbers.of_breakers(&BTreeMap::new()).is_empty(), "a service of no breaker");
    }
}
