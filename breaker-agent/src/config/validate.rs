//! Converts the format of the file to domain types, with every default and every limit. All problems of a file are
//! reported at once, each with its line, field, value and what is allowed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::Path,
    time::Duration,
};

use breaker_api::{DEFAULT_PIN_PATH, DEFAULT_SOCKET};
use breaker_common::{DEFAULT_MASQUERADE_MARK, NAME_LEN};
use breaker_core::model::{
    Backend, BreakerPolicy, Check, CheckAction, EstablishedPolicy, FailureWindow, FastPath, Frontend, KeepClient, Mode,
    OnAgentLoss, Override, Protocol, Service, ServiceName, Tier, WhenAllUnhealthy,
};
use globset::{Glob, GlobSetBuilder};
use serde_saphyr::{Location, Spanned};

use super::{AgentConfig, Config, ConfigError, InterfaceGlobs, format, limits};
use crate::datapath::options::{AttachMode, AttachOrder, XdpPolicy};

/// One day in milliseconds: the longest time that a field accepts.
const DAY: u64 = 86_400_000;

/// The largest number of services that one node can protect.
const MOST_SERVICES: u32 = 65_536;

/// Collects problems. A field with a problem gets a default, so that later problems are found as well.
pub(super) struct Problems<'a> {
    file: &'a Path,
    found: Vec<ConfigError>,
}

impl Problems<'_> {
    pub(super) fn add(&mut self, at: Location, field: &str, problem: String) {
        self.found.push(ConfigError { file: self.file.to_owned(), line: at.line(), field: field.to_owned(), problem });
    }

    /// Returns a number in the allowed range; the default if there is none, or if it is out of range, which is
    /// reported.
    pub(super) fn number(
        &mut self,
        value: Option<&Spanned<u64>>,
        field: &str,
        default: u64,
        allowed: RangeInclusive<u64>,
    ) -> u64 {
        let Some(value) = value else { return default };
        if allowed.contains(&value.value) {
            return value.value;
        }
        let (least, most) = (allowed.start(), allowed.end());
        self.add(value.referenced, field, format!("{} is not allowed; allowed: {least} to {most}", value.value));
        default
    }

    fn u32(&mut self, value: Option<&Spanned<u64>>, field: &str, default: u32, allowed: RangeInclusive<u32>) -> u32 {
        let allowed = u64::from(*allowed.start())..=u64::from(*allowed.end());
        u32::try_from(self.number(value, field, u64::from(default), allowed)).unwrap_or(default)
    }

    pub(super) fn percent(
        &mut self,
        value: Option<&Spanned<u64>>,
        field: &str,
        default: u8,
        allowed: RangeInclusive<u64>,
    ) -> u8 {
        u8::try_from(self.number(value, field, u64::from(default), allowed)).unwrap_or(default)
    }

    fn millis(&mut self, value: Option<&Spanned<u64>>, field: &str, default: u64, least: u64) -> Duration {
        Duration::from_millis(self.number(value, field, default, least..=DAY))
    }

    /// Returns the meaning of one of the allowed words; the default if there is none, or if it is another word,
    /// which is reported.
    pub(super) fn word<T: Copy>(
        &mut self,
        value: Option<&Spanned<String>>,
        field: &str,
        words: &[(&str, T)],
        default: T,
    ) -> T {
        let Some(value) = value else { return default };
        if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == value.value) {
            return *meaning;
        }
        let allowed: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        self.add(value.referenced, field, format!("{:?} is not allowed; allowed: {}", value.value, allowed.join(", ")));
        default
    }

    fn port(&mut self, value: &Spanned<u64>, field: &str) -> u16 {
        u16::try_from(self.number(Some(value), field, 1, 1..=65535)).unwrap_or(1)
    }

    fn optional_port(&mut self, value: Option<&Spanned<u64>>, field: &str) -> Option<u16> {
        value.map(|value| self.port(value, field))
    }

    fn address(&mut self, address: &Spanned<String>, port: &Spanned<u64>, field: &str) -> SocketAddr {
        let port = self.port(port, &format!("{field}.port"));
        let field = format!("{field}.address");
        let mut refuse = |why: &str| {
            self.add(
                address.referenced,
                &field,
                format!("{:?} {why}; allowed: an IP address of a host", address.value),
            );
            IpAddr::from([127, 0, 0, 1])
        };
        let no_host = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.is_broadcast(),
            // No packet carries an IPv4-mapped address. A link-local address means nothing without an interface.
            IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some() || ip.is_unicast_link_local(),
        };
        let ip = match address.value.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() || no_host(&ip) => refuse("is not a host's address"),
            Ok(ip) => ip,
            Err(_) => refuse("is not an IP address"),
        };
        SocketAddr::new(ip, port)
    }
}

