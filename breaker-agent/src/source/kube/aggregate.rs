//! From the nodes' reports to a CircuitBreaker's status and to what is worth an Event: pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::{
    api::{CircuitBreakerStatus, NodeCounts, NodeReport, NodeStatus, PortStatus, ReportedService},
    resolve::{Refusal, Subject},
    wish::Owner,
};

/// Nodes shown one by one at the most; `counts` has them all.
pub const MOST_NODES: usize = 32;
/// Longest message that is kept, bytes: the object's size is bounded by it.
const MOST_WORDS: usize = 256;

/// A node's report, and whether the node is Ready: the report of one that is not is old news.
#[derive(Clone, Debug)]
pub struct NodeNews {
    /// The node.
    pub node: String,
    /// Whether Kubernetes hears of it.
    pub ready: bool,
    /// What its agent said last.
    pub report: std::sync::Arc<NodeReport>,
}

/// Kind, namespace, name.
type OwnerKey<'a> = (&'a str, &'a str, &'a str);

/// What all nodes say, by who asked for it.
#[derive(Debug, Default)]
pub struct News<'a> {
    nodes: Vec<&'a NodeNews>,
    by_owner: BTreeMap<OwnerKey<'a>, Vec<(usize, &'a ReportedService)>>,
}

impl<'a> News<'a> {
    /// Sorts reports by owner.
    #[must_use]
    pub fn new(nodes: &'a [NodeNews]) -> Self {
        let mut news = Self { nodes: nodes.iter().collect(), ..Self::default() };
        for (index, node) in nodes.iter().enumerate() {
            for service in &node.report.spec.services {
                let key = (service.kind.as_str(), service.namespace.as_str(), service.name.as_str());
                news.by_owner.entry(key).or_default().push((index, service));
            }
        }
        news
    }

    /// What is said of this very object: not of an earlier one with its name.
    fn of(&self, owner: &Owner, uid: &str) -> BTreeMap<usize, Vec<&'a ReportedService>> {
        let key = (owner.kind.label(), owner.key.namespace.as_str(), owner.key.name.as_str());
        let mut by_node: BTreeMap<usize, Vec<&ReportedService>> = BTreeMap::new();
        for (index, service) in self.by_owner.get(&key).into_iter().flatten().filter(|(_, s)| s.uid == uid) {
            by_node.entry(*index).or_default().push(service);
        }
        by_node
    }
}

/// Open is the most open one.
fn openness(state: &str) -> u8 {
    match state {
        "Closed" => 1,
        "HalfOpen" => 2,
        "Open" => 3,
        _ => 0,
    }
}

/// Cuts words to a length, at a character.
pub(super) fn short(words: &str) -> String {
    if words.len() <= MOST_WORDS {
        return words.to_owned();
    }
    let end = (0..=MOST_WORDS).rev().find(|end| words.is_char_boundary(*end)).unwrap_or_default();
    format!("{}…", &words[..end])
}

/// What one node says of one owner's ports, as one.
fn node_status(news: &NodeNews, ports: &[&ReportedService]) -> NodeStatus {
    let Some(worst) = ports.iter().max_by_key(|s| (openness(&s.state), s.since)) else { return NodeStatus::default() };
    let backup = |s: &ReportedService| {
        let tier = s.backups.iter().find(|t| t.active).or_else(|| s.backups.first());
        tier.map(|t| format!("{}/{}", t.up, t.total)).unwrap_or_default()
    };
    NodeStatus {
        node: news.node.clone(),
        state: if news.ready { worst.state.clone() } else { "Unknown".into() },
        since: worst.since,
        reason: worst.reason.clone(),
        message: short(&worst.message),
        share: worst.share,
        desired_generation: ports.iter().map(|s| s.desired_generation).min().unwrap_or_default(),
        applied_generation: ports.iter().map(|s| s.applied_generation).min().unwrap_or_default(),
        ports: ports
            .iter()
            .map(|s| PortStatus {
                port: s.port,
                state: s.state.clone(),
                primary: format!("{}/{}", s.primary.up, s.primary.total),
                backup: backup(s),
            })
            .collect(),
        error: ports.iter().find_map(|s| s.error.as_deref()).map(short),
    }
}

