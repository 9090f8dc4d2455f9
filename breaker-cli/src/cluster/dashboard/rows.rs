//! Converts what the API server says to the rows of the page. All functions are pure.

use std::collections::{BTreeMap, BTreeSet};

use breaker_api::crd::{
    GONE, Mode, NodeReportSpec, NodeStatus, Override, OwnerKind, RefusedService, ReportedService, ReportedState,
    ReportedTier,
};
use breaker_web::rows::{
    BreakerRow, CommandLine, ConditionRow, Detail, EventRow, NodeDetail, NodeRow, OverrideRow, Problem, Severity,
    Status, Ups,
};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::ResourceExt as _;

use super::{
    super::{
        args::ConnectionArgs,
        events,
        overview::{self, BreakerView},
    },
    world::World,
};

/// Everything that the API server says, at one time.
pub(super) struct Cluster {
    breakers: Vec<BreakerView>,
    /// By the name of the node, in order.
    reports: Vec<(String, NodeReportSpec)>,
    /// Where the entries of each object are in the reports: the report, and the entry.
    places: BTreeMap<Owner, Vec<(usize, usize)>>,
    /// Nodes that the elected agent calls Unknown.
    unknown: BTreeSet<String>,
    /// Services whose annotations are refused, by namespace and name.
    refused: BTreeMap<(String, String), RefusedService>,
    /// Fill level of the flow tables by node, in percent, as far as it is known.
    fill: BTreeMap<String, u8>,
    now: Timestamp,
}

/// An object that asks for protection: its kind, namespace and name.
type Owner = (OwnerKind, String, String);

/// A breaker on one node: the entries of its ports, the most open state first.
struct OnNode<'a> {
    node: &'a str,
    entries: Vec<&'a ReportedService>,
}

impl Cluster {
    /// `fill`: fill level of the flow tables by node, in percent, as far as it is known.
    pub fn of(world: &World, fill: BTreeMap<String, u8>, now: Timestamp) -> Self {
        let breakers = world.breakers.state().iter().map(|breaker| BreakerView::from((**breaker).clone())).collect();
        let reports = world.reports.state().iter().map(|report| (report.name_any(), report.spec.clone())).collect();
        Self::new(breakers, reports, world.namespace.as_deref(), fill, now)
    }

    /// `namespace`: the one that is shown; `None` = all.
    fn new(
        breakers: Vec<BreakerView>,
        mut reports: Vec<(String, NodeReportSpec)>,
        namespace: Option<&str>,
        fill: BTreeMap<String, u8>,
        now: Timestamp,
    ) -> Self {
        let is_shown = |of: &str| namespace.is_none_or(|namespace| namespace == of);
        reports.sort_by(|a, b| a.0.cmp(&b.0));
        let mut places: BTreeMap<Owner, Vec<(usize, usize)>> = BTreeMap::new();
        let mut refused = BTreeMap::new();
        for (place, (_, report)) in reports.iter().enumerate() {
            for (number, entry) in report.services.iter().enumerate().filter(|(_, entry)| is_shown(&entry.namespace)) {
                let Some(kind) = entry.kind else { continue };
                places.entry((kind, entry.namespace.clone(), entry.name.clone())).or_default().push((place, number));
            }
            let services = report.refused.iter().filter(|service| is_shown(&service.namespace));
            refused
                .extend(services.map(|service| ((service.namespace.clone(), service.name.clone()), service.clone())));
        }
        let said = breakers.iter().filter_map(|breaker| breaker.status.as_ref()).flat_map(|status| &status.nodes);
        let unknown = said.filter(|said| said.state == ReportedState::Unknown).map(|said| said.node.clone()).collect();
        Self { breakers, reports, places, unknown, refused, fill, now }
    }

    /// A line for each CircuitBreaker, and for each annotated Service of the namespaces that are shown.
    pub fn breakers(&self) -> Vec<BreakerRow> {
        let circuit_breakers = self.breakers.iter().map(|breaker| self.row(breaker));
        let annotated = self.annotated();
        let annotated = annotated.iter().map(|(namespace, name)| self.annotated_row(namespace, name));
        circuit_breakers.chain(annotated).collect()
    }