pub(super) fn validate(file: &Path, raw: format::File) -> Result<Config, Vec<ConfigError>> {
    let mut problems = Problems { file, found: Vec::new() };
    let agent = agent(&mut problems, raw.agent);
    let most = agent.max_services.unwrap_or(MOST_SERVICES);
    if raw.services.value.len() > most as usize {
        let count = raw.services.value.len();
        problems.add(raw.services.referenced, "services", format!("{count} are too many; allowed: up to {most}"));
    }
    let mut names = BTreeMap::new();
    let mut frontends = BTreeMap::new();
    let mut backups = Vec::new();
    let mut services = Vec::new();
    for (index, raw) in raw.services.value.into_iter().enumerate() {
        let path = format!("services[{index}]");
        let name = raw.name.clone();
        if let Some(first) = names.insert(name.value.clone(), name.referenced.line()) {
            let problem =
                format!("{:?} is already the name of the service in line {first}; allowed: a unique name", name.value);
            problems.add(name.referenced, &format!("{path}.name"), problem);
        }
        for (i, tier) in raw.backups.value.iter().enumerate() {
            for (j, backend) in tier.backends.value.iter().enumerate() {
                let field = format!("{path}.backups[{i}].backends[{j}]");
                let (Ok(ip), Ok(port)) = (backend.address.value.parse(), u16::try_from(backend.port.value)) else {
                    continue;
                };
                backups.push((name.value.clone(), field, SocketAddr::new(ip, port), backend.address.referenced));
            }
        }
        let places: Vec<Location> = raw.frontends.value.iter().map(|f| f.address.referenced).collect();
        let service = service(&mut problems, &path, raw, true);
        for (i, (frontend, at)) in service.frontends.iter().zip(places).enumerate() {
            if let Some(first) = frontends.insert(*frontend, (service.name.clone(), at.line())) {
                let problem = format!(
                    "{frontend} is already a frontend of {} (line {}); allowed: each frontend in one service, once",
                    first.0, first.1
                );
                problems.add(at, &format!("{path}.frontends[{i}]"), problem);
            }
        }
        services.push(service);
    }
    // A backup that is another service's frontend would be translated twice, and two connections of one client
    // could then have the same addresses and ports.
    for (service, field, address, at) in backups {
        let taken = [Protocol::Tcp, Protocol::Udp]
            .iter()
            .filter_map(|protocol| frontends.get_key_value(&Frontend { address, protocol: *protocol }))
            .find(|(_, (owner, _))| owner.as_str() != service);
        if let Some((frontend, (owner, _))) = taken {
            let problem = format!("{address} is {owner}'s frontend {frontend}; allowed: a pod's or host's own address");
            problems.add(at, &field, problem);
        }
    }
    if problems.found.is_empty() { Ok(Config { agent, services }) } else { Err(problems.found) }
}

/// Validates a file without services, for an agent whose services come from another source.
pub(super) fn validate_agent(file: &Path, raw: format::Agent) -> Result<AgentConfig, Vec<ConfigError>> {
    let mut problems = Problems { file, found: Vec::new() };
    let agent = agent(&mut problems, raw);
    if problems.found.is_empty() { Ok(agent) } else { Err(problems.found) }
}

/// Validates a service without its addresses.
pub(super) fn validate_policies(raw: format::Service) -> Result<Service, Vec<ConfigError>> {
    let mut problems = Problems { file: Path::new(""), found: Vec::new() };
    let service = service(&mut problems, "spec", raw, false);
    if problems.found.is_empty() { Ok(service) } else { Err(problems.found) }
}

