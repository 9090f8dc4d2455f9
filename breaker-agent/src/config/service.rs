//! Validates a service: its names and addresses, its tiers and its policies.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use breaker_common::NAME_LEN;
use breaker_core::model::{
    Backend, EstablishedPolicy, FastPath, Frontend, KeepClient, Mode, OnAgentLoss, Override, Protocol, Service,
    ServiceName, Tier, WhenAllUnhealthy,
};
use serde_saphyr::{Location, Spanned};

use super::{
    breaker::{self, breaker},
    check::check,
    format,
    limits::limits,
    problems::Problems,
};

/// Converts a service. `complete` is false if the caller fills in the addresses later; then there may be none.
pub(super) fn service(problems: &mut Problems<'_>, path: &str, raw: format::Service, complete: bool) -> Service {
    name(problems, path, &raw.name);
    if complete && raw.frontends.value.is_empty() {
        problems.add(raw.frontends.referenced, &format!("{path}.frontends"), "is empty; allowed: at least one".into());
    }
    let mut keep_client = KeepClient::default();
    let frontends: Vec<Frontend> = raw
        .frontends
        .value
        .iter()
        .enumerate()
        .map(|(i, frontend)| {
            let field = format!("{path}.frontends[{i}]");
            let protocol = frontend.protocol.as_ref();
            let known = [("TCP", Protocol::Tcp), ("UDP", Protocol::Udp)];
            let found = Frontend {
                address: problems.address(&frontend.address, &frontend.port, &field),
                protocol: problems.word(protocol, &format!("{field}.protocol"), &known, Protocol::Tcp),
            };
            let policy = frontend.external_traffic_policy.as_ref();
            let policies = [("Cluster", false), ("Local", true)];
            if problems.word(policy, &format!("{field}.externalTrafficPolicy"), &policies, false) {
                keep_client.frontends.insert(found);
            }
            found
        })
        .collect();
    let primary = Tier {
        name: raw.primary.name.unwrap_or_else(|| "primary".into()),
        backends: backends(problems, &format!("{path}.primary"), &raw.primary.backends),
        draining: Vec::new(),
        check: raw.primary.check.map(|raw| check(problems, &format!("{path}.primary.check"), raw)),
        check_ports: BTreeMap::new(),
        min_healthy: min_healthy(problems, &format!("{path}.primary"), raw.primary.min_healthy.as_ref()),
    };
    if raw.backups.value.is_empty() {
        problems.add(raw.backups.referenced, &format!("{path}.backups"), "is empty; allowed: at least one".into());
    }
    let primary_addresses: BTreeSet<SocketAddr> = primary.backends.iter().map(|b| b.address).collect();
    let mut backups = Vec::new();
    for (index, raw) in raw.backups.value.into_iter().enumerate() {
        let field = format!("{path}.backups[{index}]");
        if complete && raw.backends.value.is_empty() {
            problems.add(
                raw.backends.referenced,
                &format!("{field}.backends"),
                "is empty; allowed: at least one".into(),
            );
        }
        for (i, backend) in raw.backends.value.iter().enumerate() {
            let at = backend.address.referenced;
            let Ok(ip) = backend.address.value.parse::<IpAddr>() else { continue };
            let Ok(port) = u16::try_from(backend.port.value) else { continue };
            let address = SocketAddr::new(ip, port);
            let taken = if primary_addresses.contains(&address) {
                "a backend of the primary too"
            } else if frontends.iter().any(|f| f.address == address) {
                "a frontend of this service"
            } else {
                continue;
            };
            let problem =
                format!("{address} is {taken}; allowed: a destination that does not fail together with the primary");
            problems.add(at, &format!("{field}.backends[{i}]"), problem);
        }
        backups.push(Tier {
            name: raw
                .name
                .unwrap_or_else(|| if index == 0 { "backup".into() } else { format!("backup-{}", index + 1) }),
            backends: backends(problems, &field, &raw.backends.value),
            draining: Vec::new(),
            check: raw.check.map(|raw| check(problems, &format!("{field}.check"), raw)),
            check_ports: BTreeMap::new(),
            min_healthy: min_healthy(problems, &field, raw.min_healthy.as_ref()),
        });
    }
    let field = |name: &str| format!("{path}.{name}");
    let limits = limits(problems, &field("limits"), raw.limits, !backups.is_empty());
    let established =
        [("Keep", EstablishedPolicy::Keep), ("Reset", EstablishedPolicy::Reset), ("Drain", EstablishedPolicy::Drain)];
    let unhealthy = [("PassThrough", WhenAllUnhealthy::PassThrough), ("Reject", WhenAllUnhealthy::Reject)];
    let loss = [("PassThrough", OnAgentLoss::PassThrough), ("Hold", OnAgentLoss::Hold)];
    let fast_paths = [("Off", FastPath::Off), ("PeerRedirect", FastPath::PeerRedirect)];
    let modes = [("Enforce", Mode::Enforce), ("DryRun", Mode::DryRun)];
    let overrides =
        [("Auto", Override::Auto), ("ForceOpen", Override::ForceOpen), ("ForceClosed", Override::ForceClosed)];
    let breaker = breaker(problems, &field("breaker"), raw.breaker);
    breaker::window_can_trip(problems, &field("breaker.window"), &breaker, &primary, raw.name.referenced);
    if complete {
        families_have_backups(problems, &field("backups"), &frontends, &backups, raw.backups.referenced);
    }
    let on_open = problems.word(raw.on_open.as_ref(), &field("onOpen"), &established, EstablishedPolicy::Reset);
    let on_close = problems.word(raw.on_close.as_ref(), &field("onClose"), &established, EstablishedPolicy::Keep);
    let on_backup_down = problems.word(raw.on_backup_down.as_ref(), &field("onBackupDown"), &established, on_open);
    let policies = [("onOpen", on_open), ("onClose", on_close), ("onBackupDown", on_backup_down)];
    let drain = drain(problems, &field("drainSeconds"), raw.drain_seconds.as_ref(), &policies, raw.name.referenced);
    Service {
        name: ServiceName::new(&raw.name.value),
        frontends,
        routes: Vec::new(),
        primary,
        backups,
        grace_period: Duration::ZERO,
        breaker,
        starting: false,
        mode: problems.word(raw.mode.as_ref(), &field("mode"), &modes, Mode::Enforce),
        override_: problems.word(raw.override_.as_ref(), &field("override"), &overrides, Override::Auto),
        override_reason: String::new(),
        on_open,
        drain,
        resets_per_second: problems.u32(raw.resets_per_second.as_ref(), &field("resetsPerSecond"), 1000, 1..=100_000),
        on_close,
        on_backup_down,
        when_all_unhealthy: problems.word(
            raw.when_all_unhealthy.as_ref(),
            &field("whenAllUnhealthy"),
            &unhealthy,
            WhenAllUnhealthy::PassThrough,
        ),
        on_agent_loss: problems.word(
            raw.on_agent_loss.as_ref(),
            &field("onAgentLoss"),
            &loss,
            OnAgentLoss::PassThrough,
        ),
        fast_path: problems.word(raw.fast_path.as_ref(), &field("fastPath"), &fast_paths, FastPath::Off),
        keep_client,
        limits,
    }
}