    /// The breaker's key for each name under which agents know a part of it.
    pub fn services(&self) -> BTreeMap<String, String> {
        let mut names = BTreeMap::new();
        for breaker in &self.breakers {
            let key = format!("{}/{}", breaker.namespace, breaker.name);
            for on_node in self.on_nodes(OwnerKind::CircuitBreaker, &breaker.namespace, &breaker.name) {
                names.extend(service_names(&on_node, &breaker.spec.service.name).map(|name| (name, key.clone())));
            }
        }
        for (namespace, name) in &self.annotated() {
            for on_node in self.on_nodes(OwnerKind::Service, namespace, name) {
                names.extend(service_names(&on_node, name).map(|found| (found, format!("{namespace}/svc/{name}"))));
            }
        }
        names
    }

    /// A line for each node with a report.
    pub fn nodes(&self) -> Vec<NodeRow> {
        self.reports.iter().map(|(node, report)| self.node(node, report)).collect()
    }

    /// Everything about one breaker. `prefix`: the words of a command before its verb. `None`: there is no such breaker.
    pub fn detail(&self, key: &str, prefix: &[String]) -> Option<Detail> {
        let (namespace, name) = key.split_once('/')?;
        if let Some(service) = name.strip_prefix("svc/") {
            self.annotated().contains(&(namespace.to_owned(), service.to_owned())).then_some(())?;
            let nodes = self.node_details(OwnerKind::Service, namespace, service, service);
            let facts = vec![("Service".into(), format!("{service}, protected by its annotations"))];
            let breaker = self.annotated_row(namespace, service);
            return Some(Detail { breaker, facts, conditions: Vec::new(), nodes, commands: Vec::new() });
        }
        let breaker = self.breakers.iter().find(|view| view.namespace == namespace && view.name == name)?;
        let service = &breaker.spec.service.name;
        let backups: Vec<&str> = breaker.spec.backups.iter().map(|backup| backup.name.as_str()).collect();
        let facts =
            vec![("Service".into(), service.clone()), ("Backups, in order of preference".into(), backups.join(", "))];
        let conditions = breaker.status.iter().flat_map(|status| &status.conditions);
        let conditions = conditions.map(|condition| ConditionRow {
            name: condition.type_.clone(),
            status: condition.status.clone(),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
            since: condition.last_transition_time.0,
            severity: severity(condition),
        });
        let command = |purpose: &str, verb: &[&str]| {
            let words = prefix.iter().map(String::as_str).chain(["-n", namespace]).chain(verb.iter().copied());
            CommandLine::new(purpose, "kubectl breaker", &words.collect::<Vec<&str>>())
        };
        let trip = ["trip", name, "--for", "10m", "--reason", "why"];
        Some(Detail {
            breaker: self.row(breaker),
            facts,
            conditions: conditions.collect(),
            nodes: self.node_details(OwnerKind::CircuitBreaker, namespace, name, service),
            commands: vec![
                command("Send new connections to the backup on all nodes, for ten minutes", &trip),
                command("End the override: the checks decide again", &["reset", name]),
                command("Show its connections", &["flows", name]),
                command("Show everything about it", &["get", name]),
                command("Follow its Events", &["events", name, "-w"]),
            ],
        })
    }

    fn row(&self, view: &BreakerView) -> BreakerRow {
        let status = view.status.clone().unwrap_or_default();
        let nodes = self.on_nodes(OwnerKind::CircuitBreaker, &view.namespace, &view.name);
        let state = status.state.unwrap_or_default();
        let problems = status.conditions.iter().filter_map(|condition| {
            let text =
                format!("{}={} ({}): {}", condition.type_, condition.status, condition.reason, condition.message);
            Some(Problem { severity: severity(condition)?, text })
        });
        let mut problems: Vec<Problem> = problems.collect();
        problems.sort_by_key(|problem| problem.severity == Severity::Warning);
        let (primary, backup) = if nodes.is_empty() { ups_of_status(&status.nodes) } else { ups_of_nodes(&nodes) };
        let override_ = (view.spec.r#override != Override::Auto
            && view.spec.until.is_none_or(|until| until > self.now))
        .then(|| OverrideRow {
            mode: view.spec.r#override.label().into(),
            until: view.spec.until,
            reason: view.override_reason.clone(),
        });
        let row = BreakerRow {
            namespace: view.namespace.clone(),
            name: view.name.clone(),
            status: Status {
                state,
                since: status.since,
                reason: status.reason.clone().unwrap_or_default(),
                // A problem says it.
                message: status.message.clone().filter(|_| state != ReportedState::NotProtected).unwrap_or_default(),
                share: permille(status.share.as_deref()),
                primary,
                backup,
                problems,
            },
            dry_run: view.spec.mode == Mode::DryRun,
            override_,
            when_all_unhealthy: Some(view.spec.when_all_unhealthy),
            on_nodes: self.letters(&nodes, &status.nodes),
            ..BreakerRow::default()
        };
        row.ranked()
    }

