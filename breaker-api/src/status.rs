//! The status of an agent and of its services. docs/CONTROL.md describes the fields.

use std::{collections::BTreeMap, net::SocketAddr};

use breaker_common::{BreakerState, ServiceCounters, StateReason};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    crd::{AttachMode, FastPath, Mode, Override, WhenAllUnhealthy},
    established::EstablishedCounts,
    limits::LimitsStatus,
    tier::TierRole,
};

/// The answer to `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// The agent's version.
    pub version: String,
    /// The agent's process id. Without a running agent, the process id of the last one, from the maps.
    pub pid: u32,
    /// Whether this status comes from a running agent; otherwise it was read from the maps.
    pub running: bool,
    /// Whether an agent has its control socket open, but does not answer. The status then comes from the maps.
    #[serde(default)]
    pub hung: bool,
    /// The CPU time and memory that the agent uses; absent without a running agent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub process: Option<ProcessStatus>,
    /// Number of log lines that were lost since the agent started: its log could not be written, or was not read fast
    /// enough.
    #[serde(default)]
    pub lost_log_lines: u64,
    /// Number of faults (panics) in the agent since it started. Each ended one attempt of one task.
    #[serde(default)]
    pub panics: u64,
    /// What the agent does without because of an error, like an address that it cannot listen on.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub degraded: Vec<String>,
    /// How busy the probes are; absent without a running agent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub probes: Option<ProbesStatus>,
    /// Time of the agent's last heartbeat.
    pub last_beat: Option<Timestamp>,
    /// The lease in seconds: how long the programs trust the agent's decisions after its last heartbeat. 0: for ever.
    pub lease_seconds: u64,
    /// The datapath.
    pub datapath: DatapathStatus,
    /// The services, by name.
    pub services: Vec<ServiceStatus>,
}

/// How busy the probes are.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProbesStatus {
    /// Probes at the same time, at most. It follows from the limit of descriptors (`RLIMIT_NOFILE`).
    pub limit: usize,
    /// Probes that run now.
    pub running: usize,
    /// Probes that wait for their turn.
    pub waiting: u64,
    /// Probes that began more than 20 ms late since the agent started: too many others were running, or the agent did
    /// not get to run.
    pub late: u64,
    /// Probes without a result because of an error of this node, since the agent started.
    pub local_errors: u64,
}

/// The CPU time and memory that the agent uses.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessStatus {
    /// CPU time since the agent started, in seconds.
    pub cpu_seconds: f64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
}

/// The datapath.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatapathStatus {
    /// The directory in which maps and links are pinned.
    pub pin_path: String,
    /// How the tc programs are attached.
    #[serde(with = "crate::text::or_empty")]
    pub attach: Option<AttachMode>,
    /// Names of the interfaces with programs.
    pub interfaces: Vec<String>,
    /// Interfaces that should have programs but have none, with the reason.
    pub failed_interfaces: BTreeMap<String, String>,
    /// Interfaces whose turn to get the programs has not come yet.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub waiting_interfaces: Vec<String>,
    /// Programs of others on the same hooks, by name, with the interfaces, as far as the kernel tells them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub other_programs: BTreeMap<String, Vec<String>>,
    /// What the programs cannot see on this node: pods without a host side, patterns without an interface.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub notes: Vec<String>,
    /// Interfaces whose clients do not get the answers of backups; their new connections are left to kube-proxy for now.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub suspended: Vec<SuspendedPath>,
    /// The uplinks for which XDP is configured: `native`, or why tc does the work alone.
    #[serde(default)]
    pub xdp: BTreeMap<String, String>,
    /// What somebody else took away and the agent put back: names of interfaces, or `masqueradeRule`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    pub restored: BTreeMap<String, Restored>,
    /// Why the node's own processes and pods with hostNetwork are not protected; `None` if they are.
    pub node_sockets: Option<String>,
    /// Why breaker's own rule for the masquerade mark is not installed; `None` if it is.
    #[serde(default)]
    pub masquerade_rule: Option<String>,
    /// Number of entries in the flow tables at the last sweep.
    pub flow_entries: usize,
    /// Fill level of the fuller table of established flows (IPv4 or IPv6) at the last sweep, in percent.
    pub flow_pressure: u8,
    /// Packets that the programs passed untouched because of an error or an unsupported header (fail open), by
    /// reason.
    pub reasons: BTreeMap<String, u64>,
}