fn agent(problems: &mut Problems<'_>, raw: format::Agent) -> AgentConfig {
    let path = |problems: &mut Problems<'_>, value: Option<Spanned<String>>, field: &str, default: &str| {
        let Some(value) = value else { return default.into() };
        if !value.value.starts_with('/') {
            problems.add(
                value.referenced,
                field,
                format!("{:?} is not allowed; allowed: an absolute path", value.value),
            );
        }
        value.value.into()
    };
    let mut globs = GlobSetBuilder::new();
    for (index, glob) in raw.interfaces.iter().enumerate() {
        match Glob::new(&glob.value) {
            Ok(parsed) => drop(globs.add(parsed)),
            Err(error) => {
                let problem = format!("{:?} is not allowed ({error}); allowed: a name or a glob like eth*", glob.value);
                problems.add(glob.referenced, &format!("agent.interfaces[{index}]"), problem);
            }
        }
    }
    let xdp = [("Auto", XdpPolicy::Auto), ("Native", XdpPolicy::Native), ("Off", XdpPolicy::Off)];
    let orders = [("First", AttachOrder::First), ("Last", AttachOrder::Last)];
    let attach = [("Auto", AttachMode::Auto), ("Tcx", AttachMode::Tcx), ("Clsact", AttachMode::Clsact)];
    AgentConfig {
        pin_path: path(problems, raw.pin_path, "agent.pinPath", DEFAULT_PIN_PATH),
        socket: path(problems, raw.socket, "agent.socket", DEFAULT_SOCKET),
        listen: listen(problems, raw.listen.as_ref()),
        veths: raw.veths.unwrap_or(true),
        uplinks: raw.uplinks.unwrap_or(false),
        node_sockets: raw.node_sockets.unwrap_or(true),
        interfaces: InterfaceGlobs::new(
            globs.build().unwrap_or_default(),
            raw.interfaces.into_iter().map(|glob| glob.value).collect(),
        ),
        attach: problems.word(raw.attach.as_ref(), "agent.attach", &attach, AttachMode::Auto),
        xdp: problems.word(raw.xdp.as_ref(), "agent.xdp", &xdp, XdpPolicy::Off),
        attach_order: problems.word(raw.attach_order.as_ref(), "agent.attachOrder", &orders, AttachOrder::First),
        lease: Duration::from_secs(problems.number(raw.lease_seconds.as_ref(), "agent.leaseSeconds", 60, 0..=86_400)),
        max_services: raw.max_services.map(|n| problems.u32(Some(&n), "agent.maxServices", 1, 16..=MOST_SERVICES)),
        max_flows: raw.max_flows.map(|n| problems.u32(Some(&n), "agent.maxFlows", 1, 1024..=4_194_304)),
        masquerade_mark: problems.u32(
            raw.masquerade_mark.as_ref(),
            "agent.masqueradeMark",
            DEFAULT_MASQUERADE_MARK,
            1..=u32::MAX,
        ),
        masquerade_rule: raw.masquerade_rule.unwrap_or(true),
    }
}

