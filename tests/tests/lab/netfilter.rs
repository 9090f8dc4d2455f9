//! What a namespace's netfilter sees, in its first hook.

use anyhow::{Result, ensure};
use breaker_tests::lab::netns::NetNs;

/// Counts packets that match, as iptables has it.
pub fn count(ns: &NetNs, matches: &[&str]) -> Result<()> {
    ns.output("iptables", &[&["-t", "raw", "-A", "PREROUTING"], matches].concat()).map(drop)
}

/// What was counted: packets of all rules.
pub fn counted(ns: &NetNs) -> Result<u64> {
    let rules = ns.output("iptables", &["-t", "raw", "-L", "PREROUTING", "-vxn"])?;
    let packets = rules.lines().skip(2).filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let packets: Vec<u64> = packets.collect();
    ensure!(!packets.is_empty(), "no rule: {rules}");
    Ok(packets.iter().sum())
}
