//! What the agent shows of itself: the JSON of the control socket, documented in docs/CONTROL.md.

use std::{collections::BTreeMap, net::SocketAddr};

use breaker_common::ServiceCounters;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use super::limits::{Biting, LimitsStatus, TierLimitsStatus};
use crate::model::ServiceName;

/// `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentStatus {
    /// Its version.
    pub version: String,
    /// Its process id; 0 when the status was read from the maps alone.
    pub pid: u32,
    /// Whether this was told by a running agent.
    pub running: bool,
    /// What it takes of the machine; absent without an agent.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub process: Option<ProcessStatus>,
    /// Its last sign of life.
    pub last_beat: Option<Timestamp>,
    /// When its lease runs out, if it has one and the agent does not renew it.
    pub lease_seconds: u64,
    /// About the datapath.
    pub datapath: DatapathStatus,
    /// The services, by name.
    pub services: Vec<ServiceStatus>,
}

/// What the agent takes of the machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessStatus {
    /// Time on a CPU since it started, seconds.
    pub cpu_seconds: f64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
}

impl ProcessStatus {
    /// Of this process; see [`ProcessStatus::of`].
    #[must_use]
    pub fn of_self() -> Option<Self> {
        Self::of(std::process::id())
    }

    /// Of a process, from /proc/PID/stat (proc(5): utime and stime are fields 14 and 15, in ticks; rss is field 24, in
    /// pages); `None` where that cannot be read.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses that may hold anything.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u32>().ok();
        let ticks = f64::from(number(14)?) + f64::from(number(15)?);
        let per_second = u32::try_from(rustix::param::clock_ticks_per_second()).ok()?;
        let page = u64::try_from(rustix::param::page_size()).ok()?;
        Some(Self { cpu_seconds: ticks / f64::from(per_second), resident_bytes: u64::from(number(24)?) * page })
    }
}

/// About the datapath.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatapathStatus {
    /// Where it is pinned.
    pub pin_path: String,
    /// How programs are attached: `Tcx` or `Clsact`.
    pub attach: String,
    /// Names of the interfaces with programs.
    pub interfaces: Vec<String>,
    /// Interfaces that should have programs and could not get them, with the reason.
    pub failed_interfaces: BTreeMap<String, String>,
    /// Uplinks where XDP is wanted: `native`, or why tc does it alone.
    #[serde(default)]
    pub xdp: BTreeMap<String, String>,
    /// Why the node's own processes and pods with hostNetwork are not protected; `None` where they are.
    pub node_sockets: Option<String>,
    /// Why there is no rule of breaker's own for the masquerade mark; `None` where there is.
    #[serde(default)]
    pub masquerade_rule: Option<String>,
    /// Entries in the flow tables at the last look.
    pub flow_entries: usize,
    /// How full the tables of established flows are, percent.
    pub flow_pressure: u8,
    /// Packets that failed open, by reason.
    pub reasons: BTreeMap<String, u64>,
}

/// `GET /v1/services/NAME`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// `Closed`, `Open` or `HalfOpen`.
    pub state: String,
    /// Since when.
    pub since: Timestamp,
    /// Why.
    pub reason: String,
    /// More about why, in words: the last failed probe, the operator's reason.
    pub message: String,
    /// The primary's share of new connections, permille.
    pub share: u16,
    /// Counts the changes of state.
    pub epoch: u32,
    /// Trips in a row.
    pub trips: u32,
    /// `Enforce` or `DryRun`.
    pub mode: String,
    /// What the operator wants: `Auto`, `ForceOpen`, `ForceClosed`.
    #[serde(rename = "override")]
    pub override_: String,
    /// Until when.
    pub override_until: Option<Timestamp>,
    /// `Off` or `PeerRedirect`.
    #[serde(default)]
    pub fast_path: String,
    /// Where clients connect to.
    pub frontends: Vec<String>,
    /// The primary, then the backups.
    pub tiers: Vec<TierStatus>,
    /// What the agent wants in the kernel.
    pub desired: Applied,
    /// What is in the kernel; `None` before the first write.
    pub applied: Option<Applied>,
    /// Why desired and applied differ.
    pub error: Option<String>,
    /// Failed writes since the agent started.
    pub failed_writes: u64,
    /// Flows on a backup that live.
    pub flows: usize,
    /// Since the maps exist.
    pub counters: Counters,
    /// Its limits, if it has any.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub limits: Option<LimitsStatus>,
}