    fn annotated_row(&self, namespace: &str, name: &str) -> BreakerRow {
        let nodes = self.on_nodes(OwnerKind::Service, namespace, name);
        let entries: Vec<&ReportedService> = nodes.iter().flat_map(|on_node| &on_node.entries).copied().collect();
        let refused = self.refused.get(&(namespace.to_owned(), name.to_owned()));
        let refusal =
            refused.map(|refused| Problem::error(format!("refused ({}): {}", refused.reason, refused.message)));
        let not_protected = if refused.is_some() { ReportedState::NotProtected } else { ReportedState::NotProgrammed };
        let worst = entries.iter().copied().max_by_key(|entry| entry.state.openness());
        let mut status = worst.map_or_else(
            || Status { state: not_protected, share: 1000, ..Status::default() },
            |worst| status_of(worst, &entries),
        );
        status.problems.splice(..0, refusal);
        status.problems.dedup();
        let row = BreakerRow {
            namespace: namespace.into(),
            name: format!("svc/{name}"),
            status,
            on_nodes: self.letters(&nodes, &[]),
            ..BreakerRow::default()
        };
        row.ranked()
    }

    /// Namespaces and names of Services that annotations protect, or would protect.
    fn annotated(&self) -> BTreeSet<(String, String)> {
        let services = self.places.keys().filter(|(kind, ..)| *kind == OwnerKind::Service);
        let services = services.map(|(_, namespace, name)| (namespace.clone(), name.clone()));
        services.chain(self.refused.keys().cloned()).collect()
    }

    fn on_nodes(&self, kind: OwnerKind, namespace: &str, name: &str) -> Vec<OnNode<'_>> {
        let mut nodes: Vec<OnNode<'_>> = Vec::new();
        let places = self.places.get(&(kind, namespace.to_owned(), name.to_owned()));
        for (place, number) in places.into_iter().flatten() {
            let (node, report) = &self.reports[*place];
            let entry = &report.services[*number];
            match nodes.last_mut().filter(|last| last.node == node) {
                Some(last) => last.entries.push(entry),
                None => nodes.push(OnNode { node, entries: vec![entry] }),
            }
        }
        for on_node in &mut nodes {
            on_node.entries.sort_by_key(|entry| std::cmp::Reverse(entry.state.openness()));
        }
        nodes
    }

    /// Whether a node's report has no agent behind it any more. The elected agent knows earlier than the age of the
    /// report tells, because it sees the Node.
    fn is_silent(&self, node: &str, report: &NodeReportSpec) -> bool {
        (self.unknown.contains(node) || self.is_old(report)) && !self.fill.contains_key(node)
    }

    fn is_old(&self, report: &NodeReportSpec) -> bool {
        report.agent.reported_at.is_none_or(|at| self.now.duration_since(at) > GONE)
    }

    /// The states in the order of the nodes. `status`: what the elected agent says of nodes.
    fn letters(&self, nodes: &[OnNode<'_>], status: &[NodeStatus]) -> String {
        let letter = |(node, report): &(String, NodeReportSpec)| {
            let said = status.iter().find(|status| status.node == *node).map(|status| status.state);
            if self.is_old(report) || said == Some(ReportedState::Unknown) {
                return '?';
            }
            let on_node = nodes.iter().find(|on_node| on_node.node == node);
            match on_node.and_then(worst).map(|entry| entry.state) {
                None => '-',
                Some(ReportedState::Closed) => 'C',
                Some(ReportedState::HalfOpen) => 'H',
                Some(ReportedState::Open) => 'O',
                Some(ReportedState::NotProgrammed | ReportedState::NotProtected) => 'N',
                Some(ReportedState::Unknown) => '?',
            }
        };
        self.reports.iter().map(letter).collect()
    }

    fn node(&self, name: &str, report: &NodeReportSpec) -> NodeRow {
        let agent = &report.agent;
        let failed =
            agent.failed_interfaces.iter().map(|interface| Problem::error(format!("not attached to {interface}")));
        let errors = failed.chain(agent.incompatible.iter().map(Problem::error));
        let words = agent.bypass.iter().chain(&agent.degraded).chain(&agent.unseen);
        let problems = errors.chain(words.map(Problem::warning)).collect();
        NodeRow {
            name: name.into(),
            version: agent.version.clone(),
            attach: agent.attach.map_or("", |attach| attach.label()).into(),
            interfaces: count(agent.interfaces),
            services: count(agent.services),
            open: count(agent.open),
            fill: self.fill.get(name).copied(),
            heard: agent.reported_at,
            silent: self.is_silent(name, report),
            problems,
        }
    }

    /// `service`: the name of the protected Service.
    fn node_details(&self, kind: OwnerKind, namespace: &str, name: &str, service: &str) -> Vec<NodeDetail> {
        let detail = |on_node: &OnNode<'_>| {
            let status = status_of(worst(on_node)?, &on_node.entries);
            Some(NodeDetail { node: on_node.node.into(), services: service_names(on_node, service).collect(), status })
        };
        self.on_nodes(kind, namespace, name).iter().filter_map(detail).collect()
    }
}

