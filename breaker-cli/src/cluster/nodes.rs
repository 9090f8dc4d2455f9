//! `kubectl breaker status -o wide`: a line for each breaker and node.

use std::{collections::BTreeSet, fmt::Write as _};

use breaker_api::{
    StateReason,
    crd::{Override, OwnerKind, RefusedService, ReportedService, ReportedState},
};
use jiff::Timestamp;

use super::overview::{BreakerView, Overview, Severity, severity};
use crate::{
    show::{ago, percent},
    table::{GREEN, Paint, RED, Table, YELLOW, plain},
};

/// A table of every protected Service on every node, followed by a line for each problem.
pub(super) fn overview(overview: &Overview, paint: Paint) -> String {
    let mut text = String::new();
    match &overview.nodes_missing {
        Some(why) => {
            let _ = writeln!(text, "{}", paint.with(YELLOW, why));
        }
        None if overview.nodes.is_empty() => {
            text.push_str(
                "no node reports: is the DaemonSet breaker-agent running? `kubectl breaker check` says more\n",
            );
        }
        None => {}
    }
    let mut table =
        Table::new(&["NAMESPACE", "NAME", "NODE", "PORT", "STATE", "SINCE", "REASON", "PRIMARY", "BACKUP", "SHARE"]);
    let mut rows = Vec::new();
    for node in &overview.nodes {
        for service in &node.report.services {
            let backup = service.backups.iter().find(|tier| tier.active).or_else(|| service.backups.first());
            let applied = service.applied_generation == service.desired_generation && service.error.is_none();
            let name = if is_annotated(service) { format!("svc/{}", service.name) } else { service.name.clone() };
            let state = service.state.label();
            let state = if applied { state.to_owned() } else { format!("{state} (not applied)") };
            rows.push((
                (service.namespace.clone(), name.clone(), node.node.clone(), service.port, service.outside),
                vec![
                    plain(&service.namespace),
                    plain(name),
                    plain(&node.node),
                    plain(format!("{}{}", service.port, if service.outside { "/outside" } else { "" })),
                    (state, Some(if applied { state_colour(service.state) } else { RED })),
                    plain(service.since.map(ago).unwrap_or_default()),
                    plain(service.reason.map_or("", StateReason::label)),
                    plain(format!("{}/{}", service.primary.up, service.primary.total)),
                    plain(backup.map(|tier| format!("{} {}/{}", tier.name, tier.up, tier.total)).unwrap_or_default()),
                    plain(percent(u16::try_from(service.share).unwrap_or_default())),
                ],
            ));
        }
    }
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    let empty = rows.is_empty();
    for (_, row) in rows {
        table.row(row);
    }
    if empty {
        text.push_str("no Service is protected\n");
    } else {
        text.push_str(&table.print(paint));
    }
    for breaker in &overview.circuit_breakers {
        text.push_str(&problems(breaker, paint));
    }
    text.push_str(&problems_of_nodes(overview, paint));
    text
}

/// Whether a service is protected by annotations.
pub(super) fn is_annotated(service: &ReportedService) -> bool {
    service.kind == Some(OwnerKind::Service)
}

/// One line for each refused annotation, and for each problem of a node.
pub(super) fn problems_of_nodes(overview: &Overview, paint: Paint) -> String {
    let mut text = String::new();
    let refused: BTreeSet<&RefusedService> = overview.nodes.iter().flat_map(|node| &node.report.refused).collect();
    for service in refused {
        let name = format!("{}/svc/{}", service.namespace, service.name);
        let line = format!("{name}: refused ({}): {}", service.reason, service.message);
        let _ = writeln!(text, "{}", paint.with(RED, &line));
    }
    for node in &overview.nodes {
        let agent = &node.report.agent;
        for interface in &agent.failed_interfaces {
            let _ = writeln!(text, "{}", paint.with(RED, &format!("{}: not attached to {interface}", node.node)));
        }
        for why in &agent.degraded {
            let _ = writeln!(text, "{}", paint.with(YELLOW, &format!("{}: {why}", node.node)));
        }
        if let Some(why) = &agent.incompatible {
            let _ = writeln!(text, "{}", paint.with(RED, &format!("{}: {why}", node.node)));
        }
    }
    text
}

/// One line for each condition that shows a problem, one for established connections, and one for an override.
pub(super) fn problems(breaker: &BreakerView, paint: Paint) -> String {
    let mut text = String::new();
    let name = format!("{}/{}", breaker.namespace, breaker.name);
    let conditions = breaker.status.iter().flat_map(|status| &status.conditions);
    for condition in conditions {
        let Some(severity) = severity(condition) else { continue };
        let (type_, status) = (&condition.type_, &condition.status);
        let line = format!("{name}: {type_}={status} ({}): {}", condition.reason, condition.message);
        let _ = writeln!(text, "{}", paint.with(if severity == Severity::Warning { YELLOW } else { RED }, &line));
    }
    if let Some(counts) = breaker.status.as_ref().and_then(|status| status.established.as_ref()) {
        let _ = writeln!(text, "{name}: {}", counts.words());
    }
    if breaker.spec.r#override != Override::Auto {
        let until = match breaker.spec.until {
            Some(until) if until <= Timestamp::now() => format!(" has ended at {until:.0}"),
            Some(until) => format!(" until {until:.0}"),
            None => String::new(),
        };
        let reason = breaker.override_reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let _ = writeln!(text, "{name}: override {}{until}{reason}", breaker.spec.r#override.label());
    }
    text
}

/// The colour of a state.
pub(super) const fn state_colour(state: ReportedState) -> &'static str {
    match state {
        ReportedState::Closed => GREEN,
        ReportedState::Open | ReportedState::NotProtected => RED,
        ReportedState::HalfOpen | ReportedState::NotProgrammed | ReportedState::Unknown => YELLOW,
    }
}