/// Converts a service. `complete` is false if the caller fills in the addresses later; then there may be none.
fn service(problems: &mut Problems<'_>, path: &str, raw: format::Service, complete: bool) -> Service {
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
            min_healthy: min_healthy(problems, &field, raw.min_healthy.as_ref()),
        });
    }
    let field = |name: &str| format!("{path}.{name}");
    let limits = limits::limits(problems, &field("limits"), raw.limits, !backups.is_empty());
    let established = [("Keep", EstablishedPolicy::Keep), ("Reset", EstablishedPolicy::Reset)];
    let unhealthy = [("PassThrough", WhenAllUnhealthy::PassThrough), ("Reject", WhenAllUnhealthy::Reject)];
    let loss = [("PassThrough", OnAgentLoss::PassThrough), ("Hold", OnAgentLoss::Hold)];
    let fast_paths = [("Off", FastPath::Off), ("PeerRedirect", FastPath::PeerRedirect)];
    let modes = [("Enforce", Mode::Enforce), ("DryRun", Mode::DryRun)];
    let overrides =
        [("Auto", Override::Auto), ("ForceOpen", Override::ForceOpen), ("ForceClosed", Override::ForceClosed)];
    Service {
        name: ServiceName::new(&raw.name.value),
        frontends,
        routes: Vec::new(),
        primary,
        backups,
        grace_period: Duration::ZERO,
        breaker: breaker(problems, &field("breaker"), raw.breaker),
        mode: problems.word(raw.mode.as_ref(), &field("mode"), &modes, Mode::Enforce),
        override_: problems.word(raw.override_.as_ref(), &field("override"), &overrides, Override::Auto),
        on_open: problems.word(raw.on_open.as_ref(), &field("onOpen"), &established, EstablishedPolicy::Reset),
        on_close: problems.word(raw.on_close.as_ref(), &field("onClose"), &established, EstablishedPolicy::Keep),
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

fn listen(problems: &mut Problems<'_>, value: Option<&Spanned<String>>) -> Option<SocketAddr> {
    let value = value?;
    let address = value.value.parse().ok();
    if address.is_none() {
        let problem = format!("{:?} is not allowed; allowed: an address and port like 127.0.0.1:9810", value.value);
        problems.add(value.referenced, "agent.listen", problem);
    }
    address
}

fn name(problems: &mut Problems<'_>, path: &str, name: &Spanned<String>) {
    let good = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    if name.value.is_empty() || name.value.len() >= NAME_LEN || !name.value.chars().all(good) {
        let problem = format!(
            "{:?} is not allowed; allowed: 1 to {} letters, digits, '-', '.', '_' and '/'",
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

fn check(problems: &mut Problems<'_>, path: &str, raw: format::Check) -> Check {
    let field = |name: &str| format!("{path}.{name}");
    let place = [
        raw.http_get.as_ref().map(|a| a.referenced),
        raw.tcp_socket.as_ref().map(|a| a.referenced),
        raw.grpc.as_ref().map(|a| a.referenced),
    ];
    let actions: Vec<Location> = place.into_iter().flatten().collect();
    if actions.len() != 1 {
        let at = actions.get(1).copied().unwrap_or(Location::UNKNOWN);
        let problem = format!("has {} actions; allowed: exactly one of httpGet, tcpSocket, grpc", actions.len());
        problems.add(at, path, problem);
    }
    let action = if let Some(http) = raw.http_get {
        http_get(problems, &field("httpGet"), http.value)
    } else if let Some(grpc) = raw.grpc {
        CheckAction::Grpc {
            port: problems.optional_port(grpc.value.port.as_ref(), &field("grpc.port")),
            service: grpc.value.service.unwrap_or_default(),
        }
    } else {
        let port = raw.tcp_socket.and_then(|tcp| tcp.value.port);
        CheckAction::TcpSocket { port: problems.optional_port(port.as_ref(), &field("tcpSocket.port")) }
    };
    let period = either(problems, path, "period", (raw.period_seconds, 86_400), (raw.period_millis, DAY), 10, 3000);
    let timeout =
        either(problems, path, "timeout", (raw.timeout_seconds, 3600), (raw.timeout_millis, 3_600_000), 10, 1000);
    let fast = raw.fast_period_millis.as_ref();
    let fast_default = u64::try_from(period.as_millis()).unwrap_or(DAY);
    let fast_period = problems.millis(fast, &field("fastPeriodMillis"), fast_default, 10);
    Check {
        action,
        period,
        fast_period: fast_period.min(period),
        timeout,
        failure_threshold: problems.u32(raw.failure_threshold.as_ref(), &field("failureThreshold"), 1, 1..=1000),
        success_threshold: problems.u32(raw.success_threshold.as_ref(), &field("successThreshold"), 1, 1..=1000),
        jitter_percent: problems.percent(raw.jitter_percent.as_ref(), &field("jitterPercent"), 0, 0..=50),
    }
}

/// Returns a time that is given in seconds or in milliseconds. If both are given, that is reported.
fn either(
    problems: &mut Problems<'_>,
    path: &str,
    name: &str,
    (seconds, most_seconds): (Option<Spanned<u64>>, u64),
    (millis, most_millis): (Option<Spanned<u64>>, u64),
    least_millis: u64,
    default_millis: u64,
) -> Duration {
    if let (Some(seconds), Some(_)) = (&seconds, &millis) {
        let problem = format!("is set together with {name}Millis; allowed: only one of the two");
        problems.add(seconds.referenced, &format!("{path}.{name}Seconds"), problem);
    }
    if let Some(millis) = millis {
        let field = format!("{path}.{name}Millis");
        return Duration::from_millis(problems.number(
            Some(&millis),
            &field,
            default_millis,
            least_millis..=most_millis,
        ));
    }
    if let Some(seconds) = seconds {
        let field = format!("{path}.{name}Seconds");
        return Duration::from_secs(problems.number(Some(&seconds), &field, 1, 1..=most_seconds));
    }
    Duration::from_millis(default_millis)
}

fn http_get(problems: &mut Problems<'_>, path: &str, raw: format::HttpGet) -> CheckAction {
    let field = |name: &str| format!("{path}.{name}");
    if let Some(given) = &raw.path
        && !given.value.starts_with('/')
    {
        let problem = format!("{:?} is not allowed; allowed: a path that starts with '/'", given.value);
        problems.add(given.referenced, &field("path"), problem);
    }
    for (i, header) in raw.http_headers.iter().enumerate() {
        let at = field(&format!("httpHeaders[{i}]"));
        if header.name.value.parse::<http::HeaderName>().is_err() {
            let problem =
                format!("{:?} is not a header name; allowed: a token (RFC 9110, section 5.1)", header.name.value);
            problems.add(header.name.referenced, &format!("{at}.name"), problem);
        }
        if header.value.value.parse::<http::HeaderValue>().is_err() {
            let problem = format!("{:?} is not a header value; allowed: visible ASCII characters", header.value.value);
            problems.add(header.value.referenced, &format!("{at}.value"), problem);
        }
    }
    if let Some(host) = &raw.host
        && host.value.parse::<http::uri::Authority>().is_err()
    {
        let problem = format!("{:?} is not allowed; allowed: a host name, optionally with a port", host.value);
        problems.add(host.referenced, &field("host"), problem);
    }
    let https = problems.word(raw.scheme.as_ref(), &field("scheme"), &[("HTTP", false), ("HTTPS", true)], false);
    CheckAction::HttpGet {
        path: raw.path.map_or_else(|| "/".into(), |path| path.value),
        port: problems.optional_port(raw.port.as_ref(), &field("port")),
        https,
        host: raw.host.map(|host| host.value),
        headers: raw.http_headers.into_iter().map(|h| (h.name.value, h.value.value)).collect(),
        expected_statuses: raw
            .expected_statuses
            .map_or_else(|| vec![200..=399], |given| statuses(problems, &field("expectedStatuses"), &given)),
        body_contains: raw.body_contains,
    }
}

/// Parses a list of statuses and ranges, like `200-399` or `200,204,300-302`.
fn statuses(problems: &mut Problems<'_>, field: &str, given: &Spanned<String>) -> Vec<RangeInclusive<u16>> {
    let number = |text: &str| text.trim().parse::<u16>().ok().filter(|n| (100..=599).contains(n));
    let ranges: Option<Vec<_>> = given
        .value
        .split(',')
        .map(|part| {
            let (least, most) = part.split_once('-').unwrap_or((part, part));
            let range = number(least)?..=number(most)?;
            (!range.is_empty()).then_some(range)
        })
        .collect();
    ranges.unwrap_or_else(|| {
        let problem = format!(
            "{:?} is not allowed; allowed: statuses and ranges from 100 to 599, like 200-399 or 200,204",
            given.value
        );
        problems.add(given.referenced, field, problem);
        vec![200..=399]
    })
}

fn breaker(problems: &mut Problems<'_>, path: &str, raw: format::Breaker) -> BreakerPolicy {
    let field = |name: &str| format!("{path}.{name}");
    // A failure rate that tripped the breaker does not tell whether the primary has recovered. With a window the
    // breaker must therefore stay open for some time: by default for the window's length, and at least 1 ms.
    let window_length = raw.window.as_ref().map(|w| w.length_millis.as_ref().map_or(10_000, |length| length.value));
    let open = problems.millis(
        raw.open_millis.as_ref(),
        &field("openMillis"),
        window_length.unwrap_or(0).min(DAY),
        u64::from(window_length.is_some()),
    );
    let max_open = problems.millis(raw.max_open_millis.as_ref(), &field("maxOpenMillis"), 300_000, 0);
    if let Some(given) = &raw.max_open_millis
        && max_open < open
    {
        let problem = format!("{} is not allowed; allowed: at least openMillis ({})", given.value, open.as_millis());
        problems.add(given.referenced, &field("maxOpenMillis"), problem);
    }
    let permille = problems.number(raw.ramp_start_permille.as_ref(), &field("rampStartPermille"), 100, 0..=1000);
    BreakerPolicy {
        open,
        max_open: max_open.max(open),
        jitter_percent: problems.percent(raw.jitter_percent.as_ref(), &field("jitterPercent"), 0, 0..=50),
        decay: problems.millis(raw.decay_millis.as_ref(), &field("decayMillis"), 60_000, 0),
        half_open_connections: problems.u32(
            raw.half_open_connections.as_ref(),
            &field("halfOpenConnections"),
            0,
            0..=1_000_000,
        ),
        half_open_timeout: problems.millis(
            raw.half_open_timeout_millis.as_ref(),
            &field("halfOpenTimeoutMillis"),
            30_000,
            10,
        ),
        half_open_passes: problems.u32(raw.half_open_passes.as_ref(), &field("halfOpenPasses"), 3, 1..=1000),
        ramp: problems.millis(raw.ramp_millis.as_ref(), &field("rampMillis"), 0, 0),
        ramp_start: u16::try_from(permille).unwrap_or(100),
        window: raw.window.map(|raw| {
            let field = |name: &str| format!("{path}.window.{name}");
            FailureWindow {
                length: problems.millis(raw.length_millis.as_ref(), &field("lengthMillis"), 10_000, 100),
                minimum_volume: problems.u32(raw.minimum_volume.as_ref(), &field("minimumVolume"), 20, 1..=10_000),
                failure_rate_percent: problems.percent(
                    raw.failure_rate_percent.as_ref(),
                    &field("failureRatePercent"),
                    50,
                    1..=100,
                ),
            }
        }),
    }
}
