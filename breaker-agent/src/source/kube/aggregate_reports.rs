//! Merges the nodes' reports into the status of a CircuitBreaker, and derives its Events. All functions are pure.

use breaker_api::{
    crd::{
        CircuitBreakerStatus, NodeCounts, NodeReport, NodeStatus, OwnerKind, PortStatus, ReportedAgent,
        ReportedService, ReportedState,
    },
    established::EstablishedCounts,
    tier::TierRole,
};
use breaker_common::StateReason;
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::{
    intent::Owner,
    resolve::{Refusal, ResolvedBreaker},
    text::short,
};

/// Maximum number of nodes in `status.nodes`; `status.counts` has all nodes.
pub const MOST_NODES: usize = 32;

/// The last report of a node, and whether it is recent enough to count.
#[derive(Clone, Debug)]
pub struct NodeReportView {
    /// The node.
    pub node: String,
    /// Whether the report is recent enough. The limit depends on whether the Node is Ready: see `status_writer.rs`.
    pub ready: bool,
    /// The report.
    pub report: std::sync::Arc<NodeReport>,
}

/// Kind, namespace and name of an owner.
type OwnerKey<'a> = (Option<OwnerKind>, &'a str, &'a str);

/// The reports of all nodes, indexed by the owner of each service.
#[derive(Debug, Default)]
pub struct NodeReports<'a> {
    nodes: Vec<&'a NodeReportView>,
    by_owner: BTreeMap<OwnerKey<'a>, Vec<(usize, &'a ReportedService)>>,
}

impl<'a> NodeReports<'a> {
    /// Indexes the reports by owner.
    #[must_use]
    pub fn new(nodes: &'a [NodeReportView]) -> Self {
        let mut reports = Self { nodes: nodes.iter().collect(), ..Self::default() };
        for (index, node) in nodes.iter().enumerate() {
            for service in &node.report.spec.services {
                let key = (service.kind, service.namespace.as_str(), service.name.as_str());
                reports.by_owner.entry(key).or_default().push((index, service));
            }
        }
        reports
    }

    /// The reports about one owner, by the index of the node. A report about an earlier object with the same name is
    /// left out: it has another uid.
    fn of(&self, owner: &Owner, uid: &str) -> BTreeMap<usize, Vec<&'a ReportedService>> {
        let key = (Some(owner.kind), owner.key.namespace.as_str(), owner.key.name.as_str());
        let mut by_node: BTreeMap<usize, Vec<&ReportedService>> = BTreeMap::new();
        for (index, service) in self.by_owner.get(&key).into_iter().flatten().filter(|(_, s)| s.uid == uid) {
            by_node.entry(*index).or_default().push(service);
        }
        by_node
    }
}

/// Merges one node's reports about an owner's ports: the most open port gives the state.
fn node_status(reports: &NodeReportView, ports: &[&ReportedService]) -> NodeStatus {
    let Some(worst) = ports.iter().max_by_key(|s| (s.state.openness(), s.since)) else { return NodeStatus::default() };
    let backup = |s: &ReportedService| {
        let tier = s.backups.iter().find(|t| t.active).or_else(|| s.backups.first());
        tier.map(|t| format!("{}/{}", t.up, t.total)).unwrap_or_default()
    };
    NodeStatus {
        node: reports.node.clone(),
        state: if reports.ready { worst.state } else { ReportedState::Unknown },
        since: worst.since,
        reason: worst.reason,
        message: short(&worst.message),
        share: worst.share,
        desired_generation: ports.iter().map(|s| s.desired_generation).min().unwrap_or_default(),
        applied_generation: ports.iter().map(|s| s.applied_generation).min().unwrap_or_default(),
        ports: ports
            .iter()
            .map(|s| PortStatus {
                port: s.port,
                outside: s.outside,
                state: s.state,
                primary: format!("{}/{}", s.primary.up, s.primary.total),
                backup: backup(s),
            })
            .collect(),
        error: ports.iter().find_map(|s| s.error.as_deref()).map(short),
        established: established(ports.iter().copied()),
    }
}