/// The part of a plan that people compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// State.
    pub state: String,
    /// Share, permille.
    pub share: u16,
    /// Epoch.
    pub epoch: u32,
}

/// A tier.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierStatus {
    /// Its name.
    pub name: String,
    /// `primary` or `backup`.
    pub role: String,
    /// Whether it is the one that new connections go to now (for a ramp: also).
    pub active: bool,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// A backend.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendStatus {
    /// Address and port.
    pub address: SocketAddr,
    /// `Up`, `Down`, `Unknown`, or `Unchecked`.
    pub health: String,
    /// Since when it has this health.
    pub since: Option<Timestamp>,
    /// Code of the last probe, in HAProxy's vocabulary.
    pub last_check: Option<String>,
    /// What the last probe said.
    pub detail: Option<String>,
    /// How long it took, milliseconds.
    pub check_millis: Option<f64>,
    /// Relative weight.
    pub weight: u16,
    /// Whether it is known to be a pod of this node; asked only where it matters (`fastPath`, `externalTrafficPolicy: Local`).
    #[serde(default)]
    pub near: bool,
}

/// A service in short: what the programs act on, and how its backends are. Cheap to make, and equal as long as nothing
/// that is worth a word has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its name.
    pub name: ServiceName,
    /// The state in the kernel; empty before the first write.
    pub state: &'static str,
    /// Since when.
    pub since: Option<Timestamp>,
    /// Why.
    pub reason: &'static str,
    /// More about why.
    pub message: String,
    /// The primary's share in the kernel, permille.
    pub share: u16,
    /// Whether the kernel has what is wanted.
    pub in_force: bool,
    /// What went wrong with the last write.
    pub error: Option<String>,
    /// The primary, then the backups.
    pub tiers: Vec<TierSummary>,
    /// By how many nodes its limits are divided; 0 without limits.
    pub limits_shared_by: u32,
    /// The limit that bites, if one does.
    pub limited: Option<Biting>,
}

/// A tier in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierSummary {
    /// Its name.
    pub name: String,
    /// Backends that may get connections.
    pub up: usize,
    /// Backends.
    pub total: usize,
    /// Backends that were not checked yet.
    pub checking: usize,
    /// Of the backups: whether it is the one that would take over.
    pub active: bool,
}

/// [`ServiceCounters`] for JSON.
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
    /// ICMP errors about them, translated too.
    #[serde(default)]
    pub icmp_errors: u64,
    /// New connections that needed another source port.
    pub port_changed: u64,
    /// New connections whose client was the backup itself.
    pub hairpin: u64,
    /// New connections that a dry run would have moved or refused.
    pub dry_run: u64,
    /// New connections left to the primary because the lease ran out.
    pub agent_lost: u64,
    /// New connections left to the primary because something failed.
    pub failed_open: u64,
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
        }
    }
}

/// A line of `GET /v1/events`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventLine {
    /// Counts up; gaps are events that a slow reader missed.
    pub id: u64,
    /// When.
    pub at: Timestamp,
    /// Which service.
    pub service: String,
    /// `Transition`, `Health`, `Limited`, `StateAdopted`, `FlowMoved`, `Rejected`, `FlowReset`, `WriteFailed`, `Config`.
    pub kind: String,
    /// For a person.
    pub message: String,
    /// A transition's from.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub from: Option<String>,
    /// A transition's to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub to: Option<String>,
    /// A transition's reason.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}
