//! Text for people: tables, words, and colour where a terminal shows it.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _},
    time::Duration,
};

use breaker_common::PassReason;
use jiff::Timestamp;

use crate::{
    agent::status::{AgentStatus, BackendStatus, EventLine, LimitsStatus, ServiceStatus, TierLimitsStatus, TierStatus},
    preflight::{Finding, Verdict},
};

/// Whether to use colour.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(bool);

const GREEN: &str = "32";
pub(super) const RED: &str = "31";
pub(super) const YELLOW: &str = "33";
const DIM: &str = "2";
const BOLD: &str = "1";

impl Paint {
    /// On a terminal, unless NO_COLOR is set (no-color.org).
    pub(super) fn for_stdout() -> Self {
        Self(io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()))
    }

    pub(super) fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Columns as wide as their widest cell; colour goes on after padding, so that it does not count.
pub(super) struct Table {
    rows: Vec<Vec<(String, Option<&'static str>)>>,
}

impl Table {
    pub(super) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| ((*cell).to_owned(), Some(BOLD))).collect()] }
    }

    pub(super) fn row(&mut self, cells: Vec<(String, Option<&'static str>)>) {
        self.rows.push(cells);
    }

    pub(super) fn print(&self, paint: Paint) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |i: usize| self.rows.iter().filter_map(|r| r.get(i)).map(|c| c.0.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, colour), width) in row.iter().zip(&widths) {
                let padding = " ".repeat(width - cell.chars().count() + 2);
                line.push_str(&colour.map_or_else(|| cell.clone(), |code| paint.with(code, cell)));
                line.push_str(&padding);
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

pub(super) fn plain(text: impl Into<String>) -> (String, Option<&'static str>) {
    (text.into(), None)
}

pub(super) fn state_colour(state: &str) -> &'static str {
    match state {
        "Closed" => GREEN,
        "Open" => RED,
        _ => YELLOW,
    }
}

