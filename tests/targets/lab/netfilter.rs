//! Counts packets in the first hook of a namespace's netfilter (raw PREROUTING).

use anyhow::{Result, ensure};
use breaker_tests::lab::netns::NetNs;

const FAMILIES: [&str; 2] = ["iptables", "ip6tables"];

/// Adds a rule that counts packets with these iptables matches. A colon in a match makes it an IPv6 rule.
pub fn count(ns: &NetNs, matches: &[&str]) -> Result<()> {
    let [v4, v6] = FAMILIES;
    let family = if matches.iter().any(|word| word.contains(':')) { v6 } else { v4 };
    ns.output(family, &[&["-t", "raw", "-A", "PREROUTING"], matches].concat()).map(drop)
}

/// Packets that all rules together have counted.
pub fn counted(ns: &NetNs) -> Result<u64> {
    let mut counts: Vec<u64> = Vec::new();
    for family in FAMILIES {
        let rules = ns.output(family, &["-t", "raw", "-L", "PREROUTING", "-vxn"])?;
        counts.extend(rules.lines().skip(2).filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok()));
    }
    ensure!(!counts.is_empty(), "no rule that counts");
    Ok(counts.iter().sum())
}
