//! Reads kube-proxy's rules on a node, in mode iptables or nftables: where it sends the connections to a Service.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use breaker_agent::source::kube::kube_proxy::{Target, Way};

/// Where kube-proxy sends a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// To one of these.
    Endpoints(BTreeSet<SocketAddr>),
    Drop,
    Reject,
    /// No rule is about it.
    Nothing,
}

impl From<&Target<'_>> for Observed {
    fn from(target: &Target<'_>) -> Self {
        match target {
            Target::Endpoints(list) => Self::Endpoints(list.iter().map(|endpoint| endpoint.address).collect()),
            Target::Drop => Self::Drop,
            Target::Reject => Self::Reject,
        }
    }
}

/// One port of a Service in one IP family.
#[derive(Clone, Copy, Debug)]
pub struct ServicePort {
    pub cluster_ip: IpAddr,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// The rules of one node for one IP family: the lines of each chain.
pub struct Rules {
    chains: BTreeMap<String, Vec<String>>,
    /// nftables: the verdicts of each address and port, and of each node port. A node port without endpoints on the node
    /// has two: one of the map for node ports, and one of the map for those without endpoints.
    maps: Option<BTreeMap<String, Vec<String>>>,
}

impl Rules {
    /// Reads the output of `iptables-save` or `ip6tables-save`.
    pub fn of_iptables(text: &str) -> Self {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in text.lines() {
            if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) {
                chains.entry(chain.to_owned()).or_default().push(format!("{rule} "));
            }
        }
        Self { chains, maps: None }
    }

    /// Reads the output of `nft list table ip kube-proxy`, or of `ip6`.
    pub fn of_nftables(text: &str) -> Self {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut maps: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut chain = None;
        for line in text.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
                chain = Some(name.to_owned());
            } else if line == "}" {
                chain = None;
            } else if let Some(name) = &chain {
                chains.entry(name.clone()).or_default().push(line.to_owned());
            } else if let Some((key, verdict)) = line.rsplit_once(" : ") {
                let key = key.trim_start_matches("elements = { ").split(" comment ").next().unwrap_or_default();
                let verdict = verdict.trim_end_matches([',', ' ', '}']);
                maps.entry(key.to_owned()).or_default().push(verdict.to_owned());
            }
        }
        Self { chains, maps: Some(maps) }
    }

    /// Where a TCP connection goes.
    pub fn target(&self, way: Way, to: ServicePort) -> Observed {
        match (&self.maps, way, to.node_port) {
            (None, Way::ClusterIp, _) => {
                let to = format!("-d {}/{} ", to.cluster_ip, if to.cluster_ip.is_ipv4() { 32 } else { 128 });
                self.iptables_verdict("KUBE-SERVICES", |rule| rule.starts_with(&to))
            }
            (None, _, Some(port)) => self.iptables_node_port(way, port),
            (Some(maps), Way::ClusterIp, _) => {
                self.nftables(maps.get(&format!("{} . tcp . {}", to.cluster_ip, to.port)), way)
            }
            (Some(maps), _, Some(port)) => self.nftables(maps.get(&format!("tcp . {port}")), way),
            (_, _, None) => Observed::Nothing,
        }
    }

    fn lines(&self, chain: &str) -> impl Iterator<Item = &str> {
        self.chains.get(chain).into_iter().flatten().map(String::as_str)
    }

    /// The verdict of the first rule that is meant.
    fn iptables_verdict(&self, chain: &str, is_meant: impl Fn(&str) -> bool) -> Observed {
        match self.lines(chain).find(|rule| is_meant(rule)).and_then(jump) {
            None => Observed::Nothing,
            Some("DROP") => Observed::Drop,
            Some("REJECT") => Observed::Reject,
            Some(chain) => self.iptables_endpoints(chain),
        }
    }

    fn iptables_node_port(&self, way: Way, port: u16) -> Observed {
        let port = format!("--dport {port} ");
        let mut accepted = self.lines("KUBE-NODEPORTS").filter(|rule| rule.contains(&port));
        if let Some(external) = accepted.find(|rule| !rule.contains("-d 127.")).and_then(jump) {
            let local = |rule: &&str| rule.contains("--src-type LOCAL") && rule.contains("-j KUBE-SV");
            let last = |rule: &&str| rule.starts_with("-j KUBE-SV");
            let from_here = self.lines(external).find(local).filter(|_| way == Way::FromThisNode);
            if let Some(chain) = from_here.or_else(|| self.lines(external).find(last)).and_then(jump) {
                return self.iptables_endpoints(chain);
            }
        }
        self.iptables_verdict("KUBE-EXTERNAL-SERVICES", |rule| rule.contains(&port))
    }

    fn iptables_endpoints(&self, chain: &str) -> Observed {
        let separate = self.lines(chain).filter_map(jump).filter(|chain| chain.starts_with("KUBE-SEP-"));
        let address = |chain: &str| {
            let address = self.lines(chain).find_map(|rule| rule.split_once("--to-destination ")?.1.split(' ').next());
            address?.parse().ok()
        };
        Observed::Endpoints(separate.filter_map(address).collect())
    }

    /// What the verdicts come to: endpoints if one leads to some.
    fn nftables(&self, verdicts: Option<&Vec<String>>, way: Way) -> Observed {
        let all: Vec<Observed> =
            verdicts.into_iter().flatten().map(|verdict| self.nftables_verdict(verdict, way)).collect();
        let leads = all.iter().find(|observed| matches!(observed, Observed::Endpoints(_)));
        let other = || all.iter().find(|observed| **observed != Observed::Nothing);
        leads.or_else(other).cloned().unwrap_or(Observed::Nothing)
    }

    fn nftables_verdict(&self, verdict: &str, way: Way) -> Observed {
        match verdict.strip_prefix("goto ") {
            Some("reject-chain") => Observed::Reject,
            Some(chain) if way == Way::ClusterIp => self.nftables_endpoints(chain),
            Some(external) => {
                let target = |rule: &str| Some(rule.split_once("goto ")?.1.split(' ').next()?.to_owned());
                let local = |rule: &&str| rule.starts_with("fib saddr type local goto ");
                let from_here = self.lines(external).find(local).filter(|_| way == Way::FromThisNode);
                let last = || self.lines(external).find(|rule| rule.starts_with("goto "));
                match from_here.or_else(last).and_then(target) {
                    Some(chain) => self.nftables_endpoints(&chain),
                    None => Observed::Nothing,
                }
            }
            None => Observed::Drop,
        }
    }

    fn nftables_endpoints(&self, chain: &str) -> Observed {
        let words = self.lines(chain).flat_map(|rule| rule.split([' ', ',']));
        let chains: BTreeSet<&str> = words.filter(|word| word.starts_with("endpoint-")).collect();
        let address = |chain: &str| self.lines(chain).find_map(|rule| rule.split_once("dnat to ")?.1.parse().ok());
        Observed::Endpoints(chains.into_iter().filter_map(address).collect())
    }
}

/// The target of a rule of iptables.
fn jump(rule: &str) -> Option<&str> {
    rule.split_once("-j ")?.1.split(' ').next()
}
