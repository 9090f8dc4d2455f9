//! Converts values of the engine to the JSON types of the control socket.

use std::{collections::BTreeMap, time::Duration};

use breaker_api::{
    crd::{self, AttachMode},
    established::EstablishedCounts,
    events::{EventLine, EventType, NO_SERVICE},
    flows::{FlowPath, FlowPhase, FlowView, Protocol},
    limits::{ActiveLimit, LimitsStatus, RefusedClient, TierLimitsStatus},
    status::{Applied, BackendStatus, CheckCode, Health, LocalErrors, ProbesStatus, ServiceStatus, TierStatus},
    tier::TierRole,
};
use breaker_common::{EventKind, LimitAction, LimitKind, ServiceLimits};
use breaker_core::{
    datapath::{self, FlowSnapshot, LimitReport},
    engine::{
        established,
        journal::{Entry, EntryKind},
        limit_watch,
        snapshot::{BackendSnapshot, DecisionSnapshot, LimitsSnapshot, ServiceSnapshot, TierSnapshot},
    },
    health, limits, model, probe,
};
use jiff::Timestamp;

use crate::{clock::timestamp, datapath::options};

/// One service.
#[must_use]
pub fn service(snapshot: ServiceSnapshot) -> ServiceStatus {
    ServiceStatus {
        name: snapshot.name.to_string(),
        state: snapshot.state,
        since: timestamp(snapshot.since_unix_ns),
        reason: Some(snapshot.reason),
        message: snapshot.message,
        share: snapshot.share,
        epoch: snapshot.epoch,
        trips: snapshot.trips,
        mode: Some(mode(snapshot.mode)),
        override_: override_(snapshot.override_),
        override_until: snapshot.override_until_unix_ns.map(timestamp),
        fast_path: Some(fast_path(snapshot.fast_path)),
        when_all_unhealthy: Some(when_all_unhealthy(snapshot.when_all_unhealthy)),
        frontends: snapshot.frontends.iter().map(ToString::to_string).collect(),
        tiers: snapshot.tiers.into_iter().map(tier).collect(),
        desired: applied(snapshot.desired),
        applied: snapshot.applied.map(applied),
        error: snapshot.error,
        failed_writes: snapshot.failed_writes,
        flows: snapshot.flows,
        established: snapshot.established.map(established),
        local_errors: snapshot.local_errors,
        counters: snapshot.counters.into(),
        limits: snapshot.limits.map(limits_status),
    }
}

/// The connections that were established when a service left a tier.
#[must_use]
pub fn established(counts: established::EstablishedCounts) -> EstablishedCounts {
    let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    EstablishedCounts {
        tier: Some(role(counts.tier)),
        found: number(counts.found),
        reset: number(counts.reset),
        gone: number(counts.gone),
        unreached: number(counts.unreached),
        left: number(counts.left),
        resetting: counts.is_resetting,
    }
}

const fn applied(decision: DecisionSnapshot) -> Applied {
    Applied { state: decision.state, share: decision.share, epoch: decision.epoch }
}

fn tier(tier: TierSnapshot) -> TierStatus {
    TierStatus {
        name: tier.name,
        role: role(tier.role),
        active: tier.active,
        backends: tier.backends.into_iter().map(backend).collect(),
    }
}

fn backend(backend: BackendSnapshot) -> BackendStatus {
    let last = backend.last.as_ref();
    BackendStatus {
        address: backend.address,
        health: backend.health.map_or(Health::Unchecked, health),
        since: backend.since_unix_ns.map(timestamp),
        last_check: last.and_then(|last| code(last.code)),
        local_errors: backend.local_errors.map(|errors| LocalErrors {
            count: errors.count,
            since: timestamp(errors.since.unix_ns),
            detail: errors.detail,
        }),
        detail: last.map(|last| last.detail.clone()),
        // Milliseconds with two decimals.
        check_millis: last.map(|last| (last.duration.as_secs_f64() * 100_000.0).round() / 100.0),
        weight: backend.weight,
        local: backend.local,
    }
}

/// One flow.
#[must_use]
pub const fn flow(flow: &FlowSnapshot) -> FlowView {
    FlowView {
        client: flow.client,
        frontend: flow.frontend,
        backend: flow.backend,
        protocol: match flow.protocol {
            model::Protocol::Tcp => Protocol::Tcp,
            model::Protocol::Udp => Protocol::Udp,
        },
        source_port: flow.source_port,
        kind: flow.kind,
        epoch: flow.epoch,
        path: match flow.path {
            datapath::FlowPath::Stack => FlowPath::Stack,
            datapath::FlowPath::Veth => FlowPath::Veth,
        },
        age_seconds: flow.age.as_secs(),
        phase: match flow.phase {
            datapath::FlowPhase::Passed => FlowPhase::Passed,
            datapath::FlowPhase::Unanswered => FlowPhase::Unanswered,
            datapath::FlowPhase::Established => FlowPhase::Established,
            datapath::FlowPhase::Closing => FlowPhase::Closing,
            datapath::FlowPhase::Ended => FlowPhase::Ended,
        },
    }
}