/// An interface on which a service's new connections are not redirected, because no answers of backups were seen there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SuspendedPath {
    /// Name of the interface.
    pub interface: String,
    /// Name of the service.
    pub service: String,
    /// When new connections are redirected again, as a trial.
    pub until: Timestamp,
}

/// How often a part of the datapath was put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Restored {
    /// How often since the agent started.
    pub count: u64,
    /// When it happened last.
    pub last: Timestamp,
}

/// The answer to `GET /v1/services/NAME`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// The service's name.
    pub name: String,
    /// The breaker's state.
    pub state: BreakerState,
    /// When it entered its state.
    pub since: Timestamp,
    /// The reason for the state; absent for a reason that only another version knows.
    #[serde(with = "crate::text::or_empty")]
    pub reason: Option<StateReason>,
    /// Details of the reason, for people: the last failed probe, or the operator's reason.
    pub message: String,
    /// The primary's share of new connections, permille.
    pub share: u16,
    /// Counter of the decisions: it increases with every change of state, and when earlier decisions become obsolete.
    pub epoch: u32,
    /// Number of trips in a row.
    pub trips: u32,
    /// Whether decisions are carried out; not known without an agent.
    #[serde(with = "crate::text::or_empty")]
    pub mode: Option<Mode>,
    /// The override in force.
    #[serde(rename = "override")]
    pub override_: Override,
    /// When the override expires; `None` if it does not.
    pub override_until: Option<Timestamp>,
    /// How packets to backup pods of this node are delivered; not known without an agent.
    #[serde(default, with = "crate::text::or_empty")]
    pub fast_path: Option<FastPath>,
    /// The fate of a new connection while neither the primary nor a backup can be used; not known without an agent.
    #[serde(default, with = "crate::text::or_empty")]
    pub when_all_unhealthy: Option<WhenAllUnhealthy>,
    /// The addresses, ports and protocols that clients connect to.
    pub frontends: Vec<String>,
    /// The tiers: the primary first, then the backups in order of preference.
    pub tiers: Vec<TierStatus>,
    /// What the agent wants the maps to contain.
    pub desired: Applied,
    /// What the maps contain; `None` before the first write.
    pub applied: Option<Applied>,
    /// The error of the last write, if it failed; `desired` and `applied` then differ.
    pub error: Option<String>,
    /// Failed writes since the agent started.
    pub failed_writes: u64,
    /// Number of live flows on backups at the last sweep.
    pub flows: usize,
    /// The connections that were established when the service left a tier; absent if there were none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub established: Option<EstablishedCounts>,
    /// Probes without a result, because of an error of this node, since the agent first saw the service.
    #[serde(default)]
    pub local_errors: u64,
    /// Counters since the service was added to the maps.
    pub counters: Counters,
    /// The service's limits, if it has any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub limits: Option<LimitsStatus>,
}

/// The part of a plan by which `desired` and `applied` are compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// The state.
    pub state: BreakerState,
    /// The primary's share, permille.
    pub share: u16,
    /// The epoch.
    pub epoch: u32,
}

/// A tier.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierStatus {
    /// The tier's name.
    pub name: String,
    /// The tier's role.
    pub role: TierRole,
    /// Whether this is the tier that new connections go to now. During a ramp it is the primary, in half-open it is
    /// the backup, although the other tier gets some of them, too.
    pub active: bool,
    /// The tier's backends.
    pub backends: Vec<BackendStatus>,
}

/// A backend's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Health {
    /// Usable.
    Up,
    /// Not usable.
    Down,
    /// Not checked yet.
    Unknown,
    /// Its tier has no check.
    Unchecked,
}

impl Health {
    /// The name in JSON and in output.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Up => "Up",
            Self::Down => "Down",
            Self::Unknown => "Unknown",
            Self::Unchecked => "Unchecked",
        }
    }
}