/// The sum of the established connections of a tier that was left: of the primary, if any service has left it.
fn established<'a>(services: impl Iterator<Item = &'a ReportedService>) -> Option<EstablishedCounts> {
    let all: Vec<&EstablishedCounts> = services.filter_map(|service| service.established.as_ref()).collect();
    let primary = all.iter().any(|counts| counts.tier == Some(TierRole::Primary));
    let of_tier = all.into_iter().filter(|counts| !primary || counts.tier == Some(TierRole::Primary));
    of_tier.cloned().reduce(|sum, counts| sum.plus(&counts))
}

/// The status of one owner. `old` is the status that was published last: a condition whose status did not change
/// keeps its `lastTransitionTime`.
#[must_use]
pub fn status(
    result: &ResolvedBreaker,
    reports: &NodeReports<'_>,
    old: Option<&CircuitBreakerStatus>,
    now: Timestamp,
) -> CircuitBreakerStatus {
    let by_node = reports.of(&result.owner, &result.uid);
    let mut nodes: Vec<(NodeStatus, &Vec<&ReportedService>)> =
        by_node.iter().map(|(index, ports)| (node_status(reports.nodes[*index], ports), ports)).collect();
    let live = || nodes.iter().filter(|(node, _)| node.state.is_known());
    let count =
        |state: ReportedState| i32::try_from(live().filter(|(n, _)| n.state == state).count()).unwrap_or(i32::MAX);
    let expected = reports.nodes.iter().filter(|n| n.ready).count();
    let programmed = live()
        .filter(|(n, _)| {
            n.error.is_none()
                && n.applied_generation >= result.generation
                && n.applied_generation == n.desired_generation
        })
        .count();
    let counts = NodeCounts {
        nodes: i32::try_from(live().count()).unwrap_or(i32::MAX),
        closed: count(ReportedState::Closed),
        half_open: count(ReportedState::HalfOpen),
        open: count(ReportedState::Open),
        programmed: i32::try_from(programmed).unwrap_or(i32::MAX),
        silent: i32::try_from(by_node.keys().filter(|i| !reports.nodes[**i].ready).count()).unwrap_or(i32::MAX),
    };
    let worst = live()
        .map(|(n, _)| n)
        .max_by_key(|n| (n.state.openness(), std::cmp::Reverse(n.since), std::cmp::Reverse(&n.node)));
    let backup = backup_text(live().flat_map(|(_, ports)| ports.iter().copied()));
    let share = {
        let all: Vec<i32> = live().map(|(n, _)| n.share).collect();
        let mean = all.iter().sum::<i32>() / i32::try_from(all.len().max(1)).unwrap_or(1);
        (!all.is_empty()).then(|| format!("{}%", (mean + 5) / 10))
    };
    let several = live().count() > 1;
    let refusal = refusal_of_all(result);
    let mut status = CircuitBreakerStatus {
        observed_generation: observed_generation(result, live().map(|(node, _)| node.desired_generation).min(), old),
        state: worst.map(|n| n.state).or_else(|| refusal.map(|_| ReportedState::NotProtected)),
        since: worst.and_then(|n| n.since),
        reason: match (worst, refusal) {
            (None, Some(refusal)) => Some(refusal.reason.to_owned()),
            _ => worst.and_then(|n| n.reason).map(|reason| reason.label().to_owned()),
        },
        message: worst
            .filter(|n| !n.message.is_empty())
            .map(|n| if several { format!("{}: {}", n.node, n.message) } else { n.message.clone() })
            .or_else(|| refusal.filter(|_| worst.is_none()).map(|refusal| short(&refusal.message))),
        backup: backup.clone().map(|b| b.0),
        share,
        open: worst.map(|_| format!("{}/{}", counts.open, counts.nodes)),
        limits_shared_by: live().flat_map(|(_, ports)| *ports).map(|s| s.limits_shared_by).max().filter(|by| *by > 0),
        established: established(live().flat_map(|(_, ports)| ports.iter().copied())),
        limited: limited_text(live().flat_map(|(_, ports)| ports.iter().copied())),
        counts,
        conditions: Vec::new(),
        nodes: Vec::new(),
    };
    let degraded = match refusal {
        Some(refusal) => Some(("NotProtected", format!("nothing is protected: {}", refusal.reason))),
        None => degraded(&nodes, backup.as_ref().is_some_and(|b| b.1), reports),
    };
    status.conditions = conditions(result, reports, expected, programmed, degraded)
        .into_iter()
        .chain(progress(result, expected, programmed))
        .map(|new| condition(new, result.generation, old, now))
        .collect();
    nodes.sort_by(|(a, _), (b, _)| {
        let key = |n: &NodeStatus| {
            (std::cmp::Reverse(n.error.is_some()), std::cmp::Reverse(n.state.openness()), n.node.clone())
        };
        key(a).cmp(&key(b))
    });
    status.nodes = nodes.into_iter().map(|(node, _)| node).take(MOST_NODES).collect();
    status.nodes.sort_by(|a, b| a.node.cmp(&b.node));
    status
}

