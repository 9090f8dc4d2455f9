//! Validates the section `agent` of the file.

use std::{net::SocketAddr, time::Duration};

use breaker_api::{DEFAULT_PIN_PATH, DEFAULT_SOCKET};
use breaker_common::DEFAULT_MASQUERADE_MARK;
use globset::Glob;
use ipnet::IpNet;
use serde_saphyr::Spanned;

use super::{AgentConfig, FrontendRules, NodePortAddresses, format, problems::Problems};
use crate::{
    datapath::options::{AttachMode, AttachOrder, ConnectionSource, XdpPolicy},
    metrics::{Level, Settings},
};

/// The largest number of services that one node can protect.
pub(super) const MOST_SERVICES: u32 = 65_536;

pub(super) fn agent(problems: &mut Problems<'_>, raw: format::Agent) -> AgentConfig {
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
    let mut globs = Vec::new();
    for (index, glob) in raw.interfaces.iter().enumerate() {
        match Glob::new(&glob.value) {
            Ok(parsed) => globs.push(parsed),
            Err(error) => {
                let problem = format!("{:?} is not allowed ({error}); allowed: a name or a glob like eth*", glob.value);
                problems.add(glob.referenced, &format!("agent.interfaces[{index}]"), problem);
            }
        }
    }
    let xdp = [("Auto", XdpPolicy::Auto), ("Native", XdpPolicy::Native), ("Off", XdpPolicy::Off)];
    let orders = [("First", AttachOrder::First), ("Last", AttachOrder::Last)];
    let attach = [("Auto", AttachMode::Auto), ("Tcx", AttachMode::Tcx), ("Clsact", AttachMode::Clsact)];
    let sources = [
        ("Auto", ConnectionSource::Auto),
        ("Conntrack", ConnectionSource::Conntrack),
        ("Syns", ConnectionSource::Syns),
    ];
    let external_ips = [("Deny", false), ("Allow", true)];
    AgentConfig {
        pin_path: path(problems, raw.pin_path, "agent.pinPath", DEFAULT_PIN_PATH),
        socket: path(problems, raw.socket, "agent.socket", DEFAULT_SOCKET),
        listen: listen(problems, raw.listen.as_ref(), "agent.listen"),
        metrics_listen: listen(problems, raw.metrics_listen.as_ref(), "agent.metricsListen"),
        metrics: metrics(problems, &raw.metrics),
        veths: raw.veths.unwrap_or(true),
        uplinks: raw.uplinks.unwrap_or(false),
        node_sockets: raw.node_sockets.unwrap_or(true),
        interfaces: globs,
        attach: problems.word(raw.attach.as_ref(), "agent.attach", &attach, AttachMode::Auto),
        xdp: problems.word(raw.xdp.as_ref(), "agent.xdp", &xdp, XdpPolicy::Off),
        connections: problems.word(raw.connections.as_ref(), "agent.connections", &sources, ConnectionSource::Auto),
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
        frontends: FrontendRules {
            node_ports: node_port_addresses(problems, &raw.node_port_addresses),
            external_ips: problems.word(raw.external_ips.as_ref(), "agent.externalIPs", &external_ips, false),
        },
        masquerade_rule: raw.masquerade_rule.unwrap_or(true),
    }
}

fn node_port_addresses(problems: &mut Problems<'_>, values: &[Spanned<String>]) -> NodePortAddresses {
    let mut addresses = NodePortAddresses::default();
    for (index, value) in values.iter().enumerate() {
        match value.value.parse::<IpNet>() {
            Ok(network) => addresses.networks.push(network),
            Err(_) if value.value == "primary" => addresses.primary = true,
            Err(_) => {
                let problem =
                    format!("{:?} is not allowed; allowed: primary, or networks like 192.0.2.0/24", value.value);
                problems.add(value.referenced, &format!("agent.nodePortAddresses[{index}]"), problem);
            }
        }
    }
    addresses
}

fn metrics(problems: &mut Problems<'_>, raw: &format::Metrics) -> Settings {
    let levels = Level::NAMES.map(|(name, level)| (name, Some(level)));
    let default = Settings::default();
    let max_backends = default.max_backends as u64;
    let max_backends =
        problems.number(raw.max_backends.as_ref(), "agent.metrics.maxBackends", max_backends, 0..=100_000);
    Settings {
        level: problems.word(raw.level.as_ref(), "agent.metrics.level", &levels, default.level),
        per_backend: raw.per_backend.unwrap_or(default.per_backend),
        max_backends: usize::try_from(max_backends).unwrap_or(default.max_backends),
    }
}

fn listen(problems: &mut Problems<'_>, value: Option<&Spanned<String>>, field: &str) -> Option<SocketAddr> {
    let value = value?;
    let address = value.value.parse().ok();
    if address.is_none() {
        let problem = format!("{:?} is not allowed; allowed: an address and port like 127.0.0.1:9810", value.value);
        problems.add(value.referenced, field, problem);
    }
    address
}
