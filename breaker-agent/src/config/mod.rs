//! The configuration file: its format ([`mod@format`]), and the conversion to domain types with all checks ([`validate`]).
//!
//! Parsing is strict and happens once. A [`Config`] is always valid, so later code does not check it again.

mod agent;
mod breaker;
mod check;
mod exchange;
mod format;
mod limits;
mod problems;
mod service;
mod syntax;
mod validate;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use breaker_core::model::Service;
use globset::Glob;
use ipnet::IpNet;

use crate::{
    datapath::options::{AttachMode, AttachOrder, ConnectionSource, XdpPolicy},
    metrics,
};

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Settings of the agent itself.
    pub agent: AgentConfig,
    /// The protected services.
    pub services: Vec<Service>,
}

/// Settings of the agent itself. The agent uses them at start only. If a reload changes one, the agent logs that the
/// change takes effect at the next start.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    /// Directory in which maps and links are pinned, in a subdirectory named after the ABI version.
    pub pin_path: PathBuf,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Address that serves health and metrics on this node; `None` = they are not served.
    pub listen: Option<SocketAddr>,
    /// Address that serves metrics alone, for the cluster; `None` = it is not served.
    pub metrics_listen: Option<SocketAddr>,
    /// Which metrics are exported.
    pub metrics: metrics::Settings,
    /// Whether host-side veths of pods get the programs.
    pub veths: bool,
    /// Whether interfaces of default routes get the programs.
    pub uplinks: bool,
    /// Names of other interfaces that get the programs, as globs.
    pub interfaces: Vec<Glob>,
    /// Whether connections of the node's own processes are protected, too.
    pub node_sockets: bool,
    /// How the programs are attached.
    pub attach: AttachMode,
    /// Position among the programs of others on the same hook.
    pub attach_order: AttachOrder,
    /// Whether uplinks get the XDP program.
    pub xdp: XdpPolicy,
    /// How established connections to a primary are found.
    pub connections: ConnectionSource,
    /// How long the programs act on the last decision without a heartbeat of the agent; zero = for ever.
    pub lease: Duration,
    /// Number of services that the maps have room for; `None` = according to the node's memory.
    pub max_services: Option<u32>,
    /// Number of established flows of each IP family that the maps have room for; `None` = according to the node's
    /// memory.
    pub max_flows: Option<u32>,
    /// kube-proxy's masquerade mark.
    pub masquerade_mark: u32,
    /// Which addresses of Kubernetes Services are protected, beside their cluster IPs.
    pub frontends: FrontendRules,
    /// Whether breaker installs a masquerade rule of its own for that mark, which runs after kube-proxy's.
    pub masquerade_rule: bool,
}

/// Which addresses of Kubernetes Services are protected, beside their cluster IPs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrontendRules {
    /// At which of the node's addresses NodePorts are protected.
    pub node_ports: NodePortAddresses,
    /// Whether external IPs are protected: whoever may write a Service can name any address there.
    pub external_ips: bool,
}

/// At which of the node's addresses NodePorts are protected. It has the meaning of kube-proxy's `--nodeport-addresses`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePortAddresses {
    /// At the first address of each IP family.
    pub primary: bool,
    /// At addresses in these networks. Without networks and without `primary`: at all of them.
    pub networks: Vec<IpNet>,
}

impl NodePortAddresses {
    /// Those of a node's addresses that count, in the order in which the Node has them.
    #[must_use]
    pub fn of(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let is_first = |ip: &IpAddr| addresses.iter().find(|other| other.is_ipv4() == ip.is_ipv4()) == Some(ip);
        let all = !self.primary && self.networks.is_empty();
        let counts = |ip: &&IpAddr| {
            all || (self.primary && is_first(ip)) || self.networks.iter().any(|network| network.contains(*ip))
        };
        addresses.iter().filter(counts).copied().collect()
    }
}

/// One problem of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Line number, from 1; 0 if the problem does not belong to a line.
    pub line: u64,
    /// Path of the field, e.g. `services[0].primary.check.periodSeconds`; empty if the text is no YAML.
    pub field: String,
    /// The wrong value and what is allowed, or the parser's message.
    pub problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl std::error::Error for ConfigError {}

/// Reads and parses a configuration file.
///
/// # Errors
/// The file cannot be read or has a syntax error (one problem), or it has wrong values (all of them at once).
pub fn load(file: &Path) -> Result<Config, Vec<ConfigError>> {
    parse(file, &read(file)?)
}

/// Reads the text of a configuration file.
///
/// # Errors
/// The file cannot be read.
pub fn read(file: &Path) -> Result<String, Vec<ConfigError>> {
    std::fs::read_to_string(file).map_err(|error| {
        vec![ConfigError {
            file: file.to_owned(),
            line: 0,
            field: String::new(),
            problem: format!("cannot be read: {error}"),
        }]
    })
}

/// Parses the text of a configuration file. `file` is used in messages only.
///
/// # Errors
/// The text has a syntax error (one problem), or wrong values (all of them at once).
pub fn parse(file: &Path, text: &str) -> Result<Config, Vec<ConfigError>> {
    validate::validate(file, syntax::parse(file, text)?)
}

/// Parses the file of an agent whose services come from another source. It may contain the section `agent` only. An
/// empty text is valid and means all defaults.
///
/// # Errors
/// As for [`parse`].
pub fn parse_agent(file: &Path, text: &str) -> Result<AgentConfig, Vec<ConfigError>> {
    let text = if text.trim().is_empty() { "{}" } else { text };
    let raw: format::AgentFile = syntax::parse(file, text)?;
    validate::validate_agent(file, raw.agent)
}

/// Converts the policies of a service. `value` is a service in the format of the file, as JSON. Its lists of frontends
/// and backends may be empty; the caller fills in the addresses later.
///
/// # Errors
/// All problems in one line, each with the field (from `spec`), the value and what is allowed.
pub fn policies(value: &serde_json::Value) -> Result<Service, String> {
    use serde::Deserialize as _;
    let raw = format::Service::deserialize(value).map_err(|error| error.to_string())?;
    validate::validate_policies(raw).map_err(|errors| {
        let lines: Vec<String> =
            errors.into_iter().map(|error| format!("{}: {}", error.field, error.problem)).collect();
        lines.join("; ")
    })
}

#[cfg(test)]
mod tests;