/// The generation that every reporting node works with. Tools that wait compare it with that of the spec: a change is
/// not observed while a node still has the spec before. `desired`: the lowest generation of any node.
fn observed_generation(result: &ResolvedBreaker, desired: Option<i64>, old: Option<&CircuitBreakerStatus>) -> i64 {
    match desired {
        // A refusal follows from the spec alone.
        None if refusal_of_all(result).is_some() => result.generation,
        None => old.map_or(0, |old| old.observed_generation),
        Some(desired) => desired.min(result.generation),
    }
}

/// The conditions of kstatus (sigs.k8s.io/cli-utils), which Helm, Flux and Argo CD wait for: a request is being carried
/// out, or cannot be. Whether the breaker is open does not matter.
fn progress(result: &ResolvedBreaker, expected: usize, programmed: usize) -> [NewCondition; 2] {
    let refusal = result.refusal();
    let stalled = match refusal {
        Some(refusal) => ("Stalled", "True", refusal.reason.to_owned(), short(&refusal.message)),
        None => {
            ("Stalled", "False", "Accepted".to_owned(), "nothing keeps the request from being carried out".to_owned())
        }
    };
    let nodes = format!("on {programmed} of {expected} nodes");
    let reconciling = match () {
        () if refusal.is_some() => ("Reconciling", "False", "Stalled".to_owned(), "the request is refused".to_owned()),
        () if expected == 0 => ("Reconciling", "True", "NoAgents".to_owned(), "no node reports".to_owned()),
        () if programmed < expected => ("Reconciling", "True", "Pending".to_owned(), nodes),
        () => ("Reconciling", "False", "Programmed".to_owned(), nodes),
    };
    [reconciling, stalled]
}

/// Why nothing of a request is carried out; `None` if something is in force.
fn refusal_of_all(result: &ResolvedBreaker) -> Option<&Refusal> {
    result.refusal().filter(|_| result.services().next().is_none())
}

/// Name and pods of the backup from the node where it is weakest, and whether a backup is usable on every node.
fn backup_text<'a>(services: impl Iterator<Item = &'a ReportedService>) -> Option<(String, bool)> {
    let mut weakest: Option<(i32, String, bool)> = None;
    for service in services {
        let active = service.backups.iter().find(|t| t.active);
        let Some(tier) = active.or_else(|| service.backups.first()) else { continue };
        // A tier with pods that were not checked yet is not counted as unusable.
        let usable = active.is_some() || service.backups.iter().any(|t| t.checking > 0);
        let up = if usable { tier.up } else { -1 };
        if weakest.as_ref().is_none_or(|w| up < w.0) {
            weakest = Some((up, format!("{} {}/{}", tier.name, tier.up, tier.total), usable));
        }
    }
    weakest.map(|w| (w.1, w.2))
}

/// Number of new connections per minute over a limit, on all nodes, and the limit that is exceeded most often. `None`
/// if no limit is exceeded.
fn limited_text<'a>(services: impl Iterator<Item = &'a ReportedService>) -> Option<String> {
    let limited: Vec<_> = services.filter_map(|service| service.limited.as_ref()).collect();
    let most = limited.iter().max_by_key(|limit| limit.per_minute)?;
    Some(format!("{}/min {}", limited.iter().map(|limit| limit.per_minute).sum::<i64>(), most.limit))
}

