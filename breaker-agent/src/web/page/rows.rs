//! Converts statuses and events of this node to the rows of the page.

use breaker_api::{
    BreakerState,
    crd::{Mode, Override, ReportedState},
    events::{EventLine, EventType, NO_SERVICE},
    status::{AgentStatus, Health, ServiceStatus, SuspendedPath, TierStatus},
    tier::TierRole,
};
use breaker_web::rows::{
    BreakerRow, CommandLine, Counts, Detail, EventRow, NodeDetail, NodeRow, OverrideRow, Problem, Status, Ups,
};

const fn state(state: BreakerState) -> ReportedState {
    match state {
        BreakerState::Closed => ReportedState::Closed,
        BreakerState::HalfOpen => ReportedState::HalfOpen,
        BreakerState::Open => ReportedState::Open,
    }
}

fn ups(tier: Option<&TierStatus>) -> Ups {
    let backends = tier.map(|tier| &tier.backends[..]).unwrap_or_default();
    let is_up = |health| matches!(health, Health::Up | Health::Unchecked);
    Ups { up: number(backends.iter().filter(|backend| is_up(backend.health)).count()), total: number(backends.len()) }
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The backup that takes over: the active one, otherwise the first that has a usable backend, otherwise the first.
fn backup(service: &ServiceStatus) -> Option<&TierStatus> {
    let backups = || service.tiers.iter().filter(|tier| tier.role == TierRole::Backup);
    let usable = || backups().find(|tier| ups(Some(tier)).up > 0);
    backups().find(|tier| tier.active).or_else(usable).or_else(|| backups().next())
}

/// Namespace and name of a service: `NAMESPACE/SERVICE:PORT` in Kubernetes.
fn namespace_and_name(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or(("", name))
}

/// A line of the table.
pub(super) fn breaker(service: &ServiceStatus, suspended: &[SuspendedPath]) -> BreakerRow {
    let (namespace, name) = namespace_and_name(&service.name);
    let mut problems = Vec::new();
    problems.extend(service.error.as_deref().map(Problem::not_applied));
    let paths = suspended.iter().filter(|path| path.service == service.name);
    problems.extend(paths.map(|path| Problem::suspended(&path.interface)));
    let limited = service.limits.as_ref().and_then(|limits| limits.limited.as_ref());
    problems.extend(limited.map(|limited| Problem::limited(&limited.limit, limited.per_minute)));
    let backup = ups(backup(service));
    if backup.up == 0 {
        problems.push(Problem::warning("no pod of a backup is Up"));
    }
    let row = BreakerRow {
        namespace: namespace.into(),
        name: name.into(),
        status: Status {
            state: state(service.state),
            since: Some(service.since),
            reason: service.reason.map_or("", |reason| reason.label()).into(),
            message: service.message.clone(),
            share: service.share,
            primary: ups(service.tiers.iter().find(|tier| tier.role == TierRole::Primary)),
            backup,
            problems,
        },
        dry_run: service.mode == Some(Mode::DryRun),
        override_: (service.override_ != Override::Auto).then(|| OverrideRow {
            mode: service.override_.label().into(),
            until: service.override_until,
            reason: None,
        }),
        when_all_unhealthy: service.when_all_unhealthy,
        ..BreakerRow::default()
    };
    row.ranked()
}

pub(super) fn counts(service: &ServiceStatus) -> Counts {
    let counters = &service.counters;
    Counts {
        primary: counters.new_primary,
        backup: counters.moved,
        rejected: counters.rejected,
        flows: u64::try_from(service.flows).unwrap_or(u64::MAX),
    }
}

/// Returns `true` if a service's breaker is open.
pub(super) fn is_open(service: &ServiceStatus) -> bool {
    service.state == BreakerState::Open
}

/// The line of this node, with the number of its services, and of those that are open.
pub(super) fn node(name: &str, agent: &AgentStatus, services: usize, open: usize) -> NodeRow {
    let datapath = &agent.datapath;
    let failed = datapath.failed_interfaces.iter();
    let failed = failed.map(|(interface, why)| Problem::error(format!("not attached to {interface}: {why}")));
    let words = agent.degraded.iter().chain(&datapath.notes);
    let problems = failed.chain(words.map(Problem::warning)).collect();
    NodeRow {
        name: name.into(),
        version: agent.version.clone(),
        attach: datapath.attach.map_or("", |attach| attach.label()).into(),
        interfaces: number(datapath.interfaces.len()),
        services: number(services),
        open: number(open),
        fill: Some(datapath.flow_pressure),
        heard: agent.last_beat,
        silent: false,
        problems,
    }
}

/// Returns `true` if everybody on this node may see an event. Events about single packets have addresses of clients.
pub(super) const fn is_public(event: &EventLine) -> bool {
    match event.kind {
        EventType::FlowMoved | EventType::Rejected | EventType::FlowReset | EventType::Unknown => false,
        EventType::Transition
        | EventType::Health
        | EventType::LocalError
        | EventType::LeftOut
        | EventType::Limited
        | EventType::StateAdopted
        | EventType::WriteFailed
        | EventType::WriteRecovered
        | EventType::FlowPressure
        | EventType::Restored
        | EventType::ReturnPath
        | EventType::Resets
        | EventType::Config
        | EventType::ConfigRefused => true,
    }
}

pub(super) fn event(event: &EventLine) -> EventRow {
    let is_warning = match event.kind {
        EventType::LocalError
        | EventType::LeftOut
        | EventType::Limited
        | EventType::WriteFailed
        | EventType::FlowPressure
        | EventType::Restored
        | EventType::ReturnPath
        | EventType::ConfigRefused => true,
        EventType::Transition
        | EventType::Health
        | EventType::StateAdopted
        | EventType::FlowMoved
        | EventType::Rejected
        | EventType::FlowReset
        | EventType::WriteRecovered
        | EventType::Resets
        | EventType::Config
        | EventType::Unknown => false,
    };
    EventRow {
        id: event.id,
        at: event.at,
        breaker: if event.service == NO_SERVICE { String::new() } else { event.service.clone() },
        kind: event.kind.label().into(),
        message: event.message.clone(),
        to: event.to.map(state),
        is_warning,
    }
}

/// Everything about one breaker. The page asks for pods and checks by the name of the service.
pub(super) fn detail(node: &str, service: &ServiceStatus, suspended: &[SuspendedPath]) -> Detail {
    let row = breaker(service, suspended);
    let mut facts = vec![
        ("Clients connect to".to_owned(), service.frontends.join(", ")),
        ("Trips in a row".to_owned(), service.trips.to_string()),
    ];
    if service.local_errors > 0 {
        facts.push(("Checks without a result".to_owned(), service.local_errors.to_string()));
    }
    let name = &service.name;
    let commands = [
        (
            "Send new connections from this node to the backup, for ten minutes",
            &["trip", name, "--for", "10m", "--reason", "why"][..],
        ),
        ("End the override: the checks decide again", &["reset", name]),
        ("Show its connections", &["flows", name]),
        ("Show everything about it", &["get", name]),
        ("Follow all events", &["events", "--follow"]),
    ];
    Detail {
        facts,
        conditions: Vec::new(),
        nodes: vec![NodeDetail { node: node.into(), services: vec![name.clone()], status: row.status.clone() }],
        commands: commands.map(|(purpose, words)| CommandLine::new(purpose, "breaker", words)).into(),
        breaker: row,
    }
}