/// The status of one owner. `old` is the last one that was published: conditions that did not change keep their time.
#[must_use]
pub fn status(
    subject: &Subject,
    news: &News<'_>,
    old: Option<&CircuitBreakerStatus>,
    now: Timestamp,
) -> CircuitBreakerStatus {
    let by_node = news.of(&subject.owner, &subject.uid);
    let mut nodes: Vec<(NodeStatus, &Vec<&ReportedService>)> =
        by_node.iter().map(|(index, ports)| (node_status(news.nodes[*index], ports), ports)).collect();
    let live = || nodes.iter().filter(|(node, _)| node.state != "Unknown" && !node.state.is_empty());
    let count = |state: &str| i32::try_from(live().filter(|(n, _)| n.state == state).count()).unwrap_or(i32::MAX);
    let expected = news.nodes.iter().filter(|n| n.ready).count();
    let programmed = live()
        .filter(|(n, _)| {
            n.error.is_none()
                && n.applied_generation >= subject.generation
                && n.applied_generation == n.desired_generation
        })
        .count();
    let counts = NodeCounts {
        nodes: i32::try_from(live().count()).unwrap_or(i32::MAX),
        closed: count("Closed"),
        half_open: count("HalfOpen"),
        open: count("Open"),
        programmed: i32::try_from(programmed).unwrap_or(i32::MAX),
        silent: i32::try_from(by_node.keys().filter(|i| !news.nodes[**i].ready).count()).unwrap_or(i32::MAX),
    };
    let worst = live()
        .map(|(n, _)| n)
        .max_by_key(|n| (openness(&n.state), std::cmp::Reverse(n.since), std::cmp::Reverse(&n.node)));
    let backup = backup_words(live().flat_map(|(_, ports)| ports.iter().copied()));
    let share = {
        let all: Vec<i32> = live().map(|(n, _)| n.share).collect();
        let mean = all.iter().sum::<i32>() / i32::try_from(all.len().max(1)).unwrap_or(1);
        (!all.is_empty()).then(|| format!("{}%", (mean + 5) / 10))
    };
    let several = live().count() > 1;
    let mut status = CircuitBreakerStatus {
        observed_generation: subject.generation,
        state: worst.map(|n| n.state.clone()),
        since: worst.and_then(|n| n.since),
        reason: worst.map(|n| n.reason.clone()),
        message: worst
            .filter(|n| !n.message.is_empty())
            .map(|n| if several { format!("{}: {}", n.node, n.message) } else { n.message.clone() }),
        backup: backup.clone().map(|b| b.0),
        share,
        open: worst.map(|_| format!("{}/{}", counts.open, counts.nodes)),
        limits_shared_by: live().flat_map(|(_, ports)| *ports).map(|s| s.limits_shared_by).max().filter(|by| *by > 0),
        limited: limited_words(live().flat_map(|(_, ports)| ports.iter().copied())),
        counts,
        conditions: Vec::new(),
        nodes: Vec::new(),
    };
    let degraded = degraded(&nodes, backup.as_ref().is_some_and(|b| b.1), news);
    status.conditions = conditions(subject, news, expected, programmed, degraded)
        .into_iter()
        .map(|new| condition(new, subject.generation, old, now))
        .collect();
    nodes.sort_by(|(a, _), (b, _)| {
        let key = |n: &NodeStatus| {
            (std::cmp::Reverse(n.error.is_some()), std::cmp::Reverse(openness(&n.state)), n.node.clone())
        };
        key(a).cmp(&key(b))
    });
    status.nodes = nodes.into_iter().map(|(node, _)| node).take(MOST_NODES).collect();
    status.nodes.sort_by(|a, b| a.node.cmp(&b.node));
    status
}

/// Name and pods of the backup that would take over where it is least well, and whether it is usable everywhere.
fn backup_words<'a>(services: impl Iterator<Item = &'a ReportedService>) -> Option<(String, bool)> {
    let mut weakest: Option<(i32, String, bool)> = None;
    for service in services {
        let active = service.backups.iter().find(|t| t.active);
        let Some(tier) = active.or_else(|| service.backups.first()) else { continue };
        // A pod that was not checked yet says nothing against its tier.
        let usable = active.is_some() || service.backups.iter().any(|t| t.checking > 0);
        let up = if usable { tier.up } else { -1 };
        if weakest.as_ref().is_none_or(|w| up < w.0) {
            weakest = Some((up, format!("{} {}/{}", tier.name, tier.up, tier.total), usable));
        }
    }
    weakest.map(|w| (w.1, w.2))
}