/// Type, status, reason and message of a condition.
type NewCondition = (&'static str, &'static str, String, String);

/// Reason and message of condition Degraded; `None` if the protection is complete.
fn degraded(
    nodes: &[(NodeStatus, &Vec<&ReportedService>)],
    backup_usable: bool,
    reports: &NodeReports<'_>,
) -> Option<(&'static str, String)> {
    let live = || nodes.iter().map(|(node, _)| node).filter(|node| node.state.is_known());
    if let Some(node) = live().find(|node| node.error.is_some()) {
        let error = node.error.as_deref().unwrap_or_default();
        return Some(("WriteFailed", format!("{}: {error}", node.node)));
    }
    let failed = |n: &&&NodeReportView| n.ready && !n.report.spec.agent.failed_interfaces.is_empty();
    if let Some(node) = reports.nodes.iter().find(failed) {
        return Some((
            "NotAttached",
            format!("{}: {}", node.node, short(&node.report.spec.agent.failed_interfaces.join("; "))),
        ));
    }
    live().next()?;
    let suspended = nodes.iter().filter(|(node, _)| node.state.is_known());
    let mut suspended = suspended.flat_map(|(node, ports)| ports.iter().map(move |service| (node, service)));
    if let Some((node, service)) = suspended.find(|(_, service)| !service.suspended_on.is_empty()) {
        let text = format!(
            "{}: no answers of the backup are seen on {}, so new connections are left to kube-proxy there",
            node.node,
            service.suspended_on.join(", ")
        );
        return Some(("NoAnswerSeen", short(&text)));
    }
    if !backup_usable {
        return Some(("BackupUnavailable", "no backup is usable: in state Open, whenAllUnhealthy applies".into()));
    }
    let down =
        |s: &&&ReportedService| s.state == ReportedState::Closed && s.primary.up + s.primary.checking < s.primary.total;
    let open = live().filter(|node| node.state == ReportedState::Open).count();
    if open > 0 {
        return Some((
            "TrafficOnBackup",
            format!("the backup answers on {open} of {} nodes: it has no backup itself", live().count()),
        ));
    }
    let known = nodes.iter().filter(|(node, _)| node.state.is_known());
    let mut partly = known.flat_map(|(node, ports)| ports.iter().filter(down).map(move |s| (node, s)));
    if let Some((node, service)) = partly.next() {
        let (up, total) = (service.primary.up, service.primary.total);
        let text =
            format!("{}: {up} of {total} pods of the primary are Up, and clients reach the others, too", node.node);
        return Some(("PrimaryPartlyDown", text));
    }
    None
}

/// Why breaker cannot work on a node as it should: the reason of the condition, and a text.
fn incompatible(agent: &ReportedAgent) -> Option<(&'static str, &str)> {
    let hidden = agent.incompatible.as_deref().map(|why| ("SocketLoadBalancer", why));
    hidden.or_else(|| agent.bypass.as_deref().map(|why| ("OtherDatapath", why)))
}