/// One event.
#[must_use]
pub fn event(entry: &Entry) -> EventLine {
    let transition = match entry.kind {
        EntryKind::Transition(transition) => Some(transition),
        _ => None,
    };
    EventLine {
        id: entry.id,
        at: timestamp(entry.unix_ns),
        service: entry.service.as_ref().map_or_else(|| NO_SERVICE.to_owned(), ToString::to_string),
        kind: match entry.kind {
            EntryKind::Transition(_) => EventType::Transition,
            EntryKind::Health => EventType::Health,
            EntryKind::LocalError => EventType::LocalError,
            EntryKind::LeftOut => EventType::LeftOut,
            EntryKind::Limited => EventType::Limited,
            EntryKind::WriteFailed => EventType::WriteFailed,
            EntryKind::WriteRecovered => EventType::WriteRecovered,
            EntryKind::FlowPressure => EventType::FlowPressure,
            EntryKind::Restored => EventType::Restored,
            EntryKind::ReturnPath => EventType::ReturnPath,
            EntryKind::Resets => EventType::Resets,
            EntryKind::Config => EventType::Config,
            EntryKind::ConfigRefused => EventType::ConfigRefused,
            EntryKind::Packet(EventKind::StateAdopted) => EventType::StateAdopted,
            EntryKind::Packet(EventKind::FlowMoved) => EventType::FlowMoved,
            EntryKind::Packet(EventKind::Rejected) => EventType::Rejected,
            EntryKind::Packet(EventKind::FlowReset) => EventType::FlowReset,
        },
        message: entry.message.clone(),
        from: transition.map(|transition| transition.from),
        to: transition.map(|transition| transition.to),
        reason: transition.map(|transition| transition.reason),
    }
}

fn limits_status(snapshot: LimitsSnapshot) -> LimitsStatus {
    limits_with(&snapshot.configured, snapshot.report, snapshot.active.as_ref())
}

fn limits_with(
    limits: &limits::Limits,
    report: LimitReport,
    active: Option<&limit_watch::ActiveLimit>,
) -> LimitsStatus {
    let counters = &report.counters;
    let tier = |index: usize, limits: &limits::TierLimits| TierLimitsStatus {
        limits: configured(limits),
        on_limit: on_limit(limits.on_limit),
        concurrent: report.concurrent[index],
        limited: by_kind(&counters.limited[index]),
        dry_run: by_kind(&counters.dry_run[index]),
    };
    LimitsStatus {
        scope: match limits.scope {
            limits::Scope::Node => crd::LimitScope::Node,
            limits::Scope::Cluster => crd::LimitScope::Cluster,
        },
        shared_by: limits.shared_by(),
        primary: tier(0, &limits.primary),
        backup: tier(1, &limits.backup),
        failed_over: counters.failed_over,
        contended: counters.contended,
        repeated: counters.repeated,
        untracked: counters.untracked,
        limited: active.map(active_limit),
        limited_clients: report.clients.into_iter().map(refused_client).collect(),
    }
}

/// A service's limits as the maps contain them. It is used without an agent, when the configured limits are unknown.
#[must_use]
pub fn limits_in_maps(limits: &ServiceLimits, report: LimitReport) -> LimitsStatus {
    let tier = |limits: &breaker_common::TierLimits| {
        let rate = |interval: u64, tolerance: u64| {
            let per_second = u32::try_from(1_000_000_000_u64.checked_div(interval)?).ok()?;
            let burst = u32::try_from(tolerance / interval + 1).unwrap_or(u32::MAX);
            Some(limits::Rate { per_second: per_second.max(1), burst })
        };
        let count = |count: u32| (count > 0).then_some(count);
        limits::TierLimits {
            rate: rate(limits.interval_ns, limits.tolerance_ns),
            concurrent: count(limits.concurrent),
            client_rate: rate(limits.client_interval_ns, limits.client_tolerance_ns),
            client_concurrent: count(limits.client_concurrent),
            on_limit: match u8::try_from(limits.action).ok().and_then(|number| LimitAction::try_from(number).ok()) {
                Some(LimitAction::Drop) => limits::OnLimit::Drop,
                Some(LimitAction::Failover) => limits::OnLimit::Failover,
                Some(LimitAction::Reset) | None => limits::OnLimit::Reset,
            },
        }
    };
    let [primary, backup] = limits.tiers.each_ref().map(tier);
    let idle = Duration::ZERO;
    let limits = limits::Limits { primary, backup, client_prefix: 0, idle, scope: limits::Scope::Node, nodes: 1 };
    limits_with(&limits, report, None)
}