/// `12 s`, `3 min`, `5 h`, `2 d`.
pub(super) fn ago(since: Timestamp) -> String {
    let seconds = Duration::try_from(Timestamp::now().duration_since(since)).unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A permille share in percent.
pub(super) fn percent(share: u16) -> String {
    if share.is_multiple_of(10) { format!("{} %", share / 10) } else { format!("{}.{} %", share / 10, share % 10) }
}

/// The whole status.
pub(super) fn status(status: &AgentStatus, paint: Paint) -> String {
    let mut text = String::new();
    if status.running {
        let interfaces = status.datapath.interfaces.len();
        let plural = if interfaces == 1 { "" } else { "s" };
        let _ = writeln!(
            text,
            "breaker {}: agent running (pid {}), {} on {interfaces} interface{plural}{}, {} flow entries",
            status.version,
            status.pid,
            status.datapath.attach,
            if status.datapath.node_sockets.is_none() { " and the node's sockets" } else { "" },
            status.datapath.flow_entries
        );
        if let Some(why) = status.datapath.node_sockets.as_deref().filter(|why| *why != "switched off") {
            let words = format!("the node's own processes are not protected: {why}");
            let _ = writeln!(text, "{}", paint.with(YELLOW, &words));
        }
        if status.datapath.flow_pressure >= 80 {
            let words = format!("the tables of established flows are {} % full", status.datapath.flow_pressure);
            let _ = writeln!(text, "{}", paint.with(RED, &words));
        }
    } else {
        let since = status.last_beat.map_or_else(|| "an unknown time".to_owned(), ago);
        let gone = format!("the agent is gone since {since} (pid {} was the last)", status.pid);
        let _ = writeln!(text, "{}", paint.with(RED, &gone));
        let lease = Duration::from_secs(status.lease_seconds);
        let silent = status
            .last_beat
            .map(|beat| Duration::try_from(Timestamp::now().duration_since(beat)).unwrap_or_default())
            .unwrap_or_default();
        let words = if lease.is_zero() || silent < lease {
            "what follows is what the programs go on doing; no check runs".to_owned()
        } else {
            format!("its lease of {} s is over: onAgentLoss applies; what follows was its last word", lease.as_secs())
        };
        let _ = writeln!(text, "{words}");
    }
    for (name, words) in &status.datapath.xdp {
        let _ = writeln!(text, "XDP on {name}: {words}");
    }
    for (name, error) in &status.datapath.failed_interfaces {
        let _ = writeln!(text, "{}", paint.with(RED, &format!("not on {name}: {error}")));
    }
    let reasons = status.datapath.reasons.iter().filter(|(reason, _)| *reason != PassReason::EventLost.label());
    let reasons: Vec<String> = reasons.map(|(r, n)| format!("{r} {n}")).collect();
    if !reasons.is_empty() {
        let _ = writeln!(text, "{}", paint.with(YELLOW, &format!("packets that failed open: {}", reasons.join(", "))));
    }
    text.push('\n');
    text.push_str(&services(&status.services, paint));
    text
}

/// Services, each with its tiers below.
pub(super) fn services(services: &[ServiceStatus], paint: Paint) -> String {
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
            (state_words(service), Some(state_colour(&service.state))),
            plain(ago(service.since)),
            plain(&service.reason),
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

/// How many new connections limits have refused or sent to the other tier; red while they do.
fn limited_cell(limits: Option<&LimitsStatus>) -> (String, Option<&'static str>) {
    let Some(limits) = limits else { return plain("-") };
    let count: u64 = [&limits.primary, &limits.backup].iter().flat_map(|tier| tier.limited.values()).sum();
    (count.to_string(), limits.limited.is_some().then_some(RED))
}

/// A service's limits, and what they did.
fn limits(limits: &LimitsStatus, paint: Paint) -> String {
    let mut text = String::new();
    let scope = match (limits.scope.as_str(), limits.shared_by) {
        ("Cluster", nodes) => format!("for the cluster, a part of 1/{nodes} on this node"),
        _ => "for each node".to_owned(),
    };
    for (name, tier) in [("primary", &limits.primary), ("backup", &limits.backup)] {
        if !tier.limits.is_empty() {
            let _ = writeln!(text, "  limits of the {name} ({scope}): {}", tier_limits(tier));
        }
    }
    let count = |count: u64, words: &str| if count > 0 { format!("; {count} {words}") } else { String::new() };
    let rest = [
        count(limits.failed_over, "sent to the backup for it"),
        count(limits.contended, "admitted after lost races"),
        count(limits.untracked, "admitted and not counted: no room"),
    ]
    .concat();
    if !rest.is_empty() {
        let _ = writeln!(text, "  limits: {}", rest.trim_start_matches("; "));
    }
    if let Some(biting) = &limits.limited {
        let line = format!("  LIMITED for {}: {}, {} a minute", ago(biting.since), biting.limit, biting.per_minute);
        let _ = writeln!(text, "{}", paint.with(RED, &line));
    }
    if !limits.limited_clients.is_empty() {
        let client = |client: &Option<String>| client.clone().unwrap_or_else(|| "this node".into());
        let clients: Vec<String> = limits
            .limited_clients
            .iter()
            .map(|c| format!("{} {} ({})", client(&c.client), c.refused, c.tier))
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
    let mut text = format!("{}, then {}; {} connections now", limits.join(", "), tier.on_limit, tier.concurrent);
    if !tier.limits.keys().any(|name| name.ends_with("concurrentConnections")) {
        text = format!("{}, then {}", limits.join(", "), tier.on_limit);
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
    let mut words = service.state.clone();
    if service.override_ != "Auto" {
        words.push_str(" (forced)");
    }
    if service.mode == "DryRun" {
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
    if let Some(until) = service.override_until {
        let _ = writeln!(text, "  forced until {until:.0}");
    }
    if let Some(error) = &service.error {
        let line = format!("  NOT APPLIED ({} failed writes, trying again): {error}", service.failed_writes);
        let _ = writeln!(text, "{}", paint.with(RED, &line));
    }
    if service.counters.dry_run > 0 {
        let _ = writeln!(text, "  a dry run would have moved or refused {} connections", service.counters.dry_run);
    }
    if service.fast_path == "PeerRedirect" {
        let _ = writeln!(
            text,
            "  fastPath: to backup pods of this node past the stack; netfilter, and with it NetworkPolicy, is left out"
        );
    }
    if let Some(of_service) = &service.limits {
        text.push_str(&limits(of_service, paint));
    }
    let mut table = Table { rows: Vec::new() };
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

/// Points at the tier that gets the new connections.
fn arrow(tier: &TierStatus) -> String {
    if tier.active { "  ->".into() } else { String::new() }
}

fn backend_row(tier: &TierStatus, backend: &BackendStatus) -> Vec<(String, Option<&'static str>)> {
    let colour = match backend.health.as_str() {
        "Up" => GREEN,
        "Down" => RED,
        _ => DIM,
    };
    vec![
        plain(arrow(tier)),
        plain(&tier.name),
        plain(backend.address.to_string()),
        (backend.health.clone(), Some(colour)),
        plain(backend.since.map(ago).unwrap_or_default()),
        plain(backend.last_check.clone().unwrap_or_default()),
        plain(if backend.near { "this node" } else { "" }),
        plain(backend.check_millis.map(|ms| format!("{ms:.1} ms")).unwrap_or_default()),
        plain(backend.detail.clone().unwrap_or_default()),
    ]
}

/// A line of the events.
pub(super) fn event(event: &EventLine, paint: Paint) -> String {
    let colour = match event.to.as_deref() {
        Some(state) => Some(state_colour(state)),
        None if ["WriteFailed", "ConfigRefused", "Limited"].contains(&event.kind.as_str()) => Some(RED),
        None => None,
    };
    let kind = format!("{:<13}", event.kind);
    let kind = colour.map_or_else(|| kind.clone(), |code| paint.with(code, &kind));
    let time = event.at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
    format!("{}  {}  {kind}  {}\n", paint.with(DIM, &time), event.service, event.message)
}

/// Flows.
pub(super) fn flows(flows: &[serde_json::Value]) -> String {
    if flows.is_empty() {
        return "no flows: nothing was decided for this service's connections (closed, they pass untouched)\n".into();
    }
    let mut table = Table::new(&["CLIENT", "FRONTEND", "BACKEND", "KIND", "WAY", "PHASE", "EPOCH", "AGE"]);
    for flow in flows {
        let cell = |name: &str| match &flow[name] {
            serde_json::Value::String(text) => plain(text),
            other => plain(other.to_string()),
        };
        let age = plain(format!("{} s", flow["ageSeconds"]));
        table.row(vec![
            cell("client"),
            cell("frontend"),
            cell("backend"),
            cell("kind"),
            cell("way"),
            cell("phase"),
            cell("epoch"),
            age,
        ]);
    }
    table.print(Paint(false))
}

/// What preflight found.
pub(super) fn preflight(findings: &[Finding], paint: Paint) -> String {
    let mut table = Table { rows: Vec::new() };
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
        table.row(vec![(word.into(), Some(colour)), plain(finding.name), plain(words)]);
    }
    table.print(paint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_columns() {
        assert_eq!([percent(1000), percent(5), percent(120)], ["100 %", "0.5 %", "12 %"]);
        let mut table = Table::new(&["A", "B"]);
        table.row(vec![("long".into(), Some(RED)), plain("x")]);
        assert_eq!(table.print(Paint(false)), "A     B\nlong  x\n");
        assert!(table.print(Paint(true)).contains("\x1b[31mlong\x1b[0m  x"));
    }
}