/// How many new connections were over a limit in a minute, and which limit was reached most.
fn limited_words<'a>(services: impl Iterator<Item = &'a ReportedService>) -> Option<String> {
    let limited: Vec<_> = services.filter_map(|service| service.limited.as_ref()).collect();
    let most = limited.iter().max_by_key(|limit| limit.per_minute)?;
    Some(format!("{}/min {}", limited.iter().map(|limit| limit.per_minute).sum::<i64>(), most.limit))
}

type NewCondition = (&'static str, &'static str, String, String);

/// Why protection is less than whole, if it is.
fn degraded(
    nodes: &[(NodeStatus, &Vec<&ReportedService>)],
    backup_usable: bool,
    news: &News<'_>,
) -> Option<(&'static str, String)> {
    let live = || nodes.iter().map(|(node, _)| node).filter(|node| node.state != "Unknown" && !node.state.is_empty());
    if let Some(node) = live().find(|node| node.error.is_some()) {
        let error = node.error.as_deref().unwrap_or_default();
        return Some(("WriteFailed", format!("{}: {error}", node.node)));
    }
    let failed = |n: &&&NodeNews| n.ready && !n.report.spec.agent.failed_interfaces.is_empty();
    if let Some(node) = news.nodes.iter().find(failed) {
        return Some((
            "NotAttached",
            format!("{}: {}", node.node, short(&node.report.spec.agent.failed_interfaces.join("; "))),
        ));
    }
    live().next()?;
    if !backup_usable {
        return Some(("BackupUnavailable", "no backup is usable: while it is open, whenAllUnhealthy applies".into()));
    }
    let open = live().filter(|node| node.state == "Open").count();
    if open > 0 {
        return Some((
            "TrafficOnBackup",
            format!("the backup answers on {open} of {} nodes: it has no backup itself", live().count()),
        ));
    }
    None
}

fn conditions(
    subject: &Subject,
    news: &News<'_>,
    expected: usize,
    programmed: usize,
    degraded: Option<(&'static str, String)>,
) -> Vec<NewCondition> {
    let verdict = |type_: &'static str, outcome: &Result<(), Refusal>, good: &'static str, words: String| match outcome
    {
        Ok(()) => (type_, "True", good.to_owned(), words),
        Err(refusal) => (type_, "False", refusal.reason.to_owned(), short(&refusal.message)),
    };
    let notes = if subject.notes.is_empty() { String::new() } else { format!(" ({})", subject.notes.join("; ")) };
    let accepted = verdict("Accepted", &subject.accepted, "Accepted", "the spec can be carried out".into());
    let resolved =
        verdict("ResolvedRefs", &subject.resolved, "Resolved", short(&format!("the Services are there{notes}")));
    let policies = "no NetworkPolicy that is known keeps the primary's clients from the backups";
    let reachable = verdict("BackupReachable", &subject.reachable, "Reachable", policies.into());
    let agents = format!("on {programmed} of {expected} nodes");
    let refused = subject.accepted.is_err() || subject.resolved.is_err();
    let nothing = refused && subject.ports.is_empty();
    let in_kernel = match () {
        () if nothing && programmed == 0 => {
            ("Programmed", "False", "NotResolved".to_owned(), "nothing is redirected".to_owned())
        }
        () if expected == 0 => ("Programmed", "Unknown", "NoAgents".into(), "no node reports".into()),
        () if programmed == expected => ("Programmed", "True", "Programmed".into(), agents),
        () if subject.accepted.is_err() && !subject.ports.is_empty() => {
            ("Programmed", "False", "EarlierGeneration".into(), "what was asked for before goes on".into())
        }
        () => ("Programmed", "False", "Pending".into(), agents),
    };
    let degraded = degraded.map_or_else(
        || ("Degraded", "False", "Whole".to_owned(), "primary and backup can answer".to_owned()),
        |(reason, words)| ("Degraded", "True", reason.to_owned(), words),
    );
    let live = || news.nodes.iter().filter(|n| n.ready);
    let hidden = live().find_map(|n| Some((n.node.as_str(), n.report.spec.agent.incompatible.as_deref()?)));
    let compatible = match hidden {
        Some((node, why)) => {
            ("DatapathCompatible", "False", "SocketLoadBalancer".to_owned(), short(&format!("{node}: {why}")))
        }
        None => {
            let blind = live().filter_map(|n| Some((n.node.as_str(), n.report.spec.agent.node_sockets.as_deref()?)));
            let words = match blind.clone().next() {
                None => "clients in pods, outside and on the nodes themselves are redirected".to_owned(),
                Some((node, why)) => short(&format!(
                    "clients in pods and outside are redirected; the own processes of {} nodes and their pods with hostNetwork are not: {node}: {why}",
                    blind.count()
                )),
            };
            ("DatapathCompatible", "True", "Compatible".to_owned(), words)
        }
    };
    vec![accepted, resolved, reachable, in_kernel, degraded, compatible]
}

fn condition(
    (type_, status, reason, message): NewCondition,
    generation: i64,
    old: Option<&CircuitBreakerStatus>,
    now: Timestamp,
) -> Condition {
    let before = old.and_then(|old| old.conditions.iter().find(|c| c.type_ == type_ && c.status == status));
    Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason,
        message,
        observed_generation: Some(generation),
        last_transition_time: before.map_or_else(|| Time(in_seconds(now)), |c| c.last_transition_time.clone()),
    }
}