/// Outcome of a probe in HAProxy's vocabulary (its management guide, section 9.3, `check_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckCode {
    /// The connection was established, and the check asks for no more.
    #[serde(rename = "L4OK")]
    L4Ok,
    /// The connection was refused or broke, or the address is unreachable.
    #[serde(rename = "L4CON")]
    L4Con,
    /// Not connected in time.
    #[serde(rename = "L4TOUT")]
    L4Tout,
    /// The TLS handshake did not end in time.
    #[serde(rename = "L6TOUT")]
    L6Tout,
    /// The TLS handshake failed.
    #[serde(rename = "L6RSP")]
    L6Rsp,
    /// The answer passes the check.
    #[serde(rename = "L7OK")]
    L7Ok,
    /// An answer with another status than expected.
    #[serde(rename = "L7STS")]
    L7Sts,
    /// Connected, but no answer in time.
    #[serde(rename = "L7TOUT")]
    L7Tout,
    /// A malformed answer, or a body that does not match.
    #[serde(rename = "L7RSP")]
    L7Rsp,
}

impl CheckCode {
    /// As HAProxy prints it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::L4Ok => "L4OK",
            Self::L4Con => "L4CON",
            Self::L4Tout => "L4TOUT",
            Self::L6Tout => "L6TOUT",
            Self::L6Rsp => "L6RSP",
            Self::L7Ok => "L7OK",
            Self::L7Sts => "L7STS",
            Self::L7Tout => "L7TOUT",
            Self::L7Rsp => "L7RSP",
        }
    }
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendStatus {
    /// Address and port.
    pub address: SocketAddr,
    /// Its health.
    pub health: Health,
    /// Since when it has this health.
    pub since: Option<Timestamp>,
    /// Code of the last probe with a result, in HAProxy's vocabulary.
    pub last_check: Option<CheckCode>,
    /// Details of the last probe: the HTTP status or the error.
    pub detail: Option<String>,
    /// Duration of the last probe, in milliseconds.
    pub check_millis: Option<f64>,
    /// The probes since then, if they had no result because of an error of this node.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub local_errors: Option<LocalErrors>,
    /// Relative weight.
    pub weight: u16,
    /// Whether the backend is known to be a pod on this node. Determined only for services that need it
    /// (`fastPath`, `externalTrafficPolicy: Local`); otherwise `false`.
    #[serde(default)]
    #[serde(rename = "near")]
    pub local: bool,
}

/// Probes in a row without a result. Something on this node kept them from asking, so they say nothing about the
/// backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalErrors {
    /// How many.
    pub count: u64,
    /// When the first of them ended.
    pub since: Timestamp,
    /// Why the last of them had no result.
    pub detail: String,
}

/// [`ServiceCounters`] as JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counters {
    /// New connections left to the primary.
    pub new_primary: u64,
    /// New connections moved to a backup.
    pub moved: u64,
    /// New connections refused.
    pub rejected: u64,
    /// New connections let through while half-open.
    pub half_open: u64,
    /// Segments of established connections answered with a reset.
    pub resets: u64,
    /// Packets translated.
    pub translated: u64,
    /// ICMP errors about translated packets, translated as well.
    #[serde(default)]
    pub icmp_errors: u64,
    /// New connections whose source port had to be changed.
    pub port_changed: u64,
    /// New connections whose client was the backup itself.
    pub hairpin: u64,
    /// New connections that a dry run would have moved or refused.
    pub dry_run: u64,
    /// New connections left to the primary because the agent's lease had expired.
    pub agent_lost: u64,
    /// New connections left to the primary because of an error in the programs, for example a full table.
    pub failed_open: u64,
    /// Answers of the primary that came after the client's repeated connection attempt had been sent to a backup. They
    /// were dropped.
    #[serde(default)]
    pub late_answers: u64,
}

impl From<ServiceCounters> for Counters {
    fn from(c: ServiceCounters) -> Self {
        Self {
            new_primary: c.new_primary,
            moved: c.new_backup,
            rejected: c.rejected,
            icmp_errors: c.icmp_errors,
            half_open: c.half_open,
            resets: c.resets,
            translated: c.translated,
            port_changed: c.port_changed,
            hairpin: c.hairpin,
            dry_run: c.dry_run,
            agent_lost: c.agent_lost,
            failed_open: c.failed_open,
            late_answers: c.late_answers,
        }
    }
}
