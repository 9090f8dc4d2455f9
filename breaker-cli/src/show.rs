//! Text output about one node: services, events, flows, findings.

use std::{fmt::Write as _, time::Duration};

use breaker_api::{
    BreakerState, PassReason, StateReason,
    crd::{AttachMode, FastPath, LimitScope, Mode, Override},
    established::EstablishedCounts,
    events::{EventLine, EventType},
    flows::FlowView,
    limits::{LimitsStatus, TierLimitsStatus},
    preflight::{Finding, Verdict},
    status::{AgentStatus, BackendStatus, CheckCode, Health, ServiceStatus, TierStatus},
};
use jiff::Timestamp;

use crate::table::{BOLD, Cell, DIM, GREEN, Paint, RED, Table, YELLOW, plain};

pub(crate) const fn state_colour(state: BreakerState) -> &'static str {
    match state {
        BreakerState::Closed => GREEN,
        BreakerState::Open => RED,
        BreakerState::HalfOpen => YELLOW,
    }
}

/// The time since `since`, like `12 s`, `3 min`, `5 h` or `2 d`.
pub(crate) fn ago(since: Timestamp) -> String {
    let seconds = Duration::try_from(Timestamp::now().duration_since(since)).unwrap_or_default().as_secs();
    duration(seconds)
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The time until `until`, as [`ago`].
pub(crate) fn until(until: Timestamp) -> String {
    let seconds = Duration::try_from(until.duration_since(Timestamp::now())).unwrap_or_default().as_secs();
    duration(seconds)
}

/// A share in permille, as a percentage.
pub(crate) fn percent(share: u16) -> String {
    if share.is_multiple_of(10) { format!("{} %", share / 10) } else { format!("{}.{} %", share / 10, share % 10) }
}

/// The status of the agent and its services.
pub(crate) fn status(status: &AgentStatus, paint: Paint) -> String {
    let mut text = String::new();
    if status.running {
        let interfaces = status.datapath.interfaces.len();
        let plural = if interfaces == 1 { "" } else { "s" };
        let _ = writeln!(
            text,
            "breaker {}: agent running (pid {}), {} on {interfaces} interface{plural}{}, {} flow entries",
            status.version,
            status.pid,
            status.datapath.attach.map_or("", AttachMode::label),
            if status.datapath.node_sockets.is_none() { " and the node's sockets" } else { "" },
            status.datapath.flow_entries
        );
        if let Some(why) = status.datapath.node_sockets.as_deref().filter(|why| *why != "switched off") {
            let words = format!("the node's own processes are not protected: {why}");
            let _ = writeln!(text, "{}", paint.with(YELLOW, &words));
        }
        if let Some(probes) = status.probes.filter(|probes| probes.waiting > 0) {
            let words = format!(
                "{} checks wait for their turn: this process can make {} at a time (its limit of descriptors)",
                probes.waiting, probes.limit
            );
            let _ = writeln!(text, "{}", paint.with(RED, &words));
        }
        for problem in &status.degraded {
            let _ = writeln!(text, "{}", paint.with(YELLOW, problem));
        }
        if status.lost_log_lines > 0 {
            let words = format!("{} lines of the agent's log are lost: it could not be written", status.lost_log_lines);
            let _ = writeln!(text, "{}", paint.with(YELLOW, &words));
        }
        if status.panics > 0 {
            let words = format!("{} faults (panics) in the agent, please report them: see its log", status.panics);
            let _ = writeln!(text, "{}", paint.with(RED, &words));
        }
        if status.datapath.flow_pressure >= 80 {
            let words = format!("the table of established flows is {} % full", status.datapath.flow_pressure);
            let _ = writeln!(text, "{}", paint.with(RED, &words));
        }
    } else {
        let since = status.last_beat.map_or_else(|| "an unknown time".to_owned(), ago);
        let gone = if status.hung {
            format!("the agent (pid {}) does not answer; its last heartbeat was {since} ago", status.pid)
        } else {
            format!("the agent has been gone for {since} (its pid was {})", status.pid)
        };
        let _ = writeln!(text, "{}", paint.with(RED, &gone));
        let lease = Duration::from_secs(status.lease_seconds);
        let silent = status
            .last_beat
            .map(|beat| Duration::try_from(Timestamp::now().duration_since(beat)).unwrap_or_default())
            .unwrap_or_default();
        let words = if lease.is_zero() || silent < lease {
            "the programs continue with the decisions below; no checks run".to_owned()
        } else {
            format!("its lease of {} s is over, so onAgentLoss applies; its last decisions are below", lease.as_secs())
        };
        let _ = writeln!(text, "{words}");
    }
    for (name, restored) in &status.datapath.restored {
        let times = if restored.count == 1 { "once".into() } else { format!("{} times", restored.count) };
        let words = format!("taken away by others and put back: {name} ({times}, last {} ago)", ago(restored.last));
        let _ = writeln!(text, "{}", paint.with(YELLOW, &words));
    }
    for (name, words) in &status.datapath.xdp {
        let _ = writeln!(text, "XDP on {name}: {words}");
    }
    if !status.datapath.waiting_interfaces.is_empty() {
        let words = format!("{} interfaces wait for their programs", status.datapath.waiting_interfaces.len());
        let _ = writeln!(text, "{}", paint.with(YELLOW, &words));
    }
    for path in &status.datapath.suspended {
        let words = format!(
            "no answers of the backup of {} are seen on {}: new connections are left to kube-proxy there, for {}",
            path.service,
            path.interface,
            until(path.until)
        );
        let _ = writeln!(text, "{}", paint.with(RED, &words));
    }
    for note in &status.datapath.notes {
        let _ = writeln!(text, "{}", paint.with(YELLOW, note));
    }
    for (name, interfaces) in &status.datapath.other_programs {
        let words = format!("another program on the same hooks: {name} ({} interfaces)", interfaces.len());
        let _ = writeln!(text, "{words}");
    }
    for (name, error) in &status.datapath.failed_interfaces {
        let _ = writeln!(text, "{}", paint.with(RED, &format!("not attached to {name}: {error}")));
    }
    let reasons = status.datapath.reasons.iter().filter(|(reason, _)| *reason != PassReason::EventLost.label());
    let reasons: Vec<String> = reasons.map(|(r, n)| format!("{r} {n}")).collect();
    if !reasons.is_empty() {
        let _ = writeln!(text, "{}", paint.with(YELLOW, &format!("packets passed untouched: {}", reasons.join(", "))));
    }
    text.push('\n');
    text.push_str(&services(&status.services, paint));
    text
}

/// A table of services, followed by the details of each service with its tiers.
pub(crate) fn services(services: &[ServiceStatus], paint: Paint) -> String {
    if services.is_empty() {
        return "no services\n".into();
    }
    let mut table = Table::new(&[
        "SERVICE", "STATE", "SINCE", "REASON", "PRIMARY", "FLOWS", "MOVED", "REJECTED", "LIMITED", "APPLIED",
    ]);
    for service in services {
        let applied = service.applied.as_ref() == Some(&service.desired);
        table.row(vec![
            plain(&service.name),
            (state_words(service), Some(state_colour(service.state))),
            plain(ago(service.since)),
            plain(service.reason.map_or("", StateReason::label)),
            plain(percent(service.share)),
            plain(service.flows.to_string()),
            plain(service.counters.moved.to_string()),
            plain(service.counters.rejected.to_string()),
            limited_cell(service.limits.as_ref()),
            if applied { plain("yes") } else { ("NO".into(), Some(RED)) },
        ]);
    }
    let mut text = table.print(paint);
    for service in services {
        text.push_str(&detail(service, paint));
    }
    text
}

/// Number of new connections that limits refused or sent to the other tier; red while a limit is exceeded.
fn limited_cell(limits: Option<&LimitsStatus>) -> Cell {
    let Some(limits) = limits else { return plain("-") };
    let count: u64 = [&limits.primary, &limits.backup].iter().flat_map(|tier| tier.limited.values()).sum();
    (count.to_string(), limits.limited.is_some().then_some(RED))
}

/// The limits of a service and their effects.
fn limits(limits: &LimitsStatus, paint: Paint) -> String {
    let mut text = String::new();
    let scope = match (limits.scope, limits.shared_by) {
        (LimitScope::Cluster, nodes) => format!("for the cluster, 1/{nodes} of each on this node"),
        (LimitScope::Node, _) => "for each node".to_owned(),
    };
    for (name, tier) in [("primary", &limits.primary), ("backup", &limits.backup)] {
        if !tier.limits.is_empty() {
            let _ = writeln!(text, "  limits of the {name} ({scope}): {}", tier_limits(tier));
        }
    }
    let count = |count: u64, words: &str| if count > 0 { format!("; {count} {words}") } else { String::new() };
    let rest = [
        count(limits.failed_over, "sent to the backup"),
        count(limits.contended, "admitted because of contention"),
        count(limits.untracked, "admitted but not counted, for lack of room"),
    ]
    .concat();
    if !rest.is_empty() {
        let _ = writeln!(text, "  limits: {}", rest.trim_start_matches("; "));
    }
    if let Some(active) = &limits.limited {
        let line = format!("  LIMITED for {}: {}, {} a minute", ago(active.since), active.limit, active.per_minute);
        let _ = writeln!(text, "{}", paint.with(RED, &line));
    }
    if !limits.limited_clients.is_empty() {
        let client = |client: &Option<String>| client.clone().unwrap_or_else(|| "this node".into());
        let clients: Vec<String> = limits
            .limited_clients
            .iter()
            .map(|c| format!("{} {} ({})", client(&c.client), c.refused, c.tier.label()))
            .collect();
        let _ = writeln!(text, "  most limited clients of the last minute: {}", clients.join(", "));
    }
    text
}

fn tier_limits(tier: &TierLimitsStatus) -> String {
    let list = |counts: &std::collections::BTreeMap<String, u64>| {
        counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
    };
    let limits: Vec<String> = tier.limits.iter().map(|(name, value)| format!("{name} {value}")).collect();
    let mut text =
        format!("{}, then {}; {} connections now", limits.join(", "), tier.on_limit.label(), tier.concurrent);
    if !tier.limits.keys().any(|name| name.ends_with("concurrentConnections")) {
        text = format!("{}, then {}", limits.join(", "), tier.on_limit.label());
    }
    if !tier.limited.is_empty() {
        let _ = write!(text, "; over a limit: {}", list(&tier.limited));
    }
    if !tier.dry_run.is_empty() {
        let _ = write!(text, "; would have been over a limit: {}", list(&tier.dry_run));
    }
    text
}

fn state_words(service: &ServiceStatus) -> String {
    let mut words = service.state.label().to_owned();
    if service.override_ != Override::Auto {
        words.push_str(" (forced)");
    }
    if service.mode == Some(Mode::DryRun) {
        words.push_str(" (dry run)");
    }
    words
}

fn detail(service: &ServiceStatus, paint: Paint) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "\n{}  {}", paint.with(BOLD, &service.name), service.frontends.join(", "));
    if !service.message.is_empty() {
        let _ = writeln!(text, "  why: {}", service.message);
    }
    if let Some(counts) = &service.established {
        let _ = writeln!(text, "  {}", counts.words());
    }
    if let Some(until) = service.override_until {
        let _ = writeln!(text, "  forced until {until:.0}");
    }
    if let Some(error) = &service.error {
        let line = format!("  NOT APPLIED ({} failed writes, trying again): {error}", service.failed_writes);
        let _ = writeln!(text, "{}", paint.with(RED, &line));
    }
    if service.counters.dry_run > 0 {
        let _ = writeln!(text, "  dry run: {} connections would have been moved or refused", service.counters.dry_run);
    }
    if service.fast_path == Some(FastPath::PeerRedirect) {
        let _ = writeln!(
            text,
            "  fastPath: flows to backup pods on this node bypass the host network stack (netfilter, NetworkPolicy)"
        );
    }
    if let Some(of_service) = &service.limits {
        text.push_str(&limits(of_service, paint));
    }
    let mut table = Table::new(&[]);
    for tier in &service.tiers {
        for backend in &tier.backends {
            table.row(backend_row(tier, backend));
        }
        if tier.backends.is_empty() {
            table.row(vec![plain(arrow(tier)), plain(&tier.name), ("no backends".into(), Some(RED))]);
        }
    }
    text.push_str(&table.print(paint));
    text
}