/// How long established connections may go on under the policy `Drain`: needed with it, and useless without it.
fn drain(
    problems: &mut Problems<'_>,
    field: &str,
    seconds: Option<&Spanned<u64>>,
    policies: &[(&str, EstablishedPolicy)],
    service: Location,
) -> Duration {
    const A_DAY: u64 = 86_400;
    match (policies.iter().find(|(_, policy)| *policy == EstablishedPolicy::Drain), seconds) {
        (Some((policy, _)), None) => {
            problems.add(service, field, format!("is missing, and {policy} is Drain; allowed: 1 to {A_DAY}"));
        }
        (None, Some(seconds)) => {
            let problem = "has no effect: neither onOpen, onClose nor onBackupDown is Drain; allowed: leave it out";
            problems.add(seconds.referenced, field, problem.into());
        }
        _ => {}
    }
    Duration::from_secs(problems.number(seconds, field, 1, 1..=A_DAY))
}

/// Each IP family with a frontend needs a backup of that family: an address is not translated to the other family.
fn families_have_backups(
    problems: &mut Problems<'_>,
    field: &str,
    frontends: &[Frontend],
    backups: &[Tier],
    at: serde_saphyr::Location,
) {
    let families: BTreeSet<bool> =
        backups.iter().flat_map(|tier| &tier.backends).map(|backend| backend.address.is_ipv4()).collect();
    if families.is_empty() {
        return;
    }
    for (is_ipv4, family) in [(true, "IPv4"), (false, "IPv6")] {
        let of_family = frontends.iter().find(|frontend| frontend.address.is_ipv4() == is_ipv4);
        if let (Some(frontend), false) = (of_family, families.contains(&is_ipv4)) {
            let address = frontend.address;
            let problem = format!("have no {family} backend for the frontend {address}; allowed: at least one");
            problems.add(at, field, problem);
        }
    }
}

fn name(problems: &mut Problems<'_>, path: &str, name: &Spanned<String>) {
    // As Kubernetes names objects, with a namespace or without, but letters may be upper case.
    let good = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        let edge = |c: char| c.is_ascii_alphanumeric();
        part.starts_with(edge) && part.ends_with(edge) && part.chars().all(inner)
    };
    let parts: Vec<&str> = name.value.split('/').collect();
    if parts.len() > 2 || name.value.len() >= NAME_LEN || !parts.into_iter().all(good) {
        let problem = format!(
            "{:?} is not allowed; allowed: [NAMESPACE/]NAME, both of letters, digits, '-', '.' and '_' with a letter or \
             digit at both ends, {} characters in all",
            name.value,
            NAME_LEN - 1
        );
        problems.add(name.referenced, &format!("{path}.name"), problem);
    }
}

fn min_healthy(problems: &mut Problems<'_>, path: &str, value: Option<&Spanned<u64>>) -> usize {
    usize::try_from(problems.number(value, &format!("{path}.minHealthy"), 1, 1..=10_000)).unwrap_or(1)
}

fn backends(problems: &mut Problems<'_>, path: &str, raw: &[format::Backend]) -> Vec<Backend> {
    let mut seen = BTreeSet::new();
    let mut backends = Vec::new();
    for (i, raw) in raw.iter().enumerate() {
        let field = format!("{path}.backends[{i}]");
        let address = problems.address(&raw.address, &raw.port, &field);
        let weight = problems.number(raw.weight.as_ref(), &format!("{field}.weight"), 1, 1..=1000);
        if !seen.insert(address) {
            let problem = format!("{address} is already in this list; allowed: each backend once");
            problems.add(raw.address.referenced, &field, problem);
        }
        backends.push(Backend { address, weight: u16::try_from(weight).unwrap_or(1) });
    }
    backends
}