fn conditions(
    result: &ResolvedBreaker,
    reports: &NodeReports<'_>,
    expected: usize,
    programmed: usize,
    degraded: Option<(&'static str, String)>,
) -> Vec<NewCondition> {
    let verdict = |type_: &'static str, outcome: &Result<(), Refusal>, good: &'static str, text: String| match outcome {
        Ok(()) => (type_, "True", good.to_owned(), text),
        Err(refusal) => (type_, "False", refusal.reason.to_owned(), short(&refusal.message)),
    };
    let notes = if result.notes.is_empty() { String::new() } else { format!(" ({})", result.notes.join("; ")) };
    let accepted = verdict("Accepted", &result.accepted, "Accepted", "the spec can be carried out".into());
    let resolved =
        verdict("ResolvedRefs", &result.resolved, "Resolved", short(&format!("all referenced Services exist{notes}")));
    let policies = "no known NetworkPolicy keeps the primary's clients from the backups";
    let reachable = verdict("BackupReachable", &result.reachable, "Reachable", policies.into());
    let agents = format!("on {programmed} of {expected} nodes");
    let in_kernel = match () {
        () if refusal_of_all(result).is_some() && programmed == 0 => {
            ("Programmed", "False", "NotResolved".to_owned(), "nothing is redirected".to_owned())
        }
        () if expected == 0 => ("Programmed", "Unknown", "NoAgents".into(), "no node reports".into()),
        () if programmed == expected => ("Programmed", "True", "Programmed".into(), agents),
        () if result.accepted.is_err() && result.services().next().is_some() => {
            ("Programmed", "False", "EarlierGeneration".into(), "the last valid spec stays in force".into())
        }
        () => ("Programmed", "False", "Pending".into(), agents),
    };
    let degraded = degraded.map_or_else(
        || ("Degraded", "False", "Whole".to_owned(), "primary and backup can answer".to_owned()),
        |(reason, text)| ("Degraded", "True", reason.to_owned(), text),
    );
    let live = || reports.nodes.iter().filter(|n| n.ready);
    let unseen = || {
        let notes = |n: &NodeReportView| Some((n.node.clone(), n.report.spec.agent.unseen.first()?.clone()));
        live().find_map(|n| notes(n))
    };
    let compatible = match (live().find_map(|n| Some((n.node.as_str(), incompatible(&n.report.spec.agent)?))), unseen())
    {
        (Some((node, (reason, why))), _) => {
            ("DatapathCompatible", "False", reason.to_owned(), short(&format!("{node}: {why}")))
        }
        (None, Some((node, why))) => {
            ("DatapathCompatible", "True", "PartlyCovered".to_owned(), short(&format!("{node}: {why}")))
        }
        (None, None) => {
            let blind = live().filter_map(|n| Some((n.node.as_str(), n.report.spec.agent.node_sockets.as_deref()?)));
            let text = match blind.clone().next() {
                None => "connections of pods, external clients and the nodes' own processes are redirected".to_owned(),
                Some((node, why)) => short(&format!(
                    "connections of pods and external clients are redirected; those of the own processes of {} nodes, \
                     and of their pods with hostNetwork, are not: {node}: {why}",
                    blind.count()
                )),
            };
            ("DatapathCompatible", "True", "Compatible".to_owned(), text)
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

/// Rounds a time down to whole seconds, the precision of a condition's time.
fn in_seconds(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// An Event to emit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// Whether it is a Warning.
    pub warning: bool,
    /// The Event's reason, one word in CamelCase.
    pub reason: String,
    /// The Event's note, for people.
    pub note: String,
    /// Whether an earlier Event of the same kind may be counted up. It keeps its first note, so an Event whose note
    /// matters is not counted.
    pub counted: bool,
}

/// An Event of type Warning.
fn warning(reason: &str, note: String) -> EventRecord {
    EventRecord { warning: true, ..normal(reason, note) }
}

/// An Event of type Normal.
fn normal(reason: &str, note: String) -> EventRecord {
    EventRecord { warning: false, reason: reason.to_owned(), note, counted: true }
}

/// Whether a backup, told as `name up/total`, has a pod that is Up.
fn answers(backup: &str) -> bool {
    let counts = backup.rsplit(' ').next().and_then(|counts| counts.split_once('/'));
    counts.is_some_and(|(up, _)| up.parse::<u32>().is_ok_and(|up| up > 0))
}

/// The Events for the change from status `old` to `new`. Without `old`, there are Events for problems only.
#[must_use]
pub fn event_records(old: Option<&CircuitBreakerStatus>, new: &CircuitBreakerStatus) -> Vec<EventRecord> {
    let mut found = Vec::new();
    let state = |status: Option<&CircuitBreakerStatus>| status.and_then(|s| s.state).unwrap_or_default();
    let (before, after) = (state(old), state(Some(new)));
    if before != after && !(old.is_none() && after == ReportedState::Closed) {
        let why = new.reason.as_deref().unwrap_or_default();
        let text = new.message.as_deref().map(|m| format!(": {m}")).unwrap_or_default();
        let nodes = format!("{} of {} nodes", new.counts.open, new.counts.nodes);
        match (before, after) {
            (_, ReportedState::Open) => {
                // An Event never says that a backup answers where none does.
                let to = match new.backup.as_deref() {
                    Some(backup) if answers(backup) => format!("go to {backup}"),
                    _ => "meet no usable backup, so whenAllUnhealthy applies".to_owned(),
                };
                // The operator's words would be lost if the Event were counted up: it keeps its first note.
                let counted = why != StateReason::Operator.label();
                let note = format!("{why}: new connections {to} ({nodes}){text}");
                found.push(EventRecord { counted, ..warning("Opened", note) })
            }
            (_, ReportedState::HalfOpen) => {
                found.push(normal("HalfOpen", format!("{why}: a few connections try the primary{text}")))
            }
            (ReportedState::Open | ReportedState::HalfOpen, ReportedState::Closed) => {
                found.push(normal("Closed", format!("{why}: new connections go to the primary{text}")))
            }
            _ => {}
        }
    }
    if let (None, Some(limited)) = (old.and_then(|old| old.limited.as_ref()), &new.limited) {
        let text = "new connections over the limit are refused, dropped or sent to the backup (limits.onLimit)";
        found.push(warning("Limited", format!("a limit is reached: {limited}; {text}")));
    }
    found.extend(reset_event(old, new));
    let find = |status: Option<&CircuitBreakerStatus>, type_: &str| -> Option<(String, String, String)> {
        let condition = status?.conditions.iter().find(|c| c.type_ == type_)?;
        Some((condition.status.clone(), condition.reason.clone(), condition.message.clone()))
    };
    for type_ in ["Accepted", "ResolvedRefs", "BackupReachable", "DatapathCompatible", "Programmed", "Degraded"] {
        let Some((status, reason, message)) = find(Some(new), type_) else { continue };
        let before = find(old, type_);
        let was = before.as_ref().map(|(status, reason, _)| (status.clone(), reason.clone()));
        // A refusal with another cause is another Event.
        let refused = matches!(type_, "Accepted" | "ResolvedRefs") && status == "False";
        let same_cause = !refused || before.as_ref().is_some_and(|(_, _, text)| *text == message);
        if was.as_ref() == Some(&(status.clone(), reason.clone())) && same_cause {
            continue;
        }
        let was_reason = was.as_ref().map(|w| w.1.as_str());
        match (type_, status.as_str(), reason.as_str()) {
            ("Accepted" | "ResolvedRefs" | "BackupReachable" | "DatapathCompatible", "False", _) => {
                found.push(EventRecord { counted: !refused, ..warning(&reason, message) })
            }
            ("ResolvedRefs", "True", _) if was.is_some() => found.push(normal("Resolved", message)),
            ("Programmed", "True", _) if old.is_some() && was.as_ref().is_none_or(|w| w.0 != "True") => {
                found.push(normal("Programmed", message));
            }
            ("Degraded", "True", "WriteFailed" | "NotAttached" | "NoAnswerSeen" | "BackupUnavailable") => {
                found.push(warning(&reason, message))
            }
            ("Degraded", _, _) if was_reason == Some("BackupUnavailable") => {
                if let Some(backup) = new.backup.as_deref().filter(|backup| answers(backup)) {
                    found.push(normal("BackupAvailable", format!("{backup} can take over again")));
                }
            }
            _ => {}
        }
    }
    found
}

/// The Event about established connections that were reset, once no node resets any more. The sum falls again as the nodes
/// return to the tier one after another, which is no Event.
fn reset_event(old: Option<&CircuitBreakerStatus>, new: &CircuitBreakerStatus) -> Option<EventRecord> {
    let done = |counts: &EstablishedCounts| counts.reset + counts.gone + counts.unreached;
    let counts = new.established.as_ref().filter(|counts| !counts.resetting && done(counts) > 0)?;
    let before = old.and_then(|old| old.established.as_ref());
    let has_grown =
        before.is_none_or(|before| before.resetting || before.tier != counts.tier || done(before) < done(counts));
    // The numbers would be lost if the Event were counted up: it keeps its first note.
    has_grown.then(|| EventRecord { counted: false, ..normal("ConnectionsReset", counts.words()) })
}

#[cfg(test)]
#[path = "aggregate_reports_tests.rs"]
mod tests;