/// An arrow that marks the tier that gets the new connections.
fn arrow(tier: &TierStatus) -> String {
    if tier.active { "  ->".into() } else { String::new() }
}

fn backend_row(tier: &TierStatus, backend: &BackendStatus) -> Vec<Cell> {
    let colour = match backend.health {
        Health::Up => GREEN,
        Health::Down => RED,
        Health::Unknown | Health::Unchecked => DIM,
    };
    vec![
        plain(arrow(tier)),
        plain(&tier.name),
        plain(backend.address.to_string()),
        (backend.health.label().into(), Some(colour)),
        plain(backend.since.map(ago).unwrap_or_default()),
        match backend.local_errors {
            Some(_) => ("LocalError".into(), Some(YELLOW)),
            None => plain(backend.last_check.map_or("", CheckCode::label)),
        },
        plain(if backend.local { "this node" } else { "" }),
        plain(backend.check_millis.map(|ms| format!("{ms:.1} ms")).unwrap_or_default()),
        plain(match &backend.local_errors {
            Some(errors) => format!("no result for {}: {}", ago(errors.since), errors.detail),
            None => backend.detail.clone().unwrap_or_default(),
        }),
    ]
}

/// One event as a line.
pub(crate) fn event(event: &EventLine, paint: Paint) -> String {
    let colour = match (event.to, event.kind) {
        (Some(state), _) => Some(state_colour(state)),
        (None, EventType::WriteFailed | EventType::ConfigRefused | EventType::Limited) => Some(RED),
        (None, _) => None,
    };
    let kind = format!("{:<13}", event.kind.label());
    let kind = colour.map_or_else(|| kind.clone(), |code| paint.with(code, &kind));
    let time = event.at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
    format!("{}  {}  {kind}  {}\n", paint.with(DIM, &time), event.service, event.message)
}