/// Conditions have a time in whole seconds.
fn in_seconds(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// Something worth an Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happening {
    /// Whether it is a Warning.
    pub warning: bool,
    /// One word in CamelCase.
    pub reason: String,
    /// For a person.
    pub note: String,
}

/// What happened from one published status to the next. Without an old one only what is wrong is told.
#[must_use]
pub fn happenings(old: Option<&CircuitBreakerStatus>, new: &CircuitBreakerStatus) -> Vec<Happening> {
    let mut found = Vec::new();
    let mut tell =
        |warning: bool, reason: &str, note: String| found.push(Happening { warning, reason: reason.to_owned(), note });
    let state = |status: Option<&CircuitBreakerStatus>| status.and_then(|s| s.state.clone()).unwrap_or_default();
    let (before, after) = (state(old), state(Some(new)));
    if before != after && !(old.is_none() && after == "Closed") {
        let why = new.reason.clone().unwrap_or_default();
        let words = new.message.as_deref().map(|m| format!(": {m}")).unwrap_or_default();
        let nodes = format!("{} of {} nodes", new.counts.open, new.counts.nodes);
        let backup = new.backup.as_deref().unwrap_or("the backup");
        match (before.as_str(), after.as_str()) {
            (_, "Open") => tell(true, "Opened", format!("{why}: new connections go to {backup} ({nodes}){words}")),
            (_, "HalfOpen") => tell(false, "HalfOpen", format!("{why}: a few connections try the primary{words}")),
            ("Open" | "HalfOpen", "Closed") => {
                tell(false, "Closed", format!("{why}: new connections go to the primary{words}"))
            }
            _ => {}
        }
    }
    if let (None, Some(limited)) = (old.and_then(|old| old.limited.as_ref()), &new.limited) {
        let words = "new connections over it are refused, or go to the other tier (limits.onLimit)";
        tell(true, "Limited", format!("a limit is reached: {limited}; {words}"));
    }
    let find = |status: Option<&CircuitBreakerStatus>, type_: &str| -> Option<(String, String, String)> {
        let condition = status?.conditions.iter().find(|c| c.type_ == type_)?;
        Some((condition.status.clone(), condition.reason.clone(), condition.message.clone()))
    };
    for type_ in ["Accepted", "ResolvedRefs", "BackupReachable", "DatapathCompatible", "Programmed", "Degraded"] {
        let Some((status, reason, message)) = find(Some(new), type_) else { continue };
        let was = find(old, type_).map(|(status, reason, _)| (status, reason));
        if was.as_ref() == Some(&(status.clone(), reason.clone())) {
            continue;
        }
        let was_reason = was.as_ref().map(|w| w.1.as_str());
        match (type_, status.as_str(), reason.as_str()) {
            ("Accepted" | "ResolvedRefs" | "BackupReachable" | "DatapathCompatible", "False", _) => {
                tell(true, &reason, message)
            }
            ("ResolvedRefs", "True", _) if was.is_some() => tell(false, "Resolved", message),
            ("Programmed", "True", _) if old.is_some() && was.as_ref().is_none_or(|w| w.0 != "True") => {
                tell(false, "Programmed", message);
            }
            ("Degraded", "True", "WriteFailed" | "NotAttached" | "BackupUnavailable") => tell(true, &reason, message),
            ("Degraded", _, _) if was_reason == Some("BackupUnavailable") => {
                tell(
                    false,
                    "BackupAvailable",
                    format!("{} can take over again", new.backup.as_deref().unwrap_or("a backup")),
                );
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
#[path = "aggregate_tests.rs"]
mod tests;