/// The entry of the port with the most open state.
fn worst<'a>(on_node: &OnNode<'a>) -> Option<&'a ReportedService> {
    on_node.entries.first().copied()
}

/// The status that entries have together. `worst`: the one whose state counts.
fn status_of(worst: &ReportedService, entries: &[&ReportedService]) -> Status {
    let (primary, backup) = ups_of_entries(entries);
    Status {
        state: worst.state,
        since: worst.since,
        reason: worst.reason.map_or("", |reason| reason.label()).into(),
        message: worst.message.clone(),
        share: u16::try_from(worst.share).unwrap_or(1000),
        primary,
        backup,
        problems: entries.iter().flat_map(|entry| problems_of(entry)).collect(),
    }
}

/// The names under which the agents know the parts of a breaker.
fn service_names<'a>(on_node: &OnNode<'a>, service: &'a str) -> impl Iterator<Item = String> + use<'a> {
    on_node.entries.clone().into_iter().map(move |entry| entry.service_name(service))
}

fn problems_of(entry: &ReportedService) -> Vec<Problem> {
    let port = entry.port;
    let error = entry.error.iter().map(|error| Problem::not_applied(&format!("port {port}: {error}")));
    let limited = entry.limited.iter();
    let limited =
        limited.map(|limited| Problem::limited(&format!("port {port}: {}", limited.limit), limited.per_minute));
    let suspended = entry.suspended_on.iter().map(|interface| Problem::suspended(interface));
    error.chain(limited).chain(suspended).collect()
}

fn severity(condition: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition) -> Option<Severity> {
    overview::severity(condition).map(|severity| match severity {
        overview::Severity::Warning => Severity::Warning,
        overview::Severity::Error => Severity::Error,
    })
}

fn ups(tier: &ReportedTier) -> Ups {
    Ups { up: count(tier.up), total: count(tier.total) }
}