/// A table of flows. `established`: the connections of the tier that the service left, of which those to the primary are in
/// no flow table.
pub(crate) fn flows(flows: &[FlowView], established: Option<&EstablishedCounts>, paint: Paint) -> String {
    let others = established.map(|counts| format!("{}\n", counts.words())).unwrap_or_default();
    if flows.is_empty() {
        return "no flows: breaker decided none of the service's connections (while closed, they pass)\n".to_owned()
            + &others;
    }
    let mut table = Table::new(&["CLIENT", "FRONTEND", "BACKEND", "KIND", "WAY", "PHASE", "EPOCH", "AGE"]);
    for flow in flows {
        table.row(vec![
            plain(flow.client.to_string()),
            plain(flow.frontend.to_string()),
            plain(flow.backend.to_string()),
            plain(flow.kind.label()),
            plain(flow.path.label()),
            plain(flow.phase.label()),
            plain(flow.epoch.to_string()),
            plain(format!("{} s", flow.age_seconds)),
        ]);
    }
    table.print(paint) + &others
}

/// A table of the findings of `preflight`.
pub(crate) fn preflight(findings: &[Finding], paint: Paint) -> String {
    let mut table = Table::new(&[]);
    for finding in findings {
        let (word, colour) = match finding.verdict {
            Verdict::Good => ("good", GREEN),
            Verdict::Worse => ("worse", YELLOW),
            Verdict::Bad => ("BAD", RED),
        };
        let mut words = finding.found.clone();
        if !finding.remedy.is_empty() {
            let _ = write!(words, "; {}", finding.remedy);
        }
        table.row(vec![(word.into(), Some(colour)), plain(&finding.name), plain(words)]);
    }
    table.print(paint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percentages() {
        assert_eq!([percent(1000), percent(5), percent(120)], ["100 %", "0.5 %", "12 %"]);
    }
}
