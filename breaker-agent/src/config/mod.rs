//! The configuration file: what a person writes ([`format`]), and what it means ([`validate`]).
//!
//! Parsing is strict and happens once: behind [`Config`] nothing is checked again.

mod format;
mod limits;
mod validate;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use globset::GlobSet;

use crate::model::Service;

pub use validate::{DEFAULT_PIN_PATH, DEFAULT_SOCKET};

/// A configuration that holds together.
#[derive(Clone, Debug)]
pub struct Config {
    /// About the agent itself.
    pub agent: AgentConfig,
    /// What is protected.
    pub services: Vec<Service>,
}

/// About the agent itself. All of it is read at start; a reload that changes it says that it needs a restart.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Where maps and links are pinned; the ABI version is added below.
    pub pin_path: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// Where `/livez` and `/readyz` are served, if anywhere.
    pub listen: Option<SocketAddr>,
    /// Whether host-side veths get the programs.
    pub veths: bool,
    /// Whether interfaces that a default route leaves by get the programs.
    pub uplinks: bool,
    /// Further interfaces, by glob.
    pub interfaces: GlobSet,
    /// The globs as written, to compare.
    pub interface_globs: Vec<String>,
    /// Whether the node's own processes are protected, too.
    pub node_sockets: bool,
    /// How the programs are attached.
    pub attach: AttachMode,
    /// Before or behind others' on the same hook.
    pub attach_order: AttachOrder,
    /// XDP on uplinks.
    pub xdp: XdpPolicy,
    /// How long the programs act on the agent's last word; zero = for ever.
    pub lease: Duration,
    /// How many services there is room for; `None`: by the node's memory.
    pub max_services: Option<u32>,
    /// How many established flows of each IP family there is room for; `None`: by the node's memory.
    pub max_flows: Option<u32>,
    /// kube-proxy's masquerade mark.
    pub masquerade_mark: u32,
    /// Whether there is to be a rule of our own for it, behind kube-proxy's.
    pub masquerade_rule: bool,
}

impl PartialEq for AgentConfig {
    fn eq(&self, other: &Self) -> bool {
        let key = |c: &Self| {
            (
                c.pin_path.clone(),
                c.socket.clone(),
                c.listen,
                (c.veths, c.uplinks, c.node_sockets),
                c.interface_globs.clone(),
                (c.attach, c.attach_order, c.xdp),
                c.lease,
                (c.max_services, c.max_flows),
                (c.masquerade_mark, c.masquerade_rule),
            )
        };
        key(self) == key(other)
    }
}

/// How programs are attached to tc hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum AttachMode {
    /// tcx where the kernel has it, clsact elsewhere.
    Auto,
    /// tcx links (kernel 6.6).
    Tcx,
    /// cls_bpf filters on a clsact qdisc.
    Clsact,
}

/// Where our programs stand among those of a hook that are there when they are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum AttachOrder {
    /// They see packets before all others.
    First,
    /// They see packets that all others let through.
    Last,
}

/// Whether uplinks get an XDP program, too; never in the kernel's generic mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum XdpPolicy {
    /// No.
    Off,
    /// Where the driver has a native mode, but for veths.
    Auto,
    /// Also on a veth.
    Native,
}

/// What is wrong with a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Line, from 1; 0 where the error has no place.
    pub line: u64,
    /// Where in the structure, e.g. `services[0].primary.check.periodSeconds`; empty for a syntax error.
    pub field: String,
    /// What is wrong: the value and what is allowed.
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

/// Reads a configuration file.
///
/// # Errors
/// Everything that is wrong with it: an unreadable file and a syntax error alone, problems with values all at once.
pub fn load(file: &Path) -> Result<Config, Vec<ConfigError>> {
    parse(file, &read(file)?)
}

/// Reads a configuration file's text.
///
/// # Errors
/// A file that cannot be read.
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

/// Parses a configuration; `file` is for the messages only.
///
/// # Errors
/// As for [`load`].
pub fn parse(file: &Path, text: &str) -> Result<Config, Vec<ConfigError>> {
    let raw: format::File = serde_saphyr::from_str(text).map_err(|error| syntax(file, &error))?;
    validate::validate(file, raw)
}

/// Parses the file of an agent whose services come from elsewhere: the section `agent` and nothing else. An empty text is
/// fine.
///
/// # Errors
/// As for [`load`].
pub fn parse_agent(file: &Path, text: &str) -> Result<AgentConfig, Vec<ConfigError>> {
    let text = if text.trim().is_empty() { "{}" } else { text };
    let raw: format::AgentFile = serde_saphyr::from_str(text).map_err(|error| syntax(file, &error))?;
    validate::validate_agent(file, raw.agent)
}

/// Parses a service whose addresses are filled in later: a file's service with empty lists of frontends and backends.
///
/// # Errors
/// Everything that is wrong, in one line: fields (from `spec`), values, what is allowed.
pub fn parse_policies(text: &str) -> Result<Service, String> {
    let raw: format::Service = serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())?;
    validate::validate_policies(raw).map_err(|errors| {
        let lines: Vec<String> =
            errors.into_iter().map(|error| format!("{}: {}", error.field, error.problem)).collect();
        lines.join("; ")
    })
}

fn syntax(file: &Path, error: &serde_saphyr::Error) -> Vec<ConfigError> {
    let line = error.location().map_or(0, |location| location.line());
    // The first line says it; the rest is a picture of the place, which the line number replaces.
    let problem = error.without_snippet().to_string();
    vec![ConfigError { file: file.to_owned(), line, field: String::new(), problem }]
}

#[cfg(test)]
mod tests;