fn count(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

/// Of several views, the one with the fewest pods that are Up.
fn fewest(views: impl Iterator<Item = Ups>) -> Ups {
    views.min_by_key(|ups| ups.up).unwrap_or_default()
}

/// The primary's pods, and those of the backup that takes over.
fn ups_of_entries(entries: &[&ReportedService]) -> (Ups, Ups) {
    let backup = |entry: &&ReportedService| {
        let active = entry.backups.iter().find(|tier| tier.active);
        active.or_else(|| entry.backups.iter().find(|tier| tier.up > 0)).or_else(|| entry.backups.first()).map(ups)
    };
    (fewest(entries.iter().map(|entry| ups(&entry.primary))), fewest(entries.iter().filter_map(backup)))
}

fn ups_of_nodes(nodes: &[OnNode<'_>]) -> (Ups, Ups) {
    let views: Vec<(Ups, Ups)> = nodes.iter().map(|on_node| ups_of_entries(&on_node.entries)).collect();
    (fewest(views.iter().map(|view| view.0)), fewest(views.iter().map(|view| view.1)))
}

/// For callers who may not read the reports: the status has the same, in words.
fn ups_of_status(nodes: &[NodeStatus]) -> (Ups, Ups) {
    let parse = |words: &str| {
        let (up, total) = words.rsplit(' ').next()?.split_once('/')?;
        Some(Ups { up: up.parse().ok()?, total: total.parse().ok()? })
    };
    let ports = || nodes.iter().flat_map(|node| &node.ports);
    (fewest(ports().filter_map(|port| parse(&port.primary))), fewest(ports().filter_map(|port| parse(&port.backup))))
}

/// A share like `37%` as permille; all of it if it is not known.
fn permille(share: Option<&str>) -> u16 {
    share.and_then(|share| share.trim_end_matches('%').trim().parse::<u16>().ok()).map_or(1000, |percent| percent * 10)
}

/// An Event of the API server.
pub(super) fn event(event: &Event, id: u64) -> EventRow {
    let about = &event.involved_object;
    let name = about.name.clone().unwrap_or_default();
    let name = if about.kind.as_deref() == Some("Service") { format!("svc/{name}") } else { name };
    let reason = event.reason.clone().unwrap_or_default();
    EventRow {
        id,
        at: events::last(event),
        breaker: format!("{}/{name}", about.namespace.as_deref().unwrap_or_default()),
        to: match reason.as_str() {
            "Opened" => Some(ReportedState::Open),
            "HalfOpen" => Some(ReportedState::HalfOpen),
            "Closed" => Some(ReportedState::Closed),
            _ => None,
        },
        kind: reason,
        message: event.message.clone().unwrap_or_default(),
        is_warning: event.type_.as_deref() == Some("Warning"),
    }
}

/// The options that name the same cluster and identity in a command.
pub(super) fn command_prefix(how: &ConnectionArgs) -> Vec<String> {
    let option = |name: &str, value: &Option<String>| {
        value.iter().flat_map(|value| [name.to_owned(), value.clone()]).collect::<Vec<String>>()
    };
    let kubeconfig = how.kubeconfig.as_ref().map(|path| path.display().to_string());
    let groups = how.groups.iter().flat_map(|group| ["--as-group".to_owned(), group.clone()]).collect();
    let identity = [option("--as", &how.user), groups];
    [option("--kubeconfig", &kubeconfig), option("--context", &how.context), identity.concat()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use breaker_web::rows::Attention;
    use serde_json::{Value, json};

    fn cluster(breakers: Value, reports: Value) -> Cluster {
        let reports: BTreeMap<String, NodeReportSpec> = serde_json::from_value(reports).unwrap();
        let now = "2026-11-28T12:00:00Z".parse().unwrap();
        let breakers = serde_json::from_value(breakers).unwrap();
        Cluster::new(breakers, reports.into_iter().collect(), Some("prod"), BTreeMap::new(), now)
    }

    fn breaker(status: Value) -> Value {
        let spec = json!({ "service": { "name": "shop" }, "backups": [{ "name": "shop-backup" }] });
        json!([{ "namespace": "prod", "name": "web", "spec": spec, "status": status }])
    }

    fn report(at: &str, state: &str, up: i32) -> Value {
        json!({
            "agent": { "reportedAt": at, "version": "0.1.0", "attach": "Tcx", "interfaces": 5 },
            "services": [{
                "kind": "CircuitBreaker", "namespace": "prod", "name": "web", "port": 80, "state": state, "share": 0,
                "primary": { "name": "primary", "up": up, "total": 3 },
                "backups": [{ "name": "shop-backup", "up": 2, "total": 2 }],
            }],
        })
    }

    #[test]
    fn a_row_shows_the_fewest_pods_and_the_state_of_each_node() {
        let reports = json!({
            "a": report("2026-11-28T11:59:00Z", "Closed", 3),
            "b": report("2026-11-28T11:59:00Z", "Open", 0),
            "c": report("2026-11-28T11:00:00Z", "Closed", 3),
            "d": { "agent": { "reportedAt": "2026-11-28T11:59:00Z" }, "services": [] },
        });
        let status = json!({ "state": "Open", "reason": "ConnectFailed", "share": "50%" });
        let cluster = cluster(breaker(status), reports);
        let row = &cluster.breakers()[0];
        assert_eq!((row.key().as_str(), row.on_nodes.as_str()), ("prod/web", "CO?-"));
        assert_eq!((row.status.primary, row.status.backup), (Ups { up: 0, total: 3 }, Ups { up: 2, total: 2 }));
        assert_eq!((row.status.share, row.attention), (500, Attention::Open));
        assert_eq!(cluster.services(), BTreeMap::from([("prod/shop:80".into(), "prod/web".into())]));
        let silent: Vec<bool> = cluster.nodes().iter().map(|node| node.silent).collect();
        assert_eq!(silent, [false, false, true, false]);
    }

    /// The elected agent sees a Node that is gone before its report is old.
    #[test]
    fn a_node_that_the_status_calls_unknown_is_silent() {
        let status = json!({ "state": "Closed", "nodes": [{ "node": "a", "state": "Unknown" }] });
        let reports = json!({ "a": report("2026-11-28T11:59:00Z", "Closed", 3) });
        let cluster = cluster(breaker(status), reports);
        assert!(cluster.nodes()[0].silent);
        assert_eq!(cluster.breakers()[0].on_nodes, "?");
    }

    #[test]
    fn without_the_right_to_read_reports_the_status_has_the_pods() {
        let status = json!({
            "state": "Closed",
            "nodes": [{ "node": "a", "state": "Closed", "ports": [{ "port": 80, "state": "Closed", "primary": "1/2", "backup": "4/4" }] }],
        });
        let row = cluster(breaker(status), json!({})).breakers().remove(0);
        assert_eq!((row.status.primary, row.status.backup), (Ups { up: 1, total: 2 }, Ups { up: 4, total: 4 }));
    }

    #[test]
    fn a_refused_breaker_says_why_once() {
        let condition = json!({
            "type": "ResolvedRefs", "status": "False", "reason": "BackupNotFound", "message": "there is no Service x",
            "lastTransitionTime": "2026-11-28T11:00:00Z",
        });
        let status = json!({
            "state": "NotProtected", "reason": "BackupNotFound", "message": "there is no Service x",
            "conditions": [condition],
        });
        let row = cluster(breaker(status), json!({})).breakers().remove(0);
        assert_eq!(row.attention, Attention::Failure);
        assert_eq!((row.status.message.as_str(), row.status.problems.len()), ("", 1));
        assert!(
            row.status.problems[0].text.starts_with("ResolvedRefs=False (BackupNotFound)"),
            "{:?}",
            row.status.problems
        );
    }

    #[test]
    fn commands_name_the_same_cluster_and_namespace() {
        let how = ConnectionArgs { context: Some("prod eu".into()), ..ConnectionArgs::default() };
        let cluster = cluster(breaker(json!({})), json!({}));
        let detail = cluster.detail("prod/web", &command_prefix(&how)).unwrap();
        assert_eq!(detail.commands[1].line, "kubectl breaker --context 'prod eu' -n prod reset web");
        assert!(cluster.detail("prod/none", &[]).is_none());
    }

    #[test]
    fn annotated_services_have_rows_of_their_own() {
        let mut report = report("2026-11-28T11:59:00Z", "Open", 0);
        report["services"][0]["kind"] = json!("Service");
        report["services"][0]["name"] = json!("shop");
        report["refused"] = json!([
            { "namespace": "prod", "name": "cart", "reason": "Invalid", "message": "breaker.dev/backup: …" },
            { "namespace": "other", "name": "hidden", "reason": "Invalid" },
        ]);
        let cluster = cluster(json!([]), json!({ "a": report }));
        let rows: Vec<(String, ReportedState)> =
            cluster.breakers().iter().map(|row| (row.key(), row.status.state)).collect();
        assert_eq!(
            rows,
            [("prod/svc/cart".into(), ReportedState::NotProtected), ("prod/svc/shop".into(), ReportedState::Open)]
        );
        assert!(cluster.detail("prod/svc/shop", &[]).unwrap().nodes[0].services == ["prod/shop:80"]);
    }
}