/// The limits that are set, by their names in the configuration.
fn configured(limits: &limits::TierLimits) -> BTreeMap<String, u32> {
    let rates = [
        ("newConnectionsPerSecond", limits.rate.map(|rate| rate.per_second)),
        ("burst", limits.rate.map(|rate| rate.burst)),
        ("concurrentConnections", limits.concurrent),
        ("perClient.newConnectionsPerSecond", limits.client_rate.map(|rate| rate.per_second)),
        ("perClient.burst", limits.client_rate.map(|rate| rate.burst)),
        ("perClient.concurrentConnections", limits.client_concurrent),
    ];
    rates.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}

fn by_kind(counts: &[u64; 4]) -> BTreeMap<String, u64> {
    let kinds = LimitKind::ALL.iter().zip(counts).filter(|(_, count)| **count > 0);
    kinds.map(|(kind, count)| (kind.label().to_owned(), *count)).collect()
}

fn active_limit(active: &limit_watch::ActiveLimit) -> ActiveLimit {
    ActiveLimit {
        since: timestamp(active.since_unix_ns),
        limit: active.limit.to_string(),
        per_minute: active.per_minute,
    }
}

fn refused_client(client: datapath::RefusedClient) -> RefusedClient {
    RefusedClient { client: client.client, tier: role(client.tier), refused: client.refused }
}

/// A wall-clock time as a timestamp; `None` for zero.
#[must_use]
pub fn timestamp_unless_zero(unix_ns: u64) -> Option<Timestamp> {
    (unix_ns > 0).then(|| timestamp(unix_ns))
}

/// How tc programs are attached.
#[must_use]
pub const fn attach_mode(mode: options::AttachMode) -> AttachMode {
    match mode {
        options::AttachMode::Auto => AttachMode::Auto,
        options::AttachMode::Tcx => AttachMode::Tcx,
        options::AttachMode::Clsact => AttachMode::Clsact,
    }
}

/// An override.
#[must_use]
pub const fn override_(override_: model::Override) -> crd::Override {
    match override_ {
        model::Override::Auto => crd::Override::Auto,
        model::Override::ForceOpen => crd::Override::ForceOpen,
        model::Override::ForceClosed => crd::Override::ForceClosed,
    }
}

const fn mode(mode: model::Mode) -> crd::Mode {
    match mode {
        model::Mode::Enforce => crd::Mode::Enforce,
        model::Mode::DryRun => crd::Mode::DryRun,
    }
}

const fn fast_path(fast_path: model::FastPath) -> crd::FastPath {
    match fast_path {
        model::FastPath::Off => crd::FastPath::Off,
        model::FastPath::PeerRedirect => crd::FastPath::PeerRedirect,
    }
}

const fn when_all_unhealthy(policy: model::WhenAllUnhealthy) -> crd::WhenAllUnhealthy {
    match policy {
        model::WhenAllUnhealthy::PassThrough => crd::WhenAllUnhealthy::PassThrough,
        model::WhenAllUnhealthy::Reject => crd::WhenAllUnhealthy::Reject,
    }
}

const fn on_limit(on_limit: limits::OnLimit) -> crd::OnLimit {
    match on_limit {
        limits::OnLimit::Reset => crd::OnLimit::Reset,
        limits::OnLimit::Drop => crd::OnLimit::Drop,
        limits::OnLimit::Failover => crd::OnLimit::Failover,
    }
}

const fn role(role: model::TierRole) -> TierRole {
    match role {
        model::TierRole::Primary => TierRole::Primary,
        model::TierRole::Backup => TierRole::Backup,
    }
}

const fn health(health: health::Health) -> Health {
    match health {
        health::Health::Unknown => Health::Unknown,
        health::Health::Up => Health::Up,
        health::Health::Down => Health::Down,
    }
}

/// The code of a result; `None` for a probe without one.
const fn code(code: probe::CheckCode) -> Option<CheckCode> {
    Some(match code {
        probe::CheckCode::L4Ok => CheckCode::L4Ok,
        probe::CheckCode::L4Con => CheckCode::L4Con,
        probe::CheckCode::L4Tout => CheckCode::L4Tout,
        probe::CheckCode::L6Tout => CheckCode::L6Tout,
        probe::CheckCode::L6Rsp => CheckCode::L6Rsp,
        probe::CheckCode::L7Ok => CheckCode::L7Ok,
        probe::CheckCode::L7Sts => CheckCode::L7Sts,
        probe::CheckCode::L7Tout => CheckCode::L7Tout,
        probe::CheckCode::L7Rsp => CheckCode::L7Rsp,
        probe::CheckCode::LocalError => return None,
    })
}

/// How busy the probes are.
#[must_use]
pub const fn probes(load: probe::ProbeLoad) -> ProbesStatus {
    ProbesStatus {
        limit: load.most,
        running: load.running,
        waiting: load.waiting,
        late: load.late,
        local_errors: load.local_errors,
    }
}
